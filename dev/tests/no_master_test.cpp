// Training in bf16 without master weights: the same roundings on any ranks, and weights that pass through the place of
// the gradients when they come and go in fp32.
#undef PRECISION_FP32
#define PRECISION_BF16
#include <gtest/gtest.h>

#include "dev/tests/layouts.h"

namespace {

RankOptions options_of(const LayoutCase& layout, int rank, bool no_master = true) {
    RankOptions options = layout.options(rank, layout.chunks);
    options.no_master = no_master;
    return options;
}

template <class T>
std::vector<T> copied(const Rank& rank, T* flat) {
    HostView<T> held(rank.device, flat, flat_size(rank.parameters), true);
    return {held.data(), held.data() + held.size()};
}

bool same_bits(const std::vector<floatX>& a, const std::vector<floatX>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(floatX)) == 0;
}

// Gradients that depend on the step, the tensor and the element alone.
void set_gradients(Rank& rank, int64_t step) {
    HostView<floatS> gradients(rank.device, rank.gradients, flat_size(rank.parameters), false);
    for (const Parameter& p : rank.parameters)
        for (int64_t i = 0; i < p.size(); ++i)
            gradients.data()[p.offset + i] = normal(uint64_t(step), uint64_t(p.index), uint64_t(i));
    gradients.store();
}

// The weights after three updates, by Parameter.index.
std::vector<std::vector<floatS>> updated_weights(const LayoutCase& layout, int64_t seed) {
    std::vector<std::vector<floatS>> weights;
    Config c;
    c.training.seed = seed;
    on_thread_ranks(layout.ranks, [&](Transport& transport) {
        Rank rank(options_of(layout, transport.rank), transport);
        set_weights(rank);
        for (int64_t step = 1; step <= 3; ++step) {
            set_gradients(rank, step);
            clip_and_update(rank, c, step, step, 1);
        }
        std::vector<std::string> problems;
        auto gathered = gather(rank, widen_weights(rank), problems);
        if (transport.rank != 0) return;
        EXPECT_EQ(problems, std::vector<std::string>()) << layout.text();
        weights = std::move(gathered);
    });
    return weights;
}

// Given the same gradients, so that no bit is left to the order of sums. Of a tied embedding two ranks have a copy.
TEST(NoMaster, TheSameRoundingsOnAnyRanks) {
    for (const bool tied : {true, false}) {
        const LayoutCase one{.schedule = "1f1b", .layers = 4, .chunks = 6, .tied = tied};
        const auto want = updated_weights(one, 1), other = updated_weights(one, 2);
        for (const Parameter& p : parameter_table(one.model()))
            EXPECT_NE(want[size_t(p.index)], other[size_t(p.index)]) << p.name << ": the seed does not count";
        for (const auto& [schedule, ranks] : {std::pair("1f1b", 2), {"gpipe", 4}, {"interleaved", 2}, {"helix", 3}}) {
            LayoutCase layout = one;
            layout.schedule = schedule, layout.ranks = ranks;
            EXPECT_EQ(updated_weights(layout, 1), want) << layout.text();
        }
    }
}

// Tensors of one size, with the same weights and gradients.
TEST(NoMaster, EveryTensorAndUpdateHasRoundingsOfItsOwn) {
    const LayoutCase layout{.schedule = "1f1b", .layers = 3};
    NoTransport transport;
    Rank rank(options_of(layout, 0), transport);
    const auto update = [&](int64_t number) {
        HostView<floatS> weights(rank.device, rank.full_weights(), flat_size(rank.parameters), false);
        std::fill_n(weights.data(), weights.size(), floatS(2.75));
        weights.store();
        round_weights(rank);  // and the gradients are the same
        update_parameters(rank, {.lr = 3 * 0x1p-9, .beta1 = 0, .beta2 = 0, .step = number});
        std::map<int64_t, std::set<std::vector<floatS>>> by_size;
        std::map<int64_t, size_t> count;
        const std::vector<floatS> flat = copied(rank, widen_weights(rank));
        for (const Parameter& p : rank.parameters) {
            by_size[p.size()].emplace(flat.begin() + p.offset, flat.begin() + p.offset + p.size());
            ++count[p.size()];
        }
        for (const auto& [size, all] : by_size) EXPECT_EQ(all.size(), count[size]) << "tensors of " << size;
        return flat;
    };
    EXPECT_NE(update(1), update(2));
}

TEST(NoMaster, WeightsComeAndGoThroughThePlaceOfTheGradients) {
    const LayoutCase layout{.schedule = "1f1b", .layers = 2, .chunks = 2};
    NoTransport transport;
    Rank rank(options_of(layout, 0), transport), again(options_of(layout, 0), transport);
    Rank with_master(options_of(layout, 0, false), transport);
    EXPECT_EQ(rank.master, nullptr);
    EXPECT_EQ(rank.memory.master, 0);
    EXPECT_EQ(with_master.memory.total() - rank.memory.total(), round_up(4 * flat_size(rank.parameters), 4096));

    // From fp32 rounded to nearest, as beside master weights.
    set_weights(rank), set_weights(with_master);
    const std::vector<floatX> start = copied(rank, rank.weights);
    const std::vector<floatS> master = copied(with_master, with_master.master);
    const auto moved = [&](std::vector<floatS> flat, floatS sign) {  // by the centers
        for (const Parameter& p : rank.parameters)
            for (int64_t i = 0; i < p.size(); ++i) flat[size_t(p.offset + i)] += sign * p.center();
        return flat;
    };
    const std::vector<floatS> stored = moved(master, -1);
    EXPECT_NE(stored, master);
    EXPECT_TRUE(same_bits(start, {stored.begin(), stored.end()}));
    EXPECT_TRUE(same_bits(copied(with_master, with_master.weights), start));
    EXPECT_NE(std::vector<floatS>(start.begin(), start.end()), master);

    // A step leaves its gradients in the place, and finds none of the weights there.
    const Step step = prepare_step(layout.batch(), layout.chunk_tokens, layout.model());
    EXPECT_EQ(compute_gradients(rank, step), compute_gradients(with_master, step));
    EXPECT_EQ(copied(rank, rank.gradients), copied(with_master, with_master.gradients));
    update_parameters(rank, {.lr = 1e-2});
    const std::vector<floatX> updated = copied(rank, rank.weights);
    EXPECT_FALSE(same_bits(updated, start));

    // Into a checkpoint and out of it.
    {
        CheckpointState saved(rank, true), restored(again, false);
        const std::vector<floatS> values(saved.weights.data(), saved.weights.data() + saved.weights.size());
        EXPECT_EQ(values, moved({updated.begin(), updated.end()}, 1));
        std::copy(values.begin(), values.end(), restored.weights.data());
        std::copy_n(saved.m.data(), saved.m.size(), restored.m.data());
        std::copy_n(saved.v.data(), saved.v.size(), restored.v.data());
        restored.store();
        round_weights(again);
    }
    EXPECT_TRUE(same_bits(copied(again, again.weights), updated));
    for (Rank* r : {&rank, &again}) {
        compute_gradients(*r, step);
        update_parameters(*r, {.lr = 1e-2, .step = 2});
    }
    EXPECT_TRUE(same_bits(copied(rank, rank.weights), copied(again, again.weights)));
}

TEST(NoMaster, AWeightThatIsNotFiniteIsNamed) {
    const LayoutCase layout{.schedule = "1f1b", .layers = 2};
    NoTransport transport;
    Rank rank(options_of(layout, 0), transport);
    set_weights(rank);
    set_gradients(rank, 1);
    EXPECT_TRUE(weights_are_finite(rank));
    const Parameter& p = rank.parameters[10];
    HostView<floatX> weights(rank.device, rank.weights, flat_size(rank.parameters), true);
    weights.data()[p.offset + 7] = floatX(NAN);
    weights.store();
    EXPECT_FALSE(weights_are_finite(rank));
    EXPECT_EQ(name_nonfinite(rank), "weight h.0.mlp.c_fc.weight[0, 7]");
}

}  // namespace
