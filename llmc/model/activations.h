// The tensors of the five functions, as structs of views laid out one after another in a block of memory. The same
// constructor that hands out the views counts their bytes, so the plan and the program cannot disagree.
#pragma once

#include <algorithm>

#include "llmc/device.h"
#include "llmc/model/gpt.h"

// Hands out 64-byte aligned views from a block of memory. Without a block it only counts.
struct Allocator {
    std::byte* base = nullptr;
    int64_t used = 0;  // bytes

    template <class T>
    T* take(int64_t count) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), 64);
        return p;
    }
    template <class T>
    Matrix<T> take(int64_t rows, int64_t cols) {
        return {take<T>(rows * cols), rows, cols};
    }
};

template <class Tensors, class... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
    Allocator counter;
    Tensors(counter, arguments...);
    return counter.used;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that flow between ops or are kept for the backward pass.

struct ResidualTensor {
    Matrix<floatR> rows;  // [N, C]
    ResidualTensor(Allocator& a, int64_t N, const GptConfig& g) : rows(a.take<floatR>(N, g.channels)) {}
};

struct PreActivations {
    Matrix<floatX> ln1;   // [N, C]
    floatS *mean, *rstd;  // [N]
    Matrix<floatX> qkv;   // [N, 3C]
    PreActivations(Allocator& a, int64_t N, const GptConfig& g)
        : ln1(a.take<floatX>(N, g.channels)),
          mean(a.take<floatS>(N)),
          rstd(a.take<floatS>(N)),
          qkv(a.take<floatX>(N, 3 * g.channels)) {}
};

struct AttentionActivations {
    Matrix<floatX> out;  // [N, C]
    Matrix<floatS> lse;  // [N, NH]
    AttentionActivations(Allocator& a, int64_t N, const GptConfig& g)
        : out(a.take<floatX>(N, g.channels)), lse(a.take<floatS>(N, g.heads)) {}
};

struct PostActivations {
    Matrix<floatR> residual;  // [N, C], input of the second LayerNorm
    Matrix<floatX> ln2;       // [N, C]
    floatS *mean, *rstd;      // [N]
    Matrix<floatX> fc, gelu;  // [N, 4C], before and after GELU
    PostActivations(Allocator& a, int64_t N, const GptConfig& g)
        : residual(a.take<floatR>(N, g.channels)),
          ln2(a.take<floatX>(N, g.channels)),
          mean(a.take<floatS>(N)),
          rstd(a.take<floatS>(N)),
          fc(a.take<floatX>(N, 4 * g.channels)),
          gelu(a.take<floatX>(N, 4 * g.channels)) {}

    PostActivations row_range(int64_t begin, int64_t count) const {
        PostActivations part = *this;
        part.residual = residual.row_range(begin, count);
        part.ln2 = ln2.row_range(begin, count);
        part.mean += begin;
        part.rstd += begin;
        part.fc = fc.row_range(begin, count);
        part.gelu = gelu.row_range(begin, count);
        return part;
    }
};

// Keys and values of a sequence that is cut into slices, [len, 2C], keys first; and the sums of their gradients.
struct StoreTensor {
    Matrix<floatX> rows;
    StoreTensor(Allocator& a, int64_t length, const GptConfig& g) : rows(a.take<floatX>(length, 2 * g.channels)) {}
};
struct StoreGradient {
    Matrix<floatS> rows;
    StoreGradient(Allocator& a, int64_t length, const GptConfig& g) : rows(a.take<floatS>(length, 2 * g.channels)) {}
};

struct AttentionGradient {
    Matrix<floatX> rows;  // [N, C]
    AttentionGradient(Allocator& a, int64_t N, const GptConfig& g) : rows(a.take<floatX>(N, g.channels)) {}
};
struct QkvGradient {
    Matrix<floatX> rows;  // [N, 3C]
    QkvGradient(Allocator& a, int64_t N, const GptConfig& g) : rows(a.take<floatX>(N, 3 * g.channels)) {}
};

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that live inside one op: the workspace. n is the number of rows that the op handles at a time.

struct PostWorkspace {
    PostActivations activations;
    Matrix<floatX> branch;  // [n, C], output of the projection, then of the MLP, before it joins the residual stream
    Matrix<floatX> d_residual;  // [n, C], gradient of the residual stream as matrix products read it
    Matrix<floatX> d_fc;        // [n, 4C]
    Matrix<floatX> d_ln2;       // [n, C]
    PostWorkspace(Allocator& a, int64_t n, const GptConfig& g)
        : activations(a, n, g),
          branch(a.take<floatX>(n, g.channels)),
          d_residual(a.take<floatX>(n, g.channels)),
          d_fc(a.take<floatX>(n, 4 * g.channels)),
          d_ln2(a.take<floatX>(n, g.channels)) {}
};

struct PreWorkspace {
    Matrix<floatX> d_ln1;  // [n, C]
    PreWorkspace(Allocator& a, int64_t n, const GptConfig& g) : d_ln1(a.take<floatX>(n, g.channels)) {}
};

struct HeadWorkspace {
    Matrix<floatX> ln, d_ln;  // [n, C]
    floatS *mean, *rstd;      // [n]
    Matrix<floatX> logits;    // [n, Vp], overwritten by their gradient
    floatS* losses;           // [n]
    HeadWorkspace(Allocator& a, int64_t n, const GptConfig& g)
        : ln(a.take<floatX>(n, g.channels)),
          d_ln(a.take<floatX>(n, g.channels)),
          mean(a.take<floatS>(n)),
          rstd(a.take<floatS>(n)),
          logits(a.take<floatX>(n, g.padded_vocab)),
          losses(a.take<floatS>(n)) {}
};

// Rows handled at a time: `chunk`, or all N where chunk is 0.
inline int64_t rows_at_a_time(int64_t chunk, int64_t N) { return chunk == 0 ? N : std::min(chunk, N); }

inline int64_t workspace_bytes(int64_t N, const GptConfig& g, int64_t mlp_chunk, int64_t head_chunk) {
    const int64_t n = rows_at_a_time(mlp_chunk, N);
    return std::max({bytes_of<PostWorkspace>(n, g), bytes_of<PreWorkspace>(n, g),
                     bytes_of<HeadWorkspace>(rows_at_a_time(head_chunk, N), g)});
}
