// What a rank is doing now, for those who watch it: the watchdog (watchdog.h), SIGQUIT. The rank writes, at the cost of
// reading a clock and storing a few words; any thread reads.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <type_traits>

#include "llmc/clock.h"
#include "llmc/pipeline/op.h"

enum class Activity : int32_t {
    nothing,    // not watched: before the start, after the end
    computing,  // an op
    busy,       // with something that is no op
    waiting,    // for one transfer
    meeting,    // in a collective, which waits for all ranks
};

// How a rank is, as it tells others.
struct Report {
    Activity activity = Activity::nothing;
    int32_t peer = -1;              // whom it waits for, or in an op, to whom it sends next
    double seconds = 0, limit = 0;  // so long, and how long at most
    char text[112] = "start-up";    // "attention layer 3 chunk 5", "waits for X layer 2 chunk 1 from rank 0"

    bool works() const { return activity == Activity::computing || activity == Activity::busy; }
    bool waits() const { return activity == Activity::waiting || activity == Activity::meeting; }
};

class Progress {
public:
#ifdef USE_CUDA  // where the host is behind a full queue of the GPU's work when it comes to an op
    std::atomic<double> least_limit = 120;  // seconds
#else
    std::atomic<double> least_limit = 10;  // seconds; more where ops are known to be slow
#endif

    // `peer`: to whom the rank sends next, -1 if to nobody. `work` of an attention: FLOPs, in any unit, of which ops of
    // chunks that hold other documents have more or fewer; 0 if not known.
    void computing(const Op& op, int peer = -1, double work = 0) {
        State state{.activity = Activity::computing, .op = op, .work = work};
        state.op.peer = peer;
        begin(state);
    }
    void waiting(const Op& transfer) { begin({.activity = Activity::waiting, .op = transfer}); }
    // `what` is a literal: "optimizer", "saving a checkpoint".
    void busy_with(const char* what) { begin({.activity = Activity::busy, .what = what}); }
    void nothing() { begin({}); }

    // From here to resume() it waits for all ranks, at whatever it was doing.
    auto meet() {
        const State before = state_;
        begin({.activity = Activity::meeting, .what = before.what ? before.what : "the end of its ops"});
        return before;
    }
    template <class State>
    void resume(const State& before) {
        begin(before);
    }

    std::string text() const { return text(read()); }

    // A rank may be in one op for 5 times the slowest of the last 100 of its kind, and least_limit; `hang_timeout`
    // seconds where that is not known yet, or where it is busy with something else. Attention, whose work grows with
    // the square of a document, may also take 5 times as long as its work did at the slowest rate, and never more than
    // `hang_timeout`: the rate is low where documents are so short that other things take the time. A wait is judged by
    // the slowest of all kinds and of the waits before it, since large messages take their time on a slow network.
    // `resumed`: time before it does not count, since the process was stopped.
    Report report(double hang_timeout, double resumed = 0) const {
        const State state = read();
        Report report{.activity = state.activity, .seconds = seconds_now() - std::max(state.since, resumed)};
        double slowest = 0, most = INFINITY;  // that is known
        if (state.activity == Activity::computing || state.activity == Activity::waiting) report.peer = state.op.peer;
        if (state.activity == Activity::computing) {
            slowest = durations(state.op).slowest();
            if (state.op.part == Part::attention) {
                const double scaled = state.work * rates_[size_t(state.op.pass)].slowest();
                slowest = scaled > 0 ? std::max(slowest, scaled) : 0;
                most = hang_timeout;
            }
        } else if (state.activity == Activity::waiting) {
            if (waits_.slowest() > 0) {
                slowest = waits_.slowest();
                for (const auto& passes : durations_)
                    for (const Durations& d : passes) slowest = std::max(slowest, d.slowest());
            }
        }
        report.limit = slowest > 0 ? std::min(most, std::max(double(least_limit), 5 * slowest)) : hang_timeout;
        const std::string name = text(state);
        name.copy(report.text, sizeof report.text - 1);
        report.text[std::min(name.size(), sizeof report.text - 1)] = '\0';
        return report;
    }

private:
    struct State {
        Activity activity = Activity::nothing;
        Op op{};
        const char* what = nullptr;
        double since = 0, work = 0;
    };
    static_assert(std::is_trivially_copyable_v<State>);

    struct Durations {  // seconds of the last 100 computes of a kind
        std::array<std::atomic<float>, 100> seconds{};
        std::atomic<int64_t> count = 0;

        void add(double duration) {
            const int64_t n = count.load(std::memory_order_relaxed);
            seconds[size_t(n) % seconds.size()].store(float(duration), std::memory_order_relaxed);
            count.store(n + 1, std::memory_order_relaxed);
        }
        double slowest() const {  // 0 while it is not known
            float slowest = 0;
            if (count.load(std::memory_order_relaxed) < 3) return 0;
            for (const auto& s : seconds) slowest = std::max(slowest, s.load(std::memory_order_relaxed));
            return std::max(double(slowest), 1e-30);
        }
    };

    // The state as words behind a sequence number, which is odd while they change: who reads it unchanged before and
    // after has read a whole state.
    using Words = std::array<uint64_t, (sizeof(State) + 7) / 8>;
    std::atomic<uint64_t> sequence_ = 0;
    std::array<std::atomic<uint64_t>, std::tuple_size_v<Words>> words_{};
    State state_;                                        // the writer's own
    std::array<std::array<Durations, 3>, 5> durations_;  // [part][pass]
    std::array<Durations, 3> rates_;                     // [pass] of attention, seconds by unit of work
    Durations waits_;                                    // for one transfer

    Durations& durations(const Op& op) { return durations_[size_t(op.part)][size_t(op.pass)]; }
    const Durations& durations(const Op& op) const { return durations_[size_t(op.part)][size_t(op.pass)]; }

    void begin(State state) {
        state.since = seconds_now();
        if (state_.activity == Activity::computing) {
            durations(state_.op).add(state.since - state_.since);
            if (state_.work > 0) rates_[size_t(state_.op.pass)].add((state.since - state_.since) / state_.work);
        }
        if (state_.activity == Activity::waiting) waits_.add(state.since - state_.since);
        state_ = state;
        Words words{};
        std::memcpy(words.data(), &state, sizeof state);
        const uint64_t sequence = sequence_.load(std::memory_order_relaxed);
        sequence_.store(sequence + 1, std::memory_order_relaxed);
        for (size_t i = 0; i < words.size(); ++i) words_[i].store(words[i], std::memory_order_release);
        sequence_.store(sequence + 2, std::memory_order_release);
    }

    State read() const {
        for (;; std::this_thread::yield()) {
            const uint64_t sequence = sequence_.load(std::memory_order_acquire);
            Words words;
            for (size_t i = 0; i < words.size(); ++i) words[i] = words_[i].load(std::memory_order_acquire);
            if (sequence % 2 || sequence != sequence_.load(std::memory_order_relaxed)) continue;
            if (!sequence) return {};
            State state;
            std::memcpy(static_cast<void*>(&state), words.data(), sizeof state);
            return state;
        }
    }

    static std::string text(const State& state) {
        const std::string receive = "receive of ";
        switch (state.activity) {
            case Activity::nothing:
                break;
            case Activity::computing:
                return op_name(state.op);
            case Activity::busy:
                return state.what;
            case Activity::waiting: {
                const std::string name = op_name(state.op);
                return "waits for " + (name.starts_with(receive) ? name.substr(receive.size()) : "the " + name);
            }
            case Activity::meeting:
                return "waits for all ranks: " + std::string(state.what);
        }
        return "nothing";
    }
};
