// step.h: for tests that include the trainer and drive its model: batches, a micro-batch of a model of one stage, and what is left of a run.
#pragma once
#include <vector>

static inline void micro_step(Model* m, HostBatch* batch, int index, bool last, float weight) {
    if (index == 0) { step_begin(m); }
    micro_forward(m, batch, index);
    micro_backward(m, batch, index, last, weight);
}

// Sequences first_sequence, first_sequence + 1, …: most tokens follow from the one before
static inline void fill_batch(HostBatch* batch, const GptConfig* c, int64_t first_sequence) {
    event_wait(batch->copied);
    for (int b = 0; b < c->B; b++) {
        uint64_t h = mix64((uint64_t)(first_sequence + b));
        int t = (int)(h % (uint64_t)c->vocab);
        for (int i = 0; i < c->T; i++) {
            batch->tokens[b * c->T + i] = t;
            h = mix64(h);
            t = h % 8 == 0 ? (int)(h / 8 % (uint64_t)c->vocab) : (3 * t + 1) % min_of(c->vocab, 61);
            batch->targets[b * c->T + i] = t;
        }
    }
}

static inline uint64_t hash_bytes(uint64_t h, const void* data, size_t n) {
    for (size_t i = 0; i < n; i++) { h = (h ^ ((const unsigned char*)data)[i]) * 1099511628211ull; }
    return h;
}

template <class T> static std::vector<T> from_device(const void* d, size_t n) {
    std::vector<T> host(n);
    if (n > 0) { copy_to_host(host.data(), d, n * sizeof(T), NULL); }
    stream_sync(NULL);
    return host;
}
