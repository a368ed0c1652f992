// How long each op of a plan takes: from forward times given by hand, or from the arithmetic of a chunk and the rate of
// the machine. simulate.h makes a timeline of it.
#pragma once

#include "llmc/pipeline/op.h"

// Forward times of the parts on one chunk, in ms. The embedding costs nothing.
struct PartTimes {
    double pre = 0, attention = 0, post = 0, head = 0;
    double moved = 0;  // products for queries, keys and values, where they run with the attention
};

// The backward of pre, post and head takes twice the forward; B and W of a split one take once each. What is recomputed
// comes on top, in the op that `uses` has create it.
struct OpTimes {
    std::vector<PartTimes> forward;  // [chunk]
    double attention_backward;       // as a multiple of its forward
    TensorRules rules;

    double operator()(const Op& op) const {
        const PartTimes& t = forward[size_t(op.chunk)];
        const bool backward = op.pass == Pass::B, full = rules.recompute == Recompute::full;
        const bool recomputes = op.pass != Pass::F && rules.recompute != Recompute::none;
        const double block = backward && !op.split ? 2 : 1;
        switch (op.part) {
            case Part::embed:
                return 0;
            case Part::pre:
                return block * t.pre + (recomputes && rules.apart && rules.helix.move_qkv ? t.pre : 0);
            case Part::attention:
                if (!backward) return t.attention + t.moved;
                return attention_backward * t.attention + 2 * t.moved + (recomputes ? t.moved : 0) +
                       (full && rules.apart ? t.attention : 0) + (recomputes && !full && !rules.apart ? t.pre : 0);
            case Part::post:
                return block * t.post + (op.pass != Pass::F && !rules.keeps_post(op.layer) ? t.post : 0) +
                       (backward && full && !rules.apart ? t.pre + t.attention : 0);
            case Part::head:
                return (backward ? 3 : 1) * t.head;  // its backward begins with the forward
        }
        return 0;
    }
};

// From the arithmetic: 2 FLOPs a token and matrix weight, causal attention at half the square within each sequence of
// `context` tokens.
inline std::vector<PartTimes> arithmetic_times(const GptConfig& g, const std::vector<ChunkShape>& chunks,
                                               const TensorRules& rules, double flops_per_ms) {
    const double C = double(g.channels);
    std::vector<PartTimes> times;
    for (size_t c = 0; c < chunks.size(); ++c) {
        const ChunkShape& shape = chunks[c];
        int64_t tokens = shape.tokens;
        double attention = 0;  // of all layers, backward included
        if (shape.store < 0) {
            attention = double(tokens / g.context) * attention_flops(g, 0, g.context) +
                        attention_flops(g, 0, tokens % g.context);
        } else {
            const int64_t begin = (int64_t(c) - shape.store) * tokens;
            tokens = std::min(tokens, shape.store_tokens - begin);
            attention = attention_flops(g, begin, begin + tokens);
        }
        const double linear = 2 * double(tokens) / flops_per_ms, qkv = linear * 3 * C * C;
        times.push_back({.pre = rules.helix.move_qkv ? 0 : qkv,
                         .attention = attention / (3 * double(g.layers)) / flops_per_ms,
                         .post = linear * 9 * C * C,
                         .head = linear * double(g.padded_vocab) * C,
                         .moved = rules.helix.move_qkv ? qkv : 0});
    }
    return times;
}
