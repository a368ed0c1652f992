// The emulated links of rehearsals: messages share them by the rules of the simulator, on the real clock. When a
// message arrives follows from when its ends were posted, to the last digit, however late threads wake up.
#include <gtest/gtest.h>

#include "dev/tests/thread_ranks.h"
#include "llmc/parallel/emulated_links.h"

namespace {

constexpr double message = 0.03;  // seconds

// Ranks of messages that all take `message`; body(rank, transport) posts and waits.
template <class Body>
void on_links(int ranks, const Body& body) {
    EmulatedLinks links(ranks);
    on_thread_ranks(ranks, [&](Transport& real) {
        ThreadLinkTransport transport(real, {message}, links);
        body(transport.rank, transport);
    });
}

struct Letter {
    int64_t text = 0;
    Transfer send_to(int peer) { return {true, peer, &text, sizeof text}; }
    Transfer receive_from(int peer) { return {false, peer, &text, sizeof text}; }
};

double post_and_wait(LinkTransport& transport, const std::vector<Transfer>& batch) {
    const int64_t first = transport.post(batch);
    transport.wait(first, first + int64_t(batch.size()));
    return transport.arrival;
}

TEST(EmulatedLinks, AMessageTakesItsTimeFromItsSecondPostOn) {
    double posted = 0, arrived[2] = {};
    on_links(2, [&](int rank, LinkTransport& transport) {
        Letter letter{rank == 0 ? 7 : 0};
        if (rank == 1) {
            std::this_thread::sleep_for(std::chrono::milliseconds(40));
            posted = seconds_now();
        }
        arrived[rank] = post_and_wait(transport, {rank == 0 ? letter.send_to(1) : letter.receive_from(0)});
        EXPECT_GE(seconds_now(), arrived[rank]);
        EXPECT_EQ(letter.text, 7);
    });
    EXPECT_EQ(arrived[0], arrived[1]);
    EXPECT_GE(arrived[1], posted + message);
}

TEST(EmulatedLinks, TwoMessagesShareTheLinkOutOrIn) {
    for (const bool out : {true, false}) {
        double arrived[3] = {};
        on_links(3, [&](int rank, LinkTransport& transport) {
            Letter one{1}, two{2};
            const auto batch = rank > 0 ? std::vector{out ? one.receive_from(0) : one.send_to(0)}
                               : out    ? std::vector{one.send_to(1), two.send_to(2)}
                                        : std::vector{one.receive_from(1), two.receive_from(2)};
            if (rank == 0) transport.all_gather("");  // the others have posted
            const int64_t first = transport.post(batch);
            if (rank > 0) transport.all_gather("");
            transport.wait(first, first + int64_t(batch.size()));
            arrived[rank] = transport.arrival;
        });
        EXPECT_NEAR(std::abs(arrived[1] - arrived[2]), message, 1e-6) << (out ? "out" : "in");
        EXPECT_EQ(arrived[0], std::max(arrived[1], arrived[2])) << (out ? "out" : "in");
    }
}

TEST(EmulatedLinks, BothDirectionsOfAnExchangeRunTogether) {
    double arrived[2] = {};
    on_links(2, [&](int rank, LinkTransport& transport) {
        Letter out{rank}, in;
        arrived[rank] = post_and_wait(transport, {out.send_to(1 - rank), in.receive_from(1 - rank)});
        EXPECT_EQ(in.text, 1 - rank);
    });
    EXPECT_EQ(arrived[0], arrived[1]);
}

// Rank 0 posts a batch for rank 1, which is late, and then one for rank 2, which is not: it has to wait its turn.
TEST(EmulatedLinks, ABatchIsServedAfterTheOneBefore) {
    double arrived[3] = {};
    on_links(3, [&](int rank, LinkTransport& transport) {
        Letter one{1}, two{2};
        if (rank == 1) transport.all_gather("");
        if (rank == 0) transport.post(std::vector{one.send_to(1)});
        transport.post(std::vector{rank == 0 ? two.send_to(2) : one.receive_from(0)});
        if (rank != 1) transport.all_gather("");
        transport.wait(0, rank == 0 ? 2 : 1);
        arrived[rank] = transport.arrival;
    });
    EXPECT_NEAR(arrived[2] - arrived[1], message, 1e-6);
}

TEST(EmulatedLinks, WhoWaitsHearsOfAFailure) {
    try {
        on_links(3, [&](int rank, LinkTransport& transport) {
            Letter one, two;
            if (rank == 2) {
                transport.all_gather("");
                throw Failure(EXIT_STORAGE, "the disk is full");
            }
            // The second message stands behind one whose other end is never posted.
            if (rank == 0) transport.post(std::vector{two.receive_from(2)});
            const int64_t n = transport.post(std::vector{rank == 0 ? one.send_to(1) : one.receive_from(0)});
            transport.all_gather("");
            EXPECT_THROW(transport.wait(n, n + 1), Failure);
            transport.abandon();
        });
        FAIL() << "nobody has failed";
    } catch (const Failure& failure) { EXPECT_EQ(failure.exit_code, EXIT_STORAGE) << failure.what(); }
}

TEST(Progress, AKnownDurationRaisesTheLimitOfAnOp) {
    Progress progress;
    for (int i = 0; i < 5; ++i) progress.computing({Part::post, Pass::F, 0, i});
    EXPECT_EQ(progress.report(600).limit, 10);
    progress.least_limit = 45;
    EXPECT_EQ(progress.report(600).limit, 45);
}

}  // namespace
