// Checkpoints of one rank: every value comes back bit for bit, damage is named and survived, storage that fails is
// said. checkpoint_ranks_test.cpp and checkpoint_killed_test.cpp have the rest.
#include <csignal>
#include <sys/resource.h>

#include "checkpoint_test.h"

TEST(Checkpoint, EveryBitComesBack) {
    for (bool tied : {true, false}) {
        const TemporaryDirectory run;
        TestModel model({2, 24, 3, 9, 37, 64, tied}), loaded(model.config);
        EXPECT_EQ(resumed_step(run), -1);
        TrainingState state = state_at(20);
        state.extra = {{"window", {1.5, 2.25}}};
        save(run, model.fill(20), state, 3);
        const TrainingState back = load(run, loaded);
        EXPECT_TRUE(loaded == model);
        EXPECT_EQ(back.step, 20);
        EXPECT_EQ(back.sample_index, 160);
        EXPECT_EQ(back.seed, state.seed);
        EXPECT_EQ(back.tokenizer, "bytes");
        EXPECT_EQ(back.end_of_text, 36);
        EXPECT_EQ(back.configuration, "steps = 40\npath = \"\xef\xbf\xbd\"\n");
        EXPECT_EQ(back.schedule, state.schedule);
        EXPECT_EQ(back.extra, state.extra);
        EXPECT_TRUE(back.notes.empty());
        EXPECT_EQ(text_of(run.path + "/checkpoints/LATEST"), "step-00000020\n");
    }
}

TEST(Checkpoint, LargeTensorsMoveInBlocks) {
    const TemporaryDirectory run;
    TestModel model({1, 520, 4, 9, 700, 704, true}), loaded(model.config);
    save(run, model.fill(3), state_at(3));
    load(run, loaded);
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
    TestModel model;
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
    expect_failure(EXIT_CHECKPOINT, {"neither"}, [&] { load(run.path + "/nowhere", model); });
}

TEST(Checkpoint, NonFiniteValuesAreNeverSaved) {
    const TemporaryDirectory run;
    TestModel model;
    for (auto* buffer : {&model.master, &model.m, &model.v})
        for (floatS bad : {floatS(NAN), floatS(INFINITY)}) {
            model.fill(7);
            (*buffer)[size_t(model.parameters[4].offset + 3)] = bad;
            expect_failure(EXIT_NONFINITE, {model.parameters[4].name, "step 7"},
                           [&] { save(run, model, state_at(7)); });
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
