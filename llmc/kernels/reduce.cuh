// Reductions over flat arrays: the gradient norm, the sum of losses, the search for values that are not finite.
// Sums run in double over a fixed number of blocks that are added in order: the bits do not depend on the threads.
#pragma once

#include <limits>

#include "llmc/device.h"
#include "llmc/kernels/simd.h"

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

inline double sum(const Device& device, const floatS* x /*[n]*/, int64_t n) {
    return sum_of_terms(device, x, n, [](double value) WIDE { return value; });
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

template <class T>
bool all_finite(const Device& device, const T* x /*[n]*/, int64_t n) {
    return first_nonfinite(device, x, n) < 0;
}
