// matmul_onednn.h: the CPU backend of matmul.cuh, on oneDNN (API versions 2 and 3).
//
// oneDNN multiplies FP32 × FP32 and, where the CPU has the instructions (AVX512-BF16, AMX), BF16 × BF16; its kernels take operands in all
// four combinations of transposition at nearly the speed of its own blocked layouts, so nothing is transposed or reordered here. An operand
// that is not of the multiplied format (FP8 always; BF16 on CPUs without BF16 instructions) is converted into the workspace first, as
// stored and packed. Compiled kernels ("primitives") are kept by shape, with scratchpads in our workspace.
#pragma once
#include <oneapi/dnnl/dnnl.hpp>

struct MatmulBackend {
    dnnl::engine engine;
    dnnl::stream stream;
    bool bf16;              // the CPU multiplies BF16
    double marks[MATMUL_MARKS];  // seconds
};

struct MatmulKernel {
    dnnl::matmul primitive;
    std::unordered_map<int, dnnl::memory> arguments;
    std::string name;
    DType compute;          // of both operands as oneDNN sees them: FP32 or BF16
    bool convert_a, convert_b, convert_bias;
    bool d_copy;            // oneDNN writes FP32 into the workspace; our kernel adds the bias and rounds to BF16
    size_t a_offset, b_offset, bias_offset, d_offset, scratchpad_offset;
};

static inline bool cpu_multiplies_bf16(void) {
    unsigned isa = (unsigned)dnnl::get_effective_cpu_isa(), needed = (unsigned)dnnl::cpu_isa::avx512_core_bf16;
    return (isa & needed) == needed;  // the values are sets of features: AMX contains it
}

static inline void backend_create(Matmul* mm) {
    mm->backend = new MatmulBackend();
    try {
        mm->backend->engine = dnnl::engine(dnnl::engine::kind::cpu, 0);
        mm->backend->stream = dnnl::stream(mm->backend->engine);
    } catch (const dnnl::error& e) { die("oneDNN does not start: %s", e.what()); }
    mm->backend->bf16 = cpu_multiplies_bf16();
}

static inline void backend_destroy(Matmul* mm) { delete mm->backend; }
static inline void kernel_destroy(MatmulKernel* kernel) { delete kernel; }
static inline const char* kernel_name(const MatmulKernel* kernel) { return kernel->name.c_str(); }

static inline void backend_mark(Matmul* mm, MatmulMark mark, Stream) { mm->backend->marks[mark] = wall_seconds(); }
static inline double backend_seconds(Matmul* mm, MatmulMark from, MatmulMark to) {
    return mm->backend->marks[to] - mm->backend->marks[from];
}

static inline dnnl::memory::data_type onednn_dtype(DType t) {
    return t == FP32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

// (rows, cols), stored (cols, rows) if transposed
static inline dnnl::memory::desc onednn_matrix(int batch, int64_t rows, int64_t cols, DType t, int64_t ld, int64_t batch_stride,
                                               bool transposed) {
    int64_t row = transposed ? 1 : ld, col = transposed ? ld : 1;
    if (batch == 1) { return dnnl::memory::desc({rows, cols}, onednn_dtype(t), {row, col}); }
    return dnnl::memory::desc({batch, rows, cols}, onednn_dtype(t), {batch_stride, row, col});
}

static inline dnnl::matmul::primitive_desc onednn_matmul(const dnnl::engine& engine, const dnnl::memory::desc& a,
                                                         const dnnl::memory::desc& b, const dnnl::memory::desc* bias,
                                                         const dnnl::memory::desc& d, bool accumulate) {
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (accumulate) {
        dnnl::post_ops add;
        add.append_sum(1.0f);
        attributes.set_post_ops(add);
    }
#if DNNL_VERSION_MAJOR >= 3
    return bias != NULL ? dnnl::matmul::primitive_desc(engine, a, b, *bias, d, attributes)
                        : dnnl::matmul::primitive_desc(engine, a, b, d, attributes);
#else
    return bias != NULL ? dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, *bias, d), attributes, engine)
                        : dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, d), attributes, engine);
#endif
}

// One part of the workspace; returns its offset.
static inline size_t take_part(size_t* at, size_t bytes) {
    size_t offset = *at;
    *at += round_up(bytes, MATMUL_ALIGNMENT);
    return offset;
}

// Builds the primitive for a given treatment of D; the workspace is entry->workspace.
static inline void kernel_build(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, bool d_copy) {
    MatmulKernel* k = entry->kernel;
    const dnnl::engine& engine = mm->backend->engine;
    k->compute = c->a.dtype == FP32 || !mm->backend->bf16 ? FP32 : BF16;
    k->convert_a = c->a.dtype != k->compute;
    k->convert_b = c->b.dtype != k->compute;
    k->d_copy = d_copy;
    bool bias = c->bias != NULL && !d_copy;
    k->convert_bias = bias && k->compute == FP32 && c->bias_dtype != FP32;
    DType d_dtype = d_copy ? FP32 : c->d_dtype;
    int64_t a_cols = c->a.transposed ? c->m : c->k, b_cols = c->b.transposed ? c->k : c->n;
    int64_t a_size = (int64_t)c->m * c->k, b_size = (int64_t)c->k * c->n, d_size = (int64_t)c->m * c->n;
    dnnl::memory::desc a = onednn_matrix(c->batch, c->m, c->k, k->compute, k->convert_a ? a_cols : c->a.ld,
                                         k->convert_a ? a_size : c->a.batch_stride, c->a.transposed);
    dnnl::memory::desc b = onednn_matrix(c->batch, c->k, c->n, k->compute, k->convert_b ? b_cols : c->b.ld,
                                         k->convert_b ? b_size : c->b.batch_stride, c->b.transposed);
    dnnl::memory::desc d =
        onednn_matrix(c->batch, c->m, c->n, d_dtype, d_copy ? c->n : c->d_ld, d_copy ? d_size : c->d_batch_stride, false);
    dnnl::memory::desc e = onednn_matrix(1, 1, c->n, k->convert_bias ? FP32 : c->bias_dtype == BF16 ? BF16 : FP32, c->n, 0, false);
    if (c->batch > 1) { e = e.reshape({1, 1, c->n}); }
    dnnl::matmul::primitive_desc pd = onednn_matmul(engine, a, b, bias ? &e : NULL, d, c->accumulate && !d_copy);  // a copy of D is added to D as it is rounded
    k->primitive = dnnl::matmul(pd);
    k->name = pd.impl_info_str();
    k->arguments.clear();
    k->arguments.emplace(DNNL_ARG_SRC, dnnl::memory(a, engine, NULL));
    k->arguments.emplace(DNNL_ARG_WEIGHTS, dnnl::memory(b, engine, NULL));
    k->arguments.emplace(DNNL_ARG_DST, dnnl::memory(d, engine, NULL));
    k->arguments.emplace(DNNL_ARG_SCRATCHPAD, dnnl::memory(pd.scratchpad_desc(), engine, NULL));
    if (bias) { k->arguments.emplace(DNNL_ARG_BIAS, dnnl::memory(e, engine, NULL)); }
    size_t at = 0;
    k->a_offset = take_part(&at, k->convert_a ? a.get_size() : 0);
    k->b_offset = take_part(&at, k->convert_b ? b.get_size() : 0);
    k->bias_offset = take_part(&at, k->convert_bias ? e.get_size() : 0);
    k->d_offset = take_part(&at, d_copy ? d.get_size() : 0);
    k->scratchpad_offset = take_part(&at, pd.scratchpad_desc().get_size());
    entry->workspace = at;
}

static inline void kernel_create(Matmul* mm, MatmulEntry* entry, const MatmulCall* c) {
    entry->kernel = new MatmulKernel();
    bool fp32_to_bf16 = (c->a.dtype == FP32 || !mm->backend->bf16) && c->d_dtype == BF16;  // oneDNN has no such product
    try {
        kernel_build(mm, entry, c, fp32_to_bf16);
        // For a BF16 D with gaps oneDNN keeps an FP32 copy of D in every thread; one for all is less, and as exact.
        size_t copy = round_up((size_t)c->batch * c->m * c->n * 4, MATMUL_ALIGNMENT);
        if (c->d_dtype == BF16 && !fp32_to_bf16 && entry->workspace > copy) {
            size_t native = entry->workspace;
            kernel_build(mm, entry, c, true);
            if (entry->workspace >= native) { kernel_build(mm, entry, c, false); }
        }
    } catch (const dnnl::error& e) {
        char why[256];
        snprintf(why, sizeof(why), "oneDNN refuses (%s)", e.what());
        matmul_refuse(c, why);
    }
}

// The operand as oneDNN wants it: where it lies, or converted at `copy`
static inline void* present_operand(const MatmulKernel* k, const Operand* x, bool convert, void* copy, int rows, int cols, int batch,
                                    bool k_is_columns, Stream stream) {
    if (!convert) { return (void*)x->data; }
    if (k->compute == BF16) { convert_operand((bf16*)copy, cols, x, rows, cols, batch, k_is_columns, stream); }
    else { convert_operand((float*)copy, cols, x, rows, cols, batch, k_is_columns, stream); }
    return copy;
}

static inline void kernel_run(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, Stream stream) {
    MatmulKernel* k = entry->kernel;
    char* w = (char*)mm->workspace;
    int a_rows = c->a.transposed ? c->k : c->m, a_cols = c->a.transposed ? c->m : c->k;
    int b_rows = c->b.transposed ? c->n : c->k, b_cols = c->b.transposed ? c->k : c->n;
    void* a = present_operand(k, &c->a, k->convert_a, w + k->a_offset, a_rows, a_cols, c->batch, !c->a.transposed, stream);
    void* b = present_operand(k, &c->b, k->convert_b, w + k->b_offset, b_rows, b_cols, c->batch, c->b.transposed, stream);
    void* d = k->d_copy ? w + k->d_offset : (char*)c->d;
    try {
        k->arguments[DNNL_ARG_SRC].set_data_handle(a);
        k->arguments[DNNL_ARG_WEIGHTS].set_data_handle(b);
        k->arguments[DNNL_ARG_DST].set_data_handle(d);
        k->arguments[DNNL_ARG_SCRATCHPAD].set_data_handle(w + k->scratchpad_offset);
        if (c->bias != NULL && !k->d_copy) {
            void* bias = (void*)c->bias;
            if (k->convert_bias) {
                bias = w + k->bias_offset;
                run_rows(ConvertRows<float, bf16>{(float*)bias, (const bf16*)c->bias, NULL, c->n, c->n, 0, 1, c->n}, 1, stream);
            }
            k->arguments[DNNL_ARG_BIAS].set_data_handle(bias);
        }
        if (mm->timing) { backend_mark(mm, LIBRARY_BEGINS, stream); }
        k->primitive.execute(mm->backend->stream, k->arguments);
        mm->backend->stream.wait();
        if (mm->timing) { backend_mark(mm, LIBRARY_ENDS, stream); }
    } catch (const dnnl::error& e) {
        char why[256];
        snprintf(why, sizeof(why), "oneDNN fails (%s)", e.what());
        matmul_refuse(c, why);
    }
    if (k->d_copy) { finish_matmul(c, (const float*)d, stream); }
}
