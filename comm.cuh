// comm.cuh: how the ranks of a training run share the work: who does what, the reduction of gradients, and the check that all were
// started alike.
//
// The world is data parallel: every rank holds the whole model and takes its own sequences. After the backward pass the gradients are
// summed over the ranks in buckets. A bucket is a stretch of the gradient array, the tensors of one layer; the last layer's gradients are
// ready first, so buckets are reduced from the last to the first. The sum is not divided by anything: whoever computes the loss or
// applies the update folds the averaging in.
#pragma once
#include "core/collectives.cuh"

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

// ---- the reduction of gradients ----

struct Bucket {
    size_t first, count;  // elements of the gradient array
    const char* name;
};

// At start: the buckets follow each other and cover the array, so that no gradient is left out or summed twice.
static inline void check_buckets(const Bucket* buckets, int n, size_t elements) {
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        if (buckets[i].first != at) {
            die("gradient bucket %d (%s) begins at element %zu, not where the last one ends, at %zu", i, buckets[i].name, buckets[i].first,
                at);
        }
        at += buckets[i].count;
    }
    if (at != elements) { die("the gradient buckets end at element %zu of %zu", at, elements); }
}

// gradients = Σ over the ranks of g, in FP32, in place
static inline void reduce_gradients(Group* g, float* gradients, const Bucket* buckets, int n, Stream stream) {
    for (int i = n - 1; i >= 0; i--) { all_reduce_sum(g, gradients + buckets[i].first, buckets[i].count, stream); }
}
