// `generate`: samples text from a checkpoint. The same functions as in training, one new token at a time: keys and
// values of the tokens before it lie in a store for each layer, as for a sequence cut into slices of one token.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <numeric>

#include "llmc/commands/model_file.h"
#include "llmc/data/tokenizer.h"
#include "llmc/kernels/random.h"

class Decoder {
public:
    // `rank` has been planned for inference with chunks of the whole context.
    explicit Decoder(Rank& rank)
        : rank_(rank), ctx_{rank.device, rank.options.model, {rank.workspace}, rank.options.mlp_chunk, 1} {
        const GptConfig& g = rank.options.model;
        memory_.resize(size_t(g.layers * bytes_of<StoreTensor>(g.context, g) + bytes_of<ResidualTensor>(g.context, g)) +
                       64);
        Allocator place{memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64};
        for (int64_t l = 0; l < g.layers; ++l) stores_.push_back(StoreTensor(place, g.context, g).rows);
        layer_output_ = ResidualTensor(place, g.context, g).rows;
    }

    int64_t length() const { return length_; }
    void clear() { length_ = 0; }

    // Appends the tokens to the sequence, at most `context` in all, and returns the logits [V] after the last of them.
    const floatX* append(std::span<const int32_t> tokens) {
        const GptConfig& g = rank_.options.model;
        const int64_t N = int64_t(tokens.size());
        std::vector<int32_t> positions(tokens.size());
        std::iota(positions.begin(), positions.end(), int32_t(length_));
        const std::vector<SegmentRows> segments = {{0, N, length_, true}};

        Allocator place{rank_.activations};
        Matrix<floatR> x = ResidualTensor(place, N, g).rows, y = layer_output_.row_range(0, N);
        const PreActivations pre(place, N, g);
        const AttentionActivations attention(place, N, g);
        embed_forward(ctx_, rank_.w, x, tokens.data(), positions.data());
        for (size_t l = 0; l < stores_.size(); ++l) {
            pre_attention_forward(ctx_, rank_.w.layers[l], pre, x);
            attention_block_forward(ctx_, attention, pre.qkv, stores_[l], segments);
            post_attention_forward(ctx_, rank_.w.layers[l], y, std::nullopt, x, attention.out);
            std::swap(x, y);
        }
        length_ += N;
        Allocator workspace = ctx_.workspace;
        return head_logits(ctx_, rank_.w, HeadWorkspace(workspace, 1, g), x.row_range(N - 1, 1)).data;
    }

private:
    Rank& rank_;
    BlockContext ctx_;
    std::vector<std::byte> memory_;
    std::vector<Matrix<floatX>> stores_;  // [L] of [T, 2C]
    Matrix<floatR> layer_output_;         // [T, C]
    int64_t length_ = 0;                  // tokens in the stores
};

// Index drawn from softmax(logits / temperature) over the `top_k` largest (0 = all); the largest at temperature 0.
// `u` is uniform in [0, 1).
inline int32_t sample_token(const floatX* logits /*[V]*/, int64_t V, double temperature, int64_t top_k, double u) {
    std::vector<int32_t> order(static_cast<size_t>(V));
    std::iota(order.begin(), order.end(), 0);
    const auto larger = [&](int32_t a, int32_t b) {
        return float(logits[a]) != float(logits[b]) ? float(logits[a]) > float(logits[b]) : a < b;
    };
    if (temperature == 0) return *std::min_element(order.begin(), order.end(), larger);
    if (top_k > 0 && top_k < V) {
        std::partial_sort(order.begin(), order.begin() + top_k, order.end(), larger);
        order.resize(size_t(top_k));
    }
    const double top = float(logits[*std::min_element(order.begin(), order.end(), larger)]);
    std::vector<double> cumulative;
    double total = 0;
    for (int32_t id : order) cumulative.push_back(total += std::exp((float(logits[id]) - top) / temperature));
    const auto drawn = std::upper_bound(cumulative.begin(), cumulative.end(), u * total) - cumulative.begin();
    return order[size_t(std::min<int64_t>(drawn, int64_t(order.size()) - 1))];
}

inline int generate_command(const Config& c) {
    const ModelFile file(c);
    const Tokenizer tokenizer(file.tokenizer_name(), c.data.tokenizer_dir);
    RankOptions options = file.rank_options();
    options.head_chunk = 1;
    Rank rank(options);
    file.load(rank);

    std::vector<int32_t> text = {tokenizer.end_of_text()};
    const std::vector<int32_t> prompt = tokenizer.encode(c.generate.prompt);
    text.insert(text.end(), prompt.begin(), prompt.end());
    std::printf("%s", c.generate.prompt.c_str());

    const int64_t context = options.model.context;
    Decoder decoder(rank);
    int64_t fed = std::max<int64_t>(0, int64_t(text.size()) - context);  // a prompt beyond the context loses its start
    for (int64_t i = 0; i < c.generate.tokens; ++i) {
        if (decoder.length() + int64_t(text.size()) - fed > context) {  // full: go on with the later half
            decoder.clear();
            fed = int64_t(text.size()) - std::max<int64_t>(context / 2, 1);
        }
        const floatX* logits = decoder.append(std::span(text).subspan(size_t(fed)));
        fed = int64_t(text.size());
        const double u = uniform(uint64_t(c.training.seed), 0, uint64_t(i));
        const int32_t next = sample_token(logits, options.model.vocab, c.generate.temperature, c.generate.top_k, u);
        if (next == tokenizer.end_of_text()) break;
        text.push_back(next);
        std::fputs(tokenizer.decode({&next, 1}).c_str(), stdout);
        std::fflush(stdout);
    }
    std::printf("\n");
    return 0;
}
