// The tokenizers: bytes, and byte pairs as GPT-2 has them.
#include "dev/tests/data_test.h"
#include "llmc/data/tokenizer.h"

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
