// Runs the blocks of a kernel on the host, one after the other, each thread of a block as a fiber. A fiber runs until
// it waits for others: at a barrier of its block, or at an instruction that the lanes of a warp execute together. The
// next is the first in order that can run, so that each warp gets as far ahead of the others as barriers let it: that
// is where a missing barrier shows. CUDA_ON_HOST_ORDER names the order: ascending, descending, or random:SEED, which
// draws one for each block and after each of its barriers. launch() in llmc/cuda.h calls this.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <boost/context/detail/fcontext.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "vector_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __sanitizer_print_stack_trace() {}
#endif

inline constinit thread_local uint3 threadIdx{}, blockIdx{};
inline constinit thread_local dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

namespace cuda_on_host {

constexpr int max_threads = 1024;
constexpr size_t max_shared_bytes = 227 * 1024;

// Ends the program. Printed with the stack of the caller, which names the kernel.
[[noreturn]] inline void stop(const std::string& message) {
    std::fflush(stdout);
    std::fprintf(stderr, "cuda_on_host: %s\n", message.c_str());
    __sanitizer_print_stack_trace();
    std::abort();
}

class Order {
public:
    Order() {
        const char* variable = std::getenv("CUDA_ON_HOST_ORDER");
        const std::string name = variable ? variable : "ascending", random = "random:";
        const bool seeded = name.starts_with(random) && name.size() > random.size() &&
                            name.find_first_not_of("0123456789", random.size()) == std::string::npos;
        if (seeded) kind_ = Kind::random, generator_.seed(std::stoull(name.substr(random.size())));
        else if (name == "descending") kind_ = Kind::descending;
        else if (name != "ascending")
            stop("CUDA_ON_HOST_ORDER is " + name + "; it must be ascending, descending or random:SEED");
    }
    // The numbers 0 .. n-1 in this order.
    template <class Int>
    std::vector<Int> of(Int n) {
        std::vector<Int> order(n);
        std::iota(order.begin(), order.end(), Int(0));
        if (kind_ == Kind::descending) std::reverse(order.begin(), order.end());
        if (kind_ == Kind::random) std::shuffle(order.begin(), order.end(), generator_);
        return order;
    }

private:
    enum class Kind { ascending, descending, random } kind_ = Kind::ascending;
    std::mt19937_64 generator_;
};

// An instruction that threads execute together, in the words of its callers.
struct Place {
    const char* instruction = nullptr;
    std::source_location where;

    bool operator==(const Place& other) const {
        return where.line() == other.where.line() && where.column() == other.where.column() &&
               std::strcmp(where.file_name(), other.where.file_name()) == 0 &&
               std::strcmp(instruction, other.instruction) == 0;
    }
    std::string text() const {
        return std::string(instruction) + " at " + where.file_name() + ":" + std::to_string(where.line()) + " in " +
               where.function_name();
    }
};

struct AsyncCopy {
    void* to;
    unsigned char bytes[16];
};

struct Fiber {
    static constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096;

    boost::context::detail::fcontext_t context = nullptr;
    std::byte* stack = nullptr;  // its lowest address, above the guard
    void* fake_stack = nullptr;  // of the address sanitizer
    int position = 0;            // in the order of the block
    bool ended = false;
    Place place;                                 // where it waits
    std::vector<std::vector<AsyncCopy>> copies;  // cp.async that nobody waited for yet, in groups; the last is open

    Fiber() {
        void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE))
            stop("no memory for the stack of a fiber");
        stack = static_cast<std::byte*>(memory) + guard_bytes;
    }
    ~Fiber() {
        ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);
        munmap(stack - guard_bytes, guard_bytes + stack_bytes);
    }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
};

struct Warp {
    int arrived = 0;  // lanes at `place`
    Place place;
    const void* in[warpSize];
    void* out[warpSize];
};

// What runs the blocks of one host thread.
class Runner {
public:
    static Runner& of_this_thread() {
        static thread_local Runner runner;
        return runner;
    }

    template <class Body>
    void run(dim3 blocks, int threads, size_t shared_bytes, const Body& body) {
        if (threads <= 0 || threads > max_threads || threads % warpSize != 0)
            stop("a launch with " + std::to_string(threads) + " threads a block; give 32 to 1024, in whole warps");
        if (shared_bytes > max_shared_bytes)
            stop("a launch with " + std::to_string(shared_bytes) + " bytes of shared memory, there are " +
                 std::to_string(max_shared_bytes));
        if (blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535) stop("a launch with too many blocks");
        threads_ = threads;
        while (fibers_.size() < size_t(threads)) fibers_.emplace_back(std::make_unique<Fiber>());
        body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
        body_argument_ = &body;
        gridDim = blocks;
        blockDim = dim3(unsigned(threads));
        void* shared = nullptr;
        if (posix_memalign(&shared, 128, shared_bytes)) stop("no memory for the shared memory of a block");
        shared_ = shared;
        for (const int64_t b : order_.of(int64_t(blocks.x) * blocks.y * blocks.z)) {
            blockIdx = {unsigned(b % blocks.x), unsigned(b / blocks.x % blocks.y),
                        unsigned(b / (int64_t(blocks.x) * blocks.y))};
            std::memset(shared_, 0xff, shared_bytes);  // NaN
            run_block();
        }
        std::free(std::exchange(shared_, nullptr));
    }

    void* shared() const { return shared_; }
    Fiber& fiber() { return *fibers_[threadIdx.x]; }

    // Returns when all threads of the block have called it.
    void barrier(const Place& place) {
        if (at_barrier_ == 0) barrier_ = place;
        else if (!(barrier_ == place))
            stop("divergent barrier: " + thread_name() + " is at " + place.text() + ", others of its block wait at " +
                 barrier_.text());
        if (++at_barrier_ == threads_) {
            at_barrier_ = 0;
            draw_order();
        }
        wait(place);
    }

    // When all 32 lanes of the warp have called it, calls exchange(const In* const (&)[32], Out* const (&)[32]) once.
    template <class Out, class In, class Exchange>
    Out warp_together(const Place& place, const In& in, const Exchange& exchange) {
        Warp& warp = warps_[threadIdx.x / warpSize];
        if (warp.arrived == 0) warp.place = place;
        else if (!(warp.place == place))
            stop("divergent warp: " + thread_name() + " is at " + place.text() + ", other lanes of its warp wait at " +
                 warp.place.text());
        Out out;
        const int lane = int(threadIdx.x % warpSize);
        warp.in[lane] = &in, warp.out[lane] = &out;
        if (++warp.arrived == warpSize) {
            const In* ins[warpSize];
            Out* outs[warpSize];
            for (int i = 0; i < warpSize; i++)
                ins[i] = static_cast<const In*>(warp.in[i]), outs[i] = static_cast<Out*>(warp.out[i]);
            exchange(ins, outs);
            warp.arrived = 0;
            for (int i = 0; i < warpSize; i++) set_ready(*fibers_[threadIdx.x / warpSize * warpSize + i]);
        }
        wait(place);
        return out;
    }

private:
    static std::string thread_name() {
        const auto text = [](auto i) {
            return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
        };
        return "thread " + std::to_string(threadIdx.x) + " of " + std::to_string(blockDim.x) + " in block " +
               text(blockIdx) + " of " + text(gridDim);
    }

    // Warps in order, and the lanes of each: they all can run.
    void draw_order() {
        const std::vector<int> warps = order_.of(threads_ / warpSize);
        int position = 0;
        for (const int warp : warps)
            for (const int lane : order_.of(warpSize)) {
                const int thread = warp * warpSize + lane;
                thread_at_[position] = thread;
                fibers_[thread]->position = position++;
                set_ready(*fibers_[thread]);
            }
    }
    void set_ready(const Fiber& fiber) { ready_[fiber.position / 64] |= uint64_t(1) << fiber.position % 64; }

    void run_block() {
        at_barrier_ = 0;
        draw_order();
        for (int i = 0; i < threads_; i++) {
            Fiber& fiber = *fibers_[i];
            fiber.ended = false;
            fiber.copies.assign(1, {});
            fiber.context = boost::context::detail::make_fcontext(fiber.stack + Fiber::stack_bytes, Fiber::stack_bytes,
                                                                  &Runner::begin);
        }
        for (int word = 0; word < max_threads / 64; word++)
            if (const uint64_t bits = ready_[word]) {
                const int position = word * 64 + std::countr_zero(bits);
                ready_[word] &= ~(uint64_t(1) << position % 64);
                resume(thread_at_[position]);
                word = -1;  // from the start: others may have become ready
            }
        if (!std::all_of(fibers_.begin(), fibers_.begin() + threads_, [](const auto& f) { return f->ended; }))
            stop_stuck_block();
    }

    void resume(int thread) {
        Fiber& fiber = *fibers_[thread];
        threadIdx = {unsigned(thread), 0, 0};
        void* fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, Fiber::stack_bytes);
        fiber.context = boost::context::detail::jump_fcontext(fiber.context, this).fctx;
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }

    void wait(const Place& place) {
        Fiber& self = fiber();
        self.place = place;
        __sanitizer_start_switch_fiber(&self.fake_stack, host_stack_, host_stack_bytes_);
        host_ = boost::context::detail::jump_fcontext(host_, nullptr).fctx;
        __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
        if (!stuck_.empty()) stop(stuck_);
    }

    // A fiber begins here. It never returns, so nothing may be left on its stack.
    __attribute__((no_sanitize("address", "undefined"))) static void begin(
        boost::context::detail::transfer_t from) noexcept {
        Runner* const runner = static_cast<Runner*>(from.data);
        __sanitizer_finish_switch_fiber(nullptr, &runner->host_stack_, &runner->host_stack_bytes_);
        runner->host_ = from.fctx;
        runner->body_(runner->body_argument_);
        runner->fiber().ended = true;
        __sanitizer_start_switch_fiber(nullptr, runner->host_stack_, runner->host_stack_bytes_);
        boost::context::detail::jump_fcontext(runner->host_, nullptr);
    }

    // No thread can run: some wait for others that have ended or wait elsewhere. Told from where one of them waits.
    void stop_stuck_block() {
        std::map<std::string, std::vector<int>> threads;  // by what they do
        for (int i = 0; i < threads_; i++)
            threads[fibers_[i]->ended ? "ended" : "wait at " + fibers_[i]->place.text()].push_back(i);
        int shown = 0;
        for (int i = 0; i < threads_; i++)
            if (!fibers_[i]->ended) shown = i;
        threadIdx = {unsigned(shown), 0, 0};
        stuck_ = "divergent barrier: " + thread_name() + " waits for threads that do not come;";
        for (const auto& [what, which] : threads)
            stuck_ +=
                " " + std::to_string(which.size()) + " " + what + " (the first is " + std::to_string(which[0]) + "),";
        stuck_.back() = '.';
        resume(shown);
    }

    Order order_;
    int threads_ = 0;
    std::vector<std::unique_ptr<Fiber>> fibers_;  // by thread
    Warp warps_[max_threads / warpSize];
    int thread_at_[max_threads];             // by position in the order
    uint64_t ready_[max_threads / 64] = {};  // a bit for each position
    int at_barrier_ = 0;                     // threads at `barrier_`
    Place barrier_;
    std::string stuck_;
    void* shared_ = nullptr;
    void (*body_)(const void*) = nullptr;
    const void* body_argument_ = nullptr;
    boost::context::detail::fcontext_t host_ = nullptr;
    const void* host_stack_ = nullptr;
    size_t host_stack_bytes_ = 0;
};

}  // namespace cuda_on_host

template <class Body>
void run_on_host(dim3 blocks, int threads, size_t shared_bytes, cudaStream_t, const Body& body) {
    on_device_memory([&] { cuda_on_host::Runner::of_this_thread().run(blocks, threads, shared_bytes, body); });
}
inline void* host_shared_memory() { return cuda_on_host::Runner::of_this_thread().shared(); }
