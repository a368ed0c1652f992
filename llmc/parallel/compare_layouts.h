// Compares a layout with one rank, tensor by tensor, wherever the tensors lie: `train --verify-layout`.
#pragma once

#include <algorithm>
#include <cmath>

#include "llmc/data/loader.h"
#include "llmc/io/flags.h"
#include "llmc/io/log.h"
#include "llmc/parallel/rank.h"
#include "llmc/parallel/rank_weights.h"
#include "llmc/parallel/run.h"
#include "llmc/parallel/run_report.h"

// How far tensors of this layout are from those of one rank, relative to the norm of the latter. The gradient of the
// keys' bias is zero in exact arithmetic (it moves all scores of a query alike), so that it has to be small, and is
// left out otherwise, since AdamW blows its rounding up.
class LayoutComparison {
public:
    // Differences that sums in another order can make. Without master weights they make some weights round to another
    // bf16. Both sides round by the same random numbers, so that this is as rare as the values before are close,
    // compared with the distance between two bf16: one weight in a thousand that becomes its neighbour is 2e-4 of the
    // norm. The bounds are the same, therefore.
    static constexpr bool fp64 = std::is_same_v<floatX, double>, bf16_products = std::is_same_v<floatX, bf16>;
    static constexpr double loss_bound = fp64 ? 1e-13 : bf16_products ? 1e-3 : 1e-6;
    static constexpr double tensor_bound = fp64 ? 1e-12 : bf16_products ? 2e-2 : 1e-5;

    struct Errors {
        double gradient = 0, weight = 0, keys_gradient = 0;
    };

    // `alone` is only on rank 0: it has the whole model.
    LayoutComparison(Rank& rank, Rank* alone)
        : rank_(rank), alone_(alone), whole_(parameter_table(rank.options.model)), errors_(whole_.size()) {}

    void compare_losses(double loss, double wanted) {
        const double error = std::abs(loss - wanted) / std::abs(wanted);
        worst_loss_ = std::isfinite(error) ? std::max(worst_loss_, error) : INFINITY;
    }

    // Gradients, or weights in floatS: flat_of(rank) gives where a rank has them.
    void compare_tensors(floatS* (*flat_of)(Rank&), double Errors::*worst) {
        std::vector<double> squares(3 * whole_.size());  // of difference, what is wanted, keys' bias; per parameter
        floatS* const flat = flat_of(rank_);
        floatS* const flat_alone = alone_ ? flat_of(*alone_) : nullptr;
        if (alone_) finish(alone_->device);  // others will read its memory
        for (const Parameter& p : whole_) {
            const int owner = rank_.options.owner(p.part, p.layer);
            floatS* const from = alone_ ? flat_alone + p.offset : nullptr;
            if (alone_ && owner != 0) exchange({true, owner, from, p.size() * int64_t(sizeof(floatS))});
            if (rank_.index != owner) continue;
            DeviceMemory<floatS> received(alone_ ? 0 : p.size());
            if (!alone_) exchange({false, 0, received.data(), p.size() * int64_t(sizeof(floatS))});
            HostView<floatS> wanted(rank_.device, alone_ ? from : received.data(), p.size(), true);
            const auto own = std::find_if(rank_.parameters.begin(), rank_.parameters.end(),
                                          [&](const Parameter& held) { return held.index == p.index; });
            HostView<floatS> values(rank_.device, flat + own->offset, p.size(), true);
            const bool qkv_bias = p.name.ends_with("c_attn.bias");
            for (int64_t i = 0; i < p.size(); ++i) {
                const double want = wanted.data()[i], is = values.data()[i], difference = is - want;
                double* const sums = &squares[size_t(3 * p.index)];
                if (qkv_bias && i * 3 / p.cols == 1) {
                    sums[2] += is * is;
                } else {
                    sums[0] += difference * difference;
                    sums[1] += want * want;
                }
            }
        }
        rank_.transport.sum(squares);
        for (size_t i = 0; i < whole_.size(); ++i) {
            const double norm = std::sqrt(squares[3 * i + 1]);
            const auto update = [&](double& error, double square) {
                const double value = square == 0 ? 0 : std::sqrt(square) / norm;
                error = std::isfinite(value) ? std::max(error, value) : INFINITY;
            };
            update(errors_[i].*worst, squares[3 * i]);
            if (worst == &Errors::gradient) update(errors_[i].keys_gradient, squares[3 * i + 2]);
        }
    }

    // Prints the table; whether all is within the bounds.
    bool report(const std::string& layout) const {
        bool good = worst_loss_ <= loss_bound;
        std::vector<TableRow> rows = {{"loss", format("%.1e (at most %.0e)", worst_loss_, loss_bound)}};
        for (size_t i = 0; i < whole_.size(); ++i) {
            const Errors& e = errors_[i];
            good &= e.gradient <= tensor_bound && e.weight <= tensor_bound && e.keys_gradient <= tensor_bound;
            const bool qkv_bias = whole_[i].name.ends_with("c_attn.bias");
            rows.push_back({whole_[i].name, format("gradient %.1e, ", e.gradient) +
                                                (qkv_bias ? format("of keys %.1e, ", e.keys_gradient) : "") +
                                                format("weight %.1e (at most %.0e)", e.weight, tensor_bound)});
        }
        if (rank_.index == 0) print_table("relative differences between " + layout + " and one rank", rows);
        return good;
    }

private:
    Rank& rank_;
    Rank* alone_;
    std::vector<Parameter> whole_;
    std::vector<Errors> errors_;  // [parameter] the worst so far
    double worst_loss_ = 0;

    void exchange(const Transfer& transfer) { rank_.transport.wait(0, rank_.transport.post({&transfer, 1}) + 1); }
};

// Three steps on these ranks and, on rank 0, on `alone` (elsewhere null), from the same weights and from sample number
// `sample` on. Whether all that can be compared agrees, the same on every rank.
inline bool compare_steps(Rank& rank, Rank* alone, const Config& c, const Loader& loader, int64_t sample) {
    LayoutComparison comparison(rank, alone);
    for (int64_t number = 1; number <= 3; ++number) {
        const Batch batch = next_batch(loader, sample, c.data.batch_tokens);
        sample = batch.next_sample;
        double loss[2] = {}, norm[2] = {};  // of the layout and of one rank
        for (Rank* each : {&rank, alone}) {
            if (!each) continue;
            rank.transport.progress.busy_with("comparing layouts");
            const Step step = prepare_step(batch, c.data.chunk_tokens, each->options.model);
            loss[each != &rank] = compute_gradients(*each, step);
            norm[each != &rank] = gradient_norm(*each);
        }
        if (alone) comparison.compare_losses(loss[0], loss[1]);
        const auto gradients = [](Rank& of) { return of.gradients; };
        comparison.compare_tensors(gradients, &LayoutComparison::Errors::gradient);
        if (alone) clip_and_update(*alone, c, number, number, norm[1]);
        clip_and_update(rank, c, number, number, norm[0]);
        comparison.compare_tensors(widen_weights, &LayoutComparison::Errors::weight);
    }
    double good = comparison.report(layout_text(rank.options));
    rank.transport.sum({&good, 1});
    return good == rank.transport.ranks;
}
