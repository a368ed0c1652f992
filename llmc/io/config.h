// Everything a user can set: the configuration, and the one table of flags from which help, parser, TOML file, ranges,
// effective configuration and the nearest name to a misspelt one all follow. parse_config() is called by the main
// programs; it refuses a bad configuration with all its violations at once, before anything is allocated.
#pragma once

// CLI11 reads the command line, toml.h the configuration file; both deliver text, assign() below gives it a type.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "llmc/common.h"
#include "llmc/io/machine.h"
#include "llmc/io/toml.h"
#include "llmc/model/presets.h"

// ---------------------------------------------------------------------------------------------------------------------
// The configuration. Values here are the defaults; 0 (or "") mostly stands for "from the preset" and is filled in by
// complete_config().
struct Config {
    std::string command = "train";
    struct {
        std::string name = "tiny";
        int64_t layers = 0, channels = 0, heads = 0, context = 0, vocab = 0;
        bool untied = false;
    } model;
    struct {
        std::string train, val;                  // patterns of token files
        std::string tokenizer, tokenizer_dir;
        std::string packing = "documents";
        int64_t batch_tokens = 0, chunk_tokens = 0;
    } data;
    struct {
        int64_t steps = 1000;
        double lr = 6e-4, min_lr_fraction = 0.1;
        int64_t warmup = 0;
        std::string lr_schedule = "cosine";
        double decay_fraction = 0.2;
        double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0;
        int64_t seed = 1337;                     // also of `generate`
        std::string on_nonfinite = "stop";
    } training;
    struct {
        std::string recompute = "none";
        int64_t mlp_chunk = 0, head_chunk = 256;
        int64_t threads = 0, memory = 0;         // memory in bytes
    } compute;
    struct {
        std::string dir = "runs/train";
        int64_t checkpoint_every = 0, keep = 3;
        bool resume = false;
        std::string init_from;
        int64_t val_every = 0, val_tokens = 65536;
        int64_t stop_after = 0;
        bool dry_run = false;
        std::string checkpoint;                  // read by `generate` and `eval`
        std::string config_file;
    } run;
    struct {
        std::string prompt;
        int64_t tokens = 256;
        double temperature = 0.8;
        int64_t top_k = 0;
    } generate;
    struct {
        std::vector<std::string> inputs;
        std::string output, extensions;
        int64_t holdout_every = 20, max_bytes = 0, shard_tokens = 100'000'000;
    } tokenize;

    std::set<std::string> given;                 // names of the flags set by the user, not by default
    bool is_given(const std::string& flag) const { return given.count(flag) > 0; }
};

// Thrown by parse_config() for --help and --version: print the text, exit 0.
struct HelpRequested {
    std::string text;
};

// ---------------------------------------------------------------------------------------------------------------------
// The table of flags.

enum Command { TRAIN = 1, TOKENIZE = 2, GENERATE = 4, EVAL = 8, DOCTOR = 16 };

struct CommandRow {
    Command command;
    const char *name, *help;
};
inline constexpr CommandRow command_table[] = {
    {TRAIN, "train", "train a model on token files (the default command)"},
    {TOKENIZE, "tokenize", "turn files, directories and JSONL into token files"},
    {GENERATE, "generate", "sample text from a checkpoint"},
    {EVAL, "eval", "validation loss and perplexity of a checkpoint on token files"},
    {DOCTOR, "doctor", "what was compiled in, what the machine has and can do, known problems"},
};

struct Limits {
    double low = -INFINITY, high = INFINITY;
    bool low_open = false, high_open = false;    // the bound itself is excluded
    const char* choices = "";                    // "a|b|c", for text
};

using Field = std::variant<bool*, int64_t*, double*, std::string*, std::vector<std::string>*>;

struct Flag {
    const char *name, *group;                    // long name, which is also the TOML key; heading, and TOML table
    int commands;                                // that take it
    Field (*field)(Config&);
    const char* help;
    Limits limits = {};
};

inline const std::vector<Flag>& flag_table() {
#define FIELD(path) [](Config& c) -> Field { return &c.path; }
    static const char* const tokenizers = "bytes|gpt2";
    static const std::vector<Flag> table = {
        {"model", "model", TRAIN, FIELD(model.name), "preset: tiny, bytes, gpt2:d12, gpt3:c768, ..., custom"},
        {"layers", "model", TRAIN, FIELD(model.layers), "layers, 0 = the preset's", {0, 10000}},
        {"channels", "model", TRAIN, FIELD(model.channels), "width, 0 = the preset's", {0, 1 << 20}},
        {"heads", "model", TRAIN, FIELD(model.heads), "attention heads, 0 = the preset's", {0, 1 << 16}},
        {"context", "model", TRAIN, FIELD(model.context), "longest sequence in tokens, 0 = the preset's", {0, 1 << 28}},
        {"vocab", "model", TRAIN, FIELD(model.vocab), "vocabulary, 0 = the tokenizer's", {0, 1 << 24}},
        {"untied", "model", TRAIN, FIELD(model.untied), "the head has a weight of its own, not the embedding's"},

        {"data", "data", TRAIN | EVAL, FIELD(data.train), "token files, a path or pattern such as 'data/train_*.bin'"},
        {"val-data", "data", TRAIN, FIELD(data.val), "token files for the validation loss, none = no validation"},
        {"tokenizer", "data", TRAIN | TOKENIZE, FIELD(data.tokenizer), "of the token files, none = the preset's", {.choices = tokenizers}},
        {"tokenizer-dir", "data", TRAIN | TOKENIZE | GENERATE, FIELD(data.tokenizer_dir), "directory of the tokenizer's own files"},
        {"packing", "data", TRAIN | EVAL, FIELD(data.packing), "a sample is one window of the stream or one document", {.choices = "contiguous|documents"}},
        {"batch-tokens", "data", TRAIN | EVAL, FIELD(data.batch_tokens), "tokens a step, 0 = 8 contexts", {0, 1LL << 40}},
        {"chunk-tokens", "data", TRAIN | EVAL, FIELD(data.chunk_tokens), "tokens that go through the model at once, 0 = the batch", {0, 1LL << 40}},

        {"steps", "training", TRAIN, FIELD(training.steps), "optimizer steps", {0, 1LL << 50}},
        {"lr", "training", TRAIN, FIELD(training.lr), "largest learning rate", {.low = 0, .low_open = true}},
        {"min-lr-fraction", "training", TRAIN, FIELD(training.min_lr_fraction), "the schedule ends at this part of --lr", {0, 1}},
        {"warmup", "training", TRAIN, FIELD(training.warmup), "steps over which the learning rate rises from 0", {0, 1LL << 50}},
        {"lr-schedule", "training", TRAIN, FIELD(training.lr_schedule), "shape after the warm-up", {.choices = "cosine|wsd|constant"}},
        {"decay-fraction", "training", TRAIN, FIELD(training.decay_fraction), "wsd: the last part of the steps, in which the rate falls", {0, 1}},
        {"beta1", "training", TRAIN, FIELD(training.beta1), "AdamW: decay of the first moment", {0, 1, false, true}},
        {"beta2", "training", TRAIN, FIELD(training.beta2), "AdamW: decay of the second moment", {0, 1, false, true}},
        {"eps", "training", TRAIN, FIELD(training.eps), "AdamW: added to the root of the second moment", {.low = 0, .low_open = true}},
        {"weight-decay", "training", TRAIN, FIELD(training.weight_decay), "AdamW: decoupled, on matrices only", {.low = 0}},
        {"clip", "training", TRAIN, FIELD(training.clip), "largest gradient norm, 0 = no clipping", {.low = 0}},
        {"seed", "training", TRAIN | GENERATE, FIELD(training.seed), "of initial weights, data order and sampling", {0, 1LL << 62}},
        {"on-nonfinite", "training", TRAIN, FIELD(training.on_nonfinite), "a loss or gradient is not finite: stop, or skip the update", {.choices = "stop|skip"}},

        {"recompute", "compute", TRAIN, FIELD(compute.recompute), "what the backward pass recomputes to save memory", {.choices = "none|without-attention|full"}},
        {"mlp-chunk", "compute", TRAIN | EVAL, FIELD(compute.mlp_chunk), "tokens the MLP works on at once, 0 = the whole chunk", {0, 1LL << 40}},
        {"head-chunk", "compute", TRAIN | EVAL, FIELD(compute.head_chunk), "tokens whose logits exist at once, 0 = the whole chunk", {0, 1LL << 40}},
        {"threads", "compute", TRAIN | GENERATE | EVAL | DOCTOR, FIELD(compute.threads), "0 = every core the process may use", {0, 4096}},
        {"memory", "compute", TRAIN | GENERATE | EVAL, FIELD(compute.memory), "most bytes to use (12GiB works too), 0 = what is available", {0, 1LL << 60}},

        {"run-dir", "run", TRAIN, FIELD(run.dir), "directory for checkpoints, metrics and the effective configuration"},
        {"checkpoint-every", "run", TRAIN, FIELD(run.checkpoint_every), "steps between checkpoints, 0 = only at the end", {0, 1LL << 50}},
        {"keep", "run", TRAIN, FIELD(run.keep), "checkpoints to keep, 0 = all", {0, 1 << 20}},
        {"resume", "run", TRAIN, FIELD(run.resume), "continue from the newest checkpoint in --run-dir, if there is one"},
        {"init-from", "run", TRAIN, FIELD(run.init_from), "start from the weights of this Hugging Face GPT-2 directory"},
        {"val-every", "run", TRAIN, FIELD(run.val_every), "steps between validations, 0 = only before the first and after the last", {0, 1LL << 50}},
        {"val-tokens", "run", TRAIN | EVAL, FIELD(run.val_tokens), "most tokens of a validation, 0 = all", {0, 1LL << 50}},
        {"stop-after", "run", TRAIN, FIELD(run.stop_after), "stop with a checkpoint after this step of --steps, 0 = no", {0, 1LL << 50}},
        {"dry-run", "run", TRAIN, FIELD(run.dry_run), "print the memory plan and exit"},
        {"checkpoint", "run", GENERATE | EVAL, FIELD(run.checkpoint), "directory of a checkpoint, or of a run: its newest"},
        {"config", "run", TRAIN | TOKENIZE | GENERATE | EVAL | DOCTOR, FIELD(run.config_file), "TOML file with these names; flags win over it"},

        {"prompt", "generate", GENERATE, FIELD(generate.prompt), "text to continue"},
        {"tokens", "generate", GENERATE, FIELD(generate.tokens), "tokens to generate", {1, 1LL << 40}},
        {"temperature", "generate", GENERATE, FIELD(generate.temperature), "0 = always the likeliest token", {0, 100}},
        {"top-k", "generate", GENERATE, FIELD(generate.top_k), "sample among this many likeliest tokens, 0 = all", {0, 1 << 24}},

        {"inputs", "tokenize", TOKENIZE, FIELD(tokenize.inputs), "files, directories, JSONL files with a `text` field"},
        {"output", "tokenize", TOKENIZE, FIELD(tokenize.output), "directory for the token files"},
        {"extensions", "tokenize", TOKENIZE, FIELD(tokenize.extensions), "in directories take only these, such as 'h,hpp,md'; none = all files"},
        {"holdout-every", "tokenize", TOKENIZE, FIELD(tokenize.holdout_every), "each N-th document goes to the validation file, 0 = none", {0, 1LL << 40}},
        {"max-bytes", "tokenize", TOKENIZE, FIELD(tokenize.max_bytes), "most bytes of text, chosen by a hash of the path; 0 = all", {0, 1LL << 60}},
        {"shard-tokens", "tokenize", TOKENIZE, FIELD(tokenize.shard_tokens), "tokens of one file", {1, (1LL << 31) - 1}},
    };
#undef FIELD
    return table;
}

// ---------------------------------------------------------------------------------------------------------------------
// Values as text.

inline std::string number_text(double value) {
    char text[32];
    return {text, std::to_chars(text, text + sizeof text, value).ptr};  // the shortest that reads back the same
}

inline std::string field_text(const Flag& flag, const Config& config) {
    return std::visit(
        [](auto* value) -> std::string {
            using T = std::decay_t<decltype(*value)>;
            if constexpr (std::is_same_v<T, bool>) return *value ? "true" : "false";
            else if constexpr (std::is_same_v<T, int64_t>) return std::to_string(*value);
            else if constexpr (std::is_same_v<T, double>) return number_text(*value);
            else if constexpr (std::is_same_v<T, std::string>) return *value;
            else {
                std::string list;
                for (const std::string& item : *value) list += (list.empty() ? "" : " ") + item;
                return list;
            }
        },
        flag.field(const_cast<Config&>(config)));
}

// "--lr 0.001", or "no --data" where the value is empty.
inline std::string show_flag(const Flag& flag, const Config& config) {
    const std::string text = field_text(flag, config);
    return text.empty() ? "no --" + std::string(flag.name) : "--" + std::string(flag.name) + " " + text;
}

inline std::string limits_text(const Limits& limits) {
    if (*limits.choices) return limits.choices;
    const bool low = std::isfinite(limits.low), high = std::isfinite(limits.high) && limits.high < 1e4;
    if (!low) return "";
    if (!high) return (limits.low_open ? "> " : ">= ") + number_text(limits.low);
    return (limits.low_open ? "(" : "[") + number_text(limits.low) + ", " + number_text(limits.high) +
           (limits.high_open ? ")" : "]");
}

// Gives text its type and stores it. Returns what is wrong with it, or "".
inline std::string assign(const Flag& flag, Config& config, const std::vector<std::string>& texts) {
    const Field field = flag.field(config);
    if (auto* list = std::get_if<std::vector<std::string>*>(&field)) return **list = texts, "";
    if (texts.size() != 1) return "takes one value, not " + std::to_string(texts.size());
    const std::string& text = texts[0];
    const auto parse = [&](auto& value, const std::string& digits) {
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        return error == std::errc() && end == digits.data() + digits.size();
    };
    if (auto* value = std::get_if<std::string*>(&field)) {
        **value = text;
    } else if (auto* value = std::get_if<bool*>(&field)) {
        if (text != "true" && text != "false") return "is true or false";
        **value = text == "true";
    } else if (auto* value = std::get_if<double*>(&field)) {
        if (!parse(**value, text) || !std::isfinite(**value)) return "is not a finite number";
    } else if (auto* value = std::get_if<int64_t*>(&field)) {
        std::string digits = text;
        digits.erase(std::remove(digits.begin(), digits.end(), '_'), digits.end());  // TOML: 100_000
        int shift = 0;
        for (const char* unit : {"KiB", "MiB", "GiB", "TiB"}) {
            shift += 10;
            if (digits.size() > 3 && digits.ends_with(unit)) {
                digits.resize(digits.size() - 3);
                break;
            }
            if (shift == 40) shift = 0;
        }
        if (!parse(**value, digits)) return "is not a whole number";
        if (__builtin_mul_overflow(**value, int64_t(1) << shift, *value)) return "is too large";
    }
    return "";
}

inline bool within(const Limits& limits, double value) {
    return (limits.low_open ? value > limits.low : value >= limits.low) &&
           (limits.high_open ? value < limits.high : value <= limits.high);
}

inline bool is_choice(const std::string& choices, const std::string& text) {
    return text.find('|') == std::string::npos && ("|" + choices + "|").find("|" + text + "|") != std::string::npos;
}

// Returns what is wrong with the field's value by the table's limits, or "".
inline std::string limits_violation(const Flag& flag, const Config& config) {
    const Field field = flag.field(const_cast<Config&>(config));
    bool good = true;
    if (auto* value = std::get_if<int64_t*>(&field)) good = within(flag.limits, double(**value));
    if (auto* value = std::get_if<double*>(&field)) good = within(flag.limits, **value);
    if (auto* value = std::get_if<std::string*>(&field)) good = !*flag.limits.choices || (*value)->empty() || is_choice(flag.limits.choices, **value);
    return good ? "" : "is not in " + limits_text(flag.limits);
}

// ---------------------------------------------------------------------------------------------------------------------
// Names.

inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
    for (size_t i = 1; i <= a.size(); ++i) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); ++j) {
            const size_t changed = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({changed, row[j] + 1, row[j - 1] + 1});
        }
    }
    return row[b.size()];
}

inline std::string nearest(const std::string& name, const std::vector<std::string>& names) {
    return *std::min_element(names.begin(), names.end(), [&](const std::string& a, const std::string& b) {
        return edit_distance(name, a) < edit_distance(name, b);
    });
}

inline const Flag* find_flag(const std::string& name) {
    for (const Flag& flag : flag_table())
        if (name == flag.name) return &flag;
    return nullptr;
}

inline std::string nearest_flag(const std::string& name, int commands) {
    std::vector<std::string> names;
    for (const Flag& flag : flag_table())
        if (flag.commands & commands) names.push_back(flag.name);
    return nearest(name, names);
}

inline const CommandRow& command_row(const Config& config) {
    for (const CommandRow& row : command_table)
        if (config.command == row.name) return row;
    throw std::logic_error("no command " + config.command);
}

// ---------------------------------------------------------------------------------------------------------------------
// Relations between flags. problem() returns "" or why the values do not go together and what would; the values
// themselves are printed from the list of names. A size of 0 is not known yet (it comes with a checkpoint).

struct Relation {
    int commands;
    std::vector<const char*> flags;
    std::string (*problem)(const Config&);
};

inline const std::vector<Relation>& relation_table() {
    using std::string, std::to_string;
    static const std::vector<Relation> table = {
        {TRAIN, {"model"}, [](const Config& c) -> string {
            if (find_preset(c.model.name)) return "";
            if (c.model.name == "gpt3:c5140") return "5140 channels do not divide by heads of 128; use --model gpt3:c5120";
            std::vector<string> names;
            for (const Preset& preset : presets()) names.push_back(preset.name);
            return "no such preset; use --model " + nearest(c.model.name, names);
        }},
        {TRAIN, {"model", "layers", "channels", "heads", "context"}, [](const Config& c) -> string {
            const bool sizes = c.model.layers && c.model.channels && c.model.heads && c.model.context;
            if (sizes || !c.run.init_from.empty() || c.model.name != "custom") return "";
            return "custom leaves no size open; use --layers 4 --channels 192 --heads 4 --context 256";
        }},
        {TRAIN, {"channels", "heads"}, [](const Config& c) -> string {
            const int64_t C = c.model.channels, NH = c.model.heads;
            if (!C || !NH || C % NH == 0) return "";
            int64_t fewer = NH;
            while (C % fewer) --fewer;
            return "each head takes channels / heads; use --channels " + to_string(round_up(C, NH)) + " or --heads " +
                   to_string(fewer);
        }},
        {TRAIN, {"vocab", "tokenizer"}, [](const Config& c) -> string {
            const int64_t least = c.data.tokenizer == "gpt2" ? 50257 : 257;
            if (!c.model.vocab || c.model.vocab >= least || !c.run.init_from.empty()) return "";
            return "the tokenizer has more tokens; use --vocab " + to_string(least);
        }},
        {TRAIN, {"data", "dry-run"}, [](const Config& c) -> string {
            if (c.run.dry_run || !c.data.train.empty()) return "";
            return "training reads token files; use --data 'DIR/train_*.bin' (train_gpt tokenize writes them), or --dry-run";
        }},
        {TRAIN | EVAL, {"batch-tokens", "context", "packing"}, [](const Config& c) -> string {
            const int64_t B = c.data.batch_tokens, T = c.model.context;
            if (c.data.packing != "contiguous" || !T || B % T == 0) return "";
            return "a step takes whole windows; use --batch-tokens " + to_string(round_up(B, T)) + " or --packing documents";
        }},
        {TRAIN | EVAL, {"chunk-tokens", "context", "packing"}, [](const Config& c) -> string {
            const int64_t N = c.data.chunk_tokens, T = c.model.context;
            if (c.data.packing != "contiguous" || !T || !N || N % T == 0 || T % N == 0) return "";
            return "a chunk holds whole windows or an even slice of one; use --chunk-tokens " + to_string(round_up(N, T)) +
                   " or --packing documents";
        }},
        {TRAIN | EVAL, {"chunk-tokens", "batch-tokens"}, [](const Config& c) -> string {
            if (c.data.chunk_tokens <= c.data.batch_tokens) return "";
            return "a chunk is part of the batch; use --chunk-tokens " + to_string(c.data.batch_tokens);
        }},
        {TRAIN, {"warmup", "steps"}, [](const Config& c) -> string {
            if (c.training.warmup <= c.training.steps) return "";
            return "the warm-up would not end; use --warmup " + to_string(c.training.steps / 10);
        }},
        {TRAIN, {"lr-schedule", "warmup", "decay-fraction", "steps"}, [](const Config& c) -> string {
            const double left = double(c.training.steps - c.training.warmup) / double(std::max<int64_t>(1, c.training.steps));
            if (c.training.lr_schedule != "wsd" || c.training.decay_fraction <= left || left < 0) return "";
            return "the decay would begin within the warm-up; use --decay-fraction " + number_text(std::floor(left * 100) / 100);
        }},
        {TRAIN, {"stop-after", "steps"}, [](const Config& c) -> string {
            if (c.run.stop_after <= c.training.steps) return "";
            return "training ends before; use --stop-after " + to_string(c.training.steps) + ", or 0";
        }},
        {TRAIN, {"val-every", "val-data"}, [](const Config& c) -> string {
            if (!c.run.val_every || !c.data.val.empty()) return "";
            return "validation needs token files; use --val-data 'DIR/val_*.bin', or --val-every 0";
        }},
        {TRAIN, {"run-dir"}, [](const Config& c) -> string {
            return c.run.dir.empty() ? "metrics and checkpoints need a directory; use --run-dir runs/train" : "";
        }},
        {GENERATE | EVAL, {"checkpoint"}, [](const Config& c) -> string {
            return c.run.checkpoint.empty() ? "there is no model without one; use --checkpoint runs/demo" : "";
        }},
        {EVAL, {"data"}, [](const Config& c) -> string {
            return c.data.train.empty() ? "there is nothing to evaluate; use --data 'DIR/val_*.bin'" : "";
        }},
        {TOKENIZE, {"inputs"}, [](const Config& c) -> string {
            return c.tokenize.inputs.empty() ? "there is nothing to tokenize; name files or directories, such as /usr/include" : "";
        }},
        {TOKENIZE, {"output"}, [](const Config& c) -> string {
            return c.tokenize.output.empty() ? "the token files need a directory; use --output data/tokens" : "";
        }},
    };
    return table;
}

// All violations of limits and relations; relations of flags in `wrong` are left out, their values mean nothing.
inline std::vector<std::string> config_violations(const Config& config, std::set<std::string> wrong = {}) {
    const int command = command_row(config).command;
    const Config defaults;
    std::vector<std::string> violations;
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & command) || wrong.count(flag.name)) continue;
        const std::string why = limits_violation(flag, config);
        if (why.empty()) continue;
        const std::string fallback = field_text(flag, defaults), choices = flag.limits.choices;
        violations.push_back(show_flag(flag, config) + ": " + why + "; use --" + flag.name + " " +
                             (fallback.empty() ? choices.substr(0, choices.find('|')) : fallback));
        wrong.insert(flag.name);
    }
    for (const Relation& relation : relation_table()) {
        if (!(relation.commands & command)) continue;
        std::string values;
        bool known = true;
        for (const char* name : relation.flags) {
            values += (values.empty() ? "" : ", ") + show_flag(*find_flag(name), config);
            known = known && !wrong.count(name);
        }
        const std::string why = known ? relation.problem(config) : "";
        if (!why.empty()) violations.push_back(values + ": " + why);
    }
    return violations;
}

[[noreturn]] inline void refuse_config(const std::vector<std::string>& violations) {
    std::string text = "the configuration is refused:";
    for (const std::string& violation : violations) text += "\n  - " + violation;
    throw Failure(EXIT_CONFIG, text);
}

// Fills in what was left to the program: sizes and tokenizer from the preset, batch and chunk, threads. Sizes stay 0 as
// long as they are to come from --init-from or a checkpoint; whoever reads those sets them and calls this again.
inline void complete_config(Config& c, std::set<std::string> wrong = {}, std::vector<std::string> violations = {}) {
    if (c.command == "train") {
        if (!c.run.init_from.empty() && !c.is_given("model")) c.model.name = "custom";
        if (const Preset* preset = find_preset(c.model.name)) {
            const auto fill = [](int64_t& size, int64_t value) { if (!size) size = value; };
            fill(c.model.layers, preset->layers);
            fill(c.model.channels, preset->channels);
            fill(c.model.heads, preset->heads);
            fill(c.model.context, preset->context);
            if (c.data.tokenizer.empty() && c.run.init_from.empty()) c.data.tokenizer = preset->tokenizer;
            if (!c.data.tokenizer.empty() && c.run.init_from.empty()) fill(c.model.vocab, c.data.tokenizer == "gpt2" ? 50257 : 257);
        }
    }
    if (c.command == "tokenize" && c.data.tokenizer.empty()) c.data.tokenizer = "bytes";
    if (!c.data.batch_tokens) c.data.batch_tokens = 8 * c.model.context;
    if (!c.data.chunk_tokens) c.data.chunk_tokens = c.data.batch_tokens;
    if (!c.compute.threads) c.compute.threads = usable_threads();
    for (const std::string& violation : config_violations(c, std::move(wrong))) violations.push_back(violation);
    if (!violations.empty()) refuse_config(violations);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading and writing.

// The configuration in effect as TOML; --config reads it back to the same.
inline std::string effective_toml(const Config& config) {
    const CommandRow& row = command_row(config);
    std::string text = "# The configuration in effect. `train_gpt " + config.command + " --config FILE` reads it back.\n", group;
    for (const Flag& flag : flag_table()) {
        const Field field = flag.field(const_cast<Config&>(config));
        if (!(flag.commands & row.command) || flag.name == std::string("config")) continue;
        if (flag.group != group) text += "\n[" + (group = flag.group) + "]\n";
        text += flag.name + std::string(" = ");
        if (auto* value = std::get_if<std::string*>(&field)) text += toml_quote(**value);
        else if (auto* list = std::get_if<std::vector<std::string>*>(&field)) {
            text += "[";
            for (const std::string& item : **list) text += (&item == &(*list)->front() ? "" : ", ") + toml_quote(item);
            text += "]";
        } else text += field_text(flag, config);
        text += "\n";
    }
    return text;
}

inline std::string help_text(const CommandRow& row) {
    const Config defaults;
    std::string text, group;
    if (row.command == TRAIN) {
        text = "train_gpt: trains GPT models.\n\nusage: train_gpt [COMMAND] [FLAGS]     train_gpt COMMAND --help\n";
        for (const CommandRow& other : command_table) text += "  " + std::string(other.name) + std::string(12 - std::strlen(other.name), ' ') + other.help + "\n";
    }
    text += "\ntrain_gpt " + std::string(row.name) + (row.command == TOKENIZE ? " INPUTS... --output DIR" : "") + ": " + row.help + "\n";
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & row.command)) continue;
        if (flag.group != group) text += "\n" + (group = flag.group) + "\n";
        const bool is_switch = std::holds_alternative<bool*>(flag.field(const_cast<Config&>(defaults)));
        const std::string value = field_text(flag, defaults), limits = limits_text(flag.limits);
        std::string left = std::string(flag.name == std::string("inputs") ? "  " : "  --") + flag.name;
        if (!is_switch && !value.empty()) left += " " + value;
        text += left + std::string(left.size() < 30 ? 30 - left.size() : 1, ' ') + flag.help;
        text += (limits.empty() ? "" : "  " + limits) + "\n";
    }
    return text + "\nThe value shown is the default. Exit code 2: the configuration is refused.\n";
}

inline Config parse_config(int argc, const char* const* argv) {
    std::vector<std::string> args(argv + 1, argv + argc);
    const std::string first = args.empty() ? "" : args[0];
    if (first == "--version") throw HelpRequested{"helixtrain 0.1.0, " PRECISION_NAME "\n"};

    // One CLI11 application per command. Values stay text here, and what it does not know it hands back.
    CLI::App app("train_gpt");
    app.set_help_flag();
    std::vector<std::string> commands;
    for (const CommandRow& row : command_table) {
        CLI::App* sub = app.add_subcommand(row.name, row.help)->allow_extras();
        sub->set_help_flag("--help,-h");
        commands.push_back(row.name);
        for (const Flag& flag : flag_table()) {
            if (!(flag.commands & row.command)) continue;
            Config shape;
            const Field field = flag.field(shape);
            const std::string name = "--" + std::string(flag.name);
            if (std::holds_alternative<bool*>(field)) sub->add_flag(name);
            else if (std::holds_alternative<std::vector<std::string>*>(field)) sub->add_option(flag.name)->expected(-1);
            else sub->add_option(name)->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        }
    }
    if (first.empty() || first[0] == '-') args.insert(args.begin(), "train");
    else if (std::find(commands.begin(), commands.end(), first) == commands.end())
        throw Failure(EXIT_CONFIG, "there is no command '" + first + "'; the nearest is '" + nearest(first, commands) + "'.");
    Config config;
    config.command = args[0];
    const CommandRow& row = command_row(config);
    CLI::App* sub = app.get_subcommand(row.name);
    std::reverse(args.begin(), args.end());
    try {
        app.parse(args);
    } catch (const CLI::CallForHelp&) {
        throw HelpRequested{help_text(row)};
    } catch (const CLI::Error& error) {
        throw Failure(EXIT_CONFIG, std::string(error.what()) + "; see train_gpt " + row.name + " --help.");
    }

    std::vector<std::string> violations;
    std::set<std::string> wrong;
    const auto set = [&](const Flag& flag, const std::vector<std::string>& values, const std::string& where) {
        const std::string why = assign(flag, config, values);
        config.given.insert(flag.name);
        if (why.empty()) return;
        violations.push_back(where + (values.empty() ? "" : " " + values[0]) + ": " + why + "; use " + show_flag(flag, Config{}));
        wrong.insert(flag.name);
    };
    const std::vector<std::string> extras = sub->remaining();
    for (size_t i = 0; i < extras.size(); ++i) {
        const std::string name = extras[i].substr(0, extras[i].find('='));
        if (name[0] != '-') {
            violations.push_back("'" + name + "' belongs to no flag; flags begin with --");
            continue;
        }
        const Flag* other = find_flag(name.substr(name.find_first_not_of('-') == std::string::npos ? 0 : name.find_first_not_of('-')));
        violations.push_back(name + ": no such flag of `" + row.name + "`; the nearest is --" + nearest_flag(name, row.command) +
                             (other ? " (other commands have it)" : ""));
        if (i + 1 < extras.size() && extras[i + 1][0] != '-' && name == extras[i]) ++i;  // its value
    }
    // The file first, then the flags over it. A preset among the flags replaces the sizes of the file, too.
    if (const CLI::Option* option = sub->get_option_no_throw("--config"); option->count()) {
        const std::string path = option->results().back();
        std::ifstream file(path);
        const std::string text{std::istreambuf_iterator<char>(file), {}};
        if (!file) throw Failure(EXIT_CONFIG, "--config " + path + " cannot be read.");
        const bool preset_flag = row.command == TRAIN && sub->get_option("--model")->count();
        for (const TomlEntry& entry : TomlReader(path, text).read()) {
            const std::string where = path + ":" + std::to_string(entry.line) + ": " + entry.key;
            const Flag* flag = find_flag(entry.key);
            if (!flag || entry.key == "config") violations.push_back(where + ": no such key; the nearest is " + nearest_flag(entry.key, row.command));
            else if (!entry.table.empty() && entry.table != flag->group)
                violations.push_back(where + ": stands in [" + entry.table + "]; it belongs in [" + flag->group + "]");
            else if (!(flag->commands & row.command)) continue;  // one file may serve several commands
            else if (preset_flag && flag->group == std::string("model") && entry.key != "untied") continue;
            else set(*flag, entry.values, where);
        }
    }
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & row.command)) continue;
        const bool positional = flag.name == std::string("inputs");
        const CLI::Option* option = sub->get_option_no_throw((positional ? "" : "--") + std::string(flag.name));
        if (!option->count()) continue;
        const std::vector<std::string>& results = option->results();
        set(flag, positional ? results : std::vector<std::string>{results.back()}, "--" + std::string(flag.name));
    }
    complete_config(config, wrong, violations);
    return config;
}
