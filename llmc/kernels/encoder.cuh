// Token and position embedding.
//
//   out[i] = wte[tokens[i]] + wpe[positions[i]]        dwte[tokens[i]] += dout[i],  dwpe[positions[i]] += dout[i]
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "llmc/device.h"
#ifndef USE_CUDA
#include <omp.h>
#endif

// What stands in the N rows of a chunk.
struct TokenRows {
    const int32_t *tokens, *positions;  // [N]
    // [N] row numbers in ascending order of token, and of position, as sorted_rows() makes them. Only the backward pass
    // on a GPU reads them.
    const int32_t *by_token = nullptr, *by_position = nullptr;
};

// The numbers of the rows in ascending order of their keys >= 0, those of equal keys in ascending order themselves.
inline std::vector<int32_t> sorted_rows(std::span<const int32_t> keys) {
    std::vector<int32_t> rows(keys.size());
    if (keys.empty()) return rows;
    std::vector<int32_t> next(size_t(*std::max_element(keys.begin(), keys.end())) + 2);  // place of the next row a key
    for (const int32_t key : keys) next[size_t(key) + 1]++;
    for (size_t key = 1; key < next.size(); key++) next[key] += next[key - 1];
    for (size_t i = 0; i < keys.size(); i++) rows[size_t(next[size_t(keys[i])]++)] = int32_t(i);
    return rows;
}

#ifndef USE_CUDA

inline void encoder_forward(const Device& device, Matrix<floatR> out /*[N, C]*/, const TokenRows& rows,
                            Matrix<const floatX> wte /*[Vp, C]*/, Matrix<const floatX> wpe /*[T, C]*/) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < out.rows; i++) {
        floatR* o = out.row(i);
        const floatX *t = wte.row(rows.tokens[i]), *p = wpe.row(rows.positions[i]);
#pragma omp simd
        for (int64_t c = 0; c < out.cols; c++) o[c] = floatR(t[c]) + floatR(p[c]);
    }
}

inline size_t encoder_backward_scratch_bytes(int64_t /*N*/, int64_t /*C*/) { return 0; }

// Equal tokens meet in one row of dwte. Each thread therefore owns a range of columns and walks all tokens in order:
// no atomics, and the bits do not depend on the threads.
inline void encoder_backward(const Device& device, Matrix<floatS> dwte /*[Vp, C] +=*/,
                             Matrix<floatS> dwpe /*[T, C] +=*/, Matrix<const floatR> dout /*[N, C]*/,
                             const TokenRows& rows) {
#pragma omp parallel num_threads(device.threads)
    {
        constexpr int64_t line = 64 / sizeof(floatS);  // threads never share a cache line
        const int64_t width = round_up(ceil_div(dout.cols, omp_get_num_threads()), line);
        const int64_t begin = omp_get_thread_num() * width, end = std::min(begin + width, dout.cols);
        for (int64_t i = 0; i < dout.rows; i++) {
            floatS *t = dwte.row(rows.tokens[i]), *p = dwpe.row(rows.positions[i]);
            const floatR* d = dout.row(i);
#pragma omp simd
            for (int64_t c = begin; c < end; c++) {
                t[c] += d[c];
                p[c] += d[c];
            }
        }
    }
}

#else

// A warp has a row, a lane 8 columns of every 256. Read and written per element: out, wte, and wpe, which mostly comes
// from the cache (6 bytes in bf16).
__global__ void encoder_forward_kernel(Matrix<floatR> out, const int32_t* tokens, const int32_t* positions,
                                       Matrix<const floatX> wte, Matrix<const floatX> wpe) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
    if (i >= out.rows) return;
    const floatX *t = wte.row(tokens[i]), *p = wpe.row(positions[i]);
    for (int64_t c = threadIdx.x % WARP * PACK; c < out.cols; c += WARP * PACK) {
        Floats sum = load(t + c);
        const Floats position = load(p + c);
#pragma unroll
        for (int k = 0; k < PACK; k++) sum[k] += position[k];
        store(out.row(i) + c, sum);
    }
}

inline void encoder_forward(const Device& device, Matrix<floatR> out /*[N, C]*/, const TokenRows& rows,
                            Matrix<const floatX> wte /*[Vp, C]*/, Matrix<const floatX> wpe /*[T, C]*/) {
    constexpr int threads = 256;
    launch(encoder_forward_kernel, dim3(unsigned(ceil_div(out.rows, threads / WARP))), threads, 0, device.stream, out,
           rows.tokens, rows.positions, wte, wpe);
}

// The gradient of a table is summed over the rows in ascending order of their key, token or position, where equal keys
// form runs. The order is cut into groups of 32 rows: runs may be as long as the chunk, groups share the work evenly.
//
//   keys     3 3 5 5 | 5 5 5 5 | 5 7 8 8      (groups of 4)
//   first    +3  +5  |   p[1]  | p[2] +7 +8   adds the sum of each run to the gradient, but a run that began in an
//                                             earlier group to the group's row of `partial`
//   second       +5: p[1] + p[2]              the group in which a run begins adds the rows of `partial` that follow
//
// Every row of the gradient is added to by one warp at a time, in an order that the keys alone decide.

// A warp has a group and 256 columns, a lane one row's number and key and 8 columns. Read per element: dout; per
// element of a run, the gradient is read and written (bf16: 2 + 8 / length of the run bytes).
__global__ void encoder_backward_groups(Matrix<float> gradient /*[K, C] +=*/, float* partial /*[groups, C]*/,
                                        Matrix<const floatR> dout /*[N, C]*/, const int32_t* keys /*[N]*/,
                                        const int32_t* order /*[N]*/) {
    const int lane = int(threadIdx.x) % WARP;
    const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / WARP, begin = group * WARP;
    if (begin >= dout.rows) return;
    const int n = dout.rows - begin < WARP ? int(dout.rows - begin) : WARP;
    const int32_t row = lane < n ? order[begin + lane] : 0;
    const int32_t key = keys[row], next_key = __shfl_down_sync(ALL_LANES, key, 1);
    const bool continues = begin > 0 && keys[order[begin - 1]] == __shfl_sync(ALL_LANES, key, 0);
    // Bit i: a run, or its part in this group, ends with row i; and its sum is added to the gradient.
    const unsigned ends = __ballot_sync(ALL_LANES, lane == n - 1 || key != next_key);
    const unsigned adds = continues ? ends & (ends - 1) : ends;

    const int64_t c = (int64_t(blockIdx.y) * WARP + lane) * PACK;
    const bool inside = c < dout.cols;
    Floats sum = {};
    constexpr int ahead = 4;  // rows that are fetched together
    for (int begin_row = 0; begin_row < n; begin_row += ahead) {
        Floats d[ahead], before[ahead];
        float* to[ahead];
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            const int i = begin_row + j;  // from n on: row 0, fetched for nothing
            const int32_t row_i = __shfl_sync(ALL_LANES, row, i), key_i = __shfl_sync(ALL_LANES, key, i);
            const bool add = adds >> i & 1;
            to[j] = (add ? gradient.row(key_i) : partial + group * dout.cols) + c;
            d[j] = before[j] = Floats{};
            if (inside) d[j] = load(dout.row(row_i) + c);
            if (inside && add) before[j] = load(to[j]);
        }
#pragma unroll
        for (int j = 0; j < ahead; j++) {
#pragma unroll
            for (int k = 0; k < PACK; k++) sum[k] += d[j][k];
            if (ends >> (begin_row + j) & 1) {
#pragma unroll
                for (int k = 0; k < PACK; k++) before[j][k] += sum[k];
                if (inside) store(to[j], before[j]);
                sum = Floats{};
            }
        }
    }
}

// The same warps; nearly all of them end at once.
__global__ void encoder_backward_long_runs(Matrix<float> gradient /*[K, C] +=*/, const float* partial /*[groups, C]*/,
                                           int64_t N, int64_t C, const int32_t* keys /*[N]*/,
                                           const int32_t* order /*[N]*/) {
    const int lane = int(threadIdx.x) % WARP;
    const int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / WARP, begin = group * WARP;
    if (begin + WARP >= N) return;
    const int32_t key = keys[order[begin + WARP]];
    if (keys[order[begin + WARP - 1]] != key) return;        // no run goes on into the next group
    if (begin > 0 && keys[order[begin - 1]] == key) return;  // it began in an earlier group
    // The run has the first rows of groups group + 1 .. end - 1.
    int64_t end = group + 1;
    for (unsigned in_run = ALL_LANES; in_run == ALL_LANES;) {
        const int64_t first = (end + lane) * WARP;
        in_run = __ballot_sync(ALL_LANES, first < N && keys[order[first]] == key);
        end += __popc(in_run);
    }
    const int64_t c = (int64_t(blockIdx.y) * WARP + lane) * PACK;
    if (c >= C) return;
    Floats sum = {};
#pragma unroll 4
    for (int64_t g = group + 1; g < end; g++) {
        const Floats x = load(partial + g * C + c);
#pragma unroll
        for (int k = 0; k < PACK; k++) sum[k] += x[k];
    }
    Floats total = load(gradient.row(key) + c);
#pragma unroll
    for (int k = 0; k < PACK; k++) total[k] += sum[k];
    store(gradient.row(key) + c, total);
}

inline size_t encoder_backward_scratch_bytes(int64_t N, int64_t C) {
    return size_t(ceil_div(N, WARP) * C) * sizeof(float);
}

inline void encoder_backward(const Device& device, Matrix<floatS> dwte /*[Vp, C] +=*/,
                             Matrix<floatS> dwpe /*[T, C] +=*/, Matrix<const floatR> dout /*[N, C]*/,
                             const TokenRows& rows) {
    constexpr int threads = 128;
    const int64_t N = dout.rows, C = dout.cols, groups = ceil_div(N, WARP);
    float* partial = device.scratch_as<float>(size_t(groups * C));  // [groups, C]
    const dim3 blocks(unsigned(ceil_div(groups, threads / WARP)), unsigned(ceil_div(C, WARP * PACK)));
    const auto add_rows = [&](Matrix<float> gradient, const int32_t* keys, const int32_t* order) {
        launch(encoder_backward_groups, blocks, threads, 0, device.stream, gradient, partial, dout, keys, order);
        launch(encoder_backward_long_runs, blocks, threads, 0, device.stream, gradient, partial, N, C, keys, order);
    };
    add_rows(dwte, rows.tokens, rows.by_token);
    add_rows(dwpe, rows.positions, rows.by_position);
}

#endif
