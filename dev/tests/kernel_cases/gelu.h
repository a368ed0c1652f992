// Cases of gelu.cuh: from one group of eight channels to more elements than a launch has threads, values around zero
// and so far from it that GELU is the identity or zero, and values that are not a number.
#pragma once

#include <limits>

#include "cases.h"
#include "llmc/kernels/gelu.cuh"

struct GeluShape {
    int64_t N, C;  // rows, columns
    float sigma = 2, mean = 0;
};

inline void gelu_cases(Cases& cases) {
    const GeluShape shapes[] = {{1, 8},        {1, 16},        {2, 8},         {3, 8, 0.1f},   {5, 24},
                                {7, 40},       {33, 8},        {31, 56},       {9, 104, 8},    {1, 248},
                                {1, 256},      {1, 264},       {4, 520},       {13, 1000, 20}, {3, 2040},
                                {1, 2056},     {17, 3072},     {2, 4104},      {64, 88, 2, 5}, {64, 88, 2, -5},
                                {257, 136, 4}, {130, 1032, 3}, {1, 100008, 3}, {1500, 712, 1}, {8, 5000, 1e-3f}};
    for (const GeluShape& s : shapes) {
        const std::string shape = "N=" + std::to_string(s.N) + " C=" + std::to_string(s.C) +
                                  " sigma=" + std::to_string(s.sigma) + " mean=" + std::to_string(int(s.mean));
        const std::vector<float> values = normal_values(1, s.N * s.C, s.sigma, s.mean);
        const DeviceArray<floatX> in(cases.device, values), out(cases.device, s.N * s.C);
        gelu_forward(cases.device, out.matrix(s.N, s.C), in.matrix(s.N, s.C));
        cases.record("gelu_forward", shape, out.values());
        cases.record("gelu_forward leaves its input", shape, in.values(), EXACT);

        // One value in the middle is not a number, and stays the only one.
        const int64_t at = (s.N * s.C - 1) / 2;
        std::vector<float> with_nan = values;
        with_nan[size_t(at)] = std::numeric_limits<float>::quiet_NaN();
        const DeviceArray<floatX> in_with_nan(cases.device, with_nan);
        gelu_forward(cases.device, out.matrix(s.N, s.C), in_with_nan.matrix(s.N, s.C));
        std::vector<double> is_nan;
        for (double value : out.values()) is_nan.push_back(std::isnan(value));
        cases.record("gelu_forward NaN", shape, is_nan, EXACT);
    }
}
