// Addresses for tensors whose lifetimes are known: one after another, each at the lowest address that is free during
// its whole life. Two orders are tried, and the one whose arena ends lower is kept. The largest first: best for
// pipelines, whose messages and kept tensors come and go side by side. The longest-lived first: what is kept for the
// backward pass lies at the bottom like a stack, best for one rank. The end comes out at, or close to, the largest sum
// of bytes alive at once, which is the least possible; `live_peak` tells the difference, and of thousands of tensors
// one of a thousandth is not worth the second order.
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

// Places the tensors in the given order; returns the end of the highest one. `op_count` bounds first and last.
inline int64_t place_in_order(std::vector<Lifetime>& tensors, const std::vector<size_t>& order, int op_count) {
    int64_t end = 0;
    ArenaTree tree(op_count);
    for (size_t i : order) {
        Lifetime& t = tensors[i];
        const int64_t bytes = round_up(t.bytes, arena_alignment);
        t.offset = tree.place(bytes, t.first, t.last);
        end = std::max(end, t.offset + bytes);
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
    size.bytes = place_in_order(tensors, in_order_of([](const Lifetime& t) { return t.bytes; }), op_count);
    if (size.bytes == size.live_peak) return size;
    if (tensors.size() > 1000 && size.bytes - size.live_peak <= size.live_peak / 1000) return size;
    std::vector<Lifetime> other = tensors;
    const auto life = [](const Lifetime& t) { return int64_t(t.last - t.first); };
    if (const int64_t bytes = place_in_order(other, in_order_of(life), op_count); bytes < size.bytes) {
        tensors = std::move(other);
        size.bytes = bytes;
    }
    return size;
}
