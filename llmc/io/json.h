// JSON from files that may be damaged or hostile: nlohmann's parser, with duplicate keys and deep nesting refused,
// and typed look-ups whose errors name the file and the key.
#pragma once

#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "llmc/io/files.h"

inline constexpr int64_t json_bytes_limit =
    100'000'000;  // safetensors' own limit for its header; ours for every JSON file

// `where` names the text in errors.
inline nlohmann::json parse_json(std::string_view text, const std::string& where) {
    using event = nlohmann::json::parse_event_t;
    constexpr int depth_limit = 32;
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    const auto check = [&](int depth, event what, nlohmann::json& parsed) {
        if (depth > depth_limit)
            throw Failure(EXIT_DATA, where + " is nested deeper than " + std::to_string(depth_limit) + " levels.");
        if (what == event::object_start) keys.emplace_back();
        if (what == event::object_end) keys.pop_back();
        if (what == event::key && !keys.back().insert(parsed.get<std::string>()).second)
            throw Failure(EXIT_DATA, where + " has the key \"" + parsed.get<std::string>() + "\" twice.");
        return true;
    };
    try {
        return nlohmann::json::parse(text, check);
    } catch (const nlohmann::json::exception& error) {
        throw Failure(EXIT_DATA, where + " is not valid JSON: " + error.what() + ".");
    }
}

inline nlohmann::json read_json_file(const std::string& path) {
    return parse_json(read_text_file(path, json_bytes_limit), path);
}

// Strings that are not UTF-8 (a path in a configuration, say) are written with replacement characters, not refused.
inline std::string json_text(const nlohmann::json& value, int indent = 2) {
    return value.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

// For errors: a value that may be megabytes long.
inline std::string excerpt(const nlohmann::json& value) {
    const std::string text = json_text(value, -1);
    return text.size() <= 60 ? text : text.substr(0, 60) + "...";
}

// Members of a JSON object, by type. Integers are those of the formats read here: never negative.
inline const nlohmann::json& json_member(const nlohmann::json& object, const std::string& key,
                                         const std::string& where) {
    if (!object.is_object() || !object.contains(key)) throw Failure(EXIT_DATA, where + " has no \"" + key + "\".");
    return object.at(key);
}

template <class Integer = int64_t>
Integer as_integer(const nlohmann::json& value, const std::string& where) {
    constexpr Integer largest = std::numeric_limits<Integer>::max();
    if (!value.is_number_unsigned() || value.get<uint64_t>() > uint64_t(largest))
        throw Failure(EXIT_DATA, where + " has " + excerpt(value) + " where an integer from 0 to " +
                                     std::to_string(largest) + " belongs.");
    return value.get<Integer>();
}

inline std::string as_string(const nlohmann::json& value, const std::string& where) {
    if (!value.is_string()) throw Failure(EXIT_DATA, where + " has " + excerpt(value) + " where a string belongs.");
    return value.get<std::string>();
}

template <class Integer = int64_t>
Integer json_integer(const nlohmann::json& object, const std::string& key, const std::string& where) {
    return as_integer<Integer>(json_member(object, key, where), where + ", \"" + key + "\",");
}

inline std::string json_string(const nlohmann::json& object, const std::string& key, const std::string& where) {
    return as_string(json_member(object, key, where), where + ", \"" + key + "\",");
}

inline bool json_bool(const nlohmann::json& object, const std::string& key, const std::string& where) {
    const nlohmann::json& value = json_member(object, key, where);
    if (!value.is_boolean())
        throw Failure(EXIT_DATA, where + ", \"" + key + "\", has " + excerpt(value) + " where true or false belongs.");
    return value.get<bool>();
}
