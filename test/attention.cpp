// Tests of core/attention.cuh: forward and backward against naive causal attention in float64, over block bounds, with and without rotary
// positions; causality to the bit; what a NaN reaches; and that the planned workspace is enough.
//
// Tolerances. Each result is a sum; beside the reference its sum of magnitudes is kept. FP32 may err by 128·2⁻²⁴ of that (head sizes and
// T up to 64 and 600, with the exponential's argument among the inputs of the error). With BF16 the probabilities and dS are rounded once
// to 8 significant bits before they are multiplied, which costs 2⁻⁸ of the sum of magnitudes, and so does the rounding of the result.
// Rotated queries and keys are rounded in the reference too: they are inputs of the products.
#include "check.h"
#include "../core/attention.cuh"

// ---- naive attention in float64 ----

struct Shape { int B, T, heads, hs; bool rope, causal = true; };

struct Reference {
    std::vector<double> out, out_size, lse, dqkv, dqkv_size;  // (B, T, C), (B, heads, T), (B, T, 3C)
};

static void rotate64(double* x, int t, int hs, bool back) {
    for (int j = 0; j < hs / 2; j++) {
        double angle = (back ? -1.0 : 1.0) * t * pow(10000.0, -2.0 * j / hs), a = x[j], b = x[j + hs / 2];
        x[j] = a * cos(angle) - b * sin(angle);
        x[j + hs / 2] = b * cos(angle) + a * sin(angle);
    }
}

// T: the activations' type. dout: NULL = forward only
template <class A> static Reference reference(const Shape& s, const A* qkv, const A* dout) {
    int T = s.T, hs = s.hs, C = s.heads * hs;
    Reference r;
    r.out.assign((size_t)s.B * T * C, 0.0);
    r.out_size = r.out;
    r.lse.assign((size_t)s.B * s.heads * T, 0.0);
    r.dqkv.assign((size_t)s.B * T * 3 * C, 0.0);
    r.dqkv_size = r.dqkv;
    double factor = 1.0 / sqrt((double)hs);
    size_t n = (size_t)T * hs;
    std::vector<double> q(n), k(n), v(n), d(n), p(T), dp(T), dp_size(T), dq(n), dk(n), dv(n), dq_size(n), dk_size(n), dv_size(n);
    for (int b = 0; b < s.B; b++) {
        for (int h = 0; h < s.heads; h++) {
            auto at = [&](int t, int part) { return ((size_t)b * T + t) * 3 * C + (size_t)part * C + (size_t)h * hs; };
            for (int t = 0; t < T; t++) {
                for (int i = 0; i < hs; i++) {
                    q[t * hs + i] = (double)to_float(qkv[at(t, 0) + i]);
                    k[t * hs + i] = (double)to_float(qkv[at(t, 1) + i]);
                    v[t * hs + i] = (double)to_float(qkv[at(t, 2) + i]);
                    if (dout != NULL) { d[t * hs + i] = (double)to_float(dout[((size_t)b * T + t) * C + (size_t)h * hs + i]); }
                }
                if (!s.rope) { continue; }
                rotate64(&q[t * hs], t, hs, false);
                rotate64(&k[t * hs], t, hs, false);
                for (int i = 0; i < hs; i++) {
                    q[t * hs + i] = (double)round_to<A>((float)q[t * hs + i]);
                    k[t * hs + i] = (double)round_to<A>((float)k[t * hs + i]);
                }
            }
            for (std::vector<double>* x : {&dq, &dk, &dv, &dq_size, &dk_size, &dv_size}) { x->assign(n, 0.0); }
            for (int t = 0; t < T; t++) {
                int seen = s.causal ? t + 1 : T;
                double top = -INFINITY, sum = 0, total = 0, total_size = 0;
                for (int j = 0; j < seen; j++) {
                    double z = 0;
                    for (int i = 0; i < hs; i++) { z += q[t * hs + i] * k[j * hs + i]; }
                    p[j] = z * factor;
                    top = fmax(top, p[j]);
                }
                for (int j = 0; j < seen; j++) { p[j] = exp(p[j] - top); sum += p[j]; }
                r.lse[((size_t)b * s.heads + h) * T + t] = top + log(sum);
                size_t o = ((size_t)b * T + t) * C + (size_t)h * hs;
                for (int j = 0; j < seen; j++) {
                    p[j] /= sum;
                    dp[j] = dp_size[j] = 0;
                    for (int i = 0; i < hs; i++) {
                        r.out[o + i] += p[j] * v[j * hs + i];
                        r.out_size[o + i] += p[j] * fabs(v[j * hs + i]);
                        dp[j] += d[t * hs + i] * v[j * hs + i];
                        dp_size[j] += fabs(d[t * hs + i] * v[j * hs + i]);
                        dv[j * hs + i] += p[j] * d[t * hs + i];
                        dv_size[j * hs + i] += p[j] * fabs(d[t * hs + i]);
                    }
                    total += p[j] * dp[j];
                    total_size += p[j] * dp_size[j];
                }
                for (int j = 0; j < seen; j++) {
                    double ds = p[j] * (dp[j] - total) * factor, ds_size = p[j] * (dp_size[j] + total_size) * factor;
                    for (int i = 0; i < hs; i++) {
                        dq[t * hs + i] += ds * k[j * hs + i];
                        dk[j * hs + i] += ds * q[t * hs + i];
                        dq_size[t * hs + i] += ds_size * fabs(k[j * hs + i]);
                        dk_size[j * hs + i] += ds_size * fabs(q[t * hs + i]);
                    }
                }
            }
            for (int t = 0; t < T; t++) {
                if (s.rope) {
                    rotate64(&dq[t * hs], t, hs, true);
                    rotate64(&dk[t * hs], t, hs, true);
                    for (int i = 0; i < hs / 2; i++) {  // each element comes of both of its pair
                        int a = t * hs + i, c = a + hs / 2;
                        dq_size[a] = dq_size[c] = dq_size[a] + dq_size[c];
                        dk_size[a] = dk_size[c] = dk_size[a] + dk_size[c];
                    }
                }
                for (int i = 0; i < hs; i++) {
                    r.dqkv[at(t, 0) + i] = dq[t * hs + i]; r.dqkv_size[at(t, 0) + i] = dq_size[t * hs + i];
                    r.dqkv[at(t, 1) + i] = dk[t * hs + i]; r.dqkv_size[at(t, 1) + i] = dk_size[t * hs + i];
                    r.dqkv[at(t, 2) + i] = dv[t * hs + i]; r.dqkv_size[at(t, 2) + i] = dv_size[t * hs + i];
                }
            }
        }
    }
    return r;
}

// ---- ours, from plan to result, with workspace of exactly the planned size full of NaN ----

template <class A> struct Run {
    Shape s;
    Attention attention;
    Memory memory;
    Matmul mm;
    Array<A> qkv, out, dout, dqkv;
    Array<float> lse, rotary;
    char* workspace;

    explicit Run(const Shape& shape, bool flash = false)
        : s(shape), qkv((size_t)s.B * s.T * 3 * s.heads * s.hs), out((size_t)s.B * s.T * s.heads * s.hs), dout(out.n), dqkv(qkv.n),
          lse((size_t)s.B * s.heads * s.T), rotary((size_t)s.T * s.hs) {
        attention = Attention{};
        attention.act = DTypeOf<A>::value;
        attention.flash = flash;
        attention.B = s.B;
        attention.T = s.T;
        attention.heads = s.heads;
        attention.head_size = s.hs;
        attention.rope = s.rope;
        memory = Memory{};
        attention_allocate(&attention, &memory);
        memory_commit(&memory);
        attention_allocate(&attention, &memory);
        memory_check(&memory);
#ifndef USE_CUDA
        memset(memory.block[WORKSPACE], 0xff, memory.bytes[WORKSPACE]);
#endif
        if (s.rope) { rotary_table(rotary, s.T, s.hs); attention.rotary = rotary; }
        matmul_create(&mm);
        workspace = NULL;
        fill_normal(qkv, 0.0, 1.0);
        fill_normal(dout, 0.0, 1.0);
    }
    ~Run() {
        finish();
        matmul_destroy(&mm);
        if (workspace != NULL) { device_free(workspace); }
        memory_release(&memory);
    }
    void plan(bool backward) {
        attention_plan(&attention, &mm, backward);
        if (workspace != NULL) { device_free(workspace); }
        workspace = (char*)device_alloc(mm.planned);
#ifndef USE_CUDA
        memset(workspace, 0xff, mm.planned);
#endif
        matmul_set_workspace(&mm, workspace, mm.planned);
    }
    void forward() {
#ifdef GPU_FORM
        if (!s.causal) { flash_forward((bf16*)out.p, lse, (const bf16*)qkv.p, false, s.B, s.T, s.heads, s.hs, NULL); } else
#endif
        attention_forward(&attention, &mm, out, lse, qkv, s.B, NULL);
        finish();
    }
    void backward() {
#ifdef GPU_FORM
        if (!s.causal) {
            flash_backward((bf16*)dqkv.p, attention.delta, (const bf16*)dout.p, (const bf16*)out.p, (const bf16*)qkv.p, lse, NULL, false, s.B, s.T, s.heads, s.hs, NULL);
        } else
#endif
        attention_backward(&attention, &mm, dqkv, dout, out, qkv, lse, s.B, NULL);
        finish();
    }
};

// fill(run): other inputs than normal ones. score: the size of the scores over √hs, whose error is that of the exponentials
template <class A, class F> static void check_attention(const Shape& s, bool flash, double score, F fill) {
    char text[128];
    snprintf(text, sizeof(text), "%s%s, B %d, T %d, %d heads of %d%s%s", flash ? "flash, " : "", dtype_names[DTypeOf<A>::value], s.B, s.T, s.heads, s.hs,
             s.rope ? ", rotary" : "", s.causal ? "" : ", not causal");
    Run<A> run(s, flash);
    fill(run);
    Reference r = reference<A>(s, run.qkv, run.dout);
    run.plan(false);
    run.forward();
    run.plan(true);
    run.backward();
    double u = (128.0 + score) * 0x1p-24, product = u + rounding_of<A>(), round = rounding_of<A>();
    // a rotated number that lies between two BF16 ones may be rounded the other way than in the reference
    double lse_allowed = s.rope ? 64.0 * 0x1p-24 + 0x1p-6 * round * sqrt((double)s.hs) : (64.0 + score) * 0x1p-24;
    for (size_t i = 0; i < r.out.size(); i++) {
        double allowed = product * r.out_size[i];
        expect_near((double)to_float(run.out[i]), r.out[i], allowed + (fabs(r.out[i]) + allowed) * round, "%s: out[%zu]", text, i);
    }
    for (size_t i = 0; i < r.lse.size(); i++) { expect_near((double)run.lse[i], r.lse[i], lse_allowed, "%s: lse[%zu]", text, i); }
    for (size_t i = 0; i < r.dqkv.size(); i++) {
        double allowed = product * r.dqkv_size[i] + (score > 0.0 ? 0x1p-100 : 0.0);  // probabilities that no float can hold are 0
        expect_near((double)to_float(run.dqkv[i]), r.dqkv[i], allowed + (fabs(r.dqkv[i]) + allowed) * round, "%s: dqkv[%zu]", text, i);
    }
}

template <class A> static void check_attention(const Shape& s, bool flash = false) {
    check_attention<A>(s, flash, 0.0, [](Run<A>&) {});
}

static void small_sequences_match_float64(void**) {
    for (int T : {1, 2, 5, 64}) {
        for (int heads : {1, 3}) {
            for (int hs : {2, 8, 64}) {
                for (bool rope : {false, true}) {
                    check_attention<float>(Shape{2, T, heads, hs, rope});
                    check_attention<bf16>(Shape{2, T, heads, hs, rope});
                }
            }
        }
    }
}

// Tokens one by one after those that were read at once: each attends as it would have among them, in every one of the rows that are wanted
template <class A> static void check_tokens(const Shape& s, int given, int rows) {
    Run<A> run(s);
    size_t C = (size_t)s.heads * (size_t)s.hs;
    Reference r = reference<A>(s, run.qkv, NULL);
    Array<A> x(3 * C), out((size_t)rows * C);
    std::vector<A> original(&run.qkv[0], &run.qkv[0] + run.qkv.n);
    attention_keep(&run.attention, run.qkv, NULL);
    finish();
    for (int t = given; t < s.T; t++) {
        memset((void*)&run.qkv[(size_t)t * 3 * C], 0xff, (size_t)(s.T - t) * 3 * C * sizeof(A));  // what comes later is not read
        memcpy((void*)&x[0], &original[(size_t)t * 3 * C], 3 * C * sizeof(A));
        attention_of_token(&run.attention, out, run.qkv, x, t, rows, NULL);
        finish();
        for (size_t i = 0; i < (size_t)rows * C; i++) {
            size_t at = (size_t)t * C + i % C;
            double allowed = (128.0 * 0x1p-24 + rounding_of<A>()) * r.out_size[at];
            expect_near((double)to_float(out[i]), r.out[at], allowed + (fabs(r.out[at]) + allowed) * rounding_of<A>(), "T %d, %d heads of %d, token %d: out[%zu]", s.T, s.heads,
                        s.hs, t, i);
        }
    }
}

static void tokens_one_by_one_match_float64(void**) {
    for (int T : {1, 2, 40}) {
        for (int heads : {1, 3}) {
            for (int hs : {2, 6, 8, 64}) {
                for (bool rope : {false, true}) {
                    for (int rows : {1, 16}) {
                        check_tokens<float>(Shape{1, T, heads, hs, rope}, T / 2, rows);
                        check_tokens<bf16>(Shape{1, T, heads, hs, rope}, T / 2, rows);
                    }
                }
            }
        }
    }
    check_tokens<bf16>(Shape{1, 600, 2, 16, true}, 590, 16);  // more keys than threads
    check_tokens<float>(Shape{1, 600, 2, 16, false}, 590, 1);
}

// Blocks are of 256 queries: one and one query, one and a part, two and a part, just one
static void several_blocks_match_float64(void**) {
    const Shape shapes[] = {{1, 256, 1, 8, false}, {1, 257, 3, 8, true}, {1, 257, 1, 64, false}, {2, 300, 3, 8, false},
                            {1, 300, 1, 2, true},  {1, 512, 1, 8, true}, {1, 600, 3, 8, true},   {1, 600, 1, 64, false}};
    for (const Shape& s : shapes) {
        with_threads(s.T == 300 ? 2 : 1, [&] {
            check_attention<float>(s);
            check_attention<bf16>(s);
        });
    }
}

#ifdef GPU_FORM
static void needs_flash(void) {
#ifdef USE_CUDA
    if (device_capability() < 80 || !flash_is_built()) { skip(); }
#endif
}
const int flash_sizes[] = {32, 64, 96, 128};
enum { PLAIN, ROTARY, NOT_CAUSAL, FLASH_FORMS };

// Around the bounds of a warp's rows and of tiles of 32, 64 and 128
static void flash_attention_matches_float64(void**) {
    needs_flash();
#ifdef SIMT
    const int lengths[] = {1, 2, 15, 16, 17, 63, 64, 65, 100, 130};
#else
    const int lengths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 130, 200, 257, 385};
#endif
    for (int hs : flash_sizes) {
        for (int T : lengths) {
            for (int form = 0; form < FLASH_FORMS; form++) {
                int heads = T < 64 ? T % 3 + 1 : 1;
#ifdef SIMT
                if (form != (T + hs / 32) % FLASH_FORMS) { continue; }  // emulation is slow
#endif
                check_attention<bf16>(Shape{T < 64 ? 2 : 1, T, heads, hs, form == ROTARY, form != NOT_CAUSAL}, true);
            }
        }
    }
}
static void flash_attention_gives_the_same_bits_again(void**) {
    needs_flash();
#ifdef SIMT
    const Shape shapes[] = {{1, 70, 2, 32, false}};
#else
    const Shape shapes[] = {{2, 500, 3, 32, false}, {2, 500, 3, 64, false}, {2, 500, 3, 96, false}, {2, 500, 3, 128, false}};
#endif
    for (const Shape& s : shapes) {
        Run<bf16> run(s, true);
        std::vector<char> first;
        for (int again = 0; again < 3; again++) {
            run.forward();
            run.backward();
            std::vector<char> bytes((const char*)run.out.p, (const char*)(run.out.p + run.out.n));
            bytes.insert(bytes.end(), (const char*)run.dqkv.p, (const char*)(run.dqkv.p + run.dqkv.n));
            bytes.insert(bytes.end(), (const char*)run.lse.p, (const char*)(run.lse.p + run.lse.n));
            if (again == 0) { first = bytes; }
            assert_true(bytes == first);
        }
    }
}
// Nearly one-hot probabilities of scores of some thousands; the same token everywhere; nothing at all
static void flash_attention_bears_extreme_inputs(void**) {
    needs_flash();
    for (int hs : flash_sizes) {
        Shape s = {1, 70, 1, hs, false, hs != 64};
        size_t C = (size_t)hs;
        check_attention<bf16>(s, true, 0x1p14, [=](Run<bf16>& run) {
            for (size_t i = 0; i < run.qkv.n; i++) {
                if (i % (3 * C) < 2 * C) { from_float(run.qkv[i], to_float(run.qkv[i]) * 16.0f); }
            }
        });
        check_attention<bf16>(s, true, 16.0, [=](Run<bf16>& run) {
            for (size_t i = 0; i < run.qkv.n; i++) { run.qkv[i] = run.qkv[i % (3 * C)]; }
        });
        check_attention<bf16>(s, true, 0.0, [](Run<bf16>& run) { run.qkv.fill(encoded<bf16>(0.0f)); });
    }
}
// What is not finite makes NaN of what sees it, and of nothing else; but a value is multiplied with the zeros of its tile's keys that are not seen (as below).
static void flash_attention_shows_nan_where_it_is_seen(void**) {
    needs_flash();
    for (int hs : {32, 96}) {
        for (float bad : {NAN, INFINITY}) {
            for (int at : {0, 37, 66}) {
                if (hs == 96 && at != 37) { continue; }
                for (int part = 0; part < (isnan(bad) ? 3 : 2); part++) {
                    Shape s = {1, 70, 1, hs, false, at != 37 || hs == 32};
                    Run<bf16> run(s, true);
                    from_float(run.qkv[(size_t)at * 3 * (size_t)hs + (size_t)part * (size_t)hs + 3], bad);
                    Reference r = reference<bf16>(s, run.qkv, NULL);
                    run.forward();
                    for (int t = 0; t < s.T; t++) {
                        if (part < 2) { assert_int_equal(isfinite(run.lse[t]), isfinite(r.lse[(size_t)t])); }
                        for (int i = 0; i < hs; i++) {
                            bool may = part == 2 && i == 3 && t >= at / 64 * 64 - 32, want = isnan(r.out[(size_t)t * hs + i]), is = isnan(to_float(run.out[(size_t)t * hs + i]));
                            assert_true(is == want || (is && may));
                        }
                    }
                    run.backward();
                    bool shown = false;
                    for (size_t i = 0; i < run.dqkv.n; i++) { shown |= !isfinite(to_float(run.dqkv[i])); }
                    assert_true(shown);
                }
            }
        }
    }
}
#endif

// ---- the oracle ----

// The gradient that the kernels are compared with is the derivative of Σ dout·out, by finite differences of the reference's forward pass.
static void the_references_gradient_is_its_derivative(void**) {
    for (bool rope : {false, true}) {
        Shape s = {1, 5, 2, 4, rope};
        Array<float> qkv(5 * 24), dout(5 * 8);
        fill_normal(qkv, 0.0, 1.0);
        fill_normal(dout, 0.0, 1.0);
        Reference r = reference<float>(s, qkv, dout);
        for (size_t i = 0; i < qkv.n; i++) {
            float kept = qkv[i], h = 0x1p-9f;  // FP32 inputs: a large step, which is exact
            double loss[2] = {0, 0}, step = 0;
            for (int side = 0; side < 2; side++) {
                qkv[i] = kept + (side == 0 ? -h : h);
                step += (side == 0 ? -1.0 : 1.0) * (double)qkv[i];
                Reference x = reference<float>(s, qkv, NULL);
                for (size_t j = 0; j < x.out.size(); j++) { loss[side] += x.out[j] * (double)dout[j]; }
            }
            qkv[i] = kept;
            expect_near((loss[1] - loss[0]) / step, r.dqkv[i], 1e-4 * (1.0 + r.dqkv_size[i]), "derivative by qkv[%zu]", i);
        }
    }
}

// ---- tables and rotation ----

static void the_rotary_table_holds_cosines_then_sines(void**) {
    const int T = 600, hs = 8;
    Array<float> table((size_t)T * hs);
    rotary_table(table, T, hs);
    for (int t = 0; t < T; t++) {
        for (int j = 0; j < 4; j++) {
            double angle = t / pow(10000.0, j / 4.0);
            expect_near((double)table[t * 4 + j], cos(angle), 1e-7, "cosine (%d, %d)", t, j);
            expect_near((double)table[(T + t) * 4 + j], sin(angle), 1e-7, "sine (%d, %d)", t, j);
        }
    }
    assert_true(table[0] == 1.0f && table[T * 4] == 0.0f);
}

// With rotary positions scores depend on distances only: the same token at every place gets the same score wherever it is seen from.
static void rotary_scores_depend_on_distance(void**) {
    Shape s = {1, 40, 1, 8, true};
    Run<float> run(s);
    for (size_t i = 0; i < run.qkv.n; i++) { run.qkv[i] = run.qkv[i % 24]; }
    run.plan(false);
    run.forward();
    // lse(t) = log Σ_{d <= t} exp(score(d)), so exp(lse(t)) - exp(lse(t-1)) is the score at distance t, whichever way it is computed
    std::vector<double> q(8), k(8);
    double sum = 0;
    for (int t = 0; t < s.T; t++) {
        double score = 0;
        for (int i = 0; i < 8; i++) { q[i] = (double)run.qkv[i]; k[i] = (double)run.qkv[8 + i]; }
        rotate64(q.data(), t, 8, false);
        for (int i = 0; i < 8; i++) { score += q[i] * k[i]; }
        sum += exp(score / sqrt(8.0));
        expect_near((double)run.lse[t], log(sum), 1e-5, "lse of token %d", t);
    }
}

// ---- causality ----

// Queries before `change` do not feel what comes later, to the bit; those from it on do.
template <class A> static void check_causality(const Shape& s, int change) {
    Run<A> run(s);
    int C = s.heads * s.hs;
    run.plan(false);
    run.forward();
    std::vector<A> out(run.out.p, run.out.p + run.out.n);
    std::vector<float> lse(run.lse.p, run.lse.p + run.lse.n);
    for (int i = 0; i < 3 * C; i++) { from_float(run.qkv[(size_t)change * 3 * C + i], 5.0f); }
    run.forward();
    assert_memory_equal(out.data(), run.out.p, (size_t)change * C * sizeof(A));
    assert_memory_not_equal(out.data() + (size_t)change * C, run.out.p + (size_t)change * C, C * sizeof(A));
    for (int h = 0; h < s.heads; h++) {
        assert_memory_equal(lse.data() + h * s.T, run.lse.p + h * s.T, change * sizeof(float));
        assert_true(lse[h * s.T + change] != run.lse[h * s.T + change]);
    }
}

static void earlier_queries_do_not_see_later_tokens(void**) {
    for (int change : {1, 100, 255, 256, 257, 299}) {
        for (bool rope : {false, true}) {
            check_causality<float>(Shape{1, 300, 3, 8, rope}, change);
            check_causality<bf16>(Shape{1, 300, 3, 8, rope}, change);
        }
    }
}

static int first_nan(const Array<float>& x, int T, int C) {
    for (int i = 0; i < T * C; i++) {
        if (!isfinite(x[i])) { return i / C; }
    }
    return T;
}

// A query or key that is not finite reaches no earlier query; nor does a value of a later block. (Within a block the value is multiplied
// with the zeros beyond the diagonal, and 0·NaN is NaN: the earlier queries of that block are lost with it, which a step that is skipped
// anyway can bear.) From its own place on it must show.
static void nan_and_inf_reach_no_earlier_block(void**) {
    Shape s = {1, 300, 1, 8, false};
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        for (bool rope : {false, true}) {
            s.rope = rope;
            for (int at : {3, 100, 255, 256, 280}) {
                for (int part = 0; part < 3; part++) {
                    Run<float> run(s);
                    run.qkv[(size_t)at * 24 + part * 8 + 3] = bad;
                    run.plan(false);
                    run.forward();
                    int first = first_nan(run.out, s.T, 8);
                    if (part == 2) { assert_true(first >= at / ATTENTION_BLOCK * ATTENTION_BLOCK && first <= at); }
                    else if (isnan(bad)) { assert_int_equal(first, at); }
                    else { assert_true(first >= at); }  // -inf as a score is a key that nobody looks at
                }
            }
        }
    }
}

// ---- repetition, sequences, workspace ----

static void sequences_of_a_batch_do_not_mix(void**) {
    Shape s = {3, 70, 2, 8, true};
    Run<bf16> all(s);
    all.plan(true);
    all.forward();
    all.backward();
    Shape one = {1, 70, 2, 8, true};
    for (int b = 0; b < 3; b++) {
        Run<bf16> run(one);
        memcpy((void*)run.qkv.p, all.qkv.p + run.qkv.n * b, run.qkv.n * 2);
        memcpy((void*)run.dout.p, all.dout.p + run.dout.n * b, run.dout.n * 2);
        run.plan(true);
        run.forward();
        run.backward();
        assert_memory_equal(run.out.p, all.out.p + run.out.n * b, run.out.n * 2);
        assert_memory_equal(run.lse.p, all.lse.p + run.lse.n * b, run.lse.n * 4);
        assert_memory_equal(run.dqkv.p, all.dqkv.p + run.dqkv.n * b, run.dqkv.n * 2);
    }
}

static void repetition_gives_the_same_bits(void**) {
    Shape s = {1, 300, 3, 8, true};
    Run<bf16> run(s);
    for (int threads : {1, 2}) {
        with_threads(threads, [&] {
            run.plan(true);
            run.forward();
            run.backward();
            std::vector<bf16> out(run.out.p, run.out.p + run.out.n), dqkv(run.dqkv.p, run.dqkv.p + run.dqkv.n);
            for (int k = 0; k < 3; k++) {
                run.forward();
                run.backward();
                assert_memory_equal(out.data(), run.out.p, out.size() * 2);
                assert_memory_equal(dqkv.data(), run.dqkv.p, dqkv.size() * 2);
            }
        });
    }
}

static void large_scores_do_not_overflow(void**) {
    Shape s = {1, 64, 1, 8, false};
    Run<float> run(s);
    for (size_t i = 0; i < run.qkv.n; i++) { run.qkv[i] *= i % 24 < 16 ? 30.0f : 1.0f; }  // scores of some thousands: nearly one-hot
    run.plan(true);
    run.forward();
    run.backward();
    Reference r = reference<float>(s, run.qkv, run.dout);
    for (size_t i = 0; i < r.out.size(); i++) { expect_near((double)run.out[i], r.out[i], 2e-3 * r.out_size[i], "out[%zu]", i); }
    for (size_t i = 0; i < r.dqkv.size(); i++) { assert_true(isfinite(run.dqkv[i])); }
}

static void a_block_is_at_most_256_queries(void**) {
    assert_int_equal(attention_block(1), 1);
    assert_int_equal(attention_block(256), 256);
    assert_int_equal(attention_block(257), 256);
    Memory without = {}, with = {};
    Attention a = {};
    a.act = BF16; a.T = 1024; a.heads = 4; a.head_size = 8;
    attention_allocate(&a, &without);
    a.rope = true;
    attention_allocate(&a, &with);
    assert_int_equal(with.bytes[WORKSPACE] - without.bytes[WORKSPACE], 1024 * 2 * 32 * 2);  // rotated queries and keys
    assert_int_equal(without.bytes[WORKSPACE], 4 * 256 * 1024 * (4 + 4 + 2 + 2) + 1024 * 3 * 32 * 4 + 4 * 1024 * 4);  // the last: one token's scores
}

int main(void) {
    const struct CMUnitTest tests[] = {
#ifdef GPU_FORM
        cmocka_unit_test(flash_attention_matches_float64),
        cmocka_unit_test(flash_attention_gives_the_same_bits_again),
        cmocka_unit_test(flash_attention_bears_extreme_inputs),
        cmocka_unit_test(flash_attention_shows_nan_where_it_is_seen),
#endif
        cmocka_unit_test(the_rotary_table_holds_cosines_then_sines),
        cmocka_unit_test(a_block_is_at_most_256_queries),
        cmocka_unit_test(the_references_gradient_is_its_derivative),
        cmocka_unit_test(small_sequences_match_float64),
        cmocka_unit_test(tokens_one_by_one_match_float64),
#ifndef SIMT  // all below is of the same kernels at sizes for which emulation is slow
        cmocka_unit_test(several_blocks_match_float64),
        cmocka_unit_test(rotary_scores_depend_on_distance),
        cmocka_unit_test(earlier_queries_do_not_see_later_tokens),
        cmocka_unit_test(nan_and_inf_reach_no_earlier_block),
        cmocka_unit_test(sequences_of_a_batch_do_not_mix),
        cmocka_unit_test(repetition_gives_the_same_bits),
        cmocka_unit_test(large_scores_do_not_overflow),
#endif
    };
    return RUN_TESTS(tests);
}
