// The part of TOML that a configuration needs: tables, dotted keys, strings ("basic" and 'literal'), numbers, booleans,
// arrays of them, comments. Values stay text; the flag table in flags.h, which calls this, knows their types.
#pragma once

#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "llmc/common.h"

struct TomlEntry {
    int line;
    std::string table, key;           // [table] or table.key = ...; empty for a flat key
    std::vector<std::string> values;  // one value, or the elements of an array
};

inline std::string toml_quote(const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
        char escape[8];
        if (c == '"' || c == '\\') quoted += '\\', quoted += c;
        else if (c == '\n') quoted += "\\n";
        else if ((unsigned char)c < 0x20 || c == 0x7f) {
            std::snprintf(escape, sizeof escape, "\\u%04x", c);
            quoted += escape;
        } else quoted += c;
    }
    return quoted + '"';
}

// Reads one document; every error names file and line.
class TomlReader {
public:
    TomlReader(std::string file, const std::string& text) : file_(std::move(file)), text_(text) {}

    std::vector<TomlEntry> read() {
        std::vector<TomlEntry> entries;
        std::set<std::string> seen;
        std::string table;
        for (skip_blank_lines(); at_ < text_.size(); skip_blank_lines()) {
            if (take('[')) {
                table = key();
                expect(']');
            } else {
                TomlEntry entry{line_, table, key(), {}};
                if (take('.')) {
                    entry.table += (entry.table.empty() ? "" : ".") + entry.key;
                    entry.key = key();
                }
                expect('=');
                if (take('[')) {
                    for (skip_blank_lines(); !take(']'); skip_blank_lines()) {
                        entry.values.push_back(value());
                        skip_blank_lines();
                        if (!take(',') && peek() != ']') fail("an array goes on with ',' or ends with ']'");
                    }
                } else entry.values.push_back(value());
                if (!seen.insert(entry.table + "." + entry.key).second) fail("'" + entry.key + "' is set twice");
                entries.push_back(std::move(entry));
            }
            skip_spaces();
            if (at_ < text_.size() && peek() != '\n' && peek() != '#') fail("one key = value a line");
        }
        return entries;
    }

private:
    std::string file_;
    const std::string& text_;
    size_t at_ = 0;
    int line_ = 1;

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    bool take(char c) {
        skip_spaces();
        if (peek() != c || at_ >= text_.size()) return false;
        ++at_;
        return true;
    }
    void expect(char c) {
        if (!take(c)) fail(std::string("'") + c + "' is missing");
    }
    void skip_spaces() {
        while (peek() == ' ' || peek() == '\t' || peek() == '\r') ++at_;
    }
    void skip_blank_lines() {
        for (skip_spaces(); peek() == '\n' || peek() == '#'; skip_spaces()) {
            while (at_ < text_.size() && peek() != '\n') ++at_;
            if (at_ < text_.size()) ++at_, ++line_;
        }
    }
    [[noreturn]] void fail(const std::string& why) const {
        throw Failure(EXIT_CONFIG, file_ + ":" + std::to_string(line_) + ": " + why + ".");
    }

    std::string key() {
        skip_spaces();
        if (peek() == '"' || peek() == '\'') return value();
        return bare("-_", "a key");
    }
    std::string value() {
        skip_spaces();
        if (peek() == '"') return basic_string();
        if (peek() == '\'') {
            const size_t end = text_.find_first_of("'\n", at_ + 1);
            if (end == std::string::npos || text_[end] == '\n') fail("a string has no closing quote");
            const std::string literal = text_.substr(at_ + 1, end - at_ - 1);
            at_ = end + 1;
            return literal;
        }
        return bare("+-._", "a value (text stands in quotes)");
    }
    std::string bare(const std::string& punctuation, const char* what) {
        const size_t begin = at_;
        while (std::isalnum((unsigned char)peek()) || (peek() && punctuation.find(peek()) != std::string::npos)) ++at_;
        if (at_ == begin) fail(std::string(what) + " is missing");
        return text_.substr(begin, at_ - begin);
    }
    std::string basic_string() {
        std::string result;
        for (++at_;; ++at_) {
            if (at_ >= text_.size() || peek() == '\n') fail("a string has no closing quote");
            if (peek() == '"') return ++at_, result;
            if (peek() != '\\') {
                result += peek();
                continue;
            }
            ++at_;
            static const std::string names = "btnfr\"\\", meanings = "\b\t\n\f\r\"\\";
            if (const size_t i = names.find(peek()); peek() && i != std::string::npos) result += meanings[i];
            else if (peek() == 'u' && text_.substr(at_ + 1, 4).find_first_not_of("0123456789abcdefABCDEF") >= 4 &&
                     at_ + 4 < text_.size())
                result += utf8(unsigned(std::stoul(text_.substr(at_ + 1, 4), nullptr, 16))), at_ += 4;
            else fail("a string has an escape that TOML does not know");
        }
    }
    static std::string utf8(unsigned code) {
        if (code < 0x80) return {char(code)};
        if (code < 0x800) return {char(0xc0 | code >> 6), char(0x80 | (code & 63))};
        return {char(0xe0 | code >> 12), char(0x80 | (code >> 6 & 63)), char(0x80 | (code & 63))};
    }
};
