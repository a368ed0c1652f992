// A rank: everything that one worker of the training job owns. Two ranks in one process share nothing but the program.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <map>

#include "llmc/io/machine.h"
#include "llmc/pipeline/step.h"

// Bytes of one rank by kind. The kinds lie one after another in the rank's arena, a single mapping.
struct MemoryPlan {
    int64_t weights = 0, master = 0, gradients = 0, moments = 0, activations = 0, workspace = 0, scratch = 0;
    int64_t total() const { return weights + master + gradients + moments + activations + workspace + scratch; }
};

struct RankOptions {
    GptConfig model;
    Recompute recompute = Recompute::none;
    int64_t chunk_tokens = 0, mlp_chunk = 0, head_chunk = 0;
    int threads = 1;
    bool training = true;  // without: weights, and activations of the forward pass
};

// Scratch of the kernels, the largest need of any of them; ops run one at a time.
inline int64_t kernel_scratch_bytes(const RankOptions& o) {
    const GptConfig& g = o.model;
    return int64_t(std::max({matmul_scratch_bytes(o.threads), layernorm_backward_scratch_bytes(o.threads, g.channels),
                             attention_scratch_bytes(o.threads, g.head_size(), int(g.heads), o.chunk_tokens)}));
}

inline Plan plan_pattern(const RankOptions& o, const std::vector<int>& group_sizes, bool training) {
    std::vector<ChunkShape> shapes = chunk_shapes(group_sizes, o.chunk_tokens, o.model.context);
    std::vector<Op> ops =
        training ? accumulate_schedule(int(o.model.layers), shapes) : evaluate_schedule(int(o.model.layers), shapes);
    return make_plan(std::move(ops), std::move(shapes), o.model, o.recompute, training);
}

inline MemoryPlan plan_memory(const RankOptions& o) {
    const int64_t parameters = flat_size(parameter_table(o.model));
    const int slices = int(ceil_div(o.model.context, o.chunk_tokens));  // of the longest sequence
    MemoryPlan plan;
    plan.weights = round_up(parameters * int64_t(sizeof(floatX)), 4096);
    plan.activations = plan_pattern(o, {slices}, false).size.bytes;
    if (o.training) {
        if (!std::is_same_v<floatX, floatS>) plan.master = round_up(parameters * int64_t(sizeof(floatS)), 4096);
        plan.gradients = round_up(parameters * int64_t(sizeof(floatS)), 4096);
        plan.moments = 2 * plan.gradients;
        plan.activations = std::max(plan.activations, plan_pattern(o, {slices}, true).size.bytes);
    }
    plan.activations = round_up(plan.activations, 4096);
    plan.workspace = round_up(workspace_bytes(o.chunk_tokens, o.model, o.mlp_chunk, o.head_chunk), 4096);
    plan.scratch = round_up(kernel_scratch_bytes(o), 4096);
    return plan;
}

struct Rank {
    int index = 0, count = 1;
    RankOptions options;
    MemoryPlan memory;
    std::vector<Parameter> parameters;
    Device device;

    floatX* weights = nullptr;    // flat buffers, in the order of parameter_table
    floatS* master = nullptr;     // equals weights when floatX is floatS; null without training
    floatS* gradients = nullptr;  // null without training, like the moments
    floatS *m = nullptr, *v = nullptr;
    ModelTensors<floatX> w;
    ModelTensors<floatS> dw;
    std::byte* activations = nullptr;
    std::byte* workspace = nullptr;

    std::atomic<const Op*> current_op = nullptr;       // for SIGQUIT
    const int64_t resident_before = resident_bytes();  // of the process, before the arena is mapped

    explicit Rank(const RankOptions& o) : options(o), memory(plan_memory(o)), parameters(parameter_table(o.model)) {
        const size_t bytes = size_t(memory.total());
        void* mapping =
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping == MAP_FAILED)
            throw Failure(EXIT_MEMORY, "cannot map " + std::to_string(bytes >> 20) +
                                           " MiB for the arena: " + std::strerror(errno) +
                                           "; choose a smaller model, --chunk-tokens or --head-chunk");
        madvise(mapping, bytes, MADV_HUGEPAGE);  // fewer TLB misses while operands are packed
        base = static_cast<std::byte*>(mapping);

        std::byte* next = base;
        auto take = [&](int64_t size) { return std::exchange(next, next + size); };
        weights = reinterpret_cast<floatX*>(take(memory.weights));
        w = bind_tensors(weights, parameters, o.model);
        if (o.training) {
            master = reinterpret_cast<floatS*>(memory.master ? take(memory.master) : base);
            gradients = reinterpret_cast<floatS*>(take(memory.gradients));
            m = reinterpret_cast<floatS*>(take(memory.moments / 2));
            v = reinterpret_cast<floatS*>(take(memory.moments / 2));
            dw = bind_tensors(gradients, parameters, o.model);
        }
        activations = take(memory.activations);
        workspace = take(memory.workspace);
        device = {o.threads, take(memory.scratch), size_t(memory.scratch)};
    }
    ~Rank() { munmap(base, size_t(memory.total())); }
    Rank(const Rank&) = delete;
    Rank& operator=(const Rank&) = delete;

    // Plans are made once for each pattern of chunks.
    const Plan& plan_for(const std::vector<int>& group_sizes, bool training) {
        auto [place, is_new] = plans.try_emplace({training, group_sizes});
        if (is_new) place->second = plan_pattern(options, group_sizes, training);
        if (place->second.size.bytes > memory.activations)
            throw std::logic_error("a step needs more activation memory than was planned for the longest sequence");
        return place->second;
    }

private:
    std::byte* base = nullptr;
    std::map<std::pair<bool, std::vector<int>>, Plan> plans;
};
