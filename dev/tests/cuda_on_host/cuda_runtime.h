// Stands in for CUDA's header of this name where g++ compiles CUDA code to run on the host, without a GPU and under
// sanitizers (g++ -DUSE_CUDA -Idev/tests/cuda_on_host -Wno-unknown-pragmas -lboost_context). The files beside it run
// the kernels; here are the qualifiers and the part of the runtime that the program calls. There is one device. Streams
// run at once: whatever is put on one has ended when the call returns.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventDisableTiming = 2;

struct cudaUUID_t {
    char bytes[16];
};
struct cudaDeviceProp {
    char name[256];
    cudaUUID_t uuid;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor, multiProcessorCount, major, minor, l2CacheSize;
};
struct HostStream {};
struct HostEvent {
    std::chrono::steady_clock::time_point recorded;
};
using cudaStream_t = HostStream*;
using cudaEvent_t = HostEvent*;

#include "block.h"
#include "instructions.h"

// ---------------------------------------------------------------------------------------------------------------------
// Errors are returned by the call that makes them.

inline const char* cudaGetErrorName(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorInvalidValue:
            return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver:
            return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice:
            return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice:
            return "cudaErrorInvalidDevice";
        case cudaErrorNotReady:
            return "cudaErrorNotReady";
    }
    return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorNotReady:
            return "device not ready";
    }
    return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// The device.

inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (device != 0) return cudaErrorInvalidDevice;
    *properties = {"CUDA on the host",
                   {"only one"},
                   cuda_on_host::DeviceMemory::capacity,
                   48 << 10,
                   cuda_on_host::max_shared_bytes,
                   228 << 10,
                   warpSize,
                   cuda_on_host::max_threads,
                   2048,
                   2,
                   9,
                   0,
                   50 << 20};
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (const cudaError_t status = cudaGetDeviceProperties(&p, device)) return status;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            return *value = p.multiProcessorCount, cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            return *value = p.major, cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            return *value = p.minor, cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            return *value = int(p.sharedMemPerBlockOptin), cudaSuccess;
    }
    return cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// Memory.

template <class T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
    *memory = bytes ? static_cast<T*>(cuda_on_host::device_memory().allocate(bytes)) : nullptr;
    return *memory || bytes == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) {
    return !memory || cuda_on_host::device_memory().free(memory) ? cudaSuccess : cudaErrorInvalidValue;
}
template <class T>
cudaError_t cudaMallocHost(T** memory, size_t bytes) {
    void* aligned = nullptr;
    if (posix_memalign(&aligned, 256, bytes)) return cudaErrorMemoryAllocation;
    *memory = static_cast<T*>(aligned);
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    cuda_on_host::DeviceMemory& memory = cuda_on_host::device_memory();
    const std::lock_guard lock(memory.mutex);
    *total = memory.capacity;
    *free = memory.capacity - memory.allocated;
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return cudaSuccess;
    const bool to_device = cuda_on_host::device_memory().owns(to),
               from_device = cuda_on_host::device_memory().owns(from);
    if (kind != cudaMemcpyDefault &&
        (to_device != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) ||
         from_device != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice)))
        return cudaErrorInvalidValue;
    on_device_memory([&] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
    if (bytes == 0) return cudaSuccess;
    if (!cuda_on_host::device_memory().owns(to)) return cudaErrorInvalidValue;
    on_device_memory([&] { std::memset(to, value, bytes); });
    return cudaSuccess;
}
// Rows of `width` bytes that lie `pitch` bytes apart.
inline cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t rows, cudaStream_t = {}) {
    if (width > pitch) return cudaErrorInvalidValue;
    for (size_t row = 0; row < rows; row++)
        if (const cudaError_t status = cudaMemset(static_cast<std::byte*>(to) + row * pitch, value, width))
            return status;
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t = {}) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = {}) {
    return cudaMemset(to, value, bytes);
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t rows, cudaMemcpyKind kind, cudaStream_t = {}) {
    for (size_t row = 0; row < rows; row++)
        if (const cudaError_t status = cudaMemcpy(static_cast<std::byte*>(to) + row * to_pitch,
                                                  static_cast<const std::byte*>(from) + row * from_pitch, width, kind))
            return status;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams and events.

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = new HostStream, cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    return *lowest = 0, *highest = -5, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0) { return cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*call)(void*), void* argument) {
    return call(argument), cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = new HostEvent, cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = {}) {
    return event->recorded = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = std::chrono::duration<float, std::milli>(end->recorded - begin->recorded).count();
    return cudaSuccess;
}
