// plan.h: what a training run would take of a machine that is not there: GPUs by name, the least time that work can take on them, and a plan with
// its table and its JSON.
//
// Memory in a plan is what the trainer's own allocation code asks for, run dry. Times are rooflines: a matmul takes its operations at the units' dense
// peak or its bytes at the memory's bandwidth, whichever is longer, all else its bytes alone. Nothing real is faster, hence "at best".
//
// Ranks fill a node of 8 GPUs in their order, those that share a layer (tp) side by side, then the stages (pp), then the replicas (dp). A group within
// a node exchanges over NVLink, a larger one over the networks of its GPUs (see sent_seconds). Each direction of a link carries its rate.
#pragma once
#include "collectives.cuh"  // CommOperation
#include "log.h"            // text_bytes, make_valid_json
#include "matmul.cuh"       // what a GPU does with a shape
#include "memory.h"         // categories
#include "schedule.h"       // the order of a pipeline's micro-batches
#include <algorithm>

// ---- GPUs ----

struct Gpu {
    const char* name;    // as --gpu takes it
    const char* device;  // part of the name that the driver gives it
    int capability;      // 90 is 9.0
    double memory;       // bytes, as the driver reports them
    double bandwidth;    // of the memory, bytes/s
    double bf16, fp8;    // dense peaks, FLOP/s; without FP8 units FP8 is widened to BF16
    double link;         // to GPUs of the node, bytes/s in each direction
    double network;      // to other nodes, bytes/s of one GPU in each direction
};

enum GpuChoice { GPU_H100, GPU_H200, GPU_B200, GPU_A100, GPU_L40S, GPU_NONE };
#define GPU_CHOICES "h100|h200|b200|a100|l40s|none"

// NVIDIA's data sheets of the SXM forms (H100 2023, H200 2024, DGX B200 2024, A100 80 GB 2021; L40S 2023: PCIe 4.0 ×16 for a link): dense rates are half of those
// with sparsity, NVLink's half of the sum of both directions. Network: a DGX's ConnectX of 400 Gbit/s a GPU; 200 with A100 and L40S.
static const Gpu gpus[] = {
    {"h100", "H100", 90, 81559.0 * (1 << 20), 3.35e12, 989e12, 1979e12, 450e9, 50e9},
    {"h200", "H200", 90, 143771.0 * (1 << 20), 4.8e12, 989e12, 1979e12, 450e9, 50e9},
    {"b200", "B200", 100, 183359.0 * (1 << 20), 8e12, 2250e12, 4500e12, 900e9, 50e9},
    {"a100", "A100", 80, 81920.0 * (1 << 20), 2.039e12, 312e12, 312e12, 300e9, 25e9},
    {"l40s", "L40S", 89, 46068.0 * (1 << 20), 0.864e12, 362e12, 733e12, 32e9, 25e9},
};

constexpr int GPUS_A_NODE = 8;
constexpr double GPU_RESERVED = 1 << 30;  // bytes that CUDA and NCCL keep for themselves, about

static inline const Gpu* gpu_of(GpuChoice choice) { return choice == GPU_NONE ? NULL : &gpus[choice]; }

// By the name that the driver gives it; NULL: not in the table
static inline const Gpu* gpu_by_device(const char* name) {
    for (const Gpu& g : gpus) {
        if (strstr(name, g.device) != NULL) { return &g; }
    }
    return NULL;
}

// ---- rooflines, in seconds ----

static inline double bytes_seconds(const Gpu* g, double bytes) { return bytes / g->bandwidth; }

// Bytes that a rank sends within a group of `ranks` that lie `apart` ranks from each other. Over several nodes a ring crosses from each to the next once,
// over the network of any of the group's GPUs there; in an `exchange` each rank sends by its own network what is for other nodes.
static inline double sent_seconds(const Gpu* g, double bytes, int ranks, int apart, bool exchange) {
    if (ranks * apart <= GPUS_A_NODE) { return bytes / g->link; }
    int here = max_of(GPUS_A_NODE / apart, 1);  // of the group, in a node
    return exchange ? bytes * (ranks - here) / (ranks - 1) / g->network : bytes / min_of(g->link, here * g->network);
}

static inline double copy_bytes(const GpuOperand* o, DType from) {
    return o->copy == GPU_AS_IS ? 0.0 : (double)o->bytes * (1.0 + (double)dtype_bytes(from) / dtype_bytes(o->dtype));
}

// What one launch of a kernel has to do: operations, of FP8 units or BF16's, and bytes of memory, each tensor read or written once
struct Work {
    const char* name;
    bool fp8;
    double flops, bytes;
};
static inline double work_seconds(const Gpu* g, const Work* w) { return max_of(w->flops / (w->fp8 ? g->fp8 : g->bf16), w->bytes / g->bandwidth); }

// f(Work) for what a matmul of FP8 or BF16 operands is made of: the product, and the copies of operands that the backend makes
template <class F> static inline void each_matmul_work(const Gpu* g, const MatmulCall* c, const char* name, F f) {
    GpuPlan p = matmul_gpu_plan(c, g->capability);
    double m = c->m, n = c->n, k = c->k, batch = c->batch, d = m * n * dtype_bytes(c->d_dtype);
    f(Work{name, p.fp8, 2.0 * m * n * k * batch, (m * k * dtype_bytes(p.a.dtype) + k * n * dtype_bytes(p.b.dtype) + (c->accumulate ? 2.0 * d : d)) * batch});
    double copies = copy_bytes(&p.a, c->a.dtype) + copy_bytes(&p.b, c->b.dtype);
    if (copies > 0.0) { f(Work{"operands transposed or widened", false, 0.0, copies}); }
}
static inline double matmul_seconds(const Gpu* g, const MatmulCall* c) {
    double seconds = 0.0;
    each_matmul_work(g, c, "", [&](Work w) { seconds += work_seconds(g, &w); });
    return seconds;
}

// All launches of one name in a micro-batch
struct WorkSum {
    std::string name;
    double calls, flops, bytes, seconds;
};
static inline void work_add(std::vector<WorkSum>* sums, const Gpu* g, const Work* w, double calls) {
    if (calls == 0.0) { return; }
    std::string name = std::string(w->name) + (w->flops == 0.0 ? "" : w->fp8 ? ", FP8" : ", BF16");
    WorkSum* sum = NULL;
    for (WorkSum& x : *sums) {
        if (x.name == name) { sum = &x; }
    }
    if (sum == NULL) {
        sums->push_back(WorkSum{name, 0.0, 0.0, 0.0, 0.0});
        sum = &sums->back();
    }
    sum->calls += calls;
    sum->flops += calls * w->flops;
    sum->bytes += calls * w->bytes;
    sum->seconds += calls * work_seconds(g, w);
}

// ---- where FP8 gains nothing ----

// Unlike a roofline this is meant to be about what happens. Of large products' dense peaks matrix units reach about these shares (FP8 a smaller one: it draws
// the power that the clock is held down for); a kernel takes some time to begin and end whatever it does.
constexpr double BF16_SHARE = 0.7, FP8_SHARE = 0.65, KERNEL_SECONDS = 2e-6;

// One product with the copies that the backend makes of its operands
static inline double matmul_expected_seconds(const Gpu* g, const MatmulCall* c) {
    GpuPlan p = matmul_gpu_plan(c, g->capability);
    Gpu reached = *g;
    reached.bf16 *= BF16_SHARE;
    reached.fp8 *= FP8_SHARE;
    int kernels = 1 + (p.a.copy != GPU_AS_IS) + (p.b.copy != GPU_AS_IS);
    return matmul_seconds(&reached, c) + kernels * KERNEL_SECONDS;
}

// The expected time of a linear layer `in` -> `out` at `rows` tokens in BF16, over that in FP8: below 1 FP8 loses. That is the three products
//     Y (rows, out) = X·Wᵀ,  dX (rows, in) = dY·W,  dW (out, in) += dYᵀ·X
// of 2·rows·in·out operations each, and what of bytes and kernels FP8 has beside them:
//   copies of the backend, each read and written: on GPUs whose FP8 units take only K-contiguous operands Wᵀ (2·in·out bytes), dYᵀ (2·rows·out) and
//     Xᵀ (2·rows·in); without FP8 units all operands in BF16 (3 bytes an element, in each product)
//   X as codes: the kernel that makes it writes 1 byte an element instead of 2 (-rows·in); of an X that is there already (`cast_apart`: attention's output)
//     a kernel of its own reads 2 and writes 1 (+3·rows·in)
//   dY as codes: what sums it for the bias writes 1 byte an element beside (+rows·out)
// Scales are taken to be delayed. Casts of W are the optimizer's, once a step.
static inline double fp8_gain(const Gpu* g, int rows, int in, int out, bool cast_apart) {
    double seconds[2] = {};
    for (int fp8 = 0; fp8 <= 1; fp8++) {
        DType forward = fp8 ? E4M3 : BF16, backward = fp8 ? E5M2 : BF16;
        MatmulCall y = {}, dx = {}, dw = {};
        y.a = Operand{NULL, forward, NULL, in, 0, false};
        y.b = Operand{NULL, forward, NULL, in, 0, true};
        y.m = rows; y.n = out; y.k = in;
        dx.a = Operand{NULL, backward, NULL, out, 0, false};
        dx.b = Operand{NULL, forward, NULL, in, 0, false};
        dx.m = rows; dx.n = in; dx.k = out;
        dw.a = Operand{NULL, backward, NULL, out, 0, true};
        dw.b = Operand{NULL, forward, NULL, in, 0, false};
        dw.m = out; dw.n = in; dw.k = rows;
        dw.accumulate = true;
        for (MatmulCall* c : {&y, &dx, &dw}) {
            c->d_dtype = c == &dw ? FP32 : BF16;
            c->d_ld = c->n;
            c->batch = 1;
            seconds[fp8] += matmul_expected_seconds(g, c);
        }
    }
    double x = (double)rows * in, dy = (double)rows * out;
    seconds[1] += bytes_seconds(g, (cast_apart ? 3.0 : -1.0) * x + dy) + (cast_apart ? KERNEL_SECONDS : 0.0);
    return seconds[0] / seconds[1];
}

// ---- a plan ----

// In the words of people
static const char* tensor_parallel_name(int operation) {
    switch (operation) {
        case TP_X: return "gather X";
        case TP_X_AGAIN: return "gather X again";
        case TP_Y: return "sum Y";
        case TP_DY: return "gather dY";
        case TP_DX: return "sum dX";
        case TP_SCALES: return "scales";
        case TP_OTHER: return "embedding, head, norms";
        default: return NULL;
    }
}

struct PlanTraffic {        // bytes that a rank sends in a step
    uint64_t operations[COMM_OPERATIONS];
    double gradients, weights, tensor, pipeline;  // by purpose: the former two between replicas, then between ranks of a layer, between stages
};

// The purposes from the operations
static inline void plan_sort_traffic(PlanTraffic* t) {
    t->gradients = t->weights = t->tensor = t->pipeline = 0.0;
    for (int i = 0; i < COMM_OPERATIONS; i++) {
        double* purpose = tensor_parallel_name(i) != NULL ? &t->tensor : i == WEIGHTS_GATHER ? &t->weights : i == PIPELINE ? &t->pipeline : &t->gradients;
        *purpose += (double)t->operations[i];
    }
}

// Of two ranks' traffic that of the one that sends more: between replicas, ranks of a layer and stages each by itself
static inline void plan_keep_most(PlanTraffic* most, const PlanTraffic* t) {
    bool replicas = t->gradients + t->weights > most->gradients + most->weights, layer = t->tensor > most->tensor, stages = t->pipeline > most->pipeline;
    for (int i = 0; i < COMM_OPERATIONS; i++) {
        bool more = tensor_parallel_name(i) != NULL ? layer : i == PIPELINE ? stages : replicas;
        if (more) { most->operations[i] = t->operations[i]; }
    }
    plan_sort_traffic(most);
}

struct PlanTimes {          // seconds
    double forward, backward;  // of a micro-batch on the slowest stage, tensor parallel traffic included
    double passes;             // all micro-batches through all stages
    double bubble;             // share of that in which a stage waits
    double exposed;            // reduction and weights that nothing hides
    double optimizer, step;    // NaN: not known
};

struct PlanSide {           // the run that was asked for, or its baseline
    const char* recipe;
    uint64_t memory[MEMORY_CATEGORIES], memory_min[MEMORY_CATEGORIES];  // of the fullest and the emptiest rank
    PlanTraffic traffic;    // of the ranks that send most between replicas, in a layer, and between stages
    double table7;          // FP8-LM's table 7: bytes a rank sends for the activations of a micro-batch, X, X again and dX only
    PlanTimes times;
    int64_t largest_micro_batch;  // 0: none fits
    std::vector<WorkSum> work;  // of a micro-batch on the first stage, and its share of a step's optimizer
};

struct Plan {
    const Gpu* gpu;         // NULL: the CPU
    const char* model;
    int world, dp, tp, pp;
    int64_t parameters, vocab, micro_batch, seq_len, micro_batches;
    double memory_limit;    // bytes of a rank
    double flops;           // of a step, as MFU counts them
    bool kernels;           // the work is printed
    PlanSide asked, baseline;
};

// Least times of one stage: a micro-batch in each direction, tensor parallel traffic included; what it sends in a step; its optimizer
struct StageTimes {
    double forward, backward, reduction, weights, optimizer;
    int reductions;  // of a step, each after a backward pass
};

// A step: all micro-batches through the pipeline. Gradients travel during the last backward pass, or each one, weights during the first forward pass; what is
// left of both waits. What stages send each other travels while they compute.
static inline PlanTimes plan_times(const std::vector<StageTimes>& stages, int micro_batches) {
    PlanTimes t = {};
    std::vector<double> forward, backward;
    double busiest = 0.0;
    for (const StageTimes& x : stages) {
        forward.push_back(x.forward);
        backward.push_back(x.backward);
        if (x.forward + x.backward > busiest) {
            busiest = x.forward + x.backward;
            t.forward = x.forward;
            t.backward = x.backward;
        }
        t.exposed = max_of(t.exposed, max_of(x.reduction - x.reductions * x.backward, 0.0) + max_of(x.weights - x.forward, 0.0));
        t.optimizer = max_of(t.optimizer, x.optimizer);
    }
    t.passes = schedule_makespan((int)stages.size(), micro_batches, forward.data(), backward.data());
    t.bubble = 1.0 - micro_batches * busiest / t.passes;
    t.step = t.passes + t.exposed + t.optimizer;
    return t;
}

static inline uint64_t plan_total(const uint64_t* memory) {
    uint64_t total = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { total += memory[i]; }
    return total;
}
static inline double plan_traffic(const PlanTraffic* t) { return t->gradients + t->weights + t->tensor + t->pipeline; }

// ---- as JSON ----

static inline json_object* plan_memory_json(const uint64_t* memory) {
    json_object* o = json_object_new_object();
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { json_object_object_add(o, memory_names[i], json_object_new_int64((int64_t)memory[i])); }
    json_object_object_add(o, "total", json_object_new_int64((int64_t)plan_total(memory)));
    return o;
}

static inline void plan_side_json(json_object* o, const PlanSide* side) {
    const PlanTraffic* t = &side->traffic;
    json_object_object_add(o, "memory", plan_memory_json(side->memory));
    json_object_object_add(o, "memory_min", plan_memory_json(side->memory_min));
    json_object* traffic = json_object_new_object();
    const struct { const char* name; double bytes; } kinds[] = {
        {"gradients", t->gradients}, {"weights", t->weights}, {"tensor_parallel", t->tensor}, {"pipeline", t->pipeline}};
    for (auto& k : kinds) { json_object_object_add(traffic, k.name, json_object_new_int64((int64_t)llround(k.bytes))); }
    json_object_object_add(o, "traffic", traffic);
    json_object* operations = json_object_new_object();
    for (int i = 0; i < COMM_OPERATIONS; i++) {
        if (t->operations[i] > 0) { json_object_object_add(operations, comm_names[i], json_object_new_int64((int64_t)t->operations[i])); }
    }
    json_object_object_add(o, "traffic_operations", operations);
    json_object_object_add(o, "table7", json_object_new_int64((int64_t)llround(side->table7)));
    json_object_object_add(o, "step_seconds", json_object_new_double(side->times.step));
    json_object_object_add(o, "largest_micro_batch", json_object_new_int64(side->largest_micro_batch));
    if (side->work.empty()) { return; }
    json_object* kernels = json_object_new_array();
    for (const WorkSum& w : side->work) {
        json_object* k = json_object_new_object();
        json_object_object_add(k, "name", json_object_new_string(w.name.c_str()));
        const struct { const char* name; double value; } numbers[] = {{"calls", w.calls}, {"bytes", w.bytes}, {"flops", w.flops}, {"seconds", w.seconds}};
        for (auto& n : numbers) { json_object_object_add(k, n.name, json_object_new_double(n.value)); }
        json_object_array_add(kernels, k);
    }
    json_object_object_add(o, "kernels", kernels);
}

static inline void plan_print_json(FILE* file, const Plan* p) {
    json_object* o = json_object_new_object();
    json_object_object_add(o, "recipe", json_object_new_string(p->asked.recipe));
    json_object_object_add(o, "gpu", json_object_new_string(p->gpu != NULL ? p->gpu->name : "none"));
    const struct { const char* name; int64_t value; } numbers[] = {{"world", p->world}, {"dp", p->dp}, {"tp", p->tp}, {"pp", p->pp}, {"parameters", p->parameters}, {"vocab", p->vocab},
        {"micro_batch", p->micro_batch}, {"seq_len", p->seq_len}, {"micro_batches", p->micro_batches}};
    for (auto& n : numbers) { json_object_object_add(o, n.name, json_object_new_int64(n.value)); }
    plan_side_json(o, &p->asked);
    json_object_object_add(o, "memory_limit", json_object_new_int64((int64_t)p->memory_limit));
    json_object* baseline = json_object_new_object();
    json_object_object_add(baseline, "recipe", json_object_new_string(p->baseline.recipe));
    plan_side_json(baseline, &p->baseline);
    json_object_object_add(o, "baseline", baseline);
    make_valid_json(o);
    fprintf(file, "%s\n", json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN));
    json_object_put(o);
}

// ---- as a table ----

static inline void plan_row(FILE* file, int indent, const char* name, const char* asked, const char* baseline, double change) {
    fprintf(file, "%*s%s%*s %12s %12s", indent, "", name, max_of(36 - indent - columns_of(name), 1), "", asked, baseline);
    if (isfinite(change) && change < 10.0) { fprintf(file, " %+9.1f %%", 100.0 * change); }
    fputc('\n', file);
}
static inline void plan_bytes_row(FILE* file, int indent, const char* name, double asked, double baseline) {
    if (asked == 0.0 && baseline == 0.0) { return; }
    plan_row(file, indent, name, text_bytes(asked).s, text_bytes(baseline).s, asked / baseline - 1.0);
}
static inline void plan_time_row(FILE* file, int indent, const char* name, double asked, double baseline) {
    if (asked == 0.0 && baseline == 0.0) { return; }
    plan_row(file, indent, name, text_ms(1e3 * asked).s, text_ms(1e3 * baseline).s, asked / baseline - 1.0);
}

static inline void plan_work_columns(FILE* file, const WorkSum* w) {
    if (w == NULL) { fprintf(file, " %7s %8s %8s %9s", "-", "", "", ""); return; }
    fprintf(file, " %7.0f %8.2f %8.2f %9.3f", w->calls, 1e-9 * w->bytes, 1e-12 * w->flops, 1e3 * w->seconds);
}

// Every kernel of a micro-batch with what it moves and computes, the longest first
static inline void plan_print_work(FILE* file, const Plan* p, const char* device) {
    std::vector<WorkSum> rows = p->asked.work;
    auto of = [](const std::vector<WorkSum>& sums, const std::string& name) {
        const WorkSum* found = NULL;
        for (const WorkSum& x : sums) {
            if (x.name == name) { found = &x; }
        }
        return found;
    };
    for (const WorkSum& x : p->baseline.work) {
        if (of(rows, x.name) == NULL) { rows.push_back(x); }
    }
    auto seconds = [&](const WorkSum& x) {
        const WorkSum *a = of(p->asked.work, x.name), *b = of(p->baseline.work, x.name);
        return max_of(a != NULL ? a->seconds : 0.0, b != NULL ? b->seconds : 0.0);
    };
    std::stable_sort(rows.begin(), rows.end(), [&](const WorkSum& x, const WorkSum& y) { return seconds(x) > seconds(y); });
    fprintf(file, "kernels of a micro-batch on %s, at best%s\n", device, p->pp > 1 ? ", first stage" : "");
    char head[2][16];
    for (int i = 0; i < 2; i++) { snprintf(head[i], sizeof(head[i]), "%s:", i == 0 ? p->asked.recipe : p->baseline.recipe); }
    fprintf(file, "  %-38s %7s %8s %8s %9s %7s %8s %8s %9s\n", "", head[0], "", "", "", head[1], "", "", "");
    fprintf(file, "  %-38s %7s %8s %8s %9s %7s %8s %8s %9s\n", "", "calls", "GB", "TFLOP", "ms", "calls", "GB", "TFLOP", "ms");
    WorkSum all[2] = {};
    for (const WorkSum& x : rows) {
        fprintf(file, "  %-38s", x.name.c_str());
        for (int i = 0; i < 2; i++) {
            const WorkSum* w = of((i == 0 ? p->asked : p->baseline).work, x.name);
            plan_work_columns(file, w);
            if (w == NULL) { continue; }
            all[i].calls += w->calls;
            all[i].bytes += w->bytes;
            all[i].flops += w->flops;
            all[i].seconds += w->seconds;
        }
        fputc('\n', file);
    }
    fprintf(file, "  %-38s", "all");
    for (const WorkSum& w : all) { plan_work_columns(file, &w); }
    fprintf(file, "\n  %s over %s: %.2f times the speed, at best\n", p->asked.recipe, p->baseline.recipe, all[1].seconds / all[0].seconds);
}

static inline void plan_print(FILE* file, const Plan* p) {
    const PlanSide *a = &p->asked, *b = &p->baseline;
    const char* device = p->gpu != NULL ? p->gpu->device : "this CPU";
    fprintf(file, "plan of %s, vocabulary %" PRId64 ", %s parameters, on %d × %s: dp %d, pp %d, tp %d; in a step %" PRId64
            " micro-batch%s of %" PRId64 " × %" PRId64 " tokens\n", p->model, p->vocab,
            text_count((double)p->parameters).s, p->world, device, p->dp, p->pp, p->tp, p->micro_batches, p->micro_batches == 1 ? "" : "es", p->micro_batch, p->seq_len);
    plan_row(file, 0, "", a->recipe, "bf16", NAN);
    fprintf(file, "memory of the fullest rank, as allocated\n");
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { plan_bytes_row(file, 2, memory_names[i], (double)a->memory[i], (double)b->memory[i]); }
    plan_bytes_row(file, 2, "total", (double)plan_total(a->memory), (double)plan_total(b->memory));
    plan_bytes_row(file, 2, "total of the emptiest rank", (double)plan_total(a->memory_min), (double)plan_total(b->memory_min));
    char text[2][32], name[96];
    for (int i = 0; i < 2; i++) {
        int64_t n = i == 0 ? a->largest_micro_batch : b->largest_micro_batch;
        snprintf(text[i], sizeof(text[i]), n > 0 ? "%" PRId64 : "none fits", n);
    }
    snprintf(name, sizeof(name), "largest micro-batch in %s", text_bytes(p->memory_limit).s);
    plan_row(file, 2, name, text[0], text[1], NAN);
    if (plan_traffic(&a->traffic) + plan_traffic(&b->traffic) > 0.0) {
        fprintf(file, "sent in a step by the rank that sends most, of each kind\n");
        plan_bytes_row(file, 2, "gradients", a->traffic.gradients, b->traffic.gradients);
        plan_bytes_row(file, 2, "weights", a->traffic.weights, b->traffic.weights);
        auto operations = [&](bool tensor_parallel) {
            for (int i = 0; i < COMM_OPERATIONS; i++) {
                const char* name = tensor_parallel_name(i);
                if (i == PIPELINE || (name != NULL) != tensor_parallel) { continue; }
                plan_bytes_row(file, 4, name != NULL ? name : comm_names[i], (double)a->traffic.operations[i], (double)b->traffic.operations[i]);
            }
        };
        operations(false);
        plan_bytes_row(file, 2, "tensor parallel", a->traffic.tensor, b->traffic.tensor);
        operations(true);
        plan_bytes_row(file, 2, "pipeline", a->traffic.pipeline, b->traffic.pipeline);
        plan_bytes_row(file, 2, "activations of a micro-batch", a->table7, b->table7);
    }
    if (p->gpu == NULL || !isfinite(a->times.step)) { return; }
    fprintf(file, "time on %s, at best\n", device);
    plan_time_row(file, 2, "micro-batch forward", a->times.forward, b->times.forward);
    plan_time_row(file, 2, "micro-batch backward", a->times.backward, b->times.backward);
    plan_time_row(file, 2, "all micro-batches", a->times.passes, b->times.passes);
    if (p->pp > 1) {
        for (int i = 0; i < 2; i++) { snprintf(text[i], sizeof(text[i]), "%.1f %%", 100.0 * (i == 0 ? a : b)->times.bubble); }
        plan_row(file, 4, "of it waiting in the pipeline", text[0], text[1], NAN);
    }
    plan_time_row(file, 2, "gradients and weights not hidden", a->times.exposed, b->times.exposed);
    plan_time_row(file, 2, "optimizer", a->times.optimizer, b->times.optimizer);
    plan_time_row(file, 2, "step", a->times.step, b->times.step);
    for (int i = 0; i < 2; i++) { snprintf(text[i], sizeof(text[i]), "%.0f", 1e-12 * p->flops / p->world / (i == 0 ? a : b)->times.step); }
    plan_row(file, 2, "TFLOP/s of a GPU", text[0], text[1], b->times.step / a->times.step - 1.0);
    if (p->kernels) { plan_print_work(file, p, device); }
}
