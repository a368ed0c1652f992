// Ranks as threads of one process: a message is copied from one rank's arena to the other's, by whichever of the two
// posts its end last. `ThreadTeam` is what they share, each has a `ThreadTransport`. On GPUs, one for all ranks or one
// each, the copy runs on the receiver's exchange stream, after what the compute streams of both were told before they
// posted their ends, and both compute streams wait for it.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "llmc/parallel/exchange_stream.h"
#include "llmc/parallel/transport.h"

class ThreadTeam {
public:
    explicit ThreadTeam(int ranks) : ranks_(ranks), members_(size_t(ranks)), queues_(size_t(ranks) * size_t(ranks)) {
        for (Gather& gather : gathers_) gather.texts.resize(size_t(ranks));
    }

    // Wakes whoever waits: rank `rank` has failed and nobody is to wait for it. The first one counts.
    void fail(int rank) {
        const std::lock_guard lock(mutex_);
        if (failed_rank_ < 0) failed_rank_ = rank;
        for (Member& member : members_) member.changed.notify_all();
        left_changed_.notify_all();
    }
    // The memory of a rank that has failed is about to go: nobody begins to copy from it or to it any more.
    void abandon(int rank) {
        fail(rank);
        std::unique_lock lock(mutex_);
        copied_.wait(lock, [&] { return copying_ == 0; });
        for (Member& member : members_) member.exchange.finish();
    }
    int failed_rank() const {
        const std::lock_guard lock(mutex_);
        return failed_rank_;
    }

    // A rank has ended, well or not.
    void leave() {
        const std::lock_guard lock(mutex_);
        ++left_;
        left_changed_.notify_all();
    }
    // Returns when all ranks have ended; false if some are still there so long after one has failed.
    bool wait_for_all(std::chrono::seconds patience) {
        std::unique_lock lock(mutex_);
        left_changed_.wait(lock, [&] { return left_ == ranks_ || failed_rank_ >= 0; });
        return left_changed_.wait_for(lock, patience, [&] { return left_ == ranks_; });
    }

    void attach(int rank, const Device& device) {
        const std::lock_guard lock(mutex_);
        members_[size_t(rank)].exchange.attach(device);
    }

    int64_t post(int rank, std::span<const Transfer> transfers) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        const int64_t first = self.first + int64_t(self.open.size());
        self.open.insert(self.open.end(), transfers.size(), {});
        const Mark posted = self.exchange.mark_compute();
        for (size_t i = 0; i < transfers.size(); ++i) {
            check_peers(lock, rank);
            const Transfer& t = transfers[i];
            const End mine{
                rank, first + int64_t(i), t.data, t.bytes, posted, t.send ? nullptr : self.exchange.new_mark()};
            Queue& queue = t.send ? queues_[size_t(rank * ranks_ + t.peer)] : queues_[size_t(t.peer * ranks_ + rank)];
            if (queue.ends.empty() || queue.of_sends == t.send) {  // nothing to meet yet
                queue.of_sends = t.send;
                queue.ends.push_back(mine);
                continue;
            }
            const End other = queue.ends.front();
            queue.ends.pop_front();
            if (other.bytes != mine.bytes)
                throw std::logic_error("a message of " + std::to_string(t.send ? mine.bytes : other.bytes) +
                                       " bytes meets a receive of " +
                                       std::to_string(t.send ? other.bytes : mine.bytes));
            copy(lock, t.send ? mine : other, t.send ? other : mine);
        }
        return first;
    }

    void wait(int rank, int64_t begin, int64_t end) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        for (int64_t n = std::max(begin, self.first); n < end; ++n) {
            self.changed.wait(lock, [&] {
                check_peers(lock, rank);
                return n < self.first || self.open[size_t(n - self.first)].met;
            });
            if (n >= self.first)
                self.exchange.compute_waits(std::exchange(self.open[size_t(n - self.first)].copied, {}));
        }
        while (!self.open.empty() && self.open.front().met && self.open.front().copied == nullptr) {
            self.open.pop_front();
            ++self.first;
        }
    }
    void check_peers(int rank) {
        std::unique_lock lock(mutex_);
        check_peers(lock, rank);
    }

    std::vector<std::string> all_gather(int rank, const std::string& text) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        // Two take turns: nobody begins the next but one before all have left this one.
        Gather& gather = gathers_[size_t(self.gathers++ % 2)];
        gather.texts[size_t(rank)] = text;
        if (++gather.arrived == ranks_)
            for (Member& member : members_) member.changed.notify_all();
        self.changed.wait(lock, [&] {
            if (gather.arrived < ranks_) check_peers(lock, rank);
            return gather.arrived >= ranks_;
        });
        std::vector<std::string> texts = gather.texts;
        if (++gather.left == ranks_) gather.arrived = gather.left = 0;
        return texts;
    }

private:
    struct End {  // of a transfer
        int rank;
        int64_t number;
        void* data;
        int64_t bytes;
        Mark posted;  // the rank's compute stream, when this end was posted
        Mark copied;  // of the receiving end: the copy
    };
    struct Queue {  // from one rank to another: ends, all of sends or all of receives, that have not met the other end
        bool of_sends = false;
        std::deque<End> ends;
    };
    struct Open {          // a transfer that its rank may have to wait for
        bool met = false;  // the other end is posted, and the message is copied,
        Mark copied;       // or on a GPU will be, and the compute stream has to wait for this
    };
    struct Member {
        int64_t first = 0;      // transfers before this one are complete
        std::deque<Open> open;  // [number - first]
        ExchangeStream exchange;
        int64_t gathers = 0;
        std::condition_variable changed;
    };
    struct Gather {
        std::vector<std::string> texts;
        int arrived = 0, left = 0;
    };

    const int ranks_;
    mutable std::mutex mutex_;
    std::vector<Member> members_;
    std::vector<Queue> queues_;  // [from][to]
    std::array<Gather, 2> gathers_;
    int failed_rank_ = -1, left_ = 0;
    int copying_ = 0;  // messages
    std::condition_variable left_changed_, copied_;

    // Both ends wait for it, so nobody else touches this memory.
    void copy(std::unique_lock<std::mutex>& lock, const End& from, const End& to) {
        struct Unlocked {
            ThreadTeam& team;
            std::unique_lock<std::mutex>& lock;
            ~Unlocked() {
                lock.lock();
                if (--team.copying_ == 0) team.copied_.notify_all();
            }
        };
        ++copying_;
        lock.unlock();
        {
            const Unlocked unlocked{*this, lock};
            members_[size_t(to.rank)].exchange.copy(to.data, from.data, to.bytes, from.posted, to.posted, to.copied);
        }
        for (const End& end : {from, to}) {
            Member& member = members_[size_t(end.rank)];
            member.open[size_t(end.number - member.first)] = {true, to.copied};
            member.changed.notify_all();
        }
    }
    // Whoever hears of a failure frees memory, which others may still be copying from or to.
    void check_peers(std::unique_lock<std::mutex>& lock, int rank) {
        if (failed_rank_ < 0 || failed_rank_ == rank) return;
        copied_.wait(lock, [&] { return copying_ == 0; });
        throw Failure(EXIT_PEER, "rank " + std::to_string(failed_rank_) + " has failed");
    }
};

class ThreadTransport : public Transport {
public:
    ThreadTransport(ThreadTeam& team, int rank, int ranks) : Transport(rank, ranks), team_(team) {}
    void attach(const Device& device) override { team_.attach(rank, device); }
    int64_t post(std::span<const Transfer> transfers) override { return team_.post(rank, transfers); }
    void wait(int64_t begin, int64_t end) override { team_.wait(rank, begin, end); }
    void check_peers() override { team_.check_peers(rank); }
    void abandon() override { team_.abandon(rank); }

protected:
    std::vector<std::string> gather(const std::string& text) override { return team_.all_gather(rank, text); }

private:
    ThreadTeam& team_;
};
