// GPipe (Huang et al. 2019): all chunks forward, then all backward, the last one first. p = 3, m = 4, a backward taking
// twice the time of a forward:
//
//   rank 0  F0 F1 F2 F3                   B3--- B2--- B1--- B0---
//   rank 1     F0 F1 F2 F3          B3--- B2--- B1--- B0---
//   rank 2        F0 F1 F2 F3 B3--- B2--- B1--- B0---
//
// Every rank keeps the activations of all m chunks. Forward in order and backward in reverse is what the slices of a
// sequence need: later slices read the keys and values of earlier ones and return gradients to them.
#pragma once

#include "llmc/pipeline/schedules/stages.h"

inline OpLists gpipe_schedule(const ScheduleInput& in) {
    return stage_lists(in, [&](int rank) {
        return warm_up_and_pairs(in, in.chunks, in.chunks, 1, [&](int n, Pass pass) {
            return Slot{stage_ops(in, rank, pass, pass == Pass::F ? n : in.chunks - 1 - n)};
        });
    });
}
