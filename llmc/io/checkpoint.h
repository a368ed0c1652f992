// Checkpoints: RUN/checkpoints/step-00000020/, one directory a step, which transformers' from_pretrained loads as it
// stands. A directory is filled under a hidden name, synced, read back, and renamed into sight; LATEST follows. At every
// moment of this, kill -9 and power cuts included, the run has a whole checkpoint if it had one before.
// Caller: train_gpt.cu; generate and eval read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "llmc/io/files.h"
#include "llmc/io/huggingface.h"
#include "llmc/io/manifest.h"
#include "llmc/io/safetensors.h"

inline constexpr int64_t shard_bytes_default = 5'000'000'000;  // transformers' own limit

// ---------------------------------------------------------------------------------------------------------------------
// Directories

struct CheckpointDirectory {
    int64_t step;
    std::string name;
};

inline std::string checkpoint_root(const std::string& run_dir) { return run_dir + "/checkpoints"; }

inline std::string checkpoint_name(int64_t step) {
    char name[32];
    std::snprintf(name, sizeof name, "step-%08lld", static_cast<long long>(step));
    return name;
}

// Newest first. A step saved anew has its former directory beside it for a moment, as step-00000020.replaced.
inline std::vector<CheckpointDirectory> list_checkpoints(const std::string& root) {
    std::vector<CheckpointDirectory> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(root, error)) {
        const std::string name = entry.path().filename();
        long long step = 0;
        if (std::sscanf(name.c_str(), "step-%18lld", &step) != 1 || step < 0) continue;
        if (name == checkpoint_name(step) || name == checkpoint_name(step) + ".replaced") found.push_back({step, name});
    }
    std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
        return a.step != b.step ? a.step > b.step : a.name < b.name;
    });
    return found;
}

// The order in which a load tries them: what LATEST names, then the newest.
inline std::vector<std::string> checkpoint_candidates(const std::string& root) {
    std::vector<std::string> names;
    for (const CheckpointDirectory& directory : list_checkpoints(root)) names.push_back(directory.name);
    if (!std::filesystem::exists(root + "/LATEST")) return names;
    std::string latest = read_text_file(root + "/LATEST", 4096);
    while (!latest.empty() && latest.back() == '\n') latest.pop_back();
    const auto found = std::find(names.begin(), names.end(), latest);
    if (found != names.end()) std::rotate(names.begin(), found, found + 1);
    return names;
}

// Renamed away first: what is half deleted is never in sight.
inline void delete_directory(const std::string& root, const std::string& name) {
    const std::string hidden = root + "/." + name + ".deleted";
    rename_path(root + "/" + name, hidden);
    sync_directory(root);
    remove_tree(hidden);
}

inline void remove_leftovers(const std::string& root) {
    std::vector<std::string> hidden;
    for (const auto& entry : std::filesystem::directory_iterator(root))
        if (entry.path().filename().string().starts_with(".step-")) hidden.push_back(entry.path());
    for (const std::string& path : hidden) remove_tree(path);
}

// ---------------------------------------------------------------------------------------------------------------------
// Verify

// The manifest of a directory whose files all have the sizes and hashes it says; else a Failure that names the file.
inline Manifest verify_checkpoint(const std::string& directory) {
    const Manifest manifest = read_manifest(directory);
    for (const auto& [name, expected] : manifest.files) {
        const std::string path = directory + "/" + name;
        const int64_t size = FileReader(path).size();
        if (size != expected.bytes)
            throw Failure(EXIT_CHECKPOINT, path + " has " + std::to_string(size) + " bytes; the manifest says " +
                                               std::to_string(expected.bytes) + ".");
        const std::string hash = record_of(path).hash;
        if (hash != expected.hash)
            throw Failure(EXIT_CHECKPOINT, path + " has the hash " + hash + "; the manifest says " + expected.hash + ".");
    }
    return manifest;
}

struct FoundCheckpoint {
    std::string directory;
    Manifest manifest;
    std::vector<std::string> notes;  // why later ones were passed over
};

// The checkpoint that a run would resume from; none when it has no checkpoint, a Failure when it has but none is sound.
inline std::optional<FoundCheckpoint> find_latest_checkpoint(const std::string& run_dir) {
    const std::string root = checkpoint_root(run_dir);
    std::vector<std::string> notes;
    for (const std::string& name : checkpoint_candidates(root)) {
        try {
            Manifest manifest = verify_checkpoint(root + "/" + name);
            if (!notes.empty()) notes.push_back("Falling back to " + root + "/" + name + ".");
            return FoundCheckpoint{root + "/" + name, std::move(manifest), std::move(notes)};
        } catch (const Failure& failure) {
            notes.push_back(failure.what());
        }
    }
    if (notes.empty() && !std::filesystem::exists(root + "/LATEST")) return std::nullopt;
    std::string message = "No checkpoint in " + root + " could be verified.";
    for (const std::string& note : notes) message += "\n  " + note;
    throw Failure(EXIT_CHECKPOINT, message + "\nRestore one of them from a copy, or start a run in another directory.");
}

// ---------------------------------------------------------------------------------------------------------------------
// Save

// Writes the tensors `prefix`<parameter> of a flat buffer into dir/stem-0000i-of-0000n.safetensors, each at most shard_bytes
// (a larger tensor has a shard to itself), and enters files and tensors into the manifest.
struct TensorGroup {
    std::string prefix;
    const floatS* flat;
};

inline void write_tensors(const std::string& directory, const std::string& stem, const std::vector<TensorGroup>& groups,
                          const CheckpointView& view, int64_t shard_bytes, Manifest& manifest) {
    struct Source {
        StoredForm form;
        const floatS* tensor;
    };
    struct Shard {
        std::vector<TensorInfo> tensors;
        std::vector<Source> sources;
        int64_t bytes = 0;
    };
    std::vector<Shard> shards(1);
    for (const TensorGroup& group : groups)
        for (const Parameter& parameter : view.parameters) {
            const StoredForm form = stored_form(view.config, parameter);
            const TensorInfo info{group.prefix == "transformer." && form.name == "lm_head.weight" ? form.name : group.prefix + form.name,
                                  dtype_of<floatS>(), form.shape, 0, 0};
            const int64_t bytes = info.elements() * int64_t(sizeof(floatS));
            if (shards.back().bytes > 0 && shards.back().bytes + bytes > shard_bytes) shards.emplace_back();
            shards.back().tensors.push_back(info);
            shards.back().sources.push_back({form, group.flat + parameter.offset});
            shards.back().bytes += bytes;
        }

    std::vector<floatS> block;
    for (size_t i = 0; i < shards.size(); ++i) {
        char number[32] = "";
        if (stem != "model" || shards.size() > 1) std::snprintf(number, sizeof number, "-%05zu-of-%05zu", i + 1, shards.size());
        const std::string name = stem + number + ".safetensors";
        SafetensorsWriter file(directory + "/" + name, shards[i].tensors);
        for (size_t t = 0; t < shards[i].tensors.size(); ++t) {
            const auto& [form, tensor] = shards[i].sources[t];
            const int64_t step = rows_per_block(form), columns = form.columns();
            block.resize(size_t(step * columns));
            for (int64_t row = 0; row < form.rows(); row += step) {
                const int64_t count = std::min(step, form.rows() - row);
                pack_rows(form, tensor, row, count, block.data());
                file.append(block.data(), count * columns);
            }
            const TensorInfo& info = shards[i].tensors[t];
            manifest.tensors.push_back({{"name", info.name},
                                        {"file", name},
                                        {"dtype", info.dtype},
                                        {"shape", info.shape},
                                        {"offset", std::vector<int64_t>(info.shape.size(), 0)},
                                        {"bytes", info.end - info.begin}});
        }
        manifest.files[name] = file.finish();
    }
}
