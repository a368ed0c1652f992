// One rank exchanges with itself over NCCL, for which one GPU is enough: messages wait for the kernels that were told
// before them, kernels wait for the messages, and every byte arrives. dev/gpu_check.sh runs it on a GPU, `make test` on
// the host, with nccl_on_host for NCCL and streams that run later than they are told.
#include <cstdio>

#ifdef USE_NCCL

#include <unistd.h>

#include <numeric>

#include "llmc/parallel/nccl_transport.h"

constexpr int BLOCKS = 64, THREADS = 256;

// Byte i of a message, another one in every message.
__device__ inline uint8_t value(int64_t message, int64_t i) {
    return uint8_t((uint32_t(i) * 2654435761u + uint32_t(message) * 40503u) >> 16);
}

__global__ void fill_kernel(uint8_t* data /*[bytes]*/, int64_t bytes, int64_t message) {
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < bytes; i += BLOCKS * THREADS)
        data[i] = value(message, i);
}

// Counts the bytes that are right, and destroys them all.
__global__ void check_kernel(int64_t* right /*[BLOCKS] +=*/, uint8_t* data /*[bytes]*/, int64_t bytes,
                             int64_t message) {
    int count = 0;
    for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < bytes; i += BLOCKS * THREADS) {
        count += data[i] == value(message, i);
        data[i] = 0xee;
    }
    count = block_sum(count, shared_memory<int>());
    if (threadIdx.x == 0) right[blockIdx.x] += count;
}

struct Message {
    int64_t bytes;
    DeviceMemory<uint8_t> sent, received;
    explicit Message(int64_t bytes) : bytes(bytes), sent(bytes), received(bytes) {}
};
using Group = std::vector<Message>;

// Round after round, without the host ever waiting for a stream: each group is posted, and waited for when so many
// others have been posted behind it. The next round uses their memory again at once. Returns how many bytes were sent.
int64_t exchange(const Device& device, Transport& transport, const std::vector<Group>& groups, int64_t* right) {
    int64_t filled = 0, checked = 0, bytes = 0;  // messages, messages, bytes
    for (const size_t behind : {size_t(0), size_t(3), groups.size() - 1}) {
        std::vector<std::pair<int64_t, int64_t>> posted;  // [group] its first transfer, and the one behind its last
        for (size_t g = 0; g < groups.size() + behind; ++g) {
            if (g < groups.size()) {
                std::vector<Transfer> transfers;
                for (const Message& m : groups[g]) {
                    launch(fill_kernel, dim3(BLOCKS), THREADS, 0, device.stream, m.sent.data(), m.bytes, filled++);
                    transfers.push_back({true, 0, m.sent.data(), m.bytes});
                    bytes += m.bytes;
                }
                for (const Message& m : groups[g]) transfers.push_back({false, 0, m.received.data(), m.bytes});
                if (g % 2) std::reverse(transfers.begin(), transfers.end());
                const int64_t first = transport.post(transfers);
                posted.push_back({first, first + int64_t(transfers.size())});
            }
            if (g < behind) continue;
            transport.wait(posted[g - behind].first, posted[g - behind].second);
            for (const Message& m : groups[g - behind])
                launch(check_kernel, dim3(BLOCKS), THREADS, THREADS / WARP * sizeof(int), device.stream, right,
                       m.received.data(), m.bytes, checked++);
        }
    }
    return bytes;
}

int main() {
    alarm(240);  // ends a program that hangs
    try {
        const OpenDevice gpu(1);
        const Device& device = gpu.device;
        // These outlive the transport, which ends all exchanges.
        std::vector<Group> groups(40);
        groups[0].emplace_back(int64_t(64) << 20);
        for (const int64_t bytes : {1, 5, 4096, 70001, 3 << 20}) groups[1].emplace_back(bytes);
        for (size_t g = 2; g < groups.size(); ++g)
            for (size_t m = 0; m <= g % 3; ++m) groups[g].emplace_back(int64_t(1) << (g + 5 * m) % 17);
        DeviceMemory<int64_t> right(BLOCKS);
        const std::vector<int64_t> none(BLOCKS);
        upload(device, right.data(), none.data(), BLOCKS);

        NoTransport nobody;
        NcclTransport transport(nobody);
        transport.attach(device);
        const int64_t sent = exchange(device, transport, groups, right.data());
        std::vector<int64_t> counts(BLOCKS);
        download(device, counts.data(), right.data(), BLOCKS);
        transport.detach();
        const int64_t arrived = std::accumulate(counts.begin(), counts.end(), int64_t(0));
        std::printf("%ld bytes were sent, %ld have arrived as they were\n", long(sent), long(arrived));
        const bool good = arrived == sent;
        std::printf("%d passed, %d failed\n", good, !good);
        return !good;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "nccl_self_test: %s\n", error.what());
        return 1;
    }
}

#else

int main() {
    std::printf("this program was built without NCCL\n");
    return 77;  // skipped
}

#endif
