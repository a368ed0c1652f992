// A rank: everything that one worker of the training job owns. Two ranks in one process share nothing but the program.
#pragma once

#include <exception>
#include <map>

#include "llmc/parallel/op_loop.h"
#include "llmc/parallel/rank_plans.h"
#include "llmc/pipeline/step.h"

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
    // gradients, and they only pass through it, between steps, when nobody needs those (rank_weights.h).
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
