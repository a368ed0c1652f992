// Cases of layernorm.cuh: rows of a warp and of a block, one row to more than the blocks of a launch have at once, rows
// that lie apart, sums in place, rows whose mean is far from zero.
#pragma once

#include "cases.h"
#include "llmc/kernels/layernorm.cuh"

struct LayerNormShape {
    int64_t N, C, gap = 0;  // elements between rows
    float mean = 0;
};

// Rounded to multiples of 1/16: bf16 holds the sum of two below 8 exactly.
inline std::vector<float> sixteenths(std::vector<float> values) {
    for (float& value : values) value = std::clamp(std::nearbyint(value * 16) / 16, -7.f, 7.f);
    return values;
}

inline void layernorm_case(Cases& cases, const LayerNormShape& s) {
    const Device& device = cases.device;
    const int64_t N = s.N, C = s.C, stride = C + s.gap, n = N * stride;
    const std::string shape = "N=" + std::to_string(N) + " C=" + std::to_string(C) + " gap=" + std::to_string(s.gap) +
                              " mean=" + std::to_string(int(s.mean));
    const Bounds fp32{1e-5, 1e-5};  // of results in fp32 that depend on exact inputs

    std::vector<float> weights = normal_values(1, C);  // less 1
    for (float& w : weights) w += 1 - float(NORM_CENTER);
    const DeviceArray<floatX> weight(device, weights), bias(device, normal_values(2, C));
    const std::vector<float> b_values = normal_values(3, n, 0.5f);
    const DeviceArray<floatX> b(device, b_values), dout(device, normal_values(4, n));
    const std::vector<float> a_values = normal_values(5, n, 1, s.mean), before = normal_values(6, n);
    const DeviceArray<floatR> a(device, a_values);
    const Matrix<const floatR> in = a.matrix(N, C, stride);
    const Matrix<const floatX> branch = b.matrix(N, C, stride);

    const DeviceArray<floatX> out(device, before);
    const DeviceArray<floatS> mean(device, N), rstd(device, N);
    layernorm_forward(device, out.matrix(N, C, stride), mean, rstd, in, weight, bias);
    cases.record("layernorm_forward out", shape, out.values());
    cases.record("layernorm_forward mean", shape, mean.values(), fp32);
    cases.record("layernorm_forward rstd", shape, rstd.values(), fp32);

    const DeviceArray<floatR> total(device, before), total_in_place(device, a_values);
    residual_forward(device, total.matrix(N, C, stride), in, branch);
    residual_forward(device, total_in_place.matrix(N, C, stride), total_in_place.matrix(N, C, stride), branch);
    cases.record("residual_forward out", shape, total.values());
    cases.record("residual_forward in place", shape, total_in_place.values());

    // Sums that bf16 holds exactly, for the rest to be compared closely; then sums that are rounded, in place.
    const DeviceArray<floatR> exact_a(device, sixteenths(a_values)), residual(device, before);
    const DeviceArray<floatX> exact_b(device, sixteenths(b_values)), fused(device, before);
    const DeviceArray<floatS> fused_mean(device, N), fused_rstd(device, N);
    residual_layernorm_forward(device, residual.matrix(N, C, stride), fused.matrix(N, C, stride), fused_mean,
                               fused_rstd, exact_a.matrix(N, C, stride), exact_b.matrix(N, C, stride), weight, bias);
    cases.record("residual_layernorm_forward residual", shape, residual.values(), EXACT);
    cases.record("residual_layernorm_forward out", shape, fused.values());
    cases.record("residual_layernorm_forward mean", shape, fused_mean.values(), fp32);
    cases.record("residual_layernorm_forward rstd", shape, fused_rstd.values(), fp32);

    const DeviceArray<floatR> in_place(device, a_values);
    residual_layernorm_forward(device, in_place.matrix(N, C, stride), fused.matrix(N, C, stride), fused_mean,
                               fused_rstd, in_place.matrix(N, C, stride), branch, weight, bias);
    cases.record("residual_layernorm_forward in place", shape, in_place.values());
    const std::vector<double> stored = in_place.values(), means = fused_mean.values();
    bool same = true;
    for (int64_t i = 0; i < N; i++) {
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < C; c++) sum += stored[i * stride + c], magnitude += std::abs(stored[i * stride + c]);
        same = same && std::abs(sum / double(C) - means[i]) <= 1e-6 * magnitude / double(C);
    }
    cases.record("residual_layernorm_forward means of what it stores", shape, {double(same)}, EXACT);

    cases.give_scratch(layernorm_backward_scratch_bytes(device.threads, C));
    const auto backward = [&] {
        const DeviceArray<floatR> din(device, before);
        const DeviceArray<floatS> dweight(device, normal_values(7, C)), dbias(device, normal_values(8, C));
        layernorm_backward(device, din.matrix(N, C, stride), dweight, dbias, dout.matrix(N, C, stride), in, mean, rstd,
                           weight);
        return std::vector{din.values(), dweight.values(), dbias.values()};
    };
    const auto gradients = backward();
    cases.record("layernorm_backward din", shape, gradients[0]);
    cases.record("layernorm_backward dweight", shape, gradients[1], fp32);
    cases.record("layernorm_backward dbias", shape, gradients[2], fp32);
    cases.record("layernorm_backward repeats", shape, {double(backward() == gradients)}, EXACT);
}

inline void layernorm_cases(Cases& cases) {
    const LayerNormShape shapes[] = {
        {1, 8},       {2, 16},        {9, 24},      {7, 64, 8},   {33, 128},        {40, 248, 16}, {5, 256},
        {17, 264, 8}, {8, 512, 0, 4}, {3, 520},     {20, 768},    {65, 768, 24},    {4, 776},      {9, 1024, 0, -2},
        {6, 1032},    {3, 1280, 8},   {20, 1600},   {3, 2048},    {11, 4096},       {2, 4104},     {2, 8192},
        {2, 8200},    {1, 16384},     {2500, 8, 0}, {600, 48, 8}, {150, 1040, 0, 1}};
    for (const LayerNormShape& s : shapes) layernorm_case(cases, s);
}
