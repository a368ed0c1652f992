// A second simulator of op lists, written to share nothing with llmc/pipeline/simulate.h, against which that one is
// tested. Time goes from event to event, and at each of them everything that can start is started; then messages that
// take time, one by one, as their links are free. What an op takes is looked up by name.
#pragma once

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "llmc/pipeline/op.h"

struct BruteForce {
    bool finished = false;
    double makespan = 0;
    std::vector<double> busy;                // [rank]
    std::vector<std::vector<double>> start;  // [rank][op] of compute ops
};

// compute(op), transfer(op, sender): durations.
template <class Compute, class Transfer>
BruteForce brute_force(const std::vector<std::vector<Op>>& lists, int layers, Compute compute, Transfer transfer) {
    using Name = int64_t;
    const auto name = [&](Part part, bool forward, int layer, int chunk) {
        return ((Name(chunk) * (layers + 1) + layer + 1) * 5 + int(part)) * 2 + forward;
    };
    constexpr int most_pieces = 8;
    const auto result = [&](const Op& op) {
        return name(op.part, op.pass == Pass::F, op.layer, op.chunk) * most_pieces + op.piece;
    };
    const auto input = [&](const Op& op) -> Name {  // of its first piece; itself if it takes nothing
        const int l = op.layer, c = op.chunk, last = layers - 1;
        const Name own = name(op.part, op.pass == Pass::F, l, c);
        if (op.pass == Pass::W) return own;
        if (op.pass == Pass::F) switch (op.part) {
                case Part::embed:
                    return own;
                case Part::pre:
                    return l == 0 ? name(Part::embed, true, -1, c) : name(Part::post, true, l - 1, c);
                case Part::attention:
                    return name(Part::pre, true, l, c);
                case Part::post:
                    return name(Part::attention, true, l, c);
                case Part::head:
                    return name(Part::post, true, last, c);
            }
        switch (op.part) {
            case Part::head:
                return name(Part::post, true, last, c);
            case Part::post:
                return l == last ? name(Part::head, false, -1, c) : name(Part::pre, false, l + 1, c);
            case Part::attention:
                return name(Part::post, false, l, c);
            case Part::pre:
                return name(Part::attention, false, l, c);
            case Part::embed:
                return name(Part::pre, false, 0, c);
        }
        return -1;
    };

    struct Rank {
        size_t next = 0;
        double free = 0;                            // end of the op that runs
        std::vector<std::vector<const Op*>> queue;  // batches posted
        size_t head = 0;                            // batch being served
        size_t arrived = 0;                         // of its messages
        std::unordered_set<Name> received;
        std::unordered_set<Name> expected;  // all that the list receives
    };
    struct Flight {
        Name what;
        int from, to;
        double end, takes;
    };
    const int p = int(lists.size());
    std::vector<Rank> ranks(static_cast<size_t>(p));
    BruteForce out;
    for (int r = 0; r < p; ++r) {
        out.busy.push_back(0);
        out.start.emplace_back(lists[r].size());
        for (const Op& op : lists[r])
            if (op.kind == Kind::receive) ranks[r].expected.insert(result(op));
    }
    std::vector<Flight> flights;
    struct Wish {  // a message that waits for links
        double since;
        int from, to, place;  // place among the sends of its batch
        Name what;
        double takes;
    };
    std::vector<Wish> wishes;
    std::vector<bool> link_out(static_cast<size_t>(p)), link_in(static_cast<size_t>(p));  // taken
    std::unordered_set<Name> flown;                                                       // or wished for
    double now = 0;
    for (;;) {
        for (bool progress = true; progress;) {
            progress = false;
            for (size_t i = 0; i < flights.size();)
                if (flights[i].end <= now) {
                    const Flight f = flights[i];
                    flights.erase(flights.begin() + long(i));
                    ranks[f.to].received.insert(f.what);
                    if (f.takes > 0) link_out[f.from] = link_in[f.to] = false;
                    for (int r : {f.from, f.to})
                        if (++ranks[r].arrived == ranks[r].queue[ranks[r].head].size())
                            ++ranks[r].head, ranks[r].arrived = 0;
                    progress = true;
                } else {
                    ++i;
                }
            for (int r = 0; r < p; ++r) {
                Rank& rank = ranks[r];
                if (rank.head < rank.queue.size()) {
                    int place = -1;
                    for (const Op* op : rank.queue[rank.head]) {
                        ++place;
                        if (op->kind != Kind::send || flown.count(result(*op))) continue;
                        Rank& peer = ranks[op->peer];
                        if (peer.head == peer.queue.size()) continue;
                        for (const Op* other : peer.queue[peer.head])
                            if (other->kind == Kind::receive && other->peer == r && result(*other) == result(*op)) {
                                flown.insert(result(*op));
                                const double takes = transfer(*op, r);
                                if (takes > 0) wishes.push_back({now, r, op->peer, place, result(*op), takes});
                                else flights.push_back({result(*op), r, op->peer, now, 0});
                                progress = true;
                            }
                    }
                }
                while (rank.next < lists[r].size() && rank.free <= now) {
                    const Op& op = lists[r][rank.next];
                    if (op.kind != Kind::compute) {
                        std::vector<const Op*> batch;
                        const int number = op.batch;
                        for (; rank.next < lists[r].size(); ++rank.next) {
                            const Op& member = lists[r][rank.next];
                            if (member.kind == Kind::compute || member.batch != number) break;
                            batch.push_back(&member);
                        }
                        rank.queue.push_back(batch);
                        progress = true;
                        continue;
                    }
                    bool waits = false;  // for the same piece, or, as a whole, for all of them
                    for (int piece = 0; piece < most_pieces; ++piece) {
                        const Name what = input(op) * most_pieces + piece;
                        if (op.pieces == 1 || piece == op.piece)
                            waits |= rank.expected.count(what) && !rank.received.count(what);
                    }
                    if (waits) break;
                    const double time = compute(op);
                    out.start[r][rank.next] = now;
                    rank.free = now + time;
                    out.busy[r] += time;
                    ++rank.next;
                    progress = true;
                }
            }
        }
        for (;;) {  // of the messages whose links are free, the one that has waited for longest
            size_t best = wishes.size();
            for (size_t i = 0; i < wishes.size(); ++i) {
                const Wish& w = wishes[i];
                if (link_out[w.from] || link_in[w.to]) continue;
                if (best < wishes.size()) {
                    const Wish& b = wishes[best];
                    const bool earlier = w.since != b.since ? w.since < b.since
                                         : w.from != b.from ? w.from < b.from
                                         : w.to != b.to     ? w.to < b.to
                                                            : w.place < b.place;
                    if (!earlier) continue;
                }
                best = i;
            }
            if (best == wishes.size()) break;
            const Wish w = wishes[best];
            wishes.erase(wishes.begin() + long(best));
            link_out[w.from] = link_in[w.to] = true;
            flights.push_back({w.what, w.from, w.to, now + w.takes, w.takes});
        }
        double next = -1;  // the next event
        const auto event = [&](double t) {
            if (t > now && (next < 0 || t < next)) next = t;
        };
        for (const Rank& rank : ranks) event(rank.free);
        for (const Flight& f : flights) event(f.end);
        if (next < 0) break;
        now = next;
    }
    out.finished = flights.empty() && wishes.empty();
    for (int r = 0; r < p; ++r) {
        out.finished = out.finished && ranks[r].next == lists[r].size() && ranks[r].head == ranks[r].queue.size();
        out.makespan = std::max(out.makespan, ranks[r].free);
    }
    return out;
}
