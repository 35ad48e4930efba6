// simt.h: runs GPU kernels on the CPU, from their own source, and watches them.
//
// A program is compiled with -DSIMT: core/common.h then takes the kernels' form for blocks of threads (GPU_FORM), `launch` of core/device.cuh comes here, and no
// CUDA header is needed. Every thread of a block is a fiber with a stack of its own; fibers take turns, and change hands only where a kernel waits for others:
// __syncthreads, __syncwarp, shuffles, votes and what a warp's tensor core does. Blocks run one after the other. `__shared__` variables are static ones;
// what a launch asks for beside them (DYNAMIC_SHARED of core/device.cuh) is a buffer of which so many bytes may be touched.
//
// Copies that run beside the arithmetic (cp.async) are done at the wait for them. Until then what they will overwrite counts as written by the thread that
// has issued them, and as not there: who reads it early, or still reads what was there before, is found. Matrix products and the loading of their fragments
// take and give what the PTX manual's figures say; they let a warp's lanes meet, but do not put in order what these do with memory.
//
// What a kernel does with memory is seen by the compiler's help: with -fsanitize=thread it calls a function at every load and store, and simt_runtime.cpp
// (libtsan is not linked) answers these calls. It reports, with the kernel's name, block, thread and address:
//     races          two threads, one of them writing, with no barrier between them; of a warp a __syncwarp or shuffle is enough; two blocks never are in order.
//                    Atomic operations race with others only.
//     out of bounds  what lies in no allocation of device_alloc (see simt_limit), in no shared variable and not on the thread's own stack
//     misaligned     words of 2 to 16 bytes that are not at a multiple of their size; that ends the launch
//     uninitialised  shared memory that the block has not written, or to which a copy is under way
//     deadlock       all threads that are left wait, and not for the same
// A barrier counts threads that have returned as arrived, as GPUs do.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int SIMT_MOST_THREADS = 1024;
constexpr size_t SIMT_MOST_SHARED = 227 << 10;  // that a launch can ask for
constexpr size_t SIMT_SHOWN = 32;               // bytes that a lane can show the others of its warp

enum SimtFault { SIMT_RACE, SIMT_OUT_OF_BOUNDS, SIMT_MISALIGNED, SIMT_UNINITIALISED, SIMT_DEADLOCK, SIMT_FAULTS };

struct SimtReport {
    SimtFault fault;
    std::string kernel, text;  // text: all of it, for people
};

// What has been found since the last simt_clear: the first of each kind in a launch
extern std::vector<SimtReport> simt_reports;
void simt_clear(void);

// An allocation that kernels may touch, and its end; device_alloc calls the former, a test that has bytes of its own behind an array the latter
void simt_allocated(void* p, size_t bytes);
void simt_freed(void* p);
void simt_limit(void* p, size_t bytes);

// All blocks of a grid, one after the other: body(arguments) is a thread's work. Reports are named after `kernel`
void simt_run(const char* kernel, dim3 grid, dim3 block, size_t shared, void (*body)(const void*), const void* arguments);
// So many bytes (up to SIMT_SHOWN) for which every lane of a warp gives its own, and all get the others', SIMT_SHOWN apart; lanes that are no more give nothing.
// `orders`: what lanes have done with memory before is in order with what they do after.
const void* simt_exchange(const void* mine, size_t bytes, bool orders = true);
void simt_block_barrier(void);
void simt_warp_barrier(void);
int simt_lane(void);
unsigned char* simt_dynamic_shared(void);
// ldmatrix.x4: matrix k (8 × 8, elements of 2 bytes) has the rows of 16 bytes at which lanes 8k … 8k + 7 point; `turned`: transposed
void simt_ldmatrix(uint32_t* r, const void* row, bool turned);
// d (16, 8) += a (16, 16) · b (16, 8), all as the lanes' fragments of mma.m16n8k16
void simt_mma_bf16(float* d, const uint32_t* a, const uint32_t* b);
// cp.async: `bytes` to shared memory, zeros where `there` is false; closing a group of them; waiting until no more than `pending` groups are under way
void simt_copy(void* shared, const void* global, size_t bytes, bool there);
void simt_copy_commit(void);
void simt_copy_wait(int pending);

inline void __syncthreads(void) { simt_block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { simt_warp_barrier(); }

template <class T> inline T simt_from_lane(T mine, int lane) {
    static_assert(sizeof(T) <= 8, "shuffles move words of up to 8 bytes");
    const char* all = (const char*)simt_exchange(&mine, sizeof(T));
    T other;
    memcpy((void*)&other, all + (size_t)lane * SIMT_SHOWN, sizeof(T));
    return other;
}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) { return simt_from_lane(v, simt_lane() ^ mask); }
template <class T> inline T __shfl_sync(unsigned, T v, int lane) { return simt_from_lane(v, lane & 31); }
template <class T> inline T __shfl_down_sync(unsigned, T v, int by) { return simt_from_lane(v, simt_lane() + by < 32 ? simt_lane() + by : simt_lane()); }
template <class T> inline T __shfl_up_sync(unsigned, T v, int by) { return simt_from_lane(v, simt_lane() >= by ? simt_lane() - by : simt_lane()); }
inline unsigned __ballot_sync(unsigned, int vote) {
    unsigned all = 0;
    int64_t v = vote != 0;
    const char* votes = (const char*)simt_exchange(&v, 8);
    for (int lane = 0; lane < 32; lane++) {
        int64_t other;
        memcpy(&other, votes + (size_t)lane * SIMT_SHOWN, 8);
        all |= (unsigned)(other != 0) << lane;
    }
    return all;
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }

template <class K> inline const char* simt_name(void) { return __PRETTY_FUNCTION__; }
// kernel(args…) in every thread. rows_kernel is named after what it runs
template <class... P, class... A> inline void simt_launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
    auto call = [=] { kernel(args...); };
    simt_run(strncmp(name, "rows_kernel", 11) == 0 ? simt_name<void(P...)>() : name, grid, block, shared, [](const void* c) { (*(const decltype(call)*)c)(); }, &call);
}
