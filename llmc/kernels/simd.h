// What row-wise kernels share to run at the speed of memory: conversions, sums and exponentials in forms that g++
// vectorises, and one body compiled for AVX2 and for AVX-512.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "llmc/common.h"
#include "llmc/cpu.h"

// run_widest(body) runs a lambda marked WIDE in the widest form this CPU has. WIDE code is inlined into both functions
// and so compiled twice; it must not contain OpenMP regions, which g++ cuts out before it inlines.
#define WIDE __attribute__((always_inline))

template <class Body>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")]] void run_avx512(const Body& body) {
    body();
}
template <class Body>
void run_widest(const Body& body) {
    if (cpu_isa() >= Isa::avx512) run_avx512(body);
    else body();
}

// to = value, rounded to T. The bits of a bf16 are written as an integer because g++ 12 vectorises that, but not the
// assignment of a class.
template <class T, class V>
WIDE inline void assign(T& to, V value) {
    to = T(value);
}
WIDE inline void assign(bf16& to, float value) { to.bits = bf16(value).bits; }

// Combines term(begin) .. term(end - 1) in 32 interleaved lanes, then the lanes in pairs: independent chains for the
// arithmetic units, and sums whose error grows with (end - begin) / 32.
template <class T, class Term, class Combine>
WIDE inline T reduce_in_lanes(int64_t begin, int64_t end, T neutral, const Term& term, const Combine& combine) {
    constexpr int64_t width = 32;
    T lanes[width];
    for (T& lane : lanes) lane = neutral;
    int64_t i = begin;
    for (; i + width <= end; i += width)
#pragma omp simd
        for (int64_t lane = 0; lane < width; lane++) lanes[lane] = combine(lanes[lane], T(term(i + lane)));
    for (int64_t lane = 0; i < end; i++, lane++) lanes[lane] = combine(lanes[lane], T(term(i)));
#pragma GCC unroll 5
    for (int64_t half = width / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; lane++) lanes[lane] = combine(lanes[lane], lanes[lane + half]);
    return lanes[0];
}
template <class T, class Term>
WIDE inline T sum_in_lanes(int64_t begin, int64_t end, const Term& term) {
    return reduce_in_lanes(begin, end, T(0), term, [](T a, T b) WIDE { return a + b; });
}
// Passes over NaN.
template <class T, class Term>
WIDE inline T max_in_lanes(int64_t begin, int64_t end, const Term& term) {
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    return reduce_in_lanes(begin, end, lowest, term, [](T a, T b) WIDE { return b > a ? b : a; });
}

inline double exp_nonpositive(double x) { return std::exp(x); }

// e^x for x <= 0, relative error 1e-7, exactly 1 at 0, 0 below -87, NaN for NaN, without branches.
// x log2(e) = n + f with n an integer and |f| <= 1/2; 2^f by a minimax polynomial, times 2^n by adding n to the
// exponent.
WIDE inline float exp_nonpositive(float x) {
    constexpr float log2e = 1.44269502f, log2e_rest = 1.92596303e-8f;
    constexpr float shift = 0x1.8p23f;  // adding it rounds to an integer, which then stands in the lowest bits
    const float shifted = x * log2e + shift, n = shifted - shift;
    const float f = x * log2e_rest + std::fma(x, log2e, -n);  // the product must not be rounded before n is taken off
    float p = 1.55946764e-4f;
    p = p * f + 1.34066434e-3f;
    p = p * f + 9.61769279e-3f;
    p = p * f + 5.55031039e-2f;
    p = p * f + 2.40226522e-1f;
    p = p * f + 6.93147242e-1f;
    p = p * f + 1.0f;
    const uint32_t bits = std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23);
    const uint32_t keep = -uint32_t(!(x < -87.0f));
    return std::bit_cast<float>(bits & keep);
}
