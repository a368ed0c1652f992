// Cluster descriptions: those of dev/clusters, and what is wrong with bad ones, all at once.
#include <gtest/gtest.h>

#include <map>

#include "llmc/pipeline/cluster.h"

namespace {

std::string replaced(std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
}

const std::string good = R"([device]
matrix_tflops = 125
attention_forward_tflops = 105
attention_backward_tflops = 95
memory_bandwidth = 4000
memory = 96
[node]
devices = 8
bandwidth = 450
latency = 5
[network]
bandwidth = 50
latency = 10
[cluster]
devices = 64
tp = 8
[efficiency]
matrix_tokens = [128, 512, 8192]
matrix = [0.2, 0.6, 1]
)";

// The refusal of a description, which must have all of these words.
void expect_refused(const std::string& text, const std::vector<std::string>& words) {
    try {
        parse_cluster("bad.toml", text);
        ADD_FAILURE() << "not refused";
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, EXIT_CONFIG);
        for (const std::string& word : words)
            EXPECT_NE(std::string(failure.what()).find(word), std::string::npos)
                << failure.what() << "\nlacks " << word;
    }
}

TEST(Cluster, ThoseOfTheTree) {
    const std::map<std::string, int> ranks = {{"h20x64", 8}, {"a800x32", 4}, {"h200x8", 8}, {"h200x64", 8}};
    for (const auto& [name, count] : ranks) {
        const Cluster c = read_cluster(name);
        EXPECT_EQ(c.name, name);
        EXPECT_EQ(c.ranks(), count);
        EXPECT_EQ(c.matrix_efficiency(1e6), 1);
        EXPECT_EQ(c.attention_efficiency(1e6), 1);
    }
    const Cluster h20 = read_cluster("dev/clusters/h20x64.toml");
    EXPECT_EQ(h20.matrix_tflops, 125);
    EXPECT_EQ(h20.attention_forward_tflops, 105);
    EXPECT_EQ(h20.attention_backward_tflops, 95);
    EXPECT_EQ(h20.between.bandwidth, 50);
    EXPECT_EQ(h20.memory, 96);
    EXPECT_EQ(h20.tp, 8);
    EXPECT_EQ(h20.matrix_efficiency(1), 1);
    EXPECT_EQ(&h20.link(0, 1), &h20.between);
    const Cluster h200 = read_cluster("h200x8");
    EXPECT_EQ(&h200.link(0, 7), &h200.inside);
}

TEST(Cluster, EfficiencyBetweenPoints) {
    const Cluster c = parse_cluster("good.toml", good);
    EXPECT_EQ(c.matrix_efficiency(1), 0.2);
    EXPECT_DOUBLE_EQ(c.matrix_efficiency(256), 0.4);  // halfway from 128 to 512
    EXPECT_EQ(c.matrix_efficiency(512), 0.6);
    EXPECT_DOUBLE_EQ(c.matrix_efficiency(2048), 0.8);
    EXPECT_EQ(c.matrix_efficiency(1 << 20), 1);
    EXPECT_EQ(c.attention_efficiency(5), 1);
}

TEST(Cluster, BackwardIsAsEfficientAsForwardUnlessSaid) {
    const std::string forward = "attention_tokens = [64, 1024]\nattention = [0.25, 1]\n";
    const std::string backward = "attention_backward_tokens = [64, 1024]\nattention_backward = [0.5, 1]\n";
    EXPECT_DOUBLE_EQ(parse_cluster("good.toml", good + forward).attention_backward_efficiency(64), 0.25);
    const Cluster c = parse_cluster("good.toml", good + forward + backward);
    EXPECT_DOUBLE_EQ(c.attention_efficiency(64), 0.25);
    EXPECT_DOUBLE_EQ(c.attention_backward_efficiency(64), 0.5);
    expect_refused(good + forward + "attention_backward = [0.5, 1]\n",
                   {"attention_backward_tokens has 1 values, attention_backward has 2"});
}

TEST(Cluster, WrongValuesAreNamedAllAtOnce) {
    std::string text = replaced(good, "= 125", "= fast");
    text = replaced(text, "memory = 96\n", "");
    text = replaced(text, "bandwidth = 50\n", "bandwidth = -50\n");
    text = replaced(text, "[network]", "[network]\nspeed = 3");
    text = replaced(text, "[0.2, 0.6, 1]", "[0.2, 1]");
    expect_refused(
        text, {"bad.toml:2: matrix_tflops is no number: fast; write for example matrix_tflops = 125",
               "[device] memory is missing; write for example memory = 96", "bandwidth is -50, less than there can be",
               "speed is no key of [network]", "matrix_tokens has 3 values, matrix has 2"});
}

TEST(Cluster, Refusals) {
    expect_refused("", {"matrix_tflops is missing", "[cluster] devices is missing"});
    expect_refused(replaced(good, "tp = 8", "tp = 3"),
                   {"devices = 64 does not divide into groups of tp = 3", "write devices = 66",
                    "tp = 3 does not divide the 8", "tp = 1"});
    expect_refused(replaced(good, "tp = 8", "tp = 2.5"), {"tp is 2.5, no whole number"});
    expect_refused(replaced(good, "tp = 8", "tp = [1, 2]"), {"tp is a list, not one number"});
    expect_refused(replaced(good, "tp = 8", "tp = 1e300"), {"more than there can be"});
    expect_refused(replaced(good, "= 96", "= inf"), {"memory is no number: inf"});
    expect_refused(replaced(good, "= 96", "= nan"), {"memory is no number: nan"});
    expect_refused(replaced(good, "= 96", "= 96\nprecision = \"int8\""), {"is none of bf16, bf16-fp32 and fp32"});
    expect_refused(replaced(good, "[128, 512, 8192]", "[128, 128, 8192]"), {"does not rise from value to value"});
    expect_refused(replaced(good, "[128, 512, 8192]", "[]"), {"is an empty list"});
    expect_refused(replaced(good, "tp = 8", "tp = 8\ntp = 4"), {"'tp' is set twice"});
    EXPECT_THROW(read_cluster("no-such-cluster"), Failure);
    EXPECT_THROW(read_cluster("./no-such-cluster.toml"), Failure);
    EXPECT_THROW(read_cluster("dev/clusters/"), Failure);
}

}  // namespace
