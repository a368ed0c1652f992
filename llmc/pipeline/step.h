// The input of one step, cut into chunks, in the form in which the ops take it.
#pragma once

#include "llmc/data/packing.h"
#include "llmc/model/blocks.cuh"
#include "llmc/pipeline/plan.h"

struct Step {
    std::vector<ChunkTokens> chunks;                 // tokens, targets and positions of each
    std::vector<std::vector<SegmentRows>> segments;  // of each chunk
    std::vector<int> group_sizes;                    // chunks of each cut sequence, 1 for every other chunk
    std::vector<double> attention_flops;             // of each chunk, all layers, forward and backward
    int64_t tokens = 0, targets = 0;
    double flops = 0;  // of forward and backward
};

inline Step prepare_step(const Batch& batch, int64_t chunk_tokens, const GptConfig& g) {
    Step step;
    for (const Chunk& chunk : make_chunks(batch, chunk_tokens)) {
        step.chunks.push_back(gather_chunk(batch, chunk));
        std::vector<SegmentRows> rows;
        int64_t begin = 0;
        double attention = 0;
        for (const Segment& s : chunk.segments) {
            const int64_t whole = int64_t(batch.sequences[size_t(s.sequence)].tokens.size());
            rows.push_back({begin, s.end - s.begin, s.begin, s.end - s.begin < whole});
            begin += s.end - s.begin;
            attention += attention_flops(g, s.begin, s.end);
        }
        // A slice is the first segment of its chunk; every slice but the first one continues the group before it.
        if (rows[0].context > 0) ++step.group_sizes.back();
        else step.group_sizes.push_back(1);
        step.segments.push_back(std::move(rows));
        step.attention_flops.push_back(attention);
        step.flops += attention;
    }
    step.tokens = batch.tokens;
    step.targets = batch.targets;
    step.flops += double(batch.tokens) * matmul_flops_per_token(g);
    return step;
}

// What kernels read of a chunk besides its tensors.
struct ChunkInputs {
    int64_t tokens;  // N
    TokenRows rows;
    const int32_t* targets;
    Segments segments;
};

// The integers of a step where kernels read them: on a GPU they are copied there in one piece, on the CPU they stay in
// the step, which therefore has to outlive this.
class StepInputs {
public:
    std::vector<ChunkInputs> chunks;

    // Once the device is done with the step before. It does not wait for the copy.
    void load(const Device& device, const Step& step) {
        chunks.clear();
#ifdef USE_CUDA
        std::vector<std::byte> packed;
        std::vector<std::array<int64_t, 7>> offsets;  // [chunk] of its arrays, in bytes
        const auto append = [&]<class T>(const std::vector<T>& values) {
            const size_t offset = size_t(round_up(int64_t(packed.size()), 64));
            packed.resize(offset + values.size() * sizeof(T));
            if (!values.empty()) std::memcpy(packed.data() + offset, values.data(), values.size() * sizeof(T));
            return int64_t(offset);
        };
#ifdef USE_CUDNN
        cudnn_chunks_.clear();
        for (const std::vector<SegmentRows>& rows : step.segments)
            if (device.cudnn) cudnn_chunks_.push_back(cudnn_chunk(device.cudnn->shape, std::span(rows)));
#endif
        for (size_t c = 0; c < step.chunks.size(); ++c) {
            const ChunkTokens& t = step.chunks[c];
            offsets.push_back({append(t.tokens), append(t.positions), append(t.targets), append(sorted_rows(t.tokens)),
                               append(sorted_rows(t.positions)), append(attention_tiles(step.segments[c])), 0});
#ifdef USE_CUDNN
            if (device.cudnn) offsets.back()[6] = append(cudnn_chunks_[c].table);
#endif
        }
        if (const int64_t bytes = int64_t(packed.size()); bytes > memory_.size()) {
            memory_ = DeviceMemory<std::byte>(bytes + bytes / 4);  // documents differ from step to step
            pinned_ = PinnedMemory(memory_.size());
        }
        std::memcpy(pinned_.data(), packed.data(), packed.size());
        CUDA_CHECK(
            cudaMemcpyAsync(memory_.data(), pinned_.data(), packed.size(), cudaMemcpyHostToDevice, device.stream));
        for (size_t c = 0; c < step.chunks.size(); ++c) {
            const auto ints = [&](int i) { return reinterpret_cast<const int32_t*>(memory_.data() + offsets[c][i]); };
            chunks.push_back(
                {int64_t(step.chunks[c].tokens.size()),
                 {ints(0), ints(1), ints(3), ints(4)},
                 ints(2),
                 {step.segments[c], reinterpret_cast<const AttentionTile*>(memory_.data() + offsets[c][5])}});
#ifdef USE_CUDNN
            if (device.cudnn) {
                chunks.back().segments.cudnn_chunk = &cudnn_chunks_[c];
                chunks.back().segments.cudnn_table = reinterpret_cast<const int64_t*>(memory_.data() + offsets[c][6]);
            }
#endif
        }
#else
        (void)device;
        for (size_t c = 0; c < step.chunks.size(); ++c) {
            const ChunkTokens& t = step.chunks[c];
            chunks.push_back({int64_t(t.tokens.size()),
                              {t.tokens.data(), t.positions.data()},
                              t.targets.data(),
                              {step.segments[c]}});
        }
#endif
    }

private:
#ifdef USE_CUDA
    DeviceMemory<std::byte> memory_;
    PinnedMemory pinned_;  // what is on its way there
#endif
#ifdef USE_CUDNN
    std::vector<CudnnChunk> cudnn_chunks_;
#endif
};
