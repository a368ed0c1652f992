// Whether a run fits into memory: the bytes of its ranks by kind, and the refusal of what does not fit, before anything
// is allocated.
#pragma once

#include "llmc/io/log.h"
#include "llmc/io/relations.h"
#include "llmc/parallel/options.h"
#include "llmc/parallel/rank_plans.h"

// The plans of all ranks.
inline std::vector<MemoryPlan> memory_plans(const RankOptions& options) {
    std::vector<int> ranks(size_t(options.layout.ranks));
    std::iota(ranks.begin(), ranks.end(), 0);
    return plan_memory(options, ranks);
}

// Bytes on the device of a machine that has to hold the most: thread ranks, or as many of the largest processes as
// share it.
inline int64_t device_bytes(const std::vector<MemoryPlan>& plans, const Launch& launch) {
    const int local = launch.ranks > 1 ? launch.local_ranks : int(plans.size()), devices = devices_of(local);
    std::vector<int64_t> sums(static_cast<size_t>(devices));
    int64_t largest = 0;
    for (size_t rank = 0; rank < plans.size(); ++rank) {
        sums[rank % size_t(devices)] += plans[rank].total();
        largest = std::max(largest, plans[rank].total());
    }
    return launch.ranks > 1 ? largest * ceil_div(local, devices) : *std::max_element(sums.begin(), sums.end());
}

// Refuses what does not fit, `besides` bytes of another kind included. advice(bytes available) says what would fit.
template <class Advice>
void check_memory(const Config& c, const std::vector<MemoryPlan>& plans, int64_t besides, Advice advice) {
    choose_device(c.launch.local_rank);
    const int64_t available = c.compute.memory ? c.compute.memory : available_on_device();
    const int64_t wanted = device_bytes(plans, c.launch) + besides;
    if (wanted > available)
        throw Failure(EXIT_MEMORY, "the plan takes " + bytes_text(wanted) + ", " + bytes_text(available) +
                                       " are available; " + advice(available));
}

// The layout nearest to that of a training run which fits into so many bytes: the first of ever smaller ones.
inline std::string fitting_layout(const Config& c, const std::vector<MemoryPlan>& plans, int64_t available) {
    std::vector<MemoryPlan> fixed_parts;
    for (const MemoryPlan& p : plans) fixed_parts.push_back({p.weights, p.master, p.gradients, p.moments});
    const int64_t fixed = device_bytes(fixed_parts, c.launch);
    if (fixed >= available)
        return "weights, gradients and moments alone take " + bytes_text(fixed) + ": choose a smaller model" +
               (plans[0].master ? " or --no-master" : "");
    const int64_t least_chunk = std::min<int64_t>(128, c.data.chunk_tokens);
    for (int64_t chunk = c.data.chunk_tokens; chunk >= least_chunk; chunk /= 2)
        for (const Recompute mode : recompute_modes) {
            const char* const recompute = recompute_names[int(mode)];
            Config smaller = c;
            smaller.compute.recompute = recompute;
            smaller.data.chunk_tokens = chunk;
            smaller.compute.head_chunk = std::min<int64_t>(chunk, 128);
            if (config_violations(smaller).empty() &&
                device_bytes(memory_plans(rank_options(smaller, model_of(smaller), true)), c.launch) <= available)
                return "--recompute " + std::string(recompute) + " --chunk-tokens " + std::to_string(chunk) +
                       " --head-chunk " + std::to_string(smaller.compute.head_chunk) + " fits";
        }
    return "smaller chunks do not fit, either: choose a smaller model, a smaller batch or fewer --threads";
}

// A row a kind, a column a rank; of more than 8 ranks only the largest.
inline std::vector<TableRow> memory_table(const std::vector<MemoryPlan>& plans) {
    std::vector<TableRow> rows;
    const auto add = [&](const char* name, const auto& bytes_of_kind) {
        std::string text;
        int64_t largest = 0;
        for (const MemoryPlan& plan : plans) {
            const std::string bytes = bytes_text(bytes_of_kind(plan));
            text += (text.empty() ? "" : std::string(12 - std::min<size_t>(11, bytes.size()), ' ')) + bytes;
            largest = std::max(largest, bytes_of_kind(plan));
        }
        rows.push_back({name, plans.size() > 8 ? "at most " + bytes_text(largest) + " a rank" : text});
    };
    add("weights", [](const MemoryPlan& p) { return p.weights; });
    add("master weights", [](const MemoryPlan& p) { return p.master; });
    add("gradients", [](const MemoryPlan& p) { return p.gradients; });
    add("moments", [](const MemoryPlan& p) { return p.moments; });
    add("activations", [](const MemoryPlan& p) { return p.activations; });
    add("workspace", [](const MemoryPlan& p) { return p.workspace + p.scratch; });
    add("total", [](const MemoryPlan& p) { return p.total(); });
    return rows;
}
