// launch.h: which rank this process is, from the environments that launchers make, and which environments are refused.
#include "llmc/io/launch.h"

#include <gtest/gtest.h>

#include <map>

using Variables = std::map<std::string, std::string>;

static Launch read(const Variables& variables) {
    return read_launch([&](const char* name) {
        const auto found = variables.find(name);
        return found == variables.end() ? nullptr : found->second.c_str();
    });
}

static std::string refusal(const Variables& variables) {
    try {
        read(variables);
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, EXIT_CONFIG);
        return failure.what();
    }
    return "accepted";
}

static void expect_launch(const Launch& launch, int rank, int ranks, int local_rank, int local_ranks,
                          const std::string& source) {
    EXPECT_EQ(launch.rank, rank);
    EXPECT_EQ(launch.ranks, ranks);
    EXPECT_EQ(launch.local_rank, local_rank);
    EXPECT_EQ(launch.local_ranks, local_ranks);
    EXPECT_EQ(launch.source, source);
}

static const Variables open_mpi = {{"OMPI_COMM_WORLD_RANK", "5"},
                                   {"OMPI_COMM_WORLD_SIZE", "8"},
                                   {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                   {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
static const Variables pmi = {{"PMI_RANK", "2"}, {"PMI_SIZE", "3"}, {"MPI_LOCALRANKID", "0"}, {"MPI_LOCALNRANKS", "1"}};
static const Variables torchrun = {
    {"RANK", "5"}, {"WORLD_SIZE", "8"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "4"}, {"MASTER_PORT", "29500"}};
static const Variables slurm = {{"SLURM_STEP_ID", "0"},        {"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_NTASKS", "8"},
                                {"SLURM_STEP_NUM_NODES", "2"}, {"SLURM_PROCID", "5"},         {"SLURM_LOCALID", "1"}};

static Variables operator+(Variables one, const Variables& other) {
    for (const auto& [name, value] : other) one[name] = value;
    return one;
}

TEST(Launch, NoLauncher) {
    expect_launch(read({}), 0, 1, 0, 1, "");
    expect_launch(read({{"RANK", ""}, {"WORLD_SIZE", ""}, {"MPI_LOCALRANKID", "3"}}), 0, 1, 0, 1, "");
}

TEST(Launch, EachLauncher) {
    expect_launch(read(open_mpi), 5, 8, 1, 4, "Open MPI");
    expect_launch(read(pmi), 2, 3, 0, 1, "PMI");
    expect_launch(read(torchrun), 5, 8, 1, 4, "torchrun");
    expect_launch(read(slurm), 5, 8, 1, 8, "Slurm");
    expect_launch(read({{"RANK", "3"}, {"WORLD_SIZE", "4"}}), 3, 4, 3, 4, "torchrun");  // local ones are not told
}

TEST(Launch, LaunchersThatAgree) {
    expect_launch(read(open_mpi + torchrun + slurm), 5, 8, 1, 4, "Open MPI");
    expect_launch(read(pmi + Variables{{"RANK", "2"}, {"WORLD_SIZE", "3"}}), 2, 3, 0, 1, "PMI");
}

TEST(Launch, SlurmCountsRanksOnlyInASteps) {
    Variables script = slurm;  // of a job: it is one process, whatever the number of tasks
    script.erase("SLURM_STEP_ID");
    script["SLURM_PROCID"] = "0";
    expect_launch(read(script), 0, 1, 0, 1, "");
    expect_launch(read(script + open_mpi), 5, 8, 1, 4, "Open MPI");
    // mpirun starts its daemons as a step with one task a node, `srun --pty bash` is a step of one task.
    const Variables daemon = {{"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_PROCID", "1"}};
    expect_launch(read(slurm + daemon + open_mpi), 5, 8, 1, 4, "Open MPI");
    expect_launch(read(slurm + daemon), 1, 2, 1, 2, "Slurm");
}

TEST(Launch, ContradictionsNameBothAndWhatToUnset) {
    const std::string text = refusal(open_mpi + Variables{{"RANK", "0"}, {"WORLD_SIZE", "2"}});
    for (const char* part : {"contradict", "Open MPI says rank 5 of 8 (OMPI_COMM_WORLD_RANK=5, OMPI_COMM_WORLD_SIZE=8",
                             "torchrun says rank 0 of 2 (RANK=0, WORLD_SIZE=2", "unset RANK WORLD_SIZE",
                             "unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE"})
        EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
    EXPECT_NE(refusal(open_mpi + pmi), "accepted");
    EXPECT_NE(refusal(slurm + pmi), "accepted");
    EXPECT_NE(refusal(open_mpi + Variables{{"RANK", "4"}, {"WORLD_SIZE", "8"}}), "accepted");  // the same size
}

TEST(Launch, HalfSetAndSenseless) {
    EXPECT_NE(refusal({{"RANK", "1"}}).find("half set: RANK=1, WORLD_SIZE=(not set)"), std::string::npos);
    EXPECT_NE(refusal({{"PMI_SIZE", "4"}, {"PMI_RANK", ""}}).find("PMI_RANK=(not set)"), std::string::npos);
    for (const char* value : {"x", "-1", "1.5", " 1", "0x1", "99999999999", "4", "5"})
        EXPECT_NE(refusal({{"RANK", value}, {"WORLD_SIZE", "4"}}), "accepted") << value;
    EXPECT_NE(refusal({{"RANK", "0"}, {"WORLD_SIZE", "0"}}), "accepted");
    EXPECT_NE(refusal(torchrun + Variables{{"LOCAL_RANK", "4"}}), "accepted");
    EXPECT_NE(refusal(torchrun + Variables{{"LOCAL_WORLD_SIZE", "9"}}), "accepted");
    EXPECT_NE(refusal(torchrun + Variables{{"LOCAL_RANK", "gpu"}}).find("LOCAL_RANK is \"gpu\""), std::string::npos);
}
