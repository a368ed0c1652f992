// Plans and steps: schedules that are wrong are refused, the arena is as small as it can be, layouts agree, and the
// targets of one document do not leak into the gradients of another.
#include <gtest/gtest.h>

#include <random>

#define TESTING
#include "train_gpt.cu"

namespace {

GptConfig small_model(bool tied = true) { return {3, 48, 3, 64, 61, 64, tied}; }

RankOptions options(Recompute recompute, int64_t chunk_tokens, int64_t mlp_chunk = 0, int64_t head_chunk = 0,
                    int threads = 1) {
    return {small_model(), recompute, chunk_tokens, mlp_chunk, head_chunk, threads, true};
}

Batch random_batch(const std::vector<int64_t>& lengths, uint64_t seed) {
    std::mt19937_64 generator(seed);
    Batch batch;
    for (int64_t length : lengths) {
        Sample& s = batch.sequences.emplace_back();
        for (int64_t i = 0; i < length; ++i) {
            s.tokens.push_back(int32_t(generator() % 61));
            s.targets.push_back(int32_t(generator() % 61));
        }
        batch.tokens += length, batch.targets += length;
    }
    return batch;
}

struct Gradients {
    double loss;
    std::vector<floatS> values;
};

// One rank, with weights of one seed.
struct SingleRank {
    NoTransport transport;
    Rank rank;
    explicit SingleRank(const RankOptions& o) : rank(o, transport) {
        initialize_parameters(rank.master, rank.parameters, o.model, 5);
        round_weights(rank);
    }
};

Gradients gradients(const RankOptions& o, const Batch& batch) {
    SingleRank single(o);
    Rank& rank = single.rank;
    const double loss = compute_gradients(rank, prepare_step(batch, o.chunk_tokens, o.model));
    return {loss, {rank.gradients, rank.gradients + flat_size(rank.parameters)}};
}

double relative_error(const std::vector<floatS>& a, const std::vector<floatS>& b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return std::sqrt(difference / norm);
}

// ---------------------------------------------------------------------------------------------------------------------

TEST(Plan, RefusesWrongSchedules) {
    const RankOptions o = options(Recompute::none, 32);
    const std::vector<ChunkShape> shapes = chunk_shapes({2, 1}, 32, 64);
    const std::vector<Op> good = accumulate_schedule(3, shapes);
    const auto plan = [&](const std::vector<Op>& ops) {
        const auto problems = check_lists({ops}, o.schedule_input(int(shapes.size()), true, true));
        if (!problems.empty()) throw std::logic_error(problems[0]);
        return make_plan(ops, shapes, o.model, o.tensor_rules(true));
    };
    EXPECT_NO_THROW(plan(good));
    for (size_t i = 0; i < good.size(); ++i) {
        std::vector<Op> missing = good, doubled = good, foreign = good;
        missing.erase(missing.begin() + long(i));
        doubled.insert(doubled.begin() + long(i), good[i]);
        foreign[i].chunk = 2 - foreign[i].chunk;
        EXPECT_THROW(plan(missing), std::logic_error) << op_name(good[i]);
        EXPECT_THROW(plan(doubled), std::logic_error) << op_name(good[i]);
        if (good[i].chunk != 1) { EXPECT_THROW(plan(foreign), std::logic_error) << op_name(good[i]); }
    }
    // An op before the one that makes its input: every op moved to the very front but the first.
    for (size_t i = 1; i < good.size(); ++i) {
        if (good[i].part == Part::embed && good[i].pass == Pass::F) continue;  // needs nothing
        std::vector<Op> early = good;
        std::rotate(early.begin(), early.begin() + long(i), early.begin() + long(i) + 1);
        EXPECT_THROW(plan(early), std::logic_error) << op_name(good[i]);
    }
}

// No two tensors overlap in time and in place; the arena ends where the most bytes alive at once end.
TEST(Plan, ArenaIsTightAndWithoutOverlap) {
    std::mt19937 generator(3);
    for (int trial = 0; trial < 200; ++trial) {
        std::vector<Lifetime> tensors;
        const int ops = 60;
        for (int op = 0; op < ops; ++op)
            for (unsigned k = generator() % 3; k > 0; --k)
                tensors.push_back({int64_t(generator() % 5000 + 1), op, op + int(generator() % unsigned(ops - op))});
        const ArenaSize size = assign_offsets(tensors, ops);
        EXPECT_GE(size.bytes, size.live_peak);
        for (size_t a = 0; a < tensors.size(); ++a) {
            EXPECT_EQ(tensors[a].offset % arena_alignment, 0);
            EXPECT_LE(tensors[a].offset + tensors[a].bytes, size.bytes);
            for (size_t b = 0; b < a; ++b) {
                const bool same_time = tensors[a].first <= tensors[b].last && tensors[b].first <= tensors[a].last;
                const bool same_place = tensors[a].offset < tensors[b].offset + tensors[b].bytes &&
                                        tensors[b].offset < tensors[a].offset + tensors[a].bytes;
                ASSERT_FALSE(same_time && same_place);
            }
        }
    }
    for (Recompute recompute : recompute_modes)
        for (int slices : {1, 2, 4}) {
            const Plan plan = plan_pattern(options(recompute, 64 / slices), {slices}, true);
            std::printf("  recompute %d, %d slices: arena %lld bytes, alive at once %lld\n", int(recompute), slices,
                        static_cast<long long>(plan.size.bytes), static_cast<long long>(plan.size.live_peak));
            if (recompute <= Recompute::elementwise && slices > 1)
                EXPECT_LE(double(plan.size.bytes), 1.05 * double(plan.size.live_peak));
            else EXPECT_EQ(plan.size.bytes, plan.size.live_peak);
        }
}

// One full chunk without cutting: the peak is at the head's end of the forward pass, layer by layer what the mode
// keeps.
TEST(Plan, KeepsWhatTheModeSays) {
    const GptConfig g = small_model();
    const int64_t N = 64, L = g.layers;
    const auto peak = [&](Recompute r) { return plan_pattern(options(r, N), {1}, true).size.live_peak; };
    const auto bytes = [&](std::initializer_list<Tensor> tensors) {
        int64_t sum = 0;
        for (Tensor tensor : tensors) sum += tensor_bytes(tensor, {N}, g);
        return sum;
    };
    const int64_t x = bytes({Tensor::residual}), d_x = bytes({Tensor::d_residual});
    const int64_t pre = bytes({Tensor::ln1, Tensor::ln1_stats, Tensor::qkv});
    const int64_t attention = bytes({Tensor::attention_out, Tensor::lse}), post = bytes({Tensor::post});
    const int64_t d_o = bytes({Tensor::d_attention}), d_qkv = bytes({Tensor::d_qkv});
    // the backward of the last layer's post or attention, when everything kept is still there
    EXPECT_EQ(peak(Recompute::none), L * (x + pre + attention + post) + d_x + d_o);
    const int64_t products = bytes({Tensor::qkv, Tensor::post_products});
    EXPECT_EQ(peak(Recompute::elementwise), L * (x + attention + products) + d_x + d_o);
    EXPECT_EQ(peak(Recompute::without_attention), L * (x + attention) + d_x + pre + d_o + d_qkv);
    EXPECT_EQ(peak(Recompute::full), L * x + attention + d_x + pre + d_o + d_qkv);
}

TEST(Step, LayoutsAgree) {
    const Batch batch = random_batch({64, 1, 17, 40, 3, 64, 2}, 1);
    const Gradients whole = gradients(options(Recompute::none, 256), batch);
    for (Recompute recompute : recompute_modes)
        for (int64_t chunk : {256, 64, 23, 5})
            for (int64_t rows : {0, 7}) {
                const Gradients other = gradients(options(recompute, chunk, rows, rows), batch);
                const double error = relative_error(other.values, whole.values);
                std::printf(
                    "  recompute %d, chunks of %3lld, %lld rows at a time: loss %.1e, gradients %.1e (bound 1e-05)\n",
                    int(recompute), static_cast<long long>(chunk), static_cast<long long>(rows),
                    std::abs(other.loss / whole.loss - 1), error);
                EXPECT_LE(std::abs(other.loss / whole.loss - 1), 1e-6);
                EXPECT_LE(error, 1e-5);
            }
}

TEST(Step, SameLayoutTwiceHasTheSameBits) {
    const Batch batch = random_batch({64, 1, 17, 40}, 2);
    for (Recompute recompute : {Recompute::none, Recompute::full}) {
        const RankOptions o = options(recompute, 32, 0, 0, 2);  // with two threads
        const Gradients a = gradients(o, batch), b = gradients(o, batch);
        EXPECT_EQ(a.loss, b.loss);
        EXPECT_EQ(std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(floatS)), 0);
    }
}

// Two documents, A's targets ignored. Then A's tokens cannot matter: every gradient keeps its bits, whichever of the
// two comes first in the chunk, and also when they are cut into slices.
TEST(Step, TargetsOfADocumentDoNotLeak) {
    const auto bits_of = [](const Gradients& g) {
        return std::string(reinterpret_cast<const char*>(g.values.data()), g.values.size() * sizeof(floatS));
    };
    for (const auto& [a, b] : {std::pair<int64_t, int64_t>{34, 30}, {30, 34}})
        for (int64_t chunk_tokens : {64, 16})
            for (Recompute recompute : recompute_modes) {
                Batch batch = random_batch({a, b}, 3);
                std::fill(batch.sequences[0].targets.begin(), batch.sequences[0].targets.end(), -1);
                batch.targets = b;
                Batch other = batch;
                other.sequences[0].tokens = random_batch({a}, 4).sequences[0].tokens;
                ASSERT_NE(batch.sequences[0].tokens, other.sequences[0].tokens);
                const Gradients one = gradients(options(recompute, chunk_tokens), batch);
                const Gradients two = gradients(options(recompute, chunk_tokens), other);
                EXPECT_EQ(one.loss, two.loss);
                EXPECT_TRUE(bits_of(one) == bits_of(two)) << "A of " << a << " tokens, chunks of " << chunk_tokens;
                EXPECT_GT(std::count_if(one.values.begin(), one.values.end(), [](floatS v) { return v != 0; }),
                          std::ptrdiff_t(one.values.size() / 4));
            }

    // The test can fail: with A (first in the chunk) and B as one segment, A's tokens do matter.
    const auto merged = [&](uint64_t seed) {
        const RankOptions o = options(Recompute::none, 64);
        Batch batch = random_batch({34, 30}, 3);
        batch.sequences[0].tokens = random_batch({34}, seed).sequences[0].tokens;
        std::fill(batch.sequences[0].targets.begin(), batch.sequences[0].targets.end(), -1);
        Step step = prepare_step(batch, o.chunk_tokens, o.model);
        step.segments[0] = {{0, 64, 0, false}};
        SingleRank single(o);
        return compute_gradients(single.rank, step);
    };
    EXPECT_NE(merged(4), merged(5));
}

// A replay tells hardware from data: a gradient that went wrong once, and a weight that is wrong every time.
TEST(Step, ReplayOfANonFiniteStep) {
    const Batch batch = random_batch({40}, 6);
    const auto code_and_text = [&](bool once) -> std::pair<int, std::string> {
        const RankOptions o = options(Recompute::none, 64);
        SingleRank single(o);
        Rank& rank = single.rank;
        const Step step = prepare_step(batch, o.chunk_tokens, o.model);
        floatS* const flat = once ? rank.gradients : rank.master;
        const Parameter& p = rank.parameters[10];
        if (!once) flat[p.offset + 7] = NAN;
        const double loss = compute_gradients(rank, step);
        if (once) flat[p.offset + 7] = NAN;
        try {
            stop_at_nonfinite(rank, 3, loss, [&] { return compute_gradients(rank, step); });
        } catch (const Failure& failure) { return {failure.exit_code, failure.what()}; }
    };
    const auto [hardware, hardware_text] = code_and_text(true);
    EXPECT_EQ(hardware, EXIT_HARDWARE);
    EXPECT_NE(hardware_text.find("gradient of h.0.mlp.c_fc.weight[0, 7]"), std::string::npos) << hardware_text;
    const auto [data, data_text] = code_and_text(false);
    EXPECT_EQ(data, EXIT_NONFINITE);
    EXPECT_NE(data_text.find("weight h.0.mlp.c_fc.weight[0, 7]"), std::string::npos) << data_text;
}

TEST(Step, LearningRates) {
    Config c;
    c.training.steps = 100, c.training.warmup = 10, c.training.lr = 1, c.training.min_lr_fraction = 0.1;
    c.training.lr_schedule = "cosine";
    EXPECT_DOUBLE_EQ(learning_rate(c, 1), 0.1);
    EXPECT_DOUBLE_EQ(learning_rate(c, 10), 1);
    EXPECT_NEAR(learning_rate(c, 55), 0.55, 1e-12);
    EXPECT_NEAR(learning_rate(c, 100), 0.1, 1e-12);
    c.training.lr_schedule = "wsd", c.training.decay_fraction = 0.2;
    EXPECT_DOUBLE_EQ(learning_rate(c, 80), 1);
    EXPECT_NEAR(learning_rate(c, 90), 0.55, 1e-12);
    EXPECT_NEAR(learning_rate(c, 100), 0.1, 1e-12);
    c.training.lr_schedule = "constant";
    EXPECT_DOUBLE_EQ(learning_rate(c, 100), 1);
}

}  // namespace
