// Cases of layernorm.cuh: rows of a warp and of a block, one row to more than the blocks of a launch have at once, rows
// that lie apart, rows whose mean is far from zero.
#pragma once

#include "cases.h"
#include "llmc/kernels/layernorm.cuh"

struct LayerNormShape {
    int64_t N, C, gap = 0;  // elements between rows
    float mean = 0;
};

inline void layernorm_case(Cases& cases, const LayerNormShape& s) {
    const Device& device = cases.device;
    const int64_t N = s.N, C = s.C, stride = C + s.gap, n = N * stride;
    const std::string shape = "N=" + std::to_string(N) + " C=" + std::to_string(C) + " gap=" + std::to_string(s.gap) +
                              " mean=" + std::to_string(int(s.mean));
    const Bounds fp32{1e-5, 1e-5};  // of results in fp32 that depend on exact inputs

    std::vector<float> weights = normal_values(1, C);  // less 1
    for (float& w : weights) w += 1 - float(NORM_CENTER);
    const DeviceArray<floatX> weight(device, weights), bias(device, normal_values(2, C));
    const DeviceArray<floatX> dout(device, normal_values(4, n));
    const std::vector<float> before = normal_values(6, n);
    const DeviceArray<floatR> x(device, normal_values(5, n, 1, s.mean));
    const Matrix<const floatR> in = x.matrix(N, C, stride);

    const DeviceArray<floatX> out(device, before);
    const DeviceArray<floatS> mean(device, N), rstd(device, N);
    layernorm_forward(device, out.matrix(N, C, stride), mean, rstd, in, weight, bias);
    cases.record("layernorm_forward out", shape, out.values());
    cases.record("layernorm_forward mean", shape, mean.values(), fp32);
    cases.record("layernorm_forward rstd", shape, rstd.values(), fp32);

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
