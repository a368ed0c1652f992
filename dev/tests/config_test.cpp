// The configuration as a user meets it: flags, TOML file, effective configuration, and what is refused with which
// words; the machine's limits; the metrics file; the lines of the console.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "llmc/io/config.h"
#include "llmc/io/log.h"
#include "llmc/io/metrics.h"

static Config parse(std::vector<const char*> args) {
    args.insert(args.begin(), "train_gpt");
    return parse_config(int(args.size()), args.data());
}

static bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
#define EXPECT_CONTAINS(text, part) EXPECT_PRED2(contains, text, part)

// The text of the refusal; the exit code must be 2.
static std::string refusal(const std::vector<const char*>& args) {
    try {
        parse(args);
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, EXIT_CONFIG);
        return failure.what();
    }
    return "accepted";
}

static size_t violations(const std::string& refusal) {
    size_t count = 0;
    for (size_t at = 0; (at = refusal.find("\n  - ", at)) != std::string::npos; ++at) ++count;
    return count;
}

struct TemporaryFile {
    std::string path;
    explicit TemporaryFile(const std::string& text = "") {
        path = testing::TempDir() + "config_test_" + std::to_string(::getpid());
        std::ofstream(path) << text;
    }
    ~TemporaryFile() { std::filesystem::remove(path); }
    std::string text() const {
        std::ifstream file(path);
        return {std::istreambuf_iterator<char>(file), {}};
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Values

TEST(Config, FlagsAndDefaultCommand) {
    const Config c = parse({"--data", "x.bin", "--lr=1e-3", "--steps", "7", "--untied", "--memory", "2GiB"});
    EXPECT_EQ(c.command, "train");
    EXPECT_EQ(c.data.train, "x.bin");
    EXPECT_EQ(c.training.lr, 1e-3);
    EXPECT_EQ(c.training.steps, 7);
    EXPECT_EQ(c.compute.memory, int64_t(2) << 30);
    EXPECT_TRUE(c.model.untied);
    EXPECT_TRUE(c.is_given("lr"));
    EXPECT_FALSE(c.is_given("beta1"));
    EXPECT_EQ(parse({"train", "--dry-run", "--steps", "5", "--steps", "6"}).training.steps, 6);
}

TEST(Config, PresetsGiveSizesAndTokenizer) {
    const Config d12 = parse({"--dry-run", "--model", "gpt2:d12"});
    EXPECT_EQ(d12.model.layers, 12);
    EXPECT_EQ(d12.model.channels, 768);
    EXPECT_EQ(d12.model.heads, 12);
    EXPECT_EQ(d12.model.context, 1024);
    EXPECT_EQ(d12.model.vocab, 50257);
    EXPECT_EQ(d12.data.tokenizer, "gpt2");
    EXPECT_EQ(parse({"--dry-run", "--model", "d48"}).model.heads, 25);

    const Config tiny = parse({"--dry-run", "--context", "64", "--heads", "6"});
    EXPECT_EQ(tiny.model.layers, 4);
    EXPECT_EQ(tiny.model.channels, 192);
    EXPECT_EQ(tiny.model.heads, 6);
    EXPECT_EQ(tiny.model.context, 64);
    EXPECT_EQ(tiny.model.vocab, 257);
    EXPECT_EQ(tiny.data.batch_tokens, 8 * 64);
    EXPECT_EQ(tiny.data.chunk_tokens, 8 * 64);
}

TEST(Config, EveryPresetStarts) {
    for (const Preset& preset : presets()) {
        if (preset.name == std::string("custom")) continue;
        EXPECT_EQ(parse({"--dry-run", "--model", preset.name}).model.context, preset.context);
    }
}

TEST(Config, EveryDefaultIsWithinItsLimits) {
    const Config defaults;
    for (const Flag& flag : flag_table()) EXPECT_EQ(limits_problem(flag, defaults), "") << flag.name;
}

TEST(Config, SizesOfInitFromComeLater) {
    Config c = parse({"--data", "x", "--init-from", "gpt2", "--packing", "contiguous"});
    EXPECT_EQ(c.model.layers, 0);
    EXPECT_EQ(c.data.batch_tokens, 0);
    c.model.layers = 2, c.model.channels = 66, c.model.heads = 3, c.model.context = 32, c.model.vocab = 50257;
    complete_config(c);
    EXPECT_EQ(c.data.batch_tokens, 8 * 32);
    EXPECT_EQ(c.data.tokenizer, "gpt2");
    c.model.heads = 4;
    EXPECT_THROW(complete_config(c), Failure);
}

TEST(Config, PositionalInputsAndLists) {
    const Config c = parse({"tokenize", "a", "train", "--extensions", "h,hpp", "--output", "out", "b"});
    EXPECT_EQ(c.tokenize.inputs, (std::vector<std::string>{"a", "train", "b"}));
    EXPECT_EQ(c.tokenize.extensions, (std::vector<std::string>{"h", "hpp"}));
    EXPECT_EQ(c.data.tokenizer, "bytes");
}

// ---------------------------------------------------------------------------------------------------------------------
// Refusals

TEST(Refusal, ListsAllViolationsAtOnce) {
    const std::string text =
        refusal({"--channels", "200", "--heads", "3", "--betta1", "0.3", "--beta2", "1.5", "--steps", "10", "--warmup",
                 "20", "--recompute", "fulll", "--lr", "fast", "--data", "x"});
    EXPECT_EQ(violations(text), 6u) << text;
    EXPECT_CONTAINS(text, "--channels 200, --heads 3: a head takes channels / heads; use --channels 201 or --heads 2");
    EXPECT_CONTAINS(text, "no flag --betta1; the nearest is --beta1");
    EXPECT_CONTAINS(text, "--beta2 1.5 is not in [0, 1); use --beta2 0.95");
    EXPECT_CONTAINS(text, "--warmup 20, --steps 10: the warm-up would not end; use --warmup 1");
    EXPECT_CONTAINS(text,
                    "--recompute fulll is not in none|elementwise|without-attention|full|auto; use --recompute full");
    EXPECT_CONTAINS(text, "--lr fast is no finite number; use --lr");
}

TEST(Refusal, AlternativesAreValid) {
    EXPECT_EQ(violations(
                  refusal({"--dry-run", "--packing", "contiguous", "--batch-tokens", "1000", "--chunk-tokens", "300"})),
              2u);
    EXPECT_EQ(refusal({"--dry-run", "--packing", "contiguous", "--batch-tokens", "1024", "--chunk-tokens", "512"}),
              "accepted");
    EXPECT_EQ(refusal({"--dry-run", "--channels", "201", "--heads", "3"}), "accepted");
    EXPECT_CONTAINS(refusal({"--dry-run", "--lr-schedule", "wsd", "--warmup", "900", "--decay-fraction", "0.3"}),
                    "use --decay-fraction 0.1");
    EXPECT_CONTAINS(refusal({"--dry-run", "--batch-tokens", "64", "--chunk-tokens", "65"}), "use --chunk-tokens 64");
    EXPECT_CONTAINS(refusal({"--dry-run", "--model", "gpt3:c5140"}), "use --model gpt3:c5120");
    EXPECT_CONTAINS(refusal({"--dry-run", "--model", "gpt2:d13"}), "use --model gpt2:d12");
    EXPECT_CONTAINS(refusal({"--dry-run", "--vocab", "100"}), "use --vocab 257");
}

TEST(Refusal, NamesTheNearest) {
    EXPECT_CONTAINS(refusal({"trian"}), "the nearest is 'train'");
    EXPECT_CONTAINS(refusal({"--dry-run", "--batch_tokens=3"}), "--batch_tokens; the nearest is --batch-tokens");
    EXPECT_CONTAINS(refusal({"generate", "--checkpoint", "x", "--lr", "1"}), "--lr is a flag of other commands");
}

TEST(Refusal, MissingValuesAndStrayWords) {
    EXPECT_CONTAINS(refusal({"--dry-run", "--steps"}), "--steps has no value");
    EXPECT_CONTAINS(refusal({"--data", "--steps", "4"}), "--data has no value, --steps follows it");
    EXPECT_CONTAINS(refusal({"--dry-run", "eval"}), "'eval' belongs to no flag");
    EXPECT_CONTAINS(refusal({"--dry-run", "--untied=maybe"}), "neither true nor false");
    EXPECT_CONTAINS(refusal({"--dry-run", "--seed", "99999999999999999999"}), "is too large");
    EXPECT_CONTAINS(refusal({"--dry-run", "--steps", "-1"}), "--steps -1 is not in");
    EXPECT_CONTAINS(refusal({"--dry-run", "--clip", "nan"}), "is no finite number");
    EXPECT_CONTAINS(refusal({}), "no --data");
    EXPECT_CONTAINS(refusal({"eval"}), "no --checkpoint");
    EXPECT_EQ(violations(refusal({"tokenize"})), 2u);
}

// A flag of another schedule is refused on the command line. The configuration that a run writes has all of them, and
// serves under any schedule and on one rank.
TEST(Refusal, FlagsOfOtherSchedules) {
    EXPECT_CONTAINS(refusal({"--dry-run", "--ranks", "2", "--folds", "1"}),
                    "--folds 1, --schedule 1f1b: only helix has --folds; use --schedule helix or leave it out");
    const std::string all =
        refusal({"--dry-run", "--schedule", "zb-h1", "--folds", "2", "--qkv-move", "on", "--virtual-stages", "2"});
    EXPECT_EQ(violations(all), 3u) << all;
    EXPECT_CONTAINS(all, "--virtual-stages 2, --schedule zb-h1: only interleaved has --virtual-stages");
    EXPECT_CONTAINS(refusal({"eval", "--checkpoint", "x", "--data", "y", "--folds", "2"}), "use --schedule helix");
    EXPECT_CONTAINS(refusal({"generate", "--checkpoint", "x", "--schedule", "helix", "--virtual-stages", "2"}),
                    "use --schedule interleaved");
    const std::vector<const char*> helix = {"--dry-run", "--schedule", "helix", "--folds", "3", "--qkv-move", "off"};
    for (const char* ranks : {"1", "2"}) {
        std::vector<const char*> args = helix;
        args.insert(args.end(), {"--ranks", ranks});
        EXPECT_EQ(refusal(args), "accepted");
    }
    EXPECT_EQ(refusal({"--dry-run", "--schedule", "interleaved", "--virtual-stages", "2"}), "accepted");
    EXPECT_EQ(refusal({"plan", "--print", "memory", "--folds", "1", "--virtual-stages", "2"}), "accepted");

    const TemporaryFile file(effective_toml(parse(helix)));
    for (const char* schedule : {"1f1b", "interleaved", "helix"}) {
        const Config c = parse({"--config", file.path.c_str(), "--schedule", schedule, "--ranks", "2"});
        EXPECT_EQ(c.parallel.folds, 3);
        EXPECT_EQ(c.parallel.schedule, schedule);
    }
    EXPECT_EQ(refusal({"--config", file.path.c_str(), "--ranks", "1"}), "accepted");
    EXPECT_EQ(refusal({"eval", "--checkpoint", "x", "--data", "y", "--config", file.path.c_str()}), "accepted");
    EXPECT_CONTAINS(refusal({"--config", file.path.c_str(), "--schedule", "1f1b", "--folds", "3"}),
                    "only helix has --folds");
}

TEST(Refusal, RunDirectoryThatHoldsARun) {
    const std::string dir = testing::TempDir() + "config_test_run_" + std::to_string(::getpid());
    std::filesystem::create_directory(dir);
    EXPECT_EQ(refusal({"--data", "x", "--run-dir", dir.c_str()}), "accepted");
    std::ofstream(dir + "/metrics.jsonl") << "";
    EXPECT_CONTAINS(refusal({"--data", "x", "--run-dir", dir.c_str()}), "use --resume");
    EXPECT_EQ(refusal({"--data", "x", "--run-dir", dir.c_str(), "--resume"}), "accepted");
    std::filesystem::remove_all(dir);
}

// ---------------------------------------------------------------------------------------------------------------------
// TOML

TEST(Toml, FlagsWinOverTheFile) {
    const TemporaryFile file(
        "steps = 1_000  # flat\nlr = 0.01\n[model]\nmodel = 'bytes'\nlayers = 3\n[data]\ndata = \"a "
        "b\"\n[generate]\ntop-k = 5\n");
    const Config c = parse({"--config", file.path.c_str(), "--lr", "0.02"});
    EXPECT_EQ(c.training.steps, 1000);
    EXPECT_EQ(c.training.lr, 0.02);
    EXPECT_EQ(c.model.layers, 3);
    EXPECT_EQ(c.model.channels, 384);
    EXPECT_EQ(c.data.train, "a b");
    EXPECT_EQ(parse({"--config", file.path.c_str(), "--model", "tiny"}).model.layers, 4);
}

TEST(Toml, EffectiveConfigurationReadsBackTheSame) {
    const std::vector<std::vector<const char*>> cases = {
        {"--dry-run", "--lr", "0.1234567890123456789", "--model", "gpt3:c1024", "--data", "a \"b\"\\c\n\x01 \xc3\xbc",
         "--resume"},
        {"tokenize", "a", "b\"c", "--output", "d", "--extensions", "h,hpp"},
        {"generate", "--checkpoint", "x", "--prompt", "tab\tquote'"},
        {"eval", "--checkpoint", "x", "--data", "y"},
        {"doctor"}};
    for (const auto& args : cases) {
        const std::string effective = effective_toml(parse(args));
        const TemporaryFile file(effective);
        const Config again = parse({parse(args).command.c_str(), "--config", file.path.c_str()});
        EXPECT_EQ(effective_toml(again), effective);
    }
}

TEST(Toml, WrongFilesAreRefusedWithTheirLine) {
    const auto refused = [](const std::string& text) {
        const TemporaryFile file(text);
        return refusal({"--dry-run", "--config", file.path.c_str()});
    };
    EXPECT_CONTAINS(refused("\nstps = 3\n"), ":2: stps is no key; the nearest is steps");
    EXPECT_CONTAINS(refused("[training]\nlayers = 3\n"), "stands in [training]; it belongs in [model]");
    EXPECT_CONTAINS(refused("steps = \"x\"\n"), ":1: steps x is no whole number");
    EXPECT_CONTAINS(refused("steps = [1, 2]\n"), "a list of 2");
    EXPECT_CONTAINS(refused("steps = 1\nsteps = 2\n"), ":2: 'steps' is set twice");
    EXPECT_EQ(violations(refused("stps = 3\nwarmup = -1\nlayer = 2\n")), 3u);
    for (const char* text : {"steps", "steps =", "= 3", "[model", "data = \"x", "data = 'x", "steps = 1 2",
                             "data = \"\\q\"", "data = [\"x\"", "data = \"\\u12\"", "a.b.c = 3"})
        EXPECT_CONTAINS(refused(text), ":1: ") << text;
    EXPECT_CONTAINS(refusal({"--dry-run", "--config", "/nonexistent"}), "cannot be read");
}

// ---------------------------------------------------------------------------------------------------------------------
// Help

TEST(Help, NamesEveryFlagOfTheCommand) {
    for (const CommandRow& row : command_table) {
        std::string text;
        try {
            parse({row.name.c_str(), "--help"});
        } catch (const HelpRequested& help) { text = help.text; }
        for (const Flag& flag : flag_table()) {
            const std::string name = (flag.positional() ? "\n  " : "\n  --") + flag.name + " ";
            EXPECT_EQ(contains(text, name), (flag.commands & row.command) != 0) << row.name << " " << flag.name;
        }
    }
    EXPECT_THROW(parse({"--version"}), HelpRequested);
    EXPECT_THROW(parse({"--help"}), HelpRequested);
}

// ---------------------------------------------------------------------------------------------------------------------
// Machine, metrics, console

TEST(Machine, LimitsArePlausible) {
    EXPECT_GE(usable_threads(), 1);
    EXPECT_GT(available_memory(), int64_t(1) << 20);
}

TEST(Metrics, NumbersReadBackToTheSameBits) {
    const StepRecord record{.step = 3, .loss = 1.0 / 3, .val_loss = NAN, .lr = 6e-4, .memory_bytes = int64_t(1) << 40};
    const auto json = nlohmann::json::parse(json_line(record));
    EXPECT_EQ(json["step"], 3);
    EXPECT_EQ(json["loss"].get<double>(), 1.0 / 3);
    EXPECT_TRUE(json["val_loss"].is_null());
    EXPECT_EQ(json["lr"].get<double>(), 6e-4);
    EXPECT_EQ(json["memory_bytes"], int64_t(1) << 40);
    EXPECT_EQ(json.size(), 5u);
}

TEST(Metrics, ResumeKeepsEveryStepOnce) {
    const TemporaryFile file;
    const auto write = [&](int64_t resumed, std::vector<int64_t> steps) {
        MetricsWriter metrics(file.path, resumed);
        for (int64_t step : steps) metrics.write({.step = step});
        metrics.sync();
    };
    write(-1, {0, 1, 2, 3, 4});
    std::ofstream(file.path, std::ios::app) << "{\"step\":5,\"lo";  // torn by a crash
    write(5, {6});
    EXPECT_TRUE(file.text().ends_with("{\"step\":4}\n{\"step\":6}\n"));
    write(2, {3});
    EXPECT_EQ(file.text(), "{\"step\":0}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
    write(-1, {0});
    EXPECT_EQ(file.text(), "{\"step\":0}\n");
    EXPECT_THROW(MetricsWriter("/nonexistent/metrics.jsonl", 0), Failure);
}

TEST(Console, StepLine) {
    StepRecord record{.step = 12,
                      .loss = 3.12345,
                      .grad_norm = 1.234,
                      .lr = 6e-4,
                      .ms = 812.3,
                      .tokens_per_second = 5043.2,
                      .mfu = 0.612,
                      .memory_bytes = int64_t(1.42 * (1 << 30))};
    EXPECT_EQ(step_text(record, 2000, 92.0),
              "step   12/2000 | loss 3.1235 | norm 1.23 | lr 6.0e-04 | 812 ms | 5043 tok/s | mfu 61.2 % | 1.42 GiB | "
              "eta 1m32s");
    record.bubble = 0.05, record.planned_ms = 771.7;
    EXPECT_EQ(
        step_text(record, 2000),
        "step   12/2000 | loss 3.1235 | norm 1.23 | lr 6.0e-04 | 812 ms | 5043 tok/s | mfu 61.2 % | bubble 5.0 % | "
        "plan +5.3 % | 1.42 GiB");
    EXPECT_EQ(step_text({.step = 0, .val_loss = 5.5}, 10), "step  0/10 | val loss 5.5000");
    EXPECT_EQ(step_text({.step = 1, .ms = 209, .planned_ms = 190}, 10), "step  1/10 | 209 ms | plan +10.0 %");
}

TEST(Console, TablesAndUnits) {
    EXPECT_EQ(table_text("memory", {{"weights", "1"}, {"all", "22"}}), "memory\n  weights  1\n  all      22\n");
    EXPECT_EQ(bytes_text(999), "999 B");
    EXPECT_EQ(bytes_text(1536 * 1024), "1.50 MiB");
    EXPECT_EQ(duration_text(45), "45s");
    EXPECT_EQ(duration_text(2 * 3600 + 300), "2h05m");
    EXPECT_EQ(duration_text(3 * 86400 + 4 * 3600), "3d04h");
}
