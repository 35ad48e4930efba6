// The emulator of simt.h: that it computes what a GPU would, that it finds what is wrong with a kernel, and that it says nothing of one that is right.
// Each faulty kernel is one of ours with a line taken out or moved.
#include "check.h"
#include "../core/matmul.cuh"
#include "../core/tensor_core.cuh"
#include "../fp8_kernels.cuh"

static bool reported(SimtFault fault) {
    bool found = false;
    for (const SimtReport& r : simt_reports) { found |= r.fault == fault; }
    return found;
}
static void expect_report(SimtFault fault, const char* words) {
    if (simt_reports.size() != 1 || simt_reports[0].fault != fault || simt_reports[0].text.find(words) == std::string::npos) {
        std::string all;
        for (const SimtReport& r : simt_reports) { all += r.text + "\n"; }
        fail_msg("of fault %d with '%s' there should be one report, not these %zu:\n%s", (int)fault, words, simt_reports.size(), all.c_str());
    }
    simt_clear();
}

// ---- what threads do together ----

static void __global__ all_shuffles(int* y) {
    int t = (int)threadIdx.x;
    y[8 * t] = __shfl_xor_sync(~0u, t, 5);
    y[8 * t + 1] = __shfl_sync(~0u, t, 3);
    y[8 * t + 2] = __shfl_down_sync(~0u, t, 4);
    y[8 * t + 3] = __shfl_up_sync(~0u, t, 2);
    y[8 * t + 4] = (int)__ballot_sync(~0u, t % 3 == 0);
    y[8 * t + 5] = __any_sync(~0u, t == 40);
    y[8 * t + 6] = (int)__shfl_xor_sync(~0u, (double)t, 1);
    y[8 * t + 7] = (int)(blockIdx.x + 10 * gridDim.x + 100 * blockDim.x);
}
static void shuffles_and_votes(void**) {
    Array<int> y(8 * 64);
    launch(all_shuffles, dim3(1), dim3(64), 0, (Stream)NULL, y.p);
    finish();
    for (int t = 0; t < 64; t++) {
        int warp = t / 32 * 32, lane = t % 32;
        unsigned votes = 0;
        for (int k = 0; k < 32; k++) { votes |= (unsigned)((warp + k) % 3 == 0) << k; }
        const int want[8] = {warp + (lane ^ 5), warp + 3, lane + 4 < 32 ? t + 4 : t, lane >= 2 ? t - 2 : t, (int)votes, warp == 32, t ^ 1, 10 + 6400};
        for (int k = 0; k < 8; k++) { assert_int_equal(y[8 * t + k], want[k]); }
    }
}

static void __global__ early_return(int* y, int n) {
    __shared__ int all[128];
    int t = (int)threadIdx.x;
    if (t >= n) { return; }
    all[t] = t;
    __syncthreads();
    y[t] = all[n - 1 - t];
}
static void returned_threads_have_arrived(void**) {
    for (int n : {1, 31, 32, 33, 100, 128}) {
        Array<int> y(n);
        launch(early_return, dim3(2 - n % 2), dim3(128), 0, (Stream)NULL, y.p, n);
        if (n % 2 == 0) { simt_clear(); } else { finish(); }  // two blocks write the same: seen below
        for (int t = 0; t < n; t++) { assert_int_equal(y[t], n - 1 - t); }
    }
}

// ---- faults ----

template <int BROKEN> static void __global__ reverse(float* y, const float* x, int n) {
    __shared__ float all[64];
    int t = (int)threadIdx.x;
    if (t < n) { all[t] = x[t]; }
    if (BROKEN != SIMT_RACE) { __syncthreads(); }
    if (t < n + (BROKEN == SIMT_OUT_OF_BOUNDS)) { y[t] = t < n ? all[n - 1 - t + (BROKEN == SIMT_UNINITIALISED)] : 0.0f; }
}
static void a_removed_barrier_is_a_race(void**) {
    Array<float> x(50), y(50);
    x.fill(1.0f);
    launch(reverse<SIMT_FAULTS>, dim3(1), dim3(64), 0, (Stream)NULL, y.p, (const float*)x, 50);
    finish();
    launch(reverse<SIMT_RACE>, dim3(1), dim3(64), 0, (Stream)NULL, y.p, (const float*)x, 50);
    assert_true(reported(SIMT_RACE) || reported(SIMT_UNINITIALISED));  // whoever comes first: the reader or the writer
    simt_clear();
}
enum Between { NOTHING, WARP_BARRIER, PRODUCT };
static void __global__ neighbours(int* y, Between between) {
    __shared__ int all[32];
    int t = (int)threadIdx.x;
    all[t] = t;
    __syncthreads();
    int x = all[(t + 1) % 32];
    if (between == WARP_BARRIER) { __syncwarp(); }
    if (between == PRODUCT) {
        float sum[4] = {};
        const uint32_t words[4] = {};
        mma_bf16(sum, words, words);
    }
    all[t] = x;
    __syncthreads();
    y[t] = all[t];
}
static void a_warps_barrier_orders_its_lanes(void**) {
    Array<int> y(32);
    launch(neighbours, dim3(1), dim3(32), 0, (Stream)NULL, y.p, WARP_BARRIER);
    finish();
    for (Between between : {NOTHING, PRODUCT}) {  // lanes meet at a product too, but it says nothing of memory
        launch(neighbours, dim3(1), dim3(32), 0, (Stream)NULL, y.p, between);
        expect_report(SIMT_RACE, "neighbours");
    }
}
static void a_step_beyond_the_end_is_found(void**) {
    Array<float> x(50), y(50);
    x.fill(1.0f);
    launch(reverse<SIMT_OUT_OF_BOUNDS>, dim3(1), dim3(64), 0, (Stream)NULL, y.p, (const float*)x, 50);
    assert_int_equal(simt_reports.size(), 1);
    assert_true(reported(SIMT_OUT_OF_BOUNDS) && simt_reports[0].text.find("thread (50, 0, 0)") != std::string::npos);
    simt_clear();
    memset((char*)(y.p + 50), 0xa5, sizeof(float));  // what it wrote there
}
static void shared_memory_starts_unwritten(void**) {
    Array<float> x(50), y(50);
    x.fill(1.0f);
    launch(reverse<SIMT_UNINITIALISED>, dim3(1), dim3(64), 0, (Stream)NULL, y.p, (const float*)x, 50);
    assert_int_equal(simt_reports.size(), 1);
    assert_true(reported(SIMT_UNINITIALISED));
    simt_clear();
}
static void __global__ sum_of_packs(float* y, const float* x, int shift) {
    float s = 0.0f;
    Raw<float, 8> r = load_raw(x + shift, Range<8>{(size_t)threadIdx.x * 8});
    for (float v : r.e) { s += v; }
    y[threadIdx.x] = s;
}
static void a_misaligned_pack_is_found(void**) {
    Array<float> x(8 * 32 + 8), y(32);
    x.fill(1.0f);
    launch(sum_of_packs, dim3(1), dim3(32), 0, (Stream)NULL, y.p, (const float*)x, 4);
    finish();
    launch(sum_of_packs, dim3(1), dim3(32), 0, (Stream)NULL, y.p, (const float*)x, 1);
    expect_report(SIMT_MISALIGNED, "reads 16 bytes");
}
static void __global__ one_target(uint32_t* y, bool atomically) {
    if (atomically) { atomic_max(y, blockIdx.x); } else if (threadIdx.x == 0) { *y = blockIdx.x; }
}
static void blocks_are_in_no_order(void**) {
    Array<uint32_t> y(1);
    y.fill(0);
    launch(one_target, dim3(3), dim3(32), 0, (Stream)NULL, y.p, true);
    finish();
    assert_int_equal(y[0], 2);
    launch(one_target, dim3(3), dim3(32), 0, (Stream)NULL, y.p, false);
    expect_report(SIMT_RACE, "block (1, 0, 0)");
    launch(one_target, dim3(1), dim3(32), 0, (Stream)NULL, y.p, false);  // launches are in order
    finish();
}
static void __global__ half_a_barrier(int* y) {
    if (threadIdx.x < 32) { __syncthreads(); } else { __syncwarp(); __shfl_xor_sync(~0u, 1, 1); if (threadIdx.x == 40) { __syncthreads(); } else { __syncwarp(); } }
    y[threadIdx.x] = 1;
}
static void a_barrier_that_some_do_not_reach_is_a_deadlock(void**) {
    Array<int> y(64);
    launch(half_a_barrier, dim3(1), dim3(64), 0, (Stream)NULL, y.p);
    expect_report(SIMT_DEADLOCK, "wait at __syncthreads");
    launch(half_a_barrier, dim3(1), dim3(32), 0, (Stream)NULL, y.p);
    finish();
}

// ---- what a tensor core does ----

static void fill_small(const Array<bf16>& x) {  // sums of products of these are exact
    for (size_t i = 0; i < x.n; i++) { from_float(x[i], (float)(random_u32() % 17) - 8.0f); }
}
static float product(const Array<bf16>& a, const Array<bf16>& b, int k, int n, int row, int column) {  // of a (…, k) and b (k, n)
    float sum = 0.0f;
    for (int i = 0; i < k; i++) { sum += to_float(a[(size_t)(row * k + i)]) * to_float(b[(size_t)(i * n + column)]); }
    return sum;
}

// words (2, 4, 32): of x (32, 8), whose rows lie in reverse
static void __global__ load_matrices(uint32_t* words, const uint16_t* x) {
    DYNAMIC_SHARED(memory);
    int lane = (int)threadIdx.x;
    for (int i = 0; i < 8; i++) { ((uint16_t*)memory)[(31 - lane) * 8 + i] = x[lane * 8 + i]; }
    __syncthreads();
    uint32_t r[4];
    ldmatrix(r, shared_address(memory) + (SharedAddress)(31 - lane) * 16);
    for (int k = 0; k < 4; k++) { words[k * 32 + lane] = r[k]; }
    ldmatrix_turned(r, shared_address(memory) + (SharedAddress)(31 - lane) * 16);
    for (int k = 0; k < 4; k++) { words[(4 + k) * 32 + lane] = r[k]; }
}
static void matrices_are_loaded_by_rows_and_columns(void**) {
    Array<uint16_t> x(32 * 8);
    Array<uint32_t> words(2 * 4 * 32);
    for (size_t i = 0; i < x.n; i++) { x[i] = (uint16_t)random_u32(); }
    launch(load_matrices, dim3(1), dim3(32), 32 * 16, (Stream)NULL, words.p, (const uint16_t*)x);
    finish();
    for (int k = 0; k < 4; k++) {
        for (int row = 0; row < 8; row++) {
            for (int column = 0; column < 8; column++) {
                uint32_t want = x[(size_t)((8 * k + row) * 8 + column)];
                assert_int_equal(words[(size_t)(k * 32 + 4 * row + column / 2)] >> column % 2 * 16 & 0xffff, want);
                assert_int_equal(words[(size_t)((4 + k) * 32 + 4 * column + row / 2)] >> row % 2 * 16 & 0xffff, want);
            }
        }
    }
}

// d (16, 8) += a (16, 16) · b (16, 8), with fragments as tensor_core.cuh describes them; or two words of a's exchanged
static void __global__ fragments_product(float* d, const bf16* a, const bf16* b, bool broken) {
    int g = (int)threadIdx.x / 4, t = (int)threadIdx.x % 4 * 2;
    auto pair = [](const bf16* first, int apart) { return (uint32_t)first[0].bits | (uint32_t)first[apart].bits << 16; };
    uint32_t left[4], right[2] = {pair(b + t * 8 + g, 8), pair(b + (t + 8) * 8 + g, 8)};
    for (int k = 0; k < 4; k++) { left[broken && k % 3 != 0 ? 3 - k : k] = pair(a + (g + k % 2 * 8) * 16 + t + k / 2 * 8, 1); }
    float sum[4];
    for (int i = 0; i < 4; i++) { sum[i] = d[(g + i / 2 * 8) * 8 + t + i % 2]; }
    mma_bf16(sum, left, right);
    for (int i = 0; i < 4; i++) { d[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i]; }
}
static void fragments_are_multiplied(void**) {
    Array<bf16> a(16 * 16), b(16 * 8);
    Array<float> d(16 * 8);
    for (bool broken : {false, true}) {
        fill_small(a);
        fill_small(b);
        d.fill(3.0f);
        launch(fragments_product, dim3(1), dim3(32), 0, (Stream)NULL, d.p, (const bf16*)a, (const bf16*)b, broken);
        finish();
        int wrong = 0;
        for (int i = 0; i < 16 * 8; i++) { wrong += d[(size_t)i] != 3.0f + product(a, b, 16, 8, i / 8, i % 8); }
        if (broken) { assert_true(wrong > 64); } else { assert_int_equal(wrong, 0); }
    }
}

// y (32, 16) = a (32, 48) · b (48, 16) by two warps: tiles of a (32, 16) and b (16, 16) pass by in two stages
enum Broken { SOUND, NO_WAIT, WAITS_FOR_TOO_FEW, NO_BARRIER, COPIES_TOO_SOON, ROW_ASKEW, WRONG_ROW };
constexpr int STAGE_BYTES = (32 + 16) * 32;
template <Broken BROKEN> static void __global__ passing_tiles(float* y, const bf16* a, const bf16* b) {
    DYNAMIC_SHARED(memory);
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32, row = thread / 2, chunk = thread % 2;
    auto load = [=](int k) {
        SharedAddress to = shared_address(memory) + (SharedAddress)(k % 2 * STAGE_BYTES + thread * 16);
        if (k < 3) { cp_async_16(to, a + row * 48 + k * 16 + chunk * 8, true); }
        if (k < 3 && warp == 0) { cp_async_16(to + 32 * 32, b + (k * 16 + row) * 16 + chunk * 8, true); }
        cp_async_commit();
    };
    float sum[8] = {};
    load(0);
    for (int k = 0; k < 3; k++) {
        if (BROKEN == COPIES_TOO_SOON || BROKEN == WAITS_FOR_TOO_FEW) { load(k + 1); }
        if (BROKEN == WAITS_FOR_TOO_FEW) { cp_async_wait<2>(); }
        else if (BROKEN == COPIES_TOO_SOON) { cp_async_wait<1>(); }
        else if (BROKEN != NO_WAIT) { cp_async_wait<0>(); }
        if (BROKEN != NO_BARRIER) { __syncthreads(); }
        if (BROKEN != COPIES_TOO_SOON && BROKEN != WAITS_FOR_TOO_FEW) { load(k + 1); }
        SharedAddress tile = shared_address(memory) + (SharedAddress)(k % 2 * STAGE_BYTES);
        uint32_t left[4], right[4];
        int from = BROKEN == WRONG_ROW ? lane / 2 : lane % 16;
        ldmatrix(left, tile + (SharedAddress)((warp * 16 + from) * 32 + lane / 16 * 16 + (BROKEN == ROW_ASKEW && thread == 41 ? 2 : 0)));
        ldmatrix_turned(right, tile + (SharedAddress)(32 * 32 + lane % 16 * 32 + lane / 16 * 16));
        mma_bf16(sum, left, right);
        mma_bf16(sum + 4, left, right + 2);
        if (BROKEN == WAITS_FOR_TOO_FEW) { __syncthreads(); }
    }
    for (int i = 0; i < 8; i++) { y[(warp * 16 + lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i]; }
}
static bool multiplied(void (*kernel)(float*, const bf16*, const bf16*), size_t shared) {
    Array<bf16> a(32 * 48), b(48 * 16);
    Array<float> y(32 * 16);
    fill_small(a);
    fill_small(b);
    launch(kernel, dim3(1), dim3(64), shared, (Stream)NULL, y.p, (const bf16*)a, (const bf16*)b);
    bool right = true;
    for (int i = 0; i < 32 * 16; i++) { right &= y[(size_t)i] == product(a, b, 48, 16, i / 16, i % 16); }
    return right;
}
static void tiles_that_pass_by_are_multiplied(void**) {
    assert_true(multiplied(passing_tiles<SOUND>, 2 * STAGE_BYTES));
    finish();
    assert_false(multiplied(passing_tiles<WRONG_ROW>, 2 * STAGE_BYTES));
    simt_clear();
}
static void a_copy_is_not_there_before_the_wait_for_it(void**) {
    assert_false(multiplied(passing_tiles<NO_WAIT>, 2 * STAGE_BYTES));
    assert_true(reported(SIMT_UNINITIALISED));
    simt_clear();
    assert_false(multiplied(passing_tiles<WAITS_FOR_TOO_FEW>, 2 * STAGE_BYTES));
    expect_report(SIMT_UNINITIALISED, "to which a copy is under way");
}
static void a_copy_is_there_for_others_after_a_barrier(void**) {
    multiplied(passing_tiles<NO_BARRIER>, 2 * STAGE_BYTES);
    assert_true(reported(SIMT_RACE));
    simt_clear();
}
static void a_copy_over_what_others_still_read_is_a_race(void**) {
    multiplied(passing_tiles<COPIES_TOO_SOON>, 2 * STAGE_BYTES);
    assert_true(reported(SIMT_RACE));
    simt_clear();
}
static void a_matrixs_rows_are_aligned(void**) {
    multiplied(passing_tiles<ROW_ASKEW>, 2 * STAGE_BYTES);
    expect_report(SIMT_MISALIGNED, "thread (41, 0, 0): reads 16 bytes");
}
static void shared_memory_ends_where_the_launch_says(void**) {
    multiplied(passing_tiles<SOUND>, 2 * STAGE_BYTES - 16);
    assert_int_equal(simt_reports.size(), 1);
    expect_report(SIMT_OUT_OF_BOUNDS, "of which the launch asks for 3056");
}

// ---- kernels of ours that no other test launches here ----

// The fragment of a tile that a thread has, exchanged with another's, must not pass
template <bool BROKEN> static void __global__ transpose_with(TransposeBytes t) {
    __shared__ uint32_t tile[TransposeBytes::TILE * TransposeBytes::PITCH];
    int tile_row = (int)blockIdx.x / t.tiles_across(), tile_col = (int)blockIdx.x % t.tiles_across(), thread = (int)threadIdx.x;
    t.load_tile(tile, thread, tile_row, tile_col, 0);
    __syncthreads();
    if (BROKEN) { t.store_tile(tile, thread ^ 1, tile_col, tile_row, 0); } else { t.store_tile(tile, thread, tile_row, tile_col, 0); }
}
static bool transposed(void (*kernel)(TransposeBytes), int rows, int cols) {
    int64_t ld = cols + 3, to = round_up(rows, 16);
    Array<uint8_t> x((size_t)rows * ld), y((size_t)cols * to);
    for (size_t i = 0; i < x.n; i++) { x[i] = (uint8_t)random_u32(); }
    TransposeBytes t = {y, x, to, ld, 0, 0, rows, cols};
    launch(kernel, dim3((unsigned)(t.tiles_down() * t.tiles_across())), dim3(TransposeBytes::THREADS), 0, (Stream)NULL, t);
    bool same = true;
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < cols; c++) { same &= y[(size_t)c * to + r] == x[(size_t)r * ld + c]; }
    }
    return same;
}
static void bytes_are_transposed(void**) {
    const int sizes[][2] = {{1, 1}, {3, 70}, {64, 64}, {65, 130}, {16, 33}, {100, 7}};
    for (auto& s : sizes) {
        assert_true(transposed(transpose_bytes_kernel, s[0], s[1]));
        finish();
    }
}
static void a_wrong_index_gives_wrong_numbers(void**) {
    assert_true(transposed(transpose_with<false>, 64, 64));
    finish();
    assert_false(transposed(transpose_with<true>, 65, 130));
    simt_clear();
}

template <class To, class From> static void check_conversion(int rows, int cols) {
    int64_t x_ld = cols + 5, y_ld = round_up(cols, 8);
    Array<From> x((size_t)rows * x_ld);
    Array<To> y((size_t)rows * y_ld);
    Array<float> descale(4);
    descale.fill(0.25f);
    for (size_t i = 0; i < x.n; i++) { from_float(x[i], (float)normal()); }
    run_rows(ConvertRows<To, From>{y, x, descale, y_ld, x_ld, 0, rows, cols}, rows, NULL);
    finish();
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < cols; c++) { assert_true(to_float(y[(size_t)r * y_ld + c]) == to_float(x[(size_t)r * x_ld + c]) * 0.25f); }
    }
}
static void codes_are_widened(void**) {
    for (int cols : {1, 8, 31, 264}) {
        check_conversion<bf16, e4m3>(3, cols);
        check_conversion<bf16, e5m2>(2, cols);
        check_conversion<float, bf16>(1, cols);
    }
}

static void results_are_finished(void**) {
    for (int n : {1, 7, 8, 257}) {
        Array<float> x((size_t)3 * n), bias(n);
        Array<bf16> d((size_t)3 * n), before((size_t)3 * n);
        fill_normal(d, 0.0, 1.0);
        memcpy((void*)before.p, d.p, d.n * sizeof(bf16));
        for (size_t i = 0; i < x.n; i++) { x[i] = (float)normal(); }
        for (int i = 0; i < n; i++) { bias[i] = (float)normal(); }
        run_rows(FinishRows<bf16, float>{d, x, bias, n, 0, 3, n, true}, 3, NULL);
        finish();
        for (int i = 0; i < 3 * n; i++) { assert_int_equal(d[i].bits, encoded<bf16>(x[i] + bias[i % n] + to_float(before[i])).bits); }
    }
}

static void transposed_inputs_are_the_same_codes(void**) {
    const int sizes[][2] = {{1, 1}, {3, 7}, {33, 264}, {70, 255}, {130, 520}};
    for (auto& size : sizes) {
        int rows = size[0], C = size[1];
        int64_t ld = round_up(rows, 16);
        Array<bf16> x((size_t)rows * C), dy((size_t)rows * C);
        fill_normal(x, 0.0, 1.5);
        fill_normal(dy, 0.0, 1.5);
        Array<e5m2> y((size_t)rows * C), turned((size_t)C * ld);
        Array<float> slot(4), own(4), partial((size_t)strips_of(rows) * C);
        Array<uint32_t> amax(1);
        amax.fill(0);
        slot.fill(0.5f);
        slot[1] = 64.0f;
        Sites sites = {};
        sites.amax = sites.current = amax;
        sites.slots = slot;
        const bf16 *px = x, *pd = dy;
        produce(Tensor{y, E5M2, own, turned, ld}, partial, [=](auto) { return GeluGradSource<bf16>{pd, px}; }, BF16, Quantisation{&sites, 0, false, true, false, NULL}, NULL, rows, C,
                NULL);
        finish();
        uint32_t top = 0;
        for (int c = 0; c < C; c++) {
            double sum = 0.0, of_strips = 0.0;
            for (int r = 0; r < ld; r++) {
                assert_int_equal(turned[(size_t)c * ld + r].bits, r < rows ? y[(size_t)r * C + c].bits : 0);
                if (r >= rows) { continue; }
                float v = round_to<bf16>(to_float(dy[(size_t)r * C + c]) * gelu_slope(to_float(x[(size_t)r * C + c])));
                assert_int_equal(y[(size_t)r * C + c].bits, encoded<e5m2>(v * 64.0f).bits);
                top = max_of(top, magnitude_bits(v));
                sum += (double)v;
            }
            for (int k = 0; k < strips_of(rows); k++) { of_strips += (double)partial[(size_t)k * C + c]; }
            assert_true(fabs(sum - of_strips) < 1e-5 * rows);
        }
        assert_int_equal(amax[0], top);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shuffles_and_votes),
        cmocka_unit_test(returned_threads_have_arrived),
        cmocka_unit_test(a_removed_barrier_is_a_race),
        cmocka_unit_test(a_warps_barrier_orders_its_lanes),
        cmocka_unit_test(a_step_beyond_the_end_is_found),
        cmocka_unit_test(shared_memory_starts_unwritten),
        cmocka_unit_test(a_misaligned_pack_is_found),
        cmocka_unit_test(blocks_are_in_no_order),
        cmocka_unit_test(a_barrier_that_some_do_not_reach_is_a_deadlock),
        cmocka_unit_test(matrices_are_loaded_by_rows_and_columns),
        cmocka_unit_test(fragments_are_multiplied),
        cmocka_unit_test(tiles_that_pass_by_are_multiplied),
        cmocka_unit_test(a_copy_is_not_there_before_the_wait_for_it),
        cmocka_unit_test(a_copy_is_there_for_others_after_a_barrier),
        cmocka_unit_test(a_copy_over_what_others_still_read_is_a_race),
        cmocka_unit_test(a_matrixs_rows_are_aligned),
        cmocka_unit_test(shared_memory_ends_where_the_launch_says),
        cmocka_unit_test(bytes_are_transposed),
        cmocka_unit_test(a_wrong_index_gives_wrong_numbers),
        cmocka_unit_test(codes_are_widened),
        cmocka_unit_test(results_are_finished),
        cmocka_unit_test(transposed_inputs_are_the_same_codes),
    };
    return RUN_TESTS(tests);
}
