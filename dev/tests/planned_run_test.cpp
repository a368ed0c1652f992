// Steps as they are planned while a run goes on: time from the very chunks of a step, memory as ranks allocate it.
#include <gtest/gtest.h>

#include <cstdio>

#include "dev/bench/calibration_cases.h"
#include "llmc/clock.h"
#include "llmc/io/config.h"
#include "llmc/parallel/memory.h"
#include "llmc/parallel/planned_run.h"
#include "llmc/parallel/rank.h"

namespace {

Step step_of(const GptConfig& g, int64_t chunk_tokens, const std::vector<int64_t>& lengths) {
    Batch batch;
    for (int64_t length : lengths) {
        batch.sequences.push_back({std::vector<int32_t>(size_t(length)), std::vector<int32_t>(size_t(length))});
        batch.tokens += length;
    }
    return prepare_step(batch, chunk_tokens, g);
}

// A machine with curves that bend, so that a wrong length shows.
Cluster some_cluster() {
    Cluster c = cluster_of_rate(100);
    c.memory_bandwidth = 20, c.inside = c.between = {8, 3};
    c.matrix_efficiency = {{16, 256, 2048}, {0.4, 0.9, 1}};
    c.attention_efficiency = {{64, 256, 1024}, {0.3, 0.7, 1}};
    c.attention_backward_efficiency = {{64, 256, 1024}, {0.4, 0.7, 1}};
    return c;
}

TEST(PlannedRun, WindowsTakeWhatTheirPlanTakes) {
    const Cluster cluster = some_cluster();
    for (const CalibrationCase& c : calibration_cases()) {
        if (!c.documents.empty()) continue;
        const RankOptions options = c.options();
        const PlannedStep plan(options, c.chunks());
        const double expected = simulate_on(cluster, plan).makespan + update_ms(cluster, plan);
        PlannedRun run(cluster, options);
        const Step step = step_of(options.model, options.chunk_tokens, c.lengths());
        for (int n = 0; n < 2; ++n) EXPECT_NEAR(run.step_ms(step), expected, 1e-9 * expected) << c.name();
    }
}

// One rank, where nothing but attention takes time: a step takes the sum over documents, each at its own length.
TEST(PlannedRun, DocumentsTakeTheirOwnTime) {
    Cluster cluster = cluster_of_rate(1);
    cluster.matrix_tflops = 1e30;
    const GptConfig g{3, 32, 2, 256, 257, 320, true};
    const RankOptions options{g, Recompute::none, 256};
    PlannedRun run(cluster, options);
    for (const std::vector<int64_t>& lengths :
         {std::vector<int64_t>{256, 256}, {100, 30, 60, 256, 17}, {256, 255, 1, 1}, {256, 256}}) {
        double expected = 0;  // ms at 1e6 FLOP a ms: two products forward, five backward
        for (int64_t n : lengths) expected += 3 * (1 + 2.5) * 2 * double(g.channels * n * n) / 1e6;
        const double update = update_ms(cluster, PlannedStep(options, 1));
        const double planned = run.step_ms(step_of(g, 256, lengths)) - update;
        EXPECT_NEAR(planned, expected, 1e-9 * expected);
    }
    cluster.attention_efficiency = cluster.attention_backward_efficiency = {{64, 256}, {0.5, 1}};
    PlannedRun slower(cluster, options);
    EXPECT_GT(slower.step_ms(step_of(g, 256, {64, 64, 64, 64})), run.step_ms(step_of(g, 256, {64, 64, 64, 64})) * 1.9);
}

// Chunks that are not full carry fewer rows in their messages.
TEST(PlannedRun, MessagesCarryTheRowsOfTheStep) {
    Cluster cluster = cluster_of_rate(1e30);
    cluster.inside = cluster.between = {1e-3, 0};
    const GptConfig g{2, 32, 2, 64, 257, 320, true};
    RankOptions options{g, Recompute::none, 64, 0, 0, 1, true, {.ranks = 2, .schedule = "gpipe", .max_chunks = 2}};
    PlannedRun run(cluster, options);
    const double full = run.step_ms(step_of(g, 64, {64, 64})), half = run.step_ms(step_of(g, 64, {48, 64, 16}));
    const double rest = update_ms(cluster, PlannedStep(options, 2));
    EXPECT_NEAR(half, full, 1e-9 * full);  // as many rows, otherwise packed
    EXPECT_NEAR(run.step_ms(step_of(g, 64, {64, 32})) - rest, 0.75 * (full - rest), 1e-9 * full);
}

// What a rank allocates is what was planned for its largest step, to the byte; no step asks for more.
TEST(PlannedRun, MemoryIsExact) {
    NoTransport nobody;
    for (const CalibrationCase& c : calibration_cases()) {
        const std::vector<int> groups = step_of(c.options().model, c.chunk_tokens, c.lengths()).group_sizes;
        const PlannedStep plan(chunk_shapes(groups, c.chunk_tokens, c.context), c.options());
        const std::vector<MemoryPlan> planned = memory_plans(c.options());
        for (int r = 0; r < 2; ++r) {
            Rank rank(c.options(r), nobody);
            rank.plan_for(groups, true);
            EXPECT_EQ(rank.memory.activations, round_up(plan.plan_of(r).size.bytes, 4096)) << c.name();
            EXPECT_EQ(rank.memory.total(), planned[size_t(r)].total()) << c.name();
        }
    }
}

// Planning a step must not be felt beside taking it: not asserted, since machines are shared.
TEST(PlannedRun, PrintsWhatItTakes) {
    const GptConfig g{12, 768, 12, 1024, 50257, 50304, true};
    RankOptions options{g, Recompute::none, 1024, 0, 256, 1, true, {.ranks = 2, .schedule = "helix", .max_chunks = 32}};
    PlannedRun run(some_cluster(), options);
    for (int64_t n : {0, 1, 2, 17}) {  // the last one has a pattern of its own
        std::vector<int64_t> lengths;
        for (int64_t i = 0; i < 16 + n / 16; ++i) lengths.insert(lengths.end(), {700 + i + n, 200 - i, 30 + 2 * i});
        const Step step = step_of(g, 1024, lengths);
        const double start = seconds_now();
        EXPECT_GT(run.step_ms(step), 0);
        std::printf("  %zu chunks of documents, 12 layers, helix: planned in %.1f ms\n", step.chunks.size(),
                    1e3 * (seconds_now() - start));
    }
}

}  // namespace
