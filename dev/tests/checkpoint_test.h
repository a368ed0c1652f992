// What the tests of checkpoints share: a model whose every value is known, and short forms of saving and loading.
#pragma once

#include <fstream>
#include <functional>

// fork
#include <sys/wait.h>

#include <gtest/gtest.h>

#include "llmc/parallel/checkpoint.h"

namespace fs = std::filesystem;

// A directory that ends with the test.
struct TemporaryDirectory {
    std::string path;
    explicit TemporaryDirectory(const std::string& parent = "") {
        std::string name = (parent.empty() ? fs::temp_directory_path().string() : parent) + "/checkpoint_test.XXXXXX";
        if (!mkdtemp(name.data())) throw std::runtime_error("mkdtemp failed");
        path = name;
    }
    ~TemporaryDirectory() { fs::remove_all(path); }
    operator std::string() const { return path; }
};

// Parameters of a model, all or those that a rank holds, with buffers that a checkpoint can be made of. Values are a
// function of (step, buffer, parameter, element).
struct TestModel {
    GptConfig config;
    std::vector<Parameter> parameters;
    std::vector<floatS> master, m, v;

    explicit TestModel(GptConfig config = {2, 24, 3, 9, 37, 64, true}) : TestModel(config, parameter_table(config)) {}
    TestModel(const GptConfig& config, const std::vector<Parameter>& held) : config(config), parameters(held) {
        for (auto* buffer : {&master, &m, &v}) buffer->assign(size_t(flat_size(parameters)), floatS(-7));
    }
    CheckpointView view() { return {config, parameters, master.data(), m.data(), v.data()}; }

    // Padding of the vocabulary is zero, as in training.
    TestModel& fill(int64_t step) {
        const std::vector<Parameter> whole = parameter_table(config);
        int kind = 0;
        for (auto* buffer : {&master, &m, &v}) {
            std::fill(buffer->begin(), buffer->end(), floatS(0));
            kind++;
            for (const Parameter& p : parameters) {
                const StoredForm form = stored_form(config, p);
                const int64_t first = whole[size_t(p.index)].offset;
                for (int64_t i = 0; i < form.rows() * form.columns(); ++i)
                    (*buffer)[size_t(p.offset + i)] = floatS(step) + floatS(kind) / 8 + floatS(first + i) / 1024;
            }
        }
        return *this;
    }
    bool operator==(const TestModel& other) const { return master == other.master && m == other.m && v == other.v; }
};

inline TrainingState state_at(int64_t step) {
    TrainingState state;
    state.step = step;
    state.sample_index = 8 * step;
    state.seed = 0xfedcba9876543210u;
    state.tokenizer = "bytes";
    state.end_of_text = 36;
    state.configuration = "steps = 40\npath = \"\xff\"\n";  // not UTF-8
    state.schedule = {{"kind", "cosine"}, {"lr", 6e-4}};
    return state;
}

inline void save(const std::string& run, TestModel& model, const TrainingState& state, int keep = 0,
                 int64_t shard_bytes = shard_bytes_default) {
    NoTransport alone;
    save_checkpoint(run, model.view(), state, keep, alone, shard_bytes);
}
inline void save(const std::string& run, int64_t step, int keep = 0, int64_t shard_bytes = shard_bytes_default) {
    save(run, TestModel().fill(step), state_at(step), keep, shard_bytes);
}

// From a run or one of its checkpoints.
inline TrainingState load(const std::string& path, TestModel& model) {
    NoTransport alone;
    return restore_checkpoint(find_checkpoint(path, alone), model.view());
}

// The step that a run resumes from, with all values checked; -1 when there is no checkpoint.
inline int64_t resumed_step(const std::string& run, std::vector<std::string>* notes = nullptr) {
    NoTransport alone;
    const std::optional<FoundCheckpoint> found = find_latest_checkpoint(run, alone);
    if (!found) return -1;
    TestModel loaded;
    const TrainingState state = restore_checkpoint(*found, loaded.view());
    EXPECT_TRUE(loaded == TestModel().fill(state.step)) << "step " << state.step;
    EXPECT_EQ(state.sample_index, 8 * state.step);
    if (notes) *notes = state.notes;
    return state.step;
}

inline std::string text_of(const std::string& path) { return read_text_file(path, 1 << 20); }
inline void put(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// Checks that `action` fails with `code` and a message that has each of `phrases`.
inline void expect_failure(int code, const std::vector<std::string>& phrases, const std::function<void()>& action) {
    try {
        action();
        ADD_FAILURE() << "no failure, expected one with: " << phrases.front();
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, code) << failure.what();
        for (const std::string& phrase : phrases)
            EXPECT_NE(std::string(failure.what()).find(phrase), std::string::npos)
                << phrase << "\nnot in: " << failure.what();
    }
}

// Runs `action` in a child process; its exit status, or minus the signal that ended it.
inline int in_child(const std::function<int()>& action) {
    const pid_t child = fork();
    if (child == 0) {
        try {
            _exit(action());
        } catch (...) { _exit(99); }
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
