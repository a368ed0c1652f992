// A training step is data: for every rank a flat list of Ops. Schedules return such lists, check.h proves them, the
// planner gives their tensors addresses (uses.h says which these are), the schedule loop in train_gpt.cu runs them.
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
    // HelixPipe with weights once a step: where those of a layer come to a rank with its first attention there, where
    // the sum of their gradients begins, and where it goes back and is added.
    bool weights = false;
    // Where products are recomputed: this part keeps their outputs all the same, since there is memory for them.
    bool keeps = false;
    // Row pieces (row_pieces.h): this op or message is for one of so many pieces of its chunk's rows.
    int piece = 0, pieces = 1;
};

// The rows of an op's piece, of a chunk with N of them. Those of few rows may have none.
struct RowRange {
    int64_t begin, count;
};
inline RowRange piece_rows(const Op& op, int64_t N) {
    const int64_t begin = N * op.piece / op.pieces;
    return {begin, N * (op.piece + 1) / op.pieces - begin};
}

// HelixPipe: whether a spread head (uses.h) takes the part along, as it does the last post and the head.
inline bool in_last_block(Part part, int layer, int layers) {
    return part == Part::head || (part == Part::post && layer == layers - 1);
}

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
    if (op.pieces > 1) name += " piece " + std::to_string(op.piece + 1) + " of " + std::to_string(op.pieces);
    return compute ? name : name + (send ? " to rank " : " from rank ") + std::to_string(op.peer);
}
