// Ranks with a GPU each, whose messages NCCL carries from GPU to GPU. Whatever else ranks tell each other goes by the
// transport between their threads or processes, which also brings them together at the start. Made by team.h.
//
// NCCL never blocks the host here: its calls return while they are still in progress, and whoever needs their result
// polls. A thread looks after it meanwhile, since the host may be waiting for a stream that waits for a message: when
// another rank fails, or a message, it ends NCCL's work, and all streams go on, so that this rank can fail, too.
#pragma once

#include <nccl.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <source_location>
#include <thread>

#include "llmc/parallel/exchange_stream.h"
#include "llmc/parallel/transport.h"

class NcclTransport : public Transport {
public:
    explicit NcclTransport(Transport& control) : Transport(control.rank, control.ranks), control_(control) {}
    ~NcclTransport() {
        watcher_ = {};
        abort();
    }

    void attach(const Device& device) override {
        exchange_.attach(device);
        if (watcher_.joinable()) return;
        ncclUniqueId id{};
        control_.together([&] {
            if (rank == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        });
        const std::string bytes = control_.all_gather(rank == 0 ? std::string(id.internal, sizeof id.internal) : "")[0];
        bytes.copy(id.internal, sizeof id.internal);
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        call_ = "ncclCommInitRankConfig";
        check(ncclCommInitRankConfig(&comm_, ranks, id, rank, &config), call_);
        finish_call();
        watcher_ = std::jthread([this](std::stop_token stop) {
            try {
                for (; !stop.stop_requested(); std::this_thread::sleep_for(std::chrono::milliseconds(20)))
                    in_progress();
            } catch (const Failure&) {}  // the rank hears of it at its next call
        });
    }

    // NCCL ends once all messages have come through; by force, if that takes too long.
    void detach() override {
        const double deadline = seconds_now() + patience_;
        ncclResult_t state = ncclInProgress;
        const auto settled = [&] {
            poll_until([&] {
                const std::lock_guard lock(mutex_);
                if (!comm_ || ncclCommGetAsyncError(comm_, &state) != ncclSuccess) state = ncclInternalError;
                return state != ncclInProgress || seconds_now() > deadline;
            });
            return state == ncclSuccess;
        };
        const auto succeeds = [&](auto call) {
            const std::lock_guard lock(mutex_);
            return comm_ && going_on(call(comm_));
        };
        const bool ended = settled() && succeeds(ncclCommFinalize) && settled();
        watcher_ = {};
        if (ended && succeeds(ncclCommDestroy)) comm_ = nullptr;
        else abort();
    }

    // One group a post. NCCL takes the next when the last is on the stream.
    int64_t post(std::span<const Transfer> transfers) override {
        place_last_group();
        exchange_.waits(exchange_.mark_compute());
        const std::lock_guard lock(mutex_);
        if (in_progress()) throw std::logic_error("NCCL gets a group while the last is in progress");
        peers_.clear();
        for (const Transfer& t : transfers)
            if (std::find(peers_.begin(), peers_.end(), t.peer) == peers_.end()) peers_.push_back(t.peer);
        ncclResult_t result = ncclGroupStart();
        for (const Transfer& t : transfers) {
            if (!going_on(result)) break;
            result = t.send ? ncclSend(t.data, size_t(t.bytes), ncclUint8, t.peer, comm_, exchange_.stream())
                            : ncclRecv(t.data, size_t(t.bytes), ncclUint8, t.peer, comm_, exchange_.stream());
        }
        const ncclResult_t end = ncclGroupEnd();  // whatever came before: a group must not stay open
        check(result, "ncclSend or ncclRecv");
        call_ = "ncclGroupEnd";
        check(end, call_);
        groups_.push_back({posted_ += int64_t(transfers.size()), nullptr});
        return posted_ - int64_t(transfers.size());
    }

    // The messages of a group arrive together, and after those of earlier groups.
    void wait(int64_t, int64_t end) override {
        in_progress();
        Mark arrived;
        while (!groups_.empty() && waited_ < end) {
            if (!groups_.front().arrived) place_last_group();
            waited_ = groups_.front().end;
            arrived = groups_.front().arrived;
            groups_.pop_front();
        }
        exchange_.compute_waits(arrived);
    }

    void check_peers() override { control_.check_peers(); }

    void abandon() override {
        control_.abandon();
        watcher_ = {};
        abort();
        exchange_.finish();
    }

protected:
    std::vector<std::string> gather(const std::string& text) override {
        if (watcher_.joinable()) in_progress();
        return control_.all_gather(text);
    }

private:
    struct Group {
        int64_t end;   // number of the first transfer after it
        Mark arrived;  // once it is on the stream
    };
    static constexpr double patience_ = 5;  // seconds for NCCL to end, well or by force

    Transport& control_;
    ExchangeStream exchange_;
    std::recursive_mutex mutex_;  // of NCCL's calls, and of the next four
    ncclComm_t comm_ = nullptr;
    const char* call_ = nullptr;  // the last one that may be in progress
    std::vector<int> peers_;      // whose messages are in it; of the first call, all
    std::string failure_;         // the first
    std::jthread watcher_;
    int64_t posted_ = 0, waited_ = 0;
    std::deque<Group> groups_;  // that the compute stream does not wait for yet; only the last may be in progress

    static bool going_on(ncclResult_t result) { return result == ncclSuccess || result == ncclInProgress; }

    void check(ncclResult_t result, const char* call, std::source_location at = std::source_location::current()) {
        if (going_on(result)) return;
        std::string whom;
        for (const int peer : peers_) whom += (whom.empty() ? "rank " : ", rank ") + std::to_string(peer);
        const std::string more = comm_ ? ncclGetLastError(comm_) : "";
        fail(std::string(call) + " (" + at.file_name() + ":" + std::to_string(at.line()) + ") between rank " +
             std::to_string(rank) + " and " + (whom.empty() ? "all others" : whom) + " failed: " +
             ncclGetErrorString(result) + (more.empty() ? "" : ", " + more) + "; NCCL_DEBUG=INFO tells more");
    }
    [[noreturn]] void fail(const std::string& message) {
        const std::lock_guard lock(mutex_);
        if (failure_.empty()) failure_ = message;
        abort(message);
        throw Failure(EXIT_PEER, failure_);
    }

    // Whether the last call still is. Fails if it has failed, a message has, or another rank.
    bool in_progress() {
        const std::lock_guard lock(mutex_);
        if (!comm_) fail("NCCL has ended on rank " + std::to_string(rank));
        try {
            control_.check_peers();
        } catch (const Failure& failure) { fail(failure.what()); }
        ncclResult_t state = ncclSuccess;
        check(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError");
        check(state, call_);
        return state == ncclInProgress;
    }
    void finish_call() {
        poll_until([&] { return !in_progress(); });
    }
    void place_last_group() {
        if (groups_.empty() || groups_.back().arrived) return;
        finish_call();
        groups_.back().arrived = exchange_.mark();
    }

    // Ends NCCL's work, which needs no other rank. Where even that does not succeed, the memory that NCCL works on can
    // never be freed, and the process ends as it is.
    void abort(const std::string& why = "") {
        const std::lock_guard lock(mutex_);
        if (!comm_) return;
        const auto ended = std::make_shared<std::atomic<bool>>(false);
        std::thread([comm = std::exchange(comm_, nullptr), ended] {
            ncclCommAbort(comm);
            *ended = true;
        }).detach();
        const double deadline = seconds_now() + patience_;
        poll_until([&] { return *ended || seconds_now() > deadline; });
        if (*ended) return;
        std::fprintf(stderr, "train_gpt: %s%sncclCommAbort has not returned on rank %d for %.0f s\n", why.c_str(),
                     why.empty() ? "" : "; ", rank, patience_);
        _exit(EXIT_PEER);
    }
};
