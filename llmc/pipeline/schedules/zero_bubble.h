// Zero bubble (Qi et al. 2024): the backward is split. B, the gradient of the input, is what the rank before waits for;
// W, the gradients of the weights, is waited for by nobody and fills what would be bubble. ZB-H1 keeps as many chunks
// alive as 1F1B on its first rank, ZB-H2 about twice as many. p = 3, m = 5, F, B and W of equal times:
//
//   ZB-H1   rank 0  F0 F1 F2       B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
//           rank 1     F0 F1    B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
//           rank 2        F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4
//
//   ZB-H2   rank 0  F0 F1 F2 F3 F4 B0 W0 B1 W1 B2 W2 B3 W3 B4 W4
//           rank 1     F0 F1 F2 B0 F3 B1 F4 B2 W0 B3 W1 B4 W2 W3 W4
//           rank 2        F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 W0 W1 W2 W3 W4
//
// Head and embedding are not split: the head has its logits for one pass only, and nobody waits for the embedding.
#pragma once

#include "llmc/pipeline/schedules/stages.h"

// ZB-H1 for slack 1, ZB-H2 for slack 2: forwards that a rank warms up more than the next one, and chunks by which its W
// lags behind less.
inline OpLists zero_bubble_schedule(const ScheduleInput& in, int slack) {
    return stage_lists(in, [&](int rank) {
        const int lag = slack * rank;
        const int warm_up = slack * (stages_of(in).count - 1 - rank);
        Phase phase = warm_up_and_pairs(in, in.chunks, warm_up, slack, [&](int n, Pass pass) {
            Slot slot{stage_ops(in, rank, pass, n, pass == Pass::B)};
            if (pass == Pass::B && n >= lag) slot.later = stage_ops(in, rank, Pass::W, n - lag);
            return slot;
        });
        if (in.training)
            for (int n = std::max(0, in.chunks - lag); n < in.chunks; ++n)
                for (const Op& op : stage_ops(in, rank, Pass::W, n)) phase.back().later.push_back(op);
        return phase;
    });
}

inline OpLists zb_h1_schedule(const ScheduleInput& in) { return zero_bubble_schedule(in, 1); }
inline OpLists zb_h2_schedule(const ScheduleInput& in) { return zero_bubble_schedule(in, 2); }
