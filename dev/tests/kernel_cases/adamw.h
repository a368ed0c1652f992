// Cases of adamw.cuh: lengths around those of a thread's and a block's share, three steps each; gradients of zero.
#pragma once

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
    AdamW options{.lr = 0.02, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1};
    options.gradient_scale = 0.3;
    for (options.step = 1; options.step <= 3; options.step++) {
        const DeviceArray<floatS> gradients(device, normal_values(1 + uint64_t(options.step), n, sigma));
        adamw_update(device, {weights, master, gradients, m, v, n, decay}, options);
    }
    const Bounds fp32{1e-5, 1e-5};  // none of these is rounded to bf16
    cases.record("adamw master", shape, master.values(), fp32);
    cases.record("adamw m", shape, m.values(), fp32);
    cases.record("adamw v", shape, v.values(), fp32);
    // The weights are the master weights, rounded to nearest.
    const std::vector<double> want = master.values(), got = adamw_weights_are_master ? want : copy.values();
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) different += got[i] != double(floatX(floatS(want[i])));
    cases.record("adamw weights that are not rounded master weights", shape, {double(different)}, EXACT);
}

inline void adamw_cases(Cases& cases) {
    for (const int64_t n :
         {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 127, 255, 1000, 1023, 1024, 1025, 1027, 4095, 4096, 5001, 12288, 70003})
        for (const bool decay : {false, true}) adamw_case(cases, n, decay, 1);
    adamw_case(cases, 1003, true, 0);
}
