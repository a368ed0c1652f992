// Built with ThreadSanitizer, which ends the program with status 66 at the first race it sees: thread ranks run every
// schedule. One OpenMP thread a rank, since the sanitizer does not see how libgomp's threads meet.
#include <gtest/gtest.h>

#include "dev/tests/layouts.h"

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=66"; }

namespace {

constexpr int steps = 2;

TEST(Races, NoneUnderAnySchedule) {
    int layouts = 0;
    for (const char* schedule : {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "helix"})
        for (const bool move : {true, false})
            for (const int mode : {0, 1, 2, 3}) {
                const Recompute recompute = recompute_with({move, move, move, move}, mode);
                const bool helix = std::string(schedule) == "helix";
                if (!helix && !move) continue;
                const LayoutCase layout{.schedule = schedule,
                                        .folds = helix ? 2 : 1,
                                        .ranks = 3,
                                        .layers = 4,
                                        .chunks = 7,
                                        .helix = {move, move, move, move},
                                        .recompute = recompute,
                                        .documents = layouts % 2 == 1,
                                        .tied = true};
                EXPECT_TRUE(std::isfinite(run_layout(layout, steps).norm)) << layout.text();
                ++layouts;
            }
    std::printf("  %d layouts\n", layouts);
}

TEST(Races, NoneInSlicesUnderGpipe) {
    const LayoutCase layout{.schedule = "gpipe", .ranks = 2, .layers = 3, .chunks = 5, .tied = true, .chunk_tokens = 8};
    EXPECT_TRUE(std::isfinite(run_layout(layout, steps).norm));
}

// Goes on before its message has arrived: the other rank may still be copying it.
class HastyTransport : public ThreadTransport {
public:
    using ThreadTransport::ThreadTransport;
    void wait(int64_t begin, int64_t end) override {
        if (begin == 0) ThreadTransport::wait(begin, end);  // earlier batches, and all of them at the end
    }
};

TEST(Races, APlantedOneIsCaught) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    EXPECT_EXIT(
        {
            run_layout<HastyTransport>({.schedule = "1f1b", .ranks = 2, .layers = 4, .chunks = 8}, steps);
            std::exit(0);
        },
        testing::ExitedWithCode(66), "data race");
}

}  // namespace
