// topology.cpp: who is in which group on 1 to 8 ranks; ranks that were started with different flags; and each rank's share of the cores.
#include "check.h"
#include "../core/topology.cuh"
#include "launch.h"

// ---- groups ----

static void check_topology(const World* w, int tp, int pp) {
    Topology t;
    t.world = group_world(w, true);
    topology_split(&t, tp, pp);
    const RankLayout* l = &t.layout;
    struct { Group* group; int size, rank; bool (*same)(RankLayout, RankLayout); } groups[] = {
        {&t.world, w->size, w->rank, [](RankLayout, RankLayout) { return true; }},
        {&t.data, w->size / tp / pp, l->replica, [](RankLayout a, RankLayout b) { return a.stage == b.stage && a.tp_rank == b.tp_rank; }},
        {&t.tensor, tp, l->tp_rank, [](RankLayout a, RankLayout b) { return a.stage == b.stage && a.replica == b.replica; }},
        {&t.pipe, pp, l->stage, [](RankLayout a, RankLayout b) { return a.tp_rank == b.tp_rank && a.replica == b.replica; }},
    };
    for (auto& x : groups) {
        Group* g = x.group;
        CHECK(g->size == x.size && g->rank == x.rank, "rank %d of %d, not %d of %d", g->rank, g->size, x.rank, x.size);
        CHECK((g->transport == ALONE) == (x.size == 1));
        CHECK(g->shared == (g != &t.world && x.size == w->size));
        for (int i = 0; i < COMM_OPERATIONS; i++) { CHECK(g->bytes_sent[i] == 0); }
        int all[8], n = 0;
        host_all_gather(g, all, &w->rank, sizeof(int));
        for (int r = 0; r < w->size; r++) {  // its members in the order of the world: in that of replicas, stages and tp_ranks
            if (x.same(*l, layout_of(r, w->size, tp, pp))) { CHECK(n < g->size && all[n++] == r, "rank %d", r); }
        }
        CHECK(n == g->size);
        Array<double> sum(1);
        sum.p[0] = ldexp(1.0, w->rank);
        all_reduce_sum(g, sum.p, 1, NULL);
        finish();
        double want = 0.0;
        for (int i = 0; i < n; i++) { want += ldexp(1.0, all[i]); }
        CHECK(sum.p[0] == want);
    }
    topology_free(&t);
    CHECK(t.world.size == 0 && t.pipe.size == 0);
}

// `argument`: the ranks, or the first of those that were started with something else
static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    const int R = world.size;
    world_select_device(&world);
    use_threads(1);
    if (strcmp(mode, "topology") == 0) {
        for (int tp = 1; tp <= R; tp++) {
            for (int pp = 1; tp * pp <= R; pp++) {
                if (R % (tp * pp) == 0) { check_topology(&world, tp, pp); }
            }
        }
        world_finalize(&world);
        return 0;
    }
    Group group = group_world(&world, true);
    if (strcmp(mode, "members") == 0) {
        Group reversed = group_split(&group, 0, -group.rank);
        check_members(&reversed, "data", group.rank, [](int i) { return i; });
    }
    if (strcmp(mode, "flags") == 0) {
        require_same_everywhere(&group, "flags", "");
        require_same_everywhere(&group, "flags", "micro-batch=4");
        require_same_everywhere(&group, "flags", "micro-batch=4\nseq-len=64\n");
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
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void on_ranks(int ranks, const char* mode) {
    if (!can_launch(ranks)) { skip(); }
    expect_ranks(ranks, mode, "0", NULL, 60, 0);
}
static void groups_have_the_ranks_that_they_should(void**) {
    for (int ranks : {1, 2, 3, 4, 6, 8}) { on_ranks(ranks, "topology"); }
}

// Rank = (replica·pp + stage)·tp + tp_rank, each once
static void layouts_go_through_all_ranks(void**) {
    for (int dp : {1, 2, 3, 8}) {
        for (int pp : {1, 2, 5}) {
            for (int tp : {1, 3, 4}) {
                int rank = 0;
                for (int replica = 0; replica < dp; replica++) {
                    for (int stage = 0; stage < pp; stage++) {
                        for (int tp_rank = 0; tp_rank < tp; tp_rank++) {
                            RankLayout l = layout_of(rank, dp * pp * tp, tp, pp);
                            assert_true(l.dp == dp && l.pp == pp && l.tp == tp && l.replica == replica && l.stage == stage && l.tp_rank == tp_rank);
                            assert_int_equal(rank_of(&l, replica, stage, tp_rank), rank++);
                        }
                    }
                }
            }
        }
    }
}

static void a_group_of_other_ranks_is_refused(void**) {
    if (!can_launch(2)) { skip(); }
    Launched l = expect_ranks(2, "members", "0", NULL, 30, 1);
    expect_line(&l, "the data group's rank 0 is rank 1 of the run, but should be rank 0");
}

static void ranks_with_the_same_flags_start(void**) { on_ranks(3, "flags"); }

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

static void threads_are_the_share_of_the_cores_or_what_is_asked_for(void**) {
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
        char line[128];
        snprintf(line, sizeof(line), "OMP_NUM_THREADS is \"%s\"; a number from 1 to 4096 is allowed", text);
        expect_end(2, line, NULL, [&] { threads_per_rank(&w); });
    }
    unsetenv("OMP_NUM_THREADS");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_have_the_ranks_that_they_should), cmocka_unit_test(layouts_go_through_all_ranks),
        cmocka_unit_test(a_group_of_other_ranks_is_refused), cmocka_unit_test(ranks_with_the_same_flags_start),
        cmocka_unit_test(ranks_with_different_flags_are_refused), cmocka_unit_test(threads_are_the_share_of_the_cores_or_what_is_asked_for),
    };
    return cmocka_run_group_tests_name("topology", tests, NULL, NULL);
}
