// A chunk (the micro batch) is what flows through the pipeline as one unit: several whole sequences packed together, or
// one slice of a sequence too long for a chunk. Its activations are flat, [N, C], segment after segment.
#pragma once

#include <cstdint>
#include <vector>

// The tokens [begin, end) of one sequence. With begin > 0 it is a later slice: its queries also see the keys
// [0, begin), which the chunks before it left behind.
struct Segment {
    int64_t sequence;    // index in the step's batch
    int64_t begin, end;  // tokens of that sequence
};

struct Chunk {
    std::vector<Segment> segments;
    int64_t tokens = 0;  // N, the sum of the segments' lengths
};
