// Which values of flags go together, as one table; and every violation of it and of the limits in flags.h at once, each
// with the values found and a valid alternative. Called by config.h.
#pragma once

#include <filesystem>

#include "llmc/io/flags.h"
#include "llmc/model/presets.h"

// The tokens of a tokenizer, end-of-text included.
inline int64_t tokenizer_vocab(const std::string& tokenizer) { return tokenizer == "gpt2" ? 50257 : 257; }
inline std::string tokenizer_of_vocab(int64_t vocab) { return vocab < 50257 ? "bytes" : "gpt2"; }

// The forward times of pre, attention and post that `plan --times` gives, in ms; none if the text is anything else.
inline std::vector<double> forward_times(const std::string& text) {
    std::vector<double> times;
    for (const char *at = text.data(), *end = at + text.size(); at < end && (times.empty() || *at++ == ',');) {
        double value = 0;
        const auto [next, error] = std::from_chars(at, end, value);
        if (error != std::errc() || !(value >= 0 && value < 1e9)) return {};
        times.push_back(value);
        at = next;
        if (at == end && times.size() == 3 && times[0] + times[1] + times[2] > 0) return times;
    }
    return {};
}

inline int64_t planned_chunks(const Config& c) {
    return c.plan.chunks ? c.plan.chunks : ceil_div(c.data.batch_tokens, c.data.chunk_tokens);
}

// "", or why a flag that only `schedule` has cannot be there. In a file it passes: the configuration of a run has all
// flags, and serves under any schedule. `plan --print memory` shows all schedules, and `auto` compares them.
inline std::string foreign_flag(const Config& c, const std::string& flag, const std::string& schedule) {
    const bool compares = c.parallel.schedule == "auto" || (!c.plan.cluster.empty() && !c.is_given("schedule"));
    const bool all_schedules = compares || (c.command == "plan" && c.plan.print == "memory");
    if (!c.typed.count(flag) || c.parallel.schedule == schedule || all_schedules) return "";
    return "only " + schedule + " has --" + flag + "; use --schedule " + schedule + " or leave it out";
}

// problem() returns "", or why the values of the flags do not go together and what would; the values are printed before
// it from the list of names. A size of 0 is not known yet: it comes with a checkpoint.
struct Relation {
    int commands;
    std::vector<std::string> flags;
    std::string (*problem)(const Config&);
};

inline const std::vector<Relation>& relation_table() {
    using std::string, std::to_string;
    // clang-format off
    static const std::vector<Relation> table = {
        {TRAIN | PLAN | REHEARSE, {"model"}, [](const Config& c) -> string {
            if (find_preset(c.model.name)) return "";
            if (c.model.name == "gpt3:c5140")
                return "5140 channels do not divide by heads of 128; use --model gpt3:c5120";
            std::vector<string> names;
            for (const Preset& preset : presets()) names.push_back(preset.name);
            return "there is no such preset; use --model " + nearest(c.model.name, names);
        }},
        {TRAIN | PLAN | REHEARSE, {"model", "layers", "channels", "heads", "context"}, [](const Config& c) -> string {
            const bool known = c.model.layers && c.model.channels && c.model.heads && c.model.context;
            if (known || c.model.name != "custom" || !c.run.init_from.empty()) return "";
            return "`custom` needs all sizes; use --layers 4 --channels 192 --heads 4 --context 256";
        }},
        {TRAIN | PLAN | REHEARSE, {"channels", "heads"}, [](const Config& c) -> string {
            const int64_t C = c.model.channels, NH = c.model.heads;
            if (!C || !NH || C % NH == 0) return "";
            int64_t fewer = NH;
            while (C % fewer) --fewer;
            return "a head takes channels / heads; use --channels " + to_string(round_up(C, NH)) +
                   " or --heads " + to_string(fewer);
        }},
#ifdef USE_CUDA
        {TRAIN | PLAN | REHEARSE, {"channels", "heads"}, [](const Config& c) -> string {
            const int64_t C = c.model.channels, NH = c.model.heads;
            if (!C || !NH || C % NH || (C / NH % 8 == 0 && C / NH <= 128)) return "";
            return "on a GPU a head has a multiple of 8 channels, at most 128; use --channels " +
                   to_string(NH * std::clamp<int64_t>(round_up(C / NH, 8), 8, 128));
        }},
#endif
        {TRAIN, {"vocab", "tokenizer"}, [](const Config& c) -> string {
            const int64_t least = tokenizer_vocab(c.data.tokenizer);
            if (!c.model.vocab || c.model.vocab >= least || !c.run.init_from.empty()) return "";
            return "the tokenizer has more tokens; use --vocab " + to_string(least);
        }},
        {TRAIN, {"data", "dry-run"}, [](const Config& c) -> string {
            if (c.run.dry_run || !c.data.train.empty()) return "";
            return "training reads token files; use --data 'DIR/train_*.bin' (`train_gpt tokenize` writes them)";
        }},
        {TRAIN | EVAL | PLAN, {"batch-tokens", "context", "packing"}, [](const Config& c) -> string {
            const int64_t B = c.data.batch_tokens, T = c.model.context;
            if (c.data.packing != "contiguous" || !T || B % T == 0 || c.plan.chunks) return "";
            return "a step takes whole windows; use --batch-tokens " + to_string(round_up(B, T));
        }},
        {TRAIN | PLAN, {"batch-tokens", "context", "packing"}, [](const Config& c) -> string {
            if (c.data.packing != "documents" || c.data.batch_tokens >= c.model.context || c.plan.chunks) return "";
            return "a document may be as long as the context; use --batch-tokens " + to_string(c.model.context);
        }},
        {TRAIN | EVAL | PLAN, {"chunk-tokens", "context", "packing"}, [](const Config& c) -> string {
            const int64_t N = c.data.chunk_tokens, T = c.model.context;
            if (c.data.packing != "contiguous" || !T || !N || N % T == 0 || T % N == 0) return "";
            return "a chunk holds whole windows or an even slice of one; use --chunk-tokens " + to_string(round_up(N, T));
        }},
        {TRAIN | EVAL, {"chunk-tokens", "batch-tokens"}, [](const Config& c) -> string {
            if (c.data.chunk_tokens <= c.data.batch_tokens || !c.data.batch_tokens) return "";
            return "a chunk is part of a batch; use --chunk-tokens " + to_string(c.data.batch_tokens);
        }},
        {TRAIN, {"warmup", "steps"}, [](const Config& c) -> string {
            if (c.training.warmup <= c.training.steps) return "";
            return "the warm-up would not end; use --warmup " + to_string(c.training.steps / 10);
        }},
        {TRAIN, {"lr-schedule", "warmup", "decay-fraction", "steps"}, [](const Config& c) -> string {
            const double steps = double(c.training.steps), left = steps - double(c.training.warmup);
            if (c.training.lr_schedule != "wsd" || left < 0 || c.training.decay_fraction * steps <= left) return "";
            return "the decay would begin within the warm-up; use --decay-fraction " +
                   number_text(std::floor(left / steps * 100) / 100);
        }},
        {TRAIN, {"stop-after", "steps"}, [](const Config& c) -> string {
            if (c.run.stop_after <= c.training.steps) return "";
            return "training ends before that; use --stop-after " + to_string(c.training.steps);
        }},
        {TRAIN, {"val-every", "val-data"}, [](const Config& c) -> string {
            if (!c.run.val_every || !c.data.val.empty()) return "";
            return "validation reads token files; use --val-data 'DIR/val_*.bin' or --val-every 0";
        }},
        {TRAIN, {"run-dir"}, [](const Config& c) -> string {
            return c.run.dir.empty() ? "metrics and checkpoints need a directory; use --run-dir runs/train" : "";
        }},
        {TRAIN, {"run-dir", "resume"}, [](const Config& c) -> string {
            std::error_code error;  // a path that cannot even be looked up is refused when it is made
            const auto holds = [&](const char* name) { return std::filesystem::exists(c.run.dir + name, error); };
            if (c.run.dir.empty() || c.run.resume || c.run.dry_run) return "";
            if (!holds("/metrics.jsonl") && !holds("/checkpoints")) return "";
            return "the directory holds a run; use --resume to continue it, or --run-dir " + c.run.dir + "-2";
        }},
        {TRAIN | GENERATE | EVAL | REHEARSE, {"ranks"}, [](const Config& c) -> string {
            if (c.launch.ranks == 1 || c.parallel.ranks == c.launch.ranks) return "";
            return c.launch.source + " has started " + to_string(c.launch.ranks) +
                   " processes, each of which is a rank; use --ranks " + to_string(c.launch.ranks) + " or leave it out";
        }},
        {TRAIN | EVAL, {"ranks", "schedule", "chunk-tokens", "context"}, [](const Config& c) -> string {
            const bool sliced = c.data.chunk_tokens && c.data.chunk_tokens < c.model.context;
            if (c.parallel.ranks == 1 || !sliced || c.parallel.schedule == "gpipe" || c.parallel.schedule == "auto")
                return "";
            return "sequences longer than a chunk are cut into slices, which this schedule cannot run; use --schedule "
                   "gpipe, --ranks 1 or --chunk-tokens " + to_string(c.model.context);
        }},
        {TRAIN | GENERATE | EVAL, {"schedule"}, [](const Config& c) -> string {
            if (c.parallel.schedule != "seq1f1b") return "";
            return "seq1f1b is there for plan and rehearse, with slices of equal work that no data comes in; use "
                   "--schedule gpipe for slices, or --schedule 1f1b";
        }},
        {TRAIN | EVAL | PLAN | REHEARSE, {"folds", "schedule"}, [](const Config& c) { return foreign_flag(c, "folds", "helix"); }},
        {TRAIN | PLAN | REHEARSE, {"round-chunks", "schedule"}, [](const Config& c) {
            return foreign_flag(c, "round-chunks", "helix");
        }},
        {TRAIN | EVAL | PLAN | REHEARSE, {"row-pieces", "schedule"}, [](const Config& c) {
            return foreign_flag(c, "row-pieces", "helix");
        }},
        {TRAIN | PLAN | REHEARSE, {"norm-move", "schedule"}, [](const Config& c) { return foreign_flag(c, "norm-move", "helix"); }},
        {TRAIN | EVAL | PLAN | REHEARSE, {"spread-head", "schedule"}, [](const Config& c) {
            return foreign_flag(c, "spread-head", "helix");
        }},
        {TRAIN | PLAN | REHEARSE, {"recompute", "schedule", "qkv-move", "norm-move"}, [](const Config& c) -> string {
            const bool moves = c.parallel.qkv_move != "off" && c.parallel.norm_move == "on";
            const bool helix = c.parallel.schedule == "helix" && c.parallel.ranks > 1;
            if (c.compute.recompute != "elementwise" || !helix || moves) return "";
            return "helix recomputes as little as that only with both moves; use --recompute without-attention, or "
                   "--qkv-move once --norm-move on";
        }},
        {TRAIN | PLAN | REHEARSE, {"recompute", "memory", "cluster"}, [](const Config& c) -> string {
            const bool planned = c.command != "train" && !c.plan.cluster.empty();  // for its memory
            if (c.compute.recompute != "auto" || c.compute.memory || planned) return "";
            return "it keeps what fits into the memory that it is given; use --memory 8GiB";
        }},
        {TRAIN | PLAN | REHEARSE, {"no-master", "cluster"}, [](const Config& c) -> string {
            const bool planned = c.command != "train" && !c.plan.cluster.empty();  // in its precision
            if (!c.compute.no_master || std::is_same_v<floatX, bf16> || planned) return "";
            return "this program has its weights in " PRECISION_NAME ", which are their own master; leave it out, or use "
                   "a program built by make PRECISION=bf16";
        }},
        {TRAIN | PLAN | REHEARSE, {"qkv-move", "schedule"}, [](const Config& c) { return foreign_flag(c, "qkv-move", "helix"); }},
        {TRAIN | GENERATE | EVAL | PLAN | REHEARSE, {"virtual-stages", "schedule"}, [](const Config& c) {
            return foreign_flag(c, "virtual-stages", "interleaved");
        }},
        {TRAIN, {"verify-layout", "ranks"}, [](const Config& c) -> string {
            return c.run.verify_layout && c.parallel.ranks == 1 ? "one rank is compared with several; use --ranks 2" : "";
        }},
        {REHEARSE, {"schedule"}, [](const Config& c) -> string {
            if (c.parallel.schedule != "auto") return "";
            return "one schedule is rehearsed; use --schedule helix (`train_gpt plan --cluster` compares them)";
        }},
        {GENERATE | EVAL, {"schedule"}, [](const Config& c) -> string {
            if (c.parallel.schedule != "auto") return "";
            return "schedules are compared for training; use --schedule 1f1b";
        }},
        {PLAN, {"schedule", "cluster"}, [](const Config& c) -> string {
            if (c.parallel.schedule != "auto" || !c.plan.cluster.empty()) return "";
            return "schedules are compared on a cluster; use --cluster h20x64, or --schedule 1f1b";
        }},
        {PLAN, {"print", "cluster"}, [](const Config& c) -> string {
            if (c.plan.print == "all" && c.plan.cluster.empty())
                return "schedules are compared on a cluster; use --cluster h20x64, or --print memory";
            if (c.plan.print != "memory" || c.plan.cluster.empty()) return "";
            return "that is the memory of this program; use --print all, or no --cluster";
        }},
        {PLAN | REHEARSE, {"times", "cluster"}, [](const Config& c) -> string {
            if (c.plan.times.empty() || c.plan.cluster.empty()) return "";
            return "the times are given or follow from the cluster; use one of the two";
        }},
        {PLAN | REHEARSE, {"times"}, [](const Config& c) -> string {
            if (c.plan.times.empty() || !forward_times(c.plan.times).empty()) return "";
            return "three times in ms, of pre, attention and post, not all 0; use --times 1,4,3";
        }},
#ifdef USE_CUDA
        {REHEARSE, {"ranks"}, [](const Config&) -> string {
            return "a rehearsal sleeps in place of kernels and needs no GPU; use a program built by make DEVICE=cpu";
        }},
#endif
        {PLAN | REHEARSE, {"chunks", "batch-tokens", "chunk-tokens", "layers"}, [](const Config& c) -> string {
            constexpr int64_t most = 1'000'000;
            if (!c.data.chunk_tokens || planned_chunks(c) <= most / (6 * c.model.layers + 2)) return "";
            return "a plan lists every op, a million at most; use --chunks " +
                   to_string(std::max<int64_t>(1, most / (6 * c.model.layers + 2)));
        }},
        {PLAN, {"print", "json", "draw"}, [](const Config& c) -> string {
            const bool list = c.plan.print == "ops" || c.plan.print == "memory";
            if (list + c.json + (c.plan.draw == "-") > 1)
                return "the terminal shows one of them; use --draw plan.svg, or the others one by one";
            if (c.plan.print == "table" || c.plan.draw.empty()) return "";
            return "lists are printed or drawn; use --print table";
        }},
        {GENERATE | EVAL, {"checkpoint"}, [](const Config& c) -> string {
            return c.run.checkpoint.empty() ? "there is no model without one; use --checkpoint runs/train" : "";
        }},
        {EVAL, {"data"}, [](const Config& c) -> string {
            return c.data.train.empty() ? "evaluation reads token files; use --data 'DIR/val_*.bin'" : "";
        }},
        {TOKENIZE, {"inputs"}, [](const Config& c) -> string {
            return c.tokenize.inputs.empty() ? "name files or directories, such as /usr/include" : "";
        }},
        {TOKENIZE, {"output"}, [](const Config& c) -> string {
            return c.tokenize.output.empty() ? "token files need a directory; use --output data/tokens" : "";
        }},
    };
    // clang-format on
    return table;
}

// "", or what is wrong with the flag's value by its own limits, and what would be right.
inline std::string limits_problem(const Flag& flag, const Config& config) {
    const Config defaults;
    const Field field = flag.field(const_cast<Config&>(config));
    std::string use = field_text(flag, defaults);
    bool good = true;
    if (auto* value = std::get_if<int64_t*>(&field)) good = flag.limits.contain(double(**value));
    if (auto* value = std::get_if<double*>(&field)) good = flag.limits.contain(**value);
    if (auto* value = std::get_if<std::string*>(&field); value && !flag.limits.choices.empty() && **value != use) {
        std::vector<std::string> choices;
        std::stringstream list(flag.limits.choices);
        for (std::string choice; std::getline(list, choice, '|');) choices.push_back(choice);
        use = nearest(**value, choices);
        good = use == **value;
    }
    return good ? "" : "is not in " + flag.limits.text() + "; use --" + flag.name + " " + use;
}

// All violations; flags in `wrong`, whose values could not be read, and what depends on them are left out.
inline std::vector<std::string> config_violations(const Config& config, std::set<std::string> wrong = {}) {
    const int command = command_row(config).command;
    std::vector<std::string> violations;
    for (const Flag& flag : flag_table()) {
        if (!(flag.commands & command) || wrong.count(flag.name)) continue;
        if (const std::string problem = limits_problem(flag, config); !problem.empty()) {
            violations.push_back(show_flag(flag, config) + " " + problem);
            wrong.insert(flag.name);
        }
    }
    for (const Relation& relation : relation_table()) {
        bool known = relation.commands & command;
        std::string values;
        for (const std::string& name : relation.flags) {
            known = known && !wrong.count(name);
            values += (values.empty() ? "" : ", ") + show_flag(*find_flag(name), config);
        }
        if (!known) continue;
        if (const std::string problem = relation.problem(config); !problem.empty())
            violations.push_back(values + ": " + problem);
    }
    return violations;
}
