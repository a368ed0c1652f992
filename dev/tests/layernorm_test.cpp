// LayerNorm against plain loops in double, for odd sizes.
#include "dev/tests/kernels_test.h"
#include "llmc/kernels/layernorm.cuh"

namespace {

class LayerNorm : public testing::TestWithParam<std::pair<int64_t, int64_t>> {};

TEST_P(LayerNorm, ForwardAndBackward) {
    const auto [N, C] = GetParam();
    const auto x = random_vector<floatR>(N * C, 1);
    const auto dout = random_vector<floatX>(N * C, 3);
    const auto weight = random_vector<floatX>(C, 4), bias = random_vector<floatX>(C, 5);
    const auto before = random_vector<floatR>(N * C, 6);
    for_threads([&, N = N, C = C](const Device& device) {
        std::vector<floatR> dx = before;
        std::vector<floatX> out(N * C);
        std::vector<floatS> mean(N), rstd(N), dweight(C, 1), dbias(C, 2);
        const Matrix<const floatR> xm(x.data(), N, C);
        layernorm_forward(device, {out.data(), N, C}, mean.data(), rstd.data(), xm, weight.data(), bias.data());
        layernorm_backward(device, {dx.data(), N, C}, dweight.data(), dbias.data(), {dout.data(), N, C}, xm,
                           mean.data(), rstd.data(), weight.data());

        Doubles want_x = to_double(x), want_out(N * C), want_mean(N), want_rstd(N), want_dx = to_double(before);
        Doubles want_dweight(C, 1), want_dbias(C, 2);
        for (int64_t i = 0; i < N; i++) {
            double squares = 0, sum_g = 0, sum_gx = 0;
            for (int64_t c = 0; c < C; c++) want_mean[i] += want_x[i * C + c] / double(C);
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
        expect_close("out", out, want_out, bound_x);
        expect_close("mean", mean, want_mean, bound_s);
        expect_close("rstd", rstd, want_rstd, bound_s);
        expect_close("din", dx, want_dx, bound_s);
        expect_close("dweight", dweight, want_dweight, bound_s);
        expect_close("dbias", dbias, want_dbias, bound_s);
        return concatenated(out, mean, rstd, dx, dweight, dbias);
    });
}

INSTANTIATE_TEST_SUITE_P(Sizes, LayerNorm,
                         testing::Values(std::pair{1, 8}, std::pair{3, 7}, std::pair{33, 65}, std::pair{259, 193},
                                         std::pair{100, 768}));

}  // namespace
