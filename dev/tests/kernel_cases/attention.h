// Cases of attention.cuh: lengths about the sizes of the tiles, packed segments, slices with and without earlier keys,
// head sizes that fill a tile's columns and that do not. Keys outside of a segment are NaN where no segment has them.
#pragma once

#include <limits>

#include "cases.h"
#include "llmc/kernels/attention.cuh"

struct AttentionShape {
    int heads;
    int64_t head_size;
    std::vector<int64_t> lengths;
    int64_t context = -1;  // of the first segment, which is a slice if this is not negative

    std::string name() const {
        std::string text = "NH=" + std::to_string(heads) + " HS=" + std::to_string(head_size);
        if (context >= 0) text += " context=" + std::to_string(context);
        for (size_t i = 0; i < lengths.size(); i++) text += (i ? "," : " lengths=") + std::to_string(lengths[i]);
        return text;
    }
};

// By our kernels or, with device.cudnn, by cuDNN; recorded as outputs of `name`.
inline void attention_case(Cases& cases, const AttentionShape& shape, const std::string& name = "attention") {
    const Device& device = cases.device;
    const int64_t C = shape.heads * shape.head_size;
    const bool sliced = shape.context >= 0;
    std::vector<SegmentRows> rows;
    int64_t N = 0;
    for (const int64_t length : shape.lengths) {
        rows.push_back({N, length, N == 0 && sliced ? shape.context : 0, N == 0 && sliced});
        N += length;
    }
    // the store has rows to spare, of NaN
    const int64_t slice = sliced ? shape.lengths[0] : 0, known = sliced ? shape.context + slice : 0, T = known + 3;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    // scores of deviation 2
    std::vector<float> qkv_values = normal_values(1, N * 3 * C, 1.4f), store_values = normal_values(2, T * 2 * C, 1.4f);
    std::fill(store_values.begin() + known * 2 * C, store_values.end(), nan);
    // gradients that must be written begin as NaN, those that must be left alone as 0
    std::vector<float> d_qkv_before(N * 3 * C, nan);
    for (int64_t row = 0; row < slice; row++) {
        std::fill_n(qkv_values.begin() + row * 3 * C + C, 2 * C, nan);
        std::fill_n(d_qkv_before.begin() + row * 3 * C + C, 2 * C, 0.0f);
    }
    const std::vector<float> d_store_before = normal_values(3, T * 2 * C);

    const DeviceArray<floatX> qkv(device, qkv_values), store(device, store_values);
    const DeviceArray<floatX> d_out(device, normal_values(4, N * C)), out(device, N * C), d_qkv(device, d_qkv_before);
    const DeviceArray<floatS> lse(device, N * shape.heads), d_store(device, d_store_before);
#ifdef USE_CUDA
    size_t scratch = attention_scratch_bytes(1, shape.head_size, shape.heads, N);
#ifdef USE_CUDNN
    if (device.cudnn)
        scratch =
            size_t(round_up(cudnn_workspace_bytes(device.cudnn->shape), 256)) + size_t(T * 2 * C) * sizeof(floatX);
#endif
    cases.give_scratch(scratch);
#ifdef USE_CUDNN
    if (device.cudnn)  // what it takes for zeros without having written them is no number
        CUDA_CHECK(cudaMemsetAsync(device.scratch, 0xff, device.scratch_bytes, device.stream));
#endif
    const std::vector<AttentionTile> host_tiles = attention_tiles(rows);
    AttentionTile* tiles =
        reinterpret_cast<AttentionTile*>(allocate_on_device(int64_t(host_tiles.size() * sizeof(AttentionTile))));
    upload(device, tiles, host_tiles.data(), int64_t(host_tiles.size()));
    Segments segments(rows, tiles);
#ifdef USE_CUDNN
    const CudnnChunk chunk =
        device.cudnn ? cudnn_chunk(device.cudnn->shape, std::span<const SegmentRows>(rows)) : CudnnChunk();
    const DeviceMemory<int64_t> table(int64_t(chunk.table.size()));
    upload(device, table.data(), chunk.table.data(), table.size());
    segments.cudnn_chunk = &chunk, segments.cudnn_table = table.data();
#endif
#else
    cases.give_scratch(attention_scratch_bytes(device.threads, shape.head_size, shape.heads, N));
    const Segments segments(rows);
#endif
    attention_forward(device, out.matrix(N, C), lse.matrix(N, shape.heads), qkv.matrix(N, 3 * C),
                      store.matrix(T, 2 * C), segments, shape.heads);
    attention_backward(device, d_qkv.matrix(N, 3 * C), d_store.matrix(T, 2 * C), d_out.matrix(N, C), out.matrix(N, C),
                       lse.matrix(N, shape.heads), qkv.matrix(N, 3 * C), store.matrix(T, 2 * C), segments, shape.heads);
    cases.record(name + " out", shape.name(), out.values());
    cases.record(name + " lse", shape.name(), lse.values(), {1e-5, 1e-4});
    cases.record(name + " d_qkv", shape.name(), d_qkv.values(), ATTENTION_GRADIENT);
    std::vector<double> added = d_store.values();
    for (size_t i = 0; i < added.size(); i++) added[i] -= d_store_before[i];
    if (sliced) cases.record(name + " d_store", shape.name(), std::move(added), ATTENTION_GRADIENT);
    if (name == "attention") {  // cuDNN takes `out` instead of D
        const DeviceArray<floatS> delta(device, N * shape.heads), d_store_of_delta(device, d_store_before);
        const DeviceArray<floatX> d_qkv_of_delta(device, d_qkv_before);
        attention_delta(device, delta.matrix(N, shape.heads), d_out.matrix(N, C), out.matrix(N, C));
        attention_backward(device, d_qkv_of_delta.matrix(N, 3 * C), d_store_of_delta.matrix(T, 2 * C),
                           d_out.matrix(N, C), {}, lse.matrix(N, shape.heads), qkv.matrix(N, 3 * C),
                           store.matrix(T, 2 * C), segments, shape.heads, delta.matrix(N, shape.heads));
        cases.record(name + " d_qkv from D", shape.name(), d_qkv_of_delta.values(), ATTENTION_GRADIENT);
    }
#ifdef USE_CUDA
    free_on_device(reinterpret_cast<std::byte*>(tiles), int64_t(host_tiles.size() * sizeof(AttentionTile)));
#endif
}

inline void attention_cases(Cases& cases) {
    const std::vector<AttentionShape> shapes = {
        // whole sequences
        {1, 64, {1}},
        {2, 64, {2}},
        {1, 64, {63}},
        {1, 64, {64}},
        {1, 64, {65}},
        {1, 64, {127}},
        {2, 128, {130}},
        {1, 128, {257}},
        {3, 8, {33}},
        {2, 16, {70}},
        {5, 24, {17}},
        {1, 80, {129}},
        {2, 96, {66}},
        {2, 32, {1, 1, 5, 40, 1}},
        {1, 128, {31, 96, 1, 2}},
        // slices
        {1, 64, {1, 3}, 0},  // by itself it would have no gradient but that of its value
        {1, 64, {1, 5}, 1},  // alone, the rounding of out would show in dq
        {1, 64, {1}, 130},
        {1, 64, {2, 5}, 63},  // alone, two queries would show little but how `out` was rounded for D
        {2, 64, {63}, 64},
        {1, 64, {64}, 65},
        {1, 64, {65}, 0},
        {1, 64, {127}, 1},
        {1, 128, {130}, 127},
        {1, 128, {1}, 200},
        {2, 8, {40}, 7},
        {3, 16, {33}, 33},
        {1, 24, {20}, 100},
        {2, 48, {50}, 31},
        {1, 80, {70}, 90},
        {1, 96, {17}, 128},
        {1, 112, {64}, 64},
        {2, 32, {30, 10, 1}, 50},
        {1, 64, {5, 1, 1, 70}, 0},
        {2, 128, {33, 64, 1}, 40},
    };
    for (const AttentionShape& shape : shapes) attention_case(cases, shape);
}
