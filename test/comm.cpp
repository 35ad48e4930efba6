// comm.cpp: the gradient reduction by buckets, ranks that were started with different flags, and each rank's share of the cores.
#include "../comm.cuh"
#include "launch.h"

// ---- what the ranks check ----

static float gradient(int rank, size_t i) { return (float)((i * 2654435761u + (size_t)rank * 40503u) % 100003) * 0.37f - 18000.0f; }

static void check_reduction(Group* g) {
    const Bucket buckets[] = {
        {0, 70001, "embedding"}, {70001, 1, "layer 0"}, {70002, 0, "layer 1"}, {70002, 999, "layer 2"}, {71001, 300000, "head"}
    };
    const int n = 5;
    const size_t elements = 371001;
    check_buckets(buckets, n, elements);
    float* host = (float*)host_alloc((elements + 8) * 4);
    for (size_t i = 0; i < elements + 8; i++) { host[i] = gradient(g->rank, i); }
    float* data = (float*)device_alloc((elements + 8) * 4);
    copy_to_device(data, host, (elements + 8) * 4, NULL);
    uint64_t before = g->bytes_sent[ALL_REDUCE_SUM], sent = 0;
    reduce_gradients(g, data, buckets, n, NULL);
    copy_to_host(host, data, (elements + 8) * 4, NULL);
    for (size_t i = 0; i < elements; i++) {
        float sum = gradient(0, i), size = fabsf(sum);
        for (int r = 1; r < g->size; r++) { sum += gradient(r, i), size += fabsf(gradient(r, i)); }
        float allowed = g->transport == OVER_NCCL ? 2.0f * (float)g->size * 0x1p-24f * size : 0.0f;
        CHECK(fabsf(host[i] - sum) <= allowed, "i = %zu: %a, not %a", i, (double)host[i], (double)sum);
    }
    for (size_t i = elements; i < elements + 8; i++) { CHECK(host[i] == gradient(g->rank, i), "beyond the last bucket, i = %zu", i); }
    for (int i = 0; i < n; i++) {
        uint64_t own = buckets[i].count / (uint64_t)g->size + ((uint64_t)g->rank < buckets[i].count % (uint64_t)g->size ? 1 : 0);
        sent += 4 * (buckets[i].count - own + own * (uint64_t)(g->size - 1));
    }
    if (g->transport != OVER_NCCL) { CHECK(g->bytes_sent[ALL_REDUCE_SUM] - before == sent); }
    device_free(data);
    free(host);
}

static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    world_select_device(&world);
    Group group = group_world(&world, true);
    void* buffer = device_alloc(group_buffer_bytes(&group));
    group_set_buffer(&group, buffer);
    if (strcmp(mode, "reduce") == 0) {
        check_reduction(&group);
        require_same_everywhere(&group, "flags", "");
        require_same_everywhere(&group, "flags", "micro-batch=4");
        require_same_everywhere(&group, "flags", "micro-batch=4\nseq-len=64\n");
        printf("held\n");
    } else {  // ranks from `first` on were started with something else
        int first = atoi(argument);
        bool odd = world.rank >= first;
        const char* same = "micro-batch=4\nseq-len=64\nlr=0.001\n";
        const char* text = !odd ? same : strcmp(mode, "value") == 0 ? "micro-batch=4\nseq-len=640\nlr=0.001\n"
            : strcmp(mode, "later") == 0 ? "micro-batch=4\nseq-len=64\nlr=0.002" : strcmp(mode, "less") == 0 ? "micro-batch=4\nseq-len=64\n"
            : strcmp(mode, "more") == 0 ? "micro-batch=4\nseq-len=64\nlr=0.001\nzero=2\n" : strcmp(mode, "none") == 0 ? "" : same;
        require_same_everywhere(&group, "flags", text);
        CHECK(false, "the ranks differ, and were not refused");
    }
    group_free(&group);
    device_free(buffer);
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void gradients_are_summed_bucket_by_bucket(void**) {
    const int counts[] = {1, 2, 3, 4, 5, 8};
    for (int ranks : counts) {
        if (!can_launch(ranks)) { skip(); }
        expect_ranks(ranks, "reduce", "0", NULL, 60, 0);
    }
}

static void ranks_with_different_flags_are_refused(void**) {
    const struct { int ranks; const char *mode, *first, *line; } cases[] = {
        {2, "value", "1", "rank 1 was started with seq-len=640, rank 0 with seq-len=64; all ranks need the same flags"},
        {8, "value", "3", "rank 3 was started with seq-len=640, rank 0 with seq-len=64; all ranks need the same flags"},
        {5, "later", "4", "rank 4 was started with lr=0.002, rank 0 with lr=0.001; all ranks need the same flags"},
        {2, "less", "1", "rank 1 was started with nothing more, rank 0 with lr=0.001; all ranks need the same flags"},
        {2, "more", "1", "rank 1 was started with zero=2, rank 0 with nothing more; all ranks need the same flags"},
        {3, "none", "2", "rank 2 was started with nothing more, rank 0 with micro-batch=4; all ranks need the same flags"},
    };
    for (auto& c : cases) {
        if (!can_launch(c.ranks)) { skip(); }
        Launched l = expect_ranks(c.ranks, c.mode, c.first, NULL, 30, 2);
        expect_line(&l, c.line);
        assert_true(l.seconds < 10.0);
    }
}

// What a child says and its exit code, for what ends the process
static int ends(void (*f)(void), char* said, size_t size) {
    int ends_of_pipe[2], status = 0;
    assert_int_equal(pipe(ends_of_pipe), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends_of_pipe[1], STDERR_FILENO);
        f();
        _exit(0);
    }
    close(ends_of_pipe[1]);
    ssize_t n = read(ends_of_pipe[0], said, size - 1);
    said[n > 0 ? n : 0] = '\0';
    close(ends_of_pipe[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void buckets_with_a_gap_an_overlap_or_a_short_end_are_refused(void**) {
    char said[1024];
    assert_int_equal(ends([] { const Bucket b[] = {{0, 3, ""}, {3, 0, ""}, {3, 4, ""}}; check_buckets(b, 3, 7); }, said, sizeof(said)), 0);
    assert_int_equal(ends([] { const Bucket b[] = {{0, 3, "a"}, {4, 4, "b"}}; check_buckets(b, 2, 8); }, said, sizeof(said)), 1);
    assert_string_equal(said, "train_gpt_fp8: gradient bucket 1 (b) begins at element 4, not where the last one ends, at 3\n");
    assert_int_equal(ends([] { const Bucket b[] = {{0, 3, "a"}, {2, 4, "b"}}; check_buckets(b, 2, 7); }, said, sizeof(said)), 1);
    assert_int_equal(ends([] { const Bucket b[] = {{0, 3, "a"}, {3, 4, "b"}}; check_buckets(b, 2, 8); }, said, sizeof(said)), 1);
    assert_string_equal(said, "train_gpt_fp8: the gradient buckets end at element 7 of 8\n");
    assert_int_equal(ends([] { const Bucket b[] = {{0, 3, "a"}, {3, 4, "b"}}; check_buckets(b, 2, 6); }, said, sizeof(said)), 1);
    assert_int_equal(ends([] { check_buckets(NULL, 0, 0); }, said, sizeof(said)), 0);
}

static void threads_are_the_share_of_the_cores_or_what_is_asked_for(void**) {
    char said[1024];
    World w = {};
    w.cores = 6;
    unsetenv("OMP_NUM_THREADS");
    assert_int_equal(threads_per_rank(&w), 6);
    setenv("OMP_NUM_THREADS", "", 1);
    assert_int_equal(threads_per_rank(&w), 6);
    setenv("OMP_NUM_THREADS", "3", 1);
    assert_int_equal(threads_per_rank(&w), 3);
    setenv("OMP_NUM_THREADS", "12,2", 1);
    assert_int_equal(threads_per_rank(&w), 12);
    const char* wrong[] = {"0", "-1", "two", "2x", "99999999999999999999", "4097"};
    for (const char* text : wrong) {
        setenv("OMP_NUM_THREADS", text, 1);
        assert_int_equal(ends([] { World v = {}; v.cores = 6; threads_per_rank(&v); }, said, sizeof(said)), 2);
        char line[128];
        snprintf(line, sizeof(line), "train_gpt_fp8: OMP_NUM_THREADS is \"%s\"; a number from 1 to 4096 is allowed\n", text);
        assert_string_equal(said, line);
    }
    unsetenv("OMP_NUM_THREADS");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gradients_are_summed_bucket_by_bucket), cmocka_unit_test(ranks_with_different_flags_are_refused),
        cmocka_unit_test(buckets_with_a_gap_an_overlap_or_a_short_end_are_refused),
        cmocka_unit_test(threads_are_the_share_of_the_cores_or_what_is_asked_for),
    };
    return cmocka_run_group_tests_name("comm", tests, NULL, NULL);
}
