// The blocked form of attention (FlashAttention-2, Dao 2023, arXiv:2307.08691), called by attention.cuh. Scores exist
// only as one block of keys by one panel of queries, stored key by key so that the lanes of a vector are queries; X' is
// a block of X stored that way.
//
//             panels of queries            forward: an item is a group of panels of one (segment, head). Each key block
//           +---+---+---+---+              is packed once for the group and meets every panel that sees it:
//   context | # | # | # | # |                S' = K Q'   online softmax   O' = O' exp(old - new base) + V' P'
//           +---+---+---+---+
//   key     | \ | # | # | # |              backward: an item is a group of key blocks of one (segment, head). Each
//   blocks  +---+---+---+---+              panel that sees the group is packed once and meets all its blocks:
//           |   | \ | # | # |                S' = K Q'   P' = exp(S' - lse)   dP' = V dO'   dS' = P' (dP' - D)
//           +---+---+---+---+                dV += P' dO   dK += dS' Q   and after the blocks   dQ' += K' dS'
//           |   |   | \ | # |
//           +---+---+---+---+              # all visible, \ masked, the rest skipped
//
// Threads get contiguous runs of items of equal cost, counted in visible (query, key) pairs. Backward, dK and dV of an
// item belong to one thread; where threads share a (segment, head), each keeps its part of dQ, and the parts are summed
// in the order of the threads: the result depends on their number, never on their timing.
#pragma once

#include <omp.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <span>

#include "llmc/common.h"
#include "llmc/device.h"
#include "llmc/kernels/attention_micro.h"
#include "llmc/kernels/simd.h"

// While it lives, numbers below the smallest normal one are zeros: a multiplication by one that is not costs some
// hundred cycles, and the tails of the softmax are full of them.
struct FlushDenormals {
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};

// Items in the order segment, head, group, cut into one contiguous run a thread. A group is of queries in the forward
// pass and of keys in the backward pass; the work before a position counts visible pairs, and 64 a row for packing it.
template <bool BACKWARD>
struct AttentionWork {
    std::span<const AttentionSegment> segments;
    int heads, threads;
    int64_t group;
    double share = 0;  // work of a thread

    static int64_t extent(const AttentionSegment& s) { return BACKWARD ? s.context + s.length : s.length; }
    static double work(const AttentionSegment& s, int64_t position) {
        if (!BACKWARD) return position * (s.context + 64 + 0.5 * position);
        const double masked = double(std::max<int64_t>(0, position - s.context));
        return double(position) * (s.length + 64) - 0.5 * masked * masked;
    }

    // Groups as large as is good for packing, but at least eight a thread.
    AttentionWork(std::span<const AttentionSegment> segments, int heads, int threads, int64_t unit, int64_t largest)
        : segments(segments), heads(heads), threads(threads) {
        int64_t rows = 0;
        for (const auto& s : segments) share += heads * work(s, extent(s)) / threads, rows += heads * extent(s);
        group = std::clamp(rows / (8 * threads) / unit * unit, unit, largest);
    }

    // visit(segment, head, owner) for each segment and head, owner(begin) the thread whose item begins at that
    // position.
    template <class Visit>
    void for_each_head(Visit visit) const {
        double before = 0;
        for (const auto& s : segments)
            for (int h = 0; h < heads; h++) {
                visit(s, h, [&, before](int64_t begin) {
                    const double middle = 0.5 * (work(s, begin) + work(s, std::min(begin + group, extent(s))));
                    return std::min(threads - 1, int((before + middle) / share));
                });
                before += work(s, extent(s));
            }
    }
};

// s[rows][panel]: row r is visible to the lanes from r - offset on.
inline void mask_future(float* s, int64_t rows, int64_t panel, int64_t offset) {
    for (int64_t r = std::max<int64_t>(0, offset + 1); r < rows; r++)
        std::fill_n(s + r * panel, std::min(panel, r - offset), -std::numeric_limits<float>::infinity());
}

template <class Blocks>
struct AttentionForward {
    using Packed = typename Blocks::Packed;
    static constexpr int64_t panel = Blocks::forward_panel, block = Blocks::forward_block,
                             group = Blocks::forward_group;

    Matrix<floatX> out;
    Matrix<float> lse;
    Matrix<const floatX> q;
    int64_t HS, width;  // width: head size padded with zeros to what the products want

    struct Space {
        float *s, *o, *base, *total, *rows_out;
        Packed *q, *k, *v, *v_across, *pairs, *p;
        Space(Allocator& memory, int64_t width) {
            s = memory.take<float>(block * panel);         // [block][panel] scores
            o = memory.take<float>(group * width);         // per panel [width][panel]: output so far
            base = memory.take<float>(group);              // what probabilities are relative to, as a power of two
            total = memory.take<float>(group);             // running sum
            rows_out = memory.take<float>(panel * width);  // [panel][width]
            q = memory.take<Packed>(group * width);        // per panel [width][panel]
            k = memory.take<Packed>(block * width);        // [block][width]
            v = memory.take<Packed>(std::max(panel, block) * width);  // [block][width]; first a panel of q
            v_across = Blocks::pairs ? memory.take<Packed>(block * width) : v;
            pairs = Blocks::pairs ? memory.take<Packed>(block * width) : nullptr;
            p = Blocks::pairs ? memory.take<Packed>(block * panel) : (Packed*)s;
        }
    };

    void item(const Space& space, const AttentionSegment& s, int h, int64_t begin, int64_t end) const {
        const int64_t panels = ceil_div(end - begin, panel);
        const float scale = float(std::numbers::log2e / std::sqrt(double(HS)));
        for (int64_t t = 0; t < panels; t++) {
            const int64_t query = begin + t * panel;
            pack_rows(space.v, panel, width, q.row(s.begin + query) + h * HS, q.stride, std::min(panel, end - query),
                      HS);
            Blocks::pack_right_across(space.q + t * panel * width, space.v, panel, width);
        }
        std::fill_n(space.o, panels * panel * width, 0.0f);
        std::fill_n(space.total, panels * panel, 0.0f);
        std::fill_n(space.base, panels * panel, -std::numeric_limits<float>::infinity());

        for (int64_t key = 0; key < s.context + end; key += block) {
            const int64_t count = std::min(block, s.context + s.length - key), first = key * s.kv_stride + h * HS;
            pack_rows(space.k, block, width, s.k + first, s.kv_stride, count, HS);
            pack_rows(space.v, block, width, s.v + first, s.kv_stride, count, HS);
            const auto v_across = Blocks::pack_left_across(space.v_across, space.v, space.pairs, block, width);
            for (int64_t t = 0; t < panels; t++) {
                const int64_t query = begin + t * panel, queries = std::min(panel, end - query);
                const int64_t visible = s.context + query + queries - key;  // keys of this block, to the last query
                if (visible <= 0) continue;
                const int64_t m = std::min(block, round_up(visible, Blocks::row_multiple));
                const int64_t n = round_up(queries, Blocks::lane_multiple);
                float* o = space.o + t * panel * width;
                Blocks::product(space.s, panel, {space.k, width, 1}, space.q + t * panel * width, panel, m, n, width,
                                false);
                mask_future(space.s, m, panel, s.context + query - key);
                Blocks::softmax(space.s, space.p, m, panel, n, scale, space.base + t * panel, space.total + t * panel,
                                o, width);
                Blocks::product(o, panel, v_across, space.p, panel, width, n, m, true);
            }
        }

        for (int64_t i = begin; i < end; i++) {
            const int64_t at = i - begin, lane = at % panel;
            if (lane == 0) transpose_words(space.rows_out, width, space.o + at * width, panel, width, panel);
            const float factor = 1 / space.total[at], *row = space.rows_out + lane * width;
            floatX* to = out.row(s.begin + i) + h * HS;
            for (int64_t c = 0; c < HS; c++) assign(to[c], row[c] * factor);
            lse.row(s.begin + i)[h] = space.base[at] * float(std::numbers::ln2) + std::log(space.total[at]);
        }
    }
};

template <class Blocks>
struct AttentionBackward {
    using Packed = typename Blocks::Packed;
    static constexpr int64_t panel = Blocks::backward_panel, block = Blocks::backward_block,
                             group = Blocks::backward_group;

    Matrix<floatX> dq;
    Matrix<const floatX> dout, q;
    const float *lse, *D;  // [NH, N]; lse as a power of two
    int64_t HS, width;

    struct Space {
        float *s, *dp, *dk, *dv, *lse, *D, *sum, *rows_out;
        Packed *q, *q_across, *q_pairs, *dout, *dout_across, *dout_pairs, *k, *k_across, *v, *pairs, *p, *ds, *ds_pairs;
        Space(Allocator& memory, int64_t width) {
            s = memory.take<float>(block * panel);                             // [block][panel] scores
            dp = memory.take<float>((Blocks::pairs ? block : group) * panel);  // [block][panel]
            dk = memory.take<float>(group * width);                            // [group][width]
            dv = memory.take<float>(group * width);                            // [group][width]
            lse = memory.take<float>(panel);
            D = memory.take<float>(panel);
            sum = memory.take<float>(panel * width);       // [width][panel] dq
            rows_out = memory.take<float>(panel * width);  // [panel][width]
            const auto packed = [&](int64_t count) { return memory.take<Packed>(count); };
            q = packed(panel * width), dout = packed(panel * width);                // [panel][width]
            q_across = packed(panel * width), dout_across = packed(panel * width);  // [width][panel]
            k = packed(group * width), v = packed(group * width);                   // [group][width]
            q_pairs = Blocks::pairs ? packed(panel * width) : q;
            dout_pairs = Blocks::pairs ? packed(panel * width) : dout;
            pairs = Blocks::pairs ? packed(group * width) : nullptr;
            k_across = Blocks::pairs ? packed(group * width) : k;            // [width][group]
            p = Blocks::pairs ? packed(block * panel) : (Packed*)s;          // [block][panel]
            ds = Blocks::pairs ? packed(block * panel) : (Packed*)dp;        // [block][panel]
            ds_pairs = Blocks::pairs ? packed(group * panel) : (Packed*)dp;  // [group][panel]
        }
    };

    // Adds to sums, dq of this segment and head, per panel [width][panel]; the first item of a thread writes them.
    void item(const Space& space, const AttentionSegment& s, int h, int64_t begin, int64_t end, float* sums,
              bool first) const {
        const float scale = float(std::numbers::log2e / std::sqrt(double(HS)));
        const int64_t keys = end - begin, padded = round_up(keys, block);
        pack_rows(space.k, padded, width, s.k + begin * s.kv_stride + h * HS, s.kv_stride, keys, HS);
        pack_rows(space.v, padded, width, s.v + begin * s.kv_stride + h * HS, s.kv_stride, keys, HS);
        const auto k_across = Blocks::pack_left_across(space.k_across, space.k, space.pairs, padded, width);
        std::fill_n(space.dk, padded * width, 0.0f);
        std::fill_n(space.dv, padded * width, 0.0f);

        for (int64_t query = std::max<int64_t>(0, begin - s.context) / panel * panel; query < s.length;
             query += panel) {
            const int64_t queries = std::min(panel, s.length - query), row = s.begin + query;
            const int64_t n = round_up(queries, Blocks::lane_multiple);
            pack_rows(space.q, panel, width, q.row(row) + h * HS, q.stride, queries, HS);
            pack_rows(space.dout, panel, width, dout.row(row) + h * HS, dout.stride, queries, HS);
            pack_rows(space.lse, 1, panel, lse + h * q.rows + row, 0, 1, queries);
            pack_rows(space.D, 1, panel, D + h * q.rows + row, 0, 1, queries);
            Blocks::pack_right_across(space.q_across, space.q, panel, width);
            Blocks::pack_right_across(space.dout_across, space.dout, panel, width);
            Blocks::pack_right(space.q_pairs, space.q, panel, width);
            Blocks::pack_right(space.dout_pairs, space.dout, panel, width);

            const int64_t visible = std::min(keys, s.context + query + queries - begin);
            const int64_t rows = round_up(visible, Blocks::row_multiple);
            for (int64_t key = 0; key < rows; key += block) {
                const int64_t m = std::min(block, rows - key);
                Packed* ds_pairs = space.ds_pairs + key * panel;
                float* dp = Blocks::pairs ? space.dp : space.dp + key * panel;
                Packed* ds = Blocks::pairs ? space.ds : (Packed*)dp;
                Blocks::product(space.s, panel, {space.k + key * width, width, 1}, space.q_across, panel, m, n, width,
                                false);
                Blocks::product(dp, panel, {space.v + key * width, width, 1}, space.dout_across, panel, m, n, width,
                                false);
                mask_future(space.s, m, panel, s.context + query - begin - key);
                Blocks::gradient(space.s, dp, space.p, ds, ds_pairs, m, panel, n, scale, space.lse, space.D);
                Blocks::product(space.dv + key * width, width, {space.p, panel, 1}, space.dout_pairs, width, m, width,
                                n, true);
                Blocks::product(space.dk + key * width, width, {ds, panel, 1}, space.q_pairs, width, m, width, n, true);
            }
            Blocks::product(sums + query * width, panel, k_across, space.ds_pairs, panel, width, n, rows, !first);
        }

        const float factor = 1 / std::sqrt(float(HS));
        for (int64_t j = 0; j < keys; j++) {
            const float *dk = space.dk + j * width, *dv = space.dv + j * width;
            if (s.dk) {
                floatX *to_k = s.dk + (begin + j) * s.dkv_stride + h * HS,
                       *to_v = s.dv + (begin + j) * s.dkv_stride + h * HS;
                for (int64_t c = 0; c < HS; c++) assign(to_k[c], factor * dk[c]), assign(to_v[c], dv[c]);
            } else {
                float *to_k = s.dk_sum + (begin + j) * s.sum_stride + h * HS,
                      *to_v = s.dv_sum + (begin + j) * s.sum_stride + h * HS;
                for (int64_t c = 0; c < HS; c++) to_k[c] += factor * dk[c], to_v[c] += dv[c];
            }
        }
    }

    // dq of one panel from its sum [width][panel]
    void write(const Space& space, const AttentionSegment& s, int h, int64_t query, const float* sum) const {
        const float factor = 1 / std::sqrt(float(HS));
        transpose_words(space.rows_out, width, sum, panel, width, panel);
        for (int64_t i = query; i < std::min(query + panel, s.length); i++) {
            const float* row = space.rows_out + (i - query) * width;
            floatX* to = dq.row(s.begin + i) + h * HS;
            for (int64_t c = 0; c < HS; c++) assign(to[c], factor * row[c]);
        }
    }
};

// Scratch: the backward pass needs lse and D [NH, N], two dq sums [N, width] a thread, and the thread's blocks.
template <class Blocks>
size_t attention_blocks_scratch_bytes(int threads, int64_t HS, int heads, int64_t tokens) {
    const int64_t width = round_up(HS, Blocks::width_multiple);
    Allocator forward, backward;
    typename AttentionForward<Blocks>::Space forward_space(forward, width);
    for (int i = 0; i < 2; i++) backward.take<float>(round_up(tokens, Blocks::backward_panel) * width);
    typename AttentionBackward<Blocks>::Space backward_space(backward, width);
    const size_t statistics = 2 * round_up(heads * tokens * sizeof(float), 64);
    return std::max(threads * size_t(forward.used), threads * size_t(backward.used) + statistics);
}

template <class Blocks>
void attention_forward_blocks(const Device& device, Matrix<floatX> out, Matrix<floatS> lse, Matrix<const floatX> q,
                              std::span<const AttentionSegment> segments, int heads) {
    using Forward = AttentionForward<Blocks>;
    const int64_t HS = q.cols / heads;
    const Forward forward{out, lse, q, HS, round_up(HS, Blocks::width_multiple)};
    const AttentionWork<false> work(segments, heads, device.threads, Forward::panel, Forward::group);
    Allocator counter;
    typename Forward::Space(counter, forward.width);
    const size_t bytes = size_t(counter.used);
    std::byte* scratch = device.scratch_as<std::byte>(bytes * device.threads);
#pragma omp parallel num_threads(device.threads)
    {
        const int thread = omp_get_thread_num();
        Allocator own{scratch + thread * bytes};
        const typename Forward::Space space(own, forward.width);
        const FlushDenormals flush;
        [[maybe_unused]] const typename Blocks::Thread setup;
        work.for_each_head([&](const AttentionSegment& s, int h, auto owner) {
            for (int64_t begin = 0; begin < s.length; begin += work.group)
                if (owner(begin) == thread) forward.item(space, s, h, begin, std::min(begin + work.group, s.length));
        });
    }
}

template <class Blocks>
void attention_backward_blocks(const Device& device, Matrix<floatX> dq, Matrix<const floatX> dout,
                               Matrix<const floatX> out, Matrix<const floatX> q, Matrix<const floatS> lse,
                               std::span<const AttentionSegment> segments, int heads, Matrix<const floatS> delta) {
    using Backward = AttentionBackward<Blocks>;
    constexpr int64_t panel = Backward::panel;
    const int64_t HS = q.cols / heads, width = round_up(HS, Blocks::width_multiple), N = q.rows;
    const AttentionWork<true> work(segments, heads, device.threads, Backward::block, Backward::group);
    Allocator memory{
        device.scratch_as<std::byte>(attention_blocks_scratch_bytes<Blocks>(device.threads, HS, heads, N))};
    float *lse_powers = memory.take<float>(heads * N), *D = memory.take<float>(heads * N);
    std::byte* const threads_memory = memory.base + memory.used;
    Allocator counter;
    for (int i = 0; i < 2; i++) counter.take<float>(round_up(N, panel) * width);
    typename Backward::Space(counter, width);
    const int64_t bytes = counter.used;
    // dq sums of a thread: of heads that it begins, and of one that a thread before it began
    const auto sums = [&](int thread, bool began) {
        return reinterpret_cast<float*>(threads_memory + thread * bytes) + (began ? 0 : round_up(N, panel) * width);
    };
    const Backward backward{dq, dout, q, lse_powers, D, HS, width};
#pragma omp parallel num_threads(device.threads)
    {
        const int thread = omp_get_thread_num();
        Allocator own{threads_memory + thread * bytes};
        for (int i = 0; i < 2; i++) own.take<float>(round_up(N, panel) * width);
        const typename Backward::Space space(own, width);
        const FlushDenormals flush;
        [[maybe_unused]] const typename Blocks::Thread setup;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; i++)
            for (int h = 0; h < heads; h++) {
                D[h * N + i] =
                    delta.rows ? delta.row(i)[h] : attention_dot<float>(dout.row(i) + h * HS, out.row(i) + h * HS, HS);
                lse_powers[h * N + i] = lse.row(i)[h] * float(std::numbers::log2e);
            }
        work.for_each_head([&](const AttentionSegment& s, int h, auto owner) {
            const int64_t keys = s.context + s.length;
            const int began = owner(0), ended = owner((keys - 1) / work.group * work.group);
            if (thread < began || thread > ended) return;
            float* sum = sums(thread, thread == began);
            bool first = true;
            for (int64_t begin = 0; begin < keys; begin += work.group)
                if (owner(begin) == thread) {
                    backward.item(space, s, h, begin, std::min(begin + work.group, keys), sum, first);
                    first = false;
                }
            if (began == ended)
                for (int64_t query = 0; query < s.length; query += panel)
                    backward.write(space, s, h, query, sum + query * width);
        });
#pragma omp barrier
        // Heads that threads shared: panels dealt to all threads, each panel's parts added in the order of the owners.
        work.for_each_head([&](const AttentionSegment& s, int h, auto owner) {
            const int64_t keys = s.context + s.length;
            const int began = owner(0), ended = owner((keys - 1) / work.group * work.group);
            if (began == ended) return;
            for (int64_t query = thread * panel; query < s.length; query += device.threads * panel) {
                std::copy_n(sums(began, true) + query * width, panel * width, space.sum);
                int last = began;
                for (int64_t begin = 0; begin < std::min(keys, s.context + query + panel); begin += work.group)
                    if (owner(begin) != last) {
                        last = owner(begin);
                        const float* part = sums(last, false) + query * width;
                        for (int64_t c = 0; c < panel * width; c++) space.sum[c] += part[c];
                    }
                backward.write(space, s, h, query, space.sum);
            }
        });
    }
}
