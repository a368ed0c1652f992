// All schedules on one cluster: which fit, how long a step takes, how much of it is bubble and exposed communication,
// what a device holds, what it costs, and whether the order would be another one if a rate were. Everything is
// simulated from the lists, costs and arenas that a run would have. `plan --cluster` prints it, `train --schedule auto`
// takes the best.
#pragma once

#include "llmc/parallel/planned_step.h"

// One schedule in one recompute mode.
struct ComparedPlan {
    std::string name;
    Recompute recompute = Recompute::none;
    std::string refusal;  // why it cannot run, or does not fit; empty if it does
    std::optional<PlannedStep> step;
    double step_ms = 0, exposed_ms = 0, update_ms = 0;  // exposed: what messages add to the step; update: of the step
    double bubble = 0;                                  // mean over ranks of 1 - busy / step
    int largest = 0;                                    // rank
    DeviceBytes bytes;                                  // of its devices
    int64_t longest_context = 0;                        // in tokens, 0: not known

    bool fits() const { return refusal.empty(); }
};

// What is left open: flags that the user has set stay as they are.
struct OpenChoices {
    bool schedule = true, recompute = true, folds = true, virtual_stages = true;
    bool helix = true;    // as configured, and as published
    bool planned = true;  // schedules that do not train, too
    bool row_pieces = true;
};

// Every layout to be compared; of interleaved those whose stages are even, and the most stages that there can be.
inline std::vector<RankOptions> layouts_to_compare(const RankOptions& base, int chunks, const OpenChoices& open) {
    const int p = base.layout.ranks;
    std::vector<RankOptions> all;
    for (const Schedule& schedule : schedules()) {
        if (!open.schedule && schedule.name != base.layout.schedule) continue;
        if (!open.planned && !schedule.trains) continue;
        RankOptions o = base;
        o.layout.schedule = schedule.name;
        const auto each_mode = [&] {
            o.recompute = base.recompute;
            if (!open.recompute) return all.push_back(o);
            for (Recompute mode : recompute_modes) o.recompute = mode, all.push_back(o);
            o.recompute = Recompute::automatic, all.push_back(o);
        };
        if (schedule.name == "helix") {
            for (const bool published : {false, true}) {
                if (published && (!open.helix || base.layout.helix == HelixOptions::published())) break;
                if (published) o.layout.helix = HelixOptions::published();
                for (int folds : {1, 2}) {
                    if (!open.folds && folds > 1) break;
                    if (open.folds) o.layout.folds = folds;
                    for (const int pieces : {1, 8}) {  // the second fold does what they do
                        if (pieces > 1 && (published || !open.row_pieces || o.layout.folds > 1)) continue;
                        o.layout.row_pieces = published ? 1 : open.row_pieces ? pieces : base.layout.row_pieces;
                        o.layout.round_chunks = published ? 0 : base.layout.round_chunks;
                        each_mode();
                        if (published || base.layout.round_chunks) continue;
                        for (int round = p; round <= 4 * p && round < chunks; round *= 2)
                            o.layout.round_chunks = round, each_mode();
                    }
                }
            }
        } else if (schedule.name == "interleaved" && open.virtual_stages) {
            const int L = int(o.model.layers), most = int(ceil_div(L, p));
            for (int v = 2; v <= most; ++v)
                if (L % (p * v) == 0 || v == most) o.layout.virtual_stages = v, each_mode();
        } else {
            o.layout.virtual_stages = schedule.name == "interleaved" ? base.layout.virtual_stages : 0;
            each_mode();
        }
        if (base.layout.ranks == 1) break;  // one rank accumulates
    }
    return all;
}

// Of the sequence lengths at which every chunk is one whole sequence, the longest that fits on the largest rank: arenas
// are planned at two lengths, between and beyond which they are a straight line, and once more at the result.
inline int64_t longest_context(const Cluster& cluster, const ComparedPlan& plan) {
    constexpr int64_t unit = 1024, most = int64_t(1) << 24;
    const PlannedStep& step = *plan.step;
    const bool cut_here = step.options.layout.slices > 1;  // by the schedule
    if (!cut_here && step.options.chunk_tokens != step.options.model.context) return 0;
    // One that keeps what fits now would keep less of longer sequences, down to one that keeps nothing.
    if (plan.recompute == Recompute::automatic) return 0;
    const int sequences = int(step.chunks.size()) / step.options.layout.slices;
    const auto bytes_at = [&](int64_t tokens, std::optional<int64_t> activations) {
        RankOptions o = step.options;
        o.chunk_tokens = o.model.context = tokens;
        std::vector<ChunkShape> chunks = chunks_of_step(o, sequences);
        if (!activations)
            activations =
                make_plan(step.lists[size_t(plan.largest)], std::move(chunks), o.model, step.rules(), step.sizes.tensor)
                    .size.bytes;
        return bytes_on(cluster, o, step.sizes, plan.largest, *activations);
    };
    const int64_t now = step.options.model.context, twice = 2 * now;
    const int64_t at_now = plan.bytes.activations, growth = bytes_at(twice, {}).activations - at_now;
    const auto fits = [&](const DeviceBytes& bytes) { return double(bytes.total()) <= 1e9 * cluster.memory; };
    const auto guess = [&](int64_t tokens) {
        return at_now * cluster.tp + int64_t(double(growth) * double(tokens - now) / double(now)) * cluster.tp;
    };
    int64_t low = 0, high = most / unit;  // in units: `low` fits
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (fits(bytes_at(middle * unit, guess(middle * unit))) ? low : high) = middle;
    }
    for (; low > 0 && !fits(bytes_at(low * unit, {}));) --low;
    return low * unit;
}

inline ComparedPlan compare_plan(const Cluster& cluster, const RankOptions& options, int chunks) {
    ComparedPlan plan;
    plan.name = options.schedule_name(), plan.recompute = options.recompute;
    try {
        plan.step = planned_on(cluster, options, chunks);
    } catch (const Failure& failure) { return plan.refusal = failure.what(), plan; }
    const PlannedStep& step = *plan.step;
    const Timeline timeline = simulate_on(cluster, step);
    plan.update_ms = update_ms(cluster, step);
    plan.step_ms = timeline.makespan + plan.update_ms;
    plan.bubble = timeline.mean_bubble() / timeline.makespan;
    plan.exposed_ms = timeline.makespan - simulate(step.lists, step.input, step.costs(cluster), [](const Op&, int) {
                                              return 0.0;
                                          }).makespan;
    for (int r = 0; r < step.input.ranks; ++r) {
        const DeviceBytes bytes = bytes_on(cluster, step.options, step.sizes, r, step.plan_of(r).size.bytes);
        if (bytes.total() > plan.bytes.total()) plan.bytes = bytes, plan.largest = r;
    }
    if (double(plan.bytes.total()) > 1e9 * cluster.memory)
        plan.refusal = format("takes %.1f GB of a device, which has ", 1e-9 * double(plan.bytes.total())) +
                       format("%.0f GB", cluster.memory);
    return plan;
}

// In one order whoever asks: what fits before what does not, then by time.
inline bool better(const ComparedPlan& a, const ComparedPlan& b) {
    return std::tuple(!a.fits(), !a.step, a.step_ms, a.bytes.total(), a.name) <
           std::tuple(!b.fits(), !b.step, b.step_ms, b.bytes.total(), b.name);
}

// The best first.
inline std::vector<ComparedPlan> compare_plans(const Cluster& cluster, const RankOptions& base, int chunks,
                                               const OpenChoices& open) {
    const std::vector<RankOptions> layouts = layouts_to_compare(base, chunks, open);
    std::vector<ComparedPlan> plans(layouts.size());
    std::vector<std::exception_ptr> errors(layouts.size());
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < layouts.size(); ++i) try {
            plans[i] = compare_plan(cluster, layouts[i], chunks);
        } catch (...) { errors[i] = std::current_exception(); }
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
    std::stable_sort(plans.begin(), plans.end(), better);
    return plans;
}

// Of each schedule the best recompute mode: the first one, for those that do not fit the one that lacks least.
inline std::vector<size_t> best_modes(const std::vector<ComparedPlan>& plans) {
    std::vector<size_t> kept;
    for (size_t i = 0; i < plans.size(); ++i) {
        const auto same =
            std::find_if(kept.begin(), kept.end(), [&](size_t k) { return plans[k].name == plans[i].name; });
        if (same == kept.end()) kept.push_back(i);
        else if (!plans[*same].fits() && plans[i].step && plans[i].bytes.total() < plans[*same].bytes.total())
            *same = i;
    }
    std::sort(kept.begin(), kept.end());
    return kept;
}

// What a rate that is 20 % off does to the order of these plans.
struct RateChange {
    std::string rate;  // such as "matrix products x 0.8"
    std::vector<size_t> order;
};

inline std::vector<RateChange> changed_rates(const Cluster& cluster, const std::vector<const ComparedPlan*>& plans) {
    std::vector<RateChange> changes;
    for (const auto& [what, changed] : with_other_rates(cluster)) {
        std::vector<double> times(plans.size());
#pragma omp parallel for schedule(dynamic)
        for (size_t i = 0; i < plans.size(); ++i) times[i] = simulate_on(changed, *plans[i]->step).makespan;
        RateChange change{what, {}};
        change.order.resize(plans.size());
        std::iota(change.order.begin(), change.order.end(), 0);
        std::stable_sort(change.order.begin(), change.order.end(),
                         [&](size_t a, size_t b) { return times[a] < times[b]; });
        changes.push_back(std::move(change));
    }
    return changes;
}

// ---------------------------------------------------------------------------------------------------------------------
// What a step time means

struct StepWorth {
    double tokens_per_second, mfu, dollars;  // dollars for a billion tokens, 0 where the cluster has no price
};

inline StepWorth worth_of(const Cluster& cluster, const PlannedStep& step, double step_ms) {
    const GptConfig& g = step.options.model;
    double tokens = 0, flops = 0;
    for (size_t c = 0; c < step.chunks.size(); ++c) {
        const ChunkWork work = chunk_work(g, step.chunks, c);
        tokens += double(work.tokens);
        flops += double(work.tokens) * matmul_flops_per_token(g) + 3 * double(g.layers) * work.attention;
    }
    const double devices = double(step.input.ranks) * cluster.tp, rate = 1e3 * tokens / step_ms;
    return {rate, flops / (1e9 * step_ms * devices * cluster.matrix_tflops),
            cluster.price * devices * 1e9 / rate / 3600};
}
