// `rehearse`: a plan, run for real on this machine with timed sleeps in place of kernels: the schedule loop, the
// transport, the waits and the order of messages are those of training. What it measures stands beside what `plan`
// simulates.
#pragma once

#include "llmc/commands/plan.h"
#include "llmc/parallel/rehearsal.h"
#include "llmc/parallel/team.h"

// The events of the plan's ops, each once and in the order of its list, with the bytes that the messages stand for.
inline std::vector<TraceEvent> events_of_list(const std::vector<Op>& list, const std::vector<TraceEvent>& events,
                                              const std::function<int64_t(const Op&)>& message_bytes) {
    const auto name = [](const Op& op) {
        return std::tuple(op.kind, op.part, op.pass, op.layer, op.chunk, op.piece, op.peer, op.batch);
    };
    std::map<decltype(name(list[0])), const TraceEvent*> found;
    for (const TraceEvent& event : events)
        if (event.kind != EventKind::wait) found[name(event.op)] = &event;
    std::vector<TraceEvent> ordered;
    for (const Op& op : list) {
        ordered.push_back(*found.at(name(op)));
        if (op.kind != Kind::compute) ordered.back().bytes = message_bytes(op);
    }
    return ordered;
}

// What was measured, step by step, and beside it what was simulated.
struct Rehearsal {
    const PlannedStep& step;
    const Timeline& simulated;
    std::vector<std::vector<std::vector<TraceEvent>>> steps;  // [step][rank], times in ms
    size_t median = 0;                                        // the step that took the median time

    Rehearsal(const PlannedStep& step, const Timeline& simulated, std::vector<std::vector<std::vector<TraceEvent>>> all)
        : step(step), simulated(simulated), steps(std::move(all)) {
        std::vector<size_t> order(steps.size());
        std::iota(order.begin(), order.end(), size_t(0));
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ms(a) < ms(b); });
        median = order[(order.size() - 1) / 2];
    }

    double ms(size_t n) const { return step_times(steps[n]).step; }
    double simulated_bubble() const { return simulated.mean_bubble() / simulated.makespan; }
    std::vector<double> all_ms() const {
        std::vector<double> all;
        for (size_t n = 0; n < steps.size(); ++n) all.push_back(ms(n));
        return all;
    }

    // Of the median step.
    std::string json() const {
        std::vector<std::vector<TraceEvent>> ranks;
        for (size_t r = 0; r < step.lists.size(); ++r)
            ranks.push_back(
                events_of_list(step.lists[r], steps[median][r], [&](const Op& op) { return step.message_bytes(op); }));
        return step_json(step, ranks,
                         {{"simulated_step_ms", simulated.makespan},
                          {"simulated_bubble", simulated_bubble()},
                          {"all_step_ms", all_ms()}});
    }
    std::vector<TableRow> rows() const {
        const StepTimes measured = step_times(steps[median]);
        const std::vector<double> all = all_ms();
        const auto [least, most] = std::minmax_element(all.begin(), all.end());
        return {
            {"step", format("%.4g ms measured, ", measured.step) + format("%.4g ms simulated: ", simulated.makespan) +
                         format("%+.2f %%", 100 * (measured.step / simulated.makespan - 1))},
            {"steps", std::to_string(all.size()) + format(", from %.4g", *least) +
                          format(" to %.4g ms; shown is that of the median", *most)},
            {"bubble", format("%.2f %% of all ranks' time measured, ", 100 * measured.bubble) +
                           format("%.2f %% simulated", 100 * simulated_bubble())}};
    }
};

// How long ops take that take any time.
template <class OpMs>
std::string durations_text(const OpLists& lists, const OpMs& op_ms) {
    std::vector<double> all;
    for (const std::vector<Op>& list : lists)
        for (const Op& op : list)
            if (const double ms = op.kind == Kind::compute ? op_ms(op) : 0; ms > 0) all.push_back(ms);
    const auto [shortest, longest] = std::minmax_element(all.begin(), all.end());
    const double mean = std::accumulate(all.begin(), all.end(), 0.0) / double(all.size());
    return format("%.4g", *shortest) + format(" to %.4g ms", *longest) + format(", on average %.4g", mean) +
           (mean < 1 ? "; with so short ones the machine's own delays tell, a larger --time-scale helps" : "");
}

// The events of some steps, [step][rank], in ms: all ranks are run, rank 0 has what they did. Times in ms, as they take
// here; `longest` is that of a step.
inline std::vector<std::vector<std::vector<TraceEvent>>> rehearse_on(
    Team& team, const PlannedStep& step, const std::function<double(const Op&)>& op_ms,
    const std::function<double(const Op& send, int rank)>& message_ms, double longest, double hang_timeout,
    int64_t repeats) {
    const int p = step.input.ranks;
    const auto ms = [&](Op op, int rank) {  // of op of a rank's list; a receive takes as long as its send
        if (op.kind == Kind::compute) return op_ms(op);
        if (op.kind == Kind::receive) std::swap(op.peer, rank);
        return message_ms(op, rank);
    };
    std::vector<std::vector<std::vector<TraceEvent>>> steps;
    const double patience = std::max(10.0, 2e-3 * longest);  // s; no op and no message takes as long
    EmulatedLinks links(p);
    team.run(p, std::max(hang_timeout, patience), [&](Transport& transport) {
        transport.progress.busy_with("start-up");
        transport.progress.least_limit = patience;
        const Plan plan = step.plan_of(transport.rank);
        std::vector<double> seconds;
        for (const Op& op : plan.ops) seconds.push_back(1e-3 * ms(op, transport.rank));
        RehearsingRank rank(transport, plan, std::move(seconds), team.launch.ranks > 1 ? nullptr : &links);
        auto measured = rehearse(rank, transport, repeats);
        if (transport.rank == 0) steps = std::move(measured);
        return 0;
    });
    return steps;
}

// `options` are those that training would have.
inline int rehearse_command(const Config& c, RankOptions options, Team& team) {
    const std::optional<Cluster> cluster = planned_cluster(c, options);
    const PlannedStep step = planned_step(c, options, cluster);
    const int p = step.input.ranks;
    const PlannedTimes times = planned_times(c, step, cluster, [&] {  // one process measures for all
        double gflops = team.speaks() ? measure_matrix_peak(c.threads()) : 0;
        team.processes().sum({&gflops, 1});
        return gflops;
    });
    const double scale = c.rehearse.time_scale;
    const auto op_ms = [&](const Op& op) { return scale * times.op_ms(op); };
    const auto message_ms = [&](const Op& send, int rank) { return scale * times.message_ms(send, rank); };
    const Timeline timeline = simulate(step.lists, step.input, op_ms, message_ms);

    std::vector<std::vector<std::vector<TraceEvent>>> steps = rehearse_on(
        team, step, op_ms, message_ms, timeline.makespan, double(c.parallel.hang_timeout), c.rehearse.repeats);

    team.processes().together([&] {
        if (!team.speaks()) return;
        const Rehearsal rehearsal(step, timeline, std::move(steps));
        const std::string name = format("%s, ranks %d, layers %d, chunks %d", step.options.schedule_name().c_str(), p,
                                        step.input.layers, step.input.chunks);
        if (!c.run.trace.empty()) write_trace(c.run.trace, {"rehearsal of " + name, rehearsal.steps[rehearsal.median]});
        if (c.json) {
            std::printf("%s\n", rehearsal.json().c_str());
            return;
        }
        std::vector<TableRow> rows = {
            {"ranks", std::to_string(p) + (team.launch.ranks > 1 ? ", processes under " + team.launch.source
                                                                 : ", threads of this process")},
            {"times", times.text + (scale == 1 ? "" : ", times " + number_text(scale))},
            {"ops", durations_text(step.lists, op_ms)}};
        for (TableRow& row : rehearsal.rows()) rows.push_back(std::move(row));
        print_table("rehearsal of " + name, rows);
    });
    return 0;
}
