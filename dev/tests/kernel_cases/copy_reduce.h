// Cases of copy.cuh and reduce.cuh: flat arrays and views, aligned and not, from one element to more than a launch has
// threads; infinities and NaN at every place where one could be overlooked.
#pragma once

#include <limits>

#include "cases.h"
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/reduce.cuh"

// A view into an array: `offset` elements from its start, rows `gap` elements apart.
struct ViewShape {
    int64_t rows, cols, gap, offset;
    std::string name() const {
        return "rows=" + std::to_string(rows) + " cols=" + std::to_string(cols) + " gap=" + std::to_string(gap) +
               " offset=" + std::to_string(offset);
    }
    int64_t elements() const { return offset + (rows - 1) * (cols + gap) + cols; }
    template <class T>
    Matrix<T> of(const DeviceArray<T>& array) const {
        return {array.data() + offset, rows, cols, cols + gap};
    }
};

template <class T, class U>
void copy_cases(Cases& cases, const std::string& types, Bounds add_bounds) {
    const ViewShape shapes[] = {
        {1, 1, 0, 0},     {1, 7, 0, 0},      {1, 8, 0, 0},    {1, 8, 0, 1},     {1, 1000, 0, 0}, {1, 40000, 0, 0},
        {1, 40003, 0, 8}, {1, 64, 0, 8},     {3, 8, 0, 0},    {3, 8, 8, 0},     {3, 8, 1, 0},    {5, 24, 8, 8},
        {5, 24, 8, 4},    {2, 31, 1, 0},     {33, 40, 0, 0},  {33, 40, 80, 40}, {33, 41, 0, 0},  {700, 16, 16, 0},
        {9, 4104, 8, 0},  {9, 3000, 24, 16}, {4, 9000, 3, 0}, {65, 264, 0, 0}};
    for (const ViewShape& to_shape : shapes) {
        // The source has another stride and start, aligned where the target's are.
        const int64_t odd = (to_shape.gap % 8 || to_shape.offset % 8) ? 3 : 8;
        const ViewShape from_shape{to_shape.rows, to_shape.cols, to_shape.gap ? to_shape.gap + odd : 0,
                                   to_shape.offset ? to_shape.offset + odd : 0};
        const DeviceArray<U> from(cases.device, normal_values(1, from_shape.elements()));
        const Matrix<const U> source = from_shape.of(from);
        const std::vector<float> before = normal_values(2, to_shape.elements());
        DeviceArray<T> copied(cases.device, before), added(cases.device, before), zeroed(cases.device, before);
        copy_rows(cases.device, to_shape.of(copied), source);
        add_rows(cases.device, to_shape.of(added), source);
        fill_zero(cases.device, to_shape.of(zeroed));
        cases.record("copy_rows " + types, to_shape.name(), copied.values(), EXACT);
        cases.record("add_rows " + types, to_shape.name(), added.values(), add_bounds);
        cases.record("fill_zero " + types, to_shape.name(), zeroed.values(), EXACT);
    }
}

inline void reduce_cases(Cases& cases) {
    cases.give_scratch(reduce_scratch_bytes());
    const Device& device = cases.device;
    const int64_t lengths[] = {0,   1,    2,    7,    31,   32,   33,   63,    255,   256,   257,
                               511, 1023, 1024, 1025, 2047, 4095, 4097, 10000, 65536, 65537, 300001};
    for (const int64_t n : lengths) {
        const std::string shape = "n=" + std::to_string(n);
        const DeviceArray<floatS> x(device, normal_values(3, n, 1, 0.5f));
        const DeviceArray<double> total(device, std::vector<double>{17});
        add_sum(device, total, x, n);
        cases.record("add_sum", shape, total.values(), {1e-12, 1e-12});
        cases.record("sum_of_squares", shape, {sum_of_squares(device, x.data(), n)}, {1e-12, 1e-12});
    }
    // Squares beyond the range of fp32; many equal values, whose sum in fp32 would stop growing.
    const DeviceArray<floatS> huge(device, std::vector<float>(10, 0x1p80f)),
        ones(device, std::vector<float>(100000, 3));
    cases.record("sum_of_squares", "huge", {sum_of_squares(device, huge.data(), 10)}, {1e-12, 1e-12});
    cases.record("sum_of_squares", "equal", {sum_of_squares(device, ones.data(), 100000)}, {1e-12, 1e-12});

    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const auto find = [&](const std::string& types, auto type) {
        using T = decltype(type);
        for (const int64_t n : lengths) {
            std::vector<double> found;
            std::vector<float> values = normal_values(4, n, 1e30f);
            const auto look = [&] {
                const DeviceArray<T> x(device, values);
                found.push_back(double(first_nonfinite(device, x.data(), n)));
            };
            look();
            for (const int64_t place : {n - 1, n / 2, n / 3, int64_t(0)})  // the earlier is to be found, each time
                if (place >= 0 && place < n) {
                    values[place] = place % 3 == 0 ? nan : place % 3 == 1 ? infinity : -infinity;
                    look();
                }
            cases.record("first_nonfinite " + types, "n=" + std::to_string(n), found, EXACT);
        }
    };
    find("floatS", floatS());
    find("floatX", floatX());

    // Only GPUs leave partial sums to a second kernel.
    for (const int64_t rows : {1, 2, 63, 64, 65, 257, 300})
        for (const int64_t cols : {8, 24, 40}) {
            const int64_t split = cols / 16 * 8;
            const std::vector<float> values = normal_values(5, rows * cols), before = normal_values(6, cols);
            const DeviceArray<float> partial(device, values);
            const DeviceArray<float> first(device, std::vector<float>(before.begin(), before.begin() + split));
            const DeviceArray<float> second(device, std::vector<float>(before.begin() + split, before.end()));
#ifdef USE_CUDA
            add_row_sums(device, first, second, partial.matrix(rows, cols), split);
#else
            for (int64_t i = 0; i < rows * cols; i++)
                (i % cols < split ? first.data() + i % cols : second.data() + i % cols - split)[0] += values[i];
#endif
            std::vector<double> sums = first.values();
            const std::vector<double> rest = second.values();
            sums.insert(sums.end(), rest.begin(), rest.end());
            cases.record("add_row_sums", "rows=" + std::to_string(rows) + " cols=" + std::to_string(cols), sums,
                         {1e-6, 1e-6});
        }
}

inline void copy_reduce_cases(Cases& cases) {
    copy_cases<floatX, floatS>(cases, "floatX <- floatS", {});
    copy_cases<floatS, floatX>(cases, "floatS <- floatX", {});
    copy_cases<floatR, floatX>(cases, "floatR <- floatX", {});
    copy_cases<floatS, floatS>(cases, "floatS <- floatS", {});
    reduce_cases(cases);
}
