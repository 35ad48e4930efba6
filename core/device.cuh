// device.cuh: one source for two devices: memory, streams, and kernels written once over a Team.
//
// A kernel is a struct with its arguments as fields and a call operator over (team, row):
//
//     struct Scale {                       // y = a * x
//         float* y; const float* x; float a; int C;
//         template <class Team> DEVICE void operator()(Team team, int row) const {
//             const float* xr = x + (size_t)row * C; float* yr = y + (size_t)row * C; float k = a;
//             team.each(C, [=](auto c) { store(yr, c, load(xr, c) * k); });
//         }
//     };
//     run_rows(Scale{y, x, 2.0f, C}, rows, stream);
//
// On a GPU a Team is a block of threads, and `c` stands for 8 neighbouring elements (16-byte loads) where the row length allows, else for one. On a
// CPU a Team is one OpenMP iteration, `c` is one element, and the loops are SIMD loops. Fields are copied into locals before a loop: the compiler then
// knows that a store cannot change them. Both forms add in a fixed order, so results repeat. Arithmetic is the same on both: contraction is off in
// the build, and a fused multiply-add is written where it is meant (`fma`).
//
// Everything that only nvcc understands is here, in the tile kernels of matmul.cuh and tiles.cuh, and in tensor_core.cuh and flash_*.cuh (PTX): launch syntax,
// shared memory, shuffles.
#pragma once
#include "common.h"
#include "float8.cuh"
#include "host_memory.h"
#include "trouble.h"
#ifdef USE_CUDA
#include <cuda_runtime.h>
#elif defined(SIMT)
#include "../test/simt.h"  // kernels in their form for GPUs, on this CPU
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) && !defined(GPU_FORM)
#include <immintrin.h>
#endif

// ---- memory and streams ----

#ifdef USE_CUDA

typedef cudaStream_t Stream;
static const bool device_is_gpu = true;
static const char* const device_kind = "cuda";

static inline GpuFacts gpu_facts(void) {
    GpuFacts f = {getenv("CUDA_VISIBLE_DEVICES"), 0, 0, 0, ""};
    int device, major = 0, minor = 0;
    cudaDriverGetVersion(&f.driver);
    cudaRuntimeGetVersion(&f.runtime);
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    }
    f.capability = 10 * major + minor;
#ifdef __CUDA_ARCH_LIST__
#define TEXT_OF(...) #__VA_ARGS__
#define EXPANDED(...) TEXT_OF(__VA_ARGS__)
    f.built = EXPANDED(__CUDA_ARCH_LIST__);
#undef EXPANDED
#undef TEXT_OF
#endif
    return f;
}

static inline void cuda_check(cudaError_t e, const char* call, const char* file, int line) {
    if (e == cudaSuccess) { return; }
    GpuFacts facts = gpu_facts();
    std::string hint = e == cudaErrorMemoryAllocation ? "the GPU's memory is full: nvidia-smi lists who else uses it; --recompute 2, a smaller --micro-batch or --seq-len need less"
        : e == cudaErrorNoKernelImageForDevice ? gpu_trouble_text(GPU_NO_CODE, &facts)
        : e == cudaErrorInsufficientDriver ? gpu_trouble_text(facts.driver == 0 ? GPU_ABSENT : GPU_DRIVER_OLD, &facts) : "";
    die("%s:%d: %s: %s%s%s", file, line, call, cudaGetErrorString(e), hint.empty() ? "" : "; hint: ", hint.c_str());
}
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

static inline void* device_alloc(size_t bytes) { void* p = NULL; CUDA_CHECK(cudaMalloc(&p, bytes > 0 ? bytes : 1)); return p; }
static inline void device_free(void* p) { CUDA_CHECK(cudaFree(p)); }
static inline void copy_to_device(void* d, const void* host, size_t bytes, Stream s) {
    CUDA_CHECK(cudaMemcpyAsync(d, host, bytes, cudaMemcpyHostToDevice, s));
}
// returns when the bytes have arrived
static inline void copy_to_host(void* host, const void* d, size_t bytes, Stream s) {
    CUDA_CHECK(cudaMemcpyAsync(host, d, bytes, cudaMemcpyDeviceToHost, s));
    CUDA_CHECK(cudaStreamSynchronize(s));
}
static inline void device_copy(void* d, const void* src, size_t bytes, Stream s) {
    CUDA_CHECK(cudaMemcpyAsync(d, src, bytes, cudaMemcpyDeviceToDevice, s));
}
static inline void device_zero(void* d, size_t bytes, Stream s) { CUDA_CHECK(cudaMemsetAsync(d, 0, bytes, s)); }
static inline Stream stream_create(void) { Stream s; CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); return s; }
// Its kernels go before those of other streams as soon as there is room.
static inline Stream urgent_stream_create(void) {
    Stream s;
    int least, greatest;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, greatest));
    return s;
}
static inline void stream_destroy(Stream s) { CUDA_CHECK(cudaStreamDestroy(s)); }
static inline void stream_sync(Stream s) { CUDA_CHECK(cudaStreamSynchronize(s)); }
static inline void device_wait(void) { CUDA_CHECK(cudaDeviceSynchronize()); }
static inline int device_count(void) { int n = 0; return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0; }
static inline void device_select(int i) { CUDA_CHECK(cudaSetDevice(i)); }
// Capability of the selected device as 10 * major + minor, e.g. 90.
static inline int device_capability(void) {
    int i, major, minor;
    CUDA_CHECK(cudaGetDevice(&i));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i));
    CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i));
    return 10 * major + minor;
}
// Ends where no GPU can be used, and says why
static inline void device_require_any(void) {
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaSuccess && n > 0) { return; }
    GpuFacts facts = gpu_facts();
    if (e != cudaSuccess && e != cudaErrorNoDevice && e != cudaErrorInsufficientDriver) { bad_input("the GPU cannot be used: %s; nvidia-smi may tell more", cudaGetErrorString(e)); }
    bad_input("%s", gpu_trouble_text(e == cudaErrorInsufficientDriver && facts.driver > 0 ? GPU_DRIVER_OLD : GPU_ABSENT, &facts).c_str());
}
static __global__ void empty_kernel(void) {}
// Ends where the selected device cannot run what is in this binary
static inline void device_require_code(void) {
    GpuFacts facts = gpu_facts();
    if (facts.capability < LEAST_CAPABILITY) { bad_input("%s", gpu_trouble_text(GPU_TOO_OLD, &facts).c_str()); }
    cudaFuncAttributes found;
    cudaError_t e = cudaFuncGetAttributes(&found, empty_kernel);
    bool no_code = e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction || e == cudaErrorUnsupportedPtxVersion;
    if (no_code) { bad_input("%s", gpu_trouble_text(GPU_NO_CODE, &facts).c_str()); }
    CUDA_CHECK(e);
}
// For each of the processes that share the device
static inline size_t device_memory_free(int processes = 1) { size_t f, t; CUDA_CHECK(cudaMemGetInfo(&f, &t)); return f / (size_t)max_of(processes, 1); }
static inline void device_name(char* name, size_t size) {
    cudaDeviceProp p;
    int i;
    CUDA_CHECK(cudaGetDevice(&i));
    CUDA_CHECK(cudaGetDeviceProperties(&p, i));
    snprintf(name, size, "%.*s", (int)size - 1, p.name);
}
// Host memory that the device can write to while the host goes on
static inline void* pinned_alloc(size_t bytes) { void* p = NULL; CUDA_CHECK(cudaMallocHost(&p, bytes > 0 ? bytes : 1)); return p; }
// NULL: there is none left
static inline void* pinned_alloc_or_null(size_t bytes) {
    void* p = NULL;
    if (cudaMallocHost(&p, bytes > 0 ? bytes : 1) == cudaSuccess) { return p; }
    cudaGetLastError();  // it is dealt with
    return NULL;
}
static inline void pinned_free(void* p) { CUDA_CHECK(cudaFreeHost(p)); }
static inline void copy_to_pinned(void* pinned, const void* d, size_t bytes, Stream s) {
    CUDA_CHECK(cudaMemcpyAsync(pinned, d, bytes, cudaMemcpyDeviceToHost, s));
}
// A point in a stream that the host can wait for
typedef cudaEvent_t Event;
static inline Event event_create(void) { Event e; CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming)); return e; }
static inline void event_destroy(Event e) { CUDA_CHECK(cudaEventDestroy(e)); }
static inline Event timed_event_create(void) { Event e; CUDA_CHECK(cudaEventCreate(&e)); return e; }
static inline void event_record(Event e, Stream s) { CUDA_CHECK(cudaEventRecord(e, s)); }
static inline void event_wait(Event e) { CUDA_CHECK(cudaEventSynchronize(e)); }
// What is launched on the stream from here on waits for the event; the host does not.
static inline void stream_wait_event(Stream s, Event e) { CUDA_CHECK(cudaStreamWaitEvent(s, e, 0)); }
// Milliseconds between two timed events that have both passed
static inline double event_milliseconds(Event from, Event to) { float ms; CUDA_CHECK(cudaEventElapsedTime(&ms, from, to)); return (double)ms; }
// What is launched on the stream between begin and end is not done but kept, to be launched as one any number of times, with the same arguments.
typedef cudaGraphExec_t Graph;
static inline void graph_begin(Stream s) { CUDA_CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal)); }
static inline Graph graph_end(Stream s) {
    cudaGraph_t launches;
    Graph g;
    CUDA_CHECK(cudaStreamEndCapture(s, &launches));
    CUDA_CHECK(cudaGraphInstantiate(&g, launches, 0));
    CUDA_CHECK(cudaGraphDestroy(launches));
    return g;
}
static inline void graph_launch(Graph g, Stream s) { CUDA_CHECK(cudaGraphLaunch(g, s)); }
static inline void graph_free(Graph g) { CUDA_CHECK(cudaGraphExecDestroy(g)); }

#else

typedef struct CpuStream* Stream;  // a CPU runs everything in program order: the only stream is NULL
static const bool device_is_gpu = false;
static const char* const device_kind = "cpu";

static inline void* device_alloc(size_t bytes) {
    void* p = aligned_alloc(256, round_up(bytes > 0 ? bytes : 1, (size_t)256));
    if (p == NULL) {
        die("out of memory: %zu bytes asked for, and about %zu are left of the machine's or of a limit (ulimit -v, the container's); --recompute 2, a smaller --micro-batch or --seq-len need less",
            bytes, host_memory_free());
    }
#ifdef SIMT
    simt_allocated(p, bytes);
#endif
    return p;
}
static inline void device_free(void* p) {
#ifdef SIMT
    simt_freed(p);
#endif
    free(p);
}
static inline void copy_to_device(void* d, const void* host, size_t bytes, Stream) { memcpy(d, host, bytes); }
static inline void copy_to_host(void* host, const void* d, size_t bytes, Stream) { memcpy(host, d, bytes); }
static inline void device_copy(void* d, const void* src, size_t bytes, Stream) { memcpy(d, src, bytes); }
static inline void device_zero(void* d, size_t bytes, Stream) { memset(d, 0, bytes); }
static inline Stream stream_create(void) { return NULL; }
static inline Stream urgent_stream_create(void) { return NULL; }
static inline void stream_destroy(Stream) {}
static inline void stream_sync(Stream) {}
static inline void device_wait(void) {}
static inline void* pinned_alloc(size_t bytes) { return host_alloc(bytes); }
static inline void* pinned_alloc_or_null(size_t bytes) { return malloc(bytes > 0 ? bytes : 1); }
static inline void pinned_free(void* p) { free(p); }
static inline void copy_to_pinned(void* pinned, const void* d, size_t bytes, Stream) { memcpy(pinned, d, bytes); }
typedef struct CpuEvent* Event;
static inline Event event_create(void) { return NULL; }
static inline void event_destroy(Event) {}
static inline Event timed_event_create(void) { return NULL; }
static inline void event_record(Event, Stream) {}
static inline void event_wait(Event) {}
static inline void stream_wait_event(Stream, Event) {}
static inline double event_milliseconds(Event, Event) { return 0.0; }
typedef struct CpuGraph* Graph;  // a CPU has no use for it
static inline void graph_begin(Stream) {}
static inline Graph graph_end(Stream) { return NULL; }
static inline void graph_launch(Graph, Stream) {}
static inline void graph_free(Graph) {}
static inline size_t device_memory_free(int processes = 1) { return host_memory_free(processes); }
static inline void device_name(char* name, size_t size) {
    snprintf(name, size, "CPU");
    FILE* f = fopen("/proc/cpuinfo", "r");
    if (f == NULL) { return; }
    char line[512];
    while (fgets(line, sizeof(line), f) != NULL) {
        const char* colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            snprintf(name, size, "%s", colon + 2);
            name[strcspn(name, "\n")] = '\0';
            break;
        }
    }
    fclose(f);
}

#endif

// ---- types chosen at run time ----

template <class T> struct Tag { typedef T type; };

static inline void* advance(void* p, DType t, size_t elements) { return (char*)p + elements * (size_t)dtype_bytes(t); }

// ---- packs: N elements of a row at once ----

template <int N> struct Range { size_t i; };  // elements i … i+N-1

template <int N> struct Vec {
    float v[N];
    template <class F> static DEVICE Vec map(F f) {
        Vec r;
        UNROLL
        for (int k = 0; k < N; k++) { r.v[k] = f(k); }
        return r;
    }
};
template <int N> struct VecPair { Vec<N> a, b; };
template <int N> DEVICE Vec<N> splat(Range<N>, float x) { return Vec<N>::map([&](int) { return x; }); }
template <int N> DEVICE VecPair<N> pair_of(Vec<N> a, Vec<N> b) { return VecPair<N>{a, b}; }

#define VEC_OPERATOR(op) \
    template <int N> DEVICE Vec<N> operator op(const Vec<N>& a, const Vec<N>& b) { return Vec<N>::map([&](int k) { return a.v[k] op b.v[k]; }); } \
    template <int N> DEVICE Vec<N> operator op(const Vec<N>& a, float b) { return Vec<N>::map([&](int k) { return a.v[k] op b; }); } \
    template <int N> DEVICE Vec<N> operator op(float a, const Vec<N>& b) { return Vec<N>::map([&](int k) { return a op b.v[k]; }); }
VEC_OPERATOR(+)
VEC_OPERATOR(-)
VEC_OPERATOR(*)
VEC_OPERATOR(/)
#undef VEC_OPERATOR

// a * b + c, rounded once
DEVICE float fma_of(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__)
    return __builtin_fmaf(a, b, c);
#else
    return fmaf(a, b, c);  // right everywhere, slow where the CPU has no FMA
#endif
}

// e^x within 2 units in the last place; beyond the float range 0 below and inf above; NaN stays. Cody-Waite reduction and a polynomial: libm's expf
// does not vectorise, and this one gives the same bits on every device.
DEVICE float exp_of(float x) {
    float t = x < -87.33654f ? -87.33654f : x;
    t = t > 88.72283f ? 88.72283f : t;
    float n = fma_of(t, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: the sum's low bits hold round(x / ln 2)
    int e = (int)(float_to_bits(n) - 0x4b400000u);
    n = n - 12582912.0f;
    float r = fma_of(n, -0.693145752f, t);
    r = fma_of(n, -1.42860677e-6f, r);
    float p = fma_of(r, 1.98756914e-4f, 1.39819994e-3f);
    p = fma_of(p, r, 8.33345205e-3f);
    p = fma_of(p, r, 4.16657962e-2f);
    p = fma_of(p, r, 1.66666657e-1f);
    p = fma_of(p, r, 0.5f);
    p = fma_of(p, r * r, r) + 1.0f;
    int half = e >> 1;                              // 2^128 is no float: the factor goes in two steps
    float y = p * exp2_int(half) * exp2_int(e - half);
    y = x > 88.72283f ? bits_to_float(0x7f800000u) : y;
    y = x < -87.33654f ? 0.0f : y;
    return x == x ? y : x;
}

template <int N> DEVICE Vec<N> exp_of(Vec<N> a) { return Vec<N>::map([&](int k) { return exp_of(a.v[k]); }); }
// As near as activations need it: on a GPU by its own instructions, a few units in the last place off, and not the CPU's bits
DEVICE float exp_near(float x) {
#ifdef __CUDA_ARCH__
    return __expf(x);
#else
    return exp_of(x);
#endif
}
// 1/(1 + e^-x)
DEVICE float logistic_near(float x) {
#ifdef __CUDA_ARCH__
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return r;
#else
    return 1.0f / (1.0f + exp_of(-x));
#endif
}
template <int N> DEVICE Vec<N> exp_near(Vec<N> a) { return Vec<N>::map([&](int k) { return exp_near(a.v[k]); }); }
template <int N> DEVICE Vec<N> sqrt_of(const Vec<N>& a) { return Vec<N>::map([&](int k) { return sqrtf(a.v[k]); }); }
template <int N> DEVICE Vec<N> fma_of(Vec<N> a, Vec<N> b, Vec<N> c) {
    return Vec<N>::map([&](int k) { return fma_of(a.v[k], b.v[k], c.v[k]); });
}
template <int N> DEVICE Vec<N> fma_of(Vec<N> a, float b, Vec<N> c) { return Vec<N>::map([&](int k) { return fma_of(a.v[k], b, c.v[k]); }); }
template <class T, int N> DEVICE Vec<N> round_to(Vec<N> a) { return Vec<N>::map([&](int k) { return round_to<T>(a.v[k]); }); }

// NaN and inf win: the bits of |x| order as integers
DEVICE uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffffu; }
template <int N> DEVICE uint32_t magnitude_bits(const Vec<N>& a) {
    uint32_t top = 0;
    UNROLL
    for (int k = 0; k < N; k++) { top = max_of(top, magnitude_bits(a.v[k])); }
    return top;
}
struct Extent { uint32_t low, high; };  // of magnitudes, as bits
constexpr Extent NO_EXTENT = {0x7fffffffu, 0};
DEVICE Extent extent_with(Extent e, float x) { return Extent{min_of(e.low, magnitude_bits(x)), max_of(e.high, magnitude_bits(x))}; }
template <int N> DEVICE Extent extent_of(const Vec<N>& a) {
    Extent e = NO_EXTENT;
    UNROLL
    for (int k = 0; k < N; k++) { e = extent_with(e, a.v[k]); }
    return e;
}
// An integer that orders as the float does, NaN above all
DEVICE int32_t ordered_bits(float x) {
    int32_t u = (int32_t)float_to_bits(x);
    u = magnitude_bits(x) > 0x7f800000u ? 0x7fc00000 : u;
    return u ^ ((u >> 31) & 0x7fffffff);
}
DEVICE float from_ordered_bits(int32_t o) { return bits_to_float((uint32_t)(o ^ ((o >> 31) & 0x7fffffff))); }

// Whether the packs of 8 elements that begin at p can be moved as words
template <class T> DEVICE bool pack_aligned(const T* p) { return (size_t)p % (sizeof(T) >= 2 ? 16 : 8) == 0; }

template <class T, int N> struct alignas(sizeof(T) * N >= 16 ? 16 : sizeof(T) * N) Raw { T e[N]; };

// Moves a pack: on a GPU in words of 16 bytes where the row's packs are aligned to them, on a CPU by element (the compiler makes the vectors)
#ifdef GPU_FORM
template <class Word, class T, int N> DEVICE void move_words(T* d, const T* s) {
#if defined(__CUDACC__) && !defined(__CUDA_ARCH__)
    memcpy((void*)d, (const void*)s, sizeof(T) * N);  // on the host, whose compiler takes words and elements for different memory
#else
    UNROLL
    for (size_t k = 0; k < sizeof(T) * N / sizeof(Word); k++) { ((Word*)d)[k] = ((const Word*)s)[k]; }
#endif
}
template <class T, int N> DEVICE void move_pack(T* d, const T* s) {
    if constexpr (N > 1 && sizeof(T) * N % 16 == 0) { move_words<uint4, T, N>(d, s); }
    else if constexpr (N > 1 && sizeof(T) * N % 8 == 0) { move_words<uint2, T, N>(d, s); }
    else { move_words<T, T, N>(d, s); }
}
#endif
template <class T, int N> DEVICE Raw<T, N> load_raw(const T* p, Range<N> c) {
    Raw<T, N> r;
#ifdef GPU_FORM
    move_pack<T, N>(r.e, p + c.i);
#else
    for (int k = 0; k < N; k++) { r.e[k] = p[c.i + k]; }
#endif
    return r;
}
template <class T, int N> DEVICE void store_raw(T* p, Range<N> c, const Raw<T, N>& r) {
#ifdef GPU_FORM
    move_pack<T, N>(p + c.i, r.e);
#else
    for (int k = 0; k < N; k++) { p[c.i + k] = r.e[k]; }
#endif
}
// FP8 codes times 2^k as BF16, exact (see float8.cuh)
template <class F, int N> DEVICE Raw<bf16, N> widen(Raw<F, N> x, int k) {
    Raw<bf16, N> r;
    UNROLL
    for (int i = 0; i < N; i++) { r.e[i].bits = widen(x.e[i], k); }
    return r;
}
// The elements c of row p as floats
template <class T, int N> DEVICE Vec<N> load(const T* p, Range<N> c) {
    Raw<T, N> r = load_raw(p, c);
    return Vec<N>::map([&](int k) { return to_float(r.e[k]); });
}
// rounds to nearest even
template <class T, int N> DEVICE void store(T* p, Range<N> c, const Vec<N>& x) {
    Raw<T, N> r;
    UNROLL
    for (int k = 0; k < N; k++) { from_float(r.e[k], x.v[k]); }
    store_raw(p, c, r);
}
// 32 random bits for each of the elements c; `first`: the number of element 0 within the unsharded tensor
template <int N> DEVICE Raw<uint32_t, N> random_pack(RandomKey key, Range<N> c, uint64_t first) {
    Raw<uint32_t, N> r;
    uint64_t at = first + c.i;
    if (N > 1 && at >> 32 == (at + N - 1) >> 32) {
        uint32_t upper = random_upper(key, at), lower = (uint32_t)at;
        UNROLL
        for (int k = 0; k < N; k++) { r.e[k] = random_lower(key, lower + (uint32_t)k, upper); }
    } else {
        for (int k = 0; k < N; k++) { r.e[k] = random_bits(key, at + (uint64_t)k); }
    }
    return r;
}
template <class T, int N> DEVICE void store_stochastic(T* p, Range<N> c, const Vec<N>& x, RandomKey key, uint64_t first) {
    Raw<T, N> r;
    Raw<uint32_t, N> random = random_pack(key, c, first);
    UNROLL
    for (int k = 0; k < N; k++) { from_float_stochastic(r.e[k], x.v[k], random.e[k]); }
    store_raw(p, c, r);
}

// the one or the other
template <Rounding R, class T, int N> DEVICE void store_rounded(T* p, Range<N> c, const Vec<N>& x, RandomKey key, uint64_t first) {
    if (R == STOCHASTIC) { store_stochastic(p, c, x, key, first); } else { store(p, c, x); }
}

// ---- a pack of a type known at run time, of which the first `count` elements are there ----

// N codes as floats, times `factor`
template <int N, class T> DEVICE Vec<N> scaled(const T* e, float factor) {
    return Vec<N>::map([&](int k) { return to_float(e[k]) * factor; });
}
#if defined(__AVX512F__) && !defined(GPU_FORM)
// There is an instruction for FP16, which serves E4M3 too, by way of halves that are 2^8 too small; and no compiler makes a loop of it.
template <int N> DEVICE Vec<N> scaled_halves(const fp16* e, float first, float factor) {
    Vec<N> x;
    int k = 0;
    for (; k + 16 <= N; k += 16) {
        __m512 y = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(e + k))) * _mm512_set1_ps(first);
        _mm512_storeu_ps(x.v + k, y * _mm512_set1_ps(factor));
    }
    for (; k < N; k++) { x.v[k] = to_float(e[k]) * first * factor; }
    return x;
}
template <int N> DEVICE Vec<N> scaled(const fp16* e, float factor) { return scaled_halves<N>(e, 1.0f, factor); }
template <int N> DEVICE Vec<N> scaled(const e4m3* e, float factor) {
    fp16 h[N];
    for (int k = 0; k < N; k++) {
        uint16_t u = (uint16_t)((int8_t)e[k].bits * 128) & 0xbf80;
        h[k].bits = u | ((u + 0x80) & 0x4000);  // NaN alone gets an exponent of ones
    }
    return scaled_halves<N>(h, 256.0f, factor);
}
#endif
// The elements times `factor`
template <class T, int N> DEVICE Vec<N> load_some(const T* p, Range<N> c, int count, float factor) {
    if (count < N) { return Vec<N>::map([&](int k) { return k < count ? to_float(p[c.i + k]) * factor : 0.0f; }); }
#ifdef GPU_FORM
    return scaled<N>(load_raw(p, c).e, factor);
#else
    return scaled<N>(p + c.i, factor);
#endif
}
template <int N> DEVICE Vec<N> load_as(DType t, const void* p, Range<N> c, int count, float factor) {
    switch (t) {
        case BF16: return load_some((const bf16*)p, c, count, factor);
        case FP16: return load_some((const fp16*)p, c, count, factor);
        case E4M3: return load_some((const e4m3*)p, c, count, factor);
        case E5M2: return load_some((const e5m2*)p, c, count, factor);
        case UE5M3: return load_some((const ue5m3*)p, c, count, factor);
        default: return load_some((const float*)p, c, count, factor);
    }
}
// How the elements f(0) … of a pack are rounded
struct RoundNearest {
    template <class T> DEVICE void operator()(T& d, float x, int) const { from_float(d, x); }
};
template <int TURN, int N> struct RoundStochastic {  // TURN: the bits are rotated by so many: several numbers can be rounded with one set
    const Raw<uint32_t, N>* random;
    DEVICE uint32_t bits(int k) const { return random->e[k] << TURN | random->e[k] >> ((32 - TURN) & 31); }
    template <class T> DEVICE void operator()(T& d, float x, int k) const { from_float_stochastic(d, x, bits(k)); }
};
template <int TURN, int N> struct RoundNormal : RoundStochastic<TURN, N> {  // no number is subnormal, 0, too large or NaN
    template <class T> DEVICE void operator()(T& d, float x, int k) const { from_float_normal(d, x, this->bits(k)); }
};
// x · scale
template <class T, int N, class Round> DEVICE void store_some(T* p, Range<N> c, int count, const Vec<N>& x, float scale, Round round) {
    if (count < N) {
        for (int k = 0; k < count; k++) { round(p[c.i + k], x.v[k] * scale, k); }
        return;
    }
#ifndef GPU_FORM
    T* q = p + c.i;
    for (int k = 0; k < N; k++) { round(q[k], x.v[k] * scale, k); }
#else
    Raw<T, N> r;
    UNROLL
    for (int k = 0; k < N; k++) { round(r.e[k], x.v[k] * scale, k); }
    store_raw(p, c, r);
#endif
}
template <int N, class Round> DEVICE void store_as(DType t, void* p, Range<N> c, int count, const Vec<N>& x, float scale, Round round) {
    switch (t) {
        case BF16: store_some((bf16*)p, c, count, x, scale, round); break;
        case FP16: store_some((fp16*)p, c, count, x, scale, round); break;
        case E4M3: store_some((e4m3*)p, c, count, x, scale, round); break;
        case E5M2: store_some((e5m2*)p, c, count, x, scale, round); break;
        case UE5M3: store_some((ue5m3*)p, c, count, x, scale, round); break;
        default: store_some((float*)p, c, count, x, scale, RoundNearest{});
    }
}

// *target = max(*target, value) for integers, from any number of rows at once; the order does not matter, so the result repeats
DEVICE void atomic_max(uint32_t* target, uint32_t value) {
#if defined(__CUDA_ARCH__)
    atomicMax(target, value);
#else
    uint32_t seen = __atomic_load_n(target, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(target, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
#endif
}

// *p, which others may be changing by these functions
DEVICE uint32_t atomic_read(const uint32_t* p) {
#if defined(__CUDA_ARCH__)
    return *(volatile const uint32_t*)p;
#else
    return __atomic_load_n(p, __ATOMIC_RELAXED);
#endif
}

// *target += value for integers, likewise
DEVICE void atomic_add(uint64_t* target, uint64_t value) {
#if defined(__CUDA_ARCH__)
    atomicAdd((unsigned long long*)target, (unsigned long long)value);
#else
    __atomic_fetch_add(target, value, __ATOMIC_RELAXED);
#endif
}

// ---- the CPU's Team: one OpenMP iteration ----

struct CpuTeam {
    // Packs of one element only: for rows whose start may be unaligned.
    DEVICE CpuTeam unaligned() const { return *this; }
    // The same where rows lie `stride` elements apart and that is no whole number of packs.
    DEVICE CpuTeam strided(int) const { return *this; }
    DEVICE bool leads() const { return true; }
    DEVICE void sync() const {}

    // f(c) for every c of 0 … n-1, in no order; the calls must not depend on each other
    template <class F> DEVICE void each(int n, F f) const {
#pragma omp simd
        for (int i = 0; i < n; i++) { f(Range<1>{(size_t)i}); }
    }
    // Σ f(c)
    template <class F> DEVICE float sum(int n, F f) const {
        float s = 0.0f;
#pragma omp simd reduction(+ : s)
        for (int i = 0; i < n; i++) { s += f(Range<1>{(size_t)i}).v[0]; }
        return s;
    }
    // Both sums of the pairs f(c)
    template <class F> DEVICE VecPair<1> sum_pair(int n, F f) const {
        float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
        for (int i = 0; i < n; i++) { VecPair<1> p = f(Range<1>{(size_t)i}); a += p.a.v[0]; b += p.b.v[0]; }
        return VecPair<1>{{{a}}, {{b}}};
    }
    // Σ f(i) of doubles, i an index
    template <class F> DEVICE double sum_double(int64_t n, F f) const {
        double s = 0.0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < n; i++) { s += f(i); }
        return s;
    }
    // max |f(c)| as float bits: NaN and inf win. f may store as it goes.
    template <class F> DEVICE uint32_t amax(int n, F f) const {
        uint32_t top = 0;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < n; i++) { uint32_t a = magnitude_bits(f(Range<1>{(size_t)i})); top = a > top ? a : top; }
        return top;
    }
    // max f(c); a NaN wins
    template <class F> DEVICE float max(int n, F f) const {
        int32_t top = INT32_MIN;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < n; i++) { int32_t a = ordered_bits(f(Range<1>{(size_t)i}).v[0]); top = a > top ? a : top; }
        return from_ordered_bits(top);
    }
    // f(c, count) for stretches of 0 … n-1 within blocks of BLOCK elements; of the last, `count` elements are there. Locals that f changes are of one
    // thread: `top_of` makes one of them all.
    template <int BLOCK, class F> DEVICE void each_block(int n, F f) const {
        for (int i = 0; i < n; i += BLOCK) { f(Range<BLOCK>{(size_t)i}, n - i < BLOCK ? n - i : BLOCK); }
    }
    // the greatest over the block that the caller is in
    template <int BLOCK> DEVICE uint32_t block_top(uint32_t x) const { return x; }
    template <int BLOCK> DEVICE bool leads_block() const { return true; }
    DEVICE void sync_blocks() const {}
    // the greatest of all threads'
    DEVICE uint32_t top_of(uint32_t x) const { return x; }
    // out[c] = Σ over rows r0 … r1-1 of f(r, c), from 0 in the order of the rows; returns max |f| as float bits. For sums by column over a strip of rows.
    template <class F> DEVICE uint32_t columns(float* out, int r0, int r1, int n, F f) const {
        uint32_t top = 0;
        each(n, [=](auto c) { store(out, c, splat(c, 0.0f)); });
        for (int r = r0; r < r1; r++) {
#pragma omp simd reduction(max : top)
            for (int i = 0; i < n; i++) {
                Vec<1> v = f(r, Range<1>{(size_t)i});
                out[i] += v.v[0];
                uint32_t a = magnitude_bits(v);
                top = a > top ? a : top;
            }
        }
        return top;
    }
    // the same for two sums at once
    template <class F> DEVICE void columns_pair(float* out_a, float* out_b, int r0, int r1, int n, F f) const {
        each(n, [=](auto c) { store(out_a, c, splat(c, 0.0f)); store(out_b, c, splat(c, 0.0f)); });
        for (int r = r0; r < r1; r++) {
#pragma omp simd
            for (int i = 0; i < n; i++) {
                VecPair<1> v = f(r, Range<1>{(size_t)i});
                out_a[i] += v.a.v[0];
                out_b[i] += v.b.v[0];
            }
        }
    }
};

// ---- the GPU's Team: a block of threads ----

#ifdef GPU_FORM
constexpr int PACK = 8;          // elements a thread takes at once
constexpr int TEAM_THREADS = 256;  // a multiple of 32: shuffles take whole warps

struct GpuTeam {
    int rank, size;
    bool packed;

    GPU GpuTeam unaligned() const { return GpuTeam{rank, size, false}; }
    GPU GpuTeam strided(int stride) const { return GpuTeam{rank, size, packed && stride % PACK == 0}; }
    GPU bool leads() const { return rank == 0; }
    GPU void sync() const { __syncthreads(); }

    template <class F> GPU void each(int n, F f) const {
        if (packed && n % PACK == 0) {
            for (int i = rank; i < n / PACK; i += size) { f(Range<PACK>{(size_t)i * PACK}); }
        } else {
            for (int i = rank; i < n; i += size) { f(Range<1>{(size_t)i}); }
        }
    }
    // Combines one value a thread over the block, in a fixed tree: lanes by shuffles, then warps. All threads get the result.
    template <class T, class Op> GPU T combine(T x, T neutral, Op op) const {
        __shared__ T warps[32];
        for (int o = 16; o > 0; o >>= 1) { x = op(x, __shfl_xor_sync(0xffffffffu, x, o)); }
        __syncthreads();  // the array may still be read from the last call
        if ((rank & 31) == 0) { warps[rank >> 5] = x; }
        __syncthreads();
        x = (rank & 31) < (size >> 5) ? warps[rank & 31] : neutral;
        for (int o = 16; o > 0; o >>= 1) { x = op(x, __shfl_xor_sync(0xffffffffu, x, o)); }
        return x;
    }
    struct Add { template <class T> GPU T operator()(T a, T b) const { return a + b; } };
    struct Max { template <class T> GPU T operator()(T a, T b) const { return a > b ? a : b; } };

    template <int N> static GPU float sum_of(Vec<N> a) {
        float s = a.v[0];
        UNROLL
        for (int k = 1; k < N; k++) { s += a.v[k]; }
        return s;
    }
    template <int N> static GPU int32_t ordered_max(Vec<N> a) {
        int32_t top = INT32_MIN;
        UNROLL
        for (int k = 0; k < N; k++) { top = max_of(top, ordered_bits(a.v[k])); }
        return top;
    }
    template <class F> GPU float sum(int n, F f) const {
        float s = 0.0f;
        each(n, [&](auto c) { s += sum_of(f(c)); });
        return combine(s, 0.0f, Add{});
    }
    template <class F> GPU VecPair<1> sum_pair(int n, F f) const {
        float a = 0.0f, b = 0.0f;
        each(n, [&](auto c) { auto p = f(c); a += sum_of(p.a); b += sum_of(p.b); });
        a = combine(a, 0.0f, Add{});
        b = combine(b, 0.0f, Add{});
        return VecPair<1>{{{a}}, {{b}}};
    }
    template <class F> GPU double sum_double(int64_t n, F f) const {
        double s = 0.0;
        for (int64_t i = rank; i < n; i += size) { s += f(i); }
        return combine(s, 0.0, Add{});
    }
    template <class F> GPU uint32_t amax(int n, F f) const {
        uint32_t top = 0;
        each(n, [&](auto c) { top = max_of(top, magnitude_bits(f(c))); });
        return combine(top, 0u, Max{});
    }
    template <class F> GPU float max(int n, F f) const {
        int32_t top = INT32_MIN;
        each(n, [&](auto c) { top = max_of(top, ordered_max(f(c))); });
        return from_ordered_bits(combine(top, (int32_t)INT32_MIN, Max{}));
    }
    // A block is taken by BLOCK/PACK neighbouring threads of a warp; all of them call f, those beyond the end with count 0.
    template <int BLOCK, class F> GPU void each_block(int n, F f) const {
        static_assert(BLOCK % PACK == 0 && 32 % (BLOCK / PACK) == 0, "blocks lie within a warp");
        int packs = (n + BLOCK - 1) / BLOCK * (BLOCK / PACK);
        packs = (packs + 31) / 32 * 32;
        for (int i = rank; i < packs; i += size) {
            int left = n - i * PACK;
            f(Range<PACK>{(size_t)i * PACK}, left < 0 ? 0 : left < PACK ? left : PACK);
        }
    }
    template <int BLOCK> GPU uint32_t block_top(uint32_t top) const {
        for (int o = BLOCK / PACK / 2; o > 0; o >>= 1) { top = max_of(top, __shfl_xor_sync(0xffffffffu, top, o)); }
        return top;
    }
    template <int BLOCK> GPU bool leads_block() const { return rank % (BLOCK / PACK) == 0; }
    GPU void sync_blocks() const { __syncwarp(); }
    GPU uint32_t top_of(uint32_t x) const { return combine(x, 0u, Max{}); }
    template <class F> GPU uint32_t columns(float* out, int r0, int r1, int n, F f) const {
        uint32_t top = 0;
        each(n, [&](auto c) {
            auto total = splat(c, 0.0f);
            for (int r = r0; r < r1; r++) {
                auto v = f(r, c);
                top = max_of(top, magnitude_bits(v));
                total = total + v;
            }
            store(out, c, total);
        });
        return combine(top, 0u, Max{});
    }
    template <class F> GPU void columns_pair(float* out_a, float* out_b, int r0, int r1, int n, F f) const {
        each(n, [&](auto c) {
            auto a = splat(c, 0.0f), b = a;
            for (int r = r0; r < r1; r++) {
                auto v = f(r, c);
                a = a + v.a;
                b = b + v.b;
            }
            store(out_a, c, a);
            store(out_b, c, b);
        });
    }
};

template <class Op> __global__ void __launch_bounds__(TEAM_THREADS) rows_kernel(Op op) {
    op(GpuTeam{(int)threadIdx.x, (int)blockDim.x, true}, (int)blockIdx.x);
}
#endif

// ---- launch ----

// The shared memory whose size a launch gives
#ifdef USE_CUDA
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#elif defined(SIMT)
#define DYNAMIC_SHARED(name) unsigned char* name = simt_dynamic_shared()
#endif

#ifdef USE_CUDA
template <class... P, class... A>
static inline void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream stream, A... args) {
    if (shared > 48 * 1024) { CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared)); }
    kernel<<<grid, block, shared, stream>>>(args...);
    CUDA_CHECK(cudaGetLastError());
}
#elif defined(SIMT)
template <class... P, class... A> static inline void launch_named(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, Stream, A... args) {
    simt_launch(name, kernel, grid, block, shared, args...);
}
#define launch(kernel, ...) launch_named(#kernel, kernel, __VA_ARGS__)  // reports name it
#endif

// op(team, row) for rows 0 … rows-1; the rows must not depend on each other
template <class Op> static inline void run_rows(Op op, int rows, Stream stream) {
    if (rows <= 0) { return; }
#ifdef GPU_FORM
    launch(rows_kernel<Op>, dim3((unsigned)rows), dim3(TEAM_THREADS), 0, stream, op);
#else
    (void)stream;
    if (rows == 1) { op(CpuTeam{}, 0); return; }
#pragma omp parallel for schedule(static)
    for (int r = 0; r < rows; r++) { op(CpuTeam{}, r); }
#endif
}
