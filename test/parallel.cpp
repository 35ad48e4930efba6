// parallel.cpp: training over every topology of 1, 2, 4, 6 and 8 ranks: what they send, what they take, what they must have in common, and that in FP32 they
// do what one rank does.
//
// The ranks drive the model itself, one topology after the other. After every step of every run the step's record has the same bits on all ranks, and each
// has sent what the plan says of it; after every run everything that several ranks hold has the same bits on all of them. The modes:
//
//     exact   FP32, against one rank: losses, norms, weights, validation and samples
//     narrow  the other recipes, with all that rounds: nothing but what holds of every run
//     faults  one rank has a value that is not finite, or nothing counts on all: all skip that step, and it leaves no trace
//     resume  a checkpoint of one topology, read by another, which writes it anew for the first: the same bits, and the next step is the same
//
// Some runs have targets that do not count: not as many in one micro-batch as in another, and in every second step none on every second replica.
#define TESTING
#include "../train_gpt_fp8.cu"
#include "launch.h"
#include "step.h"
#include <string>

// ---- what a run is ----

struct Setting {
    std::string name;
    GptConfig config;
    int micro_batches;  // of all replicas together in a step
    StepSettings step;
    bool masked;        // not every target counts
};

static bool soak(void) { return getenv("SOAK") != NULL; }

enum Kind { KIND_FP8, KIND_FP8_LM, KIND_BF16, KIND_FP32 };
static const char* const kind_names[] = {"fp8", "fp8-lm", "bf16", "fp32"};

// Something that every topology of so many ranks can share: each rank of tp has heads, tokens and rows, each stage a layer. As the recipes have it
static GptConfig config_of(int ranks, Kind kind, bool tied, bool rope) {
    GptConfig c = {};
    c.layers = max_of(ranks, 2);
    c.heads = max_of(ranks, 2);
    c.width = ranks == 6 ? 96 : 64;
    c.padded_vocab = 128 * ranks;
    c.vocab = c.padded_vocab - 29;
    c.T = ranks == 6 ? 12 : 16;
    c.positions = c.T + 8;
    c.B = 2;
    c.tied = tied;
    c.rope = rope;
    c.act = kind == KIND_FP32 ? FP32 : BF16;
    c.fp8 = kind == KIND_FP8 || kind == KIND_FP8_LM;
    c.scaling = SCALING_DELAYED;
    c.fp8_fwd = E4M3;
    c.fp8_bwd = E5M2;
    c.dy_wire = kind == KIND_FP8 ? c.fp8_bwd : c.act;
    c.dx_fp8 = kind == KIND_FP8;
    c.seed = 7;
    c.reduction = ReductionConfig{SCALING_AUTO, REDUCE_RING, ZeroConfig{0, SPLIT_FLAT}};
    c.optimizer.seed = 11;
    if (kind == KIND_FP8) {
        c.accum = BF16;
        c.accum_rounding = STOCHASTIC;
        c.wire = E4M3;
        c.reduction.algorithm = REDUCE_DIRECT;
        c.embeddings_as_matrices = true;
        c.master = FP16;
        c.m = E4M3;
        c.v = UE5M3;
        c.optimizer = OptimizerConfig{true, STOCHASTIC, STOCHASTIC, 11};
    } else if (kind == KIND_FP8_LM) {
        c.accum = c.wire = c.m = E4M3;
        c.master = c.v = FP16;
    }
    return c;
}

// AdamW with an ε beside which gradients are small: its steps are then proportional to them, and a gradient that is wrong by a factor shows
static Setting setting(const char* name, GptConfig c) {
    StepSettings s = {};
    s.rules = DecisionRules{0.9, 0.95, 0.25f, 0.0f, 0.0f};
    s.rates = AdamRates{0.06f, 0.9f, 0.95f, 1e-2f, 0.0f};
    s.weight_decay = 0.1f;
    return Setting{name, c, c.layers > 4 ? c.layers : 2 * c.layers, s, false};
}

// ---- what ranks have in common ----

template <class T> static std::vector<T> gathered(Group* g, const std::vector<T>& mine) {
    std::vector<T> all(mine.size() * (size_t)g->size);
    host_all_gather(g, all.data(), mine.data(), mine.size() * sizeof(T));
    return all;
}

static void expect_same_on(Group* g, const std::string& name, const char* what, const std::vector<uint64_t>& mine) {
    std::vector<uint64_t> all = gathered(g, mine);
    for (size_t i = 0; i < all.size(); i++) {
        CHECK(all[i] == mine[i % mine.size()], "%s: %s: number %zu differs on rank %zu of %d", name.c_str(), what, i % mine.size(), i / mine.size(), g->size);
    }
}

struct Held {                               // hashes of what a rank holds, by parameter
    std::vector<uint64_t> weights, states;  // states: of the ranks that keep parts together
    std::vector<uint64_t> scales;           // of weight, master and moments, and the reduction's headroom
    std::vector<uint64_t> sites;            // {of all sites}
    bool operator==(const Held& o) const { return weights == o.weights && states == o.states && scales == o.scales && sites == o.sites; }
};

static uint64_t hash_slot(uint64_t h, const float* slot) { return slot == NULL ? h : hash_bytes(h, from_device<float>(slot, 2).data(), 8); }

// Elements and blocks are each hashed with their number, and added up
static uint64_t hash_state(const OptimizerTensor* t, const Param* p, uint64_t kind) {
    size_t each = (size_t)dtype_bytes(t->dtype), blocks = t->exponents != NULL ? ceil_div(p->own_count, (size_t)STATE_BLOCK) : 0;
    std::vector<char> values = from_device<char>(t->data, p->own_count * each), exponents = from_device<char>(t->exponents, blocks);
    uint64_t sum = 0;
    for (size_t k = 0; k < p->own_count; k++) { sum += hash_bytes(mix64(kind ^ (p->own_first + k)), &values[k * each], each); }
    for (size_t k = 0; k < blocks; k++) { sum += hash_bytes(mix64(~kind ^ (p->own_first / STATE_BLOCK + k)), &exponents[k], 1); }
    return sum;
}

static Held held_by(Model* m) {
    Held h;
    weights_finish(&m->reduction, m->stream);
    stream_sync(m->stream);
    bool sends = m->reduction.group->size > 1;
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        size_t bytes = param_elements(p) * (size_t)dtype_bytes(p->dtype);
        h.weights.push_back(hash_bytes(1, from_device<char>(p->weight, bytes).data(), bytes));
        uint64_t scales = hash_slot(1, p->slot), states = 0, kind = 0;
        for (const OptimizerTensor* t : {&p->master, &p->m, &p->v}) {
            scales = hash_slot(scales, t->slot);
            states += hash_state(t, p, ++kind << 56);
        }
        if (sends) { scales = hash_bytes(scales, from_device<float>(m->reduction.mu + i, 1).data(), sizeof(float)); }
        h.states.push_back(states);
        h.scales.push_back(scales);
    }
    if (zero_level(&m->reduction) > 0) {
        std::vector<uint64_t> all = gathered(m->reduction.group, h.states);
        std::fill(h.states.begin(), h.states.end(), 0);
        for (size_t i = 0; i < all.size(); i++) { h.states[i % h.states.size()] += all[i]; }
    }
    size_t sites = (size_t)m->sites.count;
    uint64_t of_sites = hash_bytes(1, from_device<float>(m->sites.slots, 4 * sites).data(), 4 * sites * sizeof(float));
    of_sites = hash_bytes(of_sites, from_device<float>(m->sites.history, AMAX_WINDOW * sites).data(), AMAX_WINDOW * sites * sizeof(float));
    h.sites.push_back(of_sites);
    return h;
}

// A local amax or a headroom that each rank adapts by itself: scales. A partial gradient that is not added up: what ranks of a layer hold whole. The
// random bits or the order of a tied gradient's sum: the embedding. A reduction that is not the same everywhere: replicas.
static void expect_in_common(Model* m, const std::string& name) {
    Topology* t = m->topology;
    Held h = held_by(m);
    expect_same_on(&t->data, name, "weights of replicas", h.weights);
    expect_same_on(&t->data, name, "states of replicas", h.states);
    expect_same_on(&t->data, name, "scales of replicas", h.scales);
    expect_same_on(&t->data, name, "sites of replicas", h.sites);
    expect_same_on(&t->tensor, name, "scales of a layer", h.scales);
    expect_same_on(&t->tensor, name, "sites of a layer", h.sites);
    std::vector<uint64_t> whole;
    for (int i = 0; i < m->params.count; i++) {
        bool all = m->params.items[i].tp_axis == TP_WHOLE;
        whole.push_back(all ? h.weights[(size_t)i] : 0);
        whole.push_back(all ? h.states[(size_t)i] : 0);
    }
    expect_same_on(&t->tensor, name, "what a layer's ranks hold whole", whole);
    if (!m->config.tied) { return; }
    std::vector<uint64_t> table(3, 0);
    if (m->wte != NULL) {
        size_t i = (size_t)(m->wte - m->params.items);
        table = {h.weights[i], h.states[i], h.scales[i]};
    }
    std::vector<uint64_t> all = gathered(&t->pipe, table), first(all.begin(), all.begin() + 3), last(all.end() - 3, all.end());
    CHECK(first == last, "%s: the tied embedding is another on the last stage: weights %d, states %d, scales %d", name.c_str(), first[0] != last[0],
        first[1] != last[1], first[2] != last[2]);
}

// ---- a run on this rank ----

struct Session {
    std::string name;
    Setting setting;
    Topology* topology;
    Model* m;
    Memory memory;
    std::vector<HostBatch> batches;
    int micro_batches;
    int64_t step, tokens;  // tokens: of the global batch
    float weight;
    bool nothing_counts;
    PlanTraffic planned;  // of the dry run
};

// What --plan finds of this rank without its being there. A size that depends on what only the real rank knows fails here
static void plan_dry(Session* s) {
    static Run plan;
    const RankLayout* y = &s->topology->layout;
    option_table(&plan.table, &plan.args);
    std::string numbers[] = {std::to_string(s->topology->world.size), std::to_string(y->tp), std::to_string(y->pp)};
    const char* words[] = {"", "--plan", "--gpu", "none", "--world", numbers[0].c_str(), "--tp", numbers[1].c_str(), "--pp", numbers[2].c_str()};
    parse_options(&plan.table.options, 10, (char**)words);
    plan.topology = Topology{};
    resolve_topology(&plan);
    plan.config = s->setting.config;
    plan.config.layout = plan.topology.layout;
    plan.micro_batches = s->micro_batches;
    CHECK(plan.topology.layout.dp == y->dp, "%s: %d replicas planned", s->name.c_str(), plan.topology.layout.dp);
    Matmul matmuls;
    matmul_create(&matmuls);
    Memory imagined;
    dry_run(&plan, &matmuls, y->stage, y->replica, s->setting.config.B, &imagined);
    for (int k = 0; k < MEMORY_CATEGORIES; k++) {
        CHECK(imagined.bytes[k] == s->memory.bytes[k], "%s: %s: %zu bytes, and the plan says %zu", s->name.c_str(), memory_names[k], s->memory.bytes[k], imagined.bytes[k]);
    }
    rank_traffic(&plan.model, s->micro_batches, &s->planned);
    model_forget(&plan.model);
    matmul_destroy(&matmuls);
}

static Session open_session(Topology* t, const Setting* setting) {
    Session s = {};
    const RankLayout* y = &t->layout;
    char layout[64];
    snprintf(layout, sizeof(layout), ", tp %d, pp %d, dp %d", y->tp, y->pp, y->dp);
    s.name = setting->name + layout;
    s.setting = *setting;
    s.topology = t;
    s.micro_batches = setting->micro_batches / y->dp;
    CHECK(s.micro_batches * y->dp == setting->micro_batches && s.micro_batches >= y->pp, "%s", s.name.c_str());
    GptConfig c = setting->config;
    c.layout = *y;
    c.in_flight = schedule_in_flight(y->pp, y->stage, s.micro_batches);
    s.m = (Model*)host_alloc(sizeof(Model));
    model_plan(s.m, &c, t, &s.memory);
    if (!device_is_gpu) { plan_dry(&s); }
    model_commit(s.m, &s.memory);
    for (int k = 0; k < MEMORY_CATEGORIES; k++) {  // model_commit has called memory_check: it dies where this fails
        CHECK(s.memory.used[k] == s.memory.bytes[k], "%s: %s: %zu of %zu bytes handed out", s.name.c_str(), memory_names[k], s.memory.used[k], s.memory.bytes[k]);
    }
    model_set_weights(s.m, NULL);
    for (int i = 0; i < host_batches(&c); i++) { s.batches.push_back(host_batch_create(rows_of(s.m))); }
    s.tokens = rows_of(s.m) * setting->micro_batches;
    s.weight = token_weight(s.tokens);
    return s;
}

static void close_session(Session* s) {
    model_free(s->m, &s->memory);
    for (HostBatch& b : s->batches) { host_batch_free(&b); }
    free(s->m);
}

// A decision of one rank's own, or a sum that is not the same everywhere
static void expect_same_record(Session* s, const StepRecord* r) {
    std::vector<uint64_t> bits(6);
    const double values[] = {r->loss, r->grad_norm, r->loss_z, r->norm_z};
    memcpy(bits.data(), values, sizeof(values));
    bits[4] = (uint64_t)r->skipped;
    bits[5] = (uint64_t)r->applied;
    expect_same_on(&s->topology->world, s->name, "record (loss, norm, z of both, skipped, applied)", bits);
}

// An exchange that is left out, made twice, of another size, or counted as another operation
static void expect_traffic(Session* s, bool just_in_time) {
    uint64_t sent[COMM_OPERATIONS];
    PlanTraffic want;
    topology_sent(sent, s->topology);
    rank_traffic(s->m, s->micro_batches, &want);
    for (int op = 0; op < COMM_OPERATIONS; op++) {
        bool of_the_host = op == HOST_BROADCAST || op == HOST_ALL_REDUCE_SUM || op == HOST_ALL_GATHER, of_the_end = op == ALL_REDUCE_SUM || op == ALL_REDUCE_MAX;
        if (of_the_host || of_the_end || (op == TP_SCALES && just_in_time)) { continue; }
        CHECK(sent[op] == want.operations[op], "%s, step %d: %s: %" PRIu64 " bytes sent, and the plan says %" PRIu64, s->name.c_str(), (int)s->step, comm_names[op],
            sent[op], want.operations[op]);
        if (s->topology->layout.tp_rank != 0 || device_is_gpu) { continue; }  // the dry run is the first's
        CHECK(s->planned.operations[op] == want.operations[op], "%s: %s: dry %" PRIu64 ", not %" PRIu64, s->name.c_str(), comm_names[op], s->planned.operations[op],
            want.operations[op]);
    }
}

// Does target i of micro-batch `number` of the whole run count? In odd steps none of the odd micro-batches, which one replica of two has
static bool counts(const Session* s, int64_t number, int i) {
    if (s->nothing_counts || !s->setting.masked) { return !s->nothing_counts; }
    if (s->step % 2 == 1) { return number % 2 == 0 && (i + number) % 3 > 0; }
    return (int64_t)(mix64((uint64_t)(1000 * number + i)) % 8) < number % 5;
}

// `weight`: of a token, on the way back; `at(k)`: is called when the input of micro-batch k is there; `behind()`: when all have been through
template <class At, class Behind> static StepRecord step_with(Session* s, float weight, At at, Behind behind) {
    const GptConfig* c = &s->m->config;
    bool just_in_time = c->fp8 && c->scaling == SCALING_DELAYED && s->m->steps_recorded < AMAX_WINDOW;
    topology_forget_sent(s->topology);
    run_micro_batches(s->m, s->batches.data(), s->micro_batches, weight, [=](HostBatch* batch, int k) {
        int64_t number = s->step * s->setting.micro_batches + (int64_t)k * c->layout.dp + c->layout.replica;
        fill_batch(batch, c, number * c->B);
        for (int i = 0; i < c->B * c->T; i++) {
            if (!counts(s, number, i)) { batch->targets[i] = -1; }
        }
        at(k);
    });
    behind();
    finish_step(s->m, &s->setting.step, s->tokens);
    StepRecord r = read_record(s->m);
    expect_traffic(s, just_in_time);
    expect_same_record(s, &r);
    s->step++;
    return r;
}

static StepRecord take_step(Session* s) {
    StepRecord r = step_with(s, s->weight, [](int) {}, [] {});
    CHECK(r.skipped == NOT_SKIPPED, "%s, step %d: %s, loss %g, norm %g", s->name.c_str(), (int)s->step - 1, skip_names[r.skipped], r.loss, r.grad_norm);
    return r;
}

// As if 128 steps had been: z-scores are numbers from here on
static void fill_windows(Model* m) {
    OptimizerState state = from_device<OptimizerState>(m->optimizer.state, 1)[0];
    for (OutlierWindow* w : {&state.losses, &state.norms}) {
        w->count = OUTLIER_WINDOW;
        for (int i = 0; i < OUTLIER_WINDOW; i++) { w->values[i] = 4.0 + 0.25 * (i % 7); }
    }
    copy_to_device(m->optimizer.state, &state, sizeof(state), m->stream);
    stream_sync(m->stream);
}

// f(topology) for every topology of these ranks
template <class F> static void each_topology(Group* world, F f) {
    int number = 0;
    for (int tp = 1; tp <= world->size; tp++) {
        for (int pp = 1; pp * tp <= world->size; pp++) {
            if (world->size % (pp * tp) != 0) { continue; }
            Topology t = {};
            t.world = *world;
            topology_split(&t, tp, pp);
            f(&t, number++);
            for (Group* g : {&t.pipe, &t.tensor, &t.data}) { group_free(g); }
        }
    }
}

// ---- validation and samples ----

static std::string text_path;

static void write_text(Group* world) {
    char path[64] = "";
    if (world->rank == 0) {
        snprintf(path, sizeof(path), "/tmp/parallel.%d.txt", (int)getpid());
        FILE* f = fopen(path, "w");
        CHECK(f != NULL, "%s", path);
        for (int i = 0; i < 4096; i++) { putc('A' + (int)(mix64((uint64_t)i / 2) % 26), f); }
        fclose(f);
        f = fopen((std::string(path) + ".bin").c_str(), "w");
        CHECK(f != NULL, "%s.bin", path);
        std::vector<uint32_t> shard(256 + 4096);
        shard[0] = 20240801;
        shard[1] = 8;
        shard[2] = 4096;
        for (uint32_t i = 0; i < 4096; i++) { shard[256 + i] = (uint32_t)(mix64(i / 2) % 200) | (i % 50 < 20 || i % 3 == 0 ? 1u << 31 : 0u); }  // windows without any too
        fwrite(shard.data(), 4, shard.size(), f);
        fclose(f);
    }
    host_broadcast(world, path, sizeof(path), 0);
    text_path = path;
}

static double validation_loss(Session* s) {
    DataLoaderConfig c = {};
    c.flag = "--val-data";
    std::string shard = text_path + ".bin";
    c.spec = s->setting.masked ? shard.c_str() : text_path.c_str();
    c.vocab = 256;
    c.seq_len = s->setting.config.T;
    c.rank = s->topology->data.rank;
    c.ranks = s->topology->data.size;
    c.micro_batch = s->setting.config.B;
    DataLoader loader;
    loader_open(&loader, &c);
    double loss = evaluate(s->m, &loader, &s->batches[0], s->micro_batches);
    loader_close(&loader);
    std::vector<uint64_t> bits(1);
    memcpy(bits.data(), &loss, sizeof(loss));
    expect_same_on(&s->topology->world, s->name, "loss in validation", bits);
    return loss;
}

// Longer than the window. A rank that draws by itself, or another's logits
static std::vector<int> sample(Session* s) {
    std::vector<int> tokens((size_t)s->setting.config.T + 6, 0);
    Generation g = {Sampling{}, 5};
    generate(s->m, tokens.data(), 1, (int)tokens.size(), &g);
    std::vector<uint64_t> bits(tokens.begin(), tokens.end());
    expect_same_on(&s->topology->pipe, s->name, "tokens", bits);
    expect_same_on(&s->topology->tensor, s->name, "tokens", bits);
    return tokens;
}

// ---- FP32 against one rank ----

static int exact_steps(const Setting* s) { return soak() || s->config.layers <= 4 ? 10 : 6; }

struct Exact {
    std::vector<StepRecord> records;
    std::vector<std::string> names;
    std::vector<std::vector<float>> initial, weights;  // whole tensors, by name
    double validated;
    std::vector<int> tokens;
};

static std::vector<float> weights_of(const Param* p) { return from_device<float>(p->weight, param_elements(p)); }

static Exact train_alone(const Setting* setting) {
    Exact e;
    Topology alone = {};
    alone.world.size = 1;
    topology_split(&alone, 1, 1);
    Setting whole = *setting;
    whole.config.reduction.zero = NOTHING_PARTITIONED;
    Session s = open_session(&alone, &whole);
    const ParamTable* table = &s.m->params;
    for (int i = 0; i < table->count; i++) {
        e.names.push_back(table->items[i].name);
        e.initial.push_back(weights_of(&table->items[i]));
    }
    for (int step = 0; step < exact_steps(setting); step++) {
        if (step == 2) { fill_windows(s.m); }
        e.records.push_back(take_step(&s));
        CHECK(e.records.back().grad_norm > setting->step.rules.clip, "%s: nothing is clipped at %g", s.name.c_str(), e.records.back().grad_norm);
    }
    for (int i = 0; i < table->count; i++) { e.weights.push_back(weights_of(&table->items[i])); }
    e.validated = validation_loss(&s);
    e.tokens = sample(&s);
    close_session(&s);
    return e;
}

static double apart(double a, double b) { return isnan(a) && isnan(b) ? 0.0 : fabs(a - b) / fabs(a); }

// Of every tensor the furthest element from one rank's, beside the furthest that it has moved. A single gradient that is wrong: added up twice, not at all, or
// not over all ranks; an update that differs between shares. Sums in another order leave 1e-6, and gains of about 1 are
// rounded in every step.
constexpr double WEIGHTS_APART = 2e-5, ROUNDED_IN_STEPS = 4e-7;

static double weights_apart(Session* s, const Exact* e, const std::vector<std::vector<float>>* want, bool moved) {
    double worst = 0.0;
    weights_finish(&s->m->reduction, s->m->stream);
    stream_sync(s->m->stream);
    for (int i = 0; i < s->m->params.count; i++) {
        const Param* p = &s->m->params.items[i];
        size_t k = 0;
        while (k < e->names.size() && e->names[k] != p->name) { k++; }
        CHECK(k < e->names.size(), "%s: one rank has no %s", s->name.c_str(), p->name);
        std::vector<float> mine = weights_of(p);
        ElementMap whole = whole_elements(p);
        double furthest = 0.0, step = 0.0;
        for (size_t x = 0; x < (*want)[k].size(); x++) { step = fmax(step, fabs((double)e->weights[k][x] - (double)e->initial[k][x])); }
        for (size_t x = 0; x < mine.size(); x++) {
            CHECK(whole(x) < (*want)[k].size() && !isnan(mine[x]), "%s: %s: element %zu", s->name.c_str(), p->name, x);
            double at = (double)(*want)[k][whole(x)];
            furthest = fmax(furthest, fabs((double)mine[x] - at) - (moved ? ROUNDED_IN_STEPS * fabs(at) : 0.0));
        }
        CHECK(step > 0.0, "%s: %s stays as it is", s->name.c_str(), p->name);
        double relative = furthest / step;
        CHECK(relative <= (moved ? WEIGHTS_APART : 0.0), "%s: %s is %.3g of its way apart from one rank's", s->name.c_str(), p->name, relative);
        worst = fmax(worst, relative);
    }
    return worst;
}

static void check_exact_in(Topology* t, const Setting* setting, const Exact* want) {
    Session s = open_session(t, setting);
    double losses = 0.0, norms = 0.0, scores = 0.0;
    weights_apart(&s, want, &want->initial, false);
    for (int step = 0; step < exact_steps(setting); step++) {
        if (step == 2) { fill_windows(s.m); }
        StepRecord a = want->records[(size_t)step], b = take_step(&s);
        CHECK(isnan(b.loss_z) == (step < 2) && isnan(b.norm_z) == (step < 2), "%s, step %d: z-scores %g, %g", s.name.c_str(), step, b.loss_z, b.norm_z);
        losses = fmax(losses, apart(a.loss, b.loss));
        norms = fmax(norms, apart(a.grad_norm, b.grad_norm));
        scores = fmax(scores, fmax(apart(a.loss_z, b.loss_z), apart(a.norm_z, b.norm_z)));
        CHECK(losses < 1e-5 && norms < 1e-5 && scores < 1e-3, "%s, step %d: loss %.9g, not %.9g; norm %.9g, not %.9g", s.name.c_str(), step, b.loss, a.loss,
            b.grad_norm, a.grad_norm);
    }
    double weights = weights_apart(&s, want, &want->weights, true);
    expect_in_common(s.m, s.name);
    double validated = apart(want->validated, validation_loss(&s));
    CHECK(validated < 1e-5, "%s: validation %.3g apart", s.name.c_str(), validated);
    CHECK(sample(&s) == want->tokens, "%s: samples differ from one rank's", s.name.c_str());
    if (getenv("V") != NULL) {
        std::vector<double> of_all = gathered(&t->world, std::vector<double>{weights});
        double furthest = *std::max_element(of_all.begin(), of_all.end());
        if (t->world.rank == 0) { printf("%s: losses %.2g, norms %.2g, z %.2g, weights %.2g, validation %.2g apart\n", s.name.c_str(), losses, norms, scores, furthest, validated); }
    }
    close_session(&s);
}

// One rank trains, and everyone hears of it
static void share(Group* world, Exact* e) {
    auto send = [=](auto* v) {
        uint64_t n = v->size();
        host_broadcast(world, &n, sizeof(n), 0);
        v->resize(n);
        host_broadcast(world, v->data(), n * sizeof((*v)[0]), 0);
    };
    uint64_t tensors = e->names.size();
    host_broadcast(world, &tensors, sizeof(tensors), 0);
    e->names.resize(tensors);
    e->initial.resize(tensors);
    e->weights.resize(tensors);
    for (size_t i = 0; i < tensors; i++) {
        send(&e->names[i]);
        send(&e->initial[i]);
        send(&e->weights[i]);
    }
    send(&e->records);
    send(&e->tokens);
    host_broadcast(world, &e->validated, sizeof(e->validated), 0);
}

static const ZeroConfig zeros[] = {{0, SPLIT_FLAT}, {1, SPLIT_FLAT}, {1, SPLIT_TENSOR}, {2, SPLIT_FLAT}, {2, SPLIT_TENSOR}};
static const char* const zero_names[] = {"", ", ZeRO 1 flat", ", ZeRO 1 whole", ", ZeRO 2 flat", ", ZeRO 2 whole"};

static void check_exact(Group* world) {
    Setting settings[] = {setting("fp32, tied, learned positions", config_of(world->size, KIND_FP32, true, false)),
                          setting("fp32, a head of its own, rope", config_of(world->size, KIND_FP32, false, true)),
                          setting("fp32, some count, tied, rope", config_of(world->size, KIND_FP32, true, true))};
    settings[2].masked = true;
    Exact want[3];
    for (int i = 0; i < 3; i++) {
        if (world->rank == 0) { want[i] = train_alone(&settings[i]); }
        share(world, &want[i]);
    }
    int taken = 0;
    each_topology(world, [&](Topology* t, int number) {
        for (int zero = 0; zero < 5; zero++) {
            bool turn = zero == 0 || (t->layout.dp > 1 && (soak() || (zero + number) % (world->size > 4 ? 6 : 2) == 0));
            for (int i = 0; turn && i < 3; i++) {
                if (!soak() && world->size > 4 && (zero + number + i) % 2 == 0) { continue; }
                Setting s = settings[i];
                s.name += zero_names[zero];
                s.config.reduction.zero = zeros[zero];
                s.config.reduction.algorithm = i == 1 && taken % 2 == 0 ? REDUCE_DIRECT : REDUCE_RING;  // tied: the order of a ring's sums depends on its cuts
                s.config.recompute = taken++ % 3;
                check_exact_in(t, &s, &want[i]);
            }
        }
    });
}

// ---- the other recipes ----

static void check_narrow_in(Topology* t, const Setting* setting) {
    Session s = open_session(t, setting);
    int steps = soak() ? AMAX_WINDOW + 4 : 3;
    for (int step = 0; step < steps; step++) {
        if (!soak() && step == 2) { s.m->steps_recorded = AMAX_WINDOW; }  // scales come from the window, though it is not full
        take_step(&s);
    }
    expect_in_common(s.m, s.name);
    validation_loss(&s);
    sample(&s);
    if (getenv("V") != NULL && t->world.rank == 0) { printf("%s\n", s.name.c_str()); }
    close_session(&s);
}

static void check_narrow(Group* world) {
    int taken = 0;
    each_topology(world, [&](Topology* t, int number) {
        for (int i = 0; i < 3 * 2 * 2 * 3 * 5; i++) {
            Kind kind = (Kind)(i % 3);
            bool tied = i / 3 % 2 == 0, current = i / 6 % 2 == 0;
            int recompute = i / 12 % 3, zero = i / 36;
            if ((kind == KIND_BF16 && current) || (t->layout.dp == 1 && zero > 0)) { continue; }
            int every = t->layout.dp > 1 ? (world->size > 4 ? 67 : 37) : (world->size > 4 ? 17 : 7);  // no multiple of 2 or 3: all kinds have their turn
            if (!soak() && (i + 5 * number) % every != 0) { continue; }
            GptConfig c = config_of(world->size, kind, tied, taken++ % 2 == 0);
            bool blocks = kind == KIND_FP8 && t->layout.tp == 1 && current == (taken % 2 == 0);
            c.scaling = blocks ? SCALING_BLOCK : current ? SCALING_CURRENT : SCALING_DELAYED;
            c.recompute = recompute;
            c.reduction.zero = zeros[zero];
            if (kind != KIND_BF16 && taken % 4 == 0) { c.bf16_layers.first = 1; }
            if (kind != KIND_BF16 && taken % 3 == 0) { c.fp8_min_size = c.width + (taken % 2 == 0 ? 1 : c.width * 3 / 4); }  // without attention's projection, without attention
            Setting s = setting(kind_names[kind], c);
            s.masked = taken % 3 == 1;
            s.name += tied ? ", tied" : ", untied";
            if (s.masked) { s.name += ", some count"; }
            if (kind != KIND_BF16) { s.name += blocks ? ", blocks" : current ? ", current" : ", delayed"; }
            s.name += ", recompute " + std::to_string(recompute) + zero_names[zero];
            if (c.fp8_min_size > 0) { s.name += ", FP8 from " + std::to_string(c.fp8_min_size) + " on"; }
            check_narrow_in(t, &s);
        }
    });
}

// ---- faults ----

enum Fault { NAN_WEIGHT, NAN_ACTIVATION, INF_VECTOR, INF_MATRIX, NAN_LOGITS, NOTHING_COUNTS, FAULTS };
static const char* const fault_names[] = {"a weight", "an activation", "a vector's gradient", "a matrix's gradient", "gradients of logits", "a batch in which nothing counts"};

static void write_value(Model* m, void* array, DType t, size_t i, float value) {
    uint32_t bits = float_to_bits(value) >> (t == BF16 ? 16 : 0);
    if (dtype_bytes(t) == 1) { bits = 0xff; }
    copy_to_device(advance(array, t, i), &bits, (size_t)dtype_bytes(t), m->stream);
    stream_sync(m->stream);
}

// A matrix with an element that another replica keeps, which a skipped step brings back from there; without ZeRO any
static const Param* weight_to_spoil(const Model* m, size_t* element) {
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (p->format_class != MATRIX) { continue; }
        size_t last = param_elements(p) - 1;
        if (zero_level(&m->reduction) > 0 && p->own_first == 0 && p->own_count > last) { continue; }
        *element = p->own_first > 0 ? 0 : last;
        return p;
    }
    return NULL;
}

// One rank of tp of one stage of one replica
static void check_fault(Session* s, Fault fault) {
    Model* m = s->m;
    const RankLayout* y = &m->config.layout;
    int stage = fault == NAN_LOGITS ? y->pp - 1 : y->pp / 2, K = s->micro_batches;
    bool here = y->replica == y->dp - 1 && y->stage == stage && y->tp_rank == y->tp - 1;
    bool comes_too_late = y->pp - stage - 1 >= K - 1 || reduces_each(&m->reduction);  // the first backward pass would write over it
    if ((fault == NAN_ACTIVATION && stage == 0) || (fault == INF_MATRIX && comes_too_late)) { return; }
    Held before = held_by(m);
    size_t element = 0;
    const Param* p = fault == NAN_WEIGHT && here ? weight_to_spoil(m, &element) : NULL;
    char* spoiled = p == NULL ? NULL : (char*)advance(p->weight, p->dtype, element);
    std::vector<char> was = from_device<char>(spoiled, p == NULL ? 0 : (size_t)dtype_bytes(p->dtype));
    if (p != NULL) { write_value(m, p->weight, p->dtype, element, NAN); }
    s->nothing_counts = fault == NOTHING_COUNTS;
    StepRecord r = step_with(s, fault == NAN_LOGITS && here ? NAN : s->weight, [=](int k) {
        if (!here || k != K - 1) { return; }
        Layer* layers = m->kept + (size_t)(k % m->config.in_flight) * (size_t)stage_layers(&m->config);
        if (fault == NAN_ACTIVATION) { write_value(m, layers->residual, m->config.act, 5, NAN); }
        if (fault == INF_MATRIX) { write_value(m, layers->fcw->accumulator, layers->fcw->accum, 5, INFINITY); }
    }, [=] {
        if (here && fault == INF_VECTOR) { write_value(m, m->layers->ln1w->accumulator, FP32, 1, INFINITY); }
    });
    s->nothing_counts = false;
    weights_finish(&m->reduction, m->stream);
    if (p != NULL) { copy_to_device(spoiled, was.data(), was.size(), m->stream); }
    int want = fault == NAN_WEIGHT || fault == NAN_ACTIVATION ? SKIP_NON_FINITE_LOSS : fault == NOTHING_COUNTS ? SKIP_NOTHING_COUNTS : SKIP_NON_FINITE_NORM;
    CHECK(r.skipped == want, "%s: %s: %d, loss %g, norm %g", s->name.c_str(), fault_names[fault], r.skipped, r.loss, r.grad_norm);
    CHECK(fault != NOTHING_COUNTS || (r.loss == 0.0 && r.grad_norm == 0.0), "%s: of nothing: loss %g, norm %g", s->name.c_str(), r.loss, r.grad_norm);
    CHECK(held_by(m) == before, "%s: %s has left a trace", s->name.c_str(), fault_names[fault]);
    StepRecord next = take_step(s);
    CHECK(next.applied == r.applied + 1 && isfinite(next.loss) && isfinite(next.grad_norm), "%s: after %s: %g", s->name.c_str(), fault_names[fault], next.loss);
}

static void check_faults(Group* world) {
    each_topology(world, [&](Topology* t, int number) {
        Kind kinds[] = {KIND_FP8, KIND_FP32};
        for (int i = 0; i < 2; i++) {
            if (!soak() && world->size > 4 && (number + i) % 2 == 0) { continue; }
            GptConfig c = config_of(world->size, kinds[i], true, true);
            c.reduction.zero = zeros[t->layout.dp > 1 ? (number + i) % 5 : 0];
            Setting one = setting(kind_names[kinds[i]], c);
            Session s = open_session(t, &one);
            take_step(&s);
            for (int fault = 0; fault < FAULTS; fault++) { check_fault(&s, (Fault)fault); }
            expect_in_common(s.m, s.name);
            close_session(&s);
        }
    });
}

// ---- checkpoints ----

static std::string new_folder(Group* world) {
    char folder[64] = "";
    if (world->rank == 0) {
        snprintf(folder, sizeof(folder), "/tmp/parallel.%d.XXXXXX", (int)getpid());
        CHECK(mkdtemp(folder) != NULL, "%s", strerror(errno));
    }
    host_broadcast(world, folder, sizeof(folder), 0);
    return folder;
}

static void save_session(Session* s, const std::string& folder, int64_t step) {
    Checkpoints c;
    checkpoints_open(&c, folder, 0, step % 2 == 0 ? (size_t)1 << 30 : 0, &s->topology->world);  // with a copy in memory, or piece by piece
    std::vector<TextFile> texts;
    if (s->topology->world.rank == 0) { texts.push_back({json_pages(counters_json(s->m)), "config.json"}); }
    checkpoint_begin(&c, step, checkpoint_share(s->m), texts, s->m->stream);
    checkpoint_conclude(&c);
    SaveOutcome o = checkpoint_outcome(&c);
    CHECK(o.good, "%s: %s", s->name.c_str(), o.wrong);
    checkpoints_close(&c);
}

static int64_t load_session(Session* s, const std::string& folder, int64_t step) {
    std::string path = folder + "/" + checkpoint_name(step), text;
    std::vector<Checksum> sums;
    CheckpointReader reader;
    std::string wrong = checkpoint_verify(&sums, path, &s->topology->world);
    wrong = wrong.empty() ? reader_open(&reader, path, sums) : wrong;
    wrong = wrong.empty() ? read_text(&text, path + "/config.json") : wrong;
    CHECK(wrong.empty(), "%s: %s", s->name.c_str(), wrong.c_str());
    json_object* counters = json_tokener_parse(text.c_str());
    int64_t rounded = load_states(s->m, &reader, json_int(counters, "replicas"));
    counters_restore(s->m, counters);
    json_object_put(counters);
    weights_finish(&s->m->reduction, s->m->stream);
    return rounded;
}

// The same step within the recipe's noise of another order of sums
static void expect_near(const Session* s, const StepRecord* r, const StepRecord* of) {
    double most = s->m->config.act == FP32 ? 1e-5 : 4e-3, apart = fabs(r->loss - of->loss) / of->loss;
    CHECK(apart <= most && r->applied == of->applied, "%s: the next step's loss is %.9g, not %.9g", s->name.c_str(), r->loss, of->loss);
}

// What two steps have left goes from topology `a` to `b` and back
static void check_resumed(Topology* a, Topology* b, const Setting* one, const std::string& folder, bool aligned) {
    Session first = open_session(a, one);
    take_step(&first);
    take_step(&first);
    fill_windows(first.m);
    weights_finish(&first.m->reduction, first.m->stream);
    Held held = held_by(first.m);
    save_session(&first, folder, 2);
    StepRecord want = take_step(&first);
    int64_t step = first.step - 1;
    close_session(&first);

    Session other = open_session(b, one);
    int64_t rounded = load_session(&other, folder, 2);
    CHECK(!aligned || rounded == 0, "%s: %d blocks were rounded again", other.name.c_str(), (int)rounded);
    expect_in_common(other.m, other.name);
    other.step = step;
    save_session(&other, folder, 3);
    StepRecord near = take_step(&other);
    expect_near(&other, &near, &want);
    std::string through = ", through " + other.name;
    close_session(&other);

    Session again = open_session(a, one);
    load_session(&again, folder, aligned ? 3 : 2);
    again.name += through;
    again.step = step;
    bool keeps_headroom = b->layout.dp == a->layout.dp || !keeps_mu(again.m);  // it belongs to a number of replicas
    Held back = held_by(again.m);
    CHECK(back.weights == held.weights && back.states == held.states && back.sites == held.sites && (back.scales == held.scales || !keeps_headroom), "%s: other bits than it began with: %d%d%d%d",
        again.name.c_str(), back.weights == held.weights, back.states == held.states, back.scales == held.scales, back.sites == held.sites);
    StepRecord same = take_step(&again);
    if (keeps_headroom || !aligned) { CHECK(memcmp(&same, &want, sizeof(same)) == 0, "%s: the next step's loss %.17g and norm %.17g, not %.17g and %.17g", again.name.c_str(), same.loss, same.grad_norm, want.loss, want.grad_norm); }
    close_session(&again);
}

static void check_resumes(Group* world) {
    std::vector<Topology> all;
    int ranks = world->size;
    for (int tp = 1; tp <= ranks; tp++) {
        for (int pp = 1; pp * tp <= ranks; pp++) {
            if (ranks % (pp * tp) != 0) { continue; }
            Topology t = {};
            t.world = *world;
            topology_split(&t, tp, pp);
            all.push_back(t);
        }
    }
    std::string folder = new_folder(world);
    size_t n = all.size();
    for (int kind = KIND_FP8; kind <= KIND_FP32; kind++) {
        bool blocks = kind == KIND_FP8;
        for (size_t i = 0; i < n; i++) {
            if (!soak() && n > 3 && i % 3 != (size_t)kind % 3) { continue; }
            GptConfig c = config_of(ranks, (Kind)kind, i % 2 == 0, kind % 2 == 0);
            bool aligned = !blocks || (soak() ? i % 2 == 0 : i == 0);
            if (blocks && aligned) { c.width = STATE_BLOCK * ranks; }  // a rank's columns are whole blocks
            size_t to = (i + (n > 2 ? 2 : 1)) % n;
            c.reduction.zero = zeros[all[i].layout.dp > 1 || all[to].layout.dp > 1 ? (i + (size_t)kind) % 5 : 0];
            Setting one = setting(kind_names[kind], c);
            check_resumed(&all[i], &all[to], &one, folder, aligned);
        }
    }
    for (Topology& t : all) {
        for (Group* g : {&t.pipe, &t.tensor, &t.data}) { group_free(g); }
    }
    barrier(world);
    if (world->rank == 0) {
        for (const std::string& name : names_in(folder)) { remove_folder(folder + "/" + name); }
        remove_folder(folder);
    }
}

static int run_rank(const char* mode, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    world_select_device(&world);
    Group group = group_world(&world, true);
    write_text(&group);
    std::string texts, lines = gather_text(&group, group.rank % 3 == 1 ? "" : "rank " + std::string((size_t)group.rank, '+') + "\n");  // none of some ranks
    for (int r = 0; r < group.size; r++) { texts += r % 3 == 1 ? "" : "rank " + std::string((size_t)r, '+') + "\n"; }
    CHECK(lines == texts, "of all ranks: %s", lines.c_str());
    if (strcmp(mode, "exact") == 0) { check_exact(&group); }
    else if (strcmp(mode, "narrow") == 0) { check_narrow(&group); }
    else if (strcmp(mode, "faults") == 0) { check_faults(&group); }
    else if (strcmp(mode, "resume") == 0) { check_resumes(&group); }
    else { CHECK(false, "%s", mode); }
    barrier(&group);
    if (group.rank == 0) {
        unlink(text_path.c_str());
        unlink((text_path + ".bin").c_str());
    }
    printf("held\n");
    group_free(&group);
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void expect_all(int ranks, const char* mode) {
    if (!can_launch(ranks)) { skip(); }
    Launched l = expect_ranks(ranks, mode, "0", NULL, soak() ? 3000 : 200, 0);
    int held = 0;
    for (const char* p = l.out; (p = strstr(p, "held\n")) != NULL; p++) { held++; }
    assert_int_equal(held, ranks);
    if (getenv("V") != NULL) { print_message("%d ranks, %s: %.1f s\n%s", ranks, mode, l.seconds, l.out); }
}

static void in_fp32_every_topology_does_what_one_rank_does(void**) {
    for (int ranks : {1, 2, 4, 6, 8}) { expect_all(ranks, "exact"); }
}
static void in_every_recipe_ranks_have_the_same_bits_and_send_what_is_planned(void**) {
    for (int ranks : {1, 2, 4, 6, 8}) { expect_all(ranks, "narrow"); }
}
static void what_is_not_finite_on_one_rank_makes_all_skip_the_step(void**) {
    for (int ranks : {1, 2, 4, 6, 8}) { expect_all(ranks, "faults"); }
}

static void a_checkpoint_goes_to_any_topology_and_back(void**) {
    for (int ranks : {1, 2, 4}) { expect_all(ranks, "resume"); }
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(in_fp32_every_topology_does_what_one_rank_does),
        cmocka_unit_test(in_every_recipe_ranks_have_the_same_bits_and_send_what_is_planned),
        cmocka_unit_test(what_is_not_finite_on_one_rank_makes_all_skip_the_step),
        cmocka_unit_test(a_checkpoint_goes_to_any_topology_and_back),
    };
    return cmocka_run_group_tests_name("parallel", tests, NULL, NULL);
}
