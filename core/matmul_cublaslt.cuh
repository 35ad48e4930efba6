// matmul_cublaslt.cuh: the GPU backend of matmul.cuh, on cuBLASLt.
//
// cuBLASLt is column-major, and a row-major matrix is its transpose stored column-major, so D = A·B is asked for as Dᵀ = Bᵀ·Aᵀ: our B is
// the library's first operand, our A its second, and its op is T exactly where ours is not. A row-major (rows, cols) matrix is described as
// cols × rows with the same leading dimension. In these terms a linear layer's forward product is the library's "TN", the only form in
// which Hopper multiplies FP8; the others get a transposed copy in the workspace, as matmul_gpu_plan says.
//
// Descriptors are made and the library's heuristics asked once a shape; a call sets the pointers within the descriptor and launches. Nothing waits
// for the device. Of what the heuristics name the first is taken, which depends on library and device only, or what was chosen (matmul_choose): as
// choices are kept, results repeat.
//
// What FP8 on 9.0 allows, and what of it is used: COMPUTE_32F, one dequantising scale a tensor for A and B (16-byte aligned, or 13.0 reads
// beside it), fast accumulation where the caller asks (forward), FP32 D with β = 1 (weight gradients), a BF16 bias beside BF16 or FP32 D. From CUDA 12.9 on
// scales of 128 elements (1 × 128, and 128 × 128 for one of the two): FP32 again, from a multiple of 16 bytes on, M and N multiples of 4. Fast accumulation is
// off there: sums over a block are added up in FP32 anyway.
//
// GELU is not left to the library, though GELU_AUX_BIAS with D in E4M3 would save GELU's pass its 2 bytes read an element. cublasLt.h allows
// beside E4M3 D an aux (fc before GELU, which backward needs) of E4M3 or FP16, and ours is BF16. D's scale must be known before the product:
// none just in time. And it takes GELU of the FP32 sum, where --recompute makes GELU again from the rounded fc: other codes than in forward.
// It may pay with --recompute 0 and an FP16 fc; that is to be measured first.
#pragma once
#include <cublasLt.h>

struct MatmulBackend {
    cublasLtHandle_t handle;
    cudaEvent_t marks[MATMUL_MARKS];
};

struct MatmulKernel {
    GpuPlan plan;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, d;  // ours: the library's first operand is b
    std::vector<cublasLtMatmulAlgo_t> algorithms;  // as the heuristics rank them
    cublasLtMatmulAlgo_t algorithm;  // that is taken
    char name[96];
};

constexpr int MOST_ALGORITHMS = 8;  // of a shape

static inline void cublaslt_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) { return; }
    die("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status));
}
#define CUBLASLT_CHECK(call) cublaslt_check((call), #call, __FILE__, __LINE__)

static inline void backend_create(Matmul* mm) {
    mm->capability = device_capability();
    mm->backend = new MatmulBackend();
    CUBLASLT_CHECK(cublasLtCreate(&mm->backend->handle));
    for (cudaEvent_t& mark : mm->backend->marks) { CUDA_CHECK(cudaEventCreate(&mark)); }
}

static inline void backend_destroy(Matmul* mm) {
    for (cudaEvent_t mark : mm->backend->marks) { CUDA_CHECK(cudaEventDestroy(mark)); }
    CUBLASLT_CHECK(cublasLtDestroy(mm->backend->handle));
    delete mm->backend;
}

static inline void kernel_destroy(MatmulKernel* k) {
    if (k == NULL) { return; }
    CUBLASLT_CHECK(cublasLtMatrixLayoutDestroy(k->a));
    CUBLASLT_CHECK(cublasLtMatrixLayoutDestroy(k->b));
    CUBLASLT_CHECK(cublasLtMatrixLayoutDestroy(k->d));
    CUBLASLT_CHECK(cublasLtMatmulDescDestroy(k->operation));
    delete k;
}

static inline const char* kernel_name(const MatmulKernel* kernel) { return kernel->name; }

static inline std::string backend_device(void) {
    char name[128];
    device_name(name, sizeof(name));
    return choice_device(name, cublasLtGetVersion());
}

static inline void backend_mark(Matmul* mm, MatmulMark mark, Stream stream) {
    CUDA_CHECK(cudaEventRecord(mm->backend->marks[mark], stream));
}
static inline double backend_seconds(Matmul* mm, MatmulMark from, MatmulMark to) {
    float ms = 0.0f;
    CUDA_CHECK(cudaEventSynchronize(mm->backend->marks[to]));
    CUDA_CHECK(cudaEventElapsedTime(&ms, mm->backend->marks[from], mm->backend->marks[to]));
    return 1e-3 * ms;
}

static inline cudaDataType_t cuda_dtype(DType t) {
    switch (t) {
        case FP32: return CUDA_R_32F;
        case BF16: return CUDA_R_16BF;
        case FP16: return CUDA_R_16F;
        case E4M3: return CUDA_R_8F_E4M3;
        default: return CUDA_R_8F_E5M2;
    }
}

template <class T> static inline void set_operation(MatmulKernel* k, cublasLtMatmulDescAttributes_t attribute, T value) {
    CUBLASLT_CHECK(cublasLtMatmulDescSetAttribute(k->operation, attribute, &value, sizeof(value)));
}
template <class T>
static inline void set_preference(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
    CUBLASLT_CHECK(cublasLtMatmulPreferenceSetAttribute(p, attribute, &value, sizeof(value)));
}

// A row-major (rows, cols) matrix
static inline cublasLtMatrixLayout_t cublaslt_matrix(DType t, int rows, int cols, int64_t ld, int batch, int64_t batch_stride) {
    cublasLtMatrixLayout_t layout = NULL;
    CUBLASLT_CHECK(cublasLtMatrixLayoutCreate(&layout, cuda_dtype(t), (uint64_t)cols, (uint64_t)rows, ld));
    if (batch > 1) {
        int32_t count = batch;
        CUBLASLT_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
        CUBLASLT_CHECK(
            cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride, sizeof(batch_stride)));
    }
    return layout;
}

static inline int algorithm_setting(const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
    int32_t value = 0;
    size_t written = 0;
    cublasStatus_t status = cublasLtMatmulAlgoConfigGetAttribute(algorithm, attribute, &value, sizeof(value), &written);
    return status == CUBLAS_STATUS_SUCCESS ? value : -1;
}

static inline void name_kernel(MatmulKernel* k) {
    const GpuPlan* p = &k->plan;
    snprintf(k->name, sizeof(k->name), "algorithm %d tile %d stages %d split %d%s%s%s%s",
             algorithm_setting(&k->algorithm, CUBLASLT_ALGO_CONFIG_ID), algorithm_setting(&k->algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID),
             algorithm_setting(&k->algorithm, CUBLASLT_ALGO_CONFIG_STAGES_ID),
             algorithm_setting(&k->algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM), p->a.copy == GPU_TRANSPOSE ? ", transposes A" : "",
             p->b.copy == GPU_TRANSPOSE ? ", transposes B" : "", p->a.copy == GPU_DECODE ? ", decodes A" : "",
             p->b.copy == GPU_DECODE ? ", decodes B" : "");
}

// Descales are laid out by the product (OperandScale), so a copy of an operand that is transposed takes those of the operand
static inline void set_block_scales(MatmulKernel* k, const MatmulCall* c) {
#if CUBLAS_VERSION >= 120900
    auto mode = [](const Operand* x) { return (int32_t)(x->scaling == SCALE_VEC128 ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F); };
    set_operation(k, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode(&c->b));
    set_operation(k, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode(&c->a));
#else
    (void)k;
    matmul_refuse(c, "scales by block need CUDA 12.9 or later");
#endif
}

static inline void kernel_create(Matmul* mm, MatmulEntry* entry, const MatmulCall* c) {
    MatmulKernel* k = new MatmulKernel();
    entry->kernel = k;
    k->plan = matmul_gpu_plan(c, mm->capability);
    entry->workspace = matmul_gpu_workspace(c, mm->capability);
    const GpuPlan* p = &k->plan;
    // what every pointer is sure to be a multiple of: an element where one of them is no multiple of 16 bytes
    auto alignment = [&](DType t) { return entry->shape.unaligned ? (uint32_t)dtype_bytes(t) : 16u; };
    if (p->fp8 && entry->shape.unaligned) { matmul_refuse(c, "FP8 units take pointers that are multiples of 16 bytes"); }

    // COMPUTE_32F does not cut FP32 operands to TF32
    CUBLASLT_CHECK(cublasLtMatmulDescCreate(&k->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set_operation(k, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)(p->b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
    set_operation(k, CUBLASLT_MATMUL_DESC_TRANSB, (int32_t)(p->a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
    const void* somewhere = (const void*)(size_t)256;  // of a pointer, the choice of algorithm looks at alignment and presence only
    if (p->fp8) {
        bool blocks = c->a.scaling != SCALE_TENSOR;
        set_operation(k, CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)(c->fast_accumulate && !blocks ? 1 : 0));
        if (blocks) { set_block_scales(k, c); }
        set_operation(k, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, somewhere);
        set_operation(k, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, somewhere);
    }
    if (p->bias_in_library) {
        const void* bias = entry->shape.unaligned ? (const void*)(size_t)dtype_bytes(c->bias_dtype) : somewhere;
        set_operation(k, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)CUBLASLT_EPILOGUE_BIAS);
        set_operation(k, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)cuda_dtype(c->bias_dtype));
        set_operation(k, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    }

    int a_rows = p->a.transposed ? c->k : c->m, a_cols = p->a.transposed ? c->m : c->k;
    int b_rows = p->b.transposed ? c->n : c->k, b_cols = p->b.transposed ? c->k : c->n;
    k->a = cublaslt_matrix(p->a.dtype, a_rows, a_cols, p->a.ld, c->batch, p->a.batch_stride);
    k->b = cublaslt_matrix(p->b.dtype, b_rows, b_cols, p->b.ld, c->batch, p->b.batch_stride);
    k->d = p->d_copy ? cublaslt_matrix(FP32, c->m, c->n, c->n, c->batch, (int64_t)c->m * c->n)
                     : cublaslt_matrix(c->d_dtype, c->m, c->n, c->d_ld, c->batch, c->d_batch_stride);

    cublasLtMatmulPreference_t preference = NULL;
    CUBLASLT_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)p->library_bytes);
    set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p->b.dtype));
    set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p->a.dtype));
    set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p->d_copy ? FP32 : c->d_dtype));
    set_preference(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p->d_copy ? FP32 : c->d_dtype));
    // A split sum may be kept in FP32 only: partial sums in a BF16 D would be rounded several times.
    bool fp32 = c->d_dtype == FP32 || p->d_copy;
    set_preference(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                   (uint32_t)(fp32 ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    cublasLtMatmulHeuristicResult_t results[MOST_ALGORITHMS] = {};
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(mm->backend->handle, k->operation, k->b, k->a, k->d, k->d, preference,
                                                           MOST_ALGORITHMS, results, &found);
    CUBLASLT_CHECK(cublasLtMatmulPreferenceDestroy(preference));
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; i++) {
        if (results[i].state == CUBLAS_STATUS_SUCCESS) { k->algorithms.push_back(results[i].algo); }
    }
    if (k->algorithms.empty()) {
        char why[160];
        snprintf(why, sizeof(why), "cuBLASLt has no algorithm for this on a GPU of capability %d.%d (%s)", mm->capability / 10,
                 mm->capability % 10, cublasLtGetStatusString(status != CUBLAS_STATUS_SUCCESS || found < 1 ? status : results[0].state));
        matmul_refuse(c, why);
    }
    k->algorithm = k->algorithms[0];
    name_kernel(k);
}

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(MatmulAlgorithm), "cublasLt.h: may be kept as it is, for the same version of the library");

static inline int kernel_algorithms(const MatmulKernel* k) { return (int)k->algorithms.size(); }

static inline MatmulAlgorithm kernel_algorithm(const MatmulKernel* k, int number) {
    MatmulAlgorithm a;
    memcpy(&a, number < 0 ? &k->algorithm : &k->algorithms[(size_t)number], sizeof(a));
    return a;
}

static inline bool kernel_take(Matmul* mm, MatmulEntry* entry, const MatmulAlgorithm* a) {
    MatmulKernel* k = entry->kernel;
    cublasLtMatmulAlgo_t algorithm;
    cublasLtMatmulHeuristicResult_t result = {};
    memcpy(&algorithm, a, sizeof(algorithm));
    cublasStatus_t status = cublasLtMatmulAlgoCheck(mm->backend->handle, k->operation, k->b, k->a, k->d, k->d, &algorithm, &result);
    if (status != CUBLAS_STATUS_SUCCESS || result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize > k->plan.library_bytes) { return false; }
    k->algorithm = algorithm;
    name_kernel(k);
    return true;
}

// The operand as the library wants it: where it lies, or copied into the workspace
static inline const void* present_operand(const GpuOperand* o, const Operand* x, char* workspace, int rows, int cols, int batch,
                                          bool k_is_columns, Stream stream) {
    char* copy = workspace + o->offset;
    if (o->copy == GPU_AS_IS) { return x->data; }
    if (o->copy == GPU_DECODE) {
        convert_operand((bf16*)copy, o->ld, x, rows, cols, batch, k_is_columns, stream);
    } else {
        TransposeBytes t = {(uint8_t*)copy, (const uint8_t*)x->data, o->ld, x->ld, o->batch_stride, x->batch_stride, rows, cols};
        launch(transpose_bytes_kernel, dim3((unsigned)(t.tiles_down() * t.tiles_across()), 1, (unsigned)batch),
               dim3(TransposeBytes::THREADS), 0, stream, t);
    }
    return copy;
}

// A call's matrices as the library is given them
struct LibraryCall { const void *a, *b; void* d; float beta; };

// Makes what copies of the operands there are to be, and sets the pointers within the descriptor
static inline LibraryCall library_call(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, Stream stream) {
    MatmulKernel* k = entry->kernel;
    const GpuPlan* p = &k->plan;
    char* w = (char*)mm->workspace;
    int a_rows = c->a.transposed ? c->k : c->m, a_cols = c->a.transposed ? c->m : c->k;
    int b_rows = c->b.transposed ? c->n : c->k, b_cols = c->b.transposed ? c->k : c->n;
    const void* a = present_operand(&p->a, &c->a, w, a_rows, a_cols, c->batch, !c->a.transposed, stream);
    const void* b = present_operand(&p->b, &c->b, w, b_rows, b_cols, c->batch, c->b.transposed, stream);
    void* d = p->d_copy ? w + p->d_offset : (char*)c->d;
    if (p->fp8) {
        if (((size_t)c->a.descale | (size_t)c->b.descale) % 16 != 0) {
            matmul_refuse(c, "a descale pointer is not a multiple of 16 bytes");
        }
        set_operation(k, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, (const void*)c->b.descale);
        set_operation(k, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, (const void*)c->a.descale);
    }
    if (p->bias_in_library) { set_operation(k, CUBLASLT_MATMUL_DESC_BIAS_POINTER, c->bias); }
    return LibraryCall{a, b, d, c->accumulate && !p->d_copy ? 1.0f : 0.0f};
}

static inline cublasStatus_t library_run(Matmul* mm, MatmulKernel* k, const LibraryCall* x, const cublasLtMatmulAlgo_t* algorithm, Stream stream) {
    float alpha = 1.0f;  // read before the call returns, as is beta
    return cublasLtMatmul(mm->backend->handle, k->operation, &alpha, x->b, k->b, x->a, k->a, &x->beta, x->d, k->d, x->d, k->d, algorithm,
                          (char*)mm->workspace + k->plan.library_offset, k->plan.library_bytes, stream);
}

static inline double kernel_time(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, int number, int calls, Stream stream) {
    MatmulKernel* k = entry->kernel;
    LibraryCall x = library_call(mm, entry, c, stream);
    bool done = true;
    backend_mark(mm, LIBRARY_BEGINS, stream);
    for (int i = 0; i < calls && done; i++) { done = library_run(mm, k, &x, &k->algorithms[(size_t)number], stream) == CUBLAS_STATUS_SUCCESS; }
    backend_mark(mm, LIBRARY_ENDS, stream);
    double seconds = backend_seconds(mm, LIBRARY_BEGINS, LIBRARY_ENDS);
    return done ? seconds / calls : INFINITY;
}

static inline void kernel_run(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, Stream stream) {
    MatmulKernel* k = entry->kernel;
    const GpuPlan* p = &k->plan;
    LibraryCall x = library_call(mm, entry, c, stream);
    if (mm->timing) { backend_mark(mm, LIBRARY_BEGINS, stream); }
    cublasStatus_t status = library_run(mm, k, &x, &k->algorithm, stream);
    if (status != CUBLAS_STATUS_SUCCESS) {
        char why[160];
        snprintf(why, sizeof(why), "cuBLASLt fails (%s)", cublasLtGetStatusString(status));
        matmul_refuse(c, why);
    }
    if (mm->timing) { backend_mark(mm, LIBRARY_ENDS, stream); }
    if (p->d_copy) {
        finish_matmul(c, (const float*)x.d, stream);
    } else if (c->bias != NULL && !p->bias_in_library) {
        MatmulCall add = *c;
        add.accumulate = true;
        finish_matmul(&add, NULL, stream);
    }
}
