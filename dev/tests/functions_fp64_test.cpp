// The five functions in double precision: each backward against central differences of its forward, in every argument.
// Built with PRECISION_FP64.
#include <gtest/gtest.h>

#include <random>

#include "llmc/model/blocks.cuh"

namespace {

constexpr double bound = 1e-7, h = 1e-5;
constexpr int64_t N = 13, C = 12;
const GptConfig config{2, C, 3, 16, 29, 64, false};

struct Fixture {
    std::vector<Parameter> table = parameter_table(config);
    std::vector<double> weights = random(flat_size(table)), gradients = std::vector<double>(weights.size(), 0.0);
    ModelTensors<double> w = bind_tensors(weights.data(), table, config),
                         dw = bind_tensors(gradients.data(), table, config);
    std::vector<std::byte> scratch = std::vector<std::byte>(64 << 20), workspace = std::vector<std::byte>(4 << 20),
                           activations = std::vector<std::byte>(4 << 20);
    Device device{2, scratch.data(), scratch.size()};
    Allocator memory{activations.data()};
    BlockContext ctx{device, config, {workspace.data()}, 5, 4};  // rows at a time that do not divide N

    std::mt19937_64 generator{7};
    std::vector<double> random(int64_t n) {
        std::vector<double> x(static_cast<size_t>(n));
        for (double& v : x) v = std::normal_distribution<double>(0, 0.5)(generator);
        return x;
    }

    // The change of objective() per unit step of `x` along a random direction, against the same from `gradient`.
    template <class Objective>
    void check(const char* name, double* x, const double* gradient, int64_t n, const Objective& objective) {
        const std::vector<double> direction = random(n), start(x, x + n);
        const auto at = [&](double step) {
            for (int64_t i = 0; i < n; ++i) x[i] = start[size_t(i)] + step * direction[size_t(i)];
            return objective();
        };
        const double difference = (at(h) - at(-h)) / (2 * h);
        std::copy(start.begin(), start.end(), x);
        double slope = 0;
        for (int64_t i = 0; i < n; ++i) slope += direction[size_t(i)] * gradient[i];
        const double error = std::abs(difference - slope) / std::max(std::abs(slope), 1e-3);
        std::printf("  %-24s error %.1e, bound %.0e\n", name, error, bound);
        EXPECT_LE(error, bound) << name << ": difference " << difference << ", backward " << slope;
    }
    template <class Objective>
    void check_parameter(const char* name, const Objective& objective) {
        for (const Parameter& p : table)
            if (p.name == name)
                return check(name, weights.data() + p.offset, gradients.data() + p.offset, p.size(), objective);
        FAIL() << "no parameter " << name;
    }
};

Matrix<double> rows(std::vector<double>& x, int64_t cols) { return {x.data(), int64_t(x.size()) / cols, cols}; }

double dot(Matrix<const double> a, Matrix<const double> b) {
    double total = 0;
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.cols; ++j) total += a.row(i)[j] * b.row(i)[j];
    return total;
}

const int32_t tokens[N] = {3, 28, 3, 0, 7, 3, 11, 12, 13, 0, 1, 2, 28};
const int32_t positions[N] = {0, 1, 2, 3, 4, 5, 6, 0, 0, 9, 10, 11, 12};

TEST(Functions, Embed) {
    Fixture f;
    std::vector<double> x(N * C), dx = f.random(N * C);
    const auto objective = [&] {
        embed_forward(f.ctx, f.w, rows(x, C), {tokens, positions});
        return dot(rows(x, C), rows(dx, C));
    };
    embed_backward(f.ctx, f.dw, rows(dx, C), {tokens, positions});
    f.check_parameter("wte.weight", objective);
    f.check_parameter("wpe.weight", objective);
}

TEST(Functions, PreAttention) {
    Fixture f;
    std::vector<double> x = f.random(N * C), d_qkv = f.random(N * 3 * C), dx(N * C, 0.0);
    std::vector<double> ln1(N * C), qkv(N * 3 * C);
    const NormStatistics norm(f.memory, N);
    const auto objective = [&] {
        pre_attention_forward(f.ctx, f.w.layers[1], rows(ln1, C), norm, rows(qkv, 3 * C), rows(x, C));
        return dot(rows(qkv, 3 * C), rows(d_qkv, 3 * C));
    };
    objective();
    const LayerTensors<double>& dw = f.dw.layers[1];
    qkv_backward_weight(f.ctx, dw, rows(d_qkv, 3 * C), rows(ln1, C));
    pre_attention_backward(f.ctx, f.w.layers[1], dw, rows(dx, C), {rows(d_qkv, 3 * C), {}}, norm, rows(x, C));
    f.check("x", x.data(), dx.data(), N * C, objective);
    for (const char* name : {"h.1.ln_1.weight", "h.1.ln_1.bias", "h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"})
        f.check_parameter(name, objective);
}

// Two packed sequences behind the last slice of one whose first `context` keys and values lie in a store.
TEST(Functions, Attention) {
    Fixture f;
    constexpr int64_t context = 4, slice = 6, length = context + slice;
    const std::vector<SegmentRows> segments = {
        {0, slice, context, true}, {slice, 1, 0, false}, {slice + 1, N - slice - 1, 0, false}};
    std::vector<double> qkv = f.random(N * 3 * C), d_out = f.random(N * C), d_qkv(N * 3 * C), d_store(length * 2 * C);
    std::vector<double> earlier = f.random(context * 2 * C), store(length * 2 * C);
    std::vector<double> out(N * C), lse(size_t(N * config.heads));
    const auto objective = [&] {
        std::copy(earlier.begin(), earlier.end(), store.begin());
        attention_block_forward(f.ctx, rows(out, C), rows(lse, config.heads), rows(qkv, 3 * C), rows(store, 2 * C),
                                segments);
        return dot(rows(out, C), rows(d_out, C));
    };
    objective();
    attention_block_backward(f.ctx, rows(d_qkv, 3 * C), rows(d_out, C), rows(out, C), rows(lse, config.heads),
                             rows(qkv, 3 * C), rows(store, 2 * C), rows(d_store, 2 * C), segments, true);
    f.check("q, k, v", qkv.data(), d_qkv.data(), N * 3 * C, objective);
    f.check("earlier keys, values", earlier.data(), d_store.data(), context * 2 * C, objective);
}

TEST(Functions, PostAttention) {
    for (const auto& [keep, split] : {std::pair(true, false), {true, true}, {false, false}, {false, true}}) {
        Fixture f;
        std::vector<double> x = f.random(N * C), o = f.random(N * C), y(N * C), dy = f.random(N * C), d_o(N * C),
                            dx = dy;
        const std::optional<PostActivations> kept =
            keep ? std::optional(PostActivations(f.memory, N, config)) : std::nullopt;
        const auto objective = [&] {
            post_attention_forward(f.ctx, f.w.layers[0], rows(y, C), kept, rows(x, C), rows(o, C));
            return dot(rows(y, C), rows(dy, C));
        };
        objective();
        std::vector<std::byte> memory(size_t(bytes_of<PostGradients>(N, config)) + 64);
        Allocator place{memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64};
        const PostGradients d_post(place, N, config);
        // What is not kept is recomputed, and by a split backward left for the gradients of the weights.
        const PostActivations products(PostProducts(f.memory, N, config));
        const std::optional<PostActivations> known = keep ? kept : split ? std::optional(products) : std::nullopt;
        post_attention_backward(f.ctx, f.w.layers[0], f.dw.layers[0], rows(dx, C), rows(d_o, C), known,
                                keep ? Matrix<double>() : rows(x, C), rows(o, C),
                                split ? std::optional(d_post) : std::nullopt, std::nullopt);
        if (split) post_attention_backward_weight(f.ctx, f.w.layers[0], f.dw.layers[0], d_post, *known, rows(o, C));
        f.check("x", x.data(), dx.data(), N * C, objective);
        f.check("o", o.data(), d_o.data(), N * C, objective);
        for (const char* name :
             {"h.0.attn.c_proj.weight", "h.0.attn.c_proj.bias", "h.0.ln_2.weight", "h.0.ln_2.bias",
              "h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias", "h.0.mlp.c_proj.weight", "h.0.mlp.c_proj.bias"})
            f.check_parameter(name, objective);
    }
}

// post_attention of layer 0 and pre_attention of layer 1 as one block, of which only x and o are kept.
TEST(Functions, Block) {
    for (const bool moved : {false, true}) {
        Fixture f;
        std::vector<double> x = f.random(N * C), o = f.random(N * C), y(N * C), ln1(N * C), qkv(N * 3 * C), d_o(N * C),
                            dx = f.random(N * C), d_pre = f.random(N * 3 * C);
        const std::vector<double> dy = dx;
        const NormStatistics norm(f.memory, N);
        const int64_t columns = moved ? C : 3 * C;  // the block ends at the LayerNorm, or at the products
        const auto objective = [&] {
            post_attention_forward(f.ctx, f.w.layers[0], rows(y, C), std::nullopt, rows(x, C), rows(o, C));
            pre_attention_forward(f.ctx, f.w.layers[1], rows(ln1, C), norm,
                                  moved ? std::nullopt : std::optional(rows(qkv, 3 * C)), rows(y, C));
            double sum = dot(rows(moved ? ln1 : qkv, columns), rows(d_pre, columns));
            for (size_t i = 0; i < dy.size(); ++i) sum += y[i] * dy[i];
            return sum;
        };
        objective();
        const PreGradient gradient = moved ? PreGradient{{}, rows(d_pre, C)} : PreGradient{rows(d_pre, 3 * C), {}};
        post_attention_backward(f.ctx, f.w.layers[0], f.dw.layers[0], rows(dx, C), rows(d_o, C), std::nullopt,
                                rows(x, C), rows(o, C), std::nullopt, NextPre{f.w.layers[1], f.dw.layers[1], gradient});
        f.check("x", x.data(), dx.data(), N * C, objective);
        f.check("o", o.data(), d_o.data(), N * C, objective);
        std::vector<const char*> names = {"h.0.attn.c_proj.weight", "h.0.ln_2.bias",   "h.0.mlp.c_fc.weight",
                                          "h.0.mlp.c_proj.weight",  "h.1.ln_1.weight", "h.1.ln_1.bias"};
        if (!moved) names.insert(names.end(), {"h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"});
        for (const char* name : names) f.check_parameter(name, objective);
    }
}

TEST(Functions, Head) {
    Fixture f;
    std::vector<double> x = f.random(N * C), dx(N * C), losses(N);
    int32_t targets[N] = {1, 2, 3, -1, 28, 0, 6, 7, 8, -1, -1, 11, 12};
    constexpr double scale = 1.0 / 10;
    const auto objective = [&] {
        double loss = 0;
        head_forward(f.ctx, f.w, &loss, rows(x, C), targets);
        return scale * loss;
    };
    double loss = 0;
    head_backward(f.ctx, f.w, f.dw, rows(dx, C), &loss, rows(x, C), targets, scale, losses.data());
    EXPECT_NEAR(loss * scale, objective(), 1e-12);
    EXPECT_EQ(losses[3], 0);
    f.check("x", x.data(), dx.data(), N * C, objective);
    for (const char* name : {"ln_f.weight", "ln_f.bias", "lm_head.weight"}) f.check_parameter(name, objective);
}

}  // namespace
