// CUDA on the host (dev/tests/cuda_on_host) with streams that run later, for tests of what waits for what: each stream
// is a thread that does what it was told in order, at its own pace. Whatever order the program does not ask for by
// events is left to chance, and the thread sanitizer sees what is missing. Comes before cuda_on_host on the include
// path.
#pragma once

// The streams and events of cuda_on_host under other names.
#define HostStream HostStreamAtOnce
#define HostEvent HostEventAtOnce
#define cudaStream_t cudaStreamAtOnce_t
#define cudaEvent_t cudaEventAtOnce_t
#define cudaMemcpyAsync cudaMemcpyAtOnce
#define cudaStreamCreateWithFlags cudaStreamCreateWithFlagsAtOnce
#define cudaStreamCreateWithPriority cudaStreamCreateWithPriorityAtOnce
#define cudaStreamDestroy cudaStreamDestroyAtOnce
#define cudaStreamSynchronize cudaStreamSynchronizeAtOnce
#define cudaStreamWaitEvent cudaStreamWaitEventAtOnce
#define cudaLaunchHostFunc cudaLaunchHostFuncAtOnce
#define cudaEventCreate cudaEventCreateAtOnce
#define cudaEventCreateWithFlags cudaEventCreateWithFlagsAtOnce
#define cudaEventDestroy cudaEventDestroyAtOnce
#define cudaEventRecord cudaEventRecordAtOnce
#define cudaEventQuery cudaEventQueryAtOnce
#define cudaEventSynchronize cudaEventSynchronizeAtOnce
#define cudaEventElapsedTime cudaEventElapsedTimeAtOnce
#include_next <cuda_runtime.h>
#undef HostStream
#undef HostEvent
#undef cudaStream_t
#undef cudaEvent_t
#undef cudaMemcpyAsync
#undef cudaStreamCreateWithFlags
#undef cudaStreamCreateWithPriority
#undef cudaStreamDestroy
#undef cudaStreamSynchronize
#undef cudaStreamWaitEvent
#undef cudaLaunchHostFunc
#undef cudaEventCreate
#undef cudaEventCreateWithFlags
#undef cudaEventDestroy
#undef cudaEventRecord
#undef cudaEventQuery
#undef cudaEventSynchronize
#undef cudaEventElapsedTime

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

// What a stream does to device memory. The thread sanitizer would take the mutex of on_device_memory for an order
// between streams, which hides that there is none.
template <class Body>
void on_device_memory_of_stream(const Body& body) {
#ifdef __SANITIZE_THREAD__
    body();
#else
    on_device_memory(body);
#endif
}

class HostStream {
public:
    HostStream() : thread_([this] { run(); }) {}
    ~HostStream() {
        tell([this] { ended_ = true; });
        thread_.join();
    }

    void tell(std::function<void()> task) {
        const std::lock_guard lock(mutex_);
        tasks_.push_back(std::move(task));
        changed_.notify_all();
    }
    void finish() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return tasks_.empty(); });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::function<void()>> tasks_;  // the first one is running
    bool ended_ = false;                       // the thread's own
    std::thread thread_;                       // the last member: it uses the others

    void run() {
        static std::atomic<unsigned> streams = 0;
        std::minstd_rand random(++streams);
        while (!ended_) {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [&] { return !tasks_.empty(); });
            const std::function<void()>& task = tasks_.front();
            lock.unlock();
            if (random() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
            task();
            lock.lock();
            tasks_.pop_front();
            changed_.notify_all();
        }
    }
};

struct HostEvent {
    struct Record {
        std::mutex mutex;
        std::condition_variable changed;
        bool reached = false;
        std::chrono::steady_clock::time_point time;  // when it was

        void wait() {
            std::unique_lock lock(mutex);
            changed.wait(lock, [&] { return reached; });
        }
    };
    std::shared_ptr<Record> last;
};
using cudaStream_t = HostStream*;
using cudaEvent_t = HostEvent*;

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return *stream = new HostStream, cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return stream->finish(), cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*call)(void*), void* argument) {
    return stream->tell([call, argument] { call(argument); }), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    const auto on_device = [](const void* memory) { return cuda_on_host::device_memory().owns(memory); };
    if (on_device(to) != (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) ||
        on_device(from) != (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice))
        return cudaErrorInvalidValue;
    stream->tell([=] { on_device_memory_of_stream([&] { std::memcpy(to, from, bytes); }); });
    return cudaSuccess;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = new HostEvent, cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event->last = std::make_shared<HostEvent::Record>();
    stream->tell([record = event->last] {
        const std::lock_guard lock(record->mutex);
        record->reached = true;
        record->time = std::chrono::steady_clock::now();
        record->changed.notify_all();
    });
    return cudaSuccess;
}
// CUDA takes an event that was never recorded for one that is reached; no caller here means that.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!event->last) return cudaErrorInvalidValue;
    stream->tell([record = event->last] { record->wait(); });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (!event->last) return cudaErrorInvalidValue;
    return event->last->wait(), cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!event->last) return cudaErrorInvalidValue;
    const std::lock_guard lock(event->last->mutex);
    return event->last->reached ? cudaSuccess : cudaErrorNotReady;
}

inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    if (cudaEventQuery(begin) != cudaSuccess || cudaEventQuery(end) != cudaSuccess) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(end->last->time - begin->last->time).count();
    return cudaSuccess;
}

// A kernel: runs when its stream comes to it.
template <class Body>
void run_on_host(dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, const Body& body) {
    stream->tell([=] {
        on_device_memory_of_stream(
            [&] { cuda_on_host::Runner::of_this_thread().run(blocks, threads, shared_bytes, body); });
    });
}
