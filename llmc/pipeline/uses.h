// What each op reads and writes. `uses` is the one description of it: memory planning (plan.h) follows from it, and so
// do messages (compute_op.h) and their sizes (costs.h).
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "llmc/pipeline/op.h"

// What the planner needs to know of a chunk. A chunk carries at most one slice of a sequence that is cut; the keys and
// values of its slices live in one store, known by the chunk of the first slice.
struct ChunkShape {
    int64_t tokens = 0;        // rows of its activations
    int store = -1;            // chunk of the first slice, -1 when nothing is cut
    int64_t store_tokens = 0;  // rows of the store: length of the cut sequence
    bool first_slice = false, last_slice = false;
    int64_t begin = 0;  // tokens of the cut sequence before this slice
};

// The tensors that live longer than one op (llmc/model/activations.h). Each belongs to a chunk, and most to a layer.
enum class Tensor {
    residual,       // input of layer l, output of layer l-1; l = L is the head's input
    ln1,            // output of the first LayerNorm,
    ln1_stats,      // its statistics
    qkv,            // queries, keys, values
    qkv_weights,    // weights for these, received from the rank that owns them
    attention_out,  // attention output,
    lse,            // its log-sum-exp,
    delta,          // and the product of its rows and those of its gradient (D in llmc/kernels/attention.cuh)
    post,           // everything between attention output and layer output, kept when nothing is recomputed;
    post_products,  // of that, what products need again
    store,          // keys and values of a sequence cut into slices
    d_residual,     // gradient of the residual stream, updated in place from head to embed
    d_post,         // what a split backward of post leaves for the gradients of its weights
    d_attention,    // gradient of the attention output
    d_qkv,          // gradient of queries, keys, values
    d_ln1,          // gradient of the LayerNorm's output,
    d_qkv_weights,  // and of the weights, of one chunk, from where the products were moved to
    d_store,        // gradients of keys and values of a cut sequence, summed over its later slices
};

inline const char* tensor_name(Tensor tensor) {
    static const char* const names[] = {
        "residual",    "ln1",         "ln1 statistics", "qkv",           "qkv weights",   "attention out",
        "log-sum-exp", "D",           "post",           "post products", "store",         "d residual",
        "d post",      "d attention", "d qkv",          "d ln1",         "d qkv weights", "d store"};
    return names[int(tensor)];
}

// What HelixPipe adds to its schedule (llmc/pipeline/README.md, "Helix"). As published: the QKV move alone.
struct HelixOptions {
    bool move_qkv = true;      // products for queries, keys and values run with the attention: their weights travel
    bool weights_once = true;  // once a step to each rank, and their gradients are summed there; else with every chunk
    // The LayerNorm before these products, too. With a mode that recomputes, only the log-sum-exp is kept there: the
    // residual stream comes again with the gradients, and D in place of the attention output.
    bool move_norm = true;
    // The last post and the head run where the last attention of the chunk did: every rank has their parameters. Both
    // wait for the backward pass, so that nothing of them is kept or recomputed.
    bool spread_head = true;

    static constexpr HelixOptions published() { return {true, false, false, false}; }  // by HelixPipe's authors
    bool operator==(const HelixOptions&) const = default;
    // Whether an op or message of a layer has weights or their gradients with it. Of row pieces, weights come with the
    // first one, and their gradients with the last.
    bool weights_with(const Op& op) const {
        return move_qkv && (weights_once ? op.weights : op.piece == (op.pass == Pass::F ? 0 : op.pieces - 1));
    }
};

// What is not as it is by default.
inline std::string helix_text(const HelixOptions& helix) {
    if (helix == HelixOptions::published()) return ", as published";
    std::string text = helix.move_qkv ? helix.weights_once ? "" : ", weights with every chunk" : ", QKV move off";
    if (helix.move_qkv && !helix.move_norm) text += ", norm move off";
    return text + (helix.spread_head ? "" : ", spread head off");
}

// What decides, besides the op itself, which tensors it takes.
struct TensorRules {
    int layers = 1;
    bool training = true;
    Recompute recompute = Recompute::none;
    // HelixPipe: the attention of a layer runs apart from its blocks. The rank of pre(l) gives x(l) away, and post(l)
    // runs on a rank of its own. With a mode that recomputes, post(l-1) and pre(l) are then one block that keeps only
    // x(l-1) and the attention output, and their backward is one as well, that of post(l-1).
    bool apart = false;
    HelixOptions helix = {false, false, false, false};  // all off unless `apart` is set

    bool one_block(int layer) const { return apart && !helix.move_norm && recompute != Recompute::none && layer > 0; }
    // Whether an attention gets the residual stream and D with its gradient, having kept neither.
    bool sends_again() const { return helix.move_norm && recompute != Recompute::none; }
    // cuDNN computes D itself, and wants the attention output.
    Tensor output_sent_again = Tensor::delta;
    Recompute mode(const Op& op) const {
        return op.keeps && recompute == Recompute::without_attention ? Recompute::elementwise : recompute;
    }
    // Whether the forward of post leaves all that its backward needs.
    bool keeps_post(int layer) const {
        return recompute == Recompute::none || (helix.spread_head && in_last_block(Part::post, layer, layers));
    }
};

enum class Access { create, update, read };

struct Use {
    Tensor tensor;
    int layer;  // -1 where there is one tensor a chunk
    int owner;  // chunk, for stores the chunk of the first slice; -1 where all chunks share the tensor
    Access access;
};

// What a send or receive carries, in this order (HelixPipe: spec of X, Y, dY, dX in the paper's section on the
// attention parallel partition; there the residual stream makes a detour over the rank of the attention).
inline std::vector<Use> message_contents(const Op& op, const TensorRules& rules) {
    const int l = op.layer;
    const Access whole = op.kind == Kind::send ? Access::read : Access::create;
    const Access access = op.kind == Kind::receive && op.piece > 0 ? Access::update : whole;
    std::vector<Use> list;
    const auto carry = [&](Tensor tensor, int layer) { list.push_back({tensor, layer, op.chunk, access}); };
    const bool move = rules.helix.move_qkv, once = rules.helix.weights_once, weights = rules.helix.weights_with(op);
    const bool norm = rules.helix.move_norm;
    if (op.pass == Pass::F) {
        if (op.part == Part::pre && move && !norm) carry(Tensor::ln1, l);
        if (op.part == Part::pre && weights) list.push_back({Tensor::qkv_weights, l, once ? -1 : op.chunk, whole});
        if (op.part == Part::pre && !move) carry(Tensor::qkv, l);
        carry(Tensor::residual, op.part == Part::post || op.part == Part::embed ? l + 1 : l);
        if (op.part == Part::attention) carry(Tensor::attention_out, l);
    } else {
        if (op.part == Part::attention && move && !norm) carry(Tensor::d_ln1, l);
        if (op.part == Part::attention && weights)  // one sum where they leave; one from each rank where they arrive
            list.push_back({Tensor::d_qkv_weights, l, once && op.kind == Kind::send ? -1 : op.chunk, whole});
        if (op.part == Part::attention && !move) carry(Tensor::d_qkv, l);
        carry(Tensor::d_residual, -1);
        if (op.part == Part::post) carry(Tensor::d_attention, l);
        if (op.part == Part::post && rules.sends_again()) {
            carry(Tensor::residual, l);
            if (rules.recompute != Recompute::full) carry(rules.output_sent_again, l);
        }
    }
    return list;
}

inline std::vector<Use> uses(const Op& op, const ChunkShape& shape, const TensorRules& rules) {
    if (op.kind != Kind::compute) return message_contents(op, rules);
    const int l = op.layer, c = op.chunk, s = shape.store;
    const Recompute mode = rules.mode(op);
    const bool sliced = s >= 0, none = mode == Recompute::none, elementwise = mode == Recompute::elementwise;
    const bool apart = rules.apart, move = rules.helix.move_qkv, once = rules.helix.weights_once;
    const bool norm = rules.helix.move_norm, again = rules.sends_again(), weights = rules.helix.weights_with(op);
    std::vector<Use> list;
    const auto use = [&](Access access, std::initializer_list<Tensor> tensors, int layer) {
        for (Tensor tensor : tensors) list.push_back({tensor, layer, c, access});
    };
    const auto create = [&](std::initializer_list<Tensor> tensors) { use(Access::create, tensors, l); };
    const auto read = [&](std::initializer_list<Tensor> tensors) { use(Access::read, tensors, l); };
    const auto update_d_residual = [&] { use(Access::update, {Tensor::d_residual}, -1); };
    const Tensor kept_post = rules.keeps_post(l) ? Tensor::post
                             : elementwise       ? Tensor::post_products
                                                 : Tensor::residual;
    const auto use_store = [&](Tensor tensor, Access access) {
        if (sliced) list.push_back({tensor, l, s, access});
    };
    const auto read_moved = [&](Access access) {  // access: to what comes of the residual stream
        if (norm) read({Tensor::residual}), use(access, {Tensor::ln1, Tensor::ln1_stats}, l);
        else read({Tensor::ln1});
        list.push_back({Tensor::qkv_weights, l, once ? -1 : c, Access::read});
    };

    if (op.pass == Pass::F) switch (op.part) {
            case Part::embed:
                use(Access::create, {Tensor::residual}, 0);
                break;
            case Part::pre:
                read({Tensor::residual});
                if (!norm) create({Tensor::ln1, Tensor::ln1_stats});
                if (!move) create({Tensor::qkv});
                break;
            case Part::attention:
                if (move) read_moved(Access::create), create({Tensor::qkv});
                else read({Tensor::qkv});
                create({Tensor::attention_out, Tensor::lse});
                use_store(Tensor::store, shape.first_slice ? Access::create : Access::update);
                break;
            case Part::post:
                read({Tensor::residual, Tensor::attention_out});
                use(Access::create, {Tensor::residual}, l + 1);
                if (rules.training && rules.keeps_post(l)) create({Tensor::post});
                else if (rules.training && elementwise) create({Tensor::post_products});
                break;
            case Part::head:
                use(Access::read, {Tensor::residual}, rules.layers);
                break;
        }
    if (op.pass == Pass::B) switch (op.part) {
            case Part::head:  // loss and gradient in one pass
                use(Access::read, {Tensor::residual}, rules.layers);
                use(Access::create, {Tensor::d_residual}, -1);
                break;
            case Part::post:
                read({kept_post});
                if (rules.recompute == Recompute::full && !apart) {  // needed first, so recomputed here
                    create({Tensor::ln1, Tensor::ln1_stats, Tensor::qkv, Tensor::attention_out, Tensor::lse});
                    use_store(Tensor::store, Access::read);
                } else {
                    read({Tensor::attention_out});
                }
                if (rules.one_block(l + 1) && l + 1 < rules.layers)
                    use(Access::read, {move ? Tensor::d_ln1 : Tensor::d_qkv}, l + 1);
                update_d_residual();
                create({Tensor::d_attention});
                if (again && rules.recompute != Recompute::full && rules.output_sent_again == Tensor::delta)
                    create({Tensor::delta});
                if (op.split) {  // with what has been recomputed, so that no product runs a third time
                    create({Tensor::d_post});
                    if (kept_post == Tensor::residual) create({Tensor::post_products});
                }
                break;
            case Part::attention:
                if (move) read_moved(none ? Access::read : Access::create);
                if (!apart && mode == Recompute::without_attention) {
                    read({Tensor::residual});
                    create({Tensor::ln1, Tensor::ln1_stats, Tensor::qkv});
                } else if (move && !none && !elementwise) {
                    create({Tensor::qkv});
                } else {
                    read({Tensor::qkv});
                }
                if (apart && rules.recompute == Recompute::full) create({Tensor::attention_out, Tensor::lse});
                else read({again ? rules.output_sent_again : Tensor::attention_out, Tensor::lse});
                read({Tensor::d_attention});
                create({Tensor::d_qkv});
                use_store(Tensor::store, Access::read);
                use_store(Tensor::d_store, shape.last_slice ? Access::create : Access::update);
                if (norm) update_d_residual();
                else if (move) create({Tensor::d_ln1});
                if (move)
                    list.push_back(
                        {Tensor::d_qkv_weights, l, once ? -1 : c, weights ? Access::create : Access::update});
                break;
            case Part::pre:
                if (weights) read({Tensor::d_qkv_weights});
                if (norm || rules.one_block(l)) break;
                read({Tensor::residual, move ? Tensor::d_ln1 : Tensor::d_qkv});
                if ((apart && !none) || elementwise) create({Tensor::ln1, Tensor::ln1_stats});
                else read({Tensor::ln1, Tensor::ln1_stats});
                update_d_residual();
                break;
            case Part::embed:
                use(Access::read, {Tensor::d_residual}, -1);
                break;
        }
    if (op.pass == Pass::W) {
        if (op.part == Part::pre) read({Tensor::d_qkv, Tensor::ln1});
        if (op.part == Part::post)
            read(
                {Tensor::d_post, kept_post == Tensor::post ? kept_post : Tensor::post_products, Tensor::attention_out});
    }
    for (Use& use : list)  // the first piece has created it
        if (use.access == Access::create && op.piece > 0) use.access = Access::update;
    return list;
}
