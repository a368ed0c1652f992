// Token and position embedding.
//
//   out[i] = wte[tokens[i]] + wpe[positions[i]]        dwte[tokens[i]] += dout[i],  dwpe[positions[i]] += dout[i]
#pragma once

#include <omp.h>

#include "llmc/device.h"

inline void encoder_forward(const Device& device, Matrix<floatR> out /*[N, C]*/, const int32_t* tokens /*[N]*/,
                            const int32_t* positions /*[N]*/, Matrix<const floatX> wte /*[Vp, C]*/,
                            Matrix<const floatX> wpe /*[T, C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < out.rows; i++) {
        floatR* o = out.row(i);
        const floatX *t = wte.row(tokens[i]), *p = wpe.row(positions[i]);
#pragma omp simd
        for (int64_t c = 0; c < out.cols; c++) o[c] = floatR(t[c]) + floatR(p[c]);
    }
}

// Equal tokens meet in one row of dwte. Each thread therefore owns a range of columns and walks all tokens in order:
// no atomics, and the bits do not depend on the threads.
inline void encoder_backward(const Device& device, Matrix<floatS> dwte /*[Vp, C] +=*/,
                             Matrix<floatS> dwpe /*[T, C] +=*/, Matrix<const floatR> dout /*[N, C]*/,
                             const int32_t* tokens /*[N]*/, const int32_t* positions /*[N]*/) {
#pragma omp parallel num_threads(device.threads)
    {
        constexpr int64_t line = 64 / sizeof(floatS);  // threads never share a cache line
        const int64_t width = round_up(ceil_div(dout.cols, omp_get_num_threads()), line);
        const int64_t begin = omp_get_thread_num() * width, end = std::min(begin + width, dout.cols);
        for (int64_t i = 0; i < dout.rows; i++) {
            floatS *t = dwte.row(tokens[i]), *p = dwpe.row(positions[i]);
            const floatR* d = dout.row(i);
#pragma omp simd
            for (int64_t c = begin; c < end; c++) {
                t[c] += d[c];
                p[c] += d[c];
            }
        }
    }
}
