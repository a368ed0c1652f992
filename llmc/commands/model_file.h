// The model that --checkpoint names, for the commands that read one: a checkpoint directory, a run directory (its
// newest verified checkpoint), or any directory of Hugging Face GPT-2 weights. `train --init-from` names one like it.
#pragma once

#include <cstdio>
#include <filesystem>
#include <string>

#include "llmc/io/config.h"
#include "llmc/parallel/checkpoint.h"
#include "llmc/parallel/memory.h"
#include "llmc/parallel/rank.h"

class ModelFile {
public:
    // Called by all processes together.
    ModelFile(const Config& c, Transport& processes) : config_(c), directory_(c.run.checkpoint) {
        if (path_exists(checkpoint_root(directory_)) || path_exists(directory_ + "/" + manifest_name)) {
            const FoundCheckpoint found = find_checkpoint(directory_, processes);
            for (const std::string& note : found.notes)
                if (processes.rank == 0) std::fprintf(stderr, "%s\n", note.c_str());
            directory_ = found.directory;
            tokenizer_ = found.manifest.state.tokenizer;
        } else if (!path_exists(directory_ + "/config.json")) {
            throw Failure(EXIT_CHECKPOINT,
                          "--checkpoint " + directory_ +
                              " holds neither checkpoints of a run nor a model; name a "
                              "run directory such as runs/demo, one of its checkpoints, or a Hugging Face GPT-2");
        }
        const bool ours = std::filesystem::path(directory_).filename().string().starts_with("step-");
        if (ours && !path_exists(directory_ + "/" + manifest_name))
            throw Failure(EXIT_CHECKPOINT, directory_ + " has lost its " + manifest_name + " and cannot be verified");
        model_ = read_model_config(directory_);
        if (!c.data.tokenizer.empty()) tokenizer_ = c.data.tokenizer;
        if (tokenizer_.empty()) tokenizer_ = tokenizer_of_vocab(model_.vocab);
        if (tokenizer_vocab(tokenizer_) > model_.vocab)
            throw Failure(EXIT_CONFIG, "the tokenizer " + tokenizer_ + " has " +
                                           std::to_string(tokenizer_vocab(tokenizer_)) + " tokens, the model in " +
                                           directory_ + " has " + std::to_string(model_.vocab) +
                                           "; name the right one with --tokenizer");
    }

    const std::string& directory() const { return directory_; }
    const std::string& tokenizer_name() const { return tokenizer_; }

    // Options of a rank for inference, with chunks of the whole context unless --chunk-tokens says otherwise.
    RankOptions options(int rank) const {
        Config c = config_;
        if (!c.data.chunk_tokens) c.data.chunk_tokens = model_.context;
        c.data.batch_tokens = batch_tokens();
        c.model.context = model_.context;
        return rank_options(c, model_, false, rank);
    }

    const GptConfig& model() const { return model_; }
    int64_t batch_tokens() const { return config_.data.batch_tokens ? config_.data.batch_tokens : 8 * model_.context; }

    // Files hold more precision than is kept.
    void load(Rank& rank) const {
        std::vector<floatS> flat(static_cast<size_t>(flat_size(rank.parameters)));
        init_from_huggingface(directory_, {rank.options.model, rank.parameters, flat.data()});
        for (const Parameter& p : rank.parameters)
            for (int64_t i = p.offset; i < p.offset + p.size(); ++i) flat[size_t(i)] -= p.center();
        const std::vector<floatX> rounded(flat.begin(), flat.end());
        upload(rank.device, rank.weights, rounded.data(), int64_t(rounded.size()));
    }

private:
    const Config& config_;
    std::string directory_, tokenizer_;
    GptConfig model_;
};

// --init-from: sizes that were not asked for come with the weights, and those that were must be theirs.
inline void take_sizes_of(Config& c, std::string& source, Transport& transport) {
    if (path_exists(checkpoint_root(source))) source = find_checkpoint(source, transport).directory;
    const GptConfig found = read_model_config(source);
    std::vector<std::string> violations;
    const auto take = [&](const char* name, int64_t& size, int64_t value) {
        if (size && size != value)
            violations.push_back("--" + std::string(name) + " " + std::to_string(size) + ", --init-from " + source +
                                 " has " + std::to_string(value) + "; use --" + name + " " + std::to_string(value));
        size = value;
    };
    take("layers", c.model.layers, found.layers);
    take("channels", c.model.channels, found.channels);
    take("heads", c.model.heads, found.heads);
    take("context", c.model.context, found.context);
    take("vocab", c.model.vocab, found.vocab);
    if (!violations.empty()) refuse_config(violations);
    c.model.untied = !found.tied;
    if (c.data.tokenizer.empty()) c.data.tokenizer = tokenizer_of_vocab(found.vocab);
    complete_config(c);
}
