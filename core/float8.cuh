// float8.cuh: the number formats, their rounding, and tensor scales. The same bits on every device.
//
//   format  layout (sign.exponent.mantissa)   max     min normal  min subnormal  beyond max
//   E4M3    1.4.3, bias 7, no inf, NaN 0x7f   448     2^-6        2^-9           saturates, inf too
//   E5M2    1.5.2, bias 15, IEEE-like         57344   2^-14       2^-16          saturates, inf too
//   FP16    1.5.10, bias 15, IEEE             65504   2^-14       2^-24          saturates, inf too
//   UE5M3   0.5.3, bias 15, no inf, NaN 0xff  114688  2^-14       2^-17          saturates, inf too
//   BF16    1.8.7, bias 127, IEEE             3.4e38  2^-126      2^-133         to inf: it is the working format of activations, where an
//                                                                                inf must stay visible to the check for non-finite steps
//
// UE5M3 is for AdamW's second moment, which has no sign and decays by 5 % a step: the range of E5M2 with the unit of E4M3. What it is cast from loses its
// sign, and what is not 0 never becomes 0: that would divide the first moment by ε alone.
//
// All but BF16 are encoded by one function. The float's 24-bit significand m is shifted right until its last kept bit is worth one unit of the target
// at that exponent (further below the normal range: that is all that subnormals are), rounded there, and added to the exponent field: a carry out
// of the significand then lands in the exponent by itself. Rounding is stochastic with 32 given random bits, or to nearest even: then adding a power of
// two so large that the sum's last bit is worth that unit both shifts and rounds. There are no branches, so the loops over a row vectorise; shifts by
// a variable count are one instruction on AVX2, AVX-512 and GPUs.
//
// A tensor is stored as q = cast(x * scale) with scale a power of two, so multiplying and dividing by it is exact: scale = 2^floor(log2(fp_max/amax)
// - margin). It is computed from the exponent and significand bits of amax, not by logf, whose last bit differs between libraries. Or each 128 elements of a
// row, or 128 × 128 of a matrix, have a scale of their own.
#pragma once
#include "common.h"

enum DType { FP32, BF16, FP16, E4M3, E5M2, UE5M3, DTYPE_COUNT };

static const char* const dtype_names[DTYPE_COUNT] = {"fp32", "bf16", "fp16", "e4m3", "e5m2", "ue5m3"};

DEVICE int dtype_bytes(DType t) { return t == FP32 ? 4 : t == BF16 || t == FP16 ? 2 : 1; }
DEVICE bool is_fp8(DType t) { return t == E4M3 || t == E5M2; }  // what is multiplied and sent

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };
struct ue5m3 { uint8_t bits; };

template <class T> struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = FP32; };
template <> struct DTypeOf<bf16> { static constexpr DType value = BF16; };
template <> struct DTypeOf<fp16> { static constexpr DType value = FP16; };
template <> struct DTypeOf<e4m3> { static constexpr DType value = E4M3; };
template <> struct DTypeOf<e5m2> { static constexpr DType value = E5M2; };
template <> struct DTypeOf<ue5m3> { static constexpr DType value = UE5M3; };

DEVICE float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
DEVICE uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

// 2^e for e in [-126, 127]
DEVICE float exp2_int(int e) { return bits_to_float((uint32_t)(e + 127) << 23); }

// e of a normal 2^e
DEVICE int exponent_of(float power_of_two) { return (int)((float_to_bits(power_of_two) >> 23) & 0xffu) - 127; }

// ---- encode and decode ----

// The layout of a format: MAN mantissa bits, exponent bias, the largest finite code, the code of NaN.
template <int MAN_, int BIAS_, uint32_t MAX_, uint32_t NAN_> struct Layout {
    static constexpr int MAN = MAN_, BIAS = BIAS_;
    static constexpr uint32_t MAX = MAX_, NOT_A_NUMBER = NAN_;
};
typedef Layout<3, 7, 0x7e, 0x7f> LayoutE4M3;
typedef Layout<2, 15, 0x7b, 0x7f> LayoutE5M2;
typedef Layout<3, 15, 0xfe, 0xff> LayoutUE5M3;
typedef Layout<10, 15, 0x7bff, 0x7fff> LayoutFP16;

enum Rounding { NEAREST, STOCHASTIC };

// The bits of the float whose code, a normal one, is `code`
template <class L> DEVICE constexpr uint32_t normal_bits(uint32_t code) { return (code << (23 - L::MAN)) + ((uint32_t)(127 - L::BIAS) << 23); }

// The code of |x|, which is no NaN, given as bits, without the sign; `random`: 32 random bits, read by STOCHASTIC only. It is placed where a float has
// its exponent and upper mantissa: compilers cut vectors down to the width of codes once, after all else is done, if the last thing is a shift.
template <class L, Rounding R> DEVICE uint32_t encode_magnitude(uint32_t u, uint32_t random) {
    constexpr int UP = 23 - L::MAN;
    constexpr uint32_t LOWEST = normal_bits<L>(1u << L::MAN), TOP = normal_bits<L>(L::MAX);
    u = u > TOP ? TOP : u;
    uint32_t exponent = u & 0x7f800000u, kept = exponent < LOWEST ? LOWEST : exponent;  // the exponent whose unit we round to
    uint32_t q;
    if (R == NEAREST) {
        q = float_to_bits(bits_to_float(u) + bits_to_float(kept + ((uint32_t)UP << 23)));  // the sum's last bit is worth that unit: adding rounds
    } else {
        uint32_t m = (u & 0x7fffffu) | 0x800000u;       // a subnormal float is far below every target's range: its false leading bit does no harm
        int shift = UP + (int)((kept - exponent) >> 23);
        int far = shift - 31;                           // P(up) = m / 2^shift; below 2^-31 of a unit the tail is cut off
        far = far < 0 ? 0 : far > 31 ? 31 : far;
        m >>= far;
        shift = shift > 31 ? 31 : shift;
        q = (m + (random >> (32 - shift))) >> shift;
    }
    return (q << UP) + (kept - LOWEST);                 // of the sum only what is below its exponent field is left
}

template <class L, Rounding R, int SIGN> DEVICE uint32_t encode(float x, uint32_t random) {
    constexpr int UP = 23 - L::MAN;
    uint32_t bits = float_to_bits(x), u = bits & 0x7fffffffu;
    uint32_t placed = encode_magnitude<L, R>(u, random) | ((bits >> (31 - SIGN - UP)) & (1u << (SIGN + UP)));
    return (u > 0x7f800000u ? L::NOT_A_NUMBER << UP : placed) >> UP;  // NaN has one code, as the hardware's conversion gives it
}

template <Rounding R> DEVICE uint8_t encode_ue5m3(float x, uint32_t random) {
    constexpr int UP = 23 - LayoutUE5M3::MAN;
    uint32_t u = float_to_bits(x) & 0x7fffffffu, placed = encode_magnitude<LayoutUE5M3, R>(u, random), least = (u > 1u ? 1u : u) << UP;
    placed = placed < least ? least : placed;
    return (uint8_t)((u > 0x7f800000u ? LayoutUE5M3::NOT_A_NUMBER << UP : placed) >> UP);
}

// encode<L, STOCHASTIC, SIGN> where |x| is within the normal range: a carry out of what is cut off does all. SIGN 8: none
template <class L, int SIGN> DEVICE uint32_t encode_normal(float x, uint32_t random) {
    constexpr int UP = 23 - L::MAN;
    uint32_t u = float_to_bits(x) + (random >> (32 - UP)) - normal_bits<L>(0);
    return (SIGN == 8 ? u : u | ((uint32_t)((int32_t)u >> (31 - SIGN - UP)) & (1u << (SIGN + UP)))) >> UP;  // bits beyond the code are to be cut off
}

template <Rounding R> DEVICE uint16_t encode_bf16(float x, uint32_t random) {
    uint32_t u = float_to_bits(x);
    uint32_t add = R == NEAREST ? 0x7fffu + ((u >> 16) & 1u) : (random >> 16);
    uint32_t special = (u & 0x7f800000u) == 0x7f800000u;  // inf stays inf under stochastic rounding too; NaN must not round into inf
    uint32_t rounded = (special ? u : u + add) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

// x to the nearest value of the format, ties to even; by arithmetic
DEVICE void from_float_by_arithmetic(bf16& d, float x) { d.bits = encode_bf16<NEAREST>(x, 0); }
DEVICE void from_float_by_arithmetic(fp16& d, float x) { d.bits = (uint16_t)encode<LayoutFP16, NEAREST, 15>(x, 0); }
DEVICE void from_float_by_arithmetic(e4m3& d, float x) { d.bits = (uint8_t)encode<LayoutE4M3, NEAREST, 7>(x, 0); }
DEVICE void from_float_by_arithmetic(e5m2& d, float x) { d.bits = (uint8_t)encode<LayoutE5M2, NEAREST, 7>(x, 0); }

// The same; GPUs have instructions that give the same bits (test/float8.cpp tries every float)
DEVICE void from_float(float& d, float x) { d = x; }
DEVICE void from_float(bf16& d, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d.bits) : "f"(x));
#else
    from_float_by_arithmetic(d, x);
#endif
}
DEVICE void from_float(fp16& d, float x) {
#ifdef __CUDA_ARCH__
    float y = x != x ? x : fminf(fmaxf(x, -65504.0f), 65504.0f);
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d.bits) : "f"(y));
#else
    from_float_by_arithmetic(d, x);
#endif
}
DEVICE void from_float(e4m3& d, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    d.bits = (uint8_t)pair;
#else
    from_float_by_arithmetic(d, x);
#endif
}
DEVICE void from_float(e5m2& d, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    d.bits = (uint8_t)pair;
#else
    from_float_by_arithmetic(d, x);
#endif
}
DEVICE void from_float(ue5m3& d, float x) { d.bits = encode_ue5m3<NEAREST>(x, 0); }

// x to one of its two neighbours, the nearer the likelier: the expected value is x (within range). `random`: 32 random bits.
DEVICE void from_float_stochastic(float& d, float x, uint32_t) { d = x; }
DEVICE void from_float_stochastic(bf16& d, float x, uint32_t random) { d.bits = encode_bf16<STOCHASTIC>(x, random); }
DEVICE void from_float_stochastic(fp16& d, float x, uint32_t random) { d.bits = (uint16_t)encode<LayoutFP16, STOCHASTIC, 15>(x, random); }
DEVICE void from_float_stochastic(e4m3& d, float x, uint32_t random) { d.bits = (uint8_t)encode<LayoutE4M3, STOCHASTIC, 7>(x, random); }
DEVICE void from_float_stochastic(e5m2& d, float x, uint32_t random) { d.bits = (uint8_t)encode<LayoutE5M2, STOCHASTIC, 7>(x, random); }
DEVICE void from_float_stochastic(ue5m3& d, float x, uint32_t random) { d.bits = encode_ue5m3<STOCHASTIC>(x, random); }

// The same bits for |x| within the format's normal range (see is_normal), in fewer steps where there are fewer
DEVICE void from_float_normal(float& d, float x, uint32_t) { d = x; }
DEVICE void from_float_normal(bf16& d, float x, uint32_t random) { d.bits = encode_bf16<STOCHASTIC>(x, random); }
DEVICE void from_float_normal(fp16& d, float x, uint32_t random) { d.bits = (uint16_t)encode_normal<LayoutFP16, 15>(x, random); }
DEVICE void from_float_normal(e4m3& d, float x, uint32_t random) { d.bits = (uint8_t)encode_normal<LayoutE4M3, 7>(x, random); }
DEVICE void from_float_normal(e5m2& d, float x, uint32_t random) { d.bits = (uint8_t)encode_normal<LayoutE5M2, 7>(x, random); }
DEVICE void from_float_normal(ue5m3& d, float x, uint32_t random) { d.bits = (uint8_t)encode_normal<LayoutUE5M3, 8>(x, random); }

// `code`: with its sign, if there is one, in the upper bits too; SIGN 8: none. A subnormal code that is read as a normal one with an exponent one higher
// is 2^(1-BIAS) too large. What that makes of the others is no less than they are, so the lesser of both readings is right.
template <class L, int SIGN> DEVICE float decode(int32_t code) {
    constexpr int UP = 23 - L::MAN;
    uint32_t low = ((uint32_t)code << UP) & ((1u << (UP + SIGN)) - 1u), sign = SIGN == 8 ? 0u : (uint32_t)code & 0x80000000u;
    uint32_t normal = low + normal_bits<L>(0);
    uint32_t tiny = float_to_bits(bits_to_float(low + normal_bits<L>(1u << L::MAN)) - exp2_int(1 - L::BIAS));
    uint32_t u = tiny < normal ? tiny : normal;
    u = low > L::MAX << UP ? low | 0x7f800000u : u;  // inf and NaN
    return bits_to_float(sign | u);
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
DEVICE float to_float(fp16 x) {
#ifdef __CUDA_ARCH__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
    return f;
#else
    return decode<LayoutFP16, 15>((int16_t)x.bits);
#endif
}
DEVICE float to_float(e4m3 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)x.bits));
    return to_float(fp16{(uint16_t)halves});
#else
    return decode<LayoutE4M3, 7>((int8_t)x.bits);
#endif
}
DEVICE float to_float(e5m2 x) {
#ifdef __CUDA_ARCH__
    return to_float(fp16{(uint16_t)(x.bits << 8)});
#else
    return decode<LayoutE5M2, 7>((int8_t)x.bits);
#endif
}
DEVICE float to_float(ue5m3 x) { return decode<LayoutUE5M3, 8>(x.bits); }

// ---- FP8 to BF16, times a power of two ----

// Every FP8 value times 2^k is a BF16 value while it stays in range, so this is arithmetic on codes, in 16-bit lanes: twice as many at once as floats,
// and several times faster than through them. `k` in [-WIDEN_RANGE, WIDEN_RANGE]; then no value leaves BF16's normal range.
constexpr int WIDEN_RANGE = 100;

DEVICE uint16_t widen(e4m3 x, int k) {
    uint16_t u = x.bits & 0x7f, m = u & 7;
    uint16_t normal = (uint16_t)((u << 4) + (120 << 7));                                // 127 - 7: from one bias to the other
    uint16_t tiny = m >= 4 ? 0x3c00 + ((m - 4) << 5) : m >= 2 ? 0x3b80 + ((m - 2) << 6) : 0x3b00;  // m·2^-9, normalised
    uint16_t v = (uint16_t)((u < 8 ? tiny : normal) + k * 128);
    v = u == 0 ? 0 : v;
    v = u == 0x7f ? 0x7fff : v;
    return (uint16_t)(v | ((uint16_t)(x.bits & 0x80) << 8));
}
DEVICE uint16_t widen(e5m2 x, int k) {
    uint16_t u = x.bits & 0x7f;
    uint16_t normal = (uint16_t)((u << 5) + (112 << 7));
    uint16_t tiny = u >= 2 ? 0x3800 + ((u - 2) << 6) : 0x3780;                          // m·2^-16
    uint16_t v = (uint16_t)((u < 4 ? tiny : normal) + k * 128);
    v = u == 0 ? 0 : v;
    v = u >= 0x7c ? (u == 0x7c ? 0x7f80 : 0x7fff) : v;
    return (uint16_t)(v | ((uint16_t)(x.bits & 0x80) << 8));
}

// x as the 16-bit (or 32-bit) source of every quantisation: what a tensor of type T would hold
template <class T> DEVICE float round_to(float x) { T t; from_float(t, x); return to_float(t); }

// ---- scales ----

DEVICE float largest_of(DType t) { return t == E4M3 ? 448.0f : t == E5M2 ? 57344.0f : t == FP16 ? 65504.0f : t == UE5M3 ? 114688.0f : 3.4028235e38f; }

// Whether magnitudes from `low` to `high` are within the format's normal range. NaN is not.
DEVICE bool is_normal(DType t, float low, float high) { return low >= (t == E4M3 ? 0x1p-6f : 0x1p-14f) && high <= largest_of(t); }

// The quantising scale 2^floor(log2(largest/amax) - margin), clamped to 2^±126. amax 0, inf and NaN say nothing of the range: the old scale stays.
DEVICE float scale_from_amax(float amax, float largest, int margin, float old_scale) {
    uint32_t a = float_to_bits(amax) & 0x7fffffffu, f = float_to_bits(largest);
    int e = (int)(f >> 23) - (int)(a >> 23) - ((a & 0x7fffffu) > (f & 0x7fffffu) ? 1 : 0) - margin;
    e = e > 126 ? 126 : e < -126 ? -126 : e;
    return a == 0 || a >= 0x7f800000u ? old_scale : exp2_int(e);
}

// Elements that share a scale where a matmul's operands are scaled by block: along the dimension that is summed over, and of weights across it too
constexpr int SCALE_BLOCK = 128;

// Descales of a row of 128 × 128 blocks, with the padding that cuBLASLt wants
DEVICE int64_t padded_blocks(int64_t blocks) { return round_up(blocks, (int64_t)4); }

// The scale of a block from its own amax, given as bits. Zeros take any; a block that is not finite gets NaN, and so do its codes and all that they enter.
DEVICE float block_scale(uint32_t amax, float largest) {
    return amax >= 0x7f800000u ? bits_to_float(0x7fc00000u) : scale_from_amax(bits_to_float(amax), largest, 0, 1.0f);
}

// ---- random bits for stochastic rounding ----

// The generator is a function of a key and a position, so neither the thread count nor the layout over ranks changes what an element draws.
struct RandomKey { uint32_t a, b; };

static inline RandomKey random_key(uint64_t seed, uint64_t step, uint64_t tensor) {
    uint64_t z = mix64(mix64(mix64(seed) ^ step) ^ tensor);
    RandomKey key = {(uint32_t)z, (uint32_t)(z >> 32)};
    return key;
}

DEVICE uint32_t mix32(uint32_t x) {
    x ^= x >> 16; x *= 0x7feb352du;
    x ^= x >> 15; x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

// 32 random bits for one element of the unsharded tensor, from the two halves of its number; most neighbours share the upper one
DEVICE uint32_t random_upper(RandomKey key, uint64_t element) { return mix32((uint32_t)(element >> 32) ^ key.b) ^ key.b; }
DEVICE uint32_t random_lower(RandomKey key, uint64_t element, uint32_t upper) { return mix32(mix32((uint32_t)element ^ key.a) + upper); }
DEVICE uint32_t random_bits(RandomKey key, uint64_t element) { return random_lower(key, element, random_upper(key, element)); }

// The number that an element of a share has within the whole tensor: random bits depend on it, and so not on how ranks share the tensor. A share is made of
// runs of neighbours at equal distances; run 0: it is the tensor.
struct ElementMap {
    uint64_t run, stride, first;
    DEVICE uint64_t operator()(uint64_t i) const { return run == 0 ? i : i / run * stride + first + i % run; }
    // Are elements i … i+n-1 neighbours in the whole tensor?
    DEVICE bool together(uint64_t i, uint64_t n) const { return run == 0 || i % run + n <= run; }
};
