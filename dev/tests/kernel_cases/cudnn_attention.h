// Cases of cudnn_attention.h: chunks of mixed lengths, whose calls leave gaps to each other and have copies of
// segments, and slices beside packed segments. On the CPU its own kernels compute them, for the comparison.
#pragma once

#include "attention.h"

// With plans for chunks of up to `chunk_tokens` tokens, of sequences up to `context`.
inline void cudnn_attention_cases(Cases& cases, int64_t context, int64_t chunk_tokens,
                                  const std::vector<AttentionShape>& shapes) {
#ifdef USE_CUDNN
    CudnnShape plans;
    plans.heads = shapes[0].heads, plans.head_size = shapes[0].head_size;
    plans.context = context, plans.chunk_tokens = chunk_tokens;
    CudnnAttention cudnn(plans);
    cases.device.cudnn = &cudnn;
#else
    (void)context, (void)chunk_tokens;
#endif
    for (const AttentionShape& shape : shapes) attention_case(cases, shape, "cudnn_attention");
#ifdef USE_CUDNN
    cases.device.cudnn = nullptr;
#endif
}

inline void cudnn_attention_cases(Cases& cases) {
    cudnn_attention_cases(cases, 700, 1800,
                          {{2, 64, {1}},
                           {2, 64, {128}},
                           {2, 64, {129}},
                           {2, 64, {700}},
                           {2, 64, {600, 5, 300, 1, 130, 700, 64}},
                           {2, 64, {1, 700, 1, 257, 2, 513}},
                           {2, 64, {300, 300, 300, 300, 300, 300}},
                           {2, 64, {700, 128, 512, 256}},
                           {2, 64, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 600}},
                           {2, 64, {511, 512, 513}},
                           {2, 64, {1, 1, 1, 1, 1, 1, 1, 1}}});
    std::vector<AttentionShape> slices;
    for (const int64_t context : {0, 1, 100, 127, 128, 300, 600, 700})
        slices.insert(slices.end(),
                      {{1, 128, {300}, context}, {1, 128, {1, 5, 200}, context}, {1, 128, {130, 33}, context}});
    cudnn_attention_cases(cases, 1000, 300, slices);
}
