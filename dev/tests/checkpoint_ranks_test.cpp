// Checkpoints that several ranks write and read together: what any layout saved, every other restores bit for bit, and
// a rank that fails, at any moment of a save, leaves all ranks with one message and the run with its last checkpoint.
#include <set>
#include <thread>

#include <csignal>
#include <sys/resource.h>

#include "checkpoint_test.h"
#include "llmc/parallel/thread_transport.h"
#include "llmc/pipeline/schedules/schedules.h"

struct Layout {
    std::string schedule;
    int ranks, virtual_stages = 1;

    std::vector<Parameter> held(const GptConfig& config, int rank) const {
        const ScheduleInput in{.ranks = ranks, .layers = int(config.layers), .virtual_stages = virtual_stages};
        const auto owner = find_schedule(schedule)->owner;
        const auto runs = [&](Part part, int layer) { return owner(in, part, layer, 0) == rank; };
        return parameters_of(config, runs, runs);
    }
};

// Runs `body` on threads, one a rank, and returns what each of them failed with. A rank that has ended is not waited
// for: who does fails.
std::vector<std::string> on_ranks(int ranks, const std::function<void(Transport&)>& body) {
    ThreadTeam team(ranks);
    std::vector<std::string> failures(static_cast<size_t>(ranks));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
        threads.emplace_back([&, rank] {
            ThreadTransport transport(team, rank, ranks);
            try {
                body(transport);
            } catch (const Failure& failure) {
                failures[size_t(rank)] = std::to_string(failure.exit_code) + " " + failure.what();
            } catch (const std::exception& error) { failures[size_t(rank)] = error.what(); }
            team.fail(rank);
        });
    for (std::thread& thread : threads) thread.join();
    return failures;
}

// All ranks ended alike: well, or with one Failure.
std::string same_on_all(const std::vector<std::string>& failures) {
    for (const std::string& failure : failures) EXPECT_EQ(failure, failures.front());
    return failures.front();
}

void save_on(Transport& transport, const Layout& layout, const std::string& run, const GptConfig& config, int64_t step,
             int64_t shard_bytes = shard_bytes_default) {
    TestModel model(config, layout.held(config, transport.rank));
    try {
        save_checkpoint(run, model.fill(step).view(), state_at(step), 0, transport, shard_bytes);
    } catch (const Failure& failure) {  // who catches it may go on with the others, unless one has died
        EXPECT_TRUE(failure.exit_code == EXIT_PEER || dynamic_cast<const JointFailure*>(&failure)) << failure.what();
        throw;
    }
}

std::string save_with(const Layout& layout, const std::string& run, const GptConfig& config, int64_t step,
                      int64_t shard_bytes = shard_bytes_default) {
    return same_on_all(on_ranks(
        layout.ranks, [&](Transport& transport) { save_on(transport, layout, run, config, step, shard_bytes); }));
}

std::string in_memory() { return path_exists("/dev/shm") ? "/dev/shm" : ""; }  // for hundreds of syncs

// ---------------------------------------------------------------------------------------------------------------------
TEST(Ranks, EveryLayoutRestoresWhatEveryOtherSaved) {
    const std::vector<Layout> layouts = {{"gpipe", 1}, {"1f1b", 4}, {"interleaved", 2, 2}, {"helix", 3}, {"zb-h1", 6}};
    int64_t step = 0;
    for (int layers : {1, 4})
        for (bool tied : {true, false}) {
            const GptConfig config{layers, 24, 3, 9, 37, 64, tied};
            for (const Layout& saved : layouts) {
                const TemporaryDirectory run(in_memory());
                ++step;
                ASSERT_EQ(save_with(saved, run, config, step, step % 2 ? shard_bytes_default : 10'000), "");
                for (const Layout& restored : layouts) {
                    SCOPED_TRACE(saved.schedule + " -> " + restored.schedule + ", " + std::to_string(layers) +
                                 " layers");
                    const auto failures = on_ranks(restored.ranks, [&](Transport& transport) {
                        const std::vector<Parameter> held = restored.held(config, transport.rank);
                        TestModel loaded(config, held), expected(config, held);
                        const auto found = find_latest_checkpoint(run, transport);
                        const TrainingState state = restore_checkpoint(found.value(), loaded.view());
                        EXPECT_TRUE(loaded == expected.fill(step)) << "rank " << transport.rank;
                        EXPECT_EQ(state.step, step);
                        EXPECT_EQ(state.sample_index, 8 * step);

                        TestModel started(config, held);
                        init_from_huggingface(found->directory, started.view());
                        EXPECT_EQ(started.master, expected.master) << "rank " << transport.rank;
                    });
                    EXPECT_EQ(same_on_all(failures), "");
                }
            }
        }
}

TEST(Ranks, LayoutsOfTheTestLeaveRanksWithoutParametersAndCopyTheEmbedding) {
    const GptConfig tied{1, 24, 3, 9, 37, 64, true};
    EXPECT_TRUE((Layout{"1f1b", 4}.held(tied, 3).empty()));
    EXPECT_TRUE((Layout{"helix", 3}.held(tied, 1).front().copy));
}

TEST(Ranks, FilesAreNumberedOverTheRanks) {
    const GptConfig config{4, 24, 3, 9, 37, 64, true};
    for (const auto& [shard_bytes, files] : std::map<int64_t, size_t>{{shard_bytes_default, 3}, {6'000, 0}, {1, 0}}) {
        const TemporaryDirectory run(in_memory());
        ASSERT_EQ(save_with({"helix", 3}, run, config, 5, shard_bytes), "");
        const std::string path = run.path + "/checkpoints/step-00000005/";
        const Manifest manifest = read_manifest(path);
        std::map<std::string, std::set<std::string>> tensors;  // by file
        for (const nlohmann::json& tensor : manifest.tensors)
            tensors[tensor["file"]].insert(tensor["name"].get<std::string>());
        EXPECT_EQ(manifest.tensors.size(), 3 * parameter_table(config).size());
        size_t tensor_files = 0;
        for (const std::string stem : {"model", "optimizer"}) {
            size_t count = 0;
            for (const auto& [name, record] : manifest.files) count += name.starts_with(stem + "-");
            EXPECT_TRUE(files == 0 ? count > 3 : count == files) << count;
            for (size_t i = 1; i <= count; ++i) {
                char name[64];
                std::snprintf(name, sizeof name, "%s-%05zu-of-%05zu.safetensors", stem.c_str(), i, count);
                const SafetensorsReader file(path + name);
                EXPECT_EQ(file.tensors().size(), tensors[name].size());
                for (const TensorInfo& tensor : file.tensors()) EXPECT_TRUE(tensors[name].contains(tensor.name));
                if (file.tensors().size() > 1) { EXPECT_LE(file.tensors().back().end, shard_bytes); }
            }
            tensor_files += count;
        }
        EXPECT_EQ(list_directory(path).size(), tensor_files + 4);  // and configurations, index, manifest
        int64_t total = 0;
        const nlohmann::json index = read_json_file(path + "model.safetensors.index.json");
        for (const Parameter& p : parameter_table(config)) {
            const std::string name = huggingface_name(p.name);
            EXPECT_TRUE(tensors[index["weight_map"].at(name)].contains(name));
            total += used_rows(p, config) * p.cols * int64_t(sizeof(floatS));
        }
        EXPECT_EQ(index["weight_map"].size(), parameter_table(config).size());
        EXPECT_EQ(index["metadata"]["total_size"], total);
    }
}

TEST(Ranks, OneVerdictOnWhatDoesNotFit) {
    const TemporaryDirectory run(in_memory());
    save(run, 10);
    const std::string path = run.path + "/checkpoints/step-00000010";
    const GptConfig wider{1, 24, 2, 11, 40, 64, true};
    for (bool restore : {true, false}) {
        const auto failures = on_ranks(3, [&](Transport& transport) {  // rank 2 holds nothing
            TestModel model(wider, Layout{"helix", 3}.held(wider, transport.rank));
            if (restore) restore_checkpoint(find_checkpoint(path, transport), model.view());
            else init_from_huggingface(path, model.view());
        });
        const std::string message = same_on_all(failures);
        EXPECT_TRUE(message.starts_with(std::to_string(EXIT_CONFIG) + " ")) << message;
        for (const std::string phrase : {"heads: the model has 2", "wte.weight: ", "wpe.weight: ", "h.1.ln_1.bias: "})
            EXPECT_NE(message.find(phrase), std::string::npos) << message;
    }
}

TEST(Ranks, AHeadThatIsNotTheEmbeddingIsSeenByThoseThatHaveIt) {
    const TemporaryDirectory dir(in_memory());
    const GptConfig config{4, 24, 3, 9, 37, 64, true};
    const std::string path = dir.path + "/model.safetensors";
    std::vector<TensorInfo> infos;
    for (const Parameter& p : parameter_table(config))
        infos.push_back({p.name, dtype_of<floatS>(), stored_form(config, p).shape, 0, 0});
    infos.push_back({"lm_head.weight", dtype_of<floatS>(), {37, 24}, 0, 0});
    SafetensorsWriter file(path, infos);
    for (const TensorInfo& info : infos) {
        const std::vector<floatS> values(size_t(info.elements()), floatS(info.name == "lm_head.weight"));
        file.append(values.data(), info.elements());
    }
    file.finish();
    const auto failures = on_ranks(4, [&](Transport& transport) {
        TestModel model(config, Layout{"1f1b", 4}.held(config, transport.rank));
        init_from_huggingface(path, model.view());
    });
    for (size_t rank : {0, 3})
        EXPECT_NE(failures[rank].find("differs from its embedding"), std::string::npos) << failures[rank];
    for (size_t rank : {1, 2}) EXPECT_EQ(failures[rank], "");
}

TEST(Ranks, AllFallBackToTheSameCheckpoint) {
    const TemporaryDirectory run(in_memory());
    const Layout layout{"1f1b", 3};
    const GptConfig config = TestModel().config;
    const auto find = [&] {
        std::vector<std::string> notes(3);
        const std::string failure = same_on_all(on_ranks(3, [&](Transport& transport) {
            const auto found = find_latest_checkpoint(run, transport);
            std::string& text = notes[size_t(transport.rank)];
            text = found ? found->directory + " " + std::to_string(found->manifest.state.step) : "none";
            if (found)
                for (const std::string& note : found->notes) text += "\n" + note;
        }));
        return failure.empty() ? same_on_all(notes) : failure;
    };
    EXPECT_EQ(find(), "none");
    for (int64_t step : {10, 20}) ASSERT_EQ(save_with(layout, run, config, step), "");
    const std::string root = run.path + "/checkpoints/";
    EXPECT_EQ(find(), root + "step-00000020 20");
    fs::remove(root + "step-00000020/optimizer-00002-of-00002.safetensors");
    const std::string text = find();
    EXPECT_TRUE(text.starts_with(root + "step-00000010 10\nCannot open " + root + "step-00000020/optimizer-00002"))
        << text;
    fs::remove(root + "step-00000010/config.json");
    EXPECT_TRUE(find().starts_with("4 No checkpoint in ")) << find();
}

// ---------------------------------------------------------------------------------------------------------------------
TEST(FailingRank, NonFiniteWeightsStopAll) {
    const TemporaryDirectory run(in_memory());
    const Layout layout{"1f1b", 4};
    const GptConfig config{4, 24, 3, 9, 37, 64, true};
    ASSERT_EQ(save_with(layout, run, config, 10), "");
    const std::string message = same_on_all(on_ranks(4, [&](Transport& transport) {
        TestModel model(config, layout.held(config, transport.rank));
        model.fill(20);
        if (transport.rank == 2) model.master[size_t(model.parameters[4].offset)] = floatS(NAN);
        save_checkpoint(run, model.view(), state_at(20), 1, transport);
    }));
    EXPECT_EQ(message, std::to_string(EXIT_NONFINITE) +
                           " rank 2: The weight h.2.attn.c_proj.weight is not finite after step 20; it is not saved "
                           "as a checkpoint.");
    EXPECT_EQ(list_directory(run.path + "/checkpoints").size(), 2u);
    NoTransport alone;
    EXPECT_EQ(find_latest_checkpoint(run, alone)->manifest.state.step, 10);
}

// Rank 2 alone has files that the file system refuses.
TEST(FailingRank, ADiskThatIsFullForOneStopsAll) {
    const TemporaryDirectory run;
    const TestModel model;
    const auto save_on_three = [&](int64_t step) {
        return same_on_all(on_ranks(3, [&](Transport& transport) {
            const auto runs = [&](Part part, int) { return transport.rank == (part == Part::embed ? 0 : 2); };
            TestModel mine(model.config, parameters_of(model.config, runs, runs));
            save_checkpoint(run, mine.fill(step).view(), state_at(step), 1, transport);
        }));
    };
    ASSERT_EQ(save_on_three(10), "");
    const std::string root = run.path + "/checkpoints/";
    EXPECT_EQ(in_child([&] {
                  signal(SIGXFSZ, SIG_IGN);
                  const rlimit bytes{60'000, 60'000};
                  setrlimit(RLIMIT_FSIZE, &bytes);
                  const std::string expected = std::to_string(EXIT_STORAGE) +
                                               " The checkpoint of step 20 could not be saved: rank 2: Cannot write " +
                                               root +
                                               ".step-00000020.tmp/model-00002-of-00002.safetensors: File too "
                                               "large. The last good checkpoint is " +
                                               root + "step-00000010.";
                  const std::string message = save_on_three(20);
                  if (message != expected) std::printf("%s\n", message.c_str());
                  return int(message != expected || testing::Test::HasFailure());
              }),
              0);
    EXPECT_EQ(list_directory(root).size(), 2u);
    EXPECT_EQ(resumed_step(run), 10);
}

// Does something before the rank enters its n-th all_gather.
class InterruptedTransport : public Transport {
public:
    InterruptedTransport(Transport& inner, int at, std::function<void()> interrupt)
        : Transport(inner.rank, inner.ranks), inner(inner), at(at), interrupt(std::move(interrupt)) {}
    int64_t post(std::span<const Transfer> transfers) override { return inner.post(transfers); }
    void wait(int64_t begin, int64_t end) override { inner.wait(begin, end); }
    std::vector<std::string> gather(const std::string& text) override {
        if (gathers++ == at) interrupt();
        return inner.all_gather(text);
    }
    int gathers = 0;

private:
    Transport& inner;
    int at;
    std::function<void()> interrupt;
};

// A save of step 20 by three ranks after one of step 10; `interrupt` comes before a rank's gather number `at`. What the
// ranks failed with; `reached` tells whether there was such a gather.
std::vector<std::string> interrupted_save(const std::string& run, int rank, int at, bool& reached,
                                          const std::function<void()>& interrupt) {
    const Layout layout{"1f1b", 3};
    GptConfig config = TestModel().config;
    EXPECT_EQ(save_with(layout, run, config, 10), "");
    return on_ranks(3, [&](Transport& transport) {
        if (transport.rank != rank) return save_on(transport, layout, run, config, 20);
        InterruptedTransport interrupted(transport, at, [&] {
            reached = true;
            interrupt();
        });
        save_on(interrupted, layout, run, config, 20);
    });
}

TEST(FailingRank, StorageThatIsLostAtAnyMomentStopsAll) {
    int stopped = 0;
    for (int rank = 0; rank < 3; ++rank) {
        bool reached = true;
        for (int at = 0; reached; ++at) {
            SCOPED_TRACE("rank " + std::to_string(rank) + ", gather " + std::to_string(at));
            const TemporaryDirectory run(in_memory());
            const std::string hidden = run.path + "/checkpoints/.step-00000020.tmp";
            reached = false;
            const std::string message = same_on_all(interrupted_save(
                run, rank, at, reached, [&] { std::rename(hidden.c_str(), (run.path + "/lost").c_str()); }));
            EXPECT_EQ(resumed_step(run), message.empty() ? 20 : 10);
            EXPECT_FALSE(path_exists(hidden));
            if (message.empty()) continue;
            ++stopped;
            EXPECT_TRUE(message.starts_with(std::to_string(EXIT_STORAGE) + " The checkpoint of step 20")) << message;
            EXPECT_TRUE(message.ends_with("step-00000010.")) << message;
        }
    }
    EXPECT_GE(stopped, 15);  // of the moments between the directory's first and last, five on each rank at least
}

TEST(FailingRank, FilesAreReadBackByWhoWroteThem) {
    for (int rank = 0; rank < 3; ++rank) {
        bool reached = true, damaged = false;
        for (int at = 0; reached && !damaged; ++at) {
            const TemporaryDirectory run(in_memory());
            const std::string root = run.path + "/checkpoints/";
            const std::string file =
                root + ".step-00000020.tmp/optimizer-0000" + std::to_string(rank + 1) + "-of-00002.safetensors";
            reached = false;
            const std::string message = same_on_all(interrupted_save(run, rank, at, reached, [&] {
                if (!path_exists(file)) return;
                damaged = true;
                std::string text = text_of(file);
                text.back() = char(text.back() ^ 1);
                put(file, text);
            }));
            EXPECT_EQ(message.find(file + " has other contents") != std::string::npos, damaged) << message;
            EXPECT_EQ(resumed_step(run), damaged ? 10 : 20);
        }
        EXPECT_EQ(damaged, rank < 2);  // the third has no parameters
    }
}

TEST(FailingRank, ADeathAtAnyMomentLeavesNobodyWaiting) {
    for (int rank = 0; rank < 3; ++rank) {
        bool reached = true;
        for (int at = 0; reached; ++at) {
            SCOPED_TRACE("rank " + std::to_string(rank) + ", gather " + std::to_string(at));
            const TemporaryDirectory run(in_memory());
            reached = false;
            const std::vector<std::string> failures =
                interrupted_save(run, rank, at, reached, [] { throw std::runtime_error("dies"); });
            for (int r = 0; reached && r < 3; ++r)
                EXPECT_EQ(
                    failures[size_t(r)],
                    r == rank ? "dies" : std::to_string(EXIT_PEER) + " rank " + std::to_string(rank) + " has failed");
            const int64_t step = resumed_step(run);
            EXPECT_TRUE(step == 10 || step == 20) << step;
            save(run, 30, 1);  // and it goes on
            EXPECT_EQ(resumed_step(run), 30);
            EXPECT_EQ(list_directory(run.path + "/checkpoints").size(), 2u);
        }
    }
}
