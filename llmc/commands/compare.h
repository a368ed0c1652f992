// `plan --cluster`: all schedules on a cluster side by side, as a table or JSON.
#pragma once

#include "llmc/io/config.h"
#include "llmc/io/json.h"
#include "llmc/io/log.h"
#include "llmc/parallel/compare_plans.h"

// The plans that are shown, and the order of those that fit under every changed rate.
struct Comparison {
    Cluster cluster;
    std::vector<ComparedPlan> plans;
    std::vector<size_t> shown, fitting;  // indices of plans
    std::vector<RateChange> changes;     // of `fitting`

    Comparison(const Cluster& c, const RankOptions& base, int chunks, const OpenChoices& open, bool all_modes)
        : cluster(c), plans(compare_plans(c, base, chunks, open)), shown(best_modes(plans)) {
        std::vector<const ComparedPlan*> compared;
        for (size_t i : shown)
            if (plans[i].fits()) fitting.push_back(i), compared.push_back(&plans[i]);
        changes = changed_rates(cluster, compared);
        if (all_modes) {
            shown.resize(plans.size());
            std::iota(shown.begin(), shown.end(), 0);
        }
#pragma omp parallel for schedule(dynamic)
        for (ComparedPlan& plan : plans)
            if (plan.step) plan.longest_context = longest_context(cluster, plan);
    }

    // Of all schedules and modes.
    size_t longest() const {
        const auto shorter = [](const ComparedPlan& a, const ComparedPlan& b) {
            return a.longest_context < b.longest_context;
        };
        return size_t(std::max_element(plans.begin(), plans.end(), shorter) - plans.begin());
    }

    std::string name(size_t i) const {
        return plans[i].name + ", recompute " + recompute_names[int(plans[i].recompute)];
    }
    // Sentences about rates that change the order.
    std::vector<std::string> sensitivity() const {
        std::vector<std::string> sentences;
        for (const RateChange& change : changes) {
            std::string moved;
            for (size_t i = 1; i < change.order.size(); ++i)
                if (change.order[i] < change.order[i - 1])
                    moved += (moved.empty() ? "" : "; ") + name(fitting[change.order[i - 1]]) + " passes " +
                             name(fitting[change.order[i]]);
            if (!moved.empty())
                sentences.push_back(change.rate + (change.order[0] ? ": the best changes: " : ": ") + moved);
        }
        return sentences;
    }
};

// "128k"
inline std::string tokens_text(int64_t tokens) { return std::to_string(tokens >> 10) + "k"; }

inline std::string cluster_text(const Cluster& c, int ranks) {
    return c.name + ", " + std::to_string(ranks) + " ranks of " + std::to_string(c.tp) +
           (c.tp == 1 ? " device: " : " devices: ") +
           format("products %.4g, attention %.4g and %.4g TFLOP/s, ", c.matrix_tflops, c.attention_forward_tflops,
                  c.attention_backward_tflops) +
           format("memory %.4g GB/s and %.4g GB, links %.4g and %.4g GB/s", c.memory_bandwidth, c.memory,
                  c.inside.bandwidth, c.between.bandwidth);
}

inline std::string comparison_text(const Comparison& comparison, const RankOptions& base, int chunks) {
    const auto gb = [](int64_t bytes) { return format("%.3g", 1e-9 * double(bytes)); };
    std::vector<std::vector<std::string>> rows = {{"schedule", "recompute", "step s", "tokens/s", "bubble", "exposed",
                                                   "MFU", "$ / 1e9 tokens", "model GB", "activations", "workspace",
                                                   "total", "rank", "longest"}};
    std::string refused;
    for (size_t i : comparison.shown) {
        const ComparedPlan& plan = comparison.plans[i];
        if (!plan.fits()) refused += "  " + comparison.name(i) + ": " + plan.refusal + "\n";
        if (!plan.step) continue;
        const StepWorth worth = worth_of(comparison.cluster, *plan.step, plan.step_ms);
        rows.push_back({(plan.fits() ? "" : "(") + plan.name + (plan.fits() ? "" : ")"),
                        recompute_names[int(plan.recompute)], format("%.4g", 1e-3 * plan.step_ms),
                        format("%.0f", worth.tokens_per_second), format("%.1f %%", 100 * plan.bubble),
                        format("%.1f %%", 100 * plan.exposed_ms / plan.step_ms), format("%.1f %%", 100 * worth.mfu),
                        worth.dollars > 0 ? format("%.0f", worth.dollars) : "-", gb(plan.bytes.model),
                        gb(plan.bytes.activations), gb(plan.bytes.workspace), gb(plan.bytes.total()),
                        std::to_string(plan.largest), plan.longest_context ? tokens_text(plan.longest_context) : "-"});
    }
    const GptConfig& g = base.model;
    std::string text =
        table_text("plan",
                   {{"model", format("%lld layers, %lld channels, ", (long long)g.layers, (long long)g.channels) +
                                  format("%lld heads, ", (long long)g.heads) + std::to_string(parameter_count(g)) +
                                  " parameters"},
                    {"step", std::to_string(chunks) + " chunks of " + std::to_string(base.chunk_tokens) +
                                 " tokens, context " + std::to_string(g.context)},
                    {"cluster", cluster_text(comparison.cluster, base.layout.ranks)}}) +
        "schedules, the fastest first, each in its best mode that fits; GB of a device of the largest rank\n" +
        columns_text(rows);
    if (!refused.empty()) text += "what does not fit (in brackets above, if it could run)\n" + refused;
    if (const ComparedPlan& plan = comparison.plans[comparison.longest()]; plan.longest_context)
        text += "longest sequence that fits: " + tokens_text(plan.longest_context) + " tokens, " +
                comparison.name(comparison.longest()) + "\n";
    text += "rates 20 % off\n";
    const std::vector<std::string> sentences = comparison.sensitivity();
    if (sentences.empty()) text += "  the order stays the same whichever rate is 20 % lower or higher\n";
    for (const std::string& sentence : sentences) text += "  " + sentence + "\n";
    return text;
}

inline std::string comparison_json(const Comparison& comparison, const RankOptions& base, int chunks) {
    nlohmann::json rows = nlohmann::json::array();
    for (size_t i : comparison.shown) {
        const ComparedPlan& plan = comparison.plans[i];
        nlohmann::json row = {
            {"schedule", plan.name}, {"recompute", recompute_names[int(plan.recompute)]}, {"fits", plan.fits()}};
        if (!plan.fits()) row["reason"] = plan.refusal;
        if (plan.step) {
            const StepWorth worth = worth_of(comparison.cluster, *plan.step, plan.step_ms);
            row.update({{"step_ms", plan.step_ms},
                        {"tokens_per_second", worth.tokens_per_second},
                        {"bubble", plan.bubble},
                        {"exposed_ms", plan.exposed_ms},
                        {"update_ms", plan.update_ms},
                        {"mfu", worth.mfu},
                        {"largest_rank", plan.largest},
                        {"bytes",
                         {{"model", plan.bytes.model},
                          {"activations", plan.bytes.activations},
                          {"workspace", plan.bytes.workspace},
                          {"total", plan.bytes.total()}}}});
            if (worth.dollars > 0) row["dollars_per_billion_tokens"] = worth.dollars;
            if (plan.longest_context) row["longest_context"] = plan.longest_context;
        }
        rows.push_back(std::move(row));
    }
    return json_text({{"cluster", comparison.cluster.name},
                      {"ranks", base.layout.ranks},
                      {"layers", base.model.layers},
                      {"channels", base.model.channels},
                      {"chunks", chunks},
                      {"chunk_tokens", base.chunk_tokens},
                      {"context", base.model.context},
                      {"plans", std::move(rows)},
                      {"rates_20_percent_off", comparison.sensitivity()}},
                     -1);
}
