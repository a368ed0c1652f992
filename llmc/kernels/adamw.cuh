// AdamW (Loshchilov and Hutter 2019), as PyTorch computes it. With g the scaled gradient at step t = 1, 2, ...:
//
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include <cmath>
#include <type_traits>

#include "llmc/device.h"
#ifndef USE_CUDA
#include "llmc/kernels/simd.h"
#endif

// Doubles, because 1 - beta2 of a beta2 rounded to fp32 is wrong by 1e-5.
struct AdamW {
    double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    int64_t step = 1;           // counted from 1
    double gradient_scale = 1;  // clipping factor, multiplied into every gradient
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

// The master weights carry the precision; weights are their rounded copy, or the same array where the types agree.
#ifndef USE_CUDA

// The loop vectorises only under -fno-math-errno, since std::sqrt may set errno; it is twice as slow without.
inline void adamw_update(const Device& device, floatX* weights /*[n]*/, floatS* master /*[n]*/,
                         const floatS* gradients /*[n]*/, floatS* m /*[n]*/, floatS* v /*[n]*/, int64_t n,
                         const AdamW& options, bool decay) {
    const AdamWStep step(options, decay);
#pragma omp parallel for simd num_threads(device.threads) schedule(simd : static)
    for (int64_t i = 0; i < n; i++) {
        step.update(master[i], m[i], v[i], gradients[i]);
        if constexpr (!adamw_weights_are_master) assign(weights[i], master[i]);
    }
}

#else

// A thread has 4 neighbouring elements, so that each array is read by whole 16 bytes and neighbours touch: 28 bytes per
// element, 30 with weights in bf16.
__global__ void adamw_kernel(floatX* weights, float* master, const float* gradients, float* m, float* v, int64_t n,
                             AdamWStep step) {
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i + 4 <= n) {
        const float4 g = *reinterpret_cast<const float4*>(gradients + i);
        float4 w = *reinterpret_cast<float4*>(master + i), first = *reinterpret_cast<float4*>(m + i),
               second = *reinterpret_cast<float4*>(v + i);
        step.update(w.x, first.x, second.x, g.x);
        step.update(w.y, first.y, second.y, g.y);
        step.update(w.z, first.z, second.z, g.z);
        step.update(w.w, first.w, second.w, g.w);
        *reinterpret_cast<float4*>(master + i) = w;
        *reinterpret_cast<float4*>(m + i) = first;
        *reinterpret_cast<float4*>(v + i) = second;
        if constexpr (!adamw_weights_are_master)
            *reinterpret_cast<uint2*>(weights + i) = make_uint2(bf16_pair(w.x, w.y), bf16_pair(w.z, w.w));
    } else {
        for (int64_t j = i; j < n; j++) {
            step.update(master[j], m[j], v[j], gradients[j]);
            if constexpr (!adamw_weights_are_master) weights[j] = floatX(master[j]);
        }
    }
}

// All arrays begin at multiples of 16 bytes.
inline void adamw_update(const Device& device, floatX* weights /*[n]*/, floatS* master /*[n]*/,
                         const floatS* gradients /*[n]*/, floatS* m /*[n]*/, floatS* v /*[n]*/, int64_t n,
                         const AdamW& options, bool decay) {
    constexpr int threads = 256;
    launch(adamw_kernel, dim3(unsigned(ceil_div(n, threads * 4))), threads, 0, device.stream, weights, master,
           gradients, m, v, n, AdamWStep(options, decay));
}

#endif
