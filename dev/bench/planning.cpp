// How long planning takes: the simulation of one large schedule; lists, proof, arenas of all ranks and simulation of
// one plan; `plan` over all schedules. Medians. `reference` is the goal, in seconds.
//
//   build/bench/planning [--json] [--rounds 5]
#define TESTING
#include "train_gpt.cu"

#include "llmc/commands/plan.h"

double seconds_of(const auto& work) {
    const double start = seconds_now();
    work();
    return seconds_now() - start;
}

int main(int argc, char** argv) {
    bool json = false;
    int rounds = 5;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--json")) json = true;
        else if (!std::strcmp(argv[i], "--rounds") && i + 1 < argc) rounds = std::max(1, std::atoi(argv[++i]));
        else return std::fprintf(stderr, "planning [--json] [--rounds 5]\n"), EXIT_CONFIG;
    }
    const auto report = [&](const std::string& name, const std::vector<double>& seconds, double goal) {
        const double ours = median(seconds);
        if (json)
            std::printf("%s\n", json_text({{"case", name},
                                           {"metric", "seconds"},
                                           {"ours", ours},
                                           {"reference", goal},
                                           {"reference_name", "goal"},
                                           {"ratio", goal / ours}},
                                          -1)
                                    .c_str());
        else std::printf("%-60s %8.3f s   (goal %.1f s)\n", name.c_str(), ours, goal);
        std::fflush(stdout);
    };
    const Cluster cluster = read_cluster("h20x64");
    for (const char* name : {"1f1b", "interleaved", "zb-h2", "helix"}) {
        const ScheduleInput in{64, 128, 128, 2, std::string(name) == "interleaved" ? 2 : 1};
        const OpLists lists = find_schedule(name)->lists(in);
        const GptConfig g{128, 4096, 32, 131072, 50257, 50304};
        const TensorRules rules{128, true, Recompute::none, std::string(name) == "helix"};
        std::vector<double> seconds;
        for (int round = 0; round < rounds; ++round)
            seconds.push_back(seconds_of([&] {
                const OpCosts costs(cluster, element_sizes("bf16"), g, std::vector<ChunkShape>(128, {131072}), rules);
                simulate(lists, in, costs, [&](const Op& op, int rank) { return costs.message_ms(op, rank); });
            }));
        report("simulation, p=64 L=128 m=128, " + std::string(name), seconds, 0.1);
    }
    for (const char* name : {"1f1b", "interleaved", "zb-h2", "helix"}) {
        RankOptions options;
        options.model = {128, 4096, 32, 131072, 50257, 50304};
        options.chunk_tokens = 131072;
        options.layout.ranks = 64;
        options.layout.schedule = name;
        std::map<std::string, std::vector<double>> parts;
        std::vector<double> all;
        for (int round = 0; round < rounds; ++round)
            all.push_back(seconds_of([&] {
                const ScheduleInput in = options.schedule_input(256, true, false);
                OpLists lists;
                parts["lists"].push_back(seconds_of([&] { lists = find_schedule(name)->lists(in); }));
                parts["proof"].push_back(seconds_of([&] {
                    if (!check_lists(lists, in).empty()) throw std::logic_error("wrong lists");
                }));
                const std::vector<ChunkShape> chunks(256, {131072});
                const TensorRules rules = options.tensor_rules(true);
                parts["simulation"].push_back(seconds_of([&] {
                    const OpCosts costs(cluster, element_sizes("bf16"), options.model, chunks, rules);
                    simulate(lists, in, costs, [&](const Op& op, int rank) { return costs.message_ms(op, rank); });
                }));
                parts["arenas"].push_back(seconds_of([&] {
#pragma omp parallel for schedule(dynamic)
                    for (size_t r = 0; r < lists.size(); ++r)
                        make_plan(std::move(lists[r]), chunks, options.model, rules, element_sizes("bf16").tensor);
                }));
            }));
        std::string what = "plan, p=64 L=128 m=256, " + std::string(name);
        report(what, all, 0.5);
        if (!json)
            for (const auto& [part, seconds] : parts) std::printf("    %-12s %8.3f s\n", part.c_str(), median(seconds));
    }
    RankOptions options;
    options.model = {32, 4096, 32, 131072, 50257, 50304};
    options.chunk_tokens = 131072;
    options.layout.ranks = cluster.ranks();
    std::vector<double> seconds;
    for (int round = 0; round < rounds; ++round)
        seconds.push_back(seconds_of([&] { Comparison(cluster, options, 16, {}, false); }));
    report("all schedules, 7B on h20x64, m=16", seconds, 5);
    return 0;
}
