// Ranks as processes under MPI. `MpiSession` begins and ends MPI, `MpiTransport` sends and receives. Every wait polls,
// and naps between polls: ranks often share cores, and a rank that waits must not take the core of one that computes.
// Messages between GPUs pass through memory of the host.
#pragma once

#define OMPI_SKIP_MPICXX  // MPI's C interface alone
#define MPICH_SKIP_MPICXX
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <bit>
#include <deque>
#include <exception>
#include <limits>
#include <map>

#include "llmc/io/launch.h"
#include "llmc/parallel/exchange_stream.h"
#include "llmc/parallel/transport.h"

inline void check_mpi(int code, const char* what) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw Failure(EXIT_PEER, std::string(what) + " failed: " + std::string(text, size_t(length)));
}

// One for the process, made in the thread that computes; nothing else calls MPI.
class MpiSession {
public:
    Launch launch;  // what MPI says

    explicit MpiSession(const Launch& told) : launch(told) {
        // MPI's own threads take no signal: those are for the thread of llmc/io/signals.h, made later.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int provided = 0;
        const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        check_mpi(code, "MPI_Init_thread");
        MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
        if (provided < MPI_THREAD_SERIALIZED)
            throw Failure(EXIT_CONFIG,
                          "this MPI cannot be called beside other threads; use another, or --ranks for "
                          "thread ranks in one process");
        MPI_Comm_rank(MPI_COMM_WORLD, &launch.rank);
        MPI_Comm_size(MPI_COMM_WORLD, &launch.ranks);
        MPI_Comm host;
        check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host), "MPI_Comm_split");
        MPI_Comm_rank(host, &launch.local_rank);
        MPI_Comm_size(host, &launch.local_ranks);
        MPI_Comm_free(&host);
        if (launch.rank != told.rank || launch.ranks != told.ranks)
            throw Failure(EXIT_CONFIG, told.source + " says that this is " + told.text() + ", MPI says " +
                                           launch.text() + ": the program was started by something that the MPI it " +
                                           "was built with does not know; use that MPI's mpirun (scripts/run_mpi.sh), "
                                           "or srun --mpi=pmix");
    }

    // After a failure the other ranks may be anywhere, and an MPI call might never return: the process ends as it is,
    // with its exit code, and the launcher and the watchdogs end the others.
    ~MpiSession() {
        if (std::uncaught_exceptions() > 0) return;
        signal(SIGALRM, [](int) { _exit(EXIT_PEER); });
        alarm(60);
        MPI_Finalize();
        alarm(0);
    }
    MpiSession(const MpiSession&) = delete;
};

class MpiTransport : public Transport {
public:
    explicit MpiTransport(const MpiSession& session) : Transport(session.launch.rank, session.launch.ranks) {}

    // MPI matches the n-th send from a to b with the n-th receive of b from a, as long as all have one tag.
#ifndef USE_CUDA
    int64_t post(std::span<const Transfer> transfers) override {
        const int64_t first = posted_;
        for (const Transfer& t : transfers) {
            int64_t begin = 0;
            do {
                const int64_t bytes = std::min(t.bytes - begin, largest_piece_);
                void* data = static_cast<char*>(t.data) + begin;
                Piece piece{posted_, t.send ? -1 : bytes, MPI_REQUEST_NULL};
                start(piece, t.send, data, bytes, t.peer);
                open_.push_back(piece);
                begin += bytes;
            } while (begin < t.bytes);
            ++posted_;
        }
        return first;
    }

    void wait(int64_t begin, int64_t end) override {
        for (Piece& piece : open_)
            if (piece.number >= begin && piece.number < end) complete(piece);
        while (!open_.empty() && open_.front().request == MPI_REQUEST_NULL) open_.pop_front();
    }

#else
    // A send is copied to pinned memory and given to MPI once that is done; MPI receives into pinned memory, and what
    // has arrived is copied to the GPU. The host does all that is due whenever it is here.
    void attach(const Device& device) override { exchange_.attach(device); }
    void abandon() override { exchange_.finish(); }

    int64_t post(std::span<const Transfer> transfers) override {
        const int64_t first = posted_;
        const Mark posted = exchange_.mark_compute();
        for (const Transfer& t : transfers) {
            int64_t begin = 0;
            do {
                const int64_t bytes = std::min(t.bytes - begin, largest_piece_);
                Piece piece{.number = posted_,
                            .expected = t.send ? -1 : bytes,
                            .bytes = bytes,
                            .peer = t.peer,
                            .stage = t.send ? Stage::copying : Stage::travelling,
                            .device = static_cast<char*>(t.data) + begin,
                            .host = take_pinned(bytes),
                            .posted = posted};
                if (t.send) copy(piece, piece.host.data(), piece.device, cudaMemcpyDeviceToHost);
                else start(piece, false, piece.host.data(), bytes, t.peer);
                open_.push_back(std::move(piece));
                begin += bytes;
            } while (begin < t.bytes);
            ++posted_;
        }
        advance();
        return first;
    }

    // For receives, the compute stream waits for the copy to the GPU. Sends are complete for the host itself: without
    // it they do not get on.
    void wait(int64_t begin, int64_t end) override {
        for (Piece& piece : open_) {
            if (piece.number < begin || piece.number >= end) continue;
            poll_until([&] {
                advance();
                return piece.stage == Stage::done || (piece.stage == Stage::copying && piece.expected >= 0);
            });
            if (piece.expected >= 0) exchange_.compute_waits(piece.copied);
            piece.waited = true;
        }
        for (; !open_.empty() && open_.front().stage == Stage::done && open_.front().waited; open_.pop_front()) {}
    }
#endif

protected:
    std::vector<std::string> gather(const std::string& text) override {
        std::vector<int64_t> sizes(size_t(ranks), 0);
        const int64_t size = int64_t(text.size());
        Piece lengths;
        check_mpi(MPI_Iallgather(&size, 1, MPI_INT64_T, sizes.data(), 1, MPI_INT64_T, MPI_COMM_WORLD, &lengths.request),
                  "MPI_Iallgather");
        complete(lengths);

        std::vector<int> counts, offsets;
        int64_t total = 0;
        for (const int64_t bytes : sizes) {
            counts.push_back(int(bytes));
            offsets.push_back(int(total));
            if ((total += bytes) > std::numeric_limits<int>::max())
                throw std::logic_error("an all_gather of more than 2 GiB; large things go by post");
        }
        std::string all(size_t(total), '\0');
        Piece bytes;
        check_mpi(MPI_Iallgatherv(text.data(), int(size), MPI_BYTE, all.data(), counts.data(), offsets.data(), MPI_BYTE,
                                  MPI_COMM_WORLD, &bytes.request),
                  "MPI_Iallgatherv");
        complete(bytes);
        std::vector<std::string> texts;
        for (size_t r = 0; r < counts.size(); ++r) texts.push_back(all.substr(size_t(offsets[r]), size_t(counts[r])));
        return texts;
    }

private:
#ifdef USE_CUDA
    enum class Stage{copying, travelling, done};  // a receive first travels, then is copied
#endif
    struct Piece {  // of a transfer
        int64_t number = 0;
        int64_t expected = -1;  // bytes that a receive must get
        MPI_Request request = MPI_REQUEST_NULL;
#ifdef USE_CUDA
        int64_t bytes = 0;
        int peer = -1;
        Stage stage = Stage::copying;
        void* device = nullptr;
        PinnedMemory host;
        Mark posted{};        // the compute stream, when the transfer was posted
        Mark copied{};        // the copy, once the stream is told of it
        bool waited = false;  // for
#endif
    };
#ifdef USE_CUDA
    static constexpr int64_t largest_piece_ = int64_t(16) << 20;  // so that one is copied while another travels
#else
    static constexpr int64_t largest_piece_ = int64_t(1) << 30;  // MPI counts in int
#endif
    int64_t posted_ = 0;
    std::deque<Piece> open_;  // by number; without those at the front that are complete

    static void start(Piece& piece, bool send, void* data, int64_t bytes, int peer) {
        check_mpi(send ? MPI_Isend(data, int(bytes), MPI_BYTE, peer, 0, MPI_COMM_WORLD, &piece.request)
                       : MPI_Irecv(data, int(bytes), MPI_BYTE, peer, 0, MPI_COMM_WORLD, &piece.request),
                  send ? "MPI_Isend" : "MPI_Irecv");
    }

#ifdef USE_CUDA
    ExchangeStream exchange_;
    std::multimap<int64_t, PinnedMemory> pinned_;  // that nobody uses, by size in bytes

    PinnedMemory take_pinned(int64_t bytes) {
        const auto size = int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(bytes, 4096))));
        auto found = pinned_.extract(size);
        return found ? std::move(found.mapped()) : PinnedMemory(size);
    }
    void copy(Piece& piece, void* to, const void* from, cudaMemcpyKind kind) {
        piece.copied = exchange_.new_mark();
        exchange_.copy(to, from, piece.bytes, piece.posted, nullptr, piece.copied, kind);
    }

    // Brings every piece as far as it can get without waiting. Sends are given to MPI in their order.
    void advance() {
        bool sends_copied = true;  // all so far
        for (Piece& piece : open_) {
            const bool send = piece.expected < 0;
            if (send && piece.stage == Stage::copying) {
                sends_copied = sends_copied && ExchangeStream::reached(piece.copied);
                if (!sends_copied) continue;
                start(piece, true, piece.host.data(), piece.bytes, piece.peer);
                piece.stage = Stage::travelling;
            }
            bool finished = false;
            if (piece.stage == Stage::travelling && test(piece)) {
                finished = send;
                piece.stage = Stage::copying;
                if (!send) copy(piece, piece.device, piece.host.data(), cudaMemcpyHostToDevice);
            } else if (piece.stage == Stage::copying && !send) {
                finished = ExchangeStream::reached(piece.copied);
            }
            if (!finished) continue;
            piece.stage = Stage::done;
            const int64_t size = piece.host.size();
            pinned_.emplace(size, std::move(piece.host));
        }
    }
#endif

    static bool test(Piece& piece) {
        if (piece.request == MPI_REQUEST_NULL) return true;
        MPI_Status status;
        int done = false;
        const int code = MPI_Test(&piece.request, &done, &status);
        int reason = MPI_SUCCESS;
        if (code != MPI_SUCCESS) MPI_Error_class(code, &reason);
        if (reason == MPI_ERR_TRUNCATE)
            throw std::logic_error("a message meets a receive of " + std::to_string(piece.expected) +
                                   " bytes, which is too short for it");
        check_mpi(code, "MPI_Test");
        if (!done) return false;
        int bytes = 0;
        MPI_Get_count(&status, MPI_BYTE, &bytes);
        if (piece.expected >= 0 && bytes != piece.expected)
            throw std::logic_error("a message of " + std::to_string(bytes) + " bytes meets a receive of " +
                                   std::to_string(piece.expected));
        return true;
    }
    static void complete(Piece& piece) {
        poll_until([&] { return test(piece); });
    }
};
