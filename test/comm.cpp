// comm.cpp: the reduction of gradients against a scalar model, bit for bit, on 1 to 8 ranks, with and without ZeRO; partial gradients and counts among the
// ranks of a layer; headroom, overlap, bytes; the return of weights.
//
// Every rank can say what any rank's gradients are, so each computes the result by itself: from tables of the formats' values and searches in them, in
// the order of operations that comm.cuh and gradient.cuh promise, and with none of their functions.
#include "../comm.cuh"
#include "../adam_fp8.cuh"  // its norm counts the codes at the maximum and decides whether to step
#include "launch.h"
#include <algorithm>
#include <vector>

// ---- formats, as tables of values ----

struct Format {
    std::vector<double> values;  // by code, without the sign; ascending
    int mantissa, bias;
    uint32_t sign, not_a_number;
};

static Format make_format(int mantissa, int bias, uint32_t codes, uint32_t sign, uint32_t not_a_number) {
    Format f;
    for (uint32_t c = 0; c < codes; c++) {
        int e = (int)(c >> mantissa), m = (int)(c & ((1u << mantissa) - 1));
        f.values.push_back(e == 0 ? ldexp(m, 1 - bias - mantissa) : ldexp(1.0 + ldexp(m, -mantissa), e - bias));
    }
    f.mantissa = mantissa;
    f.bias = bias;
    f.sign = sign;
    f.not_a_number = not_a_number;
    return f;
}

static const Format& format_of(DType t) {
    static const Format e4m3_format = make_format(3, 7, 0x7f, 0x80, 0x7f), e5m2_format = make_format(2, 15, 0x7c, 0x80, 0x7f);
    static const Format half_format = make_format(10, 15, 0x7c00, 0x8000, 0x7fff);
    static const Format bf16_format = make_format(7, 127, 0x7f81, 0x8000, 0x7fff);  // its last value, 2^128, is inf's place: what rounds to it is inf
    return t == E4M3 ? e4m3_format : t == E5M2 ? e5m2_format : t == FP16 ? half_format : bf16_format;
}

// The code of the nearest value, the even code of two as near; beyond the last, the last
static uint32_t encoded(DType t, double x) {
    if (t == FP32) { float f = (float)x; uint32_t u; memcpy(&u, &f, 4); return u; }
    const Format& f = format_of(t);
    if (isnan(x)) { return f.not_a_number; }
    double a = fabs(x);
    uint32_t last = (uint32_t)f.values.size() - 1, code = last;
    if (a < f.values[last]) {
        const double* v = f.values.data();
        uint32_t binade = a == 0.0 ? 0 : (uint32_t)std::max(0, ilogb(a) + f.bias) << f.mantissa;  // its values are evenly spaced
        code = binade + (uint32_t)((a - v[binade]) / (v[binade + 1] - v[binade]));               // that of the value below
        double below = a - v[code], above = v[code + 1] - a;
        code += above < below || (above == below && code % 2 == 1);
    }
    return signbit(x) ? code | f.sign : code;
}

static float decoded(DType t, uint32_t code) {
    if (t == FP32) { float f; memcpy(&f, &code, 4); return f; }
    const Format& f = format_of(t);
    uint32_t u = code & (f.sign - 1);
    if (u >= f.values.size()) { return NAN; }
    float v = t == BF16 && u == 0x7f80 ? INFINITY : (float)f.values[u];
    return code & f.sign ? -v : v;
}

// received + own, as a ring's hop adds
static uint32_t hop_slowly(DType t, uint32_t received, uint32_t own) {
    if (!is_fp8(t)) { return encoded(t, decoded(t, received) + decoded(t, own)); }
    double sum = (double)decoded(t, received) + (double)decoded(t, own);  // exact
    return encoded(t, isnan(sum) ? NAN : (double)decoded(FP16, encoded(FP16, sum)));
}

static uint32_t hop(DType t, uint32_t received, uint32_t own) {
    if (!is_fp8(t)) { return hop_slowly(t, received, own); }
    static std::vector<uint8_t> tables[2];
    std::vector<uint8_t>& table = tables[t == E5M2];
    if (table.empty()) {
        for (uint32_t i = 0; i < 65536; i++) { table.push_back((uint8_t)hop_slowly(t, i >> 8, i & 0xff)); }
    }
    return table[received << 8 | own];
}

static double largest_value(DType t) { return t == E4M3 ? 448.0 : 57344.0; }
static bool at_maximum(DType t, uint32_t code) { return is_fp8(t) && (code & 0x7f) == (t == E4M3 ? 0x7eu : 0x7bu); }

// 2^floor(log2(largest/amax)); 0: not finite; FLT_MAX: all zero
static float scale_for(DType t, float amax) {
    if (!isfinite(amax)) { return 0.0f; }
    if (amax == 0.0f) { return FLT_MAX; }
    return ldexpf(1.0f, std::min(126, std::max(-126, ilogb(largest_value(t) / (double)amax))));
}

// ---- inputs ----

// What a tensor's gradients are like
enum Kind {
    SPREAD, HUGE_ELEMENT, TINY, ZERO, ZERO_ON_SOME, TOPS, A_NAN, INF_ON_LAST, FLOAT_MAX, FALLING_BY_RANK, TIES, MINUS_INF, KINDS
};

static float input(Kind kind, int step, int t, int rank, int ranks, size_t n, size_t i) {
    uint64_t shared = mix64((uint64_t)t << 56 ^ (uint64_t)step << 40 ^ (uint64_t)i), h = mix64(shared + (uint64_t)rank);
    float sign = h & 1 ? -1.0f : 1.0f, shared_sign = shared & 1 ? -1.0f : 1.0f, m = 1.0f + (float)(h >> 40) * 0x1p-24f;
    float spread = sign * m * exp2_int(-(int)((h >> 1) % 24) - 3 * t);
    switch (kind) {
        case HUGE_ELEMENT: return i == n / 2 && rank == step % ranks ? sign * 1e30f : sign * m * 1e-3f;
        case TINY: return sign * m * 1e-40f;
        case ZERO: return sign * 0.0f;
        case ZERO_ON_SOME: return (rank + step) % 2 ? sign * 0.0f : spread;
        case TOPS: return shared_sign * 0x1.cp-5f;  // the largest code, on every rank
        case A_NAN: return i == n - 1 && rank == step % ranks ? NAN : spread;
        case INF_ON_LAST: return i == 0 && rank == ranks - 1 ? INFINITY : spread;
        case MINUS_INF: return i == n / 3 && rank == 0 ? -INFINITY : spread;
        case FLOAT_MAX: return shared_sign * FLT_MAX;
        case FALLING_BY_RANK: return sign * m * exp2_int(-5 * rank - (int)((h >> 1) % 4));
        case TIES: return (float)((int)((h >> 8) % 129) - 64) * 0x1p-7f;
        default: return spread;
    }
}

// ---- the model ----

struct Inputs {                       // of one tensor
    std::vector<uint32_t> codes[8];   // by rank, in the accumulator's format
    float descale[8];                 // of an FP8 accumulator, else 1
};

struct Expected {
    std::vector<uint32_t> codes;
    std::vector<float> sums;          // direct: what was rounded to the codes
    float descale, scale;             // its slot
    double underflow, sent_tops, tops;  // numbers of codes, over all ranks
};

// Where a tensor lies in what is cut into parts
struct Place {
    size_t first, part;
    int owner;              // who has all of it; -1: it is cut
    size_t elements, mine;  // owned tensors: of the bucket, and of this rank's part
};

static size_t padded(const Param* p) { return ((size_t)(p->rows * p->cols) + 127) / 128 * 128; }

static bool travel_together(const Param* p, const Param* q) {
    bool same_place = p->format_class == VECTOR ? p->partial == q->partial : p->layer == q->layer;
    return p->format_class == q->format_class && same_place && p->accum == q->accum && p->wire == q->wire;
}

// Owners by the paper: the longest tensor that is left goes to the rank that has least
static std::vector<int> owners_by_size(const ParamTable* table, int ranks) {
    std::vector<int> owners((size_t)table->count, -1);
    std::vector<size_t> loads((size_t)ranks);
    for (;;) {
        int longest = -1;
        for (int i = 0; i < table->count; i++) {
            const Param* p = &table->items[i];
            if (p->format_class != MATRIX || owners[(size_t)i] >= 0) { continue; }
            if (longest < 0 || param_elements(p) > param_elements(&table->items[longest])) { longest = i; }
        }
        if (longest < 0) { return owners; }
        size_t least = (size_t)(std::min_element(loads.begin(), loads.end()) - loads.begin());
        owners[(size_t)longest] = (int)least;
        loads[least] += param_elements(&table->items[longest]);
    }
}

static std::vector<Place> places_of(const ParamTable* table, int rank, int ranks, ZeroConfig zero) {
    std::vector<Place> places((size_t)table->count);
    std::vector<int> owners((size_t)table->count, -1);
    if (zero.level > 0 && zero.split == SPLIT_TENSOR) { owners = owners_by_size(table, ranks); }
    for (int i = 0; i < table->count; i++) {
        size_t total = 0;
        Place* place = &places[(size_t)i];
        *place = Place{0, 0, owners[(size_t)i], 0, 0};
        for (int k = 0; k < table->count; k++) {  // all that travel with tensor i
            const Param *p = &table->items[i], *q = &table->items[k];
            if (!travel_together(p, q)) { continue; }
            int mine = owners[(size_t)i], other = owners[(size_t)k];
            place->first += other < mine || (other == mine && k < i) ? padded(q) : 0;  // by owner, then as in the table
            place->mine += mine >= 0 && other == rank ? padded(q) : 0;
            total += padded(q);
        }
        size_t multiple = (zero.level > 0 ? 4096 : 128) * (size_t)ranks;
        place->elements = (total + multiple - 1) / multiple * multiple;
        place->part = place->elements / (size_t)ranks;
    }
    return places;
}

// `before`: direct: what comes first in the chain of additions; empty: nothing
static Expected model(const Param* p, const Inputs& in, Place place, int ranks, GradReduce algorithm, float mu, const std::vector<float>& before) {
    const size_t n = in.codes[0].size();
    const DType wire = p->wire;
    const bool fp8 = is_fp8(wire);
    Expected out = {std::vector<uint32_t>(n), {}, 1.0f, 1.0f, 0.0, 0.0, 0.0};
    static std::vector<float> values[8];
    static std::vector<uint32_t> sent[8];
    float own[8], least = INFINITY;
    for (int r = 0; r < ranks; r++) {
        float amax = 0.0f;
        values[r].clear();
        for (uint32_t c : in.codes[r]) {
            float x = decoded(p->accum, c);
            values[r].push_back(x);
            if (!(fabsf(x) <= amax)) { amax = isnan(amax) ? amax : fabsf(x); }
        }
        own[r] = scale_for(wire, amax * in.descale[r]);
        least = std::min(least, own[r]);
        if (own[r] == FLT_MAX) { own[r] = 1.0f; }
    }
    if (least == FLT_MAX) { least = 1.0f; }
    float shared = std::max(mu * least, 0x1p-126f);
    bool finite = least != 0.0f;
    auto set_slot_of = [&](float scale) {
        out.descale = scale == 0.0f ? NAN : 1.0f / scale;
        out.scale = scale == 0.0f ? NAN : scale;
    };
    for (int r = 0; r < ranks; r++) {
        sent[r].clear();
        float k = !fp8 ? 1.0f : algorithm == REDUCE_DIRECT ? own[r] : finite ? shared : NAN;
        if (p->accum == E4M3) { k = in.descale[r] * k; }
        for (float x : values[r]) {
            uint32_t c = encoded(wire, x * k);
            sent[r].push_back(c);
            out.underflow += fp8 && x != 0.0f && (c & 0x7f) == 0;
            out.sent_tops += at_maximum(wire, c);
        }
    }
    if (algorithm == REDUCE_RING) {
        if (fp8) { set_slot_of(finite ? shared : 0.0f); }
        for (size_t i = 0; i < n; i++) {
            int owner = place.owner >= 0 ? place.owner : (int)((place.first + i) / place.part);
            uint32_t sum = sent[(owner + 1) % ranks][i];
            for (int k = 2; k <= ranks; k++) { sum = hop(wire, sum, sent[(owner + k) % ranks][i]); }
            out.codes[i] = sum;
        }
    } else {
        std::vector<float> sums;
        float amax = 0.0f;
        for (size_t i = 0; i < n; i++) {
            float sum = 0.0f;
            for (int r = 0; r < ranks; r++) {
                float x = decoded(wire, sent[r][i]) * (!fp8 ? 1.0f : own[r] == 0.0f ? NAN : 1.0f / own[r]);
                sum = r > 0 ? sum + x : before.empty() ? x : before[i] + x;
            }
            sums.push_back(sum);
            if (!(fabsf(sum) <= amax)) { amax = isnan(amax) ? amax : fabsf(sum); }
        }
        if (fp8) {
            float scale = scale_for(wire, amax);
            set_slot_of(scale == FLT_MAX ? 1.0f : scale);
        }
        for (size_t i = 0; i < n; i++) { out.codes[i] = encoded(wire, sums[i] * out.scale); }
        out.sums = sums;
    }
    for (uint32_t c : out.codes) { out.tops += at_maximum(wire, c); }
    return out;
}

// ---- a reduction as the trainer makes it ----

static uint64_t hash_of(uint64_t h, const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) { h = (h ^ ((const unsigned char*)data)[i]) * 1099511628211ull; }
    return h;
}

template <class T> static std::vector<T> from_device(const T* d, size_t n) {
    std::vector<T> host(n);
    if (n > 0) { copy_to_host(host.data(), d, n * sizeof(T), NULL); }
    stream_sync(NULL);
    return host;
}
template <class T> static void onto_device(T* d, const std::vector<T>& host) {
    copy_to_device(d, host.data(), host.size() * sizeof(T), NULL);
    stream_sync(NULL);
}

typedef float (*InputOf)(int step, int t, int rank, int ranks, size_t n, size_t i);

// all kinds meet all tensors in time
static Kind kind_of(int step, int t) { return (Kind)((t + 5 * step) % KINDS); }
static float mixed_input(int step, int t, int rank, int ranks, size_t n, size_t i) { return input(kind_of(step, t), step, t, rank, ranks, n, i); }
// those whose norm is finite in every format
static float clean_input(int step, int t, int rank, int ranks, size_t n, size_t i) {
    static const Kind kinds[] = {SPREAD, TINY, ZERO, ZERO_ON_SOME, TOPS, FALLING_BY_RANK, TIES};
    return input(kinds[(t + step) % 7], step, t, rank, ranks, n, i);
}

// This rank's number among those of its layer, whose tensors differ
static int shard = 0;
static float sharded_input(int step, int t, int rank, int ranks, size_t n, size_t i) { return clean_input(step + 7 * 16 * shard + shard, t, rank, ranks, n, i); }
// What number `of` of `shards` ranks of a layer has of a gradient of which each has a part. Sums over all are exact, but of two: 2^24 + 1 is 2^24, so that it
// makes a difference whether ranks of a layer or replicas add first
static float partial_input(int step, int t, int rank, int of, int shards, size_t i) {
    if (shards == 2 && i % 50 == 7) { return of == 1 ? 1.0f : rank % 2 == 0 ? 0x1p24f : -0x1p24f; }
    return (float)((int)(mix64((uint64_t)t << 56 ^ (uint64_t)step << 40 ^ (uint64_t)(8 * rank + of) << 32 ^ (uint64_t)i) % 2001) - 1000);
}

static bool same_float(float a, float b) { return memcmp(&a, &b, 4) == 0 || (isnan(a) && isnan(b)); }

constexpr size_t MODELLED = 100000;  // elements: longer tensors are compared over the ranks alone

struct Trial {
    Group *g, *tensor;
    ParamTable* table;
    ReductionConfig config;
    InputOf input_of = mixed_input;
    bool patient = false;  // wait for each layer's buckets before the next is filled
    int steps_done = 0;
    const char* name = "";
    Memory memory = {};
    Reduction r;
    Optimizer optimizer = {};
    LossShare* loss = NULL;
    std::vector<Place> places;
    std::vector<float> mu;         // the model's
    int micro_batches = 1;         // of a step; with ZeRO 2 as many reductions of matrices
    std::vector<Expected> expected;  // counts are of the whole step
    std::vector<std::vector<float>> expected_fp32;  // of what is kept in FP32
    StepRecord record = {};

    Trial(Group* group, ParamTable* params, ReductionConfig c, Group* of_layer = NULL) : g(group), tensor(of_layer), table(params), config(c) {
        reduction_plan(&r, g, tensor, table, config);
        optimizer.data = g;
        optimizer.partitioned = level() > 0;
        for (int run = 0; run < 2; run++) {
            partition_allocate_weights(&r.partition, &memory);
            reduction_allocate(&r, &memory);
            optimizer_allocate(&optimizer, table, false, &memory);
            loss = memory_take<LossShare>(&memory, WORKSPACE, 1);
            if (run == 0) { memory_commit(&memory); }
        }
        memory_check(&memory);
        for (int k = 0; k < MEMORY_CATEGORIES; k++) {  // what nobody has written is NaN in every format
            if (memory.bytes[k] > 0) { onto_device((unsigned char*)memory.block[k], std::vector<unsigned char>(memory.bytes[k], 0xff)); }
        }
        reduction_start_up(&r);
        optimizer_reset(&optimizer, table, NULL);
        onto_device(loss, std::vector<LossShare>(1, LossShare{1.0, 1.0}));
        places = places_of(table, g->rank, g->size, r.partition.zero);
        float ranks = (float)g->size;
        float first = config.scaling == SCALING_PRE ? 1.0f / ranks : config.scaling == SCALING_POST ? 1.0f : 1.0f / sqrtf(ranks);
        mu.assign((size_t)table->count, config.algorithm == REDUCE_RING ? first : 1.0f);
        check_plan();
    }
    ~Trial() {
        reduction_free(&r);
        memory_release(&memory);
    }

    int level() const { return g->size > 1 ? config.zero.level : 0; }
    bool in_fp32(const Param* p) const { return takes_turns(p) || (level() > 0 && config.algorithm == REDUCE_DIRECT); }
    bool takes_turns(const Param* p) const { return level() == 2 && p->format_class == MATRIX; }  // and is reduced after every micro-batch
    int shards() const { return tensor != NULL ? tensor->size : 1; }

    // Every tensor is in one bucket, with its own kind, where the model expects it
    void check_plan() const {
        std::vector<int> seen((size_t)table->count);
        int of_vectors[2] = {}, of_table[2] = {};
        for (int t = 0; t < table->count; t++) { of_table[table->items[t].partial] |= table->items[t].format_class == VECTOR; }
        for (int k = 0; k < r.partition.bucket_count; k++) {
            const Bucket* b = &r.partition.buckets[k];
            size_t end = 0;
            of_vectors[b->partial] += b->layer == ALL_LAYERS;
            CHECK((b->owned != NULL) == takes_turns(&table->items[r.partition.tensors[b->first].param]), "bucket %d", k);
            CHECK(b->count > 0 && !b->started && b->elements % (128 * (size_t)g->size) == 0, "bucket %d", k);
            for (int i = 0; i < b->count; i++) {
                const BucketTensor* t = &r.partition.tensors[b->first + i];
                const Param* p = &table->items[t->param];
                seen[(size_t)t->param]++;
                CHECK(t->first % 128 == 0 && t->first >= end && t->first == places[(size_t)t->param].first, "%s", p->name);
                CHECK(b->elements == places[(size_t)t->param].elements, "%s", p->name);
                CHECK(p->owner == places[(size_t)t->param].owner, "%s", p->name);
                CHECK(p->accum == b->accum && p->wire == b->wire, "%s", p->name);
                CHECK(b->layer == (p->format_class == VECTOR ? ALL_LAYERS : p->layer), "%s", p->name);
                CHECK(p->grad_dtype == (in_fp32(p) ? FP32 : g->size > 1 ? p->wire : p->accum), "%s", p->name);
                CHECK(p->partial == b->partial, "%s", p->name);
                CHECK((char*)p->accumulator == b->memory + t->first * (size_t)dtype_bytes(p->accum), "%s", p->name);
                if (level() == 0) { CHECK((char*)p->grad == b->memory + t->first * (size_t)dtype_bytes(p->grad_dtype), "%s", p->name); }
                end = t->first + param_elements(p);
            }
            CHECK(end <= b->elements, "bucket %d", k);
        }
        for (int i = 0; i < 2; i++) { CHECK(of_vectors[i] == of_table[i], "%d", of_vectors[i]); }
        for (int i = 0; i < table->count; i++) { CHECK(seen[(size_t)i] == 1, "%s", table->items[i].name); }
        check_memory();
    }

    // Of gradients: one accumulator a bucket, or this rank's part of its sums where that is more; with ZeRO 2, of the matrices, the part and two turns of the
    // largest layer. And a few values a tensor.
    void check_memory() const {
        size_t want = 0, layers[16] = {}, got = memory.bytes[GRADIENTS];
        for (int k = 0; k < r.partition.bucket_count; k++) {
            const Bucket* b = &r.partition.buckets[k];
            const Place& place = places[(size_t)r.partition.tensors[b->first].param];
            size_t accumulator = place.elements * (size_t)dtype_bytes(b->accum), part = 4 * (place.owner >= 0 ? place.mine : place.part);
            if (level() == 2 && b->matrices) {
                layers[b->layer] += (accumulator + 255) / 256 * 256;
                want += part;
            } else {
                want += in_fp32(&table->items[r.partition.tensors[b->first].param]) ? std::max(accumulator, part) : accumulator;
            }
        }
        want += 2 * *std::max_element(layers, layers + 16);
        CHECK(got >= want && got < want + 9000, "%s: %zu bytes of gradients, not %zu", name, got, want);
    }

    // `part`: where each rank of a layer has a part of it, this rank's, as it is before they add up
    std::vector<uint32_t> accumulated(int step, int t, int rank, float* descale, bool part = false) const {
        const Param* p = &table->items[t];
        size_t n = param_elements(p);
        std::vector<float> values(n);
        float amax = 0.0f, scale = 1.0f;
        for (size_t i = 0; i < n; i++) {
            if (p->partial && part) { values[i] = partial_input(step, t, rank, shard, shards(), i); }
            else if (p->partial) { for (int of = 0; of < shards(); of++) { values[i] += partial_input(step, t, rank, of, shards(), i); } }
            else { values[i] = input_of(step, t, rank, g->size, n, i); }
            if (!isnan(values[i])) { amax = std::max(amax, fabsf(values[i])); }
        }
        if (p->accum == E4M3) {  // an accumulator that met an inf is NaN throughout; a NaN among others may also come out of a product
            scale = amax == 0.0f ? ldexpf(1.0f, rank - 3) : isinf(amax) ? NAN : scale_for(E4M3, amax);
        }
        *descale = 1.0f / scale;
        std::vector<uint32_t> codes;
        for (float x : values) { codes.push_back(encoded(p->accum, x * scale)); }
        return codes;
    }

    void write_accumulator(int t, const std::vector<uint32_t>& codes, float descale) const {
        Param* p = &table->items[t];
        size_t bytes = (size_t)dtype_bytes(p->accum);
        std::vector<unsigned char> host(codes.size() * bytes);
        for (size_t i = 0; i < codes.size(); i++) { memcpy(&host[i * bytes], &codes[i], bytes); }
        onto_device((unsigned char*)p->accumulator, host);
        if (p->accum == E4M3) { onto_device(p->accum_slot, std::vector<float>{descale, 1.0f / descale, 1.0f, 0.0f}); }
    }

    // What this rank keeps: its elements [begin, end) by the model
    void own_stretch(int t, size_t* begin, size_t* end) const {
        const Place& place = places[(size_t)t];
        size_t n = param_elements(&table->items[t]), rank = (size_t)g->rank;
        auto within = [=](size_t cut) { return std::min(n, cut > place.first ? cut - place.first : 0); };
        *begin = level() == 0 ? 0 : place.owner >= 0 ? 0 : within(rank * place.part);
        *end = level() == 0 ? n : place.owner >= 0 ? (place.owner == g->rank ? n : 0) : within((rank + 1) * place.part);
    }

    void check_gradient(int t) const {
        const Param* p = &table->items[t];
        const Expected& e = expected[(size_t)t];
        size_t bytes = (size_t)dtype_bytes(p->grad_dtype), begin, end;
        own_stretch(t, &begin, &end);
        CHECK(p->own_count == end - begin && (p->own_count == 0 || p->own_first == begin), "%s: [%zu + %zu], not [%zu, %zu)", p->name, p->own_first, p->own_count,
            begin, end);
        if (param_elements(p) > MODELLED) { return; }
        std::vector<unsigned char> got = from_device((const unsigned char*)p->grad, (end - begin) * bytes);
        for (size_t i = begin; i < end; i++) {
            uint32_t code = 0, want = in_fp32(p) ? encoded(FP32, (double)expected_fp32[(size_t)t][i]) : e.codes[i];
            memcpy(&code, &got[(i - begin) * bytes], bytes);
            bool same = code == want || (p->grad_dtype == FP32 && same_float(decoded(FP32, code), decoded(FP32, want)));
            CHECK(same, "%s, step %d, %s, element %zu: %x, not %x", name, steps_done, p->name, i, code, want);
        }
        std::vector<float> slot = from_device(p->grad_slot, 4);
        float descale = in_fp32(p) ? 1.0f : e.descale, scale = in_fp32(p) ? 1.0f : e.scale;
        CHECK(same_float(slot[0], descale) && same_float(slot[1], scale), "%s, step %d, %s: {%a %a}, not {%a %a}", name, steps_done, p->name,
            (double)slot[0], (double)slot[1], (double)descale, (double)scale);
    }

    void start_layer(int layer) {
        for (int again = 0; again < 2; again++) {  // a bucket starts once
            int before = r.queued;
            reduction_start(&r, layer, NULL);
            CHECK(again == 0 || r.queued == before, "layer %d", layer);
        }
        for (int i = 0; i < r.queued; i++) {
            for (int k = 0; k < i; k++) { CHECK(r.queue[i] != r.queue[k], "bucket %d started twice", r.queue[i]); }
        }
        // every rank at its own pace
        for (uint64_t polls = mix64((uint64_t)(steps_done * 8 + g->rank)) % 4; polls > 0; polls--) { reduction_poll(&r); }
    }

    // What one reduction makes of the inputs with number `at`, on top of the reduction before it; of those that are reduced once, at the step's end, nothing
    // comes before. (A real accumulator would then hold a sum over the micro-batches.)
    void expect(int at, bool first_of_step, bool last, std::vector<Inputs>* in) {
        const int ranks = g->size;
        for (int t = 0; t < table->count; t++) {
            const Param* p = &table->items[t];
            Inputs& x = (*in)[(size_t)t];
            bool modelled = param_elements(p) <= MODELLED, first = first_of_step || !takes_turns(p);
            for (int rank = 0; rank < ranks; rank++) {
                if (modelled || rank == g->rank) { x.codes[rank] = accumulated(at, t, rank, &x.descale[rank]); }
            }
            if (!modelled || !(last || takes_turns(p))) { continue; }
            std::vector<float>& total = expected_fp32[(size_t)t];
            bool on_top = !first && config.algorithm == REDUCE_DIRECT && places[(size_t)t].owner < 0;  // the running sum comes first; else it is added to
            Expected e = model(p, x, places[(size_t)t], ranks, config.algorithm, mu[(size_t)t], on_top ? total : std::vector<float>());
            if (config.algorithm == REDUCE_RING) {
                for (uint32_t c : e.codes) { e.sums.push_back(is_fp8(p->wire) ? decoded(p->wire, c) * e.descale : decoded(p->wire, c)); }
            }
            for (size_t i = 0; !first && !on_top && i < total.size(); i++) { e.sums[i] = total[i] + e.sums[i]; }
            total = e.sums;
            Expected& all = expected[(size_t)t];
            if (!first) {
                e.underflow += all.underflow;
                e.sent_tops += all.sent_tops;
                e.tops += all.tops;
                e.scale = isnan(all.scale) ? NAN : e.scale;
            }
            all = e;
        }
    }

    void micro_batch(int at, bool first, bool last) {
        const int n = table->count;
        std::vector<Inputs> in((size_t)n);
        int first_layer = 0, last_layer = 0;
        expect(at, first, last, &in);
        for (int t = 0; t < n; t++) {
            first_layer = std::min(first_layer, table->items[t].layer);
            last_layer = std::max(last_layer, table->items[t].layer);
        }
        reduction_begin(&r, first, last, NULL);
        for (int t = 0; t < n; t++) {
            const Param* p = &table->items[t];
            CHECK(accumulates(&r, p) == (!first && !takes_turns(p)), "%s", p->name);
            if (p->partial) { in[(size_t)t].codes[g->rank] = accumulated(at, t, g->rank, &in[(size_t)t].descale[g->rank], true); }
        }
        // as a backward pass does: from the last layer to the first, then the vectors
        for (int layer = last_layer; layer >= first_layer; layer--) {
            reduction_clear_way(&r, layer, NULL);
            for (int t = 0; t < n; t++) {
                const Inputs& x = in[(size_t)t];
                bool here = table->items[t].format_class != VECTOR && table->items[t].layer == layer;
                if (here) { write_accumulator(t, x.codes[g->rank], x.descale[g->rank]); }
            }
            if (at % 3 == 1 && layer % 2 == 0 && !patient && level() < 2) { continue; }  // left to reduction_finish
            start_layer(layer);
            if (!patient) { continue; }
            double limit = wall_seconds() + 20.0;
            while (r.next < r.queued && wall_seconds() < limit) { reduction_poll(&r); }
            CHECK(r.next == r.queued && r.queued > 0, "layer %d: %d of %d buckets", layer, r.next, r.queued);
            stream_sync(r.stream);
            for (int t = 0; t < n; t++) {
                bool here = table->items[t].format_class != VECTOR && table->items[t].layer == layer;
                if (here && (last || takes_turns(&table->items[t]))) { check_gradient(t); }
            }
        }
        for (int t = 0; t < n; t++) {
            if (table->items[t].format_class == VECTOR) { write_accumulator(t, in[(size_t)t].codes[g->rank], in[(size_t)t].descale[g->rank]); }
        }
        reduction_finish(&r, NULL);
        stream_sync(NULL);
        CHECK(r.queued == 0 && r.next == 0 && r.phase == 0);
        for (int k = 0; k < r.partition.bucket_count; k++) { CHECK(!r.partition.buckets[k].started, "bucket %d", k); }
        for (uint32_t amax : from_device(r.amax, (size_t)n)) { CHECK(amax == 0); }
        for (int t = 0; t < n && !last; t++) {  // what is still being added up is as it was
            const Param* p = &table->items[t];
            size_t bytes = (size_t)dtype_bytes(p->accum);
            if (takes_turns(p)) { continue; }
            std::vector<unsigned char> got = from_device((const unsigned char*)p->accumulator, param_elements(p) * bytes);
            for (size_t i = 0; i < param_elements(p); i++) { CHECK(memcmp(&got[i * bytes], &in[(size_t)t].codes[g->rank][i], bytes) == 0, "%s, element %zu", p->name, i); }
        }
    }

    void step() {
        const int ranks = g->size, n = table->count, at = steps_done;
        bool fp8 = false;
        for (int t = 0; t < n; t++) { fp8 = fp8 || is_fp8(table->items[t].wire); }
        expected.assign((size_t)n, Expected{});
        expected_fp32.assign((size_t)n, std::vector<float>());
        reduction_begin(&r, true, true, NULL);  // weights are on their way no more: what follows sends gradients alone
        uint64_t sent[COMM_OPERATIONS], sent_in_layer = tensor != NULL ? tensor->bytes_sent[TP_OTHER] : 0;
        memcpy(sent, g->bytes_sent, sizeof(sent));
        for (int k = 0; k < micro_batches; k++) { micro_batch(at * micro_batches + k, k == 0, k == micro_batches - 1); }
        check_bytes(sent, tensor != NULL ? tensor->bytes_sent[TP_OTHER] - sent_in_layer : 0);
        for (int t = 0; t < n; t++) { check_gradient(t); }
        uint64_t sums_before = g->bytes_sent[ALL_REDUCE_SUM];
        reduction_count(&r, NULL);
        optimizer_decide(&optimizer, table, r.slots, loss, 1, DecisionRules{0.9, 0.95, 0.0f, 0.0f, 0.0f}, NULL);
        reduction_adapt(&r, optimizer.tops, &optimizer.state->apply, NULL);
        stream_sync(NULL);
        if (g->transport != OVER_NCCL) { CHECK((g->bytes_sent[ALL_REDUCE_SUM] > sums_before) == (fp8 || level() > 0)); }
        record = from_device(&optimizer.state->record, 1)[0];
        std::vector<double> tops = from_device(optimizer.tops, (size_t)n);
        std::vector<float> mus = from_device(r.mu, (size_t)n);
        std::vector<TensorStatistics> statistics = from_device(r.statistics, (size_t)n);
        bool broken = false;
        for (int t = 0; t < n; t++) {
            const Param* p = &table->items[t];
            Expected e = expected[(size_t)t];
            float& m = mu[(size_t)t];
            double times = p->tp_axis == TP_WHOLE ? shards() : 1;  // as often is a tensor counted that all of a layer have
            double elements = (double)param_elements(p) * (takes_turns(p) ? micro_batches : 1) * shards() / times, all = elements * ranks;
            if (param_elements(p) > MODELLED) { m = mus[(size_t)t]; continue; }
            broken = broken || isnan(e.scale);
            if (tensor != NULL) {  // counts and headroom belong to the whole tensor
                double counts[] = {e.underflow, e.sent_tops, e.tops};
                host_all_reduce_sum(tensor, counts, 3);
                e.underflow = counts[0];
                e.sent_tops = counts[1];
                e.tops = config.algorithm == REDUCE_RING && fp8 ? counts[2] : e.tops;
            }
            CHECK(tops[(size_t)t] == (in_fp32(p) ? 0.0 : e.tops), "%s, step %d, %s: %g at the maximum, not %g", name, at, p->name, tops[(size_t)t], e.tops);
            if (!is_fp8(p->wire)) { continue; }
            e.tops /= times;
            e.underflow /= times;
            e.sent_tops /= times;
            if (config.algorithm == REDUCE_RING && config.scaling == SCALING_AUTO && record.skipped == NOT_SKIPPED) {
                m = e.tops > std::max(1.0, 1e-5 * elements) ? m * 0.5f : (float)((double)m * 1.0006933874625806);
                m = std::min(1.0f, std::max(1.0f / (float)ranks, m));
            }
            CHECK(same_float(mus[(size_t)t], m), "%s, step %d, %s: headroom %a, not %a", name, at, p->name, (double)mus[(size_t)t], (double)m);
            const TensorStatistics& s = statistics[(size_t)t];
            float saturated = (float)(config.algorithm == REDUCE_RING ? e.tops / elements : e.sent_tops / all);
            CHECK(s.underflow == (float)(e.underflow / all) && s.saturated == saturated && s.mu == m,
                "%s, step %d, %s: {%a %a %a}, not {%a %a %a}", name, at, p->name, (double)s.underflow, (double)s.saturated, (double)s.mu,
                e.underflow / all, (double)saturated, (double)m);
        }
        CHECK(!broken || record.skipped == SKIP_NON_FINITE_NORM, "%s, step %d: %d", name, at, record.skipped);
        check_norm();
        if (fp8) { check_same_everywhere(mus, statistics); }
        else { check_same_everywhere({}, {}); }
        if (tensor != NULL) { check_same_in_layer(mus, statistics); }
        steps_done++;
    }

    // The norm is that of all ranks' parts together
    void check_norm() const {
        double squares = 0.0;
        for (int t = 0; t < table->count; t++) {
            const Param* p = &table->items[t];
            const Expected& e = expected[(size_t)t];
            if (param_elements(p) > MODELLED) { return; }
            for (size_t i = 0; i < param_elements(p); i++) {
                double x = in_fp32(p) ? (double)expected_fp32[(size_t)t][i] : (double)decoded(p->wire, e.codes[i]) * (double)(is_fp8(p->wire) ? e.descale : 1.0f);
                squares += x * x;
            }
        }
        if (record.skipped != NOT_SKIPPED || squares > 1e30 || squares < 1e-30) { return; }  // beyond what pieces in FP32 hold
        CHECK(fabs(record.grad_norm - sqrt(squares)) <= 1e-5 * sqrt(squares), "%s, step %d: norm %.9g, not %.9g", name, steps_done, record.grad_norm, sqrt(squares));
    }

    void check_same_everywhere(const std::vector<float>& mus, const std::vector<TensorStatistics>& statistics) const {
        uint64_t h = 1469598103934665603ull, all[8];
        for (int t = 0; t < table->count; t++) {
            const Param* p = &table->items[t];
            size_t bytes = (level() > 0 ? 0 : param_elements(p)) * (size_t)dtype_bytes(p->wire);
            h = hash_of(h, from_device((const unsigned char*)p->grad, bytes).data(), bytes);
        }
        std::vector<float> slots = from_device(r.slots, 4 * (size_t)table->count);
        h = hash_of(h, slots.data(), slots.size() * 4);
        h = hash_of(h, mus.data(), mus.size() * 4);
        h = hash_of(h, statistics.data(), statistics.size() * sizeof(TensorStatistics));
        h = hash_of(h, &record, sizeof(record));
        host_all_gather(g, all, &h, sizeof(h));
        for (int k = 0; k < g->size; k++) { CHECK(all[k] == h, "%s, step %d: rank %d holds other bytes", name, steps_done, k); }
    }

    // The ranks of a layer have the same headroom and shares, and the same bytes of what they added up
    void check_same_in_layer(const std::vector<float>& mus, const std::vector<TensorStatistics>& statistics) const {
        uint64_t h = 1, all[8];
        for (int t = 0; t < table->count; t++) {
            const Param* p = &table->items[t];
            if (p->partial) { h = hash_of(h, from_device((const unsigned char*)p->grad, p->own_count * 4).data(), p->own_count * 4); }
            if (!is_fp8(p->wire)) { continue; }
            h = hash_of(h, &mus[(size_t)t], 4);
            h = hash_of(h, &statistics[(size_t)t], sizeof(TensorStatistics));
        }
        host_all_gather(tensor, all, &h, sizeof(h));
        for (int k = 0; k < tensor->size; k++) { CHECK(all[k] == h, "%s, step %d: rank %d of the layer holds other bytes", name, steps_done, k); }
    }

    // Of this rank's chunk of a bucket, what belongs to others: padding goes with the tensor before it
    uint64_t elements_of_others(const Bucket* b, size_t chunk) const {
        uint64_t n = 0;
        for (int i = 0; i < b->count; i++) {
            int t = r.partition.tensors[b->first + i].param;
            const Place& place = places[(size_t)t];
            size_t from = std::max(place.first, chunk * (size_t)g->rank), to = std::min(place.first + padded(&table->items[t]), chunk * (size_t)(g->rank + 1));
            n += place.owner != g->rank && to > from ? to - from : 0;
        }
        return n;
    }

    // What a rank of a layer sends of partial gradients: its part goes to each of the others, and one sum less than there are parts
    uint64_t partial_bytes() const {
        uint64_t sent = 0;
        for (int k = 0; k < r.partition.bucket_count && tensor != NULL; k++) {
            const Param* p = &table->items[r.partition.tensors[r.partition.buckets[k].first].param];
            uint64_t lines = places[(size_t)(p - table->items)].elements / 16, ranks = (uint64_t)tensor->size, me = (uint64_t)tensor->rank;
            uint64_t mine = (lines * (me + 1) + ranks - 1) / ranks - (lines * me + ranks - 1) / ranks;
            sent += p->partial ? 64 * (lines - mine + mine * (ranks - 1)) : 0;
        }
        return sent;
    }

    // What this step has sent to replicas, and in the layer
    void check_bytes(const uint64_t* before, uint64_t in_layer) const {
        uint64_t planned[COMM_OPERATIONS] = {};
        reduction_traffic(planned, &r, micro_batches);
        for (int op = 0; op < COMM_OPERATIONS; op++) {
            uint64_t sent = g->bytes_sent[op] - before[op] + (op == TP_OTHER ? in_layer : 0);
            CHECK(op == WEIGHTS_GATHER || sent == planned[op], "%s: %s: %" PRIu64 " bytes, not the planned %" PRIu64, name, comm_names[op], sent, planned[op]);
        }
        CHECK(in_layer == partial_bytes(), "%s: %" PRIu64 " bytes in the layer, not %" PRIu64, name, in_layer, partial_bytes());
        uint64_t want[COMM_OPERATIONS] = {}, peers = (uint64_t)g->size - 1, scales = 0;
        for (int k = 0; k < r.partition.bucket_count; k++) {
            const Bucket* b = &r.partition.buckets[k];
            const Param* p = &table->items[r.partition.tensors[b->first].param];
            const Place& place = places[(size_t)(p - table->items)];
            uint64_t times = takes_turns(p) ? (uint64_t)micro_batches : 1, part = times * place.part * (uint64_t)dtype_bytes(b->wire);
            bool vectors = p->format_class == VECTOR, ring = config.algorithm == REDUCE_RING;
            if (place.owner >= 0 && ring) {  // all parts but the own one
                uint64_t padded_all = 0;
                for (int i = 0; i < b->count; i++) { padded_all += padded(&table->items[r.partition.tensors[b->first + i].param]); }
                want[REDUCE_SCATTER] += times * (padded_all - place.mine) * (uint64_t)dtype_bytes(b->wire);
            } else {
                want[vectors ? VECTORS : ring ? REDUCE_SCATTER : ALL_TO_ALL] += peers * part;
            }
            if (place.owner >= 0 && !ring) { want[REGROUP] += 4 * times * elements_of_others(b, place.part); }
            if (level() == 0) { want[vectors ? VECTORS : ALL_GATHER] += peers * part; }
            if (is_fp8(b->wire)) { scales += times * (8 + (config.algorithm == REDUCE_DIRECT ? 4 * peers : 0)) * (((uint64_t)b->count + 15) / 16 * 16); }
        }
        for (int op = 0; op < COMM_OPERATIONS; op++) {
            uint64_t sent = g->bytes_sent[op] - before[op];
            if (op == SCALES) { CHECK(sent <= scales && (sent > 0) == (scales > 0), "%" PRIu64 " bytes of scales, at most %" PRIu64, sent, scales); }
            else { CHECK(sent == want[op], "%s: %" PRIu64 " bytes, not %" PRIu64, comm_names[op], sent, want[op]); }
        }
    }
};

// ---- weights ----

// Every rank writes what it keeps, and nothing else; when a layer's weights have been waited for they are those of the owners.
static void check_weights(Trial* trial, int round) {
    Reduction* r = &trial->r;
    Group* g = r->group;
    const Partition* p = &r->partition;
    auto byte = [=](int bucket, int rank, size_t i) { return (unsigned char)(mix64((uint64_t)i << 16 ^ (uint64_t)(bucket * 8 + rank)) + (uint64_t)round); };
    auto owner_of = [=](const Bucket* b, size_t element) {
        int owner = 0;
        while (owner < g->size && element >= b->cuts[owner + 1]) { owner++; }
        return owner;
    };
    uint64_t bytes = 0, before = g->bytes_sent[WEIGHTS_GATHER];
    for (int k = 0; k < p->bucket_count; k++) {
        const Bucket* b = &p->buckets[k];
        size_t each = (size_t)dtype_bytes(b->dtype), begin = part_begin(p, b) * each, n = part_elements(p, b) * each;
        std::vector<unsigned char> all(b->elements * each, 0xa5);
        for (size_t i = begin; i < begin + n; i++) { all[i] = byte(k, g->rank, i); }
        onto_device((unsigned char*)b->weights, all);
        bytes += n * (uint64_t)(g->size - 1);
    }
    weights_start(r, NULL);
    CHECK(r->queued == (r->partition.zero.level > 0 ? p->bucket_count : 0), "%d", r->queued);
    for (int i = 1; i < r->queued; i++) {  // in the order of the forward pass: embeddings, vectors, layer by layer
        auto turn = [=](int k) { int layer = p->buckets[r->queue[k]].layer; return layer == ALL_LAYERS ? 0 : layer < 0 ? layer : layer + 1; };
        CHECK(turn(i - 1) <= turn(i), "%s: layer %d before layer %d", trial->name, turn(i - 1), turn(i));
    }
    auto check_layer = [=](int layer) {
        for (int k = 0; k < p->bucket_count; k++) {
            const Bucket* b = &p->buckets[k];
            if (b->layer != layer) { continue; }
            size_t each = (size_t)dtype_bytes(b->dtype);
            std::vector<unsigned char> all = from_device((unsigned char*)b->weights, b->elements * each);
            for (size_t i = 0; i < all.size(); i++) {
                int owner = owner_of(b, i / each);
                unsigned char want = owner < g->size ? byte(k, owner, i) : 0xa5;
                CHECK(all[i] == want, "%s: weights of bucket %d, byte %zu: %x, not %x", trial->name, k, i, all[i], want);
            }
        }
    };
    // as a forward pass does; or only some of the layers are, or none
    for (int layer : {-1, (int)ALL_LAYERS, 0, 1, 2, 3}) {
        if (round % 3 == 1 || (round % 3 == 2 && layer > 1)) { continue; }
        for (uint64_t polls = mix64((uint64_t)(round * 8 + g->rank)) % 3; polls > 0; polls--) { reduction_poll(r); }
        weights_wait(r, layer, NULL);
        stream_sync(NULL);
        check_layer(layer);
    }
    reduction_begin(r, true, true, NULL);
    stream_sync(NULL);
    CHECK(!r->returning && r->queued == 0 && r->next == 0);
    for (int layer : {-1, (int)ALL_LAYERS, 0, 1, 2, 3}) { check_layer(layer); }
    CHECK(g->bytes_sent[WEIGHTS_GATHER] - before == bytes, "%" PRIu64 " bytes of weights, not %" PRIu64, g->bytes_sent[WEIGHTS_GATHER] - before, bytes);
}

// ---- tables ----

static void add_tensor(ParamTable* table, const char* name, int layer, int64_t n, FormatClass format_class, DType accum, DType wire) {
    Param* p = param_add(table, name, layer, 1, n, format_class, FP32);
    p->dtype = format_class == MATRIX ? E4M3 : BF16;
    p->accum = format_class == VECTOR ? FP32 : accum;
    p->wire = format_class == VECTOR ? FP32 : wire;
}

// Lengths at and beside multiples of everything; a layer of one element, one with two formats, one with an embedding besides, vectors in all layers
static ParamTable* awkward_table(DType accum, DType wire) {
    ParamTable* table = (ParamTable*)host_alloc(sizeof(ParamTable));
    table->count = table->next_number = 0;
    table->elements = 0;
    add_tensor(table, "wte", -1, 10007, EMBEDDING, accum, wire);
    add_tensor(table, "wpe", -1, 7, EMBEDDING, accum, wire);
    add_tensor(table, "h0.ln", 0, 65, VECTOR, accum, wire);
    add_tensor(table, "h0.a", 0, 63, MATRIX, accum, wire);
    add_tensor(table, "h0.b", 0, 4097, MATRIX, accum, wire);
    add_tensor(table, "h1.ln", 1, 1, VECTOR, accum, wire);
    add_tensor(table, "h1.a", 1, 64, MATRIX, accum, wire);
    add_tensor(table, "h1.b", 1, 1, MATRIX, accum, wire);
    add_tensor(table, "h1.c", 1, 300, MATRIX, FP32, BF16);
    add_tensor(table, "h1.d", 1, 65, MATRIX, accum, wire);
    add_tensor(table, "h2.a", 2, 4096, MATRIX, accum, wire);
    add_tensor(table, "lnf", 3, 200, VECTOR, accum, wire);
    add_tensor(table, "head", 3, 1, MATRIX, accum, wire);
    add_tensor(table, "lmhead", 3, 513, EMBEDDING, accum, wire);
    return table;
}

// The same as a rank of a layer has it: of the gradients of some vectors each has a part
static ParamTable* sharded_table(DType accum, DType wire, int ranks) {
    ParamTable* table = awkward_table(accum, wire);
    add_tensor(table, "h2.ln", 2, 600, VECTOR, accum, wire);
    for (int i = 0; i < table->count; i++) {
        Param* p = &table->items[i];
        p->tp_axis = strcmp(p->name, "wpe") == 0 || p->format_class == VECTOR ? TP_WHOLE : TP_ROWS;
        p->tp_ranks = ranks;
    }
    for (const char* name : {"h1.ln", "lnf", "h2.ln"}) { param_find(table, name)->partial = true; }
    return table;
}

// ---- what the ranks check ----

static const char* const scaling_names[] = {"pre", "post", "sqrt", "auto"};

template <class F> static void each_mode(F f) {
    const DType formats[] = {FP32, BF16, E4M3, E5M2};
    for (DType accum : {FP32, BF16, E4M3}) {
        for (DType wire : formats) {
            if (dtype_bytes(wire) > dtype_bytes(accum)) { continue; }
            for (GradScaling scaling : {SCALING_PRE, SCALING_POST, SCALING_SQRT, SCALING_AUTO}) {
                if (is_fp8(wire) || scaling == SCALING_AUTO) { f(accum, wire, ReductionConfig{scaling, REDUCE_RING, NOTHING_PARTITIONED}); }
            }
            f(accum, wire, ReductionConfig{SCALING_AUTO, REDUCE_DIRECT, NOTHING_PARTITIONED});
        }
    }
}

static void check_modes(Group* g, int steps) {
    each_mode([=](DType accum, DType wire, ReductionConfig config) {
        char name[64];
        snprintf(name, sizeof(name), "%s, %s, %s, %s", dtype_names[accum], dtype_names[wire], config.algorithm == REDUCE_RING ? "ring" : "direct",
            scaling_names[config.scaling]);
        ParamTable* table = awkward_table(accum, wire);
        {
            Trial trial(g, table, config);
            trial.name = name;
            for (int i = 0; i < steps; i++) { trial.step(); }
            trial.input_of = clean_input;  // and once with nothing that makes the ranks skip the step
            trial.step();
            CHECK(trial.record.skipped == NOT_SKIPPED, "%s: %d", name, trial.record.skipped);
        }
        free(table);
    });
}

// ZeRO 1 and 2, whole matrices and flat, with one micro-batch and with several
static void check_zero(Group* g, int steps) {
    each_mode([=](DType accum, DType wire, ReductionConfig config) {
        if (config.scaling != SCALING_AUTO) { return; }
        const struct { ZeroConfig zero; int micro_batches; } cases[] = {
            {{1, SPLIT_FLAT}, 1}, {{1, SPLIT_TENSOR}, 2}, {{2, SPLIT_FLAT}, 1}, {{2, SPLIT_TENSOR}, 1}, {{2, SPLIT_FLAT}, 3}, {{2, SPLIT_TENSOR}, 3}};
        for (auto& c : cases) {
            char name[128];
            snprintf(name, sizeof(name), "%s, %s, %s, ZeRO %d %s, %d micro-batches", dtype_names[accum], dtype_names[wire],
                config.algorithm == REDUCE_RING ? "ring" : "direct", c.zero.level, c.zero.split == SPLIT_FLAT ? "flat" : "by tensor", c.micro_batches);
            ParamTable* table = awkward_table(accum, wire);
            config.zero = c.zero;
            {
                Trial trial(g, table, config);
                trial.name = name;
                trial.micro_batches = c.micro_batches;
                for (int i = 0; i < steps; i++) {
                    trial.step();
                    check_weights(&trial, i);
                }
                trial.input_of = clean_input;
                trial.step();
                CHECK(trial.record.skipped == NOT_SKIPPED, "%s: %d", name, trial.record.skipped);
                weights_start(&trial.r, NULL);  // and are under way when all ends
            }
            free(table);
        }
    });
}

// One matrix, so that one rank has all and the others nothing: its sums in FP32 are longer than all that travels otherwise
static void check_one_matrix(Group* g) {
    for (int level : {1, 2}) {
        for (GradReduce algorithm : {REDUCE_RING, REDUCE_DIRECT}) {
            ParamTable* table = (ParamTable*)host_alloc(sizeof(ParamTable));
            table->count = table->next_number = 0;
            table->elements = 0;
            add_tensor(table, "matrix", 0, 60001, MATRIX, BF16, E4M3);
            add_tensor(table, "vector", 0, 65, VECTOR, FP32, FP32);
            {
                Trial trial(g, table, ReductionConfig{SCALING_AUTO, algorithm, ZeroConfig{level, SPLIT_TENSOR}});
                trial.name = "one matrix";
                trial.micro_batches = level;
                trial.step();
                check_weights(&trial, 0);
            }
            free(table);
        }
    }
}

// Alone: the gradients are the accumulators, and nothing is sent
static void check_alone(Group* g) {
    each_mode([=](DType accum, DType wire, ReductionConfig config) {
        ParamTable* table = awkward_table(accum, wire);
        {
            Trial trial(g, table, config);
            for (int step = 0; step < 2; step++) {
                std::vector<std::vector<unsigned char>> before;
                for (int t = 0; t < table->count; t++) {
                    float descale = 1.0f;
                    std::vector<uint32_t> codes = trial.accumulated(step, t, 0, &descale);
                    trial.write_accumulator(t, codes, descale);
                    const Param* p = &table->items[t];
                    CHECK(p->grad == p->accumulator && p->grad_slot == p->accum_slot && p->grad_dtype == p->accum, "%s", p->name);
                }
                const Memory& m = trial.memory;
                for (int k = 0; k < MEMORY_CATEGORIES; k++) { before.push_back(from_device((unsigned char*)m.block[k], m.bytes[k])); }
                for (int layer = 3; layer >= -1; layer--) { reduction_start(&trial.r, layer, NULL); }
                reduction_poll(&trial.r);
                reduction_finish(&trial.r, NULL);
                reduction_count(&trial.r, NULL);
                reduction_adapt(&trial.r, NULL, NULL, NULL);
                for (int k = 0; k < MEMORY_CATEGORIES; k++) {
                    CHECK(from_device((unsigned char*)m.block[k], m.bytes[k]) == before[(size_t)k], "%s", memory_names[k]);
                }
            }
            CHECK(trial.memory.bytes[COMMUNICATION] == 0);
        }
        free(table);
    });
    for (int op = 0; op < COMM_OPERATIONS; op++) { CHECK(g->bytes_sent[op] == 0, "%s", comm_names[op]); }
}

// ---- the ranks of a layer ----

#ifdef USE_MPI

// The ranks of g with the same `color`, in g's order
static Group group_of(Group* g, int color, bool staged) {
    Group part = {};
    MPI_CHECK(MPI_Comm_split(g->comm, color, g->rank, &part.comm));
    MPI_CHECK(MPI_Comm_set_errhandler(part.comm, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_size(part.comm, &part.size));
    MPI_CHECK(MPI_Comm_rank(part.comm, &part.rank));
    if (part.size == 1) { MPI_CHECK(MPI_Comm_free(&part.comm)); return part; }  // as group_world has it
    part.transport = g->transport == OVER_MPI && !staged ? OVER_MPI : OVER_MPI_STAGED;
    part.gathered = host_alloc((size_t)part.size * COMM_GATHER_BYTES);
    if (part.transport == OVER_MPI_STAGED) { part.staging = pinned_alloc(COMM_STAGING_BYTES); }
    return part;
}

// One replica: nothing travels between replicas, and still a layer's ranks add up what is partial, at the step's end, and leave all else as it is
static void check_one_replica(Group* data, Group* tensor) {
    for (GradReduce algorithm : {REDUCE_RING, REDUCE_DIRECT}) {
        ParamTable* table = sharded_table(BF16, E4M3, tensor->size);
        {
            Trial trial(data, table, ReductionConfig{SCALING_AUTO, algorithm, ZeroConfig{2, SPLIT_FLAT}}, tensor);
            const Memory& m = trial.memory;
            Reduction* r = &trial.r;
            size_t lines = 64, largest = (lines + (size_t)tensor->size - 1) / (size_t)tensor->size * 64;  // 1, 200 and 600 elements, each padded to 128
            CHECK(m.bytes[COMMUNICATION] == (tensor->transport == OVER_MPI ? (largest + 255) / 256 * 256 : 0), "%zu", m.bytes[COMMUNICATION]);
            trial.micro_batches = 2;
            for (int step = 0; step < 3; step++) {
                uint64_t before = tensor->bytes_sent[TP_OTHER], planned[COMM_OPERATIONS] = {};
                for (int k = 0; k < 2; k++) {
                    reduction_begin(r, k == 0, k == 1, NULL);
                    std::vector<std::vector<uint32_t>> written;
                    for (int t = 0; t < table->count; t++) {
                        float descale = 1.0f;
                        CHECK(accumulates(r, &table->items[t]) == (k > 0), "%s", table->items[t].name);
                        written.push_back(trial.accumulated(2 * step + k, t, 0, &descale, true));
                        trial.write_accumulator(t, written.back(), descale);
                    }
                    for (int layer = 3; layer >= -1; layer--) { reduction_start(r, layer, NULL); }
                    reduction_finish(r, NULL);
                    stream_sync(NULL);
                    for (int t = 0; t < table->count; t++) {
                        const Param* p = &table->items[t];
                        float descale = 1.0f;
                        size_t bytes = (size_t)dtype_bytes(p->accum);
                        CHECK(p->grad == p->accumulator && p->grad_dtype == p->accum, "%s", p->name);
                        if (p->partial && k == 1) { written[(size_t)t] = trial.accumulated(2 * step + k, t, 0, &descale); }
                        std::vector<unsigned char> got = from_device((const unsigned char*)p->grad, param_elements(p) * bytes);
                        for (size_t i = 0; i < param_elements(p); i++) {
                            CHECK(memcmp(&got[i * bytes], &written[(size_t)t][i], bytes) == 0, "%s, element %zu", p->name, i);
                        }
                    }
                }
                reduction_traffic(planned, r, 2);
                uint64_t sent = tensor->bytes_sent[TP_OTHER] - before;
                CHECK(sent == planned[TP_OTHER] && sent == trial.partial_bytes(), "%" PRIu64 " bytes, not %" PRIu64, sent, planned[TP_OTHER]);
                for (int op = 0; op < COMM_OPERATIONS; op++) { CHECK(op == TP_OTHER || planned[op] == 0, "%s", comm_names[op]); }
                reduction_count(r, NULL);
                reduction_adapt(r, NULL, NULL, NULL);
            }
        }
        free(table);
    }
    for (int op = 0; op < COMM_OPERATIONS; op++) { CHECK(data->bytes_sent[op] == 0 && (op == TP_OTHER || tensor->bytes_sent[op] == 0), "%s", comm_names[op]); }
}

// Of the world, layers of `ranks` ranks each, next to each other; the replicas are those with the same number in their layer
static void check_layers(Group* world, int ranks, bool staged) {
    Group tensor = group_of(world, world->rank / ranks, staged), data = group_of(world, world->rank % ranks, staged);
    CHECK(tensor.size == ranks && data.size * ranks == world->size, "%d and %d", tensor.size, data.size);
    shard = tensor.rank;
    if (data.size == 1) {
        check_one_replica(&data, &tensor);
    } else {
        const struct { ZeroConfig zero; int micro_batches; } cases[] = {{NOTHING_PARTITIONED, 2}, {{1, SPLIT_FLAT}, 1}, {{2, SPLIT_FLAT}, 3}, {{2, SPLIT_TENSOR}, 2}};
        for (auto& c : cases) {
            for (DType wire : {E4M3, FP32}) {
                for (GradReduce algorithm : {REDUCE_RING, REDUCE_DIRECT}) {
                    ParamTable* table = sharded_table(wire == FP32 ? FP32 : BF16, wire, tensor.size);
                    {
                        char name[128];
                        snprintf(name, sizeof(name), "layers of %d, %s, %s, ZeRO %d", ranks, dtype_names[wire], algorithm == REDUCE_RING ? "ring" : "direct", c.zero.level);
                        Trial trial(&data, table, ReductionConfig{SCALING_AUTO, algorithm, c.zero}, &tensor);
                        trial.name = name;
                        trial.input_of = sharded_input;
                        trial.micro_batches = c.micro_batches;
                        for (int i = 0; i < 3; i++) { trial.step(); }
                        CHECK(trial.record.skipped == NOT_SKIPPED, "%s: %d", name, trial.record.skipped);
                        if (c.zero.level > 0) { check_weights(&trial, 0); }
                    }
                    free(table);
                }
            }
        }
    }
    group_free(&tensor);
    group_free(&data);
}

#endif

// ---- headroom ----

// Of tensor 0, 3,000 elements, and 1, 200,001: how many elements overflow in sum in each step (-1: an inf on the last rank), and what that does to μ:
// more than max(1, 1e-5·n) codes at the maximum halve it. Eight ranks: μ begins at 0.354 and may go down to 0.125.
struct HeadroomStep { int tops[2]; const char* change; };
static const HeadroomStep headroom_steps[] = {
    {{2, 2}, "hg"}, {{1, 3}, "gh"}, {{0, 0}, "gg"}, {{-1, 0}, ".."}, {{5, -1}, ".."}, {{0, 0}, "gg"}, {{5, 3}, "hh"}, {{5, 3}, "gg"}, {{2, 1}, "gg"},
};

static float headroom_input(int step, int t, int rank, int ranks, size_t n, size_t i) {
    uint64_t h = mix64((uint64_t)step << 48 ^ (uint64_t)rank << 40 ^ (uint64_t)i);
    int tops = t < 2 ? headroom_steps[step].tops[t] : 0;
    if (t < 2 && i >= 100 && i < 100 + (size_t)ranks) { return i == 100 + (size_t)rank ? 1.5f : 0.0f; }  // every rank's amax, of no other rank
    if (tops < 0 && rank == ranks - 1 && i == n / 2) { return INFINITY; }
    if (i >= 200 && i < 200 + (size_t)max_of(tops, 0)) { return i % 2 ? 1.5f : -1.5f; }                   // the same on all ranks
    return (float)((int)(h % 201) - 100) * 0x1p-15f;
}

static void check_headroom(Group* g) {
    ParamTable* table = (ParamTable*)host_alloc(sizeof(ParamTable));
    table->count = table->next_number = 0;
    table->elements = 0;
    {
        add_tensor(table, "small", 0, 3000, MATRIX, FP32, E4M3);
        add_tensor(table, "large", 1, 200001, MATRIX, FP32, E4M3);
        add_tensor(table, "vector", 0, 65, VECTOR, FP32, FP32);
        Trial trial(g, table, ReductionConfig{SCALING_AUTO, REDUCE_RING, NOTHING_PARTITIONED});
        trial.name = "headroom";
        trial.input_of = headroom_input;
        float least = 1.0f / (float)g->size, mu[2] = {1.0f / sqrtf((float)g->size), 1.0f / sqrtf((float)g->size)};
        for (const HeadroomStep& s : headroom_steps) {
            trial.step();
            std::vector<float> got = from_device(trial.r.mu, 2);
            for (int t = 0; t < 2; t++) {
                if (s.change[t] == 'h') { mu[t] = std::max(least, mu[t] * 0.5f); }
                if (s.change[t] == 'g') { mu[t] = std::min(1.0f, (float)((double)mu[t] * 1.0006933874625806)); }
                CHECK(same_float(got[(size_t)t], mu[t]), "step %d, tensor %d: %a, not %a", trial.steps_done - 1, t, (double)got[(size_t)t],
                    (double)mu[t]);
            }
            bool finite = s.change[0] != '.' && s.change[1] != '.';  // all ranks skip the step, or none: the records were compared
            CHECK(trial.record.skipped == (finite ? NOT_SKIPPED : SKIP_NON_FINITE_NORM), "step %d: %d", trial.steps_done - 1, trial.record.skipped);
        }
        CHECK(mu[0] > least && mu[0] < 1.01f * least, "the lower bound was not met: %a", (double)mu[0]);
    }
    free(table);
}

static float calm_input(int step, int t, int rank, int, size_t, size_t i) {
    return (float)((int)(mix64((uint64_t)(step * 64 + t * 8 + rank) << 32 ^ (uint64_t)i) % 201) - 100) * (rank == 0 ? 1.0f : 0x1p-4f);
}

// Two ranks, without overflow: μ grows from 1/√2 to 1 in 500 steps, and no further
static void check_growth(Group* g) {
    ParamTable* table = (ParamTable*)host_alloc(sizeof(ParamTable));
    table->count = table->next_number = 0;
    table->elements = 0;
    add_tensor(table, "one", 0, 65, MATRIX, BF16, E4M3);
    add_tensor(table, "vector", 0, 1, VECTOR, FP32, FP32);
    {
        Trial trial(g, table, ReductionConfig{SCALING_AUTO, REDUCE_RING, NOTHING_PARTITIONED});
        trial.input_of = calm_input;
        trial.name = "growth";
        double start = pow((double)g->size, -0.5);
        int steps = (int)ceil(1000.0 * log2(1.0 / start)) + 3;
        for (int i = 1; i <= steps; i++) {
            trial.step();
            float mu = from_device(trial.r.mu, 1)[0];
            CHECK(fabs((double)mu - std::min(1.0, start * exp2(i / 1000.0))) < 1e-4, "step %d: %g", i, (double)mu);
        }
        CHECK(from_device(trial.r.mu, 1)[0] == 1.0f);
    }
    free(table);
}

// ---- overlap ----

// Buckets are done before reduction_finish, by polls alone, and a rank that waits for another goes on with its own work
static void check_overlap(Group* g) {
    for (int i = 0; i < 6; i++) {
        GradReduce algorithm = i % 2 == 0 ? REDUCE_RING : REDUCE_DIRECT;
        ZeroConfig zero = i < 2 ? NOTHING_PARTITIONED : i < 4 ? ZeroConfig{1, SPLIT_TENSOR} : ZeroConfig{2, SPLIT_FLAT};
        ParamTable* table = awkward_table(FP32, E4M3);
        {
            Trial trial(g, table, ReductionConfig{SCALING_AUTO, algorithm, zero});
            trial.name = "overlap";
            trial.patient = true;
            for (int k = 0; k < 3; k++) { trial.step(); }
#ifdef USE_MPI
            if (g->transport == OVER_MPI) {
                Reduction* r = &trial.r;
                alarm(60);
                if (g->rank == 1) { MPI_CHECK(MPI_Barrier(MPI_COMM_WORLD)); }  // starts when rank 0 has gone on
                reduction_start(r, 2, NULL);
                for (int k = 0; k < 20; k++) { reduction_poll(r); }
                if (g->rank == 0) {
                    CHECK(r->queued == 1 && r->next == 0, "%d of %d", r->next, r->queued);
                    MPI_CHECK(MPI_Barrier(MPI_COMM_WORLD));
                }
                reduction_finish(r, NULL);
                CHECK(reduction_waited(r, r->steps - 1) > 0.0 && reduction_waited(r, r->steps - 1) < 60.0, "%g s", reduction_waited(r, r->steps - 1));
                alarm(0);
            }
#endif
        }
        free(table);
    }
}

// Through pinned memory, as where ranks share a GPU; in the CPU build, too, its copies are made
static void stage(Group* g) {
#if defined(USE_MPI) && !defined(USE_CUDA)
    g->transport = OVER_MPI_STAGED;
    g->staging = host_alloc(COMM_STAGING_BYTES);
#else
    (void)g;
#endif
}

static void unstage(Group* g) {
#if defined(USE_MPI) && !defined(USE_CUDA)
    free(g->staging);
    g->staging = NULL;
#else
    (void)g;
#endif
}

static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    world_select_device(&world);
    Group group = group_world(&world, true);
    if (strcmp(mode, "modes") == 0) {
        check_modes(&group, atoi(argument));
    } else if (strcmp(mode, "alone") == 0) {
        check_alone(&group);
    } else if (strcmp(mode, "staged") == 0) {
        stage(&group);
        check_modes(&group, atoi(argument));
        unstage(&group);
    } else if (strcmp(mode, "zero") == 0) {
        check_zero(&group, atoi(argument));
        check_one_matrix(&group);
    } else if (strcmp(mode, "staged zero") == 0) {
        stage(&group);
        check_zero(&group, atoi(argument));
        check_one_matrix(&group);
        unstage(&group);
#ifdef USE_MPI
    } else if (strcmp(mode, "layers") == 0 || strcmp(mode, "staged layers") == 0) {
        check_layers(&group, atoi(argument), strcmp(mode, "staged layers") == 0);
#endif
    } else if (strcmp(mode, "headroom") == 0) {
        check_headroom(&group);
    } else if (strcmp(mode, "growth") == 0) {
        check_growth(&group);
        check_overlap(&group);
    }
    printf("held\n");
    group_free(&group);
    world_finalize(&world);
    return 0;
}

// ---- the tests ----

static void expect_all(int ranks, const char* mode, const char* argument) {
    if (!can_launch(ranks)) { skip(); }
    Launched l = expect_ranks(ranks, mode, argument, NULL, 120, 0);
    int held = 0;
    for (const char* p = l.out; (p = strstr(p, "held\n")) != NULL; p++) { held++; }
    assert_int_equal(held, ranks);
}

static void one_rank_reduces_nothing(void**) { expect_all(1, "alone", "0"); }

static void reduced_gradients_are_those_of_the_model_bit_for_bit(void**) {
    const struct { int ranks; const char* steps; } cases[] = {{2, "5"}, {3, "4"}, {4, "4"}, {8, "2"}};
    for (auto& c : cases) { expect_all(c.ranks, "modes", c.steps); }
}

static void staged_gradients_are_the_same(void**) { expect_all(3, "staged", "2"); }

static void with_zero_every_rank_has_its_part_and_gets_all_weights(void**) {
    const struct { int ranks; const char* steps; } cases[] = {{2, "2"}, {3, "2"}, {4, "1"}, {8, "0"}};
    for (auto& c : cases) { expect_all(c.ranks, "zero", getenv("SOAK") != NULL ? "5" : c.steps); }
}

static void staged_parts_are_the_same(void**) { expect_all(3, "staged zero", "1"); }

static void ranks_of_a_layer_add_up_what_is_partial_and_count_together(void**) {
    const struct { int world; const char* ranks; } cases[] = {{4, "2"}, {4, "4"}, {5, "5"}, {6, "3"}};
    for (auto& c : cases) { expect_all(c.world, "layers", c.ranks); }
    expect_all(4, "staged layers", "2");
    expect_all(3, "staged layers", "3");
}

static void headroom_halves_where_sums_overflow_and_outlives_an_inf(void**) { expect_all(8, "headroom", "0"); }

static void headroom_grows_to_1_and_buckets_travel_meanwhile(void**) { expect_all(2, "growth", "0"); }

// What a child says and its exit code, for what ends the process
static int ends(void (*f)(void), char* said, size_t size) {
    int ends_of_pipe[2], status = 0;
    assert_int_equal(pipe(ends_of_pipe), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends_of_pipe[1], STDERR_FILENO);
        f();
        _exit(0);
    }
    close(ends_of_pipe[1]);
    ssize_t n = read(ends_of_pipe[0], said, size - 1);
    said[n > 0 ? n : 0] = '\0';
    close(ends_of_pipe[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

// A table with one tensor of these formats, and the plan of its reduction
static void plan_one(DType accum, DType wire) {
    ParamTable* table = (ParamTable*)host_alloc(sizeof(ParamTable));
    table->count = table->next_number = 0;
    table->elements = 0;
    add_tensor(table, "h0.qkvw", 0, 10, MATRIX, accum, wire);
    Group g = {};
    g.size = 2;
    Reduction r;
    reduction_plan(&r, &g, NULL, table, ReductionConfig{SCALING_AUTO, REDUCE_RING, NOTHING_PARTITIONED});
    free(table);
}

static void gradients_that_are_sent_wider_than_they_are_added_up_are_refused(void**) {
    char said[1024];
    assert_int_equal(ends([] { plan_one(E4M3, E5M2); }, said, sizeof(said)), 0);
    assert_int_equal(ends([] { plan_one(BF16, BF16); }, said, sizeof(said)), 0);
    assert_int_equal(ends([] { plan_one(BF16, FP32); }, said, sizeof(said)), 1);
    assert_string_equal(said, "train_gpt_fp8: gradient of h0.qkvw: added up in bf16, sent in fp32, which is wider\n");
    assert_int_equal(ends([] { plan_one(E4M3, FP32); }, said, sizeof(said)), 1);
    assert_int_equal(ends([] { plan_one(E4M3, BF16); }, said, sizeof(said)), 1);
    assert_string_equal(said, "train_gpt_fp8: gradient of h0.qkvw: added up in e4m3, sent in bf16, which is wider\n");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_reduces_nothing), cmocka_unit_test(reduced_gradients_are_those_of_the_model_bit_for_bit),
        cmocka_unit_test(staged_gradients_are_the_same), cmocka_unit_test(with_zero_every_rank_has_its_part_and_gets_all_weights),
        cmocka_unit_test(staged_parts_are_the_same), cmocka_unit_test(ranks_of_a_layer_add_up_what_is_partial_and_count_together),
        cmocka_unit_test(headroom_halves_where_sums_overflow_and_outlives_an_inf),
        cmocka_unit_test(headroom_grows_to_1_and_buckets_travel_meanwhile),
        cmocka_unit_test(gradients_that_are_sent_wider_than_they_are_added_up_are_refused),
    };
    return cmocka_run_group_tests_name("comm", tests, NULL, NULL);
}
