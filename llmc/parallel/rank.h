// A rank: everything that one worker of the training job owns. Two ranks in one process share nothing but the program.
#pragma once

#include <exception>
#include <map>

#include "llmc/machine.h"
#include "llmc/parallel/op_loop.h"
#include "llmc/pipeline/check.h"
#include "llmc/pipeline/costs.h"
#include "llmc/pipeline/defer.h"
#include "llmc/pipeline/keep.h"
#include "llmc/pipeline/row_pieces.h"
#include "llmc/pipeline/schedules/accumulate.h"
#include "llmc/pipeline/schedules/schedules.h"
#include "llmc/pipeline/step.h"

// Bytes of one rank by kind.
struct MemoryPlan {
    int64_t weights = 0, master = 0, gradients = 0, moments = 0, activations = 0, workspace = 0, scratch = 0;
    int64_t total() const { return weights + master + gradients + moments + activations + workspace + scratch; }
};

// How the work is spread over ranks, and which of them this one is.
struct Layout {
    int ranks = 1, rank = 0;
    std::string schedule = "1f1b";  // of more than one rank; one rank accumulates gradients over chunks
    int folds = 2;                  // helix
    int virtual_stages = 0;         // interleaved; 0: as many as there are layers for
    HelixOptions helix = {};
    int slices = 1;                      // seq1f1b: chunks that each sequence is cut into
    int max_chunks = 1, min_chunks = 1;  // of a training step
    int deferred = 0;                    // most gradients of weights of post that wait for idle time
    int round_chunks = 0;                // helix: chunks of a round, 0 = all of the step
    int row_pieces = 1;                  // helix: of each block and message
};

// A parameter that this rank holds and others, too.
struct SharedParameter {
    int64_t offset, size;      // elements, as in Parameter
    std::vector<int> holders;  // ranks, this one included
};

struct RankOptions {
    GptConfig model;
    Recompute recompute = Recompute::none;
    int64_t chunk_tokens = 0, mlp_chunk = 0, head_chunk = 0;
    int threads = 1;
    bool training = true;  // without: weights, and activations of the forward pass
    Layout layout = {};
    int local_rank = 0;         // among those of its host, which share its GPUs
    int64_t memory_limit = 0;   // bytes of the rank, for recompute `automatic`
    bool output_again = false;  // helix: attention outputs come again, not D, as they do where cuDNN attends
    bool no_master = false;     // no weights in floatS beside those in floatX: the optimizer rounds stochastically
    int64_t shortest_sequence = 1;
#ifdef USE_CUDA
    bool cudnn = true;           // where the program has it
    bool deterministic = false;  // the same bits every time; cuDNN's backward pass wants memory for that,
    int64_t attention_workspace = int64_t(4) << 30;  // and gets so many bytes: beyond them, our own kernels run
#endif

    ScheduleInput schedule_input(int chunks, bool training, bool sliced) const {
        const int L = int(model.layers);
        const int most = int(ceil_div(L, layout.ranks));
        const int v = layout.schedule != "interleaved" ? 1
                      : layout.virtual_stages          ? std::min(layout.virtual_stages, most)
                                                       : most;
        const bool spread_head = layout.ranks > 1 && layout.schedule == "helix" && layout.helix.spread_head;
        return {layout.ranks, L,           chunks, layout.folds,        v,
                training,     spread_head, sliced, layout.round_chunks, layout.slices};
    }
    // Only helix is cut.
    int row_pieces() const { return layout.ranks > 1 && layout.schedule == "helix" ? layout.row_pieces : 1; }
    std::string schedule_name() const {
        std::string name = layout.ranks == 1 ? "accumulate" : layout.schedule;
        if (name == "interleaved")
            name += ", virtual stages " + std::to_string(schedule_input(1, true, false).virtual_stages);
        if (name == "helix")
            name += ", folds " + std::to_string(layout.folds) + helix_text(layout.helix) +
                    (layout.round_chunks ? ", rounds of " + std::to_string(layout.round_chunks) : "") +
                    (row_pieces() > 1 ? ", " + std::to_string(row_pieces()) + " row pieces" : "");
        if (layout.deferred && layout.ranks > 1)
            name += ", up to " + std::to_string(layout.deferred) + " weight gradients deferred";
        return name;
    }
    TensorRules tensor_rules(bool training) const;
    // The rank that runs a part of the model on a chunk; for chunk 0 it owns its parameters.
    int owner(Part part, int layer, int chunk = 0) const {
        if (layout.ranks == 1) return 0;
        return find_schedule(layout.schedule)
            ->owner(schedule_input(std::max(chunk + 1, layout.max_chunks), true, false), part, layer, chunk);
    }
    // Whether a rank runs a part on some chunk, of a step with more chunks if need be. Attention has no parameters.
    bool runs(Part part, int layer, int rank) const {
        const bool spread = schedule_input(1, true, false).spread_head;
        return (spread && in_last_block(part, layer, int(model.layers))) || owner(part, layer) == rank;
    }
    bool holds(const Parameter& p, int rank) const {
        return runs(p.part, p.layer, rank) || (model.tied && p.index == 0 && runs(Part::head, -1, rank));
    }
    std::vector<Parameter> parameters() const {
        return parameters_of(
            model, [&](Part part, int layer) { return runs(part, layer, layout.rank); },
            [&](Part part, int layer) { return owner(part, layer) == layout.rank; });
    }
    // Elements of a gradient that each of so many ranks adds up at a time: what it receives for that from the others is
    // about a chunk of one layer.
    int64_t shared_part(int holders) const { return round_up(ceil_div(chunk_tokens * model.channels, holders), 64); }
    std::vector<SharedParameter> shared_parameters() const {
        std::vector<SharedParameter> shared;
        std::vector<Parameter> held = parameters();
        std::sort(held.begin(), held.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
        for (const Parameter& p : held) {
            SharedParameter s{p.offset, p.size(), {}};
            for (int r = 0; r < layout.ranks; ++r)
                if (holds(p, r)) s.holders.push_back(r);
            if (s.holders.size() > 1) shared.push_back(std::move(s));
        }
        return shared;
    }
};

#ifdef USE_CUDNN
inline CudnnShape cudnn_shape(const RankOptions& o) {
    CudnnShape shape;
    shape.heads = o.model.heads, shape.head_size = o.model.head_size();
    shape.context = o.model.context, shape.chunk_tokens = o.chunk_tokens, shape.shortest = o.shortest_sequence;
    shape.backward = o.training, shape.deterministic = o.deterministic;
    return shape;
}
#endif

// Why attention is not cuDNN's, as a sentence; empty where it is.
inline std::string why_not_cudnn([[maybe_unused]] const RankOptions& o) {
#if defined(USE_CUDNN)
    if (!o.cudnn) return "single queries";
    const int64_t bytes = cudnn_workspace_bytes(cudnn_shape(o));
    if (o.deterministic && bytes > o.attention_workspace)
        return "--deterministic would take cuDNN " + std::to_string(bytes >> 20) +
               " MiB of workspace, --attention-workspace allows " + std::to_string(o.attention_workspace >> 20) +
               " MiB";
    return cudnn_absence();
#elif defined(USE_CUDA)
    return "built without cuDNN";
#else
    return "on the CPU";
#endif
}

// Whether a step gives the same bits every time. cuDNN's backward pass adds in the order in which its blocks end.
inline bool repeats_bits([[maybe_unused]] const RankOptions& o) {
#ifdef USE_CUDNN
    return o.deterministic || !why_not_cudnn(o).empty();
#else
    return true;
#endif
}

inline TensorRules RankOptions::tensor_rules(bool training) const {
    TensorRules rules{int(model.layers), training, recompute};
    if (recompute == Recompute::automatic) rules.recompute = Recompute::without_attention;
    rules.apart = layout.ranks > 1 && layout.schedule == "helix";
    if (rules.apart) rules.helix = layout.helix;
    if (output_again || why_not_cudnn(*this).empty()) rules.output_sent_again = Tensor::attention_out;
    return rules;
}

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

struct Rank : OpLoop {
    const int index;
    RankOptions options;
    MemoryPlan memory;
    std::vector<Parameter> parameters;
    std::vector<SharedParameter> shared;  // the same order on all ranks
    OpenDevice opened;
#ifdef USE_CUDNN
    std::unique_ptr<CudnnAttention> cudnn;
#endif
    Device device;  // with this rank's scratch

    floatX* weights = nullptr;    // flat buffers, in the order of `parameters`
    floatS* master = nullptr;     // equals weights when floatX is floatS; null without training and with no_master
    floatS* gradients = nullptr;  // null without training, like the moments
    floatS *m = nullptr, *v = nullptr;
    ModelTensors<floatX> w;
    ModelTensors<floatS> dw;
    std::byte* activations;
    std::byte* workspace = nullptr;
    StepInputs inputs;             // of the step that runs
    DeviceMemory<double> loss{1};  // sum over the targets that this rank has seen in it

    Rank(const RankOptions& o, Transport& transport)
        : OpLoop{transport, transport.progress, OpClock(opened.device)},
          index(o.layout.rank),
          options(o),
          memory(plan_memory(o)),
          parameters(o.parameters()),
          shared(o.shared_parameters()),
          opened(o.threads, o.local_rank),
          device(opened.device),
          activations(allocate_on_device(memory.activations)),
          base(allocate_on_device(memory.total() - memory.activations)) {
        omp_set_num_threads(o.threads);  // of this thread's parallel regions from here on
#ifdef USE_CUDA                          // the CPU's memory comes as zeros
        CUDA_CHECK(cudaMemsetAsync(base, 0, size_t(memory.total() - memory.activations), device.stream));
#endif
        std::byte* next = base;
        auto take = [&](int64_t size) { return std::exchange(next, next + size); };
        weights = reinterpret_cast<floatX*>(take(memory.weights));
        w = bind_tensors(weights, parameters, o.model);
        if (o.training) {
            if (std::is_same_v<floatX, floatS>) master = reinterpret_cast<floatS*>(base);
            else if (memory.master) master = reinterpret_cast<floatS*>(take(memory.master));
            gradients = reinterpret_cast<floatS*>(take(memory.gradients));
            m = reinterpret_cast<floatS*>(take(memory.moments / 2));
            v = reinterpret_cast<floatS*>(take(memory.moments / 2));
            dw = bind_tensors(gradients, parameters, o.model);
        }
        workspace = take(memory.workspace);
        transport.attach(device);
#ifdef USE_CUDNN
        if (why_not_cudnn(o).empty()) {
            cudnn = std::make_unique<CudnnAttention>(cudnn_shape(o));
            device.cudnn = cudnn.get();
        }
#endif
        device.scratch = take(memory.scratch);
        device.scratch_bytes = size_t(memory.scratch);
    }
    ~Rank() {
        if (std::uncaught_exceptions() > 0) {
            transport.abandon();
        } else {
#ifdef USE_CUDA
            cudaStreamSynchronize(device.stream);  // an error has been reported, or no longer counts
#endif
            transport.detach();
        }
        free_on_device(base, memory.total() - memory.activations);
        free_on_device(activations, memory.activations);
    }
    Rank(const Rank&) = delete;
    Rank& operator=(const Rank&) = delete;

    // Where the weights stand in floatS for checkpoints and comparisons. With no_master it is the place of the
    // gradients, and they only pass through it, between steps, when nobody needs those (widen_weights and round_weights
    // of train_gpt.cu).
    floatS* full_weights() const { return master ? master : gradients; }

    // Plans are made once for each pattern of chunks. Between steps the activations hold nothing: a pattern that leaves
    // larger gaps in the arena than those planned for gets a larger one.
    const Plan& plan_for(const std::vector<int>& group_sizes, bool training) {
        if (plans.size() > 256) plans.clear();  // of documents, nearly every step has a pattern of its own
        auto [place, is_new] = plans.try_emplace({training, group_sizes});
        if (is_new) place->second = plan_pattern(options, group_sizes, training);
        if (const int64_t bytes = round_up(place->second.size.bytes, 4096); bytes > memory.activations) {
            free_on_device(std::exchange(activations, nullptr), std::exchange(memory.activations, 0));
            activations = allocate_on_device(bytes);
            memory.activations = bytes;
        }
        return place->second;
    }

private:
    std::byte* const base;
    std::map<std::pair<bool, std::vector<int>>, Plan> plans;
};
