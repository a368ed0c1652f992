// The schedules by name, and what each cannot run.
#pragma once

#include "llmc/pipeline/schedules/gpipe.h"
#include "llmc/pipeline/schedules/helix.h"
#include "llmc/pipeline/schedules/interleaved.h"
#include "llmc/pipeline/schedules/one_f_one_b.h"
#include "llmc/pipeline/schedules/seq1f1b.h"
#include "llmc/pipeline/schedules/zero_bubble.h"

struct Schedule {
    std::string name;
    OpLists (*lists)(const ScheduleInput&);
    // The rank that runs a part and holds its parameters. Only the attentions of helix depend on the chunk.
    int (*owner)(const ScheduleInput&, Part part, int layer, int chunk);
    bool trains = true;  // else it is there for planning and rehearsing
};

inline const std::vector<Schedule>& schedules() {
    static const std::vector<Schedule> all = {
        {"gpipe", gpipe_schedule, stage_owner}, {"1f1b", one_f_one_b_schedule, stage_owner},
        {"zb-h1", zb_h1_schedule, stage_owner}, {"interleaved", interleaved_schedule, stage_owner},
        {"zb-h2", zb_h2_schedule, stage_owner}, {"seq1f1b", seq1f1b_schedule, stage_owner, false},
        {"helix", helix_schedule, helix_owner},
    };
    return all;
}

// Null if there is none of that name.
inline const Schedule* find_schedule(const std::string& name) {
    for (const Schedule& schedule : schedules())
        if (schedule.name == name) return &schedule;
    return nullptr;
}

// Why a schedule cannot run this, empty if it can. Any number of ranks, layers and chunks will do.
inline std::string refusal(const Schedule& schedule, const ScheduleInput& in) {
    const std::string& name = schedule.name;
    if (std::min({in.ranks, in.layers, in.chunks, in.folds, in.virtual_stages, in.slices}) < 1)
        return name + " needs at least one rank, layer, chunk, fold, virtual stage and slice";
    if (in.virtual_stages > 1 && name != "interleaved")
        return name + " has one stage a rank: take --schedule interleaved for " + std::to_string(in.virtual_stages) +
               " virtual stages";
    const bool in_reverse = name == "gpipe" || (name == "seq1f1b" && in.slices > 1);
    if (in.sliced && in.ranks > 1 && !in_reverse)
        return name + " cannot run the slices of a sequence on " + std::to_string(in.ranks) +
               " ranks: take --schedule gpipe, one rank, or chunks as long as the longest sequence";
    return "";
}
