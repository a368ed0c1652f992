// When ops ran on a rank's device, for the schedule loop. On the CPU a moment is a time; on a GPU, whose work runs
// behind the host, an event in its stream, which is read once the step is over.
#pragma once

#include <vector>

#if defined(USE_CUDA) && __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

#include "llmc/clock.h"
#include "llmc/device.h"
#include "llmc/pipeline/op.h"

// Names what is told to a GPU meanwhile, for its profilers (NVTX).
struct ProfilerRange {
#if defined(USE_CUDA) && __has_include(<nvtx3/nvToolsExt.h>)
    explicit ProfilerRange(const Op& op) { nvtxRangePushA(op_name(op).c_str()); }
    ~ProfilerRange() { nvtxRangePop(); }
#else
    explicit ProfilerRange(const Op&) {}
#endif
};

class OpClock {
public:
    using Moment = int64_t;

    explicit OpClock(const Device& device) : device_(device) {}
    OpClock(const OpClock&) = delete;
    OpClock& operator=(const OpClock&) = delete;

    // A step begins: earlier moments are forgotten.
    void restart() {
        used_ = 0;
        start_ = seconds_now();
        now();
    }

#ifdef USE_CUDA
    ~OpClock() {
        for (cudaEvent_t event : events_) cudaEventDestroy(event);
    }
    Moment now() {
        if (used_ == int64_t(events_.size())) CUDA_CHECK(cudaEventCreate(&events_.emplace_back()));
        CUDA_CHECK(cudaEventRecord(events_[size_t(used_)], device_.stream));
        return used_++;
    }
    // Returns when the device has passed all moments.
    void finish() { CUDA_CHECK(cudaEventSynchronize(events_[size_t(used_ - 1)])); }
    // On the scale of seconds_now(), once the device has passed the moment.
    double seconds(Moment moment) const {
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, events_[0], events_[size_t(moment)]));
        return start_ + 1e-3 * double(ms);
    }

private:
    std::vector<cudaEvent_t> events_;
#else
    Moment now() {
        if (used_ == int64_t(times_.size())) times_.emplace_back();
        times_[size_t(used_)] = seconds_now();
        return used_++;
    }
    void finish() {}
    double seconds(Moment moment) const { return times_[size_t(moment)]; }

private:
    std::vector<double> times_;
#endif
    const Device& device_;
    int64_t used_ = 0;
    double start_ = 0;
};
