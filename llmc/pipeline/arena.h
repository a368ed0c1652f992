// Addresses for tensors whose lifetimes are known: one after another, each at the lowest address that is free during
// its whole life. What counts is the order. The largest first is best for pipelines, whose messages and kept tensors
// come and go side by side; the longest-lived first for one rank, since what is kept for the backward pass lies at the
// bottom like a stack. Where the arena ends above the largest sum of bytes alive at once (`live_peak`, the least
// possible), the tensors that stick out are moved forward in the order and all are placed again. make_plan calls it.
#pragma once

#include <algorithm>
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

// Addresses that are taken, as few ranges: of thousands of tensors stacked on one another, one or two remain.
struct AddressSet {
    std::vector<AddressRange> ranges;  // sorted, neither overlapping nor adjacent

    void add(AddressRange range) {
        auto at = std::lower_bound(ranges.begin(), ranges.end(), range);
        if (at != ranges.begin() && std::prev(at)->second >= range.first) range.first = (--at)->first;
        auto end = at;
        for (; end != ranges.end() && end->first <= range.second; ++end)
            range.second = std::max(range.second, end->second);
        if (end - at == 1) *at = range;
        else ranges.insert(ranges.erase(at, end), range);
    }
    // The lowest address from `offset` on with so many bytes free behind it.
    int64_t fit(int64_t offset, int64_t bytes) const {
        auto at = std::partition_point(ranges.begin(), ranges.end(),
                                       [&](const AddressRange& range) { return range.second <= offset; });
        for (; at != ranges.end() && at->first < offset + bytes; ++at) offset = at->second;
        return offset;
    }
};

// The addresses taken during any span of ops: a binary tree over the ops. A tensor's life is a handful of whole
// subtrees; their roots know it as living `through` them, they and all nodes above as living `within` them.
class ArenaTree {
public:
    explicit ArenaTree(int op_count) {
        while (leaves_ < size_t(op_count)) leaves_ *= 2;
        through_.resize(2 * leaves_), within_.resize(2 * leaves_);
    }

    // Takes the lowest address that is free from op `first` to op `last`.
    int64_t place(int64_t bytes, int first, int last) {
        roots_.clear(), above_.clear();
        for (size_t l = size_t(first) + leaves_, r = size_t(last) + leaves_ + 1; l < r; l /= 2, r /= 2) {
            if (l % 2) roots_.push_back(l++);
            if (r % 2) roots_.push_back(--r);
        }
        for (size_t l = (size_t(first) + leaves_) / 2, r = (size_t(last) + leaves_) / 2; l > 0; l /= 2, r /= 2) {
            above_.push_back(l);
            if (r != l) above_.push_back(r);
        }
        sets_.clear();
        for (size_t node : roots_)
            if (!within_[node].ranges.empty()) sets_.push_back(&within_[node]);
        for (size_t node : above_)
            if (!through_[node].ranges.empty()) sets_.push_back(&through_[node]);
        int64_t offset = 0;
        for (size_t agreed = 0, i = 0; agreed < sets_.size(); i = (i + 1) % sets_.size()) {
            const int64_t next = sets_[i]->fit(offset, bytes);
            agreed = next == offset ? agreed + 1 : 1;
            offset = next;
        }
        const AddressRange range(offset, offset + bytes);
        for (size_t node : roots_) through_[node].add(range), within_[node].add(range);
        for (size_t node : above_) within_[node].add(range);
        return offset;
    }

private:
    size_t leaves_ = 1;
    std::vector<AddressSet> through_, within_;  // [node]: 1 is the root, 2n and 2n+1 are below n
    std::vector<size_t> roots_, above_;         // of the life at hand
    std::vector<const AddressSet*> sets_;
};

inline int64_t aligned_bytes(const Lifetime& t) { return round_up(t.bytes, arena_alignment); }

// Places the tensors in the given order; returns the end of the highest one. `op_count` bounds first and last.
inline int64_t place_in_order(std::vector<Lifetime>& tensors, const std::vector<size_t>& order, int op_count) {
    int64_t end = 0;
    ArenaTree tree(op_count);
    for (size_t i : order) {
        Lifetime& t = tensors[i];
        t.offset = tree.place(aligned_bytes(t), t.first, t.last);
        end = std::max(end, t.offset + aligned_bytes(t));
    }
    return end;
}

// With at most `enough` bytes it need not be any better.
inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count, int64_t enough = 0) {
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
    // golden ratio spread evenly), so that attempts do not go in circles. Of thousands of tensors a loss of a
    // thousandth is not worth another one.
    const int64_t count = std::max<int64_t>(1, int64_t(tensors.size()));
    const int64_t few = count > 1000 ? 2 : std::clamp<int64_t>(8'000 / count, 2, 16),
                  most = std::clamp<int64_t>(20'000 / count, 2, 1000);
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
        if (bytes <= std::max(enough, size.live_peak)) break;
        if (count > 1000 && bytes - size.live_peak <= size.live_peak / 1000) break;
        if (n == 1) continue;
        const double step = double(count) * std::fmod(0.618034 * double(n + 1), 1.0);
        for (size_t i = 0; i < attempt.size(); ++i)
            if (attempt[i].offset + aligned_bytes(attempt[i]) > size.live_peak) place[i] -= step;
    }
    return size;
}
