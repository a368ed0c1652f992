// What the cases of the kernels share, whatever the device and the precision they are built for: inputs that are the
// same everywhere, memory on the device, and the record of outputs that kernel_cases.cpp writes and compares.
#pragma once

#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "llmc/device.h"
#include "llmc/kernels/random.h"

// Inputs are numbers of bf16, so that no build rounds them. Streams make them differ.
inline std::vector<float> normal_values(uint64_t stream, int64_t n, float sigma = 1, float mean = 0) {
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; i++) values[i] = bf16(mean + sigma * normal(7, stream, uint64_t(i)));
    return values;
}
// Whole numbers in [0, limit).
inline std::vector<int32_t> index_values(uint64_t stream, int64_t n, int64_t limit) {
    std::vector<int32_t> values(n);
    for (int64_t i = 0; i < n; i++) values[i] = int32_t(uniform(7, stream, uint64_t(i)) * double(limit));
    return values;
}

// An array on the device, exactly as long as asked.
template <class T>
class DeviceArray {
public:
    // NaN in all elements: outputs that a kernel must write.
    DeviceArray(const Device& device, int64_t n) : DeviceArray(device, n, nullptr) {
        std::vector<T> bytes(n);
        std::memset(static_cast<void*>(bytes.data()), 0xff, size_t(n) * sizeof(T));
        if (n > 0) upload(device, data_, bytes.data(), n);
    }
    template <class U>
    DeviceArray(const Device& device, const std::vector<U>& values) : DeviceArray(device, values.size(), nullptr) {
        const std::vector<T> converted(values.begin(), values.end());
        if (size_ > 0) upload(device, data_, converted.data(), size_);
    }
    ~DeviceArray() { free_on_device(reinterpret_cast<std::byte*>(data_), size_ * int64_t(sizeof(T))); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    operator T*() const { return data_; }
    T* data() const { return data_; }
    int64_t size() const { return size_; }
    Matrix<T> matrix(int64_t rows, int64_t cols) const { return {data_, rows, cols}; }
    Matrix<T> matrix(int64_t rows, int64_t cols, int64_t stride) const { return {data_, rows, cols, stride}; }

    std::vector<double> values() const {
        std::vector<T> host(size_);
        if (size_ > 0) download(device_, host.data(), data_, size_);
        return std::vector<double>(host.begin(), host.end());
    }

private:
    DeviceArray(const Device& device, int64_t n, std::nullptr_t)
        : device_(device), size_(n), data_(reinterpret_cast<T*>(allocate_on_device(n * int64_t(sizeof(T))))) {}

    const Device& device_;
    const int64_t size_;
    T* const data_;
};

// How far an output may be from the reference: |output - reference| / |reference| over the whole array.
struct Bounds {
    double fp32 = 1e-5, bf16 = 4e-3;
};
constexpr Bounds EXACT{0, 0}, ATTENTION_GRADIENT{1e-5, 6e-3};

struct Record {
    double bound = 0;
    std::vector<double> values;
};
// By kernel and output ("layernorm_backward din"), then by shape ("N=3 C=24").
using Records = std::map<std::string, std::map<std::string, Record>>;

class Cases {
    OpenDevice opened_{2};

public:
    Device device = opened_.device;
    Records records;

    Cases() = default;
    ~Cases() { free_on_device(device.scratch, int64_t(device.scratch_bytes)); }
    Cases(const Cases&) = delete;
    Cases& operator=(const Cases&) = delete;

    // From here on kernels have exactly so much scratch.
    void give_scratch(size_t bytes) {
        free_on_device(device.scratch, int64_t(device.scratch_bytes));
        device.scratch = allocate_on_device(int64_t(bytes));
        device.scratch_bytes = bytes;
    }

    // Of an output array, all of it: what lies between rows must have stayed as it was.
    void record(const std::string& output, const std::string& shape, std::vector<double> values, Bounds bounds = {}) {
        const double bound = sizeof(floatX) == 2 ? bounds.bf16 : bounds.fp32;
        if (!records[output].try_emplace(shape, Record{bound, std::move(values)}).second)
            throw std::logic_error(output + " " + shape + " is recorded twice");
    }
};
