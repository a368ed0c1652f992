// Signals, as README "Signals" lists them. They are blocked in every thread and taken by one that waits for nothing
// else, so none interrupts a kernel or a write; the training loop asks between steps what has been wished for.
//   SIGUSR1                      checkpoint at the next step boundary, go on
//   SIGUSR2, SIGTERM, SIGINT     checkpoint, exit 75
//   second SIGINT or SIGTERM     exit now, 130 or 143
//   SIGQUIT                      print the current op, go on
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <utility>

class Signals {
public:
    std::atomic<bool> checkpoint_wanted = false, stop_wanted = false;

    // Call before the first thread is made, since threads inherit the mask. `status` names the current op. Of a run of
    // several processes the launcher ends all when one has died: then `peer_died` tells that there is nothing to save.
    // Of the processes of a run one `speaks`.
    explicit Signals(
        std::function<std::string()> status, std::function<bool()> peer_died = [] { return false; }, bool speaks = true)
        : status_(std::move(status)), peer_died_(std::move(peer_died)), speaks_(speaks) {
        sigemptyset(&set_);
        for (int s : {SIGUSR1, SIGUSR2, SIGTERM, SIGINT, SIGQUIT, wake_}) sigaddset(&set_, s);
        pthread_sigmask(SIG_BLOCK, &set_, nullptr);
        waiter_ = std::thread([this] { wait(); });
    }
    ~Signals() {
        ended_ = true;
        pthread_kill(waiter_.native_handle(), wake_);
        waiter_.join();
        pthread_sigmask(SIG_UNBLOCK, &set_, nullptr);
    }

private:
    static constexpr int wake_ = SIGWINCH;  // ignored by default, so nobody else sends it to a trainer in earnest
    sigset_t set_;
    std::function<std::string()> status_;
    std::function<bool()> peer_died_;
    const bool speaks_;
    std::atomic<bool> ended_ = false;
    std::thread waiter_;

    void wait() {
        bool asked_to_end = false;  // by SIGINT or SIGTERM
        for (int signal = 0; sigwait(&set_, &signal) == 0 && !ended_;) {
            if (signal == SIGQUIT) std::fprintf(stderr, "%s\n", status_().c_str());
            if (signal == SIGUSR1) checkpoint_wanted = true;
            if (signal != SIGUSR2 && signal != SIGTERM && signal != SIGINT) continue;
            if (signal == SIGTERM) std::this_thread::sleep_for(std::chrono::milliseconds(100));
            if (peer_died_()) continue;
            stop_wanted = true;
            if (signal != SIGUSR2 && std::exchange(asked_to_end, true)) _exit(128 + signal);
            if (!speaks_) continue;
            std::fprintf(stderr, "signal %d: checkpoint after this step, then exit 75; once more to exit now\n",
                         signal);
        }
    }
};
