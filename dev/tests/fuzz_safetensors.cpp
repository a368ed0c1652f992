// Damaged safetensors files against the reader and --init-from: each must be refused with a Failure or read as it is,
// and nothing large may be allocated before the sizes are proven. Built with ASan and UBSan. Usage: fuzz_safetensors
// [cases]
#include "fuzz.h"

#include "llmc/io/huggingface.h"

// Splits a file into header and data.
static std::pair<nlohmann::json, std::string> parts_of(const std::string& file) {
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    return {nlohmann::json::parse(file.substr(8, length)), file.substr(8 + length)};
}

static std::string with_header(const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

// Every tensor that the reader lets pass lies in the file, and floating ones read as their bytes say.
static bool reads_correctly(const SafetensorsReader& reader, const std::string& file) {
    uint64_t length;
    std::memcpy(&length, file.data(), 8);
    const size_t data_begin = 8 + size_t(length);
    int64_t at = 0;
    for (const TensorInfo& tensor : reader.tensors()) {
        const int64_t bytes = tensor.elements() * dtype_bytes(tensor.dtype);
        if (tensor.begin != at || tensor.end - tensor.begin != bytes) return false;
        at = tensor.end;
        if (tensor.dtype != "F64" && tensor.dtype != "F32" && tensor.dtype != "F16" && tensor.dtype != "BF16") continue;
        std::vector<float> values(static_cast<size_t>(tensor.elements()));
        reader.read_range(tensor, 0, tensor.elements(), values.data());
        if (tensor.dtype == "F32" && bytes > 0 &&
            std::memcmp(values.data(), file.data() + data_begin + tensor.begin, size_t(bytes)) != 0)
            return false;
    }
    return data_begin + size_t(at) == file.size();
}

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 6000;
    const std::string directory =
        std::filesystem::temp_directory_path() / ("fuzz_safetensors." + std::to_string(getpid()));
    create_directories(directory);
    const std::string path = directory + "/model.safetensors";

    const GptConfig config{1, 8, 2, 4, 10, 64, true};
    const std::vector<Parameter> parameters = parameter_table(config);
    std::vector<floatS> weights(size_t(flat_size(parameters)));
    initialize_parameters(weights.data(), parameters, config, 1);
    {
        std::vector<TensorInfo> infos;
        for (const Parameter& p : parameters)
            infos.push_back({huggingface_name(p.name), dtype_of<floatS>(), stored_form(config, p).shape, 0, 0});
        SafetensorsWriter writer(path, infos);
        for (const Parameter& p : parameters) write_tensor(writer, stored_form(config, p), weights.data() + p.offset);
        writer.finish();
    }
    const std::string types = R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},
        "b":{"dtype":"F16","shape":[1,3],"data_offsets":[16,22]},"c":{"dtype":"BF16","shape":[1],"data_offsets":[22,24]},
        "d":{"dtype":"U8","shape":[],"data_offsets":[24,25]},"e":{"dtype":"F32","shape":[0,5],"data_offsets":[25,25]},
        "f":{"dtype":"F32","shape":[2],"data_offsets":[25,33]}})";
    const std::vector<std::string> sound = {read_text_file(path, 1 << 20), with_header(types, std::string(33, '\x3e')),
                                            with_header("{}", "")};
    size_t file_bytes = 0;
    const int status = fuzz(
        cases,
        [&] {
            const size_t which = random_below(sound.size());
            std::string file = sound[which];
            auto [header, data] = parts_of(file);
            const size_t kind = random_below(4);
            if (kind == 0) {  // the header's values, in a header of the right length
                for (size_t n = 1 + random_below(3); n > 0; --n) mutate_json(header);
                file = with_header(header.dump(), data);
            } else if (kind == 1) {  // the header's bytes, in a header of the right length
                std::string text = header.dump();
                for (size_t n = 1 + random_below(3); n > 0; --n) mutate_bytes(text, 0, text.size());
                file = with_header(text, data);
            } else if (kind == 2) {  // the length
                const uint64_t lengths[] = {0,           1,           7,          file.size() - 8, file.size() - 7,
                                            100'000'000, 100'000'001, 1ull << 63, UINT64_MAX,      random_bits()};
                std::memcpy(file.data(), &lengths[random_below(std::size(lengths))], 8);
            } else {
                for (size_t n = 1 + random_below(3); n > 0; --n)
                    mutate_bytes(file, random_below(2) ? 0 : file.size() - data.size(), file.size());
            }
            write_bytes(path, file);
            file_bytes = file.size();
            std::vector<floatS> loaded(weights.size());
            largest_allocation = 0;
            const SafetensorsReader reader(path);
            const bool correct = reads_correctly(reader, file);
            if (which == 0) init_from_huggingface(path, {config, parameters, loaded.data()});
            return correct;
        },
        [&] { return 4096 + 32 * file_bytes; });  // a parsed JSON array is up to 32 times as large as its text
    std::filesystem::remove_all(directory);
    return status;
}
