// LayerNorm over the channels of each token, with x a row of C channels:
//
//   mean = sum(x) / C      rstd = 1 / sqrt(sum((x - mean)^2) / C + 1e-5)      xhat = (x - mean) rstd
//   out  = xhat weight + bias
//
//   dweight += dout xhat      dbias += dout      g = dout weight
//   din     += rstd (g - sum(g) / C - xhat sum(g xhat) / C)
//
// The residual addition that precedes each LayerNorm is fused with it, while the row is in the first-level cache.
#pragma once

#include <cmath>

#include "llmc/device.h"
#include "llmc/kernels/simd.h"

WIDE inline void layernorm_row(floatX* out /*[C]*/, floatS& mean, floatS& rstd, const floatR* x /*[C]*/,
                               const floatX* weight /*[C]*/, const floatX* bias /*[C]*/, int64_t C) {
    const floatS m = sum_in_lanes<floatS>(0, C, [=](int64_t c) WIDE { return x[c]; }) / floatS(C);
    const floatS variance =
        sum_in_lanes<floatS>(0, C, [=](int64_t c) WIDE { return (x[c] - m) * (x[c] - m); }) / floatS(C);
    const floatS r = 1 / std::sqrt(variance + floatS(1e-5));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) assign(out[c], (x[c] - m) * r * floatS(weight[c]) + floatS(bias[c]));
    mean = m;
    rstd = r;
}

inline void layernorm_forward(const Device& device, Matrix<floatX> out /*[N, C]*/, floatS* mean /*[N]*/,
                              floatS* rstd /*[N]*/, Matrix<const floatR> in /*[N, C]*/, const floatX* weight /*[C]*/,
                              const floatX* bias /*[C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < in.rows; i++)
        run_widest([&]() WIDE { layernorm_row(out.row(i), mean[i], rstd[i], in.row(i), weight, bias, in.cols); });
}

// sum = a + b on one row
WIDE inline void residual_row(floatR* sum /*[C]*/, const floatR* a /*[C]*/, const floatX* b /*[C]*/, int64_t C) {
#pragma omp simd
    for (int64_t c = 0; c < C; c++) sum[c] = a[c] + floatR(b[c]);
}

// out = a + b; out may be a
inline void residual_forward(const Device& device, Matrix<floatR> out /*[N, C]*/, Matrix<const floatR> a /*[N, C]*/,
                             Matrix<const floatX> b /*[N, C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < out.rows; i++) residual_row(out.row(i), a.row(i), b.row(i), out.cols);
}

// residual = a + b, out = layernorm(residual); residual may be a
inline void residual_layernorm_forward(const Device& device, Matrix<floatR> residual /*[N, C]*/,
                                       Matrix<floatX> out /*[N, C]*/, floatS* mean /*[N]*/, floatS* rstd /*[N]*/,
                                       Matrix<const floatR> a /*[N, C]*/, Matrix<const floatX> b /*[N, C]*/,
                                       const floatX* weight /*[C]*/, const floatX* bias /*[C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < residual.rows; i++) {
        run_widest([&]() WIDE {
            residual_row(residual.row(i), a.row(i), b.row(i), residual.cols);
            layernorm_row(out.row(i), mean[i], rstd[i], residual.row(i), weight, bias, residual.cols);
        });
    }
}

// One row of the backward pass; adds to the sums over tokens dw and db.
WIDE inline void layernorm_row_backward(floatR* dx /*[C]*/, floatS* dw /*[C]*/, floatS* db /*[C]*/,
                                        const floatX* dout /*[C]*/, const floatR* x /*[C]*/, floatS mean, floatS rstd,
                                        const floatX* weight /*[C]*/, int64_t C) {
    floatS sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t c = 0; c < C; c++) {
        const floatS g = floatS(dout[c]) * floatS(weight[c]);
        sum_g += g;
        sum_gx += g * ((x[c] - mean) * rstd);
    }
    const floatS mean_g = sum_g / floatS(C), mean_gx = sum_gx / floatS(C);
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        const floatS d = floatS(dout[c]), xhat = (x[c] - mean) * rstd;
        dw[c] += d * xhat;
        db[c] += d;
        dx[c] += rstd * (d * floatS(weight[c]) - mean_g - xhat * mean_gx);
    }
}

// The sums over tokens are taken in at most 64 blocks of rows that depend on N alone, then over the blocks in order:
// the bits do not depend on the threads.
constexpr int64_t layernorm_blocks = 64;

inline size_t layernorm_backward_scratch_bytes(int /*threads*/, int64_t C) {
    return size_t(layernorm_blocks * 2 * C) * sizeof(floatS);
}

inline void layernorm_backward(const Device& device, Matrix<floatR> din /*[N, C] +=*/, floatS* dweight /*[C] +=*/,
                               floatS* dbias /*[C] +=*/, Matrix<const floatX> dout /*[N, C]*/,
                               Matrix<const floatR> in /*[N, C]*/, const floatS* mean /*[N]*/,
                               const floatS* rstd /*[N]*/, const floatX* weight /*[C]*/) {
    const int64_t N = in.rows, C = in.cols;
    const int64_t height = std::max<int64_t>(32, ceil_div(N, layernorm_blocks)), blocks = ceil_div(N, height);
    floatS* partial = device.scratch_as<floatS>(size_t(blocks * 2 * C));  // [blocks, 2, C]
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        floatS *dw = partial + block * 2 * C, *db = dw + C;
        std::fill(dw, dw + 2 * C, floatS(0));
        for (int64_t i = block * height; i < std::min(N, (block + 1) * height); i++)
            run_widest([&]() WIDE {
                layernorm_row_backward(din.row(i), dw, db, dout.row(i), in.row(i), mean[i], rstd[i], weight, C);
            });
    }
    for (int64_t block = 0; block < blocks; block++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            dweight[c] += partial[block * 2 * C + c];
            dbias[c] += partial[block * 2 * C + C + c];
        }
}
