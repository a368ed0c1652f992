// AdamW (Loshchilov and Hutter 2019), as PyTorch computes it. With g the scaled gradient at step t = 1, 2, ...:
//
//   m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include <cmath>
#include <type_traits>

#include "llmc/device.h"
#include "llmc/kernels/simd.h"

// Doubles, because 1 - beta2 of a beta2 rounded to fp32 is wrong by 1e-5.
struct AdamW {
    double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    int64_t step = 1;           // counted from 1
    double gradient_scale = 1;  // clipping factor, multiplied into every gradient
};

// The loop vectorises only under -fno-math-errno, since std::sqrt may set errno; it is twice as slow without.
// The master weights carry the precision; weights are their rounded copy, or the same array where the types agree.
inline void adamw_update(const Device& device, floatX* weights /*[n]*/, floatS* master /*[n]*/,
                         const floatS* gradients /*[n]*/, floatS* m /*[n]*/, floatS* v /*[n]*/, int64_t n,
                         const AdamW& options, bool decay) {
    const double correction1 = 1 - std::pow(options.beta1, double(options.step));
    const double correction2 = 1 - std::pow(options.beta2, double(options.step));
    const floatS keep = floatS(decay ? 1 - options.lr * options.weight_decay : 1);
    const floatS rate = floatS(options.lr / correction1), root = floatS(1 / std::sqrt(correction2));
    const floatS beta1 = floatS(options.beta1), rest1 = floatS(1 - options.beta1);
    const floatS beta2 = floatS(options.beta2), rest2 = floatS(1 - options.beta2);
    const floatS eps = floatS(options.eps), scale = floatS(options.gradient_scale);
#pragma omp parallel for simd num_threads(device.threads) schedule(simd : static)
    for (int64_t i = 0; i < n; i++) {
        const floatS g = gradients[i] * scale;
        m[i] = beta1 * m[i] + rest1 * g;
        v[i] = beta2 * v[i] + rest2 * g * g;
        master[i] = keep * master[i] - rate * m[i] / (std::sqrt(v[i]) * root + eps);
        if constexpr (!std::is_same_v<floatX, floatS>) assign(weights[i], master[i]);
    }
}
