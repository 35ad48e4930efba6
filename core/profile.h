// profile.h: names for stretches of a step. On a GPU they are NVTX ranges, for a profiler to show. While `profiler.on` their wall time is added up for
// the table of --profile; a GPU is then waited for at both ends of each, which costs speed. An inner stretch takes its time out of the outer one's.
// profile_bytes_alone adds the time that bytes of memory take by themselves.
#pragma once
#include <sys/resource.h>
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

// Prints the memory that the process has had at most, and each name's share of `total` seconds, most first.
static inline void profile_report(FILE* f, double total, int steps) {
    bool printed[MAX_STRETCHES] = {};
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) == 0) { fprintf(f, "peak memory of the host: %.1f MiB\n", (double)usage.ru_maxrss / 1024.0); }
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

// Bytes of memory: read and written back in place, only read, only written
struct Traffic { double updated, read, written; };

struct MoveBytes {   // a row of floats, part of it for each kind of traffic
    float* p;
    float* sums;     // (rows)
    int row, updated, read;
    template <class Team> DEVICE void operator()(Team team, int i) const {
        float* pu = p + (size_t)i * (size_t)row;
        const float* pr = pu + updated;
        float* pw = pu + updated + read;
        team.each(updated, [=](auto c) { store(pu, c, load(pu, c) * 0.5f); });
        float sum = team.sum(read, [=](auto c) { return load(pr, c); });
        team.each(row - updated - read, [=](auto c) { store(pw, c, splat(c, 1.0f)); });
        if (team.leads()) { sums[i] = sum; }
    }
};

// Seconds of a pass that does nothing but move these bytes, the best of five: no kernel with this traffic does without.
// It takes 256 MiB, which no cache holds, or as much as the traffic has where that is less, and repeats them.
static inline double seconds_of_bytes(Traffic t, Stream stream) {
    constexpr int ROW = 8192;  // floats: 32 KiB
    double bytes = t.updated + t.read + t.written;  // of different places
    int rows = (int)max_of(1.0, min_of(256.0 * 1024 * 1024, bytes) / (4.0 * ROW));
    MoveBytes move = {NULL, NULL, ROW, (int)(t.updated / bytes * ROW) / 8 * 8, (int)(t.read / bytes * ROW) / 8 * 8};  // whole packs
    move.p = (float*)device_alloc((size_t)rows * ROW * sizeof(float));
    move.sums = (float*)device_alloc((size_t)rows * sizeof(float));
    device_zero(move.p, (size_t)rows * ROW * sizeof(float), stream);
    double best = 0.0;
    for (int pass = 0; pass <= 5; pass++) {  // the first warms up
        stream_sync(stream);
        double start = wall_seconds();
        run_rows(move, rows, stream);
        stream_sync(stream);
        double taken = wall_seconds() - start;
        best = pass <= 1 ? taken : min_of(best, taken);
    }
    device_free(move.p);
    device_free(move.sums);
    return best * bytes / (4.0 * ROW * rows);
}

// Prints what these bytes take alone a step
static inline void profile_bytes_alone(FILE* f, const char* what, Traffic t, Stream stream) {
    double seconds = seconds_of_bytes(t, stream);
    fprintf(f, "%s's bytes alone: %.3f ms a step (%.1f GB/s)\n", what, 1e3 * seconds, 1e-9 * (2.0 * t.updated + t.read + t.written) / seconds);
}
