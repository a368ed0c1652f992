// helixtrain: trains GPT models on long and variable-length sequences.
//
//   configuration -> data -> model -> plan -> loop { run_ops, clip, AdamW } -> checkpoint
//
// This file holds what a training run does, top to bottom: the schedule loop, evaluation, the optimizer step, the
// training loop, main. Everything it calls is under llmc/, see llmc/README.md for the map; what others call of it is
// declared and described in llmc/parallel/run.h. test_gpt.cu includes this file with TESTING defined, which leaves out
// main.
#include <unistd.h>

#include <cstdio>

// configuration, console, metrics
#include "llmc/io/config.h"
#include "llmc/io/log.h"
#include "llmc/io/metrics.h"
#include "llmc/io/signals.h"
// data, models in files
#include "llmc/commands/model_file.h"
#include "llmc/data/loader.h"
#include "llmc/data/tokenizer.h"
#include "llmc/parallel/checkpoint.h"
// the rank: its ops, its gradients, its weights
#include "llmc/kernels/adamw.cuh"
#include "llmc/kernels/reduce.cuh"
#include "llmc/parallel/compute_op.h"
#include "llmc/parallel/nonfinite.h"
#include "llmc/parallel/rank.h"
#include "llmc/parallel/rank_weights.h"
#include "llmc/parallel/run.h"
#include "llmc/parallel/shared_gradients.h"
// the run: its schedule, its memory, its ranks, what it says
#include "llmc/kernels/peak.h"
#include "llmc/parallel/choose_schedule.h"
#include "llmc/parallel/compare_layouts.h"
#include "llmc/parallel/memory.h"
#include "llmc/parallel/planned_run.h"
#include "llmc/parallel/run_report.h"
#include "llmc/parallel/team.h"

// ---------------------------------------------------------------------------------------------------------------------
// The schedule loop

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

#ifdef USE_CUDA
// Has a GPU load all kernels of a step, and its matrix products choose their algorithms, before anything else is run:
// runs every op on whatever is in memory, without messages. A GPU loads kernels when they are first used, and may wait
// for all its streams to do so. Products choose unless the bits of a run are to repeat in another. Only the gradients
// are written to, which every step begins with zeros.
void load_kernels_and_tune(Rank& rank, const Step& step) {
    rank.transport.progress.busy_with("loading kernels and choosing algorithms");
    const Plan& plan = rank.plan_for(step.group_sizes, true);
    rank.inputs.load(rank.device, step);
    rank.device.tune_products = !rank.options.deterministic;
    for (size_t i = 0; i < plan.ops.size(); ++i)
        if (plan.ops[i].kind == Kind::compute) compute(rank, plan, i, 1, nullptr);
    rank.device.tune_products = false;
    finish(rank.device);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Gradients, evaluation

double compute_gradients(Rank& rank, const Step& step, Observer* observer) {
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

void clip_and_update(Rank& rank, const Config& c, int64_t step, int64_t update, double norm) {
    const auto& t = c.training;
    const double scale = t.clip > 0 && norm > t.clip ? t.clip / norm : 1;
    update_parameters(
        rank, {learning_rate(c, step), t.beta1, t.beta2, t.eps, t.weight_decay, update, scale, uint64_t(t.seed)});
}

// ---------------------------------------------------------------------------------------------------------------------
// The training run

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

// Trains until --steps, --stop-after or a signal. Returns the exit code.
int training_loop(Training& run) {
    Rank& rank = run.rank;
    Transport& transport = rank.transport;
    const Job& job = run.job;
    const Config& c = job.config;
    Signals& signals = job.signals;
    const int64_t last = c.run.stop_after ? std::min(c.run.stop_after, c.training.steps) : c.training.steps;
    double since = 0;  // end of the step before, or of what came between the two
    const auto validate = [&](int64_t step) -> std::optional<double> {
        const bool due = step == 0 || step == c.training.steps || (c.run.val_every && step % c.run.val_every == 0);
        if (!job.val_loader || !due) return std::nullopt;
        const Evaluation result =
            evaluate(rank, *job.val_loader, c.data.batch_tokens, c.run.val_tokens, &signals.stop_wanted);
        run.validation_pending = result.ended_early;  // whoever resumes makes up for it
        since = seconds_now();
        return run.validation_pending ? std::nullopt : std::optional(result.loss);
    };

    const auto step_of = [&](const Batch& batch) {
        return prepare_step(batch, c.data.chunk_tokens, rank.options.model);
    };

#ifdef USE_CUDA
    if (run.state.step < last)
        load_kernels_and_tune(rank, step_of(next_batch(job.loader, run.state.sample_index, c.data.batch_tokens)));
#endif
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
    since = seconds_now();
    while (run.state.step < last && !stop) {
        transport.progress.busy_with("the data of a step");
        const double busy_before = rank.busy_seconds;
        const Batch batch = next_batch(job.loader, run.state.sample_index, c.data.batch_tokens);
        const Step step = step_of(batch);
        const int64_t number = run.state.step + 1;

        const double loss = compute_gradients(rank, step);
        const double norm = gradient_norm(rank);
        if (std::isfinite(loss) && std::isfinite(norm)) {
            clip_and_update(rank, c, number, ++run.updates, norm);
        } else if (c.training.on_nonfinite == "stop" || !weights_are_finite(rank)) {
            stop_at_nonfinite(rank, number, loss, [&] { return compute_gradients(rank, step); });
        } else {
            const std::string what = name_nonfinite(rank);
            run.note("step " + std::to_string(number) + " skipped: " + what + " is not finite");
        }
        run.state.step = number;
        run.state.sample_index = batch.next_sample;

        // What the ranks have to agree on, or add up.
        const double now = seconds_now(), seconds = now - since;
        since = now;  // a GPU may still be at the update: the step after this one has its time
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
        if (number == first_step + 3) run.note(memory_note(rank, job.used_before, !threads));
        if (rank.trace && number == first_step + traced_steps) {
            write_trace(rank, c.run.trace);
            since = seconds_now();
        }

        const bool due = c.run.checkpoint_every && number % c.run.checkpoint_every == 0;
        if (due || checkpoint_votes > 0) {
            save(run);
            saved_step = number;
            since = seconds_now();
        }
    }
    if (rank.trace) write_trace(rank, c.run.trace);
    if (saved_step != run.state.step) save(run);
    return run.state.step < last || run.validation_pending ? EXIT_REQUEUE : 0;
}

// --verify-layout: beside the ranks, rank 0 has the whole model by itself. Returns the exit code.
int verify_layout(Training& run) {
    NoTransport nobody;
    std::unique_ptr<Training> alone;
    if (run.rank.index == 0) {
        RankOptions options = run.rank.options;
        options.layout = {};
        if (options.recompute == Recompute::automatic) options.recompute = Recompute::without_attention;
        alone.reset(new Training{run.job, Rank(options, nobody), {}});
        start_weights(*alone);
    }
    const bool good =
        compare_steps(run.rank, alone ? &alone->rank : nullptr, run.job.config, run.job.loader, run.state.sample_index);
    return good ? 0 : EXIT_LAYOUT_DIFFERS;
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
        print_start(c, run.rank, job.loader, job.val_loader, job.peak_gflops, from);
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
