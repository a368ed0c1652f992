// When each op ran: every rank records its events, which are gathered, merged and written as JSON for Perfetto
// (ui.perfetto.dev) or chrome://tracing, and as a picture. `plan` writes the same keys about what it simulates.
#pragma once

#include <cstring>
#include <span>

#include "llmc/io/json.h"
#include "llmc/pipeline/draw.h"
#include "llmc/pipeline/event.h"
#include "llmc/pipeline/simulate.h"

// The events of one rank. An event costs one append to memory that was reserved before.
class TraceRecorder {
public:
    explicit TraceRecorder(size_t expected_events) { events_.reserve(expected_events); }

    // Times in seconds since a moment that all ranks share.
    void record(EventKind kind, const Op& op, double start, double end, int64_t bytes = 0) {
        events_.push_back({kind, op, 1e3 * start, 1e3 * end, bytes});
    }
    const std::vector<TraceEvent>& events() const { return events_; }

private:
    std::vector<TraceEvent> events_;
};

// Events as a string of bytes, to be gathered from other ranks of the same program, and back.
inline std::string pack_events(std::span<const TraceEvent> events) {
    return {reinterpret_cast<const char*>(events.data()), events.size_bytes()};
}
inline std::vector<TraceEvent> unpack_events(const std::string& bytes) {
    std::vector<TraceEvent> events(bytes.size() / sizeof(TraceEvent));
    if (!events.empty()) std::memcpy(static_cast<void*>(events.data()), bytes.data(), bytes.size());
    return events;
}

// The events of a plan; message_bytes(send or receive).
template <class MessageBytes>
std::vector<std::vector<TraceEvent>> planned_events(const OpLists& lists, const Timeline& timeline,
                                                    MessageBytes message_bytes) {
    std::vector<std::vector<TraceEvent>> ranks(lists.size());
    for (size_t r = 0; r < lists.size(); ++r)
        for (size_t i = 0; i < lists[r].size(); ++i) {
            const Op& op = lists[r][i];
            const Span span = timeline.spans[r][i];
            const EventKind kind = op.kind == Kind::compute ? EventKind::compute
                                   : op.kind == Kind::send  ? EventKind::send
                                                            : EventKind::receive;
            ranks[r].push_back({kind, op, span.start, span.end, op.kind == Kind::compute ? 0 : message_bytes(op)});
        }
    return ranks;
}

// What the events of all ranks amount to, in ms.
struct StepTimes {
    double step = 0;     // until the last op has ended, from time 0
    double busiest = 0;  // sum of the ops of the rank where that is most
    double bubble = 0;   // part of all ranks' time in which they do not compute
};

inline StepTimes step_times(const std::vector<std::vector<TraceEvent>>& ranks) {
    StepTimes times;
    double all = 0;
    for (const std::vector<TraceEvent>& events : ranks) {
        double busy = 0;
        for (const TraceEvent& event : events) {
            if (event.kind != EventKind::compute) continue;
            busy += event.end - event.start;
            times.step = std::max(times.step, event.end);
        }
        times.busiest = std::max(times.busiest, busy);
        all += busy;
    }
    if (times.step > 0) times.bubble = 1 - all / (times.step * double(ranks.size()));
    return times;
}

// The keys of an event that traces and plans share. Ops at the ends of the model have no layer, computation no peer.
inline nlohmann::json event_json(const TraceEvent& event) {
    static const char* const kinds[] = {"compute", "send", "recv", "wait"};
    static const char* const passes[] = {"F", "B", "W"};
    const Op& op = event.op;
    nlohmann::json json = {
        {"kind", kinds[int(event.kind)]}, {"op", op.kind == Kind::compute ? part_name(op.part) : message_name(op)},
        {"pass", passes[int(op.pass)]},   {"chunk", op.chunk},
        {"start_ms", event.start},        {"end_ms", event.end}};
    if (op.layer >= 0) json["layer"] = op.layer;
    if (op.peer >= 0) json["peer"] = op.peer;
    if (op.batch >= 0) json["batch"] = op.batch;
    if (op.pieces > 1) json["piece"] = op.piece + 1, json["pieces"] = op.pieces;
    if (event.bytes > 0) json["bytes"] = event.bytes;
    return json;
}

// A process for each rank, with a thread for its computation and its waits, and as many as it takes for the messages
// that are under way at the same time.
inline std::string trace_json(const std::vector<std::vector<TraceEvent>>& ranks) {
    nlohmann::json list = nlohmann::json::array();
    const auto name = [&](size_t rank, const char* what, size_t thread, const std::string& text) {
        list.push_back({{"ph", "M"}, {"name", what}, {"pid", rank}, {"tid", thread}, {"args", {{"name", text}}}});
    };
    for (size_t r = 0; r < ranks.size(); ++r) {
        std::vector<TraceEvent> events = ranks[r];
        std::stable_sort(events.begin(), events.end(),
                         [](const TraceEvent& a, const TraceEvent& b) { return a.start < b.start; });
        std::vector<double> free_from = {0};  // [thread]
        for (const TraceEvent& event : events) {
            const bool message = event.kind == EventKind::send || event.kind == EventKind::receive;
            size_t thread = message;
            while (message && thread < free_from.size() && free_from[thread] > event.start) ++thread;
            free_from.resize(std::max(free_from.size(), thread + 1));
            free_from[thread] = event.end;
            list.push_back({{"ph", "X"},
                            {"name", (event.kind == EventKind::wait ? "wait for " : "") + op_name(event.op)},
                            {"cat", message                         ? "message"
                                    : event.kind == EventKind::wait ? "wait"
                                                                    : "compute"},
                            {"pid", r},
                            {"tid", thread},
                            {"ts", 1e3 * event.start},  // microseconds
                            {"dur", 1e3 * (event.end - event.start)},
                            {"args", event_json(event)}});
        }
        name(r, "process_name", 0, "rank " + std::to_string(r));
        for (size_t thread = 0; thread < free_from.size(); ++thread)
            name(r, "thread_name", thread, thread == 0 ? "compute" : "messages " + std::to_string(thread));
    }
    return json_text({{"displayTimeUnit", "ms"}, {"traceEvents", std::move(list)}}, 0) + "\n";
}

// FILE and FILE.svg.
inline void write_trace(const std::string& path, const Picture& picture) {
    write_file(path, trace_json(picture.ranks));
    write_file(path + ".svg", svg_picture(picture));
}
