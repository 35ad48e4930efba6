// Tests of core/gradient.cuh: every kernel against a model in float64 of one element at a time, whose rounding searches the values of the format for
// the nearest; the hops of a ring over all pairs of codes, also against NVIDIA's own conversions where its headers are.
#include "check.h"
#include <algorithm>
#include "../core/gradient.cuh"
#if __has_include(<cuda_fp8.h>) && !defined(SIMT)  // whose names simt.h has too
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define NVIDIA_HEADERS 1
#endif

// ---- the formats, from their definition ----

struct LayoutOf { int mantissa, bias; uint32_t sign, largest, infinite, nan; };  // infinite: the code of inf, 0: there is none
template <class T> static LayoutOf layout(void);
template <> LayoutOf layout<e4m3>(void) { return {3, 7, 0x80, 0x7e, 0, 0x7f}; }
template <> LayoutOf layout<e5m2>(void) { return {2, 15, 0x80, 0x7b, 0x7c, 0x7f}; }
template <> LayoutOf layout<fp16>(void) { return {10, 15, 0x8000, 0x7bff, 0x7c00, 0x7fff}; }
template <> LayoutOf layout<bf16>(void) { return {7, 127, 0x8000, 0x7f7f, 0x7f80, 0x7fff}; }

template <class T> constexpr bool is_float(void) { return sizeof(T) == 4; }
template <class T> constexpr bool is_byte(void) { return sizeof(T) == 1; }

static uint32_t bits_of(float x) { return float_to_bits(x); }
template <class T> static uint32_t bits_of(T x) { return x.bits; }
template <class T> static T from_bits(uint32_t code) {
    T t;
    memcpy((void*)&t, &code, sizeof(t));
    return t;
}

static double value_of(float x) { return (double)x; }
template <class T> static double value_of(T x) {
    const LayoutOf f = layout<T>();
    uint32_t code = x.bits & (f.sign - 1), m = code & ((1u << f.mantissa) - 1);
    int e = (int)(code >> f.mantissa);
    double sign = (x.bits & f.sign) != 0 ? -1.0 : 1.0, fraction = ldexp((double)m, -f.mantissa);
    if (code > f.largest) { return code == f.infinite ? sign * INFINITY : NAN; }
    return sign * (e == 0 ? ldexp(fraction, 1 - f.bias) : ldexp(1.0 + fraction, e - f.bias));
}

// of the codes 0, 1, … to the largest finite one
template <class T> static const std::vector<double>& values(void) {
    static std::vector<double> grid;
    if (grid.empty()) {
        for (uint32_t code = 0; code <= layout<T>().largest; code++) { grid.push_back(value_of(from_bits<T>(code))); }
    }
    return grid;
}

struct Neighbours { uint32_t low, high; double below, above; };  // codes of magnitudes, and how far away they are

template <class T> static Neighbours neighbours(double a) {
    const std::vector<double>& grid = values<T>();
    size_t high = (size_t)(std::lower_bound(grid.begin(), grid.end(), a) - grid.begin());
    if (high == grid.size()) {  // beyond the largest: FP8 and FP16 saturate; in BF16, inf is where the next value would be
        uint32_t top = layout<T>().largest;
        if (DTypeOf<T>::value != BF16) { return {top, top, 0.0, 0.0}; }
        double next = 2 * grid[top] - grid[top - 1];
        return a >= next ? Neighbours{top + 1, top + 1, 0.0, 0.0} : Neighbours{top, top + 1, a - grid[top], next - a};
    }
    size_t low = grid[high] == a ? high : high - 1;
    return {(uint32_t)low, (uint32_t)high, a - grid[low], grid[high] - a};
}

// The nearest value of the format, ties to the even code
template <class T> static T nearest(double x) {
    if constexpr (is_float<T>()) {
        return (T)x;
    } else {
        if (x != x) { return from_bits<T>(layout<T>().nan); }
        Neighbours n = neighbours<T>(fabs(x));
        uint32_t code = n.below < n.above ? n.low : n.above < n.below ? n.high : n.low % 2 == 0 ? n.low : n.high;
        return from_bits<T>(code | (std::signbit(x) ? layout<T>().sign : 0));
    }
}

template <class T> static bool is_neighbour(T got, double x) {
    if constexpr (is_float<T>()) {
        return got == (T)x;
    } else {
        if (x != x) { return bits_of(got) == layout<T>().nan; }
        Neighbours n = neighbours<T>(fabs(x));
        uint32_t sign = std::signbit(x) ? layout<T>().sign : 0;
        return bits_of(got) == (n.low | sign) || bits_of(got) == (n.high | sign);
    }
}

// NaN of FP32 may have any bits, all else is one code
template <class T> static bool same(T got, T want) {
    return bits_of(got) == bits_of(want) || (is_float<T>() && value_of(got) != value_of(got) && value_of(want) != value_of(want));
}

// What a float operation gives: in float64 it is exact, or rounded so finely that rounding again to a float does no harm
static double rounded(double x) { return (double)(float)x; }

// The largest power of two that keeps amax within the format, in the range of what a slot may hold
static double scale_for(double amax, double largest) {
    double s = 0x1p126;
    while (amax * s > largest && s > 0x1p-126) { s /= 2; }
    return s;
}

static const int sizes[] = {1, 7, 64, 4095, 4096, 4097, 10007};

static void expect_slot(const float* slot, double scale, double previous) {  // scale NaN: not finite
    expect_near((double)slot[1], scale, 0.0, "scale");
    expect_near((double)slot[0], (double)(float)(1.0 / scale), 0.0, "descale");
    expect_near((double)slot[2], previous, 0.0, "previous descale");
    assert_true(slot[3] == 0.0f);
}

// Gradients: ten powers of two, zeros of both signs among them
static void fill_gradient(const Array<float>& x, double size) {
    for (size_t i = 0; i < x.n; i++) {
        x[i] = i % 11 == 3 ? 0.0f : i % 11 == 7 ? -0.0f : (float)(size * normal() * exp2(uniform(-10, 0)));
    }
}

template <class T> static void append(std::vector<char>* all, const Array<T>& a) {
    all->insert(all->end(), (const char*)a.p, (const char*)(a.p + a.n));
}

// ---- slots ----

static void a_slot_keeps_the_descale_before(void**) {
    Array<float> slots(12);
    run_rows(ResetSlots{slots}, 3, NULL);
    finish();
    for (int i = 0; i < 3; i++) { expect_slot(slots + 4 * i, 1.0, 0.0); }
    slots[3] = 0.0f;
    float* slot = slots + 4;
    set_slot(slot, 8.0f);
    expect_slot(slot, 8.0, 1.0);
    set_slot(slot, 3.0f);  // the headroom of a ring makes scales that are no powers of two
    expect_slot(slot, 3.0, 0.125);
    set_slot(slot, 0.0f);
    expect_slot(slot, NAN, (double)(1.0f / 3.0f));
    set_slot(slot, FLT_MIN);
    expect_slot(slot, (double)FLT_MIN, NAN);
    set_slot(slot, 0x1p126f);
    expect_slot(slot, 0x1p126, 0x1p126);
    expect_slot(slots, 1.0, 0.0);
    expect_slot(slots + 8, 1.0, 0.0);
}

template <class T> static void check_amax(void) {
    for (int n : sizes) {
        Array<T> x((size_t)n);
        Array<uint32_t> amax(3);
        for (int at : {0, n / 2, n - 1}) {  // where the largest is
            for (float top : {-3.5f, 448.0f, -INFINITY, NAN}) {
                if (is_byte<T>() && isinf(top)) { continue; }
                double want = 0.0;
                for (int i = 0; i < n; i++) {
                    x[i] = nearest<T>(i == at ? (double)top : uniform(-3.0, 3.0));
                    want = i == at ? fabs(value_of(x[i])) : want;
                }
                for (int threads : {1, 2}) {
                    for (float before : {0.0f, 2.0f, 1000.0f}) {  // the larger one stays
                        amax.fill(float_to_bits(before));
                        with_threads(threads, [&] { run_rows(AmaxPieces<T>{amax + 1, x, (size_t)n}, pieces_of((size_t)n), NULL); });
                        finish();
                        expect_near((double)bits_to_float(amax[1]), isnan(top) ? NAN : fmax(want, (double)before), 0.0, "amax of %d, at %d", n, at);
                        assert_true(amax[0] == float_to_bits(before) && amax[2] == amax[0]);
                    }
                }
            }
        }
    }
}

static void the_amax_is_that_of_all_pieces_and_of_what_was_before(void**) {
    check_amax<float>();
    check_amax<bf16>();
    check_amax<e4m3>();
}

// Row k of a bucket is parameter tensors[k]; the others must stay as they are
static const int PARAMETERS = 9;
struct Rows {
    Array<int> tensors;
    explicit Rows(int count) : tensors((size_t)count) {
        const int order[] = {7, 0, 5, 1, 8, 3, 2};  // not 4 and 6
        for (int k = 0; k < count; k++) { tensors[k] = order[k]; }
    }
    bool has(int parameter) const { return std::find(tensors.p, tensors.p + tensors.n, parameter) != tensors.p + tensors.n; }
};

static void a_rank_sends_the_scale_of_its_tensor(void**) {
    const float amaxes[] = {0.0f, 7.0f, INFINITY, NAN, FLT_MAX, 1e-40f, 448.0f};
    const float descales[] = {1.0f, 0.25f, 1.0f, 1.0f, 1.0f, 1.0f, NAN};
    for (float largest : {448.0f, 57344.0f}) {
        Rows rows(7);
        Array<float> scales(8), slots(4 * PARAMETERS);
        Array<uint32_t> amax(PARAMETERS);
        amax.fill(float_to_bits(5.0f));
        slots.fill(-77.0f);  // only the descale counts
        scales.fill(-1.0f);
        for (int k = 0; k < 7; k++) {
            amax[rows.tensors[k]] = float_to_bits(amaxes[k]);
            slots[4 * rows.tensors[k]] = descales[k];
        }
        run_rows(LocalScales{scales, amax, slots, rows.tensors, largest}, 7, NULL);
        finish();
        for (int k = 0; k < 7; k++) {
            double top = (double)amaxes[k] * (double)descales[k];
            double want = !(top - top == 0.0) ? 0.0 : top == 0.0 ? (double)FLT_MAX : scale_for(top, (double)largest);
            expect_near((double)scales[k], want, 0.0, "scale of amax %g", (double)amaxes[k]);
        }
        assert_true(scales[1] == (largest == 448.0f ? 256.0f : 32768.0f));  // 7/4·256 = 448
        assert_true(scales[7] == -1.0f);
        for (int t = 0; t < PARAMETERS; t++) { assert_int_equal(amax[t], rows.has(t) ? 0 : float_to_bits(5.0f)); }
    }
}

static void a_ring_shares_the_least_scale_with_headroom(void**) {
    const float shared[] = {0.0f, FLT_MAX, 64.0f, 0x1p-126f, 0x1p126f, 3e-38f}, mus[] = {1.0f, 0.3f, 0.7f, 0.125f, 1.0f, 0.9f};
    const double want[] = {NAN, (double)0.3f, rounded(64.0 * (double)0.7f), 0x1p-126, 0x1p126, rounded((double)3e-38f * (double)0.9f)};
    Rows rows(6);
    Array<float> slots(4 * PARAMETERS), mu(PARAMETERS), scales(6);
    for (int i = 0; i < 4 * PARAMETERS; i++) { slots[i] = i % 4 < 2 ? 2.0f : 0.0f; }
    for (int k = 0; k < 6; k++) {
        scales[k] = shared[k];
        mu[rows.tensors[k]] = mus[k];
    }
    run_rows(RingSlots{slots, scales, mu, rows.tensors}, 6, NULL);
    finish();
    for (int k = 0; k < 6; k++) { expect_slot(slots + 4 * rows.tensors[k], want[k], 2.0); }
    for (int t = 0; t < PARAMETERS; t++) { assert_true(rows.has(t) || (slots[4 * t + 1] == 2.0f && slots[4 * t + 2] == 0.0f)); }
}

static void descales_of_the_senders_undo_their_scales(void**) {
    Array<float> descales(5), scales(5);
    const float sent[] = {4.0f, 0.0f, FLT_MAX, 0x1p126f, 0x1p-126f};
    for (int i = 0; i < 5; i++) { scales[i] = sent[i]; }
    run_rows(SenderDescales{descales, scales, 5}, 1, NULL);
    finish();
    assert_true(descales[0] == 0.25f && isnan(descales[1]) && descales[2] == 1.0f && descales[3] == 0x1p-126f && descales[4] == 0x1p126f);
    assert_true(scales[0] == 4.0f && scales[1] == 0.0f && scales[2] == 1.0f && scales[3] == 0x1p126f && scales[4] == 0x1p-126f);
}

static void results_get_the_scale_of_their_amax(void**) {
    const float amaxes[] = {0.0f, 3.5f, INFINITY, NAN, FLT_MAX, 1e-40f};
    for (float largest : {448.0f, 57344.0f}) {
        Rows rows(6);
        Array<float> slots(4 * PARAMETERS);
        Array<uint32_t> amax(6);
        for (int i = 0; i < 4 * PARAMETERS; i++) { slots[i] = i % 4 < 2 ? 2.0f : 0.0f; }
        for (int k = 0; k < 6; k++) { amax[k] = float_to_bits(amaxes[k]); }
        run_rows(ResultSlots{slots, amax, rows.tensors, largest}, 6, NULL);
        finish();
        for (int k = 0; k < 6; k++) {
            double top = (double)amaxes[k];
            expect_slot(slots + 4 * rows.tensors[k], !(top - top == 0.0) ? NAN : top == 0.0 ? 1.0 : scale_for(top, (double)largest), 2.0);
        }
        for (int t = 0; t < PARAMETERS; t++) { assert_true(rows.has(t) || (slots[4 * t + 1] == 2.0f && slots[4 * t + 2] == 0.0f)); }
    }
}

// ---- accumulation ----

// A sum with all it needs; `add` is compared with the model each time
template <class A> struct Accumulator {
    static constexpr DType type = DTypeOf<A>::value;
    Array<A> sum;
    Array<float> addend, slot;
    Array<uint32_t> amax;
    std::vector<double> exact;  // what the codes were rounded from, in units of a code
    int ups = 0, downs = 0;     // of stochastic rounding, where there was a choice
    explicit Accumulator(int n) : sum((size_t)n), addend((size_t)n), slot(4), amax(1), exact((size_t)n) {
        for (int k = 0; k < 4; k++) { slot[k] = k < 2 ? 1.0f : 0.0f; }
        amax[0] = 0;
    }
    void run(Rounding rounding, RandomKey key, bool more) {
        add_gradient(type, sum, addend, FP32, is_byte<A>() ? slot.p : NULL, is_byte<A>() ? amax.p : NULL, rounding, key, ElementMap{}, 0, sum.n, more, NULL);
        finish();
    }
    void add(Rounding rounding, RandomKey key, bool more) {
        double before = (double)slot[0], top = 0.0, scale = 1.0;
        for (size_t i = 0; i < sum.n; i++) {
            double x = (double)addend[i];
            if (more) { x = rounded(rounded(value_of(sum[i]) * (is_byte<A>() ? before : 1.0)) + x); }
            exact[i] = x;
            top = top != top || x != x ? NAN : fmax(top, fabs(x));
        }
        run(rounding, key, more);
        if (is_byte<A>()) {
            scale = !(top - top == 0.0) ? NAN : top == 0.0 ? 1.0 : scale_for(top, 448.0);
            expect_slot(slot, scale, before);
            assert_int_equal(amax[0], 0);
        }
        for (size_t i = 0; i < sum.n; i++) {
            exact[i] = rounded(exact[i] * scale);
            bool good = rounding == STOCHASTIC ? is_neighbour(sum[i], exact[i]) : same(sum[i], nearest<A>(exact[i]));
            if (!good) { fail_msg("%s of %zu, element %zu: 0x%x for %a", dtype_names[type], sum.n, i, bits_of(sum[i]), exact[i]); }
            double got = fabs(value_of(sum[i])), want = fabs(exact[i]);
            ups += got > want, downs += got < want;
        }
    }
};

template <class A> static void check_additions(Rounding rounding) {
    for (int n : sizes) {
        Accumulator<A> a(n);
        const double magnitudes[] = {0.02, 0.01, 3.0, 1e-4, 1000.0};  // the scale goes down, and once it stays
        for (int k = 0; k < 5; k++) {
            fill_gradient(a.addend, magnitudes[k]);
            a.add(rounding, random_key(1, (uint64_t)k, 2), k > 0);
        }
        fill_gradient(a.addend, 1e-6);  // the next step: what was there is not read, the scale goes up again
        a.add(rounding, random_key(2, 0, 2), false);
        assert_true(is_float<A>() || rounding == NEAREST || n < 4095 || (a.ups > n && a.downs > n));
    }
}

static void sums_are_rounded_to_the_nearest(void**) {
    check_additions<float>(NEAREST);
    check_additions<bf16>(NEAREST);
    check_additions<e4m3>(NEAREST);
}

static void stochastic_sums_are_one_of_the_two_neighbours(void**) {
    check_additions<float>(STOCHASTIC);  // which has nothing to round
    check_additions<bf16>(STOCHASTIC);
    check_additions<e4m3>(STOCHASTIC);
}

static void other_formats_are_no_accumulators(void**) {
    Array<float> addend(1);
    Array<uint32_t> sum(1);
    auto add = [&](DType t) { add_gradient(t, sum, addend, FP32, addend, sum, NEAREST, RandomKey{}, ElementMap{}, 0, 1, true, NULL); };
    expect_end(1, "gradients are not added up in e5m2", NULL, [=] { add(E5M2); });
    expect_end(1, "gradients are not added up in fp16", NULL, [=] { add(FP16); });
    expect_end(1, "fp16 is no format of gradients", NULL, [&] { hop_add(FP16, sum, sum, 1); });
}

static void a_huge_addend_takes_the_scale_and_small_sums_go_to_zero(void**) {
    for (Rounding rounding : {NEAREST, STOCHASTIC}) {
        Accumulator<e4m3> a(5000);
        fill_gradient(a.addend, 1e-3);
        a.add(rounding, random_key(3, 0, 0), false);
        fill_gradient(a.addend, 1e-3);
        a.addend[4100] = -1e30f;
        a.add(rounding, random_key(3, 1, 0), true);
        assert_true(a.slot[1] < 1e-27f);
        for (int i = 0; i < 5000; i++) { assert_true(i == 4100 ? value_of(a.sum[i]) < -200.0 : (a.sum[i].bits & 0x7f) == 0); }
        a.addend[4100] = 1e30f;  // takes it away again, but for what rounding left
        a.add(rounding, random_key(3, 2, 0), true);
        a.addend[4100] = -FLT_MAX;  // the largest there is
        a.add(rounding, random_key(3, 3, 0), false);
        for (int i = 0; i < 5000; i++) { a.addend[i] = i % 2 == 0 ? 1e-40f : -0x1p-149f; }  // and the smallest: the scale ends at 2^126
        a.add(rounding, random_key(3, 4, 0), false);
        assert_true(a.slot[1] == 0x1p126f);
    }
}

static void a_tensor_of_zeros_has_scale_one(void**) {
    for (Rounding rounding : {NEAREST, STOCHASTIC}) {
        Accumulator<e4m3> a(4097);
        Accumulator<bf16> b(4097);
        for (int k = 0; k < 3; k++) {
            a.addend.fill(k == 1 ? -0.0f : 0.0f);
            b.addend.fill(k == 1 ? -0.0f : 0.0f);
            a.add(rounding, random_key(4, (uint64_t)k, 0), k > 0);
            b.add(rounding, random_key(4, (uint64_t)k, 0), k > 0);
            assert_true(a.slot[0] == 1.0f && a.slot[1] == 1.0f);
            for (int i = 0; i < 4097; i++) { assert_true(a.sum[i].bits == 0 && b.sum[i].bits == 0); }  // 0 + -0 = 0
        }
    }
}

static void what_is_not_finite_makes_the_step_nan_and_is_gone_in_the_next(void**) {
    for (Rounding rounding : {NEAREST, STOCHASTIC}) {
        for (float bad : {INFINITY, -INFINITY, NAN}) {
            for (bool first : {false, true}) {  // in the first addend, or in a later one
                Accumulator<e4m3> a(5000), fresh(5000);
                fill_gradient(a.addend, 1.0);
                if (first) { a.addend[4999] = bad; }
                a.add(rounding, random_key(5, 0, 0), false);
                fill_gradient(a.addend, 1.0);
                if (!first) { a.addend[17] = bad; }
                for (int k = 1; k < 3; k++) {
                    a.add(rounding, random_key(5, (uint64_t)k, 0), true);
                    a.addend[17] = 1.0f;  // finite again, but the sum is not
                    assert_true(isnan(a.slot[0]) && isnan(a.slot[1]));
                    for (int i = 0; i < 5000; i++) { assert_int_equal(a.sum[i].bits, 0x7f); }
                }
                a.add(rounding, random_key(5, 9, 0), false);
                memcpy((void*)fresh.addend.p, a.addend.p, 5000 * sizeof(float));
                fresh.add(rounding, random_key(5, 9, 0), false);
                assert_memory_equal(a.sum.p, fresh.sum.p, 5000);
                assert_true(a.slot[0] == fresh.slot[0] && a.slot[1] == fresh.slot[1]);
                a.add(rounding, random_key(5, 10, 0), true);  // nor does the NaN come back
                assert_true(is_finite(a.slot[0]) && is_finite(a.slot[2]));
            }
        }
        // of a BF16 sum, only the element itself; what overflows is inf
        Accumulator<bf16> b(64);
        fill_gradient(b.addend, 1.0);
        b.addend[3] = FLT_MAX, b.addend[4] = -FLT_MAX, b.addend[5] = INFINITY, b.addend[6] = NAN, b.addend[8] = -INFINITY;
        for (int k = 0; k < 2; k++) { b.add(rounding, random_key(6, (uint64_t)k, 0), k > 0); }
        assert_true(b.sum[3].bits == 0x7f80 && b.sum[4].bits == 0xff80 && b.sum[5].bits == 0x7f80 && b.sum[8].bits == 0xff80);
        assert_true(b.sum[6].bits == 0x7fff);
        b.addend.fill(1.0f);
        b.addend[5] = -INFINITY;
        b.add(rounding, random_key(6, 2, 0), true);
        assert_true(b.sum[5].bits == 0x7fff && b.sum[3].bits == 0x7f80);
        b.add(rounding, random_key(6, 3, 0), false);
        assert_true(b.sum[6].bits == 0x3f80);
    }
}

// Each element goes up as often as its place between its neighbours says, and what one element does says nothing of the others
template <class A> static void check_bias(bool more) {
    const int n = 64, keys = 4000;
    Accumulator<A> a(n);
    Array<A> start((size_t)n);
    Array<float> slot(4);
    for (int i = 0; i < n; i++) { a.addend[i] = i == 0 ? 1.75f : (float)(uniform(0.1, 1.7) * (i % 2 == 0 ? 1.0 : -1.0)); }
    a.add(NEAREST, RandomKey{}, false);
    memcpy((void*)start.p, a.sum.p, n * sizeof(A));
    memcpy((void*)slot.p, a.slot.p, 16);
    for (int i = 0; i < n; i++) { a.addend[i] *= 0.377f; }
    std::vector<double> share(n), up(n, 0.0);
    double variance = 0.0, squares = 0.0, total = 0.0;
    for (int k = 0; k < keys; k++) {
        memcpy((void*)a.sum.p, start.p, n * sizeof(A));
        memcpy((void*)a.slot.p, slot.p, 16);
        if (k == 0) {
            a.add(STOCHASTIC, random_key(7, 0, 0), more);
            for (int i = 0; i < n; i++) {
                Neighbours w = neighbours<A>(fabs(a.exact[i]));
                share[i] = w.high == w.low ? 0.0 : w.below / (w.below + w.above);
                variance += share[i] * (1.0 - share[i]);
            }
        } else {
            a.run(STOCHASTIC, random_key(7, (uint64_t)k, 0), more);
        }
        double ups = 0.0;
        for (int i = 0; i < n; i++) {
            double went_up = (bits_of(a.sum[i]) & (layout<A>().sign - 1)) != neighbours<A>(fabs(a.exact[i])).low;
            up[i] += went_up;
            ups += went_up - share[i];
        }
        total += ups;
        squares += ups * ups;
    }
    assert_true(variance > n * 0.08);
    for (int i = 0; i < n; i++) {
        expect_near(up[i] / keys, share[i], 5.0 * sqrt(share[i] * (1.0 - share[i]) / keys), "%s: share of element %d", dtype_names[a.type], i);
    }
    expect_near(total / keys, 0.0, 5.0 * sqrt(variance / keys), "%s: bias", dtype_names[a.type]);
    expect_near(squares / keys / variance, 1.0, 5.0 * sqrt(2.0 / keys), "%s: variance over the keys", dtype_names[a.type]);
}

static void stochastic_sums_are_unbiased(void**) {
    for (bool more : {false, true}) {
        check_bias<bf16>(more);
        check_bias<e4m3>(more);
    }
}

// The bytes of three additions of n elements, each in two blocks that are cut at `cut`
template <class A> static std::vector<char> blocks(int n, int cut, uint64_t first, uint64_t tensor, int threads) {
    Array<A> sum((size_t)n);
    Array<float> addend((size_t)n), slot(4);
    random_state = 99;
    slot[0] = 0.25f, slot[1] = 4.0f, slot[2] = 0.25f, slot[3] = 0.0f;
    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < n; i++) { addend[i] = (float)(10.0 * normal()); }
        RandomKey key = random_key(8, (uint64_t)k, tensor);
        auto block = [&](int from, int to) {
            size_t length = (size_t)(to - from);
            A* s = sum + from;
            if constexpr (is_byte<A>()) {  // whose scale is here a given one: add_gradient would take the whole tensor
                run_rows(AddGradient<A, float, STOCHASTIC>{s, addend + from, slot, key, ElementMap{}, first + (uint64_t)from, length, k > 0}, pieces_of(length), NULL);
            } else {
                add_gradient(DTypeOf<A>::value, s, addend + from, FP32, NULL, NULL, STOCHASTIC, key, ElementMap{}, first + (uint64_t)from, length, k > 0, NULL);
            }
        };
        with_threads(threads, [&] { block(cut, n); block(0, cut); });
        finish();
    }
    std::vector<char> bytes;
    append(&bytes, sum);
    return bytes;
}

template <class A> static void check_blocks(void) {
    const int n = 10007;
    for (uint64_t first : {(uint64_t)0, (uint64_t)77, (uint64_t)4294960000u, (uint64_t)1 << 40}) {
        std::vector<char> whole = blocks<A>(n, 0, first, 5, 1);
        for (int cut : {0, 1, 1234, 4096, 9999, n}) {
            for (int threads : {1, 2}) { assert_true(blocks<A>(n, cut, first, 5, threads) == whole); }
        }
        assert_true(blocks<A>(n, 0, first + 1, 5, 1) != whole);
        assert_true(blocks<A>(n, 0, first + ((uint64_t)1 << 32), 5, 1) != whole);
        assert_true(blocks<A>(n, 0, first, 6, 1) != whole);
    }
    // two pieces of equal numbers do not draw the same bits
    Accumulator<A> a(3 * PIECE);
    a.addend.fill(0.7f);
    a.addend[2 * PIECE] = 0.75f;
    a.add(STOCHASTIC, random_key(9, 0, 0), false);
    assert_true(memcmp(a.sum.p, a.sum.p + PIECE, PIECE * sizeof(A)) != 0);
    std::vector<char> one;
    for (int threads : {1, 2}) {
        Accumulator<A> b(10007);
        random_state = 123;
        for (int k = 0; k < 3; k++) {
            fill_gradient(b.addend, 1.0);
            with_threads(threads, [&] { b.add(STOCHASTIC, random_key(10, (uint64_t)k, 0), k > 0); });
        }
        std::vector<char> bytes;
        append(&bytes, b.sum);
        append(&bytes, b.slot);
        if (threads == 1) { one = bytes; }
        assert_true(bytes == one);
    }
}

static void random_bits_depend_on_the_key_and_the_element_alone(void**) {
    check_blocks<bf16>();
    check_blocks<e4m3>();
}

static void small_addends_are_lost_to_the_nearest_but_not_on_average(void**) {
    const int n = 4097, additions = 512;
    for (Rounding rounding : {NEAREST, STOCHASTIC}) {
        Accumulator<bf16> a(n);
        a.addend.fill(1.0f);
        a.run(rounding, random_key(11, 0, 0), false);
        a.addend.fill(0x1p-9f);  // a quarter of a unit
        for (int k = 1; k <= additions; k++) { a.run(rounding, random_key(11, (uint64_t)k, 0), true); }
        double mean = 0.0;
        for (int i = 0; i < n; i++) {
            assert_true(rounding == STOCHASTIC || a.sum[i].bits == 0x3f80);
            mean += value_of(a.sum[i]) / n;
        }
        // beyond 2 the unit is 2^-6, and each addition's variance 7/64 of its square
        if (rounding == STOCHASTIC) { expect_near(mean, 2.0, 5.0 * sqrt(additions * 7.0 / 64.0 / n) * 0x1p-6, "mean after %d additions", additions); }
    }
}

// Of two accumulators: added in float64, where the sum of two floats is exact or rounded so finely that rounding again does no harm, and rounded once
template <class A> static void check_sum_of_accumulators(Rounding rounding) {
    const uint64_t start = 0xffffff00ull;  // of the elements' numbers, which go beyond 32 bits
    for (int n : sizes) {
        Array<float> x((size_t)n);
        Array<A> first((size_t)n), second((size_t)n), sum((size_t)n), again((size_t)n);
        fill_gradient(x, 1.0);
        for (int i = 0; i < n; i++) { first[i] = nearest<A>((double)x[i]); }
        fill_gradient(x, 3.0);
        for (int i = 0; i < n; i++) { second[i] = nearest<A>(i % 13 == 5 ? -value_of(first[i]) : (double)x[i]); }
        RandomKey key = random_key(5, (uint64_t)n, 6);
        auto add = [&](A* out, const A* a, const A* b, uint64_t from, size_t count) {
            add_accumulators(DTypeOf<A>::value, out, a, b, rounding, key, ElementMap{}, from, count, NULL);
            finish();
        };
        add(sum, first, second, start, (size_t)n);
        for (int i = 0; i < n; i++) {
            double exact = rounded(value_of(first[i]) + value_of(second[i]));
            A want = nearest<A>(exact);
            if constexpr (!is_float<A>()) {
                if (rounding == STOCHASTIC) { from_float_stochastic(want, (float)exact, random_bits(key, start + (uint64_t)i)); }
            }
            if (!same(sum[i], want)) { fail_msg("%s of %d, element %d: 0x%x for %a", dtype_names[DTypeOf<A>::value], n, i, bits_of(sum[i]), exact); }
        }
        // the same bits from part of it, the other way round, and in place of either
        size_t cut = (size_t)n / 3;
        add(again, second, first, start, cut);
        add(again + cut, second + cut, first + cut, start + cut, (size_t)n - cut);
        assert_memory_equal(again.p, sum.p, (size_t)n * sizeof(A));
        memcpy((void*)again.p, first.p, (size_t)n * sizeof(A));
        add(again, again, second, start, (size_t)n);
        assert_memory_equal(again.p, sum.p, (size_t)n * sizeof(A));
        add(second, first, second, start, (size_t)n);
        assert_memory_equal(second.p, sum.p, (size_t)n * sizeof(A));
    }
}

static void two_accumulators_are_added_and_rounded_once(void**) {
    check_sum_of_accumulators<float>(NEAREST);
    check_sum_of_accumulators<float>(STOCHASTIC);
    check_sum_of_accumulators<bf16>(NEAREST);
    check_sum_of_accumulators<bf16>(STOCHASTIC);
    Array<uint32_t> sum(1);
    auto add = [&](DType t) { add_accumulators(t, sum, sum, sum, NEAREST, RandomKey{}, ElementMap{}, 0, 1, NULL); };
    expect_end(1, "two accumulators in e4m3 are not added up", NULL, [=] { add(E4M3); });
    expect_end(1, "gradients are not added up in fp16", NULL, [=] { add(FP16); });
}

// ---- codes ----

template <class A> static void fill_any(const Array<A>& x) {
    static const double list[] = {
        0.0,       -0.0,      1e-40,    -0x1p-149, INFINITY,  -INFINITY, NAN,     (double)FLT_MAX, -(double)FLT_MAX, (double)FLT_MIN, 448.0,
        -449.0,    464.0,     465.0,    480.0,     57344.0,   -57344.0,  61440.0, 65536.0,         0x1p-9,           0x1p-10,         0x1.000002p-10,
        -0x1p-10,  0x1p-11,   0x1p-16,  -0x1p-17,  0x1.8p-17, 1.0625,    1.1875,  1.125,           1.375,            -1.0625,         0x1.01p0,
        0x1.03p0,  0x1p-133,  0x1p-134, 0x1.8p-134, 3.3895e38, 0x1.fep127, 0x1.ffp127, -0x1.fefp127, 20.0,            22.0,            26.0};
    for (size_t i = 0; i < x.n; i++) {
        if (i < sizeof(list) / sizeof(list[0])) { x[i] = nearest<A>(list[(i + x.n) % (sizeof(list) / sizeof(list[0]))]); }
        else if (i % 3 == 0) { x[i] = from_bits<A>(random_u32()); }  // any code at all
        else { x[i] = nearest<A>(normal() * exp2(uniform(-20, 12))); }
    }
}

template <class D, class A> static void check_quantisation(void) {
    const float pairs[][2] = {
        {0.0f, 0.0f}, {0.0f, 1024.0f}, {0x1p-10f, 0.0f}, {0x1p-3f, 0x1p5f}, {1.0f, 11.2f}, {0x1p-126f, 0x1p-20f}, {1.0f, NAN}, {NAN, 1.0f}
    };
    const DType d = DTypeOf<D>::value, from = DTypeOf<A>::value;
    uint32_t underflows = 0, tops = 0;
    for (int n : sizes) {
        for (auto& pair : pairs) {  // 0: not given
            Array<A> x((size_t)n);
            Array<D> codes((size_t)n), uncounted((size_t)n);
            Array<float> descale(1), scale(1);
            Array<CodeCounts> counts(3);
            fill_any(x);
            std::vector<char> before, after;
            append(&before, x);
            descale[0] = pair[0], scale[0] = pair[1];
            counts.fill(CodeCounts{1000000, 2000000, 0});
            const float *pd = pair[0] != 0.0f ? descale.p : NULL, *ps = pair[1] != 0.0f ? scale.p : NULL;
            with_threads(n % 2 + 1, [&] {
                run_rows(QuantiseGradient<D, A>{codes, x, pd, ps, counts + 1, (size_t)n}, pieces_of((size_t)n), NULL);
                run_rows(QuantiseGradient<D, A>{uncounted, x, pd, ps, NULL, (size_t)n}, pieces_of((size_t)n), NULL);
            });
            finish();
            double k = rounded((pd != NULL ? (double)pair[0] : 1.0) * (ps != NULL ? (double)pair[1] : 1.0));
            uint32_t underflow = 0, top = 0;
            for (int i = 0; i < n; i++) {
                double v = value_of(x[i]), scaled = rounded(v * k);
                D want = nearest<D>(scaled);
                if (!same(codes[i], want) || !same(uncounted[i], want)) {
                    fail_msg("%s of %s %a·%a, element %d of %d: 0x%x, 0x%x, should be 0x%x", dtype_names[d], dtype_names[from], v, k, i, n,
                             bits_of(codes[i]), bits_of(uncounted[i]), bits_of(want));
                }
                underflow += v != 0.0 && value_of(want) == 0.0;
                top += is_byte<D>() && fabs(value_of(want)) == (d == E4M3 ? 448.0 : 57344.0);
            }
            assert_true(counts[1].underflow == 1000000 + underflow && counts[1].saturated == 2000000 + top);
            for (int other : {0, 2}) { assert_true(counts[other].underflow == 1000000 && counts[other].saturated == 2000000); }
            append(&after, x);
            assert_true(before == after);
            underflows += underflow, tops += top;
        }
    }
    assert_true(underflows > 0 && (!is_byte<D>() || tops > 0));
}

static void codes_and_counts_are_exact(void**) {
    check_quantisation<float, float>();
    check_quantisation<bf16, float>();
    check_quantisation<bf16, bf16>();
    check_quantisation<e4m3, float>();
    check_quantisation<e4m3, bf16>();
    check_quantisation<e4m3, e4m3>();
    check_quantisation<e4m3, e5m2>();
    check_quantisation<e5m2, float>();
    check_quantisation<e5m2, bf16>();
    check_quantisation<e5m2, e4m3>();
    check_quantisation<e5m2, e5m2>();
}

// What a rank sends, from its accumulators to what the others make of it: no code saturates for want of a scale, and a power of two costs nothing
static void a_tensor_survives_its_own_scale(void**) {
    const int n = 5000;
    Accumulator<e4m3> a(n);
    fill_gradient(a.addend, 1e-5);
    a.add(NEAREST, RandomKey{}, false);
    Array<uint32_t> amax(1);
    Array<int> tensors(1);
    Array<float> scales(1), descales(1), sums((size_t)n);
    Array<e4m3> codes((size_t)n);
    Array<CodeCounts> counts(1);
    amax[0] = 0, tensors[0] = 0, counts[0] = CodeCounts{0, 0, 0};
    run_rows(AmaxPieces<e4m3>{amax, a.sum, (size_t)n}, pieces_of((size_t)n), NULL);
    run_rows(LocalScales{scales, amax, a.slot, tensors, 448.0f}, 1, NULL);
    run_rows(QuantiseGradient<e4m3, e4m3>{codes, a.sum, a.slot, scales, counts, (size_t)n}, pieces_of((size_t)n), NULL);
    run_rows(SenderDescales{descales, scales, 1}, 1, NULL);
    run_rows(SumParts<e4m3>{sums, NULL, codes, descales, (size_t)n, 1, 1, (size_t)n, false}, pieces_of((size_t)n), NULL);
    finish();
    assert_memory_equal(codes.p, a.sum.p, (size_t)n);
    assert_true(scales[0] == a.slot[1] && counts[0].underflow == 0);
    for (int i = 0; i < n; i++) { assert_true((double)sums[i] == value_of(a.sum[i]) * (double)a.slot[0]); }
}

// ---- sums over ranks ----

template <class D> static void check_parts(int ranks, int n, bool scaled, float bad) {
    const size_t stride = (size_t)n + 5;  // behind each part lies what is not ours: NaN
    const int descale_stride = 3;
    Array<D> parts(stride * (size_t)ranks);
    Array<float> descales((size_t)(ranks * descale_stride)), sums((size_t)n);
    Array<uint32_t> amax(3);
    for (int r = 0; r < ranks; r++) {
        for (int i = 0; i < n; i++) { parts[(size_t)r * stride + (size_t)i] = nearest<D>(normal() * exp2(uniform(-6, 6))); }
        descales[r * descale_stride] = r % 3 == 2 ? 0.37f : exp2_int(r % 5 - 2);
    }
    const int at = n - 1, who = ranks / 2;
    if (bad != 0.0f) { parts[(size_t)who * stride + (size_t)at] = nearest<D>((double)bad); }
    bool order_shows = false;
    std::vector<float> want((size_t)n);
    uint32_t top = 0;
    for (int i = 0; i < n; i++) {
        auto term = [&](int r) {
            return rounded(value_of(parts[(size_t)r * stride + (size_t)i]) * (scaled ? (double)descales[r * descale_stride] : 1.0));
        };
        double total = term(0), reverse = term(ranks - 1);
        for (int r = 1; r < ranks; r++) {
            total = rounded(total + term(r));
            reverse = rounded(reverse + term(ranks - 1 - r));
        }
        want[(size_t)i] = (float)total;
        order_shows = order_shows || total != reverse;
        top = std::max(top, float_to_bits((float)total) & 0x7fffffffu);
    }
    assert_true(ranks < 3 || n < 4000 || !(scaled || is_float<D>()) || order_shows);
    for (int threads : {1, 2}) {
        for (uint32_t before : {0u, float_to_bits(1e9f)}) {
            for (bool wanted : {true, false}) {
                amax.fill(before);
                memset((void*)sums.p, 0xff, (size_t)n * 4);
                with_threads(threads, [&] {
                    run_rows(SumParts<D>{sums, wanted ? amax + 1 : NULL, parts, scaled ? descales.p : NULL, stride, ranks, descale_stride, (size_t)n, false},
                             pieces_of((size_t)n), NULL);
                });
                finish();
                for (int i = 0; i < n; i++) {
                    if (!same(sums[i], want[(size_t)i])) {
                        fail_msg("%d parts of %s, %d of %d: %a, should be %a", ranks, dtype_names[DTypeOf<D>::value], i, n, (double)sums[i],
                                 (double)want[(size_t)i]);
                    }
                }
                bool nan = wanted && top > 0x7f800000u;
                assert_true(nan ? amax[1] > 0x7f800000u : amax[1] == (wanted ? std::max(top, before) : before));
                assert_true(amax[0] == before && amax[2] == before);
            }
        }
    }
}

template <class D> static void check_all_parts(void) {
    for (int ranks : {1, 2, 3, 8}) {
        for (int n : sizes) {
            check_parts<D>(ranks, n, true, 0.0f);
            check_parts<D>(ranks, n, false, 0.0f);
        }
        for (float bad : {NAN, INFINITY, -INFINITY, FLT_MAX}) { check_parts<D>(ranks, 4097, true, bad); }
    }
}

static void parts_are_added_in_the_order_of_the_ranks(void**) {
    check_all_parts<e4m3>();
    check_all_parts<e5m2>();
    check_all_parts<bf16>();
    check_all_parts<float>();
}

static void a_sender_that_is_not_finite_spoils_the_sum(void**) {
    const int n = 4100;
    Array<e4m3> parts((size_t)(2 * n));
    Array<float> descales(2), sums((size_t)n), slots(4);
    Array<uint32_t> amax(1);
    Array<int> tensors(1);
    parts.fill(nearest<e4m3>(0.0));  // zeros do not hide it either
    descales[0] = 1.0f, descales[1] = 0.0f, amax[0] = 0, tensors[0] = 0;
    slots.fill(0.0f);
    Array<float> scales(2);
    scales[0] = 1.0f, scales[1] = 0.0f;
    run_rows(SenderDescales{descales, scales, 1}, 2, NULL);
    run_rows(SumParts<e4m3>{sums, amax, parts, descales, (size_t)n, 2, 1, (size_t)n, false}, pieces_of((size_t)n), NULL);
    run_rows(ResultSlots{slots, amax, tensors, 448.0f}, 1, NULL);
    finish();
    for (int i = 0; i < n; i++) { assert_true(isnan(sums[i])); }
    assert_true(isnan(slots[0]) && isnan(slots[1]));
}

// ---- hops of a ring ----

template <class D> static D hop_model(D a, D b) {
    double sum = value_of(a) + value_of(b);
    return is_byte<D>() ? nearest<D>(value_of(nearest<fp16>(sum))) : nearest<D>(rounded(sum));
}

template <class D> __attribute__((noinline)) static D hop_one(D a, D b) { return hop_sum(a, b); }

// into[i] += from[i] by hop_add, with 1 and 2 threads, against the model and against hop_sum of one pair
template <class D> static void check_hops(const Array<D>& into, const Array<D>& from) {
    const char* name = dtype_names[DTypeOf<D>::value];
    std::vector<char> before, after;
    append(&before, from);
    std::vector<D> want(into.n);
    for (size_t i = 0; i < into.n; i++) {
        want[i] = hop_model(from[i], into[i]);
        D one = hop_one(from[i], into[i]);
        if (!same(one, want[i])) {
            fail_msg("%s: 0x%x + 0x%x is 0x%x, should be 0x%x", name, bits_of(from[i]), bits_of(into[i]), bits_of(one), bits_of(want[i]));
        }
    }
    for (int threads : {1, 2}) {
        Array<D> sum(into.n);
        memcpy((void*)sum.p, into.p, into.n * sizeof(D));
        with_threads(threads, [&] { hop_add(DTypeOf<D>::value, sum, from, into.n); });
        for (size_t i = 0; i < into.n; i++) {
            if (!same(sum[i], want[i])) {
                fail_msg("%s, element %zu of %zu: 0x%x, should be 0x%x", name, i, into.n, bits_of(sum[i]), bits_of(want[i]));
            }
        }
    }
    append(&after, from);
    assert_true(before == after);
}

template <class D> static void check_all_pairs(void) {
    Array<D> a(65536), b(65536);
    for (uint32_t i = 0; i < 65536; i++) {
        a[i] = from_bits<D>(i >> 8), b[i] = from_bits<D>(i & 0xff);
        // A half has so many bits (11 are 2·4 + 2 or more) that rounding twice is rounding once: whoever adds in FP32 gets the same codes
        assert_int_equal(bits_of(hop_model(a[i], b[i])), bits_of(nearest<D>(value_of(a[i]) + value_of(b[i]))));
    }
    check_hops(a, b);
}

static void fp8_hops_are_sums_of_halves_for_all_pairs(void**) {
    check_all_pairs<e4m3>();
    check_all_pairs<e5m2>();
}

#ifdef NVIDIA_HEADERS
// a hop as NCCL writes it, by the host's side of NVIDIA's conversions
template <class D, class N> static void check_nvidia_hops(void) {
    for (uint32_t i = 0; i < 65536; i++) {
        N a, b;
        a.__x = (__nv_fp8_storage_t)(i >> 8), b.__x = (__nv_fp8_storage_t)(i & 0xff);
        float sum = __half2float(__half(a)) + __half2float(__half(b));
        D want = from_bits<D>(N(__float2half_rn(sum)).__x), got = hop_one(from_bits<D>(i >> 8), from_bits<D>(i & 0xff));
        bool nan = value_of(want) != value_of(want) && value_of(got) != value_of(got);
        if (!nan && bits_of(got) != bits_of(want)) { fail_msg("0x%x + 0x%x is 0x%x, NVIDIA's 0x%x", i >> 8, i & 0xff, bits_of(got), bits_of(want)); }
    }
}

static void nvidias_conversions_give_the_same_hops(void**) {
    check_nvidia_hops<e4m3, __nv_fp8_e4m3>();
    check_nvidia_hops<e5m2, __nv_fp8_e5m2>();
}
#endif

static void bf16_and_fp32_hops_are_rounded_once(void**) {
    for (int n : {1, 7, 64, 4095, 4096, 4097, 10007, 20481, 100003}) {
        Array<bf16> a((size_t)n), b((size_t)n);
        Array<float> c((size_t)n), d((size_t)n);
        for (int i = 0; i < n; i++) {
            a[i] = from_bits<bf16>(random_u32());
            uint32_t similar = bits_of(a[i]) + (random_u32() % 2048 - 1024) + (random_u32() & 0x8000);
            b[i] = from_bits<bf16>(i % 4 == 0 ? random_u32() : similar);
            c[i] = i % 5 == 0 ? any_float() : (float)normal(), d[i] = i % 5 == 0 ? any_float() : (float)normal();
        }
        check_hops(a, b);
        check_hops(c, d);
    }
}

static void hops_of_short_arrays_stay_within_them(void**) {
    for (int n : sizes) {
        Array<e4m3> a((size_t)n), b((size_t)n);
        Array<e5m2> c((size_t)n), d((size_t)n);
        for (int i = 0; i < n; i++) {
            a[i] = from_bits<e4m3>(random_u32()), b[i] = from_bits<e4m3>(random_u32());
            c[i] = from_bits<e5m2>(random_u32()), d[i] = from_bits<e5m2>(random_u32());
        }
        check_hops(a, b);
        check_hops(c, d);
    }
}

// ---- headroom ----

static void headroom_halves_beyond_a_hundred_thousandth(void**) {
    const struct { double elements, allowed; } cases[] = {
        {10, 1}, {99999, 1}, {100000, 1}, {199999, 1}, {200000, 2}, {1e6, 10}, {1234567, 12}, {1e9, 10000}
    };
    const double grown = rounded(0.5 * (double)MU_GROWTH);
    for (auto& c : cases) {
        for (double count : {0.0, 1.0, c.allowed}) {
            expect_near((double)next_mu(0.5f, count, c.elements, 8), grown, 0.0, "%g of %g", count, c.elements);
        }
        for (double count : {c.allowed + 1, c.elements}) {
            expect_near((double)next_mu(0.5f, count, c.elements, 8), 0.25, 0.0, "%g of %g", count, c.elements);
        }
    }
}

static void headroom_doubles_in_a_thousand_steps(void**) {
    float mu = 0.25f;
    for (int i = 0; i < 1000; i++) {
        float next = next_mu(mu, 0.0, 1e6, 64);
        assert_true(next > mu);
        mu = next;
    }
    expect_near((double)mu, 0.5, 0.5e-5, "after 1,000 steps");
}

static void headroom_stays_between_one_over_the_ranks_and_one(void**) {
    for (int ranks : {1, 2, 3, 8, 1000}) {
        float least = 1.0f / (float)ranks, mu = 1.0f;
        assert_true(next_mu(1.0f, 0.0, 10, ranks) == 1.0f && next_mu(0.9999f, 0.0, 10, ranks) == 1.0f && next_mu(5.0f, 0.0, 10, ranks) == 1.0f);
        for (int i = 0; i < 20; i++) {
            float half = mu * 0.5f;
            mu = next_mu(mu, 10.0, 10.0, ranks);
            assert_true(mu == (half > least ? half : least));
        }
        assert_true(mu == least && next_mu(0.0f, 0.0, 10, ranks) == least);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slot_keeps_the_descale_before),
        cmocka_unit_test(the_amax_is_that_of_all_pieces_and_of_what_was_before),
        cmocka_unit_test(a_rank_sends_the_scale_of_its_tensor),
        cmocka_unit_test(a_ring_shares_the_least_scale_with_headroom),
        cmocka_unit_test(descales_of_the_senders_undo_their_scales),
        cmocka_unit_test(results_get_the_scale_of_their_amax),
        cmocka_unit_test(sums_are_rounded_to_the_nearest),
        cmocka_unit_test(stochastic_sums_are_one_of_the_two_neighbours),
        cmocka_unit_test(other_formats_are_no_accumulators),
        cmocka_unit_test(a_huge_addend_takes_the_scale_and_small_sums_go_to_zero),
        cmocka_unit_test(a_tensor_of_zeros_has_scale_one),
        cmocka_unit_test(what_is_not_finite_makes_the_step_nan_and_is_gone_in_the_next),
        cmocka_unit_test(stochastic_sums_are_unbiased),
        cmocka_unit_test(random_bits_depend_on_the_key_and_the_element_alone),
        cmocka_unit_test(small_addends_are_lost_to_the_nearest_but_not_on_average),
        cmocka_unit_test(two_accumulators_are_added_and_rounded_once),
        cmocka_unit_test(codes_and_counts_are_exact),
        cmocka_unit_test(a_tensor_survives_its_own_scale),
        cmocka_unit_test(parts_are_added_in_the_order_of_the_ranks),
        cmocka_unit_test(a_sender_that_is_not_finite_spoils_the_sum),
        cmocka_unit_test(fp8_hops_are_sums_of_halves_for_all_pairs),
#ifdef NVIDIA_HEADERS
        cmocka_unit_test(nvidias_conversions_give_the_same_hops),
#endif
        cmocka_unit_test(bf16_and_fp32_hops_are_rounded_once),
        cmocka_unit_test(hops_of_short_arrays_stay_within_them),
        cmocka_unit_test(headroom_halves_beyond_a_hundred_thousandth),
        cmocka_unit_test(headroom_doubles_in_a_thousand_steps),
        cmocka_unit_test(headroom_stays_between_one_over_the_ranks_and_one),
    };
    return RUN_TESTS(tests);
}
