// flash_hopper.cuh: attention for Hopper's warpgroup products (wgmma), forward and backward, for head sizes 64 and 128.
//
// See flash_parts.cuh. A block is two warpgroups, each with 64 rows of an own tile of 128; the other side's tiles pass by in stages of shared memory. wgmma runs
// beside its warps:
//
//     forward   S' = Q·K'ᵀ of the next tile and O += P·V of this one are issued; S' is waited for, P' = softmax(S') is made; then O is scaled
//     dK, dV    S = K·Qᵀ and dP = V·dOᵀ (both transposed: a row is a key) are issued; P is made while dP is computed, dS = P∘(dP - δ) while dV += P·dO is;
//               then dK += dS·Q
//     dQ        S = Q·Kᵀ and dP = dO·Vᵀ likewise; dQ += dS·K
//
// No sum depends on timing. Forward takes tiles from the last to the first, so that only the first one taken needs masks.
//
// A tile in shared memory is made of panels of 64 columns; a row of a panel is 128 bytes, whose 16-byte chunks are exchanged by the row's last three bits,
// as wgmma's 128-byte swizzle wants it. The same tile serves as an operand by rows (its columns are summed over) and by columns (its rows are).
#pragma once
#include "flash_parts.cuh"
#include <type_traits>

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

template <int HEAD_SIZE, int ROWS> GPU void hopper_load(uint32_t tile, const bf16* head, int64_t ld, int first, int T) {
    auto place = [=](int row, int chunk) { return tile + (uint32_t)(chunk / 8 * (ROWS * 128) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16); };
    flash_load<HEAD_SIZE, ROWS, HOPPER_THREADS>(place, head, ld, first, T);
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
// dS = P∘(dP - δ) where rows are keys, and δ of queries lie at `line`; and where rows are queries
template <int N> GPU void hopper_dscores_of_keys(uint32_t (&ds)[N / 2], const float (&p)[N], const float (&dp)[N], const float* line) {
    UNROLL
    for (int e = 0; e < N; e += 2) {
        float2 delta = *(const float2*)(line + e / 4 * 8 + flash_column());
        ds[e / 2] = pack_bf16(p[e] * (dp[e] - delta.x), p[e + 1] * (dp[e + 1] - delta.y));
    }
}
template <int N> GPU void hopper_dscores_of_queries(uint32_t (&ds)[N / 2], const float (&p)[N], const float (&dp)[N], const float (&delta)[2]) {
    UNROLL
    for (int e = 0; e < N; e += 2) {
        float of_row = delta[e / 2 % 2];
        ds[e / 2] = pack_bf16(p[e] * (dp[e] - of_row), p[e + 1] * (dp[e + 1] - of_row));
    }
}
// The thread's first row, within the block's tile
GPU int hopper_row() { return (int)threadIdx.x / 32 * 16 + flash_row(); }

#endif

// grid (tiles of queries, heads, B)
template <int HEAD_SIZE, bool CAUSAL>
__global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_forward_hopper(bf16* out, float* lse, const bf16* qkv, float scale, int T, int heads) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SHARED(hopper_memory);
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
    flash_mask(s, (tiles - 1) * HOPPER_KEYS, row, CAUSAL, T);
    flash_softmax(s, top, total, factor, scale);
    flash_pack(p, s);
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
        flash_softmax(s, top, total, factor, scale);
        wgmma_wait<0>();
        flash_scale(o, factor);
        flash_pack(p, s);
    }
    hopper_arrived();
    wgmma_fence();
    hopper_sums<HOPPER_KEYS>(o, p, v + (uint32_t)((tiles - 1) & 1) * TILE);
    wgmma_commit();
    wgmma_wait<0>();

    flash_close(o, total, top, lse + ((int64_t)blockIdx.z * heads + head) * T, row, T);
    flash_store<HEAD_SIZE>(out + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE, C, o, 1.0f, NULL, row, T);
#else
    (void)out; (void)lse; (void)qkv; (void)scale; (void)T; (void)heads;
#endif
}

// dK and dV. grid (tiles of keys, heads, B)
template <int HEAD_SIZE, bool CAUSAL> __global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_backward_keys_hopper(FlashBackward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SHARED(hopper_memory);
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
        flash_load_lines<N>(lines + stage * 2 * N, lse_head, delta_head, j * N, T);
    };
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(k, q_head + C, ld, first, T);
    hopper_load<HEAD_SIZE, HOPPER_ROWS>(v, q_head + 2 * C, ld, first, T);
    load(begin);
    cp_async_commit();

    uint32_t group = (uint32_t)threadIdx.x / 128 * (64 * 128);
    float s[N / 2], dp[N / 2], x[N / 2], dk[HEAD_SIZE / 2], dv[HEAD_SIZE / 2], scale = LOG2_E * a.factor;
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
        const float* line = lines + stage * 2 * N;
        flash_probs_of_keys(x, s, line, scale, j * N, row, CAUSAL && j * N < first + HOPPER_ROWS);
        flash_pack(p, x);
        wgmma_fence();
        hopper_sums<N>(dv, p, dout + stage * TILE);
        wgmma_commit();
        wgmma_wait<1>();
        hopper_dscores_of_keys(ds, x, dp, line + N);
        wgmma_fence();
        hopper_sums<N>(dk, ds, q + stage * TILE);
        wgmma_commit();
        wgmma_wait<0>();
    }
    bf16* dq_head = a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    flash_store<HEAD_SIZE>(dq_head + C, ld, dk, a.factor, a.rotary, row, T);
    flash_store<HEAD_SIZE>(dq_head + 2 * C, ld, dv, 1.0f, NULL, row, T);
#else
    (void)a;
#endif
}

// dQ. grid (tiles of queries, heads, B)
template <int HEAD_SIZE, bool CAUSAL> __global__ void __launch_bounds__(HOPPER_THREADS, 1) flash_backward_queries_hopper(FlashBackward a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    DYNAMIC_SHARED(hopper_memory);
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
    float s[N / 2], dp[N / 2], x[N / 2], dq[HEAD_SIZE / 2], base[2], delta[2], scale = LOG2_E * a.factor;
    uint32_t ds[N / 4];
    UNROLL
    for (int i = 0; i < HEAD_SIZE / 2; i++) { dq[i] = 0.0f; }
    int row = first + hopper_row();
    flash_query_lines(base, delta, a.lse + of_head, a.delta + of_head, row, T);
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
        flash_probs_of_queries(x, s, base, scale, j * N, row, CAUSAL, T, (CAUSAL && (j + 1) * N > first) || (j + 1) * N > T);
        wgmma_wait<0>();
        hopper_dscores_of_queries(ds, x, dp, delta);
        wgmma_fence();
        hopper_sums<N>(dq, ds, k + stage * TILE);
        wgmma_commit();
        wgmma_wait<0>();
    }
    flash_store<HEAD_SIZE>(a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE, ld, dq, a.factor, a.rotary, row, T);
#else
    (void)a;
#endif
}

template <class F> static inline void with_hopper_form(int head_size, bool causal, F f) {
    std::integral_constant<int, 64> small;
    std::integral_constant<int, 128> large;
    if (head_size == 64) { causal ? f(small, std::true_type{}) : f(small, std::false_type{}); }
    else if (head_size == 128) { causal ? f(large, std::true_type{}) : f(large, std::false_type{}); }
    else { die("attention for Hopper has no head size of %d", head_size); }
}

static inline dim3 hopper_grid(int B, int T, int heads) { return dim3((unsigned)ceil_div(T, HOPPER_ROWS), (unsigned)heads, (unsigned)B); }

// As flash_forward and flash_backward of flash.cuh
static inline void hopper_forward(bf16* out, float* lse, const bf16* qkv, bool causal, int B, int T, int heads, int head_size, Stream s) {
    float scale = LOG2_E / sqrtf((float)head_size);
    with_hopper_form(head_size, causal, [&](auto size, auto masked) {
        constexpr int HS = decltype(size)::value;
        launch(flash_forward_hopper<HS, decltype(masked)::value>, hopper_grid(B, T, heads), dim3(HOPPER_THREADS), hopper_forward_shared(HS), s, out, lse, qkv, scale, T, heads);
    });
}
static inline void hopper_backward(const FlashBackward& a, bool causal, int B, int head_size, Stream s) {
    dim3 grid = hopper_grid(B, a.T, a.heads), block(HOPPER_THREADS);
    with_hopper_form(head_size, causal, [&](auto size, auto masked) {
        constexpr int HS = decltype(size)::value;
        launch(flash_backward_keys_hopper<HS, decltype(masked)::value>, grid, block, hopper_backward_shared(HS), s, a);
        launch(flash_backward_queries_hopper<HS, decltype(masked)::value>, grid, block, hopper_backward_shared(HS), s, a);
    });
}

#endif
