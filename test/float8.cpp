// Tests of core/float8.cuh. Decoding is compared with the formats' definition in float64; encoding with a search for the nearest decoded
// value; both with NVIDIA's own conversions where its headers are; the vector form with one element at a time.
#include "check.h"
#include <algorithm>
#include "../core/float8.cuh"
#if __has_include(<cuda_fp8.h>) && !defined(SIMT)  // whose names simt.h has too
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#define NVIDIA_HEADERS 1
#endif

// ---- the formats, from their definition ----

template <class T> struct Format;
template <> struct Format<e4m3> {
    static constexpr int EXPONENT = 4, MANTISSA = 3, BIAS = 7;
    static constexpr bool IEEE = false, SATURATES = true, SIGNED = true;
};
template <> struct Format<e5m2> {
    static constexpr int EXPONENT = 5, MANTISSA = 2, BIAS = 15;
    static constexpr bool IEEE = true, SATURATES = true, SIGNED = true;
};
template <> struct Format<ue5m3> {  // without a sign, and only 0 is rounded to 0
    static constexpr int EXPONENT = 5, MANTISSA = 3, BIAS = 15;
    static constexpr bool IEEE = false, SATURATES = true, SIGNED = false;
};
template <> struct Format<fp16> {
    static constexpr int EXPONENT = 5, MANTISSA = 10, BIAS = 15;
    static constexpr bool IEEE = true, SATURATES = true, SIGNED = true;
};
template <> struct Format<bf16> {
    static constexpr int EXPONENT = 8, MANTISSA = 7, BIAS = 127;
    static constexpr bool IEEE = true, SATURATES = false, SIGNED = true;
};

template <class T> static const char* name_of(void) { return dtype_names[DTypeOf<T>::value]; }
template <class T> static uint32_t sign_of(void) { return 1u << (Format<T>::EXPONENT + Format<T>::MANTISSA); }
template <class T> static uint32_t sign_of(float x) { return Format<T>::SIGNED && signbit(x) ? sign_of<T>() : 0; }
template <class T> static uint32_t codes_of(void) { return Format<T>::SIGNED ? 2 * sign_of<T>() : sign_of<T>(); }

template <class T> static double defined_value(uint32_t code) {
    typedef Format<T> F;
    uint32_t m = code & ((1u << F::MANTISSA) - 1), e = (code >> F::MANTISSA) & ((1u << F::EXPONENT) - 1), top = (1u << F::EXPONENT) - 1;
    double sign = (code & sign_of<T>()) != 0 ? -1.0 : 1.0, fraction = (double)m / (1 << F::MANTISSA);
    if (F::IEEE && e == top) { return m == 0 ? sign * INFINITY : NAN; }
    if (!F::IEEE && e == top && m == (1u << F::MANTISSA) - 1) { return NAN; }
    return sign * (e == 0 ? ldexp(fraction, 1 - F::BIAS) : ldexp(1.0 + fraction, (int)e - F::BIAS));
}

// The values of the codes 0, 1, … to the largest finite one
template <class T> static const std::vector<double>& values(void) {
    static std::vector<double> grid;
    for (uint32_t code = 0; grid.empty() || code == grid.size(); code++) {
        double x = defined_value<T>(code);
        if (!(x - x == 0.0)) { break; }
        grid.push_back(x);
    }
    return grid;
}

// The code of the value nearest to x, ties to the even code
template <class T> static uint32_t nearest(float x) {
    const std::vector<double>& grid = values<T>();
    uint32_t max = (uint32_t)grid.size() - 1, code;
    if (x != x) { return sign_of<T>() - 1; }
    double a = fabs((double)x);
    if (a > grid[max]) {
        double limit = grid[max] + (grid[max] - grid[max - 1]) / 2;  // IEEE rounding: inf begins half a step beyond the largest value
        code = Format<T>::SATURATES || a < limit ? max : max + 1;
    } else {
        uint32_t high = (uint32_t)(std::lower_bound(grid.begin(), grid.end(), a) - grid.begin());
        uint32_t low = grid[high] == a ? high : high - 1;
        double up = grid[high] - a, down = a - grid[low];
        code = up < down ? high : down < up ? low : low % 2 == 0 ? low : high;
    }
    if (!Format<T>::SIGNED && a > 0.0 && code == 0) { code = 1; }
    return code | sign_of<T>(x);
}

// Numbers where an error would show, of both signs: every value, every midpoint between two values, one unit of the float around both,
// every FP16 value, powers of two, subnormal floats, inf, NaN, and any floats at all
template <class T> static const std::vector<float>& points(void) {
    static std::vector<float> list;
    if (!list.empty()) { return list; }
    const std::vector<double>& grid = values<T>();
    std::vector<float> positive;
    for (size_t i = 0; i < grid.size(); i++) {
        positive.push_back((float)grid[i]);
        double next = i + 1 < grid.size() ? grid[i + 1] : 2 * grid[i] - grid[i - 1];
        if ((grid[i] + next) / 2 <= FLT_MAX) { positive.push_back((float)((grid[i] + next) / 2)); }
    }
    for (int e = -149; e <= 127; e++) { positive.push_back(ldexpf(1.0f, e)); }
    for (uint32_t u : {1u, 2u, 3u, 0x7fffffu, 0x7ffffeu, 0x400000u, 0x400001u}) { positive.push_back(bits_to_float(u)); }
    for (float x : {448.0f, 464.0f, 480.0f, 512.0f, 57344.0f, 61440.0f, 65504.0f, 65520.0f, 65536.0f, 1e10f, FLT_MAX}) {
        positive.push_back(x);
    }
    for (uint32_t code = 0; code < 0x7c00; code++) { positive.push_back((float)defined_value<fp16>(code)); }
    size_t exact = positive.size();
    for (size_t i = 0; i < exact; i++) {
        if (positive[i] > 0.0f) { positive.push_back(nextafterf(positive[i], 0.0f)); }
        positive.push_back(nextafterf(positive[i], INFINITY));
    }
    positive.push_back(INFINITY);
    for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7fffffffu, 0x7fa00000u}) { positive.push_back(bits_to_float(nan)); }
    for (float x : positive) {
        list.push_back(x);
        list.push_back(bits_to_float(float_to_bits(x) ^ 0x80000000u));
    }
    for (int i = 0; i < 300000; i++) { list.push_back(any_float()); }
    for (int i = 0; i < 100000; i++) { list.push_back((float)(normal() * exp2(uniform(-30, 20)))); }
    return list;
}

// one at a time: the optimiser sees no loop
template <class T> __attribute__((noinline)) static T encode_one(float x) { return encoded<T>(x); }
template <class T> __attribute__((noinline)) static float decode_one(T x) { return to_float(x); }
template <class T> __attribute__((noinline)) static T encode_one_stochastic(float x, uint32_t random) {
    T t;
    from_float_stochastic(t, x, random);
    return t;
}

// ---- decoding ----

template <class T> static void check_decoding(void) {
    for (uint32_t code = 0; code < codes_of<T>(); code++) {
        T t;
        t.bits = (decltype(t.bits))code;
        double want = defined_value<T>(code);
        float got = decode_one(t);
        if (want != want ? got == got : ((double)got != want || signbit(got) != signbit(want))) {
            fail_msg("%s code 0x%x decodes to %.9g, not %.9g", name_of<T>(), code, (double)got, want);
        }
    }
}

static void every_code_decodes_to_its_definition(void**) {
    check_decoding<e4m3>();
    check_decoding<e5m2>();
    check_decoding<ue5m3>();
    check_decoding<fp16>();
    check_decoding<bf16>();
}

template <class T> static void check_names(DType t, int bytes, const char* name) {
    assert_int_equal(DTypeOf<T>::value, t);
    assert_int_equal(dtype_bytes(t), bytes);
    assert_int_equal(sizeof(T), bytes);
    assert_int_equal(is_fp8(t), t == E4M3 || t == E5M2);
    assert_string_equal(dtype_names[t], name);
}

static void types_have_their_names_sizes_and_largest_values(void**) {
    check_names<float>(FP32, 4, "fp32");
    check_names<bf16>(BF16, 2, "bf16");
    check_names<fp16>(FP16, 2, "fp16");
    check_names<e4m3>(E4M3, 1, "e4m3");
    check_names<e5m2>(E5M2, 1, "e5m2");
    check_names<ue5m3>(UE5M3, 1, "ue5m3");
    assert_true((double)largest_of(E4M3) == values<e4m3>().back());
    assert_true((double)largest_of(E5M2) == values<e5m2>().back());
    assert_true((double)largest_of(UE5M3) == values<ue5m3>().back());
    assert_true((double)largest_of(FP16) == values<fp16>().back());
    assert_true(largest_of(FP32) == FLT_MAX);
    assert_true(round_to<e4m3>(-17.3f) == -18.0f && round_to<float>(-17.3f) == -17.3f);
}

// ---- encoding ----

template <class T> static void check_encoding(void) {
    for (float x : points<T>()) {
        uint32_t got = encode_one<T>(x).bits, want = nearest<T>(x);
        if (got != want) { fail_msg("%s of %.9g (bits 0x%08x) is 0x%x, not 0x%x", name_of<T>(), (double)x, float_to_bits(x), got, want); }
    }
}

static void e4m3_takes_the_nearest_value(void**) { check_encoding<e4m3>(); }
static void e5m2_takes_the_nearest_value(void**) { check_encoding<e5m2>(); }
static void ue5m3_takes_the_nearest_value_that_is_not_0(void**) { check_encoding<ue5m3>(); }
static void fp16_takes_the_nearest_value(void**) { check_encoding<fp16>(); }
static void bf16_takes_the_nearest_value(void**) { check_encoding<bf16>(); }

template <class T> static void check_round_trip(void) {
    for (uint32_t code = 0; code < codes_of<T>(); code++) {
        double x = defined_value<T>(code);
        if (x - x != 0.0) { continue; }
        assert_int_equal(encode_one<T>((float)x).bits, code);
        for (uint32_t random : {0u, 0xffffffffu, 0x80000000u, 0x12345678u}) {
            assert_int_equal(encode_one_stochastic<T>((float)x, random).bits, code);
        }
    }
}

static void exact_values_never_change(void**) {
    check_round_trip<e4m3>();
    check_round_trip<e5m2>();
    check_round_trip<ue5m3>();
    check_round_trip<fp16>();
    check_round_trip<bf16>();
}

#ifdef NVIDIA_HEADERS
static bool same_code(uint32_t a, uint32_t b, double value_a, double value_b) {
    return a == b || (value_a != value_a && value_b != value_b);
}

static void nvidias_conversions_give_the_same_codes(void**) {
    for (float x : points<e4m3>()) {
        uint32_t got = encode_one<e4m3>(x).bits, want = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
        if (!same_code(got, want, defined_value<e4m3>(got), defined_value<e4m3>(want))) {
            fail_msg("e4m3 of %.9g is 0x%x, NVIDIA's 0x%x", (double)x, got, want);
        }
    }
    for (float x : points<e5m2>()) {
        uint32_t got = encode_one<e5m2>(x).bits, want = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
        if (!same_code(got, want, defined_value<e5m2>(got), defined_value<e5m2>(want))) {
            fail_msg("e5m2 of %.9g is 0x%x, NVIDIA's 0x%x", (double)x, got, want);
        }
    }
    for (float x : points<bf16>()) {
        __nv_bfloat16_raw raw = __float2bfloat16_rn(x);
        uint32_t got = encode_one<bf16>(x).bits, want = raw.x;
        if (!same_code(got, want, defined_value<bf16>(got), defined_value<bf16>(want))) {
            fail_msg("bf16 of %.9g is 0x%x, NVIDIA's 0x%x", (double)x, got, want);
        }
    }
    for (float x : points<fp16>()) {
        if (fabsf(x) >= 65520.0f) { continue; }  // NVIDIA's goes to inf there, ours saturates
        __half_raw raw = __float2half_rn(x);
        uint32_t got = encode_one<fp16>(x).bits, want = raw.x;
        if (!same_code(got, want, defined_value<fp16>(got), defined_value<fp16>(want))) {
            fail_msg("fp16 of %.9g is 0x%x, NVIDIA's 0x%x", (double)x, got, want);
        }
    }
    for (uint32_t code = 0; code < 256; code++) {
        __half_raw a = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3),
                   b = __nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E5M2);
        double x = (double)decode_one(e4m3{(uint8_t)code}), y = (double)decode_one(e5m2{(uint8_t)code});
        assert_true(defined_value<fp16>(a.x) == x || x != x);
        assert_true(defined_value<fp16>(b.x) == y || y != y);
        assert_int_equal(defined_value<fp16>(a.x) != defined_value<fp16>(a.x), x != x);
        assert_int_equal(defined_value<fp16>(b.x) != defined_value<fp16>(b.x), y != y);
    }
}
#endif

// ---- loops ----

template <class T> struct EncodeRows {  // y (rows, C) = T(x)
    T* y;
    const float* x;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        T* yr = y + (size_t)row * C;
        const float* xr = x + (size_t)row * C;
        team.each(C, [=](auto c) { store(yr, c, load(xr, c)); });
    }
};
template <class T> struct DecodeRows {  // y (rows, C) = x
    float* y;
    const T* x;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        float* yr = y + (size_t)row * C;
        const T* xr = x + (size_t)row * C;
        team.each(C, [=](auto c) { store(yr, c, load(xr, c)); });
    }
};
template <class T> struct StochasticRows {  // y (rows, C) = T(x), rounded up or down
    T* y;
    const float* x;
    RandomKey key;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        size_t first = (size_t)row * C;
        T* yr = y + first;
        const float* xr = x + first;
        RandomKey k = key;
        team.each(C, [=](auto c) { store_stochastic(yr, c, load(xr, c), k, first); });
    }
};

template <class T> static void check_loops(void) {
    const std::vector<float>& list = points<T>();
    Array<float> x(list.size());
    Array<T> y(list.size()), want(list.size());
    memcpy((void*)x.p, list.data(), list.size() * sizeof(float));
    for (size_t i = 0; i < list.size(); i++) { want[i] = encode_one<T>(x[i]); }
    Array<float> back(list.size());
    for (int C : {1, 3, 7, 8, 15, 16, 17, 33, 64, 1000, 1001}) {
        int rows = (int)min_of((size_t)20000, list.size() / C);
        size_t used = (size_t)rows * C;
        memset((void*)y.p, 0x55, y.n * sizeof(T));
        run_rows(EncodeRows<T>{y, x, C}, rows, NULL);
        finish();
        if (memcmp(y.p, want.p, used * sizeof(T)) != 0) { fail_msg("%s: rows of %d differ from single elements", name_of<T>(), C); }
        for (size_t i = used; i < y.n; i++) { assert_int_equal(y[i].bits & 0xff, 0x55); }
        run_rows(DecodeRows<T>{back, y, C}, rows, NULL);
        finish();
        for (size_t i = 0; i < used; i++) {
            float one = decode_one(want[i]);
            if (one != one ? back[i] == back[i] : float_to_bits(back[i]) != float_to_bits(one)) {
                fail_msg("%s: decoding rows of %d differs at %zu", name_of<T>(), C, i);
            }
        }
    }
}

static void loops_give_the_bits_of_single_elements(void**) {
    check_loops<e4m3>();
    check_loops<e5m2>();
    check_loops<ue5m3>();
    check_loops<fp16>();
    check_loops<bf16>();
}

// ---- stochastic rounding ----

template <class T> static void check_neighbours(void) {
    const std::vector<double>& grid = values<T>();
    uint32_t max = (uint32_t)grid.size() - 1;
    const std::vector<float>& list = points<T>();
    for (size_t i = 0; i < list.size(); i++) {
        float x = list[i];
        uint32_t random = i % 4 == 0 ? 0u : i % 4 == 1 ? 0xffffffffu : random_u32();
        uint32_t got = encode_one_stochastic<T>(x, random).bits, low, high;
        double a = fabs((double)x);
        if (x != x) {
            low = high = sign_of<T>() - 1;
        } else if (a > grid[max]) {
            low = Format<T>::SATURATES || isinf(x) == 0 ? max : max + 1;
            high = Format<T>::SATURATES ? max : max + 1;
        } else {
            high = (uint32_t)(std::lower_bound(grid.begin(), grid.end(), a) - grid.begin());
            low = grid[high] == a ? high : high - 1;
        }
        if (!Format<T>::SIGNED && a > 0.0) { low = max_of(low, 1u); }
        uint32_t sign = x == x ? sign_of<T>(x) : 0;
        if (got != (low | sign) && got != (high | sign)) {
            fail_msg("%s of %.9g with random 0x%08x is 0x%x, neither 0x%x nor 0x%x", name_of<T>(), (double)x, random, got, low | sign,
                     high | sign);
        }
    }
}

static void stochastic_rounding_takes_a_neighbour(void**) {
    check_neighbours<e4m3>();
    check_neighbours<e5m2>();
    check_neighbours<ue5m3>();
    check_neighbours<fp16>();
    check_neighbours<bf16>();
}

// Numbers within the normal range take a shorter way to the same code.
template <class T> static void check_normal(void) {
    const DType t = DTypeOf<T>::value;
    const double smallest = defined_value<T>(1u << Format<T>::MANTISSA);
    size_t normal = 0;
    for (float x : points<T>()) {
        bool within = fabs((double)x) >= smallest && fabs((double)x) <= values<T>().back();
        assert_int_equal(is_normal(t, fabsf(x), fabsf(x)), within);
        if (!within) { continue; }
        normal++;
        for (uint32_t random : {0u, 0xffffffffu, 0x80000000u, 0x00080000u, random_u32(), random_u32()}) {
            T got;
            from_float_normal(got, x, random);
            if (got.bits != encode_one_stochastic<T>(x, random).bits) {
                fail_msg("%s of %.9g with random 0x%08x is 0x%x the short way", name_of<T>(), (double)x, random, (unsigned)got.bits);
            }
        }
    }
    assert_true(normal > 1000);
}

static void normal_numbers_take_a_shorter_way_to_the_same_codes(void**) {
    check_normal<e4m3>();
    check_normal<e5m2>();
    check_normal<ue5m3>();
    check_normal<fp16>();
    assert_false(is_normal(E4M3, 1.0f, NAN));
    assert_false(is_normal(E4M3, 0x1p-7f, 1.0f));
    assert_false(is_normal(FP16, 1.0f, 65536.0f));
}

// Over all random numbers, x is rounded up in exactly its share: `bits` is how many random bits count for a normal number of T.
template <class T> static void check_share(float x, int bits) {
    uint32_t low = encode_one_stochastic<T>(x, 0).bits;
    double step = (double)decode_one(T{(decltype(T::bits))(low + 1)}) - (double)decode_one(T{(decltype(T::bits))low});
    int64_t up = 0;
    for (uint32_t i = 0; i < 1u << bits; i++) { up += encode_one_stochastic<T>(x, i << (32 - bits)).bits != low; }
    double share = ((double)x - (double)decode_one(T{(decltype(T::bits))low})) / step;
    if ((double)up != ldexp(share, bits)) {
        fail_msg("%s of %.9g is rounded up %.9g of the time, not %.9g", name_of<T>(), (double)x, ldexp((double)up, -bits), share);
    }
}

static void stochastic_rounding_has_exact_shares(void**) {
    for (float x : {1.03f, 300.1f, 0.0175f, -19.9f}) {
        check_share<e4m3>(x, 20);
        check_share<e5m2>(x, 21);
        check_share<ue5m3>(fabsf(x), 20);
        check_share<fp16>(x, 13);
        check_share<bf16>(x, 16);
    }
}

template <class T> static void check_unbiased(uint32_t low, double share, double sign) {
    const int draws = 1 << 16;
    const std::vector<double>& grid = values<T>();
    double step = grid[low + 1] - grid[low];
    float x = (float)(sign * (grid[low] + share * step));
    RandomKey key = random_key(7, low, (uint64_t)(share * 1e6));
    double sum = 0.0;
    for (int i = 0; i < draws; i++) { sum += (double)decode_one(encode_one_stochastic<T>(x, random_bits(key, (uint64_t)i))); }
    double p = (fabs((double)x) - grid[low]) / step, sigma = step * sqrt(p * (1.0 - p) / draws);
    expect_near(sum / draws, (double)x, 4.0 * sigma, "%s: mean of the roundings of %.9g", name_of<T>(), (double)x);
}

template <class T> static void check_unbiased_everywhere(void) {
    uint32_t max = (uint32_t)values<T>().size() - 1, normal_code = 1u << Format<T>::MANTISSA;
    for (uint32_t low : {0u, 1u, normal_code - 1, normal_code, max / 2, max - 2, max - 1}) {
        for (double share : {0.02, 0.3, 0.5, 0.77}) {
            if (!Format<T>::SIGNED && low == 0) { continue; }  // all of it becomes the smallest value
            check_unbiased<T>(low, share, 1.0);
            if (Format<T>::SIGNED) { check_unbiased<T>(low, share, -1.0); }
        }
    }
    if (Format<T>::SIGNED) { check_unbiased<T>(0, 0x1p-9, 1.0); }  // far below the smallest value it is still kept now and then
}

static void stochastic_rounding_is_unbiased(void**) {
    check_unbiased_everywhere<e4m3>();
    check_unbiased_everywhere<e5m2>();
    check_unbiased_everywhere<ue5m3>();
    check_unbiased_everywhere<fp16>();
    check_unbiased_everywhere<bf16>();
}

template <class T> static void check_layouts(void) {
    const int rows = 24, C = 250;
    Array<float> x((size_t)rows * C);
    Array<T> want((size_t)rows * C), y((size_t)rows * C);
    fill_normal(x, 0.0, 3.0);
    RandomKey key = random_key(42, 17, 3);
    for (size_t i = 0; i < x.n; i++) { want[i] = encode_one_stochastic<T>(x[i], random_bits(key, i)); }
    for (int threads = 1; threads <= 3; threads++) {
        for (int split : {1, 2, 3, 24, 125, 250, 6000}) {  // the same elements as rows of another length
            memset((void*)y.p, 0, y.n * sizeof(T));
            with_threads(threads, [&] { run_rows(StochasticRows<T>{y, x, key, (int)(x.n / (size_t)split)}, split, NULL); });
            finish();
            if (memcmp(y.p, want.p, y.n * sizeof(T)) != 0) {
                fail_msg("%s: %d threads, %d rows: other bits", name_of<T>(), threads, split);
            }
        }
    }
}

static void stochastic_rounding_does_not_depend_on_threads_and_layout(void**) {
    check_layouts<e4m3>();
    check_layouts<e5m2>();
    check_layouts<ue5m3>();
    check_layouts<fp16>();
    check_layouts<bf16>();
}

// ---- scales ----

// The largest e with amax·2^e <= largest (products with powers of two are exact in float64), less the margin, clamped
static float exact_scale(float amax, float largest, int margin) {
    int e = -320;
    while (ldexp((double)amax, e + 1) <= (double)largest) { e++; }
    e -= margin;
    return ldexpf(1.0f, e > 126 ? 126 : e < -126 ? -126 : e);
}

static void check_scale(float amax, float largest, int margin) {
    float got = scale_from_amax(amax, largest, margin, 3.0f), want = exact_scale(amax, largest, margin);
    if (got != want) {
        fail_msg("scale of amax %.9g for %.9g with margin %d is %.9g, not %.9g", (double)amax, (double)largest, margin, (double)got,
                 (double)want);
    }
    if (margin == 0 && got > 0x1p-126f && got < 0x1p126f) {  // the property itself: as large as fits
        assert_true((double)amax * (double)got <= (double)largest);
        assert_true(2.0 * (double)amax * (double)got > (double)largest);
    }
}

static void scales_are_the_largest_power_of_two_that_fits(void**) {
    for (float largest : {448.0f, 57344.0f, 65504.0f, 114688.0f}) {
        for (int i = 0; i < 20000; i++) {
            float amax = fabsf(any_float());
            if (amax - amax == 0.0f && amax > 0.0f) { check_scale(amax, largest, 0); }
        }
        for (int e = -149; e <= 127; e++) {
            for (float x : {1.0f, largest}) {
                double y = ldexp((double)x, e);
                if (y > FLT_MAX || y < FLT_MIN * 2.0) { continue; }
                for (int margin : {0, 1, 3}) {
                    check_scale((float)y, largest, margin);
                    check_scale(nextafterf((float)y, INFINITY) <= FLT_MAX ? nextafterf((float)y, INFINITY) : FLT_MAX, largest, margin);
                    check_scale(nextafterf((float)y, 0.0f), largest, margin);
                }
            }
        }
        for (uint32_t u : {1u, 2u, 0x7fffffu, 0x400000u}) { check_scale(bits_to_float(u), largest, 0); }
        check_scale(FLT_MAX, largest, 0);
        check_scale(FLT_MAX, largest, 40);
        assert_true(scale_from_amax(FLT_MAX, largest, 1000, 3.0f) == 0x1p-126f);
        assert_true(scale_from_amax(1e-30f, largest, -1000, 3.0f) == 0x1p126f);
        assert_true(scale_from_amax(-2.0f, largest, 0, 3.0f) == scale_from_amax(2.0f, largest, 0, 3.0f));
    }
}

static void amaxes_that_say_nothing_keep_the_old_scale(void**) {
    for (float amax : {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, bits_to_float(0x7f800001u), bits_to_float(0xffffffffu)}) {
        for (float old : {1.0f, 0.125f, 0x1p126f}) { assert_true(scale_from_amax(amax, 448.0f, 2, old) == old); }
    }
}

// Scaled by its own scale a tensor never saturates, and its largest element uses the upper half of the range.
static void scaled_amaxes_fill_the_range(void**) {
    for (int i = 0; i < 20000; i++) {
        float amax = (float)exp2(uniform(-110, 120)), s = scale_from_amax(amax, 448.0f, 0, 1.0f);
        float q = decode_one(encode_one<e4m3>(amax * s));
        assert_true(q > 223.0f && q <= 448.0f);
        assert_true((double)(amax * s) * (1.0 / (double)s) == (double)amax);  // scaling is exact
    }
}

// ---- random bits ----

// The share of ones in each bit of f(0 … n-1) is 1/2 within 5 standard deviations.
template <class F> static void check_bits(const char* what, F f) {
    const int n = 1 << 18;
    int64_t ones[32] = {};
    for (int i = 0; i < n; i++) {
        uint32_t r = f((uint64_t)i);
        for (int b = 0; b < 32; b++) { ones[b] += (r >> b) & 1u; }
    }
    for (int b = 0; b < 32; b++) { expect_near((double)ones[b], n / 2.0, 5.0 * sqrt(n) / 2.0, "%s: ones in bit %d", what, b); }
}

static void random_bits_look_random(void**) {
    RandomKey key = random_key(1, 2, 3);
    check_bits("bits", [=](uint64_t i) { return random_bits(key, i); });
    for (int step = 1; step <= 64; step *= 2) {
        check_bits("neighbours", [=](uint64_t i) { return random_bits(key, i) ^ random_bits(key, i + (uint64_t)step); });
    }
    for (int turn : {1, 6, 10, 11, 12, 16, 21, 22, 26, 31}) {  // one bit against another of the same number
        check_bits("bits of one number", [=](uint64_t i) { uint32_t r = random_bits(key, i); return r ^ (r << turn | r >> (32 - turn)); });
    }
    RandomKey others[] = {random_key(2, 2, 3), random_key(1, 3, 3), random_key(1, 2, 4),
                          random_key(1, 2, 5), random_key(0, 0, 0), random_key(2, 1, 3)};
    for (RandomKey other : others) { check_bits("two keys", [=](uint64_t i) { return random_bits(key, i) ^ random_bits(other, i); }); }
    check_bits("elements beyond 2^32", [=](uint64_t i) { return random_bits(key, i) ^ random_bits(key, i + (1ull << 32)); });
    check_bits("elements beyond 2^32 among themselves", [=](uint64_t i) { return random_bits(key, i << 32); });
    check_bits("seeds", [](uint64_t i) { return random_bits(random_key(i, 0, 0), 0); });
    check_bits("steps", [](uint64_t i) { return random_bits(random_key(0, i, 0), 0); });
    check_bits("tensors", [](uint64_t i) { return random_bits(random_key(0, 0, i), 0); });
}

static void random_bytes_are_uniform(void**) {
    const int n = 1 << 18;
    RandomKey key = random_key(9, 9, 9);
    for (int byte = 0; byte < 4; byte++) {
        int64_t seen[256] = {};
        for (int i = 0; i < n; i++) { seen[(random_bits(key, (uint64_t)i) >> (8 * byte)) & 0xff]++; }
        double chi = 0.0, want = n / 256.0;
        for (int64_t s : seen) { chi += ((double)s - want) * ((double)s - want) / want; }
        expect_near(chi, 255.0, 5.0 * sqrt(2.0 * 255.0), "byte %d: chi squared", byte);
    }
}

// Seed, step, tensor and element all count, and none stands in for another.
static void every_part_of_the_key_counts(void**) {
    std::vector<uint64_t> drawn;
    for (uint64_t seed = 0; seed < 10; seed++) {
        for (uint64_t step = 0; step < 10; step++) {
            for (uint64_t tensor = 0; tensor < 10; tensor++) {
                RandomKey key = random_key(seed, step, tensor);
                for (uint64_t i = 0; i < 10; i++) {
                    drawn.push_back((uint64_t)random_bits(key, i) << 32 | random_bits(key, i + (1ull << 40)));
                }
            }
        }
    }
    std::sort(drawn.begin(), drawn.end());
    assert_true(std::adjacent_find(drawn.begin(), drawn.end()) == drawn.end());
}

// Every code times every power of two that is allowed; fails on a wrong subnormal, exponent, sign or special
template <class F> static void expect_widened(const char* name) {
    for (int k = -WIDEN_RANGE; k <= WIDEN_RANGE; k++) {
        for (int code = 0; code < 256; code++) {
            F x;
            bf16 y;
            x.bits = (uint8_t)code;
            y.bits = widen(x, k);
            float want = to_float(x) * exp2_int(k), got = to_float(y);
            if (!(want != want ? got != got : float_to_bits(got) == float_to_bits(want))) {
                fail_msg("%s code %02x times 2^%d: %g, not %g", name, code, k, (double)got, (double)want);
            }
        }
    }
}
static void widening_to_bf16_is_exact(void**) {
    expect_widened<e4m3>("e4m3");
    expect_widened<e5m2>("e5m2");
}

#ifdef USE_CUDA
// The GPU's conversions against arithmetic: every float, every code
struct CompareConversions {
    uint64_t* wrong;  // by format: bf16, fp16, e4m3, e5m2; then codes
    template <class T, class Code> static DEVICE bool differs(float x, Code) {
        T a, b;
        from_float(a, x);
        from_float_by_arithmetic(b, x);
        return a.bits != b.bits;
    }
    static DEVICE bool other(float a, float b) { return a != a ? b == b : float_to_bits(a) != float_to_bits(b); }
    template <class Team> DEVICE void operator()(Team team, int row) const {
        uint64_t* w = wrong;
        team.unaligned().each(65536, [=](auto c) {
            uint32_t low = (uint32_t)c.i;
            float x = bits_to_float((uint32_t)row << 16 | low);
            if (differs<bf16>(x, 0)) { atomic_add(&w[0], 1); }
            if (differs<fp16>(x, 0)) { atomic_add(&w[1], 1); }
            if (differs<e4m3>(x, 0)) { atomic_add(&w[2], 1); }
            if (differs<e5m2>(x, 0)) { atomic_add(&w[3], 1); }
            if (row > 0) { return; }
            bool fp8 = low < 256 && (other(to_float(e4m3{(uint8_t)low}), decode<LayoutE4M3, 7>((int8_t)low)) || other(to_float(e5m2{(uint8_t)low}), decode<LayoutE5M2, 7>((int8_t)low)));
            if (fp8 || other(to_float(fp16{(uint16_t)low}), decode<LayoutFP16, 15>((int16_t)low))) { atomic_add(&w[4], 1); }
        });
    }
};
static void the_gpus_conversions_are_those_of_arithmetic(void**) {
    Array<uint64_t> wrong(5);
    wrong.fill(0);
    run_rows(CompareConversions{wrong}, 65536, NULL);
    finish();
    for (int i = 0; i < 5; i++) { assert_int_equal(wrong[i], 0); }
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(widening_to_bf16_is_exact),
        cmocka_unit_test(every_code_decodes_to_its_definition),
        cmocka_unit_test(types_have_their_names_sizes_and_largest_values),
        cmocka_unit_test(e4m3_takes_the_nearest_value),
        cmocka_unit_test(e5m2_takes_the_nearest_value),
        cmocka_unit_test(ue5m3_takes_the_nearest_value_that_is_not_0),
        cmocka_unit_test(fp16_takes_the_nearest_value),
        cmocka_unit_test(bf16_takes_the_nearest_value),
        cmocka_unit_test(exact_values_never_change),
#ifdef NVIDIA_HEADERS
        cmocka_unit_test(nvidias_conversions_give_the_same_codes),
#endif
        cmocka_unit_test(loops_give_the_bits_of_single_elements),
        cmocka_unit_test(stochastic_rounding_takes_a_neighbour),
        cmocka_unit_test(normal_numbers_take_a_shorter_way_to_the_same_codes),
        cmocka_unit_test(stochastic_rounding_has_exact_shares),
        cmocka_unit_test(stochastic_rounding_is_unbiased),
        cmocka_unit_test(stochastic_rounding_does_not_depend_on_threads_and_layout),
        cmocka_unit_test(scales_are_the_largest_power_of_two_that_fits),
        cmocka_unit_test(amaxes_that_say_nothing_keep_the_old_scale),
        cmocka_unit_test(scaled_amaxes_fill_the_range),
        cmocka_unit_test(random_bits_look_random),
        cmocka_unit_test(random_bytes_are_uniform),
        cmocka_unit_test(every_part_of_the_key_counts),
#ifdef USE_CUDA
        cmocka_unit_test(the_gpus_conversions_are_those_of_arithmetic),
#endif
    };
    return RUN_TESTS(tests);
}
