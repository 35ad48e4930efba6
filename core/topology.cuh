// topology.cuh: who holds what, and who exchanges with whom: the ranks of a run as replicas (dp) of pipelines of stages (pp) of ranks that share layers
// (tp); before that, how many threads each uses, and whether all were started alike.
//
// Rank = (replica·pp + stage)·tp + tp_rank: those that share layers exchange most, and are neighbours in a node. Each rank is in four groups:
//
//     world    all
//     data     the same stage and tp_rank: those that hold the same weights, one of each replica; rank in it = replica
//     tensor   the same replica and stage: those that share layers; rank in it = tp_rank
//     pipe     the same replica and tp_rank: the stages of a pipeline; rank in it = stage
//
// One order for all ranks: the groups are made in this order. And where NCCL carries several of them, the exchanges that two ranks have in common are
// launched in one order on both: a GPU may have room for one of the kernels only, which waits for its peer's. So one host thread launches all, in the
// order of the program: within a pass the tensor group's, between passes the pipe's, behind each layer's backward the data group's, and at the end of
// the step the world's.
//
// A group of all ranks is the world's communicators once more, counted apart: NCCL's take memory on the GPU. A group of one rank exchanges nothing.
#pragma once
#include "collectives.cuh"

// ---- threads ----

// The threads that this process should use on the CPU: OMP_NUM_THREADS where it is set, else its share of the node's cores.
static inline int threads_per_rank(const World* w) {
    const char* asked = getenv("OMP_NUM_THREADS");
    if (asked == NULL || asked[0] == '\0') { return w->cores; }
    char* end = NULL;
    errno = 0;
    long n = strtol(asked, &end, 10);  // OpenMP takes a list, one number a level of nesting: the first is ours
    if (end == asked || (*end != '\0' && *end != ',') || errno != 0 || n < 1 || n > 4096) {
        bad_input("OMP_NUM_THREADS is \"%s\"; a number from 1 to 4096 is allowed", asked);
    }
    return (int)n;
}

// ---- all ranks alike ----

static inline size_t line_length(const char* p) { return strcspn(p, "\n"); }

// The first line in which two texts differ; at the end of one of them, an empty one
static inline void first_difference(const char** a, const char** b) {
    while (**a != '\0' && **b != '\0') {
        size_t n = line_length(*a);
        if (n != line_length(*b) || memcmp(*a, *b, n) != 0) { return; }
        *a += n + ((*a)[n] == '\n');
        *b += n + ((*b)[n] == '\n');
    }
}

// All ranks call this with the text of what they are to do, a line `name=value` each: refuses, naming the first rank and line that differ
// from rank 0. `what`: what the text is of, "flags".
static inline void require_same_everywhere(Group* g, const char* what, const char* text) {
    uint64_t mine = strlen(text), longest = 0;
    uint64_t* lengths = (uint64_t*)host_alloc(sizeof(uint64_t) * (size_t)g->size);
    host_all_gather(g, lengths, &mine, sizeof(mine));
    for (int r = 0; r < g->size; r++) { longest = max_of(longest, lengths[r]); }
    free(lengths);
    size_t row = (size_t)longest + 1;
    char* padded = (char*)host_alloc(row);
    memset(padded, 0, row);
    memcpy(padded, text, (size_t)mine);
    char* all = (char*)host_alloc(row * (size_t)g->size);
    host_all_gather(g, all, padded, row);
    for (int r = 1; r < g->size; r++) {
        const char *first = all, *other = all + (size_t)r * row;
        if (strcmp(first, other) == 0) { continue; }
        if (g->rank != 0) { barrier(g); }  // every rank has found this: rank 0 says it, and ends those that wait here
        first_difference(&first, &other);
        const char* ended = "nothing more";
        if (*first == '\0') { first = ended; }
        if (*other == '\0') { other = ended; }
        int a = (int)min_of(line_length(other), (size_t)200), b = (int)min_of(line_length(first), (size_t)200);
        bad_input("rank %d was started with %.*s, rank 0 with %.*s; all ranks need the same %s", r, a, other, b, first, what);
    }
    free(padded);
    free(all);
}

// All ranks call this first with the flag that says what they are to do, NULL: to train. Those that only print may not end before the others know.
static inline void require_same_task(const World* w, const char* task) {
    char mine[16] = "";
    snprintf(mine, sizeof(mine), "%s", task != NULL ? task : "");
    char* all = (char*)host_alloc((size_t)w->size * sizeof(mine));
    world_gather(w, all, mine, sizeof(mine));
    for (int r = 1; r < w->size; r++) {
        const char* other = all + (size_t)r * sizeof(mine);
        if (strcmp(other, all) == 0) { continue; }
        bad_input("rank %d was started with %s, rank 0 with %s; all ranks need the same flags", r, *other != '\0' ? other : "neither --plan nor --help",
            *all != '\0' ? all : "neither --plan nor --help");
    }
    free(all);
}

// ---- groups ----

// tp ranks share each layer, pp stages the layers, and dp such groups the batch.
struct RankLayout {
    int dp = 1, pp = 1, tp = 1;
    int replica = 0, stage = 0, tp_rank = 0;
};

// world = dp·pp·tp
static inline RankLayout layout_of(int rank, int world, int tp, int pp) {
    RankLayout l;
    l.dp = world / (tp * pp);
    l.pp = pp;
    l.tp = tp;
    l.replica = rank / (tp * pp);
    l.stage = rank / tp % pp;
    l.tp_rank = rank % tp;
    return l;
}

static inline int rank_of(const RankLayout* l, int replica, int stage, int tp_rank) { return (replica * l->pp + stage) * l->tp + tp_rank; }

struct Topology {
    RankLayout layout;
    Group world, data, tensor, pipe;
};

// f(group, its size) for the four, in their order
template <class F> static inline void each_group(Topology* t, F f) {
    f(&t->world, t->layout.dp * t->layout.pp * t->layout.tp);
    f(&t->data, t->layout.dp);
    f(&t->tensor, t->layout.tp);
    f(&t->pipe, t->layout.pp);
}

// Dies unless the i-th rank of the group is rank member(i) of the world, by what carries its payload: the group's first exchange, in the order of the program
template <class F> static inline void check_members(Group* g, const char* name, int rank, F member) {
    size_t n = (size_t)g->size;
    double *device = (double*)device_alloc(n * sizeof(double)), *ranks = (double*)host_alloc(n * sizeof(double));
    for (int i = 0; i < g->size; i++) { ranks[i] = i == g->rank ? rank : 0.0; }
    Stream stream = stream_create();
    copy_to_device(device, ranks, n * sizeof(double), stream);
    all_reduce_sum(g, device, n, stream);
    copy_to_host(ranks, device, n * sizeof(double), stream);
    stream_sync(stream);
    stream_destroy(stream);
    for (int i = 0; i < g->size; i++) {
        if (ranks[i] == member(i)) { continue; }
        die("the %s group's rank %d is rank %.0f of the run, but should be rank %d", name, i, ranks[i], member(i));
    }
    device_free(device);
    free(ranks);
    memset(g->bytes_sent, 0, sizeof(g->bytes_sent));
}

// The ranks of `world` with the same color, `size` of them, in the order of the world
static inline Group topology_group(const Group* world, int size, int color) {
    return size == world->size ? group_share(world) : group_split(world, color, world->rank);
}

// Everything but t->world, which is there, of a multiple of tp·pp ranks that all give the same tp and pp
static inline void topology_split(Topology* t, int tp, int pp) {
    int rank = t->world.rank;
    RankLayout l = t->layout = layout_of(rank, t->world.size, tp, pp);
    t->data = topology_group(&t->world, l.dp, l.stage * tp + l.tp_rank);
    t->tensor = topology_group(&t->world, tp, l.replica * pp + l.stage);
    t->pipe = topology_group(&t->world, pp, l.replica * tp + l.tp_rank);
    check_members(&t->world, "world", rank, [](int i) { return i; });
    check_members(&t->data, "data", rank, [&](int i) { return rank_of(&l, i, l.stage, l.tp_rank); });
    check_members(&t->tensor, "tensor", rank, [&](int i) { return rank_of(&l, l.replica, l.stage, i); });
    check_members(&t->pipe, "pipe", rank, [&](int i) { return rank_of(&l, l.replica, i, l.tp_rank); });
}

static inline void topology_free(Topology* t) {
    group_free(&t->pipe);
    group_free(&t->tensor);
    group_free(&t->data);
    group_free(&t->world);
    *t = Topology{};
}

// What this rank has sent, over all groups
static inline void topology_sent(uint64_t* bytes, const Topology* t) {
    for (int i = 0; i < COMM_OPERATIONS; i++) { bytes[i] = t->world.bytes_sent[i] + t->data.bytes_sent[i] + t->tensor.bytes_sent[i] + t->pipe.bytes_sent[i]; }
}
static inline void topology_forget_sent(Topology* t) {
    each_group(t, [](Group* g, int) { memset(g->bytes_sent, 0, sizeof(g->bytes_sent)); });
}
