// Whether a run fits into memory: the bytes of its ranks by kind, and the refusal of what does not fit, before anything
// is allocated.
#pragma once

#include "llmc/io/log.h"
#include "llmc/parallel/options.h"

// The plans of all ranks.
inline std::vector<MemoryPlan> memory_plans(const RankOptions& options) {
    std::vector<int> ranks(size_t(options.layout.ranks));
    std::iota(ranks.begin(), ranks.end(), 0);
    return plan_memory(options, ranks);
}

// Bytes on one machine: all thread ranks, or as many of the largest processes as it has.
inline int64_t host_bytes(const std::vector<MemoryPlan>& plans, const Launch& launch) {
    int64_t sum = 0, largest = 0;
    for (const MemoryPlan& plan : plans) {
        sum += plan.total();
        largest = std::max(largest, plan.total());
    }
    return launch.ranks > 1 ? largest * launch.local_ranks : sum;
}

// Refuses what does not fit, `besides` bytes of another kind included. advice(bytes available) says what would fit.
template <class Advice>
void check_memory(const Config& c, const std::vector<MemoryPlan>& plans, int64_t besides, Advice advice) {
    const int64_t available = c.compute.memory ? c.compute.memory : available_on_device();
    const int64_t wanted = host_bytes(plans, c.launch) + besides;
    if (wanted > available)
        throw Failure(EXIT_MEMORY, "the plan takes " + bytes_text(wanted) + ", " + bytes_text(available) +
                                       " are available; " + advice(available));
}

// The layout nearest to that of a training run which fits into so many bytes: the first of ever smaller ones.
inline std::string fitting_layout(const Config& c, const std::vector<MemoryPlan>& plans, int64_t available) {
    std::vector<MemoryPlan> fixed_parts;
    for (const MemoryPlan& p : plans) fixed_parts.push_back({p.weights, p.master, p.gradients, p.moments});
    const int64_t fixed = host_bytes(fixed_parts, c.launch);
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
                host_bytes(memory_plans(rank_options(smaller, model_of(smaller), true)), c.launch) <= available)
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
