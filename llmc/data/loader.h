// The loader delivers samples, by number: sample(i) depends on i, the files and the options alone, so the whole state of
// a run's data is one number, the global sample index. Called by the training loop and by `eval`.
//
// The shards, in order, are one stream of tokens; the target of a token is the next one of the stream, and end-of-text
// after the last. A sample is a range of the stream:
//   contiguous  the window [kT, kT + T); what is left at the end is dropped
//   documents   end-of-text begins a document, so `EOT t1..tn` trains on `t1..tn EOT`. Documents longer than T are cut
//               into sequences of at most T tokens. A shard's tokens before its first end-of-text are a document, too.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "token_file.h"

enum class Packing { contiguous, documents };

struct Sample {
    std::vector<int32_t> tokens, targets;  // of equal length; target -1 is ignored
};

struct LoaderOptions {
    Packing packing = Packing::documents;
    int64_t context = 1024;       // T, tokens of the longest sample
    int64_t vocab = 257;          // ids of the tokenizer, all ids are checked against it
    int64_t end_of_text = 256;
    uint64_t seed = 0;
    bool shuffle = true;
};

// A permutation of [0, n) without a table: a Feistel network on the smallest even number of bits that holds n, whose
// round function is keyed by `key`; results outside [0, n) go through it again until they fall inside.
inline int64_t permute(int64_t i, int64_t n, uint64_t key) {
    const auto mix = [](uint64_t x) {  // the finalizer of splitmix64
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    };
    int half = 1;
    while (n - 1 >= int64_t(1) << (2 * half)) half++;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    uint64_t x = uint64_t(i);
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 1; round <= 6; round++) {
            left ^= mix(mix(key + round * 0x9e3779b97f4a7c15u) + right) & mask;
            std::swap(left, right);
        }
        x = left << half | right;
    } while (x >= uint64_t(n));
    return int64_t(x);
}

class Loader {
   public:
    Loader(std::vector<TokenFile> files, const LoaderOptions& options) : files_(std::move(files)), options_(options) {
        const bool documents = options.packing == Packing::documents;
        std::vector<std::vector<int64_t>> starts;
        for (const TokenFile& file : files_) {
            file_begin_.push_back(stream_tokens_);
            const std::vector<int64_t> found = file.scan(options.vocab, options.end_of_text);
            if (documents) index_documents(file, found);
            stream_tokens_ += file.size();
        }
        if (documents) {
            samples_ = int64_t(sample_begin_.size());
            sample_begin_.push_back(stream_tokens_);
        } else {
            samples_ = std::max<int64_t>(0, (stream_tokens_ - 1) / options.context);
        }
        if (samples_ == 0)
            throw Failure(EXIT_DATA, "the data hold no sample: " + std::to_string(stream_tokens_) + " tokens in " +
                                         std::to_string(files_.size()) + " file(s), the first is " +
                                         (files_.empty() ? "missing" : files_[0].path()) +
                                         ", and a window of the context needs " + std::to_string(options.context + 1) +
                                         "; give more text or a shorter context");
    }

    const LoaderOptions& options() const { return options_; }
    int64_t samples() const { return samples_; }              // in an epoch
    int64_t stream_tokens() const { return stream_tokens_; }  // in all files

    Sample sample(int64_t global_index) const {
        const int64_t epoch = global_index / samples_, place = global_index % samples_;
        const uint64_t key = options_.seed * 0xd1342543de82ef95u + uint64_t(epoch);
        return read(options_.shuffle ? permute(place, samples_, key) : place);
    }

   private:
    std::vector<TokenFile> files_;
    LoaderOptions options_;
    std::vector<int64_t> file_begin_;    // [files] each file's first token in the stream
    std::vector<int64_t> sample_begin_;  // [samples + 1] the same for each sample, which ends where the next one begins
    int64_t stream_tokens_ = 0, samples_ = 0;

    // Appends the beginnings of the file's samples, given the positions of its end-of-text tokens.
    void index_documents(const TokenFile& file, const std::vector<int64_t>& found) {
        int64_t begin = 0;
        const auto close_document = [&](int64_t end) {
            for (; begin < end; begin += options_.context) sample_begin_.push_back(stream_tokens_ + begin);
            begin = end;
        };
        for (int64_t position : found) close_document(position);
        close_document(file.size());
    }

    Sample read(int64_t k) const {
        const bool documents = options_.packing == Packing::documents;
        const int64_t begin = documents ? sample_begin_[k] : k * options_.context;
        const int64_t length = documents ? sample_begin_[k + 1] - begin : options_.context;
        std::vector<int32_t> ids(length + 1);
        copy_stream(begin, length + 1, ids.data());
        return {{ids.begin(), ids.end() - 1}, {ids.begin() + 1, ids.end()}};
    }

    // Copies `count` tokens of the stream, and end-of-text for what lies behind its end.
    void copy_stream(int64_t begin, int64_t count, int32_t* out) const {
        size_t file = size_t(std::upper_bound(file_begin_.begin(), file_begin_.end(), begin) - file_begin_.begin()) - 1;
        for (; count > 0 && file < files_.size(); file++) {
            const int64_t from = begin - file_begin_[file], n = std::min(count, files_[file].size() - from);
            files_[file].copy(from, n, out);
            begin += n, out += n, count -= n;
        }
        std::fill_n(out, count, int32_t(options_.end_of_text));
    }
};

// The sequences of one step.
struct Batch {
    int64_t first_sample = 0, next_sample = 0;  // global sample indices [first_sample, next_sample)
    std::vector<Sample> sequences;
    int64_t tokens = 0, targets = 0;  // inputs, and targets that are not -1
};

// The samples from `sample_index` on: contiguous, batch_tokens / T windows; documents, as many as fit into batch_tokens,
// and one at least.
inline Batch next_batch(const Loader& loader, int64_t sample_index, int64_t batch_tokens) {
    Batch batch;
    batch.first_sample = batch.next_sample = sample_index;
    while (true) {
        Sample sample = loader.sample(batch.next_sample);
        const int64_t length = int64_t(sample.tokens.size());
        if (batch.tokens > 0 && batch.tokens + length > batch_tokens) return batch;
        batch.tokens += length;
        batch.targets += length - std::count(sample.targets.begin(), sample.targets.end(), -1);
        batch.sequences.push_back(std::move(sample));
        batch.next_sample++;
    }
}
