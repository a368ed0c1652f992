// The transports between GPUs, with thread ranks, on CUDA and NCCL as dev/tests/nccl_on_host has them: messages arrive
// in order and only then are read; the host waits for no stream; whatever fails ends NCCL on every rank, in bounded
// time. Built twice, with the address sanitizer and with the thread sanitizer, which sees what streams do not wait for.
#include <gtest/gtest.h>
#include <signal.h>

#include <barrier>

#include "dev/tests/thread_ranks.h"
#include "llmc/parallel/nccl_transport.h"
#include "llmc/parallel/watchdog.h"

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:exitcode=66"; }

namespace {

using nccl_on_host::Fault;

enum class Kind { threads, nccl };
const Kind kinds[] = {Kind::threads, Kind::nccl};

// What a Rank does with its transport.
class Worker {
public:
    Device device;
    Transport& transport;
    std::deque<DeviceMemory<std::byte>> memory;

    explicit Worker(Transport& transport) : transport(transport) {
        CUDA_CHECK(cudaStreamCreateWithFlags(&device.stream, cudaStreamNonBlocking));
        try {
            transport.attach(device);
        } catch (...) {
            cudaStreamDestroy(device.stream);
            throw;
        }
    }
    ~Worker() {
        if (std::uncaught_exceptions() > 0) transport.abandon();
        finish();
        if (std::uncaught_exceptions() == 0) transport.detach();
        cudaStreamDestroy(device.stream);
    }
    template <class T>
    T* allocate(int64_t count) {
        return reinterpret_cast<T*>(memory.emplace_back(count * int64_t(sizeof(T))).data());
    }
    void finish() { cudaStreamSynchronize(device.stream); }
    // A kernel: runs on the device when the compute stream comes to it.
    void launch(std::function<void()> kernel) {
        device.stream->tell([kernel = std::move(kernel)] { on_device_memory_of_stream(kernel); });
    }
};

void on_gpus(Kind kind, int ranks, const std::function<void(Worker&)>& body) {
    on_thread_ranks(ranks, [&](Transport& threads) {
        if (kind == Kind::threads) {
            Worker worker(threads);
            body(worker);
        } else {
            NcclTransport transport(threads);
            Worker worker(transport);
            body(worker);
        }
    });
}

class GpuTransport : public testing::Test {
protected:
    void SetUp() override {
        nccl_on_host::behaviour = {};
        nccl_on_host::aborted = nccl_on_host::destroyed = 0;
        alarm(60);  // a test that hangs fails
    }
    void TearDown() override { alarm(0); }

    static std::string failure(Kind kind, int ranks, const std::function<void(Worker&)>& body) {
        try {
            on_gpus(kind, ranks, body);
        } catch (const Failure& failure) {
            EXPECT_EQ(failure.exit_code, EXIT_PEER) << failure.what();
            return failure.what();
        }
        return "none";
    }
    static void expect_ended(int destroyed, int aborted) {
        EXPECT_EQ(nccl_on_host::destroyed, destroyed);
        EXPECT_EQ(nccl_on_host::aborted, aborted);
    }
};

// Every rank sends to every other, round after round, without the host ever waiting for a stream. A kernel fills what
// is sent, another one checks what has come and destroys it, and both reuse the same memory for the next round at once.
void exchange(Worker& worker, int rounds) {
    const int rank = worker.transport.rank, ranks = worker.transport.ranks;
    const std::vector<int64_t> sizes = {0, 1, 4096, 70001, 5};
    const auto value = [](int from, int to, size_t n, int round) {
        return uint8_t(from * 31 + to * 7 + int(n) * 3 + round);
    };
    std::vector<Transfer> sends, receives;
    for (int peer = 0; peer < ranks; ++peer)
        for (size_t n = 0; n < sizes.size() && (peer != rank || ranks == 1); ++n)
            for (const bool send : {true, false}) {
                void* const data = worker.allocate<uint8_t>(sizes[n]);
                (send ? sends : receives).push_back({send, peer, data, sizes[n]});
            }
    std::atomic<int64_t> wrong = 0, checked = 0;
    for (int round = 0; round < rounds; ++round) {
        worker.launch([=] {
            for (size_t i = 0; i < sends.size(); ++i)
                if (sends[i].bytes > 0)
                    std::memset(sends[i].data, value(rank, sends[i].peer, i % sizes.size(), round),
                                size_t(sends[i].bytes));
        });
        std::vector<Transfer> both = sends;
        both.insert(round % 2 ? both.end() : both.begin(), receives.begin(), receives.end());
        const int64_t n = int64_t(both.size()), first = worker.transport.post(both);
        EXPECT_EQ(first, round * n);
        if (round % 3 == 0) worker.transport.all_gather("");
        worker.transport.wait(0, first);
        worker.transport.wait(first + n / 2, first + n);
        worker.transport.wait(first, first + n);
        worker.launch([&, round] {
            for (size_t i = 0; i < receives.size(); ++i) {
                uint8_t* const data = static_cast<uint8_t*>(receives[i].data);
                wrong += receives[i].bytes - std::count(data, data + receives[i].bytes,
                                                        value(receives[i].peer, rank, i % sizes.size(), round));
                checked += receives[i].bytes;
                if (receives[i].bytes) std::memset(data, 0xee, size_t(receives[i].bytes));
            }
        });
    }
    worker.finish();
    EXPECT_EQ(wrong, 0);
    EXPECT_EQ(checked, rounds * int64_t(receives.size() / sizes.size()) * 74103);
}

TEST_F(GpuTransport, MessagesArriveInOrder) {
    for (const Kind kind : kinds)
        for (const int ranks : {2, 3, 8}) on_gpus(kind, ranks, [](Worker& worker) { exchange(worker, 8); });
    expect_ended(2 + 3 + 8, 0);
}

TEST_F(GpuTransport, NcclIsPolledAsLongAsItTakes) {
    for (const int polls : {0, 1, 100}) {
        nccl_on_host::behaviour.polls = polls;
        for (int ranks = 2; ranks <= 8; ranks += 3)
            on_gpus(Kind::nccl, ranks, [](Worker& worker) { exchange(worker, 4); });
    }
    expect_ended(3 * (2 + 5 + 8), 0);
}

TEST_F(GpuTransport, OneRankExchangesWithItself) {
    NoTransport control;
    {
        NcclTransport transport(control);
        Worker worker(transport);
        exchange(worker, 5);
    }
    expect_ended(1, 0);
}

// A chain in which each rank runs ahead of the next as far as it likes.
TEST_F(GpuTransport, OneMayRunAheadOfTheOther) {
    constexpr int messages = 200;
    for (const Kind kind : kinds)
        on_gpus(kind, 3, [&](Worker& worker) {
            const int rank = worker.transport.rank;
            int* const data = worker.allocate<int>(messages);
            for (int i = 0; i < messages; ++i) {
                if (rank > 0) {
                    const Transfer t{false, rank - 1, data + i, sizeof(int)};
                    const int64_t n = worker.transport.post({&t, 1});
                    worker.transport.wait(n, n + 1);
                }
                worker.launch([=] { data[i] = rank == 0 ? i : data[i] + 1000; });
                if (rank == 2) continue;
                const Transfer t{true, rank + 1, data + i, sizeof(int)};
                worker.transport.post({&t, 1});
            }
            worker.transport.wait(0, rank == 1 ? 2 * messages : messages);
            worker.launch([=] {
                for (int i = 0; i < messages; ++i) EXPECT_EQ(data[i], i + 1000 * rank);
            });
        });
}

// Holds a stream until it is opened.
class Gate {
public:
    void open() {
        const std::lock_guard lock(mutex_);
        opened_ = true;
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return opened_; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool opened_ = false;
};

// Both ranks post and wait, and go on, while their compute streams have not even begun.
TEST_F(GpuTransport, TheHostWaitsForNoStream) {
    for (const Kind kind : kinds) {
        Gate gate;
        std::barrier told(2);
        on_gpus(kind, 2, [&](Worker& worker) {
            const int rank = worker.transport.rank;
            int* const data = worker.allocate<int>(2);
            worker.device.stream->tell([&] { gate.wait(); });
            worker.launch([=] { data[0] = 7 + rank; });
            const Transfer both[] = {{true, 1 - rank, data, sizeof(int)}, {false, 1 - rank, data + 1, sizeof(int)}};
            worker.transport.wait(0, worker.transport.post(both) + 2);
            worker.launch([=] { EXPECT_EQ(data[1], 8 - rank); });
            told.arrive_and_wait();
            gate.open();
        });
    }
}

// A wait concerns the transfers that it names: what comes later may not have been sent yet.
TEST_F(GpuTransport, AWaitIsForNothingElse) {
    for (const Kind kind : kinds) {
        Gate gate, read;
        on_gpus(kind, 2, [&](Worker& worker) {
            const int rank = worker.transport.rank;
            int* const data = worker.allocate<int>(2);
            if (rank == 0) worker.launch([=] { data[0] = 1; });
            for (int i = 0; i < 2; ++i) {
                if (rank == 0 && i == 1) {
                    worker.device.stream->tell([&] { gate.wait(); });
                    worker.launch([=] { data[1] = 2; });
                }
                const Transfer t{rank == 0, 1 - rank, data + i, sizeof(int)};
                worker.transport.post({&t, 1});
            }
            for (int i = 0; i < 2; ++i) {
                worker.transport.wait(i, i + 1);
                if (rank == 1)
                    worker.launch([&, data, i] {
                        EXPECT_EQ(data[i], i + 1);
                        read.open();
                    });
                if (i == 0) read.wait();
            }
            gate.open();
        });
    }
}

// Memory of a rank that fails is not touched once its transport is told.
TEST_F(GpuTransport, CopiesEndBeforeTheMemoryOfAFailedRankGoes) {
    Gate gate;
    std::barrier posted(2);
    EXPECT_EQ(failure(Kind::threads, 2,
                      [&](Worker& worker) {
                          const int rank = worker.transport.rank;
                          if (rank == 0) worker.device.stream->tell([&] { gate.wait(); });
                          const Transfer t{rank == 1, 1 - rank, worker.allocate<uint8_t>(1 << 20), 1 << 20};
                          worker.transport.post({&t, 1});
                          posted.arrive_and_wait();
                          if (rank == 1) {
                              std::thread opener([&] {
                                  std::this_thread::sleep_for(std::chrono::milliseconds(50));
                                  gate.open();
                              });
                              worker.transport.abandon();
                              worker.memory.clear();
                              opener.join();
                              throw Failure(EXIT_PEER, "rank 1 throws");
                          }
                          worker.transport.all_gather("");
                      }),
              "rank 1 throws");
}

TEST_F(GpuTransport, SizesThatDifferAreRefused) {
    EXPECT_THROW(
        on_gpus(Kind::threads, 2,
                [](Worker& worker) {
                    const bool send = worker.transport.rank == 0;
                    const Transfer t{send, 1 - worker.transport.rank, worker.allocate<uint8_t>(100), send ? 50 : 100};
                    worker.transport.wait(0, worker.transport.post({&t, 1}) + 1);
                }),
        std::logic_error);
}

// ---------------------------------------------------------------------------------------------------------------------
// NCCL fails. Ranks go round a ring, each meets both its neighbours.

void ring(Worker& worker, int rounds) {
    const int rank = worker.transport.rank, ranks = worker.transport.ranks;
    int* const data = worker.allocate<int>(2);
    Op receive{Part::attention, Pass::F, 3, 5};
    receive.kind = ::Kind::receive;
    receive.peer = (rank + ranks - 1) % ranks;
    for (int round = 0; round < rounds; ++round) {
        const Transfer both[] = {{true, (rank + 1) % ranks, data, sizeof(int)},
                                 {false, receive.peer, data + 1, sizeof(int)}};
        const int64_t first = worker.transport.post(both);
        worker.transport.progress.waiting(receive);
        worker.transport.wait(first, first + 2);
    }
}

TEST_F(GpuTransport, ErrorsAtAnyCallEndNcclOnAllRanks) {
    double longest = 0;
    for (const Fault::Kind kind : {Fault::failed, Fault::refused})
        for (int ranks = 2; ranks <= 8; ++ranks)
            for (const int call : {0, 1, 5}) {
                nccl_on_host::aborted = nccl_on_host::destroyed = 0;
                nccl_on_host::behaviour.fault = {kind, ranks - 1, call};
                const double begin = seconds_now();
                const std::string text = failure(Kind::nccl, ranks, [](Worker& worker) { ring(worker, 9); });
                longest = std::max(longest, seconds_now() - begin);
                const std::string name = std::to_string(ranks - 1);
                EXPECT_TRUE(text.find("between rank " + name + " and ") != std::string::npos ||
                            text == "rank " + name + " has failed")
                    << text;
                if (call > 0 && ranks > 2 && text.find("between") != std::string::npos) {
                    EXPECT_NE(text.find("and rank 0, rank " + std::to_string(ranks - 2) + " failed: "),
                              std::string::npos)
                        << text;
                }
                expect_ended(0, kind == Fault::refused && call == 0 ? ranks - 1 : ranks);  // no communicator to end
            }
    std::printf("  ended after %.2f s at most (bound 5 s)\n", longest);
    EXPECT_LT(longest, 5);
}

// A call of rank 0 never ends, and rank 1 fails: those that wait hear of it.
TEST_F(GpuTransport, WhoeverWaitsForNcclHearsOfAFailure) {
    for (int ranks = 2; ranks <= 8; ++ranks)
        for (const int call : {0, 2}) {
            nccl_on_host::aborted = nccl_on_host::destroyed = 0;
            nccl_on_host::behaviour.fault = {Fault::hangs, 0, call};
            EXPECT_EQ(failure(Kind::nccl, ranks,
                              [&](Worker& worker) {
                                  if (call > 0) ring(worker, 1);
                                  if (worker.transport.rank == 1) throw Failure(EXIT_PEER, "rank 1 throws");
                                  ring(worker, 9);
                              }),
                      "rank 1 throws");
            expect_ended(0, ranks);
        }
}

TEST_F(GpuTransport, NothingGoesOnAfterAFailure) {
    nccl_on_host::behaviour.fault = {Fault::failed, 0, 1};
    EXPECT_EQ(failure(Kind::nccl, 1,
                      [](Worker& worker) {
                          const auto fails = [](const auto& call) {
                              try {
                                  call();
                              } catch (const Failure& failure) { return failure.exit_code == EXIT_PEER; }
                              return false;
                          };
                          Transport& transport = worker.transport;
                          int* const data = worker.allocate<int>(2);
                          const Transfer both[] = {{true, 0, data, sizeof(int)}, {false, 0, data + 1, sizeof(int)}};
                          transport.post(both);
                          EXPECT_TRUE(fails([&] { transport.wait(0, 2); }));
                          EXPECT_TRUE(fails([&] { transport.wait(0, 2); }));
                          EXPECT_TRUE(fails([&] { transport.post(both); }));
                          EXPECT_TRUE(fails([&] { transport.all_gather(""); }));
                          throw Failure(EXIT_PEER, "rank 0 throws");
                      }),
              "rank 0 throws");
    expect_ended(0, 1);
}

using GpuTransportDeathTest = GpuTransport;

TEST_F(GpuTransportDeathTest, TheWatchdogEndsARunInWhichNcclHangs) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    const auto hang = [] {
        nccl_on_host::behaviour.fault = {Fault::hangs, 1, 2};
        ThreadTeam team(2);
        ThreadTransport first(team, 0, 2), second(team, 1, 2);
        NcclTransport transports[] = {NcclTransport(first), NcclTransport(second)};
        for (NcclTransport& transport : transports) transport.progress.least_limit = 1;
        const Watchdog watchdog({&transports[0].progress, &transports[1].progress}, 0.3);
        const auto run = [](NcclTransport& transport) {
            Worker worker(transport);
            ring(worker, 9);
        };
        std::thread other([&] { run(transports[1]); });
        run(transports[0]);
        other.join();
    };
    EXPECT_EXIT(hang(), testing::ExitedWithCode(EXIT_PEER),
                "all ranks wait, the first to do so: rank . waits for Y layer 3 chunk 5 from rank .");
}

TEST_F(GpuTransportDeathTest, AnAbortThatHangsEndsTheProcess) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    nccl_on_host::behaviour.fault = {Fault::failed, 1, 2};
    nccl_on_host::behaviour.abort_hangs = true;
    const double begin = seconds_now();
    EXPECT_EXIT(on_gpus(Kind::nccl, 2, [](Worker& worker) { ring(worker, 9); }), testing::ExitedWithCode(EXIT_PEER),
                "train_gpt: ncclGroupEnd .* between rank 1 and rank 0 failed: .*; ncclCommAbort has not returned on "
                "rank 1 for 5 s");
    std::printf("  ended after %.1f s (bound 15 s)\n", seconds_now() - begin);
    EXPECT_LT(seconds_now() - begin, 15);
}

}  // namespace
