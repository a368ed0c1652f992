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

#include "llmc/kernels/copy.cuh"

inline void layernorm_row(floatX* out /*[C]*/, floatS& mean, floatS& rstd, const floatR* x /*[C]*/,
                          const floatX* weight /*[C]*/, const floatX* bias /*[C]*/, int64_t C) {
    floatS sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < C; c++) sum += x[c];
    const floatS m = sum / floatS(C);
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
    const floatS r = 1 / std::sqrt(squares / floatS(C) + floatS(1e-5));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) assign(out[c], (x[c] - m) * r * floatS(weight[c]) + floatS(bias[c]));
    mean = m;
    rstd = r;
}

inline void layernorm_forward(const Device& device, Matrix<floatX> out /*[N, C]*/, floatS* mean /*[N]*/,
                              floatS* rstd /*[N]*/, Matrix<const floatR> in /*[N, C]*/, const floatX* weight /*[C]*/,
                              const floatX* bias /*[C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < in.rows; i++) layernorm_row(out.row(i), mean[i], rstd[i], in.row(i), weight, bias, in.cols);
}

// sum = a + b on one row
inline void residual_row(floatR* sum /*[C]*/, const floatR* a /*[C]*/, const floatX* b /*[C]*/, int64_t C) {
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
        residual_row(residual.row(i), a.row(i), b.row(i), residual.cols);
        layernorm_row(out.row(i), mean[i], rstd[i], residual.row(i), weight, bias, residual.cols);
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
#pragma omp parallel num_threads(device.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            floatS *dw = partial + block * 2 * C, *db = dw + C;
            std::fill(dw, dw + 2 * C, floatS(0));
            for (int64_t i = block * height; i < std::min(N, (block + 1) * height); i++) {
                const floatX* d = dout.row(i);
                const floatR* x = in.row(i);
                floatR* dx = din.row(i);
                const floatS m = mean[i], r = rstd[i];
                floatS sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
                for (int64_t c = 0; c < C; c++) {
                    const floatS g = floatS(d[c]) * floatS(weight[c]), xhat = (x[c] - m) * r;
                    sum_g += g;
                    sum_gx += g * xhat;
                }
                const floatS mean_g = sum_g / floatS(C), mean_gx = sum_gx / floatS(C);
#pragma omp simd
                for (int64_t c = 0; c < C; c++) {
                    const floatS dc = floatS(d[c]), xhat = (x[c] - m) * r;
                    dw[c] += dc * xhat;
                    db[c] += dc;
                    dx[c] += r * (dc * floatS(weight[c]) - mean_g - xhat * mean_gx);
                }
            }
        }
#pragma omp for simd schedule(static)
        for (int64_t c = 0; c < C; c++)
            for (int64_t block = 0; block < blocks; block++) {
                dweight[c] += partial[block * 2 * C + c];
                dbias[c] += partial[block * 2 * C + C + c];
            }
    }
}
