// safetensors files and the form in which Hugging Face GPT-2 lies in them: what is written has the format, what others
// wrote is read, what is unsound or does not fit is refused.
#include "checkpoint_test.h"

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
    save(run, model.fill(1), state_at(1));
    const SafetensorsReader file(run.path + "/checkpoints/step-00000001/model.safetensors");
    EXPECT_EQ(file.find("transformer.wpe.weight")->shape, (std::vector<int64_t>{1, 8}));
    load(run, loaded);
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
    save(dir, model, state_at(1));
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

    save(dir, model, state_at(2), 0, 20'000);  // shards
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
    expect_failure(EXIT_CONFIG, phrases, [&] { load(path, wider); });
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
