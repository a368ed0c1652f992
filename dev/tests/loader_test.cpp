// The order in which the loader gives samples, and how they are cut; the packing of samples into chunks.
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "dev/tests/data_test.h"
#include "llmc/data/packing.h"

TEST_F(Data, ContiguousWindowsCrossShards) {
    token_file("a_0.bin", {0, 1, 2, 3, 4});
    token_file("a_1.bin", {5, 6});
    token_file("a_2.bin", {7, 8, 9, 10, 11});
    const Loader windows = loader(path("a_*.bin"), Packing::contiguous, 4);
    ASSERT_EQ(windows.samples(), 2);  // the window [8, 12) has no target for its last token
    for (int32_t k = 0; k < 2; k++) {
        EXPECT_EQ(windows.sample(k).tokens, (Ids{4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3}));
        EXPECT_EQ(windows.sample(k).targets, (Ids{4 * k + 1, 4 * k + 2, 4 * k + 3, 4 * k + 4}));
    }
    EXPECT_EQ(loader(path("a_*.bin"), Packing::contiguous, 11).samples(), 1);
    expect_parts(failure(EXIT_DATA, [&] { loader(path("a_*.bin"), Packing::contiguous, 12); }),
                 {"a_0.bin", "12 tokens", "context of 12"});
}

TEST_F(Data, DocumentsTrainFromEndOfTextToEndOfText) {
    token_file("a_0.bin", {EOT, 1, 2, 3, EOT, EOT, 4, 5, 6, 7, 8, 9, 10});
    token_file("a_1.bin", {EOT, 11});
    token_file("a_2.bin", {12, 13, EOT, 14});
    const Loader documents = loader(path("a_*.bin"), Packing::documents, 4);
    const std::vector<Sample> expected = {
        {{EOT, 1, 2, 3}, {1, 2, 3, EOT}},
        {{EOT}, {EOT}},                  // an empty document
        {{EOT, 4, 5, 6}, {4, 5, 6, 7}},  // one longer than the context, in two sequences
        {{7, 8, 9, 10}, {8, 9, 10, EOT}},
        {{EOT, 11}, {11, 12}},  // what a_2 begins with goes on where a_1 ended,
        {{12, 13}, {13, EOT}},  // and is a document of its own
        {{EOT, 14}, {14, EOT}},
    };
    ASSERT_EQ(documents.samples(), int64_t(expected.size()));
    for (size_t k = 0; k < expected.size(); k++) {
        EXPECT_EQ(documents.sample(int64_t(k)).tokens, expected[k].tokens) << "sample " << k;
        EXPECT_EQ(documents.sample(int64_t(k)).targets, expected[k].targets) << "sample " << k;
    }
}

TEST_F(Data, AnotherTokenizersFilesAreRefused) {
    token_file("bytes.bin", {256, 1, 2, 3});
    token_file("plain.bin", {1, 2, 3, 4});
    const auto open_as_gpt2 = [&](const std::string& name, Packing packing) {
        return Loader(open_token_files(path(name)), {packing, 2, 50257, 50256, 0, false}).samples();
    };
    for (const Packing packing : {Packing::contiguous, Packing::documents})
        expect_parts(failure(EXIT_DATA, [&] { open_as_gpt2("bytes.bin", packing); }),
                     {"bytes.bin", "id 256", "(50256)", "--tokenizer"});
    expect_parts(failure(EXIT_DATA, [&] { open_as_gpt2("plain.bin", Packing::documents); }), {"plain.bin", "(50256)"});
    EXPECT_EQ(open_as_gpt2("plain.bin", Packing::contiguous), 1);  // a stream needs no documents
    token_file("empty.bin", {});
    expect_parts(failure(EXIT_DATA, [&] { loader(path("empty.bin"), Packing::documents, 4); }),
                 {"No sample", "empty.bin"});
}

// Random documents in random shards, against the rule applied to the documents themselves.
TEST_F(Data, EveryTargetIsTrainedOnce) {
    std::mt19937 random(11);
    for (int round = 0; round < 12; round++) {
        const int64_t context = 1 + int64_t(random() % 20);
        std::vector<Sample> expected;
        Ids shard, stream;
        TokenWriter writer(path("r_"), round % 2 ? 2 : 4, 50 + int64_t(random() % 500));
        for (int d = 0; d < 40; d++) {
            Ids document = {EOT};
            for (uint32_t n = random() % 60; n > 0; n--) document.push_back(int32_t(random() % 256));
            writer.append(document);
            document.push_back(EOT);
            for (int64_t begin = 0; begin + 1 < int64_t(document.size()); begin += context) {
                const int64_t end = std::min(begin + context, int64_t(document.size()) - 1);
                expected.push_back({Ids(document.begin() + begin, document.begin() + end),
                                    Ids(document.begin() + begin + 1, document.begin() + end + 1)});
            }
        }
        writer.finish();
        const Loader ordered = loader(path("r_*.bin"), Packing::documents, context);
        ASSERT_EQ(ordered.samples(), int64_t(expected.size()));
        for (int64_t k = 0; k < ordered.samples(); k++) {
            ASSERT_EQ(ordered.sample(k).tokens, expected[size_t(k)].tokens);
            ASSERT_EQ(ordered.sample(k).targets, expected[size_t(k)].targets);
        }
        // Shuffled, an epoch has the same samples.
        const Loader shuffled = loader(path("r_*.bin"), Packing::documents, context, true, uint64_t(round));
        std::multiset<Ids> in_order, in_epoch;
        for (int64_t k = 0; k < ordered.samples(); k++) {
            in_order.insert(ordered.sample(k).tokens);
            in_epoch.insert(shuffled.sample(shuffled.samples() * 3 + k).tokens);
        }
        EXPECT_EQ(in_order, in_epoch);
    }
}

TEST(Permutation, IsOneToOneAndChangesWithTheEpoch) {
    for (int64_t n : {1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097}) {
        std::set<int64_t> seen;
        for (int64_t i = 0; i < n; i++) {
            const int64_t j = permute(i, n, 42, 3);
            ASSERT_TRUE(j >= 0 && j < n);
            seen.insert(j);
        }
        EXPECT_EQ(int64_t(seen.size()), n);
    }
    // Few fixed points, and another order in another epoch: 1 agreement expected, each.
    int fixed = 0, same = 0;
    for (int64_t i = 0; i < 1000; i++) {
        fixed += permute(i, 1000, 1, 0) == i;
        same += permute(i, 1000, 1, 0) == permute(i, 1000, 1, 1);
    }
    EXPECT_LT(fixed, 10);
    EXPECT_LT(same, 10);
    // Large n without a table.
    const int64_t n = int64_t(1) << 40;
    for (int64_t i = 0; i < 1000; i++) EXPECT_LT(permute(i * 12345, n - 7, 5, 0), n - 7);
}

// Where each element goes is uniform: over many seeds, position 0 reaches each of 8 places equally often.
TEST(Permutation, IsUniform) {
    int counts[8] = {};
    for (uint64_t seed = 0; seed < 8000; seed++) counts[permute(0, 8, seed, 0)]++;
    for (int count : counts) EXPECT_NEAR(count, 1000, 150);  // 5 standard deviations
}

TEST_F(Data, EpochAndSeedChangeTheOrder) {
    Ids stream(4001);
    for (size_t i = 0; i < stream.size(); i++) stream[i] = int32_t(i % 251);
    token_file("a.bin", stream);
    const auto order = [&](uint64_t seed, int64_t epoch) {
        const Loader l = loader(path("a.bin"), Packing::contiguous, 4, true, seed);
        std::vector<Ids> samples;
        for (int64_t k = 0; k < 200; k++) samples.push_back(l.sample(epoch * l.samples() + k).tokens);
        return samples;
    };
    EXPECT_EQ(order(1, 0), order(1, 0));
    EXPECT_NE(order(1, 0), order(2, 0));
    EXPECT_NE(order(1, 0), order(1, 1));
}

TEST_F(Data, BatchesFollowFromTheSampleIndexAlone) {
    TokenWriter writer(path("a_"), 2, 1000);
    std::mt19937 random(5);
    for (int d = 0; d < 100; d++) {
        Ids document(1 + random() % 50, int32_t(d % 256));
        document[0] = EOT;
        writer.append(document);
    }
    writer.finish();
    const Loader documents = loader(path("a_*.bin"), Packing::documents, 32, true, 9);
    int64_t sample = 0, tokens = 0;
    while (sample < documents.samples()) {
        const Batch batch = next_batch(documents, sample, 100, documents.samples());
        const Batch again =
            next_batch(loader(path("a_*.bin"), Packing::documents, 32, true, 9), sample, 100, documents.samples());
        EXPECT_EQ(batch.next_sample - sample, int64_t(batch.sequences.size()));
        EXPECT_GE(batch.sequences.size(), 1u);
        EXPECT_LE(batch.tokens, 100);
        EXPECT_EQ(batch.targets, batch.tokens);
        ASSERT_EQ(again.sequences.size(), batch.sequences.size());
        for (size_t s = 0; s < batch.sequences.size(); s++)
            EXPECT_EQ(again.sequences[s].tokens, batch.sequences[s].tokens);
        if (batch.next_sample < documents.samples()) {  // the next one would not have fitted
            EXPECT_GT(batch.tokens + int64_t(documents.sample(batch.next_sample).tokens.size()), 100);
        }
        sample = batch.next_sample;
        tokens += batch.tokens;
    }
    EXPECT_EQ(tokens, documents.stream_tokens());
    EXPECT_EQ(next_batch(documents, 0, 1).sequences.size(), 1u);  // one at least

    const Loader windows = loader(path("a_*.bin"), Packing::contiguous, 32, true, 9);
    const Batch batch = next_batch(windows, windows.samples() - 1, 96);  // goes on into the next epoch
    EXPECT_EQ(batch.tokens, 96);
    EXPECT_EQ(batch.next_sample, windows.samples() + 2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

static Batch batch_of(const std::vector<int64_t>& lengths) {
    Batch batch;
    int32_t next = 0;
    for (int64_t length : lengths) {
        Sample sample;
        for (int64_t i = 0; i < length; i++) {
            sample.tokens.push_back(next);
            sample.targets.push_back(++next);
        }
        batch.tokens += length;
        batch.sequences.push_back(sample);
    }
    return batch;
}

static std::string describe(const std::vector<Chunk>& chunks) {  // sequence:begin-end, chunks apart by |
    std::string text;
    for (const Chunk& chunk : chunks) {
        if (!text.empty()) text += "|";
        for (const Segment& s : chunk.segments)
            text += " " + std::to_string(s.sequence) + ":" + std::to_string(s.begin) + "-" + std::to_string(s.end);
    }
    return text;
}

TEST(Packing, FirstFitDecreasingAndSlices) {
    EXPECT_EQ(describe(make_chunks(batch_of({3, 5, 25, 5, 10, 2}), 10)),
              " 2:0-10| 2:10-20| 2:20-25| 4:0-10| 1:0-5 3:0-5| 0:0-3 5:0-2");
    EXPECT_EQ(describe(make_chunks(batch_of({4, 4, 4, 4, 4}), 8)), " 0:0-4 1:0-4| 2:0-4 3:0-4| 4:0-4");
    EXPECT_EQ(describe(make_chunks(batch_of({8, 16}), 8)), " 1:0-8| 1:8-16| 0:0-8");
    EXPECT_EQ(describe(make_chunks(batch_of({1, 2, 3}), 100)), " 2:0-3 1:0-2 0:0-1");
    EXPECT_TRUE(make_chunks(Batch{}, 8).empty());
}

TEST(Packing, EveryTokenIsInOneChunk) {
    std::mt19937 random(17);
    for (int round = 0; round < 200; round++) {
        std::vector<int64_t> lengths(1 + random() % 40);
        for (int64_t& length : lengths) length = 1 + int64_t(random() % 60);
        const int64_t chunk_tokens = 1 + int64_t(random() % 70);
        const Batch batch = batch_of(lengths);
        std::vector<int64_t> done(lengths.size());
        std::vector<bool> seen(size_t(batch.tokens));
        for (const Chunk& chunk : make_chunks(batch, chunk_tokens)) {
            const ChunkTokens flat = gather_chunk(batch, chunk);
            ASSERT_LE(chunk.tokens, chunk_tokens);
            ASSERT_EQ(int64_t(flat.tokens.size()), chunk.tokens);
            int64_t row = 0;
            for (const Segment& segment : chunk.segments) {
                const bool whole = segment.begin == 0 && segment.end == lengths[size_t(segment.sequence)];
                ASSERT_TRUE(whole || chunk.segments.size() == 1);          // a slice is alone in its chunk
                ASSERT_EQ(segment.begin, done[size_t(segment.sequence)]);  // and follows the one before it
                done[size_t(segment.sequence)] = segment.end;
                for (int64_t position = segment.begin; position < segment.end; position++, row++) {
                    ASSERT_EQ(flat.positions[size_t(row)], position);
                    ASSERT_EQ(flat.targets[size_t(row)], flat.tokens[size_t(row)] + 1);
                    ASSERT_FALSE(seen[size_t(flat.tokens[size_t(row)])]);
                    seen[size_t(flat.tokens[size_t(row)])] = true;
                }
            }
            ASSERT_EQ(row, chunk.tokens);
        }
        ASSERT_EQ(done, lengths);
    }
}
