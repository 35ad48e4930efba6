// flash_hopper.cuh: attention for Hopper's warpgroup products (wgmma), forward and backward, for head sizes 64 and 128.
//
// The algorithm is FlashAttention's (Dao 2023): no score leaves the chip, the softmax is kept up to date as tiles of keys pass by, and backward makes the
// scores again from the logsumexp that forward has kept. With δ = Σ dout∘out of a query:
//     P = exp(QKᵀ/√hs - lse), dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP - δ), dQ = dS·K/√hs, dK = dSᵀ·Q/√hs
// dK with dV and dQ are two kernels, which make S and dP each: so every sum has one owner and a fixed order, and no atomics are needed. A block is two warpgroups, each with 64 rows of an own tile of 128
// (queries in the forward pass and for dQ, keys for dK and dV); the other side's tiles pass by in stages of shared memory, filled by cp.async while earlier
// ones are used. wgmma runs beside its warps:
//
//     forward   S' = Q·K'ᵀ of the next tile and O += P·V of this one are issued; S' is waited for, P' = softmax(S') is made; then O is scaled
//     dK, dV    S = K·Qᵀ and dP = V·dOᵀ (both transposed: a row is a key) are issued; P is made while dP is computed, dS = P∘(dP - δ) while dV += P·dO is;
//               then dK += dS·Q
//     dQ        S = Q·Kᵀ and dP = dO·Vᵀ likewise; dQ += dS·K
//
// So P and dS never leave the registers: where they are an operand it is their rows that are multiplied. No sum depends on timing. Forward takes tiles from
// the last to the first, so that only the first one taken needs masks.
//
// A tile in shared memory is made of panels of 64 columns; a row of a panel is 128 bytes, whose 16-byte chunks are exchanged by the row's last three bits,
// as wgmma's 128-byte swizzle wants it. The same tile serves as an operand by rows (its columns are summed over) and by columns (its rows are).
#pragma once
#include "tensor_core.cuh"
#include <type_traits>

// Which heads of which activations there are kernels for
static inline bool flash_takes(DType act, int head_size, int capability) { return act == BF16 && (head_size == 64 || head_size == 128) && capability == 90; }

#if defined(USE_CUDA) && defined(__CUDACC__)

constexpr int HOPPER_ROWS = 128;      // of a block's own tile
constexpr int HOPPER_KEYS = 128;      // of a tile that passes by in the forward pass
constexpr int HOPPER_PASSING = 64;    // rows of one that passes by in the backward pass
constexpr int HOPPER_THREADS = 256;
constexpr int BACKWARD_STAGES = 2;    // one is filled while one is used

constexpr size_t hopper_tile(int rows, int head_size) { return (size_t)rows * (size_t)head_size * 2; }
constexpr size_t hopper_forward_shared(int hs) { return hopper_tile(HOPPER_ROWS, hs) + 4 * hopper_tile(HOPPER_KEYS, hs) + 1024; }
constexpr size_t hopper_backward_shared(int hs) {
    return 2 * hopper_tile(HOPPER_ROWS, hs) + BACKWARD_STAGES * (2 * hopper_tile(HOPPER_PASSING, hs) + 2 * HOPPER_PASSING * sizeof(float)) + 1024;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where wgmma finds an operand: its address, the bytes between panels and between groups of 8 rows, 128-byte swizzle
GPU uint64_t tile_descriptor(uint32_t address, uint32_t panels) {
    return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panels >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
GPU void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GPU void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> GPU void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
// What ordinary instructions have written to shared memory is there for wgmma
GPU void fence_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define F4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define F16(x, i) F4(x, i), F4(x, i + 4), F4(x, i + 8), F4(x, i + 12)
#define D32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define D64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// d (64, N) = [d +] a (64, 16) · bᵀ, b (N, 16), both in shared memory by rows; N is the number of d's elements over 2 · 32 threads
GPU void wgmma_rows(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " D64 ", %64, %65, p, 1, 1, 0, 0; }"
                 : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "l"(a), "l"(b), "r"(add));
}
GPU void wgmma_rows(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32 ", %32, %33, p, 1, 1, 0, 0; }"
                 : F16(d, 0), F16(d, 16) : "l"(a), "l"(b), "r"(add));
}
// d (64, N) += a (64, 16) · b (16, N), a in registers, b by columns
GPU void wgmma_columns(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " D64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
GPU void wgmma_columns(float (&d)[32], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " D32 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : F16(d, 0), F16(d, 16) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef F4
#undef F16
#undef D32
#undef D64

// Rows first … first+ROWS-1 of a head's columns into a tile; zeros beyond the sequence
template <int HEAD_SIZE, int ROWS> GPU void hopper_load(uint32_t tile, const bf16* head, int64_t ld, int first, int T) {
    constexpr int CHUNKS = HEAD_SIZE / 8;  // of 16 bytes, in a row
    UNROLL
    for (int k = 0; k < ROWS * CHUNKS / HOPPER_THREADS; k++) {
        int i = k * HOPPER_THREADS + (int)threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        uint32_t to = tile + (uint32_t)(chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16);
        bool there = first + row < T;
        cp_async_16(to, head + (int64_t)(there ? first + row : 0) * ld + chunk * 8, there);
    }
}
// The copies so far are there, for all threads and for wgmma
GPU void hopper_arrived() {
    cp_async_wait<0>();
    fence_for_wgmma();
    __syncthreads();
}

// d (64, N) = a (64, HEAD_SIZE) · bᵀ of rows of a tile of A_ROWS and a tile of B_ROWS = N
template <int HEAD_SIZE, int A_ROWS, int B_ROWS, int N> GPU void hopper_products(float (&d)[N], uint32_t a, uint32_t b) {
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 16; i++) {
        uint32_t within = (uint32_t)(i % 4) * 32, panel = (uint32_t)(i / 4);
        wgmma_rows(d, tile_descriptor(a + panel * (A_ROWS * 128) + within, 16), tile_descriptor(b + panel * (B_ROWS * 128) + within, 16), i > 0);
    }
}
// d (64, HEAD_SIZE) += p (64, ROWS) · b, b a tile of ROWS
template <int ROWS, int N> GPU void hopper_sums(float (&d)[N], const uint32_t* p, uint32_t b) {
    UNROLL
    for (int i = 0; i < ROWS / 16; i++) { wgmma_columns(d, p + 4 * i, tile_descriptor(b + (uint32_t)i * 2048, ROWS * 128)); }
}
template <int N> GPU void hopper_pack(uint32_t (&p)[N], const float (&s)[2 * N]) {
    UNROLL
    for (int i = 0; i < N; i++) { p[i] = pack_bf16(s[2 * i], s[2 * i + 1]); }
}

// Of a result d (64, N) a thread has, of rows g and g + 8 of its warp's 16 (g = lane / 4), the columns 8i + 2t and 8i + 2t + 1 (t = lane % 4): element
// 4i + 2·(second row) + (second column).
GPU int hopper_row() { return (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4; }  // the first, within the block's tile
GPU int hopper_column() { return (int)threadIdx.x % 4 * 2; }                              // of i = 0

// s becomes probabilities against the new maximum `top` (of its rows, in units of log2); `total`: this thread's part of the sums. factor: what sums so far
// have to be scaled by
GPU void hopper_softmax(float (&s)[64], float (&top)[2], float (&total)[2], float (&factor)[2], float scale) {
    UNROLL
    for (int r = 0; r < 2; r++) {
        float high = s[2 * r];
        UNROLL
        for (int i = 0; i < 16; i++) { high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1])); }
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
        high = fmaxf(top[r], high * scale);
        float base = high == -INFINITY ? 0.0f : high, sum = 0.0f;
        factor[r] = exp2_fast(top[r] - base);
        top[r] = high;
        UNROLL
        for (int i = 0; i < 32; i++) {
            float* e = &s[i / 2 * 4 + 2 * r + i % 2];
            *e = exp2_fast(fma_of(*e, scale, -base));
            sum += *e;
        }
        total[r] = fma_of(total[r], factor[r], sum);
    }
}

// Rows of d (64, HEAD_SIZE), scaled, to a head of a matrix; where `rotary` is given, turned back as StoreGradient of attention.cuh does
template <int HEAD_SIZE> GPU void hopper_store(bf16* head, int64_t ld, const float (&d)[HEAD_SIZE / 2], float scale, const float* rotary, int first, int T) {
    constexpr int HALF = HEAD_SIZE / 2, PAIRED = HALF / 8;  // column 8i + … goes with 8(i + PAIRED) + …
    UNROLL
    for (int r = 0; r < 2; r++) {
        int at = first + hopper_row() + 8 * r;
        if (at >= T) { continue; }
        uint32_t* to = (uint32_t*)(head + (int64_t)at * ld + hopper_column());
        UNROLL
        for (int i = 0; i < PAIRED; i++) {
            float a[2], b[2];
            UNROLL
            for (int k = 0; k < 2; k++) {
                a[k] = d[4 * i + 2 * r + k] * scale;
                b[k] = d[4 * (i + PAIRED) + 2 * r + k] * scale;
                if (rotary != NULL) {
                    const float* turn = rotary + (int64_t)at * HALF + 8 * i + hopper_column() + k;
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

#endif

// grid (tiles of queries, heads, B)
template <int HEAD_SIZE, bool CAUSAL>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_forward_hopper(bf16* out, float* lse, const bf16* qkv, float scale, int T, int heads) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char hopper_memory[];
    constexpr uint32_t TILE = (uint32_t)hopper_tile(HOPPER_KEYS, HEAD_SIZE);
    int C = heads * HEAD_SIZE, head = (int)blockIdx.y, block = CAUSAL ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x, first = block * HOPPER_ROWS;
    int64_t ld = 3 * (int64_t)C;
    const bf16* q_head = qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    const bf16 *k_head = q_head + C, *v_head = k_head + C;
    uint32_t q = (shared_address(hopper_memory) + 1023) / 1024 * 1024, k = q + TILE, v = k + 2 * TILE;  // two stages each
    int seen = CAUSAL ? min_of(T, first + HOPPER_ROWS) : T, tiles = ceil_div(seen, HOPPER_KEYS);
    // step j takes tile tiles-1-j
    auto load_k = [&](int j) { hopper_load<HEAD_SIZE, HOPPER_KEYS>(k + (uint32_t)(j & 1) * TILE, k_head, ld, (tiles - 1 - j) * HOPPER_KEYS, T); };
    auto load_v = [&](int j) { hopper_load<HEAD_SIZE, HOPPER_KEYS>(v + (uint32_t)(j & 1) * TILE, v_head, ld, (tiles - 1 - j) * HOPPER_KEYS, T); };
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(q, q_head, ld, first, T);
    load_k(0);
    cp_async_commit();
    hopper_arrived();
    load_v(0);
    if (tiles > 1) { load_k(1); }
    cp_async_commit();

    q += (uint32_t)threadIdx.x / 128 * (64 * 128);  // this warpgroup's rows
    float s[64], o[HEAD_SIZE / 2], top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, factor[2];
    uint32_t p[32];
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 2; i++) { o[i] = 0.0f; }
    wgmma_fence();
    hopper_products<HEAD_SIZE, HOPPER_ROWS, HOPPER_KEYS>(s, q, k);
    wgmma_commit();
    wgmma_wait<0>();
    int row = first + hopper_row();
    UNROLL
    for (int i = 0; i < 64; i++) {
        int key = (tiles - 1) * HOPPER_KEYS + i / 4 * 8 + hopper_column() + i % 2, limit = CAUSAL ? min_of(T, row + 1 + i / 2 % 2 * 8) : T;
        if (key >= limit) { s[i] = -INFINITY; }
    }
    hopper_softmax(s, top, total, factor, scale);
    hopper_pack(p, s);
    for (int j = 0; j + 1 < tiles; j++) {
        hopper_arrived();  // K of step j+1 and V of step j; all are done with K of step j and V of step j-1
        if (j + 2 < tiles) { load_k(j + 2); }
        load_v(j + 1);
        cp_async_commit();
        wgmma_fence();
        hopper_products<HEAD_SIZE, HOPPER_ROWS, HOPPER_KEYS>(s, q, k + (uint32_t)((j + 1) & 1) * TILE);
        wgmma_commit();
        hopper_sums<HOPPER_KEYS>(o, p, v + (uint32_t)(j & 1) * TILE);
        wgmma_commit();
        wgmma_wait<1>();
        hopper_softmax(s, top, total, factor, scale);
        wgmma_wait<0>();
        UNROLL
        for (int i = 0; i < HEAD_SIZE / 2; i++) { o[i] *= factor[i / 2 % 2]; }
        hopper_pack(p, s);
    }
    hopper_arrived();
    wgmma_fence();
    hopper_sums<HOPPER_KEYS>(o, p, v + (uint32_t)((tiles - 1) & 1) * TILE);
    wgmma_commit();
    wgmma_wait<0>();

    UNROLL
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        int at = row + 8 * r;
        if (threadIdx.x % 4 == 0 && at < T) { lse[((int64_t)blockIdx.z * heads + head) * T + at] = (top[r] + log2f(total[r])) * 0.693147181f; }
        total[r] = 1.0f / total[r];
    }
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 2; i++) { o[i] *= total[i / 2 % 2]; }
    hopper_store<HEAD_SIZE>(out + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE, C, o, 1.0f, NULL, first, T);
#else
    (void)out; (void)lse; (void)qkv; (void)scale; (void)T; (void)heads;
#endif
}

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

// dK and dV. grid (tiles of keys, heads, B)
template <int HEAD_SIZE, bool CAUSAL> __global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_backward_keys_hopper(FlashBackward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char hopper_memory[];
    constexpr uint32_t OWN = (uint32_t)hopper_tile(HOPPER_ROWS, HEAD_SIZE), TILE = (uint32_t)hopper_tile(HOPPER_PASSING, HEAD_SIZE);
    constexpr int N = HOPPER_PASSING;
    int T = a.T, C = a.heads * HEAD_SIZE, head = (int)blockIdx.y, first = (int)blockIdx.x * HOPPER_ROWS;
    int64_t ld = 3 * (int64_t)C, of_head = ((int64_t)blockIdx.z * a.heads + head) * T;
    const bf16* q_head = a.qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    const bf16* dout_head = a.dout + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE;
    const float *lse_head = a.lse + of_head, *delta_head = a.delta + of_head;
    uint32_t k = (shared_address(hopper_memory) + 1023) / 1024 * 1024, v = k + OWN, q = v + OWN, dout = q + BACKWARD_STAGES * TILE;
    float* lines = (float*)(hopper_memory + (dout + BACKWARD_STAGES * TILE - shared_address(hopper_memory)));  // (stages, 2, N): lse, delta
    int begin = CAUSAL ? first / N : 0, tiles = ceil_div(T, N);
    auto load = [&](int j) {
        uint32_t stage = (uint32_t)(j % BACKWARD_STAGES);
        hopper_load<HEAD_SIZE, N>(q + stage * TILE, q_head, ld, j * N, T);
        hopper_load<HEAD_SIZE, N>(dout + stage * TILE, dout_head, C, j * N, T);
        int i = (int)threadIdx.x, at = j * N + i % N;
        if (i < 2 * N) { cp_async_4(shared_address(lines + stage * 2 * N + i), (i < N ? lse_head : delta_head) + (at < T ? at : 0), at < T); }
    };
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(k, q_head + C, ld, first, T);
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(v, q_head + 2 * C, ld, first, T);
    load(begin);
    cp_async_commit();

    uint32_t group = (uint32_t)threadIdx.x / 128 * (64 * 128);
    float s[N / 2], dp[N / 2], x[N / 2], dk[HEAD_SIZE / 2], dv[HEAD_SIZE / 2], scale = 1.44269504f * a.factor;
    uint32_t p[N / 4], ds[N / 4];
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 2; i++) { dk[i] = dv[i] = 0.0f; }
    int row = first + hopper_row();
    for (int j = begin; j < tiles; j++) {
        uint32_t stage = (uint32_t)(j % BACKWARD_STAGES);
        hopper_arrived();  // this tile; all are done with the one before
        if (j + 1 < tiles) { load(j + 1); }
        cp_async_commit();
        wgmma_fence();
        hopper_products<HEAD_SIZE, HOPPER_ROWS, N>(s, k + group, q + stage * TILE);
        wgmma_commit();
        hopper_products<HEAD_SIZE, HOPPER_ROWS, N>(dp, v + group, dout + stage * TILE);
        wgmma_commit();
        wgmma_wait<1>();
        const float* line = lines + stage * 2 * N + hopper_column();
        bool diagonal = CAUSAL && j * N < first + HOPPER_ROWS;
        UNROLL
        for (int i = 0; i < N / 8; i++) {
            float2 base = *(const float2*)(line + 8 * i);
            int query = j * N + 8 * i + hopper_column();
            UNROLL
            for (int r = 0; r < 2; r++) {
                int e = 4 * i + 2 * r, key = row + 8 * r;
                x[e] = exp2_fast(fma_of(s[e], scale, base.x * -1.44269504f));
                x[e + 1] = exp2_fast(fma_of(s[e + 1], scale, base.y * -1.44269504f));
                if (diagonal && query < key) { x[e] = 0.0f; }
                if (diagonal && query + 1 < key) { x[e + 1] = 0.0f; }
                p[e / 2] = pack_bf16(x[e], x[e + 1]);
            }
        }
        wgmma_fence();
        hopper_sums<N>(dv, p, dout + stage * TILE);
        wgmma_commit();
        wgmma_wait<1>();
        UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            float2 delta = *(const float2*)(line + N + e / 4 * 8);
            ds[e / 2] = pack_bf16(x[e] * (dp[e] - delta.x), x[e + 1] * (dp[e + 1] - delta.y));
        }
        wgmma_fence();
        hopper_sums<N>(dk, ds, q + stage * TILE);
        wgmma_commit();
        wgmma_wait<0>();
    }
    bf16* dq_head = a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    hopper_store<HEAD_SIZE>(dq_head + C, ld, dk, a.factor, a.rotary, first, T);
    hopper_store<HEAD_SIZE>(dq_head + 2 * C, ld, dv, 1.0f, NULL, first, T);
#else
    (void)a;
#endif
}

// dQ. grid (tiles of queries, heads, B)
template <int HEAD_SIZE, bool CAUSAL> __global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_backward_queries_hopper(FlashBackward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char hopper_memory[];
    constexpr uint32_t OWN = (uint32_t)hopper_tile(HOPPER_ROWS, HEAD_SIZE), TILE = (uint32_t)hopper_tile(HOPPER_PASSING, HEAD_SIZE);
    constexpr int N = HOPPER_PASSING;
    int T = a.T, C = a.heads * HEAD_SIZE, head = (int)blockIdx.y, first = (CAUSAL ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x) * HOPPER_ROWS;
    int64_t ld = 3 * (int64_t)C, of_head = ((int64_t)blockIdx.z * a.heads + head) * T;
    const bf16* q_head = a.qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    const bf16* dout_head = a.dout + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE;
    uint32_t q = (shared_address(hopper_memory) + 1023) / 1024 * 1024, dout = q + OWN, k = dout + OWN, v = k + BACKWARD_STAGES * TILE;
    int tiles = ceil_div(CAUSAL ? min_of(T, first + HOPPER_ROWS) : T, N);
    auto load = [&](int j) {
        uint32_t stage = (uint32_t)(j % BACKWARD_STAGES);
        hopper_load<HEAD_SIZE, N>(k + stage * TILE, q_head + C, ld, j * N, T);
        hopper_load<HEAD_SIZE, N>(v + stage * TILE, q_head + 2 * C, ld, j * N, T);
    };
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(q, q_head, ld, first, T);
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(dout, dout_head, C, first, T);
    load(0);
    cp_async_commit();

    uint32_t group = (uint32_t)threadIdx.x / 128 * (64 * 128);
    float s[N / 2], dp[N / 2], x[N / 2], dq[HEAD_SIZE / 2], base[2], delta[2], scale = 1.44269504f * a.factor;
    uint32_t ds[N / 4];
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 2; i++) { dq[i] = 0.0f; }
    int row = first + hopper_row();
    UNROLL
    for (int r = 0; r < 2; r++) {
        bool there = row + 8 * r < T;
        base[r] = there ? a.lse[of_head + row + 8 * r] * 1.44269504f : 0.0f;
        delta[r] = there ? a.delta[of_head + row + 8 * r] : 0.0f;
    }
    for (int j = 0; j < tiles; j++) {
        uint32_t stage = (uint32_t)(j % BACKWARD_STAGES);
        hopper_arrived();
        if (j + 1 < tiles) { load(j + 1); }
        cp_async_commit();
        wgmma_fence();
        hopper_products<HEAD_SIZE, HOPPER_ROWS, N>(s, q + group, k + stage * TILE);
        wgmma_commit();
        hopper_products<HEAD_SIZE, HOPPER_ROWS, N>(dp, dout + group, v + stage * TILE);
        wgmma_commit();
        wgmma_wait<1>();
        bool masks = (CAUSAL && (j + 1) * N > first) || (j + 1) * N > T;
        UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            int r = e / 2 % 2, key = j * N + e / 4 * 8 + hopper_column(), limit = CAUSAL ? min_of(T, row + 8 * r + 1) : T;
            x[e] = exp2_fast(fma_of(s[e], scale, -base[r]));
            x[e + 1] = exp2_fast(fma_of(s[e + 1], scale, -base[r]));
            if (masks && key >= limit) { x[e] = 0.0f; }
            if (masks && key + 1 >= limit) { x[e + 1] = 0.0f; }
        }
        wgmma_wait<0>();
        UNROLL
        for (int e = 0; e < N / 2; e += 2) {
            float of_row = delta[e / 2 % 2];
            ds[e / 2] = pack_bf16(x[e] * (dp[e] - of_row), x[e + 1] * (dp[e + 1] - of_row));
        }
        wgmma_fence();
        hopper_sums<N>(dq, ds, k + stage * TILE);
        wgmma_commit();
        wgmma_wait<0>();
    }
    hopper_store<HEAD_SIZE>(a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE, ld, dq, a.factor, a.rotary, first, T);
#else
    (void)a;
#endif
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
// Does the selected GPU run this file's kernels as they were built? They need code for 90a.
__global__ void hopper_is_built(int* built) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    *built = 1;
#else
    *built = 0;
#endif
}
static inline bool flash_is_built(void) {
    static int built = -1;
    if (built < 0) {
        int* d = (int*)device_alloc(sizeof(int));
        launch(hopper_is_built, dim3(1), dim3(1), 0, (Stream)NULL, d);
        copy_to_host(&built, d, sizeof(int), NULL);
        device_free(d);
    }
    return built == 1;
}

template <class F> static inline void with_hopper_form(int head_size, bool causal, F f) {
    std::integral_constant<int, 64> small;
    std::integral_constant<int, 128> large;
    if (head_size == 64) { causal ? f(small, std::true_type{}) : f(small, std::false_type{}); }
    else if (head_size == 128) { causal ? f(large, std::true_type{}) : f(large, std::false_type{}); }
    else { die("attention for Hopper has no head size of %d", head_size); }
}

// out (B, T, C) and lse (B, heads, T) = logsumexp of the scores over √hs from qkv (B, T, 3C), positions applied
static inline void flash_forward(bf16* out, float* lse, const bf16* qkv, bool causal, int B, int T, int heads, int head_size, Stream s) {
    dim3 grid((unsigned)ceil_div(T, HOPPER_ROWS), (unsigned)heads, (unsigned)B), block(HOPPER_THREADS);
    float scale = 1.44269504f / sqrtf((float)head_size);
    with_hopper_form(head_size, causal, [&](auto size, auto masked) {
        constexpr int HS = decltype(size)::value;
        launch(flash_forward_hopper<HS, decltype(masked)::value>, grid, block, hopper_forward_shared(HS), s, out, lse, qkv, scale, T, heads);
    });
}

// dqkv (B, T, 3C) from dout and out (B, T, C), qkv and lse; queries' and keys' gradients are turned back by `rotary` (2, T, hs/2), cos, then sin, if it is given.
// delta (B, heads, T) is workspace.
static inline void flash_backward(bf16* dqkv, float* delta, const bf16* dout, const bf16* out, const bf16* qkv, const float* lse, const float* rotary, bool causal,
                                  int B, int T, int heads, int head_size, Stream s) {
    dim3 grid((unsigned)ceil_div(T, HOPPER_ROWS), (unsigned)heads, (unsigned)B), block(HOPPER_THREADS);
    int64_t all = (int64_t)B * T * heads;
    launch(flash_delta_kernel, dim3((unsigned)((all + 7) / 8)), dim3(256), 0, s, delta, dout, out, T, heads, head_size, all);
    FlashBackward a = {dqkv, dout, qkv, lse, delta, rotary, 1.0f / sqrtf((float)head_size), T, heads};
    with_hopper_form(head_size, causal, [&](auto size, auto masked) {
        constexpr int HS = decltype(size)::value;
        launch(flash_backward_keys_hopper<HS, decltype(masked)::value>, grid, block, hopper_backward_shared(HS), s, a);
        launch(flash_backward_queries_hopper<HS, decltype(masked)::value>, grid, block, hopper_backward_shared(HS), s, a);
    });
}

#endif
