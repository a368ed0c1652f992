// Flash attention by cuDNN in bf16: causal, variable length, forward and backward. cudnn_attention.cpp is the only file
// that includes cuDNN's front end, and loads cuDNN when it is first asked for: a program with it starts on a machine
// without cuDNN or a driver. attention.cuh calls it.
//
// cuDNN runs plans: kernels compiled for a number of segments and for their longest query and key range. Building one
// takes about a second of the host, and loading its code may wait for the device, so that all of them are built before
// step 1, and there are few: one bucket for each class of lengths (powers of two from 128), of as many segments as fill
// a chunk. The segments of a chunk, the longest first, as chunks are packed, are dealt out to calls that take a full
// bucket each and thus have rows that lie together; what the last call of a bucket lacks is filled up with copies of
// the chunk's shortest segment, which write the same rows once more. (cuDNN knows empty segments, but they can give
// NaN.) B sequences of T tokens are one call without copies. A slice is a call of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "llmc/common.h"

struct CudnnShape {
    int64_t heads = 0;
    int64_t head_size = 0;       // a multiple of 8, up to 128 (on sm_90: 256)
    int64_t context = 0;         // T, the longest sequence
    int64_t chunk_tokens = 0;    // N of the largest chunk
    int64_t shortest = 1;        // sequence; where all have one length, only its bucket is built
    bool backward = true;        // plans for it, too
    bool deterministic = false;  // the backward pass stores all scores of a call, in 2 bytes each
    int64_t channels() const { return heads * head_size; }
};

// The maxima that a plan is built for.
struct CudnnBucket {
    int64_t segments, longest_query, longest_key;
    bool sliced;  // keys and values are in the store, [T, 2C], else in qkv, [N, 3C]
    bool operator==(const CudnnBucket&) const = default;
};

// The bucket of the call whose longest segment has so many queries after `context` earlier tokens.
inline CudnnBucket cudnn_bucket(const CudnnShape& shape, int64_t length, int64_t context, bool sliced) {
    const int64_t LEAST = 128;  // cuDNN's backward refuses some smaller ones
    const auto length_class = [LEAST](int64_t n, int64_t longest) {
        return std::min(std::max(LEAST, int64_t(std::bit_ceil(uint64_t(n)))), round_up(longest, LEAST));
    };
    const int64_t most = std::min(shape.context, shape.chunk_tokens);  // tokens of a segment
    if (sliced) return {1, round_up(most, LEAST), length_class(std::max(context + length, most), shape.context), true};
    const int64_t longest = length_class(length, most);
    return {ceil_div(shape.chunk_tokens, std::min(longest, most)), longest, longest, false};
}

// All buckets that chunks of this shape can meet.
inline std::vector<CudnnBucket> cudnn_buckets(const CudnnShape& shape) {
    std::vector<CudnnBucket> buckets;
    const auto add = [&](const CudnnBucket& bucket) {
        if (std::find(buckets.begin(), buckets.end(), bucket) == buckets.end()) buckets.push_back(bucket);
    };
    const int64_t most = std::min(shape.context, shape.chunk_tokens);
    for (int64_t length = shape.shortest; length <= most; length = buckets.back().longest_key + 1)
        add(cudnn_bucket(shape, length, 0, false));
    if (shape.context > shape.chunk_tokens)
        for (int64_t keys = most; keys <= shape.context; keys = buckets.back().longest_key + 1)
            add(cudnn_bucket(shape, 1, keys - 1, true));
    return buckets;
}

// ---------------------------------------------------------------------------------------------------------------------
// A chunk as cuDNN takes it: calls, and for each of them a table in device memory that says where its segments are.

struct CudnnCall {
    CudnnBucket bucket;
    int64_t table;  // words into the chunk's table
};

struct CudnnChunk {
    std::vector<CudnnCall> calls;
    std::vector<int64_t> table;  // of all calls, to be uploaded to memory that is 16-byte aligned
};

// The table of a call of S segments: offsets [S + 1] of their first rows, in elements of the matrices, and numbers of
// tokens [S] (32 bits each). The last offset is one past the last row. All arrays are 16-byte aligned.
struct CudnnTable {
    int64_t qkv, keys, out, lse, query_lengths, key_lengths, words;  // first words
    explicit CudnnTable(int64_t S) {
        const int64_t offsets = round_up(S + 1, 2), lengths = round_up(ceil_div(S, 2), 2);
        qkv = 0, keys = offsets, out = 2 * offsets, lse = 3 * offsets;
        query_lengths = 4 * offsets, key_lengths = query_lengths + lengths, words = key_lengths + lengths;
    }
};

// `segments` are SegmentRows (attention.cuh).
template <class Rows>
CudnnChunk cudnn_chunk(const CudnnShape& shape, std::span<const Rows> segments) {
    std::vector<Rows> order(segments.begin(), segments.end());
    std::stable_sort(order.begin(), order.end(), [](const Rows& a, const Rows& b) {
        return a.sliced != b.sliced ? a.sliced : a.length > b.length;
    });
    CudnnChunk chunk;
    for (size_t next = 0; next < order.size();) {
        const CudnnBucket bucket = cudnn_bucket(shape, order[next].length, order[next].context, order[next].sliced);
        const size_t end = std::min(order.size(), next + size_t(bucket.segments));
        std::vector<Rows> rows(order.begin() + int64_t(next), order.begin() + int64_t(end));
        rows.resize(size_t(bucket.segments), order.back());
        std::stable_sort(rows.begin(), rows.end(), [](const Rows& a, const Rows& b) { return a.begin < b.begin; });
        next = end;

        const int64_t S = bucket.segments, C = shape.channels();
        const CudnnTable place(S);
        chunk.calls.push_back({bucket, int64_t(chunk.table.size())});
        chunk.table.resize(chunk.table.size() + size_t(place.words));
        int64_t* table = chunk.table.data() + chunk.calls.back().table;
        const auto set_offsets = [&](int64_t i, int64_t row, int64_t key) {
            table[place.qkv + i] = row * 3 * C;
            table[place.keys + i] = bucket.sliced ? key * 2 * C : row * 3 * C;
            table[place.out + i] = row * C;
            table[place.lse + i] = row * shape.heads;
        };
        for (int64_t i = 0; i < S; i++) {
            const Rows& r = rows[size_t(i)];
            const int32_t lengths[] = {int32_t(r.length), int32_t(r.context + r.length)};
            set_offsets(i, r.begin, 0);
            std::memcpy(reinterpret_cast<std::byte*>(table + place.query_lengths) + 4 * i, &lengths[0], 4);
            std::memcpy(reinterpret_cast<std::byte*>(table + place.key_lengths) + 4 * i, &lengths[1], 4);
        }
        const Rows& last = rows.back();
        set_offsets(S, last.begin + last.length, last.context + last.length);
    }
    return chunk;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory that calls of the bucket work in. The front end's part is known: sums of dq in fp32 [S, NH, longest_query, HS]
// or, deterministic, the scores; and rowsum(d_out * out). cuDNN's own part is a few descriptors a segment.
inline int64_t cudnn_workspace_bytes(const CudnnShape& shape, const CudnnBucket& bucket) {
    const int64_t own = 512 * std::max<int64_t>(64, bucket.segments) + 4096;
    if (!shape.backward) return own;
    const int64_t rows = bucket.segments * shape.heads * bucket.longest_query;
    const int64_t sums =
        shape.deterministic ? rows * round_up(bucket.longest_key, 128) * 2 : rows * shape.head_size * 4;
    return sums + rows * 4 + own;
}

// For all calls of the shape: `workspace` of forward and backward.
inline int64_t cudnn_workspace_bytes(const CudnnShape& shape) {
    int64_t bytes = 0;
    for (const CudnnBucket& bucket : cudnn_buckets(shape))
        bytes = std::max(bytes, cudnn_workspace_bytes(shape, bucket));
    return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------

// Why there is no cuDNN attention in this process, as a sentence; empty where there is.
std::string cudnn_absence();
std::string cudnn_version();  // 9.19.0, say; 0.0.0 where it cannot be loaded

// The plans of one rank, for its device. Errors are Failures that name the call and what cuDNN says of it.
class CudnnAttention {
public:
    const CudnnShape shape;

    // Builds the plans of all buckets, for the device that is current: about 2 s a bucket with the backward pass.
    explicit CudnnAttention(const CudnnShape& shape);
    // Only asks cuDNN whether it has them, for a device of these properties (cuDNN's JSON) and architecture (90 for
    // sm_90). It needs no GPU.
    CudnnAttention(const CudnnShape& shape, const std::string& device_properties, int architecture);
    ~CudnnAttention();

    // `chunk` comes from cudnn_chunk, with the same shape; `table` is its table on the device. `workspace` has
    // cudnn_workspace_bytes(shape) and is 256-byte aligned. `store` may be empty where no segment is sliced.
    // log-sum-exp is natural, and of scaled scores.
    void forward(const CudnnChunk& chunk, const int64_t* table, Matrix<bf16> out /*[N,C]*/,
                 Matrix<float> lse /*[N,NH]*/, Matrix<const bf16> qkv /*[N,3C]*/, Matrix<const bf16> store /*[T,2C]*/,
                 std::byte* workspace, cudaStream_t stream);

    // Writes all rows of d_qkv, but for the keys and values of a slice: their gradients, of earlier tokens, too, are
    // written to the first context + length rows of d_slice, and the caller adds them to their sums in fp32.
    void backward(const CudnnChunk& chunk, const int64_t* table, Matrix<bf16> d_qkv /*[N,3C]*/,
                  Matrix<bf16> d_slice /*[T,2C]*/, Matrix<const bf16> d_out /*[N,C]*/, Matrix<const bf16> out /*[N,C]*/,
                  Matrix<const float> lse /*[N,NH]*/, Matrix<const bf16> qkv /*[N,3C]*/,
                  Matrix<const bf16> store /*[T,2C]*/, std::byte* workspace, cudaStream_t stream);

private:
    struct Plans;
    std::unique_ptr<Plans> plans;
};
