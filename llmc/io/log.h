// What the console shows: tables at start-up, then a line a step, or in a terminal a progress bar with the same facts,
// rewritten in place. Called by the main programs and the commands.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

// isatty and the width of the terminal
#include <sys/ioctl.h>
#include <unistd.h>

#include "llmc/io/metrics.h"

// "1.42 GiB"
inline std::string bytes_text(int64_t bytes) {
    const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = double(bytes);
    int unit = 0;
    for (; value >= 1000 && unit < 4; ++unit) value /= 1024;
    return format(unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
}

// "45s", "1m32s", "2h05m", "3d04h"
inline std::string duration_text(double seconds) {
    const long long s = std::llround(seconds);
    if (s < 60) return format("%llds", s);
    if (s < 3600) return format("%lldm%02llds", s / 60, s % 60);
    if (s < 86400) return format("%lldh%02lldm", s / 3600, s / 60 % 60);
    return format("%lldd%02lldh", s / 86400, s / 3600 % 24);
}

using TableRow = std::pair<std::string, std::string>;

// A title, and rows of a name and what is to be said about it.
inline std::string table_text(const std::string& title, const std::vector<TableRow>& rows) {
    size_t width = 0;
    for (const TableRow& row : rows) width = std::max(width, row.first.size());
    std::string text = title + "\n";
    for (const auto& [name, value] : rows)
        text += "  " + name + std::string(width + 2 - name.size(), ' ') + value + "\n";
    return text;
}

// Rows of a name and values, the values in columns.
inline std::string columns_text(const std::vector<std::vector<std::string>>& rows) {
    std::vector<size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
    }
    std::string text;
    for (const auto& row : rows) {
        for (size_t i = 0; i < row.size(); ++i) {
            const std::string space(widths[i] - row[i].size(), ' ');
            text += "  " + (i == 0 ? row[i] + space : space + row[i]);
        }
        text += "\n";
    }
    return text;
}

inline void print_table(const std::string& title, const std::vector<TableRow>& rows) {
    std::fputs(table_text(title, rows).c_str(), stdout);
    std::fflush(stdout);
}

// The facts of a step that are known, in the order of the metrics.
inline std::string step_text(const StepRecord& record, int64_t steps, std::optional<double> eta_seconds = {}) {
    const std::string total = std::to_string(steps);
    std::string text = format("step %*lld/", int(total.size()), (long long)record.step) + total;
    if (record.loss) text += format(" | loss %.4f", *record.loss);
    if (record.val_loss) text += format(" | val loss %.4f", *record.val_loss);
    if (record.grad_norm) text += format(" | norm %.2f", *record.grad_norm);
    if (record.lr) text += format(" | lr %.1e", *record.lr);
    if (record.ms) text += format(*record.ms < 10 ? " | %.1f ms" : " | %.0f ms", *record.ms);
    if (record.tokens_per_second) text += format(" | %.0f tok/s", *record.tokens_per_second);
    if (record.mfu) text += format(" | mfu %.1f %%", 100 * *record.mfu);
    if (record.bubble) text += format(" | bubble %.1f %%", 100 * *record.bubble);
    if (record.planned_ms && record.ms) text += format(" | plan %+.1f %%", 100 * (*record.ms / *record.planned_ms - 1));
    if (record.memory_bytes) text += " | " + bytes_text(*record.memory_bytes);
    if (eta_seconds) text += " | eta " + duration_text(*eta_seconds);
    return text;
}

class Console {
public:
    Console(int64_t steps, bool terminal) : steps_(steps), terminal_(terminal) {}
    ~Console() { clear_bar(); }

    void step(const StepRecord& record) {
        std::optional<double> eta;
        if (record.ms) {  // from a running mean: the first step is slower than the others
            mean_ms_ += (*record.ms - mean_ms_) / double(std::min<int64_t>(++timed_steps_, 20));
            eta = mean_ms_ * 1e-3 * double(steps_ - record.step);
        }
        const std::string text = step_text(record, steps_, eta);
        if (!terminal_ || record.val_loss || record.step == steps_) note(text);
        else show_bar(text, double(record.step) / double(std::max<int64_t>(1, steps_)));
    }

    // A line that stays.
    void note(const std::string& text) {
        clear_bar();
        std::printf("%s\n", text.c_str());
        std::fflush(stdout);
    }

private:
    int64_t steps_;
    bool terminal_, bar_shown_ = false;
    double mean_ms_ = 0;
    int64_t timed_steps_ = 0;

    void clear_bar() {
        if (bar_shown_) std::fputs("\r\033[K", stdout);
        bar_shown_ = false;
    }

    // The facts, without their names where they would not fit, and as much of a bar as the width leaves.
    void show_bar(std::string text, double part) {
        winsize size{};
        ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size);
        const size_t width = size.ws_col > 1 ? size.ws_col - 1u : 79u;
        if (text.size() > width)
            for (const char* name : {"step ", "loss ", "norm ", "lr ", "mfu ", "bubble ", "eta ", " tok/s", "| "})
                for (size_t at; (at = text.find(name)) != std::string::npos;) {
                    if (std::string(name) == " tok/s") text.replace(at, 6, "/s");
                    else text.erase(at, std::strlen(name));
                }
        if (text.size() + 12 <= width) {
            const size_t bar = std::min<size_t>(width - text.size() - 3, 30), filled = size_t(part * double(bar));
            text = "[" + std::string(filled, '#') + std::string(bar - filled, '.') + "] " + text;
        }
        text.resize(std::min(text.size(), width));
        std::printf("\r%s\033[K", text.c_str());
        std::fflush(stdout);
        bar_shown_ = true;
    }
};
