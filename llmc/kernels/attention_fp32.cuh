// Attention on a GPU in fp32, for checking: plain loops over tiles in shared memory. Included by attention.cuh, which
// has the mathematics and the launches.
//
//               64 keys                256 threads as 16 x 16. Thread (x, y) has the elements (y + 16 i, x + 16 j) of
//           +-------------+            every product: 4 x 4 of the scores, 4 x W/16 of a tile [64, W].
//   64      | . x . x . x |  y
//   queries | . . . . . . |            forward, dq: queries stay, tiles of keys come by, as far as the last one seen
//           | . x . x . x |  y + 16    dk, dv: keys stay and are the rows, tiles of queries come by, from the first
//           +-------------+            one that sees a key
#pragma once

constexpr int ATTENTION_QUERIES = 64, ATTENTION_KEYS = 64, ATTENTION_THREADS = 256;

// A tile [64, W] in shared memory has rows of W + 1, one of probabilities rows of 65: threads that read one column
// each of 16 rows then meet 16 banks.
constexpr int TILE = 64, SIDE = 16, EACH = TILE / SIDE, SCORES_STRIDE = TILE + 1;

template <int W>
constexpr size_t attention_tile_bytes = TILE*(W + 1) * sizeof(float);
constexpr size_t attention_scores_bytes = TILE * SCORES_STRIDE * sizeof(float);
template <int W>
constexpr size_t attention_forward_bytes = 3 * attention_tile_bytes<W> + attention_scores_bytes;
template <int W>
constexpr size_t attention_backward_queries_bytes = 4 * attention_tile_bytes<W> + attention_scores_bytes;
template <int W>
constexpr size_t attention_backward_keys_bytes = 4 * attention_tile_bytes<W> + 2 * attention_scores_bytes;

// Up to 64 rows into a tile; what lies outside them or the head is zero.
template <int W>
__device__ void load_tile(float* tile, const float* from, int64_t stride, int64_t rows, int head_size) {
    for (int i = int(threadIdx.x); i < TILE * W; i += ATTENTION_THREADS) {
        const int row = i / W, column = i % W;
        tile[row * (W + 1) + column] = row < rows && column < head_size ? from[row * stride + column] : 0.0f;
    }
}

// sums += a b^T, both [64, W]
template <int W>
__device__ void add_dots(float (&sums)[EACH][EACH], const float* a, const float* b) {
    const int x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    for (int c = 0; c < W; c++) {
        float right[EACH];
        for (int j = 0; j < EACH; j++) right[j] = b[(x + SIDE * j) * (W + 1) + c];
        for (int i = 0; i < EACH; i++) {
            const float left = a[(y + SIDE * i) * (W + 1) + c];
            for (int j = 0; j < EACH; j++) sums[i][j] += left * right[j];
        }
    }
}

// sums += p b: p [64, 64], b [64, W]
template <int W>
__device__ void add_rows(float (&sums)[EACH][W / SIDE], const float* p, const float* b) {
    const int x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    for (int k = 0; k < TILE; k++) {
        float left[EACH];
        for (int i = 0; i < EACH; i++) left[i] = p[(y + SIDE * i) * SCORES_STRIDE + k];
        for (int j = 0; j < W / SIDE; j++) {
            const float right = b[k * (W + 1) + x + SIDE * j];
            for (int i = 0; i < EACH; i++) sums[i][j] += left[i] * right;
        }
    }
}

// combine() over the 16 threads that share rows
template <class Combine>
__device__ float row_reduce(float value, Combine combine) {
    for (int offset = SIDE / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_forward_kernel(Matrix<float> out /*[N,C]*/, Matrix<float> lse /*[N,NH]*/, AttentionInputs in,
                             const AttentionTile* tiles) {
    const SegmentRows segment = tiles[blockIdx.x].segment;
    const int64_t first = tiles[blockIdx.x].first;
    const int head = int(blockIdx.y), x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, segment, head);
    const float scale = rsqrtf(float(in.head_size));
    const int64_t queries = min(int64_t(TILE), segment.length - first), keys = segment.context + first + queries;

    float* q = shared_memory<float>();                       // [64][W + 1]
    float *k = q + TILE * (W + 1), *v = k + TILE * (W + 1);  // [64][W + 1]
    float* p = v + TILE * (W + 1);                           // [64][65]
    load_tile<W>(q, rows.q + first * rows.q_stride, rows.q_stride, queries, in.head_size);

    float o[EACH][W / SIDE] = {}, largest[EACH], total[EACH] = {};
    for (int i = 0; i < EACH; i++) largest[i] = -INFINITY;
    for (int64_t key = 0; key < keys; key += TILE) {
        load_tile<W>(k, rows.k + key * rows.kv_stride, rows.kv_stride, keys - key, in.head_size);
        load_tile<W>(v, rows.k + C + key * rows.kv_stride, rows.kv_stride, keys - key, in.head_size);
        __syncthreads();
        float s[EACH][EACH] = {};
        add_dots<W>(s, q, k);
        for (int i = 0; i < EACH; i++) {
            const int64_t last = segment.context + first + y + SIDE * i;  // key that this query sees
            float most = largest[i], sum = 0;
            for (int j = 0; j < EACH; j++) {
                s[i][j] = key + x + SIDE * j <= last ? scale * s[i][j] : -INFINITY;
                most = fmaxf(most, s[i][j]);
            }
            most = row_reduce(most, [](float a, float b) { return fmaxf(a, b); });
            const float shrink = expf(largest[i] - most);  // every query sees key 0, so that `most` is finite
            for (int j = 0; j < EACH; j++) {
                const float probability = expf(s[i][j] - most);
                p[(y + SIDE * i) * SCORES_STRIDE + x + SIDE * j] = probability;
                sum += probability;
            }
            largest[i] = most;
            total[i] = total[i] * shrink + sum;
            for (int j = 0; j < W / SIDE; j++) o[i][j] *= shrink;
        }
        __syncthreads();
        add_rows<W>(o, p, v);
        __syncthreads();
    }

    for (int i = 0; i < EACH; i++) {
        const float sum = row_reduce(total[i], [](float a, float b) { return a + b; });
        const int row = y + SIDE * i;
        if (row >= queries) continue;
        const int64_t to = segment.begin + first + row;
        for (int j = 0; j < W / SIDE; j++)
            if (x + SIDE * j < in.head_size) out.row(to)[head * in.head_size + x + SIDE * j] = o[i][j] / sum;
        if (x == 0) lse.row(to)[head] = largest[i] + logf(sum);
    }
}

// dq of a tile of queries.
template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_backward_queries_kernel(Matrix<float> d_qkv /*[N,3C]*/, Matrix<const float> d_out /*[N,C]*/,
                                      Matrix<const float> lse /*[N,NH]*/, const float* D /*[N,NH]*/, AttentionInputs in,
                                      const AttentionTile* tiles) {
    const SegmentRows segment = tiles[blockIdx.x].segment;
    const int64_t first = tiles[blockIdx.x].first, row0 = segment.begin + first;
    const int head = int(blockIdx.y), x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, segment, head);
    const float scale = rsqrtf(float(in.head_size));
    const int64_t queries = min(int64_t(TILE), segment.length - first), keys = segment.context + first + queries;

    float *q = shared_memory<float>(), *d_o = q + TILE * (W + 1);  // [64][W + 1]
    float *k = d_o + TILE * (W + 1), *v = k + TILE * (W + 1);      // [64][W + 1]
    float* ds = v + TILE * (W + 1);                                // [64][65]
    load_tile<W>(q, rows.q + first * rows.q_stride, rows.q_stride, queries, in.head_size);
    load_tile<W>(d_o, d_out.row(row0) + head * in.head_size, d_out.stride, queries, in.head_size);

    float dq[EACH][W / SIDE] = {};
    for (int64_t key = 0; key < keys; key += TILE) {
        load_tile<W>(k, rows.k + key * rows.kv_stride, rows.kv_stride, keys - key, in.head_size);
        load_tile<W>(v, rows.k + C + key * rows.kv_stride, rows.kv_stride, keys - key, in.head_size);
        __syncthreads();
        float s[EACH][EACH] = {}, dp[EACH][EACH] = {};
        add_dots<W>(s, q, k);
        add_dots<W>(dp, d_o, v);
        for (int i = 0; i < EACH; i++) {
            const int row = y + SIDE * i;
            const float base = row < queries ? lse.row(row0 + row)[head] : 0.0f;
            const float d = row < queries ? D[(row0 + row) * in.heads + head] : 0.0f;
            for (int j = 0; j < EACH; j++) {
                const bool seen = key + x + SIDE * j <= segment.context + first + row;
                ds[row * SCORES_STRIDE + x + SIDE * j] = seen ? expf(scale * s[i][j] - base) * (dp[i][j] - d) : 0.0f;
            }
        }
        __syncthreads();
        add_rows<W>(dq, ds, k);
        __syncthreads();
    }

    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < W / SIDE; j++)
            if (y + SIDE * i < queries && x + SIDE * j < in.head_size)
                d_qkv.row(row0 + y + SIDE * i)[head * in.head_size + x + SIDE * j] = scale * dq[i][j];
}

// dk and dv of a tile of keys.
template <int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1)
    attention_backward_keys_kernel(Matrix<float> d_qkv /*[N,3C]*/, Matrix<float> d_store /*[T,2C]*/,
                                   Matrix<const float> d_out /*[N,C]*/, Matrix<const float> lse /*[N,NH]*/,
                                   const float* D /*[N,NH]*/, AttentionInputs in, const AttentionTile* tiles) {
    const SegmentRows segment = tiles[blockIdx.x].segment;
    const int64_t first = tiles[blockIdx.x].first;
    const int head = int(blockIdx.y), x = int(threadIdx.x) % SIDE, y = int(threadIdx.x) / SIDE;
    const int64_t C = int64_t(in.heads) * in.head_size;
    const AttentionRows rows = attention_rows(in, segment, head);
    const float scale = rsqrtf(float(in.head_size));
    const int64_t keys = min(int64_t(TILE), segment.context + segment.length - first);

    float *k = shared_memory<float>(), *v = k + TILE * (W + 1);       // [64][W + 1]
    float *q = v + TILE * (W + 1), *d_o = q + TILE * (W + 1);         // [64][W + 1]
    float *p = d_o + TILE * (W + 1), *ds = p + TILE * SCORES_STRIDE;  // [64][65], a row a key
    load_tile<W>(k, rows.k + first * rows.kv_stride, rows.kv_stride, keys, in.head_size);
    load_tile<W>(v, rows.k + C + first * rows.kv_stride, rows.kv_stride, keys, in.head_size);

    float dk[EACH][W / SIDE] = {}, dv[EACH][W / SIDE] = {};
    for (int64_t query = max(int64_t(0), first - segment.context); query < segment.length; query += TILE) {
        const int64_t row0 = segment.begin + query, queries = segment.length - query;
        load_tile<W>(q, rows.q + query * rows.q_stride, rows.q_stride, queries, in.head_size);
        load_tile<W>(d_o, d_out.row(row0) + head * in.head_size, d_out.stride, queries, in.head_size);
        __syncthreads();
        float s[EACH][EACH] = {}, dp[EACH][EACH] = {};
        add_dots<W>(s, k, q);
        add_dots<W>(dp, v, d_o);
        for (int j = 0; j < EACH; j++) {
            const int column = x + SIDE * j;
            const float base = column < queries ? lse.row(row0 + column)[head] : INFINITY;  // probability 0
            const float d = column < queries ? D[(row0 + column) * in.heads + head] : 0.0f;
            for (int i = 0; i < EACH; i++) {
                const int row = y + SIDE * i;
                const bool seen = first + row <= segment.context + query + column;
                const float probability = seen ? expf(scale * s[i][j] - base) : 0.0f;
                p[row * SCORES_STRIDE + column] = probability;
                ds[row * SCORES_STRIDE + column] = probability * (dp[i][j] - d);
            }
        }
        __syncthreads();
        add_rows<W>(dv, p, d_o);
        add_rows<W>(dk, ds, q);
        __syncthreads();
    }

    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < W / SIDE; j++) {
            const int64_t row = y + SIDE * i, column = x + SIDE * j;
            if (row >= keys || column >= in.head_size) continue;
            if (segment.sliced) {
                float* to = d_store.row(first + row) + head * in.head_size + column;
                to[0] += scale * dk[i][j];
                to[C] += dv[i][j];
            } else {
                float* to = d_qkv.row(segment.begin + first + row) + C + head * in.head_size + column;
                to[0] = scale * dk[i][j];
                to[C] = dv[i][j];
            }
        }
}
