// Cases of matmul.cuh: the three products of a linear layer, with every epilogue, on odd sizes and on views whose rows
// are longer than they are used.
#pragma once

#include "cases.h"
#include "llmc/kernels/matmul.cuh"

inline void products_cases(Cases& cases) {
    cases.give_scratch(matmul_scratch_bytes(cases.device.threads));
    const Device& device = cases.device;
    struct Shape {
        int64_t N, IC, OC, gap;
    };
    const Shape shapes[] = {{1, 8, 8, 0},    {1, 16, 8, 8},   {2, 8, 24, 0},    {3, 24, 16, 8},   {5, 40, 8, 0},
                            {7, 8, 72, 16},  {16, 16, 16, 0}, {17, 32, 48, 8},  {31, 64, 24, 0},  {33, 24, 64, 8},
                            {63, 16, 8, 0},  {64, 64, 64, 0}, {65, 40, 56, 16}, {100, 8, 264, 0}, {127, 32, 16, 8},
                            {128, 72, 8, 0}, {129, 8, 16, 0}, {150, 48, 40, 8}, {257, 16, 24, 0}, {300, 24, 8, 8},
                            {8, 8, 2056, 0}};
    for (const auto& [N, IC, OC, gap] : shapes) {
        const std::string shape = "N=" + std::to_string(N) + " IC=" + std::to_string(IC) + " OC=" + std::to_string(OC) +
                                  " gap=" + std::to_string(gap);
        using X = DeviceArray<floatX>;
        const X in(device, normal_values(1, N * (IC + gap))), weight(device, normal_values(2, OC * IC, 0.3f));
        const X bias(device, normal_values(3, OC)), dout(device, normal_values(4, N * (OC + gap)));
        const X hidden(device, normal_values(5, N * IC, 2));
        const Matrix<const floatX> x = in.matrix(N, IC, IC + gap), w = weight.matrix(OC, IC);
        const Matrix<const floatX> dy = dout.matrix(N, OC, OC + gap);
        const std::vector<float> before = normal_values(6, N * (OC + gap));

        X plain(device, before), biased(device, before), gelu(device, before), pre(device, before);
        X gelu_alone(device, before);
        matmul_forward(device, plain.matrix(N, OC, OC + gap), x, w, nullptr);
        matmul_forward(device, biased.matrix(N, OC, OC + gap), x, w, bias);
        matmul_forward(device, gelu.matrix(N, OC, OC + gap), x, w, bias, Activation::gelu, pre.matrix(N, OC, OC + gap));
        matmul_forward(device, gelu_alone.matrix(N, OC, OC + gap), x, w, bias, Activation::gelu);
        cases.record("matmul_forward", shape, plain.values());
        cases.record("matmul_forward bias", shape, biased.values());
        cases.record("matmul_forward bias gelu", shape, gelu.values());
        cases.record("matmul_forward bias gelu, input of gelu", shape, pre.values());
        cases.record("matmul_forward bias gelu, input not kept", shape, gelu_alone.values());

        using R = DeviceArray<floatR>;  // the residual stream, also in place
        R sum(device, before), sum_in_place(device, before);
        const R residual(device, normal_values(10, N * OC));
        matmul_residual_forward(device, sum.matrix(N, OC, OC + gap), residual.matrix(N, OC), x, w, bias);
        matmul_residual_forward(device, sum_in_place.matrix(N, OC, OC + gap), sum_in_place.matrix(N, OC, OC + gap), x,
                                w, bias);
        cases.record("matmul_residual_forward", shape, sum.values());
        cases.record("matmul_residual_forward in place", shape, sum_in_place.values());

        const std::vector<float> din_before = normal_values(7, N * (IC + gap));
        X din(device, din_before), din_gelu(device, din_before);
        matmul_backward_input(device, din.matrix(N, IC, IC + gap), dy, w);
        matmul_backward_input(device, din_gelu.matrix(N, IC, IC + gap), dy, w, hidden.matrix(N, IC));
        cases.record("matmul_backward_input", shape, din.values());
        cases.record("matmul_backward_input gelu", shape, din_gelu.values());

        // The gradients of weights are in fp32 whatever the operands are.
        DeviceArray<floatS> dw(device, normal_values(8, OC * IC)), dw_alone(device, normal_values(8, OC * IC));
        DeviceArray<floatS> db(device, normal_values(9, OC));
        matmul_backward_weight(device, dw.matrix(OC, IC), db, dy, x);
        matmul_backward_weight(device, dw_alone.matrix(OC, IC), nullptr, dy, x);
        cases.record("matmul_backward_weight", shape, dw.values(), {1e-5, 1e-5});
        cases.record("matmul_backward_weight bias", shape, db.values(), {1e-5, 1e-5});
        cases.record("matmul_backward_weight without bias", shape, dw_alone.values(), {1e-5, 1e-5});
    }
}

inline void matmul_cases(Cases& cases) {
#ifdef USE_CUDA
    // As in training, products are of the fastest of several algorithms; choosing it spoils what they compute.
    Cases thrown_away;
    thrown_away.device.algorithms = cases.device.algorithms;
    thrown_away.device.tune_products = true;
    products_cases(thrown_away);
#endif
    products_cases(cases);
}
