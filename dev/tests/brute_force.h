// A second simulator of op lists, written to share nothing with llmc/pipeline/simulate.h, against which that one is
// tested. Time goes from event to event, and at each of them everything that can start is started. What an op takes is
// looked up by name. Slow, and plain.
#pragma once

#include <map>
#include <string>
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
    using Name = std::tuple<std::string, bool, int, int>;  // part, forward, layer, chunk
    const auto name = [](std::string part, bool forward, int layer, int chunk) { return Name{part, forward, layer, chunk}; };
    const auto result = [&](const Op& op) { return name(part_name(op.part), op.pass == Pass::F, op.layer, op.chunk); };
    // The results any of which an op takes: what lies between is at hand.
    const auto inputs = [&](const Op& op) -> std::vector<Name> {
        const int l = op.layer, c = op.chunk, last = layers - 1;
        const std::string part = part_name(op.part);
        if (op.pass == Pass::W) return {};
        if (op.pass == Pass::F) {
            if (part == "embed") return {};
            if (part == "pre") return {l == 0 ? name("embed", true, -1, c) : name("post", true, l - 1, c)};
            if (part == "attention") return {name("pre", true, l, c)};
            if (part == "post") return {name("attention", true, l, c)};
            return {name("post", true, last, c)};
        }
        if (part == "head") return {name("post", true, last, c)};
        if (part == "post") return {l == last ? name("head", false, -1, c) : name("pre", false, l + 1, c)};
        if (part == "attention") return {name("post", false, l, c)};
        if (part == "pre") return {name("attention", false, l, c)};
        return {name("pre", false, 0, c)};
    };

    struct Rank {
        size_t next = 0;
        double free = 0;                               // end of the op that runs
        std::vector<std::vector<const Op*>> queue;     // batches posted
        size_t head = 0;                               // batch being served
        size_t arrived = 0;                            // of its messages
        std::map<Name, double> received;               // and when
        std::map<Name, bool> expected;                 // everything the list receives
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
            if (op.kind == Kind::receive) ranks[r].expected[result(op)] = true;
    }
    std::vector<Flight> flights;
    std::map<std::tuple<int, int, Name>, bool> flown;
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
                        if (op->kind != Kind::send || flown.count({r, op->peer, result(*op)})) continue;
                        Rank& peer = ranks[op->peer];
                        if (peer.head == peer.queue.size()) continue;
                        for (const Op* other : peer.queue[peer.head])
                            if (other->kind == Kind::receive && other->peer == r && result(*other) == result(*op)) {
                                flown[{r, op->peer, result(*op)}] = true;
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
                    bool ready = true;
                    for (const Name& input : inputs(op)) ready = ready && (!rank.expected.count(input) || rank.received.count(input));
                    if (!ready) break;
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
