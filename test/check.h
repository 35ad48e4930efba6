// check.h: what the tests of the kernels share: arrays that the test and a kernel both see, random inputs, comparison, and how a call
// ends the program.
//
// The tests are written for both devices. In a CUDA build the arrays are managed memory, `finish` waits for the GPU before the test reads
// them, and a machine without a GPU skips the whole program.
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <float.h>
#include <sys/wait.h>
#include <vector>
#include "../core/device.cuh"
extern "C" {
#include <cmocka.h>
}

// ---- arrays ----

constexpr size_t GUARD = 64;  // bytes behind each array that nobody may write

// `n` elements whose bytes are all 0xff: NaN in every format, so that what is read before it is written shows.
template <class T> struct Array {
    T* p;
    size_t n;
    explicit Array(size_t count) : n(count) {
        size_t bytes = n * sizeof(T);
#ifdef USE_CUDA
        CUDA_CHECK(cudaMallocManaged(&p, bytes + GUARD));
#else
        p = (T*)device_alloc(bytes + GUARD);
#endif
#ifdef SIMT
        simt_limit(p, bytes);
#endif
        memset((void*)p, 0xff, bytes);
        memset((char*)p + bytes, 0xa5, GUARD);
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() {
        stream_sync(NULL);
        for (size_t i = 0; i < GUARD; i++) {
            if (((unsigned char*)p)[n * sizeof(T) + i] != 0xa5) {
                fprintf(stderr, "an array of %zu elements of %zu bytes was written beyond its end\n", n, sizeof(T));
                abort();
            }
        }
        device_free(p);
    }
    operator T*() const { return p; }
    void fill(T x) const {
        for (size_t i = 0; i < n; i++) { p[i] = x; }
    }
};

// Waits until what was launched is done: before the test reads what a kernel wrote.
static inline void finish(void) {
    stream_sync(NULL);
#ifdef SIMT
    if (!simt_reports.empty()) {
        std::string text;
        for (const SimtReport& r : simt_reports) { text += r.text + "\n"; }
        simt_clear();
        fail_msg("%s", text.c_str());
    }
#endif
}

template <class T> static inline T encoded(float x) {
    T t;
    from_float(t, x);
    return t;
}

// ---- random inputs ----

static uint64_t random_state = 1;
static inline uint32_t random_u32(void) { return (uint32_t)(mix64(random_state++) >> 32); }
static inline double uniform(double low, double high) { return low + (high - low) * ((double)random_u32() / 4294967296.0); }
// nearly normal, and fast: a sum of four
static inline double normal(void) {
    double sum = 0.0;
    for (int i = 0; i < 4; i++) { sum += uniform(-0.5, 0.5); }
    return sum * 1.7320508;
}
// any float at all: NaN, inf and subnormal ones too
static inline float any_float(void) { return bits_to_float(random_u32()); }

template <class T> static inline void fill_normal(const Array<T>& x, double mean, double deviation) {
    for (size_t i = 0; i < x.n; i++) { from_float(x.p[i], (float)(mean + deviation * normal())); }
}

// ---- comparison ----

// |got - want| <= allowed, or both NaN, or the same infinity; else the test fails with the words of fmt
__attribute__((format(printf, 4, 5))) static inline void expect_near(double got, double want, double allowed, const char* fmt, ...) {
    if (fabs(got - want) <= allowed || got == want || (got != got && want != want)) { return; }
    char what[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof(what), fmt, args);
    va_end(args);
    fail_msg("%s: %.9g, should be %.9g, allowed error %.3g", what, got, want, allowed);
}

// Half a unit in the last place, relative: what rounding to T costs; 0 for float, whose rounding the FP32 tolerances contain
template <class T> constexpr double rounding_of(void) { return 0.0; }
template <> constexpr double rounding_of<bf16>(void) { return 0x1p-8; }

static inline int use_threads(int threads) {
#ifdef _OPENMP
    int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    return before;
#else
    return threads;
#endif
}

template <class F> static inline void with_threads(int threads, F f) {
    int before = use_threads(threads);
    f();
    use_threads(before);
}

// ---- calls that end the program ----

struct End {
    int code;          // exit code; 128 + the signal's number if it was killed, 99 if the call returned
    int lines;
    char text[4096];   // stderr
};

// Runs f in a child, which it is expected to end.
template <class F> static inline End end_of(F f) {
    End end = {};
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        f();
        _exit(99);
    }
    close(ends[1]);
    size_t n = 0;
    ssize_t got;
    while ((got = read(ends[0], end.text + n, sizeof(end.text) - 1 - n)) > 0) { n += (size_t)got; }
    close(ends[0]);
    for (size_t i = 0; i < n; i++) { end.lines += end.text[i] == '\n'; }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    end.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return end;
}

// f must end the program with this code and one line that begins with our name and contains these words (NULL: none).
template <class F> static inline void expect_end(int code, const char* word1, const char* word2, F f) {
    End end = end_of(f);
    const char name[] = "train_gpt_fp8: ";
    if (end.code != code || end.lines != 1 || strncmp(end.text, name, strlen(name)) != 0
        || (word1 != NULL && strstr(end.text, word1) == NULL) || (word2 != NULL && strstr(end.text, word2) == NULL)) {
        fail_msg("ended with code %d, not %d, and said '%s', which should be one line with '%s' and '%s'", end.code, code, end.text,
                 word1 != NULL ? word1 : "", word2 != NULL ? word2 : "");
    }
}

// ---- main ----

static inline bool device_is_here(void) {
#ifdef USE_CUDA
    return device_count() > 0;
#else
    return true;
#endif
}

static inline bool no_device(void) {
    puts("1..1\nok 1 # skip no GPU here");
    return false;
}

// One thread, unless a test asks for more: most are thousands of tiny calls, and on a busy machine threads would spend their time waiting
// for each other.
#define RUN_TESTS(tests) (use_threads(1), device_is_here() || no_device() ? cmocka_run_group_tests(tests, NULL, NULL) : 0)
