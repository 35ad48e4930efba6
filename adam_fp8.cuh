// adam_fp8.cuh: the optimizer: gradient norm, the decision whether to step, AdamW.
//
// After the gradients of a step are reduced over ranks, these run, and the host waits for none of them:
//   1. the squared norm: partial sums over fixed pieces of 4096 elements of each tensor, added in float64 by a fixed tree a tensor, then in the tensors' order, so that the value
//      does not depend on how tensors are spread over threads or replicas: a piece is added up by the rank that keeps it, and all replicas get all pieces' sums. A gradient in FP8 is read
//      as codes; its descale enters with the tensor's sum. The same pass counts the codes at the maximum, which steer the headroom of the reduction. Shares and stages are then added
//      over the whole world, each tensor once however many ranks hold it, together with the ranks' shares of the loss;
//   2. the decision, on the device, alike on every rank: a step whose loss or norm is not finite, or stands out by more than the allowed z-score from
//      the last 128 steps, is skipped and leaves no trace in weights, moments or bias corrections (a value that is not finite does not enter the
//      windows either), nor does one in which no target counts. Loss and gradient arrive as means over all tokens of the global batch; where some do not
//      count (a loss mask), both are scaled here to means over those that do. Its outcome is a record that the host reads while the next step runs;
//   3. AdamW (Loshchilov & Hutter) with decoupled weight decay on the master weights,
//          m = β1·m + (1-β1)·g,  v = β2·v + (1-β2)·g²,  w = w - lr·(m/(1-β1^t) / (√(v/(1-β2^t)) + ε) + decay·w),
//      where g is the gradient, its codes times descale and clip factor, and t counts the applied steps only. The same kernel writes the weight of the forward pass. An FP8
//      weight takes its scale from this step's amax, so it is written in a second pass; where its blocks of 128 × 128 have scales of their own, a pass over the
//      new master finds their amaxes first, which are exchanged as those of tensors are, so that every rank makes the scales of every tensor.
//
// With ZeRO a rank does this for the stretch of each tensor that it keeps (core/partition.h). Scales belong to the whole tensor: the amaxes of all tensors are exchanged once, between
// the two passes, between the replicas and between the ranks that share layers. The weights come back to all replicas afterwards (comm.cuh). Blocks of 128 run along what a rank
// holds: they are those of the whole tensor where its rows are multiples of 128 there.
//
// Master and moments may each be in FP32, BF16, FP16, E4M3 or E5M2 (FP8-LM's precision decoupling), v in UE5M3 too. The arithmetic is always FP32. FP16 and FP8 have scales: one
// a tensor, for which a first pass over all tensors finds the new amaxes and a second writes; or one a block of 128 elements, made in the same pass. No FP32 copy of a tensor exists.
// v in FP8 is meant to be rounded stochastically: to the nearest of 3 mantissa bits 0.95·v is often v again, and v stands still.
#pragma once
#include "core/collectives.cuh"  // the process groups
#include "core/gradient.cuh" // pieces, formats of gradients
#include "core/params.h"   // Param, ParamTable
#include "core/profile.h"  // ProfileScope

constexpr int OUTLIER_WINDOW = 128;    // steps, as in llm.c

// ---- the decision ----

enum SkipReason { NOT_SKIPPED, SKIP_NON_FINITE_LOSS, SKIP_NON_FINITE_NORM, SKIP_LOSS_OUTLIER, SKIP_NORM_OUTLIER, SKIP_NOTHING_COUNTS };
static const char* const skip_names[] = {NULL, "non-finite loss", "non-finite gradient", "loss outlier", "gradient norm outlier",
                                         "no token counts in the loss"};

struct StepRecord {          // what the host reads of a step
    double loss;             // mean over the tokens of the global batch that count; 0 where none does
    double grad_norm;        // of the gradient of that mean, before clipping
    double loss_z, norm_z;   // NaN until the window is full
    int skipped;             // SkipReason
    int64_t applied;         // steps applied so far
};

struct OutlierWindow {
    double values[OUTLIER_WINDOW];
    int count, next;
};

struct OptimizerState {      // on the device; all of it outlives a step
    double beta1_power, beta2_power;  // β^t
    OutlierWindow losses, norms;
    StepRecord record;
    int apply;               // the decision for the kernels that follow
    float grad_factor;       // clip factor, and from the mean over all tokens to that over those that count
    float correction1, correction2;  // 1/(1-β1^t), 1/(1-β2^t)
};

// Puts a value into a full window in place of the oldest and gives its z-score in it; NaN while the window fills. Non-finite values leave no trace.
DEVICE double outlier_score(OutlierWindow* w, double value) {
    if (!is_finite(value)) { return not_a_number(); }
    bool full = w->count == OUTLIER_WINDOW;
    w->values[w->next] = value;
    w->next = (w->next + 1) % OUTLIER_WINDOW;
    if (!full) { w->count++; return not_a_number(); }
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < OUTLIER_WINDOW; i++) { sum += w->values[i]; }
    double mean = sum / OUTLIER_WINDOW;
    for (int i = 0; i < OUTLIER_WINDOW; i++) { squares += (w->values[i] - mean) * (w->values[i] - mean); }
    double deviation = sqrt(squares / OUTLIER_WINDOW);
    return deviation == 0.0 ? 0.0 : (value - mean) / deviation;
}

// The pieces of a tensor for the norm: the first one lacks `shift` elements
static inline int norm_pieces(const Param* p) { return pieces_of((size_t)p->piece_shift + param_elements(p)); }

template <class G> struct SquaredPieces {  // partial[piece] = Σ g² over a piece of a tensor, of the codes as they are; top_codes[piece]: those at the maximum
    float* partial;
    float* top_codes;
    const G* grad;            // a stretch that ends where a piece does, or the tensor
    size_t elements;
    int shift;                // elements of its first piece that lie before it
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = piece == 0 ? 0 : (size_t)piece * PIECE - (size_t)shift, end = min_of((size_t)(piece + 1) * PIECE - (size_t)shift, elements);
        const G* g = grad + first;
        auto found = team.sum_pair((int)(end - first), [=](auto c) { return square_and_top(load_raw(g, c)); });
        if (!team.leads()) { return; }
        partial[piece] = found.a.v[0];
        top_codes[piece] = found.b.v[0];
    }
    template <int N> static DEVICE VecPair<N> square_and_top(Raw<G, N> r) {
        VecPair<N> found;
        UNROLL
        for (int k = 0; k < N; k++) {
            float x = to_float(r.e[k]);
            found.a.v[k] = x * x;
            found.b.v[k] = is_top_code(r.e[k]) ? 1.0f : 0.0f;
        }
        return found;
    }
};

struct AddPieces {      // squares[i] = Σ of the pieces of tensor i in float64, times descale²; tops[i] = Σ of its codes at the maximum
    double* squares;
    double* tops;
    const float* partial;
    const float* top_codes;
    const int64_t* first;  // (tensors + 1)
    const float* slots;    // (tensors, 4) of the gradients
    template <class Team> DEVICE void operator()(Team team, int i) const {
        const float* p = partial + first[i];
        const float* t = top_codes + first[i];
        int64_t n = first[i + 1] - first[i];
        double sum = team.sum_double(n, [=](int64_t k) { return (double)p[k]; });
        double top = team.sum_double(n, [=](int64_t k) { return (double)t[k]; });
        double descale = (double)slots[4 * (size_t)i];
        if (team.leads()) {
            squares[i] = sum * (descale * descale);
            tops[i] = top;
        }
    }
};

struct LossShare {      // of a rank; 0 on those that have no part in the loss, or another's
    double mean;        // its rows' part of the mean over all tokens of the global batch
    double counted;     // how many of its rows count
};

constexpr int STEP_TOTALS = 3;

struct AddTotals {      // totals = {Σ squares of the tensors that this rank counts, in their order; its share of the loss; its rows that count}
    double* totals;
    const double* squares;
    const uint8_t* counted;  // (tensors)
    const LossShare* loss;
    int tensors;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        double squared = 0.0;
        for (int i = 0; i < tensors; i++) { squared += counted[i] ? squares[i] : 0.0; }
        totals[0] = squared;
        totals[1] = loss->mean;
        totals[2] = loss->counted;
    }
};

struct DecisionRules {
    double beta1, beta2;
    float clip;                 // 0: none
    float skip_loss_z, skip_grad_z;  // 0: never
};

struct Decide {
    OptimizerState* state;
    const double* totals;       // of the whole model: squared norm, mean loss of the global batch, and how many of its tokens count
    double tokens;              // of the global batch
    DecisionRules rules;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        OptimizerState* o = state;
        StepRecord* r = &o->record;
        bool counts = totals[2] > 0.0;
        double to_counted = counts ? tokens / totals[2] : 0.0;  // exactly 1 where all count
        r->grad_norm = sqrt(totals[0]) * to_counted;
        r->loss = totals[1] * to_counted;
        bool loss_ok = is_finite(r->loss), norm_ok = is_finite(r->grad_norm);
        if (loss_ok && norm_ok && counts) {  // a step that is thrown away for one must not count in the other's window
            r->loss_z = outlier_score(&o->losses, r->loss);
            r->norm_z = outlier_score(&o->norms, r->grad_norm);
        } else {
            r->loss_z = r->norm_z = not_a_number();
        }
        r->skipped = !loss_ok ? SKIP_NON_FINITE_LOSS
            : !norm_ok ? SKIP_NON_FINITE_NORM
            : !counts ? SKIP_NOTHING_COUNTS
            : rules.skip_loss_z > 0.0f && r->loss_z > (double)rules.skip_loss_z ? SKIP_LOSS_OUTLIER
            : rules.skip_grad_z > 0.0f && r->norm_z > (double)rules.skip_grad_z ? SKIP_NORM_OUTLIER : NOT_SKIPPED;
        o->apply = r->skipped == NOT_SKIPPED;
        if (!o->apply) { return; }
        r->applied++;
        o->beta1_power *= rules.beta1;
        o->beta2_power *= rules.beta2;
        o->correction1 = (float)(1.0 / (1.0 - o->beta1_power));
        o->correction2 = (float)(1.0 / (1.0 - o->beta2_power));
        double clip = rules.clip > 0.0f && r->grad_norm > (double)rules.clip ? (double)rules.clip / r->grad_norm : 1.0;
        o->grad_factor = (float)(clip * to_counted);
    }
};

// ---- optimizer states in few bits ----

// A stretch of an OptimizerTensor, for kernels
struct StateView {
    DType dtype;
    Rounding rounding;
    char* data;
    float* slot;        // NULL: scale 1, or scaled by block
    int8_t* exponents;

    template <int N> DEVICE size_t block_of(Range<N> c) const { return c.i / STATE_BLOCK; }
    // `previous`: the codes are of before this step's slot
    template <int N> DEVICE Vec<N> read(Range<N> c, int count, bool previous) const {
        float factor = exponents != NULL ? count > 0 ? exp2_int(-exponents[block_of(c)]) : 1.0f : slot != NULL ? slot[previous ? 2 : 0] : 1.0f;
        return load_as(dtype, data, c, count, factor);
    }
    // `e`: extent of x; `random`: read where rounding is stochastic, rotated by TURN. Blocks get an exponent from their amax; that of zeros stays.
    // Returns the descale of what has been written.
    template <int TURN, class Team, int N>
    DEVICE float write(Team team, Range<N> c, int count, const Vec<N>& x, Extent e, const Raw<uint32_t, N>& random) const {
        float scale = slot != NULL ? slot[1] : 1.0f;
        if (exponents != NULL) {
            float amax = bits_to_float(team.template block_top<STATE_BLOCK>(e.high)), old = count > 0 ? exp2_int(exponents[block_of(c)]) : 1.0f;
            scale = scale_from_amax(amax, largest_of(dtype), 0, old);
            team.sync_blocks();  // all who share the old exponent have read it
            if (count > 0 && team.template leads_block<STATE_BLOCK>()) { exponents[block_of(c)] = (int8_t)exponent_of(scale); }
        }
        RoundStochastic<TURN, N> stochastic = {&random};
        bool normal = is_normal(dtype, bits_to_float(e.low) * scale, bits_to_float(e.high) * scale);  // most are
        if (rounding == NEAREST) { store_as(dtype, data, c, count, x, scale, RoundNearest{}); }
        else if (normal) { store_as(dtype, data, c, count, x, scale, RoundNormal<TURN, N>{stochastic}); }
        else { store_as(dtype, data, c, count, x, scale, stochastic); }
        return 1.0f / scale;
    }
};

static inline bool has_scale(DType t) { return t == FP16 || dtype_bytes(t) == 1; }

static inline StateView view_of(const OptimizerTensor* t, Rounding rounding) {
    return StateView{t->dtype, rounding, (char*)t->data, t->slot, t->exponents};
}
DEVICE StateView from_element(StateView v, size_t first) {
    v.data += first * (size_t)dtype_bytes(v.dtype);
    if (v.exponents != NULL) { v.exponents += first / STATE_BLOCK; }
    return v;
}

// ---- AdamW ----

struct AdamRates { float lr, beta1, beta2, eps, decay; };

// w, m and v after a step with gradient g, and their extents; in one loop, so that little goes through memory
struct StateExtents { Extent w, m, v; };
template <int N> DEVICE StateExtents adam_step(Vec<N>& w, Vec<N>& m, Vec<N>& v, const Vec<N>& g, const AdamRates& a, float c1, float c2) {
    Extent ew = NO_EXTENT, em = NO_EXTENT, ev = NO_EXTENT;
    UNROLL
    for (int k = 0; k < N; k++) {
        float gk = g.v[k], mk = m.v[k] * a.beta1 + gk * (1.0f - a.beta1), vk = v.v[k] * a.beta2 + gk * gk * (1.0f - a.beta2);
        float wk = w.v[k] - ((mk * c1) / (sqrtf(vk * c2) + a.eps) + w.v[k] * a.decay) * a.lr;
        ew = extent_with(ew, w.v[k] = wk);
        em = extent_with(em, m.v[k] = mk);
        ev = extent_with(ev, v.v[k] = vk);
    }
    return StateExtents{ew, em, ev};
}

template <class W, class G> struct AdamUpdate {  // one tensor with FP32 states; W: the type of the forward pass's weight, or float where that is the master
    W* weight;                // NULL: FP8, written later from the master
    float* master;
    float* m;
    float* v;
    const G* grad;
    const float* descale;     // of the gradient
    uint32_t* amax;           // of the new master; NULL: not wanted
    const OptimizerState* state;
    AdamRates rates;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (!state->apply) { return; }
        size_t first = (size_t)piece * PIECE;
        int n = piece_length(elements, first);
        float* pw = master + first;
        float* pm = m + first;
        float* pv = v + first;
        const G* pg = grad + first;
        W* out = weight == NULL ? NULL : weight + first;
        AdamRates a = rates;
        float factor = state->grad_factor * *descale, c1 = state->correction1, c2 = state->correction2;
        auto update = [=](auto c) {
            auto w = load(pw, c), m1 = load(pm, c), v1 = load(pv, c);
            adam_step(w, m1, v1, load(pg, c) * factor, a, c1, c2);
            store(pm, c, m1);
            store(pv, c, v1);
            store(pw, c, w);
            return w;
        };
        if (amax != NULL) {
            uint32_t top = team.amax(n, update);
            if (team.leads()) { atomic_max(amax, top); }
        } else if (out != NULL) {
            team.each(n, [=](auto c) { store(out, c, update(c)); });
        } else {
            team.each(n, [=](auto c) { update(c); });
        }
    }
};

// One tensor with states in any formats. Where a state is scaled by tensor two passes are made: the first only measures what the new states would be, the
// second, with slots made from that, writes them. Everything else takes one. FP32 alone goes through AdamUpdate, which is faster.
struct NarrowUpdate {
    StateView master, m, v;
    DType grad_dtype, weight_dtype;
    const char* grad;
    const float* descale;         // of the gradient
    char* weight;                 // of the forward pass; NULL: not written here
    const float* weight_scale;    // NULL = 1
    uint32_t* amaxes;             // (3) of new master, m and v; NULL: not wanted
    bool measure;                 // the first pass of two
    bool measured;                // the second: slots hold this step's scales
    const OptimizerState* state;
    AdamRates rates;
    size_t elements;
    RandomKey key;                // of this step; what random bits depend on, with
    ElementMap whole;             // the number of an element within the whole tensor,
    size_t first_element;         // from that of the first within this rank's share
};

// The states of recipe fp8: FP16, E4M3, UE5M3, by block, rounded stochastically
static inline bool are_fp8_states(const NarrowUpdate* u) {
    auto is = [](const StateView& s, DType t) { return s.dtype == t && s.rounding == STOCHASTIC && s.exponents != NULL; };
    return is(u->master, FP16) && is(u->m, E4M3) && is(u->v, UE5M3);
}
DEVICE void make_fp8_state(StateView* s, DType t) {
    s->dtype = t;
    s->rounding = STOCHASTIC;
    s->slot = NULL;
}

template <bool FP8_STATES> struct AdamUpdateNarrow : NarrowUpdate {  // FP8_STATES: the formats are known to the compiler
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (!state->apply) { return; }
        size_t first = (size_t)piece * PIECE;
        uint64_t here = first_element + first;
        ElementMap number = whole;
        StateView sw = from_element(master, first), sm = from_element(m, first), sv = from_element(v, first);
        if (FP8_STATES) {
            make_fp8_state(&sw, FP16);
            make_fp8_state(&sm, E4M3);
            make_fp8_state(&sv, UE5M3);
        }
        const char* g_at = grad + first * (size_t)dtype_bytes(grad_dtype);
        char* w_at = weight == NULL ? NULL : weight + first * (size_t)dtype_bytes(weight_dtype);
        AdamRates a = rates;
        float factor = state->grad_factor * *descale, c1 = state->correction1, c2 = state->correction2;
        float k = weight_scale != NULL ? *weight_scale : 1.0f;
        bool draw = !measure && (sw.rounding == STOCHASTIC || sm.rounding == STOCHASTIC || sv.rounding == STOCHASTIC);
        RandomKey key_of_step = key;
        uint32_t top_w = 0, top_m = 0, top_v = 0;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            auto w = sw.read(c, count, measured), m1 = sm.read(c, count, measured), v1 = sv.read(c, count, measured);
            auto g = load_as(grad_dtype, g_at, c, count, factor);
            auto random = draw ? random_pack(key_of_step, c, number(here + c.i) - c.i) : decltype(random_pack(key_of_step, c, 0)){};
            StateExtents e = adam_step(w, m1, v1, g, a, c1, c2);
            top_w = max_of(top_w, e.w.high);
            top_m = max_of(top_m, e.m.high);
            top_v = max_of(top_v, e.v.high);
            if (measure) { return; }
            // One draw for an element: what decides about each state, the upper bits after its turn, are different bits of the draw.
            sm.template write<12>(team, c, count, m1, e.m, random);
            sv.template write<22>(team, c, count, v1, e.v, random);
            float back = sw.template write<0>(team, c, count, w, e.w, random);
            if (w_at == NULL) { return; }
            auto kept = load_as(sw.dtype, sw.data, c, count, back);  // what the master has become
            store_as(weight_dtype, w_at, c, count, kept, k, RoundNearest{});
        });
        if (amaxes == NULL) { return; }
        uint32_t tops[3] = {team.top_of(top_w), team.top_of(top_m), team.top_of(top_v)};
        if (!team.leads()) { return; }
        for (int i = 0; i < 3; i++) { atomic_max(&amaxes[i], tops[i]); }
    }
};

struct StateSlots {           // slots from amaxes: of master, m and v between their passes, and of an FP8 weight
    float* slots[4];          // of master, m, v, weight; NULL: none
    float largest[4];
    const uint32_t* amaxes;   // (3) of new master, m, v
    const int* apply;         // NULL or: nothing to do where it points to 0
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads() || slots[i] == NULL || (apply != NULL && *apply == 0)) { return; }
        float previous = slots[i][2];
        set_slot(slots[i], scale_from_amax(bits_to_float(amaxes[i % 3]), largest[i], 0, slots[i][1]));
        if (i == 3) { slots[i][2] = previous; }  // a weight is not read again with its old scale
    }
};

struct MasterAmax {           // *amax = max(*amax, max |master|), where no update has taken it
    uint32_t* amax;
    StateView master;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(master, first);
        uint32_t top = 0;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) { top = max_of(top, magnitude_bits(s.read(c, count, false))); });
        top = team.top_of(top);
        if (team.leads()) { atomic_max(amax, top); }
    }
};

struct CastWeight {           // weight = master · scale in the weight's format
    char* weight;
    DType dtype;
    StateView master;
    const float* scale;       // NULL = 1
    const int* apply;         // NULL or: nothing to do where it points to 0
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (apply != NULL && *apply == 0) { return; }
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(master, first);
        char* out = weight + first * (size_t)dtype_bytes(dtype);
        float k = scale != NULL ? *scale : 1.0f;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            store_as(dtype, out, c, count, s.read(c, count, false), k, RoundNearest{});
        });
    }
};

// ---- weights scaled by block ----

// Blocks of SCALE_BLOCK × SCALE_BLOCK of a matrix, of which a rank keeps the elements from `first` on
struct WeightBlocks {
    int64_t rows, cols, first;
    DEVICE int64_t tall() const { return ceil_div(rows, (int64_t)SCALE_BLOCK); }
    DEVICE int64_t wide() const { return ceil_div(cols, (int64_t)SCALE_BLOCK); }
    // Row and column of the block of element i of what is kept
    DEVICE int64_t row_of(size_t i) const { return (first + (int64_t)i) / cols / SCALE_BLOCK; }
    DEVICE int64_t column_of(size_t i) const { return (first + (int64_t)i) % cols / SCALE_BLOCK; }
    // Do stretches of STATE_BLOCK elements lie within blocks?
    DEVICE bool aligned() const { return cols % SCALE_BLOCK == 0 && first % SCALE_BLOCK == 0; }
};
static_assert(STATE_BLOCK == SCALE_BLOCK, "a stretch is a row of a block");
static inline WeightBlocks weight_blocks(const Param* p) { return WeightBlocks{p->rows, p->cols, (int64_t)p->own_first}; }

struct BlockAmaxes {          // amaxes (tall, wide) = max(amaxes, max |master|) of the blocks
    uint32_t* amaxes;
    StateView master;
    WeightBlocks blocks;
    const int* apply;         // NULL or: nothing to do where it points to 0
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (apply != NULL && *apply == 0) { return; }
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(master, first);
        WeightBlocks b = blocks;
        uint32_t* a = amaxes;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            auto v = s.read(c, count, false);
            size_t at = first + c.i;
            if (b.aligned()) {
                uint32_t top = team.template block_top<STATE_BLOCK>(magnitude_bits(v));
                if (count > 0 && team.template leads_block<STATE_BLOCK>()) { atomic_max(&a[b.row_of(at) * b.wide() + b.column_of(at)], top); }
                return;
            }
            for (int k = 0; k < count; k++) { atomic_max(&a[b.row_of(at + (size_t)k) * b.wide() + b.column_of(at + (size_t)k)], magnitude_bits(v.v[k])); }
        });
    }
};

struct BlockDescales {        // row by row of the blocks, for both products, from the amaxes; 1 where rows are padded to a multiple of 4
    float *descales, *turned;
    const uint32_t* amaxes;
    WeightBlocks blocks;
    float largest;
    const int* apply;         // as above
    template <class Team> DEVICE void operator()(Team team, int row) const {
        if (apply != NULL && *apply == 0) { return; }
        int tall = (int)blocks.tall(), wide = (int)blocks.wide(), pitch = (int)padded_blocks(wide), turned_pitch = (int)padded_blocks(tall);
        const uint32_t* a = amaxes + (int64_t)row * wide;
        float *d = descales + (int64_t)row * pitch, *t = turned + row, most = largest;
        team.unaligned().each(pitch, [=](auto c) {
            int column = (int)c.i;
            float descale = row < tall && column < wide ? 1.0f / block_scale(a[column], most) : 1.0f;
            if (row < tall) { d[column] = descale; }
            if (column < wide) { t[(int64_t)column * turned_pitch] = descale; }
        });
    }
};

struct CastBlocks {           // weight = master · scale of its block, in the weight's format
    char* weight;
    DType dtype;
    StateView master;
    WeightBlocks blocks;
    const float* descales;    // (tall, pitch)
    const int* apply;         // as above
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (apply != NULL && *apply == 0) { return; }
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(master, first);
        char* out = weight + first * (size_t)dtype_bytes(dtype);
        WeightBlocks b = blocks;
        const float* d = descales;
        int64_t pitch = padded_blocks(b.wide());
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            if (count == 0) { return; }
            auto v = s.read(c, count, false);
            auto scale_at = [&](int k) { size_t at = first + c.i + (size_t)k; return 1.0f / d[b.row_of(at) * pitch + b.column_of(at)]; };
            if (b.aligned()) { store_as(dtype, out, c, count, v, scale_at(0), RoundNearest{}); return; }
            for (int k = 0; k < count; k++) { v.v[k] *= scale_at(k); }
            store_as(dtype, out, c, count, v, 1.0f, RoundNearest{});
        });
    }
};

struct SetState {             // state = values, on the host
    StateView state;
    const float* values;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(state, first);
        const float* x = values + first;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            auto some = load_some(x, c, count, 1.0f);
            s.template write<0>(team, c, count, some, extent_of(some), decltype(random_pack(RandomKey{}, c, 0)){});
        });
    }
};

struct GetState {             // values = state, on the host
    float* values;
    StateView state;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        StateView s = from_element(state, first);
        float* out = values + first;
        team.template each_block<STATE_BLOCK>(piece_length(elements, first), [&](auto c, int count) {
            store_some(out, c, count, s.read(c, count, false), 1.0f, RoundNearest{});
        });
    }
};

struct OptimizerConfig {
    bool by_block;                         // scales by block instead of by tensor
    Rounding master_rounding, moment_rounding;
    uint64_t seed;
    bool weights_by_block = false;         // FP8 weights have a scale for each 128 × 128
};

struct Optimizer {
    OptimizerConfig config;
    Group *data, *tensor, *world;  // replicas of what this rank holds; ranks that share its tensors; all. NULL: this rank alone
    bool partitioned;         // replicas keep different parts of the tensors
    int replica;              // they end up with the same gradients: the first counts them
    OptimizerState* state;    // device
    int64_t updates;          // so far, skipped ones too: what random bits depend on
    int64_t pieces;           // of all tensors, for the norm
    float* partial;           // (pieces) squares
    float* partial_tops;      // (pieces) codes at the maximum; after those
    double* squares;          // (tensors)
    double* tops;             // (tensors)
    double* totals;           // (STEP_TOTALS) squared norm, loss, tokens that count
    uint8_t* counted;         // (tensors) does this rank count it in the norm?
    int64_t* first_piece;     // (tensors + 1)
    uint32_t* amaxes;         // (tensors, 3) of new master, m and v
    uint32_t* block_amaxes;   // of the blocks of all weights that are scaled so
    size_t blocks;
};

// The states of one kind, one tensor's stretch after the other, each at a multiple of PARAM_ALIGNMENT elements. `are_there`: the weights are they
static inline void allocate_states(ParamTable* table, OptimizerTensor Param::* kind, bool are_there, bool by_block, Memory* memory) {
    size_t bytes = 0, exponents = 0, slots = 0;
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        size_t n = round_up(p->own_count, PARAM_ALIGNMENT);
        bytes += n * (size_t)dtype_bytes((p->*kind).dtype);
        if (has_scale((p->*kind).dtype)) { (by_block ? exponents : slots) += by_block ? ceil_div(n, (size_t)STATE_BLOCK) : 4; }
    }
    char* at = (char*)memory_take(memory, OPTIMIZER, are_there ? 0 : bytes, 1);
    int8_t* exponent = memory_take<int8_t>(memory, OPTIMIZER, exponents);
    float* slot = memory_take<float>(memory, OPTIMIZER, slots);
    for (int i = 0; memory->committed && i < table->count; i++) {
        Param* p = &table->items[i];
        size_t n = round_up(p->own_count, PARAM_ALIGNMENT);
        OptimizerTensor* t = &(p->*kind);
        t->data = are_there ? advance(p->weight, p->dtype, p->own_first) : at;
        t->slot = has_scale(t->dtype) && !by_block ? slot : NULL;
        t->exponents = has_scale(t->dtype) && by_block ? exponent : NULL;
        at += n * (size_t)dtype_bytes(t->dtype);
        if (t->slot != NULL) { slot += 4; }
        if (t->exponents != NULL) { exponent += ceil_div(n, (size_t)STATE_BLOCK); }
    }
}

// The amaxes and descales of weights that are scaled by block
static inline void allocate_blocks(Optimizer* o, ParamTable* table, Memory* memory) {
    auto each = [&](auto f) {
        for (int i = 0; o->config.weights_by_block && i < table->count; i++) {
            Param* p = &table->items[i];
            if (is_fp8(p->dtype)) { f(p, (size_t)weight_blocks(p).tall(), (size_t)weight_blocks(p).wide()); }
        }
    };
    size_t descales = 0;
    o->blocks = 0;
    each([&](Param*, size_t tall, size_t wide) {
        o->blocks += tall * wide;
        descales += tall * (size_t)padded_blocks((int64_t)wide) + wide * (size_t)padded_blocks((int64_t)tall);
    });
    uint32_t* amax = o->block_amaxes = memory_take<uint32_t>(memory, OPTIMIZER, o->blocks);
    float* descale = memory_take<float>(memory, WEIGHTS, descales);
    if (!memory->committed) { return; }
    each([&](Param* p, size_t tall, size_t wide) {
        p->block_amaxes = amax;
        p->block_descales = descale;
        p->turned_descales = descale += tall * (size_t)padded_blocks((int64_t)wide);
        descale += wide * (size_t)padded_blocks((int64_t)tall);
        amax += tall * wide;
    });
}

// `weights_are_masters`: in fp32 the weights, which are there before, serve as masters too
static inline void optimizer_allocate(Optimizer* o, ParamTable* table, bool weights_are_masters, Memory* memory) {
    int64_t pieces = 0;
    for (int i = 0; i < table->count; i++) { pieces += norm_pieces(&table->items[i]); }
    o->pieces = pieces;
    o->state = memory_take<OptimizerState>(memory, OPTIMIZER, 1);
    allocate_states(table, &Param::master, weights_are_masters, o->config.by_block, memory);
    allocate_states(table, &Param::m, false, o->config.by_block, memory);
    allocate_states(table, &Param::v, false, o->config.by_block, memory);
    o->partial = memory_take<float>(memory, WORKSPACE, 2 * (size_t)pieces);
    o->partial_tops = o->partial + (memory->committed ? pieces : 0);
    o->squares = memory_take<double>(memory, OPTIMIZER, (size_t)table->count);
    o->tops = memory_take<double>(memory, OPTIMIZER, (size_t)table->count);
    o->totals = memory_take<double>(memory, OPTIMIZER, STEP_TOTALS);
    o->counted = memory_take<uint8_t>(memory, OPTIMIZER, (size_t)table->count);
    o->first_piece = memory_take<int64_t>(memory, OPTIMIZER, (size_t)table->count + 1);
    o->amaxes = memory_take<uint32_t>(memory, OPTIMIZER, 3 * (size_t)table->count);
    allocate_blocks(o, table, memory);
}

// Empty states, no steps applied; the gaps between tensors are zero and stay so
static inline void optimizer_reset(Optimizer* o, ParamTable* table, Stream s) {
    OptimizerState state = {};
    state.beta1_power = state.beta2_power = 1.0;
    int64_t* first = (int64_t*)host_alloc(((size_t)table->count + 1) * sizeof(int64_t));
    uint8_t* counted = (uint8_t*)host_alloc((size_t)table->count);
    first[0] = 0;
    for (int i = 0; i < table->count; i++) {
        first[i + 1] = first[i] + norm_pieces(&table->items[i]);
        counted[i] = table->items[i].counted && o->replica == 0;
    }
    copy_to_device(o->state, &state, sizeof(state), s);
    copy_to_device(o->counted, counted, (size_t)table->count, s);
    copy_to_device(o->first_piece, first, ((size_t)table->count + 1) * sizeof(int64_t), s);
    for (int i = 0; i < table->count; i++) {
        Param* p = &table->items[i];
        size_t n = round_up(p->own_count, PARAM_ALIGNMENT);
        OptimizerTensor* const states[] = {&p->master, &p->m, &p->v};
        for (OptimizerTensor* t : states) {
            device_zero(t->data, n * (size_t)dtype_bytes(t->dtype), s);
            if (t->exponents != NULL) { device_zero(t->exponents, ceil_div(n, (size_t)STATE_BLOCK), s); }
            if (t->slot != NULL) { run_rows(ResetSlots{t->slot}, 1, s); }
        }
    }
    o->updates = 0;
    stream_sync(s);
    free(first);
    free(counted);
}

static inline uint32_t* amaxes_of(const Optimizer* o, const ParamTable* table, const Param* p) { return o->amaxes + 3 * (p - table->items); }

static inline bool is_shared(const Group* g) { return g != NULL && g->size > 1; }

// The amaxes of what this rank keeps become those of the whole tensors
static inline void share_amaxes(Optimizer* o, const ParamTable* table, Stream s) {
    size_t n = 3 * (size_t)table->count;
    if (o->partitioned) { all_reduce_max(o->data, (float*)o->amaxes, n, s); }
    if (is_shared(o->tensor)) { all_reduce_max(o->tensor, (float*)o->amaxes, n, s); }
}

// What this rank keeps of the forward pass's weight
static inline void* own_weight(const Param* p) { return advance(p->weight, p->dtype, p->own_first); }

// Masters and weights are one where there is nothing to round
static inline bool master_is_weight(const Param* p) { return p->dtype == FP32 && p->master.dtype == FP32; }

static inline bool states_in_fp32(const Param* p) { return p->master.dtype == FP32 && p->m.dtype == FP32 && p->v.dtype == FP32; }
static inline bool scaled_by_tensor(const Param* p) { return p->master.slot != NULL || p->m.slot != NULL || p->v.slot != NULL; }

// The scales of all weights that are scaled by block, and the codes of what this rank keeps of them, from the masters. `apply`: NULL: always
static inline void block_weights_from_masters(Optimizer* o, ParamTable* table, const int* apply, Stream s) {
    if (o->blocks == 0) { return; }
    auto each = [&](auto f) {
        for (int i = 0; i < table->count; i++) {
            Param* p = &table->items[i];
            if (p->block_descales != NULL) { f(p, view_of(&p->master, NEAREST), weight_blocks(p), pieces_of(p->own_count)); }
        }
    };
    device_zero(o->block_amaxes, o->blocks * sizeof(uint32_t), s);
    each([&](Param* p, StateView master, WeightBlocks b, int pieces) { run_rows(BlockAmaxes{p->block_amaxes, master, b, apply, p->own_count}, pieces, s); });
    if (o->partitioned) { all_reduce_max(o->data, (float*)o->block_amaxes, o->blocks, s); }
    each([&](Param* p, StateView master, WeightBlocks b, int pieces) {
        int rows = (int)padded_blocks(b.tall());
        run_rows(BlockDescales{p->block_descales, p->turned_descales, p->block_amaxes, b, largest_of(p->dtype), apply}, rows, s);
        run_rows(CastBlocks{(char*)own_weight(p), p->dtype, master, b, p->block_descales, apply, p->own_count}, pieces, s);
    });
}

// The forward pass's weights from the masters, whose amaxes are there. `apply`: NULL: always and all; else those that the update has not written
static inline void weights_from_masters(Optimizer* o, ParamTable* table, const int* apply, Stream s) {
    for (int i = 0; i < table->count; i++) {
        Param* p = &table->items[i];
        if (p->block_descales != NULL || (apply != NULL && (scaled_by_tensor(p) || !is_fp8(p->dtype)))) { continue; }
        if (is_fp8(p->dtype)) {
            run_rows(StateSlots{{NULL, NULL, NULL, p->slot}, {0.0f, 0.0f, 0.0f, largest_of(p->dtype)}, amaxes_of(o, table, p), apply}, 4, s);
        }
        if (p->own_count == 0 || master_is_weight(p)) { continue; }
        run_rows(CastWeight{(char*)own_weight(p), p->dtype, view_of(&p->master, NEAREST), is_fp8(p->dtype) ? p->slot + 1 : NULL, apply, p->own_count},
                 pieces_of(p->own_count), s);
    }
    block_weights_from_masters(o, table, apply, s);
}

// After the masters were set from outside (initialisation, import): what this rank keeps of the forward pass's weights
static inline void optimizer_cast_weights(Optimizer* o, ParamTable* table, Stream s) {
    device_zero(o->amaxes, 3 * (size_t)table->count * sizeof(uint32_t), s);
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        if (!is_fp8(p->dtype) || p->block_descales != NULL || p->own_count == 0) { continue; }
        run_rows(MasterAmax{amaxes_of(o, table, p), view_of(&p->master, NEAREST), p->own_count}, pieces_of(p->own_count), s);
    }
    share_amaxes(o, table, s);
    weights_from_masters(o, table, NULL, s);
}

// What this rank keeps of the master of one parameter, from the FP32 values of its share on the host. All of `tensor`, who have the other shares (NULL:
// nobody), call this together. optimizer_cast_weights goes after it.
static inline void optimizer_set_master(Param* p, const float* values, Group* tensor, Stream s) {
    size_t n = p->own_count, blocks = ceil_div(n, (size_t)STATE_BLOCK), bytes = n * (size_t)dtype_bytes(p->master.dtype);
    float slot[4] = {1.0f, 1.0f, 1.0f, 0.0f};
    if (p->master.slot != NULL) {
        uint32_t top = 0;
        for (size_t i = 0; i < param_elements(p); i++) { top = max_of(top, magnitude_bits(values[i])); }
        if (is_shared(tensor)) {
            uint32_t* tops = (uint32_t*)host_alloc((size_t)tensor->size * sizeof(uint32_t));
            host_all_gather(tensor, tops, &top, sizeof(top));
            for (int r = 0; r < tensor->size; r++) { top = max_of(top, tops[r]); }
            free(tops);
        }
        set_slot(slot, scale_from_amax(bits_to_float(top), largest_of(p->master.dtype), 0, 1.0f));
        copy_to_device(p->master.slot, slot, sizeof(slot), s);
        stream_sync(s);
    }
    if (n == 0) { return; }
    char* codes = (char*)host_alloc(bytes);
    int8_t* exponents = (int8_t*)host_alloc(blocks);
    memset(exponents, 0, blocks);
    StateView v = {p->master.dtype, NEAREST, codes, p->master.slot != NULL ? slot : NULL, p->master.exponents != NULL ? exponents : NULL};
    SetState set = {v, values + p->own_first, n};
    int pieces = pieces_of(n);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < pieces; i++) { set(CpuTeam{}, i); }
    copy_to_device(p->master.data, codes, bytes, s);
    if (v.exponents != NULL) { copy_to_device(p->master.exponents, exponents, blocks, s); }
    stream_sync(s);
    free(codes);
    free(exponents);
}

// values (own_count) = what this rank keeps of the master of one parameter, on the host
static inline void optimizer_get_master(float* values, const Param* p, Stream s) {
    size_t n = p->own_count, blocks = ceil_div(n, (size_t)STATE_BLOCK), bytes = n * (size_t)dtype_bytes(p->master.dtype);
    if (n == 0) { return; }
    float slot[4] = {1.0f, 1.0f, 1.0f, 0.0f};
    char* codes = (char*)host_alloc(bytes);
    int8_t* exponents = (int8_t*)host_alloc(blocks);
    copy_to_host(codes, p->master.data, bytes, s);
    if (p->master.slot != NULL) { copy_to_host(slot, p->master.slot, sizeof(slot), s); }
    if (p->master.exponents != NULL) { copy_to_host(exponents, p->master.exponents, blocks, s); }
    stream_sync(s);
    StateView v = {p->master.dtype, NEAREST, codes, p->master.slot != NULL ? slot : NULL, p->master.exponents != NULL ? exponents : NULL};
    GetState get = {values, v, n};
    int pieces = pieces_of(n);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < pieces; i++) { get(CpuTeam{}, i); }
    free(codes);
    free(exponents);
}

// One step from the reduced gradients of all parameters and this rank's share of the mean loss of the global batch of so many tokens, in two halves. No host
// synchronisation. First: norm and decision. `slots`: (params, 4) of the gradients.
static inline void optimizer_decide(Optimizer* o, const ParamTable* table, const float* slots, const LossShare* loss, int64_t tokens, DecisionRules rules, Stream s) {
    ProfileScope scope("gradient norm");
    if (o->partitioned) { device_zero(o->partial, 2 * (size_t)o->pieces * sizeof(float), s); }
    int64_t piece = 0;
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        size_t n = p->own_count, before = (size_t)p->piece_shift + p->own_first;
        int64_t first = piece + (int64_t)(before / PIECE);
        int shift = (int)(before % PIECE);
        piece += norm_pieces(p);
        if (n == 0) { continue; }
        with_gradient_type(p->grad_dtype, [&](auto g) {
            typedef typename decltype(g)::type G;
            run_rows(SquaredPieces<G>{o->partial + first, o->partial_tops + first, (const G*)p->grad, n, shift}, pieces_of((size_t)shift + n), s);
        });
    }
    if (o->partitioned) { all_reduce_sum(o->data, o->partial, 2 * (size_t)o->pieces, s); }  // one rank has a piece's sum, the others 0
    run_rows(AddPieces{o->squares, o->tops, o->partial, o->partial_tops, o->first_piece, slots}, table->count, s);
    run_rows(AddTotals{o->totals, o->squares, o->counted, loss, table->count}, 1, s);
    if (is_shared(o->world)) { all_reduce_sum(o->world, o->totals, STEP_TOTALS, s); }
    run_rows(Decide{o->state, o->totals, (double)tokens, rules}, 1, s);
}

static inline void update_fp32(const Optimizer* o, const Param* p, AdamRates rates, uint32_t* amax, Stream s) {
    size_t n = p->own_count;
    float *master = (float*)p->master.data, *m = (float*)p->m.data, *v = (float*)p->v.data;
    with_gradient_type(p->grad_dtype, [&](auto tag) {
        typedef typename decltype(tag)::type G;
        const G* g = (const G*)p->grad;
        if (p->dtype == BF16) {
            run_rows(AdamUpdate<bf16, G>{(bf16*)own_weight(p), master, m, v, g, p->grad_slot, NULL, o->state, rates, n}, pieces_of(n), s);
        } else {
            run_rows(AdamUpdate<float, G>{NULL, master, m, v, g, p->grad_slot, amax, o->state, rates, n}, pieces_of(n), s);
        }
    });
}

// `step`: what the random bits of this step depend on
static inline NarrowUpdate narrow_update(const Optimizer* o, const Param* p, AdamRates rates, uint64_t step) {
    NarrowUpdate update = {};
    update.master = view_of(&p->master, o->config.master_rounding);
    update.m = view_of(&p->m, o->config.moment_rounding);
    update.v = view_of(&p->v, o->config.moment_rounding);
    update.key = random_key(o->config.seed, step, (uint64_t)p->number << 2);
    update.grad_dtype = p->grad_dtype;
    update.grad = (const char*)p->grad;
    update.descale = p->grad_slot;
    update.weight_dtype = p->dtype;
    update.state = o->state;
    update.rates = rates;
    update.elements = p->own_count;
    update.whole = whole_elements(p);
    update.first_element = p->own_first;
    return update;
}

static inline void run_update(const NarrowUpdate& u, Stream s) {
    int pieces = pieces_of(u.elements);
    if (are_fp8_states(&u)) { run_rows(AdamUpdateNarrow<true>{u}, pieces, s); } else { run_rows(AdamUpdateNarrow<false>{u}, pieces, s); }
}

// Second: the update of what this rank keeps. In one pass; or two, where a scale depends on the whole tensor: of states that are scaled by tensor, which the
// first pass only measures, and of FP8 weights.
static inline void optimizer_update(Optimizer* o, ParamTable* table, AdamRates rates, float weight_decay, Stream s) {
    ProfileScope scope("adamw");
    uint64_t step = (uint64_t)o->updates++;
    bool two_passes = false;
    device_zero(o->amaxes, 3 * (size_t)table->count * sizeof(uint32_t), s);
    auto rates_of = [=](const Param* p) {
        AdamRates a = rates;
        a.decay = p->decay ? weight_decay : 0.0f;
        return a;
    };
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        bool fp8 = is_fp8(p->dtype), by_tensor = scaled_by_tensor(p);
        uint32_t* amaxes = fp8 || by_tensor ? amaxes_of(o, table, p) : NULL;
        two_passes |= fp8 || by_tensor;
        if (p->own_count == 0) { continue; }
        if (states_in_fp32(p)) { update_fp32(o, p, rates_of(p), amaxes, s); continue; }
        NarrowUpdate update = narrow_update(o, p, rates_of(p), step);
        update.amaxes = amaxes;
        update.measure = by_tensor;
        update.weight = fp8 || master_is_weight(p) ? NULL : (char*)own_weight(p);
        run_update(update, s);
    }
    if (!two_passes) { return; }
    share_amaxes(o, table, s);
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        if (!scaled_by_tensor(p)) { continue; }
        bool fp8 = is_fp8(p->dtype);
        run_rows(StateSlots{{p->master.slot, p->m.slot, p->v.slot, fp8 ? p->slot : NULL},
                            {largest_of(p->master.dtype), largest_of(p->m.dtype), largest_of(p->v.dtype), largest_of(p->dtype)}, amaxes_of(o, table, p), &o->state->apply}, 4, s);
        if (p->own_count == 0) { continue; }
        NarrowUpdate update = narrow_update(o, p, rates_of(p), step);
        update.measured = true;
        update.weight = master_is_weight(p) || p->block_descales != NULL ? NULL : (char*)own_weight(p);
        update.weight_scale = fp8 ? p->slot + 1 : NULL;
        run_update(update, s);
    }
    weights_from_masters(o, table, &o->state->apply, s);
}

// What AdamW moves in a step on this rank: gradient, states, and the weight of the forward pass. States that are scaled by tensor are read twice, with the
// gradient; an FP8 weight of other states takes a second pass over the master, one that is scaled by block two passes of its own.
static inline Traffic optimizer_traffic(const Optimizer* o, const ParamTable* table) {
    Traffic t = {};
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        double n = (double)p->own_count, grad = dtype_bytes(p->grad_dtype), master = dtype_bytes(p->master.dtype);
        double states = master + dtype_bytes(p->m.dtype) + dtype_bytes(p->v.dtype);
        t.updated += states * n;
        bool by_tensor = !o->config.by_block && (has_scale(p->master.dtype) || has_scale(p->m.dtype) || has_scale(p->v.dtype));
        bool blocks = o->config.weights_by_block && is_fp8(p->dtype);
        t.read += (grad + (by_tensor ? grad + states : is_fp8(p->dtype) && !blocks ? master : 0.0) + (blocks ? 2.0 * master : 0.0)) * n;
        t.written += master_is_weight(p) ? 0.0 : (double)dtype_bytes(p->dtype) * n;
    }
    return t;
}
