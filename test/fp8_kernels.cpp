// Tests of fp8_kernels.cuh: every kernel against float64 on awkward sizes, for FP32 and BF16 activations; FP8 codes, scales and recorded
// amaxes exactly; what ranks that hold parts of the vocabulary make of it against what one makes of all.
#include "check.h"
#include <algorithm>
#include "../fp8_kernels.cuh"
#include "launch.h"

static const int rows_list[] = {1, 2, 33, 70};            // one strip, its rest, three strips
static const int width_list[] = {1, 3, 16, 48, 129, 300};  // 300: more than one COLUMN_TILE

template <class T> static void print_size(char* text, size_t size, const char* what, int rows, int C) {
    snprintf(text, size, "%s, %s (%d, %d)", what, dtype_names[DTypeOf<T>::value], rows, C);
}

// ---- the functions in float64 ----

// (1 + tanh u)/2 = 1/(1 + e^(-2u)), without the cancellation of the left side
static double gelu_gate64(double x) { return 1.0 / (1.0 + exp(-2.0 * sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))); }
static double gelu64(double x) { return x * gelu_gate64(x); }
static double gelu_slope64(double x) {
    double g = gelu_gate64(x), rest = gelu_gate64(-x);  // 1 - g, without cancellation
    return g + 2.0 * x * g * rest * sqrt(2.0 / M_PI) * (1.0 + 3.0 * 0.044715 * x * x);
}

struct Norm64 { double mean, rstd, top; };
template <class X> static Norm64 norm64(const X* x, int C) {
    Norm64 n = {0, 0, 0};
    for (int c = 0; c < C; c++) { n.mean += (double)x[c] / C; n.top = fmax(n.top, fabs((double)x[c])); }
    double var = 0;
    for (int c = 0; c < C; c++) { var += ((double)x[c] - n.mean) * ((double)x[c] - n.mean) / C; }
    n.rstd = 1.0 / sqrt(var + 1e-5);
    return n;
}

// ---- sources ----

enum Kind { TENSOR, GELU, GELU_GRAD, NORM, KINDS };

template <class T> struct Inputs {
    int rows, C;
    Array<T> x, dy, gain, bias;
    Array<float> mean, rstd;
    Inputs(int r, int c) : rows(r), C(c), x((size_t)r * c), dy((size_t)r * c), gain(c), bias(c), mean(r), rstd(r) {
        fill_normal(x, 0.3, 2.0);
        fill_normal(dy, 0.0, 1.0);
        fill_normal(gain, 1.0, 0.3);
        fill_normal(bias, 0.0, 0.5);
        for (int i = 0; i < rows; i++) {
            std::vector<double> row(C);
            for (int k = 0; k < C; k++) { row[k] = (double)to_float(x[i * C + k]); }
            Norm64 n = norm64(row.data(), C);
            mean[i] = (float)n.mean;
            rstd[i] = (float)n.rstd;
        }
    }
};

template <class A> static void produce_kind(Kind kind, Tensor out, float* partial, const Inputs<A>& in, Quantisation q, void* raw) {
    const void *x = in.x, *dy = in.dy, *gain = in.gain, *bias = in.bias;
    const float *mean = in.mean, *rstd = in.rstd;
    auto run = [&](auto make) { produce(out, partial, make, DTypeOf<A>::value, q, raw, in.rows, in.C, NULL); };
    if (kind == TENSOR) {
        run([=](auto t) { typedef typename decltype(t)::type T; return TensorSource<T>{(const T*)x}; });
    } else if (kind == GELU) {
        run([=](auto t) { typedef typename decltype(t)::type T; return GeluSource<T>{(const T*)x}; });
    } else if (kind == GELU_GRAD) {
        run([=](auto t) { typedef typename decltype(t)::type T; return GeluGradSource<T>{(const T*)dy, (const T*)x}; });
    } else {
        run([=](auto t) {
            typedef typename decltype(t)::type T;
            return LayerNormSource<T>{(const T*)x, mean, rstd, (const T*)gain, (const T*)bias};
        });
    }
    finish();
}

template <class T> static void check_value(Kind kind, const Inputs<T>& in, int r, int c, double got, const char* text) {
    size_t i = (size_t)r * in.C + c;
    double x = (double)to_float(in.x[i]), dy = (double)to_float(in.dy[i]), want = x, allowed = 0.0, u = 0x1p-24;
    if (kind == GELU) {
        want = gelu64(x);
        double w = fabs(1.6 * (x + 0.044715 * x * x * x));
        allowed = fabs(want) * u * (8.0 + 4.0 * w) + 1e-36;
    } else if (kind == GELU_GRAD) {
        want = dy * gelu_slope64(x);
        allowed = fabs(dy) * u * 64.0;
    } else if (kind == NORM) {
        double g = (double)to_float(in.gain[c]), b = (double)to_float(in.bias[c]), n = (x - (double)in.mean[r]) * (double)in.rstd[r];
        want = n * g + b;
        allowed = 8.0 * u * (fabs(n * g) + fabs(b));
    }
    expect_near(got, want, allowed + (fabs(want) + allowed) * rounding_of<T>(), "%s: kind %d at (%d, %d)", text, kind, r, c);
}

// Sums of the columns of v (rows, C), as finish_columns leaves them, against float64
template <class T> static void check_column_sums(const T* v, float* partial, int rows, int C, const char* text) {
    Array<float> grad(C);
    finish_columns(grad, partial, strips_of(rows), C, false, NULL);
    finish();
    for (int c = 0; c < C; c++) {
        double sum = 0, size = 0;
        for (int r = 0; r < rows; r++) { sum += (double)to_float(v[r * C + c]); size += fabs((double)to_float(v[r * C + c])); }
        expect_near((double)grad[c], sum, 16.0 * 0x1p-24 * size, "%s: sum of column %d", text, c);
    }
}

template <class T> static void check_sources(void) {
    for (int rows : rows_list) {
        for (int C : width_list) {
            Inputs<T> in(rows, C);
            char text[128];
            print_size<T>(text, sizeof(text), "source", rows, C);
            for (int kind = GELU; kind < KINDS; kind++) {
                Array<T> y((size_t)rows * C), again((size_t)rows * C);
                Array<float> partial((size_t)strips_of(rows) * C);
                produce_kind((Kind)kind, Tensor{y, DTypeOf<T>::value, NULL}, NULL, in, Quantisation{}, NULL);
                for (int r = 0; r < rows; r++) {
                    for (int c = 0; c < C; c++) { check_value((Kind)kind, in, r, c, (double)to_float(y[r * C + c]), text); }
                }
                produce_kind((Kind)kind, Tensor{again, DTypeOf<T>::value, NULL}, partial, in, Quantisation{}, NULL);
                assert_memory_equal(y.p, again.p, y.n * sizeof(T));
                check_column_sums(y.p, partial, rows, C, text);
            }
            // a tensor that is there already is not touched, only summed
            Array<T> before((size_t)rows * C);
            memcpy((void*)before.p, in.x.p, in.x.n * sizeof(T));
            Array<float> partial((size_t)strips_of(rows) * C);
            produce_kind(TENSOR, Tensor{in.x, DTypeOf<T>::value, NULL}, NULL, in, Quantisation{}, NULL);
            produce_kind(TENSOR, Tensor{in.x, DTypeOf<T>::value, NULL}, partial, in, Quantisation{}, NULL);
            assert_memory_equal(before.p, in.x.p, in.x.n * sizeof(T));
            check_column_sums(in.x.p, partial, rows, C, text);
        }
    }
}

static void sources_match_float64_in_fp32(void**) { check_sources<float>(); }
static void sources_match_float64_in_bf16(void**) { check_sources<bf16>(); }

static void gelu_of_extreme_numbers(void**) {
    const float list[] = {0.0f,   -0.0f, 1e-30f, -1e-30f, 4.9f,  5.1f,  -4.9f,  -8.0f,    -9.7f,
                          -10.5f, 30.0f, -30.0f, 1e4f,    -1e4f, 1e15f, -1e15f, INFINITY, NAN};
    const int n = (int)(sizeof(list) / sizeof(list[0]));
    Inputs<float> in(1, n);
    for (int i = 0; i < n; i++) { in.x[i] = list[i]; in.dy[i] = 1.0f; }
    Array<float> y(n), slope(n);
    produce_kind(GELU, Tensor{y, FP32, NULL}, NULL, in, Quantisation{}, NULL);
    produce_kind(GELU_GRAD, Tensor{slope, FP32, NULL}, NULL, in, Quantisation{}, NULL);
    for (int i = 0; i < n; i++) {
        double x = (double)list[i];
        if (x != x) { assert_true(isnan(y[i]) && isnan(slope[i])); continue; }
        expect_near((double)y[i], isinf(x) ? x : gelu64(x), fabs(gelu64(x)) * 3e-5 + 1e-36, "gelu(%g)", x);
        if (!isinf(x)) { expect_near((double)slope[i], gelu_slope64(x), 4e-6, "gelu'(%g)", x); }
    }
}

// The definition and finite differences in float64 confirm what the kernels are compared with.
static void gelu_is_as_defined_and_its_slope_is_its_derivative(void**) {
    for (double x = -8.0; x < 8.0; x += 0.01) {
        expect_near(gelu64(x), 0.5 * x * (1.0 + tanh(sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))), 1e-14, "gelu(%g)", x);
        expect_near((gelu64(x + 1e-5) - gelu64(x - 1e-5)) / 2e-5, gelu_slope64(x), 1e-9, "gelu'(%g)", x);
    }
}

// ---- quantisation ----

static const int SITE = 1;  // of three: the neighbours must stay as they are

struct SiteArrays {
    Array<uint32_t> amax, current;
    Array<int> applied;  // 1: the step was not skipped
    Array<float> history, slots, largest;
    Sites sites;
    SiteArrays() : amax(3), current(1), applied(1), history(3 * AMAX_WINDOW), slots(12), largest(3) {
        sites = Sites{3, amax, current, history, slots, largest};
        amax.fill(0);
        applied.fill(1);
        history.fill(0.0f);
        run_rows(ResetSlots{slots}, 3, NULL);
        finish();
        for (int i = 0; i < 3; i++) { largest[i] = 448.0f; }
    }
    void set_scale(float scale) {
        slots[4 * SITE] = 1.0f / scale;
        slots[4 * SITE + 1] = scale;
    }
};

template <class D> static void expect_codes(const D* got, const bf16* v, float scale, int rows, int C, const char* text) {
    for (int i = 0; i < rows * C; i++) {
        D want = encoded<D>(to_float(v[i]) * scale);
        if (got[i].bits != want.bits) { fail_msg("%s: code %d is 0x%x, not 0x%x", text, i, got[i].bits, want.bits); }
    }
}

static void expect_slot(const float* slot, float scale) {
    assert_true(slot[1] == scale && slot[0] == 1.0f / scale);
    assert_true(slot[2] == 0.0f && slot[3] == 0.0f);
}

static uint32_t amax_of(const bf16* v, int n) {
    uint32_t top = 0;
    for (int i = 0; i < n; i++) { top = max_of(top, float_to_bits(to_float(v[i])) & 0x7fffffffu); }
    return top;
}

template <class D> static void check_quantisation(Kind kind, int rows, int C, bool sums) {
    DType d = DTypeOf<D>::value;
    char text[128];
    snprintf(text, sizeof(text), "kind %d to %s (%d, %d)%s", kind, dtype_names[d], rows, C, sums ? " with sums" : "");
    Inputs<bf16> in(rows, C);
    size_t n = (size_t)rows * C;
    Array<bf16> v(n), raw(n);
    Array<D> y(n), again(n);
    Array<float> partial((size_t)strips_of(rows) * C), first_partial((size_t)strips_of(rows) * C), slot(4);
    if (kind == TENSOR) { memcpy((void*)v.p, in.x.p, n * sizeof(bf16)); }
    else { produce_kind(kind, Tensor{v, BF16, NULL}, NULL, in, Quantisation{}, NULL); }
    uint32_t top = amax_of(v, (int)n);
    float right = scale_from_amax(bits_to_float(top), largest_of(d), 0, 1.0f);
    SiteArrays s;
    s.sites.largest[SITE] = largest_of(d);

    // the site's scale, too large by 8: some elements saturate. Its amax is that of the tensor, and a larger one seen before stays.
    s.set_scale(8.0f * right);
    Quantisation q = {&s.sites, SITE, false, true, false, NULL};
    produce_kind(kind, Tensor{y, d, slot}, sums ? partial.p : NULL, in, q, NULL);
    expect_slot(slot, 8.0f * right);
    expect_codes(y.p, v, 8.0f * right, rows, C, text);
    assert_int_equal(s.amax[SITE], top);
    if (sums) {
        memcpy(first_partial.p, partial.p, partial.n * sizeof(float));
        check_column_sums(v.p, partial, rows, C, text);
    }
    s.amax[SITE] = top + 1;
    produce_kind(kind, Tensor{y, d, slot}, sums ? partial.p : NULL, in, q, NULL);
    assert_int_equal(s.amax[SITE], top + 1);
    s.amax[SITE] = 0;

    // recompute: the slot's own scale, which no site knows; nothing is recorded
    s.set_scale(0.125f);
    slot[0] = 1.0f / right; slot[1] = right;
    for (bool just_in_time : {false, true}) {
        produce_kind(kind, Tensor{y, d, slot}, sums ? partial.p : NULL, in, Quantisation{&s.sites, SITE, just_in_time, false, true, NULL}, raw);
        expect_slot(slot, right);
        expect_codes(y.p, v, right, rows, C, text);
        assert_int_equal(s.amax[SITE], 0);
    }

    // just in time: the scale is that of the tensor, and the codes are those of the way above
    memset((void*)slot.p, 0, 16);
    slot[0] = slot[1] = 1.0f;
    for (bool record : {false, true}) {
        memset((void*)again.p, 0xff, n);
        produce_kind(kind, Tensor{again, d, slot}, sums ? partial.p : NULL, in, Quantisation{&s.sites, SITE, true, record, false, NULL},
                     kind == TENSOR ? NULL : raw.p);
        expect_slot(slot, right);
        assert_memory_equal(again.p, y.p, n);
        assert_int_equal(s.amax[SITE], record ? top : 0);
        if (sums) { assert_memory_equal(partial.p, first_partial.p, partial.n * sizeof(float)); }
    }
    expect_slot(s.slots + 4 * SITE, 0.125f);
    for (int other : {0, 2}) {
        assert_int_equal(s.amax[other], 0);
        expect_slot(s.slots + 4 * other, 1.0f);
    }
}

// ---- scales of blocks ----

// The scale that a block has: the largest power of two with which its amax is in range; NaN where it is not finite
template <class D, class At> static float block_scale_of(int n, At at) {
    double top = 0.0;
    for (int i = 0; i < n; i++) {
        if (!isfinite(at(i))) { return NAN; }
        top = fmax(top, fabs((double)at(i)));
    }
    if (top == 0.0) { return 1.0f; }
    int e = 126;
    while (e > -126 && ldexp(top, e) > (double)largest_of(DTypeOf<D>::value)) { e--; }
    return (float)ldexp(1.0, e);
}

// Of v (rows, C) the codes and descales along channels and along tokens are what the definition says; `ld`: of the transposed form, 0: it is as the other
template <class D>
static void expect_blocks(const D* y, const float* descales, const D* turned, const float* turned_descales, int64_t ld, const bf16* v, int rows, int C, const char* text) {
    auto value = [&](int r, int c) { return to_float(v[(size_t)r * C + c]); };
    auto expect = [&](D got, float descale, float scale, int r, int c, const char* along) {
        D want = encoded<D>(value(r, c) * scale);
        bool descale_right = isnan(scale) ? isnan(descale) : descale == 1.0f / scale;
        if (got.bits == want.bits && descale_right) { return; }
        fail_msg("%s, along %s at (%d, %d): code 0x%x, not 0x%x; descale %g, not %g", text, along, r, c, got.bits, want.bits, (double)descale, 1.0 / (double)scale);
    };
    for (int r = 0; y != NULL && r < rows; r++) {
        for (int b = 0; b < C; b += 128) {
            float scale = block_scale_of<D>(min_of(128, C - b), [&](int i) { return value(r, b + i); });
            for (int c = b; c < min_of(b + 128, C); c++) { expect(y[(size_t)r * C + c], descales[(size_t)(b / 128) * rows + r], scale, r, c, "channels"); }
        }
    }
    for (int c = 0; turned != NULL && c < C; c++) {
        for (int b = 0; b < rows; b += 128) {
            float scale = block_scale_of<D>(min_of(128, rows - b), [&](int i) { return value(b + i, c); });
            for (int r = b; r < min_of(b + 128, rows); r++) {
                expect(ld > 0 ? turned[(size_t)c * ld + r] : turned[(size_t)r * C + c], turned_descales[(size_t)(b / 128) * C + c], scale, r, c, "tokens");
            }
        }
        for (int64_t r = rows; r < ld; r++) { assert_int_equal(turned[(size_t)c * ld + r].bits, 0); }
    }
}

static const int block_sizes[][2] = {{1, 1}, {2, 300}, {33, 16}, {127, 129}, {128, 128}, {130, 48}, {260, 257}, {150, 264}};  // (rows, C)
#ifdef GPU_FORM
static const bool forms_transposed[] = {false, true};
#else
static const bool forms_transposed[] = {false};
#endif

// Arrays are of the very size, so that what is read or written beyond them shows
template <class D> static void check_blocks(Kind kind, int rows, int C, bool transposed, bool odd) {
    DType d = DTypeOf<D>::value;
    char text[160];
    snprintf(text, sizeof(text), "blocks of kind %d to %s (%d, %d)%s%s", kind, dtype_names[d], rows, C, transposed ? " transposed" : "", odd ? " with odd blocks" : "");
    Inputs<bf16> in(rows, C);
    size_t n = (size_t)rows * C;
    for (size_t i = 0; odd && i < n; i++) {  // zeros, tiny and huge numbers in some blocks, and one that is not finite
        int r = (int)(i / C), c = (int)(i % C);
        if (c < 20 || r == 1) { from_float(in.x[i], 0.0f); }
        else if (r % 7 == 3) { in.x[i].bits = (uint16_t)(in.x[i].bits & 0x807f); }  // subnormal
        else if (r % 7 == 5) { from_float(in.x[i], to_float(in.x[i]) * 1e36f); }
    }
    if (odd && n > 200) { in.x[n / 2].bits = 0x7f80; in.x[n - 1].bits = 0xffc0; }
    int64_t ld = transposed ? round_up(rows, 16) : 0;
    Array<bf16> v(n);
    Array<D> y(n), turned(transposed ? (size_t)ld * C : n);
    Array<float> descales((size_t)ceil_div(C, 128) * rows), turned_descales((size_t)ceil_div(rows, 128) * C), partial((size_t)strips_of(rows) * C);
    Tensor all = {y, d, descales, turned, ld, true, turned_descales};
    if (kind == TENSOR) { memcpy((void*)v.p, in.x.p, n * sizeof(bf16)); }
    else { produce_kind(kind, Tensor{v, BF16, NULL}, NULL, in, Quantisation{}, NULL); }
    produce_kind(kind, all, odd ? NULL : partial.p, in, Quantisation{}, NULL);
    expect_blocks(y.p, descales.p, turned.p, turned_descales.p, ld, v.p, rows, C, text);
    if (!odd) { check_column_sums(v.p, partial, rows, C, text); }
    // one of the two alone
    Array<D> first(n), second(turned.n);
    Array<float> first_descales(descales.n), second_descales(turned_descales.n);
    produce_kind(kind, Tensor{first, d, first_descales, NULL, ld, true, NULL}, NULL, in, Quantisation{}, NULL);
    produce_kind(kind, Tensor{NULL, d, NULL, second, ld, true, second_descales}, NULL, in, Quantisation{}, NULL);
    assert_memory_equal(first.p, y.p, n);
    assert_memory_equal(second.p, turned.p, turned.n);
    assert_memory_equal(first_descales.p, descales.p, descales.n * sizeof(float));
    assert_memory_equal(second_descales.p, turned_descales.p, turned_descales.n * sizeof(float));
}

static void codes_and_scales_of_blocks_are_exact(void**) {
    for (auto& size : block_sizes) {
        for (bool transposed : forms_transposed) {
            for (int kind = 0; kind < KINDS; kind++) { check_blocks<e4m3>((Kind)kind, size[0], size[1], transposed, false); }
            check_blocks<e4m3>(TENSOR, size[0], size[1], transposed, true);
            check_blocks<e5m2>(GELU_GRAD, size[0], size[1], transposed, false);
            check_blocks<e5m2>(TENSOR, size[0], size[1], transposed, true);
        }
    }
}

// The LayerNorm's output in blocks is that of the bare kernel, and what backward makes again is the same
static void layernorm_in_blocks_is_the_same_fused_and_recomputed(void**) {
    for (auto& size : block_sizes) {
        int rows = size[0], C = size[1];
        size_t n = (size_t)rows * C;
        Inputs<bf16> in(rows, C);
        Array<bf16> v(n), raw(n), sum(n);
        Array<e4m3> y(n), turned(n), again(n);
        Array<float> descales((size_t)ceil_div(C, 128) * rows), turned_descales((size_t)ceil_div(rows, 128) * C), again_descales(turned_descales.n);
        LayerNormInputs l = {sum, in.x, in.dy, in.gain, in.bias, in.mean, in.rstd};
        layernorm_forward(Tensor{v, BF16, NULL}, l, BF16, Quantisation{}, NULL, rows, C, NULL);
        layernorm_forward(Tensor{y, E4M3, descales, turned, 0, true, turned_descales}, l, BF16, Quantisation{}, raw, rows, C, NULL);
        finish();
        expect_blocks(y.p, descales.p, turned.p, turned_descales.p, 0, v.p, rows, C, "layernorm in blocks");
        memcpy((void*)in.x.p, sum.p, n * sizeof(bf16));
        produce_kind(NORM, Tensor{NULL, E4M3, NULL, again, 0, true, again_descales}, NULL, in, Quantisation{}, NULL);
        assert_memory_equal(again.p, turned.p, n);
        assert_memory_equal(again_descales.p, turned_descales.p, turned_descales.n * sizeof(float));
    }
}

// A few outliers cost a tensor with one scale its small numbers, and with blocks only their own block's. Signal to noise in dB
static void blocks_keep_what_outliers_cost_a_tensor(void**) {
    const int rows = 256, C = 512;
    Inputs<bf16> in(rows, C);
    fill_normal(in.x, 0.0, 1.0);
    double signal = 0.0, noise[3] = {};
    for (int i = 0; i < 4; i++) { from_float(in.x[(size_t)i * 64 * C + 37 + 128 * i], 60000.0f); }
    Array<e4m3> one((size_t)rows * C), y(one.n), turned(one.n);
    Array<float> slot(4), descales((size_t)ceil_div(C, 128) * rows), turned_descales((size_t)ceil_div(rows, 128) * C);
    slot.fill(1.0f);
    SiteArrays s;
    produce_kind(TENSOR, Tensor{one, E4M3, slot}, NULL, in, Quantisation{&s.sites, SITE, true, false, false, NULL}, NULL);
    produce_kind(TENSOR, Tensor{y, E4M3, descales, turned, 0, true, turned_descales}, NULL, in, Quantisation{}, NULL);
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < C; c++) {
            size_t i = (size_t)r * C + c;
            double x = (double)to_float(in.x[i]);
            if (fabs(x) > 1000.0) { continue; }
            const double got[] = {(double)to_float(one[i]) * (double)slot[0], (double)to_float(y[i]) * (double)descales[(size_t)(c / 128) * rows + r],
                                  (double)to_float(turned[i]) * (double)turned_descales[(size_t)(r / 128) * C + c]};
            signal += x * x;
            for (int k = 0; k < 3; k++) { noise[k] += (got[k] - x) * (got[k] - x); }
        }
    }
    double db[3];
    for (int k = 0; k < 3; k++) { db[k] = 10.0 * log10(signal / noise[k]); }
    if (!(db[0] < 20.0 && db[1] > db[0] + 8.0 && db[2] > db[0] + 8.0)) { fail_msg("tensor %.1f dB, by channels %.1f, by tokens %.1f", db[0], db[1], db[2]); }
}

static void codes_scales_and_amaxes_are_exact(void**) {
    for (int rows : rows_list) {
        for (int C : width_list) {
            for (int kind = 0; kind < KINDS; kind++) {
                for (bool sums : {false, true}) {
                    check_quantisation<e4m3>((Kind)kind, rows, C, sums);
                    check_quantisation<e5m2>((Kind)kind, rows, C, sums);
                }
            }
        }
    }
}

static void the_amax_is_the_maximum_over_micro_batches(void**) {
    SiteArrays s;
    Array<float> slot(4);
    for (bool just_in_time : {false, true}) {
        uint32_t top = 0;
        s.amax[SITE] = 0;
        for (int k = 0; k < 5; k++) {
            Inputs<bf16> in(33, 48);
            Array<e4m3> y(33 * 48);
            slot.fill(1.0f);
            produce_kind(TENSOR, Tensor{y, E4M3, slot}, NULL, in, Quantisation{&s.sites, SITE, just_in_time, true, false, NULL}, NULL);
            top = max_of(top, amax_of(in.x, 33 * 48));
            assert_int_equal(s.amax[SITE], top);
        }
    }
}

// ---- a scale that ranks share ----

// Every rank can say what any has
static void fill_rank(const Inputs<bf16>& in, int rank, float bad) {
    random_state = 1000 + 1000 * (uint64_t)rank;
    double size = exp2((double)(5 * rank % 7) - 3.0);  // the last rank's are not the largest of three
    for (const Array<bf16>* x : {&in.x, &in.dy, &in.gain, &in.bias}) { fill_normal(*x, 0.0, size); }
    if (rank == 1) { from_float(in.x[7], bad); }
}

// Just in time, the scale and what is recorded are those of all ranks' tensors, whichever kernel makes them
static void check_shared(RowExchange* rows_of_all, Kind kind, float bad) {
    Group* g = rows_of_all->group;
    const int rows = 33, C = 48, n = rows * C;
    Inputs<bf16> in(rows, C);
    Array<bf16> v(n), raw(n);
    Array<e4m3> y(n);
    Array<float> slot(4), mean(rows), rstd(rows);
    auto run = [&](Tensor out, Quantisation q) {
        LayerNormInputs l = {NULL, in.x, NULL, in.gain, in.bias, mean, rstd};
        if (kind == NORM) { layernorm_forward(out, l, BF16, q, raw, rows, C, NULL); }
        else { produce_kind(kind, out, NULL, in, q, kind == TENSOR ? NULL : raw.p); }
        finish();
    };
    SiteArrays s;
    uint32_t all = 0, own = 0;
    for (int k = 1; k <= g->size; k++) {  // the own ones last
        fill_rank(in, (g->rank + k) % g->size, bad);
        if (kind == TENSOR) { memcpy((void*)v.p, in.x.p, n * sizeof(bf16)); }
        else { run(Tensor{v, BF16, NULL}, Quantisation{}); }
        own = amax_of(v, n);
        all = max_of(all, own);
    }
    for (RowExchange* sharers : {rows_of_all, (RowExchange*)NULL}) {
        uint32_t top = sharers != NULL ? all : own;
        float scale = scale_from_amax(bits_to_float(top), 448.0f, 0, 4.0f);
        uint64_t scales = g->bytes_sent[TP_SCALES], others = g->bytes_sent[ALL_REDUCE_MAX];
        uint64_t sent = sharers != NULL ? 2 * sizeof(float) * ((uint64_t)g->size - 1) / (uint64_t)g->size : 0;
        slot[0] = 0.25f; slot[1] = 4.0f; slot[2] = slot[3] = 0.0f;
        s.amax[SITE] = 0;
        run(Tensor{y, E4M3, slot}, Quantisation{&s.sites, SITE, true, true, false, sharers});
        CHECK(slot[1] == scale && slot[0] == 1.0f / scale, "kind %d: scale %g, not %g", kind, (double)slot[1], (double)scale);
        CHECK(s.amax[SITE] == top || (top > 0x7f800000u && s.amax[SITE] > 0x7f800000u), "kind %d: amax 0x%x, not 0x%x", kind, s.amax[SITE], top);
        for (int i = 0; i < n; i++) { CHECK(y[i].bits == encoded<e4m3>(to_float(v[i]) * scale).bits, "kind %d: code %d", kind, i); }
        // a scale from the site's history, and one that is kept, are there already
        run(Tensor{y, E4M3, slot}, Quantisation{&s.sites, SITE, false, true, false, sharers});
        if (kind != NORM) { run(Tensor{y, E4M3, slot}, Quantisation{&s.sites, SITE, true, false, true, sharers}); }
        CHECK(g->bytes_sent[TP_SCALES] - scales == sent && g->bytes_sent[ALL_REDUCE_MAX] == others, "kind %d", kind);
    }
}

static int run_rank(int argc, char** argv) {
    World world = world_init(&argc, &argv);
    world_select_device(&world);
    Group group = group_world(&world, true);
    RowExchange rows = {};
    rows.group = &group;
    rows_create(&rows, 4);
    for (float bad : {0.0f, INFINITY, NAN}) {
        for (int kind = 0; kind < KINDS; kind++) { check_shared(&rows, (Kind)kind, bad); }
    }
    rows_free(&rows);
    printf("held\n");
    group_free(&group);
    world_finalize(&world);
    return 0;
}

static void ranks_share(int ranks) {
    if (!can_launch(ranks)) { skip(); }
    Launched l = expect_ranks(ranks, "share", "0", NULL, 60, 0);
    int held = 0;
    for (const char* p = l.out; (p = strstr(p, "held\n")) != NULL; p++) { held++; }
    assert_int_equal(held, ranks);
}
static void one_rank_keeps_its_scale(void**) { ranks_share(1); }
static void two_ranks_share_a_scale(void**) { ranks_share(2); }
static void three_ranks_share_a_scale(void**) { ranks_share(3); }

// A NaN or inf is seen: in the code (NaN), in the amax, and by UpdateSites, which then keeps history and scale. The other elements keep
// their codes.
static void nan_and_inf_are_not_lost(void**) {
    for (float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
        for (bool just_in_time : {false, true}) {
            for (bool sums : {false, true}) {
                Inputs<bf16> in(33, 48);
                Array<e4m3> y(33 * 48);
                Array<float> slot(4), partial(2 * 48);
                SiteArrays s;
                s.set_scale(4.0f);
                slot[0] = 0.25f; slot[1] = 4.0f; slot[2] = slot[3] = 0.0f;
                from_float(in.x[500], bad);
                produce_kind(TENSOR, Tensor{y, E4M3, slot}, sums ? partial.p : NULL, in,
                             Quantisation{&s.sites, SITE, just_in_time, true, false, NULL}, NULL);
                assert_int_equal(y[500].bits, isnan(bad) ? 0x7f : bad > 0 ? 0x7e : 0xfe);
                assert_true(isnan(bad) ? s.amax[SITE] > 0x7f800000u : s.amax[SITE] == 0x7f800000u);
                expect_slot(slot, 4.0f);
                expect_codes(y.p, in.x, 4.0f, 33, 48, "beside a NaN");
                if (sums) {
                    assert_true(isnan(bad) ? isnan(partial[500 % 48]) : partial[500 % 48] == bad);  // row 10: the first strip
                    assert_true(isfinite(partial[48 + 500 % 48]) && isfinite(partial[500 % 48 + 1]));
                }
                s.history[SITE * AMAX_WINDOW + 3] = 7.0f;
                run_rows(UpdateSites{s.sites, s.applied, 5}, 3, NULL);
                finish();
                assert_int_equal(s.amax[SITE], 0);
                for (int k = 0; k < AMAX_WINDOW; k++) { assert_true(s.history[SITE * AMAX_WINDOW + k] == (k == 3 ? 7.0f : 0.0f)); }
                expect_slot(s.slots + 4 * SITE, 64.0f);  // 7·64 = 448
            }
        }
    }
}

static void a_tensor_of_zeros_keeps_its_scale(void**) {
    Inputs<bf16> in(2, 16);
    memset((void*)in.x.p, 0, 2 * 16 * sizeof(bf16));
    from_float(in.x[3], -0.0f);
    Array<e4m3> y(32);
    Array<float> slot(4);
    SiteArrays s;
    slot[0] = 0.25f; slot[1] = 4.0f; slot[2] = slot[3] = 0.0f;
    produce_kind(TENSOR, Tensor{y, E4M3, slot}, NULL, in, Quantisation{&s.sites, SITE, true, true, false, NULL}, NULL);
    expect_slot(slot, 4.0f);
    for (int i = 0; i < 32; i++) { assert_int_equal(y[i].bits, i == 3 ? 0x80 : 0); }
}

// An independent account of the window: the values of the last 16 steps by their step, a non-finite step leaving the value that was there
static void sites_take_the_maximum_of_sixteen_steps(void**) {
    SiteArrays s;
    s.largest[0] = 57344.0f;
    std::vector<double> seen[3];
    float scale[3] = {1.0f, 1.0f, 1.0f};
    for (int step = 0; step < 100; step++) {
        for (int i = 0; i < 3; i++) {
            float amax = step % 37 == 5 ? 1000.0f : i == 2 && step >= 20 && step < 60 ? 0.0f : (float)exp2(uniform(-10, 2));
            if (step % 7 == 3) { amax = i == 0 ? NAN : i == 1 ? INFINITY : amax; }
            s.amax[i] = float_to_bits(amax) & 0x7fffffffu;
            double old = step >= 16 ? seen[i][(size_t)step - 16] : 0.0;
            seen[i].push_back(isfinite(amax) ? (double)amax : old);
            double top = 0.0;
            for (int k = max_of(0, step - 15); k <= step; k++) { top = fmax(top, seen[i][(size_t)k]); }
            if (top > 0.0) {
                int e = -200;
                while (ldexp(top, e + 1) <= (double)s.largest[i]) { e++; }
                scale[i] = ldexpf(1.0f, e);
            }
        }
        run_rows(UpdateSites{s.sites, s.applied, step}, 3, NULL);
        finish();
        for (int i = 0; i < 3; i++) {
            if (s.slots[4 * i + 1] != scale[i]) {
                fail_msg("step %d, site %d: scale %g, not %g", step, i, (double)s.slots[4 * i + 1], (double)scale[i]);
            }
            expect_slot(s.slots + 4 * i, scale[i]);
            assert_int_equal(s.amax[i], 0);
        }
    }
}

// A step that was skipped, for whatever reason, is not in the history: its finite amaxes are not either
static void a_skipped_step_is_not_in_the_history(void**) {
    SiteArrays s;
    s.amax[SITE] = float_to_bits(7.0f);
    run_rows(UpdateSites{s.sites, s.applied, 0}, 3, NULL);
    finish();
    expect_slot(s.slots + 4 * SITE, 64.0f);
    Array<int> skipped(1);
    skipped[0] = 0;
    s.amax[SITE] = float_to_bits(44800.0f);
    run_rows(UpdateSites{s.sites, skipped, 1}, 3, NULL);
    finish();
    expect_slot(s.slots + 4 * SITE, 64.0f);
    assert_int_equal(s.amax[SITE], 0);
    assert_true(s.history[SITE * AMAX_WINDOW + 1] == 0.0f);
}

static void an_outlier_leaves_the_window_after_sixteen_steps(void**) {
    SiteArrays s;
    for (int step = 0; step < 40; step++) {
        s.amax[SITE] = float_to_bits(step == 10 ? 448.0f : 7.0f);
        run_rows(UpdateSites{s.sites, s.applied, step}, 3, NULL);
        finish();
        expect_slot(s.slots + 4 * SITE, step >= 10 && step < 26 ? 1.0f : 64.0f);
    }
}

static void types_without_a_kernel_are_refused(void**) {
    expect_end(1, "fp32", "e4m3", [] { with_types(FP32, E4M3, [](auto, auto) {}); });
    expect_end(1, "bf16", "fp32", [] { with_types(BF16, FP32, [](auto, auto) {}); });
    expect_end(1, "fp16", NULL, [] { with_type(FP16, [](auto) {}); });
}

static void column_sums_are_added_to_the_gradient(void**) {
    for (int C : width_list) {
        Array<float> partial(3 * C), copy(3 * C), grad(C), old(C);
        fill_normal(partial, 0.0, 1.0);
        fill_normal(grad, 0.0, 1.0);
        memcpy(copy.p, partial.p, copy.n * 4);
        memcpy(old.p, grad.p, old.n * 4);
        finish_columns(grad, partial, 3, C, true, NULL);
        finish();
        for (int c = 0; c < C; c++) { assert_true(grad[c] == old[c] + (copy[c] + copy[C + c] + copy[2 * C + c])); }
    }
}

// ---- LayerNorm ----

template <class T> static void check_layernorm_forward(int rows, int C, bool add) {
    char text[128];
    print_size<T>(text, sizeof(text), add ? "layernorm of a sum" : "layernorm", rows, C);
    size_t n = (size_t)rows * C;
    Inputs<T> in(rows, C);
    Array<T> delta(n), sum(n), y(n);
    Array<float> mean(rows), rstd(rows);
    fill_normal(delta, -0.5, 1.0);
    LayerNormInputs l = {sum, in.x, add ? delta.p : NULL, in.gain, in.bias, mean, rstd};
    layernorm_forward(Tensor{y, DTypeOf<T>::value, NULL}, l, DTypeOf<T>::value, Quantisation{}, NULL, rows, C, NULL);
    finish();
    std::vector<double> x(C);
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < C; c++) {
            float v = to_float(in.x[r * C + c]);
            if (add) {
                v = round_to<T>(v + to_float(delta[r * C + c]));
                assert_true(to_float(sum[r * C + c]) == v);
            }
            x[c] = (double)v;
        }
        Norm64 m = norm64(x.data(), C);
        double u = 0x1p-24, shift = 1.0 + m.top * m.rstd;
        expect_near((double)mean[r], m.mean, 8.0 * u * m.top, "%s: mean of row %d", text, r);
        expect_near((double)rstd[r], m.rstd, 16.0 * u * m.rstd, "%s: rstd of row %d", text, r);
        for (int c = 0; c < C; c++) {
            double g = (double)to_float(in.gain[c]), b = (double)to_float(in.bias[c]), norm = (x[c] - m.mean) * m.rstd, want = norm * g + b;
            double allowed = 16.0 * u * (fabs(g) * (fabs(norm) + shift) + fabs(b));
            expect_near((double)to_float(y[r * C + c]), want, allowed + (fabs(want) + allowed) * rounding_of<T>(), "%s: y(%d, %d)", text, r,
                        c);
        }
    }
    if (!add) { for (size_t i = 0; i < n * sizeof(T); i++) { assert_int_equal(((unsigned char*)sum.p)[i], 0xff); } return; }
    Array<T> out(n);
    run_rows(AddRows<T>{out, in.x, delta, C}, rows, NULL);
    finish();
    assert_memory_equal(out.p, sum.p, n * sizeof(T));
}

static void layernorm_matches_float64(void**) {
    for (int rows : rows_list) {
        for (int C : width_list) {
            for (bool add : {false, true}) {
                check_layernorm_forward<float>(rows, C, add);
                check_layernorm_forward<bf16>(rows, C, add);
            }
        }
    }
}

// A row of equal numbers has variance 0: eps keeps the result finite. One NaN or inf makes its row NaN and no other.
static void layernorm_of_constant_and_non_finite_rows(void**) {
    const int rows = 3, C = 48;
    Inputs<float> in(rows, C);
    Array<float> y(rows * C), mean(rows), rstd(rows);
    for (int c = 0; c < C; c++) { in.x[c] = 3.0f; }
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        in.x[C + 5] = bad;
        layernorm_forward(Tensor{y, FP32, NULL}, LayerNormInputs{NULL, in.x, NULL, in.gain, in.bias, mean, rstd}, FP32, Quantisation{},
                          NULL, rows, C, NULL);
        finish();
        for (int c = 0; c < C; c++) {
            assert_true(y[c] == in.bias[c]);
            assert_true(isnan(y[C + c]) && isfinite(y[2 * C + c]));
        }
    }
}

// The fused kernel's codes (from the site's scale, or just in time) are those of two passes, and those that recompute makes from the kept
// statistics.
template <class D> static void check_layernorm_codes(int rows, int C, bool add, bool just_in_time) {
    DType d = DTypeOf<D>::value;
    size_t n = (size_t)rows * C;
    Inputs<bf16> in(rows, C);
    Array<bf16> delta(n), sum(n), v(n), raw(n);
    Array<D> y(n), again(n);
    Array<float> slot(4);
    fill_normal(delta, -0.5, 1.0);
    SiteArrays s;
    LayerNormInputs l = {sum, in.x, add ? delta.p : NULL, in.gain, in.bias, in.mean, in.rstd};
    layernorm_forward(Tensor{v, BF16, NULL}, l, BF16, Quantisation{}, NULL, rows, C, NULL);
    finish();
    uint32_t top = amax_of(v, (int)n);
    float scale = scale_from_amax(bits_to_float(top), largest_of(d), 0, 1.0f);
    if (!just_in_time) { scale *= 4.0f; s.set_scale(scale); }
    memset((void*)slot.p, 0, 16);
    for (bool record : {false, true}) {
        memset((void*)y.p, 0xff, n);
        layernorm_forward(Tensor{y, d, slot}, l, BF16, Quantisation{&s.sites, SITE, just_in_time, record, false, NULL}, raw, rows, C, NULL);
        finish();
        expect_slot(slot, scale);
        expect_codes(y.p, v, scale, rows, C, "layernorm");
        assert_int_equal(s.amax[SITE], record ? top : 0);
    }
    Inputs<bf16> kept(rows, C);
    memcpy((void*)kept.x.p, add ? sum.p : in.x.p, n * sizeof(bf16));
    memcpy((void*)kept.gain.p, in.gain.p, C * sizeof(bf16));
    memcpy((void*)kept.bias.p, in.bias.p, C * sizeof(bf16));
    memcpy(kept.mean.p, in.mean.p, rows * sizeof(float));
    memcpy(kept.rstd.p, in.rstd.p, rows * sizeof(float));
    s.amax[SITE] = 0;
    produce_kind(NORM, Tensor{again, d, slot}, NULL, kept, Quantisation{&s.sites, SITE, just_in_time, false, true, NULL}, raw);
    assert_memory_equal(y.p, again.p, n);
    expect_slot(slot, scale);
    assert_int_equal(s.amax[SITE], 0);
}

static void layernorm_codes_are_the_same_fused_in_two_passes_and_recomputed(void**) {
    for (int rows : rows_list) {
        for (int C : width_list) {
            for (int way = 0; way < 4; way++) {
                check_layernorm_codes<e4m3>(rows, C, way % 2 == 1, way / 2 == 1);
                check_layernorm_codes<e5m2>(rows, C, way % 2 == 1, way / 2 == 1);
            }
        }
    }
}

// dL/dx of L = Σ dy·LayerNorm(x), a row in float64; size: the sum of the magnitudes that make it up
static void layernorm_gradient64(double* dx, double* size, const double* x, const double* dy, const double* gain, int C) {
    Norm64 m = norm64(x, C);
    double a = 0, b = 0, a_size = 0, b_size = 0;
    for (int c = 0; c < C; c++) {
        double dn = dy[c] * gain[c], norm = (x[c] - m.mean) * m.rstd;
        a += dn / C; b += dn * norm / C; a_size += fabs(dn) / C; b_size += fabs(dn * norm) / C;
    }
    for (int c = 0; c < C; c++) {
        double dn = dy[c] * gain[c], norm = (x[c] - m.mean) * m.rstd;
        dx[c] = (dn - a - norm * b) * m.rstd;
        size[c] = (fabs(dn) + a_size + (fabs(norm) + m.top * m.rstd) * b_size) * m.rstd;
    }
}

template <class T> static void check_layernorm_backward(int rows, int C, bool accumulate) {
    char text[128];
    print_size<T>(text, sizeof(text), "layernorm backward", rows, C);
    size_t n = (size_t)rows * C;
    Inputs<T> in(rows, C);
    Array<T> dx(n), old(n);
    Array<float> dgain(C), dbias(C), partial((size_t)2 * most_norm_strips(rows) * C);
    fill_normal(old, 0.0, 1.0);
    if (accumulate) {
        memcpy((void*)dx.p, old.p, n * sizeof(T));
        dgain.fill(1.5f);
        dbias.fill(-2.5f);
    }
    LayerNormInputs l = {NULL, in.x, NULL, in.gain, in.bias, in.mean, in.rstd};
    layernorm_backward(dx, dgain, dbias, partial, in.dy, l, DTypeOf<T>::value, accumulate, accumulate, rows, C, NULL);
    finish();
    std::vector<double> x(C), dy(C), gain(C), want(C), size(C), sums(2 * C), sizes(2 * C);
    double u = 0x1p-24;
    for (int c = 0; c < C; c++) {
        gain[c] = (double)to_float(in.gain[c]);
        if (accumulate) { sums[c] = 1.5; sums[C + c] = -2.5; sizes[c] = 1.5; sizes[C + c] = 2.5; }
    }
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < C; c++) { x[c] = (double)to_float(in.x[r * C + c]); dy[c] = (double)to_float(in.dy[r * C + c]); }
        layernorm_gradient64(want.data(), size.data(), x.data(), dy.data(), gain.data(), C);
        Norm64 m = norm64(x.data(), C);
        for (int c = 0; c < C; c++) {
            double before = accumulate ? (double)to_float(old[r * C + c]) : 0.0, allowed = 32.0 * u * (size[c] + fabs(before));
            double w = want[c] + before, norm = (x[c] - m.mean) * m.rstd;
            expect_near((double)to_float(dx[r * C + c]), w, allowed + (fabs(w) + allowed) * rounding_of<T>(), "%s: dx(%d, %d)", text, r, c);
            sums[c] += dy[c] * norm;
            sizes[c] += fabs(dy[c]) * (fabs(norm) + m.top * m.rstd);
            sums[C + c] += dy[c];
            sizes[C + c] += fabs(dy[c]);
        }
    }
    for (int c = 0; c < C; c++) {
        expect_near((double)dgain[c], sums[c], 16.0 * u * sizes[c], "%s: dgain(%d)", text, c);
        expect_near((double)dbias[c], sums[C + c], 16.0 * u * sizes[C + c], "%s: dbias(%d)", text, c);
    }
}

static void layernorm_backward_matches_float64(void**) {
    for (int rows : rows_list) {
        for (int C : width_list) {
            for (bool accumulate : {false, true}) {
                check_layernorm_backward<float>(rows, C, accumulate);
                check_layernorm_backward<bf16>(rows, C, accumulate);
            }
        }
    }
}

// Finite differences in float64 confirm the gradient that the kernel is compared with.
static void the_gradient_of_layernorm_is_its_derivative(void**) {
    for (int C : {1, 3, 16, 129}) {
        std::vector<double> x(C), dy(C), gain(C), want(C), size(C);
        for (int c = 0; c < C; c++) { x[c] = 0.3 + normal(); dy[c] = normal(); gain[c] = 1.0 + 0.3 * normal(); }
        layernorm_gradient64(want.data(), size.data(), x.data(), dy.data(), gain.data(), C);
        for (int c = 0; c < C; c++) {
            double loss[2], h = 1e-5, kept = x[c];
            for (int side = 0; side < 2; side++) {
                x[c] = kept + (side == 0 ? -h : h);
                Norm64 m = norm64(x.data(), C);
                loss[side] = 0;
                for (int k = 0; k < C; k++) { loss[side] += dy[k] * gain[k] * (x[k] - m.mean) * m.rstd; }
            }
            x[c] = kept;
            expect_near((loss[1] - loss[0]) / (2.0 * h), want[c], 1e-6 * (size[c] + 1.0), "width %d: derivative by x(%d)", C, c);
        }
    }
}

// ---- embedding ----

// Positions of the tokens from … to-1 grouped by token, as the trainer makes them
struct Groups {
    Array<int> order, first, token;
    TokenGroups groups;
    Groups(const int* tokens, int rows, int from, int to) : order(rows), first(rows + 1), token(rows) {
        int used = 0, count = 0;
        for (int i = 0; i < rows; i++) { if (tokens[i] >= from && tokens[i] < to) { order[used++] = i; } }
        std::stable_sort(order.p, order.p + used, [=](int a, int b) { return tokens[a] < tokens[b]; });
        for (int i = 0; i < used; i++) {
            if (i == 0 || tokens[order[i]] != tokens[order[i - 1]]) { token[count] = tokens[order[i]]; first[count++] = i; }
        }
        first[count] = used;
        groups = TokenGroups{order, first, token, count, NULL};
    }
};

template <class T> static void check_embedding(int B, int T_, int C) {
    const int V = 19;
    int rows = B * T_;
    size_t n = (size_t)rows * C;
    Array<T> x(n), plain(n), wte((size_t)V * C), wpe((size_t)(T_ + 2) * C), dx(n);
    Array<int> tokens(rows);
    Array<float> dwte((size_t)V * C), dwpe((size_t)(T_ + 2) * C);
    fill_normal(wte, 0.0, 1.0);
    fill_normal(wpe, 0.0, 1.0);
    fill_normal(dx, 0.0, 1.0);
    for (int i = 0; i < rows; i++) { tokens[i] = i % 3 == 0 ? 7 : i == 1 ? 0 : i == 2 ? V - 1 : (int)(random_u32() % V); }
    run_rows(EmbeddingForward<T>{plain, tokens, wte, NULL, 0, V, T_, C}, rows, NULL);
    run_rows(EmbeddingForward<T>{x, tokens, wte, wpe, 0, V, T_, C}, rows, NULL);
    finish();
    for (int r = 0; r < rows; r++) {
        assert_memory_equal(plain.p + (size_t)r * C, wte.p + (size_t)tokens[r] * C, C * sizeof(T));
        for (int c = 0; c < C; c++) {
            assert_true(to_float(x[r * C + c]) == round_to<T>(to_float(wte[tokens[r] * C + c]) + to_float(wpe[r % T_ * C + c])));
        }
    }
    // gradients: in the order of the positions, so the sum is exact to the bit
    std::vector<float> want((size_t)V * C), want_position((size_t)(T_ + 2) * C, 0.25f);
    for (size_t i = 0; i < want.size(); i++) { dwte[i] = want[i] = (float)normal(); }
    dwpe.fill(0.25f);
    Groups g(tokens, rows, 0, V);
    for (int micro = 0; micro < 2; micro++) {
        run_rows(EmbeddingBackward<T, float, NEAREST>{dwte, dx, g.groups, RandomKey{}, 0, C}, g.groups.groups, NULL);
        run_rows(PositionBackward<T, float, NEAREST>{dwpe, dx, RandomKey{}, B, T_, C, micro > 0}, T_, NULL);
        finish();
        for (int r = 0; r < rows; r++) {
            for (int c = 0; c < C; c++) {
                float d = to_float(dx[r * C + c]);
                want[(size_t)tokens[r] * C + c] += d;
                float& p = want_position[(size_t)(r % T_) * C + c];
                p = micro == 0 && r < T_ ? d : p + d;
            }
        }
        assert_memory_equal(dwte.p, want.data(), want.size() * sizeof(float));
        assert_memory_equal(dwpe.p, want_position.data(), want_position.size() * sizeof(float));  // positions beyond T stay
    }
}

static void embedding_forward_and_backward_are_exact(void**) {
    for (int C : width_list) {
        for (int B : {1, 3}) {
            for (int T_ : {1, 2, 11, 33}) {
                check_embedding<float>(B, T_, C);
                check_embedding<bf16>(B, T_, C);
            }
        }
    }
}

// A table of V tokens cut over ranks, one of which has padding alone: the rows of all of them, added up in their order, are those of one rank with the
// whole table, and so are the gradients of the tokens, with the same random bits
template <class T, class A, Rounding R> static void check_cut_embedding(int B, int T_, int C, bool positions) {
    const int V = 19, cuts[] = {0, 7, 8, 19, 24};  // token 7 has a rank to itself
    int rows = B * T_;
    size_t n = (size_t)rows * C;
    Array<T> whole(n), x(n), wte((size_t)24 * C), wpe((size_t)T_ * C), dx(n);
    Array<int> tokens(rows);
    Array<A> dwte((size_t)24 * C);
    std::vector<float> sum(n);
    fill_normal(wte, 0.0, 1.0);
    fill_normal(wpe, 0.0, 1.0);
    fill_normal(dx, 0.0, 1.0);
    fill_normal(dwte, 0.0, 1.0);
    for (int i = 0; i < rows; i++) {
        tokens[i] = i % 3 == 0 ? 7 : i == 1 ? 0 : i == 2 ? V - 1 : (int)(random_u32() % V);
        from_float(wte[(size_t)tokens[i] * C + i % C], -0.0f);
        from_float(wpe[(size_t)(i % T_) * C + i % C], -0.0f);
    }
    const T* added = positions ? wpe.p : NULL;
    run_rows(EmbeddingForward<T>{whole, tokens, wte, added, 0, V, T_, C}, rows, NULL);
    finish();
    RandomKey key = random_key(3, 1, 4);
    std::vector<A> before(dwte.p, dwte.p + dwte.n);
    Groups all(tokens, rows, 0, V);
    run_rows(EmbeddingBackward<T, A, R>{dwte, dx, all.groups, key, 0, C}, all.groups.groups, NULL);
    finish();
    for (int part = 0; part < 4; part++) {
        int first = cuts[part], count = cuts[part + 1] - first;
        Array<T> own((size_t)count * C);
        Array<A> down((size_t)count * C);
        memcpy((void*)own.p, wte.p + (size_t)first * C, own.n * sizeof(T));
        memcpy((void*)down.p, before.data() + (size_t)first * C, down.n * sizeof(A));
        run_rows(EmbeddingForward<T>{x, tokens, own, added, first, count, T_, C}, rows, NULL);
        Groups g(tokens, rows, first, first + count);
        run_rows(EmbeddingBackward<T, A, R>{down, dx, g.groups, key, first, C}, g.groups.groups, NULL);
        finish();
        for (size_t i = 0; i < n; i++) {
            bool here = tokens[i / C] >= first && tokens[i / C] < first + count;
            assert_true(here || to_float(x[i]) == 0.0f);
            sum[i] = part == 0 ? to_float(x[i]) : sum[i] + to_float(x[i]);
        }
        assert_memory_equal(down.p, dwte.p + (size_t)first * C, down.n * sizeof(A));
    }
    for (size_t i = 0; i < n; i++) { assert_int_equal(float_to_bits(sum[i]), float_to_bits(to_float(whole[i]))); }
}

static void a_cut_embedding_gives_the_same_bits(void**) {
    for (int C : width_list) {
        for (int B : {1, 3}) {
            for (int T_ : {1, 11, 33}) {
                for (bool positions : {false, true}) {
                    check_cut_embedding<float, float, NEAREST>(B, T_, C, positions);
                    check_cut_embedding<bf16, bf16, STOCHASTIC>(B, T_, C, positions);
                }
            }
        }
    }
}

// ---- cross-entropy ----

// Of one part
template <class T> static void cross_entropy(float* losses, T* z, const int* targets, float weight, int rows, int V, int padded, bool backward) {
    Array<float> stats((size_t)rows * LOGIT_STATISTICS);
    run_rows(LogitStatistics<T>{stats, z, targets, 0, V, padded}, rows, NULL);
    run_rows(CrossEntropy<T>{losses, z, stats, 1, 0, targets, weight, 0, V, padded, backward}, rows, NULL);
    finish();
}

enum Logits { NORMAL_LOGITS, LARGE_LOGITS, HUGE_LOGITS, EQUAL_LOGITS, LOGITS };

template <class T> static void check_cross_entropy(int rows, int V, int padded, Logits kind) {
    char text[128];
    snprintf(text, sizeof(text), "cross-entropy, %s, %d rows, %d of %d columns, kind %d", dtype_names[DTypeOf<T>::value], rows, V, padded,
             kind);
    size_t n = (size_t)rows * padded;
    Array<T> z(n), before(n);
    Array<int> targets(rows);
    Array<float> losses(rows);
    const float garbage[] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f, bits_to_float(0xffc00000u)};
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < padded; c++) {
            double x = kind == EQUAL_LOGITS ? 3.0 : normal() * (kind == LARGE_LOGITS ? 80.0 : kind == HUGE_LOGITS ? 1e6 : 1.0);
            from_float(z[r * padded + c], c < V ? (float)x : garbage[(r + c) % 6]);
        }
        targets[r] = r == 0 ? 0 : r == 1 ? V - 1 : (int)(random_u32() % (uint32_t)V);
    }
    memcpy((void*)before.p, z.p, n * sizeof(T));
    float weight = 1.0f / 96.0f;
    cross_entropy<T>(losses, z, targets, weight, rows, V, padded, false);
    assert_memory_equal(before.p, z.p, n * sizeof(T));
    std::vector<float> forward_losses(losses.p, losses.p + rows);
    cross_entropy<T>(losses, z, targets, weight, rows, V, padded, true);
    assert_memory_equal(losses.p, forward_losses.data(), rows * sizeof(float));
    for (int r = 0; r < rows; r++) {
        const T* old = before.p + (size_t)r * padded;
        double top = -INFINITY, total = 0, at_target = (double)to_float(old[targets[r]]), u = 0x1p-24, w = (double)weight, sum = 0;
        for (int c = 0; c < V; c++) { top = fmax(top, (double)to_float(old[c])); }
        for (int c = 0; c < V; c++) { total += exp((double)to_float(old[c]) - top); }
        expect_near((double)losses[r], top + log(total) - at_target, 8.0 * u * (fabs(top) + fabs(at_target) + log(total) + 1.0),
                    "%s: loss of row %d", text, r);
        for (int c = 0; c < padded; c++) {
            double got = (double)to_float(z[r * padded + c]);
            if (c >= V) { assert_true(got == 0.0); continue; }
            double distance = (double)to_float(old[c]) - top, p = exp(distance) / total, want = (p - (c == targets[r] ? 1.0 : 0.0)) * w;
            double allowed = w * u * (p * (32.0 + 2.0 * fabs(distance)) + (c == targets[r] ? 4.0 : 0.0)) + 1e-37;
            expect_near(got, want, allowed + (fabs(want) + allowed) * rounding_of<T>(), "%s: gradient (%d, %d)", text, r, c);
            sum += got;
        }
        expect_near(sum, 0.0, w * (64.0 * u + 2.0 * rounding_of<T>()), "%s: gradients of row %d sum to 0", text, r);
    }
}

static void cross_entropy_matches_float64(void**) {
    for (int rows : {1, 2, 33}) {
        for (int V : {1, 3, 17, 50, 128, 300}) {
            for (int padded : {V, V + 1, round_up(V, 128), round_up(V, 128) + 128}) {
                for (int kind = 0; kind < LOGITS; kind++) {
                    check_cross_entropy<float>(rows, V, padded, (Logits)kind);
                    check_cross_entropy<bf16>(rows, V, padded, (Logits)kind);
                }
            }
        }
    }
}

// A logit that is not finite must be seen in the loss, in whichever column of the vocabulary it is; -inf is a token that cannot come.
static void non_finite_logits_show_in_the_loss(void**) {
    const int V = 50, padded = 64;
    for (int at : {0, 7, 31, 49}) {
        for (float bad : {NAN, bits_to_float(0xffc00000u), INFINITY}) {
            Array<float> z(2 * padded), losses(2);
            Array<int> targets(2);
            fill_normal(z, 0.0, 1.0);
            targets[0] = 7;
            targets[1] = 7;
            z[at] = bad;
            cross_entropy<float>(losses, z, targets, 1.0f, 2, V, padded, true);
            assert_false(isfinite(losses[0]));
            assert_true(isfinite(losses[1]));
        }
    }
    Array<float> z(padded), losses(1);
    Array<int> targets(1);
    fill_normal(z, 0.0, 1.0);
    z[3] = -INFINITY;
    targets[0] = 7;
    cross_entropy<float>(losses, z, targets, 1.0f, 1, V, padded, true);
    assert_true(isfinite(losses[0]) && z[3] == 0.0f);
}

// The columns of z (rows, V) cut over ranks: part p has `counts[p]` of them and some of padding. Loss and gradient of each part into losses
// (parts, rows) and, put together again, z; false: a gradient of padding is not 0.
template <class T> static bool cut_cross_entropy(float* losses, T* z, const int* targets, float weight, int rows, int V, const std::vector<int>& counts) {
    int parts = (int)counts.size(), first = 0;
    size_t stride = (size_t)rows * LOGIT_STATISTICS + 5;  // the parts need not lie side by side
    Array<float> stats((size_t)parts * stride);
    const float garbage[] = {NAN, INFINITY, -INFINITY, 1e30f};
    bool good = true;
    for (bool second : {false, true}) {
        first = 0;
        for (int p = 0; p < parts; p++) {
            int count = counts[p], padded = round_up(max_of(count, 1), 4 - p % 3);
            Array<T> own((size_t)rows * padded);
            for (int i = 0; i < rows * padded; i++) {
                int r = i / padded, c = i % padded;
                if (c < count) { own[i] = z[(size_t)r * V + first + c]; }
                else { from_float(own[i], garbage[i % 4]); }
            }
            if (!second) { run_rows(LogitStatistics<T>{stats + p * stride, own, targets, first, count, padded}, rows, NULL); }
            else {
                run_rows(CrossEntropy<T>{losses + p * rows, own, stats, parts, stride, targets, weight, first, count, padded, true}, rows, NULL);
            }
            finish();
            for (int i = 0; second && i < rows * padded; i++) {
                int r = i / padded, c = i % padded;
                if (c < count) { z[(size_t)r * V + first + c] = own[i]; }
                else { good = good && float_to_bits(to_float(own[i])) == 0; }
            }
            first += count;
        }
    }
    assert_int_equal(first, V);
    return good;
}

static std::vector<std::vector<int>> cuts_of(int V) {
    int third = V / 3, fifth = V / 5;
    return {{V / 2, V - V / 2}, {1, V - 1}, {V, 0}, {third, V - third, 0}, {fifth, 2 * fifth, 0, fifth, V - 4 * fifth}, {V - fifth, 0, fifth, 0, 0}};
}

// The greatest logit is the same number however the columns are cut, so that of loss and gradient only the sum of the exponentials differs: by its own
// rounding and by that of two exponents, each twice
template <class T> static void check_cut_cross_entropy(int rows, int V, Logits kind) {
    size_t n = (size_t)rows * V;
    Array<T> z(n), before(n), uncut(n);
    Array<int> targets(rows);
    Array<float> want(rows);
    for (size_t i = 0; i < n; i++) {
        from_float(before[i], (float)(kind == EQUAL_LOGITS ? 3.0 : normal() * (kind == LARGE_LOGITS ? 80.0 : kind == HUGE_LOGITS ? 1e6 : 1.0)));
    }
    memcpy((void*)uncut.p, before.p, n * sizeof(T));
    for (int r = 0; r < rows; r++) { targets[r] = r < 8 ? r * V / 8 : r < 16 ? max_of(0, V - 1 - (r - 8) * V / 8) : (int)(random_u32() % (uint32_t)V); }
    float weight = 1.0f / 96.0f;
    cross_entropy<T>(want, uncut, targets, weight, rows, V, V, true);
    for (const std::vector<int>& counts : cuts_of(V)) {
        int parts = (int)counts.size();
        char text[128];
        snprintf(text, sizeof(text), "%s, %d rows of %d, kind %d, %d parts, %d first", dtype_names[DTypeOf<T>::value], rows, V, kind, parts, counts[0]);
        Array<float> losses((size_t)parts * rows);
        memcpy((void*)z.p, before.p, n * sizeof(T));
        if (!cut_cross_entropy<T>(losses, z, targets, weight, rows, V, counts)) { fail_msg("%s: padding has a gradient", text); }
        for (int p = 1; p < parts; p++) { assert_memory_equal(losses + p * rows, losses.p, rows * sizeof(float)); }
        for (int r = 0; r < rows; r++) {
            double top = -INFINITY, total = 0, spread = 0, u = 0x1p-24;
            for (int c = 0; c < V; c++) { top = fmax(top, (double)to_float(before[(size_t)r * V + c])); }
            for (int c = 0; c < V; c++) {
                double d = (double)to_float(before[(size_t)r * V + c]) - top;
                total += exp(d);
                spread -= exp(d) * d;
            }
            double relative = u * (16.0 + 2.0 * spread / total), at_target = (double)to_float(before[(size_t)r * V + targets[r]]);
            double rounding = u * (2.0 * log(total) + 2.0 * fabs(top + log(total)) + 2.0 * fabs(top + log(total) - at_target));
            expect_near((double)losses[r], (double)want[r], relative + rounding, "%s: loss of row %d", text, r);
            for (int c = 0; c < V; c++) {
                size_t i = (size_t)r * V + c;
                double p = exp((double)to_float(before[i]) - top) / total, g = (double)to_float(uncut[i]), w = (double)weight;
                double allowed = relative * p * w + 2.0 * u * (p * w + fabs(g)) + 1e-37;
                expect_near((double)to_float(z[i]), g, allowed + 2.0 * (fabs(g) + allowed) * rounding_of<T>(), "%s: gradient (%d, %d)", text, r, c);
            }
        }
    }
}

static void cut_columns_give_the_loss_and_gradient_of_all(void**) {
    for (int rows : {1, 33}) {
        for (int V : {5, 17, 128, 300}) {
            for (int kind = 0; kind < LOGITS; kind++) {
                check_cut_cross_entropy<float>(rows, V, (Logits)kind);
                check_cut_cross_entropy<bf16>(rows, V, (Logits)kind);
            }
        }
    }
}

// Whichever rank has it, all see it; and tokens that cannot come, if a rank had nothing else, do no harm
static void non_finite_logits_show_in_the_loss_of_all_parts(void**) {
    const int V = 50;
    for (const std::vector<int>& counts : cuts_of(V)) {
        int parts = (int)counts.size();
        for (int at : {0, 7, 31, 49}) {
            for (float bad : {NAN, bits_to_float(0xffc00000u), INFINITY}) {
                Array<float> z(2 * V), losses((size_t)parts * 2);
                Array<int> targets(2);
                fill_normal(z, 0.0, 1.0);
                targets.fill(7);
                z[at] = bad;
                cut_cross_entropy<float>(losses, z, targets, 1.0f, 2, V, counts);
                for (int p = 0; p < parts; p++) { assert_true(!isfinite(losses[2 * p]) && isfinite(losses[2 * p + 1])); }
            }
        }
        Array<float> z(V), uncut(V), losses(parts), want(1);
        Array<int> targets(1);
        fill_normal(z, 0.0, 1.0);
        for (int c = 0; c < counts[0] && c < V - 1; c++) { z[c] = -INFINITY; }
        memcpy(uncut.p, z.p, V * sizeof(float));
        targets[0] = V - 1;
        cross_entropy<float>(want, uncut, targets, 1.0f, 1, V, V, true);
        cut_cross_entropy<float>(losses, z, targets, 1.0f, 1, V, counts);
        for (int p = 0; p < parts; p++) { expect_near((double)losses[p], (double)want[0], 1e-6, "loss"); }
        for (int c = 0; c < V; c++) { expect_near((double)z[c], (double)uncut[c], 1e-6, "gradient"); }
    }
}

// A row without a target: loss 0 and a gradient of +0, whatever its logits and wherever their columns are; the other rows are bit for bit what they are beside
// rows that count. Fails where it counts after all, or where NaN times 0 comes through
template <class T> static void check_rows_without_a_target(int rows, int V) {
    size_t n = (size_t)rows * V;
    Array<T> z(n), all(n), logits(n);
    Array<int> targets(rows), some(rows);
    Array<float> want(rows), losses(rows);
    for (int r = 0; r < rows; r++) {
        targets[r] = some[r] = (int)(random_u32() % (uint32_t)V);
        bool counts = r % 5 == 1 || r % 7 == 3;
        if (!counts) { some[r] = -1; }
        for (int c = 0; c < V; c++) { from_float(logits[(size_t)r * V + c], counts || r % 3 > 0 ? (float)(3.0 * normal()) : c == r % V ? NAN : INFINITY); }
    }
    memcpy((void*)all.p, logits.p, n * sizeof(T));
    cross_entropy<T>(want, all, targets, 0.125f, rows, V, V, true);
    auto expect = [&](const float* found, const char* what) {
        for (int r = 0; r < rows; r++) {
            if (float_to_bits(found[r]) != (some[r] < 0 ? 0 : float_to_bits(want[r]))) { fail_msg("%s: loss %g of row %d, not %g", what, (double)found[r], r, (double)want[r]); }
        }
    };
    memcpy((void*)z.p, logits.p, n * sizeof(T));
    cross_entropy<T>(losses, z, some, 0.125f, rows, V, V, false);
    expect(losses, "forward");
    assert_memory_equal(z.p, logits.p, n * sizeof(T));
    cross_entropy<T>(losses, z, some, 0.125f, rows, V, V, true);
    expect(losses, "backward");
    for (size_t i = 0; i < n; i++) { assert_int_equal(float_to_bits(to_float(z[i])), some[i / V] < 0 ? 0 : float_to_bits(to_float(all[i]))); }
    for (const std::vector<int>& counts : cuts_of(V)) {
        int parts = (int)counts.size();
        Array<float> cut((size_t)parts * rows), cut_want((size_t)parts * rows);
        memcpy((void*)z.p, logits.p, n * sizeof(T));
        memcpy((void*)all.p, logits.p, n * sizeof(T));
        assert_true(cut_cross_entropy<T>(cut_want, all, targets, 0.125f, rows, V, counts));
        assert_true(cut_cross_entropy<T>(cut, z, some, 0.125f, rows, V, counts));
        memcpy(want.p, cut_want.p, rows * sizeof(float));
        for (int p = 0; p < parts; p++) { expect(cut + p * rows, "cut"); }
        for (size_t i = 0; i < n; i++) { assert_int_equal(float_to_bits(to_float(z[i])), some[i / V] < 0 ? 0 : float_to_bits(to_float(all[i]))); }
    }
}

static void rows_without_a_target_have_neither_loss_nor_gradient(void**) {
    for (int rows : {1, 2, 33}) {
        for (int V : {5, 17, 128, 300}) {
            check_rows_without_a_target<float>(rows, V);
            check_rows_without_a_target<bf16>(rows, V);
        }
    }
}

static void losses_are_added_in_float64(void**) {
    const int n = 1000;
    Array<float> losses(n);
    Array<int> targets(n);
    Array<LossTotal> total(1);
    double want = total[0].loss = 0.125, counted = total[0].counted = 16777217.0;  // which no float32 is
    for (int i = 0; i < n; i++) {
        targets[i] = i % 3 == 0 ? -1 : i % 3 - 1;  // token 0 is a token
        counted += i % 3 == 0 ? 0.0 : 1.0;
    }
    losses[0] = 1e9f;  // in float32 the rest would be lost
    for (int i = 1; i < n; i++) { losses[i] = (float)uniform(0.0, 1.0); }
    double sum = 0.0;
    for (int i = 0; i < n; i++) { sum += (double)losses[i]; }
    run_rows(AddLosses{total, losses, targets, n}, 1, NULL);
    finish();
    assert_true(total[0].counted == counted);
    assert_true(fabs(total[0].loss - (want + sum)) < 2.0 * n * 0x1p-53 * 1e9);  // float32 is off by 32
}

// ---- threads ----

template <class T> static void append(std::vector<char>* all, const Array<T>& x) {
    all->insert(all->end(), (const char*)x.p, (const char*)(x.p + x.n));
}

// Every kernel that the trainer runs, on 1, 2 and 3 threads
static void results_do_not_depend_on_threads(void**) {
    const int rows = 321, C = 129, V = 100;
    Inputs<bf16> in(rows, C);
    Array<bf16> delta(rows * C), z(rows * C), wte(V * C);
    Array<int> tokens(rows);
    fill_normal(delta, 0.0, 1.0);
    fill_normal(z, 0.0, 1.0);
    fill_normal(wte, 0.0, 1.0);
    for (int i = 0; i < rows; i++) { tokens[i] = (int)(random_u32() % V); }
    Groups g(tokens, rows, 0, V);
    std::vector<char> first;
    for (int threads = 1; threads <= 3; threads++) {
        Array<e5m2> y(rows * C);
        Array<e4m3> normed(rows * C);
        Array<bf16> sum(rows * C), dx(rows * C), logits(rows * C), x(rows * C), raw(rows * C), added(rows * C);
        Array<float> slot(4), slot_normed(4), partial((size_t)2 * most_norm_strips(rows) * C), grad(C), dgain(C), dbias(C), mean(rows), rstd(rows),
            losses(rows), dwte(V * C), dwpe(107 * C);
        SiteArrays s;
        slot.fill(0.0f);
        slot_normed.fill(1.0f);
        dwte.fill(0.0f);
        memcpy((void*)logits.p, z.p, z.n * sizeof(bf16));
        LayerNormInputs l = {sum, in.x, delta, in.gain, in.bias, mean, rstd};
        LayerNormInputs kept = {NULL, sum, NULL, in.gain, in.bias, mean, rstd};
        with_threads(threads, [&] {
            produce_kind(GELU_GRAD, Tensor{y, E5M2, slot}, partial, in, Quantisation{&s.sites, SITE, false, true, false, NULL}, NULL);
            finish_columns(grad, partial, strips_of(rows), C, false, NULL);
            layernorm_forward(Tensor{normed, E4M3, slot_normed}, l, BF16, Quantisation{&s.sites, 2, true, true, false, NULL}, raw, rows, C, NULL);
            layernorm_backward(dx, dgain, dbias, partial, in.dy, kept, BF16, false, false, rows, C, NULL);
            run_rows(EmbeddingForward<bf16>{x, tokens, wte, NULL, 0, V, rows, C}, rows, NULL);
            run_rows(EmbeddingBackward<bf16, float, NEAREST>{dwte, in.dy, g.groups, RandomKey{}, 0, C}, g.groups.groups, NULL);
            run_rows(PositionBackward<bf16, float, NEAREST>{dwpe, in.dy, RandomKey{}, 3, 107, C, false}, 107, NULL);
            cross_entropy<bf16>(losses, logits, tokens, 0.125f, rows, V, C, true);
            run_rows(AddRows<bf16>{added, in.x, delta, C}, rows, NULL);
        });
        finish();
        std::vector<char> all;
        append(&all, y); append(&all, grad); append(&all, s.amax); append(&all, slot_normed); append(&all, normed); append(&all, sum);
        append(&all, mean); append(&all, rstd); append(&all, dx); append(&all, dgain); append(&all, dbias); append(&all, x);
        append(&all, dwte); append(&all, dwpe); append(&all, losses); append(&all, logits);
        append(&all, added);
        if (threads == 1) { first = all; }
        assert_true(all == first);
    }
}

#ifdef USE_CUDA
// What a GPU makes transposed is what it makes otherwise, with zeros behind the last row
static void transposed_codes_are_the_same_codes(void**) {
    const int sizes[][2] = {{1, 1}, {3, 7}, {16, 8}, {33, 264}, {70, 255}, {31, 256}, {64, 1000}, {130, 520}};
    for (auto& size : sizes) {
        int rows = size[0], C = size[1];
        int64_t ld = round_up(rows, 16);
        Array<bf16> x((size_t)rows * C), dy((size_t)rows * C);
        fill_normal(x, 0.0, 1.5);
        fill_normal(dy, 0.0, 1.5);
        Array<e5m2> y((size_t)rows * C), turned((size_t)C * ld), alone((size_t)C * ld);
        Array<float> slot(4), partial((size_t)strips_of(rows) * C), grad(C);
        Array<uint32_t> amax(1);
        amax.fill(0);
        slot.fill(0.5f);
        slot[1] = 64.0f;
        Sites sites = {};
        sites.amax = sites.current = amax;
        sites.slots = slot;
        Array<float> own(4);
        auto make = [&](Tensor out, float* sums) {
            const bf16 *px = x, *pd = dy;
            produce(out, sums, [=](auto) { return GeluGradSource<bf16>{pd, px}; }, BF16, Quantisation{&sites, 0, false, true, false, NULL}, NULL, rows, C, NULL);
        };
        make(Tensor{y, E5M2, own, turned, ld}, partial);
        make(Tensor{NULL, E5M2, own, alone, ld}, NULL);
        finish_columns(grad, partial, strips_of(rows), C, false, NULL);
        finish();
        for (int c = 0; c < C; c++) {
            for (int r = 0; r < ld; r++) {
                int want = r < rows ? y[(size_t)r * C + c].bits : 0;
                assert_int_equal(turned[(size_t)c * ld + r].bits, want);
                assert_int_equal(alone[(size_t)c * ld + r].bits, want);
            }
        }
    }
}
#endif

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argc, argv); }
    const struct CMUnitTest tests[] = {
        
#ifdef USE_CUDA
        cmocka_unit_test(transposed_codes_are_the_same_codes),
#endif
        cmocka_unit_test(types_without_a_kernel_are_refused),
        cmocka_unit_test(sources_match_float64_in_fp32),
        cmocka_unit_test(sources_match_float64_in_bf16),
        cmocka_unit_test(gelu_of_extreme_numbers),
        cmocka_unit_test(gelu_is_as_defined_and_its_slope_is_its_derivative),
        cmocka_unit_test(codes_scales_and_amaxes_are_exact), cmocka_unit_test(codes_and_scales_of_blocks_are_exact),
        cmocka_unit_test(layernorm_in_blocks_is_the_same_fused_and_recomputed), cmocka_unit_test(blocks_keep_what_outliers_cost_a_tensor),
        cmocka_unit_test(the_amax_is_the_maximum_over_micro_batches),
        cmocka_unit_test(nan_and_inf_are_not_lost),
        cmocka_unit_test(one_rank_keeps_its_scale), cmocka_unit_test(two_ranks_share_a_scale), cmocka_unit_test(three_ranks_share_a_scale),
        cmocka_unit_test(a_tensor_of_zeros_keeps_its_scale),
        cmocka_unit_test(sites_take_the_maximum_of_sixteen_steps),
        cmocka_unit_test(a_skipped_step_is_not_in_the_history), cmocka_unit_test(an_outlier_leaves_the_window_after_sixteen_steps),
        cmocka_unit_test(column_sums_are_added_to_the_gradient),
        cmocka_unit_test(layernorm_matches_float64),
        cmocka_unit_test(layernorm_of_constant_and_non_finite_rows),
        cmocka_unit_test(layernorm_codes_are_the_same_fused_in_two_passes_and_recomputed),
        cmocka_unit_test(layernorm_backward_matches_float64),
        cmocka_unit_test(the_gradient_of_layernorm_is_its_derivative),
        cmocka_unit_test(embedding_forward_and_backward_are_exact),
        cmocka_unit_test(a_cut_embedding_gives_the_same_bits),
        cmocka_unit_test(cross_entropy_matches_float64),
        cmocka_unit_test(non_finite_logits_show_in_the_loss),
        cmocka_unit_test(cut_columns_give_the_loss_and_gradient_of_all),
        cmocka_unit_test(non_finite_logits_show_in_the_loss_of_all_parts),
        cmocka_unit_test(rows_without_a_target_have_neither_loss_nor_gradient), cmocka_unit_test(losses_are_added_in_float64),
        cmocka_unit_test(results_do_not_depend_on_threads),
    };
    return RUN_TESTS(tests);
}
