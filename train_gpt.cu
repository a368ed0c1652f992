// helixtrain: trains GPT models on long and variable-length sequences.
//
//   configuration -> data -> model -> plan -> loop { run_ops, clip, AdamW } -> checkpoint
//
// This file holds what a training run does, top to bottom: the schedule loop, evaluation, the optimizer step, the
// training loop, main. Everything it calls is under llmc/, see llmc/README.md for the map. test_gpt.cu includes this
// file with TESTING defined, which leaves out main.
#include <unistd.h>

#include <cstdio>

// configuration, console, metrics, checkpoints
#include "llmc/io/config.h"
#include "llmc/io/log.h"
#include "llmc/io/metrics.h"
#include "llmc/io/signals.h"
#include "llmc/parallel/checkpoint.h"
// data
#include "llmc/data/loader.h"
#include "llmc/data/tokenizer.h"
// the rank: model, plan, memory
#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/peak.h"
#include "llmc/parallel/choose_schedule.h"
#include "llmc/parallel/compare_layouts.h"
#include "llmc/parallel/memory.h"
#include "llmc/parallel/planned_run.h"
#include "llmc/parallel/rank.h"
#include "llmc/parallel/run.h"
#include "llmc/parallel/team.h"

// ---------------------------------------------------------------------------------------------------------------------
// The schedule loop

// The tensors that an op of the plan takes, as views at their planned addresses; `uses` in llmc/pipeline/uses.h lists
// them. N is the number of rows that the chunk has in this step, at most what was planned; an op on a row piece gets
// the rows of the piece.
struct OpTensors {
    const Rank& rank;
    const Plan& plan;
    size_t op;
    int64_t N;

    std::byte* find(Tensor tensor, int layer) const {
        for (const PlacedUse& use : plan.memory[op])
            if (use.tensor == tensor && use.layer == layer) return rank.activations + use.offset;
        return nullptr;
    }
    Allocator place(Tensor tensor, int layer) const {
        if (std::byte* address = find(tensor, layer)) return {address};
        throw std::logic_error("the plan gives no " + std::string(tensor_name(tensor)) + " to " +
                               op_name(plan.ops[op]));
    }
    RowRange piece() const { return piece_rows(plan.ops[op], N); }
    template <class T>
    Matrix<T> rows(Tensor tensor, int layer) const {
        Allocator at = place(tensor, layer);
        const Matrix<T> all = RowsTensor<T>(at, N, tensor_columns(tensor, rank.options.model)).rows;
        return all.row_range(piece().begin, piece().count);
    }
    NormStatistics ln1_stats(int layer) const {
        Allocator at = place(Tensor::ln1_stats, layer);
        NormStatistics stats(at, N);
        stats.mean += piece().begin, stats.rstd += piece().begin;
        return stats;
    }
    // The weights of pre_attention and their gradients: where they are apart from it, else the rank's own.
    LayerTensors<floatX> pre_weights(int layer) const {
        if (!find(Tensor::qkv_weights, layer)) return rank.w.layers[size_t(layer)];
        Allocator at = place(Tensor::qkv_weights, layer);
        return MovedWeights<floatX>(at, rank.options.model).tensors;
    }
    LayerTensors<floatS> d_pre_weights(int layer) const {
        if (!find(Tensor::d_qkv_weights, layer)) return rank.dw.layers[size_t(layer)];
        Allocator at = place(Tensor::d_qkv_weights, layer);
        return MovedWeights<floatS>(at, rank.options.model).tensors;
    }
};

// Those of them that travel with the products, as matrices of one row.
template <class T>
std::vector<Matrix<T>> moved_tensors(const LayerTensors<T>& t, const HelixOptions& helix, int64_t C) {
    std::vector<Matrix<T>> list = {{t.qkv_weight, 1, 3 * C * C}, {t.qkv_bias, 1, 3 * C}};
    if (helix.move_norm) list.insert(list.end(), {{t.ln1_weight, 1, C}, {t.ln1_bias, 1, C}});
    return list;
}

// What a send or receive carries.
void append_transfers(std::vector<Transfer>& transfers, const OpTensors& t) {
    const Op& op = t.plan.ops[t.op];
    const int64_t C = t.rank.options.model.channels;
    const auto append = [&]<class T>(const Matrix<T>& rows) {
        if (rows.size() > 0)
            transfers.push_back({op.kind == Kind::send, op.peer, rows.data, rows.size() * int64_t(sizeof(T))});
    };
    const auto append_weights = [&](const auto& weights) {
        for (const auto& tensor : moved_tensors(weights, t.plan.rules.helix, C)) append(tensor);
    };
    for (const Use& use : message_contents(op, t.plan.rules)) switch (use.tensor) {
            case Tensor::residual:
            case Tensor::d_residual:
                append(t.rows<floatR>(use.tensor, use.layer));
                break;
            case Tensor::qkv_weights:
                append_weights(t.pre_weights(use.layer));
                break;
            case Tensor::d_qkv_weights:
                append_weights(t.d_pre_weights(use.layer));
                break;
            case Tensor::delta:
                append(t.rows<floatS>(use.tensor, use.layer));
                break;
            default:
                append(t.rows<floatX>(use.tensor, use.layer));
        }
}

// One op: its part of the model, forward or backward, on one chunk or a row piece of it. A head adds its losses to
// rank.loss.
void compute(Rank& rank, const Plan& plan, size_t i, floatS loss_scale, Observer* observer) {
    const Op& op = plan.ops[i];
    const TensorRules& rules = plan.rules;
    const int l = op.layer, L = rules.layers;
    const int64_t C = rank.options.model.channels;
    const Recompute mode = rules.mode(op);
    const bool none = mode == Recompute::none, elementwise = mode == Recompute::elementwise;
    const bool full = mode == Recompute::full;
    const bool move = rules.helix.move_qkv, norm = rules.helix.move_norm, weights_too = rules.helix.weights_with(op);
    const BlockContext ctx{
        rank.device, rank.options.model, {rank.workspace}, rank.options.mlp_chunk, rank.options.head_chunk};
    const ChunkInputs& inputs = rank.inputs.chunks[size_t(op.chunk)];
    const ChunkShape& shape = plan.chunks[size_t(op.chunk)];
    const Segments& segments = inputs.segments;
    const auto w = l < 0 ? LayerTensors<floatX>{} : rank.w.layers[size_t(l)];
    const auto dw = l < 0 || !rules.training ? LayerTensors<floatS>{} : rank.dw.layers[size_t(l)];

    const OpTensors t{rank, plan, i, inputs.tokens};
    const RowRange piece = t.piece();
    if (piece.count == 0) return;
    const auto x = [&](int layer) { return t.rows<floatR>(Tensor::residual, layer); };
    const auto ln1 = [&] { return t.rows<floatX>(Tensor::ln1, l); };
    const auto qkv = [&] { return t.rows<floatX>(Tensor::qkv, l); };
    const auto attention_out = [&] { return t.rows<floatX>(Tensor::attention_out, l); };
    const auto lse = [&] { return t.rows<floatS>(Tensor::lse, l); };
    // Beside the attention: its LayerNorm, if that has moved there, and the products for queries, keys and values.
    const auto moved_forward = [&](bool products) {
        const LayerTensors<floatX> weights = t.pre_weights(l);
        if (norm)
            pre_attention_forward(ctx, weights, ln1(), t.ln1_stats(l), products ? std::optional(qkv()) : std::nullopt,
                                  x(l));
        else if (products) matmul_forward(rank.device, qkv(), ln1(), {weights.qkv_weight, 3 * C, C}, weights.qkv_bias);
    };
    const auto kept_post = [&]() -> std::optional<PostActivations> {
        if (Allocator at{t.find(Tensor::post, l)}; at.base)
            return PostActivations(at, t.N, rank.options.model).row_range(piece.begin, piece.count);
        if (Allocator at{t.find(Tensor::post_products, l)}; at.base)
            return PostActivations(PostProducts(at, t.N, rank.options.model).row_range(piece.begin, piece.count));
        return std::nullopt;
    };
    const auto d_post = [&] {
        Allocator at = t.place(Tensor::d_post, l);
        return PostGradients(at, t.N, rank.options.model).row_range(piece.begin, piece.count);
    };
    const auto store = [&]<class T>(Tensor tensor, T) {
        if (shape.store < 0) return Matrix<T>();
        return OpTensors{rank, plan, i, shape.store_tokens}.rows<T>(tensor, l);
    };
    const auto kv_store = [&] { return store(Tensor::store, floatX()); };
    const auto d_x = [&] { return t.rows<floatR>(Tensor::d_residual, -1); };
    const auto d_attention = [&] { return t.rows<floatX>(Tensor::d_attention, l); };
    const auto pre_gradient = [&](int layer) {
        if (move) return PreGradient{{}, t.rows<floatX>(Tensor::d_ln1, layer)};
        return PreGradient{t.rows<floatX>(Tensor::d_qkv, layer), {}};
    };
    floatS* losses = nullptr;
    if (observer && op.part == Part::head) {
        observer->losses[size_t(op.chunk)].resize(size_t(t.N));
        losses = observer->losses[size_t(op.chunk)].data();
    }

    if (op.pass == Pass::F) switch (op.part) {
            case Part::embed:
                embed_forward(ctx, rank.w, x(0), inputs.rows);
                break;
            case Part::pre:
                if (norm) break;
                pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), move ? std::nullopt : std::optional(qkv()), x(l));
                break;
            case Part::attention:
                if (move) moved_forward(true);
                attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                break;
            case Part::post:
                post_attention_forward(ctx, w, x(l + 1), kept_post(), x(l), attention_out());
                break;
            case Part::head:
                head_forward(ctx, rank.w, rank.loss.data(), x(L), inputs.targets, losses);
                break;
        }
    if (op.pass == Pass::B) switch (op.part) {
            case Part::head:
                head_backward(ctx, rank.w, rank.dw, d_x(), rank.loss.data(), x(L), inputs.targets, loss_scale, losses);
                break;
            case Part::post: {
                if (full && !rules.apart) {
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), qkv(), x(l));
                    attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                }
                std::optional<NextPre> next;
                if (l + 1 < L && rules.one_block(l + 1))
                    next.emplace(rank.w.layers[size_t(l) + 1], rank.dw.layers[size_t(l) + 1], pre_gradient(l + 1));
                post_attention_backward(ctx, w, dw, d_x(), d_attention(), kept_post(),
                                        rules.keeps_post(l) || elementwise ? Matrix<floatR>() : x(l), attention_out(),
                                        op.split ? std::optional(d_post()) : std::nullopt, next);
                if (t.find(Tensor::delta, l))
                    attention_delta(rank.device, t.rows<floatS>(Tensor::delta, l), d_attention(), attention_out());
                break;
            }
            case Part::attention: {
                if (!none && move) moved_forward(!elementwise);
                if (full && rules.apart)
                    attention_block_forward(ctx, attention_out(), lse(), qkv(), kv_store(), segments);
                if (mode == Recompute::without_attention && !rules.apart)
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), qkv(), x(l));
                const Matrix<floatX> d_qkv = t.rows<floatX>(Tensor::d_qkv, l);
                const bool has_delta = t.find(Tensor::delta, l);
                attention_block_backward(ctx, d_qkv, d_attention(), has_delta ? Matrix<floatX>() : attention_out(),
                                         lse(), qkv(), kv_store(), store(Tensor::d_store, floatS()), segments,
                                         shape.last_slice,
                                         has_delta ? t.rows<floatS>(Tensor::delta, l) : Matrix<floatS>());
                if (!move) break;
                const LayerTensors<floatS> d_weights = t.d_pre_weights(l);
                if (weights_too)
                    for (const auto& tensor : moved_tensors(d_weights, rules.helix, C)) fill_zero(rank.device, tensor);
                qkv_backward_weight(ctx, d_weights, d_qkv, ln1());
                if (norm)
                    pre_attention_backward(ctx, t.pre_weights(l), d_weights, d_x(), {d_qkv, {}}, t.ln1_stats(l), x(l));
                else
                    matmul_backward_input(rank.device, t.rows<floatX>(Tensor::d_ln1, l), d_qkv,
                                          {t.pre_weights(l).qkv_weight, 3 * C, C});
                break;
            }
            case Part::pre:
                if (weights_too) {  // the sum of another rank or, of every chunk, its own
                    const auto sums = moved_tensors(dw, rules.helix, C);
                    const auto added = moved_tensors(t.d_pre_weights(l), rules.helix, C);
                    for (size_t n = 0; n < sums.size(); ++n) add_rows(rank.device, sums[n], added[n]);
                }
                if (norm) break;                // the rest ran with the attention
                if (rules.one_block(l)) break;  // the rest is part of post's backward, the next op
                if ((rules.apart && !none) || elementwise)
                    pre_attention_forward(ctx, w, ln1(), t.ln1_stats(l), std::nullopt, x(l));
                if (!move && !op.split) qkv_backward_weight(ctx, dw, pre_gradient(l).d_qkv, ln1());
                pre_attention_backward(ctx, w, dw, d_x(), pre_gradient(l), t.ln1_stats(l), x(l));
                break;
            case Part::embed:
                embed_backward(ctx, rank.dw, d_x(), inputs.rows);
                break;
        }
    if (op.pass == Pass::W) {
        if (op.part == Part::pre) qkv_backward_weight(ctx, dw, t.rows<floatX>(Tensor::d_qkv, l), ln1());
        if (op.part == Part::post)
            post_attention_backward_weight(ctx, w, dw, d_post(), kept_post().value(), attention_out());
    }
}

// To whom a list sends next, at each op; -1: to nobody.
std::vector<int> next_peers(const std::vector<Op>& ops) {
    std::vector<int> peers(ops.size());
    int peer = -1;
    for (size_t i = ops.size(); i-- > 0; peers[i] = peer)
        if (ops[i].kind == Kind::send) peer = ops[i].peer;
    return peers;
}

void run_ops(OpLoop& loop, const Plan& plan, const OpActions& actions) {
    Progress& progress = loop.progress;
    OpClock& clock = loop.clock;
    struct Posted {
        int64_t batch, begin, end;  // numbers of the first transfer of the batch, and of the op's own
        int64_t bytes;
        OpClock::Moment moment;
    };
    std::vector<Posted> posted(plan.ops.size());  // [send or receive]
    struct Event {
        EventKind kind;
        Op op;
        OpClock::Moment begin, end;
        int64_t bytes = 0;
    };
    std::vector<Event> events;
    std::vector<Transfer> transfers;
    const std::vector<int> next_peer = next_peers(plan.ops);
    int64_t posted_end = 0;
    clock.restart();

    for (size_t i = 0; i < plan.ops.size(); ++i) {
        const Op& op = plan.ops[i];
        if (op.kind != Kind::compute) {  // the first of a batch: all of it is posted at once
            transfers.clear();
            size_t end = i;
            for (; end < plan.ops.size() && plan.ops[end].kind != Kind::compute && plan.ops[end].batch == op.batch;
                 ++end) {
                posted[end].begin = int64_t(transfers.size());
                actions.append_transfers(end, transfers);
                posted[end].end = int64_t(transfers.size());
                for (int64_t n = posted[end].begin; n < posted[end].end; ++n)
                    posted[end].bytes += transfers[size_t(n)].bytes;
            }
#ifdef USE_CUDA
            progress.waiting(op);  // until the peer has posted its part of the batch before
#endif
            const double begin = seconds_now();
            const OpClock::Moment moment = clock.now();
            const int64_t first = transfers.empty() ? posted_end : loop.transport.post(transfers);  // pieces of no rows
            posted_end = first + int64_t(transfers.size());
            loop.post_seconds += seconds_now() - begin;
            for (const OpClock::Moment now = clock.now(); i < end; ++i) {
                posted[i] = {first, first + posted[i].begin, first + posted[i].end, posted[i].bytes, moment};
                if (plan.ops[i].kind == Kind::send)
                    events.push_back({EventKind::send, plan.ops[i], moment, now, posted[i].bytes});
            }
            --i;
            continue;
        }
        if (const int receive = plan.receive_of[i]; receive >= 0) {
            // Batches are served in order, so that the earlier ones cost no time; their memory is free from here on.
            const Op& message = plan.ops[size_t(receive)];
            const Posted& p = posted[size_t(receive)];
            const OpClock::Moment begin = clock.now();
            progress.waiting(message);
            loop.transport.wait(0, p.batch);
            loop.transport.wait(p.begin, p.end);
            const OpClock::Moment end = clock.now();
            events.push_back({EventKind::wait, message, begin, end});
            for (const size_t r : plan.receives_of(i))
                events.push_back({EventKind::receive, plan.ops[r], posted[r].moment, end, posted[r].bytes});
        }
        progress.computing(op, next_peer[i], op.part == Part::attention ? actions.attention_work(op.chunk) : 0);
        const ProfilerRange range(op);
        const OpClock::Moment begin = clock.now();
        actions.compute(i);
        events.push_back({EventKind::compute, op, begin, clock.now()});
    }
    progress.busy_with("the end of its ops");
    loop.transport.wait(0, posted_end);
    clock.finish();
    for (const Event& e : events) {
        const double begin = clock.seconds(e.begin), end = clock.seconds(e.end);
        if (e.kind == EventKind::compute) loop.busy_seconds += end - begin;
        if (loop.trace) loop.trace->record(e.kind, e.op, begin - loop.trace_zero, end - loop.trace_zero, e.bytes);
    }
}

// Has a GPU load all kernels of a step, and its matrix products choose their algorithms, before the first step: runs
// every op on whatever is in memory, without messages. A GPU loads kernels when they are first used, and may wait for
// all its streams to do so. Products choose unless the bits of a run are to repeat in another. Only the gradients are
// written to, which every step begins with zeros.
void load_kernels_and_tune([[maybe_unused]] Rank& rank, [[maybe_unused]] const Step& step) {
#ifdef USE_CUDA
    const Plan& plan = rank.plan_for(step.group_sizes, true);
    rank.inputs.load(rank.device, step);
    rank.device.tune_products = !rank.options.deterministic;
    for (size_t i = 0; i < plan.ops.size(); ++i)
        if (plan.ops[i].kind == Kind::compute) compute(rank, plan, i, 1, nullptr);
    rank.device.tune_products = false;
    finish(rank.device);
#endif
}

double run_ops(Rank& rank, const Plan& plan, const Step& step, floatS loss_scale, Observer* observer) {
    rank.inputs.load(rank.device, step);
#ifdef USE_NCCL
    rank.transport.all_gather("");  // whoever asks for memory now may wait for GPUs that wait for messages
#endif
    fill_zero(rank.device, rank.loss.data(), 1);
    if (observer) observer->losses.resize(step.chunks.size());
    run_ops(rank, plan,
            {.compute =
                 [&](size_t i) {
                     compute(rank, plan, i, loss_scale, observer);
                     if (observer && observer->after_op) observer->after_op(i);
                 },
             .append_transfers =
                 [&](size_t i, std::vector<Transfer>& transfers) {
                     const int chunk = plan.ops[i].chunk;
                     append_transfers(transfers, {rank, plan, i, rank.inputs.chunks[size_t(chunk)].tokens});
                 },
             .attention_work = [&](int chunk) { return step.attention_flops[size_t(chunk)]; }});
    double loss = 0;
    download(rank.device, &loss, rank.loss.data(), 1);
    return loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

// A parameter that several ranks hold (a tied embedding whose ends are apart, a spread head) has its gradients added
// up, and all ranks get the same bits: each adds one part of the tensor and passes the sum on. The tensor is taken in
// pieces that fit into the activations, which nobody needs between steps.
void sum_shared_gradients(Rank& rank) {
    floatS* const received = reinterpret_cast<floatS*>(rank.activations);
    const auto exchange = [&](const std::vector<Transfer>& transfers) {
        const auto before = rank.transport.progress.meet();  // waits for all holders
        rank.transport.wait(0, rank.transport.post(transfers) + int64_t(transfers.size()));
        rank.transport.progress.resume(before);
    };
    for (const SharedParameter& shared : rank.shared) {
        const std::vector<int>& holders = shared.holders;
        const int count = int(holders.size());
        const int64_t part = rank.options.shared_part(count);  // plan_memory has room for what comes of it
        for (int64_t begin = 0; begin < shared.size; begin += count * part) {
            std::vector<Transfer> sums, results;
            Matrix<floatS> mine;
            const auto part_of = [&](int holder) {
                const int64_t first = std::min(begin + holder * part, shared.size);
                return Matrix<floatS>(rank.gradients + shared.offset + first, 1, std::min(part, shared.size - first));
            };
            const auto add = [&](std::vector<Transfer>& list, bool send, int peer, floatS* data, int64_t n) {
                if (n > 0) list.push_back({send, peer, data, n * int64_t(sizeof(floatS))});
            };
            for (int n = 0; n < count; ++n)
                if (holders[size_t(n)] == rank.index) mine = part_of(n);
            int others = 0;
            for (int n = 0; n < count; ++n) {
                const int peer = holders[size_t(n)];
                if (peer == rank.index) continue;
                add(sums, true, peer, part_of(n).data, part_of(n).cols);
                add(sums, false, peer, received + others++ * part, mine.cols);
                add(results, true, peer, mine.data, mine.cols);
                add(results, false, peer, part_of(n).data, part_of(n).cols);
            }
            exchange(sums);
            for (int n = 0; n < others; ++n)
                add_rows(rank.device, mine, Matrix<floatS>(received + n * part, 1, mine.cols));
            exchange(results);
        }
    }
}

// Forward and backward of one batch. Leaves the gradients of the mean loss in rank.gradients; returns that loss, the
// same on every rank.
double compute_gradients(Rank& rank, const Step& step, Observer* observer = nullptr) {
    fill_zero(rank.device, Matrix<floatS>(rank.gradients, 1, flat_size(rank.parameters)));
    const double count = double(std::max<int64_t>(step.targets, 1));
    double loss = run_ops(rank, rank.plan_for(step.group_sizes, true), step, floatS(1.0 / count), observer) / count;
    rank.transport.progress.busy_with("the sum of gradients");
    sum_shared_gradients(rank);
    rank.transport.sum({&loss, 1});
    return loss;
}

Evaluation evaluate(Rank& rank, const Loader& loader, int64_t batch_tokens, int64_t max_tokens,
                    const std::atomic<bool>* stop) {
    Evaluation total;
    int64_t tokens = 0;
    for (int64_t sample = 0; sample < loader.samples();) {
        double stopped = stop && *stop;  // signals reach ranks at different times
        rank.transport.sum({&stopped, 1});
        if ((total.ended_early = stopped > 0)) break;
        const int64_t left = max_tokens > 0 ? max_tokens - tokens : batch_tokens;
        const Batch batch = next_batch(loader, sample, std::min(batch_tokens, left), loader.samples());
        if (tokens > 0 && batch.tokens > left) break;  // a batch has one sample at least
        const Step step = prepare_step(batch, rank.options.chunk_tokens, rank.options.model);
        total.loss += run_ops(rank, rank.plan_for(step.group_sizes, false), step, 0);
        total.targets += step.targets;
        tokens += batch.tokens;
        sample = batch.next_sample;
    }
    rank.transport.sum({&total.loss, 1});
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

// Over all ranks; a parameter that several of them hold counts once.
double gradient_norm(const Rank& rank) {
    const auto& held = rank.parameters;
    const auto own = std::find_if(held.begin(), held.end(), [](const Parameter& p) { return !p.copy; });
    const int64_t begin = own == held.end() ? flat_size(held) : own->offset;  // copies come first
    double squares = sum_of_squares(rank.device, rank.gradients + begin, flat_size(held) - begin);
    rank.transport.sum({&squares, 1});
    return std::sqrt(squares);
}

// One AdamW update of all parameters. `update` counts from 1.
void update_parameters(Rank& rank, AdamW adamw) {
    rank.transport.progress.busy_with("the optimizer");
    for (const Parameter& p : rank.parameters) {
        const auto at = [&](auto* flat) { return flat ? flat + p.offset : nullptr; };
        adamw_update(rank.device,
                     {at(rank.weights), at(rank.master), at(rank.gradients), at(rank.m), at(rank.v), p.size(), p.decay,
                      p.index, p.center()},
                     adamw);
    }
}

// The optimizer step of a training step, given the norm of its gradients. `update` is less than `step` where steps have
// been skipped.
void clip_and_update(Rank& rank, const Config& c, int64_t step, int64_t update, double norm) {
    const auto& t = c.training;
    const double scale = t.clip > 0 && norm > t.clip ? t.clip / norm : 1;
    update_parameters(
        rank, {learning_rate(c, step), t.beta1, t.beta2, t.eps, t.weight_decay, update, scale, uint64_t(t.seed)});
}

// to = from + sign x center, for the parameters that are stored less a center; they are few, and this is rare.
template <class T, class U>
void shift_centered(Rank& rank, T* to, U* from, floatS sign) {
    for (const Parameter& p : rank.parameters) {
        if (p.center() == 0) continue;
        HostView<U> source(rank.device, from + p.offset, p.size(), true);
        HostView<T> target(rank.device, to + p.offset, p.size(), false);
        for (int64_t i = 0; i < p.size(); ++i) target.data()[i] = T(floatS(source.data()[i]) + sign * p.center());
        target.store();
    }
}

// Weights as kernels read them, from those in floatS: after initialisation and loading.
void round_weights(Rank& rank) {
    const int64_t n = flat_size(rank.parameters);
    if constexpr (std::is_same_v<floatX, floatS>) return;
    copy_rows(rank.device, Matrix<floatX>(rank.weights, 1, n), Matrix<const floatS>(rank.full_weights(), 1, n));
    shift_centered(rank, rank.weights, rank.full_weights(), -1);
}

// The other way, between steps: the weights in floatS.
floatS* widen_weights(Rank& rank) {
    const int64_t n = flat_size(rank.parameters);
    if (!rank.master) {
        copy_rows(rank.device, Matrix<floatS>(rank.full_weights(), 1, n), Matrix<const floatX>(rank.weights, 1, n));
        shift_centered(rank, rank.full_weights(), rank.weights, 1);
    }
    return rank.full_weights();
}

// ---------------------------------------------------------------------------------------------------------------------
// Non-finite steps (README, "Exit codes")

bool weights_are_finite(const Rank& rank) {
    double wrong = first_nonfinite(rank.device, rank.weights, flat_size(rank.parameters)) >= 0;
    rank.transport.sum({&wrong, 1});
    return wrong == 0;
}

// The weight that is not finite, or else the gradient nearest to the loss: the backward pass carries what went wrong
// from the head towards the embedding.
std::string name_nonfinite(const Rank& rank) {
    std::string found;  // "1 00017 weight h.1..." sorts after all that is less telling
    const auto look = [&](const auto* flat, int rating, const char* kind) {
        for (const Parameter& p : rank.parameters)
            if (const int64_t element = first_nonfinite(rank.device, flat + p.offset, p.size()); element >= 0)
                found = std::max(found, format("%d %05d ", rating, p.index) + kind + p.name + "[" +
                                            std::to_string(element / p.cols) + ", " + std::to_string(element % p.cols) +
                                            "]");
    };
    look(rank.gradients, 0, "gradient of ");
    look(rank.weights, 1, "weight ");
    const std::vector<std::string> all = rank.transport.all_gather(found);
    const std::string& name = *std::max_element(all.begin(), all.end());
    return name.empty() ? "loss" : name.substr(8);
}

// Computes the step once more: different bits mean that the hardware erred, equal bits that data or optimisation did.
[[noreturn]] void stop_at_nonfinite(Rank& rank, const Step& step, int64_t number, double loss) {
    const std::string where = name_nonfinite(rank);
    const auto hash_of_gradients = [&] {
        HostView<floatS> gradients(rank.device, rank.gradients, flat_size(rank.parameters), true);
        return XXH3_64bits(gradients.data(), size_t(gradients.size()) * sizeof(floatS));
    };
    const XXH64_hash_t first = hash_of_gradients();
    const double again = compute_gradients(rank, step);
    const bool same = hash_of_gradients() == first && std::memcmp(&again, &loss, sizeof loss) == 0;
    const std::string what =
        "step " + std::to_string(number) + ": " + where + " is not finite (loss " + std::to_string(loss) + "). ";
    std::string differ;
    for (const std::string& name : rank.transport.all_gather(same ? "" : std::to_string(rank.index)))
        differ += (differ.empty() || name.empty() ? "" : ", ") + name;
    if (!differ.empty() && !repeats_bits(rank.options))
        throw JointFailure(EXIT_NONFINITE,
                           what +
                               "A replay gave different bits, as it may without --deterministic, so that data, "
                               "optimisation or hardware may be the cause: resume with --deterministic, which tells");
    if (differ.empty())
        throw JointFailure(EXIT_NONFINITE,
                           what +
                               "A replay gave the same bits, so data or optimisation are the cause: lower --lr, raise "
                               "--warmup, or pass such steps over with --on-nonfinite skip");
    throw JointFailure(EXIT_HARDWARE, what + "A replay gave different bits on rank " + differ +
                                          ", so the hardware is the cause: take this machine out and resume elsewhere");
}

// ---------------------------------------------------------------------------------------------------------------------
// The training run

std::string layout_text(const RankOptions& o) {
    return std::to_string(o.layout.ranks) + " ranks, schedule " + o.schedule_name();
}

// What the ranks of a process share. All of it is read, or may be used from several threads.
struct Job {
    Config config;
    Tokenizer tokenizer;
    Loader loader;
    std::optional<Loader> val_loader;
    Signals& signals;
    double peak_gflops;              // of all ranks together
    std::optional<Cluster> cluster;  // this machine, where it is described
    int64_t used_before;             // bytes of the device before the ranks begin
};

// A run in progress on one rank: where it stands. Rank 0 alone writes the metrics and speaks.
struct Training {
    const Job& job;
    Rank rank;
    TrainingState state;
    int64_t updates = 0;              // optimizer steps taken: steps less the skipped ones
    StepRecord last_record = {};      // the line of the metrics for state.step,
    bool validation_pending = false;  // which a signal has cost its validation loss
    std::optional<MetricsWriter> metrics = {};
    std::optional<Console> console = {};
    std::optional<PlannedRun> planned = {};

    void note(const std::string& text) {
        if (console) console->note(text);
    }
    void log(const StepRecord& record) {
        if (metrics) metrics->write(record);
        if (console) console->step(record);
    }
};

// What of a rank goes into a checkpoint, on the host.
struct CheckpointState {
    HostView<floatS> weights, m, v;
    CheckpointView view;

    CheckpointState(Rank& rank, bool read)
        : weights(rank.device, widen_weights(rank), flat_size(rank.parameters), read),
          m(rank.device, rank.m, flat_size(rank.parameters), read),
          v(rank.device, rank.v, flat_size(rank.parameters), read),
          view{rank.options.model, rank.parameters, weights.data(), m.data(), v.data()} {}
    void store() { weights.store(), m.store(), v.store(); }
};

void save(Training& run) {
    Transport& transport = run.rank.transport;
    transport.progress.busy_with("saving a checkpoint");
    run.state.extra = {{"updates", run.updates},
                       {"data_tokens", run.job.loader.stream_tokens()},
                       {"last_record", nlohmann::json::parse(json_line(run.last_record))},
                       {"validation_pending", run.validation_pending}};
    transport.together([&] {
        if (run.metrics) run.metrics->sync();  // a checkpoint never knows of steps that the metrics have lost
    });
    const CheckpointState state(run.rank, true);
    save_checkpoint(run.job.config.run.dir, state.view, run.state, int(run.job.config.run.keep), transport);
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
        if (values.count(name) && values[name] != value && name != "resume" && name != "stop-after" &&
            name != "run-dir")
            changes.push_back(name + " has changed from " + values[name] + " to " + value);
    });
    return changes;
}

// Where the weights come from: the newest checkpoint of the run, a Hugging Face GPT-2, or the seed.
std::string start_weights(Training& run) {
    const Config& c = run.job.config;
    Transport& transport = run.rank.transport;
    std::string from = "seed " + std::to_string(c.training.seed);
    const auto found = c.run.resume ? find_latest_checkpoint(c.run.dir, transport) : std::nullopt;
    transport.together([&] {
        CheckpointState start(run.rank, false);
        if (found) run.state = restore_checkpoint(*found, start.view);
        else if (!c.run.init_from.empty()) init_from_huggingface(from = c.run.init_from, start.view);
        else
            initialize_parameters(start.weights.data(), run.rank.parameters, run.rank.options.model,
                                  uint64_t(c.training.seed));
        start.store();
    });
    if (found) {
        const nlohmann::json& extra = run.state.extra;
        std::vector<std::string>& notes = run.state.notes;
        for (const std::string& change : changed_settings(run.state.configuration, effective_toml(c)))
            notes.push_back("since the checkpoint, " + change);
        if (extra.at("data_tokens") != run.job.loader.stream_tokens())
            notes.push_back(
                "since the checkpoint, the data have changed: " + std::to_string(run.job.loader.stream_tokens()) +
                " tokens instead of " + extra.at("data_tokens").dump() + "; sample " +
                std::to_string(run.state.sample_index) + " is another one");
        run.updates = extra.at("updates");
        run.validation_pending = extra.at("validation_pending");
        run.last_record = record_from_json(extra.at("last_record"));
        from = found->directory;
    }
    round_weights(run.rank);
    run.state.seed = uint64_t(c.training.seed);
    run.state.tokenizer = run.job.tokenizer.name();
    run.state.end_of_text = run.job.tokenizer.end_of_text();
    run.state.configuration = effective_toml(c);
    run.state.schedule = {{"kind", c.training.lr_schedule}, {"lr", c.training.lr}, {"steps", c.training.steps}};
    return from;
}

// How the planned memory compares with what the process has taken since the ranks began: in all for thread ranks, of
// each rank under MPI.
void note_memory(Training& run) {
    const double planned = double(run.rank.memory.total()) / (1 << 20);
    const double grown = double(used_on_device() - run.job.used_before) / (1 << 20);
    if (run.job.config.launch.ranks > 1) {
        std::string text;
        for (const std::string& rank :
             run.rank.transport.all_gather(format("planned %.1f MiB, grown %.1f MiB", planned, grown)))
            text += (text.empty() ? "" : "; ") + rank;
        run.note("resident memory of each rank: " + text);
    } else {
        double total = planned;
        run.rank.transport.sum({&total, 1});
        run.note(format("resident memory: planned %.1f MiB, grown %.1f MiB", total, grown));
    }
}

// The events of all ranks, written by rank 0; whoever calls it stops recording.
void write_trace(Training& run) {
    Rank& rank = run.rank;
    const std::string events = pack_events(rank.trace->events());
    rank.trace.reset();
    std::vector<std::vector<TraceEvent>> ranks;
    for (const std::string& text : rank.transport.all_gather(events)) ranks.push_back(unpack_events(text));
    rank.transport.together([&] {
        if (rank.index == 0)
            write_trace(run.job.config.run.trace, {"trace of " + layout_text(rank.options), std::move(ranks)});
    });
}

// Trains until --steps, --stop-after or a signal. Returns the exit code.
int training_loop(Training& run) {
    Rank& rank = run.rank;
    Transport& transport = rank.transport;
    const Job& job = run.job;
    const Config& c = job.config;
    Signals& signals = job.signals;
    const int64_t last = c.run.stop_after ? std::min(c.run.stop_after, c.training.steps) : c.training.steps;
    const auto validate = [&](int64_t step) -> std::optional<double> {
        const bool due = step == 0 || step == c.training.steps || (c.run.val_every && step % c.run.val_every == 0);
        if (!job.val_loader || !due) return std::nullopt;
        const Evaluation result =
            evaluate(rank, *job.val_loader, c.data.batch_tokens, c.run.val_tokens, &signals.stop_wanted);
        run.validation_pending = result.ended_early;  // whoever resumes makes up for it
        return run.validation_pending ? std::nullopt : std::optional(result.loss);
    };

    if (run.state.step == 0) {
        if (job.val_loader) run.log({.step = 0, .val_loss = validate(0)});
    } else if (run.validation_pending) {
        run.last_record.val_loss = validate(run.state.step);
        run.log(run.last_record);
    }
    const int64_t first_step = run.state.step, traced_steps = 4;
    if (!c.run.trace.empty()) {
        rank.trace.emplace(size_t(1) << 16);
        transport.all_gather("");  // now all ranks are here
        rank.trace_zero = seconds_now();
    }
    int64_t saved_step = run.state.step;
    bool stop = run.validation_pending;
    while (run.state.step < last && !stop) {
        transport.progress.busy_with("the data of a step");
        const double start = seconds_now(), busy_before = rank.busy_seconds;
        const Batch batch = next_batch(job.loader, run.state.sample_index, c.data.batch_tokens);
        const Step step = prepare_step(batch, c.data.chunk_tokens, rank.options.model);
        const int64_t number = run.state.step + 1;

        if (run.state.step == first_step) load_kernels_and_tune(rank, step);
        const double loss = compute_gradients(rank, step);
        const double norm = gradient_norm(rank);
        if (std::isfinite(loss) && std::isfinite(norm)) {
            clip_and_update(rank, c, number, ++run.updates, norm);
        } else if (c.training.on_nonfinite == "stop" || !weights_are_finite(rank)) {
            stop_at_nonfinite(rank, step, number, loss);
        } else {
            const std::string what = name_nonfinite(rank);
            run.note("step " + std::to_string(number) + " skipped: " + what + " is not finite");
        }
        run.state.step = number;
        run.state.sample_index = batch.next_sample;

        // What the ranks have to agree on, or add up.
        const double seconds = seconds_now() - start;
        double totals[] = {rank.busy_seconds - busy_before, double(signals.stop_wanted),
                           double(signals.checkpoint_wanted.exchange(false)), double(used_on_device())};
        transport.sum(totals);
        const auto [busy, stop_votes, checkpoint_votes, resident] = totals;
        const bool threads = c.launch.ranks == 1;  // one process has one resident size
        const double bubble = 1 - busy / (double(transport.ranks) * seconds);
        run.last_record = {.step = number,
                           .loss = loss,
                           .val_loss = validate(number),
                           .grad_norm = norm,
                           .lr = learning_rate(c, number),
                           .ms = seconds * 1e3,
                           .tokens_per_second = double(step.tokens) / seconds,
                           .mfu = step.flops / seconds / (job.peak_gflops * 1e9),
                           .bubble = transport.ranks > 1 ? std::optional(bubble) : std::nullopt,
                           .memory_bytes = threads ? used_on_device() : int64_t(resident),
                           .planned_ms = run.planned ? std::optional(run.planned->step_ms(step)) : std::nullopt};
        run.log(run.last_record);
        stop = stop_votes > 0 || run.validation_pending;
        if (number == first_step + 3) note_memory(run);
        if (rank.trace && number == first_step + traced_steps) write_trace(run);

        const bool due = c.run.checkpoint_every && number % c.run.checkpoint_every == 0;
        if (due || checkpoint_votes > 0) {
            save(run);
            saved_step = number;
        }
    }
    if (rank.trace) write_trace(run);
    if (saved_step != run.state.step) save(run);
    return run.state.step < last || run.validation_pending ? EXIT_REQUEUE : 0;
}

// What this run is, before its first step.
void print_start(const Training& run, const std::string& weights_from) {
    const Config& c = run.job.config;
    const GptConfig& g = run.rank.options.model;
    const auto tokens_text = [](const Loader& loader) {
        return std::to_string(loader.stream_tokens()) + " tokens, " + std::to_string(loader.samples()) +
               " samples an epoch";
    };
    std::vector<TableRow> rows = {
        {"device", device_text(std::to_string(c.threads()) + " threads" + (c.parallel.ranks > 1 ? " a rank" : "")) +
                       ", " PRECISION_NAME + format(", measured matrix peak %.0f GFLOP/s", run.job.peak_gflops)},
        {"model", c.model.name + ": " + std::to_string(g.layers) + " layers, " + std::to_string(g.channels) +
                      " channels, " + std::to_string(g.heads) + " heads, context " + std::to_string(g.context) +
                      ", vocabulary " + std::to_string(g.vocab) + (g.tied ? ", tied head, " : ", untied head, ") +
                      std::to_string(parameter_count(g)) + " parameters"},
        {"weights",
         "from " + weights_from + (run.rank.master ? "" : ", no master weights: the optimizer rounds stochastically")},
        {"data", c.data.train + ": " + tokens_text(run.job.loader) + ", " + c.data.packing},
        {"validation",
         run.job.val_loader ? c.data.val + ": " + tokens_text(*run.job.val_loader) : "off: no --val-data"},
        {"step", std::to_string(c.data.batch_tokens) + " tokens in chunks of at most " +
                     std::to_string(c.data.chunk_tokens) + ", recompute " + c.compute.recompute}};
#ifdef USE_CUDA
    const std::string why_not = why_not_cudnn(run.rank.options);
    rows.insert(rows.begin() + 1, {"attention", why_not.empty() ? "cuDNN" : "our own kernels: " + why_not});
#endif
    const std::string kind = c.launch.ranks > 1 ? "processes under " + c.launch.source : "threads of this process";
    rows.insert(rows.begin() + 1, {"pipeline", c.parallel.ranks > 1 ? layout_text(run.rank.options) + ", " + kind
                                                                    : "off: --ranks 1, whatever --schedule says"});
    if (!c.plan.choice.empty()) rows.insert(rows.begin() + 2, {"schedule", c.plan.choice});
    print_table("run " + c.run.dir, rows);
}

// --init-from: sizes that were not asked for come with the weights, and those that were must be theirs.
void take_sizes_of(Config& c, std::string& source, Transport& transport) {
    if (path_exists(checkpoint_root(source))) source = find_checkpoint(source, transport).directory;
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
    if (c.data.tokenizer.empty()) c.data.tokenizer = tokenizer_of_vocab(found.vocab);
    complete_config(c);
}

// ---------------------------------------------------------------------------------------------------------------------
// --verify-layout

// Three steps on these ranks and, on rank 0 alone, on one. Returns the exit code.
int verify_layout(Training& run) {
    const Config& c = run.job.config;
    NoTransport nobody;
    std::unique_ptr<Training> alone;
    if (run.rank.index == 0) {
        RankOptions options = run.rank.options;
        options.layout = {};
        if (options.recompute == Recompute::automatic) options.recompute = Recompute::without_attention;
        alone.reset(new Training{run.job, Rank(options, nobody), {}});
        start_weights(*alone);
    }
    LayoutComparison comparison(run.rank, alone ? &alone->rank : nullptr);
    int64_t sample = run.state.sample_index;
    for (int64_t number = 1; number <= 3; ++number) {
        const Batch batch = next_batch(run.job.loader, sample, c.data.batch_tokens);
        sample = batch.next_sample;
        double loss[2] = {}, norm[2] = {};  // of the layout and of one rank
        for (Rank* rank : {&run.rank, alone ? &alone->rank : nullptr}) {
            if (!rank) continue;
            run.rank.transport.progress.busy_with("comparing layouts");
            const Step step = prepare_step(batch, c.data.chunk_tokens, rank->options.model);
            loss[rank != &run.rank] = compute_gradients(*rank, step);
            norm[rank != &run.rank] = gradient_norm(*rank);
        }
        if (alone) comparison.compare_losses(loss[0], loss[1]);
        const auto gradients = [](Rank& rank) { return rank.gradients; };
        comparison.compare_tensors(gradients, &LayoutComparison::Errors::gradient);
        if (alone) clip_and_update(alone->rank, c, number, number, norm[1]);
        clip_and_update(run.rank, c, number, number, norm[0]);
        comparison.compare_tensors(widen_weights, &LayoutComparison::Errors::weight);
    }
    double good = comparison.report(layout_text(run.rank.options));
    run.rank.transport.sum({&good, 1});
    return good == run.rank.transport.ranks ? 0 : EXIT_LAYOUT_DIFFERS;
}

// The part of `train` that every rank runs for itself.
int train_rank(const Job& job, Transport& transport) {
    const Config& c = job.config;
    transport.progress.busy_with("start-up");
    Training run{job, Rank(rank_options(c, model_of(c), true, transport.rank), transport), {}};
    const std::string from = start_weights(run);
    if (transport.rank == 0)
        for (const std::string& text : run.state.notes) std::fprintf(stderr, "%s\n", text.c_str());
    if (c.run.verify_layout) return verify_layout(run);
    transport.together([&] {
        if (transport.rank != 0) return;
        write_file(c.run.dir + "/config.toml", effective_toml(c));
        print_start(run, from);
        const int64_t logged = run.state.step > 0 ? run.state.step - run.validation_pending : -1;
        run.metrics.emplace(c.run.dir + "/metrics.jsonl", logged);
        run.console.emplace(c.training.steps, c.launch.ranks == 1 && ::isatty(STDOUT_FILENO));
        if (job.cluster) run.planned.emplace(*job.cluster, run.rank.options);
    });
    try {
        return training_loop(run);
    } catch (const Failure& failure) {  // rank 0 writes what is no checkpoint
        const bool said = std::string(failure.what()).find("good checkpoint") != std::string::npos;
        if (failure.exit_code != EXIT_STORAGE || said || transport.rank != 0) throw;
        throw JointFailure(EXIT_STORAGE, failure.what() + (" " + last_good_checkpoint(c.run.dir)));
    }
}

int train_command(Config c, Team& team) {
    const bool speaks = team.speaks();
    std::optional<Signals> signals;
    std::optional<DirectoryLock> lock;
    std::optional<Job> job;
    // Before a GPU is asked anything: its driver's threads must not take signals.
    if (!c.run.dry_run) signals.emplace([&] { return team.status(); }, [&] { return team.peer_died(); }, speaks);
    if (!c.run.init_from.empty()) take_sizes_of(c, c.run.init_from, team.processes());
    if (c.parallel.schedule == "auto") choose_schedule(c, team.processes());
    bool dry_run = false;
    team.processes().together([&] {
        const std::vector<MemoryPlan> plans = memory_plans(rank_options(c, model_of(c), true));
        if (speaks) print_table("memory", memory_table(plans));
        if ((dry_run = c.run.dry_run)) return;
        int64_t besides = 0;
        if (c.run.verify_layout) {  // rank 0 has the whole model
            Config single = c;
            single.parallel.ranks = 1;
            if (single.compute.recompute == "auto") single.compute.recompute = "without-attention";
            besides = plan_memory(rank_options(single, model_of(c), true)).total();
        }
        check_memory(c, plans, besides, [&](int64_t available) { return fitting_layout(c, plans, available); });
        const Tokenizer tokenizer(c.data.tokenizer);
        const auto open = [&](const std::string& files, uint64_t seed) {
            return Loader(open_token_files(files), loader_options(c, model_of(c), tokenizer, seed));
        };
        std::optional<Loader> val_loader;
        if (!c.data.val.empty()) val_loader.emplace(open(c.data.val, 0));
        Loader loader = open(c.data.train, uint64_t(c.training.seed));
        if (speaks && !c.run.verify_layout) {
            create_directories(c.run.dir);
            lock.emplace(c.run.dir);
        }
        const int local = team.local_ranks(int(c.parallel.ranks));
        double peak = 0;  // measured by one process while the others wait
        if (speaks) peak = measure_matrix_peak(c.threads() * local);
        peak *= double(c.parallel.ranks) / local * devices_of(local);
        job.emplace(c, tokenizer, std::move(loader), std::move(val_loader), *signals, peak,
                    speaks ? cluster_of_this_run(c) : std::nullopt, used_on_device());
    });
    if (dry_run) return 0;
    return team.run(int(c.parallel.ranks), double(c.parallel.hang_timeout),
                    [&](Transport& transport) { return train_rank(*job, transport); });
}

// ---------------------------------------------------------------------------------------------------------------------

#ifndef TESTING
#include "llmc/commands/doctor.h"
#include "llmc/commands/eval.h"
#include "llmc/commands/generate.h"
#include "llmc/commands/plan.h"
#include "llmc/commands/rehearse.h"
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
    Launch launch;
    try {
        launch = read_launch();
        cpu_isa();  // refuses an impossible HELIXTRAIN_ISA
        Team team(launch);
        const Config config = parse_config(argc, argv, team.launch);
        omp_set_num_threads(config.threads());
#ifdef USE_NCCL  // a kernel that is loaded while messages wait may wait for them in turn
        if (config.parallel.ranks > 1) setenv("CUDA_MODULE_LOADING", "EAGER", 0);
#endif
        const std::string& command = config.command;
        const bool one_process = command == "tokenize" || command == "doctor" || command == "plan";
        if (launch.ranks > 1 && one_process)
            throw Failure(EXIT_CONFIG, "`" + command + "` is the work of one process, " + launch.source +
                                           " has started " + std::to_string(launch.ranks) +
                                           "; run it without a launcher");
        if (command == "tokenize")
            return tokenize_command({config.tokenize.inputs, config.tokenize.output, config.data.tokenizer,
                                     config.data.tokenizer_dir, config.tokenize.holdout_every,
                                     config.tokenize.max_bytes, config.tokenize.extensions,
                                     config.tokenize.shard_tokens});
        if (command == "doctor") return doctor_command(config);
        if (command == "plan") return plan_command(config, rank_options(config, model_of(config), true));
        if (command == "rehearse") return rehearse_command(config, rank_options(config, model_of(config), true), team);
        if (command == "generate") return generate_command(config, team);
        if (command == "eval") return eval_command(config, team);
        return train_command(config, team);
    } catch (const HelpRequested& help) {
        std::fputs(help.text.c_str(), stdout);
        return 0;
    } catch (const JointFailure& failure) {
        if (launch.rank == 0) std::fprintf(stderr, "train_gpt: %s\n", failure.what());
        return failure.exit_code;
    } catch (const Failure& failure) {
        // Every process reads the same command line.
        if (launch.rank == 0 || failure.exit_code != EXIT_CONFIG)
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
