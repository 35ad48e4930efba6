// fp8_kernels.cuh: the kernels of the forward and backward pass, FP8 in and out.
//
// Every matmul input is made by one of two kernels from a *source*, a small struct that computes one element of it: the LayerNorm's output, GELU,
// GELU's gradient, or a tensor that is there already. `Produce` walks rows; `ProduceWithBias` walks strips of rows and also adds up the columns,
// which is the bias gradient. Both round the value to the activations' type T first (that 16-bit number is what is quantised, whether it is kept or
// not, so a recomputed tensor has the same codes), take its amax where one is asked for, and write it times `scale` as D: FP8, or T itself.
//
// A tensor in FP8 has a slot of 16 bytes on the device, {descale, scale, 0, 0}: cuBLASLt wants the pointer to a dequantising scale 16-byte aligned.
// Under `current` scaling the source is first produced as T with its amax, the slot is set from it, and the codes are made in a second pass. Under
// `delayed` scaling the slot is filled from the site's history and the codes are made at once. A site is one place in the model where a tensor is
// quantised; its amaxes over the micro-batches of a step are collected in one number, exchanged between ranks once a step, and kept for 16 steps.
//
// Under `block` scaling there are no sites. `ProduceBlocks` walks tiles of 128 × 128, within which all is known that scales depend on, and quantises each
// twice in one pass: with scales of 128 channels of a token, for the product that is summed over channels, and with scales of 128 tokens of a channel,
// for the weight gradient, which is summed over tokens.
#pragma once
#include "core/exchange.cuh"  // ranks that share a scale
#include "core/gradient.cuh"     // formats of gradients, slots; Team, load, store, run_rows
#include "core/profile.h"        // ProfileScope
#include "core/tiles.cuh"        // the GPU's form of some kernels
#include <type_traits>

constexpr int AMAX_WINDOW = 16;  // steps of history, as in MS-AMP
constexpr int STRIP = 32;        // rows whose columns one Team adds up
constexpr float LAYERNORM_EPS = 1e-5f;

// A tensor that is an input of a matmul
struct Tensor {
    void* data;     // (rows, C)
    DType dtype;
    float* slot;    // FP8: {descale, scale, 0, 0}; NULL otherwise
    void* turned = NULL;  // (C, turned_ld) FP8 on GPUs whose units want operands along the dimension that is summed over: the same transposed; NULL otherwise
    int64_t turned_ld = 0;  // bytes between its rows; 0: there is none
    // Scaled by block (SCALE_VEC128): data has descales along channels, in `slot` (⌈C/128⌉, rows); `turned` has codes of its own, with descales along tokens,
    // (⌈rows/128⌉, C), and is (rows, C) where turned_ld is 0. Either may be NULL: it is not wanted.
    bool by_block = false;
    float* turned_slot = NULL;
};

// ---- types chosen at run time ----

// f(Tag<T>, Tag<D>) for the activations' type T and an output type D: T itself, or FP8 beside BF16 activations
template <class F> static inline void with_types(DType t, DType d, F f) {
    if (t == FP32 && d == FP32) { f(Tag<float>{}, Tag<float>{}); }
    else if (t == BF16 && d == BF16) { f(Tag<bf16>{}, Tag<bf16>{}); }
    else if (t == BF16 && d == E4M3) { f(Tag<bf16>{}, Tag<e4m3>{}); }
    else if (t == BF16 && d == E5M2) { f(Tag<bf16>{}, Tag<e5m2>{}); }
    else { die("no kernel from %s to %s", dtype_names[t], dtype_names[d]); }
}

// ---- sources ----

template <class T> struct TensorSource {  // x
    const T* x;
    struct Row {
        static constexpr bool STORED = true;  // its elements are those of T at x
        const T* x;
        template <int N> DEVICE Vec<N> operator()(Range<N> c) const { return load(x, c); }
    };
    DEVICE Row row(size_t r, int C) const { return Row{x + r * C}; }
};

DEVICE float gelu_inner(float x) {  // 2 √(2/π) (x + 0.044715 x³)
#ifdef __CUDA_ARCH__
    return fma_of(0.0713548163f, x * x, 1.5957691216f) * x;  // fewer instructions, not quite the CPU's bits
#else
    return 1.5957691216f * (x + 0.044715f * x * x * x);
#endif
}

DEVICE float gelu_of(float x) {
#ifdef __CUDA_ARCH__
    return x * logistic_near(gelu_inner(x));
#else
    return x / (1.0f + exp_of(-gelu_inner(x)));
#endif
}
DEVICE float gelu_slope(float x) {
    float s = logistic_near(gelu_inner(x));
#ifdef __CUDA_ARCH__
    float xs = x * s;
    return fma_of(fma_of(-s, xs, xs), fma_of(0.2140644488f, x * x, 1.5957691216f), s);
#else
    return s + x * s * (1.0f - s) * (1.5957691216f * (1.0f + 0.134145f * x * x));
#endif
}

template <class T> struct GeluSource {    // GELU, tanh form: x·(1 + tanh(u))/2 = x / (1 + e^(-2u))
    const T* x;
    struct Row {
        static constexpr bool STORED = false;
        const T* x;
        template <int N> DEVICE Vec<N> operator()(Range<N> c) const {
            Vec<N> v = load(x, c);
            return Vec<N>::map([&](int k) { return gelu_of(v.v[k]); });
        }
    };
    DEVICE Row row(size_t r, int C) const { return Row{x + r * C}; }
};

template <class T> struct GeluGradSource {  // dy · GELU'(x); with s = 1/(1 + e^(-w)), w = 2u: GELU' = s + x·s·(1-s)·w'
    const T* dy;
    const T* x;
    struct Row {
        static constexpr bool STORED = false;
        const T* dy;
        const T* x;
        template <int N> DEVICE Vec<N> operator()(Range<N> c) const {
            Vec<N> v = load(x, c), d = load(dy, c);
            return Vec<N>::map([&](int k) { return d.v[k] * gelu_slope(v.v[k]); });
        }
    };
    DEVICE Row row(size_t r, int C) const { return Row{dy + r * C, x + r * C}; }
};

template <class T> struct LayerNormSource {  // (x - mean)·rstd·gain + bias
    const T* x;
    const float* mean;   // (rows)
    const float* rstd;   // (rows)
    const T* gain;       // (C)
    const T* bias;       // (C)
    struct Row {
        static constexpr bool STORED = false;
        const T* x;
        const T* gain;
        const T* bias;
        float mean, rstd;
        template <int N> DEVICE Vec<N> operator()(Range<N> c) const { return (load(x, c) - mean) * rstd * load(gain, c) + load(bias, c); }
    };
    DEVICE Row row(size_t r, int C) const { return Row{x + r * C, gain, bias, mean[r], rstd[r]}; }
};

// ---- making matmul inputs ----

template <class Team> DEVICE void record_amax(Team team, uint32_t* amax, uint32_t top) {
    if (amax != NULL && team.leads()) { atomic_max(amax, top); }
}

template <class T, class D, class Team, class Row> DEVICE void produce_row(Team team, D* y, uint32_t* amax, Row source, float scale, int C) {
    uint32_t top = team.amax(C, [=](auto c) {
        auto v = round_to<T>(source(c));
        store(y, c, v * scale);
        return v;
    });
    record_amax(team, amax, top);
}

template <class T, class D, class Source> struct Produce {  // y (rows, C) = D(T(source) · scale)
    D* y;                // NULL: the amax alone
    uint32_t* amax;      // NULL: not recorded
    Source source;
    const float* scale;  // NULL = 1
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        typename Source::Row from = source.row(row, C);
        if (y == NULL) { record_amax(team, amax, team.amax(C, [=](auto c) { return round_to<T>(from(c)); })); }
        else { produce_row<T>(team, y + (size_t)row * C, amax, from, scale != NULL ? *scale : 1.0f, C); }
    }
};

template <class T, class D, class Source> struct ProduceWithBias {  // the same, and partial (strips, C): column sums of T(source) by strip
    D* y;                // NULL: nothing to write, the sums alone
    uint32_t* amax;
    float* partial;
    Source source;
    const float* scale;
    int rows, C;
    template <class Team> DEVICE void operator()(Team team, int strip) const {
        int r0 = strip * STRIP, r1 = min_of(rows, r0 + STRIP), n = C;
        float* out = partial + (size_t)strip * C;
        float k = scale != NULL ? *scale : 1.0f;
        Source from = source;
        D* base = y;
        uint32_t top = base == NULL
            ? team.columns(out, r0, r1, n, [=](int r, auto c) { return round_to<T>(from.row(r, n)(c)); })
            : team.columns(out, r0, r1, n, [=](int r, auto c) {
                  auto v = round_to<T>(from.row(r, n)(c));
                  store(base + (size_t)r * n, c, v * k);
                  return v;
              });
        record_amax(team, amax, top);
    }
};

constexpr int COLUMN_TILE = 256;  // columns that one Team finishes

struct FinishColumns {  // grad (C) = [grad +] Σ over strips of partial (strips, C), in order
    float* grad;
    const float* partial;
    int strips, C;
    bool accumulate;
    template <class Team> DEVICE void operator()(Team full, int tile) const {
        Team team = full.strided(C);
        int first = tile * COLUMN_TILE, n = min_of(C - first, COLUMN_TILE), width = C, count = strips;
        const float* p = partial + first;
        float* g = grad + first;
        bool add = accumulate;
        team.each(n, [=](auto c) {
            auto total = splat(c, 0.0f);
            for (int r = 0; r < count; r++) { total = total + load(p + (size_t)r * width, c); }
            store(g, c, add ? load(g, c) + total : total);
        });
    }
};

static inline int strips_of(int rows) { return ceil_div(rows, STRIP); }
// Of LayerNorm's backward pass; at most, on either device
static inline int most_norm_strips(int rows) { return ceil_div(rows, STRIP / 2); }
static inline int norm_strips_of(int rows, int C) {
#ifdef GPU_FORM
    static_assert(NORM_ROWS == STRIP / 2, "the workspace is sized by it");
    if (row_packs(C) > 0) { return most_norm_strips(rows); }
#endif
    (void)C;
    return strips_of(rows);
}

// grad (C) = [grad +] column sums of the strips
static inline void finish_columns(float* grad, const float* partial, int strips, int C, bool accumulate, Stream s) {
#ifdef GPU_FORM
    launch(finish_columns_kernel, dim3((unsigned)ceil_div(C, 32)), dim3(256), 0, s, grad, partial, strips, C, accumulate);
    return;
#endif
    run_rows(FinishColumns{grad, partial, strips, C, accumulate}, ceil_div(C, COLUMN_TILE), s);
}

// ---- scaling: slots, sites and their history ----

enum FP8Scaling { SCALING_DELAYED, SCALING_CURRENT, SCALING_BLOCK };

struct SetSlot {  // slot = scale from amax; amax 0, inf or NaN keeps the old scale
    float* slot;
    const uint32_t* amax;
    float largest;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        float scale = scale_from_amax(bits_to_float(*amax), largest, 0, slot[1]);
        slot[0] = 1.0f / scale;
        slot[1] = scale;
    }
};

// The scaling state of all sites, on the device
struct Sites {
    int count;
    uint32_t* amax;     // (count) of this step so far: max over micro-batches
    uint32_t* current;  // (1) of the tensor being quantised just in time
    float* history;     // (count, AMAX_WINDOW) of the last steps
    float* slots;       // (count, 4) {descale, scale, 0, 0}: under `delayed`, what the next step uses
    float* largest;     // (count) of each site's format
    void (*seen)(int site, const void* x, int rows, int C) = NULL;  // shows an experiment each tensor (rows, C), BF16, whose scale is made just in time
};

struct UpdateSites {  // after a step: history, then the next scale. A skipped step and a non-finite amax are not recorded.
    Sites sites;
    const int* apply;  // points to 0 where the step was skipped
    int step;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        float* history = sites.history + (size_t)i * AMAX_WINDOW;
        uint32_t seen = sites.amax[i], top = 0;
        if (*apply != 0 && seen < 0x7f800000u) { history[step % AMAX_WINDOW] = bits_to_float(seen); }
        sites.amax[i] = 0;
        for (int k = 0; k < AMAX_WINDOW; k++) { top = max_of(top, float_to_bits(history[k])); }
        float* slot = sites.slots + (size_t)i * 4;
        float scale = scale_from_amax(bits_to_float(top), sites.largest[i], 0, slot[1]);
        slot[0] = 1.0f / scale;
        slot[1] = scale;
    }
};

// How a matmul input is to be made: where its scale comes from and what is recorded
struct Quantisation {
    Sites* sites;
    int site;
    bool just_in_time;  // scale from this very tensor; otherwise from the site's history
    bool record;        // its amax counts for the history (training's forward and backward; never recompute, evaluation, generation)
    bool keep_scale;    // recompute: out.slot already holds the scale of the first time
    RowExchange* sharers;  // with the ranks that hold the rest of the tensor: a just-in-time scale is that of all of it; NULL = there are none
};

// y (rows, C), and `turned` (C, turned_ld), which only GPUs make
template <class T, class D, class Source>
static inline void produce_launch(D* y, uint32_t* amax, float* partial, Source source, const float* scale, int rows, int C, Stream s, void* turned = NULL, int64_t turned_ld = 0) {
#ifdef GPU_FORM
    static_assert(TILE_ROWS == STRIP, "both sum over strips of the same rows");
    launch_tiles(ProduceTile<T, D, Source>{y, (uint8_t*)turned, turned_ld, amax, partial, source, scale, rows, C}, s);
    return;
#endif
    if (turned != NULL || turned_ld != 0) { die("no transposed matmul inputs are made on a CPU"); }
    if (partial != NULL) { run_rows(ProduceWithBias<T, D, Source>{y, amax, partial, source, scale, rows, C}, strips_of(rows), s); }
    else { run_rows(Produce<T, D, Source>{y, amax, source, scale, C}, rows, s); }
}

#ifndef GPU_FORM
template <class T, class D, class Source> struct ProduceBlocks {  // tiles.cuh has the GPU's form, and what the fields are
    D* y;
    D* turned;           // (rows, C)
    float *descales, *turned_descales;
    float* partial;
    Source source;
    int rows, C;
    template <class Team> DEVICE void operator()(Team team, int tile) const {
        int across = ceil_div(C, SCALE_BLOCK), block_row = tile / across, block_column = tile % across;
        int r0 = block_row * SCALE_BLOCK, c0 = block_column * SCALE_BLOCK, height = min_of(rows - r0, SCALE_BLOCK), width = min_of(C - c0, SCALE_BLOCK);
        T values[SCALE_BLOCK * SCALE_BLOCK];
        uint32_t column_tops[SCALE_BLOCK] = {}, row_tops[SCALE_BLOCK];
        float scales[SCALE_BLOCK];
        for (int r = 0; r < height; r++) {
            typename Source::Row from = source.row((size_t)(r0 + r), C);
            T* v = values + r * SCALE_BLOCK;
            uint32_t* tops = column_tops;
            row_tops[r] = team.amax(width, [=](auto c) {
                auto x = round_to<T>(from(Range<1>{(size_t)c0 + c.i}));
                store(v, c, x);
                tops[c.i] = max_of(tops[c.i], magnitude_bits(x));
                return x;
            });
        }
        for (int first = 0; partial != NULL && first < height; first += STRIP) {
            const T* v = values;
            team.columns(partial + (size_t)((r0 + first) / STRIP) * C + c0, first, min_of(first + STRIP, height), width, [=](int r, auto c) { return load(v + r * SCALE_BLOCK, c); });
        }
        float largest = largest_of(DTypeOf<D>::value);
        for (int r = 0; y != NULL && r < height; r++) {
            const T* v = values + r * SCALE_BLOCK;
            D* out = y + (size_t)(r0 + r) * C + c0;
            float scale = block_scale(row_tops[r], largest);
            descales[(size_t)block_column * rows + r0 + r] = 1.0f / scale;
            team.each(width, [=](auto c) { store(out, c, load(v, c) * scale); });
        }
        if (turned == NULL) { return; }
        for (int c = 0; c < width; c++) {
            scales[c] = block_scale(column_tops[c], largest);
            turned_descales[(size_t)block_row * C + c0 + c] = 1.0f / scales[c];
        }
        for (int r = 0; r < height; r++) {
            const T* v = values + r * SCALE_BLOCK;
            const float* k = scales;
            D* out = turned + (size_t)(r0 + r) * C + c0;
            team.each(width, [=](auto c) { store(out, c, load(v, c) * load(k, c)); });
        }
    }
};
#endif

// out (rows, C), scaled by block, what of it is wanted. `partial` as in produce
template <class T, class D, class Source> static inline void produce_blocks(Tensor out, float* partial, Source source, int rows, int C, Stream s) {
#ifdef GPU_FORM
    launch_blocks(ProduceBlocks<T, D, Source>{(D*)out.data, (D*)out.turned, out.turned_ld, out.slot, out.turned_slot, partial, source, rows, C}, s);
#else
    if (out.turned_ld != 0) { die("no transposed matmul inputs are made on a CPU"); }
    run_rows(ProduceBlocks<T, D, Source>{(D*)out.data, (D*)out.turned, out.slot, out.turned_slot, partial, source, rows, C}, ceil_div(rows, SCALE_BLOCK) * ceil_div(C, SCALE_BLOCK), s);
#endif
}

struct MergeAmax {  // a just-in-time amax counts for the history too
    uint32_t* into;
    const uint32_t* from;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (team.leads()) { *into = max_of(*into, *from); }
    }
};

// Sets out's slot from the amax in sites->current, of all sharers, and makes the codes of x (rows, C) with it: the second pass under a just-in-time
// scale.
template <class T, class D>
static inline void quantise_just_in_time(Tensor out, D* y, const T* x, uint32_t* recorded, Quantisation q, int rows, int C, Stream s) {
    if (q.sharers != NULL) { rows_max(q.sharers, q.sites->current, 1, s); }
    run_rows(SetSlot{out.slot, q.sites->current, largest_of(out.dtype)}, 1, s);
    if (recorded != NULL) { run_rows(MergeAmax{recorded, q.sites->current}, 1, s); }
    if (q.sites->seen != NULL) { q.sites->seen(q.site, x, rows, C); }
    produce_launch<T>(y, (uint32_t*)NULL, (float*)NULL, TensorSource<T>{x}, out.slot + 1, rows, C, s, out.turned, out.turned_ld);
}

// out (rows, C) = the source in out.dtype. `partial`: (strips, C), takes the column sums by strip; NULL = not wanted. `raw`: (rows, C) of the
// activations' type, workspace for a just-in-time scale; NULL where the source is a tensor that is there already: then it is read twice, and nothing
// is written where out is no FP8 (out.data is that tensor). `make(Tag<T>)` gives the source.
template <class MakeSource>
static inline void produce(Tensor out, float* partial, MakeSource make, DType act, Quantisation q, void* raw, int rows, int C, Stream s) {
    with_types(act, out.dtype, [&](auto t, auto d) {
        typedef typename decltype(t)::type T;
        typedef typename decltype(d)::type D;
        typedef decltype(make(t)) Source;
        constexpr bool is_tensor = std::is_same<Source, TensorSource<T>>::value;
        Source source = make(t);
        D* y = (D*)out.data;
        if (!is_fp8(out.dtype)) {
            if (!is_tensor || partial != NULL) {
                produce_launch<T>(is_tensor ? (D*)NULL : y, (uint32_t*)NULL, partial, source, (const float*)NULL, rows, C, s);
            }
            return;
        }
        if constexpr (sizeof(D) == 1) {
            if (out.by_block) { produce_blocks<T, D>(out, partial, source, rows, C, s); return; }
        }
        uint32_t* recorded = q.record ? q.sites->amax + q.site : NULL;
        if (q.keep_scale || !q.just_in_time) {
            if (!q.keep_scale) { device_copy(out.slot, q.sites->slots + 4 * q.site, 16, s); }
            produce_launch<T>(y, recorded, partial, source, out.slot + 1, rows, C, s, out.turned, out.turned_ld);
            return;
        }
        device_zero(q.sites->current, sizeof(uint32_t), s);
        produce_launch<T>((T*)(is_tensor ? NULL : raw), q.sites->current, partial, source, (const float*)NULL, rows, C, s);
        const T* x = (const T*)raw;
        if constexpr (is_tensor) { x = source.x; }
        quantise_just_in_time<T>(out, y, x, recorded, q, rows, C, s);
    });
}

// ---- the residual stream ----

// out (C) = x + delta, rounded once
template <class T, class Team> DEVICE void add_row(Team team, T* out, const T* x, const T* delta, int C) {
    team.each(C, [=](auto c) { store(out, c, load(x, c) + load(delta, c)); });
}

template <class T> struct AddRows {  // out (rows, C) = x + delta, as LayerNormForward leaves it in `sum`
    T* out;
    const T* x;
    const T* delta;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        size_t at = (size_t)row * C;
        add_row(team, out + at, x + at, delta + at, C);
    }
};

// ---- LayerNorm ----

template <class T, class D> struct LayerNormForward {
    T* sum;              // (rows, C) = x + delta, where delta is given
    D* y;                // (rows, C); NULL: statistics only
    uint32_t* amax;
    float* mean;         // (rows)
    float* rstd;         // (rows)
    const T* x;
    const T* delta;      // NULL = no addition
    const T* gain;       // (C)
    const T* bias;       // (C)
    const float* scale;  // NULL = 1
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        const T* xr = x + (size_t)row * C;
        if (delta != NULL) {
            T* sr = sum + (size_t)row * C;
            add_row(team, sr, xr, delta + (size_t)row * C, C);
            xr = sr;
            team.sync();
        }
        float m = team.sum(C, [=](auto c) { return load(xr, c); }) / (float)C;
        float var = team.sum(C, [=](auto c) { auto d = load(xr, c) - m; return d * d; }) / (float)C;
        float rs = 1.0f / sqrtf(var + LAYERNORM_EPS);
        if (team.leads()) { mean[row] = m; rstd[row] = rs; }
        typename LayerNormSource<T>::Row source = {xr, gain, bias, m, rs};
        produce_row<T>(team, y + (size_t)row * C, amax, source, scale != NULL ? *scale : 1.0f, C);
    }
};

// A LayerNorm's tensors, of the activations' type
struct LayerNormInputs {
    void* sum;          // (rows, C) out: x + delta
    const void* x;      // (rows, C)
    const void* delta;  // (rows, C) or NULL
    const void* gain;   // (C)
    const void* bias;   // (C)
    float* mean;        // (rows) out
    float* rstd;        // (rows) out
};

// out (rows, C) = LayerNorm(x + delta) in out.dtype
static inline void layernorm_forward(Tensor out, LayerNormInputs in, DType act, Quantisation q, void* raw, int rows, int C, Stream s) {
    ProfileScope scope("layernorm forward");
    with_types(act, out.dtype, [&](auto t, auto d) {
        typedef typename decltype(t)::type T;
        typedef typename decltype(d)::type D;
        bool quantised = is_fp8(out.dtype), jit = quantised && q.just_in_time;
        uint32_t* recorded = quantised && q.record && !out.by_block ? q.sites->amax + q.site : NULL;
        auto launch_as = [&](auto* y, uint32_t* amax, const float* scale) {
            typedef typename std::remove_pointer<decltype(y)>::type Y;
            LayerNormForward<T, Y> op = {(T*)in.sum, y, amax, in.mean, in.rstd, (const T*)in.x, (const T*)in.delta, (const T*)in.gain, (const T*)in.bias, scale, C};
#ifdef GPU_FORM
            int packs = row_packs(C);
            if (packs > 0 && rows > 0) {
                with_row_packs(packs, [&](auto n) {
                    launch(layernorm_forward_kernel<decltype(n)::value, T, Y, LayerNormForward<T, Y>>, dim3((unsigned)rows), dim3((unsigned)row_threads(C, packs)), 0, s, op, LAYERNORM_EPS);
                });
                return;
            }
#endif
            run_rows(op, rows, s);
        };
        if (out.by_block) {
            launch_as((T*)raw, (uint32_t*)NULL, (const float*)NULL);
            if constexpr (sizeof(D) == 1) { produce_blocks<T, D>(out, NULL, TensorSource<T>{(const T*)raw}, rows, C, s); }
        } else if (jit) {
            device_zero(q.sites->current, sizeof(uint32_t), s);
            launch_as((T*)raw, q.sites->current, (const float*)NULL);
            quantise_just_in_time<T>(out, (D*)out.data, (const T*)raw, recorded, q, rows, C, s);
        } else {
            if (quantised) { device_copy(out.slot, q.sites->slots + 4 * q.site, 16, s); }
            launch_as((D*)out.data, recorded, quantised ? out.slot + 1 : (const float*)NULL);
        }
    });
}

template <class T> struct LayerNormBackward {  // dx (rows, C) [+]= …; partial sums of dgain and dbias by strip
    T* dx;
    float* dgain;        // (strips, C)
    float* dbias;        // (strips, C)
    const T* dy;
    const T* x;
    const float* mean;
    const float* rstd;
    const T* gain;
    int rows, C;
    bool accumulate;     // dx is the residual stream's gradient: it is added to, except where the stream ends
    template <class Team> DEVICE void operator()(Team team, int strip) const {
        int r0 = strip * STRIP, r1 = min_of(rows, r0 + STRIP), n = C;
        const T* g = gain;
        bool add = accumulate;
        for (int r = r0; r < r1; r++) {
            const T* dyr = dy + (size_t)r * n;
            const T* xr = x + (size_t)r * n;
            T* dxr = dx + (size_t)r * n;
            float m = mean[r], rs = rstd[r];
            auto sums = team.sum_pair(n, [=](auto c) {
                auto dn = load(dyr, c) * load(g, c);
                return pair_of(dn, dn * ((load(xr, c) - m) * rs));
            });
            float a = sums.a.v[0] / (float)n, b = sums.b.v[0] / (float)n;
            team.each(n, [=](auto c) {
                auto norm = (load(xr, c) - m) * rs;
                auto d = (load(dyr, c) * load(g, c) - a - norm * b) * rs;
                store(dxr, c, add ? load(dxr, c) + d : d);
            });
        }
        const T* dyb = dy;
        const T* xb = x;
        const float* mb = mean;
        const float* rb = rstd;
        team.columns_pair(dgain + (size_t)strip * n, dbias + (size_t)strip * n, r0, r1, n, [=](int r, auto c) {
            auto d = load(dyb + (size_t)r * n, c);
            return pair_of(d * ((load(xb + (size_t)r * n, c) - mb[r]) * rb[r]), d);
        });
    }
};

// dx (rows, C) [+]= the LayerNorm's input gradient; dgain, dbias (C) [+]=. `partial`: (2, most_norm_strips, C) floats of workspace.
static inline void layernorm_backward(void* dx, float* dgain, float* dbias, float* partial, const void* dy, LayerNormInputs in, DType act,
                                      bool accumulate_dx, bool accumulate_grads, int rows, int C, Stream s) {
    ProfileScope scope("layernorm backward");
    int strips = norm_strips_of(rows, C);
    float* second = partial + (size_t)strips * C;
    with_type(act, [&](auto t) {
        typedef typename decltype(t)::type T;
        LayerNormBackward<T> op = {(T*)dx, partial, second, (const T*)dy, (const T*)in.x, in.mean, in.rstd, (const T*)in.gain, rows, C, accumulate_dx};
#ifdef GPU_FORM
        int packs = row_packs(C);
        if (packs > 0 && rows > 0) {
            with_row_packs(packs, [&](auto n) {
                constexpr int PACKS = decltype(n)::value, AT_ONCE = PACKS == 1 ? 4 : PACKS == 2 ? 2 : 1;
                launch(layernorm_backward_kernel<PACKS, AT_ONCE, T, LayerNormBackward<T>>, dim3((unsigned)strips), dim3((unsigned)row_threads(C, packs)), 0, s, op);
            });
            return;
        }
#endif
        run_rows(op, strips, s);
    });
    finish_columns(dgain, partial, strips, C, accumulate_grads, s);
    finish_columns(dbias, second, strips, C, accumulate_grads, s);
}

// ---- embedding ----

// The vocabulary is cut over the ranks of a layer: each holds the tokens first … first+count-1, rows of the embedding and columns of the logits.

// The number of a token among a rank's own, -1 where another rank has it
DEVICE int own_token(int token, int first, int count) { return token >= first && token - first < count ? token - first : -1; }

template <class T> struct EmbeddingForward {  // x (rows, C) = wte[token] [+ wpe[position]]; -0, which changes no sum, where another rank has the token
    T* x;
    const int* tokens;   // (rows)
    const T* wte;        // (count, C)
    const T* wpe;        // (maxT, C) or NULL
    int first, count;    // this rank's tokens
    int T_, C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        T* xr = x + (size_t)row * C;
        int token = own_token(tokens[row], first, count);
        if (token < 0) {
            team.each(C, [=](auto c) { store(xr, c, splat(c, -0.0f)); });
            return;
        }
        const T* e = wte + (size_t)token * C;
        if (wpe == NULL) {
            team.each(C, [=](auto c) { store_raw(xr, c, load_raw(e, c)); });
        } else {
            const T* p = wpe + (size_t)(row % T_) * C;
            team.each(C, [=](auto c) { store(xr, c, load(e, c) + load(p, c)); });
        }
    }
};

// The rows of a micro-batch sorted by token, so that each token's gradient is one Team's sum in a fixed order: no atomics, the same bytes every run.
struct TokenGroups {
    int* order;   // (rows) positions, grouped by token, ascending within a group
    int* first;   // (groups + 1) where each group starts in `order`
    int* token;   // (groups)
    int groups;
    int* count;   // (1) how many there are, where kernels are launched for as many as there may be; else NULL
};

template <class T, class A, Rounding R> struct EmbeddingBackward {  // dwte[token] += Σ dx[positions of the token], in FP32, rounded once
    A* dwte;             // (count, C) of this rank's tokens
    const T* dx;         // (rows, C)
    TokenGroups g;       // of this rank's tokens alone
    RandomKey key;       // of this addition
    int first;           // the token of row 0
    int C;
    template <class Team> DEVICE void operator()(Team team, int group) const {
        if (g.count != NULL && group >= *g.count) { return; }
        size_t token = (size_t)g.token[group], element = token * C;  // of the whole table
        A* d = dwte + (token - first) * C;
        const T* x = dx;
        const int* order = g.order;
        int n = C, k0 = g.first[group], k1 = g.first[group + 1];
        RandomKey k = key;
        team.each(n, [=](auto c) {
            auto total = load(d, c);
            int i = k0;
            for (; i + 4 <= k1; i += 4) {  // four loads under way at once, added in the same order
                auto a = load(x + (size_t)order[i] * n, c), b = load(x + (size_t)order[i + 1] * n, c), e = load(x + (size_t)order[i + 2] * n, c);
                total = total + a + b + e + load(x + (size_t)order[i + 3] * n, c);
            }
            for (; i < k1; i++) { total = total + load(x + (size_t)order[i] * n, c); }
            store_rounded<R>(d, c, total, k, element);
        });
    }
};

template <class T, class A, Rounding R> struct PositionBackward {  // dwpe[t] [+]= Σ over sequences of dx[b, t], in FP32, rounded once
    A* dwpe;             // (maxT, C)
    const T* dx;         // (B, T, C)
    RandomKey key;
    int B, T_, C;
    bool accumulate;
    template <class Team> DEVICE void operator()(Team team, int t) const {
        size_t first = (size_t)t * C, stride = (size_t)T_ * C;
        A* d = dwpe + first;
        const T* x = dx + first;
        int n = C, sequences = B;
        bool add = accumulate;
        RandomKey k = key;
        team.each(n, [=](auto c) {
            auto total = add ? load(d, c) : splat(c, 0.0f);
            for (int b = 0; b < sequences; b++) { total = total + load(x + (size_t)b * stride, c); }
            store_rounded<R>(d, c, total, k, first);
        });
    }
};

// ---- cross-entropy ----
//
// In two kernels: what there is to know of a row of logits, and the loss and its gradient. In between, ranks that hold some columns each (the tokens
// first … first+valid-1; their other columns are padding, take no part and get gradient 0) tell each other. A row whose target is negative does not count: its
// loss and its gradient are 0, whatever its logits.

constexpr int LOGIT_STATISTICS = 3;  // of a row: the greatest logit, Σ exp(z - greatest), z[target]

template <int N> DEVICE Vec<N> mask(Vec<N> v, Range<N> c, int valid, float other) {
    return Vec<N>::map([&](int k) { return (int)c.i + k < valid ? v.v[k] : other; });
}

template <class T> struct LogitStatistics {
    float* stats;        // (rows, LOGIT_STATISTICS)
    const T* z;          // (rows, padded) logits
    const int* targets;  // (rows), of all ranks' tokens; negative: none
    int first, valid;    // this rank's tokens; there may be none
    int padded;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        const T* zr = z + (size_t)row * padded;
        int n = valid;
        float top = team.max(padded, [=](auto c) { return mask(load(zr, c), c, n, -FLT_MAX); });
        top = top < -FLT_MAX ? -FLT_MAX : top;  // none of these tokens can come, but one of another rank may
        float total = team.sum(padded, [=](auto c) { return mask(exp_near(load(zr, c) - top), c, n, 0.0f); });
        if (!team.leads()) { return; }
        int target = own_token(targets[row], first, valid);
        float* s = stats + (size_t)row * LOGIT_STATISTICS;
        s[0] = top;
        s[1] = total;
        s[2] = target >= 0 ? to_float(zr[target]) : -0.0f;  // added up over the ranks
    }
};

template <class T> struct CrossEntropy {  // per row: loss = logsumexp(z) - z[target]; z becomes (softmax(z) - onehot)·weight
    float* losses;       // (rows), the same on all ranks
    T* z;                // (rows, padded) logits in, their gradient out where `backward`
    const float* stats;  // (parts, part_stride), of each rank as LogitStatistics leaves them
    int parts;
    size_t part_stride;
    const int* targets;  // (rows), of all ranks' tokens; negative: the row does not count
    float weight;        // of one row in the mean
    int first, valid;    // this rank's tokens
    int padded;
    bool backward;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        T* zr = z + (size_t)row * padded;
        if (targets[row] < 0) {
            if (team.leads()) { losses[row] = 0.0f; }
            if (backward) { team.each(padded, [=](auto c) { store(zr, c, splat(c, 0.0f)); }); }
            return;
        }
        const float* s = stats + (size_t)row * LOGIT_STATISTICS;
        float top = -FLT_MAX, total = 0.0f, at_target = -0.0f;
        for (int p = 0; p < parts; p++) { top = max_of(top, s[p * part_stride]); }
        for (int p = 0; p < parts; p++) {  // a part with a NaN or inf has a total of NaN
            const float* part = s + p * part_stride;
            total += part[1] * exp_of(part[0] - top);
            at_target += part[2];
        }
        if (team.leads()) { losses[row] = logf(total) + top - at_target; }
        if (!backward) { return; }
        int n = valid, target = own_token(targets[row], first, valid);
        float w = weight, p = w / total;
        team.each(padded, [=](auto c) {
            auto d = mask(exp_near(load(zr, c) - top) * p, c, n, 0.0f);
            store(zr, c, subtract_at(d, c, target, w));
        });
    }
    template <int N> static DEVICE Vec<N> subtract_at(Vec<N> v, Range<N> c, int at, float w) {
        return Vec<N>::map([&](int k) { return (int)c.i + k == at ? v.v[k] - w : v.v[k]; });
    }
};

struct LossTotal {  // in float64, where whole numbers are exact
    double loss;    // Σ over the rows that count
    double counted; // how many those are
};

struct AddLosses {  // total += Σ losses, and how many rows count
    LossTotal* total;
    const float* losses;
    const int* targets;  // (rows); negative: the row does not count
    int rows;
    template <class Team> DEVICE void operator()(Team team, int) const {
        const float* l = losses;
        const int* t = targets;
        double sum = team.sum_double(rows, [=](int64_t i) { return (double)l[i]; });
        double counted = team.sum_double(rows, [=](int64_t i) { return t[i] >= 0 ? 1.0 : 0.0; });
        if (!team.leads()) { return; }
        total->loss += sum;
        total->counted += counted;
    }
};
