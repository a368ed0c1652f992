// The GPT-2/GPT-3 model as data: its sizes, and one table of its parameters from which offsets, initial values, the
// optimizer, checkpoints and tests follow. GPT-2: Radford et al. 2019; GPT-3 sizes: Brown et al. 2020, table 2.1.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "llmc/common.h"
#include "llmc/kernels/random.h"

struct GptConfig {
    int64_t layers = 0, channels = 0, heads = 0, context = 0, vocab = 0;
    int64_t padded_vocab = 0;  // vocab rounded up to a multiple of 64, so that matrix products have even shapes
    bool tied = true;          // the head's weight is the token embedding

    int64_t head_size() const { return channels / heads; }
};

// What a backward pass recomputes instead of keeping it from the forward pass.
enum class Recompute {
    none,               // keeps everything, the MLP activation included
    elementwise,        // keeps what products need again, recomputes LayerNorm and GELU: no product runs twice
    without_attention,  // keeps attention output and log-sum-exp, recomputes the rest (HelixPipe)
    full,               // keeps the input of each layer only (and keys and values that later slices need)
    automatic,          // elementwise as far as memory allows, without_attention beyond (llmc/pipeline/keep.h)
};
// Those that are the same for every op.
inline constexpr Recompute recompute_modes[] = {Recompute::none, Recompute::elementwise, Recompute::without_attention,
                                                Recompute::full};
inline constexpr const char* recompute_names[] = {"none", "elementwise", "without-attention", "full", "auto"};

// The five functions a model is cut into. All parameters belong to one of them; attention has none, which is why it may
// run on any pipeline stage.
enum class Part { embed, pre, attention, post, head };

// Initial values of GPT-2: weights normal with standard deviation 0.02, those that write into the residual stream
// scaled by 1/sqrt(2L), LayerNorm weights one, everything else zero.
struct Parameter {
    std::string name;    // as in Hugging Face GPT-2, without the prefix "transformer."
    Part part;           // which function uses it; pipeline stages own parameters by part and layer
    int layer;           // -1 at the ends
    int64_t rows, cols;  // a vector of n is 1 x n; matrices are [out, in]
    bool decay;          // weight decay: matrices only
    float mean, stddev;  // of the initial values
    int64_t offset = 0;  // of the first element in the flat buffers of weights, gradients and moments
    int index = 0;       // in the table of the whole model
    bool copy = false;   // another rank has the original, which is saved and counts in the norm of the gradients

    int64_t size() const { return rows * cols; }
    // What is subtracted from the weight where it is stored in bf16: 1 of LayerNorm's weights, as layernorm.cuh has
    // it, 0 of all others.
    floatS center() const { return mean * NORM_CENTER; }
};

inline void assign_offsets(std::vector<Parameter>& table) {
    int64_t offset = 0;
    for (Parameter& p : table) {
        p.offset = offset;
        offset = round_up(offset + p.size(), 64);  // every tensor starts on a cache line, whatever its type
    }
}

inline std::vector<Parameter> parameter_table(const GptConfig& g) {
    const int64_t C = g.channels, Vp = g.padded_vocab;
    const float std = 0.02f, residual_std = 0.02f / std::sqrt(2.0f * float(g.layers));
    std::vector<Parameter> table;
    auto matrix = [&](const std::string& name, Part part, int layer, int64_t rows, int64_t cols, float stddev) {
        table.push_back({name, part, layer, rows, cols, true, 0.0f, stddev});
    };
    auto vector = [&](const std::string& name, Part part, int layer, int64_t n, float mean) {
        table.push_back({name, part, layer, 1, n, false, mean, 0.0f});
    };
    matrix("wte.weight", Part::embed, -1, Vp, C, std);
    matrix("wpe.weight", Part::embed, -1, g.context, C, std);
    for (int l = 0; l < g.layers; ++l) {
        const std::string h = "h." + std::to_string(l) + ".";
        vector(h + "ln_1.weight", Part::pre, l, C, 1);
        vector(h + "ln_1.bias", Part::pre, l, C, 0);
        matrix(h + "attn.c_attn.weight", Part::pre, l, 3 * C, C, std);
        vector(h + "attn.c_attn.bias", Part::pre, l, 3 * C, 0);
        matrix(h + "attn.c_proj.weight", Part::post, l, C, C, residual_std);
        vector(h + "attn.c_proj.bias", Part::post, l, C, 0);
        vector(h + "ln_2.weight", Part::post, l, C, 1);
        vector(h + "ln_2.bias", Part::post, l, C, 0);
        matrix(h + "mlp.c_fc.weight", Part::post, l, 4 * C, C, std);
        vector(h + "mlp.c_fc.bias", Part::post, l, 4 * C, 0);
        matrix(h + "mlp.c_proj.weight", Part::post, l, C, 4 * C, residual_std);
        vector(h + "mlp.c_proj.bias", Part::post, l, C, 0);
    }
    vector("ln_f.weight", Part::head, -1, C, 1);
    vector("ln_f.bias", Part::head, -1, C, 0);
    if (!g.tied) matrix("lm_head.weight", Part::head, -1, Vp, C, std);
    for (size_t i = 0; i < table.size(); ++i) table[i].index = int(i);
    assign_offsets(table);
    return table;
}

// The parameters that a rank holds, copies first: of the parts that it runs, the tied embedding with the head. Where
// several ranks run a part, one of them owns its parameters.
template <class Runs, class Owns>  // bool runs(Part, int layer), owns(Part, int layer)
std::vector<Parameter> parameters_of(const GptConfig& g, const Runs& runs, const Owns& owns) {
    std::vector<Parameter> held;
    for (Parameter p : parameter_table(g)) {
        p.copy = !owns(p.part, p.layer);
        if (runs(p.part, p.layer) || (g.tied && p.index == 0 && runs(Part::head, -1))) held.push_back(p);
    }
    std::stable_partition(held.begin(), held.end(), [](const Parameter& p) { return p.copy; });
    assign_offsets(held);
    return held;
}

// Elements of a flat buffer that holds these parameters, the gaps of alignment included.
inline int64_t flat_size(const std::vector<Parameter>& table) {
    return table.empty() ? 0 : round_up(table.back().offset + table.back().size(), 64);
}

inline int64_t parameter_count(const GptConfig& g) {
    int64_t count = 0;
    for (const Parameter& p : parameter_table(g)) count += p.size();
    return count - (g.padded_vocab - g.vocab) * g.channels * (g.tied ? 1 : 2);
}

// Rows that are not padding: the embedding and the head have one for each token of the vocabulary.
inline int64_t used_rows(const Parameter& p, const GptConfig& g) {
    return p.name == "wte.weight" || p.name == "lm_head.weight" ? g.vocab : p.rows;
}

// Initial values depend on seed, tensor and element alone, so that every layout starts from the same model. Rows of the
// embedding beyond the vocabulary are padding and stay zero.
inline void initialize_parameters(floatS* values, const std::vector<Parameter>& table, const GptConfig& g,
                                  uint64_t seed) {
    for (const Parameter& p : table) {
        const int64_t used = used_rows(p, g) * p.cols;
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < p.size(); ++i) {
            const floatS noise =
                p.stddev != 0 && i < used ? p.stddev * normal(seed, uint64_t(p.index), uint64_t(i)) : 0;
            values[p.offset + i] = p.mean + noise;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The parameters by name in the program: pointers into one flat buffer, of weights (floatX) or of gradients (floatS);
// null where the rank does not hold the parameter.

template <class T>
struct LayerTensors {
    T *ln1_weight, *ln1_bias;    // [C]
    T *qkv_weight, *qkv_bias;    // [3C, C], [3C]
    T *proj_weight, *proj_bias;  // [C, C], [C]
    T *ln2_weight, *ln2_bias;    // [C]
    T *fc_weight, *fc_bias;      // [4C, C], [4C]
    T *out_weight, *out_bias;    // [C, 4C], [C]
};

template <class T>
struct ModelTensors {
    T *wte, *wpe;  // [Vp, C], [T, C]
    std::vector<LayerTensors<T>> layers;
    T *lnf_weight, *lnf_bias;  // [C]
    T* head;                   // [Vp, C]; equals wte when tied
};

template <class T>
ModelTensors<T> bind_tensors(T* flat, const std::vector<Parameter>& table, const GptConfig& g) {
    std::vector<T*> held(size_t(12 * g.layers + 5), nullptr);  // by index
    for (const Parameter& p : table) held[size_t(p.index)] = flat + p.offset;
    size_t next = 0;
    auto take = [&] { return held[next++]; };  // in the order of parameter_table
    ModelTensors<T> m;
    m.wte = take();
    m.wpe = take();
    for (int64_t l = 0; l < g.layers; ++l) {
        LayerTensors<T> t;
        for (T** tensor : {&t.ln1_weight, &t.ln1_bias, &t.qkv_weight, &t.qkv_bias, &t.proj_weight, &t.proj_bias,
                           &t.ln2_weight, &t.ln2_bias, &t.fc_weight, &t.fc_bias, &t.out_weight, &t.out_bias})
            *tensor = take();
        m.layers.push_back(t);
    }
    m.lnf_weight = take();
    m.lnf_bias = take();
    m.head = g.tied ? m.wte : take();
    return m;
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic of one training step for the MFU: 6 FLOPs a token and matrix weight (2 forward, 4 backward), and causal
// attention counted at half the square: 2 C (end^2 - begin^2) a layer forward for queries [begin, end), twice that
// backward. Recomputation does not count.
inline double matmul_flops_per_token(const GptConfig& g) {
    const double C = double(g.channels);
    return 6.0 * (double(g.layers) * 12.0 * C * C + double(g.padded_vocab) * C);
}
inline double attention_flops(const GptConfig& g, int64_t begin, int64_t end) {
    return 6.0 * double(g.layers) * double(g.channels) * (double(end) * double(end) - double(begin) * double(begin));
}
