// One rank: gradient accumulation. Every chunk runs forward, then backward, before the next one starts; the slices of a
// cut sequence run forward in order and backward in reverse, since later slices read the keys and values of earlier
// ones and return gradients to them.
#pragma once

#include <vector>

#include "llmc/pipeline/op.h"

// All forward ops of one chunk; the head's forward computes the loss alone, so training leaves it out.
inline void append_forward(std::vector<Op>& ops, int layers, int chunk, bool with_head) {
    ops.push_back({Part::embed, Pass::F, -1, chunk});
    for (int l = 0; l < layers; ++l)
        for (Part part : {Part::pre, Part::attention, Part::post}) ops.push_back({part, Pass::F, l, chunk});
    if (with_head) ops.push_back({Part::head, Pass::F, -1, chunk});
}

inline void append_backward(std::vector<Op>& ops, int layers, int chunk) {
    ops.push_back({Part::head, Pass::B, -1, chunk});
    for (int l = layers - 1; l >= 0; --l)
        for (Part part : {Part::post, Part::attention, Part::pre}) ops.push_back({part, Pass::B, l, chunk});
    ops.push_back({Part::embed, Pass::B, -1, chunk});
}

inline std::vector<Op> accumulate_schedule(int layers, const std::vector<ChunkShape>& chunks) {
    std::vector<Op> ops;
    const int count = int(chunks.size());
    for (int first = 0; first < count;) {
        int end = first + 1;  // chunks [first, end) hold the slices of one sequence, or one chunk without any
        while (end < count && chunks[first].store >= 0 && chunks[end].store == chunks[first].store) ++end;
        for (int c = first; c < end; ++c) append_forward(ops, layers, c, false);
        for (int c = end - 1; c >= first; --c) append_backward(ops, layers, c);
        first = end;
    }
    return ops;
}

inline std::vector<Op> evaluate_schedule(int layers, const std::vector<ChunkShape>& chunks) {
    std::vector<Op> ops;
    for (int c = 0; c < int(chunks.size()); ++c) append_forward(ops, layers, c, true);
    return ops;
}
