// adam_fp8.cuh: the optimizer: gradient norm, the decision whether to step, AdamW.
//
// After the gradients of a step are reduced over ranks, these run, and the host waits for none of them:
//   1. the squared norm: partial sums over fixed pieces of 4096 elements of each tensor, added in float64 by a fixed tree a tensor, then in the tensors' order, so that the value
//      does not depend on how tensors are spread over threads or ranks. A gradient in FP8 is read as codes; its descale enters with the tensor's sum. The same pass counts the
//      codes at the maximum, which steer the headroom of the reduction;
//   2. the decision, on the device, alike on every rank: a step whose loss or norm is not finite, or stands out by more than the allowed z-score from
//      the last 128 steps, is skipped and leaves no trace in weights, moments or bias corrections (a value that is not finite does not enter the
//      windows either). Its outcome is a record that the host reads while the next step runs;
//   3. AdamW (Loshchilov & Hutter) with decoupled weight decay on the FP32 master weights,
//          m = β1·m + (1-β1)·g,  v = β2·v + (1-β2)·g²,  w = w - lr·(m/(1-β1^t) / (√(v/(1-β2^t)) + ε) + decay·w),
//      where g is the gradient, its codes times descale and clip factor, and t counts the applied steps only. The same kernel writes the weight of the forward pass. An FP8
//      weight takes its scale from this step's amax, so it is written in a second pass.
#pragma once
#include "core/gradient.cuh" // pieces, formats of gradients
#include "core/params.h"   // Param, ParamTable
#include "core/profile.h"  // ProfileScope

constexpr int OUTLIER_WINDOW = 128;    // steps, as in llm.c

// ---- the decision ----

enum SkipReason { NOT_SKIPPED, SKIP_NON_FINITE_LOSS, SKIP_NON_FINITE_NORM, SKIP_LOSS_OUTLIER, SKIP_NORM_OUTLIER };
static const char* const skip_names[] = {NULL, "non-finite loss", "non-finite gradient", "loss outlier", "gradient norm outlier"};

struct StepRecord {          // what the host reads of a step
    double loss;             // mean over the global batch
    double grad_norm;        // of the averaged gradient, before clipping
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
    float grad_factor;       // clip factor
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

template <class G> struct SquaredPieces {  // partial[piece] = Σ g² over a piece of a tensor, of the codes as they are; top_codes[piece]: those at the maximum
    float* partial;
    float* top_codes;
    const G* grad;
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        size_t first = (size_t)piece * PIECE;
        const G* g = grad + first;
        auto found = team.sum_pair(piece_length(elements, first), [=](auto c) { return square_and_top(load_raw(g, c)); });
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

struct DecisionRules {
    double beta1, beta2;
    float clip;                 // 0: none
    float skip_loss_z, skip_grad_z;  // 0: never
};

struct Decide {
    OptimizerState* state;
    const double* sums;         // (tensors) squared norms
    const float* loss;          // mean over the global batch
    int tensors;
    DecisionRules rules;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        OptimizerState* o = state;
        StepRecord* r = &o->record;
        double squared = 0.0;
        for (int i = 0; i < tensors; i++) { squared += sums[i]; }
        r->grad_norm = sqrt(squared);
        r->loss = (double)*loss;
        bool loss_ok = is_finite(r->loss), norm_ok = is_finite(r->grad_norm);
        if (loss_ok && norm_ok) {  // a step that is thrown away for one must not count in the other's window
            r->loss_z = outlier_score(&o->losses, r->loss);
            r->norm_z = outlier_score(&o->norms, r->grad_norm);
        } else {
            r->loss_z = r->norm_z = not_a_number();
        }
        r->skipped = !loss_ok ? SKIP_NON_FINITE_LOSS
            : !norm_ok ? SKIP_NON_FINITE_NORM
            : rules.skip_loss_z > 0.0f && r->loss_z > (double)rules.skip_loss_z ? SKIP_LOSS_OUTLIER
            : rules.skip_grad_z > 0.0f && r->norm_z > (double)rules.skip_grad_z ? SKIP_NORM_OUTLIER : NOT_SKIPPED;
        o->apply = r->skipped == NOT_SKIPPED;
        if (!o->apply) { return; }
        r->applied++;
        o->beta1_power *= rules.beta1;
        o->beta2_power *= rules.beta2;
        o->correction1 = (float)(1.0 / (1.0 - o->beta1_power));
        o->correction2 = (float)(1.0 / (1.0 - o->beta2_power));
        o->grad_factor = rules.clip > 0.0f && r->grad_norm > (double)rules.clip ? (float)((double)rules.clip / r->grad_norm) : 1.0f;
    }
};

// ---- AdamW ----

struct AdamRates { float lr, beta1, beta2, eps, decay; };

template <class W, class G> struct AdamUpdate {  // one tensor; W: the type of the forward pass's weight, or float where that is the master itself
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
            auto g = load(pg, c) * factor;
            auto m1 = load(pm, c) * a.beta1 + g * (1.0f - a.beta1);
            auto v1 = load(pv, c) * a.beta2 + g * g * (1.0f - a.beta2);
            auto w = load(pw, c);
            w = w - ((m1 * c1) / (sqrt_of(v1 * c2) + a.eps) + w * a.decay) * a.lr;
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

struct WeightSlot {           // an FP8 weight's scale, from its amax; the amax is cleared for the next step
    float* slot;
    uint32_t* amax;
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        float scale = scale_from_amax(bits_to_float(*amax), largest_of(E4M3), 0, slot[1]);
        slot[0] = 1.0f / scale;
        slot[1] = scale;
        *amax = 0;
    }
};

template <class W> struct CastWeight {  // weight = W(master · scale)
    W* weight;
    const float* master;
    const float* scale;       // NULL = 1
    const int* apply;         // NULL or: nothing to do where it points to 0
    size_t elements;
    template <class Team> DEVICE void operator()(Team team, int piece) const {
        if (apply != NULL && *apply == 0) { return; }
        size_t first = (size_t)piece * PIECE;
        int n = piece_length(elements, first);
        W* out = weight + first;
        const float* in = master + first;
        float k = scale != NULL ? *scale : 1.0f;
        team.each(n, [=](auto c) { store(out, c, load(in, c) * k); });
    }
};

struct Optimizer {
    OptimizerState* state;    // device
    float* master;            // (elements) flat; for FP32 weights this is the weight itself
    float* m;
    float* v;
    float* partial;           // (pieces of all tensors) squares
    float* partial_tops;      // (pieces of all tensors) codes at the maximum
    double* squares;          // (tensors)
    double* tops;             // (tensors)
    int64_t* first_piece;     // (tensors + 1)
    uint32_t* weight_amax;    // (1)
};

// `weights_are_masters`: in fp32 the flat weights serve as masters too
static inline void optimizer_allocate(Optimizer* o, const ParamTable* table, bool weights_are_masters, Memory* memory) {
    int64_t pieces = 0;
    for (int i = 0; i < table->count; i++) { pieces += pieces_of(param_elements(&table->items[i])); }
    o->state = memory_take<OptimizerState>(memory, OPTIMIZER, 1);
    if (!weights_are_masters) { o->master = memory_take<float>(memory, OPTIMIZER, table->elements); }
    o->m = memory_take<float>(memory, OPTIMIZER, table->elements);
    o->v = memory_take<float>(memory, OPTIMIZER, table->elements);
    o->partial = memory_take<float>(memory, OPTIMIZER, (size_t)pieces);
    o->partial_tops = memory_take<float>(memory, OPTIMIZER, (size_t)pieces);
    o->squares = memory_take<double>(memory, OPTIMIZER, (size_t)table->count);
    o->tops = memory_take<double>(memory, OPTIMIZER, (size_t)table->count);
    o->first_piece = memory_take<int64_t>(memory, OPTIMIZER, (size_t)table->count + 1);
    o->weight_amax = memory_take<uint32_t>(memory, OPTIMIZER, 1);
}

// Empty moments, no steps applied; the gaps between tensors in the flat arrays are zero and stay so
static inline void optimizer_reset(Optimizer* o, const ParamTable* table, Stream s) {
    OptimizerState state = {};
    state.beta1_power = state.beta2_power = 1.0;
    int64_t* first = (int64_t*)host_alloc(((size_t)table->count + 1) * sizeof(int64_t));
    first[0] = 0;
    for (int i = 0; i < table->count; i++) { first[i + 1] = first[i] + pieces_of(param_elements(&table->items[i])); }
    copy_to_device(o->state, &state, sizeof(state), s);
    copy_to_device(o->first_piece, first, ((size_t)table->count + 1) * sizeof(int64_t), s);
    device_zero(o->master, table->elements * sizeof(float), s);
    device_zero(o->m, table->elements * sizeof(float), s);
    device_zero(o->v, table->elements * sizeof(float), s);
    device_zero(o->weight_amax, sizeof(uint32_t), s);
    stream_sync(s);
    free(first);
}

// Writes the forward pass's weight of one tensor from its master (whose amax is in o->weight_amax where `scaled`). `apply`: NULL = always
static inline void weight_from_master(Optimizer* o, Param* p, const int* apply, Stream s) {
    size_t n = param_elements(p);
    const float* master = o->master + p->offset;
    if (p->dtype == BF16) { run_rows(CastWeight<bf16>{(bf16*)p->weight, master, NULL, apply, n}, pieces_of(n), s); }
    else if (p->dtype == E4M3) {
        run_rows(WeightSlot{p->slot, o->weight_amax}, 1, s);
        run_rows(CastWeight<e4m3>{(e4m3*)p->weight, master, p->slot + 1, apply, n}, pieces_of(n), s);
    }
}

// After the masters were set from outside (initialisation, import): all weights of the forward pass
static inline void optimizer_cast_weights(Optimizer* o, ParamTable* table, Stream s) {
    for (int i = 0; i < table->count; i++) {
        Param* p = &table->items[i];
        size_t n = param_elements(p);
        if (is_fp8(p->dtype)) { run_rows(AmaxPieces<float>{o->weight_amax, o->master + p->offset, n}, pieces_of(n), s); }
        weight_from_master(o, p, NULL, s);
    }
}

// One step from the reduced gradients of all parameters and the mean loss of the global batch, in two halves. No host synchronisation.
// First: norm and decision. `slots`: (params, 4) of the gradients.
static inline void optimizer_decide(Optimizer* o, const ParamTable* table, const float* slots, const float* loss, DecisionRules rules, Stream s) {
    ProfileScope scope("gradient norm");
    int64_t piece = 0;
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        size_t n = param_elements(p);
        with_gradient_type(p->grad_dtype, [&](auto g) {
            typedef typename decltype(g)::type G;
            run_rows(SquaredPieces<G>{o->partial + piece, o->partial_tops + piece, (const G*)p->grad, n}, pieces_of(n), s);
        });
        piece += pieces_of(n);
    }
    run_rows(AddPieces{o->squares, o->tops, o->partial, o->partial_tops, o->first_piece, slots}, table->count, s);
    run_rows(Decide{o->state, o->squares, loss, table->count, rules}, 1, s);
}

// Second: the update.
static inline void optimizer_update(Optimizer* o, ParamTable* table, AdamRates rates, float weight_decay, Stream s) {
    ProfileScope scope("adamw");
    for (int i = 0; i < table->count; i++) {
        Param* p = &table->items[i];
        size_t n = param_elements(p);
        rates.decay = p->decay ? weight_decay : 0.0f;
        float* master = o->master + p->offset;
        float* m = o->m + p->offset;
        float* v = o->v + p->offset;
        const float* descale = p->grad_slot;
        with_gradient_type(p->grad_dtype, [&](auto tag) {
            typedef typename decltype(tag)::type G;
            const G* g = (const G*)p->grad;
            if (p->dtype == BF16) {
                run_rows(AdamUpdate<bf16, G>{(bf16*)p->weight, master, m, v, g, descale, NULL, o->state, rates, n}, pieces_of(n), s);
            } else {
                uint32_t* amax = is_fp8(p->dtype) ? o->weight_amax : NULL;
                run_rows(AdamUpdate<float, G>{NULL, master, m, v, g, descale, amax, o->state, rates, n}, pieces_of(n), s);
            }
        });
        if (is_fp8(p->dtype)) { weight_from_master(o, p, &o->state->apply, s); }
    }
}

// What AdamW moves in a step: gradient, master and moments, and the weight of the forward pass; an FP8 weight's second pass reads the master again
static inline Traffic optimizer_traffic(const ParamTable* table) {
    Traffic t = {};
    for (int i = 0; i < table->count; i++) {
        double n = (double)param_elements(&table->items[i]);
        DType weight = table->items[i].dtype;
        t.updated += 12 * n;
        t.read += ((double)dtype_bytes(table->items[i].grad_dtype) + (is_fp8(weight) ? 4 : 0)) * n;
        t.written += weight == FP32 ? 0.0 : (double)dtype_bytes(weight) * n;
    }
    return t;
}
