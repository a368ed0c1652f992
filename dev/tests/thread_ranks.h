// Thread ranks for tests, without what Team adds (watchdog, exit codes, names of ranks in messages).
#pragma once

#include <exception>
#include <functional>
#include <thread>

#include "llmc/parallel/thread_transport.h"

// Runs `body` on every rank, a thread each, and throws what the first to fail has thrown.
template <class RankTransport = ThreadTransport>
void on_thread_ranks(int ranks, const std::function<void(Transport&)>& body) {
    ThreadTeam team(ranks);
    std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
        threads.emplace_back([&, rank] {
            RankTransport transport(team, rank, ranks);
            try {
                body(transport);
            } catch (...) {
                errors[size_t(rank)] = std::current_exception();
                team.fail(rank);
            }
        });
    for (std::thread& thread : threads) thread.join();
    if (team.failed_rank() >= 0) std::rethrow_exception(errors[size_t(team.failed_rank())]);
}
