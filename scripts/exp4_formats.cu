// exp4_formats.cu: experiment 4: what E4M3, E5M2 and, for v, UE5M3 do to the tensors of a real training run, class by class.
// scripts/exp4_formats.sh runs it and judges what it measures.
//
//     exp4_formats ROWS.csv PROBE_EVERY [flags of the trainer]
//
// It trains a GPT with the trainer's own steps: X, W and dY in FP8 as the flags say, gradients and optimizer states in FP32, so that these are known
// exactly. At probe steps the live tensors are quantised in every format, at the scale that the trainer would give them, and compared with what they were:
// none of it has an effect on the training. The classes:
//
//   x, dy      inputs of the linear layers and gradients of their outputs, in BF16 as they are made, with a scale from the amaxes of the last 16 steps, or
//              from their own under --fp8-scaling current and before there are 16. They are seen by taking the probe's batch through the model once
//              more, with scales just in time; of that pass nothing else is used.
//   w          master weights after the step, and wgrad, the weights' gradients of the micro-batch: a scale a tensor, from its amax
//   m, v       moments after the step, with a scale every 128 elements, rounded to nearest
//   step_m     what AdamW subtracts, m/(1-β1^t) / (√(v/(1-β2^t)) + ε), with m in that format and v exact; step_v: with v in it and m exact. In the SNR of v itself
//              only the largest elements count; in the step all do, and a v that has become 0 makes it huge. Shares are those of that m or v.
#define TESTING  // main() is ours
#include "../train_gpt_fp8.cu"

struct Probe {
    Run* run;
    FILE* csv;
    int64_t step;
    float *values, *rounded, *step_exact, *step_rounded;  // (largest tensor)
};
static Probe probe;  // what Sites shows tensors to has no other way to it

constexpr size_t WHOLE = 0;  // a tensor as one block

struct Shares {
    double zeroed;     // of what is not 0, what becomes 0
    double saturated;  // of the same, what is beyond the format's range
    double top;        // the largest value, times its scale, of the format's largest: by its own amax from 1/2 to 1
};

// rounded (n) = x as the format holds it, with a scale from the amax of every `block` elements, or with `scale` where that is not 0
template <class F> static Shares round_trip(float* rounded, const float* x, size_t n, DType format, size_t block, float scale) {
    size_t some = block == WHOLE ? n : block, zeros = 0, tops = 0, all = 0;
    float largest = largest_of(format), top = 0.0f;
    for (size_t first = 0; first < n; first += some) {
        size_t end = min_of(first + some, n);
        float amax = 0.0f;
        for (size_t i = first; i < end; i++) { amax = max_of(amax, fabsf(x[i])); }
        float s = scale > 0.0f ? scale : scale_from_amax(amax, largest, 0, 1.0f);
        top = max_of(top, amax * s / largest);
        for (size_t i = first; i < end; i++) {
            rounded[i] = round_to<F>(x[i] * s) / s;
            all += x[i] != 0.0f;
            zeros += x[i] != 0.0f && rounded[i] == 0.0f;
            tops += fabsf(x[i]) * s > largest;
        }
    }
    double count = (double)max_of(all, (size_t)1);
    return Shares{(double)zeros / count, (double)tops / count, (double)top};
}

// f(format, Tag<F>) for those that a class may be in; UE5M3 has no sign
template <class Each> static void each_format(bool is_signed, Each f) {
    f(E4M3, Tag<e4m3>{});
    f(E5M2, Tag<e5m2>{});
    if (!is_signed) { f(UE5M3, Tag<ue5m3>{}); }
}

// A tensor of zeros, and one that a format holds exactly, have no ratio, and get no row
static void write_row(const char* tensor_class, const char* tensor, DType format, const float* exact, const float* rounded, size_t n, const Shares& of) {
    double signal = 0.0, noise = 0.0;
    for (size_t i = 0; i < n; i++) {
        double error = (double)rounded[i] - (double)exact[i];
        signal += (double)exact[i] * (double)exact[i];
        noise += error * error;
    }
    if (signal == 0.0 || noise == 0.0) { return; }
    fprintf(probe.csv, "%" PRId64 ",%s,%s,%s,%.4f,%.9g,%.9g,%.6g\n", probe.step, tensor_class, tensor, dtype_names[format], 10.0 * log10(signal / noise),
            of.zeroed, of.saturated, of.top);
}

// x (n) in every format, with scale_of(format), or where that is 0 with scales by block; then after(format, shares), with what x has become in probe.rounded
template <class ScaleOf, class After>
static void measure(const char* tensor_class, const char* tensor, const float* x, size_t n, size_t block, bool is_signed, ScaleOf scale_of, After after) {
    each_format(is_signed, [&](DType format, auto tag) {
        Shares of = round_trip<typename decltype(tag)::type>(probe.rounded, x, n, format, block, scale_of(format));
        write_row(tensor_class, tensor, format, x, probe.rounded, n, of);
        after(format, of);
    });
}
static float own_scale(DType) { return 0.0f; }
static void no_more(DType, const Shares&) {}

// The trainer is about to quantise x (rows, C) at a site: X in the forward pass, dY in the backward pass
static void see(int site, const void* x, int rows, int C) {
    static const char* const names[LINEARS] = {"qkv", "attproj", "fc", "fcproj"};  // in the order of Site
    const Model* m = &probe.run->model;
    size_t n = (size_t)rows * (size_t)C;
    int place = site % SITES_PER_LAYER;
    char tensor[32];
    snprintf(tensor, sizeof(tensor), "h%d.%s", site / SITES_PER_LAYER, names[place % LINEARS]);
    for (size_t i = 0; i < n; i++) { probe.values[i] = to_float(((const bf16*)x)[i]); }
    // The site's scale is that of the format in use; for the other it is as much larger as its range is, a power of two. 0: from x itself
    DType used = place < DY_QKV ? m->config.fp8_fwd : m->config.fp8_bwd;
    bool delayed = probe.run->args.fp8_scaling == SCALING_DELAYED && m->steps_recorded >= AMAX_WINDOW;
    float scale = delayed ? m->sites.slots[4 * site + 1] : 0.0f;
    measure(place < DY_QKV ? "x" : "dy", tensor, probe.values, n, WHOLE, true, [=](DType format) { return scale * (largest_of(format) / largest_of(used)); }, no_more);
}

static void take_step(float* step, const float* m, const float* v, size_t n) {
    const OptimizerState* s = probe.run->model.optimizer.state;
    float eps = (float)probe.run->args.eps;
    for (size_t i = 0; i < n; i++) { step[i] = m[i] * s->correction1 / (sqrtf(v[i] * s->correction2) + eps); }
}

static void measure_gradients(const Model* m) {
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (p->format_class == MATRIX) { measure("wgrad", p->name, (const float*)p->accumulator, param_elements(p), WHOLE, true, own_scale, no_more); }
    }
}

static void measure_states(const Model* model) {
    for (int i = 0; i < model->params.count; i++) {
        const Param* p = &model->params.items[i];
        if (p->format_class != MATRIX) { continue; }
        size_t n = param_elements(p);
        const float *w = (const float*)p->master.data, *m = (const float*)p->m.data, *v = (const float*)p->v.data;
        measure("w", p->name, w, n, WHOLE, true, own_scale, no_more);
        take_step(probe.step_exact, m, v, n);
        measure("m", p->name, m, n, STATE_BLOCK, true, own_scale, [=](DType format, const Shares& of) {
            take_step(probe.step_rounded, probe.rounded, v, n);
            write_row("step_m", p->name, format, probe.step_exact, probe.step_rounded, n, of);
        });
        measure("v", p->name, v, n, STATE_BLOCK, false, own_scale, [=](DType format, const Shares& of) {
            take_step(probe.step_rounded, m, probe.rounded, n);
            write_row("step_v", p->name, format, probe.step_exact, probe.step_rounded, n, of);
        });
    }
}

// The batch once more, with scales just in time: x and dy. The step's own pass begins its gradients and amaxes anew or has the same.
static void look_at_activations(Model* m, HostBatch* batch, float weight) {
    FP8Scaling scaling = m->config.scaling;
    m->config.scaling = SCALING_CURRENT;
    m->sites.seen = see;
    step_begin(m);
    micro_forward(m, batch, 0);
    micro_backward(m, batch, 0, false, weight);
    m->sites.seen = NULL;
    m->config.scaling = scaling;
}

static void train_and_probe(Run* r, int64_t probe_every) {
    const Args* a = &r->args;
    Model* m = &r->model;
    StepSettings settings = {};
    settings.rules = DecisionRules{a->beta1, a->beta2, (float)a->clip, 0.0f, 0.0f};
    settings.weight_decay = (float)a->weight_decay;
    float weight = token_weight(a->global_batch);
    HostBatch* batch = &r->batches[0];
    for (int64_t step = 0; step < r->steps; step++) {
        double start = wall_seconds(), lr = learning_rate(a->schedule, a->lr, a->min_lr_frac, r->warmup, step, r->steps);
        bool probes = step % probe_every == 0 || step == r->steps - 1;
        probe.step = step;
        loader_next(&r->train, batch->tokens, batch->targets);
        if (probes) { look_at_activations(m, batch, weight); }
        step_begin(m);
        micro_forward(m, batch, 0);
        micro_backward(m, batch, 0, true, weight);
        if (probes) { measure_gradients(m); }
        settings.rates = AdamRates{(float)lr, (float)a->beta1, (float)a->beta2, (float)a->eps, 0.0f};
        finish_step(m, &settings, a->global_batch);
        StepRecord record = read_record(m);
        if (record.skipped != NOT_SKIPPED) { die("step %" PRId64 " was skipped: %s", step + 1, skip_names[record.skipped]); }
        if (probes) { measure_states(m); }
        uint64_t sent[COMM_OPERATIONS] = {};
        show_step(r, step, &record, lr, wall_seconds() - start, sent);
    }
}

int main(int argc, char** argv) {
    static Run run;
    if (argc < 4) { bad_input("usage: exp4_formats ROWS.csv PROBE_EVERY [flags of train_gpt_fp8]"); }
    if (device_is_gpu) { bad_input("this experiment looks into memory that is a GPU's here; make DEVICE=cpu experiments builds it for the CPU"); }
    int64_t probe_every = strtol(argv[2], NULL, 10);
    if (probe_every < 1) { bad_input("PROBE_EVERY: %s is not a whole number above 0", quoted(argv[2]).text); }
    setup(&run, argc - 2, argv + 2);  // PROBE_EVERY stands where the program's name does
    const GptConfig* c = &run.config;
    bool all_fp8 = c->fp8 && c->bf16_layers.first + c->bf16_layers.last == 0 && c->fp8_min_size == 0;
    if (!all_fp8 || c->accum != FP32 || c->wire != FP32 || c->master != FP32 || c->m != FP32 || c->v != FP32) {
        bad_input("what is measured must be known exactly: give --recipe fp8 --grad-dtype fp32 --grad-accum-dtype fp32 --master-dtype fp32 --m-dtype fp32 "
            "--v-dtype fp32");
    }
    if (by_block(c)) { bad_input("--fp8-scaling block: a block is scaled as it is quantised, and no scale is there to be looked at; give delayed or current"); }
    if (run.topology.world.size > 1 || run.micro_batches != 1) {
        bad_input("one process and one micro-batch a step are looked at: here are %d and %d", run.topology.world.size, run.micro_batches);
    }
    size_t most = (size_t)rows_of(&run.model) * 4 * (size_t)c->width;
    for (int i = 0; i < run.model.params.count; i++) { most = max_of(most, param_elements(&run.model.params.items[i])); }
    for (float** x : {&probe.values, &probe.rounded, &probe.step_exact, &probe.step_rounded}) { *x = (float*)host_alloc(most * sizeof(float)); }
    probe.run = &run;
    if ((probe.csv = fopen(argv[1], "w")) == NULL) { die("cannot write '%s': %s", argv[1], strerror(errno)); }
    fprintf(probe.csv, "step,class,tensor,format,snr_db,zeroed,saturated,top\n");
    train_and_probe(&run, probe_every);
    if (fclose(probe.csv) != 0) { die("cannot write '%s': %s", argv[1], strerror(errno)); }
    teardown(&run);
    return 0;
}
