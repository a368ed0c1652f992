// The hardware that a step is planned for: rates, memory, links and price of its devices, read from a description such
// as dev/clusters/h20x64.toml (dev/clusters/README.md says what each key means). `plan --cluster` and `--schedule auto`
// read one, `doctor --calibrate` writes one.
#pragma once

#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <variant>

#include "llmc/io/toml.h"

// The part of a rate that is reached, against the number of tokens that a kernel works on: straight lines between the
// points over the logarithm of the tokens, level beyond the first and the last one.
struct Efficiency {
    std::vector<double> tokens = {1}, fraction = {1};

    double operator()(double count) const {
        size_t after = 0;
        while (after < tokens.size() && tokens[after] < count) ++after;
        if (after == 0) return fraction.front();
        if (after == tokens.size()) return fraction.back();
        const double part = std::log(count / tokens[after - 1]) / std::log(tokens[after] / tokens[after - 1]);
        return fraction[after - 1] + part * (fraction[after] - fraction[after - 1]);
    }
};

// From one device to another one, each direction by itself.
struct LinkSpeed {
    double bandwidth = INFINITY;  // GB/s (1e9 bytes) of each device
    double latency = 0;           // microseconds
};

struct Cluster {
    std::string name;
    // Of each device.
    double matrix_tflops = 0, attention_forward_tflops = 0, attention_backward_tflops = 0;
    double memory_bandwidth = INFINITY;  // GB/s, what is read and what is written
    double memory = 0;                   // GB (1e9 bytes)
    double price = 0;                    // dollars an hour, 0: none given
    std::string precision = "bf16";      // of training: element_precisions
    int threads = 1;                     // of a CPU rank, where these were measured
    // How they are joined.
    int devices = 1, devices_per_node = 1;
    int tp = 1;  // devices that stand behind one pipeline rank: a tensor-parallel group with sequence parallelism
    LinkSpeed inside, between;  // nodes
    Efficiency matrix_efficiency, attention_efficiency, attention_backward_efficiency;

    int ranks() const { return devices / tp; }
    // Ranks take the devices in order.
    const LinkSpeed& link(int rank, int other) const {
        const auto node = [&](int r) { return int64_t(r) * tp / devices_per_node; };
        return node(rank) == node(other) ? inside : between;
    }
};

// Where only the rate of products is known: attention as fast, memory and links not in the way.
inline Cluster cluster_of_rate(double gflops) {
    Cluster c;
    c.matrix_tflops = c.attention_forward_tflops = c.attention_backward_tflops = 1e-3 * gflops;
    return c;
}

// This cluster with one rate at a time 20 % lower and 20 % higher, each with what has changed: "matrix products x 0.8".
inline std::vector<std::pair<std::string, Cluster>> with_other_rates(const Cluster& cluster) {
    static const std::pair<const char*, double& (*)(Cluster&)> rates[] = {
        {"matrix products", [](Cluster& c) -> double& { return c.matrix_tflops; }},
        {"attention forward", [](Cluster& c) -> double& { return c.attention_forward_tflops; }},
        {"attention backward", [](Cluster& c) -> double& { return c.attention_backward_tflops; }},
        {"memory bandwidth", [](Cluster& c) -> double& { return c.memory_bandwidth; }},
        {"links inside nodes", [](Cluster& c) -> double& { return c.inside.bandwidth; }},
        {"links between nodes", [](Cluster& c) -> double& { return c.between.bandwidth; }}};
    std::vector<std::pair<std::string, Cluster>> changed;
    for (const auto& [name, rate] : rates)
        for (const auto& [text, factor] : {std::pair(" x 0.8", 0.8), std::pair(" x 1.2", 1.2)}) {
            changed.emplace_back(std::string(name) + text, cluster);
            rate(changed.back().second) *= factor;
        }
    return changed;
}

// bf16: weights, activations and residual stream in 2 bytes, as on GPUs. bf16-fp32: the residual stream in 4, as in a
// build for the CPU. Sums, statistics and gradients of weights always take 4.
inline const std::vector<std::string>& element_precisions() {
    static const std::vector<std::string> all = {"bf16", "bf16-fp32", "fp32"};
    return all;
}

// A key of the description. A number is in [low, high]; whole ones fit into an int.
struct ClusterKey {
    std::string table, key;
    std::variant<double*, int*, std::string*, std::vector<double>*> field;
    double low = 0, high = INFINITY;
    std::string example;  // a value that would do
    bool required = true;
};

inline std::vector<ClusterKey> cluster_keys(Cluster& c) {
    const double tiny = 1e-9, huge = 1e9;
    return {
        {"device", "matrix_tflops", &c.matrix_tflops, tiny, huge, "125"},
        {"device", "attention_forward_tflops", &c.attention_forward_tflops, tiny, huge, "105"},
        {"device", "attention_backward_tflops", &c.attention_backward_tflops, tiny, huge, "95"},
        {"device", "memory_bandwidth", &c.memory_bandwidth, tiny, huge, "4000"},
        {"device", "memory", &c.memory, tiny, huge, "96"},
        {"device", "precision", &c.precision, 0, 0, "\"bf16\"", false},
        {"device", "threads", &c.threads, 1, 1e6, "1", false},
        {"device", "price", &c.price, 0, huge, "2.5", false},
        {"node", "devices", &c.devices_per_node, 1, 1e6, "8"},
        {"node", "bandwidth", &c.inside.bandwidth, tiny, huge, "450"},
        {"node", "latency", &c.inside.latency, 0, huge, "5"},
        {"network", "bandwidth", &c.between.bandwidth, tiny, huge, "50"},
        {"network", "latency", &c.between.latency, 0, huge, "10"},
        {"cluster", "devices", &c.devices, 1, 1e6, "64"},
        {"cluster", "tp", &c.tp, 1, 1e6, "8", false},
        {"efficiency", "matrix_tokens", &c.matrix_efficiency.tokens, 1, 1e12, "[128, 4096]", false},
        {"efficiency", "matrix", &c.matrix_efficiency.fraction, tiny, 10, "[0.5, 1]", false},
        {"efficiency", "attention_tokens", &c.attention_efficiency.tokens, 1, 1e12, "[128, 4096]", false},
        {"efficiency", "attention", &c.attention_efficiency.fraction, tiny, 10, "[0.3, 1]", false},
        {"efficiency", "attention_backward_tokens", &c.attention_backward_efficiency.tokens, 1, 1e12, "[128, 4096]",
         false},
        {"efficiency", "attention_backward", &c.attention_backward_efficiency.fraction, tiny, 10, "[0.3, 1]", false},
    };
}

// Reads values into the field; "", or what is wrong with them.
inline std::string read_cluster_value(const ClusterKey& key, const std::vector<std::string>& values) {
    std::vector<double> numbers;
    if (auto* text = std::get_if<std::string*>(&key.field)) {
        if (values.size() == 1) return **text = values[0], "";
        return "is a list where one value belongs";
    }
    const bool list = std::holds_alternative<std::vector<double>*>(key.field);
    if (list ? values.empty() : values.size() != 1) return list ? "is an empty list" : "is a list, not one number";
    for (const std::string& value : values) {
        double number = 0;
        const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
        if (error != std::errc() || end != value.data() + value.size() || !std::isfinite(number))
            return "is no number: " + value;
        if (number < key.low) return "is " + value + ", less than there can be";
        if (number > key.high) return "is " + value + ", more than there can be";
        numbers.push_back(number);
    }
    if (auto* whole = std::get_if<int*>(&key.field)) {
        if (numbers[0] != std::floor(numbers[0])) return "is " + values[0] + ", no whole number";
        **whole = int(numbers[0]);
    } else if (auto* real = std::get_if<double*>(&key.field)) {
        **real = numbers[0];
    } else {
        *std::get<std::vector<double>*>(key.field) = numbers;
    }
    return "";
}

// A description as text; everything that is wrong with it at once. `file` names it in messages.
inline Cluster parse_cluster(const std::string& file, const std::string& text) {
    Cluster cluster;
    cluster.name = std::filesystem::path(file).stem();
    std::vector<ClusterKey> keys = cluster_keys(cluster);
    std::vector<bool> found(keys.size()), good(keys.size());
    std::vector<std::string> violations;
    const auto refuse = [&](const std::string& where, const std::string& why, const std::string& remedy) {
        violations.push_back(where + " " + why + "; " + remedy);
    };
    for (const TomlEntry& entry : TomlReader(file, text).read()) {
        const std::string where = file + ":" + std::to_string(entry.line) + ": " + entry.key;
        const auto key = std::find_if(keys.begin(), keys.end(), [&](const ClusterKey& k) {
            return k.table == entry.table && k.key == entry.key;
        });
        if (key == keys.end()) {
            refuse(where, "is no key of [" + entry.table + "]", "dev/clusters/README.md lists them");
            continue;
        }
        const size_t n = size_t(key - keys.begin());
        const std::string why = read_cluster_value(*key, entry.values);
        found[n] = true, good[n] = why.empty();
        if (!why.empty()) refuse(where, why, "write for example " + key->key + " = " + key->example);
    }
    for (size_t n = 0; n < keys.size(); ++n)
        if (keys[n].required && !found[n])
            refuse(file + ": [" + keys[n].table + "] " + keys[n].key, "is missing",
                   "write for example " + keys[n].key + " = " + keys[n].example);

    // What must hold between keys, where these could be read.
    const auto read = [&](const char* table, const char* key) {
        for (size_t n = 0; n < keys.size(); ++n)
            if (keys[n].table == table && keys[n].key == key) return good[n] || (!found[n] && !keys[n].required);
        return false;
    };
    if (read("cluster", "tp") && read("cluster", "devices") && cluster.devices % cluster.tp)
        refuse(file + ": [cluster] devices = " + std::to_string(cluster.devices),
               "does not divide into groups of tp = " + std::to_string(cluster.tp),
               "write devices = " + std::to_string(round_up(cluster.devices, cluster.tp)));
    if (read("cluster", "tp") && read("node", "devices") && cluster.devices_per_node % cluster.tp)
        refuse(file + ": [cluster] tp = " + std::to_string(cluster.tp),
               "does not divide the " + std::to_string(cluster.devices_per_node) +
                   " devices of a node, inside which a tensor-parallel group stays",
               "write tp = " + std::to_string(std::gcd(cluster.tp, cluster.devices_per_node)));
    const auto& precisions = element_precisions();
    if (std::find(precisions.begin(), precisions.end(), cluster.precision) == precisions.end())
        refuse(file + ": [device] precision = \"" + cluster.precision + "\"", "is none of bf16, bf16-fp32 and fp32",
               "write precision = \"bf16\"");
    for (const auto& [name, curve] :
         {std::pair("matrix", &cluster.matrix_efficiency), std::pair("attention", &cluster.attention_efficiency),
          std::pair("attention_backward", &cluster.attention_backward_efficiency)}) {
        const std::string tokens = name + std::string("_tokens");
        if (!read("efficiency", name) || !read("efficiency", tokens.c_str())) continue;
        if (curve->tokens.size() != curve->fraction.size())
            refuse(file + ": [efficiency] " + tokens,
                   "has " + std::to_string(curve->tokens.size()) + " values, " + name + " has " +
                       std::to_string(curve->fraction.size()),
                   "write one fraction for each number of tokens");
        if (std::adjacent_find(curve->tokens.begin(), curve->tokens.end(), std::greater_equal<>()) !=
            curve->tokens.end())
            refuse(file + ": [efficiency] " + tokens, "does not rise from value to value",
                   "sort it, each number of tokens once");
    }
    const auto backward =
        std::find_if(keys.begin(), keys.end(), [](const ClusterKey& k) { return k.key == "attention_backward"; });
    if (!found[size_t(backward - keys.begin())]) cluster.attention_backward_efficiency = cluster.attention_efficiency;
    if (!violations.empty()) {
        std::string message = "The cluster description is refused:";
        for (const std::string& violation : violations) message += "\n  - " + violation;
        throw Failure(EXIT_CONFIG, message);
    }
    return cluster;
}

// dev/clusters/ of the working directory, or of the tree in which the program was built.
inline std::filesystem::path clusters_directory() {
    std::error_code error;
    const std::filesystem::path relative = "dev/clusters";
    if (std::filesystem::is_directory(relative, error)) return relative;
    for (std::filesystem::path at = std::filesystem::read_symlink("/proc/self/exe", error); at.has_relative_path();) {
        at = at.parent_path();
        if (std::filesystem::is_directory(at / relative, error)) return at / relative;
    }
    return relative;
}

// A path, or the name of a description in dev/clusters/.
inline Cluster read_cluster(const std::string& name) {
    const bool path = name.find('/') != std::string::npos;
    const std::filesystem::path file = path ? std::filesystem::path(name) : clusters_directory() / (name + ".toml");
    std::error_code error;
    std::ifstream stream(file);
    if (!stream || !std::filesystem::is_regular_file(file, error)) {
        std::vector<std::string> known;
        for (const auto& entry : std::filesystem::directory_iterator(clusters_directory(), error))
            if (entry.path().extension() == ".toml") known.push_back(entry.path().stem());
        std::sort(known.begin(), known.end());
        std::string names;
        for (const std::string& one : known) names += (names.empty() ? "" : ", ") + one;
        throw Failure(EXIT_CONFIG, "--cluster " + name + ": " + file.string() +
                                       " cannot be read; name a description (" +
                                       (names.empty() ? "there are none in dev/clusters" : names) +
                                       "), or the path of one, with a slash in it");
    }
    const std::string text{std::istreambuf_iterator<char>(stream), {}};
    return parse_cluster(file, text);
}
