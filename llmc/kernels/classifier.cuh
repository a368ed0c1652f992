// Softmax and cross entropy of each row of logits x against its target t, with the gradient in the same pass:
//
//   top = max x      total = sum exp(x - top)      loss = ln(total) - (x[t] - top)
//   dx  = (exp(x - top) / total - [j == t]) dloss
//
// The gradient overwrites the logits. Exponentials are computed twice instead of being stored: that costs less than
// the memory traffic, and in bf16 stored ones would be rounded once more.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "llmc/kernels/copy.cuh"

inline double exp_nonpositive(double x) { return std::exp(x); }

// e^x for x <= 0, relative error 1e-7, 0 below -87, NaN for NaN; straight-line code that g++ vectorises.
// x = n ln 2 + r with |r| <= ln(2) / 2; e^r by Cephes' minimax polynomial, 2^n by writing n into the exponent.
inline float exp_nonpositive(float x) {
    constexpr float shift = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the lowest bits
    const float shifted = x * 1.44269504f + shift, n = shifted - shift;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1;
    const float power = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) + 127) << 23);
    const int32_t keep = -int32_t(!(x < -87.0f));
    return std::bit_cast<float>(std::bit_cast<int32_t>(p * power) & keep);
}

// total for one row, in blocks of 1024 so that rounding does not grow with the vocabulary
inline double sum_of_exponentials(const floatX* x /*[V]*/, int64_t V, floatS top) {
    double total = 0;
    for (int64_t begin = 0; begin < V; begin += 1024) {
        const int64_t end = std::min(V, begin + 1024);
        floatS block = 0;
#pragma omp simd reduction(+ : block)
        for (int64_t j = begin; j < end; j++) block += exp_nonpositive(floatS(x[j]) - top);
        total += block;
    }
    return total;
}

// Target -1 marks a row to ignore: loss and gradient are 0. The gradient of the padded columns V..Vp-1 is 0.
inline void classifier_forward_backward(const Device& device, floatS* losses /*[n]*/,
                                        Matrix<floatX> logits /*[n, Vp] in: logits, out: gradient if wanted*/,
                                        const int32_t* targets /*[n]*/, int64_t V, floatS dloss, bool want_gradient) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < logits.rows; i++) {
        floatX* x = logits.row(i);
        const int32_t target = targets[i];
        if (target < 0) {
            losses[i] = 0;
            if (want_gradient) std::fill(x, x + logits.cols, floatX(0));
            continue;
        }
        floatS top = -std::numeric_limits<floatS>::infinity();
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < V; j++) top = floatS(x[j]) > top ? floatS(x[j]) : top;
        const double total = sum_of_exponentials(x, V, top);
        const floatS at_target = floatS(x[target]) - top;
        losses[i] = floatS(std::log(total) - at_target);
        if (!want_gradient) continue;

        const floatS scale = floatS(dloss / total);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) assign(x[j], exp_nonpositive(floatS(x[j]) - top) * scale);
        x[target] = floatX(exp_nonpositive(at_target) * scale - dloss);
        std::fill(x + V, x + logits.cols, floatX(0));
    }
}
