// What the tests of the kernels share: reproducible inputs, the comparison with plain loops in double, and the run with
// 1, 2 and 3 threads, which must give the same bits. All compile for every PRECISION.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <vector>

#include "llmc/device.h"
#include "llmc/kernels/random.h"

// Rounding of sums and statistics, and of results stored as floatX.
constexpr double bound_s = sizeof(floatS) == 8 ? 1e-13 : 1e-6;
constexpr double bound_x = sizeof(floatX) == 8 ? 1e-13 : sizeof(floatX) == 4 ? 1e-6 : 4e-3;

using Doubles = std::vector<double>;

template <class T>
Doubles to_double(const std::vector<T>& x) {
    return Doubles(x.begin(), x.end());
}

template <class T>
std::vector<T> random_vector(int64_t n, uint64_t stream, double sigma = 1) {
    std::vector<T> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = T(floatS(sigma * normal(42, stream, i)));
    return x;
}

inline std::vector<int32_t> random_indices(int64_t n, int64_t limit, uint64_t stream) {
    std::vector<int32_t> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = int32_t(uniform(42, stream, i) * double(limit));
    return x;
}

// |got - want| / |want| over the whole tensor; a NaN fails.
template <class T>
void expect_close(const char* name, const std::vector<T>& got, const Doubles& want, double bound) {
    ASSERT_EQ(got.size(), want.size());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        difference += (double(got[i]) - want[i]) * (double(got[i]) - want[i]);
        norm += want[i] * want[i];
    }
    const double error = std::sqrt(difference / std::max(norm, 1e-300));
    std::printf("    %-10s error %.1e, bound %.1e\n", name, error, bound);
    EXPECT_TRUE(error <= bound) << name << ": " << error;
}

// Runs the case with 1, 2 and 3 threads; it returns its outputs, which must agree bit for bit.
inline void for_threads(const std::function<Doubles(const Device&)>& run_case) {
    std::vector<std::byte> scratch(1 << 22);
    Doubles first;
    for (int threads = 1; threads <= 3; threads++) {
        const Doubles outputs = run_case(Device{threads, scratch.data(), scratch.size()});
        if (threads == 1) first = outputs;
        ASSERT_EQ(outputs.size(), first.size());
        const size_t bytes = first.size() * sizeof(double);
        EXPECT_TRUE(bytes == 0 || std::memcmp(outputs.data(), first.data(), bytes) == 0) << threads << " threads";
    }
}

template <class... V>
Doubles concatenated(const V&... vectors) {
    Doubles all;
    (all.insert(all.end(), vectors.begin(), vectors.end()), ...);
    return all;
}
