// `plan`: what a schedule would do, without running it. Lists, memory and messages are those of training; times come
// from --times or from the arithmetic and the machine's measured peak, and messages take none.
#pragma once

#include <cstdlib>

#include "llmc/io/config.h"
#include "llmc/io/log.h"
#include "llmc/kernels/peak.h"
#include "llmc/parallel/rank.h"
#include "llmc/pipeline/costs.h"
#include "llmc/pipeline/print.h"
#include "llmc/pipeline/trace.h"

// A step of all ranks.
struct PlannedStep {
    RankOptions options;
    ScheduleInput input;
    std::vector<ChunkShape> chunks;
    OpLists lists;  // proven by lists_of

    PlannedStep(RankOptions o, int count) : options(std::move(o)) {
        options.layout.max_chunks = count;
        const int slices = int(ceil_div(options.model.context, options.chunk_tokens));  // of each sequence
        std::vector<int> groups(size_t(count / slices), slices);
        if (count % slices) groups.push_back(count % slices);
        chunks = chunk_shapes(groups, options.chunk_tokens, options.model.context);
        input = options.schedule_input(count, true, slices > 1 && count > 1);
        lists = lists_of(options, chunks, true);
    }

    TensorRules rules() const { return options.tensor_rules(true); }
    Plan plan_of(int rank) const { return make_plan(lists[size_t(rank)], chunks, options.model, rules()); }
    int64_t message_bytes(const Op& op) const {
        int64_t bytes = 0;
        for (const Use& use : message_contents(op, rules()))
            bytes += tensor_bytes(use.tensor, chunks[size_t(op.chunk)], options.model, rules());
        return bytes;
    }
};

// Rows of a name and values, the values in columns.
inline std::string columns_text(const std::vector<std::vector<std::string>>& rows) {
    std::vector<size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    std::string text;
    for (const auto& row : rows) {
        for (size_t i = 0; i < row.size(); ++i) {
            const std::string space(widths[i] - row[i].size(), ' ');
            text += "  " + (i == 0 ? row[i] + space : space + row[i]);
        }
        text += "\n";
    }
    return text;
}

// Times and arena of every rank, and what the arena holds at the op where it holds most.
inline std::string step_tables(const PlannedStep& step, const Timeline& timeline, const std::string& times) {
    const auto ms = [](double value) { return format("%.4g", value); };
    std::vector<std::vector<std::string>> rows = {
        {"rank"}, {"busy ms"}, {"idle ms"}, {"weights, gradients, moments"}, {"workspace"}, {"activations"}};
    RankOptions options = step.options;
    std::vector<Plan> plans;
    std::map<Tensor, std::vector<int64_t>> bytes;  // [rank]
    for (int r = 0; r < step.input.ranks; ++r) {
        plans.push_back(step.plan_of(r));
        const double busy = timeline.busy[size_t(r)];
        rows[0].push_back(std::to_string(r));
        rows[1].push_back(ms(busy));
        rows[2].push_back(ms(timeline.makespan - busy));
        options.layout.rank = r;
        const MemoryPlan besides = memory_besides_activations(options);
        rows[3].push_back(bytes_text(besides.weights + besides.master + besides.gradients + besides.moments));
        rows[4].push_back(bytes_text(besides.workspace + besides.scratch));
        rows[5].push_back(bytes_text(plans.back().size.bytes));
        for (const auto& [tensor, size] : plans.back().bytes_at_peak())
            bytes.try_emplace(tensor, step.input.ranks).first->second[size_t(r)] = size;
    }
    for (const auto& [tensor, sizes] : bytes) {
        rows.push_back({std::string("  ") + tensor_name(tensor)});
        for (int64_t size : sizes) rows.back().push_back(bytes_text(size));
    }
    rows.push_back({"  gaps"});
    for (const Plan& plan : plans) rows.back().push_back(bytes_text(plan.size.bytes - plan.size.live_peak));
    return table_text("plan", {{"schedule", step.options.schedule_name()},
                               {"ranks", std::to_string(step.input.ranks)},
                               {"layers", std::to_string(step.input.layers)},
                               {"chunks", std::to_string(step.input.chunks) + " of " +
                                              std::to_string(step.options.chunk_tokens) + " tokens"},
                               {"times", times},
                               {"step", ms(timeline.makespan) + " ms, without communication and the optimizer"},
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
    return printed("activations: ranks %d, layers %lld, channels %lld, chunks %d of %lld tokens;\n", p,
                   (long long)options.model.layers, (long long)options.model.channels, chunks,
                   (long long)options.chunk_tokens) +
           "in bytes, of these weights that were sent, and in elements by token, channel, chunk and layer\n" +
           columns_text(rows) + refused;
}

inline std::string plan_json(const PlannedStep& step, const Timeline& timeline,
                             const std::vector<std::vector<TraceEvent>>& events) {
    std::vector<int64_t> peak_bytes;
    for (int r = 0; r < step.input.ranks; ++r) peak_bytes.push_back(step.plan_of(r).size.bytes);
    nlohmann::json ops = nlohmann::json::array();
    for (const std::vector<TraceEvent>& list : events) {
        ops.push_back(nlohmann::json::array());
        for (const TraceEvent& event : list) ops.back().push_back(event_json(event));
    }
    return json_text({{"schedule", step.input.ranks == 1 ? "accumulate" : step.options.layout.schedule},
                      {"ranks", step.input.ranks},
                      {"layers", step.input.layers},
                      {"chunks", step.input.chunks},
                      {"step_ms", timeline.makespan},
                      {"bubble", timeline.mean_bubble() / timeline.makespan},
                      {"busiest_bubble_ms", timeline.bubble()},
                      {"peak_bytes", peak_bytes},
                      {"ops", std::move(ops)}},
                     -1);
}

// `options` are those that training would have.
inline int plan_command(const Config& c, const RankOptions& options) {
    const int chunks = int(planned_chunks(c));
    if (c.plan.print == "memory") {
        std::fputs(memory_text(options, chunks).c_str(), stdout);
        return 0;
    }
    const PlannedStep step(options, chunks);
    if (c.plan.print == "ops") {
        std::fputs(ops_text(step).c_str(), stdout);
        return 0;
    }

    Timeline timeline;
    std::string times = "forward " + c.plan.times + " ms for pre, attention, post";
    const auto free = [](const Op&, int) { return 0.0; };
    if (const std::vector<double> given = forward_times(c.plan.times); !given.empty()) {
        const OpTimes op_times{{given[0], given[1], given[2]}, step.rules()};
        timeline = simulate(step.lists, step.input, op_times, free);
    } else {
        const double gflops = measure_matrix_peak(c.threads());
        const OpCosts costs(cluster_of_rate(gflops), sizes_of<BuildTypes>(), options.model, step.chunks, step.rules());
        timeline = simulate(step.lists, step.input, costs, free);
        times = format("from the arithmetic, at %.0f GFLOP/s", gflops) + " a rank (the measured peak)";
    }
    const Picture picture{printed("%s, ranks %d, layers %d, chunks %d", step.options.schedule_name().c_str(),
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
    if (c.json) std::printf("%s\n", plan_json(step, timeline, picture.ranks).c_str());
    else if (c.plan.draw.empty()) std::fputs(step_tables(step, timeline, times).c_str(), stdout);
    if (c.data.packing == "documents" && step.input.ranks > 1 && !c.plan.chunks && !c.json && c.plan.draw.empty())
        std::printf("Packed documents may take up to %d chunks, and training plans its memory for those.\n",
                    options.layout.max_chunks);
    return 0;
}
