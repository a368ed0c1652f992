// The CUDA program under every schedule, its GPU played by the host (cuda_on_host): kernels, copies between ranks that
// share a GPU, tensors that the host may not touch. Each layout has to agree with one rank.
#include <gtest/gtest.h>

#include "dev/tests/layouts.h"

namespace {

constexpr int steps = 2;

TEST(LayoutsOnHost, AgreeWithOneRank) {
    std::map<bool, LayoutRun> reference;  // [tied]
    int n = 0;
    for (const char* schedule :
         {"gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "helix", "helix", "helix", "helix"}) {
        const bool moves = n == 5 || n == 7;  // of helix
        const LayoutCase layout{.schedule = schedule,
                                .folds = 1 + n % 2,
                                .ranks = 2 + n % 2,
                                .layers = 3,
                                .chunks = 4,
                                .row_pieces = n > 6 ? 3 : 1,
                                .helix = {moves, moves, moves, moves},
                                .recompute = Recompute(n % 4),
                                .documents = true,
                                .tied = n % 2 == 0,
                                .mlp_chunk = n % 2 ? 5 : 0};
        LayoutRun& one = reference[layout.tied];
        if (one.losses.empty()) one = run_layout(layout.on_one_rank(), steps);
        const Difference difference = compare_runs(run_layout(layout, steps), one, layout.model());
        for (const std::string& problem : difference.problems) ADD_FAILURE() << layout.text() << ": " << problem;
        std::printf("  %s: %s\n", layout.text().c_str(), difference.text().c_str());
        ++n;
    }
}

TEST(LayoutsOnHost, SlicesAgreeWithOneRank) {
    const LayoutCase layout{.schedule = "gpipe", .ranks = 2, .layers = 2, .chunks = 5, .chunk_tokens = 7};
    const Difference difference =
        compare_runs(run_layout(layout, steps), run_layout(layout.on_one_rank(), steps), layout.model());
    for (const std::string& problem : difference.problems) ADD_FAILURE() << problem;
    std::printf("  %s\n", difference.text().c_str());
}

}  // namespace
