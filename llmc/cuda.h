// What CUDA kernels here stand on besides CUDA itself: launches, dynamic shared memory, 16-byte accesses, sums over a
// warp and a block. Kernels are ordinary CUDA otherwise, with three rules that let dev/tests/cuda_on_host run them
// without a GPU, under sanitizers: all shared memory is dynamic, launches go through launch(), and instructions that
// C++ has no name for through the functions at the end of this file. There, <cuda_runtime.h> is that folder's own,
// which runs the threads of a block as fibers, and __CUDACC__ is not defined.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>

#include "llmc/common.h"

#define CUDA_CHECK(call) check_cuda((call), #call, __FILE__, __LINE__)

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    const std::string where = std::string(call) + " (" + file + ":" + std::to_string(line) + ") ";
    if (status == cudaErrorMemoryAllocation)
        throw Failure(EXIT_MEMORY, where +
                                       "finds no such memory on the GPU; choose a smaller model, --chunk-tokens or "
                                       "--head-chunk, or --recompute full");
    if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice)
        throw Failure(EXIT_HARDWARE, std::string("this program was built for GPUs, and there is none, or no driver (") +
                                         cudaGetErrorString(status) + "); `make DEVICE=cpu` builds it for the CPU");
    throw Failure(EXIT_HARDWARE, where + "failed: " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Runs kernel(args...) in `blocks` blocks of `threads` threads with so many bytes of shared memory.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#ifdef __CUDACC__
    if (shared_bytes > 48 * 1024)
        CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    kernel<<<blocks, threads, shared_bytes, stream>>>(Parameters(arguments)...);
    CUDA_CHECK(cudaGetLastError());
#else
    run_on_host(blocks, threads, shared_bytes, stream, [=] { kernel(Parameters(arguments)...); });
#endif
}

// The dynamic shared memory of the block, 128-byte aligned.
template <class T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char block_shared_memory[];
    return reinterpret_cast<T*>(block_shared_memory);
#else
    return reinterpret_cast<T*>(host_shared_memory());
#endif
}

// Seconds of one of several runs of work(), which gives the stream something to do: of the fastest of three batches.
template <class Work>
double best_seconds_on_gpu(cudaStream_t stream, int runs, const Work& work) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    double best = std::numeric_limits<double>::infinity();
    work();
    for (int batch = 0; batch < 3; batch++) {
        CUDA_CHECK(cudaEventRecord(begin, stream));
        for (int n = 0; n < runs; n++) work();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        best = std::min(best, 1e-3 * double(ms) / runs);
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// Eight neighbouring elements in registers, as fp32: one 16-byte access of bf16, two of fp32. Addresses are 16-byte
// aligned, so that columns come in multiples of 8 everywhere (relations.h refuses other sizes).
constexpr int PACK = 8;

struct Floats {
    float v[PACK];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ float operator[](int i) const { return v[i]; }
};

__device__ inline Floats load(const float* from) {
    Floats x;
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    return x;
}
__device__ inline Floats load(const bf16* from) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    Floats x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(pairs[i] << 16);
        x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
    return x;
}

__device__ inline void store(float* to, const Floats& x) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
// Two values rounded to nearest even, the first in the lower half.
__device__ inline uint32_t bf16_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return uint32_t(bf16(low).bits) | uint32_t(bf16(high).bits) << 16;
#endif
}
__device__ inline void store(bf16* to, const Floats& x) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7]));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x to two units in the last place, numbers below the smallest normal one as zero. (__expf would take twice as many
// instructions to get these right.)
__device__ inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Reductions whose order depends on the launch alone: the same bits every time.

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Every lane of the warp gets combine() over all of them.
template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}
template <class T>
__device__ T warp_sum(T value) {
    return warp_reduce(value, [](T a, T b) { return a + b; });
}

// Every thread of the block gets combine() over all of them. `shared` has room for a value a warp; it may be used again
// after the next __syncthreads().
template <class T, class Combine>
__device__ T block_reduce(T value, T* shared /*[warps]*/, Combine combine) {
    const int warps = int(blockDim.x) / WARP, warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    value = warp_reduce(value, combine);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    value = shared[0];
    for (int w = 1; w < warps; w++) value = combine(value, shared[w]);
    return value;
}
template <class T>
__device__ T block_sum(T value, T* shared /*[warps]*/) {
    return block_reduce(value, shared, [](T a, T b) { return a + b; });
}
__device__ inline float block_max(float value, float* shared /*[warps]*/) {
    return block_reduce(value, shared, [](float a, float b) { return fmaxf(a, b); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Instructions that C++ has no name for, on the host from dev/tests/cuda_on_host/instructions.h. Whole warps execute
// the first three. Lane l = 4g + t holds of a matrix in bf16, in pairs of columns (the first in the lower half):
//
//   a[16, 16]   a[0]: row g, columns 2t, 2t+1     a[1]: row g + 8    a[2], a[3]: the same 8 columns on
//   b[16, 8]    b[0]: rows 2t, 2t+1 of column g   b[1]: 8 rows on
//   d[16, 8]    d[0], d[1]: row g, columns 2t, 2t+1 (fp32)           d[2], d[3]: row g + 8
#ifdef __CUDACC__
__device__ inline uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// d += a b
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices [8, 8] of 2-byte elements: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned), and r[m] gets
// columns 2t, 2t+1 of row g of matrix m; transposed: rows 2t, 2t+1 of column g.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Copies 16 bytes from global to shared memory beside the arithmetic, zeros where not valid. Those of a thread until
// cp_async_commit() are a group; cp_async_wait<n>() waits for all groups of this thread but its last n. Other threads
// see them after a barrier.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}
#endif
