// Damaged manifests, config.json and shard indexes against the checkpoint loader: each is refused with a Failure or the
// checkpoint is loaded bit for bit. A third of the manifests get a right hash of their own, so that damage reaches the
// code behind it. Built with ASan and UBSan. Usage: fuzz_manifest [cases]
#include "fuzz.h"

#include "llmc/parallel/checkpoint.h"

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 4000;
    const std::string run = std::filesystem::temp_directory_path() / ("fuzz_manifest." + std::to_string(getpid()));

    const GptConfig config{1, 8, 2, 4, 10, 64, true};
    const std::vector<Parameter> parameters = parameter_table(config);
    const size_t size = size_t(flat_size(parameters));
    std::vector<floatS> weights(size), m(size, floatS(0)), v(size, floatS(0));
    initialize_parameters(weights.data(), parameters, config, 1);
    TrainingState state;
    state.step = 3;
    state.sample_index = 24;
    state.seed = UINT64_MAX;
    state.tokenizer = "bytes";
    state.end_of_text = 9;
    state.schedule = {{"kind", "wsd"}, {"lr", 1e-3}};
    NoTransport alone;
    save_checkpoint(run, {config, parameters, weights.data(), m.data(), v.data()}, state, 1, alone, 2000);
    const std::string directory = run + "/checkpoints/step-00000003";
    const std::vector<std::string> names = {manifest_name, manifest_name, "config.json",
                                            "model.safetensors.index.json"};
    std::vector<std::string> sound;
    for (const std::string& name : names) sound.push_back(read_text_file(directory + "/" + name, 1 << 20));

    size_t file_bytes = 0;
    const int status = fuzz(
        cases,
        [&] {
            for (size_t i = 0; i < names.size(); ++i) write_bytes(directory + "/" + names[i], sound[i]);
            const size_t which = random_below(names.size());
            const bool is_manifest = names[which] == manifest_name;
            std::string text = sound[which];
            bool resealed = false;
            if (random_below(2)) {
                nlohmann::json contents = nlohmann::json::parse(text);
                for (size_t n = 1 + random_below(3); n > 0; --n) mutate_json(contents);
                if (is_manifest && contents.is_object() && random_below(4)) {
                    contents.erase("xxh3_128");
                    contents["xxh3_128"] = hash_of(contents.dump());
                    resealed = true;
                }
                text = contents.dump();
            } else {
                for (size_t n = 1 + random_below(3); n > 0; --n) mutate_bytes(text, 0, text.size());
            }
            write_bytes(directory + "/" + names[which], text);
            file_bytes = text.size();

            std::vector<floatS> master(size, 1), first(size, 1), second(size, 1);
            const CheckpointView view{config, parameters, master.data(), first.data(), second.data()};
            largest_allocation = 0;
            if (!is_manifest) {
                init_from_huggingface(directory, view);  // reads config.json and the index
                return master == weights;
            }
            const TrainingState back = restore_checkpoint(find_checkpoint(directory, alone), view);
            const bool same_state =
                back.step == 3 && back.sample_index == 24 && back.seed == UINT64_MAX && back.schedule == state.schedule;
            return master == weights && first == m && second == v && (same_state || resealed);
        },
        [&] { return (size_t(1) << 20) + 4096 + 32 * file_bytes; });  // files are hashed in blocks of a megabyte
    std::filesystem::remove_all(run);
    return status;
}
