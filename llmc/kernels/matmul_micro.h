// The innermost layer of the matrix product: packing a panel, multiplying two panels into one tile of sums, and writing
// that tile out, once per instruction set. matmul.cuh holds the loops around it and the picture.
//
// A panel is R rows of an operand (R = MR on the left, NR on the right) over a range of the depth k, in the order in
// which the multiplication reads it:
//
//   floats  [k][R]            fp32; also bf16 widened while packing, on CPUs without bf16 products
//   pairs   [k/2][R][2]       bf16, two neighbours in k side by side, as vdpbf16ps and the right side of AMX want them
//   tiles   [k/32][R][32]     bf16, the left side of AMX
//
// Rows beyond the matrix repeat its last row and are never written out; depth beyond the end is packed as zeros.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "llmc/common.h"
#include "llmc/cpu.h"
#include "llmc/kernels/gelu.h"

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")))
#define TARGET_AMX __attribute__((target("amx-tile,amx-bf16")))

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A matrix product's operand: element (r, k) lies at data[r * stride + k] when k_contiguous, else data[k * stride + r].
template <class T>
struct Operand {
    const T* data;
    int64_t stride;
    bool k_contiguous;

    const T* at(int64_t r, int64_t k) const { return data + (k_contiguous ? r * stride + k : k * stride + r); }
    Operand from(int64_t r, int64_t k) const { return {at(r, k), stride, k_contiguous}; }
};

enum class Activation { none, gelu };

// What happens to a tile of finished sums on its way to memory. T is the type of the operands, Out that of the result.
template <class T, class Out>
struct Epilogue {
    Matrix<Out> out;
    const T* bias = nullptr;                   // [out.cols], added first
    Activation activation = Activation::none;  // applied after the bias
    Matrix<T> pre_activation = {};             // when given receives the value before the activation
    Matrix<const T> gelu_input = {};           // when given the result is multiplied by gelu'(gelu_input)
    Matrix<const Out> addend = {};             // when given is added last; may be `out`
    SumOf<T>* left_sums = nullptr;             // [out.rows] += sum over k of the left operand: the bias gradient
};

// ---------------------------------------------------------------------------------------------------------------------
// Packing. `rows` rows of the source over `depth` elements become ceil(rows / R) panels, one after the other. A source
// that is contiguous in k is walked panel by panel; one that is contiguous in its rows, step by step across all panels,
// so that memory is read in runs.

// The plain loop.
template <int R, class T>
void pack_floats_avx2(void* panels, Operand<T> source, int64_t rows, int64_t depth) {
    float* out = static_cast<float*>(panels);
    for (int64_t r0 = 0; r0 < rows; r0 += R)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t r = r0; r < r0 + R; r++) *out++ = *source.at(std::min(r, rows - 1), k);
}

// 16 x 16 transposition of 32-bit elements, in two rounds within 128-bit lanes and two across them.
TARGET_AVX512 inline void transpose16(__m512i (&v)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline uint32_t low_bits(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// Up to 16 floats, or bf16 widened to floats.
TARGET_AVX512 inline __m512i load_floats(const float* p, int64_t n) {
    return _mm512_maskz_loadu_epi32(__mmask16(low_bits(n)), p);
}
TARGET_AVX512 inline __m512i load_floats(const bf16* p, int64_t n) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(low_bits(n)), p)), 16);
}

// A run of a k-contiguous source is too short for the hardware to see sixteen streams in it, so the rows of the next
// sixteen are fetched ahead.
template <class T>
inline void prefetch_rows(const Operand<T>& source, int64_t r, int64_t k, int64_t rows) {
    for (int64_t i = r; i < std::min(r + 16, rows); i++) _mm_prefetch(source.at(i, k), _MM_HINT_T0);
}

template <int R, class T>
TARGET_AVX512 void pack_floats_avx512(void* panels, Operand<T> source, int64_t rows, int64_t depth) {
    float* out = static_cast<float*>(panels);
    if (!source.k_contiguous) {
        for (int64_t k = 0; k < depth; k++, out += R)
            for (int64_t r0 = 0; r0 < rows; r0 += R)
                for (int64_t r = 0; r < R; r += 16)
                    _mm512_mask_storeu_epi32(out + r0 * depth + r, __mmask16(low_bits(R - r)),
                                             load_floats(source.at(r0 + r, k), rows - r0 - r));
        return;
    }
    for (int64_t r0 = 0; r0 < rows; r0 += R, out += R * depth)
        for (int64_t r = 0; r < R; r += 16)
            for (int64_t k = 0; k < depth; k += 16) {
                __m512i v[16];
                for (int i = 0; i < 16; i++)
                    v[i] = load_floats(source.at(std::min(r0 + r + i, rows - 1), k), depth - k);
                prefetch_rows(source, r0 + r + 16, k, rows);
                transpose16(v);
                for (int i = 0; i < std::min<int64_t>(16, depth - k); i++)
                    _mm512_mask_storeu_epi32(out + (k + i) * R + r, __mmask16(low_bits(R - r)), v[i]);
            }
}

// Columns of rows k and k + 1, contiguous in memory, become 2 x 16 pairs. Beyond the depth a pair's half is zero.
TARGET_AVX512 inline void load_pairs(__m512i& first, __m512i& second, Operand<bf16> source, int64_t r, int64_t k,
                                     int64_t rows, int64_t depth) {
    const __mmask32 mask = low_bits(rows - r);
    const __m512i low = _mm512_maskz_loadu_epi16(k < depth ? mask : 0, source.at(r, k));
    const __m512i high = _mm512_maskz_loadu_epi16(k + 1 < depth ? mask : 0, source.at(r, k + 1));
    const __m512i lanes = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i l = _mm512_permutexvar_epi64(lanes, low), h = _mm512_permutexvar_epi64(lanes, high);
    first = _mm512_unpacklo_epi16(l, h);
    second = _mm512_unpackhi_epi16(l, h);
}

// Group: the depth is padded with zeros to a multiple of it, 2 for vdpbf16ps and 32 for AMX.
template <int R, int Group>
TARGET_AVX512 void pack_pairs_avx512(void* panels, Operand<bf16> source, int64_t rows, int64_t depth) {
    uint32_t* out = static_cast<uint32_t*>(panels);
    const int64_t pairs = round_up(depth, Group) / 2;
    if (!source.k_contiguous) {
        for (int64_t k = 0; k < 2 * pairs; k += 2, out += R)
            for (int64_t r0 = 0; r0 < rows; r0 += R)
                for (int64_t r = 0; r < R; r += 32) {
                    __m512i first, second;
                    load_pairs(first, second, source, r0 + r, k, rows, depth);
                    uint32_t* p = out + r0 * pairs + r;
                    _mm512_mask_storeu_epi32(p, __mmask16(low_bits(R - r)), first);
                    if (R > 16) _mm512_storeu_epi32(p + 16, second);
                }
        return;
    }
    for (int64_t r0 = 0; r0 < rows; r0 += R, out += R * pairs)
        for (int64_t r = 0; r < R; r += 16)
            for (int64_t k = 0; k < 2 * pairs; k += 32) {
                __m512i v[16];
                for (int i = 0; i < 16; i++)
                    v[i] = _mm512_maskz_loadu_epi16(low_bits(depth - k), source.at(std::min(r0 + r + i, rows - 1), k));
                prefetch_rows(source, r0 + r + 16, k, rows);
                transpose16(v);
                for (int i = 0; i < std::min<int64_t>(16, pairs - k / 2); i++)
                    _mm512_mask_storeu_epi32(out + (k / 2 + i) * R + r, __mmask16(low_bits(R - r)), v[i]);
            }
}

TARGET_AVX512 inline void pack_tiles_amx(void* panels, Operand<bf16> source, int64_t rows, int64_t depth) {
    const int64_t padded = round_up(depth, 32);
    for (int64_t k = 0; k < depth; k += 32)
        for (int64_t r0 = 0; r0 < rows; r0 += 32) {
            bf16* out = static_cast<bf16*>(panels) + r0 * padded + k * 32;
            if (source.k_contiguous) {
                for (int r = 0; r < 32; r++)
                    _mm512_storeu_si512(
                        out + r * 32,
                        _mm512_maskz_loadu_epi16(low_bits(depth - k), source.at(std::min(r0 + r, rows - 1), k)));
                continue;
            }
            __m512i v[2][16];
            for (int i = 0; i < 16; i++) load_pairs(v[0][i], v[1][i], source, r0, k + 2 * i, rows, depth);
            for (int half = 0; half < 2; half++) {
                transpose16(v[half]);
                for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (half * 16 + i) * 32, v[half][i]);
            }
        }
}

// sums[r] += sum over k of source(r, k), for a source whose rows are contiguous: the bias gradient. Every step is a
// jump in memory, so lines are fetched ahead.
template <class T>
void add_sums_avx2(float* sums, Operand<T> source, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t r = 0; r < rows; r++) sums[r] += float(*source.at(r, k));
}
template <class T>
TARGET_AVX512 void add_sums_avx512(float* sums, Operand<T> source, int64_t rows, int64_t depth) {
    for (int64_t r = 0; r < rows; r += 128) {
        __m512 part[8] = {};
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t i = 0; i < 128; i += 64 / int64_t(sizeof(T)))
                _mm_prefetch(source.data + (k + 16) * source.stride + r + i, _MM_HINT_T0);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                part[i] = _mm512_add_ps(part[i], (__m512)load_floats(source.at(r + 16 * i, k), rows - r - 16 * i));
        }
        for (int i = 0; i < 8; i++) {
            const __mmask16 mask = __mmask16(low_bits(rows - r - 16 * i));
            float* p = sums + r + 16 * i;
            _mm512_mask_storeu_ps(p, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), part[i]));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Multiplication: tile [MR, NR] (+)= left panel [MR, depth] x right panel [depth, NR], sums kept in registers. Vector
// kernels start each block of the depth at zero, which keeps rounding small over tens of thousands of tokens.

// Element (i, step) of the left panel lies at data + i * row_bytes + step * step_bytes, packed or in place; a step is
// as much depth as one instruction takes: 1, 2 (pairs) or 32 (AMX) elements.
struct LeftPanel {
    const void* data;
    int64_t row_bytes, step_bytes;
};

template <class V>
inline V load_left(const LeftPanel& left, const char* a0, const char* a3, int i) {
    V value;
    std::memcpy(&value, i < 3 ? a0 + i * left.row_bytes : a3 + (i - 3) * left.row_bytes, sizeof(V));
    return value;
}

inline void multiply_avx2(int64_t depth, const LeftPanel& left, const void* right, float* tile, bool accumulate) {
    const char *a0 = static_cast<const char*>(left.data), *a3 = a0 + 3 * left.row_bytes;
    const float* b = static_cast<const float*>(right);
    __m256 sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) sum[i][j] = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k += 1, a0 += left.step_bytes, a3 += left.step_bytes, b += 16) {
        const __m256 bk[2] = {_mm256_loadu_ps(b), _mm256_loadu_ps(b + 8)};
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            const __m256 ai = _mm256_set1_ps(load_left<float>(left, a0, a3, i));
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) sum[i][j] = _mm256_fmadd_ps(ai, bk[j], sum[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            float* p = tile + i * 16 + j * 8;
            _mm256_storeu_ps(p, accumulate ? _mm256_add_ps(sum[i][j], _mm256_loadu_ps(p)) : sum[i][j]);
        }
}

TARGET_AVX512 inline void multiply_avx512(int64_t depth, const LeftPanel& left, const void* right, float* tile,
                                          bool accumulate) {
    const char *a0 = static_cast<const char*>(left.data), *a3 = a0 + 3 * left.row_bytes;
    const float* b = static_cast<const float*>(right);
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k += 1, a0 += left.step_bytes, a3 += left.step_bytes, b += 64) {
        const __m512 bk[4] = {_mm512_loadu_ps(b), _mm512_loadu_ps(b + 16), _mm512_loadu_ps(b + 32),
                              _mm512_loadu_ps(b + 48)};
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            const __m512 ai = _mm512_set1_ps(load_left<float>(left, a0, a3, i));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_fmadd_ps(ai, bk[j], sum[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float* p = tile + i * 64 + j * 16;
            _mm512_storeu_ps(p, accumulate ? _mm512_add_ps(sum[i][j], _mm512_loadu_ps(p)) : sum[i][j]);
        }
}

TARGET_AVX512_BF16 inline void multiply_avx512_bf16(int64_t depth, const LeftPanel& left, const void* right,
                                                    float* tile, bool accumulate) {
    const char *a0 = static_cast<const char*>(left.data), *a3 = a0 + 3 * left.row_bytes;
    const int32_t* b = static_cast<const int32_t*>(right);
    __m512 sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k += 2, a0 += left.step_bytes, a3 += left.step_bytes, b += 64) {
        __m512bh bk[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) bk[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < 6; i++) {
            const __m512bh ai = (__m512bh)_mm512_set1_epi32(load_left<int32_t>(left, a0, a3, i));
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], ai, bk[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float* p = tile + i * 64 + j * 16;
            _mm512_storeu_ps(p, accumulate ? _mm512_add_ps(sum[i][j], _mm512_loadu_ps(p)) : sum[i][j]);
        }
}

// Eight tile registers: 0..3 the 2 x 2 sums [16, 16], 4..5 the left [16, 32], 6..7 the right [32, 16] as pairs.
TARGET_AMX inline void multiply_amx(int64_t depth, const LeftPanel& left, const void* right, float* tile,
                                    bool accumulate) {
    const char* a = static_cast<const char*>(left.data);
    const char* b = static_cast<const char*>(right);
    if (accumulate) {
        _tile_loadd(0, tile, 128);
        _tile_loadd(1, tile + 16, 128);
        _tile_loadd(2, tile + 16 * 32, 128);
        _tile_loadd(3, tile + 16 * 32 + 16, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32, a += left.step_bytes, b += 2048) {
        _tile_loadd(4, a, left.row_bytes);
        _tile_loadd(6, b, 128);
        _tile_loadd(7, b + 64, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * left.row_bytes, left.row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, tile, 128);
    _tile_stored(1, tile + 16, 128);
    _tile_stored(2, tile + 16 * 32, 128);
    _tile_stored(3, tile + 16 * 32 + 16, 128);
}

// Every thread sets up all eight tile registers as 16 rows of 64 bytes before it multiplies, and lets them go after.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig TILE_CONFIG;
TARGET_AMX inline void amx_begin() { _tile_loadconfig(&TILE_CONFIG); }
TARGET_AMX inline void amx_end() { _tile_release(); }

// ---------------------------------------------------------------------------------------------------------------------
// Finishing: the sums of a tile, rows NR apart, become rows x cols elements of the result at (row, col). Written as
// plain loops which the compiler vectorises for the width of the function they are inlined into.

// Asks for the lines that a tile will be written to (and those that it reads) while its last products are being summed.
template <class T, class Out>
inline void prefetch_tile(const Epilogue<T, Out>& e, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    const auto lines = [&](auto matrix) {
        if (matrix.data)
            for (int64_t i = row; i < row + rows; i++)
                for (int64_t j = col; j < col + cols; j += 64 / int64_t(sizeof(*matrix.data)))
                    _mm_prefetch(matrix.row(i) + j, _MM_HINT_T0);
    };
    lines(e.out);
    lines(e.pre_activation);
    lines(e.gelu_input);
    if (e.addend.data != e.out.data) lines(e.addend);
}

struct PlainStore {
    template <class To>
    [[gnu::always_inline]] static void store(To* to, const float* from, int64_t n) {
        for (int64_t j = 0; j < n; j++) to[j] = from[j];
    }
};
struct Bf16Store : PlainStore {
    using PlainStore::store;
    TARGET_AVX512_BF16 static void store(bf16* to, const float* from, int64_t n) {
        for (int64_t j = 0; j < n; j += 32) {
            const __m512 low = _mm512_maskz_loadu_ps(__mmask16(low_bits(n - j)), from + j);
            const __m512 high = _mm512_maskz_loadu_ps(__mmask16(low_bits(n - j - 16)), from + j + 16);
            _mm512_mask_storeu_epi16(to + j, low_bits(n - j), (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
};

template <int NR, class Store, class T, class Out>
[[gnu::always_inline]] inline void finish_tile(const Epilogue<T, Out>& e, float* tile, int64_t row, int64_t col,
                                               int64_t rows, int64_t cols) {
    if (e.bias)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) tile[i * NR + j] += float(e.bias[col + j]);
    if (e.pre_activation.data)
        for (int64_t i = 0; i < rows; i++) Store::store(e.pre_activation.row(row + i) + col, tile + i * NR, cols);
    if (e.activation == Activation::gelu)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) tile[i * NR + j] = gelu_value(tile[i * NR + j]);
    if (e.gelu_input.data)
        for (int64_t i = 0; i < rows; i++) {
            const T* x = e.gelu_input.row(row + i) + col;
            for (int64_t j = 0; j < cols; j++) tile[i * NR + j] *= gelu_gradient(float(x[j]));
        }
    for (int64_t i = 0; i < rows; i++) {
        if (e.addend.data) {
            const Out* addend = e.addend.row(row + i) + col;
            for (int64_t j = 0; j < cols; j++) tile[i * NR + j] += float(addend[j]);
        }
        Store::store(e.out.row(row + i) + col, tile + i * NR, cols);
    }
}

// Whole tiles get loops of constant length.
template <int NR, class Store, class T, class Out>
[[gnu::always_inline]] inline void finish(const Epilogue<T, Out>& e, float* tile, int64_t row, int64_t col,
                                          int64_t rows, int64_t cols) {
    if (cols == NR) finish_tile<NR, Store>(e, tile, row, col, rows, NR);
    else finish_tile<NR, Store>(e, tile, row, col, rows, cols);
}
template <class T, class Out>
void finish_avx2(const Epilogue<T, Out>& e, float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    finish<16, PlainStore>(e, tile, row, col, rows, cols);
}
template <class T, class Out>
TARGET_AVX512 void finish_avx512(const Epilogue<T, Out>& e, float* tile, int64_t row, int64_t col, int64_t rows,
                                 int64_t cols) {
    finish<64, PlainStore>(e, tile, row, col, rows, cols);
}
template <int NR, class T, class Out>
TARGET_AVX512_BF16 void finish_bf16(const Epilogue<T, Out>& e, float* tile, int64_t row, int64_t col, int64_t rows,
                                    int64_t cols) {
    finish<NR, Bf16Store>(e, tile, row, col, rows, cols);
}

// ---------------------------------------------------------------------------------------------------------------------
// The functions of one instruction set, and the shapes they work in.
template <class T, class Out>
struct MicroKernel {
    int64_t mr = 6, nr = 64;                 // tile of sums
    int64_t mc = 192, nc = 384, kc = 256;    // blocks: rows, columns, depth
    int64_t group = 1;                       // panels pad the depth to a multiple of this; one step of a left panel
    int64_t element_bytes = 4;               // of a packed element
    int64_t row_bytes = 4, step_bytes = 24;  // of packed left panels
    bool left_in_place = false;              // reads whole panels and steps of the left operand where they lie

    using Pack = void (*)(void* panels, Operand<T> source, int64_t rows, int64_t depth);
    Pack pack_left = pack_floats_avx512<6, T>, pack_right = pack_floats_avx512<64, T>;
    void (*add_sums)(SumOf<T>* sums, Operand<T> source, int64_t rows, int64_t depth) = add_sums_avx512<T>;
    void (*multiply)(int64_t depth, const LeftPanel& left, const void* right, float* tile,
                     bool accumulate) = multiply_avx512;
    void (*finish)(const Epilogue<T, Out>&, float* tile, int64_t row, int64_t col, int64_t rows,
                   int64_t cols) = finish_avx512<T, Out>;
};

template <class T, class Out>
MicroKernel<T, Out> micro_kernel(Isa isa) {
    MicroKernel<T, Out> kernel;
    kernel.left_in_place = std::is_same_v<T, float>;
    if (isa == Isa::avx2) {
        kernel.nr = 16;
        kernel.pack_left = pack_floats_avx2<6, T>;
        kernel.pack_right = pack_floats_avx2<16, T>;
        kernel.add_sums = add_sums_avx2<T>;
        kernel.multiply = multiply_avx2;
        kernel.finish = finish_avx2<T, Out>;
    }
    if constexpr (std::is_same_v<T, bf16>) {
        if (isa >= Isa::avx512_bf16) {
            kernel.group = kernel.element_bytes = 2;
            kernel.left_in_place = true;
            kernel.pack_left = pack_pairs_avx512<6, 2>;
            kernel.pack_right = pack_pairs_avx512<64, 2>;
            kernel.multiply = multiply_avx512_bf16;
            kernel.finish = finish_bf16<64, T, Out>;
        }
        if (isa == Isa::amx) {
            kernel.mr = kernel.nr = kernel.group = 32;
            kernel.row_bytes = 64;
            kernel.step_bytes = 2048;
            kernel.pack_left = pack_tiles_amx;
            kernel.pack_right = pack_pairs_avx512<32, 32>;
            kernel.multiply = multiply_amx;
            kernel.finish = finish_bf16<32, T, Out>;
        }
    }
    return kernel;
}
