// From a batch of sequences to chunks of at most `chunk_tokens` tokens. A longer sequence becomes slices, each a chunk
// of its own, one after the other; all others are packed by first-fit decreasing: the longest first, each into the
// first chunk with room. Deterministic: equal lengths keep their order.
#pragma once

#include <algorithm>
#include <numeric>

#include "llmc/data/chunk.h"
#include "llmc/data/loader.h"

inline std::vector<Chunk> make_chunks(const Batch& batch, int64_t chunk_tokens) {
    std::vector<Chunk> chunks;
    const auto length = [&](int64_t sequence) { return int64_t(batch.sequences[sequence].tokens.size()); };
    std::vector<int64_t> order(batch.sequences.size());
    std::iota(order.begin(), order.end(), 0);

    const auto first_short =
        std::stable_partition(order.begin(), order.end(), [&](int64_t s) { return length(s) > chunk_tokens; });
    for (auto s = order.begin(); s != first_short; s++)
        for (int64_t begin = 0; begin < length(*s); begin += chunk_tokens) {
            const int64_t end = std::min(begin + chunk_tokens, length(*s));
            chunks.push_back({{{*s, begin, end}}, end - begin});
        }

    std::stable_sort(first_short, order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    const size_t first_packed = chunks.size();
    for (auto s = first_short; s != order.end(); s++) {
        const int64_t n = length(*s);
        auto chunk = std::find_if(chunks.begin() + int64_t(first_packed), chunks.end(),
                                  [&](const Chunk& c) { return c.tokens + n <= chunk_tokens; });
        if (chunk == chunks.end()) chunk = chunks.insert(chunks.end(), Chunk{});
        chunk->segments.push_back({*s, 0, n});
        chunk->tokens += n;
    }
    return chunks;
}

// A chunk's tokens as the kernels take them, segment after segment.
struct ChunkTokens {
    std::vector<int32_t> tokens, targets;  // [N]
    std::vector<int32_t> positions;        // [N] place in the sequence, for the position embedding
};

inline ChunkTokens gather_chunk(const Batch& batch, const Chunk& chunk) {
    ChunkTokens flat;
    for (const Segment& segment : chunk.segments) {
        const Sample& sample = batch.sequences[segment.sequence];
        const auto append = [&](std::vector<int32_t>& to, const std::vector<int32_t>& from) {
            to.insert(to.end(), from.begin() + segment.begin, from.begin() + segment.end);
        };
        append(flat.tokens, sample.tokens);
        append(flat.targets, sample.targets);
        for (int64_t i = segment.begin; i < segment.end; i++) flat.positions.push_back(int32_t(i));
    }
    return flat;
}
