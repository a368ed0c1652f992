// The three products of a linear layer against what the machine can do at best, in one run: percent of the measured
// peak (register-only FMA loop; for bf16 the fastest of vdpbf16ps and AMX tiles), for the shapes of the models.
//
//   matmul [--threads N] [--seconds S, for each product] [--json]

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "llmc/kernels/matmul.cuh"
#include "llmc/kernels/peak.h"

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Bench {
    int threads = 2;
    double seconds = 0.3;
    bool json = false;
    std::vector<std::byte> scratch;

    Device device() {
        scratch.resize(matmul_scratch_bytes(threads) + 64);
        std::byte* aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) % 64;
        return {threads, aligned, matmul_scratch_bytes(threads)};
    }

    // The peak is measured just before and just after each product, since the clock of a shared machine wanders.
    template <class T, class Work>
    void measure(const std::string& name, double flops, Work work) {
        const auto peak = [&] {
            return sizeof(T) == 2 ? measure_bf16_peak(threads, cpu_isa(), seconds / 4)
                                  : measure_fp32_peak(threads, cpu_isa(), seconds / 4);
        };
        const double before = peak();
        double rate = 0;
        for (const double end = now() + seconds / 2; now() < end;) {
            const double start = now();
            work();
            rate = std::max(rate, flops / (now() - start) * 1e-9);
        }
        const double bound = (before + peak()) / 2;
        if (json)
            printf(
                "{\"case\": \"%s\", \"metric\": \"gflops\", \"ours\": %.1f, \"bound\": %.1f, "
                "\"percent_of_bound\": %.1f}\n",
                name.c_str(), rate, bound, 100 * rate / bound);
        else printf("%-38s %6.0f GFLOP/s of %6.0f  %5.1f %%\n", name.c_str(), rate, bound, 100 * rate / bound);
        fflush(stdout);
    }

    template <class T>
    void layer(int64_t N, int64_t IC, int64_t OC, bool gelu) {
        const Device on = device();
        std::vector<T> in(N * IC), weight(OC * IC), out(N * OC), pre(N * OC), din(N * IC), bias(OC);
        std::vector<float> dweight(OC * IC), dbias(OC);
        for (auto* values : {&in, &weight, &bias, &out})
            for (size_t i = 0; i < values->size(); i++) (*values)[i] = T(float(i * 2654435761u % 1024) / 1024 - 0.5f);

        const double flops = 2.0 * double(N) * double(IC) * double(OC);
        const std::string name = (sizeof(T) == 2 ? "bf16 " : "fp32 ") + std::to_string(N) + "x" + std::to_string(IC) +
                                 "x" + std::to_string(OC);
        const Operand<T> x{in.data(), IC, true}, w{weight.data(), IC, true}, d{out.data(), OC, true};
        Epilogue<T, T> forward{.out = {out.data(), N, OC}, .bias = bias.data()};
        Epilogue<T, T> backward{.out = {din.data(), N, IC}};
        const Epilogue<T, float> gradient{
            .out = {dweight.data(), OC, IC}, .addend = {dweight.data(), OC, IC}, .left_sums = dbias.data()};
        if (gelu) {
            forward.activation = Activation::gelu;
            forward.pre_activation = {pre.data(), N, OC};
        }
        measure<T>(name + " forward" + (gelu ? " gelu" : ""), flops, [&] { multiply<T>(on, x, w, IC, forward); });
        measure<T>(name + " backward input", flops, [&] {
            multiply<T>(on, d, {weight.data(), IC, false}, OC, backward);
        });
        measure<T>(name + " backward weight", flops, [&] {
            multiply<T>(on, {out.data(), OC, false}, {in.data(), IC, false}, N, gradient);
        });
    }

    template <class T>
    void all() {
        for (int64_t C : {768, 384, 192}) {  // gpt2:d12, bytes, tiny
            const int64_t N = C == 768 ? 1024 : 4096;
            layer<T>(N, C, 3 * C, false);
            layer<T>(N, C, C, false);
            layer<T>(N, C, 4 * C, true);
            layer<T>(N, 4 * C, C, false);
        }
        layer<T>(512, 768, 50304, false);  // the head of gpt2:d12, one chunk
    }
};

}  // namespace

int main(int argc, char** argv) {
    Bench bench;
    for (int i = 1; i < argc; i++) {
        if (std::strcmp(argv[i], "--json") == 0) bench.json = true;
        else if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) bench.threads = std::max(1, atoi(argv[++i]));
        else if (std::strcmp(argv[i], "--seconds") == 0 && i + 1 < argc) bench.seconds = atof(argv[++i]);
        else return fprintf(stderr, "usage: matmul [--threads N] [--seconds S] [--json]\n"), EXIT_CONFIG;
    }
    bench.all<float>();
    bench.all<bf16>();
}
