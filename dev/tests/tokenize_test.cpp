// The command `tokenize`.
#include "dev/tests/data_test.h"
#include "llmc/commands/tokenize.h"

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
