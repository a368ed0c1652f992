// What this machine can do at best, measured: on the CPU arithmetic by loops that touch registers only and memory by
// the STREAM triad, on a GPU a large product and a copy. The MFU of a step, `doctor` and the benchmarks divide by
// these. Each takes about 0.2 s.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

// Of several measurements the one in the middle.
inline double median(std::vector<double> values) {
    if (values.empty()) return NAN;
    const auto middle = values.begin() + ptrdiff_t(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

#ifndef USE_CUDA
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <memory>

#include "llmc/kernels/matmul_micro.h"

// Each runs `count` rounds on one core and returns the floating-point operations done (an FMA counts as two).
template <class V>
[[gnu::always_inline]] inline void keep_in_register(V& v) {
    __asm__ volatile("" : "+v"(v));
}

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

// All threads run work(thread) -> operations over and over, at the same time; the sum of each thread's best rate, in
// 1e9 operations a second. A thread that another program pushed aside for a while spoils only its own runs.
template <class Work>
double best_rate(int threads, Work work, double seconds = 0.2) {
    using Clock = std::chrono::steady_clock;
    const auto since = [](Clock::time_point start) {
        return std::chrono::duration<double>(Clock::now() - start).count();
    };
    double sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
    for (int t = 0; t < threads; t++) {
        double best = 0;
        const auto begin = Clock::now();
        do {
            const auto start = Clock::now();
            const double operations = work(t);
            best = std::max(best, operations / since(start));
        } while (since(begin) < seconds);
        sum += best;
    }
    return sum * 1e-9;
}

// GFLOP/s of fp32 fused multiply-adds in the widest registers.
inline double measure_fp32_peak(int threads, Isa isa = cpu_isa(), double seconds = 0.2) {
    const auto rounds = isa >= Isa::avx512 ? fma_rounds_avx512 : fma_rounds_avx2;
    return best_rate(
        threads, [=](int) { return rounds(100000); }, seconds);
}

// GFLOP/s of bf16 products summed in fp32: AMX tiles, vdpbf16ps, or widened to fp32, whichever is fastest.
inline double measure_bf16_peak(int threads, Isa isa = cpu_isa(), double seconds = 0.2) {
    if (isa == Isa::amx)
        return best_rate(
            threads, [](int) { return bf16_rounds_amx(20000); }, seconds);
    const double widened = measure_fp32_peak(threads, isa, seconds / 2);
    if (isa < Isa::avx512_bf16) return widened;
    return std::max(widened, best_rate(
                                 threads, [](int) { return bf16_rounds_avx512(100000); }, seconds / 2));
}

// GB/s of a[i] = b[i] + s c[i] over 3 x 64 MiB in huge pages, counting each array once.
inline double measure_bandwidth(int threads) {
    constexpr int64_t size = 16 << 20, bytes = size * sizeof(float);
    const std::unique_ptr<float, decltype(&std::free)> memory(
        static_cast<float*>(std::aligned_alloc(2 << 20, 3 * bytes)), std::free);
    float *a = memory.get(), *b = a + size, *c = b + size;
    if (!a) return 0;
#ifdef MADV_HUGEPAGE
    madvise(a, 3 * bytes, MADV_HUGEPAGE);
#endif
    const auto triad = [=](int t) {
        const int64_t begin = size * t / threads, end = size * (t + 1) / threads;
        for (int64_t i = begin; i < end; i++) a[i] = b[i] + 0.5f * c[i];
        return 3.0 * sizeof(float) * double(end - begin);
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++)
        for (int64_t i = size * t / threads; i < size * (t + 1) / threads; i++) a[i] = b[i] = c[i] = 1;
    return best_rate(threads, triad);
}

// GFLOP/s of products in this build's precision, by so many threads.
inline double measure_matrix_peak(int threads) {
    return std::is_same_v<floatX, bf16> ? measure_bf16_peak(threads) : measure_fp32_peak(threads);
}

#else
#include "llmc/kernels/matmul.cuh"
#include "llmc/kernels/random.h"

// GFLOP/s of a large product of random numbers (zeros run faster, at a higher clock).
inline double measure_matrix_peak(int threads) {
#ifdef __CUDACC__
    constexpr int64_t n = 8192;
#else
    constexpr int64_t n = 64;  // played by the host (cuda_on_host), whose rate says nothing
#endif
    OpenDevice opened(threads);
    const DeviceMemory<std::byte> scratch(int64_t(matmul_scratch_bytes(threads)));
    Device device = opened.device;
    device.scratch = scratch.data();
    device.scratch_bytes = size_t(scratch.size());
    const DeviceMemory<floatX> a(n * n), b(n * n), c(n * n);
    std::vector<floatX> values(static_cast<size_t>(n * 64));
    for (size_t i = 0; i < values.size(); i++) values[i] = floatX(float(uniform(1, 2, i)) - 0.5f);
    for (const DeviceMemory<floatX>* m : {&a, &b})
        for (int64_t row = 0; row < n; row += 64) upload(device, m->data() + row * n, values.data(), 64 * n);
    return 2e-9 * double(n * n * n) / best_seconds_on_gpu(device.stream, 10, [&] {
               matmul_forward(device, {c.data(), n, n}, {a.data(), n, n}, {b.data(), n, n}, nullptr);
           });
}

// GB/s of a copy within the GPU's memory, counting what is read and what is written.
inline double measure_bandwidth(int threads) {
    constexpr int64_t bytes = int64_t(1) << 30;
    OpenDevice opened(threads);
    const DeviceMemory<std::byte> from(bytes), to(bytes);
    return 2e-9 * double(bytes) / best_seconds_on_gpu(opened.device.stream, 10, [&] {
               CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), size_t(bytes), cudaMemcpyDeviceToDevice,
                                          opened.device.stream));
           });
}
#endif
