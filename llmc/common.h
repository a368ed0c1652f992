// What every file shares: storage types, the matrix view, errors that carry an exit code, printf to a string.
//
// Shape vocabulary, used in every comment: N tokens in a chunk, C channels, NH heads, HS = C/NH head size,
// L layers, T context, V vocabulary, Vp padded vocabulary, S sequences, p stages, m chunks.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

// Functions that kernels call, too.
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Storage types. One of PRECISION_FP32, PRECISION_BF16, PRECISION_FP64 is defined by the Makefile (fp32 where none is).
//
//   floatX  weights and activations as matrix products read them
//   floatR  the residual stream and its gradient. On the CPU it keeps fp32 beside bf16 products: its many small
//           additions are where bf16 loses most, and it is one activation in sixteen. On a GPU, where the kernels that
//           read it are bound by memory, it is bf16 as well.
//   floatS  sums, statistics, gradients of weights, master weights, moments

// A bfloat16 is the upper half of an fp32; conversion rounds to nearest even and keeps NaN quiet.
struct bf16 {
    uint16_t bits = 0;
    bf16() = default;
    HOST_DEVICE bf16(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
    }
    HOST_DEVICE operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

#if defined(PRECISION_FP64)
using floatX = double;
using floatR = double;
using floatS = double;
#define PRECISION_NAME "fp64"
#elif defined(PRECISION_BF16)
using floatX = bf16;
#ifdef USE_CUDA
using floatR = bf16;
#else
using floatR = float;
#endif
using floatS = float;
#define PRECISION_NAME "bf16"
#else
using floatX = float;
using floatR = float;
using floatS = float;
#define PRECISION_NAME "fp32"
#endif

// LayerNorm's weights, which stay near 1, are stored in bf16 less 1: near 1 most updates would be smaller than half the
// distance of two numbers of bf16, and all of them rounded away.
constexpr floatS NORM_CENTER = std::is_same_v<floatX, floatS> ? 0 : 1;

// ---------------------------------------------------------------------------------------------------------------------
// Row-major view of a matrix [rows, cols] whose rows lie `stride` elements apart. It owns nothing.
template <class T>
struct Matrix {
    T* data = nullptr;
    int64_t rows = 0, cols = 0, stride = 0;

    Matrix() = default;
    HOST_DEVICE Matrix(T* data, int64_t rows, int64_t cols) : data(data), rows(rows), cols(cols), stride(cols) {}
    HOST_DEVICE Matrix(T* data, int64_t rows, int64_t cols, int64_t stride)
        : data(data), rows(rows), cols(cols), stride(stride) {}
    template <class U>
    requires(std::is_same_v<U, const T> && !std::is_same_v<U, T>) HOST_DEVICE operator Matrix<U>() const {
        return {data, rows, cols, stride};
    }

    HOST_DEVICE T* row(int64_t i) const { return data + i * stride; }
    Matrix row_range(int64_t begin, int64_t count) const { return {row(begin), count, cols, stride}; }
    Matrix column_range(int64_t begin, int64_t count) const { return {data + begin, rows, count, stride}; }
    int64_t size() const { return rows * cols; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Errors. A Failure ends the program with its exit code and its message, one sentence or more: what was asked, what
// was found, what to do. The codes are a contract with requeue scripts (README, "Exit codes").
enum ExitCode {
    EXIT_LAYOUT_DIFFERS = 1,
    EXIT_CONFIG = 2,
    EXIT_DATA = 3,
    EXIT_CHECKPOINT = 4,
    EXIT_MEMORY = 5,
    EXIT_HARDWARE = 16,
    EXIT_NONFINITE = 17,
    EXIT_PEER = 20,
    EXIT_STORAGE = 21,
    EXIT_INTERNAL = 70,
    EXIT_REQUEUE = 75,
};

struct Failure : std::runtime_error {
    int exit_code;
    Failure(int exit_code, const std::string& message) : std::runtime_error(message), exit_code(exit_code) {}
};

// printf to a string of any length.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
    va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    std::string text(size_t(std::max(0, std::vsnprintf(nullptr, 0, pattern, arguments))) + 1, '\0');
    std::vsnprintf(text.data(), text.size(), pattern, again);
    va_end(arguments);
    va_end(again);
    text.pop_back();
    return text;
}

HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }
