// Softmax and cross entropy of each row of logits x against its target t, with the gradient in the same pass:
//
//   top = max x      total = sum exp(x - top)      loss = ln(total) - (x[t] - top)
//   dx  = (exp(x - top) / total - [j == t]) dloss
//
// The gradient overwrites the logits. Exponentials are computed twice instead of being stored between the passes:
// stored in bf16 they would be rounded once more.
#pragma once

#include <cmath>
#include <limits>

#include "llmc/device.h"
#include "llmc/kernels/simd.h"

// Loss of one row; its logits become the gradient if wanted.
WIDE inline floatS classifier_row(floatX* x /*[V]*/, int64_t V, int32_t target, floatS dloss, bool want_gradient) {
    floatS top = -std::numeric_limits<floatS>::infinity();
    double total = 0;  // relative to the top so far; by blocks, which stay in the first-level cache and round less
    for (int64_t begin = 0; begin < V; begin += 4096) {
        const int64_t end = std::min(V, begin + 4096);
        const floatS new_top = std::max(top, max_in_lanes<floatS>(begin, end, [=](int64_t j) WIDE { return x[j]; }));
        total *= std::exp(double(top - new_top));
        total +=
            sum_in_lanes<floatS>(begin, end, [=](int64_t j) WIDE { return exp_nonpositive(floatS(x[j]) - new_top); });
        top = new_top;
    }
    const floatS at_target = floatS(x[target]) - top;

    if (want_gradient) {
        const floatS scale = floatS(dloss / total);
#pragma omp simd
        for (int64_t j = 0; j < V; j++) assign(x[j], exp_nonpositive(floatS(x[j]) - top) * scale);
        x[target] = floatX(exp_nonpositive(at_target) * scale - dloss);
    }
    return floatS(std::log(total) - at_target);
}

// Target -1 marks a row to ignore: loss and gradient are 0. The gradient of the padded columns V..Vp-1 is 0.
inline void classifier_forward_backward(const Device& device, floatS* losses /*[n]*/,
                                        Matrix<floatX> logits /*[n, Vp] in: logits, out: gradient if wanted*/,
                                        const int32_t* targets /*[n]*/, int64_t V, floatS dloss, bool want_gradient) {
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < logits.rows; i++) {
        floatX* x = logits.row(i);
        const bool ignored = targets[i] < 0;
        losses[i] = 0;
        if (!ignored) run_widest([&]() WIDE { losses[i] = classifier_row(x, V, targets[i], dloss, want_gradient); });
        if (want_gradient) std::fill(x + (ignored ? 0 : V), x + logits.cols, floatX(0));
    }
}
