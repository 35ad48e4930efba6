// exp1_scaling.cu: experiment 1: what each way of reducing FP8 gradients over ranks does to the gradients of a real training run.
// scripts/exp1_scaling.sh runs it and judges what it measures.
//
//     exp1_scaling real|virtual ROWS.csv PROBE_EVERY RANKS[,RANKS…] [flags of the trainer]
//
// It trains a GPT with the trainer's own steps, whose gradients are added up and reduced in FP32: every mode sees the same gradients, and none of them
// the consequences of its own errors. At probe steps the matrices' gradients of single micro-batches, one a rank, are also quantised and reduced in all
// five modes, per transformer block, and compared with their float64 sum. The headroom of `auto` is kept by tensor and number of ranks and follows its
// rule at every step, probed or not.
//
//   real      every process is a rank. The first micro-batch of each goes through the reduction of comm.cuh itself, over MPI.
//   virtual   every micro-batch of the global batch is a rank, for R ranks the first R of them: a process holds the gradients of its share of the blocks
//             and runs the kernels of gradient.cuh for all ranks in turn, with buckets cut and added up in the ring's order as comm.cuh does.
//
// Micro-batch i of a step is the same window of text whatever the number of processes, so at the first step, before the weights part, both kinds must
// give the same figures for the same ranks to the last digit.
//
// Modes: the ring's pre, post, sqrt, auto; direct; and at the last virtual step `settled`: the ring with the headroom that auto's rule comes to when it
// goes on for thousands of steps on this step's gradients, since it doubles μ in 1,000 steps and a run of a few hundred sees little of that.
#define TESTING  // main() is ours
#include "../train_gpt_fp8.cu"

enum Mode { PRE, POST, SQRT, AUTO, DIRECT, MODES, SETTLED = MODES, ALL_MODES };
static const char* const mode_names[ALL_MODES] = {"pre", "post", "sqrt", "auto", "direct", "settled"};

static ReductionConfig config_of(int mode) {
    return mode == DIRECT ? ReductionConfig{SCALING_AUTO, REDUCE_DIRECT, NOTHING_PARTITIONED} : ReductionConfig{(GradScaling)(mode == SETTLED ? SCALING_AUTO : mode), REDUCE_RING, NOTHING_PARTITIONED};
}

// What is measured of a block, a mode and a number of ranks
enum Figure { ZEROED, AT_TOP, SNR_DB, MU_MIN, MU_MAX, BYTES_SENT, SCALE_BYTES, FIGURES };

constexpr int MAX_RANK_COUNTS = 16;
constexpr size_t MAX_GRADIENT_BYTES = (size_t)4 << 30;  // of a process: it is an experiment for small machines

constexpr int SETTLING_ROUNDS = 48;   // of each: a step of the rule, then as many of growth. Together 6,000 steps: μ could double 6 times
constexpr int SETTLING_STEPS = 125;

struct VirtualRanks {
    Group group;              // of that many ranks, which nobody is in
    Reduction plan;           // its buckets, one a block, as comm.cuh cuts them
    float* mu;                // (params) auto's
};

struct RealMode {
    ParamTable table;
    Reduction reduction;
    Memory memory;
};

struct Experiment {
    Run* run;
    bool real;
    int counts, ranks[MAX_RANK_COUNTS];
    int blocks, block_params;
    size_t block_elements;    // as in a bucket, without what the number of ranks adds
    float* mine;              // (blocks, block_elements) gradients of this process' last micro-batch
    float* gathered;          // (processes, blocks, block_elements)
    double* exact;            // (block_elements) Σ over ranks
    double* rows;             // (counts, blocks, ALL_MODES, FIGURES); those of other processes' blocks are 0
    double* tops;             // (params) reduced codes at the maximum
    RealMode* modes;          // (MODES)
    // virtual
    ParamTable table;
    VirtualRanks* virtual_ranks;  // (counts)
    int batch;                // micro-batches
    float* gradients;         // (own blocks, batch, block_elements)
    float* local_scales;      // (batch, params)
    int* tensor_params;       // (params)
    uint32_t* amax;
    float *accum_slots, *slots, *mu, *shared, *scales, *descales;
    CodeCounts* counters;
    uint32_t* sum_amax;
    float* sums;
    e4m3 *payload, *reduced;  // (ranks, elements), (elements)
};

static Group* processes(const Experiment* x) { return &x->run->topology.data; }
static bool owns(const Experiment* x, int block) { return block % processes(x)->size == processes(x)->rank; }
static double* figures_of(const Experiment* x, int count, int block, int mode) {
    return x->rows + (((size_t)count * x->blocks + block) * ALL_MODES + mode) * FIGURES;
}

// ---- gradients ----

static void matrices_of(ParamTable* table, const Model* m) {
    *table = ParamTable{};
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (p->format_class != MATRIX) { continue; }
        Param* copy = param_add(table, p->name, p->layer, p->rows, p->cols, MATRIX, p->dtype);
        copy->accum = FP32;
        copy->wire = E4M3;
    }
}

// The matrices' gradients out of the trainer's accumulators, laid out as buckets
static void take_gradients(Experiment* x) {
    const Model* m = &x->run->model;
    size_t at = 0;
    for (int i = 0, k = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (p->format_class != MATRIX) { continue; }
        if (k++ % x->block_params == 0) { at = (size_t)p->layer * x->block_elements; }
        memcpy(x->mine + at, p->accumulator, param_elements(p) * sizeof(float));
        at += round_up(param_elements(p), PARAM_ALIGNMENT);
    }
    host_all_gather(processes(x), x->gathered, x->mine, (size_t)x->blocks * x->block_elements * sizeof(float));
}

// ---- figures ----

// `codes`: of the bucket; `mu`: that they were made with; `zeroed`, `sent_tops`: counts over all ranks, by parameter; `tops`: of the reduced codes
static void describe_block(double* figures, const Reduction* r, const Bucket* b, const e4m3* codes, const float* slots, const float* mu, const double* exact,
                           const double* zeroed, const double* sent_tops, const double* tops) {
    double n = 0.0, zeros = 0.0, sent = 0.0, top = 0.0, signal = 0.0, noise = 0.0, least = 1.0, most = 0.0;
    each_tensor(r, b, [&](Param* p, int, size_t first) {
        size_t i = (size_t)(p - r->table->items);
        double descale = (double)slots[4 * i];
        n += (double)param_elements(p);
        zeros += zeroed[i];
        sent += sent_tops[i];
        top += tops[i];
        least = min_of(least, (double)mu[i]);
        most = max_of(most, (double)mu[i]);
        for (size_t k = first; k < first + param_elements(p); k++) {
            double error = (double)to_float(codes[k]) * descale - exact[k];
            signal += exact[k] * exact[k];
            noise += error * error;
        }
    });
    bool ring = r->config.algorithm == REDUCE_RING;
    figures[ZEROED] = zeros / (n * r->group->size);
    figures[AT_TOP] = ring ? top / n : sent / (n * r->group->size);
    figures[SNR_DB] = 10.0 * log10(signal / noise);
    figures[MU_MIN] = least;
    figures[MU_MAX] = most;
}

static void count_tops(double* tops, const Reduction* r, const Bucket* b, const e4m3* codes) {
    each_tensor(r, b, [&](Param* p, int, size_t first) {
        uint32_t n = 0;
        for (size_t k = first; k < first + param_elements(p); k++) { n += is_top_code(codes[k]); }
        tops[p - r->table->items] = (double)n;
    });
}

// `gradients`: of the first rank; the others' follow `stride` elements apart. Adds ranks `from` … `to`-1 to exact.
static void add_exactly(double* exact, const float* gradients, size_t stride, int from, int to, size_t n) {
    for (int rank = from; rank < to; rank++) {
        const float* g = gradients + (size_t)rank * stride;
        for (size_t k = 0; k < n; k++) { exact[k] += (double)g[k]; }
    }
}

// ---- real ranks ----

static void open_real(Experiment* x) {
    x->modes = (RealMode*)host_alloc(MODES * sizeof(RealMode));
    for (int mode = 0; mode < MODES; mode++) {
        RealMode* y = &x->modes[mode];
        y->memory = Memory{};
        matrices_of(&y->table, &x->run->model);
        reduction_plan(&y->reduction, processes(x), NULL, &y->table, config_of(mode));
        reduction_allocate(&y->reduction, &y->memory);
        memory_commit(&y->memory);
        reduction_allocate(&y->reduction, &y->memory);
        memory_check(&y->memory);
        reduction_start_up(&y->reduction);
    }
}

static void measure_real(Experiment* x, bool probe) {
    static const int applied = 1;  // a skipped step would end the experiment
    Group* g = processes(x);
    int params = x->blocks * x->block_params;
    double* counts = (double*)host_alloc(2 * (size_t)params * sizeof(double));
    for (int mode = 0; mode < MODES; mode++) {
        if (mode != AUTO && !probe) { continue; }
        Reduction* r = &x->modes[mode].reduction;
        reduction_begin(r, true, true, r->stream);
        for (int l = 0; l < x->blocks; l++) {
            const Bucket* b = &r->partition.buckets[l];
            memcpy(b->memory, x->mine + (size_t)l * x->block_elements, x->block_elements * sizeof(float));
            uint64_t before[COMM_OPERATIONS];
            memcpy(before, g->bytes_sent, sizeof(before));
            reduction_start(r, l, r->stream);
            while (!reduction_poll(r)) { sched_yield(); }
            auto sent = [&](CommOperation op) { return (double)(g->bytes_sent[op] - before[op]); };
            if (!owns(x, l)) { continue; }
            double* figures = figures_of(x, 0, l, mode);
            figures[SCALE_BYTES] = sent(SCALES);
            figures[BYTES_SENT] = sent(SCALES) + sent(REDUCE_SCATTER) + sent(ALL_TO_ALL) + sent(ALL_GATHER);
        }
        reduction_finish(r, r->stream);
        reduction_count(r, r->stream);
        for (int i = 0; i < 2 * params; i++) { counts[i] = (double)r->count_sums[i]; }
        for (int l = 0; l < x->blocks; l++) {
            const Bucket* b = &r->partition.buckets[l];
            count_tops(x->tops, r, b, (const e4m3*)b->memory);
            if (!probe || !owns(x, l)) { continue; }
            memset(x->exact, 0, x->block_elements * sizeof(double));
            add_exactly(x->exact, x->gathered + (size_t)l * x->block_elements, (size_t)x->blocks * x->block_elements, 0, g->size, x->block_elements);
            describe_block(figures_of(x, 0, l, mode), r, b, (const e4m3*)b->memory, r->slots, r->mu, x->exact, counts, counts + params, x->tops);
        }
        reduction_adapt(r, x->tops, &applied, r->stream);
    }
    free(counts);
}

// ---- virtual ranks ----

static void open_virtual(Experiment* x) {
    int params = x->blocks * x->block_params, most = x->ranks[x->counts - 1], own = ceil_div(x->blocks, processes(x)->size);
    size_t elements = 0;
    x->virtual_ranks = (VirtualRanks*)host_alloc((size_t)x->counts * sizeof(VirtualRanks));
    for (int c = 0; c < x->counts; c++) {
        VirtualRanks* v = &x->virtual_ranks[c];
        *v = VirtualRanks{};
        v->group.size = x->ranks[c];
        reduction_plan(&v->plan, &v->group, NULL, &x->table, config_of(AUTO));
        v->mu = (float*)host_alloc((size_t)params * sizeof(float));
        for (int i = 0; i < params; i++) { v->mu[i] = first_mu(SCALING_AUTO, x->ranks[c]); }
        elements = max_of(elements, v->plan.partition.buckets[0].elements);
    }
    size_t row = (size_t)x->virtual_ranks[0].plan.scale_row, bytes = (size_t)own * (size_t)x->batch * x->block_elements * sizeof(float);
    if (bytes + (size_t)most * elements > MAX_GRADIENT_BYTES) {
        bad_input("the gradients of %d micro-batches would take %.1f GiB of each process; at most %.0f are allowed: fewer virtual ranks, layers or a smaller "
            "--width need less", x->batch, (double)(bytes + (size_t)most * elements) / (1 << 30), (double)MAX_GRADIENT_BYTES / (1 << 30));
    }
    x->gradients = (float*)device_alloc(bytes);
    x->local_scales = (float*)device_alloc((size_t)x->batch * (size_t)params * sizeof(float));
    x->tensor_params = (int*)host_alloc((size_t)params * sizeof(int));
    for (int i = 0; i < params; i++) { x->tensor_params[i] = x->virtual_ranks[0].plan.partition.tensors[i].param; }
    auto take = [](size_t n, size_t each) { void* p = device_alloc(n * each); device_zero(p, n * each, NULL); return p; };
    x->amax = (uint32_t*)take((size_t)params, sizeof(uint32_t));
    x->accum_slots = (float*)take(4 * (size_t)params, sizeof(float));
    x->slots = (float*)take(4 * (size_t)params, sizeof(float));
    x->mu = (float*)take((size_t)params, sizeof(float));
    x->shared = (float*)take(row, sizeof(float));
    x->scales = (float*)take((size_t)most * row, sizeof(float));
    x->descales = (float*)take((size_t)most * row, sizeof(float));
    x->sum_amax = (uint32_t*)take(row, sizeof(uint32_t));
    x->counters = (CodeCounts*)take((size_t)params, sizeof(CodeCounts));
    x->sums = (float*)take(elements, sizeof(float));
    x->payload = (e4m3*)take((size_t)most * elements, 1);
    x->reduced = (e4m3*)take(elements, 1);
    run_rows(ResetSlots{x->accum_slots}, params, NULL);
}

static int own_block(const Experiment* x, int block) { return block / processes(x)->size; }
// of micro-batch `i`
static const float* gradient_of(const Experiment* x, int block, int i) {
    return x->gradients + ((size_t)own_block(x, block) * (size_t)x->batch + (size_t)i) * x->block_elements;
}

// After take_gradients: keeps the gradients of this process' blocks, of all processes' micro-batches, and what each of those would say of its scales
static void keep_gradients(Experiment* x, int round) {
    int size = processes(x)->size, params = x->blocks * x->block_params;
    const Reduction* plan = &x->virtual_ranks[0].plan;
    for (int l = 0; l < x->blocks; l++) {
        if (!owns(x, l)) { continue; }
        for (int p = 0; p < size; p++) {
            int i = round * size + p;
            float* g = (float*)gradient_of(x, l, i);
            memcpy(g, x->gathered + ((size_t)p * x->blocks + l) * x->block_elements, x->block_elements * sizeof(float));
            const Bucket* b = &plan->partition.buckets[l];
            each_tensor(plan, b, [=](Param* q, int, size_t first) {
                run_rows(AmaxPieces<float>{x->amax + (q - plan->table->items), g + first, param_elements(q)}, pieces_of(param_elements(q)), NULL);
            });
            run_rows(LocalScales{x->local_scales + (size_t)i * params + b->first, x->amax, x->accum_slots, x->tensor_params + b->first, largest_of(E4M3)},
                     b->count, NULL);
        }
    }
}

// Codes of all ranks' gradients into the payload; `scale_of(rank, tensor, number)` points to the scale
template <class Scale> static void make_payloads(Experiment* x, const Reduction* r, const Bucket* b, bool count, Scale scale_of) {
    each_tensor(r, b, [=](Param* p, int, size_t) { x->counters[p - r->table->items] = CodeCounts{0, 0, 0}; });
    for (int rank = 0; rank < r->group->size; rank++) {
        const float* g = gradient_of(x, b->layer, rank);
        each_tensor(r, b, [=](Param* p, int k, size_t first) {
            quantise(E4M3, x->payload + (size_t)rank * b->elements + first, FP32, g + first, NULL, scale_of(rank, p, k),
                     count ? x->counters + (p - r->table->items) : NULL, param_elements(p), NULL);
        });
    }
}

// Reduces a block over its virtual ranks into x->reduced and x->slots
static void virtual_ring(Experiment* x, const Reduction* r, const Bucket* b, const float* mu, bool count) {
    int ranks = r->group->size, params = x->blocks * x->block_params;
    for (int k = 0; k < b->count; k++) {  // the minimum of floats that are not negative is that of their bits
        x->shared[k] = x->local_scales[b->first + k];
        for (int rank = 1; rank < ranks; rank++) { x->shared[k] = min_of(x->shared[k], x->local_scales[(size_t)rank * params + b->first + k]); }
    }
    run_rows(RingSlots{x->slots, x->shared, mu, x->tensor_params + b->first}, b->count, NULL);
    make_payloads(x, r, b, count, [=](int, Param* p, int) { return x->slots + 4 * (p - r->table->items) + 1; });
    size_t part = chunk_of(r, b);
    for (int p = 0; p < ranks; p++) {  // part p starts at rank p+1, whose right neighbour adds its own codes to what arrives, and ends at rank p
        auto codes = [=](int rank) { return x->payload + (size_t)(rank % ranks) * b->elements + (size_t)p * part; };
        for (int hop = 1; hop < ranks; hop++) { hop_add(E4M3, codes(p + 1 + hop), codes(p + hop), part); }
        device_copy(x->reduced + (size_t)p * part, codes(p), part, NULL);
    }
}

static void virtual_direct(Experiment* x, const Reduction* r, const Bucket* b, bool count) {
    int ranks = r->group->size, params = x->blocks * x->block_params, row = r->scale_row;
    for (int rank = 0; rank < ranks; rank++) {
        memcpy(x->scales + (size_t)rank * row, x->local_scales + (size_t)rank * params + b->first, (size_t)b->count * sizeof(float));
    }
    run_rows(SenderDescales{x->descales, x->scales, row}, ranks, NULL);
    make_payloads(x, r, b, count, [=](int rank, Param*, int k) { return x->scales + (size_t)rank * row + k; });
    device_zero(x->sum_amax, (size_t)row * sizeof(uint32_t), NULL);
    each_tensor(r, b, [=](Param* p, int k, size_t first) {  // whole: an element's sum does not depend on whose part it is in
        size_t n = param_elements(p);
        run_rows(SumParts<e4m3>{x->sums + first, x->sum_amax + k, x->payload + first, x->descales + k, b->elements, ranks, row, n, false}, pieces_of(n), NULL);
    });
    run_rows(ResultSlots{x->slots, x->sum_amax, x->tensor_params + b->first, largest_of(E4M3)}, b->count, NULL);
    each_tensor(r, b, [=](Param* p, int, size_t first) {
        quantise(E4M3, x->reduced + first, FP32, x->sums + first, NULL, x->slots + 4 * (p - r->table->items) + 1, NULL, param_elements(p), NULL);
    });
}

// `mu`: of a ring that adapts; NULL: the mode's own. Leaves x->tops; figures where they are wanted.
static void virtual_mode(Experiment* x, int count, int block, int mode, const float* mu, bool describe) {
    VirtualRanks* v = &x->virtual_ranks[count];
    Reduction* r = &v->plan;
    const Bucket* b = &r->partition.buckets[block];
    r->config = config_of(mode);
    if (mu == NULL) {
        float fixed = mode == DIRECT ? 1.0f : first_mu(r->config.scaling, r->group->size);
        for (int i = 0; i < r->table->count; i++) { x->mu[i] = fixed; }
        mu = x->mu;
    }
    if (mode == DIRECT) { virtual_direct(x, r, b, describe); } else { virtual_ring(x, r, b, mu, describe); }
    count_tops(x->tops, r, b, x->reduced);
    if (!describe) { return; }
    int params = r->table->count;
    double* counts = (double*)host_alloc(2 * (size_t)params * sizeof(double));
    for (int i = 0; i < params; i++) { counts[i] = x->counters[i].underflow, counts[params + i] = x->counters[i].saturated; }
    double* figures = figures_of(x, count, block, mode);
    describe_block(figures, r, b, x->reduced, x->slots, mu, x->exact, counts, counts + params, x->tops);
    free(counts);
    // what comm.cuh counts: codes twice around, a vector of scales or amaxes reduced, and for direct another gathered
    uint64_t others = (uint64_t)r->group->size - 1, vector = 2 * (uint64_t)b->count * sizeof(float) * others / (uint64_t)r->group->size;
    uint64_t scales = vector + (mode == DIRECT ? (uint64_t)r->scale_row * sizeof(float) * others : 0);
    figures[SCALE_BYTES] = (double)scales;
    figures[BYTES_SENT] = (double)(2 * chunk_of(r, b) * others + scales);
}

// One step of auto's rule for the tensors of a block, then `growth` more without saturation
static void adapt(Experiment* x, float* mu, const Reduction* r, const Bucket* b, int growth) {
    each_tensor(r, b, [&](Param* p, int, size_t) {
        size_t i = (size_t)(p - r->table->items);
        if (!is_finite(x->slots[4 * i])) { return; }
        float before = mu[i];
        mu[i] = next_mu(before, x->tops[i], (double)param_elements(p), r->group->size);
        for (int k = 0; k < growth && mu[i] >= before; k++) { mu[i] = next_mu(mu[i], 0.0, (double)param_elements(p), r->group->size); }
    });
}

static void measure_virtual(Experiment* x, bool probe, bool last) {
    for (int l = 0; l < x->blocks; l++) {
        if (!owns(x, l)) { continue; }
        memset(x->exact, 0, x->block_elements * sizeof(double));
        for (int c = 0, added = 0; c < x->counts; added = x->ranks[c++]) {
            VirtualRanks* v = &x->virtual_ranks[c];
            const Bucket* b = &v->plan.partition.buckets[l];
            if (probe) { add_exactly(x->exact, gradient_of(x, l, 0), x->block_elements, added, x->ranks[c], x->block_elements); }
            for (int mode = 0; mode < MODES; mode++) {
                if (probe && mode != AUTO) { virtual_mode(x, c, l, mode, NULL, true); }
            }
            virtual_mode(x, c, l, AUTO, v->mu, probe);
            adapt(x, v->mu, &v->plan, b, 0);
            for (int round = 0; last && round < SETTLING_ROUNDS; round++) {
                virtual_mode(x, c, l, SETTLED, v->mu, false);
                adapt(x, v->mu, &v->plan, b, SETTLING_STEPS - 1);
            }
            if (last) { virtual_mode(x, c, l, SETTLED, v->mu, true); }
        }
    }
}

// ---- the run ----

static void open_experiment(Experiment* x, Run* r) {
    const GptConfig* c = &r->config;
    x->run = r;
    matrices_of(&x->table, &r->model);
    x->blocks = c->layers;
    x->block_params = x->table.count / c->layers;
    for (int i = 0; i < x->block_params; i++) { x->block_elements += round_up(param_elements(&x->table.items[i]), PARAM_ALIGNMENT); }
    x->batch = r->micro_batches * r->topology.data.size;
    size_t all = (size_t)x->blocks * x->block_elements * sizeof(float);
    x->mine = (float*)device_alloc(all);
    memset(x->mine, 0, all);  // the gaps between tensors
    x->gathered = (float*)device_alloc(all * (size_t)r->topology.data.size);
    x->exact = (double*)host_alloc(x->block_elements * sizeof(double));
    x->rows = (double*)host_alloc((size_t)x->counts * (size_t)x->blocks * ALL_MODES * FIGURES * sizeof(double));
    x->tops = (double*)host_alloc((size_t)x->table.count * sizeof(double));
    if (x->real) { open_real(x); } else { open_virtual(x); }
}

static void write_rows(Experiment* x, FILE* csv, int64_t step, bool last) {
    Group* g = processes(x);
    host_all_reduce_sum(g, x->rows, x->counts * x->blocks * ALL_MODES * FIGURES);
    if (g->rank != 0) { return; }
    for (int c = 0; c < x->counts; c++) {
        for (int l = 0; l < x->blocks; l++) {
            for (int mode = 0; mode < (last && !x->real ? ALL_MODES : MODES); mode++) {
                const double* f = figures_of(x, c, l, mode);
                fprintf(csv, "%s,%d,%" PRId64 ",%d,%s,%.9g,%.9g,%.6f,%.9g,%.9g,%.0f,%.0f\n", x->real ? "real" : "virtual", x->ranks[c], step, l,
                        mode_names[mode], f[ZEROED], f[AT_TOP], f[SNR_DB], f[MU_MIN], f[MU_MAX], f[BYTES_SENT], f[SCALE_BYTES]);
            }
        }
    }
    if (fflush(csv) != 0) { die("the rows cannot be written: %s", strerror(errno)); }
}

// One micro-batch after the other as the first of a step: the gradients of each are in the accumulators by themselves, and added up in `sums`
static void gradients_of_step(Experiment* x, float* sums, float weight) {
    Run* r = x->run;
    Model* m = &r->model;
    LossTotal loss = {};
    memset(sums, 0, m->params.elements * sizeof(float));
    for (int k = 0; k < r->micro_batches; k++) {
        HostBatch* batch = &r->batches[0];
        loader_next(&r->train, batch->tokens, batch->targets);
        step_begin(m);
        micro_forward(m, batch, 0);
        micro_backward(m, batch, 0, false, weight);
        loss.loss += m->loss_total->loss;
        loss.counted += m->loss_total->counted;
        for (int i = 0; i < m->params.count; i++) {
            const Param* p = &m->params.items[i];
            const float* g = (const float*)p->accumulator;
            float* sum = sums + p->offset;
            for (size_t e = 0; e < param_elements(p); e++) { sum[e] += g[e]; }
        }
        if (!x->real || k == 0) { take_gradients(x); }
        if (!x->real) { keep_gradients(x, k); }
    }
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        memcpy(p->accumulator, sums + p->offset, param_elements(p) * sizeof(float));
    }
    *m->loss_total = loss;
}

static void train_and_probe(Experiment* x, FILE* csv, int64_t probe_every) {
    Run* r = x->run;
    const Args* a = &r->args;
    Model* m = &r->model;
    StepSettings settings = {};
    settings.rules = DecisionRules{a->beta1, a->beta2, (float)a->clip, 0.0f, 0.0f};
    settings.weight_decay = (float)a->weight_decay;
    float weight = token_weight(a->global_batch);
    float* sums = (float*)device_alloc(m->params.elements * sizeof(float));
    for (int64_t step = 0; step < r->steps; step++) {
        double start = wall_seconds(), lr = learning_rate(a->schedule, a->lr, a->min_lr_frac, r->warmup, step, r->steps);
        bool last = step == r->steps - 1, probe = step % probe_every == 0 || last;
        topology_forget_sent(&r->topology);
        gradients_of_step(x, sums, weight);
        memset(x->rows, 0, (size_t)x->counts * (size_t)x->blocks * ALL_MODES * FIGURES * sizeof(double));
        if (x->real) { measure_real(x, probe); } else { measure_virtual(x, probe, last); }
        if (probe) { write_rows(x, csv, step, last); }
        settings.rates = AdamRates{(float)lr, (float)a->beta1, (float)a->beta2, (float)a->eps, 0.0f};
        finish_step(m, &settings, a->global_batch);
        StepRecord record = read_record(m);
        if (record.skipped != NOT_SKIPPED) { die("step %" PRId64 " was skipped: %s", step + 1, skip_names[record.skipped]); }
        uint64_t sent[COMM_OPERATIONS];
        topology_sent(sent, &r->topology);
        show_step(r, step, &record, lr, wall_seconds() - start, sent);
    }
    device_free(sums);
}

// "2,4,8": rising powers of two, so that gradients differ from run to run by exact factors alone
static int parse_ranks(int* ranks, const char* text) {
    int n = 0;
    for (const char* p = text;; p++) {
        char* end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 2 || v > 4096 || (v & (v - 1)) != 0 || (n > 0 && v <= ranks[n - 1]) || n == MAX_RANK_COUNTS || (*end != ',' && *end != '\0')) {
            bad_input("ranks: %s is not allowed; up to %d rising powers of two from 2 to 4096, 2,4,8", quoted(text).text, MAX_RANK_COUNTS);
        }
        ranks[n++] = (int)v;
        p = end;
        if (*p == '\0') { return n; }
    }
}

int main(int argc, char** argv) {
    static Run run;
    static Experiment x;
    if (argc < 5 || (strcmp(argv[1], "real") != 0 && strcmp(argv[1], "virtual") != 0)) {
        bad_input("usage: exp1_scaling real|virtual ROWS.csv PROBE_EVERY RANKS[,RANKS…] [flags of train_gpt_fp8]");
    }
    if (device_is_gpu) { bad_input("this experiment looks into memory that is a GPU's here; make DEVICE=cpu experiments builds it for the CPU"); }
    int64_t probe_every = strtol(argv[3], NULL, 10);
    if (probe_every < 1) { bad_input("PROBE_EVERY: %s is not a whole number above 0", quoted(argv[3]).text); }
    x.real = strcmp(argv[1], "real") == 0;
    x.counts = parse_ranks(x.ranks, argv[4]);
    setup(&run, argc - 4, argv + 4);  // the list of ranks stands where the program's name does
    const GptConfig* c = &run.config;
    if (!c->fp8 || c->bf16_layers.first + c->bf16_layers.last > 0 || c->accum != FP32 || c->wire != FP32) {
        bad_input("all modes must see the same gradients, in FP32: give --recipe fp8 --grad-dtype fp32 --grad-accum-dtype fp32");
    }
    int batch = run.micro_batches * run.topology.data.size;
    if (x.real && (x.counts != 1 || x.ranks[0] != run.topology.data.size)) { bad_input("ranks: %s, but there are %d processes", argv[4], run.topology.data.size); }
    if (!x.real && x.ranks[x.counts - 1] > batch) { bad_input("ranks: %s, but a step has only %d micro-batches", argv[4], batch); }
    open_experiment(&x, &run);
    FILE* csv = NULL;
    if (run.topology.data.rank == 0 && (csv = fopen(argv[2], "w")) == NULL) { die("cannot write '%s': %s", argv[2], strerror(errno)); }
    train_and_probe(&x, csv, probe_every);
    if (csv != NULL && fclose(csv) != 0) { die("cannot write '%s': %s", argv[2], strerror(errno)); }
    teardown(&run);
    return 0;
}
