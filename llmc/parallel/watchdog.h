// Ends the run when a rank dies or hangs, with one line that names the rank, what it did and who waits for it, and exit
// code 20. A thread of each process looks at its own ranks ten times a second and, between processes, tells the others
// through sockets (side_channel.h), since MPI says nothing of a rank that is gone.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "llmc/parallel/progress.h"
#include "llmc/parallel/side_channel.h"

// A rank, as another sees it.
struct RankStatus {
    enum State {
        present,
        gone,    // has ended well
        failed,  // ends, and says why itself
        dead,    // has ended without a word
    } state = present;
    Report report;
    double heard = 0;  // when the report came

    static constexpr double silence = 10;  // seconds without a report after which a process counts as stopped
    bool answers(double now, double within = silence) const { return state == present && now - heard <= within; }
};

// Who waits for rank r; "" if that is not known.
inline std::string who_waits_for(std::span<const RankStatus> ranks, size_t r) {
    for (size_t i = 0; i < ranks.size(); ++i)
        if (i != r && ranks[i].state == RankStatus::present && ranks[i].report.activity == Activity::waiting &&
            ranks[i].report.peer == int(r))
            return "; rank " + std::to_string(i) + " " + ranks[i].report.text;
    const Report& report = ranks[r].report;
    if (report.activity != Activity::computing || report.peer < 0) return "";
    return "; no rank waits for it yet, the first would be rank " + std::to_string(report.peer);
}

// Why the run must end, "" while it need not. To blame is who computes or does not answer, not who waits for it.
inline std::string cause_of_end(std::span<const RankStatus> ranks, double now) {
    auto name = [](size_t r) { return "rank " + std::to_string(r) + " "; };
    auto seconds = [](double s) { return std::to_string(int64_t(s)) + " s"; };
    auto who_waits = [&](size_t r) {
        const std::string who = who_waits_for(ranks, r);
        return who.empty() ? "; no rank waits for it yet" : who;
    };
    auto last_seen = [](const Report& report) {
        const std::string text = report.text;
        if (report.waits()) return ", last seen waiting" + text.substr(text.find(' '));
        return report.works() ? ", last seen in " + text : "";
    };

    for (size_t r = 0; r < ranks.size(); ++r)
        if (ranks[r].state == RankStatus::dead) return name(r) + "has died" + last_seen(ranks[r].report) + who_waits(r);
    for (size_t r = 0; r < ranks.size(); ++r)
        if (ranks[r].state == RankStatus::present && !ranks[r].answers(now))
            return name(r) + "has not answered for " + seconds(now - ranks[r].heard) + last_seen(ranks[r].report) +
                   who_waits(r);

    size_t slowest = 0, first = ranks.size();
    double excess = 1;     // of the time over its limit
    bool all_wait = true;  // and not just for a moment, as they may while a message is under way
    for (size_t r = 0; r < ranks.size(); ++r) {
        const Report& report = ranks[r].report;
        if (ranks[r].state != RankStatus::present) continue;
        if (report.works() && report.seconds > excess * report.limit) {
            slowest = r;
            excess = report.seconds / report.limit;
        }
        // A rank that has just been stopped seems to wait on: silence will tell.
        const bool late = report.waits() && report.seconds > report.limit;
        const bool passing = report.activity == Activity::meeting ? report.seconds < 1 : report.waits() && !late;
        if (report.works() || passing || !ranks[r].answers(now, 1)) all_wait = false;
        if (late && (first == ranks.size() || report.seconds > ranks[first].report.seconds)) first = r;
    }
    auto text = [&](size_t r) {
        const Report& report = ranks[r].report;
        return std::string(report.text) + " for " + seconds(report.seconds) + " (limit " + seconds(report.limit) + ")";
    };
    if (excess > 1) return name(slowest) + "has been in " + text(slowest) + who_waits(slowest);
    if (all_wait && first < ranks.size()) return "all ranks wait, the first to do so: " + name(first) + text(first);
    return "";
}

class Watchdog {
public:
    // `own`: the ranks of this process, which are all of them unless `processes` is given: then there is one, and every
    // rank makes its watchdog at the same time. `hang_timeout` in seconds, for what no limit is known of.
    Watchdog(std::vector<const Progress*> own, double hang_timeout, Transport* processes = nullptr)
        : own_(std::move(own)), first_(processes ? processes->rank : 0), hang_timeout_(hang_timeout) {
        if (processes) channel_ = std::make_unique<SideChannel>(*processes);
        statuses_.resize(processes ? size_t(processes->ranks) : own_.size());
        // Many processes speak less often, so that beats cost little.
        if (processes) period_ms_ *= int(std::clamp<int64_t>(ceil_div(processes->ranks, 16), 1, 8));
        thread_ = std::thread([this] { watch(); });
    }

    // A process that ends by an exception says so to the others, which leave it to tell why and end after it.
    ~Watchdog() {
        ended_ = true;
        eventfd_write(wake_, 1);
        thread_.join();
        const bool failing = std::uncaught_exceptions() > 0;
        if (channel_) channel_->send({failing ? SideChannel::Kind::failed : SideChannel::Kind::goodbye, {}});
        if (failing) channel_.release();  // open as long as the process lives
        close(wake_);
    }
    Watchdog(const Watchdog&) = delete;

    // From the moment that another process is known to have ended badly, or is ending this run: what is left to do is
    // to end, since the launcher kills within a second.
    bool peer_died() const { return peer_died_; }

private:
    const std::vector<const Progress*> own_;
    const int first_;
    const double hang_timeout_;
    int period_ms_ = 100;
    std::unique_ptr<SideChannel> channel_;  // between processes only
    std::vector<RankStatus> statuses_;      // by rank
    double last_look_ = 0;
    double resumed_ = 0;  // when this process was last found to have been stopped itself
    const int wake_ = eventfd(0, EFD_CLOEXEC);
    std::atomic<bool> ended_ = false, peer_died_ = false;
    std::thread thread_;

    void watch() {
        last_look_ = seconds_now();
        for (RankStatus& status : statuses_) status.heard = last_look_;
        while (!ended_) {
            look();
            if (channel_) channel_->send({SideChannel::Kind::beat, statuses_[size_t(first_)].report});
            sleep(period_ms_);
            look();
            const std::string cause = cause_of_end(statuses_, seconds_now());
            if (failed_rank() >= 0) end_behind();
            else if (!cause.empty()) end(cause);
        }
    }

    void sleep(int milliseconds) {
        pollfd wake{wake_, POLLIN, 0};
        if (channel_) channel_->sleep(milliseconds, wake_);
        else poll(&wake, 1, milliseconds);
    }

    // Brings statuses_ up to date.
    void look() {
        const double now = seconds_now();
        // A job that was stopped and goes on (Ctrl-Z, a laptop asleep): nobody is late for that.
        if (now - last_look_ > 2 + 1e-3 * period_ms_) {
            resumed_ = now;
            for (RankStatus& status : statuses_) status.heard = now;
        }
        last_look_ = now;
        for (size_t i = 0; i < own_.size(); ++i) {
            RankStatus& status = statuses_[size_t(first_) + i];
            status.report = own_[i]->report(hang_timeout_, resumed_);
            status.heard = now;
        }
        if (!channel_) return;
        channel_->receive(
            [&](int rank, const SideChannel::Message& message) {
                RankStatus& status = statuses_[size_t(rank)];
                status.heard = now;
                if (message.kind == SideChannel::Kind::beat) status.report = message.report;
                if (message.kind == SideChannel::Kind::goodbye) status.state = RankStatus::gone;
                if (message.kind == SideChannel::Kind::failed) status.state = RankStatus::failed;
            },
            [&](int rank) {
                RankStatus& status = statuses_[size_t(rank)];
                if (status.state == RankStatus::present) status.state = RankStatus::dead;
            });
    }

    int failed_rank() const {
        for (size_t r = 0; r < statuses_.size(); ++r)
            if (statuses_[r].state == RankStatus::failed) return int(r);
        return -1;
    }

    // The lowest rank that answers speaks, the others give it time to; so does a process that was itself stopped, which
    // may be the cause. The first moment is for signals: a job that is killed as a whole says nothing of single ranks.
    void end(const std::string& cause) {
        peer_died_ = true;
        const double now = seconds_now();
        double patience = resumed_ > 0 && now - resumed_ < 5 ? 5 : 0.02;
        for (int r = 0; r < first_; ++r) patience += statuses_[size_t(r)].answers(now) ? 0.5 : 0;
        while (seconds_now() < now + patience) {
            if (ended_) return;
            if (failed_rank() >= 0) return end_behind();
            sleep(5);
            look();
        }
        if (cause_of_end(statuses_, seconds_now()).empty()) {  // it has come to life again
            peer_died_ = false;
            return;
        }
        const std::string line = "train_gpt: " + cause + "\n";
        const bool told = write(STDERR_FILENO, line.data(), line.size()) > 0;
        if (channel_ && told) channel_->send({SideChannel::Kind::failed, {}});
        _exit(EXIT_PEER);
    }

    // Another process says why the run ends. It ends first, so that the launcher takes its exit code.
    void end_behind() {
        peer_died_ = true;
        const int rank = failed_rank();
        for (const double until = seconds_now() + 5; channel_->connected(rank) && seconds_now() < until; look()) {
            if (ended_) return;
            sleep(5);
        }
        sleep(100);
        if (!ended_) _exit(EXIT_PEER);
    }
};
