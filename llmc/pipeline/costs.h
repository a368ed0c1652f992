// How long each op and message of a plan takes: ops from forward times given by hand, or both from what they compute
// and move and from the rates of a cluster. simulate.h makes a timeline of it.
#pragma once

#include "llmc/pipeline/cluster.h"
#include "llmc/pipeline/plan.h"

// ---------------------------------------------------------------------------------------------------------------------
// Times given by hand

// Forward times of the parts on a chunk, in ms. Head and embedding cost nothing.
struct PartTimes {
    double pre = 0, attention = 0, post = 0;
};

// A backward takes twice the forward; B and W of a split one take once each. What is recomputed comes on top, in the op
// that `uses` has create it; LayerNorm and GELU alone, as `elementwise` recomputes them, take no time.
struct OpTimes {
    PartTimes forward;
    TensorRules rules;

    double operator()(const Op& op) const {
        const PartTimes& t = forward;
        const Recompute mode = rules.mode(op);
        const bool backward = op.pass == Pass::B, full = mode == Recompute::full;
        const bool recomputes = op.pass != Pass::F && mode != Recompute::none && mode != Recompute::elementwise;
        const double block = backward && !op.split ? 2 : 1;
        switch (op.part) {
            case Part::pre:
                return (block * t.pre + (recomputes && rules.apart && rules.helix.move_qkv ? t.pre : 0)) / op.pieces;
            case Part::attention:
                return (backward ? 2 : 1) * t.attention + (recomputes && full && rules.apart ? t.attention : 0) +
                       (recomputes && !full && !rules.apart ? t.pre : 0);
            case Part::post:
                return (block * t.post + (recomputes && !rules.keeps_post(op.layer) ? t.post : 0) +
                        (backward && full && !rules.apart ? t.pre + t.attention : 0)) /
                       op.pieces;
            default:
                return 0;
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Times from the arithmetic

// What the storage types of a program decide: bytes of its elements, of its tensors and of its workspace.
struct ElementSizes {
    int64_t x, r, s;  // of floatX, floatR, floatS
    TensorBytes tensor;
    int64_t (*workspace)(int64_t N, const GptConfig&, int64_t mlp_chunk, int64_t head_chunk);
};

template <class Types>
ElementSizes sizes_of() {
    return {sizeof(typename Types::X), sizeof(typename Types::R), sizeof(typename Types::S), tensor_bytes<Types>,
            workspace_bytes<Types>};
}

template <class XType, class RType, class SType>
struct StorageTypes {
    using X = XType;
    using R = RType;
    using S = SType;
};

// Of a precision in which a cluster trains (element_precisions).
inline ElementSizes element_sizes(const std::string& precision) {
    if (precision == "bf16") return sizes_of<StorageTypes<bf16, bf16, float>>();
    if (precision == "bf16-fp32") return sizes_of<StorageTypes<bf16, float, float>>();
    return sizes_of<StorageTypes<float, float, float>>();
}

// What an op computes and moves, all devices of its rank together.
struct OpWork {
    double products = 0;                                   // FLOPs, each divided by the efficiency at its rows
    double attention_forward = 0, attention_backward = 0;  // FLOPs
    double bytes = 0;     // read and written where memory is the bound: LayerNorm, residual additions, softmax
    int collectives = 0;  // all-gathers and reduce-scatters of [N, C] within the tensor-parallel group
};

// What the times of a chunk depend on.
struct ChunkWork {
    int64_t tokens = 0;
    int64_t length = 0;    // of a whole sequence in which a query sees as many keys in the mean: attention's efficiency
    double attention = 0;  // FLOPs of a layer forward
    bool sliced = false, first_slice = false, last_slice = false;

    bool operator==(const ChunkWork&) const = default;
};

// Causal attention at half the square within each sequence of `context` tokens.
inline ChunkWork chunk_work(const GptConfig& g, const std::vector<ChunkShape>& chunks, size_t c) {
    const ChunkShape& shape = chunks[c];
    ChunkWork work{shape.tokens, std::min(shape.tokens, g.context)};
    if (shape.store < 0) {
        work.attention = double(work.tokens / g.context) * attention_flops(g, 0, g.context) +
                         attention_flops(g, 0, work.tokens % g.context);
    } else {
        work = {
            std::min(shape.tokens, shape.store_tokens - shape.begin), 0, 0, true, shape.first_slice, shape.last_slice};
        work.length = 2 * shape.begin + work.tokens;
        work.attention = attention_flops(g, shape.begin, shape.begin + work.tokens);
    }
    work.attention /= 3 * double(g.layers);  // that was forward and backward of all layers
    return work;
}

inline std::vector<ChunkWork> chunk_works(const GptConfig& g, const std::vector<ChunkShape>& chunks) {
    std::vector<ChunkWork> works;
    for (size_t c = 0; c < chunks.size(); ++c) works.push_back(chunk_work(g, chunks, c));
    return works;
}

// What an op does follows from the tensors that `uses` has it create or read, so that no schedule is costed by rules of
// its own: the op that creates queries, keys and values multiplies them, the op that creates the attention output
// attends, wherever it runs and whether for the first time or again.
//
// FLOPs of products over n tokens: 2 n for each weight forward, as much for the gradient of the input and again for
// that of the weights. Flash attention takes five products backward for two forward. Collectives are those of
// Megatron's sequence parallelism (Korthikanti et al. 2022): gathered before a product whose columns are divided
// (queries, keys and values; the first of the MLP; logits), scattered after one whose rows are, the opposite for
// gradients of inputs, and an input gathered again for the gradients of its weights.
inline OpWork op_work(const Op& op, const ChunkShape& shape, const ChunkWork& chunk, const GptConfig& g,
                      const TensorRules& rules, const ElementSizes& e, const Efficiency& efficiency, int64_t mlp_chunk,
                      int64_t head_chunk) {
    const std::vector<Use> list = uses(op, shape, rules);
    const auto used = [&](Tensor tensor, auto... access) {
        return std::any_of(list.begin(), list.end(),
                           [&](const Use& use) { return use.tensor == tensor && ((use.access == access) || ...); });
    };
    const auto makes = [&](Tensor tensor) { return used(tensor, Access::create, Access::update); };
    const auto reads = [&](Tensor tensor) { return used(tensor, Access::read); };
    const double N = double(chunk.tokens), C = double(g.channels), x = double(e.x), r = double(e.r), s = double(e.s);
    OpWork work;
    const auto product = [&](double weights, int64_t rows_at_once, int collectives) {
        work.products += 2 * N * weights / efficiency(double(rows_at_a_time(rows_at_once, chunk.tokens)));
        work.collectives += collectives;
    };
    const double qkv = 3 * C * C, proj = C * C, fc = 4 * C * C;
    const auto norm_forward = [&] { work.bytes += N * C * (r + x); };
    const auto norm_backward = [&] { work.bytes += N * C * (x + 3 * r); };
    const auto hidden = [&] {  // projection with residual addition, LayerNorm, first product of the MLP with GELU
        product(proj, mlp_chunk, 1);
        work.bytes += N * C * r;
        norm_forward();
        product(fc, mlp_chunk, 1);
    };
    const auto layer_output = [&] {
        product(fc, mlp_chunk, 1);
        work.bytes += N * C * r;
    };
    // The backward of pre_attention, down to the residual stream; where the products were moved, LayerNorm alone.
    const auto pre_backward = [&](bool split) {
        if (reads(Tensor::d_qkv)) {
            product(qkv, 0, 1);
            if (!split) product(qkv, 0, 1);
        }
        norm_backward();
    };

    if (makes(Tensor::ln1)) norm_forward();
    if (makes(Tensor::qkv)) product(qkv, 0, 1);
    if (makes(Tensor::attention_out)) work.attention_forward += chunk.attention;
    if (makes(Tensor::d_qkv)) work.attention_backward += 2.5 * chunk.attention;
    if (op.part == Part::attention && op.pass == Pass::B) {
        if (makes(Tensor::d_ln1) || makes(Tensor::d_residual)) product(qkv, 0, 1);
        if (makes(Tensor::d_residual)) norm_backward();  // it has moved here with the products
        if (makes(Tensor::d_qkv_weights)) product(qkv, 0, 1);
    }
    if (op.part == Part::pre && op.pass == Pass::B) {
        if (reads(Tensor::d_qkv_weights)) work.bytes += 3 * s * qkv / op.pieces;  // by one piece for all
        if (makes(Tensor::d_residual)) pre_backward(op.split);
    }
    if (op.part == Part::pre && op.pass == Pass::W) product(qkv, 0, 1);
    if (op.part == Part::post) {
        const bool elementwise = op.pass != Pass::F && reads(Tensor::post_products);
        const bool recomputes = op.pass != Pass::F && !elementwise && !reads(Tensor::post);
        if (elementwise) work.bytes += N * C * (r + x) + 2 * N * 4 * C * x;  // LayerNorm, GELU
        if (op.pass == Pass::F || recomputes) hidden();
        if (op.pass == Pass::F) layer_output();
        if (op.pass == Pass::B) {
            if (reads(Tensor::d_ln1) || reads(Tensor::d_qkv)) {  // one block with the pre_attention after it
                layer_output();
                norm_forward();
                pre_backward(false);
            }
            for (double weights : {fc, fc, proj}) product(weights, mlp_chunk, 1);
            norm_backward();
            if (makes(Tensor::delta)) work.bytes += 2 * N * C * x;
            if (makes(Tensor::d_post)) work.bytes += 2 * N * C * (r + x);
        }
        // The gradient of the output of a product is gathered for its input already, unless these run apart.
        const int again = op.pass == Pass::W;
        if (op.pass == Pass::W || (op.pass == Pass::B && !op.split)) {
            product(fc, mlp_chunk, again);
            product(fc, mlp_chunk, 1);
            product(proj, mlp_chunk, again);
        }
    }
    if (op.part == Part::head) {
        const double logits = double(g.padded_vocab) * C, rows = N * double(g.padded_vocab);
        norm_forward();
        product(logits, head_chunk, 1);
        work.bytes += rows * x;
        if (op.pass == Pass::B) {
            for (int i = 0; i < 2; ++i) product(logits, head_chunk, 1);
            norm_backward();
            work.bytes += rows * x + N * C * r;
        }
    }
    if (op.part == Part::embed) {
        work.bytes += N * C * (op.pass == Pass::F ? 2 * x + r : r + 4 * s);
        work.collectives += 1;
    }
    return work;
}

// Of all devices of the rank together.
inline int64_t message_bytes(const Op& op, const TensorRules& rules, const ElementSizes& sizes, ChunkShape chunk,
                             const GptConfig& g) {
    chunk.tokens = piece_rows(op, chunk.tokens).count;
    int64_t bytes = 0;
    for (const Use& use : message_contents(op, rules)) bytes += sizes.tensor(use.tensor, chunk, g);
    return bytes;
}

// Times of all ops and messages of a step in ms. Computed once for chunks that are alike. `pieces`: of its row pieces.
class OpCosts {
public:
    OpCosts(Cluster cluster, const ElementSizes& sizes, const GptConfig& g, const std::vector<ChunkShape>& chunks,
            const TensorRules& rules, int64_t mlp_chunk = 0, int64_t head_chunk = 0, int pieces = 1)
        : OpCosts(std::move(cluster), sizes, g, chunks, chunk_works(g, chunks), rules, mlp_chunk, head_chunk, pieces) {}
    // With other work in the chunks than that of whole sequences of the context.
    OpCosts(Cluster cluster, const ElementSizes& sizes, const GptConfig& g, const std::vector<ChunkShape>& chunks,
            const std::vector<ChunkWork>& chunk_works, const TensorRules& rules, int64_t mlp_chunk, int64_t head_chunk,
            int pieces)
        : cluster_(std::move(cluster)), helix_(rules.helix), layers_(rules.layers) {
        std::vector<ChunkWork> works;  // that differ
        const Chain chain{rules.layers, rules.training};
        for (size_t c = 0; c < chunks.size(); ++c) {
            const ChunkWork& chunk = chunk_works[c];
            const size_t kind = size_t(std::find(works.begin(), works.end(), chunk) - works.begin());
            kind_of_.push_back(kind);
            if (kind < works.size()) continue;
            works.push_back(chunk);
            times_.resize(works.size() * ops_of_kind()), bytes_.resize(times_.size());
            ChunkShape moved = chunks[c];
            moved.tokens = chunk.tokens;  // by messages
            for (int n = 0; n < chain.length(); ++n) {
                Op op = chain.op(n, int(c));
                op.pieces = pieces;
                for (const bool weights : {false, true})
                    for (const int piece : {0, pieces - 1}) {
                        op.weights = weights, op.piece = piece;
                        bytes_[message_index(op)] = ::message_bytes(op, rules, sizes, moved, g);
                    }
                op.weights = false;
                const bool block = op.pass == Pass::B && (op.part == Part::pre || op.part == Part::post);
                const auto add = [&] {
                    ChunkWork rows = chunk;
                    rows.tokens = piece_rows(op, chunk.tokens).count;
                    const double mean = double(chunk.tokens) / op.pieces / double(rows.tokens);  // of these rows
                    times_[index(op)] = mean * ms(op_work(op, chunks[c], rows, g, rules, sizes,
                                                          cluster_.matrix_efficiency, mlp_chunk, head_chunk),
                                                  rows, double(g.channels * sizes.x));
                };
                const Pass pass = op.pass;
                for (const bool keeps : {false, true})
                    for (const int of : {1, pieces}) {
                        op.keeps = keeps, op.pass = pass, op.pieces = of, op.piece = of - 1, add();
                        if (!block) continue;
                        op.split = true, add();
                        op.split = false, op.pass = Pass::W, add();
                    }
            }
        }
    }

    double operator()(const Op& op) const { return times_[index(op)]; }

    // Bytes of a message, of all devices of the rank together.
    int64_t message_bytes(const Op& op) const { return bytes_[message_index(op)]; }

    // How long a send of this rank takes: each device of the group sends its part to one of the other group.
    double message_ms(const Op& send, int rank) const {
        const LinkSpeed& link = cluster_.link(rank, send.peer);
        return 1e-3 * link.latency + double(message_bytes(send)) / cluster_.tp / (1e6 * link.bandwidth);
    }

private:
    Cluster cluster_;
    HelixOptions helix_;
    int layers_;
    std::vector<size_t> kind_of_;  // [chunk]
    std::vector<double> times_;    // [kind][layer + 1][part][pass][split][keeps][in pieces]
    std::vector<int64_t> bytes_;

    size_t ops_of_kind() const { return size_t(layers_ + 1) * 5 * 3 * 2 * 2 * 2; }
    size_t index(const Op& op) const {
        return kind_of_[size_t(op.chunk)] * ops_of_kind() +
               ((((size_t(op.layer + 1) * 5 + size_t(op.part)) * 3 + size_t(op.pass)) * 2 + op.split) * 2 + op.keeps) *
                   2 +
               (op.pieces > 1);
    }
    size_t message_index(Op op) const {  // no message is split, and no time depends on weights
        op.split = helix_.weights_with(op), op.keeps = false;
        return index(op);
    }

    double ms(const OpWork& work, const ChunkWork& chunk, double row_bytes) const {
        const Cluster& c = cluster_;
        const double tp = c.tp, length = double(chunk.length);
        const double others = (tp - 1) / tp * double(chunk.tokens) * row_bytes;  // what a device gets from the others
        const double collective = (tp - 1) * 1e-3 * c.inside.latency + others / (1e6 * c.inside.bandwidth);
        return work.products / (1e9 * tp * c.matrix_tflops) +
               work.attention_forward / (1e9 * tp * c.attention_forward_tflops * c.attention_efficiency(length)) +
               work.attention_backward /
                   (1e9 * tp * c.attention_backward_tflops * c.attention_backward_efficiency(length)) +
               work.bytes / (1e6 * tp * c.memory_bandwidth) + work.collectives * collective;
    }
};
