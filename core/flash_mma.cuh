// flash_mma.cuh: attention by mma.sync, forward and backward, for head sizes 32, 64, 96 and 128 on GPUs from 8.0 (Ampere) on. See flash_parts.cuh.
//
// A block's own tile has 128 rows: four warps take 32 each where registers allow (a fragment of the passing tile then serves two products), eight warps 16 each
// in the backward pass of large heads. Own rows stay in shared memory and are loaded as fragments where they are needed.
//
//     forward   K's and V's passing tiles have one place each; K's next tile comes while the softmax and O += P·V are made, V's while S = Q·Kᵀ is
//     dK, dV    tiles of Q and dO pass by in two stages. S = K·Qᵀ (a row is a key), dV += P·dO, dP - δ = V·dOᵀ - δ, dK += dS·Q
//     dQ        tiles of K and V pass by in two stages. S = Q·Kᵀ, dP - δ = dO·Vᵀ - δ, dQ += dS·K
//
// A warp skips tiles of which its rows see nothing, and masks only where a tile reaches beyond the diagonal or the sequence. All is made to fit into the 99 KB of
// shared memory that a block can have on 8.6, 8.9 and 12.0.
//
// A tile in shared memory has its rows one after the other, in chunks of 16 bytes, which change places within a row so that the eight rows that a matrix of
// ldmatrix takes lie in different banks: 128 bytes are all banks, so rows of 128 and 256 bytes exchange chunks by the row's last three bits; of rows of 64 and 192
// bytes two neighbours lie half the banks apart already, and two bits of each pair's number do.
#pragma once
#include "flash_parts.cuh"
#include <type_traits>

#ifdef GPU_FORM

constexpr int MMA_ROWS = 128;     // of a block's own tile
constexpr int MMA_STAGES = 2;     // of tiles that pass by in the backward pass
constexpr size_t MMA_MOST_SHARED = 99 << 10;

template <int HEAD_SIZE> struct MmaForm {
    static constexpr int KEYS = HEAD_SIZE <= 64 ? 64 : 32;        // of a tile that passes by in the forward pass
    static constexpr int PASSING = 32;                            // rows of one that passes by in the backward pass
    static constexpr int THREADS = 128, BACKWARD_THREADS = HEAD_SIZE <= 64 ? 128 : 256;
    static constexpr int TILES = MMA_ROWS * 2 / THREADS, BACKWARD_TILES = MMA_ROWS * 2 / BACKWARD_THREADS;  // a warp's own rows, in sixteens
    static constexpr size_t ROW = HEAD_SIZE * 2;                  // bytes
    static constexpr size_t SHARED = (MMA_ROWS + 2 * KEYS) * ROW;
    static constexpr size_t BACKWARD_SHARED = 2 * MMA_ROWS * ROW + MMA_STAGES * (2 * PASSING * ROW + 2 * PASSING * sizeof(float));
    static_assert(SHARED <= MMA_MOST_SHARED && BACKWARD_SHARED <= MMA_MOST_SHARED, "tiles fit into a block's shared memory");
};

#if defined(SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
#define MMA_THERE
#endif

#ifdef MMA_THERE

// Where chunk `chunk` of a tile's row is
template <int HEAD_SIZE> GPU SharedAddress mma_place(SharedAddress tile, int row, int chunk) {
    constexpr int CHUNKS = HEAD_SIZE / 8;
    int turned = chunk ^ (CHUNKS % 8 == 0 ? row % 8 : row / 2 % 4);
    return tile + (SharedAddress)((row * CHUNKS + turned) * 16);
}
// and where chunk + 2k of the same row is, seen from `at`, the place of chunk 0 or 1
template <int HEAD_SIZE> GPU SharedAddress mma_step(SharedAddress at, int k) {
    constexpr int EXCHANGED = HEAD_SIZE % 64 == 0 ? 128 : 64;  // bytes within which chunks change places; tiles begin at multiples of it
    return (at ^ (SharedAddress)(32 * k % EXCHANGED)) + (SharedAddress)(32 * k / EXCHANGED * EXCHANGED);
}
template <int HEAD_SIZE, int ROWS, int THREADS> GPU void mma_load(SharedAddress tile, const bf16* head, int64_t ld, int first, int T) {
    flash_load<HEAD_SIZE, ROWS, THREADS>([=](int row, int chunk) { return mma_place<HEAD_SIZE>(tile, row, chunk); }, head, ld, first, T);
}

template <int TILES, int N> GPU void mma_clear(float (&x)[TILES][N]) {
    UNROLL
    for (int m = 0; m < TILES; m++) {
        UNROLL
        for (int i = 0; i < N; i++) { x[m][i] = 0.0f; }
    }
}

// s (16·TILES, N) += rows row, row + 1, … of tile a · bᵀ, b a tile of N rows
template <int HEAD_SIZE, int TILES, int N> GPU void mma_products(float (&s)[TILES][N / 2], SharedAddress a, int row, SharedAddress b) {
    constexpr SharedAddress SIXTEEN = 16 * HEAD_SIZE * 2;  // rows
    int lane = (int)threadIdx.x % 32;
    SharedAddress of_a = mma_place<HEAD_SIZE>(a, row + lane % 16, lane / 16), of_b = mma_place<HEAD_SIZE>(b, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    UNROLL
    for (int k = 0; k < HEAD_SIZE / 16; k++) {
        uint32_t x[TILES][4], y[4];
        UNROLL
        for (int m = 0; m < TILES; m++) { ldmatrix(x[m], mma_step<HEAD_SIZE>(of_a, k) + m * SIXTEEN); }
        UNROLL
        for (int j = 0; j < N / 16; j++) {
            ldmatrix(y, mma_step<HEAD_SIZE>(of_b, k) + j * SIXTEEN);
            UNROLL
            for (int m = 0; m < TILES; m++) {
                mma_bf16(&s[m][8 * j], x[m], y);
                mma_bf16(&s[m][8 * j + 4], x[m], y + 2);
            }
        }
    }
}
// o (16·TILES, HEAD_SIZE) += p (16·TILES, N) · b, b a tile of N rows
template <int HEAD_SIZE, int TILES, int N> GPU void mma_sums(float (&o)[TILES][HEAD_SIZE / 2], const uint32_t (&p)[TILES][N / 4], SharedAddress b) {
    constexpr SharedAddress SIXTEEN = 16 * HEAD_SIZE * 2;  // rows
    SharedAddress of_b = mma_place<HEAD_SIZE>(b, (int)threadIdx.x % 16, (int)threadIdx.x % 32 / 16);
    UNROLL
    for (int k = 0; k < N / 16; k++) {
        UNROLL
        for (int j = 0; j < HEAD_SIZE / 16; j++) {
            uint32_t y[4];
            ldmatrix_turned(y, mma_step<HEAD_SIZE>(of_b, j) + k * SIXTEEN);
            UNROLL
            for (int m = 0; m < TILES; m++) {
                mma_bf16(&o[m][8 * j], &p[m][4 * k], y);
                mma_bf16(&o[m][8 * j + 4], &p[m][4 * k], y + 2);
            }
        }
    }
}
// What dP - δ starts from; δ of columns lie at `line`
template <int N> GPU void mma_less_of_columns(float (&dp)[N], const float* line) {
    UNROLL
    for (int i = 0; i < N; i += 4) {
        float2 delta = *(const float2*)(line + 2 * i + flash_column());
        dp[i] = dp[i + 2] = -delta.x;
        dp[i + 1] = dp[i + 3] = -delta.y;
    }
}
template <int N> GPU void mma_less_of_rows(float (&dp)[N], const float (&delta)[2]) {
    UNROLL
    for (int i = 0; i < N; i++) { dp[i] = -delta[i / 2 % 2]; }
}
// dS = P∘(dP - δ)
template <int N> GPU void mma_pack_product(uint32_t (&ds)[N / 2], const float (&p)[N], const float (&dp)[N]) {
    UNROLL
    for (int i = 0; i < N / 2; i++) { ds[i] = pack_bf16(p[2 * i] * dp[2 * i], p[2 * i + 1] * dp[2 * i + 1]); }
}
// The copies so far are there, for all threads, which are done with what they read before
GPU void mma_arrived() {
    cp_async_wait<0>();
    __syncthreads();
}

#endif

// grid (tiles of queries, heads, B)
template <int HEAD_SIZE>
__global__ void __launch_bounds__(MmaForm<HEAD_SIZE>::THREADS, 2) flash_forward_mma(bf16* out, float* lse, const bf16* qkv, float scale, bool causal, int T, int heads) {
#ifdef MMA_THERE
    typedef MmaForm<HEAD_SIZE> Form;
    constexpr int TILES = Form::TILES, N = Form::KEYS;
    DYNAMIC_SHARED(memory);
    int C = heads * HEAD_SIZE, head = (int)blockIdx.y, first = (causal ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x) * MMA_ROWS;
    int64_t ld = 3 * (int64_t)C;
    const bf16* q_head = qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    SharedAddress q = shared_address(memory), k = q + MMA_ROWS * Form::ROW, v = k + N * Form::ROW;
    int tiles = ceil_div(causal ? min_of(T, first + MMA_ROWS) : T, N);
    auto load_k = [=](int j) { mma_load<HEAD_SIZE, N, Form::THREADS>(k, q_head + C, ld, j * N, T); };
    mma_load<HEAD_SIZE, MMA_ROWS, Form::THREADS>(q, q_head, ld, first, T);
    load_k(0);
    cp_async_commit();

    float s[TILES][N / 2], o[TILES][HEAD_SIZE / 2], top[TILES][2], total[TILES][2], factor[2];
    uint32_t p[TILES][N / 4];
    mma_clear(o);
    mma_clear(total);
    UNROLL
    for (int m = 0; m < TILES; m++) { top[m][0] = top[m][1] = -INFINITY; }
    int warp = (int)threadIdx.x / 32 * (16 * TILES), row = first + warp;  // the warp's first
    for (int j = 0; j < tiles; j++) {
        bool sees = !causal || j * N < row + 16 * TILES;
        mma_arrived();  // K; all are done with V
        mma_load<HEAD_SIZE, N, Form::THREADS>(v, q_head + 2 * C, ld, j * N, T);
        cp_async_commit();
        if (sees) {
            mma_clear(s);
            mma_products<HEAD_SIZE, TILES, N>(s, q, warp, k);
        }
        mma_arrived();  // V; all are done with K
        if (j + 1 < tiles) { load_k(j + 1); }
        cp_async_commit();
        if (!sees) { continue; }
        UNROLL
        for (int m = 0; m < TILES; m++) {
            if ((causal && (j + 1) * N > row + 16 * m + 1) || (j + 1) * N > T) { flash_mask(s[m], j * N, row + 16 * m + flash_row(), causal, T); }
            flash_softmax(s[m], top[m], total[m], factor, scale);
            flash_scale(o[m], factor);
            flash_pack(p[m], s[m]);
        }
        mma_sums<HEAD_SIZE, TILES, N>(o, p, v);
    }
    UNROLL
    for (int m = 0; m < TILES; m++) {
        int at = row + 16 * m + flash_row();
        flash_close(o[m], total[m], top[m], lse + ((int64_t)blockIdx.z * heads + head) * T, at, T);
        flash_store<HEAD_SIZE>(out + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE, C, o[m], 1.0f, NULL, at, T);
    }
#else
    (void)out; (void)lse; (void)qkv; (void)scale; (void)causal; (void)T; (void)heads;
#endif
}

// dK and dV. grid (tiles of keys, heads, B)
template <int HEAD_SIZE> __global__ void __launch_bounds__(MmaForm<HEAD_SIZE>::BACKWARD_THREADS) flash_backward_keys_mma(FlashBackward a, bool causal) {
#ifdef MMA_THERE
    typedef MmaForm<HEAD_SIZE> Form;
    constexpr int TILES = Form::BACKWARD_TILES, N = Form::PASSING, THREADS = Form::BACKWARD_THREADS;
    constexpr SharedAddress OWN = MMA_ROWS * Form::ROW, TILE = N * Form::ROW;
    DYNAMIC_SHARED(memory);
    int T = a.T, C = a.heads * HEAD_SIZE, head = (int)blockIdx.y, first = (int)blockIdx.x * MMA_ROWS;
    int64_t ld = 3 * (int64_t)C, of_head = ((int64_t)blockIdx.z * a.heads + head) * T;
    const bf16* q_head = a.qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    const bf16* dout_head = a.dout + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE;
    const float *lse_head = a.lse + of_head, *delta_head = a.delta + of_head;
    SharedAddress k = shared_address(memory), v = k + OWN, q = v + OWN, dout = q + MMA_STAGES * TILE;
    float* lines = (float*)(memory + 2 * OWN + 2 * MMA_STAGES * TILE);  // (stages, 2, N): lse, delta
    int begin = causal ? first / N : 0, tiles = ceil_div(T, N);
    auto load = [=](int j) {
        SharedAddress stage = (SharedAddress)(j % MMA_STAGES);
        mma_load<HEAD_SIZE, N, THREADS>(q + stage * TILE, q_head, ld, j * N, T);
        mma_load<HEAD_SIZE, N, THREADS>(dout + stage * TILE, dout_head, C, j * N, T);
        flash_load_lines<N>(lines + stage * 2 * N, lse_head, delta_head, j * N, T);
    };
    mma_load<HEAD_SIZE, MMA_ROWS, THREADS>(k, q_head + C, ld, first, T);
    mma_load<HEAD_SIZE, MMA_ROWS, THREADS>(v, q_head + 2 * C, ld, first, T);
    load(begin);
    cp_async_commit();

    float s[TILES][N / 2], dp[TILES][N / 2], dk[TILES][HEAD_SIZE / 2], dv[TILES][HEAD_SIZE / 2], scale = LOG2_E * a.factor;
    uint32_t p[TILES][N / 4];
    mma_clear(dk);
    mma_clear(dv);
    int warp = (int)threadIdx.x / 32 * (16 * TILES), key = first + warp;  // the warp's first
    for (int j = begin; j < tiles; j++) {
        SharedAddress stage = (SharedAddress)(j % MMA_STAGES);
        mma_arrived();  // this tile; all are done with the one before
        if (j + 1 < tiles) { load(j + 1); }
        cp_async_commit();
        if (causal && (j + 1) * N <= key) { continue; }  // no query of these sees the warp's keys
        const float* line = lines + stage * 2 * N;
        mma_clear(s);
        mma_products<HEAD_SIZE, TILES, N>(s, k, warp, q + stage * TILE);
        UNROLL
        for (int m = 0; m < TILES; m++) {
            flash_probs_of_keys(s[m], s[m], line, scale, j * N, key + 16 * m + flash_row(), causal && j * N < key + 16 * m + 15);
            flash_pack(p[m], s[m]);
        }
        mma_sums<HEAD_SIZE, TILES, N>(dv, p, dout + stage * TILE);
        UNROLL
        for (int m = 0; m < TILES; m++) { mma_less_of_columns(dp[m], line + N); }
        mma_products<HEAD_SIZE, TILES, N>(dp, v, warp, dout + stage * TILE);
        UNROLL
        for (int m = 0; m < TILES; m++) { mma_pack_product(p[m], s[m], dp[m]); }
        mma_sums<HEAD_SIZE, TILES, N>(dk, p, q + stage * TILE);
    }
    bf16* dq_head = a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    UNROLL
    for (int m = 0; m < TILES; m++) {
        int at = key + 16 * m + flash_row();
        flash_store<HEAD_SIZE>(dq_head + C, ld, dk[m], a.factor, a.rotary, at, T);
        flash_store<HEAD_SIZE>(dq_head + 2 * C, ld, dv[m], 1.0f, NULL, at, T);
    }
#else
    (void)a; (void)causal;
#endif
}

// dQ. grid (tiles of queries, heads, B)
template <int HEAD_SIZE> __global__ void __launch_bounds__(MmaForm<HEAD_SIZE>::BACKWARD_THREADS) flash_backward_queries_mma(FlashBackward a, bool causal) {
#ifdef MMA_THERE
    typedef MmaForm<HEAD_SIZE> Form;
    constexpr int TILES = Form::BACKWARD_TILES, N = Form::PASSING, THREADS = Form::BACKWARD_THREADS;
    constexpr SharedAddress OWN = MMA_ROWS * Form::ROW, TILE = N * Form::ROW;
    DYNAMIC_SHARED(memory);
    int T = a.T, C = a.heads * HEAD_SIZE, head = (int)blockIdx.y, first = (causal ? (int)(gridDim.x - 1 - blockIdx.x) : (int)blockIdx.x) * MMA_ROWS;
    int64_t ld = 3 * (int64_t)C, of_head = ((int64_t)blockIdx.z * a.heads + head) * T;
    const bf16* q_head = a.qkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE;
    const bf16* dout_head = a.dout + (int64_t)blockIdx.z * T * C + head * HEAD_SIZE;
    SharedAddress q = shared_address(memory), dout = q + OWN, k = dout + OWN, v = k + MMA_STAGES * TILE;
    int tiles = ceil_div(causal ? min_of(T, first + MMA_ROWS) : T, N);
    auto load = [=](int j) {
        SharedAddress stage = (SharedAddress)(j % MMA_STAGES);
        mma_load<HEAD_SIZE, N, THREADS>(k + stage * TILE, q_head + C, ld, j * N, T);
        mma_load<HEAD_SIZE, N, THREADS>(v + stage * TILE, q_head + 2 * C, ld, j * N, T);
    };
    mma_load<HEAD_SIZE, MMA_ROWS, THREADS>(q, q_head, ld, first, T);
    mma_load<HEAD_SIZE, MMA_ROWS, THREADS>(dout, dout_head, C, first, T);
    load(0);
    cp_async_commit();

    float s[TILES][N / 2], dp[TILES][N / 2], dq[TILES][HEAD_SIZE / 2], base[TILES][2], delta[TILES][2], scale = LOG2_E * a.factor;
    uint32_t ds[TILES][N / 4];
    mma_clear(dq);
    int warp = (int)threadIdx.x / 32 * (16 * TILES), row = first + warp;  // the warp's first
    UNROLL
    for (int m = 0; m < TILES; m++) { flash_query_lines(base[m], delta[m], a.lse + of_head, a.delta + of_head, row + 16 * m + flash_row(), T); }
    for (int j = 0; j < tiles; j++) {
        SharedAddress stage = (SharedAddress)(j % MMA_STAGES);
        mma_arrived();
        if (j + 1 < tiles) { load(j + 1); }
        cp_async_commit();
        if (causal && j * N >= row + 16 * TILES) { continue; }  // the warp's queries see none of these keys
        mma_clear(s);
        mma_products<HEAD_SIZE, TILES, N>(s, q, warp, k + stage * TILE);
        UNROLL
        for (int m = 0; m < TILES; m++) { mma_less_of_rows(dp[m], delta[m]); }
        mma_products<HEAD_SIZE, TILES, N>(dp, dout, warp, v + stage * TILE);
        UNROLL
        for (int m = 0; m < TILES; m++) {
            int at = row + 16 * m;
            bool masks = (causal && (j + 1) * N > at + 1) || (j + 1) * N > T;
            flash_probs_of_queries(s[m], s[m], base[m], scale, j * N, at + flash_row(), causal, T, masks);
            mma_pack_product(ds[m], s[m], dp[m]);
        }
        mma_sums<HEAD_SIZE, TILES, N>(dq, ds, k + stage * TILE);
    }
    UNROLL
    for (int m = 0; m < TILES; m++) {
        flash_store<HEAD_SIZE>(a.dqkv + (int64_t)blockIdx.z * T * ld + head * HEAD_SIZE, ld, dq[m], a.factor, a.rotary, row + 16 * m + flash_row(), T);
    }
#else
    (void)a; (void)causal;
#endif
}

template <class F> static inline void with_mma_form(int head_size, F f) {
    switch (head_size) {
        case 32: f(MmaForm<32>{}, std::integral_constant<int, 32>{}); break;
        case 64: f(MmaForm<64>{}, std::integral_constant<int, 64>{}); break;
        case 96: f(MmaForm<96>{}, std::integral_constant<int, 96>{}); break;
        case 128: f(MmaForm<128>{}, std::integral_constant<int, 128>{}); break;
        default: die("attention by mma has no head size of %d", head_size);
    }
}

static inline dim3 mma_grid(int B, int T, int heads) { return dim3((unsigned)ceil_div(T, MMA_ROWS), (unsigned)heads, (unsigned)B); }

// As flash_forward and flash_backward of flash.cuh
static inline void mma_forward(bf16* out, float* lse, const bf16* qkv, bool causal, int B, int T, int heads, int head_size, Stream s) {
    float scale = LOG2_E / sqrtf((float)head_size);
    with_mma_form(head_size, [&](auto form, auto size) {
        launch(flash_forward_mma<decltype(size)::value>, mma_grid(B, T, heads), dim3((unsigned)form.THREADS), form.SHARED, s, out, lse, qkv, scale, causal, T, heads);
    });
}
static inline void mma_backward(const FlashBackward& a, bool causal, int B, int head_size, Stream s) {
    with_mma_form(head_size, [&](auto form, auto size) {
        dim3 grid = mma_grid(B, a.T, a.heads), block((unsigned)form.BACKWARD_THREADS);
        launch(flash_backward_keys_mma<decltype(size)::value>, grid, block, form.BACKWARD_SHARED, s, a, causal);
        launch(flash_backward_queries_mma<decltype(size)::value>, grid, block, form.BACKWARD_SHARED, s, a, causal);
    });
}

#endif
