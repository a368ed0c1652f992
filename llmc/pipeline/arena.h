// Addresses for tensors whose lifetimes are known. The longest-lived come first, each at the lowest address that is free
// during its whole life. What a pipeline keeps for its backward pass then lies at the bottom like a stack, and the
// short-lived tensors share the space above. The end comes out at, or close to, the largest sum of bytes alive at once,
// which is the least possible; `live_peak` tells the difference.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "llmc/common.h"

struct Lifetime {
    int64_t bytes;
    int first, last;     // ops at which the tensor is created and used last
    int64_t offset = 0;  // filled by assign_offsets
};

struct ArenaSize {
    int64_t bytes = 0;      // end of the highest tensor
    int64_t live_peak = 0;  // largest sum of bytes alive at one op
};

constexpr int64_t arena_alignment = 64;  // bytes: a cache line, and one AVX-512 register

// `op_count` bounds first and last.
inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count) {
    ArenaSize size;
    std::vector<int64_t> change(size_t(op_count) + 1);
    for (const Lifetime& t : tensors) {
        change[size_t(t.first)] += round_up(t.bytes, arena_alignment);
        change[size_t(t.last) + 1] -= round_up(t.bytes, arena_alignment);
    }
    int64_t live = 0;
    for (int64_t c : change) size.live_peak = std::max(size.live_peak, live += c);

    std::vector<size_t> order(tensors.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return tensors[a].last - tensors[a].first > tensors[b].last - tensors[b].first;
    });
    // The tensors placed so far, listed under every span of ops that they live in, so that each looks at few others.
    constexpr int span = 64;
    std::vector<std::vector<size_t>> placed(size_t(op_count / span) + 1);
    std::vector<size_t> seen_by(tensors.size(), SIZE_MAX), neighbours;
    for (size_t i : order) {
        Lifetime& t = tensors[i];
        neighbours.clear();
        for (int s = t.first / span; s <= t.last / span; ++s)
            for (size_t n : placed[size_t(s)]) {
                if (seen_by[n] == i || tensors[n].last < t.first || t.last < tensors[n].first) continue;
                seen_by[n] = i;
                neighbours.push_back(n);
            }
        std::sort(neighbours.begin(), neighbours.end(), [&](size_t a, size_t b) { return tensors[a].offset < tensors[b].offset; });
        for (size_t n : neighbours) {
            if (t.offset + t.bytes <= tensors[n].offset) break;  // fits below
            t.offset = std::max(t.offset, round_up(tensors[n].offset + tensors[n].bytes, arena_alignment));
        }
        size.bytes = std::max(size.bytes, round_up(t.offset + t.bytes, arena_alignment));
        for (int s = t.first / span; s <= t.last / span; ++s) placed[size_t(s)].push_back(i);
    }
    return size;
}
