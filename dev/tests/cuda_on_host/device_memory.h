// Memory of the device, where kernels run on the host. An allocation is exactly as large as asked and starts as NaN, so
// that the address sanitizer sees what lies beyond it, and results see what was never written. While nothing runs on
// the device it is poisoned: a host that reads or writes it without a copy is caught. cuda_runtime.h calls this.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace cuda_on_host {

struct DeviceMemory {
    static constexpr size_t capacity = size_t(16) << 30;  // bytes

    std::mutex mutex;
    std::map<uintptr_t, size_t> sizes;  // bytes of each allocation by its address
    size_t allocated = 0;
    int users = 0;  // kernels and copies that run now, of all host threads

    void* allocate(size_t bytes) {
        const std::lock_guard lock(mutex);
        void* memory = nullptr;
        if (bytes > capacity - allocated || posix_memalign(&memory, 256, bytes)) return nullptr;
        std::memset(memory, 0xff, bytes);
        if (users == 0) ASAN_POISON_MEMORY_REGION(memory, bytes);
        sizes[uintptr_t(memory)] = bytes;
        allocated += bytes;
        return memory;
    }

    bool free(void* memory) {
        const std::lock_guard lock(mutex);
        const auto found = sizes.find(uintptr_t(memory));
        if (found == sizes.end()) return false;
        ASAN_UNPOISON_MEMORY_REGION(memory, found->second);
        std::free(memory);
        allocated -= found->second;
        sizes.erase(found);
        return true;
    }

    bool owns(const void* address) {
        const std::lock_guard lock(mutex);
        const auto after = sizes.upper_bound(uintptr_t(address));
        if (after == sizes.begin()) return false;
        const auto [begin, bytes] = *std::prev(after);
        return uintptr_t(address) < begin + bytes;
    }
};

inline DeviceMemory& device_memory() {
    static DeviceMemory memory;
    return memory;
}

}  // namespace cuda_on_host

// Kernels, copies and libraries run inside of this: body() may touch device memory.
template <class Body>
void on_device_memory(const Body& body) {
    cuda_on_host::DeviceMemory& memory = cuda_on_host::device_memory();
    {
        const std::lock_guard lock(memory.mutex);
        if (memory.users++ == 0)
            for (const auto& [address, bytes] : memory.sizes)
                ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(address), bytes);
    }
    body();
    const std::lock_guard lock(memory.mutex);
    if (--memory.users == 0)
        for (const auto& [address, bytes] : memory.sizes)
            ASAN_POISON_MEMORY_REGION(reinterpret_cast<void*>(address), bytes);
}
