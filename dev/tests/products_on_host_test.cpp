// How matrix products on a GPU choose algorithms of cuBLASLt, whose part dev/tests/cuda_on_host/cublasLt.h plays.
#include <gtest/gtest.h>

#include "kernel_cases/cases.h"
#include "llmc/kernels/matmul.cuh"

namespace {

TEST(Products, TokenClassesAreEighthsOfPowersOfTwo) {
    for (int64_t n = 0; n <= 16; n++) EXPECT_EQ(token_class(n), n);
    EXPECT_EQ(token_class(17), 18);
    EXPECT_EQ(token_class(1024), 1024);
    EXPECT_EQ(token_class(1025), 1152);
    EXPECT_EQ(token_class(2047), 2048);
    EXPECT_EQ(token_class(131071), 131072);
}

class Choice : public testing::TestWithParam<bool> {
protected:
    Cases cases;
    const int64_t IC = 24, OC = 16;

    // out = in W^T, checked where products do not repeat themselves to be timed; returns how many choices there are.
    size_t choices_after(int64_t N) {
        cases.device.tune_products = GetParam();
        const DeviceArray<floatX> in(cases.device, normal_values(1, N * IC)),
            w(cases.device, normal_values(2, OC * IC));
        const DeviceArray<floatX> out(cases.device, normal_values(3, N * OC));
        matmul_forward(cases.device, out.matrix(N, OC), in.matrix(N, IC), w.matrix(OC, IC), nullptr);
        const std::vector<double> x = in.values(), weight = w.values(), y = out.values();
        for (int64_t i = 0; i < N; i++)
            for (int64_t j = 0; j < OC; j++) {
                double sum = 0;
                for (int64_t k = 0; k < IC; k++) sum += x[size_t(i * IC + k)] * weight[size_t(j * IC + k)];
                EXPECT_NEAR(y[size_t(i * OC + j)], sum, 1e-5);
            }
        return cases.device.algorithms->size();
    }
    void SetUp() override { cases.give_scratch(matmul_scratch_bytes(1)); }
};

TEST_P(Choice, IsSharedByTheTokenCountsOfAClass) {
    EXPECT_EQ(choices_after(65), 1u);
    EXPECT_EQ(choices_after(70), 1u);
    EXPECT_EQ(choices_after(72), 1u);
    EXPECT_EQ(choices_after(73), 2u);
    EXPECT_EQ(choices_after(64), 3u);
}

// The stand-in's algorithms that are found for 36 rows do not run 33.
TEST_P(Choice, IsOfItsOwnWhereThatOfTheClassCannotRunIt) {
    EXPECT_EQ(choices_after(33), 2u);
    EXPECT_EQ(choices_after(33), 2u);
    EXPECT_EQ(choices_after(34), 2u);
}

INSTANTIATE_TEST_SUITE_P(, Choice, testing::Bool(), [](const auto& info) { return info.param ? "Timed" : "First"; });

}  // namespace
