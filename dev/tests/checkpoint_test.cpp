// Checkpoints and the files they are made of: every value comes back bit for bit, damage is named and survived, and a
// save that is killed at any moment leaves a run that loads.
#include <fstream>
#include <functional>
#include <random>
#include <regex>

// fork, ptrace: processes that are killed while they save
#include <csignal>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

#include <gtest/gtest.h>

#include "llmc/io/checkpoint.h"

namespace fs = std::filesystem;

// A directory that ends with the test.
struct TemporaryDirectory {
    std::string path;
    explicit TemporaryDirectory(const std::string& parent = "") {
        std::string name = (parent.empty() ? fs::temp_directory_path().string() : parent) + "/checkpoint_test.XXXXXX";
        if (!mkdtemp(name.data())) throw std::runtime_error("mkdtemp failed");
        path = name;
    }
    ~TemporaryDirectory() { fs::remove_all(path); }
    operator std::string() const { return path; }
};

// A model with buffers that a checkpoint can be made of. Values are a function of (step, buffer, element).
struct TestModel {
    GptConfig config;
    std::vector<Parameter> parameters;
    std::vector<floatS> master, m, v;

    explicit TestModel(GptConfig config = {2, 24, 3, 9, 37, 64, true})
        : config(config), parameters(parameter_table(config)) {
        for (auto* buffer : {&master, &m, &v}) buffer->assign(size_t(flat_size(parameters)), floatS(-7));
    }
    CheckpointView view() { return {config, parameters, master.data(), m.data(), v.data()}; }

    // Padding of the vocabulary is zero, as in training.
    TestModel& fill(int64_t step) {
        int kind = 0;
        for (auto* buffer : {&master, &m, &v}) {
            std::fill(buffer->begin(), buffer->end(), floatS(0));
            kind++;
            for (const Parameter& p : parameters) {
                const StoredForm form = stored_form(config, p);
                for (int64_t i = 0; i < form.rows() * form.columns(); ++i)
                    (*buffer)[size_t(p.offset + i)] = floatS(step) + floatS(kind) / 8 + floatS(p.offset + i) / 1024;
            }
        }
        return *this;
    }
    bool operator==(const TestModel& other) const { return master == other.master && m == other.m && v == other.v; }
};

TrainingState state_at(int64_t step) {
    TrainingState state;
    state.step = step;
    state.sample_index = 8 * step;
    state.seed = 0xfedcba9876543210u;
    state.tokenizer = "bytes";
    state.end_of_text = 36;
    state.configuration = "steps = 40\npath = \"\xff\"\n";  // not UTF-8
    state.schedule = {{"kind", "cosine"}, {"lr", 6e-4}};
    return state;
}

void save(const std::string& run, int64_t step, int keep = 0, int64_t shard_bytes = shard_bytes_default) {
    save_checkpoint(run, TestModel().fill(step).view(), state_at(step), keep, shard_bytes);
}

// The step that a run resumes from, with all values checked; -1 when there is no checkpoint.
int64_t resumed_step(const std::string& run, std::vector<std::string>* notes = nullptr) {
    TestModel loaded;
    const std::optional<TrainingState> state = load_latest_checkpoint(run, loaded.view());
    if (!state) return -1;
    EXPECT_TRUE(loaded == TestModel().fill(state->step)) << "step " << state->step;
    EXPECT_EQ(state->sample_index, 8 * state->step);
    if (notes) *notes = state->notes;
    return state->step;
}

std::string text_of(const std::string& path) { return read_text_file(path, 1 << 20); }
void put(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// Checks that `action` fails with `code` and a message that has each of `phrases`.
void expect_failure(int code, const std::vector<std::string>& phrases, const std::function<void()>& action) {
    try {
        action();
        ADD_FAILURE() << "no failure, expected one with: " << phrases.front();
    } catch (const Failure& failure) {
        EXPECT_EQ(failure.exit_code, code) << failure.what();
        for (const std::string& phrase : phrases)
            EXPECT_NE(std::string(failure.what()).find(phrase), std::string::npos)
                << phrase << "\nnot in: " << failure.what();
    }
}

// A safetensors file from a header and data, without the writer.
std::string raw_safetensors(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

template <class T>
std::string bytes_of(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// ---------------------------------------------------------------------------------------------------------------------
TEST(Safetensors, WrittenFileHasTheFormat) {
    const TemporaryDirectory dir;
    const std::vector<float> values = {1, 2, 3, 4, 5, 6};
    SafetensorsWriter writer(dir.path + "/a",
                             {{"b", "F32", {2, 3}, 0, 0}, {"a", "F64", {}, 0, 0}, {"none", "F32", {0, 4}, 0, 0}});
    const double scalar = 0.1;
    writer.append(values.data(), 4);
    writer.append(values.data() + 4, 2);
    writer.append(&scalar, 1);
    const FileRecord record = writer.finish();

    const std::string text = text_of(dir.path + "/a");
    uint64_t length;
    std::memcpy(&length, text.data(), 8);
    const nlohmann::json header = nlohmann::json::parse(text.substr(8, length));
    EXPECT_EQ(length % 8, 0u);
    EXPECT_EQ(header["__metadata__"]["format"], "pt");
    EXPECT_EQ(header["b"]["data_offsets"], nlohmann::json({0, 24}));
    EXPECT_EQ(header["a"]["data_offsets"], nlohmann::json({24, 32}));
    EXPECT_EQ(text.substr(8 + length), bytes_of(values) + bytes_of(std::vector<double>{scalar}));
    EXPECT_EQ(record, record_of(dir.path + "/a"));
    EXPECT_EQ(record.hash, hash_of(text));
    EXPECT_EQ(hash_of(""), "99aa06d3014798d86001c324468d497f");  // XXH3's published value

    const SafetensorsReader reader(dir.path + "/a");
    float part[3];
    reader.read_range(*reader.find("b"), 2, 3, part);
    EXPECT_EQ(part[0], 3);
    EXPECT_EQ(part[2], 5);
    EXPECT_EQ(reader.find("none")->elements(), 0);
    EXPECT_EQ(reader.find("c"), nullptr);
    EXPECT_THROW(reader.read_range(*reader.find("b"), 4, 3, part), std::logic_error);
}

TEST(Safetensors, EveryFloatingTypeConverts) {
    const TemporaryDirectory dir;
    const std::vector<float> expected = {0,        -0.0f, 1, -2.5f, 65504, 6.103515625e-05f, 5.9604644775390625e-08f,
                                         INFINITY, NAN};
    const std::vector<uint16_t> half = {0, 0x8000, 0x3c00, 0xc100, 0x7bff, 0x0400, 0x0001, 0x7c00, 0x7e00};
    std::vector<uint16_t> brain;
    std::vector<double> wide;
    for (float x : expected) {
        brain.push_back(uint16_t(std::bit_cast<uint32_t>(x) >> 16));
        wide.push_back(x);
    }
    put(dir.path + "/a",
        raw_safetensors(R"({"F16":{"dtype":"F16","shape":[9],"data_offsets":[0,18]},
        "BF16":{"dtype":"BF16","shape":[9],"data_offsets":[18,36]},"F64":{"dtype":"F64","shape":[9],"data_offsets":[36,108]},
        "F32":{"dtype":"F32","shape":[9],"data_offsets":[108,144]},"I64":{"dtype":"I64","shape":[1],"data_offsets":[144,152]}})",
                        bytes_of(half) + bytes_of(brain) + bytes_of(wide) + bytes_of(expected) + std::string(8, 'x')));
    const SafetensorsReader reader(dir.path + "/a");
    for (const char* name : {"F16", "BF16", "F32", "F64"}) {
        float narrow[9];
        double number[9];
        reader.read_range(*reader.find(name), 0, 9, narrow);
        reader.read_range(*reader.find(name), 0, 9, number);
        for (int i = 0; i < 9; i++) {
            const float exact = std::string(name) == "BF16" ? std::bit_cast<float>(uint32_t(brain[size_t(i)]) << 16)
                                                            : expected[size_t(i)];
            EXPECT_EQ(std::isnan(narrow[i]), std::isnan(exact)) << name << " " << i;
            if (std::isnan(exact)) continue;
            EXPECT_EQ(narrow[i], exact) << name << " " << i;
            EXPECT_EQ(std::signbit(narrow[i]), std::signbit(exact)) << name << " " << i;
            EXPECT_EQ(number[i], double(exact)) << name << " " << i;
        }
    }
    float one;
    expect_failure(EXIT_DATA, {"I64"}, [&] { reader.read_range(*reader.find("I64"), 0, 1, &one); });
}

TEST(Safetensors, UnsoundFilesAreRefused) {
    const TemporaryDirectory dir;
    const std::string path = dir.path + "/a", four(4, '\0'), eight(8, '\0');
    const auto tensor = [](const std::string& name, const std::string& dtype, const std::string& shape,
                           const std::string& offsets) {
        return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" + offsets +
               "]}";
    };
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"", "too few"},
        {std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8), "claims a header of 18446744073709551615"},
        {std::string("\x64\0\0\0\0\0\0\0{}", 10), "claims a header of 100 bytes in a file of 10"},
        {raw_safetensors("", ""), "begin with '{'"},
        {raw_safetensors(" {}", ""), "begin with '{'"},
        {raw_safetensors("{", ""), "not valid JSON"},
        {raw_safetensors("{} x", ""), "not valid JSON"},
        {raw_safetensors("{\"a\":\"\xff\"}", ""), "not valid JSON"},
        {raw_safetensors("{\"a\":1}", ""), "no \"dtype\""},
        {raw_safetensors("{\"a\":" + std::string(60, '[') + std::string(60, ']') + "}", ""), "nested"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "0,4") + "}", ""), "bytes 0 to 4 of 0"},
        {raw_safetensors("{" + tensor("a", "F31", "1", "0,4") + "}", four), "unknown type \"F31\""},
        {raw_safetensors("{" + tensor("a", "F32", "2", "0,4") + "}", four), "needs 8"},
        {raw_safetensors("{" + tensor("a", "F32", "-1", "0,4") + "}", four), "integer"},
        {raw_safetensors("{" + tensor("a", "F32", "1.0", "0,4") + "}", four), "integer"},
        {raw_safetensors("{" + tensor("a", "F32", "1e400", "0,4") + "}", four), "not valid JSON"},
        {raw_safetensors("{" + tensor("a", "F32", "4611686018427387905", "0,4") + "}", four), "beyond 2^63"},
        {raw_safetensors("{" + tensor("a", "F32", "4294967296,4294967296", "0,0") + "}", ""), "beyond 2^63"},
        {raw_safetensors("{" + tensor("a", "F32", "18446744073709551615", "0,4") + "}", four), "integer"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "4,0") + "}", four), "bytes 4 to 0"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "4,8") + "}", eight), "0 is where"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "0,4") + "}", eight),
         "8 bytes of data where its header describes 4"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "0,4") + "," + tensor("b", "F32", "1", "0,4") + "}", four),
         "where the one before ends"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "0,4") + "," + tensor("a", "F32", "1", "4,8") + "}", eight),
         "twice"},
        {raw_safetensors("{" + tensor("a", "F32", "1", "0,4,4") + "}", four), "two numbers"},
    };
    for (const auto& [file, phrase] : cases) {
        put(path, file);
        expect_failure(EXIT_DATA, {path, phrase}, [&] { SafetensorsReader reader(path); });
    }
    expect_failure(EXIT_DATA, {"regular"}, [&] { SafetensorsReader reader(dir.path); });
    expect_failure(EXIT_DATA, {"No such file"}, [&] { SafetensorsReader reader(dir.path + "/none"); });
    put(path, raw_safetensors("{}  ", ""));
    EXPECT_TRUE(SafetensorsReader(path).tensors().empty());
}

// ---------------------------------------------------------------------------------------------------------------------
TEST(HuggingFace, LinearWeightsAreTransposedVectorsAreFlatPaddingIsDropped) {
    const std::map<std::string, std::vector<int64_t>> expected = {
        {"wte.weight", {37, 24}}, {"h.1.attn.c_attn.weight", {24, 72}}, {"h.1.mlp.c_proj.weight", {96, 24}}};
    TestModel model;
    for (const Parameter& p : model.parameters) {
        const StoredForm form = stored_form(model.config, p);
        EXPECT_EQ(form.shape.size(), p.rows > 1 ? 2u : 1u) << p.name;
        if (expected.contains(p.name)) { EXPECT_EQ(form.shape, expected.at(p.name)) << p.name; }
    }
    const TemporaryDirectory run;
    save(run, 1);
    model.fill(1);
    const SafetensorsReader file(run.path + "/checkpoints/step-00000001/model.safetensors");
    for (const Parameter& p : model.parameters)
        if (p.name == "h.1.attn.c_attn.weight") {
            floatS value;
            file.read_range(*file.find("transformer." + p.name), 5 * 72 + 70, 1, &value);  // [in 5, out 70]
            EXPECT_EQ(value, model.master[size_t(p.offset + 70 * 24 + 5)]);                // [out 70, in 5]
        }
}

TEST(HuggingFace, ContextOfOneStaysAMatrix) {
    TestModel model({1, 8, 2, 1, 5, 64, true}), loaded(model.config);
    const TemporaryDirectory run;
    save_checkpoint(run, model.fill(1).view(), state_at(1), 0);
    const SafetensorsReader file(run.path + "/checkpoints/step-00000001/model.safetensors");
    EXPECT_EQ(file.find("transformer.wpe.weight")->shape, (std::vector<int64_t>{1, 8}));
    load_checkpoint(run, loaded.view(), Restore::all);
    EXPECT_TRUE(loaded == model);
}

// Rewrites a checkpoint's weights as other programs might have saved them.
void rewrite(const std::string& from, const std::string& to, const std::function<void(TensorInfo&)>& change,
             const std::string& dtype, const std::vector<std::pair<std::string, std::vector<int64_t>>>& more = {}) {
    const SafetensorsReader reader(from);
    std::vector<TensorInfo> infos = reader.tensors();
    for (const auto& [name, shape] : more) infos.push_back({name, "F32", shape, 0, 0});
    for (TensorInfo& info : infos) {
        if (reader.find(info.name)) info.dtype = dtype;
        change(info);
    }
    SafetensorsWriter writer(to, infos);
    for (const TensorInfo& info : reader.tensors()) {
        std::vector<float> values(size_t(info.elements()));
        reader.read_range(info, 0, info.elements(), values.data());
        for (float value : values) {
            const bf16 brain(value);
            if (dtype == "F32") writer.append(&value, 1);
            else writer.append(&brain, 1);
        }
    }
    for (const auto& [name, shape] : more)
        for (int64_t i = 0; i < TensorInfo{name, "F32", shape, 0, 0}.elements(); ++i) {
            const float zero = 0;
            writer.append(&zero, 1);
        }
    writer.finish();
}

TEST(HuggingFace, InitFromTakesEveryFormThatTransformersSaves) {
    const TemporaryDirectory dir;
    TestModel model, loaded;
    model.fill(0);
    for (floatS& x : model.master) x = floatS(float(bf16(float(x))));  // exact in every type
    save_checkpoint(dir, model.view(), state_at(1), 0);
    const std::string whole = dir.path + "/checkpoints/step-00000001", file = whole + "/model.safetensors",
                      other = dir.path + "/other.safetensors";
    const auto expect_equal = [&](const std::string& path) {
        loaded = TestModel();
        init_from_huggingface(path, loaded.view());
        EXPECT_EQ(loaded.master, model.master) << path;
        EXPECT_TRUE(std::all_of(loaded.m.begin(), loaded.m.end(), [](floatS x) { return x == 0; }));
    };
    const auto strip = [](TensorInfo& info) {
        if (info.name.starts_with("transformer.")) info.name.erase(0, 12);
    };
    expect_equal(whole);
    expect_equal(file);
    rewrite(file, other, strip, "BF16", {{"h.0.attn.bias", {1, 1, 9, 9}}, {"h.1.attn.masked_bias", {}}});
    expect_equal(other);

    save_checkpoint(dir, model.view(), state_at(2), 0, 20'000);  // shards
    expect_equal(dir.path + "/checkpoints/step-00000002");

    rewrite(file, other, strip, "F32", {{"lm_head.weight", {37, 24}}});
    expect_failure(EXIT_CONFIG, {"differs from its embedding", "untied"},
                   [&] { init_from_huggingface(other, loaded.view()); });
}

TEST(HuggingFace, AllMismatchesAreListedAtOnce) {
    const TemporaryDirectory dir;
    save(dir, 1);
    const std::string path = dir.path + "/checkpoints/step-00000001";
    TestModel wider({1, 24, 2, 11, 40, 64, true});
    const std::vector<std::string> phrases = {"heads: the model has 2, the file 3",
                                              "wte.weight: the model has [40, 24], the file [37, 24]",
                                              "wpe.weight: the model has [11, 24], the file [9, 24]",
                                              "h.1.ln_1.bias: the model does not have it, the file has [24]"};
    expect_failure(EXIT_CONFIG, phrases, [&] { init_from_huggingface(path, wider.view()); });
    expect_failure(EXIT_CONFIG, phrases, [&] { load_checkpoint(path, wider.view(), Restore::weights); });
    TestModel untied({3, 24, 3, 9, 37, 64, false});
    expect_failure(EXIT_CONFIG,
                   {"lm_head.weight: the model has [37, 24], the file does not have it", "h.2.ln_1.weight", "untied"},
                   [&] { init_from_huggingface(path, untied.view()); });
}

TEST(HuggingFace, ConfigurationIsReadAndVariantsAreRefused) {
    const TemporaryDirectory dir;
    save(dir, 1);
    const std::string path = dir.path + "/checkpoints/step-00000001";
    const GptConfig config = read_model_config(path);
    EXPECT_EQ(config.layers, 2);
    EXPECT_EQ(config.channels, 24);
    EXPECT_EQ(config.heads, 3);
    EXPECT_EQ(config.context, 9);
    EXPECT_EQ(config.vocab, 37);
    EXPECT_EQ(config.padded_vocab, 64);
    EXPECT_TRUE(config.tied);
    const nlohmann::json good = read_json_file(path + "/config.json");
    for (const auto& [key, value] : std::map<std::string, nlohmann::json>{
             {"activation_function", "relu"}, {"n_inner", 7}, {"scale_attn_by_inverse_layer_idx", true}}) {
        nlohmann::json changed = good;
        changed[key] = value;
        put(dir.path + "/config.json", changed.dump());
        expect_failure(EXIT_CONFIG, {key, value.dump()}, [&] { read_model_config(dir); });
    }
    for (const auto& [key, value] : std::map<std::string, nlohmann::json>{
             {"n_head", 5}, {"n_layer", -1}, {"n_embd", "24"}, {"vocab_size", 1ull << 62}}) {
        nlohmann::json changed = good;
        changed[key] = value;
        put(dir.path + "/config.json", changed.dump());
        expect_failure(EXIT_DATA, {dir.path + "/config.json"}, [&] { read_model_config(dir); });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
TEST(Checkpoint, EveryBitComesBack) {
    for (bool tied : {true, false}) {
        const TemporaryDirectory run;
        TestModel model({2, 24, 3, 9, 37, 64, tied}), loaded(model.config);
        EXPECT_FALSE(load_latest_checkpoint(run, loaded.view()));
        TrainingState state = state_at(20);
        state.extra = {{"window", {1.5, 2.25}}};
        save_checkpoint(run, model.fill(20).view(), state, 3);
        const std::optional<TrainingState> back = load_latest_checkpoint(run, loaded.view());
        ASSERT_TRUE(back);
        EXPECT_TRUE(loaded == model);
        EXPECT_EQ(back->step, 20);
        EXPECT_EQ(back->sample_index, 160);
        EXPECT_EQ(back->seed, state.seed);
        EXPECT_EQ(back->tokenizer, "bytes");
        EXPECT_EQ(back->end_of_text, 36);
        EXPECT_EQ(back->configuration, "steps = 40\npath = \"\xef\xbf\xbd\"\n");
        EXPECT_EQ(back->schedule, state.schedule);
        EXPECT_EQ(back->extra, state.extra);
        EXPECT_TRUE(back->notes.empty());

        TestModel weights(model.config);
        CheckpointView only{weights.config, weights.parameters, weights.master.data()};
        load_checkpoint(run.path + "/checkpoints/step-00000020", only, Restore::weights);
        EXPECT_EQ(weights.master, model.master);
        EXPECT_EQ(text_of(run.path + "/checkpoints/LATEST"), "step-00000020\n");
    }
}

TEST(Checkpoint, LargeTensorsMoveInBlocks) {
    const TemporaryDirectory run;
    TestModel model({1, 520, 4, 9, 700, 704, true}), loaded(model.config);
    save_checkpoint(run, model.fill(3).view(), state_at(3), 0);
    load_checkpoint(run, loaded.view(), Restore::all);
    EXPECT_TRUE(loaded == model);
}

TEST(Checkpoint, ShardsHaveAnIndex) {
    const TemporaryDirectory run;
    save(run, 5, 0, 20'000);
    EXPECT_EQ(resumed_step(run), 5);
    const std::string path = run.path + "/checkpoints/step-00000005/";
    const nlohmann::json index = read_json_file(path + "model.safetensors.index.json");
    int64_t total = 0;
    for (const auto& [name, file] : index["weight_map"].items()) {
        const SafetensorsReader reader(path + file.get<std::string>());
        ASSERT_NE(reader.find(name), nullptr) << name;
        total += reader.find(name)->end - reader.find(name)->begin;
        if (reader.tensors().size() > 1) { EXPECT_LE(reader.tensors().back().end, 20'000); }
    }
    EXPECT_EQ(index["metadata"]["total_size"], total);
    EXPECT_EQ(index["weight_map"].size(), parameter_table(TestModel().config).size());
    EXPECT_FALSE(path_exists(path + "model.safetensors"));
    const std::vector<std::string> names = list_directory(path);
    EXPECT_TRUE(
        std::any_of(names.begin(), names.end(), [](const auto& n) { return n.starts_with("optimizer-00002-of-"); }));
}

TEST(Checkpoint, ManifestDescribesEveryFileAndTensor) {
    const TemporaryDirectory run;
    save(run, 5);
    const std::string path = run.path + "/checkpoints/step-00000005";
    const nlohmann::json manifest = read_json_file(path + "/manifest.json");
    for (const std::string& name : list_directory(path)) {
        if (name == manifest_name) continue;
        EXPECT_EQ(manifest["files"][name]["bytes"], int64_t(fs::file_size(path + "/" + name))) << name;
        EXPECT_EQ(manifest["files"][name]["xxh3_128"], record_of(path + "/" + name).hash) << name;
    }
    EXPECT_EQ(manifest["tensors"].size(), 3 * parameter_table(TestModel().config).size());
    EXPECT_EQ(manifest["tensors"][0]["shape"], nlohmann::json({37, 24}));
    EXPECT_EQ(manifest["tensors"][0]["offset"], nlohmann::json({0, 0}));
    EXPECT_EQ(manifest["tensors"][0]["bytes"], 37 * 24 * int64_t(sizeof(floatS)));
    EXPECT_EQ(manifest["environment"]["precision"], PRECISION_NAME);
}

TEST(Checkpoint, KeepsTheNewestAndCleansUp) {
    const TemporaryDirectory run;
    const std::string root = run.path + "/checkpoints";
    const auto names = [&] {
        std::vector<std::string> list = list_directory(root);
        std::sort(list.begin(), list.end());
        return list;
    };
    for (int64_t step : {10, 20, 30}) save(run, step, 2);
    EXPECT_EQ(names(), (std::vector<std::string>{"LATEST", "step-00000020", "step-00000030"}));
    fs::create_directories(root + "/.step-00000035.tmp/x");  // what crashed saves and deletions leave
    fs::rename(root + "/step-00000020", root + "/.step-00000020.deleted");
    save(run, 30, 2);  // the same step again
    save(run, 40, 1);
    EXPECT_EQ(names(), (std::vector<std::string>{"LATEST", "step-00000040"}));
    save(run, 20, 1);  // a run that was set back: what was just saved stays, whatever its number
    EXPECT_EQ(names(), (std::vector<std::string>{"LATEST", "step-00000020"}));
    for (int64_t step : {21, 22, 23}) save(run, step, 0);
    EXPECT_EQ(names().size(), 5u);
}

TEST(Checkpoint, DamageIsNamedAndTheOneBeforeIsLoaded) {
    const TemporaryDirectory run;
    const std::string root = run.path + "/checkpoints", newest = root + "/step-00000020";
    save(run, 10);
    save(run, 20, 0, 20'000);
    for (const std::string& name : list_directory(newest)) {
        const std::string path = newest + "/" + name, good = text_of(path);
        std::string flipped = good;
        flipped[flipped.size() / 2] = char(flipped[flipped.size() / 2] ^ 1);
        for (const std::string& bad : {flipped, good.substr(0, good.size() - 1), good + "x", std::string()}) {
            if (name == manifest_name && bad.size() > good.size()) continue;
            put(path, bad);
            std::vector<std::string> notes;
            EXPECT_EQ(resumed_step(run, &notes), 10) << name;
            ASSERT_EQ(notes.size(), 2u);
            EXPECT_NE(notes[0].find(path), std::string::npos) << notes[0];
            EXPECT_NE(notes[1].find("step-00000010"), std::string::npos) << notes[1];
        }
        fs::remove(path);
        EXPECT_EQ(resumed_step(run), 10) << name;
        put(path, good);
    }
    std::vector<std::string> notes;
    EXPECT_EQ(resumed_step(run, &notes), 20);
    EXPECT_TRUE(notes.empty());

    fs::remove(root + "/LATEST");
    EXPECT_EQ(resumed_step(run), 20);
    put(root + "/LATEST", "step-00000010\n");
    EXPECT_EQ(resumed_step(run), 10);
    put(root + "/LATEST", "step-00000099\n");
    EXPECT_EQ(resumed_step(run, &notes), 20);
    ASSERT_FALSE(notes.empty());
    EXPECT_NE(notes[0].find("step-00000099"), std::string::npos);

    for (const char* name : {"/step-00000010", "/step-00000020"}) fs::remove(root + name + "/config.json");
    expect_failure(EXIT_CHECKPOINT, {"step-00000010/config.json", "step-00000020/config.json"},
                   [&] { resumed_step(run); });
    fs::remove_all(root + "/step-00000010");
    fs::remove_all(root + "/step-00000020");
    expect_failure(EXIT_CHECKPOINT, {"step-00000099"}, [&] { resumed_step(run); });
    expect_failure(EXIT_CHECKPOINT, {"neither"}, [&] { find_checkpoint(run.path + "/nowhere"); });
}

TEST(Checkpoint, NonFiniteValuesAreNeverSaved) {
    const TemporaryDirectory run;
    TestModel model;
    for (auto* buffer : {&model.master, &model.m, &model.v})
        for (floatS bad : {floatS(NAN), floatS(INFINITY)}) {
            model.fill(7);
            (*buffer)[size_t(model.parameters[4].offset + 3)] = bad;
            expect_failure(EXIT_NONFINITE, {model.parameters[4].name, "step 7"},
                           [&] { save_checkpoint(run, model.view(), state_at(7), 0); });
        }
    EXPECT_EQ(resumed_step(run), -1);
    EXPECT_FALSE(path_exists(run.path + "/checkpoints"));
}

TEST(Checkpoint, AnotherEnvironmentIsMentioned) {
    const TemporaryDirectory run;
    save(run, 5);
    const std::string path = run.path + "/checkpoints/step-00000005";
    Manifest manifest = read_manifest(path);
    manifest.environment["threads"] = "77";
    write_manifest(path, manifest);
    std::vector<std::string> notes;
    EXPECT_EQ(resumed_step(run, &notes), 5);
    ASSERT_EQ(notes.size(), 1u);
    EXPECT_NE(notes[0].find("threads 77"), std::string::npos) << notes[0];
}

// Runs `action` in a child process; its exit status, or minus the signal that ended it.
int in_child(const std::function<int()>& action) {
    const pid_t child = fork();
    if (child == 0) {
        try {
            _exit(action());
        } catch (...) { _exit(99); }
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST(Checkpoint, StorageFailuresNameTheLastGoodCheckpoint) {
    const TemporaryDirectory run;
    save(run, 10);
    const auto refused = [&](int64_t limit) {  // the file system refuses to write beyond `limit` bytes a file
        return in_child([&] {
            signal(SIGXFSZ, SIG_IGN);
            const rlimit bytes{rlim_t(limit), rlim_t(limit)};
            setrlimit(RLIMIT_FSIZE, &bytes);
            try {
                save(run, 20);
            } catch (const Failure& failure) {
                const std::string message = failure.what();
                const bool named = message.find("The last good checkpoint is " + run.path +
                                                "/checkpoints/step-00000010") != std::string::npos;
                return named ? failure.exit_code : 98;
            }
            return 0;
        });
    };
    for (int64_t limit : {0, 100, 5'000, 60'000}) EXPECT_EQ(refused(limit), EXIT_STORAGE) << limit;
    EXPECT_EQ(refused(1'000'000), 0);
    EXPECT_EQ(resumed_step(run), 20);
    put(run.path + "/file", "");
    expect_failure(EXIT_STORAGE, {"step 20", "no good checkpoint"}, [&] { save(run.path + "/file", 20); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Saves 1, 2, 3 (again and again, so that steps are also replaced), keeping one.
int save_for_ever(const std::string& run) {
    for (int64_t i = 0;; ++i) save(run, 1 + i % 3, 1, 40'000);
}

TEST(Killed, AtRandomMomentsTheRunLoads) {
    const TemporaryDirectory run;
    std::mt19937 random(1);
    save(run, 3, 1);
    for (int trial = 0; trial < 60; ++trial) {
        const pid_t child = fork();
        if (child == 0) _exit(save_for_ever(run));
        usleep(std::uniform_int_distribution<useconds_t>(100, 30'000)(random));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        ASSERT_GT(resumed_step(run), 0) << "trial " << trial;
    }
}

#if defined(__x86_64__)
// Runs two saves, the second of a step that exists, and kills the process just before its system call number `last`
// that changes storage. Returns those calls, one letter each; `ended` tells that the saves came to their end.
std::string killed_before(const std::string& run, size_t last, bool& ended, bool& traceable) {
    const pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(97);
        raise(SIGSTOP);
        save(run, 2, 1, 40'000);
        save(run, 2, 1, 40'000);
        _exit(0);
    }
    const std::map<decltype(user_regs_struct::orig_rax), char> letters = {
        {SYS_write, 'w'}, {SYS_fsync, 'f'}, {SYS_rename, 'R'}, {SYS_mkdir, 'm'}, {SYS_unlinkat, 'u'}};
    std::string calls;
    int status = 0;
    waitpid(child, &status, 0);
    traceable = WIFSTOPPED(status);
    for (bool entry = false; WIFSTOPPED(status); entry = !entry) {  // stops are before and after a call by turns
        user_regs_struct registers{};
        ptrace(PTRACE_GETREGS, child, nullptr, &registers);
        const auto letter = letters.find(registers.orig_rax);
        if (entry && letter != letters.end()) calls += letter->second;
        if (calls.size() > last) kill(child, SIGKILL);
        else ptrace(PTRACE_SYSCALL, child, nullptr, nullptr);
        waitpid(child, &status, 0);
    }
    ended = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    return calls;
}

TEST(Killed, BeforeEverySystemCallTheRunLoads) {
    bool ended = false, traceable = true;
    std::string calls;
    for (size_t last = 0; !ended; ++last) {
        const TemporaryDirectory run(path_exists("/dev/shm") ? "/dev/shm" : "");  // memory: thousands of syncs
        save(run, 1, 1);
        calls = killed_before(run, last, ended, traceable);
        if (!traceable) GTEST_SKIP() << "this machine does not permit ptrace";
        const int64_t step = resumed_step(run);
        ASSERT_TRUE(step == 1 || step == 2) << "killed at the end of " << calls;
        save(run, 3, 1);  // and it goes on
        ASSERT_EQ(resumed_step(run), 3) << "killed at the end of " << calls;
        ASSERT_EQ(list_directory(run.path + "/checkpoints").size(), 2u) << "killed at the end of " << calls;
    }
    // What a power cut could reorder is fixed by syncs: every file and the directory before it is renamed into sight,
    // that before LATEST, that before the former directory is renamed away and removed.
    std::printf("killed before each of: %s\n", calls.c_str());
    const std::string files = "m(w+f)+f", publish = "Rf", latest = "wfRf", removal = "Rfu+";
    const std::regex order("f" + files + publish + latest + removal + "f" + files + "R" + publish + latest + removal);
    EXPECT_TRUE(std::regex_match(calls, order)) << calls;
}
#endif
