// The parts of train_gpt.cu that others use, too: commands the schedule loop and evaluation, compare_layouts.h the
// halves of a training step.
#pragma once

#include <atomic>
#include <functional>

#include "llmc/data/loader.h"
#include "llmc/io/flags.h"
#include "llmc/parallel/rank.h"

// For tests: called after each op, and given the loss of every target.
struct Observer {
    std::function<void(size_t op)> after_op;
    std::vector<std::vector<floatS>> losses;  // [chunk][N]
};

// The schedule loop: runs the ops of a plan in their order.
void run_ops(OpLoop& loop, const Plan& plan, const OpActions& actions);

// The ops of a plan on the model. Gradients of parameters are added to, everything else is overwritten.
// `loss_scale` is one over the number of targets in the whole step. Returns the sum of the losses that this rank has
// computed, in nats.
double run_ops(Rank& rank, const Plan& plan, const Step& step, floatS loss_scale, Observer* observer = nullptr);

// Forward and backward of one batch. Leaves the gradients of the mean loss in rank.gradients; returns that loss, the
// same on every rank.
double compute_gradients(Rank& rank, const Step& step, Observer* observer = nullptr);

// Over all ranks; a parameter that several of them hold counts once.
double gradient_norm(const Rank& rank);

// The optimizer step of a training step, given the norm of its gradients. `update` is less than `step` where steps have
// been skipped.
void clip_and_update(Rank& rank, const Config& c, int64_t step, int64_t update, double norm);

struct Evaluation {
    double loss = 0;  // mean over targets, nats
    int64_t targets = 0;
    bool ended_early = false;  // when asked to stop
};

// Mean loss over the samples of `loader` from the first one on, at most `max_tokens` of them (0 = one epoch).
// Ends early when `stop` becomes true. All ranks get the same result.
Evaluation evaluate(Rank& rank, const Loader& loader, int64_t batch_tokens, int64_t max_tokens,
                    const std::atomic<bool>* stop = nullptr);
