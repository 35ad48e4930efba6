// partition.h: which tensors travel together, and which rank keeps what of them (ZeRO).
//
// Tensors that become complete together and have one format form a *bucket*: the matrices of a layer, the embeddings, and all vectors, those apart of whose
// gradients each rank of a layer has a part; an embedding that two stages have is one by itself. Gradients are reduced bucket by bucket, weights come back
// bucket by bucket, and a tensor has the same place in both.
//
// Without ZeRO every rank keeps the states of every tensor. With it a rank keeps those of its *part* of each bucket, which is one stretch of it:
//   flat      equal parts, cut at multiples of PIECE elements, and so never within a piece of the gradient norm or a block of an optimizer state
//   tensor    matrices whole, with the one scale that they have: sorted by size, each goes to the rank that has least so far (FP8-LM, Algorithm 1). A
//             bucket's tensors then lie in the order of their owners. Everything else is cut flat.
//
// Where a tensor's pieces begin does not depend on the partition: pieces end at multiples of PIECE of the bucket as it would be without one. So a sum over
// pieces, each of which one rank adds up whole, is the same for any number of ranks.
#pragma once
#include "gradient.cuh"  // PIECE
#include "params.h"
#include <algorithm>

enum ZeroSplit { SPLIT_TENSOR, SPLIT_FLAT };

struct ZeroConfig {
    int level;         // 0: nothing is partitioned; 1: optimizer states; 2: gradients too
    ZeroSplit split;
};

constexpr ZeroConfig NOTHING_PARTITIONED = {0, SPLIT_FLAT};
constexpr int ALL_LAYERS = -2;

struct Bucket {        // tensors that travel together, in one format
    int layer;         // as in Param; ALL_LAYERS for the vectors
    DType dtype, accum, wire;  // of all its tensors, as in Param
    int first, count;  // of its tensors in Partition::tensors
    size_t elements;   // with the gaps after tensors; a multiple of the ranks
    size_t* cuts;      // (ranks + 1) rank r keeps the elements [cuts[r], cuts[r + 1])
    bool matrices;     // as against embeddings or vectors
    bool partial;      // as in Param
    bool apart;        // as in Param
    bool whole;        // tensors have owners, and parts are not equal
    // on the device
    char* weights;     // (elements) of dtype
    char* memory;      // (elements) of accum: the gradients while micro-batches are added up
    float* owned;      // this rank's part of the gradients of all micro-batches, where each is reduced; NULL: they are reduced once
    // its way between the ranks
    bool started;      // in this backward pass
    bool under_way;
    Event arrived;
};

struct BucketTensor {
    int param;         // in the table
    size_t first;      // element of the bucket
};

struct Partition {
    int rank, ranks;
    ZeroConfig zero;
    ParamTable* table;
    Bucket* buckets;
    int bucket_count;
    BucketTensor* tensors;
    size_t* cuts;      // of all buckets
};

static inline size_t part_begin(const Partition* p, const Bucket* b) { return b->cuts[p->rank]; }
static inline size_t part_elements(const Partition* p, const Bucket* b) { return b->cuts[p->rank + 1] - b->cuts[p->rank]; }
static inline size_t largest_part(const Partition* p, const Bucket* b) {
    size_t most = 0;
    for (int r = 0; r < p->ranks; r++) { most = max_of(most, b->cuts[r + 1] - b->cuts[r]); }
    return most;
}

// Algorithm 1: owners[i] = the rank of the i-th of n tensors of `sizes` elements. The fullest rank has at most 4/3 of the least possible (Graham 1969).
static inline void assign_owners(int* owners, const size_t* sizes, int n, int ranks) {
    size_t* loads = (size_t*)host_alloc((size_t)ranks * sizeof(size_t));
    int* order = (int*)host_alloc((size_t)n * sizeof(int));
    for (int r = 0; r < ranks; r++) { loads[r] = 0; }
    for (int i = 0; i < n; i++) { order[i] = i; }
    std::stable_sort(order, order + n, [=](int a, int b) { return sizes[a] > sizes[b]; });
    for (int i = 0; i < n; i++) {
        int least = 0;
        for (int r = 1; r < ranks; r++) { least = loads[r] < loads[least] ? r : least; }
        owners[order[i]] = least;
        loads[least] += sizes[order[i]];
    }
    free(loads);
    free(order);
}

// The owner of each parameter, -1: it is cut flat
static inline void find_owners(Partition* p) {
    int n = 0, count = p->table->count;
    size_t* sizes = (size_t*)host_alloc((size_t)count * sizeof(size_t));
    int* owners = (int*)host_alloc((size_t)count * sizeof(int));
    bool whole = p->zero.level > 0 && p->zero.split == SPLIT_TENSOR;
    for (int i = 0; i < count; i++) {
        if (p->table->items[i].format_class == MATRIX) { sizes[n++] = param_elements(&p->table->items[i]); }
    }
    if (whole) { assign_owners(owners, sizes, n, p->ranks); }
    for (int i = 0, k = 0; i < count; i++) {
        Param* q = &p->table->items[i];
        q->owner = whole && q->format_class == MATRIX ? owners[k++] : -1;
    }
    free(sizes);
    free(owners);
}

static inline size_t padded_elements(const Param* p) { return round_up(param_elements(p), PARAM_ALIGNMENT); }

// Lays out one bucket, whose tensors are listed in the table's order
static inline void lay_out_bucket(Partition* p, Bucket* b) {
    BucketTensor* t = p->tensors + b->first;
    ParamTable* table = p->table;
    size_t at = 0;
    for (int k = 0; k < b->count; k++) {
        Param* q = &table->items[t[k].param];
        q->piece_shift = (int)(at % (size_t)PIECE);
        at += padded_elements(q);
    }
    b->elements = round_up(at, (p->zero.level == 0 ? PARAM_ALIGNMENT : (size_t)PIECE) * (size_t)p->ranks);
    if (b->whole) { std::stable_sort(t, t + b->count, [=](BucketTensor x, BucketTensor y) { return table->items[x.param].owner < table->items[y.param].owner; }); }
    for (int r = 0; r <= p->ranks; r++) { b->cuts[r] = b->whole ? 0 : b->elements / (size_t)p->ranks * (size_t)r; }
    at = 0;
    for (int k = 0; k < b->count; k++) {
        Param* q = &table->items[t[k].param];
        t[k].first = at;
        at += padded_elements(q);
        if (b->whole) { b->cuts[q->owner + 1] = at; }
    }
    for (int r = 1; b->whole && r <= p->ranks; r++) { b->cuts[r] = max_of(b->cuts[r], b->cuts[r - 1]); }  // those without a tensor here have an empty part
}

// What this rank keeps of each tensor
static inline void find_stretches(Partition* p) {
    size_t offset = 0;
    for (int k = 0; k < p->bucket_count; k++) {
        const Bucket* b = &p->buckets[k];
        for (int i = 0; i < b->count; i++) {
            BucketTensor t = p->tensors[b->first + i];
            Param* q = &p->table->items[t.param];
            size_t n = param_elements(q), begin = part_begin(p, b), end = begin + part_elements(p, b);
            q->offset = offset + t.first;
            q->own_first = p->zero.level == 0 ? 0 : min_of(begin > t.first ? begin - t.first : 0, n);
            q->own_count = p->zero.level == 0 ? n : min_of(end > t.first ? end - t.first : 0, n) - q->own_first;
            if (q->own_count == 0) { q->own_first = 0; }
        }
        offset += b->elements;
    }
    p->table->elements = offset;
}

// Sorts the table's tensors into buckets, in its order, and divides them between `ranks` ranks, of which this is `rank`. Formats of weights and gradients
// must be known. One rank keeps everything.
static inline void partition_build(Partition* p, ParamTable* table, int rank, int ranks, ZeroConfig zero) {
    *p = Partition{};
    p->rank = rank;
    p->ranks = ranks;
    p->zero = ranks > 1 ? zero : ZeroConfig{0, zero.split};
    p->table = table;
    size_t n = (size_t)table->count;
    p->buckets = (Bucket*)host_alloc(n * sizeof(Bucket));
    p->tensors = (BucketTensor*)host_alloc(n * sizeof(BucketTensor));
    int* bucket_of = (int*)host_alloc(n * sizeof(int));
    find_owners(p);
    for (int i = 0; i < table->count; i++) {
        const Param* q = &table->items[i];
        int layer = q->format_class == VECTOR ? ALL_LAYERS : q->layer, k = 0;
        for (; k < p->bucket_count; k++) {
            const Bucket* b = &p->buckets[k];
            bool formats = b->dtype == q->dtype && b->accum == q->accum && b->wire == q->wire;
            bool apart = b->apart || q->apart || b->partial != q->partial;
            if (formats && b->layer == layer && b->matrices == (q->format_class == MATRIX) && !apart) { break; }
        }
        if (k == p->bucket_count) {
            Bucket b = {};
            b.layer = layer;
            b.dtype = q->dtype;
            b.accum = q->accum;
            b.wire = q->wire;
            b.matrices = q->format_class == MATRIX;
            b.partial = q->partial;
            b.apart = q->apart;
            b.whole = q->owner >= 0;
            p->buckets[p->bucket_count++] = b;
        }
        bucket_of[i] = k;
        p->buckets[k].count++;
    }
    p->cuts = (size_t*)host_alloc((size_t)p->bucket_count * ((size_t)ranks + 1) * sizeof(size_t));
    int at = 0;
    for (int k = 0; k < p->bucket_count; k++) {
        Bucket* b = &p->buckets[k];
        b->first = at;
        b->cuts = p->cuts + (size_t)k * ((size_t)ranks + 1);
        at += b->count;
        b->count = 0;
    }
    for (int i = 0; i < table->count; i++) {
        Bucket* b = &p->buckets[bucket_of[i]];
        p->tensors[b->first + b->count++] = BucketTensor{i, 0};
    }
    for (int k = 0; k < p->bucket_count; k++) { lay_out_bucket(p, &p->buckets[k]); }
    find_stretches(p);
    free(bucket_of);
}

static inline void partition_free(Partition* p) {
    free(p->buckets);
    free(p->tensors);
    free(p->cuts);
    *p = Partition{};
}

// The weights of the forward pass, bucket by bucket. Dry and for real (memory.h).
static inline void partition_allocate_weights(Partition* p, Memory* memory) {
    for (int k = 0; k < p->bucket_count; k++) {
        Bucket* b = &p->buckets[k];
        b->weights = (char*)memory_take(memory, WEIGHTS, b->elements, (size_t)dtype_bytes(b->dtype));
        for (int i = 0; memory->committed && i < b->count; i++) {
            const BucketTensor* t = &p->tensors[b->first + i];
            p->table->items[t->param].weight = advance((void*)b->weights, b->dtype, t->first);
        }
    }
}
