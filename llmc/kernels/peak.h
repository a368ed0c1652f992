// What this machine can do at best, measured: arithmetic by loops that touch registers only, memory by the STREAM triad.
// The MFU of a step, `doctor` and the benchmarks divide by these. Each takes about 0.2 s.
#pragma once

#include <chrono>
#include <memory>

#include "llmc/kernels/matmul_micro.h"

// Each runs `count` rounds on one core and returns the floating-point operations done (an FMA counts as two).
template <class V> [[gnu::always_inline]] inline void keep_in_register(V& v) { __asm__ volatile("" : "+v"(v)); }

inline double fma_rounds_avx2(int64_t count) {
    __m256 sum[12] = {};
    __m256 x = _mm256_set1_ps(0.5f);
    for (int64_t n = 0; n < count; n++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) {
            sum[i] = _mm256_fmadd_ps(sum[i], x, x);
            keep_in_register(sum[i]);
        }
    return double(count) * 12 * 8 * 2;
}

TARGET_AVX512 inline double fma_rounds_avx512(int64_t count) {
    __m512 sum[24] = {};
    __m512 x = _mm512_set1_ps(0.5f);
    for (int64_t n = 0; n < count; n++)
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++) {
            sum[i] = _mm512_fmadd_ps(sum[i], x, x);
            keep_in_register(sum[i]);
        }
    return double(count) * 24 * 16 * 2;
}

TARGET_AVX512_BF16 inline double bf16_rounds_avx512(int64_t count) {
    __m512 sum[24] = {};
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f003f00);
    for (int64_t n = 0; n < count; n++)
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++) {
            sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
            keep_in_register(sum[i]);
        }
    return double(count) * 24 * 32 * 2;
}

TARGET_AMX inline double bf16_rounds_amx(int64_t count) {
    amx_begin();
    for (int64_t n = 0; n < count; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    amx_end();
    return double(count) * 4 * 16 * 16 * 32 * 2;
}

// The best of several short runs of work(thread) -> operations on all threads at once, in 1e9 operations a second.
template <class Work> double best_rate(int threads, Work work) {
    using Clock = std::chrono::steady_clock;
    double best = 0;
    const auto begin = Clock::now();
    do {
        double operations = 0;
        const auto start = Clock::now();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : operations)
        for (int t = 0; t < threads; t++) operations += work(t);
        best = std::max(best, operations / std::chrono::duration<double>(Clock::now() - start).count());
    } while (Clock::now() - begin < std::chrono::milliseconds(200));
    return best * 1e-9;
}

// GFLOP/s of fp32 fused multiply-adds in the widest registers.
inline double measure_fp32_peak(int threads, Isa isa = cpu_isa()) {
    const auto rounds = isa >= Isa::avx512 ? fma_rounds_avx512 : fma_rounds_avx2;
    return best_rate(threads, [=](int) { return rounds(100000); });
}

// GFLOP/s of bf16 products summed in fp32: AMX tiles, vdpbf16ps, or widened to fp32, whichever is fastest.
inline double measure_bf16_peak(int threads, Isa isa = cpu_isa()) {
    double best = measure_fp32_peak(threads, isa);
    if (isa >= Isa::avx512_bf16)
        best = std::max(best, best_rate(threads, [](int) { return bf16_rounds_avx512(100000); }));
    if (isa == Isa::amx) best = std::max(best, best_rate(threads, [](int) { return bf16_rounds_amx(20000); }));
    return best;
}

// GB/s of a[i] = b[i] + s c[i] over 3 x 64 MiB, counting each array once.
inline double measure_bandwidth(int threads) {
    constexpr int64_t size = 16 << 20;
    const std::unique_ptr<float[]> a(new float[size]), b(new float[size]), c(new float[size]);
    const auto range = [=](int t, int64_t& begin, int64_t& end) {
        begin = size * t / threads;
        end = size * (t + 1) / threads;
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++) {
        int64_t begin, end;
        range(t, begin, end);
        for (int64_t i = begin; i < end; i++) a[i] = b[i] = c[i] = 1;
    }
    return best_rate(threads, [&](int t) {
        int64_t begin, end;
        range(t, begin, end);
        for (int64_t i = begin; i < end; i++) a[i] = b[i] + 0.5f * c[i];
        return 3.0 * sizeof(float) * double(end - begin);
    });
}
