// Products of bf16 pairs, with the softmax and gradient that feed them: by vdpbf16ps, or by AMX tiles. Both read the
// left operand as rows [m][k] and the right one as pairs of rows [k/2][n][2], and accumulate in fp32. Included by
// attention_micro.h.
#pragma once

#include "llmc/kernels/matmul_micro.h"  // amx_begin, amx_end

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")

template <bool TILES>
struct AttentionBf16 {
    using V = Vector16;
    using Vec = __m512;
    using Packed = bf16;
    static constexpr int64_t width_multiple = 32, row_multiple = 32, lane_multiple = 32;
    static constexpr int64_t forward_panel = 32, forward_block = 64, forward_group = 64 * forward_panel;
    static constexpr int64_t backward_panel = 128, backward_block = 64, backward_group = 512;
    static constexpr bool pairs = true;

    // Tile registers are set up while a thread is in a kernel.
    struct Thread {
        Thread() {
            if (TILES) amx_begin();
        }
        ~Thread() {
            if (TILES) amx_end();
        }
    };

    // Operands as the products want them, from rows [n][width].
    static void pack_right(bf16* to, const bf16* rows, int64_t n, int64_t width) {
        interleave_pairs(to, rows, n, width);
    }
    static void pack_right_across(bf16* to, const bf16* rows, int64_t n, int64_t width) {
        transpose_words(to, n, rows, width / 2, n, width / 2);
    }
    static LeftOperand<bf16> pack_left_across(bf16* to, const bf16* rows, bf16* space, int64_t n, int64_t width) {
        interleave_pairs(space, rows, n, width);
        transpose_words(to, n / 2, space, width, n / 2, width);
        return {to, n, 1};
    }

    // c[m][n] (+)= a[m][k] b[k][n]; m, n, k are multiples of 32
    static void product(float* c, int64_t c_stride, LeftOperand<bf16> a, const bf16* b, int64_t b_stride, int64_t m,
                        int64_t n, int64_t k, bool accumulate) {
        for (int64_t i = 0; i < m; i += TILES ? 32 : 8)
            for (int64_t j = 0; j < n; j += 32)
                (TILES ? tile_product : dot_product)(c + i * c_stride + j, c_stride, a.data + i * a.row, a.row,
                                                     b + 2 * j, 2 * b_stride, k, accumulate);
    }

    // As in attention_float.h; the probabilities are written as pairs of keys, p[rows/2][stride][2].
    static void softmax(float* s, bf16* p, int64_t rows, int64_t stride, int64_t n, float scale, float* base,
                        float* total, float* o, int64_t width) {
        for (int64_t j = 0; j < n; j += 32) {
            AttentionAvx512::raise_base<2>(s + j, rows, stride, scale, base + j, total + j, o + j, width);
            const Vec base_j[2] = {V::load(base + j), V::load(base + j + 16)};
            Vec sum[2] = {V::load(total + j), V::load(total + j + 16)};
            for (int64_t r = 0; r < rows; r += 2)
                for (int v = 0; v < 2; v++) {
                    const float* at = s + r * stride + j + 16 * v;
                    const Vec first = V::exp2<4>(V::load(at) * scale - base_j[v]);
                    const Vec second = V::exp2<4>(V::load(at + stride) * scale - base_j[v]);
                    sum[v] += first + second;
                    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
                    _mm512_storeu_si512(p + r * stride + 2 * (j + 16 * v),
                                        _mm512_permutexvar_epi16(alternate<0, 16>(), both));
                }
            for (int v = 0; v < 2; v++) V::store(total + j + 16 * v, sum[v]);
        }
    }

    // p = exp2(scale s - lse) and ds = p (dp - D) as rows [rows][stride], ds also as pairs of keys.
    static void gradient(const float* s, const float* dp, bf16* p, bf16* ds, bf16* ds_pairs, int64_t rows,
                         int64_t stride, int64_t n, float scale, const float* lse, const float* D) {
        for (int64_t j = 0; j < n; j += 32) {
            const Vec lse_j[2] = {V::load(lse + j), V::load(lse + j + 16)},
                      D_j[2] = {V::load(D + j), V::load(D + j + 16)};
            for (int64_t r = 0; r < rows; r += 2) {
                __m512i row[2];
                for (int i = 0; i < 2; i++) {
                    const int64_t at = (r + i) * stride + j;
                    const Vec a = V::exp2<4>(V::load(s + at) * scale - lse_j[0]);
                    const Vec b = V::exp2<4>(V::load(s + at + 16) * scale - lse_j[1]);
                    _mm512_storeu_si512(p + at, (__m512i)_mm512_cvtne2ps_pbh(b, a));
                    row[i] = (__m512i)_mm512_cvtne2ps_pbh(b * (V::load(dp + at + 16) - D_j[1]),
                                                          a * (V::load(dp + at) - D_j[0]));
                    _mm512_storeu_si512(ds + at, row[i]);
                }
                bf16* to = ds_pairs + r * stride + 2 * j;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(row[0], alternate<0, 32>(), row[1]));
                _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(row[0], alternate<16, 48>(), row[1]));
            }
        }
    }

private:
    // Element order that makes pairs of two halves of a register, or of two registers.
    template <int FIRST, int SECOND>
    static __m512i alternate() {
        alignas(64) static constexpr auto order = [] {
            std::array<int16_t, 32> list{};
            for (int i = 0; i < 16; i++) list[2 * i] = int16_t(FIRST + i), list[2 * i + 1] = int16_t(SECOND + i);
            return list;
        }();
        return _mm512_load_si512(order.data());
    }

    // 32 x 32 of c in four tiles
    static void tile_product(float* c, int64_t c_stride, const bf16* a, int64_t a_stride, const bf16* b,
                             int64_t b_stride, int64_t k, bool accumulate) {
        __asm__ volatile("" ::: "memory");  // the tile loads below do not tell the compiler that they read memory
        const int64_t c_bytes = 4 * c_stride, a_bytes = 2 * a_stride, b_bytes = 2 * b_stride;
        if (accumulate) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c + 16, c_bytes);
            _tile_loadd(2, c + 16 * c_stride, c_bytes);
            _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        for (int64_t l = 0; l < k; l += 32, a += 32, b += 16 * b_stride) {
            _tile_loadd(4, a, a_bytes);
            _tile_loadd(5, b, b_bytes);
            _tile_loadd(6, b + 32, b_bytes);
            _tile_loadd(7, a + 16 * a_stride, a_bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_dpbf16ps(1, 4, 6);
            _tile_dpbf16ps(2, 7, 5);
            _tile_dpbf16ps(3, 7, 6);
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, c + 16, c_bytes);
        _tile_stored(2, c + 16 * c_stride, c_bytes);
        _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
    }

    // 8 x 32 of c in sixteen registers
    static void dot_product(float* c, int64_t c_stride, const bf16* a, int64_t a_stride, const bf16* b,
                            int64_t b_stride, int64_t k, bool accumulate) {
        Vec sum[8][2];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) sum[r][v] = accumulate ? V::load(c + r * c_stride + 16 * v) : Vec{};
        for (int64_t l = 0; l < k; l += 2, a += 2, b += b_stride) {
            const __m512bh low = (__m512bh)_mm512_loadu_si512(b), high = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                int pair;
                std::memcpy(&pair, a + r * a_stride, 4);
                const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, low);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], left, high);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) V::store(c + r * c_stride + 16 * v, sum[r][v]);
    }
};
#pragma GCC pop_options
