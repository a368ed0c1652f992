// What all schedules share. A schedule says two things: which rank runs which op (its owner map), and in which order a
// rank works (its slots). Exchanges follow from these: wherever the chain of a chunk goes from one rank to another, its
// result is sent. After each slot one batch is posted: what the slot has made for others, together with what a coming
// slot takes from others, so that ranks that pass results to each other, or round a ring, never wait in a circle.
#pragma once

#include <algorithm>

#include "llmc/pipeline/chain.h"

struct ScheduleInput {
    int ranks = 1, layers = 1, chunks = 1;
    int folds = 2;             // helix: chunks handled back to back in one slot
    int virtual_stages = 1;    // interleaved: stages a rank
    bool training = true;      // without: the forward pass alone
    bool spread_head = false;  // helix: the last post and the head run where the last attention did
    bool sliced = false;       // some chunks are slices of one sequence: forward in order, backward in reverse
    int round_chunks = 0;      // helix: chunks that run forward and then backward before the next ones; 0 = all
    int slices = 1;            // seq1f1b: consecutive chunks that are one sequence
};

using OpLists = std::vector<std::vector<Op>>;  // [rank][op]

inline ChainIndex chain_index(const OpLists& lists, const ScheduleInput& in) {
    int pieces = 1;
    for (const std::vector<Op>& list : lists) pieces = std::max(pieces, most_pieces(list));
    return {{in.layers, in.training}, in.chunks, pieces};
}

struct Slot {
    std::vector<Op> ops = {};    // what a rank runs between two exchanges; none where it has nothing to do
    std::vector<Op> later = {};  // run once the exchange is posted, since nobody waits for them: weight gradients
    int ahead = 1;               // receives are posted after the slot that comes so many slots before this one
};

// Slots of one rank without a break in the exchanges. Receives of its first slots are posted before it, each by itself.
using Phase = std::vector<Slot>;

template <class RankOf>  // rank_of(op) runs it
std::vector<Op> post_exchanges(int rank, const std::vector<Phase>& phases, const ScheduleInput& in, RankOf rank_of) {
    const Chain chain{in.layers, in.training};
    std::vector<Op> list;
    int batch = 0;
    const auto add = [&](const Op& op, Kind kind, int peer) {
        if (peer != rank) list.push_back({op.part, op.pass, op.layer, op.chunk, false, kind, peer, batch});
    };
    const auto send = [&](const Slot& slot) {
        for (const Op& op : slot.ops)
            if (const int next = chain.position(op) + 1; next < chain.length())
                add(op, Kind::send, rank_of(chain.op(next, op.chunk)));
    };
    const auto receive = [&](const Slot& slot) {
        for (const Op& op : slot.ops)
            if (const int position = chain.position(op); position > 0) {
                const Op input = chain.op(position - 1, op.chunk);
                add(input, Kind::receive, rank_of(input));
            }
    };
    const auto end_batch = [&] { batch += !list.empty() && list.back().batch == batch; };

    for (const Phase& phase : phases) {
        int longest = 1;
        for (const Slot& slot : phase) longest = std::max(longest, slot.ahead);
        for (int n = 0; n < longest && n < int(phase.size()); ++n)
            if (phase[n].ahead > n) {
                receive(phase[n]);
                end_batch();
            }
        for (int n = 0; n < int(phase.size()); ++n) {
            list.insert(list.end(), phase[n].ops.begin(), phase[n].ops.end());
            send(phase[n]);
            for (int coming = n + 1; coming <= n + longest && coming < int(phase.size()); ++coming)
                if (coming - phase[coming].ahead == n) receive(phase[coming]);
            end_batch();
            list.insert(list.end(), phase[n].later.begin(), phase[n].later.end());
        }
    }
    return list;
}
