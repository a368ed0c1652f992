// What a pipeline costs: two ranks of one thread against one rank of two threads, whole training steps with clipping
// and AdamW, in turns. Beside the ratio of tokens a second stands its cap, 1 - the simulated bubble, and the bubble as
// measured and as simulated. The durations that are simulated are medians of a single rank with one thread that runs
// the same ops, never the pipeline's own. `replayed` is the simulation of each step with the durations that its ops
// had: what it adds to `simulated` is the price of durations that vary. `copy` is the posting of messages, where thread
// ranks copy them, and `loop` what is neither computing nor copying nor waiting, both of the ops' time.
//
//   build/bench/pipeline_overhead [--json] [--rounds 5] [--steps 3] [--recompute none|without-attention|full]
//                                 [--case "bytes 16x512"] [--schedule "helix F=2"]
#include "dev/bench/training_steps.h"

struct Workload {
    std::string name;
    GptConfig model;
    int chunks;
    int64_t chunk_tokens;
};

struct Pipeline {
    std::string name, schedule;
    int folds = 1;
};

struct Measured {
    std::vector<double> step_seconds;                  // whole steps
    std::vector<double> bubble, replayed, copy, loop;  // of the ops of each step: parts of one

    void append(const Measured& other) {
        for (auto field :
             {&Measured::step_seconds, &Measured::bubble, &Measured::replayed, &Measured::copy, &Measured::loop})
            (this->*field).insert((this->*field).end(), (other.*field).begin(), (other.*field).end());
    }
};

Batch batch_of(const Workload& work) {
    return random_batch(work.model, std::vector<int64_t>(size_t(work.chunks), work.chunk_tokens));
}

RankOptions options_for(const Workload& work, Recompute recompute, const Pipeline& pipeline, int ranks, int rank) {
    RankOptions options{work.model,
                        recompute,
                        work.chunk_tokens,
                        0,
                        256,
                        2 / ranks,
                        true,
                        {.ranks = ranks,
                         .rank = rank,
                         .schedule = pipeline.schedule,
                         .folds = pipeline.folds,
                         .max_chunks = work.chunks,
                         .min_chunks = work.chunks}};
    options.layout.helix.spread_head = spreading_pays(options);  // as training does
    return options;
}

// The bubble, as a part of all ranks' time, of a step whose ops take op_seconds(op) and whose messages take no time.
template <class OpSeconds>
double simulated_bubble(const RankOptions& options, int chunks, const OpSeconds& op_seconds) {
    const ScheduleInput in = options.schedule_input(chunks, true, false);
    const OpLists lists = find_schedule(options.layout.schedule)->lists(in);
    const Timeline timeline = simulate(lists, in, op_seconds, [](const Op&, int) { return 0.0; });
    return timeline.mean_bubble() / timeline.makespan;
}

// `steps` steps after one that does not count, on the ranks of a team.
Measured run_steps(const Workload& work, Recompute recompute, const Pipeline& pipeline, int ranks, int steps) {
    const auto options = [&](int rank) { return options_for(work, recompute, pipeline, ranks, rank); };
    Measured measured;
    for (const TimedStep& step : timed_steps(ranks, batch_of(work), steps, options).steps) {
        const auto key = [](const Op& op) { return std::tuple(op.part, op.pass, op.layer, op.chunk, op.piece); };
        std::map<std::tuple<Part, Pass, int, int, int>, double> seconds_of;  // the ops of all ranks
        for (const RankStep& rank : step.ranks)
            for (const TraceEvent& event : rank.events)
                if (event.kind == EventKind::compute) seconds_of[key(event.op)] = event.end - event.start;
        const double all = ranks * step.ops;
        measured.step_seconds.push_back(step.step);
        measured.bubble.push_back(1 - step.sum(&RankStep::busy) / all);
        if (ranks > 1)
            measured.replayed.push_back(
                simulated_bubble(options(0), work.chunks, [&](const Op& op) { return seconds_of.at(key(op)); }));
        measured.copy.push_back(step.sum(&RankStep::copied) / all);
        measured.loop.push_back(step.sum(&RankStep::loop) / all);
    }
    return measured;
}

// Which ops take equally long: the same part, pass and form, whatever the layer and chunk.
using OpKind = std::tuple<Part, Pass, bool>;
OpKind kind_of(const Op& op) { return {op.part, op.pass, op.split}; }

// Medians of the ops as one rank with one thread runs them, in the form that they have on two ranks: split where the
// schedule splits, products moved where helix moves them.
std::map<OpKind, double> op_seconds(const Workload& work, Recompute recompute, const Pipeline& pipeline) {
    NoTransport alone;
    RankOptions options = options_for(work, recompute, pipeline, 1, 0);
    options.threads = 1;
    Rank rank(options, alone);
    initialize(rank);
    options.layout.ranks = 2;  // for the rules of two ranks
    const Batch batch = batch_of(work);
    const Step step = prepare_step(batch, work.chunk_tokens, work.model);
    const ScheduleInput in{1, int(work.model.layers), work.chunks, pipeline.folds, 1, true, false};
    const Plan plan = make_plan(find_schedule(pipeline.schedule)->lists(in)[0],
                                chunk_shapes(step.group_sizes, work.chunk_tokens, work.model.context), work.model,
                                options.tensor_rules(true));
    std::vector<std::byte> arena(size_t(plan.size.bytes + 64));
    rank.activations = arena.data() + (64 - reinterpret_cast<uintptr_t>(arena.data()) % 64) % 64;
    std::map<OpKind, std::vector<double>> samples;
    for (int n = 0; n < 2; ++n) {
        rank.trace.emplace(plan.ops.size());
        run_ops(rank, plan, step, floatS(1.0 / double(step.targets)));
        if (n > 0)
            for (const TraceEvent& event : rank.trace->events())
                samples[kind_of(event.op)].push_back(1e-3 * (event.end - event.start));
    }
    std::map<OpKind, double> medians;
    for (auto& [kind, values] : samples) medians[kind] = median(values);
    return medians;
}

int main(int argc, char** argv) {
    bool json = false;
    int rounds = 5, steps = 3;
    std::string only_case, only_schedule;
    Recompute recompute = Recompute::none;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
        if (flag == "--json") json = true;
        else if (flag == "--rounds") rounds = std::atoi(argv[++i]);
        else if (flag == "--steps") steps = std::atoi(argv[++i]);
        else if (flag == "--case") only_case = argv[++i];
        else if (flag == "--schedule") only_schedule = argv[++i];
        else if (flag == "--recompute" && (value == "none" || value == "full" || value == "without-attention")) {
            recompute = value == "none"   ? Recompute::none
                        : value == "full" ? Recompute::full
                                          : Recompute::without_attention;
            ++i;
        } else
            return std::fprintf(stderr, "pipeline_overhead: %s? See the head of the source.\n", argv[i]), EXIT_CONFIG;
    }
    const std::vector<Workload> workloads = {
        {"bytes 16x512", {6, 384, 6, 512, 257, 320, true}, 16, 512},
        {"gpt2:d12 8x256", {12, 768, 12, 256, 50257, 50304, true}, 8, 256},
    };
    const std::vector<Pipeline> pipelines = {
        {"gpipe", "gpipe"}, {"1f1b", "1f1b"},          {"interleaved", "interleaved"}, {"zb-h1", "zb-h1"},
        {"zb-h2", "zb-h2"}, {"helix F=1", "helix", 1}, {"helix F=2", "helix", 2}};
    if (!json)
        std::printf("%-28s %9s %9s %6s %6s %7s   %9s %9s %9s %6s %6s\n", "case", "2 ranks", "1 rank", "ratio", "cap",
                    "of cap", "bubble", "simulated", "replayed", "copy", "loop");
    for (const Workload& work : workloads)
        for (const Pipeline& pipeline : pipelines) {
            if (!only_case.empty() && only_case != work.name) continue;
            if (!only_schedule.empty() && only_schedule != pipeline.name) continue;
            Measured pair, single;
            for (int round = 0; round < rounds; ++round) {
                pair.append(run_steps(work, recompute, pipeline, 2, steps));
                single.append(run_steps(work, recompute, pipeline, 1, steps));
            }
            const double tokens = double(work.chunks * work.chunk_tokens);
            const double ours = tokens / median(pair.step_seconds), reference = tokens / median(single.step_seconds);
            const std::map<OpKind, double> medians = op_seconds(work, recompute, pipeline);
            const double simulated = simulated_bubble(options_for(work, recompute, pipeline, 2, 0), work.chunks,
                                                      [&](const Op& op) { return medians.at(kind_of(op)); });
            const double cap = 1 - simulated;
            const std::string name = work.name + " " + pipeline.name;
            if (json)
                std::printf(
                    "{\"case\": \"%s\", \"metric\": \"tokens_per_second\", \"ours\": %.1f, \"reference\": %.1f, "
                    "\"reference_name\": \"one rank, two threads\", \"ratio\": %.4f, \"bound\": %.1f, "
                    "\"percent_of_bound\": %.1f, \"bubble\": %.4f, \"simulated_bubble\": %.4f, \"replayed_bubble\": "
                    "%.4f, \"copy\": %.5f, "
                    "\"loop\": %.5f}\n",
                    name.c_str(), ours, reference, ours / reference, cap * reference, 100 * ours / (cap * reference),
                    median(pair.bubble), simulated, median(pair.replayed), median(pair.copy), median(pair.loop));
            else
                std::printf("%-28s %9.0f %9.0f %6.3f %6.3f %6.1f%%   %8.1f%% %8.1f%% %8.1f%% %5.2f%% %5.2f%%\n",
                            name.c_str(), ours, reference, ours / reference, cap, 100 * ours / (cap * reference),
                            100 * median(pair.bubble), 100 * simulated, 100 * median(pair.replayed),
                            100 * median(pair.copy), 100 * median(pair.loop));
            std::fflush(stdout);
        }
    return 0;
}
