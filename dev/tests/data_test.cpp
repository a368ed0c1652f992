// From text to chunks: token files, the loader's order and cutting, packing, the tokenizers, and `tokenize`.
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "llmc/commands/tokenize.h"
#include "llmc/data/packing.h"

namespace fs = std::filesystem;
using Ids = std::vector<int32_t>;

constexpr int32_t EOT = 256;

// A directory of the test's own, removed after it.
class Data : public testing::Test {
protected:
    std::string directory;
    void SetUp() override {
        directory = fs::temp_directory_path() / ("data_test." + std::to_string(getpid()));
        create_directories(directory);
    }
    void TearDown() override { remove_tree(directory); }

    std::string path(const std::string& name) const { return directory + "/" + name; }

    std::string text_file(const std::string& name, const std::string& text) const {
        create_directories(fs::path(path(name)).parent_path());
        write_file(path(name), text);
        return path(name);
    }

    // A token file written by hand, independent of TokenWriter; `count` is what its header says.
    std::string token_file(const std::string& name, const Ids& ids, int64_t token_bytes = 2, int64_t count = -1) const {
        const TokenFormat& format = token_formats[token_bytes == 4];
        std::string bytes(size_t(token_header_bytes) + ids.size() * size_t(token_bytes), '\0');
        const int32_t header[3] = {format.magic, format.version, int32_t(count < 0 ? int64_t(ids.size()) : count)};
        std::memcpy(bytes.data(), header, sizeof header);
        for (size_t i = 0; i < ids.size(); i++)
            std::memcpy(&bytes[size_t(token_header_bytes) + i * size_t(token_bytes)], &ids[i], size_t(token_bytes));
        return text_file(name, bytes);
    }

    Loader loader(const std::string& pattern, Packing packing, int64_t context, bool shuffle = false,
                  uint64_t seed = 0) const {
        return {open_token_files(pattern), {packing, context, 257, EOT, seed, shuffle}};
    }
};

static Ids read_tokens(const TokenFile& file) {
    Ids ids(size_t(file.size()));
    file.read(0, file.size(), ids.data());
    return ids;
}

// The message of the Failure that `action` must end in, with the exit code asked for.
template <class Action>
static std::string failure(int exit_code, Action action) {
    try {
        action();
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, exit_code) << failure.what();
        return failure.what();
    }
    ADD_FAILURE() << "accepted, expected exit code " << exit_code;
    return "";
}

static void expect_parts(const std::string& message, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        EXPECT_NE(message.find(part), std::string::npos) << "no '" << part << "' in: " << message;
}

// ---------------------------------------------------------------------------------------------------------------------
// Token files.

TEST_F(Data, TokenFilesOfBothFormatsAreRead) {
    for (int64_t token_bytes : {2, 4}) {
        Ids ids(1000);
        for (size_t i = 0; i < ids.size(); i++) ids[i] = int32_t(i * 61 % (token_bytes == 2 ? 65536 : 200000));
        const TokenFile file(token_file("a.bin", ids, token_bytes));
        EXPECT_EQ(file.size(), 1000);
        EXPECT_EQ(file.token_bytes(), token_bytes);
        EXPECT_EQ(read_tokens(file), ids);
        Ids some(3);
        file.read(501, 3, some.data());
        EXPECT_EQ(some, Ids(ids.begin() + 501, ids.begin() + 504));
    }
}

TEST_F(Data, DamagedTokenFilesAreRefusedWithFileAndOffset) {
    const Ids ids = {EOT, 1, 2, 3};
    const std::string good = read_text_file(token_file("good.bin", ids, 4), 1 << 20);
    const auto with = [&](size_t offset, int32_t value) {
        std::string bytes = good;
        std::memcpy(&bytes[offset], &value, 4);
        return bytes;
    };
    const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
        {"", {"byte 0:", "header"}},
        {good.substr(0, 1023), {"byte 1023:", "header"}},
        {with(0, 0), {"byte 0:", "magic number is 0", "interrupted", "20240520", "20240801"}},
        {with(0, 1234), {"byte 0:", "1234"}},
        {with(0, 20240520), {"byte 4:", "version is 7, expected 1"}},
        {with(4, 3), {"byte 4:", "version is 3, expected 7"}},
        {with(8, 5), {"byte 8:", "counts 5 tokens", "hold 4"}},
        {with(8, -1), {"byte 8:", "counts 4294967295 tokens", "hold 4"}},
        {good.substr(0, good.size() - 4), {"byte 8:", "counts 4 tokens", "hold 3"}},
        {good.substr(0, good.size() - 1), {"byte 1039:", "within an id of 4 bytes"}},
        {good + "abcd", {"byte 8:", "hold 5"}},
    };
    for (const auto& [bytes, parts] : cases) {
        const std::string message = failure(EXIT_DATA, [&] { TokenFile(text_file("bad.bin", bytes)); });
        expect_parts(message, parts);
        expect_parts(message, {path("bad.bin")});
    }
    expect_parts(failure(EXIT_DATA, [&] { TokenFile(path("none.bin")); }), {path("none.bin"), "No such file"});
    expect_parts(failure(EXIT_DATA, [&] { TokenFile file(directory); }), {"not a regular file"});
}

TEST_F(Data, IdsOutsideTheVocabularyAreRefusedWithTheirOffset) {
    for (int64_t token_bytes : {2, 4}) {
        Ids ids(200'000, 7);
        ids[150'001] = 300;
        ids[150'002] = 301;
        const TokenFile file(token_file("a.bin", ids, token_bytes));
        EXPECT_NO_THROW(file.check_vocabulary(302));
        expect_parts(failure(EXIT_DATA, [&] { file.check_vocabulary(257); }),
                     {file.path(), "byte " + std::to_string(1024 + 150'001 * token_bytes), "id 300", "257 ids"});
    }
    // an id that is negative as an int32
    const TokenFile file(token_file("b.bin", {EOT, -5}, 4));
    expect_parts(failure(EXIT_DATA, [&] { file.check_vocabulary(257); }), {"byte 1028", "id 4294967291"});
}

TEST_F(Data, ScanFindsEveryEndOfText) {
    std::mt19937 random(3);
    Ids ids(140'000);
    std::vector<int64_t> expected;
    for (size_t i = 0; i < ids.size(); i++) {
        ids[i] = i < 5000 || random() % 3000 ? int32_t(random() % 256) : EOT;
        if (ids[i] == EOT) expected.push_back(int64_t(i));
    }
    ASSERT_GT(expected.size(), 10u);
    EXPECT_EQ(TokenFile(token_file("a.bin", ids, 2)).scan(257, EOT), expected);
    EXPECT_EQ(TokenFile(token_file("a.bin", ids, 4)).scan(257, EOT), expected);
}

// Sparse files: real sizes, no disk.
TEST_F(Data, ShardsBeyondTwoGibibytesAreRead) {
    const auto sparse = [&](const std::string& name, int64_t token_bytes, int64_t tokens) {
        const TokenFormat& format = token_formats[token_bytes == 4];
        const int32_t header[3] = {format.magic, format.version, int32_t(uint32_t(tokens))};
        text_file(name, std::string(reinterpret_cast<const char*>(header), sizeof header));
        fs::resize_file(path(name), uintmax_t(token_header_bytes + tokens * token_bytes));
        return path(name);
    };
    const auto put = [&](const std::string& file, int64_t offset, int32_t value, int64_t bytes) {
        std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
        stream.seekp(offset).write(reinterpret_cast<const char*>(&value), bytes);
    };
    // More than 2^31 bytes, through the loader. The last window ends one token before the end, its target is the last.
    const int64_t tokens = (int64_t(1) << 30) + 5;
    const std::string file = sparse("bytes.bin", 2, tokens);
    put(file, token_header_bytes + 2 * (tokens - 1), 77, 2);
    const Loader windows = loader(file, Packing::contiguous, 4);
    EXPECT_EQ(windows.samples(), (tokens - 1) / 4);
    EXPECT_EQ(windows.sample(windows.samples() - 1).targets, (Ids{0, 0, 0, 77}));

    // More than 2^32 tokens: the header holds the low 32 bits of the count.
    const int64_t many = (int64_t(1) << 32) + 9;
    const std::string large = sparse("tokens.bin", 4, many);
    put(large, token_header_bytes + 4 * (many - 2), 123456, 4);
    const TokenFile reader(large);
    EXPECT_EQ(reader.size(), many);
    Ids last(2);
    reader.read(many - 2, 2, last.data());
    EXPECT_EQ(last, (Ids{123456, 0}));
    fs::resize_file(large, uintmax_t(token_header_bytes + (many - 1) * 4));
    expect_parts(failure(EXIT_DATA, [&] { TokenFile file(large); }), {"byte 8", "counts 9 tokens", "hold 4294967304"});
}

TEST_F(Data, PatternsAndListsNameShardsInOrder) {
    for (const char* name : {"t_002.bin", "t_000.bin", "t_001.bin", "v_000.bin", "odd[1].bin"})
        token_file(name, {EOT, 1});
    const auto names = [&](const std::string& patterns) {
        std::vector<std::string> names;
        for (const TokenFile& file : open_token_files(patterns)) names.push_back(fs::path(file.path()).filename());
        return names;
    };
    using Names = std::vector<std::string>;
    EXPECT_EQ(names(path("t_*.bin")), (Names{"t_000.bin", "t_001.bin", "t_002.bin"}));
    EXPECT_EQ(names(path("v_000.bin") + "," + path("t_00[01].bin")), (Names{"t_000.bin", "t_001.bin", "v_000.bin"}));
    EXPECT_EQ(names(path("t_000.bin") + "," + path("t_*.bin")), (Names{"t_000.bin", "t_001.bin", "t_002.bin"}));
    EXPECT_EQ(names(path("odd[1].bin")), (Names{"odd[1].bin"}));
    expect_parts(failure(EXIT_DATA, [&] { open_token_files(path("x_*.bin")); }), {"x_*.bin", "tokenize"});
    expect_parts(failure(EXIT_DATA, [&] { open_token_files(""); }), {"No token file was named"});
    token_file("t_003.bin", {EOT, 1}, 4);
    expect_parts(failure(EXIT_DATA, [&] { open_token_files(path("t_*.bin")); }),
                 {"t_000.bin has 2", "t_003.bin has 4"});
}

TEST_F(Data, WriterCutsNoDocumentAndRemovesOldShards) {
    token_file("train_000.bin", {1});
    token_file("train_007.bin", {1});
    text_file("train_notes.bin", "not a shard");
    for (int64_t token_bytes : {2, 4}) {
        TokenWriter writer(path("train_"), token_bytes, 10);
        const std::vector<Ids> documents = {Ids(6, 1), Ids(4, 2), Ids(1, 3), Ids(25, 4), Ids(10, 5)};
        for (const Ids& document : documents) writer.append(document);
        EXPECT_EQ(fs::exists(path("train_007.bin")), token_bytes == 2);  // earlier shards stay until these are whole
        writer.finish();
        EXPECT_FALSE(fs::exists(path("train_007.bin")));
        EXPECT_EQ(writer.size(), 46);
        const std::vector<TokenFile> shards = open_token_files(path("train_0*.bin"));
        ASSERT_EQ(shards.size(), 4u);
        EXPECT_EQ(writer.paths().back(), shards.back().path());
        EXPECT_EQ(read_tokens(shards[0]), (Ids{1, 1, 1, 1, 1, 1, 2, 2, 2, 2}));
        EXPECT_EQ(read_tokens(shards[1]), Ids(1, 3));
        EXPECT_EQ(read_tokens(shards[2]), Ids(25, 4));
        EXPECT_EQ(read_tokens(shards[3]), Ids(10, 5));
        EXPECT_EQ(shards[0].token_bytes(), token_bytes);
    }
    EXPECT_TRUE(fs::exists(path("train_notes.bin")));
}

TEST_F(Data, UnfinishedShardsAreNeverSeen) {
    {
        TokenWriter writer(path("train_"), 2, 100);
        writer.append(Ids{EOT, 1, 2});
        failure(EXIT_DATA, [&] { open_token_files(path("train_*.bin")); });
    }
    EXPECT_FALSE(fs::exists(path("train_000.bin.unfinished")));
    TokenWriter writer(path("train_"), 2, 100);
    writer.append(Ids{EOT, 1, 2});
    writer.finish();
    EXPECT_NO_THROW(open_token_files(path("train_*.bin")));
}

// ---------------------------------------------------------------------------------------------------------------------
// The loader.

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
        EXPECT_EQ(batch.first_sample, sample);
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
            ASSERT_EQ(flat.cu_seqlens.size(), chunk.segments.size() + 1);
            ASSERT_EQ(flat.cu_seqlens.back(), chunk.tokens);
            for (size_t s = 0; s < chunk.segments.size(); s++) {
                const Segment& segment = chunk.segments[s];
                const bool whole = segment.begin == 0 && segment.end == lengths[size_t(segment.sequence)];
                ASSERT_TRUE(whole || chunk.segments.size() == 1);          // a slice is alone in its chunk
                ASSERT_EQ(segment.begin, done[size_t(segment.sequence)]);  // and follows the one before it
                done[size_t(segment.sequence)] = segment.end;
                for (int64_t i = flat.cu_seqlens[s]; i < flat.cu_seqlens[s + 1]; i++) {
                    ASSERT_EQ(flat.positions[size_t(i)], segment.begin + i - flat.cu_seqlens[s]);
                    ASSERT_EQ(flat.targets[size_t(i)], flat.tokens[size_t(i)] + 1);
                    ASSERT_FALSE(seen[size_t(flat.tokens[size_t(i)])]);
                    seen[size_t(flat.tokens[size_t(i)])] = true;
                }
            }
        }
        ASSERT_EQ(done, lengths);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokenizers.

TEST(Tokenizers, Bytes) {
    const Tokenizer tokenizer("bytes");
    EXPECT_EQ(tokenizer.vocab(), 257);
    EXPECT_EQ(tokenizer.end_of_text(), 256);
    std::string all;
    for (int byte = 0; byte < 256; byte++) all += char(byte);
    const Ids ids = tokenizer.encode(all);
    for (int byte = 0; byte < 256; byte++) EXPECT_EQ(ids[size_t(byte)], byte);
    EXPECT_EQ(tokenizer.decode(ids), all);
    EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b', 300, -1}), "a<|endoftext|>b");
    expect_parts(failure(EXIT_CONFIG, [] { Tokenizer("llama"); }), {"'llama'", "bytes or gpt2"});
}

TEST(Tokenizers, Gpt2WithoutItsFilesKnowsItsNumbers) {
    const Tokenizer tokenizer("gpt2");
    EXPECT_EQ(tokenizer.vocab(), 50257);
    EXPECT_EQ(tokenizer.end_of_text(), 50256);
    EXPECT_FALSE(tokenizer.handles_text());
    expect_parts(failure(EXIT_CONFIG, [&] { tokenizer.encode("a"); }), {"vocab.json", "--tokenizer-dir"});
}

// The expectations are what the pattern gives in Python's `regex` and in tiktoken.
TEST(Tokenizers, WordsAreSplitAsGpt2sPatternDoes) {
    const auto words = [](std::string_view text) {
        std::string joined;
        for (std::string_view word : split_words(text)) joined += (joined.empty() ? "" : "|") + std::string(word);
        return joined;
    };
    EXPECT_EQ(words(""), "");
    EXPECT_EQ(words("Hello, world"), "Hello|,| world");
    EXPECT_EQ(words("I'll we've can't 'twas O'Re"), "I|'ll| we|'ve| can|'t| '|twas| O|'|Re");
    EXPECT_EQ(words("x's!'s  'd"), "x|'s|!'|s| | '|d");
    EXPECT_EQ(words("a1b22 33"), "a|1|b|22| 33");
    EXPECT_EQ(words("a  b"), "a| | b");
    EXPECT_EQ(words("a\n\n  b"), "a|\n\n | b");
    EXPECT_EQ(words("a\n\nb"), "a|\n|\n|b");
    EXPECT_EQ(words("a\tb"), "a|\t|b");
    EXPECT_EQ(words("end   "), "end|   ");
    EXPECT_EQ(words(" "), " ");
    EXPECT_EQ(words("naïve café 中文 ½ ٣"), "naïve| café| 中文| ½| ٣");
    EXPECT_EQ(words("a\u00a0b"), "a|\u00a0|b");    // no-break space is white space
    EXPECT_EQ(words("a\u3000 b"), "a|\u3000| b");  // and so is the ideographic one
    EXPECT_EQ(words("x😀 y"), "x|😀| y");
    EXPECT_EQ(words("a\xff\xfe b\xc3"), "a|\xff\xfe| b|\xc3");  // not UTF-8: neither letter nor space
    EXPECT_EQ(words("\xed\xa0\x80"), "\xed\xa0\x80");
}

class BytePairs : public Data {
protected:
    // The 256 bytes, then the merges in order, then end-of-text.
    void write_vocabulary(const std::vector<std::pair<std::string, std::string>>& merges) {
        nlohmann::json vocab;
        const std::array<int32_t, 256> spelling = byte_spelling();
        for (int byte = 0; byte < 256; byte++) vocab[encode_utf8(spelling[size_t(byte)])] = byte;
        std::string lines = "#version: 0.2\n";
        for (const auto& [left, right] : merges) {
            vocab[left + right] = vocab.size();
            lines += left + " " + right + "\n";
        }
        vocab["<|endoftext|>"] = vocab.size();
        text_file("vocab.json", vocab.dump());
        text_file("merges.txt", lines);
    }
};

TEST_F(BytePairs, MergesByRank) {
    write_vocabulary({{"h", "e"}, {"l", "l"}, {"he", "ll"}, {"Ġ", "he"}, {"a", "a"}, {"aa", "aa"}, {"o", "aa"}});
    const Tokenizer tokenizer("gpt2", directory);
    enum { he = 256, ll, hell, _he, aa, aaaa, oaa };
    EXPECT_EQ(tokenizer.vocab(), 264);
    EXPECT_EQ(tokenizer.end_of_text(), 263);
    EXPECT_EQ(tokenizer.encode("hello"), (Ids{hell, 'o'}));
    EXPECT_EQ(tokenizer.encode("he hello"), (Ids{he, ' ', hell, 'o'}));  // "hell" is joined before " he" could be
    EXPECT_EQ(tokenizer.encode("the he"), (Ids{'t', he, _he}));
    EXPECT_EQ(tokenizer.encode("aaaaa"), (Ids{aaaa, 'a'}));
    EXPECT_EQ(tokenizer.encode("aaa"), (Ids{aa, 'a'}));
    EXPECT_EQ(tokenizer.encode("oaaa"), (Ids{oaa, 'a'}));
    EXPECT_EQ(tokenizer.encode("oaaaaa"), (Ids{'o', aaaa, 'a'}));
    EXPECT_EQ(tokenizer.decode(Ids{_he, hell, 263, 'a', 264}), " hehell<|endoftext|>a");
    EXPECT_EQ(tokenizer.decode(tokenizer.encode("<|endoftext|>")), "<|endoftext|>");
    EXPECT_GT(tokenizer.encode("<|endoftext|>").size(), 1u);

    std::mt19937 random(23);
    for (int round = 0; round < 500; round++) {  // any bytes come back
        std::string text(random() % 100, '\0');
        for (char& c : text) c = random() % 2 ? char(random()) : " hela"[random() % 5];
        EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
    }
    EXPECT_EQ(tokenizer.encode(std::string(1'000'000, 'a')).size(), 250'000u);  // not in the square of the length
}

TEST_F(BytePairs, DamagedVocabulariesAreRefused) {
    write_vocabulary({{"h", "e"}});
    const std::string vocab = read_text_file(path("vocab.json"), 1 << 20);
    const auto refused = [&](const std::string& file, const std::string& text, const std::vector<std::string>& parts) {
        write_vocabulary({{"h", "e"}});
        text_file(file, text);
        const std::string message = failure(EXIT_DATA, [&] { Tokenizer("gpt2", directory); });
        expect_parts(message, parts);
        expect_parts(message, {path(file)});
    };
    const auto replaced = [&](const std::string& from, const std::string& to) {
        std::string text = vocab;
        return text.replace(text.find(from), from.size(), to);
    };
    refused("vocab.json", "{", {"not valid JSON"});
    refused("vocab.json", "[1]", {"not a JSON object"});
    refused("vocab.json", replaced("\"he\":256", "\"he\":300"), {"'he' is 300"});
    refused("vocab.json", replaced("\"he\":256", "\"he\":255"), {"once"});
    refused("vocab.json", replaced("\"he\":256", "\"he\":\"x\""), {"'he' is \"x\""});
    refused("vocab.json", replaced("<|endoftext|>", "<|end|>"), {"no token '<|endoftext|>'"});
    refused("vocab.json", replaced("\"A\":65", "\"AA\":65"), {"no token 'A'"});
    refused("merges.txt", "h\n", {"line 1 is 'h'"});
    refused("merges.txt", "#version: 0.2\nh e\nx\n", {"line 3"});
    fs::remove(path("merges.txt"));
    expect_parts(failure(EXIT_DATA, [&] { Tokenizer("gpt2", directory); }), {"merges.txt", "No such file"});
}

// ---------------------------------------------------------------------------------------------------------------------
// The `tokenize` command.

class TokenizeCommand : public Data {
protected:
    TokenizeOptions options;
    void SetUp() override {
        Data::SetUp();
        options.output = path("out");
        options.holdout_every = 0;
    }

    // Runs it; returns what it printed.
    std::string run() {
        testing::internal::CaptureStdout();
        try {
            EXPECT_EQ(tokenize_command(options), 0);
        } catch (...) {
            testing::internal::GetCapturedStdout();
            throw;
        }
        return testing::internal::GetCapturedStdout();
    }
    std::vector<std::string> documents(const std::string& part) {
        std::vector<std::string> documents;
        if (!fs::exists(path("out/" + part + "_000.bin"))) return documents;
        for (const TokenFile& file : open_token_files(path("out/" + part + "_*.bin")))
            for (int32_t id : read_tokens(file))
                if (id == EOT) documents.emplace_back();
                else documents.back() += char(id);
        return documents;
    }
    using Texts = std::vector<std::string>;
};

TEST_F(TokenizeCommand, FilesDirectoriesAndJsonl) {
    text_file("tree/b.h", "second");
    text_file("tree/a/x.h", "first");
    text_file("tree/a/x.c", "not asked for");
    text_file("tree/vector", "third");
    text_file("tree/empty.h", "");
    text_file("tree/binary.h", std::string("\0\1\2", 3));
    text_file("tree/lines.h.jsonl", "{\"text\": \"not asked for either\"}");
    fs::create_symlink(path("tree"), path("tree/a/loop"));
    fs::create_symlink(path("tree/b.h"), path("tree/link.h"));
    fs::create_symlink(path("none"), path("tree/broken.h"));
    const std::string jsonl = text_file(
        "d.jsonl", "{\"text\": \"caf\\u00e9\\n\", \"id\": 1}\n\n{\"text\": \"\"}\r\n{\"id\": 2, \"text\": \"last\"}");
    options.inputs = {path("tree"), jsonl, text_file("single.txt", "named")};
    options.extensions = {"h", ".hh", "none"};
    const std::string printed = run();
    EXPECT_EQ(documents("train"), (Texts{"first", "second", "third", "café\n", "last", "named"}));
    EXPECT_FALSE(fs::exists(path("out/val_000.bin")));
    expect_parts(printed, {"documents  6, 1 passed over", "bytes      31", "tokens     37", "median"});
}

TEST_F(TokenizeCommand, EveryNthDocumentIsHeldOut) {
    std::string lines;
    for (int d = 1; d <= 7; d++) lines += "{\"text\": \"" + std::to_string(d) + "\"}\n";
    options.inputs = {text_file("d.jsonl", lines)};
    options.holdout_every = 3;
    run();
    EXPECT_EQ(documents("train"), (Texts{"1", "2", "4", "5", "7"}));
    EXPECT_EQ(documents("val"), (Texts{"3", "6"}));
    options.holdout_every = 20;  // and what an earlier run left is gone
    expect_parts(run(), {"too few documents for --holdout-every 20"});
    EXPECT_EQ(documents("train").size(), 7u);
    EXPECT_FALSE(fs::exists(path("out/val_000.bin")));
}

TEST_F(TokenizeCommand, TheLimitTakesNamedFilesThenByHashOfThePath) {
    for (int i = 0; i < 100; i++)
        text_file("tree/" + std::to_string(i) + ".txt", std::string(100, char('0' + i % 10)) + std::to_string(i));
    options.inputs = {path("tree"), text_file("own.txt", "the project's own")};
    options.max_bytes = 2000;
    expect_parts(run(), {"left out by --max-bytes"});
    const Texts chosen = documents("train");
    EXPECT_EQ(chosen.size(), 20u);  // 17 bytes, and 19 files of 101 or 102
    EXPECT_EQ(chosen.back(), "the project's own");
    std::set<char> kinds;  // not the first ones by name
    for (const std::string& text : chosen) kinds.insert(text[0]);
    EXPECT_GT(kinds.size(), 4u);
    run();
    EXPECT_EQ(documents("train"), chosen);

    options.inputs = {text_file("d.jsonl", "{\"text\": \"12345\"}\n{\"text\": \"123456\"}\n{\"text\": \"1234\"}\n")};
    options.max_bytes = 10;
    run();
    EXPECT_EQ(documents("train"), (Texts{"12345", "1234"}));
}

TEST_F(TokenizeCommand, SaysWhatIsWrongWithTheInput) {
    const auto refused = [&](const std::string& input, const std::vector<std::string>& parts) {
        options.inputs = {input};
        expect_parts(failure(EXIT_DATA, [&] { run(); }), parts);
    };
    refused(path("nothing.txt"), {path("nothing.txt"), "No such file"});
    create_directories(path("bare"));
    refused(path("bare"), {"No text was found", "--extensions"});
    refused(text_file("a.jsonl", "{\"text\": \"ok\"}\n{\"text\": 3}\n"), {"a.jsonl, line 2", "not a string"});
    refused(text_file("b.jsonl", "{\"text\": \"ok\"}\n\n{\"txt\": \"x\"}\n"), {"b.jsonl, line 3", "no field \"text\""});
    refused(text_file("c.jsonl", "{\"text\": \"cut"), {"c.jsonl, line 1"});
    refused(text_file("d.jsonl", "{\"text\": \"\xff\"}"), {"d.jsonl, line 1", "UTF-8"});
    refused(text_file("e.jsonl", "[1]"), {"e.jsonl, line 1"});
    options.tokenizer = "gpt2";
    options.inputs = {text_file("ok.txt", "ok")};
    expect_parts(failure(EXIT_CONFIG, [&] { run(); }), {"--tokenizer-dir"});
}

TEST_F(TokenizeCommand, NamedFilesAreTakenAsTheyStand) {
    const std::string bytes("\0\xff\n", 3);
    options.inputs = {text_file("any.bin", bytes)};
    run();
    EXPECT_EQ(documents("train"), Texts{bytes});
}
