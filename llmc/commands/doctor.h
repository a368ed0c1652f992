// `doctor`: what was compiled in, what the machine has, what it can do (measured), and what is likely to slow a run
// down. With --json one object, for programs such as dev/bench/cpu_vs_torch. --calibrate is in calibrate.h.
#pragma once

#include <cstdlib>
#include <fstream>

#include "llmc/commands/calibrate.h"
#include "llmc/io/config.h"
#include "llmc/io/json.h"
#include "llmc/io/log.h"
#include "llmc/io/manifest.h"
#include "llmc/kernels/peak.h"
#include "llmc/machine.h"

inline std::string first_line(const std::string& path) {
    std::string line;
    std::getline(std::ifstream(path) >> std::ws, line);
    return line;
}

// Each is a sentence: what was found, and what to do about it.
inline std::vector<std::string> known_problems(int threads) {
    std::vector<std::string> problems;
#ifndef USE_CUDA
    if (cpu_isa() == Isa::avx2)
        problems.push_back(
            "The CPU has no AVX-512 (or HELIXTRAIN_ISA forbids it): products run at half the rate of one that has.");
    if (std::is_same_v<floatX, bf16> && cpu_isa() < Isa::avx512_bf16)
        problems.push_back(
            "The CPU has no bf16 products: this build converts to fp32 and is slower than `make PRECISION=fp32`.");
#endif
    const std::string pages = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
    if (pages.find("[never]") != std::string::npos)
        problems.push_back(
            "Transparent huge pages are off, which costs TLB misses: echo madvise > "
            "/sys/kernel/mm/transparent_hugepage/enabled");
    double load = 0;
    if (std::ifstream("/proc/loadavg") >> load && load > 0.5 * threads)
        problems.push_back(
            format("Other programs load the machine (%.1f runnable on average): figures will be low.", load));
    if (threads > 1 && !std::getenv("OMP_WAIT_POLICY") && load > threads)
        problems.push_back(
            "More runnable programs than cores: OMP_WAIT_POLICY=passive keeps idle threads from spinning.");
    const std::string governor = first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    if (governor == "powersave")
        problems.push_back("The CPU's frequency governor is powersave; performance is faster.");
    if (usable_threads() > threads)
        problems.push_back("--threads " + std::to_string(threads) + " leaves cores idle; this process may use " +
                           std::to_string(usable_threads()) + ".");
    return problems;
}

#ifdef USE_MPI
inline constexpr bool built_with_mpi = true;
#else
inline constexpr bool built_with_mpi = false;
#endif

inline int doctor_command(const Config& c) {
    if (!c.run.calibrate.empty()) return calibrate_command(c);
    const int threads = c.threads();
    const std::map<std::string, std::string> environment = current_environment();
    std::vector<std::string> problems = known_problems(threads);
    std::vector<TableRow> measured;
    nlohmann::json json = {{"environment", environment}, {"threads", threads}};
    const auto measure = [&](const char* key, double value, const char* name, const char* unit) {
        json[key] = value;
        measured.push_back({name, format("%.4g ", value) + unit});
    };
    int64_t memory = 0;
    std::vector<TableRow> libraries;  // of CUDA
#ifdef USE_CUDA
    const std::string built_for = "GPU, for sm_80, sm_90 and later";
    std::string machine = "no GPU";
    try {
        memory = available_on_device();
        machine = device_text("");
        measure(PRECISION_NAME "_gflops", measure_matrix_peak(threads), PRECISION_NAME " products", "GFLOP/s");
        measure("bandwidth_gb_per_s", measure_bandwidth(threads), "memory bandwidth", "GB/s (copy)");
    } catch (const Failure& failure) { problems.push_back(failure.what()); }
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);  // 0 where there is none
    CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    libraries.push_back({"CUDA", "runtime " + version(runtime) + ", driver for " + version(driver)});
#ifdef USE_CUDNN
    const std::string absence = cudnn_absence();
    libraries.push_back({"cuDNN", absence.empty() ? cudnn_version() : absence});
#else
    libraries.push_back({"cuDNN", "not compiled in: our own attention"});
#endif
#ifdef USE_NCCL
    int nccl = 0;
    ncclGetVersion(&nccl);
    libraries.push_back({"NCCL", std::to_string(nccl / 10000) + "." + std::to_string(nccl % 10000 / 100) + "." +
                                     std::to_string(nccl % 100)});
#else
    libraries.push_back({"NCCL", "not compiled in: ranks exchange within a GPU or through the host"});
#endif
#else
    const std::string built_for = "CPU, built for x86-64-v3 (AVX2); wider kernels are chosen at start";
    const std::string machine = isa_name(cpu_isa());
    memory = available_on_device();
    measure("fp32_gflops", measure_fp32_peak(threads), "fp32 products", "GFLOP/s");
    measure("bf16_gflops", measure_bf16_peak(threads), "bf16 products", "GFLOP/s");
    measure("bandwidth_gb_per_s", measure_bandwidth(threads), "memory bandwidth", "GB/s (triad)");
#endif
    if (c.json) {
        json["memory_available_bytes"] = memory;
        json["problems"] = problems;
        for (const TableRow& row : libraries) json[row.first] = row.second;
        std::printf("%s\n", json_text(json, -1).c_str());
        return 0;
    }
    print_table("compiled in",
                {{"device", built_for},
                 {"precision", PRECISION_NAME},
                 {"compiler", "g++ " __VERSION__},
                 {"ranks", built_with_mpi ? "threads of a process, or processes under MPI"
                                          : "threads of a process; MPI was not found when it was built"}});
    if (!libraries.empty()) print_table("libraries", libraries);
    print_table("machine", {{"cpu", environment.at("cpu")},
                            {"computes on", machine},
                            {"threads", std::to_string(threads)},
                            {"memory available", bytes_text(memory)}});
    if (!measured.empty()) print_table("measured", measured);
    std::printf("known problems%s\n", problems.empty() ? ": none found" : "");
    for (const std::string& problem : problems) std::printf("  - %s\n", problem.c_str());
    return 0;
}
