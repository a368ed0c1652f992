// The parts of train_gpt.cu that the commands use, too: the schedule loop and what is built on it directly.
#pragma once

#include <atomic>
#include <functional>

#include "llmc/data/loader.h"
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

struct Evaluation {
    double loss = 0;  // mean over targets, nats
    int64_t targets = 0;
    bool ended_early = false;  // when asked to stop
};

// Mean loss over the samples of `loader` from the first one on, at most `max_tokens` of them (0 = one epoch).
// Ends early when `stop` becomes true. All ranks get the same result.
Evaluation evaluate(Rank& rank, const Loader& loader, int64_t batch_tokens, int64_t max_tokens,
                    const std::atomic<bool>* stop = nullptr);
