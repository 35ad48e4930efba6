// collectives.cpp: sums against an independent sum in the order of the ranks, byte for byte, on 1 to 8 ranks and on groups within them; and
// how runs end when a rank fails.
#include "launch.h"
#include <initializer_list>

// ---- what the ranks check ----

// Every rank can say what any rank has: a float with a sign and 17 powers of two, so that the order of adding shows
static float value(int rank, size_t i, uint32_t salt) {
    uint64_t x = (uint64_t)i * 0x9e3779b97f4a7c15ull + (uint64_t)(rank + 1) * 0xd1b54a32d192ed03ull + salt;
    x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9ull;
    x ^= x >> 29;
    float f = (float)(x & 0xffffff) * 0x1p-24f + 1.0f;
    return ((x >> 32) & 1 ? -f : f) * exp2_int((int)((x >> 33) % 17) - 8);
}

// The same as a double, all of whose bits count
static float value_of(const float*, int rank, size_t i, uint32_t salt) { return value(rank, i, salt); }
static double value_of(const double*, int rank, size_t i, uint32_t salt) { return (double)value(rank, i, salt) * 0x1.123456789abcdp-3; }

template <class T> static T* on_device(const T* host, size_t n) {
    T* d = (T*)device_alloc(n * sizeof(T));
    copy_to_device(d, host, n * sizeof(T), NULL);
    return d;
}

static uint64_t hash_of(const void* data, size_t bytes) {
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; i++) { h = (h ^ ((const unsigned char*)data)[i]) * 1099511628211ull; }
    return h;
}

// not by way of what is tested
static bool same_on_all_ranks(const void* data, size_t bytes) {
#ifdef USE_MPI
    int started = 0;
    MPI_Initialized(&started);
    if (started) {
        uint64_t mine = hash_of(data, bytes), root = mine;
        int same, all;
        MPI_Bcast(&root, 8, MPI_BYTE, 0, MPI_COMM_WORLD);
        same = mine == root;
        MPI_Allreduce(&same, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
        return all != 0;
    }
#endif
    (void)data, (void)bytes;
    return true;
}

// `ranks`: of the group's ranks in the world; NULL: the same
template <class T> static void check_sum(Group* g, size_t n, uint32_t salt, const int* ranks = NULL) {
    const int R = g->size;
    auto value_at = [=](int r, size_t i) { return value_of((const T*)NULL, ranks != NULL ? ranks[r] : r, i, salt); };
    T* host = (T*)host_alloc(n * sizeof(T));
    T* sum = (T*)host_alloc(n * sizeof(T));
    bool order_shows = false;
    for (size_t i = 0; i < n; i++) {
        host[i] = value_at(g->rank, i);
        T up = value_at(0, i), down = value_at(R - 1, i);
        for (int r = 1; r < R; r++) { up += value_at(r, i), down += value_at(R - 1 - r, i); }
        sum[i] = up;
        order_shows = order_shows || up != down;
    }
    CHECK(R < 3 || n < 1000 || order_shows, "n = %zu", n);
    T* data = on_device(host, n);
    uint64_t before = g->bytes_sent[ALL_REDUCE_SUM];
    all_reduce_sum(g, data, n, NULL);
    uint64_t sent = g->bytes_sent[ALL_REDUCE_SUM] - before;
    copy_to_host(host, data, n * sizeof(T), NULL);
    if (g->transport == OVER_NCCL) {  // which adds in an order of its own
        for (size_t i = 0; i < n; i++) {
            double size = 0.0;
            for (int r = 0; r < R; r++) { size += fabs((double)value_at(r, i)); }
            double allowed = 2.0 * R * (sizeof(T) == 4 ? 0x1p-24 : 0x1p-53) * size;
            CHECK(fabs((double)host[i] - (double)sum[i]) <= allowed, "n = %zu, i = %zu: %g, not %g", n, i, (double)host[i], (double)sum[i]);
        }
    } else {
        for (size_t i = 0; i < n; i++) {
            CHECK(memcmp(&host[i], &sum[i], sizeof(T)) == 0, "n = %zu, i = %zu: %a, not %a", n, i, (double)host[i], (double)sum[i]);
        }
        CHECK(sent == sizeof(T) * n * (uint64_t)(R - 1), "n = %zu: %" PRIu64 " bytes", n, sent);
    }
    CHECK(ranks != NULL || same_on_all_ranks(host, n * sizeof(T)), "n = %zu", n);
    device_free(data);
    free(host);
    free(sum);
}

static void check_sums(Group* g) {
    const size_t R = (size_t)g->size, once = COMM_GATHER_BYTES / sizeof(float);  // that many go at a time
    const size_t sizes[] = {0, 1, R - 1, R, R + 1, 17, once - 1, once, once + 1, 3 * once + 5, 50000};
    for (size_t n : sizes) {
        check_sum<float>(g, n, (uint32_t)n);
        check_sum<double>(g, n, (uint32_t)n);
    }
    // one after the other with no barrier, each rank at its own pace
    for (uint32_t i = 0; i < 12; i++) {
        usleep((unsigned)(hash_of(&i, 4) * (uint64_t)(g->rank + 3) % 3000));
        check_sum<float>(g, hash_of(&i, 4) % 20000, i);
    }
}

// Groups within the group: by every number of colors, in the group's order and against it
static void check_split(Group* g) {
    for (int colors = 1; colors <= g->size + 1; colors++) {
        for (bool reversed : {false, true}) {
            Group part = group_split(g, g->rank % colors, reversed ? -g->rank : g->rank + 3);
            int ranks[8], n = 0;
            for (int r = 0; r < g->size; r++) {
                if (r % colors == g->rank % colors) { ranks[n++] = r; }
            }
            for (int k = 0; reversed && k < n / 2; k++) { int r = ranks[k]; ranks[k] = ranks[n - 1 - k]; ranks[n - 1 - k] = r; }
            CHECK(part.size == n, "%d ranks of %d in %d colors", part.size, g->size, colors);
            CHECK(ranks[part.rank] == g->rank, "rank %d of %d in %d colors", part.rank, g->size, colors);
            CHECK(part.transport == (n == 1 ? ALONE : g->transport) && part.ranks_per_device == g->ranks_per_device);
            for (int i = 0; i < COMM_OPERATIONS; i++) { CHECK(part.bytes_sent[i] == 0); }
            check_sum<float>(&part, 1500, (uint32_t)colors, ranks);
            check_sum<double>(&part, 1500, (uint32_t)colors, ranks);
            int all[8];
            host_all_gather(&part, all, &g->rank, sizeof(int));
            CHECK(memcmp(all, ranks, (size_t)n * sizeof(int)) == 0);
            double norm = 1.0;
            host_all_reduce_sum(&part, &norm, 1);
            CHECK(norm == n);
            Group half = group_split(&part, part.rank % 2, 0);  // and once more
            CHECK(half.size == (part.rank % 2 == 0 ? (n + 1) / 2 : n / 2), "%d of %d", half.size, n);
            barrier(&half);
            group_free(&half);
            group_free(&part);
            CHECK(part.size == 0);
        }
    }
    uint64_t sent = g->bytes_sent[ALL_REDUCE_SUM];
    Group again = group_share(g);
    check_sum<float>(&again, 100, 3);
    CHECK(g->bytes_sent[ALL_REDUCE_SUM] == sent && (again.bytes_sent[ALL_REDUCE_SUM] > 0) == (g->size > 1));
    group_free(&again);
    check_sum<float>(g, 100, 3);  // it is still there
}

// inf - inf and NaN reach all ranks, and only the elements that they are in
static void check_nonfinite_sum(Group* g) {
    const int R = g->size;
    const size_t n = 1000;
    float host[n];
    for (size_t i = 0; i < n; i++) { host[i] = 1.0f; }
    if (g->rank == 0) { host[5] = INFINITY; host[6] = INFINITY; host[7] = 0x1.fffffep127f; }
    if (g->rank == R - 1) { host[6] = R > 1 ? -INFINITY : NAN; host[8] = NAN; host[n - 1] = -INFINITY; host[7] = 0x1.fffffep127f; }
    float* data = on_device(host, n);
    all_reduce_sum(g, data, n, NULL);
    copy_to_host(host, data, sizeof(host), NULL);
    CHECK(host[5] == INFINITY && isnan(host[6]) && isnan(host[8]) && host[n - 1] == -INFINITY);
    CHECK(R == 1 ? host[7] == 0x1.fffffep127f : host[7] == INFINITY, "%g", (double)host[7]);
    for (size_t i = 9; i < n - 1; i++) { CHECK(host[i] == (float)R, "i = %zu: %g", i, (double)host[i]); }
    CHECK(same_on_all_ranks(host, sizeof(host)));
    device_free(data);
}

static void check_max(Group* g) {
    const int R = g->size;
    const size_t sizes[] = {0, 1, (size_t)R - 1, (size_t)R + 1, 1000003};
    for (size_t n : sizes) {
        float* host = (float*)host_alloc(n * 4);
        float* top = (float*)host_alloc(n * 4);
        for (size_t i = 0; i < n; i++) {
            host[i] = fabsf(value(g->rank, i, 9));
            top[i] = 0.0f;
            for (int r = 0; r < R; r++) { top[i] = fmaxf(top[i], fabsf(value(r, i, 9))); }
        }
        if (n > 2000) {
            host[10] = top[10] = 0.0f;
            host[11] = g->rank == R - 1 ? INFINITY : 0x1p127f;
            host[12] = g->rank == R / 2 ? NAN : INFINITY;      // NaN wins
            host[13] = g->rank == 0 ? 0x1p-149f : 0.0f;        // so does the smallest subnormal
            top[11] = INFINITY, top[12] = NAN, top[13] = 0x1p-149f;
        }
        float* data = on_device(host, n);
        uint64_t before = g->bytes_sent[ALL_REDUCE_MAX];
        all_reduce_max(g, data, n, NULL);
        if (g->transport != OVER_NCCL) { CHECK(g->bytes_sent[ALL_REDUCE_MAX] - before == 8 * n * (uint64_t)(R - 1) / (uint64_t)R); }
        copy_to_host(host, data, n * 4, NULL);
        CHECK(memcmp(host, top, n * 4) == 0, "n = %zu", n);
        device_free(data);
        free(host);
        free(top);
    }
}

static void check_broadcast(Group* g) {
    const size_t sizes[] = {0, 1, 1000003, COMM_BROADCAST_BYTES, 2 * COMM_BROADCAST_BYTES + 1};
    int root = 0;
    for (size_t bytes : sizes) {
        root = (root + 1) % g->size;
        unsigned char* host = (unsigned char*)host_alloc(bytes);
        for (size_t i = 0; i < bytes; i++) { host[i] = (unsigned char)(g->rank == root ? i * 7 + i / 251 : 0xee); }
        char* data = (char*)device_alloc(bytes);
        copy_to_device(data, host, bytes, NULL);
        uint64_t before = g->bytes_sent[BROADCAST];
        broadcast(g, data, bytes, root, NULL);
        CHECK(g->bytes_sent[BROADCAST] - before == (g->rank == root ? bytes * (uint64_t)(g->size - 1) : 0));
        copy_to_host(host, data, bytes, NULL);
        for (size_t i = 0; i < bytes; i++) {
            CHECK(host[i] == (unsigned char)(i * 7 + i / 251), "byte %zu of %zu from %d", i, bytes, root);
        }
        device_free(data);
        free(host);
    }
}

static void check_host(Group* g) {
    const int R = g->size;
    constexpr int ONCE = COMM_GATHER_BYTES / sizeof(double);
    const int counts[] = {0, 1, 3, ONCE, ONCE + 1, 3 * ONCE};
    for (int n : counts) {
        double x[3 * ONCE + 1] = {};
        for (int i = 0; i < n; i++) { x[i] = (double)value(g->rank, (size_t)i, 4) * 0x1.123456789abcdp-3; }
        x[n] = 77.0;
        uint64_t before = g->bytes_sent[HOST_ALL_REDUCE_SUM];
        host_all_reduce_sum(g, x, n);
        CHECK(g->bytes_sent[HOST_ALL_REDUCE_SUM] - before == 8 * (uint64_t)n * (uint64_t)(R - 1));
        for (int i = 0; i < n; i++) {
            double sum = (double)value(0, (size_t)i, 4) * 0x1.123456789abcdp-3;
            for (int r = 1; r < R; r++) { sum += (double)value(r, (size_t)i, 4) * 0x1.123456789abcdp-3; }
            CHECK(x[i] == sum, "n = %d, i = %d: %a, not %a", n, i, x[i], sum);
        }
        CHECK(x[n] == 77.0);
    }
    const size_t lengths[] = {1, 7, 1000};
    for (size_t bytes : lengths) {
        char mine[1000], all[8 * 1000 + 1];
        memset(mine, 'a' + g->rank, sizeof(mine));
        memset(all, '-', sizeof(all));
        host_all_gather(g, all, mine, bytes);
        for (size_t i = 0; i < bytes * (size_t)R; i++) { CHECK(all[i] == (char)('a' + i / bytes)); }
        CHECK(all[bytes * (size_t)R] == '-');
    }
}

// nobody leaves before the last has come: clocks of one node can be compared
static void check_barrier(Group* g) {
    for (int late = 0; late < g->size; late++) {
        if (g->rank == late) { usleep(30 * 1000); }
        double came = seconds_now();
        barrier(g);
        double left = seconds_now();
        double times[8];
        host_all_gather(g, times, &came, sizeof(came));
        for (int r = 0; r < g->size; r++) { CHECK(left >= times[r], "left %g s before rank %d came", times[r] - left, r); }
    }
}

// On a GPU what is staged goes through host memory. The same code, on a CPU.
static void check_staged(Group* g) {
#if defined(USE_MPI) && !defined(USE_CUDA)
    if (g->size == 1 || g->size > 3) { return; }
    g->transport = OVER_MPI_STAGED;
    g->staging = host_alloc(COMM_STAGING_BYTES);
    check_sum<float>(g, 1000, 5);
    check_sum<float>(g, COMM_STAGING_BYTES / 4 + 12345, 5);
    check_sum<double>(g, COMM_STAGING_BYTES / 8 + 12345, 5);
    check_max(g);
    check_broadcast(g);
    char text[128];
    group_describe(g, text, sizeof(text));
    CHECK(strstr(text, " staged through host memory, ") != NULL && strstr(text, " ranks a GPU") != NULL, "%s", text);
    free(g->staging);
    g->transport = OVER_MPI;
    g->staging = NULL;
#else
    (void)g;
#endif
}

static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    const int R = atoi(argument);
    if (strcmp(mode, "refuse") == 0) { bad_input("--width 7: a multiple of 8 is allowed"); }
    CHECK(world.size == R && world.local_size == R, "%d ranks, %d in the node", world.size, world.local_size);
    CHECK(world.rank >= 0 && world.rank < R && world.local_rank == world.rank, "%d, in the node %d", world.rank, world.local_rank);
    CHECK(process.rank == world.rank && (process.abort != NULL) == (R > 1));
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);  // fewer may be ours
    CHECK(world.cores == max_of(cores / R, 1) || (world.cores >= 1 && world.cores < cores), "%d cores", world.cores);
    world_select_device(&world);
    CHECK(device_is_gpu || world.ranks_per_device == R);
    Group group = group_world(&world, true);
    CHECK(group.rank == world.rank && group.size == R && (group.transport == ALONE) == (R == 1));
    if (strcmp(mode, "die") == 0 || strcmp(mode, "vanish") == 0) {
        float* data = (float*)device_alloc(1 << 20);
        device_zero(data, 1 << 20, NULL);
        all_reduce_sum(&group, data, 1 << 18, NULL);
        if (group.rank == R - 1 && strcmp(mode, "die") == 0) { die("log.jsonl: no space left on device"); }
        if (group.rank == R - 1) { _exit(3); }
        all_reduce_sum(&group, data, 1 << 18, NULL);
        barrier(&group);  // with some libraries an exchange may end without its peer, a barrier cannot
        CHECK(false, "a rank has gone, and nobody noticed");
    }
    char text[128];
    group_describe(&group, text, sizeof(text));
    CHECK((R == 1) == (strcmp(text, "one process") == 0) && strlen(text) > 4 && strchr(text, '\n') == NULL, "%s", text);
    for (int i = 0; i < COMM_OPERATIONS; i++) { CHECK(group.bytes_sent[i] == 0); }
    check_sums(&group);
    check_split(&group);
    check_nonfinite_sum(&group);
    check_max(&group);
    check_broadcast(&group);
    check_host(&group);
    check_barrier(&group);
    check_staged(&group);
    group_free(&group);
    world_finalize(&world);
    printf("%s\n", text);
    return 0;
}

// ---- the tests ----

static void ranks_agree_with_the_sum_in_rank_order(int ranks) {
    if (!can_launch(ranks)) { skip(); }
    char argument[8];
    snprintf(argument, sizeof(argument), "%d", ranks);
    expect_ranks(ranks, "exchange", argument, NULL, 120, 0);
}
static void one_process_agrees(void**) { ranks_agree_with_the_sum_in_rank_order(1); }
static void two_ranks_agree(void**) { ranks_agree_with_the_sum_in_rank_order(2); }
static void three_ranks_agree(void**) { ranks_agree_with_the_sum_in_rank_order(3); }
static void four_ranks_agree(void**) { ranks_agree_with_the_sum_in_rank_order(4); }
static void five_ranks_agree(void**) { ranks_agree_with_the_sum_in_rank_order(5); }
static void eight_ranks_agree(void**) { ranks_agree_with_the_sum_in_rank_order(8); }

// Without a launcher MPI is not started: its start would cost 0.3 s
static void one_process_starts_at_once(void**) {
    if (!can_launch(1) || device_is_gpu) { skip(); }
    double best = 1e9;
    for (int i = 0; i < 3; i++) { best = fmin(best, expect_ranks(1, "refuse", "1", NULL, 20, 2).seconds); }
    assert_true(best < 0.2);
}

static void a_rank_that_fails_ends_all(void**) {
    if (!can_launch(3)) { skip(); }
    Launched l = expect_ranks(3, "die", "3", NULL, 30, 1);
    expect_line(&l, "rank 2: log.jsonl: no space left on device");
    assert_true(l.seconds < 10.0);
}

static void a_rank_that_vanishes_ends_all(void**) {
    if (!can_launch(3)) { skip(); }
    Launched l = launch_ranks(3, "vanish", "3", NULL, 30);
    bool ended = !l.timed_out && l.code != 0 && l.code != 99 && l.seconds < 10.0;
    if (!ended) { print_error("exit code %d after %.1f s:\n%s\n", l.code, l.seconds, l.out); }
    assert_true(ended);
}

static void bad_input_is_said_once(void**) {
    int counts[] = {1, 2, 8};
    for (int ranks : counts) {
        if (!can_launch(ranks)) { skip(); }
        Launched l = expect_ranks(ranks, "refuse", "0", NULL, 30, 2);
        expect_line(&l, "--width 7: a multiple of 8 is allowed");
        assert_true(l.seconds < 10.0);
    }
}

// A launcher that is not this MPI's (or any, for a build without MPI) would start N runs that know nothing of each other
static void a_foreign_launcher_is_refused(void**) {
#ifdef USE_MPI
    if (!on_path("mpirun")) { skip(); }  // an MPI without its tools may not come up at all
#endif
    Launched l = expect_ranks(1, "exchange", "1", "PMI_SIZE=2", 30, 2);
    assert_int_equal(l.lines, 1);
#ifdef USE_MPI
    assert_non_null(strstr(l.line, "the launcher started 2 processes, but MPI sees 1"));
#else
    assert_non_null(strstr(l.line, "the launcher started 2 processes, but this binary was built without MPI"));
#endif
}

static void launchers_are_known(void**) {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "PMIX_RANK", "PMI_RANK"};
    for (const char* name : names) { unsetenv(name); }
    assert_int_equal(launched_processes(), 0);
    for (int i = 0; i < 5; i++) {
        setenv(names[i], i < 3 ? "4" : "0", 1);
        assert_int_equal(launched_processes(), i < 3 ? 4 : -1);
        unsetenv(names[i]);
    }
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(launchers_are_known), cmocka_unit_test(one_process_agrees),
        cmocka_unit_test(two_ranks_agree), cmocka_unit_test(three_ranks_agree), cmocka_unit_test(four_ranks_agree),
        cmocka_unit_test(five_ranks_agree), cmocka_unit_test(eight_ranks_agree), cmocka_unit_test(one_process_starts_at_once),
        cmocka_unit_test(a_rank_that_fails_ends_all), cmocka_unit_test(a_rank_that_vanishes_ends_all),
        cmocka_unit_test(bad_input_is_said_once), cmocka_unit_test(a_foreign_launcher_is_refused),
    };
    return cmocka_run_group_tests_name("collectives", tests, NULL, NULL);
}
