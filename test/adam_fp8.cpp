// Tests of adam_fp8.cuh: five steps of an independent AdamW (golden file), the update of each tensor against float64, the weights that a
// step writes, the norm, and the decision: what is skipped leaves no trace, and the z-scores are those of an account kept here. States in few
// bits are followed, bit for bit, by a model that encodes by searching in the formats' values.
#include "check.h"
#include <algorithm>
#include <deque>
#include "../adam_fp8.cuh"
#include "golden/golden.h"

// ---- a model of a few tensors ----

constexpr int64_t TOKENS = 96;  // of a global batch

struct Spec { const char* name; int64_t rows, cols; DType dtype; };

struct Model {
    ParamTable* table;
    Memory memory;
    Optimizer o;
    float* flat;         // FP32: the weights, which are the masters
    float* grads;
    float* slots;        // of the gradients: (tensors, 4), scale 1
    LossShare* loss;
    bool fp32;
    DecisionRules rules;
    AdamRates rates;
    float decay;

    explicit Model(const std::vector<Spec>& specs) {
        table = new ParamTable();
        memory = Memory{};
        o = Optimizer{};
        fp32 = specs[0].dtype == FP32;
        for (const Spec& s : specs) { param_add(table, s.name, 0, s.rows, s.cols, s.rows > 1 ? MATRIX : VECTOR, s.dtype); }
        allocate();
        memory_commit(&memory);
        allocate();
        memory_check(&memory);
        optimizer_reset(&o, table, NULL);
        std::vector<float> slot = {1.0f, 1.0f, 0.0f, 0.0f};
        for (int i = 0; i < table->count; i++) {
            if (is_fp8(table->items[i].dtype)) { copy_to_device(table->items[i].slot, slot.data(), 16, NULL); }
        }
        run_rows(ResetSlots{slots}, table->count, NULL);
        rules = DecisionRules{0.9, 0.95, 0.0f, 0.0f, 0.0f};
        rates = AdamRates{1e-3f, 0.9f, 0.95f, 1e-8f, 0.0f};
        decay = 0.1f;
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    ~Model() {
        finish();
        memory_release(&memory);
        delete table;
    }
    void allocate() {
        flat = NULL;
        if (fp32) { flat = memory_take<float>(&memory, WEIGHTS, table->elements); }
        for (int i = 0; i < table->count; i++) {
            Param* p = &table->items[i];
            if (fp32) { p->weight = flat != NULL ? flat + p->offset : NULL; }
            else { p->weight = memory_take(&memory, WEIGHTS, param_elements(p), (size_t)dtype_bytes(p->dtype)); }
            if (is_fp8(p->dtype)) { p->slot = memory_take<float>(&memory, WEIGHTS, 4); }
        }
        optimizer_allocate(&o, table, fp32, &memory);
        grads = memory_take<float>(&memory, GRADIENTS, table->elements);
        slots = memory_take<float>(&memory, GRADIENTS, 4 * (size_t)table->count);
        for (int i = 0; i < table->count; i++) {
            table->items[i].grad = memory.committed ? grads + table->items[i].offset : NULL;
            table->items[i].grad_slot = memory.committed ? slots + 4 * i : NULL;
        }
        loss = memory_take<LossShare>(&memory, GRADIENTS, 1);
    }
    size_t n() const { return table->elements; }
    // in FP32 the states of all tensors lie in one array each, at Param.offset
    float* master() const { return (float*)table->items[0].master.data; }
    float* moment() const { return (float*)table->items[0].m.data; }
    float* square() const { return (float*)table->items[0].v.data; }
    void set_master(const std::vector<float>& x) {
        copy_to_device(master(), x.data(), n() * sizeof(float), NULL);
        optimizer_cast_weights(&o, table, NULL);
        finish();
    }
    // Of TOKENS tokens so many count; loss and gradient are means over all
    StepRecord step(const std::vector<float>& g, float mean_loss, int64_t counted = TOKENS) {
        LossShare share = {(double)mean_loss, (double)counted};
        copy_to_device(grads, g.data(), n() * sizeof(float), NULL);
        copy_to_device(loss, &share, sizeof(share), NULL);
        optimizer_decide(&o, table, slots, loss, TOKENS, rules, NULL);
        optimizer_update(&o, table, rates, decay, NULL);
        finish();
        return state().record;
    }
    OptimizerState state() const {
        OptimizerState s;
        copy_to_host(&s, o.state, sizeof(s), NULL);
        return s;
    }
};

template <class T> static std::vector<T> from_device(const void* p, size_t n) {
    std::vector<T> x(n);
    copy_to_host(x.data(), p, n * sizeof(T), NULL);
    return x;
}

// One number for each element of a tensor; what lies between tensors is `gap`.
template <class F> static std::vector<float> flat_of(const Model& m, float gap, F f) {
    std::vector<float> x(m.n(), gap);
    for (int i = 0; i < m.table->count; i++) {
        const Param* p = &m.table->items[i];
        for (size_t k = 0; k < param_elements(p); k++) { x[p->offset + k] = f(i, k); }
    }
    return x;
}
static std::vector<float> random_flat(const Model& m, double deviation) {
    return flat_of(m, 0.0f, [=](int, size_t) { return (float)(deviation * normal()); });
}

// Everything that a skipped step must leave alone
static std::vector<char> everything(const Model& m) {
    std::vector<char> all;
    auto add = [&](const void* p, size_t bytes) {
        size_t at = all.size();
        all.resize(at + bytes);
        copy_to_host(all.data() + at, p, bytes, NULL);
    };
    add(m.master(), m.n() * sizeof(float));
    add(m.moment(), m.n() * sizeof(float));
    add(m.square(), m.n() * sizeof(float));
    for (int i = 0; i < m.table->count; i++) {
        const Param* p = &m.table->items[i];
        add(p->weight, param_elements(p) * (size_t)dtype_bytes(p->dtype));
        if (p->slot != NULL) { add(p->slot, 16); }
    }
    return all;
}
static std::vector<double> counters(const Model& m, bool windows) {
    OptimizerState s = m.state();
    std::vector<double> all = {s.beta1_power, s.beta2_power, (double)s.correction1, (double)s.correction2, (double)s.record.applied};
    for (const OutlierWindow* w : {&s.losses, &s.norms}) {
        if (!windows) { break; }
        all.push_back(w->count);
        all.push_back(w->next);
        for (double x : w->values) { all.push_back(x); }
    }
    return all;
}

// sizes around a piece of 4096 elements, in every format of the forward pass's weight
static const std::vector<Spec> MIXED = {{"a", 3, 21, BF16},   {"b", 1, 64, BF16}, {"c", 2, 2048, E4M3},
                                        {"d", 17, 241, E4M3}, {"e", 1, 1, BF16},  {"f", 50, 200, E4M3},
                                        {"g", 1, 4095, BF16}, {"h", 5, 1, E4M3},  {"i", 100, 90, BF16}};
static const std::vector<Spec> PLAIN = {
    {"a", 3, 21, FP32}, {"b", 1, 64, FP32}, {"c", 2, 2048, FP32}, {"d", 1, 4097, FP32}, {"e", 1, 1, FP32}};

// ---- AdamW ----

static void five_steps_match_the_golden_file(void**) {
    Golden g = golden_open("test/golden/adamw.bin");
    const float* hyper = golden_find(g, "hyper")->floats;
    const GoldenTensor* grads = golden_find(g, "grads");
    int steps = grads->dims[0], n = grads->dims[1];
    assert_true(steps == 5 && n == 37);
    Model m({{"p", n, 1, FP32}});
    assert_true(hyper[0] == m.rates.lr && hyper[1] == m.rates.beta1 && hyper[2] == m.rates.beta2 && hyper[3] == m.rates.eps
                && hyper[4] == m.decay);
    assert_true(hyper[1] == (float)m.rules.beta1 && hyper[2] == (float)m.rules.beta2);
    std::vector<float> p(m.n(), 0.0f);
    memcpy(p.data(), golden_find(g, "p")->floats, (size_t)n * sizeof(float));
    m.set_master(p);
    std::vector<double> size(n, 0.0);
    for (int t = 0; t < steps; t++) {
        std::vector<float> grad(m.n(), NAN);  // what lies between tensors is not read
        memcpy(grad.data(), grads->floats + t * n, (size_t)n * sizeof(float));
        StepRecord r = m.step(grad, 1.0f);
        assert_int_equal(r.applied, t + 1);
        std::vector<float> got = from_device<float>(m.master(), n), gm = from_device<float>(m.moment(), n), gv = from_device<float>(m.square(), n);
        for (int i = 0; i < n; i++) {
            double want = (double)golden_find(g, "p_after")->floats[t * n + i], wm = (double)golden_find(g, "m_after")->floats[t * n + i];
            double wv = (double)golden_find(g, "v_after")->floats[t * n + i];
            size[i] = fmax(size[i], fabs((double)grad[(size_t)i]));  // m may cancel
            expect_near((double)got[(size_t)i], want, 1e-6 * fabs(want), "p[%d] after step %d", i, t + 1);
            expect_near((double)gm[(size_t)i], wm, 1e-6 * size[i], "m[%d] after step %d", i, t + 1);
            expect_near((double)gv[(size_t)i], wv, 1e-6 * wv, "v[%d] after step %d", i, t + 1);
        }
    }
    golden_close(&g);
}

// Every element of every tensor against one step in float64 from the state before; decay only where the table says so; gaps stay 0.
static void check_update(const std::vector<Spec>& specs, float clip) {
    Model m(specs);
    m.rules.clip = clip;
    m.rates.lr = 0.01f;
    for (int i = 0; i < m.table->count; i += 2) { m.table->items[i].decay = !m.table->items[i].decay; }
    m.set_master(random_flat(m, 0.05));
    double b1 = 1.0, b2 = 1.0;
    for (int t = 0; t < 4; t++) {
        std::vector<float> g = flat_of(m, NAN, [=](int i, size_t) { return (float)(normal() * pow(10.0, i - 4)); });
        std::vector<float> w0 = from_device<float>(m.master(), m.n()), m0 = from_device<float>(m.moment(), m.n()),
                           v0 = from_device<float>(m.square(), m.n());
        StepRecord r = m.step(g, 2.0f);
        std::vector<float> w1 = from_device<float>(m.master(), m.n()), m1 = from_device<float>(m.moment(), m.n()),
                           v1 = from_device<float>(m.square(), m.n());
        b1 *= 0.9;
        b2 *= 0.95;
        double squares = 0;
        for (float x : g) { squares += x == x ? (double)x * (double)x : 0.0; }
        expect_near(r.grad_norm, sqrt(squares), 1e-6 * sqrt(squares), "norm");
        double factor = clip > 0.0f && r.grad_norm > (double)clip ? (double)clip / r.grad_norm : 1.0;
        assert_true(r.loss == 2.0 && r.skipped == NOT_SKIPPED && r.applied == t + 1);
        std::vector<bool> inside(m.n(), false);
        for (int i = 0; i < m.table->count; i++) {
            const Param* p = &m.table->items[i];
            for (size_t k = p->offset; k < p->offset + param_elements(p); k++) {
                inside[k] = true;
                double c = (double)g[k] * factor, beta1 = (double)m.rates.beta1, beta2 = (double)m.rates.beta2, u = 0x1p-24;
                double wm = (double)m0[k] * beta1 + c * (1.0 - beta1), wv = (double)v0[k] * beta2 + c * c * (1.0 - beta2);
                double move = (wm / (1.0 - b1)) / (sqrt(wv / (1.0 - b2)) + 1e-8), decay = p->decay ? 0.1 * (double)w0[k] : 0.0;
                double want = (double)w0[k] - 0.01 * (move + decay), m_size = fabs((double)m0[k]) + fabs(c);
                double move_error = (m_size / (1.0 - b1)) / (sqrt(wv / (1.0 - b2)) + 1e-8) + fabs(move);
                expect_near((double)m1[k], wm, 4.0 * u * m_size, "step %d: m of %s, element %zu", t, p->name, k - p->offset);
                expect_near((double)v1[k], wv, 8.0 * u * wv + 1e-44, "step %d: v of %s, element %zu", t, p->name, k - p->offset);
                expect_near((double)w1[k], want, u * (2.0 * fabs((double)w0[k]) + 0.01 * 16.0 * (move_error + fabs(decay))),
                            "step %d: %s, element %zu", t, p->name, k - p->offset);
            }
        }
        for (size_t k = 0; k < m.n(); k++) { assert_true(inside[k] || (w1[k] == 0.0f && m1[k] == 0.0f && v1[k] == 0.0f)); }
    }
}

static void updates_match_float64(void**) {
    for (float clip : {0.0f, 1.0f, 1e9f}) {
        check_update(PLAIN, clip);
        check_update(MIXED, clip);
    }
}

// ---- the weights of the forward pass ----

static void check_weights(const Model& m, const char* when) {
    for (int i = 0; i < m.table->count; i++) {
        const Param* p = &m.table->items[i];
        size_t n = param_elements(p);
        std::vector<float> master = from_device<float>(m.master() + p->offset, n);
        if (p->dtype == BF16) {
            std::vector<bf16> w = from_device<bf16>(p->weight, n);
            for (size_t k = 0; k < n; k++) {
                if (w[k].bits != encoded<bf16>(master[k]).bits) { fail_msg("%s: BF16 weight %s[%zu]", when, p->name, k); }
            }
        } else if (p->dtype == E4M3) {
            std::vector<e4m3> w = from_device<e4m3>(p->weight, n);
            std::vector<float> slot = from_device<float>(p->slot, 4);
            float amax = 0.0f;
            for (float x : master) { amax = fmaxf(amax, fabsf(x)); }
            float scale = scale_from_amax(amax, 448.0f, 0, slot[1]);
            assert_true(slot[1] == scale && slot[0] == 1.0f / scale && slot[2] == 0.0f && slot[3] == 0.0f);
            for (size_t k = 0; k < n; k++) {
                if (w[k].bits != encoded<e4m3>(master[k] * scale).bits) { fail_msg("%s: FP8 weight %s[%zu]", when, p->name, k); }
            }
        }
    }
}

// They are the masters as they are after the step, and an FP8 tensor's scale is that of the same step: it follows a tensor that grows.
static void a_step_writes_the_forward_passs_weights(void**) {
    Model m(MIXED);
    m.set_master(flat_of(m, 0.0f, [](int i, size_t) { return (float)(normal() * pow(4.0, i - 4)); }));
    check_weights(m, "after initialisation");
    m.rates.lr = 0.5f;
    for (int t = 0; t < 6; t++) {
        m.step(random_flat(m, 1.0), 1.0f);
        check_weights(m, "after a step");
    }
}

static void a_tensor_of_zeros_keeps_its_scale(void**) {
    Model m({{"zeros", 4, 100, E4M3}, {"b", 2, 10, E4M3}});
    const float slot[] = {0.25f, 4.0f, 0.0f, 0.0f};
    copy_to_device(m.table->items[0].slot, slot, 16, NULL);
    std::vector<float> x(m.n(), 0.0f);
    x[m.table->items[1].offset] = 3.0f;
    m.set_master(x);
    assert_true(from_device<float>(m.table->items[0].slot, 4)[1] == 4.0f);
    assert_true(from_device<float>(m.table->items[1].slot, 4)[1] == 128.0f);
    check_weights(m, "zeros");
}

// ---- the norm ----

static void norm_and_update_do_not_depend_on_threads(void**) {
    double norms[3];
    std::vector<char> states[3];
    for (int threads = 1; threads <= 3; threads++) {
        random_state = 4711;
        Model m(MIXED);
        m.set_master(random_flat(m, 0.05));
        std::vector<float> g = flat_of(m, NAN, [](int, size_t) { return (float)(normal() * exp2(uniform(-20, 20))); });
        double squares = 0;
        for (float x : g) { squares += x == x ? (double)x * (double)x : 0.0; }
        with_threads(threads, [&] { norms[threads - 1] = m.step(g, 1.0f).grad_norm; });
        expect_near(norms[threads - 1], sqrt(squares), 1e-6 * sqrt(squares), "norm");
        states[threads - 1] = everything(m);
    }
    assert_true(norms[0] == norms[1] && norms[0] == norms[2]);
    assert_true(states[0] == states[1] && states[0] == states[2]);
}

static void norms_of_zero_and_of_very_small_gradients(void**) {
    Model m(PLAIN);
    m.rules.clip = 1.0f;
    m.set_master(random_flat(m, 0.05));
    StepRecord r = m.step(std::vector<float>(m.n(), 0.0f), 1.0f);
    assert_true(r.grad_norm == 0.0 && r.skipped == NOT_SKIPPED);
    std::vector<float> one(m.n(), 0.0f);
    one[m.table->items[4].offset] = 1e-15f;
    expect_near(m.step(one, 1.0f).grad_norm, 1e-15, 1e-21, "norm");
    for (float x : from_device<float>(m.master(), m.n())) { assert_true(isfinite(x)); }
}

static void clipping_starts_beyond_its_limit(void**) {
    for (double norm : {0.5, 1.0, 1.5, 1000.0}) {
        Model m({{"p", 2, 2, FP32}});
        m.rules.clip = 1.0f;
        std::vector<float> g(m.n(), 0.0f);
        g[0] = (float)(0.6 * norm);
        g[3] = (float)(-0.8 * norm);
        StepRecord r = m.step(g, 1.0f);
        expect_near(r.grad_norm, norm, 1e-6 * norm, "the norm is that before clipping");
        double factor = norm > 1.0 ? 1.0 / norm : 1.0;
        std::vector<float> first = from_device<float>(m.moment(), 4);
        expect_near((double)first[0], 0.1 * 0.6 * norm * factor, 1e-6, "m[0]");
        expect_near((double)first[3], -0.1 * 0.8 * norm * factor, 1e-6, "m[3]");
        if (norm < 1.0) { assert_true(m.state().grad_factor == 1.0f); }
    }
}

// ---- skipped steps ----

// A step that cannot be: weights, moments, corrections, windows and the count stay bit for bit; only the record tells of it.
static void non_finite_steps_leave_no_trace(void**) {
    for (const std::vector<Spec>* specs : {&PLAIN, &MIXED}) {
        Model m(*specs);
        m.rules.skip_loss_z = m.rules.skip_grad_z = 3.0f;
        m.rules.clip = 1.0f;
        m.set_master(random_flat(m, 0.05));
        const std::vector<float> good = random_flat(m, 1.0);
        int64_t applied = 0;
        for (float bad : {NAN, -NAN, INFINITY, -INFINITY, 3e30f}) {  // the last one's square is beyond a float
            for (int where = -1; where < m.table->count; where++) {
                for (bool last : {false, true}) {
                    m.step(good, 1.0f);
                    applied++;
                    std::vector<char> before = everything(m);
                    std::vector<double> counted = counters(m, true);
                    std::vector<float> g = good;
                    float mean_loss = 1.0f;
                    if (where < 0) {
                        if (isfinite(bad)) { continue; }
                        mean_loss = bad;
                    } else {
                        const Param* p = &m.table->items[where];
                        g[p->offset + (last ? param_elements(p) - 1 : 0)] = bad;
                    }
                    StepRecord r = m.step(g, mean_loss);
                    assert_int_equal(r.skipped, where < 0 ? SKIP_NON_FINITE_LOSS : SKIP_NON_FINITE_NORM);
                    assert_non_null(skip_names[r.skipped]);
                    assert_int_equal(r.applied, applied);
                    assert_true(where < 0 ? !isfinite(r.loss) : !isfinite(r.grad_norm));
                    assert_true(isnan(r.loss_z) && isnan(r.norm_z));
                    assert_true(everything(m) == before);
                    assert_true(counters(m, true) == counted);
                }
            }
        }
    }
}

// A batch without a target: its loss and gradient are 0, and it is no step, with zeros neither in the windows nor divided by. What is not finite is told first.
static void a_step_in_which_nothing_counts_leaves_no_trace(void**) {
    for (const std::vector<Spec>* specs : {&PLAIN, &MIXED}) {
        Model m(*specs);
        m.rules.clip = 1.0f;
        m.set_master(random_flat(m, 0.05));
        std::vector<float> none(m.n(), 0.0f), bad = none;
        bad[1] = NAN;
        for (int t = 0; t < 3; t++) {
            m.step(random_flat(m, 1.0), 1.0f, 7);
            std::vector<char> before = everything(m);
            std::vector<double> known = counters(m, true);
            StepRecord r = m.step(none, 0.0f, 0);
            assert_int_equal(r.skipped, SKIP_NOTHING_COUNTS);
            assert_string_equal(skip_names[r.skipped], "no token counts in the loss");
            assert_true(r.loss == 0.0 && r.grad_norm == 0.0 && isnan(r.loss_z) && isnan(r.norm_z) && r.applied == t + 1);
            assert_int_equal(m.step(bad, 0.0f, 0).skipped, SKIP_NON_FINITE_NORM);
            assert_int_equal(m.step(none, NAN, 0).skipped, SKIP_NON_FINITE_LOSS);
            assert_true(everything(m) == before);
            assert_true(counters(m, true) == known);
        }
    }
}

// Means over all tokens become means over those that count: loss, norm, what the windows hold, and the step, clipped or not; where all count by a factor of
// exactly 1. Powers of two, so that they are the same bits as those of a gradient that was a mean over them in the first place.
static void means_are_over_the_tokens_that_count(void**) {
    for (float clip : {0.0f, 0.5f, 1e6f}) {
        for (int64_t counted : {(int64_t)1, (int64_t)3, TOKENS / 8, TOKENS / 2, TOKENS}) {
            Model a(MIXED), b(MIXED);
            std::vector<float> start = random_flat(a, 0.05);
            for (Model* m : {&a, &b}) {
                m->rules.clip = clip;
                m->set_master(start);
            }
            double factor = (double)TOKENS / (double)counted;
            for (int t = 0; t < 5; t++) {
                std::vector<float> g = random_flat(a, 1.0), scaled = g;
                for (float& x : scaled) { x = (float)((double)x * factor); }
                StepRecord ra = a.step(g, 0.75f, counted), rb = b.step(scaled, (float)(0.75 * factor));
                bool exact = factor != (double)TOKENS && factor == floor(factor) && ((int64_t)factor & ((int64_t)factor - 1)) == 0;
                double apart = exact ? 0.0 : 1e-6;
                expect_near(ra.loss, 0.75 * factor, 1e-15 * ra.loss, "loss");
                expect_near(ra.grad_norm, rb.grad_norm, apart * rb.grad_norm, "norm");
                assert_int_equal(ra.skipped, NOT_SKIPPED);
                if (exact) { assert_true(everything(a) == everything(b)); }
                std::vector<float> wa = from_device<float>(a.master(), a.n()), wb = from_device<float>(b.master(), b.n());
                for (size_t k = 0; k < wa.size(); k++) { expect_near((double)wa[k], (double)wb[k], 1e-5, "weight %zu", k); }
            }
            OptimizerState s = a.state();
            expect_near(s.losses.values[4], 0.75 * factor, 1e-12, "the window of losses");
            expect_near(s.norms.values[4], s.record.grad_norm, 0.0, "the window of norms");
            if (counted == TOKENS && clip == 0.0f) { assert_true(s.grad_factor == 1.0f); }
            if (clip == 0.0f) { expect_near((double)s.grad_factor, factor, 1e-6 * factor, "factor"); }
        }
    }
}

// The weights of the forward pass are not even written again: what stands there stays, right or not.
static void a_skipped_step_writes_no_weight(void**) {
    Model m(MIXED);
    m.set_master(random_flat(m, 0.05));
    for (int i = 0; i < m.table->count; i++) {
        const Param* p = &m.table->items[i];
        std::vector<char> other(param_elements(p) * (size_t)dtype_bytes(p->dtype), 0x11);
        copy_to_device(p->weight, other.data(), other.size(), NULL);
    }
    std::vector<char> before = everything(m);
    m.step(random_flat(m, 1.0), NAN);
    assert_true(everything(m) == before);
}

// With and without bad steps in between, training goes the same way.
static void training_goes_on_as_if_a_skipped_step_had_not_been(void**) {
    Model a(MIXED), b(MIXED);
    std::vector<float> start = random_flat(a, 0.05);
    a.set_master(start);
    b.set_master(start);
    for (int t = 0; t < 10; t++) {
        std::vector<float> g = random_flat(a, 1.0), bad = g;
        a.step(g, 1.0f);
        b.step(g, 1.0f);
        bad[7] = NAN;
        if (t % 3 == 0) { b.step(bad, 1.0f); }
        if (t % 4 == 0) { b.step(g, INFINITY); }
        assert_true(everything(a) == everything(b));
    }
    assert_int_equal(a.state().record.applied, 10);
    assert_int_equal(b.state().record.applied, 10);
}

// ---- outliers ----

// An account of its own: the last 128 finite values, and the z-score of the newest among them once there were 128 before it.
struct Account {
    std::deque<double> values;
    double score(double x) {
        bool full = values.size() == 128;
        if (full) { values.pop_front(); }
        values.push_back(x);
        if (!full) { return NAN; }
        long double sum = 0, squares = 0;
        for (double v : values) { sum += v; }
        long double mean = sum / 128;
        for (double v : values) { squares += (v - mean) * (v - mean); }
        return (double)((x - mean) / sqrtl(squares / 128));
    }
};

static void outliers_are_skipped_by_their_z_score(void**) {
    Model m({{"p", 3, 7, E4M3}, {"b", 1, 5, BF16}});
    m.rules.skip_loss_z = 4.0f;
    m.rules.skip_grad_z = 3.5f;
    m.set_master(random_flat(m, 0.05));
    Account losses, norms;
    int64_t applied = 0;
    int seen[5] = {};
    for (int t = 0; t < 600; t++) {
        float mean_loss = (float)(4.0 + 0.1 * normal());
        std::vector<float> g = random_flat(m, 1.0);
        if (t % 97 == 96) { mean_loss += 3.0f; }                        // also before the windows are full, where nothing is skipped
        if (t % 89 == 88) { for (float& x : g) { x *= 10.0f; } }
        if (t % 71 == 70) { mean_loss -= 3.0f; }                        // a small loss is none to be afraid of
        if (t % 31 == 30) { mean_loss = t % 2 == 0 ? NAN : INFINITY; }
        if (t % 37 == 36) { g[3] = NAN; }
        std::vector<char> before = everything(m);
        std::vector<double> counted = counters(m, false);
        StepRecord r = m.step(g, mean_loss);
        int want = NOT_SKIPPED;
        if (!isfinite(mean_loss)) { want = SKIP_NON_FINITE_LOSS; }
        else if (!isfinite(g[3])) { want = SKIP_NON_FINITE_NORM; }
        else {
            double loss_z = losses.score((double)mean_loss), norm_z = norms.score(r.grad_norm);
            assert_int_equal(isnan(loss_z), isnan(r.loss_z));
            assert_int_equal(isnan(norm_z), isnan(r.norm_z));
            expect_near(r.loss_z, loss_z, 1e-9, "z-score of the loss in step %d", t);
            expect_near(r.norm_z, norm_z, 1e-9, "z-score of the norm in step %d", t);
            want = loss_z > 4.0 ? SKIP_LOSS_OUTLIER : norm_z > 3.5 ? SKIP_NORM_OUTLIER : NOT_SKIPPED;
        }
        assert_int_equal(r.skipped, want);
        applied += want == NOT_SKIPPED;
        seen[want]++;
        assert_int_equal(r.applied, applied);
        assert_int_equal(everything(m) == before, want != NOT_SKIPPED);
        assert_int_equal(counters(m, false) == counted, want != NOT_SKIPPED);
    }
    for (int reason = 0; reason < 5; reason++) { assert_true(seen[reason] > 0); }
}

static void a_limit_of_zero_skips_no_outlier(void**) {
    Model m({{"p", 3, 7, BF16}});
    m.set_master(random_flat(m, 0.05));
    for (int t = 0; t < 200; t++) {
        std::vector<float> g = random_flat(m, t == 190 ? 1000.0 : 1.0);
        StepRecord r = m.step(g, t == 180 ? 1000.0f : (float)(4.0 + 0.1 * normal()));
        assert_int_equal(r.skipped, NOT_SKIPPED);
        if (t == 180) { assert_true(r.loss_z > 8.0); }
        if (t == 190) { assert_true(r.norm_z > 8.0); }
    }
}

static void a_window_takes_no_value_that_is_not_finite(void**) {
    OutlierWindow w = {};
    for (int i = 0; i < 200; i++) {
        OutlierWindow before = w;
        for (double bad : {(double)NAN, (double)INFINITY, -(double)INFINITY}) { assert_true(isnan(outlier_score(&w, bad))); }
        assert_memory_equal(&w, &before, sizeof(w));
        assert_int_equal(isnan(outlier_score(&w, (double)i)), i < 128);
    }
}

// Values that do not vary have no outliers, and there is no division by zero. (Where their mean is rounded, as that of the norms here,
// all are the same distance from it, which is a score of 1.)
static void values_that_do_not_vary_are_no_outliers(void**) {
    Model m({{"p", 3, 7, BF16}});
    m.rules.skip_loss_z = m.rules.skip_grad_z = 1.5f;
    std::vector<float> g(m.n(), 0.5f);
    for (int t = 0; t < 140; t++) {
        StepRecord r = m.step(g, 3.0f);
        assert_int_equal(r.skipped, NOT_SKIPPED);
        assert_true(t < 128 ? isnan(r.loss_z) && isnan(r.norm_z) : r.loss_z == 0.0 && fabs(r.norm_z) < 1.001);
    }
}

// ---- allocation ----

// The model's own check is memory_check; here: what it comes to. Masters are there once.
// Gradients in a narrow format give the bits that their values in FP32 give, and the norm counts their codes at the maximum.
template <class G> static void narrow_gradients_are_their_codes_times_the_descale(void) {
    const DType type = DTypeOf<G>::value;
    const float descale = type == BF16 ? 1.0f : 0x1p-9f;
    const std::vector<Spec> specs = {{"fp8", 5, 1000, E4M3}, {"bf16", 3, 1801, BF16}, {"vector", 1, 65, BF16}};
    Model wide(specs), narrow(specs);
    std::vector<float> start = random_flat(wide, 0.1);
    wide.set_master(start);
    narrow.set_master(start);
    Array<G> grads(wide.n());
    for (int step = 0; step < 3; step++) {
        std::vector<G> codes(wide.n());
        std::vector<float> values(wide.n());
        std::vector<int> tops(3);
        for (int i = 0; i < 3; i++) {
            const Param* p = &wide.table->items[i];
            for (size_t k = 0; k < param_elements(p); k++) {
                G* code = &codes[p->offset + k];
                from_float(*code, (float)((type == E5M2 ? 30000.0 : type == E4M3 ? 250.0 : 0.01) * normal()));
                values[p->offset + k] = to_float(*code) * descale;
                tops[i] += is_fp8(type) && fabsf(to_float(*code)) == largest_of(type);
            }
        }
        memcpy((void*)grads.p, codes.data(), codes.size() * sizeof(G));
        for (int i = 0; i < 3; i++) {
            Param* p = &narrow.table->items[i];
            p->grad = grads.p + p->offset;
            p->grad_dtype = type;
            const float slot[4] = {descale, 1.0f / descale, 0.0f, 0.0f};
            copy_to_device(p->grad_slot, slot, sizeof(slot), NULL);
        }
        StepRecord a = wide.step(values, 1.0f), b = narrow.step(values, 1.0f);
        assert_true(a.skipped == NOT_SKIPPED && b.skipped == NOT_SKIPPED);
        expect_near(b.grad_norm, a.grad_norm, 1e-6 * a.grad_norm, "norm");  // other types are added in lanes of other widths
        assert_true(everything(wide) == everything(narrow));
        std::vector<double> counted = from_device<double>(narrow.o.tops, 3);
        for (int i = 0; i < 3; i++) { assert_true(counted[i] == (double)tops[i]); }
        assert_true(!is_fp8(type) || tops[0] > 0);
    }
    narrow.rules.clip = 0.25f * (float)narrow.step(start, 1.0f).grad_norm;  // clipping takes the descale along
    std::vector<float> m0 = from_device<float>(narrow.moment(), narrow.n()), m1;
    narrow.step(start, 1.0f);
    m1 = from_device<float>(narrow.moment(), narrow.n());
    const Param* first = &narrow.table->items[0];
    for (size_t k = 0; k < param_elements(first); k++) {
        G code;
        memcpy(&code, (const char*)first->grad + k * sizeof(G), sizeof(G));
        double g = (double)to_float(code) * descale * 0.25, want = 0.9 * (double)m0[first->offset + k] + 0.1 * g;
        expect_near((double)m1[first->offset + k], want, 1e-6 * (fabs(want) + fabs(g)), "clipped moment %zu", k);
    }
    // a slot of NaN, which a tensor has that was not finite on some rank, skips the step whatever the codes say
    const float not_finite[4] = {NAN, NAN, 0.0f, 0.0f};
    copy_to_device(narrow.table->items[1].grad_slot, not_finite, sizeof(not_finite), NULL);
    StepRecord r = narrow.step(start, 1.0f);
    assert_int_equal(r.skipped, SKIP_NON_FINITE_NORM);
    assert_true(isnan(r.grad_norm));
}

static void gradients_in_bf16_e4m3_and_e5m2_are_read_as_they_are(void**) {
    narrow_gradients_are_their_codes_times_the_descale<bf16>();
    narrow_gradients_are_their_codes_times_the_descale<e4m3>();
    narrow_gradients_are_their_codes_times_the_descale<e5m2>();
}

static void memory_is_as_documented(void**) {
    auto rounded = [](size_t bytes) { return round_up(bytes, (size_t)256); };
    for (bool masters : {false, true}) {
        ParamTable* table = new ParamTable();
        param_add(table, "a", 0, 3, 5000, MATRIX, masters ? FP32 : BF16);  // 4 pieces
        param_add(table, "b", 0, 1, 10, VECTOR, masters ? FP32 : BF16);    // 1 piece
        Memory m = {};
        Optimizer o = {};
        optimizer_allocate(&o, table, masters, &m);
        size_t want = rounded(sizeof(OptimizerState)) + (masters ? 2 : 3) * rounded(table->elements * 4) + 6 * 256;
        assert_int_equal(m.bytes[OPTIMIZER], want);
        assert_int_equal(memory_total(&m), want + 256);  // sums of pieces
        delete table;
    }
}

// ---- states in few bits: a model, written from the formats' definitions ----

// The magnitudes of a format by code. That of BF16 ends with 2^128, where inf stands; the others end with the largest finite value.
static std::vector<double> magnitudes_of(int mantissa, int bias, uint32_t top) {
    std::vector<double> x;
    for (uint32_t code = 0; code <= top; code++) {
        int e = (int)(code >> mantissa), m = (int)(code & ((1u << mantissa) - 1u));
        x.push_back(e == 0 ? ldexp((double)m, 1 - bias - mantissa) : ldexp((double)(m + (1 << mantissa)), e - bias - mantissa));
    }
    return x;
}
static const std::vector<double>& magnitudes(DType t) {
    static const std::vector<double> in_bf16 = magnitudes_of(7, 127, 0x7f80), in_fp16 = magnitudes_of(10, 15, 0x7bff);
    static const std::vector<double> in_e4m3 = magnitudes_of(3, 7, 0x7e), in_e5m2 = magnitudes_of(2, 15, 0x7b);
    static const std::vector<double> in_ue5m3 = magnitudes_of(3, 15, 0xfe);
    return t == BF16 ? in_bf16 : t == FP16 ? in_fp16 : t == E4M3 ? in_e4m3 : t == E5M2 ? in_e5m2 : in_ue5m3;
}
static int sign_bit_of(DType t) { return t == BF16 || t == FP16 ? 15 : t == UE5M3 ? 8 : 7; }  // UE5M3 has none
static bool is_scaled(DType t) { return t != FP32 && t != BF16; }
static double top_of_format(DType t) { return t == E4M3 ? 448.0 : t == E5M2 ? 57344.0 : t == UE5M3 ? 114688.0 : 65504.0; }

static float model_value(DType t, uint32_t code) {
    if (t == FP32) { return bits_to_float(code); }
    int sign = sign_bit_of(t);
    double x = magnitudes(t)[code & ((1u << sign) - 1u)];
    return (float)(code >> sign ? -x : x);
}

// The lower neighbour is searched for. `random` NULL: nearest, ties to even; else 32 random bits, and the part of the significand below the unit
// between the neighbours rounds up where it and the bits carry. UE5M3 has 0 for 0 only.
static uint32_t model_code(DType t, float x, const uint32_t* random) {
    uint32_t bits = float_to_bits(x);
    if (t == FP32) { return bits; }
    const std::vector<double>& values = magnitudes(t);
    double a = fabs((double)x);
    uint32_t low = (uint32_t)(std::upper_bound(values.begin(), values.end(), a) - values.begin()) - 1, sign = (bits >> 31) << sign_bit_of(t);
    if (low + 1 == values.size()) { return sign | low; }
    bool up;
    if (random == NULL) {
        double middle = 0.5 * (values[low] + values[low + 1]);
        up = a > middle || (a == middle && low % 2 == 1);
    } else {
        int field = (int)((bits >> 23) & 0xff), shift = ilogb(values[low + 1] - values[low]) - ((field == 0 ? 1 : field) - 150);
        uint64_t tail = (bits & 0x7fffff) | (field == 0 ? 0u : 0x800000u);
        if (shift <= 31) { tail &= (1ull << shift) - 1; }
        else { tail = shift < 62 ? tail >> (shift - 31) : 0; shift = 31; }
        up = (tail + (uint64_t)(*random >> (32 - shift))) >> shift != 0;
    }
    if (t == UE5M3 && low == 0 && a > 0.0) { up = true; }
    return sign | (low + up);
}

// 2^e, e the greatest within ±126 for which amax·2^e is not beyond the format
static float model_scale(DType t, double amax, float old) {
    if (amax == 0.0) { return old; }
    int e = ilogb(top_of_format(t)) - ilogb(amax) + 1;
    while (ldexp(amax, e) > top_of_format(t)) { e--; }
    return (float)ldexp(1.0, e > 126 ? 126 : e < -126 ? -126 : e);
}
static double amax_of(const std::vector<float>& x, size_t from, size_t to) {
    double top = 0.0;
    for (size_t i = from; i < to && i < x.size(); i++) { top = fmax(top, fabs((double)x[i])); }
    return top;
}

struct ModelState {
    DType dtype;
    bool by_block;
    std::vector<uint32_t> codes;
    float slot[4];
    std::vector<int> exponents;

    void reset(DType t, bool block, size_t n) {
        dtype = t;
        by_block = block;
        codes.assign(n, 0);
        exponents.assign((n + 127) / 128, 0);
        for (int k = 0; k < 4; k++) { slot[k] = k < 2 ? 1.0f : 0.0f; }
    }
    float value(size_t i) const {
        float x = model_value(dtype, codes[i]);
        return !is_scaled(dtype) ? x : by_block ? x * (float)ldexp(1.0, -exponents[i / 128]) : x * slot[0];
    }
    std::vector<float> values() const {
        std::vector<float> x(codes.size());
        for (size_t i = 0; i < x.size(); i++) { x[i] = value(i); }
        return x;
    }
    // `turn`: the random bits are rotated by so many to the left
    void write(const std::vector<float>& x, bool stochastic, RandomKey key, int turn) {
        size_t n = codes.size();
        if (is_scaled(dtype) && by_block) {
            for (size_t b = 0; b < exponents.size(); b++) {
                exponents[b] = ilogb(model_scale(dtype, amax_of(x, 128 * b, 128 * b + 128), (float)ldexp(1.0, exponents[b])));
            }
        } else if (is_scaled(dtype)) {
            slot[2] = slot[0];
            slot[1] = model_scale(dtype, amax_of(x, 0, n), slot[1]);
            slot[0] = 1.0f / slot[1];
        }
        for (size_t i = 0; i < n; i++) {
            float scale = !is_scaled(dtype) ? 1.0f : by_block ? (float)ldexp(1.0, exponents[i / 128]) : slot[1];
            uint32_t drawn = random_bits(key, i), random = (uint32_t)((((uint64_t)drawn << 32) | drawn) >> (32 - turn));
            codes[i] = model_code(dtype, x[i] * scale, stochastic ? &random : NULL);
        }
    }
};

struct Formats {
    DType master, m, v;
    bool by_block;
    Rounding master_rounding, moment_rounding;
};
struct NarrowSpec { size_t size; DType weight, grad; };

struct ModelTensor {
    NarrowSpec spec;
    bool decay;
    ModelState states[3];           // master, m, v
    std::vector<uint32_t> weight;
    float weight_slot[4];

    // `amax`: what an FP8 weight's scale is made from
    void cast_weight(double amax) {
        float scale = 1.0f;
        if (spec.weight == E4M3) {
            scale = weight_slot[1] = model_scale(E4M3, amax, weight_slot[1]);
            weight_slot[0] = 1.0f / scale;
        }
        for (size_t i = 0; i < spec.size; i++) { weight[i] = model_code(spec.weight, states[0].value(i) * scale, NULL); }
    }
};

// The optimizer with states in these formats, next to the model of what it should hold. FP32 weights are the masters, as in the trainer.
struct Narrow {
    Formats f;
    uint64_t seed;
    ParamTable* table;
    Memory memory;
    Optimizer o;
    float* slots;
    LossShare* loss;
    std::vector<ModelTensor> want;
    DecisionRules rules;
    AdamRates rates;
    float decay;
    double beta1_power, beta2_power;
    uint64_t updates;
    bool modelled;                  // false: `want` does not follow, and nothing is compared

    Narrow(const Formats& formats, const std::vector<NarrowSpec>& specs, uint64_t random_seed) : f(formats), seed(random_seed) {
        table = new ParamTable();
        memory = Memory{};
        o = Optimizer{};
        o.config = OptimizerConfig{f.by_block, f.master_rounding, f.moment_rounding, seed};
        for (const NarrowSpec& s : specs) {
            Param* p = param_add(table, "p", 0, 1, (int64_t)s.size, VECTOR, s.weight);
            p->decay = table->count % 2 == 1;
            p->master.dtype = f.master;
            p->m.dtype = f.m;
            p->v.dtype = f.v;
            p->grad_dtype = s.grad;
            ModelTensor t = {};
            t.spec = s;
            t.decay = p->decay;
            t.weight.resize(s.size);
            t.weight_slot[0] = t.weight_slot[1] = 1.0f;
            want.push_back(t);
        }
        allocate();
        memory_commit(&memory);
        for (MemoryCategory c : {WEIGHTS, OPTIMIZER}) {  // nothing may rely on zeros that it did not write
            std::vector<char> junk(memory.bytes[c], (char)0x9d);
            copy_to_device(memory.block[c], junk.data(), junk.size(), NULL);
        }
        allocate();
        memory_check(&memory);
        reset();
        for (int i = 0; i < table->count; i++) {
            if (table->items[i].slot != NULL) { run_rows(ResetSlots{table->items[i].slot}, 1, NULL); }
        }
        rules = DecisionRules{(double)0.9f, (double)0.95f, 0.0f, 0.0f, 0.0f};
        rates = AdamRates{1e-2f, 0.9f, 0.95f, 1e-8f, 0.0f};
        decay = 0.1f;
        modelled = true;
    }
    Narrow(const Narrow&) = delete;
    Narrow& operator=(const Narrow&) = delete;
    ~Narrow() {
        finish();
        memory_release(&memory);
        delete table;
    }
    void allocate() {
        bool masters = want[0].spec.weight == FP32;
        float* flat = masters ? memory_take<float>(&memory, WEIGHTS, table->elements) : NULL;
        slots = memory_take<float>(&memory, GRADIENTS, 4 * (size_t)table->count);
        loss = memory_take<LossShare>(&memory, GRADIENTS, 1);
        for (int i = 0; i < table->count; i++) {
            Param* p = &table->items[i];
            if (masters) { p->weight = flat != NULL ? flat + p->offset : NULL; }
            else { p->weight = memory_take(&memory, WEIGHTS, param_elements(p), (size_t)dtype_bytes(p->dtype)); }
            if (is_fp8(p->dtype)) { p->slot = memory_take<float>(&memory, WEIGHTS, 4); }
            p->grad = memory_take(&memory, GRADIENTS, param_elements(p), (size_t)dtype_bytes(p->grad_dtype));
            p->grad_slot = memory.committed ? slots + 4 * i : NULL;
        }
        optimizer_allocate(&o, table, masters, &memory);
    }
    void reset() {
        optimizer_reset(&o, table, NULL);
        beta1_power = beta2_power = 1.0;
        updates = 0;
        for (ModelTensor& t : want) {
            t.states[0].reset(f.master, f.by_block, t.spec.size);
            t.states[1].reset(f.m, f.by_block, t.spec.size);
            t.states[2].reset(f.v, f.by_block, t.spec.size);
        }
    }
    void put_codes(void* at, DType t, const std::vector<uint32_t>& codes) const {
        std::vector<char> bytes(codes.size() * (size_t)dtype_bytes(t));
        for (size_t k = 0; k < codes.size(); k++) { memcpy(&bytes[k * (size_t)dtype_bytes(t)], &codes[k], (size_t)dtype_bytes(t)); }
        copy_to_device(at, bytes.data(), bytes.size(), NULL);
    }
    void set_masters(const std::vector<std::vector<float>>& x) {
        for (size_t i = 0; i < want.size(); i++) {
            optimizer_set_master(&table->items[i], x[i].data(), NULL, NULL);
            ModelState& s = want[i].states[0];
            s.reset(f.master, f.by_block, want[i].spec.size);
            s.write(x[i], false, RandomKey{}, 0);
        }
        optimizer_cast_weights(&o, table, NULL);
        for (ModelTensor& t : want) { t.cast_weight(amax_of(t.states[0].values(), 0, t.spec.size)); }
        compare("after set_master");
    }
    // Gradients in their formats; those of FP8 with a descale that is no power of two and lets a few saturate
    StepRecord step(const std::vector<std::vector<float>>& grads, float mean_loss, const char* when) {
        std::vector<std::vector<float>> g(want.size());
        std::vector<float> descales(want.size(), 1.0f);
        double squares = 0.0;
        for (size_t i = 0; i < want.size(); i++) {
            DType t = want[i].spec.grad;
            double amax = amax_of(grads[i], 0, grads[i].size());
            if (is_fp8(t) && amax > 0.0) { descales[i] = (float)(0.83 * amax / top_of_format(t)); }
            std::vector<uint32_t> codes;
            for (float x : grads[i]) {
                codes.push_back(model_code(t, x / descales[i], NULL));
                g[i].push_back(model_value(t, codes.back()));
                squares += (double)g[i].back() * (double)g[i].back() * (double)descales[i] * (double)descales[i];
            }
            put_codes(table->items[i].grad, t, codes);
            const float slot[4] = {descales[i], 1.0f / descales[i], 0.0f, 0.0f};
            copy_to_device(table->items[i].grad_slot, slot, sizeof(slot), NULL);
        }
        const LossShare share = {(double)mean_loss, (double)TOKENS};
        copy_to_device(loss, &share, sizeof(share), NULL);
        optimizer_decide(&o, table, slots, loss, TOKENS, rules, NULL);
        optimizer_update(&o, table, rates, decay, NULL);
        finish();
        OptimizerState state;
        copy_to_host(&state, o.state, sizeof(state), NULL);
        uint64_t number = updates++;
        if (!modelled) { return state.record; }
        bool skipped = !isfinite(mean_loss) || !isfinite(squares);
        assert_int_equal(state.record.skipped != NOT_SKIPPED, skipped);
        if (!skipped) {
            expect_near(state.record.grad_norm, sqrt(squares), 1e-5 * sqrt(squares) + 1e-20, "%s: norm", when);  // added in floats
            double limit = (double)rules.clip, norm = state.record.grad_norm;
            float clip = limit > 0.0 && norm > limit ? (float)(limit / norm) : 1.0f;
            beta1_power *= rules.beta1;
            beta2_power *= rules.beta2;
            for (size_t i = 0; i < want.size(); i++) { model_step(i, g[i], clip * descales[i], number); }
        }
        compare(when);
        return state.record;
    }
    void model_step(size_t i, const std::vector<float>& codes, float factor, uint64_t number) {
        ModelTensor& t = want[i];
        const float c1 = (float)(1.0 / (1.0 - beta1_power)), c2 = (float)(1.0 / (1.0 - beta2_power));
        const float decayed = t.decay ? decay : 0.0f;
        std::vector<float> x[3] = {t.states[0].values(), t.states[1].values(), t.states[2].values()};
        for (size_t k = 0; k < t.spec.size; k++) {
            float g = codes[k] * factor, w = x[0][k];
            float m1 = x[1][k] * rates.beta1 + g * (1.0f - rates.beta1);
            float v1 = x[2][k] * rates.beta2 + (g * g) * (1.0f - rates.beta2);
            x[0][k] = w - ((m1 * c1) / (sqrtf(v1 * c2) + rates.eps) + w * decayed) * rates.lr;
            x[1][k] = m1;
            x[2][k] = v1;
        }
        for (int s = 0; s < 3; s++) {
            Rounding r = s == 0 ? f.master_rounding : f.moment_rounding;
            const int turns[] = {0, 12, 22};  // one draw an element serves its three states
            t.states[s].write(x[s], r == STOCHASTIC, random_key(seed, number, (uint64_t)i << 2), turns[s]);
        }
        t.cast_weight(amax_of(x[0], 0, t.spec.size));
    }
    [[noreturn]] void differs(const char* when, size_t i, const char* what, size_t k, uint32_t got, uint32_t should) const {
        fail_msg("%s/%s/%s by %s, rounding %d %d, %s: %s of tensor %zu (%zu elements), [%zu] is %#x, should be %#x", dtype_names[f.master],
                 dtype_names[f.m], dtype_names[f.v], f.by_block ? "block" : "tensor", (int)f.master_rounding, (int)f.moment_rounding, when, what,
                 i, want[i].spec.size, k, got, should);
        abort();
    }
    // `padded`: how many are compared; those beyond the tensor are 0
    void compare_codes(const char* when, size_t i, const char* what, const void* at, DType t, const std::vector<uint32_t>& codes,
                       size_t padded) const {
        size_t bytes = (size_t)dtype_bytes(t);
        std::vector<char> got = from_device<char>(at, padded * bytes);
        for (size_t k = 0; k < padded; k++) {
            uint32_t code = 0, should = k < codes.size() ? codes[k] : 0;
            memcpy(&code, &got[k * bytes], bytes);
            if (code != should) { differs(when, i, what, k, code, should); }
        }
    }
    void compare_slot(const char* when, size_t i, const char* what, const float* at, const float* should) const {
        std::vector<float> got = from_device<float>(at, 4);
        for (size_t k = 0; k < 4; k++) {
            uint32_t a = float_to_bits(got[k]), b = float_to_bits(should[k]);
            if (a != b) { differs(when, i, what, k, a, b); }
        }
    }
    void compare_states(const char* when) const {
        static const char* const names[] = {"master", "m", "v"};
        for (size_t i = 0; i < want.size(); i++) {
            const Param* p = &table->items[i];
            const OptimizerTensor* states[] = {&p->master, &p->m, &p->v};
            for (int s = 0; s < 3; s++) {
                const ModelState& should = want[i].states[s];
                compare_codes(when, i, names[s], states[s]->data, should.dtype, should.codes, round_up(param_elements(p), PARAM_ALIGNMENT));
                assert_int_equal(states[s]->slot != NULL, is_scaled(should.dtype) && !f.by_block);
                assert_int_equal(states[s]->exponents != NULL, is_scaled(should.dtype) && f.by_block);
                if (states[s]->slot != NULL) { compare_slot(when, i, names[s], states[s]->slot, should.slot); }
                if (states[s]->exponents == NULL) { continue; }
                std::vector<int8_t> got = from_device<int8_t>(states[s]->exponents, should.exponents.size());
                for (size_t b = 0; b < got.size(); b++) {
                    if (got[b] == should.exponents[b]) { continue; }
                    differs(when, i, "exponents", b, (uint32_t)got[b], (uint32_t)should.exponents[b]);
                }
            }
        }
    }
    // What an export gets of the masters
    void compare_master_values(const char* when) const {
        for (size_t i = 0; i < want.size(); i++) {
            std::vector<float> should = want[i].states[0].values(), got(should.size(), NAN);
            optimizer_get_master(got.data(), &table->items[i], NULL);
            for (size_t k = 0; k < got.size(); k++) {
                uint32_t a = float_to_bits(got[k]), b = float_to_bits(should[k]);
                if (a != b && (got[k] == got[k] || should[k] == should[k])) { differs(when, i, "value of the master", k, a, b); }
            }
        }
    }
    void compare(const char* when) const {
        if (!modelled) { return; }
        compare_states(when);
        compare_master_values(when);
        for (size_t i = 0; i < want.size(); i++) {
            const Param* p = &table->items[i];
            compare_codes(when, i, "weight", p->weight, p->dtype, want[i].weight, param_elements(p));
            if (p->dtype == E4M3) { compare_slot(when, i, "slot of the weight", p->slot, want[i].weight_slot); }
        }
    }
    // one number for each element of each tensor: f(tensor, element)
    template <class F> std::vector<std::vector<float>> filled(F value) const {
        std::vector<std::vector<float>> x;
        for (size_t i = 0; i < want.size(); i++) {
            x.push_back(std::vector<float>(want[i].spec.size));
            for (size_t k = 0; k < x[i].size(); k++) { x[i][k] = value(i, k); }
        }
        return x;
    }
    // the bytes of weights and states, what lies between them too
    std::vector<char> everything() const {
        std::vector<char> all = from_device<char>(memory.block[WEIGHTS], memory.bytes[WEIGHTS]);
        for (int i = 0; i < table->count; i++) {
            const Param* p = &table->items[i];
            size_t n = round_up(param_elements(p), PARAM_ALIGNMENT);
            for (const OptimizerTensor* t : {&p->master, &p->m, &p->v}) {
                std::vector<char> x = from_device<char>(t->data, n * (size_t)dtype_bytes(t->dtype));
                if (t->slot != NULL) {
                    std::vector<char> s = from_device<char>(t->slot, 16);
                    x.insert(x.end(), s.begin(), s.end());
                }
                if (t->exponents != NULL) {
                    std::vector<char> e = from_device<char>(t->exponents, ceil_div(n, (size_t)STATE_BLOCK));
                    x.insert(x.end(), e.begin(), e.end());
                }
                all.insert(all.end(), x.begin(), x.end());
            }
        }
        return all;
    }
    // a state as the trainer would read it, decoded here
    std::vector<float> decoded(size_t i, OptimizerTensor Param::* kind) const {
        const OptimizerTensor* t = &(table->items[i].*kind);
        size_t n = want[i].spec.size, bytes = (size_t)dtype_bytes(t->dtype);
        std::vector<char> data = from_device<char>(t->data, n * bytes);
        std::vector<int8_t> exponents(n / 128 + 1, 0);
        if (t->exponents != NULL) { exponents = from_device<int8_t>(t->exponents, (n + 127) / 128); }
        float descale = t->slot != NULL ? from_device<float>(t->slot, 4)[0] : 1.0f;
        std::vector<float> x(n);
        for (size_t k = 0; k < n; k++) {
            uint32_t code = 0;
            memcpy(&code, &data[k * bytes], bytes);
            x[k] = (float)ldexp((double)model_value(t->dtype, code) * (double)descale, -exponents[k / 128]);
        }
        return x;
    }
};

static const DType ALL_FORMATS[] = {FP32, BF16, FP16, E4M3, E5M2}, SECOND_MOMENTS[] = {FP32, BF16, FP16, E4M3, E5M2, UE5M3};

// Gradients of every size, zeros, and sizes so small that their squares are subnormal: v's codes become zeros, whose scale stays.
// Blocks differ; in one of the kinds of step some are zero. An element in 16 is so much smaller than its block that its square is below v's smallest code.
static float awkward_gradient(size_t t, size_t i, size_t k) {
    static const double sizes[] = {1e-3, 1e5, 1e-3, 0.0, 1e-12, 0.1, 1e-3, 1e-20, 0.0, 1e-30};
    size_t kind = t % 10, block = (k / 128 + i) % 5;
    if (sizes[kind] == 0.0 || (kind == 6 && block % 2 == 0)) { return 0.0f; }
    return (float)(normal() * sizes[kind] * ldexp(1.0, 5 * (int)block - (k % 16 == 5 ? 32 : 10)));
}

// `phase`: where in the row of gradients it begins; it also picks clipping, masters of zero and a skipped step
static void follow_the_model(const Formats& f, const std::vector<NarrowSpec>& specs, int steps, size_t phase) {
    Narrow a(f, specs, 1000 + phase);
    a.rules.clip = phase % 3 == 1 ? 0.7f : 0.0f;
    a.set_masters(a.filled([=](size_t i, size_t k) {
        return phase % 4 == 3 && (i == 0 || k / 128 % 2 == 1) ? 0.0f : (float)(0.05 * normal() * ldexp(1.0, 3 * (int)(k / 128 % 3)));
    }));
    for (int t = 0; t < steps; t++) {
        char when[32];
        snprintf(when, sizeof(when), "step %d of %d, phase %zu", t, steps, phase);
        auto g = a.filled([=](size_t i, size_t k) { return awkward_gradient((size_t)t + phase, i, k); });
        a.step(g, t % 7 == 4 && phase % 2 == 1 ? NAN : 1.0f, when);
    }
    a.reset();
    a.compare_states("after a reset");
}

template <class F> static void each_combination(F f) {
    size_t number = 0;
    for (DType master : ALL_FORMATS) {
        for (DType m : ALL_FORMATS) {
            for (DType v : SECOND_MOMENTS) {
                bool scaled = is_scaled(master) || is_scaled(m) || is_scaled(v);
                bool rounded = scaled || master == BF16 || m == BF16 || v == BF16;
                for (int mode = 0; mode < 4; mode++) {
                    bool by_block = mode >= 2, stochastic = mode % 2 == 1;
                    if ((by_block && !scaled) || (stochastic && !rounded)) { continue; }
                    Rounding r = stochastic ? STOCHASTIC : NEAREST;
                    f(Formats{master, m, v, by_block, r, r}, number++);
                }
            }
        }
    }
}

static void two_hundred_steps_in_every_format_are_those_of_the_model(void**) {
    const std::vector<NarrowSpec> small[] = {{{129, E4M3, FP32}, {1, BF16, BF16}, {127, BF16, E4M3}},
                                             {{1, E4M3, E5M2}, {128, BF16, FP32}, {129, E4M3, BF16}},
                                             {{127, E4M3, E4M3}, {260, BF16, E5M2}, {1, E4M3, FP32}}};
    each_combination([&](const Formats& f, size_t number) { follow_the_model(f, small[number % 3], 200, number + number / 4); });
}

static void tensors_of_more_than_a_piece_are_those_of_the_model(void**) {
    const size_t sizes[] = {4095, 4096, 4097, 5000};
    const DType grads[] = {FP32, BF16, E4M3};
    each_combination([&](const Formats& f, size_t number) {
        size_t mixed = number + number / 4;  // number % 4 is mostly the way of scaling and rounding
        follow_the_model(f, {{sizes[mixed % 4], mixed / 2 % 2 == 0 ? E4M3 : BF16, grads[number % 3]}}, 2, number / 4 % 2 == 0 ? 0 : 5);
    });
}

static void mixed_roundings_and_longer_tensors_are_those_of_the_model(void**) {
    const DType picks[][3] = {{FP16, E4M3, FP16}, {FP16, E4M3, E4M3}, {E4M3, E5M2, E4M3}, {FP32, E4M3, E5M2},
                              {BF16, BF16, BF16}, {E5M2, FP32, FP16}, {FP16, E4M3, UE5M3}, {BF16, FP16, UE5M3}};
    const Rounding ways[][2] = {{NEAREST, NEAREST}, {STOCHASTIC, STOCHASTIC}, {STOCHASTIC, NEAREST}, {NEAREST, STOCHASTIC}};
    size_t number = 0;
    for (const DType* p : picks) {
        for (bool by_block : {false, true}) {
            for (const Rounding* r : ways) {
                Formats f = {p[0], p[1], p[2], by_block, r[0], r[1]};
                follow_the_model(f, {{129, E4M3, BF16}, {1, E4M3, FP32}, {130, BF16, E4M3}}, 200, number + number / 4);
                number++;
            }
        }
    }
    for (bool by_block : {false, true}) {
        Formats f = {FP16, E4M3, by_block ? UE5M3 : FP16, by_block, STOCHASTIC, by_block ? STOCHASTIC : NEAREST};
        follow_the_model(f, {{5000, E4M3, E4M3}, {4097, BF16, BF16}}, 30, 0);
    }
}

// FP32 weights are the masters: nothing is written twice, and only the moments have formats.
static void weights_that_are_masters_follow_the_model_too(void**) {
    size_t number = 0;
    for (DType m : ALL_FORMATS) {
        for (DType v : SECOND_MOMENTS) {
            for (bool by_block : {false, true}) {
                Formats f = {FP32, m, v, by_block, STOCHASTIC, STOCHASTIC};
                follow_the_model(f, {{129, FP32, FP32}, {4097, FP32, BF16}}, 3, number++);
            }
        }
    }
}

// ---- states in few bits: what they are good for ----

// |w - w64| / |w64 - w0| after 50 steps of gradients that have a mean and noise; w64: AdamW in float64. Of four blocks each has gradients smaller by
// 2^spread than the one before.
static double distance_from_float64(const Formats& f, int spread) {
    random_state = 99;
    Narrow a(f, {{3000, BF16, FP32}}, 5);
    a.modelled = false;
    a.rates.lr = 1e-3f;
    auto start = a.filled([](size_t, size_t) { return (float)(0.05 * normal()); });
    auto mean = a.filled([](size_t, size_t) { return (float)(1e-3 * normal()); });
    a.set_masters(start);
    std::vector<double> w(start[0].begin(), start[0].end()), m(w.size(), 0.0), v(w.size(), 0.0);
    double b1 = 1.0, b2 = 1.0;
    for (int t = 0; t < 50; t++) {
        auto g = a.filled([&](size_t, size_t k) {
            return (mean[0][k] + (float)(1e-3 * normal())) * (float)ldexp(1.0, -spread * (int)(k / 128 % 4));
        });
        a.step(g, 1.0f, "");
        b1 *= a.rules.beta1;
        b2 *= a.rules.beta2;
        for (size_t k = 0; k < w.size(); k++) {
            double x = (double)g[0][k];
            m[k] = m[k] * a.rules.beta1 + x * (1.0 - a.rules.beta1);
            v[k] = v[k] * a.rules.beta2 + x * x * (1.0 - a.rules.beta2);
            w[k] -= 1e-3 * ((m[k] / (1.0 - b1)) / (sqrt(v[k] / (1.0 - b2)) + 1e-8) + 0.1 * w[k]);
        }
    }
    std::vector<float> got = a.decoded(0, &Param::master);
    double apart = 0.0, moved = 0.0;
    for (size_t k = 0; k < w.size(); k++) {
        apart += ((double)got[k] - w[k]) * ((double)got[k] - w[k]);
        moved += (w[k] - (double)start[0][k]) * (w[k] - (double)start[0][k]);
    }
    return sqrt(apart / moved);
}

static void narrow_states_stay_near_float64_and_fp8_masters_do_not(void**) {
    const struct { DType master, m, v; bool by_block; Rounding rounding; int spread; double least, most; } cases[] = {
        {FP32, FP32, FP32, false, NEAREST, 0, 0.0, 1e-5},
        {FP32, FP32, FP16, false, NEAREST, 0, 0.0, 3e-4},
        {FP16, FP32, FP32, false, NEAREST, 0, 0.0, 5e-3},
        {FP16, E4M3, FP16, false, NEAREST, 0, 0.0, 0.04},
        {FP16, E4M3, FP16, true, NEAREST, 0, 0.0, 0.04},
        {FP16, E4M3, FP16, false, STOCHASTIC, 0, 0.0, 0.04},
        {E4M3, E4M3, FP16, false, NEAREST, 0, 0.5, 1.2},      // stands still
        {E4M3, E4M3, FP16, true, STOCHASTIC, 0, 0.15, 0.5},   // moves, by units that are too large
        {FP16, E4M3, E4M3, true, NEAREST, 4, 0.0, 0.06},      // blocks have the scales that they need
        {FP16, E4M3, E4M3, false, NEAREST, 4, 1.0, 1e9},      // v of the smaller ones is 0
        {FP16, E4M3, UE5M3, true, STOCHASTIC, 0, 0.0, 0.06},
        {FP16, E4M3, UE5M3, true, STOCHASTIC, 4, 0.0, 0.06},
        {FP16, E4M3, UE5M3, false, STOCHASTIC, 2, 0.0, 0.06},
    };
    for (auto c : cases) {
        double d = distance_from_float64(Formats{c.master, c.m, c.v, c.by_block, c.rounding, c.v == UE5M3 ? c.rounding : NEAREST}, c.spread);
        if (d < c.least || d > c.most) {
            fail_msg("%s/%s/%s by %s, spread %d: %.5f from float64", dtype_names[c.master], dtype_names[c.m], dtype_names[c.v],
                     c.by_block ? "block" : "tensor", c.spread, d);
        }
    }
}

// Weight decay alone moves every master by less than a quarter of its unit in a step. To the nearest they all stand still; stochastically each goes
// to one of its neighbours, and the sum of what that adds is 0 within four standard deviations.
static void stochastic_masters_are_unbiased(void**) {
    const struct { DType dtype; float lr; } cases[] = {{BF16, 5e-3f}, {FP16, 6e-4f}, {E4M3, 8e-2f}, {E5M2, 1.6e-1f}};
    for (auto c : cases) {
        for (bool by_block : {false, true}) {
            for (uint64_t seed = 1; seed <= 3; seed++) {
                Narrow a(Formats{c.dtype, FP32, FP32, by_block, STOCHASTIC, NEAREST}, {{20000, BF16, FP32}}, seed);
                Narrow still(Formats{c.dtype, FP32, FP32, by_block, NEAREST, NEAREST}, {{20000, BF16, FP32}}, seed);
                auto start = a.filled([](size_t, size_t k) { return (float)((k % 2 == 0 ? 1.0 : -1.0) * uniform(0.51, 1.74)); });
                auto zeros = a.filled([](size_t, size_t) { return 0.0f; });
                for (Narrow* n : {&a, &still}) {
                    n->modelled = false;
                    n->rates.lr = c.lr;
                    n->set_masters(start);
                }
                std::vector<float> w0 = a.decoded(0, &Param::master);
                a.step(zeros, 1.0f, "");
                still.step(zeros, 1.0f, "");
                assert_true(still.decoded(0, &Param::master) == w0);
                std::vector<float> w1 = a.decoded(0, &Param::master);
                double sum = 0.0, variance = 0.0;
                size_t moved = 0;
                for (size_t k = 0; k < w0.size(); k++) {
                    float exact = w0[k] - (w0[k] * 0.1f) * c.lr;
                    int man = c.dtype == BF16 ? 7 : c.dtype == FP16 ? 10 : c.dtype == E4M3 ? 3 : 2;
                    // below a power of two the unit is half as large
                    int e = ilogb((double)exact);
                    double unit = ldexp(1.0, e - man), low = floor(fabs((double)exact) / unit) * unit, p = (fabs((double)exact) - low) / unit;
                    double error = fabs((double)w1[k]) - fabs((double)exact);
                    assert_true(fabs((double)w1[k]) == low || fabs((double)w1[k]) == low + unit);
                    sum += error;
                    variance += unit * unit * p * (1.0 - p);
                    moved += w1[k] != w0[k];
                }
                if (fabs(sum) > 4.0 * sqrt(variance)) { fail_msg("%s: off by %.2f σ", dtype_names[c.dtype], sum / sqrt(variance)); }
                assert_true(moved > 500 && moved < 15000);
            }
        }
    }
}

// Without a gradient v decays by 5 % a step. Stochastically it does so in the mean; to the nearest of 3 mantissa bits it soon stands still.
static void stochastic_second_moments_decay(void**) {
    const int steps = 60;
    for (DType v : {E4M3, UE5M3}) {
        for (bool by_block : {false, true}) {
            double left[2];
            for (Rounding r : {NEAREST, STOCHASTIC}) {
                Narrow a(Formats{FP32, E4M3, v, by_block, NEAREST, r}, {{20000, BF16, FP32}}, 9);
                a.modelled = false;
                a.set_masters(a.filled([](size_t, size_t) { return 0.0f; }));
                a.step(a.filled([](size_t, size_t k) { return k % 128 == 0 ? 1.0f : (float)uniform(0.1, 1.0); }), 1.0f, "");
                double before = 0.0, after = 0.0;
                for (float x : a.decoded(0, &Param::v)) { before += (double)x; }
                for (int t = 0; t < steps; t++) { a.step(a.filled([](size_t, size_t) { return 0.0f; }), 1.0f, ""); }
                for (float x : a.decoded(0, &Param::v)) { after += (double)x; }
                left[r] = after / before;
            }
            expect_near(left[STOCHASTIC], pow(0.95, steps), 0.03 * pow(0.95, steps), "%s by %s", dtype_names[v], by_block ? "block" : "tensor");
            assert_true(left[NEAREST] > 0.5);
        }
    }
}

// Gradients that are 2^17 to 2^24 times smaller than the block's largest: v is below its smallest code, m may not be. UE5M3 keeps v above 0, so that no
// weight moves by more than a few times lr; where v becomes 0, m is divided by ε.
static void no_weight_leaps_where_v_underflows(void**) {
    for (DType v : {UE5M3, E5M2}) {
        Narrow a(Formats{FP32, E4M3, v, true, NEAREST, STOCHASTIC}, {{12800, BF16, FP32}}, 9);
        a.modelled = false;
        a.decay = 0.0f;
        a.set_masters(a.filled([](size_t, size_t) { return 0.0f; }));
        double farthest = 0.0;
        std::vector<float> before = a.decoded(0, &Param::master);
        for (int t = 0; t < 20; t++) {
            a.step(a.filled([](size_t, size_t k) { return (float)(k % 128 == 0 ? 0.5 : 0.5 * normal() * ldexp(1.0, -17 - (int)(k % 8))); }), 1.0f, "");
            std::vector<float> after = a.decoded(0, &Param::master);
            for (size_t k = 0; k < after.size(); k++) { farthest = fmax(farthest, fabs((double)after[k] - (double)before[k])); }
            before = after;
        }
        double moves = farthest / (double)a.rates.lr;
        if (v == UE5M3 ? moves > 4.0 : moves < 10.0) { fail_msg("%s: a weight moves by %.2f lr", dtype_names[v], moves); }
    }
}

static void random_bits_do_not_depend_on_threads_and_do_on_the_seed(void**) {
    for (bool by_block : {false, true}) {
        std::vector<char> after[3];
        for (int run = 0; run < 3; run++) {
            random_state = 31;
            Formats f = {FP16, E4M3, UE5M3, by_block, STOCHASTIC, STOCHASTIC};
            Narrow a(f, {{20001, E4M3, BF16}, {129, BF16, FP32}}, run == 2 ? 8 : 7);
            a.modelled = false;
            with_threads(run == 1 ? 2 : 1, [&] {
                a.set_masters(a.filled([](size_t, size_t) { return (float)(0.05 * normal()); }));
                for (int t = 0; t < 3; t++) { a.step(a.filled([](size_t, size_t) { return (float)normal(); }), 1.0f, ""); }
            });
            after[run] = a.everything();
        }
        assert_true(after[0] == after[1]);
        assert_true(after[0] != after[2]);
    }
}

// Bit for bit, what lies beyond the tensors' ends too; and the steps after it are those of the model, whose random bits count skipped steps.
static void a_skipped_step_leaves_narrow_states_alone(void**) {
    each_combination([&](const Formats& f, size_t number) {
        if (number % 3 != 0) { return; }
        Narrow a(f, {{129, E4M3, FP32}, {200, BF16, BF16}}, number);
        a.set_masters(a.filled([](size_t, size_t) { return (float)(0.05 * normal()); }));
        for (int t = 0; t < 4; t++) {
            auto g = a.filled([](size_t, size_t) { return (float)normal(); }), bad = g;
            a.step(g, 1.0f, "before");
            std::vector<char> before = a.everything();
            bad[(size_t)t % 2][100] = t < 2 ? NAN : INFINITY;
            assert_int_equal(a.step(g, t % 2 == 0 ? NAN : -INFINITY, "loss").skipped, SKIP_NON_FINITE_LOSS);
            assert_true(a.everything() == before);
            assert_int_equal(a.step(bad, 1.0f, "gradient").skipped, SKIP_NON_FINITE_NORM);
            assert_true(a.everything() == before);
        }
    });
}

// Also over states that are there already: neither the old codes nor the old scales matter.
static void set_masters_are_the_nearest_codes_and_weights_follow(void**) {
    for (DType master : ALL_FORMATS) {
        for (bool by_block : {false, true}) {
            Narrow a(Formats{master, FP32, E4M3, by_block, STOCHASTIC, STOCHASTIC},
                     {{1, E4M3, FP32}, {127, BF16, FP32}, {128, E4M3, FP32}, {129, E4M3, FP32}, {4097, BF16, FP32}, {5000, E4M3, FP32}}, 3);
            for (double size : {1.0, 1e-9, 0.0, 1e-40, 1e30, 0.02}) {
                a.set_masters(a.filled([=](size_t i, size_t k) {
                    return k / 128 % 3 == 2 ? 0.0f : (float)(normal() * size * (double)(i + 1) * (double)(k / 128 + 1));
                }));
                a.set_masters(a.filled([=](size_t, size_t k) {  // with ties, where the size is a power of two
                    return (float)(size * (k == 0 ? 1.75 : 1.0 + ldexp((double)(k % 257), -8)));
                }));
                if (size > 0.5) { a.step(a.filled([](size_t, size_t) { return (float)normal(); }), 1.0f, "a step after"); }
            }
        }
    }
}

// A tensor or block without a value other than 0 says nothing of a scale.
static void a_state_of_zeros_keeps_its_scale(void**) {
    for (DType t : {FP16, E4M3, E5M2}) {
        for (bool by_block : {false, true}) {
            Narrow a(Formats{t, t, t == E5M2 ? UE5M3 : t, by_block, STOCHASTIC, NEAREST}, {{200, BF16, FP32}}, 3);
            auto zeros = a.filled([](size_t, size_t) { return 0.0f; });
            a.set_masters(zeros);
            OptimizerTensor* states[] = {&a.table->items[0].master, &a.table->items[0].m, &a.table->items[0].v};
            for (int s = 0; s < 3; s++) {
                ModelState* want = &a.want[0].states[s];
                const float slot[] = {0x1p-9f, 0x1p9f, 0x1p3f, 0.0f};
                const int8_t exponents[] = {-126, (int8_t)(100 + s)};
                if (by_block) { copy_to_device(states[s]->exponents, exponents, 2, NULL); }
                else { copy_to_device(states[s]->slot, slot, 16, NULL); }
                want->exponents = {exponents[0], exponents[1]};
                memcpy(want->slot, slot, sizeof(slot));
            }
            a.step(zeros, 1.0f, "zeros");
            a.step(zeros, 1.0f, "zeros again");
            auto one = zeros;
            one[0][130] = 3e-3f;
            a.step(one, 1.0f, "one value in the second block");
        }
    }
}

// By hand: a: 163,713 elements, kept as 163,840 (1280 blocks, 40 pieces); b: 10 as 128 (one block, 1 piece). Together 163,968 and 1281 exponents.
static void memory_of_narrow_states_is_as_documented(void**) {
    for (DType v : {FP16, UE5M3}) {
        for (bool by_block : {false, true}) {
            for (bool masters : {false, true}) {
                ParamTable* table = new ParamTable();
                for (int64_t rows : {3, 1}) {
                    Param* p = param_add(table, "p", 0, rows, rows == 3 ? 54571 : 10, MATRIX, masters ? FP32 : E4M3);
                    p->master.dtype = masters ? FP32 : FP16;
                    p->m.dtype = E4M3;
                    p->v.dtype = v;
                }
                Memory m = {};
                Optimizer o = {};
                o.config.by_block = by_block;
                optimizer_allocate(&o, table, masters, &m);
                const size_t scales = by_block ? 1536 : 256, in_16_bits = 327936, in_8_bits = 164096;  // each a multiple of 256
                size_t want = round_up(sizeof(OptimizerState), (size_t)256) + 6 * 256 + in_8_bits + (v == FP16 ? in_16_bits : in_8_bits) + 2 * scales;
                want += masters ? 0 : in_16_bits + scales;
                assert_int_equal(m.bytes[OPTIMIZER], want);
                assert_int_equal(memory_total(&m), want + 512);  // sums of pieces
                delete table;
            }
        }
    }
}

// ---- weights scaled by block ----

// One FP8 matrix whose blocks have scales, with masters of some format
struct BlockModel {
    ParamTable table = {};
    Memory memory = {};
    Optimizer o = {};
    float* slots;
    LossShare* loss;
    Param* p;
    int64_t tall, wide, pitch, turned_pitch;

    BlockModel(int64_t rows, int64_t cols, DType master, bool by_block) {
        o.config = OptimizerConfig{by_block, NEAREST, NEAREST, 1, true};
        p = param_add(&table, "w", 0, rows, cols, MATRIX, E4M3);
        p->master.dtype = master;
        p->m.dtype = p->v.dtype = FP32;
        p->grad_dtype = FP32;
        tall = (rows + 127) / 128;
        wide = (cols + 127) / 128;
        pitch = (wide + 3) / 4 * 4;
        turned_pitch = (tall + 3) / 4 * 4;
        allocate();
        memory_commit(&memory);
        for (MemoryCategory c : {WEIGHTS, OPTIMIZER}) {  // nothing may rely on zeros that it did not write
            std::vector<char> junk(memory.bytes[c], (char)0x9d);
            copy_to_device(memory.block[c], junk.data(), junk.size(), NULL);
        }
        allocate();
        memory_check(&memory);
        optimizer_reset(&o, &table, NULL);
        run_rows(ResetSlots{p->slot}, 1, NULL);
        run_rows(ResetSlots{slots}, 1, NULL);
    }
    BlockModel(const BlockModel&) = delete;
    BlockModel& operator=(const BlockModel&) = delete;
    ~BlockModel() {
        finish();
        memory_release(&memory);
    }
    void allocate() {
        p->weight = memory_take(&memory, WEIGHTS, param_elements(p), 1);
        p->slot = memory_take<float>(&memory, WEIGHTS, 4);
        optimizer_allocate(&o, &table, false, &memory);
        p->grad = memory_take<float>(&memory, GRADIENTS, param_elements(p));
        p->grad_slot = slots = memory_take<float>(&memory, GRADIENTS, 4);
        loss = memory_take<LossShare>(&memory, GRADIENTS, 1);
    }
    void step(const std::vector<float>& g, double mean_loss) {
        LossShare share = {mean_loss, (double)TOKENS};
        copy_to_device(p->grad, g.data(), g.size() * sizeof(float), NULL);
        copy_to_device(loss, &share, sizeof(share), NULL);
        optimizer_decide(&o, &table, slots, loss, TOKENS, DecisionRules{0.9, 0.95, 0.0f, 0.0f, 0.0f}, NULL);
        optimizer_update(&o, &table, AdamRates{1e-2f, 0.9f, 0.95f, 1e-8f, 0.0f}, 0.1f, NULL);
        finish();
    }
    std::vector<float> masters() const {
        std::vector<float> x(param_elements(p));
        optimizer_get_master(x.data(), p, NULL);
        return x;
    }
    std::vector<uint8_t> codes() const { return from_device<uint8_t>(p->weight, param_elements(p)); }
    std::vector<float> descales() const { return from_device<float>(p->block_descales, (size_t)(tall * pitch)); }
    std::vector<float> turned() const { return from_device<float>(p->turned_descales, (size_t)(wide * turned_pitch)); }
    // Codes and both layouts of the descales are what the masters give
    void check(const char* when) const {
        std::vector<float> x = masters(), d = descales(), t = turned();
        std::vector<uint8_t> got = codes();
        for (int64_t i = 0; i < tall * pitch; i++) { assert_true(i % pitch < wide || d[(size_t)i] == 1.0f); }
        for (int64_t i = 0; i < wide * turned_pitch; i++) { assert_true(i % turned_pitch < tall || t[(size_t)i] == 1.0f); }
        for (int64_t r = 0; r < tall; r++) {
            for (int64_t c = 0; c < wide; c++) {
                float descale = d[(size_t)(r * pitch + c)], top = 0.0f;
                assert_true(t[(size_t)(c * turned_pitch + r)] == descale);
                for (int64_t i = 128 * r; i < min_of(128 * r + 128, p->rows); i++) {
                    for (int64_t k = 128 * c; k < min_of(128 * c + 128, p->cols); k++) {
                        float v = x[(size_t)(i * p->cols + k)];
                        e4m3 want;
                        from_float(want, v / descale);
                        uint8_t code = got[(size_t)(i * p->cols + k)];
                        if (code != want.bits) { fail_msg("%s: (%d, %d) is 0x%x, not 0x%x", when, (int)i, (int)k, code, want.bits); }
                        top = max_of(top, fabsf(v));
                    }
                }
                bool right = top == 0.0f ? descale == 1.0f : top / descale <= 448.0f && top / descale > 224.0f;
                if (!right) { fail_msg("%s: block (%d, %d) of amax %g has descale %g", when, (int)r, (int)c, (double)top, (double)descale); }
            }
        }
    }
};

static void blocks_of_weights_have_scales_of_their_own(void**) {
    const int sizes[][2] = {{1, 1}, {130, 300}, {256, 128}, {3, 257}, {129, 640}, {257, 48}};
    const struct { DType master; bool by_block; } formats[] = {{FP32, false}, {FP16, false}, {FP16, true}, {BF16, false}};
    for (auto& size : sizes) {
        for (auto& f : formats) {
            BlockModel m(size[0], size[1], f.master, f.by_block);
            size_t n = param_elements(m.p);
            std::vector<float> x(n), g(n);
            for (size_t i = 0; i < n; i++) {  // a block's numbers are of its own size, one block's are zero
                int64_t r = (int64_t)i / size[1] / 128, c = (int64_t)i % size[1] / 128;
                x[i] = r == 1 && c == 1 ? 0.0f : (float)(normal() * ldexp(1.0, -3 * (int)r - 2 * (int)c));
                g[i] = (float)normal();
            }
            optimizer_set_master(m.p, x.data(), NULL, NULL);
            optimizer_cast_weights(&m.o, &m.table, NULL);
            finish();
            m.check("set");
            std::vector<uint8_t> before = m.codes();
            m.step(g, 1.0);
            m.check("after a step");
            std::vector<uint8_t> after = m.codes();
            std::vector<float> scales = m.descales();
            assert_true(n < 100 || after != before);
            m.step(g, NAN);
            assert_true(m.codes() == after && m.descales() == scales);
        }
    }
}

// Ranks that keep stretches of a matrix find together what one finds; stretches begin at multiples of 128, rows need not
static void stretches_of_a_matrix_give_the_amaxes_of_its_blocks(void**) {
    const int64_t sizes[][2] = {{300, 384}, {260, 200}, {150, 48}};
    for (auto& size : sizes) {
        size_t n = (size_t)(size[0] * size[1]), blocks = (size_t)(((size[0] + 127) / 128) * ((size[1] + 127) / 128)), cut = round_up(n * 2 / 5, (size_t)128);
        float* x = (float*)device_alloc(n * sizeof(float));
        uint32_t *whole = (uint32_t*)device_alloc(blocks * 4), *parts = (uint32_t*)device_alloc(blocks * 4);
        std::vector<float> values(n);
        for (float& v : values) { v = (float)normal(); }
        copy_to_device(x, values.data(), n * sizeof(float), NULL);
        device_zero(whole, blocks * 4, NULL);
        device_zero(parts, blocks * 4, NULL);
        auto find = [&](uint32_t* amaxes, size_t first, size_t count) {
            StateView view = {FP32, NEAREST, (char*)(x + first), NULL, NULL};
            run_rows(BlockAmaxes{amaxes, view, WeightBlocks{size[0], size[1], (int64_t)first}, NULL, count}, pieces_of(count), NULL);
        };
        find(whole, 0, n);
        find(parts, 0, cut);
        find(parts, cut, n - cut);
        finish();
        std::vector<uint32_t> want(blocks, 0);
        for (size_t i = 0; i < n; i++) {
            size_t b = i / (size_t)size[1] / 128 * (size_t)((size[1] + 127) / 128) + i % (size_t)size[1] / 128;
            want[b] = max_of(want[b], magnitude_bits(values[i]));
        }
        assert_true(from_device<uint32_t>(whole, blocks) == want);
        assert_true(from_device<uint32_t>(parts, blocks) == want);
        for (void* p : {(void*)x, (void*)whole, (void*)parts}) { device_free(p); }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_of_weights_have_scales_of_their_own),
        cmocka_unit_test(stretches_of_a_matrix_give_the_amaxes_of_its_blocks),
        cmocka_unit_test(five_steps_match_the_golden_file),
        cmocka_unit_test(updates_match_float64),
        cmocka_unit_test(a_step_writes_the_forward_passs_weights),
        cmocka_unit_test(a_tensor_of_zeros_keeps_its_scale),
        cmocka_unit_test(norm_and_update_do_not_depend_on_threads),
        cmocka_unit_test(norms_of_zero_and_of_very_small_gradients),
        cmocka_unit_test(clipping_starts_beyond_its_limit),
        cmocka_unit_test(non_finite_steps_leave_no_trace),
        cmocka_unit_test(a_step_in_which_nothing_counts_leaves_no_trace),
        cmocka_unit_test(means_are_over_the_tokens_that_count),
        cmocka_unit_test(a_skipped_step_writes_no_weight),
        cmocka_unit_test(training_goes_on_as_if_a_skipped_step_had_not_been),
        cmocka_unit_test(outliers_are_skipped_by_their_z_score),
        cmocka_unit_test(a_limit_of_zero_skips_no_outlier),
        cmocka_unit_test(a_window_takes_no_value_that_is_not_finite),
        cmocka_unit_test(values_that_do_not_vary_are_no_outliers),
        cmocka_unit_test(gradients_in_bf16_e4m3_and_e5m2_are_read_as_they_are),
        cmocka_unit_test(memory_is_as_documented),
#ifndef SIMT  // hundreds of steps: emulation is too slow for them
        cmocka_unit_test(two_hundred_steps_in_every_format_are_those_of_the_model),
#endif
        cmocka_unit_test(tensors_of_more_than_a_piece_are_those_of_the_model),
        cmocka_unit_test(weights_that_are_masters_follow_the_model_too),
#ifndef SIMT
        cmocka_unit_test(mixed_roundings_and_longer_tensors_are_those_of_the_model),
        cmocka_unit_test(narrow_states_stay_near_float64_and_fp8_masters_do_not),
        cmocka_unit_test(stochastic_masters_are_unbiased),
        cmocka_unit_test(stochastic_second_moments_decay),
        cmocka_unit_test(no_weight_leaps_where_v_underflows),
#endif
        cmocka_unit_test(random_bits_do_not_depend_on_threads_and_do_on_the_seed),
        cmocka_unit_test(a_skipped_step_leaves_narrow_states_alone),
        cmocka_unit_test(set_masters_are_the_nearest_codes_and_weights_follow),
        cmocka_unit_test(a_state_of_zeros_keeps_its_scale),
        cmocka_unit_test(memory_of_narrow_states_is_as_documented),
    };
    return RUN_TESTS(tests);
}
