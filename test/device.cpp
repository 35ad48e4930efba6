// Tests of core/device.cuh: the Team's loops and reductions against plain ones, packs against single elements, exp against float64, and
// what a kernel may rely on: every row once, in bounds, the same bits again.
#include "check.h"
#include "../core/device.cuh"

static const int sizes[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 255, 257, 1000};

// ---- exp ----

template <class T> __attribute__((noinline)) static T exp_one(T x) { return exp_of(x); }

// `units` in the last place of the float nearest to want
static void check_exp(float x, double units) {
    double want = exp((double)x), got = (double)exp_one(x);
    double unit = ldexp(1.0, max_of(ilogb(want), -126) - 23);
    if (!(fabs(got - want) <= units * unit)) {
        fail_msg("exp(%.9g) is %.9g, should be %.9g: %.3g units away", (double)x, got, want, fabs(got - want) / unit);
    }
}

static void exp_is_right_within_two_units(void**) {
    for (float x = -86.9f; x < 88.6f; x += 1.7e-4f) { check_exp(x, 2.0); }
    for (int i = 0; i < 200000; i++) { check_exp((float)uniform(-86.9, 88.6), 2.0); }
    for (int i = 0; i < 200000; i++) { check_exp((float)(normal() * exp2(uniform(-40, 2))), 2.0); }
    for (int k = -125; k <= 127; k++) {  // around the places where the reduction changes
        for (double half : {0.0, 0.5}) {
            float x = (float)((k + half) * M_LN2);
            if (x < -86.9f || x > 88.6f) { continue; }
            check_exp(x, 2.0);
            check_exp(nextafterf(x, 100.0f), 2.0);
            check_exp(nextafterf(x, -100.0f), 2.0);
        }
    }
    assert_true(exp_one(0.0f) == 1.0f && exp_one(-0.0f) == 1.0f);
}

// Up to both ends of the float range
static void exp_is_right_at_the_ends_of_the_range(void**) {
    for (float x = 88.6f; x <= 88.72283f; x = nextafterf(x, 100.0f)) { check_exp(x, 2.0); }
    for (float x = -86.9f; x >= -87.33654f; x = nextafterf(x, -100.0f)) { check_exp(x, 2.0); }
}

static void exp_beyond_the_range_is_zero_or_inf_and_nan_stays(void**) {
    for (float x : {88.7229f, 89.0f, 100.0f, 1e10f, FLT_MAX, INFINITY}) { assert_true(exp_one(x) == INFINITY); }
    for (float x : {-87.4f, -88.0f, -104.0f, -1e10f, -FLT_MAX, -INFINITY}) { assert_true(exp_one(x) == 0.0f); }
    for (uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u}) { assert_true(isnan(exp_one(bits_to_float(nan)))); }
}

struct ExpRows {
    float* y;
    const float* x;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        float* yr = y + (size_t)row * C;
        const float* xr = x + (size_t)row * C;
        team.each(C, [=](auto c) { store(yr, c, exp_of(load(xr, c))); });
    }
};

static void exp_in_a_loop_has_the_bits_of_one(void**) {
    Array<float> x(65536), y(65536);
    for (size_t i = 0; i < x.n; i++) { x[i] = i % 8 == 0 ? any_float() : (float)uniform(-100, 100); }
    for (int C : {1, 17, 64, 1000}) {
        int rows = (int)x.n / C;
        run_rows(ExpRows{y, x, C}, rows, NULL);
        finish();
        for (int i = 0; i < rows * C; i++) {
            float want = exp_one((float)x[i]);
            assert_true(float_to_bits(y[i]) == float_to_bits(want) || (isnan(y[i]) && isnan(want)));
        }
    }
}

// ---- a kernel of every function of the Team ----

struct Everything {
    const float* x;      // (rows, C)
    const float* w;      // (rows, C)
    float* doubled;      // (rows, C) 2x
    float* sums;         // (rows) Σ x
    float* pairs;        // (rows, 2) Σ x, Σ xw
    uint32_t* amaxes;    // (rows) of x, while it is copied
    float* copies;       // (rows, C)
    float* maxima;       // (rows)
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        const float* xr = x + (size_t)row * C;
        const float* wr = w + (size_t)row * C;
        float* dr = doubled + (size_t)row * C;
        float* cr = copies + (size_t)row * C;
        team.each(C, [=](auto c) { store(dr, c, load(xr, c) * 2.0f); });
        float sum = team.sum(C, [=](auto c) { return load(xr, c); });
        auto pair = team.sum_pair(C, [=](auto c) { auto v = load(xr, c); return pair_of(v, v * load(wr, c)); });
        uint32_t amax = team.amax(C, [=](auto c) { auto v = load(xr, c); store(cr, c, v); return v; });
        float max = team.max(C, [=](auto c) { return load(xr, c); });
        if (!team.leads()) { return; }
        sums[row] = sum;
        pairs[2 * row] = pair.a.v[0];
        pairs[2 * row + 1] = pair.b.v[0];
        amaxes[row] = amax;
        maxima[row] = max;
    }
};

struct Results {
    int rows, C;
    Array<float> x, w, doubled, sums, pairs, copies, maxima;
    Array<uint32_t> amaxes;
    Results(int r, int c)
        : rows(r), C(c), x((size_t)r * c), w((size_t)r * c), doubled((size_t)r * c), sums(r), pairs(2 * r), copies((size_t)r * c),
          maxima(r), amaxes(r) {}
    void run() {
        run_rows(Everything{x, w, doubled, sums, pairs, amaxes, copies, maxima, C}, rows, NULL);
        finish();
    }
};

static void loops_and_reductions_match_plain_ones(void**) {
    for (int C : sizes) {
        Results r(5, C);
        for (int pass = 0; pass < 2; pass++) {  // integers, whose sums are exact in any order; then any numbers
            for (size_t i = 0; i < r.x.n; i++) {
                r.x[i] = pass == 0 ? (float)((int)(random_u32() % 2001) - 1000) : (float)(normal() * exp2(uniform(-10, 10)));
                r.w[i] = pass == 0 ? (float)((int)(random_u32() % 11) - 5) : (float)normal();
            }
            r.run();
            for (int row = 0; row < r.rows; row++) {
                double sum = 0, absolute = 0, second = 0, second_absolute = 0;
                float amax = 0.0f, max = -INFINITY;
                for (int i = 0; i < C; i++) {
                    float x = r.x[row * C + i], w = r.w[row * C + i];
                    assert_true(r.doubled[row * C + i] == 2.0f * x && r.copies[row * C + i] == x);
                    sum += (double)x;
                    absolute += fabs((double)x);
                    second += (double)x * (double)w;
                    second_absolute += fabs((double)x * (double)w);
                    amax = fmaxf(amax, fabsf(x));
                    max = fmaxf(max, x);
                }
                double unit = pass == 0 ? 0.0 : 16.0 * 0x1p-24;
                expect_near((double)r.sums[row], sum, unit * absolute, "sum of %d", C);
                expect_near((double)r.pairs[2 * row], sum, unit * absolute, "first sum of the pair of %d", C);
                expect_near((double)r.pairs[2 * row + 1], second, unit * second_absolute, "second sum of the pair of %d", C);
                assert_int_equal(r.amaxes[row], float_to_bits(amax));
                assert_true(r.maxima[row] == max);
            }
        }
    }
}

static void nothing_to_reduce_gives_the_neutral_element(void**) {
    Results r(3, 1);
    Everything e = {r.x, r.w, r.doubled, r.sums, r.pairs, r.amaxes, r.copies, r.maxima, 0};
    run_rows(e, 3, NULL);
    finish();
    for (int row = 0; row < 3; row++) {
        assert_true(r.sums[row] == 0.0f && r.pairs[2 * row] == 0.0f && r.pairs[2 * row + 1] == 0.0f);
        assert_int_equal(r.amaxes[row], 0);
        assert_int_equal(float_to_bits(r.doubled[row]), 0xffffffffu);  // untouched
    }
}

static void reductions_of_nan_and_inf(void**) {
    for (int C : sizes) {
        Results r(5, C);
        for (int at = 0; at < C; at += 1 + C / 5) {
            fill_normal(r.x, 0.0, 1.0);
            r.w.fill(1.0f);
            r.x[0 * C + at] = NAN;
            r.x[1 * C + at] = INFINITY;
            r.x[2 * C + at] = -INFINITY;
            r.x[3 * C + at] = bits_to_float(0xffc00000u);  // the NaN that x86 makes of 0·inf has its sign bit set
            r.x[4 * C + at] = INFINITY;
            if (C > 1) { r.x[4 * C + (at + C / 2) % C] = NAN; }
            r.run();
            assert_true(isnan(r.sums[0]) && isnan(r.sums[3]) && isnan(r.pairs[1]) && isnan(r.pairs[7]));
            assert_true(r.sums[1] == INFINITY && r.sums[2] == -INFINITY && r.pairs[2] == INFINITY && r.pairs[4] == -INFINITY);
            assert_true(r.amaxes[0] > 0x7f800000u && r.amaxes[3] > 0x7f800000u);  // a NaN wins, whatever its sign
            assert_int_equal(r.amaxes[1], 0x7f800000u);
            assert_int_equal(r.amaxes[2], 0x7f800000u);
            assert_true(isnan(r.maxima[0]) && r.maxima[1] == INFINITY);
            assert_true(C == 1 ? r.maxima[2] == -INFINITY : isfinite(r.maxima[2]));
            if (C > 1) { assert_true(isnan(r.maxima[4]) && isnan(r.sums[4]) && r.amaxes[4] > 0x7f800000u); }
        }
    }
}

// "a NaN wins" in max: also the NaN with the sign bit, which is the one that x86 makes
static void the_maximum_with_a_negative_nan_is_nan(void**) {
    for (int C : {1, 8, 1000}) {
        Results r(5, C);
        fill_normal(r.x, 0.0, 1.0);
        r.w.fill(1.0f);
        r.x[3 * C + C / 2] = bits_to_float(0xffc00000u);
        r.run();
        assert_true(isnan(r.maxima[3]));
    }
}

static void zeros_of_both_signs_have_amax_zero(void**) {
    Results r(5, 17);
    for (size_t i = 0; i < r.x.n; i++) { r.x[i] = i % 2 == 0 ? 0.0f : -0.0f; }
    r.w.fill(1.0f);
    r.run();
    for (int row = 0; row < 5; row++) {
        assert_int_equal(r.amaxes[row], 0);
        assert_true(r.maxima[row] == 0.0f);
    }
}

static void results_do_not_depend_on_the_number_of_threads(void**) {
    Results a(301, 257);
    fill_normal(a.x, 0.5, 3.0);
    fill_normal(a.w, 0.0, 1.0);
    std::vector<float> sums, pairs;
    for (int threads = 1; threads <= 3; threads++) {
        with_threads(threads, [&] { a.run(); });
        if (threads == 1) {
            sums.assign(a.sums.p, a.sums.p + a.sums.n);
            pairs.assign(a.pairs.p, a.pairs.p + a.pairs.n);
        }
        assert_memory_equal(a.sums.p, sums.data(), sums.size() * 4);
        assert_memory_equal(a.pairs.p, pairs.data(), pairs.size() * 4);
    }
}

// ---- sums by column ----

struct Columns {
    float* out;          // (strips, C)
    float* out_a;        // (strips, C)
    float* out_b;        // (strips, C)
    uint32_t* amaxes;    // (strips)
    const float* x;      // (rows, C)
    int rows, strip, C;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        int r0 = i * strip, r1 = min_of(rows, r0 + strip), n = C;
        const float* p = x;
        uint32_t top = team.columns(out + (size_t)i * n, r0, r1, n, [=](int r, auto c) { return load(p + (size_t)r * n, c); });
        team.columns_pair(out_a + (size_t)i * n, out_b + (size_t)i * n, r0, r1, n, [=](int r, auto c) {
            auto v = load(p + (size_t)r * n, c);
            return pair_of(v * v, v);
        });
        if (team.leads()) { amaxes[i] = top; }
    }
};

static void columns_are_added_in_the_order_of_the_rows(void**) {
    for (int C : sizes) {
        for (int rows : {1, 2, 5, 33}) {
            const int strip = 4;
            int strips = ceil_div(rows, strip);
            Array<float> x((size_t)rows * C), out((size_t)strips * C), a((size_t)strips * C), b((size_t)strips * C);
            Array<uint32_t> amaxes(strips);
            for (size_t i = 0; i < x.n; i++) { x[i] = (float)(normal() * exp2(uniform(-20, 20))); }
            if (rows == 5) { x[4 * C + C / 2] = rows % 2 == 0 ? INFINITY : NAN; }
            run_rows(Columns{out, a, b, amaxes, x, rows, strip, C}, strips, NULL);
            finish();
            for (int s = 0; s < strips; s++) {
                uint32_t top = 0;
                for (int c = 0; c < C; c++) {
                    float sum = 0, squares = 0;
                    for (int r = s * strip; r < min_of(rows, s * strip + strip); r++) {
                        float v = x[r * C + c];
                        sum = r == s * strip ? v : sum + v;
                        squares = r == s * strip ? v * v : squares + v * v;
                        top = max_of(top, float_to_bits(v) & 0x7fffffffu);
                    }
                    float got[] = {out[s * C + c], b[s * C + c]};
                    for (float g : got) { assert_true(float_to_bits(g) == float_to_bits(sum) || (isnan(g) && isnan(sum))); }
                    assert_true(a[s * C + c] == squares || isnan(squares));
                }
                assert_int_equal(amaxes[s], top);
            }
        }
    }
}

// ---- rows ----

struct CountRow {
    uint32_t* times;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        if (team.leads()) { times[row]++; }
    }
};

static void every_row_runs_once(void**) {
    for (int threads = 1; threads <= 3; threads++) {
        for (int rows : {0, 1, 2, 3, 1000}) {
            Array<uint32_t> times(1001);
            times.fill(0);
            with_threads(threads, [&] { run_rows(CountRow{times}, rows, NULL); });
            finish();
            for (int i = 0; i < 1001; i++) { assert_int_equal(times[i], i < rows ? 1 : 0); }
        }
    }
    run_rows(CountRow{NULL}, -1, NULL);
}

struct RaiseMaximum {  // targets[row % n] = max of it and values[row]
    uint32_t* targets;
    const uint32_t* values;
    int n;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        if (team.leads()) { atomic_max(targets + row % n, values[row]); }
    }
};

// As many targets as rows of a thread: all threads go over the same targets in the same order at the same time.
static void atomic_maxima_lose_nothing(void**) {
#ifdef SIMT
    const int threads = 2, n = 50;  // each row is a block, all of whose threads take turns
#else
    const int threads = 2, n = 50000;
#endif
    Array<uint32_t> targets(n), values(threads * n);
    std::vector<uint32_t> want(n);
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < n; i++) { targets[i] = want[(size_t)i] = (uint32_t)round; }
        for (int i = 0; i < threads * n; i++) {
            values[i] = random_u32() >> (round % 32);
            want[(size_t)(i % n)] = max_of(want[(size_t)(i % n)], values.p[i]);
        }
        with_threads(threads, [&] { run_rows(RaiseMaximum{targets, values, n}, threads * n, NULL); });
        finish();
        assert_memory_equal(targets.p, want.data(), n * sizeof(uint32_t));
    }
}

// ---- packs ----

// Packs of 8, as a GPU moves them, against single elements
template <class T> static void check_packs(void) {
    alignas(16) T x[24], y[24], z[24], s[24], t[24];
    RandomKey key = random_key(1, 2, 3);
    for (int i = 0; i < 24; i++) { from_float(x[i], (float)(normal() * 10.0)); }
    for (size_t i = 0; i < 24; i += 8) {
        Range<8> c = {i};
        Vec<8> v = load(x, c);
        store(y, c, v);
        store(z, c, v * 0.3f);
        store_stochastic(s, c, v * 0.3f, key, 100);
        uint32_t top = 0;
        for (size_t k = i; k < i + 8; k++) {
            float one = load(x, Range<1>{k}).v[0];
            assert_true(one == v.v[k - i] && one == to_float(x[k]));
            top = max_of(top, magnitude_bits(one));
            from_float_stochastic(t[k], one * 0.3f, random_bits(key, 100 + k));
        }
        assert_int_equal(magnitude_bits(v), top);
    }
    assert_memory_equal(x, y, sizeof(x));
    assert_memory_equal(s, t, sizeof(s));
    for (int i = 0; i < 24; i++) { assert_true(to_float(z[i]) == round_to<T>(to_float(x[i]) * 0.3f)); }
}

static void packs_hold_what_single_elements_hold(void**) {
    check_packs<float>();
    check_packs<bf16>();
    check_packs<fp16>();
    check_packs<e4m3>();
    check_packs<e5m2>();
}

static void packs_calculate_by_element(void**) {
    Vec<8> a, b, c;
    for (int k = 0; k < 8; k++) { a.v[k] = (float)normal(); b.v[k] = (float)normal() + 3.0f; c.v[k] = (float)normal(); }
    Vec<8> sum = a + b, difference = a - b, product = a * b, quotient = a / b, left = 2.0f - a, right = a / 3.0f, root = sqrt_of(b),
           fused = fma_of(a, b, c);
    Vec<8> fused_scalar = fma_of(a, 1.7f, c), power = exp_of(a), rounded = round_to<bf16>(a), same = splat(Range<8>{0}, 1.5f);
    for (int k = 0; k < 8; k++) {
        assert_true(sum.v[k] == a.v[k] + b.v[k] && difference.v[k] == a.v[k] - b.v[k] && product.v[k] == a.v[k] * b.v[k]);
        assert_true(quotient.v[k] == a.v[k] / b.v[k] && left.v[k] == 2.0f - a.v[k] && right.v[k] == a.v[k] / 3.0f
                    && root.v[k] == sqrtf(b.v[k]));
        assert_true(fused.v[k] == fmaf(a.v[k], b.v[k], c.v[k]) && fused_scalar.v[k] == fmaf(a.v[k], 1.7f, c.v[k]));
        assert_true(power.v[k] == exp_of(a.v[k]) && rounded.v[k] == round_to<bf16>(a.v[k]) && same.v[k] == 1.5f);
    }
    float x = 1.0f + 0x1p-12f;  // x² needs one bit more than a float has: a product rounded before the sum loses it
    assert_true(fma_of(x, x, -1.0f - 0x1p-11f) == 0x1p-24f);
}

static void ordered_bits_order_as_floats_do(void**) {
    const float nan = bits_to_float(0x7fc00000u);
    std::vector<float> list = {-INFINITY, -FLT_MAX, -1.0f, -FLT_MIN, -0x1p-149f, -0.0f, 0.0f,
                               0x1p-149f, FLT_MIN,  1.0f,  FLT_MAX,  INFINITY,   nan};
    for (size_t i = 0; i < list.size(); i++) {
        if (i > 0) { assert_true(ordered_bits(list[i - 1]) < ordered_bits(list[i])); }
        assert_int_equal(float_to_bits(from_ordered_bits(ordered_bits(list[i]))), float_to_bits(list[i]));
    }
    for (uint32_t bits : {0xffc00000u, 0x7f800001u, 0xff800001u, 0xffffffffu}) {
        assert_true(ordered_bits(bits_to_float(bits)) > ordered_bits(INFINITY));
    }
    for (int i = 0; i < 100000; i++) {
        float a = any_float(), b = any_float();
        if (isnan(a) || isnan(b) || a == b) { continue; }
        assert_int_equal(a < b, ordered_bits(a) < ordered_bits(b));
        assert_int_equal(float_to_bits(from_ordered_bits(ordered_bits(a))), float_to_bits(a));
    }
}

// ---- memory ----

static void memory_moves_between_host_and_device(void**) {
    Stream s = stream_create();
    unsigned char out[1000], in[1000];
    for (int i = 0; i < 1000; i++) { in[i] = (unsigned char)random_u32(); }
    void* a = device_alloc(1000);
    void* b = device_alloc(1000);
    void* nothing = device_alloc(0);
    assert_true((size_t)a % 256 == 0 && (size_t)b % 256 == 0 && nothing != NULL);
    copy_to_device(a, in, 1000, s);
    device_copy(b, a, 1000, s);
    device_zero((char*)b + 500, 10, s);
    copy_to_host(out, b, 1000, s);
    memset(in + 500, 0, 10);
    assert_memory_equal(in, out, 1000);
    device_free(a);
    device_free(b);
    device_free(nothing);
    stream_sync(s);
    stream_destroy(s);
    assert_true(device_memory_free() > 1 << 20);
    char name[64], little[4];
    device_name(name, sizeof(name));
    device_name(little, sizeof(little));
    assert_true(strlen(name) > 0 && strlen(little) == 3 && strncmp(name, little, 3) == 0);
}

// Elements beyond 2^32 draw bits of their own, also where they share a pack with earlier ones
static void random_bits_go_on_beyond_32_bits(void**) {
    RandomKey key = random_key(3, 4, 5);
    Vec<16> x = Vec<16>::map([](int k) { return 0.1f + 0.01f * (float)k; });
    for (uint64_t first : {((uint64_t)1 << 32) - 9, (uint64_t)7 << 32, ((uint64_t)1 << 40) - 1, ((uint64_t)1 << 32) - 16}) {
        e4m3 packed[24], single;
        store_stochastic(packed, Range<16>{4}, x, key, first - 4);
        for (int k = 0; k < 16; k++) {
            from_float_stochastic(single, x.v[k], random_bits(key, first + (uint64_t)k));
            assert_int_equal(single.bits, packed[4 + k].bits);
        }
    }
    assert_int_not_equal(random_bits(key, 5), random_bits(key, 5 + ((uint64_t)1 << 32)));
}

// A pack of codes takes other instructions than a code by itself, where the CPU has them. All codes, each in several places, times several factors
template <class T> static void check_reading(void) {
    const uint32_t codes = 1u << (8 * sizeof(T));
    Array<T> x(2 * (size_t)codes);
    for (size_t i = 0; i < x.n; i++) { x[i].bits = (decltype(T::bits))(i < codes ? i : i * 77 + 5); }
    for (float factor : {1.0f, 0x1p-126f, 0x1p120f, 0.37f}) {
        for (size_t i = 0; i < x.n; i += 128) {
            Vec<128> packed = load_as(DTypeOf<T>::value, (const T*)x, Range<128>{i}, 128, factor);
            Vec<24> few = load_as(DTypeOf<T>::value, (const T*)x, Range<24>{i}, 24, factor);
            for (size_t k = 0; k < 128; k++) {
                uint32_t want = float_to_bits(to_float(x[i + k]) * factor), got = float_to_bits(packed.v[k]);
                if (got != want) { fail_msg("%s code %#x times %g", dtype_names[DTypeOf<T>::value], (unsigned)x[i + k].bits, (double)factor); }
                assert_true(k >= 24 || float_to_bits(few.v[k]) == want);
            }
        }
    }
}

static void packs_of_codes_are_read_as_single_codes_are(void**) {
    check_reading<fp16>();
    check_reading<bf16>();
    check_reading<e4m3>();
    check_reading<e5m2>();
    check_reading<ue5m3>();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_right_within_two_units),
        cmocka_unit_test(exp_is_right_at_the_ends_of_the_range),
        cmocka_unit_test(exp_beyond_the_range_is_zero_or_inf_and_nan_stays),
        cmocka_unit_test(exp_in_a_loop_has_the_bits_of_one),
        cmocka_unit_test(loops_and_reductions_match_plain_ones),
        cmocka_unit_test(nothing_to_reduce_gives_the_neutral_element),
        cmocka_unit_test(reductions_of_nan_and_inf),
        cmocka_unit_test(the_maximum_with_a_negative_nan_is_nan),
        cmocka_unit_test(zeros_of_both_signs_have_amax_zero),
        cmocka_unit_test(results_do_not_depend_on_the_number_of_threads),
        cmocka_unit_test(columns_are_added_in_the_order_of_the_rows),
        cmocka_unit_test(every_row_runs_once),
        cmocka_unit_test(atomic_maxima_lose_nothing),
        cmocka_unit_test(packs_hold_what_single_elements_hold),
        cmocka_unit_test(packs_calculate_by_element),
        cmocka_unit_test(random_bits_go_on_beyond_32_bits),
        cmocka_unit_test(packs_of_codes_are_read_as_single_codes_are),
        cmocka_unit_test(ordered_bits_order_as_floats_do),
        cmocka_unit_test(memory_moves_between_host_and_device),
    };
    return RUN_TESTS(tests);
}
