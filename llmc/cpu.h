// Which vector instructions this CPU has. The program is built for x86-64-v3 (AVX2, FMA); kernels that gain from wider
// instructions carry them as functions with a target attribute and ask cpu_isa() once per call.
#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "llmc/common.h"

// Ordered: each level includes the ones before it.
enum class Isa { avx2, avx512, avx512_bf16, amx };

inline const char* isa_name(Isa isa) {
    static const char* const names[] = {"avx2", "avx512", "avx512_bf16", "amx"};
    return names[int(isa)];
}

// HELIXTRAIN_ISA=avx2|avx512|avx512_bf16|amx lowers the level, so that one machine can test every kernel. main asks
// first, so that a level that does not exist is refused before any kernel runs.
inline Isa cpu_isa() {
    static const Isa isa = [] {
        Isa found = Isa::avx2;
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found = Isa::avx512;
            if (__builtin_cpu_supports("avx512bf16")) {
                found = Isa::avx512_bf16;
                unsigned a = 0, b = 0, c = 0, d = 0;
                __get_cpuid_count(7, 0, &a, &b, &c, &d);
                const bool has_amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
                // Linux grants the 8 KiB of tile state only to processes that ask for it (ARCH_REQ_XCOMP_PERM, tile
                // data).
                if (has_amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) found = Isa::amx;
            }
        }
        const char* wanted = std::getenv("HELIXTRAIN_ISA");
        if (!wanted) return found;
        std::string levels;
        for (int level = 0; level <= int(found); ++level) {
            if (std::string(wanted) == isa_name(Isa(level))) return Isa(level);
            levels += (level ? ", " : "") + std::string(isa_name(Isa(level)));
        }
        throw Failure(EXIT_CONFIG,
                      "HELIXTRAIN_ISA=" + std::string(wanted) + " is no level of this CPU; it has " + levels);
    }();
    return isa;
}
