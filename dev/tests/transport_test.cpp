// transport.h with ranks as threads: what every transport promises (test_mpi.py asks the same of processes), and the
// judgement of progress.h and watchdog.h on ranks that die or hang.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <exception>

#include "llmc/parallel/thread_transport.h"
#include "dev/tests/thread_ranks.h"
#include "llmc/parallel/watchdog.h"

// All pairs exchange several messages, receives posted before the sends or after; the n-th meets the n-th.
TEST(Transport, MessagesArriveInOrder) {
    const std::vector<int64_t> sizes = {0, 1, 4096, 70001, 5};
    for (const int ranks : {2, 3, 5})
        on_thread_ranks(ranks, [&](Transport& transport) {
            const int rank = transport.rank;
            auto value = [](int from, int to, size_t n, int round) {
                return char(from * 31 + to * 7 + int(n) * 3 + round);
            };
            for (int round = 0; round < 20; ++round) {
                std::vector<std::vector<char>> out, in;
                std::vector<Transfer> sends, receives;
                for (int peer = 0; peer < ranks; ++peer)
                    for (size_t n = 0; n < sizes.size() && peer != rank; ++n) {
                        out.emplace_back(size_t(sizes[n]), value(rank, peer, n, round));
                        in.emplace_back(size_t(sizes[n]), 'x');
                        sends.push_back({true, peer, out.back().data(), sizes[n]});
                        receives.push_back({false, peer, in.back().data(), sizes[n]});
                    }
                const bool sends_first = (rank + round) % 2;
                const int64_t first = transport.post(sends_first ? sends : receives);
                if (round % 3 == 0) transport.all_gather("");
                const int64_t second = transport.post(sends_first ? receives : sends);
                EXPECT_EQ(second, first + int64_t(sends.size()));
                transport.wait(second, second + 1);
                transport.wait(first, second + int64_t(sends.size()));
                transport.wait(first, second);  // again: they stay complete
                for (size_t i = 0; i < receives.size(); ++i) {
                    const size_t n = i % sizes.size();
                    EXPECT_EQ(in[i], std::vector<char>(size_t(sizes[n]), value(receives[i].peer, rank, n, round)));
                }
            }
        });
}

TEST(Transport, OneMayRunAheadOfTheOther) {
    on_thread_ranks(2, [&](Transport& transport) {
        std::vector<int> values(1000, -1);
        const bool send = transport.rank == 0;
        for (int i = 0; i < 1000; ++i) {
            if (send) values[size_t(i)] = i;
            const Transfer t{send, 1 - transport.rank, &values[size_t(i)], sizeof(int)};
            transport.post({&t, 1});
        }
        transport.wait(0, 1000);
        for (int i = 0; i < 1000; ++i) EXPECT_EQ(values[size_t(i)], i);
    });
}

TEST(Transport, SizesThatDifferAreRefused) {
    for (const int64_t sent : {50, 150})
        EXPECT_THROW(on_thread_ranks(2,
                                     [&](Transport& transport) {
                                         std::vector<char> buffer(200);
                                         const bool send = transport.rank == 0;
                                         const Transfer t{send, 1 - transport.rank, buffer.data(), send ? sent : 100};
                                         transport.post({&t, 1});
                                         transport.wait(0, 1);
                                     }),
                     std::logic_error);
}

TEST(Transport, GathersAndSums) {
    on_thread_ranks(4, [](Transport& transport) {
        for (int round = 0; round < 200; ++round) {
            const std::vector<std::string> texts =
                transport.all_gather(std::string(size_t(transport.rank * round), 'a') + std::to_string(round));
            ASSERT_EQ(texts.size(), 4u);
            for (int r = 0; r < 4; ++r)
                EXPECT_EQ(texts[size_t(r)], std::string(size_t(r * round), 'a') + std::to_string(round));
        }
        double values[] = {0.1 * transport.rank, 1, std::pow(10.0, 16.0 * (transport.rank % 2))};
        transport.sum(values);
        EXPECT_EQ(values[0], 0.0 + 0.1 * 0 + 0.1 * 1 + 0.1 * 2 + 0.1 * 3);  // in this order, to the bit
        EXPECT_EQ(values[1], 4);
        EXPECT_EQ(values[2], ((1 + 1e16) + 1) + 1e16);
    });
}

TEST(Transport, TogetherFailsEverywhereWithAllMessages) {
    std::atomic<int> failures = 0;
    EXPECT_ANY_THROW(on_thread_ranks(3, [&](Transport& transport) {
        transport.together([] {});
        try {
            transport.together([&] {
                if (transport.rank == 1) throw Failure(EXIT_DATA, "no such file");
                if (transport.rank == 2) throw Failure(EXIT_MEMORY, "too large");
            });
        } catch (const Failure& failure) {
            EXPECT_EQ(failure.exit_code, EXIT_DATA);
            EXPECT_STREQ(failure.what(), "rank 1: no such file\nrank 2: too large");
            transport.all_gather("");  // nobody waits for anybody who has left
            ++failures;
            throw;
        }
    }));
    EXPECT_EQ(failures, 3);
    try {
        on_thread_ranks(3, [&](Transport& t) { t.together([] { throw Failure(EXIT_CONFIG, "the same"); }); });
        FAIL();
    } catch (const Failure& failure) { EXPECT_STREQ(failure.what(), "the same"); }
}

TEST(Transport, AFailureWakesThoseThatWait) {
    for (const bool gather : {false, true}) {
        std::atomic<int> woken = 0;
        try {
            on_thread_ranks(3, [&](Transport& transport) {
                if (transport.rank == 1) throw Failure(EXIT_NONFINITE, "rank 1 throws");
                try {
                    char byte;
                    const Transfer t{false, 1, &byte, 1};
                    if (gather) transport.all_gather("");
                    else transport.wait(0, transport.post({&t, 1}) + 1);
                } catch (const Failure& failure) {
                    EXPECT_EQ(failure.exit_code, EXIT_PEER);
                    ++woken;
                    throw;
                }
            });
            FAIL();
        } catch (const Failure& failure) { EXPECT_STREQ(failure.what(), "rank 1 throws"); }
        EXPECT_EQ(woken, 2);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

static const Op attention{Part::attention, Pass::F, 3, 5};

static Op receive_of(Op op, int peer) {
    op.kind = Kind::receive;
    op.peer = peer;
    return op;
}

TEST(Progress, Text) {
    Progress progress;
    EXPECT_EQ(progress.text(), "nothing");
    progress.computing(attention);
    EXPECT_EQ(progress.text(), "attention layer 3 chunk 5");
    progress.waiting(receive_of(attention, 2));
    EXPECT_EQ(progress.text(), "waits for Y layer 3 chunk 5 from rank 2");
    Op send = receive_of(attention, 1);
    send.kind = Kind::send;
    progress.waiting(send);
    EXPECT_EQ(progress.text(), "waits for the send of Y layer 3 chunk 5 to rank 1");
    progress.busy_with("optimizer");
    EXPECT_EQ(progress.text(), "optimizer");
    const auto before = progress.meet();
    EXPECT_EQ(progress.text(), "waits for all ranks: optimizer");
    progress.resume(before);
    EXPECT_EQ(progress.text(), "optimizer");
}

TEST(Progress, LimitFollowsFromTheSlowestOfItsKind) {
    Progress progress;
    Op post = attention, backward = post;
    post.part = backward.part = Part::post;
    backward.pass = Pass::B;
    for (int i = 0; i < 3; ++i) {
        progress.computing(post);
        EXPECT_EQ(progress.report(300).limit, 300) << "with " << i << " measurements";
    }
    progress.computing(post);
    EXPECT_EQ(progress.report(300).limit, 10);  // they took next to no time
    for (int i = 0; i < 5; ++i) progress.computing(attention);
    EXPECT_EQ(progress.report(300).limit, 300);  // of unknown work
    progress.computing(backward);
    EXPECT_EQ(progress.report(300).limit, 300);  // another kind
    progress.busy_with("optimizer");
    EXPECT_EQ(progress.report(300).limit, 300);
    for (int i = 0; i < 3; ++i) {
        progress.waiting(receive_of(attention, 2));
        EXPECT_EQ(progress.report(300).limit, 300) << "messages may be large";
    }
    progress.waiting(receive_of(attention, 2));
    EXPECT_EQ(progress.report(300).limit, 10);
    EXPECT_EQ(progress.report(300).peer, 2);
    // Time before the process was resumed does not count.
    EXPECT_LE(progress.report(300, seconds_now()).seconds, 1e-3);
}

TEST(Progress, LimitOfAttentionGrowsWithItsWork) {
    Progress progress;
    const auto limit_of = [&](double work) {
        progress.computing(attention, 2, work);
        return progress.report(3000).limit;
    };
    for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(limit_of(1), 3000) << "with " << i << " measurements";
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_EQ(progress.report(3000).peer, 2);
    EXPECT_EQ(limit_of(1), 10);
    const double limit = limit_of(200);
    EXPECT_GE(limit, 5 * 200 * 0.02);
    EXPECT_NEAR(limit_of(400), 2 * limit, 1e-3 * limit);
    EXPECT_EQ(limit_of(1e9), 3000);  // --hang-timeout
    EXPECT_EQ(limit_of(0), 3000);
}

// While one thread writes, another never reads the half of one state and the half of the next.
TEST(Progress, ReadsAreWhole) {
    Progress progress;
    std::atomic<bool> ended = false;
    std::thread writer([&] {
        for (int i = 0; i < 200000; ++i) {
            Op op = attention;
            op.layer = op.chunk = i % 7;
            progress.computing(op);
        }
        ended = true;
    });
    while (!ended) {
        const std::string text = progress.text();
        if (text == "nothing") continue;
        const std::string end = text.substr(text.rfind(' ') + 1);
        ASSERT_EQ(text, "attention layer " + end + " chunk " + end);
    }
    writer.join();
}

static RankStatus status(Activity activity, const std::string& text, double seconds, double limit, int peer = -1) {
    RankStatus s;
    s.report = {activity, peer, seconds, limit, ""};
    text.copy(s.report.text, sizeof s.report.text - 1);
    s.report.text[text.size()] = '\0';
    s.heard = 100;
    return s;
}

class Cause : public ::testing::Test {
protected:
    std::vector<RankStatus> ranks = {status(Activity::busy, "optimizer", 5, 300),
                                     status(Activity::waiting, "waits for Y layer 3 chunk 5 from rank 2", 50, 10, 2),
                                     status(Activity::computing, "attention layer 3 chunk 5", 9, 10)};
    std::string at(double now) const { return cause_of_end(ranks, now); }
};

TEST_F(Cause, NothingWhileAllIsWell) {
    EXPECT_EQ(at(100), "");
    EXPECT_EQ(at(109), "");
    ranks[0].state = RankStatus::gone;
    ranks[0].heard = 0;
    ranks[0].report.seconds = 1e6;
    EXPECT_EQ(at(100), "");
}

TEST_F(Cause, ADeadRankBeforeAllElse) {
    ranks[0].report.seconds = 1000;
    ranks[2].state = RankStatus::dead;
    EXPECT_EQ(at(100),
              "rank 2 has died, last seen in attention layer 3 chunk 5; rank 1 waits for Y layer 3 chunk 5 "
              "from rank 2");
    ranks[1].report.peer = 0;
    ranks[2].report.peer = 1;
    EXPECT_EQ(at(100),
              "rank 2 has died, last seen in attention layer 3 chunk 5; no rank waits for it yet, the first would be "
              "rank 1");
    ranks[2].state = RankStatus::present;
    ranks[1].state = RankStatus::dead;
    ranks[1].report.peer = 2;
    EXPECT_EQ(at(100),
              "rank 1 has died, last seen waiting for Y layer 3 chunk 5 from rank 2; no rank waits for it yet");
}

TEST_F(Cause, AProcessThatDoesNotAnswer) {
    ranks[0].heard = ranks[1].heard = 110.5;
    EXPECT_EQ(at(110.5),
              "rank 2 has not answered for 10 s, last seen in attention layer 3 chunk 5; rank 1 waits for Y "
              "layer 3 chunk 5 from rank 2");
}

TEST_F(Cause, TheRankThatComputesTooLongAndNotThoseThatWait) {
    ranks[2].report.seconds = 12.7;
    EXPECT_EQ(at(100),
              "rank 2 has been in attention layer 3 chunk 5 for 12 s (limit 10 s); rank 1 waits for Y layer 3 "
              "chunk 5 from rank 2");
    ranks[0].report.seconds = 3000;  // ten times its limit
    EXPECT_EQ(at(100), "rank 0 has been in optimizer for 3000 s (limit 300 s); no rank waits for it yet");
}

TEST_F(Cause, AllWait) {
    ranks[0] = status(Activity::meeting, "waits for all ranks: validation", 3, 300);
    ranks[2] = status(Activity::waiting, "waits for X layer 0 chunk 0 from rank 1", 20, 10, 1);
    EXPECT_EQ(at(100),
              "all ranks wait, the first to do so: rank 1 waits for Y layer 3 chunk 5 from rank 2 for 50 s "
              "(limit 10 s)");
    ranks[2].heard = 98;  // perhaps stopped, and only silence will tell
    EXPECT_EQ(at(100), "");
    ranks[2].heard = 100;
    ranks[2].report.seconds = ranks[1].report.seconds = 9;
    EXPECT_EQ(at(100), "");
}

TEST(Watchdog, EndsAtOnceAndQuietly) {
    Progress one, other;
    one.computing(attention);
    for (int i = 0; i < 20; ++i) {
        const Watchdog watchdog({&one, &other}, 300);
        EXPECT_FALSE(watchdog.peer_died());
    }
}

TEST(WatchdogDeathTest, AThreadThatHangs) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const auto hang = [] {
        Progress one, other;
        one.waiting(receive_of(attention, 1));
        other.computing(attention);
        const Watchdog watchdog({&one, &other}, 0.3);
        pause();
    };
    EXPECT_EXIT(hang(), ::testing::ExitedWithCode(EXIT_PEER),
                "train_gpt: rank 1 has been in attention layer 3 chunk 5 for 0 s .limit 0 s.; rank 0 waits for Y layer "
                "3 chunk 5 from rank 1");
}
