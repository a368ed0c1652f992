// What is known of a training step, and the file that keeps it: metrics.jsonl, one JSON object a step. dev/plot.py and
// other programs read it, so the keys are a contract; a key is absent where its value is not known, and null where the
// value is not finite, since JSON has no NaN. Numbers have 17 significant digits: they read back to the same bits.
#pragma once

#include <cmath>
#include <fstream>
#include <optional>
#include <string>

#include "llmc/io/files.h"
#include "llmc/io/json.h"

struct StepRecord {
    int64_t step = 0;  // 0 is the model before the first update
    std::optional<double> loss = {}, val_loss = {}, grad_norm = {}, lr = {}, ms = {}, tokens_per_second = {}, mfu = {},
                          bubble = {}, planned_ms = {};  // what the step was planned to take
    std::optional<int64_t> memory_bytes = {};
};

struct MetricKey {
    using Value = std::optional<double> StepRecord::*;
    const char* name;
    Value value;
};
inline constexpr MetricKey metric_keys[] = {
    {"loss", &StepRecord::loss},
    {"val_loss", &StepRecord::val_loss},
    {"grad_norm", &StepRecord::grad_norm},
    {"lr", &StepRecord::lr},
    {"ms", &StepRecord::ms},
    {"tokens_per_second", &StepRecord::tokens_per_second},
    {"mfu", &StepRecord::mfu},
    {"bubble", &StepRecord::bubble},
    {"planned_ms", &StepRecord::planned_ms},
};

inline std::string json_line(const StepRecord& record) {
    std::string line = "{\"step\":" + std::to_string(record.step);
    for (const MetricKey& key : metric_keys) {
        const std::optional<double>& value = record.*key.value;
        if (!value) continue;
        char text[40];
        std::snprintf(text, sizeof text, std::isfinite(*value) ? "%.17g" : "null", *value);
        line += std::string(",\"") + key.name + "\":" + text;
    }
    if (record.memory_bytes) line += ",\"memory_bytes\":" + std::to_string(*record.memory_bytes);
    return line + "}\n";
}

// The record of such a line; what was not finite is not known any more.
inline StepRecord record_from_json(const nlohmann::json& json) {
    StepRecord record;
    record.step = json.at("step");
    for (const MetricKey& key : metric_keys)
        if (json.contains(key.name) && !json.at(key.name).is_null())
            record.*key.value = json.at(key.name).get<double>();
    if (json.contains("memory_bytes")) record.memory_bytes = json.at("memory_bytes").get<int64_t>();
    return record;
}

// Appends to the file; each line is one write, so that a reader, or a crash, finds whole lines.
class MetricsWriter {
public:
    // Goes on after `resumed_step`: later lines, and a last one torn by a crash, are cut off, since those steps are
    // taken again. -1 starts anew.
    MetricsWriter(const std::string& path, int64_t resumed_step)
        : path_(path), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644)) {
        if (fd_ < 0) storage_failure("open", path_);
        int64_t kept = 0;  // bytes
        std::ifstream file(path);
        for (std::string line; resumed_step >= 0 && std::getline(file, line) && !file.eof();) {
            long long step;
            if (std::sscanf(line.c_str(), "{\"step\":%lld", &step) != 1 || step > resumed_step) break;
            kept += int64_t(line.size()) + 1;
        }
        if (::ftruncate(fd_, kept) != 0) storage_failure("truncate", path_);
    }

    void write(const StepRecord& record) {
        const std::string line = json_line(record);
        ssize_t written;
        do written = ::write(fd_, line.data(), line.size());
        while (written < 0 && errno == EINTR);
        if (written != ssize_t(line.size())) storage_failure("write", path_, written < 0 ? errno : ENOSPC);
    }

    // Called before a checkpoint is saved: a checkpoint then never knows of a step that this file has lost.
    void sync() {
        if (::fsync(fd_) != 0) storage_failure("sync", path_);
    }

private:
    std::string path_;
    Descriptor fd_;
};
