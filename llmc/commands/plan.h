// `plan`: what a schedule would do, without running it. Lists, memory and messages are those of training. Times come
// from a cluster's description, from --times, or from the arithmetic and the machine's measured peak; without a cluster
// messages take none. With a cluster and no --schedule, all schedules are compared.
#pragma once

#include <cstdlib>

#include "llmc/commands/compare.h"
#include "llmc/kernels/peak.h"
#include "llmc/pipeline/print.h"
#include "llmc/pipeline/trace.h"

// Times and arena of every rank, and what the arena holds at the op where it holds most.
inline std::string step_tables(const PlannedStep& step, const Timeline& timeline, const std::string& times,
                               const Cluster* cluster) {
    const auto ms = [](double value) { return format("%.4g", value); };
    std::vector<std::vector<std::string>> rows = {
        {"rank"}, {"busy ms"}, {"idle ms"}, {"weights, gradients, moments"}, {"workspace"}, {"activations"}};
    RankOptions options = step.options;
    const int64_t tp = cluster ? cluster->tp : 1;
    std::vector<Plan> plans;
    std::map<Tensor, std::vector<int64_t>> bytes;  // [rank]
    for (int r = 0; r < step.input.ranks; ++r) {
        plans.push_back(step.plan_of(r));
        const double busy = timeline.busy[size_t(r)];
        rows[0].push_back(std::to_string(r));
        rows[1].push_back(ms(busy));
        rows[2].push_back(ms(timeline.makespan - busy));
        options.layout.rank = r;
        DeviceBytes held;
        if (cluster) {
            held = bytes_on(*cluster, options, step.sizes, r, plans.back().size.bytes);
        } else {
            const MemoryPlan besides = memory_besides_activations(options);
            held = {besides.weights + besides.master + besides.gradients + besides.moments, plans.back().size.bytes,
                    besides.workspace + besides.scratch};
        }
        rows[3].push_back(bytes_text(held.model));
        rows[4].push_back(bytes_text(held.workspace));
        rows[5].push_back(bytes_text(held.activations));
        for (const auto& [tensor, size] : plans.back().bytes_at_peak())
            bytes.try_emplace(tensor, step.input.ranks).first->second[size_t(r)] = size / tp;
    }
    for (const auto& [tensor, sizes] : bytes) {
        rows.push_back({std::string("  ") + tensor_name(tensor)});
        for (int64_t size : sizes) rows.back().push_back(bytes_text(size));
    }
    rows.push_back({"  gaps"});
    for (const Plan& plan : plans) rows.back().push_back(bytes_text((plan.size.bytes - plan.size.live_peak) / tp));
    return table_text("plan",
                      {{"schedule", step.options.schedule_name()},
                       {"ranks", std::to_string(step.input.ranks)},
                       {"layers", std::to_string(step.input.layers)},
                       {"chunks", std::to_string(step.input.chunks) + " of " +
                                      std::to_string(step.options.chunk_tokens) + " tokens"},
                       {"times", times},
                       {"step", ms(timeline.makespan) + (cluster ? " ms, without the optimizer"
                                                                 : " ms, without communication and the optimizer")},
                       {"bubble", ms(timeline.bubble()) + " ms of the busiest rank, " +
                                      format("%.1f %%", 100 * timeline.mean_bubble() / timeline.makespan) +
                                      " of all ranks' time"}}) +
           "ranks\n" + columns_text(rows);
}

inline std::string ops_text(const PlannedStep& step) {
    std::string text;
    for (size_t r = 0; r < step.lists.size(); ++r)
        text += "rank " + std::to_string(r) + "  " + print_list(step.lists[r], step.input) + "\n";
    return text;
}

// The arenas of all schedules and modes, in bytes and in elements by token, channel, chunk and layer of the L/p that a
// rank has.
inline std::string memory_text(RankOptions options, int chunks) {
    const int p = options.layout.ranks, wanted_stages = options.layout.virtual_stages;
    const double unit = double(sizeof(floatX)) * double(options.chunk_tokens) * double(options.model.channels) *
                        chunks * double(options.model.layers) / p;
    std::vector<std::vector<std::string>> rows = {
        {"schedule", "rank 0", "last rank", "largest", "shipped weights", "rank 0", "last rank", "largest"}};
    std::string refused;
    std::vector<Schedule> all = schedules();
    if (p == 1) all.resize(1);  // a rank by itself accumulates
    for (const Schedule& schedule : all)
        for (const Recompute recompute : recompute_modes) {
            options.layout.schedule = schedule.name;
            options.layout.virtual_stages = schedule.name == "interleaved" ? wanted_stages : 0;
            options.recompute = recompute;
            std::vector<int64_t> bytes;
            int64_t shipped = 0;  // of the rank where that is most
            std::string name;
            try {
                const PlannedStep step(options, chunks);
                name = step.options.schedule_name() + ", recompute " + recompute_names[int(recompute)];
                for (int r = 0; r < p; ++r) {
                    const Plan plan = step.plan_of(r);
                    bytes.push_back(plan.size.bytes);
                    std::map<Tensor, int64_t> peak = plan.bytes_at_peak();
                    shipped = std::max(shipped, peak[Tensor::qkv_weights] + peak[Tensor::d_qkv_weights]);
                }
            } catch (const Failure& failure) {
                if (recompute == Recompute::none) refused += std::string("  ") + failure.what() + "\n";
                continue;
            }
            rows.push_back({name});
            const int64_t shown[] = {bytes.front(), bytes.back(), *std::max_element(bytes.begin(), bytes.end())};
            for (int64_t size : shown) rows.back().push_back(bytes_text(size));
            rows.back().push_back(bytes_text(shipped));
            for (int64_t size : shown) rows.back().push_back(format("%.2f", double(size) / unit));
        }
    return format("activations: ranks %d, layers %lld, channels %lld, chunks %d of %lld tokens;\n", p,
                  (long long)options.model.layers, (long long)options.model.channels, chunks,
                  (long long)options.chunk_tokens) +
           "in bytes, of these weights that were sent, and in elements by token, channel, chunk and layer\n" +
           columns_text(rows) + refused;
}

// A step as JSON, planned or rehearsed: its events [rank], in the order of the lists, and more about it.
inline std::string step_json(const PlannedStep& step, const std::vector<std::vector<TraceEvent>>& events,
                             nlohmann::json more = nlohmann::json::object()) {
    std::vector<int64_t> peak_bytes;
    nlohmann::json ops = nlohmann::json::array();
    for (int r = 0; r < step.input.ranks; ++r) {
        peak_bytes.push_back(step.plan_of(r).size.bytes);
        ops.push_back(nlohmann::json::array());
        for (const TraceEvent& event : events[size_t(r)]) ops.back().push_back(event_json(event));
    }
    const StepTimes times = step_times(events);
    more.update({{"schedule", step.input.ranks == 1 ? "accumulate" : step.options.layout.schedule},
                 {"ranks", step.input.ranks},
                 {"layers", step.input.layers},
                 {"chunks", step.input.chunks},
                 {"step_ms", times.step},
                 {"bubble", times.bubble},
                 {"busiest_bubble_ms", times.step - times.busiest},
                 {"peak_bytes", peak_bytes},
                 {"ops", std::move(ops)}});
    return json_text(more, -1);
}

// The cluster to plan for, if one is named; all of its ranks, unless --ranks is given.
inline std::optional<Cluster> planned_cluster(const Config& c, RankOptions& options) {
    if (c.plan.cluster.empty()) return std::nullopt;
    const Cluster cluster = read_cluster(c.plan.cluster);
    if (!c.is_given("ranks") && c.launch.ranks == 1) options.layout.ranks = cluster.ranks();
    if (options.layout.ranks > cluster.ranks())
        throw Failure(EXIT_CONFIG, "--ranks " + std::to_string(options.layout.ranks) + ": the cluster " + cluster.name +
                                       " has " + std::to_string(cluster.devices) + " devices in groups of " +
                                       std::to_string(cluster.tp) + "; use at most --ranks " +
                                       std::to_string(cluster.ranks()));
    if (options.no_master && cluster.precision == "fp32")
        throw Failure(EXIT_CONFIG, "--no-master: the cluster " + cluster.name +
                                       " trains in fp32, whose weights are their own master; leave it out");
    return cluster;
}

inline PlannedStep planned_step(const Config& c, const RankOptions& options, const std::optional<Cluster>& cluster) {
    const int chunks = int(planned_chunks(c));
    return cluster ? planned_on(*cluster, options, chunks) : PlannedStep(options, chunks);
}

// How long the ops and messages of a step take.
struct PlannedTimes {
    std::function<double(const Op&)> op_ms;
    std::function<double(const Op& send, int rank)> message_ms;
    std::string text;  // where they come from
};

// measure_gflops(): the peak of a rank on this machine, where nothing else tells how fast it is.
template <class MeasureGflops>
PlannedTimes planned_times(const Config& c, const PlannedStep& step, const std::optional<Cluster>& cluster,
                           const MeasureGflops& measure_gflops) {
    if (const std::vector<double> given = forward_times(c.plan.times); !given.empty())
        return {OpTimes{{given[0], given[1], given[2]}, step.rules()}, [](const Op&, int) { return 0.0; },
                "forward " + c.plan.times + " ms for pre, attention, post"};
    const double gflops = cluster ? 0 : measure_gflops();
    const auto costs = std::make_shared<OpCosts>(step.costs(cluster ? *cluster : cluster_of_rate(gflops)));
    return {[costs](const Op& op) { return (*costs)(op); },
            [costs](const Op& send, int rank) { return costs->message_ms(send, rank); },
            cluster ? "on " + cluster_text(*cluster, step.input.ranks)
                    : format("from the arithmetic, at %.0f GFLOP/s", gflops) + " a rank (the measured peak)"};
}

// `options` are those that training would have.
inline int plan_command(const Config& c, RankOptions options) {
    const int chunks = int(planned_chunks(c));
    const std::optional<Cluster> cluster = planned_cluster(c, options);
    if (c.plan.print == "memory") {
        std::fputs(memory_text(options, chunks).c_str(), stdout);
        return 0;
    }
    std::optional<Comparison> comparison;
    if (cluster && (!c.is_given("schedule") || c.parallel.schedule == "auto")) {
        const OpenChoices open{
            true,
            !c.typed.count("recompute"),
            !c.typed.count("folds"),
            !c.typed.count("virtual-stages"),
            !c.typed.count("qkv-move") && !c.typed.count("norm-move") && !c.typed.count("spread-head"),
            true,
            !c.typed.count("row-pieces")};
        comparison.emplace(*cluster, options, chunks, open, c.plan.print == "all");
        if (c.plan.print != "ops" && c.plan.draw.empty()) {
            const auto text = c.json ? comparison_json : comparison_text;
            std::printf(c.json ? "%s\n" : "%s", text(*comparison, options, chunks).c_str());
            return 0;
        }
        if (!comparison->plans[0].step) throw Failure(EXIT_CONFIG, comparison->plans[0].refusal);
    }
    const PlannedStep step = comparison ? *std::move(comparison->plans[0].step) : planned_step(c, options, cluster);
    if (c.plan.print == "ops") {
        std::fputs(ops_text(step).c_str(), stdout);
        return 0;
    }

    const PlannedTimes times = planned_times(c, step, cluster, [&] { return measure_matrix_peak(c.threads()); });
    const Timeline timeline = simulate(step.lists, step.input, times.op_ms, times.message_ms);
    const Picture picture{format("%s, ranks %d, layers %d, chunks %d", step.options.schedule_name().c_str(),
                                 step.input.ranks, step.input.layers, chunks),
                          planned_events(step.lists, timeline, [&](const Op& op) { return step.message_bytes(op); })};
    if (c.plan.draw == "-") {
        winsize size{};
        const bool terminal = ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 40;
        const bool color = std::getenv("FORCE_COLOR") || (terminal && !std::getenv("NO_COLOR"));
        std::fputs(terminal_picture(picture, color, terminal ? size.ws_col : 100).c_str(), stdout);
    } else if (!c.plan.draw.empty()) {
        write_file(c.plan.draw, svg_picture(picture));
    }
    if (c.json) std::printf("%s\n", step_json(step, picture.ranks).c_str());
    else if (c.plan.draw.empty())
        std::fputs(step_tables(step, timeline, times.text, cluster ? &*cluster : nullptr).c_str(), stdout);
    if (c.data.packing == "documents" && step.input.ranks > 1 && !c.plan.chunks && !c.json && c.plan.draw.empty())
        std::printf("Packed documents may take up to %d chunks, and training plans its memory for those.\n",
                    options.layout.max_chunks);
    return 0;
}
