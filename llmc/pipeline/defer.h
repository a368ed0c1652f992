// Weight gradients in idle time: what zero bubble (Qi et al. 2024) does by a fixed pattern, for any lists. The backward
// of a post is split, B passes the gradient on, and W, the gradients of its weights, for which no other rank waits,
// runs where the rank would idle. That shortens the way through the pipeline, too, wherever others wait for that B.
//
// Where ranks idle is read off a simulation. Moving work changes that, so it is done in rounds, from the end of the
// step backwards, filling each time only a part of what is idle; the lists with the shortest step are kept.
#pragma once

#include "llmc/pipeline/simulate.h"

// The lists with W deferred where that shortens the step. op_ms, message_ms: as for simulate(). may_split(op): whether
// the backward of this post may be split.
template <class ComputeTime, class MessageTime, class MaySplit>
OpLists defer_weights(OpLists lists, const ScheduleInput& in, const ComputeTime& op_ms, const MessageTime& message_ms,
                      const MaySplit& may_split) {
    constexpr int rounds = 12;
    constexpr double filled = 0.5;  // part of the idle time, in one round
    Timeline now = simulate(lists, in, op_ms, message_ms);
    OpLists best = lists;
    double shortest = now.makespan;
    for (int round = 0; round < rounds; ++round) {
        bool moved = false;
        for (size_t r = 0; r < lists.size(); ++r) {
            const std::vector<Op>& list = lists[r];
            std::vector<size_t> candidates;               // backward ops that could be split, in their order
            std::vector<std::pair<size_t, double>> idle;  // before which op, how long
            double free_since = 0;
            for (size_t i = 0; i < list.size(); ++i) {
                if (list[i].kind != Kind::compute) continue;
                if (const double wait = now.spans[r][i].start - free_since; wait > 0) idle.push_back({i, wait});
                free_since = now.spans[r][i].end;
                if (list[i].part == Part::post && list[i].pass == Pass::B && !list[i].split && may_split(list[i]))
                    candidates.push_back(i);
            }
            idle.push_back({list.size(), now.makespan - free_since});
            std::vector<std::pair<size_t, Op>> weights;  // before which op
            std::vector<bool> split(list.size());
            for (auto gap = idle.rbegin(); gap != idle.rend(); ++gap)
                for (double left = filled * gap->second;;) {
                    while (!candidates.empty() && candidates.back() >= gap->first) candidates.pop_back();
                    if (candidates.empty()) break;
                    Op w = list[candidates.back()];
                    w.pass = Pass::W;
                    if ((left -= op_ms(w)) < 0) break;
                    split[candidates.back()] = true;
                    weights.push_back({gap->first, w});
                    candidates.pop_back();
                }
            if (weights.empty()) continue;
            moved = true;
            std::vector<Op> mine;
            for (size_t i = 0; i <= list.size(); ++i) {
                for (; !weights.empty() && weights.back().first == i; weights.pop_back())
                    mine.push_back(weights.back().second);
                if (i == list.size()) break;
                mine.push_back(list[i]);
                mine.back().split = mine.back().split || split[i];
            }
            lists[r] = std::move(mine);
        }
        if (!moved) break;
        now = simulate(lists, in, op_ms, message_ms);
        if (now.makespan >= shortest) continue;
        shortest = now.makespan;
        best = lists;
    }
    return best;
}
