// Cases of classifier.cuh: vocabularies of one token to more than a block's shared memory holds, with and without
// padding, ignored rows, logits that are infinite, far apart, or not a number.
#pragma once

#include <limits>

#include "cases.h"
#include "llmc/kernels/classifier.cuh"

struct ClassifierShape {
    int64_t n, V, Vp, gap = 0;  // elements between rows
    float sigma = 3, mean = 0;
};

// Records losses and gradient of logits [n, Vp]; the loss alone must be the same and leave the logits as they were.
inline void classifier_case(Cases& cases, const std::string& shape, const ClassifierShape& s,
                            const std::vector<float>& values, const std::vector<int32_t>& targets) {
    const Device& device = cases.device;
    const int64_t stride = s.Vp + s.gap;
    const DeviceArray<int32_t> device_targets(device, targets);
    const DeviceArray<floatX> logits(device, values), untouched(device, values);
    const std::vector<double> before = logits.values();
    const DeviceArray<floatS> losses(device, s.n), again(device, s.n);
    const floatS dloss = floatS(1.0 / 3);
    classifier_forward_backward(device, losses, logits.matrix(s.n, s.Vp, stride), device_targets, s.V, dloss, true);
    classifier_forward_backward(device, again, untouched.matrix(s.n, s.Vp, stride), device_targets, s.V, dloss, false);
    cases.record("classifier losses", shape, losses.values(), {1e-5, 1e-5});  // exact inputs, sums in fp32
    cases.record("classifier losses alone", shape, again.values(), {1e-5, 1e-5});
    cases.record("classifier loss alone leaves the logits", shape, {double(untouched.values() == before)}, EXACT);
    cases.record("classifier gradient", shape, logits.values());
    // The padding by itself: its zeros would not be missed beside the rest.
    std::vector<double> padding, gradient = logits.values();
    for (int64_t i = 0; i < s.n; i++)
        for (int64_t c = targets[i] < 0 ? 0 : s.V; c < s.Vp; c++) padding.push_back(gradient[i * stride + c]);
    cases.record("classifier zeros", shape, padding, EXACT);
}

inline void classifier_cases(Cases& cases) {
    const ClassifierShape shapes[] = {{1, 1, 64},
                                      {3, 2, 64},
                                      {5, 7, 64},
                                      {5, 8, 64},
                                      {5, 9, 64, 8},
                                      {4, 63, 64},
                                      {4, 64, 64},
                                      {4, 65, 128},
                                      {7, 100, 256},
                                      {9, 257, 320},
                                      {40, 257, 320, 64},
                                      {3, 1000, 1024},
                                      {3, 1000, 1024, 0, 20},
                                      {3, 1000, 1024, 0, 3, 90},
                                      {2, 4088, 4096},
                                      {2, 4096, 4096},
                                      {2, 4097, 4160},
                                      {2, 8191, 8192, 16},
                                      {2, 12289, 12352},
                                      {2, 50257, 50304},
                                      {1, 100277, 100352},
                                      {1, 130001, 130048},
                                      {1, 200000, 200064}};
    for (const ClassifierShape& s : shapes) {
        // Far off in the padding and between rows, whence nothing may come.
        std::vector<float> values = normal_values(1, s.n * (s.Vp + s.gap), s.sigma, s.mean);
        for (size_t i = 0; i < values.size(); i++)
            if (int64_t(i) % (s.Vp + s.gap) >= s.V) values[i] = 300;
        std::vector<int32_t> targets = index_values(2, s.n, s.V);
        targets[0] = int32_t(s.V) - 1;
        if (s.n > 1) targets[1] = -1;
        if (s.n > 2) targets[2] = 0;
        classifier_case(cases,
                        "n=" + std::to_string(s.n) + " V=" + std::to_string(s.V) + " Vp=" + std::to_string(s.Vp) +
                            " gap=" + std::to_string(s.gap) + " sigma=" + std::to_string(int(s.sigma)) +
                            " mean=" + std::to_string(int(s.mean)),
                        s, values, targets);
    }

    const ClassifierShape s{5, 5000, 5056};
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> values(s.n * s.Vp, -28672);
    values[17] = 28672;                                                               // certain and right
    values[s.Vp + 4999] = 28672;                                                      // certain and wrong
    for (int64_t c = 0; c < s.V; c++) values[2 * s.Vp + c] = c % 3 ? 1 : -infinity;   // impossible tokens
    for (int64_t c = 0; c < s.V; c++) values[3 * s.Vp + c] = c == 4100 ? 2 : -2e38f;  // all but one
    for (int64_t c = 0; c < s.V; c++) values[4 * s.Vp + c] = -2e38f;                  // equal
    classifier_case(cases, "extreme", s, values, {17, 4, 4, 4100, 4});

    // A logit that is not a number must be seen, in the loss and in the whole row of the gradient.
    for (const int64_t place :
         {0, 1, 7, 8, 63, 64, 255, 256, 2047, 2048, 3000, 4087, 4088, 4095, 4096, 4097, 4991, 4992, 4998, 4999}) {
        values.assign(s.Vp, 1);
        values[place] = std::numeric_limits<float>::quiet_NaN();
        const DeviceArray<floatX> logits(cases.device, values);
        const DeviceArray<floatS> loss(cases.device, std::vector<float>{0});
        const DeviceArray<int32_t> target(cases.device, std::vector<int32_t>{3});
        classifier_forward_backward(cases.device, loss, logits.matrix(1, s.Vp), target, s.V, 1, true);
        std::vector<double> is_nan{double(std::isnan(loss.values()[0]))}, gradient = logits.values();
        for (int64_t c = 0; c < s.V; c++) is_nan.push_back(std::isnan(gradient[c]));
        cases.record("classifier NaN", "at " + std::to_string(place), is_nan, EXACT);
    }
}
