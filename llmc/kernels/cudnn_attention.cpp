// cudnn_attention.h by cuDNN's C++ front end, which is why this file takes a minute to compile. A plan here is one of
// the front end's graphs: scaled dot product attention with a padding mask (numbers of tokens of each segment), ragged
// offsets (where each begins) and a causal mask aligned with the last query and the last key of each segment.
#include "llmc/kernels/cudnn_attention.h"

#include <dlfcn.h>

#include <cmath>
#include <unordered_map>

#include <cudnn_frontend.h>

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;
using Tensor = std::shared_ptr<Tensor_attributes>;

void* fe::cudnn_dlhandle = nullptr;  // the front end calls cuDNN through it

// ---------------------------------------------------------------------------------------------------------------------
// Loading, and errors

static std::string loaded_version() {
    const size_t v = fe::cudnn_dlhandle ? fe::detail::get_backend_version() : 0;  // 91900
    return std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

// Before, the backward pass of segments that lie one behind the other was wrong at times on Hopper GPUs.
constexpr size_t CUDNN_LEAST = 91800;

static std::string load_cudnn() {
    const std::string name = "libcudnn.so." + std::to_string(CUDNN_MAJOR);
    fe::cudnn_dlhandle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!fe::cudnn_dlhandle) return name + " cannot be loaded: " + dlerror();
    if (fe::detail::get_backend_version() < CUDNN_LEAST)
        return "cuDNN " + loaded_version() + " was found, its attention is used from 9.18 on";
    // With the first cuDNN compiles its plans, with the second its front end runs them.
    const std::string compiler = "libnvrtc.so." + std::to_string(CUDART_VERSION / 1000);
    const std::string runtime = "libcudart.so." + std::to_string(CUDART_VERSION / 1000);
    for (const std::string& library : {compiler, runtime})
        if (!dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL))
            return library + ", which cuDNN needs, cannot be loaded: " + dlerror();
    setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", runtime.c_str(), 0);
    // Its backward pass refuses the statistics of such segments elsewhere. The GPU that is current is asked.
    int gpu = 0, major = 0;
    if (cudaGetDevice(&gpu) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, gpu) == cudaSuccess &&
        (major < 9 || major == 12))
        return "cuDNN has no backward pass for segments of any length on GPUs of compute capability " +
               std::to_string(major) + ".x";
    return "";
}

std::string cudnn_absence() {
    static const std::string absence = load_cudnn();
    return absence;
}

std::string cudnn_version() {
    cudnn_absence();  // loads it
    return loaded_version();
}

[[noreturn]] static void fail(const std::string& call, const std::string& status) {
    char said[2048] = "";
    fe::detail::get_last_error_string(said, sizeof said);
    throw Failure(EXIT_HARDWARE, "cuDNN " + loaded_version() + ": " + call + " failed: " + status +
                                     (said[0] ? std::string("; ") + said : "") +
                                     "; build with NO_CUDNN=1 to do without cuDNN");
}
static void check(cudnnStatus_t status, const std::string& call) {
    if (status != CUDNN_STATUS_SUCCESS) fail(call, fe::detail::get_error_string(status));
}
static void check(fe::error_t status, const std::string& call) {
    if (status.is_bad()) fail(call, status.get_message());
}
static void check(cudaError_t status, const char* call) {
    if (status != cudaSuccess)
        throw Failure(EXIT_HARDWARE, std::string(call) + " failed: " + cudaGetErrorString(status));
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs

enum Uid : int64_t {
    QKV_OFFSETS = 1,
    KEY_OFFSETS,
    OUT_OFFSETS,
    LSE_OFFSETS,
    QUERY_LENGTHS,
    KEY_LENGTHS,
    Q,
    K,
    V,
    OUT,
    LSE,
    D_OUT,
    DQ,
    DK,
    DV,
};

// The tensors of a bucket as a graph names them.
struct Tensors {
    const CudnnShape& shape;
    const CudnnBucket& bucket;
    fe::graph::Graph& graph;
    Tensor qkv_offsets = offsets(QKV_OFFSETS), key_offsets = offsets(KEY_OFFSETS), out_offsets = offsets(OUT_OFFSETS),
           lse_offsets = offsets(LSE_OFFSETS), query_lengths = lengths(QUERY_LENGTHS),
           key_lengths = lengths(KEY_LENGTHS);

    Tensor index(Uid uid, int64_t n, fe::DataType_t type) const {
        return graph.tensor(
            Tensor_attributes().set_uid(uid).set_dim({n, 1, 1, 1}).set_stride({1, 1, 1, 1}).set_data_type(type));
    }
    Tensor offsets(Uid uid) const { return index(uid, bucket.segments + 1, fe::DataType_t::INT64); }
    Tensor lengths(Uid uid) const { return index(uid, bucket.segments, fe::DataType_t::INT32); }

    // [S, NH, length, columns] in rows of a matrix that are `stride` elements apart
    void place(Tensor_attributes& tensor, Uid uid, int64_t length, int64_t columns, int64_t stride,
               const Tensor& first_rows) const {
        tensor.set_uid(uid)
            .set_dim({bucket.segments, shape.heads, length, columns})
            .set_stride({length * stride, columns, stride, 1})
            .set_ragged_offset(first_rows)
            .set_data_type(columns == 1 ? fe::DataType_t::FLOAT : fe::DataType_t::BFLOAT16);
    }
    void place_query(Tensor_attributes& tensor, Uid uid) const {
        place(tensor, uid, bucket.longest_query, shape.head_size, 3 * shape.channels(), qkv_offsets);
    }
    void place_key(Tensor_attributes& tensor, Uid uid) const {
        place(tensor, uid, bucket.longest_key, shape.head_size, (bucket.sliced ? 2 : 3) * shape.channels(),
              key_offsets);
    }
    void place_out(Tensor_attributes& tensor, Uid uid) const {
        place(tensor, uid, bucket.longest_query, shape.head_size, shape.channels(), out_offsets);
    }
    void place_lse(Tensor_attributes& tensor, Uid uid) const {
        place(tensor, uid, bucket.longest_query, 1, shape.heads, lse_offsets);
    }
    Tensor input(void (Tensors::*place_it)(Tensor_attributes&, Uid) const, Uid uid) const {
        Tensor_attributes tensor;
        (this->*place_it)(tensor, uid);
        return graph.tensor(tensor);
    }
    // What forward and backward have in common.
    template <class Attributes>
    Attributes masked() const {
        Attributes a;
        a.set_padding_mask(true).set_seq_len_q(query_lengths).set_seq_len_kv(key_lengths);
        a.set_diagonal_alignment(fe::DiagonalAlignment_t::BOTTOM_RIGHT).set_diagonal_band_right_bound(0);
        a.set_attn_scale(1.0f / std::sqrt(float(shape.head_size)));
        return a;
    }
};

static void describe_forward(const Tensors& t) {
    auto [out, lse] =
        t.graph.sdpa(t.input(&Tensors::place_query, Q), t.input(&Tensors::place_key, K),
                     t.input(&Tensors::place_key, V), t.masked<fe::graph::SDPA_attributes>().set_generate_stats(true));
    t.place_out(out->set_output(true), OUT);
    t.place_lse(lse->set_output(true), LSE);
}

static void describe_backward(const Tensors& t) {
    auto [dq, dk, dv] = t.graph.sdpa_backward(
        t.input(&Tensors::place_query, Q), t.input(&Tensors::place_key, K), t.input(&Tensors::place_key, V),
        t.input(&Tensors::place_out, OUT), t.input(&Tensors::place_out, D_OUT), t.input(&Tensors::place_lse, LSE),
        t.masked<fe::graph::SDPA_backward_attributes>().set_deterministic_algorithm(t.shape.deterministic));
    t.place_query(dq->set_output(true), DQ);
    t.place_key(dk->set_output(true), DK);
    t.place_key(dv->set_output(true), DV);
}

// ---------------------------------------------------------------------------------------------------------------------
// Plans

struct CudnnAttention::Plans {
    struct Pair {
        CudnnBucket bucket;
        std::unique_ptr<fe::graph::Graph> forward, backward;
    };

    const CudnnShape shape;
    cudnnHandle_t handle = nullptr;  // null: support checks only
    std::shared_ptr<fe::DeviceProperties> properties;
    int architecture = 0;  // 90
    std::vector<Pair> pairs;

    explicit Plans(const CudnnShape& shape) : shape(shape) {
        if (const std::string absence = cudnn_absence(); !absence.empty()) throw Failure(EXIT_HARDWARE, absence);
    }
    ~Plans() {
        if (handle) fe::detail::destroy_handle(handle);
    }
    Plans(const Plans&) = delete;

    void build() {
        for (const CudnnBucket& bucket : cudnn_buckets(shape))
            pairs.push_back({bucket, build(bucket, describe_forward, "forward"),
                             shape.backward ? build(bucket, describe_backward, "backward") : nullptr});
    }

    std::unique_ptr<fe::graph::Graph> build(const CudnnBucket& bucket, void (*describe)(const Tensors&),
                                            const char* pass) const {
        const std::string what =
            std::string("building attention ") + pass + " for up to " + std::to_string(bucket.segments) +
            " segments, " + std::to_string(bucket.longest_query) + " queries, " + std::to_string(bucket.longest_key) +
            " keys, " + std::to_string(shape.heads) + " heads of " + std::to_string(shape.head_size) + ": ";
        auto graph = std::make_unique<fe::graph::Graph>();
        graph->set_io_data_type(fe::DataType_t::BFLOAT16)
            .set_intermediate_data_type(fe::DataType_t::FLOAT)
            .set_compute_data_type(fe::DataType_t::FLOAT)
            .set_sm_version(architecture);
        if (properties) graph->set_device_properties(properties);
        describe({shape, bucket, *graph});
        check(graph->validate(), what + "validate");
        check(handle ? graph->build_operation_graph(handle) : graph->build_operation_graph(),
              what + "build_operation_graph");
        check(graph->create_execution_plans({fe::HeurMode_t::A}), what + "create_execution_plans");
        check(graph->check_support(), what + "check_support");
        if (!handle) return graph;
        check(graph->build_plans(), what + "build_plans");
        int64_t bytes = 0;
        check(graph->get_workspace_size(bytes), what + "get_workspace_size");
        if (bytes > cudnn_workspace_bytes(shape, bucket))
            fail(what + "get_workspace_size", std::to_string(bytes) + " bytes are asked for, " +
                                                  std::to_string(cudnn_workspace_bytes(shape, bucket)) +
                                                  " are planned");
        return graph;
    }

    const Pair& plan(const CudnnBucket& bucket) const {
        for (const Pair& pair : pairs)
            if (pair.bucket == bucket) return pair;
        throw std::logic_error("a chunk has segments for which no attention plan was built");
    }
    void check_stride(const char* name, int64_t found, int64_t wanted) const {
        if (found != wanted)
            throw std::logic_error(std::string("attention: rows of ") + name + " lie " + std::to_string(found) +
                                   " elements apart, plans are built for " + std::to_string(wanted));
    }
};

CudnnAttention::CudnnAttention(const CudnnShape& shape) : shape(shape), plans(std::make_unique<Plans>(shape)) {
    int device = 0, major = 0, minor = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    plans->architecture = 10 * major + minor;
    check(fe::detail::create_handle(&plans->handle), "cudnnCreate");
    plans->build();
}

CudnnAttention::CudnnAttention(const CudnnShape& shape, const std::string& device_properties, int architecture)
    : shape(shape), plans(std::make_unique<Plans>(shape)) {
    plans->properties = std::make_shared<fe::DeviceProperties>();
    check(plans->properties->deserialize({device_properties.begin(), device_properties.end()}),
          "reading the device's properties");
    plans->architecture = architecture;
    plans->build();
}

CudnnAttention::~CudnnAttention() = default;

// What a graph of the call finds at each of its tensors.
using Pointers = std::unordered_map<int64_t, void*>;

static Pointers pointers(const CudnnCall& call, const int64_t* table, Matrix<const bf16> qkv, Matrix<const bf16> store,
                         int64_t C) {
    const CudnnTable place(call.bucket.segments);
    bf16* q = const_cast<bf16*>(qkv.data);
    bf16* k = call.bucket.sliced ? const_cast<bf16*>(store.data) : q + C;
    int64_t* words = const_cast<int64_t*>(table) + call.table;
    return {{QKV_OFFSETS, words + place.qkv},
            {KEY_OFFSETS, words + place.keys},
            {OUT_OFFSETS, words + place.out},
            {LSE_OFFSETS, words + place.lse},
            {QUERY_LENGTHS, words + place.query_lengths},
            {KEY_LENGTHS, words + place.key_lengths},
            {Q, q},
            {K, k},
            {V, k + C}};
}

void CudnnAttention::forward(const CudnnChunk& chunk, const int64_t* table, Matrix<bf16> out, Matrix<float> lse,
                             Matrix<const bf16> qkv, Matrix<const bf16> store, std::byte* workspace,
                             cudaStream_t stream) {
    const int64_t C = plans->shape.channels();
    plans->check_stride("qkv", qkv.stride, 3 * C);
    plans->check_stride("out", out.stride, C);
    plans->check_stride("lse", lse.stride, plans->shape.heads);
    check(fe::detail::set_stream(plans->handle, stream), "cudnnSetStream");
    for (const CudnnCall& call : chunk.calls) {
        if (call.bucket.sliced) plans->check_stride("store", store.stride, 2 * C);
        Pointers p = pointers(call, table, qkv, store, C);
        p[OUT] = out.data;
        p[LSE] = lse.data;
        check(plans->plan(call.bucket).forward->execute(plans->handle, p, workspace), "attention forward");
    }
}

void CudnnAttention::backward(const CudnnChunk& chunk, const int64_t* table, Matrix<bf16> d_qkv, Matrix<bf16> d_slice,
                              Matrix<const bf16> d_out, Matrix<const bf16> out, Matrix<const float> lse,
                              Matrix<const bf16> qkv, Matrix<const bf16> store, std::byte* workspace,
                              cudaStream_t stream) {
    const int64_t C = plans->shape.channels();
    plans->check_stride("qkv", qkv.stride, 3 * C);
    plans->check_stride("d_qkv", d_qkv.stride, 3 * C);
    plans->check_stride("out", out.stride, C);
    plans->check_stride("d_out", d_out.stride, C);
    plans->check_stride("lse", lse.stride, plans->shape.heads);
    check(fe::detail::set_stream(plans->handle, stream), "cudnnSetStream");
    for (const CudnnCall& call : chunk.calls) {
        if (call.bucket.sliced) {
            plans->check_stride("store", store.stride, 2 * C);
            plans->check_stride("d_slice", d_slice.stride, 2 * C);
        }
        Pointers p = pointers(call, table, qkv, store, C);
        p[OUT] = const_cast<bf16*>(out.data);
        p[D_OUT] = const_cast<bf16*>(d_out.data);
        p[LSE] = const_cast<float*>(lse.data);
        p[DQ] = d_qkv.data;
        p[DK] = call.bucket.sliced ? d_slice.data : d_qkv.data + C;
        p[DV] = static_cast<bf16*>(p[DK]) + C;
        check(plans->plan(call.bucket).backward->execute(plans->handle, p, workspace), "attention backward");
    }
}
