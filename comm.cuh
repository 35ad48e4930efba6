// comm.cuh: how the replicas of a training run share the work: who updates what, the reduction of gradients, and the return of weights.
//
// What is reduced here are the gradients of replicas: ranks that hold the same part of the model and take their own sequences each. A rank's loss is a share
// of the mean over the global batch, so that the sum of the replicas' gradients is the averaged gradient: nothing is divided afterwards. Which rank updates
// what is up to the partition (core/partition.h): without ZeRO every rank gets all of the reduced gradient; with it only its part, and the weights come back
// from their owners after the step.
//
// Scales here, and those of E4M3 accumulators, are of what a rank holds: of a tensor that a layer's ranks share each share has its own. They do not outlive
// the step; what does, μ, is of the whole tensor.
//
// The ranks that share each layer (tensor parallel) have one thing to add before: of the gradients of a few vectors, the partial ones, each has its own rows'
// part. At the step's end they add them up in FP32, in the accumulators' memory; then every one of them has the replica's gradient.
//
// Gradients travel in buckets: the matrices of a layer, the embeddings, and all vectors together. When a layer's last micro-batch has been through
// the backward pass its bucket starts, and goes on while the layers below it are computed: on a GPU on a stream of its own, on a CPU whenever
// `reduction_poll` is called between kernels. A bucket goes through these phases, of which only those that FP8 needs are marked *:
//
//   ring      * measure amax | * MIN of the scales | quantise with μ·scale, add around the ring | collect the parts: only without ZeRO
//   direct    * measure amax | * collect all ranks' scales | quantise with the own scale, exchange parts | add in FP32 in rank order
//               without ZeRO:           * MAX of the sums' amax | round once, collect the parts
//               whole tensors:          sums go on to the tensors' owners
//   weights   collect the parts
//
// One bucket is under way at a time. It is quantised out of its accumulators into `payload`; the reduced gradient comes back into the accumulators' own
// memory: codes, or with `direct` and ZeRO the sums in FP32, which no rounding has touched. So gradients take no more memory than their accumulators, where
// those are as large as a part in FP32; what the exchanges work in is once the largest bucket as it travels, for `direct` twice.
//
// ZeRO 2 keeps no accumulators of matrices: two layers' gradients, of one micro-batch, take turns in the same memory, and are reduced after every
// micro-batch into the owner's part, which is in FP32. That is as many reductions as micro-batches. Embeddings, head and vectors are added up and reduced
// once, as with ZeRO 1.
//
// Weights are collected in the order in which the forward pass needs them, while it is under way: a layer waits for its own.
//
// μ is the headroom that a ring's hop-wise sum in FP8 needs: q = FP8(μ·s·g), with one shared power-of-two scale s and μ in [1/ranks, 1]. `pre` is
// 1/ranks, `post` 1, `sqrt` 1/√ranks, and `auto` FP8-LM's: it starts at 1/√ranks, and each tensor's μ follows how many of its reduced codes saturate. It
// is the only state of a reduction that outlives a step, and part of what a checkpoint holds; a skipped step leaves it alone.
#pragma once
#include "core/partition.h"  // buckets, parts, Param
#include "core/profile.h"    // ProfileScope
#include "core/transfers.cuh"  // exchanges that go on by themselves; the process groups

// ---- gradients ----

enum GradScaling { SCALING_PRE, SCALING_POST, SCALING_SQRT, SCALING_AUTO };
enum GradReduce { REDUCE_RING, REDUCE_DIRECT };

struct ReductionConfig {
    GradScaling scaling;
    GradReduce algorithm;
    ZeroConfig zero;
};

constexpr int ZERO_2_LAYERS = 2;  // whose gradients are there at a time: one is computed while the one above it is sent

// What travels between the ranks: the gradients of a model, their accumulators and their reduction; and the weights on their way back
struct Reduction {
    ReductionConfig config;
    Group* group;              // the replicas
    Group* tensor;             // the ranks of a layer; NULL: this one alone
    ParamTable* table;
    Partition partition;
    int quantised;             // tensors that travel in FP8
    int partials;              // buckets that the ranks of a layer add up before the replicas do
    int scale_row;             // the most of them in one bucket, rounded up so that a row of scales is a multiple of PART_BYTES
    // on the device, by parameter
    double* elements;          // (3, params) of whole tensors that are reduced once a step; of those that are after every micro-batch; how often a layer's ranks count each
    uint32_t* amax;            // 0 between steps
    float* accum_slots;        // (params, 4)
    float* slots;              // (params, 4) of the reduced gradients; the same array where nothing is exchanged
    float* ring_slots;         // (params, 4) of the codes that a ring adds and the optimizer does not read; the same array where there are none
    float* mu;                 // outlives a step
    CodeCounts* counts;        // of this rank in this step
    float* count_sums;         // (3, params) underflow, saturated and reduced codes at the maximum, over the ranks, those of a layer too
    TensorStatistics* statistics;
    // on the device, for the bucket that is under way; what is exchanged is padded to PART_BYTES a rank
    int* tensor_params;        // the parameters of all buckets' tensors, one after the other
    float* scales;             // (ranks, scale_row)
    float* descales;           // (ranks, scale_row)
    uint32_t* sum_amax;        // (scale_row)
    char* payload;             // (elements) of wire; payload_bytes
    char* received;            // direct: (ranks, chunk) of wire; a ring over MPI: (the largest part)
    float* sums;               // direct: (chunk), where they are not written where they stay; sum_elements
    size_t payload_bytes, sum_elements;
    float* regrouped;          // direct, ZeRO 2, whole tensors: (part) sums, before they are added
    char* tensor_received;     // over MPI: (the largest part) of what the ranks of a layer add up
    // what is under way
    Transfer transfer, tensor_transfer;
    size_t* tensor_cuts;       // (ranks of a layer + 1) of the bucket that they add up
    Stream stream;
    Event ready;
    Event backward_done[2], done[2];  // of this step and the one before, whose times the host reads meanwhile
    int *queue, queued, next, phase;
    bool returning;            // weights are under way, not gradients
    bool first, last;          // of the step's micro-batches this is
    int reductions;            // since the last step, of what is reduced after every micro-batch
    int64_t steps;             // so far
    double waited[2];          // seconds of this step, and the one before, in which nothing else was done
};

static inline size_t chunk_of(const Reduction* r, const Bucket* b) { return b->elements / (size_t)r->group->size; }
static inline Param* bucket_param(const Reduction* r, const Bucket* b, int k) { return &r->table->items[r->partition.tensors[b->first + k].param]; }
// Its accumulators hold what is sent: nothing is quantised
static inline bool sent_as_it_is(const Bucket* b) { return b->wire == b->accum && !is_fp8(b->wire); }
static inline char* payload_of(const Reduction* r, const Bucket* b) { return sent_as_it_is(b) ? b->memory : r->payload; }
static inline CommOperation counted_as(const Bucket* b, CommOperation op) { return b->layer == ALL_LAYERS ? VECTORS : op; }
static inline bool exchanges(const Reduction* r) { return r->group->size > 1; }
static inline int tensor_ranks(const Reduction* r) { return r->tensor != NULL ? r->tensor->size : 1; }
static inline bool sends_fp8(const Reduction* r) { return exchanges(r) && r->quantised > 0; }
static inline int zero_level(const Reduction* r) { return r->partition.zero.level; }
static inline bool is_direct(const Reduction* r) { return r->config.algorithm == REDUCE_DIRECT; }
// The parts by owners, in bytes of `type`
static inline Parts parts_of(const Reduction* r, const Bucket* b, DType type) {
    size_t bytes = (size_t)dtype_bytes(type);
    return b->whole ? cut_parts(b->cuts, bytes) : equal_parts(chunk_of(r, b) * bytes);
}
// Where a bucket is cut for the ranks of a layer to add it up: evenly. Until the next call
static inline Parts tensor_parts(const Reduction* r, const Bucket* b) {
    size_t lines = b->elements * sizeof(float) / PART_BYTES, ranks = (size_t)tensor_ranks(r);
    for (size_t k = 0; k <= ranks; k++) { r->tensor_cuts[k] = ceil_div(lines * k, ranks); }  // none has more than the first
    return cut_parts(r->tensor_cuts, PART_BYTES);
}
// Are some gradients reduced after each micro-batch, and do each one's begin anew?
static inline bool reduces_each(const Reduction* r) { return zero_level(r) == 2; }
// ZeRO 2: these are; layers take turns in the same memory
static inline bool takes_turns(const Reduction* r, const Bucket* b) { return reduces_each(r) && b->matrices; }
static inline bool takes_turns(const Reduction* r, const Param* p) { return reduces_each(r) && p->format_class == MATRIX; }
// The reduced gradient is an FP32 array of this rank's part alone
static inline bool reduced_in_fp32(const Reduction* r, const Bucket* b) { return takes_turns(r, b) || (zero_level(r) > 0 && is_direct(r)); }
// The slots (params, 4) of the codes that a ring adds
static inline float* ring_slots_of(const Reduction* r, const Bucket* b) { return takes_turns(r, b) ? r->ring_slots : r->slots; }

// `group`: the replicas; `tensor`: the ranks of a layer, NULL: this one has it to itself
static inline void reduction_plan(Reduction* r, Group* group, Group* tensor, ParamTable* table, ReductionConfig config) {
    *r = Reduction{};
    r->group = group;
    r->tensor = tensor;
    r->table = table;
    r->config = config;
    for (int i = 0; i < table->count; i++) {
        const Param* p = &table->items[i];
        if (dtype_bytes(p->wire) > dtype_bytes(p->accum)) {
            die("gradient of %s: added up in %s, sent in %s, which is wider", p->name, dtype_names[p->accum], dtype_names[p->wire]);
        }
        if (p->partial && (p->format_class != VECTOR || p->accum != FP32)) { die("gradient of %s: partial, but no vector in fp32", p->name); }
        r->quantised += is_fp8(p->wire);
    }
    partition_build(&r->partition, table, group->rank, group->size, config.zero);
    r->queue = (int*)host_alloc((size_t)table->count * sizeof(int));
    r->tensor_cuts = (size_t*)host_alloc(((size_t)tensor_ranks(r) + 1) * sizeof(size_t));
    for (int k = 0; k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        r->partials += b->partial && tensor_ranks(r) > 1;
        if (is_fp8(b->wire)) { r->scale_row = max_of(r->scale_row, round_up(b->count, (int)(PART_BYTES / sizeof(float)))); }
    }
}

// What an array of a bucket's gradients takes while they are added up, and reduced
static inline size_t accumulator_bytes(const Reduction* r, const Bucket* b) {
    size_t reduced = reduced_in_fp32(r, b) && !takes_turns(r, b) ? part_elements(&r->partition, b) * sizeof(float) : 0;
    return max_of(b->elements * (size_t)dtype_bytes(b->accum), reduced);
}

// What another bucket takes in b's turn: that of their layer
static inline size_t turn_bytes_of(const Reduction* r, const Bucket* b, const Bucket* other) {
    return takes_turns(r, other) && other->layer == b->layer ? round_up(accumulator_bytes(r, other), MEMORY_ALIGNMENT) : 0;
}

// The accumulators
static inline void allocate_accumulators(Reduction* r, Memory* memory) {
    Partition* p = &r->partition;
    size_t turn_bytes = 0;
    for (int k = 0; k < p->bucket_count; k++) {
        Bucket* b = &p->buckets[k];
        if (takes_turns(r, b)) {
            size_t layer = 0;
            for (int i = 0; i < p->bucket_count; i++) { layer += turn_bytes_of(r, b, &p->buckets[i]); }
            turn_bytes = max_of(turn_bytes, layer);
            b->owned = memory_take<float>(memory, GRADIENTS, part_elements(p, b));
        } else {
            b->memory = (char*)memory_take(memory, GRADIENTS, accumulator_bytes(r, b), 1);
        }
    }
    char* turns = (char*)memory_take(memory, GRADIENTS, ZERO_2_LAYERS * turn_bytes, 1);
    for (int k = 0; memory->committed && k < p->bucket_count; k++) {
        Bucket* b = &p->buckets[k];
        if (!takes_turns(r, b)) { continue; }
        b->memory = turns + (size_t)(b->layer % ZERO_2_LAYERS) * turn_bytes;
        for (int i = 0; i < k; i++) { b->memory += turn_bytes_of(r, b, &p->buckets[i]); }
    }
}

// Tells the parameters where their gradients lie
static inline void place_gradients(Reduction* r, bool committed) {
    const Partition* p = &r->partition;
    for (int k = 0; k < p->bucket_count; k++) {
        const Bucket* b = &p->buckets[k];
        for (int i = 0; i < b->count; i++) {
            int t = p->tensors[b->first + i].param;
            size_t first = p->tensors[b->first + i].first;
            Param* q = &r->table->items[t];
            q->grad_dtype = !exchanges(r) ? b->accum : reduced_in_fp32(r, b) ? FP32 : b->wire;
            if (!committed) { continue; }
            q->accumulator = advance(b->memory, b->accum, first);
            size_t kept = first + q->own_first - (reduced_in_fp32(r, b) && q->own_count > 0 ? part_begin(p, b) : 0);
            q->grad = advance(takes_turns(r, b) ? (char*)b->owned : b->memory, q->grad_dtype, q->own_count > 0 ? kept : 0);
            q->accum_slot = r->accum_slots + 4 * t;
            q->grad_slot = r->slots + 4 * t;
        }
    }
}

// The accumulators, and what the exchanges work in. Dry and for real (memory.h).
static inline void reduction_allocate(Reduction* r, Memory* memory) {
    const Partition* p = &r->partition;
    size_t params = (size_t)r->table->count, ranks = (size_t)r->group->size, row = (size_t)r->scale_row;
    size_t payload = 0, received = 0, sums = 0, regrouped = 0, tensor_received = 0;
    for (int k = 0; k < p->bucket_count; k++) {
        const Bucket* b = &p->buckets[k];
        size_t bytes = (size_t)dtype_bytes(b->wire);
        payload = max_of(payload, sent_as_it_is(b) ? 0 : b->elements * bytes);
        bool ours = r->group->transport == OVER_MPI;  // NCCL's ring has buffers of its own, a staged one is on the host
        received = max_of(received, (is_direct(r) ? b->elements : ours ? largest_part(p, b) : 0) * bytes);
        sums = max_of(sums, is_direct(r) && (zero_level(r) == 0 || b->whole) ? chunk_of(r, b) : 0);
        regrouped = max_of(regrouped, is_direct(r) && takes_turns(r, b) && b->whole ? part_elements(p, b) : 0);
        bool added = b->partial && tensor_ranks(r) > 1 && r->tensor->transport == OVER_MPI;
        tensor_received = max_of(tensor_received, added ? ceil_div(b->elements * sizeof(float), PART_BYTES * (size_t)tensor_ranks(r)) * PART_BYTES : 0);
    }
    r->payload_bytes = payload;
    r->sum_elements = sums;
    allocate_accumulators(r, memory);
    r->accum_slots = memory_take<float>(memory, GRADIENTS, 4 * params);
    r->amax = memory_take<uint32_t>(memory, GRADIENTS, params);
    r->slots = r->accum_slots;
    if (exchanges(r)) {
        r->slots = memory_take<float>(memory, GRADIENTS, 4 * params);
        r->ring_slots = !is_direct(r) && reduces_each(r) ? memory_take<float>(memory, GRADIENTS, 4 * params) : r->slots;
        r->mu = memory_take<float>(memory, GRADIENTS, params);
        r->counts = memory_take<CodeCounts>(memory, GRADIENTS, params);
        r->elements = memory_take<double>(memory, GRADIENTS, 3 * params);
        r->count_sums = memory_take<float>(memory, GRADIENTS, 3 * params);
        r->statistics = memory_take<TensorStatistics>(memory, GRADIENTS, params);
        r->tensor_params = memory_take<int>(memory, COMMUNICATION, params);
        r->scales = memory_take<float>(memory, COMMUNICATION, ranks * row);
        r->descales = memory_take<float>(memory, COMMUNICATION, ranks * row);
        r->sum_amax = memory_take<uint32_t>(memory, COMMUNICATION, row);
        r->payload = (char*)memory_take(memory, COMMUNICATION, payload, 1);
        r->received = (char*)memory_take(memory, COMMUNICATION, received, 1);
        r->sums = memory_take<float>(memory, COMMUNICATION, sums);
        r->regrouped = memory_take<float>(memory, COMMUNICATION, regrouped);
    }
    r->tensor_received = (char*)memory_take(memory, COMMUNICATION, tensor_received, 1);
    place_gradients(r, memory->committed);
}

static inline float first_mu(GradScaling scaling, int ranks) {
    return scaling == SCALING_POST ? 1.0f : scaling == SCALING_PRE ? 1.0f / (float)ranks : 1.0f / sqrtf((float)ranks);
}

// After the memory is there: everything as it is before the first step
static inline void reduction_start_up(Reduction* r) {
    Partition* p = &r->partition;
    int n = r->table->count;
    r->stream = urgent_stream_create();
    r->ready = event_create();
    for (int i = 0; i < 2; i++) {
        r->backward_done[i] = timed_event_create();
        r->done[i] = timed_event_create();
    }
    size_t largest = PART_BYTES, largest_partial = 0;
    for (int k = 0; k < p->bucket_count; k++) {
        Bucket* b = &p->buckets[k];
        b->arrived = event_create();
        device_zero(b->memory, accumulator_bytes(r, b), r->stream);
        if (b->owned != NULL) { device_zero(b->owned, part_elements(p, b) * sizeof(float), r->stream); }
        size_t bytes = b->elements * (size_t)dtype_bytes(b->wire), weights = zero_level(r) > 0 ? b->elements * (size_t)dtype_bytes(b->dtype) : 0;
        bool regroups = is_direct(r) && b->whole;
        largest_partial = max_of(largest_partial, b->partial ? b->elements * sizeof(float) : 0);
        largest = max_of(max_of(largest, bytes), max_of(weights, regroups ? max_of(chunk_of(r, b), part_elements(p, b)) * sizeof(float) : 0));
    }
    device_zero(r->amax, (size_t)n * sizeof(uint32_t), r->stream);
    run_rows(ResetSlots{r->accum_slots}, n, r->stream);
    if (exchanges(r)) {
        largest = max_of(largest, (size_t)r->group->size * (size_t)r->scale_row * sizeof(float));
        run_rows(ResetSlots{r->slots}, n, r->stream);
        run_rows(ResetSlots{r->ring_slots}, n, r->stream);
        device_zero(r->counts, (size_t)n * sizeof(CodeCounts), r->stream);
        float* mu = (float*)host_alloc((size_t)n * sizeof(float));
        int* params = (int*)host_alloc((size_t)n * sizeof(int));
        double* elements = (double*)host_alloc(3 * (size_t)n * sizeof(double));
        for (int i = 0; i < n; i++) {
            const Param* q = &r->table->items[i];
            double whole = (double)whole_count(q);
            elements[i] = takes_turns(r, q) ? 0.0 : whole;
            elements[n + i] = takes_turns(r, q) ? whole : 0.0;
            elements[2 * n + i] = q->tp_axis == TP_WHOLE ? tensor_ranks(r) : 1.0;
            mu[i] = r->config.algorithm == REDUCE_RING ? first_mu(r->config.scaling, r->group->size) : 1.0f;
            params[i] = p->tensors[i].param;
        }
        copy_to_device(r->mu, mu, (size_t)n * sizeof(float), r->stream);
        copy_to_device(r->tensor_params, params, (size_t)n * sizeof(int), r->stream);
        copy_to_device(r->elements, elements, 3 * (size_t)n * sizeof(double), r->stream);
        device_zero(r->payload, r->payload_bytes, r->stream);  // what lies between tensors travels with them
        device_zero(r->sums, r->sum_elements * sizeof(float), r->stream);
        device_zero(r->scales, (size_t)r->group->size * (size_t)r->scale_row * sizeof(float), r->stream);
        stream_sync(r->stream);
        free(mu);
        free(params);
        free(elements);
    }
    stream_sync(r->stream);
    transfer_create(&r->transfer, r->group, largest);
    if (r->partials > 0) { transfer_create(&r->tensor_transfer, r->tensor, largest_partial); }
}

// ---- the reduction of a bucket ----

// f(its tensor, its number in the bucket, its first element there)
template <class F> static inline void each_tensor(const Reduction* r, const Bucket* b, F f) {
    for (int k = 0; k < b->count; k++) { f(bucket_param(r, b, k), k, r->partition.tensors[b->first + k].first); }
}

// f(tensor, number, first element in the bucket, elements) for the stretches that lie in [begin, end)
template <class F> static inline void each_stretch(const Reduction* r, const Bucket* b, size_t begin, size_t end, F f) {
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

// ZeRO 2: the owned part [+]= this rank's part of what has been reduced, of `type`
static inline void add_to_owned(Reduction* r, const Bucket* b, DType type, const void* reduced) {
    size_t begin = part_begin(&r->partition, b);
    each_stretch(r, b, begin, begin + part_elements(&r->partition, b), [=](Param* p, int, size_t first, size_t n) {
        with_gradient_type(type, [&](auto d) {
            typedef typename decltype(d)::type D;
            bool fp8 = is_fp8(type);
            const float* slot = r->ring_slots + 4 * (p - r->table->items);
            run_rows(AddReduced<D>{b->owned + (first - begin), (const D*)reduced + (first - begin), fp8 ? slot : NULL,
                                   fp8 ? r->counts + (p - r->table->items) : NULL, n, !r->first}, pieces_of(n), r->stream);
        });
    });
}

// One phase of the bucket that is under way; false: that was the last
static inline bool ring_phase(Reduction* r, const Bucket* b, int phase) {
    Parts parts = parts_of(r, b, b->wire);
    size_t mine = parts.begin(r->group->rank), part_bytes = parts.bytes(r->group->rank);
    char* payload = payload_of(r, b);
    float* slots = ring_slots_of(r, b);
    switch (phase) {
        case 0:
            if (is_fp8(b->wire)) {
                measure_bucket(r, b, r->scales);
                start_all_reduce_min(&r->transfer, r->scales, (size_t)b->count, SCALES, r->stream);
            }
            return true;
        case 1:
            if (is_fp8(b->wire)) { run_rows(RingSlots{slots, r->scales, r->mu, r->tensor_params + b->first}, b->count, r->stream); }
            make_payload(r, b, [=](Param* p, int) { return slots + 4 * (p - r->table->items) + 1; });
            start_ring_sum(&r->transfer, payload, r->received, parts, b->wire, counted_as(b, REDUCE_SCATTER), r->stream);
            return true;
        case 2:
            if (takes_turns(r, b)) { add_to_owned(r, b, b->wire, payload + mine); return false; }
            if (payload != b->memory) { device_copy(b->memory + mine, payload + mine, part_bytes, r->stream); }
            if (zero_level(r) > 0) { return false; }
            start_all_gather(&r->transfer, b->memory, parts, counted_as(b, ALL_GATHER), r->stream);
            return true;
        default: return false;
    }
}

// The sums of this rank's chunk into `sums`, `adds`: on top of what is there
static inline void sum_chunk(Reduction* r, const Bucket* b, float* sums, bool adds, uint32_t* amax) {
    size_t chunk = chunk_of(r, b), begin = chunk * (size_t)r->group->rank;
    bool fp8 = is_fp8(b->wire);
    each_stretch(r, b, begin, begin + chunk, [=](Param*, int k, size_t first, size_t n) {
        with_gradient_type(b->wire, [&](auto d) {
            typedef typename decltype(d)::type D;
            size_t at = first - begin;
            run_rows(SumParts<D>{sums + at, amax != NULL ? amax + k : NULL, (const D*)r->received + at, fp8 ? r->descales + k : NULL, chunk, r->group->size,
                                 r->scale_row, n, adds}, pieces_of(n), r->stream);
        });
    });
}

static inline bool direct_phase(Reduction* r, const Bucket* b, int phase) {
    size_t chunk = chunk_of(r, b), row = (size_t)r->scale_row, begin = chunk * (size_t)r->group->rank;
    size_t chunk_bytes = chunk * (size_t)dtype_bytes(b->wire);
    bool fp8 = is_fp8(b->wire), partitioned = zero_level(r) > 0, adds = takes_turns(r, b) && !r->first;
    float* mine = r->scales + row * (size_t)r->group->rank;
    float* kept = takes_turns(r, b) ? b->owned : (float*)b->memory;  // the reduced gradient, with ZeRO
    switch (phase) {
        case 0:
            if (fp8) {
                measure_bucket(r, b, mine);
                start_all_gather(&r->transfer, r->scales, equal_parts(row * sizeof(float)), SCALES, r->stream);
            }
            return true;
        case 1:
            if (fp8) { run_rows(SenderDescales{r->descales, r->scales, (int)row}, r->group->size, r->stream); }
            make_payload(r, b, [=](Param*, int k) { return mine + k; });
            start_all_to_all(&r->transfer, r->received, payload_of(r, b), chunk_bytes, counted_as(b, ALL_TO_ALL), r->stream);
            return true;
        case 2:
            if (partitioned && !b->whole) { sum_chunk(r, b, kept, adds, NULL); return false; }
            if (partitioned) {
                sum_chunk(r, b, r->sums, false, NULL);
                start_regroup(&r->transfer, adds ? r->regrouped : kept, r->sums, chunk * sizeof(float), cut_parts(b->cuts, sizeof(float)), REGROUP, r->stream);
                return true;
            }
            if (fp8) { device_zero(r->sum_amax, row * sizeof(uint32_t), r->stream); }
            sum_chunk(r, b, r->sums, false, fp8 ? r->sum_amax : NULL);
            if (fp8) { start_all_reduce_max(&r->transfer, r->sum_amax, (size_t)b->count, SCALES, r->stream); }
            return true;
        case 3:
            if (partitioned) {
                if (adds) { add_to_owned(r, b, FP32, r->regrouped); }
                return false;
            }
            if (fp8) { run_rows(ResultSlots{r->slots, r->sum_amax, r->tensor_params + b->first, largest_of(b->wire)}, b->count, r->stream); }
            each_stretch(r, b, begin, begin + chunk, [=](Param* p, int, size_t first, size_t n) {
                quantise(b->wire, advance(b->memory, b->wire, first), FP32, r->sums + (first - begin), NULL, p->grad_slot + 1, NULL, n, r->stream);
            });
            start_all_gather(&r->transfer, b->memory, equal_parts(chunk_bytes), counted_as(b, ALL_GATHER), r->stream);
            return true;
        default: return false;
    }
}

// What this rank sends of a bucket's weights
static inline uint64_t weights_bytes(const Reduction* r, const Bucket* b) {
    return parts_of(r, b, b->dtype).bytes(r->group->rank) * ((uint64_t)r->group->size - 1);
}

static inline bool weights_phase(Reduction* r, const Bucket* b, int phase) {
    if (phase > 0) { return false; }
    start_all_gather(&r->transfer, b->weights, parts_of(r, b, b->dtype), NOT_COUNTED, r->stream);  // weights_start has
    return true;
}

static inline int turn_of(const Reduction* r) { return (int)(r->steps % 2); }

// Goes on as far as it can without waiting; false: something is still under way
static inline bool reduction_poll(Reduction* r) {
    if (r->next == r->queued) { return true; }
    ProfileScope scope(r->returning ? "weights' return" : "gradient reduction");
    while (r->next < r->queued) {
        if (!transfer_done(&r->transfer)) { return false; }
        Bucket* b = &r->partition.buckets[r->queue[r->next]];
        int phase = r->phase++;
        bool more = r->returning ? weights_phase(r, b, phase) : is_direct(r) ? direct_phase(r, b, phase) : ring_phase(r, b, phase);
        if (more) { continue; }
        event_record(b->arrived, r->stream);
        b->under_way = false;
        r->next++;
        r->phase = 0;
    }
    return true;
}

// Queues the buckets of a layer, of gradients those that travel after this micro-batch
static inline void enqueue(Reduction* r, int layer) {
    for (int k = 0; k < r->partition.bucket_count; k++) {
        Bucket* b = &r->partition.buckets[k];
        bool travels = r->returning || r->last || takes_turns(r, b);
        if (b->layer != layer || b->started || !travels) { continue; }
        b->started = b->under_way = true;
        r->queue[r->queued++] = k;
    }
}

// Whatever is launched on `compute` from here on finds the bucket arrived, if it is under way
static inline void wait_for(Reduction* r, const Bucket* b, Stream compute) {
    double start = b->under_way ? wall_seconds() : 0.0;
    while (b->under_way) {
        if (!reduction_poll(r)) { sched_yield(); }
    }
    r->waited[turn_of(r)] += start > 0.0 ? wall_seconds() - start : 0.0;
    stream_wait_event(compute, b->arrived);
}
static inline void wait_for(Reduction* r, int layer, Stream compute) {
    for (int k = 0; k < r->partition.bucket_count; k++) {
        if (r->partition.buckets[k].layer == layer) { wait_for(r, &r->partition.buckets[k], compute); }
    }
}

static inline void empty_queue(Reduction* r) {
    while (!reduction_poll(r)) { sched_yield(); }
    for (int k = 0; k < r->partition.bucket_count; k++) { r->partition.buckets[k].started = false; }
    r->queued = r->next = r->phase = 0;
}

// ---- a step ----

// A step begins
static inline void reduction_step(Reduction* r) {
    r->steps++;
    r->waited[turn_of(r)] = 0.0;
}

// Is what this micro-batch's backward pass makes of p's gradient added to what is in its accumulator?
static inline bool accumulates(const Reduction* r, const Param* p) { return !r->first && !takes_turns(r, p); }

// Before this layer's gradients are written: what lay in their memory has been sent.
static inline void reduction_clear_way(Reduction* r, int layer, Stream compute) {
    for (int k = 0; k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        if (takes_turns(r, b) && b->layer == layer + ZERO_2_LAYERS) { wait_for(r, b, compute); }
    }
}

// The accumulators of this layer have what this micro-batch gives once what has been launched on `compute` is done: those buckets may start that are
// reduced after it.
static inline void reduction_start(Reduction* r, int layer, Stream compute) {
    if (!exchanges(r) || !(r->last || reduces_each(r))) { return; }
    enqueue(r, layer);
    event_record(r->ready, compute);
    stream_wait_event(r->stream, r->ready);
    reduction_poll(r);
}

// The partial gradients become those of all rows, on every rank of the layer; what else is under way goes on meanwhile.
static inline void sum_partials(Reduction* r, Stream compute) {
    Transfer* t = &r->tensor_transfer;
    auto wait = [=] {
        while (!transfer_done(t)) {
            reduction_poll(r);
            sched_yield();
        }
    };
    event_record(r->ready, compute);
    stream_wait_event(r->stream, r->ready);
    for (int k = 0; k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        if (!b->partial) { continue; }
        Parts parts = tensor_parts(r, b);
        start_ring_sum(t, b->memory, r->tensor_received, parts, FP32, TP_OTHER, r->stream);
        wait();
        start_all_gather(t, b->memory, parts, TP_OTHER, r->stream);
        wait();
    }
}

// After the backward pass: what is reduced after this micro-batch and has not started does, and whatever is launched on `compute` from here on finds the
// reduced gradients.
static inline void reduction_finish(Reduction* r, Stream compute) {
    bool sums = r->last && r->partials > 0, reduces = exchanges(r) && (r->last || reduces_each(r));
    if (!sums && !reduces) { return; }
    double start = wall_seconds();
    int turn = turn_of(r);
    event_record(r->backward_done[turn], compute);
    if (sums) { sum_partials(r, compute); }
    for (int k = r->partition.bucket_count - 1; k >= 0; k--) { reduction_start(r, r->partition.buckets[k].layer, compute); }
    empty_queue(r);
    r->reductions++;
    event_record(r->done[turn], r->stream);
    stream_wait_event(compute, r->done[turn]);
    r->waited[turn] += wall_seconds() - start;
}

// Seconds of a step, the last that began or the one before (counted from 0), that were spent on exchanges and nothing else. On a GPU the step must be
// over, and it is those of the step's last reduction.
static inline double reduction_waited(const Reduction* r, int64_t step) {
    int turn = (int)((step + 1) % 2);
    if (!device_is_gpu || (!exchanges(r) && r->partials == 0)) { return r->waited[turn]; }
    return max_of(0.0, 1e-3 * event_milliseconds(r->backward_done[turn], r->done[turn]));
}

// After the update: the weights go from those who have updated them to all, in the order of the forward pass.
static inline void weights_start(Reduction* r, Stream compute) {
    if (zero_level(r) == 0) { return; }
    r->returning = true;
    enqueue(r, -1);
    enqueue(r, ALL_LAYERS);
    for (int k = 0; k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        enqueue(r, b->layer);
        r->group->bytes_sent[WEIGHTS_GATHER] += weights_bytes(r, b);  // in this step, whenever they travel
    }
    event_record(r->ready, compute);
    stream_wait_event(r->stream, r->ready);
    reduction_poll(r);
}

// Before a layer's weights are read on `compute`
static inline void weights_wait(Reduction* r, int layer, Stream compute) {
    if (r->returning) { wait_for(r, layer, compute); }
}

// All of them have been waited for, or are now
static inline void weights_finish(Reduction* r, Stream compute) {
    if (!r->returning) { return; }
    for (int k = 0; k < r->partition.bucket_count; k++) { wait_for(r, r->partition.buckets[k].layer, compute); }
    empty_queue(r);
    r->returning = false;
}

// Before a micro-batch's backward pass, head included. `first`, `last`: of the step
static inline void reduction_begin(Reduction* r, bool first, bool last, Stream compute) {
    weights_finish(r, compute);
    r->first = first;
    r->last = last;
}

// One that was only planned
static inline void reduction_forget(Reduction* r) {
    partition_free(&r->partition);
    free(r->queue);
    free(r->tensor_cuts);
    *r = Reduction{};
}

static inline void reduction_free(Reduction* r) {
    weights_finish(r, r->stream);
    stream_sync(r->stream);
    transfer_free(&r->transfer);
    if (r->partials > 0) { transfer_free(&r->tensor_transfer); }
    stream_destroy(r->stream);
    event_destroy(r->ready);
    for (int i = 0; i < 2; i++) {
        event_destroy(r->backward_done[i]);
        event_destroy(r->done[i]);
    }
    for (int k = 0; k < r->partition.bucket_count; k++) { event_destroy(r->partition.buckets[k].arrived); }
    reduction_forget(r);
}

// ---- what it did ----

struct CountsToSums {    // sums (3, params) of this rank, to be added over the ranks
    float* sums;
    CodeCounts* counts;  // cleared for the next step
    int params;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        sums[i] = (float)counts[i].underflow;
        sums[params + i] = (float)counts[i].saturated;
        sums[2 * params + i] = (float)counts[i].reduced;
        counts[i] = CodeCounts{0, 0, 0};
    }
};

struct UpdateMu {
    TensorStatistics* statistics;
    float* mu;
    const float* sums;        // (3, params) over the ranks
    const double* top_codes;  // reduced codes at the maximum, of tensors that are reduced once a step; of the others they are in `sums`
    const double* elements;   // (3, params), as in Reduction
    const int* apply;         // points to 0 where the step was skipped: then the headroom stays
    int params, ranks, reductions;
    bool ring, automatic;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        if (!team.leads()) { return; }
        double n = elements[i] + elements[params + i] * reductions, times = elements[2 * params + i], all = n * ranks * times;
        double tops = (top_codes[i] + (double)sums[2 * params + i]) / times;
        if (automatic && *apply != 0) { mu[i] = next_mu(mu[i], tops, n, ranks); }
        statistics[i] = TensorStatistics{(float)((double)sums[i] / all), (float)(ring ? tops / n : (double)sums[params + i] / all), mu[i]};
    }
};

// After reduction_finish: adds what was counted over the replicas, and over the ranks of a layer, as a tensor's headroom belongs to all of it.
static inline void reduction_count(Reduction* r, Stream compute) {
    if (!sends_fp8(r)) { return; }
    run_rows(CountsToSums{r->count_sums, r->counts, r->table->count}, r->table->count, compute);
    all_reduce_sum(r->group, r->count_sums, 3 * (size_t)r->table->count, compute);
    if (tensor_ranks(r) > 1) { all_reduce_sum(r->tensor, r->count_sums, 3 * (size_t)r->table->count, compute); }
}

// After the decision, and the norm, which has counted each parameter's reduced codes at the maximum: the statistics of the step, and the headroom of the
// next. `top_codes`: those counts, which become sums over the ranks of a layer; `apply`: 0 where the step was skipped; on the device.
static inline void reduction_adapt(Reduction* r, double* top_codes, const int* apply, Stream compute) {
    int reductions = r->reductions;
    r->reductions = 0;
    if (!sends_fp8(r)) { return; }
    bool ring = r->config.algorithm == REDUCE_RING;
    if (tensor_ranks(r) > 1 && ring) { all_reduce_sum(r->tensor, top_codes, (size_t)r->table->count, compute); }
    run_rows(UpdateMu{r->statistics, r->mu, r->count_sums, top_codes, r->elements, apply, r->table->count, r->group->size, reductions, ring,
                      ring && r->config.scaling == SCALING_AUTO}, r->table->count, compute);
}

// ---- what it costs ----

// The bytes that this rank sends in a step, by operation: what the phases above count, without their being run. Of gradients, their scales and weights.
static inline void reduction_traffic(uint64_t* bytes, const Reduction* r, int micro_batches) {
    uint64_t ranks = (uint64_t)r->group->size, others = ranks - 1;
    int me = r->group->rank, level = zero_level(r);
    for (int k = 0; r->partials > 0 && k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        if (!b->partial) { continue; }
        Parts parts = tensor_parts(r, b);
        uint64_t mine = parts.bytes(r->tensor->rank), all = parts.begin(r->tensor->size);
        bytes[TP_OTHER] += all - mine + mine * ((uint64_t)r->tensor->size - 1);
    }
    if (!exchanges(r)) { return; }
    auto all_reduce = [=](uint64_t n) { return 2 * n * sizeof(float) * others / ranks; };
    for (int k = 0; k < r->partition.bucket_count; k++) {
        const Bucket* b = &r->partition.buckets[k];
        Parts parts = parts_of(r, b, b->wire);
        uint64_t times = takes_turns(r, b) ? (uint64_t)micro_batches : 1;
        size_t chunk = chunk_of(r, b), chunk_bytes = chunk * (size_t)dtype_bytes(b->wire);
        bool fp8 = is_fp8(b->wire);
        if (is_direct(r)) {
            bytes[counted_as(b, ALL_TO_ALL)] += times * chunk_bytes * others;
            bytes[SCALES] += fp8 ? times * (size_t)r->scale_row * sizeof(float) * others : 0;
            bytes[SCALES] += fp8 && level == 0 ? all_reduce((uint64_t)b->count) : 0;
            bytes[counted_as(b, ALL_GATHER)] += level == 0 ? chunk_bytes * others : 0;
            for (int to = 0; b->whole && to < (int)ranks; to++) {
                size_t begin = max_of(chunk * (size_t)me, b->cuts[to]), end = min_of(chunk * ((size_t)me + 1), b->cuts[to + 1]);
                bytes[REGROUP] += to != me && begin < end ? times * (end - begin) * sizeof(float) : 0;
            }
        } else {
            bytes[counted_as(b, REDUCE_SCATTER)] += times * (parts.begin((int)ranks) - parts.bytes(me));
            bytes[SCALES] += fp8 ? times * all_reduce((uint64_t)b->count) : 0;
            bytes[counted_as(b, ALL_GATHER)] += level == 0 ? parts.bytes(me) * others : 0;
        }
        bytes[WEIGHTS_GATHER] += level > 0 ? weights_bytes(r, b) : 0;
    }
}
