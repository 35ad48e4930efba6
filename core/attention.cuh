// attention.cuh: causal self-attention, forward and backward.
//
// qkv (B, T, 3C) holds a token's query, key and value side by side; head h takes columns h·hs … of each. A sequence is worked off in blocks of up to
// BLOCK queries: the scores of one block against all keys up to its last query are a batched matmul over heads (into FP32), the softmax turns them
// into probabilities of the activations' type, and a second batched matmul makes the output. So no T × T matrix is kept, and most of what lies above
// the diagonal is never computed. Backward recomputes the probabilities from the scores and the saved logsumexp:
//     P = exp(QKᵀ/√hs - lse), dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - Σ_j P∘dP)/√hs, dQ = dS·K, dK = dSᵀ·Q
// with dK and dV summed over blocks in FP32, in order. With rotary positions (RoPE: rotation by t·10000^(-2j/hs) of the pairs (j, j + hs/2), as in
// GPT-NeoX) the queries and keys of one sequence are rotated into workspace first, and their gradients are rotated back as they are stored.
//
// GPUs from Ampere on have kernels of their own for BF16 and the usual head sizes (flash.cuh): no score leaves the chip. With them queries and keys are rotated within
// qkv, which backward finds rotated, and Σ_j P∘dP is taken as Σ out∘dout: the output has to be kept.
//
// To go on from a sequence token by token (attention_keep, then attention_of_token), its rows of qkv are the keys and values, the keys rotated: one query attends
// to them, a Team a head.
#pragma once
#include "device.cuh"
#include "flash.cuh"
#include "matmul.cuh"
#include "memory.h"
#include "profile.h"

constexpr int ATTENTION_BLOCK = 256;  // queries at a time

struct Attention {
    DType act;
    int B, T, heads, head_size;
    bool flash;           // by flash.cuh; else by matmuls
    bool rope;            // rotary positions
    const float* rotary;  // (2, T, hs/2) cos, then sin; NULL without RoPE
    float* delta;         // (B, heads, T) workspace of flash.cuh
    float* token_scores;  // (heads, T) workspace of attention_of_token
    // workspace of one sequence and block
    void* q;              // (T, 2C) rotated queries and keys, of act; unused without rotation
    float* scores;        // (heads, block, T)
    float* dprobs;        // (heads, block, T)
    void* probs;          // (heads, block, T) of act
    void* dscores;        // (heads, block, T) of act
    float* dqkv;          // (T, 3C)
};

static inline int attention_block(int T) { return min_of(T, ATTENTION_BLOCK); }

static inline void attention_allocate(Attention* a, Memory* memory) {
    size_t C = (size_t)a->heads * a->head_size, bytes = (size_t)dtype_bytes(a->act);
    size_t block = (size_t)a->heads * attention_block(a->T) * a->T;
    a->token_scores = memory_take<float>(memory, WORKSPACE, (size_t)a->heads * a->T);
    a->delta = memory_take<float>(memory, WORKSPACE, a->flash ? (size_t)a->B * a->heads * a->T : 0);
    if (a->flash) { return; }
    a->q = memory_take(memory, WORKSPACE, a->rope ? a->T * 2 * C : 0, bytes);
    a->scores = memory_take<float>(memory, WORKSPACE, block);
    a->dprobs = memory_take<float>(memory, WORKSPACE, block);
    a->probs = memory_take(memory, WORKSPACE, block, bytes);
    a->dscores = memory_take(memory, WORKSPACE, block, bytes);
    a->dqkv = memory_take<float>(memory, WORKSPACE, (size_t)a->T * 3 * C);
}

// table (2, T, hs/2): cos, then sin, of t·10000^(-2j/hs), on the host
static inline void rotary_table(float* table, int T, int head_size) {
    int half = head_size / 2;
    for (int t = 0; t < T; t++) {
        for (int j = 0; j < half; j++) {
            double angle = (double)t * pow(10000.0, -2.0 * j / head_size);
            table[(size_t)t * half + j] = (float)cos(angle);
            table[(size_t)(T + t) * half + j] = (float)sin(angle);
        }
    }
}

template <class T> struct RotateForward {  // out (T, 2C): rotated queries and keys of one sequence
    T* out;
    const T* qkv;         // (T, 3C)
    const float* cosine;  // (T, hs/2)
    const float* sine;    // (T, hs/2)
    int heads, head_size;
    template <class Team> DEVICE void operator()(Team team, int t) const {
        int half = head_size / 2, C = heads * head_size;
        const float* cs = cosine + (size_t)t * half;
        const float* sn = sine + (size_t)t * half;
        for (int h = 0; h < 2 * heads; h++) {  // queries' heads, then keys': side by side in both
            const T* x = qkv + (size_t)t * 3 * C + (size_t)h * head_size;
            T* y = out + (size_t)t * 2 * C + (size_t)h * head_size;
            team.each(half, [=](auto c) {
                auto a = load(x, c), b = load(x + half, c), co = load(cs, c), si = load(sn, c);
                store(y, c, a * co - b * si);
                store(y + half, c, b * co + a * si);
            });
        }
    }
};

template <class X> struct RotateInPlace {  // queries and keys of qkv (B·T, 3C); a row is a token
    X* qkv;
    const float* cosine;  // (T, hs/2)
    const float* sine;    // (T, hs/2)
    int T, heads, head_size;
    template <class Team> DEVICE void operator()(Team full, int row) const {
        int half = head_size / 2, hs = head_size, t = row % T;
        X* x = qkv + (size_t)row * 3 * (size_t)(heads * hs);
        const float* cs = cosine + (size_t)t * half;
        const float* sn = sine + (size_t)t * half;
        Team team = full.strided(half);  // a pack lies within a head's half
        team.each(2 * heads * half, [=](auto c) {
            X* y = x + c.i / (size_t)half * (size_t)hs;
            auto at = c;
            at.i = c.i % (size_t)half;
            auto a = load(y, at), b = load(y + half, at), co = load(cs, at), si = load(sn, at);
            store(y, at, a * co - b * si);
            store(y + half, at, b * co + a * si);
        });
    }
};

template <class T> struct StoreGradient {  // dqkv of one sequence to its type; rotated back where the forward rotated
    T* out;               // (T, 3C)
    const float* d;       // (T, 3C)
    const float* cosine;  // (T, hs/2) or NULL
    const float* sine;
    int heads, head_size;
    template <class Team> DEVICE void operator()(Team team, int t) const {
        int half = head_size / 2, C = heads * head_size;
        const float* x = d + (size_t)t * 3 * C;
        T* y = out + (size_t)t * 3 * C;
        if (cosine == NULL) {
            team.each(3 * C, [=](auto c) { store(y, c, load(x, c)); });
            return;
        }
        const float* cs = cosine + (size_t)t * half;
        const float* sn = sine + (size_t)t * half;
        for (int h = 0; h < 2 * heads; h++) {
            const float* xh = x + (size_t)h * head_size;
            T* yh = y + (size_t)h * head_size;
            team.each(half, [=](auto c) {
                auto a = load(xh, c), b = load(xh + half, c), co = load(cs, c), si = load(sn, c);
                store(yh, c, a * co + b * si);
                store(yh + half, c, b * co - a * si);
            });
        }
        team.each(C, [=](auto c) { store(y + 2 * C, c, load(x + 2 * C, c)); });
    }
};

template <class T> struct SoftmaxForward {  // probs = softmax over the keys ≤ query of scores/√hs, zeros beyond; lse
    T* probs;             // (heads, queries, keys)
    float* lse;           // (heads, T) of this sequence: [head][query]
    const float* scores;  // (heads, queries, keys)
    float factor;         // 1/√hs
    int first, queries, keys, T_;
    template <class Team> DEVICE void operator()(Team full, int row) const {
        Team team = full.unaligned();
        int head = row / queries, i = row % queries, n = first + i + 1;
        const float* s = scores + (size_t)row * keys;
        T* p = probs + (size_t)row * keys;
        float k = factor;
        float top = team.max(n, [=](auto c) { return load(s, c) * k; });
        float total = team.sum(n, [=](auto c) { return exp_of(load(s, c) * k - top); });
        float inverse = 1.0f / total;
        team.each(n, [=](auto c) { store(p, c, exp_of(load(s, c) * k - top) * inverse); });
        T* rest = p + n;
        team.each(keys - n, [=](auto c) { store(rest, c, splat(c, 0.0f)); });
        if (team.leads()) { lse[(size_t)head * T_ + first + i] = top + logf(total); }
    }
};

template <class T> struct SoftmaxBackward {  // probs again, and dscores = probs∘(dprobs - Σ probs∘dprobs)/√hs
    T* probs;
    T* dscores;
    const float* lse;
    const float* scores;
    const float* dprobs;
    float factor;
    int first, queries, keys, T_;
    template <class Team> DEVICE void operator()(Team full, int row) const {
        Team team = full.unaligned();
        int head = row / queries, i = row % queries, n = first + i + 1;
        const float* s = scores + (size_t)row * keys;
        const float* dp = dprobs + (size_t)row * keys;
        T* p = probs + (size_t)row * keys;
        T* ds = dscores + (size_t)row * keys;
        float k = factor, l = lse[(size_t)head * T_ + first + i];
        float total = team.sum(n, [=](auto c) {
            auto v = exp_of(load(s, c) * k - l);
            store(p, c, v);
            return v * load(dp, c);
        });
        team.each(n, [=](auto c) { store(ds, c, exp_of(load(s, c) * k - l) * (load(dp, c) - total) * k); });
        T* rest = p + n;
        T* drest = ds + n;
        team.each(keys - n, [=](auto c) {
            store(rest, c, splat(c, 0.0f));
            store(drest, c, splat(c, 0.0f));
        });
    }
};

// A batched product over the heads of one sequence: D (m, n) = A (m, k) · B (k, n)
static inline MatmulCall attention_product(void* d, DType d_dtype, int64_t d_ld, int64_t d_stride, Operand a, Operand b, int heads, int m, int n,
                                           int k, bool accumulate) {
    MatmulCall call = {};
    call.d = d;
    call.d_dtype = d_dtype;
    call.d_ld = d_ld;
    call.a = a;
    call.b = b;
    call.d_batch_stride = d_stride;
    if (heads == 1) { call.a.batch_stride = call.b.batch_stride = call.d_batch_stride = 0; }
    call.m = m;
    call.n = n;
    call.k = k;
    call.batch = heads;
    call.accumulate = accumulate;
    return call;
}

// Where the heads of one sequence lie: base + t·ld + h·stride
struct Heads {
    const void* data;
    DType dtype;
    int64_t ld, stride;
};
static inline Heads heads_from(Heads h, size_t element) {
    h.data = (const char*)h.data + element * (size_t)dtype_bytes(h.dtype);
    return h;
}
static inline Operand heads_operand(Heads h, bool transposed) { return Operand{h.data, h.dtype, NULL, h.ld, h.stride, transposed}; }

// The six products of a block of queries first … last-1, over keys 0 … last-1. Pointers may be NULL where only shapes matter.
enum AttentionProduct { SCORES, OUTPUT, D_PROBS, D_VALUE, D_QUERY, D_KEY, ATTENTION_PRODUCTS };

struct AttentionViews { Heads q, k, v, o, dout; };

static inline MatmulCall attention_call(const Attention* a, AttentionProduct which, AttentionViews x, int first, int last) {
    int hs = a->head_size, queries = last - first, keys = last;
    size_t C = (size_t)a->heads * hs;
    int64_t block = (int64_t)queries * keys;
    Heads probs = {a->probs, a->act, keys, block}, dscores = {a->dscores, a->act, keys, block};
    Heads q = heads_from(x.q, (size_t)first * (size_t)x.q.ld), o = heads_from(x.o, (size_t)first * (size_t)x.o.ld);
    Heads dout = heads_from(x.dout, (size_t)first * (size_t)x.dout.ld);
    int64_t ld = 3 * (int64_t)C;
    float* dq = a->dqkv + (size_t)first * 3 * C;
    bool later = last < a->T;  // backward goes from the last block, which sees every key, to the first
    switch (which) {
        case SCORES: return attention_product(a->scores, FP32, keys, block, heads_operand(q, false), heads_operand(x.k, true), a->heads, queries, keys, hs, false);
        case OUTPUT: return attention_product((void*)o.data, a->act, o.ld, o.stride, heads_operand(probs, false), heads_operand(x.v, false), a->heads, queries, hs, keys, false);
        case D_PROBS: return attention_product(a->dprobs, FP32, keys, block, heads_operand(dout, false), heads_operand(x.v, true), a->heads, queries, keys, hs, false);
        case D_VALUE: return attention_product(a->dqkv + 2 * C, FP32, ld, hs, heads_operand(probs, true), heads_operand(dout, false), a->heads, keys, hs, queries, later);
        case D_QUERY: return attention_product(dq, FP32, ld, hs, heads_operand(dscores, false), heads_operand(x.k, false), a->heads, queries, hs, keys, false);
        case D_KEY: return attention_product(a->dqkv + C, FP32, ld, hs, heads_operand(dscores, true), heads_operand(q, false), a->heads, keys, hs, queries, later);
        default: die("attention has no product %d", (int)which);
    }
}

// Sequence b of qkv (B, T, 3C), out and dout (B, T, C)
static inline AttentionViews attention_views(const Attention* a, const void* qkv, const void* out, const void* dout, int b) {
    size_t C = (size_t)a->heads * a->head_size, T = (size_t)a->T;
    Heads base = {qkv, a->act, 3 * (int64_t)C, a->head_size};
    base = heads_from(base, (size_t)b * T * 3 * C);
    AttentionViews x;
    x.q = base;
    x.k = heads_from(base, C);
    x.v = heads_from(base, 2 * C);
    if (a->rope) {
        x.q = Heads{a->q, a->act, 2 * (int64_t)C, a->head_size};
        x.k = heads_from(x.q, C);
    }
    x.o = heads_from(Heads{out, a->act, (int64_t)C, a->head_size}, (size_t)b * T * C);
    x.dout = heads_from(Heads{dout, a->act, (int64_t)C, a->head_size}, (size_t)b * T * C);
    return x;
}

// f(product, how often a sequence makes it in the forward pass, and in the backward pass) for every product; `backward`: those of the backward pass too
template <class F> static inline void each_attention_product(const Attention* a, bool backward, F f) {
    if (a->flash) { return; }
    AttentionViews x = attention_views(a, NULL, NULL, NULL, 0);
    for (int first = 0; first < a->T; first += attention_block(a->T)) {
        int last = min_of(a->T, first + attention_block(a->T));
        for (int w = 0; w < (backward ? (int)ATTENTION_PRODUCTS : (int)D_PROBS); w++) {
            f(attention_call(a, (AttentionProduct)w, x, first, last), w < D_PROBS ? 1 : 0, backward && w != OUTPUT ? 1 : 0);
        }
    }
}

// The largest workspace that any product asks for.
static inline void attention_plan(const Attention* a, Matmul* mm, bool backward) {
    each_attention_product(a, backward, [=](MatmulCall call, int, int) { matmul_plan(mm, &call); });
}

template <class T> static inline void attention_rotate(const Attention* a, const void* qkv, int b, Stream s) {
    if (!a->rope) { return; }
    size_t C = (size_t)a->heads * a->head_size, half = (size_t)a->head_size / 2;
    run_rows(RotateForward<T>{(T*)a->q, (const T*)qkv + (size_t)b * a->T * 3 * C, a->rotary, a->rotary + a->T * half, a->heads, a->head_size}, a->T, s);
}

template <class T> static inline void attention_forward_as(Attention* a, Matmul* mm, T* out, float* lse, const T* qkv, int B, Stream s) {
    float factor = 1.0f / sqrtf((float)a->head_size);
    for (int b = 0; b < B; b++) {
        attention_rotate<T>(a, qkv, b, s);
        AttentionViews x = attention_views(a, qkv, out, NULL, b);
        for (int first = 0; first < a->T; first += attention_block(a->T)) {
            int last = min_of(a->T, first + attention_block(a->T));
            MatmulCall scores = attention_call(a, SCORES, x, first, last), output = attention_call(a, OUTPUT, x, first, last);
            matmul(mm, &scores, s);
            run_rows(SoftmaxForward<T>{(T*)a->probs, lse + (size_t)b * a->heads * a->T, a->scores, factor, first, last - first, last, a->T},
                     a->heads * (last - first), s);
            matmul(mm, &output, s);
        }
    }
}

template <class T>
static inline void attention_backward_as(Attention* a, Matmul* mm, T* dqkv, const T* dout, const T* qkv, const float* lse, int B, Stream s) {
    float factor = 1.0f / sqrtf((float)a->head_size);
    size_t C = (size_t)a->heads * a->head_size, half = (size_t)a->head_size / 2;
    for (int b = 0; b < B; b++) {
        attention_rotate<T>(a, qkv, b, s);
        AttentionViews x = attention_views(a, qkv, NULL, dout, b);
        int block = attention_block(a->T);
        for (int first = (a->T - 1) / block * block; first >= 0; first -= block) {
            int last = min_of(a->T, first + block);
            MatmulCall scores = attention_call(a, SCORES, x, first, last), dprobs = attention_call(a, D_PROBS, x, first, last);
            matmul(mm, &scores, s);
            matmul(mm, &dprobs, s);
            run_rows(SoftmaxBackward<T>{(T*)a->probs, (T*)a->dscores, lse + (size_t)b * a->heads * a->T, a->scores, a->dprobs, factor, first,
                                        last - first, last, a->T}, a->heads * (last - first), s);
            const AttentionProduct rest[] = {D_VALUE, D_QUERY, D_KEY};
            for (AttentionProduct which : rest) {
                MatmulCall call = attention_call(a, which, x, first, last);
                matmul(mm, &call, s);
            }
        }
        const float* sine = a->rope ? a->rotary + (size_t)a->T * half : NULL;
        run_rows(StoreGradient<T>{dqkv + (size_t)b * a->T * 3 * C, a->dqkv, a->rotary, sine, a->heads, a->head_size}, a->T, s);
    }
}

// out (B, T, C) and lse (B, heads, T) from qkv (B, T, 3C), which is as attention_backward wants it afterwards
static inline void attention_forward(Attention* a, Matmul* mm, void* out, float* lse, void* qkv, int B, Stream s) {
    ProfileScope scope("attention forward");
#ifdef GPU_FORM
    if (a->flash) {
        if (a->rope) {
            const float* sine = a->rotary + (size_t)a->T * (size_t)(a->head_size / 2);
            run_rows(RotateInPlace<bf16>{(bf16*)qkv, a->rotary, sine, a->T, a->heads, a->head_size}, B * a->T, s);
        }
        flash_forward((bf16*)out, lse, (const bf16*)qkv, true, B, a->T, a->heads, a->head_size, s);
        return;
    }
#endif
    if (a->act == FP32) { attention_forward_as(a, mm, (float*)out, lse, (const float*)qkv, B, s); }
    else { attention_forward_as(a, mm, (bf16*)out, lse, (const bf16*)qkv, B, s); }
}

// dqkv (B, T, 3C) from dout (B, T, C), out (which only flash.cuh reads), qkv and lse
static inline void attention_backward(Attention* a, Matmul* mm, void* dqkv, const void* dout, const void* out, const void* qkv, const float* lse, int B, Stream s) {
    ProfileScope scope("attention backward");
#ifdef GPU_FORM
    if (a->flash) {
        flash_backward((bf16*)dqkv, a->delta, (const bf16*)dout, (const bf16*)out, (const bf16*)qkv, lse, a->rope ? a->rotary : NULL, true, B, a->T, a->heads,
                       a->head_size, s);
        return;
    }
#endif
    (void)out;
    if (a->act == FP32) { attention_backward_as(a, mm, (float*)dqkv, (const float*)dout, (const float*)qkv, lse, B, s); }
    else { attention_backward_as(a, mm, (bf16*)dqkv, (const bf16*)dout, (const bf16*)qkv, lse, B, s); }
}

// ---- one token after others ----

template <class T> struct AppendToken {  // a token's row of qkv from x (3C), its query and key rotated
    T* qkv;               // (3C)
    const T* x;
    const float* cosine;  // (hs/2) of its position, or NULL
    const float* sine;
    int heads, head_size;
    template <class Team> DEVICE void operator()(Team full, int) const {
        int half = head_size / 2, hs = head_size, C = heads * hs;
        T* y = qkv;
        const T* from = x;
        const float *cs = cosine, *sn = sine;
        if (cs == NULL) {
            full.strided(C).each(3 * C, [=](auto c) { store_raw(y, c, load_raw(from, c)); });
            return;
        }
        Team team = full.strided(half);  // a pack lies within a head's half
        team.each(2 * heads * half, [=](auto c) {
            size_t head = c.i / (size_t)half * (size_t)hs;
            auto at = c;
            at.i = c.i % (size_t)half;
            auto a = load(from + head, at), b = load(from + head + half, at), co = load(cs, at), si = load(sn, at);
            store(y + head, at, a * co - b * si);
            store(y + head + half, at, b * co + a * si);
        });
        team.each(C, [=](auto c) { store_raw(y + 2 * C, c, load_raw(from + 2 * C, c)); });
    }
};

template <class T> struct AttendToken {  // a row is a head of the query at `position`, which attends to the keys up to its own
    T* out;               // (rows, C) all rows alike
    const T* qkv;         // (T, 3C) rotated
    float* scores;        // (heads, T_)
    float factor;         // 1/√hs
    int position, rows, T_, heads, head_size;
    template <class Team> DEVICE void operator()(Team full, int head) const {
        Team team = full.unaligned();  // a thread a key, then a thread a channel
        int n = position + 1, hs = head_size, C = heads * hs, copies = rows;
        float* s = scores + (size_t)head * T_;
        const T* q = qkv + (size_t)position * 3 * C + (size_t)head * hs;
        const T* k = qkv + C + (size_t)head * hs;
        const T* v = k + C;
        float by = factor;
        team.each(n, [=](auto c) {
            const T* key = k + c.i * 3 * (size_t)C;
            float dot = 0.0f;
            for (int d = 0; d < hs; d++) { dot += to_float(q[d]) * to_float(key[d]); }
            s[c.i] = dot * by;
        });
        float top = team.max(n, [=](auto c) { return load(s, c); });
        float total = team.sum(n, [=](auto c) {
            auto p = exp_of(load(s, c) - top);
            store(s, c, p);
            return p;
        });
        team.sync();
        float inverse = 1.0f / total;
        T* o = out + (size_t)head * hs;
        team.each(hs, [=](auto c) {
            float sum = 0.0f;
            for (int i = 0; i < n; i++) { sum += s[i] * to_float(v[(size_t)i * 3 * C + c.i]); }
            for (int r = 0; r < copies; r++) { store(o + (size_t)r * C, c, splat(c, sum * inverse)); }
        });
    }
};

template <class T> static inline void attention_of_token_as(const Attention* a, T* out, T* qkv, const T* x, int position, int rows, Stream s) {
    size_t half = (size_t)a->head_size / 2;
    const float* cosine = a->rope ? a->rotary + (size_t)position * half : NULL;
    const float* sine = a->rope ? cosine + (size_t)a->T * half : NULL;
    T* own = qkv + (size_t)position * 3 * (size_t)(a->heads * a->head_size);
    run_rows(AppendToken<T>{own, x, cosine, sine, a->heads, a->head_size}, 1, s);
    run_rows(AttendToken<T>{out, qkv, a->token_scores, 1.0f / sqrtf((float)a->head_size), position, rows, a->T, a->heads, a->head_size}, a->heads, s);
}

// After a forward pass over one sequence: qkv (T, 3C) as attention_of_token wants it
static inline void attention_keep(const Attention* a, void* qkv, Stream s) {
    if (a->flash || !a->rope) { return; }
    const float* sine = a->rotary + (size_t)a->T * (size_t)(a->head_size / 2);
    if (a->act == FP32) { run_rows(RotateInPlace<float>{(float*)qkv, a->rotary, sine, a->T, a->heads, a->head_size}, a->T, s); }
    else { run_rows(RotateInPlace<bf16>{(bf16*)qkv, a->rotary, sine, a->T, a->heads, a->head_size}, a->T, s); }
}

// out (rows, C), all rows alike, for the token at `position` of a sequence, whose qkv is x (3C); it joins qkv (T, 3C), where those before it are
static inline void attention_of_token(const Attention* a, void* out, void* qkv, const void* x, int position, int rows, Stream s) {
    ProfileScope scope("attention forward");
    if (a->act == FP32) { attention_of_token_as(a, (float*)out, (float*)qkv, (const float*)x, position, rows, s); }
    else { attention_of_token_as(a, (bf16*)out, (bf16*)qkv, (const bf16*)x, position, rows, s); }
}
