// Seq1F1B (Sun et al., arXiv 2406.03488): 1F1B over the slices of sequences. A slice is a fraction of a chunk, so the
// pipeline fills in a fraction of the time, and a rank keeps p-1-r slices more than one sequence instead of p-r
// sequences. Slices of a sequence run forward in order and backward in reverse, since later ones read the keys and
// values of earlier ones and return gradients to them; so a rank warms up with a whole sequence less one slice before
// the first backward. p = 2, two sequences of two slices, as sequence.slice:
//
//   rank 0  F0.0 F0.1           F1.0      B0.1--- F1.1 B0.0--- ...
//   rank 1       F0.0 F0.1 B0.1---   F1.0 B0.0--- F1.1 B1.1--- ...
//
// For planning and rehearsing: balanced_slices in llmc/pipeline/plan.h makes slices of equal work, the data of training
// comes in even ones.
#pragma once

#include "llmc/pipeline/schedules/stages.h"

inline OpLists seq1f1b_schedule(const ScheduleInput& in) {
    return stage_lists(in, [&](int rank) {
        const int warm_up = stages_of(in).count - 1 - rank + in.slices - 1;
        return warm_up_and_pairs(in, in.chunks, warm_up, 1, [&](int n, Pass pass) {
            const int first = n / in.slices * in.slices, size = std::min(in.slices, in.chunks - first);
            const int backward = first + size - 1 - (n - first);
            return Slot{stage_ops(in, rank, pass, pass == Pass::F ? n : backward)};
        });
    });
}
