// Correctness of the whole model: what train_gpt computes, laid open for dev/tests to compare.
//
//   test_gpt dump DIR     one step of the case in DIR: every tensor that passes between embed, pre, attention, post and
//                         head, and every gradient; then the weights after case["steps"] steps on the same batch
//   test_gpt losses DIR   the loss of each of case["steps"] steps, on one of case["batches"] after the other
//   test_gpt adamw DIR    the optimizer alone, fed DIR/gradients.safetensors
//   test_gpt logits DIR   the logits of case["checkpoint"] after each of case["tokens"], as `generate` computes them
//
// All read DIR/case.json and write DIR/ours.safetensors; the first three start from DIR/weights.safetensors.
// dev/reference/compare.py says what the names mean and holds the other side, PyTorch.
#define TESTING
#include "train_gpt.cu"

// the decoder
#include "llmc/commands/generate.h"

// ---------------------------------------------------------------------------------------------------------------------
// Tensors by name

struct NamedTensor {
    std::vector<int64_t> shape;
    std::vector<floatS> values;
};

using NamedTensors = std::map<std::string, NamedTensor>;

void write_tensors(const std::string& path, const NamedTensors& tensors) {
    std::vector<TensorInfo> list;
    for (const auto& [name, tensor] : tensors) list.push_back({name, dtype_of<floatS>(), tensor.shape});
    SafetensorsWriter writer(path, list);
    for (const auto& [name, tensor] : tensors) writer.append(tensor.values.data(), int64_t(tensor.values.size()));
    writer.finish();
}

// Files hold the V rows of the vocabulary, the flat buffers padded ones.
std::vector<int64_t> shape_in_file(const Parameter& p, const GptConfig& g) {
    if (!p.decay) return {p.cols};
    return {used_rows(p, g), p.cols};
}

void read_parameters(const Rank& rank, const SafetensorsReader& file, const std::string& prefix, floatS* flat) {
    HostView<floatS> values(rank.device, flat, flat_size(rank.parameters), false);
    for (const Parameter& p : rank.parameters) {
        const TensorInfo* tensor = file.find(prefix + p.name);
        if (!tensor || tensor->shape != shape_in_file(p, rank.options.model))
            throw Failure(EXIT_DATA, file.path() + " has no " + prefix + p.name + " of shape " +
                                         shape_text(shape_in_file(p, rank.options.model)) + ".");
        file.read_range(*tensor, 0, tensor->elements(), values.data() + p.offset);
    }
    values.store();
}

void keep_parameters(NamedTensors& tensors, const Rank& rank, const std::string& prefix, floatS* flat) {
    HostView<floatS> values(rank.device, flat, flat_size(rank.parameters), true);
    for (const Parameter& p : rank.parameters) {
        NamedTensor& tensor = tensors[prefix + p.name];
        tensor.shape = shape_in_file(p, rank.options.model);
        const int64_t rows = tensor.shape.size() == 2 ? tensor.shape[0] : 1;
        tensor.values.assign(values.data() + p.offset, values.data() + p.offset + rows * p.cols);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The case

Batch batch_of(const nlohmann::json& sequences) {
    Batch batch;
    for (const nlohmann::json& sequence : sequences) {
        batch.sequences.push_back({sequence["tokens"], sequence["targets"]});
        batch.tokens += int64_t(batch.sequences.back().tokens.size());
        for (int32_t target : batch.sequences.back().targets) batch.targets += target >= 0;
    }
    return batch;
}

struct Case {
    nlohmann::json json;
    Config config;
    NoTransport transport;
    Rank rank;

    explicit Case(const std::string& directory)
        : json(read_json_file(directory + "/case.json")),
          config(config_of(json)),
          rank(rank_options(config, model_of(config), true), transport) {
        read_parameters(rank, SafetensorsReader(directory + "/weights.safetensors"), "", rank.master);
        round_weights(rank);
    }

    Step step_of(const Batch& batch) const {
        return prepare_step(batch, rank.options.chunk_tokens, rank.options.model);
    }
    void optimizer_step(int64_t number) { clip_and_update(rank, config, number, number, gradient_norm(rank)); }

private:
    static Config config_of(const nlohmann::json& json) {
        Config c;
        const nlohmann::json& model = json["model"];
        c.model.layers = model["layers"], c.model.channels = model["channels"], c.model.heads = model["heads"];
        c.model.context = model["context"], c.model.vocab = model["vocab"], c.model.untied = !model["tied"].get<bool>();
        c.data.chunk_tokens = json["chunk_tokens"];
        c.compute.recompute = json["recompute"];
        c.compute.mlp_chunk = json["mlp_chunk"], c.compute.head_chunk = json["head_chunk"];
        c.compute.threads = json["threads"];
        auto& t = c.training;
        t.steps = json["steps"], t.lr_schedule = json["lr_schedule"], t.warmup = json["warmup"], t.lr = json["lr"];
        t.beta1 = json["beta1"], t.beta2 = json["beta2"], t.eps = json["eps"];
        t.weight_decay = json["weight_decay"], t.clip = json["clip"];
        return c;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// What passes between the five functions, sequence after sequence, whatever the chunks were.

class Borders {
public:
    Borders(const Rank& rank, const Batch& batch, NamedTensors& tensors)
        : rank(rank), tensors(tensors), tokens(batch.tokens) {
        std::vector<int64_t> sequence_row = {0};  // where each sequence begins among all tokens
        for (const Sample& s : batch.sequences) sequence_row.push_back(sequence_row.back() + int64_t(s.tokens.size()));
        for (const Chunk& chunk : make_chunks(batch, rank.options.chunk_tokens)) {
            std::vector<int64_t>& rows = row_of_token.emplace_back();
            for (const Segment& s : chunk.segments)
                for (int64_t t = s.begin; t < s.end; ++t) rows.push_back(sequence_row[size_t(s.sequence)] + t);
        }
    }

    // What op i of the plan has just made.
    void keep(const Plan& plan, size_t i) {
        const Op& op = plan.ops[i];
        const OpTensors t{rank, plan, i, int64_t(row_of_token[size_t(op.chunk)].size())};
        const std::string layer = std::to_string(op.layer);
        const auto output_of = [](int l) { return l < 0 ? "embed" : "post." + std::to_string(l) + ".out"; };
        if (op.pass == Pass::F) switch (op.part) {
                case Part::embed:
                case Part::post: {
                    const int l = op.layer + 1;
                    keep(output_of(op.layer), op, t.rows<floatR>(Tensor::residual, l));
                    break;
                }
                case Part::pre:
                    keep("pre." + layer + ".qkv", op, t.rows<floatX>(Tensor::qkv, op.layer));
                    break;
                case Part::attention:
                    keep("attention." + layer + ".out", op, t.rows<floatX>(Tensor::attention_out, op.layer));
                    break;
                case Part::head:
                    break;
            }
        else switch (op.part) {
                case Part::head:
                case Part::pre: {
                    const int l = op.part == Part::head ? int(rank.options.model.layers) - 1 : op.layer - 1;
                    keep("d." + output_of(l), op, t.rows<floatR>(Tensor::d_residual, -1));
                    break;
                }
                case Part::post:
                    keep("d.attention." + layer + ".out", op, t.rows<floatX>(Tensor::d_attention, op.layer));
                    break;
                case Part::attention:
                    keep("d.pre." + layer + ".qkv", op, t.rows<floatX>(Tensor::d_qkv, op.layer));
                    break;
                case Part::embed:
                    break;
            }
    }

    void keep_losses(const std::vector<std::vector<floatS>>& losses /*[chunk][N]*/) {
        for (size_t c = 0; c < losses.size(); ++c)
            keep_rows("head.losses", {tokens}, c, Matrix<const floatS>(losses[c].data(), int64_t(losses[c].size()), 1));
    }

private:
    template <class T>
    void keep(const std::string& name, const Op& op, Matrix<T> rows) {
        HostView<T> values(rank.device, rows.data, rows.size(), true);
        keep_rows(name, {tokens, rows.cols}, size_t(op.chunk), Matrix<T>(values.data(), rows.rows, rows.cols));
    }

    // Copies a chunk's rows to their places; a place that no chunk fills stays NaN, which no comparison accepts.
    template <class T>
    void keep_rows(const std::string& name, const std::vector<int64_t>& shape, size_t chunk, Matrix<T> rows) {
        NamedTensor& tensor = tensors[name];
        if (tensor.values.empty()) tensor = {shape, std::vector<floatS>(size_t(tokens * rows.cols), floatS(NAN))};
        for (int64_t i = 0; i < rows.rows; ++i)
            for (int64_t j = 0; j < rows.cols; ++j)
                tensor.values[size_t(row_of_token[chunk][size_t(i)] * rows.cols + j)] = floatS(rows.row(i)[j]);
    }

    const Rank& rank;
    NamedTensors& tensors;
    int64_t tokens;                                  // of the whole batch
    std::vector<std::vector<int64_t>> row_of_token;  // [chunk][N] place among all tokens
};

// ---------------------------------------------------------------------------------------------------------------------

void dump(const std::string& directory) {
    Case c(directory);
    Rank& rank = c.rank;
    NamedTensors tensors;
    const Batch batch = batch_of(c.json["sequences"]);
    Borders borders(rank, batch, tensors);
    const Step step = c.step_of(batch);
    const Plan& plan = rank.plan_for(step.group_sizes, true);
    Observer observer{[&](size_t op) { borders.keep(plan, op); }, {}};

    const double loss = compute_gradients(rank, step, &observer);
    tensors["loss"] = {{}, {floatS(loss)}};
    borders.keep_losses(observer.losses);
    keep_parameters(tensors, rank, "grad.", rank.gradients);
    for (int64_t number = 1; number <= c.json["steps"]; ++number) {
        if (number > 1) compute_gradients(rank, step);
        c.optimizer_step(number);
    }
    keep_parameters(tensors, rank, "weight.", rank.master);
    write_tensors(directory + "/ours.safetensors", tensors);
}

void losses(const std::string& directory) {
    Case c(directory);
    std::vector<floatS> losses;
    for (const nlohmann::json& sequences : c.json["batches"]) {
        losses.push_back(floatS(compute_gradients(c.rank, c.step_of(batch_of(sequences)))));
        c.optimizer_step(int64_t(losses.size()));
    }
    write_tensors(directory + "/ours.safetensors", {{"losses", {{int64_t(losses.size())}, losses}}});
}

void adamw_alone(const std::string& directory) {
    Case c(directory);
    NamedTensors tensors;
    const SafetensorsReader gradients(directory + "/gradients.safetensors");
    for (int64_t number = 1; number <= c.json["steps"]; ++number) {
        read_parameters(c.rank, gradients, std::to_string(number) + ".", c.rank.gradients);
        c.optimizer_step(number);
    }
    keep_parameters(tensors, c.rank, "weight.", c.rank.master);
    write_tensors(directory + "/ours.safetensors", tensors);
}

void logits(const std::string& directory) {
    const nlohmann::json json = read_json_file(directory + "/case.json");
    Config c;
    c.run.checkpoint = json["checkpoint"];
    c.compute.threads = json["threads"];
    NoTransport transport;
    const ModelFile file(c, transport);
    Rank rank(file.options(0), transport);
    file.load(rank);
    Decoder decoder(rank);
    const std::vector<int32_t> tokens = json["tokens"];
    NamedTensors tensors;
    NamedTensor& rows = tensors["logits"];
    rows.shape = {int64_t(tokens.size()), rank.options.model.vocab};
    for (const int32_t& token : tokens) {
        const std::vector<floatX> row = decoder.append({&token, 1});
        rows.values.insert(rows.values.end(), row.begin(), row.end());
    }
    write_tensors(directory + "/ours.safetensors", tensors);
}

int main(int argc, char** argv) {
    try {
        const std::string mode = argc == 3 ? argv[1] : "";
        if (mode == "dump") dump(argv[2]);
        else if (mode == "losses") losses(argv[2]);
        else if (mode == "adamw") adamw_alone(argv[2]);
        else if (mode == "logits") logits(argv[2]);
        else throw Failure(EXIT_CONFIG, "usage: test_gpt dump|losses|adamw|logits DIR");
        return 0;
    } catch (const Failure& failure) {
        std::fprintf(stderr, "%s\n", failure.what());
        return failure.exit_code;
    }
}
