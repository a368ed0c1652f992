// The tensors of the five functions, as structs of views laid out one after another in a block of memory. The same
// constructor that hands out the views counts their bytes, so the plan and the program cannot disagree.
#pragma once

#include <algorithm>

#include "llmc/device.h"
#include "llmc/model/gpt.h"

// The storage types that tensors are made of: those of this build, or those of a program that is planned for.
struct BuildTypes {
    using X = floatX;
    using R = floatR;
    using S = floatS;
};

template <class Tensors, class... Arguments>
int64_t bytes_of(const Arguments&... arguments) {
    Allocator counter;
    Tensors(counter, arguments...);
    return counter.used;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that flow between ops or are kept for the backward pass.

// One matrix. Residual stream and its gradient: floatR [N, C]. LayerNorm and attention outputs and their gradients:
// floatX [N, C]. Queries, keys, values and their gradient: floatX [N, 3C]. Keys and values of a sequence that is cut
// into slices: floatX [len, 2C], keys first, and the sums of their gradients, floatS. Log-sum-exp: floatS [N, NH].
template <class T>
struct RowsTensor {
    Matrix<T> rows;
    RowsTensor(Allocator& a, int64_t N, int64_t cols) : rows(a.take<T>(N, cols)) {}
};

// Mean and reciprocal standard deviation of the rows that a LayerNorm has seen.
template <class Types>
struct NormStatisticsOf {
    using S = typename Types::S;
    S *mean = nullptr, *rstd = nullptr;  // [N]
    NormStatisticsOf() = default;
    NormStatisticsOf(Allocator& a, int64_t N) : mean(a.take<S>(N)), rstd(a.take<S>(N)) {}
};
using NormStatistics = NormStatisticsOf<BuildTypes>;

// The weights of pre_attention (floatX) as they travel to an attention, or their gradients (floatS) back. Those of the
// LayerNorm count only where it moves, too.
template <class T>
struct MovedWeights {
    LayerTensors<T> tensors{};
    MovedWeights(Allocator& a, const GptConfig& g) {
        tensors.ln1_weight = a.take<T>(g.channels);
        tensors.ln1_bias = a.take<T>(g.channels);
        tensors.qkv_weight = a.take<T>(3 * g.channels * g.channels);
        tensors.qkv_bias = a.take<T>(3 * g.channels);
    }
};

// What post_attention keeps where LayerNorm and GELU are recomputed.
template <class Types>
struct PostProductsOf {
    Matrix<typename Types::R> residual;  // [N, C], input of the second LayerNorm
    Matrix<typename Types::X> fc;        // [N, 4C], before GELU
    PostProductsOf(Allocator& a, int64_t N, const GptConfig& g)
        : residual(a.take<typename Types::R>(N, g.channels)), fc(a.take<typename Types::X>(N, 4 * g.channels)) {}

    PostProductsOf row_range(int64_t begin, int64_t count) const {
        PostProductsOf part = *this;
        part.residual = residual.row_range(begin, count);
        part.fc = fc.row_range(begin, count);
        return part;
    }
};

template <class Types>
struct PostActivationsOf {
    using X = typename Types::X;
    using R = typename Types::R;
    using S = typename Types::S;
    Matrix<R> residual;  // [N, C], input of the second LayerNorm
    Matrix<X> ln2;       // [N, C]
    S *mean, *rstd;      // [N]
    Matrix<X> fc, gelu;  // [N, 4C], before and after GELU
    PostActivationsOf(Allocator& a, int64_t N, const GptConfig& g)
        : residual(a.take<R>(N, g.channels)),
          ln2(a.take<X>(N, g.channels)),
          mean(a.take<S>(N)),
          rstd(a.take<S>(N)),
          fc(a.take<X>(N, 4 * g.channels)),
          gelu(a.take<X>(N, 4 * g.channels)) {}
    // The others have no rows.
    explicit PostActivationsOf(const PostProductsOf<Types>& products)
        : residual(products.residual), mean(nullptr), rstd(nullptr), fc(products.fc) {}

    bool has_all() const { return gelu.rows > 0; }
    PostActivationsOf row_range(int64_t begin, int64_t count) const {
        PostActivationsOf part = *this;
        part.residual = residual.row_range(begin, count);
        part.ln2 = ln2.row_range(begin, count);
        part.mean += begin;
        part.rstd += begin;
        part.fc = fc.row_range(begin, count);
        part.gelu = gelu.row_range(begin, count);
        return part;
    }
};
using PostProducts = PostProductsOf<BuildTypes>;
using PostActivations = PostActivationsOf<BuildTypes>;

// What a split backward of post_attention leaves for the gradients of its weights: gradients of the layer's output, of
// the residual stream between attention and MLP, and of the value before GELU.
template <class Types>
struct PostGradientsOf {
    using X = typename Types::X;
    Matrix<X> d_out, d_middle;  // [N, C]
    Matrix<X> d_fc;             // [N, 4C]
    PostGradientsOf(Allocator& a, int64_t N, const GptConfig& g)
        : d_out(a.take<X>(N, g.channels)), d_middle(a.take<X>(N, g.channels)), d_fc(a.take<X>(N, 4 * g.channels)) {}

    PostGradientsOf row_range(int64_t begin, int64_t count) const {
        PostGradientsOf part = *this;
        part.d_out = d_out.row_range(begin, count);
        part.d_middle = d_middle.row_range(begin, count);
        part.d_fc = d_fc.row_range(begin, count);
        return part;
    }
};
using PostGradients = PostGradientsOf<BuildTypes>;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that live inside one op: the workspace. n is the number of rows that the op handles at a time.

template <class Types>
struct PostWorkspaceOf {
    using X = typename Types::X;
    using R = typename Types::R;
    PostActivationsOf<Types> activations;
    Matrix<X> d_residual;          // [n, C], gradient of the residual stream as matrix products read it
    Matrix<X> d_fc;                // [n, 4C]
    Matrix<X> d_ln2;               // [n, C]
    Matrix<R> output;              // [n, C], the layer's output where the next layer's pre_attention needs it again,
    NormStatisticsOf<Types> norm;  // and the statistics of the LayerNorm there
    PostWorkspaceOf(Allocator& a, int64_t n, const GptConfig& g)
        : activations(a, n, g),
          d_residual(a.take<X>(n, g.channels)),
          d_fc(a.take<X>(n, 4 * g.channels)),
          d_ln2(a.take<X>(n, g.channels)),
          output(a.take<R>(n, g.channels)),
          norm(a, n) {}
};
using PostWorkspace = PostWorkspaceOf<BuildTypes>;

template <class Types>
struct PreWorkspaceOf {
    using X = typename Types::X;
    Matrix<X> d_ln1;  // [n, C]
    PreWorkspaceOf(Allocator& a, int64_t n, const GptConfig& g) : d_ln1(a.take<X>(n, g.channels)) {}
};
using PreWorkspace = PreWorkspaceOf<BuildTypes>;

template <class Types>
struct HeadWorkspaceOf {
    using X = typename Types::X;
    using S = typename Types::S;
    Matrix<X> ln, d_ln;  // [n, C]
    S *mean, *rstd;      // [n]
    Matrix<X> logits;    // [n, Vp], overwritten by their gradient
    S* losses;           // [n]
    HeadWorkspaceOf(Allocator& a, int64_t n, const GptConfig& g)
        : ln(a.take<X>(n, g.channels)),
          d_ln(a.take<X>(n, g.channels)),
          mean(a.take<S>(n)),
          rstd(a.take<S>(n)),
          logits(a.take<X>(n, g.padded_vocab)),
          losses(a.take<S>(n)) {}
};
using HeadWorkspace = HeadWorkspaceOf<BuildTypes>;

// Rows handled at a time: `chunk`, or all N where chunk is 0.
inline int64_t rows_at_a_time(int64_t chunk, int64_t N) { return chunk == 0 ? N : std::min(chunk, N); }

template <class Types = BuildTypes>
int64_t workspace_bytes(int64_t N, const GptConfig& g, int64_t mlp_chunk, int64_t head_chunk) {
    const int64_t n = rows_at_a_time(mlp_chunk, N);
    return std::max({bytes_of<PostWorkspaceOf<Types>>(n, g), bytes_of<PreWorkspaceOf<Types>>(n, g),
                     bytes_of<HeadWorkspaceOf<Types>>(rows_at_a_time(head_chunk, N), g)});
}
