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

#include "llmc/data/bpe.h"

class Tokenizer {
public:
    // `directory` holds vocab.json and merges.txt; empty when no text will be encoded or decoded.
    explicit Tokenizer(const std::string& name, const std::string& directory = "") : called(name) {
        if (name == "gpt2") {
            ids_known = 50257;
            if (!directory.empty()) {
                pairs = std::make_shared<const BytePairEncoder>(directory);
                ids_known = pairs->vocab();
                end_id = pairs->end_of_text();
                return;
            }
        } else if (name != "bytes") {
            throw Failure(EXIT_CONFIG, "There is no tokenizer '" + name + "'; choose bytes or gpt2.");
        }
        end_id = int32_t(ids_known - 1);
    }

    const std::string& name() const { return called; }
    int64_t vocab() const { return ids_known; }
    int32_t end_of_text() const { return end_id; }

    // Ordinary text only: "<|endoftext|>" in it is text like any other.
    std::vector<int32_t> encode(std::string_view text) const {
        std::vector<int32_t> ids;
        if (called == "bytes")
            ids.assign(reinterpret_cast<const uint8_t*>(text.data()),
                       reinterpret_cast<const uint8_t*>(text.data()) + text.size());
        else require_pairs().encode(text, ids);
        return ids;
    }

    // The bytes of the ids one after the other. A character of several bytes may be spread over several ids. Ids
    // outside the vocabulary, which a model with padded rows could give, have no text.
    std::string decode(std::span<const int32_t> ids) const {
        std::string text;
        for (int32_t id : ids) {
            if (id == end_id) text += "<|endoftext|>";
            else if (id < 0 || id >= ids_known) continue;
            else if (called == "bytes") text += char(id);
            else text += require_pairs().bytes(id);
        }
        return text;
    }

private:
    std::string called;
    int64_t ids_known = 257;
    int32_t end_id;
    std::shared_ptr<const BytePairEncoder> pairs;  // shared, so that a Tokenizer can be copied

    const BytePairEncoder& require_pairs() const {
        if (!pairs)
            throw Failure(EXIT_CONFIG,
                          "The gpt2 tokenizer needs vocab.json and merges.txt to read or write text; name their "
                          "folder with --tokenizer-dir (the scripts in data/ write them beside the shards).");
        return *pairs;
    }
};
