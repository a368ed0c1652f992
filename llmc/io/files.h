// Files that survive a crash: written through a hash, synced, renamed into place; read only within their size.
// Whatever storage refuses (full, read-only, broken) becomes a Failure(EXIT_STORAGE) that names the path.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// open, pread, fsync; the standard library has no fsync
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

// XXH3, 128 bits
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "llmc/common.h"

[[noreturn]] inline void storage_failure(const std::string& action, const std::string& path, int error = errno) {
    throw Failure(EXIT_STORAGE, "Cannot " + action + " " + path + ": " + std::strerror(error) + ".");
}

// What a manifest says about a file.
struct FileRecord {
    int64_t bytes = 0;
    std::string hash;  // XXH3, 128 bits as 32 hexadecimal digits
    bool operator==(const FileRecord&) const = default;
};

class Hasher {
public:
    Hasher() { XXH3_128bits_reset(&state); }
    void update(const void* data, size_t bytes) { XXH3_128bits_update(&state, data, bytes); }
    std::string hex() const {
        XXH128_canonical_t canonical;
        XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state));
        std::string text;
        for (unsigned char byte : canonical.digest) {
            text += "0123456789abcdef"[byte >> 4];
            text += "0123456789abcdef"[byte & 15];
        }
        return text;
    }

private:
    XXH3_state_t state;
};

inline std::string hash_of(std::string_view text) {
    Hasher hasher;
    hasher.update(text.data(), text.size());
    return hasher.hex();
}

// A file descriptor that closes itself.
class Descriptor {
public:
    explicit Descriptor(int fd) : fd(fd) {}
    Descriptor(Descriptor&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    ~Descriptor() {
        if (fd >= 0) ::close(fd);
    }
    operator int() const { return fd; }
    int release() { return std::exchange(fd, -1); }

private:
    int fd;
};

// Appends to a new file and hashes on the way, so that no file is ever held in memory.
class FileWriter {
public:
    explicit FileWriter(const std::string& path)
        : path(path), fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644)) {
        if (fd < 0) storage_failure("create", path);
    }

    void append(const void* data, size_t bytes) {
        hasher.update(data, bytes);
        record.bytes += int64_t(bytes);
        for (const char* at = static_cast<const char*>(data); bytes > 0;) {
            const ssize_t written = ::write(fd, at, bytes);
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) storage_failure("write", path);
            at += written;
            bytes -= size_t(written);
        }
    }

    // After this the file is on the disk. Its directory entry is not: see sync_directory.
    FileRecord finish() {
        if (::fsync(fd) != 0) storage_failure("sync", path);
        if (::close(fd.release()) != 0) storage_failure("close", path);
        record.hash = hasher.hex();
        return record;
    }

private:
    std::string path;
    Descriptor fd;
    Hasher hasher;
    FileRecord record;
};

inline FileRecord write_file(const std::string& path, std::string_view text) {
    FileWriter file(path);
    file.append(text.data(), text.size());
    return file.finish();
}

// Random access to a regular file. pread rather than mmap: a file cut short by another program is then an error in
// words, not a SIGBUS.
class FileReader {
public:
    explicit FileReader(const std::string& path)
        : path(path), fd(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
        struct stat status;
        if (fd < 0 || ::fstat(fd, &status) != 0)
            throw Failure(errno == EIO ? EXIT_STORAGE : EXIT_DATA,
                          "Cannot open " + path + ": " + std::strerror(errno) + ".");
        if (!S_ISREG(status.st_mode)) throw Failure(EXIT_DATA, path + " is not a regular file.");
        bytes = status.st_size;
    }

    const std::string& name() const { return path; }
    int64_t size() const { return bytes; }

    void read(int64_t offset, void* to, size_t count) const {
        for (char* at = static_cast<char*>(to); count > 0;) {
            const ssize_t got = ::pread(fd, at, count, offset);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) storage_failure("read", path);
            if (got == 0)
                throw Failure(EXIT_DATA,
                              path + " ends at byte " + std::to_string(offset) + ", where more was expected.");
            at += got;
            offset += got;
            count -= size_t(got);
        }
    }

private:
    std::string path;
    Descriptor fd;
    int64_t bytes = 0;
};

// A whole text file, refused before anything is allocated when it is longer than `limit` bytes.
inline std::string read_text_file(const std::string& path, int64_t limit) {
    const FileReader file(path);
    if (file.size() > limit)
        throw Failure(EXIT_DATA, path + " has " + std::to_string(file.size()) + " bytes; at most " +
                                     std::to_string(limit) + " are allowed for a file of its kind.");
    std::string text(size_t(file.size()), '\0');
    file.read(0, text.data(), text.size());
    return text;
}

inline FileRecord record_of(const std::string& path) {
    const FileReader file(path);
    std::vector<char> block(size_t(1) << 20);
    Hasher hasher;
    for (int64_t at = 0; at < file.size(); at += int64_t(block.size())) {
        const size_t count = size_t(std::min(int64_t(block.size()), file.size() - at));
        file.read(at, block.data(), count);
        hasher.update(block.data(), count);
    }
    return {file.size(), hasher.hex()};
}

// Names created, renamed or removed in a directory are on the disk only after this.
inline void sync_directory(const std::string& path) {
    const Descriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd < 0) storage_failure("open the directory", path);
    if (::fsync(fd) != 0 && errno != EINVAL) storage_failure("sync the directory", path);  // EINVAL: it has no fsync
}

inline void rename_path(const std::string& from, const std::string& to) {
    if (::rename(from.c_str(), to.c_str()) != 0) storage_failure("rename " + from + " to", to);
}

// Keeps other processes from training in the same directory as long as it lives.
class DirectoryLock {
public:
    explicit DirectoryLock(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
        if (fd_ < 0) storage_failure("open", path);
        if (::flock(fd_, LOCK_EX | LOCK_NB) != 0)
            throw Failure(EXIT_CONFIG, "another process trains in " + path + "; wait for it, or use another --run-dir");
    }

private:
    Descriptor fd_;
};

inline void create_directories(const std::string& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) storage_failure("create the directory", path, error.value());
}

inline bool path_exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

// The names in a directory; none when it does not exist.
inline std::vector<std::string> list_directory(const std::string& path) {
    std::vector<std::string> names;
    std::error_code error;
    for (std::filesystem::directory_iterator at(path, error), end; !error && at != end; at.increment(error))
        names.push_back(at->path().filename());
    if (error && error != std::errc::no_such_file_or_directory) storage_failure("list", path, error.value());
    return names;
}

inline void remove_tree(const std::string& path) {
    std::error_code error;
    std::filesystem::remove_all(path, error);
    if (error) storage_failure("remove", path, error.value());
}

// A file's new contents appear under its name all at once or not at all.
inline void replace_file(const std::string& directory, const std::string& name, std::string_view text) {
    const std::string temporary = directory + "/." + name + ".tmp";
    write_file(temporary, text);
    rename_path(temporary, directory + "/" + name);
    sync_directory(directory);
}
