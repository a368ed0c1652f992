// GELU by itself, for a backward pass that has kept the value before it and not the one after. In the forward pass it
// is part of the product before it (matmul.cuh); gelu.h has the mathematics.
#pragma once

#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/gelu.h"

#ifndef USE_CUDA

// out = gelu(in)
inline void gelu_forward(const Device& device, Matrix<floatX> out /*[N, 4C]*/, Matrix<const floatX> in /*[N, 4C]*/) {
    for_each_piece(device, in.rows, in.cols, [&](int64_t row, int64_t begin, int64_t end) {
        floatX* to = out.row(row);
        const floatX* from = in.row(row);
        run_widest([&]() WIDE {
#pragma omp simd
            for (int64_t i = begin; i < end; i++) assign(to[i], gelu_value(floatS(from[i])));
        });
    });
}

#else

// PACK elements a thread and round.
__global__ void gelu_kernel(floatX* out /*[n]*/, const floatX* in /*[n]*/, int64_t n) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x * PACK;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK; i < n; i += step) {
        Floats x = load(in + i);
#pragma unroll
        for (int k = 0; k < PACK; k++) x[k] = gelu_value(x[k]);
        store(out + i, x);
    }
}

// out = gelu(in); both without gaps, 4C a multiple of PACK.
inline void gelu_forward(const Device& device, Matrix<floatX> out /*[N, 4C]*/, Matrix<const floatX> in /*[N, 4C]*/) {
    if (in.size() == 0) return;
    const int64_t blocks = std::min<int64_t>(ceil_div(in.size() / PACK, 256), 16 * device.multiprocessors);
    launch(gelu_kernel, dim3(unsigned(blocks)), 256, 0, device.stream, out.data, in.data, in.size());
}

#endif
