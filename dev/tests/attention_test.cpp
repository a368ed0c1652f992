// Attention, forward and backward, in every form that this CPU can run, against the plain loops in double precision:
// packed segments of any length, slices with context, odd head counts and sizes, several thread counts.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

#include "llmc/kernels/attention.cuh"

namespace {

// Norm-wise relative error allowed: what the storage rounds, and sums of a few hundred terms.
#if defined(PRECISION_FP64)
constexpr double BOUND = 1e-13;
#elif defined(PRECISION_BF16)
constexpr double BOUND = 1e-2;
#else
constexpr double BOUND = 2e-6;
#endif

struct Shape {
    int64_t length, context = 0;
};  // context > 0: keys, values and their gradients lie apart from qkv

// The inputs and results of one chunk in storage X with statistics S. Results start as NaN, so that what a kernel fails
// to write is found; the fp32 sums of sliced sequences start at values that it must add to.
template <class X, class S>
struct Chunk {
    int heads;
    int64_t N = 0, C;
    std::vector<Shape> shapes;
    std::vector<X> qkv, dqkv, out, dout;
    std::vector<S> lse;
    std::vector<std::vector<X>> keys, values;
    std::vector<std::vector<S>> dk_sums, dv_sums;

    Chunk(int heads, int64_t HS, const std::vector<Shape>& shapes) : heads(heads), C(heads * HS), shapes(shapes) {
        const X nan = X(std::numeric_limits<float>::quiet_NaN());
        for (const Shape& s : shapes) N += s.length;
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        // rounded to bf16 in every storage: the same inputs for the reference; scores of deviation 2
        const auto fill = [&](auto& values, int64_t count, float scale) {
            values.resize(count);
            for (auto& v : values) v = X(float(bf16(scale * normal(random))));
        };
        fill(qkv, N * 3 * C, 1.4f), fill(dout, N * C, 1.0f);
        dqkv.assign(N * 3 * C, nan), out.assign(N * C, nan), lse.assign(N * heads, nan);
        for (const Shape& s : shapes) {
            const int64_t count = s.context ? (s.context + s.length) * C : 0;
            fill(keys.emplace_back(), count, 1.4f), fill(values.emplace_back(), count, 1.4f);
            dk_sums.emplace_back(count, S(0.5)), dv_sums.emplace_back(count, S(-0.25));
        }
    }

    std::vector<AttentionSegmentOf<X, S>> segments() {
        std::vector<AttentionSegmentOf<X, S>> list;
        for (int64_t i = 0, begin = 0; i < int64_t(shapes.size()); begin += shapes[i++].length) {
            X *row = &qkv[begin * 3 * C], *drow = &dqkv[begin * 3 * C];
            if (shapes[i].context)
                list.push_back({begin, shapes[i].length, shapes[i].context, keys[i].data(), values[i].data(), C,
                                nullptr, nullptr, 0, dk_sums[i].data(), dv_sums[i].data(), C});
            else
                list.push_back(
                    {begin, shapes[i].length, 0, row + C, row + 2 * C, 3 * C, drow + C, drow + 2 * C, 3 * C});
        }
        return list;
    }
    Matrix<X> q() { return {qkv.data(), N, C, 3 * C}; }
    Matrix<X> dq() { return {dqkv.data(), N, C, 3 * C}; }
    Matrix<X> output() { return {out.data(), N, C}; }
    Matrix<X> doutput() { return {dout.data(), N, C}; }
    Matrix<S> statistics() { return {lse.data(), N, heads}; }
};

// A device whose scratch is full of NaN.
struct TestDevice : Device {
    std::vector<std::byte> memory;
    TestDevice(int threads, size_t bytes) : memory(bytes + 64, std::byte(0xff)) {
        this->threads = threads, scratch_bytes = bytes;
        scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    }
};

template <class A, class B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
    double difference = 0, norm = 1e-30;
    for (size_t i = 0; i < a.size(); i++) {
        difference += (double(a[i]) - double(b[i])) * (double(a[i]) - double(b[i]));
        norm += double(b[i]) * double(b[i]);
    }
    return std::sqrt(difference / norm);
}

std::vector<Isa> levels() {
    if (sizeof(floatX) == 8) return {Isa::avx2};  // the loops themselves
    std::vector<Isa> list;
    for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx})
        if (isa <= cpu_isa()) list.push_back(isa);
    return list;
}

struct Attention : testing::Test {
    static inline std::map<std::string, double> worst;
    static void TearDownTestSuite() {
        for (const auto& [name, error] : worst)
            std::printf("  %-8s worst relative error %.1e, bound %.0e\n", name.c_str(), error, BOUND);
    }
};

// NaN fails every comparison with a bound.
template <class A, class B>
void expect_near(const char* name, const std::vector<A>& ours, const std::vector<B>& exact) {
    const double error = relative_error(ours, exact);
    Attention::worst[name] = std::max(Attention::worst[name], error);
    EXPECT_LT(error, BOUND) << name;
}

void run(Chunk<floatX, floatS>& chunk, int threads, Isa isa) {
    const TestDevice device(threads,
                            attention_scratch_bytes(threads, chunk.C / chunk.heads, chunk.heads, chunk.N, isa));
    const auto segments = chunk.segments();
    attention_forward(device, chunk.output(), chunk.statistics(), chunk.q(), segments, chunk.heads, isa);
    attention_backward(device, chunk.dq(), chunk.doutput(), chunk.output(), chunk.q(), chunk.statistics(), segments,
                       chunk.heads, isa);
}

void compare(int heads, int64_t HS, const std::vector<Shape>& shapes, const std::vector<int>& thread_counts = {1, 3}) {
    Chunk<double, double> exact(heads, HS, shapes);
    const TestDevice device(2, 2 * 2 * HS * sizeof(double));
    const auto segments = exact.segments();
    using Segments = std::span<const AttentionSegmentOf<double, double>>;
    attention_forward_reference<double, double>(device, exact.output(), exact.statistics(), exact.q(),
                                                Segments(segments), heads);
    attention_backward_reference<double, double>(device, exact.dq(), exact.doutput(), exact.output(), exact.q(),
                                                 exact.statistics(), Segments(segments), heads);
    for (Isa isa : levels())
        for (int threads : thread_counts) {
            SCOPED_TRACE(std::string(isa_name(isa)) + ", " + std::to_string(threads) + " threads, " +
                         std::to_string(heads) + " heads of " + std::to_string(HS));
            Chunk<floatX, floatS> ours(heads, HS, shapes);
            run(ours, threads, isa);
            // k and v of slices are no part of dqkv: both sides leave the NaN there
            const int64_t C = ours.C;
            for (int64_t i = 0, row = 0; i < int64_t(shapes.size()); row += shapes[i++].length)
                if (shapes[i].context)
                    for (int64_t r = row; r < row + shapes[i].length; r++)
                        for (int64_t c = C; c < 3 * C; c++) {
                            EXPECT_TRUE(std::isnan(float(ours.dqkv[r * 3 * C + c])));
                            ours.dqkv[r * 3 * C + c] = exact.dqkv[r * 3 * C + c] = 0;
                        }
            expect_near("out", ours.out, exact.out);
            expect_near("lse", ours.lse, exact.lse);
            expect_near("dqkv", ours.dqkv, exact.dqkv);
            for (size_t i = 0; i < shapes.size(); i++)
                if (shapes[i].context) {
                    expect_near("dk_sum", ours.dk_sums[i], exact.dk_sums[i]);
                    expect_near("dv_sum", ours.dv_sums[i], exact.dv_sums[i]);
                }
        }
}

TEST_F(Attention, HeadSizes) {
    for (int64_t HS : {8, 16, 24, 32, 48, 64, 80, 96, 128, 1, 7, 33}) compare(2, HS, {{70}, {150}});
}

TEST_F(Attention, HeadCounts) {
    for (int heads : {1, 3, 5, 25}) compare(heads, 16, {{65}, {3}});
}

TEST_F(Attention, SegmentLengths) {
    for (int64_t length : {1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 127, 129, 400, 1100})
        compare(1, 32, {{length}});
}

TEST_F(Attention, PackedSegments) {
    compare(3, 32, {{1}, {1}, {5}, {100}, {1}, {49}, {2}, {300}, {1}});
    compare(2, 24, {{1}, {1}, {1}});
}

TEST_F(Attention, SlicesWithContext) {
    compare(2, 64, {{100, 1}});
    compare(2, 64, {{1, 200}});
    compare(3, 40, {{50, 64}, {10}, {64, 63}, {1, 1}, {1}, {130, 700}});
}

TEST_F(Attention, OneLongSequenceSharedByThreads) { compare(1, 64, {{1500}, {3}, {1}}, {2, 4, 7}); }

TEST_F(Attention, SlicesInTurnEqualTheWhole) {
    const int heads = 3;
    const int64_t HS = 32, C = heads * HS, N = 500;
    for (Isa isa : levels()) {
        SCOPED_TRACE(isa_name(isa));
        Chunk<floatX, floatS> whole(heads, HS, {{N}}), slices(heads, HS, {{N}});
        run(whole, 2, isa);
        const TestDevice device(2, attention_scratch_bytes(2, HS, heads, N, isa));
        std::vector<floatS> dk(N * C), dv(N * C);
        std::vector<AttentionSegment> list;
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 130}, {130, 131}, {131, 320}, {320, N}})
            list.push_back({begin, end - begin, begin, &slices.qkv[C], &slices.qkv[2 * C], 3 * C, nullptr, nullptr, 0,
                            dk.data(), dv.data(), C});
        for (const AttentionSegment& slice : list)
            attention_forward(device, slices.output(), slices.statistics(), slices.q(), std::span(&slice, 1), heads,
                              isa);
        for (size_t i = list.size(); i-- > 0;)
            attention_backward(device, slices.dq(), slices.doutput(), slices.output(), slices.q(), slices.statistics(),
                               std::span(&list[i], 1), heads, isa);
        for (int64_t r = 0; r < N; r++)
            for (int64_t c = 0; c < C; c++) {
                slices.dqkv[r * 3 * C + C + c] = dk[r * C + c];
                slices.dqkv[r * 3 * C + 2 * C + c] = dv[r * C + c];
            }
        expect_near("out", slices.out, whole.out);
        expect_near("lse", slices.lse, whole.lse);
        expect_near("dqkv", slices.dqkv, whole.dqkv);
    }
}

TEST_F(Attention, LargeScores) {
    // scores of some hundreds: a softmax without the running maximum would overflow
    const auto enlarge = [](auto& chunk) {
        for (auto& v : chunk.qkv) v = 16 * v;
    };
    Chunk<double, double> exact(2, 64, {{200}});
    enlarge(exact);
    const TestDevice device(1, 2 * 64 * sizeof(double));
    const auto segments = exact.segments();
    attention_forward_reference<double, double>(device, exact.output(), exact.statistics(), exact.q(),
                                                std::span<const AttentionSegmentOf<double, double>>(segments), 2);
    for (Isa isa : levels()) {
        SCOPED_TRACE(isa_name(isa));
        Chunk<floatX, floatS> ours(2, 64, {{200}});
        enlarge(ours);
        run(ours, 2, isa);
        EXPECT_LT(relative_error(ours.out, exact.out), 20 * BOUND);  // scores carry a larger absolute error
        EXPECT_LT(relative_error(ours.lse, exact.lse), BOUND);
        for (floatX v : ours.dqkv) EXPECT_TRUE(std::isfinite(float(v)));
    }
}

TEST_F(Attention, FutureTokensChangeNoBit) {
    for (Isa isa : levels()) {
        Chunk<floatX, floatS> a(2, 32, {{300}}), b(2, 32, {{300}});
        for (size_t i = 200 * 3 * a.C; i < b.qkv.size(); i++) b.qkv[i] = floatX(3);
        run(a, 2, isa), run(b, 2, isa);
        EXPECT_EQ(std::memcmp(a.out.data(), b.out.data(), 200 * a.C * sizeof(floatX)), 0) << isa_name(isa);
    }
}

TEST_F(Attention, RepeatsBitForBitAndForwardIsFreeOfTheThreadCount) {
    for (Isa isa : levels()) {
        Chunk<floatX, floatS> a(3, 64, {{700}, {20}, {90, 400}}), b = a, c = a;
        run(a, 4, isa), run(b, 4, isa), run(c, 1, isa);
        const auto same = [](const auto& x, const auto& y) {
            return std::memcmp(x.data(), y.data(), x.size() * sizeof(x[0])) == 0;
        };
        EXPECT_TRUE(same(a.out, b.out) && same(a.lse, b.lse) && same(a.dqkv, b.dqkv)) << isa_name(isa);
        EXPECT_TRUE(same(a.dk_sums[2], b.dk_sums[2]) && same(a.dv_sums[2], b.dv_sums[2])) << isa_name(isa);
        EXPECT_TRUE(same(a.out, c.out) && same(a.lse, c.lse)) << isa_name(isa);
    }
}

TEST_F(Attention, NanReachesOutputAndGradients) {
    for (Isa isa : levels()) {
        Chunk<floatX, floatS> chunk(1, 32, {{100}, {100}});
        chunk.qkv[40 * 3 * chunk.C] = floatX(std::numeric_limits<float>::quiet_NaN());  // one query
        run(chunk, 2, isa);
        EXPECT_TRUE(std::isnan(float(chunk.out[40 * chunk.C]))) << isa_name(isa);
        EXPECT_TRUE(std::isnan(float(chunk.dqkv[40 * 3 * chunk.C]))) << isa_name(isa);
        EXPECT_TRUE(std::isfinite(float(chunk.out[140 * chunk.C]))) << isa_name(isa);  // another segment
    }
}

}  // namespace
