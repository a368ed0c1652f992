// Addresses for tensors whose lifetimes are known: one after another, each at the lowest address that is free during
// its whole life. What counts is the order. The largest first is best for pipelines, whose messages and kept tensors
// come and go side by side; the longest-lived first for one rank, since what is kept for the backward pass lies at the
// bottom like a stack. Where the arena ends above the largest sum of bytes alive at once (`live_peak`, the least
// possible), the tensors that stick out are moved forward in the order and all are placed again. make_plan calls it.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
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

// Which addresses are taken at some op of a span of ops. A tree over the ops: the spans of its nodes are powers of two,
// node n has the halves 2 n and 2 n + 1, and the op i is the leaf `leaves` + i. Any life is a few whole nodes (two a
// level at most), below the nodes that it takes a part of. Thousands of tensors stacked on one another leave a range or
// two in a node.
class TakenAddresses {
public:
    explicit TakenAddresses(int op_count) : leaves_(std::bit_ceil(size_t(op_count))), nodes_(2 * leaves_) {}

    void take(const Lifetime& life, AddressRange range) {
        for_each_whole(life, [&](Node& node) { cover(node.always, range), cover(node.sometimes, range); });
        for_each_part(life, [&](Node& node) { cover(node.sometimes, range); });
    }

    // The lowest address from which so many bytes are free during the whole life.
    int64_t lowest_free(const Lifetime& life, int64_t bytes) {
        found_.clear();
        const auto add = [&](const Ranges& ranges) { found_.insert(found_.end(), ranges.begin(), ranges.end()); };
        for_each_whole(life, [&](Node& node) { add(node.sometimes); });
        for_each_part(life, [&](Node& node) { add(node.always); });
        std::sort(found_.begin(), found_.end());
        int64_t offset = 0;
        for (const AddressRange& range : found_) {
            if (offset + bytes <= range.first) break;  // fits below
            offset = std::max(offset, range.second);
        }
        return offset;
    }

private:
    using Ranges = std::vector<AddressRange>;  // sorted, neither overlapping nor adjacent
    struct Node {
        Ranges always, sometimes;  // taken by tensors that live all through the span; by any that live in it
    };
    const size_t leaves_;
    std::vector<Node> nodes_;
    Ranges found_;

    template <class Body>
    void for_each_whole(const Lifetime& life, const Body& body) {
        for (size_t n = leaves_ + size_t(life.first), end = leaves_ + size_t(life.last) + 1; n < end;
             n /= 2, end /= 2) {
            if (n % 2) body(nodes_[n++]);
            if (end % 2) body(nodes_[--end]);
        }
    }
    // All nodes above the first and the last op, some of them within the whole ones, where that does no harm.
    template <class Body>
    void for_each_part(const Lifetime& life, const Body& body) {
        for (size_t n = leaves_ + size_t(life.first), last = leaves_ + size_t(life.last); n > 0; n /= 2, last /= 2) {
            body(nodes_[n]);
            if (last != n) body(nodes_[last]);
        }
    }
    static void cover(Ranges& ranges, AddressRange range) {
        auto at = std::lower_bound(ranges.begin(), ranges.end(), range);
        if (at != ranges.begin() && std::prev(at)->second >= range.first) range.first = (--at)->first;
        auto end = at;
        for (; end != ranges.end() && end->first <= range.second; ++end)
            range.second = std::max(range.second, end->second);
        if (at == end) ranges.insert(at, range);
        else *at = range, ranges.erase(at + 1, end);
    }
};

inline int64_t aligned_bytes(const Lifetime& t) { return round_up(t.bytes, arena_alignment); }

// Places the tensors in the given order; returns the end of the highest one. `op_count` bounds first and last.
inline int64_t place_in_order(std::vector<Lifetime>& tensors, const std::vector<size_t>& order, int op_count) {
    int64_t end = 0;
    TakenAddresses taken(op_count);
    for (size_t i : order) {
        Lifetime& t = tensors[i];
        t.offset = taken.lowest_free(t, aligned_bytes(t));
        const AddressRange range{t.offset, t.offset + aligned_bytes(t)};
        taken.take(t, range);
        end = std::max(end, range.second);
    }
    return end;
}

inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count) {
    ArenaSize size;
    std::vector<int64_t> change(size_t(op_count) + 1);
    for (const Lifetime& t : tensors) {
        change[size_t(t.first)] += aligned_bytes(t);
        change[size_t(t.last) + 1] -= aligned_bytes(t);
    }
    int64_t live = 0;
    for (int64_t c : change) size.live_peak = std::max(size.live_peak, live += c);

    // Few attempts, and fewer where each takes long: some milliseconds for a thousand tensors. More as long as over 2 %
    // are lost, as in some small plans. Tensors move forward by another part of the order each time (multiples of the
    // golden ratio spread evenly), so that attempts do not go in circles.
    const int64_t count = std::max<int64_t>(1, int64_t(tensors.size()));
    const int64_t few = std::clamp<int64_t>(8'000 / count, 2, 16), most = std::clamp<int64_t>(50'000 / count, 2, 1000);
    std::vector<size_t> order(tensors.size());
    std::vector<double> place(tensors.size());  // in the order by size, as it changes
    std::iota(order.begin(), order.end(), 0);
    const auto in_order_of = [&](const auto& value) {
        std::sort(order.begin(), order.end(),
                  [&](size_t a, size_t b) { return std::pair(value(a), a) < std::pair(value(b), b); });
    };
    std::vector<Lifetime> attempt = tensors;
    for (int64_t n = 0; n < few || (n < most && size.bytes > size.live_peak + size.live_peak / 50); ++n) {
        if (n == 0) {
            in_order_of([&](size_t i) { return -tensors[i].bytes; });
            for (size_t i = 0; i < order.size(); ++i) place[order[i]] = double(i);
        } else if (n == 1) {
            in_order_of([&](size_t i) { return tensors[i].first - tensors[i].last; });
        } else {
            in_order_of([&](size_t i) { return place[i]; });
        }
        const int64_t bytes = place_in_order(attempt, order, op_count);
        if (n == 0 || bytes < size.bytes) {
            tensors = attempt;
            size.bytes = bytes;
        }
        if (bytes == size.live_peak) break;
        if (n == 1) continue;
        const double step = double(count) * std::fmod(0.618034 * double(n + 1), 1.0);
        for (size_t i = 0; i < attempt.size(); ++i)
            if (attempt[i].offset + aligned_bytes(attempt[i]) > size.live_peak) place[i] -= step;
    }
    return size;
}
