// Products, softmax and gradient of one pair of blocks in fp32. attention_micro.h includes this text once for each
// vector width, inside that width's target: ATTENTION_BLOCKS names the struct, ATTENTION_VECTOR its vector.
//
// A product's tile of the result, `tile_rows` rows by up to three vectors, stays in registers: 24 of 32 with AVX-512,
// 12 of 16 with AVX2. The left operand is broadcast element by element, so it may also be read across, as its
// transpose, and needs no second copy.
struct ATTENTION_BLOCKS {
    using V = ATTENTION_VECTOR;
    using Vec = V::Vec;
    using Packed = float;
    static constexpr int64_t lanes = V::lanes, tile_rows = V::lanes / 2;
    static constexpr int64_t width_multiple = 16, row_multiple = 8, lane_multiple = V::lanes;
    static constexpr int64_t forward_panel = 48, forward_block = 64, backward_panel = 48, backward_block = 64;
    static constexpr int64_t forward_group = 24 * forward_panel, backward_group = 512;
    static constexpr bool pairs = false;

    struct Thread {};  // nothing to set up in a thread

    // Operands as the products want them, from rows [n][width].
    static void pack_right(float*, const float*, int64_t, int64_t) {}
    static void pack_right_across(float* to, const float* rows, int64_t n, int64_t width) {
        transpose_words(to, n, rows, width, n, width);
    }
    static LeftOperand<float> pack_left_across(float*, const float* rows, float*, int64_t, int64_t width) {
        return {rows, 1, width};
    }

    // c[m][n] (+)= a[m][k] b[k][n]
    static void product(float* c, int64_t c_stride, LeftOperand<float> a, const float* b, int64_t b_stride, int64_t m,
                        int64_t n, int64_t k, bool accumulate) {
        for_columns(n, [&](int64_t j, auto vecs) {
            for (int64_t i = 0; i < m; i += tile_rows) {
                const auto run = a.step == 1 ? tile<vecs.value, false> : tile<vecs.value, true>;
                run(c + i * c_stride + j, c_stride, a.data + i * a.row, a.row * a.step, b + j, b_stride, k, accumulate);
            }
        });
    }

    // Where a score of the block, in powers of two, exceeds the base of its query by more than 8, it becomes the base,
    // and the sum and the outputs o [width][stride] so far are rescaled. So most blocks rescale nothing, probabilities
    // stay below 256, and each lane depends on itself only.
    template <int VECS>
    static void raise_base(const float* s, int64_t rows, int64_t stride, float scale, float* base, float* total,
                           float* o, int64_t width) {
        Vec even[VECS], odd[VECS], factor[VECS];
#pragma GCC unroll 3
        for (int v = 0; v < VECS; v++) even[v] = V::load(s + v * lanes), odd[v] = V::load(s + stride + v * lanes);
        for (int64_t r = 2; r < rows; r += 2)
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) {
                even[v] = V::max(even[v], V::load(s + r * stride + v * lanes));
                odd[v] = V::max(odd[v], V::load(s + (r + 1) * stride + v * lanes));
            }
        bool raised = false;
#pragma GCC unroll 3
        for (int v = 0; v < VECS; v++) {
            const Vec before = V::load(base + v * lanes), largest = V::max(even[v], odd[v]) * scale;
            const Vec now = V::where_greater(largest, before + 8, largest, before);
            factor[v] = V::template exp2<5>(before - now);
            V::store(base + v * lanes, now);
            V::store(total + v * lanes, V::load(total + v * lanes) * factor[v]);
            raised |= V::any_greater(now, before);
        }
        for (int64_t r = 0; raised && r < width; r++)
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) {
                float* at = o + r * stride + v * lanes;
                V::store(at, V::load(at) * factor[v]);
            }
    }

    // Scores s [rows][stride] of a key block become probabilities exp2(scale s - base); the sums follow.
    static void softmax(float* s, float*, int64_t rows, int64_t stride, int64_t n, float scale, float* base,
                        float* total, float* o, int64_t width) {
        for_columns(n, [&](int64_t j, auto vecs) {
            constexpr int VECS = vecs.value;
            raise_base<VECS>(s + j, rows, stride, scale, base + j, total + j, o + j, width);
            Vec base_j[VECS], sum[VECS];
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++)
                base_j[v] = V::load(base + j + v * lanes), sum[v] = V::load(total + j + v * lanes);
            for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 3
                for (int v = 0; v < VECS; v++) {
                    float* at = s + r * stride + j + v * lanes;
                    const Vec p = V::template exp2<5>(V::load(at) * scale - base_j[v]);
                    V::store(at, p);
                    sum[v] += p;
                }
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) V::store(total + j + v * lanes, sum[v]);
        });
    }

    // s becomes p = exp2(scale s - lse), dp becomes ds = p (dp - D)
    static void gradient(float* s, float* dp, float*, float*, float*, int64_t rows, int64_t stride, int64_t n,
                         float scale, const float* lse, const float* D) {
        for_columns(n, [&](int64_t j, auto vecs) {
            for (int64_t r = 0; r < rows; r++)
#pragma GCC unroll 3
                for (int v = 0; v < vecs.value; v++) {
                    const int64_t at = r * stride + j + v * lanes, lane = j + v * lanes;
                    const Vec p = V::template exp2<5>(V::load(s + at) * scale - V::load(lse + lane));
                    V::store(s + at, p);
                    V::store(dp + at, p * (V::load(dp + at) - V::load(D + lane)));
                }
        });
    }

private:
    template <int N>
    struct Count {
        static constexpr int value = N;
    };

    // n is a multiple of the vector; four vectors are better split into two and two than into three and one.
    template <class Body>
    static void for_columns(int64_t n, Body body) {
        for (int64_t j = 0; j < n;) {
            const int64_t left = (n - j) / lanes;
            if (left >= 3 && left != 4) body(j, Count<3>()), j += 3 * lanes;
            else if (left >= 2) body(j, Count<2>()), j += 2 * lanes;
            else body(j, Count<1>()), j += lanes;
        }
    }

    // tile_rows rows by VECS vectors of c. The empty asm keeps g++ from computing the address of every row beforehand,
    // for which it has too few registers.
    template <int VECS, bool ACROSS>
    static void tile(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     int64_t k, bool accumulate) {
        Vec sum[tile_rows][VECS];
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; r++)
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) sum[r][v] = Vec{};
        if (accumulate) {
            const float* row = c;
#pragma GCC unroll 8
            for (int r = 0; r < tile_rows; r++, row += c_stride) {
                __asm__("" : "+r"(row));
#pragma GCC unroll 3
                for (int v = 0; v < VECS; v++) sum[r][v] = V::load(row + v * lanes);
            }
        }
        for (int64_t l = 0; l < k; l++, a += ACROSS ? a_stride : 1, b += b_stride) {
            Vec right[VECS];
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) right[v] = V::load(b + v * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < tile_rows; r++) {
                const Vec left = V::fill(a[ACROSS ? r : r * a_stride]);
#pragma GCC unroll 3
                for (int v = 0; v < VECS; v++) sum[r][v] += left * right[v];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < tile_rows; r++, c += c_stride) {
            __asm__("" : "+r"(c));
#pragma GCC unroll 3
            for (int v = 0; v < VECS; v++) V::store(c + v * lanes, sum[r][v]);
        }
    }
};
#undef ATTENTION_BLOCKS
#undef ATTENTION_VECTOR
