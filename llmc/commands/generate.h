// `generate`: samples text from a checkpoint. The same functions as in training, one new token at a time: keys and
// values of the tokens before it lie in a store for each layer, as for a sequence cut into slices of one token. With
// several ranks each runs its parts, and the activations go from one to the next.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <numeric>

#include "llmc/commands/model_file.h"
#include "llmc/data/tokenizer.h"
#include "llmc/kernels/random.h"
#include "llmc/parallel/team.h"

// Activations of at most `context` = T tokens, and the keys and values of all tokens before them.
struct DecoderTensors {
    Matrix<floatR> x, y;           // [T, C], input and output of a layer
    Matrix<floatX> ln1, qkv, out;  // [T, C], [T, 3C], [T, C]
    Matrix<floatS> lse;            // [T, NH]
    NormStatistics norm;
    std::vector<Matrix<floatX>> stores;  // [L] of [T, 2C], where the rank runs that attention

    DecoderTensors(Allocator& a, const RankOptions& o)
        : x(a.take<floatR>(o.model.context, o.model.channels)),
          y(a.take<floatR>(o.model.context, o.model.channels)),
          ln1(a.take<floatX>(o.model.context, o.model.channels)),
          qkv(a.take<floatX>(o.model.context, 3 * o.model.channels)),
          out(a.take<floatX>(o.model.context, o.model.channels)),
          lse(a.take<floatS>(o.model.context, o.model.heads)),
          norm(a, o.model.context),
          stores(size_t(o.model.layers)) {
        for (int l = 0; l < o.model.layers; ++l)
            if (o.owner(Part::attention, l) == o.layout.rank)
                stores[size_t(l)] = a.take<floatX>(o.model.context, 2 * o.model.channels);
    }
};

class Decoder {
public:
    // `rank` has been planned for decoder_options().
    explicit Decoder(Rank& rank)
        : rank_(rank),
          ctx_{rank.device, rank.options.model, {rank.workspace}, rank.options.mlp_chunk, rank.options.head_chunk},
          memory_(bytes_of<DecoderTensors>(rank.options)) {
        Allocator place{memory_.data()};
        t_.emplace(place, rank.options);
    }

    int64_t length() const { return length_; }
    void clear() { length_ = 0; }

    // Appends the tokens to the sequence, at most `context` in all, and returns the logits [V] after the last of them
    // on the rank that runs the head, none on all others. Called by all ranks together.
    std::vector<floatX> append(std::span<const int32_t> tokens) {
        const GptConfig& g = rank_.options.model;
        const int64_t N = int64_t(tokens.size());
        Step step;  // one slice of one sequence
        step.chunks.push_back({{tokens.begin(), tokens.end()}, {}, std::vector<int32_t>(tokens.size())});
        std::iota(step.chunks[0].positions.begin(), step.chunks[0].positions.end(), int32_t(length_));
        step.segments = {{{0, N, length_, true}}};
        inputs_.load(rank_.device, step);
        const ChunkInputs& chunk = inputs_.chunks[0];
        const Matrix<floatX> ln1 = t_->ln1.row_range(0, N), qkv = t_->qkv.row_range(0, N),
                             out = t_->out.row_range(0, N);
        std::vector<floatX> logits;

        const Chain chain{int(g.layers), false};
        for (int n = 0; n < chain.length(); ++n) {
            const Op op = chain.op(n, 0);
            if (n > 0) pass_on(chain.op(n - 1, 0), op, N);
            if (!runs(op.part, op.layer)) continue;
            const auto w = op.layer < 0 ? LayerTensors<floatX>{} : rank_.w.layers[size_t(op.layer)];
            const Matrix<floatR> x = t_->x.row_range(0, N);
            switch (op.part) {
                case Part::embed:
                    embed_forward(ctx_, rank_.w, x, chunk.rows);
                    break;
                case Part::pre:
                    pre_attention_forward(ctx_, w, ln1, t_->norm, qkv, x);
                    break;
                case Part::attention:
                    attention_block_forward(ctx_, out, t_->lse.row_range(0, N), qkv, t_->stores[size_t(op.layer)],
                                            chunk.segments);
                    break;
                case Part::post:
                    post_attention_forward(ctx_, w, t_->y.row_range(0, N), std::nullopt, x, out);
                    std::swap(t_->x, t_->y);
                    break;
                case Part::head: {
                    Allocator workspace = ctx_.workspace;
                    const Matrix<floatX> row =
                        head_logits(ctx_, rank_.w, HeadWorkspace(workspace, 1, g), x.row_range(N - 1, 1));
                    logits.resize(size_t(g.vocab));
                    download(rank_.device, logits.data(), row.data, g.vocab);
                    break;
                }
            }
        }
        length_ += N;
        return logits;
    }

private:
    Rank& rank_;
    BlockContext ctx_;
    DeviceMemory<std::byte> memory_;
    StepInputs inputs_;
    std::optional<DecoderTensors> t_;
    int64_t length_ = 0;  // tokens in the stores

    bool runs(Part part, int layer) const { return rank_.options.owner(part, layer) == rank_.index; }

    // The result of one op goes to the rank of the next, if that is another.
    void pass_on(const Op& made, const Op& next, int64_t N) {
        const int from = rank_.options.owner(made.part, made.layer), to = rank_.options.owner(next.part, next.layer);
        if (from == to || (rank_.index != from && rank_.index != to)) return;
        const bool send = rank_.index == from;
        std::vector<Transfer> transfers;
        const auto add = [&]<class T>(Matrix<T> m) {
            transfers.push_back({send, send ? to : from, m.data, N * m.cols * int64_t(sizeof(T))});
        };
        add(t_->x);
        if (made.part == Part::pre) add(t_->qkv);
        if (made.part == Part::attention) add(t_->out);
        rank_.transport.progress.waiting(
            {made.part, Pass::F, made.layer, 0, false, send ? Kind::send : Kind::receive, send ? to : from});
        rank_.transport.wait(0, rank_.transport.post(transfers) + int64_t(transfers.size()));
        rank_.transport.progress.busy_with("decoding");
    }
};

// Index drawn from softmax(logits / temperature) over the `top_k` largest (0 = all); the largest at temperature 0.
// `u` is uniform in [0, 1).
inline int32_t sample_token(const std::vector<floatX>& values /*[V]*/, double temperature, int64_t top_k, double u) {
    const floatX* logits = values.data();
    const int64_t V = int64_t(values.size());
    std::vector<int32_t> order(values.size());
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

// One row of logits at a time.
inline RankOptions decoder_options(const ModelFile& file, int rank) {
    RankOptions options = file.options(rank);
    options.head_chunk = 1;
    options.layout.helix.spread_head = false;  // one token at a time has one head
#ifdef USE_CUDA
    options.cudnn = false;  // its plans are for many queries
#endif
    return options;
}

// What one rank does. They all come to the same text; rank 0 prints it.
inline void generate_on_rank(const Config& c, const ModelFile& file, const Tokenizer& tokenizer, Transport& transport) {
    const RankOptions options = decoder_options(file, transport.rank);
    Rank rank(options, transport);
    transport.together([&] { file.load(rank); });

    std::vector<int32_t> text = {tokenizer.end_of_text()};
    const std::vector<int32_t> prompt = tokenizer.encode(c.generate.prompt);
    text.insert(text.end(), prompt.begin(), prompt.end());
    const auto print = [&](const std::string& piece) {
        if (transport.rank != 0) return;
        std::fputs(piece.c_str(), stdout);
        std::fflush(stdout);
    };
    print(c.generate.prompt);

    const int64_t context = options.model.context;
    const size_t head = size_t(options.owner(Part::head, -1));
    Decoder decoder(rank);
    int64_t fed = std::max<int64_t>(0, int64_t(text.size()) - context);  // a prompt beyond the context loses its start
    for (int64_t i = 0; i < c.generate.tokens; ++i) {
        if (decoder.length() + int64_t(text.size()) - fed > context) {  // full: go on with the later half
            decoder.clear();
            fed = int64_t(text.size()) - std::max<int64_t>(context / 2, 1);
        }
        const std::vector<floatX> logits = decoder.append(std::span(text).subspan(size_t(fed)));
        fed = int64_t(text.size());
        std::string drawn;
        if (!logits.empty()) {
            const double u = uniform(uint64_t(c.training.seed), 0, uint64_t(i));
            drawn = std::to_string(sample_token(logits, c.generate.temperature, c.generate.top_k, u));
        }
        const int32_t next = std::stoi(transport.all_gather(drawn)[head]);
        if (next == tokenizer.end_of_text()) break;
        text.push_back(next);
        print(tokenizer.decode({&next, 1}));
    }
    print("\n");
}

inline int generate_command(const Config& c, Team& team) {
    const ModelFile file(c, team.processes());
    std::optional<Tokenizer> tokenizer;
    team.processes().together([&] {
        std::vector<MemoryPlan> plans = memory_plans(decoder_options(file, 0));
        for (size_t r = 0; r < plans.size(); ++r) {
#ifndef USE_CUDA  // where the arena for whole chunks, which stays empty, takes no memory
            plans[r].activations = 0;
#endif
            plans[r].activations += bytes_of<DecoderTensors>(decoder_options(file, int(r)));
        }
        check_memory(c, plans, 0, [](int64_t) {
            return std::string("end other programs, or spread the model over several machines with scripts/run_mpi.sh");
        });
        tokenizer.emplace(file.tokenizer_name(), c.data.tokenizer_dir);
    });
    return team.run(int(c.parallel.ranks), double(c.parallel.hang_timeout), [&](Transport& transport) {
        generate_on_rank(c, file, *tokenizer, transport);
        return 0;
    });
}
