// Which vector instructions this CPU has. The program is built for x86-64-v3 (AVX2, FMA); kernels that gain from wider
// instructions carry them as functions with a target attribute and ask cpu_isa() once per call.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Ordered: each level includes the ones before it.
enum class Isa { avx2, avx512, avx512_bf16, amx };

inline const char* isa_name(Isa isa) {
    static const char* const names[] = {"avx2", "avx512", "avx512_bf16", "amx"};
    return names[int(isa)];
}

// HELIXTRAIN_ISA=avx2|avx512|avx512_bf16|amx lowers the level, so that one machine can test every kernel.
inline Isa cpu_isa() {
    static const Isa isa = [] {
        Isa found = Isa::avx2;
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found = Isa::avx512;
            if (__builtin_cpu_supports("avx512bf16")) {
                found = Isa::avx512_bf16;
                unsigned a = 7, b = 0, c = 0, d = 0;
                __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
                const bool has_amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16 and AMX-TILE
                // Linux grants the 8 KiB of tile state only to processes that ask for it (ARCH_REQ_XCOMP_PERM, tile data).
                if (has_amx && syscall(SYS_arch_prctl, 0x1023, 18) == 0) found = Isa::amx;
            }
        }
        if (const char* wanted = std::getenv("HELIXTRAIN_ISA"))
            for (Isa lower : {Isa::avx2, Isa::avx512, Isa::avx512_bf16})
                if (lower < found && std::strcmp(wanted, isa_name(lower)) == 0) return lower;
        return found;
    }();
    return isa;
}
