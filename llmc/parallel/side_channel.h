// Sockets between the processes of a run, beside MPI: one connection for each pair, for short messages that must get
// through when MPI hangs. A connection that closes tells that the process at its other end has ended, within a
// millisecond of a kill. The watchdog (watchdog.h) is its only user.
#pragma once

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <random>
#include <sstream>

#include "llmc/parallel/progress.h"
#include "llmc/parallel/transport.h"

class SideChannel {
public:
    enum class Kind : int32_t { beat, goodbye, failed };
    struct Message {
        Kind kind = Kind::beat;
        Report report;
    };

    // Every rank listens, the higher one of two connects. All ranks make theirs at the same time.
    explicit SideChannel(Transport& transport) : peers_(size_t(transport.ranks)) {
        const int rank = transport.rank;
        const Socket listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_in any{};
        any.sin_family = AF_INET;
        socklen_t length = sizeof any;
        if (bind(listener.fd, reinterpret_cast<sockaddr*>(&any), length) || listen(listener.fd, transport.ranks) ||
            getsockname(listener.fd, reinterpret_cast<sockaddr*>(&any), &length))
            throw Failure(EXIT_CONFIG, "the watchdog cannot listen on a TCP port: " + std::string(strerror(errno)));

        std::random_device random;
        const uint64_t mine = uint64_t(random()) << 32 | random();  // who does not know it is none of us
        std::ostringstream card;
        card << place() << ' ' << ntohs(any.sin_port) << ' ' << mine;
        for (const in_addr_t address : addresses()) card << ' ' << address;
        const std::vector<std::string> cards = transport.all_gather(card.str());
        transport.together([&] {
            const double deadline = seconds_now() + 30;
            for (int r = 0; r < rank; ++r) connect_to(r, rank, cards[size_t(r)], deadline);
            for (int missing = transport.ranks - 1 - rank; missing > 0;)
                missing -= accept_one(listener.fd, rank, mine, deadline);
        });
    }

    void send(const Message& message) {
        for (Peer& peer : peers_) {
            if (!peer.socket) continue;
            // One that does not read gets no more beats, only the last words.
            if (peer.out.size() < 16 * sizeof message || message.kind != Kind::beat)
                peer.out.append(reinterpret_cast<const char*>(&message), sizeof message);
            const ssize_t n = ::send(peer.socket->fd, peer.out.data(), peer.out.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n > 0) peer.out.erase(0, size_t(n));
        }
    }

    bool connected(int rank) const { return peers_[size_t(rank)].socket != nullptr; }

    // Sleeps for `milliseconds`, less when a connection closes or `wake` can be read. Messages wake nobody.
    void sleep(int milliseconds, int wake) const {
        std::vector<pollfd> list{{wake, POLLIN, 0}};
        for (const Peer& peer : peers_)
            if (peer.socket) list.push_back({peer.socket->fd, POLLRDHUP, 0});
        poll(list.data(), list.size(), milliseconds);
    }

    // What has come since the last call, and whose connection has closed.
    void receive(const std::function<void(int rank, const Message&)>& message,
                 const std::function<void(int rank)>& closed) {
        for (size_t r = 0; r < peers_.size(); ++r) {
            Peer& peer = peers_[r];
            char buffer[16 * sizeof(Message)];
            for (ssize_t n = 1; peer.socket && n > 0;) {
                n = recv(peer.socket->fd, buffer, sizeof buffer, MSG_DONTWAIT);
                if (n > 0) peer.in.append(buffer, size_t(n));
                for (; peer.in.size() >= sizeof(Message); peer.in.erase(0, sizeof(Message))) {
                    Message m;
                    std::memcpy(&m, peer.in.data(), sizeof m);
                    message(int(r), m);
                }
                if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR))) continue;
                peer.socket.reset();
                closed(int(r));
            }
        }
    }

private:
    struct Socket {
        int fd;
        explicit Socket(int fd) : fd(fd) {}
        ~Socket() {
            if (fd >= 0) close(fd);
        }
        Socket(const Socket&) = delete;
    };
    struct Peer {
        std::unique_ptr<Socket> socket;  // none to oneself, and once closed
        std::string in, out;             // the part of a message that has come, what could not be sent yet
    };
    struct Hello {
        uint64_t secret;
        int64_t rank;
    };
    std::vector<Peer> peers_;

    // Processes of one place reach each other by the loopback address.
    static std::string place() {
        std::string boot, line;
        std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
        char network[PATH_MAX] = "";
        if (readlink("/proc/self/ns/net", network, sizeof network - 1) < 0) network[0] = '\0';
        return "place:" + boot + network;
    }
    static std::vector<in_addr_t> addresses() {  // IPv4, other than loopback
        std::vector<in_addr_t> list;
        ifaddrs* first = nullptr;
        getifaddrs(&first);
        for (const ifaddrs* i = first; i; i = i->ifa_next)
            if (i->ifa_addr && i->ifa_addr->sa_family == AF_INET && !(i->ifa_flags & IFF_LOOPBACK))
                list.push_back(reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr.s_addr);
        freeifaddrs(first);
        return list;
    }
    static void set_options(int fd, int patience) {  // seconds for a connect, a send, a receive
        const timeval time{patience, 0};
        const int yes = 1;
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    }

    void connect_to(int r, int rank, const std::string& card, double deadline) {
        std::istringstream in(card);
        std::string their_place, tried;
        int port;
        Hello hello{0, rank};
        in >> their_place >> port >> hello.secret;
        std::vector<in_addr_t> list;
        for (in_addr_t address; in >> address;) list.push_back(address);
        if (their_place == place()) list = {htonl(INADDR_LOOPBACK)};
        for (const in_addr_t address : list)
            tried += (tried.empty() ? "" : ", ") + std::string(inet_ntoa(in_addr{address}));
        do {
            for (const in_addr_t address : list) {
                auto s = std::make_unique<Socket>(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
                set_options(s->fd, 5);
                sockaddr_in to{};
                to.sin_family = AF_INET;
                to.sin_port = htons(uint16_t(port));
                to.sin_addr.s_addr = address;
                char answer;
                if (connect(s->fd, reinterpret_cast<sockaddr*>(&to), sizeof to) ||
                    ::send(s->fd, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello ||
                    recv(s->fd, &answer, 1, 0) != 1)
                    continue;
                peers_[size_t(r)].socket = std::move(s);
                return;
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        } while (seconds_now() < deadline);
        throw Failure(EXIT_CONFIG, "rank " + std::to_string(rank) + " cannot reach rank " + std::to_string(r) + " (" +
                                       tried + ", port " + std::to_string(port) +
                                       "): the watchdog needs TCP between all hosts; let the firewall pass it");
    }

    bool accept_one(int listener, int rank, uint64_t secret, double deadline) {  // true: one that was missing
        pollfd ready{listener, POLLIN, 0};
        if (poll(&ready, 1, int(std::max(0.0, deadline - seconds_now()) * 1000)) == 0)
            throw Failure(EXIT_CONFIG, "rank " + std::to_string(rank) +
                                           " has waited 30 s for higher ranks to connect: "
                                           "the watchdog needs TCP between all hosts; let the firewall pass it");
        auto s = std::make_unique<Socket>(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
        set_options(s->fd, 5);
        Hello hello;
        if (recv(s->fd, &hello, sizeof hello, MSG_WAITALL) != sizeof hello || hello.secret != secret ||
            hello.rank <= rank || hello.rank >= int64_t(peers_.size()) || ::send(s->fd, "", 1, MSG_NOSIGNAL) != 1)
            return false;
        Peer& peer = peers_[size_t(hello.rank)];
        const bool missing = !peer.socket;
        peer.socket = std::move(s);  // a second try counts
        return missing;
    }
};
