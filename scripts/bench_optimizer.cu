// bench_optimizer.cu: what AdamW's update moves and takes with each set of formats, beside the bytes that no update does without and the time that
// moving its bytes takes alone. `make bench` runs it after the steps.
//
//     bench_optimizer [ELEMENTS] [JSON]     of one matrix, 16,777,216 unless given; JSON: a file to which a line a row is added
//
// floor: gradient read, states read and written, weight of the forward pass written, once each. moved: what the passes do; more than the floor where a
// scale needs a pass of its own. The best of several rounds, in which the rows take turns; "alone" is the best of five, right after them.
#include "adam_fp8.cuh"
#include "core/options.h"

struct BenchRow {
    const char* name;
    DType master, m, v, grad, weight;
    bool by_block;
    Rounding rounding;
    // found
    double seconds, alone, moved, floor;
};

constexpr int ROUNDS = 7;
constexpr int64_t COLS = 1024;

struct BenchTensor {
    ParamTable table;
    Memory memory;
    Optimizer optimizer;
    float* slots;
    LossShare* loss;
};

static void allocate(BenchTensor* t) {
    Param* p = &t->table.items[0];
    size_t n = param_elements(p);
    p->weight = memory_take(&t->memory, WEIGHTS, n, (size_t)dtype_bytes(p->dtype));
    p->slot = memory_take<float>(&t->memory, WEIGHTS, 4);
    p->grad = memory_take(&t->memory, GRADIENTS, n, (size_t)dtype_bytes(p->grad_dtype));
    t->slots = p->grad_slot = memory_take<float>(&t->memory, GRADIENTS, 4);
    t->loss = memory_take<LossShare>(&t->memory, GRADIENTS, 1);
    optimizer_allocate(&t->optimizer, &t->table, false, &t->memory);
}

// Random masters and gradients of one scale, as a layer has them
static BenchTensor* create(const BenchRow* row, int64_t rows, Stream s) {
    BenchTensor* t = (BenchTensor*)host_alloc(sizeof(BenchTensor));
    *t = BenchTensor{};
    t->optimizer.config = OptimizerConfig{row->by_block, row->rounding, row->rounding, 7};
    Param* p = param_add(&t->table, "p", 0, rows, COLS, MATRIX, row->weight);
    p->master.dtype = row->master;
    p->m.dtype = row->m;
    p->v.dtype = row->v;
    p->grad_dtype = row->grad;
    p->init_std = 0.02f;
    allocate(t);
    memory_commit(&t->memory);
    allocate(t);
    optimizer_reset(&t->optimizer, &t->table, s);
    run_rows(ResetSlots{t->slots}, 1, s);
    run_rows(ResetSlots{p->slot}, 1, s);
    size_t n = param_elements(p);
    float* values = (float*)host_alloc(n * sizeof(float));
    param_initialise(values, p, 1);
    optimizer_set_master(p, values, NULL, s);
    optimizer_cast_weights(&t->optimizer, &t->table, s);
    float* device = (float*)device_alloc(n * sizeof(float));
    p->init_std = 1.0f;
    param_initialise(values, p, 2);
    copy_to_device(device, values, n * sizeof(float), s);
    with_gradient_type(row->grad, [&](auto tag) {
        typedef typename decltype(tag)::type G;
        run_rows(QuantiseGradient<G, float>{(G*)p->grad, device, NULL, NULL, NULL, n}, pieces_of(n), s);
    });
    LossShare loss = {1.0, 1.0};
    copy_to_device(t->loss, &loss, sizeof(loss), s);
    stream_sync(s);
    device_free(device);
    free(values);
    return t;
}

static double update_seconds(BenchTensor* t, Stream s) {
    optimizer_decide(&t->optimizer, &t->table, t->slots, t->loss, 1, DecisionRules{0.9, 0.95, 1.0f, 0.0f, 0.0f}, s);
    stream_sync(s);
    double start = wall_seconds();
    optimizer_update(&t->optimizer, &t->table, AdamRates{1e-3f, 0.9f, 0.95f, 1e-8f, 0.0f}, 0.1f, s);
    stream_sync(s);
    return wall_seconds() - start;
}

int main(int argc, char** argv) {
    BenchRow rows[] = {
        {"bf16: FP32 states, FP32 gradient", FP32, FP32, FP32, FP32, BF16, false, NEAREST, 0, 0, 0, 0},
        {"FP32 states, E4M3 gradient and weight", FP32, FP32, FP32, E4M3, E4M3, false, NEAREST, 0, 0, 0, 0},
        {"fp8-lm: FP16, E4M3, FP16 by tensor", FP16, E4M3, FP16, E4M3, E4M3, false, NEAREST, 0, 0, 0, 0},
        {"the same by 128", FP16, E4M3, FP16, E4M3, E4M3, true, NEAREST, 0, 0, 0, 0},
        {"fp8: FP16, E4M3, UE5M3 by 128, stochastic", FP16, E4M3, UE5M3, E4M3, E4M3, true, STOCHASTIC, 0, 0, 0, 0},
        {"fp8 with ZeRO: gradient in FP32", FP16, E4M3, UE5M3, FP32, E4M3, true, STOCHASTIC, 0, 0, 0, 0},
    };
    int64_t elements = 1 << 24;
    if (argc > 3) { bad_input("bench_optimizer takes at most a number of elements and a file"); }
    if (argc > 1) {
        char* end;
        errno = 0;
        elements = strtoll(argv[1], &end, 10);
        if (*end != '\0' || errno != 0 || elements < COLS || elements > (int64_t)1 << 32) {
            bad_input("ELEMENTS: %s is not a whole number from %" PRId64 " to %" PRId64, quoted(argv[1]).text, COLS, (int64_t)1 << 32);
        }
    }
    FILE* json = NULL;
    if (argc > 2) {
        json = fopen(argv[2], "a");
        if (json == NULL) { bad_input("JSON: %s cannot be written: %s", quoted(argv[2]).text, strerror(errno)); }
    }
    elements = elements / COLS * COLS;
    constexpr int COUNT = (int)(sizeof(rows) / sizeof(rows[0]));
    BenchTensor* tensors[COUNT];
    Stream s = stream_create();
    for (int i = 0; i < COUNT; i++) { tensors[i] = create(&rows[i], elements / COLS, s); }
    for (int round = 0; round <= ROUNDS; round++) {  // the first warms up
        for (int i = 0; i < COUNT; i++) {
            double t = update_seconds(tensors[i], s);
            rows[i].seconds = round <= 1 ? t : min_of(rows[i].seconds, t);
        }
    }
    printf("AdamW of %" PRId64 " elements, a step\n%-44s %7s %7s %10s %10s %8s\n", elements, "", "floor", "moved", "ns/element", "alone", "ratio");
    for (int i = 0; i < COUNT; i++) {
        BenchRow* r = &rows[i];
        Traffic t = optimizer_traffic(&tensors[i]->optimizer, &tensors[i]->table);
        r->alone = seconds_of_bytes(t, s);
        r->moved = (2.0 * t.updated + t.read + t.written) / (double)elements;
        r->floor = 2.0 * (dtype_bytes(r->master) + dtype_bytes(r->m) + dtype_bytes(r->v)) + dtype_bytes(r->grad) + dtype_bytes(r->weight);
        double ns = 1e9 * r->seconds / (double)elements, alone = 1e9 * r->alone / (double)elements;
        printf("%-44s %5.0f B %5.0f B %10.3f %10.3f %8.2f\n", r->name, r->floor, r->moved, ns, alone, ns / alone);
        if (json == NULL) { continue; }
        fprintf(json, "{\"optimizer\":\"%s\",\"elements\":%" PRId64 ",\"floor_bytes\":%.0f,\"moved_bytes\":%.0f,\"ns\":%.4f,\"alone_ns\":%.4f}\n", r->name, elements,
                r->floor, r->moved, ns, alone);
    }
    if (json != NULL && fclose(json) != 0) { die("%s: %s", argv[2], strerror(errno)); }
    return 0;
}
