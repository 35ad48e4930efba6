// matmul.cuh: the matrix product, on whichever device the build is for.
//
//     D (m, n) = A (m, k) · B (k, n) [+ bias (n)] [+ D]        for each matrix of a batch, FP32 accumulation
//
// All matrices are row-major; either operand may be stored transposed, so the three products of a linear layer need no copies:
//     Y  (tokens, out) = X (tokens, in)      · Wᵀ: B is W (out, in), transposed
//     dX (tokens, in)  = dY (tokens, out)    · W
//     dW (out, in)    += dYᵀ                 · X:  A is dY (tokens, out), transposed
//
// A call is described by a MatmulCall. The description without its pointers is a shape, and what a shape needs (library descriptors,
// compiled kernels, the division of the workspace) is worked out once and kept. `matmul_plan` does just that and returns the bytes of
// workspace, so that a dry run over all calls of a training step sizes the workspace; `matmul` refuses a call that needs more than it was
// given.
//
// The backends: matmul_onednn.h (CPU) and matmul_cublaslt.cuh (CUDA). FP8 operands are exact on both: the GPU's FP8 units multiply them as
// they are; where there are none, and on CPUs, they are decoded to BF16 (or FP32) in the workspace, descale included, which loses nothing
// as descale is a power of two. What the GPU backend does with a shape, copies included, is decided by `matmul_gpu_plan` below, a pure
// function that both builds compile: the planner asks it about GPUs that are not there.
//
// Where the library has several algorithms for a shape (cuBLASLt), its first is taken, unless a choice was made: `matmul_choose` times them,
// once for all shapes that were planned, and matmul_choices_write and matmul_choices_read carry the choices to other ranks, runs and
// checkpoints (matmul_choice.h).
//
// FP8 operands may be scaled by block: 128 elements along k share a scale (VEC128), or 128 of k and 128 rows of a weight (BLK128). Capability 9.0 multiplies
// such operands as they are, if not both are BLK128; a CPU decodes them, exactly as ever.
//
// Numbers: |err| <= 16·2⁻²⁴·Σ|ab| for FP32 D, and half a unit of BF16 more for BF16 D; sums that are exactly representable are exact. NaN
// and inf propagate; BF16 subnormals may be flushed. The same call on the same device with the same thread count and algorithm gives the same bits.
#pragma once
#include "device.cuh"
#include <algorithm>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

// ---- the interface ----

// How many elements share a descale, a power of two or NaN. Of blocks they are laid out as cuBLASLt wants them, by the product and not as the operand is
// stored; `outer` is the dimension that is not k, and k is cut into ⌈k/128⌉ blocks, of which the last may be short.
enum OperandScale {
    SCALE_TENSOR,           // all: one
    SCALE_VEC128,           // 128 along k: (⌈k/128⌉, outer)
    SCALE_BLK128,           // 128 along k and 128 outer ones: (⌈outer/128⌉, ⌈k/128⌉ rounded up to a multiple of 4)
};
static inline int64_t block_pitch(int64_t k) { return padded_blocks(ceil_div(k, (int64_t)SCALE_BLOCK)); }  // of BLK128
// How many descales there are
static inline size_t operand_scales(OperandScale scaling, int64_t outer, int64_t k) {
    if (scaling == SCALE_TENSOR) { return 1; }
    int64_t block = SCALE_BLOCK;
    return (size_t)(scaling == SCALE_VEC128 ? ceil_div(k, block) * outer : ceil_div(outer, block) * block_pitch(k));
}

// A matrix operand, row-major. Real value = element × its descale.
struct Operand {
    const void* data;
    DType dtype;            // FP32, BF16, E4M3, E5M2
    const float* descale;   // on the device, 16-byte aligned, a power of two, for FP8 only; NULL = 1
    int64_t ld;             // elements between rows as stored
    int64_t batch_stride;   // elements between matrices of a batch, 0 when batch == 1
    bool transposed;        // stored (k, m) for A, (n, k) for B, instead of (m, k) and (k, n)
    OperandScale scaling = SCALE_TENSOR;
};

struct MatmulCall {
    void* d;                // (m, n)
    DType d_dtype;          // FP32 or BF16
    int64_t d_ld, d_batch_stride;
    Operand a, b;
    const void* bias;       // (n), the same for every row and batch; NULL = none
    DType bias_dtype;       // FP32 or BF16
    int m, n, k, batch;
    bool accumulate;        // D += …, summed in FP32; a BF16 D is rounded each time
    bool fast_accumulate;   // Hopper's fast FP8 accumulation, for forward only; CPUs and other formats ignore it
};

// Everything of a call that is not a pointer. Compared as bytes: cleared before it is filled, and without padding.
struct MatmulShape {
    int64_t a_ld, b_ld, d_ld, a_stride, b_stride, d_stride;
    int m, n, k, batch;
    int threads;            // CPU: the compiled kernel depends on it
    uint8_t a_dtype, b_dtype, d_dtype, bias_dtype;
    bool a_transposed, b_transposed, bias, accumulate, fast_accumulate;
    bool unaligned;         // GPU: a pointer or stride that the library sees is no multiple of 16 bytes
    uint8_t a_scaling, b_scaling;
};
static_assert(sizeof(MatmulShape) == 80, "padding would be compared too");

struct MatmulStatistics {
    int64_t calls;
    // counted only while Matmul.timing is on
    int64_t timed_calls;
    double flops;           // 2·m·n·k·batch a call
    double seconds;         // inside the library and our copies
    double library_seconds; // inside the library only
    double alone_seconds;   // of as many calls, as matmul_time_alone finds them; 0 = not measured
};

struct MatmulBackend;       // the library's handles
struct MatmulKernel;        // what a backend keeps for a shape

struct MatmulEntry {
    MatmulShape shape;
    MatmulKernel* kernel;
    size_t workspace;       // bytes
    MatmulStatistics statistics;
};

struct MatmulShapeHash {
    size_t operator()(const MatmulShape& s) const {
        const unsigned char* p = (const unsigned char*)&s;
        uint64_t h = 0xcbf29ce484222325ull;  // FNV-1a
        for (size_t i = 0; i < sizeof(s); i++) { h = (h ^ p[i]) * 0x100000001b3ull; }
        return (size_t)h;
    }
};
struct MatmulShapeEqual {
    bool operator()(const MatmulShape& a, const MatmulShape& b) const { return memcmp(&a, &b, sizeof(a)) == 0; }
};

#include "matmul_choice.h"

struct Matmul {
    bool timing;            // measure each call (on a GPU that waits for it): for the bench
    bool imagined;          // of a GPU that is not there: calls are planned, none is made
    int capability;         // of the GPU, e.g. 90; 0 on a CPU
    void* workspace;
    size_t workspace_bytes;
    size_t planned;         // the most bytes that any planned shape needs
    MatmulBackend* backend;
    std::unordered_map<MatmulShape, MatmulEntry*, MatmulShapeHash, MatmulShapeEqual>* shapes;
    std::vector<MatmulEntry*>* order;  // the same entries, in the order of their first use
    std::string* device;    // GPU and library, as choices name them
    MatmulChoices* choices; // algorithms that shapes take, those of other runs and devices too; a shape that is not there takes the first
};

constexpr size_t MATMUL_ALIGNMENT = 256;  // bytes; of the workspace and of its parts

// ---- words for a call ----

static inline void matmul_describe(char* text, size_t size, const MatmulCall* c) {
    char ld[160] = "", batch[96] = "";
    snprintf(ld, sizeof(ld), "ld %" PRId64 ", %" PRId64 ", %" PRId64, c->d_ld, c->a.ld, c->b.ld);
    if (c->batch != 1) {
        snprintf(batch, sizeof(batch), ", batch %d with strides %" PRId64 ", %" PRId64 ", %" PRId64, c->batch, c->d_batch_stride,
                 c->a.batch_stride, c->b.batch_stride);
    }
    const char* d = c->d_dtype < DTYPE_COUNT ? dtype_names[c->d_dtype] : "?";
    const char* a = c->a.dtype < DTYPE_COUNT ? dtype_names[c->a.dtype] : "?";
    const char* b = c->b.dtype < DTYPE_COUNT ? dtype_names[c->b.dtype] : "?";
    snprintf(text, size, "D (%d, %d) %s %s A%s (%d, %d) %s x B%s (%d, %d) %s%s [%s%s]", c->m, c->n, d, c->accumulate ? "+=" : "=",
             c->a.transposed ? "^T" : "", c->a.transposed ? c->k : c->m, c->a.transposed ? c->m : c->k, a, c->b.transposed ? "^T" : "",
             c->b.transposed ? c->n : c->k, c->b.transposed ? c->k : c->n, b, c->bias != NULL ? " + bias" : "", ld, batch);
}

// Ends the run; the message names the call.
[[noreturn]] static inline void matmul_refuse(const MatmulCall* c, const char* why) {
    char text[512];
    matmul_describe(text, sizeof(text), c);
    die("matmul: %s: %s", why, text);
}

// NULL, or why no backend takes the call.
static inline const char* matmul_objection(const MatmulCall* c) {
    DType a = c->a.dtype, b = c->b.dtype;
    int a_cols = c->a.transposed ? c->m : c->k, b_cols = c->b.transposed ? c->k : c->n;
    if ((a != FP32 && a != BF16 && !is_fp8(a)) || (b != FP32 && b != BF16 && !is_fp8(b))) {
        return "operands are fp32, bf16, e4m3 or e5m2";
    }
    if ((a == FP32) != (b == FP32)) { return "an fp32 operand needs the other to be fp32"; }
    if (a == E5M2 && b == E5M2) { return "e5m2 x e5m2 is no hardware's product: one operand must be e4m3"; }
    bool a_blocks = c->a.scaling != SCALE_TENSOR, b_blocks = c->b.scaling != SCALE_TENSOR;
    if ((a_blocks && !is_fp8(a)) || (b_blocks && !is_fp8(b))) { return "only FP8 operands are scaled by block"; }
    if (a_blocks != b_blocks) { return "both operands are scaled by block, or none"; }
    if (c->a.scaling == SCALE_BLK128 && c->b.scaling == SCALE_BLK128) { return "128 x 128 blocks times 128 x 128 blocks is no hardware's product"; }
    if (a_blocks && c->batch != 1) { return "operands that are scaled by block come in no batches"; }
    if (c->d_dtype != FP32 && c->d_dtype != BF16) { return "the result is fp32 or bf16"; }
    if (c->bias != NULL && c->bias_dtype != FP32 && c->bias_dtype != BF16) { return "a bias is fp32 or bf16"; }
    if (c->m < 0 || c->n < 0 || c->k < 0) { return "negative size"; }
    if (c->batch < 1) { return "a batch is 1 or more"; }
    if (c->a.ld < max_of(a_cols, 1) || c->b.ld < max_of(b_cols, 1) || c->d_ld < max_of(c->n, 1)) {
        return "a leading dimension is shorter than its matrix's row";
    }
    if (c->batch == 1 && (c->a.batch_stride != 0 || c->b.batch_stride != 0 || c->d_batch_stride != 0)) {
        return "a single matrix has no batch stride";
    }
    if (c->batch > 1 && (c->a.batch_stride <= 0 || c->b.batch_stride <= 0 || c->d_batch_stride <= 0)) {
        return "a batch needs positive strides";
    }
    if ((int64_t)c->batch * max_of(max_of(c->m, c->n), c->k) > INT32_MAX) { return "more rows than an int counts"; }
    return NULL;
}

// ---- what a GPU does with a shape: pure functions, compiled in both builds ----

// How an operand reaches the library: as it is, or copied into the workspace first.
enum GpuCopy { GPU_AS_IS, GPU_DECODE, GPU_TRANSPOSE };

struct GpuOperand {
    GpuCopy copy;
    DType dtype;            // as the library sees it
    int64_t ld, batch_stride;
    bool transposed;        // as the library sees it
    size_t offset, bytes;   // of the copy in the workspace
};

struct GpuPlan {
    GpuOperand a, b;
    bool fp8;               // the library multiplies FP8
    bool d_copy;            // the library writes FP32 into the workspace; our kernel adds the bias and rounds
    bool bias_in_library;
    size_t d_offset, library_offset, library_bytes;
    size_t bytes;           // of workspace, all together
};

// Bytes that cuBLASLt is given: what NVIDIA recommends. 9.0 and later: 32 MiB + 1 KiB.
static inline size_t matmul_gpu_library_bytes(int capability) { return capability >= 90 ? ((size_t)32 << 20) + 1024 : (size_t)8 << 20; }
static inline bool gpu_has_fp8(int capability) { return capability >= 89; }
// The FP8 units of 8.9, 9.0 and 12.x take only K-contiguous operands; those of 10.x and 11.x take all layouts.
static inline bool gpu_fp8_needs_k_contiguous(int capability) { return !(capability >= 100 && capability < 120); }

// (rows, cols): the operand as stored
static inline GpuOperand gpu_operand(const Operand* x, int rows, int cols, int batch, bool decode, bool transpose) {
    GpuOperand o = {GPU_AS_IS, x->dtype, x->ld, x->batch_stride, x->transposed, 0, 0};
    if (decode) {            // as stored, rows padded to 16 bytes
        o.copy = GPU_DECODE;
        o.dtype = BF16;
        o.ld = round_up((int64_t)cols, (int64_t)8);
        o.batch_stride = batch > 1 ? o.ld * rows : 0;
        o.bytes = (size_t)o.ld * rows * batch * 2;
    } else if (transpose) {  // (cols, rows), rows padded to 16 bytes
        o.copy = GPU_TRANSPOSE;
        o.ld = round_up((int64_t)rows, (int64_t)16);
        o.batch_stride = batch > 1 ? o.ld * cols : 0;
        o.transposed = !x->transposed;
        o.bytes = (size_t)o.ld * cols * batch;
    }
    return o;
}

static inline GpuPlan matmul_gpu_plan(const MatmulCall* c, int capability) {
    GpuPlan p = {};
    bool a8 = is_fp8(c->a.dtype), b8 = is_fp8(c->b.dtype);
    p.fp8 = a8 && b8 && gpu_has_fp8(capability);
    bool k_contiguous = p.fp8 && gpu_fp8_needs_k_contiguous(capability);
    int a_rows = c->a.transposed ? c->k : c->m, a_cols = c->a.transposed ? c->m : c->k;
    int b_rows = c->b.transposed ? c->n : c->k, b_cols = c->b.transposed ? c->k : c->n;
    p.a = gpu_operand(&c->a, a_rows, a_cols, c->batch, a8 && !p.fp8, k_contiguous && c->a.transposed);
    p.b = gpu_operand(&c->b, b_rows, b_cols, c->batch, b8 && !p.fp8, k_contiguous && !c->b.transposed);
    // cuBLASLt's bias has D's type, but is BF16 with FP8 operands. Any other is ours to add: where D is FP32 afterwards and in place; where
    // D is BF16 that would round twice, so D is first written as FP32.
    p.bias_in_library = c->bias != NULL && (p.fp8 ? c->bias_dtype == BF16 : c->bias_dtype == c->d_dtype);
    p.d_copy = c->bias != NULL && !p.bias_in_library && c->d_dtype == BF16;
    size_t at = 0;
    p.a.offset = at;
    at += round_up(p.a.bytes, MATMUL_ALIGNMENT);
    p.b.offset = at;
    at += round_up(p.b.bytes, MATMUL_ALIGNMENT);
    p.d_offset = at;
    at += p.d_copy ? round_up((size_t)c->batch * c->m * c->n * 4, MATMUL_ALIGNMENT) : 0;
    p.library_offset = at;
    p.library_bytes = matmul_gpu_library_bytes(capability);
    p.bytes = round_up(at + p.library_bytes, MATMUL_ALIGNMENT);
    return p;
}

// Bytes of workspace the CUDA build uses for this call on a GPU of this capability (90 is 9.0). No pointer is read but whether bias is
// NULL.
static inline size_t matmul_gpu_workspace(const MatmulCall* c, int capability) {
    return c->m == 0 || c->n == 0 || c->k == 0 ? 0 : matmul_gpu_plan(c, capability).bytes;
}

// Whether every row and matrix that the library touches starts at a multiple of 16 bytes, given that the operands' pointers do.
static inline bool gpu_strides_aligned(const MatmulCall* c, const GpuPlan* p) {
    int64_t a = p->a.ld | p->a.batch_stride, b = p->b.ld | p->b.batch_stride;
    int64_t d = p->d_copy ? c->n * 4 : (c->d_ld | c->d_batch_stride) * dtype_bytes(c->d_dtype);
    return a * dtype_bytes(p->a.dtype) % 16 == 0 && b * dtype_bytes(p->b.dtype) % 16 == 0 && d % 16 == 0;
}

// Whether the pointers that the library is given are multiples of 16 bytes; copies in the workspace are.
static inline bool gpu_pointers_aligned(const MatmulCall* c, const GpuPlan* p) {
    size_t a = p->a.copy == GPU_AS_IS ? (size_t)c->a.data : 0, b = p->b.copy == GPU_AS_IS ? (size_t)c->b.data : 0;
    size_t d = p->d_copy ? 0 : (size_t)c->d, bias = p->bias_in_library ? (size_t)c->bias : 0;
    return (a | b | d | bias) % 16 == 0;
}

// NULL, or why a GPU of this capability does not take the call although a CPU would.
static inline const char* matmul_gpu_objection(const MatmulCall* c, int capability) {
    if (capability < 80) { return "the GPU's capability is below 8.0: it has no bf16 units"; }
    if (c->batch > 65535) { return "a GPU takes batches of at most 65535 matrices"; }
    int64_t longest =
        max_of(max_of(c->a.ld * dtype_bytes(c->a.dtype), c->b.ld * dtype_bytes(c->b.dtype)), c->d_ld * dtype_bytes(c->d_dtype));
    if (longest > INT32_MAX) { return "cuBLASLt takes rows of at most 2 GiB"; }
    GpuPlan p = matmul_gpu_plan(c, capability);
    if (!p.fp8) { return NULL; }
    bool blocks = c->a.scaling != SCALE_TENSOR;
    if (blocks && capability != 90) { return "cuBLASLt multiplies operands that are scaled by blocks of 128 on capability 9.0 alone"; }
    if (blocks && c->m % 4 != 0) { return "operands that are scaled by block have an m that is a multiple of 4: pad with zeros"; }
    if (c->k % 16 != 0 || c->n % 16 != 0) { return "FP8 units take k and n that are multiples of 16: pad with zeros"; }
    if (p.a.transposed && c->m % 16 != 0) { return "FP8 units take a transposed A whose m is a multiple of 16: pad with zeros"; }
    if (!gpu_strides_aligned(c, &p)) { return "FP8 units take leading dimensions and batch strides that are multiples of 16 bytes"; }
    return NULL;
}

// ---- kernels of our own ----

// y (n) = x · s, exact if the product fits To
template <class To, class From, class Team> DEVICE void convert_row(Team t, To* y, const From* x, float s, int n) {
    if constexpr (std::is_same<To, bf16>::value && sizeof(From) == 1) {
        int k = (int)(float_to_bits(s) >> 23) - 127;  // s = 2^k
        if (k >= -WIDEN_RANGE && k <= WIDEN_RANGE) {
            t.each(n, [=](auto c) { store_raw(y, c, widen(load_raw(x, c), k)); });
            return;
        }
    }
    t.each(n, [=](auto c) { store(y, c, load(x, c) * s); });
}

// y (batch, rows, cols) with rows y_ld apart = x × *descale, exact if the product fits To
template <class To, class From> struct ConvertRows {
    To* y;
    const From* x;
    const float* descale;
    int64_t y_ld, x_ld, x_batch_stride;
    int rows, cols;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        To* yr = y + (size_t)row * (size_t)y_ld;
        const From* xr = x + (int64_t)(row / rows) * x_batch_stride + (int64_t)(row % rows) * x_ld;
        bool packs = pack_aligned(xr) && pack_aligned(yr);
        convert_row(packs ? team : team.unaligned(), yr, xr, descale != NULL ? *descale : 1.0f, cols);
    }
};

// Where the descale of element (row, column) of a stored matrix is: at row / row_block · row_step + column / column_block · column_step
struct BlockStrides { int row_block, column_block; int64_t row_step, column_step; };

// Of an operand stored (rows, cols), of which k is the columns or the rows
static inline BlockStrides block_strides(OperandScale scaling, bool k_is_columns, int rows, int cols) {
    if (scaling == SCALE_VEC128) { return k_is_columns ? BlockStrides{1, SCALE_BLOCK, 1, rows} : BlockStrides{SCALE_BLOCK, 1, cols, 1}; }
    return k_is_columns ? BlockStrides{SCALE_BLOCK, SCALE_BLOCK, block_pitch(cols), 1} : BlockStrides{SCALE_BLOCK, SCALE_BLOCK, 1, block_pitch(rows)};
}

// y (rows, cols) with rows y_ld apart = x × its descales, exact if the product fits To
template <class To, class From> struct ConvertBlocks {
    To* y;
    const From* x;
    const float* descales;
    BlockStrides at;
    int64_t y_ld, x_ld;
    int cols;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        const float* d = descales + row / at.row_block * at.row_step;
        To* yr = y + (int64_t)row * y_ld;
        const From* xr = x + (int64_t)row * x_ld;
        Team t = pack_aligned(xr) && pack_aligned(yr) && pack_aligned(d) ? team : team.unaligned();
        if (at.column_block == 1) {
            t.each(cols, [=](auto c) { store(yr, c, load(xr, c) * load(d, c)); });
            return;
        }
        for (int first = 0; first < cols; first += SCALE_BLOCK) {
            const float* descale = d + first / SCALE_BLOCK * at.column_step;
            convert_row(t, yr + first, xr + first, *descale, min_of(SCALE_BLOCK, cols - first));
        }
    }
};

// d (batch, m, n) = [x (batch, m, n), packed] [+ bias] [+ d], summed in FP32, rounded once
template <class D, class Bias> struct FinishRows {
    D* d;
    const float* x;
    const Bias* bias;
    int64_t d_ld, d_batch_stride;
    int m, n;
    bool accumulate;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        D* dr = d + (int64_t)(row / m) * d_batch_stride + (int64_t)(row % m) * d_ld;
        const float* xr = x == NULL ? NULL : x + (size_t)row * (size_t)n;
        const Bias* b = bias;
        bool sum = accumulate;
        bool packs = ((size_t)dr | (size_t)xr | (size_t)b) % 16 == 0;
        (packs ? team : team.unaligned()).each(n, [=](auto c) {
            auto y = decltype(load(dr, c))::map([](int) { return 0.0f; });
            if (xr != NULL) { y = load(xr, c); }
            if (b != NULL) { y = y + load(b, c); }
            if (sum) { y = y + load(dr, c); }
            store(dr, c, y);
        });
    }
};

template <class D> static inline void finish_rows(D* d, const float* x, const MatmulCall* c, Stream stream) {
    int rows = c->batch * c->m;
    if (c->bias_dtype == FP32) {
        run_rows(FinishRows<D, float>{d, x, (const float*)c->bias, c->d_ld, c->d_batch_stride, c->m, c->n, c->accumulate}, rows, stream);
    } else {
        run_rows(FinishRows<D, bf16>{d, x, (const bf16*)c->bias, c->d_ld, c->d_batch_stride, c->m, c->n, c->accumulate}, rows, stream);
    }
}

// D = [x] [+ bias] [+ D] for the call's D
static inline void finish_matmul(const MatmulCall* c, const float* x, Stream stream) {
    if (c->d_dtype == FP32) { finish_rows((float*)c->d, x, c, stream); }
    else { finish_rows((bf16*)c->d, x, c, stream); }
}

// x (batch, rows, cols) as stored; `k_is_columns`: its rows lie along k
template <class To>
static inline void convert_operand(To* y, int64_t y_ld, const Operand* x, int rows, int cols, int batch, bool k_is_columns, Stream stream) {
    auto convert = [&](auto from) {
        typedef typename decltype(from)::type From;
        const From* data = (const From*)x->data;
        if (x->scaling == SCALE_TENSOR) {
            run_rows(ConvertRows<To, From>{y, data, x->descale, y_ld, x->ld, x->batch_stride, rows, cols}, rows * batch, stream);
        } else {
            run_rows(ConvertBlocks<To, From>{y, data, x->descale, block_strides(x->scaling, k_is_columns, rows, cols), y_ld, x->ld, cols}, rows, stream);
        }
    };
    switch (x->dtype) {
        case E4M3: convert(Tag<e4m3>{}); break;
        case E5M2: convert(Tag<e5m2>{}); break;
        case BF16: convert(Tag<bf16>{}); break;
        default: die("matmul: no conversion from %s", dtype_names[x->dtype]);
    }
}

// y (batch, cols, rows) = xᵀ of x (batch, rows, cols), one byte an element, any size. A block of 256 threads takes a tile of 64 × 64
// through shared memory in two phases with a barrier between; each thread moves 16 bytes a phase, at once where the address allows.
struct TransposeBytes {
    static constexpr int TILE = 64, THREADS = 256;
    static constexpr int PITCH = 17;  // words between the tile's rows: an odd number spreads a column over the banks
    struct alignas(16) Chunk { uint32_t w[4]; };

    uint8_t* y;
    const uint8_t* x;
    int64_t y_ld, x_ld, y_batch_stride, x_batch_stride;
    int rows, cols;

    DEVICE int tiles_down() const { return ceil_div(rows, TILE); }
    DEVICE int tiles_across() const { return ceil_div(cols, TILE); }

    DEVICE void load_tile(uint32_t* tile, int thread, int tile_row, int tile_col, int batch) const {
        int r = thread / 4, c = thread % 4 * 16, row = tile_row * TILE + r, col = tile_col * TILE + c;
        const uint8_t* p = x + batch * x_batch_stride + row * x_ld + col;
        Chunk v = {};
        if (row >= rows || col >= cols) {
            // zeros, which nobody wants: but shared memory that is read shall have been written
        } else if (col + 16 <= cols && (size_t)p % 16 == 0) {
            memcpy(&v, __builtin_assume_aligned(p, 16), 16);
        } else {
            UNROLL
            for (int j = 0; j < 16; j++) { v.w[j / 4] |= col + j < cols ? (uint32_t)p[j] << (j % 4 * 8) : 0u; }
        }
        UNROLL
        for (int j = 0; j < 4; j++) { tile[r * PITCH + c / 4 + j] = v.w[j]; }
    }
    DEVICE void store_tile(const uint32_t* tile, int thread, int tile_row, int tile_col, int batch) const {
        int r = thread / 4, c = thread % 4 * 16, row = tile_col * TILE + r, col = tile_row * TILE + c;  // of y
        if (row >= cols || col >= rows) { return; }
        const uint8_t* bytes = (const uint8_t*)tile;
        Chunk v = {};
        UNROLL
        for (int j = 0; j < 16; j++) { v.w[j / 4] |= (uint32_t)bytes[(c + j) * PITCH * 4 + r] << (j % 4 * 8); }
        uint8_t* p = y + batch * y_batch_stride + row * y_ld + col;
        if (col + 16 <= rows && (size_t)p % 16 == 0) {
            memcpy(__builtin_assume_aligned(p, 16), &v, 16);
        } else {
            UNROLL
            for (int j = 0; j < 16; j++) {
                if (col + j < rows) { p[j] = (uint8_t)(v.w[j / 4] >> (j % 4 * 8)); }
            }
        }
    }
};

#ifdef GPU_FORM
// grid (tiles, 1, batch)
__global__ void __launch_bounds__(TransposeBytes::THREADS) transpose_bytes_kernel(TransposeBytes t) {
    __shared__ uint32_t tile[TransposeBytes::TILE * TransposeBytes::PITCH];
    int tile_row = (int)blockIdx.x / t.tiles_across(), tile_col = (int)blockIdx.x % t.tiles_across();
    t.load_tile(tile, (int)threadIdx.x, tile_row, tile_col, (int)blockIdx.z);
    __syncthreads();
    t.store_tile(tile, (int)threadIdx.x, tile_row, tile_col, (int)blockIdx.z);
}
#endif

// ---- the backends: each defines MatmulBackend, MatmulKernel and the functions below ----

static inline void backend_create(Matmul* mm);
static inline void backend_destroy(Matmul* mm);
static inline void kernel_create(Matmul* mm, MatmulEntry* entry, const MatmulCall* c);  // sets entry->kernel and entry->workspace
static inline void kernel_destroy(MatmulKernel* kernel);
static inline const char* kernel_name(const MatmulKernel* kernel);
static inline void kernel_run(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, Stream stream);
// For timing, points of a call: it begins, the library's part of it begins and ends (within kernel_run), it ends.
enum MatmulMark { CALL_BEGINS, LIBRARY_BEGINS, LIBRARY_ENDS, CALL_ENDS, MATMUL_MARKS };
static inline void backend_mark(Matmul* mm, MatmulMark mark, Stream stream);
static inline double backend_seconds(Matmul* mm, MatmulMark from, MatmulMark to);  // waits for the second
// The library's algorithms for a shape, its first choice first. None: there is nothing to choose.
static inline std::string backend_device(void);
static inline int kernel_algorithms(const MatmulKernel* kernel);
static inline MatmulAlgorithm kernel_algorithm(const MatmulKernel* kernel, int number);  // -1: the one that is taken
static inline bool kernel_take(Matmul* mm, MatmulEntry* entry, const MatmulAlgorithm* algorithm);  // false: the library refuses it for this shape
// Seconds of one call within the library with that algorithm: of `calls` calls back to back, which it waits for; infinite: it failed
static inline double kernel_time(Matmul* mm, MatmulEntry* entry, const MatmulCall* c, int number, int calls, Stream stream);

#ifdef USE_CUDA
#include "matmul_cublaslt.cuh"
#else
#include "matmul_onednn.h"
static inline std::string backend_device(void) {
    const dnnl_version_t* v = dnnl_version();
    return choice_device("oneDNN", (uint64_t)(v->major * 10000 + v->minor * 100 + v->patch));
}
// It has one algorithm a shape
static inline int kernel_algorithms(const MatmulKernel*) { return 0; }
static inline MatmulAlgorithm kernel_algorithm(const MatmulKernel*, int) { return MatmulAlgorithm{}; }
static inline bool kernel_take(Matmul*, MatmulEntry*, const MatmulAlgorithm*) { return false; }
static inline double kernel_time(Matmul*, MatmulEntry*, const MatmulCall*, int, int, Stream) { return INFINITY; }
#endif

// ---- the public functions ----

static inline void matmul_create(Matmul* mm) {
    *mm = Matmul{};
    mm->shapes = new std::unordered_map<MatmulShape, MatmulEntry*, MatmulShapeHash, MatmulShapeEqual>();
    mm->order = new std::vector<MatmulEntry*>();
    mm->choices = new MatmulChoices();
    backend_create(mm);
    mm->device = new std::string(backend_device());
}

// For planning on a GPU that is not there; nothing of a library or device is touched.
static inline void matmul_imagine(Matmul* mm, int capability) {
    *mm = Matmul{};
    mm->imagined = true;
    mm->capability = capability;
}

static inline void matmul_destroy(Matmul* mm) {
    if (mm->imagined) { *mm = Matmul{}; return; }
    for (MatmulEntry* entry : *mm->order) {
        kernel_destroy(entry->kernel);
        delete entry;
    }
    delete mm->order;
    delete mm->shapes;
    delete mm->choices;
    delete mm->device;
    backend_destroy(mm);
    *mm = Matmul{};
}

// The shape takes the algorithm that was chosen for it. Whether it has one, and the library takes it
static inline bool take_choice(Matmul* mm, MatmulEntry* entry) {
    MatmulAlgorithm algorithm;
    auto found = mm->choices->find(choice_key(*mm->device, &entry->shape));
    return found != mm->choices->end() && choice_unhex(&algorithm, found->second) && kernel_take(mm, entry, &algorithm);
}

// `pointers`: they are set and count
static inline MatmulEntry* matmul_entry(Matmul* mm, const MatmulCall* c, bool pointers) {
    MatmulShape s;
    memset(&s, 0, sizeof(s));
    s.a_ld = c->a.ld; s.b_ld = c->b.ld; s.d_ld = c->d_ld;
    s.a_stride = c->a.batch_stride; s.b_stride = c->b.batch_stride; s.d_stride = c->d_batch_stride;
    s.m = c->m; s.n = c->n; s.k = c->k; s.batch = c->batch;
    s.a_dtype = (uint8_t)c->a.dtype; s.b_dtype = (uint8_t)c->b.dtype; s.d_dtype = (uint8_t)c->d_dtype;
    s.bias = c->bias != NULL;
    s.bias_dtype = (uint8_t)(s.bias ? c->bias_dtype : FP32);
    s.a_transposed = c->a.transposed; s.b_transposed = c->b.transposed;
    s.a_scaling = (uint8_t)c->a.scaling; s.b_scaling = (uint8_t)c->b.scaling;
    s.accumulate = c->accumulate;
    if (device_is_gpu) {
        s.fast_accumulate = c->fast_accumulate;
        GpuPlan plan = matmul_gpu_plan(c, mm->capability);
        s.unaligned = !gpu_strides_aligned(c, &plan) || (pointers && !gpu_pointers_aligned(c, &plan));
    } else {
#ifdef _OPENMP
        s.threads = omp_get_max_threads();
#endif
    }
    auto found = mm->shapes->find(s);
    if (found != mm->shapes->end()) { return found->second; }
    const char* objection = matmul_objection(c);
    if (objection == NULL && device_is_gpu) { objection = matmul_gpu_objection(c, mm->capability); }
    if (objection != NULL) { matmul_refuse(c, objection); }
    MatmulEntry* entry = new MatmulEntry();
    entry->shape = s;
    if (c->m > 0 && c->n > 0 && c->k > 0) {
        kernel_create(mm, entry, c);
        take_choice(mm, entry);
    }
    mm->shapes->emplace(s, entry);
    mm->order->push_back(entry);
    return entry;
}

// Bytes of workspace that this call needs on this build's device, or on the imagined one. No pointer is read but whether bias is NULL. Matmul keeps the maximum in
// `planned`.
static inline size_t matmul_plan(Matmul* mm, const MatmulCall* c) {
    size_t bytes;
    if (mm->imagined) {
        const char* objection = matmul_objection(c);
        if (objection == NULL) { objection = matmul_gpu_objection(c, mm->capability); }
        if (objection != NULL) { matmul_refuse(c, objection); }
        bytes = matmul_gpu_workspace(c, mm->capability);
    } else {
        bytes = matmul_entry(mm, c, false)->workspace;
    }
    mm->planned = max_of(mm->planned, bytes);
    return bytes;
}

// 256-byte aligned; used by all calls, so all calls go to one stream (or to streams that wait for each other)
static inline void matmul_set_workspace(Matmul* mm, void* p, size_t bytes) {
    if ((size_t)p % MATMUL_ALIGNMENT != 0) { die("matmul: the workspace at %p is not aligned to %zu bytes", p, MATMUL_ALIGNMENT); }
    mm->workspace = p;
    mm->workspace_bytes = p != NULL ? bytes : 0;
}

static inline void matmul(Matmul* mm, const MatmulCall* c, Stream stream) {
    if (mm->imagined) { matmul_refuse(c, "the GPU is not there, its calls can only be planned"); }
    MatmulEntry* entry = matmul_entry(mm, c, true);
    if (c->m == 0 || c->n == 0) { return; }
    if (c->d == NULL || (c->k > 0 && (c->a.data == NULL || c->b.data == NULL))) { matmul_refuse(c, "a matrix is NULL"); }
    if (!is_fp8(c->a.dtype) && c->a.descale != NULL) { matmul_refuse(c, "only FP8 operands have a descale, A is not one"); }
    if (!is_fp8(c->b.dtype) && c->b.descale != NULL) { matmul_refuse(c, "only FP8 operands have a descale, B is not one"); }
    if (c->a.scaling != SCALE_TENSOR && (c->a.descale == NULL || c->b.descale == NULL)) { matmul_refuse(c, "the descales of blocks are NULL"); }
    if (entry->workspace > mm->workspace_bytes) {
        char why[128];
        snprintf(why, sizeof(why), "needs %zu bytes of workspace and was planned %zu", entry->workspace, mm->workspace_bytes);
        matmul_refuse(c, why);
    }
    if (mm->timing) { backend_mark(mm, CALL_BEGINS, stream); }
    if (c->k == 0) {
        if (!c->accumulate || c->bias != NULL) { finish_matmul(c, NULL, stream); }
    } else {
        kernel_run(mm, entry, c, stream);
    }
    double flops = 2.0 * c->m * c->n * c->k * c->batch;
    entry->statistics.calls++;
    if (mm->timing) {
        backend_mark(mm, CALL_ENDS, stream);
        entry->statistics.seconds += backend_seconds(mm, CALL_BEGINS, CALL_ENDS);
        if (c->k > 0) { entry->statistics.library_seconds += backend_seconds(mm, LIBRARY_BEGINS, LIBRARY_ENDS); }
        entry->statistics.flops += flops;
        entry->statistics.timed_calls++;
    }
}

// ---- what the library does by itself ----

template <class T> struct FillRandom {  // uniform in [-1, 1); a row is 4096 elements
    static constexpr size_t ROW = 4096;
    T* y;
    size_t elements;
    RandomKey key;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        size_t first = (size_t)row * ROW;
        T* yr = y + first;
        RandomKey k = key;
        team.each((int)min_of(ROW, elements - first), [=](auto c) {
            auto element = [=](int i) { return 0x1p-31f * (float)(int32_t)random_bits(k, first + c.i + (size_t)i); };
            store(yr, c, decltype(load(yr, c))::map(element));
        });
    }
};

template <class T> static inline void fill_random(void* y, size_t elements, uint64_t number, Stream stream) {
    run_rows(FillRandom<T>{(T*)y, elements, random_key(1, 0, number)}, (int)ceil_div(elements, FillRandom<T>::ROW), stream);
}

// Elements from the first to the last of (batch, rows, cols)
static inline size_t extent_of(int batch, int64_t batch_stride, int64_t rows, int64_t ld, int64_t cols) {
    return (size_t)((batch - 1) * batch_stride + (rows - 1) * ld + cols);
}

// The bare multiplication of a shape: operands of BF16 (FP32 for FP32), so that neither we nor the library convert; no bias, no sum.
static inline MatmulCall matmul_bare_call(const MatmulShape* s, void* d, const void* a, const void* b) {
    MatmulCall c = {};
    DType type = s->a_dtype == FP32 ? FP32 : BF16;
    c.d = d; c.d_dtype = (DType)s->d_dtype; c.d_ld = s->d_ld; c.d_batch_stride = s->d_stride;
    c.a = Operand{a, type, NULL, s->a_ld, s->a_stride, s->a_transposed};
    c.b = Operand{b, type, NULL, s->b_ld, s->b_stride, s->b_transposed};
    c.m = s->m; c.n = s->n; c.k = s->k; c.batch = s->batch;
    return c;
}

// Times the bare multiplication of every shape that was called while `timing` was on, in isolation: back to back on buffers of its own with
// random values, the best of three runs of 30 ms (or of as long as the shape took in all its calls, where that is less). Fills
// statistics.alone_seconds with that times the calls. Shapes of less than a thousandth of all the time are not worth it: theirs is the
// time they took.
static inline void matmul_time_alone(Matmul* mm, Stream stream) {
    Matmul alone;  // of its own, so that neither the workspace nor the statistics of `mm` change
    matmul_create(&alone);
    double all = 0.0;
    for (const MatmulEntry* e : *mm->order) { all += e->statistics.library_seconds; }
    std::vector<MatmulEntry*> measured;
    size_t a_bytes = 0, b_bytes = 0, d_bytes = 0;
    for (MatmulEntry* e : *mm->order) {
        const MatmulShape* s = &e->shape;
        e->statistics.alone_seconds = e->statistics.library_seconds;
        if (e->statistics.library_seconds == 0.0 || e->statistics.library_seconds < 1e-3 * all) { continue; }
        MatmulCall c = matmul_bare_call(s, NULL, NULL, NULL);
        matmul_plan(&alone, &c);
        int a_rows = s->a_transposed ? s->k : s->m, b_rows = s->b_transposed ? s->n : s->k;
        int a_cols = s->a_transposed ? s->m : s->k, b_cols = s->b_transposed ? s->k : s->n;
        a_bytes = max_of(a_bytes, extent_of(s->batch, s->a_stride, a_rows, s->a_ld, a_cols) * dtype_bytes(c.a.dtype));
        b_bytes = max_of(b_bytes, extent_of(s->batch, s->b_stride, b_rows, s->b_ld, b_cols) * dtype_bytes(c.b.dtype));
        d_bytes = max_of(d_bytes, extent_of(s->batch, s->d_stride, s->m, s->d_ld, s->n) * dtype_bytes(c.d_dtype));
        measured.push_back(e);
    }
    void* workspace = device_alloc(alone.planned);
    matmul_set_workspace(&alone, workspace, alone.planned);
    void *a = device_alloc(a_bytes), *b = device_alloc(b_bytes), *d = device_alloc(d_bytes);
    // two BF16 numbers of [-1, 1) are an FP32 number of [-1, 1) as well
    fill_random<bf16>(a, a_bytes / 2, 0, stream);
    fill_random<bf16>(b, b_bytes / 2, 1, stream);
    device_zero(d, d_bytes, stream);
    auto statistics_of = [&](const MatmulCall* c) { return &matmul_entry(&alone, c, true)->statistics; };
    for (int run = 0; run < 3; run++) {  // all shapes, and then all again: what slows the machine for a moment slows no shape three times
        for (const MatmulEntry* e : measured) {
            MatmulCall c = matmul_bare_call(&e->shape, d, a, b);
            MatmulStatistics* x = statistics_of(&c);  // one for all that differ in bias, sum or FP8 format only
            alone.timing = false;
            matmul(&alone, &c, stream);  // warms up
            alone.timing = true;
            double enough = min_of(0.03, e->statistics.library_seconds), before = x->library_seconds;
            int64_t calls = 0;
            for (; x->library_seconds - before < enough; calls++) { matmul(&alone, &c, stream); }
            double one = (x->library_seconds - before) / (double)calls;
            x->alone_seconds = x->alone_seconds == 0.0 ? one : min_of(x->alone_seconds, one);
        }
    }
    for (MatmulEntry* e : measured) {
        MatmulCall c = matmul_bare_call(&e->shape, d, a, b);
        e->statistics.alone_seconds = statistics_of(&c)->alone_seconds * (double)e->statistics.timed_calls;
    }
    stream_sync(stream);
    device_free(a);
    device_free(b);
    device_free(d);
    device_free(workspace);
    matmul_destroy(&alone);
}

// ---- the choice of algorithms ----

// A call of this shape
static inline MatmulCall matmul_shape_call(const MatmulShape* s, void* d, const void* a, const void* b, const void* bias, const float* descale) {
    MatmulCall c = {};
    c.d = d; c.d_dtype = (DType)s->d_dtype; c.d_ld = s->d_ld; c.d_batch_stride = s->d_stride;
    c.a = Operand{a, (DType)s->a_dtype, is_fp8((DType)s->a_dtype) ? descale : NULL, s->a_ld, s->a_stride, s->a_transposed, (OperandScale)s->a_scaling};
    c.b = Operand{b, (DType)s->b_dtype, is_fp8((DType)s->b_dtype) ? descale : NULL, s->b_ld, s->b_stride, s->b_transposed, (OperandScale)s->b_scaling};
    c.bias = s->bias ? bias : NULL;
    c.bias_dtype = (DType)s->bias_dtype;
    c.m = s->m; c.n = s->n; c.k = s->k; c.batch = s->batch;
    c.accumulate = s->accumulate;
    c.fast_accumulate = s->fast_accumulate;
    return c;
}

static inline double shape_flops(const MatmulShape* s) { return 2.0 * s->m * s->n * s->k * s->batch; }

// Bytes from the first element of an operand to its last
static inline size_t a_bytes_of(const MatmulShape* s) {
    return extent_of(s->batch, s->a_stride, s->a_transposed ? s->k : s->m, s->a_ld, s->a_transposed ? s->m : s->k) * dtype_bytes((DType)s->a_dtype);
}
static inline size_t b_bytes_of(const MatmulShape* s) {
    return extent_of(s->batch, s->b_stride, s->b_transposed ? s->n : s->k, s->b_ld, s->b_transposed ? s->k : s->n) * dtype_bytes((DType)s->b_dtype);
}
static inline size_t d_bytes_of(const MatmulShape* s) {
    return extent_of(s->batch, s->d_stride, s->m, s->d_ld, s->n) * dtype_bytes((DType)s->d_dtype);
}

static inline void fill_operand(void* x, size_t bytes, DType t, uint64_t number, Stream stream) {
    switch (t) {
        case E4M3: fill_random<e4m3>(x, bytes, number, stream); break;
        case E5M2: fill_random<e5m2>(x, bytes, number, stream); break;
        case BF16: fill_random<bf16>(x, bytes / 2, number, stream); break;
        default: fill_random<float>(x, bytes / 4, number, stream);
    }
}

// Times of the planned shapes that have no choice yet the library's algorithms, and chooses. A shape of less than a thousandth of the largest's
// operations, and what is not done after `seconds`, largest shapes first, take the library's first; that counts as chosen too, so that it
// stays. With operands, results and workspace of its own, so before the run's memory is taken. Returns how many shapes were timed.
static inline int matmul_choose(Matmul* mm, double seconds, Stream stream) {
    constexpr int ROUNDS = 5;
    std::vector<MatmulEntry*> open, timed;
    double most = 0.0, start = wall_seconds();
    for (MatmulEntry* e : *mm->order) {
        if (e->kernel == NULL || kernel_algorithms(e->kernel) == 0) { continue; }
        if (mm->choices->count(choice_key(*mm->device, &e->shape)) > 0) { continue; }
        most = max_of(most, shape_flops(&e->shape));
        open.push_back(e);
    }
    auto larger = [](const MatmulEntry* a, const MatmulEntry* b) { return shape_flops(&a->shape) > shape_flops(&b->shape); };
    std::stable_sort(open.begin(), open.end(), larger);
    size_t workspace_bytes = 0, a_bytes = 0, b_bytes = 0, d_bytes = 0, bias_bytes = 0, scales = 4;
    for (MatmulEntry* e : open) {
        if (shape_flops(&e->shape) < 1e-3 * most || kernel_algorithms(e->kernel) < 2) { continue; }
        workspace_bytes = max_of(workspace_bytes, e->workspace);
        a_bytes = max_of(a_bytes, a_bytes_of(&e->shape));
        b_bytes = max_of(b_bytes, b_bytes_of(&e->shape));
        d_bytes = max_of(d_bytes, d_bytes_of(&e->shape));
        bias_bytes = max_of(bias_bytes, (size_t)e->shape.n * 4);
        scales = max_of(scales, operand_scales((OperandScale)e->shape.a_scaling, e->shape.m, e->shape.k));
        scales = max_of(scales, operand_scales((OperandScale)e->shape.b_scaling, e->shape.n, e->shape.k));
        timed.push_back(e);
    }
    int done = 0;
    if (!timed.empty()) {
        void *a = device_alloc(a_bytes), *b = device_alloc(b_bytes), *d = device_alloc(d_bytes), *bias = device_alloc(bias_bytes);
        float* descale = (float*)device_alloc(scales * sizeof(float));
        void *workspace = device_alloc(workspace_bytes), *kept = mm->workspace;
        size_t kept_bytes = mm->workspace_bytes;
        matmul_set_workspace(mm, workspace, workspace_bytes);
        std::vector<float> ones(scales, 1.0f);
        copy_to_device(descale, ones.data(), scales * sizeof(float), stream);
        device_zero(bias, bias_bytes, stream);
        device_zero(d, d_bytes, stream);
        for (MatmulEntry* e : timed) {
            if (wall_seconds() - start > seconds) { break; }
            MatmulCall c = matmul_shape_call(&e->shape, d, a, b, bias, descale);
            fill_operand(a, a_bytes_of(&e->shape), c.a.dtype, 0, stream);
            fill_operand(b, b_bytes_of(&e->shape), c.b.dtype, 1, stream);
            int count = kernel_algorithms(e->kernel), best;
            std::vector<double> fastest((size_t)count);
            std::vector<int> calls((size_t)count);
            for (int i = 0; i < count; i++) {
                kernel_time(mm, e, &c, i, 1, stream);  // warms up
                fastest[(size_t)i] = kernel_time(mm, e, &c, i, 1, stream);
                calls[(size_t)i] = (int)max_of(min_of(2e-4 / fastest[(size_t)i], 20.0), 1.0);  // short, but long beside what events add
            }
            for (int round = 0; round < ROUNDS; round++) {  // all, and then all again: what slows the GPU for a moment slows none five times
                for (int i = 0; i < count; i++) {
                    if (!isfinite(fastest[(size_t)i])) { continue; }
                    double one_call = kernel_time(mm, e, &c, i, calls[(size_t)i], stream);
                    fastest[(size_t)i] = round == 0 ? one_call : min_of(fastest[(size_t)i], one_call);
                }
            }
            best = choose_fastest(fastest.data(), count);
            MatmulAlgorithm algorithm = kernel_algorithm(e->kernel, best);
            kernel_take(mm, e, &algorithm);
            done++;
        }
        stream_sync(stream);
        matmul_set_workspace(mm, kept, kept_bytes);
        for (void* p : {a, b, d, bias, workspace, (void*)descale}) { device_free(p); }
    }
    for (MatmulEntry* e : open) {
        MatmulAlgorithm algorithm = kernel_algorithm(e->kernel, -1);
        mm->choices->emplace(choice_key(*mm->device, &e->shape), choice_hex(&algorithm));
    }
    return done;
}

// The choices as lines of text: of the shapes that were planned or called here
static inline void matmul_choices_write(const Matmul* mm, std::string* text) {
    MatmulChoices here;
    for (const MatmulEntry* e : *mm->order) {
        if (e->kernel == NULL || kernel_algorithms(e->kernel) == 0) { continue; }
        MatmulAlgorithm algorithm = kernel_algorithm(e->kernel, -1);
        here.emplace(choice_key(*mm->device, &e->shape), choice_hex(&algorithm));
    }
    *text = choices_text(here);
}

// Shapes take the choices in `text`, those that are planned later too; choices that were made before go. A line that names this device and
// shape but that the library refuses goes as well. Returns how many lines are damaged.
static inline int matmul_choices_read(Matmul* mm, const char* text) {
    mm->choices->clear();
    int damaged = choices_parse(mm->choices, text);
    for (MatmulEntry* e : *mm->order) {
        if (e->kernel == NULL || kernel_algorithms(e->kernel) == 0 || take_choice(mm, e)) { continue; }
        MatmulAlgorithm first = kernel_algorithm(e->kernel, 0);
        kernel_take(mm, e, &first);
        mm->choices->erase(choice_key(*mm->device, &e->shape));
    }
    return damaged;
}

// Shapes with a choice to make, and those whose choice is not the library's first
static inline void matmul_choices_count(const Matmul* mm, int* shapes, int* others) {
    *shapes = *others = 0;
    for (const MatmulEntry* e : *mm->order) {
        if (e->kernel == NULL || kernel_algorithms(e->kernel) == 0) { continue; }
        MatmulAlgorithm first = kernel_algorithm(e->kernel, 0), taken = kernel_algorithm(e->kernel, -1);
        *shapes += 1;
        *others += memcmp(&first, &taken, sizeof(first)) != 0;
    }
}

// ---- the report ----

static inline void matmul_report_speed(FILE* f, double flops, double seconds) {
    if (seconds > 0.0) { fprintf(f, " %9.1f", 1e-9 * flops / seconds); }
    else { fprintf(f, " %9s", "-"); }
}

// One line a shape: what was multiplied, how often, and of the calls made while `timing` was on ms in all, ms within the library, GFLOP/s
// there, and GFLOP/s of the library alone (after matmul_time_alone). Then the sums, for each of the `steps` that were timed.
static inline void matmul_report(const Matmul* mm, FILE* f, int steps) {
    MatmulStatistics all = {};
    fprintf(f, "%-22s %6s %6s  %-3s  %-14s %-6s %8s %10s %10s %9s %9s  %s\n", "m, n, k", "batch", "bias", "A B", "A x B", "D", "calls",
            "ms", "library", "GFLOP/s", "alone", "kernel");
    for (const MatmulEntry* e : *mm->order) {
        const MatmulShape* s = &e->shape;
        const MatmulStatistics* x = &e->statistics;
        if (x->calls == 0) { continue; }
        char size[64], types[32], d[16];
        snprintf(size, sizeof(size), "%d, %d, %d", s->m, s->n, s->k);
        snprintf(types, sizeof(types), "%s x %s", dtype_names[s->a_dtype], dtype_names[s->b_dtype]);
        snprintf(d, sizeof(d), "%s%s", dtype_names[s->d_dtype], s->accumulate ? "+=" : "");
        fprintf(f, "%-22s %6d %6s  %c %c  %-14s %-6s %8" PRId64, size, s->batch, s->bias ? dtype_names[s->bias_dtype] : "-",
                s->a_transposed ? 'T' : 'N', s->b_transposed ? 'T' : 'N', types, d, x->calls);
        if (x->timed_calls > 0) { fprintf(f, " %10.3f %10.3f", 1e3 * x->seconds, 1e3 * x->library_seconds); }
        else { fprintf(f, " %10s %10s", "-", "-"); }
        matmul_report_speed(f, x->flops, x->library_seconds);
        matmul_report_speed(f, x->flops, x->alone_seconds);
        fprintf(f, "  %s\n", e->kernel != NULL ? kernel_name(e->kernel) : "none");
        all.seconds += x->seconds;
        all.library_seconds += x->library_seconds;
        all.alone_seconds += x->alone_seconds;
    }
    double per_step = 1e3 / max_of(steps, 1);
    if (all.seconds > 0.0) {
        fprintf(f, "matmuls: %.3f ms a step, %.3f ms of it within the library\n", per_step * all.seconds, per_step * all.library_seconds);
    }
    if (all.alone_seconds > 0.0) { fprintf(f, "matmuls alone: %.3f ms a step\n", per_step * all.alone_seconds); }
}
