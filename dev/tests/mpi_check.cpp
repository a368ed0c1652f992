// Run under mpirun by test_mpi.py. `exchange` tries what the transport promises; the others train nothing for ever,
// until one rank dies, hangs, throws or comes to an end. Built for GPUs, too, on the host, with streams that run later
// than they are told (nccl_on_host).
#include <cstdio>
#include <optional>

#include "llmc/io/launch.h"
#include "llmc/io/signals.h"
#include "llmc/parallel/mpi_transport.h"
#include "llmc/parallel/watchdog.h"

static void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("not so: ") + what);
}

// Memory of the device, for messages. Outlives the transport.
class Memory {
public:
    uint8_t* take(int64_t bytes) { return taken_.emplace_back(bytes).data(); }

private:
    std::deque<DeviceMemory<uint8_t>> taken_;
};

// As a kernel would: on a GPU, when the compute stream comes to it.
static void copy(const Device& device, void* to, const void* from, int64_t bytes, Way way) {
    if (bytes == 0) return;
#ifdef USE_CUDA
    const cudaMemcpyKind kind = way == Way::to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
    CUDA_CHECK(cudaMemcpyAsync(to, from, size_t(bytes), kind, device.stream));
#else
    (void)device, (void)way;
    std::memcpy(to, from, size_t(bytes));
#endif
}

// Messages of many sizes from everyone to everyone: some receives are posted before the sends, some after. The next
// round uses their memory again at once, without the host ever waiting for a stream.
static void exchange(const Device& device, Transport& transport, Memory& memory) {
    const int rank = transport.rank, ranks = transport.ranks;
    std::vector<int64_t> sizes = {0, 1, 4096, 70001, 3 << 20, 5};
#ifdef USE_CUDA
    sizes.push_back((33 << 20) + 5);  // goes in three pieces
#endif
    std::vector<Transfer> sends, receives;
    for (int peer = 0; peer < ranks; ++peer)
        for (const int64_t bytes : sizes)
            for (const bool send : {true, false})
                if (peer != rank) (send ? sends : receives).push_back({send, peer, memory.take(bytes), bytes});

    const auto bytes_of = [&](int from, int to, size_t n, int round) {
        std::vector<uint8_t> bytes(static_cast<size_t>(sizes[n % sizes.size()]));
        for (size_t i = 0; i < bytes.size(); ++i)
            bytes[i] = uint8_t(from * 31 + to * 7 + int(n % sizes.size()) * 3 + round * 5 + int(i) + int(i >> 20));
        return bytes;
    };
    constexpr int rounds = 3;
    std::vector<std::vector<uint8_t>> out, in;  // [round and transfer] as the host has them
    for (int round = 0; round < rounds; ++round)
        for (size_t n = 0; n < sends.size(); ++n) {
            out.push_back(bytes_of(rank, sends[n].peer, n, round));
            in.emplace_back(out.back().size());
        }
    for (int round = 0; round < rounds; ++round) {
        const size_t of_round = size_t(round) * sends.size();
        for (size_t n = 0; n < sends.size(); ++n)
            copy(device, sends[n].data, out[of_round + n].data(), sends[n].bytes, Way::to_device);
        const bool sends_first = (rank + round) % 2;
        const int64_t first = transport.post(sends_first ? sends : receives);
        if (round == 1) transport.all_gather("between");
        const int64_t second = transport.post(sends_first ? receives : sends);
        expect(second == first + int64_t(sends.size()), "transfers are numbered on");
        transport.wait(second, second + 1);
        transport.wait(first, second + int64_t(sends.size()));
        for (size_t n = 0; n < receives.size(); ++n)
            copy(device, in[of_round + n].data(), receives[n].data, receives[n].bytes, Way::to_host);
    }
    finish(device);
    for (int round = 0; round < rounds; ++round)
        for (size_t n = 0; n < receives.size(); ++n)
            expect(in[size_t(round) * receives.size() + n] == bytes_of(receives[n].peer, rank, n, round),
                   "bytes arrive");
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
static void mismatch(Transport& transport, Memory& memory, int64_t sent, int64_t expected) {
    const int64_t bytes = transport.rank == 0 ? sent : expected;
    const Transfer t{transport.rank == 0, 1 - transport.rank, memory.take(bytes), bytes};
    transport.post({&t, 1});
    transport.wait(0, 1);
    transport.all_gather("");
}

// A ring in which rank r computes for a while and passes on: every rank is at any time in an op or a wait.
static void ring(Transport& transport, Memory& memory, Progress& progress, const std::string& mode, int who) {
    const int rank = transport.rank, ranks = transport.ranks, next = (rank + 1) % ranks,
              last = (rank + ranks - 1) % ranks;
    uint8_t *const out = memory.take(1), *const in = memory.take(1);
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
        const Transfer transfers[] = {{true, next, out, 1}, {false, last, in, 1}};
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
        const OpenDevice open(1, session.launch.local_rank);
        Memory memory;
        MpiTransport transport(session);
        transport.attach(open.device);
        std::optional<Signals> signals;
        if (mode == "signal") signals.emplace([] { return std::string(); });
        Progress progress;
        const Watchdog watchdog({&progress}, 5, &transport);
        try {
            if (mode == "exchange") exchange(open.device, transport, memory);
            else if (mode == "short") mismatch(transport, memory, 100, 50);
            else if (mode == "long") mismatch(transport, memory, 50, 100);
            else if (mode == "signal") until_signal(transport, *signals, argc > 2 ? std::atoi(argv[2]) : 0);
            else ring(transport, memory, progress, mode, argc > 2 ? std::atoi(argv[2]) : -1);
        } catch (...) {
            transport.abandon();
            throw;
        }
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
