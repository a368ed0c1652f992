// Cases of adamw.cuh: lengths around those of a thread's and a block's share, three steps each; gradients of zero.
// Weights without master weights, where every build has to round to the same bits, and without bias.
#pragma once

#include <bit>

#include "cases.h"
#include "llmc/kernels/adamw.cuh"

inline void adamw_case(Cases& cases, int64_t n, bool decay, float sigma) {
    const Device& device = cases.device;
    const std::string shape =
        "n=" + std::to_string(n) + (decay ? " decay" : "") + " sigma=" + std::to_string(int(sigma));
    const DeviceArray<floatS> master(device, normal_values(1, n)), m(device, std::vector<float>(n)),
        v(device, std::vector<float>(n));
    const DeviceArray<floatX> copy(device, n);
    floatX* weights = adamw_weights_are_master ? reinterpret_cast<floatX*>(master.data()) : copy.data();
    const floatS center = decay ? 0 : NORM_CENTER;  // what decays is no weight of LayerNorm
    AdamW options{.lr = 0.02, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1};
    options.gradient_scale = 0.3;
    for (options.step = 1; options.step <= 3; options.step++) {
        const DeviceArray<floatS> gradients(device, normal_values(1 + uint64_t(options.step), n, sigma));
        adamw_update(device, {weights, master, gradients, m, v, n, decay, 0, center}, options);
    }
    const Bounds fp32{1e-5, 1e-5};  // none of these is rounded to bf16
    cases.record("adamw master", shape, master.values(), fp32);
    cases.record("adamw m", shape, m.values(), fp32);
    cases.record("adamw v", shape, v.values(), fp32);
    // The weights are the master weights less the center, rounded to nearest.
    const std::vector<double> want = master.values(), got = adamw_weights_are_master ? want : copy.values();
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) different += got[i] != double(floatX(floatS(want[i]) - center));
    cases.record("adamw weights that are not rounded master weights", shape, {double(different)}, EXACT);
}

// ---------------------------------------------------------------------------------------------------------------------
// Without master weights. Builds whose weights are not in bf16 have no such kernel: they record what it has to give.

// A step that is exact in fp32, w -/+ lr: both moments are those of the last gradient, which is not zero.
inline AdamW sign_step(double lr, int64_t step = 1) {
    AdamW options{.lr = lr, .beta1 = 0, .beta2 = 0, .eps = 0, .weight_decay = 0};
    options.step = step, options.seed = 11;
    return options;
}

// What is stored of a value that fp32 holds: one of the bf16 below and above its magnitude, 2^-7 of its leading bit
// apart. Its random number of 16 bits, as a part of 1, is added to how far the value is beyond the lower one.
inline double stochastically_rounded(double value, const AdamW& options, int tensor, int64_t element) {
    if (value == 0) return value;
    const double unit = std::ldexp(1.0, std::ilogb(value) - 7), units = std::abs(value) / unit;
    const uint64_t number =
        hash_counter(hash_counter(options.seed, uint64_t(tensor), uint64_t(options.step)), 0, uint64_t(element / 4));
    const double random = double((number >> (16 * (element % 4))) % 65536) / 65536;
    return std::copysign(std::floor(units + random) * unit, value);
}

// Three such steps: the random numbers alone decide between two bf16.
inline void adamw_rounding_case(Cases& cases, int64_t n, int index) {
    const Device& device = cases.device;
    const std::vector<float> start = normal_values(1, n);
    const DeviceArray<floatX> weights(device, start);
    const DeviceArray<floatS> m(device, std::vector<float>(n)), v(device, std::vector<float>(n));
    std::vector<double> want(start.begin(), start.end());
    const float center = index == 1;
    for (int64_t step = 1; step <= 3; step++) {
        const AdamW options = sign_step(0x1p-12, step);
        std::vector<float> g = normal_values(1 + uint64_t(step), n);
        for (float& x : g)
            if (x == 0) x = 1;
        const DeviceArray<floatS> gradients(device, g);
        if (!adamw_weights_are_master)
            adamw_update(device, {weights, nullptr, gradients, m, v, n, false, index, center}, options);
        for (int64_t i = 0; i < n; i++) {
            const float moved = float(want[i]) + center - std::copysign(float(options.lr), g[i]);
            want[i] = stochastically_rounded(moved - center, options, index, i);
        }
    }
    cases.record("adamw without master weights", "n=" + std::to_string(n) + " tensor " + std::to_string(index),
                 adamw_weights_are_master ? want : weights.values(), EXACT);
}

// Many roundings of one value, so far on the way from 1.25, or -1.25, to the next bf16: their mean is the value, within
// five standard errors. Rounding to nearest would be off by half a way.
inline void adamw_mean_case(Cases& cases, double part, float sign) {
    constexpr int64_t n = 16384;
    constexpr double way = 0x1p-7;
    const Device& device = cases.device;
    const DeviceArray<floatX> weights(device, std::vector<float>(n, sign * 1.25f));
    const DeviceArray<floatS> gradients(device, std::vector<float>(n, -sign)), m(device, std::vector<float>(n)),
        v(device, std::vector<float>(n));
    double mean = part;
    if (!adamw_weights_are_master) {
        adamw_update(device, {weights, nullptr, gradients, m, v, n, false}, sign_step(part * way));
        mean = 0;
        for (const double w : weights.values()) mean += (std::abs(w) - 1.25) / way / n;
    }
    const double error = std::sqrt(part * (1 - part) / n);
    cases.record("adamw without master weights, mean", std::to_string(part) + (sign > 0 ? " up" : " down"), {mean},
                 {0, 5 * error / part});
}

// Every bf16, a part of them at a time, in a step of length 0: none moves, infinities neither, and NaN stays NaN. So
// does the NaN that a gradient makes of a weight, here one of which every bit is set.
inline void adamw_still_case(Cases& cases, int part, int parts) {
    const Device& device = cases.device;
    std::vector<float> all;
    for (int bits = part; bits < 65536; bits += parts) {
        bf16 number;
        number.bits = uint16_t(bits);
        all.push_back(number);
    }
    std::vector<float> g(all.size(), 1);
    all.push_back(1), g.push_back(std::bit_cast<float>(0x7fffffffu));
    const int64_t n = int64_t(all.size());
    const DeviceArray<floatX> weights(device, all);
    const DeviceArray<floatS> gradients(device, g), m(device, std::vector<float>(n)), v(device, std::vector<float>(n));
    int64_t moved = 0;
    if (!adamw_weights_are_master) {
        adamw_update(device, {weights, nullptr, gradients, m, v, n, false}, sign_step(0, part + 1));
        const std::vector<double> got = weights.values();
        for (int64_t i = 0; i < n; i++)
            moved += std::isnan(all[i] * g[i]) ? !std::isnan(got[i]) : got[i] != double(all[i]);
    }
    cases.record("adamw bf16 that have moved", "part " + std::to_string(part), {double(moved)}, EXACT);
}

inline void adamw_cases(Cases& cases) {
    for (const int64_t n :
         {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 127, 255, 1000, 1023, 1024, 1025, 1027, 4095, 4096, 5001, 12288, 70003}) {
        for (const bool decay : {false, true}) adamw_case(cases, n, decay, 1);
        adamw_rounding_case(cases, n, int(n % 3));
    }
    adamw_case(cases, 1003, true, 0);
    for (const double part : {0.015625, 0.125, 0.25, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75, 0.984375})
        for (const float sign : {1.0f, -1.0f}) adamw_mean_case(cases, part, sign);
    for (int part = 0; part < 20; part++) adamw_still_case(cases, part, 20);
}
