// What the schedule loop in train_gpt.cu needs to run the ops of one rank: the two things that an op may ask for, and
// the rank's ends of messages, its clock and what it has measured. A rank that trains (rank.h) and one that rehearses
// (rehearsal.h) are both such a loop.
#pragma once

#include <optional>

#include "llmc/parallel/transport.h"
#include "llmc/pipeline/op_clock.h"
#include "llmc/pipeline/plan.h"
#include "llmc/pipeline/trace.h"

// `op` is an index in the list of the plan that runs.
struct OpActions {
    std::function<void(size_t op)> compute;
    // What a send or receive carries.
    std::function<void(size_t op, std::vector<Transfer>& transfers)> append_transfers;
    // How much an attention has to do on a chunk, in any unit, for the watchdog; 0: not known.
    std::function<double(int chunk)> attention_work = [](int) { return 0.0; };
};

struct OpLoop {
    Transport& transport;
    Progress& progress;  // the one that is watched
    OpClock clock;

    double busy_seconds = 0;                  // time spent computing, all in all,
    double post_seconds = 0;                  // and posting messages; between threads that includes copying them
    std::optional<TraceRecorder> trace = {};  // filled by the schedule loop where there is one
    double trace_zero = 0;                    // its time 0 on seconds_now(), about the same moment on all ranks
};
