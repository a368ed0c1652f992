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
    const OpTimes times{std::vector<PartTimes>(size_t(in.chunks), {1, 6, 3}), 2, {.layers = in.layers}};
    Timeline timeline = simulate(lists, in, times, [&](const Op&) { return message_time; });
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
        EXPECT_NE(svg.find(printed("bubble %.1f %%", 100 * s.timeline.mean_bubble() / s.timeline.makespan)),
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

double total(const OpTimes& times, const OpLists& lists) {
    double sum = 0;
    for (const std::vector<Op>& list : lists)
        for (const Op& op : list)
            if (op.kind == Kind::compute) sum += times(op);
    return sum;
}

// Without recomputation the ops of a step add up to the arithmetic of the model, wherever the products for queries,
// keys and values run, whether a backward is split, and whether a sequence is cut. Recomputing adds its share of the
// forward.
TEST(Costs, AddUpToTheModel) {
    const GptConfig g{.layers = 6, .channels = 64, .heads = 4, .context = 96, .vocab = 100, .padded_vocab = 128};
    const int m = 4;
    const double linear = double(g.channels * g.channels), tokens = 96.0 * m;
    const double step = tokens * matmul_flops_per_token(g) + m * attention_flops(g, 0, 96);
    const double attention = m * attention_flops(g, 0, 96) / 3;
    const std::vector<ChunkShape> whole(m, ChunkShape{96});
    for (const std::string name : {"1f1b", "zb-h1", "helix"})
        for (bool move : {false, true}) {
            const bool helix = name == "helix";
            if (move && !helix) continue;
            const OpLists lists = find_schedule(name)->lists({3, 6, m});
            const auto cost = [&](Recompute recompute) {
                const TensorRules rules{6, true, recompute, helix, move};
                return total({arithmetic_times(g, whole, rules, 1), 2, rules}, lists);
            };
            const double hidden = tokens * 6 * 18 * linear, qkv = tokens * 6 * 6 * linear;
            EXPECT_NEAR(cost(Recompute::none), step, 1e-9 * step) << name;
            const double again = hidden * (name == "zb-h1" ? 2 : 1) + (helix && !move ? 0 : qkv);
            EXPECT_NEAR(cost(Recompute::without_attention), step + again, 1e-9 * step) << name << move;
            EXPECT_NEAR(cost(Recompute::full), step + again + attention, 1e-9 * step) << name << move;
        }

    // Two sequences of 96 tokens, each in slices of 40, 40 and 16.
    std::vector<ChunkShape> sliced;
    for (int first : {0, 3})
        for (int i : {0, 1, 2}) sliced.push_back({40, first, 96, i == 0, i == 2});
    const TensorRules rules{.layers = 6};
    const double half = 2 * 96 * matmul_flops_per_token(g) + 2 * attention_flops(g, 0, 96);
    EXPECT_NEAR(total({arithmetic_times(g, sliced, rules, 1), 2, rules}, find_schedule("gpipe")->lists({2, 6, 6})),
                half, 1e-9 * half);

    // A chunk of several sequences, and of less than one.
    EXPECT_DOUBLE_EQ(arithmetic_times(g, {{200}}, rules, 1)[0].attention,
                     (2 * attention_flops(g, 0, 96) + attention_flops(g, 0, 8)) / 18);
}

TEST(Costs, GivenTimes) {
    const auto op = [](Part part, Pass pass, bool split = false) { return Op{part, pass, 1, 0, split}; };
    const OpTimes times{{{1, 6, 3}}, 2, {.layers = 2}};
    EXPECT_EQ(times(op(Part::pre, Pass::F)), 1);
    EXPECT_EQ(times(op(Part::pre, Pass::B)), 2);
    EXPECT_EQ(times(op(Part::pre, Pass::B, true)) + times(op(Part::pre, Pass::W)), 2);
    EXPECT_EQ(times(op(Part::post, Pass::B, true)), 3);
    EXPECT_EQ(times(op(Part::attention, Pass::B)), 12);
    EXPECT_EQ(times({Part::head, Pass::B, -1, 0}) + times({Part::embed, Pass::B, -1, 0}), 0);
}

}  // namespace
