// What a training run says of itself: the table before its first step, how its memory grows, its trace. Called by
// train_gpt.cu.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llmc/data/loader.h"
#include "llmc/io/flags.h"
#include "llmc/io/log.h"
#include "llmc/parallel/rank.h"
#include "llmc/pipeline/trace.h"

inline std::string layout_text(const RankOptions& o) {
    return std::to_string(o.layout.ranks) + " ranks, schedule " + o.schedule_name();
}

// What this run is, before its first step.
inline void print_start(const Config& c, const Rank& rank, const Loader& loader,
                        const std::optional<Loader>& val_loader, double peak_gflops, const std::string& weights_from) {
    const GptConfig& g = rank.options.model;
    const auto tokens_text = [](const Loader& data) {
        return std::to_string(data.stream_tokens()) + " tokens, " + std::to_string(data.samples()) +
               " samples an epoch";
    };
    std::vector<TableRow> rows = {
        {"device", device_text(std::to_string(c.threads()) + " threads" + (c.parallel.ranks > 1 ? " a rank" : "")) +
                       ", " PRECISION_NAME + format(", measured matrix peak %.0f GFLOP/s", peak_gflops)},
        {"model", c.model.name + ": " + std::to_string(g.layers) + " layers, " + std::to_string(g.channels) +
                      " channels, " + std::to_string(g.heads) + " heads, context " + std::to_string(g.context) +
                      ", vocabulary " + std::to_string(g.vocab) + (g.tied ? ", tied head, " : ", untied head, ") +
                      std::to_string(parameter_count(g)) + " parameters"},
        {"weights",
         "from " + weights_from + (rank.master ? "" : ", no master weights: the optimizer rounds stochastically")},
        {"data", c.data.train + ": " + tokens_text(loader) + ", " + c.data.packing},
        {"validation", val_loader ? c.data.val + ": " + tokens_text(*val_loader) : "off: no --val-data"},
        {"step", std::to_string(c.data.batch_tokens) + " tokens in chunks of at most " +
                     std::to_string(c.data.chunk_tokens) + ", recompute " + c.compute.recompute}};
#ifdef USE_CUDA
    const std::string why_not = why_not_cudnn(rank.options);
    rows.insert(rows.begin() + 1, {"attention", why_not.empty() ? "cuDNN" : "our own kernels: " + why_not});
#endif
    const std::string kind = c.launch.ranks > 1 ? "processes under " + c.launch.source : "threads of this process";
    rows.insert(rows.begin() + 1, {"pipeline", c.parallel.ranks > 1 ? layout_text(rank.options) + ", " + kind
                                                                    : "off: --ranks 1, whatever --schedule says"});
    if (!c.plan.choice.empty()) rows.insert(rows.begin() + 2, {"schedule", c.plan.choice});
    print_table("run " + c.run.dir, rows);
}

// How the planned memory compares with what the process has taken since the ranks began, when the device had
// `used_before` bytes in use: in all for thread ranks, of each rank where they are processes.
inline std::string memory_note(const Rank& rank, int64_t used_before, bool processes) {
    const double planned = double(rank.memory.total()) / (1 << 20);
    const double grown = double(used_on_device() - used_before) / (1 << 20);
    if (processes) {
        std::string text;
        for (const std::string& each :
             rank.transport.all_gather(format("planned %.1f MiB, grown %.1f MiB", planned, grown)))
            text += (text.empty() ? "" : "; ") + each;
        return "resident memory of each rank: " + text;
    }
    double total = planned;
    rank.transport.sum({&total, 1});
    return format("resident memory: planned %.1f MiB, grown %.1f MiB", total, grown);
}

// The events of all ranks, written by rank 0; whoever calls it stops recording.
inline void write_trace(Rank& rank, const std::string& path) {
    const std::string events = pack_events(rank.trace->events());
    rank.trace.reset();
    std::vector<std::vector<TraceEvent>> ranks;
    for (const std::string& text : rank.transport.all_gather(events)) ranks.push_back(unpack_events(text));
    rank.transport.together([&] {
        if (rank.index == 0) write_trace(path, {"trace of " + layout_text(rank.options), std::move(ranks)});
    });
}
