// A thread rank that throws in the midst of a step: the others end, too, and what is reported names the rank and what
// it was doing. HELIXTRAIN_SEED=n draws other moments.
#include <gtest/gtest.h>

#include "dev/tests/layouts.h"
#include "llmc/parallel/team.h"

namespace {

TEST(RankFailures, EndAllRanksAndNameTheCause) {
    std::mt19937 generator(seed_of_tests());
    const auto drawn = [&](int from, int to) { return std::uniform_int_distribution(from, to)(generator); };
    static const char* const names[] = {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "helix"};
    double slowest = 0;
    for (int n = 0; n < 40; ++n) {
        LayoutCase layout{.schedule = names[n % 6], .ranks = drawn(2, 4), .layers = drawn(4, 6), .chunks = drawn(1, 8)};
        if (layout.schedule == "helix")
            layout.folds = drawn(1, 2), layout.helix.move_qkv = layout.helix.weights_once = drawn(0, 1);
        const int victim = drawn(0, layout.ranks - 1), kind = drawn(0, 2);
        const double moment = drawn(0, 999) / 1e3;  // part of the victim's computes
        const Step step = prepare_step(layout.batch(), layout.chunk_tokens, layout.model());
        std::string doing;
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
        static const char* const causes[] = {"the disk is full", "out of memory", "a planted error"};
        EXPECT_EQ(exit_code, codes[kind]) << layout.text();
        EXPECT_EQ(message.find("rank " + std::to_string(victim) + ", " + doing + ": "), 0u) << message << "\n" << doing;
        EXPECT_NE(message.find(causes[kind]), std::string::npos) << message;
    }
    EXPECT_LT(slowest, 10);  // the limit that users are promised
    std::printf("  40 failures, all ranks gone after at most %.3f s\n", slowest);
}

}  // namespace
