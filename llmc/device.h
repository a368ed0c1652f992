// The device a rank computes on, passed to every kernel: what its kernels need besides their tensors, and its memory.
// A build is for one device: the CPU, or with USE_CUDA a GPU. Scratch memory for the kernels lies in the rank's memory,
// planned before step 1.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "llmc/common.h"
#ifdef USE_CUDA
#include <cublasLt.h>

#include <array>
#include <map>
#include <memory>
#include <optional>

#include "llmc/cuda.h"
#else
#include <sys/mman.h>

#include <cerrno>

#include "llmc/cpu.h"
#include "llmc/machine.h"
#endif

#ifdef USE_CUDA
class CudnnAttention;

// The algorithms that cuBLASLt has chosen, by what the choice depends on (matmul.cuh), tokens by their class; nothing
// where it has none.
using MatmulKey = std::array<int64_t, 11>;
using MatmulAlgorithms = std::map<MatmulKey, std::optional<cublasLtMatmulAlgo_t>>;
#endif

// Hands out 64-byte aligned views from a block of memory. Without a block it only counts.
struct Allocator {
    std::byte* base = nullptr;
    int64_t used = 0;  // bytes

    template <class T>
    T* take(int64_t count) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), 64);
        return p;
    }
    template <class T>
    Matrix<T> take(int64_t rows, int64_t cols) {
        return {take<T>(rows * cols), rows, cols};
    }
};

struct Device {
    int threads = 1;               // OpenMP threads of this rank, on the host
    std::byte* scratch = nullptr;  // 64-byte aligned (CUDA: 256), contents undefined between kernels
    size_t scratch_bytes = 0;      // at least the kernels' *_scratch_bytes for the shapes they get
#ifdef USE_CUDA
    cudaStream_t stream = nullptr;  // that all kernels run on
    int multiprocessors = 1;
    cublasLtHandle_t blas = nullptr;
    MatmulAlgorithms* algorithms = nullptr;
    bool tune_products = false;  // new products choose the fastest of several algorithms; whoever sets it throws away
                                 // what products have accumulated meanwhile
    CudnnAttention* cudnn = nullptr;  // null: our own attention
#endif

    template <class T>
    T* scratch_as(size_t count, size_t byte_offset = 0) const {
        if (byte_offset + count * sizeof(T) > scratch_bytes)
            throw std::logic_error("kernel asks for " + std::to_string(byte_offset + count * sizeof(T)) +
                                   " bytes of scratch, the plan gave " + std::to_string(scratch_bytes));
        return reinterpret_cast<T*>(scratch + byte_offset);
    }
};

// What computes.
inline std::string device_text(const std::string& threads) {
#ifdef USE_CUDA
    (void)threads;
    int gpu = 0;
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDevice(&gpu));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, gpu));
    return "GPU " + std::to_string(gpu) + ", " + properties.name;
#else
    return "CPU, " + threads + ", " + isa_name(cpu_isa());
#endif
}

// On how many devices so many ranks of a machine run: they take its GPUs in turns.
inline int devices_of(int local_ranks) {
#ifdef USE_CUDA
    int gpus = 0;
    CUDA_CHECK(cudaGetDeviceCount(&gpus));
    return std::clamp(gpus, 1, std::max(local_ranks, 1));
#else
    (void)local_ranks;
    return 1;
#endif
}

// Makes the device of a rank that of this thread.
inline void choose_device(int local_rank) {
#ifdef USE_CUDA
    int gpus = 0;
    CUDA_CHECK(cudaGetDeviceCount(&gpus));
    CUDA_CHECK(cudaSetDevice(local_rank % std::max(gpus, 1)));
#else
    (void)local_rank;
#endif
}

// Bytes that ranks may still take on the device of this thread, less than what is free; on the CPU, of the machine.
inline int64_t available_on_device() {
#ifdef USE_CUDA
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    const int64_t code = int64_t(1) << 30;  // that the libraries load later, when a kernel is first used
    return std::max<int64_t>(0, int64_t(free) - code);
#else
    return available_memory();
#endif
}

// Bytes in use: of this process, or by all on a GPU.
inline int64_t used_on_device() {
#ifdef USE_CUDA
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return int64_t(total - free);
#else
    return resident_bytes();
#endif
}

// Opens the device for a rank, of this thread, and closes it with the rank. Ranks of a host take its GPUs in turns, and
// share them where they are more.
class OpenDevice {
public:
    Device device;

    explicit OpenDevice(int threads, int local_rank = 0) {
        device.threads = threads;
        choose_device(local_rank);
#ifdef USE_CUDA
        int gpu = 0;
        CUDA_CHECK(cudaGetDevice(&gpu));
        CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, gpu));
        CUDA_CHECK(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
        if (cublasLtCreate(&device.blas) != CUBLAS_STATUS_SUCCESS)
            throw Failure(EXIT_HARDWARE, "cuBLASLt cannot be opened on GPU " + std::to_string(gpu));
        device.algorithms = &algorithms_;
#endif
    }
    OpenDevice(const OpenDevice&) = delete;
    OpenDevice& operator=(const OpenDevice&) = delete;
#ifdef USE_CUDA
    ~OpenDevice() {
        if (device.blas) cublasLtDestroy(device.blas);
        if (device.stream) cudaStreamDestroy(device.stream);
    }

private:
    MatmulAlgorithms algorithms_;
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Memory of the device. Where there is none of the size, Failure(EXIT_MEMORY).

inline std::byte* allocate_on_device(int64_t bytes) {
    if (bytes == 0) return nullptr;
#ifdef USE_CUDA
    void* memory = nullptr;
    CUDA_CHECK(cudaMalloc(&memory, size_t(bytes)));
#else
    void* memory =
        mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        throw Failure(EXIT_MEMORY, "cannot map " + std::to_string(bytes >> 20) + " MiB: " + std::strerror(errno) +
                                       "; choose a smaller model, --chunk-tokens or --head-chunk");
    madvise(memory, size_t(bytes), MADV_HUGEPAGE);  // fewer TLB misses while operands are packed
#endif
    return static_cast<std::byte*>(memory);
}

inline void free_on_device(std::byte* memory, int64_t bytes) {
    if (!memory) return;
#ifdef USE_CUDA
    (void)bytes;
    cudaFree(memory);  // in destructors: an error here was reported before
#else
    munmap(memory, size_t(bytes));
#endif
}

// So many elements on the device, uninitialised.
template <class T>
class DeviceMemory {
public:
    DeviceMemory() = default;
    explicit DeviceMemory(int64_t count) : data_(allocate_on_device(count * int64_t(sizeof(T)))), count_(count) {}
    DeviceMemory(DeviceMemory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
    DeviceMemory& operator=(DeviceMemory&& other) noexcept {
        std::swap(data_, other.data_), std::swap(count_, other.count_);
        return *this;
    }
    ~DeviceMemory() { free_on_device(data_, count_ * int64_t(sizeof(T))); }

    T* data() const { return reinterpret_cast<T*>(data_); }
    int64_t size() const { return count_; }

private:
    std::byte* data_ = nullptr;
    int64_t count_ = 0;
};

// So many bytes of the host that a GPU reads and writes by itself, while the host goes on.
#ifdef USE_CUDA
class PinnedMemory {
public:
    PinnedMemory() = default;
    explicit PinnedMemory(int64_t bytes) : bytes_(bytes) { CUDA_CHECK(cudaMallocHost(&data_, size_t(bytes))); }
    PinnedMemory(PinnedMemory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    PinnedMemory& operator=(PinnedMemory&& other) noexcept {
        std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~PinnedMemory() { cudaFreeHost(data_); }

    std::byte* data() const { return data_; }
    int64_t size() const { return bytes_; }

private:
    std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
};
#endif

// Between the host and the device, after everything that the device was told to do before. Return when it is done.
enum class Way { to_device, to_host };
inline void copy_and_wait(const Device& device, void* to, const void* from, int64_t bytes, Way way) {
#ifdef USE_CUDA
    const cudaMemcpyKind kind = way == Way::to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), kind, device.stream));
    CUDA_CHECK(cudaStreamSynchronize(device.stream));
#else
    (void)device, (void)way;
    std::memcpy(to, from, size_t(bytes));
#endif
}
template <class T>
void upload(const Device& device, T* to /*[n] device*/, const T* from /*[n] host*/, int64_t n) {
    copy_and_wait(device, to, from, n * int64_t(sizeof(T)), Way::to_device);
}
template <class T>
void download(const Device& device, T* to /*[n] host*/, const T* from /*[n] device*/, int64_t n) {
    copy_and_wait(device, to, from, n * int64_t(sizeof(T)), Way::to_host);
}

// Returns when the device has done all that it was told.
inline void finish(const Device& device) {
#ifdef USE_CUDA
    CUDA_CHECK(cudaStreamSynchronize(device.stream));
#else
    (void)device;
#endif
}

// A device array as the host reads and writes it: on the CPU the array itself, on a GPU a copy, filled from it if
// wanted, else with zeros, which store() writes back.
template <class T>
class HostView {
public:
    HostView(const Device& device, T* data, int64_t count, bool read) : device_(device), data_(data), count_(count) {
#ifdef USE_CUDA
        copy_.resize(size_t(count));
        if (read) download(device, copy_.data(), data, count);
#else
        (void)read;
#endif
    }
#ifdef USE_CUDA
    T* data() { return copy_.data(); }
    void store() { upload(device_, data_, copy_.data(), count_); }
#else
    T* data() { return data_; }
    void store() {}
#endif
    int64_t size() const { return count_; }

private:
    const Device& device_;
    T* data_;
    int64_t count_;
#ifdef USE_CUDA
    std::vector<T> copy_;
#endif
};
