// Stands in for NCCL's header of this name: the part of it that nccl_transport.h calls, between thread ranks on the
// host. As with the real one, nothing blocks: a call is in progress until it has been polled for a while and the other
// ranks have made theirs; then the group's messages travel when its stream comes to them, and end when both sides are
// there. Tests plant faults, and see how communicators ended. A call that the real NCCL would not define stops the
// program.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <map>
#include <set>
#include <vector>

enum ncclResult_t {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
};
enum ncclDataType_t { ncclUint8 = 1 };
struct ncclUniqueId {
    char internal[128];
};
struct ncclConfig_t {
    int blocking;
};
#define NCCL_CONFIG_INITIALIZER \
    { INT_MIN }

namespace nccl_on_host {

// Call 0 of a rank is the one that makes its communicator, call n its n-th group.
struct Fault {
    enum Kind { none, refused, failed, hangs } kind = none;  // at once, while in progress, never
    int rank = 0, call = 0;
};

// Set by tests before the ranks start.
inline struct Behaviour {
    int polls = 3;  // for which a call is in progress at least
    Fault fault;
    bool abort_hangs = false;
} behaviour;

// How communicators ended.
inline std::atomic<int> aborted = 0, destroyed = 0;

struct Message {
    const void* data;
    size_t bytes;
    bool taken = false;
};

// What the ranks of one unique id share.
struct World {
    std::mutex mutex;
    std::condition_variable changed;
    int joined = 0, finalized = 0;
    std::set<std::array<int, 3>> ends;                                             // {from, to, is the sender's}
    std::map<std::pair<int, int>, std::deque<std::shared_ptr<Message>>> messages;  // {from, to}, that wait
};

struct Worlds {
    std::mutex mutex;
    std::map<std::string, std::shared_ptr<World>> by_id;
};
inline Worlds& worlds() {
    static Worlds worlds;
    return worlds;
}

struct Operation {
    bool send;
    void* data;
    size_t bytes;
    int peer;
};

// As the stream and the ranks' threads see it, until the last of them lets go.
struct Communicator {
    std::shared_ptr<World> world;
    int rank, ranks;
    int call = 0, polls = 0;  // the call that is in progress, and how often it was asked for
    bool in_progress = true, finalizing = false;
    std::vector<Operation> group{};  // in progress
    cudaStream_t stream = nullptr;
    bool aborted = false;  // under the world's mutex, like the next
    int on_stream = 0;     // groups that have not ended

    bool has(Fault::Kind kind) const {
        return behaviour.fault.kind == kind && behaviour.fault.rank == rank && behaviour.fault.call == call;
    }
    // Whether all ranks have done their part of the call.
    bool others_are_there() {
        const std::lock_guard lock(world->mutex);
        if (finalizing) return world->finalized == ranks && on_stream == 0;
        if (call == 0) return world->joined == ranks;
        for (const Operation& o : group) {  // two ranks connect when they first meet
            const int from = o.send ? rank : o.peer, to = o.send ? o.peer : rank;
            if (!world->ends.contains({from, to, true}) || !world->ends.contains({from, to, false})) return false;
        }
        return true;
    }
};

// What the stream does when it comes to a group: all its messages, in any order between ranks.
inline void run_group(const std::shared_ptr<Communicator>& self, const std::vector<Operation>& group) {
    World& world = *self->world;
    std::unique_lock lock(world.mutex);
    std::vector<std::shared_ptr<Message>> sent;
    for (const Operation& o : group)
        if (o.send && !self->aborted) {
            sent.push_back(std::make_shared<Message>(Message{o.data, o.bytes}));
            world.messages[{self->rank, o.peer}].push_back(sent.back());
        }
    world.changed.notify_all();
    std::vector<bool> received(group.size());
    world.changed.wait(lock, [&] {
        bool all = true;
        for (size_t i = 0; i < group.size() && !self->aborted; ++i) {
            const Operation& o = group[i];
            if (o.send || received[i]) continue;
            auto& waiting = world.messages[{o.peer, self->rank}];
            const bool first = std::none_of(group.begin(), group.begin() + int64_t(i), [&](const Operation& before) {
                return !before.send && before.peer == o.peer && !received[size_t(&before - group.data())];
            });
            if (waiting.empty() || !first) {
                all = false;
                continue;
            }
            if (waiting.front()->bytes != o.bytes)
                cuda_on_host::stop("NCCL: a message meets a receive of another size");
            if (o.bytes > 0) on_device_memory_of_stream([&] { std::memcpy(o.data, waiting.front()->data, o.bytes); });
            waiting.front()->taken = received[i] = true;
            waiting.pop_front();
            world.changed.notify_all();
        }
        for (const auto& message : sent) all = all && message->taken;
        return all || self->aborted;
    });
    for (auto& [ends, waiting] : world.messages)  // of an aborted group
        if (ends.first == self->rank)
            std::erase_if(waiting, [&](const auto& m) { return std::count(sent.begin(), sent.end(), m); });
    --self->on_stream;
    world.changed.notify_all();
}

}  // namespace nccl_on_host

struct ncclComm {
    std::shared_ptr<nccl_on_host::Communicator> self;
};
using ncclComm_t = ncclComm*;

namespace nccl_on_host {
struct Group {
    int depth = 0;
    ncclComm_t comm = nullptr;
    cudaStream_t stream = nullptr;
    std::vector<Operation> operations;
};
inline thread_local Group group;
}  // namespace nccl_on_host

inline const char* ncclGetErrorString(ncclResult_t result) {
    return result == ncclRemoteError ? "remote process exited or there was a network error" : "invalid usage";
}
inline const char* ncclGetLastError(ncclComm_t) { return "planted by a test"; }

inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static std::atomic<int> ids = 0;
    *id = {};
    std::snprintf(id->internal, sizeof id->internal, "\1%c%d", 0, ++ids);  // bytes, not text
    id->internal[127] = char(ids);
    return ncclSuccess;
}

inline ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t* config) {
    if (config->blocking != 0) cuda_on_host::stop("NCCL: a communicator that blocks");
    nccl_on_host::Communicator self{.world = nullptr, .rank = rank, .ranks = ranks};
    if (self.has(nccl_on_host::Fault::refused)) return ncclInvalidUsage;
    {
        const std::lock_guard lock(nccl_on_host::worlds().mutex);
        std::shared_ptr<nccl_on_host::World>& world =
            nccl_on_host::worlds().by_id[std::string(id.internal, sizeof id.internal)];
        if (!world) world = std::make_shared<nccl_on_host::World>();
        self.world = world;
    }
    {
        const std::lock_guard lock(self.world->mutex);
        ++self.world->joined;
    }
    *comm = new ncclComm{std::make_shared<nccl_on_host::Communicator>(std::move(self))};
    return ncclInProgress;
}

inline ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
    nccl_on_host::Communicator& self = *comm->self;
    *state = ncclSuccess;
    if (!self.in_progress) return ncclSuccess;
    *state = ncclInProgress;
    if (self.has(nccl_on_host::Fault::hangs)) return ncclSuccess;
    if (++self.polls <= nccl_on_host::behaviour.polls) return ncclSuccess;
    if (self.has(nccl_on_host::Fault::failed)) return *state = ncclRemoteError, ncclSuccess;
    if (!self.others_are_there()) return ncclSuccess;
    self.in_progress = false;
    if (!self.group.empty())
        self.stream->tell([self = comm->self, group = std::exchange(self.group, {})] { run_group(self, group); });
    *state = ncclSuccess;
    return ncclSuccess;
}

inline ncclResult_t ncclGroupStart() { return ++nccl_on_host::group.depth, ncclSuccess; }

namespace nccl_on_host {
inline ncclResult_t add(const Operation& operation, ncclComm_t comm, cudaStream_t stream) {
    if (group.depth != 1) cuda_on_host::stop("NCCL: a message outside a group");
    if (comm->self->in_progress) cuda_on_host::stop("NCCL: a group while the last call is in progress");
    if (operation.peer < 0 || operation.peer >= comm->self->ranks) return ncclInvalidArgument;
    group.comm = comm;
    group.stream = stream;
    group.operations.push_back(operation);
    return ncclSuccess;
}
}  // namespace nccl_on_host

inline ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    return nccl_on_host::add({true, const_cast<void*>(data), count, peer}, comm, stream);
}
inline ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int peer, ncclComm_t comm, cudaStream_t stream) {
    return nccl_on_host::add({false, data, count, peer}, comm, stream);
}

inline ncclResult_t ncclGroupEnd() {
    const nccl_on_host::Group group = std::exchange(nccl_on_host::group, {});
    if (group.depth != 1) cuda_on_host::stop("NCCL: a group that ends was not open");
    if (!group.comm) return ncclSuccess;
    nccl_on_host::Communicator& self = *group.comm->self;
    ++self.call;
    if (self.has(nccl_on_host::Fault::refused)) return ncclInvalidUsage;
    const auto with_itself = [&](bool send) {
        return std::count_if(group.operations.begin(), group.operations.end(),
                             [&](const auto& o) { return o.peer == self.rank && o.send == send; });
    };
    if (with_itself(true) != with_itself(false)) return ncclInvalidUsage;  // such messages stay within a group
    self.polls = 0;
    self.in_progress = true;
    self.group = group.operations;
    self.stream = group.stream;
    const std::lock_guard lock(self.world->mutex);
    ++self.on_stream;
    for (const nccl_on_host::Operation& o : self.group)
        self.world->ends.insert({o.send ? self.rank : o.peer, o.send ? o.peer : self.rank, o.send});
    return ncclInProgress;
}

inline ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    nccl_on_host::Communicator& self = *comm->self;
    if (self.in_progress) cuda_on_host::stop("NCCL: the end while the last call is in progress");
    self.polls = 0;
    self.in_progress = self.finalizing = true;
    const std::lock_guard lock(self.world->mutex);
    ++self.world->finalized;
    return ncclInProgress;
}
inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!comm->self->finalizing || comm->self->in_progress) cuda_on_host::stop("NCCL: destroyed before its end");
    delete comm;
    ++nccl_on_host::destroyed;
    return ncclSuccess;
}
inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    while (nccl_on_host::behaviour.abort_hangs) std::this_thread::sleep_for(std::chrono::seconds(1));
    {
        const std::lock_guard lock(comm->self->world->mutex);
        comm->self->aborted = true;
        comm->self->world->changed.notify_all();
    }
    delete comm;
    ++nccl_on_host::aborted;
    return ncclSuccess;
}
