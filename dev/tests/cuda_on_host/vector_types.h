// CUDA's small vectors, with its alignments: a 16-byte access that is not aligned is undefined here, too.
#pragma once

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_VECTOR_2(T, name, bytes) \
    struct alignas(bytes) name {      \
        T x, y;                       \
    };                                \
    inline name make_##name(T x, T y) { return {x, y}; }
#define CUDA_VECTOR_4(T, name, bytes) \
    struct alignas(bytes) name {      \
        T x, y, z, w;                 \
    };                                \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_VECTOR_2(float, float2, 8)
CUDA_VECTOR_2(int, int2, 8)
CUDA_VECTOR_2(unsigned, uint2, 8)
CUDA_VECTOR_2(double, double2, 16)
CUDA_VECTOR_4(float, float4, 16)
CUDA_VECTOR_4(int, int4, 16)
CUDA_VECTOR_4(unsigned, uint4, 16)
#undef CUDA_VECTOR_2
#undef CUDA_VECTOR_4
