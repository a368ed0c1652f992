// HelixPipe (Zhang et al., arXiv 2507.00394), attention parallel pipeline. The model is cut into blocks, which have the
// parameters,
//
//   block 0 = embed, pre(0)      block k = post(k-1), pre(k)      block L = post(L-1), head
//
// and attentions, which have none and so may run anywhere. Block k is on rank k mod p for every chunk. Chunks come in
// groups of p offsets j, each of F folds; the attention of layer l is on rank (l + j + 1) mod p. So the p offsets of a
// group run their attentions of one layer on p ranks at once, and attention does not count in the bubble. p = 3, L = 3,
// m = 3, F = 1, forward, as block.offset and [attention.offset]:
//
//   rank 0  0.0 0.1 0.2 [0.2------] [1.1------] [2.0------] 3.0 3.1 3.2
//   rank 1      [0.0------] 1.0 1.1 1.2 [1.2------] [2.1------]
//   rank 2          [0.1------] [1.0------] 2.0 2.1 2.2 [2.2------]
//
// All forward, then all backward in the reverse order. With several folds every slot is run for one fold after another,
// and the exchange of a fold is in flight while the next one computes.
#pragma once

#include <algorithm>
#include <set>
#include <tuple>

#include "llmc/pipeline/schedules/slots.h"

// A round: consecutive chunks that run forward and then backward by themselves. The schedule within is that of a step
// with so many chunks.
struct HelixRound {
    int first;         // chunk
    ScheduleInput in;  // of the round
};

inline HelixRound helix_round(const ScheduleInput& in, int chunk) {
    HelixRound round{0, in};
    if (in.round_chunks == 0) return round;
    round.first = chunk / in.round_chunks * in.round_chunks;
    round.in.chunks = std::min(in.round_chunks, in.chunks - round.first);
    return round;
}

struct HelixPlace {
    int group, offset, fold;
};

// Of a chunk of a round. A last group that is not full takes all offsets of fold 0 first, so that the ranks still share
// its attentions.
inline HelixPlace helix_place(const ScheduleInput& in, int chunk) {
    const int p = in.ranks, group = chunk / (p * in.folds), n = chunk % (p * in.folds);
    if ((group + 1) * p * in.folds <= in.chunks) return {group, n / in.folds, n % in.folds};
    return {group, n % p, n / p};
}

// The chunk at a place, in.chunks or more where the last group has none.
inline int helix_chunk(const ScheduleInput& in, HelixPlace at) {
    const int p = in.ranks, first = at.group * p * in.folds;
    return first + (first + p * in.folds <= in.chunks ? at.offset * in.folds + at.fold : at.fold * p + at.offset);
}

// Which rank holds and runs a part.
inline int helix_owner(const ScheduleInput& in, Part part, int layer, int chunk) {
    if (in.spread_head && in_last_block(part, layer, in.layers)) part = Part::attention, layer = in.layers - 1;
    if (part == Part::attention) {
        const HelixRound round = helix_round(in, chunk);
        return (layer + helix_place(round.in, chunk - round.first).offset + 1) % in.ranks;
    }
    return Chain{in.layers, in.training}.block(part, layer) % in.ranks;
}

// The end of the forward chain. In training what is left, the head and before it a spread post, goes with the backward.
inline int helix_forward_end(const ScheduleInput& in) {
    const Chain chain{in.layers, in.training};
    return in.training ? chain.head() - in.spread_head : chain.length();
}

// The forward slots of a rank in a round. If p divides L, the ring of blocks closes: rank 0 runs the last as well as
// the first, a slot of block L goes on with block 0 of the next group, and all groups are one phase. If not, each group
// is a phase.
inline std::vector<Phase> helix_forward(const HelixRound& round, int rank) {
    const ScheduleInput& in = round.in;
    const int p = in.ranks, L = in.layers, F = in.folds;
    const int groups = int(ceil_div(in.chunks, p * F));
    const bool closed = L % p == 0;
    const Chain chain{L, in.training};
    const int end = helix_forward_end(in);
    std::vector<Phase> phases;
    for (int g = 0; g < groups; ++g) {
        if (g == 0 || !closed) phases.emplace_back();
        // One slot for each fold: from a position in the chain as far as the chunk stays on this rank.
        const auto slots = [&](int start, int j) {
            for (int f = 0; f < F; ++f) {
                Slot& slot = phases.back().emplace_back();
                slot.ahead = F;
                for (int group = g, from = start; group < groups; ++group, from = 0) {
                    const int chunk = helix_chunk(in, {group, j, f});
                    if (chunk >= in.chunks) break;
                    int n = from;
                    for (; n < end; ++n) {
                        const Op op = chain.op(n, round.first + chunk);
                        if (helix_owner(in, op.part, op.layer, chunk) != rank) break;
                        slot.ops.push_back(op);
                    }
                    if (n < end || !closed) break;  // else on with block 0 of the next group
                }
            }
        };
        // Block k begins with post(k-1), block 0 with embed. A spread block L goes on with block 0 of the next group.
        const auto block = [&](int k, int j) { slots(k == L && in.spread_head ? end : 3 * k, j); };
        const auto attention = [&](int l, int j) { slots(3 * l + 2, j); };

        if (rank == 0 && (g == 0 || !closed)) block(0, 0);
        int last = rank - p;  // the block of this rank that came last
        for (int k = rank; k <= L; last = k, k += p) {
            for (int l = std::max(0, k - p + 1); l < k; ++l) attention(l, k - 1 - l);  // j = 0 goes on with block k
            for (int j = 1; j < p; ++j)
                if (k > 0 || g == 0 || !closed) block(k, j);  // j = p-1 goes on with attention k
        }
        for (int l = std::max(0, last + 1); l < L; ++l) attention(l, last + p - 1 - l);
    }
    return phases;
}

// The same slots from the last to the first, each from its last op to its first, after what the forward has left.
inline std::vector<Phase> helix_backward(const ScheduleInput& in, const std::vector<Phase>& forward) {
    const Chain chain{in.layers, in.training};
    std::vector<Phase> phases;
    for (auto phase = forward.rbegin(); phase != forward.rend(); ++phase) {
        phases.emplace_back();
        for (auto slot = phase->rbegin(); slot != phase->rend(); ++slot) {
            std::vector<Op>& ops = phases.back().emplace_back().ops;
            phases.back().back().ahead = in.folds;
            for (auto op = slot->ops.rbegin(); op != slot->ops.rend(); ++op) {
                const int forward = chain.position(*op), end = helix_forward_end(in);
                for (int n = end; forward == end - 1 && n < 2 * chain.head() - forward; ++n)
                    ops.push_back(chain.op(n, op->chunk));
                ops.push_back(chain.op(2 * chain.head() - forward, op->chunk));
            }
        }
    }
    return phases;
}

// Weights for queries, keys and values travel once a step: with the first chunk whose attention of a layer a rank runs.
// Their gradients are summed there, from the first of its backward ops on, and come back with the last.
inline void mark_weights(const ScheduleInput& in, int rank, std::vector<Op>& list) {
    std::set<std::tuple<Pass, Kind, int, int>> seen;  // pass, kind, layer, the other rank
    const auto mark_first = [&](Op& op) {
        const int owner = helix_owner(in, Part::pre, op.layer, op.chunk);
        const int peer = op.kind == Kind::compute ? owner : op.peer;
        if (peer != rank) op.weights = seen.emplace(op.pass, op.kind, op.layer, peer).second;
    };
    for (Op& op : list)
        if ((op.part == Part::pre && op.pass == Pass::F && op.kind != Kind::compute) ||
            (op.part == Part::attention && op.pass == Pass::B && op.kind == Kind::compute))
            mark_first(op);
    std::set<std::pair<int, int>> returned;  // layer, chunk
    for (auto op = list.rbegin(); op != list.rend(); ++op)
        if (op->part == Part::attention && op->pass == Pass::B && op->kind != Kind::compute) {
            mark_first(*op);
            if (op->weights && op->kind == Kind::receive) returned.emplace(op->layer, op->chunk);
        }
    for (Op& op : list)
        if (op.part == Part::pre && op.pass == Pass::B && op.kind == Kind::compute)
            op.weights = returned.count({op.layer, op.chunk}) > 0;
}

inline OpLists helix_schedule(const ScheduleInput& in) {
    OpLists lists;
    for (int rank = 0; rank < in.ranks; ++rank) {
        std::vector<Phase> phases;
        for (int first = 0; first < in.chunks;) {
            const HelixRound round = helix_round(in, first);
            const std::vector<Phase> forward = helix_forward(round, rank);
            phases.insert(phases.end(), forward.begin(), forward.end());
            if (in.training)
                for (Phase& phase : helix_backward(in, forward)) phases.push_back(std::move(phase));
            first += round.in.chunks;
        }
        lists.push_back(post_exchanges(rank, phases, in,
                                       [&](const Op& op) { return helix_owner(in, op.part, op.layer, op.chunk); }));
        mark_weights(in, rank, lists.back());
    }
    return lists;
}
