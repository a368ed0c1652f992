// The kernels on fixed inputs, one build for each device and precision, and the comparison of what they give.
// The reference is the CPU build in fp64. test_kernels.py runs it, and on a GPU dev/gpu_check.sh.
//
//   kernel_cases OUTPUTS [--only OP]         runs the cases of dev/tests/kernel_cases/OP.h, or of all but
//                                            cudnn_attention, and writes their outputs
//   kernel_cases compare REFERENCE OUTPUTS   prints the worst error of each kernel beside its bound
#include <cstdio>
#include <fstream>
#include <sstream>

#include "kernel_cases/cases.h"

using Op = std::pair<std::string, void (*)(Cases&)>;

// -DONE_OP=OP builds the cases of one op alone, in a part of the time.
#ifdef ONE_OP
#define TEXT_OF(text) #text
#define TEXT(text) TEXT_OF(text)
#define CASES_OF(op) op##_cases
#define CASES(op) CASES_OF(op)
// clang-format off
#include TEXT(kernel_cases/ONE_OP.h)
// clang-format on
const std::vector<Op> OPS = {{TEXT(ONE_OP), CASES(ONE_OP)}};
#else
#include "kernel_cases/adamw.h"
#include "kernel_cases/attention.h"
#include "kernel_cases/classifier.h"
#include "kernel_cases/copy_reduce.h"
#include "kernel_cases/cudnn_attention.h"
#include "kernel_cases/encoder.h"
#include "kernel_cases/gelu.h"
#include "kernel_cases/layernorm.h"
#include "kernel_cases/matmul.h"
const std::vector<Op> OPS = {{"adamw", adamw_cases},
                             {"attention", attention_cases},
                             {"classifier", classifier_cases},
                             {"copy_reduce", copy_reduce_cases},
                             {"encoder", encoder_cases},
                             {"gelu", gelu_cases},
                             {"layernorm", layernorm_cases},
                             {"matmul", matmul_cases},
                             {"cudnn_attention", cudnn_attention_cases}};
#endif

constexpr size_t FEWEST_SHAPES = 20;  // of each output

// A record is a line `output <tab> shape <tab> bound <tab> count` and count doubles.
void write(const Records& records, const std::string& path) {
    std::ofstream file(path, std::ios::binary);
    for (const auto& [output, shapes] : records)
        for (const auto& [shape, record] : shapes) {
            file << output << '\t' << shape << '\t' << record.bound << '\t' << record.values.size() << '\n';
            file.write(reinterpret_cast<const char*>(record.values.data()),
                       std::streamsize(record.values.size() * sizeof(double)));
        }
    if (!file.flush()) throw Failure(EXIT_STORAGE, "cannot write " + path);
}

Records read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Failure(EXIT_DATA, "cannot read " + path);
    Records records;
    for (std::string line; std::getline(file, line);) {
        std::istringstream fields(line);
        std::string output, shape;
        std::getline(fields, output, '\t');
        std::getline(fields, shape, '\t');
        Record record;
        size_t count = 0;
        fields >> record.bound >> count;
        record.values.resize(count);
        if (!fields ||
            !file.read(reinterpret_cast<char*>(record.values.data()), std::streamsize(count * sizeof(double))))
            throw Failure(EXIT_DATA, path + " ends within a record, or is not the output of kernel_cases");
        records[output][shape] = std::move(record);
    }
    return records;
}

// |got - want| / |want|; NaN where one of them has a NaN, or they differ in size.
double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
    if (got.size() != want.size()) return std::nan("");
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) {
        difference += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    return difference == 0 ? 0 : std::sqrt(difference / norm);
}

// True if every output of the reference is there and within its bound.
bool compare(const Records& reference, const Records& outputs) {
    int passed = 0, failed = 0;
    const auto tell = [&](bool ok, const std::string& output, size_t shapes, const std::string& what) {
        (ok ? passed : failed)++;
        std::printf("%-6s %-40s %3zu shapes  %s\n", ok ? "ok" : "FAILED", output.c_str(), shapes, what.c_str());
    };
    for (const auto& [output, shapes] : outputs)
        if (!reference.count(output)) tell(false, output, shapes.size(), "is not in the reference");
    for (const auto& [output, shapes] : reference) {
        const auto found = outputs.find(output);
        if (found == outputs.end()) {
            tell(false, output, 0, "is missing");
            continue;
        }
        bool ok = shapes.size() >= FEWEST_SHAPES && found->second.size() == shapes.size();
        double worst = -1, bound = 0;
        std::string where = "there must be " + std::to_string(FEWEST_SHAPES) + " shapes, the same in both";
        for (const auto& [shape, want] : shapes) {
            const auto got = found->second.find(shape);
            if (got == found->second.end()) {
                ok = false;
                where = shape + " is missing";
                break;
            }
            const double error = relative_error(got->second.values, want.values);
            if (!(error <= got->second.bound)) ok = false;
            if (!(error <= worst)) worst = error, bound = got->second.bound, where = shape;
            if (std::isnan(error)) break;
        }
        char text[64];
        std::snprintf(text, sizeof text, "worst %8.1e  bound %8.1e  ", worst, bound);
        tell(ok, output, shapes.size(), text + where);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0;
}

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    try {
        if (arguments.size() == 3 && arguments[0] == "compare")
            return compare(read(arguments[1]), read(arguments[2])) ? 0 : 1;
        const bool only = arguments.size() == 3 && arguments[1] == "--only";
        if (arguments.size() != 1 && !only)
            throw Failure(EXIT_CONFIG,
                          "usage: kernel_cases OUTPUTS [--only OP], or kernel_cases compare REFERENCE OUTPUTS");
#ifdef USE_CUDA
#ifdef USE_CUDNN
        const std::string absence = cudnn_absence();
#else
        const std::string absence = "this program was built without cuDNN";
#endif
        if (only && arguments[2] == "cudnn_attention" && !absence.empty())
            return std::printf("%s\n", absence.c_str()), 77;  // nothing was checked
#endif
        Records records;
        bool known = false;
        for (const auto& [name, run_cases] : OPS)
            if (only ? arguments[2] == name : name != "cudnn_attention") {
                known = true;
                Cases cases;
                run_cases(cases);
                records.merge(cases.records);
            }
        if (!known) throw Failure(EXIT_CONFIG, "no cases of this name: " + (only ? arguments[2] : "none are built in"));
        write(records, arguments[0]);
    } catch (const Failure& failure) {
        std::fprintf(stderr, "kernel_cases: %s\n", failure.what());
        return failure.exit_code;
    }
    return 0;
}
