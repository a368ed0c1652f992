// `train_gpt tokenize`: text files, directories and JSONL to token files, DIR/train_000.bin ... and DIR/val_000.bin.
//
// A file is one document, and so is the `text` of each line of a file named *.jsonl; end-of-text precedes each. Every
// N-th document is held out for validation. A limit on the bytes of text takes the files named on the command line
// first, then those found in directories, in the order of a hash of their path: the same choice on every machine.
#pragma once

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "llmc/data/token_file.h"
#include "llmc/data/tokenizer.h"
#include "llmc/io/json.h"

struct TokenizeOptions {
    std::vector<std::string> inputs;  // files, directories, *.jsonl
    std::string output;               // directory
    std::string tokenizer = "bytes";
    std::string tokenizer_dir;
    int64_t holdout_every = 20;           // each 20th document is for validation; 0 = none
    int64_t max_bytes = 0;                // of text; 0 = all
    std::vector<std::string> extensions;  // in directories only these, "none" = files without one; empty = all
    int64_t shard_tokens = 100'000'000;
};

struct TextFile {
    std::string path;
    int64_t bytes;
    bool named;  // on the command line, rather than found in a directory
};

inline bool is_jsonl(const std::string& path) { return path.ends_with(".jsonl"); }

// The files that the inputs name, those in directories sorted by path. Links are left out there: they would bring files
// twice, or a directory without end.
inline std::vector<TextFile> find_text_files(const TokenizeOptions& options) {
    namespace fs = std::filesystem;
    const auto wanted = [&](const fs::path& path) {
        std::string extension = path.extension();
        extension = extension.empty() ? "none" : extension.substr(1);
        return options.extensions.empty() ||
               std::any_of(options.extensions.begin(), options.extensions.end(),
                           [&](const std::string& e) { return e == extension || e == "." + extension; });
    };
    std::vector<TextFile> files;
    for (const std::string& input : options.inputs) {
        std::error_code error;
        const fs::file_status status = fs::status(input, error);
        if (fs::is_directory(status)) {
            std::vector<TextFile> found;
            auto entry = fs::recursive_directory_iterator(input, fs::directory_options::skip_permission_denied, error);
            for (; !error && entry != fs::end(entry); entry.increment(error))
                if (entry->is_regular_file(error) && !entry->is_symlink(error) && wanted(entry->path()))
                    found.push_back({entry->path(), int64_t(entry->file_size(error)), false});
            if (error) throw Failure(EXIT_DATA, "Cannot list the directory " + input + ": " + error.message() + ".");
            std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.path < b.path; });
            files.insert(files.end(), found.begin(), found.end());
        } else {
            files.push_back({input, FileReader(input).size(), true});
        }
    }
    return files;
}

// Leaves out files until the others have at most `limit` bytes; the order stays.
inline std::vector<TextFile> choose_files(std::vector<TextFile> files, int64_t limit) {
    std::vector<size_t> order;
    std::vector<uint64_t> hashes;
    for (const TextFile& file : files) {
        order.push_back(order.size());
        hashes.push_back(file.named ? 0 : XXH3_64bits(file.path.data(), file.path.size()));
    }
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return hashes[a] < hashes[b]; });
    for (size_t i : order) {
        const bool cut_by_lines = files[i].named && is_jsonl(files[i].path);
        if (files[i].bytes <= limit || cut_by_lines) limit -= std::min(limit, files[i].bytes);
        else files[i].path.clear();
    }
    std::erase_if(files, [](const TextFile& file) { return file.path.empty(); });
    return files;
}

// Calls take(text) for the `text` of each line; empty lines are skipped.
template <class Take>
void read_jsonl(const std::string& path, Take take) {
    std::ifstream file(path);
    std::string line;
    for (int64_t number = 1; std::getline(file, line); number++) {
        if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
        const auto fail = [&](const std::string& found) {
            throw Failure(EXIT_DATA,
                          path + ", line " + std::to_string(number) + ": " + found +
                              "; each line must be a JSON object with the text of a document under \"text\".");
        };
        nlohmann::json object;
        try {
            object = nlohmann::json::parse(line);
        } catch (const nlohmann::json::exception& error) { fail(error.what()); }
        if (!object.is_object() || !object.contains("text")) fail("there is no field \"text\"");
        if (!object["text"].is_string()) fail("the field \"text\" is not a string");
        take(object["text"].get_ref<const std::string&>());
    }
    if (file.bad() || !file.eof()) storage_failure("read", path);
}

inline int tokenize_command(const TokenizeOptions& options) {
    const Tokenizer tokenizer(options.tokenizer, options.tokenizer_dir);
    const int64_t limit = options.max_bytes > 0 ? options.max_bytes : std::numeric_limits<int64_t>::max();
    const std::vector<TextFile> found = find_text_files(options);
    const std::vector<TextFile> files = choose_files(found, limit);

    create_directories(options.output);
    const int64_t token_bytes = tokenizer.vocab() <= 65536 ? 2 : 4;
    TokenWriter train(options.output + "/train_", token_bytes, options.shard_tokens);
    TokenWriter held_out(options.output + "/val_", token_bytes, options.shard_tokens);

    int64_t bytes = 0, not_text = 0, over_limit = int64_t(found.size() - files.size());
    std::vector<int64_t> lengths;  // tokens of each document, its end-of-text included
    const auto add_document = [&](const std::string& text) {
        if (text.empty()) return;
        if (int64_t(text.size()) > limit - bytes) {
            over_limit++;
            return;
        }
        std::vector<int32_t> ids = tokenizer.encode(text);
        ids.insert(ids.begin(), tokenizer.end_of_text());
        bytes += int64_t(text.size());
        lengths.push_back(int64_t(ids.size()));
        const bool validation = options.holdout_every > 0 && lengths.size() % size_t(options.holdout_every) == 0;
        (validation ? held_out : train).append(ids);
    };
    for (const TextFile& file : files) {
        if (is_jsonl(file.path)) {
            read_jsonl(file.path, add_document);
            continue;
        }
        std::string text;
        try {
            text = read_text_file(file.path, std::numeric_limits<int64_t>::max());
        } catch (const Failure&) {
            if (file.named) throw;  // in directories, what cannot be read is passed over
        }
        const bool readable = int64_t(text.size()) == file.bytes && text.find('\0') == std::string::npos;
        if (readable || file.named) add_document(text);
        else not_text++;
    }
    train.finish();
    held_out.finish();
    if (lengths.empty())
        throw Failure(EXIT_DATA, "No text was found in the " + std::to_string(found.size()) +
                                     " file(s) of the inputs (" + std::to_string(not_text) + " not text, " +
                                     std::to_string(over_limit) +
                                     " over --max-bytes); name other files, or correct --extensions.");

    std::sort(lengths.begin(), lengths.end());
    const auto percentile = [&](int64_t p) { return (long long)lengths[size_t(p) * (lengths.size() - 1) / 100]; };
    std::printf("documents  %zu", lengths.size());
    if (over_limit) std::printf(", %lld left out by --max-bytes", (long long)over_limit);
    if (not_text) std::printf(", %lld passed over: not text, or not readable", (long long)not_text);
    std::printf("\nbytes      %lld\n", (long long)bytes);
    std::printf("tokens     %lld (%s: %lld ids, %lld bytes each)\n", (long long)(train.size() + held_out.size()),
                tokenizer.name().c_str(), (long long)tokenizer.vocab(), (long long)token_bytes);
    std::printf("lengths    shortest %lld, 10 %% %lld, median %lld, 90 %% %lld, 99 %% %lld, longest %lld tokens\n",
                percentile(0), percentile(10), percentile(50), percentile(90), percentile(99), percentile(100));
    for (const TokenWriter* writer : {&train, &held_out}) {
        const char* const part = writer == &train ? "train" : "validation";
        if (writer->paths().empty()) {
            std::printf("%-10s nothing: there are too few documents for --holdout-every %lld\n", part,
                        (long long)options.holdout_every);
            continue;
        }
        const std::string& last = writer->paths().back();
        std::printf("%-10s %lld tokens in %s%s\n", part, (long long)writer->size(), writer->paths().front().c_str(),
                    writer->paths().size() > 1 ? (" to " + last).c_str() : "");
    }
    return 0;
}
