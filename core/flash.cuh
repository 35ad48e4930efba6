// flash.cuh: attention in which no score leaves the chip, by the kernels that suit the GPU: those of flash_hopper.cuh where the code was built for 9.0a and runs
// there, those of flash_mma.cuh on other GPUs from 8.0 on, and for the head sizes that the former lack. The emulator runs the latter.
#pragma once
#include "flash_hopper.cuh"
#include "flash_mma.cuh"

// Which heads of which activations there are kernels for
static inline bool flash_takes(DType act, int head_size, int capability) {
    return act == BF16 && (head_size == 32 || head_size == 64 || head_size == 96 || head_size == 128) && capability >= 80;
}

#ifdef GPU_FORM

enum FlashKernels { FLASH_NONE, FLASH_MMA, FLASH_HOPPER };

// Which kernels the code that the selected GPU runs was built with
__global__ void flash_built_kernel(int* built) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    *built = FLASH_HOPPER;
#elif defined(MMA_THERE)
    *built = FLASH_MMA;
#else
    *built = FLASH_NONE;
#endif
}
static inline FlashKernels flash_built(void) {
    static int built = -1;
    if (built < 0) {
        int* d = (int*)device_alloc(sizeof(int));
        launch(flash_built_kernel, dim3(1), dim3(1), 0, (Stream)NULL, d);
        copy_to_host(&built, d, sizeof(int), NULL);
        device_free(d);
    }
    return (FlashKernels)built;
}
static inline bool flash_is_built(void) { return flash_built() != FLASH_NONE; }
static inline FlashKernels flash_kernels(int head_size) {
    FlashKernels built = flash_built();
    return built == FLASH_HOPPER && head_size != 64 && head_size != 128 ? FLASH_MMA : built;
}

// out (B, T, C) and lse (B, heads, T) = logsumexp of the scores over √hs from qkv (B, T, 3C), positions applied
static inline void flash_forward(bf16* out, float* lse, const bf16* qkv, bool causal, int B, int T, int heads, int head_size, Stream s) {
#ifdef USE_CUDA
    if (flash_kernels(head_size) == FLASH_HOPPER) {
        hopper_forward(out, lse, qkv, causal, B, T, heads, head_size, s);
        return;
    }
#endif
    mma_forward(out, lse, qkv, causal, B, T, heads, head_size, s);
}

// dqkv (B, T, 3C) from dout and out (B, T, C), qkv and lse; queries' and keys' gradients are turned back by `rotary` (2, T, hs/2), cos, then sin, if it is given.
// delta (B, heads, T) is workspace.
static inline void flash_backward(bf16* dqkv, float* delta, const bf16* dout, const bf16* out, const bf16* qkv, const float* lse, const float* rotary, bool causal,
                                  int B, int T, int heads, int head_size, Stream s) {
    int64_t all = (int64_t)B * T * heads;
    launch(flash_delta_kernel, dim3((unsigned)((all + 7) / 8)), dim3(256), 0, s, delta, dout, out, T, heads, head_size, all);
    FlashBackward a = {dqkv, dout, qkv, lse, delta, rotary, 1.0f / sqrtf((float)head_size), T, heads};
#ifdef USE_CUDA
    if (flash_kernels(head_size) == FLASH_HOPPER) {
        hopper_backward(a, causal, B, head_size, s);
        return;
    }
#endif
    mma_backward(a, causal, B, head_size, s);
}

#endif
