// Tests of core/matmul.cuh: against integer and float64 arithmetic, in every combination of layouts and formats; gaps between rows and
// matrices hold NaN (read by mistake they show) or sentinels (written by mistake they show), and so does the workspace. What the CUDA build
// does with a shape is a pure function and tested here too; its multiplication is tested where a GPU is.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
extern "C" {
#include <cmocka.h>
}
#include <fcntl.h>
#include <sys/wait.h>
#include "../core/matmul.cuh"

// ---- a call with its memory, and its oracle ----

struct Random { uint64_t state; };
static uint32_t next_random(Random* r) { return (uint32_t)(mix64(r->state++) >> 32); }
static float next_normal(Random* r) {  // about: a sum of four
    double s = 0;
    for (int i = 0; i < 4; i++) { s += (double)next_random(r) / 4294967296.0 - 0.5; }
    return (float)(s * 1.7320508);
}

static void encode_at(void* p, DType t, size_t i, float x) {
    if (t == FP32) { ((float*)p)[i] = x; }
    if (t == BF16) { from_float(((bf16*)p)[i], x); }
    if (t == E4M3) { from_float(((e4m3*)p)[i], x); }
    if (t == E5M2) { from_float(((e5m2*)p)[i], x); }
}
static float decode_at(const void* p, DType t, size_t i) {
    return t == FP32 ? ((const float*)p)[i] : t == BF16 ? to_float(((const bf16*)p)[i]) : t == E4M3 ? to_float(((const e4m3*)p)[i])
                                                                                             : to_float(((const e5m2*)p)[i]);
}

struct Case {
    int m, n, k, batch;
    DType a, b, d;
    bool ta, tb, accumulate;
    int bias;               // 0 none, else 1 + its type
    int gap;                // elements added to each leading dimension and to each batch stride
    float a_descale, b_descale;
    int no_gap = 0;         // bits: of A's, B's, D's leading dimension (1, 2, 4), of A's, B's, D's batch stride (8, 16, 32)
    OperandScale a_scaling = SCALE_TENSOR, b_scaling = SCALE_TENSOR;  // by block: descales around a_descale and b_descale
};

struct Setup {
    MatmulCall call;
    size_t a_size, b_size, d_size;
    std::vector<float> before;  // D's elements before the call
};

constexpr float SENTINEL = -77.0f;

static int64_t index_of(const Operand* x, int batch, int row, int col) {  // element (row, col) of A (m, k) or B (k, n)
    return batch * x->batch_stride + (x->transposed ? (int64_t)col * x->ld + row : (int64_t)row * x->ld + col);
}

static float* one_float(float x) {
    float* p = (float*)device_alloc(16);
    *p = x;
    return p;
}

// Where the descale of element (outer, k) is, of an operand scaled by block, and how many there are
static size_t descale_index(OperandScale s, int outer, int k, int outers, int ks) {
    int blocks = (ks + 127) / 128;
    return s == SCALE_VEC128 ? (size_t)(k / 128) * outers + outer : (size_t)(outer / 128) * ((blocks + 3) / 4 * 4) + k / 128;
}
// One of 1/2, 1 and 2 times `around` a block; NaN where there is none
static float* block_descales(OperandScale s, int outers, int ks, float around, Random* random) {
    size_t n = s == SCALE_VEC128 ? (size_t)((ks + 127) / 128) * outers : (size_t)((outers + 127) / 128) * (((ks + 127) / 128 + 3) / 4 * 4);
    float* d = (float*)device_alloc(n * sizeof(float));
    for (size_t i = 0; i < n; i++) { d[i] = NAN; }
    for (int o = 0; o < outers; o += s == SCALE_VEC128 ? 1 : 128) {
        for (int k = 0; k < ks; k += 128) { d[descale_index(s, o, k, outers, ks)] = around * 0.5f * (float)(1 << next_random(random) % 3); }
    }
    return d;
}

// values(random, which): an element of A (0), B (1), bias (2), D (3)
template <class Values> static Setup set_up(const Case& s, Random* random, Values values) {
    Setup r;
    MatmulCall c = {};
    int a_rows = s.ta ? s.k : s.m, a_cols = s.ta ? s.m : s.k, b_rows = s.tb ? s.n : s.k, b_cols = s.tb ? s.k : s.n;
    c.m = s.m; c.n = s.n; c.k = s.k; c.batch = s.batch;
    c.a.dtype = s.a; c.b.dtype = s.b; c.d_dtype = s.d;
    c.a.transposed = s.ta; c.b.transposed = s.tb;
    auto gap = [&](int bit) { return s.no_gap & bit ? 0 : s.gap; };
    c.a.ld = max_of(a_cols, 1) + gap(1); c.b.ld = max_of(b_cols, 1) + gap(2); c.d_ld = max_of(s.n, 1) + gap(4);
    if (s.batch > 1) {
        c.a.batch_stride = c.a.ld * a_rows + gap(8);
        c.b.batch_stride = c.b.ld * b_rows + gap(16);
        c.d_batch_stride = c.d_ld * s.m + gap(32);
    }
    r.a_size = (size_t)(s.batch * max_of(c.a.batch_stride, c.a.ld * a_rows) + 1);
    r.b_size = (size_t)(s.batch * max_of(c.b.batch_stride, c.b.ld * b_rows) + 1);
    r.d_size = (size_t)(s.batch * max_of(c.d_batch_stride, c.d_ld * s.m) + 1);
    void* a = device_alloc(r.a_size * dtype_bytes(s.a));
    void* b = device_alloc(r.b_size * dtype_bytes(s.b));
    c.d = device_alloc(r.d_size * dtype_bytes(s.d));
    for (size_t i = 0; i < r.a_size; i++) { encode_at(a, s.a, i, NAN); }
    for (size_t i = 0; i < r.b_size; i++) { encode_at(b, s.b, i, NAN); }
    for (size_t i = 0; i < r.d_size; i++) { encode_at(c.d, s.d, i, SENTINEL); }
    for (int l = 0; l < s.batch; l++) {
        for (int i = 0; i < s.m; i++) {
            for (int j = 0; j < s.k; j++) { encode_at(a, s.a, (size_t)index_of(&c.a, l, i, j), values(random, 0)); }
        }
        for (int i = 0; i < s.k; i++) {
            for (int j = 0; j < s.n; j++) { encode_at(b, s.b, (size_t)index_of(&c.b, l, i, j), values(random, 1)); }
        }
        for (int i = 0; i < s.m; i++) {
            for (int j = 0; j < s.n; j++) {  // where nothing is added to it D starts as NaN: it must not be read
                float x = s.accumulate ? values(random, 3) : NAN;
                encode_at(c.d, s.d, (size_t)(l * c.d_batch_stride + i * c.d_ld + j), x);
            }
        }
    }
    c.a.data = a; c.b.data = b;
    c.a.descale = is_fp8(s.a) ? one_float(s.a_descale) : NULL;
    c.b.descale = is_fp8(s.b) && s.b_descale != 1.0f ? one_float(s.b_descale) : NULL;  // NULL means 1
    c.a.scaling = s.a_scaling; c.b.scaling = s.b_scaling;
    if (s.a_scaling != SCALE_TENSOR) {
        device_free((void*)c.a.descale); device_free((void*)c.b.descale);
        c.a.descale = block_descales(s.a_scaling, s.m, s.k, s.a_descale, random);
        c.b.descale = block_descales(s.b_scaling, s.n, s.k, s.b_descale, random);
    }
    if (s.bias > 0) {
        c.bias_dtype = (DType)(s.bias - 1);
        void* bias = device_alloc((size_t)max_of(s.n, 1) * 4);
        for (int j = 0; j < s.n; j++) { encode_at(bias, c.bias_dtype, (size_t)j, values(random, 2)); }
        c.bias = bias;
    }
    c.accumulate = s.accumulate;
    r.before.resize(r.d_size);
    for (size_t i = 0; i < r.d_size; i++) { r.before[i] = decode_at(c.d, s.d, i); }
    r.call = c;
    return r;
}

static void tear_down(Setup* r) {
    device_free((void*)r->call.a.data); device_free((void*)r->call.b.data); device_free(r->call.d);
    device_free((void*)r->call.a.descale); device_free((void*)r->call.b.descale); device_free((void*)r->call.bias);
}

// The call through plan and workspace, the workspace full of NaN
static void multiply(Matmul* mm, const MatmulCall* c) {
    MatmulCall dry = *c;    // a plan reads no pointer
    dry.d = NULL; dry.a.data = NULL; dry.b.data = NULL; dry.a.descale = NULL; dry.b.descale = NULL;
    dry.bias = c->bias != NULL ? (const void*)1 : NULL;
    size_t bytes = matmul_plan(mm, &dry);
    assert_true(bytes <= mm->planned);
    char* w = (char*)device_alloc(bytes + 256);
    memset(w, 0xff, bytes + 256);
    matmul_set_workspace(mm, w, bytes);
    matmul(mm, c, NULL);
    for (size_t i = bytes; i < bytes + 256; i++) { assert_int_equal((unsigned char)w[i], 0xff); }  // nothing beyond the plan is written
    matmul_set_workspace(mm, NULL, 0);
    device_free(w);
}

static void describe_case(char* text, size_t size, const Case& s) {
    snprintf(text, size, "(%d, %d, %d) batch %d %s%s x %s%s -> %s%s bias %d gap %d", s.m, s.n, s.k, s.batch, dtype_names[s.a],
             s.ta ? "^T" : "", dtype_names[s.b], s.tb ? "^T" : "", dtype_names[s.d], s.accumulate ? "+=" : "", s.bias, s.gap);
}

// Each element within `units`·2⁻²⁴·Σ|…| of float64 (and half a BF16 unit more for BF16 D); exactly the rounded sum if units is 0; gaps
// untouched.
static void check(const Case& s, const Setup& r, double units) {
    const MatmulCall* c = &r.call;
    std::vector<bool> written(r.d_size, false);
    std::vector<double> a((size_t)s.m * s.k), b((size_t)s.k * s.n), sum((size_t)s.n), size((size_t)s.n);
    char text[200];
    describe_case(text, sizeof(text), s);
    for (int l = 0; l < s.batch; l++) {
        for (int i = 0; i < s.m; i++) {
            for (int x = 0; x < s.k; x++) {
                double descale = s.a_scaling == SCALE_TENSOR ? s.a_descale : c->a.descale[descale_index(s.a_scaling, i, x, s.m, s.k)];
                a[(size_t)i * s.k + x] = (double)decode_at(c->a.data, s.a, (size_t)index_of(&c->a, l, i, x)) * descale;
            }
        }
        for (int x = 0; x < s.k; x++) {
            for (int j = 0; j < s.n; j++) {
                double descale = s.b_scaling == SCALE_TENSOR ? s.b_descale : c->b.descale[descale_index(s.b_scaling, j, x, s.n, s.k)];
                b[(size_t)x * s.n + j] = (double)decode_at(c->b.data, s.b, (size_t)index_of(&c->b, l, x, j)) * descale;
            }
        }
        for (int i = 0; i < s.m; i++) {
            for (int j = 0; j < s.n; j++) { sum[(size_t)j] = size[(size_t)j] = 0; }
            for (int x = 0; x < s.k; x++) {
                for (int j = 0; j < s.n; j++) {
                    double p = a[(size_t)i * s.k + x] * b[(size_t)x * s.n + j];
                    sum[(size_t)j] += p;
                    size[(size_t)j] += fabs(p);
                }
            }
            for (int j = 0; j < s.n; j++) {
                size_t at = (size_t)(l * c->d_batch_stride + i * c->d_ld + j);
                double bias = c->bias != NULL ? decode_at(c->bias, c->bias_dtype, (size_t)j) : 0.0, old = s.accumulate ? r.before[at] : 0.0;
                double want = sum[(size_t)j] + bias + old, got = decode_at(c->d, s.d, at);
                double allowed = units * 0x1p-24 * (size[(size_t)j] + fabs(bias) + fabs(old));
                if (units == 0 && s.d == BF16) { want = round_to<bf16>((float)want); }
                if (units > 0 && s.d == BF16) { allowed += fmax(fabs(want) + allowed, 0x1p-126) * 0x1p-8; }
                if (!(fabs(got - want) <= allowed)) {
                    fail_msg("%s: D[%d](%d, %d) is %.9g, should be %.9g, allowed error %.3g", text, l, i, j, got, want, allowed);
                }
                written[at] = true;
            }
        }
    }
    for (size_t i = 0; i < r.d_size; i++) {
        if (!written[i] && decode_at(c->d, s.d, i) != SENTINEL) { fail_msg("%s: a gap of D is overwritten at element %zu", text, i); }
    }
}

static float small_integer(Random* r, int which) {
    return which < 2 ? (float)((int)(next_random(r) % 9) - 4) : (float)((int)(next_random(r) % 101) - 50);
}
static float normal_value(Random* r, int) { return next_normal(r); }

struct Pair { DType a, b; };
static const Pair pairs[] = {{FP32, FP32}, {BF16, BF16}, {E4M3, E4M3}, {E4M3, E5M2}, {E5M2, E4M3}, {BF16, E5M2}, {E4M3, BF16}};

static void run_case(Matmul* mm, const Case& s, Random* random, bool exact) {
    Setup r = exact ? set_up(s, random, small_integer) : set_up(s, random, normal_value);
    multiply(mm, &r.call);
    check(s, r, exact ? 0 : 16);
    tear_down(&r);
}

static const int awkward[] = {1, 3, 17, 31, 33, 127, 129};

// ---- sums ----

// Integers that any format holds and any order adds exactly: every layout, format and size gives the very sum.
static void integer_sums_are_exact(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {1};
    int variant = 0;
    for (int round = 0; round < 14; round++) {
        int m = awkward[round % 7], n = awkward[(round * 2 + 3) % 7], k = awkward[(round * 3 + round / 7) % 7];
        for (Pair p : pairs) {
            for (int t = 0; t < 4; t++) {
                for (int d = 0; d < 3; d++) {  // FP32, FP32 +=, BF16
                    variant++;
                    Case s = {m, n, k, variant % 5 == 0 ? 3 : 1, p.a, p.b, d < 2 ? FP32 : BF16, (t & 1) != 0, (t & 2) != 0, d == 1,
                              variant % 4 == 1 ? 1 + FP32 : variant % 4 == 2 ? 1 + BF16 : 0, variant % 3 == 0 ? 5 : 0, 1.0f, 1.0f};
                    run_case(&mm, s, &random, true);
                }
            }
        }
    }
    matmul_destroy(&mm);
}

// All options against all others, at one size.
static void options_combine(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {2};
    for (Pair p : pairs) {
        for (int t = 0; t < 4; t++) {
            for (int d = 0; d < 4; d++) {
                for (int bias = 0; bias < 3; bias++) {
                    for (int gap = 0; gap <= 16; gap += 16) {
                        for (int batch = 1; batch <= 2; batch++) {
                            DType to = d < 2 ? FP32 : BF16;
                            Case s = {19, 37, 21, batch, p.a, p.b, to, (t & 1) != 0, (t & 2) != 0, d % 2 == 1, bias, gap, 1.0f, 1.0f};
                            run_case(&mm, s, &random, true);
                        }
                    }
                }
            }
        }
    }
    matmul_destroy(&mm);
}

// Operands scaled by block: integers times 1/2, 1 or 2 are added exactly too, in every layout; last blocks are short. Scales far from 1 cancel.
static void sums_of_blocks_are_exact(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {12};
    const OperandScale scalings[][2] = {{SCALE_VEC128, SCALE_VEC128}, {SCALE_VEC128, SCALE_BLK128}, {SCALE_BLK128, SCALE_VEC128}};
    const DType types[][2] = {{E4M3, E4M3}, {E5M2, E4M3}, {E4M3, E5M2}};
    const int sizes[][3] = {{1, 1, 1}, {3, 130, 127}, {129, 17, 128}, {33, 257, 129}, {128, 128, 256}, {150, 140, 300}};
    int variant = 0;
    for (auto& size : sizes) {
        for (auto& scaling : scalings) {
            for (auto& type : types) {
                for (int t = 0; t < 4; t++) {
                    for (int d = 0; d < 3; d++) {  // FP32, FP32 +=, BF16
                        variant++;
                        float far = variant % 5 == 0 ? 0x1p110f : 1.0f;
                        Case s = {size[0], size[1], size[2], 1, type[0], type[1], d < 2 ? FP32 : BF16, (t & 1) != 0, (t & 2) != 0, d == 1,
                                  variant % 4 == 1 ? 1 + FP32 : variant % 4 == 2 ? 1 + BF16 : 0, variant % 3 == 0 ? 5 : 0, far, 1.0f / far, 0, scaling[0], scaling[1]};
                        run_case(&mm, s, &random, true);
                    }
                }
            }
        }
    }
    matmul_destroy(&mm);
}

// A block that is not finite has a descale of NaN: it reaches the rows or columns that the block enters, and no other
static void a_block_that_is_not_finite_spoils_what_it_enters(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {13};
    for (int t = 0; t < 4; t++) {
        for (bool of_b : {false, true}) {
            Case s = {200, 270, 300, 1, E4M3, E4M3, FP32, (t & 1) != 0, (t & 2) != 0, false, 0, 0, 1.0f, 1.0f, 0, SCALE_VEC128, SCALE_BLK128};
            Setup r = set_up(s, &random, small_integer);
            if (of_b) { ((float*)r.call.b.descale)[descale_index(SCALE_BLK128, 130, 290, 270, 300)] = NAN; }
            else { ((float*)r.call.a.descale)[descale_index(SCALE_VEC128, 7, 290, 200, 300)] = NAN; }
            multiply(&mm, &r.call);
            for (int i = 0; i < s.m; i++) {
                for (int j = 0; j < s.n; j++) { assert_int_equal(isnan(((float*)r.call.d)[(size_t)i * s.n + j]) != 0, of_b ? j / 128 == 1 : i == 7); }
            }
            tear_down(&r);
        }
    }
    matmul_destroy(&mm);
}

static void random_sums_keep_the_bound(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {3};
    const int sizes[][3] = {{64, 96, 768}, {33, 65, 1031}, {1, 257, 300}, {130, 1, 2000}};
    for (auto& size : sizes) {
        for (Pair p : pairs) {
            for (int t = 0; t < 4; t++) {
                for (int d = 0; d < 4; d++) {
                    Case s = {size[0], size[1], size[2], 1, p.a, p.b, d < 2 ? FP32 : BF16, (t & 1) != 0, (t & 2) != 0, d % 2 == 1,
                              d % 3 == 0 ? 0 : d == 1 ? 1 + FP32 : 1 + BF16, 0, is_fp8(p.a) ? 0.0078125f : 1.0f, is_fp8(p.b) ? 32.0f : 1.0f};
                    run_case(&mm, s, &random, false);
                }
            }
        }
    }
    matmul_destroy(&mm);
}

// Calls that differ in one thing only must not share a kernel: each against all others in one Matmul; square, so that nothing else differs.
static void one_difference_is_another_shape(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {11};
    std::vector<Case> cases;
    for (int batch = 1; batch <= 2; batch++) {
        Case base = {24, 24, 24, batch, BF16, BF16, FP32, false, false, false, 0, 8, 1.0f, 1.0f};
        cases.push_back(base);
        for (int bit = 1; bit <= 32; bit *= 2) { cases.push_back(base); cases.back().no_gap = bit; }
        cases.push_back(base); cases.back().m = 16;
        cases.push_back(base); cases.back().n = 16; cases.back().gap = 16; cases.back().no_gap = 63 - 2 - 4;  // rows and strides as before
        cases.push_back(base); cases.back().k = 16;
        cases.push_back(base); cases.back().ta = true;
        cases.push_back(base); cases.back().tb = true;
        cases.push_back(base); cases.back().accumulate = true;
        cases.push_back(base); cases.back().bias = 1 + FP32;
        cases.push_back(base); cases.back().bias = 1 + BF16;
        cases.push_back(base); cases.back().d = BF16;
        cases.push_back(base); cases.back().d = BF16; cases.back().accumulate = true;
        cases.push_back(base); cases.back().a = E4M3;
        cases.push_back(base); cases.back().b = E5M2;
        cases.push_back(base); cases.back().a = cases.back().b = FP32;
    }
    cases.push_back(cases.back()); cases.back().batch = 3;
    Case fp8 = {24, 24, 24, 1, E4M3, E4M3, FP32, false, false, false, 0, 8, 1.0f, 1.0f};
    for (int scaling = 0; scaling < 4; scaling++) {
        cases.push_back(fp8);
        if (scaling == 0) { continue; }
        cases.back().a_scaling = scaling == 3 ? SCALE_BLK128 : SCALE_VEC128;
        cases.back().b_scaling = scaling == 2 ? SCALE_BLK128 : SCALE_VEC128;
    }
    for (int run = 0; run < 2; run++) {
        for (const Case& s : cases) { run_case(&mm, s, &random, true); }
    }
    assert_true(mm.order->size() >= 30);
    matmul_destroy(&mm);
}

// Attention within a fused (B, T, 3C) tensor: heads are a batch whose matrices interleave, its stride less than a row.
static void heads_within_rows_are_a_batch(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {4};
    const int T = 37, NH = 3, HS = 16, C = NH * HS;
    std::vector<bf16> qkv((size_t)T * 3 * C), out((size_t)T * C);
    std::vector<float> scores((size_t)NH * T * T);
    for (bf16& x : qkv) { from_float(x, small_integer(&random, 0)); }
    MatmulCall s = {};      // S = Q · Kᵀ
    s.d = scores.data(); s.d_dtype = FP32; s.d_ld = T; s.d_batch_stride = T * T;
    s.a = Operand{qkv.data(), BF16, NULL, 3 * C, HS, false};
    s.b = Operand{qkv.data() + C, BF16, NULL, 3 * C, HS, true};
    s.m = T; s.n = T; s.k = HS; s.batch = NH;
    multiply(&mm, &s);
    std::vector<bf16> p((size_t)NH * T * T);
    for (int h = 0; h < NH; h++) {
        for (int i = 0; i < T; i++) {
            for (int j = 0; j < T; j++) {
                int64_t want = 0;
                for (int x = 0; x < HS; x++) {
                    want +=
                        (int64_t)(to_float(qkv[(size_t)(i * 3 * C + h * HS + x)]) * to_float(qkv[(size_t)(j * 3 * C + C + h * HS + x)]));
                }
                assert_true(scores[(size_t)((h * T + i) * T + j)] == (float)want);
                from_float(p[(size_t)((h * T + i) * T + j)], (float)(want % 5));
            }
        }
    }
    MatmulCall o = {};      // O = P · V, into (T, C)
    o.d = out.data(); o.d_dtype = BF16; o.d_ld = C; o.d_batch_stride = HS;
    o.a = Operand{p.data(), BF16, NULL, T, T * T, false};
    o.b = Operand{qkv.data() + 2 * C, BF16, NULL, 3 * C, HS, false};
    o.m = T; o.n = HS; o.k = T; o.batch = NH;
    multiply(&mm, &o);
    for (int h = 0; h < NH; h++) {
        for (int i = 0; i < T; i++) {
            for (int x = 0; x < HS; x++) {
                int64_t want = 0;
                for (int j = 0; j < T; j++) {
                    want += (int64_t)(to_float(p[(size_t)((h * T + i) * T + j)]) * to_float(qkv[(size_t)(j * 3 * C + 2 * C + h * HS + x)]));
                }
                assert_true(to_float(out[(size_t)(i * C + h * HS + x)]) == round_to<bf16>((float)want));
            }
        }
    }
    matmul_destroy(&mm);
}

// Every code times every kind of scale, through a product with the unit matrix
template <class T> static void codes_times_scales(DType t) {
    Matmul mm;
    matmul_create(&mm);
    const float scales[] = {1.0f, 0x1p-60f, 0x1p60f, 0x1p-3f, 0x1p5f, 0x1p-100f, 0x1p100f};
    std::vector<T> a(256);
    std::vector<bf16> unit(16 * 16);
    std::vector<float> d(256);
    for (int i = 0; i < 256; i++) {
        a[(size_t)i].bits = (uint8_t)i;
        from_float(unit[(size_t)i], i / 16 == i % 16 ? 1.0f : 0.0f);
    }
    for (float scale : scales) {
        float* descale = one_float(scale);
        MatmulCall c = {};
        c.d = d.data(); c.d_dtype = FP32; c.d_ld = 1;
        c.a = Operand{a.data(), t, descale, 1, 0, false};   // (256, 1) · (1, 1): no NaN spreads to a neighbour
        c.b = Operand{unit.data(), BF16, NULL, 16, 0, false};
        c.m = 256; c.n = 1; c.k = 1; c.batch = 1;
        multiply(&mm, &c);
        for (int i = 0; i < 256; i++) {
            float want = to_float(a[(size_t)i]) * scale;
            if (isnan(want)) { assert_true(isnan(d[(size_t)i])); } else { assert_true(d[(size_t)i] == want); }
        }
        device_free(descale);
    }
    matmul_destroy(&mm);
}
static void every_e4m3_code_is_exact(void**) { codes_times_scales<e4m3>(E4M3); }
static void every_e5m2_code_is_exact(void**) { codes_times_scales<e5m2>(E5M2); }

static void nan_and_inf_reach_their_row_and_column(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {5};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (Pair p : pairs) {
        for (float x : bad) {
            if (isinf(x) && is_fp8(p.a)) { continue; }  // E4M3 has no inf, and casts to E5M2 saturate: its inf is tested below
            for (int d = 0; d < 2; d++) {
                Case s = {33, 40, 70, 1, p.a, p.b, d == 0 ? FP32 : BF16, false, true, false, 0, 0, 1.0f, 1.0f};
                Setup r = set_up(s, &random, [](Random* g, int) { return (float)(1 + next_random(g) % 4); });  // positive: inf stays inf
                encode_at((void*)r.call.a.data, s.a, (size_t)(7 * r.call.a.ld + 69), x);
                multiply(&mm, &r.call);
                for (int i = 0; i < s.m; i++) {
                    for (int j = 0; j < s.n; j++) {
                        float got = decode_at(r.call.d, s.d, (size_t)(i * r.call.d_ld + j));
                        if (i != 7) { assert_true(isfinite(got)); }
                        else if (isnan(x)) { assert_true(isnan(got)); }
                        else { assert_true(got == x); }
                    }
                }
                tear_down(&r);
            }
        }
    }
    Case s = {5, 6, 32, 1, E5M2, E4M3, FP32, false, true, false, 0, 0, 0.5f, 1.0f};
    Setup r = set_up(s, &random, [](Random* g, int) { return (float)(1 + next_random(g) % 4); });
    ((e5m2*)r.call.a.data)[3 * r.call.a.ld + 31].bits = 0xfc;  // -inf
    multiply(&mm, &r.call);
    for (int j = 0; j < s.n; j++) {
        assert_true(((float*)r.call.d)[3 * r.call.d_ld + j] == -INFINITY);
        assert_true(isfinite(((float*)r.call.d)[2 * r.call.d_ld + j]));
    }
    tear_down(&r);
    matmul_destroy(&mm);
}

static void a_repeated_call_gives_the_same_bits(void**) {
    for (Pair p : pairs) {
        Random random = {6};
        Case s = {150, 90, 700, 2, p.a, p.b, FP32, true, false, false, 1 + FP32, 0, 1.0f, 1.0f};
        Setup r = set_up(s, &random, normal_value);
        std::vector<unsigned char> first;
        for (int run = 0; run < 6; run++) {
            Matmul mm;      // a fresh one each time: nothing may depend on what was there
            matmul_create(&mm);
            memset(r.call.d, run, r.d_size * 4);
            multiply(&mm, &r.call);
            std::vector<unsigned char> bits;
            for (int row = 0; row < s.m * s.batch; row++) {
                unsigned char* p = (unsigned char*)((float*)r.call.d + (row / s.m) * r.call.d_batch_stride + (row % s.m) * r.call.d_ld);
                bits.insert(bits.end(), p, p + s.n * 4);
            }
            if (run == 0) { first = bits; }
            assert_true(bits == first);
            matmul_destroy(&mm);
        }
        tear_down(&r);
    }
}

// m or n 0: nothing is written; k 0: the empty sum
static void empty_sizes(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {7};
    for (Pair p : pairs) {
        for (int d = 0; d < 3; d++) {
            for (int bias = 0; bias < 3; bias++) {
                for (int zero = 0; zero < 3; zero++) {
                    int m = zero == 0 ? 0 : 5, n = zero == 1 ? 0 : 7, k = zero == 2 ? 0 : 9;
                    Case s = {m, n, k, 2, p.a, p.b, d < 2 ? FP32 : BF16, false, true, d == 1, bias, 3, 1.0f, 1.0f};
                    run_case(&mm, s, &random, true);
                    s.batch = 1;
                    run_case(&mm, s, &random, true);
                }
            }
        }
    }
    matmul_destroy(&mm);
}

// ---- refusals ----

// The exit code and words of a child that runs f
template <class F> static int dies(F f, char* words, size_t size) {
    int fd[2];
    assert_int_equal(pipe(fd), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(fd[1], 2);
        f();
        _exit(0);
    }
    close(fd[1]);
    size_t n = 0;
    for (ssize_t got; (got = read(fd[0], words + n, size - 1 - n)) > 0;) { n += (size_t)got; }
    words[n] = '\0';
    close(fd[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static MatmulCall plain_call(int m, int n, int k, DType a, DType b, DType d) {  // Y = X · Wᵀ, packed
    MatmulCall c = {};
    c.d_dtype = d; c.d_ld = n;
    c.a = Operand{NULL, a, NULL, k, 0, false};
    c.b = Operand{NULL, b, NULL, k, 0, true};
    c.m = m; c.n = n; c.k = k; c.batch = 1;
    return c;
}

static void assert_refused(const MatmulCall& c, const char* why) {
    char words[1024];
    int code = dies([&] {
        Matmul mm;
        matmul_create(&mm);
        matmul_plan(&mm, &c);
    }, words, sizeof(words));
    if (code != 1 || strstr(words, why) == NULL || strchr(words, '\n') != words + strlen(words) - 1) {
        fail_msg("exit code %d: %s, should say: %s", code, words, why);
    }
    char size[32];
    snprintf(size, sizeof(size), "D (%d, %d)", c.m, c.n);
    assert_non_null(strstr(words, size));
}

static void what_cannot_be_is_refused(void**) {
    MatmulCall c = plain_call(16, 32, 48, E5M2, E5M2, FP32);
    assert_refused(c, "e5m2 x e5m2");
    assert_refused(plain_call(16, 32, 48, FP32, BF16, FP32), "an fp32 operand needs the other to be fp32");
    assert_refused(plain_call(16, 32, 48, E4M3, FP32, FP32), "an fp32 operand needs the other to be fp32");
    assert_refused(plain_call(16, 32, 48, FP16, BF16, FP32), "operands are");
    assert_refused(plain_call(16, 32, 48, BF16, BF16, E4M3), "the result is");
    assert_refused(plain_call(-1, 32, 48, BF16, BF16, FP32), "negative size");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.bias = &c; c.bias_dtype = E4M3;
    assert_refused(c, "a bias is");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.a.ld = 47;
    assert_refused(c, "leading dimension");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.b.ld = 47;
    assert_refused(c, "leading dimension");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.d_ld = 31;
    assert_refused(c, "leading dimension");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.batch = 0;
    assert_refused(c, "a batch is 1 or more");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.batch = 2;
    assert_refused(c, "a batch needs positive strides");
    c = plain_call(16, 32, 48, BF16, BF16, BF16); c.a.batch_stride = 1;
    assert_refused(c, "a single matrix has no batch stride");
    c = plain_call(16, 32, 48, BF16, E4M3, BF16); c.a.scaling = SCALE_VEC128;
    assert_refused(c, "only FP8 operands are scaled by block");
    c = plain_call(16, 32, 48, E4M3, E4M3, BF16); c.b.scaling = SCALE_BLK128;
    assert_refused(c, "both operands are scaled by block, or none");
    c.a.scaling = SCALE_BLK128;
    assert_refused(c, "128 x 128 blocks times 128 x 128 blocks");
    c.a.scaling = SCALE_VEC128; c.batch = 2; c.a.batch_stride = c.b.batch_stride = c.d_batch_stride = 4096;
    assert_refused(c, "come in no batches");
    c = plain_call(16, 32, 48, E4M3, E4M3, BF16); c.a.scaling = c.b.scaling = SCALE_VEC128;
    char words[1024], d[16 * 32 * 2];
    c.d = d; c.a.data = c.b.data = d;
    assert_int_equal(dies([&] {
        Matmul mm;
        matmul_create(&mm);
        matmul(&mm, &c, NULL);
    }, words, sizeof(words)), 1);
    assert_non_null(strstr(words, "the descales of blocks are NULL"));
}

static void more_workspace_than_planned_is_refused(void**) {
    Random random = {8};
    Case s = {64, 64, 64, 1, E4M3, E4M3, FP32, false, true, false, 0, 0, 1.0f, 1.0f};
    Setup r = set_up(s, &random, small_integer);
    char words[1024];
    int code = dies([&] {
        Matmul mm;
        matmul_create(&mm);
        size_t bytes = matmul_plan(&mm, &r.call);
        if (bytes < 2 * 64 * 64 * 2) { _exit(3); }
        void* w = device_alloc(bytes);
        matmul_set_workspace(&mm, w, bytes - 1);
        matmul(&mm, &r.call, NULL);
    }, words, sizeof(words));
    assert_int_equal(code, 1);
    assert_non_null(strstr(words, "bytes of workspace and was planned"));
    assert_non_null(strstr(words, "D (64, 64) fp32 = A (64, 64) e4m3 x B^T (64, 64) e4m3"));
    code = dies([&] {
        Matmul mm;
        matmul_create(&mm);
        matmul_set_workspace(&mm, (char*)device_alloc(512) + 16, 256);
    }, words, sizeof(words));
    assert_int_equal(code, 1);
    assert_non_null(strstr(words, "not aligned"));
    code = dies([&] {
        Matmul mm;
        matmul_create(&mm);
        MatmulCall c = r.call;
        c.a.dtype = c.b.dtype = BF16;
        matmul_set_workspace(&mm, device_alloc(matmul_plan(&mm, &c)), mm.planned);
        matmul(&mm, &c, NULL);
    }, words, sizeof(words));
    assert_int_equal(code, 1);
    assert_non_null(strstr(words, "only FP8 operands have a descale"));
    code = dies([&] {
        Matmul mm;
        matmul_create(&mm);
        MatmulCall c = r.call;
        c.b.data = NULL;
        matmul(&mm, &c, NULL);
    }, words, sizeof(words));
    assert_int_equal(code, 1);
    assert_non_null(strstr(words, "a matrix is NULL"));
    tear_down(&r);
}

// ---- the report ----

static void statistics_count_calls_time_and_work(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {9};
    Case s = {32, 48, 64, 2, BF16, BF16, FP32, false, true, true, 0, 0, 1.0f, 1.0f};
    Setup r = set_up(s, &random, small_integer);
    multiply(&mm, &r.call);
    assert_true((*mm.order)[0]->statistics.seconds == 0.0 && (*mm.order)[0]->statistics.library_seconds == 0.0);
    mm.timing = true;
    multiply(&mm, &r.call);
    multiply(&mm, &r.call);
    assert_int_equal(mm.order->size(), 1);
    const MatmulStatistics* x = &(*mm.order)[0]->statistics;
    assert_int_equal(x->calls, 3);
    assert_true(x->flops == 2.0 * (2.0 * 32 * 48 * 64 * 2));
    assert_true(x->seconds > 0.0 && x->seconds < 10.0);
    assert_true(x->library_seconds > 0.0 && x->library_seconds <= x->seconds);
    char* text = NULL;
    size_t size = 0;
    FILE* f = open_memstream(&text, &size);
    matmul_report(&mm, f, 2);
    fclose(f);
    assert_non_null(strstr(text, "32, 48, 64"));
    assert_non_null(strstr(text, "bf16 x bf16"));
    assert_non_null(strstr(text, "fp32+="));
    free(text);
    tear_down(&r);
    matmul_destroy(&mm);
}

// Every format, batches, transposed operands, gaps, and k = 0; the statistics of calls and the workspace stay as they were.
static void matmul_time_alone_times_every_shape_called(void**) {
    Matmul mm;
    matmul_create(&mm);
    Random random = {10};
    mm.timing = true;
    const Case cases[] = {{32, 48, 64, 2, E4M3, E4M3, BF16, false, true, false, 0, 0, 1.0f, 1.0f},
                          {32, 48, 64, 2, E5M2, E4M3, BF16, false, true, false, 0, 0, 1.0f, 1.0f},
                          {17, 5, 33, 1, E4M3, E5M2, FP32, true, false, true, 0, 3, 1.0f, 1.0f},
                          {16, 16, 16, 3, FP32, FP32, FP32, true, true, false, 0, 5, 1.0f, 1.0f},
                          {4, 4, 0, 1, BF16, BF16, FP32, false, false, false, 0, 0, 1.0f, 1.0f}};
    for (const Case& s : cases) {
        Setup r = set_up(s, &random, small_integer);
        for (int i = 0; i < 5; i++) { multiply(&mm, &r.call); }
        tear_down(&r);
    }
    void* workspace = mm.workspace;
    size_t entries = mm.order->size(), bytes = mm.workspace_bytes;
    matmul_time_alone(&mm, NULL);
    assert_int_equal(mm.order->size(), entries);
    assert_true(mm.workspace == workspace && mm.workspace_bytes == bytes);
    for (const MatmulEntry* e : *mm.order) {
        assert_int_equal(e->statistics.calls, 5);
        double alone = e->statistics.alone_seconds;
        assert_true(e->shape.k == 0 ? alone == 0.0 : alone > 0.0 && alone < 1.0);
    }
    // formats that become BF16 share one measurement
    assert_true((*mm.order)[0]->statistics.alone_seconds == (*mm.order)[1]->statistics.alone_seconds);
    assert_true((*mm.order)[0]->statistics.alone_seconds != (*mm.order)[2]->statistics.alone_seconds);
    char* text = NULL;
    size_t size = 0;
    FILE* f = open_memstream(&text, &size);
    matmul_report(&mm, f, 5);
    fclose(f);
    double sum = 0.0, printed = 0.0;
    for (const MatmulEntry* e : *mm.order) { sum += e->statistics.alone_seconds; }
    const char* line = strstr(text, "matmuls alone: ");
    assert_non_null(line);
    assert_int_equal(sscanf(line, "matmuls alone: %lf ms a step", &printed), 1);
    assert_true(fabs(printed - 1e3 * sum / 5) <= 0.0006);
    free(text);
    matmul_destroy(&mm);
}

// No product of a training step may fall to the library's reference loops, which are a thousand times slower.
static void training_shapes_have_fast_kernels(void**) {
    Matmul mm;
    matmul_create(&mm);
    const int layers[][3] = {{512, 2304, 768}, {512, 768, 768}, {512, 3072, 768}, {512, 768, 3072}, {128, 50304, 768}};
    for (auto& s : layers) {
        for (DType t : {FP32, BF16, E4M3}) {
            for (DType d : {FP32, BF16}) {
                int m = s[0], n = s[1], k = s[2];
                MatmulCall y = plain_call(m, n, k, t, t, d);
                MatmulCall dx = plain_call(m, k, n, t, t, d);
                dx.b.transposed = false; dx.b.ld = k;
                MatmulCall dw = plain_call(n, k, m, t, t, d);
                dw.a.transposed = true; dw.a.ld = n;
                dw.b.transposed = false; dw.b.ld = k;
                dw.accumulate = true;
                y.bias = &y; y.bias_dtype = d;
                matmul_plan(&mm, &y); matmul_plan(&mm, &dx); matmul_plan(&mm, &dw);
                for (MatmulCall* c : {&y, &dx, &dw}) { c->d_ld += 64; c->a.ld += 32; c->b.ld += 64; matmul_plan(&mm, c); }
            }
        }
    }
    for (int t = 0; t < 4; t++) {
        for (DType type : {FP32, BF16}) {
            MatmulCall c = plain_call(256, 256, 64, type, type, FP32);
            c.batch = 96;
            c.a.transposed = (t & 1) != 0; c.a.ld = c.a.transposed ? 256 : 64;
            c.b.transposed = (t & 2) != 0; c.b.ld = c.b.transposed ? 64 : 256;
            c.a.batch_stride = c.b.batch_stride = 256 * 64; c.d_batch_stride = 256 * 256;
            matmul_plan(&mm, &c);
            c.accumulate = true;
            matmul_plan(&mm, &c);
        }
    }
    assert_true(mm.order->size() > 60);
    for (MatmulEntry* e : *mm.order) {
        const char* name = kernel_name(e->kernel);
        if (strstr(name, "ref") != NULL) { fail_msg("(%d, %d, %d) is left to %s", e->shape.m, e->shape.n, e->shape.k, name); }
    }
    matmul_destroy(&mm);
}

// ---- what a GPU does with a shape ----

static MatmulCall transposed_call(bool ta, bool tb, int m, int n, int k, DType a, DType b, DType d) {
    MatmulCall c = plain_call(m, n, k, a, b, d);
    c.a.transposed = ta; c.a.ld = ta ? m : k;
    c.b.transposed = tb; c.b.ld = tb ? k : n;
    return c;
}

constexpr size_t HOPPER = ((size_t)32 << 20) + 1024;

static void hopper_multiplies_fp8_k_contiguous(void**) {
    for (int capability : {89, 90, 120, 121}) {
        for (int t = 0; t < 4; t++) {
            bool ta = (t & 1) != 0, tb = (t & 2) != 0;
            MatmulCall c = transposed_call(ta, tb, 96, 80, 112, E4M3, E5M2, BF16);
            GpuPlan p = matmul_gpu_plan(&c, capability);
            assert_true(p.fp8);
            assert_null(matmul_gpu_objection(&c, capability));
            assert_false(p.a.transposed);   // the library sees (m, k) and (n, k), whatever we have
            assert_true(p.b.transposed);
            assert_int_equal(p.a.copy, ta ? GPU_TRANSPOSE : GPU_AS_IS);
            assert_int_equal(p.b.copy, tb ? GPU_AS_IS : GPU_TRANSPOSE);
            assert_int_equal(p.a.ld, 112);
            assert_int_equal(p.b.ld, 112);
            assert_int_equal(p.a.dtype, E4M3);
            assert_int_equal(p.b.dtype, E5M2);
            size_t copies = (ta ? round_up((size_t)96 * 112, (size_t)256) : 0) + (tb ? 0 : round_up((size_t)80 * 112, (size_t)256));
            size_t library = capability >= 90 ? HOPPER : (size_t)8 << 20;
            assert_int_equal(p.library_offset, copies);
            assert_int_equal(matmul_gpu_workspace(&c, capability), copies + library);
            assert_int_equal(p.library_bytes, library);
        }
    }
    for (int t = 0; t < 4; t++) {           // 10.x and 11.x take every layout
        MatmulCall c = transposed_call((t & 1) != 0, (t & 2) != 0, 96, 80, 112, E4M3, E4M3, BF16);
        GpuPlan p = matmul_gpu_plan(&c, 100);
        assert_true(p.fp8 && p.a.copy == GPU_AS_IS && p.b.copy == GPU_AS_IS);
        assert_true(p.a.transposed == c.a.transposed && p.b.transposed == c.b.transposed && p.a.ld == c.a.ld && p.b.ld == c.b.ld);
        assert_int_equal(p.bytes, HOPPER);
    }
    // a linear layer: forward copies nothing, dgrad Wᵀ, wgrad both
    MatmulCall y = transposed_call(false, true, 2048, 3072, 768, E4M3, E4M3, BF16),
               dx = transposed_call(false, false, 2048, 768, 3072, E5M2, E4M3, BF16),
               dw = transposed_call(true, false, 3072, 768, 2048, E5M2, E4M3, FP32);
    GpuPlan p;
    dw.accumulate = true;
    assert_int_equal(matmul_gpu_workspace(&y, 90), HOPPER);
    assert_int_equal(matmul_gpu_workspace(&dx, 90), HOPPER + 768 * 3072);
    assert_int_equal(matmul_gpu_workspace(&dw, 90), HOPPER + 3072 * 2048 + 768 * 2048);
    // of operands that were written K-contiguous at once, dYᵀ (out, tokens) and Xᵀ (in, tokens), no form copies any
    for (int capability : {89, 90, 100, 120}) {
        dw = transposed_call(false, true, 3072, 768, 2048, E5M2, E4M3, FP32);
        dw.accumulate = true;
        p = matmul_gpu_plan(&dw, capability);
        assert_null(matmul_gpu_objection(&dw, capability));
        assert_true(p.fp8 && p.a.copy == GPU_AS_IS && p.b.copy == GPU_AS_IS && !p.a.transposed && p.b.transposed);
        assert_true(p.a.ld == 2048 && p.b.ld == 2048 && p.a.bytes == 0 && p.b.bytes == 0);
        assert_true(gpu_strides_aligned(&dw, &p));
        assert_int_equal(p.bytes, round_up(matmul_gpu_library_bytes(capability), MATMUL_ALIGNMENT));
    }
    MatmulCall three = transposed_call(true, true, 32, 48, 64, E4M3, E4M3, FP32);
    three.batch = 3; three.a.batch_stride = 32 * 64; three.b.batch_stride = 48 * 64; three.d_batch_stride = 32 * 48;
    p = matmul_gpu_plan(&three, 90);
    assert_int_equal(p.a.bytes, 3 * 32 * 64);
    assert_int_equal(p.a.batch_stride, 32 * 64);
    assert_int_equal(p.b.batch_stride, 48 * 64);
}

static void gpus_without_fp8_decode_to_bf16(void**) {
    for (int capability : {80, 86, 88}) {
        MatmulCall c = transposed_call(true, false, 96, 81, 113, E5M2, E4M3, FP32);
        GpuPlan p = matmul_gpu_plan(&c, capability);
        assert_null(matmul_gpu_objection(&c, capability));
        assert_true(!p.fp8 && p.a.copy == GPU_DECODE && p.b.copy == GPU_DECODE && p.a.dtype == BF16 && p.b.dtype == BF16);
        assert_true(p.a.transposed && !p.b.transposed);
        assert_int_equal(p.a.ld, 96);
        assert_int_equal(p.b.ld, 88);       // rows start at multiples of 16 bytes
        assert_int_equal(p.a.bytes, 113 * 96 * 2);
        assert_int_equal(p.b.bytes, 113 * 88 * 2);
        assert_true(p.b.offset % 256 == 0 && p.b.offset >= p.a.bytes);
        assert_true(p.library_offset % 256 == 0 && p.library_offset >= p.b.offset + p.b.bytes);
    }
    MatmulCall mix = transposed_call(false, true, 96, 81, 113, BF16, E4M3, BF16);  // and so does a mix anywhere
    GpuPlan p = matmul_gpu_plan(&mix, 90);
    assert_true(!p.fp8 && p.a.copy == GPU_AS_IS && p.b.copy == GPU_DECODE);
    assert_true(p.a.ld == 113 && p.b.ld == 120);
    MatmulCall plain = transposed_call(true, true, 96, 81, 113, BF16, BF16, BF16);
    p = matmul_gpu_plan(&plain, 90);
    assert_true(!p.fp8 && p.a.copy == GPU_AS_IS && p.b.copy == GPU_AS_IS && p.a.transposed && p.b.transposed);
    assert_int_equal(p.bytes, HOPPER);
    plain.k = 0;
    assert_int_equal(matmul_gpu_workspace(&plain, 90), 0);
}

static void gpu_biases(void**) {
    const struct { DType operand, d, bias; bool library, copy; } cases[] = {
        {BF16, BF16, BF16, true, false}, {BF16, FP32, FP32, true, false}, {BF16, BF16, FP32, false, true}, {BF16, FP32, BF16, false, false},
        {E4M3, BF16, BF16, true, false}, {E4M3, FP32, BF16, true, false}, {E4M3, BF16, FP32, false, true}, {E4M3, FP32, FP32, false, false},
        {FP32, FP32, FP32, true, false},
    };
    for (auto& x : cases) {
        MatmulCall c = transposed_call(false, true, 96, 80, 112, x.operand, x.operand, x.d);
        GpuPlan none = matmul_gpu_plan(&c, 90);
        assert_true(!none.bias_in_library && !none.d_copy && none.bytes == HOPPER);
        c.bias = &c; c.bias_dtype = x.bias;
        GpuPlan p = matmul_gpu_plan(&c, 90);
        assert_int_equal(p.bias_in_library, x.library);
        assert_int_equal(p.d_copy, x.copy);
        assert_int_equal(p.bytes, HOPPER + (x.copy ? 96 * 80 * 4 : 0));
    }
}

static void what_gpus_do_not_take_is_refused(void**) {
    MatmulCall c = transposed_call(false, true, 7, 80, 112, E4M3, E4M3, BF16);
    assert_null(matmul_gpu_objection(&c, 90));          // any number of tokens
    assert_non_null(strstr(matmul_gpu_objection(&c, 75), "below 8.0"));
    c = transposed_call(false, true, 7, 81, 112, E4M3, E4M3, BF16);
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "multiples of 16"));
    assert_null(matmul_gpu_objection(&c, 80));
    c = transposed_call(false, true, 7, 80, 120, E4M3, E4M3, BF16);
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "multiples of 16"));
    c = transposed_call(false, true, 7, 80, 112, E4M3, E4M3, BF16); c.a.ld = 120;
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "leading dimensions"));
    c = transposed_call(true, true, 7, 80, 112, E4M3, E4M3, BF16);
    assert_null(matmul_gpu_objection(&c, 90));          // its copy is aligned, it need not be
    assert_non_null(strstr(matmul_gpu_objection(&c, 100), "transposed A"));
    c = transposed_call(false, true, 7, 80, 112, E4M3, E4M3, BF16); c.d_ld = 84;
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "leading dimensions"));
    c = transposed_call(false, true, 7, 81, 113, BF16, BF16, BF16);
    assert_null(matmul_gpu_objection(&c, 90));          // BF16 may be odd: a slower kernel
    GpuPlan p = matmul_gpu_plan(&c, 90);
    assert_false(gpu_strides_aligned(&c, &p));
    c = transposed_call(false, true, 7, 80, 112, BF16, BF16, BF16);
    p = matmul_gpu_plan(&c, 90);
    assert_true(gpu_strides_aligned(&c, &p) && gpu_pointers_aligned(&c, &p));
    c.d = (void*)24;
    assert_false(gpu_pointers_aligned(&c, &p));
    c = transposed_call(true, true, 32, 80, 112, E4M3, E4M3, BF16); c.a.data = (const void*)8;
    p = matmul_gpu_plan(&c, 90);
    assert_true(gpu_pointers_aligned(&c, &p));          // A is copied
    c = transposed_call(false, true, 32, 80, 112, E4M3, E4M3, BF16); c.a.scaling = SCALE_VEC128; c.b.scaling = SCALE_BLK128;
    assert_null(matmul_gpu_objection(&c, 90));
    for (int capability : {89, 100, 120}) { assert_non_null(strstr(matmul_gpu_objection(&c, capability), "9.0 alone")); }
    assert_null(matmul_gpu_objection(&c, 80));          // they are decoded
    c.m = 30;
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "multiple of 4"));
    c = transposed_call(false, true, 32, 80, 112, BF16, BF16, FP32); c.a.ld = (int64_t)1 << 31; c.m = 1;
    assert_non_null(strstr(matmul_gpu_objection(&c, 90), "2 GiB"));
}

// The kernel's two phases, thread by thread as a GPU's blocks would run them
static void bytes_are_transposed(void**) {
    Random random = {10};
    const int sizes[][2] = {{1, 1}, {1, 200}, {200, 1}, {64, 64}, {63, 65}, {65, 63}, {16, 128}, {130, 79}, {128, 192}};
    for (auto& size : sizes) {
        for (int gap = 0; gap < 3; gap++) {
            int rows = size[0], cols = size[1], batch = 2;
            int64_t x_ld = gap == 1 ? round_up(cols, 16) + 16 : cols + gap, y_ld = gap == 1 ? round_up(rows, 16) : rows + gap;
            int64_t x_stride = x_ld * rows + (gap == 1 ? 32 : gap), y_stride = y_ld * cols + (gap == 1 ? 16 : gap);
            uint8_t* x = (uint8_t*)malloc((size_t)(batch * x_stride));  // to the byte: an address sanitizer sees what is read beyond
            uint8_t* y = (uint8_t*)malloc((size_t)(batch * y_stride));
            for (int64_t i = 0; i < batch * x_stride; i++) { x[i] = (uint8_t)(1 + next_random(&random) % 255); }
            memset(y, 0, (size_t)(batch * y_stride));
            TransposeBytes t = {y, x, y_ld, x_ld, y_stride, x_stride, rows, cols};
            std::vector<uint32_t> tile(TransposeBytes::TILE * TransposeBytes::PITCH);
            for (int b = 0; b < batch; b++) {
                for (int down = 0; down < t.tiles_down(); down++) {
                    for (int across = 0; across < t.tiles_across(); across++) {
                        memset(tile.data(), 0xee, tile.size() * 4);
                        for (int i = 0; i < TransposeBytes::THREADS; i++) { t.load_tile(tile.data(), i, down, across, b); }
                        for (int i = 0; i < TransposeBytes::THREADS; i++) { t.store_tile(tile.data(), i, down, across, b); }
                    }
                }
            }
            for (int b = 0; b < batch; b++) {
                for (int64_t i = 0; i < y_stride; i++) {
                    int64_t row = i / y_ld, col = i % y_ld;
                    uint8_t want = row < cols && col < rows ? x[b * x_stride + col * x_ld + row] : 0;
                    if (y[b * y_stride + i] != want) {
                        fail_msg("(%d, %d) gap %d: y(%d, %d) is %d, should be %d", rows, cols, gap, (int)row, (int)col, y[b * y_stride + i],
                                 want);
                    }
                }
            }
            free(x);
            free(y);
        }
    }
}

// ---- CPUs without BF16 instructions ----

// This test, run again with the instructions hidden from oneDNN: BF16 then takes the FP32 way.
static void cpus_without_bf16_give_the_same_sums(void**) {
    pid_t child = fork();
    if (child == 0) {
        setenv("DNNL_MAX_CPU_ISA", "AVX2", 1);
        setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
        int null = open("/dev/null", O_WRONLY);
        dup2(null, 1);
        execl("/proc/self/exe", "matmul", "without-bf16", (char*)NULL);
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

#ifdef USE_CUDA
static void bf16_is_hidden(void**) { skip(); }
#else
static void bf16_is_hidden(void**) { assert_false(cpu_multiplies_bf16()); }
#endif

int main(int count, char** words) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(integer_sums_are_exact),
        cmocka_unit_test(options_combine),
        cmocka_unit_test(random_sums_keep_the_bound), cmocka_unit_test(sums_of_blocks_are_exact),
        cmocka_unit_test(a_block_that_is_not_finite_spoils_what_it_enters),
        cmocka_unit_test(one_difference_is_another_shape),
        cmocka_unit_test(heads_within_rows_are_a_batch),
        cmocka_unit_test(every_e4m3_code_is_exact),
        cmocka_unit_test(every_e5m2_code_is_exact),
        cmocka_unit_test(nan_and_inf_reach_their_row_and_column),
        cmocka_unit_test(a_repeated_call_gives_the_same_bits),
        cmocka_unit_test(empty_sizes),
        cmocka_unit_test(what_cannot_be_is_refused),
        cmocka_unit_test(more_workspace_than_planned_is_refused),
        cmocka_unit_test(statistics_count_calls_time_and_work),
        cmocka_unit_test(matmul_time_alone_times_every_shape_called),
        cmocka_unit_test(training_shapes_have_fast_kernels),
        cmocka_unit_test(hopper_multiplies_fp8_k_contiguous),
        cmocka_unit_test(gpus_without_fp8_decode_to_bf16),
        cmocka_unit_test(gpu_biases),
        cmocka_unit_test(what_gpus_do_not_take_is_refused),
        cmocka_unit_test(bytes_are_transposed),
        cmocka_unit_test(cpus_without_bf16_give_the_same_sums),
    };
    const struct CMUnitTest without_bf16[] = {
        cmocka_unit_test(bf16_is_hidden),
        cmocka_unit_test(options_combine),
        cmocka_unit_test(random_sums_keep_the_bound), cmocka_unit_test(sums_of_blocks_are_exact),
        cmocka_unit_test(heads_within_rows_are_a_batch),
        cmocka_unit_test(every_e4m3_code_is_exact),
        cmocka_unit_test(every_e5m2_code_is_exact),
        cmocka_unit_test(nan_and_inf_reach_their_row_and_column),
        cmocka_unit_test(empty_sizes),
    };
    if (count > 1 && strcmp(words[1], "without-bf16") == 0) { return cmocka_run_group_tests(without_bf16, NULL, NULL); }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
