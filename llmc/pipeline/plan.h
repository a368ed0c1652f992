// From a schedule to the plan of one rank: every tensor of every op gets its place in the rank's arena, and every op
// that needs a message knows the receive to wait for. Nothing is allocated and nothing is looked up by name once a step
// runs.
//
// Tensors are planned for chunks of full size, so the plan depends only on which chunks belong together: steps with the
// same pattern share one plan.
#pragma once

#include <map>
#include <stdexcept>
#include <unordered_map>

#include "llmc/model/activations.h"
#include "llmc/pipeline/arena.h"
#include "llmc/pipeline/chain.h"
#include "llmc/pipeline/uses.h"

struct PlacedUse {
    Tensor tensor;
    int layer;
    int64_t offset;  // bytes from the start of the activations
};

struct PlannedTensor {
    Tensor tensor;
    int layer, owner;
    Lifetime life;
};

struct Plan {
    std::vector<Op> ops;
    std::vector<ChunkShape> chunks;
    TensorRules rules;
    std::vector<std::vector<PlacedUse>> memory = {};  // [op][use]
    std::vector<int> receive_of = {};  // [op] the receive that brings a compute op the last of its input, or -1
    std::vector<PlannedTensor> tensors = {};
    ArenaSize size = {};

    // All receives that bring a compute op its input, the last one first: several where it takes all row pieces.
    std::vector<size_t> receives_of(size_t op) const {
        std::vector<size_t> receives;
        if (receive_of[op] < 0) return receives;
        const Op& last = ops[size_t(receive_of[op])];
        const size_t count = ops[op].pieces == 1 ? size_t(last.pieces) : 1;
        for (size_t i = size_t(receive_of[op]) + 1; receives.size() < count && i-- > 0;)
            if (const Op& other = ops[i];
                other.kind == Kind::receive && std::tie(other.part, other.pass, other.layer, other.chunk) ==
                                                   std::tie(last.part, last.pass, last.layer, last.chunk))
                receives.push_back(i);
        return receives;
    }

    // The bytes alive at each op.
    std::vector<int64_t> live_bytes() const {
        std::vector<int64_t> live(ops.size() + 1);
        for (const PlannedTensor& t : tensors) {
            live[size_t(t.life.first)] += round_up(t.life.bytes, arena_alignment);
            live[size_t(t.life.last) + 1] -= round_up(t.life.bytes, arena_alignment);
        }
        std::partial_sum(live.begin(), live.end(), live.begin());
        return live;
    }

    // The bytes of each tensor at the op where most are alive; they add up to size.live_peak.
    std::map<Tensor, int64_t> bytes_at_peak() const {
        const std::vector<int64_t> live = live_bytes();
        const int peak = int(std::max_element(live.begin(), live.end()) - live.begin());
        std::map<Tensor, int64_t> bytes;
        for (const PlannedTensor& t : tensors)
            if (t.life.first <= peak && peak <= t.life.last) bytes[t.tensor] += round_up(t.life.bytes, arena_alignment);
        return bytes;
    }
};

// Columns of the tensors that are one matrix.
inline int64_t tensor_columns(Tensor tensor, const GptConfig& g) {
    switch (tensor) {
        case Tensor::qkv:
        case Tensor::d_qkv:
            return 3 * g.channels;
        case Tensor::store:
        case Tensor::d_store:
            return 2 * g.channels;
        case Tensor::lse:
        case Tensor::delta:
            return g.heads;
        default:
            return g.channels;
    }
}

// Types: of this build, or of the program that a plan is for.
template <class Types = BuildTypes>
int64_t tensor_bytes(Tensor tensor, const ChunkShape& shape, const GptConfig& g) {
    const int64_t N = shape.tokens, columns = tensor_columns(tensor, g);
    switch (tensor) {
        case Tensor::residual:
        case Tensor::d_residual:
            return bytes_of<RowsTensor<typename Types::R>>(N, columns);
        case Tensor::ln1:
        case Tensor::qkv:
        case Tensor::attention_out:
        case Tensor::d_attention:
        case Tensor::d_qkv:
        case Tensor::d_ln1:
            return bytes_of<RowsTensor<typename Types::X>>(N, columns);
        case Tensor::lse:
        case Tensor::delta:
            return bytes_of<RowsTensor<typename Types::S>>(N, columns);
        case Tensor::store:
            return bytes_of<RowsTensor<typename Types::X>>(shape.store_tokens, columns);
        case Tensor::d_store:
            return bytes_of<RowsTensor<typename Types::S>>(shape.store_tokens, columns);
        case Tensor::ln1_stats:
            return bytes_of<NormStatisticsOf<Types>>(N);
        case Tensor::qkv_weights:
            return bytes_of<MovedWeights<typename Types::X>>(g);
        case Tensor::d_qkv_weights:
            return bytes_of<MovedWeights<typename Types::S>>(g);
        case Tensor::post:
            return bytes_of<PostActivationsOf<Types>>(N, g);
        case Tensor::post_products:
            return bytes_of<PostProductsOf<Types>>(N, g);
        case Tensor::d_post:
            return bytes_of<PostGradientsOf<Types>>(N, g);
    }
    throw std::logic_error("tensor of unknown kind");
}

using TensorBytes = int64_t (*)(Tensor, const ChunkShape&, const GptConfig&);

// The plan for one rank's list. check.h has proven the lists of all ranks; here std::logic_error is thrown when an op
// reads what no op before it on this rank has made or received.
//
// A send reads its tensors until it is complete. A rank knows that when it has waited for a receive of a later batch,
// since batches are served in order (simulate.h); until then nothing else gets their memory. An arena of at most
// `enough` bytes need not be any smaller.
inline Plan make_plan(std::vector<Op> list, std::vector<ChunkShape> chunks, const GptConfig& g,
                      const TensorRules& rules, TensorBytes bytes = tensor_bytes<BuildTypes>, int64_t enough = 0) {
    Plan plan{std::move(list), std::move(chunks), rules};
    const ChainIndex index{{rules.layers, rules.training}, int(plan.chunks.size()), most_pieces(plan.ops)};
    const int count = int(plan.ops.size());
    std::unordered_map<uint64_t, size_t> alive;   // the latest tensor of each kind, layer and owner
    std::vector<int> received(index.size(), -1);  // [op] that receives its result, or -1
    std::map<std::pair<int, int>, int> slice;     // [layer, store] chunk whose attention ran last
    std::vector<std::pair<int, size_t>> sending;  // batch, tensor
    std::vector<std::vector<size_t>> used(plan.ops.size());
    alive.reserve(plan.ops.size());
    plan.memory.reserve(plan.ops.size());
    const auto live_until = [&](size_t tensor, int op) {
        int& last = plan.tensors[tensor].life.last;
        last = std::max(last, op);
    };
    for (int i = 0; i < count; ++i) {
        const Op& op = plan.ops[size_t(i)];
        const ChunkShape& shape = plan.chunks[size_t(op.chunk)];
        plan.receive_of.push_back(-1);
        if (op.kind == Kind::receive) received[index(op)] = i;
        if (op.kind == Kind::compute && op.pass != Pass::W && index.chain.position(op) > 0)
            if (const int input = received[index.input(op)]; input >= 0) {
                plan.receive_of.back() = input;
                std::erase_if(sending, [&](const auto& send) {
                    const bool complete = send.first < plan.ops[size_t(input)].batch;
                    if (complete) live_until(send.second, i - 1);
                    return complete;
                });
            }
        if (op.part == Part::attention && shape.store >= 0) {  // slices run in order, backward in reverse
            const bool forward = op.pass == Pass::F, first = forward ? shape.first_slice : shape.last_slice;
            int& last = slice[{op.layer, shape.store}];
            if (!first && last != op.chunk + (forward ? -1 : 1))
                throw std::logic_error("the schedule runs a slice before its turn: " + op_name(op));
            last = op.chunk;
        }
        plan.memory.emplace_back();
        for (const Use& use : uses(op, shape, rules)) {
            const uint64_t key = (uint64_t(use.owner) << 32 | uint64_t(use.layer + 1) << 8) | uint64_t(use.tensor);
            const auto [place, is_new] = alive.try_emplace(key, plan.tensors.size());
            if (use.access == Access::create) {
                place->second = plan.tensors.size();
                plan.tensors.push_back({use.tensor, use.layer, use.owner, {bytes(use.tensor, shape, g), i, i}});
            } else if (is_new) {
                alive.erase(place);
                if (use.tensor == Tensor::qkv_weights || use.owner < 0) continue;  // the rank's own
                throw std::logic_error("the schedule runs before its inputs exist: " + op_name(op));
            }
            live_until(place->second, i);
            if (op.kind == Kind::send) sending.push_back({op.batch, place->second});
            used[size_t(i)].push_back(place->second);
            plan.memory.back().push_back({use.tensor, use.layer, 0});
        }
    }
    for (const auto& [batch, tensor] : sending) live_until(tensor, count - 1);

    std::vector<Lifetime> lifetimes;
    for (const PlannedTensor& t : plan.tensors) lifetimes.push_back(t.life);
    plan.size = assign_offsets(lifetimes, count, enough);
    for (size_t t = 0; t < lifetimes.size(); ++t) plan.tensors[t].life = lifetimes[t];
    for (size_t i = 0; i < used.size(); ++i)
        for (size_t u = 0; u < used[i].size(); ++u) plan.memory[i][u].offset = lifetimes[used[i][u]].offset;
    return plan;
}

// Shapes of chunks given how many of them each group has: a group is a cut sequence, or a single chunk. Stores have
// room for the longest sequence that makes so many slices.
inline std::vector<ChunkShape> chunk_shapes(const std::vector<int>& group_sizes, int64_t chunk_tokens,
                                            int64_t context) {
    std::vector<ChunkShape> shapes;
    for (int size : group_sizes) {
        const int first = int(shapes.size());
        const int64_t longest = std::min(context, size * chunk_tokens);
        for (int i = 0; i < size; ++i)
            shapes.push_back(size == 1
                                 ? ChunkShape{chunk_tokens}
                                 : ChunkShape{chunk_tokens, first, longest, i == 0, i == size - 1, i * chunk_tokens});
    }
    return shapes;
}

// So many sequences of g.context tokens, each cut into slices of equal work in the layers: later ones are shorter,
// since their queries see more keys. At least one token each.
inline std::vector<ChunkShape> balanced_slices(const GptConfig& g, int sequences, int slices) {
    const auto work = [&](int64_t tokens) {
        return 72 * double(g.layers * g.channels * g.channels) * double(tokens) + attention_flops(g, 0, tokens);
    };
    std::vector<int64_t> cuts = {0};
    for (int i = 1; i <= slices; ++i) {
        int64_t low = cuts.back() + 1;
        for (int64_t high = g.context - (slices - i); low < high;) {
            const int64_t middle = (low + high) / 2;
            if (work(middle) < i * work(g.context) / slices) low = middle + 1;
            else high = middle;
        }
        cuts.push_back(low);
    }
    std::vector<ChunkShape> shapes;
    for (int first = 0; first < sequences * slices; first += slices)
        for (int i = 0; i < slices; ++i) {
            const int64_t begin = cuts[size_t(i)], tokens = cuts[size_t(i) + 1] - begin;
            if (slices == 1) shapes.push_back({tokens});
            else shapes.push_back({tokens, first, g.context, i == 0, i == slices - 1, begin});
        }
    return shapes;
}
