// The kernels on flat arrays: AdamW, reductions, copies, random numbers.
#include "dev/tests/kernels_test.h"
#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/reduce.cuh"

namespace {

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
                adamw_update(device, {weights, master.data(), gradients.data(), m.data(), v.data(), n, decay}, options);
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

// Of the 65536 random numbers just as many round away from zero as the value is 65536th parts of the way beyond the
// bf16 before it, so that the mean is the value. None moves a bf16 or an infinity, or makes a number of a NaN.
TEST(AdamW, StochasticRoundingHasNoBias) {
    const auto rounded = [](uint32_t bits, uint32_t random) {
        bf16 to;
        assign_stochastically(to, std::bit_cast<float>(bits), random);
        return to.bits;
    };
    for (const uint32_t bits : {0x3f800000u, 0x3f800001u, 0x3f808000u, 0xbf80ffffu, 0x3fffc000u, 0x00001234u,
                                0x007fff00u, 0x80000001u, 0x7f7f0001u, 0x7f800000u, 0xff800000u}) {
        uint32_t away = 0;
        for (uint32_t random = 0; random < 65536; random++) {
            const uint16_t got = rounded(bits, random);
            ASSERT_TRUE(got == bits >> 16 || got == (bits >> 16) + 1) << std::hex << bits << " by " << random;
            away += got != bits >> 16;
        }
        EXPECT_EQ(away, bits & 0xffffu) << std::hex << bits;
    }
    for (uint32_t bits = 0; bits < 65536; bits++)
        if ((bits & 0x7fffu) <= 0x7f80u) { ASSERT_EQ(rounded(bits << 16, 65535), bits); }
    for (const uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xffffffffu, 0xff80ffffu, 0x7fc00000u})
        for (const uint32_t random : {0u, 1u, 32768u, 65535u}) {
            bf16 got;
            got.bits = rounded(bits, random);
            EXPECT_TRUE(std::isnan(float(got))) << std::hex << bits << " by " << random;
        }
}

TEST(Reduce, Sums) {
    for (const int64_t n : {0, 1, 63, 1000, 100003}) {
        const auto x = random_vector<floatS>(n, 1);
        double want = 0, squares = 0, magnitude = 1;
        for (floatS value : x) want += value, squares += double(value) * value, magnitude += std::abs(value);
        for_threads([&](const Device& device) {
            const double before = 2, got_squares = sum_of_squares(device, x.data(), n);
            double got = before;
            add_sum(device, &got, x.data(), n);
            EXPECT_NEAR(got, before + want, 1e-13 * (before + magnitude));
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
        EXPECT_EQ(first_nonfinite(device, x.data(), 0), -1);
        for (const int64_t i : {20010, 12345, 4096, 4095, 0}) {
            x[i] = bad[i % 3];
            EXPECT_EQ(first_nonfinite(device, x.data(), n), i);
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
