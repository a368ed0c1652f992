// GELU in the tanh form of GPT-2, and its derivative, as the epilogues of the MLP's matrix products apply them.
//
//   gelu(x) = 0.5 x (1 + tanh(u)) = x s(2u),   u = sqrt(2/pi) (x + 0.044715 x^3),   s(y) = 1 / (1 + exp(-y))
//   gelu'(x) = s(2u) + x s(2u) s(-2u) (2u)'
//
// Double uses the first form and std::tanh. Float uses the second, which has no cancellation and needs one exponential
// and one division; it is free of branches and calls, so that loops over it vectorise at whatever width they are
// compiled for. Kernels call it, too.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "llmc/common.h"

constexpr double GELU_SCALE = 0.79788456080286535588;  // sqrt(2/pi)
constexpr double GELU_CUBIC = 0.044715;

inline double gelu_value(double x) { return 0.5 * x * (1 + std::tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))); }

inline double gelu_gradient(double x) {
    const double t = std::tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x);
}

// exp(x) to 1e-7, |x| held below 87 (on its bits: g++ turns a comparison of floats into branches and splits the loop).
// x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits, from
// where a shift carries it into the exponent of 2^n. A GPU has an instruction for 2^r, which its expf() uses.
[[gnu::always_inline]] HOST_DEVICE inline float gelu_exp(float x) {
#ifdef __CUDA_ARCH__
    return expf(fminf(fmaxf(x, -87.f), 87.f));
#else
    const int32_t bits = std::bit_cast<int32_t>(x), sign = bits & int32_t(0x80000000);
    x = std::bit_cast<float>(std::min(bits ^ sign, std::bit_cast<int32_t>(87.f)) | sign);
    const float shifted = x * 1.44269504f + 12582912.f;
    const float n = shifted - 12582912.f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float scale = std::bit_cast<float>((std::bit_cast<int32_t>(shifted) << 23) + 0x3f800000);
    return (p * r * r + r + 1.f) * scale;
#endif
}

// a / b for b from 1 to 2^126.
[[gnu::always_inline]] HOST_DEVICE inline float gelu_ratio(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdividef(a, b);  // to 2 units in the last place, in two instructions
#else
    return a / b;
#endif
}

[[gnu::always_inline]] HOST_DEVICE inline float gelu_value(float x) {
    const float y = x * (float(2 * GELU_SCALE) + float(2 * GELU_SCALE * GELU_CUBIC) * x * x);
    return gelu_ratio(x, 1.f + gelu_exp(-y));
}

[[gnu::always_inline]] HOST_DEVICE inline float gelu_gradient(float x) {
    const float xx = x * x;
    const float y = x * (float(2 * GELU_SCALE) + float(2 * GELU_SCALE * GELU_CUBIC) * xx);
    const float slope = float(2 * GELU_SCALE) + float(6 * GELU_SCALE * GELU_CUBIC) * xx;
    const float e = gelu_exp(-y), s = gelu_ratio(1.f, 1.f + e);
    return s + x * slope * (s * (e * s));
}
