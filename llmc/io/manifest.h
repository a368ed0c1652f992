// The manifest of a checkpoint: what was trained, how far, by which program, and the size and hash of every file.
// It is written last and carries a hash of itself, so a directory with a sound manifest is a whole checkpoint.
// Caller: checkpoint.h.
#pragma once

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <omp.h>

#include "llmc/cpu.h"
#include "llmc/io/huggingface.h"
#include "llmc/io/json.h"
#include "llmc/model/gpt.h"

// Everything besides the tensors that training needs to go on.
struct TrainingState {
    int64_t step = 0;          // steps done
    int64_t sample_index = 0;  // global index of the first sample not yet trained on
    uint64_t seed = 0;         // key of the counter-based random numbers
    std::string tokenizer;
    int64_t end_of_text = 0;    // its token
    std::string configuration;  // effective configuration, as TOML text
    nlohmann::json schedule;    // of the learning rate
    nlohmann::json extra;       // what else the loop carries from step to step (`save` in train_gpt.cu)

    std::vector<std::string> notes;  // filled by load: what the reader should be told
};

struct Manifest {
    TrainingState state;
    GptConfig model;
    std::map<std::string, std::string> environment{};  // what the bits of a sum depend on
    std::map<std::string, FileRecord> files{};
    nlohmann::json tensors = nlohmann::json::array();  // name, file, dtype, global shape, offset in it, bytes
};

// Equal environments compute equal bits.
inline std::map<std::string, std::string> current_environment() {
    static const std::string binary = record_of("/proc/self/exe").hash;
    static const std::string cpu = [] {
        std::ifstream file("/proc/cpuinfo");
        for (std::string line; std::getline(file, line);)
            if (line.starts_with("model name")) return line.substr(std::min(line.size(), line.find(':') + 2));
        return std::string("unknown");
    }();
    return {{"binary", binary},
            {"cpu", cpu},
            {"instructions", isa_name(cpu_isa())},
            {"precision", PRECISION_NAME},
            {"threads", std::to_string(omp_get_max_threads())}};
}

inline constexpr const char* manifest_name = "manifest.json";
inline constexpr const char* manifest_format = "helixtrain checkpoint 1";

inline nlohmann::json records_to_json(const std::map<std::string, FileRecord>& files) {
    nlohmann::json contents = nlohmann::json::object();
    for (const auto& [name, record] : files) contents[name] = {{"bytes", record.bytes}, {"xxh3_128", record.hash}};
    return contents;
}

inline std::map<std::string, FileRecord> records_from_json(const nlohmann::json& contents, const std::string& path) {
    std::map<std::string, FileRecord> files;
    for (const auto& [name, file] : contents.items()) {
        if (name.find('/') != std::string::npos)
            throw Failure(EXIT_DATA, path + " names the file " + name + ", outside its directory.");
        files[name] = {json_integer(file, "bytes", path), json_string(file, "xxh3_128", path)};
    }
    return files;
}

inline void write_manifest(const std::string& directory, const Manifest& manifest) {
    const TrainingState& state = manifest.state;
    nlohmann::json contents = {{"format", manifest_format},
                               {"step", state.step},
                               {"sample_index", state.sample_index},
                               {"seed", state.seed},
                               {"tokenizer", state.tokenizer},
                               {"end_of_text", state.end_of_text},
                               {"configuration", state.configuration},
                               {"schedule", state.schedule},
                               {"extra", state.extra},
                               {"model", huggingface_config(manifest.model, state.end_of_text)},
                               {"environment", manifest.environment},
                               {"files", records_to_json(manifest.files)},
                               {"tensors", manifest.tensors}};
    // The hash is over the parsed contents in their canonical form, which is what a reader can compute again.
    contents = nlohmann::json::parse(json_text(contents));
    contents["xxh3_128"] = hash_of(json_text(contents, -1));
    write_file(directory + "/" + manifest_name, json_text(contents));
}

inline Manifest read_manifest(const std::string& directory) {
    const std::string path = directory + "/" + manifest_name;
    nlohmann::json contents = read_json_file(path);
    const std::string format = json_string(contents, "format", path), hash = json_string(contents, "xxh3_128", path);
    if (format != manifest_format)
        throw Failure(EXIT_DATA,
                      path + " has the format \"" + format + "\"; this program reads \"" + manifest_format + "\".");
    contents.erase("xxh3_128");
    if (hash_of(json_text(contents, -1)) != hash)
        throw Failure(EXIT_DATA, path + " does not have the contents that its hash was made of.");

    Manifest manifest;
    TrainingState& state = manifest.state;
    state.step = json_integer(contents, "step", path);
    state.sample_index = json_integer(contents, "sample_index", path);
    state.seed = json_integer<uint64_t>(contents, "seed", path);
    state.tokenizer = json_string(contents, "tokenizer", path);
    state.end_of_text = json_integer(contents, "end_of_text", path);
    state.configuration = json_string(contents, "configuration", path);
    state.schedule = json_member(contents, "schedule", path);
    state.extra = json_member(contents, "extra", path);

    manifest.model = model_config_from(json_member(contents, "model", path), path);
    for (const auto& [name, value] : json_member(contents, "environment", path).items())
        manifest.environment[name] = as_string(value, path);
    manifest.files = records_from_json(json_member(contents, "files", path), path);
    manifest.tensors = json_member(contents, "tensors", path);
    return manifest;
}
