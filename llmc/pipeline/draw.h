// Pictures of a step: one row a rank, time from left to right; as SVG, and in letters and colors for a terminal. Both
// show events, which come from simulate.h (`plan --draw`) or from a clock (`train --trace`).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "llmc/pipeline/event.h"

struct Picture {
    std::string title;
    std::vector<std::vector<TraceEvent>> ranks;  // [rank], compute events in the order in which they ran
};

// ---------------------------------------------------------------------------------------------------------------------
// What both pictures show.

// How an op is drawn.
enum class Look { forward, attention, backward, attention_backward, weights };
inline constexpr int look_count = 5;

struct LookStyle {
    const char* name;
    char letter;                       // capital forward, small backward
    std::array<const char*, 2> fills;  // of even and odd chunks, or folds
    const char* ink;
    std::array<int, 2> terminal_fills;  // in the palette of 256 colors
    int terminal_ink;
};

inline const LookStyle& style_of(Look look) {
    static const LookStyle styles[look_count] = {
        {"blocks", 'P', {"#a9cdf5", "#8fbcee"}, "#10243e", {153, 111}, 16},
        {"attention", 'A', {"#3f7fc8", "#336db1"}, "#ffffff", {32, 26}, 231},
        {"blocks backward", 'p', {"#fbd39b", "#f5c27a"}, "#402400", {222, 215}, 16},
        {"attention backward", 'a', {"#d3741f", "#bd6517"}, "#ffffff", {166, 130}, 231},
        {"weight gradients", 'w', {"#a6d5a2", "#8bc587"}, "#10301a", {151, 114}, 16},
    };
    return styles[int(look)];
}

inline Look look_of(const Op& op) {
    if (op.pass == Pass::W) return Look::weights;
    if (op.part == Part::attention) return op.pass == Pass::F ? Look::attention : Look::attention_backward;
    return op.pass == Pass::F ? Look::forward : Look::backward;
}

// Ops that a rank runs without a break on one chunk in one pass; a piece is those of one look.
struct Box {
    int chunk;
    Pass pass;
    struct Piece {
        Look look;
        double start, end;
    };
    std::vector<Piece> pieces;
};

// The boxes of a rank. Gaps of up to `gap` are no break: a clock leaves some between any two ops.
inline std::vector<Box> boxes_of(const std::vector<TraceEvent>& events, double gap) {
    std::vector<Box> boxes;
    for (const TraceEvent& event : events) {
        if (event.kind != EventKind::compute || event.end <= event.start) continue;
        const auto joins = [&](double end) { return event.start <= end + gap; };
        if (boxes.empty() || boxes.back().chunk != event.op.chunk || boxes.back().pass != event.op.pass ||
            !joins(boxes.back().pieces.back().end))
            boxes.push_back({event.op.chunk, event.op.pass, {}});
        std::vector<Box::Piece>& pieces = boxes.back().pieces;
        if (const Look look = look_of(event.op); pieces.empty() || pieces.back().look != look)
            pieces.push_back({look, event.start, event.end});
        else pieces.back().end = event.end;
    }
    return boxes;
}

struct TimeAxis {
    double start = 0, end = 0;  // ms
    double bubble = 0;          // part of the time in which ranks do not compute
    double step = 1;            // between two ticks, which are at whole multiples of it
    double unit = 1;            // ms
    const char* unit_name = "ms";

    explicit TimeAxis(const Picture& picture, int ticks = 10) {
        double busy = 0;
        bool first = true;
        for (const std::vector<TraceEvent>& events : picture.ranks)
            for (const TraceEvent& event : events) {
                start = first ? event.start : std::min(start, event.start);
                end = first ? event.end : std::max(end, event.end);
                if (event.kind == EventKind::compute) busy += event.end - event.start;
                first = false;
            }
        end = std::max(end, start + 1e-6);
        bubble = std::max(0.0, 1 - busy / (end - start) / double(std::max<size_t>(1, picture.ranks.size())));
        const double least = (end - start) / ticks;
        step = std::pow(10, std::floor(std::log10(least)));
        for (double factor : {2.0, 2.5, 2.0})  // 1, 2, 5, 10 times a power of ten
            if (step < least * 0.999) step *= factor;
        if (end - start < 1) unit = 1e-3, unit_name = "µs";
        if (end - start >= 10000) unit = 1e3, unit_name = "s";
    }

    std::vector<double> ticks() const {
        std::vector<double> times;
        for (double n = std::ceil(start / step - 1e-6); n * step <= end + 1e-6 * step; ++n)
            times.push_back(n * step + 0.0);  // no -0
        return times;
    }
};

inline std::string headline(const Picture& picture, const TimeAxis& axis) {
    return picture.title +
           format(": %.4g %s, bubble %.1f %%", (axis.end - axis.start) / axis.unit, axis.unit_name, 100 * axis.bubble);
}

// ---------------------------------------------------------------------------------------------------------------------
// SVG. The background is left to the page; grays and fills can be read on white and on black.

inline std::string xml_text(const std::string& text) {
    std::string escaped;
    for (char c : text) {
        if (c == '&') escaped += "&amp;";
        else if (c == '<') escaped += "&lt;";
        else if (c == '>') escaped += "&gt;";
        else if (c == '"') escaped += "&quot;";
        else escaped += c;
    }
    return escaped;
}

// The classes of what is drawn: `P0` fills the boxes of even chunks, `P1` of odd ones, `P` is the ink of their numbers.
inline std::string svg_style() {
    std::string style =
        "<style>\ntext{font:12px system-ui,sans-serif;fill:#7d8590}\n.title{font-size:15px;font-weight:600}\n"
        ".rank{text-anchor:end}\n.tick,.chunk{text-anchor:middle}\n.chunk{font-size:11px}\n"
        ".grid{stroke:#7d8590;stroke-opacity:.35}\n.idle{fill:#7d8590;fill-opacity:.14}\n.wait{fill:#d1242f}\n"
        ".send{fill:#8250df}\n.receive{fill:#1f9d8a}\n";
    for (int n = 0; n < look_count; ++n) {
        const LookStyle& look = style_of(Look(n));
        style += format(".%c0{fill:%s}.%c1{fill:%s}.%c{fill:%s}\n", look.letter, look.fills[0], look.letter,
                        look.fills[1], look.letter, look.ink);
    }
    return style + "</style>\n";
}

inline std::string svg_text(const std::string& kind, double x, double y, const std::string& content) {
    return format("<text class=\"%s\" x=\"%.1f\" y=\"%.1f\">", kind.c_str(), x, y) + xml_text(content) + "</text>\n";
}

// Nothing where it is too thin to be seen.
inline std::string svg_rectangle(const std::string& kind, double x0, double x1, double y, double height) {
    const double a = std::round(x0 * 10) / 10, b = std::round(x1 * 10) / 10;
    if (b <= a) return "";
    return format("<path class=\"%s\" d=\"M%.1f %.1fh%.1fv%.1fh%.1fz\"/>\n", kind.c_str(), a, y, b - a, height, a - b);
}

inline std::string svg_picture(const Picture& picture) {
    constexpr double left = 62, width = 920, top = 62, pitch = 34, height = 26;  // pixels
    const TimeAxis axis(picture);
    const double scale = width / (axis.end - axis.start), bottom = top + pitch * double(picture.ranks.size());
    const auto x_of = [&](double time) { return left + scale * (time - axis.start); };
    std::set<std::string> seen;  // for the legend

    std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1000\" ";
    svg += format("viewBox=\"0 0 1000 %.0f\">\n", bottom + 42) + svg_style();
    svg += svg_text("title", left, 22, headline(picture, axis));
    for (double time : axis.ticks()) {
        svg += format("<path class=\"grid\" d=\"M%.1f %.1fV%.1f\"/>\n", x_of(time), top, bottom);
        svg += svg_text("tick", x_of(time), bottom + 16, format("%.4g", time / axis.unit));
    }
    svg += svg_text("tick", left + width / 2, bottom + 34, format("time in %s; numbers are chunks", axis.unit_name));

    for (size_t r = 0; r < picture.ranks.size(); ++r) {
        const double y = top + pitch * double(r) + (pitch - height) / 2, middle = y + height / 2;
        svg += svg_text("rank", left - 8, middle + 4, "rank " + std::to_string(r));
        svg += svg_rectangle("idle", left, left + width, y, height);
        for (const Box& box : boxes_of(picture.ranks[r], 0.2 / scale)) {
            static const char* const passes[] = {"forward", "backward", "weight gradients"};
            const std::string chunk = std::to_string(box.chunk);
            const auto length = [](const Box::Piece& piece) { return piece.end - piece.start; };
            const Box::Piece* widest = &box.pieces[0];
            std::string pieces;
            for (const Box::Piece& piece : box.pieces) {
                const std::string look(1, style_of(piece.look).letter);
                seen.insert(look + "0");
                if (length(piece) > length(*widest)) widest = &piece;
                pieces +=
                    svg_rectangle(look + (box.chunk % 2 ? "1" : "0"), x_of(piece.start), x_of(piece.end), y, height);
            }
            if (scale * length(*widest) > 6.5 * double(chunk.size()) + 1)
                pieces += svg_text(format("chunk %c", style_of(widest->look).letter),
                                   x_of((widest->start + widest->end) / 2), middle + 4, chunk);
            if (pieces.empty()) continue;
            svg += format("<g><title>chunk %d %s: %.4g to %.4g %s</title>\n", box.chunk, passes[int(box.pass)],
                          box.pieces.front().start / axis.unit, box.pieces.back().end / axis.unit, axis.unit_name);
            svg += pieces + "</g>\n";
        }
        // Thin lines: sends above the boxes, receives below, waits between them. Where several overlap, they are one.
        const auto marks = [&](EventKind kind, const std::string& name, double mark_y) {
            double drawn = left;
            for (const TraceEvent& event : picture.ranks[r]) {
                if (event.kind != kind) continue;
                const std::string mark =
                    svg_rectangle(name, std::max(x_of(event.start), drawn), x_of(event.end), mark_y, 2);
                if (mark.empty()) continue;
                svg += mark;
                drawn = x_of(event.end);
                seen.insert(name);
            }
        };
        marks(EventKind::send, "send", y - 2.5);
        marks(EventKind::receive, "receive", y + height + 0.5);
        marks(EventKind::wait, "wait", middle - 1);
    }

    double x = left;
    const auto legend = [&](const std::string& kind, double mark_height, const std::string& name) {
        svg += svg_rectangle(kind, x, x + 16, 44 - mark_height / 2, mark_height) + svg_text("legend", x + 21, 48, name);
        x += 40 + 6.3 * double(name.size());
    };
    for (int n = 0; n < look_count; ++n)
        if (const std::string kind = {style_of(Look(n)).letter, '0'}; seen.count(kind))
            legend(kind, 11, style_of(Look(n)).name);
    for (const char* name : {"send", "receive", "wait"})
        if (seen.count(name)) legend(name, 2, name);
    legend("idle", 11, "idle");
    return svg + "</svg>\n";
}

// ---------------------------------------------------------------------------------------------------------------------
// Terminal. Two lines a rank: letters tell what runs, so that colors are not needed, and the numbers under them on
// which chunk. A column shows what takes most of its time.

inline std::string terminal_picture(const Picture& picture, bool color, int columns = 100) {
    const TimeAxis axis(picture, 6);
    const size_t margin = 9, cells = size_t(columns) - margin;
    const double cell_time = (axis.end - axis.start) / double(cells);
    const auto paint = [&](const std::string& text, Look look, int chunk) {
        const LookStyle& style = style_of(look);
        return color ? format("\033[48;5;%d;38;5;%dm", style.terminal_fills[size_t(chunk % 2)], style.terminal_ink) +
                           text + "\033[0m"
                     : text;
    };
    const auto pad = [](std::string text, size_t width) {
        text.resize(std::max(width, text.size()), ' ');
        return text;
    };
    std::string out = headline(picture, axis) + "\n";
    for (size_t r = 0; r < picture.ranks.size(); ++r) {
        struct Cell {
            int look = -1, chunk = 0;  // -1: idle
            double most = 0, idle = 1;
        };
        std::vector<Cell> row(cells);
        std::string numbers;
        for (const Box& box : boxes_of(picture.ranks[r], cell_time / 50)) {
            const std::string chunk = std::to_string(box.chunk);
            for (const Box::Piece& piece : box.pieces) {
                const double from = (piece.start - axis.start) / cell_time, to = (piece.end - axis.start) / cell_time;
                for (size_t i = size_t(from); i < cells && double(i) < to; ++i) {
                    const double part = std::min(to, double(i + 1)) - std::max(from, double(i));
                    row[i].idle -= part;
                    if (part <= row[i].most) continue;
                    row[i].most = part;
                    row[i].look = int(piece.look);
                    row[i].chunk = box.chunk;
                }
            }
            const size_t at = size_t(std::lround((box.pieces.front().start - axis.start) / cell_time));
            const size_t end = size_t(std::lround((box.pieces.back().end - axis.start) / cell_time));
            if (at + chunk.size() <= end && at >= numbers.size() + !numbers.empty()) numbers = pad(numbers, at) + chunk;
        }
        out += pad("rank " + std::to_string(r), margin);
        for (size_t i = 0, end; i < cells; i = end) {
            const auto looks = [&](const Cell& c) { return c.idle >= c.most ? -1 : c.look; };
            for (end = i + 1; end < cells && looks(row[end]) == looks(row[i]) && row[end].chunk == row[i].chunk;) ++end;
            if (looks(row[i]) < 0) out += std::string(end - i, '.');
            else
                out += paint(std::string(end - i, style_of(Look(row[i].look)).letter), Look(row[i].look), row[i].chunk);
        }
        out += "\n" + (numbers.empty() ? "" : pad("", margin) + numbers) + "\n";
    }
    std::string ticks;
    for (double time : axis.ticks()) {
        const size_t at = size_t(std::max(0.0, (time - axis.start) / cell_time));
        const std::string tick = format("|%.4g %s", time / axis.unit, axis.unit_name);
        if (at >= ticks.size() + !ticks.empty() && at + tick.size() <= cells) ticks = pad(ticks, at) + tick;
    }
    out += pad("", margin) + ticks + "\n" + pad("", margin);
    for (int n = 0; n < look_count; ++n) {
        const LookStyle& style = style_of(Look(n));
        out += paint(std::string(1, style.letter), Look(n), 0) + " " + style.name + "  ";
    }
    return out + ". idle\n";
}
