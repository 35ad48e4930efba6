// memory.h: one allocator with categories, and the same code run dry.
//
// Whatever the trainer keeps on a device is asked for by name and category. The code that asks runs twice: first dry, when nothing is handed out and
// only sizes are added up; then `memory_commit` takes one block per category from the device, and the second run hands out addresses within it. So
// the sizes are known, printed and checked before a byte is taken, and what was planned is what is allocated, to the byte.
//
//     Memory memory = {};
//     model_allocate(&model, &memory);  // dry
//     if (memory_total(&memory) > device_memory_free()) { memory_refuse(memory.bytes, device_memory_free(), 1, "a smaller batch needs less"); }
//     memory_commit(&memory);
//     model_allocate(&model, &memory);  // hands out
//
// Outside the count: what CUDA, NCCL, MPI and the C library keep for themselves.
#pragma once
#include "device.cuh"

enum MemoryCategory { WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE, COMMUNICATION, MEMORY_CATEGORIES };

static const char* const memory_names[MEMORY_CATEGORIES] = {"weights", "gradients", "optimizer", "activations", "workspace", "communication"};

constexpr size_t MEMORY_ALIGNMENT = 256;  // bytes: what cudaMalloc and cuBLASLt's workspace give and ask for

struct Memory {
    size_t bytes[MEMORY_CATEGORIES];  // planned, multiples of MEMORY_ALIGNMENT
    size_t used[MEMORY_CATEGORIES];   // handed out so far
    char* block[MEMORY_CATEGORIES];
    bool committed;
};

// `count` elements of `element_bytes`; NULL while dry. The contents are undefined.
static inline void* memory_take(Memory* m, MemoryCategory category, size_t count, size_t element_bytes) {
    size_t bytes = round_up(count * element_bytes, MEMORY_ALIGNMENT);
    if (!m->committed) {
        m->bytes[category] += bytes;
        return NULL;
    }
    if (m->used[category] + bytes > m->bytes[category]) {
        die("memory: %s: %zu bytes asked for after %zu of the %zu planned: the dry run asked for less", memory_names[category], bytes,
            m->used[category], m->bytes[category]);
    }
    void* p = m->block[category] + m->used[category];
    m->used[category] += bytes;
    return p;
}

template <class T> static inline T* memory_take(Memory* m, MemoryCategory category, size_t count) {
    return (T*)memory_take(m, category, count, sizeof(T));
}

static inline size_t memory_total(const Memory* m) {
    size_t total = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { total += m->bytes[i]; }
    return total;
}

// Refuses a plan (of these bytes by category) that does not fit into what is free for each process, before anything is taken. `advice`: what would fit.
[[noreturn]] static inline void memory_refuse(const size_t* bytes, size_t free_for_each, int processes_on_device, const char* advice) {
    char table[512];
    int n = 0;
    size_t total = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        total += bytes[i];
        n += snprintf(table + n, sizeof(table) - (size_t)n, "%s%s %.2f", i > 0 ? ", " : "", memory_names[i], (double)bytes[i] / (1 << 30));
    }
    char shared[64] = "";
    if (processes_on_device > 1) { snprintf(shared, sizeof(shared), " for each of %d processes", processes_on_device); }
    bad_input("out of memory: this run needs %.2f GiB (%s) and %.2f GiB are free%s on this device; %s", (double)total / (1 << 30), table, (double)free_for_each / (1 << 30), shared, advice);
}

// Takes the planned blocks from the device.
static inline void memory_commit(Memory* m) {
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { m->block[i] = m->bytes[i] > 0 ? (char*)device_alloc(m->bytes[i]) : NULL; }
    m->committed = true;
}

// After the second run: everything planned was handed out.
static inline void memory_check(const Memory* m) {
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        if (m->used[i] != m->bytes[i]) { die("memory: %s: %zu bytes planned, %zu handed out", memory_names[i], m->bytes[i], m->used[i]); }
    }
}

static inline void memory_release(Memory* m) {
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        if (m->block[i] != NULL) { device_free(m->block[i]); }
    }
    *m = Memory{};
}
