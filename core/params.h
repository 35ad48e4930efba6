// params.h: the one table of parameters: the only description of what a model is made of.
//
// It is built once from the configuration. Initialisation, allocation, the optimizer, reduction, import and export all walk it, so a tensor that is
// added to the table exists everywhere. The order is that of the forward pass. Which tensors travel together, and which rank keeps their states, is
// partition.h's part: by itself a table is one rank's, who keeps everything.
#pragma once
#include "memory.h"

// What decides a tensor's format: MATRIX is an input of an FP8 matmul where the recipe says so; EMBEDDING and VECTOR stay in the activations' type.
enum FormatClass { MATRIX, EMBEDDING, VECTOR };

// How the ranks of a layer (tensor parallel) share a tensor: each has all of it, some of its rows (of a bias: some of its elements), or some of its columns
enum TpAxis { TP_WHOLE, TP_ROWS, TP_COLS };

constexpr int STATE_BLOCK = 128;  // elements of an optimizer state that share an exponent, where blocks have scales of their own

// Master weight, first or second moment of what this rank keeps of a parameter, (own_count) on the device. FP16 and FP8 are values times a power of two: one a tensor, in a slot
// as gradients have it, or one a block.
struct OptimizerTensor {
    DType dtype;
    void* data;
    float* slot;         // {descale, scale, previous descale, 0}; NULL: not scaled by tensor
    int8_t* exponents;   // (ceil(own_count / STATE_BLOCK)) codes are values · 2^exponent; NULL: not scaled by block
};

struct Param {
    char name[32];       // llm.c's names; layers as h0.qkvw
    int64_t rows, cols;  // (rows, cols) row-major as stored; a vector has one row
    int64_t valid_rows;  // rows beyond are padding (vocabulary): they stay zero
    FormatClass format_class;
    int number;          // of the tensor within the table of the whole model: what its random bits depend on
    TpAxis tp_axis;      // (rows, cols) are this rank's share of it, of tp_ranks equal ones, of which it is number tp_rank
    int tp_rank, tp_ranks;
    int segments;        // TP_ROWS: tensors of equal size, one below the other, of each of which a rank has its share: 3 of queries, keys and values
    bool partial;        // gradients are of this rank's own rows of the batch: the ranks of a layer add theirs up before replicas do
    bool apart;          // travels by itself: another stage has it too, and a sum's order depends on where in a bucket it is cut
    bool counted;        // in the global norm: of the ranks that hold the same values one counts them
    int layer;           // -1: outside the layers, before them; the layer count: after them
    bool decay;          // weight decay applies
    float init_std;      // drawn from N(0, init_std²) where > 0, else set to init_value
    float init_value;
    DType dtype;         // of the weight that the forward pass reads
    size_t offset;       // of its first element within all buckets together, a multiple of PARAM_ALIGNMENT
    // what this rank keeps of it (partition.h): states and reduced gradient of the elements [own_first, own_first + own_count)
    int owner;           // the rank that keeps it whole; -1: it is cut, or nothing is partitioned
    size_t own_first, own_count;
    int piece_shift;     // elements before it in its first piece of the gradient norm
    void* weight;        // (rows, cols) of dtype
    float* slot;         // FP8: {descale, scale, 0, 0}, 16-byte aligned on the device; NULL otherwise
    // FP8 with a scale for each 128 × 128: their amaxes, row by row, and their descales as products over columns take them, and over rows (core/matmul.cuh,
    // SCALE_BLK128); NULL otherwise
    uint32_t* block_amaxes;
    float *block_descales, *turned_descales;
    OptimizerTensor master, m, v;
    // the gradient; where it lies is up to the reduction (comm.cuh)
    DType accum;         // its format while micro-batches are added up
    DType wire;          // its format between ranks
    DType grad_dtype;    // its format for the optimizer: `wire` where ranks exchanged it, else `accum`
    void* accumulator;   // (rows, cols) of accum
    void* grad;          // (own_count) of grad_dtype: the reduced gradient of what this rank keeps. Often in the accumulator's memory, which then is gone
    float* accum_slot;   // {descale, scale, previous descale, 0} of an FP8 accumulator; of scale 1 otherwise
    float* grad_slot;    // the same of the reduced gradient
};

constexpr int MAX_PARAMS = 4096;
constexpr size_t PARAM_ALIGNMENT = 128;  // elements: where a tensor begins a block of an optimizer state begins
static_assert(PARAM_ALIGNMENT % STATE_BLOCK == 0, "blocks do not straddle tensors");

struct ParamTable {
    Param items[MAX_PARAMS];
    int count;
    int next_number;  // of the tensor that is added next
    size_t elements;  // of all together, paddings included
};

static inline size_t param_elements(const Param* p) { return (size_t)(p->rows * p->cols); }

// Where this rank's elements are within the whole tensor
static inline ElementMap whole_elements(const Param* p) {
    uint64_t ranks = (uint64_t)p->tp_ranks, run = p->tp_axis == TP_ROWS ? (uint64_t)(p->rows * p->cols / p->segments) : (uint64_t)p->cols;
    return p->tp_axis == TP_WHOLE || ranks == 1 ? ElementMap{} : ElementMap{run, run * ranks, run * (uint64_t)p->tp_rank};
}

// The elements of the whole tensor
static inline size_t whole_count(const Param* p) { return param_elements(p) * (size_t)(p->tp_axis == TP_WHOLE ? 1 : p->tp_ranks); }

static inline Param* param_add(ParamTable* table, const char* name, int layer, int64_t rows, int64_t cols, FormatClass format_class, DType dtype) {
    if (table->count == MAX_PARAMS) { die("more than %d parameters", MAX_PARAMS); }
    Param* p = &table->items[table->count++];
    *p = Param{};
    snprintf(p->name, sizeof(p->name), "%s", name);
    p->rows = rows;
    p->cols = cols;
    p->valid_rows = rows;
    p->format_class = format_class;
    p->number = table->next_number++;
    p->tp_ranks = p->segments = 1;
    p->counted = true;
    p->layer = layer;
    p->decay = rows > 1;
    p->dtype = dtype;
    p->owner = -1;
    p->own_count = param_elements(p);
    p->offset = table->elements;
    table->elements += round_up(param_elements(p), PARAM_ALIGNMENT);
    return p;
}

static inline Param* param_find(ParamTable* table, const char* name) {
    for (int i = 0; i < table->count; i++) {
        if (strcmp(table->items[i].name, name) == 0) { return &table->items[i]; }
    }
    return NULL;
}

// The number of parameters in the usual sense: without padding rows
static inline int64_t params_total(const ParamTable* table) {
    int64_t n = 0;
    for (int i = 0; i < table->count; i++) { n += table->items[i].valid_rows * table->items[i].cols; }
    return n;
}

// Standard normal number of one element of a tensor (Box-Muller on the counter-based generator), the same whatever the layout over ranks
static inline float param_normal(RandomKey key, uint64_t element) {
    uint32_t a = random_bits(key, 2 * element), b = random_bits(key, 2 * element + 1);
    double u = ((double)a + 0.5) * (1.0 / 4294967296.0), v = (double)b * (1.0 / 4294967296.0);
    return (float)(sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * v));
}

// Writes the initial values of this rank's share of a parameter as float32 (rows, cols): a function of the seed, the parameter's name and the element of the
// whole tensor, so that neither the order of the table, nor what other tensors there are, nor how ranks share it changes them.
static inline void param_initialise(float* values, const Param* p, uint64_t seed) {
    uint64_t name = 0;
    for (const char* c = p->name; *c != '\0'; c++) { name = mix64(name ^ (uint64_t)(unsigned char)*c); }
    RandomKey key = random_key(seed, 0, name);
    int64_t n = (int64_t)param_elements(p), valid = p->valid_rows * p->cols;
    ElementMap whole = whole_elements(p);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        values[i] = i >= valid ? 0.0f : p->init_std > 0.0f ? p->init_std * param_normal(key, whole(i)) : p->init_value;
    }
}
