// Reads the configuration from the command line and --config FILE, completes it, refuses a bad one with all its
// violations at once, and writes the one in effect. The main programs call parse_config() before anything is allocated.
#pragma once

// CLI11 takes the command line apart, toml.h the file; both deliver text, and the table in flags.h gives it types.
#include <CLI/CLI.hpp>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "llmc/io/relations.h"
#include "llmc/io/toml.h"

// Thrown by parse_config() for --help and --version: print the text, exit 0.
struct HelpRequested {
    std::string text;
};

// Fills in what was left to the program: sizes and tokenizer from the preset, batch and chunk. Sizes stay 0 as
// long as they are to come from --init-from or a checkpoint; whoever reads those sets them and calls complete_config().
inline void fill_config(Config& c) {
    const auto fill = [](auto& value, const auto& otherwise) {
        if (value == std::decay_t<decltype(value)>()) value = otherwise;
    };
    if (c.command == "train" || c.command == "plan" || c.command == "rehearse") {
        const bool from_elsewhere = !c.run.init_from.empty();
        if (from_elsewhere && !c.is_given("model")) c.model.name = "custom";
        if (const Preset* preset = find_preset(c.model.name)) {
            fill(c.model.layers, preset->layers);
            fill(c.model.channels, preset->channels);
            fill(c.model.heads, preset->heads);
            fill(c.model.context, preset->context);
            if (!from_elsewhere) fill(c.data.tokenizer, preset->tokenizer);
        }
        if (from_elsewhere && c.model.vocab) fill(c.data.tokenizer, tokenizer_of_vocab(c.model.vocab));
        if (!from_elsewhere) fill(c.model.vocab, tokenizer_vocab(c.data.tokenizer));
    }
    if (c.command == "tokenize") fill(c.data.tokenizer, "bytes");
    fill(c.data.batch_tokens, 8 * c.model.context);
    if (c.launch.ranks > 1 && !c.is_given("ranks")) c.parallel.ranks = c.launch.ranks;
    const bool pipeline = c.parallel.ranks > 1 || (c.command != "train" && !c.plan.cluster.empty());
    fill(c.data.chunk_tokens, pipeline ? c.model.context : c.data.batch_tokens);
}

[[noreturn]] inline void refuse_config(const std::vector<std::string>& violations) {
    std::string text = "The configuration is refused:";
    for (const std::string& violation : violations) text += "\n  - " + violation;
    throw Failure(EXIT_CONFIG, text);
}

inline void complete_config(Config& config) {
    fill_config(config);
    if (const auto violations = config_violations(config); !violations.empty()) refuse_config(violations);
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing.

// The configuration in effect as TOML; --config reads it back to the same.
inline std::string effective_toml(const Config& config) {
    std::string text = "# The configuration in effect; `train_gpt " + config.command + " --config FILE` repeats it.\n";
    std::string group;
    for (const Flag& flag : flag_table()) {
        const Field field = flag.field(const_cast<Config&>(config));
        if (!(flag.commands & command_row(config).command) || flag.name == "config") continue;
        if (flag.group != group) text += "\n[" + (group = flag.group) + "]\n";
        text += flag.name + " = ";
        if (auto* list = std::get_if<std::vector<std::string>*>(&field)) {
            std::string items;
            for (const std::string& item : **list) items += (items.empty() ? "" : ", ") + toml_quote(item);
            text += "[" + items + "]";
        } else if (std::holds_alternative<std::string*>(field)) text += toml_quote(field_text(flag, config));
        else text += field_text(flag, config);
        text += "\n";
    }
    return text;
}

// The lines in which two effective configurations differ; those that only say how far to go do not count.
inline std::vector<std::string> changed_settings(const std::string& before, const std::string& after) {
    std::map<std::string, std::string> values;
    std::vector<std::string> changes;
    const auto for_each_setting = [](const std::string& toml, const auto& body) {
        std::stringstream lines(toml);
        for (std::string line; std::getline(lines, line);)
            if (const size_t at = line.find(" = "); at != std::string::npos)
                body(line.substr(0, at), line.substr(at + 3));
    };
    for_each_setting(before, [&](const std::string& name, const std::string& value) { values[name] = value; });
    for_each_setting(after, [&](const std::string& name, const std::string& value) {
        if (values.count(name) && values[name] != value && name != "resume" && name != "stop-after" &&
            name != "run-dir")
            changes.push_back(name + " has changed from " + values[name] + " to " + value);
    });
    return changes;
}

inline std::string help_text(const CommandRow& row) {
    const auto pad = [](std::string text, size_t width) {
        return text + std::string(text.size() < width ? width - text.size() : 2, ' ');
    };
    Config defaults;
    std::string text, group;
    if (row.command == TRAIN) {
        text = "train_gpt [COMMAND] [FLAGS]; train_gpt COMMAND --help lists the flags of each:\n";
        for (const CommandRow& other : command_table) text += pad("  " + other.name, 14) + other.help + "\n";
        text += "\n";
    }
    text +=
        "train_gpt " + row.name + (row.command == TOKENIZE ? " INPUTS... --output DIR" : "") + ": " + row.help + "\n";
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & row.command)) continue;
        if (flag.group != group) text += "\n" + (group = flag.group) + "\n";
        const Field field = flag.field(defaults);
        const std::string value = flag.is_switch() ? "" : field_text(flag, defaults);
        const std::string limits = std::holds_alternative<int64_t*>(field) ? "" : flag.limits.text();
        text += pad((flag.positional() ? "  " : "  --") + flag.name + " " + value, 30) + flag.help +
                (limits.empty() ? "" : "; " + limits) + "\n";
    }
    return text + "\nThe value shown is the default. A configuration that cannot work is refused with exit code 2.\n";
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading. Everything that is wrong is collected in `violations`; flags with a wrong value, in `wrong`, keep their
// default and are left out of later checks.
struct ConfigReader {
    Config config;
    std::vector<std::string> violations;
    std::set<std::string> wrong;

    void refuse(const Flag& flag, const std::string& why) {
        violations.push_back(why);
        wrong.insert(flag.name);
    }

    void set(const Flag& flag, const std::vector<std::string>& values, const std::string& where) {
        config.given.insert(flag.name);
        if (const std::string why = assign(flag, config, values); !why.empty())
            refuse(flag,
                   where + (values.empty() ? "" : " " + values[0]) + " " + why + "; use " + show_flag(flag, Config{}));
    }

    // A flag at the end of the line that lacks its value: CLI11 would stop there and report nothing else.
    void refuse_last_without_value(std::vector<std::string>& args, const CommandRow& row) {
        while (args.back().starts_with("--")) {
            const Flag* flag = find_flag(args.back().substr(2));
            if (!flag || !(flag->commands & row.command) || flag->positional() || flag->is_switch()) return;
            refuse(*flag, args.back() + " has no value");
            args.pop_back();
        }
    }

    // What CLI11 did not recognise: misspelt flags, flags of other commands, stray words.
    void refuse_extras(const std::vector<std::string>& extras, const CommandRow& row) {
        for (size_t i = 0; i < extras.size(); ++i) {
            if (extras[i][0] != '-') {
                violations.push_back("'" + extras[i] +
                                     "' belongs to no flag; the command comes first, flags begin with --");
                continue;
            }
            const std::string shown = extras[i].substr(0, extras[i].find('='));
            const std::string name = shown.substr(std::min(shown.size(), shown.find_first_not_of('-')));
            if (find_flag(name)) violations.push_back(shown + " is a flag of other commands than `" + row.name + "`");
            else
                violations.push_back("there is no flag " + shown + "; the nearest is --" +
                                     nearest_flag(name, row.command));
            if (i + 1 < extras.size() && extras[i + 1][0] != '-' && shown == extras[i]) ++i;  // its value
        }
    }

    // One file may serve several commands, so keys of others pass. With keep_sizes, so do those of the model.
    void read_file(const std::string& path, const CommandRow& row, bool keep_sizes) {
        std::error_code error;
        std::ifstream file(path);
        if (!file || !std::filesystem::is_regular_file(path, error))
            throw Failure(EXIT_CONFIG, "--config " + path + " cannot be read; name a TOML file.");
        const std::string text{std::istreambuf_iterator<char>(file), {}};
        for (const TomlEntry& entry : TomlReader(path, text).read()) {
            const std::string where = path + ":" + std::to_string(entry.line) + ": " + entry.key;
            const Flag* flag = find_flag(entry.key);
            if (!flag || flag->name == "config")
                violations.push_back(where + " is no key; the nearest is " + nearest_flag(entry.key, row.command));
            else if (!entry.table.empty() && entry.table != flag->group)
                violations.push_back(where + " stands in [" + entry.table + "]; it belongs in [" + flag->group + "]");
            else if ((flag->commands & row.command) && !(keep_sizes && flag->group == "model"))
                set(*flag, entry.values, where);
        }
    }
};

inline Config parse_config(int argc, const char* const* argv, const Launch& launch = {}) {
    std::vector<std::string> args(argv + 1, argv + argc);
    if (!args.empty() && args[0] == "--version") throw HelpRequested{"helixtrain 0.1.0, " PRECISION_NAME "\n"};
    if (args.empty() || args[0][0] == '-') args.insert(args.begin(), "train");

    CLI::App app("train_gpt");
    app.require_subcommand(1);
    std::vector<std::string> commands;
    for (const CommandRow& row : command_table) {
        commands.push_back(row.name);
        CLI::App* sub = app.add_subcommand(row.name)->allow_extras();
        for (const Flag& flag : flag_table()) {
            if (!(flag.commands & row.command)) continue;
            if (flag.is_switch()) sub->add_flag("--" + flag.name);
            else if (flag.positional())
                sub->add_option(flag.name)->allow_extra_args()->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
            else sub->add_option("--" + flag.name)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        }
    }
    ConfigReader reader;
    reader.config.command = args[0];
    reader.config.launch = launch;
    if (std::find(commands.begin(), commands.end(), args[0]) == commands.end())
        throw Failure(EXIT_CONFIG,
                      "There is no command '" + args[0] + "'; the nearest is '" + nearest(args[0], commands) + "'.");
    const CommandRow& row = command_row(reader.config);
    const CLI::App* sub = app.get_subcommand(row.name);
    reader.refuse_last_without_value(args, row);
    try {
        app.parse(std::vector<std::string>(args.rbegin(), args.rend()));  // CLI11 takes them from the back
    } catch (const CLI::CallForHelp&) { throw HelpRequested{help_text(row)}; } catch (const CLI::Error& error) {
        throw Failure(EXIT_CONFIG, std::string(error.what()) + "; see train_gpt " + row.name + " --help.");
    }

    reader.refuse_extras(sub->remaining(), row);
    // The file first, the flags over it. A preset among the flags replaces all sizes of the file's model.
    if (const CLI::Option* file = sub->get_option("--config"); file->count())
        reader.read_file(file->results().back(), row, row.command == TRAIN && sub->get_option("--model")->count());
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & row.command)) continue;
        const std::string name = (flag.positional() ? "" : "--") + flag.name;
        std::vector<std::string> values = sub->get_option(name)->results();
        if (values.empty()) continue;
        if (!flag.positional()) values = {values.back()};  // a flag given twice: the later one counts
        if (values[0].starts_with("--") && find_flag(values[0].substr(2)))
            reader.refuse(flag, name + " has no value, " + values[0] + " follows it");
        else reader.set(flag, values, name);
        reader.config.typed.insert(flag.name);
    }
    fill_config(reader.config);
    for (const std::string& violation : config_violations(reader.config, reader.wrong))
        reader.violations.push_back(violation);
    if (!reader.violations.empty()) refuse_config(reader.violations);
    return reader.config;
}
