// A parameter that several ranks hold (a tied embedding whose ends are apart, a spread head) has its gradients added
// up, and all ranks get the same bits: each adds one part of the tensor and passes the sum on. The tensor is taken in
// pieces that fit into the activations, which nobody needs between steps. Called by compute_gradients in train_gpt.cu.
#pragma once

#include <algorithm>
#include <vector>

#include "llmc/kernels/copy.cuh"
#include "llmc/parallel/rank.h"

inline void sum_shared_gradients(Rank& rank) {
    floatS* const received = reinterpret_cast<floatS*>(rank.activations);
    const auto exchange = [&](const std::vector<Transfer>& transfers) {
        const auto before = rank.transport.progress.meet();  // waits for all holders
        rank.transport.wait(0, rank.transport.post(transfers) + int64_t(transfers.size()));
        rank.transport.progress.resume(before);
    };
    for (const SharedParameter& shared : rank.shared) {
        const std::vector<int>& holders = shared.holders;
        const int count = int(holders.size());
        const int64_t part = rank.options.shared_part(count);  // plan_memory has room for what comes of it
        for (int64_t begin = 0; begin < shared.size; begin += count * part) {
            std::vector<Transfer> sums, results;
            Matrix<floatS> mine;
            const auto part_of = [&](int holder) {
                const int64_t first = std::min(begin + holder * part, shared.size);
                return Matrix<floatS>(rank.gradients + shared.offset + first, 1, std::min(part, shared.size - first));
            };
            const auto add = [&](std::vector<Transfer>& list, bool send, int peer, floatS* data, int64_t n) {
                if (n > 0) list.push_back({send, peer, data, n * int64_t(sizeof(floatS))});
            };
            for (int n = 0; n < count; ++n)
                if (holders[size_t(n)] == rank.index) mine = part_of(n);
            int others = 0;
            for (int n = 0; n < count; ++n) {
                const int peer = holders[size_t(n)];
                if (peer == rank.index) continue;
                add(sums, true, peer, part_of(n).data, part_of(n).cols);
                add(sums, false, peer, received + others++ * part, mine.cols);
                add(results, true, peer, mine.data, mine.cols);
                add(results, false, peer, part_of(n).data, part_of(n).cols);
            }
            exchange(sums);
            for (int n = 0; n < others; ++n)
                add_rows(rank.device, mine, Matrix<floatS>(received + n * part, 1, mine.cols));
            exchange(results);
        }
    }
}
