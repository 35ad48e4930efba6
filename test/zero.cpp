// zero.cpp: training with ZeRO 1 and 2, whole matrices and flat parts, against training without: every loss, norm and memory, and in the end every bit of
// weights, scales and optimizer states, wherever they are.
//
// With gradients in FP32, exchanged directly, the arithmetic is the same, and so is everything else. In the middle of each run one rank has a gradient that is
// not finite: the step is skipped, and leaves no trace.
#define TESTING
#include "../train_gpt_fp8.cu"
#include "launch.h"
#include "step.h"
#include <vector>

// ---- what a run is ----

struct Setting {
    const char* name;
    GptConfig config;
    int micro_batches;
    float clip;
};

struct Outcome {
    std::vector<StepRecord> records;
    std::vector<double> validated;  // losses in between
    uint64_t initial, weights, states;  // hashes; the first of the states before the first step
    uint64_t sent[COMM_OPERATIONS];  // in the last step; they are what is planned
    double bytes[MEMORY_CATEGORIES];  // of all ranks together
};

static GptConfig config_of(int layers, DType act, bool fp8) {
    GptConfig c = {};
    c.layers = layers;
    c.heads = 2;
    c.width = 64;
    c.vocab = 100;
    c.padded_vocab = 128;
    c.positions = c.T = 16;
    c.B = 2;
    c.rope = c.tied = true;
    c.act = act;
    c.fp8 = fp8;
    c.scaling = SCALING_DELAYED;
    c.fp8_fwd = E4M3;
    c.fp8_bwd = E5M2;
    c.seed = 7;
    c.reduction.algorithm = REDUCE_DIRECT;  // all else in FP32
    c.reduction.scaling = SCALING_AUTO;
    return c;
}

// Past the 16 steps after which delayed scales come from the window
static int steps_of_a_run(const Group* g) { return getenv("SOAK") != NULL ? 200 : g->size > 4 ? 24 : 50; }

// ---- what is left of it ----

// Of what the forward pass reads: alike on every rank
static uint64_t hash_weights(Model* m, Group* g) {
    uint64_t h = 1, all[8];
    weights_finish(&m->reduction, m->stream);
    stream_sync(m->stream);
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        size_t bytes = param_elements(p) * (size_t)dtype_bytes(p->dtype);
        h = hash_bytes(h, from_device<char>(p->weight, bytes).data(), bytes);
        if (p->slot != NULL) { h = hash_bytes(h, from_device<char>(p->slot, 8).data(), 8); }
        size_t descales = p->block_descales == NULL ? 0 : (size_t)(ceil_div(p->rows, (int64_t)SCALE_BLOCK) * block_pitch(p->cols));
        if (descales > 0) { h = hash_bytes(h, from_device<char>(p->block_descales, 4 * descales).data(), 4 * descales); }
    }
    host_all_gather(g, all, &h, sizeof(h));
    for (int r = 0; r < g->size; r++) { CHECK(all[r] == h, "rank %d has other weights", r); }
    return h;
}

// A sum over elements, blocks and tensors, each hashed with its number: whoever keeps them
static uint64_t hash_states(const Model* m, Group* g) {
    uint64_t slots = 1, sum = 0, all[8];
    bool keeps = zero_level(&m->reduction) > 0 || g->rank == 0;  // without ZeRO all keep the same
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        const OptimizerTensor* const states[] = {&p->master, &p->m, &p->v};
        for (int kind = 0; kind < 3; kind++) {
            const OptimizerTensor* t = states[kind];
            size_t each = (size_t)dtype_bytes(t->dtype), blocks = (p->own_count + 127) / 128;
            uint64_t name = mix64((uint64_t)(4 * i + kind));
            std::vector<char> values = from_device<char>(t->data, p->own_count * each), exponents = from_device<char>(t->exponents, t->exponents != NULL ? blocks : 0);
            for (size_t k = 0; keeps && k < p->own_count; k++) { sum += hash_bytes(mix64(name ^ (p->own_first + k)), &values[k * each], each); }
            for (size_t k = 0; keeps && k < exponents.size(); k++) { sum += mix64(name ^ 77 ^ ((p->own_first / 128 + k) << 20 | (unsigned char)exponents[k])); }
            if (t->slot != NULL) { slots = hash_bytes(slots, from_device<char>(t->slot, 8).data(), 8); }
        }
    }
    host_all_gather(g, all, &slots, sizeof(slots));
    for (int r = 0; r < g->size; r++) { CHECK(all[r] == slots, "rank %d has other scales of states", r); }
    host_all_gather(g, all, &sum, sizeof(sum));
    sum = slots;
    for (int r = 0; r < g->size; r++) { sum += all[r]; }
    return sum;
}

static double over_ranks(Group* g, size_t bytes) {
    double sum = (double)bytes;
    host_all_reduce_sum(g, &sum, 1);
    return sum;
}

// Of the same sequences each time, with weights that are still on their way
static double validation_loss(Model* m, Group* g, HostBatch* batch) {
    fill_batch(batch, &m->config, 1000000 + g->rank * m->config.B);
    upload_batch(m, batch);
    device_zero(m->loss_total, sizeof(LossTotal), m->stream);
    forward(m, m->config.B, INFER);
    head_loss(m, m->config.B, false, 0.0f);
    LossTotal total;
    copy_to_host(&total, m->loss_total, sizeof(total), m->stream);
    host_all_reduce_sum(g, &total.loss, 1);
    return total.loss;
}

static Topology topology;  // all ranks are replicas

static Outcome train_with(Group* g, const Setting* s, int level, ZeroSplit split) {
    GptConfig config = s->config;
    config.layout = topology.layout;
    config.reduction.zero = ZeroConfig{level, split};
    Model* m = (Model*)host_alloc(sizeof(Model));
    Memory memory = {};
    Outcome out = {};
    model_plan(m, &config, &topology, &memory);
    model_commit(m, &memory);
    model_set_weights(m, NULL);
    out.initial = hash_states(m, g);
    HostBatch batch = host_batch_create(rows_of(m));
    StepSettings settings = {};
    settings.rules = DecisionRules{0.9, 0.95, s->clip, 0.0f, 0.0f};
    settings.rates = AdamRates{3e-3f, 0.9f, 0.95f, 1e-8f, 0.0f};
    settings.weight_decay = 0.1f;
    int64_t global_batch = rows_of(m) * g->size * s->micro_batches;
    float weight = token_weight(global_batch);
    int steps = steps_of_a_run(g), poisoned = steps / 3;
    uint64_t before[COMM_OPERATIONS] = {};
    for (int step = 0; step < steps; step++) {
        memcpy(before, g->bytes_sent, sizeof(before));
        for (int k = 0; k < s->micro_batches; k++) {
            fill_batch(&batch, &config, (int64_t)((step * s->micro_batches + k) * g->size + g->rank) * config.B);
            micro_step(m, &batch, k, k == s->micro_batches - 1, step == poisoned && g->rank == g->size - 1 && k == 0 ? NAN : weight);
        }
        finish_step(m, &settings, global_batch);
        for (int op = 0; op < COMM_OPERATIONS; op++) { out.sent[op] = g->bytes_sent[op] - before[op]; }
        out.records.push_back(read_record(m));
        CHECK(out.records.back().skipped == (step == poisoned ? SKIP_NON_FINITE_NORM : NOT_SKIPPED), "%s: step %d: %d", s->name, step, out.records.back().skipped);
        if (step % 7 == 2) { out.validated.push_back(validation_loss(m, g, &batch)); }
    }
    out.weights = hash_weights(m, g);
    out.states = hash_states(m, g);
    for (int k = 0; k < MEMORY_CATEGORIES; k++) { out.bytes[k] = over_ranks(g, memory.bytes[k]); }
    uint64_t planned[COMM_OPERATIONS] = {};
    reduction_traffic(planned, &m->reduction, s->micro_batches);
    for (int op = 0; op < COMM_OPERATIONS; op++) {
        bool decides = op == ALL_REDUCE_SUM || op == ALL_REDUCE_MAX;  // norm, counts, amaxes: not of the reduction
        CHECK(decides || out.sent[op] == planned[op], "%s: %s: %" PRIu64 ", not %" PRIu64, s->name, comm_names[op], out.sent[op], planned[op]);
    }
    double first = out.records[0].loss, last = out.records.back().loss;
    CHECK(last < first - 0.5, "%s: from %g to %g: does not learn", s->name, first, last);
    model_free(m, &memory);
    host_batch_free(&batch);
    free(m);
    return out;
}

// ---- comparison ----

static bool same_bits(double a, double b) { return memcmp(&a, &b, sizeof(a)) == 0 || (isnan(a) && isnan(b)); }
static double apart(double a, double b) { return isnan(a) && isnan(b) ? 0.0 : fabs(a - b) / fabs(a); }

// `norms`: may differ in their last bits, where gradients are kept in another format
static void expect_same(const char* name, const char* mode, const Outcome& want, const Outcome& got, bool norms) {
    for (size_t i = 0; i < want.records.size(); i++) {
        const StepRecord &a = want.records[i], &b = got.records[i];
        CHECK(same_bits(a.loss, b.loss), "%s, %s: loss %zu: %.17g, not %.17g", name, mode, i, b.loss, a.loss);
        CHECK(same_bits(a.grad_norm, b.grad_norm) || (norms && apart(a.grad_norm, b.grad_norm) < 1e-6), "%s, %s: norm %zu: %.17g, not %.17g", name, mode, i,
            b.grad_norm, a.grad_norm);
        CHECK(a.skipped == b.skipped && a.applied == b.applied, "%s, %s: step %zu", name, mode, i);
    }
    CHECK(want.validated == got.validated && want.validated.size() >= 3, "%s, %s: other losses in validation", name, mode);
    CHECK(want.initial == got.initial, "%s, %s: other states at the beginning", name, mode);
    CHECK(want.weights == got.weights, "%s, %s: other weights", name, mode);
    CHECK(want.states == got.states, "%s, %s: other states", name, mode);
}

static void expect_close(const Group* g, const char* name, const char* mode, const Outcome& want, const Outcome& got, double losses, double norms) {
    double worst_loss = 0.0, worst_norm = 0.0;
    for (size_t i = 0; i < want.records.size(); i++) {
        worst_loss = fmax(worst_loss, apart(want.records[i].loss, got.records[i].loss));
        worst_norm = fmax(worst_norm, apart(want.records[i].grad_norm, got.records[i].grad_norm));
    }
    if (g->rank == 0 && getenv("V") != NULL) { printf("%s, %s: losses %.2g, norms %.2g apart\n", name, mode, worst_loss, worst_norm); }
    CHECK(worst_loss <= losses && worst_norm <= norms, "%s, %s: losses %.3g, norms %.3g apart", name, mode, worst_loss, worst_norm);
}

static const struct { const char* name; int level; ZeroSplit split; } modes[] = {
    {"ZeRO 1, flat", 1, SPLIT_FLAT}, {"ZeRO 1, whole", 1, SPLIT_TENSOR}, {"ZeRO 2, flat", 2, SPLIT_FLAT}, {"ZeRO 2, whole", 2, SPLIT_TENSOR}};

// ---- what the ranks check ----

static Setting setting(const char* name, GptConfig c) { return Setting{name, c, 1, 1.0f}; }

static void narrow_states(GptConfig* c, bool by_block, bool stochastic) {
    c->master = FP16;
    c->m = E4M3;
    c->v = FP16;
    c->optimizer = OptimizerConfig{by_block, stochastic ? STOCHASTIC : NEAREST, stochastic ? STOCHASTIC : NEAREST, 11};
}

// FP32 gradients, one reduction a step: nothing may differ
static void check_same(Group* g, const std::vector<Setting>& settings) {
    for (const Setting& s : settings) {
        Outcome without = train_with(g, &s, 0, SPLIT_FLAT);
        for (auto& mode : modes) {
            Outcome with = train_with(g, &s, mode.level, mode.split);
            expect_same(s.name, mode.name, without, with, false);
            double ranks = (double)g->size, whole = without.bytes[OPTIMIZER] / ranks, held = with.bytes[OPTIMIZER];
            // all ranks together hold the states once, and each by itself slots, sums of pieces, and the windows of scales
            if (s.config.layers > 1) { CHECK(held >= whole && held < whole * (1.0 + 0.12 * ranks), "%s, %s: %g bytes, not %g", s.name, mode.name, held, whole); }
        }
    }
}

static std::vector<Setting> all_settings(void) {
    std::vector<Setting> list = {setting("fp8", config_of(2, BF16, true)), setting("bf16", config_of(2, BF16, false))};
    GptConfig c = config_of(2, BF16, true);
    c.width = 144;  // blocks of fc's and qkv's rows begin within what another rank keeps
    c.scaling = SCALING_BLOCK;
    list.push_back(setting("fp8 by block", c));
    c = config_of(3, FP32, false);  // the weights are the masters
    c.tied = c.rope = false;                  // and the head has a gradient of its own
    c.positions = 24;
    list.push_back(setting("fp32, head by itself", c));
    for (bool by_block : {false, true}) {
        c = config_of(2, BF16, true);
        narrow_states(&c, by_block, by_block);
        c.embeddings_as_matrices = by_block;
        c.bf16_layers.first = by_block ? 0 : 1;
        list.push_back(setting(by_block ? "narrow states by block, stochastic" : "narrow states by tensor", c));
    }
    return list;
}

// More ranks than matrices; matrices that are longer than the mean of the ranks
static void check_few(Group* g) {
    GptConfig c = config_of(1, BF16, true);
    Setting s = setting("one layer", c);
    narrow_states(&c, false, true);
    c.master = E4M3;
    check_same(g, {s, setting("one layer, narrow states", c)});
}

// E4M3, direct: ZeRO keeps the sums, and all of its modes the same ones; without it they are rounded once to be sent back
static void check_direct(Group* g) {
    GptConfig c = config_of(2, BF16, true);
    c.accum = BF16;
    c.accum_rounding = STOCHASTIC;
    c.wire = E4M3;
    c.embeddings_as_matrices = true;
    Setting s = setting("E4M3, direct", c);
    Outcome without = train_with(g, &s, 0, SPLIT_FLAT), first = train_with(g, &s, 1, SPLIT_FLAT);
    expect_close(g, s.name, "with and without ZeRO", without, first, 0.03, 0.25);
    for (auto& mode : modes) {
        if (mode.level == 1 && mode.split == SPLIT_FLAT) { continue; }
        expect_same(s.name, mode.name, first, train_with(g, &s, mode.level, mode.split), false);
    }
}

// The paper's ring: with two ranks a sum has one order, else the order of additions depends on where parts begin. No clipping: its factor meets codes in one
// mode and values in another. What bounds allow here and below is 5 to 10 times what was seen.
static void check_ring(Group* g) {
    GptConfig c = config_of(2, BF16, true);
    c.accum = c.wire = E4M3;
    c.reduction.algorithm = REDUCE_RING;
    narrow_states(&c, false, false);
    Setting s = setting("fp8-lm", c);
    s.clip = 0.0f;
    Outcome without = train_with(g, &s, 0, SPLIT_FLAT);
    for (auto& mode : modes) {
        Outcome with = train_with(g, &s, mode.level, mode.split);
        if (g->size == 2) { expect_same(s.name, mode.name, without, with, mode.level == 2); }
        else if (mode.split == SPLIT_FLAT) { expect_close(g, s.name, mode.name, without, with, 5e-3, 0.05); }  // but for vectors the same parts
        else { expect_close(g, s.name, mode.name, without, with, 0.05, 0.25); }
    }
}

// Several micro-batches: ZeRO 1 adds them up before the ranks, ZeRO 2 those of matrices after, and sends them as often. The embedding and vectors go once.
static void check_micro_batches(Group* g) {
    for (DType wire : {FP32, E4M3}) {
        GptConfig c = config_of(3, wire == FP32 ? FP32 : BF16, wire != FP32);  // two layers' gradients are there at a time
        c.accum = wire == FP32 ? FP32 : BF16;
        c.accum_rounding = STOCHASTIC;
        c.wire = wire;
        c.B = 1;
        Setting s = setting(wire == FP32 ? "three micro-batches, fp32" : "three micro-batches, fp8", c);
        s.micro_batches = 3;
        Outcome without = train_with(g, &s, 0, SPLIT_FLAT), first[2];
        for (auto& mode : modes) {
            Outcome with = train_with(g, &s, mode.level, mode.split);
            if (wire == FP32) { expect_close(g, s.name, mode.name, without, with, mode.level == 1 ? 0.0 : 1e-5, 1e-5); }
            else { expect_close(g, s.name, mode.name, without, with, 0.03, 0.25); }
            Outcome& one = first[mode.split];
            if (mode.level == 1) { one = with; continue; }
            uint64_t ranks = (uint64_t)g->size, embedding = ((uint64_t)c.padded_vocab * (uint64_t)c.width + 4096 * ranks - 1) / (4096 * ranks) * 4096 * 4 * (ranks - 1);
            for (CommOperation op : {ALL_TO_ALL, REGROUP, VECTORS}) {
                bool some = over_ranks(g, (size_t)one.sent[op]) > 0.0;
                uint64_t once = op == ALL_TO_ALL ? embedding : op == VECTORS ? one.sent[op] : 0;
                CHECK(with.sent[op] - once == 3 * (one.sent[op] - once) && some == (op != REGROUP || mode.split == SPLIT_TENSOR),
                    "%s, %s: %s: %" PRIu64 " and %" PRIu64, s.name, mode.name, comm_names[op], with.sent[op], one.sent[op]);
            }
        }
    }
}

static int run_rank(const char* mode, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    world_select_device(&world);
    topology.world = group_world(&world, true);
    topology_split(&topology, 1, 1);
    Group* group = &topology.data;
    if (strcmp(mode, "same") == 0) { check_same(group, all_settings()); }
    else if (strcmp(mode, "few") == 0) { check_few(group); }
    else if (strcmp(mode, "close") == 0) {
        check_direct(group);
        check_ring(group);
        check_micro_batches(group);
    }
    else { CHECK(false, "%s", mode); }
    printf("held\n");
    topology_free(&topology);
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void expect_all(int ranks, const char* mode) {
    if (!can_launch(ranks)) { skip(); }
    Launched l = expect_ranks(ranks, mode, "0", NULL, getenv("SOAK") != NULL ? 3000 : 200, 0);
    int held = 0;
    for (const char* p = l.out; (p = strstr(p, "held\n")) != NULL; p++) { held++; }
    assert_int_equal(held, ranks);
    if (getenv("V") != NULL) { print_message("%d ranks, %s: %.1f s\n%s", ranks, mode, l.seconds, l.out); }
}

static void one_rank_has_nothing_to_divide(void**) { expect_all(1, "same"); }
static void two_ranks_train_to_the_same_bits(void**) { expect_all(2, "same"); }
static void three_ranks_train_to_the_same_bits(void**) { expect_all(3, "same"); }
static void four_ranks_train_to_the_same_bits(void**) { expect_all(4, "same"); }
static void more_ranks_than_matrices_train_to_the_same_bits(void**) { expect_all(8, "few"); }
static void matrices_longer_than_a_ranks_share_train_to_the_same_bits(void**) { expect_all(4, "few"); }
static void gradients_in_fp8_stay_close(void**) {
    expect_all(2, "close");
    expect_all(3, "close");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_has_nothing_to_divide), cmocka_unit_test(two_ranks_train_to_the_same_bits),
        cmocka_unit_test(three_ranks_train_to_the_same_bits), cmocka_unit_test(four_ranks_train_to_the_same_bits),
        cmocka_unit_test(more_ranks_than_matrices_train_to_the_same_bits), cmocka_unit_test(matrices_longer_than_a_ranks_share_train_to_the_same_bits),
        cmocka_unit_test(gradients_in_fp8_stay_close),
    };
    return cmocka_run_group_tests_name("zero", tests, NULL, NULL);
}
