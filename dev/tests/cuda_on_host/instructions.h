// Instructions of CUDA's device code where kernels run on the host: barriers, those that the lanes of a warp execute
// together, atomics, reinterpretations, fast mathematics, and the tensor-core and copy instructions that llmc/cuda.h
// names. One block runs at a time in a host thread, and one of its threads at a time: atomics are plain code.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "block.h"

// ---------------------------------------------------------------------------------------------------------------------
// Barriers, and exchanges within a warp.

using CallerLocation = std::source_location;

inline void __syncthreads(CallerLocation caller = CallerLocation::current()) {
    cuda_on_host::Runner::of_this_thread().barrier({"__syncthreads", caller});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_on_host {

// All lanes take part in whatever a warp does together, which the kernels here rely on.
template <class Out, class In, class Exchange>
Out warp_together(const char* instruction, unsigned mask, CallerLocation caller, const In& in,
                  const Exchange& exchange) {
    const Place place{instruction, caller};
    if (mask != 0xffffffffu) stop("a mask that leaves lanes out in " + place.text() + "; give all 32");
    return Runner::of_this_thread().warp_together<Out>(place, in, exchange);
}

// Each lane gets the value of the lane that source(own lane) names, its own where that lane is outside of the warp.
template <class T>
T shuffle(const char* instruction, unsigned mask, CallerLocation caller, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles values of 32 or 64 bits");
    struct In {
        T value;
        int source;
    };
    const int lane = int(threadIdx.x % warpSize);
    return warp_together<T>(instruction, mask, caller, In{value, source < 0 || source >= warpSize ? lane : source},
                            [](const In* const(&in)[warpSize], T* const(&out)[warpSize]) {
                                for (int l = 0; l < warpSize; l++) *out[l] = in[in[l]->source]->value;
                            });
}

inline unsigned ballot(const char* instruction, unsigned mask, CallerLocation caller, bool predicate) {
    return warp_together<unsigned>(instruction, mask, caller, predicate,
                                   [](const bool* const(&in)[warpSize], unsigned* const(&out)[warpSize]) {
                                       unsigned bits = 0;
                                       for (int l = 0; l < warpSize; l++) bits |= unsigned(*in[l]) << l;
                                       for (unsigned* o : out) *o = bits;
                                   });
}

}  // namespace cuda_on_host

inline void __syncwarp(unsigned mask = 0xffffffffu, CallerLocation caller = CallerLocation::current()) {
    cuda_on_host::ballot("__syncwarp", mask, caller, true);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::shuffle("__shfl_sync", mask, caller, value, lane & (warpSize - 1));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::shuffle("__shfl_xor_sync", mask, caller, value, int(threadIdx.x % warpSize) ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::shuffle("__shfl_up_sync", mask, caller, value, int(threadIdx.x % warpSize) - int(delta));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::shuffle("__shfl_down_sync", mask, caller, value, int(threadIdx.x % warpSize) + int(delta));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::ballot("__ballot_sync", mask, caller, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::ballot("__any_sync", mask, caller, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CallerLocation caller = CallerLocation::current()) {
    return cuda_on_host::ballot("__all_sync", mask, caller, predicate != 0) == 0xffffffffu;
}

// ---------------------------------------------------------------------------------------------------------------------
// Atomics return what was there before.

namespace cuda_on_host {
template <class T>
concept AtomicInteger = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <class T>
concept AtomicNumber = AtomicInteger<T> || std::is_same_v<T, float> || std::is_same_v<T, double>;
}  // namespace cuda_on_host

template <cuda_on_host::AtomicNumber T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
    return std::exchange(*at, T(*at + value));
}
template <cuda_on_host::AtomicInteger T>
T atomicMin(T* at, std::type_identity_t<T> value) {
    return std::exchange(*at, std::min(*at, value));
}
template <cuda_on_host::AtomicInteger T>
T atomicMax(T* at, std::type_identity_t<T> value) {
    return std::exchange(*at, std::max(*at, value));
}
template <cuda_on_host::AtomicInteger T>
T atomicExch(T* at, std::type_identity_t<T> value) {
    return std::exchange(*at, value);
}
template <cuda_on_host::AtomicInteger T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return std::exchange(*at, *at == expected ? value : *at);
}

// ---------------------------------------------------------------------------------------------------------------------
// Loads, bits and mathematics.

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
inline int __ffs(int bits) { return bits ? std::countr_zero(unsigned(bits)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }

template <class T>
requires std::is_arithmetic_v<T>
constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T>
requires std::is_arithmetic_v<T>
constexpr T max(T a, T b) { return a < b ? b : a; }

// ---------------------------------------------------------------------------------------------------------------------
// What llmc/cuda.h names: products of tensor cores, and copies from global to shared memory beside the arithmetic. The
// layouts are those of the PTX manual, "Warp-level matrix instructions".

// Row and column of element i of a lane's fragment of a, b and d (the accumulator) in m16n8k16.
namespace cuda_on_host {
struct Element {
    int row, col;
};
inline Element mma_a(int lane, int i) { return {lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8}; }
inline Element mma_b(int lane, int i) { return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4}; }
inline Element mma_d(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

inline float bf16_of(const uint32_t* pairs, int i) {
    return __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
}
}  // namespace cuda_on_host

// d[16, 8] += a[16, 16] b[16, 8], a and b in bf16
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         CallerLocation caller = CallerLocation::current()) {
    using namespace cuda_on_host;
    struct In {
        const float* d;
        const uint32_t *a, *b;
    };
    struct Out {
        float d[4];
    };
    const Out out = warp_together<Out>("mma_m16n8k16", 0xffffffffu, caller, In{d, a, b},
                                       [](const In* const(&in)[warpSize], Out* const(&out)[warpSize]) {
                                           float left[16][16], right[16][8];
                                           for (int l = 0; l < warpSize; l++) {
                                               for (int i = 0; i < 8; i++)
                                                   left[mma_a(l, i).row][mma_a(l, i).col] = bf16_of(in[l]->a, i);
                                               for (int i = 0; i < 4; i++)
                                                   right[mma_b(l, i).row][mma_b(l, i).col] = bf16_of(in[l]->b, i);
                                           }
                                           for (int l = 0; l < warpSize; l++)
                                               for (int i = 0; i < 4; i++) {
                                                   double sum = in[l]->d[i];
                                                   for (int k = 0; k < 16; k++)
                                                       sum +=
                                                           double(left[mma_d(l, i).row][k]) * right[k][mma_d(l, i).col];
                                                   out[l]->d[i] = float(sum);
                                               }
                                       });
    for (int i = 0; i < 4; i++) d[i] = out.d[i];
}

namespace cuda_on_host {
// Lane l names row l % 8 of the 8 x 8 matrix l / 8; element i of r[m] is (l / 4, 2 (l % 4) + i) of matrix m, or of its
// transpose.
inline void load_matrices(const char* instruction, CallerLocation caller, uint32_t (&r)[4], const void* shared_row,
                          bool transposed) {
    struct Out {
        uint32_t r[4];
    };
    if (uintptr_t(shared_row) % 16) stop(std::string(instruction) + " from an address that is not 16-byte aligned");
    const Out out =
        warp_together<Out>(instruction, 0xffffffffu, caller, static_cast<const uint16_t*>(shared_row),
                           [&](const uint16_t* const* const(&rows)[warpSize], Out* const(&out)[warpSize]) {
                               for (int l = 0; l < warpSize; l++)
                                   for (int m = 0; m < 4; m++) {
                                       uint32_t pair[2];
                                       for (int i = 0; i < 2; i++) {
                                           const int row = l / 4, col = l % 4 * 2 + i;
                                           pair[i] = transposed ? (*rows[m * 8 + col])[row] : (*rows[m * 8 + row])[col];
                                       }
                                       out[l]->r[m] = pair[0] | pair[1] << 16;
                                   }
                           });
    for (int m = 0; m < 4; m++) r[m] = out.r[m];
}
}  // namespace cuda_on_host

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, CallerLocation caller = CallerLocation::current()) {
    cuda_on_host::load_matrices("ldmatrix_x4", caller, r, shared_row, false);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row,
                                   CallerLocation caller = CallerLocation::current()) {
    cuda_on_host::load_matrices("ldmatrix_x4_transposed", caller, r, shared_row, true);
}

// Until the copy is waited for, its target is NaN: whoever still reads what was there, or reads too early, is found.
inline void cp_async_16(void* shared, const void* global, bool valid) {
    cuda_on_host::AsyncCopy copy{shared, {}};
    if (uintptr_t(shared) % 16 || (valid && uintptr_t(global) % 16))
        cuda_on_host::stop("cp_async_16 with an address that is not 16-byte aligned");
    if (valid) std::memcpy(copy.bytes, global, 16);
    std::memset(shared, 0xff, 16);
    cuda_on_host::Runner::of_this_thread().fiber().copies.back().push_back(copy);
}
inline void cp_async_commit() { cuda_on_host::Runner::of_this_thread().fiber().copies.emplace_back(); }
// Waits for all groups of this thread but the last n that it committed.
template <int n>
void cp_async_wait() {
    auto& groups = cuda_on_host::Runner::of_this_thread().fiber().copies;
    while (groups.size() > n + 1) {
        for (const cuda_on_host::AsyncCopy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
        groups.erase(groups.begin());
    }
}
