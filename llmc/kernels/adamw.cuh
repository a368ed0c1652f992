// AdamW (Loshchilov and Hutter 2019), as PyTorch computes it. With g the scaled gradient at step t = 1, 2, ...:
//
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Most updates are smaller than half the distance between two bf16 numbers, so that rounding to nearest would lose
// them. Either master weights keep w in fp32, or the new w is rounded stochastically: to one of the two bf16 around it,
// to either as often as keeps the mean at w.
#pragma once

#include <cmath>
#include <type_traits>

#include "llmc/device.h"
#include "llmc/kernels/random.h"
#ifndef USE_CUDA
#include "llmc/kernels/simd.h"
#endif

// Doubles, because 1 - beta2 of a beta2 rounded to fp32 is wrong by 1e-5.
struct AdamW {
    double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    int64_t step = 1;           // counted from 1
    double gradient_scale = 1;  // clipping factor, multiplied into every gradient
    uint64_t seed = 0;          // of stochastic rounding
};

// The factors of one step, and the update of one element.
struct AdamWStep {
    floatS keep, rate, root, beta1, rest1, beta2, rest2, eps, scale;

    AdamWStep(const AdamW& options, bool decay)
        : keep(floatS(decay ? 1 - options.lr * options.weight_decay : 1)),
          rate(floatS(options.lr / (1 - std::pow(options.beta1, double(options.step))))),
          root(floatS(1 / std::sqrt(1 - std::pow(options.beta2, double(options.step))))),
          beta1(floatS(options.beta1)),
          rest1(floatS(1 - options.beta1)),
          beta2(floatS(options.beta2)),
          rest2(floatS(1 - options.beta2)),
          eps(floatS(options.eps)),
          scale(floatS(options.gradient_scale)) {}

    HOST_DEVICE void update(floatS& weight, floatS& m, floatS& v, floatS gradient) const {
        const floatS g = gradient * scale;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * g * g;
        weight = keep * weight - rate * m / (std::sqrt(v) * root + eps);
    }
};

constexpr bool adamw_weights_are_master = std::is_same_v<floatX, floatS>;

// A tensor of the model with its state: arrays of n elements. Master weights carry the precision, and `weights` are
// their rounded copy, or the same array where the types agree. Without them (null) `weights` are read and rounded
// stochastically; the random bits depend on the seed, the index of the tensor, the step and the element alone.
struct AdamWTensor {
    floatX* weights;
    floatS* master;
    const floatS* gradients;
    floatS *m, *v;
    int64_t n;
    bool decay;
    int index = 0;      // in the model
    floatS center = 0;  // of `weights`, in which it is left out
};

// Number i / 4 has the bits of elements i to i + 3, 16 each, those of the first lowest.
inline CounterStream rounding_bits(const AdamWTensor& tensor, const AdamW& options) {
    return {hash_counter(options.seed, uint64_t(tensor.index), uint64_t(options.step)), 0};
}

// to = value, rounded away from zero if its lower 16 bits and `random`, which is uniform below 2^16, have a carry. A
// number of bf16 has none, an infinity neither: they stay, as does NaN.
HOST_DEVICE inline void assign_stochastically(bf16& to, float value, uint32_t random) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    to.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : ((u + random) >> 16));
}
HOST_DEVICE inline void assign_stochastically(floatS& to, floatS value, uint32_t) { to = value; }

#ifndef USE_CUDA

// The loops vectorise only under -fno-math-errno, since std::sqrt may set errno; they are twice as slow without.
inline void adamw_update(const Device& device, const AdamWTensor& tensor, const AdamW& options) {
    const AdamWStep step(options, tensor.decay);
    floatX* const weights = tensor.weights;
    floatS *const master = tensor.master, *const m = tensor.m, *const v = tensor.v;
    const floatS* const gradients = tensor.gradients;
    const floatS center = tensor.center;
    const int64_t n = tensor.n;
    if (master) {
#pragma omp parallel for simd num_threads(device.threads) schedule(simd : static)
        for (int64_t i = 0; i < n; i++) {
            step.update(master[i], m[i], v[i], gradients[i]);
            if constexpr (!adamw_weights_are_master) assign(weights[i], master[i] - center);
        }
        return;
    }
    constexpr int64_t block = 256;  // elements whose random bits are made at a time
    const CounterStream random = rounding_bits(tensor, options);
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t begin = 0; begin < n; begin += block) {
        uint64_t numbers[block / 4];
        uint16_t bits[block];
#pragma omp simd
        for (int64_t k = 0; k < block / 4; k++) numbers[k] = random[uint64_t(begin / 4 + k)];
        std::memcpy(bits, numbers, sizeof bits);  // the lowest first
        const int64_t end = std::min(begin + block, n);
#pragma omp simd
        for (int64_t i = begin; i < end; i++) {
            floatS weight = floatS(weights[i]) + center;
            step.update(weight, m[i], v[i], gradients[i]);
            assign_stochastically(weights[i], weight - center, bits[i - begin]);
        }
    }
}

#else

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 load4(const bf16* from) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    return make_float4(__uint_as_float(pairs.x << 16), __uint_as_float(pairs.x & 0xffff0000u),
                       __uint_as_float(pairs.y << 16), __uint_as_float(pairs.y & 0xffff0000u));
}
__device__ inline float4 plus(float4 a, float b) { return make_float4(a.x + b, a.y + b, a.z + b, a.w + b); }
__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

// Two values rounded stochastically, the first in the lower half and by the lower half of the random bits.
__device__ inline uint32_t stochastic_pair(float low, float high, uint32_t random) {
    bf16 pair[2];
    assign_stochastically(pair[0], low, random & 0xffffu);
    assign_stochastically(pair[1], high, random >> 16);
    return uint32_t(pair[0].bits) | uint32_t(pair[1].bits) << 16;
}

// A thread has 4 neighbouring elements, so that each array of floatS is read by whole 16 bytes and neighbours touch: 28
// bytes per element, 30 with weights in bf16, 24 with these alone.
template <bool MASTER>
__global__ void adamw_kernel(AdamWTensor t, AdamWStep step, CounterStream random) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, i = thread * 4;
    const uint64_t bits = MASTER ? 0 : random[uint64_t(thread)];
    if (i + 4 <= t.n) {
        const float4 g = load4(t.gradients + i);
        float4 w = MASTER ? load4(t.master + i) : plus(load4(t.weights + i), t.center), m = load4(t.m + i),
               v = load4(t.v + i);
        step.update(w.x, m.x, v.x, g.x);
        step.update(w.y, m.y, v.y, g.y);
        step.update(w.z, m.z, v.z, g.z);
        step.update(w.w, m.w, v.w, g.w);
        store4(t.m + i, m);
        store4(t.v + i, v);
        if constexpr (MASTER) store4(t.master + i, w);
        w = plus(w, -t.center);
        if constexpr (!adamw_weights_are_master)
            *reinterpret_cast<uint2*>(t.weights + i) =
                MASTER ? make_uint2(bf16_pair(w.x, w.y), bf16_pair(w.z, w.w))
                       : make_uint2(stochastic_pair(w.x, w.y, uint32_t(bits)),
                                    stochastic_pair(w.z, w.w, uint32_t(bits >> 32)));
    } else {
        for (int64_t j = i; j < t.n; j++) {
            float w = MASTER ? t.master[j] : float(t.weights[j]) + t.center;
            step.update(w, t.m[j], t.v[j], t.gradients[j]);
            if constexpr (MASTER) t.master[j] = w;
            if constexpr (!MASTER)
                assign_stochastically(t.weights[j], w - t.center, uint32_t(bits >> (16 * (j - i))) & 0xffffu);
            else if constexpr (!adamw_weights_are_master) t.weights[j] = floatX(w - t.center);
        }
    }
}

// All arrays begin at multiples of 16 bytes.
inline void adamw_update(const Device& device, const AdamWTensor& tensor, const AdamW& options) {
    constexpr int threads = 256;
    launch(tensor.master ? adamw_kernel<true> : adamw_kernel<false>, dim3(unsigned(ceil_div(tensor.n, threads * 4))),
           threads, 0, device.stream, tensor, AdamWStep(options, tensor.decay), rounding_bits(tensor, options));
}

#endif
