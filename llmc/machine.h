// What the machine has left: memory and cores, by the kernel's and the control group's word; and how idle threads leave
// cores to others.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

// The control group's own files, version 2, with the path of this process inside the hierarchy.
inline std::string cgroup_file(const std::string& name) {
    std::ifstream in("/proc/self/cgroup");
    for (std::string line; std::getline(in, line);)
        if (line.rfind("0::", 0) == 0) {
            const std::string own = "/sys/fs/cgroup" + line.substr(3) + "/" + name;
            return std::ifstream(own) ? own : "/sys/fs/cgroup/" + name;
        }
    return "/sys/fs/cgroup/" + name;
}

// Bytes that this process may still take: free and reclaimable memory, or what the control group leaves.
inline int64_t available_memory() {
    int64_t available = std::numeric_limits<int64_t>::max();
    std::ifstream info("/proc/meminfo");
    for (std::string key, unit; info >> key;) {
        int64_t kib = 0;
        info >> kib;
        std::getline(info, unit);
        if (key == "MemAvailable:") available = kib * 1024;
    }
    int64_t limit = 0, used = 0;
    if (std::ifstream(cgroup_file("memory.max")) >> limit && std::ifstream(cgroup_file("memory.current")) >> used) {
        int64_t cache = 0, value = 0;  // pages of files count as used, but are given back on demand
        std::ifstream stat(cgroup_file("memory.stat"));
        for (std::string key; stat >> key >> value;)
            if (key == "inactive_file" || key == "active_file") cache += value;
        available = std::min(available, limit - used + cache);
    }
    return available;
}

// Bytes of this process in memory.
inline int64_t resident_bytes() {
    int64_t size = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> size >> resident;
    return resident * 4096;
}

// Whether the process was given a part of the machine's cores.
inline bool bound_to_cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) < sysconf(_SC_NPROCESSORS_ONLN);
}

// Cores that this process may use: its affinity mask, or what the control group's quota amounts to, at least one.
inline int usable_threads() {
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
    double quota = 0, period = 0;
    if (std::ifstream(cgroup_file("cpu.max")) >> quota >> period && period > 0)
        cores = std::min(cores, int(std::ceil(quota / period)));
    return std::max(cores, 1);
}

// Idle OpenMP threads spin for milliseconds before they sleep, which costs dear where other programs or ranks want the
// core. libgomp reads how long before main begins, so the program starts itself once more with a short time.
inline void spin_briefly(char** argv) {
    if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
    setenv("GOMP_SPINCOUNT", "20000", 1);
    execv("/proc/self/exe", argv);  // where that fails, threads spin
}
