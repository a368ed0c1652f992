// From the options of a rank to its plans: the lists of all ranks, proven right, the patterns of chunks that memory is
// planned for, and the bytes that come of it, all before anything is allocated. Called by the rank itself, and by all
// that plan without one (memory.h, planned_step.h, `plan`).
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "llmc/model/blocks.cuh"
#include "llmc/parallel/rank_options.h"
#include "llmc/pipeline/check.h"
#include "llmc/pipeline/costs.h"
#include "llmc/pipeline/defer.h"
#include "llmc/pipeline/keep.h"
#include "llmc/pipeline/row_pieces.h"
#include "llmc/pipeline/schedules/accumulate.h"

// Bytes of one rank by kind.
struct MemoryPlan {
    int64_t weights = 0, master = 0, gradients = 0, moments = 0, activations = 0, workspace = 0, scratch = 0;
    int64_t total() const { return weights + master + gradients + moments + activations + workspace + scratch; }
};

// Scratch of the kernels, the largest need of any of them; ops run one at a time.
inline int64_t kernel_scratch_bytes(const RankOptions& o) {
    const GptConfig& g = o.model;
    int64_t cudnn = 0;
#ifdef USE_CUDNN
    if (why_not_cudnn(o).empty())
        cudnn = round_up(cudnn_workspace_bytes(cudnn_shape(o)), 256) +
                (o.training ? g.context * 2 * g.channels * int64_t(sizeof(floatX)) : 0);
#endif
    return std::max(
        cudnn, int64_t(std::max({matmul_scratch_bytes(o.threads), reduce_scratch_bytes(),
                                 encoder_backward_scratch_bytes(o.chunk_tokens, g.channels),
                                 layernorm_backward_scratch_bytes(o.threads, g.channels),
                                 attention_scratch_bytes(o.threads, g.head_size(), int(g.heads), o.chunk_tokens)})));
}

// By the arithmetic alone, whose rate does not count, and with messages for nothing: the same on every rank.
inline OpLists with_deferred_weights(const RankOptions& o, const std::vector<ChunkShape>& shapes, const OpLists& lists,
                                     const ScheduleInput& in) {
    const OpCosts costs(cluster_of_rate(1), sizes_of<BuildTypes>(), o.model, shapes, o.tensor_rules(true), o.mlp_chunk,
                        o.head_chunk);
    return defer_weights(
        lists, in, costs, [](const Op&, int) { return 0.0; }, o.layout.deferred);
}

// The lists of all ranks for a step whose cut sequences have so many chunks each (1: a chunk by itself), proven right.
inline OpLists lists_of(const RankOptions& o, const std::vector<ChunkShape>& shapes, bool training) {
    const int L = int(o.model.layers);
    const bool sliced = std::any_of(shapes.begin(), shapes.end(), [](const ChunkShape& s) { return s.store >= 0; });
    const ScheduleInput in = o.schedule_input(int(shapes.size()), training, sliced);
    OpLists lists;
    if (o.layout.ranks == 1) {
        lists = {training ? accumulate_schedule(L, shapes) : evaluate_schedule(L, shapes)};
    } else {
        const Schedule& schedule = *find_schedule(o.layout.schedule);
        if (const std::string why = refusal(schedule, in); !why.empty()) throw Failure(EXIT_CONFIG, why);
        if (o.recompute == Recompute::elementwise && schedule.name == "helix" && !o.layout.helix.move_norm)
            throw Failure(EXIT_CONFIG,
                          "helix recomputes as little as --recompute elementwise only with --norm-move on "
                          "and a --qkv-move; take these, or --recompute without-attention");
        lists = schedule.lists(in);
    }
    if (o.layout.deferred > 0 && training && o.layout.ranks > 1) lists = with_deferred_weights(o, shapes, lists, in);
    if (o.row_pieces() > 1) lists = cut_into_row_pieces(lists, in, o.row_pieces());
#ifdef USE_CUDA  // NCCL's groups arrive as a whole
    constexpr Waiting waiting = Waiting::batch;
#else
    constexpr Waiting waiting = Waiting::message;
#endif
    if (const std::vector<std::string> problems = check_lists(lists, in, waiting); !problems.empty())
        throw std::logic_error("the schedule " + o.layout.schedule + " is wrong: " + problems[0]);
    return lists;
}

// What a rank takes whatever its schedule is: all kinds but the activations.
inline MemoryPlan memory_besides_activations(const RankOptions& o) {
    const int64_t parameters = flat_size(o.parameters());
    MemoryPlan plan;
    plan.weights = round_up(parameters * int64_t(sizeof(floatX)), 4096);
    if (o.training) {
        if (!std::is_same_v<floatX, floatS> && !o.no_master)
            plan.master = round_up(parameters * int64_t(sizeof(floatS)), 4096);
        plan.gradients = round_up(parameters * int64_t(sizeof(floatS)), 4096);
        plan.moments = 2 * plan.gradients;
    }
    plan.workspace = round_up(workspace_bytes(o.chunk_tokens, o.model, o.mlp_chunk, o.head_chunk), 4096);
    plan.scratch = round_up(kernel_scratch_bytes(o), 4096);
    return plan;
}

// What the memory limit leaves for activations, whole pages as MemoryPlan has them.
inline int64_t activation_limit(const RankOptions& o) {
    return (o.memory_limit - memory_besides_activations(o).total()) / 4096 * 4096;
}

// The plan of the list of o.layout.rank.
inline Plan plan_list(const RankOptions& o, std::vector<Op> list, std::vector<ChunkShape> shapes, bool training) {
    const TensorRules rules = o.tensor_rules(training);
    if (o.recompute == Recompute::automatic) keep_what_fits(list, shapes, o.model, rules, activation_limit(o));
    return make_plan(std::move(list), std::move(shapes), o.model, rules);
}

inline Plan plan_pattern(const RankOptions& o, const std::vector<int>& group_sizes, bool training) {
    std::vector<ChunkShape> shapes = chunk_shapes(group_sizes, o.chunk_tokens, o.model.context);
    std::vector<Op> list = std::move(lists_of(o, shapes, training)[size_t(o.layout.rank)]);
    return plan_list(o, std::move(list), std::move(shapes), training);
}

// The patterns of chunks (group_sizes) that memory is planned for. One rank is done with a sequence before the next one
// begins, so the longest counts. A pipeline has many chunks under way; the most chunks take the most memory but for the
// gaps in an arena, which depend on how the last group is filled: so all counts that differ in that are tried, and a
// few smaller ones. Of sequences cut into slices, those of one length are planned for, every length by itself; of
// mixtures, gaps may need a little more (then plan_for gets it).
inline std::vector<std::vector<int>> planned_patterns(const RankOptions& o, bool training) {
    const int slices = int(ceil_div(o.model.context, o.chunk_tokens));  // of the longest sequence
    if (o.layout.ranks == 1) return {{slices}};
    std::vector<std::vector<int>> patterns;
    const int least = training ? o.layout.min_chunks : 1, most = o.layout.max_chunks;
    const int group = o.layout.ranks * o.layout.folds, stride = std::max(1, (most - least - group) / 8);
    for (int chunks = most; chunks >= least; chunks -= chunks > most - group ? 1 : stride)
        for (int length = slices; length == slices || length > 1; --length) {
            patterns.emplace_back(size_t(chunks / length), length);
            if (chunks % length) patterns.back().push_back(chunks % length);
        }
    return patterns;
}

// The memory of the ranks that are listed; the rank in the options' layout does not count.
inline std::vector<MemoryPlan> plan_memory(RankOptions o, std::span<const int> ranks) {
    std::vector<int64_t> activations(ranks.size());
    for (const bool training : {false, true})
        for (const std::vector<int>& pattern : planned_patterns(o, training)) {
            if (training && !o.training) continue;
            const std::vector<ChunkShape> shapes = chunk_shapes(pattern, o.chunk_tokens, o.model.context);
            const OpLists lists = lists_of(o, shapes, training);
            for (size_t i = 0; i < ranks.size(); ++i) {
                o.layout.rank = ranks[i];
                const Plan plan = plan_list(o, lists[size_t(ranks[i])], shapes, training);
                activations[i] = std::max(activations[i], plan.size.bytes);
            }
        }
    std::vector<MemoryPlan> plans;
    for (size_t i = 0; i < ranks.size(); ++i) {
        o.layout.rank = ranks[i];
        plans.push_back(memory_besides_activations(o));
        int64_t received = 0;  // by sums of shared gradients, which take place in the arena
        if (o.training)
            for (const SharedParameter& p : o.shared_parameters())
                received = std::max(received, int64_t(p.holders.size() - 1) * o.shared_part(int(p.holders.size())));
        plans.back().activations = round_up(std::max(activations[i], received * int64_t(sizeof(floatS))), 4096);
    }
    return plans;
}

inline MemoryPlan plan_memory(const RankOptions& o) { return plan_memory(o, std::span(&o.layout.rank, 1))[0]; }
