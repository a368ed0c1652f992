// How well a plan knows what a step will take: this machine is calibrated once, as `doctor --calibrate` does it, then
// 20 steps that calibration has not seen run on two ranks of one thread each, and time, bubble and memory stand beside
// those that were planned. Goals: times within 10 %, bubbles within 3 points, memory to the byte.
//
// The machine may be shared, so that each case is measured twice:
//   measured  by the clock, of the steps whose ranks were pushed aside least; `aside` is the part of their time that
//             others had the core. Where that is more than a few percent, it tells of the others
//   alone     the same step, simulated with the time that each op has had a core, whatever happened in between: what
//             the step takes where nobody else is, but for caches and memory that others use
// Between cases products run on all ranks, as they did before and after the calibration; `speed` is what they reach,
// before and after a case, of the rate that they had then, and `steady` the ratio of `alone` that would be left at a
// speed of 1: what is off there is an error of the model.
//
//   build/bench/calibration [--json] [--cluster FILE] [--steps 5] [--case NUMBER] [--ops]
//
// --cluster takes a description in place of a calibration; --ops shows where the time of a step was planned and went.
#include "dev/bench/calibration_cases.h"
#include "dev/bench/training_steps.h"
#include "llmc/commands/calibrate.h"

constexpr int ranks = 2;

// Of products on all ranks, that plans do not depend on.
double reference_rate() { return measured_product_rate(ranks, 1, 512); }

struct StepTime {
    double ms = 0, bubble = 0;
};

struct Comparison {
    StepTime planned, measured, alone;
    double pushed_aside = 0, speed = 0;                               // parts
    int64_t planned_bytes = 0, allocated_bytes = 0, grown_bytes = 0;  // of both ranks
    bool same_memory = true;                                          // of each rank, and of its arena

    double ratio(StepTime Comparison::*side) const { return (this->*side).ms / planned.ms; }
    double steady() const { return ratio(&Comparison::alone) * speed; }
    double points(StepTime Comparison::*side) const { return 100 * ((this->*side).bubble - planned.bubble); }
};

StepTime time_of(const Timeline& timeline, double rest_ms) {
    return {timeline.makespan + rest_ms, timeline.mean_bubble() / timeline.makespan};
}

// What an op is, wherever it runs.
using OpKey = std::tuple<Pass, Part, bool, int, int, int>;
OpKey key_of(const Op& op) { return {op.pass, op.part, op.split, op.layer, op.chunk, op.piece}; }

// The time of ops by kind, in ms, planned and on a core.
template <class OpMs>
void print_ops(const PlannedStep& plan, const OpCosts& costs, const OpMs& measured_ms) {
    struct Times {
        int count = 0;
        double planned = 0, measured = 0;
    };
    std::map<std::tuple<Pass, Part, bool>, Times> kinds;
    for (const std::vector<Op>& list : plan.lists)
        for (const Op& op : list) {
            if (op.kind != Kind::compute) continue;
            Times& times = kinds[{op.pass, op.part, op.split}];
            ++times.count, times.planned += costs(op), times.measured += measured_ms(op);
        }
    for (const auto& [kind, times] : kinds)
        std::printf("    %c %-10s%-6s %4d times  planned %8.2f ms  on a core %8.2f ms  ratio %.3f\n",
                    "FBW"[int(std::get<0>(kind))], part_name(std::get<1>(kind)), std::get<2>(kind) ? " split" : "",
                    times.count, times.planned, times.measured, times.measured / times.planned);
}

Comparison compare(const CalibrationCase& c, const Cluster& cluster, int steps, bool show_ops) {
    Comparison result;
    const RankOptions options = c.options();
    const Batch batch = random_batch(options.model, c.lengths());
    const Step step = prepare_step(batch, c.chunk_tokens, options.model);
    const std::vector<ChunkShape> shapes = chunk_shapes(step.group_sizes, c.chunk_tokens, c.context);
    const PlannedStep plan(shapes, options);
    const OpCosts costs = plan.costs(cluster, chunk_works(options.model, step, shapes));
    const double update = update_ms(cluster, plan);
    result.planned = time_of(simulate_with(costs, plan), update);

    TimedRun run = timed_steps(ranks, batch, steps, [&](int rank) { return c.options(rank); });
    std::map<OpKey, std::vector<double>> samples;
    std::vector<double> rest;
    for (const TimedStep& timed : run.steps) {
        double slowest = 0;
        for (size_t r = 0; r < ranks; ++r) {
            slowest = std::max(slowest, 1e3 * timed.ranks[r].rest_on_core);
            for (size_t i = 0; i < plan.lists[r].size(); ++i)
                if (const Op& op = plan.lists[r][i]; op.kind == Kind::compute)
                    samples[key_of(op)].push_back(1e3 * timed.ranks[r].ops_on_core[i]);
        }
        rest.push_back(slowest);
    }
    std::map<OpKey, double> medians;
    for (const auto& [key, values] : samples) medians[key] = median(values);
    const auto on_core = [&](const Op& op) { return medians.at(key_of(op)); };
    result.alone = time_of(simulate(plan.lists, plan.input, on_core, [](const Op&, int) { return 0.0; }), median(rest));

    const auto aside = [](const TimedStep& timed) { return timed.sum(&RankStep::pushed_aside) / (ranks * timed.ops); };
    std::sort(run.steps.begin(), run.steps.end(),
              [&](const TimedStep& a, const TimedStep& b) { return aside(a) < aside(b); });
    run.steps.resize((run.steps.size() + 1) / 2);
    std::vector<double> ms, bubble, pushed_aside;
    for (const TimedStep& timed : run.steps) {
        ms.push_back(1e3 * timed.step);
        bubble.push_back(1 - timed.sum(&RankStep::busy) / (ranks * timed.ops));
        pushed_aside.push_back(aside(timed));
    }
    result.measured = {median(ms), median(bubble)};
    result.pushed_aside = median(pushed_aside);

    const std::vector<MemoryPlan> planned = memory_plans(options);
    for (int r = 0; r < ranks; ++r) {
        const MemoryPlan& mine = planned[size_t(r)];
        const MemoryPlan& allocated = run.memory[size_t(r)];
        result.planned_bytes += mine.total();
        result.allocated_bytes += allocated.total();
        result.same_memory = result.same_memory && mine.total() == allocated.total() &&
                             round_up(plan.plan_of(r).size.bytes, 4096) == allocated.activations;
    }
    result.grown_bytes = run.grown;
    if (show_ops) {
        print_ops(plan, costs, on_core);
        std::printf("    beside the ops               planned %8.2f ms  on a core %8.2f ms  ratio %.3f\n", update,
                    median(rest), median(rest) / update);
    }
    return result;
}

void print_json(const std::string& name, const Comparison& c) {
    const auto line = [&](const char* metric, double ours, const char* reference_name, double reference) {
        std::printf(
            "{\"case\": \"%s\", \"metric\": \"%s\", \"ours\": %.6g, \"reference\": %.6g, \"reference_name\": "
            "\"%s\", \"ratio\": %.4f, \"speed\": %.4f, \"aside\": %.4f}\n",
            name.c_str(), metric, ours, reference, reference_name, reference / ours, c.speed, c.pushed_aside);
    };
    line("planned_step_ms", c.planned.ms, "measured", c.measured.ms);
    line("planned_step_ms", c.planned.ms, "alone", c.alone.ms);
    line("planned_bubble", c.planned.bubble, "measured", c.measured.bubble);
    line("planned_bubble", c.planned.bubble, "alone", c.alone.bubble);
    line("planned_bytes", double(c.planned_bytes), "allocated", double(c.allocated_bytes));
}

constexpr const char* columns = "%2s %-62s %6s %6s %6s  %6s %6s %6s %6s  %7s %7s %5s %7s %5s  %10s %10s %10s %7s\n";

void print_row(size_t number, const std::string& name, const Comparison& c) {
    const auto ratio = [](double value) { return format("%.3f", value); };
    const auto percent = [](double part) { return format("%.1f %%", 100 * part); };
    const auto points = [&](StepTime Comparison::*side) { return format("%+.1f", c.points(side)); };
    std::printf(columns, std::to_string(number).c_str(), name.c_str(), format("%.0f", c.planned.ms).c_str(),
                format("%.0f", c.measured.ms).c_str(), ratio(c.ratio(&Comparison::measured)).c_str(),
                format("%.0f", c.alone.ms).c_str(), ratio(c.ratio(&Comparison::alone)).c_str(), ratio(c.speed).c_str(),
                ratio(c.steady()).c_str(), percent(c.planned.bubble).c_str(), percent(c.measured.bubble).c_str(),
                points(&Comparison::measured).c_str(), percent(c.alone.bubble).c_str(),
                points(&Comparison::alone).c_str(), bytes_text(c.planned_bytes).c_str(),
                c.same_memory ? "the same" : bytes_text(c.allocated_bytes).c_str(), bytes_text(c.grown_bytes).c_str(),
                percent(c.pushed_aside).c_str());
}

using Results = std::vector<std::pair<std::string, Comparison>>;

// How many errors are within the goal, and the worst of them.
template <class Error>
void print_summary(const char* what, const Results& results, double goal, const Error& error) {
    long within = 0;
    std::pair<double, std::string> worst;
    for (const auto& [name, comparison] : results) {
        within += std::abs(error(comparison)) <= goal;
        if (std::abs(error(comparison)) >= std::abs(worst.first)) worst = {error(comparison), name};
    }
    std::printf("%-30s within %2.0f: %2ld of %zu, worst %+.1f (%s)\n", what, goal, within, results.size(), worst.first,
                worst.second.c_str());
}

int main(int argc, char** argv) {
    bool json = false, show_ops = false;
    int steps = 5, only = 0;
    std::string description;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag == "--json") json = true;
        else if (flag == "--ops") show_ops = true;
        else if (flag == "--steps" && i + 1 < argc) steps = std::max(1, std::atoi(argv[++i]));
        else if (flag == "--case" && i + 1 < argc) only = std::atoi(argv[++i]);
        else if (flag == "--cluster" && i + 1 < argc) description = argv[++i];
        else return std::fprintf(stderr, "calibration: %s? See the head of the source.\n", argv[i]), EXIT_CONFIG;
    }
    const double before_calibration = reference_rate();
    const Cluster cluster = description.empty() ? measure_cluster(ranks, 1) : read_cluster(description);
    double before = reference_rate();
    const double reference = (before_calibration + before) / 2;
    if (!json) {
        std::printf("%s\nreference after the calibration over before: %.3f\n\n", cluster_toml(cluster, "").c_str(),
                    before / before_calibration);
        std::printf(columns, "", "case; times in ms", "plan", "was", "ratio", "alone", "ratio", "speed", "steady",
                    "bubble", "was", "diff", "alone", "diff", "planned", "allocated", "grown", "aside");
    }
    Results results;
    const std::vector<CalibrationCase> cases = calibration_cases();
    for (size_t n = 0; n < cases.size(); ++n) {
        if (only && only != int(n) + 1) continue;
        results.emplace_back(cases[n].name(), compare(cases[n], cluster, steps, show_ops));
        auto& [name, result] = results.back();
        const double after = reference_rate();
        result.speed = (std::exchange(before, after) + after) / 2 / reference;
        if (json) print_json(name, result);
        else print_row(n + 1, name, result);
        std::fflush(stdout);
    }
    if (json || results.empty()) return 0;
    const auto percent = [](double ratio) { return 100 * (ratio - 1); };
    for (const auto& [what, side] : {std::pair("measured", &Comparison::measured), {"alone", &Comparison::alone}}) {
        print_summary(format("times %s, %%", what).c_str(), results, 10,
                      [&](const Comparison& c) { return percent(c.ratio(side)); });
        print_summary(format("bubbles %s, points", what).c_str(), results, 3,
                      [&](const Comparison& c) { return c.points(side); });
    }
    print_summary("times alone, steady, %", results, 10, [&](const Comparison& c) { return percent(c.steady()); });
    print_summary("memory other than planned", results, 0, [](const Comparison& c) { return !c.same_memory; });
    return 0;
}
