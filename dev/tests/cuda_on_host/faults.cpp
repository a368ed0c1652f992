// Mistakes that running kernels on the host must find, one a name: test_kernels.py runs each and expects its end.
//
//   faults NAME   ends with an error that says what is wrong; `faults none` ends well
#include <cstdio>
#include <functional>
#include <map>

#include "llmc/cuda.h"

constexpr int THREADS = 128;
using Kernel = void (*)(float* out /*[THREADS]*/);

// Every thread reads what another has written, all instructions of a warp take part.
__global__ void no_fault(float* out) {
    uint4* rows = shared_memory<uint4>();  // [THREADS]
    float* sums = reinterpret_cast<float*>(rows + THREADS);
    cp_async_16(rows + threadIdx.x, nullptr, false);
    cp_async_commit();
    cp_async_wait<0>();
    const float sum = block_sum(1.0f, sums);
    uint32_t a[4], b[4];
    ldmatrix_x4(a, rows + threadIdx.x);
    ldmatrix_x4_transposed(b, rows + threadIdx.x);
    const uint32_t half_of_b[2] = {b[0], b[1]};
    float d[4] = {sum, sum, sum, sum};
    mma_m16n8k16(d, a, half_of_b);
    out[threadIdx.x] = d[3] - THREADS + float(rows[THREADS - 1 - threadIdx.x].x);
}

// A product of small whole numbers, which has one right answer: in fragments read by ldmatrix, left directly, right
// transposed. The rows of left, right and their product follow from the lane as the PTX manual numbers them.
__global__ void right_product(float* out) {
    uint16_t* left = shared_memory<uint16_t>();  // [16][16]
    uint16_t* right = left + 256;                // [16][8]
    const auto left_value = [](int row, int col) { return float((3 * row + 5 * col) % 7 - 3); };
    const auto right_value = [](int row, int col) { return float((2 * row + 3 * col) % 5 - 2); };
    for (int i = int(threadIdx.x); i < 256; i += THREADS) left[i] = bf16(left_value(i / 16, i % 16)).bits;
    for (int i = int(threadIdx.x); i < 128; i += THREADS) right[i] = bf16(right_value(i / 8, i % 8)).bits;
    __syncthreads();
    const int lane = int(threadIdx.x) % WARP;
    uint32_t a[4], b[4];
    ldmatrix_x4(a, left + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4_transposed(b, right + lane % 16 * 8);
    const uint32_t first[2] = {b[0], b[1]};
    float d[4] = {1, 2, 3, 4};
    mma_m16n8k16(d, a, first);
    bool right_answer = true;
    for (int i = 0; i < 4; i++) {
        float sum = float(i + 1);
        for (int k = 0; k < 16; k++) sum += left_value(lane / 4 + i / 2 * 8, k) * right_value(k, lane % 4 * 2 + i % 2);
        right_answer &= d[i] == sum;
    }
    out[threadIdx.x] = right_answer ? 0 : NAN;
}

__global__ void threads_that_end_before_a_barrier(float* out) {
    if (threadIdx.x < 64) __syncthreads();
    out[threadIdx.x] = 0;
}
__global__ void threads_at_different_barriers(float* out) {
    if (threadIdx.x < 64) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 0;
}
__global__ void lanes_that_miss_a_shuffle(float* out) {
    out[threadIdx.x] = 0;
    if (threadIdx.x % WARP < 5) out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 0.0f, 1);
}
__global__ void lanes_at_different_instructions(float* out) {
    if (threadIdx.x % WARP < 5) __syncwarp();
    else out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 0.0f, 1);
}
__global__ void mask_of_some_lanes(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 0.0f, 1); }
__global__ void write_beyond_shared_memory(float* out) { shared_memory<float>()[threadIdx.x] = out[threadIdx.x] = 0; }
__global__ void write_beyond_device_memory(float* out) { out[threadIdx.x + 1] = 0; }
__global__ void access_that_is_not_aligned(float* out) {
    const int i = int(threadIdx.x) / 8 * 4;
    reinterpret_cast<float4*>(out + 1)[i / 4] = make_float4(0, 0, 0, 0);
}
__global__ void shared_memory_never_written(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }
__global__ void output_never_written(float* out) {
    if (threadIdx.x != 77) out[threadIdx.x] = 0;
}
__global__ void barrier_left_out(float* out) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = 0;
    out[threadIdx.x] = shared[threadIdx.x ^ 64];  // of another warp, before it or after
}
__global__ void warp_barrier_left_out(float* out) {
    float* shared = shared_memory<float>();
    shared[threadIdx.x] = 0;
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void copy_not_waited_for(float* out) {
    uint4* shared = shared_memory<uint4>();
    cp_async_16(shared + threadIdx.x, nullptr, false);
    cp_async_commit();
    cp_async_16(shared + threadIdx.x + THREADS, nullptr, false);
    cp_async_commit();
    cp_async_wait<1>();
    out[threadIdx.x] = __uint_as_float(shared[threadIdx.x].x) + __uint_as_float(shared[threadIdx.x + THREADS].x);
}

int main(int, char** argv) {
    const std::map<std::string, std::pair<Kernel, size_t>> kernels = {
        // name: kernel, bytes of shared memory
        {"none", {no_fault, THREADS * 16 + THREADS / WARP * 4}},
        {"right_product", {right_product, 384 * 2}},
        {"threads_that_end_before_a_barrier", {threads_that_end_before_a_barrier, 0}},
        {"threads_at_different_barriers", {threads_at_different_barriers, 0}},
        {"lanes_that_miss_a_shuffle", {lanes_that_miss_a_shuffle, 0}},
        {"lanes_at_different_instructions", {lanes_at_different_instructions, 0}},
        {"mask_of_some_lanes", {mask_of_some_lanes, 0}},
        {"write_beyond_shared_memory", {write_beyond_shared_memory, THREADS * 4 - 1}},
        {"write_beyond_device_memory", {write_beyond_device_memory, 0}},
        {"access_that_is_not_aligned", {access_that_is_not_aligned, 0}},
        {"shared_memory_never_written", {shared_memory_never_written, THREADS * 4}},
        {"output_never_written", {output_never_written, 0}},
        {"barrier_left_out", {barrier_left_out, THREADS * 4}},
        {"warp_barrier_left_out", {warp_barrier_left_out, THREADS * 4}},
        {"copy_not_waited_for", {copy_not_waited_for, THREADS * 32}},
    };
    const std::string name = argv[1];
    float* out = nullptr;
    CUDA_CHECK(cudaMalloc(&out, THREADS * sizeof(float)));
    if (name == "host_reads_device_memory") std::printf("%g\n", out[1]);
    else if (name == "host_writes_device_memory") out[1] = 0;
    else if (name == "half_a_warp") launch(no_fault, dim3(1), 48, 0, nullptr, out);
    else launch(kernels.at(name).first, dim3(2), THREADS, kernels.at(name).second, nullptr, out);

    float host[THREADS];
    CUDA_CHECK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(out));
    for (const float value : host)
        if (value != 0) return std::fprintf(stderr, "an output is %g\n", value), 1;
    return 0;
}
