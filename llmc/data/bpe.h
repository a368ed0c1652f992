// GPT-2's byte-level byte-pair encoding (Radford et al. 2019), from Hugging Face's `vocab.json` and `merges.txt`.
// Text is split into words, a word into bytes, and the pair of neighbours that comes first in the list of merges is
// joined until no pair is in it. Called by data/tokenizer.h.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <queue>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "llmc/data/unicode.h"
#include "llmc/io/json.h"

enum class CharClass { letter, number, space, other };

// The code point that begins at text[i] and its length in bytes; what is not UTF-8 is -1, one byte long.
inline std::pair<int32_t, size_t> decode_utf8(std::string_view text, size_t i) {
    const auto byte = [&](size_t k) { return int32_t(uint8_t(text[k])); };
    const int32_t first = byte(i);
    if (first < 0x80) return {first, 1};
    const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4 || i + length > text.size()) return {-1, 1};
    int32_t code = first & (0x7f >> length);
    for (size_t k = 1; k < length; k++) {
        if ((byte(i + k) & 0xc0) != 0x80) return {-1, 1};
        code = code << 6 | (byte(i + k) & 0x3f);
    }
    const int32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (code < smallest[length] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return {-1, 1};
    return {code, length};
}

inline std::string encode_utf8(int32_t code) {  // up to U+07FF, all that the vocabulary's spelling of bytes needs
    if (code < 0x80) return {char(code)};
    return {char(0xc0 | code >> 6), char(0x80 | (code & 0x3f))};
}

inline CharClass char_class(int32_t code) {
    if ((code >= 9 && code <= 13) || code == ' ' || code == 0x85 || code == 0xa0 || code == 0x1680 ||
        (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
        code == 0x3000)
        return CharClass::space;
    // Where each stretch of the table ends; an odd number of ends at or before `code` means that it lies inside.
    const auto ends_of = [](const auto& runs) {
        std::vector<int32_t> ends;
        for (int32_t length : runs) ends.push_back((ends.empty() ? 0 : ends.back()) + length);
        return ends;
    };
    static const std::vector<int32_t> letters = ends_of(letter_runs), numbers = ends_of(number_runs);
    const auto inside = [&](const std::vector<int32_t>& ends) {
        return (std::upper_bound(ends.begin(), ends.end(), code) - ends.begin()) % 2 == 1;
    };
    return inside(letters) ? CharClass::letter : inside(numbers) ? CharClass::number : CharClass::other;
}

// The words of a text, as GPT-2's pattern finds them, alternatives in this order:
//   's|'t|'re|'ve|'m|'ll|'d | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ |\s+(?!\S)|\s+
inline std::vector<std::string_view> split_words(std::string_view text) {
    std::vector<std::string_view> words;
    // The end of the run of characters of one class from i on, and where the run's last character begins.
    const auto run = [&](size_t i, CharClass wanted) {
        size_t last = i;
        while (i < text.size()) {
            const auto [code, length] = decode_utf8(text, i);
            if (char_class(code) != wanted) break;
            last = i;
            i += length;
        }
        return std::pair(i, last);
    };
    for (size_t begin = 0, end; begin < text.size(); begin = end) {
        end = begin;
        if (text[begin] == '\'')
            for (std::string_view suffix : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
                if (text.substr(begin, suffix.size()) == suffix) end = begin + suffix.size();
        if (end == begin) {
            const size_t i = begin + (text[begin] == ' ' && begin + 1 < text.size());  // one leading space
            const CharClass kind = char_class(decode_utf8(text, i).first);
            if (kind != CharClass::space) {
                end = run(i, kind).first;
            } else {  // white space leaves its last character to the word behind it, if it has another one
                size_t last;
                std::tie(end, last) = run(begin, CharClass::space);
                if (end < text.size() && last > begin) end = last;
            }
        }
        words.push_back(text.substr(begin, end - begin));
    }
    return words;
}

// The vocabulary file spells each byte as one printable character: itself, or else the next free one from U+0100 on.
inline std::array<int32_t, 256> byte_spelling() {
    std::array<int32_t, 256> spelling;
    for (int32_t byte = 0, next = 256; byte < 256; byte++) {
        const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
        spelling[size_t(byte)] = printable ? byte : next++;
    }
    return spelling;
}

class BytePairEncoder {
public:
    explicit BytePairEncoder(const std::string& directory) {
        const std::array<int32_t, 256> spelling = byte_spelling();
        std::unordered_map<int32_t, char> byte_of;
        for (int byte = 0; byte < 256; byte++) byte_of[spelling[size_t(byte)]] = char(byte);

        const std::string vocab_path = directory + "/vocab.json", merges_path = directory + "/merges.txt";
        const nlohmann::json vocab = read_json_file(vocab_path);
        if (!vocab.is_object()) fail(vocab_path, "it is not a JSON object");
        token_text.resize(vocab.size());
        std::vector<bool> taken(vocab.size());
        std::unordered_map<std::string, int32_t> id_of;
        for (const auto& [spelled, id] : vocab.items()) {
            if (!id.is_number_unsigned() || id.get<uint64_t>() >= vocab.size() || taken[id.get<size_t>()])
                fail(vocab_path, "the id of '" + spelled + "' is " + id.dump() + ", expected each of 0 .. " +
                                     std::to_string(vocab.size() - 1) + " once");
            taken[id.get<size_t>()] = true;
            id_of[spelled] = id.get<int32_t>();
            std::string& bytes = token_text[id.get<size_t>()];
            for (size_t i = 0; i < spelled.size();) {
                const auto [code, length] = decode_utf8(spelled, i);
                const auto found = byte_of.find(code);
                if (found != byte_of.end()) bytes += found->second;
                else bytes += spelled.substr(i, length);
                i += length;
            }
        }
        const auto require = [&](const std::string& token) {
            const auto found = id_of.find(token);
            if (found == id_of.end()) fail(vocab_path, "it has no token '" + token + "'");
            return found->second;
        };
        end_id = require("<|endoftext|>");
        for (int byte = 0; byte < 256; byte++) byte_ids[byte] = require(encode_utf8(spelling[size_t(byte)]));

        std::istringstream merges(read_text_file(merges_path, json_bytes_limit));
        std::string line;
        for (int32_t rank = 0, number = 1; std::getline(merges, line); number++) {
            if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
            const size_t space = line.find(' ');
            if (space == std::string::npos)
                fail(merges_path, "line " + std::to_string(number) + " is '" + line + "', expected two tokens");
            const std::string left = line.substr(0, space), right = line.substr(space + 1);
            pair_merges[pair_key(require(left), require(right))] = {rank++, require(left + right)};
        }
    }

    int64_t vocab() const { return int64_t(token_text.size()); }
    int32_t end_of_text() const { return end_id; }
    const std::string& bytes(int32_t id) const { return token_text[size_t(id)]; }

    void encode(std::string_view text, std::vector<int32_t>& ids) const {
        for (std::string_view word : split_words(text)) encode_word(word, ids);
    }

private:
    struct Merge {
        int32_t rank, id;
    };
    std::vector<std::string> token_text;  // [vocab] what each token stands for
    std::unordered_map<uint64_t, Merge> pair_merges;
    int32_t byte_ids[256];
    int32_t end_id = 0;

    static uint64_t pair_key(int32_t left, int32_t right) { return uint64_t(left) << 32 | uint32_t(right); }

    [[noreturn]] static void fail(const std::string& path, const std::string& found) {
        throw Failure(EXIT_DATA,
                      "Tokenizer file " + path + ": " + found +
                          "; --tokenizer-dir wants a folder with GPT-2's vocab.json and merges.txt, as Hugging Face "
                          "publishes them and the scripts in data/ write them.");
    }

    // Joins the pair of lowest rank, the leftmost of several, until none is left. A heap of candidate pairs over a
    // linked list keeps a word of n bytes at O(n log n): a "word" may be a megabyte of one character.
    void encode_word(std::string_view word, std::vector<int32_t>& ids) const {
        struct Part {
            int32_t id, previous, next;  // id -1: joined to the part before it
        };
        struct Candidate {
            int32_t rank, left, left_id, right_id, id;
            bool operator>(const Candidate& other) const {
                return std::pair(rank, left) > std::pair(other.rank, other.left);
            }
        };
        const int32_t n = int32_t(word.size());
        std::vector<Part> parts(n);
        for (int32_t i = 0; i < n; i++) parts[i] = {byte_ids[uint8_t(word[i])], i - 1, i + 1};
        std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
        const auto consider = [&](int32_t left) {
            if (left < 0 || parts[left].next >= n) return;
            const int32_t a = parts[left].id, b = parts[parts[left].next].id;
            if (const auto merge = pair_merges.find(pair_key(a, b)); merge != pair_merges.end())
                heap.push({merge->second.rank, left, a, b, merge->second.id});
        };
        for (int32_t i = 0; i < n; i++) consider(i);
        while (!heap.empty()) {
            const Candidate best = heap.top();
            heap.pop();
            Part& left = parts[best.left];
            const bool outdated = left.id != best.left_id || left.next >= n || parts[left.next].id != best.right_id;
            if (outdated) continue;
            Part& right = parts[left.next];
            left.id = best.id;
            left.next = right.next;
            right.id = -1;
            if (left.next < n) parts[left.next].previous = best.left;
            consider(left.previous);
            consider(best.left);
        }
        for (int32_t i = 0; i < n; i = parts[i].next) ids.push_back(parts[i].id);
    }
};
