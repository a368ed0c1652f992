// Addresses for tensors whose lifetimes are known: first fit in order of creation. A pipeline's activations live and
// die like a stack with a few strands, so first fit comes out at, or close to, the largest sum of living bytes, which is
// the least possible; `live_peak` tells the difference.
#pragma once

#include <algorithm>
#include <cstdint>
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

// `tensors` are ordered by `first`. `op_count` bounds first and last.
inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count) {
    struct Hole {
        int64_t begin, end;
    };
    std::vector<Hole> holes = {{0, INT64_MAX}};  // sorted, never adjacent
    std::vector<std::vector<size_t>> dying(size_t(op_count) + 1);
    ArenaSize size;
    int64_t live = 0;
    size_t next = 0;
    for (int op = 0; op < op_count; ++op) {
        for (; next < tensors.size() && tensors[next].first == op; ++next) {
            Lifetime& t = tensors[next];
            const int64_t bytes = round_up(t.bytes, arena_alignment);
            size_t h = 0;
            while (holes[h].end - holes[h].begin < bytes) ++h;
            t.offset = holes[h].begin;
            holes[h].begin += bytes;
            if (holes[h].begin == holes[h].end) holes.erase(holes.begin() + h);
            dying[t.last].push_back(next);
            size.bytes = std::max(size.bytes, t.offset + bytes);
            size.live_peak = std::max(size.live_peak, live += bytes);
        }
        for (size_t i : dying[op]) {
            const int64_t begin = tensors[i].offset, bytes = round_up(tensors[i].bytes, arena_alignment);
            if (bytes == 0) continue;
            live -= bytes;
            size_t h = 0;
            while (holes[h].begin < begin) ++h;
            holes.insert(holes.begin() + h, {begin, begin + bytes});
            if (holes[h].end == holes[h + 1].begin) {
                holes[h].end = holes[h + 1].end;
                holes.erase(holes.begin() + h + 1);
            }
            if (h > 0 && holes[h - 1].end == holes[h].begin) {
                holes[h - 1].end = holes[h].end;
                holes.erase(holes.begin() + h);
            }
        }
    }
    return size;
}
