// From a schedule to a plan: every tensor of every op gets its place in the arena, and the op list is proven to compute
// the model. Nothing is allocated and nothing is looked up by name once a step runs.
//
// Tensors are planned for chunks of full size, so the plan depends only on which chunks belong together: steps with the
// same pattern share one plan, and the arena planned for the longest sequence holds every other step.
#pragma once

#include <map>
#include <set>
#include <stdexcept>
#include <tuple>

#include "llmc/model/activations.h"
#include "llmc/pipeline/arena.h"
#include "llmc/pipeline/op.h"
#include "llmc/pipeline/schedules/accumulate.h"

struct PlacedUse {
    Tensor tensor;
    int layer;
    int64_t offset;  // bytes from the start of the activations
};

struct Plan {
    std::vector<Op> ops;
    std::vector<ChunkShape> chunks;
    bool training;
    std::vector<std::vector<PlacedUse>> memory;  // [op][use]
    ArenaSize size;
};

inline int64_t tensor_bytes(Tensor tensor, const ChunkShape& shape, const GptConfig& g) {
    const int64_t N = shape.tokens;
    switch (tensor) {
        case Tensor::residual:
        case Tensor::d_residual:
            return bytes_of<ResidualTensor>(N, g);
        case Tensor::pre:
            return bytes_of<PreActivations>(N, g);
        case Tensor::attention:
            return bytes_of<AttentionActivations>(N, g);
        case Tensor::post:
            return bytes_of<PostActivations>(N, g);
        case Tensor::d_attention:
            return bytes_of<AttentionGradient>(N, g);
        case Tensor::d_qkv:
            return bytes_of<QkvGradient>(N, g);
        case Tensor::store:
            return bytes_of<StoreTensor>(shape.store_tokens, g);
        case Tensor::d_store:
            return bytes_of<StoreGradient>(shape.store_tokens, g);
    }
    throw std::logic_error("tensor of unknown kind");
}

// Each op of the model exactly once for every chunk: embed, three parts a layer and the head, forward and, in training,
// backward. The head's forward and backward are one op, its backward in training.
inline void check_complete(const std::vector<Op>& ops, int layers, int chunks, bool training) {
    std::set<std::tuple<Part, Pass, int, int>> seen;
    for (const Op& op : ops)
        if (!seen.insert({op.part, op.pass, op.layer, op.chunk}).second)
            throw std::logic_error("the schedule lists twice: " + op_name(op));
    std::vector<Op> wanted;
    for (int c = 0; c < chunks; ++c) {
        append_forward(wanted, layers, c, !training);
        if (training) append_backward(wanted, layers, c);
    }
    for (const Op& op : wanted)
        if (!seen.count({op.part, op.pass, op.layer, op.chunk}))
            throw std::logic_error("the schedule lacks: " + op_name(op));
    if (seen.size() != wanted.size()) throw std::logic_error("the schedule lists ops that the model does not have");
}

// Throws std::logic_error when the schedule is wrong: an op missing or double, or one that reads what no op before it
// has made.
inline Plan make_plan(std::vector<Op> ops, std::vector<ChunkShape> chunks, const GptConfig& g, Recompute recompute,
                      bool training) {
    check_complete(ops, int(g.layers), int(chunks.size()), training);
    Plan plan{std::move(ops), std::move(chunks), training, {}, {}};
    std::vector<Lifetime> lifetimes;
    std::map<std::tuple<Tensor, int, int>, size_t> alive;  // the latest lifetime of each tensor
    std::vector<std::vector<size_t>> used(plan.ops.size());
    for (size_t i = 0; i < plan.ops.size(); ++i) {
        const Op& op = plan.ops[i];
        const ChunkShape& shape = plan.chunks[size_t(op.chunk)];
        plan.memory.emplace_back();
        for (const Use& use : uses(op, shape, recompute, int(g.layers), training)) {
            const std::tuple key{use.tensor, use.layer, use.owner};
            if (use.access == Access::create) {
                alive[key] = lifetimes.size();
                lifetimes.push_back({tensor_bytes(use.tensor, shape, g), int(i), int(i)});
            } else if (!alive.count(key)) {
                throw std::logic_error("the schedule runs before its inputs exist: " + op_name(op));
            }
            lifetimes[alive[key]].last = int(i);
            used[i].push_back(alive[key]);
            plan.memory[i].push_back({use.tensor, use.layer, 0});
        }
    }
    plan.size = assign_offsets(lifetimes, int(plan.ops.size()));
    for (size_t i = 0; i < used.size(); ++i)
        for (size_t u = 0; u < used[i].size(); ++u) plan.memory[i][u].offset = lifetimes[used[i][u]].offset;
    return plan;
}

// Shapes of chunks given how many of them each group has: a group is a cut sequence, or a single chunk.
inline std::vector<ChunkShape> chunk_shapes(const std::vector<int>& group_sizes, int64_t chunk_tokens,
                                            int64_t context) {
    std::vector<ChunkShape> shapes;
    for (int size : group_sizes) {
        const int first = int(shapes.size());
        for (int i = 0; i < size; ++i)
            shapes.push_back(size == 1 ? ChunkShape{chunk_tokens}
                                       : ChunkShape{chunk_tokens, first, context, i == 0, i == size - 1});
    }
    return shapes;
}
