// exchange.cpp: exchanges of activations on 1 to 8 ranks against what every rank knows of the others: rows gathered and summed, to the bit; passes of a
// pipeline; that what else is under way goes on; what is counted; and what is refused.
#include "check.h"
#include "../core/exchange.cuh"
#include "../core/schedule.h"
#include "launch.h"
#include <algorithm>

// ---- what the ranks check ----

static uint64_t hash_of(uint64_t a, uint64_t b, uint64_t c) { return mix64(mix64(mix64(a) ^ b) ^ c); }

// The operations add this many bytes to their counters and nothing to the others.
struct Counted {
    Group* g;
    uint64_t want[COMM_OPERATIONS];
    explicit Counted(Group* group) : g(group) { memcpy(want, g->bytes_sent, sizeof(want)); }
    Counted& add(CommOperation operation, size_t bytes) {
        want[operation] += g->transport == ALONE ? 0 : bytes;
        return *this;
    }
    ~Counted() {
        for (int i = 0; i < COMM_OPERATIONS; i++) {
            CHECK(g->bytes_sent[i] == want[i], "%s: %" PRIu64 ", not %" PRIu64, comm_names[i], g->bytes_sent[i], want[i]);
        }
    }
};

// Rows of rank `rank`, element by element. Row 0 and every seventh: ordinary, of 17 powers of two so that the order of adding shows; of the others one
// kind each
enum Kind { ORDINARY, ZERO, HAS_INF, HAS_NAN, SUBNORMAL, HUGE_VALUES, TINY, KINDS };
static float element(int rank, int row, int c, int C, uint32_t salt) {
    uint64_t h = hash_of((uint64_t)row * 100003 + (uint64_t)c, (uint64_t)rank, salt);
    float x = (1.0f + (float)(h & 0xffffff) * 0x1p-24f) * exp2_int((int)((h >> 33) % 17) - 8) * ((h >> 32) & 1 ? -1.0f : 1.0f);
    if (rank % 2 != row / KINDS % 2) { return x; }  // a special row of one rank meets an ordinary one of another
    switch (row % KINDS) {
        case ZERO: return h & 1 ? 0.0f : -0.0f;
        case HAS_INF: return c == (int)(hash_of((uint64_t)rank, (uint64_t)row, salt) % (uint64_t)C) ? INFINITY : x;
        case HAS_NAN: return c == (int)(hash_of((uint64_t)rank, (uint64_t)row, salt) % (uint64_t)C) ? NAN : x;
        case SUBNORMAL: return bits_to_float((uint32_t)h & 0x807fffffu);
        case HUGE_VALUES: return x * 0x1p118f;
        case TINY: return x * 0x1p-110f;
        default: return x;
    }
}
template <class T> static float value(int rank, int row, int c, int C, uint32_t salt) { return to_float(encoded<T>(element(rank, row, c, C, salt))); }

// The E4M3 value nearest to x, ties to the even one; by arithmetic alone
static double nearest_e4m3(double x) {
    if (x == 0.0) { return x; }
    int e = std::max((int)floor(log2(fabs(x))), -6);
    double unit = ldexp(1.0, e - 3);
    return std::max(-448.0, std::min(448.0, nearbyint(x / unit) * unit));
}

// Row `row` of rank `rank` as it arrives when sent in E4M3: times the largest power of two that keeps it within 448 (2^126 at most)
template <class T> static void arrived(std::vector<float>* out, int rank, int row, int C, uint32_t salt) {
    double amax = 0.0;
    bool finite = true;
    for (int c = 0; c < C; c++) {
        float x = value<T>(rank, row, c, C, salt);
        finite = finite && isfinite(x);
        amax = std::max(amax, fabs((double)x));
    }
    int e = 0;
    if (finite && amax > 0.0) {
        for (e = 126; ldexp(amax, e) > 448.0; e--) {}
    }
    for (int c = 0; c < C; c++) {
        (*out)[(size_t)c] = finite ? (float)ldexp(nearest_e4m3(ldexp((double)value<T>(rank, row, c, C, salt), e)), -e) : NAN;
    }
}

template <class T> static bool same(T a, T b) {
    return memcmp(&a, &b, sizeof(T)) == 0 || (to_float(a) != to_float(a) && to_float(b) != to_float(b));
}

// A RowExchange with its memory, planned and then taken
struct Rows {
    Memory memory = {};
    RowExchange x = {};
    Rows(Group* g, int rows, int C, DType act, bool fp8) {
        rows_allocate(&x, g, rows, C, act, fp8, &memory);
        memory_commit(&memory);
        rows_allocate(&x, g, rows, C, act, fp8, &memory);
        memory_check(&memory);
        size_t raw = (size_t)rows * (size_t)C * (size_t)dtype_bytes(act), coded = (size_t)rows * ((size_t)C / 64 * 64 + (C % 64 <= 60 ? 64 : 128));
        size_t want = g->size == 1 ? 0 : round_up(fp8 ? std::max(raw, coded) : raw, (size_t)256) + (fp8 ? round_up(coded, (size_t)256) : 0);
        CHECK(memory_total(&memory) == want && memory.bytes[COMMUNICATION] == want, "%zu bytes planned, not %zu", memory_total(&memory), want);
        rows_create(&x, transfer_unit((size_t)(rows / g->size) * (size_t)C));
    }
    ~Rows() {
        rows_free(&x);
        CHECK(x.group == NULL);
        memory_release(&memory);
    }
};

// all = everyone's rows, whether this rank's are already there or not
template <class T> static void check_gather(RowExchange* x, int own, int C, bool in_place, uint32_t salt) {
    Group* g = x->group;
    size_t part = (size_t)own * (size_t)C;
    Array<T> all(part * (size_t)g->size), mine(part);
    T* from = in_place ? all.p + part * (size_t)g->rank : mine.p;
    auto code = [&](int rank, size_t i) {
        uint64_t h = hash_of(i, (uint64_t)rank, salt);
        T t;
        memcpy((void*)&t, &h, sizeof(T));
        return t;
    };
    for (size_t i = 0; i < part; i++) { from[i] = code(g->rank, i); }
    {
        Counted counted(g);
        counted.add(TP_X, part * sizeof(T) * (size_t)(g->size - 1));
        rows_gather(x, all, from, DTypeOf<T>::value, own, C, TP_X, NULL);
        finish();
    }
    for (int r = 0; r < g->size; r++) {
        for (size_t i = 0; i < part; i++) {
            T want = code(r, i);
            CHECK(memcmp(&all.p[(size_t)r * part + i], &want, sizeof(T)) == 0, "%s, (%d, %d), element %zu of rank %d", dtype_names[DTypeOf<T>::value],
                own, C, i, r);
        }
    }
}

template <class T> static void check_sum(RowExchange* x, bool fp8, int own, int C, bool in_place, uint32_t salt) {
    Group* g = x->group;
    const int R = g->size;
    size_t part = (size_t)own * (size_t)C, stride = (size_t)C / 64 * 64 + (C % 64 <= 60 ? 64 : 128);
    Array<T> whole(part * (size_t)R), result(part);
    T* out = in_place ? whole.p : result.p;
    std::vector<T> first(part);
    for (int again = 0; again < 2; again++) {
        for (int row = 0; row < own * R; row++) {
            for (int c = 0; c < C; c++) { from_float(whole.p[(size_t)row * (size_t)C + (size_t)c], element(g->rank, row, c, C, salt)); }
        }
        Counted counted(g);
        counted.add(TP_Y, (size_t)own * (size_t)C * (fp8 ? 1 : sizeof(T)) * (size_t)(R - 1));
        counted.add(TP_SCALES, fp8 ? (size_t)own * (stride - (size_t)C) * (size_t)(R - 1) : 0);
        with_threads(again + 1, [&] { rows_sum(x, out, whole, DTypeOf<T>::value, fp8, own, C, TP_Y, NULL); });
        finish();
        if (again == 0) { memcpy((void*)first.data(), out, part * sizeof(T)); }
    }
    CHECK(memcmp(first.data(), out, part * sizeof(T)) == 0, "not the same once more");
    bool order_shows = false;
    std::vector<float> sum((size_t)C), down((size_t)C), sent((size_t)C);
    for (int i = 0; i < own; i++) {
        int row = g->rank * own + i;
        for (int k = 0; k < 2 * R; k++) {  // upwards, then downwards
            int r = k < R ? k : 2 * R - 1 - k;
            if (fp8 && R > 1) { arrived<T>(&sent, r, row, C, salt); }
            else { for (int c = 0; c < C; c++) { sent[(size_t)c] = value<T>(r, row, c, C, salt); } }
            std::vector<float>* into = k < R ? &sum : &down;
            for (size_t c = 0; c < (size_t)C; c++) { (*into)[c] = k == 0 || k == R ? sent[c] : (*into)[c] + sent[c]; }
        }
        for (int c = 0; c < C; c++) {
            order_shows = order_shows || sum[(size_t)c] != down[(size_t)c];
            T want = encoded<T>(sum[(size_t)c]), got = out[(size_t)i * (size_t)C + (size_t)c];
            CHECK(same(got, want), "%s%s, (%d, %d), row %d, column %d: %a, not %a", dtype_names[DTypeOf<T>::value], fp8 ? " in e4m3" : "", own, C, row, c,
                (double)to_float(got), (double)to_float(want));
        }
    }
    CHECK(R < 3 || fp8 || sizeof(T) == 2 || own < KINDS || C < 100 || order_shows);  // BF16 has so few bits that most sums are exact
    for (size_t k = in_place ? part : 0; k < part * (size_t)R; k++) {  // what was sent is as it was
        int row = (int)(k / (size_t)C), c = (int)(k % (size_t)C);
        CHECK(same(whole.p[k], encoded<T>(element(g->rank, row, c, C, salt))), "row %d, column %d has changed", row, c);
    }
}

// A row that is not finite on one rank is NaN, all of it, where it is summed in FP8: that rank's alone, and no other row
static void check_nonfinite_rows(Group* g) {
    const int own = 3, C = 70, R = g->size;
    if (R == 1) { return; }
    for (float bad : {INFINITY, -INFINITY, NAN}) {
        Rows rows(g, own * R, C, BF16, true);
        Array<bf16> whole((size_t)(own * R * C)), out((size_t)(own * C));
        whole.fill(encoded<bf16>(1.0f));
        if (g->rank == R - 1) { from_float(whole.p[1 * C + 69], bad); }  // row 1, which is rank 0's
        rows_sum(&rows.x, out, whole, BF16, true, own, C, TP_DX, NULL);
        finish();
        for (int k = 0; k < own * C; k++) {
            float got = to_float(out.p[k]);
            CHECK(g->rank == 0 && k / C == 1 ? got != got : got == (float)R, "element %d: %g", k, (double)got);
        }
    }
}

static void check_max(Group* g) {
    Rows rows(g, g->size, 1, FP32, false);
    for (size_t n : {1, 7, 1000}) {
        Array<uint32_t> amax(n);
        const uint32_t list[] = {0, 1, float_to_bits(FLT_MIN), float_to_bits(1.0f), float_to_bits(FLT_MAX), 0x7f800000u, 0x7fc00000u, 0x7fffffffu};
        auto bits = [&](int rank, size_t i) { uint64_t h = hash_of(i, (uint64_t)rank, 5); return i % 2 == 0 ? list[h % 8] : (uint32_t)(h >> 33); };
        for (size_t i = 0; i < n; i++) { amax.p[i] = bits(g->rank, i); }
        {
            Counted counted(g);
            counted.add(TP_SCALES, 8 * n * (size_t)(g->size - 1) / (size_t)g->size);
            rows_max(&rows.x, amax, n, NULL);
            finish();
        }
        for (size_t i = 0; i < n; i++) {
            uint32_t want = 0;
            for (int r = 0; r < g->size; r++) { want = std::max(want, bits(r, i)); }
            CHECK(amax.p[i] == want, "%zu of %zu: 0x%x, not 0x%x", i, n, amax.p[i], want);
        }
    }
}

template <class T> static void check_shape(Group* g, int own, int C, uint32_t salt) {
    for (bool fp8 : {false, true}) {
        Rows rows(g, own * g->size, C, DTypeOf<T>::value, fp8);
        check_gather<e4m3>(&rows.x, own, C, fp8, salt);
        check_gather<T>(&rows.x, own, C, !fp8, salt);
        check_sum<T>(&rows.x, fp8, own, C, false, salt);
        check_sum<T>(&rows.x, fp8, own, C, true, salt);
        if (fp8) { check_sum<T>(&rows.x, false, own, C, false, salt); }  // one exchange serves both
    }
}

static void check_rows(Group* g) {
    uint32_t salt = 0;
    for (int C : {1, 3, 20, 60, 61, 129}) {
        if (g->size > 4 && (C == 3 || C == 20 || C == 60)) { continue; }  // where many ranks share few cores
        for (int own : {1, 9}) {
            check_shape<float>(g, own, C, salt += 10);
            check_shape<bf16>(g, own, C, salt += 10);
        }
    }
    check_shape<bf16>(g, 2, 4096, salt += 10);
    check_shape<float>(g, 1, 4096, salt += 10);
    check_nonfinite_rows(g);
    check_max(g);
}

// FP8 rows are half as many bytes as BF16's, to the byte
static void check_bytes(Group* g) {
    Rows rows(g, 6 * g->size, 96, BF16, true);
    Array<bf16> all((size_t)(6 * 96 * g->size)), own((size_t)(6 * 96));
    own.fill(encoded<bf16>(1.0f));
    uint64_t before = g->bytes_sent[TP_X];
    rows_gather(&rows.x, all, own, E4M3, 6, 96, TP_X, NULL);
    uint64_t fp8 = g->bytes_sent[TP_X] - before;
    rows_gather(&rows.x, all, own, BF16, 6, 96, TP_X, NULL);
    finish();
    CHECK(g->bytes_sent[TP_X] - before == 3 * fp8 && fp8 == 6u * 96u * (uint64_t)(g->size - 1), "%" PRIu64, fp8);
}

// A ring of gradients is under way; the last rank waits for it before it comes to the exchange in which the others are. It needs every rank at each hop.
struct Ring {
    Transfer t;
    int calls;
};
static void ring_goes_on(void* context) {
    Ring* ring = (Ring*)context;
    ring->calls++;
    transfer_done(&ring->t);
}
static void check_meanwhile(Group* g) {
    if (g->transport != OVER_MPI) { return; }
    const int R = g->size, own = 2, C = 24;
    for (int kind = 0; kind < 4; kind++) {
        Ring ring = {};
        transfer_create(&ring.t, g, 0);
        Array<float> data((size_t)(1024 * R)), received(1024);
        data.fill(1.0f);
        Rows rows(g, own * R, C, FP32, true);
        rows.x.meanwhile = ring_goes_on;
        rows.x.context = &ring;
        StageExchange stages = {};
        stages_create(&stages, g, sizeof(float), sizeof(float));
        stages.meanwhile = ring_goes_on;
        stages.context = &ring;
        Array<float> whole((size_t)(own * R * C)), out((size_t)(own * C));
        Array<uint32_t> amax(1);
        whole.fill(1.0f);
        amax.fill(1);
        start_ring_sum(&ring.t, data, received, equal_parts(4096), FP32, REDUCE_SCATTER, NULL);
        while (g->rank == R - 1 && !transfer_done(&ring.t)) { sched_yield(); }
        if (g->rank == R - 1) { usleep(20 * 1000); }
        if (kind == 0) { rows_gather(&rows.x, whole, out, FP32, own, C, TP_X, NULL); }
        if (kind == 1) { rows_sum(&rows.x, out, whole, FP32, true, own, C, TP_Y, NULL); }
        if (kind == 2) { rows_max(&rows.x, amax, 1, NULL); }
        if (kind == 3) { stage_exchange(&stages, out, (g->rank + R - 1) % R, whole, (g->rank + 1) % R, sizeof(float), NULL); }
        if (g->rank == 0) { CHECK(ring.calls > 0); }  // which waits for the last rank in all four
        while (!transfer_done(&ring.t)) { sched_yield(); }
        for (size_t i = 0; i < 1024; i++) { CHECK(data.p[1024 * (size_t)g->rank + i] == (float)R); }
        stages_free(&stages);
        CHECK(stages.meanwhile == NULL);
        transfer_free(&ring.t);
    }
}

// ---- a pipeline ----

// What stage `stage` makes of micro-batch k, byte by byte
static unsigned char passed(int stage, bool forward, int k, size_t i, uint32_t salt) {
    return (unsigned char)(hash_of(i / 8, (uint64_t)(stage * 2 + forward), salt * 1000u + (uint32_t)k) >> i % 8 * 8);
}

// All passes of a step, at each stage's own pace: each finds what it needs, and a micro-batch's input is in its slot until it has been backward.
static void check_pipeline(Group* g, int K, size_t bytes, uint32_t salt) {
    const int S = g->size, stage = g->rank, flight = schedule_in_flight(S, stage, K);
    StageExchange x = {};
    stages_create(&x, g, bytes, transfer_unit(bytes));
    Array<unsigned char> inputs((size_t)flight * bytes), gradient(bytes), output(bytes), made(bytes);
    uint64_t sends = 0;
    auto expect = [&](const unsigned char* got, int from, bool forward, int k) {
        for (size_t i = 0; i < bytes; i++) {
            CHECK(got[i] == passed(from, forward, k, i, salt), "stage %d of %d, %s of %d of %d, byte %zu of %zu", stage, S, forward ? "F" : "B", k,
                K, i, bytes);
        }
    };
    uint64_t before = g->bytes_sent[PIPELINE];
    for (int64_t i = 0; i <= schedule_steps(K); i++) {
        ScheduleExchange e = schedule_exchange(S, stage, K, i);
        ScheduleStep last = i > 0 ? schedule_step(S, stage, K, i - 1) : ScheduleStep{true, 0};
        ScheduleStep next = i < schedule_steps(K) ? schedule_step(S, stage, K, i) : ScheduleStep{false, 0};
        unsigned char* slot = inputs.p + (size_t)(next.micro_batch % flight) * bytes;
        stage_exchange(&x, next.forward ? slot : gradient.p, e.from, last.forward ? output.p : made.p, e.to, bytes, NULL);
        finish();
        sends += e.to >= 0;
        if (i == schedule_steps(K)) { break; }
        usleep((unsigned)(hash_of((uint64_t)i, (uint64_t)stage, salt) % 300));
        if (next.forward) {
            if (e.from >= 0) { expect(slot, stage - 1, true, next.micro_batch); }
            for (size_t b = 0; b < bytes; b++) { output.p[b] = passed(stage, true, next.micro_batch, b, salt); }
        } else {
            if (e.from >= 0) { expect(gradient, stage + 1, false, next.micro_batch); }
            if (stage > 0) { expect(slot, stage - 1, true, next.micro_batch); }  // still there
            for (size_t b = 0; b < bytes; b++) { made.p[b] = passed(stage, false, next.micro_batch, b, salt); }
        }
    }
    CHECK(sends == (uint64_t)K * ((stage > 0) + (stage < S - 1)));
    CHECK(g->bytes_sent[PIPELINE] - before == sends * bytes);
    stages_free(&x);
}

static void check_pipelines(Group* g) {
    uint32_t salt = 0;
    for (int K : {1, 2, 3, 5, 9}) {
        for (size_t bytes : {1, 100, 4096, 70002}) { check_pipeline(g, K, bytes, ++salt); }  // the last: longer than MPI sends before it is asked for
    }
}

// More bytes than an int counts
static void check_long_message(Group* g) {
    if (getenv("SOAK") == NULL || g->size != 2 || g->transport == OVER_MPI_STAGED) { return; }
    size_t bytes = (size_t)INT_MAX + 1 + 64;
    char* data = (char*)device_alloc(bytes);
    StageExchange x = {};
    stages_create(&x, g, bytes, transfer_unit(bytes));
    device_zero(data, bytes, NULL);
    char ends[2] = {(char)(3 + g->rank), (char)(5 + g->rank)};
    copy_to_device(data, ends, 1, NULL);
    copy_to_device(data + bytes - 1, ends + 1, 1, NULL);
    {
        Counted counted(g);
        counted.add(PIPELINE, g->rank == 0 ? bytes : 0);
        stage_exchange(&x, data, g->rank == 1 ? 0 : -1, data, g->rank == 0 ? 1 : -1, bytes, NULL);
    }
    copy_to_host(ends, data, 1, NULL);
    copy_to_host(ends + 1, data + bytes - 1, 1, NULL);
    CHECK(ends[0] == 3 && ends[1] == 5);
    stages_free(&x);
    device_free(data);
}

static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    const int R = atoi(argument);
    CHECK(world.size == R, "%d ranks", world.size);
    world_select_device(&world);
    use_threads(1);
    Group group = group_world(&world, true);
    if (strcmp(mode, "too many") == 0) {
        Rows rows(&group, 3 * R, 20, BF16, false);
        Array<bf16> whole((size_t)(4 * R * 20));
        rows_sum(&rows.x, whole, whole, BF16, false, 4, 20, TP_Y, NULL);
    }
    if (strcmp(mode, "no codes") == 0) {
        Rows rows(&group, 128 * R, 20, BF16, false);
        Array<bf16> whole((size_t)(R * 20));
        rows_sum(&rows.x, whole, whole, BF16, true, 1, 20, TP_Y, NULL);
    }
    const Transport transport = group.transport;
    for (bool staged : {false, true}) {
        if (staged && transport == OVER_MPI) { group.transport = OVER_MPI_STAGED; }  // as ranks do that share a GPU
        if (strcmp(mode, "rows") == 0) {
            check_rows(&group);
            check_bytes(&group);
            check_meanwhile(&group);
        } else {
            CHECK(strcmp(mode, "stages") == 0, "was not refused");
            check_pipelines(&group);
            check_long_message(&group);
        }
        group.transport = transport;
        if (R == 1 || R > 4) { break; }
    }
    group_free(&group);
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void on_ranks(int ranks, const char* mode, int limit) {
    if (!can_launch(ranks)) { skip(); }
    char argument[8];
    snprintf(argument, sizeof(argument), "%d", ranks);
    expect_ranks(ranks, mode, argument, NULL, limit, 0);
}
static void one_process_keeps_its_rows(void**) { on_ranks(1, "rows", 60); }
static void two_ranks_exchange_rows(void**) { on_ranks(2, "rows", 60); }
static void three_ranks_exchange_rows(void**) { on_ranks(3, "rows", 60); }
static void four_ranks_exchange_rows(void**) { on_ranks(4, "rows", 60); }
static void eight_ranks_exchange_rows(void**) { on_ranks(8, "rows", 120); }

static void one_stage_exchanges_nothing(void**) { on_ranks(1, "stages", 60); }
static void two_stages_pass_micro_batches_on(void**) { on_ranks(2, "stages", getenv("SOAK") != NULL ? 300 : 60); }
static void three_stages_pass_micro_batches_on(void**) { on_ranks(3, "stages", 60); }
static void four_stages_pass_micro_batches_on(void**) { on_ranks(4, "stages", 60); }

static void refused(const char* mode, const char* line) {
    if (!can_launch(2)) { skip(); }
    Launched l = expect_ranks(2, mode, "2", NULL, 30, 1);
    expect_line(&l, line);
}

static void sums_that_were_not_planned_are_refused(void**) {
    refused("too many", "a sum of (8, 20) rows in bf16 does not fit into what was planned for (6, 20)");
    refused("no codes", "a sum of (2, 20) rows in e4m3 does not fit into what was planned for (256, 20)");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_process_keeps_its_rows), cmocka_unit_test(two_ranks_exchange_rows), cmocka_unit_test(three_ranks_exchange_rows),
        cmocka_unit_test(four_ranks_exchange_rows), cmocka_unit_test(eight_ranks_exchange_rows), cmocka_unit_test(one_stage_exchanges_nothing),
        cmocka_unit_test(two_stages_pass_micro_batches_on), cmocka_unit_test(three_stages_pass_micro_batches_on),
        cmocka_unit_test(four_stages_pass_micro_batches_on),
        cmocka_unit_test(sums_that_were_not_planned_are_refused),
    };
    return cmocka_run_group_tests_name("exchange", tests, NULL, NULL);
}
