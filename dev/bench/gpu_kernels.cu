// The kernels of a training step on one GPU, at the shapes of a case, each beside what bounds it, measured alternately:
//
//   matrix products    in TFLOP/s, beside the same product of cuBLASLt without bias, GELU, residual or accumulation
//   head               logits, cross entropy, gradients, beside its three matrix products
//   attention          in TFLOP/s of the causal half (backward: 2.5 x forward); cuDNN's, and up to 8192 tokens ours
//                      on tensor cores beside it
//   all others         in GB/s of the bytes that they must read and write, beside a copy of as many bytes
//
// and from the bounds the ceiling R of a whole step: the products and attentions at their measured rates, and
// 32 C bytes a token and layer and 34 a parameter at the rate of a copy.
//
//   build/bench/gpu_kernels_cuda-bf16 --model gpt2:d12 --sequences 64 --length 1024 [--layers L --channels C --heads NH
//                                     --vocab V --head-chunk n --milliseconds 20 --json]
#include <charconv>
#include <cstdio>
#include <functional>
#include <map>
#include <set>

#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/peak.h"
#include "llmc/model/blocks.cuh"
#include "llmc/model/presets.h"
#ifndef USE_CUDNN
class CudnnAttention {};  // of which there is none in such a build
#endif

struct Case {
    std::string name = "gpt2:d12";
    GptConfig model;
    int64_t sequences = 64, length = 1024, head_chunk = 16384;
    double milliseconds = 20;  // of each measurement
    bool json = false;

    int64_t tokens() const { return sequences * length; }
    // FLOPs of the causal attention of one layer, forward.
    double attention_flops() const { return 2.0 * double(model.channels) * double(tokens()) * double(length); }
};

Case read_case(int argc, char** argv) {
    Case c;
    std::map<std::string, int64_t> numbers = {{"layers", 0},         {"channels", 0},     {"heads", 0},
                                              {"vocab", 50257},      {"sequences", 64},   {"length", 1024},
                                              {"head-chunk", 16384}, {"milliseconds", 20}};
    for (int i = 1; i < argc; i++) {
        const std::string flag = argv[i];
        const auto number = flag.starts_with("--") ? numbers.find(flag.substr(2)) : numbers.end();
        const std::string value = i + 1 < argc ? argv[i + 1] : "";
        if (flag == "--json") {
            c.json = true;
        } else if (flag == "--model" && find_preset(value)) {
            c.name = value, i++;
        } else if (number != numbers.end() &&
                   std::from_chars(value.data(), value.data() + value.size(), number->second).ptr ==
                       value.data() + value.size() &&
                   number->second > 0) {
            i++;
        } else {
            throw Failure(EXIT_CONFIG, "gpu_kernels does not know " + flag + (value.empty() ? "" : " " + value) +
                                           "; the head of dev/bench/gpu_kernels.cu lists its flags, --model takes "
                                           "the names of `train_gpt train --help`");
        }
    }
    const Preset& preset = *find_preset(c.name);
    const auto chosen = [&](const char* name, int64_t usual) { return numbers[name] ? numbers[name] : usual; };
    c.sequences = numbers["sequences"], c.length = numbers["length"];
    c.model = {.layers = chosen("layers", preset.layers),
               .channels = chosen("channels", preset.channels),
               .heads = chosen("heads", preset.heads),
               .context = c.length,
               .vocab = numbers["vocab"],
               .padded_vocab = round_up(numbers["vocab"], 64)};
    if (numbers["layers"] || numbers["channels"])
        c.name = std::to_string(c.model.layers) + " layers of " + std::to_string(c.model.channels);
    c.head_chunk = std::min(numbers["head-chunk"], c.tokens());
    c.milliseconds = double(numbers["milliseconds"]);
    if (c.model.heads < 1 || c.model.channels % c.model.heads || c.model.head_size() % PACK)
        throw Failure(EXIT_CONFIG, "gpu_kernels: " + std::to_string(c.model.channels) + " channels in " +
                                       std::to_string(c.model.heads) +
                                       " heads; choose heads of a multiple of 8 channels");
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Time

// Seconds of one call of each of the works, which take turns: the median of 7 turns, each as long as asked.
std::vector<double> seconds_of(const Device& device, double milliseconds,
                               const std::vector<std::function<void()>>& works) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    const auto run = [&](const std::function<void()>& work, int times) {
        CUDA_CHECK(cudaEventRecord(begin, device.stream));
        for (int n = 0; n < times; n++) work();
        CUDA_CHECK(cudaEventRecord(end, device.stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        return 1e-3 * double(ms) / times;
    };
    std::vector<int> times;
    for (const auto& work : works) {
        run(work, 1);  // loads code, chooses algorithms
        times.push_back(int(std::clamp(1e-3 * milliseconds / std::max(run(work, 1), 1e-7), 1.0, 1000.0)));
    }
    std::vector<std::vector<double>> seconds(works.size());
    for (int turn = 0; turn < 7; turn++)
        for (size_t i = 0; i < works.size(); i++) seconds[i].push_back(run(works[i], times[i]));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    std::vector<double> medians;
    for (const auto& s : seconds) medians.push_back(median(s));
    return medians;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// Random numbers in [-0.5, 0.5) (zeros would run faster), one block of them again and again.
template <class T>
class RandomMatrix {
public:
    RandomMatrix(const Device& device, int64_t rows, int64_t cols) : memory_(rows * cols), rows_(rows), cols_(cols) {
        std::vector<T> block(size_t(std::min<int64_t>(rows * cols, 1 << 20)));
        for (size_t i = 0; i < block.size(); i++) block[i] = T(float(uniform(1, uint64_t(cols), i)) - 0.5f);
        for (int64_t i = 0; i < memory_.size(); i += int64_t(block.size()))
            upload(device, memory_.data() + i, block.data(), std::min(int64_t(block.size()), memory_.size() - i));
    }
    operator Matrix<T>() const { return {memory_.data(), rows_, cols_}; }
    operator Matrix<const T>() const { return {memory_.data(), rows_, cols_}; }
    Matrix<T> matrix() const { return *this; }
    T* data() const { return memory_.data(); }

private:
    DeviceMemory<T> memory_;
    int64_t rows_, cols_;
};

// ---------------------------------------------------------------------------------------------------------------------

class Benchmark {
public:
    explicit Benchmark(const Case& c) : c_(c), opened_(1), device_(opened_.device) {
        const GptConfig& g = c.model;
        int64_t bytes =
            std::max<int64_t>({int64_t(matmul_scratch_bytes(1)), int64_t(reduce_scratch_bytes()),
                               int64_t(encoder_backward_scratch_bytes(c.tokens(), g.channels)),
                               int64_t(layernorm_backward_scratch_bytes(1, g.channels)),
                               int64_t(attention_scratch_bytes(1, g.head_size(), int(g.heads), c.tokens()))});
#ifdef USE_CUDNN
        if (cudnn_absence().empty()) {
            CudnnShape shape;
            shape.heads = g.heads, shape.head_size = g.head_size();
            shape.context = shape.shortest = c.length, shape.chunk_tokens = c.tokens();
            bytes = std::max(bytes, cudnn_workspace_bytes(shape) + 256);
            cudnn_ = std::make_unique<CudnnAttention>(shape);
        }
#endif
        scratch_ = DeviceMemory<std::byte>(bytes);
        device_.scratch = scratch_.data();
        device_.scratch_bytes = size_t(bytes);
        device_.tune_products = true;
    }

    void run() {
        if (!c_.json)
            std::printf(
                "%s, %lld layers, %lld channels, %lld x %lld tokens, " PRECISION_NAME ", %s\n%-42s %9s %10s %10s %8s\n",
                c_.name.c_str(), (long long)c_.model.layers, (long long)c_.model.channels, (long long)c_.sequences,
                (long long)c_.length, device_text("").c_str(), "kernel", "us", "rate", "bound", "of bound");
        products();
        head();
        attention();
        elementwise();
        parameters();
        ceiling();
    }

private:
    const Case c_;
    OpenDevice opened_;
    std::unique_ptr<CudnnAttention> cudnn_;
    DeviceMemory<std::byte> scratch_;
    Device device_;
    double products_seconds_ = 0, attention_seconds_ = 0;  // of a step, at the measured bounds
    std::vector<double> copy_rates_;                       // GB/s

    void print(const std::string& kernel, const char* metric, double seconds, double rate, double bound) const {
        if (c_.json)
            std::printf(
                "{\"case\": \"%s %lldx%lld %s\", \"metric\": \"%s\", \"ours\": %.2f, \"bound\": %.2f, "
                "\"percent_of_bound\": %.1f}\n",
                c_.name.c_str(), (long long)c_.sequences, (long long)c_.length, kernel.c_str(), metric, rate, bound,
                100 * rate / bound);
        else
            std::printf("%-42s %9.1f %10.1f %10.1f %7.1f%%  %s\n", kernel.c_str(), 1e6 * seconds, rate, bound,
                        100 * rate / bound, metric);
        std::fflush(stdout);
    }

    // `run` beside the product of the same shape alone. Returns the seconds of the latter.
    double product(const std::string& name, const Product<floatX>& alone, const std::function<void()>& run) {
        const auto seconds = seconds_of(device_, c_.milliseconds, {run, [&] { multiply(device_, alone); }});
        const double flops = 2e-12 * double(alone.out.rows) * double(alone.out.cols) * double(alone.depth());
        print(name, "TFLOP/s", seconds[0], flops / seconds[0], flops / seconds[1]);
        return seconds[1];
    }

    // What a linear layer has beside its products. `out` and the projection of the attention join the residual stream.
    struct Fused {
        bool bias = true, gelu_after = false, gelu_before = false, residual = false;
    };

    // The three products of a linear layer on N rows. Returns the seconds of the three products alone.
    double linear_layer(const std::string& name, int64_t N, int64_t OC, int64_t IC, const Fused& fused) {
        const RandomMatrix<floatX> in(device_, N, IC), weight(device_, OC, IC), bias(device_, 1, OC);
        const RandomMatrix<floatX> out(device_, N, OC);
        const RandomMatrix<floatX> kept(device_, N, fused.gelu_after ? OC : fused.gelu_before ? IC : 1);
        const RandomMatrix<floatR> residual(device_, fused.residual ? N : 1, OC);
        const RandomMatrix<floatX> plain_weight(device_, OC, IC);
        const RandomMatrix<floatS> d_weight(device_, OC, IC), d_bias(device_, 1, OC);
        double seconds =
            product(name + " forward", {.out = out, .left = in, .right = weight, .right_transposed = true}, [&] {
                if (fused.residual) return matmul_residual_forward(device_, out, residual, in, weight, bias.data());
                matmul_forward(device_, out, in, weight, fused.bias ? bias.data() : nullptr,
                               fused.gelu_after ? Activation::gelu : Activation::none,
                               fused.gelu_after ? kept.matrix() : Matrix<floatX>());
            });
        seconds += product(name + " backward, input", {.out = in, .left = out, .right = weight}, [&] {
            matmul_backward_input(device_, in, out, weight, fused.gelu_before ? kept.matrix() : Matrix<floatX>());
        });
        seconds += product(
            name + " backward, weight", {.out = plain_weight, .left = out, .right = in, .left_transposed = true},
            [&] { matmul_backward_weight(device_, d_weight, fused.bias ? d_bias.data() : nullptr, out, in); });
        if (fused.bias) bias_by_epilogue(name, d_weight, d_bias.data(), out, in);
        return seconds;
    }

    // The gradients of weight and bias, as the program computes them, beside one product whose epilogue sums the bias
    // (and writes it, so that using it would take a small kernel more).
    void bias_by_epilogue(const std::string& name, Matrix<floatS> d_weight, floatS* d_bias, Matrix<const floatX> dout,
                          Matrix<const floatX> in) {
        const Product<floatS> p = {
            .out = d_weight, .left = dout, .right = in, .left_transposed = true, .addend = d_weight};
        const MatmulDescription m(p);
        const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
            CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(m.product, attribute, &value, sizeof value));
        };
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BGRADB);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, d_bias);
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t(cuda_type<floatS>));
        const float one = 1;
        double least = std::numeric_limits<double>::infinity(), ours = 0;
        for (const FoundAlgorithm& f : find_algorithms(device_, m, 8)) {
            const auto run = [&] {
                return cublasLtMatmul(device_.blas, m.product, &one, in.data, m.a, dout.data, m.b, &one, d_weight.data,
                                      m.c, d_weight.data, m.d, &f.result.algo, device_.scratch, MATMUL_WORKSPACE_BYTES,
                                      device_.stream);
            };
            if (run() != CUBLAS_STATUS_SUCCESS) continue;
            const auto seconds = seconds_of(
                device_, c_.milliseconds, {[&] { matmul_backward_weight(device_, d_weight, d_bias, dout, in); }, run});
            if (seconds[1] < least) ours = seconds[0], least = seconds[1];
        }
        const double flops = 2e-12 * double(dout.rows) * double(dout.cols) * double(in.cols);
        if (ours > 0) print(name + " backward, weight, bias by epilogue", "TFLOP/s", ours, flops / ours, flops / least);
    }

    void products() {
        const int64_t N = c_.tokens(), C = c_.model.channels;
        double seconds = linear_layer("qkv", N, 3 * C, C, {});
        seconds += linear_layer("proj", N, C, C, {.residual = true});
        seconds += linear_layer("fc", N, 4 * C, C, {.gelu_after = true});
        seconds += linear_layer("out", N, C, 4 * C, {.gelu_before = true, .residual = true});
        products_seconds_ = double(c_.model.layers) * seconds;
    }

    void head() {
        const int64_t n = c_.head_chunk, C = c_.model.channels, Vp = c_.model.padded_vocab;
        const double rounds = double(c_.tokens()) / double(n);
        products_seconds_ += rounds * linear_layer("head", n, Vp, C, {.bias = false});
        const RandomMatrix<floatX> in(device_, n, C), weight(device_, Vp, C), logits(device_, n, Vp),
            d_in(device_, n, C);
        const RandomMatrix<floatX> plain_weight(device_, Vp, C);
        const RandomMatrix<floatS> d_weight(device_, Vp, C), losses(device_, 1, n);
        std::vector<int32_t> host(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; i++) host[size_t(i)] = int32_t(uniform(2, 1, uint64_t(i)) * double(c_.model.vocab));
        const DeviceMemory<int32_t> targets(n);
        upload(device_, targets.data(), host.data(), n);
        const auto classify = [&] {
            classifier_forward_backward(device_, losses.data(), logits, targets.data(), c_.model.vocab, 1e-5f, true);
        };
        const auto seconds = seconds_of(
            device_, c_.milliseconds,
            {[&] {
                 matmul_forward(device_, logits, in, weight, nullptr);
                 classify();
                 matmul_backward_input(device_, d_in, logits, weight);
                 matmul_backward_weight(device_, d_weight, nullptr, logits, in);
             },
             [&] {
                 multiply<floatX>(device_, {.out = logits, .left = in, .right = weight, .right_transposed = true});
                 multiply<floatX>(device_, {.out = d_in, .left = logits, .right = weight});
                 multiply<floatX>(device_, {.out = plain_weight, .left = logits, .right = in, .left_transposed = true});
             }});
        const double flops = 6e-12 * double(n) * double(C) * double(Vp);
        print("head and cross entropy", "TFLOP/s", seconds[0], flops / seconds[0], flops / seconds[1]);
        memory_bound("cross entropy", 2 * double(n) * double(c_.model.vocab) * sizeof(floatX), classify);
    }

    void attention() {
        const GptConfig& g = c_.model;
        const int64_t N = c_.tokens(), C = g.channels;
        const RandomMatrix<floatX> qkv(device_, N, 3 * C), out(device_, N, C), d_out(device_, N, C),
            d_qkv(device_, N, 3 * C);
        const RandomMatrix<floatS> lse(device_, N, g.heads), delta(device_, N, g.heads);
        std::vector<SegmentRows> rows;
        for (int64_t begin = 0; begin < N; begin += c_.length) rows.push_back({begin, c_.length, 0, false});
        const std::vector<AttentionTile> host_tiles = attention_tiles(rows);
        const DeviceMemory<AttentionTile> tiles(int64_t(host_tiles.size()));
        upload(device_, tiles.data(), host_tiles.data(), tiles.size());
        Segments segments(rows, tiles.data());
        Device with_cudnn = device_;
#ifdef USE_CUDNN
        CudnnChunk chunk;
        DeviceMemory<int64_t> table;
        if (cudnn_) {
            chunk = cudnn_chunk(cudnn_->shape, std::span<const SegmentRows>(rows));
            table = DeviceMemory<int64_t>(int64_t(chunk.table.size()));
            upload(device_, table.data(), chunk.table.data(), table.size());
            segments.cudnn_chunk = &chunk, segments.cudnn_table = table.data();
            with_cudnn.cudnn = cudnn_.get();
        }
#endif
        const auto forward = [&](const Device& device) {
            attention_forward(device, out, lse, qkv, {}, segments, int(g.heads));
        };
        const auto backward = [&](const Device& device) {
            attention_backward(device, d_qkv, {}, d_out, out, lse, qkv, {}, segments, int(g.heads));
        };
        const double flops = 1e-12 * c_.attention_flops();
        for (const auto& [name, times, pass] :
             {std::tuple<const char*, double, std::function<void(const Device&)>>{"forward", 1, forward},
              {"backward", 2.5, backward}}) {
            std::vector<std::function<void()>> works = {[&] { pass(with_cudnn); }};
            if (c_.length <= 8192) works.push_back([&] { pass(device_); });
            const auto seconds = seconds_of(device_, c_.milliseconds, works);
            const double bound = times * flops / seconds[0];
            print(std::string("attention ") + name + (cudnn_ ? ", cuDNN's" : ", ours, no cuDNN here"), "TFLOP/s",
                  seconds[0], bound, bound);
            if (works.size() > 1)
                print(std::string("attention ") + name + ", ours", "TFLOP/s", seconds[1], times * flops / seconds[1],
                      bound);
            attention_seconds_ += double(g.layers) * seconds[0];
        }
        memory_bound("attention delta", double(N) * double(2 * C * sizeof(floatX) + g.heads * sizeof(floatS)),
                     [&] { attention_delta(device_, delta, d_out, out); });
    }

    // `run` must read and write so many bytes, beside a copy that reads and writes as many.
    void memory_bound(const std::string& name, double bytes, const std::function<void()>& run) {
        const int64_t half = round_up(int64_t(bytes / 2), 256);
        const DeviceMemory<std::byte> from(half), to(half);
        CUDA_CHECK(cudaMemsetAsync(from.data(), 1, size_t(half), device_.stream));
        const auto copy = [&] {
            CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), size_t(half), cudaMemcpyDeviceToDevice, device_.stream));
        };
        const auto seconds = seconds_of(device_, c_.milliseconds, {run, copy});
        const double rate = 1e-9 * bytes / seconds[0], bound = 2e-9 * double(half) / seconds[1];
        print(name, "GB/s", seconds[0], rate, bound);
        copy_rates_.push_back(bound);
    }

    // LayerNorm, GELU, embedding on N tokens.
    void elementwise() {
        const GptConfig& g = c_.model;
        const int64_t N = c_.tokens(), C = g.channels;
        constexpr double X = sizeof(floatX), R = sizeof(floatR), S = sizeof(floatS);
        const double elements = double(N) * double(C);
        const RandomMatrix<floatR> a(device_, N, C), sum(device_, N, C);
        const RandomMatrix<floatX> b(device_, N, C), out(device_, N, C), weight(device_, 1, C), bias(device_, 1, C);
        const RandomMatrix<floatS> mean(device_, 1, N), rstd(device_, 1, N), d_weight(device_, 1, C),
            d_bias(device_, 1, C);
        memory_bound("layernorm forward", elements * (R + X),
                     [&] { layernorm_forward(device_, out, mean.data(), rstd.data(), a, weight.data(), bias.data()); });
        memory_bound("layernorm backward", elements * (3 * R + X), [&] {
            layernorm_backward(device_, sum, d_weight.data(), d_bias.data(), b, a, mean.data(), rstd.data(),
                               weight.data());
        });
        {
            const RandomMatrix<floatX> wide(device_, N, 4 * C), wide_out(device_, N, 4 * C);
            memory_bound("gelu forward", 8 * elements * X, [&] { gelu_forward(device_, wide_out, wide); });
        }

        std::vector<int32_t> tokens(static_cast<size_t>(N)), positions(static_cast<size_t>(N));
        for (int64_t i = 0; i < N; i++)
            tokens[size_t(i)] = int32_t(uniform(3, 1, uint64_t(i)) * double(g.vocab)),
            positions[size_t(i)] = int32_t(i % c_.length);
        const std::vector<std::vector<int32_t>> arrays = {tokens, positions, sorted_rows(tokens),
                                                          sorted_rows(positions)};
        const DeviceMemory<int32_t> ints(4 * N);
        for (int64_t i = 0; i < 4; i++) upload(device_, ints.data() + i * N, arrays[size_t(i)].data(), N);
        const TokenRows rows = {ints.data(), ints.data() + N, ints.data() + 2 * N, ints.data() + 3 * N};
        const double met =
            double(std::set<int32_t>(tokens.begin(), tokens.end()).size() + size_t(c_.length)) * double(C);
        const RandomMatrix<floatX> wte(device_, g.padded_vocab, C), wpe(device_, c_.length, C);
        memory_bound("encoder forward", elements * R + std::min(elements, met) * X,
                     [&] { encoder_forward(device_, sum, rows, wte, wpe); });
        const RandomMatrix<floatS> d_wte(device_, g.padded_vocab, C), d_wpe(device_, c_.length, C);
        memory_bound("encoder backward", elements * R + met * 2 * S,
                     [&] { encoder_backward(device_, d_wte, d_wpe, a, rows); });
    }

    // AdamW and the norm of the gradients, on as many parameters as a layer has, but more than the GPU's cache holds.
    void parameters() {
        const int64_t n = std::max<int64_t>(1 << 25, 12 * c_.model.channels * c_.model.channels);
        const RandomMatrix<floatX> weights(device_, 1, n);
        const RandomMatrix<floatS> master(device_, 1, n), gradients(device_, 1, n), m(device_, 1, n), v(device_, 1, n);
        floatS* const second = v.data();
        CUDA_CHECK(cudaMemsetAsync(second, 0, size_t(n) * sizeof(floatS), device_.stream));  // never negative
        memory_bound("adamw", double(n) * (7 * sizeof(floatS) + sizeof(floatX)), [&] {
            adamw_update(device_, {weights.data(), master.data(), gradients.data(), m.data(), second, n, true},
                         AdamW{});
        });
        const DeviceMemory<double> total(1);
        memory_bound("norm of gradients", double(n) * sizeof(floatS),
                     [&] { sum_on_device<true>(device_, total.data(), gradients.data(), n, false); });
    }

    void ceiling() const {
        const GptConfig& g = c_.model;
        const double tokens = double(c_.tokens()), copy = 1e9 * median(copy_rates_);
        const double bytes = 32 * double(g.channels) * tokens * double(g.layers) + 34 * double(parameter_count(g));
        const double seconds = products_seconds_ + attention_seconds_ + bytes / copy;
        const double flops =
            tokens * matmul_flops_per_token(g) + double(c_.sequences) * ::attention_flops(g, 0, c_.length);
        if (c_.json) {
            std::printf(
                "{\"case\": \"%s %lldx%lld\", \"metric\": \"ceiling_tokens_per_second\", \"ours\": %.1f, "
                "\"tflops\": %.1f, \"products_ms\": %.3f, \"attention_ms\": %.3f, \"copies_ms\": %.3f}\n",
                c_.name.c_str(), (long long)c_.sequences, (long long)c_.length, tokens / seconds,
                1e-12 * flops / seconds, 1e3 * products_seconds_, 1e3 * attention_seconds_, 1e3 * bytes / copy);
            return;
        }
        std::printf(
            "R, the ceiling of a step: %.2f ms = products %.2f + attention %.2f + %.2f GB at %.0f GB/s %.2f; "
            "%.0f tokens/s, %.0f TFLOP/s\n",
            1e3 * seconds, 1e3 * products_seconds_, 1e3 * attention_seconds_, 1e-9 * bytes, 1e-9 * copy,
            1e3 * bytes / copy, tokens / seconds, 1e-12 * flops / seconds);
    }
};

int main(int argc, char** argv) {
    try {
        Benchmark(read_case(argc, argv)).run();
    } catch (const Failure& failure) {
        std::fprintf(stderr, "gpu_kernels: %s\n", failure.what());
        return failure.exit_code;
    }
}
