// Schedules, their proof and their simulation: the worked examples of HelixPipe, its table of exchanges, wrong plans
// that must be refused, thousands of random instances, bubbles against closed forms and against a second simulator.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <map>
#include <random>
#include <tuple>

#include "dev/tests/brute_force.h"
#include "llmc/pipeline/check.h"
#include "llmc/pipeline/print.h"
#include "llmc/pipeline/row_pieces.h"
#include "llmc/pipeline/schedules/schedules.h"

namespace {

OpLists lists_of(const std::string& name, const ScheduleInput& in) { return find_schedule(name)->lists(in); }

std::string describe(const std::string& name, const ScheduleInput& in) {
    return name + " p=" + std::to_string(in.ranks) + " L=" + std::to_string(in.layers) +
           " m=" + std::to_string(in.chunks) + " F=" + std::to_string(in.folds) +
           " v=" + std::to_string(in.virtual_stages) + " slices=" + std::to_string(in.slices) +
           (in.spread_head ? " spread head" : "") +
           (in.round_chunks ? " rounds of " + std::to_string(in.round_chunks) : "") +
           (in.training ? "" : " forward only");
}

// The seed of everything random, printed; another one with SEED=n.
unsigned seed() {
    const char* text = std::getenv("SEED");
    const unsigned value = text ? unsigned(std::strtoul(text, nullptr, 10)) : 5;
    std::printf("  SEED=%u\n", value);
    return value;
}

// Times of the parts. Backward takes twice the forward, and where it recomputes blocks, their forward on top; a split
// backward halves. Embedding and head cost nothing.
struct Times {
    double pre, attention, post;
    bool recompute = false;

    double operator()(const Op& op) const {
        const double forward = op.part == Part::pre         ? pre
                               : op.part == Part::attention ? attention
                               : op.part == Part::post      ? post
                                                            : 0;
        if (op.pass != Pass::B) return forward / op.pieces;
        return forward * (op.part == Part::attention ? 2 : (op.split ? 1 : 2) + recompute) / op.pieces;
    }
};

double no_time(const Op&, int) { return 0; }

// ---------------------------------------------------------------------------------------------------------------------
// Examples worked out by hand

TEST(Helix, WorkedExampleOfTwoRanks) {
    const ScheduleInput in{2, 4, 4, 2};
    const OpLists lists = lists_of("helix", in);
    EXPECT_EQ(
        print_list(lists[0], in),
        "P0.m0<>1 P0.m1<>1 P0.m2 A0.m2<>1 P0.m3 A0.m3<>1 A1.m0 P2.m0<>1 A1.m1 P2.m1<>1 P2.m2 A2.m2<>1 P2.m3 A2.m3<>1 "
        "A3.m0 P4.m0<>1 A3.m1 P4.m1<>1 P4.m2 P4.m3 "
        "P~4.m3<>1 P~4.m2<>1 P~4.m1 A~3.m1<>1 P~4.m0 A~3.m0<>1 A~2.m3 P~2.m3<>1 A~2.m2 P~2.m2<>1 P~2.m1 A~1.m1<>1 "
        "P~2.m0 A~1.m0<>1 A~0.m3 P~0.m3<>1 A~0.m2 P~0.m2<>1 P~0.m1 P~0.m0");
    EXPECT_EQ(
        print_list(lists[1], in),
        "(recv0 recv0) A0.m0 P1.m0<>0 A0.m1 P1.m1<>0 P1.m2 A1.m2<>0 P1.m3 A1.m3<>0 A2.m0 P3.m0<>0 A2.m1 P3.m1<>0 "
        "P3.m2 A3.m2<>0 P3.m3 A3.m3<>0 "
        "(recv0 recv0) A~3.m3 P~3.m3<>0 A~3.m2 P~3.m2<>0 P~3.m1 A~2.m1<>0 P~3.m0 A~2.m0<>0 A~1.m3 P~1.m3<>0 A~1.m2 "
        "P~1.m2<>0 P~1.m1 A~0.m1<>0 P~1.m0 A~0.m0<>0");
}

TEST(Helix, WorkedExampleOfFourRanks) {
    const ScheduleInput in{4, 4, 8, 2};
    const OpLists lists = lists_of("helix", in);
    EXPECT_EQ(print_list(lists[0], in),
              "P0.m0<>1 P0.m1<>1 P0.m2<>2 P0.m3<>2 P0.m4<>3 P0.m5<>3 P0.m6 A0.m6<>1 P0.m7 A0.m7<>1 A1.m4<>2 A1.m5<>2 "
              "A2.m2<>3 "
              "A2.m3<>3 A3.m0 P4.m0<>1 A3.m1 P4.m1<>1 P4.m2<>2 P4.m3<>2 P4.m4<>3 P4.m5<>3 P4.m6 P4.m7 "
              "P~4.m7<>3 P~4.m6<>3 P~4.m5<>2 P~4.m4<>2 P~4.m3<>1 P~4.m2<>1 P~4.m1 A~3.m1<>3 P~4.m0 A~3.m0<>3 A~2.m3<>2 "
              "A~2.m2<>2 A~1.m5<>1 A~1.m4<>1 A~0.m7 P~0.m7<>3 A~0.m6 P~0.m6<>3 P~0.m5<>2 P~0.m4<>2 P~0.m3<>1 P~0.m2<>1 "
              "P~0.m1 P~0.m0");
    EXPECT_EQ(
        print_list(lists[1], in),
        "(recv0 recv0) A0.m0 P1.m0<>2 A0.m1 P1.m1<>2 P1.m2<>3 P1.m3<>3 P1.m4<>0 P1.m5<>0 P1.m6 A1.m6<>2 P1.m7 "
        "A1.m7<>2 "
        "A2.m4<>3 A2.m5<>3 A3.m2<>0 A3.m3<>0 "
        "(recv0 recv0) A~3.m3<>3 A~3.m2<>3 A~2.m5<>2 A~2.m4<>2 A~1.m7 P~1.m7<>0 A~1.m6 P~1.m6<>0 P~1.m5<>3 P~1.m4<>3 "
        "P~1.m3<>2 P~1.m2<>2 P~1.m1 A~0.m1<>0 P~1.m0 A~0.m0<>0");
    EXPECT_EQ(
        print_list(lists[2], in),
        "(recv0 recv0) A0.m2<>1 A0.m3<>1 A1.m0 P2.m0<>3 A1.m1 P2.m1<>3 P2.m2<>0 P2.m3<>0 P2.m4<>1 P2.m5<>1 P2.m6 "
        "A2.m6<>3 P2.m7 A2.m7<>3 A3.m4<>0 A3.m5<>0 "
        "(recv0 recv0) A~3.m5<>3 A~3.m4<>3 A~2.m7 P~2.m7<>1 A~2.m6 P~2.m6<>1 P~2.m5<>0 P~2.m4<>0 P~2.m3<>3 P~2.m2<>3 "
        "P~2.m1 A~1.m1<>1 P~2.m0 A~1.m0<>1 A~0.m3<>0 A~0.m2<>0");
    EXPECT_EQ(
        print_list(lists[3], in),
        "(recv0 recv0) A0.m4<>1 A0.m5<>1 A1.m2<>2 A1.m3<>2 A2.m0 P3.m0<>0 A2.m1 P3.m1<>0 P3.m2<>1 P3.m3<>1 P3.m4<>2 "
        "P3.m5<>2 P3.m6 A3.m6<>0 P3.m7 A3.m7<>0 "
        "(recv0 recv0) A~3.m7 P~3.m7<>2 A~3.m6 P~3.m6<>2 P~3.m5<>1 P~3.m4<>1 P~3.m3<>0 P~3.m2<>0 P~3.m1 A~2.m1<>2 "
        "P~3.m0 A~2.m0<>2 A~1.m3<>1 A~1.m2<>1 A~0.m5<>0 A~0.m4<>0");
}

// Start and end of every op of the one-fold example: p = 4, L = 4, m = 4, blocks 1 (first and last 0.5), attention 2.
TEST(Helix, SlotTimesOfOneFold) {
    const ScheduleInput in{4, 4, 4, 1};
    const OpLists lists = lists_of("helix", in);
    const Timeline timeline = simulate(lists, in, Times{0.5, 2, 0.5}, no_time);
    const auto slots = [&](size_t r) {  // "A0.m3 2-4": ops of one name are one entry
        std::string text, last;
        double end = 0;
        char number[32];
        const auto time = [&](double t) { return std::snprintf(number, sizeof number, "%g", t), std::string(number); };
        for (size_t i = 0; i < lists[r].size() && lists[r][i].pass == Pass::F; ++i) {
            if (lists[r][i].kind != Kind::compute) continue;
            const std::string now = print_list({lists[r][i]}, in);
            if (now != last)
                text += (last.empty() ? "" : "-" + time(end) + " ") + now + " " + time(timeline.spans[r][i].start);
            last = now;
            end = timeline.spans[r][i].end;
        }
        return text + "-" + time(end);
    };
    EXPECT_EQ(slots(0),
              "P0.m0 0-0.5 P0.m1 0.5-1 P0.m2 1-1.5 P0.m3 1.5-2 A0.m3 2-4 A1.m2 5.5-7.5 A2.m1 7.5-9.5 A3.m0 9.5-11.5 "
              "P4.m0 11.5-12 P4.m1 12.5-13 P4.m2 13.5-14 P4.m3 14.5-15");
    EXPECT_EQ(slots(1),
              "A0.m0 0.5-2.5 P1.m0 2.5-3.5 P1.m1 3.5-4.5 P1.m2 4.5-5.5 P1.m3 5.5-6.5 A1.m3 6.5-8.5 A2.m2 8.5-10.5 "
              "A3.m1 10.5-12.5");
    EXPECT_EQ(slots(2),
              "A0.m1 1-3 A1.m0 3.5-5.5 P2.m0 5.5-6.5 P2.m1 6.5-7.5 P2.m2 7.5-8.5 P2.m3 8.5-9.5 A2.m3 9.5-11.5 "
              "A3.m2 11.5-13.5");
    EXPECT_EQ(slots(3),
              "A0.m2 1.5-3.5 A1.m1 4.5-6.5 A2.m0 6.5-8.5 P3.m0 8.5-9.5 P3.m1 9.5-10.5 P3.m2 10.5-11.5 P3.m3 11.5-12.5 "
              "A3.m3 12.5-14.5");
}

// The table of exchanges, row by row: what is posted after a slot, by the block or attention it ends with; and the
// receives posted by themselves. Full groups; where p does not divide L, each group is exchanged as if it were alone.
TEST(Helix, TableOfExchanges) {
    int slots = 0, starts = 0;
    for (const auto& [p, L, m, F] : std::vector<std::array<int, 4>>{{2, 4, 4, 2},
                                                                    {4, 4, 8, 2},
                                                                    {2, 2, 4, 2},
                                                                    {3, 6, 12, 2},
                                                                    {4, 8, 4, 1},
                                                                    {4, 8, 16, 2},
                                                                    {8, 32, 16, 2},
                                                                    {3, 3, 27, 3},
                                                                    {3, 4, 6, 1},
                                                                    {4, 5, 16, 2},
                                                                    {5, 2, 10, 1},
                                                                    {4, 7, 12, 1},
                                                                    {2, 5, 12, 3}}) {
        const ScheduleInput in{p, L, m, F};
        const OpLists lists = lists_of("helix", in);
        const bool closed = L % p == 0;
        const auto group = [&](const Op& op) { return op.chunk / (p * F); };
        const auto offset = [&](const Op& op) { return op.chunk / F % p; };
        for (int r = 0; r < p; ++r) {
            const std::vector<Op>& list = lists[size_t(r)];
            const Op* end = nullptr;  // of the slot
            for (size_t i = 0; i < list.size();) {
                if (list[i].kind == Kind::compute) {
                    end = &list[i++];
                    continue;
                }
                std::string sent, received;
                const Op first = list[i];
                for (const int batch = first.batch; i < list.size() && list[i].batch == batch; ++i)
                    (list[i].kind == Kind::send ? sent : received) +=
                        message_name(list[i]) + std::to_string(list[i].layer) + ".m" + std::to_string(list[i].chunk) +
                        " " + std::to_string(list[i].peer);
                if (!end || end->pass != first.pass || (!closed && sent.empty() && group(*end) != group(first))) {
                    const bool forward = first.pass == Pass::F;
                    EXPECT_STREQ(message_name(first), forward ? "X" : "dY");
                    EXPECT_EQ(first.layer, forward ? 0 : L - 1);
                    EXPECT_EQ(offset(first), forward ? r - 1 : (r - L % p + p) % p);
                    EXPECT_EQ(first.peer, forward ? 0 : L % p);
                    EXPECT_EQ(sent, "");
                    ++starts;
                    continue;
                }
                const bool forward = end->pass == Pass::F, block = end->part != Part::attention;
                const int g = group(*end), j = offset(*end), f = end->chunk % F, l = end->layer;
                const int k = end->part == Part::embed  ? 0
                              : end->part == Part::head ? L
                              : end->part == Part::post ? l + 1
                                                        : l;
                const auto message = [&](const std::string& what, int layer, int in_group, int at_offset, int peer) {
                    if (in_group < 0 || in_group >= m / (p * F)) return std::string();
                    return what + std::to_string(layer) + ".m" + std::to_string((in_group * p + at_offset) * F + f) +
                           " " + std::to_string(peer);
                };
                std::string send, receive;
                if (block && forward && k < L) {
                    const int peer = (k + j + 1) % p;
                    send = message("X", k, g, j, peer);
                    if (k > 0) receive = message("Y", k - 1, g, j + 1, peer);
                    else if (closed) receive = message("Y", L - 1, g - 1, j + 1, peer);
                } else if (block && forward) {
                    receive = message("Y", L - 1, g, j + 1, (L + j + 1) % p);
                } else if (forward) {
                    const int peer = (l + 1) % p;
                    send = message("Y", l, g, j, peer);
                    if (l < L - 1) receive = message("X", l + 1, g, j - 1, peer);
                    else if (closed) receive = message("X", 0, g + 1, j - 1, peer);
                } else if (block && k > 0) {
                    const int peer = (k + j) % p;
                    send = message("dY", k - 1, g, j, peer);
                    if (k < L) receive = message("dX", k, g, j - 1, peer);
                    else if (closed) receive = message("dX", 0, g + 1, j - 1, peer);
                } else if (block) {
                    receive = message("dX", 0, g, j - 1, j % p);
                } else {
                    const int peer = l % p;
                    send = message("dX", l, g, j, peer);
                    if (l > 0) receive = message("dY", l - 1, g, j + 1, peer);
                    else if (closed) receive = message("dY", L - 1, g - 1, j + 1, peer);
                }
                EXPECT_EQ(sent, send) << describe("helix", in) << " rank " << r << " after " << op_name(*end);
                EXPECT_EQ(received, receive) << describe("helix", in) << " rank " << r << " after " << op_name(*end);
                ++slots;
            }
        }
    }
    std::printf("  %d exchanges after slots and %d receives by themselves as in the table\n", slots, starts);
}

// ---------------------------------------------------------------------------------------------------------------------
// Wrong plans

// A plan that must be refused, with a sentence that has these words.
std::string expect_refused(const OpLists& lists, const ScheduleInput& in, const std::string& words = "") {
    std::string sentences;
    for (const std::string& sentence : check_lists(lists, in)) sentences += sentence + "\n";
    EXPECT_NE(sentences, "");
    EXPECT_NE(sentences.find(words), std::string::npos) << "sentences:\n" << sentences << "lack: " << words;
    return sentences.substr(0, sentences.find('\n'));
}

// Every batch in two, sends before receives: exchanges that are not posted together.
OpLists unbatched(OpLists lists) {
    for (std::vector<Op>& list : lists) {
        int number = -1;
        const Op* last = nullptr;
        for (size_t i = 0; i < list.size();) {
            size_t end = i;
            while (end < list.size() && list[end].kind != Kind::compute && list[end].batch == list[i].batch) ++end;
            std::stable_sort(list.begin() + long(i), list.begin() + long(end),
                             [](const Op& a, const Op& b) { return a.kind < b.kind; });
            last = nullptr;
            for (; i < end; last = &list[i++]) list[i].batch = number += !last || last->kind != list[i].kind;
            if (i < list.size() && list[i].kind == Kind::compute) ++i;
        }
    }
    return lists;
}

TEST(Check, RefusesWrongPlans) {
    struct Good {
        std::string name;
        ScheduleInput in;
        int pieces = 1;
    };
    const std::vector<Good> plans = {
        {"helix", {4, 4, 8, 2}},
        {"helix", {3, 4, 5, 1}},
        {"helix", {2, 3, 5, 1, 1, true, true, false, 2}},  // spread head, rounds of two chunks
        {"helix", {3, 3, 3, 1}, 2},                        // row pieces
        {"helix", {2, 3, 2, 2, 1, true, true}, 3},
        {"1f1b", {3, 5, 4}},
        {"gpipe", {2, 2, 3}},
        {"interleaved", {2, 4, 4, 2, 2}},
        {"zb-h2", {3, 3, 6}},
    };
    int tried = 0;
    for (const auto& [name, in, pieces] : plans) {
        const OpLists whole = lists_of(name, in), good = pieces > 1 ? cut_into_row_pieces(whole, in, pieces) : whole;
        ASSERT_EQ(check_lists(good, in), std::vector<std::string>()) << describe(name, in);
        for (size_t r = 0; r < good.size(); ++r)
            for (size_t i = 0; i < good[r].size(); ++i) {
                const Op& op = good[r][i];
                SCOPED_TRACE(describe(name, in) + " rank " + std::to_string(r) + " " + op_name(op));
                const auto refused = [&](const std::string& words, auto change) {
                    OpLists lists = good;
                    change(lists, lists[r], lists[r].begin() + long(i));
                    expect_refused(lists, in, words);
                    ++tried;
                };
                refused("", [](auto&, auto& list, auto at) { list.erase(at); });
                refused(op_name(op), [](auto&, auto& list, auto at) { list.insert(at, *at); });
                refused("", [&](auto&, auto&, auto at) { at->chunk = (at->chunk + 1) % in.chunks; });
                refused("", [&](auto&, auto&, auto at) { at->layer += 1; });
                if (op.pieces > 1) {
                    refused("", [&](auto&, auto&, auto at) { at->piece = (at->piece + 1) % at->pieces; });
                    refused("", [&](auto&, auto&, auto at) { at->piece = at->pieces; });
                }
                refused("row piece", [&](auto&, auto&, auto at) { at->pieces += 1; });
                if (op.kind == Kind::compute) {
                    const bool first = op.part == Part::embed && op.pass == Pass::F;
                    if (!first && i > 0)
                        refused("", [](auto&, auto& list, auto at) { std::rotate(list.begin(), at, at + 1); });
                    if (op.split) refused("adds them again", [](auto&, auto&, auto at) { at->split = false; });
                    refused("", [&](auto& lists, auto& list, auto at) {  // on another rank
                        list.erase(at);
                        lists[(r + 1) % lists.size()].push_back(op);
                    });
                    continue;
                }
                refused("in no batch", [](auto&, auto&, auto at) { at->batch = -1; });
                refused("no other rank", [&](auto&, auto&, auto at) { at->peer = int(r); });
                refused("",
                        [](auto&, auto&, auto at) { at->kind = at->kind == Kind::send ? Kind::receive : Kind::send; });
                for (int peer = 0; peer < in.ranks; ++peer)
                    if (peer != op.peer && peer != int(r))
                        refused(op.kind == Kind::send ? "no receive at its peer" : "no send at its peer",
                                [&](auto&, auto&, auto at) { at->peer = peer; });
                for (size_t k = i + 1; k < good[r].size(); ++k)  // swapped with the next one of its kind to its peer
                    if (good[r][k].kind == op.kind && good[r][k].peer == op.peer) {
                        refused("", [&](auto&, auto& list, auto) {
                            std::swap(list[i], list[k]);
                            std::swap(list[i].batch, list[k].batch);
                        });
                        break;
                    }
                const auto other_end = [&](auto& list) {
                    return std::find_if(list.begin(), list.end(), [&](const Op& o) {
                        return o.kind == Kind::receive && std::tie(o.part, o.pass, o.layer, o.chunk, o.piece) ==
                                                              std::tie(op.part, op.pass, op.layer, op.chunk, op.piece);
                    });
                };
                if (op.kind == Kind::send && op.piece > 0 && !op.weights)  // before the piece before it, at both ends
                    refused("", [&](auto& lists, auto& list, auto) {
                        auto& peer = lists[size_t(op.peer)];
                        const auto swap_pieces = [&](auto& ops, Kind kind) {
                            std::vector<size_t> found;
                            for (size_t k = 0; k < ops.size(); ++k)
                                if (ops[k].kind == kind && !ops[k].weights && ops[k].piece + 1 >= op.piece &&
                                    ops[k].piece <= op.piece &&
                                    std::tie(ops[k].part, ops[k].pass, ops[k].layer, ops[k].chunk) ==
                                        std::tie(op.part, op.pass, op.layer, op.chunk))
                                    found.push_back(k);
                            if (found.size() == 2) std::swap(ops[found[0]].piece, ops[found[1]].piece);
                            else ops.clear();  // one of the two has weights with it: nothing to swap
                        };
                        swap_pieces(list, Kind::send);
                        swap_pieces(peer, Kind::receive);
                    });
                if (op.kind == Kind::send) {
                    refused("listed twice", [&](auto& lists, auto& list, auto at) {  // both ends
                        list.insert(at, op);
                        auto& peer = lists[size_t(op.peer)];
                        peer.insert(other_end(peer), *other_end(peer));
                    });
                    refused("lacks its input", [&](auto& lists, auto& list, auto at) {
                        list.erase(at);
                        auto& peer = lists[size_t(op.peer)];
                        peer.erase(other_end(peer));
                    });
                }
            }
        if (name == "gpipe") continue;  // messages one way at a time need no batches
        const std::string sentence = expect_refused(unbatched(good), in, "waits for ever: a deadlock");
        std::printf("  %s unbatched: %s\n", describe(name, in).c_str(), sentence.c_str());
    }
    std::printf("  %d wrong plans refused\n", tried);
}

// ---------------------------------------------------------------------------------------------------------------------
// Bubbles

// The bubble without communication where a closed form is exact, negative elsewhere.
double closed_form(const std::string& name, const ScheduleInput& in, const Times& t) {
    const int p = in.ranks, L = in.layers, F = in.folds, v = in.virtual_stages;
    const int m = in.round_chunks ? in.round_chunks : in.chunks;  // of a round: rank 0 begins and ends each
    const double rounds = double(in.chunks) / m;
    if (in.chunks % m != 0) return -1;
    if (p < 2 || L % p != 0 || !in.training || in.spread_head) return -1;
    const double layers = L / p, blocks = t.pre + t.post;
    const double forward = layers * (blocks + t.attention);
    const double backward = layers * ((t.recompute ? 2 : 1) * blocks + 2 * t.attention), weights = layers * blocks;
    if (name == "gpipe" || name == "1f1b") return (p - 1) * (forward + backward + weights);
    if (name == "interleaved" && L % (p * v) == 0 && m % p == 0) return (p - 1) * (forward + backward + weights) / v;
    if (name == "zb-h1" && m >= p) return (p - 1) * (forward + backward - weights);
    if (name == "zb-h2" && m >= 2 * p - 1) return (p - 1) * (forward + backward - 2 * weights);
    const double passes = t.recompute ? 4 : 3;
    if (name == "helix" && F == 1 && m % p == 0) return rounds * passes * (p - 1) * blocks;
    // An attention hides a block, in the backward pass as well.
    const bool hides = t.pre == 0 && t.attention >= t.post && 2 * t.attention >= (passes - 1) * t.post;
    if (name == "helix" && F > 1 && m % (p * F) == 0 && hides) return rounds * passes * (F * (p - 2) + 1) * t.post;
    return -1;
}

// Idle time of the busiest rank; for ZB-H2, which lets every rank start late and end early, within its own span.
double bubble(const std::string& name, const Timeline& timeline) {
    if (name != "zb-h2") return timeline.bubble();
    double longest = 0;
    for (const Span& span : timeline.active) longest = std::max(longest, span.end - span.start);
    return longest - *std::max_element(timeline.busy.begin(), timeline.busy.end());
}

struct Counts {
    int proven = 0, rounds = 0, cut = 0, closed = 0, compared = 0;
};

// Draws an instance and tries all schedules on it. Returns what is wrong.
std::string try_instance(unsigned seed, int number, std::map<std::string, Counts>& counts, int& uneven) {
    std::seed_seq sequence{seed, unsigned(number)};
    std::mt19937 generator(sequence);
    const auto random = [&](int low, int high) { return low + int(generator() % unsigned(high - low + 1)); };
    const bool even = number % 2 == 0;
    ScheduleInput in{random(even ? 1 : 2, 16), random(1, 64), random(1, 64), random(1, 3), random(1, 4)};
    const auto multiples = [&] { return in.layers % in.ranks == 0 && in.chunks % (in.ranks * in.folds) == 0; };
    if (even) {
        const int stages = in.ranks * in.virtual_stages, group = in.ranks * in.folds;
        in.layers = std::max(1, in.layers / stages) * stages;
        in.chunks = std::max(1, in.chunks / group) * group;
    } else if (multiples()) {
        (random(0, 1) ? in.layers : in.chunks) -= 1;
    }
    uneven += !multiples();
    in.training = random(0, 9) > 0;
    const int message = random(0, 3), far = random(0, 5);  // ranks of two are a node, links between nodes are slower
    const auto message_time = [&](const Op& op, int from) {
        return double(message * (1 + op.chunk % 3 + (op.peer / 2 == from / 2 ? 0 : far)));
    };

    for (const Schedule& schedule : schedules()) {
        const std::string& name = schedule.name;
        Times times{double(random(0, 4)), double(random(1, 20)), double(random(1, 8)), random(0, 1) == 1};
        if (name == "helix" && in.folds > 1 && random(0, 1))
            times = {0, times.attention + times.post, times.post, times.recompute};
        ScheduleInput mine = in;
        if (name != "interleaved") mine.virtual_stages = 1;
        mine.spread_head = name == "helix" && random(0, 1) == 1;
        if (name == "seq1f1b") mine.slices = random(1, 8);
        if (name == "helix" && random(0, 1))  // half of them full groups where the step has these
            mine.round_chunks = even && random(0, 1) ? in.ranks * in.folds : random(1, in.chunks);
        const std::string what = describe(name, mine) + " times " + std::to_string(times.pre) + " " +
                                 std::to_string(times.attention) + " " + std::to_string(times.post) +
                                 (times.recompute ? " recompute: " : ": ");
        if (!refusal(schedule, mine).empty()) return what + refusal(schedule, mine);

        const int pieces = name == "helix" ? std::array{1, 2}[size_t(random(0, 1))] : 1;
        const OpLists lists =
            pieces > 1 ? cut_into_row_pieces(schedule.lists(mine), mine, pieces) : schedule.lists(mine);
        const std::vector<std::string> problems = check_lists(lists, mine, Waiting::batch);  // implies Waiting::message
        if (!problems.empty()) return what + problems[0];
        for (size_t r = 0; r < lists.size(); ++r)
            for (const Op& op : lists[r])
                if (op.kind == Kind::compute && schedule.owner(mine, op.part, op.layer, op.chunk) != int(r))
                    return what + op_name(op) + " is not on the rank of its owner map";
        ++counts[name].proven;
        counts[name].rounds += mine.round_chunks > 0;
        counts[name].cut += pieces > 1;

        const double expected = pieces > 1 ? -1 : closed_form(name, mine, times);
        if (expected >= 0) {
            const double found = bubble(name, simulate(lists, mine, times, no_time));
            if (found != expected)
                return what + "bubble " + std::to_string(found) + ", closed form " + std::to_string(expected);
            ++counts[name].closed;
            continue;
        }
        const Timeline timeline = simulate(lists, mine, times, message_time);
        const BruteForce second = brute_force(lists, mine.layers, times, message_time);
        if (!second.finished || timeline.makespan != second.makespan || timeline.busy != second.busy)
            return what + "makespan " + std::to_string(timeline.makespan) + ", brute force " +
                   std::to_string(second.makespan);
        for (size_t r = 0; r < lists.size(); ++r)
            for (size_t i = 0; i < lists[r].size(); ++i)
                if (lists[r][i].kind == Kind::compute && timeline.spans[r][i].start != second.start[r][i])
                    return what + op_name(lists[r][i]) + " starts at " + std::to_string(timeline.spans[r][i].start) +
                           ", brute force " + std::to_string(second.start[r][i]);
        ++counts[name].compared;
    }
    return "";
}

TEST(Schedules, RandomInstances) {
    const unsigned from = seed();
    std::map<std::string, Counts> total;
    int all_uneven = 0;
#pragma omp parallel
    {
        std::map<std::string, Counts> counts;
        int uneven = 0;
#pragma omp for schedule(dynamic)
        for (int number = 0; number < 5000; ++number) {
            const std::string problem = try_instance(from, number, counts, uneven);
#pragma omp critical
            if (!problem.empty()) ADD_FAILURE() << "instance " << number << ": " << problem;
        }
#pragma omp critical
        {
            all_uneven += uneven;
            for (const auto& [name, c] : counts)
                for (int Counts::*count :
                     {&Counts::proven, &Counts::rounds, &Counts::cut, &Counts::closed, &Counts::compared})
                    total[name].*count += c.*count;
        }
    }
    EXPECT_EQ(all_uneven, 2500);
    for (const auto& [name, c] : total)
        std::printf(
            "  %-12s %d plans proven, %d in rounds, %d in row pieces; bubbles: %d equal to the closed form, %d to the "
            "brute force\n",
            name.c_str(), c.proven, c.rounds, c.cut, c.closed, c.compared);
    EXPECT_GT(total["helix"].rounds, 2000);
    EXPECT_GT(total["helix"].cut, 2000);
}

// Two folds, and blocks whose pre takes a quarter: bubble in units of the blocks' forward and backward.
TEST(Helix, BubblesOfTwoFolds) {
    const std::map<int, std::array<double, 2>> units = {{2, {1, 1}},   {3, {2.5, 2}}, {4, {4, 4.5}},
                                                        {5, {6, 6.5}}, {6, {8, 8.5}}, {8, {12, 12.5}}};
    for (const auto& [p, expected] : units)
        for (int groups : {1, 3}) {
            const ScheduleInput in{p, 2 * p, 2 * p * groups, 2};
            const OpLists lists = lists_of("helix", in);
            EXPECT_EQ(simulate(lists, in, Times{1, 16, 3}, no_time).bubble() / (3 * 4), expected[0]) << p;
            EXPECT_EQ(simulate(lists, in, Times{1, 16, 3, true}, no_time).bubble() / (4 * 4), expected[0]) << p;
            EXPECT_EQ(simulate(lists, in, Times{1, 1, 1}, no_time).bubble() / (3 * 2), expected[1]) << p;
        }
}

// Groups do not chain everywhere if p does not divide L; a last group that is not full takes its offsets first.
TEST(Helix, BubblesOfUnevenSizes) {
    const Times times{1, 2, 1};
    for (const auto& [groups, units] : std::map<int, double>{{1, 2}, {2, 3.5}, {4, 6.5}, {8, 12.5}}) {
        const ScheduleInput in{4, 5, 4 * groups, 1};
        EXPECT_EQ(simulate(lists_of("helix", in), in, times, no_time).bubble() / (3 * 2), units);
    }
    const ScheduleInput in{4, 8, 4, 2};
    EXPECT_EQ(simulate(lists_of("helix", in), in, Times{1, 4, 1}, no_time).makespan, 162);
}

// Largest number of chunks that a rank has begun and not ended: from its first forward to its last backward or W.
std::vector<int> chunks_alive(const OpLists& lists) {
    std::vector<int> most;
    for (const std::vector<Op>& list : lists) {
        std::map<int, int> left;  // ops of each chunk
        for (const Op& op : list)
            if (op.kind == Kind::compute) ++left[op.chunk];
        std::map<int, int> alive;
        most.push_back(0);
        for (const Op& op : list) {
            if (op.kind != Kind::compute) continue;
            alive[op.chunk] = --left[op.chunk];
            if (left[op.chunk] == 0) alive.erase(op.chunk);
            most.back() = std::max(most.back(), int(alive.size()));
        }
    }
    return most;
}

TEST(Schedules, ChunksAlive) {
    const ScheduleInput in{4, 8, 16};
    EXPECT_EQ(chunks_alive(lists_of("gpipe", in)), (std::vector<int>{16, 16, 16, 16}));
    EXPECT_EQ(chunks_alive(lists_of("1f1b", in)), (std::vector<int>{4, 3, 2, 1}));
    EXPECT_EQ(chunks_alive(lists_of("zb-h1", in)), (std::vector<int>{4, 4, 4, 4}));
    EXPECT_EQ(chunks_alive(lists_of("zb-h2", in)), (std::vector<int>{7, 7, 7, 7}));
}

// Slices of a sequence: forward in order, backward in reverse, and of the next sequence as many alive as make up for
// the slices that are gone.
TEST(Schedules, Seq1f1bTakesSlicesInOrder) {
    ScheduleInput in{3, 3, 8};
    in.slices = 4;
    const OpLists lists = lists_of("seq1f1b", in);
    for (size_t r = 0; r < lists.size(); ++r) {
        std::string order;
        for (const Op& op : lists[r])
            if (op.part == Part::attention && op.kind == Kind::compute)
                order += (op.pass == Pass::F ? " F" : " B") + std::to_string(op.chunk);
        const std::array expected = {" F0 F1 F2 F3 F4 F5 B3 F6 B2 F7 B1 B0 B7 B6 B5 B4",
                                     " F0 F1 F2 F3 F4 B3 F5 B2 F6 B1 F7 B0 B7 B6 B5 B4",
                                     " F0 F1 F2 F3 B3 F4 B2 F5 B1 F6 B0 F7 B7 B6 B5 B4"};
        EXPECT_EQ(order, expected[r]);
    }
    EXPECT_EQ(chunks_alive(lists), (std::vector<int>{6, 5, 4}));
}

// A round is a step of so many chunks, and none of its chunks is alive in the next.
TEST(Helix, Rounds) {
    for (const auto& [p, L, m, F, round] : std::vector<std::array<int, 5>>{
             {4, 8, 16, 2, 8}, {4, 4, 12, 1, 4}, {3, 4, 10, 2, 4}, {2, 5, 7, 1, 3}, {4, 8, 6, 2, 1}, {4, 8, 6, 2, 9}})
        for (const bool spread : {false, true}) {
            const ScheduleInput in{p, L, m, F, 1, true, spread, false, round};
            const OpLists lists = lists_of("helix", in);
            for (int rank = 0; rank < p; ++rank) {
                OpLists alone(1), together(1);  // computed
                for (int first = 0; first < m; first += round) {
                    ScheduleInput step = in;
                    step.chunks = std::min(round, m - first), step.round_chunks = 0;
                    const OpLists of_step = lists_of("helix", step);
                    for (Op op : of_step[size_t(rank)])
                        if (op.kind == Kind::compute) op.chunk += first, alone[0].push_back(op);
                }
                for (const Op& op : lists[size_t(rank)])
                    if (op.kind == Kind::compute) together[0].push_back(op);
                EXPECT_EQ(print_list(together[0], in), print_list(alone[0], in)) << describe("helix", in);
            }
            for (int alive : chunks_alive(lists)) EXPECT_LE(alive, round) << describe("helix", in);
        }
}

TEST(Schedules, Refusals) {
    const auto refused = [](const std::string& name, const ScheduleInput& in) {
        return refusal(*find_schedule(name), in);
    };
    EXPECT_EQ(find_schedule("fifo"), nullptr);
    EXPECT_EQ(refused("helix", {4, 3, 2, 2}), "");
    EXPECT_NE(refused("helix", {4, 3, 2, 0}), "");
    EXPECT_NE(refused("1f1b", {4, 3, 2, 2, 2}).find("--schedule interleaved"), std::string::npos);
    ScheduleInput sliced{4, 4, 4};
    sliced.sliced = true;
    EXPECT_EQ(refused("gpipe", sliced), "");
    EXPECT_NE(refused("zb-h1", sliced).find("--schedule gpipe"), std::string::npos);
    EXPECT_NE(refused("seq1f1b", sliced).find("--schedule gpipe"), std::string::npos);
    sliced.slices = 2;
    EXPECT_EQ(refused("seq1f1b", sliced), "");
    sliced.slices = 1;
    sliced.ranks = 1;
    EXPECT_EQ(refused("zb-h1", sliced), "");
}

// Links by hand: rank 0 owes ranks 1 and 2 a message each, rank 1 owes rank 2 one. All are ready at time 1 and take 5.
TEST(Simulate, MessagesShareLinks) {
    const ScheduleInput in{.ranks = 3, .layers = 1, .chunks = 3, .training = false};
    const auto op = [](Part part, int chunk, Kind kind = Kind::compute, int peer = -1) {
        return Op{part, Pass::F, part == Part::embed ? -1 : 0,  chunk, false,
                  kind, peer,    kind == Kind::compute ? -1 : 0};
    };
    const OpLists lists = {
        {op(Part::embed, 0), op(Part::embed, 1), op(Part::embed, 0, Kind::send, 1), op(Part::embed, 1, Kind::send, 2)},
        {op(Part::embed, 2), op(Part::embed, 0, Kind::receive, 0), op(Part::embed, 2, Kind::send, 2), op(Part::pre, 0)},
        {op(Part::embed, 1, Kind::receive, 0), op(Part::embed, 2, Kind::receive, 1), op(Part::pre, 1),
         op(Part::pre, 2)}};
    const auto compute = [](const Op& op) { return op.part == Part::pre ? 2 : op.chunk == 2 ? 1 : 0.5; };
    const auto message = [](const Op&, int) { return 5.0; };
    const Timeline t = simulate(lists, in, compute, message);
    // First that of the lowest sender to the lowest receiver; rank 1's link out and rank 2's link in are free
    // meanwhile.
    EXPECT_EQ(t.spans[0][2].start, 1);
    EXPECT_EQ(t.spans[1][2].start, 1);
    EXPECT_EQ(t.spans[0][3].start, 6);
    EXPECT_EQ(t.spans[0][3].end, 11);
    EXPECT_EQ(t.spans[1][3].start, 6);
    EXPECT_EQ(t.spans[2][2].start, 11);
    EXPECT_EQ(t.makespan, 15);
    const BruteForce second = brute_force(lists, in.layers, compute, message);
    EXPECT_EQ(second.makespan, t.makespan);
    EXPECT_EQ(second.start[2], (std::vector<double>{0, 0, 11, 13}));
}

}  // namespace
