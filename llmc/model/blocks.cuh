// The model: embed, pre_attention, attention, post_attention, head, each with its forward and backward, on flat tokens
// [N, C]. A chunk may hold many segments; only attention looks at their borders.
//
//   embed           tokens               -> x(0)                  x(0) = wte[token] + wpe[position]
//   pre_attention   x(l)                 -> q, k, v               LayerNorm, then one product for all three
//   attention       q, k, v              -> o, lse                causal within each segment; no parameters
//   post_attention  x(l), o              -> x(l+1)                r = x(l) + proj(o), x(l+1) = r + out(gelu(fc(LN(r))))
//   head            x(L), targets        -> loss                  LayerNorm, logits, cross entropy
//
// Backward functions add to the gradients of their parameters (floatS) and update d_residual, the gradient of the
// residual stream, in place from x(L) down to x(0). All ops but attention work row by row, so they may handle any
// number of rows at a time: --mlp-chunk bounds the [n, 4C] tensors and --head-chunk the [n, Vp] ones (HelixPipe,
// chunked MLP).
#pragma once

#include <optional>
#include <span>
#include <type_traits>

// the kernels, in the order in which a token meets them
#include "llmc/kernels/encoder.cuh"
#include "llmc/kernels/layernorm.cuh"
#include "llmc/kernels/matmul.cuh"
#include "llmc/kernels/attention.cuh"
#include "llmc/kernels/gelu.cuh"
#include "llmc/kernels/classifier.cuh"
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/reduce.cuh"
// the tensors they work on
#include "llmc/model/activations.h"

struct BlockContext {
    const Device& device;
    const GptConfig& config;
    Allocator workspace;    // passed by value: every op starts with all of it
    int64_t mlp_chunk = 0;  // rows at a time in post and in the backward of pre, 0 = all
    int64_t head_chunk = 0;
};

// Calls body(begin, count) for consecutive ranges of at most `chunk` rows.
template <class Body>
void for_row_ranges(int64_t N, int64_t chunk, Body body) {
    const int64_t n = rows_at_a_time(chunk, N);
    for (int64_t begin = 0; begin < N; begin += n) body(begin, std::min(n, N - begin));
}

// ---------------------------------------------------------------------------------------------------------------------
// embed

inline void embed_forward(const BlockContext& ctx, const ModelTensors<floatX>& weights, Matrix<floatR> x,
                          const TokenRows& rows) {
    const GptConfig& g = ctx.config;
    encoder_forward(ctx.device, x, rows, {weights.wte, g.padded_vocab, g.channels},
                    {weights.wpe, g.context, g.channels});
}

inline void embed_backward(const BlockContext& ctx, const ModelTensors<floatS>& gradients,
                           Matrix<const floatR> d_residual, const TokenRows& rows) {
    const GptConfig& g = ctx.config;
    encoder_backward(ctx.device, {gradients.wte, g.padded_vocab, g.channels}, {gradients.wpe, g.context, g.channels},
                     d_residual, rows);
}

// ---------------------------------------------------------------------------------------------------------------------
// pre_attention

// `qkv` [N, 3C] is left out where the QKV move has the products computed beside the attention.
inline void pre_attention_forward(const BlockContext& ctx, const LayerTensors<floatX>& w, Matrix<floatX> ln1,
                                  const NormStatistics& norm, const std::optional<Matrix<floatX>>& qkv,
                                  Matrix<const floatR> x) {
    const int64_t C = ctx.config.channels;
    layernorm_forward(ctx.device, ln1, norm.mean, norm.rstd, x, w.ln1_weight, w.ln1_bias);
    if (qkv) matmul_forward(ctx.device, *qkv, ln1, {w.qkv_weight, 3 * C, C}, w.qkv_bias);
}

// Where the backward of pre_attention begins: at the gradient of the products, or, after the QKV move, at that of their
// input.
struct PreGradient {
    Matrix<const floatX> d_qkv;  // [N, 3C], or no rows
    Matrix<const floatX> d_ln1;  // [N, C], or no rows

    PreGradient row_range(int64_t begin, int64_t n) const {
        return d_qkv.rows ? PreGradient{d_qkv.row_range(begin, n), d_ln1}
                          : PreGradient{d_qkv, d_ln1.row_range(begin, n)};
    }
};

// The n rows of one range: down to the residual stream. `d_ln1` [n, C] is scratch.
inline void pre_attention_backward_rows(const BlockContext& ctx, const LayerTensors<floatX>& w,
                                        const LayerTensors<floatS>& dw, Matrix<floatR> d_residual,
                                        const PreGradient& gradient, Matrix<floatX> d_ln1, const floatS* mean,
                                        const floatS* rstd, Matrix<const floatR> x) {
    const int64_t C = ctx.config.channels;
    if (gradient.d_qkv.rows) matmul_backward_input(ctx.device, d_ln1, gradient.d_qkv, {w.qkv_weight, 3 * C, C});
    layernorm_backward(ctx.device, d_residual, dw.ln1_weight, dw.ln1_bias,
                       gradient.d_qkv.rows ? Matrix<const floatX>(d_ln1) : gradient.d_ln1, x, mean, rstd, w.ln1_weight);
}

inline void pre_attention_backward(BlockContext ctx, const LayerTensors<floatX>& w, const LayerTensors<floatS>& dw,
                                   Matrix<floatR> d_residual, const PreGradient& gradient, const NormStatistics& norm,
                                   Matrix<const floatR> x) {
    const PreWorkspace ws(ctx.workspace, rows_at_a_time(ctx.mlp_chunk, x.rows), ctx.config);
    for_row_ranges(x.rows, ctx.mlp_chunk, [&](int64_t begin, int64_t n) {
        pre_attention_backward_rows(ctx, w, dw, d_residual.row_range(begin, n), gradient.row_range(begin, n),
                                    ws.d_ln1.row_range(0, n), norm.mean + begin, norm.rstd + begin,
                                    x.row_range(begin, n));
    });
}

// The gradients of weight and bias for queries, keys and values are added to `dw`.
inline void qkv_backward_weight(const BlockContext& ctx, const LayerTensors<floatS>& dw, Matrix<const floatX> d_qkv,
                                Matrix<const floatX> ln1) {
    const int64_t C = ctx.config.channels;
    matmul_backward_weight(ctx.device, {dw.qkv_weight, 3 * C, C}, dw.qkv_bias, d_qkv, ln1);
}

// ---------------------------------------------------------------------------------------------------------------------
// attention

// Slices add their keys and values to the store of their sequence, where its later slices find them.
inline void attention_block_forward(const BlockContext& ctx, Matrix<floatX> out, Matrix<floatS> lse,
                                    Matrix<const floatX> qkv, Matrix<floatX> store, const Segments& segments) {
    const int64_t C = ctx.config.channels;
    for (const SegmentRows& r : segments.rows)
        if (r.sliced)
            copy_rows(ctx.device, store.row_range(r.context, r.length),
                      qkv.row_range(r.begin, r.length).column_range(C, 2 * C));
    attention_forward(ctx.device, out, lse, qkv, store, segments, int(ctx.config.heads));
}

// d_store sums the gradients of all keys and values of a cut sequence, in fp32, while its slices run backward from the
// last to the first; those of a slice are complete once the slice itself has run. `last_slice` clears it. `delta` [N,
// NH] in place of `out` where that is not here.
inline void attention_block_backward(const BlockContext& ctx, Matrix<floatX> d_qkv, Matrix<const floatX> d_out,
                                     Matrix<const floatX> out, Matrix<const floatS> lse, Matrix<const floatX> qkv,
                                     Matrix<const floatX> store, Matrix<floatS> d_store, const Segments& segments,
                                     bool last_slice, Matrix<const floatS> delta = {}) {
    const int64_t C = ctx.config.channels;
    if (last_slice) fill_zero(ctx.device, d_store);
    attention_backward(ctx.device, d_qkv, d_store, d_out, out, lse, qkv, store, segments, int(ctx.config.heads), delta);
    for (const SegmentRows& r : segments.rows)
        if (r.sliced)
            copy_rows(ctx.device, d_qkv.row_range(r.begin, r.length).column_range(C, 2 * C),
                      Matrix<const floatS>(d_store.row_range(r.context, r.length)));
}

// ---------------------------------------------------------------------------------------------------------------------
// post_attention

// Everything up to GELU for the n rows of `a`; what the backward pass needs.
inline void post_attention_hidden(const BlockContext& ctx, const LayerTensors<floatX>& w, const PostActivations& a,
                                  Matrix<const floatR> x, Matrix<const floatX> o) {
    const int64_t C = ctx.config.channels;
    matmul_residual_forward(ctx.device, a.residual, x, o, {w.proj_weight, C, C}, w.proj_bias);
    layernorm_forward(ctx.device, a.ln2, a.mean, a.rstd, a.residual, w.ln2_weight, w.ln2_bias);
    matmul_forward(ctx.device, a.gelu, a.ln2, {w.fc_weight, 4 * C, C}, w.fc_bias, Activation::gelu, a.fc);
}

// Where the n rows of post_attention's activations are: kept, in the workspace, or some here and some there.
inline PostActivations post_rows(const std::optional<PostActivations>& kept, const PostWorkspace& ws, int64_t begin,
                                 int64_t n) {
    if (kept && kept->has_all()) return kept->row_range(begin, n);
    PostActivations a = ws.activations.row_range(0, n);
    if (kept) a.residual = kept->residual.row_range(begin, n), a.fc = kept->fc.row_range(begin, n);
    return a;
}

// The activations of n rows for the backward pass: `a` is recomputed from x where that has rows, else completed from
// what was kept.
inline void recompute_post(const BlockContext& ctx, const LayerTensors<floatX>& w,
                           const std::optional<PostActivations>& kept, const PostActivations& a, Matrix<const floatR> x,
                           Matrix<const floatX> o, int64_t begin) {
    const int64_t n = a.residual.rows;
    if (x.rows) {
        post_attention_hidden(ctx, w, a, x.row_range(begin, n), o.row_range(begin, n));
    } else if (!kept->has_all()) {
        layernorm_forward(ctx.device, a.ln2, a.mean, a.rstd, a.residual, w.ln2_weight, w.ln2_bias);
        gelu_forward(ctx.device, a.gelu, a.fc);
    }
}

// `kept` is where activations are kept for the backward pass, all of them or what PostProducts has.
inline void post_attention_forward(BlockContext ctx, const LayerTensors<floatX>& w, Matrix<floatR> y /*[N, C]*/,
                                   const std::optional<PostActivations>& kept, Matrix<const floatR> x,
                                   Matrix<const floatX> o) {
    const int64_t N = x.rows, C = ctx.config.channels;
    const PostWorkspace ws(ctx.workspace, rows_at_a_time(ctx.mlp_chunk, N), ctx.config);
    for_row_ranges(N, ctx.mlp_chunk, [&](int64_t begin, int64_t n) {
        const PostActivations a = post_rows(kept, ws, begin, n);
        post_attention_hidden(ctx, w, a, x.row_range(begin, n), o.row_range(begin, n));
        matmul_residual_forward(ctx.device, y.row_range(begin, n), a.residual, a.gelu, {w.out_weight, C, 4 * C},
                                w.out_bias);
    });
}

// The residual gradient as matrix products read it: the same memory where the types agree, else a cast copy.
inline Matrix<const floatX> as_product_operand(const Device&, Matrix<floatX>, Matrix<floatX> rows) { return rows; }
template <class R>
Matrix<const floatX> as_product_operand(const Device& device, Matrix<floatX> copy, Matrix<R> rows) {
    copy_rows(device, copy, rows);
    return copy;
}

// The backward of the next layer's pre_attention, where it runs right before that of this post_attention and on the
// same rows: HelixPipe recomputes the two as one block, so that nothing between them is kept.
struct NextPre {
    const LayerTensors<floatX>& w;
    const LayerTensors<floatS>& dw;
    PreGradient gradient;
};

// With `split`, the gradients of the weights are left to post_attention_backward_weight. x [N, C] where activations are
// to be recomputed, into `kept` if that is given; no rows where `kept` has them.
inline void post_attention_backward(BlockContext ctx, const LayerTensors<floatX>& w, const LayerTensors<floatS>& dw,
                                    Matrix<floatR> d_residual, Matrix<floatX> d_attention /*[N, C]*/,
                                    const std::optional<PostActivations>& kept, Matrix<const floatR> x,
                                    Matrix<const floatX> o, const std::optional<PostGradients>& split,
                                    const std::optional<NextPre>& next) {
    const int64_t N = o.rows, C = ctx.config.channels;
    const Device& device = ctx.device;
    const PostWorkspace ws(ctx.workspace, rows_at_a_time(ctx.mlp_chunk, N), ctx.config);
    for_row_ranges(N, ctx.mlp_chunk, [&](int64_t begin, int64_t n) {
        const PostActivations a = post_rows(kept, ws, begin, n);
        const Matrix<const floatX> o_rows = o.row_range(begin, n);
        const Matrix<floatR> d_rows = d_residual.row_range(begin, n);
        const Matrix<floatX> d_ln2 = ws.d_ln2.row_range(0, n);
        recompute_post(ctx, w, kept, a, x, o, begin);
        if (next) {
            const Matrix<floatR> output = ws.output.row_range(0, n);
            const Matrix<floatX> ln1 = ws.d_residual.row_range(0, n);
            const PreGradient gradient = next->gradient.row_range(begin, n);
            matmul_residual_forward(device, output, a.residual, a.gelu, {w.out_weight, C, 4 * C}, w.out_bias);
            layernorm_forward(device, ln1, ws.norm.mean, ws.norm.rstd, output, next->w.ln1_weight, next->w.ln1_bias);
            if (gradient.d_qkv.rows) qkv_backward_weight(ctx, next->dw, gradient.d_qkv, ln1);
            pre_attention_backward_rows(ctx, next->w, next->dw, d_rows, gradient, d_ln2, ws.norm.mean, ws.norm.rstd,
                                        output);
        }

        // The gradient of the residual stream is updated in place, so that a split backward needs copies of it.
        const auto operand = [&](Matrix<floatX> copy) -> Matrix<const floatX> {
            if (!split) return as_product_operand(device, ws.d_residual.row_range(0, n), d_rows);
            copy_rows(device, copy.row_range(begin, n), Matrix<const floatR>(d_rows));
            return copy.row_range(begin, n);
        };
        const Matrix<floatX> d_fc = split ? split->d_fc.row_range(begin, n) : ws.d_fc.row_range(0, n);
        Matrix<const floatX> d_branch = operand(split ? split->d_out : Matrix<floatX>());
        matmul_backward_input(device, d_fc, d_branch, {w.out_weight, C, 4 * C}, a.fc);
        if (!split) matmul_backward_weight(device, {dw.out_weight, C, 4 * C}, dw.out_bias, d_branch, a.gelu);
        matmul_backward_input(device, d_ln2, d_fc, {w.fc_weight, 4 * C, C});
        if (!split) matmul_backward_weight(device, {dw.fc_weight, 4 * C, C}, dw.fc_bias, d_fc, a.ln2);
        layernorm_backward(device, d_rows, dw.ln2_weight, dw.ln2_bias, d_ln2, a.residual, a.mean, a.rstd, w.ln2_weight);

        d_branch = operand(split ? split->d_middle : Matrix<floatX>());
        matmul_backward_input(device, d_attention.row_range(begin, n), d_branch, {w.proj_weight, C, C});
        if (!split) matmul_backward_weight(device, {dw.proj_weight, C, C}, dw.proj_bias, d_branch, o_rows);
    });
}

// The products that a split backward has left out.
inline void post_attention_backward_weight(BlockContext ctx, const LayerTensors<floatX>& w,
                                           const LayerTensors<floatS>& dw, const PostGradients& d,
                                           const PostActivations& kept, Matrix<const floatX> o) {
    const int64_t N = o.rows, C = ctx.config.channels;
    const Device& device = ctx.device;
    const PostWorkspace ws(ctx.workspace, rows_at_a_time(ctx.mlp_chunk, N), ctx.config);
    for_row_ranges(N, ctx.mlp_chunk, [&](int64_t begin, int64_t n) {
        const PostActivations a = post_rows(kept, ws, begin, n);
        recompute_post(ctx, w, kept, a, {}, o, begin);
        matmul_backward_weight(device, {dw.out_weight, C, 4 * C}, dw.out_bias, d.d_out.row_range(begin, n), a.gelu);
        matmul_backward_weight(device, {dw.fc_weight, 4 * C, C}, dw.fc_bias, d.d_fc.row_range(begin, n), a.ln2);
        matmul_backward_weight(device, {dw.proj_weight, C, C}, dw.proj_bias, d.d_middle.row_range(begin, n),
                               o.row_range(begin, n));
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// head

// Final LayerNorm and logits of the rows x; `ws` has at least x.rows rows.
inline Matrix<floatX> head_logits(const BlockContext& ctx, const ModelTensors<floatX>& w, const HeadWorkspace& ws,
                                  Matrix<const floatR> x) {
    const Matrix<floatX> ln = ws.ln.row_range(0, x.rows), logits = ws.logits.row_range(0, x.rows);
    layernorm_forward(ctx.device, ln, ws.mean, ws.rstd, x, w.lnf_weight, w.lnf_bias);
    matmul_forward(ctx.device, logits, ln, {w.head, ctx.config.padded_vocab, ctx.config.channels}, nullptr);
    return logits;
}

// Adds the losses of the chunk's targets, in nats, to `total` (on the device); targets of -1 count nothing. `losses`,
// [N] on the host, when given, receives each one.
inline void head_forward(BlockContext ctx, const ModelTensors<floatX>& w, double* total, Matrix<const floatR> x,
                         const int32_t* targets /*[N]*/, floatS* losses = nullptr) {
    const HeadWorkspace ws(ctx.workspace, rows_at_a_time(ctx.head_chunk, x.rows), ctx.config);
    for_row_ranges(x.rows, ctx.head_chunk, [&](int64_t begin, int64_t n) {
        const Matrix<floatX> logits = head_logits(ctx, w, ws, x.row_range(begin, n));
        classifier_forward_backward(ctx.device, ws.losses, logits, targets + begin, ctx.config.vocab, 0, false);
        add_sum(ctx.device, total, ws.losses, n);
        if (losses) download(ctx.device, losses + begin, ws.losses, n);
    });
}

// Loss and gradient in one pass: at most one chunk of logits is alive. `loss_scale` is one over the number of targets
// in the whole step, on all ranks: the only place where anything is divided by it. Creates d_residual.
inline void head_backward(BlockContext ctx, const ModelTensors<floatX>& w, const ModelTensors<floatS>& dw,
                          Matrix<floatR> d_residual, double* total, Matrix<const floatR> x, const int32_t* targets,
                          floatS loss_scale, floatS* losses = nullptr) {
    const GptConfig& g = ctx.config;
    const HeadWorkspace ws(ctx.workspace, rows_at_a_time(ctx.head_chunk, x.rows), g);
    fill_zero(ctx.device, d_residual);
    for_row_ranges(x.rows, ctx.head_chunk, [&](int64_t begin, int64_t n) {
        const Matrix<const floatR> rows = x.row_range(begin, n);
        const Matrix<floatX> logits = head_logits(ctx, w, ws, rows), d_ln = ws.d_ln.row_range(0, n);
        classifier_forward_backward(ctx.device, ws.losses, logits, targets + begin, g.vocab, loss_scale, true);
        add_sum(ctx.device, total, ws.losses, n);
        if (losses) download(ctx.device, losses + begin, ws.losses, n);
        matmul_backward_input(ctx.device, d_ln, logits, {w.head, g.padded_vocab, g.channels});
        matmul_backward_weight(ctx.device, {dw.head, g.padded_vocab, g.channels}, nullptr, logits,
                               ws.ln.row_range(0, n));
        layernorm_backward(ctx.device, d_residual.row_range(begin, n), dw.lnf_weight, dw.lnf_bias, d_ln, rows, ws.mean,
                           ws.rstd, w.lnf_weight);
    });
}
