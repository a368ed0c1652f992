// Matrix products of the linear layers: out = in W^T + bias, din = dout W, dW += dout^T in, with bias, GELU, their
// derivatives and the residual addition fused into the write of the result. Weights are [OC, IC] as in llm.c; the
// model's blocks call them.
//
// All three are  out(i, j) = sum over k of left(i, k) right(j, k)  with operands that are contiguous either in k or in
// their rows. A thread owns a rectangle of the result and works on it in blocks (no sharing, no barriers):
//
//                     NC columns             for each NC columns of its rectangle
//                  +-------------+             for each MC rows
//          k -->   | NR NR NR NR |               for each KC of the depth     pack the right block, KC x NC, for L2
//        +-------+ +-------------+                 for each panel of MR rows             MR x KC, in place, from L1
//     MC |  MR   | | MR x NR tile|                   for each panel of NR columns        KC x NR, packed, from L2
//        |  MR   | | in registers|                     multiply, and at the last KC finish
//        +-------+ +-------------+
//
// The left operand is read where it lies when the instructions can (fp32 always; bf16 when contiguous in k), so that in
// the forward product only weights are packed, once for all tokens.
// Each sum runs over k in ascending order, KC at a time, wherever in the result it stands and whoever computes it: the
// bits do not depend on the thread count.
#pragma once

#include <algorithm>
#include <bit>

#include "llmc/device.h"

#ifndef USE_CUDA
#include "llmc/kernels/matmul_micro.h"

// The specification, and the form that fp64 tests run.
template <class T, class Out>
void multiply_reference(const Device& device, Operand<T> left, Operand<T> right, int64_t depth,
                        const Epilogue<T, Out>& e) {
    using Sum = SumOf<T>;
#pragma omp parallel for num_threads(device.threads) schedule(static)
    for (int64_t i = 0; i < e.out.rows; i++) {
        for (int64_t j = 0; j < e.out.cols; j++) {
            Sum sum = 0;
            for (int64_t k = 0; k < depth; k++) sum += Sum(*left.at(i, k)) * Sum(*right.at(j, k));
            if (e.bias) sum += Sum(e.bias[j]);
            if (e.pre_activation.data) e.pre_activation.row(i)[j] = sum;
            if (e.activation == Activation::gelu) sum = gelu_value(sum);
            if (e.gelu_input.data) sum *= gelu_gradient(Sum(e.gelu_input.row(i)[j]));
            if (e.addend.data) sum += Sum(e.addend.row(i)[j]);
            e.out.row(i)[j] = sum;
        }
        if (e.left_sums)
            for (int64_t k = 0; k < depth; k++) e.left_sums[i] += Sum(*left.at(i, k));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The blocked form.

constexpr int64_t MATMUL_LEFT_BYTES = 1 << 20;    // packed left block, MC x KC
constexpr int64_t MATMUL_RIGHT_BYTES = 4 << 20;   // packed right block, the whole depth x NC if it fits, else KC x NC
constexpr int64_t MATMUL_SUM_BYTES = 1536 << 10;  // MC x NC sums
constexpr int64_t MATMUL_THREAD_BYTES = MATMUL_LEFT_BYTES + MATMUL_RIGHT_BYTES + MATMUL_SUM_BYTES + 16 * 1024;

inline size_t matmul_scratch_bytes(int threads) { return size_t(threads) * MATMUL_THREAD_BYTES; }

// Share `index` of `count` equal shares of [0, size), cut at multiples of `unit`.
inline std::pair<int64_t, int64_t> matmul_share(int64_t size, int64_t unit, int64_t index, int64_t count) {
    const int64_t units = ceil_div(size, unit);
    return {std::min(size, units * index / count * unit), std::min(size, units * (index + 1) / count * unit)};
}

// Fetches a block of an operand into L2, a few lines at a time while the block before it is being multiplied: its rows
// are short and far apart, which the hardware does not foresee.
struct FetchAhead {
    const char* row = nullptr;
    int64_t rows = 0, row_bytes = 0, stride_bytes = 0, byte = 0;

    template <class T>
    FetchAhead(Operand<T> block, int64_t r_count, int64_t k_count)
        : row(reinterpret_cast<const char*>(block.data)),
          rows(block.k_contiguous ? r_count : k_count),
          row_bytes((block.k_contiguous ? k_count : r_count) * sizeof(T)),
          stride_bytes(block.stride * sizeof(T)) {}
    int64_t lines() const { return rows * ceil_div(row_bytes, 64); }
    void fetch(int64_t lines) {
        for (; lines > 0 && rows > 0; lines--) {
            _mm_prefetch(row + byte, _MM_HINT_T1);
            byte += 64;
            if (byte >= row_bytes) byte = 0, row += stride_bytes, rows--;
        }
    }
};

// One thread's rectangle of the result: rows [row_begin, row_end) and columns [col_begin, col_end).
template <class T, class Out>
void multiply_rectangle(std::byte* scratch, const MicroKernel<T, Out>& kernel, Operand<T> left, Operand<T> right,
                        int64_t depth, const Epilogue<T, Out>& e, int64_t row_begin, int64_t row_end, int64_t col_begin,
                        int64_t col_end) {
    const int64_t mr = kernel.mr, nr = kernel.nr, group = kernel.group, element_bytes = kernel.element_bytes;
    std::byte* left_block = scratch;
    std::byte* right_block = left_block + MATMUL_LEFT_BYTES;
    float* sums = reinterpret_cast<float*>(right_block + MATMUL_RIGHT_BYTES);

    // Keep the right operand packed for the whole depth if that leaves enough columns; if not, take blocks of many rows
    // so that it is packed seldom.
    const int64_t kc = kernel.kc;
    const int64_t nc_kept = MATMUL_RIGHT_BYTES / (round_up(depth, kc) * element_bytes) / nr * nr;
    const bool keep_right = nc_kept >= kernel.nc / 2;
    const int64_t mc_most = std::min(MATMUL_SUM_BYTES / 4 / kernel.nc, MATMUL_LEFT_BYTES / (kc * element_bytes));
    const auto even_block = [](int64_t size, int64_t most, int64_t unit) {  // cuts size into nearly equal blocks
        return round_up(ceil_div(size, ceil_div(size, most / unit * unit)), unit);
    };
    const int64_t nc = even_block(col_end - col_begin, keep_right ? std::min(kernel.nc, nc_kept) : kernel.nc, nr);
    const int64_t mc = even_block(row_end - row_begin, keep_right ? kernel.mc : mc_most, mr);

    for (int64_t jc = col_begin; jc < col_end; jc += nc)
        for (int64_t ic = row_begin; ic < row_end; ic += mc)
            for (int64_t k = 0; k < depth; k += kc) {
                const int64_t rows = std::min(mc, row_end - ic), cols = std::min(nc, col_end - jc);
                const int64_t length = std::min(kc, depth - k), padded = round_up(length, group);
                const bool first = k == 0, last = k + kc >= depth;

                std::byte* right_panels = right_block + (keep_right ? k * nc * element_bytes : 0);
                if (ic == row_begin || !keep_right) kernel.pack_right(right_panels, right.from(jc, k), cols, length);
                const Operand<T> left_source = left.from(ic, k);
                if (e.left_sums && jc == 0) kernel.add_sums(e.left_sums + ic, left_source, rows, length);
                const bool in_place = kernel.left_in_place && (left.k_contiguous || group == 1) && length == padded;
                const int64_t packed_from = in_place ? rows / mr * mr : 0;
                if (packed_from < rows)
                    kernel.pack_left(left_block, left_source.from(packed_from, 0), rows - packed_from, length);

                const int64_t next_k = last ? 0 : k + kc, next_row = last ? ic + mc : ic;
                FetchAhead ahead(left.from(next_row, next_k), std::min(mc, row_end - next_row),
                                 std::min(kc, depth - next_k));
                const int64_t share =
                    ahead.rows > 0 ? ceil_div(ahead.lines(), ceil_div(rows, mr) * ceil_div(cols, nr)) : 0;

                for (int64_t i = 0; i < rows; i += mr)
                    for (int64_t j = 0; j < cols; j += nr) {
                        ahead.fetch(share);
                        const LeftPanel panel =
                            i < packed_from
                                ? LeftPanel{left_source.at(i, 0), element_bytes * (left.k_contiguous ? left.stride : 1),
                                            element_bytes * (left.k_contiguous ? group : left.stride)}
                                : LeftPanel{left_block + (i - packed_from) * padded * element_bytes, kernel.row_bytes,
                                            kernel.step_bytes};
                        float* tile = first && last ? sums : sums + i * round_up(cols, nr) + j * mr;
                        const int64_t tile_rows = std::min(mr, rows - i), tile_cols = std::min(nr, cols - j);
                        if (last) prefetch_tile(e, ic + i, jc + j, tile_rows, tile_cols);
                        kernel.multiply(padded, panel, right_panels + j * padded * element_bytes, tile, !first);
                        if (last) kernel.finish(e, tile, ic + i, jc + j, tile_rows, tile_cols);
                    }
            }
}

template <class T, class Out>
void multiply(const Device& device, Operand<T> left, Operand<T> right, int64_t depth, const Epilogue<T, Out>& e,
              Isa isa = cpu_isa()) {
    if (e.out.rows == 0 || e.out.cols == 0) return;
    if constexpr (std::is_same_v<T, double>) {
        multiply_reference(device, left, right, depth, e);
    } else {
        const MicroKernel<T, Out> kernel = micro_kernel<T, Out>(isa);
        const bool uses_amx = isa == Isa::amx && std::is_same_v<T, bf16>;
        std::byte* scratch = device.scratch_as<std::byte>(matmul_scratch_bytes(device.threads));
        // The grid of threads over the result that reads the operands least often.
        int down = 1;
        for (int d = 1; d <= device.threads; d++)
            if (device.threads % d == 0 && d * e.out.cols + device.threads / d * e.out.rows <
                                               down * e.out.cols + device.threads / down * e.out.rows)
                down = d;
        const int across = device.threads / down;
#pragma omp parallel for num_threads(device.threads) schedule(static)
        for (int t = 0; t < device.threads; t++) {
            const auto [row_begin, row_end] = matmul_share(e.out.rows, kernel.mr, t / across, down);
            const auto [col_begin, col_end] = matmul_share(e.out.cols, kernel.nr, t % across, across);
            if (row_begin == row_end || col_begin == col_end) continue;
            if (uses_amx) amx_begin();
            multiply_rectangle(scratch + t * MATMUL_THREAD_BYTES, kernel, left, right, depth, e, row_begin, row_end,
                               col_begin, col_end);
            if (uses_amx) amx_end();
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The three products of a linear layer; the first one also as a branch of the residual stream.

inline void matmul_forward(const Device& device, Matrix<floatX> out /*[N,OC]*/, Matrix<const floatX> in /*[N,IC]*/,
                           Matrix<const floatX> weight /*[OC,IC]*/, const floatX* bias /*[OC] or null*/,
                           Activation activation = Activation::none, Matrix<floatX> pre_activation = {} /*[N,OC]*/) {
    Epilogue<floatX, floatX> e{.out = out, .bias = bias, .activation = activation, .pre_activation = pre_activation};
    multiply<floatX>(device, {in.data, in.stride, true}, {weight.data, weight.stride, true}, in.cols, e);
}

// out = residual + (in W^T + bias); the branch that joins the residual stream is rounded only together with it.
inline void matmul_residual_forward(const Device& device, Matrix<floatR> out /*[N,OC]*/,
                                    Matrix<const floatR> residual /*[N,OC]*/, Matrix<const floatX> in /*[N,IC]*/,
                                    Matrix<const floatX> weight /*[OC,IC]*/, const floatX* bias /*[OC]*/) {
    Epilogue<floatX, floatR> e{.out = out, .bias = bias, .addend = residual};
    multiply<floatX>(device, {in.data, in.stride, true}, {weight.data, weight.stride, true}, in.cols, e);
}

// din = dout W, times gelu'(pre_activation) when that is given.
inline void matmul_backward_input(const Device& device, Matrix<floatX> din /*[N,IC]*/,
                                  Matrix<const floatX> dout /*[N,OC]*/, Matrix<const floatX> weight /*[OC,IC]*/,
                                  Matrix<const floatX> pre_activation = {} /*[N,IC]*/) {
    Epilogue<floatX, floatX> e{.out = din, .gelu_input = pre_activation};
    multiply<floatX>(device, {dout.data, dout.stride, true}, {weight.data, weight.stride, false}, dout.cols, e);
}

// dweight += dout^T in, and dbias += the column sums of dout.
inline void matmul_backward_weight(const Device& device, Matrix<floatS> dweight /*[OC,IC]*/,
                                   floatS* dbias /*[OC] or null*/, Matrix<const floatX> dout /*[N,OC]*/,
                                   Matrix<const floatX> in /*[N,IC]*/) {
    Epilogue<floatX, floatS> e{.out = dweight, .addend = dweight, .left_sums = dbias};
    multiply<floatX>(device, {dout.data, dout.stride, false}, {in.data, in.stride, false}, dout.rows, e);
}

#else
// ---------------------------------------------------------------------------------------------------------------------
// On a GPU the products are cuBLASLt's. It counts in columns: a row-major [rows, cols] is its cols x rows matrix with
// the stride as leading dimension, so that each product is computed transposed, out^T = right^T left^T.

#include "llmc/kernels/gelu.h"
#include "llmc/kernels/reduce.cuh"

enum class Activation { none, gelu };

#define CUBLAS_CHECK(call) check_cublas((call), #call, __FILE__, __LINE__)

inline void check_cublas(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        throw Failure(EXIT_HARDWARE, std::string(call) + " (" + file + ":" + std::to_string(line) +
                                         ") failed: " + cublasLtGetStatusString(status));
}

// What cuBLASLt may use, and room for the partial sums of bias gradients.
constexpr size_t MATMUL_WORKSPACE_BYTES = 32 << 20;
inline size_t matmul_scratch_bytes(int /*threads*/) { return MATMUL_WORKSPACE_BYTES; }

template <class T>
constexpr cudaDataType cuda_type = std::is_same_v<T, bf16> ? CUDA_R_16BF : CUDA_R_32F;

// Chunks of packed documents differ in their number of tokens. Those of a class, of which each power of two has eight,
// use the same algorithms; this is the largest number of the class that n is in.
inline int64_t token_class(int64_t n) {
    return round_up(n, std::max<int64_t>(1, int64_t(std::bit_floor(uint64_t(n))) / 8));
}

// out [rows, cols] = left(rows, depth) right(depth, cols) in row-major terms. An operand is transposed if it lies the
// other way round: left as [depth, rows], right as [cols, depth].
template <class Out>
struct Product {
    Matrix<Out> out;
    Matrix<const floatX> left, right;
    bool left_transposed = false, right_transposed = false;
    Matrix<const Out> addend = {};         // when given is added; may be `out`
    const floatX* bias = nullptr;          // [cols]
    bool gelu = false;                     // after the bias,
    Matrix<floatX> pre_activation = {};    // whose input is kept here when given
    Matrix<const floatX> gelu_input = {};  // when given the result is multiplied by gelu'(gelu_input)

    int64_t depth() const { return left_transposed ? left.rows : left.cols; }
    cublasLtEpilogue_t epilogue() const {
        if (gelu_input.data) return CUBLASLT_EPILOGUE_DGELU;
        if (gelu) return pre_activation.data ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_BIAS;
        return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    }
    // This product with the most tokens of their class. They are the depth in gradients of weights, else the rows.
    Product of_token_class() const {
        Product p = *this;
        p.left.rows = token_class(left.rows);
        (left_transposed ? p.right.rows : p.out.rows) = p.left.rows;
        if (addend.data) p.addend.rows = p.out.rows;
        return p;
    }
    // Products with equal keys run the same algorithm.
    MatmulKey key() const {
        return {out.rows,
                out.cols,
                depth(),
                out.stride,
                left.stride,
                right.stride,
                left_transposed,
                right_transposed,
                addend.data ? 1 + addend.stride : 0,
                int64_t(epilogue()),
                int64_t(cuda_type<Out>)};
    }
};

// The objects that describe a product to cuBLASLt.
struct MatmulDescription {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;

    template <class Out>
    explicit MatmulDescription(const Product<Out>& p) {
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));  // fp32 without TF32
        set(CUBLASLT_MATMUL_DESC_TRANSA, p.right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(CUBLASLT_MATMUL_DESC_TRANSB, p.left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue());
        if (p.bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        const void* kept = p.gelu_input.data ? p.gelu_input.data : p.pre_activation.data;
        if (kept) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, kept);
            set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
                p.gelu_input.data ? p.gelu_input.stride : p.pre_activation.stride);
        }
        a = layout(p.right), b = layout(p.left), d = layout(p.out);
        c = p.addend.data ? layout(p.addend) : layout(p.out);
    }
    ~MatmulDescription() {
        for (cublasLtMatrixLayout_t l : {a, b, c, d})
            if (l) cublasLtMatrixLayoutDestroy(l);
        if (product) cublasLtMatmulDescDestroy(product);
    }
    MatmulDescription(const MatmulDescription&) = delete;
    MatmulDescription& operator=(const MatmulDescription&) = delete;

private:
    template <class Value>
    void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof value));
    }
    template <class T>
    static cublasLtMatrixLayout_t layout(const Matrix<T>& m) {
        cublasLtMatrixLayout_t layout = nullptr;
        CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, cuda_type<std::remove_const_t<T> >, uint64_t(m.cols),
                                                uint64_t(m.rows), m.stride));
        return layout;
    }
};

// What cuBLASLt says of an algorithm. (nvcc 13.0 crashes on a vector of cuBLASLt's own struct.)
struct FoundAlgorithm {
    cublasLtMatmulHeuristicResult_t result{};
};

// The algorithms that cuBLASLt's heuristic puts first, at most so many; none where it has none for such a product.
inline std::vector<FoundAlgorithm> find_algorithms(const Device& device, const MatmulDescription& m, int most) {
    cublasLtMatmulPreference_t preference = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    const size_t workspace = MATMUL_WORKSPACE_BYTES;
    const uint32_t alignment = 16;                                      // of rows anywhere in a matrix
    const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;  // sums of parts of the depth stay in fp32
    std::vector<FoundAlgorithm> found(static_cast<size_t>(most));
    int count = 0;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
        if (status == CUBLAS_STATUS_SUCCESS)
            status = cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction);
    for (const auto operand : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        set(operand, alignment);
    if (status == CUBLAS_STATUS_SUCCESS)
        status = cublasLtMatmulAlgoGetHeuristic(device.blas, m.product, m.a, m.b, m.c, m.d, preference, most,
                                                &found[0].result, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    found.resize(size_t(count));
    std::erase_if(found, [](const FoundAlgorithm& f) { return f.result.state != CUBLAS_STATUS_SUCCESS; });
    return found;
}

// Whether an algorithm that was found for the class of a product can run the product itself.
inline bool can_run(const Device& device, const MatmulDescription& m, const cublasLtMatmulAlgo_t& algorithm) {
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(device.blas, m.product, m.a, m.b, m.c, m.d, &algorithm, &result) ==
               CUBLAS_STATUS_SUCCESS &&
           result.workspaceSize <= MATMUL_WORKSPACE_BYTES;
}

// Has cuBLASLt run the product. Returns why it could not, CUBLAS_STATUS_NOT_SUPPORTED where it has no algorithm.
template <class Out>
cublasStatus_t try_multiply(const Device& device, const Product<Out>& p) {
    if (p.out.rows == 0 || p.out.cols == 0) return CUBLAS_STATUS_SUCCESS;
    cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
    // In its epilogues cuBLASLt may approximate tanh by an instruction that is good enough for bf16 alone.
    if (std::is_same_v<floatX, float> && (p.gelu || p.gelu_input.data)) return status;
    const MatmulDescription m(p);
    const float one = 1, beta = p.addend.data ? 1 : 0;
    const Out* c = p.addend.data ? p.addend.data : p.out.data;
    const auto run = [&](const cublasLtMatmulAlgo_t& algorithm) {  // whether it could
        status = cublasLtMatmul(device.blas, m.product, &one, p.right.data, m.a, p.left.data, m.b, &beta, c, m.c,
                                p.out.data, m.d, &algorithm, device.scratch_as<std::byte>(MATMUL_WORKSPACE_BYTES),
                                MATMUL_WORKSPACE_BYTES, device.stream);
        if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) CUBLAS_CHECK(status);
        return status == CUBLAS_STATUS_SUCCESS;
    };

    // The algorithm of its class, or where that cannot run just this product, one of its own.
    for (const Product<Out>& shape : {p.of_token_class(), p}) {
        const auto [known, is_new] = device.algorithms->try_emplace(shape.key());
        std::optional<cublasLtMatmulAlgo_t>& algorithm = known->second;
        if (is_new) {
            const auto found = find_algorithms(device, MatmulDescription(shape), device.tune_products ? 8 : 1);
            if (!found.empty()) algorithm = found[0].result.algo;  // the first choice, whichever product comes first
            double least = std::numeric_limits<double>::infinity();
            for (const FoundAlgorithm& f : found) {
                if (!device.tune_products || !can_run(device, m, f.result.algo) || !run(f.result.algo)) continue;
                const double seconds = best_seconds_on_gpu(device.stream, 3, [&] { run(f.result.algo); });
                if (seconds < least) least = seconds, algorithm = f.result.algo;
            }
        }
        if (algorithm && can_run(device, m, *algorithm) && run(*algorithm)) return status;
    }
    return status;
}

// What an epilogue would have done, where cuBLASLt has none for the type or shape: a thread for 8 neighbours.
//   out = out + bias, then GELU if wanted; out = out gelu'(gelu_input). An addend is in `out` by then.
__global__ void __launch_bounds__(256) epilogue_kernel(Matrix<floatX> out, const floatX* bias, bool gelu,
                                                       Matrix<floatX> pre_activation, Matrix<const floatX> gelu_input) {
    const int64_t packs = out.cols / PACK, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= out.rows * packs) return;
    const int64_t row = i / packs, col = i % packs * PACK;
    Floats x = load(out.row(row) + col);
    if (bias) {
        const Floats b = load(bias + col);
        for (int k = 0; k < PACK; k++) x[k] += b[k];
    }
    if (pre_activation.data) store(pre_activation.row(row) + col, x);
    for (int k = 0; k < PACK && gelu; k++) x[k] = gelu_value(x[k]);
    if (gelu_input.data) {
        const Floats input = load(gelu_input.row(row) + col);
        for (int k = 0; k < PACK; k++) x[k] *= gelu_gradient(input[k]);
    }
    store(out.row(row) + col, x);
}

template <class Out>
void multiply(const Device& device, Product<Out> p) {
    cublasStatus_t status = try_multiply(device, p);
    if (status == CUBLAS_STATUS_SUCCESS) return;
    Product<Out> plain = p;
    plain.bias = nullptr, plain.gelu = false, plain.pre_activation = {}, plain.gelu_input = {};
    if (plain.epilogue() != p.epilogue()) status = try_multiply(device, plain);
    if (status != CUBLAS_STATUS_SUCCESS)
        throw Failure(EXIT_HARDWARE,
                      "cuBLASLt has no algorithm for a product of " + std::to_string(p.out.rows) + " x " +
                          std::to_string(p.depth()) + " x " + std::to_string(p.out.cols) +
                          " " PRECISION_NAME " elements on this GPU: " + cublasLtGetStatusString(status));
    if constexpr (std::is_same_v<Out, floatX>)
        launch(epilogue_kernel, dim3(unsigned(ceil_div(p.out.rows * (p.out.cols / PACK), 256))), 256, 0, device.stream,
               p.out, p.bias, p.gelu, p.pre_activation, p.gelu_input);
}

// Sums of the columns of dout over blocks of rows: 2 bytes an element in bf16. A block of threads has 256 columns, a
// lane 8 of them; its 8 warps take the rows in turns.
constexpr int COLUMN_SUM_WARPS = 8;

__global__ void __launch_bounds__(COLUMN_SUM_WARPS* WARP)
    column_sums_kernel(float* partial /*[blocks, OC]*/, Matrix<const floatX> dout, int64_t height) {
    constexpr int width = WARP * PACK, ahead = 4;  // rows that a warp fetches together
    float* sums = shared_memory<float>();          // [warps, width]
    const int warp = int(threadIdx.x) / WARP, first = int(threadIdx.x) % WARP * PACK;
    const int64_t col = int64_t(blockIdx.x) * width;
    const int64_t begin = blockIdx.y * height, end = min(begin + height, dout.rows);
    Floats sum = {};
    const auto add = [&](const Floats& d) {
#pragma unroll
        for (int k = 0; k < PACK; k++) sum[k] += d[k];
    };
    if (col + first < dout.cols) {
        int64_t row = begin + warp;
        for (; row + (ahead - 1) * COLUMN_SUM_WARPS < end; row += ahead * COLUMN_SUM_WARPS) {
            Floats d[ahead];
#pragma unroll
            for (int j = 0; j < ahead; j++) d[j] = load(dout.row(row + j * COLUMN_SUM_WARPS) + col + first);
#pragma unroll
            for (int j = 0; j < ahead; j++) add(d[j]);
        }
        for (; row < end; row += COLUMN_SUM_WARPS) add(load(dout.row(row) + col + first));
    }
    store(sums + warp * width + first, sum);
    __syncthreads();
    const int own = int(threadIdx.x);
    if (col + own >= dout.cols) return;
    float total = 0;
    for (int w = 0; w < COLUMN_SUM_WARPS; w++) total += sums[w * width + own];
    partial[blockIdx.y * dout.cols + col + own] = total;
}

// sums += the sums of the columns of dout, in an order that its size alone decides: enough blocks to fill a GPU, as far
// as the scratch memory has room for what they find.
inline void add_column_sums(const Device& device, float* sums /*[OC] +=*/, Matrix<const floatX> dout /*[N,OC]*/) {
    if (dout.rows == 0) return;
    const int64_t OC = dout.cols, room = int64_t(MATMUL_WORKSPACE_BYTES / sizeof(float)) / OC;
    const int64_t height = std::max<int64_t>(64, ceil_div(dout.rows, std::clamp<int64_t>(room, 1, 256)));
    const int64_t blocks = ceil_div(dout.rows, height);
    constexpr int threads = COLUMN_SUM_WARPS * WARP;
    float* partial = device.scratch_as<float>(size_t(blocks * OC));  // the product before it is done with the scratch
    launch(column_sums_kernel, dim3(unsigned(ceil_div(OC, WARP * PACK)), unsigned(blocks)), threads,
           size_t(COLUMN_SUM_WARPS * WARP * PACK) * sizeof(float), device.stream, partial, dout, height);
    add_row_sums(device, sums, nullptr, {partial, blocks, OC}, OC);
}

inline void matmul_forward(const Device& device, Matrix<floatX> out /*[N,OC]*/, Matrix<const floatX> in /*[N,IC]*/,
                           Matrix<const floatX> weight /*[OC,IC]*/, const floatX* bias /*[OC] or null*/,
                           Activation activation = Activation::none, Matrix<floatX> pre_activation = {} /*[N,OC]*/) {
    multiply<floatX>(device, {.out = out,
                              .left = in,
                              .right = weight,
                              .right_transposed = true,
                              .bias = bias,
                              .gelu = activation == Activation::gelu,
                              .pre_activation = pre_activation});
}

inline void matmul_residual_forward(const Device& device, Matrix<floatR> out /*[N,OC]*/,
                                    Matrix<const floatR> residual /*[N,OC]*/, Matrix<const floatX> in /*[N,IC]*/,
                                    Matrix<const floatX> weight /*[OC,IC]*/, const floatX* bias /*[OC]*/) {
    multiply<floatR>(
        device, {.out = out, .left = in, .right = weight, .right_transposed = true, .addend = residual, .bias = bias});
}

inline void matmul_backward_input(const Device& device, Matrix<floatX> din /*[N,IC]*/,
                                  Matrix<const floatX> dout /*[N,OC]*/, Matrix<const floatX> weight /*[OC,IC]*/,
                                  Matrix<const floatX> pre_activation = {} /*[N,IC]*/) {
    multiply<floatX>(device, {.out = din, .left = dout, .right = weight, .gelu_input = pre_activation});
}

inline void matmul_backward_weight(const Device& device, Matrix<floatS> dweight /*[OC,IC]*/,
                                   floatS* dbias /*[OC] or null*/, Matrix<const floatX> dout /*[N,OC]*/,
                                   Matrix<const floatX> in /*[N,IC]*/) {
    multiply<floatS>(device, {.out = dweight, .left = dout, .right = in, .left_transposed = true, .addend = dweight});
    if (dbias) add_column_sums(device, dbias, dout);
}
#endif
