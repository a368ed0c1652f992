// How long a plan takes: start and end of every op, given how long each takes alone. Durations come from measurements
// or from a cost model, this file knows the rules of execution:
//
//   - a rank runs its list in order. A compute op waits for the receive of its input, posting a batch for nothing;
//   - each rank has one queue of batches, first in, first out. A batch is served from the time when it is posted and
//     the one before it is done, until all its messages have arrived;
//   - a message is under way from the time when both its ends are served.
//
// No rule makes a choice, so the times follow by propagation, in time proportional to the number of ops; and whether
// all ops come to run does not depend on how long they take, which lets check.h prove it here.
#pragma once

#include <algorithm>
#include <numeric>

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
// for a send or receive of its other end in the list of its peer. The n-th send from one rank to another meets the n-th
// receive there.
inline std::vector<std::vector<int>> link_ops(const OpLists& lists, const ScheduleInput& in) {
    struct Place {
        int rank = -1, op = -1;
    };
    const Chain chain{in.layers, in.training};
    const size_t p = lists.size(), length = size_t(chain.length());
    std::vector<Place> receive(size_t(in.chunks) * length);  // of the result of [chunk][position]
    std::vector<std::vector<int>> sends(p * p);              // [from][to], then those not yet met
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
            const size_t position = size_t(op.chunk) * length + size_t(chain.position(op));
            if (op.kind == Kind::compute) {
                if (op.pass == Pass::W || position % length == 0) continue;
                if (const Place from = receive[position - 1]; from.rank == int(r)) links[r][i] = from.op;
            } else {
                receive[position] = {int(r), int(i)};
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

// compute_time(op) and message_time(send) in any unit.
template <class ComputeTime, class MessageTime>
Timeline simulate(const OpLists& lists, const ScheduleInput& in, ComputeTime compute_time, MessageTime message_time,
                  Waiting waiting = Waiting::message) {
    struct Rank {
        size_t next = 0;              // op to run
        size_t batch = 0, after = 0;  // the batch being served, [batch, after); all before it are done
        int open = 0;                 // its messages that have not arrived
        double time = 0, comm = 0;    // when compute and the queue are free
    };
    const std::vector<std::vector<int>> links = link_ops(lists, in);
    std::vector<Rank> ranks(lists.size());
    Timeline out;
    out.active.resize(lists.size());
    out.busy.resize(lists.size());
    for (const std::vector<Op>& list : lists) out.spans.emplace_back(list.size());
    std::vector<size_t> ready;  // ranks that may be able to go on

    // Sends the message of op i of rank r, which is served, on its way if the other end is served as well.
    const auto deliver = [&](size_t r, size_t i) {
        const Op& op = lists[r][i];
        const size_t peer = size_t(op.peer), other = size_t(links[r][i]);
        if (links[r][i] < 0 || other >= ranks[peer].after || out.spans[r][i].end >= 0) return;
        Span& here = out.spans[r][i];
        Span& there = out.spans[peer][other];
        here.start = there.start = std::max(here.start, there.start);
        here.end = there.end = here.start + message_time(op.kind == Kind::send ? op : lists[peer][other]);
        for (size_t end : {r, peer}) {
            ranks[end].comm = std::max(ranks[end].comm, here.end);
            --ranks[end].open;
        }
        ready.push_back(peer);
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
            const double since = std::max(rank.comm, out.spans[r][rank.batch].start);
            for (; rank.after < list.size() && list[rank.after].kind != Kind::compute &&
                   list[rank.after].batch == list[rank.batch].batch;
                 ++rank.after, ++rank.open)
                out.spans[r][rank.after].start = since;
            for (size_t i = rank.batch; i < rank.after; ++i) deliver(r, i);
        }
    };
    // When what receive i of rank r brings can be used, negative: not yet.
    const auto arrival = [&](size_t r, size_t i) {
        double end = out.spans[r][i].end;
        if (waiting == Waiting::message || end < 0) return end;
        const auto same_batch = [&](size_t k) { return k < lists[r].size() && lists[r][k].batch == lists[r][i].batch; };
        for (int step : {-1, 1})
            for (size_t k = i; same_batch(k); k += size_t(step))
                end = out.spans[r][k].end < 0 || end < 0 ? -1 : std::max(end, out.spans[r][k].end);
        return end;
    };
    for (size_t r = lists.size(); r-- > 0;) ready.push_back(r);
    while (!ready.empty()) {
        const size_t r = ready.back();
        ready.pop_back();
        Rank& rank = ranks[r];
        serve(r);
        for (; rank.next < lists[r].size(); ++rank.next) {
            const Op& op = lists[r][rank.next];
            Span& span = out.spans[r][rank.next];
            if (op.kind != Kind::compute) {
                span.start = rank.time;
                continue;
            }
            serve(r);
            const int input = links[r][rank.next];
            if (input >= 0) {
                const double arrived = arrival(r, size_t(input));
                if (arrived < 0) break;
                rank.time = std::max(rank.time, arrived);
            }
            span.start = rank.time;
            span.end = rank.time = span.start + compute_time(op);
            if (out.active[r].end < 0) out.active[r].start = span.start;
            out.active[r].end = span.end;
            out.busy[r] += span.end - span.start;
        }
        serve(r);
    }
    for (size_t r = 0; r < lists.size(); ++r) {
        out.makespan = std::max(out.makespan, ranks[r].time);
        size_t stopped = ranks[r].next;
        if (ranks[r].open > 0)
            for (stopped = ranks[r].batch; out.spans[r][stopped].end >= 0;) ++stopped;
        out.stopped.push_back(stopped);
    }
    return out;
}
