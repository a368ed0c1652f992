// 1F1B (PipeDream-Flush, Narayanan et al. 2021): as GPipe, but a rank turns to the backward of a chunk as soon as it
// can, so that rank r keeps the activations of p-r chunks instead of all m. p = 3, m = 4:
//
//   rank 0  F0 F1 F2             B0--- F3 B1---    B2---    B3---
//   rank 1     F0 F1       B0--- F2 B1--- F3 B2---    B3---
//   rank 2        F0 B0--- F1 B1--- F2 B2--- F3 B3---
#pragma once

#include "llmc/pipeline/schedules/stages.h"

inline OpLists one_f_one_b_schedule(const ScheduleInput& in) {
    return stage_lists(in, [&](int rank) {
        return warm_up_and_pairs(in, in.chunks, stages_of(in).count - 1 - rank, 1,
                                 [&](int n, Pass pass) { return Slot{stage_ops(in, rank, pass, n)}; });
    });
}
