// Which rank of how many this process is, as the launcher's environment variables tell: mpirun of Open MPI, mpiexec of
// MPICH and its kin (PMI), srun of Slurm, or whatever sets the variables of torchrun.
#pragma once

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "llmc/common.h"

struct Launch {
    int rank = 0, ranks = 1;
    int local_rank = 0, local_ranks = 1;  // on this host; all ranks where no variable tells (MPI then does)
    std::string source;                   // empty without a launcher

    std::string text() const { return "rank " + std::to_string(rank) + " of " + std::to_string(ranks); }
};

using Environment = std::function<const char*(const char*)>;

// A contradiction between launchers is refused: one of them is left over, and a wrong guess trains on the wrong data.
inline Launch read_launch(const Environment& environment) {
    struct Source {
        const char *name, *rank, *ranks, *local_rank, *local_ranks;
    };
    static constexpr Source slurm{"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", nullptr};
    static constexpr Source launchers[] = {
        {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
         "OMPI_COMM_WORLD_LOCAL_SIZE"},
        {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
        {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    };
    auto get = [&](const char* name) {
        const char* value = name ? environment(name) : nullptr;
        return std::string(value ? value : "");
    };
    auto is_number = [](const std::string& text) {
        return !text.empty() && text.size() < 8 && text.find_first_not_of("0123456789") == std::string::npos;
    };
    auto number = [&](const Source& s, const char* name, int absent) {
        const std::string text = get(name);
        if (text.empty()) return absent;
        if (!is_number(text))
            throw Failure(EXIT_CONFIG,
                          std::string(s.name) + "'s variable " + name + " is \"" + text +
                              "\", which is no number of ranks; start again from a clean shell, or unset it");
        return std::stoi(text);
    };

    std::vector<Launch> found;
    std::string told;  // what was found, with the names of the variables
    auto add = [&](const Source& s) {
        const std::string rank = get(s.rank), ranks = get(s.ranks);
        if (rank.empty() && ranks.empty()) return;
        const std::string values = std::string(s.rank) + "=" + (rank.empty() ? "(not set)" : rank) + ", " + s.ranks +
                                   "=" + (ranks.empty() ? "(not set)" : ranks);
        if (rank.empty() || ranks.empty())
            throw Failure(EXIT_CONFIG, std::string(s.name) + "'s variables are half set: " + values +
                                           "; set both, or unset what is left over");
        Launch launch{.rank = number(s, s.rank, 0), .ranks = number(s, s.ranks, 1), .source = s.name};
        launch.local_rank = number(s, s.local_rank, launch.rank);
        launch.local_ranks = number(s, s.local_ranks, launch.ranks);
        if (launch.rank >= launch.ranks || launch.local_rank >= launch.local_ranks || launch.local_ranks > launch.ranks)
            throw Failure(EXIT_CONFIG, std::string(s.name) + "'s variables make no sense: " + values + ", local rank " +
                                           std::to_string(launch.local_rank) + " of " +
                                           std::to_string(launch.local_ranks) + "; unset what is left over");
        told += (found.empty() ? "" : "; ") + launch.source + " says " + launch.text() + " (" + values +
                "; to drop it: unset " + s.rank + " " + s.ranks + ")";
        found.push_back(launch);
    };
    for (const Source& s : launchers) add(s);
    // Slurm's variables speak of ranks in a job step that srun started, and not in the script of a job. A step of one
    // task a node may be a shell, or the daemons of an mpirun, and says nothing where another launcher speaks.
    const bool one_a_node = get("SLURM_STEP_NUM_TASKS") == get("SLURM_STEP_NUM_NODES");
    if (!get("SLURM_STEP_ID").empty() && (found.empty() || !one_a_node)) add(slurm);

    for (const Launch& launch : found)
        if (launch.rank != found[0].rank || launch.ranks != found[0].ranks)
            throw Failure(EXIT_CONFIG, "launchers contradict each other: " + told);
    return found.empty() ? Launch{} : found[0];
}

inline Launch read_launch() {
    return read_launch([](const char* name) { return std::getenv(name); });
}
