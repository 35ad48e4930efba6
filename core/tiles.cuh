// tiles.cuh: the GPU's form of kernels that make matmul inputs and of LayerNorm, where a Team a row would leave a GPU waiting (fp8_kernels.cuh has the CPU's
// form of each beside its launch).
//
//     produce_tile_kernel    tiles of 32 rows and 256 columns of a source: written in the format wanted, transposed too where a GPU's FP8 units want that, with
//                            amax and column sums, in one pass
//     produce_blocks_kernel  tiles of 128 × 128 of a source: written twice, with a scale for each row of the tile and with one for each column
//     finish_columns_kernel  the column sums of the strips added up
//     layernorm_*_kernel     a block a row, or some rows in turn, each held in registers between what is found out about it and what that makes of it
//
// Sums are added in a fixed order. An amax is an atomic maximum of bits, which has no order.
#pragma once
#include "tensor_core.cuh"
#include <type_traits>
#ifdef GPU_FORM

constexpr int TILE_ROWS = 32, TILE_COLUMNS = 256, TILE_THREADS = 256;

// f(x, y) over all lanes of a warp; all get the result
template <class T, class Op> GPU T over_warp(T x, Op op) {
    for (int o = 16; o > 0; o >>= 1) { x = op(x, __shfl_xor_sync(0xffffffffu, x, o)); }
    return x;
}
// Sums of N numbers over a block, in a fixed order; all threads get them. `shared` has room for N numbers of each warp and may be used again after the
// next barrier.
template <int N> GPU void over_block(float (&x)[N], float* shared) {
    int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    UNROLL
    for (int k = 0; k < N; k++) { x[k] = over_warp(x[k], [](float a, float b) { return a + b; }); }
    if (threadIdx.x % 32 == 0) {
        UNROLL
        for (int k = 0; k < N; k++) { shared[warp * N + k] = x[k]; }
    }
    __syncthreads();
    UNROLL
    for (int k = 0; k < N; k++) {
        x[k] = shared[k];
        for (int w = 1; w < warps; w++) { x[k] += shared[w * N + k]; }
    }
}
// *amax = max(*amax, top) over a block, of which each thread has a `top`. `shared` has room for a number of each warp. Two steps with a barrier between; that
// the greatest of most blocks is no news is seen before it is written.
GPU void note_top(uint32_t* shared, uint32_t top) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    top = __reduce_max_sync(0xffffffffu, top);
#else
    top = over_warp(top, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
#endif
    if (threadIdx.x % 32 == 0) { shared[threadIdx.x / 32] = top; }
}
GPU void raise_amax(uint32_t* amax, const uint32_t* shared) {
    if (threadIdx.x != 0) { return; }
    uint32_t top = shared[0];
    for (int w = 1; w < (int)blockDim.x / 32; w++) { top = max_of(top, shared[w]); }
    if (top > atomic_read(amax)) { atomic_max(amax, top); }
}

// The 8 elements from `col` on as floats, where `there`; rows of C elements that are no whole number of packs are read one by one
template <class Row> GPU Vec<8> take_pack(const Row& row, int col, int C) {
    if (C % 8 == 0) { return row(Range<8>{(size_t)col}); }
    Vec<8> v;
    UNROLL
    for (int k = 0; k < 8; k++) { v.v[k] = col + k < C ? row(Range<1>{(size_t)(col + k)}).v[0] : 0.0f; }
    return v;
}
template <class D> GPU void put_pack(D* row, int col, int C, const Raw<D, 8>& r) {
    if (C % 8 == 0) { store_raw(row, Range<8>{(size_t)col}, r); return; }
    UNROLL
    for (int k = 0; k < 8; k++) {
        if (col + k < C) { row[col + k] = r.e[k]; }
    }
}
template <class D> GPU Raw<D, 8> encoded_pack(const Vec<8>& v, float scale) {
    Raw<D, 8> r;
    UNROLL
    for (int k = 0; k < 8; k++) { from_float(r.e[k], v.v[k] * scale); }
    return r;
}

template <class T, class D, class Source> struct ProduceTile {
    D* y;                    // (rows, C); NULL: not wanted
    uint8_t* turned;         // (C, turned_ld) the same transposed, for formats of a byte; columns from `rows` on are 0; NULL: not wanted
    int64_t turned_ld;       // a multiple of 4, no less than rows
    uint32_t* amax;          // NULL: not wanted
    float* partial;          // (strips, C) sums of T(source) over TILE_ROWS rows; NULL: not wanted
    Source source;
    const float* scale;      // NULL = 1
    int rows, C;
};

// What a thread makes of 8 columns of 4 rows: sums of the columns, their greatest magnitude, codes by rows, and by columns: word k is 4 rows of column k
template <class D> struct TilePart {
    float sums[8];
    uint32_t top;
    Raw<D, 8> rows[4];
    uint32_t columns[8];
};

// One element at a time: any types, any C
template <class T, class D, class Source> GPU void make_part(TilePart<D>* part, const ProduceTile<T, D, Source>& p, int row, int col, float scale) {
    Vec<8> v[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
        if (col < p.C && row + i < p.rows) { v[i] = round_to<T>(take_pack(p.source.row((size_t)(row + i), p.C), col, p.C)); }
        else { v[i] = splat(Range<8>{0}, 0.0f); }
    }
    part->top = 0;
    UNROLL
    for (int i = 0; i < 4; i++) {
        part->top = max_of(part->top, magnitude_bits(v[i]));
        part->rows[i] = encoded_pack<D>(v[i], scale);
    }
    UNROLL
    for (int k = 0; k < 8; k++) {
        part->sums[k] = 0.0f;
        UNROLL
        for (int i = 0; i < 4; i++) { part->sums[k] += v[i].v[k]; }
        if constexpr (sizeof(D) == 1) {
            part->columns[k] = (uint32_t)part->rows[0].e[k].bits | (uint32_t)part->rows[1].e[k].bits << 8 | (uint32_t)part->rows[2].e[k].bits << 16
                | (uint32_t)part->rows[3].e[k].bits << 24;
        }
    }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
GPU uint32_t codes_of(float low, float high, e4m3) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
GPU uint32_t codes_of(float low, float high, e5m2) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
// The same from BF16 to FP8, two elements an instruction where there is one
template <class D, class Source> GPU void make_part_by_pairs(TilePart<D>* part, const ProduceTile<bf16, D, Source>& p, int row, int col, float scale) {
    typedef typename Source::Row Row;
    uint32_t w[4][4], top = 0;
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) { w[i][j] = 0; }
        if (col >= p.C || row + i >= p.rows) { continue; }
        Row from = p.source.row((size_t)(row + i), p.C);
        if constexpr (Row::STORED) {
            Raw<bf16, 8> raw = load_raw(from.x, Range<8>{(size_t)col});
            memcpy(w[i], &raw, 16);
        } else {
            Vec<8> v = from(Range<8>{(size_t)col});
            UNROLL
            for (int j = 0; j < 4; j++) { w[i][j] = pack_bf16(v.v[2 * j], v.v[2 * j + 1]); }
        }
    }
    UNROLL
    for (int k = 0; k < 8; k++) { part->sums[k] = 0.0f; }
    UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t codes[4];
        UNROLL
        for (int j = 0; j < 4; j++) {
            asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(top) : "r"(w[i][j] & 0x7fff7fffu));
            float low = bits_to_float(w[i][j] << 16), high = bits_to_float(w[i][j] & 0xffff0000u);
            part->sums[2 * j] += low;
            part->sums[2 * j + 1] += high;
            codes[j] = codes_of(low * scale, high * scale, D{});
        }
        uint32_t halves[2] = {codes[0] | codes[1] << 16, codes[2] | codes[3] << 16};
        memcpy(&part->rows[i], halves, 8);
    }
    part->top = max_of(top << 16, top & 0xffff0000u);
    UNROLL
    for (int h = 0; h < 2; h++) {  // 4 rows of 4 bytes, transposed
        uint32_t a[4];
        UNROLL
        for (int i = 0; i < 4; i++) { memcpy(&a[i], (const char*)&part->rows[i] + 4 * h, 4); }
        uint32_t x = __byte_perm(a[0], a[1], 0x5140), y = __byte_perm(a[2], a[3], 0x5140), z = __byte_perm(a[0], a[1], 0x7362), t = __byte_perm(a[2], a[3], 0x7362);
        part->columns[4 * h] = __byte_perm(x, y, 0x5410);
        part->columns[4 * h + 1] = __byte_perm(x, y, 0x7632);
        part->columns[4 * h + 2] = __byte_perm(z, t, 0x5410);
        part->columns[4 * h + 3] = __byte_perm(z, t, 0x7632);
    }
}
#endif

// grid (tiles of rows, tiles of columns)
template <class T, class D, class Source> __global__ void __launch_bounds__(TILE_THREADS) produce_tile_kernel(ProduceTile<T, D, Source> p) {
    __shared__ uint32_t words[TILE_COLUMNS * TILE_ROWS / 4];
    __shared__ float sums[TILE_THREADS / 32 * TILE_COLUMNS];
    __shared__ uint32_t tops[TILE_THREADS / 32];
    int tx = (int)threadIdx.x % 32, ty = (int)threadIdx.x / 32, col = (int)blockIdx.y * TILE_COLUMNS + tx * 8, row = (int)blockIdx.x * TILE_ROWS + ty * 4;
    TilePart<D> part;
    float scale = p.scale != NULL ? *p.scale : 1.0f;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (std::is_same<T, bf16>::value && sizeof(D) == 1) {
        if (p.C % 8 == 0) { make_part_by_pairs(&part, p, row, col, scale); } else { make_part(&part, p, row, col, scale); }
    } else
#endif
    { make_part(&part, p, row, col, scale); }
    if (p.amax != NULL) { note_top(tops, part.top); }
    if (p.y != NULL && col < p.C) {
        UNROLL
        for (int i = 0; i < 4; i++) {
            if (row + i < p.rows) { put_pack(p.y + (size_t)(row + i) * p.C, col, p.C, part.rows[i]); }
        }
    }
    if (p.turned != NULL) {
        // where a word lies among its column's 8 depends on the thread, which spreads the stores over the banks
        UNROLL
        for (int k = 0; k < 8; k++) { words[(tx * 8 + k) * 8 + (ty ^ (tx / 4))] = part.columns[k]; }
    }
    if (p.partial != NULL) {
        UNROLL
        for (int k = 0; k < 8; k++) { sums[ty * TILE_COLUMNS + k * 32 + tx] = part.sums[k]; }
    }
    __syncthreads();
    if (p.amax != NULL) { raise_amax(p.amax, tops); }
    if (p.turned != NULL) {
        UNROLL
        for (int i = 0; i < 8; i++) {
            int c = i * 32 + (int)threadIdx.x / 8, word = (int)threadIdx.x % 8, at = (int)blockIdx.x * TILE_ROWS + word * 4, to = (int)blockIdx.y * TILE_COLUMNS + c;
            if (to < p.C && at < p.turned_ld) { *(uint32_t*)(p.turned + (int64_t)to * p.turned_ld + at) = words[c * 8 + (word ^ (c / 32))]; }
        }
    }
    if (p.partial != NULL) {
        int c = (int)threadIdx.x, to = (int)blockIdx.y * TILE_COLUMNS + c;
        float total = 0.0f;
        UNROLL
        for (int w = 0; w < TILE_THREADS / 32; w++) { total += sums[w * TILE_COLUMNS + c % 8 * 32 + c / 8]; }
        if (to < p.C) { p.partial[(size_t)blockIdx.x * p.C + to] = total; }
    }
}

template <class T, class D, class Source> static inline void launch_tiles(const ProduceTile<T, D, Source>& p, Stream s) {
    if (p.rows <= 0 || p.C <= 0) { return; }
    dim3 grid((unsigned)ceil_div(p.rows, TILE_ROWS), (unsigned)ceil_div(p.C, TILE_COLUMNS));
    launch(produce_tile_kernel<T, D, Source>, grid, dim3(TILE_THREADS), 0, s, p);
}

template <class T, class D, class Source> struct ProduceBlocks {
    D* y;                    // (rows, C); NULL: not wanted
    D* turned;               // (C, turned_ld) of its own codes, columns from `rows` on are 0; (rows, C) where turned_ld is 0; NULL: not wanted
    int64_t turned_ld;       // a multiple of 4, no less than rows; or 0
    float* descales;         // (⌈C/128⌉, rows) of y
    float* turned_descales;  // (⌈rows/128⌉, C)
    float* partial;          // (strips, C) sums of T(source) over TILE_ROWS rows; NULL: not wanted
    Source source;
    int rows, C;
};

constexpr int BLOCK_PACKS = SCALE_BLOCK / 8;                // threads that share a row of a tile
constexpr int BLOCK_ROWS = SCALE_BLOCK / (TILE_THREADS / BLOCK_PACKS);  // neighbouring rows of a thread

// grid (tiles of rows, tiles of columns)
template <class T, class D, class Source> __global__ void __launch_bounds__(TILE_THREADS) produce_blocks_kernel(ProduceBlocks<T, D, Source> p) {
    constexpr int WARPS = TILE_THREADS / 32, WORDS = SCALE_BLOCK / 4;  // of a column
    static_assert(BLOCK_ROWS == 8 && BLOCK_PACKS == 16, "half a warp has a row, and a thread two words of a column");
    __shared__ uint32_t words[SCALE_BLOCK * WORDS];
    __shared__ uint32_t tops[WARPS * SCALE_BLOCK];
    __shared__ float sums[SCALE_BLOCK / BLOCK_ROWS * SCALE_BLOCK];
    __shared__ float scales[SCALE_BLOCK];
    int tx = (int)threadIdx.x % BLOCK_PACKS, ty = (int)threadIdx.x / BLOCK_PACKS, warp = (int)threadIdx.x / 32;
    int r0 = (int)blockIdx.x * SCALE_BLOCK, c0 = (int)blockIdx.y * SCALE_BLOCK, row = r0 + ty * BLOCK_ROWS, col = c0 + tx * 8;
    float largest = largest_of(DTypeOf<D>::value);
    Raw<T, 8> values[BLOCK_ROWS];
    uint32_t column_tops[8];
    float column_sums[8];
    UNROLL
    for (int k = 0; k < 8; k++) { column_tops[k] = 0; column_sums[k] = 0.0f; }
    UNROLL
    for (int i = 0; i < BLOCK_ROWS; i++) {
        Vec<8> v = splat(Range<8>{0}, 0.0f);
        if (col < p.C && row + i < p.rows) { v = take_pack(p.source.row((size_t)(row + i), p.C), col, p.C); }
        UNROLL
        for (int k = 0; k < 8; k++) { from_float(values[i].e[k], v.v[k]); v.v[k] = to_float(values[i].e[k]); }
        UNROLL
        for (int k = 0; k < 8; k++) {
            column_tops[k] = max_of(column_tops[k], magnitude_bits(v.v[k]));
            column_sums[k] += v.v[k];
        }
        uint32_t top = magnitude_bits(v);
        for (int o = BLOCK_PACKS / 2; o > 0; o >>= 1) { top = max_of(top, __shfl_xor_sync(0xffffffffu, top, o)); }
        if (p.y == NULL || row + i >= p.rows) { continue; }
        float scale = block_scale(top, largest);
        if (tx == 0) { p.descales[(size_t)blockIdx.y * p.rows + row + i] = 1.0f / scale; }
        if (col < p.C) { put_pack(p.y + (size_t)(row + i) * p.C, col, p.C, encoded_pack<D>(v, scale)); }
    }
    UNROLL
    for (int k = 0; k < 8; k++) {
        uint32_t top = max_of(column_tops[k], __shfl_xor_sync(0xffffffffu, column_tops[k], BLOCK_PACKS));
        if (ty % 2 == 0) { tops[warp * SCALE_BLOCK + tx * 8 + k] = top; }
        sums[ty * SCALE_BLOCK + tx * 8 + k] = column_sums[k];
    }
    __syncthreads();
    int c = (int)threadIdx.x % SCALE_BLOCK, half = (int)threadIdx.x / SCALE_BLOCK;
    if (half == 0) {
        uint32_t top = tops[c];
        for (int w = 1; w < WARPS; w++) { top = max_of(top, tops[w * SCALE_BLOCK + c]); }
        scales[c] = block_scale(top, largest);
        if (p.turned != NULL && c0 + c < p.C) { p.turned_descales[(size_t)blockIdx.x * p.C + c0 + c] = 1.0f / scales[c]; }
    }
    if (p.partial != NULL && c0 + c < p.C) {
        constexpr int PARTS = TILE_ROWS / BLOCK_ROWS;  // of a strip
        for (int strip = half; strip < SCALE_BLOCK / TILE_ROWS && r0 + strip * TILE_ROWS < p.rows; strip += TILE_THREADS / SCALE_BLOCK) {
            float total = 0.0f;
            for (int i = 0; i < PARTS; i++) { total += sums[(strip * PARTS + i) * SCALE_BLOCK + c]; }
            p.partial[(size_t)(r0 / TILE_ROWS + strip) * p.C + c0 + c] = total;
        }
    }
    if (p.turned == NULL) { return; }
    __syncthreads();
    if (p.turned_ld == 0) {
        UNROLL
        for (int i = 0; i < BLOCK_ROWS; i++) {
            if (row + i >= p.rows || col >= p.C) { continue; }
            Raw<D, 8> codes;
            UNROLL
            for (int k = 0; k < 8; k++) { from_float(codes.e[k], to_float(values[i].e[k]) * scales[tx * 8 + k]); }
            put_pack(p.turned + (size_t)(row + i) * p.C, col, p.C, codes);
        }
        return;
    }
    UNROLL
    for (int k = 0; k < 8; k++) {
        float scale = scales[tx * 8 + k];
        UNROLL
        for (int half_of = 0; half_of < 2; half_of++) {
            uint32_t word = 0;
            UNROLL
            for (int i = 0; i < 4; i++) {
                D code;
                from_float(code, row + half_of * 4 + i < p.rows ? to_float(values[half_of * 4 + i].e[k]) * scale : 0.0f);
                word |= (uint32_t)code.bits << (8 * i);
            }
            // where a word lies among its column's 32 depends on the column, which spreads the stores over the banks
            words[(tx * 8 + k) * WORDS + ((ty * 2 + half_of) ^ (tx * 2))] = word;
        }
    }
    __syncthreads();
    for (int i = warp; i < SCALE_BLOCK; i += WARPS) {
        int word = (int)threadIdx.x % 32, at = r0 + word * 4;
        if (c0 + i < p.C && at < p.turned_ld) { *(uint32_t*)((uint8_t*)p.turned + (int64_t)(c0 + i) * p.turned_ld + at) = words[i * WORDS + (word ^ (i / 8 * 2))]; }
    }
}

template <class T, class D, class Source> static inline void launch_blocks(const ProduceBlocks<T, D, Source>& p, Stream s) {
    if (p.rows <= 0 || p.C <= 0) { return; }
    dim3 grid((unsigned)ceil_div(p.rows, SCALE_BLOCK), (unsigned)ceil_div(p.C, SCALE_BLOCK));
    launch(produce_blocks_kernel<T, D, Source>, grid, dim3(TILE_THREADS), 0, s, p);
}

// grad (C) = [grad +] Σ over strips of partial (strips, C). grid (C / 32); each of 8 warps adds every eighth strip, then the warps' sums are added in order.
__global__ void __launch_bounds__(256) finish_columns_kernel(float* grad, const float* partial, int strips, int C, bool add) {
    __shared__ float sums[256];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, c = (int)blockIdx.x * 32 + lane;
    float total = 0.0f;
    if (c < C) {
        for (int r = warp; r < strips; r += 8) { total += partial[(size_t)r * C + c]; }
    }
    sums[threadIdx.x] = total;
    __syncthreads();
    if (warp > 0 || c >= C) { return; }
    for (int w = 1; w < 8; w++) { total += sums[w * 32 + lane]; }
    grad[c] = add ? grad[c] + total : total;
}

// ---- LayerNorm ----

constexpr int ROW_THREADS = 256;      // at most, for a row
constexpr int MOST_ROW_PACKS = 8;     // of a thread: rows of up to 16,384 columns stay in registers

// Packs of a thread for rows of C columns: 1, 2, 4 or 8; 0: the row is no whole number of packs, or too long
static inline int row_packs(int C) {
    if (C % 8 != 0) { return 0; }
    for (int packs = 1; packs <= MOST_ROW_PACKS; packs *= 2) {
        if (C <= 8 * ROW_THREADS * packs) { return packs; }
    }
    return 0;
}
static inline int row_threads(int C, int packs) { return round_up(ceil_div(C / 8, packs), 32); }
// f(Tag) with Tag::value = packs
template <class F> static inline void with_row_packs(int packs, F f) {
    switch (packs) {
        case 1: f(std::integral_constant<int, 1>{}); break;
        case 2: f(std::integral_constant<int, 2>{}); break;
        case 4: f(std::integral_constant<int, 4>{}); break;
        default: f(std::integral_constant<int, 8>{});
    }
}

// Of `LayerNorm` (LayerNormForward) one row a block
template <int PACKS, class T, class D, class LayerNorm> __global__ void __launch_bounds__(ROW_THREADS) layernorm_forward_kernel(LayerNorm p, float eps) {
    __shared__ float shared[2][ROW_THREADS / 32];
    __shared__ uint32_t tops[ROW_THREADS / 32];
    int C = p.C;
    size_t row = blockIdx.x;
    Vec<8> x[PACKS];
    float sum[1] = {0.0f};
    UNROLL
    for (int i = 0; i < PACKS; i++) {
        int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (col >= C) { x[i] = splat(Range<8>{0}, 0.0f); continue; }
        Range<8> c = {(size_t)col};
        x[i] = load(p.x + row * C, c);
        if (p.delta != NULL) {
            x[i] = round_to<T>(x[i] + load(p.delta + row * C, c));
            store(p.sum + row * C, c, x[i]);
        }
        UNROLL
        for (int k = 0; k < 8; k++) { sum[0] += x[i].v[k]; }
    }
    over_block(sum, shared[0]);
    float mean = sum[0] / (float)C, squares[1] = {0.0f};
    UNROLL
    for (int i = 0; i < PACKS; i++) {
        if ((i * (int)blockDim.x + (int)threadIdx.x) * 8 >= C) { continue; }
        UNROLL
        for (int k = 0; k < 8; k++) { float d = x[i].v[k] - mean; squares[0] += d * d; }
    }
    over_block(squares, shared[1]);
    float rstd = 1.0f / sqrtf(squares[0] / (float)C + eps), scale = p.scale != NULL ? *p.scale : 1.0f;
    if (threadIdx.x == 0) {
        p.mean[row] = mean;
        p.rstd[row] = rstd;
    }
    uint32_t top = 0;
    UNROLL
    for (int i = 0; i < PACKS; i++) {
        int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (col >= C) { continue; }
        Range<8> c = {(size_t)col};
        Vec<8> y = round_to<T>((x[i] - mean) * rstd * load(p.gain, c) + load(p.bias, c));
        top = max_of(top, magnitude_bits(y));
        store(p.y + row * C, c, y * scale);
    }
    if (p.amax == NULL) { return; }
    note_top(tops, top);
    __syncthreads();
    raise_amax(p.amax, tops);
}

constexpr int NORM_ROWS = 16;  // of a block

// Of `LayerNorm` (LayerNormBackward) NORM_ROWS rows a block, AT_ONCE of them at a time; its columns' sums of dgain and dbias stay in registers
template <int PACKS, int AT_ONCE, class T, class LayerNorm> __global__ void __launch_bounds__(ROW_THREADS, PACKS <= 2 ? 2 : 1) layernorm_backward_kernel(LayerNorm p) {
    __shared__ float shared[2][ROW_THREADS / 32 * 2 * AT_ONCE];
    int C = p.C, first = (int)blockIdx.x * NORM_ROWS, last = min_of(p.rows, first + NORM_ROWS), turn = 0;
    Vec<8> dgain[PACKS], dbias[PACKS];
    UNROLL
    for (int i = 0; i < PACKS; i++) { dgain[i] = dbias[i] = splat(Range<8>{0}, 0.0f); }
    for (int r = first; r < last; r += AT_ONCE, turn ^= 1) {
        Raw<T, 8> dy[AT_ONCE][PACKS], x[AT_ONCE][PACKS], dx[AT_ONCE][PACKS];
        float sums[2 * AT_ONCE], mean[AT_ONCE], rstd[AT_ONCE];
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            bool there = r + j < last;
            mean[j] = there ? p.mean[r + j] : 0.0f;
            rstd[j] = there ? p.rstd[r + j] : 0.0f;
            UNROLL
            for (int i = 0; i < PACKS; i++) {
                int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
                size_t at = (size_t)(there ? r + j : r) * C;
                Range<8> c = {(size_t)(col < C ? col : 0)};
                dy[j][i] = load_raw(p.dy + at, c);
                x[j][i] = load_raw(p.x + at, c);
                if (p.accumulate) { dx[j][i] = load_raw((const T*)p.dx + at, c); }
            }
        }
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            sums[2 * j] = sums[2 * j + 1] = 0.0f;
            if (r + j >= last) { continue; }
            UNROLL
            for (int i = 0; i < PACKS; i++) {
                int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
                if (col >= C) { continue; }
                Vec<8> gain = load(p.gain, Range<8>{(size_t)col});
                UNROLL
                for (int k = 0; k < 8; k++) {
                    float d = to_float(dy[j][i].e[k]), n = (to_float(x[j][i].e[k]) - mean[j]) * rstd[j], dn = d * gain.v[k];
                    sums[2 * j] += dn;
                    sums[2 * j + 1] += dn * n;
                    dgain[i].v[k] += d * n;
                    dbias[i].v[k] += d;
                }
            }
        }
        over_block(sums, shared[turn]);
        UNROLL
        for (int j = 0; j < AT_ONCE; j++) {
            if (r + j >= last) { continue; }
            float a = sums[2 * j] / (float)C, b = sums[2 * j + 1] / (float)C;
            UNROLL
            for (int i = 0; i < PACKS; i++) {
                int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
                if (col >= C) { continue; }
                Vec<8> d, gain = load(p.gain, Range<8>{(size_t)col});
                UNROLL
                for (int k = 0; k < 8; k++) {
                    float n = (to_float(x[j][i].e[k]) - mean[j]) * rstd[j];
                    d.v[k] = (to_float(dy[j][i].e[k]) * gain.v[k] - a - n * b) * rstd[j];
                    if (p.accumulate) { d.v[k] = to_float(dx[j][i].e[k]) + d.v[k]; }
                }
                store(p.dx + (size_t)(r + j) * C, Range<8>{(size_t)col}, d);
            }
        }
    }
    UNROLL
    for (int i = 0; i < PACKS; i++) {
        int col = (i * (int)blockDim.x + (int)threadIdx.x) * 8;
        if (col >= C) { continue; }
        Range<8> c = {(size_t)col};
        store(p.dgain + (size_t)blockIdx.x * C, c, dgain[i]);
        store(p.dbias + (size_t)blockIdx.x * C, c, dbias[i]);
    }
}

#endif
