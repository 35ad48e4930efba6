// comm.cuh: how the ranks of a training run share the work: who does what, the reduction of gradients, and the check that all were
// started alike.
//
// The world is data parallel: every rank holds the whole model and takes its own sequences. Each rank's loss is a share of the mean over the global
// batch, so that the sum of the ranks' gradients is the averaged gradient: nothing is divided afterwards.
//
// Gradients travel in buckets: the matrices of a layer, the embeddings, and all vectors together. When a layer's last micro-batch has been through
// the backward pass its bucket starts, and goes on while the layers below it are computed: on a GPU on a stream of its own, on a CPU whenever
// `reduction_poll` is called between kernels. A bucket goes through these phases, of which only those that FP8 needs are marked *:
//
//   ring      * measure amax | * MIN of the scales | quantise with μ·scale, add around the ring | collect the parts
//   direct    * measure amax | * collect all ranks' scales | quantise with the own scale, exchange parts | add in FP32 in rank order, * MAX of the
//               sums' amax | round once, collect the parts
//
// One bucket is under way at a time. It is quantised out of its accumulators into `payload`; the reduced gradient comes back into the accumulators' own
// memory, of which it needs the first bytes. So gradients take no more memory than their accumulators; what the exchanges work in is once the largest
// bucket as it travels, for `direct` twice and its share of FP32 sums.
//
// μ is the headroom that a ring's hop-wise sum in FP8 needs: q = FP8(μ·s·g), with one shared power-of-two scale s and μ in [1/ranks, 1]. `pre` is
// 1/ranks, `post` 1, `sqrt` 1/√ranks, and `auto` FP8-LM's: it starts at 1/√ranks, and each tensor's μ follows how many of its reduced codes saturate. It
// is the only state of a reduction that outlives a step, and part of what a checkpoint holds; a skipped step leaves it alone.
#pragma once
#include "core/params.h"     // Param, ParamTable
#include "core/profile.h"    // ProfileScope
#include "core/transfers.cuh"  // exchanges that go on by themselves; the process group

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

// ---- buckets ----

enum GradScaling { SCALING_PRE, SCALING_POST, SCALING_SQRT, SCALING_AUTO };
enum GradReduce { REDUCE_RING, REDUCE_DIRECT };

struct Bucket {      // tensors that travel together, in one format
    int layer;       // as in Param; ALL_LAYERS for the vectors
    DType accum, wire;
    int first, count;  // of its tensors in Reduction::tensors
    size_t elements;   // with the gaps after tensors, and a multiple of ranks · PARAM_ALIGNMENT
    char* memory;      // (elements) of accum, later the reduced gradient
    bool started;
};

constexpr int ALL_LAYERS = -2;

struct BucketTensor {
    int param;       // in the table
    size_t first;    // element of the bucket
};

struct ReductionConfig {
    GradScaling scaling;
    GradReduce algorithm;
};

// The gradients of a model: their accumulators, and their reduction over the ranks
struct Reduction {
    ReductionConfig config;
    Group* group;
    ParamTable* table;
    Bucket* buckets;
    int bucket_count;
    BucketTensor* tensors;
    int quantised;             // tensors that travel in FP8
    int scale_row;             // the most of them in one bucket, rounded up so that a row of scales is a multiple of PART_BYTES
    // on the device, by parameter
    double* elements;
    uint32_t* amax;            // 0 between steps
    float* accum_slots;        // (params, 4)
    float* slots;              // (params, 4) of the reduced gradients; the same array where nothing is exchanged
    float* mu;                 // outlives a step
    CodeCounts* counts;        // of this rank in this step
    float* count_sums;         // (2, params) underflow and saturated, over the ranks
    TensorStatistics* statistics;
    // on the device, for the bucket that is under way; what is exchanged is padded to PART_BYTES a rank
    int* tensor_params;        // the parameters of all buckets' tensors, one after the other
    float* scales;             // (ranks, scale_row)
    float* descales;           // (ranks, scale_row)
    uint32_t* sum_amax;        // (scale_row)
    char* payload;             // (elements) of wire
    char* received;            // direct: (ranks, part) of wire; ring: (part)
    float* sums;               // direct: (part)
    // what is under way
    Transfer transfer;
    Stream stream;
    Event ready, backward_done, done;
    int *queue, queued, next, phase;
    double waited;             // seconds of this step in which nothing else was done; on a GPU known after `done`
};

static inline size_t part_of(const Reduction* r, const Bucket* b) { return b->elements / (size_t)r->group->size; }
static inline Param* bucket_param(const Reduction* r, const Bucket* b, int k) { return &r->table->items[r->tensors[b->first + k].param]; }
// Its accumulators hold what is sent: nothing is quantised
static inline bool sent_as_it_is(const Bucket* b) { return b->wire == b->accum && !is_fp8(b->wire); }
static inline char* payload_of(const Reduction* r, const Bucket* b) { return sent_as_it_is(b) ? b->memory : r->payload; }
static inline CommOperation counted_as(const Bucket* b, CommOperation op) { return b->layer == ALL_LAYERS ? VECTORS : op; }
static inline bool exchanges(const Reduction* r) { return r->group->size > 1; }
static inline bool sends_fp8(const Reduction* r) { return exchanges(r) && r->quantised > 0; }

// Sorts the table's tensors into buckets, in its order: those of a layer that have one format, and all vectors.
static inline void reduction_plan(Reduction* r, Group* group, ParamTable* table, ReductionConfig config) {
    *r = Reduction{};
    r->group = group;
    r->table = table;
    r->config = config;
    size_t n = (size_t)table->count;
    r->buckets = (Bucket*)host_alloc(n * sizeof(Bucket));
    r->tensors = (BucketTensor*)host_alloc(n * sizeof(BucketTensor));
    r->queue = (int*)host_alloc(n * sizeof(int));
    int* bucket_of = (int*)host_alloc(n * sizeof(int));
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        if (dtype_bytes(p->wire) > dtype_bytes(p->accum)) {
            die("gradient of %s: added up in %s, sent in %s, which is wider", p->name, dtype_names[p->accum], dtype_names[p->wire]);
        }
        int layer = p->format_class == VECTOR ? ALL_LAYERS : p->layer, k = 0;
        while (k < r->bucket_count && (r->buckets[k].layer != layer || r->buckets[k].accum != p->accum || r->buckets[k].wire != p->wire)) { k++; }
        if (k == r->bucket_count) { r->buckets[r->bucket_count++] = Bucket{layer, p->accum, p->wire, 0, 0, 0, NULL, false}; }
        bucket_of[i] = k;
        r->quantised += is_fp8(p->wire);
    }
    int at = 0;
    for (int k = 0; k < r->bucket_count; k++) {
        Bucket* b = &r->buckets[k];
        b->first = at;
        for (int i = 0; i < table->count; i++) {
            if (bucket_of[i] != k) { continue; }
            r->tensors[at++] = BucketTensor{i, b->elements};
            b->elements += round_up(param_elements(&table->items[i]), PARAM_ALIGNMENT);
        }
        b->count = at - b->first;
        if (is_fp8(b->wire)) { r->scale_row = max_of(r->scale_row, round_up(b->count, (int)(PART_BYTES / sizeof(float)))); }
        b->elements = round_up(b->elements, PARAM_ALIGNMENT * (size_t)group->size);
    }
    free(bucket_of);
}

// The accumulators, and what the exchanges work in. Dry and for real (memory.h).
static inline void reduction_allocate(Reduction* r, Memory* memory) {
    size_t params = (size_t)r->table->count, ranks = (size_t)r->group->size, row = (size_t)r->scale_row;
    size_t payload = 0, received = 0, sums = 0;
    for (int k = 0; k < r->bucket_count; k++) {
        Bucket* b = &r->buckets[k];
        size_t wire = b->elements * (size_t)dtype_bytes(b->wire);
        payload = max_of(payload, sent_as_it_is(b) ? 0 : wire);
        received = max_of(received, r->config.algorithm == REDUCE_DIRECT ? wire : wire / ranks);
        sums = max_of(sums, part_of(r, b));
    }
    for (int k = 0; k < r->bucket_count; k++) {
        r->buckets[k].memory = (char*)memory_take(memory, GRADIENTS, r->buckets[k].elements, (size_t)dtype_bytes(r->buckets[k].accum));
    }
    r->accum_slots = memory_take<float>(memory, GRADIENTS, 4 * params);
    r->amax = memory_take<uint32_t>(memory, GRADIENTS, params);
    r->slots = r->accum_slots;
    if (exchanges(r)) {
        r->slots = memory_take<float>(memory, GRADIENTS, 4 * params);
        r->mu = memory_take<float>(memory, GRADIENTS, params);
        r->counts = memory_take<CodeCounts>(memory, GRADIENTS, params);
        r->elements = memory_take<double>(memory, GRADIENTS, params);
        r->count_sums = memory_take<float>(memory, GRADIENTS, 2 * params);
        r->statistics = memory_take<TensorStatistics>(memory, GRADIENTS, params);
        r->tensor_params = memory_take<int>(memory, COMMUNICATION, params);
        r->scales = memory_take<float>(memory, COMMUNICATION, ranks * row);
        r->descales = memory_take<float>(memory, COMMUNICATION, ranks * row);
        r->sum_amax = memory_take<uint32_t>(memory, COMMUNICATION, row);
        r->payload = (char*)memory_take(memory, COMMUNICATION, payload, 1);
        r->received = (char*)memory_take(memory, COMMUNICATION, received, 1);
        r->sums = memory_take<float>(memory, COMMUNICATION, r->config.algorithm == REDUCE_DIRECT ? sums : 0);
    }
    for (int k = 0; k < r->bucket_count; k++) {
        const Bucket* b = &r->buckets[k];
        for (int i = 0; i < b->count; i++) {
            int t = r->tensors[b->first + i].param;
            size_t first = r->tensors[b->first + i].first;
            Param* p = &r->table->items[t];
            p->grad_dtype = exchanges(r) ? b->wire : b->accum;
            if (!memory->committed) { continue; }
            p->accumulator = advance(b->memory, b->accum, first);
            p->grad = advance(b->memory, p->grad_dtype, first);
            p->accum_slot = r->accum_slots + 4 * t;
            p->grad_slot = r->slots + 4 * t;
        }
    }
}

static inline float first_mu(GradScaling scaling, int ranks) {
    return scaling == SCALING_POST ? 1.0f : scaling == SCALING_PRE ? 1.0f / (float)ranks : 1.0f / sqrtf((float)ranks);
}

// After the memory is there: everything as it is before the first step
static inline void reduction_start_up(Reduction* r) {
    int n = r->table->count;
    r->stream = urgent_stream_create();
    r->ready = event_create();
    r->backward_done = timed_event_create();
    r->done = timed_event_create();
    size_t largest = PART_BYTES, payload_bytes = 0;
    for (int k = 0; k < r->bucket_count; k++) {
        Bucket* b = &r->buckets[k];
        device_zero(b->memory, b->elements * (size_t)dtype_bytes(b->accum), r->stream);
        size_t bytes = b->elements * (size_t)dtype_bytes(b->wire);
        largest = max_of(largest, bytes);
        payload_bytes = max_of(payload_bytes, sent_as_it_is(b) ? 0 : bytes);
    }
    device_zero(r->amax, (size_t)n * sizeof(uint32_t), r->stream);
    run_rows(ResetSlots{r->accum_slots}, n, r->stream);
    if (exchanges(r)) {
        largest = max_of(largest, (size_t)r->group->size * (size_t)r->scale_row * sizeof(float));
        run_rows(ResetSlots{r->slots}, n, r->stream);
        device_zero(r->counts, (size_t)n * sizeof(CodeCounts), r->stream);
        float* mu = (float*)host_alloc((size_t)n * sizeof(float));
        int* params = (int*)host_alloc((size_t)n * sizeof(int));
        double* elements = (double*)host_alloc((size_t)n * sizeof(double));
        for (int i = 0; i < n; i++) {
            elements[i] = (double)param_elements(&r->table->items[i]);
            mu[i] = r->config.algorithm == REDUCE_RING ? first_mu(r->config.scaling, r->group->size) : 1.0f;
            params[i] = r->tensors[i].param;
        }
        copy_to_device(r->mu, mu, (size_t)n * sizeof(float), r->stream);
        copy_to_device(r->tensor_params, params, (size_t)n * sizeof(int), r->stream);
        copy_to_device(r->elements, elements, (size_t)n * sizeof(double), r->stream);
        device_zero(r->payload, payload_bytes, r->stream);  // what lies between tensors travels with them
        device_zero(r->scales, (size_t)r->group->size * (size_t)r->scale_row * sizeof(float), r->stream);
        stream_sync(r->stream);
        free(mu);
        free(params);
        free(elements);
    }
    stream_sync(r->stream);
    transfer_create(&r->transfer, r->group, largest);
}

static inline void reduction_free(Reduction* r) {
    stream_sync(r->stream);
    transfer_free(&r->transfer);
    stream_destroy(r->stream);
    event_destroy(r->ready);
    event_destroy(r->backward_done);
    event_destroy(r->done);
    free(r->buckets);
    free(r->tensors);
    free(r->queue);
    *r = Reduction{};
}

// ---- the reduction of a bucket ----

// f(its tensor, its number in the bucket, its first element there)
template <class F> static inline void each_tensor(const Reduction* r, const Bucket* b, F f) {
    for (int k = 0; k < b->count; k++) { f(bucket_param(r, b, k), k, r->tensors[b->first + k].first); }
}

// f(tensor, number, first element in the bucket, elements) for the stretches of this rank's part
template <class F> static inline void each_stretch_of_part(const Reduction* r, const Bucket* b, F f) {
    size_t begin = part_of(r, b) * (size_t)r->group->rank, end = begin + part_of(r, b);
    each_tensor(r, b, [=](Param* p, int k, size_t first) {
        size_t from = max_of(first, begin), to = min_of(first + param_elements(p), end);
        if (from < to) { f(p, k, from, to - from); }
    });
}

// Codes of the wire's format out of values of another: payload out of accumulators, reduced gradient out of sums. Slots are used by FP8 alone.
static inline void quantise(DType to, void* codes, DType from, const void* x, const float* descale, const float* scale, CodeCounts* counts, size_t n, Stream s) {
    bool fp8 = is_fp8(to);
    with_gradient_type(to, [&](auto d) {
        with_gradient_type(from, [&](auto a) {
            typedef typename decltype(d)::type D;
            typedef typename decltype(a)::type A;
            if constexpr (sizeof(D) <= sizeof(A)) {
                run_rows(QuantiseGradient<D, A>{(D*)codes, (const A*)x, is_fp8(from) ? descale : NULL, fp8 ? scale : NULL, fp8 ? counts : NULL, n}, pieces_of(n), s);
            } else {
                die("no codes in %s are made of %s", dtype_names[to], dtype_names[from]);
            }
        });
    });
}

// What this rank's tensors say of their scales, into scales (count)
static inline void measure_bucket(Reduction* r, const Bucket* b, float* scales) {
    each_tensor(r, b, [=](Param* p, int, size_t) {
        with_gradient_type(b->accum, [&](auto a) {
            typedef typename decltype(a)::type A;
            size_t n = param_elements(p);
            run_rows(AmaxPieces<A>{r->amax + (p - r->table->items), (const A*)p->accumulator, n}, pieces_of(n), r->stream);
        });
    });
    run_rows(LocalScales{scales, r->amax, r->accum_slots, r->tensor_params + b->first, largest_of(b->wire)}, b->count, r->stream);
}

// Makes what is sent; `scale_of(tensor, number)` points to an FP8 tensor's scale
template <class Scale> static inline void make_payload(Reduction* r, const Bucket* b, Scale scale_of) {
    if (sent_as_it_is(b)) { return; }
    each_tensor(r, b, [=](Param* p, int k, size_t first) {
        quantise(b->wire, advance(r->payload, b->wire, first), b->accum, p->accumulator, p->accum_slot, scale_of(p, k), r->counts + (p - r->table->items),
                 param_elements(p), r->stream);
    });
}

// One phase of the bucket that is under way; false: that was the last
static inline bool ring_phase(Reduction* r, const Bucket* b, int phase) {
    size_t part = part_of(r, b), part_bytes = part * (size_t)dtype_bytes(b->wire), mine = part_bytes * (size_t)r->group->rank;
    char* payload = payload_of(r, b);
    switch (phase) {
        case 0:
            if (is_fp8(b->wire)) {
                measure_bucket(r, b, r->scales);
                start_all_reduce_min(&r->transfer, r->scales, (size_t)b->count, SCALES, r->stream);
            }
            return true;
        case 1:
            if (is_fp8(b->wire)) { run_rows(RingSlots{r->slots, r->scales, r->mu, r->tensor_params + b->first}, b->count, r->stream); }
            make_payload(r, b, [](Param* p, int) { return p->grad_slot + 1; });
            start_ring_sum(&r->transfer, payload, r->received, part, b->wire, counted_as(b, REDUCE_SCATTER), r->stream);
            return true;
        case 2:
            if (payload != b->memory) { device_copy(b->memory + mine, payload + mine, part_bytes, r->stream); }
            start_all_gather(&r->transfer, b->memory, part_bytes, counted_as(b, ALL_GATHER), r->stream);
            return true;
        default: return false;
    }
}

static inline bool direct_phase(Reduction* r, const Bucket* b, int phase) {
    size_t part = part_of(r, b), row = (size_t)r->scale_row, begin = part * (size_t)r->group->rank;
    size_t part_bytes = part * (size_t)dtype_bytes(b->wire);
    bool fp8 = is_fp8(b->wire);
    float* mine = r->scales + row * (size_t)r->group->rank;
    switch (phase) {
        case 0:
            if (fp8) {
                measure_bucket(r, b, mine);
                start_all_gather(&r->transfer, r->scales, row * sizeof(float), SCALES, r->stream);
            }
            return true;
        case 1:
            if (fp8) { run_rows(SenderDescales{r->descales, r->scales, (int)row}, r->group->size, r->stream); }
            make_payload(r, b, [=](Param*, int k) { return mine + k; });
            start_all_to_all(&r->transfer, r->received, payload_of(r, b), part_bytes, counted_as(b, ALL_TO_ALL), r->stream);
            return true;
        case 2:
            if (fp8) { device_zero(r->sum_amax, row * sizeof(uint32_t), r->stream); }
            each_stretch_of_part(r, b, [=](Param*, int k, size_t first, size_t n) {
                with_gradient_type(b->wire, [&](auto d) {
                    typedef typename decltype(d)::type D;
                    size_t at = first - begin;
                    run_rows(SumParts<D>{r->sums + at, fp8 ? r->sum_amax + k : NULL, (const D*)r->received + at, fp8 ? r->descales + k : NULL, part,
                                         r->group->size, (int)row, n}, pieces_of(n), r->stream);
                });
            });
            if (fp8) { start_all_reduce_max(&r->transfer, r->sum_amax, (size_t)b->count, SCALES, r->stream); }
            return true;
        case 3:
            if (fp8) { run_rows(ResultSlots{r->slots, r->sum_amax, r->tensor_params + b->first, largest_of(b->wire)}, b->count, r->stream); }
            each_stretch_of_part(r, b, [=](Param* p, int, size_t first, size_t n) {
                quantise(b->wire, advance(b->memory, b->wire, first), FP32, r->sums + (first - begin), NULL, p->grad_slot + 1, NULL, n, r->stream);
            });
            start_all_gather(&r->transfer, b->memory, part_bytes, counted_as(b, ALL_GATHER), r->stream);
            return true;
        default: return false;
    }
}

// Goes on as far as it can without waiting; false: something is still under way
static inline bool reduction_poll(Reduction* r) {
    if (r->next == r->queued) { return true; }
    ProfileScope scope("gradient reduction");
    while (r->next < r->queued) {
        if (!transfer_done(&r->transfer)) { return false; }
        const Bucket* b = &r->buckets[r->queue[r->next]];
        bool more = r->config.algorithm == REDUCE_RING ? ring_phase(r, b, r->phase++) : direct_phase(r, b, r->phase++);
        if (!more) {
            r->next++;
            r->phase = 0;
        }
    }
    return true;
}

// ---- a step ----

// The accumulators of this layer are complete once what has been launched on `compute` is done: their buckets may start.
static inline void reduction_start(Reduction* r, int layer, Stream compute) {
    if (!exchanges(r)) { return; }
    for (int k = 0; k < r->bucket_count; k++) {
        if (r->buckets[k].layer != layer || r->buckets[k].started) { continue; }
        r->buckets[k].started = true;
        r->queue[r->queued++] = k;
    }
    event_record(r->ready, compute);
    stream_wait_event(r->stream, r->ready);
    reduction_poll(r);
}

// After the backward pass: what has not started does, and whatever is launched on `compute` from here on finds the reduced gradients.
static inline void reduction_finish(Reduction* r, Stream compute) {
    if (!exchanges(r)) { return; }
    double start = wall_seconds();
    event_record(r->backward_done, compute);
    for (int k = r->bucket_count - 1; k >= 0; k--) { reduction_start(r, r->buckets[k].layer, compute); }
    while (!reduction_poll(r)) { sched_yield(); }
    for (int k = 0; k < r->bucket_count; k++) { r->buckets[k].started = false; }
    r->queued = r->next = r->phase = 0;
    event_record(r->done, r->stream);
    stream_wait_event(compute, r->done);
    r->waited = wall_seconds() - start;
}

// Seconds that the last step spent on the reduction and nothing else. On a GPU the step must be over.
static inline double reduction_waited(const Reduction* r) {
    if (!exchanges(r) || !device_is_gpu) { return r->waited; }
    return max_of(0.0, 1e-3 * event_milliseconds(r->backward_done, r->done));
}

// ---- what it did ----

struct CountsToSums {    // sums (2, params) of this rank, to be added over the ranks
    float* sums;
    CodeCounts* counts;  // cleared for the next step
    int params;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        sums[i] = (float)counts[i].underflow;
        sums[params + i] = (float)counts[i].saturated;
        counts[i] = CodeCounts{0, 0};
    }
};

struct UpdateMu {
    TensorStatistics* statistics;
    float* mu;
    const float* sums;        // (2, params) over the ranks
    const double* top_codes;  // reduced codes at the maximum
    const double* elements;
    const int* apply;         // points to 0 where the step was skipped: then the headroom stays
    int params, ranks;
    bool ring, automatic;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        double n = elements[i], all = n * ranks;
        if (automatic && *apply != 0) { mu[i] = next_mu(mu[i], top_codes[i], n, ranks); }
        statistics[i] = TensorStatistics{(float)((double)sums[i] / all), (float)(ring ? top_codes[i] / n : (double)sums[params + i] / all), mu[i]};
    }
};

// After reduction_finish: adds what was counted over the ranks.
static inline void reduction_count(Reduction* r, Stream compute) {
    if (!sends_fp8(r)) { return; }
    run_rows(CountsToSums{r->count_sums, r->counts, r->table->count}, r->table->count, compute);
    all_reduce_sum(r->group, r->count_sums, 2 * (size_t)r->table->count, compute);
}

// After the decision, and the norm, which has counted each parameter's reduced codes at the maximum: the statistics of the step, and the headroom of the
// next. `apply`: on the device, 0 where the step was skipped.
static inline void reduction_adapt(Reduction* r, const double* top_codes, const int* apply, Stream compute) {
    if (!sends_fp8(r)) { return; }
    bool ring = r->config.algorithm == REDUCE_RING;
    run_rows(UpdateMu{r->statistics, r->mu, r->count_sums, top_codes, r->elements, apply, r->table->count, r->group->size, ring,
                      ring && r->config.scaling == SCALING_AUTO}, r->table->count, compute);
}
