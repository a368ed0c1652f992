// For the tests of what comes before the model: a directory, token files written by hand, what a refusal says.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "llmc/data/loader.h"

namespace fs = std::filesystem;
using Ids = std::vector<int32_t>;

constexpr int32_t EOT = 256;

// A directory of the test's own, removed after it.
class Data : public testing::Test {
protected:
    std::string directory;
    void SetUp() override {
        directory = fs::temp_directory_path() / ("data_test." + std::to_string(getpid()));
        create_directories(directory);
    }
    void TearDown() override { remove_tree(directory); }

    std::string path(const std::string& name) const { return directory + "/" + name; }

    std::string text_file(const std::string& name, const std::string& text) const {
        create_directories(fs::path(path(name)).parent_path());
        write_file(path(name), text);
        return path(name);
    }

    // A token file written by hand, independent of TokenWriter; `count` is what its header says.
    std::string token_file(const std::string& name, const Ids& ids, int64_t token_bytes = 2, int64_t count = -1) const {
        const TokenFormat& format = token_formats[token_bytes == 4];
        std::string bytes(size_t(token_header_bytes) + ids.size() * size_t(token_bytes), '\0');
        const int32_t header[3] = {format.magic, format.version, int32_t(count < 0 ? int64_t(ids.size()) : count)};
        std::memcpy(bytes.data(), header, sizeof header);
        for (size_t i = 0; i < ids.size(); i++)
            std::memcpy(&bytes[size_t(token_header_bytes) + i * size_t(token_bytes)], &ids[i], size_t(token_bytes));
        return text_file(name, bytes);
    }

    Loader loader(const std::string& pattern, Packing packing, int64_t context, bool shuffle = false,
                  uint64_t seed = 0) const {
        return {open_token_files(pattern), {packing, context, 257, EOT, seed, shuffle}};
    }
};

inline Ids read_tokens(const TokenFile& file) {
    Ids ids(size_t(file.size()));
    file.read(0, file.size(), ids.data());
    return ids;
}

// The message of the Failure that `action` must end in, with the exit code asked for.
template <class Action>
std::string failure(int exit_code, Action action) {
    try {
        action();
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, exit_code) << failure.what();
        return failure.what();
    }
    ADD_FAILURE() << "accepted, expected exit code " << exit_code;
    return "";
}

inline void expect_parts(const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        EXPECT_NE(message.find(part), std::string::npos) << "no '" << part << "' in: " << message;
}
