// Messages of a rehearsal take as long as they would on a cluster's links, while the program runs and by its clock:
// transports around the real ones, which return from a wait only once the message is through the emulated link as well.
// Called by rehearsal.h.
//
// The rules are those of llmc/pipeline/simulate.h. A rank's batches are served in order, each until all its messages
// have arrived; a message can begin once both its ends are served, and does when the sender's egress and the receiver's
// ingress are free, the one that has been ready for longest first; then both are busy for as long as it is under way. A
// message that takes no time needs neither. Every time here is one at which an end was posted on the real clock, plus
// durations of messages.
#pragma once

#include <time.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "llmc/parallel/transport.h"

// On the scale of seconds_now(). The last moments are not worth a sleep, which would end later.
inline void sleep_until(double seconds) {
    if (seconds - seconds_now() < 20e-6) {
        while (seconds_now() < seconds) {}
        return;
    }
    const auto whole = time_t(seconds);
    const timespec at{whole, long(1e9 * (seconds - double(whole)))};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr) == EINTR) {}
}

// The links of all ranks, which are threads.
class EmulatedLinks {
public:
    explicit EmulatedLinks(int ranks)
        : ranks_(ranks), members_(size_t(ranks)), queues_(size_t(ranks) * size_t(ranks)) {}

    // A rank posts a batch. seconds_of(i): how long the i-th transfer will be under way, the same at both ends.
    template <class SecondsOf>
    void post(int rank, std::span<const Transfer> transfers, const SecondsOf& seconds_of) {
        const std::lock_guard lock(mutex_);
        const double now = seconds_now();
        advance(now);
        Member& self = members_[size_t(rank)];
        Batch batch;
        for (size_t i = 0; i < transfers.size(); ++i) {
            const Transfer& t = transfers[i];
            Queue& queue = t.send ? queues_[size_t(rank * ranks_ + t.peer)] : queues_[size_t(t.peer * ranks_ + rank)];
            std::shared_ptr<Message> message;
            if (queue.ends.empty() || queue.of_sends == t.send) {  // the other end is not posted yet
                message = std::make_shared<Message>(t.send ? rank : t.peer, t.send ? t.peer : rank, seconds_of(i));
                queue.of_sends = t.send;
                queue.ends.push_back(message);
            } else {
                message = queue.ends.front();
                queue.ends.pop_front();
            }
            batch.push_back(message);
            self.open.push_back(message);
        }
        self.batches.push_back(std::move(batch));
        if (self.batches.size() == 1) serve(self);
        begin_messages(now);
        advance(now);
    }

    // Returns when a transfer whose both ends are posted has arrived: the moment at which it did. check_peers() throws
    // if another rank has failed.
    template <class CheckPeers>
    double wait(int rank, int64_t number, const CheckPeers& check_peers) {
        std::unique_lock lock(mutex_);
        Member& self = members_[size_t(rank)];
        if (number < self.first) return 0;  // long ago
        const std::shared_ptr<Message> message = self.open[size_t(number - self.first)];
        for (advance(seconds_now()); !message->arrived; advance(seconds_now())) {
            if (message->end > 0) {
                lock.unlock();
                sleep_until(message->end);
                lock.lock();
                continue;
            }
            // It stands behind others; those under way let it through at some end of theirs.
            double until = seconds_now() + 0.1;
            if (!under_way_.empty()) until = std::min(until, under_way_.begin()->first);
            changed_.wait_until(lock,
                                std::chrono::steady_clock::time_point(std::chrono::nanoseconds(int64_t(1e9 * until))));
            check_peers();
        }
        for (; !self.open.empty() && self.open.front()->arrived; ++self.first) self.open.pop_front();
        return message->end;
    }

private:
    struct Message {
        int from, to;
        double seconds;
        int ends_served = 0;
        double end = 0;  // once it is under way
        bool arrived = false;

        Message(int from, int to, double seconds) : from(from), to(to), seconds(seconds) {}
    };
    using Batch = std::vector<std::shared_ptr<Message>>;
    struct Member {
        int64_t first = 0;                          // transfers before this one have arrived
        std::deque<std::shared_ptr<Message>> open;  // [number - first]
        std::deque<Batch> batches;                  // that have not arrived; the first is served
        bool sending = false, receiving = false;
    };
    struct Queue {  // from one rank to another: messages with one end posted
        bool of_sends = false;
        std::deque<std::shared_ptr<Message>> ends;
    };

    const int ranks_;
    std::mutex mutex_;
    std::vector<Member> members_;
    std::vector<Queue> queues_;                                  // [from][to]
    std::deque<std::shared_ptr<Message>> ready_;                 // both ends are served, the link is not free
    std::multimap<double, std::shared_ptr<Message>> under_way_;  // by their end
    std::condition_variable changed_;                            // a message has begun

    // What has ended until now, in the order in which it did. Who posts or waits comes by here first, so that nothing
    // that could have changed the course of messages is known too late.
    void advance(double now) {
        while (!under_way_.empty() && under_way_.begin()->first <= now) {
            const auto [end, message] = *under_way_.begin();
            under_way_.erase(under_way_.begin());
            message->arrived = true;
            if (message->seconds > 0)
                members_[size_t(message->from)].sending = members_[size_t(message->to)].receiving = false;
            for (const int rank : {message->from, message->to}) {
                Member& member = members_[size_t(rank)];
                const Batch& batch = member.batches.front();
                if (!std::all_of(batch.begin(), batch.end(), [](const auto& m) { return m->arrived; })) continue;
                member.batches.pop_front();
                if (!member.batches.empty()) serve(member);
            }
            begin_messages(end);
        }
    }
    void serve(Member& member) {
        for (const std::shared_ptr<Message>& message : member.batches.front())
            if (++message->ends_served == 2) ready_.push_back(message);
    }
    void begin_messages(double now) {
        const size_t waiting = ready_.size();
        std::erase_if(ready_, [&](const std::shared_ptr<Message>& message) {
            Member &from = members_[size_t(message->from)], &to = members_[size_t(message->to)];
            if (message->seconds > 0) {
                if (from.sending || to.receiving) return false;
                from.sending = to.receiving = true;
            }
            message->end = now + message->seconds;
            under_way_.emplace(message->end, message);
            return true;
        });
        if (ready_.size() < waiting) changed_.notify_all();
    }
};

// A rank's transport with links: one transfer for each send and receive of its list, in the order of the list.
class LinkTransport : public Transport {
public:
    // The latest moment at which a message that was waited for had arrived.
    double arrival = 0;

    // `seconds`: [send or receive of the list] how long each is under way.
    LinkTransport(Transport& real, std::vector<double> seconds)
        : Transport(real.rank, real.ranks), real_(real), seconds_(std::move(seconds)) {}

    void wait(int64_t begin, int64_t end) override {
        real_.wait(begin, end);
        for (int64_t n = std::max(begin, known_); n < end; ++n) arrival = std::max(arrival, wait_for_link(n));
        if (begin <= known_) known_ = std::max(known_, end);
    }
    void attach(const Device& device) override { real_.attach(device); }
    void detach() override { real_.detach(); }
    void check_peers() override { real_.check_peers(); }
    void abandon() override { real_.abandon(); }

protected:
    Transport& real_;

    double seconds_of(int64_t number) const { return seconds_[size_t(number) % seconds_.size()]; }
    virtual double wait_for_link(int64_t number) = 0;
    std::vector<std::string> gather(const std::string& text) override { return real_.all_gather(text); }

private:
    const std::vector<double> seconds_;
    int64_t known_ = 0;  // transfers before this one have arrived
};

class ThreadLinkTransport : public LinkTransport {
public:
    ThreadLinkTransport(Transport& real, std::vector<double> seconds, EmulatedLinks& links)
        : LinkTransport(real, std::move(seconds)), links_(links) {}

    // On the links first, so that who finds a message in the real transport finds it there, too.
    int64_t post(std::span<const Transfer> transfers) override {
        links_.post(rank, transfers, [&](size_t i) { return seconds_of(posted_ + int64_t(i)); });
        posted_ += int64_t(transfers.size());
        return real_.post(transfers);
    }

protected:
    double wait_for_link(int64_t number) override {
        return links_.wait(rank, number, [&] { real_.check_peers(); });
    }

private:
    EmulatedLinks& links_;
    int64_t posted_ = 0;
};

// Between processes a message brings the real time at which it was posted, as its first eight bytes, and is delayed at
// its receiver, one after the other. What is left out: that a sender's egress is shared, and that its earlier batches
// have to be through.
class ProcessLinkTransport : public LinkTransport {
public:
    using LinkTransport::LinkTransport;

    int64_t post(std::span<const Transfer> transfers) override {
        const double now = seconds_now();
        for (const Transfer& t : transfers) {
            if (t.send) std::memcpy(t.data, &now, sizeof now);
            posted_.push_back({t.send ? nullptr : t.data, now});
        }
        return real_.post(transfers);
    }

protected:
    double wait_for_link(int64_t number) override {
        const Posted& end = posted_[size_t(number)];
        if (!end.data) return 0;  // a send
        double sent;
        std::memcpy(&sent, end.data, sizeof sent);
        free_ = std::max({sent, end.seconds, free_}) + seconds_of(number);
        sleep_until(free_);
        return free_;
    }

private:
    struct Posted {
        const void* data;  // of a receive
        double seconds;    // when
    };
    std::vector<Posted> posted_;  // [number]
    double free_ = 0;             // the ingress, from this moment on
};
