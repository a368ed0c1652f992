// Token files in llm.c's shard formats: a header of 256 int32 (magic, version, token count), then the token ids as
// uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7). The file's size says how many tokens there
// are; the header's count is a check. It has 32 bits, so in shards of 2^31 tokens and more the low 32 bits must agree.
// Read by data/loader.h, written by commands/tokenize.h.
#pragma once

// Files of any size, without reading them: memory maps.
#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../common.h"

constexpr int64_t TOKEN_HEADER_BYTES = 1024;

// One of the two formats, named by the size of an id in bytes.
struct TokenFormat {
    int32_t magic, version;
    int64_t token_bytes;
};
constexpr TokenFormat TOKEN_FORMATS[] = {{20240520, 1, 2}, {20240801, 7, 4}};

// A token file opened for reading. The constructor checks header and size before anything depends on them; what it
// refuses ends as Failure(EXIT_DATA) with the file, the byte offset, and what to do.
class TokenFile {
   public:
    explicit TokenFile(const std::string& path) : path_(path) {
        struct stat status;
        if (stat(path.c_str(), &status) != 0) fail(0, std::string("it cannot be opened (") + strerror(errno) + ")");
        if (!S_ISREG(status.st_mode)) fail(0, "it is not a regular file");
        bytes_ = status.st_size;
        if (bytes_ < TOKEN_HEADER_BYTES)
            fail(bytes_, "it ends there, inside the header of " + std::to_string(TOKEN_HEADER_BYTES) + " bytes");

        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) fail(0, std::string("it cannot be opened (") + strerror(errno) + ")");
        void* mapped = mmap(nullptr, size_t(bytes_), PROT_READ, MAP_SHARED, file, 0);
        const int error = errno;
        close(file);
        if (mapped == MAP_FAILED) fail(0, std::string("it cannot be mapped into memory (") + strerror(error) + ")");
        map_ = static_cast<const std::byte*>(mapped);
        try {
            check_header();
        } catch (...) {
            unmap();
            throw;
        }
    }
    TokenFile(TokenFile&& other) noexcept
        : path_(other.path_),
          map_(std::exchange(other.map_, nullptr)),
          bytes_(other.bytes_),
          token_bytes_(other.token_bytes_),
          size_(other.size_) {}
    TokenFile& operator=(TokenFile&&) = delete;
    ~TokenFile() { unmap(); }

    const std::string& path() const { return path_; }
    int64_t size() const { return size_; }                // tokens
    int64_t token_bytes() const { return token_bytes_; }  // 2 or 4
    uint32_t operator[](int64_t i) const { return token_bytes_ == 2 ? ids<uint16_t>()[i] : ids<uint32_t>()[i]; }

    // Copies the tokens [begin, begin + count) to `out`.
    void copy(int64_t begin, int64_t count, int32_t* out) const {
        if (token_bytes_ == 2)
            std::copy_n(ids<uint16_t>() + begin, count, out);
        else
            std::copy_n(ids<uint32_t>() + begin, count, out);
    }

    // Refuses ids outside [0, vocab), and returns the positions of `token` in ascending order: one pass for both, since
    // this is the only time that the whole file is read.
    std::vector<int64_t> scan(int64_t vocab, int64_t token) const {
        return token_bytes_ == 2 ? scan_ids<uint16_t>(vocab, token) : scan_ids<uint32_t>(vocab, token);
    }
    void check_vocabulary(int64_t vocab) const { scan(vocab, -1); }

   private:
    std::string path_;
    const std::byte* map_ = nullptr;
    int64_t bytes_ = 0, token_bytes_ = 0, size_ = 0;

    template <class T> const T* ids() const { return reinterpret_cast<const T*>(map_ + TOKEN_HEADER_BYTES); }
    void unmap() {
        if (map_) munmap(const_cast<std::byte*>(map_), size_t(bytes_));
    }

    [[noreturn]] void fail(int64_t offset, const std::string& found,
                           const std::string& advice = "copy the file again, or make it anew with `tokenize`") const {
        throw Failure(EXIT_DATA, "token file " + path_ + ", byte " + std::to_string(offset) + ": " + found + "; " + advice);
    }

    void check_header() {
        int32_t header[3];
        std::memcpy(header, map_, sizeof header);
        const TokenFormat* format = nullptr;
        for (const TokenFormat& known : TOKEN_FORMATS)
            if (header[0] == known.magic) format = &known;
        if (!format) {
            std::string found = "the magic number is " + std::to_string(header[0]) + ", expected ";
            found += std::to_string(TOKEN_FORMATS[0].magic) + " (uint16) or " + std::to_string(TOKEN_FORMATS[1].magic);
            if (header[0] == 0) found += " (uint32); zero is what an interrupted write leaves";
            else found += " (uint32)";
            fail(0, found);
        }
        if (header[1] != format->version)
            fail(4, "the version is " + std::to_string(header[1]) + ", expected " + std::to_string(format->version));
        token_bytes_ = format->token_bytes;
        const int64_t data_bytes = bytes_ - TOKEN_HEADER_BYTES;
        size_ = data_bytes / token_bytes_;
        if (data_bytes % token_bytes_ != 0)
            fail(bytes_, "it ends there, in the middle of an id of " + std::to_string(token_bytes_) + " bytes");
        if (uint32_t(header[2]) != uint32_t(size_))
            fail(8, "the header counts " + std::to_string(uint32_t(header[2])) + " tokens, but the file's " +
                        std::to_string(bytes_) + " bytes hold " + std::to_string(size_));
    }

    // Blocks are searched by all threads; a block without `token` and bad ids, the common case, costs one vector pass.
    template <class T> std::vector<int64_t> scan_ids(int64_t vocab, int64_t token) const {
        constexpr int64_t BLOCK = 1 << 16, GROUP = 1 << 10;
        const int64_t blocks = ceil_div(size_, BLOCK);
        std::vector<std::vector<int64_t>> found(blocks);
        int64_t first_bad = size_;
#pragma omp parallel for schedule(static) reduction(min : first_bad)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t block_end = std::min(size_, (block + 1) * BLOCK);
            for (int64_t begin = block * BLOCK; begin < block_end; begin += GROUP) {
                const T* group = ids<T>() + begin;
                const int64_t n = std::min(GROUP, block_end - begin);
                T largest = 0, matches = 0;
                for (int64_t i = 0; i < n; i++) {
                    largest = std::max(largest, group[i]);
                    matches |= T(-(group[i] == token));
                }
                if (largest >= vocab)
                    first_bad = std::min(first_bad, begin + (std::find_if(group, group + n, [&](T id) { return id >= vocab; }) - group));
                for (int64_t i = 0; matches && i < n; i++)
                    if (group[i] == token) found[block].push_back(begin + i);
            }
        }
        if (first_bad < size_)
            fail(TOKEN_HEADER_BYTES + first_bad * token_bytes_,
                 "token " + std::to_string(first_bad) + " has the id " + std::to_string((*this)[first_bad]) +
                     ", but the vocabulary has only " + std::to_string(vocab) + " ids",
                 "choose the tokenizer that the file was made with, or make the file anew");
        std::vector<int64_t> positions;
        for (const auto& part : found) positions.insert(positions.end(), part.begin(), part.end());
        return positions;
    }
};

// Opens the shards that a comma-separated list of paths and glob patterns names, in the order of their names.
inline std::vector<TokenFile> open_token_files(const std::string& patterns) {
    std::vector<std::string> paths;
    for (size_t begin = 0; begin <= patterns.size();) {
        const size_t end = std::min(patterns.find(',', begin), patterns.size());
        const std::string pattern = patterns.substr(begin, end - begin);
        begin = end + 1;
        if (pattern.empty()) continue;
        if (std::filesystem::exists(pattern)) {  // a name that holds * or [ itself
            paths.push_back(pattern);
            continue;
        }
        glob_t matches = {};
        const int status = glob(pattern.c_str(), 0, nullptr, &matches);
        if (status == 0) paths.insert(paths.end(), matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
        globfree(&matches);
        if (status != 0)
            throw Failure(EXIT_DATA, "no token file matches '" + pattern + "'; make some with `train_gpt tokenize`, or " +
                                         "quote the pattern so that the shell leaves it alone");
    }
    if (paths.empty()) throw Failure(EXIT_DATA, "no token file was named; give --data a path or a pattern");
    std::sort(paths.begin(), paths.end());
    paths.erase(std::unique(paths.begin(), paths.end()), paths.end());
    std::vector<TokenFile> files;
    for (const std::string& path : paths) files.emplace_back(path);
    for (const TokenFile& file : files)
        if (file.token_bytes() != files[0].token_bytes())
            throw Failure(EXIT_DATA, "token files of one data set must have ids of one size, but " + files[0].path() +
                                         " has " + std::to_string(files[0].token_bytes()) + " bytes an id and " +
                                         file.path() + " has " + std::to_string(file.token_bytes()) +
                                         "; name the two data sets in separate runs");
    return files;
}
