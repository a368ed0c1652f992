// A training step is data: for every rank a flat list of Ops. Schedules return such lists, check.h proves them, the
// planner gives their tensors addresses, the schedule loop in train_gpt.cu runs them. `uses` is the one description of
// what each op reads and writes; memory planning follows from it.
#pragma once

#include <string>
#include <vector>

#include "llmc/model/gpt.h"

// Forward; backward; the gradients of the weights of a block, where its backward leaves them for later.
enum class Pass { F, B, W };

enum class Kind { compute, send, receive };

// A compute op runs one part of the model on one chunk. A send or receive carries the result of the compute op that its
// first four fields name.
struct Op {
    Part part;
    Pass pass;
    int layer;  // -1 for embed and head
    int chunk;
    bool split = false;  // a B of pre or post that yields the gradient of its input alone; a W of the same part follows
    Kind kind = Kind::compute;
    int peer = -1;   // rank at the other end
    int batch = -1;  // sends and receives of one number are posted together; numbers increase along the list
};

inline const char* part_name(Part part) {
    static const char* const names[] = {"embed", "pre", "attention", "post", "head"};
    return names[int(part)];
}

// What a send or receive carries. Between stages of whole layers: the residual stream, or its gradient. Between the
// blocks and the attentions of HelixPipe: X and Y into and out of an attention, dX and dY back.
inline const char* message_name(const Op& op) {
    if (op.part == Part::pre) return op.pass == Pass::F ? "X" : "gradient";
    if (op.part == Part::attention) return op.pass == Pass::F ? "Y" : "dX";
    if (op.part == Part::post) return op.pass == Pass::F ? "activation" : "dY";
    return op.pass == Pass::F ? "activation" : "gradient";
}

inline std::string op_name(const Op& op) {
    static const char* const passes[] = {"", " backward", " weight gradients"};
    const bool compute = op.kind == Kind::compute, send = op.kind == Kind::send;
    std::string name = compute ? part_name(op.part) + std::string(passes[int(op.pass)])
                               : (send ? "send of " : "receive of ") + std::string(message_name(op));
    if (op.layer >= 0) name += " layer " + std::to_string(op.layer);
    name += " chunk " + std::to_string(op.chunk);
    return compute ? name : name + (send ? " to rank " : " from rank ") + std::to_string(op.peer);
}

// What the planner needs to know of a chunk. A chunk carries at most one slice of a sequence that is cut; the keys and
// values of its slices live in one store, known by the chunk of the first slice.
struct ChunkShape {
    int64_t tokens = 0;        // rows of its activations
    int store = -1;            // chunk of the first slice, -1 when nothing is cut
    int64_t store_tokens = 0;  // rows of the store: length of the cut sequence
    bool first_slice = false, last_slice = false;
};

// The tensors (or small sets of tensors, llmc/model/activations.h) that live longer than one op.
enum class Tensor {
    residual,     // input of layer l, output of layer l-1; l = L is the head's input
    pre,          // LayerNorm output and statistics, queries, keys, values
    attention,    // attention output, log-sum-exp
    post,         // everything between attention output and layer output, kept when nothing is recomputed
    store,        // keys and values of a sequence cut into slices
    d_residual,   // gradient of the residual stream, updated in place from head to embed
    d_attention,  // gradient of the attention output
    d_qkv,        // gradient of queries, keys, values
    d_store,      // gradients of keys and values of a cut sequence, summed over its later slices
};

enum class Access { create, update, read };

struct Use {
    Tensor tensor;
    int layer;  // -1 where there is one tensor a chunk
    int owner;  // chunk, for stores the chunk of the first slice
    Access access;
};

inline std::vector<Use> uses(const Op& op, const ChunkShape& shape, Recompute recompute, int layers, bool training) {
    const int l = op.layer, c = op.chunk, s = shape.store;
    const bool sliced = s >= 0;
    std::vector<Use> list;
    auto create = [&](Tensor t, int layer, int owner) { list.push_back({t, layer, owner, Access::create}); };
    auto update = [&](Tensor t, int layer, int owner) { list.push_back({t, layer, owner, Access::update}); };
    auto read = [&](Tensor t, int layer, int owner) { list.push_back({t, layer, owner, Access::read}); };

    if (op.pass == Pass::F) switch (op.part) {
            case Part::embed:
                create(Tensor::residual, 0, c);
                break;
            case Part::pre:
                read(Tensor::residual, l, c);
                create(Tensor::pre, l, c);
                break;
            case Part::attention:
                read(Tensor::pre, l, c);
                create(Tensor::attention, l, c);
                if (sliced) list.push_back({Tensor::store, l, s, shape.first_slice ? Access::create : Access::update});
                break;
            case Part::post:
                read(Tensor::residual, l, c);
                read(Tensor::attention, l, c);
                create(Tensor::residual, l + 1, c);
                if (training && recompute == Recompute::none) create(Tensor::post, l, c);
                break;
            case Part::head:
                read(Tensor::residual, layers, c);
                break;
        }
    else switch (op.part) {
            case Part::head:  // loss and gradient in one pass
                read(Tensor::residual, layers, c);
                create(Tensor::d_residual, -1, c);
                break;
            case Part::post:
                read(Tensor::residual, l, c);
                if (recompute == Recompute::none) read(Tensor::post, l, c);
                if (recompute == Recompute::full) {  // the attention output is needed first, so it is recomputed here
                    create(Tensor::pre, l, c);
                    create(Tensor::attention, l, c);
                    if (sliced) read(Tensor::store, l, s);
                } else {
                    read(Tensor::attention, l, c);
                }
                update(Tensor::d_residual, -1, c);
                create(Tensor::d_attention, -1, c);
                break;
            case Part::attention:
                if (recompute == Recompute::without_attention) {
                    read(Tensor::residual, l, c);
                    create(Tensor::pre, l, c);
                } else {
                    read(Tensor::pre, l, c);
                }
                read(Tensor::attention, l, c);
                read(Tensor::d_attention, -1, c);
                create(Tensor::d_qkv, -1, c);
                if (sliced) {
                    read(Tensor::store, l, s);
                    list.push_back({Tensor::d_store, l, s, shape.last_slice ? Access::create : Access::update});
                }
                break;
            case Part::pre:
                read(Tensor::residual, l, c);
                read(Tensor::pre, l, c);
                read(Tensor::d_qkv, -1, c);
                update(Tensor::d_residual, -1, c);
                break;
            case Part::embed:
                read(Tensor::d_residual, -1, c);
                break;
        }
    return list;
}
