// The input of one step, cut into chunks, in the form in which the ops take it; and its result.
#pragma once

#include "llmc/data/packing.h"
#include "llmc/model/blocks.cuh"
#include "llmc/pipeline/plan.h"

struct Step {
    std::vector<ChunkTokens> chunks;                 // tokens, targets and positions of each
    std::vector<std::vector<SegmentRows>> segments;  // of each chunk
    std::vector<int> group_sizes;                    // chunks of each cut sequence, 1 for every other chunk
    int64_t tokens = 0, targets = 0;
    double flops = 0;  // of forward and backward
};

inline Step prepare_step(const Batch& batch, int64_t chunk_tokens, const GptConfig& g) {
    Step step;
    for (const Chunk& chunk : make_chunks(batch, chunk_tokens)) {
        step.chunks.push_back(gather_chunk(batch, chunk));
        std::vector<SegmentRows> rows;
        int64_t begin = 0;
        for (const Segment& s : chunk.segments) {
            const int64_t whole = int64_t(batch.sequences[size_t(s.sequence)].tokens.size());
            rows.push_back({begin, s.end - s.begin, s.begin, s.end - s.begin < whole});
            begin += s.end - s.begin;
            step.flops += attention_flops(g, s.begin, s.end);
        }
        // A slice is the first segment of its chunk; every slice but the first one continues the group before it.
        if (rows[0].context > 0) ++step.group_sizes.back();
        else step.group_sizes.push_back(1);
        step.segments.push_back(std::move(rows));
    }
    step.tokens = batch.tokens;
    step.targets = batch.targets;
    step.flops += double(batch.tokens) * matmul_flops_per_token(g);
    return step;
}
