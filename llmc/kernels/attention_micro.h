// What the blocked attention of attention.cuh does to one pair of blocks, for each vector width. Everywhere a vector
// lane is a query, so that the softmax needs no sums across lanes; blocks of scores are stored key by key,
// [keys][panel].
//
//   pack_rows, interleave_pairs, transpose_words     operands copied into contiguous, zero-padded blocks
//   AttentionAvx2, AttentionAvx512                   products in fp32 (attention_float.h); bf16 storage is widened
//   AttentionBf16<tiles>                             products of bf16 pairs: vdpbf16ps, or AMX tiles (attention_bf16.h)
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>

#include "llmc/common.h"
#include "llmc/kernels/simd.h"

inline void assign(bf16& to, bf16 from) { to.bits = from.bits; }  // in integers, which g++ 12 vectorises

// to[rows][width] = from[count][head_size], zero where there is nothing to copy. The block after this one is fetched
// into the second cache: the rows of a head are short and far apart, so that no hardware prefetcher follows them.
template <class To, class From>
inline void pack_rows(To* to, int64_t rows, int64_t width, const From* from, int64_t stride, int64_t count,
                      int64_t head_size) {
    for (int64_t r = 0; r < count; r++) {
        const From* next = from + (r + rows) * stride;
        for (int64_t c = 0; c < head_size; c += 64 / sizeof(From)) _mm_prefetch((const char*)(next + c), _MM_HINT_T1);
        for (int64_t c = 0; c < head_size; c++) assign(to[r * width + c], from[r * stride + c]);
        std::fill(to + r * width + head_size, to + (r + 1) * width, To(0));
    }
    std::fill(to + count * width, to + rows * width, To(0));
}

// Two neighbouring rows become one row of pairs, as the bf16 instructions read them: to[rows/2][width][2].
inline void interleave_pairs(bf16* to, const bf16* from, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < width; c += 16) {
            const __m256i a = _mm256_loadu_si256((const __m256i*)(from + r * width + c));
            const __m256i b = _mm256_loadu_si256((const __m256i*)(from + (r + 1) * width + c));
            const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
            bf16* pairs = to + r * width + 2 * c;
            _mm256_storeu_si256((__m256i*)pairs, _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_storeu_si256((__m256i*)(pairs + 16), _mm256_permute2x128_si256(low, high, 0x31));
        }
}

// to[columns][rows] = from[rows][columns] in words of 4 bytes: floats, or pairs of bf16; both multiples of 8.
inline void transpose_words(void* to_words, int64_t to_stride, const void* from_words, int64_t from_stride,
                            int64_t rows, int64_t columns) {
    const float* from = (const float*)from_words;
    float* to = (float*)to_words;
    for (int64_t r = 0; r < rows; r += 8)
        for (int64_t c = 0; c < columns; c += 8) {
            __m256 a[8], b[8];
            for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + (r + i) * from_stride + c);
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    const __m256 low = _mm256_unpacklo_ps(a[i + j], a[i + j + 2]);
                    const __m256 high = _mm256_unpackhi_ps(a[i + j], a[i + j + 2]);
                    b[i + j] = low, b[i + j + 2] = high;
                }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    a[i + 2 * j] = _mm256_unpacklo_ps(b[i + 2 * j], b[i + 2 * j + 1]);
                    a[i + 2 * j + 1] = _mm256_unpackhi_ps(b[i + 2 * j], b[i + 2 * j + 1]);
                }
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(to + (c + i) * to_stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_storeu_ps(to + (c + i + 4) * to_stride + r, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
}

// The left operand of a product, element (i, k) at data[i * row + k * step]; row or step is 1.
template <class Packed>
struct LeftOperand {
    const Packed* data;
    int64_t row, step;
};

// ---------------------------------------------------------------------------------------------------------------------
// The vector of each width. exp2 is a polynomial of degree D on [0, 1), times 2^floor(x) put into the exponent. Minus
// infinity gives an exact zero, and a NaN stays one.
//
// Relative error of the polynomials, minimax with constant term 1: degree 5 8e-8; degree 4 3e-6, for probabilities that
// are rounded to bf16 (2e-3).
template <int D>
inline constexpr float exp2_polynomial[6] = {
    1, 0.693151312f, 0.240164450f, 0.0557999131f, 0.00901703028f, 0.00186713008f};
template <>
inline constexpr float exp2_polynomial<4>[6] = {1, 0.693044845f, 0.241280205f, 0.0522424743f, 0.0134266843f};

struct Vector8 {
    static constexpr int64_t lanes = 8;
    using Vec = __m256;
    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
    static Vec fill(float a) { return _mm256_set1_ps(a); }
    static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
    static bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) {
        return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
    }
    template <int D>
    static Vec exp2(Vec x) {
        x = max(fill(-127), x);
        const Vec whole = _mm256_floor_ps(x), f = x - whole;
        Vec p = fill(exp2_polynomial<D>[D]);
#pragma GCC unroll 6
        for (int i = D - 1; i >= 0; i--) p = p * f + fill(exp2_polynomial<D>[i]);
        const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
    }
};

// GCC 12 warns of undefined values inside its own AVX-512 header.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
struct Vector16 {
    static constexpr int64_t lanes = 16;
    using Vec = __m512;
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
    static Vec fill(float a) { return _mm512_set1_ps(a); }
    static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
    static bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), otherwise, then);
    }
    template <int D>
    static Vec exp2(Vec x) {
        const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
        Vec p = fill(exp2_polynomial<D>[D]);
#pragma GCC unroll 6
        for (int i = D - 1; i >= 0; i--) p = p * f + fill(exp2_polynomial<D>[i]);
        return _mm512_scalef_ps(p, x);  // p 2^floor(x)
    }
};
#pragma GCC pop_options

#define ATTENTION_BLOCKS AttentionAvx2
#define ATTENTION_VECTOR Vector8
#include "llmc/kernels/attention_float.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#define ATTENTION_BLOCKS AttentionAvx512
#define ATTENTION_VECTOR Vector16
#include "llmc/kernels/attention_float.h"
#pragma GCC pop_options

#if defined(PRECISION_BF16)
#include "llmc/kernels/attention_bf16.h"
#endif

#pragma GCC diagnostic pop
