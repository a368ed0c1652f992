// The stream on which a rank's messages travel beside its computing, and the marks by which the two wait for each
// other. On the CPU there is no such thing: a message is copied at once, by whoever posts its second end. The
// transports hold one of these for each rank.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "llmc/device.h"

#ifndef USE_CUDA

using Mark = std::nullptr_t;  // there is nothing to wait for

struct ExchangeStream {
    void attach(const Device&) {}
    Mark mark_compute() { return nullptr; }
    Mark new_mark() { return nullptr; }
    void copy(void* to, const void* from, int64_t bytes, Mark, Mark, const Mark&) {
        std::memcpy(to, from, size_t(bytes));
    }
    void compute_waits(const Mark&) {}
    void finish() {}
};

#else

// What a stream has been told to do up to some point (a CUDA event). It may be waited for once it is set; a null mark
// is nothing to wait for. Goes back to its pool with the last who holds it, though streams may still be waiting: that a
// wait is told to a stream fixes what it waits for.
using Mark = std::shared_ptr<const cudaEvent_t>;

// Any thread may give marks back; they are taken by the thread of the rank, whose GPU is current there.
class MarkPool : public std::enable_shared_from_this<MarkPool> {
public:
    Mark take() {
        const std::lock_guard lock(mutex_);
        auto event = std::make_unique<cudaEvent_t>();
        if (free_.empty()) {
            CUDA_CHECK(cudaEventCreateWithFlags(event.get(), cudaEventDisableTiming));
        } else {
            *event = free_.back();
            free_.pop_back();
        }
        return Mark(event.release(), [pool = shared_from_this()](const cudaEvent_t* event) {
            const std::lock_guard lock(pool->mutex_);
            pool->free_.push_back(*event);
            delete event;
        });
    }
    ~MarkPool() {
        for (const cudaEvent_t event : free_) cudaEventDestroy(event);
    }

private:
    std::mutex mutex_;
    std::vector<cudaEvent_t> free_;
};

class ExchangeStream {
public:
    ExchangeStream() = default;
    ~ExchangeStream() {
        if (stream_) cudaStreamDestroy(stream_);
    }
    ExchangeStream(const ExchangeStream&) = delete;

    // Called by the thread of the rank, whose GPU is current there.
    void attach(const Device& device) {
        compute_ = device.stream;
        if (stream_) return;
        int lowest = 0, highest = 0;  // messages go before the blocks of kernels that have not begun
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, highest));
    }
    cudaStream_t stream() const { return stream_; }

    Mark new_mark() { return marks_->take(); }
    // All that the compute stream was told before.
    Mark mark_compute() { return set(marks_->take(), compute_); }
    // All that this stream was told before.
    Mark mark() { return set(marks_->take(), stream_); }

    // Copies after both marks and sets `done` behind it. Any thread may call it.
    void copy(void* to, const void* from, int64_t bytes, const Mark& first, const Mark& second, const Mark& done,
              cudaMemcpyKind kind = cudaMemcpyDeviceToDevice) {
        waits(first);
        waits(second);
        if (bytes > 0) CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), kind, stream_));
        set(done, stream_);
    }
    void waits(const Mark& mark) {
        if (mark) CUDA_CHECK(cudaStreamWaitEvent(stream_, *mark, 0));
    }
    void compute_waits(const Mark& mark) {
        if (mark) CUDA_CHECK(cudaStreamWaitEvent(compute_, *mark, 0));
    }

    // Whether the stream has come to it.
    static bool reached(const Mark& mark) {
        const cudaError_t status = cudaEventQuery(*mark);
        if (status != cudaErrorNotReady) CUDA_CHECK(status);
        return status == cudaSuccess;
    }

    // Returns when all copies are done, for a rank that fails.
    void finish() {
        if (stream_) cudaStreamSynchronize(stream_);  // an error has been reported, or will be
    }

private:
    std::shared_ptr<MarkPool> marks_ = std::make_shared<MarkPool>();
    cudaStream_t compute_ = nullptr, stream_ = nullptr;

    static const Mark& set(const Mark& mark, cudaStream_t stream) {
        CUDA_CHECK(cudaEventRecord(*mark, stream));
        return mark;
    }
};

#endif
