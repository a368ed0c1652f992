// The two ends of the model, embedding and cross entropy, against plain loops in double.
#include <numeric>

#include "dev/tests/kernels_test.h"
#include "llmc/kernels/classifier.cuh"
#include "llmc/kernels/encoder.cuh"

namespace {

TEST(Encoder, ForwardAndBackward) {
    for (const auto& [N, C] : {std::pair<int64_t, int64_t>{1, 3}, {57, 33}, {301, 100}}) {
        const int64_t V = 11, T = N;
        const auto wte = random_vector<floatX>(V * C, 1), wpe = random_vector<floatX>(T * C, 2);
        const auto dout = random_vector<floatR>(N * C, 3);
        const auto tokens = random_indices(N, V, 4), positions = random_indices(N, T, 5);
        for_threads([&, N = N, C = C](const Device& device) {
            const int64_t stride = C + 5;  // rows of the embeddings' gradients further apart than they are long
            std::vector<floatR> out(N * C);
            std::vector<floatS> dwte(V * stride, 1), dwpe(T * stride, 2);
            const TokenRows rows{tokens.data(), positions.data()};
            encoder_forward(device, {out.data(), N, C}, rows, {wte.data(), V, C}, {wpe.data(), T, C});
            encoder_backward(device, {dwte.data(), V, C, stride}, {dwpe.data(), T, C, stride}, {dout.data(), N, C},
                             rows);
            Doubles want_out(N * C), want_dwte(V * stride, 1), want_dwpe(T * stride, 2);
            for (int64_t i = 0; i < N * C; i++) {
                const int64_t t = tokens[i / C], p = positions[i / C], c = i % C;
                want_out[i] = double(wte[t * C + c]) + double(wpe[p * C + c]);
                want_dwte[t * stride + c] += double(dout[i]);
                want_dwpe[p * stride + c] += double(dout[i]);
            }
            expect_close("out", out, want_out, bound_s);
            expect_close("dwte", dwte, want_dwte, bound_s);
            expect_close("dwpe", dwpe, want_dwpe, bound_s);
            return concatenated(out, dwte, dwpe);
        });
    }
}

TEST(Encoder, SortedRows) {
    for (const auto& [N, V] :
         {std::pair<int64_t, int64_t>{0, 1}, {1, 1}, {1, 70000}, {1000, 1}, {1000, 7}, {99, 5000}}) {
        const auto keys = random_indices(N, V, 1);
        std::vector<int32_t> want(N);
        std::iota(want.begin(), want.end(), 0);
        std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });
        EXPECT_EQ(sorted_rows(keys), want) << N << " keys below " << V;
    }
}

TEST(Classifier, LossAndGradient) {
    for (const auto& [n, V, Vp] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {7, 257, 320}, {5, 50257, 50304}}) {
        const auto x = random_vector<floatX>(n * Vp, 1, 4);
        auto targets = random_indices(n, V, 2);
        if (n > 1) targets[1] = -1;
        const floatS dloss = floatS(1.0 / 3);
        for_threads([&, n = n, V = V, Vp = Vp](const Device& device) {
            std::vector<floatS> losses(n, -1), again(n, -1);
            auto gradient = x, untouched = x;
            classifier_forward_backward(device, losses.data(), {gradient.data(), n, Vp}, targets.data(), V, dloss,
                                        true);
            classifier_forward_backward(device, again.data(), {untouched.data(), n, Vp}, targets.data(), V, dloss,
                                        false);
            EXPECT_EQ(losses, again);
            EXPECT_EQ(to_double(untouched), to_double(x));
            Doubles want_losses(n, 0), want(n * Vp, 0);
            for (int64_t i = 0; i < n; i++) {
                if (targets[i] < 0) continue;
                double total = 0;
                for (int64_t j = 0; j < V; j++) total += std::exp(double(x[i * Vp + j]));
                want_losses[i] = std::log(total) - double(x[i * Vp + targets[i]]);
                for (int64_t j = 0; j < V; j++)
                    want[i * Vp + j] = (std::exp(double(x[i * Vp + j])) / total - (j == targets[i])) * double(dloss);
            }
            expect_close("losses", losses, want_losses, bound_s);
            expect_close("gradient", gradient, want, bound_x);
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = targets[i] < 0 ? 0 : V; j < Vp; j++) EXPECT_EQ(double(gradient[i * Vp + j]), 0);
            return concatenated(losses, to_double(gradient));
        });
    }
}

TEST(Classifier, ExtremeLogits) {
    const int64_t V = 40;
    std::vector<floatX> x(3 * V, floatX(-3e4f));
    x[7] = 3e4f;                                              // certain and right
    x[V + 3] = 3e4f;                                          // certain and wrong
    x[2 * V + 39] = std::numeric_limits<float>::quiet_NaN();  // must be seen
    const std::vector<int32_t> targets = {7, 4, 5};
    std::vector<floatS> losses(3);
    classifier_forward_backward(Device{}, losses.data(), {x.data(), 3, V}, targets.data(), V, 1, true);
    EXPECT_EQ(losses[0], 0);
    EXPECT_NEAR(losses[1], 6e4, 300);  // bf16 has no 3e4
    EXPECT_TRUE(std::isnan(losses[2]));
    EXPECT_EQ(double(x[7]), 0);
    EXPECT_EQ(double(x[V + 3]), 1);
    EXPECT_EQ(double(x[V + 4]), -1);
    EXPECT_TRUE(std::isnan(double(x[2 * V])));

    // More columns than are looked at in one go, all impossible but the last.
    std::vector<floatX> excluded(5000, floatX(-std::numeric_limits<float>::infinity()));
    excluded[4999] = 1;
    const std::vector<int32_t> last = {4999};
    classifier_forward_backward(Device{}, losses.data(), {excluded.data(), 1, 5000}, last.data(), 5000, 1, true);
    EXPECT_EQ(losses[0], 0);
    EXPECT_EQ(double(excluded[0]), 0);
    EXPECT_EQ(double(excluded[4999]), 0);
}

TEST(Classifier, Exponential) {
    double worst = 0;
    for (float x = 0; x > -87; x -= 1.7e-4f)
        worst = std::max(worst, std::abs(double(exp_nonpositive(x)) / std::exp(double(x)) - 1));
    std::printf("    exp        error %.1e, bound %.1e\n", worst, 1.2e-7);
    EXPECT_LE(worst, 1.2e-7);
    EXPECT_EQ(exp_nonpositive(0.0f), 1);
    EXPECT_EQ(exp_nonpositive(-88.0f), 0);
    EXPECT_EQ(exp_nonpositive(-INFINITY), 0);
    EXPECT_TRUE(std::isnan(exp_nonpositive(NAN)));
}

}  // namespace
