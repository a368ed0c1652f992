// From the configuration to the options of a loader and of a rank.
#pragma once

#include "llmc/data/loader.h"
#include "llmc/data/tokenizer.h"
#include "llmc/io/flags.h"
#include "llmc/parallel/rank_options.h"
#include "llmc/pipeline/costs.h"
#include "llmc/pipeline/simulate.h"

inline GptConfig model_of(const Config& c) {
    const auto& m = c.model;
    return {m.layers, m.channels, m.heads, m.context, m.vocab, round_up(m.vocab, 64), !m.untied};
}

inline LoaderOptions loader_options(const Config& c, const GptConfig& model, const Tokenizer& tokenizer,
                                    uint64_t seed) {
    const Packing packing = c.data.packing == "documents" ? Packing::documents : Packing::contiguous;
    return {packing, model.context, model.vocab, tokenizer.end_of_text(), seed};
}

inline Recompute recompute_of(const Config& c) {
    const auto name = std::find(std::begin(recompute_names), std::end(recompute_names), c.compute.recompute);
    return Recompute(name - std::begin(recompute_names));
}

// The most chunks that a training step can have. A window is in one chunk or cut into even slices. Of documents that
// are packed, any two chunks hold more tokens than fit into one, and of the slices of a long one all but the last are
// full; where none is cut, each chunk but the last has less room than the longest takes.
inline int64_t most_chunks(const Config& c) {
    const int64_t N = c.data.chunk_tokens, T = c.model.context, B = c.data.batch_tokens;
    if (c.data.packing == "contiguous") return N < T ? B / T * (T / N) : ceil_div(B / T, N / T);
    return (N < T ? 2 * B / N : std::min(2 * B / N, B / (N - T + 1))) + 1;
}

// Whether a step of helix is shorter by the arithmetic with the last post and the head spread over the ranks: they run
// at once and leave no ramp, but one rank has a block less than the others then.
inline bool spreading_pays(RankOptions o) {
    if (o.layout.schedule != "helix" || o.layout.ranks == 1) return true;
    const int chunks = std::clamp(o.layout.max_chunks, 1, 256);
    const auto step_time = [&](bool spread) {
        o.layout.helix.spread_head = spread;
        const ScheduleInput in = o.schedule_input(chunks, true, false);
        const OpCosts costs(cluster_of_rate(1), sizes_of<BuildTypes>(), o.model,
                            std::vector<ChunkShape>(size_t(chunks), {o.chunk_tokens}), o.tensor_rules(true));
        return simulate(helix_schedule(in), in, costs, [](const Op&, int) { return 0.0; }).makespan;
    };
    return step_time(true) < step_time(false);
}

inline RankOptions rank_options(const Config& c, const GptConfig& model, bool training, int rank = 0) {
    const auto& parallel = c.parallel;
    const int most = int(most_chunks(c)), least = c.data.packing == "contiguous" ? most : 1;
    RankOptions options{
        model,
        recompute_of(c),
        c.data.chunk_tokens,
        c.compute.mlp_chunk,
        c.compute.head_chunk,
        c.threads(),
        training,
        {.ranks = int(parallel.ranks),
         .rank = rank,
         .schedule = parallel.schedule,
         .folds = int(parallel.folds),
         .virtual_stages = int(parallel.virtual_stages),
         .helix = {parallel.qkv_move != "off", parallel.qkv_move == "once",
                   parallel.qkv_move != "off" && parallel.norm_move == "on", parallel.spread_head != "off"},
         .max_chunks = most,
         .min_chunks = least,
         .deferred = int(parallel.defer_weights),
         .round_chunks = int(parallel.round_chunks),
         .row_pieces = int(parallel.row_pieces)},
        c.launch.ranks > 1 ? c.launch.local_rank : rank};
    const int64_t sharers = c.launch.ranks > 1 ? c.launch.local_ranks : parallel.ranks;
    options.memory_limit = c.compute.memory / sharers;
    options.no_master = c.compute.no_master;
    if (c.data.packing == "contiguous") options.shortest_sequence = model.context;
#ifdef USE_CUDA
    options.deterministic = c.compute.deterministic;
    options.attention_workspace = c.compute.attention_workspace;
#endif
    if (parallel.spread_head == "auto") options.layout.helix.spread_head = spreading_pays(options);
    return options;
}
