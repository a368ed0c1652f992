// Attention on a GPU in bf16, on tensor cores through mma.sync m16n8k16 with fp32 sums, in the manner of
// FlashAttention-2 (Dao 2023, arXiv:2307.08691). Included by attention.cuh, which has the mathematics and the launches.
// Blocks are of 4 warps, two blocks to a multiprocessor. A warp owns rows of the result and needs nothing from other
// warps but the tiles that all of them copy.
//
//   forward, dq: queries stay                             dk, dv: keys stay
//
//             keys come by, 32 at a time                             queries come by, 64 at a time
//           +-------------+-------------+---- - -                  +-------------+-------------+---- - -
//   warp 0  | 32 queries  |             |                  warp 0  | 16 keys     |             |
//   warp 1  | 32          |  S = q k^T  |                  warp 1  | 16          |  S = k q^T  |
//   warp 2  | 32          |             |                  warp 2  | 16          |             |
//   warp 3  | 32          |             |                  warp 3  | 16          |             |
//           +-------------+-------------+---- - -                  +-------------+-------------+---- - -
//             as far as the last key seen                            from the first query that sees a key
//
// One product of a warp: sums [16 M, 8 N] += left [16 M, 16] right [16, 8 N], the 16 being a part of the depth.
//
//                         right: 8 columns each            Lane 4 g + t holds, of each 16 x 8 of the sums, columns 2 t
//                         +-----+-----+- -                 and 2 t + 1 of rows g (values 0, 1) and g + 8 (values 2, 3):
//                      16 | mma | mma |
//            16           +-----+-----+- -                         2t 2t+1
//         +-------+       +-----+-----+- -                    g    0   1       Two of these side by side, rounded to
//      16 | left  |    16 | sums|     |                      g+8   2   3       bf16, are the lane's part of a left
//         +-------+       +-----+-----+- -                                     operand 16 x 16: so S becomes P.
//      16 |       |    16 |     |     |
//         +-------+       +-----+-----+- -                 16 M rows share what is read of the right operand.
//
// While one tile is worked on, the next one is copied to the other half of a double buffer. Its rows have eight
// elements to spare: the eight rows that ldmatrix reads at a time then lie in different banks.
#pragma once

constexpr int ATTENTION_QUERIES = 128, ATTENTION_KEYS = 64, ATTENTION_THREADS = 128;

constexpr int KEYS_AT_ONCE = 32, QUERIES_AT_ONCE = 64;                               // that come by
constexpr int WARP_QUERIES = ATTENTION_QUERIES / 4, WARP_KEYS = ATTENTION_KEYS / 4;  // that stay, of one warp
static_assert(ATTENTION_QUERIES == ATTENTION_THREADS && 2 * QUERIES_AT_ONCE == ATTENTION_THREADS,
              "each thread copies lse and D of one query, or one of the two");
constexpr float LN_2 = 0.693147181f;

// A tile [rows, W] in shared memory.
template <int W>
constexpr int TILE_STRIDE = W + PACK;
template <int W>
HOST_DEVICE constexpr int tile_size(int rows) {
    return rows * TILE_STRIDE<W>;
}

template <int W>
constexpr size_t attention_forward_bytes = tile_size<W>(ATTENTION_QUERIES + 2 * 2 * KEYS_AT_ONCE) * sizeof(bf16);
template <int W>
constexpr size_t attention_backward_queries_bytes = tile_size<W>(2 * ATTENTION_QUERIES + 2 * 2 * KEYS_AT_ONCE) *
                                                        sizeof(bf16) +
                                                    2 * ATTENTION_QUERIES * sizeof(float);
template <int W>
constexpr size_t attention_backward_keys_bytes = tile_size<W>(2 * ATTENTION_KEYS + 2 * 2 * QUERIES_AT_ONCE) *
                                                     sizeof(bf16) +
                                                 2 * 2 * QUERIES_AT_ONCE * sizeof(float);

// The block begins to copy up to ROWS rows to a tile; what lies outside them or the head becomes zero.
template <int W, int ROWS>
__device__ void copy_tile(bf16* tile, const bf16* from, int64_t stride, int rows, int head_size) {
    constexpr int PACKS = W / PACK, ROWS_AT_ONCE = ATTENTION_THREADS / PACKS;
    static_assert(ATTENTION_THREADS % PACKS == 0 && ROWS % ROWS_AT_ONCE == 0);
    const int row0 = int(threadIdx.x) / PACKS, column = int(threadIdx.x) % PACKS * PACK;
    tile += row0 * TILE_STRIDE<W> + column;
    from += row0 * stride + column;
#pragma unroll
    for (int row = 0; row < ROWS; row += ROWS_AT_ONCE, from += ROWS_AT_ONCE * stride)
        cp_async_16(tile + row * TILE_STRIDE<W>, from, row0 + row < rows && column < head_size);
}

// The same for the next keys and their values, of `keys` in all: k [32, W], then v [32, W].
template <int W>
__device__ void copy_key_tiles(bf16* k, const AttentionRows& rows, int64_t C, int key, int keys, int head_size) {
    const bf16* from = rows.k + int64_t(key) * rows.kv_stride;
    copy_tile<W, KEYS_AT_ONCE>(k, from, rows.kv_stride, keys - key, head_size);
    copy_tile<W, KEYS_AT_ONCE>(k + tile_size<W>(KEYS_AT_ONCE), from + C, rows.kv_stride, keys - key, head_size);
    cp_async_commit();
}

// s [16 M, 8 N] = a b^T of tiles a [16 M, W], b [8 N, W]
template <int W, int M, int N>
__device__ void multiply_transposed(float (&s)[M][N][4], const bf16* a, const bf16* b) {
    const int lane = int(threadIdx.x) % WARP;
    a += lane % 16 * TILE_STRIDE<W> + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * TILE_STRIDE<W> + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0;
#pragma unroll
    for (int c = 0; c < W; c += 16) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix_x4(left[m], a + tile_size<W>(16 * m) + c);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t right[4];
            ldmatrix_x4(right, b + tile_size<W>(8 * n) + c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(s[m][n], left[m], {right[0], right[1]});
                mma_m16n8k16(s[m][n + 1], left[m], {right[2], right[3]});
            }
        }
    }
}

// sums [16 M, W] += p b of p [16 M, 8 N] in registers, rounded to bf16, and a tile b [8 N, W]
template <int W, int M, int N>
__device__ void add_product(float (&sums)[M][W / 8][4], const float (&p)[M][N][4], const bf16* b) {
    const int lane = int(threadIdx.x) % WARP;
    b += lane % 16 * TILE_STRIDE<W> + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        uint32_t left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                left[m][e] = bf16_pair(p[m][n + e / 2][e % 2 * 2], p[m][n + e / 2][e % 2 * 2 + 1]);
#pragma unroll
        for (int c = 0; c < W / 8; c += 2) {
            uint32_t right[4];
            ldmatrix_x4_transposed(right, b + tile_size<W>(8 * n) + 8 * c);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(sums[m][c], left[m], {right[0], right[1]});
                mma_m16n8k16(sums[m][c + 1], left[m], {right[2], right[3]});
            }
        }
    }
}

// Of 16 x 8 sums, the row and the column of value e of this lane.
__device__ inline int row_of(int e) { return int(threadIdx.x) % WARP / 4 + e / 2 * 8; }
__device__ inline int column_of(int e) { return int(threadIdx.x) % 4 * 2 + e % 2; }

// combine() over the four lanes that share rows
template <class Combine>
__device__ float quad_reduce(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return combine(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

// Two neighbouring values to bf16.
__device__ inline void put_pair(bf16* to, float a, float b) { *reinterpret_cast<uint32_t*>(to) = bf16_pair(a, b); }

template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_forward_kernel(Matrix<bf16> out /*[N,C]*/, Matrix<float> lse /*[N,NH]*/, AttentionInputs in,
                             const AttentionTile* tiles) {
    constexpr int M = WARP_QUERIES / 16, N = KEYS_AT_ONCE / 8;
    const AttentionTile& tile = tiles[blockIdx.x];
    const int head = int(blockIdx.y), row0 = int(threadIdx.x) / WARP * WARP_QUERIES;  // row0: of the warp in the tile
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, tile.segment, head);
    const float scale = LOG2_E * rsqrtf(float(in.head_size));  // scores are powers of two
    const int queries = int(min(int64_t(ATTENTION_QUERIES), tile.segment.length - tile.first));
    const int last = int(tile.segment.context + tile.first) + row0;  // key that row 0 of this warp sees last
    const int keys = last - row0 + queries;

    bf16* q = shared_memory<bf16>();                      // [128, W]
    bf16* buffers = q + tile_size<W>(ATTENTION_QUERIES);  // 2 x (k [32, W], v [32, W])
    const auto copy_keys = [&](int buffer, int key) {
        copy_key_tiles<W>(buffers + buffer * tile_size<W>(2 * KEYS_AT_ONCE), rows, C, key, keys, in.head_size);
    };
    copy_tile<W, ATTENTION_QUERIES>(q, rows.q + tile.first * rows.q_stride, rows.q_stride, queries, in.head_size);
    copy_keys(0, 0);

    float o[M][W / 8][4] = {}, largest[M][2], total[M][2] = {};  // two rows a lane: row_of(0), row_of(2)
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = -INFINITY;
    for (int key = 0; key < keys; key += KEYS_AT_ONCE) {
        const int buffer = key / KEYS_AT_ONCE % 2;
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and nobody works on the one before it any more
        if (key + KEYS_AT_ONCE < keys) copy_keys(buffer ^ 1, key + KEYS_AT_ONCE);
        const bf16 *k = buffers + buffer * tile_size<W>(2 * KEYS_AT_ONCE), *v = k + tile_size<W>(KEYS_AT_ONCE);

        const int diagonal = last - key;             // key of the tile that row 0 sees last
        if (diagonal + WARP_QUERIES <= 0) continue;  // no row of this warp sees any
        float s[M][N][4];
        multiply_transposed<W>(s, q + tile_size<W>(row0), k);
        if (diagonal < KEYS_AT_ONCE - 1) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (8 * n + column_of(e) > diagonal + 16 * m + row_of(e)) s[m][n][e] = -INFINITY;
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = largest[m][half];
#pragma unroll
                for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                most = quad_reduce(most, [](float a, float b) { return fmaxf(a, b); });
                const float base = scale * most;  // finite: every query sees key 0
                const float shrink = power_of_two(scale * largest[m][half] - base);
                float sum = 0;
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[m][n][e] = power_of_two(scale * s[m][n][e] - base);
                        sum += s[m][n][e];
                    }
                largest[m][half] = most;
                total[m][half] = total[m][half] * shrink + sum;
#pragma unroll
                for (int c = 0; c < W / 8; c++) o[m][c][2 * half] *= shrink, o[m][c][2 * half + 1] *= shrink;
            }
        add_product<W>(o, s, v);
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = quad_reduce(total[m][half], [](float a, float b) { return a + b; }), factor = 1 / sum;
            const int row = row0 + 16 * m + row_of(2 * half);
            if (row >= queries) continue;
            bf16* to = out.row(tile.segment.begin + tile.first + row) + head * in.head_size + column_of(0);
#pragma unroll
            for (int c = 0; c < W / 8; c++)
                if (8 * c < in.head_size)
                    put_pair(to + 8 * c, factor * o[m][c][2 * half], factor * o[m][c][2 * half + 1]);
            if (column_of(0) == 0)
                lse.row(tile.segment.begin + tile.first + row)[head] = LN_2 * scale * largest[m][half] + logf(sum);
        }
}

// dq of a tile of queries.
template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_backward_queries_kernel(Matrix<bf16> d_qkv /*[N,3C]*/, Matrix<const bf16> d_out /*[N,C]*/,
                                      Matrix<const float> lse /*[N,NH]*/, const float* D /*[N,NH]*/, AttentionInputs in,
                                      const AttentionTile* tiles) {
    constexpr int M = WARP_QUERIES / 16, N = KEYS_AT_ONCE / 8;
    const AttentionTile& tile = tiles[blockIdx.x];
    const int head = int(blockIdx.y), row0 = int(threadIdx.x) / WARP * WARP_QUERIES;
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, tile.segment, head);
    const float scale = rsqrtf(float(in.head_size));
    const int queries = int(min(int64_t(ATTENTION_QUERIES), tile.segment.length - tile.first));
    const int last = int(tile.segment.context + tile.first) + row0;  // key that row 0 of this warp sees last
    const int keys = last - row0 + queries;

    bf16 *q = shared_memory<bf16>(), *d_o = q + tile_size<W>(ATTENTION_QUERIES);  // [128, W]
    bf16* buffers = d_o + tile_size<W>(ATTENTION_QUERIES);                        // 2 x (k [32, W], v [32, W])
    const auto copy_keys = [&](int buffer, int key) {
        copy_key_tiles<W>(buffers + buffer * tile_size<W>(2 * KEYS_AT_ONCE), rows, C, key, keys, in.head_size);
    };
    copy_tile<W, ATTENTION_QUERIES>(q, rows.q + tile.first * rows.q_stride, rows.q_stride, queries, in.head_size);
    copy_tile<W, ATTENTION_QUERIES>(d_o, d_out.row(tile.segment.begin + tile.first) + head * in.head_size, d_out.stride,
                                    queries, in.head_size);
    copy_keys(0, 0);

    // [128]: lse as a power of two, and D
    float *base = reinterpret_cast<float*>(buffers + 2 * tile_size<W>(2 * KEYS_AT_ONCE)), *d = base + ATTENTION_QUERIES;
    const int own = int(threadIdx.x);
    const int64_t own_row = tile.segment.begin + tile.first + own;
    base[own] = own < queries ? LOG2_E * lse.row(own_row)[head] : INFINITY;  // probability 0
    d[own] = own < queries ? D[own_row * in.heads + head] : 0.0f;

    float dq[M][W / 8][4] = {};
    for (int key = 0; key < keys; key += KEYS_AT_ONCE) {
        const int buffer = key / KEYS_AT_ONCE % 2;
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and nobody works on the one before it any more
        if (key + KEYS_AT_ONCE < keys) copy_keys(buffer ^ 1, key + KEYS_AT_ONCE);
        const bf16 *k = buffers + buffer * tile_size<W>(2 * KEYS_AT_ONCE), *v = k + tile_size<W>(KEYS_AT_ONCE);

        const int diagonal = last - key;             // key of the tile that row 0 sees last
        if (diagonal + WARP_QUERIES <= 0) continue;  // no row of this warp sees any
        float s[M][N][4], dp[M][N][4];
        multiply_transposed<W>(s, q + tile_size<W>(row0), k);
        multiply_transposed<W>(dp, d_o + tile_size<W>(row0), v);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int row = 16 * m + row_of(e);
                    const float p = power_of_two(LOG2_E * scale * s[m][n][e] - base[row0 + row]);
                    const bool seen = 8 * n + column_of(e) <= diagonal + row;
                    s[m][n][e] = seen ? p * (dp[m][n][e] - d[row0 + row]) : 0;
                }
        add_product<W>(dq, s, k);
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + 16 * m + row_of(2 * half);
            if (row >= queries) continue;
            bf16* to = d_qkv.row(tile.segment.begin + tile.first + row) + head * in.head_size + column_of(0);
#pragma unroll
            for (int c = 0; c < W / 8; c++)
                if (8 * c < in.head_size)
                    put_pair(to + 8 * c, scale * dq[m][c][2 * half], scale * dq[m][c][2 * half + 1]);
        }
}

// dk and dv of a tile of keys. Scores lie transposed: a row is a key, a column a query.
template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_backward_keys_kernel(Matrix<bf16> d_qkv /*[N,3C]*/, Matrix<float> d_store /*[T,2C]*/,
                                   Matrix<const bf16> d_out /*[N,C]*/, Matrix<const float> lse /*[N,NH]*/,
                                   const float* D /*[N,NH]*/, AttentionInputs in, const AttentionTile* tiles) {
    constexpr int N = QUERIES_AT_ONCE / 8;
    const AttentionTile& tile = tiles[blockIdx.x];
    const int head = int(blockIdx.y), row0 = int(threadIdx.x) / WARP * WARP_KEYS;
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, tile.segment, head);
    const float scale = rsqrtf(float(in.head_size));
    const int keys = int(min(int64_t(ATTENTION_KEYS), tile.segment.context + tile.segment.length - tile.first));
    const int length = int(tile.segment.length), unseen = int(tile.first - tile.segment.context);  // by queries before

    bf16 *k = shared_memory<bf16>(), *v = k + tile_size<W>(ATTENTION_KEYS);  // [64, W]
    bf16* buffers = v + tile_size<W>(ATTENTION_KEYS);                        // 2 x (q [64, W], d_o [64, W])
    float* statistics = reinterpret_cast<float*>(buffers + 2 * tile_size<W>(2 * QUERIES_AT_ONCE));
    // 2 x (lse as a power of two [64], D [64]), copied by one thread each
    const auto copy_queries = [&](int buffer, int query) -> float {
        const int64_t row = tile.segment.begin + query;
        const int count = length - query;
        bf16* q = buffers + buffer * tile_size<W>(2 * QUERIES_AT_ONCE);
        copy_tile<W, QUERIES_AT_ONCE>(q, rows.q + int64_t(query) * rows.q_stride, rows.q_stride, count, in.head_size);
        copy_tile<W, QUERIES_AT_ONCE>(q + tile_size<W>(QUERIES_AT_ONCE), d_out.row(row) + head * in.head_size,
                                      d_out.stride, count, in.head_size);
        cp_async_commit();
        const int column = int(threadIdx.x) % QUERIES_AT_ONCE;
        if (int(threadIdx.x) < QUERIES_AT_ONCE)
            return column < count ? LOG2_E * lse.row(row + column)[head] : INFINITY;  // probability 0
        return column < count ? D[(row + column) * in.heads + head] : 0.0f;
    };
    copy_tile<W, ATTENTION_KEYS>(k, rows.k + tile.first * rows.kv_stride, rows.kv_stride, keys, in.head_size);
    copy_tile<W, ATTENTION_KEYS>(v, rows.k + C + tile.first * rows.kv_stride, rows.kv_stride, keys, in.head_size);

    float dk[1][W / 8][4] = {}, dv[1][W / 8][4] = {};
    int buffer = 0;
    int query = max(0, unseen);
    statistics[threadIdx.x] = copy_queries(0, query);
    for (; query < length; query += QUERIES_AT_ONCE, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and nobody works on the one before it any more
        float statistic = 0;
        if (query + QUERIES_AT_ONCE < length) statistic = copy_queries(buffer ^ 1, query + QUERIES_AT_ONCE);
        const bf16 *q = buffers + buffer * tile_size<W>(2 * QUERIES_AT_ONCE), *d_o = q + tile_size<W>(QUERIES_AT_ONCE);
        const float *base = statistics + buffer * 2 * QUERIES_AT_ONCE, *d = base + QUERIES_AT_ONCE;

        float s[1][N][4], dp[1][N][4];
        multiply_transposed<W>(s, k + tile_size<W>(row0), q);
        multiply_transposed<W>(dp, v + tile_size<W>(row0), d_o);
        // query of the tile that is the first one to see row 0
        const int diagonal = unseen + row0 - query;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int column = 8 * n + column_of(e);
                const float p = power_of_two(LOG2_E * scale * s[0][n][e] - base[column]);
                s[0][n][e] = column >= diagonal + row_of(e) ? p : 0;
                dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - d[column]);
            }
        add_product<W>(dv, s, d_o);
        add_product<W>(dk, dp, q);
        statistics[(buffer ^ 1) * 2 * QUERIES_AT_ONCE + int(threadIdx.x)] = statistic;
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = row0 + row_of(2 * half);
        if (row >= keys) continue;
        const int64_t column = int64_t(head) * in.head_size + column_of(0);
#pragma unroll
        for (int c = 0; c < W / 8; c++) {
            if (8 * c >= in.head_size) continue;
            const float dk0 = scale * dk[0][c][2 * half], dk1 = scale * dk[0][c][2 * half + 1];
            const float dv0 = dv[0][c][2 * half], dv1 = dv[0][c][2 * half + 1];
            if (tile.segment.sliced) {
                float* to = d_store.row(tile.first + row) + column + 8 * c;
                to[0] += dk0, to[1] += dk1;
                to[C] += dv0, to[C + 1] += dv1;
            } else {
                bf16* to = d_qkv.row(tile.segment.begin + tile.first + row) + C + column + 8 * c;
                put_pair(to, dk0, dk1);
                put_pair(to + C, dv0, dv1);
            }
        }
    }
}
