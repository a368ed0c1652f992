// A thread rank that throws in the midst of a step: the others end, too, and what is reported names the rank, what it
// was doing and who waits for it. HELIXTRAIN_SEED=n draws other moments.
#include <gtest/gtest.h>

#include <set>

#include "dev/tests/layouts.h"
#include "llmc/parallel/team.h"

namespace {

// What may stand behind the cause when a rank fails at op `at` of its list: who waits for which of its messages, else
// to whom it would have sent next.
std::set<std::string> possible_waits(const std::vector<Op>& ops, size_t at, int rank) {
    std::set<std::string> waits;
    std::string first_to_wait;
    for (size_t i = 0; i < ops.size(); ++i) {
        if (ops[i].kind != Kind::send) continue;
        Op receive = ops[i];
        receive.kind = Kind::receive;
        receive.peer = rank;
        const std::string peer = "rank " + std::to_string(ops[i].peer);
        waits.insert("; " + peer + " waits for " + op_name(receive).substr(std::strlen("receive of ")));
        if (i > at && first_to_wait.empty()) first_to_wait = "; no rank waits for it yet, the first would be " + peer;
    }
    waits.insert(first_to_wait);
    return waits;
}

TEST(RankFailures, EndAllRanksAndNameTheCause) {
    std::mt19937 generator(seed_of_tests());
    const auto drawn = [&](int from, int to) { return std::uniform_int_distribution(from, to)(generator); };
    static const char* const names[] = {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "helix"};
    double slowest = 0;
    int ends[3] = {};  // another rank waits; none yet; this one has nothing more to send
    for (int n = 0; n < 40; ++n) {
        LayoutCase layout{.schedule = names[n % 6], .ranks = drawn(2, 4), .layers = drawn(4, 6), .chunks = drawn(1, 8)};
        if (layout.schedule == "helix")
            layout.folds = drawn(1, 2), layout.helix.move_qkv = layout.helix.weights_once = drawn(0, 1);
        const int victim = drawn(0, layout.ranks - 1), kind = drawn(0, 2);
        const double moment = drawn(0, 999) / 1e3;  // part of the victim's computes
        const Step step = prepare_step(layout.batch(), layout.chunk_tokens, layout.model());
        std::string doing;
        std::set<std::string> waits;
        int exit_code = 0;
        std::string message;
        double thrown = 0;
        try {
            Team team{Launch{}};
            team.run(layout.ranks, 600, [&](Transport& transport) {
                Rank rank(layout.options(transport.rank, int(step.chunks.size())), transport);
                set_weights(rank);
                const Plan& plan = rank.plan_for(step.group_sizes, true);
                const auto is_compute = [](const Op& op) { return op.kind == Kind::compute; };
                int left = int(moment * double(std::count_if(plan.ops.begin(), plan.ops.end(), is_compute)));
                Observer observer;
                observer.after_op = [&](size_t i) {
                    if (transport.rank != victim || left-- > 0) return;
                    doing = op_name(plan.ops[i]);
                    waits = possible_waits(plan.ops, i, victim);
                    thrown = seconds_now();
                    if (kind == 0) throw Failure(EXIT_STORAGE, "the disk is full");
                    if (kind == 1) throw std::bad_alloc();
                    throw std::logic_error("a planted error");
                };
                for (int s = 0; s < 3; ++s) compute_gradients(rank, step, &observer);
                return 0;
            });
        } catch (const Failure& failure) {
            exit_code = failure.exit_code;
            message = failure.what();
        }
        slowest = std::max(slowest, seconds_now() - thrown);
        static constexpr int codes[] = {EXIT_STORAGE, EXIT_MEMORY, EXIT_INTERNAL};
        static const char* const causes[] = {"the disk is full", "out of memory; choose a smaller model or batch",
                                             "internal error, please report it: a planted error"};
        EXPECT_EQ(exit_code, codes[kind]) << layout.text();
        const std::string cause = "rank " + std::to_string(victim) + ", " + doing + ": " + causes[kind];
        ASSERT_TRUE(message.starts_with(cause)) << message << "\n" << cause;
        const std::string wait = message.substr(cause.size());
        EXPECT_TRUE(waits.count(wait)) << message;
        ++ends[wait.empty() ? 2 : wait.starts_with("; no rank")];
    }
    EXPECT_LT(slowest, 10);  // the limit that users are promised
    std::printf(
        "  40 failures, all ranks gone after at most %.3f s; in %d a rank waited, in %d none yet, in %d none at all\n",
        slowest, ends[0], ends[1], ends[2]);
}

}  // namespace
