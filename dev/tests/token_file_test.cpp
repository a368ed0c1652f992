// Token files: both formats, damaged ones, shards.
#include "dev/tests/data_test.h"

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
        EXPECT_NO_THROW(file.scan(302, EOT));
        expect_parts(failure(EXIT_DATA, [&] { file.scan(257, EOT); }),
                     {file.path(), "byte " + std::to_string(1024 + 150'001 * token_bytes), "id 300", "257 ids"});
    }
    // an id that is negative as an int32
    const TokenFile file(token_file("b.bin", {EOT, -5}, 4));
    expect_parts(failure(EXIT_DATA, [&] { file.scan(257, EOT); }), {"byte 1028", "id 4294967291"});
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
