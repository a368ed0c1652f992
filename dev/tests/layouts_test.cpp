// A layout never changes the mathematics: every schedule, on every number of ranks, gives the loss, the gradients and
// the weights of a single rank. HELIXTRAIN_SEED=n draws another covering array.
#include <gtest/gtest.h>

#include <map>

#include "dev/tests/checkpoint_test.h"
#include "dev/tests/layouts.h"

namespace {

constexpr int steps = 5;

// The same model and batch on one rank, once for each.
const LayoutRun& reference(const LayoutCase& layout) {
    static std::map<std::string, LayoutRun> known;
    LayoutCase one = layout.on_one_rank();
    one.schedule = "1f1b";
    const auto [place, is_new] = known.try_emplace(one.text());
    if (is_new) place->second = run_layout(one, steps);
    return place->second;
}

struct Summary {
    int cases = 0;
    Difference worst = {};

    void expect_equal(const LayoutCase& layout) {
        const Difference difference = compare_runs(run_layout(layout, steps), reference(layout), layout.model());
        std::string problems;
        for (const std::string& problem : difference.problems) problems += "\n  " + problem;
        EXPECT_TRUE(difference.problems.empty()) << layout.text() << problems;
        ++cases;
        for (double Difference::*field :
             {&Difference::loss, &Difference::norm, &Difference::gradient, &Difference::key_bias, &Difference::weight})
            if (!(difference.*field <= worst.*field)) worst.*field = difference.*field;
    }
    void print() const { std::printf("  %d layouts, at most: %s\n", cases, worst.text().c_str()); }
};

// ---------------------------------------------------------------------------------------------------------------------

TEST(Layouts, HelixAgreesWithOneRank) {
    Summary summary;
    for (int F : {1, 2})
        for (int p : {2, 3, 4})
            for (int L : {0, 1, 2})
                for (int m : {0, 1, 2})
                    for (const HelixOptions& helix : helix_variants())
                        summary.expect_equal({.schedule = "helix",
                                              .folds = F,
                                              .ranks = p,
                                              .layers = layers_of(L, p),
                                              .chunks = chunks_of(m, p, F),
                                              .helix = helix,
                                              .recompute = recompute_with(helix, summary.cases / 7 + summary.cases),
                                              .documents = summary.cases / 4 % 2 == 1,
                                              .tied = summary.cases / 2 % 2 == 1});
    EXPECT_EQ(summary.cases, 54 * int(helix_variants().size()));
    summary.print();
}

TEST(Layouts, RoundsAgreeWithOneRank) {
    Summary summary;
    for (int F : {1, 2})
        for (int p : {2, 3})
            for (int round : {p * F, p * F + 1, p - 1})
                for (const HelixOptions& helix : helix_variants())
                    summary.expect_equal({.schedule = "helix",
                                          .folds = F,
                                          .ranks = p,
                                          .layers = p + summary.cases % 3,
                                          .chunks = 2 * p * F + 1,
                                          .round_chunks = round,
                                          .helix = helix,
                                          .recompute = recompute_with(helix, summary.cases / 7 + summary.cases),
                                          .documents = summary.cases / 4 % 2 == 1,
                                          .tied = summary.cases / 2 % 2 == 1});
    summary.print();
}

// Also more pieces than a chunk has rows.
TEST(Layouts, RowPiecesAgreeWithOneRank) {
    Summary summary;
    for (int F : {1, 2})
        for (int p : {2, 3})
            for (int pieces : {2, 5, 17})
                for (const HelixOptions& helix : helix_variants())
                    summary.expect_equal({.schedule = "helix",
                                          .folds = F,
                                          .ranks = p,
                                          .layers = p + summary.cases % 3,
                                          .chunks = p * F + summary.cases % 2,
                                          .row_pieces = pieces,
                                          .deferred = summary.cases % 5 == 0 ? 3 : 0,
                                          .helix = helix,
                                          .recompute = recompute_with(helix, summary.cases / 7 + summary.cases),
                                          .documents = summary.cases / 4 % 2 == 1,
                                          .tied = summary.cases / 2 % 2 == 1,
                                          .mlp_chunk = summary.cases % 3 == 1 ? 5 : 0});
    summary.print();
}

// What travels where cuDNN attends, which computes D itself.
TEST(Layouts, OutputsSentAgainAgreeWithOneRank) {
    Summary summary;
    for (int p : {2, 3})
        for (int pieces : {1, 3})
            for (const HelixOptions& helix : helix_variants())
                for (Recompute recompute : {Recompute::elementwise, Recompute::without_attention}) {
                    if (!helix.move_norm) continue;
                    summary.expect_equal({.schedule = "helix",
                                          .folds = 1 + summary.cases % 2,
                                          .ranks = p,
                                          .layers = p + 1,
                                          .chunks = 2 * p,
                                          .row_pieces = pieces,
                                          .helix = helix,
                                          .recompute = recompute,
                                          .output_again = true});
                }
    summary.print();
}

// Ranks that run nothing hold copies of what a spread head needs.
TEST(Layouts, RanksWithoutWorkAgreeWithOneRank) {
    Summary summary;
    for (int chunks : {1, 2})
        for (const bool tied : {false, true})
            for (const HelixOptions& helix : helix_variants())
                summary.expect_equal({.schedule = "helix",
                                      .folds = 2,
                                      .ranks = 7,
                                      .layers = 2,
                                      .chunks = chunks,
                                      .helix = helix,
                                      .tied = tied});
    summary.print();
}

TEST(Layouts, DeferredWeightGradientsAgreeWithOneRank) {
    Summary summary;
    for (const Schedule& schedule : schedules())
        for (int p : {2, 3})
            for (int most : {1, 4, 100}) {
                const HelixOptions helix = helix_variants()[size_t(summary.cases) % helix_variants().size()];
                const LayoutCase layout{.schedule = schedule.name,
                                        .folds = 1 + summary.cases % 2,
                                        .ranks = p,
                                        .layers = 2 * p,
                                        .chunks = 2 * p,
                                        .deferred = most,
                                        .helix = helix,
                                        .recompute = recompute_with(helix, summary.cases),
                                        .documents = summary.cases % 2 == 1,
                                        .tied = summary.cases % 3 == 1};
                summary.expect_equal(layout);
            }
    summary.print();
}

// Those with processes instead of threads are mpi_layouts.cpp's.
TEST(Layouts, AllAxesAgreeWithOneRank) {
    std::printf("  HELIXTRAIN_SEED=%u\n", seed_of_tests());
    const CoveringLayouts layouts(seed_of_tests());
    EXPECT_TRUE(missing_pairs(layouts.sizes, layouts.rows).empty());
    EXPECT_FALSE(missing_pairs(layouts.sizes, {layouts.rows.begin() + 1, layouts.rows.end()}).empty());  // it can fail
    Summary summary;
    for (const LayoutCase& layout : layouts.threads) summary.expect_equal(layout);
    summary.print();
}

// Memory between what recomputation without attention takes and what the mode elementwise does: some ops keep what
// products need again, the others recompute it, whatever the other ranks do.
TEST(Layouts, WhatFitsIsKeptAndAgreesWithOneRank) {
    Summary summary;
    int kept = 0, all = 0;  // layers' parts that could keep something
    for (const Schedule& schedule : schedules())
        for (const double share : {0.3, 0.7})
            for (const bool spread : {false, true}) {
                if (spread && schedule.name != "helix") continue;
                LayoutCase layout{.schedule = schedule.name,
                                  .folds = 2,
                                  .ranks = 3,
                                  .layers = 5,
                                  .chunks = 7,
                                  .helix = {true, true, true, spread},
                                  .tied = true};
                const auto most_bytes = [&](Recompute recompute) {  // of a rank
                    layout.recompute = recompute;
                    int64_t most = 0;
                    for (int rank : {0, 1, 2})
                        most = std::max(most, plan_memory(layout.options(rank, layout.chunks)).total());
                    return most;
                };
                const int64_t least = most_bytes(Recompute::without_attention);
                const int64_t enough = most_bytes(Recompute::elementwise);
                EXPECT_GT(enough, least) << layout.text();
                layout.memory_limit = least + int64_t(share * double(enough - least));
                EXPECT_LE(most_bytes(Recompute::automatic), layout.memory_limit) << layout.text();
                int kept_here = 0, all_here = 0;
                for (int rank : {0, 1, 2}) {
                    const std::vector<int> groups(size_t(layout.chunks), 1);
                    const Plan plan = plan_pattern(layout.options(rank, layout.chunks), groups, true);
                    for (const Op& op : plan.ops)
                        if (op.pass == Pass::B && (op.part == Part::attention || op.part == Part::post) &&
                            op.kind == Kind::compute)
                            kept_here += op.keeps, ++all_here;
                }
                EXPECT_GT(kept_here, 0) << layout.text();
                EXPECT_LT(kept_here, all_here) << layout.text();
                kept += kept_here, all += all_here;
                summary.expect_equal(layout);
            }
    std::printf("  %d of %d attentions and posts keep what products need again\n", kept, all);
    summary.print();
}

TEST(Layouts, SlicedSequencesAgreeWithOneRank) {
    Summary summary;
    for (int p : {2, 3})
        for (int64_t chunk_tokens : {7, 4})
            for (Recompute recompute : recompute_modes)
                summary.expect_equal({.schedule = "gpipe",
                                      .ranks = p,
                                      .layers = 3,
                                      .recompute = recompute,
                                      .tied = p == 2,
                                      .chunk_tokens = chunk_tokens});
    summary.print();
}

TEST(Layouts, SameLayoutTwiceHasTheSameBits) {
    for (const Schedule& schedule : schedules()) {
        const LayoutCase layout{
            .schedule = schedule.name, .folds = 2, .ranks = 3, .layers = 4, .chunks = 7, .tied = true};
        EXPECT_TRUE(same_bits(run_layout(layout, steps), run_layout(layout, steps))) << layout.text();
    }
}

// As published, both work off a group in the same order of chunks, so every sum has the same order, too.
TEST(Layouts, OneFoldAndTwoHaveTheSameBits) {
    for (int p : {2, 3, 4})
        for (int layers : {p, p + 1})
            for (bool move : {true, false})
                for (Recompute recompute : {Recompute::none, Recompute::without_attention}) {
                    LayoutCase layout{.schedule = "helix",
                                      .folds = 1,
                                      .ranks = p,
                                      .layers = layers,
                                      .chunks = 4 * p,
                                      .helix = {move, false, false, false},
                                      .recompute = recompute};
                    const LayoutRun one = run_layout(layout, steps);
                    layout.folds = 2;
                    EXPECT_TRUE(same_bits(one, run_layout(layout, steps))) << layout.text();
                }
}

TEST(Layouts, EvaluationAgreesWithOneRank) {
    const TemporaryDirectory directory;
    TokenWriter writer(directory.path + "/val", 2, 1 << 20);
    std::mt19937 generator(4);
    for (int n = 0; n < 60; ++n) {
        std::vector<int32_t> document = {0};  // end-of-text
        for (unsigned i = generator() % 20; i > 0; --i) document.push_back(1 + int32_t(generator() % 49));
        writer.append(document);
    }
    writer.finish();
    const Loader loader(open_token_files(directory.path + "/val*.bin"), {Packing::documents, 16, 50, 0, 3, true});
    const auto loss = [&](const LayoutCase& layout) {
        double loss = 0;
        on_thread_ranks(layout.ranks, [&](Transport& transport) {
            Rank rank(layout.options(transport.rank, 2 * 96 / 16 + 1), transport);
            set_weights(rank);
            const Evaluation result = evaluate(rank, loader, 96, 400);
            if (transport.rank == 0) loss = result.loss;
        });
        return loss;
    };
    for (bool tied : {true, false}) {
        const double expected = loss({.schedule = "1f1b", .layers = 4, .tied = tied});
        EXPECT_GT(expected, 2);
        for (const Schedule& schedule : schedules())
            for (int p : {2, 3, 5})
                for (const HelixOptions& helix : helix_variants()) {
                    if (schedule.name != "helix" && !helix.weights_once) continue;
                    const LayoutCase layout{.schedule = schedule.name,
                                            .folds = 2,
                                            .ranks = p,
                                            .layers = 4,
                                            .helix = helix,
                                            .recompute = Recompute::without_attention,
                                            .tied = tied};
                    EXPECT_LE(std::abs(loss(layout) / expected - 1), 1e-6) << layout.text();
                }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Planted errors: the comparison has to find each of them, and name the tensor.

void expect_found(const LayoutCase& layout, const std::string& name, const Disturb& disturb) {
    const Difference difference = compare_runs(run_layout(layout, steps, disturb), reference(layout), layout.model());
    std::string problems;
    for (const std::string& problem : difference.problems) problems += problem + "\n";
    EXPECT_NE(problems.find(name + " is off"), std::string::npos) << problems;
}

TEST(Layouts, PlantedErrorsAreFound) {
    const LayoutCase layout{.schedule = "helix",
                            .folds = 2,
                            .ranks = 3,
                            .layers = 4,
                            .chunks = 6,
                            .recompute = Recompute::without_attention};
    // One part in 4096 of what one rank adds to the gradients of one layer's queries, keys and values.
    expect_found(layout, "the gradient of h.1.attn.c_attn.weight", [](Rank& rank, const OpTensors& t) {
        const Op& op = t.plan.ops[t.op];
        if (rank.index != 2 || op.part != Part::attention || op.pass != Pass::B || op.layer != 1) return;
        floatS* weight = t.d_pre_weights(1).qkv_weight;
        for (int i = 0; i < 3 * 16 * 16; ++i) weight[i] *= 1 + 1.0f / 4096;
    });
    // One chunk is left out of one layer.
    const LayoutCase zero_bubble{.schedule = "zb-h1", .ranks = 2, .layers = 3, .chunks = 5};
    expect_found(zero_bubble, "the gradient of h.2.mlp.c_fc.weight", [](Rank&, const OpTensors& t) {
        const Op& op = t.plan.ops[t.op];
        if (op.part != Part::post || op.pass != Pass::B || op.layer != 2 || op.chunk != 3) return;
        Allocator at = t.place(Tensor::d_post, 2);
        PostGradients d_post(at, t.N, t.rank.options.model);
        std::fill_n(d_post.d_fc.data, d_post.d_fc.size(), floatX(0));
    });
    // NaN, and a weight that differs between two ranks.
    expect_found(layout, "the gradient of wpe.weight", [](Rank& rank, const OpTensors& t) {
        if (t.plan.ops[t.op].part == Part::embed && t.plan.ops[t.op].pass == Pass::B) rank.dw.wpe[3] = NAN;
    });
    LayoutCase tied = layout;
    tied.tied = true, tied.schedule = "1f1b";
    const LayoutRun run = run_layout(tied, steps, [](Rank& rank, const OpTensors& t) {
        if (t.plan.ops[t.op].part == Part::head && rank.index == 2) rank.master[5] += 1e-7f;
    });
    EXPECT_EQ(run.problems, std::vector<std::string>{"copies of wte.weight differ"});
}

// --verify-layout: agrees with itself, and not with a gradient of which one part in 4096 is off.
TEST(Layouts, VerifyLayoutFindsAPlantedError) {
    const LayoutCase layout{.schedule = "helix", .folds = 2, .ranks = 3, .layers = 4, .chunks = 6};
    const Step step = prepare_step(layout.batch(), layout.chunk_tokens, layout.model());
    for (const bool planted : {false, true}) {
        int good = 0;  // ranks
        std::mutex mutex;
        on_thread_ranks(layout.ranks, [&](Transport& transport) {
            NoTransport nobody;
            Rank rank(layout.options(transport.rank, 6), transport);
            std::optional<Rank> alone;
            if (rank.index == 0) alone.emplace(layout.on_one_rank().options(0, 6), nobody);
            LayoutComparison comparison(rank, alone ? &*alone : nullptr);
            double loss[2] = {};
            for (Rank* r : {&rank, alone ? &*alone : nullptr}) {
                if (!r) continue;
                set_weights(*r);
                loss[r != &rank] = compute_gradients(*r, step);
            }
            if (planted)
                for (const Parameter& p : rank.parameters)
                    if (p.name == "h.1.mlp.c_fc.weight")
                        for (int64_t n = 0; n < p.size(); ++n) rank.gradients[p.offset + n] *= 1 + 1.0f / 4096;
            if (alone) comparison.compare_losses(loss[0], loss[1]);
            const auto gradients = [](Rank& r) { return r.gradients; };
            comparison.compare_tensors(gradients, &LayoutComparison::Errors::gradient);
            const bool agrees = comparison.report("this layout");
            const std::lock_guard lock(mutex);
            good += agrees;
        });
        EXPECT_EQ(good, planted ? 0 : layout.ranks);
    }
}

}  // namespace
