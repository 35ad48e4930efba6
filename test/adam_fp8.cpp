// Tests of adam_fp8.cuh: five steps of an independent AdamW (golden file), the update of each tensor against float64, the weights that a
// step writes, the norm, and the decision: what is skipped leaves no trace, and the z-scores are those of an account kept here.
#include "check.h"
#include <deque>
#include "../adam_fp8.cuh"
#include "golden/golden.h"

// ---- a model of a few tensors ----

struct Spec { const char* name; int64_t rows, cols; DType dtype; };

struct Model {
    ParamTable* table;
    Memory memory;
    Optimizer o;
    float* flat;         // FP32: the weights, which are the masters
    float* grads;
    float* slots;        // of the gradients: (tensors, 4), scale 1
    float* loss;
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
        if (fp32) { o.master = flat; }
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
        loss = memory_take<float>(&memory, GRADIENTS, 1);
    }
    size_t n() const { return table->elements; }
    void set_master(const std::vector<float>& x) {
        copy_to_device(o.master, x.data(), n() * sizeof(float), NULL);
        optimizer_cast_weights(&o, table, NULL);
        finish();
    }
    StepRecord step(const std::vector<float>& g, float mean_loss) {
        copy_to_device(grads, g.data(), n() * sizeof(float), NULL);
        copy_to_device(loss, &mean_loss, sizeof(float), NULL);
        optimizer_decide(&o, table, slots, loss, rules, NULL);
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
    add(m.o.master, m.n() * sizeof(float));
    add(m.o.m, m.n() * sizeof(float));
    add(m.o.v, m.n() * sizeof(float));
    add(m.o.weight_amax, sizeof(uint32_t));
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
        std::vector<float> got = from_device<float>(m.o.master, n), gm = from_device<float>(m.o.m, n), gv = from_device<float>(m.o.v, n);
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
        std::vector<float> w0 = from_device<float>(m.o.master, m.n()), m0 = from_device<float>(m.o.m, m.n()),
                           v0 = from_device<float>(m.o.v, m.n());
        StepRecord r = m.step(g, 2.0f);
        std::vector<float> w1 = from_device<float>(m.o.master, m.n()), m1 = from_device<float>(m.o.m, m.n()),
                           v1 = from_device<float>(m.o.v, m.n());
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
        std::vector<float> master = from_device<float>(m.o.master + p->offset, n);
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
    assert_int_equal(from_device<uint32_t>(m.o.weight_amax, 1)[0], 0);
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
    for (float x : from_device<float>(m.o.master, m.n())) { assert_true(isfinite(x)); }
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
        std::vector<float> first = from_device<float>(m.o.m, 4);
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
    std::vector<float> m0 = from_device<float>(narrow.o.m, narrow.n()), m1;
    narrow.step(start, 1.0f);
    m1 = from_device<float>(narrow.o.m, narrow.n());
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
        assert_int_equal(memory_total(&m), want);
        delete table;
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(five_steps_match_the_golden_file),
        cmocka_unit_test(updates_match_float64),
        cmocka_unit_test(a_step_writes_the_forward_passs_weights),
        cmocka_unit_test(a_tensor_of_zeros_keeps_its_scale),
        cmocka_unit_test(norm_and_update_do_not_depend_on_threads),
        cmocka_unit_test(norms_of_zero_and_of_very_small_gradients),
        cmocka_unit_test(clipping_starts_beyond_its_limit),
        cmocka_unit_test(non_finite_steps_leave_no_trace),
        cmocka_unit_test(a_skipped_step_writes_no_weight),
        cmocka_unit_test(training_goes_on_as_if_a_skipped_step_had_not_been),
        cmocka_unit_test(outliers_are_skipped_by_their_z_score),
        cmocka_unit_test(a_limit_of_zero_skips_no_outlier),
        cmocka_unit_test(a_window_takes_no_value_that_is_not_finite),
        cmocka_unit_test(values_that_do_not_vary_are_no_outliers),
        cmocka_unit_test(gradients_in_bf16_e4m3_and_e5m2_are_read_as_they_are),
        cmocka_unit_test(memory_is_as_documented),
    };
    return RUN_TESTS(tests);
}
