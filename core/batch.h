// batch.h: one micro-batch on the host: tokens and targets, and its rows grouped by token, so that each token's embedding gradient is one sum in a fixed
// order. It lies in memory that a GPU copies from while the host goes on; `copied` says when it may be filled anew.
#pragma once
#include "device.cuh"
#include <algorithm>

struct HostBatch {
    int32_t *tokens, *targets;  // (rows)
    int32_t* order;             // (rows) those that are grouped, by token, ascending within a group
    int32_t* first;             // (groups + 1) where each group starts in `order`
    int32_t* group_token;       // (groups)
    int groups;
    int32_t* count;             // (1) groups, for the device
    uint64_t* keys;             // (rows) workspace
    Event copied;               // the last copy of it to the device
};

static inline HostBatch host_batch_create(int rows) {
    size_t n = (size_t)rows * sizeof(int32_t);
    HostBatch b = {};
    b.tokens = (int32_t*)pinned_alloc(n);
    b.targets = (int32_t*)pinned_alloc(n);
    b.order = (int32_t*)pinned_alloc(n);
    b.first = (int32_t*)pinned_alloc(n + sizeof(int32_t));
    b.group_token = (int32_t*)pinned_alloc(n);
    b.count = (int32_t*)pinned_alloc(sizeof(int32_t));
    b.keys = (uint64_t*)host_alloc((size_t)rows * sizeof(uint64_t));
    b.copied = event_create();
    return b;
}
static inline void host_batch_free(HostBatch* b) {
    int32_t* const pinned[] = {b->tokens, b->targets, b->order, b->first, b->group_token, b->count};
    for (int32_t* p : pinned) { pinned_free(p); }
    free(b->keys);
    event_destroy(b->copied);
    *b = HostBatch{};
}

// Groups the rows whose token is in [from, to); returns how many those are
static inline int batch_group_tokens(HostBatch* b, int rows, int from, int to) {
    int n = 0;
    for (int i = 0; i < rows; i++) {
        if (b->tokens[i] >= from && b->tokens[i] < to) { b->keys[n++] = (uint64_t)(uint32_t)b->tokens[i] << 32 | (uint32_t)i; }
    }
    std::sort(b->keys, b->keys + n);
    b->groups = 0;
    for (int i = 0; i < n; i++) {
        int32_t token = (int32_t)(b->keys[i] >> 32);
        b->order[i] = (int32_t)(uint32_t)b->keys[i];
        if (i == 0 || b->group_token[b->groups - 1] != token) {
            b->group_token[b->groups] = token;
            b->first[b->groups++] = i;
        }
    }
    b->first[b->groups] = n;
    *b->count = b->groups;
    return n;
}
