// helixtrain: trains GPT models on long and variable-length sequences.
//
//   configuration -> data -> model -> plan -> loop { run_ops, clip, AdamW } -> checkpoint
//
// This file holds what a training run does, top to bottom: the schedule loop, evaluation, the optimizer step, the
// training loop, main. Everything it calls is under llmc/, see llmc/README.md for the map. test_gpt.cu includes this
// file with TESTING defined, which leaves out main.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <functional>

// configuration, console, metrics, checkpoints
#include "llmc/io/checkpoint.h"
#include "llmc/io/config.h"
#include "llmc/io/log.h"
#include "llmc/io/metrics.h"
#include "llmc/io/signals.h"
// data
#include "llmc/data/loader.h"
#include "llmc/data/tokenizer.h"
// the rank: model, plan, memory
#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/peak.h"
#include "llmc/parallel/rank.h"
#include "llmc/pipeline/run.h"

// ---------------------------------------------------------------------------------------------------------------------
// The schedule loop

// A view of the tensor that op i of the plan uses, at its planned address. `rows` is the number of rows that this step
// has, at most what was planned.
template <class Tensors>
Tensors tensor_of_op(const Rank& rank, const Plan& plan, size_t i, Tensor kind, int layer, int64_t rows) {
    for (const PlacedUse& use : plan.memory[i])
        if (use.tensor == kind && use.layer == layer) {
            Allocator place{rank.activations + use.offset};
            return Tensors(place, rows, rank.options.model);
        }
    throw std::logic_error("the plan gives no such tensor to " + op_name(plan.ops[i]));
}

double run_ops(Rank& rank, const Plan& plan, const Step& step, floatS loss_scale, Observer* observer) {
    const int L = int(rank.options.model.layers);
    const Recompute recompute = rank.options.recompute;
    const BlockContext ctx{
        rank.device, rank.options.model, {rank.workspace}, rank.options.mlp_chunk, rank.options.head_chunk};
    if (observer) observer->losses.resize(step.chunks.size());
    double loss = 0;

    for (size_t i = 0; i < plan.ops.size(); ++i) {
        const Op& op = plan.ops[i];
        rank.current_op = &op;
        const int l = op.layer;
        const ChunkTokens& chunk = step.chunks[size_t(op.chunk)];
        const ChunkShape& shape = plan.chunks[size_t(op.chunk)];
        const std::vector<SegmentRows>& segments = step.segments[size_t(op.chunk)];
        const int64_t N = int64_t(chunk.tokens.size());
        const auto w = l < 0 ? LayerTensors<floatX>{} : rank.w.layers[size_t(l)];
        const auto dw = l < 0 || !plan.training ? LayerTensors<floatS>{} : rank.dw.layers[size_t(l)];

        // The op's tensors; each op below takes the ones that `uses` in llmc/pipeline/op.h lists for it.
        const auto x = [&](int layer) {
            return tensor_of_op<ResidualTensor>(rank, plan, i, Tensor::residual, layer, N).rows;
        };
        const auto pre = [&] { return tensor_of_op<PreActivations>(rank, plan, i, Tensor::pre, l, N); };
        const auto attention = [&] {
            return tensor_of_op<AttentionActivations>(rank, plan, i, Tensor::attention, l, N);
        };
        const auto kept_post = [&] {  // in the modes that recompute, nothing is kept
            const bool kept = plan.training && recompute == Recompute::none;
            return kept ? std::optional(tensor_of_op<PostActivations>(rank, plan, i, Tensor::post, l, N))
                        : std::nullopt;
        };
        const auto store = [&] {
            if (shape.store < 0) return Matrix<floatX>();
            return tensor_of_op<StoreTensor>(rank, plan, i, Tensor::store, l, shape.store_tokens).rows;
        };
        const auto d_store = [&] {
            if (shape.store < 0) return Matrix<floatS>();
            return tensor_of_op<StoreGradient>(rank, plan, i, Tensor::d_store, l, shape.store_tokens).rows;
        };
        const auto d_x = [&] { return tensor_of_op<ResidualTensor>(rank, plan, i, Tensor::d_residual, -1, N).rows; };
        const auto d_attention = [&] {
            return tensor_of_op<AttentionGradient>(rank, plan, i, Tensor::d_attention, -1, N).rows;
        };
        const auto d_qkv = [&] { return tensor_of_op<QkvGradient>(rank, plan, i, Tensor::d_qkv, -1, N).rows; };
        floatS* losses = nullptr;
        if (observer && op.part == Part::head) {
            observer->losses[size_t(op.chunk)].resize(size_t(N));
            losses = observer->losses[size_t(op.chunk)].data();
        }

        if (op.pass == Pass::F) switch (op.part) {
                case Part::embed:
                    embed_forward(ctx, rank.w, x(0), chunk.tokens.data(), chunk.positions.data());
                    break;
                case Part::pre:
                    pre_attention_forward(ctx, w, pre(), x(l));
                    break;
                case Part::attention:
                    attention_block_forward(ctx, attention(), pre().qkv, store(), segments);
                    break;
                case Part::post:
                    post_attention_forward(ctx, w, x(l + 1), kept_post(), x(l), attention().out);
                    break;
                case Part::head:
                    loss += head_forward(ctx, rank.w, x(L), chunk.targets.data(), losses);
                    break;
            }
        else switch (op.part) {
                case Part::head:
                    loss += head_backward(ctx, rank.w, rank.dw, d_x(), x(L), chunk.targets.data(), loss_scale, losses);
                    break;
                case Part::post:
                    if (recompute == Recompute::full) {
                        pre_attention_forward(ctx, w, pre(), x(l));
                        attention_block_forward(ctx, attention(), pre().qkv, store(), segments);
                    }
                    post_attention_backward(ctx, w, dw, d_x(), d_attention(), kept_post(), x(l), attention().out);
                    break;
                case Part::attention:
                    if (recompute == Recompute::without_attention) pre_attention_forward(ctx, w, pre(), x(l));
                    attention_block_backward(ctx, d_qkv(), d_attention(), attention(), pre().qkv, store(), d_store(),
                                             segments, shape.last_slice);
                    break;
                case Part::pre:
                    pre_attention_backward(ctx, w, dw, d_x(), d_qkv(), pre(), x(l));
                    break;
                case Part::embed:
                    embed_backward(ctx, rank.dw, d_x(), chunk.tokens.data(), chunk.positions.data());
                    break;
            }
        if (observer && observer->after_op) observer->after_op(i);
    }
    rank.current_op = nullptr;
    return loss;
}

// Forward and backward of one batch. Leaves the gradients of the mean loss in rank.gradients; returns that loss.
double compute_gradients(Rank& rank, const Step& step, Observer* observer = nullptr) {
    fill_zero(rank.device, Matrix<floatS>(rank.gradients, 1, flat_size(rank.parameters)));
    const double count = double(std::max<int64_t>(step.targets, 1));
    return run_ops(rank, rank.plan_for(step.group_sizes, true), step, floatS(1.0 / count), observer) / count;
}

Evaluation evaluate(Rank& rank, const Loader& loader, int64_t batch_tokens, int64_t max_tokens,
                    const std::atomic<bool>* stop) {
    Evaluation total;
    int64_t tokens = 0;
    for (int64_t sample = 0; sample < loader.samples() && !(stop && *stop);) {
        const int64_t left = max_tokens > 0 ? max_tokens - tokens : batch_tokens;
        const Batch batch = next_batch(loader, sample, std::min(batch_tokens, left), loader.samples());
        if (tokens > 0 && batch.tokens > left) break;  // a batch has one sample at least
        const Step step = prepare_step(batch, rank.options.chunk_tokens, rank.options.model);
        total.loss += run_ops(rank, rank.plan_for(step.group_sizes, false), step, 0);
        total.targets += step.targets;
        tokens += batch.tokens;
        sample = batch.next_sample;
    }
    total.loss /= double(std::max<int64_t>(total.targets, 1));
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// The optimizer step

// Learning rate of step 1, 2, ... steps: linear warm-up, then
//   cosine    half a cosine down to the minimum
//   wsd       constant, then linear down to the minimum over the last --decay-fraction of the steps
//   constant
double learning_rate(const Config& c, int64_t step) {
    const auto& t = c.training;
    if (step <= t.warmup) return t.lr * double(step) / double(t.warmup);
    const double low = t.lr * t.min_lr_fraction;
    if (t.lr_schedule == "cosine") {
        const double progress = double(step - t.warmup) / double(std::max<int64_t>(t.steps - t.warmup, 1));
        return low + 0.5 * (t.lr - low) * (1 + std::cos(M_PI * progress));
    }
    if (t.lr_schedule == "wsd") {
        const double length = std::max(1.0, t.decay_fraction * double(t.steps));
        return low + (t.lr - low) * std::min(1.0, double(t.steps - step) / length);
    }
    return t.lr;
}

double gradient_norm(const Rank& rank) {
    return std::sqrt(sum_of_squares(rank.device, rank.gradients, flat_size(rank.parameters)));
}

// One AdamW update of all parameters. `update` counts from 1.
void update_parameters(Rank& rank, AdamW adamw) {
    for (const Parameter& p : rank.parameters)
        adamw_update(rank.device, rank.weights + p.offset, rank.master + p.offset, rank.gradients + p.offset,
                     rank.m + p.offset, rank.v + p.offset, p.size(), adamw, p.decay);
}

// Weights as matrix products read them, from the master weights: after initialisation and loading.
void round_weights(Rank& rank) {
    const int64_t n = flat_size(rank.parameters);
    if constexpr (!std::is_same_v<floatX, floatS>)
        copy_rows(rank.device, Matrix<floatX>(rank.weights, 1, n), Matrix<const floatS>(rank.master, 1, n));
}

// ---------------------------------------------------------------------------------------------------------------------
// Non-finite steps (README, "Exit codes")

bool weights_are_finite(const Rank& rank) {
    return first_nonfinite(rank.device, rank.master, flat_size(rank.parameters)) < 0;
}

// The weight that is not finite, or else the gradient nearest to the loss: the backward pass carries what went wrong
// from the head towards the embedding.
std::string name_nonfinite(const Rank& rank) {
    for (const floatS* flat : {rank.master, rank.gradients})
        for (auto p = rank.parameters.rbegin(); p != rank.parameters.rend(); ++p) {
            const int64_t element = first_nonfinite(rank.device, flat + p->offset, p->size());
            if (element >= 0)
                return std::string(flat == rank.gradients ? "gradient of " : "weight ") + p->name + "[" +
                       std::to_string(element / p->cols) + ", " + std::to_string(element % p->cols) + "]";
        }
    return "loss";
}

// Computes the step once more: different bits mean that the hardware erred, equal bits that data or optimisation did.
[[noreturn]] void stop_at_nonfinite(Rank& rank, const Step& step, int64_t number, double loss) {
    const std::string where = name_nonfinite(rank);
    const size_t bytes = size_t(flat_size(rank.parameters)) * sizeof(floatS);
    const XXH64_hash_t first = XXH3_64bits(rank.gradients, bytes);
    const double again = compute_gradients(rank, step);
    const bool same = XXH3_64bits(rank.gradients, bytes) == first && std::memcmp(&again, &loss, sizeof loss) == 0;
    const std::string what =
        "step " + std::to_string(number) + ": " + where + " is not finite (loss " + std::to_string(loss) + "). ";
    if (same)
        throw Failure(EXIT_NONFINITE,
                      what +
                          "A replay gave the same bits, so data or optimisation are the cause: lower --lr, raise "
                          "--warmup, or pass such steps over with --on-nonfinite skip");
    throw Failure(EXIT_HARDWARE,
                  what + "A replay on rank " + std::to_string(rank.index) +
                      " gave different bits, so the hardware is the cause: take this machine out and resume elsewhere");
}

// ---------------------------------------------------------------------------------------------------------------------
// The training run

GptConfig model_of(const Config& c) {
    const auto& m = c.model;
    return {m.layers, m.channels, m.heads, m.context, m.vocab, round_up(m.vocab, 64), !m.untied};
}

Recompute recompute_of(const Config& c) {
    if (c.compute.recompute == "full") return Recompute::full;
    return c.compute.recompute == "none" ? Recompute::none : Recompute::without_attention;
}

RankOptions rank_options(const Config& c, bool training) {
    return {model_of(c),
            recompute_of(c),
            c.data.chunk_tokens,
            c.compute.mlp_chunk,
            c.compute.head_chunk,
            int(c.compute.threads),
            training};
}

LoaderOptions loader_options(const Config& c, const Tokenizer& tokenizer, uint64_t seed) {
    return {c.data.packing == "documents" ? Packing::documents : Packing::contiguous,
            c.model.context,
            c.model.vocab,
            tokenizer.end_of_text(),
            seed,
            true};
}

// Bytes of this run by kind, and what would fit if they do not. Called before anything is allocated.
void check_memory(const Config& c, const MemoryPlan& plan) {
    const int64_t available = c.compute.memory ? c.compute.memory : available_memory();
    if (plan.total() <= available) return;
    const int64_t fixed = plan.weights + plan.master + plan.gradients + plan.moments;
    const int64_t least_chunk = std::min<int64_t>(128, c.data.chunk_tokens);
    std::string advice;  // the first of ever smaller layouts that fits
    for (int64_t chunk = c.data.chunk_tokens; fixed < available && chunk >= least_chunk && advice.empty(); chunk /= 2)
        for (const char* recompute : {"none", "without-attention", "full"}) {
            Config smaller = c;
            smaller.compute.recompute = recompute;
            smaller.data.chunk_tokens = chunk;
            smaller.compute.head_chunk = std::min<int64_t>(chunk, 128);
            if (!advice.empty() || plan_memory(rank_options(smaller, true)).total() > available) continue;
            advice = "--recompute " + std::string(recompute) + " --chunk-tokens " + std::to_string(chunk) +
                     " --head-chunk " + std::to_string(smaller.compute.head_chunk) + " fits";
        }
    if (advice.empty() && fixed >= available)
        advice = "weights, gradients and moments alone take " + bytes_text(fixed) + ": choose a smaller model";
    if (advice.empty()) advice = "chunks of 128 tokens do not fit, either: choose a smaller model or fewer --threads";
    throw Failure(EXIT_MEMORY, "the plan takes " + bytes_text(plan.total()) + ", " + bytes_text(available) +
                                   " are available; " + advice);
}

std::vector<TableRow> memory_table(const MemoryPlan& plan) {
    return {{"weights", bytes_text(plan.weights)},
            {"master weights", bytes_text(plan.master)},
            {"gradients", bytes_text(plan.gradients)},
            {"moments", bytes_text(plan.moments)},
            {"activations", bytes_text(plan.activations)},
            {"workspace", bytes_text(plan.workspace + plan.scratch)},
            {"total", bytes_text(plan.total())}};
}

// A run in progress: the configuration, the rank, and where it stands.
struct Training {
    Config config;
    Rank rank;
    Loader loader;
    std::optional<Loader> val_loader;
    TrainingState state;
    int64_t updates = 0;              // optimizer steps taken: steps less the skipped ones
    StepRecord last_record = {};      // the line of the metrics for state.step,
    bool validation_pending = false;  // which a signal has cost its validation loss

    CheckpointView view() { return {rank.options.model, rank.parameters, rank.master, rank.m, rank.v}; }
};

void save(Training& run, MetricsWriter& metrics) {
    run.state.extra = {{"updates", run.updates},
                       {"data_tokens", run.loader.stream_tokens()},
                       {"last_record", nlohmann::json::parse(json_line(run.last_record))},
                       {"validation_pending", run.validation_pending}};
    metrics.sync();  // a checkpoint never knows of steps that the metrics have lost
    save_checkpoint(run.config.run.dir, run.view(), run.state, int(run.config.run.keep));
}

// The lines in which two effective configurations differ; those that only say how far to go do not count.
std::vector<std::string> changed_settings(const std::string& before, const std::string& after) {
    std::map<std::string, std::string> values;
    std::vector<std::string> changes;
    const auto for_each_setting = [](const std::string& toml, const auto& body) {
        std::stringstream lines(toml);
        for (std::string line; std::getline(lines, line);)
            if (const size_t at = line.find(" = "); at != std::string::npos)
                body(line.substr(0, at), line.substr(at + 3));
    };
    for_each_setting(before, [&](const std::string& name, const std::string& value) { values[name] = value; });
    for_each_setting(after, [&](const std::string& name, const std::string& value) {
        if (values[name] != value && name != "resume" && name != "stop-after" && name != "run-dir")
            changes.push_back(name + " has changed from " + values[name] + " to " + value);
    });
    return changes;
}

// Where the weights come from: the newest checkpoint of the run, a Hugging Face GPT-2, or the seed.
std::string start_weights(Training& run) {
    Config& c = run.config;
    std::string from;
    if (const auto found = c.run.resume ? find_latest_checkpoint(c.run.dir) : std::nullopt) {
        run.state = restore_checkpoint(*found, run.view(), Restore::all);
        for (const std::string& note : run.state.notes) std::fprintf(stderr, "%s\n", note.c_str());
        for (const std::string& change : changed_settings(run.state.configuration, effective_toml(c)))
            std::fprintf(stderr, "since the checkpoint, %s\n", change.c_str());
        const nlohmann::json& extra = run.state.extra;
        if (extra.at("data_tokens") != run.loader.stream_tokens())
            std::fprintf(stderr,
                         "since the checkpoint, the data have changed: %lld tokens instead of %lld; sample %lld is "
                         "another one\n",
                         (long long)run.loader.stream_tokens(), (long long)extra.at("data_tokens"),
                         (long long)run.state.sample_index);
        run.updates = extra.at("updates");
        run.validation_pending = extra.at("validation_pending");
        run.last_record = record_from_json(extra.at("last_record"));
        from = found->directory;
    } else if (!c.run.init_from.empty()) {
        init_from_huggingface(c.run.init_from, run.view());
        from = c.run.init_from;
    } else {
        initialize_parameters(run.rank.master, run.rank.options.model, uint64_t(c.training.seed));
        from = "seed " + std::to_string(c.training.seed);
    }
    round_weights(run.rank);
    return from;
}

// Trains until --steps, --stop-after or a signal. Returns the exit code.
int training_loop(Training& run, Signals& signals, MetricsWriter& metrics, Console& console, double peak_gflops) {
    Rank& rank = run.rank;
    const Config& c = run.config;
    const int64_t last = c.run.stop_after ? std::min(c.run.stop_after, c.training.steps) : c.training.steps;
    const auto validate = [&](int64_t step) -> std::optional<double> {
        const bool due = step == 0 || step == c.training.steps || (c.run.val_every && step % c.run.val_every == 0);
        if (!run.val_loader || !due) return std::nullopt;
        const Evaluation result =
            evaluate(rank, *run.val_loader, c.data.batch_tokens, c.run.val_tokens, &signals.stop_wanted);
        run.validation_pending = signals.stop_wanted;  // it may have ended early; whoever resumes makes up for it
        return run.validation_pending ? std::nullopt : std::optional(result.loss);
    };
    const auto log_step = [&](const StepRecord& record) {
        metrics.write(record);
        console.step(record);
    };

    if (run.state.step == 0) {
        if (run.val_loader) log_step({.step = 0, .val_loss = validate(0)});
    } else if (run.validation_pending) {
        run.last_record.val_loss = validate(run.state.step);
        log_step(run.last_record);
    }
    const int64_t first_step = run.state.step;
    int64_t saved_step = run.state.step;
    while (run.state.step < last && !signals.stop_wanted) {
        const auto start = std::chrono::steady_clock::now();
        const Batch batch = next_batch(run.loader, run.state.sample_index, c.data.batch_tokens);
        const Step step = prepare_step(batch, c.data.chunk_tokens, rank.options.model);
        const int64_t number = run.state.step + 1;

        const double loss = compute_gradients(rank, step);
        const double norm = gradient_norm(rank);
        const double lr = learning_rate(c, number);
        if (std::isfinite(loss) && std::isfinite(norm)) {
            const auto& t = c.training;
            const double scale = t.clip > 0 && norm > t.clip ? t.clip / norm : 1;
            update_parameters(rank, {lr, t.beta1, t.beta2, t.eps, t.weight_decay, ++run.updates, scale});
        } else if (c.training.on_nonfinite == "stop" || !weights_are_finite(rank)) {
            stop_at_nonfinite(rank, step, number, loss);
        } else {
            console.note("step " + std::to_string(number) + " skipped: " + name_nonfinite(rank) + " is not finite");
        }
        run.state.step = number;
        run.state.sample_index = batch.next_sample;

        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        run.last_record = {.step = number,
                           .loss = loss,
                           .val_loss = validate(number),
                           .grad_norm = norm,
                           .lr = lr,
                           .ms = seconds * 1e3,
                           .tokens_per_second = double(step.tokens) / seconds,
                           .mfu = step.flops / seconds / (peak_gflops * 1e9),
                           .memory_bytes = resident_bytes()};
        log_step(run.last_record);
        if (number == first_step + 3)
            console.note(format("resident memory: planned %.1f MiB, grown %.1f MiB",
                                double(rank.memory.total()) / (1 << 20),
                                double(resident_bytes() - rank.resident_before) / (1 << 20)));

        const bool due = c.run.checkpoint_every && number % c.run.checkpoint_every == 0;
        if (due || signals.checkpoint_wanted.exchange(false)) {
            save(run, metrics);
            saved_step = number;
        }
    }
    if (saved_step != run.state.step) save(run, metrics);
    return run.state.step < last || run.validation_pending ? EXIT_REQUEUE : 0;
}

// What this run is, before its first step.
void print_start(const Training& run, const std::string& weights_from, double peak_gflops) {
    const Config& c = run.config;
    const GptConfig& g = run.rank.options.model;
    const auto tokens_text = [](const Loader& loader) {
        return std::to_string(loader.stream_tokens()) + " tokens, " + std::to_string(loader.samples()) +
               " samples an epoch";
    };
    print_table(
        "run " + c.run.dir,
        {{"device", "CPU, " + std::to_string(c.compute.threads) + " threads, " + isa_name(cpu_isa()) +
                        ", " PRECISION_NAME + format(", measured matrix peak %.0f GFLOP/s", peak_gflops)},
         {"model", c.model.name + ": " + std::to_string(g.layers) + " layers, " + std::to_string(g.channels) +
                       " channels, " + std::to_string(g.heads) + " heads, context " + std::to_string(g.context) +
                       ", vocabulary " + std::to_string(g.vocab) + (g.tied ? ", tied head, " : ", untied head, ") +
                       std::to_string(parameter_count(g)) + " parameters"},
         {"weights", "from " + weights_from},
         {"data", c.data.train + ": " + tokens_text(run.loader) + ", " + c.data.packing},
         {"validation", run.val_loader ? c.data.val + ": " + tokens_text(*run.val_loader) : "off: no --val-data"},
         {"step", std::to_string(c.data.batch_tokens) + " tokens in chunks of at most " +
                      std::to_string(c.data.chunk_tokens) + ", recompute " + c.compute.recompute}});
}

// --init-from: sizes that were not asked for come with the weights, and those that were must be theirs.
void take_sizes_of(Config& c, std::string& source) {
    if (path_exists(checkpoint_root(source))) source = find_checkpoint(source).directory;
    const GptConfig found = read_model_config(source);
    std::vector<std::string> violations;
    const auto take = [&](const char* name, int64_t& size, int64_t value) {
        if (size && size != value)
            violations.push_back("--" + std::string(name) + " " + std::to_string(size) + ", --init-from " + source +
                                 " has " + std::to_string(value) + "; use --" + name + " " + std::to_string(value));
        size = value;
    };
    take("layers", c.model.layers, found.layers);
    take("channels", c.model.channels, found.channels);
    take("heads", c.model.heads, found.heads);
    take("context", c.model.context, found.context);
    take("vocab", c.model.vocab, found.vocab);
    if (!violations.empty()) refuse_config(violations);
    c.model.untied = !found.tied;
    if (c.data.tokenizer.empty()) c.data.tokenizer = found.vocab == 257 ? "bytes" : "gpt2";
    complete_config(c);
}

int train_command(Config c) {
    if (!c.run.init_from.empty()) take_sizes_of(c, c.run.init_from);
    const RankOptions options = rank_options(c, true);
    const MemoryPlan plan = plan_memory(options);
    print_table("memory", memory_table(plan));
    if (c.run.dry_run) return 0;
    check_memory(c, plan);

    std::atomic<Rank*> running = nullptr;  // for SIGQUIT
    Signals signals([&] {
        Rank* rank = running;
        const Op* op = rank ? rank->current_op.load() : nullptr;
        return "rank 0: " + (op ? op_name(*op) : std::string("between steps"));
    });
    const Tokenizer tokenizer(c.data.tokenizer);
    std::optional<Loader> val_loader;
    if (!c.data.val.empty()) val_loader.emplace(open_token_files(c.data.val), loader_options(c, tokenizer, 0));
    Loader loader(open_token_files(c.data.train), loader_options(c, tokenizer, uint64_t(c.training.seed)));
    create_directories(c.run.dir);
    const DirectoryLock lock(c.run.dir);

    Training run{c, Rank(options), std::move(loader), std::move(val_loader), {}, 0};
    running = &run.rank;
    const std::string from = start_weights(run);
    run.state.seed = uint64_t(c.training.seed);
    run.state.tokenizer = tokenizer.name();
    run.state.end_of_text = tokenizer.end_of_text();
    run.state.configuration = effective_toml(c);
    run.state.schedule = {{"kind", c.training.lr_schedule}, {"lr", c.training.lr}, {"steps", c.training.steps}};
    write_file(c.run.dir + "/config.toml", effective_toml(c));

    const int threads = int(c.compute.threads);
    const double peak_gflops = std::is_same_v<floatX, bf16> ? measure_bf16_peak(threads) : measure_fp32_peak(threads);
    print_start(run, from, peak_gflops);
    const int64_t logged = run.state.step > 0 ? run.state.step - run.validation_pending : -1;
    MetricsWriter metrics(c.run.dir + "/metrics.jsonl", logged);
    Console console(c.training.steps);
    try {
        const int code = training_loop(run, signals, metrics, console, peak_gflops);
        running = nullptr;
        return code;
    } catch (const Failure& failure) {
        running = nullptr;
        const bool said = std::string(failure.what()).find("good checkpoint") != std::string::npos;
        if (failure.exit_code != EXIT_STORAGE || said) throw;
        throw Failure(EXIT_STORAGE, failure.what() + (" " + last_good_checkpoint(c.run.dir)));
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#ifndef TESTING
#include "llmc/commands/doctor.h"
#include "llmc/commands/eval.h"
#include "llmc/commands/generate.h"
#include "llmc/commands/tokenize.h"

// Idle OpenMP threads spin for milliseconds before they sleep, which costs dear where other programs or ranks want the
// core. libgomp reads how long before main begins, so the program starts itself once more with a short time.
void spin_briefly(char** argv) {
    if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
    setenv("GOMP_SPINCOUNT", "20000", 1);
    execv("/proc/self/exe", argv);  // where that fails, threads spin
}

int main(int argc, char** argv) {
    spin_briefly(argv);
    try {
        cpu_isa();  // refuses an impossible HELIXTRAIN_ISA
        const Config config = parse_config(argc, argv);
        omp_set_num_threads(int(config.compute.threads));
        if (config.command == "tokenize")
            return tokenize_command({config.tokenize.inputs, config.tokenize.output, config.data.tokenizer,
                                     config.data.tokenizer_dir, config.tokenize.holdout_every,
                                     config.tokenize.max_bytes, config.tokenize.extensions,
                                     config.tokenize.shard_tokens});
        if (config.command == "generate") return generate_command(config);
        if (config.command == "eval") return eval_command(config);
        if (config.command == "doctor") return doctor_command(config);
        return train_command(config);
    } catch (const HelpRequested& help) {
        std::fputs(help.text.c_str(), stdout);
        return 0;
    } catch (const Failure& failure) {
        std::fprintf(stderr, "train_gpt: %s\n", failure.what());
        return failure.exit_code;
    } catch (const std::bad_alloc&) {
        std::fprintf(stderr, "train_gpt: out of memory; choose a smaller model or batch\n");
        return EXIT_MEMORY;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "train_gpt: internal error, please report it: %s\n", error.what());
        return EXIT_INTERNAL;
    }
}
#endif
