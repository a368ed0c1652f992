// Compares a layout with one rank, tensor by tensor, wherever the tensors lie: `train --verify-layout`.
#pragma once

#include <algorithm>
#include <cmath>

#include "llmc/io/log.h"
#include "llmc/parallel/rank.h"

// How far tensors of this layout are from those of one rank, relative to the norm of the latter. The gradient of the
// keys' bias is zero in exact arithmetic (it moves all scores of a query alike), so that only its rounding would be
// compared, and AdamW blows that up: it is left out.
class LayoutComparison {
public:
    // Differences that sums in another order can make.
    static constexpr bool fp64 = std::is_same_v<floatX, double>, bf16_products = std::is_same_v<floatX, bf16>;
    static constexpr double loss_bound = fp64 ? 1e-13 : bf16_products ? 1e-3 : 1e-6;
    static constexpr double tensor_bound = fp64 ? 1e-12 : bf16_products ? 2e-2 : 1e-5;

    struct Errors {
        double gradient = 0, weight = 0;
    };

    // `alone` is only on rank 0: it has the whole model.
    LayoutComparison(Rank& rank, Rank* alone)
        : rank_(rank), alone_(alone), whole_(parameter_table(rank.options.model)), errors_(whole_.size()) {}

    void compare_losses(double loss, double wanted) {
        const double error = std::abs(loss - wanted) / std::abs(wanted);
        worst_loss_ = std::isfinite(error) ? std::max(worst_loss_, error) : INFINITY;
    }

    // gradients or master weights: where a rank has them.
    void compare_tensors(floatS* Rank::*flat, double Errors::*worst) {
        std::vector<double> squares(2 * whole_.size());  // of difference and of what is wanted, for each parameter
        std::vector<floatS> received;
        for (const Parameter& p : whole_) {
            const int owner = rank_.options.owner(p.part, p.layer);
            const floatS* wanted = alone_ ? alone_->*flat + p.offset : nullptr;
            if (alone_ && owner != 0) send(owner, wanted, p.size());
            if (rank_.index != owner) continue;
            if (!alone_) {
                received.resize(size_t(p.size()));
                receive(received.data(), p.size());
                wanted = received.data();
            }
            const auto own = std::find_if(rank_.parameters.begin(), rank_.parameters.end(),
                                          [&](const Parameter& held) { return held.index == p.index; });
            const bool qkv_bias = p.name.ends_with("c_attn.bias");
            for (int64_t i = 0; i < p.size(); ++i) {
                if (qkv_bias && i * 3 / p.cols == 1) continue;
                const double want = wanted[i], difference = (rank_.*flat)[own->offset + i] - want;
                squares[size_t(2 * p.index)] += difference * difference;
                squares[size_t(2 * p.index + 1)] += want * want;
            }
        }
        rank_.transport.sum(squares);
        for (size_t i = 0; i < whole_.size(); ++i) {
            const double difference = std::sqrt(squares[2 * i]), norm = std::sqrt(squares[2 * i + 1]);
            const double error = difference == 0 ? 0 : difference / norm;
            errors_[i].*worst = std::isfinite(error) ? std::max(errors_[i].*worst, error) : INFINITY;
        }
    }

    // Prints the table; whether all is within the bounds.
    bool report(const std::string& layout) const {
        bool good = worst_loss_ <= loss_bound;
        std::vector<TableRow> rows = {{"loss", format("%.1e (at most %.0e)", worst_loss_, loss_bound)}};
        for (size_t i = 0; i < whole_.size(); ++i) {
            good &= errors_[i].gradient <= tensor_bound && errors_[i].weight <= tensor_bound;
            rows.push_back({whole_[i].name, format("gradient %.1e, weight %.1e (at most %.0e)", errors_[i].gradient,
                                                   errors_[i].weight, tensor_bound)});
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

    void send(int owner, const floatS* data, int64_t n) {
        const Transfer transfer{true, owner, const_cast<floatS*>(data), n * int64_t(sizeof(floatS))};
        rank_.transport.wait(0, rank_.transport.post({&transfer, 1}) + 1);
    }
    void receive(floatS* data, int64_t n) {
        const Transfer transfer{false, 0, data, n * int64_t(sizeof(floatS))};
        rank_.transport.wait(0, rank_.transport.post({&transfer, 1}) + 1);
    }
};
