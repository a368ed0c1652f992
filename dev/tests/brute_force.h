// A second simulator of op lists, written to share nothing with llmc/pipeline/simulate.h, against which that one is
// tested. Time goes from event to event, and at each of them everything that can start is started. What an op takes is
// looked up by name.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "llmc/pipeline/op.h"

struct BruteForce {
    bool finished = false;
    double makespan = 0;
    std::vector<double> busy, first, last;              // [rank]
    std::vector<std::vector<std::pair<double, double>>> ran;  // [rank][op] start and end of compute ops
};

// compute(op), transfer(op): durations.
template <class Compute, class Transfer>
BruteForce brute_force(const std::vector<std::vector<Op>>& lists, int layers, Compute compute, Transfer transfer) {
    using Name = std::tuple<int, Part, bool, int>;  // chunk, part, forward, layer
    const auto result = [](const Op& op) { return Name{op.chunk, op.part, op.pass == Pass::F, op.layer}; };
    const auto input = [&](const Op& op) -> Name {  // itself if it takes nothing
        const int l = op.layer, c = op.chunk, last = layers - 1;
        if (op.pass == Pass::W) return result(op);
        if (op.pass == Pass::F) switch (op.part) {
                case Part::embed: return result(op);
                case Part::pre: return l == 0 ? Name{c, Part::embed, true, -1} : Name{c, Part::post, true, l - 1};
                case Part::attention: return {c, Part::pre, true, l};
                case Part::post: return {c, Part::attention, true, l};
                case Part::head: return {c, Part::post, true, last};
            }
        switch (op.part) {
            case Part::head: return {c, Part::post, true, last};
            case Part::post: return l == last ? Name{c, Part::head, false, -1} : Name{c, Part::pre, false, l + 1};
            case Part::attention: return {c, Part::post, false, l};
            case Part::pre: return {c, Part::attention, false, l};
            case Part::embed: return {c, Part::pre, false, 0};
        }
        return {};
    };

    struct Rank {
        size_t next = 0;
        double free = 0;                               // end of the op that runs
        std::vector<std::vector<const Op*>> queue;     // batches posted
        size_t head = 0;                               // batch being served
        size_t arrived = 0;                            // of its messages
        std::map<Name, double> received;               // and when
        std::set<Name> expected;                       // all that the list receives
    };
    struct Flight {
        Name what;
        int from, to;
        double end;
    };
    const int p = int(lists.size());
    std::vector<Rank> ranks(static_cast<size_t>(p));
    BruteForce out;
    for (int r = 0; r < p; ++r) {
        out.busy.push_back(0), out.first.push_back(-1), out.last.push_back(-1);
        out.ran.emplace_back(lists[r].size());
        for (const Op& op : lists[r])
            if (op.kind == Kind::receive) ranks[r].expected.insert(result(op));
    }
    std::vector<Flight> flights;
    std::set<Name> flown;
    double now = 0;
    for (;;) {
        for (bool progress = true; progress;) {
            progress = false;
            for (size_t i = 0; i < flights.size();)
                if (flights[i].end <= now) {
                    const Flight f = flights[i];
                    flights.erase(flights.begin() + long(i));
                    ranks[f.to].received[f.what] = f.end;
                    for (int r : {f.from, f.to})
                        if (++ranks[r].arrived == ranks[r].queue[ranks[r].head].size()) ++ranks[r].head, ranks[r].arrived = 0;
                    progress = true;
                } else {
                    ++i;
                }
            for (int r = 0; r < p; ++r) {
                Rank& rank = ranks[r];
                if (rank.head < rank.queue.size())
                    for (const Op* op : rank.queue[rank.head]) {
                        if (op->kind != Kind::send || flown.count(result(*op))) continue;
                        Rank& peer = ranks[op->peer];
                        if (peer.head == peer.queue.size()) continue;
                        for (const Op* other : peer.queue[peer.head])
                            if (other->kind == Kind::receive && other->peer == r && result(*other) == result(*op)) {
                                flown.insert(result(*op));
                                flights.push_back({result(*op), r, op->peer, now + transfer(*op)});
                                progress = true;
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
                    if (rank.expected.count(input(op)) && !rank.received.count(input(op))) break;
                    const double time = compute(op);
                    if (out.first[r] < 0) out.first[r] = now;
                    out.ran[r][rank.next] = {now, now + time};
                    rank.free = now + time;
                    out.last[r] = rank.free;
                    out.busy[r] += time;
                    ++rank.next;
                    progress = true;
                }
            }
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
    out.finished = flights.empty();
    for (int r = 0; r < p; ++r) {
        out.finished = out.finished && ranks[r].next == lists[r].size() && ranks[r].head == ranks[r].queue.size();
        out.makespan = std::max(out.makespan, out.last[r]);
    }
    return out;
}
