// An op of a plan, on the model: the tensors that it takes, at their planned addresses, what a message carries of them,
// and which of the functions in llmc/model/blocks.cuh a compute op runs on them. This is where schedules meet the
// model. Called by run_ops in train_gpt.cu.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "llmc/model/blocks.cuh"
#include "llmc/parallel/rank.h"
#include "llmc/parallel/run.h"
#include "llmc/parallel/transport.h"
#include "llmc/pipeline/uses.h"

// The tensors that an op of the plan takes, as views at their planned addresses; `uses` in llmc/pipeline/uses.h lists
// them. N is the number of rows that the chunk has in this step, at most what was planned; an op on a row piece gets
// the rows of the piece.
struct OpTensors {
    const Rank& rank;
    const Plan& plan;
    size_t op;
    int64_t N;

    std::byte* find(Tensor tensor, int layer) const {
        for (const PlacedUse& use : plan.memory[op])
            if (use.tensor == tensor && use.layer == layer) return rank.activations + use.offset;
        return nullptr;
    }
    Allocator place(Tensor tensor, int layer) const {
        if (std::byte* address = find(tensor, layer)) return {address};
        throw std::logic_error("the plan gives no " + std::string(tensor_name(tensor)) + " to " +
                               op_name(plan.ops[op]));
    }
    RowRange piece() const { return piece_rows(plan.ops[op], N); }
    template <class T>
    Matrix<T> rows(Tensor tensor, int layer) const {
        Allocator at = place(tensor, layer);
        const Matrix<T> all = RowsTensor<T>(at, N, tensor_columns(tensor, rank.options.model)).rows;
        return all.row_range(piece().begin, piece().count);
    }
    NormStatistics ln1_stats(int layer) const {
        Allocator at = place(Tensor::ln1_stats, layer);
        NormStatistics stats(at, N);
        stats.mean += piece().begin, stats.rstd += piece().begin;
        return stats;
    }
    // The weights of pre_attention and their gradients: where they are apart from it, else the rank's own.
    LayerTensors<floatX> pre_weights(int layer) const {
        if (!find(Tensor::qkv_weights, layer)) return rank.w.layers[size_t(layer)];
        Allocator at = place(Tensor::qkv_weights, layer);
        return MovedWeights<floatX>(at, rank.options.model).tensors;
    }
    LayerTensors<floatS> d_pre_weights(int layer) const {
        if (!find(Tensor::d_qkv_weights, layer)) return rank.dw.layers[size_t(layer)];
        Allocator at = place(Tensor::d_qkv_weights, layer);
        return MovedWeights<floatS>(at, rank.options.model).tensors;
    }
};

// Weights of pre_attention that travel with the products, or their gradients, as matrices of one row.
template <class T>
std::vector<Matrix<T>> moved_tensors(const LayerTensors<T>& t, const HelixOptions& helix, int64_t C) {
    std::vector<Matrix<T>> list = {{t.qkv_weight, 1, 3 * C * C}, {t.qkv_bias, 1, 3 * C}};
    if (helix.move_norm) list.insert(list.end(), {{t.ln1_weight, 1, C}, {t.ln1_bias, 1, C}});
    return list;
}

// What a send or receive carries.
inline void append_transfers(std::vector<Transfer>& transfers, const OpTensors& t) {
    const Op& op = t.plan.ops[t.op];
    const int64_t C = t.rank.options.model.channels;
    const auto append = [&]<class T>(const Matrix<T>& rows) {
        if (rows.size() > 0)
            transfers.push_back({op.kind == Kind::send, op.peer, rows.data, rows.size() * int64_t(sizeof(T))});
    };
    const auto append_weights = [&](const auto& weights) {
        for (const auto& tensor : moved_tensors(weights, t.plan.rules.helix, C)) append(tensor);
    };
    for (const Use& use : message_contents(op, t.plan.rules)) switch (use.tensor) {
            case Tensor::residual:
            case Tensor::d_residual:
                append(t.rows<floatR>(use.tensor, use.layer));
                break;
            case Tensor::qkv_weights:
                append_weights(t.pre_weights(use.layer));
                break;
            case Tensor::d_qkv_weights:
                append_weights(t.d_pre_weights(use.layer));
                break;
            case Tensor::delta:
                append(t.rows<floatS>(use.tensor, use.layer));
                break;
            default:
                append(t.rows<floatX>(use.tensor, use.layer));
        }
}

// One op: its part of the model, forward or backward, on one chunk or a row piece of it. A head adds its losses to
// rank.loss.
inline void compute(Rank& rank, const Plan& plan, size_t i, floatS loss_scale, Observer* observer) {
    const Op& op = plan.ops[i];
    const TensorRules& rules = plan.rules;
    const int l = op.layer, L = rules.layers;
    const int64_t C = rank.options.model.channels;
    const Recompute mode = rules.mode(op);
    const bool none = mode == Recompute::none, elementwise = mode == Recompute::elementwise;
    const bool full = mode == Recompute::full;
    const bool move = rules.helix.move_qkv, norm = rules.helix.move_norm, weights_too = rules.helix.weights_with(op);
    const BlockContext ctx{
        rank.device, rank.options.model, {rank.workspace}, rank.options.mlp_chunk, rank.options.head_chunk};
    const ChunkInputs& inputs = rank.inputs.chunks[size_t(op.chunk)];
    const ChunkShape& shape = plan.chunks[size_t(op.chunk)];
    const Segments& segments = inputs.segments;
    const auto w = l < 0 ? LayerTensors<floatX>{} : rank.w.layers[size_t(l)];
    const auto dw = l < 0 || !rules.training ? LayerTensors<floatS>{} : rank.dw.layers[size_t(l)];

    const OpTensors t{rank, plan, i, inputs.tokens};
    const RowRange piece = t.piece();
    if (piece.count == 0) return;
    const auto x = [&](int layer) { return t.rows<floatR>(Tensor::residual, layer); };
    const auto ln1 = [&] { return t.rows<floatX>(Tensor::ln1, l); };
    const auto qkv = [&] { return t.rows<floatX>(Tensor::qkv, l); };
    const auto attention_out = [&] { return t.rows<floatX>(Tensor::attention_out, l); };
    const auto lse = [&] { return t.rows<floatS>(Tensor::lse, l); };
    // Beside the attention: its LayerNorm, if that has moved there, and the products for queries, keys and values.
    const auto moved_forward = [&](bool products) {
        const LayerTensors<floatX> weights = t.pre_weights(l);
        if (norm)
            pre_attention_forward(ctx, weights, ln1(), t.ln1_stats(l), products ? std::optional(qkv()) : std::nullopt,
                                  x(l));
        else if (products) matmul_forward(rank.device, qkv(), ln1(), {weights.qkv_weight, 3 * C, C}, weights.qkv_bias);
    };
    const auto kept_post = [&]() -> std::optional<PostActivations> {
        if (Allocator at{t.find(Tensor::post, l)}; at.base)
            return PostActivations(at, t.N, rank.options.model).row_range(piece.begin, piece.count);
        if (Allocator at{t.find(Tensor::post_products, l)}; at.base)
            return PostActivations(PostProducts(at, t.N, rank.options.model).row_range(piece.begin, piece.count));
        return std::nullopt;
    };
    const auto d_post = [&] {
        Allocator at = t.place(Tensor::d_post, l);
        return PostGradients(at, t.N, rank.options.model).row_range(piece.begin, piece.count);
    };
    const auto store = [&]<class T>(Tensor tensor, T) {
        if (shape.store < 0) return Matrix<T>();
        return OpTensors{rank, plan, i, shape.store_tokens}.rows<T>(tensor, l);
    };
    const auto kv_store = [&] { return store(Tensor::store, floatX()); };
    const auto d_x = [&] { return t.rows<floatR>(Tensor::d_residual, -1); };
    const auto d_attention = [&] { return t.rows<floatX>(Tensor::d_attention, l); };
    const auto pre_gradient = [&](int layer) {
        if (move) return PreGradient{{}, t.rows<floatX>(Tensor::d_ln1, layer)};
        return PreGradient{t.rows<floatX>(Tensor::d_qkv, layer), {}};
    };
    floatS* losses = nullptr;
    if (observer && op.part == Part::head) {
        observer->losses[size_t(op.chunk)].resize(size_t(t.N));
        losses = observer->losses[size_t(op.chunk)].data();
    }

    if (op.pass == Pass::F) switch (op.part) {
            case Part::embed:
                embed_forward(ctx, rank.w, x(0), inputs.rows);
                break;
            case Part::pre:
                if (norm) break;
                pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), move ? std::nullopt : std::optional(qkv()), x(l));
                break;
            case Part::attention:
                if (move) moved_forward(true);
                attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                break;
            case Part::post:
                post_attention_forward(ctx, w, x(l + 1), kept_post(), x(l), attention_out());
                break;
            case Part::head:
                head_forward(ctx, rank.w, rank.loss.data(), x(L), inputs.targets, losses);
                break;
        }
    if (op.pass == Pass::B) switch (op.part) {
            case Part::head:
                head_backward(ctx, rank.w, rank.dw, d_x(), rank.loss.data(), x(L), inputs.targets, loss_scale, losses);
                break;
            case Part::post: {
                if (full && !rules.apart) {
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), qkv(), x(l));
                    attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                }
                std::optional<NextPre> next;
                if (l + 1 < L && rules.one_block(l + 1))
                    next.emplace(rank.w.layers[size_t(l) + 1], rank.dw.layers[size_t(l) + 1], pre_gradient(l + 1));
                post_attention_backward(ctx, w, dw, d_x(), d_attention(), kept_post(),
                                        rules.keeps_post(l) || elementwise ? Matrix<floatR>() : x(l), attention_out(),
                                        op.split ? std::optional(d_post()) : std::nullopt, next);
                if (t.find(Tensor::delta, l))
                    attention_delta(rank.device, t.rows<floatS>(Tensor::delta, l), d_attention(), attention_out());
                break;
            }
            case Part::attention: {
                if (!none && move) moved_forward(!elementwise);
                if (full && rules.apart)
                    attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                if (mode == Recompute::without_attention && !rules.apart)
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), qkv(), x(l));
                const Matrix<floatX> d_qkv = t.rows<floatX>(Tensor::d_qkv, l);
                const bool has_delta = t.find(Tensor::delta, l);
                attention_block_backward(ctx, d_qkv, d_attention(), has_delta ? Matrix<floatX>() : attention_out(),
                                         lse(), qkv(), kv_store(), store(Tensor::d_store, floatS()), segments,
                                         shape.last_slice,
                                         has_delta ? t.rows<floatS>(Tensor::delta, l) : Matrix<floatS>());
                if (!move) break;
                const LayerTensors<floatS> d_weights = t.d_pre_weights(l);
                if (weights_too)
                    for (const auto& tensor : moved_tensors(d_weights, rules.helix, C)) fill_zero(rank.device, tensor);
                qkv_backward_weight(ctx, d_weights, d_qkv, ln1());
                if (norm)
                    pre_attention_backward(ctx, t.pre_weights(l), d_weights, d_x(), {d_qkv, {}}, t.ln1_stats(l), x(l));
                else
                    matmul_backward_input(rank.device, t.rows<floatX>(Tensor::d_ln1, l), d_qkv,
                                          {t.pre_weights(l).qkv_weight, 3 * C, C});
                break;
            }
            case Part::pre:
                if (weights_too) {  // the sum of another rank or, of every chunk, its own
                    const auto sums = moved_tensors(dw, rules.helix, C);
                    const auto added = moved_tensors(t.d_pre_weights(l), rules.helix, C);
                    for (size_t n = 0; n < sums.size(); ++n) add_rows(rank.device, sums[n], added[n]);
                }
                if (norm) break;                // the rest ran with the attention
                if (rules.one_block(l)) break;  // the rest is part of post's backward, the next op
                if ((rules.apart && !none) || elementwise)
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), std::nullopt, x(l));
                if (!move && !op.split) qkv_backward_weight(ctx, dw, pre_gradient(l).d_qkv, ln1());
                pre_attention_backward(ctx, w, dw, d_x(), pre_gradient(l), t.ln1_stats(l), x(l));
                break;
            case Part::embed:
                embed_backward(ctx, rank.dw, d_x(), inputs.rows);
                break;
        }
    if (op.pass == Pass::W) {
        if (op.part == Part::pre) qkv_backward_weight(ctx, dw, t.rows<floatX>(Tensor::d_qkv, l), ln1());
        if (op.part == Part::post)
            post_attention_backward_weight(ctx, w, dw, d_post(), kept_post().value(), attention_out());
    }
}
