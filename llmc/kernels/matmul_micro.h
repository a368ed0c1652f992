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

// g++ 12 takes the undefined operand inside many of its own AVX-512 intrinsics for an uninitialised variable.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <type_traits>

#include "llmc/common.h"
#include "llmc/cpu.h"
#include "llmc/kernels/gelu.h"

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define TARGET_AVX512_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")))
#define TARGET_AMX __attribute__((target("amx-tile,amx-bf16")))

// A matrix product's operand: element (r, k) lies at data[r * stride + k] when k_contiguous, else data[k * stride + r].
template <class T> struct Operand {
    const T* data;
    int64_t stride;
    bool k_contiguous;

    const T* at(int64_t r, int64_t k) const { return data + (k_contiguous ? r * stride + k : k * stride + r); }
};

template <class T> using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Activation { none, gelu };

// What happens to a tile of finished sums on its way to memory. T is the type of the operands, Out that of the result.
template <class T, class Out> struct Epilogue {
    Matrix<Out> out;
    bool accumulate = false;                   // out += sums instead of out = sums
    const T* bias = nullptr;                   // [out.cols], added first
    Activation activation = Activation::none;  // applied after the bias
    Matrix<T> pre_activation = {};             // when given receives the value before the activation
    Matrix<const T> gelu_input = {};           // when given the result is multiplied by gelu'(gelu_input)
    SumOf<T>* left_sums = nullptr;             // [out.rows] += sum over k of the left operand: the bias gradient
};

// ---------------------------------------------------------------------------------------------------------------------
// Packing. One panel of `rows` <= R valid rows and `depth` elements, starting at source.data.

// The plain loop; Group is the number of neighbours in k kept side by side.
template <int R, int Group, class T, class P>
inline void pack_plain(P* panel, Operand<T> source, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < round_up(depth, Group); k++)
        for (int64_t r = 0; r < R; r++)
            panel[k / Group * R * Group + r * Group + k % Group] =
                k < depth ? P(*source.at(std::min(r, rows - 1), k)) : P(0);
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

inline uint32_t low_bits(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }

// Up to 16 floats, or bf16 widened to floats.
TARGET_AVX512 inline __m512i load_floats(const float* p, int64_t n) {
    return _mm512_maskz_loadu_epi32(__mmask16(low_bits(n)), p);
}
TARGET_AVX512 inline __m512i load_floats(const bf16* p, int64_t n) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(low_bits(n)), p)), 16);
}

template <int R, class T>
TARGET_AVX512 void pack_floats_avx512(void* panel, Operand<T> source, int64_t rows, int64_t depth) {
    float* out = static_cast<float*>(panel);
    if (!source.k_contiguous) {
        for (int64_t k = 0; k < depth; k++, out += R)
            for (int r = 0; r < R; r += 16)
                _mm512_mask_storeu_epi32(out + r, __mmask16(low_bits(R - r)), load_floats(source.at(r, k), rows - r));
        return;
    }
    for (int64_t k = 0; k < depth; k += 16)
        for (int r = 0; r < R; r += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++)
                v[i] = load_floats(source.at(std::min<int64_t>(r + i, rows - 1), k), depth - k);
            transpose16(v);
            for (int i = 0; i < std::min<int64_t>(16, depth - k); i++)
                _mm512_mask_storeu_epi32(out + (k + i) * R + r, __mmask16(low_bits(R - r)), v[i]);
        }
}

// Rows k and k + 1 of a source whose rows are contiguous, interleaved to 16 pairs.
TARGET_AVX512 inline __m512i load_pairs(const bf16* row, const bf16* next, int64_t n) {
    const __mmask16 mask = __mmask16(low_bits(n));
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    if (!next) return low;
    return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
}

template <int R>
TARGET_AVX512 void pack_pairs_avx512(void* panel, Operand<bf16> source, int64_t rows, int64_t depth) {
    uint32_t* out = static_cast<uint32_t*>(panel);
    if (!source.k_contiguous) {
        for (int64_t k = 0; k < depth; k += 2, out += R)
            for (int r = 0; r < R; r += 16)
                _mm512_mask_storeu_epi32(
                    out + r, __mmask16(low_bits(R - r)),
                    load_pairs(source.at(r, k), k + 1 < depth ? source.at(r, k + 1) : nullptr, rows - r));
        return;
    }
    for (int64_t k = 0; k < depth; k += 32)
        for (int r = 0; r < R; r += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++)
                v[i] = _mm512_maskz_loadu_epi16(low_bits(depth - k), source.at(std::min<int64_t>(r + i, rows - 1), k));
            transpose16(v);
            for (int i = 0; i < std::min<int64_t>(16, ceil_div(depth - k, 2)); i++)
                _mm512_mask_storeu_epi32(out + (k / 2 + i) * R + r, __mmask16(low_bits(R - r)), v[i]);
        }
}

// Pairs for the right side of AMX: the depth is padded with zeros to whole tiles.
template <int R>
TARGET_AVX512 void pack_pairs_amx(void* panel, Operand<bf16> source, int64_t rows, int64_t depth) {
    pack_pairs_avx512<R>(panel, source, rows, depth);
    uint32_t* out = static_cast<uint32_t*>(panel);
    std::memset(out + ceil_div(depth, 2) * R, 0, size_t(round_up(depth, 32) / 2 - ceil_div(depth, 2)) * R * 4);
}

template <int R>
TARGET_AVX512 void pack_tiles_amx(void* panel, Operand<bf16> source, int64_t rows, int64_t depth) {
    bf16* out = static_cast<bf16*>(panel);
    for (int64_t k = 0; k < depth; k += 32, out += R * 32) {
        const uint32_t mask = low_bits(depth - k);
        if (source.k_contiguous) {
            for (int r = 0; r < R; r++)
                _mm512_storeu_si512(out + r * 32,
                                    _mm512_maskz_loadu_epi16(mask, source.at(std::min<int64_t>(r, rows - 1), k)));
            continue;
        }
        for (int r = 0; r < R; r += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++)
                v[i] = k + 2 * i < depth
                           ? load_pairs(source.at(r, k + 2 * i),
                                        k + 2 * i + 1 < depth ? source.at(r, k + 2 * i + 1) : nullptr, rows - r)
                           : _mm512_setzero_si512();
            transpose16(v);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (r + i) * 32, v[i]);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Multiplication: tile [MR, NR] (+)= left panel [MR, depth] x right panel [depth, NR], sums kept in registers.

struct LeftPanel {
    const void* data;
    int64_t row_bytes = 0, step_bytes = 0;  // AMX only: from row to row, from 32 elements of depth to the next 32
};

inline void multiply_avx2(int64_t depth, LeftPanel left, const void* right, float* tile, bool accumulate) {
    constexpr int MR = 6;
    const float* a = static_cast<const float*>(left.data);
    const float* b = static_cast<const float*>(right);
    __m256 sum[MR][2];
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = accumulate ? _mm256_loadu_ps(tile + i * 16 + j * 8) : _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k++, a += MR, b += 16) {
        const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
        for (int i = 0; i < MR; i++) {
            const __m256 ai = _mm256_broadcast_ss(a + i);
            sum[i][0] = _mm256_fmadd_ps(ai, b0, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(ai, b1, sum[i][1]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) _mm256_storeu_ps(tile + i * 16 + j * 8, sum[i][j]);
}

TARGET_AVX512 inline void multiply_avx512(int64_t depth, LeftPanel left, const void* right, float* tile,
                                          bool accumulate) {
    constexpr int MR = 14;
    const float* a = static_cast<const float*>(left.data);
    const float* b = static_cast<const float*>(right);
    __m512 sum[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = accumulate ? _mm512_loadu_ps(tile + i * 32 + j * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++, a += MR, b += 32) {
        const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) {
            const __m512 ai = _mm512_set1_ps(a[i]);
            sum[i][0] = _mm512_fmadd_ps(ai, b0, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(ai, b1, sum[i][1]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(tile + i * 32 + j * 16, sum[i][j]);
}

TARGET_AVX512_BF16 inline void multiply_avx512_bf16(int64_t depth, LeftPanel left, const void* right, float* tile,
                                                    bool accumulate) {
    constexpr int MR = 14;
    const int32_t* a = static_cast<const int32_t*>(left.data);
    const int32_t* b = static_cast<const int32_t*>(right);
    __m512 sum[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++)
            sum[i][j] = accumulate ? _mm512_loadu_ps(tile + i * 32 + j * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2, a += MR, b += 32) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) {
            const __m512bh ai = (__m512bh)_mm512_set1_epi32(a[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], ai, b0);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], ai, b1);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < 2; j++) _mm512_storeu_ps(tile + i * 32 + j * 16, sum[i][j]);
}

// Eight tile registers: 0..3 the 2 x 2 sums [16, 16], 4..5 the left [16, 32], 6..7 the right [32, 16] as pairs.
TARGET_AMX inline void multiply_amx(int64_t depth, LeftPanel left, const void* right, float* tile, bool accumulate) {
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

template <class T, class Out>
[[gnu::always_inline]] inline void finish_row(const Epilogue<T, Out>& e, const float* sums, int64_t row, int64_t col,
                                              int64_t cols) {
    float v[32];
    for (int64_t j = 0; j < cols; j++) v[j] = sums[j];
    if (e.bias)
        for (int64_t j = 0; j < cols; j++) v[j] += float(e.bias[col + j]);
    if (e.pre_activation.data) {
        T* pre = e.pre_activation.row(row) + col;
        for (int64_t j = 0; j < cols; j++) pre[j] = v[j];
    }
    if (e.activation == Activation::gelu)
        for (int64_t j = 0; j < cols; j++) v[j] = gelu_value(v[j]);
    if (e.gelu_input.data) {
        const T* x = e.gelu_input.row(row) + col;
        for (int64_t j = 0; j < cols; j++) v[j] *= gelu_gradient(float(x[j]));
    }
    Out* out = e.out.row(row) + col;
    if (e.accumulate)
        for (int64_t j = 0; j < cols; j++) v[j] += float(out[j]);
    for (int64_t j = 0; j < cols; j++) out[j] = v[j];
}

template <int NR, class T, class Out>
[[gnu::always_inline]] inline void finish_tile(const Epilogue<T, Out>& e, const float* tile, int64_t row, int64_t col,
                                               int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++)
        if (cols == NR) finish_row(e, tile + i * NR, row + i, col, NR);
        else finish_row(e, tile + i * NR, row + i, col, cols);
}

template <class T, class Out>
void finish_avx2(const Epilogue<T, Out>& e, const float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    finish_tile<16>(e, tile, row, col, rows, cols);
}
template <class T, class Out>
TARGET_AVX512 void finish_avx512(const Epilogue<T, Out>& e, const float* tile, int64_t row, int64_t col, int64_t rows,
                                 int64_t cols) {
    finish_tile<32>(e, tile, row, col, rows, cols);
}

// ---------------------------------------------------------------------------------------------------------------------
// The functions of one instruction set, and the shapes they work in.
template <class T, class Out> struct MicroKernel {
    int64_t mr, nr;             // tile of sums
    int64_t group;              // panels pad the depth to a multiple of this
    int64_t element_bytes;      // of a packed element
    bool left_in_place;         // reads whole panels of a k-contiguous left operand where they lie
    void (*pack_left)(void* panel, Operand<T> source, int64_t rows, int64_t depth);
    void (*pack_right)(void* panel, Operand<T> source, int64_t rows, int64_t depth);
    void (*multiply)(int64_t depth, LeftPanel left, const void* right, float* tile, bool accumulate);
    void (*finish)(const Epilogue<T, Out>&, const float* tile, int64_t row, int64_t col, int64_t rows, int64_t cols);
};

template <int R, class T> void pack_floats_avx2(void* panel, Operand<T> source, int64_t rows, int64_t depth) {
    pack_plain<R, 1>(static_cast<float*>(panel), source, rows, depth);
}

template <class T, class Out> MicroKernel<T, Out> micro_kernel(Isa isa) {
    if constexpr (std::is_same_v<T, bf16>) {
        if (isa == Isa::amx)
            return {32, 32, 32, 2, true, pack_tiles_amx<32>, pack_pairs_amx<32>, multiply_amx, finish_avx512<T, Out>};
        if (isa == Isa::avx512_bf16)
            return {14, 32, 2, 2, false, pack_pairs_avx512<14>, pack_pairs_avx512<32>, multiply_avx512_bf16,
                    finish_avx512<T, Out>};
    }
    if (isa >= Isa::avx512)
        return {14, 32, 1, 4, false, pack_floats_avx512<14, T>, pack_floats_avx512<32, T>, multiply_avx512,
                finish_avx512<T, Out>};
    return {6, 16, 1, 4, false, pack_floats_avx2<6, T>, pack_floats_avx2<16, T>, multiply_avx2, finish_avx2<T, Out>};
}
