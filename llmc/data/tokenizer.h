// Text to token ids and back. Two tokenizers, told apart by name, which checkpoints keep:
//   bytes  ids 0..255 are the bytes, 256 is end-of-text; nothing to download
//   gpt2   50257 ids, 50256 is end-of-text. Training on token files needs no more than these two numbers; encoding and
//          decoding need GPT-2's vocab.json and merges.txt, which the scripts in data/ write beside their shards
// Called by `tokenize` and `generate`, and by the trainer for the two numbers.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"
#include "token_file.h"

class Tokenizer {
   public:
    // `directory` holds vocab.json and merges.txt; empty when no text will be encoded or decoded.
    explicit Tokenizer(const std::string& name, const std::string& directory = "") : name_(name) {
        if (name == "gpt2") {
            vocab_ = 50257;
            if (!directory.empty()) {
                pairs_ = std::make_shared<const BytePairEncoder>(directory);
                vocab_ = pairs_->vocab();
                end_of_text_ = pairs_->end_of_text();
                return;
            }
        } else if (name != "bytes") {
            throw Failure(EXIT_CONFIG, "there is no tokenizer '" + name + "'; choose bytes or gpt2");
        }
        end_of_text_ = int32_t(vocab_ - 1);
    }

    const std::string& name() const { return name_; }
    int64_t vocab() const { return vocab_; }
    int32_t end_of_text() const { return end_of_text_; }
    bool handles_text() const { return name_ == "bytes" || pairs_; }

    // Ordinary text only: "<|endoftext|>" in it is text like any other.
    std::vector<int32_t> encode(std::string_view text) const {
        std::vector<int32_t> ids;
        if (name_ == "bytes") ids.assign(reinterpret_cast<const uint8_t*>(text.data()),
                                         reinterpret_cast<const uint8_t*>(text.data()) + text.size());
        else pairs().encode(text, ids);
        return ids;
    }

    // The bytes of the ids one after the other. A character of several bytes may be spread over several ids. Ids outside
    // the vocabulary, which a model with padded rows could give, have no text.
    std::string decode(std::span<const int32_t> ids) const {
        std::string text;
        for (int32_t id : ids) {
            if (id == end_of_text_) text += "<|endoftext|>";
            else if (id < 0 || id >= vocab_) continue;
            else if (name_ == "bytes") text += char(id);
            else text += pairs().bytes(id);
        }
        return text;
    }

   private:
    std::string name_;
    int64_t vocab_ = 257;
    int32_t end_of_text_;
    std::shared_ptr<const BytePairEncoder> pairs_;  // shared, so that a Tokenizer can be copied

    const BytePairEncoder& pairs() const {
        if (!pairs_)
            throw Failure(EXIT_CONFIG, "the gpt2 tokenizer needs vocab.json and merges.txt to read or write text; name their "
                                       "folder with --tokenizer-dir (the scripts in data/ write them beside the shards)");
        return *pairs_;
    }
};

// The name of the tokenizer that token files were made with: llm.c's format has no field for it, but the first token of
// the first shard is end-of-text, whose id differs.
inline std::string infer_tokenizer(const std::vector<TokenFile>& files) {
    const int64_t first = files.empty() || files[0].size() == 0 ? -1 : int64_t(files[0][0]);
    for (const char* name : {"bytes", "gpt2"})
        if (first == Tokenizer(name).end_of_text()) return name;
    throw Failure(EXIT_DATA, "cannot tell which tokenizer made " + (files.empty() ? "no file" : files[0].path()) +
                                 ": its first token is " + std::to_string(first) +
                                 ", expected end-of-text, 256 (bytes) or 50256 (gpt2); say --tokenizer bytes or gpt2");
}
