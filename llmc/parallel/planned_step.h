// A step as it is planned for all ranks, on this machine or on a cluster: lists, messages, memory, times. `plan` shows
// one, compare_plans.h compares several.
#pragma once

#include "llmc/parallel/rank_plans.h"
#include "llmc/pipeline/costs.h"

// Bytes of a device by kind.
struct DeviceBytes {
    int64_t model = 0;  // weights, master weights, gradients, moments
    int64_t activations = 0, workspace = 0;

    int64_t total() const { return model + activations + workspace; }
};

// The chunks of a step. Seq1F1B cuts each of the `count` ones, a whole sequence, into slices of its own; of a sequence
// that is longer than a chunk, `count` are the even slices of all.
inline std::vector<ChunkShape> chunks_of_step(RankOptions& o, int count) {
    const int64_t N = o.chunk_tokens, T = o.model.context;
    std::vector<ChunkShape> chunks;
    if (o.layout.ranks > 1 && o.layout.schedule == "seq1f1b") {
        constexpr int64_t slices = 8;
        if (N != T)
            throw Failure(EXIT_CONFIG, "seq1f1b cuts whole sequences, one a chunk: take chunks of " +
                                           std::to_string(T) + " tokens, the context, not of " + std::to_string(N));
        o.layout.slices = int(std::min(slices, T));
        chunks = balanced_slices(o.model, count, o.layout.slices);
        o.chunk_tokens = chunks[0].tokens;  // the longest
    } else {
        const int cut = int(ceil_div(T, N));
        std::vector<int> groups(size_t(count / cut), cut);
        if (count % cut) groups.push_back(count % cut);
        chunks = chunk_shapes(groups, N, T);
    }
    o.layout.max_chunks = int(chunks.size());
    return chunks;
}

struct PlannedStep {
    RankOptions options;
    ElementSizes sizes;
    ScheduleInput input;
    std::vector<ChunkShape> chunks;
    OpLists lists;  // proven by lists_of

    // limit(rank): bytes for the activations of a rank, where recompute `automatic` has to keep what fits.
    PlannedStep(std::vector<ChunkShape> shapes, RankOptions o, const ElementSizes& sizes,
                const std::function<int64_t(int rank)>& limit)
        : options(std::move(o)), sizes(sizes), chunks(std::move(shapes)) {
        input = options.schedule_input(int(chunks.size()), true, chunks[0].store >= 0);
        lists = lists_of(options, chunks, true);
        for (size_t r = 0; r < lists.size() && options.recompute == Recompute::automatic; ++r)
            keep_what_fits(lists[r], chunks, options.model, rules(), limit(int(r)), sizes.tensor);
    }
    PlannedStep(RankOptions o, int count, const ElementSizes& sizes, const std::function<int64_t(int rank)>& limit)
        : PlannedStep{chunks_of_step(o, count), o, sizes, limit} {}
    // On this machine.
    PlannedStep(std::vector<ChunkShape> shapes, const RankOptions& o)
        : PlannedStep(std::move(shapes), o, sizes_of<BuildTypes>(), [&](int rank) {
              RankOptions mine = o;
              mine.layout.rank = rank;
              return activation_limit(mine);
          }) {}
    PlannedStep(RankOptions o, int count) : PlannedStep{chunks_of_step(o, count), o} {}

    TensorRules rules() const { return options.tensor_rules(true); }
    Plan plan_of(int rank, int64_t enough = 0) const {
        return make_plan(lists[size_t(rank)], chunks, options.model, rules(), sizes.tensor, enough);
    }
    OpCosts costs(const Cluster& cluster) const { return costs(cluster, chunk_works(options.model, chunks)); }
    OpCosts costs(const Cluster& cluster, const std::vector<ChunkWork>& works) const {
        return {cluster,
                sizes,
                options.model,
                chunks,
                works,
                rules(),
                options.mlp_chunk,
                options.head_chunk,
                options.row_pieces()};
    }
    int64_t message_bytes(const Op& op) const {
        return ::message_bytes(op, rules(), sizes, chunks[size_t(op.chunk)], options.model);
    }
};

inline Timeline simulate_with(const OpCosts& costs, const PlannedStep& step) {
    return simulate(step.lists, step.input, costs,
                    [&](const Op& send, int rank) { return costs.message_ms(send, rank); });
}

inline Timeline simulate_on(const Cluster& cluster, const PlannedStep& step) {
    return simulate_with(step.costs(cluster), step);
}

// The memory of each device of a rank, of a tensor-parallel group of `tp`: everything is divided but for two [N, C]
// that products gather and scatter. Flash attention sums the gradient of its queries in floatS.
inline DeviceBytes bytes_on(const Cluster& cluster, RankOptions o, const ElementSizes& sizes, int rank,
                            int64_t activations) {
    o.layout.rank = rank;
    const int64_t tp = cluster.tp, parameters = flat_size(o.parameters()), rows = o.chunk_tokens * o.model.channels;
    const int64_t master = sizes.x == sizes.s || o.no_master ? 0 : sizes.s;
    const int64_t of_parameter = sizes.x + master + 3 * sizes.s;
    const int64_t inside = sizes.workspace(o.chunk_tokens, o.model, o.mlp_chunk, o.head_chunk) + rows * sizes.s;
    return {parameters * of_parameter / tp, activations / tp, inside / tp + (tp > 1 ? 2 * rows * sizes.x : 0)};
}

// A step of so many chunks as this cluster would run it.
inline PlannedStep planned_on(const Cluster& cluster, const RankOptions& o, int chunks) {
    const ElementSizes sizes = element_sizes(cluster.precision);
    RankOptions cut = o;
    chunks_of_step(cut, chunks);
    return PlannedStep(o, chunks, sizes, [&](int rank) {
        return int64_t(1e9 * cluster.memory * cluster.tp) - bytes_on(cluster, cut, sizes, rank, 0).total() * cluster.tp;
    });
}

// What a step takes besides its ops, in ms: the sums of gradients that several ranks hold, and the optimizer, which
// reads and writes 36 bytes a parameter: gradient (cleared, normed, read), master weight and two moments. With weights
// in bf16 it writes these, too: 38; where there are no others, 32.
inline double update_ms(const Cluster& cluster, const PlannedStep& step) {
    double slowest = 0;
    for (int r = 0; r < step.input.ranks; ++r) {
        RankOptions o = step.options;
        o.layout.rank = r;
        double shared = 0;  // bytes that leave the rank
        for (const SharedParameter& p : o.shared_parameters())
            shared += 2.0 * double(p.size) * 4 * double(p.holders.size() - 1) / double(p.holders.size());
        const double bytes = o.no_master ? 32 : step.sizes.x == step.sizes.s ? 36 : 38;
        const double optimizer = bytes * double(flat_size(o.parameters())) / (1e6 * cluster.memory_bandwidth);
        const LinkSpeed& link = cluster.link(0, step.input.ranks - 1);
        slowest = std::max(slowest, (optimizer + shared / (1e6 * link.bandwidth)) / cluster.tp);
    }
    return slowest;
}
