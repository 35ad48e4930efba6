// bench_kernels.cu: what the kernels between the matmuls reach of a GPU's memory bandwidth.
//
//     bench_kernels [JSON]     JSON: a file to which a line a kernel is added
//
// Each kernel is timed by itself at the shapes of a 7B and a 124M model, on buffers that take turns so that none is still in the cache, and its bytes (each
// input read once, each output written once) are set against a copy within the device's memory, bytes read and written.
#include "fp8_kernels.cuh"
#include "core/attention.cuh"
#include <algorithm>
#include <functional>

#ifdef USE_CUDA

constexpr size_t POOL = (size_t)4 << 30;  // bytes that buffers are taken from, again and again

struct Bench {
    Stream stream;
    Event begin, end;
    char* pool;
    size_t next;
    float *slot, *small, *copied;
    uint32_t* amax;
    double copy;         // bytes a second
    const char* shape;
    FILE* json;
};

// The next stretch of the pool; what is there are finite BF16 numbers
static char* take(Bench* b, double bytes) {
    size_t n = round_up((size_t)bytes, (size_t)256);
    if (b->next + n > POOL) { b->next = 0; }
    char* p = b->pool + b->next;
    b->next += n;
    return p;
}

static double seconds_of(Bench* b, const std::function<void()>& call) {
    std::vector<double> ms;
    call();
    for (int k = 0; k < 15; k++) {
        event_record(b->begin, b->stream);
        call();
        event_record(b->end, b->stream);
        event_wait(b->end);
        ms.push_back(event_milliseconds(b->begin, b->end));
    }
    std::sort(ms.begin(), ms.end());
    return 1e-3 * ms[ms.size() / 2];
}

static void show(Bench* b, const char* name, double bytes, const std::function<void()>& call) {
    double seconds = seconds_of(b, call), share = bytes / seconds / b->copy;
    printf("%-5s %-44s %8.1f us %7.0f GB/s %6.0f %%\n", b->shape, name, 1e6 * seconds, 1e-9 * bytes / seconds, 100.0 * share);
    if (b->json != NULL) {
        fprintf(b->json, "{\"bench\": \"kernel\", \"shape\": \"%s\", \"kernel\": \"%s\", \"us\": %.2f, \"gb_s\": %.1f, \"of_copy\": %.3f}\n", b->shape, name, 1e6 * seconds,
                1e-9 * bytes / seconds, share);
    }
}

static void kernels(Bench* b, const char* shape, int rows, int C, int vocab) {
    b->shape = shape;
    double n = (double)rows * C;
    auto t16 = [=](double k) { return (bf16*)take(b, 2.0 * k * n); };
    auto t8 = [=](double k) { return take(b, k * n); };
    float *mean = b->small, *rstd = mean + rows, *partial = rstd + rows, *grad = partial + (size_t)strips_of(rows) * 8 * C;
    const bf16 *gain = (const bf16*)b->pool, *bias = gain;
    Sites sites = {};
    sites.amax = sites.current = b->amax;
    sites.slots = b->slot;
    Quantisation q = {&sites, 0, false, true, false, NULL};
    show(b, "copy of BF16", 4.0 * n, [&] { device_copy(t16(1), t16(1), (size_t)(2.0 * n), b->stream); });
    show(b, "LayerNorm to E4M3, residual added", 7.0 * n, [&] {
        layernorm_forward(Tensor{t8(1), E4M3, b->slot + 4}, LayerNormInputs{t16(1), t16(1), t16(1), gain, bias, mean, rstd}, BF16, q, NULL, rows, C, b->stream);
    });
    show(b, "LayerNorm backward", 8.0 * n, [&] {
        layernorm_backward(t16(1), grad, grad, partial, t16(1), LayerNormInputs{NULL, t16(1), NULL, gain, bias, mean, rstd}, BF16, true, false, rows, C, b->stream);
    });
    auto cast = [&](Tensor out, int k, float* sums) {
        const bf16* x = t16(k);
        produce(out, sums, [=](auto) { return TensorSource<bf16>{x}; }, BF16, q, NULL, rows, k * C, b->stream);
        if (sums != NULL) { finish_columns(grad, sums, strips_of(rows), k * C, false, b->stream); }
    };
    show(b, "cast to E4M3", 3.0 * n, [&] { cast(Tensor{t8(1), E4M3, b->slot + 4}, 1, NULL); });
    show(b, "cast to E4M3, transposed", 3.0 * n, [&] { cast(Tensor{NULL, E4M3, b->slot + 4, t8(1), rows}, 1, NULL); });
    show(b, "cast to E5M2, transposed too, columns added", 4.0 * 3.0 * n, [&] { cast(Tensor{t8(3), E5M2, b->slot + 4, t8(3), rows}, 3, partial); });
    show(b, "GELU to E4M3", 3.0 * 4.0 * n, [&] {
        const bf16* x = t16(4);
        produce(Tensor{t8(4), E4M3, b->slot + 4}, NULL, [=](auto) { return GeluSource<bf16>{x}; }, BF16, q, NULL, rows, 4 * C, b->stream);
    });
    show(b, "GELU backward to E5M2, transposed, columns", 6.0 * 4.0 * n, [&] {
        const bf16 *x = t16(4), *dy = t16(4);
        produce(Tensor{t8(4), E5M2, b->slot + 4, t8(4), rows}, partial, [=](auto) { return GeluGradSource<bf16>{dy, x}; }, BF16, q, NULL, rows, 4 * C, b->stream);
        finish_columns(grad, partial, strips_of(rows), 4 * C, false, b->stream);
    });
    show(b, "rotation of queries and keys", 8.0 * n, [&] { run_rows(RotateInPlace<bf16>{t16(3), b->small, b->small, 1024, C / 64, 64}, rows, b->stream); });
    int head = 1024;
    double logits = (double)head * vocab;
    show(b, "loss and its gradient", 6.0 * logits, [&] {
        bf16* z = (bf16*)take(b, 2.0 * logits);
        run_rows(LogitStatistics<bf16>{partial, z, (const int*)b->copied, 0, vocab, vocab}, head, b->stream);
        run_rows(CrossEntropy<bf16>{mean, z, partial, 1, 0, (const int*)b->copied, 1.0f, 0, vocab, vocab, true}, head, b->stream);
    });
    show(b, "gradient added to BF16, stochastic", 6.0 * n, [&] {
        add_gradient(BF16, t16(1), t16(1), BF16, NULL, NULL, STOCHASTIC, random_key(1, 2, 3), ElementMap{}, 0, (size_t)n, true, b->stream);
    });
}

int main(int argc, char** argv) {
    if (device_count() == 0) { die("bench_kernels needs a GPU"); }
    Bench b = {};
    b.json = argc > 1 ? fopen(argv[1], "a") : NULL;
    if (argc > 1 && b.json == NULL) { die("%s cannot be opened for writing: %s", argv[1], strerror(errno)); }
    b.stream = stream_create();
    b.begin = timed_event_create();
    b.end = timed_event_create();
    b.pool = (char*)device_alloc(POOL);
    b.slot = (float*)device_alloc(64);
    b.small = (float*)device_alloc((size_t)256 << 20);
    b.copied = (float*)device_alloc(1 << 20);
    b.amax = (uint32_t*)device_alloc(64);
    device_zero(b.amax, 64, b.stream);
    device_zero(b.copied, 1 << 20, b.stream);
    run_rows(ResetSlots{b.slot}, 4, b.stream);
    run_rows(FillRandom<bf16>{(bf16*)b.pool, POOL / 2, random_key(1, 0, 0)}, (int)(POOL / 2 / FillRandom<bf16>::ROW), b.stream);
    run_rows(FillRandom<float>{b.small, (size_t)64 << 20, random_key(1, 0, 1)}, (int)(((size_t)64 << 20) / FillRandom<float>::ROW), b.stream);
    b.copy = 1.0;
    b.copy = 2.0 * (double)(POOL / 2) / seconds_of(&b, [&] { device_copy(b.pool, b.pool + POOL / 2, POOL / 2, b.stream); });
    printf("copy: %.0f GB/s\n", 1e-9 * b.copy);
    kernels(&b, "7B", 4096, 4096, 50304);
    kernels(&b, "124M", 16384, 768, 50304);
    return 0;
}

#else

int main(void) { die("bench_kernels measures a GPU: build it with make DEVICE=cuda"); }

#endif
