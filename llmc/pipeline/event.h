// When an op ran, or is to run: what is recorded of a step (trace.h), simulated (plan), or measured without computing
// (rehearse), and what pictures show (draw.h).
#pragma once

#include "llmc/pipeline/op.h"

enum class EventKind { compute, send, receive, wait };

// What a rank did for a while. A wait names the send or receive that it waits for.
struct TraceEvent {
    EventKind kind;
    Op op;
    double start, end;  // ms
    int64_t bytes = 0;  // of a message
};
