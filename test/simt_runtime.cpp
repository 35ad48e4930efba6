// simt_runtime.cpp: the part of simt.h that must not be watched itself: fibers, barriers, and what is known of each byte of memory. Compiled without
// -fsanitize=thread; it takes libtsan's place.
#define SIMT
#include "simt.h"
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
#include <map>
#include <unordered_map>

dim3 threadIdx, blockIdx, blockDim, gridDim;
std::vector<SimtReport> simt_reports;

// What nobody has asked for, as in the ranks that a test starts, is said at the end, and ends badly.
static struct LastWord {
    ~LastWord() {
        for (const SimtReport& r : simt_reports) { fprintf(stderr, "%s\n", r.text.c_str()); }
        if (!simt_reports.empty()) { _exit(98); }
    }
} last_word;

extern "C" {
extern char __bss_start, _end;  // of the program: shared variables lie between them
void simt_switch(void** save, void* load);
}

#if defined(__x86_64__)
asm(R"(
.text
.globl simt_switch
simt_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
constexpr int SAVED = 6, RETURN = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl simt_switch
simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr int SAVED = 20, RETURN = 11;
#else
#error "simt_runtime.cpp knows no switch of stacks for this CPU"
#endif

namespace {

constexpr size_t STACK = 64 << 10;
constexpr int WARPS = SIMT_MOST_THREADS / 32;

enum Waiting { RUNS, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Copy {
    void* shared;
    const void* global;  // NULL: zeros
    size_t bytes;
    int group;
};

struct Fiber {
    void* sp;
    Waiting waiting;
    int group;                 // of copies, that is open
    std::vector<Copy> copies;  // under way
};

alignas(1024) unsigned char dynamic_shared[SIMT_MOST_SHARED];

struct Grid {
    const char* kernel;
    void (*body)(const void*);
    const void* arguments;
    uint32_t launch, block;                // numbers, from 1
    int threads, left, current;
    uint32_t epoch;                        // barriers of the block so far
    uint32_t warp_epoch[WARPS];            // and of each warp, since that
    int waits, warp_waits[WARPS], warp_left[WARPS], turn[WARPS];
    bool warp_orders[WARPS];               // what a warp waits at is a barrier for memory too
    size_t shared;                         // bytes that the launch has asked for
    unsigned char lanes[WARPS][2][32][SIMT_SHOWN];  // what the lanes of a warp show each other, in two turns
    bool abandoned, seen[SIMT_FAULTS];
    void* host;
};

std::vector<Fiber> fibers;
char* stacks;  // of all fibers, one after the other
Grid grid;
bool watching;

char* stack_of(int fiber) { return stacks + (size_t)fiber * STACK; }

void report(SimtFault fault, const std::string& what) {
    if (grid.seen[fault]) { return; }
    grid.seen[fault] = true;
    static const char* const names[] = {"race", "out of bounds", "misaligned", "uninitialised", "deadlock"};
    std::string kernel = grid.kernel;
    size_t from = kernel.find("K = "), to = kernel.rfind(']');
    if (from != std::string::npos && to != std::string::npos) { kernel = kernel.substr(from + 4, to - from - 4); }
    char where[160];
    snprintf(where, sizeof(where), ", block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    simt_reports.push_back(SimtReport{fault, kernel, std::string(names[fault]) + ": " + kernel + where + what});
}

// ---- fibers ----

void resume(int to) {
    int from = grid.current;
    if (from == to) { return; }
    grid.current = to;
    unsigned i = (unsigned)to;
    threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    simt_switch(from < 0 ? &grid.host : &fibers[(size_t)from].sp, fibers[(size_t)to].sp);
}

void to_host(void) {
    void* unused;
    int from = grid.current;
    grid.current = -1;
    simt_switch(from < 0 ? &unused : &fibers[(size_t)from].sp, grid.host);
}

void open_warp(int w) {
    grid.warp_waits[w] = 0;
    grid.turn[w] ^= 1;
    if (grid.warp_orders[w]) { grid.warp_epoch[w]++; }
    for (int i = w * 32; i < grid.threads && i < w * 32 + 32; i++) {
        if (fibers[(size_t)i].waiting == AT_WARP_BARRIER) { fibers[(size_t)i].waiting = RUNS; }
    }
}
void open_block(void) {
    grid.waits = 0;
    grid.epoch++;
    for (int w = 0; w < WARPS; w++) { grid.warp_epoch[w]++; }
    for (int i = 0; i < grid.threads; i++) {
        if (fibers[(size_t)i].waiting == AT_BLOCK_BARRIER) { fibers[(size_t)i].waiting = RUNS; }
    }
}

// The next fiber that can run; if none can, they wait for each other
void next(void) {
    for (int k = 1; k <= grid.threads; k++) {
        int i = (grid.current + k) % grid.threads;
        if (fibers[(size_t)i].waiting == RUNS) { resume(i); return; }
    }
    char what[200];
    int block = 0, warp = 0, first_block = -1, first_warp = -1;
    for (int i = 0; i < grid.threads; i++) {
        Waiting x = fibers[(size_t)i].waiting;
        if (x == AT_BLOCK_BARRIER) { block++; first_block = first_block < 0 ? i : first_block; }
        if (x == AT_WARP_BARRIER) { warp++; first_warp = first_warp < 0 ? i : first_warp; }
    }
    snprintf(what, sizeof(what), "%d threads (from %d on) wait at __syncthreads and %d (from %d on) at a warp's barrier or shuffle", block, first_block, warp, first_warp);
    report(SIMT_DEADLOCK, what);
    grid.abandoned = true;
    to_host();
}

void thread_main(void) {
    for (;;) {
        grid.body(grid.arguments);
        int me = grid.current, w = me / 32;
        fibers[(size_t)me].waiting = DONE;
        grid.left--;
        grid.warp_left[w]--;
        if (grid.warp_waits[w] > 0 && grid.warp_waits[w] == grid.warp_left[w]) { open_warp(w); }
        if (grid.waits > 0 && grid.waits == grid.left) { open_block(); }
        if (grid.left == 0) { to_host(); } else { next(); }
    }
}

// ---- memory ----

std::map<uintptr_t, size_t> allocations;  // by address: bytes
uintptr_t last_allocation = 1, last_allocation_end;  // that was looked for

enum { ATOMIC = 1, SEVERAL_LANES = 2, SEVERAL_WARPS = 4 };
struct Access { uint32_t block, epoch, warp_epoch; int16_t thread; uint8_t flags; };  // the last one, and whether others of the warp, or other warps; block 0: none
struct Byte {
    uint32_t launch, written_in;  // of shared memory: the block that has written it
    Access write, read;
};
struct Page { Byte bytes[1024]; };
std::unordered_map<uintptr_t, Page*> pages;  // by address >> 10
uintptr_t last_page_at;
Page* last_page;

Page* page_at(uintptr_t page) {
    Page*& p = pages[page];
    if (p == NULL) { p = (Page*)calloc(1, sizeof(Page)); }
    last_page_at = page;
    return last_page = p;
}

inline Byte* byte_at(uintptr_t a) {
    uintptr_t page = a >> 10;
    Byte* b = &(last_page != NULL && page == last_page_at ? last_page : page_at(page))->bytes[a & 1023];
    if (b->launch != grid.launch) {
        memset((void*)b, 0, sizeof(*b));
        b->launch = grid.launch;
    }
    return b;
}

bool ordered(const Access& earlier, const Access& now) {
    if (earlier.block == 0) { return true; }
    if (earlier.block != now.block) { return false; }
    if (earlier.epoch != now.epoch || (!(earlier.flags & (SEVERAL_LANES | SEVERAL_WARPS)) && earlier.thread == now.thread)) { return true; }
    return !(earlier.flags & SEVERAL_WARPS) && earlier.thread / 32 == now.thread / 32 && earlier.warp_epoch != now.warp_epoch;
}

std::string described(const Access& x) {
    char text[96];
    snprintf(text, sizeof(text), "block number %u, %s %d", x.block - 1, x.flags & (SEVERAL_LANES | SEVERAL_WARPS) ? "threads, among them" : "thread", x.thread);
    return text;
}

// Are the bytes there, to be touched?
bool access(const void* p, size_t n, bool write, bool atomic, bool aligned) {
    if (!watching || grid.current < 0) { return true; }
    uintptr_t a = (uintptr_t)p;
    char text[160];
    const char* does = atomic ? "changes atomically" : write ? "writes" : "reads";
    if (a - (uintptr_t)stacks < SIMT_MOST_THREADS * STACK) {
        if ((int)((a - (uintptr_t)stacks) / STACK) != grid.current) {
            snprintf(text, sizeof(text), "%s another thread's stack at %p", does, p);
            report(SIMT_OUT_OF_BOUNDS, text);
            return false;
        }
        return true;
    }
    if (a - (uintptr_t)&grid < sizeof(grid)) { return true; }  // what lanes show each other
    if (aligned && n <= 16 && (a & (n - 1)) != 0) {
        snprintf(text, sizeof(text), "%s %zu bytes at %p", does, n, p);
        report(SIMT_MISALIGNED, text);
        grid.abandoned = true;  // this CPU would not survive it either
        to_host();
    }
    bool shared = a >= (uintptr_t)&__bss_start && a < (uintptr_t)&_end;
    if (a - (uintptr_t)dynamic_shared < sizeof(dynamic_shared) && a + n > (uintptr_t)dynamic_shared + grid.shared) {
        snprintf(text, sizeof(text), "%s %zu bytes at byte %zu of shared memory, of which the launch asks for %zu", does, n, (size_t)(a - (uintptr_t)dynamic_shared), grid.shared);
        report(SIMT_OUT_OF_BOUNDS, text);
        return false;
    }
    if (!shared) {
        if (a < last_allocation || a + n > last_allocation_end) {
            auto after = allocations.upper_bound(a);
            if (after != allocations.begin()) {
                auto at = std::prev(after);
                last_allocation = at->first;
                last_allocation_end = at->first + at->second;
            }
        }
        if (a < last_allocation || a + n > last_allocation_end) {
            // constants, and the arguments that lie on the launching stack, are for reading
            bool ours = a < (uintptr_t)&_end || a > (uintptr_t)__builtin_frame_address(0) || (a >= (uintptr_t)grid.host && a < (uintptr_t)grid.host + (1 << 20));
            if (write || !ours) {
                snprintf(text, sizeof(text), "%s %zu bytes at %p, which are of no allocation", does, n, p);
                report(SIMT_OUT_OF_BOUNDS, text);
                return false;
            }
            return true;
        }
    } else if ((a >= (uintptr_t)&threadIdx && a < (uintptr_t)(&threadIdx + 1)) || (a >= (uintptr_t)&blockIdx && a < (uintptr_t)(&blockIdx + 1)) ||
               (a >= (uintptr_t)&blockDim && a < (uintptr_t)(&blockDim + 1)) || (a >= (uintptr_t)&gridDim && a < (uintptr_t)(&gridDim + 1))) {
        return true;
    }
    Access now = {grid.block, grid.epoch, grid.warp_epoch[grid.current / 32], (int16_t)grid.current, (uint8_t)(atomic ? ATOMIC : 0)};
    for (size_t k = 0; k < n; k++) {
        Byte* b = byte_at(a + k);
        if (shared) {
            if (b->write.block != now.block) { b->write.block = 0; }  // each block has shared memory of its own
            if (b->read.block != now.block) { b->read.block = 0; }
            if (!write && b->written_in != now.block) {
                snprintf(text, sizeof(text), "reads shared memory at %p that this block has not written, or to which a copy is under way", (const void*)(a + k));
                report(SIMT_UNINITIALISED, text);
            }
        }
        const Access* against[2] = {&b->write, write ? &b->read : NULL};
        for (const Access* earlier : against) {
            if (earlier == NULL || ordered(*earlier, now) || (atomic && (earlier->flags & ATOMIC))) { continue; }
            snprintf(text, sizeof(text), "%s %p, which %s %s, with no barrier between", does, (const void*)(a + k), described(*earlier).c_str(), earlier == &b->read ? "has read" : "has written");
            report(SIMT_RACE, text);
        }
        if (write) {
            b->write = now;
            b->written_in = now.block;
        } else {
            Access before = b->read;
            b->read = now;
            if (before.block != now.block || before.epoch != now.epoch) { continue; }
            uint8_t others = before.thread / 32 != now.thread / 32 ? SEVERAL_WARPS : before.thread != now.thread ? SEVERAL_LANES : 0;
            b->read.flags = (uint8_t)((now.flags & before.flags & ATOMIC) | (before.flags & (SEVERAL_LANES | SEVERAL_WARPS)) | others);
        }
    }
    return true;
}

}  // namespace

void simt_clear(void) { simt_reports.clear(); }
void simt_allocated(void* p, size_t bytes) {
    allocations[(uintptr_t)p] = bytes;
    last_allocation = 1;
    last_allocation_end = 0;
}
void simt_limit(void* p, size_t bytes) { simt_allocated(p, bytes); }
void simt_freed(void* p) {
    allocations.erase((uintptr_t)p);
    last_allocation = 1;
    last_allocation_end = 0;
}
int simt_lane(void) { return grid.current % 32; }

void simt_run(const char* kernel, dim3 size, dim3 block, size_t shared, void (*body)(const void*), const void* arguments) {
    static uint32_t launches = 0;
    grid = Grid{};
    grid.kernel = kernel;
    grid.body = body;
    grid.arguments = arguments;
    grid.launch = ++launches;
    grid.threads = (int)(block.x * block.y * block.z);
    grid.shared = shared;
    gridDim = size;
    blockDim = block;
    if (grid.threads < 1 || grid.threads > SIMT_MOST_THREADS) {
        fprintf(stderr, "simt: %d threads in a block; allowed: 1 to %d\n", grid.threads, SIMT_MOST_THREADS);
        abort();
    }
    if (shared > SIMT_MOST_SHARED) {
        fprintf(stderr, "simt: %zu bytes of shared memory; allowed: up to %zu\n", shared, SIMT_MOST_SHARED);
        abort();
    }
    if (stacks == NULL) { stacks = (char*)aligned_alloc(4096, SIMT_MOST_THREADS * STACK); }
    fibers.resize(SIMT_MOST_THREADS, Fiber{NULL, DONE, 0, {}});
    watching = true;
    for (unsigned z = 0; z < size.z; z++) {
        for (unsigned y = 0; y < size.y; y++) {
            for (unsigned x = 0; x < size.x && !grid.abandoned; x++) {
                blockIdx = dim3(x, y, z);
                grid.block++;
                grid.left = grid.threads;
                grid.epoch = 1;
                grid.waits = 0;
                for (int w = 0; w < WARPS; w++) {
                    grid.warp_epoch[w] = 1;
                    grid.warp_waits[w] = grid.warp_left[w] = 0;
                }
                for (int i = 0; i < grid.threads; i++) {
                    Fiber* f = &fibers[(size_t)i];
                    void** sp = (void**)(stack_of(i) + STACK - 256) - SAVED - 1;
                    memset((void*)sp, 0, (size_t)(SAVED + 1) * sizeof(void*));
                    sp[RETURN] = (void*)thread_main;
                    f->sp = sp;
                    f->waiting = RUNS;
                    f->group = 0;
                    f->copies.clear();
                    grid.warp_left[i / 32]++;
                }
                grid.current = -1;
                resume(0);
            }
        }
    }
    watching = false;
    grid.current = -1;
}

void simt_block_barrier(void) {
    fibers[(size_t)grid.current].waiting = AT_BLOCK_BARRIER;
    if (++grid.waits == grid.left) { open_block(); return; }
    next();
}
static void warp_meets(bool orders) {
    int w = grid.current / 32;
    fibers[(size_t)grid.current].waiting = AT_WARP_BARRIER;
    grid.warp_orders[w] = orders;
    if (++grid.warp_waits[w] == grid.warp_left[w]) { open_warp(w); return; }
    next();
}
void simt_warp_barrier(void) { warp_meets(true); }
const void* simt_exchange(const void* mine, size_t bytes, bool orders) {
    int w = grid.current / 32, turn = grid.turn[w];
    unsigned char* slot = grid.lanes[w][turn][grid.current % 32];
    memset(slot, 0, SIMT_SHOWN);
    memcpy(slot, mine, bytes);
    warp_meets(orders);
    return grid.lanes[w][turn];
}

unsigned char* simt_dynamic_shared(void) { return dynamic_shared; }

// ---- tensor cores ----

void simt_ldmatrix(uint32_t* r, const void* row, bool turned) {
    unsigned char mine[16] = {};
    if (access(row, 16, false, false, true)) { memcpy(mine, row, 16); }
    const unsigned char* shown = (const unsigned char*)simt_exchange(mine, 16, false);
    int g = simt_lane() / 4, t = simt_lane() % 4;
    auto element = [=](int matrix, int i, int j) {
        uint16_t x;
        memcpy(&x, shown + (size_t)(8 * matrix + i) * SIMT_SHOWN + (size_t)j * 2, 2);
        return (uint32_t)x;
    };
    for (int k = 0; k < 4; k++) {
        r[k] = turned ? element(k, 2 * t, g) | element(k, 2 * t + 1, g) << 16 : element(k, g, 2 * t) | element(k, g, 2 * t + 1) << 16;
    }
}

// Row r of a is held by lanes 4(r % 8) …, column c of b by lanes 4c …: elements k and k + 1 (k % 8 = 2t) by the t-th of them; r >= 8 and k >= 8 lie in later words.
void simt_mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    struct { uint32_t a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const unsigned char* shown = (const unsigned char*)simt_exchange(&mine, sizeof(mine), false);
    auto element = [=](int lane, int word, int half) {
        uint16_t bits;
        memcpy(&bits, shown + (size_t)lane * SIMT_SHOWN + (size_t)word * 4 + (size_t)half * 2, 2);
        uint32_t wide = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    };
    int g = simt_lane() / 4, t = simt_lane() % 4;
    float row[2][16], column[2][16];  // g and g + 8; 2t and 2t + 1
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 16; k++) {
            row[i][k] = element(4 * g + k % 8 / 2, i + k / 8 * 2, k % 2);
            column[i][k] = element(4 * (2 * t + i) + k % 8 / 2, 4 + k / 8, k % 2);
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 16; k++) { d[i] += row[i / 2][k] * column[i % 2][k]; }
    }
}

void simt_copy(void* shared, const void* global, size_t bytes, bool there) {
    Fiber* f = &fibers[(size_t)grid.current];
    if (!access(shared, bytes, true, false, true)) { return; }
    for (size_t k = 0; k < bytes; k++) { byte_at((uintptr_t)shared + k)->written_in = 0; }
    memset(shared, 0xff, bytes);
    f->copies.push_back(Copy{shared, there ? global : NULL, bytes, f->group});
}
void simt_copy_commit(void) { fibers[(size_t)grid.current].group++; }
void simt_copy_wait(int pending) {
    Fiber* f = &fibers[(size_t)grid.current];
    size_t done = 0;
    while (done < f->copies.size() && f->copies[done].group + pending < f->group) {
        const Copy& c = f->copies[done++];
        if (c.global != NULL) {
            if (access(c.global, c.bytes, false, false, true)) { memcpy(c.shared, c.global, c.bytes); }
        } else {
            memset(c.shared, 0, c.bytes);
        }
        access(c.shared, c.bytes, true, false, true);
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + (ptrdiff_t)done);
}

// ---- what the compiler calls ----

extern "C" {
void __tsan_init(void) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define ACCESSES(n) \
    void __tsan_read##n(void* p) { access(p, n, false, false, true); } \
    void __tsan_write##n(void* p) { access(p, n, true, false, true); } \
    void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, false); } \
    void __tsan_unaligned_write##n(void* p) { access(p, n, true, false, false); } \
    void __tsan_volatile_read##n(void* p) { access(p, n, false, false, true); } \
    void __tsan_volatile_write##n(void* p) { access(p, n, true, false, true); } \
    void __tsan_unaligned_volatile_read##n(void* p) { access(p, n, false, false, false); } \
    void __tsan_unaligned_volatile_write##n(void* p) { access(p, n, true, false, false); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long n) { access(p, n, false, false, false); }
void __tsan_write_range(void* p, unsigned long n) { access(p, n, true, false, false); }

#define ATOMICS(bits, T) \
    T __tsan_atomic##bits##_load(const volatile T* p, int) { access((const void*)p, sizeof(T), false, true, true); return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
    void __tsan_atomic##bits##_store(volatile T* p, T v, int) { access((const void*)p, sizeof(T), true, true, true); __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
    T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { access((const void*)p, sizeof(T), true, true, true); return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* seen, T v, int, int) { \
        access((const void*)p, sizeof(T), true, true, true); \
        return __atomic_compare_exchange_n(p, seen, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    } \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* seen, T v, int a, int b) { return __tsan_atomic##bits##_compare_exchange_strong(p, seen, v, a, b); }
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
