// Reductions over flat arrays: the gradient norm, the sum of losses, the search for values that are not finite.
// Sums run in double over a number of blocks that follows from n alone, and these are added in a fixed order: the bits
// do not depend on the threads.
#pragma once

#include <limits>

#include "llmc/device.h"

#ifndef USE_CUDA

#include "llmc/kernels/simd.h"

inline size_t reduce_scratch_bytes() { return 0; }

template <class Term>
double sum_of_terms(const Device& device, const floatS* x /*[n]*/, int64_t n, const Term& term) {
    constexpr int64_t blocks = 256, piece = 4096;
    const int64_t length = round_up(ceil_div(n, blocks), 64);
    double partial[blocks] = {};
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t block_end = std::min(n, (b + 1) * length);
        for (int64_t begin = b * length; begin < block_end; begin += piece) {
            const int64_t end = std::min(block_end, begin + piece);
            // The prefetchers of the CPU stop at every page; asking for the next piece makes this 1.3 times as fast.
            for (int64_t i = end; i < end + piece; i += 64 / sizeof(floatS)) __builtin_prefetch(x + i, 0, 2);
            run_widest([&]() WIDE {
                partial[b] += sum_in_lanes<double>(begin, end, [&](int64_t i) WIDE { return term(double(x[i])); });
            });
        }
    }
    double total = 0;
    for (double p : partial) total += p;
    return total;
}

// *total += the sum of x
inline void add_sum(const Device& device, double* total, const floatS* x /*[n]*/, int64_t n) {
    *total += sum_of_terms(device, x, n, [](double value) WIDE { return value; });
}

// Squares are taken in double: those of fp32 values overflow at 1.8e19 and vanish below 1e-23.
inline double sum_of_squares(const Device& device, const floatS* x /*[n]*/, int64_t n) {
    return sum_of_terms(device, x, n, [](double value) WIDE { return value * value; });
}

// Index of the first infinity or NaN in x, -1 if there is none. x - x is 0 exactly when x is finite.
template <class T>
int64_t first_nonfinite(const Device& device, const T* x /*[n]*/, int64_t n) {
    constexpr int64_t length = 4096, none = std::numeric_limits<int64_t>::max();
    int64_t first = none;
#pragma omp parallel for num_threads(device.threads) schedule(static) reduction(min : first)
    for (int64_t begin = 0; begin < n; begin += length) {
        if (first < begin) continue;
        const int64_t end = std::min(n, begin + length);
        int found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = begin; i < end; i++) found |= x[i] - x[i] != 0;
        for (int64_t i = begin; found && i < end && first == none; i++)
            if (x[i] - x[i] != 0) first = i;
    }
    return first == none ? -1 : first;
}

#else

constexpr int REDUCE_THREADS = 256, REDUCE_BLOCKS = 1024;  // as many as an H200 runs at a time

inline size_t reduce_scratch_bytes() { return (REDUCE_BLOCKS + 1) * sizeof(double); }

inline int64_t reduce_blocks(int64_t n) {
    return std::clamp<int64_t>(ceil_div(n, 4 * REDUCE_THREADS), 1, REDUCE_BLOCKS);
}

template <bool SQUARES>
__global__ void partial_sums_kernel(double* partial /*[blocks]*/, const float* x /*[n]*/, int64_t n) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    double sum = 0;
#pragma unroll 4
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        const double value = x[i];
        sum += SQUARES ? value * value : value;
    }
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: *total = before + the sum of the partial sums.
__global__ void total_kernel(double* total, const double* partial /*[blocks]*/, int blocks, bool add) {
    double sum = 0;
    for (int i = int(threadIdx.x); i < blocks; i += int(blockDim.x)) sum += partial[i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) *total = add ? *total + sum : sum;
}

// *total = the sum, or *total += it.
template <bool SQUARES>
void sum_on_device(const Device& device, double* total, const float* x /*[n]*/, int64_t n, bool add) {
    double* partial = device.scratch_as<double>(REDUCE_BLOCKS);
    const int64_t blocks = reduce_blocks(n);
    const size_t shared_bytes = REDUCE_THREADS / WARP * sizeof(double);
    launch(partial_sums_kernel<SQUARES>, dim3(unsigned(blocks)), REDUCE_THREADS, shared_bytes, device.stream, partial,
           x, n);
    launch(total_kernel, dim3(1), REDUCE_THREADS, shared_bytes, device.stream, total, partial, blocks, add);
}

// Column sums whose rows other blocks have left in memory: first[0, split) and second[0, cols - split) += the sum of
// the rows of `partial`, in an order that their number alone decides. A block has 16 columns, 16 neighbouring threads
// every 64th row.
constexpr int SUMMED_COLUMNS = 2 * PACK, ROW_SLICES = 64;

__global__ void add_row_sums_kernel(float* first, float* second, Matrix<const float> partial, int64_t split) {
    float* sums = shared_memory<float>();  // [ROW_SLICES, SUMMED_COLUMNS]
    const int slice = int(threadIdx.x) / SUMMED_COLUMNS;
    const int64_t column = int64_t(blockIdx.x) * SUMMED_COLUMNS + threadIdx.x % SUMMED_COLUMNS;
    float sum = 0;
    if (column < partial.cols)
#pragma unroll 4
        for (int64_t row = slice; row < partial.rows; row += ROW_SLICES) sum += partial.row(row)[column];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (slice > 0 || column >= partial.cols) return;
    for (int s = 1; s < ROW_SLICES; s++) sum += sums[s * SUMMED_COLUMNS + int(threadIdx.x)];
    *(column < split ? first + column : second + column - split) += sum;
}
inline void add_row_sums(const Device& device, float* first /*[split] +=*/, float* second /*[cols - split] +=*/,
                         Matrix<const float> partial /*[rows, cols]*/, int64_t split) {
    constexpr int threads = ROW_SLICES * SUMMED_COLUMNS;
    launch(add_row_sums_kernel, dim3(unsigned(ceil_div(partial.cols, SUMMED_COLUMNS))), threads,
           threads * sizeof(float), device.stream, first, second, partial, split);
}

// *total += the sum of x
inline void add_sum(const Device& device, double* total /*device*/, const floatS* x /*[n]*/, int64_t n) {
    sum_on_device<false>(device, total, x, n, true);
}

// Squares are taken in double, as above. Waits for the GPU.
inline double sum_of_squares(const Device& device, const floatS* x /*[n]*/, int64_t n) {
    double* total = device.scratch_as<double>(1, REDUCE_BLOCKS * sizeof(double));
    sum_on_device<true>(device, total, x, n, false);
    double sum;
    download(device, &sum, total, 1);
    return sum;
}

template <class T>
__global__ void first_nonfinite_kernel(unsigned long long* first, const T* x /*[n]*/, int64_t n) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 4
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step)
        if (const float value = x[i]; value - value != 0) {
            atomicMin(first, static_cast<unsigned long long>(i));
            return;
        }
}

// Index of the first infinity or NaN in x, -1 if there is none. Waits for the GPU.
template <class T>
int64_t first_nonfinite(const Device& device, const T* x /*[n]*/, int64_t n) {
    auto* first = device.scratch_as<unsigned long long>(1);
    CUDA_CHECK(cudaMemsetAsync(first, 0xff, sizeof *first, device.stream));  // the greatest index, and -1
    launch(first_nonfinite_kernel<T>, dim3(unsigned(reduce_blocks(n))), REDUCE_THREADS, 0, device.stream, first, x, n);
    unsigned long long index;
    download(device, &index, first, 1);
    return int64_t(index);
}

#endif
