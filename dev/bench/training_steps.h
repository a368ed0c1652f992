// Whole training steps on thread ranks, timed: what the benchmarks share that compare such steps with something else.
#pragma once

#define TESTING
#include "train_gpt.cu"

// Sequences of these lengths, of random tokens.
inline Batch random_batch(const GptConfig& model, const std::vector<int64_t>& lengths) {
    Batch batch;
    uint64_t count = 0;
    for (int64_t length : lengths) {
        Sample sample;
        for (int64_t t = 0; t < length; ++t) {
            sample.tokens.push_back(int32_t(uniform(1, 0, count++) * double(model.vocab)));
            sample.targets.push_back(int32_t(uniform(1, 1, count++) * double(model.vocab)));
        }
        batch.tokens += length;
        batch.targets += length;
        batch.sequences.push_back(std::move(sample));
    }
    return batch;
}

inline void initialize(Rank& rank) {
    initialize_parameters(rank.master, rank.parameters, rank.options.model, 1);
    round_weights(rank);
}

// What a rank has measured of a step, in seconds.
struct RankStep {
    double busy = 0, copied = 0, waited = 0, loop = 0;  // of its ops: computing, posting messages, waiting, the rest
    double pushed_aside = 0;                            // of that: neither waiting nor on a core, since others have it
    std::vector<double> ops_on_core;  // [op of its list] on a core since the op before, waits excluded
    double rest_on_core = 0;          // on a core before and after the ops
    std::vector<TraceEvent> events;
};

struct TimedStep {
    double step = 0, ops = 0;  // seconds: the whole step; from the start of the first op to the end of the last one
    std::vector<RankStep> ranks;

    // Of all ranks.
    double sum(double RankStep::*part) const {
        return std::accumulate(ranks.begin(), ranks.end(), 0.0,
                               [&](double total, const RankStep& rank) { return total + rank.*part; });
    }
};

struct TimedRun {
    std::vector<TimedStep> steps;
    std::vector<MemoryPlan> memory;  // [rank] allocated
    int64_t grown = 0;               // bytes that the process has taken since before its ranks
};

// `steps` steps, with clipping and AdamW, after one that does not count. options(rank) of each of the ranks.
template <class OptionsOfRank>
TimedRun timed_steps(int ranks, const Batch& batch, int steps, const OptionsOfRank& options) {
    TimedRun run;
    run.memory.resize(size_t(ranks));
    run.steps.resize(size_t(steps) + 1);
    for (TimedStep& step : run.steps) step.ranks.resize(size_t(ranks));
    const int64_t used_before = used_on_device();
    Team team{Launch{}};
    team.run(ranks, 600, [&](Transport& transport) {
        Rank rank(options(transport.rank), transport);
        initialize(rank);
        const Step step = prepare_step(batch, rank.options.chunk_tokens, rank.options.model);
        const Plan& plan = rank.plan_for(step.group_sizes, true);
        for (int n = 0; n <= steps; ++n) {
            RankStep& mine = run.steps[size_t(n)].ranks[size_t(rank.index)];
            mine.ops_on_core.resize(plan.ops.size());
            rank.trace.emplace(plan.ops.size() * 2);
            transport.all_gather("");
            const double start = seconds_now(), start_on_core = seconds_on_core();
            const double busy_before = rank.busy_seconds, post_before = rank.post_seconds;
            fill_zero(rank.device, rank.gradients, flat_size(rank.parameters));
            const double ops_start = seconds_now(), ops_start_on_core = seconds_on_core();
            double on_core = ops_start_on_core;
            Observer observer;
            observer.after_op = [&](size_t op) {
                const double before = std::exchange(on_core, seconds_on_core());
                mine.ops_on_core[op] = on_core - before;
            };
            double loss = run_ops(rank, plan, step, floatS(1.0 / double(step.targets)), &observer);
            const double ops_seconds = seconds_now() - ops_start, ops_on_core = seconds_on_core() - ops_start_on_core;
            sum_shared_gradients(rank);
            transport.sum({&loss, 1});
            const double norm = gradient_norm(rank);
            update_parameters(rank, {1e-4, 0.9, 0.95, 1e-8, 0.1, n + 1, norm > 1 ? 1 / norm : 1});
            mine.rest_on_core = seconds_on_core() - start_on_core - ops_on_core;
            transport.all_gather("");
            if (rank.index == 0) run.steps[size_t(n)].step = seconds_now() - start;

            mine.events = rank.trace->events();
            for (const TraceEvent& event : mine.events)
                if (event.kind == EventKind::wait) mine.waited += 1e-3 * (event.end - event.start);
            mine.busy = rank.busy_seconds - busy_before;
            mine.copied = rank.post_seconds - post_before;
            mine.loop = ops_seconds - mine.busy - mine.copied - mine.waited;
            mine.pushed_aside = ops_seconds - mine.waited - ops_on_core;
        }
        run.memory[size_t(rank.index)] = rank.memory;
        if (rank.index == 0) run.grown = used_on_device() - used_before;
        transport.all_gather("");  // nobody gives memory back before it is counted
        return 0;
    });
    run.steps.erase(run.steps.begin());
    for (TimedStep& step : run.steps) {
        double first = INFINITY, last = 0;  // ms
        for (const RankStep& rank : step.ranks)
            for (const TraceEvent& event : rank.events)
                if (event.kind == EventKind::compute)
                    first = std::min(first, event.start), last = std::max(last, event.end);
        step.ops = 1e-3 * (last - first);
    }
    return run;
}
