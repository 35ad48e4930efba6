// common.h: what every file needs: how the compiler is addressed, and how the program ends when something is wrong.
//
// There are two ways to end. `bad_input` is for what the user typed or the files they named: exit code 2. `die` is for what went wrong at run
// time (disk, library, device): exit code 1. Both print one line that says what was wrong, with which value, and what is allowed, and both end
// every rank: all ranks usually meet the same error, so rank 0 speaks first and the others hold their tongue unless they alone have met it.
#pragma once
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// GPU_FORM: the block-of-threads form of the kernels is compiled (by nvcc, or by the emulator of test/simt.h).
// DEVICE: code for both devices. GPU: code that only a block of threads can run (shuffles, barriers).
#if defined(__CUDACC__)
#define GPU_FORM 1
#define DEVICE __host__ __device__ __forceinline__
#define GPU __device__ __forceinline__
#else
#ifdef SIMT
#define GPU_FORM 1
#endif
#define DEVICE inline __attribute__((always_inline))
#define GPU inline
#endif
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

struct Process {
    int rank;               // of this process in the world; known from the launcher's environment before MPI is up
    void (*abort)(int code);  // ends every rank; set by the collectives once they are up
    bool live_line;         // the cursor stands at the end of a line on stdout that is being rewritten
};

static inline int rank_from_environment(void) {
    const char* names[] = {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"};
    for (const char* name : names) {
        const char* value = getenv(name);
        if (value != NULL && value[0] != '\0') { return atoi(value); }
    }
    return 0;
}

inline Process process = {rank_from_environment(), NULL, false};

[[noreturn]] static inline void end_process(int code, const char* fmt, va_list args) {
    if (process.live_line) { fputc('\n', stdout); }
    fflush(stdout);
    char line[2048];
    vsnprintf(line, sizeof(line), fmt, args);
    if (process.rank != 0) {
        usleep(2000 * 1000);  // if rank 0 has met the same, it speaks meanwhile, and the launcher ends us
        fprintf(stderr, "train_gpt_fp8: rank %d: %s\n", process.rank, line);
    } else {
        fprintf(stderr, "train_gpt_fp8: %s\n", line);
    }
    fflush(stderr);
    if (process.abort != NULL) { process.abort(code); }
    _exit(code);
}

// Refuses what the user gave: prints one line, ends all ranks with exit code 2.
[[noreturn]] __attribute__((format(printf, 1, 2))) static inline void bad_input(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    end_process(2, fmt, args);
}

// Something failed at run time: prints one line, ends all ranks with exit code 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) static inline void die(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    end_process(1, fmt, args);
}

template <class T> DEVICE T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <class T> DEVICE T round_up(T a, T multiple) { return ceil_div(a, multiple) * multiple; }
template <class T> DEVICE T min_of(T a, T b) { return b < a ? b : a; }
template <class T> DEVICE T max_of(T a, T b) { return a < b ? b : a; }

static inline void* host_alloc(size_t bytes) {
    void* p = malloc(bytes > 0 ? bytes : 1);
    if (p == NULL) { die("out of host memory: %zu bytes asked for; other programs, or a limit (ulimit -v, the container's), leave less", bytes); }
    return p;
}

// A bijection of 64-bit words in which every input bit moves every output bit (splitmix64's finaliser)
static inline uint64_t mix64(uint64_t z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline double wall_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
