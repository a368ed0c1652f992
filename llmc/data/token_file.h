// Token files in llm.c's shard formats: a header of 256 int32 (magic, version, token count), then the token ids as
// uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7). The file's size says how many tokens there
// are; the header's count is a check. It has 32 bits, so for shards of 2^31 tokens and more the low 32 bits must agree.
// Read by data/loader.h, written by commands/tokenize.h.
#pragma once

#include <algorithm>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

// patterns of file names
#include <glob.h>

#include "llmc/io/files.h"

inline constexpr int64_t token_header_bytes = 1024;

// One of the two formats, told apart by the size of an id.
struct TokenFormat {
    int32_t magic, version;
    int64_t token_bytes;
};
inline constexpr TokenFormat token_formats[] = {{20240520, 1, 2}, {20240801, 7, 4}};

// A token file open for reading. Header and size are checked before anything depends on them; what is refused ends as
// Failure(EXIT_DATA) with the file, the byte offset and what to do.
class TokenFile {
public:
    explicit TokenFile(const std::string& path) : file(path) {
        if (file.size() < token_header_bytes)
            fail(file.size(), "it ends there, within the header of " + std::to_string(token_header_bytes) + " bytes");
        int32_t header[3];
        file.read(0, header, sizeof header);
        const auto format = std::find_if(std::begin(token_formats), std::end(token_formats),
                                         [&](const TokenFormat& known) { return known.magic == header[0]; });
        if (format == std::end(token_formats))
            fail(0, "the magic number is " + std::to_string(header[0]) +
                        (header[0] ? "" : ", which an interrupted write leaves") + ", expected " +
                        std::to_string(token_formats[0].magic) + " (uint16) or " +
                        std::to_string(token_formats[1].magic) + " (uint32)");
        if (header[1] != format->version)
            fail(4, "the version is " + std::to_string(header[1]) + ", expected " + std::to_string(format->version));
        bytes_per_token = format->token_bytes;
        const int64_t data_bytes = file.size() - token_header_bytes;
        tokens = data_bytes / bytes_per_token;
        if (data_bytes % bytes_per_token != 0)
            fail(file.size(), "it ends there, within an id of " + std::to_string(bytes_per_token) + " bytes");
        if (uint32_t(header[2]) != uint32_t(tokens))
            fail(8, "the header counts " + std::to_string(uint32_t(header[2])) + " tokens, but " +
                        std::to_string(file.size()) + " bytes hold " + std::to_string(tokens));
    }

    const std::string& path() const { return file.name(); }
    int64_t size() const { return tokens; }                  // tokens
    int64_t token_bytes() const { return bytes_per_token; }  // 2 or 4

    // Reads the tokens [begin, begin + count).
    void read(int64_t begin, int64_t count, int32_t* out) const {
        const int64_t offset = token_header_bytes + begin * bytes_per_token;
        if (bytes_per_token == 4) return file.read(offset, out, size_t(count) * 4);
        // The ids are read into the upper half of the output and widened from there, front to back.
        uint16_t* ids = reinterpret_cast<uint16_t*>(out) + count;
        file.read(offset, ids, size_t(count) * 2);
        for (int64_t i = 0; i < count; i++) {
            uint16_t id;
            std::memcpy(&id, ids + i, 2);
            out[i] = id;
        }
    }

    // Refuses ids outside [0, vocab), and returns where `token` stands, in ascending order: both in one pass, since no
    // other reads the whole file.
    std::vector<int64_t> scan(int64_t vocab, int64_t token) const {
        constexpr int64_t block_tokens = 1 << 16, group_tokens = 1 << 10;
        std::vector<int32_t> block(size_t(std::min(block_tokens, tokens)));
        std::vector<int64_t> found;
        for (int64_t begin = 0; begin < tokens; begin += block_tokens) {
            const int64_t count = std::min(block_tokens, tokens - begin);
            read(begin, count, block.data());
            for (int64_t group = 0; group < count; group += group_tokens) {
                const int64_t end = std::min(count, group + group_tokens);
                uint32_t largest = 0, matches = 0;  // most groups need no more than this vector pass
                for (int64_t i = group; i < end; i++) {
                    largest = std::max(largest, uint32_t(block[size_t(i)]));
                    matches += block[size_t(i)] == int32_t(token);
                }
                for (int64_t i = group; largest >= vocab && i < end; i++)
                    if (uint32_t(block[size_t(i)]) >= vocab)
                        fail_vocabulary(begin + i, uint32_t(block[size_t(i)]), vocab);
                for (int64_t i = group; matches > 0 && i < end; i++)
                    if (block[size_t(i)] == int32_t(token)) found.push_back(begin + i);
            }
        }
        return found;
    }

private:
    FileReader file;
    int64_t bytes_per_token = 0, tokens = 0;

    [[noreturn]] void fail(int64_t offset, const std::string& found) const {
        throw Failure(EXIT_DATA, "Token file " + path() + ", byte " + std::to_string(offset) + ": " + found +
                                     "; copy the file again, or make it anew with `train_gpt tokenize`.");
    }
    [[noreturn]] void fail_vocabulary(int64_t place, uint32_t id, int64_t vocab) const {
        throw Failure(EXIT_DATA,
                      "Token file " + path() + ", byte " +
                          std::to_string(token_header_bytes + place * bytes_per_token) + ": token " +
                          std::to_string(place) + " has the id " + std::to_string(id) + ", but the vocabulary has " +
                          std::to_string(vocab) +
                          " ids; choose the --tokenizer that the file was made with, or make the file anew.");
    }
};

// Opens the shards that a comma-separated list of paths and patterns names, in the order of their names.
inline std::vector<TokenFile> open_token_files(const std::string& patterns) {
    std::vector<std::string> paths;
    for (size_t begin = 0; begin < patterns.size();) {
        const size_t end = std::min(patterns.find(',', begin), patterns.size());
        const std::string pattern = patterns.substr(begin, end - begin);
        begin = end + 1;
        glob_t matches = {};
        if (std::filesystem::exists(pattern)) {  // also when the name itself has a * or [
            paths.push_back(pattern);
        } else if (glob(pattern.c_str(), 0, nullptr, &matches) == 0) {
            paths.insert(paths.end(), matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
        } else {
            throw Failure(EXIT_DATA, "No token file matches '" + pattern +
                                         "'; make some with `train_gpt tokenize`, or correct the path.");
        }
        globfree(&matches);
    }
    if (paths.empty()) throw Failure(EXIT_DATA, "No token file was named; give a path or a pattern.");
    std::sort(paths.begin(), paths.end());
    paths.erase(std::unique(paths.begin(), paths.end()), paths.end());

    std::vector<TokenFile> files;
    for (const std::string& path : paths) files.emplace_back(path);
    for (const TokenFile& file : files)
        if (file.token_bytes() != files[0].token_bytes())
            throw Failure(EXIT_DATA, "Token files that are read together need ids of one size, but " + files[0].path() +
                                         " has " + std::to_string(files[0].token_bytes()) + " bytes an id and " +
                                         file.path() + " has " + std::to_string(file.token_bytes()) +
                                         "; read them in separate runs.");
    return files;
}

// Writes documents to PREFIX000.bin, PREFIX001.bin ... of about `shard_tokens` tokens: a shard ends before the document
// that would exceed it, so no document is cut, and one longer than a shard has a shard to itself. Each header is
// written when its tokens are on the disk. Shards of an earlier run under the same prefix are removed first.
class TokenWriter {
public:
    TokenWriter(const std::string& prefix, int64_t token_bytes, int64_t shard_tokens)
        : prefix(prefix), format(token_formats[token_bytes == 4]), shard_tokens(shard_tokens) {}
    ~TokenWriter() {  // without finish(), what was written is thrown away
        shard.reset();
        std::error_code ignored;
        for (const std::string& path : shard_paths) std::filesystem::remove(path + unfinished, ignored);
    }

    void append(std::span<const int32_t> document) {
        const int64_t count = int64_t(document.size());
        if (count == 0) return;
        if (shard && in_shard + count > shard_tokens) close_shard();
        if (!shard) open_shard();
        if (format.token_bytes == 4) {
            shard->append(document.data(), document.size() * 4);
        } else {
            narrow.assign(document.begin(), document.end());
            shard->append(narrow.data(), narrow.size() * 2);
        }
        in_shard += count;
        written += count;
    }

    // Only now do earlier shards of this name go, and the new ones come into sight.
    void finish() {
        if (shard) close_shard();
        glob_t matches = {};
        if (glob((prefix + "[0-9][0-9][0-9]*.bin").c_str(), 0, nullptr, &matches) == 0)
            for (size_t i = 0; i < matches.gl_pathc; i++) remove_tree(matches.gl_pathv[i]);
        globfree(&matches);
        for (const std::string& path : shard_paths) rename_path(path + unfinished, path);
        const std::string directory = std::filesystem::path(prefix).parent_path();
        sync_directory(directory.empty() ? "." : directory);
    }

    const std::vector<std::string>& paths() const { return shard_paths; }
    int64_t size() const { return written; }  // tokens in all shards

private:
    static constexpr const char* unfinished = ".unfinished";
    std::string prefix;
    TokenFormat format;
    int64_t shard_tokens, in_shard = 0, written = 0;
    std::unique_ptr<FileWriter> shard;
    std::vector<std::string> shard_paths;
    std::vector<uint16_t> narrow;

    void open_shard() {
        std::string number = std::to_string(shard_paths.size());
        number.insert(0, number.size() < 3 ? 3 - number.size() : 0, '0');
        shard_paths.push_back(prefix + number + ".bin");
        shard = std::make_unique<FileWriter>(shard_paths.back() + unfinished);
        const char empty[token_header_bytes] = {};
        shard->append(empty, sizeof empty);
        in_shard = 0;
    }

    void close_shard() {
        shard->finish();
        shard.reset();
        const std::string path = shard_paths.back() + unfinished;
        const Descriptor file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
        const int32_t header[3] = {format.magic, format.version, int32_t(uint32_t(in_shard))};
        if (file < 0 || ::pwrite(file, header, sizeof header, 0) != sizeof header || ::fsync(file) != 0)
            storage_failure("write the header of", path);
    }
};
