// `doctor --calibrate FILE`: measures this machine as a cluster of CPU ranks with --threads threads each, and writes
// the description that `plan --cluster` and `train --schedule auto` read. All ranks work at the same time, as they do
// in a pipeline: they share memory bandwidth and clock.
#pragma once

#include <time.h>

#include <atomic>
#include <thread>

#include "llmc/io/config.h"
#include "llmc/io/files.h"
#include "llmc/io/log.h"
#include "llmc/io/manifest.h"
#include "llmc/kernels/peak.h"
#include "llmc/pipeline/cluster.h"

#ifndef USE_CUDA
#include "llmc/kernels/attention.cuh"
#include "llmc/kernels/matmul.cuh"

// Seconds on a clock that runs while a rank computes. Of a rank with one thread it is that thread's own, which stands
// still while other programs have the core.
inline double seconds_of_rank(int threads) {
    timespec t{};
    clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Runs work(device) on every rank at the same time, five times and for 0.2 s at least; the mean over ranks of their
// best rates, operations(one run) a second.
template <class MakeWork>
double rate_of_ranks(int ranks, int threads, double operations, MakeWork make_work) {
    std::vector<double> rates(static_cast<size_t>(ranks));
    std::vector<std::thread> team;
    std::atomic<int> waiting = ranks;
    for (int r = 0; r < ranks; ++r)
        team.emplace_back([&, r] {
            OpenDevice opened(threads);
            auto work = make_work();
            work(opened.device);
            for (--waiting; waiting > 0;) std::this_thread::yield();
            const double begin = seconds_of_rank(threads);
            for (int run = 0; run < 5 || seconds_of_rank(threads) - begin < 0.2; ++run) {
                const double start = seconds_of_rank(threads);
                work(opened.device);
                rates[size_t(r)] = std::max(rates[size_t(r)], operations / (seconds_of_rank(threads) - start));
            }
        });
    for (std::thread& thread : team) thread.join();
    return std::accumulate(rates.begin(), rates.end(), 0.0) / ranks;
}

// Numbers of a kernel, and its scratch.
struct CalibrationBuffers {
    std::vector<DeviceMemory<floatX>> x;  // in pages as large as those of a rank
    std::vector<floatS> s;
    std::optional<DeviceMemory<std::byte>> scratch;

    floatX* take(int64_t size) {
        x.emplace_back(size);
        for (int64_t i = 0; i < size; ++i) x.back().data()[i] = floatX(float(i * 37 % 101) / 101 - 0.5f);
        return x.back().data();
    }
    Device with_scratch(Device device, size_t bytes) {
        if (!scratch) scratch.emplace(int64_t(bytes));
        device.scratch = scratch->data();
        device.scratch_bytes = bytes;
        return device;
    }
};

// FLOP/s of a linear layer of 512 to 2048 channels over so many tokens: forward, gradients of input and weights.
inline double measured_product_rate(int ranks, int threads, int64_t tokens) {
    constexpr int64_t C = 512, OC = 2048;
    return rate_of_ranks(ranks, threads, 6.0 * double(tokens * C * OC), [=] {
        auto b = std::make_shared<CalibrationBuffers>();
        const Matrix<floatX> in(b->take(tokens * C), tokens, C), out(b->take(tokens * OC), tokens, OC);
        const Matrix<floatX> weight(b->take(C * OC), OC, C);
        b->s.resize(size_t(C * OC));
        const Matrix<floatS> dweight(b->s.data(), OC, C);
        return [=](Device device) {
            device = b->with_scratch(device, matmul_scratch_bytes(threads));
            matmul_forward(device, out, in, weight, nullptr);
            matmul_backward_weight(device, dweight, nullptr, out, in);
            matmul_backward_input(device, in, out, weight);
        };
    });
}

// FLOP/s of attention over one sequence, causal, 8 heads of 64.
inline double measured_attention_rate(int ranks, int threads, int64_t tokens, bool backward) {
    constexpr int64_t heads = 8, C = 64 * heads;
    const double forward = 2.0 * double(C) * double(tokens) * double(tokens);
    return rate_of_ranks(ranks, threads, backward ? 2.5 * forward : forward, [=] {
        auto b = std::make_shared<CalibrationBuffers>();
        const Matrix<floatX> qkv(b->take(tokens * 3 * C), tokens, 3 * C), d_qkv(b->take(tokens * 3 * C), tokens, 3 * C);
        const Matrix<floatX> out(b->take(tokens * C), tokens, C), d_out(b->take(tokens * C), tokens, C);
        b->s.assign(size_t(tokens * heads), floatS(8));  // log-sum-exp: any will do for the time
        const Matrix<floatS> lse(b->s.data(), tokens, heads);
        return [=](Device device) {
            device = b->with_scratch(device, attention_scratch_bytes(threads, 64, heads, tokens));
            const std::vector<SegmentRows> rows = {{0, tokens, 0, false}};
            const Segments segments(rows);
            if (backward)
                attention_backward(device, d_qkv, Matrix<floatS>(), d_out, out, lse, qkv, Matrix<floatX>(), segments,
                                   heads);
            else attention_forward(device, out, lse, qkv, Matrix<floatX>(), segments, heads);
        };
    });
}

// Bytes a second of copies, as messages between thread ranks are.
inline double measured_copy_rate(int ranks) {
    constexpr int64_t bytes = 16 << 20;
    return rate_of_ranks(ranks, 1, double(bytes), [=] {
        auto from = std::make_shared<std::vector<char>>(bytes, 1), to = std::make_shared<std::vector<char>>(bytes, 2);
        return [=](const Device&) { std::memcpy(to->data(), from->data(), bytes); };
    });
}

// Microseconds from a thread to another one that sleeps until it is notified, there and back halved.
inline double measured_wake_up() {
    constexpr int rounds = 500;
    std::atomic<int> turn = 0;
    std::thread other([&] {
        for (int i = 0; i < rounds; ++i) {
            turn.wait(2 * i);
            turn.store(2 * i + 2), turn.notify_one();
        }
    });
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < rounds; ++i) {
        turn.store(2 * i + 1), turn.notify_one();
        turn.wait(2 * i + 1);
    }
    other.join();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / (2 * rounds);
}

inline Cluster measure_cluster(int ranks, int threads) {
    Cluster c;
    c.devices = c.devices_per_node = ranks;
    c.precision = std::is_same_v<floatX, bf16> ? "bf16-fp32" : "fp32";
    const auto measure = [](Efficiency& e, std::initializer_list<int64_t> sizes, auto rate_at) {
        e = {{}, {}};
        for (int64_t tokens : sizes) e.tokens.push_back(double(tokens)), e.fraction.push_back(rate_at(tokens));
        const double most = *std::max_element(e.fraction.begin(), e.fraction.end());
        for (double& fraction : e.fraction) fraction /= most;
        return 1e-12 * most;
    };
    c.matrix_tflops = measure(c.matrix_efficiency, {16, 64, 256, 1024, 2048},
                              [&](int64_t tokens) { return measured_product_rate(ranks, threads, tokens); });
    c.attention_forward_tflops = measure(c.attention_efficiency, {64, 256, 1024, 4096}, [&](int64_t tokens) {
        return measured_attention_rate(ranks, threads, tokens, false);
    });
    Efficiency backward;  // nearly the same
    c.attention_backward_tflops = measure(
        backward, {256, 1024}, [&](int64_t tokens) { return measured_attention_rate(ranks, threads, tokens, true); });
    c.memory_bandwidth = measure_bandwidth(ranks * threads) / ranks;
    c.memory = 1e-9 * double(available_memory()) / ranks;
    c.inside = c.between = {1e-9 * measured_copy_rate(ranks), measured_wake_up()};
    return c;
}

inline std::string cluster_toml(const Cluster& c, const std::string& comment) {
    const auto list = [](const std::vector<double>& values) {
        std::string text;
        for (double value : values) text += (text.empty() ? "" : ", ") + format("%.4g", value);
        return "[" + text + "]";
    };
    Cluster copy = c;
    std::string text = comment, table;
    for (const ClusterKey& key : cluster_keys(copy)) {
        if (key.key == "price") continue;
        if (key.table != table) text += "\n[" + (table = key.table) + "]\n";
        text += key.key + " = ";
        if (auto* number = std::get_if<double*>(&key.field)) text += format("%.4g", **number);
        else if (auto* whole = std::get_if<int*>(&key.field)) text += std::to_string(**whole);
        else if (auto* word = std::get_if<std::string*>(&key.field)) text += toml_quote(**word);
        else text += list(*std::get<std::vector<double>*>(key.field));
        text += "\n";
    }
    return text;
}
#endif

inline int calibrate_command(const Config& c) {
#ifdef USE_CUDA
    throw Failure(EXIT_CONFIG, "--calibrate " + c.run.calibrate +
                                   ": only CPUs are measured; describe GPUs by hand as dev/clusters/README.md says, or "
                                   "calibrate with a program built with DEVICE=cpu");
#else
    const int threads = c.threads(), ranks = std::max(1, usable_threads() / threads);
    const Cluster measured = measure_cluster(ranks, threads);
    const std::string comment =
        "# Measured by `train_gpt doctor --calibrate`: " + current_environment().at("cpu") + ", " +
        std::to_string(ranks) + " ranks of " + std::to_string(threads) + (threads == 1 ? " thread" : " threads") +
        ", " PRECISION_NAME ",\n# all at work at the same time. Links are copies between thread ranks.\n";
    const std::string text = cluster_toml(measured, comment);
    parse_cluster(c.run.calibrate, text);  // refuses what could not be read back
    write_file(c.run.calibrate, text);
    print_table("calibrated " + c.run.calibrate,
                {{"ranks", std::to_string(ranks) + " of " + std::to_string(threads) + " threads"},
                 {"products", format("%.4g GFLOP/s a rank", 1e3 * measured.matrix_tflops)},
                 {"attention", format("%.4g GFLOP/s forward, %.4g backward", 1e3 * measured.attention_forward_tflops,
                                      1e3 * measured.attention_backward_tflops)},
                 {"memory", format("%.4g GB/s a rank", measured.memory_bandwidth)},
                 {"messages", format("%.4g GB/s, %.3g us", measured.inside.bandwidth, measured.inside.latency)}});
    return 0;
#endif
}
