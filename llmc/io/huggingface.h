// Our parameters as Hugging Face GPT-2 stores them, both ways: names, shapes, transposition, config.json. Files that
// GPT2LMHeadModel.from_pretrained loads are written with this, and any GPT-2 that transformers saved is read with it.
// Callers: checkpoint.h, the commands generate and eval.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "llmc/io/json.h"
#include "llmc/io/safetensors.h"
#include "llmc/model/gpt.h"

// How a parameter lies in a file. Ours is [out, in] with padded vocabulary rows; there, the four linear weights of a
// layer are [in, out] (transformers calls them Conv1D), vectors have one dimension and the padding is dropped.
struct StoredForm {
    std::string name;  // without the prefix "transformer."
    std::vector<int64_t> shape;
    bool transposed;

    int64_t rows() const { return shape.size() == 2 ? shape[0] : 1; }
    int64_t columns() const { return shape.back(); }
};

inline StoredForm stored_form(const GptConfig& model, const Parameter& p) {
    const bool matrix = p.decay;
    if (!matrix) return {p.name, {p.cols}, false};
    for (Part end : {Part::embed, Part::head})
        if (p.part == end) return {p.name, {used_rows(p, model), p.cols}, false};
    return {p.name, {p.cols, p.rows}, true};
}

// Rows of a stored form that are moved at a time: about a megabyte, and whole cache lines of a transposed tensor.
inline int64_t rows_per_block(const StoredForm& form) {
    return std::min(form.rows(), round_up(ceil_div(int64_t(1) << 18, form.columns()), 16));
}

// Rows [first, first + count) of the stored form of `tensor`, into or out of a block [count, columns].
inline void pack_rows(const StoredForm& form, const floatS* tensor, int64_t first, int64_t count, floatS* block) {
    const int64_t columns = form.columns();
    if (!form.transposed) std::copy_n(tensor + first * columns, count * columns, block);
    else
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < count; ++r) block[r * columns + c] = tensor[c * form.rows() + first + r];
}

inline void unpack_rows(const StoredForm& form, floatS* tensor, int64_t first, int64_t count, const floatS* block) {
    const int64_t columns = form.columns();
    if (!form.transposed) std::copy_n(block, count * columns, tensor + first * columns);
    else
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t r = 0; r < count; ++r) tensor[c * form.rows() + first + r] = block[r * columns + c];
}

// The name that GPT2LMHeadModel saves and expects.
inline std::string huggingface_name(const std::string& name) {
    return name == "lm_head.weight" ? name : "transformer." + name;
}

// ---------------------------------------------------------------------------------------------------------------------
// config.json

inline nlohmann::json huggingface_config(const GptConfig& model, int64_t end_of_text) {
    return {{"model_type", "gpt2"},        {"architectures", {"GPT2LMHeadModel"}},
            {"n_layer", model.layers},     {"n_embd", model.channels},
            {"n_head", model.heads},       {"n_positions", model.context},
            {"n_ctx", model.context},      {"n_inner", nullptr},
            {"vocab_size", model.vocab},   {"activation_function", "gelu_new"},
            {"layer_norm_epsilon", 1e-5},  {"tie_word_embeddings", model.tied},
            {"bos_token_id", end_of_text}, {"eos_token_id", end_of_text},
            {"resid_pdrop", 0.0},          {"embd_pdrop", 0.0},
            {"attn_pdrop", 0.0},           {"torch_dtype", sizeof(floatS) == 8 ? "float64" : "float32"}};
}

// The sizes of a model from its config.json. A GPT-2 variant that this program would compute differently is refused.
inline GptConfig model_config_from(const nlohmann::json& config, const std::string& path) {
    GptConfig model;
    model.layers = json_integer(config, "n_layer", path);
    model.channels = json_integer(config, "n_embd", path);
    model.heads = json_integer(config, "n_head", path);
    model.context = json_integer(config, "n_positions", path);
    model.vocab = json_integer(config, "vocab_size", path);
    for (int64_t size : {model.layers, model.channels, model.heads, model.context, model.vocab})
        if (size < 1 || size > 1 << 30)
            throw Failure(EXIT_DATA, path + " has sizes of a model that are not from 1 to 2^30.");
    if (model.layers > 10000)
        throw Failure(EXIT_DATA, path + " has " + std::to_string(model.layers) + " layers; at most 10000 are read.");
    if (model.channels % model.heads != 0)
        throw Failure(EXIT_DATA, path + " has n_embd " + std::to_string(model.channels) + ", no multiple of n_head " +
                                     std::to_string(model.heads) + ".");
    model.padded_vocab = round_up(model.vocab, 64);
    model.tied = !config.contains("tie_word_embeddings") || json_bool(config, "tie_word_embeddings", path);

    const nlohmann::json ours = {{"model_type", "gpt2"},       {"activation_function", "gelu_new"},
                                 {"layer_norm_epsilon", 1e-5}, {"n_inner", nullptr},
                                 {"scale_attn_weights", true}, {"scale_attn_by_inverse_layer_idx", false}};
    for (const auto& [key, value] : ours.items()) {
        const nlohmann::json found = config.value(key, value);
        if (found != value && !(key == "n_inner" && found == 4 * model.channels))
            throw Failure(EXIT_CONFIG, path + " asks for \"" + key + "\": " + json_text(found, -1) +
                                           "; this program computes GPT-2 with " + json_text(value, -1) + ".");
    }
    return model;
}

// `directory` is a checkpoint of ours or one that transformers saved.
inline GptConfig read_model_config(const std::string& directory) {
    const std::string path = directory + "/config.json";
    return model_config_from(read_json_file(path), path);
}

// ---------------------------------------------------------------------------------------------------------------------
// The flat buffers of a rank, as checkpoints see them. Elements lie at the parameters' offsets.
struct CheckpointView {
    const GptConfig& config;                   // of the whole model
    const std::vector<Parameter>& parameters;  // that the rank holds, maybe none
    floatS* weights;
    floatS *m = nullptr, *v = nullptr;  // null where only weights are wanted
};

// The tensors of one or several safetensors files, by name; the prefix "transformer." is dropped, and so are the
// causal masks that older transformers saved as attn.bias and attn.masked_bias.
class TensorFiles {
public:
    struct Place {
        const SafetensorsReader* file;
        const TensorInfo* tensor;
    };

    explicit TensorFiles(const std::vector<std::string>& paths) {
        for (const std::string& path : paths) {
            files.push_back(std::make_unique<SafetensorsReader>(path));
            for (const TensorInfo& tensor : files.back()->tensors()) {
                std::string name = tensor.name;
                if (name.starts_with("transformer.")) name.erase(0, std::string("transformer.").size());
                if (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")) continue;
                if (!places.emplace(name, Place{files.back().get(), &tensor}).second)
                    throw Failure(EXIT_DATA, path + " holds a second tensor \"" + name + "\".");
            }
        }
    }

    const std::map<std::string, Place>& all() const { return places; }

private:
    std::vector<std::unique_ptr<SafetensorsReader>> files;
    std::map<std::string, Place> places;
};

// What keeps the tensors `prefix`<parameter> of `files` from fitting the model: nothing, or one line each. It is judged
// for the whole model, so that every rank comes to the same verdict.
inline std::vector<std::string> tensor_mismatches(const TensorFiles& files, const GptConfig& config,
                                                  const std::string& prefix = "") {
    std::vector<std::string> lines;
    std::map<std::string, TensorFiles::Place> extra;
    for (const auto& entry : files.all())
        if (entry.first.starts_with(prefix)) extra.insert(entry);
    for (const Parameter& parameter : parameter_table(config)) {
        const StoredForm form = stored_form(config, parameter);
        const auto found = extra.find(prefix + form.name);
        if (found == extra.end()) {
            lines.push_back(prefix + form.name + ": the model has " + shape_text(form.shape) +
                            ", the file does not have it");
            continue;
        }
        const TensorInfo& tensor = *found->second.tensor;
        if (tensor.shape != form.shape)
            lines.push_back(tensor.name + ": the model has " + shape_text(form.shape) + ", the file " +
                            shape_text(tensor.shape));
        extra.erase(found);
    }
    if (config.tied) extra.erase(prefix + "lm_head.weight");  // compared with wte.weight when that is read
    for (const auto& [name, place] : extra)
        lines.push_back(name + ": the model does not have it, the file has " + shape_text(place.tensor->shape));
    return lines;
}

// The same for what no shape tells.
inline std::vector<std::string> config_mismatches(const GptConfig& found, const GptConfig& wanted) {
    std::vector<std::string> lines;
    if (found.heads != wanted.heads)
        lines.push_back("heads: the model has " + std::to_string(wanted.heads) + ", the file " +
                        std::to_string(found.heads));
    if (found.tied != wanted.tied)
        lines.push_back(std::string("head: the model's is ") + (wanted.tied ? "tied to its embedding" : "untied") +
                        ", the file's is " + (found.tied ? "tied" : "untied"));
    return lines;
}

inline void refuse_mismatches(const std::string& path, const std::vector<std::string>& lines) {
    if (lines.empty()) return;
    std::string message = "The weights in " + path + " do not fit the model that was asked for:";
    for (const std::string& line : lines) message += "\n  " + line;
    throw Failure(EXIT_CONFIG, message + "\nAsk for a model of the sizes in the file, or for other weights.");
}

// Writes one tensor as it is stored.
inline void write_tensor(SafetensorsWriter& file, const StoredForm& form, const floatS* tensor) {
    const int64_t step = rows_per_block(form), columns = form.columns();
    std::vector<floatS> block(size_t(step * columns));
    for (int64_t row = 0; row < form.rows(); row += step) {
        const int64_t count = std::min(step, form.rows() - row);
        pack_rows(form, tensor, row, count, block.data());
        file.append(block.data(), count * columns);
    }
}

// Reads the tensors `prefix`<parameter> that the rank holds, which fit, into the flat buffer. Everything else in it
// becomes zero, the padded rows of the vocabulary too.
inline void read_tensors(const TensorFiles& files, const CheckpointView& view, const std::string& prefix,
                         floatS* flat) {
    std::fill_n(flat, flat_size(view.parameters), floatS(0));
    for (const Parameter& parameter : view.parameters) {
        const StoredForm form = stored_form(view.config, parameter);
        const auto& [file, tensor] = files.all().at(prefix + form.name);
        const int64_t step = rows_per_block(form), columns = form.columns();
        std::vector<floatS> block(size_t(step * columns));
        for (int64_t row = 0; row < form.rows(); row += step) {
            const int64_t count = std::min(step, form.rows() - row);
            file->read_range(*tensor, row * columns, count * columns, block.data());
            unpack_rows(form, flat + parameter.offset, row, count, block.data());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// --init-from: a safetensors file, or a directory with model.safetensors or an index and its shards.
inline std::vector<std::string> huggingface_files(const std::string& path) {
    if (!std::filesystem::is_directory(path)) return {path};
    if (path_exists(path + "/model.safetensors")) return {path + "/model.safetensors"};
    const std::string index = path + "/model.safetensors.index.json";
    if (!path_exists(index))
        throw Failure(EXIT_DATA, path +
                                     " has neither model.safetensors nor model.safetensors.index.json; a model saved "
                                     "as pytorch_model.bin is converted by transformers' save_pretrained.");
    const nlohmann::json contents = read_json_file(index);
    std::set<std::string> names;
    for (const auto& [tensor, file] : json_member(contents, "weight_map", index).items())
        names.insert(as_string(file, index + ", \"" + tensor + "\","));
    std::vector<std::string> paths;
    for (const std::string& name : names) {
        if (name.find('/') != std::string::npos)
            throw Failure(EXIT_DATA, index + " names the file " + name + ", outside its directory.");
        paths.push_back(path + "/" + name);
    }
    return paths;
}

inline void init_from_huggingface(const std::string& path, const CheckpointView& view) {
    const TensorFiles files(huggingface_files(path));
    std::vector<std::string> lines = tensor_mismatches(files, view.config);
    const std::filesystem::path given(path);
    const std::string directory = std::filesystem::is_directory(given) ? path : (given.parent_path() / ".").string();
    if (path_exists(directory + "/config.json"))
        for (std::string& line : config_mismatches(read_model_config(directory), view.config))
            lines.push_back(std::move(line));
    refuse_mismatches(path, lines);

    read_tensors(files, view, "", view.weights);
    for (floatS* moments : {view.m, view.v})
        if (moments) std::fill_n(moments, flat_size(view.parameters), floatS(0));

    // A tied model may be saved with its head, but then the head must be the embedding. Who has that compares.
    const auto head = files.all().find("lm_head.weight");
    const auto embedding = std::find_if(view.parameters.begin(), view.parameters.end(),
                                        [](const Parameter& p) { return p.name == "wte.weight"; });
    if (!view.config.tied || head == files.all().end() || embedding == view.parameters.end()) return;
    const auto& [file, tensor] = head->second;
    const int64_t columns = view.config.channels;
    const bool same_shape = tensor->shape == std::vector<int64_t>{view.config.vocab, columns};
    std::vector<floatS> row(size_t(columns), 0);
    for (int64_t r = 0; r < view.config.vocab; ++r) {
        if (same_shape) file->read_range(*tensor, r * columns, columns, row.data());
        if (!same_shape || !std::equal(row.begin(), row.end(), view.weights + embedding->offset + r * columns))
            throw Failure(EXIT_CONFIG,
                          path +
                              " has an lm_head.weight that differs from its embedding, wte.weight; ask for "
                              "an untied model.");
    }
}
