// A rank that rehearses: it runs its plan by the schedule loop, over the real transport, and sleeps where a rank that
// trains computes. Its messages are small and tell what they stand for. `train_gpt rehearse` makes one in each thread
// or process.
//
// An op ends at the real clock when its inputs had arrived, plus its duration: the later of the arrival of its message
// and the real end of the op before it on the rank. No time that was simulated comes in.
#pragma once

#include <sys/prctl.h>

#include "llmc/parallel/emulated_links.h"
#include "llmc/parallel/op_loop.h"
#include "llmc/parallel/run.h"

// What travels in place of the result of an op.
struct RehearsalMessage {
    double posted = 0;  // filled in between processes
    Part part{};
    Pass pass{};
    int32_t layer = -1, chunk = -1, piece = 0;
};

class RehearsingRank {
public:
    // `seconds`: [op of the plan] how long it takes, or is under way. `links` are those of thread ranks.
    RehearsingRank(Transport& real, const Plan& plan, std::vector<double> seconds, EmulatedLinks* links)
        : plan_(plan),
          seconds_(std::move(seconds)),
          messages_(plan.ops.size()),
          transport_(with_links(real, links)),
          loop_{*transport_, real.progress, OpClock(opened_.device)} {
        prctl(PR_SET_TIMERSLACK, 1000);  // ns by which the kernel may delay the end of a sleep of this thread
        transport_->attach(opened_.device);
    }
    ~RehearsingRank() {
        if (std::uncaught_exceptions() > 0) transport_->abandon();
        else transport_->detach();
    }
    RehearsingRank(const RehearsingRank&) = delete;

    // One step, which begins on all ranks at the same time. Its events, in ms from then on.
    std::vector<TraceEvent> run() {
        double begin = 0;
        for (const std::string& ready : transport_->all_gather(number_text(seconds_now() + start_delay_)))
            begin = std::max(begin, std::stod(ready));
        sleep_until(begin);
        loop_.trace.emplace(3 * plan_.ops.size());
        loop_.trace_zero = ended_ = begin;
        run_ops(loop_, plan_,
                {.compute = [&](size_t i) { compute(i); },
                 .append_transfers =
                     [&](size_t i, std::vector<Transfer>& transfers) {
                         const Op& op = plan_.ops[i];
                         const bool send = op.kind == Kind::send;
                         messages_[i] = send ? message_of(op) : RehearsalMessage();
                         transfers.push_back({send, op.peer, &messages_[i], int64_t(sizeof(RehearsalMessage))});
                     }});
        return loop_.trace->events();
    }

private:
    static constexpr double start_delay_ = 0.02;  // seconds in which all ranks come to know when to begin

    const Plan& plan_;
    const std::vector<double> seconds_;
    std::vector<RehearsalMessage> messages_;  // [send or receive]
    OpenDevice opened_{1};
    std::unique_ptr<LinkTransport> transport_;
    OpLoop loop_;
    double ended_ = 0;  // when the last op did

    std::unique_ptr<LinkTransport> with_links(Transport& real, EmulatedLinks* links) const {
        std::vector<double> seconds;
        for (size_t i = 0; i < plan_.ops.size(); ++i)
            if (plan_.ops[i].kind != Kind::compute) seconds.push_back(seconds_[i]);
        if (links) return std::make_unique<ThreadLinkTransport>(real, std::move(seconds), *links);
        return std::make_unique<ProcessLinkTransport>(real, std::move(seconds));
    }
    static RehearsalMessage message_of(const Op& op) { return {0, op.part, op.pass, op.layer, op.chunk, op.piece}; }

    void compute(size_t i) {
        for (const size_t receive : plan_.receives_of(i)) {
            const Op& promised = plan_.ops[receive];
            const RehearsalMessage& m = messages_[receive];
            if (m.part != promised.part || m.pass != promised.pass || m.layer != promised.layer ||
                m.chunk != promised.chunk || m.piece != promised.piece)
                throw std::logic_error("the " + op_name(promised) + " has brought something else");
        }
        if (seconds_[i] > 0) sleep_until(std::max(transport_->arrival, ended_) + seconds_[i]);
        ended_ = seconds_now();
    }
};

// All steps of a rehearsal: [step][rank] events, on rank 0; nothing on others.
inline std::vector<std::vector<std::vector<TraceEvent>>> rehearse(RehearsingRank& rank, Transport& transport,
                                                                  int64_t steps) {
    std::vector<std::vector<std::vector<TraceEvent>>> all;
    for (int64_t n = 0; n < steps; ++n) {
        const std::string events = pack_events(rank.run());
        const std::vector<std::string> ranks = transport.all_gather(events);
        if (transport.rank != 0) continue;
        all.emplace_back();
        for (const std::string& text : ranks) all.back().push_back(unpack_events(text));
    }
    return all;
}
