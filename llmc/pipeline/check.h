// Proves the lists of all ranks before the first step:
//
//   - every op of the model runs exactly once, whole or in row pieces in their order; a part's parameters are on one
//     rank, but for those that helix spreads, and its backward runs where its forward ran; gradients of weights that a
//     B leaves out are added by one W after it;
//   - every op has its input, from an op before it on its rank or from a message received before it;
//   - every message has one send, after its contents are computed, one receive and one reader; its row pieces come in
//     their order; and the n-th send of a rank to another carries what is expected there as the n-th receive;
//   - no deadlock: under the rules of simulate.h all ops come to run.
#pragma once

#include <set>

#include "llmc/pipeline/simulate.h"

// Sentences about what is wrong; none: the plan is right.
inline std::vector<std::string> check_lists(const OpLists& lists, const ScheduleInput& in,
                                            Waiting waiting = Waiting::message) {
    struct Place {
        int rank = -1, op = -1;
        bool before(int r, int i) const { return rank == r && op < i; }
    };
    const ChainIndex index = chain_index(lists, in);
    const Chain& chain = index.chain;
    const int ranks = int(lists.size()), length = chain.length(), pieces = index.pieces;
    const auto at = [&](Place p) -> const Op& { return lists[size_t(p.rank)][size_t(p.op)]; };
    const auto rank_name = [](int r) { return "rank " + std::to_string(r); };

    std::vector<std::string> problems;
    const auto problem = [&](int r, const Op& op, const std::string& what) {
        problems.push_back(rank_name(r) + ": " + op_name(op) + " " + what);
    };
    const auto each = [&](auto function) {
        for (int r = 0; r < ranks; ++r)
            for (int i = 0; i < int(lists[size_t(r)].size()); ++i) function(r, i, lists[size_t(r)][size_t(i)]);
    };

    // Form. What follows relies on it.
    std::vector<int> last_batch(lists.size(), -1);  // of each rank
    each([&](int r, int i, const Op& op) {
        if (chain.position(op) < 0 || op.chunk < 0 || op.chunk >= in.chunks)
            return problem(r, op, "is not in the model");
        const bool rows = op.kind != Kind::compute || op.part == Part::pre || op.part == Part::post;
        if (op.pieces != pieces && (op.pieces != 1 || op.kind != Kind::compute))
            return problem(r, op, "is cut into another number of row pieces than others");
        if (op.piece < 0 || op.piece >= op.pieces || (op.pieces > 1 && (!rows || op.pass == Pass::W)))
            return problem(r, op, "cannot run on such a row piece");
        if (op.kind == Kind::compute) return;
        const bool first = i == 0 || lists[size_t(r)][size_t(i) - 1].batch != op.batch;
        if (op.peer < 0 || op.peer >= ranks || op.peer == r) problem(r, op, "has no other rank as its peer");
        if (op.pass == Pass::W || op.split) problem(r, op, "is no message: gradients of weights stay where they are");
        if (op.batch < 0 || op.batch < last_batch[size_t(r)] + first)
            problem(r, op, "is in no batch, or in one that is not posted in one piece");
        else last_batch[size_t(r)] = op.batch;
    });
    if (!problems.empty()) return problems;

    // Every op once, and where it belongs.
    std::vector<Place> ran(index.size()), weights(ran.size()), sent(ran.size()), received(ran.size());
    std::vector<int> home(size_t(length), -1);  // [forward position] rank of the parameters
    each([&](int r, int i, const Op& op) {
        const bool message = op.kind != Kind::compute;
        std::vector<Place>& places = message              ? (op.kind == Kind::send ? sent : received)
                                     : op.pass == Pass::W ? weights
                                                          : ran;
        Place& place = places[index(op)];
        if (place.rank >= 0) return problem(r, op, "is listed twice, first on " + rank_name(place.rank));
        place = {r, i};
        const bool spread = in.spread_head && in_last_block(op.part, op.layer, in.layers);
        if (message || op.part == Part::attention || spread) return;
        const int position = chain.position(op);
        int& owner = home[size_t(std::min(position, 2 * chain.head() - position))];
        if (owner >= 0 && owner != r) problem(r, op, "runs apart from its parameters on " + rank_name(owner));
        owner = r;
    });
    for (int c = 0; c < in.chunks; ++c)
        for (int n = 0; n < length; ++n) {
            const size_t last = index(chain.op(n, c)), first = last - size_t(pieces - 1);
            const bool whole = ran[last].rank >= 0 && at(ran[last]).pieces == 1;
            for (size_t k = first; whole && k < last; ++k)
                if (ran[k].rank >= 0) problem(ran[k].rank, at(ran[k]), "is a piece of what runs as a whole, too");
            for (size_t k = whole ? last : first; k <= last; ++k) {
                if (ran[k].rank < 0) {
                    Op missing = chain.op(n, c);
                    if (ran[first].rank >= 0) missing.piece = int(k - first), missing.pieces = pieces;
                    problems.push_back("no rank runs " + op_name(missing));
                    break;
                }
                const Op& op = at(ran[k]);
                const int r = ran[k].rank;
                if (k > first && !whole && (ran[k - 1].rank < 0 || !ran[k - 1].before(r, ran[k].op)))
                    problem(r, op, "does not come after the piece before it on that rank");
                const Place forward = ran[k - size_t(std::max(0, 2 * (n - chain.head()))) * size_t(pieces)];
                if (n > chain.head() && forward.rank != r) problem(r, op, "runs apart from its forward");
                if (op.split != (weights[last].rank >= 0))
                    problem(r, op,
                            op.split ? "leaves out the gradients of its weights, and no W adds them"
                                     : "has added the gradients of its weights, and a W adds them again");
                else if (op.split && (weights[last].rank != r || weights[last].op < ran[k].op))
                    problem(weights[last].rank, at(weights[last]), "does not come after its backward on that rank");
            }
        }
    if (!problems.empty()) return problems;

    // Inputs and messages.
    std::vector<bool> read(ran.size());
    each([&](int r, int i, const Op& op) {
        const size_t k = index(op);
        if (op.kind == Kind::send) {
            const Place made = ran[ran[k].rank >= 0 ? k : k + size_t(pieces - 1 - op.piece)];
            if (!made.before(r, i)) problem(r, op, "is posted before its contents are computed there");
            if (received[k].rank != op.peer || at(received[k]).peer != r) problem(r, op, "has no receive at its peer");
        } else if (op.kind == Kind::receive) {
            if (sent[k].rank != op.peer || at(sent[k]).peer != r) problem(r, op, "has no send at its peer");
            if (op.piece > 0 && received[k - 1].rank == r && received[k - 1].op > i)
                problem(r, op, "comes before the piece before it");
        } else if (op.pass != Pass::W && chain.position(op) > 0) {
            const size_t input = index.input(op), last = input + size_t(pieces - 1) - input % size_t(pieces);
            const Place from = ran[input].rank >= 0 ? ran[input] : ran[last];
            if (received[input].before(r, i)) {
                for (size_t n = op.pieces > 1 ? input : last - size_t(pieces - 1); n <= input; ++n) {
                    read[n] = true;
                    if (received[n].rank != r) problem(r, op, "lacks its input: a piece of it is not received there");
                    else if (n < input && at(received[n]).batch >= at(received[input]).batch)
                        problem(r, op, "would not wait for all pieces of its input, which come out of order");
                }
            } else if (!from.before(r, i))
                problem(r, op,
                        "lacks its input: " + op_name(at(from)) + " runs on " + rank_name(from.rank) +
                            ", and nothing brings its result in time");
        }
    });
    each([&](int r, int, const Op& op) {
        if (op.kind == Kind::receive && !read[index(op)]) problem(r, op, "is read by no op after it");
    });
    if (!problems.empty()) return problems;

    const std::vector<std::vector<int>> links = link_ops(lists, in);
    each([&](int r, int i, const Op& op) {
        if (op.kind != Kind::receive) return;
        const Op& other = at({op.peer, links[size_t(r)][size_t(i)]});
        if (index(other) != index(op))
            problem(r, op, "meets the " + op_name(other) + ": the two ranks differ in their order");
        else if (other.weights != op.weights)
            problem(r, op, "brings weights or their gradients where its send does not, or lacks them where it does");
    });
    // Weights that travel once a step come with the first X of a layer. Their gradients are summed from the first
    // backward of its attention on, leave with the last dX, and are added where that arrives.
    for (int r = 0; r < ranks; ++r) {
        std::set<std::pair<int, int>> come, left;  // layer, the other rank
        std::set<int> summed;                      // layers
        const auto expect = [&](const Op& op, bool weights) {
            if (op.weights != weights) problem(r, op, "has weights or their gradients out of turn");
        };
        const std::vector<Op>& list = lists[size_t(r)];
        for (const Op& op : list)
            if (op.part == Part::pre && op.pass == Pass::F && op.kind != Kind::compute)
                expect(op, come.emplace(op.layer, op.peer).second);
            else if (op.part == Part::attention && op.pass == Pass::B && op.kind == Kind::compute)
                expect(op, home[size_t(chain.position({Part::pre, Pass::F, op.layer, 0}))] != r &&
                               summed.insert(op.layer).second);
        for (auto op = list.rbegin(); op != list.rend(); ++op)
            if (op->part == Part::attention && op->pass == Pass::B && op->kind != Kind::compute)
                expect(*op, left.emplace(op->layer, op->peer).second);
        for (const Op& op : list)
            if (op.part == Part::pre && op.pass == Pass::B && op.kind == Kind::compute) {
                const Place from = received[index.input(op)];
                expect(op, from.rank == r && at(from).weights);
            }
    }
    if (!problems.empty()) return problems;

    const auto zero = [](const Op&, int = 0) { return 0.0; };
    const std::vector<size_t> stopped = simulate(lists, in, zero, zero, waiting).stopped;
    for (int r = 0; r < ranks; ++r)
        if (const std::vector<Op>& list = lists[size_t(r)]; stopped[size_t(r)] < list.size())
            problem(r, list[stopped[size_t(r)]], "waits for ever: a deadlock");
    return problems;
}
