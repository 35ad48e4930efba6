// flash_parts.cuh: what attention's kernels for wgmma (flash_hopper.cuh) and for mma.sync (flash_mma.cuh) share.
//
// The algorithm is FlashAttention's (Dao 2023): no score leaves the chip, the softmax is kept up to date as tiles of keys pass by, and backward makes the
// scores again from the logsumexp that forward has kept. With δ = Σ dout∘out of a query:
//     P = exp(QKᵀ/√hs - lse), dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - δ), dQ = dS·K/√hs, dK = dSᵀ·Q/√hs
// dK with dV and dQ are two kernels, which make S and dP each: so every sum has one owner and a fixed order, and no atomics are needed. A block has an own
// tile of rows (queries in the forward pass and for dQ, keys for dK and dV); tiles of the other side pass by in shared memory, filled by cp.async while
// earlier ones are used.
//
// Both instructions leave results in the same places: of 16 rows of a warp's a thread has, of rows g and g + 8 (g = lane / 4), the columns 8i + 2t and
// 8i + 2t + 1 (t = lane % 4), as element 4i + 2·(second row) + (second column). Two of them as a word of BF16 are an operand's fragment: P and dS never leave the
// registers, as it is their rows that are multiplied.
#pragma once
#include "tensor_core.cuh"

#ifdef GPU_FORM

constexpr float LOG2_E = 1.44269504f;

// What the backward kernels share: of one head of a sequence, and of all
struct FlashBackward {
    bf16* dqkv;           // (B, T, 3C)
    const bf16* dout;     // (B, T, C)
    const bf16* qkv;      // (B, T, 3C)
    const float* lse;     // (B, heads, T)
    const float* delta;   // (B, heads, T)
    const float* rotary;  // (2, T, hs/2) or NULL
    float factor;         // 1/√hs
    int T, heads;
};

GPU int flash_row() { return (int)threadIdx.x % 32 / 4; }         // the thread's first, of 16
GPU int flash_column() { return (int)threadIdx.x % 4 * 2; }       // the first, of i = 0

constexpr int power_of_two_within(int n) { return n < 2 ? 1 : 2 * power_of_two_within(n / 2); }
// Rows first … first+ROWS-1 of a head's columns to shared memory, 16 bytes to place(row, chunk) each; zeros beyond the sequence. A power of two of rows at a time:
// threads may be left over, but each has one chunk and one pattern of places.
template <int HEAD_SIZE, int ROWS, int THREADS, class Place> GPU void flash_load(Place place, const bf16* head, int64_t ld, int first, int T) {
    constexpr int CHUNKS = HEAD_SIZE / 8, AT_A_TIME = power_of_two_within(THREADS / CHUNKS);
    static_assert(ROWS % AT_A_TIME == 0, "whole passes");
    int own = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS;
    if (own >= AT_A_TIME) { return; }
    UNROLL
    for (int k = 0; k < ROWS / AT_A_TIME; k++) {
        int row = k * AT_A_TIME + own;
        bool there = first + row < T;
        cp_async_16(place(row, chunk), head + (int64_t)(there ? first + row : 0) * ld + chunk * 8, there);
    }
}
// lse and delta of queries first … first+N-1, (2, N); zeros beyond the sequence
template <int N> GPU void flash_load_lines(float* lines, const float* lse, const float* delta, int first, int T) {
    int i = (int)threadIdx.x, at = first + i % N;
    if (i < 2 * N) { cp_async_4(shared_address(lines + i), (i < N ? lse : delta) + (at < T ? at : 0), at < T); }
}

template <int N> GPU void flash_pack(uint32_t (&p)[N], const float (&s)[2 * N]) {
    UNROLL
    for (int i = 0; i < N; i++) { p[i] = pack_bf16(s[2 * i], s[2 * i + 1]); }
}

// Scores that queries `row` and row + 8 do not see, as keys from `key` on: not a number's worth
template <int N> GPU void flash_mask(float (&s)[N], int key, int row, bool causal, int T) {
    UNROLL
    for (int i = 0; i < N; i++) {
        int limit = causal ? min_of(T, row + 1 + i / 2 % 2 * 8) : T;
        if (key + i / 4 * 8 + flash_column() + i % 2 >= limit) { s[i] = -INFINITY; }
    }
}

// s becomes probabilities against the new maximum `top` (of its rows, in units of log2); `total`: this thread's part of the sums. factor: what sums so far
// have to be scaled by
template <int N> GPU void flash_softmax(float (&s)[N], float (&top)[2], float (&total)[2], float (&factor)[2], float scale) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        float high = s[2 * r];
        UNROLL
        for (int i = 0; i < N / 4; i++) { high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1])); }
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
        high = fmaxf(top[r], high * scale);
        float base = high == -INFINITY ? 0.0f : high, sum = 0.0f;
        factor[r] = exp2_fast(top[r] - base);
        top[r] = high;
        UNROLL
        for (int i = 0; i < N / 2; i++) {
            float* e = &s[i / 2 * 4 + 2 * r + i % 2];
            *e = exp2_fast(fma_of(*e, scale, -base));
            sum += *e;
        }
        total[r] = fma_of(total[r], factor[r], sum);
    }
}

// Elements of rows g times factor[0], of rows g + 8 times factor[1]
template <int N> GPU void flash_scale(float (&o)[N], const float (&factor)[2]) {
    UNROLL
    for (int i = 0; i < N; i++) { o[i] *= factor[i / 2 % 2]; }
}

// After the last tile: the rows' sums over all threads are taken, o is divided by them, and their logsumexp is stored
template <int N> GPU void flash_close(float (&o)[N], float (&total)[2], const float (&top)[2], float* lse, int row, int T) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        int at = row + 8 * r;
        if (threadIdx.x % 4 == 0 && at < T) { lse[at] = (top[r] + log2f(total[r])) * 0.693147181f; }
        total[r] = 1.0f / total[r];
    }
    flash_scale(o, total);
}

// Backward where rows are keys (`key`, key + 8) and columns queries from `query` on, whose lse and, N further, δ lie at `line`: P of scores s
template <int N> GPU void flash_probs_of_keys(float (&p)[N], const float (&s)[N], const float* line, float scale, int query, int key, bool masks) {
    UNROLL
    for (int i = 0; i < N / 4; i++) {
        float2 base = *(const float2*)(line + 8 * i + flash_column());
        int column = query + 8 * i + flash_column();
        UNROLL
        for (int r = 0; r < 2; r++) {
            int e = 4 * i + 2 * r;
            p[e] = exp2_fast(fma_of(s[e], scale, base.x * -LOG2_E));
            p[e + 1] = exp2_fast(fma_of(s[e + 1], scale, base.y * -LOG2_E));
            if (masks && column < key + 8 * r) { p[e] = 0.0f; }
            if (masks && column + 1 < key + 8 * r) { p[e + 1] = 0.0f; }
        }
    }
}
// and where rows are queries (`row`, row + 8; base: their lse in units of log2) and columns keys from `key` on
template <int N> GPU void flash_probs_of_queries(float (&p)[N], const float (&s)[N], const float (&base)[2], float scale, int key, int row, bool causal, int T, bool masks) {
    UNROLL
    for (int e = 0; e < N; e += 2) {
        int r = e / 2 % 2, column = key + e / 4 * 8 + flash_column(), limit = causal ? min_of(T, row + 8 * r + 1) : T;
        p[e] = exp2_fast(fma_of(s[e], scale, -base[r]));
        p[e + 1] = exp2_fast(fma_of(s[e + 1], scale, -base[r]));
        if (masks && column >= limit) { p[e] = 0.0f; }
        if (masks && column + 1 >= limit) { p[e + 1] = 0.0f; }
    }
}
// lse in units of log2 and δ of queries `row` and row + 8
GPU void flash_query_lines(float (&base)[2], float (&delta)[2], const float* lse, const float* all_delta, int row, int T) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        bool there = row + 8 * r < T;
        base[r] = there ? lse[row + 8 * r] * LOG2_E : 0.0f;
        delta[r] = there ? all_delta[row + 8 * r] : 0.0f;
    }
}

// Rows `row` and row + 8 of d, scaled, to a head of a matrix; where `rotary` is given, turned back as StoreGradient of attention.cuh does
template <int HEAD_SIZE> GPU void flash_store(bf16* head, int64_t ld, const float (&d)[HEAD_SIZE / 2], float scale, const float* rotary, int row, int T) {
    constexpr int HALF = HEAD_SIZE / 2, PAIRED = HALF / 8;  // column 8i + … goes with 8(i + PAIRED) + …
    UNROLL
    for (int r = 0; r < 2; r++) {
        int at = row + 8 * r;
        if (at >= T) { continue; }
        uint32_t* to = (uint32_t*)(head + (int64_t)at * ld + flash_column());
        UNROLL
        for (int i = 0; i < PAIRED; i++) {
            float a[2], b[2];
            UNROLL
            for (int k = 0; k < 2; k++) {
                a[k] = d[4 * i + 2 * r + k] * scale;
                b[k] = d[4 * (i + PAIRED) + 2 * r + k] * scale;
                if (rotary != NULL) {
                    const float* turn = rotary + (int64_t)at * HALF + 8 * i + flash_column() + k;
                    float co = turn[0], si = turn[(int64_t)T * HALF], x = a[k], y = b[k];
                    a[k] = x * co + y * si;
                    b[k] = y * co - x * si;
                }
            }
            to[4 * i] = pack_bf16(a[0], a[1]);
            to[4 * (i + PAIRED)] = pack_bf16(b[0], b[1]);
        }
    }
}

// delta (B, heads, T) = Σ dout∘out over a head's columns of dout and out (rows, heads, hs), rows of T tokens; a warp each
__global__ void __launch_bounds__(256) flash_delta_kernel(float* delta, const bf16* dout, const bf16* out, int T, int heads, int head_size, int64_t all) {
    int64_t i = (int64_t)blockIdx.x * 8 + threadIdx.x / 32;  // token and head
    if (i >= all) { return; }
    const bf16 *a = dout + i * head_size, *b = out + i * head_size;
    float sum = 0.0f;
    for (int c = (int)threadIdx.x % 32 * 2; c < head_size; c += 64) {
        Range<2> at = {(size_t)c};
        Vec<2> x = load(a, at), y = load(b, at);
        sum = fma_of(x.v[0], y.v[0], fma_of(x.v[1], y.v[1], sum));
    }
    for (int o = 16; o > 0; o >>= 1) { sum += __shfl_xor_sync(0xffffffffu, sum, o); }
    int64_t token = i / heads;
    if (threadIdx.x % 32 == 0) { delta[(token / T * heads + i % heads) * T + token % T] = sum; }
}

#endif
