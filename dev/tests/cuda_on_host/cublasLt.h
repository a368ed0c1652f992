// Stands in for cuBLASLt where kernels run on the host: the part of it that llmc/kernels/matmul.cuh calls, as plain
// loops over the definitions in its manual (column-major matrices, epilogues, auxiliary matrices).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "llmc/common.h"

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192,
    CUBLASLT_EPILOGUE_BGRADB = 512,  // found by no product here
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_TRANSB,
    CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
};

struct cublasLtMatmulDescOpaque {
    cublasOperation_t op_a = CUBLAS_OP_N, op_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    int32_t bias_type = CUDA_R_32F;
    const void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_ld = 0;
};
struct cublasLtMatrixLayoutOpaque {
    cudaDataType type;
    int64_t rows, cols, ld;
};
using cublasLtHandle_t = int*;
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque*;
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque*;
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
using cublasLtMatmulPreference_t = size_t*;
struct cublasLtMatmulAlgo_t {
    uint64_t data[8];
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
};

inline const char* cublasLtGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS         ? "success"
           : status == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported"
                                                   : "invalid value";
}
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = new int(0), CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return delete handle, CUBLAS_STATUS_SUCCESS; }

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t, cudaDataType) {
    return *desc = new cublasLtMatmulDescOpaque, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    return delete desc, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attribute, const void* value,
                                                     size_t bytes) {
    const auto set = [&](auto& field) {
        if (bytes != sizeof field) return CUBLAS_STATUS_INVALID_VALUE;
        std::memcpy(&field, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    };
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return set(desc->op_a);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return set(desc->op_b);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return set(desc->epilogue);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return set(desc->bias);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return set(desc->aux);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return set(desc->aux_ld);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            return set(desc->bias_type);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                 uint64_t cols, int64_t ld) {
    if (ld < int64_t(rows)) return CUBLAS_STATUS_INVALID_VALUE;
    return *layout = new cublasLtMatrixLayoutOpaque{type, int64_t(rows), int64_t(cols), ld}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete layout, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    return *preference = new size_t(0), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return delete preference, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t, const void* value,
                                                           size_t bytes) {
    return std::memcpy(preference, value, std::min(bytes, sizeof *preference)), CUBLAS_STATUS_SUCCESS;
}

inline int64_t product_depth(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a_layout) {
    return desc->op_a == CUBLAS_OP_T ? a_layout->rows : a_layout->cols;
}

// CUBLAS_ON_HOST_EPILOGUES=no: every epilogue is refused, so that the caller has to apply it by a kernel.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                                     cublasLtMatrixLayout_t a_layout, cublasLtMatrixLayout_t,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d_layout,
                                                     cublasLtMatmulPreference_t, int wanted,
                                                     cublasLtMatmulHeuristicResult_t* results, int* count) {
    const char* epilogues = std::getenv("CUBLAS_ON_HOST_EPILOGUES");
    *count = 0;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    if (desc->epilogue == CUBLASLT_EPILOGUE_BGRADB) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (epilogues && std::string(epilogues) == "no" && desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    // Up to three algorithms, which differ in nothing; the second one says that it cannot.
    for (; *count < std::min(wanted, 3); ++*count)
        results[*count] = {{{uint64_t(d_layout->cols), uint64_t(product_depth(desc, a_layout))}},
                           0,
                           *count == 1 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}

// Whether an algorithm that was found for one shape runs another: here always, unless one of them has 33 columns or a
// depth of 33.
inline cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a_layout, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d_layout,
                                              const cublasLtMatmulAlgo_t* algo,
                                              cublasLtMatmulHeuristicResult_t* result) {
    const uint64_t columns = uint64_t(d_layout->cols), depth = uint64_t(product_depth(desc, a_layout));
    const auto is_picky = [](uint64_t found, uint64_t wanted) {
        return found != wanted && (found == 33 || wanted == 33);
    };
    *result = {};
    return is_picky(algo->data[0], columns) || is_picky(algo->data[1], depth) ? CUBLAS_STATUS_NOT_SUPPORTED
                                                                              : CUBLAS_STATUS_SUCCESS;
}

// D = epilogue(alpha op(A) op(B) + beta C)
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                                     cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                                     const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                     cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algo, void*, size_t,
                                     cudaStream_t) {
    const bool ta = desc->op_a == CUBLAS_OP_T, tb = desc->op_b == CUBLAS_OP_T;
    const int64_t m = ta ? a_layout->cols : a_layout->rows, depth = ta ? a_layout->rows : a_layout->cols;
    const int64_t n = tb ? b_layout->rows : b_layout->cols, depth_b = tb ? b_layout->cols : b_layout->rows;
    if (!algo || depth != depth_b || m != d_layout->rows || n != d_layout->cols) return CUBLAS_STATUS_INVALID_VALUE;
    if (m != c_layout->rows || n != c_layout->cols || (c == d && c_layout->ld != d_layout->ld))
        return CUBLAS_STATUS_INVALID_VALUE;
    const auto read = [](const void* data, cudaDataType type, int64_t i) {
        return type == CUDA_R_16BF ? float(static_cast<const bf16*>(data)[i]) : static_cast<const float*>(data)[i];
    };
    const auto write = [](void* data, cudaDataType type, int64_t i, float value) {
        if (type == CUDA_R_16BF) static_cast<bf16*>(data)[i] = bf16(value);
        else static_cast<float*>(data)[i] = value;
    };
    const auto gelu_tanh = [](float x) { return std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)); };
    on_device_memory([&] {
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) {
                double sum = 0;
                for (int64_t k = 0; k < depth; k++)
                    sum += double(read(a, a_layout->type, ta ? k + i * a_layout->ld : i + k * a_layout->ld)) *
                           read(b, b_layout->type, tb ? j + k * b_layout->ld : k + j * b_layout->ld);
                const int64_t at = i + j * d_layout->ld;
                float x = *static_cast<const float*>(alpha) * float(sum);
                if (const float scale = *static_cast<const float*>(beta); scale != 0)
                    x += scale * read(c, c_layout->type, i + j * c_layout->ld);
                const cublasLtEpilogue_t e = desc->epilogue;
                if (e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_BIAS ||
                    e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    if (desc->bias) x += read(desc->bias, d_layout->type, i);
                if (e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) write(desc->aux, d_layout->type, i + j * desc->aux_ld, x);
                if (e == CUBLASLT_EPILOGUE_GELU_BIAS || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    x = 0.5f * x * (1 + gelu_tanh(x));
                if (e == CUBLASLT_EPILOGUE_DGELU) {
                    const float y = read(desc->aux, d_layout->type, i + j * desc->aux_ld), t = gelu_tanh(y);
                    x *= 0.5f * (1 + t) + 0.5f * y * (1 - t * t) * 0.7978845608f * (1 + 3 * 0.044715f * y * y);
                }
                write(d, d_layout->type, at, x);
            }
    });
    return CUBLAS_STATUS_SUCCESS;
}
