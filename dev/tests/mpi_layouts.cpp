// Run under mpirun by test_mpi.py: of the layouts over all axes (layouts.h) those for processes and for so many ranks
// as there are. Each has to agree with one rank, and to the bit with thread ranks. Built for GPUs, too, on the host.
#include <cstdio>

#include "dev/tests/layouts.h"
#include "llmc/parallel/mpi_transport.h"

#ifdef USE_CUDA
constexpr int steps = 2, every = 2;  // every second layout: the host plays the GPU, slowly
#else
constexpr int steps = 5, every = 1;
#endif

int main() {
    try {
        const MpiSession session(read_launch());
        MpiTransport transport(session);
        int met = 0, passed = 0, failed = 0;
        for (const LayoutCase& layout : CoveringLayouts(seed_of_tests()).processes) {
            if (layout.ranks != transport.ranks || met++ % every != 0) continue;
            const LayoutRun run = run_rank(layout, transport, steps);
            if (transport.rank != 0) continue;
            LayoutCase one = layout.on_one_rank();
            one.schedule = "1f1b";
            Difference difference = compare_runs(run, run_layout(one, steps), layout.model());
            if (!same_bits(run, run_layout(layout, steps)))
                difference.problems.push_back("the bits are not those of thread ranks");
            std::printf("%s: %s\n", layout.text().c_str(), difference.text().c_str());
            for (const std::string& problem : difference.problems) std::printf("  %s\n", problem.c_str());
            ++(difference.problems.empty() ? passed : failed);
        }
        if (transport.rank == 0) std::printf("%d passed, %d failed\n", passed, failed);
        return failed > 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "mpi_layouts: %s\n", error.what());
        return EXIT_INTERNAL;
    }
}
