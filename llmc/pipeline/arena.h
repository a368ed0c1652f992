// Addresses for tensors whose lifetimes are known. Drawn over time, tensors are boxes of given width (their life) and
// height (their bytes) that can only move up and down. They need at least `live_peak`, the largest sum of bytes alive
// at once; make_plan calls assign_offsets, which comes close to it in up to three ways, each tried if the ones before
// leave too much of a gap:
//
// 1. Large plans: tensors of one size that follow each other closely become one box, as in a pipeline's steady state,
//    where each chunk takes the place of one that is done. The few boxes that remain are placed as in 2.
// 2. One box after another, each at the lowest address that is free during its whole life. Largest first suits
//    pipelines, whose messages and kept tensors come and go side by side; longest-lived first suits one rank, since
//    what is kept for the backward pass lies at the bottom like a stack.
// 3. Small plans: boxes are stacked from the bottom up below a height that is given, going back some steps where there
//    is no way on. Boxes that found no room come earlier in the next attempt.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
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

inline int64_t aligned_bytes(const Lifetime& t) { return round_up(t.bytes, arena_alignment); }

using AddressRange = std::pair<int64_t, int64_t>;  // [begin, end)

// Addresses that are taken, as few ranges: of thousands of tensors stacked on one another, one or two remain.
struct AddressSet {
    std::vector<AddressRange> ranges;  // sorted, neither overlapping nor adjacent
    int64_t added = 0;                 // bytes, counted again where they are added again

    void add(AddressRange range) {
        added += range.second - range.first;
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
        // The fullest sets are asked first: they move the address by large steps.
        std::sort(sets_.begin(), sets_.end(), [](auto* a, auto* b) { return a->added > b->added; });
        int64_t offset = 0;
        for (size_t i = 0; i < sets_.size();) {
            const int64_t next = sets_[i]->fit(offset, bytes);
            i = next == offset || i == 0 ? i + 1 : 0;
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

// The numbers below `count`, those with the smallest value first, of the same value in their own order.
inline std::vector<size_t> order_by(size_t count, const auto& value) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return value(a) < value(b); });
    return order;
}

// Places each box of the order at the lowest address that is free.
inline void place_in_order(std::vector<Lifetime>& boxes, const std::vector<size_t>& order, int op_count) {
    ArenaTree tree(op_count);
    for (size_t i : order) boxes[i].offset = tree.place(aligned_bytes(boxes[i]), boxes[i].first, boxes[i].last);
}

// Tensors of one size become one box where one begins soon after another ends, as long as no more than `live_peak`
// bytes are alive then, this gap included. Fills the box of each tensor.
inline std::vector<Lifetime> join_successors(const std::vector<Lifetime>& tensors, std::vector<int64_t> live,
                                             int64_t live_peak, std::vector<size_t>& box_of) {
    std::vector<Lifetime> boxes;
    std::set<std::pair<int, size_t>> ends;  // last op, box: of those of one size that can be continued
    box_of.resize(tensors.size());
    for (size_t i :
         order_by(tensors.size(), [&](size_t t) { return std::pair(-tensors[t].bytes, tensors[t].first); })) {
        const Lifetime& t = tensors[i];
        const int64_t bytes = aligned_bytes(t);
        if (boxes.empty() || boxes.back().bytes != t.bytes) ends.clear();
        const auto joins = [&](const Lifetime& box) {
            const auto begin = live.begin() + box.last + 1, end = live.begin() + t.first;
            return 16 * (end - begin) <= std::min(t.last - t.first, box.last - box.first) + 1 &&
                   std::all_of(begin, end, [&](int64_t alive) { return alive + bytes <= live_peak; });
        };
        auto latest = ends.lower_bound({t.first, 0});  // the one before it is the latest to end before t
        if (latest != ends.begin() && joins(boxes[(--latest)->second])) {
            Lifetime& box = boxes[box_of[i] = latest->second];
            for (int op = box.last + 1; op < t.first; ++op) live[size_t(op)] += bytes;
            box.last = t.last;
            ends.erase(latest);
        } else {
            box_of[i] = boxes.size();
            boxes.push_back(t);
        }
        ends.insert({t.last, box_of[i]});
    }
    return boxes;
}

// Boxes stacked from the bottom up, below a given height. A box can lie no lower than its floor: the end of the highest
// one below it with which it shares an op. Boxes are taken in the order of their addresses, each at its floor, which
// misses no solution, since boxes of any solution can be let down to their floors. So what is still to come at an op
// lies above the last box taken and above the lowest of its own floors, and there is no way on as soon as its bytes do
// not fit between there and the height: a gap that cannot be afforded is found out when it is closed.
class Stacking {
public:
    Stacking(std::vector<Lifetime>& boxes, const std::vector<int64_t>& live)
        : boxes_(boxes), live_(live), beside_(boxes.size()), rank_(boxes.size()), lowest_(live.size()) {
        for (size_t a = 0; a < boxes.size(); ++a)
            for (size_t b = 0; b < a; ++b)
                if (boxes[a].first <= boxes[b].last && boxes[b].first <= boxes[a].last)
                    beside_[a].push_back(b), beside_[b].push_back(a);
    }

    // Finds offsets below `height` or gives up. Boxes with the same floor are taken in an order that changes: after a
    // failure those without room move forward, by another part of the order each time (multiples of the golden ratio
    // spread evenly), so that attempts do not go in circles. Two orders take turns, at first by area and by life.
    // `budget`: floors compared, a few thousand a microsecond.
    bool search(int64_t height, int64_t budget) {
        const size_t count = boxes_.size();
        const auto life = [&](size_t i) { return int64_t(boxes_[i].last - boxes_[i].first + 1); };
        int64_t step_cost = 0;
        for (size_t i = 0; i < count; ++i) step_cost += life(i) + 8;
        std::vector<double> places[2] = {std::vector<double>(count), std::vector<double>(count)};
        for (const bool area : {true, false}) {
            const std::vector<size_t> order = order_by(
                count, [&](size_t i) { return std::pair(-life(i) * (area ? boxes_[i].bytes : 1), -boxes_[i].bytes); });
            for (size_t i = 0; i < count; ++i) places[area ? 0 : 1][order[i]] = double(i);
        }
        for (int n = 0; n < 400 && budget > 0; ++n) {
            std::vector<double>& place = places[n % 2];
            const std::vector<size_t> order = order_by(count, [&](size_t i) { return place[i]; });
            for (size_t i = 0; i < count; ++i) rank_[order[i]] = int64_t(i);
            const int64_t steps = int64_t(count) + 100;
            height_ = height, steps_ = steps, most_taken_ = -1;
            floor_.assign(count, 0), to_come_ = live_;
            if (stack({0, -1}, 0)) return true;
            budget -= (steps - std::max<int64_t>(steps_, 0)) * step_cost;
            const double forward = double(count) * std::fmod(0.618034 * double(n / 2 + 1), 1.0);
            for (size_t i : stuck_) place[i] -= forward;
        }
        return false;
    }

private:
    using Turn = std::pair<int64_t, int64_t>;  // floor, rank
    static constexpr int64_t never = std::numeric_limits<int64_t>::max() / 2, taken = -1;

    // Stacks what is still to come, all of it later in turn than `before`. `count` boxes are taken already.
    bool stack(Turn before, int64_t count) {
        if (count == int64_t(boxes_.size())) return true;
        if (--steps_ < 0) return false;
        std::fill(lowest_.begin(), lowest_.end(), never);
        for (size_t i = 0; i < boxes_.size(); ++i)
            if (const int64_t floor = floor_[i]; floor != taken)
                for (int op = boxes_[i].first; op <= boxes_[i].last; ++op)
                    lowest_[size_t(op)] = std::min(int64_t(lowest_[size_t(op)]), floor);
        int64_t most_to_come = 0;
        for (size_t op = 0; op < live_.size(); ++op) {
            if (to_come_[op] == 0) continue;
            if (std::max(lowest_[op], before.first) + to_come_[op] > height_) return give_up(int(op), count);
            most_to_come = std::max(most_to_come, to_come_[op]);
        }
        const std::vector<int64_t> floors = floor_;
        while (steps_ >= 0) {
            size_t next = boxes_.size();
            Turn turn(height_ - most_to_come, never);  // what begins higher leaves no room for the most that is to come
            for (size_t i = 0; i < boxes_.size(); ++i)
                if (const Turn its(floor_[i], rank_[i]); before < its && its < turn) next = i, turn = its;
            if (next == boxes_.size()) return false;
            Lifetime& t = boxes_[next];
            t.offset = floor_[next];
            floor_[next] = taken;
            for (int op = t.first; op <= t.last; ++op) to_come_[size_t(op)] -= aligned_bytes(t);
            for (size_t other : beside_[next])
                if (floor_[other] != taken) floor_[other] = std::max(floor_[other], t.offset + aligned_bytes(t));
            if (stack(turn, count + 1)) return true;
            for (int op = t.first; op <= t.last; ++op) to_come_[size_t(op)] += aligned_bytes(t);
            floor_ = floors;
            before = turn;
        }
        return false;
    }

    bool give_up(int op, int64_t count) {
        if (count <= most_taken_) return false;
        most_taken_ = count;
        stuck_.clear();
        for (size_t i = 0; i < boxes_.size(); ++i)
            if (floor_[i] != taken && boxes_[i].first <= op && op <= boxes_[i].last) stuck_.push_back(i);
        return false;
    }

    std::vector<Lifetime>& boxes_;
    const std::vector<int64_t>& live_;         // [op] bytes
    std::vector<std::vector<size_t>> beside_;  // [box] those that share an op with it
    std::vector<int64_t> rank_, floor_;        // [box] place in the order; lowest address, or `taken`
    std::vector<int64_t> to_come_, lowest_;    // [op] bytes of the boxes to come, the lowest of their floors
    std::vector<size_t> stuck_;                // boxes to come at the op where there was no way on
    int64_t height_ = 0, steps_ = 0, most_taken_ = 0;
};

// `op_count` bounds first and last. An arena of at most `enough` bytes need not be any smaller.
inline ArenaSize assign_offsets(std::vector<Lifetime>& tensors, int op_count, int64_t enough = 0) {
    // Only those ops count at which a tensor is created: most bytes are alive at one of them.
    std::vector<int> begun(size_t(op_count) + 1);  // such ops before this one
    for (const Lifetime& t : tensors) begun[size_t(t.first) + 1] = 1;
    std::partial_sum(begun.begin(), begun.end(), begun.begin());
    std::vector<Lifetime> boxes = tensors;
    std::vector<int64_t> live(size_t(begun.back()) + 1);
    for (Lifetime& t : boxes) {
        t.first = begun[size_t(t.first)], t.last = begun[size_t(t.last) + 1] - 1;
        live[size_t(t.first)] += aligned_bytes(t);
        live[size_t(t.last) + 1] -= aligned_bytes(t);
    }
    std::partial_sum(live.begin(), live.end(), live.begin());
    const int64_t live_peak = *std::max_element(live.begin(), live.end());

    // A loss of a thousandth is not worth a search, nor, of thousands of tensors, another attempt.
    const bool large = tensors.size() > 1000;
    const int64_t good = std::max(enough, live_peak + (large ? live_peak / 1000 : 0));
    ArenaSize size{std::numeric_limits<int64_t>::max(), live_peak};
    const auto keep_if_smaller = [&] {
        int64_t bytes = 0;
        for (const Lifetime& t : boxes) bytes = std::max(bytes, t.offset + aligned_bytes(t));
        if (bytes >= size.bytes) return;
        size.bytes = bytes;
        for (size_t i = 0; i < boxes.size(); ++i) tensors[i].offset = boxes[i].offset;
    };
    if (large) {
        std::vector<size_t> box_of;
        std::vector<Lifetime> joined = join_successors(boxes, live, live_peak, box_of);
        place_in_order(joined, order_by(joined.size(), [&](size_t i) { return -joined[i].bytes; }), begun.back());
        for (size_t i = 0; i < boxes.size(); ++i) boxes[i].offset = joined[box_of[i]].offset;
        keep_if_smaller();
    }
    for (const bool by_size : {true, false}) {
        if (size.bytes <= good) return size;
        place_in_order(
            boxes,
            order_by(boxes.size(),
                     [&](size_t i) { return by_size ? -boxes[i].bytes : int64_t(boxes[i].first - boxes[i].last); }),
            begun.back());
        keep_if_smaller();
    }
    if (large || size.bytes <= live_peak + live_peak / 1000) return size;

    // Within 2 % and then without any gap; tens of milliseconds while more than 2 % are lost, then a few.
    const int64_t loose = live_peak + live_peak / 50;
    Stacking stacking(boxes, live);
    for (const int64_t height : {loose, live_peak}) {
        if (size.bytes <= std::max(good, height)) continue;
        if (!stacking.search(height, size.bytes > loose ? 300'000'000 : 10'000'000)) break;
        keep_if_smaller();
    }
    return size;
}
