// bench_attention.cu: attention's operations a second on a GPU, by flash.cuh.
//
//     bench_attention [JSON]     JSON: a file to which a line a shape is added
//
// 16,384 tokens of 2,048 channels (or as many as whole heads have). Operations are counted as is customary: 4·T²·hs a head forward, 2.5 times that backward (though ours makes S and dP twice),
// half of it where it is causal.
#include "core/attention.cuh"
#include <algorithm>

#ifdef USE_CUDA

int main(int argc, char** argv) {
    if (device_count() == 0) { die("bench_attention needs a GPU"); }
    if (device_capability() < 80 || !flash_is_built()) {
        printf("attention by matmuls: this GPU, or what this was built for, is older than 8.0\n");
        return 0;
    }
    FILE* json = argc > 1 ? fopen(argv[1], "a") : NULL;
    if (argc > 1 && json == NULL) { die("%s cannot be opened for writing: %s", argv[1], strerror(errno)); }
    Stream s = stream_create();
    Event begin = timed_event_create(), end = timed_event_create();
    const int tokens = 16384, C = 2048;
    size_t n = (size_t)tokens * C;
    bf16 *qkv = (bf16*)device_alloc(6 * n), *out = (bf16*)device_alloc(2 * n), *dout = (bf16*)device_alloc(2 * n), *dqkv = (bf16*)device_alloc(6 * n);
    float *lse = (float*)device_alloc(4 * n / 32), *delta = (float*)device_alloc(4 * n / 32);
    run_rows(FillRandom<bf16>{qkv, 3 * n, random_key(1, 0, 0)}, (int)(3 * n / FillRandom<bf16>::ROW), s);
    run_rows(FillRandom<bf16>{dout, n, random_key(1, 0, 1)}, (int)(n / FillRandom<bf16>::ROW), s);
    printf("%-12s %-8s %6s %8s %14s %14s\n", "head size", "by", "T", "causal", "forward", "backward");
    for (int hs : {32, 64, 96, 128}) {
        const char* by = flash_kernels(hs) == FLASH_HOPPER ? "wgmma" : "mma";
        for (int T : {2048, 8192}) {
            for (bool causal : {false, true}) {
                int B = tokens / T, heads = C / hs;
                double flops = 4.0 * T * (double)tokens * heads * hs / (causal ? 2.0 : 1.0), rate[2];
                for (int backward = 0; backward < 2; backward++) {
                    auto call = [&] {
                        if (backward == 0) { flash_forward(out, lse, qkv, causal, B, T, heads, hs, s); }
                        else { flash_backward(dqkv, delta, dout, out, qkv, lse, NULL, causal, B, T, heads, hs, s); }
                    };
                    std::vector<double> ms;
                    call();
                    for (int k = 0; k < 11; k++) {
                        event_record(begin, s);
                        call();
                        event_record(end, s);
                        event_wait(end);
                        ms.push_back(event_milliseconds(begin, end));
                    }
                    std::sort(ms.begin(), ms.end());
                    rate[backward] = 1e-9 * flops * (backward == 0 ? 1.0 : 2.5) / ms[ms.size() / 2];
                }
                printf("%-12d %-8s %6d %8s %8.0f TF/s %8.0f TF/s\n", hs, by, T, causal ? "yes" : "no", rate[0], rate[1]);
                if (json != NULL) {
                    fprintf(json, "{\"bench\": \"attention\", \"head_size\": %d, \"by\": \"%s\", \"seq_len\": %d, \"causal\": %s, \"forward_tflops\": %.1f, \"backward_tflops\": %.1f}\n", hs, by,
                            T, causal ? "true" : "false", rate[0], rate[1]);
                }
            }
        }
    }
    return 0;
}

#else

int main(void) { die("bench_attention measures a GPU: build it with make DEVICE=cuda"); }

#endif
