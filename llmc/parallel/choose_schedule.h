// `train --schedule auto`: of the schedules that this program can run and that fit, the one with the shortest step in
// simulation. Recomputation stays as configured; folds, row pieces, rounds and virtual stages are chosen unless they
// were given.
#pragma once

#include "llmc/parallel/compare_plans.h"
#include "llmc/parallel/memory.h"
#include "llmc/parallel/transport.h"

// The machine that a run is on, if there is a description: --cluster, or dev/clusters/this-cpu.toml where `doctor
// --calibrate` has written it. Nobody has asked for that one: if it cannot be read, or is of another kind of program or
// of ranks of another size, the run says so and goes on without. Training has one device a rank, and what is available
// here decides about memory.
inline std::optional<Cluster> cluster_of_this_run(const Config& c) {
    std::optional<Cluster> cluster;
    if (!c.plan.cluster.empty()) cluster = read_cluster(c.plan.cluster);
#ifndef USE_CUDA
    else if (path_exists(clusters_directory() / "this-cpu.toml")) try {
            cluster = read_cluster("this-cpu");
            const std::string precision = std::is_same_v<floatX, bf16> ? "bf16-fp32" : "fp32";
            if (cluster->threads != c.threads() || cluster->precision != precision)
                throw Failure(EXIT_CONFIG, "dev/clusters/this-cpu.toml describes ranks of " +
                                               std::to_string(cluster->threads) + " threads in " + cluster->precision +
                                               ", this run has " + std::to_string(c.threads()) + " in " + precision +
                                               "; `train_gpt doctor --threads " + std::to_string(c.threads()) +
                                               " --calibrate dev/clusters/this-cpu.toml` measures those");
        } catch (const Failure& failure) {
            cluster.reset();
            std::fprintf(stderr, "train_gpt: goes on without a description of this machine: %s\n", failure.what());
        }
#endif
    if (cluster) cluster->tp = 1, cluster->memory = INFINITY;
    return cluster;
}

// Sets the schedule and its numbers, and says why. One process chooses for all.
inline void choose_schedule(Config& c, Transport& processes) {
    const OpenChoices open{true,  false, !c.typed.count("folds"),     !c.typed.count("virtual-stages"),
                           false, false, !c.typed.count("row-pieces")};
    c.parallel.schedule = "1f1b";
    const RankOptions base = rank_options(c, model_of(c), true);
    const std::vector<RankOptions> layouts = layouts_to_compare(base, int(planned_chunks(c)), open);
    const auto take = [](Config& config, const RankOptions& layout) {
        config.parallel.schedule = layout.layout.schedule;
        config.parallel.folds = layout.layout.folds;
        config.parallel.round_chunks = layout.layout.round_chunks;
        config.parallel.row_pieces = layout.layout.row_pieces;
        config.parallel.virtual_stages = layout.layout.virtual_stages;
    };
    double chosen = 0;  // one more than the index of its layout
    std::string why;
    processes.together([&] {
        if (processes.rank != 0) return;
        Cluster cluster = cluster_of_rate(1000);  // the arithmetic alone: the rate does not change the order
        cluster.name =
            "the arithmetic alone (no dev/clusters/this-cpu.toml for such ranks: train_gpt doctor --threads " +
            std::to_string(c.threads()) + " --calibrate writes it)";
        if (const std::optional<Cluster> known = cluster_of_this_run(c)) cluster = *known;
        choose_device(c.launch.local_rank);
        const int64_t available = c.compute.memory ? c.compute.memory : available_on_device();
        cluster.memory = base.memory_limit ? 1e-9 * double(base.memory_limit) : INFINITY;
        const std::vector<ComparedPlan> plans = compare_plans(cluster, base, int(planned_chunks(c)), open);
        std::string times;  // of steps, relative to the shortest
        for (const ComparedPlan& plan : plans) {
            if (!plan.fits()) continue;
            const size_t index =
                size_t(std::find_if(layouts.begin(), layouts.end(),
                                    [&](const RankOptions& o) { return o.schedule_name() == plan.name; }) -
                       layouts.begin());
            Config candidate = c;
            take(candidate, layouts[index]);
            if (chosen == 0 &&
                device_bytes(memory_plans(rank_options(candidate, model_of(c), true)), c.launch) <= available)
                chosen = double(index + 1);
            times += (times.empty() ? "" : ", ") + plan.name + format(" %.3f", plan.step_ms / plans[0].step_ms);
        }
        why = "chosen by --schedule auto from " + cluster.name + "; steps: " + times;
    });
    processes.sum({&chosen, 1});
    c.plan.choice = chosen > 0 ? why : "--schedule auto: no schedule fits into memory";
    if (chosen > 0) take(c, layouts[size_t(chosen) - 1]);
}
