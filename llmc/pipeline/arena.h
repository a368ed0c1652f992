// Addresses for tensors whose lifetimes are known: one after another, each at the lowest address that is free during
// its whole life. Two orders are tried, and the one whose arena ends lower is kept. The longest-lived first: what is
// kept for the backward pass lies at the bottom like a stack, best for one rank. The largest first: best for pipelines,
// whose messages and kept tensors come and go side by side. The end comes out at, or close to, the largest sum of bytes
// alive at once, which is the least possible; `live_peak` tells the difference.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
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

using AddressRange = std::pair<int64_t, int64_t>;  // [begin, end)

// The tensors placed so far that live in one span of consecutive ops. Those that live through all of it are remembered
// only by the addresses that they cover together: of thousands stacked on one another, a range or two remain.
struct ArenaSpan {
    static constexpr int ops = 64;
    std::vector<AddressRange> covered;  // sorted, neither overlapping nor adjacent
    std::vector<size_t> partial;        // tensors that are born or die in this span

    void cover(AddressRange range) {
        auto at = std::lower_bound(covered.begin(), covered.end(), range);
        if (at != covered.begin() && std::prev(at)->second >= range.first) range.first = (--at)->first;
        auto end = at;
        for (; end != covered.end() && end->first <= range.second; ++end)
            range.second = std::max(range.second, end->second);
        covered.insert(covered.erase(at, end), range);
    }
};

// Places the tensors in the given order; returns the end of the highest one. `op_count` bounds first and last.
inline int64_t place_in_order(std::vector<Lifetime>& tensors, const std::vector<size_t>& order, int op_count) {
    int64_t end = 0;
    std::vector<ArenaSpan> spans(size_t(op_count / ArenaSpan::ops) + 1);
    std::vector<AddressRange> taken;  // while the tensor lives
    for (size_t i : order) {
        Lifetime& t = tensors[i];
        const int first_span = t.first / ArenaSpan::ops, last_span = t.last / ArenaSpan::ops;
        const int64_t bytes = round_up(t.bytes, arena_alignment);
        taken.clear();
        for (int s = first_span; s <= last_span; ++s) {
            const ArenaSpan& span = spans[size_t(s)];
            taken.insert(taken.end(), span.covered.begin(), span.covered.end());
            for (size_t n : span.partial)
                if (tensors[n].first <= t.last && t.first <= tensors[n].last)
                    taken.push_back(
                        {tensors[n].offset, tensors[n].offset + round_up(tensors[n].bytes, arena_alignment)});
        }
        std::sort(taken.begin(), taken.end());
        t.offset = 0;
        for (const AddressRange& range : taken) {
            if (t.offset + bytes <= range.first) break;  // fits below
            t.offset = std::max(t.offset, range.second);
        }
        end = std::max(end, t.offset + bytes);
        for (int s = first_span; s <= last_span; ++s) {
            const bool whole = t.first <= s * ArenaSpan::ops && (s + 1) * ArenaSpan::ops - 1 <= t.last;
            if (whole) spans[size_t(s)].cover({t.offset, t.offset + bytes});
            else spans[size_t(s)].partial.push_back(i);
        }
    }
    return end;
}

inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count) {
    ArenaSize size;
    std::vector<int64_t> change(size_t(op_count) + 1);
    for (const Lifetime& t : tensors) {
        change[size_t(t.first)] += round_up(t.bytes, arena_alignment);
        change[size_t(t.last) + 1] -= round_up(t.bytes, arena_alignment);
    }
    int64_t live = 0;
    for (int64_t c : change) size.live_peak = std::max(size.live_peak, live += c);

    const auto in_order_of = [&](const auto& value) {
        std::vector<size_t> order(tensors.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return value(tensors[a]) > value(tensors[b]); });
        return order;
    };
    const std::vector<size_t> longest = in_order_of([](const Lifetime& t) { return int64_t(t.last - t.first); });
    size.bytes = place_in_order(tensors, longest, op_count);
    if (size.bytes == size.live_peak) return size;
    std::vector<Lifetime> other = tensors;
    const std::vector<size_t> largest = in_order_of([](const Lifetime& t) { return t.bytes; });
    if (const int64_t bytes = place_in_order(other, largest, op_count); bytes < size.bytes) {
        tensors = std::move(other);
        size.bytes = bytes;
    }
    return size;
}
