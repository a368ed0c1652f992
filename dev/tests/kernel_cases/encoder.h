// Cases of encoder.cuh: lengths around those of groups and launches, rows that are all different, all the same, or as
// in text, where a few tokens make up most of it; gradients whose rows lie apart.
#pragma once

#include "cases.h"
#include "llmc/kernels/encoder.cuh"

struct EncoderShape {
    int64_t N, C;
    int64_t V;        // tokens that occur
    double skew = 1;  // token = V u^skew, u uniform: above 1, small numbers occur more often
    int64_t gap = 0;  // elements between rows
};

inline void encoder_case(Cases& cases, const EncoderShape& s) {
    const Device& device = cases.device;
    const int64_t N = s.N, C = s.C, V = s.V, T = std::min<int64_t>(N, 100), stride = C + s.gap;
    const std::string shape = "N=" + std::to_string(N) + " C=" + std::to_string(C) + " V=" + std::to_string(V) +
                              " skew=" + std::to_string(int(s.skew)) + " gap=" + std::to_string(s.gap);
    std::vector<int32_t> tokens(N), positions(N);
    for (int64_t i = 0; i < N; i++) {
        tokens[i] = int32_t(double(V) * std::pow(uniform(7, 1, uint64_t(i)), s.skew));
        positions[i] = int32_t(i % T);
    }
    const DeviceArray<int32_t> device_tokens(device, tokens), device_positions(device, positions),
        by_token(device, sorted_rows(tokens)), by_position(device, sorted_rows(positions));
    const TokenRows rows{device_tokens, device_positions, by_token, by_position};

    const DeviceArray<floatX> wte(device, normal_values(2, V * stride)), wpe(device, normal_values(3, T * stride));
    const DeviceArray<floatR> out(device, normal_values(4, N * stride));
    encoder_forward(device, out.matrix(N, C, stride), rows, wte.matrix(V, C, stride), wpe.matrix(T, C, stride));
    cases.record("encoder_forward out", shape, out.values());

    cases.give_scratch(encoder_backward_scratch_bytes(N, C));
    const DeviceArray<floatR> dout(device, normal_values(5, N * stride));
    const auto backward = [&] {
        const DeviceArray<floatS> dwte(device, normal_values(6, V * stride)),
            dwpe(device, normal_values(7, T * stride));
        encoder_backward(device, dwte.matrix(V, C, stride), dwpe.matrix(T, C, stride), dout.matrix(N, C, stride), rows);
        return std::pair(dwte.values(), dwpe.values());
    };
    const auto [dwte, dwpe] = backward();
    cases.record("encoder_backward dwte", shape, dwte, {1e-5, 1e-5});  // sums of exact inputs in fp32
    cases.record("encoder_backward dwpe", shape, dwpe, {1e-5, 1e-5});
    cases.record("encoder_backward repeats", shape, {double(backward() == std::pair(dwte, dwpe))}, EXACT);
}

inline void encoder_cases(Cases& cases) {
    const EncoderShape shapes[] = {{1, 8, 1},           {2, 8, 9},          {7, 24, 3},        {31, 8, 40},
                                   {32, 16, 1},         {32, 256, 50},      {33, 264, 1},      {33, 264, 7, 1, 8},
                                   {63, 40, 2},         {64, 8, 1},         {65, 8, 1},        {65, 72, 300},
                                   {97, 520, 5, 2, 24}, {128, 128, 128},    {129, 776, 20, 3}, {255, 64, 11, 2},
                                   {300, 192, 257},     {1000, 24, 257, 4}, {1025, 8, 1},      {2100, 16, 1},
                                   {2100, 40, 3, 2},    {1100, 512, 2, 1},  {3000, 8, 3000},   {4001, 32, 100, 6, 8}};
    for (const EncoderShape& s : shapes) encoder_case(cases, s);
}
