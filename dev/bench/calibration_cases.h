// The steps on which calibration.cpp compares plan and run: shapes that calibration never sees, small enough for a
// second or less each. A test of memory takes the same ones.
#pragma once

#include "llmc/data/packing.h"
#include "llmc/parallel/options.h"

struct CalibrationCase {
    std::string schedule;
    int folds;
    Recompute recompute;
    int64_t layers, channels, heads;
    int64_t context, chunk_tokens;  // a longer context is cut into slices, shorter ones share a chunk
    int sequences;                  // of a step
    int64_t vocab;

    std::vector<int64_t> documents = {};  // lengths, in place of `sequences` of the context

    std::vector<int64_t> lengths() const {
        return documents.empty() ? std::vector<int64_t>(size_t(sequences), context) : documents;
    }
    int chunks() const {
        Batch batch;
        for (int64_t length : lengths()) batch.sequences.push_back({std::vector<int32_t>(size_t(length)), {}});
        return int(make_chunks(batch, chunk_tokens).size());
    }
    std::string name() const {
        return schedule + (schedule == "helix" ? " F=" + std::to_string(folds) : "") + ", " +
               recompute_names[int(recompute)] + ", L=" + std::to_string(layers) + " C=" + std::to_string(channels) +
               " m=" + std::to_string(chunks()) + " N=" + std::to_string(chunk_tokens) +
               (context == chunk_tokens ? "" : " T=" + std::to_string(context)) +
               (vocab == 257 ? "" : " V=" + std::to_string(vocab)) + (documents.empty() ? "" : " documents");
    }
    RankOptions options(int rank = 0) const {
        RankOptions options{{layers, channels, heads, context, vocab, round_up(vocab, 64), true},
                            recompute,
                            chunk_tokens,
                            0,
                            256,
                            1,
                            true,
                            {.ranks = 2,
                             .rank = rank,
                             .schedule = schedule,
                             .folds = folds,
                             .max_chunks = chunks(),
                             .min_chunks = chunks()}};
        options.layout.helix.spread_head = spreading_pays(options);  // as training does
        return options;
    }
};

inline std::vector<CalibrationCase> calibration_cases() {
    using enum Recompute;
    return {
        {"1f1b", 1, none, 4, 384, 6, 256, 256, 8, 257},
        {"1f1b", 1, without_attention, 4, 256, 4, 512, 512, 6, 257},
        {"1f1b", 1, full, 3, 384, 6, 384, 384, 5, 257},
        {"1f1b", 1, elementwise, 4, 512, 8, 256, 256, 4, 257},
        {"1f1b", 1, none, 8, 256, 4, 128, 128, 12, 8192},
        {"zb-h1", 1, none, 4, 384, 6, 256, 256, 8, 257},
        {"zb-h1", 1, none, 6, 256, 4, 192, 192, 10, 257},
        {"zb-h1", 1, without_attention, 4, 320, 5, 768, 768, 4, 257},
        {"zb-h1", 1, elementwise, 2, 512, 8, 256, 256, 8, 4096},
        {"interleaved", 1, none, 4, 384, 6, 512, 512, 0, 257, {512, 300, 450, 90, 410, 35, 333, 170, 256, 200}},
        {"interleaved", 1, without_attention, 6, 256, 4, 512, 512, 6, 257},
        {"interleaved", 1, full, 8, 192, 3, 1024, 1024, 3, 257},
        {"gpipe", 1, none, 4, 384, 6, 512, 512, 4, 257},
        {"gpipe", 1, without_attention, 4, 256, 4, 1024, 256, 2, 257},
        {"helix", 1, none, 4, 384, 6, 512, 512, 4, 257},
        {"helix", 1, without_attention, 6, 256, 4, 1024, 1024, 4, 257},
        {"helix", 1, elementwise, 4, 320, 5, 128, 512, 24, 257},
        {"helix", 2, without_attention, 4, 384, 6, 384, 384, 0, 257, {384, 100, 250, 384, 200, 180, 60, 310, 120, 40}},
        {"helix", 2, elementwise, 4, 256, 4, 1024, 1024, 4, 257},
        {"helix", 2, full, 3, 512, 8, 256, 256, 8, 4096},
    };
}
