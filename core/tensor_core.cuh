// tensor_core.cuh: the instructions of tile kernels that C++ has no words for: copies into shared memory that run beside the arithmetic, and quick conversions.
// flash_hopper.cuh adds Hopper's matrix products.
#pragma once
#include "device.cuh"
#ifdef GPU_FORM

#ifdef SIMT

GPU float exp2_fast(float x) { return exp2f(x); }
GPU uint32_t pack_bf16(float low, float high) {
    bf16 a, b;
    from_float(a, low);
    from_float(b, high);
    return (uint32_t)a.bits | (uint32_t)b.bits << 16;
}

#else

GPU uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// 16 or 4 bytes to shared memory, zeros where they are not `there`. They have arrived once cp_async_wait says so, and for other threads after a barrier.
GPU void cp_async_16(uint32_t shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared), "l"(global), "r"(there ? 16 : 0) : "memory");
}
GPU void cp_async_4(uint32_t shared, const void* global, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(shared), "l"(global), "r"(there ? 4 : 0) : "memory");
}
// Closes a group of copies.
GPU void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last PENDING groups have arrived.
template <int PENDING> GPU void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }
// 2^x within 2 units in the last place; -inf gives 0
GPU float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two elements as a word, each rounded to nearest even
GPU uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

#endif
#endif
