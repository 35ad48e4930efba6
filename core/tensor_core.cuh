// tensor_core.cuh: the instructions of tile kernels that C++ has no words for: copies into shared memory that run beside the arithmetic, matrix products of a
// warp and the loading of their fragments, and quick conversions. flash_hopper.cuh adds Hopper's matrix products.
//
// A fragment is a lane's part of a matrix, two BF16 elements a word. With g = lane / 4, t = lane % 4 and column pairs 2t, 2t + 1:
//     a (16, 16)  words of rows g and g + 8 of the left half, then of the right one
//     b (16, 8)   words of column g: rows 2t, 2t + 1, then 2t + 8, 2t + 9
//     d (16, 8)   floats: row g's pair, then row g + 8's
#pragma once
#include "device.cuh"
#ifdef GPU_FORM

#ifdef SIMT

typedef uintptr_t SharedAddress;
GPU SharedAddress shared_address(const void* p) { return (SharedAddress)p; }
GPU void cp_async_16(SharedAddress shared, const void* global, bool there) { simt_copy((void*)shared, global, 16, there); }
GPU void cp_async_4(SharedAddress shared, const void* global, bool there) { simt_copy((void*)shared, global, 4, there); }
GPU void cp_async_commit() { simt_copy_commit(); }
template <int PENDING> GPU void cp_async_wait() { simt_copy_wait(PENDING); }
GPU void ldmatrix(uint32_t (&r)[4], SharedAddress row) { simt_ldmatrix(r, (const void*)row, false); }
GPU void ldmatrix_turned(uint32_t (&r)[4], SharedAddress row) { simt_ldmatrix(r, (const void*)row, true); }
GPU void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) { simt_mma_bf16(d, a, b); }
GPU float exp2_fast(float x) { return exp2f(x); }
GPU uint32_t pack_bf16(float low, float high) {
    bf16 a, b;
    from_float(a, low);
    from_float(b, high);
    return (uint32_t)a.bits | (uint32_t)b.bits << 16;
}

#else

typedef uint32_t SharedAddress;
GPU SharedAddress shared_address(const void* p) { return (SharedAddress)__cvta_generic_to_shared(p); }
// 16 or 4 bytes to shared memory, zeros where they are not `there`. They have arrived once cp_async_wait says so, and for other threads after a barrier.
GPU void cp_async_16(SharedAddress shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared), "l"(global), "r"(there ? 16 : 0) : "memory");
}
GPU void cp_async_4(SharedAddress shared, const void* global, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(shared), "l"(global), "r"(there ? 4 : 0) : "memory");
}
// Closes a group of copies.
GPU void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last PENDING groups have arrived.
template <int PENDING> GPU void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }
// Four matrices of 8 × 8 elements as words of a fragment: lanes 8k … 8k + 7 point at the rows of matrix k, of which a lane gets row g's pair; `turned`: column g's
GPU void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
GPU void ldmatrix_turned(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// d (16, 8) += a (16, 16) · b (16, 8)
GPU void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
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
