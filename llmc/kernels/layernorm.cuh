// LayerNorm over the channels of each token, with x a row of C channels:
//
//   mean = sum(x) / C      rstd = 1 / sqrt(sum((x - mean)^2) / C + 1e-5)      xhat = (x - mean) rstd
//   out  = xhat weight + bias
//
//   dweight += dout xhat      dbias += dout      g = dout weight
//   din     += rstd (g - sum(g) / C - xhat sum(g xhat) / C)
//
// `weight` is stored less NORM_CENTER. The backward pass adds to the gradient of the residual stream. In the forward
// pass, it is the products before that add to the stream (matmul_residual_forward).
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "llmc/device.h"
#include "llmc/kernels/reduce.cuh"
#ifndef USE_CUDA
#include "llmc/kernels/simd.h"

[[gnu::always_inline]] inline floatS norm_weight(floatX stored) { return NORM_CENTER + floatS(stored); }

WIDE inline void layernorm_row(floatX* out /*[C]*/, floatS& mean, floatS& rstd, const floatR* x /*[C]*/,
                               const floatX* weight /*[C]*/, const floatX* bias /*[C]*/, int64_t C) {
    const floatS m = sum_in_lanes<floatS>(0, C, [=](int64_t c) WIDE { return x[c]; }) / floatS(C);
    const floatS variance =
        sum_in_lanes<floatS>(0, C, [=](int64_t c) WIDE { return (x[c] - m) * (x[c] - m); }) / floatS(C);
    const floatS r = 1 / std::sqrt(variance + floatS(1e-5));
#pragma omp simd
    for (int64_t c = 0; c < C; c++) assign(out[c], (x[c] - m) * r * norm_weight(weight[c]) + floatS(bias[c]));
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

// One row of the backward pass; adds to the sums over tokens dw and db.
WIDE inline void layernorm_row_backward(floatR* dx /*[C]*/, floatS* dw /*[C]*/, floatS* db /*[C]*/,
                                        const floatX* dout /*[C]*/, const floatR* x /*[C]*/, floatS mean, floatS rstd,
                                        const floatX* weight /*[C]*/, int64_t C) {
    floatS sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
    for (int64_t c = 0; c < C; c++) {
        const floatS g = floatS(dout[c]) * norm_weight(weight[c]);
        sum_g += g;
        sum_gx += g * ((x[c] - mean) * rstd);
    }
    const floatS mean_g = sum_g / floatS(C), mean_gx = sum_gx / floatS(C);
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
        const floatS d = floatS(dout[c]), xhat = (x[c] - mean) * rstd;
        dw[c] += d * xhat;
        db[c] += d;
        dx[c] += rstd * (d * norm_weight(weight[c]) - mean_g - xhat * mean_gx);
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

#else

// ---------------------------------------------------------------------------------------------------------------------
// Threads and rows. A team of threads has a row; it holds the row in registers between the passes over it, so that
// memory is read once. A thread has PACKS packs of 8 neighbouring columns, the packs of all threads lie side by side:
//
//   C <= 1024     a team is a warp, a block is 8 teams, and a thread has 1 to 4 packs
//   C <= 16384    a team is a block of up to 32 warps, and a thread has 2 packs

template <int PACKS_, int TEAMS_>
struct RowThreads {
    static constexpr int PACKS = PACKS_ /*per thread*/, TEAMS = TEAMS_ /*per block*/;
    static constexpr int most_threads = WARP * (TEAMS > 1 ? TEAMS : 32);

    static int threads(int64_t C) { return TEAMS > 1 ? TEAMS * WARP : int(round_up(ceil_div(C, PACKS * PACK), WARP)); }

    // Where a thread is in its block, and the column of its pack p.
    static __device__ int team() { return TEAMS > 1 ? int(threadIdx.x) / WARP : 0; }
    static __device__ int thread() { return TEAMS > 1 ? int(threadIdx.x) % WARP : int(threadIdx.x); }
    static __device__ int threads() { return TEAMS > 1 ? WARP : int(blockDim.x); }
    static __device__ int column(int p) { return (p * threads() + thread()) * PACK; }
    // Every thread of the team gets the sum over the team.
    static __device__ float sum(float value, float* shared /*[32]*/) {
        return TEAMS > 1 ? warp_sum(value) : block_sum(value, shared);
    }
};

// Calls run(RowThreads<...>()) for rows of C channels.
template <class Run>
auto with_rows(int64_t C, const Run& run) {
    constexpr int64_t width = WARP * PACK;
    if (C <= 1 * width) return run(RowThreads<1, 8>());
    if (C <= 2 * width) return run(RowThreads<2, 8>());
    if (C <= 3 * width) return run(RowThreads<3, 8>());
    if (C <= 4 * width) return run(RowThreads<4, 8>());
    if (C > 64 * width)
        throw Failure(EXIT_CONFIG, "LayerNorm on a GPU takes rows of at most 16384 channels, these have " +
                                       std::to_string(C) + "; choose fewer --channels");
    return run(RowThreads<2, 1>());
}

// A pack as it lies in memory. Kept between two passes like this, bf16 takes half the registers of fp32.
template <class T>
struct Pack {
    std::conditional_t<sizeof(T) == 2, uint4, float4> words[PACK * sizeof(T) / 16];

    __device__ Floats floats() const { return load(reinterpret_cast<const T*>(words)); }
    // The compiler forgets what it knows of the pack; else it would keep the values that floats() has returned.
    __device__ void forget() {
#ifdef __CUDA_ARCH__
        for (auto& w : words) {
            if constexpr (sizeof(T) == 2) asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
            else asm volatile("" : "+f"(w.x), "+f"(w.y), "+f"(w.z), "+f"(w.w));
        }
#endif
    }
};
template <class T>
__device__ Pack<T> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T>*>(from);
}

__device__ inline Floats load_norm_weight(const floatX* stored) {
    Floats w = load(stored);
#pragma unroll
    for (int k = 0; k < PACK; k++) w[k] += NORM_CENTER;
    return w;
}

// 4 bytes per element in bf16.
template <class Rows>
__global__ void __launch_bounds__(Rows::most_threads)
    layernorm_forward_kernel(Matrix<floatX> out, float* mean, float* rstd, Matrix<const floatR> in,
                             const floatX* weight, const floatX* bias) {
    float* sums = shared_memory<float>();  // [2, 32]
    constexpr int PACKS = Rows::PACKS;
    const int64_t row = int64_t(blockIdx.x) * Rows::TEAMS + Rows::team();
    const int C = int(in.cols);
    const float per_channel = 1 / float(C);
    if (row >= in.rows) return;

    Floats x[PACKS];
#pragma unroll
    for (int p = 0; p < PACKS; p++) x[p] = Rows::column(p) < C ? load(in.row(row) + Rows::column(p)) : Floats{};
    float sum = 0, squares = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++)
#pragma unroll
        for (int k = 0; k < PACK; k++) sum += x[p][k];
    const float m = Rows::sum(sum, sums) * per_channel;
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (Rows::column(p) < C)
#pragma unroll
            for (int k = 0; k < PACK; k++) squares += (x[p][k] - m) * (x[p][k] - m);
    const float r = 1 / sqrtf(Rows::sum(squares, sums + WARP) * per_channel + 1e-5f);
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (Rows::column(p) < C) {
            const Floats w = load_norm_weight(weight + Rows::column(p)), b = load(bias + Rows::column(p));
#pragma unroll
            for (int k = 0; k < PACK; k++) x[p][k] = (x[p][k] - m) * r * w[k] + b[k];
            store(out.row(row) + Rows::column(p), x[p]);
        }
    if (Rows::thread() == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

inline void layernorm_forward(const Device& device, Matrix<floatX> out /*[N, C]*/, floatS* mean /*[N]*/,
                              floatS* rstd /*[N]*/, Matrix<const floatR> in /*[N, C]*/, const floatX* weight /*[C]*/,
                              const floatX* bias /*[C]*/) {
    with_rows(in.cols, [&](auto rows) {
        launch(layernorm_forward_kernel<decltype(rows)>, dim3(unsigned(ceil_div(in.rows, rows.TEAMS))),
               rows.threads(in.cols), 2 * WARP * sizeof(float), device.stream, out, mean, rstd, in, weight, bias);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. As many blocks as the GPU runs at once go through the rows; each sums dout xhat and dout over its rows into
// a row of `partial`, which a second kernel adds up in order. A team's sums lie in shared memory, where each thread has
// those of its own columns and nobody waits: as float4 [teams, 2 sums, 2 halves of a pack, C / 8 packs], so that
// neighbouring lanes access neighbouring 16 bytes.

// 8 bytes per element in bf16.
template <class Rows>
__global__ void __launch_bounds__(Rows::most_threads, Rows::TEAMS > 1 ? 2 : 1)
    layernorm_backward_kernel(Matrix<floatR> din, float* partial /*[blocks, 2, C]*/, Matrix<const floatX> dout,
                              Matrix<const floatR> in, const float* mean, const float* rstd, const floatX* weight) {
    float* sums = shared_memory<float>();  // [2, 32]
    float4* team_sums = reinterpret_cast<float4*>(sums + 2 * WARP);
    constexpr int PACKS = Rows::PACKS, TEAMS = Rows::TEAMS;
    const int C = int(in.cols), packs = C / PACK;
    const float per_channel = 1 / float(C);
    float4* my_sums = team_sums + Rows::team() * 4 * packs + Rows::thread();
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (Rows::column(p) < C)
            for (int i = 0; i < 4; i++) my_sums[i * packs + p * Rows::threads()] = make_float4(0, 0, 0, 0);

    for (int64_t row = int64_t(blockIdx.x) * TEAMS + Rows::team(); row < in.rows; row += int64_t(gridDim.x) * TEAMS) {
        Pack<floatX> d_packs[PACKS];
        Pack<floatR> x_packs[PACKS], dx_packs[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (const int c = Rows::column(p); c < C) {
                d_packs[p] = load_pack(dout.row(row) + c);
                x_packs[p] = load_pack(in.row(row) + c);
                dx_packs[p] = load_pack(din.row(row) + c);
            }
        const float m = mean[row], r = rstd[row];
        float sum_g = 0, sum_gx = 0;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (const int c = Rows::column(p); c < C) {
                const Floats w = load_norm_weight(weight + c), d = d_packs[p].floats(), x = x_packs[p].floats();
                Floats dw;
#pragma unroll
                for (int k = 0; k < PACK; k++) {
                    dw[k] = d[k] * ((x[k] - m) * r);
                    sum_g += d[k] * w[k];
                    sum_gx += dw[k] * w[k];
                }
                const auto add = [&](int i, float a, float b, float c, float d) {
                    float4& sum = my_sums[i * packs + p * Rows::threads()];
                    sum = make_float4(sum.x + a, sum.y + b, sum.z + c, sum.w + d);
                };
                add(0, dw[0], dw[1], dw[2], dw[3]);
                add(1, dw[4], dw[5], dw[6], dw[7]);
                add(2, d[0], d[1], d[2], d[3]);
                add(3, d[4], d[5], d[6], d[7]);
                d_packs[p].forget();
                x_packs[p].forget();
            }
        const float mean_g = Rows::sum(sum_g, sums) * per_channel,
                    mean_gx = Rows::sum(sum_gx, sums + WARP) * per_channel;
#pragma unroll
        for (int p = 0; p < PACKS; p++)
            if (const int c = Rows::column(p); c < C) {
                const Floats w = load_norm_weight(weight + c), d = d_packs[p].floats(), x = x_packs[p].floats();
                Floats dx = dx_packs[p].floats();
#pragma unroll
                for (int k = 0; k < PACK; k++) dx[k] += r * (d[k] * w[k] - mean_g - (x[k] - m) * r * mean_gx);
                store(din.row(row) + c, dx);
            }
    }

    __syncthreads();
    for (int i = int(threadIdx.x); i < 4 * packs; i += int(blockDim.x)) {
        float4 total = team_sums[i];
        for (int team = 1; team < TEAMS; team++) {
            const float4 x = team_sums[team * 4 * packs + i];
            total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
        }
        const int half = i / packs % 2, column = i / (2 * packs) * C + i % packs * PACK + half * 4;
        *reinterpret_cast<float4*>(partial + int64_t(blockIdx.x) * 2 * C + column) = total;
    }
}

// Blocks that go through the rows: with 512 threads on each multiprocessor, enough bytes are on their way. More
// multiprocessors than GPUs have today are not used, so that the scratch memory is known without the GPU.
constexpr int layernorm_multiprocessors = 160;

inline int64_t layernorm_blocks(int multiprocessors, int64_t C) {
    const int threads = with_rows(C, [&](auto rows) { return rows.threads(C); });
    return std::min(multiprocessors, layernorm_multiprocessors) * std::max(1, 512 / threads);
}

inline size_t layernorm_backward_scratch_bytes(int /*threads*/, int64_t C) {
    return size_t(layernorm_blocks(layernorm_multiprocessors, C) * 2 * C) * sizeof(float);
}

inline void layernorm_backward(const Device& device, Matrix<floatR> din /*[N, C] +=*/, floatS* dweight /*[C] +=*/,
                               floatS* dbias /*[C] +=*/, Matrix<const floatX> dout /*[N, C]*/,
                               Matrix<const floatR> in /*[N, C]*/, const floatS* mean /*[N]*/,
                               const floatS* rstd /*[N]*/, const floatX* weight /*[C]*/) {
    const int64_t N = in.rows, C = in.cols;
    with_rows(C, [&](auto rows) {
        const int64_t blocks = std::min(ceil_div(N, rows.TEAMS), layernorm_blocks(device.multiprocessors, C));
        float* partial = device.scratch_as<float>(size_t(blocks * 2 * C));  // [blocks, 2, C]
        launch(layernorm_backward_kernel<decltype(rows)>, dim3(unsigned(blocks)), rows.threads(C),
               size_t(2 * WARP + rows.TEAMS * 2 * C) * sizeof(float), device.stream, din, partial, dout, in, mean, rstd,
               weight);
        add_row_sums(device, dweight, dbias, {partial, blocks, 2 * C}, C);
    });
}

#endif
