// Memory-bound kernels in GB/s beside the STREAM triad a[i] = b[i] + s c[i], measured over as many bytes, alternately
// with the kernel. Bytes are those a program names: a written line's first fetch is not counted, in either.
// copy_rows has next to no arithmetic: it shows what as many reads as writes can reach.
//
//   build/bench/elementwise [--json] [--threads 2]
#include <omp.h>

#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/classifier.cuh"
#include "llmc/kernels/copy.cuh"
#include "llmc/kernels/encoder.cuh"
#include "llmc/kernels/layernorm.cuh"
#include "llmc/kernels/random.h"
#include "llmc/kernels/reduce.cuh"

struct Case {
    std::string name;
    double bytes;  // read and written by one call
    std::function<void()> run;
};

template <class T>
std::vector<T> random_vector(int64_t n) {
    std::vector<T> x(n);
    for (int64_t i = 0; i < n; i++) x[i] = T(floatS(uniform(1, 2, i) - 0.5));
    return x;
}

static double seconds(const std::function<void()>& run) {
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int main(int argc, char** argv) {
    bool json = false;
    Device device{.threads = omp_get_max_threads()};
    for (int i = 1; i < argc; i++) {
        if (std::string(argv[i]) == "--json") json = true;
        else if (std::string(argv[i]) == "--threads" && i + 1 < argc)
            device.threads = std::max(1, std::atoi(argv[++i]));
        else return std::fprintf(stderr, "usage: elementwise [--json] [--threads N]\n"), EXIT_CONFIG;
    }

    constexpr int64_t N = 16384, C = 768, T = 1024, V = 50257, Vp = 50304, n = 256, parameters = 1 << 24;
    constexpr double X = sizeof(floatX), R = sizeof(floatR), S = sizeof(floatS);
    std::vector<std::byte> scratch(layernorm_backward_scratch_bytes(device.threads, C));
    device.scratch = scratch.data();
    device.scratch_bytes = scratch.size();

    auto a = random_vector<floatR>(N * C), r = random_vector<floatR>(N * C);
    auto b = random_vector<floatX>(N * C), out = random_vector<floatX>(N * C);
    auto weight = random_vector<floatX>(C), bias = random_vector<floatX>(C);
    auto wte = random_vector<floatX>(Vp * C), wpe = random_vector<floatX>(T * C),
         logits = random_vector<floatX>(n * Vp);
    auto master = random_vector<floatS>(parameters), gradients = random_vector<floatS>(parameters);
    auto rounded = random_vector<floatX>(parameters);
    std::vector<floatS> mean(N), rstd(N), dweight(C), dbias(C), losses(n), dwte(Vp * C), dwpe(T * C);
    std::vector<floatS> m(parameters), v(parameters);
    std::vector<int32_t> tokens(N), positions(N), targets(n);
    for (int64_t i = 0; i < N; i++) tokens[i] = int32_t(uniform(1, 3, i) * V), positions[i] = int32_t(i % T);
    for (int64_t i = 0; i < n; i++) targets[i] = tokens[i];

    constexpr bool one_copy = std::is_same_v<floatX, floatS>;  // the weights are the master weights
    floatX* weights = one_copy ? reinterpret_cast<floatX*>(master.data()) : rounded.data();
    const Matrix<floatR> am(a.data(), N, C), rm(r.data(), N, C);
    const Matrix<floatX> bm(b.data(), N, C), om(out.data(), N, C), lm(logits.data(), n, Vp);
    volatile double sink = 0;
    const auto adamw = [&](floatS* master_weights) {
        adamw_update(device, {weights, master_weights, gradients.data(), m.data(), v.data(), parameters, true},
                     AdamW{});
    };

    std::vector<Case> cases = {
        {"layernorm_forward", N * C * (R + X),
         [&] { layernorm_forward(device, om, mean.data(), rstd.data(), am, weight.data(), bias.data()); }},
        {"layernorm_backward", N * C * (3 * R + X),
         [&] {
             layernorm_backward(device, rm, dweight.data(), dbias.data(), bm, am, mean.data(), rstd.data(),
                                weight.data());
         }},
        {"classifier loss", n * V * X,
         [&] { classifier_forward_backward(device, losses.data(), lm, targets.data(), V, 1, false); }},
        {"classifier loss+gradient", n * V * 2 * X,
         [&] { classifier_forward_backward(device, losses.data(), lm, targets.data(), V, 1, true); }},
        {"adamw", parameters * (7 * S + (one_copy ? 0 : X)), [&] { adamw(master.data()); }},
        {"sum_of_squares", parameters * S, [&] { sink = sum_of_squares(device, gradients.data(), parameters); }},
        {"first_nonfinite", parameters * S, [&] { sink = first_nonfinite(device, gradients.data(), parameters); }},
        {"copy_rows to floatX", N * C * (R + X), [&] { copy_rows(device, om, am); }},
        {"encoder_forward", N * C * (R + 2 * X),
         [&] {
             encoder_forward(device, rm, {tokens.data(), positions.data()}, {wte.data(), Vp, C}, {wpe.data(), T, C});
         }},
        {"encoder_backward", N * C * (R + 4 * S),
         [&] {
             encoder_backward(device, {dwte.data(), Vp, C}, {dwpe.data(), T, C}, am, {tokens.data(), positions.data()});
         }},
    };

    if (!one_copy) cases.push_back({"adamw, no master weights", parameters * (5 * S + 2 * X), [&] { adamw(nullptr); }});

    if (!json)
        std::printf("%-28s %10s %12s %9s   (%d threads, %s)\n", "kernel", "GB/s", "triad GB/s", "of triad",
                    device.threads, PRECISION_NAME);
    for (const Case& c : cases) {
        const int64_t length = int64_t(c.bytes) / 12;
        std::vector<float> x(length), y(length, 1), z(length, 2);
        float *px = x.data(), *py = y.data(), *pz = z.data();
        const auto triad = [&] {
#pragma omp parallel for simd num_threads(device.threads) schedule(simd : static)
            for (int64_t i = 0; i < length; i++) px[i] = py[i] + 3 * pz[i];
        };
        double best = 1e9, best_triad = 1e9;  // interference by others only ever slows down: the best counts
        for (int repeat = 0; repeat < 15; repeat++) {
            best_triad = std::min(best_triad, seconds(triad));
            best = std::min(best, seconds(c.run));
        }
        const double ours = c.bytes / best * 1e-9, bound = 12.0 * double(length) / best_triad * 1e-9;
        if (json)
            std::printf(
                "{\"case\": \"%s %s\", \"metric\": \"gigabytes_per_second\", \"ours\": %.2f, \"bound\": %.2f, "
                "\"percent_of_bound\": %.1f}\n",
                c.name.c_str(), PRECISION_NAME, ours, bound, 100 * ours / bound);
        else std::printf("%-28s %10.2f %12.2f %8.1f%%\n", c.name.c_str(), ours, bound, 100 * ours / bound);
    }
}
