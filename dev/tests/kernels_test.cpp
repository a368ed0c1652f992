// The elementwise and row-wise kernels against plain loops in double, for odd sizes and strides. Every case runs with
// 1, 2 and 3 threads, which must give the same bits. The same file compiles for every PRECISION.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/classifier.cuh"
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/encoder.cuh"
#include "llmc/kernels/layernorm.cuh"
#include "llmc/kernels/random.h"
#include "llmc/kernels/reduce.cuh"

namespace {

// Rounding of sums and statistics, and of results stored as floatX.
constexpr double bound_s = sizeof(floatS) == 8 ? 1e-13 : 1e-6;
constexpr double bound_x = sizeof(floatX) == 8 ? 1e-13 : sizeof(floatX) == 4 ? 1e-6 : 4e-3;

using Doubles = std::vector<double>;

template <class T>
Doubles to_double(const std::vector<T>& x) {
    return Doubles(x.begin(), x.end());
}

template <class T>
std::vector<T> random_vector(int64_t n, uint64_t stream, double sigma = 1) {
    std::vector<T> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = T(floatS(sigma * normal(42, stream, i)));
    return x;
}

std::vector<int32_t> random_indices(int64_t n, int64_t limit, uint64_t stream) {
    std::vector<int32_t> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = int32_t(uniform(42, stream, i) * double(limit));
    return x;
}

// |got - want| / |want| over the whole tensor; a NaN fails.
template <class T>
void expect_close(const char* name, const std::vector<T>& got, const Doubles& want, double bound) {
    ASSERT_EQ(got.size(), want.size());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        difference += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
        norm += want[i] * want[i];
    }
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    std::printf("    %-10s error %.1e, bound %.1e\n", name, error, bound);
    EXPECT_TRUE(error <= bound) << name << ": " << error;
}

// Runs the case with 1, 2 and 3 threads; it returns its outputs, which must agree bit for bit.
void for_threads(const std::function<Doubles(const Device&)>& run_case) {
    std::vector<std::byte> scratch(1 << 22);
    Doubles first;
    for (int threads = 1; threads <= 3; threads++) {
        const Doubles outputs = run_case(Device{threads, scratch.data(), scratch.size()});
        if (threads == 1) first = outputs;
        ASSERT_EQ(outputs.size(), first.size());
        EXPECT_EQ(std::memcmp(outputs.data(), first.data(), first.size() * sizeof(double)), 0) << threads << " threads";
    }
}

template <class... V>
Doubles concatenated(const V&... vectors) {
    Doubles all;
    (all.insert(all.end(), vectors.begin(), vectors.end()), ...);
    return all;
}

class LayerNorm : public testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(LayerNorm, ForwardAndBackward) {
    const auto [N, C] = GetParam();
    const auto a = random_vector<floatR>(N * C, 1);
    const auto b = random_vector<floatX>(N * C, 2), dout = random_vector<floatX>(N * C, 3);
    const auto weight = random_vector<floatX>(C, 4), bias = random_vector<floatX>(C, 5);
    const auto before = random_vector<floatR>(N * C, 6);
    for_threads([&, N = N, C = C](const Device& device) {
        std::vector<floatR> x(N * C), sum(N * C), dx = before;
        std::vector<floatX> out(N * C), fused(N * C);
        std::vector<floatS> mean(N), rstd(N), mean2(N), rstd2(N), dweight(C, 1), dbias(C, 2);
        const Matrix<const floatR> am(a.data(), N, C), xm(x.data(), N, C);
        residual_forward(device, {x.data(), N, C}, am, {b.data(), N, C});
        layernorm_forward(device, {out.data(), N, C}, mean.data(), rstd.data(), xm, weight.data(), bias.data());
        residual_layernorm_forward(device, {sum.data(), N, C}, {fused.data(), N, C}, mean2.data(), rstd2.data(), am,
                                   {b.data(), N, C}, weight.data(), bias.data());
        layernorm_backward(device, {dx.data(), N, C}, dweight.data(), dbias.data(), {dout.data(), N, C}, xm,
                           mean.data(), rstd.data(), weight.data());
        EXPECT_EQ(sum, x);
        EXPECT_EQ(to_double(fused), to_double(out));
        EXPECT_EQ(concatenated(mean2, rstd2), concatenated(mean, rstd));

        Doubles want_x(N * C), want_out(N * C), want_mean(N), want_rstd(N), want_dx = to_double(before);
        Doubles want_dweight(C, 1), want_dbias(C, 2);
        for (int64_t i = 0; i < N; i++) {
            double squares = 0, sum_g = 0, sum_gx = 0;
            for (int64_t c = 0; c < C; c++) {
                want_x[i * C + c] = double(a[i * C + c]) + double(b[i * C + c]);
                want_mean[i] += want_x[i * C + c] / double(C);
            }
            for (int64_t c = 0; c < C; c++) squares += std::pow(want_x[i * C + c] - want_mean[i], 2);
            want_rstd[i] = 1 / std::sqrt(squares / double(C) + 1e-5);
            for (int64_t c = 0; c < C; c++) {
                const double xhat = (want_x[i * C + c] - want_mean[i]) * want_rstd[i], d = double(dout[i * C + c]);
                want_out[i * C + c] = xhat * double(weight[c]) + double(bias[c]);
                want_dweight[c] += d * xhat;
                want_dbias[c] += d;
                sum_g += d * double(weight[c]);
                sum_gx += d * double(weight[c]) * xhat;
            }
            for (int64_t c = 0; c < C; c++) {
                const double xhat = (want_x[i * C + c] - want_mean[i]) * want_rstd[i];
                const double g = double(dout[i * C + c]) * double(weight[c]);
                want_dx[i * C + c] += want_rstd[i] * (g - sum_g / double(C) - xhat * sum_gx / double(C));
            }
        }
        expect_close("residual", x, want_x, bound_s);
        expect_close("out", out, want_out, bound_x);
        expect_close("mean", mean, want_mean, bound_s);
        expect_close("rstd", rstd, want_rstd, bound_s);
        expect_close("din", dx, want_dx, bound_s);
        expect_close("dweight", dweight, want_dweight, bound_s);
        expect_close("dbias", dbias, want_dbias, bound_s);
        return concatenated(x, out, mean, rstd, dx, dweight, dbias);
    });
}

INSTANTIATE_TEST_SUITE_P(Sizes, LayerNorm,
                         testing::Values(std::pair{1, 8}, std::pair{3, 7}, std::pair{33, 65}, std::pair{259, 193},
                                         std::pair{100, 768}));

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
            encoder_forward(device, {out.data(), N, C}, tokens.data(), positions.data(), {wte.data(), V, C},
                            {wpe.data(), T, C});
            encoder_backward(device, {dwte.data(), V, C, stride}, {dwpe.data(), T, C, stride}, {dout.data(), N, C},
                             tokens.data(), positions.data());
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

TEST(AdamW, TenStepsAgainstDouble) {
    const int64_t n = 1003;
    const auto start = random_vector<floatS>(n, 1, 0.1);
    for (const bool decay : {false, true})
        for_threads([&](const Device& device) {
            auto master = start;
            std::vector<floatX> rounded(n);
            std::vector<floatS> m(n), v(n);
            floatX* weights =
                std::is_same_v<floatX, floatS> ? reinterpret_cast<floatX*>(master.data()) : rounded.data();
            Doubles want = to_double(start), want_m(n), want_v(n);
            AdamW options{.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1};
            options.gradient_scale = 0.3;
            for (int64_t& t = options.step; t <= 10; t++) {
                const auto gradients = random_vector<floatS>(n, uint64_t(1 + t));
                adamw_update(device, weights, master.data(), gradients.data(), m.data(), v.data(), n, options, decay);
                for (int64_t i = 0; i < n; i++) {
                    const double g = double(gradients[i]) * 0.3;
                    want_m[i] = 0.9 * want_m[i] + 0.1 * g;
                    want_v[i] = 0.999 * want_v[i] + 0.001 * g * g;
                    if (decay) want[i] -= 1e-3 * 0.1 * want[i];
                    want[i] -= 1e-3 * (want_m[i] / (1 - std::pow(0.9, t))) /
                               (std::sqrt(want_v[i] / (1 - std::pow(0.999, t))) + 1e-8);
                }
            }
            expect_close("weights", master, want, bound_s);
            expect_close("m", m, want_m, bound_s);
            expect_close("v", v, want_v, bound_s);
            for (int64_t i = 0; i < n; i++) EXPECT_EQ(double(weights[i]), double(floatX(master[i])));
            return concatenated(master, m, v);
        });
}

TEST(Reduce, Sums) {
    for (const int64_t n : {0, 1, 63, 1000, 100003}) {
        const auto x = random_vector<floatS>(n, 1);
        double want = 0, squares = 0, magnitude = 1;
        for (floatS value : x) want += value, squares += double(value) * value, magnitude += std::abs(value);
        for_threads([&](const Device& device) {
            const double got = sum(device, x.data(), n), got_squares = sum_of_squares(device, x.data(), n);
            EXPECT_NEAR(got, want, 1e-13 * magnitude);
            EXPECT_NEAR(got_squares, squares, 1e-13 * squares);
            return Doubles{got, got_squares};
        });
    }
    const std::vector<floatS> huge(10, floatS(1e25));
    EXPECT_NEAR(sum_of_squares(Device{}, huge.data(), 10), 1e51, 1e45);
}

TEST(Reduce, FirstNonfinite) {
    const int64_t n = 20011;
    const floatX bad[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()};
    for_threads([&](const Device& device) {
        auto x = random_vector<floatX>(n, 1);
        x[5] = std::numeric_limits<float>::max() / 2;
        EXPECT_EQ(first_nonfinite(device, x.data(), n), -1);
        EXPECT_TRUE(all_finite(device, x.data(), n));
        EXPECT_EQ(first_nonfinite(device, x.data(), 0), -1);
        for (const int64_t i : {20010, 12345, 4096, 4095, 0}) {
            x[i] = bad[i % 3];
            EXPECT_EQ(first_nonfinite(device, x.data(), n), i);
            EXPECT_FALSE(all_finite(device, x.data(), n));
        }
        return Doubles{};
    });
}

TEST(Copy, RowsWithStrides) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1}, {5, 7}, {3, 9001}}) {
        const auto from = random_vector<floatS>(rows * (cols + 3), 1);
        for_threads([&, rows = rows, cols = cols](const Device& device) {
            std::vector<floatX> to(rows * (cols + 1), floatX(8));
            std::vector<floatS> total(rows * cols, 1);
            copy_rows(device, Matrix<floatX>(to.data(), rows, cols, cols + 1),
                      Matrix<const floatS>(from.data(), rows, cols, cols + 3));
            add_rows(device, Matrix<floatS>(total.data(), rows, cols), Matrix<floatX>(to.data(), rows, cols, cols + 1));
            for (int64_t i = 0; i < rows; i++) {
                for (int64_t j = 0; j < cols; j++) {
                    const floatX want(from[i * (cols + 3) + j]);
                    EXPECT_EQ(double(to[i * (cols + 1) + j]), double(want));
                    EXPECT_EQ(total[i * cols + j], floatS(1) + floatS(want));
                }
                EXPECT_EQ(double(to[i * (cols + 1) + cols]), 8);  // between the rows nothing is written
            }
            const Doubles copied = to_double(to);
            fill_zero(device, Matrix<floatX>(to.data(), rows, cols, cols + 1));
            for (int64_t i = 0; i < rows * (cols + 1); i++) EXPECT_EQ(double(to[i]), i % (cols + 1) == cols ? 8 : 0);
            fill_zero(device, total.data(), int64_t(total.size()));
            EXPECT_EQ(total, std::vector<floatS>(rows * cols, 0));
            return copied;
        });
    }
}

TEST(Copy, Bf16RoundsToNearestEven) {
    const float inputs[] = {1.0f, 1.00390625f, 1.01171875f, 3.4e38f, -0.0f, NAN, INFINITY};
    bf16 outputs[7];
    copy_rows(Device{}, Matrix<bf16>(outputs, 1, 7), Matrix<const float>(inputs, 1, 7));
    const uint16_t want[] = {0x3f80, 0x3f80, 0x3f82, 0x7f80, 0x8000, 0x7fc0, 0x7f80};
    for (int i = 0; i < 7; i++) EXPECT_EQ(outputs[i].bits, want[i]) << inputs[i];
}

TEST(Random, IsAPureFunctionWithTheRightMoments) {
    EXPECT_EQ(hash_counter(1, 2, 3), hash_counter(1, 2, 3));
    EXPECT_EQ(hash_counter(0, 0, 0), 0x1cd364143cce4aaeu);  // recorded: a change would change every initial weight
    const int64_t n = 200000;
    double mean = 0, square = 0, fourth = 0, correlation = 0, average = 0, previous = 0;
    for (int64_t i = 0; i < n; i++) {
        const double z = normal(7, 1, i), u = uniform(7, 2, i);
        ASSERT_TRUE(u >= 0 && u < 1);
        mean += z / n, square += z * z / n, fourth += z * z * z * z / n, average += u / n;
        correlation += z * previous / n;
        previous = z;
    }
    EXPECT_NEAR(mean, 0, 0.01);
    EXPECT_NEAR(square, 1, 0.015);
    EXPECT_NEAR(fourth, 3, 0.12);
    EXPECT_NEAR(correlation, 0, 0.01);
    EXPECT_NEAR(average, 0.5, 0.004);
}

}  // namespace
