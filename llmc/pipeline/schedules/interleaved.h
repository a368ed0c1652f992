// Interleaved 1F1B (Narayanan et al. 2021, Megatron-LM): a rank holds v short stages instead of a long one, and a chunk
// goes round the ranks v times: a bubble v times smaller for v times the traffic. Ranks take the chunks in groups of p,
// a stage after the other. p = 2, v = 2, m = 4, forward only, as chunk.stage:
//
//   rank 0  0.0 1.0 0.2 1.2 2.0 3.0 2.2 3.2
//   rank 1      0.1 1.1 0.3 1.3 2.1 3.1 2.3 3.3
//
// Chunks that are missing in the last group, and stages in the last round, keep their slots, empty: ranks stay in step.
#pragma once

#include "llmc/pipeline/schedules/stages.h"

inline OpLists interleaved_schedule(const ScheduleInput& in) {
    const int p = in.ranks, v = int(ceil_div(stages_of(in).count, p));
    return stage_lists(in, [&](int rank) {
        const int warm_up = 2 * (p - 1 - rank) + (v - 1) * p;
        return warm_up_and_pairs(in, int(round_up(in.chunks, p)) * v, warm_up, 2, [&](int n, Pass pass) {
            const int group = n / (p * v), round = n / p % v, chunk = group * p + n % p;
            return Slot{stage_ops(in, (pass == Pass::F ? round : v - 1 - round) * p + rank, pass, chunk)};
        });
    });
}
