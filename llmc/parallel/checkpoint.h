// Checkpoints: RUN/checkpoints/step-00000020/, one directory a step, which transformers' from_pretrained loads as it
// stands. All ranks fill it together under a hidden name, each with the parameters that it holds; it is synced, read
// back, and renamed into sight; LATEST follows. At every moment of this, kill -9 and power cuts included, the run has a
// whole checkpoint if it had one before. Tensors have global names and shapes, so that any number of ranks can read
// what any other number wrote. Caller: train_gpt.cu; generate and eval read.
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
#include "llmc/parallel/transport.h"

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

inline void verify_file(const std::string& path, const FileRecord& expected) {
    const int64_t size = FileReader(path).size();
    if (size != expected.bytes)
        throw Failure(EXIT_CHECKPOINT, path + " has " + std::to_string(size) + " bytes; the manifest says " +
                                           std::to_string(expected.bytes) + ".");
    if (record_of(path) != expected)
        throw Failure(EXIT_CHECKPOINT, path + " has other contents than those whose hash the manifest has.");
}

// The manifest of a directory whose files all have the sizes and hashes it says; else a Failure that names the file.
inline Manifest verify_checkpoint(const std::string& directory) {
    try {
        Manifest manifest = read_manifest(directory);
        for (const auto& [name, record] : manifest.files) verify_file(directory + "/" + name, record);
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

// The one that LATEST names or else the newest that is sound. Nothing when the run has no checkpoint, a Failure when it
// has but none is sound.
inline std::optional<FoundCheckpoint> newest_sound_checkpoint(const std::string& run_dir) {
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

// What `find` finds on rank 0, on all ranks: it alone reads and hashes the files, the others only the manifest.
template <class Find>
std::optional<FoundCheckpoint> find_together(Transport& transport, const Find& find) {
    std::optional<FoundCheckpoint> found;
    transport.together([&] {
        if (transport.rank == 0) found = find();
    });
    const std::string directory = transport.all_gather(found ? found->directory : "").front();
    if (directory.empty()) return std::nullopt;
    const std::string notes = transport.all_gather(found ? json_text(found->notes) : "").front();
    transport.together([&] {
        if (!found) found = {directory, read_manifest(directory), nlohmann::json::parse(notes)};
    });
    return found;
}

// The checkpoint that a run resumes from, if it has one.
inline std::optional<FoundCheckpoint> find_latest_checkpoint(const std::string& run_dir, Transport& transport) {
    return find_together(transport, [&] { return newest_sound_checkpoint(run_dir); });
}

// `path` is a run or one of its checkpoints.
inline FoundCheckpoint find_checkpoint(const std::string& path, Transport& transport) {
    return *find_together(transport, [&] {
        if (path_exists(path + "/" + manifest_name)) return FoundCheckpoint{path, verify_checkpoint(path), {}};
        if (std::optional<FoundCheckpoint> found = newest_sound_checkpoint(path)) return *std::move(found);
        throw Failure(EXIT_CHECKPOINT, path + " is neither a run with checkpoints nor a checkpoint.");
    });
}

// A sentence for messages about failed storage.
inline std::string last_good_checkpoint(const std::string& run_dir) {
    try {
        if (const auto found = newest_sound_checkpoint(run_dir))
            return "The last good checkpoint is " + found->directory + ".";
    } catch (const Failure&) {}
    return "There is no good checkpoint.";
}

// ---------------------------------------------------------------------------------------------------------------------
// Restore

// A flat buffer and the prefix of its tensors' names in files; weights, without one, have their Hugging Face names.
struct TensorGroup {
    std::string prefix;
    floatS* flat;
};

// Files of tensors: how their names begin, and what they hold.
struct FileKind {
    std::string stem;
    std::vector<TensorGroup> groups;
};

inline std::vector<FileKind> file_kinds(const CheckpointView& view) {
    return {{"model", {{"", view.weights}}}, {"optimizer", {{"m.", view.m}, {"v.", view.v}}}};
}

// Fills the view from a directory that has just been verified, with what the rank holds.
inline TrainingState restore_checkpoint(const FoundCheckpoint& found, const CheckpointView& view) {
    std::vector<std::string> lines = config_mismatches(found.manifest.model, view.config);
    for (const FileKind& kind : file_kinds(view)) {
        std::vector<std::string> paths;
        for (const auto& [name, record] : found.manifest.files)
            if (name.starts_with(kind.stem) && name.ends_with(".safetensors"))
                paths.push_back(found.directory + "/" + name);
        const TensorFiles files(paths);
        for (const TensorGroup& group : kind.groups)
            for (std::string& line : tensor_mismatches(files, view.config, group.prefix))
                lines.push_back(std::move(line));
        refuse_mismatches(found.directory, lines);
        for (const TensorGroup& group : kind.groups) read_tensors(files, view, group.prefix, group.flat);
    }

    TrainingState state = found.manifest.state;
    state.notes = found.notes;
    for (const auto& [key, now] : current_environment()) {
        const auto then = found.manifest.environment.find(key);
        if (then != found.manifest.environment.end() && then->second != now)
            state.notes.push_back(found.directory + " was written with " + key + " " + then->second + ", this is " +
                                  now + ": training goes on, but not with the same bits.");
    }
    return state;
}

// ---------------------------------------------------------------------------------------------------------------------
// Save

// A file that the rank writes: its tensors, and where their elements lie.
struct Shard {
    std::string name;
    std::vector<TensorInfo> tensors;
    std::vector<std::pair<StoredForm, const floatS*>> sources;
};

// The rank's tensors cut into files of at most shard_bytes (a larger tensor has a file to itself). Copies are left to
// the rank with the original. Files are counted over all ranks, as stem-0000i-of-0000n.safetensors; weights that are in
// one file are called model.safetensors.
inline std::vector<Shard> plan_shards(const FileKind& kind, const CheckpointView& view, int64_t shard_bytes,
                                      Transport& transport) {
    std::vector<Shard> shards;
    int64_t filled = 0;
    for (const TensorGroup& group : kind.groups)
        for (const Parameter& parameter : view.parameters) {
            if (parameter.copy) continue;
            const StoredForm form = stored_form(view.config, parameter);
            const std::string name = group.prefix.empty() ? huggingface_name(form.name) : group.prefix + form.name;
            const int64_t bytes = form.rows() * form.columns() * int64_t(sizeof(floatS));
            if (shards.empty() || filled + bytes > shard_bytes) {
                shards.emplace_back();
                filled = 0;
            }
            shards.back().tensors.push_back({name, dtype_of<floatS>(), form.shape, 0, 0});
            shards.back().sources.emplace_back(form, group.flat + parameter.offset);
            filled += bytes;
        }

    const std::vector<std::string> counts = transport.all_gather(std::to_string(shards.size()));
    size_t number = 0, total = 0;
    for (size_t r = 0; r < counts.size(); ++r) {
        if (r == size_t(transport.rank)) number = total;
        total += std::stoul(counts[r]);
    }
    for (Shard& shard : shards) {
        char numbers[48] = "";
        if (kind.stem != "model" || total > 1)
            std::snprintf(numbers, sizeof numbers, "-%05zu-of-%05zu", ++number, total);
        shard.name = kind.stem + numbers + ".safetensors";
    }
    return shards;
}

// Writes a file and enters it and its tensors into the manifest.
inline void write_shard(const std::string& directory, const Shard& shard, Manifest& manifest) {
    SafetensorsWriter file(directory + "/" + shard.name, shard.tensors);
    for (const auto& [form, tensor] : shard.sources) write_tensor(file, form, tensor);
    manifest.files[shard.name] = file.finish();
    for (const TensorInfo& tensor : shard.tensors)
        manifest.tensors.push_back({{"name", tensor.name},
                                    {"file", shard.name},
                                    {"dtype", tensor.dtype},
                                    {"shape", tensor.shape},
                                    {"offset", std::vector<int64_t>(tensor.shape.size(), 0)},
                                    {"bytes", tensor.elements() * dtype_bytes(tensor.dtype)}});
}

// Every rank has entered its own files and tensors into its manifest; now each has those of all.
inline void gather_entries(Manifest& manifest, Transport& transport) {
    const std::string own = json_text({{"files", records_to_json(manifest.files)}, {"tensors", manifest.tensors}}, -1);
    manifest.tensors = nlohmann::json::array();
    for (const std::string& text : transport.all_gather(own)) {
        const nlohmann::json entries = nlohmann::json::parse(text);
        manifest.files.merge(records_from_json(entries.at("files"), "a rank's list of files"));
        for (const nlohmann::json& tensor : entries.at("tensors")) manifest.tensors.push_back(tensor);
    }
}

// What describes the tensors' files: the index, if there are several of weights, and config.json for transformers; the
// manifest comes last.
inline void write_descriptions(const std::string& directory, Manifest& manifest) {
    const auto write_json = [&](const std::string& name, const nlohmann::json& contents) {
        manifest.files[name] = write_file(directory + "/" + name, json_text(contents));
        verify_file(directory + "/" + name, manifest.files[name]);
    };
    if (!manifest.files.contains("model.safetensors")) {
        nlohmann::json map;
        int64_t total = 0;
        for (const nlohmann::json& tensor : manifest.tensors) {
            if (!tensor["file"].get<std::string>().starts_with("model")) continue;
            map[tensor["name"].get<std::string>()] = tensor["file"];
            total += tensor["bytes"].get<int64_t>();
        }
        write_json("model.safetensors.index.json", {{"metadata", {{"total_size", total}}}, {"weight_map", map}});
    }
    const int64_t end_of_text = manifest.state.end_of_text;
    write_json("config.json", huggingface_config(manifest.model, end_of_text));
    write_json("generation_config.json", {{"bos_token_id", end_of_text}, {"eos_token_id", end_of_text}});
    write_manifest(directory, manifest);
    read_manifest(directory);
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
    check("weight", view.weights);
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

// The filled hidden directory takes its place.
inline void publish(const std::string& root, const std::string& hidden, const std::string& name) {
    const std::string replaced = name + ".replaced";
    if (path_exists(root + "/" + name)) {  // this step was saved before; no rename replaces a full directory
        if (path_exists(root + "/" + replaced)) delete_directory(root, replaced);
        rename_path(root + "/" + name, root + "/" + replaced);
    }
    rename_path(hidden, root + "/" + name);
    sync_directory(root);
    replace_file(root, "LATEST", name + "\n");
}

// All ranks call it together; the state saved is that of rank 0. What fails on one rank fails on all, with the same
// message.
inline void save_checkpoint(const std::string& run_dir, const CheckpointView& view, const TrainingState& state,
                            int keep, Transport& transport, int64_t shard_bytes = shard_bytes_default) {
    const std::string root = checkpoint_root(run_dir), name = checkpoint_name(state.step);
    const std::string hidden = root + "/." + name + ".tmp";
    const bool first = transport.rank == 0;
    transport.together([&] { refuse_nonfinite(view, state.step); });
    try {
        transport.together([&] {
            if (!first) return;
            create_directories(root);
            sync_directory(run_dir);
            remove_leftovers(root);
            create_directories(hidden);
        });
        Manifest manifest{state, view.config};
        std::vector<Shard> shards;
        for (const FileKind& kind : file_kinds(view))
            for (Shard& shard : plan_shards(kind, view, shard_bytes, transport)) shards.push_back(std::move(shard));
        transport.together([&] {
            for (const Shard& shard : shards) write_shard(hidden, shard, manifest);
        });
        gather_entries(manifest, transport);
        transport.together([&] {
            for (const Shard& shard : shards) verify_file(hidden + "/" + shard.name, manifest.files.at(shard.name));
        });
        transport.together([&] {
            if (!first) return;
            manifest.environment = current_environment();
            write_descriptions(hidden, manifest);
            publish(root, hidden, name);
            delete_old_checkpoints(root, name, keep);
        });
    } catch (const JointFailure& failure) {
        std::string message;
        if (first) {
            std::error_code ignored;
            std::filesystem::remove_all(hidden, ignored);  // gives a full disk its space back
            message = "The checkpoint of step " + std::to_string(state.step) +
                      " could not be saved: " + failure.what() + " " + last_good_checkpoint(run_dir);
        }
        throw JointFailure(EXIT_STORAGE, transport.all_gather(message).front());
    }
}
