// What fuzz_safetensors and fuzz_manifest share: damage to bytes and to JSON values, a watch on allocations, and the
// count of cases. Everything follows from one seed, so a failing case comes again.
#pragma once

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "llmc/common.h"

// of ASan's runtime; g++ 12 has no header for it
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                         void (*)(const volatile void*));

inline size_t largest_allocation = 0;  // bytes, since it was last set to 0

inline std::mt19937_64 random_bits(1);
inline size_t random_below(size_t n) { return n == 0 ? 0 : size_t(random_bits() % n); }

inline void write_bytes(const std::string& path, const std::string& bytes) {
    std::filesystem::remove(path);  // ext4 waits for the disk when a file that was cut to nothing is closed
    std::ofstream(path, std::ios::binary) << bytes;
}

// One change to bytes within [begin, end) of a text: bits, runs cut out, repeated or put in, the rest cut off.
inline void mutate_bytes(std::string& text, size_t begin, size_t end) {
    static const std::vector<std::string> pieces = {"0",
                                                    "-1",
                                                    "1e309",
                                                    "0.5",
                                                    "9223372036854775807",
                                                    "18446744073709551615",
                                                    "18446744073709551616",
                                                    "null",
                                                    "true",
                                                    "\"\"",
                                                    "{}",
                                                    "[]",
                                                    "{",
                                                    "}",
                                                    "[",
                                                    "]",
                                                    ",",
                                                    ":",
                                                    "\"",
                                                    "\\u0000",
                                                    "\\ud800",
                                                    "../",
                                                    std::string(300, '['),
                                                    std::string(1, '\0'),
                                                    "\xff",
                                                    "\xed\xa0\x80"};
    end = std::min(end, text.size());
    begin = std::min(begin, end);
    const size_t at = begin + random_below(end - begin), length = std::min(1 + random_below(16), end - at);
    switch (random_below(7)) {
        case 0:
        case 1:
            if (at < text.size()) text[at] = char(text[at] ^ (1 << random_below(8)));
            break;
        case 2:
            text.erase(at, length);
            break;
        case 3:
            text.insert(at, text.substr(begin + random_below(end - begin), length));
            break;
        case 4:
            text.insert(at, pieces[random_below(pieces.size())]);
            break;
        case 5:
            text.replace(at, length, pieces[random_below(pieces.size())]);
            break;
        default:
            text.resize(at);
    }
}

// One change to a value anywhere in a JSON tree: replaced, removed, or copied to another place.
inline void mutate_json(nlohmann::json& root) {
    static const std::vector<nlohmann::json> values = {0,
                                                       1,
                                                       -1,
                                                       0.5,
                                                       3,
                                                       1ull << 31,
                                                       1ull << 32,
                                                       1ull << 62,
                                                       INT64_MAX,
                                                       UINT64_MAX,
                                                       nullptr,
                                                       true,
                                                       "",
                                                       "F16",
                                                       "I64",
                                                       "X",
                                                       "/etc/passwd",
                                                       "../x",
                                                       nlohmann::json::array(),
                                                       nlohmann::json::object(),
                                                       {1, 2},
                                                       {{"a", 1}}};
    std::vector<nlohmann::json*> nodes;
    const auto collect = [&](auto&& self, nlohmann::json& node) -> void {
        nodes.push_back(&node);
        if (node.is_structured())
            for (nlohmann::json& child : node) self(self, child);
    };
    collect(collect, root);
    nlohmann::json& node = *nodes[random_below(nodes.size())];
    const size_t kind = random_below(4);
    if (kind == 0 && node.is_structured() && !node.empty())
        node.erase(std::next(node.begin(), std::ptrdiff_t(random_below(node.size()))));
    else if (kind == 1) node = nlohmann::json(*nodes[random_below(nodes.size())]);
    else if (kind == 2 && node.is_number_unsigned()) node = node.get<uint64_t>() + (random_below(2) ? 1 : -1);
    else node = values[random_below(values.size())];
}

// Runs `one_case`, which gives true for a correct read; a Failure is as good. Anything else that it throws, and
// an allocation beyond `limit_bytes`(), is an error. Returns the exit status of the program.
template <class Case, class Limit>
int fuzz(int cases, Case one_case, Limit limit_bytes) {
    __sanitizer_install_malloc_and_free_hooks(
        [](const volatile void*, size_t bytes) { largest_allocation = std::max(largest_allocation, bytes); },
        [](const volatile void*) {});
    int read = 0, refused = 0, failed = 0;
    for (int i = 0; i < cases; ++i) {
        std::string error;
        try {
            if (one_case()) ++read;
            else error = "what was read is not what the file holds";
        } catch (const Failure& failure) {
            ++refused;
            if (std::string(failure.what()).size() < 20) error = "a message that says nothing";
        } catch (const std::exception& exception) { error = exception.what(); }
        if (error.empty() && largest_allocation > limit_bytes())
            error = "an allocation of " + std::to_string(largest_allocation) + " bytes, more than " +
                    std::to_string(limit_bytes());
        if (error.empty()) continue;
        ++failed;
        std::printf("case %d: %s\n", i, error.c_str());
    }
    std::printf("%d files read correctly, %d refused\n%d passed, %d failed\n", read, refused, cases - failed, failed);
    return failed == 0 ? 0 : 1;
}
