// `doctor --calibrate FILE`: measures this machine as a cluster of CPU ranks with --threads threads each, and writes
// the description that `plan --cluster` and `train --schedule auto` read. All ranks work at the same time, as they do
// in a pipeline: they share memory bandwidth and clock.
#pragma once

#include <atomic>
#include <thread>

#include "llmc/clock.h"
#include "llmc/io/config.h"
#include "llmc/io/files.h"
#include "llmc/io/log.h"
#include "llmc/io/manifest.h"
#include "llmc/kernels/peak.h"
#include "llmc/pipeline/cluster.h"

#ifndef USE_CUDA
#include "llmc/kernels/attention.cuh"
#include "llmc/kernels/layernorm.cuh"
#include "llmc/kernels/matmul.cuh"

// A rank with one thread is timed by that thread's own clock, which other programs on the machine do not move.
inline double seconds_of_rank(int threads) { return threads == 1 ? seconds_on_core() : seconds_now(); }

// Runs work(device) on every rank at the same time, three times and for 0.2 s at least, after one run that does not
// count; the mean over ranks of their median rates, operations(one run) a second.
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
            std::vector<double> seconds;
            for (const double begin = seconds_of_rank(threads);
                 seconds.size() < 3 || seconds_of_rank(threads) - begin < 0.2;) {
                const double start = seconds_of_rank(threads);
                work(opened.device);
                seconds.push_back(seconds_of_rank(threads) - start);
            }
            rates[size_t(r)] = operations / median(std::move(seconds));
        });
    for (std::thread& thread : team) thread.join();
    return std::accumulate(rates.begin(), rates.end(), 0.0) / ranks;
}

// What the kernels of a rank work on. In a step an op finds little in the caches of what it reads: a kernel is measured
// on several sets of tensors, one after the other, more than caches hold.
template <class Tensors>
class CalibrationSets {
public:
    // make(*this) takes the tensors of a set from take().
    template <class Make>
    CalibrationSets(int64_t scratch_bytes, const Make& make) : scratch_(scratch_bytes) {
        constexpr int64_t beyond_caches = 64 << 20;  // bytes
        while (bytes_ < beyond_caches) sets_.push_back(make(*this));
    }
    template <class T>
    Matrix<T> take(int64_t rows, int64_t cols) {
        const int64_t size = rows * cols;
        memory_.emplace_back(size * int64_t(sizeof(T)));  // in pages as large as those of a rank
        bytes_ += size * int64_t(sizeof(T));
        T* const data = reinterpret_cast<T*>(memory_.back().data());
        for (int64_t i = 0; i < size; ++i) data[i] = T(float(i * 37 % 101) / 101 - 0.5f);
        return {data, rows, cols};
    }
    const Tensors& next() { return sets_[used_++ % sets_.size()]; }
    Device with_scratch(Device device) const {
        device.scratch = scratch_.data();
        device.scratch_bytes = size_t(scratch_.size());
        return device;
    }

private:
    DeviceMemory<std::byte> scratch_;
    std::vector<DeviceMemory<std::byte>> memory_;
    std::vector<Tensors> sets_;
    int64_t bytes_ = 0;
    size_t used_ = 0;
};

// FLOP/s of all products of a layer of 512 channels over so many tokens, with the GELU that is fused into two of them:
// forward, gradients of weights and inputs.
inline double measured_product_rate(int ranks, int threads, int64_t tokens) {
    constexpr int64_t C = 512;
    struct Layer {
        Matrix<floatX> x, qkv, fc, gelu, y, d_x;  // y: of C columns, as all that comes out of the products but these
        Matrix<floatX> qkv_weight, proj_weight, fc_weight, out_weight;
        Matrix<floatS> d_qkv_weight, d_proj_weight, d_fc_weight, d_out_weight;
    };
    return rate_of_ranks(ranks, threads, 6.0 * double(tokens * 12 * C * C), [=] {
        auto sets = std::make_shared<CalibrationSets<Layer>>(int64_t(matmul_scratch_bytes(threads)), [=](auto& memory) {
            const auto rows = [&](int64_t cols) { return memory.template take<floatX>(tokens, cols); };
            const auto weight = [&](int64_t out, int64_t in) { return memory.template take<floatX>(out, in); };
            const auto gradient = [&](int64_t out, int64_t in) { return memory.template take<floatS>(out, in); };
            return Layer{rows(C),
                         rows(3 * C),
                         rows(4 * C),
                         rows(4 * C),
                         rows(C),
                         rows(C),
                         weight(3 * C, C),
                         weight(C, C),
                         weight(4 * C, C),
                         weight(C, 4 * C),
                         gradient(3 * C, C),
                         gradient(C, C),
                         gradient(4 * C, C),
                         gradient(C, 4 * C)};
        });
        return [=](Device device) {
            device = sets->with_scratch(device);
            const Layer& l = sets->next();
            matmul_forward(device, l.qkv, l.x, l.qkv_weight, nullptr);
            matmul_forward(device, l.y, l.x, l.proj_weight, nullptr);
            matmul_forward(device, l.gelu, l.x, l.fc_weight, nullptr, Activation::gelu, l.fc);
            matmul_forward(device, l.y, l.gelu, l.out_weight, nullptr);
            matmul_backward_weight(device, l.d_out_weight, nullptr, l.y, l.gelu);
            matmul_backward_input(device, l.gelu, l.y, l.out_weight, l.fc);
            matmul_backward_weight(device, l.d_fc_weight, nullptr, l.gelu, l.x);
            matmul_backward_input(device, l.d_x, l.gelu, l.fc_weight);
            matmul_backward_weight(device, l.d_proj_weight, nullptr, l.y, l.x);
            matmul_backward_input(device, l.d_x, l.y, l.proj_weight);
            matmul_backward_weight(device, l.d_qkv_weight, nullptr, l.qkv, l.x);
            matmul_backward_input(device, l.d_x, l.qkv, l.qkv_weight);
        };
    });
}

// FLOP/s of attention over one sequence, causal, 8 heads of 64.
inline double measured_attention_rate(int ranks, int threads, int64_t tokens, bool backward) {
    constexpr int64_t heads = 8, C = 64 * heads;
    struct Attention {
        Matrix<floatX> qkv, out, d_qkv, d_out;
        Matrix<floatS> lse;  // any will do for the time
    };
    const double forward = 2.0 * double(C) * double(tokens) * double(tokens);
    return rate_of_ranks(ranks, threads, backward ? 2.5 * forward : forward, [=] {
        auto sets = std::make_shared<CalibrationSets<
            Attention>>(int64_t(attention_scratch_bytes(threads, 64, heads, tokens)), [=](auto& memory) {
            const auto rows = [&](int64_t cols) { return memory.template take<floatX>(tokens, cols); };
            return Attention{rows(3 * C), rows(C), rows(3 * C), rows(C), memory.template take<floatS>(tokens, heads)};
        });
        return [=](Device device) {
            device = sets->with_scratch(device);
            const Attention& a = sets->next();
            const std::vector<SegmentRows> rows = {{0, tokens, 0, false}};
            const Segments segments(rows);
            if (backward)
                attention_backward(device, a.d_qkv, Matrix<floatS>(), a.d_out, a.out, a.lse, a.qkv, Matrix<floatX>(),
                                   segments, heads);
            else attention_forward(device, a.out, a.lse, a.qkv, Matrix<floatX>(), segments, heads);
        };
    });
}

// Bytes a second of LayerNorm, forward and backward, counted as in costs.h.
inline double measured_memory_rate(int ranks, int threads) {
    constexpr int64_t tokens = 512, C = 512;
    struct Norm {
        Matrix<floatR> x, d_x;
        Matrix<floatX> out;
        Matrix<floatS> statistics;  // mean and 1 / deviation
        Matrix<floatX> weight;
        Matrix<floatS> d_weight;  // and d_bias
    };
    const double bytes = double(tokens * C) * (2 * sizeof(floatX) + 4 * sizeof(floatR));
    return rate_of_ranks(ranks, threads, bytes, [=] {
        auto sets = std::make_shared<CalibrationSets<Norm>>(
            int64_t(layernorm_backward_scratch_bytes(threads, C)), [=](auto& memory) {
                return Norm{memory.template take<floatR>(tokens, C), memory.template take<floatR>(tokens, C),
                            memory.template take<floatX>(tokens, C), memory.template take<floatS>(2, tokens),
                            memory.template take<floatX>(1, C),      memory.template take<floatS>(2, C)};
            });
        return [=](Device device) {
            device = sets->with_scratch(device);
            const Norm& n = sets->next();
            floatS *mean = n.statistics.row(0), *rstd = n.statistics.row(1);
            layernorm_forward(device, n.out, mean, rstd, n.x, n.weight.data, n.weight.data);
            layernorm_backward(device, n.d_x, n.d_weight.row(0), n.d_weight.row(1), n.out, n.x, mean, rstd,
                               n.weight.data);
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

// Microseconds from a thread to another one that sleeps until it is notified, there and back halved; the median, since
// some rounds wait for other programs.
inline double measured_wake_up() {
    constexpr int rounds = 501;
    std::atomic<int> turn = 0;
    std::thread other([&] {
        for (int i = 0; i < rounds; ++i) {
            turn.wait(2 * i);
            turn.store(2 * i + 2), turn.notify_one();
        }
    });
    std::vector<double> seconds;
    for (int i = 0; i < rounds; ++i) {
        const double start = seconds_now();
        turn.store(2 * i + 1), turn.notify_one();
        turn.wait(2 * i + 1);
        seconds.push_back(seconds_now() - start);
    }
    other.join();
    return 1e6 * median(std::move(seconds)) / 2;
}

inline Cluster measure_cluster(int ranks, int threads) {
    Cluster c;
    c.devices = c.devices_per_node = ranks;
    c.threads = threads;
    c.precision = std::is_same_v<floatX, bf16> ? "bf16-fp32" : "fp32";
    const auto measure = [](Efficiency& e, std::initializer_list<int64_t> sizes, auto rate_at) {
        e = {{}, {}};
        for (int64_t tokens : sizes) e.tokens.push_back(double(tokens)), e.fraction.push_back(rate_at(tokens));
        const double most = *std::max_element(e.fraction.begin(), e.fraction.end());
        for (double& fraction : e.fraction) fraction /= most;
        return 1e-12 * most;
    };
    c.matrix_tflops = measure(c.matrix_efficiency, {16, 64, 128, 256, 512, 1024, 2048},
                              [&](int64_t tokens) { return measured_product_rate(ranks, threads, tokens); });
    for (const bool backward : {false, true})
        (backward ? c.attention_backward_tflops : c.attention_forward_tflops) = measure(
            backward ? c.attention_backward_efficiency : c.attention_efficiency, {64, 128, 256, 512, 1024, 4096},
            [&](int64_t tokens) { return measured_attention_rate(ranks, threads, tokens, backward); });
    c.memory_bandwidth = 1e-9 * measured_memory_rate(ranks, threads);
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
