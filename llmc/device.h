// The device a rank computes on, passed to every kernel. On the CPU: how many OpenMP threads, and the scratch memory
// that matrix products and attention pack their operands into. It lies in the rank's arena, planned before step 1.
#pragma once

#include <algorithm>

#include "common.h"

struct Device {
    int threads = 1;               // OpenMP threads of this rank
    std::byte* scratch = nullptr;  // 64-byte aligned, contents undefined between kernels
    size_t scratch_bytes = 0;      // at least the kernels' *_scratch_bytes for the shapes they get

    template <class T>
    T* scratch_as(size_t count, size_t byte_offset = 0) const {
        if (byte_offset + count * sizeof(T) > scratch_bytes)
            throw std::logic_error("kernel asks for " + std::to_string(byte_offset + count * sizeof(T)) +
                                   " bytes of scratch, the plan gave " + std::to_string(scratch_bytes));
        return reinterpret_cast<T*>(scratch + byte_offset);
    }
};
