// Moving numbers: zero, copy with conversion between storage types, accumulate. Rows may be longer than they are used
// (stride > cols), so all forms take matrix views; one flat array is the view [1, n].
#pragma once

#include "llmc/device.h"

#ifndef USE_CUDA

#include "llmc/kernels/simd.h"

// Calls piece(row, begin, end) for pieces of at most 4096 columns that cover [rows, cols], in parallel.
template <class Piece>
void for_each_piece(const Device& device, int64_t rows, int64_t cols, const Piece& piece) {
    constexpr int64_t width = 4096;
#pragma omp parallel for collapse(2) num_threads(device.threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t begin = 0; begin < cols; begin += width) piece(row, begin, std::min(begin + width, cols));
}

template <class T>
void fill_zero(const Device& device, Matrix<T> to /*[rows, cols]*/) {
    for_each_piece(device, to.rows, to.cols, [&](int64_t row, int64_t begin, int64_t end) {
        std::memset(static_cast<void*>(to.row(row) + begin), 0, size_t(end - begin) * sizeof(T));
    });
}

// to = from
template <class T, class U>
void copy_rows(const Device& device, Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    for_each_piece(device, to.rows, to.cols, [&](int64_t row, int64_t begin, int64_t end) {
        T* t = to.row(row);
        const U* f = from.row(row);
#pragma omp simd
        for (int64_t i = begin; i < end; i++) assign(t[i], f[i]);
    });
}

// to += from
template <class T, class U>
void add_rows(const Device& device, Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    for_each_piece(device, to.rows, to.cols, [&](int64_t row, int64_t begin, int64_t end) {
        T* t = to.row(row);
        const U* f = from.row(row);
#pragma omp simd
        for (int64_t i = begin; i < end; i++) assign(t[i], t[i] + f[i]);
    });
}

#else

// to = from, or to += from, WIDTH columns a thread: 8 where rows are 16-byte aligned, otherwise 1.
template <bool ADD, int WIDTH, class T, class U>
__global__ void convert_rows_kernel(Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x * WIDTH;
    for (int64_t row = blockIdx.y; row < to.rows; row += gridDim.y)
        for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * WIDTH; i < to.cols; i += step) {
            T* t = to.row(row) + i;
            const U* f = from.row(row) + i;
            if constexpr (WIDTH == PACK) {
                Floats x = load(f);
                if constexpr (ADD) {
                    const Floats sum = load(t);
#pragma unroll
                    for (int k = 0; k < PACK; k++) x[k] += sum[k];
                }
                store(t, x);
            } else {
                *t = T(ADD ? float(*t) + float(*f) : float(*f));
            }
        }
}

template <bool ADD, class T, class U>
void convert_rows(const Device& device, Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    const int64_t n = to.size();
    if (n == 0) return;
    if (to.stride == to.cols && from.stride == from.cols) to = {to.data, 1, n}, from = {from.data, 1, n};
    const auto aligned = [](const auto& m) {
        return uintptr_t(m.data) % 16 == 0 && m.cols % PACK == 0 && (m.rows == 1 || m.stride % PACK == 0);
    };
    const bool packs = aligned(to) && aligned(from);
    const int64_t per_row = packs ? to.cols / PACK : to.cols;
    const int64_t threads = std::min<int64_t>(256, round_up(per_row, WARP));
    // At most as many blocks as the GPU holds at a time, twice: the others would only cost their start.
    const int64_t most = 4096 / threads * device.multiprocessors, across = std::min(ceil_div(per_row, threads), most);
    const int64_t down = std::min({to.rows, ceil_div(most, across), int64_t(65535)});
    launch(packs ? convert_rows_kernel<ADD, PACK, T, U> : convert_rows_kernel<ADD, 1, T, U>,
           dim3(unsigned(across), unsigned(down)), int(threads), 0, device.stream, to, from);
}

template <class T>
void fill_zero(const Device& device, Matrix<T> to /*[rows, cols]*/) {
    if (to.size() == 0) return;
    if (to.rows == 1 || to.stride == to.cols)
        CUDA_CHECK(cudaMemsetAsync(to.data, 0, size_t(to.size()) * sizeof(T), device.stream));
    else
        CUDA_CHECK(cudaMemset2DAsync(to.data, size_t(to.stride) * sizeof(T), 0, size_t(to.cols) * sizeof(T),
                                     size_t(to.rows), device.stream));
}

// to = from
template <class T, class U>
void copy_rows(const Device& device, Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    convert_rows<false>(device, to, from);
}

// to += from
template <class T, class U>
void add_rows(const Device& device, Matrix<T> to /*[rows, cols]*/, Matrix<U> from /*[rows, cols]*/) {
    convert_rows<true>(device, to, from);
}

#endif

template <class T>
void fill_zero(const Device& device, T* to /*[n]*/, int64_t n) {
    fill_zero(device, Matrix<T>(to, 1, n));
}
