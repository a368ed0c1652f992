// The loader delivers samples, by number: sample(i) depends on i, the files and the options alone, so the whole state
// of a run's data is one number, the global sample index. Called by the training loop and by `eval`.
//
// The shards, in order, are one stream of tokens; the target of a token is the next one of the stream, and end-of-text
// after the last. A sample is a range of the stream:
//   contiguous  the window [kT, kT + T); what is left at the end is dropped
//   documents   end-of-text begins a document, so `EOT t1..tn` trains on `t1..tn EOT`. Documents longer than T are cut
//               into sequences of at most T tokens. A shard's tokens before its first end-of-text are a document, too.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "llmc/data/token_file.h"
#include "llmc/kernels/random.h"

enum class Packing { contiguous, documents };

struct Sample {
    std::vector<int32_t> tokens, targets;  // of equal length; target -1 is ignored
};

struct LoaderOptions {
    Packing packing = Packing::documents;
    int64_t context = 1024;  // T, tokens of the longest sample
    int64_t vocab = 257;     // ids of the tokenizer, all ids are checked against it
    int64_t end_of_text = 256;
    uint64_t seed = 0;
    bool shuffle = true;
};

// A permutation of [0, n) without a table, one for each seed and epoch: a Feistel network on the smallest even number
// of bits that holds n; results outside [0, n) go through it again until they fall inside.
inline int64_t permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch) {
    constexpr uint64_t rounds = 6;
    int half = 1;
    while (n - 1 >= int64_t(1) << (2 * half)) half++;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    uint64_t x = uint64_t(i);
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < rounds; round++) {
            left ^= hash_counter(seed, epoch * rounds + round, right) & mask;
            std::swap(left, right);
        }
        x = left << half | right;
    } while (x >= uint64_t(n));
    return int64_t(x);
}

class Loader {
public:
    Loader(std::vector<TokenFile> files, const LoaderOptions& options) : shards(std::move(files)), options(options) {
        const bool documents = options.packing == Packing::documents;
        bool ends = false;  // whether there is an end-of-text
        for (const TokenFile& file : shards) {
            shard_begin.push_back(stream_length);
            const std::vector<int64_t> found = file.scan(options.vocab, options.end_of_text);
            if (documents) index_documents(file, found);
            ends |= !found.empty();
            stream_length += file.size();
        }
        if (documents) {
            epoch_samples = int64_t(sample_begin.size());
            sample_begin.push_back(stream_length);
        } else {
            epoch_samples = std::max<int64_t>(0, (stream_length - 1) / options.context);
        }
        const std::string names = (shards.empty() ? "no file" : shards[0].path()) + " (" +
                                  std::to_string(shards.size()) + " file(s), " + std::to_string(stream_length) +
                                  " tokens)";
        if (epoch_samples == 0)
            throw Failure(EXIT_DATA, "No sample can be cut from " + names + " at a context of " +
                                         std::to_string(options.context) + "; give more text, or a shorter --context.");
        // The format has no field for the tokenizer, but end-of-text, which stands first, differs.
        const int32_t first = read(0).tokens[0];
        if (!ends && (documents || first == 256 || first == 50256))
            throw Failure(EXIT_DATA, "No end-of-text (" + std::to_string(options.end_of_text) + ") is in " + names +
                                         ", which begins with the id " + std::to_string(first) +
                                         ": it was made with another tokenizer, choose that with --tokenizer.");
    }

    int64_t samples() const { return epoch_samples; }        // in an epoch
    int64_t stream_tokens() const { return stream_length; }  // in all shards

    Sample sample(int64_t global_index) const {
        const int64_t epoch = global_index / epoch_samples, place = global_index % epoch_samples;
        return read(options.shuffle ? permute(place, epoch_samples, options.seed, uint64_t(epoch)) : place);
    }

private:
    std::vector<TokenFile> shards;
    LoaderOptions options;
    std::vector<int64_t> shard_begin;   // [files] each file's first token in the stream
    std::vector<int64_t> sample_begin;  // [samples + 1] the same for each sample, which ends where the next one begins
    int64_t stream_length = 0, epoch_samples = 0;

    // Appends the beginnings of the file's samples, given the positions of its end-of-text tokens.
    void index_documents(const TokenFile& file, const std::vector<int64_t>& found) {
        int64_t begin = 0;
        const auto close_document = [&](int64_t end) {
            for (; begin < end; begin += options.context) sample_begin.push_back(stream_length + begin);
            begin = end;
        };
        for (int64_t position : found) close_document(position);
        close_document(file.size());
    }

    Sample read(int64_t k) const {
        const bool documents = options.packing == Packing::documents;
        const int64_t begin = documents ? sample_begin[k] : k * options.context;
        const int64_t length = documents ? sample_begin[k + 1] - begin : options.context;
        std::vector<int32_t> ids(length + 1);
        copy_stream(begin, length + 1, ids.data());
        return {{ids.begin(), ids.end() - 1}, {ids.begin() + 1, ids.end()}};
    }

    // Copies `count` tokens of the stream, and end-of-text for what lies behind its end.
    void copy_stream(int64_t begin, int64_t count, int32_t* out) const {
        size_t file = size_t(std::upper_bound(shard_begin.begin(), shard_begin.end(), begin) - shard_begin.begin()) - 1;
        for (; count > 0 && file < shards.size(); file++) {
            const int64_t from = begin - shard_begin[file], n = std::min(count, shards[file].size() - from);
            shards[file].read(from, n, out);
            begin += n, out += n, count -= n;
        }
        std::fill_n(out, count, int32_t(options.end_of_text));
    }
};

// The sequences of one step.
struct Batch {
    int64_t next_sample = 0;  // global index of the first sample after these
    std::vector<Sample> sequences;
    int64_t tokens = 0, targets = 0;  // inputs, and targets that are not -1
};

// The samples from `sample_index` on: contiguous, batch_tokens / T windows; documents, as many as fit into
// batch_tokens, and one at least. `end_sample` ends the batch before that sample, such as the epoch's end in
// validation.
inline Batch next_batch(const Loader& loader, int64_t sample_index, int64_t batch_tokens,
                        int64_t end_sample = std::numeric_limits<int64_t>::max()) {
    Batch batch;
    batch.next_sample = sample_index;
    while (batch.next_sample < end_sample) {
        Sample sample = loader.sample(batch.next_sample);
        const int64_t length = int64_t(sample.tokens.size());
        if (batch.tokens > 0 && batch.tokens + length > batch_tokens) break;
        batch.tokens += length;
        batch.targets += length - std::count(sample.targets.begin(), sample.targets.end(), -1);
        batch.sequences.push_back(std::move(sample));
        batch.next_sample++;
    }
    return batch;
}
