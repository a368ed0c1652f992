// What one rank of a training job is asked to be: the model, the layout, how much it recomputes and keeps; and what
// follows from that alone, such as the parameters that it holds. options.h makes one from the configuration.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "llmc/model/gpt.h"
#include "llmc/pipeline/schedules/schedules.h"
#include "llmc/pipeline/uses.h"
#ifdef USE_CUDNN
#include "llmc/kernels/cudnn_attention.h"
#endif

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
