// Softmax and cross entropy of each row of logits x against its target t, with the gradient in the same pass:
//
//   top = max x      total = sum exp(x - top)      loss = ln(total) - (x[t] - top)
//   dx  = (exp(x - top) / total - [j == t]) dloss
//
// The gradient overwrites the logits. Exponentials are computed twice instead of being stored between the passes:
// stored in bf16 they would be rounded once more.
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>

#include "llmc/device.h"
#ifndef USE_CUDA
#include "llmc/kernels/simd.h"
#endif

// Target -1 marks a row to ignore: loss and gradient are 0. The gradient of the padded columns V..Vp-1 is 0.
#ifndef USE_CUDA

// Loss of one row; its logits become the gradient if wanted.
WIDE inline floatS classifier_row(floatX* x /*[V]*/, int64_t V, int32_t target, floatS dloss, bool want_gradient) {
    floatS top = std::numeric_limits<floatS>::lowest();  // finite: the difference of two infinities is none
    double total = 0;  // relative to the top so far; by blocks, which stay in the first-level cache and round less
    for (int64_t begin = 0; begin < V; begin += 4096) {
        const int64_t end = std::min(V, begin + 4096);
        const floatS new_top = std::max(top, max_in_lanes<floatS>(begin, end, [=](int64_t j) WIDE { return x[j]; }));
        total *= std::exp(double(top - new_top));
        total +=
            sum_in_lanes<floatS>(begin, end, [=](int64_t j) WIDE { return exp_nonpositive(floatS(x[j]) - new_top); });
        top = new_top;
    }
    const floatS at_target = floatS(x[target]) - top;

    if (want_gradient) {
        const floatS scale = floatS(dloss / total);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) assign(x[j], exp_nonpositive(floatS(x[j]) - top) * scale);
        x[target] = floatX(exp_nonpositive(at_target) * scale - dloss);
    }
    return floatS(std::log(total) - at_target);
}

inline void classifier_forward_backward(const Device& device, floatS* losses /*[n]*/,
                                        Matrix<floatX> logits /*[n, Vp] in: logits, out: gradient if wanted*/,
                                        const int32_t* targets /*[n]*/, int64_t V, floatS dloss, bool want_gradient) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < logits.rows; i++) {
        floatX* x = logits.row(i);
        const bool ignored = targets[i] < 0;
        losses[i] = 0;
        if (!ignored) run_widest([&]() WIDE { losses[i] = classifier_row(x, V, targets[i], dloss, want_gradient); });
        if (want_gradient) std::fill(x + (ignored ? 0 : V), x + logits.cols, floatX(0));
    }
}

#else

// A block has a row, a thread the packs of 8 columns threadIdx.x, threadIdx.x + blockDim.x, ... The first pass keeps
// the row in shared memory where it fits (keep_row), so that a logit is read from memory once and its gradient written
// once (4 bytes per element in bf16); longer rows are read again, in part from the cache.
__global__ void __launch_bounds__(512, 2)
    classifier_kernel(float* losses /*[n]*/, Matrix<floatX> logits /*[n, Vp]*/, const int32_t* targets /*[n]*/,
                      int64_t V, float dloss, bool want_gradient, bool keep_row) {
    float* sums = shared_memory<float>();                       // of the warps: 32 maxima, 32 sums
    floatX* kept = reinterpret_cast<floatX*>(sums + 2 * WARP);  // [Vp]
    floatX* row = logits.row(blockIdx.x);
    const int first = int(threadIdx.x) * PACK, step = int(blockDim.x) * PACK;
    const int columns = int(V), padded = int(logits.cols), target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        if (want_gradient)
            for (int c = first; c < padded; c += step) store(row + c, Floats{});
        return;
    }
    const float x_target = float(row[target]);

    // Of this thread's columns: the largest logit so far and the sum of exp(x - top). Finite at the start, because the
    // difference of two infinities is none.
    float top = -FLT_MAX, total = 0;
    constexpr int ahead = 4;  // packs that are fetched together
    for (int begin = first; begin < columns; begin += ahead * step) {
        Floats x[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++)
            if (const int c = begin + j * step; c < columns) x[j] = load(row + c);
        float new_top = top;
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            const int c = begin + j * step;
            if (keep_row && c < columns) store(kept + c, x[j]);  // exact: the values are of this type
            if (c + PACK > columns)
#pragma unroll
                for (int k = 0; k < PACK; k++)
                    if (c + k >= columns) x[j][k] = -INFINITY;
#pragma unroll
            for (int k = 0; k < PACK; k++) new_top = fmaxf(new_top, x[j][k]);
        }
        total *= power_of_two(LOG2_E * (top - new_top));
#pragma unroll
        for (int j = 0; j < ahead; j++)
            if (begin + j * step < columns)
#pragma unroll
                for (int k = 0; k < PACK; k++) total += power_of_two(LOG2_E * (x[j][k] - new_top));
        top = new_top;
    }
    const float row_top = block_max(top, sums);
    total = block_sum(total * power_of_two(LOG2_E * (top - row_top)), sums + WARP);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(total) - (x_target - row_top);
    if (!want_gradient) return;

    const float scale = dloss / total;
    const floatX* from = keep_row ? kept : row;  // what this thread itself has put there
    for (int c = first; c < padded; c += step) {
        Floats g = load(from + c);  // in the padding anything
#pragma unroll
        for (int k = 0; k < PACK; k++) g[k] = power_of_two(LOG2_E * (g[k] - row_top)) * scale;
        if (c + PACK > columns || c / PACK == target / PACK)
#pragma unroll
            for (int k = 0; k < PACK; k++) g[k] = c + k >= columns ? 0 : c + k == target ? g[k] - dloss : g[k];
        store(row + c, g);
    }
}

inline void classifier_forward_backward(const Device& device, floatS* losses /*[n]*/,
                                        Matrix<floatX> logits /*[n, Vp] in: logits, out: gradient if wanted*/,
                                        const int32_t* targets /*[n]*/, int64_t V, floatS dloss, bool want_gradient) {
    const int threads = int(std::min<int64_t>(512, round_up(ceil_div(logits.cols, PACK), WARP)));
    int gpu = 0, most_shared = 0;  // bytes that a block may have
    CUDA_CHECK(cudaGetDevice(&gpu));
    CUDA_CHECK(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu));
    const size_t sums = 2 * WARP * sizeof(float), row = size_t(logits.cols) * sizeof(floatX);
    const bool keep_row = want_gradient && sums + row <= size_t(most_shared);
    launch(classifier_kernel, dim3(unsigned(logits.rows)), threads, sums + (keep_row ? row : 0), device.stream, losses,
           logits, targets, V, dloss, want_gradient, keep_row);
}

#endif
