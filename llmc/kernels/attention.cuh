// Exact causal attention on flat tokens, forward and backward, for segments of any length and slices with context.
//
//   s_ij = scale q_i . k_j  for j <= context + i      scale = 1/sqrt(HS), i a query of the segment, j one of its keys
//   p_ij = exp(s_ij - lse_i)                          lse_i = log sum_j exp(s_ij)
//   o_i  = sum_j p_ij v_j
//   dv_j = sum_i p_ij do_i     dp_ij = do_i . v_j     ds_ij = p_ij (dp_ij - D_i)     D_i = sum_j p_ij dp_ij = do_i .
//   o_i dq_i = scale sum_j ds_ij k_j                      dk_j = scale sum_i ds_ij q_i
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "llmc/common.h"
#include "llmc/cpu.h"
#include "llmc/device.h"

// One segment of a chunk: `length` queries of one sequence, and the keys and values that they see.
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
                                  std::span<const AttentionSegmentOf<X, S>> segments, int heads) {
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
            return {p, p * (dp - attention_dot<S>(dout_i, out.row(row) + h * HS, HS))};
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
                               int heads, Isa isa = cpu_isa()) {
    attention_dispatch(isa, [&]<class Blocks>() {
        if constexpr (std::is_void_v<Blocks>)
            attention_backward_reference<floatX, floatS>(device, dq, dout, out, q, lse, segments, heads);
        else attention_backward_blocks<Blocks>(device, dq, dout, out, q, lse, segments, heads);
    });
}
