// The ops of one chunk form a chain: each takes the result of the one before it.
//
//   embed, (pre, attention, post) x L, head, (post, attention, pre) x L backward, embed backward
//
// In training the head is a single op, its backward; without, the chain ends with the head's forward. The weight
// gradients that a backward leaves for later hang off the chain: nothing but their own rank waits for them.
// Schedules, the proof and the simulator all walk this chain.
#pragma once

#include <algorithm>

#include "llmc/pipeline/op.h"

struct Chain {
    int layers;
    bool training;

    int head() const { return 3 * layers + 1; }
    int length() const { return training ? 2 * head() + 1 : head() + 1; }

    Op op(int position, int chunk) const {
        static constexpr Part parts[] = {Part::pre, Part::attention, Part::post};
        if (position == head()) return {Part::head, training ? Pass::B : Pass::F, -1, chunk};
        const Pass pass = position < head() ? Pass::F : Pass::B;
        const int forward = std::min(position, 2 * head() - position);  // the chain is symmetric about the head
        if (forward == 0) return {Part::embed, pass, -1, chunk};
        return {parts[(forward - 1) % 3], pass, (forward - 1) / 3, chunk};
    }

    // The blocks of HelixPipe, all that lies between two attentions: 0 = embed, pre(0); k = post(k-1), pre(k); L =
    // post(L-1), head.
    int block(Part part, int layer) const {
        return part == Part::embed ? 0 : part == Part::head ? layers : part == Part::post ? layer + 1 : layer;
    }

    // Of a W, the position of the B before it. -1 for an op that the model does not have.
    int position(const Op& op) const {
        const bool end = op.part == Part::embed || op.part == Part::head;
        const bool block = op.part == Part::pre || op.part == Part::post;
        if (end ? op.layer != -1 : op.layer < 0 || op.layer >= layers) return -1;
        if (!training && op.pass != Pass::F) return -1;
        if ((op.pass == Pass::W || op.split) && !block) return -1;
        if (op.part == Part::head) return (op.pass == Pass::B) == training ? head() : -1;
        const int forward = end ? 0 : 3 * op.layer + int(op.part);  // pre, attention and post are 1, 2 and 3
        return op.pass == Pass::F ? forward : 2 * head() - forward;
    }
};

inline int most_pieces(const std::vector<Op>& list) {
    int pieces = 1;
    for (const Op& op : list) pieces = std::max(pieces, op.pieces);
    return pieces;
}

// An index for what is kept of every op of every chunk, or of its message. Of several row pieces each has its own; what
// is whole has that of the last, so that who takes a result as a whole looks for its last piece.
struct ChainIndex {
    Chain chain;
    int chunks, pieces;

    size_t size() const { return size_t(chunks) * size_t(chain.length()) * size_t(pieces); }
    size_t operator()(const Op& op) const {
        const size_t position = size_t(op.chunk) * size_t(chain.length()) + size_t(chain.position(op));
        return position * size_t(pieces) + size_t(op.pieces > 1 ? op.piece : pieces - 1);
    }
    // Of what an op takes, the result of the op before it in the chain.
    size_t input(const Op& op) const { return (*this)(op)-size_t(pieces); }
};
