// Moving numbers: zero, copy with conversion between storage types, accumulate. Rows may be longer than they are used
// (stride > cols), so all forms take matrix views; one flat array is the view [1, n].
#pragma once

#include "llmc/device.h"
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
template <class T>
void fill_zero(const Device& device, T* to /*[n]*/, int64_t n) {
    fill_zero(device, Matrix<T>(to, 1, n));
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
