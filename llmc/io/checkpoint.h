// Checkpoints: RUN/checkpoints/step-00000020/, one directory a step, which transformers' from_pretrained loads as it
// stands. A directory is filled under a hidden name, synced, read back, and renamed into sight; LATEST follows. At
// every moment of this, kill -9 and power cuts included, the run has a whole checkpoint if it had one before. Caller:
// train_gpt.cu; generate and eval read.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
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
    for (const std::string& name : list_directory(root)) {
        long long step = 0;
        if (std::sscanf(name.c_str(), "step-%18lld", &step) != 1 || step < 0) continue;
        if (name == checkpoint_name(step) || name == checkpoint_name(step) + ".replaced") found.push_back({step, name});
    }
    std::sort(found.begin(), found.end(),
              [](const auto& a, const auto& b) { return a.step != b.step ? a.step > b.step : a.name < b.name; });
    return found;
}

// What LATEST says; empty when there is none.
inline std::string latest_name(const std::string& root) {
    char name[64] = "";
    std::ifstream(root + "/LATEST").getline(name, sizeof name);
    return name;
}

// Renamed away first: what is half deleted is never in sight.
inline void delete_directory(const std::string& root, const std::string& name) {
    const std::string hidden = root + "/." + name + ".deleted";
    rename_path(root + "/" + name, hidden);
    sync_directory(root);
    remove_tree(hidden);
}

// Hidden directories that a crash has left.
inline void remove_leftovers(const std::string& root) {
    for (const std::string& name : list_directory(root))
        if (name.starts_with(".step-")) remove_tree(root + "/" + name);
}

// ---------------------------------------------------------------------------------------------------------------------
// Verify

// The manifest of a directory whose files all have the sizes and hashes it says; else a Failure that names the file.
inline Manifest verify_checkpoint(const std::string& directory) {
    try {
        Manifest manifest = read_manifest(directory);
        for (const auto& [name, expected] : manifest.files) {
            const std::string path = directory + "/" + name;
            const int64_t size = FileReader(path).size();
            if (size != expected.bytes)
                throw Failure(EXIT_CHECKPOINT, path + " has " + std::to_string(size) + " bytes; the manifest says " +
                                                   std::to_string(expected.bytes) + ".");
            if (record_of(path) != expected)
                throw Failure(EXIT_CHECKPOINT, path + " has other contents than those whose hash the manifest has.");
        }
        return manifest;
    } catch (const Failure& failure) {
        throw Failure(failure.exit_code == EXIT_DATA ? int(EXIT_CHECKPOINT) : failure.exit_code, failure.what());
    }
}

struct FoundCheckpoint {
    std::string directory;
    Manifest manifest;
    std::vector<std::string> notes;  // why it is not the one expected
};

// The checkpoint that a run resumes from: the one that LATEST names or else the newest that is sound. Nothing when the
// run has no checkpoint, a Failure when it has but none is sound.
inline std::optional<FoundCheckpoint> find_latest_checkpoint(const std::string& run_dir) {
    const std::string root = checkpoint_root(run_dir), latest = latest_name(root);
    std::vector<CheckpointDirectory> candidates = list_checkpoints(root);
    std::vector<std::string> notes;
    const auto found =
        std::find_if(candidates.begin(), candidates.end(), [&](const auto& c) { return c.name == latest; });
    if (found != candidates.end()) std::rotate(candidates.begin(), found, found + 1);
    else if (path_exists(root + "/LATEST"))
        notes.push_back(root + "/LATEST names \"" + latest + "\", which is not there.");

    for (const CheckpointDirectory& candidate : candidates) {
        const std::string directory = root + "/" + candidate.name;
        try {
            Manifest manifest = verify_checkpoint(directory);
            if (!notes.empty()) notes.push_back("Falling back to " + directory + ".");
            return FoundCheckpoint{directory, std::move(manifest), std::move(notes)};
        } catch (const Failure& failure) { notes.push_back(failure.what()); }
    }
    if (notes.empty()) return std::nullopt;
    std::string message = "No checkpoint in " + root + " can be verified:";
    for (const std::string& note : notes) message += "\n  " + note;
    throw Failure(EXIT_CHECKPOINT, message + "\nRestore one from a copy, or train in another run directory.");
}

// A sentence for messages about failed storage.
inline std::string last_good_checkpoint(const std::string& run_dir) {
    try {
        if (const auto found = find_latest_checkpoint(run_dir))
            return "The last good checkpoint is " + found->directory + ".";
    } catch (const Failure&) {}
    return "There is no good checkpoint.";
}

// ---------------------------------------------------------------------------------------------------------------------
// Load

enum class Restore { weights, all };

// Fills the view from a directory that has just been verified.
inline TrainingState restore_checkpoint(const FoundCheckpoint& found, const CheckpointView& view, Restore what) {
    const auto files_of = [&](const std::string& stem) {
        std::vector<std::string> paths;
        for (const auto& [name, record] : found.manifest.files)
            if (name.starts_with(stem) && name.ends_with(".safetensors")) paths.push_back(found.directory + "/" + name);
        return TensorFiles(paths);
    };
    std::vector<std::string> lines = config_mismatches(found.manifest.model, view.config);
    const TensorFiles weights = files_of("model");
    for (std::string& line : tensor_mismatches(weights, view)) lines.push_back(std::move(line));
    refuse_mismatches(found.directory, lines);
    if (what == Restore::all) {
        const TensorFiles moments = files_of("optimizer");
        for (const std::string prefix : {"m.", "v."})
            refuse_mismatches(found.directory, tensor_mismatches(moments, view, prefix));
        read_tensors(moments, view, "m.", view.m);
        read_tensors(moments, view, "v.", view.v);
    }
    read_tensors(weights, view, "", view.master);

    TrainingState state = found.manifest.state;
    state.notes = found.notes;
    if (what == Restore::all)
        for (const auto& [key, now] : current_environment()) {
            const auto then = found.manifest.environment.find(key);
            if (then != found.manifest.environment.end() && then->second != now)
                state.notes.push_back(found.directory + " was written with " + key + " " + then->second + ", this is " +
                                      now + ": training goes on, but not with the same bits.");
        }
    return state;
}

// `path` is a run or one of its checkpoints.
inline FoundCheckpoint find_checkpoint(const std::string& path) {
    if (path_exists(path + "/" + manifest_name)) return {path, verify_checkpoint(path), {}};
    if (std::optional<FoundCheckpoint> found = find_latest_checkpoint(path)) return *std::move(found);
    throw Failure(EXIT_CHECKPOINT, path + " is neither a run with checkpoints nor a checkpoint.");
}

inline TrainingState load_checkpoint(const std::string& path, const CheckpointView& view, Restore what) {
    return restore_checkpoint(find_checkpoint(path), view, what);
}

// For a run to resume: nothing when it has no checkpoint yet.
inline std::optional<TrainingState> load_latest_checkpoint(const std::string& run_dir, const CheckpointView& view) {
    const std::optional<FoundCheckpoint> found = find_latest_checkpoint(run_dir);
    if (!found) return std::nullopt;
    return restore_checkpoint(*found, view, Restore::all);
}

// ---------------------------------------------------------------------------------------------------------------------
// Save

// A flat buffer and the prefix of its tensors' names in files; weights, without one, have their Hugging Face names.
struct TensorGroup {
    std::string prefix;
    const floatS* flat;
};

// Writes stem-0000i-of-0000n.safetensors, each of at most shard_bytes (a larger tensor has a file to itself), and
// enters files and tensors into the manifest. One file of weights is called model.safetensors.
inline void write_tensors(const std::string& directory, const std::string& stem, const std::vector<TensorGroup>& groups,
                          const CheckpointView& view, int64_t shard_bytes, Manifest& manifest) {
    struct Item {
        StoredForm form;
        const floatS* tensor;
    };
    std::vector<std::vector<TensorInfo>> shards(1);
    std::vector<std::vector<Item>> items(1);
    int64_t filled = 0;
    for (const TensorGroup& group : groups)
        for (const Parameter& parameter : view.parameters) {
            const StoredForm form = stored_form(view.config, parameter);
            const std::string name = group.prefix.empty() ? huggingface_name(form.name) : group.prefix + form.name;
            const int64_t bytes = form.rows() * form.columns() * int64_t(sizeof(floatS));
            if (filled > 0 && filled + bytes > shard_bytes) {
                shards.emplace_back();
                items.emplace_back();
                filled = 0;
            }
            shards.back().push_back({name, dtype_of<floatS>(), form.shape, 0, 0});
            items.back().push_back({form, group.flat + parameter.offset});
            filled += bytes;
        }

    for (size_t i = 0; i < shards.size(); ++i) {
        char number[48] = "";
        if (stem != "model" || shards.size() > 1)
            std::snprintf(number, sizeof number, "-%05zu-of-%05zu", i + 1, shards.size());
        const std::string name = stem + number + ".safetensors";
        SafetensorsWriter file(directory + "/" + name, shards[i]);
        for (const Item& item : items[i]) write_tensor(file, item.form, item.tensor);
        manifest.files[name] = file.finish();
        for (const TensorInfo& tensor : shards[i])
            manifest.tensors.push_back({{"name", tensor.name},
                                        {"file", name},
                                        {"dtype", tensor.dtype},
                                        {"shape", tensor.shape},
                                        {"offset", std::vector<int64_t>(tensor.shape.size(), 0)},
                                        {"bytes", tensor.elements() * dtype_bytes(tensor.dtype)}});
    }
}

// Fills a directory; the manifest comes last.
inline void write_checkpoint(const std::string& directory, const CheckpointView& view, const TrainingState& state,
                             int64_t shard_bytes) {
    Manifest manifest{state, view.config, current_environment()};
    const auto write_json = [&](const std::string& name, const nlohmann::json& contents) {
        manifest.files[name] = write_file(directory + "/" + name, json_text(contents));
    };
    write_tensors(directory, "model", {{"", view.master}}, view, shard_bytes, manifest);
    if (!manifest.files.contains("model.safetensors")) {
        nlohmann::json map;
        int64_t total = 0;
        for (const nlohmann::json& tensor : manifest.tensors) {
            map[tensor["name"].get<std::string>()] = tensor["file"];
            total += tensor["bytes"].get<int64_t>();
        }
        write_json("model.safetensors.index.json", {{"metadata", {{"total_size", total}}}, {"weight_map", map}});
    }
    write_tensors(directory, "optimizer", {{"m.", view.m}, {"v.", view.v}}, view, shard_bytes, manifest);
    write_json("config.json", huggingface_config(view.config, state.end_of_text));
    write_json("generation_config.json", {{"bos_token_id", state.end_of_text}, {"eos_token_id", state.end_of_text}});
    write_manifest(directory, manifest);
    sync_directory(directory);
}

inline void refuse_nonfinite(const CheckpointView& view, int64_t step) {
    const auto check = [&](const std::string& kind, const floatS* flat) {
        for (const Parameter& parameter : view.parameters) {
            bool finite = true;
            for (int64_t i = 0; i < parameter.size(); ++i) finite &= std::isfinite(flat[parameter.offset + i]);
            if (!finite)
                throw Failure(EXIT_NONFINITE, "The " + kind + " " + parameter.name + " is not finite after step " +
                                                  std::to_string(step) + "; it is not saved as a checkpoint.");
        }
    };
    check("weight", view.master);
    check("first moment of", view.m);
    check("second moment of", view.v);
}

// Keeps `saved`, which has just been read back, and the newest others, `keep` in all (0: every one).
inline void delete_old_checkpoints(const std::string& root, const std::string& saved, int keep) {
    int kept = 1;
    for (const CheckpointDirectory& directory : list_checkpoints(root)) {
        if (directory.name == saved) continue;
        const bool wanted = directory.name != saved + ".replaced" && (keep == 0 || kept < keep);
        if (wanted) ++kept;
        else delete_directory(root, directory.name);
    }
}

inline void save_checkpoint(const std::string& run_dir, const CheckpointView& view, const TrainingState& state,
                            int keep, int64_t shard_bytes = shard_bytes_default) {
    refuse_nonfinite(view, state.step);
    const std::string root = checkpoint_root(run_dir), name = checkpoint_name(state.step);
    const std::string hidden = root + "/." + name + ".tmp", replaced = name + ".replaced";
    try {
        create_directories(root);
        sync_directory(run_dir);
        remove_leftovers(root);
        create_directories(hidden);
        write_checkpoint(hidden, view, state, shard_bytes);
        verify_checkpoint(hidden);
        if (path_exists(root + "/" + name)) {  // this step was saved before; no rename replaces a full directory
            if (path_exists(root + "/" + replaced)) delete_directory(root, replaced);
            rename_path(root + "/" + name, root + "/" + replaced);
        }
        rename_path(hidden, root + "/" + name);
        sync_directory(root);
        replace_file(root, "LATEST", name + "\n");
        delete_old_checkpoints(root, name, keep);
    } catch (const Failure& failure) {
        std::error_code ignored;
        std::filesystem::remove_all(hidden, ignored);  // gives a full disk its space back
        throw Failure(EXIT_STORAGE, "The checkpoint of step " + std::to_string(state.step) +
                                        " could not be saved: " + failure.what() + " " + last_good_checkpoint(run_dir));
    }
}
