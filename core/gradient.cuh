// gradient.cuh: gradients in few bits: adding up micro-batches, the codes that travel, and the sums of what several ranks sent.
//
// A gradient is first *accumulated* over a rank's micro-batches, in FP32 by the matmul itself, in BF16, or in E4M3 with a scale that is made anew for
// every sum (the paper's way; a pass for the amax, a pass for the codes). It is then *quantised* to the format that travels, and reduced in one of two
// ways. A ring adds codes that share one scale, rounding at every hop (`hop_add`). A direct exchange sends every rank's codes, each rank with a scale
// of its own, to the owner of a part, who adds them in FP32 in the order of the ranks (`SumParts`) and rounds once.
//
// Scales are powers of two, in a ring times the headroom μ, and kept in slots {descale, scale, previous descale, 0}. In an exchange a scale says two more things: 0, "my values are not
// finite", which the minimum over the ranks carries to all; and FLT_MAX, "all my values are zero", which gives way to any other. A tensor that is not
// finite on some rank gets a slot of NaN, so that its norm is NaN and the step is skipped by all ranks alike.
#pragma once
#include "device.cuh"
#include <float.h>

constexpr int PIECE = 4096;  // elements that one Team takes, and of one partial sum of the gradient norm

static inline int pieces_of(size_t elements) { return (int)ceil_div(elements, (size_t)PIECE); }
// Elements of the piece that begins at `first`: the last one of a tensor may be short
DEVICE int piece_length(size_t elements, size_t first) { return (int)min_of((size_t)PIECE, elements - first); }

// f(Tag<T>) for the type of activations
template <class F> static inline void with_type(DType t, F f) {
    if (t == FP32) { f(Tag<float>{}); }
    else if (t == BF16) { f(Tag<bf16>{}); }
    else { die("%s is no type of activations", dtype_names[t]); }
}
// f(Tag<T>) for the type of a gradient
template <class F> static inline void with_gradient_type(DType t, F f) {
    switch (t) {
        case FP32: f(Tag<float>{}); break;
        case BF16: f(Tag<bf16>{}); break;
        case E4M3: f(Tag<e4m3>{}); break;
        case E5M2: f(Tag<e5m2>{}); break;
        default: die("%s is no format of gradients", dtype_names[t]);
    }
}
// f(Tag<A>, rounding) for an accumulator that kernels add to; FP32 has nothing to round
template <Rounding R> struct RoundingTag { static constexpr Rounding value = R; };
template <class F> static inline void with_accumulator(DType t, Rounding rounding, F f) {
    bool stochastic = rounding == STOCHASTIC;
    if (t == FP32) { f(Tag<float>{}, RoundingTag<NEAREST>{}); }
    else if (t == BF16 && stochastic) { f(Tag<bf16>{}, RoundingTag<STOCHASTIC>{}); }
    else if (t == BF16) { f(Tag<bf16>{}, RoundingTag<NEAREST>{}); }
    else if (t == E4M3 && stochastic) { f(Tag<e4m3>{}, RoundingTag<STOCHASTIC>{}); }
    else if (t == E4M3) { f(Tag<e4m3>{}, RoundingTag<NEAREST>{}); }
    else { die("gradients are not added up in %s", dtype_names[t]); }
}

// ---- slots ----

DEVICE bool is_finite(double x) { return x - x == 0.0; }
DEVICE float not_a_number(void) { return bits_to_float(0x7fc00000u); }

// The quantising scale `scale` in a slot; 0 stands for values that are not finite
DEVICE void set_slot(float* slot, float scale) {
    slot[2] = slot[0];
    slot[0] = scale == 0.0f ? not_a_number() : 1.0f / scale;
    slot[1] = scale == 0.0f ? not_a_number() : scale;
}

struct ResetSlots {  // scale 1
    float* slots;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        for (int k = 0; k < 4; k++) { slots[(size_t)i * 4 + k] = k < 2 ? 1.0f : 0.0f; }
    }
};

// The scale that a rank sends for a tensor of this amax
DEVICE float exchanged_scale(float amax, float largest) {
    if (!is_finite(amax)) { return 0.0f; }
    return amax == 0.0f ? FLT_MAX : scale_from_amax(amax, largest, 0, 1.0f);
}
// The scale to use for one that was exchanged: any will do for zeros
DEVICE float usable_scale(float exchanged) { return exchanged == FLT_MAX ? 1.0f : exchanged; }

template <class T> struct AmaxPieces {  // *amax = max(*amax, max |x|) as float bits
    uint32_t* amax;
    const T* x;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        const T* p = x + first;
        uint32_t top = team.amax(piece_length(elements, first), [=](auto c) { return load(p, c); });
        if (team.leads()) { atomic_max(amax, top); }
    }
};

// ---- accumulation over micro-batches ----

template <class A, class B> struct SumAmax {  // *amax = max |[sum·descale] + addend|
    uint32_t* amax;
    const A* sum;
    const B* addend;
    const float* slot;
    size_t elements;
    bool add;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        const A* ps = sum + first;
        const B* pa = addend + first;
        float k = slot[0];
        int n = piece_length(elements, first);
        uint32_t top = add ? team.amax(n, [=](auto c) { return load(ps, c) * k + load(pa, c); }) : team.amax(n, [=](auto c) { return load(pa, c); });
        if (team.leads()) { atomic_max(amax, top); }
    }
};

struct SumSlot {  // the slot of the sum that is about to be written; its amax is cleared for the next
    float* slot;
    uint32_t* amax;
    float largest;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        set_slot(slot, usable_scale(exchanged_scale(bits_to_float(*amax), largest)));
        *amax = 0;
    }
};

// f(c, number of element 0) for the elements of a piece: their random bits depend on number + c.i. Where the piece lies together in the whole tensor that
// is one number, else each range has its own: a division, with which no compiler vectorises the loop.
template <Rounding R, class Team, class F> DEVICE void each_numbered(Team team, int n, ElementMap number, uint64_t here, F f) {
    if (R == NEAREST || number.together(here, (uint64_t)n)) {
        uint64_t first = number(here);
        team.each(n, [=](auto c) { f(c, first); });
    } else {
        team.each(n, [=](auto c) { f(c, number(here + c.i) - c.i); });
    }
}

template <class A, class B, Rounding R> struct AddGradient {  // sum = A(([sum·previous descale] + addend)·scale)
    A* sum;
    const B* addend;
    const float* slot;      // NULL = 1: for BF16
    RandomKey key;          // of this addition
    ElementMap whole;       // the number of an element within the whole tensor,
    uint64_t first_element; // from that of sum[0] within this rank's share
    size_t elements;
    bool add;
    template <class Team> DEVICE void operator()(Team full, int piece) const {
        size_t first = (size_t)piece * PIECE;
        A* ps = sum + first;
        const B* pa = addend + first;
        Team team = pack_aligned(ps) && pack_aligned(pa) ? full : full.unaligned();
        float scale = slot != NULL ? slot[1] : 1.0f, previous = slot != NULL ? slot[2] : 1.0f;
        RandomKey k = key;
        uint64_t here = first_element + first;
        int n = piece_length(elements, first);
        if (add) { each_numbered<R>(team, n, whole, here, [=](auto c, uint64_t at) { store_rounded<R>(ps, c, (load(ps, c) * previous + load(pa, c)) * scale, k, at); }); }
        else { each_numbered<R>(team, n, whole, here, [=](auto c, uint64_t at) { store_rounded<R>(ps, c, load(pa, c) * scale, k, at); }); }
    }
};

// sum (elements) [+]= addend, FP32 or BF16, rounded to the accumulator's format. `slot`, `amax`: of an FP8 accumulator, which takes the whole tensor at once.
// `first_element`: number of sum[0] within this rank's share, which lies within the whole tensor as `whole` says.
static inline void add_gradient(DType type, void* sum, const void* addend, DType addend_type, float* slot, uint32_t* amax, Rounding rounding, RandomKey key, ElementMap whole,
                                uint64_t first_element, size_t elements, bool add, Stream s) {
    with_accumulator(type, rounding, [&](auto tag, auto r) {
        with_type(addend_type, [&](auto addend_tag) {
            typedef typename decltype(tag)::type A;
            typedef typename decltype(addend_tag)::type B;
            const B* b = (const B*)addend;
            int pieces = pieces_of(elements);
            if (is_fp8(type)) {
                run_rows(SumAmax<A, B>{amax, (const A*)sum, b, slot, elements, add}, pieces, s);
                run_rows(SumSlot{slot, amax, largest_of(type)}, 1, s);
            }
            run_rows(AddGradient<A, B, decltype(r)::value>{(A*)sum, b, is_fp8(type) ? slot : NULL, key, whole, first_element, elements, add}, pieces, s);
        });
    });
}

template <class A, Rounding R> struct AddAccumulators {  // sum = A(first + second)
    A* sum;
    const A* first;
    const A* second;
    RandomKey key;           // of this addition
    ElementMap whole;        // as in AddGradient
    uint64_t first_element;
    size_t elements;
    template <class Team> DEVICE void operator()(Team full, int piece) const {
        size_t from = (size_t)piece * PIECE;
        A* ps = sum + from;
        const A* pa = first + from;
        const A* pb = second + from;
        Team team = pack_aligned(ps) && pack_aligned(pa) && pack_aligned(pb) ? full : full.unaligned();
        RandomKey k = key;
        each_numbered<R>(team, piece_length(elements, from), whole, first_element + from,
                         [=](auto c, uint64_t at) { store_rounded<R>(ps, c, load(pa, c) + load(pb, c), k, at); });
    }
};

// sum (elements) = first + second, all of the accumulator's format, added in FP32 and rounded once; sum may be one of the two. Whoever adds the same two
// with the same key gets the same bits. FP8 accumulators, each with a scale of its own, are not added so.
static inline void add_accumulators(DType type, void* sum, const void* first, const void* second, Rounding rounding, RandomKey key, ElementMap whole,
                                    uint64_t first_element, size_t elements, Stream s) {
    if (is_fp8(type)) { die("two accumulators in %s are not added up", dtype_names[type]); }
    with_accumulator(type, rounding, [&](auto tag, auto r) {
        typedef typename decltype(tag)::type A;
        run_rows(AddAccumulators<A, decltype(r)::value>{(A*)sum, (const A*)first, (const A*)second, key, whole, first_element, elements}, pieces_of(elements), s);
    });
}

// ---- the codes that travel ----

DEVICE bool is_zero_code(e4m3 x) { return (x.bits & 0x7f) == 0; }
DEVICE bool is_zero_code(e5m2 x) { return (x.bits & 0x7f) == 0; }
DEVICE bool is_zero_code(bf16 x) { return (x.bits & 0x7fff) == 0; }
DEVICE bool is_zero_code(float x) { return x == 0.0f; }
// the largest finite code: what overflow saturates to
DEVICE bool is_top_code(e4m3 x) { return (x.bits & 0x7f) == LayoutE4M3::MAX; }
DEVICE bool is_top_code(e5m2 x) { return (x.bits & 0x7f) == LayoutE5M2::MAX; }
DEVICE bool is_top_code(bf16) { return false; }  // overflow is inf there
DEVICE bool is_top_code(float) { return false; }

// Non-zero values whose code is 0, and codes at the maximum, of those sent; codes at the maximum of those reduced, where nothing else counts them
struct CodeCounts { uint64_t underflow, saturated, reduced; };

template <class D, class A> struct QuantiseGradient {  // codes = D(x·descale·scale); counts += those of this tensor
    D* codes;
    const A* x;
    const float* descale;  // of x; NULL = 1
    const float* scale;    // NULL = 1
    CodeCounts* counts;    // NULL: not wanted
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        D* pd = codes + first;
        const A* px = x + first;
        float k = (descale != NULL ? *descale : 1.0f) * (scale != NULL ? *scale : 1.0f);
        int n = piece_length(elements, first);
        if (counts == NULL) {
            team.each(n, [=](auto c) { store(pd, c, load(px, c) * k); });
            return;
        }
        auto found = team.sum_pair(n, [=](auto c) { return count_codes(pd, c, load(px, c), k); });
        if (!team.leads()) { return; }
        atomic_add(&counts->underflow, (uint64_t)found.a.v[0]);  // at most PIECE: exact in a float
        atomic_add(&counts->saturated, (uint64_t)found.b.v[0]);
    }
    template <int N> static DEVICE VecPair<N> count_codes(D* codes, Range<N> c, Vec<N> v, float k) {
        Raw<D, N> r;
        VecPair<N> found;
        UNROLL
        for (int i = 0; i < N; i++) {
            from_float(r.e[i], v.v[i] * k);
            found.a.v[i] = v.v[i] != 0.0f && is_zero_code(r.e[i]) ? 1.0f : 0.0f;
            found.b.v[i] = is_top_code(r.e[i]) ? 1.0f : 0.0f;
        }
        store_raw(codes, c, r);
        return found;
    }
};

// ---- scales of an exchange; row k is the k-th tensor of a bucket ----

struct LocalScales {  // scales[k] = what this rank has to say; the amax is cleared for the next step
    float* scales;
    uint32_t* amax;            // by parameter
    const float* accum_slots;  // (parameters, 4): of the accumulators that were measured
    const int* tensors;        // (k) parameters
    float largest;
    template <class Team> DEVICE void operator()(Team team, int k) const {
        if (!team.leads()) { return; }
        int t = tensors[k];
        scales[k] = exchanged_scale(bits_to_float(amax[t]) * accum_slots[4 * (size_t)t], largest);
        amax[t] = 0;
    }
};

struct RingSlots {  // slots of the codes that the ring adds: scale μ·s, s shared by all ranks, not below the smallest normal float
    float* slots;
    const float* shared;  // (k) the minimum over the ranks
    const float* mu;      // by parameter
    const int* tensors;
    template <class Team> DEVICE void operator()(Team team, int k) const {
        if (!team.leads()) { return; }
        int t = tensors[k];
        float s = usable_scale(shared[k]);
        set_slot(slots + 4 * (size_t)t, s == 0.0f ? 0.0f : max_of(mu[t] * s, FLT_MIN));
    }
};

struct SenderDescales {  // by rank: descales (row) = 1/scales (row), the latter made usable; NaN for what is not finite
    float* descales;
    float* scales;
    int row;
    template <class Team> DEVICE void operator()(Team team, int rank) const {
        float* s = scales + (size_t)rank * row;
        float* d = descales + (size_t)rank * row;
        team.unaligned().each(row, [=](auto c) {
            float scale = usable_scale(s[c.i]);
            s[c.i] = scale;
            d[c.i] = scale == 0.0f ? not_a_number() : 1.0f / scale;
        });
    }
};

struct ResultSlots {  // slots of the sums that a direct exchange rounds
    float* slots;
    const uint32_t* amax;  // (k) of the sums, over all parts
    const int* tensors;
    float largest;
    template <class Team> DEVICE void operator()(Team team, int k) const {
        if (team.leads()) { set_slot(slots + 4 * (size_t)tensors[k], usable_scale(exchanged_scale(bits_to_float(amax[k]), largest))); }
    }
};

// ---- sums over ranks ----

template <class D> struct SumParts {  // sums = ((part_0·d_0 + part_1·d_1) + …) in FP32, in the order of the ranks; *amax = max |sums|
    float* sums;
    uint32_t* amax;         // NULL: not wanted
    const D* parts;         // (ranks, stride)
    const float* descales;  // (ranks, descale_stride); NULL = 1
    size_t stride;
    int ranks, descale_stride;
    size_t elements;
    bool add;               // to what is in sums, which then comes first
    template <class Team> DEVICE void operator()(Team full, int piece) const {
        size_t first = (size_t)piece * PIECE, step = stride;
        float* out = sums + first;
        const D* p = parts + first;
        Team team = pack_aligned(out) && pack_aligned(p) ? full.strided((int)(step % 16)) : full.unaligned();
        int n = piece_length(elements, first), count = ranks, d_step = descale_stride;
        const float* d = descales;
        auto descale = [=](int r) { return d != NULL ? d[(size_t)r * d_step] : 1.0f; };
        float k0 = descale(0);
        if (add) { team.each(n, [=](auto c) { store(out, c, load(out, c) + load(p, c) * k0); }); }
        else { team.each(n, [=](auto c) { store(out, c, load(p, c) * k0); }); }  // each thread of a Team meets its own elements again
        int r = 1;
        for (; r + 4 <= count; r += 4) {  // four at a time: the running sum is read and written less often
            const D* q = p + (size_t)r * step;
            float ka = descale(r), kb = descale(r + 1), kc = descale(r + 2), kd = descale(r + 3);
            team.each(n, [=](auto c) {
                auto total = load(out, c) + load(q, c) * ka + load(q + step, c) * kb + load(q + 2 * step, c) * kc + load(q + 3 * step, c) * kd;
                store(out, c, total);
            });
        }
        for (; r < count; r++) {
            const D* q = p + (size_t)r * step;
            float k = descale(r);
            team.each(n, [=](auto c) { store(out, c, load(out, c) + load(q, c) * k); });
        }
        uint32_t top = amax != NULL ? team.amax(n, [=](auto c) { return load(out, c); }) : 0;
        if (amax != NULL && team.leads()) { atomic_max(amax, top); }
    }
};

template <class D> struct AddReduced {  // sum = [sum] + codes·descale; *counts += codes at the maximum
    float* sum;
    const D* codes;
    const float* descale;   // NULL = 1
    CodeCounts* counts;     // NULL: not wanted
    size_t elements;
    bool add;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        float* ps = sum + first;
        const D* pc = codes + first;
        float k = descale != NULL ? *descale : 1.0f;
        int n = piece_length(elements, first);
        if (add) { team.each(n, [=](auto c) { store(ps, c, load(ps, c) + load(pc, c) * k); }); }
        else { team.each(n, [=](auto c) { store(ps, c, load(pc, c) * k); }); }
        if (counts == NULL) { return; }
        auto found = team.sum_pair(n, [=](auto c) { return top_codes(load_raw(pc, c)); });
        if (team.leads()) { atomic_add(&counts->reduced, (uint64_t)found.b.v[0]); }
    }
    template <int N> static DEVICE VecPair<N> top_codes(Raw<D, N> r) {
        VecPair<N> found = {};
        UNROLL
        for (int k = 0; k < N; k++) { found.b.v[k] = is_top_code(r.e[k]) ? 1.0f : 0.0f; }
        return found;
    }
};

// One hop of a ring, with NCCL's result. NCCL turns FP8 operands into halves, adds them as halves, and rounds the sum back with saturation. The half
// between changes no result, as it has two bits more than twice FP8's (test/gradient.cpp goes through all pairs of codes), so we round once.
template <class D> DEVICE D hop_sum(D a, D b) {
    D d;
    from_float(d, to_float(a) + to_float(b));
    return d;
}

// sum = hop_sum(received, sum), on the CPU, where rings run over MPI
static inline void hop_add(DType type, void* sum, const void* received, size_t n) {
    with_gradient_type(type, [=](auto tag) {
        typedef typename decltype(tag)::type D;
        D* s = (D*)sum;
        const D* r = (const D*)received;
        long pieces = (long)ceil_div(n, (size_t)PIECE);
#pragma omp parallel for schedule(static) if (pieces > 4)
        for (long i = 0; i < pieces; i++) {
            size_t first = (size_t)i * PIECE, m = min_of((size_t)PIECE, n - first);
            D* ps = s + first;
            const D* pr = r + first;
#pragma omp simd
            for (size_t k = 0; k < m; k++) { ps[k] = hop_sum(pr[k], ps[k]); }
        }
    });
}

// ---- headroom ----

// What the reduction of a step did to one tensor
struct TensorStatistics {
    float underflow, saturated;  // shares: of local non-zero values whose code was 0; of reduced (ring) or sent (direct) codes at the maximum
    float mu;                    // headroom of the next step
};

constexpr double MU_GROWTH = 1.0006933874625806;  // 2^(1/1000): doubles in 1,000 steps; a float would miss by 5e-5
constexpr double SATURATED_SHARE = 1e-5;          // above it μ halves

// FP8-LM's automatic scaling: μ halves where more than a hundred-thousandth of the reduced codes (and more than one) saturate, else grows slowly.
// Stays within [1/ranks, 1].
DEVICE float next_mu(float mu, double saturated, double elements, int ranks) {
    double limit = max_of(1.0, SATURATED_SHARE * elements);
    mu = saturated > limit ? mu * 0.5f : (float)((double)mu * MU_GROWTH);
    return min_of(1.0f, max_of(1.0f / (float)ranks, mu));
}
