// Run under mpirun by test_mpi.py. `exchange` tries what the transport promises; the others train nothing for ever,
// until one rank dies, hangs, throws or comes to an end.
#include <cstdio>
#include <optional>

#include "llmc/io/signals.h"
#include "llmc/parallel/launch.h"
#include "llmc/parallel/mpi_transport.h"
#include "llmc/parallel/watchdog.h"

static void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("not so: ") + what);
}

// Messages of many sizes from everyone to everyone: some receives are posted before the sends, some after.
static void exchange(Transport& transport) {
    const int rank = transport.rank, ranks = transport.ranks;
    const std::vector<int64_t> sizes = {0, 1, 4096, 70001, 3 << 20, 5};
    auto value = [](int from, int to, size_t n, size_t i) { return uint8_t(from * 31 + to * 7 + int(n) * 3 + int(i)); };
    std::vector<std::vector<uint8_t>> buffers;
    for (int round = 0; round < 3; ++round) {
        buffers.clear();
        std::vector<Transfer> sends, receives;
        for (int peer = 0; peer < ranks; ++peer)
            for (size_t n = 0; n < sizes.size() && peer != rank; ++n) {
                for (const bool send : {true, false}) {
                    buffers.emplace_back(size_t(sizes[n]));
                    if (send)
                        for (size_t i = 0; i < buffers.back().size(); ++i) buffers.back()[i] = value(rank, peer, n, i);
                    (send ? sends : receives).push_back({send, peer, buffers.back().data(), sizes[n]});
                }
            }
        const bool sends_first = (rank + round) % 2;
        const int64_t first = transport.post(sends_first ? sends : receives);
        if (round == 1) transport.all_gather("between");
        const int64_t second = transport.post(sends_first ? receives : sends);
        expect(second == first + int64_t(sends.size()), "transfers are numbered on");
        transport.wait(second, second + 1);
        transport.wait(first, second + int64_t(sends.size()));
        size_t n = 0;
        for (const Transfer& t : receives) {
            for (size_t i = 0; i < size_t(t.bytes); ++i)
                expect(static_cast<uint8_t*>(t.data)[i] == value(t.peer, rank, n % sizes.size(), i), "bytes arrive");
            ++n;
        }
    }
    const std::vector<std::string> texts =
        transport.all_gather(std::string(size_t(rank) * 1000, 'a') + std::to_string(rank));
    for (int r = 0; r < ranks; ++r)
        expect(texts[size_t(r)] == std::string(size_t(r) * 1000, 'a') + std::to_string(r),
               "texts are gathered by rank");
    double values[2] = {0.1 * rank, 1};
    transport.sum(values);
    expect(values[1] == ranks, "values are summed");
    if (rank == 0) std::printf("exchange: all as promised\n");
}

// A planted error: the receiver expects another size than the sender sends.
static void mismatch(Transport& transport, int64_t sent, int64_t expected) {
    std::vector<char> buffer(size_t(std::max(sent, expected)));
    const Transfer t{transport.rank == 0, 1 - transport.rank, buffer.data(), transport.rank == 0 ? sent : expected};
    transport.post({&t, 1});
    transport.wait(0, 1);
    transport.all_gather("");
}

// A ring in which rank r computes for a while and passes on: every rank is at any time in an op or a wait.
static void ring(Transport& transport, Progress& progress, const std::string& mode, int who) {
    const int rank = transport.rank, ranks = transport.ranks, next = (rank + 1) % ranks,
              last = (rank + ranks - 1) % ranks;
    char out = 0, in = 0;
    transport.all_gather("");
    for (int step = 0;; ++step) {
        if (step == 20) std::fprintf(stderr, "rank %d pid %d\n", rank, int(getpid()));  // all have heard of all
        const Op op{Part::attention, Pass::F, 3, step % 16};
        progress.computing(op);
        std::this_thread::sleep_for(std::chrono::milliseconds(5 + 5 * rank));
        if (mode == "throw" && rank == who && step == 50)
            throw Failure(EXIT_NONFINITE, "rank " + std::to_string(rank) + " throws");
        if (mode == "hang" && rank == who && step == 50) pause();
        if (mode == "end" && step == 50) return;
        const Transfer transfers[] = {{true, next, &out, 1}, {false, last, &in, 1}};
        const int64_t first = transport.post(transfers);
        Op receive = op;
        receive.kind = Kind::receive;
        receive.peer = last;
        progress.waiting(receive);
        transport.wait(first, first + 2);
    }
}

// Goes on until a signal has reached some rank, as training does, and then saves for so many seconds.
static void until_signal(Transport& transport, const Signals& signals, int saving) {
    for (double stop[] = {0}; !stop[0]; transport.sum(stop)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        if (transport.rank == 0) std::fprintf(stderr, "ready\n");
        stop[0] = signals.stop_wanted;
    }
    std::this_thread::sleep_for(std::chrono::seconds(saving));
}

int main(int argc, char** argv) {
    try {
        const std::string mode = argc > 1 ? argv[1] : "";
        const MpiSession session(read_launch());
        MpiTransport transport(session);
        std::optional<Signals> signals;
        if (mode == "signal") signals.emplace([] { return std::string(); });
        Progress progress;
        const Watchdog watchdog({&progress}, 5, &transport);
        if (mode == "exchange") exchange(transport);
        else if (mode == "short") mismatch(transport, 100, 50);
        else if (mode == "long") mismatch(transport, 50, 100);
        else if (mode == "signal") until_signal(transport, *signals, argc > 2 ? std::atoi(argv[2]) : 0);
        else ring(transport, progress, mode, argc > 2 ? std::atoi(argv[2]) : -1);
        progress.nothing();
        return mode == "signal" ? EXIT_REQUEUE : 0;
    } catch (const Failure& failure) {
        std::fprintf(stderr, "mpi_check: %s\n", failure.what());
        return failure.exit_code;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "mpi_check: %s\n", error.what());
        return EXIT_INTERNAL;
    }
}
