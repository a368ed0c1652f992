// Pictures, traces and costs of plans: that boxes, letters and JSON show every op once and where it ran.
#include <gtest/gtest.h>

#include <regex>

#include "llmc/pipeline/costs.h"
#include "llmc/pipeline/schedules/schedules.h"
#include "llmc/pipeline/trace.h"

namespace {

struct Simulated {
    std::string name;
    OpLists lists;
    Timeline timeline;
    Picture picture;
};

Simulated simulated(const std::string& name, const ScheduleInput& in, double message_time) {
    OpLists lists = find_schedule(name)->lists(in);
    const OpTimes times{{1, 6, 3}, {.layers = in.layers}};
    Timeline timeline = simulate(lists, in, times, [&](const Op&, int) { return message_time; });
    Picture picture{name, planned_events(lists, timeline, [](const Op&) { return 8; })};
    return {name, std::move(lists), std::move(timeline), std::move(picture)};
}

// All schedules, from 2 ranks to 16, with more ops than the picture has pixels, with messages that take time.
std::vector<Simulated> examples() {
    std::vector<Simulated> all;
    for (const Schedule& schedule : schedules())
        for (const ScheduleInput& in : {ScheduleInput{2, 3, 1}, ScheduleInput{4, 8, 8}, ScheduleInput{16, 32, 64}}) {
            ScheduleInput mine = in;
            mine.virtual_stages = schedule.name == "interleaved" ? 2 : 1;
            all.push_back(simulated(schedule.name, mine, in.ranks == 4 ? 0.5 : 0));
        }
    return all;
}

// Opening and closing tags match, attributes are quoted, no stray & or <.
bool well_formed(const std::string& xml) {
    static const std::regex tag(R"(^<(/?)([a-z]+)((?: [a-zA-Z]+="[^"<&]*")*)(/?)>)");
    std::vector<std::string> open;
    for (size_t at = 0; at < xml.size();) {
        if (xml[at] == '&' &&
            !std::regex_search(xml.begin() + long(at), xml.begin() + long(std::min(at + 8, xml.size())),
                               std::regex("^&(amp|lt|gt|quot);")))
            return false;
        if (xml[at] != '<') {
            ++at;
            continue;
        }
        std::smatch match;
        const std::string text = xml.substr(at, 400);
        if (!std::regex_search(text, match, tag)) return false;
        if (match[1].length()) {
            if (open.empty() || open.back() != match[2]) return false;
            open.pop_back();
        } else if (!match[4].length()) {
            if (open.empty() && at > 0) return false;  // a second root
            open.push_back(match[2]);
        }
        at += size_t(match.length());
    }
    return open.empty();
}

TEST(Boxes, HoldWhatRanksCompute) {
    for (const Simulated& s : examples())
        for (size_t r = 0; r < s.lists.size(); ++r) {
            double busy = 0, end = 0;
            int boxes_of_last = -1;
            for (const Box& box : boxes_of(s.picture.ranks[r], 0)) {
                ASSERT_FALSE(box.pieces.empty());
                EXPECT_TRUE(box.chunk != boxes_of_last || box.pieces[0].start > end || box.pass != Pass::F)
                    << s.name << ": two forward boxes of a chunk side by side";
                for (const Box::Piece& piece : box.pieces) {
                    EXPECT_GE(piece.start, end) << s.name << " rank " << r;
                    EXPECT_GT(piece.end, piece.start);
                    busy += piece.end - piece.start;
                    end = piece.end;
                }
                boxes_of_last = box.chunk;
            }
            EXPECT_NEAR(busy, s.timeline.busy[r], 1e-9 * s.timeline.makespan) << s.name << " rank " << r;
        }
}

TEST(Boxes, ToleratePausesOfAClock) {
    const auto event = [](Part part, int chunk, double start, double end) {
        return TraceEvent{EventKind::compute, {part, Pass::F, 0, chunk}, start, end};
    };
    const std::vector<TraceEvent> events = {event(Part::pre, 0, 0, 1), event(Part::attention, 0, 1.01, 3),
                                            event(Part::post, 0, 3.5, 5), event(Part::pre, 1, 5, 6)};
    const std::vector<Box> boxes = boxes_of(events, 0.1);
    ASSERT_EQ(boxes.size(), 3u);  // a break within chunk 0, and another chunk
    EXPECT_EQ(boxes[0].pieces.size(), 2u);
    EXPECT_EQ(boxes[2].chunk, 1);
}

// Rectangles of a row do not overlap, and their widths are the rank's time.
TEST(Svg, RowsShowTheTimes) {
    const std::regex row("class=\"rank\""), box("<path class=\"[PApaw][01]\" d=\"M([0-9.]+) [0-9.]+h([0-9.]+)v");
    for (const Simulated& s : examples()) {
        const std::string svg = svg_picture(s.picture);
        EXPECT_TRUE(well_formed(svg)) << s.name;
        EXPECT_NE(svg.find(format("bubble %.1f %%", 100 * s.timeline.mean_bubble() / s.timeline.makespan)),
                  std::string::npos);
        size_t rank = 0;
        for (std::sregex_iterator at(svg.begin(), svg.end(), row), none; at != none; ++at, ++rank) {
            const size_t begin = size_t(at->position()), end = svg.find("class=\"rank\"", begin + 1);
            std::string part = svg.substr(begin, end - begin);
            part.erase(part.rfind("</g>"));  // what follows is no box
            double x = 0, busy = 0;
            for (std::sregex_iterator b(part.begin(), part.end(), box); b != none; ++b) {
                EXPECT_GE(std::stod((*b)[1]), x - 0.01) << s.name << " rank " << rank;
                x = std::stod((*b)[1]) + std::stod((*b)[2]);
                busy += std::stod((*b)[2]);
            }
            EXPECT_NEAR(busy, 920 * s.timeline.busy[rank] / s.timeline.makespan, 0.05 * double(s.lists[rank].size()))
                << s.name << " rank " << rank;
        }
        EXPECT_EQ(rank, s.lists.size());
    }
    Picture odd{"<a> & \"b\"", {{}, {}}};  // nothing ran
    EXPECT_TRUE(well_formed(svg_picture(odd)));
    EXPECT_FALSE(well_formed("<svg><a></svg>"));
}

TEST(Terminal, ColorsAddNothingToRead) {
    for (const Simulated& s : examples()) {
        const std::string plain = terminal_picture(s.picture, false);
        const std::string colored =
            std::regex_replace(terminal_picture(s.picture, true), std::regex("\033\\[[0-9;]*m"), "");
        EXPECT_EQ(plain, colored);
        size_t lines = 0, rank = 0;
        std::istringstream text(plain);
        for (std::string line; std::getline(text, line); ++lines) {
            EXPECT_TRUE(lines == 0 || line.size() <= 100) << s.name;
            if (!line.starts_with("rank ")) continue;
            const auto idle = std::count(line.begin() + 9, line.end(), '.');
            EXPECT_NEAR(double(idle), 91 * (1 - s.timeline.busy[rank] / s.timeline.makespan),
                        s.lists.size() < 16 ? 8 : 20)
                << s.name << " rank " << rank;
            ++rank;
        }
        EXPECT_EQ(rank, s.lists.size());
        EXPECT_LE(lines, 2 * rank + 3);
    }
}

TEST(Trace, EventsSurviveTheJourney) {
    TraceRecorder recorder(1);
    recorder.record(EventKind::compute, {Part::attention, Pass::B, 3, 5}, 0.001, 0.0035);
    recorder.record(EventKind::wait, {Part::pre, Pass::F, 3, 5, false, Kind::receive, 2, 7}, 0.0035, 0.004, 4096);
    const std::vector<TraceEvent> events = unpack_events(pack_events(recorder.events()));
    ASSERT_EQ(events.size(), 2u);
    EXPECT_TRUE(unpack_events("").empty());

    const nlohmann::json trace = parse_json(trace_json({{}, events}), "trace");
    const nlohmann::json expected = parse_json(R"([
        {"ph": "X", "pid": 1, "tid": 0, "ts": 1000.0, "dur": 2500.0, "cat": "compute",
         "name": "attention backward layer 3 chunk 5",
         "args": {"kind": "compute", "op": "attention", "pass": "B", "layer": 3, "chunk": 5, "start_ms": 1.0, "end_ms": 3.5}},
        {"ph": "X", "pid": 1, "tid": 0, "ts": 3500.0, "dur": 500.0, "cat": "wait",
         "name": "wait for receive of X layer 3 chunk 5 from rank 2",
         "args": {"kind": "wait", "op": "X", "pass": "F", "layer": 3, "chunk": 5, "peer": 2, "batch": 7, "bytes": 4096,
                  "start_ms": 3.5, "end_ms": 4.0}}])",
                                               "expected");
    std::vector<nlohmann::json> found;
    for (const nlohmann::json& event : trace["traceEvents"])
        if (event["ph"] == "X") found.push_back(event);
    ASSERT_EQ(found.size(), 2u);
    for (size_t i : {0u, 1u})
        for (const auto& [key, value] : expected[i].items()) {
            if (value.is_number_float()) EXPECT_NEAR(found[i][key].get<double>(), value.get<double>(), 1e-6);
            else if (key != "args") EXPECT_EQ(found[i][key], value);
            else
                for (const auto& [argument, wanted] : value.items())
                    if (wanted.is_number_float())
                        EXPECT_NEAR(found[i][key][argument].get<double>(), wanted.get<double>(), 1e-6) << argument;
                    else EXPECT_EQ(found[i][key][argument], wanted) << argument;
        }
}

// Viewers want the events of a thread one after another.
TEST(Trace, ThreadsDoNotOverlap) {
    for (const Simulated& s : examples()) {
        if (s.lists.size() == 16) continue;
        std::map<std::pair<int, int>, double> ends;
        size_t shown = 0, ops = 0;
        for (const std::vector<Op>& list : s.lists) ops += list.size();
        const nlohmann::json trace = parse_json(trace_json(s.picture.ranks), "trace");
        for (const nlohmann::json& event : trace["traceEvents"]) {
            if (event["ph"] != "X") continue;
            double& end = ends[{event["pid"], event["tid"]}];
            EXPECT_GE(event["ts"].get<double>(), end - 1e-6) << s.name;
            end = event["ts"].get<double>() + event["dur"].get<double>();
            ++shown;
        }
        EXPECT_EQ(shown, ops);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

double total(const OpCosts& times, const OpLists& lists) {
    double sum = 0;
    for (const std::vector<Op>& list : lists)
        for (const Op& op : list)
            if (op.kind == Kind::compute) sum += times(op);
    return sum;
}

// Times are FLOPs at this rate.
const Cluster one_flop_a_ms = cluster_of_rate(1e-6);

// Without recomputation the ops of a step add up to the arithmetic of the model, wherever the products for queries,
// keys and values run, whether a backward is split, and whether a sequence is cut; attention takes five products
// backward where the model has four. Recomputing adds what is needed of the forward, products to all modes but
// `elementwise`.
TEST(Costs, AddUpToTheModel) {
    const GptConfig g{.layers = 6, .channels = 64, .heads = 4, .context = 96, .vocab = 100, .padded_vocab = 128};
    const int m = 4, L = 6;
    const double linear = double(g.channels * g.channels), tokens = 96.0 * m;
    const double attention = m * attention_flops(g, 0, 96) / 3;
    const double step = tokens * matmul_flops_per_token(g) + 3.5 * attention;
    const std::vector<ChunkShape> whole(m, ChunkShape{96});
    const auto costs = [&](const std::vector<ChunkShape>& chunks, const TensorRules& rules) {
        return OpCosts(one_flop_a_ms, sizes_of<BuildTypes>(), g, chunks, rules);
    };
    const HelixOptions neither{false, false, false, false};
    const std::vector<std::pair<std::string, HelixOptions>> cases = {{"1f1b", neither},
                                                                     {"zb-h1", neither},
                                                                     {"helix", neither},
                                                                     {"helix", HelixOptions::published()},
                                                                     {"helix", {true, true, true, false}},
                                                                     {"helix", {}}};
    for (const auto& [name, variant] : cases) {
        const bool helix = name == "helix";
        ScheduleInput in{3, L, m};
        in.spread_head = variant.spread_head;
        const OpLists lists = find_schedule(name)->lists(in);
        const auto expect_cost = [&](Recompute recompute, double expected) {
            EXPECT_NEAR(total(costs(whole, {L, true, recompute, helix, variant}), lists), expected, 1e-9 * step)
                << name << variant.move_qkv << variant.move_norm << variant.spread_head << " recompute "
                << recompute_names[int(recompute)];
        };
        // A spread post recomputes nothing. The second product of the MLP is needed again for the pre_attention of the
        // same block alone.
        const double hidden = tokens * (L - variant.spread_head) * 10 * linear, qkv = tokens * L * 6 * linear;
        const double second = tokens * 8 * linear * (helix && !variant.move_norm ? L - 1 : 0);
        const double again = hidden + second + (helix && !variant.move_qkv ? 0 : qkv);
        expect_cost(Recompute::none, step);
        expect_cost(Recompute::without_attention, step + again);
        expect_cost(Recompute::full, step + again + attention);
        if (!helix || variant.move_norm) expect_cost(Recompute::elementwise, step);
    }

    // HelixPipe with all its options: nothing is computed twice, or left out.
    const OpLists lists = find_schedule("helix")->lists({.ranks = 3, .layers = L, .chunks = m, .spread_head = true});
    const TensorRules rules{L, true, Recompute::none, true, {true, true, true, true}};
    EXPECT_NEAR(total(costs(whole, rules), lists), step, 1e-9 * step);

    // Two sequences of 96 tokens, each in slices of 40, 40 and 16.
    std::vector<ChunkShape> sliced;
    for (int first : {0, 3})
        for (int i : {0, 1, 2}) sliced.push_back({40, first, 96, i == 0, i == 2, 40 * i});
    EXPECT_NEAR(total(costs(sliced, {.layers = L}), find_schedule("gpipe")->lists({2, L, 6})), step / 2, 1e-9 * step);

    // Slices of equal work, longer than even ones where they have few keys to see.
    const std::vector<ChunkShape> balanced = balanced_slices(g, 2, 4);
    ScheduleInput in{2, L, 8};
    in.slices = 4;
    EXPECT_NEAR(total(costs(balanced, {.layers = L}), find_schedule("seq1f1b")->lists(in)), step / 2, 1e-9 * step);
    EXPECT_GT(balanced[0].tokens, balanced[3].tokens);
    const auto work = [&](size_t c) {
        return double(balanced[c].tokens) * 72 * linear + 3.5 * chunk_work(g, balanced, c).attention;
    };
    for (size_t c : {1, 2, 3}) EXPECT_NEAR(work(c) / work(0), 1, 0.08) << c;  // 24 tokens a slice: one makes 4 %

    // A chunk of several sequences, and of less than one.
    EXPECT_DOUBLE_EQ(costs({{200}}, {.layers = L})({Part::attention, Pass::F, 0, 0}),
                     (2 * attention_flops(g, 0, 96) + attention_flops(g, 0, 8)) / 18);
}

// Each rate counts where it should, efficiency divides it, a tensor-parallel group divides the work and gathers.
TEST(Costs, FollowTheCluster) {
    const int64_t N = 1000, C = 64;
    const GptConfig g{.layers = 4, .channels = C, .heads = 4, .context = N, .vocab = 100, .padded_vocab = 128};
    const std::vector<ChunkShape> chunks(2, ChunkShape{N});
    const auto ms = [&](const Cluster& c, const Op& op, const TensorRules& rules = {.layers = 4}) {
        return OpCosts(c, element_sizes("bf16"), g, chunks, rules)(op);
    };
    Cluster c = cluster_of_rate(1e3);
    const double qkv = 6.0 * N * C * C / 1e9, attention = 2.0 * N * N * C / 1e9;
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}), qkv);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::F, 0, 0}), attention);
    c.matrix_tflops = 2, c.attention_forward_tflops = 4, c.attention_backward_tflops = 5;
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}), qkv / 2);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::F, 0, 0}), attention / 4);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::B, 0, 0}), 2.5 * attention / 5);
    c.matrix_efficiency = {{100, 10000}, {0.25, 0.75}};
    c.attention_efficiency = {{1}, {0.1}}, c.attention_backward_efficiency = {{1}, {0.2}};
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}), qkv / 2 / 0.5);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::F, 0, 0}), attention / 4 / 0.1);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::B, 0, 0}), 2.5 * attention / 5 / 0.2);

    c = cluster_of_rate(1e3);
    c.memory_bandwidth = 1;  // LayerNorm reads a row of the residual stream and writes one
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}), qkv + 4.0 * N * C / 1e6);
    const TensorRules moved{4, true, Recompute::none, true, HelixOptions::published()};
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}, moved), 4.0 * N * C / 1e6);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::F, 0, 0}, moved), qkv + attention);

    c = cluster_of_rate(1e3);
    c.tp = 4, c.inside = {10, 7};  // ring of four: three steps, three quarters of [N, C]
    const double gather = 3 * 7e-3 + 0.75 * 2.0 * N * C / 1e7;
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::F, 0, 0}), qkv / 4 + gather);
    EXPECT_DOUBLE_EQ(ms(c, {Part::pre, Pass::B, 0, 0}), 2 * qkv / 4 + 2 * gather);
    EXPECT_DOUBLE_EQ(ms(c, {Part::post, Pass::F, 0, 0}), 3 * qkv / 4 + 3 * gather);
    EXPECT_DOUBLE_EQ(ms(c, {Part::post, Pass::B, 0, 0}), 6 * qkv / 4 + 4 * gather);
    EXPECT_DOUBLE_EQ(ms(c, {Part::attention, Pass::B, 0, 0}), 2.5 * attention / 4);
}

// Messages have the elements of the cluster, not of this build; each device sends its share over its own link.
TEST(Costs, Messages) {
    const int64_t N = 1024, C = 64;
    const GptConfig g{.layers = 4, .channels = C, .heads = 4, .context = N, .vocab = 100, .padded_vocab = 128};
    Cluster c = cluster_of_rate(1);
    c.tp = 2, c.devices = 16, c.devices_per_node = 8, c.inside = {100, 1}, c.between = {10, 5};
    const TensorRules moved{4, true, Recompute::none, true, HelixOptions::published()};
    const OpCosts costs(c, element_sizes("bf16"), g, {{N}}, moved);
    Op x{Part::pre, Pass::F, 1, 0, false, Kind::send, 3};
    const Op dx{Part::attention, Pass::B, 1, 0, false, Kind::send, 3};
    const int64_t rows = 2 * N * C, weights = 3 * C * C + 3 * C + 2 * C;  // and of the LayerNorm
    EXPECT_EQ(costs.message_bytes(x), 2 * rows + 2 * weights);
    EXPECT_EQ(costs.message_bytes(dx), 2 * rows + 4 * weights);
    EXPECT_DOUBLE_EQ(costs.message_ms(x, 0), 1e-3 + double(2 * rows + 2 * weights) / 2 / 1e8);
    x.peer = 4;  // in the other node
    EXPECT_DOUBLE_EQ(costs.message_ms(x, 0), 5e-3 + double(2 * rows + 2 * weights) / 2 / 1e7);
    EXPECT_EQ(OpCosts(c, element_sizes("fp32"), g, {{N}}, moved).message_bytes(x), 4 * rows + 4 * weights);
}

TEST(Costs, GivenTimes) {
    const auto op = [](Part part, Pass pass, bool split = false) { return Op{part, pass, 1, 0, split}; };
    const OpTimes times{{1, 6, 3}, {.layers = 2}};
    EXPECT_EQ(times(op(Part::pre, Pass::F)), 1);
    EXPECT_EQ(times(op(Part::pre, Pass::B)), 2);
    EXPECT_EQ(times(op(Part::pre, Pass::B, true)) + times(op(Part::pre, Pass::W)), 2);
    EXPECT_EQ(times(op(Part::post, Pass::B, true)), 3);
    EXPECT_EQ(times(op(Part::attention, Pass::B)), 12);
    EXPECT_EQ(times({Part::head, Pass::B, -1, 0}) + times({Part::embed, Pass::B, -1, 0}), 0);

    const OpTimes elementwise{{1, 6, 3}, {.layers = 2, .recompute = Recompute::elementwise}};  // no product again
    const OpTimes again{{1, 6, 3}, {.layers = 2, .recompute = Recompute::without_attention}};
    Op post = op(Part::post, Pass::B), attention = op(Part::attention, Pass::B);
    EXPECT_EQ(elementwise(post) + elementwise(attention), 6 + 12);
    EXPECT_EQ(again(post) + again(attention), 6 + 3 + 12 + 1);
    post.keeps = attention.keeps = true;
    EXPECT_EQ(again(post) + again(attention), 6 + 12);
}

}  // namespace
