// schedule.h: in which order a stage of a pipeline works off the micro-batches of a step: 1F1B (Narayanan et al. 2019, PipeDream-Flush), as a pure
// function.
//
// The model's layers are cut into `stages`; stage 0 holds the first. A stage begins with as many forward passes as there are stages behind it, then
// takes a forward and a backward pass in turns, and ends with the backward passes that are left:
//
//     stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5
//     stage 1      F0 F1 F2 B0 …
//     stage 2         F0 F1 B0 F2 …
//     stage 3            F0 B0 F1 B1 …
//
// F of micro-batch k waits for F of k on the stage before, B of k for B of k on the stage behind (on the last stage for its own F). So what stage s keeps
// for backward is never more than `stages - s` micro-batches, however many there are, and a step of equal stages takes (K + stages - 1)·(f + b).
//
// Before each pass and after the last a stage makes one exchange: it sends what the last pass made and receives what the next one needs, both at once, and
// goes on when both are done. A send may be done only when the peer has come to the exchange that receives it (NCCL, and MPI with long messages). One after
// the other, then, would wait for ever: stage 0 sends the output of F3 and then receives the gradient of B0, while stage 1 sends the gradient of B0 and
// then receives the output of F3. At once, those two are each other's peers, and so it is with every forward pass that follows a backward one. Before
// the first of these all goes forward and waits for the stage behind alone, after the last all goes backward and waits for the stage before alone:
// chains, with an end. (With fewer micro-batches than stages one exchange sends the last output and receives the first gradient. Its peer receives
// in one exchange and sends in a later one, so neither half may wait for the other.)
//
// When the input of micro-batch k comes in, micro-batch k - schedule_in_flight is done with: its slot can be used again.
#pragma once
#include "common.h"

struct ScheduleStep {
    bool forward;
    int micro_batch;
};

// How many passes a stage makes in a step
static inline int64_t schedule_steps(int micro_batches) { return 2 * (int64_t)micro_batches; }

// The i-th pass of a stage, from 0
static inline ScheduleStep schedule_step(int stages, int stage, int micro_batches, int64_t i) {
    int64_t K = micro_batches, first = min_of((int64_t)(stages - stage - 1), K), turns = 2 * (K - first), at = i - first;
    if (i < 0 || i >= 2 * K) { die("schedule: pass %" PRId64 " of %" PRId64, i, 2 * K); }
    if (at < 0) { return ScheduleStep{true, (int)i}; }
    if (at < turns) { return at % 2 == 0 ? ScheduleStep{true, (int)(first + at / 2)} : ScheduleStep{false, (int)(at / 2)}; }
    return ScheduleStep{false, (int)(i - K)};
}

struct ScheduleExchange {
    int to;    // the stage that gets what the last pass made: the one behind an output, the one before a gradient; -1: nobody
    int from;  // the stage that has what the next pass needs; -1: nobody
};

// What a stage exchanges before its i-th pass; i = 2·micro_batches: after its last
static inline ScheduleExchange schedule_exchange(int stages, int stage, int micro_batches, int64_t i) {
    auto neighbour = [=](bool behind) { return behind ? (stage + 1 < stages ? stage + 1 : -1) : stage - 1; };
    ScheduleExchange x = {-1, -1};
    if (i > 0) { x.to = neighbour(schedule_step(stages, stage, micro_batches, i - 1).forward); }
    if (i < schedule_steps(micro_batches)) { x.from = neighbour(!schedule_step(stages, stage, micro_batches, i).forward); }
    return x;
}

// The most micro-batches that a stage has been forward through and not yet back
static inline int schedule_in_flight(int stages, int stage, int micro_batches) { return min_of(stages - stage, micro_batches); }

constexpr int SCHEDULE_SIMULATED = 4096;  // micro-batches; those beyond take what the slowest stage takes

// How long a step takes if a pass on stage s takes forward[s] or backward[s], and sending nothing
static inline double schedule_makespan(int stages, int micro_batches, const double* forward, const double* backward) {
    // when passes were done, by stage and micro-batch modulo `window`: no stage is further ahead of its neighbour
    int K = min_of(micro_batches, max_of(SCHEDULE_SIMULATED, 4 * stages)), window = stages + 1;
    size_t n = (size_t)stages * (size_t)window;
    double *done = (double*)host_alloc(2 * n * sizeof(double)), *clock = (double*)host_alloc((size_t)stages * sizeof(double)), slowest = 0.0, end = 0.0;
    int64_t* next = (int64_t*)host_alloc((size_t)stages * sizeof(int64_t));
    int* count = (int*)host_alloc(2 * (size_t)stages * sizeof(int));  // passes that are done: forward, then backward
    for (int s = 0; s < stages; s++) {
        clock[s] = 0.0;
        next[s] = 0;
        count[s] = count[stages + s] = 0;
        slowest = max_of(slowest, forward[s] + backward[s]);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int s = 0; s < stages; s++) {
            while (next[s] < 2 * (int64_t)K) {
                ScheduleStep step = schedule_step(stages, s, K, next[s]);
                bool starts = step.forward && s == 0, own = !step.forward && s == stages - 1;
                int from = starts || own ? s : step.forward ? s - 1 : s + 1, kind = step.forward || own ? 0 : 1;
                if (!starts && count[kind * stages + from] <= step.micro_batch) { break; }
                double ready = starts ? 0.0 : done[(size_t)kind * n + (size_t)from * (size_t)window + (size_t)(step.micro_batch % window)];
                clock[s] = max_of(clock[s], ready) + (step.forward ? forward[s] : backward[s]);
                done[(step.forward ? 0 : n) + (size_t)s * (size_t)window + (size_t)(step.micro_batch % window)] = clock[s];
                count[(step.forward ? 0 : stages) + s]++;
                next[s]++;
                moved = true;
            }
        }
    }
    for (int s = 0; s < stages; s++) {
        if (next[s] != 2 * (int64_t)K) { die("schedule: stage %d of %d waits for ever at pass %" PRId64 " of %" PRId64, s, stages, next[s], 2 * (int64_t)K); }
        end = max_of(end, clock[s]);
    }
    free(done);
    free(clock);
    free(next);
    free(count);
    return end + (double)(micro_batches - K) * slowest;
}
