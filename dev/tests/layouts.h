// Trains a tiny model on ranks with one OpenMP thread each and gathers what came out, tensor by tensor: for tests that
// compare layouts with a single rank and with each other.
#pragma once

#include <cstring>
#include <random>

#include "dev/tests/covering_array.h"
#include "dev/tests/thread_ranks.h"
#define TESTING
#include "train_gpt.cu"

// The forms of helix, from the default to the plainest.
inline std::vector<HelixOptions> helix_variants() {
    return {{},
            {true, true, true, false},
            {true, false, true, true},
            {true, true, false, true},
            HelixOptions::published(),
            {false, false, false, true},
            {false, false, false, false}};
}

// The n-th recompute mode that goes with them.
inline Recompute recompute_with(const HelixOptions& helix, int n) {
    const Recompute mode = Recompute(n % 4);
    return mode == Recompute::elementwise && !helix.move_norm ? Recompute::without_attention : mode;
}

// One layout with all that goes with it.
struct LayoutCase {
    std::string schedule;
    int folds = 1, ranks = 1, layers = 1, chunks = 1;
    int round_chunks = 0;  // helix: chunks of a round, 0 = all
    int row_pieces = 1;    // helix
    int deferred = 0;      // most gradients of weights that wait for idle time
    HelixOptions helix = {};
    Recompute recompute = Recompute::none;
    bool documents = false, tied = false;  // packed documents of mixed lengths, or one window a chunk
    int64_t mlp_chunk = 0;
    int64_t chunk_tokens = 16;  // fewer than the context: sequences are cut into slices
    int64_t memory_limit = 0;   // bytes of each rank, for recompute `automatic`
    bool output_again = false;  // as where cuDNN attends

    std::string text() const {
        std::string name = schedule;
        if (schedule == "helix")
            name += " F=" + std::to_string(folds) +
                    (helix.move_qkv ? helix.weights_once ? " move" : " move each" : " no move") +
                    (helix.move_norm ? " norm" : "") + (helix.spread_head ? " spread" : "") +
                    (round_chunks ? " rounds of " + std::to_string(round_chunks) : "") +
                    (row_pieces > 1 ? " row pieces " + std::to_string(row_pieces) : "");
        if (deferred) name += " deferred " + std::to_string(deferred);
        return name + " p=" + std::to_string(ranks) + " L=" + std::to_string(layers) + " m=" + std::to_string(chunks) +
               " recompute " + recompute_names[int(recompute)] + (documents ? " documents" : " windows") +
               (tied ? " tied" : " untied") + " mlp-chunk " + std::to_string(mlp_chunk) + " chunks of " +
               std::to_string(chunk_tokens) + (memory_limit ? " in " + std::to_string(memory_limit) + " bytes" : "") +
               (output_again ? " output again" : "");
    }
    GptConfig model() const { return {layers, 16, 2, 16, 50, 64, tied}; }
    RankOptions options(int rank, int max_chunks) const {
        const Layout layout{.ranks = ranks,
                            .rank = rank,
                            .schedule = schedule,
                            .folds = folds,
                            .helix = helix,
                            .max_chunks = max_chunks,
                            .deferred = deferred,
                            .round_chunks = round_chunks,
                            .row_pieces = row_pieces};
        return {model(), recompute, chunk_tokens, mlp_chunk, mlp_chunk, 1, true, layout, 0, memory_limit, output_again};
    }
    LayoutCase on_one_rank() const {
        LayoutCase one = *this;
        one.ranks = 1, one.recompute = Recompute::none, one.mlp_chunk = 0, one.memory_limit = 0,
        one.output_again = false;
        return one;
    }

    // Sequences that fill just so many chunks; some tokens have no target. Cut into slices: two long sequences, and
    // short ones behind them.
    Batch batch() const {
        std::mt19937_64 generator(uint64_t(chunks) * 2 + documents);
        Batch batch;
        const auto add = [&](int64_t length) {
            Sample& sample = batch.sequences.emplace_back();
            for (int64_t i = 0; i < length; ++i) {
                sample.tokens.push_back(int32_t(generator() % 50));
                sample.targets.push_back(generator() % 8 ? int32_t(generator() % 50) : -1);
                batch.targets += sample.targets.back() >= 0;
            }
            batch.tokens += length;
        };
        if (chunk_tokens < model().context) {
            for (int64_t length : {16, 13, 2, 5, 1}) add(length);
            return batch;
        }
        for (int c = 0; c < chunks; ++c) add(documents ? 9 + int64_t(generator() % 8) : 16);
        for (int draw = 0; draw < 3 * chunks && documents; ++draw) {  // what fits beside them
            const Batch before = batch;
            add(1 + int64_t(generator() % 7));
            if (int(make_chunks(batch, chunk_tokens).size()) > chunks) batch = before;
        }
        return batch;
    }
};

// What training leaves. Tensors are by Parameter.index, from the ranks that have the originals.
struct LayoutRun {
    std::vector<double> losses;                           // of each step
    double norm = 0;                                      // of the first step's gradients,
    std::vector<std::vector<floatS>> gradients, weights;  // these gradients, and the weights after the last step
    std::vector<std::string> problems;  // tensors of one name that differ between ranks, or are missing
};

// Unlike those of training, no weight is zero at the start, and attention looks at some tokens more than at others.
inline void set_weights(Rank& rank) {
    HostView<floatS> weights(rank.device, rank.full_weights(), flat_size(rank.parameters), false);
    for (const Parameter& p : rank.parameters)
        for (int64_t i = 0; i < p.size(); ++i)
            weights.data()[p.offset + i] = i < used_rows(p, rank.options.model) * p.cols
                                               ? p.mean + 0.15f * normal(9, uint64_t(p.index), uint64_t(i))
                                               : 0;
    weights.store();
    round_weights(rank);
}

// The tensors of a flat buffer, by Parameter.index, from the ranks that have the originals. Called by every rank of the
// layout. Tensors that differ between ranks, or are missing, become problems.
inline std::vector<std::vector<floatS>> gather(const Rank& rank, floatS* flat, std::vector<std::string>& problems) {
    const std::vector<Parameter> table = parameter_table(rank.options.model);
    std::vector<std::vector<floatS>> tensors(table.size());
    std::vector<int> originals(table.size());
    HostView<floatS> held(rank.device, flat, flat_size(rank.parameters), true);
    const std::string own(reinterpret_cast<const char*>(held.data()), size_t(held.size()) * sizeof(floatS));
    const std::vector<std::string> all = rank.transport.all_gather(own);
    RankOptions options = rank.options;
    for (options.layout.rank = 0; options.layout.rank < rank.transport.ranks; ++options.layout.rank)
        for (const Parameter& p : options.parameters()) {
            std::vector<floatS> values(static_cast<size_t>(p.size()));
            std::memcpy(values.data(), all[size_t(options.layout.rank)].data() + size_t(p.offset) * sizeof(floatS),
                        values.size() * sizeof(floatS));
            originals[size_t(p.index)] += !p.copy;
            std::vector<floatS>& known = tensors[size_t(p.index)];
            if (known.empty()) known = std::move(values);
            else if (std::memcmp(known.data(), values.data(), values.size() * sizeof(floatS)) != 0)
                problems.push_back("copies of " + p.name + " differ");
        }
    for (const Parameter& p : table)
        if (originals[size_t(p.index)] != 1)
            problems.push_back(std::to_string(originals[size_t(p.index)]) + " ranks own " + p.name);
    return tensors;
}

// Called on each rank after every compute op: to plant an error.
using Disturb = std::function<void(Rank& rank, const OpTensors& tensors)>;

// So many steps on one batch, each clipped to a norm of 1e-3, hundreds of times smaller than it is; AdamW's epsilon
// then keeps gradients that are zero but for rounding from making steps as long as all others. Called by every rank of
// the layout, and every rank gets what all have.
inline LayoutRun run_rank(const LayoutCase& layout, Transport& transport, int steps, const Disturb& disturb = {}) {
    const Step step = prepare_step(layout.batch(), layout.chunk_tokens, layout.model());
    LayoutRun run;
    Rank rank(layout.options(transport.rank, int(step.chunks.size())), transport);
    set_weights(rank);
    Observer observer;
    const Plan& plan = rank.plan_for(step.group_sizes, true);
    if (disturb)
        observer.after_op = [&](size_t i) {
            const int64_t N = int64_t(step.chunks[size_t(plan.ops[i].chunk)].tokens.size());
            disturb(rank, {rank, plan, i, N});
        };
    for (int n = 1; n <= steps; ++n) {
        run.losses.push_back(compute_gradients(rank, step, &observer));
        const double norm = gradient_norm(rank);
        if (n == 1) run.norm = norm, run.gradients = gather(rank, rank.gradients, run.problems);
        update_parameters(rank, {.lr = 1e-3, .step = n, .gradient_scale = 1e-3 / norm});
    }
    run.weights = gather(rank, widen_weights(rank), run.problems);
    return run;
}

// The same on thread ranks of this process.
template <class RankTransport = ThreadTransport>
LayoutRun run_layout(const LayoutCase& layout, int steps, const Disturb& disturb = {}) {
    LayoutRun run;
    on_thread_ranks<RankTransport>(layout.ranks, [&](Transport& transport) {
        LayoutRun own = run_rank(layout, transport, steps, disturb);
        if (transport.rank == 0) run = std::move(own);
    });
    return run;
}

// How far a run is from another one: relative, tensors by their norms, the worst of each kind.
struct Difference {
    double loss = 0, norm = 0, gradient = 0, key_bias = 0, weight = 0;
    std::vector<std::string> problems;  // beyond the bounds

    std::string text() const {
        char line[160];
        std::snprintf(line, sizeof line, "loss %.1e, norm %.1e, gradients %.1e, key bias %.1e, weights %.1e", loss,
                      norm, gradient, key_bias, weight);
        return line;
    }
};

// The gradient of the biases of keys is zero in exact arithmetic, and AdamW makes large steps of its rounding errors:
// they must be small and are left out of the rest.
inline Difference compare_runs(const LayoutRun& run, const LayoutRun& reference, const GptConfig& g) {
    Difference difference;
    difference.problems = run.problems;
    const auto check = [&](double& worst, double value, double bound, const std::string& what) {
        if (!(value <= bound))  // NaN as well
            difference.problems.push_back(what + " is off by " + format("%.2e", value) + ", the bound is " +
                                          format("%.0e", bound));
        if (!(value <= worst)) worst = value;
    };
    for (size_t n = 0; n < reference.losses.size(); ++n)
        check(difference.loss, std::abs(run.losses[n] / reference.losses[n] - 1), 1e-6,
              "the loss of step " + std::to_string(n + 1));
    check(difference.norm, std::abs(run.norm / reference.norm - 1), 1e-6, "the norm of the gradients");
    for (const Parameter& p : parameter_table(g)) {
        const bool biases = p.name.ends_with("c_attn.bias");
        const int64_t C = g.channels, first_key = biases ? C : p.size(), first_value = biases ? 2 * C : p.size();
        const auto norm_of = [&](const std::vector<floatS>& a, int64_t begin, int64_t end) {
            return std::sqrt(std::inner_product(a.begin() + begin, a.begin() + end, a.begin() + begin, 0.0));
        };
        const auto error = [&](const std::vector<floatS>& a, const std::vector<floatS>& b) {
            double squares = 0, norm = 0;
            for (int64_t i = 0; i < p.size(); ++i) {
                if (i >= first_key && i < first_value) continue;
                squares += std::pow(double(a[size_t(i)]) - double(b[size_t(i)]), 2);
                norm += std::pow(double(b[size_t(i)]), 2);
            }
            return squares == 0 ? 0 : std::sqrt(squares / norm);
        };
        const std::vector<floatS>& gradient = run.gradients[size_t(p.index)];
        const std::vector<floatS>& weights = run.weights[size_t(p.index)];
        if (gradient.empty() || weights.empty()) continue;  // missing: a problem of the run
        check(difference.gradient, error(gradient, reference.gradients[size_t(p.index)]), 1e-5,
              "the gradient of " + p.name);
        check(difference.weight, error(weights, reference.weights[size_t(p.index)]), 1e-5, p.name);
        if (biases)
            check(difference.key_bias, norm_of(gradient, first_key, first_value) / norm_of(gradient, 0, p.size()), 1e-5,
                  "the keys' part of the gradient of " + p.name);
    }
    return difference;
}

inline bool same_bits(const LayoutRun& a, const LayoutRun& b) {
    const auto same = [](const auto& x, const auto& y) {
        return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
    };
    const auto all_same = [&](const auto& x, const auto& y) {
        return std::equal(x.begin(), x.end(), y.begin(), y.end(), same);
    };
    return same(a.losses, b.losses) && std::memcmp(&a.norm, &b.norm, sizeof a.norm) == 0 &&
           all_same(a.gradients, b.gradients) && all_same(a.weights, b.weights);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layouts over all axes.

// Axes that depend on others: 0 a multiple, 1 not, 2 fewer than ranks.
inline int layers_of(int kind, int p) { return kind == 0 ? (p < 8 ? 2 * p : p) : kind == 1 ? p + 1 : p - 1; }
inline int chunks_of(int kind, int p, int F) {
    return kind == 0 ? (p < 4 ? 2 : 1) * p * F : kind == 1 ? p * F + 1 : p - 1;
}
// All chunks in one; a group; fewer than ranks.
inline int round_of(int kind, int p, int F) { return kind == 0 ? 0 : kind == 1 ? p * F : p - 1; }

struct CoveringLayouts {
    std::vector<int> sizes = {8, 4, 3, 3, int(helix_variants().size()), 4, 2, 2, 2, 2, 3, 2, 3};
    std::vector<std::vector<int>> rows;  // [layout][axis] value
    std::vector<LayoutCase> threads, processes;

    // Every pair of values of two axes is in some layout. Another seed gives others.
    explicit CoveringLayouts(unsigned seed) : rows(covering_array(sizes, seed)) {
        static const std::pair<const char*, int> schedule_folds[] = {{"gpipe", 1}, {"1f1b", 1},  {"interleaved", 1},
                                                                     {"zb-h1", 1}, {"zb-h2", 1}, {"helix", 1},
                                                                     {"helix", 2}, {"helix", 3}};
        static constexpr int ranks[] = {2, 3, 4, 8};
        static constexpr int row_pieces[] = {1, 3, 20};  // a chunk has at most 16 rows
        for (const std::vector<int>& row : rows) {
            const auto& [schedule, F] = schedule_folds[row[0]];
            const int p = ranks[row[1]];
            (row[9] == 0 ? threads : processes)
                .push_back({.schedule = schedule,
                            .folds = F,
                            .ranks = p,
                            .layers = layers_of(row[2], p),
                            .chunks = chunks_of(row[3], p, F),
                            .round_chunks = schedule == std::string("helix") ? round_of(row[10], p, F) : 0,
                            .row_pieces = schedule == std::string("helix") ? row_pieces[row[12]] : 1,
                            .deferred = 3 * row[11],
                            .helix = helix_variants()[size_t(row[4])],
                            .recompute = recompute_with(helix_variants()[size_t(row[4])], row[5]),
                            .documents = row[6] == 1,
                            .tied = row[7] == 1,
                            .mlp_chunk = row[8] == 1 ? 5 : 0});
        }
    }
};

// HELIXTRAIN_SEED, or 1.
inline unsigned seed_of_tests() {
    const char* text = std::getenv("HELIXTRAIN_SEED");
    return text ? unsigned(std::strtoul(text, nullptr, 10)) : 1;
}
