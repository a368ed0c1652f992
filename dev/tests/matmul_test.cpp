// The matrix products against a plain loop in double, for every instruction set of this machine: odd shapes, strides,
// every epilogue, rows beyond the matrix, NaN, and bits that do not depend on the thread count.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "llmc/kernels/matmul.cuh"

namespace {

std::vector<Isa> machine_isas() {
    std::vector<Isa> isas;
    for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
        if (isa <= cpu_isa()) isas.push_back(isa);
    return isas;
}

struct Workplace : Device {
    std::vector<std::byte> memory;
    explicit Workplace(int thread_count) : memory(matmul_scratch_bytes(thread_count) + 64) {
        threads = thread_count;
        scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
        scratch_bytes = matmul_scratch_bytes(thread_count);
    }
};

std::mt19937 generator;
int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin() { return pick(0, 1) == 1; }

// A matrix with values in [-1, 1] in memory of its own, its rows further apart than they are long.
template <class T>
struct Values {
    std::vector<T> data;
    Matrix<T> view;
    Values(int64_t rows, int64_t cols) {
        const int64_t stride = cols + pick(0, 9);
        data.resize(rows * stride);
        for (T& x : data) x = T(std::uniform_real_distribution<float>(-1, 1)(generator));
        view = {data.data(), rows, cols, stride};
    }
};

// ||a - b|| / ||b||, and a - b exactly zero in the gaps between rows.
template <class T>
double relative_error(const Values<T>& got, const std::vector<double>& expected) {
    double difference = 0, norm = 1e-300;
    for (size_t i = 0; i < expected.size(); i++) {
        const double d = double(got.data[i]) - expected[i];
        difference += d * d;
        norm += expected[i] * expected[i];
        if (int64_t(i) % got.view.stride >= got.view.cols && d != 0) return std::numeric_limits<double>::infinity();
    }
    return std::sqrt(difference / norm);
}
template <class T>
std::vector<double> as_double(const Values<T>& values) {
    return std::vector<double>(values.data.begin(), values.data.end());
}

// One random product; returns its largest relative error.
template <class T, class Out>
double product_error(Isa isa, int64_t rows, int64_t cols, int64_t depth) {
    const bool left_k = coin(), right_k = coin();
    const Values<T> left(left_k ? rows : depth, left_k ? depth : rows);
    const Values<T> right(right_k ? cols : depth, right_k ? depth : cols), bias(1, cols), gelu_input(rows, cols);
    Values<Out> out(rows, cols), addend(rows, cols);
    Values<T> pre(rows, cols);
    Values<SumOf<T>> sums(1, rows);
    const Operand<T> a{left.view.data, left.view.stride, left_k}, b{right.view.data, right.view.stride, right_k};

    Epilogue<T, Out> e{.out = out.view};
    if (coin()) e.bias = bias.view.data;
    if (coin()) e.activation = Activation::gelu;
    if (coin()) e.pre_activation = pre.view;
    if (coin()) e.gelu_input = gelu_input.view;
    if (coin()) e.addend = coin() ? out.view : addend.view;
    if (!left_k && coin()) e.left_sums = sums.view.data;

    std::vector<double> expected = as_double(out), expected_pre = as_double(pre), expected_sums = as_double(sums);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j++) {
            double sum = e.bias ? double(e.bias[j]) : 0;
            for (int64_t k = 0; k < depth; k++) sum += double(*a.at(i, k)) * double(*b.at(j, k));
            if (e.pre_activation.data) expected_pre[i * pre.view.stride + j] = sum;
            if (e.activation == Activation::gelu) sum = gelu_value(sum);
            if (e.gelu_input.data) sum *= gelu_gradient(double(gelu_input.view.row(i)[j]));
            if (e.addend.data) sum += double(e.addend.row(i)[j]);
            expected[i * out.view.stride + j] = sum;
        }
        if (e.left_sums)
            for (int64_t k = 0; k < depth; k++) expected_sums[i] += double(*a.at(i, k));
    }
    multiply<T, Out>(Workplace(int(pick(1, 4))), a, b, depth, e, isa);
    const double pre_error = relative_error(pre, expected_pre), sum_error = relative_error(sums, expected_sums);
    const double pre_scale = std::is_same_v<T, bf16> && std::is_same_v<Out, float> ? 1e-3 : 1;  // pre is bf16 there
    return std::max({relative_error(out, expected), pre_error * pre_scale, sum_error});
}

template <class T, class Out>
void check_products(const char* name, double bound) {
    for (Isa isa : machine_isas()) {
        generator.seed(1);
        double worst = 0;
        for (int trial = 0; trial < 100; trial++)
            worst = std::max(worst, product_error<T, Out>(isa, pick(1, 200), pick(1, 200), pick(1, 200)));
        worst = std::max(worst, product_error<T, Out>(isa, 67, 450, 1100));  // several blocks of depth and columns
        worst = std::max(worst, product_error<T, Out>(isa, 500, 33, 300));   // several blocks of rows
        worst = std::max(worst, product_error<T, Out>(isa, 7, 40, 20000));   // too deep to keep the right side packed
        printf("%s %s: relative error %.2g, bound %.2g\n", name, isa_name(isa), worst, bound);
        EXPECT_LE(worst, bound);
    }
}

TEST(Matmul, Fp32AgainstDouble) { check_products<float, float>("fp32", 2e-6); }
TEST(Matmul, Bf16AgainstDouble) { check_products<bf16, bf16>("bf16", 3e-3); }
TEST(Matmul, Bf16IntoFp32AgainstDouble) { check_products<bf16, float>("bf16 into fp32", 5e-6); }
TEST(Matmul, Fp64AgainstDouble) { check_products<double, double>("fp64", 1e-14); }

// The three products of a linear layer, in the build's precision, with gradients by their definition.
TEST(Matmul, LinearLayer) {
    const double bound = sizeof(floatX) == 2 ? 3e-3 : sizeof(floatX) == 4 ? 2e-6 : 1e-14;
    generator.seed(2);
    const int64_t N = 83, IC = 70, OC = 131;
    const Values<floatX> in(N, IC), weight(OC, IC), bias(1, OC), dout(N, OC), pre(N, IC);
    Values<floatX> out(N, OC), din(N, IC);
    Values<floatS> dweight(OC, IC), dbias(1, OC);
    std::vector<double> out_expected = as_double(out), din_expected = as_double(din);
    std::vector<double> dweight_expected = as_double(dweight), dbias_expected = as_double(dbias);
    for (int64_t n = 0; n < N; n++)
        for (int64_t o = 0; o < OC; o++) {
            double sum = bias.data[o];
            for (int64_t i = 0; i < IC; i++) {
                sum += double(in.view.row(n)[i]) * double(weight.view.row(o)[i]);
                double& d = din_expected[n * din.view.stride + i];
                d = (o == 0 ? 0 : d) + double(dout.view.row(n)[o]) * double(weight.view.row(o)[i]);
                dweight_expected[o * dweight.view.stride + i] +=
                    double(dout.view.row(n)[o]) * double(in.view.row(n)[i]);
            }
            out_expected[n * out.view.stride + o] = gelu_value(sum);
            dbias_expected[o] += double(dout.view.row(n)[o]);
        }
    for (int64_t n = 0; n < N; n++)
        for (int64_t i = 0; i < IC; i++)
            din_expected[n * din.view.stride + i] *= gelu_gradient(double(pre.view.row(n)[i]));

    const Workplace device(2);
    matmul_forward(device, out.view, in.view, weight.view, bias.view.data, Activation::gelu);
    matmul_backward_input(device, din.view, dout.view, weight.view, pre.view);
    matmul_backward_weight(device, dweight.view, dbias.view.data, dout.view, in.view);
    EXPECT_LE(relative_error(out, out_expected), bound);
    EXPECT_LE(relative_error(din, din_expected), bound);
    EXPECT_LE(relative_error(dweight, dweight_expected), 2e-6);
    EXPECT_LE(relative_error(dbias, dbias_expected), 2e-6);
}

template <class T>
void check_threads(Isa isa) {
    const int64_t rows = 211, cols = 410, depth = 777;
    const Values<T> left(depth, rows), right(cols, depth);
    std::vector<float> first, first_sums;
    for (int threads : {1, 2, 3, 4}) {
        std::vector<float> out(rows * cols, 1.f), sums(rows, 1.f);
        const Matrix<float> view(out.data(), rows, cols);
        Epilogue<T, float> e{.out = view, .addend = view, .left_sums = sums.data()};
        multiply<T, float>(Workplace(threads), {left.view.data, left.view.stride, false},
                           {right.view.data, right.view.stride, true}, depth, e, isa);
        if (threads == 1) first = out, first_sums = sums;
        EXPECT_EQ(out, first) << isa_name(isa) << " with " << threads << " threads";
        EXPECT_EQ(sums, first_sums) << isa_name(isa) << " with " << threads << " threads";
    }
}

TEST(Matmul, BitsDoNotDependOnThreads) {
    for (Isa isa : machine_isas()) {
        check_threads<float>(isa);
        check_threads<bf16>(isa);
    }
}

// A NaN reaches exactly the row it belongs to: no padding of a panel lets it into another.
template <class T>
void check_nan(Isa isa) {
    const int64_t rows = 45, cols = 71, depth = 39;
    Values<T> left(rows, depth);
    const Values<T> right(cols, depth);
    left.view.row(17)[depth - 1] = T(std::numeric_limits<float>::quiet_NaN());
    Values<T> out(rows, cols);
    multiply<T, T>(Workplace(2), {left.view.data, left.view.stride, true}, {right.view.data, right.view.stride, true},
                   depth, {.out = out.view, .activation = Activation::gelu}, isa);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) EXPECT_EQ(std::isnan(float(out.view.row(i)[j])), i == 17);
}

TEST(Matmul, NanStaysInItsRow) {
    for (Isa isa : machine_isas()) {
        check_nan<float>(isa);
        check_nan<bf16>(isa);
    }
}

TEST(Gelu, FloatAgainstDouble) {
    double value_error = 0, gradient_error = 0;
    for (int i = -150000; i <= 150000; i++) {
        const float x = float(i) * 1e-4f;
        value_error = std::max(value_error, std::abs(gelu_value(x) - gelu_value(double(x))) / (1 + std::abs(x)));
        gradient_error = std::max(gradient_error, std::abs(gelu_gradient(x) - gelu_gradient(double(x))));
    }
    printf("gelu: error %.2g, gradient %.2g, bound 4e-7\n", value_error, gradient_error);
    EXPECT_LE(value_error, 4e-7);
    EXPECT_LE(gradient_error, 4e-7);
    EXPECT_TRUE(std::isnan(gelu_value(std::numeric_limits<float>::quiet_NaN())));
    EXPECT_TRUE(std::isnan(gelu_gradient(std::numeric_limits<float>::quiet_NaN())));
    EXPECT_EQ(gelu_value(1e30f), 1e30f);
    EXPECT_EQ(gelu_gradient(100.f), 1.f);
}

}  // namespace
