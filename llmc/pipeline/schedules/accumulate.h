// One rank: gradient accumulation. Every chunk runs forward, then backward, before the next one starts; the slices of a
// cut sequence run forward in order and backward in reverse, since later slices read the keys and values of earlier
// ones and return gradients to them.
#pragma once

#include <vector>

#include "llmc/pipeline/chain.h"
#include "llmc/pipeline/uses.h"

inline std::vector<Op> accumulate_schedule(int layers, const std::vector<ChunkShape>& chunks) {
    const Chain chain{layers, true};
    std::vector<Op> ops;
    const int count = int(chunks.size());
    for (int first = 0; first < count;) {
        int end = first + 1;  // chunks [first, end) hold the slices of one sequence, or one chunk without any
        while (end < count && chunks[first].store >= 0 && chunks[end].store == chunks[first].store) ++end;
        for (int c = first; c < end; ++c)
            for (int n = 0; n < chain.head(); ++n) ops.push_back(chain.op(n, c));
        for (int c = end - 1; c >= first; --c)
            for (int n = chain.head(); n < chain.length(); ++n) ops.push_back(chain.op(n, c));
        first = end;
    }
    return ops;
}

inline std::vector<Op> evaluate_schedule(int layers, const std::vector<ChunkShape>& chunks) {
    const Chain chain{layers, false};
    std::vector<Op> ops;
    for (int c = 0; c < int(chunks.size()); ++c)
        for (int n = 0; n < chain.length(); ++n) ops.push_back(chain.op(n, c));
    return ops;
}
