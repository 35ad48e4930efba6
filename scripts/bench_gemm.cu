// bench_gemm.cu: what FP8 gains over BF16 in the linear layers of a GPT, on a GPU, with all that FP8 costs beside the product: casts and transposes.
//
//     bench_gemm [JSON]     JSON: a file to which a line a layer is added
//
// First the ceilings: a copy within the device's memory (bytes read and written), and a large product in either precision. Then, for each linear layer of
// the models, its three products Y = X·Wᵀ, dX = dY·W, dW = dYᵀ·X in milliseconds, the rate of the three, and the casts that FP8 needs of X and dY (under
// delayed scaling, from BF16, each transposed too, dY with its bias gradient; BF16 needs the bias gradient too). `gain` is BF16's time over FP8's, casts included.
#include "fp8_kernels.cuh"
#include "core/matmul.cuh"
#include <algorithm>
#include <functional>

#ifdef USE_CUDA

struct Bench {
    Matmul matmul;
    Stream stream;
    Event begin, end;
    void *x, *dy, *w, *y, *dw, *x8, *dy8, *w8, *other;
    float *slot, *partial, *bias_grad;
    uint32_t* amax;
    FILE* json;
};

constexpr size_t LARGEST = (size_t)1 << 30;  // bytes of a buffer

// Milliseconds of one call: the median of several stretches of calls
static double milliseconds(Bench* b, const std::function<void()>& call) {
    call();
    call();
    event_record(b->begin, b->stream);
    call();
    event_record(b->end, b->stream);
    event_wait(b->end);
    int calls = (int)max_of(2.0, min_of(50.0, 4.0 / max_of(event_milliseconds(b->begin, b->end), 1e-3)));
    std::vector<double> ms;
    for (int k = 0; k < 5; k++) {
        event_record(b->begin, b->stream);
        for (int i = 0; i < calls; i++) { call(); }
        event_record(b->end, b->stream);
        event_wait(b->end);
        ms.push_back(event_milliseconds(b->begin, b->end) / calls);
    }
    std::sort(ms.begin(), ms.end());
    return ms[2];
}

static void fill(Bench* b, void* data, size_t bytes, uint64_t id) {
    run_rows(FillRandom<bf16>{(bf16*)data, bytes / 2, random_key(1, 0, id)}, (int)ceil_div(bytes / 2, FillRandom<bf16>::ROW), b->stream);
}

static Operand operand(const Bench* b, const void* data, DType t, int64_t ld, bool transposed) { return Operand{data, t, is_fp8(t) ? b->slot : NULL, ld, 0, transposed}; }

// The product `which` of a linear layer (in -> out) on so many tokens: 0 forward, 1 input gradient, 2 weight gradient
static double product(Bench* b, int which, bool fp8, int tokens, int in, int out) {
    DType f = fp8 ? E4M3 : BF16, g = fp8 ? E5M2 : BF16;
    void *x = fp8 ? b->x8 : b->x, *dy = fp8 ? b->dy8 : b->dy, *w = fp8 ? b->w8 : b->w;
    MatmulCall c = {};
    c.batch = 1;
    c.d_dtype = which == 2 ? FP32 : BF16;
    if (which == 0) {
        c.d = b->y; c.m = tokens; c.n = out; c.k = in;
        c.a = operand(b, x, f, in, false);
        c.b = operand(b, w, f, in, true);
        c.bias = b->other; c.bias_dtype = BF16;
        c.fast_accumulate = true;
    } else if (which == 1) {
        c.d = b->y; c.m = tokens; c.n = in; c.k = out;
        c.a = operand(b, dy, g, out, false);
        c.b = operand(b, w, f, in, false);
    } else {
        c.d = b->dw; c.m = out; c.n = in; c.k = tokens;
        c.a = fp8 ? operand(b, dy, g, tokens, false) : operand(b, dy, g, out, true);  // in FP8 the casts bring them transposed
        c.b = fp8 ? operand(b, x, f, tokens, true) : operand(b, x, f, in, false);
    }
    c.d_ld = c.n;
    return milliseconds(b, [&] { matmul(&b->matmul, &c, b->stream); });
}

static double cast_ms(Bench* b, bool fp8, bool with_bias, int tokens, int C) {
    if (!fp8 && !with_bias) { return 0.0; }
    void* from = with_bias ? b->dy : b->x;
    void* to = with_bias ? b->dy8 : b->x8;
    return milliseconds(b, [&] {
        TensorSource<bf16> source = {(const bf16*)from};
        float* partial = with_bias ? b->partial : NULL;
        if (!fp8) { produce_launch<bf16>((bf16*)NULL, (uint32_t*)NULL, partial, source, (const float*)NULL, tokens, C, b->stream); }
        else if (with_bias) { produce_launch<bf16>((e5m2*)to, b->amax, partial, source, b->slot + 1, tokens, C, b->stream, b->other, tokens); }
        else { produce_launch<bf16>((e4m3*)to, b->amax, partial, source, b->slot + 1, tokens, C, b->stream, b->other, tokens); }
        if (with_bias) { finish_columns(b->bias_grad, b->partial, strips_of(tokens), C, false, b->stream); }
    });
}

static void linear(Bench* b, const char* model, const char* name, int tokens, int in, int out) {
    double ms[2][3], sum[2] = {0.0, 0.0}, casts[2];
    for (int fp8 = 0; fp8 < 2; fp8++) {
        for (int which = 0; which < 3; which++) { sum[fp8] += ms[fp8][which] = product(b, which, fp8 != 0, tokens, in, out); }
        casts[fp8] = cast_ms(b, fp8 != 0, false, tokens, in) + cast_ms(b, fp8 != 0, true, tokens, out);
    }
    double flops = 6.0 * tokens * in * out, gain = (sum[0] + casts[0]) / (sum[1] + casts[1]);
    printf("%-5s %-7s %6d %6d %6d  %7.3f %7.3f %7.3f %6.0f  %7.3f %7.3f %7.3f %6.0f  %7.3f %7.3f  %5.2f\n", model, name, tokens, in, out, ms[0][0], ms[0][1], ms[0][2],
           1e-9 * flops / sum[0], ms[1][0], ms[1][1], ms[1][2], 1e-9 * flops / sum[1], casts[0], casts[1], gain);
    if (b->json != NULL) {
        fprintf(b->json, "{\"bench\": \"gemm\", \"model\": \"%s\", \"layer\": \"%s\", \"tokens\": %d, \"in\": %d, \"out\": %d, \"bf16_ms\": %.4f, \"bf16_tflops\": %.1f, "
                "\"fp8_ms\": %.4f, \"fp8_tflops\": %.1f, \"bf16_cast_ms\": %.4f, \"fp8_cast_ms\": %.4f, \"gain\": %.3f}\n", model, name, tokens, in, out, sum[0],
                1e-9 * flops / sum[0], sum[1], 1e-9 * flops / sum[1], casts[0], casts[1], gain);
    }
}

int main(int argc, char** argv) {
    if (device_count() == 0) { die("bench_gemm needs a GPU"); }
    Bench b = {};
    b.json = argc > 1 ? fopen(argv[1], "a") : NULL;
    if (argc > 1 && b.json == NULL) { die("%s cannot be opened for writing: %s", argv[1], strerror(errno)); }
    b.stream = stream_create();
    b.begin = timed_event_create();
    b.end = timed_event_create();
    void** const buffers[] = {&b.x, &b.dy, &b.w, &b.y, &b.dw, &b.x8, &b.dy8, &b.w8, &b.other};
    for (void** p : buffers) { *p = device_alloc(LARGEST); }
    b.slot = (float*)device_alloc(16);
    b.partial = (float*)device_alloc(LARGEST);
    b.bias_grad = (float*)device_alloc(1 << 20);
    b.amax = (uint32_t*)device_alloc(4);
    device_zero(b.amax, 4, b.stream);
    run_rows(ResetSlots{b.slot}, 1, b.stream);
    uint64_t id = 0;
    for (void** p : buffers) { fill(&b, *p, LARGEST, id++); }
    TensorSource<bf16> source = {(const bf16*)b.x};  // codes are casts of what is in x, so that none is NaN
    for (void* p : {b.x8, b.w8}) { produce_launch<bf16>((e4m3*)p, b.amax, (float*)NULL, source, b.slot + 1, 1 << 17, 4096, b.stream); }
    produce_launch<bf16>((e5m2*)b.dy8, b.amax, (float*)NULL, source, b.slot + 1, 1 << 17, 4096, b.stream);
    matmul_create(&b.matmul);
    size_t workspace = (size_t)1 << 30;
    matmul_set_workspace(&b.matmul, device_alloc(workspace), workspace);

    char name[256];
    device_name(name, sizeof(name));
    double copy = 2.0 * (double)LARGEST / milliseconds(&b, [&] { device_copy(b.other, b.x, LARGEST, b.stream); });
    double rates[2];
    for (int fp8 = 0; fp8 < 2; fp8++) { rates[fp8] = 2.0 * 8192.0 * 8192.0 * 8192.0 / product(&b, 0, fp8 != 0, 8192, 8192, 8192); }
    printf("%s: copy %.0f GB/s, product of 8192 x 8192 x 8192: BF16 %.0f, FP8 %.0f TFLOP/s\n", name, 1e-6 * copy, 1e-9 * rates[0], 1e-9 * rates[1]);
    if (b.json != NULL) {
        fprintf(b.json, "{\"bench\": \"ceilings\", \"copy_gb_s\": %.1f, \"bf16_tflops\": %.1f, \"fp8_tflops\": %.1f}\n", 1e-6 * copy, 1e-9 * rates[0], 1e-9 * rates[1]);
    }
    printf("%-5s %-7s %6s %6s %6s  %7s %7s %7s %6s  %7s %7s %7s %6s  %7s %7s  %5s\n", "", "", "", "", "", "BF16 ms", "", "", "", "FP8 ms", "", "", "", "beside", "", "");
    printf("%-5s %-7s %6s %6s %6s  %7s %7s %7s %6s  %7s %7s %7s %6s  %7s %7s  %5s\n", "model", "layer", "tokens", "in", "out", "Y", "dX", "dW", "TF/s", "Y", "dX", "dW", "TF/s",
           "BF16", "FP8", "gain");
    const struct { const char* model; int tokens, C; } models[] = {{"124M", 16384, 768}, {"1.5B", 8192, 1600}, {"7B", 4096, 4096}};
    for (auto& m : models) {
        linear(&b, m.model, "qkv", m.tokens, m.C, 3 * m.C);
        linear(&b, m.model, "proj", m.tokens, m.C, m.C);
        linear(&b, m.model, "fc", m.tokens, m.C, 4 * m.C);
        linear(&b, m.model, "fcproj", m.tokens, 4 * m.C, m.C);
    }
    return 0;
}

#else

int main(void) { die("bench_gemm measures a GPU: build it with make DEVICE=cuda"); }

#endif
