// Everything a user can set: the configuration, and the one table of flags from which help, parser, TOML file, ranges,
// effective configuration and the nearest name to a misspelt one all follow. config.h reads and writes by it.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <variant>
#include <vector>

#include "llmc/common.h"
#include "llmc/io/launch.h"
#include "llmc/machine.h"

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
        std::string train, val;  // patterns of token files
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
        int64_t seed = 1337;  // also of `generate`
        std::string on_nonfinite = "stop";
    } training;
    struct {
        std::string recompute = "none";
        int64_t mlp_chunk = 0;
#ifdef USE_CUDA
        int64_t head_chunk = 8192;  // the gradient of the head's weight, in fp32, is read and written for each chunk
#else
        int64_t head_chunk = 256;  // logits stay in the cache
#endif
        int64_t threads = 0, memory = 0;  // of each rank; memory in bytes, of all ranks on a machine
        bool no_master = false;
        bool deterministic = false;                      // on GPUs, like the next; elsewhere every run is
        int64_t attention_workspace = int64_t(4) << 30;  // bytes
    } compute;
    struct {
        int64_t ranks = 1;
        std::string schedule = "1f1b";
        int64_t folds = 2, virtual_stages = 0, round_chunks = 0, row_pieces = 1, defer_weights = 0;
        std::string qkv_move = "once", norm_move = "on", spread_head = "auto";
        int64_t hang_timeout = 600;  // seconds
    } parallel;
    struct {
        std::string dir = "runs/train";
        int64_t checkpoint_every = 0, keep = 3;
        bool resume = false;
        std::string init_from;
        int64_t val_every = 0, val_tokens = 65536;
        int64_t stop_after = 0;
        bool dry_run = false, verify_layout = false;
        std::string trace;
        std::string checkpoint;  // read by `generate` and `eval`
        std::string config_file;
        std::string calibrate;  // written by `doctor`
    } run;
    struct {
        std::string prompt;
        int64_t tokens = 256;
        double temperature = 0.8;
        int64_t top_k = 0;
    } generate;
    struct {
        std::vector<std::string> inputs, extensions;
        std::string output;
        int64_t holdout_every = 20, max_bytes = 0, shard_tokens = 100'000'000;
    } tokenize;
    struct {
        std::string print = "table", draw;  // draw: a file
        std::string times, cluster;         // cluster: a description in dev/clusters, also for `train --schedule auto`
        int64_t chunks = 0;
        std::string choice;  // why `auto` has taken the schedule; no flag
    } plan;
    struct {
        double time_scale = 1;
        int64_t repeats = 5;
    } rehearse;
    bool json = false;

    Launch launch;                // how the process was started
    std::set<std::string> given;  // names of the flags set by the user, not by default
    std::set<std::string> typed;  // those of them that stand on the command line, not just in a file
    bool is_given(const std::string& flag) const { return given.count(flag) > 0; }

    // OpenMP threads of each rank: those asked for, or its share of the cores that this process may use. A launcher may
    // have divided these among the processes already.
    int threads() const {
        const int64_t sharers = launch.ranks == 1 ? parallel.ranks : bound_to_cores() ? 1 : launch.local_ranks;
        return int(compute.threads ? compute.threads : std::max<int64_t>(1, usable_threads() / sharers));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The table of flags.

enum Command { TRAIN = 1, TOKENIZE = 2, GENERATE = 4, EVAL = 8, DOCTOR = 16, PLAN = 32, REHEARSE = 64 };

struct CommandRow {
    Command command;
    std::string name, help;
};

inline const CommandRow command_table[] = {
    {TRAIN, "train", "train a model on token files (the default command)"},
    {TOKENIZE, "tokenize", "turn files, directories and JSONL into token files"},
    {GENERATE, "generate", "sample text from a checkpoint"},
    {EVAL, "eval", "validation loss and perplexity of a checkpoint on token files"},
    {PLAN, "plan", "what a schedule would do: its ops, times, bubble and memory, without running it"},
    {REHEARSE, "rehearse", "run a plan for real, with timed sleeps in place of kernels, and measure it"},
    {DOCTOR, "doctor", "what was compiled in, what the machine has and can do, known problems"},
};

inline std::string number_text(double value) {
    char text[32];
    return {text, std::to_chars(text, text + sizeof text, value).ptr};  // the shortest that reads back the same
}

// What a flag may be: a number in a range, or one of the choices "a|b|c".
struct Limits {
    double low = -INFINITY, high = INFINITY;
    bool low_open = false, high_open = false;  // the bound itself is excluded
    std::string choices = "";

    bool contain(double x) const { return (low_open ? x > low : x >= low) && (high_open ? x < high : x <= high); }
    std::string text() const {
        if (!choices.empty()) return choices;
        if (!std::isfinite(low)) return "";
        if (!std::isfinite(high)) return (low_open ? "> " : ">= ") + number_text(low);
        return (low_open ? "(" : "[") + number_text(low) + ", " + number_text(high) + (high_open ? ")" : "]");
    }
};

using Field = std::variant<bool*, int64_t*, double*, std::string*, std::vector<std::string>*>;

struct Flag {
    std::string name;         // also the TOML key
    int commands;             // that take it
    std::string group;        // heading in --help, and TOML table
    Field (*field)(Config&);  // where the value lives; the default is the one in Config
    std::string help;
    Limits limits = {};

    bool positional() const { return name == "inputs"; }
    bool is_switch() const {
        Config shape;
        return std::holds_alternative<bool*>(field(shape));
    }
};

inline const std::vector<Flag>& flag_table() {
#define IN(group, field) #group, [](Config & c) -> Field { return &c.group.field; }
    static const Limits count{0, 1LL << 50}, fraction{0, 1}, decay{0, 1, false, true};
    static const Limits not_negative{.low = 0}, positive{.low = 0, .low_open = true};
    // clang-format off
    static const std::vector<Flag> table = {
        {"model", TRAIN | PLAN | REHEARSE, IN(model, name), "preset: tiny, bytes, gpt2:d12, gpt3:c768, helixpipe:7b, ..., custom"},
        {"layers", TRAIN | PLAN | REHEARSE, IN(model, layers), "layers, 0 = the preset's", {0, 10000}},
        {"channels", TRAIN | PLAN | REHEARSE, IN(model, channels), "width, 0 = the preset's", {0, 1 << 20}},
        {"heads", TRAIN | PLAN | REHEARSE, IN(model, heads), "attention heads, 0 = the preset's", {0, 1 << 16}},
        {"context", TRAIN | PLAN | REHEARSE, IN(model, context), "longest sequence in tokens, 0 = the preset's", {0, 1 << 28}},
        {"vocab", TRAIN | PLAN | REHEARSE, IN(model, vocab), "vocabulary, 0 = the tokenizer's", {0, 1 << 24}},
        {"untied", TRAIN | PLAN | REHEARSE, IN(model, untied), "the head has a weight of its own, not the embedding's"},

        {"data", TRAIN | EVAL, IN(data, train), "token files, a path or pattern such as 'data/train_*.bin'"},
        {"val-data", TRAIN, IN(data, val), "token files for the validation loss, none = no validation"},
        {"tokenizer", TRAIN | TOKENIZE | GENERATE | EVAL, IN(data, tokenizer),
         "of the text, none = the preset's or the checkpoint's", {.choices = "bytes|gpt2"}},
        {"tokenizer-dir", TOKENIZE | GENERATE, IN(data, tokenizer_dir),
         "directory of the tokenizer's own files"},
        {"packing", TRAIN | EVAL | PLAN | REHEARSE, IN(data, packing),
         "a sample is one window of the stream or one document", {.choices = "contiguous|documents"}},
        {"batch-tokens", TRAIN | EVAL | PLAN | REHEARSE, IN(data, batch_tokens), "tokens a step, 0 = 8 contexts", count},
        {"chunk-tokens", TRAIN | EVAL | PLAN | REHEARSE, IN(data, chunk_tokens),
         "tokens that go through the model at once, 0 = the batch; with several ranks a context", count},

        {"steps", TRAIN, IN(training, steps), "optimizer steps", count},
        {"lr", TRAIN, IN(training, lr), "largest learning rate", positive},
        {"min-lr-fraction", TRAIN, IN(training, min_lr_fraction), "the schedule ends at this part of --lr", fraction},
        {"warmup", TRAIN, IN(training, warmup), "steps over which the learning rate rises from 0", count},
        {"lr-schedule", TRAIN, IN(training, lr_schedule),
         "shape after the warm-up", {.choices = "cosine|wsd|constant"}},
        {"decay-fraction", TRAIN, IN(training, decay_fraction),
         "wsd: the last part of the steps, in which the rate falls", fraction},
        {"beta1", TRAIN, IN(training, beta1), "AdamW: decay of the first moment", decay},
        {"beta2", TRAIN, IN(training, beta2), "AdamW: decay of the second moment", decay},
        {"eps", TRAIN, IN(training, eps), "AdamW: added to the root of the second moment", positive},
        {"weight-decay", TRAIN, IN(training, weight_decay), "AdamW: decoupled, on matrices only", not_negative},
        {"clip", TRAIN, IN(training, clip), "largest gradient norm, 0 = no clipping", not_negative},
        {"seed", TRAIN | GENERATE, IN(training, seed), "of initial weights, data order, stochastic rounding and sampling", count},
        {"on-nonfinite", TRAIN, IN(training, on_nonfinite),
         "a loss or gradient is not finite: stop, or skip the update", {.choices = "stop|skip"}},

        {"recompute", TRAIN | PLAN | REHEARSE, IN(compute, recompute),
         "what the backward pass recomputes to save memory; auto: products only as far as --memory is short", {.choices = "none|elementwise|without-attention|full|auto"}},
        {"mlp-chunk", TRAIN | EVAL | PLAN | REHEARSE, IN(compute, mlp_chunk),
         "tokens the MLP works on at once, 0 = the whole chunk", count},
        {"head-chunk", TRAIN | EVAL | PLAN | REHEARSE, IN(compute, head_chunk),
         "tokens whose logits exist at once, 0 = the whole chunk", count},
        {"threads", TRAIN | GENERATE | EVAL | PLAN | REHEARSE | DOCTOR, IN(compute, threads),
         "of each rank, 0 = its share of the cores", {0, 4096}},
        {"memory", TRAIN | GENERATE | EVAL | PLAN | REHEARSE, IN(compute, memory),
         "most bytes to use (12GiB works too), 0 = what is available", count},
        {"no-master", TRAIN | PLAN | REHEARSE, IN(compute, no_master),
         "bf16: no fp32 master weights, 4 bytes a parameter less; the optimizer rounds stochastically"},

#ifdef USE_CUDA
        {"deterministic", TRAIN | PLAN | REHEARSE, IN(compute, deterministic), "the same bits every time, also in attention"},
        {"attention-workspace", TRAIN | PLAN | REHEARSE, IN(compute, attention_workspace),
         "most bytes that cuDNN may take for --deterministic, else our own kernels run", count},
#endif

        {"ranks", TRAIN | GENERATE | EVAL | PLAN | REHEARSE, IN(parallel, ranks),
         "pipeline ranks, as threads of this process; under mpirun its number of processes", {1, 4096}},
        {"schedule", TRAIN | GENERATE | EVAL | PLAN | REHEARSE, IN(parallel, schedule),
         "who computes what when, with several ranks; auto: the best of those that plan --cluster compares",
         {.choices = "gpipe|1f1b|interleaved|zb-h1|zb-h2|seq1f1b|helix|auto"}},
        {"folds", TRAIN | EVAL | PLAN | REHEARSE, IN(parallel, folds), "helix: chunks handled back to back", {1, 1024}},
        {"defer-weights", TRAIN | PLAN | REHEARSE, IN(parallel, defer_weights),
         "gradients of weights of post that wait for idle time, at most so many on a rank; 0 = none", {0, 1 << 20}},
        {"round-chunks", TRAIN | PLAN | REHEARSE, IN(parallel, round_chunks),
         "helix: chunks that run forward and then backward before the next ones, 0 = all of a step", {0, 1 << 20}},
        {"row-pieces", TRAIN | EVAL | PLAN | REHEARSE, IN(parallel, row_pieces),
         "helix: blocks pass their rows on in so many pieces, which hides messages within one fold", {1, 64}},
        {"virtual-stages", TRAIN | GENERATE | EVAL | PLAN | REHEARSE, IN(parallel, virtual_stages),
         "interleaved: stages a rank, 0 = as many as there are layers for", {0, 10000}},
        {"qkv-move", TRAIN | PLAN | REHEARSE, IN(parallel, qkv_move),
         "helix: send weights for queries, keys and values, not the products: once a step, with every chunk, or off",
         {.choices = "once|on|off"}},
        {"norm-move", TRAIN | PLAN | REHEARSE, IN(parallel, norm_move),
         "helix: the LayerNorm before them runs with the attention, too; half as much is kept where products are recomputed",
         {.choices = "on|off"}},
        {"spread-head", TRAIN | EVAL | PLAN | REHEARSE, IN(parallel, spread_head),
         "helix: every rank runs the last post and the head for the chunks whose last attention it ran; auto: if that is "
         "faster by the arithmetic",
         {.choices = "auto|on|off"}},
        {"hang-timeout", TRAIN | GENERATE | EVAL | REHEARSE, IN(parallel, hang_timeout),
         "seconds after which a rank that does not go on is given up, before op times are known", {1, 1 << 30}},

        {"run-dir", TRAIN, IN(run, dir), "directory for checkpoints, metrics and the effective configuration"},
        {"checkpoint-every", TRAIN, IN(run, checkpoint_every), "steps between checkpoints, 0 = only at the end", count},
        {"keep", TRAIN, IN(run, keep), "checkpoints to keep, 0 = all", {0, 1 << 20}},
        {"resume", TRAIN, IN(run, resume), "continue from the newest checkpoint in --run-dir, if there is one"},
        {"init-from", TRAIN, IN(run, init_from), "start from the weights of this Hugging Face GPT-2 directory"},
        {"val-every", TRAIN, IN(run, val_every),
         "steps between validations, 0 = only before the first and after the last", count},
        {"val-tokens", TRAIN | EVAL, IN(run, val_tokens), "most tokens of a validation (one sample at least), 0 = all", count},
        {"stop-after", TRAIN, IN(run, stop_after), "stop with a checkpoint after this step of --steps, 0 = no", count},
        {"dry-run", TRAIN, IN(run, dry_run), "print the memory plan and exit"},
        {"verify-layout", TRAIN, IN(run, verify_layout),
         "take 3 steps on these ranks and on one, compare them and exit: 0 if they agree, else 1"},
        {"trace", TRAIN | REHEARSE, IN(run, trace), "write when each op ran into FILE (Perfetto's JSON) and FILE.svg"},
        {"checkpoint", GENERATE | EVAL, IN(run, checkpoint), "directory of a checkpoint, or of a run: its newest"},
        {"calibrate", DOCTOR, IN(run, calibrate),
         "measure this CPU as ranks of --threads threads, and write FILE for plan --cluster and --schedule auto"},
        {"config", TRAIN | TOKENIZE | GENERATE | EVAL | PLAN | REHEARSE | DOCTOR, IN(run, config_file),
         "TOML file with these names; flags win over it"},

        {"prompt", GENERATE, IN(generate, prompt), "text to continue"},
        {"tokens", GENERATE, IN(generate, tokens), "tokens to generate", {1, 1LL << 40}},
        {"temperature", GENERATE, IN(generate, temperature), "0 = always the likeliest token", {0, 100}},
        {"top-k", GENERATE, IN(generate, top_k), "sample among this many likeliest tokens, 0 = all", {0, 1 << 24}},

        {"inputs", TOKENIZE, IN(tokenize, inputs), "files, directories, JSONL files with a `text` field"},
        {"output", TOKENIZE, IN(tokenize, output), "directory for the token files"},
        {"extensions", TOKENIZE, IN(tokenize, extensions),
         "in directories take only these, such as 'h,hpp,md'; none = all files"},
        {"holdout-every", TOKENIZE, IN(tokenize, holdout_every),
         "each N-th document goes to the validation file, 0 = none", count},
        {"max-bytes", TOKENIZE, IN(tokenize, max_bytes),
         "most bytes of text, chosen by a hash of the path; 0 = all", count},
        {"shard-tokens", TOKENIZE, IN(tokenize, shard_tokens), "tokens of one file", {1, (1LL << 31) - 1}},

        {"print", PLAN, IN(plan, print),
         "times and memory of the schedule, its ops, the memory of all; with a cluster all recompute modes of all",
         {.choices = "table|ops|memory|all"}},
        {"draw", PLAN, IN(plan, draw), "a picture of the plan: FILE.svg, or - for the terminal"},
        {"cluster", TRAIN | PLAN | REHEARSE, IN(plan, cluster),
         "hardware to plan for: a name in dev/clusters, or a file; `plan` without --schedule compares all schedules"},
        {"chunks", PLAN | REHEARSE, IN(plan, chunks), "chunks a step, 0 = those of --batch-tokens", count},
        {"times", PLAN | REHEARSE, IN(plan, times),
         "forward times of pre,attention,post, such as 1,4,3; none = from the FLOPs"},
        {"time-scale", REHEARSE, IN(rehearse, time_scale), "all times are multiplied by it", positive},
        {"repeats", REHEARSE, IN(rehearse, repeats), "steps; the one of the median time is reported", {1, 10000}},
        {"json", PLAN | REHEARSE | DOCTOR, "output", [](Config& c) -> Field { return &c.json; }, "print one JSON object instead of tables"},
    };
    // clang-format on
#undef IN
    return table;
}

// ---------------------------------------------------------------------------------------------------------------------
// Values as text.

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
                for (const std::string& item : *value) list += (list.empty() ? "" : ",") + item;
                return list;
            }
        },
        flag.field(const_cast<Config&>(config)));
}

// "--lr 0.001", or "no --data" where the value is empty.
inline std::string show_flag(const Flag& flag, const Config& config) {
    const std::string text = field_text(flag, config);
    return text.empty() ? "no --" + flag.name : "--" + flag.name + " " + text;
}

// parse_value() gives text its type. It returns "", or what is wrong with the text and leaves the value alone.

inline std::string parse_value(std::string& value, const std::string& text) { return value = text, ""; }

inline std::string parse_value(std::vector<std::string>& list, const std::string& text) {  // with commas
    list.clear();
    std::stringstream stream(text);
    for (std::string item; std::getline(stream, item, ',');) list.push_back(item);
    return "";
}

inline std::string parse_value(bool& value, const std::string& text) {
    if (text != "true" && text != "false") return "is neither true nor false";
    return value = text == "true", "";
}

inline std::string parse_value(double& value, const std::string& text) {
    double parsed;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
    if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(parsed))
        return "is no finite number";
    return value = parsed, "";
}

// Whole numbers may have underscores, as in TOML, and a unit of bytes.
inline std::string parse_value(int64_t& value, const std::string& text) {
    static const std::map<std::string, int> units = {{"", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
    const size_t digits_end = std::min(text.size(), text.find_first_not_of("-0123456789_"));
    const auto unit = units.find(text.substr(digits_end));
    std::string digits = text.substr(0, digits_end);
    digits.erase(std::remove(digits.begin(), digits.end(), '_'), digits.end());
    int64_t parsed;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), parsed);
    if (error == std::errc::invalid_argument || end != digits.data() + digits.size() || unit == units.end())
        return "is no whole number";
    if (error != std::errc() || __builtin_mul_overflow(parsed, int64_t(1) << unit->second, &parsed))
        return "is too large";
    return value = parsed, "";
}

// A list of several texts stays as it is.
inline std::string assign(const Flag& flag, Config& config, const std::vector<std::string>& texts) {
    const Field field = flag.field(config);
    auto* list = std::get_if<std::vector<std::string>*>(&field);
    if (list && (flag.positional() || texts.size() != 1)) return **list = texts, "";
    if (texts.size() != 1) return "is a list of " + std::to_string(texts.size()) + " where one value belongs";
    return std::visit([&](auto* value) { return parse_value(*value, texts[0]); }, field);
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
        if (flag.name == name) return &flag;
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
