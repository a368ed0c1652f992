// How long a plan takes: start and end of every op, given how long each takes alone. Durations come from measurements
// or from a cost model, this file knows the rules of execution:
//
//   - a rank runs its list in order. A compute op waits for the receive of its input, posting a batch for nothing;
//   - each rank has one queue of batches, first in, first out. A batch is served from the time when it is posted and
//     the one before it is done, until all its messages have arrived;
//   - a message is ready from the time when both its ends are served. Each rank has a link out and a link in, each for
//     one message at a time: a message is under way from the time when it is ready and both links are free. Of those
//     that wait, the one that has been ready for longest goes first, at equal times that of the lowest sender, then
//     receiver. A message that takes no time needs no link.
//
// Time goes from event to event. Whether all ops come to run does not depend on how long they take, for links are given
// back whatever happens, which lets check.h prove it here, with all times zero.
#pragma once

#include <algorithm>
#include <numeric>
#include <queue>
#include <tuple>

#include "llmc/pipeline/schedules/slots.h"

struct Span {
    double start = 0, end = -1;  // end < 0: not yet
};

struct Timeline {
    std::vector<std::vector<Span>> spans;  // [rank][op]; of a send or receive while the message is under way
    std::vector<Span> active;              // [rank] from the start of the first compute op to the end of the last one
    std::vector<double> busy;              // [rank] sum of the compute ops
    std::vector<size_t> stopped;           // [rank] the op that never came to run, the length of the list if all did
    double makespan = 0;

    // Idle time of the busiest rank, and the mean over the ranks.
    double bubble() const { return makespan - *std::max_element(busy.begin(), busy.end()); }
    double mean_bubble() const {
        return makespan - std::accumulate(busy.begin(), busy.end(), 0.0) / double(busy.size());
    }
};

// For each op the index of another one in a list, -1 where there is none: for a compute op of the receive of its input,
// of several pieces the last, for a send or receive of its other end in the list of its peer. The n-th send from one
// rank to another meets the n-th receive there.
inline std::vector<std::vector<int>> link_ops(const OpLists& lists, const ScheduleInput& in) {
    struct Place {
        int rank = -1, op = -1;
    };
    const ChainIndex index = chain_index(lists, in);
    const size_t p = lists.size();
    std::vector<Place> receive(index.size());    // of the result of [op]
    std::vector<std::vector<int>> sends(p * p);  // [from][to], then those not yet met
    std::vector<size_t> met(p * p);
    std::vector<std::vector<int>> links(p);
    for (size_t r = 0; r < p; ++r) {
        links[r].assign(lists[r].size(), -1);
        for (size_t i = 0; i < lists[r].size(); ++i)
            if (const Op& op = lists[r][i]; op.kind == Kind::send) sends[r * p + size_t(op.peer)].push_back(int(i));
    }
    for (size_t r = 0; r < p; ++r)
        for (size_t i = 0; i < lists[r].size(); ++i) {
            const Op& op = lists[r][i];
            if (op.kind == Kind::send) continue;
            if (op.kind == Kind::compute) {
                if (op.pass == Pass::W || index.chain.position(op) == 0) continue;
                if (const Place from = receive[index.input(op)]; from.rank == int(r)) links[r][i] = from.op;
            } else {
                receive[index(op)] = {int(r), int(i)};
                const size_t pair = size_t(op.peer) * p + r;
                if (met[pair] == sends[pair].size()) continue;
                links[r][i] = sends[pair][met[pair]++];
                links[size_t(op.peer)][size_t(links[r][i])] = int(i);
            }
        }
    return links;
}

// What a compute op waits for: the message with its input, or, as with NCCL, where a batch is one kernel, all of its
// batch.
enum class Waiting { message, batch };

// compute_time(op) and message_time(send, rank that sends) in any unit.
template <class ComputeTime, class MessageTime>
Timeline simulate(const OpLists& lists, const ScheduleInput& in, ComputeTime compute_time, MessageTime message_time,
                  Waiting waiting = Waiting::message) {
    struct Rank {
        size_t next = 0;                       // op to run
        size_t batch = 0, after = 0;           // the batch being served, [batch, after); all before it are done
        int open = 0;                          // its messages that have not arrived
        double free = 0;                       // end of the ops that run
        bool sends = false, receives = false;  // its links are taken
    };
    struct Message {
        double ready;
        size_t from, to, send, receive;  // ranks, and ops in their lists

        auto order() const { return std::tie(ready, from, to, send); }
    };
    struct Event {  // the ops of a rank end, or a message that it sends has arrived
        double time;
        size_t rank;
        ptrdiff_t send;  // -1: ops

        bool operator<(const Event& other) const { return time > other.time; }  // the earliest is on top of the queue
    };
    const std::vector<std::vector<int>> links = link_ops(lists, in);
    std::vector<Rank> ranks(lists.size());
    Timeline out;
    out.active.resize(lists.size());
    out.busy.resize(lists.size());
    for (const std::vector<Op>& list : lists) out.spans.emplace_back(list.size());
    double now = 0;
    std::priority_queue<Event> events;
    std::vector<size_t> ready;      // ranks that may be able to go on
    std::vector<Message> messages;  // that are ready, and wait for links, in order
    bool links_changed = false;     // a message is new, or a link is free again

    const auto arrived = [&](const Message& m) {
        for (size_t end : {m.from, m.to}) {
            --ranks[end].open;
            ready.push_back(end);
        }
    };
    const auto set_span = [&](const Message& m, Span span) {
        out.spans[m.from][m.send] = out.spans[m.to][m.receive] = span;
    };
    const auto meet = [&](size_t r, size_t i) -> Message {
        const Op& op = lists[r][i];
        const size_t peer = size_t(op.peer), other = size_t(links[r][i]);
        return op.kind == Kind::send ? Message{now, r, peer, i, other} : Message{now, peer, r, other, i};
    };
    // Op i of rank r, a send or receive, is served: its message is ready if the other end is served as well.
    const auto offer = [&](size_t r, size_t i) {
        const Rank& peer = ranks[size_t(lists[r][i].peer)];
        if (links[r][i] < 0 || size_t(links[r][i]) < peer.batch || size_t(links[r][i]) >= peer.after) return;
        const Message m = meet(r, i);
        if (message_time(lists[m.from][m.send], int(m.from)) > 0) {
            messages.push_back(m);
            links_changed = true;
        } else {
            set_span(m, {now, now});
            arrived(m);
        }
    };
    // Serves batches posted on rank r until one has to wait.
    const auto serve = [&](size_t r) {
        Rank& rank = ranks[r];
        const std::vector<Op>& list = lists[r];
        while (rank.open == 0) {
            rank.batch = rank.after;
            while (rank.batch < rank.next && list[rank.batch].kind == Kind::compute) ++rank.batch;
            rank.after = rank.batch;
            if (rank.batch == rank.next) return;
            while (rank.after < list.size() && list[rank.after].kind != Kind::compute &&
                   list[rank.after].batch == list[rank.batch].batch)
                ++rank.after, ++rank.open;
            for (size_t i = rank.batch; i < rank.after; ++i) offer(r, i);
        }
    };
    // When what receive i of rank r brings can be used, negative: not known yet.
    const auto arrival = [&](size_t r, size_t i) {
        double end = out.spans[r][i].end;
        if (waiting == Waiting::message || end < 0) return end;
        const auto same_batch = [&](size_t k) { return k < lists[r].size() && lists[r][k].batch == lists[r][i].batch; };
        for (int step : {-1, 1})
            for (size_t k = i; same_batch(k); k += size_t(step))
                end = out.spans[r][k].end < 0 || end < 0 ? -1 : std::max(end, out.spans[r][k].end);
        return end;
    };
    // Runs rank r on as far as it can from now: through ops whose input is there when they begin, up to the next batch.
    const auto run = [&](size_t r) {
        Rank& rank = ranks[r];
        const std::vector<Op>& list = lists[r];
        serve(r);
        if (rank.free > now) return;
        rank.free = now;
        for (; rank.next < list.size(); ++rank.next) {
            const Op& op = list[rank.next];
            if (op.kind != Kind::compute) {
                if (rank.free > now) break;
                continue;
            }
            if (rank.free == now) serve(r);
            const int input = links[r][rank.next];
            if (input >= 0) {
                const double arrived = arrival(r, size_t(input));
                if (arrived < 0 || arrived > rank.free) break;
            }
            Span& span = out.spans[r][rank.next];
            span.start = rank.free;
            span.end = rank.free = span.start + compute_time(op);
            if (out.active[r].end < 0) out.active[r].start = span.start;
            out.active[r].end = span.end;
            out.busy[r] += span.end - span.start;
        }
        if (rank.free > now) events.push({rank.free, r, -1});
        else serve(r);
    };
    // Messages under way as far as links are free.
    const auto start_messages = [&] {
        std::sort(messages.begin(), messages.end(),
                  [](const Message& a, const Message& b) { return a.order() < b.order(); });
        std::erase_if(messages, [&](const Message& m) {
            if (ranks[m.from].sends || ranks[m.to].receives) return false;
            ranks[m.from].sends = ranks[m.to].receives = true;
            set_span(m, {now, now + message_time(lists[m.from][m.send], int(m.from))});
            events.push({out.spans[m.from][m.send].end, m.from, ptrdiff_t(m.send)});
            return true;
        });
        links_changed = false;
    };
    for (size_t r = lists.size(); r-- > 0;) ready.push_back(r);
    for (;;) {
        while (!ready.empty()) {
            const size_t r = ready.back();
            ready.pop_back();
            run(r);
        }
        if (links_changed) start_messages();
        if (events.empty()) break;
        for (now = events.top().time; !events.empty() && events.top().time == now; events.pop()) {
            const Event event = events.top();
            if (event.send >= 0) {
                const Message m = meet(event.rank, size_t(event.send));
                ranks[m.from].sends = ranks[m.to].receives = false;
                links_changed = true;
                arrived(m);
            } else {
                ready.push_back(event.rank);
            }
        }
    }
    for (size_t r = 0; r < lists.size(); ++r) {
        out.makespan = std::max(out.makespan, out.active[r].end);
        size_t stopped = ranks[r].next;
        if (ranks[r].open > 0)
            for (stopped = ranks[r].batch; out.spans[r][stopped].end >= 0;) ++stopped;
        out.stopped.push_back(stopped);
    }
    return out;
}
