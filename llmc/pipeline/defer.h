// Weight gradients in idle time: what zero bubble (Qi et al. 2024) does by a fixed pattern, for any lists. The backward
// of a post is split: B passes the gradient on, and W, the gradients of its weights, for which no other rank waits,
// runs where the rank would idle. That also shortens the way through the pipeline wherever others wait for that B.
//
// Where ranks idle is read off a simulation. Moving work changes that, so it is done in rounds, from the end of the
// step backwards, each of which fills a part of what is idle; the lists with the shortest step are kept.
#pragma once

#include "llmc/pipeline/simulate.h"

// A rank's list with W deferred into the idle time of `timeline`, at most `most_pending` at any op; whether any was.
template <class ComputeTime>
bool defer_on_rank(std::vector<Op>& list, const std::vector<Span>& spans, double makespan, const ComputeTime& op_ms,
                   int most_pending) {
    constexpr double filled = 0.5;  // part of the idle time
    struct Gap {
        size_t before;  // op
        double idle;
    };
    std::vector<Gap> gaps;
    std::vector<size_t> candidates;         // backward ops of post that are whole, in their order
    std::vector<int> pending(list.size());  // W at each op
    double free_since = 0;
    for (size_t i = 0, waiting = 0; i < list.size(); ++i) {
        const Op& op = list[i];
        if (op.kind == Kind::compute) {
            if (const double idle = spans[i].start - free_since; idle > 0) gaps.push_back({i, idle});
            free_since = spans[i].end;
            if (op.part == Part::post && op.pass == Pass::B && !op.split) candidates.push_back(i);
            if (op.part == Part::post && op.pass == Pass::W) --waiting;
            if (op.part == Part::post && op.split) ++waiting;
        }
        pending[i] = int(waiting);
    }
    gaps.push_back({list.size(), makespan - free_since});

    std::vector<std::pair<size_t, Op>> weights;  // before which op
    for (auto gap = gaps.rbegin(); gap != gaps.rend(); ++gap)
        for (double left = filled * gap->idle; !candidates.empty();) {
            const size_t b = candidates.back();
            const auto from = pending.begin() + long(b), to = pending.begin() + long(gap->before);
            if (b >= gap->before || *std::max_element(from, to) >= most_pending) {
                if (b < gap->before) break;
                candidates.pop_back();
                continue;
            }
            Op w = list[b];
            w.pass = Pass::W;
            if ((left -= op_ms(w)) < 0) break;
            for (auto at = from; at != to; ++at) ++*at;
            weights.push_back({gap->before, w});
            list[b].split = true;
            candidates.pop_back();
        }
    std::vector<Op> deferred;
    for (size_t i = 0; i <= list.size(); ++i) {
        for (; !weights.empty() && weights.back().first == i; weights.pop_back())
            deferred.push_back(weights.back().second);
        if (i < list.size()) deferred.push_back(list[i]);
    }
    const bool any = deferred.size() > list.size();
    list = std::move(deferred);
    return any;
}

// op_ms and message_ms as simulate() takes them.
template <class ComputeTime, class MessageTime>
OpLists defer_weights(OpLists lists, const ScheduleInput& in, const ComputeTime& op_ms, const MessageTime& message_ms,
                      int most_pending) {
    Timeline now = simulate(lists, in, op_ms, message_ms);
    OpLists best = lists;
    double shortest = now.makespan;
    for (int round = 0; round < 12; ++round) {
        bool any = false;
        for (size_t r = 0; r < lists.size(); ++r)
            any |= defer_on_rank(lists[r], now.spans[r], now.makespan, op_ms, most_pending);
        if (!any) break;
        now = simulate(lists, in, op_ms, message_ms);
        if (now.makespan >= shortest) continue;
        shortest = now.makespan;
        best = lists;
    }
    return best;
}
