// Exact causal attention on flat tokens, forward and backward, for segments of any length and slices with context.
//
//   s_ij = scale q_i . k_j  for j <= context + i      scale = 1/sqrt(HS), i a query of the segment, j one of its keys
//   p_ij = exp(s_ij - lse_i)                          lse_i = log sum_j exp(s_ij)
//   o_i  = sum_j p_ij v_j
//   D_i  = sum_j p_ij dp_ij = do_i . o_i
//   dv_j = sum_i p_ij do_i      dp_ij = do_i . v_j    ds_ij = p_ij (dp_ij - D_i)
//   dq_i = scale sum_j ds_ij k_j                      dk_j = scale sum_i ds_ij q_i
//
// The model calls attention_forward, attention_backward and attention_delta (D by itself) at the end of this file.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "llmc/common.h"
#include "llmc/device.h"
#ifdef USE_CUDNN
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/cudnn_attention.h"
#endif

// One segment of a chunk: rows [begin, begin + length) of the chunk, after `context` earlier tokens of the same
// sequence. A slice has its keys and values in the store of its sequence, [context + length, 2C], where slices to come
// find them, too; every other segment has context 0, and its keys and values in qkv. A chunk has one slice at most.
struct SegmentRows {
    int64_t begin, length, context;
    bool sliced;
};

// Up to a fixed number of queries, or of keys, of a segment: what a block of threads works on, for one head.
struct AttentionTile {
    SegmentRows segment;
    int64_t first;  // query (row of the segment), or key (token of its sequence)
};

// The segments of a chunk. A GPU needs their tiles, too, in its own memory: attention_tiles(rows).
struct Segments {
    std::span<const SegmentRows> rows;
    const AttentionTile* tiles = nullptr;
#ifdef USE_CUDNN
    const CudnnChunk* cudnn_chunk = nullptr;  // the chunk as cuDNN takes it, and its table on the device,
    const int64_t* cudnn_table = nullptr;     // where device.cudnn is to be used
#endif

    Segments(const std::vector<SegmentRows>& rows, const AttentionTile* tiles = nullptr) : rows(rows), tiles(tiles) {}
};

#ifndef USE_CUDA

#include <omp.h>

#include "llmc/cpu.h"

// A segment and where its keys and values are.
template <class X, class S>
struct AttentionSegmentOf {
    int64_t begin, length;  // rows [begin, begin + length) of q, out, dq are its queries
    int64_t context;        // keys before the first query: query i sees keys 0..context + i of context + length
    const X *k, *v;         // [context + length, NH*HS], rows kv_stride apart
    int64_t kv_stride;
    X *dk = nullptr, *dv = nullptr;  // whole sequence: written
    int64_t dkv_stride = 0;
    S *dk_sum = nullptr, *dv_sum = nullptr;  // sliced sequence: accumulated (+=); dk and dv are null then
    int64_t sum_stride = 0;
};
using AttentionSegment = AttentionSegmentOf<floatX, floatS>;

// ---------------------------------------------------------------------------------------------------------------------
// The specification, and the fp64 form. Every probability is recomputed where it is needed; sums are kept in S.

template <class S, class X>
S attention_dot(const X* a, const X* b, int64_t n) {
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += S(a[i]) * S(b[i]);
    return sum;
}

template <class X, class S>
void attention_forward_reference(const Device& device, Matrix<X> out, Matrix<S> lse, Matrix<const X> q,
                                 std::span<const AttentionSegmentOf<X, S>> segments, int heads) {
    const int64_t HS = q.cols / heads;
    const S scale = S(1) / std::sqrt(S(HS));
    S* sums = device.scratch_as<S>(size_t(device.threads) * HS);
    for (const auto& segment : segments) {
#pragma omp parallel for collapse(2) schedule(static, 1) num_threads(device.threads)
        for (int64_t i = 0; i < segment.length; i++)
            for (int h = 0; h < heads; h++) {
                const X *qi = q.row(segment.begin + i) + h * HS, *k = segment.k + h * HS, *v = segment.v + h * HS;
                const int64_t keys = segment.context + i + 1;
                S largest = -std::numeric_limits<S>::infinity(), total = 0;
                for (int64_t j = 0; j < keys; j++)
                    largest = std::max(largest, scale * attention_dot<S>(qi, k + j * segment.kv_stride, HS));
                S* sum = sums + omp_get_thread_num() * HS;
                std::fill_n(sum, HS, S(0));
                for (int64_t j = 0; j < keys; j++) {
                    const S p = std::exp(scale * attention_dot<S>(qi, k + j * segment.kv_stride, HS) - largest);
                    total += p;
                    for (int64_t c = 0; c < HS; c++) sum[c] += p * S(v[j * segment.kv_stride + c]);
                }
                for (int64_t c = 0; c < HS; c++) out.row(segment.begin + i)[h * HS + c] = X(sum[c] / total);
                lse.row(segment.begin + i)[h] = largest + std::log(total);
            }
    }
}

template <class X, class S>
void attention_backward_reference(const Device& device, Matrix<X> dq, Matrix<const X> dout, Matrix<const X> out,
                                  Matrix<const X> q, Matrix<const S> lse,
                                  std::span<const AttentionSegmentOf<X, S>> segments, int heads,
                                  Matrix<const S> delta = {}) {
    const int64_t HS = q.cols / heads;
    const S scale = S(1) / std::sqrt(S(HS));
    S* sums = device.scratch_as<S>(size_t(device.threads) * 2 * HS);
    for (const auto& segment : segments) {
        const int64_t keys = segment.context + segment.length;
        struct Score {
            S p, ds;
        };
        const auto score = [&](int64_t i, int64_t j, int h) -> Score {
            const int64_t row = segment.begin + i, key = j * segment.kv_stride + h * HS;
            const X* dout_i = dout.row(row) + h * HS;
            const S p = std::exp(scale * attention_dot<S>(q.row(row) + h * HS, segment.k + key, HS) - lse.row(row)[h]);
            const S dp = attention_dot<S>(dout_i, segment.v + key, HS);
            return {p,
                    p * (dp - (delta.rows ? delta.row(row)[h] : attention_dot<S>(dout_i, out.row(row) + h * HS, HS)))};
        };
#pragma omp parallel num_threads(device.threads)
        {
            S *a = sums + omp_get_thread_num() * 2 * HS, *b = a + HS;
#pragma omp for collapse(2) schedule(static, 1)
            for (int64_t i = 0; i < segment.length; i++)
                for (int h = 0; h < heads; h++) {
                    std::fill_n(a, HS, S(0));
                    for (int64_t j = 0; j <= segment.context + i; j++) {
                        const S ds = score(i, j, h).ds;
                        for (int64_t c = 0; c < HS; c++) a[c] += ds * S(segment.k[j * segment.kv_stride + h * HS + c]);
                    }
                    for (int64_t c = 0; c < HS; c++) dq.row(segment.begin + i)[h * HS + c] = X(scale * a[c]);
                }
#pragma omp for collapse(2) schedule(static, 1)
            for (int64_t j = 0; j < keys; j++)
                for (int h = 0; h < heads; h++) {
                    std::fill_n(a, 2 * HS, S(0));
                    for (int64_t i = std::max<int64_t>(0, j - segment.context); i < segment.length; i++) {
                        const auto [p, ds] = score(i, j, h);
                        const int64_t row = segment.begin + i;
                        for (int64_t c = 0; c < HS; c++) a[c] += scale * ds * S(q.row(row)[h * HS + c]);
                        for (int64_t c = 0; c < HS; c++) b[c] += p * S(dout.row(row)[h * HS + c]);
                    }
                    for (int64_t c = h * HS, d = 0; d < HS; c++, d++) {
                        if (segment.dk) {
                            segment.dk[j * segment.dkv_stride + c] = X(a[d]);
                            segment.dv[j * segment.dkv_stride + c] = X(b[d]);
                        } else {
                            segment.dk_sum[j * segment.sum_stride + c] += a[d];
                            segment.dv_sum[j * segment.sum_stride + c] += b[d];
                        }
                    }
                }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The calls. Storage and CPU choose the form: fp64 takes the loops above; otherwise blocks, whose products are fp32
// (bf16 storage is widened as it is packed) or, where the CPU has them, of bf16 pairs.

#if !defined(PRECISION_FP64)
#include "llmc/kernels/attention_blocks.h"
#endif

// call.template operator()<Blocks>() with the blocks for `isa`; void for the loops.
template <class Call>
auto attention_dispatch(Isa isa, Call call) {
#if defined(PRECISION_FP64)
    (void)isa;
    return call.template operator()<void>();
#else
#if defined(PRECISION_BF16)
    if (isa >= Isa::amx) return call.template operator()<AttentionBf16<true>>();
    if (isa >= Isa::avx512_bf16) return call.template operator()<AttentionBf16<false>>();
#endif
    if (isa >= Isa::avx512) return call.template operator()<AttentionAvx512>();
    return call.template operator()<AttentionAvx2>();
#endif
}

// Bytes of device.scratch that both directions need for chunks of up to `tokens` tokens.
inline size_t attention_scratch_bytes(int threads, int64_t head_size, int heads, int64_t tokens, Isa isa = cpu_isa()) {
    return attention_dispatch(isa, [&]<class Blocks>() -> size_t {
        if constexpr (std::is_void_v<Blocks>) return size_t(threads) * 2 * head_size * sizeof(floatS);
        else return attention_blocks_scratch_bytes<Blocks>(threads, head_size, heads, tokens);
    });
}

inline void attention_forward(const Device& device, Matrix<floatX> out /*[N,C]*/, Matrix<floatS> lse /*[N,NH]*/,
                              Matrix<const floatX> q /*[N,C]*/, std::span<const AttentionSegment> segments, int heads,
                              Isa isa = cpu_isa()) {
    attention_dispatch(isa, [&]<class Blocks>() {
        if constexpr (std::is_void_v<Blocks>)
            attention_forward_reference<floatX, floatS>(device, out, lse, q, segments, heads);
        else attention_forward_blocks<Blocks>(device, out, lse, q, segments, heads);
    });
}

inline void attention_backward(const Device& device, Matrix<floatX> dq /*[N,C]*/, Matrix<const floatX> dout /*[N,C]*/,
                               Matrix<const floatX> out /*[N,C]*/, Matrix<const floatX> q /*[N,C]*/,
                               Matrix<const floatS> lse /*[N,NH]*/, std::span<const AttentionSegment> segments,
                               int heads, Isa isa = cpu_isa(), Matrix<const floatS> delta = {}) {
    attention_dispatch(isa, [&]<class Blocks>() {
        if constexpr (std::is_void_v<Blocks>)
            attention_backward_reference<floatX, floatS>(device, dq, dout, out, q, lse, segments, heads, delta);
        else attention_backward_blocks<Blocks>(device, dq, dout, out, q, lse, segments, heads, delta);
    });
}

// Segments with their keys and values, which are in qkv or, of a slice, in the store.
inline std::vector<AttentionSegment> attention_segments(const Segments& segments, Matrix<const floatX> qkv,
                                                        Matrix<const floatX> store) {
    const int64_t C = qkv.cols / 3;
    std::vector<AttentionSegment> list;
    for (const SegmentRows& r : segments.rows) {
        AttentionSegment s{};
        s.begin = r.begin;
        s.length = r.length;
        s.context = r.context;
        s.k = r.sliced ? store.data : qkv.row(r.begin) + C;
        s.v = s.k + C;
        s.kv_stride = r.sliced ? store.stride : qkv.stride;
        list.push_back(s);
    }
    return list;
}

inline void attention_forward(const Device& device, Matrix<floatX> out /*[N,C]*/, Matrix<floatS> lse /*[N,NH]*/,
                              Matrix<const floatX> qkv /*[N,3C]*/, Matrix<const floatX> store /*[T,2C]*/,
                              const Segments& segments, int heads) {
    attention_forward(device, out, lse, qkv.column_range(0, out.cols), attention_segments(segments, qkv, store), heads);
}

// The gradients of keys and values are written to d_qkv; those of a slice are added to d_store, in fp32. Where D is
// known as `delta` [N,NH], `out` is not read.
inline void attention_backward(const Device& device, Matrix<floatX> d_qkv /*[N,3C]*/, Matrix<floatS> d_store /*[T,2C]*/,
                               Matrix<const floatX> d_out /*[N,C]*/, Matrix<const floatX> out /*[N,C]*/,
                               Matrix<const floatS> lse /*[N,NH]*/, Matrix<const floatX> qkv /*[N,3C]*/,
                               Matrix<const floatX> store /*[T,2C]*/, const Segments& segments, int heads,
                               Matrix<const floatS> delta = {}) {
    const int64_t C = d_out.cols;
    std::vector<AttentionSegment> list = attention_segments(segments, qkv, store);
    for (size_t i = 0; i < list.size(); i++) {
        AttentionSegment& s = list[i];
        if (segments.rows[i].sliced) {
            s.dk_sum = d_store.data;
            s.dv_sum = d_store.data + C;
            s.sum_stride = d_store.stride;
        } else {
            s.dk = d_qkv.row(s.begin) + C;
            s.dv = s.dk + C;
            s.dkv_stride = d_qkv.stride;
        }
    }
    attention_backward(device, d_qkv.column_range(0, C), d_out, out, qkv.column_range(0, C), lse, list, heads,
                       cpu_isa(), delta);
}

inline void attention_delta(const Device& device, Matrix<floatS> delta /*[N,NH]*/, Matrix<const floatX> d_out /*[N,C]*/,
                            Matrix<const floatX> out /*[N,C]*/) {
    const int64_t HS = out.cols / delta.cols;
#pragma omp parallel for schedule(static) num_threads(device.threads)
    for (int64_t i = 0; i < out.rows; i++)
        for (int64_t h = 0; h < delta.cols; h++)
            delta.row(i)[h] = attention_dot<floatS>(d_out.row(i) + h * HS, out.row(i) + h * HS, HS);
}

#else

// ---------------------------------------------------------------------------------------------------------------------
// CUDA. A block of threads works on one tile of queries or of keys and passes over the keys or queries that it meets,
// so that every sum has one owner and one order. The backward pass is two such passes: one over keys for dq, one over
// queries for dk and dv; both compute the scores again.

struct AttentionInputs {
    Matrix<const floatX> qkv /*[N,3C]*/, store /*[T,2C]*/;
    int heads, head_size;
};

// What the blocks of one segment and head read: row 0 is the first query, or the first key. Values lie C after keys.
struct AttentionRows {
    const floatX *q, *k;
    int64_t q_stride, kv_stride;
};

__device__ inline AttentionRows attention_rows(const AttentionInputs& in, const SegmentRows& segment, int head) {
    const int64_t C = int64_t(in.heads) * in.head_size, column = int64_t(head) * in.head_size;
    const floatX* q = in.qkv.row(segment.begin) + column;
    if (segment.sliced) return {q, in.store.data + column, in.qkv.stride, in.store.stride};
    return {q, q + C, in.qkv.stride, in.qkv.stride};
}

#if defined(PRECISION_BF16)
#include "llmc/kernels/attention_mma.cuh"
#else
#include "llmc/kernels/attention_fp32.cuh"
#endif

// How many tiles of queries, and of keys, a chunk has.
inline int64_t attention_query_tiles(std::span<const SegmentRows> rows) {
    int64_t tiles = 0;
    for (const SegmentRows& r : rows) tiles += ceil_div(r.length, ATTENTION_QUERIES);
    return tiles;
}
inline int64_t attention_key_tiles(std::span<const SegmentRows> rows) {
    int64_t tiles = 0;
    for (const SegmentRows& r : rows) tiles += ceil_div(r.context + r.length, ATTENTION_KEYS);
    return tiles;
}

// The tiles of a chunk, on the host: those of queries, then those of keys. Blocks begin in this order, the ones with
// the most work first, so that none of them is left running alone at the end.
inline std::vector<AttentionTile> attention_tiles(std::span<const SegmentRows> rows) {
    std::vector<AttentionTile> queries, keys;
    for (const SegmentRows& r : rows) {
        for (int64_t i = 0; i < r.length; i += ATTENTION_QUERIES) queries.push_back({r, i});
        for (int64_t j = 0; j < r.context + r.length; j += ATTENTION_KEYS) keys.push_back({r, j});
    }
    std::stable_sort(queries.begin(), queries.end(), [](const AttentionTile& a, const AttentionTile& b) {
        return a.segment.context + a.first > b.segment.context + b.first;
    });
    const auto unseen = [](const AttentionTile& t) {  // queries before the first one that sees the keys
        return std::max<int64_t>(0, t.first - t.segment.context);
    };
    std::stable_sort(keys.begin(), keys.end(), [&](const AttentionTile& a, const AttentionTile& b) {
        return a.segment.length - unseen(a) > b.segment.length - unseen(b);
    });
    queries.insert(queries.end(), keys.begin(), keys.end());
    return queries;
}

// One thread for each D.
__global__ void attention_delta_kernel(float* D /*[N,NH]*/, Matrix<const floatX> d_out, Matrix<const floatX> out,
                                       int heads, int head_size) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= out.rows * heads) return;
    const int64_t row = i / heads, column = i % heads * head_size;
    float sum = 0;
    for (int c = 0; c < head_size; c += PACK) {
        const Floats a = load(d_out.row(row) + column + c), b = load(out.row(row) + column + c);
        for (int e = 0; e < PACK; e++) sum += a[e] * b[e];
    }
    D[i] = sum;
}

inline void attention_delta(const Device& device, Matrix<floatS> delta /*[N,NH]*/, Matrix<const floatX> d_out /*[N,C]*/,
                            Matrix<const floatX> out /*[N,C]*/) {
    launch(attention_delta_kernel, dim3(unsigned(ceil_div(delta.size(), 256))), 256, 0, device.stream, delta.data,
           d_out, out, int(delta.cols), int(out.cols / delta.cols));
}

// Bytes of device.scratch that both directions need for chunks of up to `tokens` tokens: D.
inline size_t attention_scratch_bytes(int /*threads*/, int64_t /*head_size*/, int heads, int64_t tokens) {
    return size_t(tokens) * heads * sizeof(float);
}

// call.template operator()<W>() with the columns W of a tile in shared memory: the head size and zeros.
template <class Call>
void attention_dispatch(int64_t head_size, Call call) {
    if (head_size % PACK != 0 || head_size > 128)
        throw Failure(EXIT_CONFIG, "attention on a GPU was asked for heads of " + std::to_string(head_size) +
                                       " channels; choose a multiple of 8 up to 128");
    if (head_size <= 32) call.template operator()<32>();
    else if (head_size <= 64) call.template operator()<64>();
    else call.template operator()<128>();
}

inline void attention_forward(const Device& device, Matrix<floatX> out /*[N,C]*/, Matrix<floatS> lse /*[N,NH]*/,
                              Matrix<const floatX> qkv /*[N,3C]*/, Matrix<const floatX> store /*[T,2C]*/,
                              const Segments& segments, int heads) {
#ifdef USE_CUDNN
    if (device.cudnn)
        return device.cudnn->forward(*segments.cudnn_chunk, segments.cudnn_table, out, lse, qkv, store, device.scratch,
                                     device.stream);
#endif
    const AttentionInputs in{qkv, store, heads, int(out.cols / heads)};
    const dim3 blocks(unsigned(attention_query_tiles(segments.rows)), unsigned(heads));
    attention_dispatch(in.head_size, [&]<int W>() {
        launch(attention_forward_kernel<W>, blocks, ATTENTION_THREADS, attention_forward_bytes<W>, device.stream, out,
               lse, in, segments.tiles);
    });
}

// The gradients of keys and values are written to d_qkv; those of a slice are added to d_store, in fp32. Where D is
// known as `delta` [N,NH], `out` is not read.
inline void attention_backward(const Device& device, Matrix<floatX> d_qkv /*[N,3C]*/, Matrix<floatS> d_store /*[T,2C]*/,
                               Matrix<const floatX> d_out /*[N,C]*/, Matrix<const floatX> out /*[N,C]*/,
                               Matrix<const floatS> lse /*[N,NH]*/, Matrix<const floatX> qkv /*[N,3C]*/,
                               Matrix<const floatX> store /*[T,2C]*/, const Segments& segments, int heads,
                               Matrix<const floatS> delta = {}) {
#ifdef USE_CUDNN
    if (device.cudnn) {  // which rounds the gradients of one slice to bf16 before they are added
        const int64_t workspace = round_up(cudnn_workspace_bytes(device.cudnn->shape), 256);
        const Matrix<bf16> d_slice(device.scratch_as<bf16>(size_t(d_store.size()), size_t(workspace)), d_store.rows,
                                   d_store.cols);
        device.cudnn->backward(*segments.cudnn_chunk, segments.cudnn_table, d_qkv, d_slice, d_out, out, lse, qkv, store,
                               device.scratch, device.stream);
        for (const SegmentRows& r : segments.rows)
            if (r.sliced)
                add_rows(device, d_store.row_range(0, r.context + r.length),
                         d_slice.row_range(0, r.context + r.length));
        return;
    }
#endif
    const AttentionInputs in{qkv, store, heads, int(d_out.cols / heads)};
    const int64_t query_tiles = attention_query_tiles(segments.rows), key_tiles = attention_key_tiles(segments.rows);
    float* scratch = device.scratch_as<float>(size_t(d_out.rows) * heads);
    const float* D = delta.rows ? delta.data : scratch;
    if (!delta.rows) attention_delta(device, {scratch, d_out.rows, heads}, d_out, out);
    attention_dispatch(in.head_size, [&]<int W>() {
        launch(attention_backward_queries_kernel<W>, dim3(unsigned(query_tiles), unsigned(heads)), ATTENTION_THREADS,
               attention_backward_queries_bytes<W>, device.stream, d_qkv, d_out, lse, D, in, segments.tiles);
        launch(attention_backward_keys_kernel<W>, dim3(unsigned(key_tiles), unsigned(heads)), ATTENTION_THREADS,
               attention_backward_keys_bytes<W>, device.stream, d_qkv, d_store, d_out, lse, D, in,
               segments.tiles + query_tiles);
    });
}

#endif
