// The ranks that this process runs: its own one under MPI, all of them as threads with --ranks, or the only one. Called
// by main and the commands that run a model.
#pragma once

#include <chrono>
#include <exception>
#include <optional>
#include <set>
#include <thread>

#include "llmc/io/launch.h"
#include "llmc/parallel/thread_transport.h"
#include "llmc/parallel/watchdog.h"
#ifdef USE_MPI
#include "llmc/parallel/mpi_transport.h"
#endif
#ifdef USE_NCCL
#include "llmc/parallel/nccl_transport.h"
#endif

class Team {
public:
    Launch launch;  // under MPI, what MPI says

    // Starts MPI where a launcher has made several processes.
    explicit Team(const Launch& launch) : launch(launch) {
        if (launch.ranks == 1) return;
#ifdef USE_MPI
        session_.emplace(launch);
        this->launch = session_->launch;
        transport_ = std::make_unique<MpiTransport>(*session_);
        members_ = {transport_.get()};
#else
        throw Failure(EXIT_CONFIG, launch.source + " has started " + std::to_string(launch.ranks) +
                                       " processes, but this program was built without MPI; install libopenmpi-dev "
                                       "and make again, or use --ranks " +
                                       std::to_string(launch.ranks) + " without a launcher");
#endif
    }

    // Between processes.
    Transport& processes() { return *transport_; }
    // One process speaks for all where all have the same to say.
    bool speaks() const { return launch.rank == 0; }

    // Ranks on this machine, of so many in all.
    int local_ranks(int ranks) const { return launch.ranks > 1 ? launch.local_ranks : ranks; }

    // What the ranks of this process are doing, a line each.
    std::string status() {
        const std::lock_guard lock(mutex_);
        std::string text;
        for (const Transport* member : members_)
            text +=
                (text.empty() ? "rank " : "\nrank ") + std::to_string(member->rank) + ": " + member->progress.text();
        return text;
    }

    // Another process has ended badly, so that this one is about to.
    bool peer_died() {
        const std::lock_guard lock(mutex_);
        return watchdog_ && watchdog_->peer_died();
    }

    // Runs body(transport), which returns an exit code, on every rank of this process. If it fails on one, the others
    // end as soon as they wait for somebody, and what that rank has thrown is thrown here. `hang_timeout` in seconds.
    template <class Body>
    int run(int ranks, double hang_timeout, const Body& body) {
        if (ranks == 1) return run_rank(*transport_, {}, body);
        const bool nccl = gpu_for_each_rank(ranks);
        if (launch.ranks > 1) {
            const std::unique_ptr<Transport> over_nccl = nccl ? nccl_transport(*transport_) : nullptr;
            Transport& transport = nccl ? *over_nccl : *transport_;
            const Watch watch(*this, {&transport}, hang_timeout);
            return run_rank(transport, {&transport}, body);
        }
        ThreadTeam team(ranks);
        std::vector<std::unique_ptr<Transport>> threads_only, transports;
        for (int rank = 0; rank < ranks; ++rank) {
            transports.push_back(std::make_unique<ThreadTransport>(team, rank, ranks));
            if (nccl) {
                threads_only.push_back(std::move(transports.back()));
                transports.back() = nccl_transport(*threads_only.back());
            }
        }
        std::vector<const Transport*> members;
        for (const auto& transport : transports) members.push_back(transport.get());
        const Watch watch(*this, members, hang_timeout);
        std::vector<int> codes(static_cast<size_t>(ranks));
        std::vector<std::exception_ptr> errors(static_cast<size_t>(ranks));
        std::vector<std::thread> threads;
        for (int rank = 0; rank < ranks; ++rank)
            threads.emplace_back([&, rank] {
                try {
                    codes[size_t(rank)] = run_rank(*transports[size_t(rank)], members, body);
                } catch (...) {
                    errors[size_t(rank)] = std::current_exception();
                    team.fail(rank);
                }
                team.leave();
            });
        // A rank in the midst of an op first ends it, unless that takes too long.
        if (!team.wait_for_all(std::chrono::seconds(8))) {
            // The rank may still be on its way out, and its error not there yet.
            const std::exception_ptr error = errors[size_t(team.failed_rank())];
            std::string cause = "its error is not known yet";
            int code = EXIT_PEER;
            try {
                if (error) std::rethrow_exception(error);
            } catch (const Failure& failure) {
                cause = failure.what();
                code = failure.exit_code;
            } catch (const std::exception& other) { cause = other.what(); }
            std::fprintf(stderr, "train_gpt: rank %d has failed, and the others do not end: %s\n%s\n",
                         team.failed_rank(), cause.c_str(), status().c_str());
            _exit(code);
        }
        for (std::thread& thread : threads) thread.join();
        if (team.failed_rank() >= 0) std::rethrow_exception(errors[size_t(team.failed_rank())]);
        return codes[0];
    }

private:
#ifdef USE_MPI
    std::optional<MpiSession> session_;
#endif
    std::unique_ptr<Transport> transport_ = std::make_unique<NoTransport>();
    std::mutex mutex_;
    std::vector<const Transport*> members_ = {transport_.get()};  // of this process

    std::unique_ptr<Watchdog> watchdog_;

    // Whether tensors go by NCCL, which wants a GPU of its own for each rank: whether those that ranks take have names
    // of their own. (A launcher may show each process only its own GPU.)
    bool gpu_for_each_rank([[maybe_unused]] int ranks) {
#ifdef USE_NCCL
        std::string own;  // names of 16 bytes
        for (int rank = 0; rank < (launch.ranks > 1 ? 1 : ranks); ++rank) {
            cudaDeviceProp properties{};
            int gpu = 0;
            choose_device(launch.local_rank + rank);
            CUDA_CHECK(cudaGetDevice(&gpu));
            CUDA_CHECK(cudaGetDeviceProperties(&properties, gpu));
            own.append(properties.uuid.bytes, sizeof properties.uuid.bytes);
        }
        choose_device(launch.local_rank);
        std::set<std::string> names;
        for (const std::string& list : transport_->all_gather(own))
            for (size_t i = 0; i < list.size(); i += 16) names.insert(list.substr(i, 16));
        return int(names.size()) == ranks;
#else
        return false;
#endif
    }
    static std::unique_ptr<Transport> nccl_transport([[maybe_unused]] Transport& control) {
#ifdef USE_NCCL
        return std::make_unique<NcclTransport>(control);
#else
        return nullptr;
#endif
    }

    // As long as ranks run, they are seen by SIGQUIT and the watchdog.
    struct Watch {
        Team& team;
        Watch(Team& team, const std::vector<const Transport*>& members, double hang_timeout) : team(team) {
            std::vector<const Progress*> progress;
            for (const Transport* member : members) progress.push_back(&member->progress);
            auto watchdog = std::make_unique<Watchdog>(progress, hang_timeout,
                                                       team.launch.ranks > 1 ? team.transport_.get() : nullptr);
            const std::lock_guard lock(team.mutex_);
            team.members_ = members;
            team.watchdog_ = std::move(watchdog);
        }
        ~Watch() {
            const std::lock_guard lock(team.mutex_);
            team.members_ = {team.transport_.get()};
            team.watchdog_.reset();
        }
    };

    // Says which of several ranks has failed, at what, and who waits for it among those that this process sees.
    template <class Body>
    static int run_rank(Transport& transport, const std::vector<const Transport*>& members, const Body& body) {
        const size_t rank = size_t(transport.rank);
        const auto where = [&] {
            return transport.ranks == 1 ? "" : "rank " + std::to_string(rank) + ", " + transport.progress.text() + ": ";
        };
        const auto who_waits = [&] {
            std::vector<RankStatus> statuses(static_cast<size_t>(transport.ranks));
            for (const Transport* member : members) statuses[size_t(member->rank)].report = member->progress.report(0);
            return who_waits_for(statuses, rank);
        };
        try {
            const int code = body(transport);
            transport.progress.nothing();
            return code;
        } catch (const JointFailure&) { throw; } catch (const Failure& failure) {
            const bool own = failure.exit_code != EXIT_PEER;  // and not another rank's
            throw Failure(failure.exit_code, where() + failure.what() + (own ? who_waits() : ""));
        } catch (const std::bad_alloc&) {
            throw Failure(EXIT_MEMORY, where() + "out of memory; choose a smaller model or batch" + who_waits());
        } catch (const std::exception& error) {
            throw Failure(EXIT_INTERNAL, where() + "internal error, please report it: " + error.what() + who_waits());
        }
    }
};
