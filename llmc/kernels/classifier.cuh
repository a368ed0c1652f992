// Softmax and cross entropy of each row of logits x against its target t, with the gradient in the same pass:
//
//   top = max x      total = sum exp(x - top)      loss = ln(total) - (x[t] - top)
//   dx  = (exp(x - top) / total - [j == t]) dloss
//
// The gradient overwrites the logits. Exponentials are computed twice instead of being stored: that costs less than
// the memory traffic, and in bf16 stored ones would be rounded once more.
#pragma once

#include <cmath>
#include <limits>

#include "llmc/device.h"
#include "llmc/kernels/simd.h"

// Loss of one row; its logits become the gradient if wanted.
WIDE inline floatS classifier_row(floatX* x /*[V]*/, int64_t V, int32_t target, floatS dloss, bool want_gradient) {
    floatS top = -std::numeric_limits<floatS>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < V; j++) top = floatS(x[j]) > top ? floatS(x[j]) : top;

    double total = 0;  // of blocks of 1024, so that rounding does not grow with the vocabulary
    for (int64_t j = 0; j < V; j += 1024)
        total += sum_in_lanes<floatS>(j, std::min(V, j + 1024),
                                      [=](int64_t k) WIDE { return exp_nonpositive(floatS(x[k]) - top); });
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
