// Ranks as threads of one process: a message is copied from one rank's arena to the other's, by whichever of the two
// posts its end last. `ThreadTeam` is what they share, each has a `ThreadTransport`.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

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

    int64_t post(int rank, std::span<const Transfer> transfers) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        const int64_t first = self.first + int64_t(self.done.size());
        self.done.insert(self.done.end(), transfers.size(), false);
        for (size_t i = 0; i < transfers.size(); ++i) {
            check_peers(lock, rank);
            const Transfer& t = transfers[i];
            const End mine{rank, first + int64_t(i), t.data, t.bytes};
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
            ++copying_;
            lock.unlock();  // both ends wait for it, so nobody else touches this memory
            if (t.send) std::memcpy(other.data, mine.data, size_t(mine.bytes));
            else std::memcpy(mine.data, other.data, size_t(mine.bytes));
            lock.lock();
            if (--copying_ == 0) copied_.notify_all();
            complete(mine);
            complete(other);
        }
        return first;
    }

    void wait(int rank, int64_t begin, int64_t end) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        for (int64_t n = std::max(begin, self.first); n < end; ++n)
            self.changed.wait(lock, [&] {
                check_peers(lock, rank);
                return n < self.first || self.done[size_t(n - self.first)];
            });
        while (!self.done.empty() && self.done.front()) {
            self.done.pop_front();
            ++self.first;
        }
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
    };
    struct Queue {  // from one rank to another: ends, all of sends or all of receives, that have not met the other end
        bool of_sends = false;
        std::deque<End> ends;
    };
    struct Member {
        int64_t first = 0;      // transfers before this one are complete
        std::deque<bool> done;  // [number - first]
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

    void complete(const End& end) {
        Member& member = members_[size_t(end.rank)];
        member.done[size_t(end.number - member.first)] = true;
        member.changed.notify_all();
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
    int64_t post(std::span<const Transfer> transfers) override { return team_.post(rank, transfers); }
    void wait(int64_t begin, int64_t end) override { team_.wait(rank, begin, end); }
    void abandon() override { team_.abandon(rank); }

protected:
    std::vector<std::string> gather(const std::string& text) override { return team_.all_gather(rank, text); }

private:
    ThreadTeam& team_;
};
