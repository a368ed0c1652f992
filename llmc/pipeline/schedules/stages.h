// What schedules with stages of whole layers share. The model is cut into consecutive stages, as even as they come, the
// first ones taking a layer more; stage s is on rank s mod p. The embedding is in the first stage, the head in the
// last. There are no more stages than layers, so that with fewer layers than ranks some ranks stay idle.
#pragma once

#include "llmc/pipeline/schedules/slots.h"

struct Stages {
    int ranks, layers, count;

    int first_layer(int stage) const { return stage * (layers / count) + std::min(stage, layers % count); }
    int of_layer(int layer) const {
        const int size = layers / count, larger = layers % count;  // so many stages have a layer more
        return layer < larger * (size + 1) ? layer / (size + 1) : (layer - larger) / size;
    }
    int rank_of(Part part, int layer) const {
        return (part == Part::embed ? 0 : part == Part::head ? count - 1 : of_layer(layer)) % ranks;
    }
};

inline Stages stages_of(const ScheduleInput& in) {
    return {in.ranks, in.layers, std::min(in.ranks * in.virtual_stages, in.layers)};
}

// Which rank holds and runs a part; all chunks take the same way.
inline int stage_owner(const ScheduleInput& in, Part part, int layer, int) {
    return stages_of(in).rank_of(part, layer);
}

// The ops of a stage on one chunk; none if there is no such stage or chunk. A split B leaves the gradients of the
// weights of pre and post to a W.
inline std::vector<Op> stage_ops(const ScheduleInput& in, int stage, Pass pass, int chunk, bool split = false) {
    const Stages stages = stages_of(in);
    const Chain chain{in.layers, in.training};
    std::vector<Op> ops;
    if (stage >= stages.count || chunk >= in.chunks) return ops;
    const bool last = stage == stages.count - 1;
    const int begin = stage == 0 ? 0 : 3 * stages.first_layer(stage) + 1;  // positions in the chain
    const int end = 3 * stages.first_layer(stage + 1) + 1;
    if (pass == Pass::F)
        for (int n = begin; n < end + (last && !in.training); ++n) ops.push_back(chain.op(n, chunk));
    else
        for (int n = end - !last; n >= begin; --n) {
            Op op = chain.op(2 * chain.head() - n, chunk);
            const bool block = op.part == Part::pre || op.part == Part::post;
            op.pass = pass;
            op.split = split && block;
            if (pass == Pass::B || block) ops.push_back(op);
        }
    return ops;
}

// All these schedules have one form: of n forward and n backward slots, some forward ones to warm up, then one forward
// and one backward in turn, then the backward ones that are left. slot(n, pass) is the n-th one.
//
// `ahead` is by how much the warm-up of a rank is longer than that of the next one. By one: while one of two neighbours
// is in a forward slot, the other one is in a backward slot, and after it they swap an activation for a gradient. By
// two: all ranks are in forward slots at the same time and hand their activations on, then the same with gradients;
// then what comes in belongs to the slot after the next one.
template <class SlotOf>
Phase warm_up_and_pairs(const ScheduleInput& in, int total, int warm_up, int ahead, SlotOf slot) {
    Phase phase;
    warm_up = std::clamp(warm_up, 0, total);
    const auto add = [&](int n, Pass pass, bool pair) {
        phase.push_back(slot(n, pass));
        phase.back().ahead = pair ? ahead : 1;
    };
    for (int n = 0; n < total + warm_up; ++n) {
        const bool pair = in.training && n > warm_up && n < total;
        if (n < total) add(n, Pass::F, pair);
        if (n >= warm_up && in.training) add(n - warm_up, Pass::B, pair);
    }
    return phase;
}

// The lists of all ranks, phase_of(rank) giving the slots of each.
template <class PhaseOf>
OpLists stage_lists(const ScheduleInput& in, PhaseOf phase_of) {
    const Stages stages = stages_of(in);
    OpLists lists;
    for (int rank = 0; rank < in.ranks; ++rank)
        lists.push_back(post_exchanges(rank, {phase_of(rank)}, in,
                                       [&](const Op& op) { return stages.rank_of(op.part, op.layer); }));
    return lists;
}
