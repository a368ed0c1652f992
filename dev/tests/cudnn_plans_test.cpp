// cuDNN's attention without a GPU: how chunks are dealt out to buckets, the tables that say where segments are, and
// whether cuDNN has a plan for every bucket on an H200, asked with that device's properties. Skipped, with the reason,
// where cuDNN cannot be loaded.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <numeric>
#include <random>

#include "llmc/kernels/attention.cuh"
#include "llmc/kernels/cudnn_attention.h"

// The driver's library of the CUDA toolkit, for linking: enough for support checks where there is no driver.
#ifndef CUDA_DRIVER_STUB
#define CUDA_DRIVER_STUB "/usr/local/cuda/lib64/stubs/libcuda.so"
#endif

namespace {

// As cuDNN 9.19 writes them: CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION.
const char* const H200 = R"({"version": 1, "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0,
    "deviceName": "NVIDIA H200", "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536, "multiProcessorCount": 132, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
    "l2CacheSize": 62914560, "warpSize": 32, "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024, "maxRegistersPerSM": 65536, "pciDeviceId": 0, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1,
    "totalGlobalMem": 150109880320})";

// The most words that the table of a chunk should have. Every token may be a segment, and only a last call has copies;
// of a class of lengths, at most three calls, or 129 of the shortest.
int64_t most_table_words(const CudnnShape& shape) {
    return 5 * (shape.chunk_tokens + ceil_div(shape.chunk_tokens, 128) + 1) + 256 * CudnnTable(1).words;
}

CudnnShape shape_of(int heads, int64_t head_size, int64_t context, int64_t chunk_tokens, int64_t shortest = 1) {
    CudnnShape shape;
    shape.heads = heads;
    shape.head_size = head_size;
    shape.context = context;
    shape.chunk_tokens = chunk_tokens;
    shape.shortest = shortest;
    return shape;
}

std::vector<SegmentRows> whole_sequences(const std::vector<int64_t>& lengths) {
    std::vector<SegmentRows> rows;
    int64_t begin = 0;
    for (const int64_t length : lengths) {
        rows.push_back({begin, length, 0, false});
        begin += length;
    }
    return rows;
}

CudnnChunk chunk_of(const CudnnShape& shape, const std::vector<SegmentRows>& rows) {
    return cudnn_chunk(shape, std::span<const SegmentRows>(rows));
}

int32_t length_at(const int64_t* table, int64_t word, int64_t i) {
    int32_t length;
    std::memcpy(&length, reinterpret_cast<const std::byte*>(table + word) + 4 * i, 4);
    return length;
}

// Every segment is in a call, in a bucket that was announced and that it fits; copies equal an original; offsets
// ascend.
void check_chunk(const CudnnShape& shape, const std::vector<SegmentRows>& rows) {
    const CudnnChunk chunk = chunk_of(shape, rows);
    const std::vector<CudnnBucket> buckets = cudnn_buckets(shape);
    const int64_t C = shape.channels();
    std::vector<int> seen(rows.size());
    int64_t words = 0;
    for (const CudnnCall& call : chunk.calls) {
        ASSERT_NE(std::find(buckets.begin(), buckets.end(), call.bucket), buckets.end()) << "a plan that is not built";
        const CudnnTable place(call.bucket.segments);
        const int64_t* table = chunk.table.data() + call.table;
        ASSERT_EQ(call.table, words);
        words += place.words;
        for (const int64_t word : {place.qkv, place.keys, place.out, place.lse, place.query_lengths, place.key_lengths})
            ASSERT_EQ((call.table + word) % 2, 0) << "arrays are 16-byte aligned";
        for (int64_t i = 0; i < call.bucket.segments; i++) {
            const int64_t begin = table[place.out + i] / C;
            const auto found = std::find_if(rows.begin(), rows.end(), [&](auto& r) { return r.begin == begin; });
            ASSERT_NE(found, rows.end());
            seen[size_t(found - rows.begin())]++;
            const SegmentRows& r = *found;
            ASSERT_EQ(call.bucket.sliced, r.sliced);
            ASSERT_EQ(length_at(table, place.query_lengths, i), r.length);
            ASSERT_EQ(length_at(table, place.key_lengths, i), r.context + r.length);
            ASSERT_LE(r.length, call.bucket.longest_query);
            ASSERT_LE(r.context + r.length, call.bucket.longest_key);
            ASSERT_EQ(table[place.qkv + i], r.begin * 3 * C);
            ASSERT_EQ(table[place.keys + i], r.sliced ? 0 : r.begin * 3 * C);
            ASSERT_EQ(table[place.out + i], r.begin * C);
            ASSERT_EQ(table[place.lse + i], r.begin * shape.heads);
            if (i + 1 == call.bucket.segments) {
                ASSERT_EQ(table[place.out + i + 1], (r.begin + r.length) * C);
                ASSERT_EQ(table[place.keys + i + 1],
                          r.sliced ? (r.context + r.length) * 2 * C : (r.begin + r.length) * 3 * C);
            } else {
                ASSERT_LE(table[place.out + i], table[place.out + i + 1]);
            }
        }
    }
    ASSERT_EQ(int64_t(chunk.table.size()), words);
    ASSERT_LE(words, most_table_words(shape));
    for (const int times : seen) ASSERT_GE(times, 1) << "a segment was left out";
}

TEST(CudnnChunks, BatchesOfEqualSequencesAreOneCallWithoutCopies) {
    for (const auto& [B, T] : std::vector<std::pair<int64_t, int64_t>>{
             {64, 1024}, {16, 1024}, {1, 32768}, {1, 131072}, {12, 1000}, {7, 129}, {3, 64}, {1, 1}}) {
        const CudnnShape shape = shape_of(12, 64, T, B * T, T);
        const auto rows = whole_sequences(std::vector<int64_t>(size_t(B), T));
        check_chunk(shape, rows);
        EXPECT_EQ(cudnn_buckets(shape).size(), 1u) << B << " x " << T;
        ASSERT_EQ(chunk_of(shape, rows).calls.size(), 1u) << B << " x " << T;
        EXPECT_EQ(chunk_of(shape, rows).calls[0].bucket.segments, B) << B << " x " << T;
    }
}

TEST(CudnnChunks, EverySegmentOfRandomChunksIsInACall) {
    std::mt19937 random(1);
    const auto at_most = [&](int64_t n) { return std::uniform_int_distribution<int64_t>(1, n)(random); };
    for (int trial = 0; trial < 2000; trial++) {
        const CudnnShape shape = shape_of(3, 8, at_most(5000), at_most(5000));
        const int64_t longest = at_most(std::min(shape.context, shape.chunk_tokens));
        std::vector<SegmentRows> rows;
        int64_t begin = 0;
        if (shape.context > shape.chunk_tokens && trial % 2) {
            const int64_t length = at_most(shape.chunk_tokens);
            rows.push_back({0, length, at_most(shape.context - length + 1) - 1, true});
            begin = length;
        }
        while (begin < shape.chunk_tokens && trial % 5) {  // some end early
            const int64_t length = std::min(at_most(trial % 3 ? longest : 2), shape.chunk_tokens - begin);
            if (length > shape.context) break;
            rows.push_back({begin, length, 0, false});
            begin += length;
            if (at_most(100) == 1) break;
        }
        if (!rows.empty()) check_chunk(shape, rows);
        if (HasFatalFailure()) FAIL() << "context " << shape.context << ", chunk " << shape.chunk_tokens;
    }
}

TEST(CudnnChunks, OneTokenSequencesFitTheirTable) {
    for (const int64_t N : {1, 2, 127, 128, 129, 4096, 16385}) {
        const auto rows = whole_sequences(std::vector<int64_t>(size_t(N), 1));
        check_chunk(shape_of(2, 64, 1024, N), rows);
        check_chunk(shape_of(2, 64, 1024, N + 1), rows);
        if (HasFatalFailure()) FAIL() << N;
    }
}

TEST(CudnnChunks, OffsetsPass32Bits) {
    const CudnnShape shape = shape_of(64, 128, 131072, 131072);
    const CudnnChunk chunk = chunk_of(shape, whole_sequences({131000, 72}));
    ASSERT_EQ(chunk.calls.size(), 2u);
    EXPECT_EQ(chunk.table[size_t(chunk.calls[1].table)], 131000 * 3 * int64_t(8192));
    EXPECT_GT(chunk.table[size_t(chunk.calls[1].table)], int64_t(1) << 31);
}

TEST(CudnnChunks, BucketsAreFew) {
    EXPECT_EQ(cudnn_buckets(shape_of(12, 64, 1024, 65536)).size(), 4u);         // 128, 256, 512, 1024
    EXPECT_EQ(cudnn_buckets(shape_of(12, 64, 1024, 65536, 1024)).size(), 1u);   // all sequences are of 1024 tokens
    EXPECT_EQ(cudnn_buckets(shape_of(32, 128, 131072, 8192)).size(), 7u + 5u);  // and slices with keys to 131072
    EXPECT_EQ(cudnn_buckets(shape_of(32, 128, 131072, 8192, 131072)).size(), 5u);
}

// ---------------------------------------------------------------------------------------------------------------------

std::string no_support_checks() {
    if (const std::string absence = cudnn_absence(); !absence.empty()) return absence;
    if (!dlopen("libcuda.so.1", RTLD_NOW) && !dlopen(CUDA_DRIVER_STUB, RTLD_NOW))  // it has the driver's name from here
        return std::string("cuDNN compiles kernels with the driver's library, and there is neither a driver nor ") +
               CUDA_DRIVER_STUB;
    return "";
}

TEST(CudnnPlans, EveryBucketHasPlansOnH200) {
    if (const std::string reason = no_support_checks(); !reason.empty()) GTEST_SKIP() << reason;
    struct Case {
        const char* name;
        CudnnShape shape;
    };
    std::vector<Case> cases = {
        {"gpt2:d12, 64 x 1024", shape_of(12, 64, 1024, 65536)}, {"gpt2:d48, 16 x 1024", shape_of(25, 64, 1024, 16384)},
        {"7B, 1 x 131072", shape_of(32, 128, 131072, 131072)},  {"7B, slices of 8192", shape_of(32, 128, 131072, 8192)},
        {"tiny, odd sizes", shape_of(3, 8, 1000, 777)},         {"one token", shape_of(1, 8, 1, 1)},
        {"heads of 72", shape_of(4, 72, 2048, 4096)},           {"heads of 256", shape_of(4, 256, 2048, 4096)},
    };
    for (Case& c : cases)
        for (const bool deterministic : {false, true}) {
            c.shape.deterministic = deterministic;
            EXPECT_NO_THROW(CudnnAttention(c.shape, H200, 90)) << c.name;
            std::printf("  %-20s %2zu buckets, %9.1f MiB of workspace%s\n", c.name, cudnn_buckets(c.shape).size(),
                        double(cudnn_workspace_bytes(c.shape)) / (1 << 20), deterministic ? ", deterministic" : "");
        }
}

TEST(CudnnPlans, WhatCudnnLacksIsNamed) {
    if (const std::string reason = no_support_checks(); !reason.empty()) GTEST_SKIP() << reason;
    try {
        CudnnAttention(shape_of(2, 12, 128, 128), H200, 90);
        FAIL() << "heads of 12 channels passed";
    } catch (const Failure& failure) {
        std::printf("  %s\n", failure.what());
        EXPECT_EQ(failure.exit_code, EXIT_HARDWARE);
        EXPECT_NE(std::string(failure.what()).find("2 heads of 12: validate"), std::string::npos);
    }
    EXPECT_THROW(CudnnAttention(shape_of(2, 64, 128, 128), "{}", 90), Failure) << "device properties are read";
}

}  // namespace
