// How ranks reach each other. Ops post sends and receives, many at a time, and wait for the ones they need; everything
// else that ranks tell each other (losses, norms, the contents of a checkpoint) is small and goes by all_gather.
//
// Ranks are threads of one process here (thread_transport.h), processes under MPI (mpi_transport.h), or either with a
// GPU each (nccl_transport.h).
//
// On a GPU all this is told to streams. A post means: once the rank's compute stream has done what it was told before,
// the data of the sends are ready, and the memory of the receives is free. A wait has the compute stream wait; the host
// goes on as soon as the other end is posted, too, so that no stream ever waits for what was not yet told to the GPU.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "llmc/parallel/progress.h"

struct Device;

// Bytes on their way from one rank to another. The n-th send from a to b meets the n-th receive of b from a; both know
// the size from the plan. `data` lies in the device's memory and must stay as it is until the transfer is complete.
struct Transfer {
    bool send;
    int peer;
    void* data;
    int64_t bytes;
};

// A Failure that all ranks throw together, so that one of them may speak for all.
struct JointFailure : Failure {
    using Failure::Failure;
};

// Calls done() until it is true. Spins for the first moment, then lets others run, then naps for a part of what it has
// waited so far: a long wait costs nothing, and no wait gets longer by more than that part.
template <class Done>
void poll_until(const Done& done) {
    using namespace std::chrono_literals;
    const auto begin = std::chrono::steady_clock::now();
    while (!done()) {
        const auto waited = std::chrono::steady_clock::now() - begin;
        if (waited > 100us) std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(waited / 16, 200us));
        else if (waited > 20us) std::this_thread::yield();
    }
}

class Transport {
public:
    const int rank, ranks;
    Progress progress;  // of the rank; between two steps, too

    Transport(int rank, int ranks) : rank(rank), ranks(ranks) {}
    virtual ~Transport() = default;

    // The device of the rank, before its first post, in its thread; a GPU is the current one there. And the end of it,
    // when all has gone well and its streams are done. All ranks call either.
    virtual void attach(const Device&) {}
    virtual void detach() {}

    // Posts transfers together and returns at once: the number of the first one. A rank's transfers are numbered on
    // from 0 for the whole run.
    virtual int64_t post(std::span<const Transfer> transfers) = 0;

    // Returns when the transfers with numbers in [begin, end) are complete. A Failure with EXIT_PEER if another rank
    // has ended.
    virtual void wait(int64_t begin, int64_t end) = 0;

    // A Failure with EXIT_PEER if another rank is known to have ended badly, for those who wait by polling.
    virtual void check_peers() {}

    // Called when the rank fails, before its memory goes: transfers that have not begun never will.
    virtual void abandon() {}

    // The text of every rank, by rank. All ranks call it in the same order.
    std::vector<std::string> all_gather(const std::string& text) {
        const auto before = progress.meet();
        std::vector<std::string> texts = gather(text);
        progress.resume(before);
        return texts;
    }

    // The sum of each value over the ranks, added in the order of ranks: the same bits everywhere.
    void sum(std::span<double> values) {
        std::string bytes(values.size_bytes(), '\0');
        std::memcpy(bytes.data(), values.data(), bytes.size());
        std::fill(values.begin(), values.end(), 0.0);
        for (const std::string& text : all_gather(bytes))
            for (size_t i = 0; i < values.size(); ++i) {
                double value;
                std::memcpy(&value, text.data() + i * sizeof value, sizeof value);
                values[i] += value;
            }
    }

    // Runs what every rank does for itself, and fails on all of them if it fails on one: with the exit code of the
    // first, and the messages of all, each once.
    void together(const std::function<void()>& body) {
        std::string text;
        try {
            body();
        } catch (const Failure& failure) {
            if (failure.exit_code == EXIT_PEER) throw;
            text = std::to_string(failure.exit_code) + " " + failure.what();
        }
        int code = 0;
        std::vector<std::string> messages;
        const std::vector<std::string> texts = all_gather(text);
        for (size_t r = 0; r < texts.size(); ++r) {
            if (texts[r].empty()) continue;
            const std::string message = texts[r].substr(texts[r].find(' ') + 1);
            if (!code) code = std::stoi(texts[r]);
            const bool known = std::any_of(messages.begin(), messages.end(),
                                           [&](const std::string& m) { return m.ends_with(message); });
            if (!known) messages.push_back((r > 0 ? "rank " + std::to_string(r) + ": " : "") + message);
        }
        if (!code) return;
        std::string all;
        for (const std::string& message : messages) all += (all.empty() ? "" : "\n") + message;
        throw JointFailure(code, all);
    }

protected:
    virtual std::vector<std::string> gather(const std::string& text) = 0;
};

// One rank by itself: there is nobody to talk to.
class NoTransport : public Transport {
public:
    NoTransport() : Transport(0, 1) {}
    int64_t post(std::span<const Transfer>) override { throw std::logic_error("a single rank posts an exchange"); }
    void wait(int64_t, int64_t) override {}

protected:
    std::vector<std::string> gather(const std::string& text) override { return {text}; }
};
