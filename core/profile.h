// profile.h: names for stretches of a step. On a GPU they are NVTX ranges, for a profiler to show. While `profiler.on` their wall time is added up for
// the table of --profile; a GPU is then waited for at both ends of each, which costs speed. An inner stretch takes its time out of the outer one's.
#pragma once
#include "device.cuh"
#ifdef USE_CUDA
#include <nvtx3/nvToolsExt.h>
#endif

constexpr int MAX_STRETCHES = 64;

struct Profiler {
    bool on;
    int count;
    const char* names[MAX_STRETCHES];
    double seconds[MAX_STRETCHES];
    int64_t calls[MAX_STRETCHES];
    struct ProfileScope* innermost;
};
inline Profiler profiler = {};

static inline int profile_index(const char* name) {
    for (int i = 0; i < profiler.count; i++) {
        if (profiler.names[i] == name || strcmp(profiler.names[i], name) == 0) { return i; }
    }
    if (profiler.count == MAX_STRETCHES) { die("more than %d profiled names", MAX_STRETCHES); }
    profiler.names[profiler.count] = name;
    return profiler.count++;
}

struct ProfileScope {
    const char* name;
    double start, inner;
    ProfileScope* outer;
    explicit ProfileScope(const char* n) : name(n), start(0.0), inner(0.0), outer(NULL) {
#ifdef USE_CUDA
        nvtxRangePushA(n);
#endif
        if (!profiler.on) { name = NULL; return; }
        outer = profiler.innermost;
        profiler.innermost = this;
        device_wait();
        start = wall_seconds();
    }
    ~ProfileScope() {
#ifdef USE_CUDA
        nvtxRangePop();
#endif
        if (name == NULL) { return; }
        device_wait();
        double taken = wall_seconds() - start;
        int i = profile_index(name);
        profiler.seconds[i] += taken - inner;
        profiler.calls[i]++;
        profiler.innermost = outer;
        if (outer != NULL) { outer->inner += taken; }
    }
};

// Prints each name's share of `total` seconds, most first.
static inline void profile_report(FILE* f, double total, int steps) {
    bool printed[MAX_STRETCHES] = {};
    fprintf(f, "%-28s %10s %8s %10s\n", "operation", "ms/step", "share", "calls/step");
    for (int k = 0; k < profiler.count; k++) {
        int best = -1;
        for (int i = 0; i < profiler.count; i++) {
            if (!printed[i] && (best < 0 || profiler.seconds[i] > profiler.seconds[best])) { best = i; }
        }
        printed[best] = true;
        fprintf(f, "%-28s %10.2f %7.1f%% %10.1f\n", profiler.names[best], 1e3 * profiler.seconds[best] / steps,
                100.0 * profiler.seconds[best] / total, (double)profiler.calls[best] / steps);
    }
}
