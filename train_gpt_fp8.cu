// train_gpt_fp8.cu: the trainer: a GPT, its forward and backward pass, the training step, main().
//
// The model is a GPT-3-style decoder (pre-LayerNorm, GELU, biases, learned or rotary positions, tied or untied head). Its linear layers compute
//     Y = X·Wᵀ, dX = dY·W, dW = dYᵀ·X
// on X and W in E4M3 and dY in E5M2 with one power-of-two scale a tensor, or each block of 128 elements (recipe fp8), in BF16 (recipe bf16), or in FP32
// (recipe fp32, for tests), with FP32 accumulation; everything between them is stored in BF16 and computed in FP32. What backward needs is kept in `Layer`; --recompute keeps less.
//
// A step is: for each micro-batch forward, head and backward; the sum of the gradients over ranks; the optimizer's decision and update; the scales.
// The decisions are made on the device: the host reads a step's record when the next step has been launched.
//
// Ranks are replicas (dp) of pipelines of stages (pp) of ranks that share layers (tp; core/topology.cuh). Of the latter each has its `own` rows of the batch
// in the residual stream and the LayerNorms (sequence parallel), and all rows within attention and MLP, of its own heads and channels: all_rows and
// own_rows lead from one to the other. A stage keeps what backward needs of the micro-batches in flight (core/schedule.h), each in a slot of its own.
//
// Order of the file: settings and flags; the model and what it keeps; linear layers; forward, head, backward; evaluation and sampling; the training
// run and what it prints; --plan.
#include "fp8_kernels.cuh"       // kernels of the forward and backward pass, FP8 in and out; scaling sites
#include "adam_fp8.cuh"          // gradient norm, the decision to step, AdamW
#include "comm.cuh"              // the reduction of gradients between replicas, the return of weights
#include "dataloader.h"          // token shards and text
#include "core/attention.cuh"    // attention_forward, attention_backward
#include "core/batch.h"          // a micro-batch on the host
#include "core/checkpoint_reader.cuh"  // what a run leaves behind to go on from
#include "core/choices.h"        // multiple-choice files
#include "core/exchange.cuh"     // what ranks of a layer, and stages, send each other
#include "core/hf.h"             // Hugging Face's folders
#include "core/learning_rate.h"  // schedules
#include "core/log.h"            // log.jsonl, step lines, tables
#include "core/matmul.cuh"       // matmul
#include "core/memory.h"         // memory by category
#include "core/model_io.h"       // llm.c's model.bin
#include "core/options.h"        // the option table
#include "core/params.h"         // the table of parameters
#include "core/plan.h"           // GPUs, rooflines, a pipeline's schedule, a plan and how it is printed
#include "core/presets.h"        // shapes by name
#include "core/sampling.h"       // the next token, given the logits
#include "core/tokenizer.h"      // tokens as text
#include "core/topology.cuh"     // replicas, stages, ranks that share layers
#include "core/watchdog.h"       // ends a run that hangs
#include <algorithm>
#include <numeric>
#include <signal.h>

// ---- settings ----

enum Recipe { RECIPE_FP8, RECIPE_FP8_LM, RECIPE_BF16, RECIPE_FP32 };
enum FP8Format { FORMAT_E4M3, FORMAT_E5M2 };
enum GradFormat { GRAD_FP32, GRAD_BF16, GRAD_E4M3, GRAD_E5M2 };
enum OptBlock { BLOCK_TENSOR, BLOCK_128 };
enum AlgorithmChoice { ALGORITHM_TIMED, ALGORITHM_LIBRARY };
enum ExportFormat { EXPORT_BF16, EXPORT_FP32, EXPORT_FP16 };
enum StateFormat { STATE_FP32, STATE_BF16, STATE_FP16, STATE_E4M3, STATE_E5M2, STATE_UE5M3 };  // as in DType

static const DType grad_formats[] = {FP32, BF16, E4M3, E5M2};  // by GradFormat
static const DType export_formats[] = {BF16, FP32, FP16};      // by ExportFormat

struct Bf16Layers { int first, last; };  // layers left in BF16 at each end

struct Args {
    const char* train_data = NULL;
    const char* val_data = NULL;
    double val_split = 0.0;
    const char* eval = NULL;
    const char* output_dir = "log";
    const char* init = NULL;
    const char *export_hf = NULL, *export_llmc = NULL, *hf_tokenizer = NULL;
    ExportFormat export_dtype = EXPORT_BF16;
    int64_t layers = 0, heads = 0, width = 0, vocab = 0;
    Position position = POSITION_ROPE;
    bool tied = true;
    int64_t micro_batch = 4, seq_len = 1024, global_batch = 0, steps = -1;
    bool overfit_batch = false;
    double lr = 3e-4, min_lr_frac = 0.1, weight_decay = 0.1, clip = 1.0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
    int64_t warmup = -1;
    RateSchedule schedule = SCHEDULE_COSINE;
    double skip_loss_z = 0.0, skip_grad_z = 0.0;
    Recipe recipe = RECIPE_FP8;
    FP8Scaling fp8_scaling = SCALING_DELAYED;
    FP8Format fp8_fwd = FORMAT_E4M3, fp8_bwd = FORMAT_E5M2;
    Bf16Layers bf16_layers = {0, 0};
    int64_t fp8_min_size = 0;
    GradFormat grad_dtype = GRAD_E4M3, grad_accum_dtype = GRAD_BF16;
    GradScaling grad_scaling = SCALING_AUTO;
    GradReduce grad_reduce = REDUCE_DIRECT;
    Rounding grad_accum_rounding = STOCHASTIC;
    StateFormat master_dtype = STATE_FP32, m_dtype = STATE_FP32, v_dtype = STATE_FP32;
    OptBlock opt_block = BLOCK_TENSOR;
    Rounding master_rounding = NEAREST, moment_rounding = NEAREST;
    int64_t recompute = 1, zero = 1;
    ZeroSplit zero_split = SPLIT_FLAT;
    int64_t val_every = 250, val_batches = 20, sample_every = 0, sample_len = 64;
    const char *tokenizer = NULL, *prompt = NULL;
    int64_t generate = 0, samples = 1, top_k = 0;
    double temperature = 0.8, top_p = 1.0;
    int64_t seed = 1337;
    AlgorithmChoice matmul_choice = ALGORITHM_TIMED;
    const char* matmul_cache = NULL;
    int64_t checkpoint_every = 0, keep = 5;
    bool resume = false;
    double checkpoint_memory = 0.0, max_minutes = 0.0, timeout = 600.0;
    int64_t max_skipped = 25;
    bool staged = false, profile = false, log_tensors = false;
    int64_t tp = 1, pp = 1, world = 0;
    bool plan = false, json = false, kernels = false;
    GpuChoice gpu = GPU_H100;
};

// "first:1,last:2"
static const char* parse_bf16_layers(void* value, const char* text) {
    static const char* const allowed = "allowed: first:N, last:M, or first:N,last:M with N and M 0 or more";
    Bf16Layers layers = {0, 0};
    while (*text != '\0') {
        int* which = strncmp(text, "first:", 6) == 0 ? &layers.first : strncmp(text, "last:", 5) == 0 ? &layers.last : NULL;
        if (which == NULL) { return allowed; }
        text = strchr(text, ':') + 1;
        char* end;
        errno = 0;
        long n = strtol(text, &end, 10);
        if (end == text || *text < '0' || *text > '9' || errno != 0 || n > 100000) { return allowed; }
        *which = (int)n;
        if (*end == ',' && end[1] != '\0') { end++; }
        else if (*end != '\0') { return allowed; }
        text = end;
    }
    memcpy(value, &layers, sizeof(layers));
    return NULL;
}
static void print_bf16_layers(char* text, size_t size, const void* value) {
    const Bf16Layers* l = (const Bf16Layers*)value;
    snprintf(text, size, "first:%d,last:%d", l->first, l->last);
}
constexpr int MAX_OPTIONS = 128;
constexpr int64_t MAX_MICRO_BATCH = 1 << 20;

struct OptionTable {
    Option items[MAX_OPTIONS];
    Options options;
};

static const RefusedFlag refused_flags[] = {
    {"f", "the precision of FP32 matmuls is never lowered: no flag is needed"},
    {"w", "master weights are always kept: no flag is needed"},
    {"ge", "--recompute N (-r) and fused kernels: GELU has no switch of its own"},
    {"nm", "--keep 0 (-nk) keeps all checkpoints"},
    {"lg", "every step is logged"},
    {"pn", "the launcher starts the processes: mpirun -np N"},
    {"pr", "the launcher numbers the processes: mpirun -np N"},
    {"pg", "the launcher places the processes: mpirun -np N"},
    {"pi", "processes find each other through MPI: mpirun"},
    {"pf", "processes find each other through MPI: mpirun"},
    {"ps", "processes find each other through MPI: mpirun --host"},
    {"h", "--eval-data FILE scores a model on multiple-choice files such as llm.c's hellaswag_val.bin"},
};

static const char* const precision_group = "Precision and memory";  // what a plan's baseline has of its own

static void option_table(OptionTable* t, Args* a) {
    const Option items[] = {
        option_group("Data"),
        option_string("train-data", "i", &a->train_data, 1, "SPEC", "token shards (glob, list, or blend 0.7:a*.bin,0.3:b*.bin) or text files; --steps 0 needs none"),
        option_string("val-data", "j", &a->val_data, 1, "SPEC", "validation data, of the same forms"),
        option_double("val-split", NULL, &a->val_split, 0.0, OPTION_BELOW_1, "F", "without --val-data: hold back the last F of each training file"),
        option_string("eval-data", NULL, &a->eval, 1, "FILES", "multiple-choice files a.bin,b.bin (llm.c's HellaSwag), scored at every validation and at the end"),
        option_group("Model"),
        option_string("init", "e", &a->init, 1, "WHAT", "d12 (gpt2:d6 to d84), gpt3:c768, gpt3:125m|7b|13b|175b; or a model: llm.c's model.bin, Hugging Face's folder of a GPT-2 or GPT-NeoX, or a checkpoint's (its weights alone)", "d12 unless a shape is given"),
        option_int("layers", NULL, &a->layers, 1, 10000, "N", "decoder layers", "by --init"),
        option_int("heads", NULL, &a->heads, 1, 1 << 16, "N", "attention heads", "by --init"),
        option_int("width", NULL, &a->width, 1, 1 << 20, "N", "channels", "by --init"),
        option_int("vocab", NULL, &a->vocab, 1, 1 << 24, "N", "vocabulary size; required for uint32 shards", "by --init; 256 for text, 50257 for uint16 shards"),
        option_choice("position", NULL, &a->position, "rope|learned", "P", "rotary or learned positions", "by --init; rope"),
        option_yes_no("tie-embeddings", NULL, &a->tied, "the head uses the token embedding", "by --init; yes"),
        option_group("Batch and length"),
        option_int("micro-batch", "b", &a->micro_batch, 1, MAX_MICRO_BATCH, "N", "sequences of one replica in one pass"),
        option_int("seq-len", "t", &a->seq_len, 1, 1 << 20, "N", "tokens of a sequence"),
        option_int("global-batch", "d", &a->global_batch, 1, (int64_t)1 << 40, "N", "tokens of a step over all ranks; a multiple of micro-batch × seq-len × replicas", "one micro-batch a replica and pipeline stage"),
        option_int("steps", "x", &a->steps, -1, (int64_t)1 << 40, "N", "optimizer steps; -1: one epoch"),
        option_flag("overfit-batch", "a", &a->overfit_batch, "train on the first global batch again and again"),
        option_group("Optimizer"),
        option_double("lr", "l", &a->lr, OPTION_ABOVE_0, 1e3, "F", "peak learning rate"),
        option_int("warmup", "u", &a->warmup, 0, (int64_t)1 << 40, "N", "steps of linear warm-up", "1000, or a tenth of the steps if that is less"),
        option_double("min-lr-frac", "q", &a->min_lr_frac, 0.0, 1.0, "F", "learning rate at the end, as a share of the peak"),
        option_choice("lr-schedule", "k", &a->schedule, "cosine|linear|constant|wsd", "S", "course of the learning rate after warm-up; wsd: constant, then down by 1-sqrt over the last fifth"),
        option_double("weight-decay", "c", &a->weight_decay, 0.0, 1e3, "F", "decoupled, on matrices and embeddings"),
        option_double("clip", NULL, &a->clip, 0.0, 1e9, "F", "largest global gradient norm; 0: no clipping"),
        option_double("beta1", NULL, &a->beta1, 0.0, OPTION_BELOW_1, "F", "decay of the first moment"),
        option_double("beta2", NULL, &a->beta2, 0.0, OPTION_BELOW_1, "F", "decay of the second moment"),
        option_double("eps", NULL, &a->eps, OPTION_ABOVE_0, 1.0, "F", "added to the root of the second moment"),
        option_double("skip-loss-z", "sl", &a->skip_loss_z, 0.0, 1e9, "F", "skip a step whose loss is more than F deviations above the last 128; 0: never"),
        option_double("skip-grad-z", "sg", &a->skip_grad_z, 0.0, 1e9, "F", "the same for the gradient norm"),
        option_group(precision_group),
        option_choice("recipe", NULL, &a->recipe, "fp8|fp8-lm|bf16|fp32", "R", "fp8: linear layers and gradients in FP8; fp8-lm: the same, gradients as in the paper; fp32: for tests"),
        option_choice("fp8-scaling", NULL, &a->fp8_scaling, "delayed|current|block", "S", "scales of X and dY: from the amaxes of the last 16 steps, or of the tensor itself; block: of 128 elements each, of W of 128 × 128"),
        option_choice("fp8-fwd", NULL, &a->fp8_fwd, "e4m3|e5m2", "F", "format of X"),
        option_choice("fp8-bwd", NULL, &a->fp8_bwd, "e4m3|e5m2", "F", "format of dY", "e5m2; e4m3 for --fp8-scaling block"),
        option_custom("bf16-layers", NULL, &a->bf16_layers, parse_bf16_layers, print_bf16_layers, "first:N,last:M", "layers left in BF16 under recipes fp8 and fp8-lm"),
        option_int("fp8-min-size", NULL, &a->fp8_min_size, 0, 1 << 20, "N", "linear layers whose weight, of all ranks together, is smaller than N × N are left in BF16"),
        option_choice("grad-dtype", NULL, &a->grad_dtype, "fp32|bf16|e4m3=fp8|e5m2", "F", "weight gradients on the wire; vectors travel in FP32", "by --recipe"),
        option_choice("grad-reduce", NULL, &a->grad_reduce, "ring|direct", "A", "ring: adds codes, rounded at every hop; direct: the owner of a part adds all replicas' in FP32", "by --recipe; direct where other recipes send FP8"),
        option_choice("grad-scaling", NULL, &a->grad_scaling, "pre|post|sqrt|auto", "S", "headroom of an FP8 ring of N replicas: 1/N, 1, 1/sqrt(N), or as the paper adapts it", "auto"),
        option_choice("grad-accum-dtype", NULL, &a->grad_accum_dtype, "fp32|bf16|e4m3=fp8", "F", "weight gradients while micro-batches are added up; for e4m3 embeddings take bf16", "by --recipe"),
        option_choice("grad-accum-rounding", NULL, &a->grad_accum_rounding, "nearest|stochastic", "R", "of accumulators below FP32", "nearest; stochastic for bf16 from 65 micro-batches on"),
        option_choice("master-dtype", NULL, &a->master_dtype, "fp32|bf16|fp16|e4m3|e5m2", "F", "master weights of matrices; FP16 and FP8 have scales", "by --recipe"),
        option_choice("m-dtype", NULL, &a->m_dtype, "fp32|bf16|fp16|e4m3|e5m2", "F", "AdamW's first moment", "by --recipe"),
        option_choice("v-dtype", NULL, &a->v_dtype, "fp32|bf16|fp16|e4m3|e5m2|ue5m3", "F", "AdamW's second moment; ue5m3: no sign, E5M2's range, E4M3's unit", "by --recipe"),
        option_choice("opt-block", NULL, &a->opt_block, "0|128", "N", "elements that share a scale of these states; 0: all of a tensor", "by --recipe"),
        option_choice("master-rounding", NULL, &a->master_rounding, "nearest|stochastic", "R", "of master weights below FP32", "by --recipe"),
        option_choice("moment-rounding", NULL, &a->moment_rounding, "nearest|stochastic", "R", "of moments below FP32", "by --recipe"),
        option_int("recompute", "r", &a->recompute, 0, 2, "N", "in backward again instead of kept: 0 nothing, 1 GELU, 2 GELU and LayerNorm"),
        option_group("Ranks"),
        option_int("zero", "z", &a->zero, 0, 2, "N", "what the replicas divide between them: 0 nothing, 1 optimizer states, 2 gradients too"),
        option_choice("zero-split", NULL, &a->zero_split, "tensor|flat", "S", "tensor: matrices whole, as in the paper; flat: all tensors in equal parts", "by --recipe"),
        option_int("tp", NULL, &a->tp, 1, 1 << 10, "N", "ranks that share each layer (tensor and sequence parallel)"),
        option_int("pp", NULL, &a->pp, 1, 1 << 10, "N", "stages that share the layers (pipeline parallel)"),
        option_flag("staged", NULL, &a->staged, "GPUs: ranks may share a GPU and exchange through host memory"),
        option_group("Output"),
        option_string("output-dir", "o", &a->output_dir, 1, "DIR", "folder of log.jsonl"),
        option_int("val-every", "v", &a->val_every, 0, (int64_t)1 << 40, "N", "steps between validations (--val-data, --eval-data); 0: never, but --eval-data at the end"),
        option_int("val-batches", "m", &a->val_batches, 0, (int64_t)1 << 40, "N", "micro-batches a replica in a validation, at most one pass; 0: never"),
        option_int("sample-every", "s", &a->sample_every, 0, (int64_t)1 << 40, "N", "steps between samples of generated text; 0: never"),
        option_int("sample-len", "g", &a->sample_len, 1, 1 << 20, "N", "tokens of a sample"),
        option_string("tokenizer", NULL, &a->tokenizer, 1, "FILE", "llm.c's tokenizer file, of the data's tokenizer: samples are printed as text"),
        option_string("export-hf", NULL, &a->export_hf, 1, "DIR", "at the end the model as Hugging Face's: a GPT-2 with learned, a GPT-NeoX with rotary positions; --steps 0: only that"),
        option_string("export-llmc", NULL, &a->export_llmc, 1, "FILE", "at the end the model as llm.c's model.bin; learned positions and a tied head only"),
        option_choice("export-dtype", NULL, &a->export_dtype, "bf16|fp32|fp16", "F", "weights of these exports", "bf16; fp32 for recipe fp32"),
        option_string("hf-tokenizer", NULL, &a->hf_tokenizer, 1, "DIR", "tokenizer files that go along with --export-hf", "the folder of --init, where it has some"),
        option_flag("log-tensors", NULL, &a->log_tensors, "log what FP8 did to each tensor's gradient: underflow, saturation, headroom"),
        option_flag("profile", NULL, &a->profile, "print time by operation at the end"),
        option_group("Checkpoints and endings"),
        option_int("checkpoint-every", "n", &a->checkpoint_every, 0, (int64_t)1 << 40, "N", "steps between checkpoints, and one at the end; 0: none but those that a signal asks for"),
        option_int("keep", "nk", &a->keep, 0, (int64_t)1 << 40, "N", "checkpoints that stay, the newest; 0: all"),
        option_flag("resume", "y", &a->resume, "go on from the newest checkpoint in --output-dir that is whole, with its flags where none are given; where there is none, start"),
        option_double("checkpoint-memory", NULL, &a->checkpoint_memory, 0.0, 1e6, "GIB", "host memory of a rank for the copy that is written while training goes on; less than it takes: training waits", "half of what is free"),
        option_double("max-minutes", NULL, &a->max_minutes, 0.0, 1e9, "F", "save and end after so long; 0: never"),
        option_int("max-skipped", NULL, &a->max_skipped, 0, (int64_t)1 << 40, "N", "skipped steps in a row that end the run as failed; 0: never"),
        option_double("timeout", NULL, &a->timeout, 0.0, 1e9, "SECONDS", "end all ranks when one makes no progress for so long; 0: never"),
        option_group("Generation"),
        option_int("generate", NULL, &a->generate, 0, 1 << 20, "N", "at the end of the run (--steps 0: at once) print N tokens; 0: none"),
        option_string("prompt", NULL, &a->prompt, 1, "TEXT", "what they go on from: text for models of bytes, else tokens by number, '464 3290 318'", "an end of line, or of text"),
        option_int("samples", NULL, &a->samples, 1, 1 << 20, "N", "how often, each with draws of its own"),
        option_double("temperature", NULL, &a->temperature, 0.0, 1e6, "F", "of these and of --sample-every: below 1 likely tokens are drawn more often; 0: always the likeliest"),
        option_int("top-k", NULL, &a->top_k, 0, 1 << 24, "N", "draw from the N likeliest tokens; 0: from all"),
        option_double("top-p", NULL, &a->top_p, OPTION_ABOVE_0, 1.0, "F", "draw from the fewest likeliest tokens that have together a probability of F"),
        option_group("Run"),
        option_int("seed", NULL, &a->seed, 0, INT64_MAX, "N", "of initial weights, data order and samples"),
        option_choice("matmul-choice", NULL, &a->matmul_choice, "timed|library", "C", "GPUs: cuBLASLt's algorithms: the fastest, timed at the first start and kept, or the one it names first"),
        option_string("matmul-cache", NULL, &a->matmul_cache, 1, "FILE", "GPUs: where timed choices are kept; none: nowhere, timed at each start", "matmul-GPU-VERSION.txt in ~/.cache/train_gpt_fp8"),
        option_group("Planning"),
        option_flag("plan", NULL, &a->plan, "print memory, traffic and time of these flags, beside BF16's, and end; needs no data, GPU or MPI"),
        option_flag("json", NULL, &a->json, "the plan as one JSON object"),
        option_flag("kernels", NULL, &a->kernels, "with it every kernel of a micro-batch: launches, bytes, operations, least time"),
        option_int("world", NULL, &a->world, 1, 1 << 14, "N", "ranks of the planned run", "those that were launched, at least tp × pp"),
        option_choice("gpu", NULL, &a->gpu, GPU_CHOICES, "G", "what the plan is for; none: this CPU, to the byte what a run takes"),
    };
    static_assert(sizeof(items) / sizeof(items[0]) <= MAX_OPTIONS, "MAX_OPTIONS");
    memcpy(t->items, items, sizeof(items));
    t->options = Options{t->items, (int)(sizeof(items) / sizeof(items[0])), refused_flags, (int)(sizeof(refused_flags) / sizeof(refused_flags[0])),
        "usage: mpirun -np RANKS ./train_gpt_fp8 --train-data SPEC [flags]\nPretrains a GPT in FP8, on NVIDIA GPUs or on any CPU. llm.c's short flags mean what they mean there."};
}

// ---- the model ----

struct GptConfig {
    int layers, heads, width;
    int vocab, padded_vocab;  // the latter a multiple of 128·tp; the tokens between are masked
    int positions;            // rows of wpe; the longest sequence
    bool rope, tied;
    int T;                    // sequence length of this run
    int B;                    // sequences of a micro-batch
    int recompute;
    DType act;                // activations, embeddings, vectors
    bool fp8;                 // matrices in FP8, but for the first and last layers and small ones (matrix_in_fp8)
    Bf16Layers bf16_layers;
    int64_t fp8_min_size;     // matrices of fewer elements than its square are left in BF16
    FP8Scaling scaling;
    DType fp8_fwd, fp8_bwd;   // of X and of dY
    DType accum, wire;        // gradients of matrices: while micro-batches are added up; between ranks
    Rounding accum_rounding;
    DType master, m, v;       // optimizer states of matrices
    OptimizerConfig optimizer;
    bool embeddings_as_matrices;  // their gradients and states: else in FP32
    ReductionConfig reduction;
    DType dy_wire;            // of dY between the ranks of a layer
    bool dx_fp8;              // dX is summed over them in FP8
    uint64_t seed;
    RankLayout layout;
    int in_flight = 1;        // micro-batches of which this stage keeps what backward needs
};

static int stage_layers(const GptConfig* c) { return c->layers / c->layout.pp; }
static int first_layer(const GptConfig* c) { return c->layout.stage * stage_layers(c); }
static bool is_first_stage(const GptConfig* c) { return c->layout.stage == 0; }
static bool is_last_stage(const GptConfig* c) { return c->layout.stage == c->layout.pp - 1; }
static int own_width(const GptConfig* c) { return c->width / c->layout.tp; }         // of a rank's heads
static int own_rows_of(const GptConfig* c, int B) { return B * c->T / c->layout.tp; }  // of the residual stream

// Is a matrix of whole shape (rows, cols) in layer `number` of the model an operand in FP8? By its whole shape, so that what is computed does not depend
// on how many ranks share a layer
static bool matrix_in_fp8(const GptConfig* c, int number, int64_t rows, int64_t cols) {
    bool inside = number >= c->bf16_layers.first && number < c->layers - c->bf16_layers.last;
    return c->fp8 && inside && rows * cols >= c->fp8_min_size * c->fp8_min_size;
}
// The same of one that is in the table, and what follows from it: the types of its layer's X and of dY
static bool in_fp8(const Param* w) { return is_fp8(w->dtype); }
static DType x_type(const GptConfig* c, const Param* w) { return in_fp8(w) ? c->fp8_fwd : c->act; }
static DType dy_type(const GptConfig* c, const Param* w) { return in_fp8(w) ? c->fp8_bwd : c->act; }
// Have blocks of 128 elements scales of their own?
static bool by_block(const GptConfig* c) { return c->fp8 && c->scaling == SCALING_BLOCK; }

// Places where a layer quantises a matmul input: X of its four linear layers, and their dY
enum Site { X_QKV, X_PROJ, X_FC, X_FCPROJ, DY_QKV, DY_PROJ, DY_FC, DY_FCPROJ, SITES_PER_LAYER };

struct Layer {
    // parameters; Ci: of C channels those of this rank of tp
    Param *ln1w, *ln1b;          // (C)
    Param *qkvw, *qkvb;          // (3Ci, C), (3Ci)
    Param *projw, *projb;        // (C, Ci), (C)
    Param *ln2w, *ln2b;          // (C)
    Param *fcw, *fcb;            // (4Ci, C), (4Ci)
    Param *fcprojw, *fcprojb;    // (C, 4Ci), (C)
    // kept for backward, of one micro-batch; own: of B·T rows those of this rank of tp. Of an X that is scaled by block the codes by tokens are kept; those by
    // channels are in the workspace until its product is made.
    void* residual;              // (own, C) input of the layer
    void* residual_mid;          // (own, C) after attention
    float *mean1, *rstd1;        // (own)
    float *mean2, *rstd2;        // (own)
    Tensor x_qkv;                // (own, C) LayerNorm 1's output; shared between layers at --recompute 2
    void* qkv;                   // (B, T, 3Ci)
    float* lse;                  // (B, heads, T) logsumexp of the scores
    void* attention;             // (B, T, Ci) attention's output, where it is kept: if backward reads it, or the projection takes it as it is
    Tensor x_proj;               // (B, T, Ci) the same as the projection takes it; shared where it is kept in `attention` and quantised again
    Tensor x_fc;                 // (own, C) LayerNorm 2's output; shared at --recompute 2
    void* fc;                    // (B, T, 4Ci) before GELU
    Tensor x_fcproj;             // (B, T, 4Ci) after GELU; shared from --recompute 1 on
};

struct Model {
    GptConfig config;
    ParamTable params;
    Param *wte, *wpe, *lnfw, *lnfb, *head;  // wpe NULL with RoPE; head is wte when tied; all NULL on stages that do without
    Topology* topology;
    Layer* kept;                 // (in_flight, layers of this stage)
    Layer* layers;               // of the micro-batch that is worked on
    Reduction reduction;         // the gradients
    int64_t micro_steps;         // this rank's so far
    int64_t first_micro_step;    // of this step
    Optimizer optimizer;
    Sites sites;
    int steps_recorded;          // of amaxes: below AMAX_WINDOW the scales are made just in time
    // kept for backward on the last stage, where one micro-batch is in flight
    void* residual_final;        // (own, C)
    float *meanf, *rstdf;        // (own)
    // workspace
    void* narrow;                // (B, T, C) attention's output; a LayerNorm's output of all ranks' rows; a stage's output; gradients of LayerNorm and attention outputs
    void* delta;                 // (B, T, C) what a block adds to the residual stream; gradient of the final LayerNorm's output; in backward X and dY of all ranks' rows
    void* dresidual;             // (own, C) gradient of the residual stream
    void* wide;                  // (B, T, 4Ci) gradients inside a block; a tensor before its just-in-time scale is known
    void* stage_in;              // (own, C) the residual stream's gradient from the next stage
    RowExchange rows;            // with the ranks that share this layer
    StageExchange stages;
    Tensor dy;                   // (B, T, 4Ci), or (B, T, C) of all ranks' rows: FP8 output gradient
    float* partial;              // sums by column and strip
    void* dw;                    // (dw_elements) of the activations' type: a weight gradient of one micro-batch, or some of its rows, before it is added up
    size_t dw_elements;
    void* logits;                // (head_rows, this rank's part of padded_vocab)
    float* logit_statistics;     // (tp, head_rows, 3), and this rank's own behind them
    int head_rows;               // rows of logits at a time
    float* losses;               // (B, T)
    LossTotal* loss_total;       // (1) over micro-batches
    LossShare* loss_share;       // (1) of the mean over the global batch
    int *tokens, *targets;       // (B, T)
    TokenGroups groups;
    float* rotary;               // (2, T, hs/2)
    Attention attention;
    Matmul matmul;
    Stream stream;
    Graph graphs[2][2];          // of a micro-batch, the first of a step or another, with scales just in time or not; NULL: not made yet
    StepRecord* record;          // pinned: arrives with the end of the step
    TensorStatistics* statistics;  // (params) pinned: likewise
    struct { Event began, ended; } steps[2];  // timed, of the last two steps: the one that is launched now, and the one before
    int64_t step;                // of them
};

constexpr int FEW_MICRO_BATCHES = 64;
constexpr size_t LOGITS_BYTES = (size_t)128 << 20;  // at most, of logits at a time
constexpr size_t GRADIENT_BYTES = (size_t)32 << 20;  // about, of a weight's gradient at a time, where it is added up apart

static int rows_of(const Model* m) { return m->config.B * m->config.T; }
static size_t wide_bytes(const Model* m) { return (size_t)rows_of(m) * 4 * (size_t)own_width(&m->config) * (size_t)dtype_bytes(m->config.act); }

// Of a tensor of whole shape (rows, cols) the share of this rank
static Param* add_model_param(Model* m, const char* name, int layer, int64_t rows, int64_t cols, FormatClass f, TpAxis axis, DType dtype) {
    const RankLayout* y = &m->config.layout;
    int64_t tp = axis == TP_WHOLE ? 1 : y->tp;
    bool by_cols = axis == TP_COLS || rows == 1;
    Param* p = param_add(&m->params, name, layer, by_cols ? rows : rows / tp, by_cols ? cols / tp : cols, f, dtype);
    p->tp_axis = axis;
    p->tp_rank = y->tp_rank;
    p->tp_ranks = y->tp;
    p->decay = rows > 1;
    p->counted = axis != TP_WHOLE || y->tp_rank == 0;
    p->partial = axis == TP_WHOLE && f == VECTOR && y->tp > 1;
    return p;
}

static Param* add_layer_param(Model* m, int l, const char* name, int64_t rows, int64_t cols, FormatClass f, TpAxis axis, float init_std, float init_value) {
    char full[32];
    int number = first_layer(&m->config) + l;
    snprintf(full, sizeof(full), "h%d.%s", number, name);
    bool fp8 = f == MATRIX && matrix_in_fp8(&m->config, number, rows, cols);
    Param* p = add_model_param(m, full, number, rows, cols, f, axis, fp8 ? E4M3 : m->config.act);
    p->init_std = init_std;
    p->init_value = init_value;
    return p;
}

// A table with a row a token
static Param* add_vocabulary_param(Model* m, const char* name, int layer, float init_std) {
    const GptConfig* c = &m->config;
    Param* p = add_model_param(m, name, layer, c->padded_vocab, c->width, EMBEDDING, TP_ROWS, c->act);
    p->valid_rows = max_of(min_of(c->vocab - p->rows * c->layout.tp_rank, p->rows), (int64_t)0);
    p->init_std = init_std;
    return p;
}

// The table of this rank's parameters, in the order of the forward pass. Initial values as GPT-2's: N(0, 0.02²), projections into the residual stream
// smaller by √(2·layers). Of tp ranks each holds rows of the matrices that take the residual stream (and their biases) and columns of those that add to
// it; norms and the latter's biases are whole on all.
static void build_params(Model* m) {
    const GptConfig* c = &m->config;
    int64_t C = c->width;
    float std = 0.02f, std_residual = 0.02f / sqrtf(2.0f * (float)c->layers);
    bool first = is_first_stage(c), last = is_last_stage(c);
    if (first || (c->tied && last)) {
        m->wte = add_vocabulary_param(m, "wte", -1, std);
        m->wte->apart = c->tied && c->layout.pp > 1;
    }
    if (first && !c->rope) {
        m->wpe = add_model_param(m, "wpe", -1, c->positions, C, EMBEDDING, TP_WHOLE, c->act);
        m->wpe->init_std = std;
    }
    m->params.next_number = (c->rope ? 1 : 2) + 12 * first_layer(c);  // as one rank would count
    for (int l = 0; l < stage_layers(c); l++) {
        Layer* y = &m->layers[l];
        y->ln1w = add_layer_param(m, l, "ln1w", 1, C, VECTOR, TP_WHOLE, 0.0f, 1.0f);
        y->ln1b = add_layer_param(m, l, "ln1b", 1, C, VECTOR, TP_WHOLE, 0.0f, 0.0f);
        y->qkvw = add_layer_param(m, l, "qkvw", 3 * C, C, MATRIX, TP_ROWS, std, 0.0f);
        y->qkvb = add_layer_param(m, l, "qkvb", 1, 3 * C, VECTOR, TP_ROWS, 0.0f, 0.0f);
        y->qkvw->segments = y->qkvb->segments = 3;
        y->projw = add_layer_param(m, l, "attprojw", C, C, MATRIX, TP_COLS, std_residual, 0.0f);
        y->projb = add_layer_param(m, l, "attprojb", 1, C, VECTOR, TP_WHOLE, 0.0f, 0.0f);
        y->ln2w = add_layer_param(m, l, "ln2w", 1, C, VECTOR, TP_WHOLE, 0.0f, 1.0f);
        y->ln2b = add_layer_param(m, l, "ln2b", 1, C, VECTOR, TP_WHOLE, 0.0f, 0.0f);
        y->fcw = add_layer_param(m, l, "fcw", 4 * C, C, MATRIX, TP_ROWS, std, 0.0f);
        y->fcb = add_layer_param(m, l, "fcb", 1, 4 * C, VECTOR, TP_ROWS, 0.0f, 0.0f);
        y->fcprojw = add_layer_param(m, l, "fcprojw", C, 4 * C, MATRIX, TP_COLS, std_residual, 0.0f);
        y->fcprojb = add_layer_param(m, l, "fcprojb", 1, C, VECTOR, TP_WHOLE, 0.0f, 0.0f);
    }
    if (!last) { return; }
    m->lnfw = add_model_param(m, "lnfw", c->layers, 1, C, VECTOR, TP_WHOLE, c->act);
    m->lnfw->init_value = 1.0f;
    m->lnfb = add_model_param(m, "lnfb", c->layers, 1, C, VECTOR, TP_WHOLE, c->act);
    m->head = c->tied ? m->wte : add_vocabulary_param(m, "lmhead", c->layers, std);
    if (c->tied && !first) { m->wte->counted = false; }  // the first stage does
}

// The first token of this rank's part of the vocabulary
static int first_token_of(const Param* table) { return (int)table->rows * table->tp_rank; }

// How each gradient is added up and travels, and what the optimizer keeps. Vectors are too few for FP8 to matter, and their precision does.
static void set_training_formats(Model* m) {
    const GptConfig* c = &m->config;
    for (int i = 0; i < m->params.count; i++) {
        Param* p = &m->params.items[i];
        bool as_matrix = p->format_class == MATRIX || (p->format_class == EMBEDDING && c->embeddings_as_matrices);
        p->accum = as_matrix ? c->accum : FP32;
        p->wire = as_matrix ? c->wire : FP32;
        p->master.dtype = as_matrix ? c->master : FP32;
        p->m.dtype = as_matrix ? c->m : FP32;
        p->v.dtype = as_matrix ? c->v : FP32;
        if (p->format_class == EMBEDDING && p->accum == E4M3) { p->accum = BF16; }  // rows are added one by one: no scale for the whole is known
    }
}

// ---- linear layers ----

static Operand operand(Tensor x, int64_t ld, bool transposed) { return Operand{x.data, x.dtype, x.slot, ld, 0, transposed, x.by_block ? SCALE_VEC128 : SCALE_TENSOR}; }
// The weight in a product over its columns, or over its rows
static Operand weight_operand(const GptConfig* c, const Param* w, bool over_columns) {
    if (!by_block(c) || !in_fp8(w)) { return Operand{w->weight, w->dtype, w->slot, w->cols, 0, over_columns}; }
    return Operand{w->weight, w->dtype, over_columns ? w->block_descales : w->turned_descales, w->cols, 0, over_columns, SCALE_BLK128};
}

// y (rows, N) = x (rows, K) · wᵀ + b, w (N, K)
static MatmulCall linear_call(const Model* m, void* y, Tensor x, const Param* w, const Param* b, int rows) {
    MatmulCall c = {};
    c.d = y;
    c.d_dtype = c.bias_dtype = m->config.act;
    c.d_ld = w->rows;
    c.a = operand(x, w->cols, false);
    c.b = weight_operand(&m->config, w, true);
    c.bias = b == NULL ? NULL : b->weight != NULL ? b->weight : (const void*)b;  // dry: any pointer stands for a bias
    c.m = rows;
    c.n = (int)w->rows;
    c.k = (int)w->cols;
    c.batch = 1;
    c.fast_accumulate = true;
    return c;
}
// dx (rows, K) = dy (rows, N) · w
static MatmulCall linear_input_call(const Model* m, void* dx, Tensor dy, const Param* w, int rows) {
    MatmulCall c = {};
    c.d = dx;
    c.d_dtype = m->config.act;
    c.d_ld = w->cols;
    c.a = operand(dy, w->rows, false);
    c.b = weight_operand(&m->config, w, false);
    c.m = rows;
    c.n = (int)w->cols;
    c.k = (int)w->rows;
    c.batch = 1;
    return c;
}
// The operand of a weight gradient: its elements from column `first` on, of `columns`
static Operand turned_operand(Tensor x, int first, int64_t columns, bool is_a) {
    const float* descale = x.by_block ? x.turned_slot : x.slot;
    OperandScale scaling = x.by_block ? SCALE_VEC128 : SCALE_TENSOR;
    if (x.turned_ld > 0) { return Operand{(char*)x.turned + (size_t)first * (size_t)x.turned_ld, x.dtype, descale, x.turned_ld, 0, !is_a, scaling}; }
    return Operand{advance(x.by_block ? x.turned : x.data, x.dtype, (size_t)first), x.dtype, descale, columns, 0, is_a, scaling};
}
// rows `first` … first+n-1 of dw (N, K) [+]= dyᵀ · x; all rows where operands are scaled by block
static MatmulCall linear_weight_call(void* dw, DType dw_type, Tensor dy, Tensor x, const Param* w, int first, int n, int rows, bool accumulate) {
    MatmulCall c = {};
    c.d = dw;
    c.d_dtype = dw_type;
    c.d_ld = w->cols;
    c.a = turned_operand(dy, first, w->rows, true);
    c.b = turned_operand(x, 0, w->cols, false);
    c.m = n;
    c.n = (int)w->cols;
    c.k = rows;
    c.batch = 1;
    c.accumulate = accumulate;
    return c;
}

// The FP32 accumulator of a vector's gradient
static float* vector_gradient(const Param* p) { return (float*)p->accumulator; }
// Is what this micro-batch gives added to what a gradient's accumulator holds?
static bool adds(const Model* m, const Param* p) { return accumulates(&m->reduction, p); }

// The bias of a row-parallel layer, whose outputs are added up: one rank adds it
static const Param* bias_once(const Model* m, const Param* b) { return m->config.layout.tp_rank == 0 ? b : NULL; }

// The random bits of one addition to a gradient. `event`: which of those to this parameter in this micro-batch
static RandomKey gradient_key(const Model* m, const Param* p, int event) {
    const Group* g = m->reduction.group;
    uint64_t micro_batch = (uint64_t)m->micro_steps * (uint64_t)g->size + (uint64_t)g->rank;
    return random_key(m->config.seed ^ 0x6772616469656e74ull, micro_batch, (uint64_t)p->number << 32 | (uint64_t)event);
}
constexpr int EMBEDDING_EVENT = 1 << 30, TIED_EVENT = EMBEDDING_EVENT + 1;  // after the head's, which number its chunks

// Does the matmul itself add up the gradient of w, rounding each sum to nearest? Else a kernel does
static bool matmul_adds(const Model* m, const Param* w) {
    return w->accum == FP32 || (w->accum == m->config.act && m->config.accum_rounding == NEAREST);
}

// How many rows of w's gradient are made at a time: all, but of a head whose FP32 gradient would be large
static int gradient_rows(const Model* m, const Param* w) {
    if (matmul_adds(m, w) || param_elements(w) <= m->dw_elements) { return (int)w->rows; }
    return (int)max_of((int64_t)m->dw_elements / w->cols / 16 * 16, (int64_t)16);
}

// The gradient of w (N, K) [+]= dyᵀ · x: by the matmul itself where it can, as it can of the first that is added up; else through m->dw. `more`: added to what
// this micro-batch gave before
static void weight_gradient(Model* m, const Param* w, Tensor dy, Tensor x, int rows, bool more, int event) {
    bool accumulate = more || adds(m, w);
    DType type = m->config.act;
    if (matmul_adds(m, w) || (w->accum == type && !accumulate)) {
        MatmulCall c = linear_weight_call(w->accumulator, w->accum, dy, x, w, 0, (int)w->rows, rows, accumulate);
        matmul(&m->matmul, &c, m->stream);
        return;
    }
    int step = gradient_rows(m, w);
    for (int first = 0; first < w->rows; first += step) {
        int n = min_of(step, (int)w->rows - first);
        MatmulCall c = linear_weight_call(m->dw, type, dy, x, w, first, n, rows, false);
        matmul(&m->matmul, &c, m->stream);
        ProfileScope scope("gradient accumulation");
        uint64_t at = (uint64_t)first * (uint64_t)w->cols;
        add_gradient(w->accum, advance(w->accumulator, w->accum, at), m->dw, type, w->accum_slot, m->reduction.amax + (w - m->params.items),
                     m->config.accum_rounding, gradient_key(m, w, event), whole_elements(w), at, (size_t)n * (size_t)w->cols, accumulate, m->stream);
    }
}

static void linear_forward(Model* m, void* y, Tensor x, const Param* w, const Param* b, int rows) {
    ProfileScope scope("matmul forward");
    MatmulCall c = linear_call(m, y, x, w, b, rows);
    matmul(&m->matmul, &c, m->stream);
    reduction_poll(&m->reduction);  // on a CPU nobody else makes the exchanges go on
}
static void linear_backward(Model* m, void* dx, Tensor dy, Tensor x, const Param* w, int rows) {
    ProfileScope scope("matmul backward");
    MatmulCall input = linear_input_call(m, dx, dy, w, rows);
    matmul(&m->matmul, &input, m->stream);
    weight_gradient(m, w, dy, x, rows, false, 0);
    reduction_poll(&m->reduction);
}

// The linear layers of a layer, in the order of the forward pass
struct Linear { const Param *w, *b; };
constexpr int LINEARS = 4;
struct Linears { Linear items[LINEARS]; };
static Linears linears_of(const Model* m, int l) {
    const Layer* y = &m->layers[l];
    return Linears{{{y->qkvw, y->qkvb}, {y->projw, bias_once(m, y->projb)}, {y->fcw, y->fcb}, {y->fcprojw, bias_once(m, y->fcprojb)}}};
}

// Operands of weight gradients are wanted with the tokens of a channel side by side by GPUs whose FP8 units multiply no others. What makes dY, or makes X
// again, writes it so beside; else, as where ranks of a layer send each other rows, matmul copies. Bytes between channels; 0: nothing is turned
static int64_t turned_ld(const Model* m) {
    const GptConfig* c = &m->config;
    int capability = m->matmul.capability;
    bool wanted = (device_is_gpu || m->matmul.imagined) && c->fp8 && c->layout.tp == 1 && gpu_has_fp8(capability) && gpu_fp8_needs_k_contiguous(capability);
    return wanted ? round_up(rows_of(m), 16) : 0;
}
// X in the forward pass, where its weight gradient wants nothing of it, or makes it again
static Tensor not_kept(Tensor x, bool unwanted) {
    if (x.by_block && unwanted) { x.turned = NULL; }
    return x;
}
// X that is made again for its weight gradient
static Tensor made_again(Tensor x) {
    if (x.by_block) { x.data = NULL; }
    return x;
}
// A tensor that only a weight gradient needs, in the memory that it has
static Tensor only_turned(const Model* m, Tensor x) {
    if (x.by_block) { return made_again(x); }
    int64_t ld = turned_ld(m);
    return ld > 0 && is_fp8(x.dtype) ? Tensor{NULL, x.dtype, x.slot, x.data, ld} : x;
}

// Rows of a pass over one token (see forward): FP8 units of GPUs multiply no fewer than 16
static int token_rows(const Model* m) { return (device_is_gpu || m->matmul.imagined) && m->config.fp8 ? 16 : 1; }
// Where ranks share a layer they share its rows, of which one token has too few
static bool takes_single_tokens(const Model* m) { return m->config.layout.tp == 1; }

// f(call, forward, backward, name) for every matmul that a run makes: training on (B, T), sampling on (1, T) and then on single tokens. `forward`, `backward`: how often a micro-batch
// makes it in these passes
template <class F> static void each_matmul(const Model* m, F f) {
    const GptConfig* c = &m->config;
    int rows = rows_of(m);
    auto each_weight_gradient = [&](const Param* w, Tensor dy, Tensor x, int n, int64_t times, const char* name) {
        int step = gradient_rows(m, w), steps = ceil_div((int)w->rows, step);
        bool in_place = matmul_adds(m, w);
        DType type = w->accum == FP32 ? FP32 : c->act;
        f(linear_weight_call(NULL, type, dy, x, w, 0, step, n, false), 0, times * (steps - 1), name);
        f(linear_weight_call(NULL, type, dy, x, w, 0, ((int)w->rows - 1) % step + 1, n, false), 0, in_place ? 0 : times, name);
        if (in_place) { f(linear_weight_call(NULL, type, dy, x, w, 0, step, n, true), 0, times, name); }
        if (w->accum == type) { f(linear_weight_call(NULL, type, dy, x, w, 0, (int)w->rows, n, false), 0, 0, name); }
    };
    for (int i = 0; i < LINEARS; i++) {
        for (int fp8 = 0; fp8 <= 1; fp8++) {
            Linear y = {};  // all that are in FP8, and all that are not, have the same shapes and types
            int times = 0;
            for (int l = 0; l < stage_layers(c); l++) {
                Linear of = linears_of(m, l).items[i];
                if (in_fp8(of.w) == (fp8 != 0)) { y = of; times++; }
            }
            if (times == 0) { continue; }
            bool again = (i == 1 && m->attention.flash) || (i == 3 && c->recompute >= 1);  // X is made again for the weight gradient
            Tensor x = {NULL, x_type(c, y.w), NULL}, dy = {NULL, dy_type(c, y.w), NULL};
            if (in_fp8(y.w)) { dy.turned_ld = turned_ld(m); }
            if (in_fp8(y.w) && by_block(c)) {
                x.by_block = dy.by_block = true;
                x.turned_ld = dy.turned_ld;
            }
            Tensor x_again = again ? only_turned(m, x) : x;
            f(linear_call(m, NULL, x, y.w, y.b, rows), times, 0, "Y");
            f(linear_call(m, NULL, x, y.w, y.b, c->T), 0, 0, "Y");
            if (takes_single_tokens(m)) { f(linear_call(m, NULL, x, y.w, y.b, token_rows(m)), 0, 0, "Y"); }
            f(linear_input_call(m, NULL, dy, y.w, rows), 0, times, "dX");
            each_weight_gradient(y.w, dy, x_again, rows, times, "dW");
        }
    }
    if (m->head != NULL) {
        Tensor act = {NULL, c->act, NULL};
        const struct { int rows, times; } heads[] = {{m->head_rows, ceil_div(rows, m->head_rows) - 1}, {(rows - 1) % m->head_rows + 1, 1}, {1, 0}};
        for (auto& h : heads) {
            f(linear_call(m, NULL, act, m->head, NULL, h.rows), h.times, 0, "head");
            f(linear_input_call(m, NULL, act, m->head, h.rows), 0, h.times, "head");
            each_weight_gradient(m->head, act, act, h.rows, h.times, "head");
        }
    }
    int64_t sequences = (int64_t)stage_layers(c) * c->B;
    each_attention_product(&m->attention, true, [&](MatmulCall call, int forward, int backward) {
        f(call, sequences * forward, sequences * backward, "attention's products");
    });
}

// ---- allocation: the same code dry and for real ----

// Of a tensor (rows, columns) that is scaled by block what is by tokens
static void take_turned(Memory* memory, MemoryCategory category, Tensor* t, size_t rows, size_t columns, int64_t ld) {
    t->by_block = true;
    t->turned_ld = ld;
    t->turned = memory_take(memory, category, (ld > 0 && rows > 0 ? (size_t)ld : rows) * columns, 1);
    t->turned_slot = memory_take<float>(memory, category, ceil_div(rows, (size_t)SCALE_BLOCK) * columns);
}

static Tensor take_tensor(Memory* memory, MemoryCategory category, DType dtype, size_t elements, float** slots) {
    Tensor t = {memory_take(memory, category, elements, (size_t)dtype_bytes(dtype)), dtype, NULL};
    if (is_fp8(dtype)) {
        t.slot = *slots;
        if (*slots != NULL) { *slots += 4; }
    }
    return t;
}

// Do the GPU's own kernels do the attention, on this device or the one that is planned?
static bool attention_is_flash(const Model* m) {
    const GptConfig* c = &m->config;
    bool built = true;
#ifdef USE_CUDA
    if (!m->matmul.imagined) { built = flash_is_built(); }
#endif
    return (device_is_gpu || m->matmul.imagined) && flash_takes(c->act, c->width / c->heads, m->matmul.capability) && built;
}

static void model_allocate(Model* m, Memory* memory) {
    const GptConfig* c = &m->config;
    size_t C = (size_t)c->width, rows = (size_t)rows_of(m), act = (size_t)dtype_bytes(c->act);
    // weights
    float* slot = memory_take<float>(memory, WEIGHTS, 4 * (size_t)m->params.count);
    for (int i = 0; i < m->params.count; i++) {
        Param* p = &m->params.items[i];
        p->slot = is_fp8(p->dtype) && memory->committed ? slot + 4 * i : NULL;
    }
    partition_allocate_weights(&m->reduction.partition, memory);
    reduction_allocate(&m->reduction, memory);
    optimizer_allocate(&m->optimizer, &m->params, c->act == FP32, memory);
    // scaling state
    int layers = stage_layers(c);
    bool blocks = by_block(c);
    m->sites.count = c->fp8 && !blocks ? layers * SITES_PER_LAYER : 0;
    size_t sites = (size_t)m->sites.count;
    m->sites.amax = memory_take<uint32_t>(memory, OPTIMIZER, sites);
    m->sites.current = memory_take<uint32_t>(memory, OPTIMIZER, 1);
    m->sites.history = memory_take<float>(memory, OPTIMIZER, sites * AMAX_WINDOW);
    m->sites.slots = memory_take<float>(memory, OPTIMIZER, sites * 4);
    m->sites.largest = memory_take<float>(memory, OPTIMIZER, sites);
    // what backward needs, of each micro-batch in flight
    size_t tp = (size_t)c->layout.tp, own = rows / tp, inner = C / tp, kept = (size_t)c->in_flight;
    float* slots = memory_take<float>(memory, ACTIVATIONS, 4 * ((size_t)layers * 4 * kept + 1));
    size_t ln_bytes = 1, shared_bytes = 1;  // a shared buffer holds the widest of its tensors
    for (int l = 0; l < layers; l++) {
        const Layer* y = &m->layers[l];
        ln_bytes = max_of(ln_bytes, (size_t)max_of(dtype_bytes(x_type(c, y->qkvw)), dtype_bytes(x_type(c, y->fcw))));
        shared_bytes = max_of(shared_bytes, (size_t)dtype_bytes(x_type(c, y->fcprojw)));
    }
    void* shared_ln = c->recompute >= 2 ? memory_take(memory, WORKSPACE, own * C, ln_bytes) : NULL;
    bool flash = attention_is_flash(m);
    size_t shared_columns = c->recompute >= 1 ? 4 * inner : flash && c->fp8 ? inner : 0;
    void* shared = memory_take(memory, WORKSPACE, round_up(rows, (size_t)16) * shared_columns, shared_bytes);
    size_t token_blocks = blocks ? ceil_div(rows, (size_t)SCALE_BLOCK) : 0;
    float* shared_ln_slot = memory_take<float>(memory, WORKSPACE, c->recompute >= 2 ? token_blocks * C : 0);
    float* shared_slot = memory_take<float>(memory, WORKSPACE, token_blocks * shared_columns);
    // X of a linear layer (n, columns); `is_shared`: it is made again in backward, in memory of all layers
    auto take_x = [&](const Param* w, size_t n, size_t columns, void* shared_data, float* shared_data_slot, bool is_shared) {
        bool kept_by_block = blocks && in_fp8(w);
        Tensor x = take_tensor(memory, ACTIVATIONS, x_type(c, w), is_shared || kept_by_block ? 0 : n * columns, &slots);
        if (kept_by_block) { take_turned(memory, ACTIVATIONS, &x, is_shared ? 0 : n, columns, turned_ld(m)); }
        if (is_shared && kept_by_block) { x.turned = shared_data; x.turned_slot = shared_data_slot; }
        else if (is_shared) { x.data = shared_data; }
        return x;
    };
    for (int l = 0; l < layers * c->in_flight; l++) {
        Layer* y = &m->kept[l];
        y->residual = memory_take(memory, ACTIVATIONS, own * C, act);
        y->residual_mid = memory_take(memory, ACTIVATIONS, own * C, act);
        y->mean1 = memory_take<float>(memory, ACTIVATIONS, own);
        y->rstd1 = memory_take<float>(memory, ACTIVATIONS, own);
        y->mean2 = memory_take<float>(memory, ACTIVATIONS, own);
        y->rstd2 = memory_take<float>(memory, ACTIVATIONS, own);
        y->x_qkv = take_x(y->qkvw, own, C, shared_ln, shared_ln_slot, c->recompute >= 2);
        y->qkv = memory_take(memory, ACTIVATIONS, rows * 3 * inner, act);
        y->lse = memory_take<float>(memory, ACTIVATIONS, rows * (size_t)c->heads / tp);
        bool again = in_fp8(y->projw) && flash;  // the codes are made again in backward
        y->attention = memory_take(memory, ACTIVATIONS, again ? rows * inner : 0, act);
        y->x_proj = take_x(y->projw, rows, inner, shared, shared_slot, again);
        if (!again) { y->attention = in_fp8(y->projw) ? NULL : y->x_proj.data; }
        y->x_fc = take_x(y->fcw, own, C, shared_ln, shared_ln_slot, c->recompute >= 2);
        y->fc = memory_take(memory, ACTIVATIONS, rows * 4 * inner, act);
        y->x_fcproj = take_x(y->fcprojw, rows, 4 * inner, shared, shared_slot, c->recompute >= 1);
    }
    size_t final_rows = is_last_stage(c) ? own : 0;
    m->residual_final = memory_take(memory, ACTIVATIONS, final_rows * C, act);
    m->meanf = memory_take<float>(memory, ACTIVATIONS, final_rows);
    m->rstdf = memory_take<float>(memory, ACTIVATIONS, final_rows);
    // workspace. What ranks of tp add up between them (into narrow and delta) is of all rows on each of them first.
    size_t inside = max_of(4 * inner, tp > 1 ? C : 0);  // channels of the widest tensor of a block, with dY gathered
    m->narrow = memory_take(memory, WORKSPACE, rows * C, act);
    m->delta = memory_take(memory, WORKSPACE, rows * C, act);
    m->dresidual = memory_take(memory, WORKSPACE, own * C, act);
    m->wide = memory_take(memory, WORKSPACE, wide_bytes(m), 1);
    m->dy = take_tensor(memory, WORKSPACE, c->fp8 ? c->fp8_bwd : c->act, c->fp8 ? rows * inside : 0, &slots);
    if (blocks) {
        take_turned(memory, WORKSPACE, &m->dy, rows, inside, turned_ld(m));
        m->dy.slot = memory_take<float>(memory, WORKSPACE, ceil_div(inside, (size_t)SCALE_BLOCK) * rows);
    } else {
        m->dy.turned_ld = turned_ld(m);
        void* turned = memory_take(memory, WORKSPACE, (size_t)m->dy.turned_ld * inside, 1);
        m->dy.turned = m->dy.turned_ld > 0 ? turned : NULL;
    }
    for (int l = 0; l < layers * c->in_flight; l++) {  // forward's X by channels takes the memory of backward's dY
        Layer* y = &m->kept[l];
        for (Tensor* x : {&y->x_qkv, &y->x_proj, &y->x_fc, &y->x_fcproj}) {
            if (x->by_block) { x->data = m->dy.data; x->slot = m->dy.slot; }
        }
    }
    m->stage_in = memory_take(memory, COMMUNICATION, is_last_stage(c) ? 0 : own * C, act);
    rows_allocate(&m->rows, &m->topology->tensor, rows_of(m), c->width, c->act, c->dx_fp8, memory);
    size_t strips = max_of((size_t)strips_of((int)rows) * inside, (size_t)most_norm_strips((int)own) * 2 * C);  // of a bias, of a LayerNorm
    m->partial = memory_take<float>(memory, WORKSPACE, strips);
    m->dw_elements = 0;
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        bool by_matmul = p->format_class == MATRIX || p == m->head;
        if (matmul_adds(m, p) || !by_matmul) { continue; }
        size_t all = param_elements(p), some = max_of(GRADIENT_BYTES / act, 16 * C);
        bool whole = is_fp8(p->accum) || (blocks && in_fp8(p));  // FP8 has a scale for all of it, operands by block have their descales for all rows
        m->dw_elements = max_of(m->dw_elements, whole ? all : min_of(all, some));
    }
    m->dw = memory_take(memory, WORKSPACE, m->dw_elements, act);
    size_t row_of_logits = (size_t)c->padded_vocab / tp;
    size_t most = max_of(LOGITS_BYTES / (row_of_logits * act), (size_t)1), chunks = ceil_div(rows, most);
    m->head_rows = (int)min_of(round_up(ceil_div(rows, chunks), (size_t)16), rows);
    size_t logit_rows = is_last_stage(c) ? (size_t)m->head_rows : 0;
    m->logits = memory_take(memory, WORKSPACE, logit_rows * row_of_logits, act);
    m->logit_statistics = memory_take<float>(memory, WORKSPACE, logit_rows * LOGIT_STATISTICS * (tp > 1 ? tp + 1 : 1));
    m->losses = memory_take<float>(memory, WORKSPACE, rows);
    m->loss_total = memory_take<LossTotal>(memory, WORKSPACE, 1);
    m->loss_share = memory_take<LossShare>(memory, WORKSPACE, 1);
    m->tokens = memory_take<int>(memory, WORKSPACE, rows);
    m->targets = memory_take<int>(memory, WORKSPACE, rows);
    m->groups.order = memory_take<int>(memory, WORKSPACE, rows);
    m->groups.first = memory_take<int>(memory, WORKSPACE, rows + 1);
    m->groups.token = memory_take<int>(memory, WORKSPACE, rows);
    m->groups.count = memory_take<int>(memory, WORKSPACE, 1);
    m->rotary = c->rope ? memory_take<float>(memory, WORKSPACE, (size_t)c->T * (C / (size_t)c->heads)) : NULL;
    m->attention.act = c->act;
    m->attention.flash = flash;
    m->attention.B = c->B;
    m->attention.T = c->T;
    m->attention.heads = c->heads / c->layout.tp;
    m->attention.head_size = c->width / c->heads;
    m->attention.rope = c->rope;
    m->attention.rotary = m->rotary;
    attention_allocate(&m->attention, memory);
    if (!memory->committed) {
        each_matmul(m, [=](MatmulCall call, int64_t, int64_t, const char*) { matmul_plan(&m->matmul, &call); });
    }
    void* matmul_workspace = memory_take(memory, WORKSPACE, m->matmul.planned, 1);
    if (memory->committed) { matmul_set_workspace(&m->matmul, matmul_workspace, m->matmul.planned); }
}

// The micro-batch of the step that is worked on from here on
static void select_micro_batch(Model* m, int index) {
    m->layers = m->kept + (size_t)(index % m->config.in_flight) * (size_t)stage_layers(&m->config);
}

// What a model is made of, on this rank; nothing of a device is touched
static void model_describe(Model* m, const GptConfig* config, Topology* topology) {
    *m = Model{};
    m->config = *config;
    m->topology = topology;
    int layers = stage_layers(config), all = layers * config->in_flight;
    m->kept = (Layer*)host_alloc((size_t)all * sizeof(Layer));
    for (int l = 0; l < all; l++) { m->kept[l] = Layer{}; }
    select_micro_batch(m, 0);
    build_params(m);
    for (int l = layers; l < all; l++) { m->kept[l] = m->kept[l - layers]; }
    set_training_formats(m);
    reduction_plan(&m->reduction, &topology->data, &topology->tensor, &m->params, config->reduction);
    Optimizer* o = &m->optimizer;
    o->config = config->optimizer;
    o->config.weights_by_block = by_block(config);
    o->data = &topology->data;
    o->tensor = &topology->tensor;
    o->world = &topology->world;
    o->replica = config->layout.replica;
    o->partitioned = zero_level(&m->reduction) > 0;
}

// Everything about a model but its memory, which is only counted
static void model_plan(Model* m, const GptConfig* config, Topology* topology, Memory* memory) {
    model_describe(m, config, topology);
    m->stream = stream_create();
    m->record = (StepRecord*)pinned_alloc(sizeof(StepRecord));
    m->statistics = (TensorStatistics*)pinned_alloc((size_t)m->params.count * sizeof(TensorStatistics));
    for (auto& step : m->steps) {
        step.began = timed_event_create();
        step.ended = timed_event_create();
    }
    matmul_create(&m->matmul);
    model_allocate(m, memory);
}

// While a rank waits for others of its layer or the next stage; on a CPU nobody else makes the reduction go on
static void poll_reduction(void* model) { reduction_poll(&((Model*)model)->reduction); }

// Takes the planned memory, and sets all state that is not weights to what it is before the first step
static void model_commit(Model* m, Memory* memory) {
    const GptConfig* config = &m->config;
    memory_commit(memory);
    model_allocate(m, memory);
    memory_check(memory);
    optimizer_reset(&m->optimizer, &m->params, m->stream);
    reduction_start_up(&m->reduction);
    size_t sequence = (size_t)own_rows_of(config, 1) * (size_t)config->width, act = (size_t)dtype_bytes(config->act);
    rows_create(&m->rows, min_of(transfer_unit(sequence), sizeof(float)));  // a row's statistics in the loss are three floats
    stages_create(&m->stages, &m->topology->pipe, max_of((size_t)config->B * sequence * act, wide_bytes(m)), transfer_unit(sequence * act));
    m->rows.meanwhile = m->stages.meanwhile = poll_reduction;
    m->rows.context = m->stages.context = m;
    for (int i = 0; i < m->params.count; i++) {
        if (m->params.items[i].slot != NULL) { run_rows(ResetSlots{m->params.items[i].slot}, 1, m->stream); }
    }
    if (config->fp8 && !by_block(config)) {
        Sites* s = &m->sites;
        size_t n = (size_t)s->count;
        device_zero(s->amax, n * sizeof(uint32_t), m->stream);
        device_zero(s->history, n * AMAX_WINDOW * sizeof(float), m->stream);
        run_rows(ResetSlots{s->slots}, s->count, m->stream);
        float* largest = (float*)host_alloc(n * sizeof(float));
        for (size_t i = 0; i < n; i++) { largest[i] = largest_of(i % SITES_PER_LAYER < DY_QKV ? config->fp8_fwd : config->fp8_bwd); }
        copy_to_device(s->largest, largest, n * sizeof(float), m->stream);
        run_rows(ResetSlots{m->dy.slot}, 1, m->stream);
        for (int l = 0; l < stage_layers(config) * config->in_flight; l++) {
            const Layer* y = &m->kept[l];
            const Tensor kept[] = {y->x_qkv, y->x_proj, y->x_fc, y->x_fcproj};
            for (const Tensor& t : kept) {
                if (t.slot != NULL) { run_rows(ResetSlots{t.slot}, 1, m->stream); }
            }
        }
        stream_sync(m->stream);
        free(largest);
    }
    if (config->rope) {
        size_t n = (size_t)config->T * (size_t)(config->width / config->heads);
        float* table = (float*)host_alloc(n * sizeof(float));
        rotary_table(table, config->T, config->width / config->heads);
        copy_to_device(m->rotary, table, n * sizeof(float), m->stream);
        stream_sync(m->stream);
        free(table);
    }
}

static void model_free(Model* m, Memory* memory) {
    stream_sync(m->stream);
    reduction_free(&m->reduction);
    rows_free(&m->rows);
    stages_free(&m->stages);
    matmul_destroy(&m->matmul);
    for (Graph g : {m->graphs[0][0], m->graphs[0][1], m->graphs[1][0], m->graphs[1][1]}) {
        if (g != NULL) { graph_free(g); }
    }
    stream_destroy(m->stream);
    pinned_free(m->record);
    pinned_free(m->statistics);
    for (auto& step : m->steps) {
        event_destroy(step.began);
        event_destroy(step.ended);
    }
    memory_release(memory);
    free(m->kept);
    *m = Model{};
}

// Sets every master weight from another program's model, or from the seed; then the weights that the forward pass reads. Nodes may differ in their files,
// or in libm's last bit: what several ranks hold the first of them gives.
static void model_set_weights(Model* m, const WeightSource* source) {
    const GptConfig* c = &m->config;
    Topology* t = m->topology;
    bool twin = c->tied && c->layout.pp > 1;  // first and last stage both have wte; those between pass it on
    size_t largest = twin ? (size_t)(c->padded_vocab / c->layout.tp) * (size_t)c->width : 0, table = largest;
    for (int i = 0; i < m->params.count; i++) { largest = max_of(largest, param_elements(&m->params.items[i])); }
    float* values = (float*)host_alloc(largest * sizeof(float));
    auto from_first_stage = [&]() { host_broadcast(&t->pipe, values, table * sizeof(float), 0); };
    if (twin && m->wte == NULL) { from_first_stage(); }
    for (int i = 0; i < m->params.count; i++) {
        Param* p = &m->params.items[i];
        bool gives = t->layout.replica == 0 && (p->tp_axis != TP_WHOLE || t->layout.tp_rank == 0);
        if (gives && source != NULL) { source->read(values, source->file, p); }
        else if (gives) { param_initialise(values, p, c->seed); }
        host_broadcast(&t->data, values, param_elements(p) * sizeof(float), 0);
        if (p->tp_axis == TP_WHOLE) { host_broadcast(&t->tensor, values, param_elements(p) * sizeof(float), 0); }
        if (twin && p == m->wte) { from_first_stage(); }
        optimizer_set_master(p, values, &t->tensor, m->stream);
    }
    free(values);
    optimizer_cast_weights(&m->optimizer, &m->params, m->stream);
    weights_start(&m->reduction, m->stream);
}

static Watchdog watchdog;  // of this process; every pass over the model tells it that the run gets on

// ---- the whole model, tensor by tensor ----

static ModelShape shape_of(const GptConfig* c) { return ModelShape{c->layers, c->heads, c->width, c->vocab, c->positions, c->rope, c->tied, -1, -1}; }

// values (param_elements) = this rank's share of the master of one parameter, of which its replicas may keep parts. All replicas call this together, and all
// may not have it afterwards: the first has.
static void gather_parts(Model* m, float* values, const Param* p) {
    Group* data = &m->topology->data;
    struct Stretch { uint64_t first, count; } mine = {p->own_first, p->own_count};
    std::vector<Stretch> all((size_t)data->size);
    host_all_gather(data, all.data(), &mine, sizeof(mine));
    bool first_has_all = all[0].count == param_elements(p);
    if (!first_has_all || data->rank == 0) { optimizer_get_master(values + mine.first, p, m->stream); }
    if (first_has_all) { return; }
    for (int r = 0; r < data->size; r++) { host_broadcast(data, values + all[(size_t)r].first, all[(size_t)r].count * sizeof(float), r); }
}

struct WholeBuffers {      // room for any tensor of the whole model, with the vocabulary's padding, and for shares of it
    std::vector<float> whole, share, other;
};

static WholeBuffers whole_buffers(const Model* m) {
    WholeBuffers b;
    size_t share = 0, whole = 0;
    ModelShape shape = shape_of(&m->config);
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        share = max_of(share, param_elements(p));
        whole = max_of(whole, whole_count(p));
    }
    const RankLayout* y = &m->config.layout;
    bool has_whole = y->replica == 0 && (y->tp_rank == 0 || y->tp > 1);
    each_whole_tensor(&shape, [&](const WholeTensor& t) { whole = max_of(whole, (size_t)(t.rows * t.cols)); });  // other stages' too
    b.share.resize(share);
    b.whole.resize(has_whole ? whole : 0);
    b.other.resize(has_whole && y->tp > 1 ? share : 0);
    return b;
}

// b->whole (rows, cols) = one tensor of the whole model in float32, on rank 0: from its stage, all shares of its layer's ranks and all parts of their replicas.
// All ranks call this together for the same tensor; what others than rank 0 have afterwards is of no use.
static void gather_whole(Model* m, WholeBuffers* b, const WholeTensor* t) {
    watchdog.progress++;
    const RankLayout* y = &m->config.layout;
    Topology* topology = m->topology;
    int stage = t->layer < 0 ? 0 : t->layer == m->config.layers ? y->pp - 1 : t->layer / stage_layers(&m->config);
    if (stage == y->stage) {
        const Param* p = param_find(&m->params, t->name);
        if (p == NULL) { die("the model has no tensor '%s' to export", t->name); }
        gather_parts(m, b->share.data(), p);
        if (y->replica != 0) { return; }
        size_t n = param_elements(p);
        if (p->tp_axis == TP_WHOLE || y->tp == 1) {
            if (y->tp_rank == 0) { memcpy(b->whole.data(), b->share.data(), n * sizeof(float)); }
        } else {
            for (int r = 0; r < y->tp; r++) {
                float* values = r == y->tp_rank ? b->share.data() : b->other.data();
                host_broadcast(&topology->tensor, values, n * sizeof(float), r);
                Param theirs = *p;
                theirs.tp_rank = r;
                ElementMap whole = whole_elements(&theirs);
#pragma omp parallel for schedule(static)
                for (size_t i = 0; i < n; i++) { b->whole[whole(i)] = values[i]; }
            }
        }
    }
    if (stage != 0 && y->replica == 0 && y->tp_rank == 0) { host_broadcast(&topology->pipe, b->whole.data(), (size_t)(t->rows * t->cols) * sizeof(float), stage); }
}

// ---- between ranks ----

// x, of which a rank of tp has made its own rows (own, C), of all ranks' rows (B, T, C) in `into`; x itself where there is one rank
static Tensor all_rows(Model* m, Tensor x, void* into, int own, int C, CommOperation purpose) {
    if (m->config.layout.tp == 1) { return x; }
    rows_gather(&m->rows, into, x.data, x.dtype, own, C, purpose, m->stream);
    return Tensor{into, x.dtype, x.slot};
}

// out (own, C) = this rank's rows of the sum over the ranks of tp of `whole` (B, T, C), which may be out. `fp8`: they travel in FP8
static void own_rows(Model* m, void* out, void* whole, bool fp8, int own, CommOperation purpose) {
    rows_sum(&m->rows, out, whole, m->config.act, fp8, own, m->config.width, purpose, m->stream);
}

// Between two passes: what the last one has made, of `own` rows, goes to its neighbour while what the next one needs comes in. A stage's output is in narrow,
// the gradient of its input in dresidual.
static void exchange_stages(Model* m, ScheduleExchange e, int own, int next_index) {
    const GptConfig* c = &m->config;
    if (e.to < 0 && e.from < 0) { return; }
    int stage = c->layout.stage;
    size_t row = (size_t)c->width * (size_t)dtype_bytes(c->act), bytes = round_up((size_t)own * row, transfer_unit((size_t)own_rows_of(c, 1) * row));
    Layer* next = m->kept + (size_t)(next_index % c->in_flight) * (size_t)stage_layers(c);
    stage_exchange(&m->stages, e.from > stage ? m->stage_in : next->residual, e.from, e.to > stage ? m->narrow : m->dresidual, e.to, bytes, m->stream);
}

// ---- forward ----

// What a pass over the model is for decides what of it is recorded.
enum Purpose { TRAIN, INFER };

static Quantisation site_of(Model* m, int layer, Site site, Purpose purpose) {
    Quantisation q = {};
    q.sites = &m->sites;
    q.site = layer * SITES_PER_LAYER + site;
    q.just_in_time = m->config.scaling == SCALING_CURRENT || m->steps_recorded < AMAX_WINDOW;
    q.record = purpose == TRAIN;
    q.sharers = m->config.layout.tp > 1 ? &m->rows : NULL;
    return q;
}
static Quantisation recomputed(Quantisation q) {
    q.record = false;
    q.keep_scale = true;
    return q;
}

static LayerNormInputs layernorm_1(const Layer* y, const void* x, const void* delta) {
    return LayerNormInputs{y->residual, x, delta, y->ln1w->weight, y->ln1b->weight, y->mean1, y->rstd1};
}
static LayerNormInputs layernorm_2(const Layer* y, const void* x, const void* delta) {
    return LayerNormInputs{y->residual_mid, x, delta, y->ln2w->weight, y->ln2b->weight, y->mean2, y->rstd2};
}

// GELU's output in `out`
static void gelu_forward(Model* m, int l, Tensor out, Quantisation q, int rows) {
    ProfileScope scope("gelu forward");
    Layer* y = &m->layers[l];
    const void* fc = y->fc;
    produce(out, NULL, [=](auto t) { typedef typename decltype(t)::type T; return GeluSource<T>{(const T*)fc}; }, m->config.act, q, m->wide,
            rows, 4 * own_width(&m->config), m->stream);
}

// LayerNorm's output again, from the statistics that were kept
static void layernorm_again(Model* m, Tensor out, LayerNormInputs in, Quantisation q, int rows) {
    ProfileScope scope("layernorm forward");
    produce(made_again(out), NULL, [=](auto t) {
        typedef typename decltype(t)::type T;
        return LayerNormSource<T>{(const T*)in.x, in.mean, in.rstd, (const T*)in.gain, (const T*)in.bias};
    }, m->config.act, recomputed(q), m->wide, rows, m->config.width, m->stream);
}

// A tensor (rows, C) that is there already as a matmul input: quantised into out, or as it is. `partial`: sums by column, NULL = not wanted
static Tensor matmul_input(Model* m, Tensor out, float* partial, void* x, Quantisation q, int rows, int C, bool fp8) {
    ProfileScope scope("cast");
    if (!fp8) { out = Tensor{x, m->config.act, NULL}; }
    produce(out, partial, [=](auto t) { typedef typename decltype(t)::type T; return TensorSource<T>{(const T*)x}; }, m->config.act, q, NULL, rows, C,
            m->stream);
    return out;
}

constexpr int ALL_POSITIONS = -1;

// From m->tokens (B, T), or the stage before, to the final LayerNorm's output in m->narrow (B, T, C), or this stage's (own, C). With a `position` it is one
// token that goes through, at that place of the sequence that m->layers have kept the keys and values of, and its own come to them: token_rows copies of it,
// of which the first counts (copies, so that amaxes are the token's).
static void forward(Model* m, int B, Purpose purpose, int position = ALL_POSITIONS) {
    const GptConfig* c = &m->config;
    bool single = position != ALL_POSITIONS;
    int C = c->width, inner = own_width(c), rows = single ? token_rows(m) : B * c->T, own = single ? rows : own_rows_of(c, B);
    Stream s = m->stream;
    void* x = m->layers[0].residual;
    weights_wait(&m->reduction, -1, s);
    weights_wait(&m->reduction, ALL_LAYERS, s);
    if (is_first_stage(c)) {
        ProfileScope scope("embedding forward");
        void* out = c->layout.tp > 1 ? m->delta : x;  // each rank's tokens, to be added up
        with_type(c->act, [&](auto t) {
            typedef typename decltype(t)::type T;
            const T* positions = c->rope ? NULL : (const T*)m->wpe->weight + (single ? (size_t)position * (size_t)C : 0);
            run_rows(EmbeddingForward<T>{(T*)out, m->tokens, (const T*)m->wte->weight, positions, first_token_of(m->wte), (int)m->wte->rows, single ? 1 : c->T, C},
                     rows, s);
        });
        own_rows(m, x, out, false, own, TP_OTHER);
    }
    const void* delta = NULL;
    for (int l = 0; l < stage_layers(c); l++) {
        Layer* y = &m->layers[l];
        weights_wait(&m->reduction, first_layer(c) + l, s);
        bool infer = purpose == INFER;
        layernorm_forward(not_kept(y->x_qkv, infer || c->recompute >= 2), layernorm_1(y, x, delta), c->act, site_of(m, l, X_QKV, purpose), m->wide, own, C, s);
        linear_forward(m, single ? m->wide : y->qkv, all_rows(m, y->x_qkv, m->narrow, own, C, TP_X), y->qkvw, y->qkvb, rows);
        void* out = y->attention != NULL ? y->attention : m->narrow;
        if (single) { attention_of_token(&m->attention, out, y->qkv, m->wide, position, rows, s); }
        else { attention_forward(&m->attention, &m->matmul, out, y->lse, y->qkv, B, s); }
        if (in_fp8(y->projw)) { matmul_input(m, not_kept(y->x_proj, infer || m->attention.flash), NULL, out, site_of(m, l, X_PROJ, purpose), rows, inner, true); }
        linear_forward(m, m->delta, y->x_proj, y->projw, bias_once(m, y->projb), rows);
        own_rows(m, m->delta, m->delta, false, own, TP_Y);
        layernorm_forward(not_kept(y->x_fc, infer || c->recompute >= 2), layernorm_2(y, y->residual, m->delta), c->act, site_of(m, l, X_FC, purpose), m->wide, own, C, s);
        linear_forward(m, y->fc, all_rows(m, y->x_fc, m->narrow, own, C, TP_X), y->fcw, y->fcb, rows);
        gelu_forward(m, l, not_kept(y->x_fcproj, infer || c->recompute >= 1), site_of(m, l, X_FCPROJ, purpose), rows);
        linear_forward(m, m->delta, y->x_fcproj, y->fcprojw, bias_once(m, y->fcprojb), rows);
        own_rows(m, m->delta, m->delta, false, own, TP_Y);
        x = y->residual_mid;
        delta = m->delta;
    }
    if (!is_last_stage(c)) {
        with_type(c->act, [&](auto t) {
            typedef typename decltype(t)::type T;
            run_rows(AddRows<T>{(T*)m->narrow, (const T*)x, (const T*)delta, C}, own, s);
        });
        return;
    }
    weights_wait(&m->reduction, c->layers, s);
    Tensor out = {advance(m->narrow, c->act, (size_t)c->layout.tp_rank * (size_t)own * (size_t)C), c->act, NULL};  // among all ranks' rows
    layernorm_forward(out, LayerNormInputs{m->residual_final, x, delta, m->lnfw->weight, m->lnfb->weight, m->meanf, m->rstdf}, c->act, Quantisation{},
                      NULL, own, C, s);
    all_rows(m, out, m->narrow, own, C, TP_OTHER);
}

// Logits and loss of m->narrow (B, T, C) against m->targets, chunk by chunk; adds to m->loss_total. `backward`: also the gradient of the final LayerNorm's
// output into m->delta (own, C) and of the head's weight, each row weighing `weight` in the mean.
static void head_loss(Model* m, int B, bool backward, float weight) {
    ProfileScope scope("head and loss");
    const GptConfig* c = &m->config;
    const Param* w = m->head;
    int rows = B * c->T, parts = c->layout.tp;
    for (int first = 0, chunk = 0; first < rows; first += m->head_rows, chunk++) {
        int n = min_of(m->head_rows, rows - first);
        size_t at = (size_t)first * (size_t)c->width;
        Tensor x = {advance(m->narrow, c->act, at), c->act, NULL}, z = {m->logits, c->act, NULL};
        MatmulCall logits = linear_call(m, m->logits, x, w, NULL, n);
        matmul(&m->matmul, &logits, m->stream);
        Tensor mine = {m->logit_statistics + (parts > 1 ? (size_t)parts * (size_t)m->head_rows * LOGIT_STATISTICS : 0), FP32, NULL};
        int from = first_token_of(w), valid = (int)w->valid_rows, padded = (int)w->rows;
        const int* targets = m->targets + first;
        with_type(c->act, [&](auto t) {
            typedef typename decltype(t)::type T;
            run_rows(LogitStatistics<T>{(float*)mine.data, (const T*)m->logits, targets, from, valid, padded}, n, m->stream);
            const float* all = (const float*)all_rows(m, mine, m->logit_statistics, n, LOGIT_STATISTICS, TP_OTHER).data;
            run_rows(CrossEntropy<T>{m->losses + first, (T*)m->logits, all, parts, (size_t)n * LOGIT_STATISTICS, targets, weight, from, valid, padded, backward}, n, m->stream);
        });
        if (!backward) { continue; }
        MatmulCall dx = linear_input_call(m, advance(m->delta, c->act, at), z, w, n);
        matmul(&m->matmul, &dx, m->stream);
        weight_gradient(m, w, z, x, n, first > 0, chunk);
    }
    if (backward) { own_rows(m, m->delta, m->delta, false, own_rows_of(c, B), TP_OTHER); }
    run_rows(AddLosses{m->loss_total, m->losses, m->targets, rows}, 1, m->stream);
}

// ---- backward ----

// dy = the gradient of a linear layer's output, (rows, C) in x, as its matmuls take it; adds up its bias gradient
static Tensor output_gradient(Model* m, int l, Site site, void* x, const Param* w, const Param* bias, int rows) {
    int C = (int)bias->cols;
    Tensor dy = matmul_input(m, m->dy, m->partial, x, site_of(m, l, site, TRAIN), rows, C, in_fp8(w));
    finish_columns(vector_gradient(bias), m->partial, strips_of(rows), C, adds(m, bias), m->stream);
    return dy;
}

// The same for a layer that adds to the residual stream, from the stream's gradient, of which a rank of tp has its own rows: all ranks' rows. In FP8 they
// travel as codes, or in the activations' type, of which each rank then makes the same codes.
static Tensor residual_gradient(Model* m, int l, Site site, const Param* w, const Param* bias, int rows) {
    const GptConfig* c = &m->config;
    if (c->layout.tp == 1) { return output_gradient(m, l, site, m->dresidual, w, bias, rows); }
    bool fp8 = in_fp8(w), as_codes = fp8 && is_fp8(c->dy_wire);
    int C = c->width, own = rows / c->layout.tp;
    Quantisation q = site_of(m, l, site, TRAIN);
    Tensor dy = matmul_input(m, Tensor{m->wide, m->dy.dtype, m->dy.slot}, m->partial, m->dresidual, q, own, C, as_codes);
    finish_columns(vector_gradient(bias), m->partial, strips_of(own), C, adds(m, bias), m->stream);
    dy = all_rows(m, dy, as_codes ? m->dy.data : m->delta, own, C, TP_DY);
    q.sharers = NULL;  // all have the same
    return fp8 && !as_codes ? matmul_input(m, m->dy, NULL, dy.data, q, rows, C, true) : dy;
}

// The gradient of a LayerNorm's output, the input of w, of which each rank of tp has a part in m->narrow, added up, and on through the LayerNorm into the
// residual stream
static void norm_backward(Model* m, const Param* w, const Param* gain, const Param* bias, LayerNormInputs in, int own) {
    const GptConfig* c = &m->config;
    own_rows(m, m->narrow, m->narrow, c->dx_fp8 && in_fp8(w), own, TP_DX);
    layernorm_backward(m->dresidual, vector_gradient(gain), vector_gradient(bias), m->partial, m->narrow, in, c->act, true, adds(m, gain), own, c->width, m->stream);
}

// The gradients of token and position embeddings from m->dresidual: of all ranks' rows, for this rank's part of the vocabulary
static void embedding_backward(Model* m, int B) {
    ProfileScope scope("embedding backward");
    const GptConfig* c = &m->config;
    int C = c->width;
    Stream s = m->stream;
    auto zero = [=](const Param* p) { device_zero(p->accumulator, param_elements(p) * (size_t)dtype_bytes(p->accum), s); };
    if (m->head != m->wte && !adds(m, m->wte)) { zero(m->wte); }  // else the head has written it
    if (!c->rope && !adds(m, m->wpe) && c->positions > c->T) { zero(m->wpe); }
    Tensor dx = all_rows(m, Tensor{m->dresidual, c->act, NULL}, m->delta, own_rows_of(c, B), C, TP_OTHER);
    with_accumulator(m->wte->accum, c->accum_rounding, [&](auto a, auto rounding) {
        with_type(c->act, [&](auto t) {
            typedef typename decltype(t)::type T;
            typedef typename decltype(a)::type A;
            constexpr Rounding R = decltype(rounding)::value;
            const T* x = (const T*)dx.data;
            // a GPU's launches are the same whatever the tokens: see micro_batch_by_graph
            int groups = device_is_gpu ? (int)min_of((int64_t)rows_of(m), m->wte->rows) : m->groups.groups;
            run_rows(EmbeddingBackward<T, A, R>{(A*)m->wte->accumulator, x, m->groups, gradient_key(m, m->wte, EMBEDDING_EVENT), first_token_of(m->wte), C}, groups, s);
            if (c->rope) { return; }
            run_rows(PositionBackward<T, A, R>{(A*)m->wpe->accumulator, x, gradient_key(m, m->wpe, 0), B, c->T, C, adds(m, m->wpe)}, c->T, s);
        });
    });
}

// Gradients of all parameters of this stage, and of its input in m->dresidual, from m->delta, the gradient of the final LayerNorm's output, or from
// m->stage_in, that of this stage's output. Those that are complete start on their way between replicas.
static void backward(Model* m, int B) {
    const GptConfig* c = &m->config;
    int C = c->width, inner = own_width(c), rows = B * c->T, own = own_rows_of(c, B);
    Stream s = m->stream;
    reduction_start(&m->reduction, c->layers, s);
    if (is_last_stage(c)) {
        LayerNormInputs in = {NULL, m->residual_final, NULL, m->lnfw->weight, NULL, m->meanf, m->rstdf};
        layernorm_backward(m->dresidual, vector_gradient(m->lnfw), vector_gradient(m->lnfb), m->partial, m->delta, in, c->act, false, adds(m, m->lnfw), own, C, s);
    } else {
        std::swap(m->dresidual, m->stage_in);
    }
    for (int l = stage_layers(c) - 1; l >= 0; l--) {
        Layer* y = &m->layers[l];
        reduction_clear_way(&m->reduction, first_layer(c) + l, s);
        LayerNormInputs ln1 = layernorm_1(y, y->residual, NULL), ln2 = layernorm_2(y, y->residual_mid, NULL);
        // second linear layer of the block, GELU, the first
        Tensor dy = residual_gradient(m, l, DY_FCPROJ, y->fcprojw, y->fcprojb, rows);
        Tensor x = y->x_fcproj;
        if (c->recompute >= 1) { gelu_forward(m, l, x = only_turned(m, x), recomputed(site_of(m, l, X_FCPROJ, TRAIN)), rows); }
        linear_backward(m, m->wide, dy, x, y->fcprojw, rows);
        Tensor dfc = in_fp8(y->fcw) ? m->dy : Tensor{m->wide, c->act, NULL};
        {
            ProfileScope scope("gelu backward");
            const void *dgelu = m->wide, *fc = y->fc;
            produce(dfc, m->partial, [=](auto t) { typedef typename decltype(t)::type T; return GeluGradSource<T>{(const T*)dgelu, (const T*)fc}; }, c->act,
                    site_of(m, l, DY_FC, TRAIN), m->wide, rows, 4 * inner, s);
            finish_columns(vector_gradient(y->fcb), m->partial, strips_of(rows), 4 * inner, adds(m, y->fcb), s);
        }
        if (c->recompute >= 2) { layernorm_again(m, y->x_fc, ln2, site_of(m, l, X_FC, TRAIN), own); }
        linear_backward(m, m->narrow, dfc, all_rows(m, y->x_fc, m->delta, own, C, TP_X_AGAIN), y->fcw, rows);
        norm_backward(m, y->fcw, y->ln2w, y->ln2b, ln2, own);
        // projection, attention, queries with keys and values
        dy = residual_gradient(m, l, DY_PROJ, y->projw, y->projb, rows);
        x = y->x_proj;
        if (in_fp8(y->projw) && m->attention.flash) { matmul_input(m, x = only_turned(m, x), NULL, y->attention, recomputed(site_of(m, l, X_PROJ, TRAIN)), rows, inner, true); }
        linear_backward(m, m->narrow, dy, x, y->projw, rows);
        attention_backward(&m->attention, &m->matmul, m->wide, m->narrow, y->attention, y->qkv, y->lse, B, s);
        dy = output_gradient(m, l, DY_QKV, m->wide, y->qkvw, y->qkvb, rows);
        if (c->recompute >= 2) { layernorm_again(m, y->x_qkv, ln1, site_of(m, l, X_QKV, TRAIN), own); }
        linear_backward(m, m->narrow, dy, all_rows(m, y->x_qkv, m->delta, own, C, TP_X_AGAIN), y->qkvw, rows);
        norm_backward(m, y->qkvw, y->ln1w, y->ln1b, ln1, own);
        reduction_start(&m->reduction, first_layer(c) + l, s);
    }
    if (is_first_stage(c)) { embedding_backward(m, B); }
}

// ---- batches ----

// Tokens and targets to the device
static void upload_batch(Model* m, HostBatch* b) {
    ProfileScope scope("batch to device");
    size_t bytes = (size_t)rows_of(m) * sizeof(int32_t);
    copy_to_device(m->tokens, b->tokens, bytes, m->stream);
    copy_to_device(m->targets, b->targets, bytes, m->stream);
    event_record(b->copied, m->stream);
}

// Its rows by token, of the tokens in this rank's part of the vocabulary
static void upload_groups(Model* m, HostBatch* b) {
    ProfileScope scope("batch to device");
    int from = first_token_of(m->wte), rows = batch_group_tokens(b, rows_of(m), from, from + (int)m->wte->rows);
    m->groups.groups = b->groups;
    copy_to_device(m->groups.order, b->order, (size_t)rows * sizeof(int32_t), m->stream);
    copy_to_device(m->groups.first, b->first, ((size_t)b->groups + 1) * sizeof(int32_t), m->stream);
    copy_to_device(m->groups.token, b->group_token, (size_t)b->groups * sizeof(int32_t), m->stream);
    copy_to_device(m->groups.count, b->count, sizeof(int32_t), m->stream);
    event_record(b->copied, m->stream);
}

// ---- a training step ----

struct FinishLoss {  // mean = total · weight, rounded to a float
    LossShare* share;
    const LossTotal* total;
    double weight;   // 0 on ranks that have no part in the loss, or another's
    template <class Team> DEVICE void operator()(Team team, int) const {
        if (!team.leads()) { return; }
        *share = weight != 0.0 ? LossShare{(double)(float)(total->loss * weight), total->counted} : LossShare{0.0, 0.0};
    }
};

struct StepSettings {
    DecisionRules rules;
    AdamRates rates;
    float weight_decay;
};

// Of a pipeline's ranks those of the last stage know the loss, all of a layer the same
static bool tells_loss(const GptConfig* c) { return is_last_stage(c) && c->layout.tp_rank == 0; }

static void step_begin(Model* m) {
    m->first_micro_step = m->micro_steps;
    event_record(m->steps[m->step % 2].began, m->stream);
    device_zero(m->loss_total, sizeof(LossTotal), m->stream);
    reduction_step(&m->reduction);
}

// Micro-batch number `index` of the step through this stage
static void micro_forward(Model* m, HostBatch* batch, int index) {
    select_micro_batch(m, index);
    upload_batch(m, batch);
    forward(m, m->config.B, TRAIN);
}

// Does a GPU do the same in every such micro-batch, but for its tokens? Where nothing is exchanged with other ranks, and no random bits are drawn, which
// depend on the number of the micro-batch
static bool micro_batch_is_fixed(const Model* m, bool last) {
    const GptConfig* c = &m->config;
    const Reduction* r = &m->reduction;
    bool alone = c->layout.tp == 1 && c->layout.pp == 1 && !r->returning && (m->topology->data.size == 1 || !(last || reduces_each(r)));
    return device_is_gpu && alone && (c->accum == FP32 || c->accum_rounding == NEAREST) && !profiler.on && !m->matmul.timing;
}

// Forward and backward of a micro-batch as one launch: hundreds of small ones would keep a GPU waiting for the host where the model is small
static void micro_batch_by_graph(Model* m, HostBatch* batch, int index, bool last, float weight) {
    select_micro_batch(m, index);
    upload_batch(m, batch);
    upload_groups(m, batch);
    reduction_begin(&m->reduction, index == 0, last, m->stream);
    Graph* g = &m->graphs[index == 0][site_of(m, 0, X_QKV, TRAIN).just_in_time];
    if (*g == NULL) {
        graph_begin(m->stream);
        forward(m, m->config.B, TRAIN);
        head_loss(m, m->config.B, true, weight);
        backward(m, m->config.B);
        *g = graph_end(m->stream);
    }
    graph_launch(*g, m->stream);
    m->micro_steps++;
}

// And back: its share of the gradients. `weight`: of a token in the mean over the global batch; `last`: of the step
static void micro_backward(Model* m, HostBatch* batch, int index, bool last, float weight) {
    Reduction* r = &m->reduction;
    select_micro_batch(m, index);
    reduction_begin(r, index == 0, last, m->stream);
    if (is_first_stage(&m->config)) { upload_groups(m, batch); }
    if (is_last_stage(&m->config)) { head_loss(m, m->config.B, true, weight); }
    backward(m, m->config.B);
    if (!last) {  // of the last one what is left waits for the pipeline to end (finish_step)
        ProfileScope scope("gradient reduction");
        reduction_finish(r, m->stream);
    }
    m->micro_steps++;
}

// How many host batches a rank needs: of the micro-batches in flight; on a GPU one more, which is filled while the last one is still being copied
static int host_batches(const GptConfig* c) { return c->in_flight + (device_is_gpu ? 1 : 0); }

// All K micro-batches of a step through this stage, in the order of the schedule. fill(batch, index) gives their tokens and targets; `batches`: host_batches
template <class Fill> static void run_micro_batches(Model* m, HostBatch* batches, int K, float weight, Fill fill) {
    const GptConfig* c = &m->config;
    int stages = c->layout.pp, stage = c->layout.stage;
    bool at_once = false;  // the last forward pass has brought its backward pass with it
    step_begin(m);
    for (int64_t i = 0; i <= schedule_steps(K); i++) {
        ScheduleStep step = i < schedule_steps(K) ? schedule_step(stages, stage, K, i) : ScheduleStep{};
        exchange_stages(m, schedule_exchange(stages, stage, K, i), own_rows_of(c, c->B), step.micro_batch);
        if (i == schedule_steps(K)) { break; }
        bool last = step.micro_batch == K - 1;
        HostBatch* batch = &batches[(m->first_micro_step + step.micro_batch) % host_batches(c)];
        if (step.forward) {
            event_wait(batch->copied);
            fill(batch, step.micro_batch);
            at_once = micro_batch_is_fixed(m, last);
            if (at_once) { micro_batch_by_graph(m, batch, step.micro_batch, last, weight); }
            else { micro_forward(m, batch, step.micro_batch); }
        } else if (!at_once) {
            micro_backward(m, batch, step.micro_batch, last, weight);
        }
    }
}

// A tied embedding is on the first stage and, as head, on the last: each adds the other's gradient to its own, both in the same order
static void add_tied_gradient(Model* m) {
    const GptConfig* c = &m->config;
    bool first = is_first_stage(c);
    if (!c->tied || first == is_last_stage(c)) { return; }
    const Param* p = m->wte;
    size_t each = (size_t)dtype_bytes(p->accum), n = param_elements(p), most = wide_bytes(m) / each;
    int other = first ? c->layout.pp - 1 : 0;
    for (size_t at = 0; at < n; at += most) {
        size_t some = min_of(most, n - at);
        void* mine = advance(p->accumulator, p->accum, at);
        stage_exchange(&m->stages, m->wide, other, mine, other, some * each, m->stream);
        add_accumulators(p->accum, mine, first ? mine : m->wide, first ? m->wide : mine, c->accum_rounding, gradient_key(m, p, TIED_EVENT), whole_elements(p), at, some, m->stream);
    }
}

// What a token weighs in the mean over a global batch of so many. Tokens that do not count, which only the device knows, are allowed for by the optimizer.
static float token_weight(int64_t global_batch) { return (float)(1.0 / (double)global_batch); }

// After the last micro-batch of a global batch of so many tokens: the gradients are reduced, the optimizer decides and steps. Its record arrives by itself.
static void finish_step(Model* m, const StepSettings* settings, int64_t global_batch) {
    Reduction* r = &m->reduction;
    Topology* t = m->topology;
    add_tied_gradient(m);
    run_rows(FinishLoss{m->loss_share, m->loss_total, tells_loss(&m->config) ? (double)token_weight(global_batch) : 0.0}, 1, m->stream);
    {
        ProfileScope scope("gradient reduction");
        reduction_finish(r, m->stream);
        reduction_count(r, m->stream);
        size_t sites = (size_t)m->sites.count;
        if (sites > 0) {
            all_reduce_max(&t->tensor, (float*)m->sites.amax, sites, m->stream);
            all_reduce_max(&t->data, (float*)m->sites.amax, sites, m->stream);
        }
    }
    optimizer_decide(&m->optimizer, &m->params, r->slots, m->loss_share, global_batch, settings->rules, m->stream);
    reduction_adapt(r, m->optimizer.tops, &m->optimizer.state->apply, m->stream);
    optimizer_update(&m->optimizer, &m->params, settings->rates, settings->weight_decay, m->stream);
    weights_start(r, m->stream);
    if (sends_fp8(r)) { copy_to_pinned(m->statistics, r->statistics, (size_t)m->params.count * sizeof(TensorStatistics), m->stream); }
    copy_to_pinned(m->record, &m->optimizer.state->record, sizeof(StepRecord), m->stream);
    event_record(m->steps[m->step % 2].ended, m->stream);
    m->step++;
    if (m->sites.count > 0) {
        run_rows(UpdateSites{m->sites, &m->optimizer.state->apply, m->steps_recorded}, m->sites.count, m->stream);
        m->steps_recorded++;
    }
}

// The record of the last step whose end has been launched; waits for that step only
static StepRecord read_record(Model* m) {
    event_wait(m->steps[(m->step + 1) % 2].ended);
    return *m->record;
}

// What that step took of a GPU's time, once its record was read; `after`: since the end of the step before, where nothing else came between
static double step_seconds(Model* m, bool after) {
    int last = (int)((m->step + 1) % 2);
    return 1e-3 * event_milliseconds(after ? m->steps[1 - last].ended : m->steps[last].began, m->steps[last].ended);
}

// ---- evaluation and sampling ----

// A forward pass of (B, T), or of a token at `position`, without a backward one, through all stages
static void relay_forward(Model* m, int B, int position = ALL_POSITIONS) {
    watchdog.progress++;
    int stage = m->config.layout.stage, own = position != ALL_POSITIONS ? token_rows(m) : own_rows_of(&m->config, B);
    exchange_stages(m, ScheduleExchange{-1, stage - 1}, own, 0);
    select_micro_batch(m, 0);
    forward(m, B, INFER, position);
    exchange_stages(m, ScheduleExchange{is_last_stage(&m->config) ? -1 : stage + 1, -1}, own, 0);
}

// Mean loss over the tokens that count of up to `batches` micro-batches of each replica
static double evaluate(Model* m, DataLoader* loader, HostBatch* batch, int64_t batches) {
    Topology* t = m->topology;
    loader_rewind(loader);
    int64_t per_call = (int64_t)m->config.B * t->data.size;
    batches = max_of((int64_t)1, min_of(batches, loader_windows(loader) / per_call));
    device_zero(m->loss_total, sizeof(LossTotal), m->stream);
    for (int64_t i = 0; i < batches; i++) {
        event_wait(batch->copied);
        loader_next(loader, batch->tokens, batch->targets);
        upload_batch(m, batch);
        relay_forward(m, m->config.B);
        if (is_last_stage(&m->config)) { head_loss(m, m->config.B, false, 0.0f); }
    }
    LossTotal total;
    copy_to_host(&total, m->loss_total, sizeof(total), m->stream);
    double sums[] = {tells_loss(&m->config) ? total.loss : 0.0, tells_loss(&m->config) ? total.counted : 0.0};
    host_all_reduce_sum(&t->world, sums, 2);
    if (sums[1] == 0.0) {
        bad_input("%s: '%s' has no token that counts in the loss in its %" PRId64 " windows for validation; allowed: one at least", loader->config.flag,
                  loader->config.spec, batches * per_call);
    }
    return sums[0] / sums[1];
}

// How many examples of a multiple-choice file the model gets right. Replicas divide the examples, and make as many passes as the one that has most.
static ChoiceCounts evaluate_choices(Model* m, const ChoiceSet* set, HostBatch* batch) {
    Topology* t = m->topology;
    int B = m->config.B, T = m->config.T;
    int64_t first, last, batches = ceil_div(choices_most(set, t->data.size), (int64_t)B);
    choices_share(&first, &last, set, t->data.rank, t->data.size);
    std::vector<double> sums((size_t)(last - first), 0.0);
    std::vector<float> losses((size_t)rows_of(m));
    std::vector<int> from((size_t)B), to((size_t)B);
    for (int64_t i = 0; i < batches; i++) {
        int64_t begin = first + i * B, used = max_of(min_of(last - begin, (int64_t)B), (int64_t)0);
        event_wait(batch->copied);
        memset(batch->tokens, 0, (size_t)rows_of(m) * sizeof(int32_t));
        memset(batch->targets, 0, (size_t)rows_of(m) * sizeof(int32_t));
        for (int64_t b = 0; b < used; b++) { choices_sequence(batch->tokens + b * T, batch->targets + b * T, &from[(size_t)b], &to[(size_t)b], set, begin + b, T); }
        upload_batch(m, batch);
        relay_forward(m, B);
        if (!is_last_stage(&m->config)) { continue; }
        head_loss(m, B, false, 0.0f);
        copy_to_host(losses.data(), m->losses, losses.size() * sizeof(float), m->stream);
        for (int64_t b = 0; b < used; b++) {
            for (int k = from[(size_t)b]; k < to[(size_t)b]; k++) { sums[(size_t)(begin + b - first)] += (double)losses[(size_t)(b * T + k)]; }
        }
    }
    ChoiceCounts mine = tells_loss(&m->config) ? choices_count(set, sums.data(), first, last) : ChoiceCounts{0, 0};
    double counts[2] = {(double)mine.by_sum, (double)mine.by_mean};
    host_all_reduce_sum(&t->world, counts, 2);
    return ChoiceCounts{(int64_t)counts[0], (int64_t)counts[1]};
}

// The logits of row `row` of m->narrow as floats on the host, of all ranks' parts of the vocabulary: on the last stage. `raw`: (padded_vocab) of workspace
static void read_logits(Model* m, float* logits, float* raw, int row) {
    const GptConfig* c = &m->config;
    int64_t part = m->head->rows;
    size_t bytes = (size_t)part * (size_t)dtype_bytes(c->act);
    Tensor x = {advance(m->narrow, c->act, (size_t)row * (size_t)c->width), c->act, NULL};
    MatmulCall call = linear_call(m, m->logits, x, m->head, NULL, 1);
    matmul(&m->matmul, &call, m->stream);
    copy_to_host(raw, m->logits, bytes, m->stream);
    for (int64_t i = part - 1; i >= 0; i--) {
        if (c->act == FP32) { break; }
        bf16 v;
        memcpy(&v, (const char*)raw + 2 * i, 2);
        raw[i] = to_float(v);  // from behind: what is written has been read
    }
    host_all_gather(&m->topology->tensor, logits, raw, (size_t)part * sizeof(float));
}

struct Generation {
    Sampling sampling;
    uint64_t seed;
    bool keep = true;  // keys and values of what has been read, where that is possible; else the window is read again for every token
};

// Continues the `given` tokens to `length`. One pass reads those that are given and keeps their keys and values (a layer's qkv); then each new token is a pass over
// itself alone. Beyond T tokens the window slides, all positions change, and it is read again for every token, as it is where ranks share layers. All ranks of
// a pipeline together.
static void generate(Model* m, int* tokens, int given, int length, const Generation* g) {
    const GptConfig* c = &m->config;
    bool keep = g->keep && takes_single_tokens(m);
    int T = c->T, upload = max_of(T, token_rows(m)), *window = (int*)host_alloc((size_t)upload * sizeof(int));
    float *raw = (float*)host_alloc((size_t)c->padded_vocab * sizeof(float)), *logits = (float*)host_alloc((size_t)c->padded_vocab * sizeof(float));
    RandomKey key = random_key(g->seed, 1, 0);
    for (int n = given; n < length; n++) {
        bool single = keep && n > given && n <= T;
        int first = max_of(0, n - T), used = n - first;
        if (single) { std::fill(window, window + token_rows(m), tokens[n - 1]); }
        else {
            memset(window, 0, (size_t)T * sizeof(int));
            memcpy(window, tokens + first, (size_t)used * sizeof(int));
        }
        copy_to_device(m->tokens, window, (size_t)(single ? token_rows(m) : T) * sizeof(int), m->stream);
        relay_forward(m, 1, single ? n - 1 : ALL_POSITIONS);
        if (keep && !single && n < T && n + 1 < length) {
            for (int l = 0; l < stage_layers(c); l++) { attention_keep(&m->attention, m->layers[l].qkv, m->stream); }
        }
        if (is_last_stage(c)) {
            read_logits(m, logits, raw, single ? 0 : used - 1);
            tokens[n] = sample_token(logits, c->vocab, &g->sampling, random_bits(key, (uint64_t)n) * (1.0 / 4294967296.0));
        }
        host_broadcast(&m->topology->pipe, &tokens[n], sizeof(int), c->layout.pp - 1);
    }
    free(window);
    free(raw);
    free(logits);
}

// ---- the first tensor that is not finite ----
//
// A step that is skipped leaves the weights, and the sums of squares of its gradients, as they were. So they can be searched afterwards, and what lies between them in
// one more forward pass over the step's batch. The first in the order of a step is the cause, or the nearest to it that is kept.

enum NotFiniteKind { IN_WEIGHTS, IN_ACTIVATIONS, IN_GRADIENTS, IN_NOTHING };

struct NotFinite {
    int kind;
    int64_t place;   // the smaller the earlier in a pass
    char name[112];  // for people
};

static bool comes_before(const NotFinite* a, const NotFinite* b) { return a->kind != b->kind ? a->kind < b->kind : a->place < b->place; }

// Keeps the first of those that are met
static void meet_not_finite(NotFinite* first, NotFiniteKind kind, int64_t place, const std::string& name) {
    NotFinite met = {kind, place, ""};
    snprintf(met.name, sizeof(met.name), "%s", name.c_str());
    if (comes_before(&met, first)) { *first = met; }
}

// Waits for the stream
static bool holds_not_finite(Model* m, DType type, const void* x, size_t n) {
    if (x == NULL || n == 0) { return false; }
    device_zero(m->sites.current, sizeof(uint32_t), m->stream);
    with_gradient_type(type, [=](auto t) {
        typedef typename decltype(t)::type T;
        run_rows(AmaxPieces<T>{m->sites.current, (const T*)x, n}, pieces_of(n), m->stream);
    });
    uint32_t largest;
    copy_to_host(&largest, m->sites.current, sizeof(largest), m->stream);
    return largest >= 0x7f800000u;  // inf; NaNs are above it
}

static void search_weights(Model* m, NotFinite* first) {
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (holds_not_finite(m, p->dtype, p->weight, param_elements(p))) { meet_not_finite(first, IN_WEIGHTS, p->number, std::string("the weight ") + p->name); }
    }
}

// Of the last step that was decided on
static void search_gradients(Model* m, NotFinite* first) {
    std::vector<double> squares((size_t)m->params.count);
    copy_to_host(squares.data(), m->optimizer.squares, squares.size() * sizeof(double), m->stream);
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (!isfinite(squares[(size_t)i])) { meet_not_finite(first, IN_GRADIENTS, -p->number, std::string("the gradient of ") + p->name); }  // backward goes from the last to the first
    }
}

// Of a forward pass of (B, T) that has just been made. Of what layers share only the last one's would still be there: it is left out, as is X that is scaled by block
static void search_activations(Model* m, int B, NotFinite* first) {
    const GptConfig* c = &m->config;
    size_t C = (size_t)c->width, inner = (size_t)own_width(c), rows = (size_t)B * (size_t)c->T, own = (size_t)own_rows_of(c, B);
    int64_t place = 0;
    auto look = [&](DType type, const void* x, size_t n, const std::string& name) {
        place++;
        if (first->kind != IN_ACTIVATIONS && holds_not_finite(m, type, x, n)) { meet_not_finite(first, IN_ACTIVATIONS, place, name); }
    };
    auto look_at_x = [&](const Tensor* x, bool shared, size_t n, const std::string& name) { look(x->dtype, shared || x->by_block ? NULL : x->data, n, name); };
    for (int l = 0; l < stage_layers(c); l++) {
        const Layer* y = &m->layers[l];
        int number = first_layer(c) + l;
        place = 16 * (int64_t)number;
        std::string of = " of layer " + std::to_string(number) + " (h" + std::to_string(number) + ")";
        look(c->act, y->residual, own * C, "the input" + of);
        look_at_x(&y->x_qkv, c->recompute >= 2, own * C, "the first LayerNorm's output, X of qkv," + of);
        look(c->act, y->qkv, rows * 3 * inner, "the output of qkv" + of);
        std::string attended = "attention's output, X of attproj," + of;
        if (y->attention != NULL) { look(c->act, y->attention, rows * inner, attended); }
        else { look_at_x(&y->x_proj, false, rows * inner, attended); }
        look(c->act, y->residual_mid, own * C, "the residual stream behind attention" + of);
        look_at_x(&y->x_fc, c->recompute >= 2, own * C, "the second LayerNorm's output, X of fc," + of);
        look(c->act, y->fc, rows * 4 * inner, "the output of fc" + of);
        look_at_x(&y->x_fcproj, c->recompute >= 1, rows * 4 * inner, "GELU's output, X of fcproj," + of);
    }
    if (!is_last_stage(c)) { return; }
    place = 16 * (int64_t)c->layers;
    look(c->act, m->residual_final, own * C, "the last layer's output");
    look(c->act, m->narrow, rows * C, "the final LayerNorm's output");
    for (size_t at = 0; at < rows; at += (size_t)m->head_rows) {
        int n = (int)min_of((size_t)m->head_rows, rows - at);
        MatmulCall logits = linear_call(m, m->logits, Tensor{advance(m->narrow, c->act, at * C), c->act, NULL}, m->head, NULL, n);
        matmul(&m->matmul, &logits, m->stream);
        look(c->act, m->logits, (size_t)n * (size_t)m->head->rows, "the logits");
    }
}

// The first on any rank, of the step whose record was read last and whose K micro-batches the loader gives from `begin` on. All ranks; the run goes on as if nothing had been
static NotFinite find_not_finite(Model* m, DataLoader* loader, const LoaderPosition* begin, HostBatch* batch, int K) {
    Topology* t = m->topology;
    uint64_t sent[4][COMM_OPERATIONS];
    int groups = 0;
    each_group(t, [&](Group* g, int) { memcpy(sent[groups++], g->bytes_sent, sizeof(sent[0])); });
    NotFinite first = {IN_NOTHING, 0, ""};
    search_gradients(m, &first);
    search_weights(m, &first);
    LoaderPosition now = loader_position(loader);
    loader_seek(loader, begin);
    for (int k = 0; k < K; k++) {
        double found = first.kind < IN_GRADIENTS;
        host_all_reduce_sum(&t->world, &found, 1);
        if (found > 0.0) { break; }
        event_wait(batch->copied);
        loader_next(loader, batch->tokens, batch->targets);
        upload_batch(m, batch);
        relay_forward(m, m->config.B);
        search_activations(m, m->config.B, &first);
    }
    loader_seek(loader, &now);
    std::vector<NotFinite> all((size_t)t->world.size);
    host_all_gather(&t->world, all.data(), &first, sizeof(first));
    for (const NotFinite& x : all) {
        if (comes_before(&x, &first)) { first = x; }
    }
    groups = 0;
    each_group(t, [&](Group* g, int) { memcpy(g->bytes_sent, sent[groups++], sizeof(sent[0])); });
    return first;
}

// ---- checkpoints ----

// f(kind, format, data, slot, exponents) for what a checkpoint holds of a parameter: what this rank keeps of it
template <class F> static void each_state(const Param* p, F f) {
    if (p->block_descales == NULL) { f("weight", p->dtype, own_weight(p), p->slot, (int8_t*)NULL); }  // else it is made from the master
    const struct { const char* kind; const OptimizerTensor* of; } states[] = {{"master", &p->master}, {"m", &p->m}, {"v", &p->v}};
    for (auto& s : states) {
        if (s.of == &p->master && master_is_weight(p)) { continue; }
        f(s.kind, s.of->dtype, s.of->data, s.of->slot, s.of->exponents);
    }
}

// Does this rank write what it keeps of the i-th parameter? Of ranks that hold the same values one does: replicas that keep everything take turns
static bool writes(const Model* m, int i) {
    const Param* p = &m->params.items[i];
    const Group* data = &m->topology->data;
    return p->counted && p->own_count > 0 && (m->optimizer.partitioned || i % data->size == data->rank);
}

// Does the headroom of the gradients' sums change from step to step? Elsewhere it follows from the number of replicas
static bool keeps_mu(const Model* m) {
    const ReductionConfig* c = &m->config.reduction;
    return sends_fp8(&m->reduction) && c->algorithm == REDUCE_RING && c->scaling == SCALING_AUTO;
}

static std::string layer_text(const Model* m, int l, const char* what) { return "h" + std::to_string(first_layer(&m->config) + l) + ".sites." + what; }

// What this rank writes into its file
static CheckpointShare checkpoint_share(const Model* m) {
    CheckpointShare share;
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (!writes(m, i)) { continue; }
        share.places.push_back({p->name, place_text(Place{(int64_t)p->own_first, (int64_t)p->own_count, whole_elements(p)})});
        each_state(p, [&](const char* kind, DType dtype, void* data, const float* slot, const int8_t* exponents) {
            share_add_state(&share, p, kind, dtype, data, slot, exponents);
        });
        if (keeps_mu(m) && p->own_first == 0) { share_add(&share, std::string(p->name) + ".mu", SAFE_FP32, {1}, m->reduction.mu + i); }
    }
    const RankLayout* y = &m->config.layout;
    for (int l = 0; y->replica == 0 && y->tp_rank == 0 && m->sites.count > 0 && l < stage_layers(&m->config); l++) {
        size_t first = (size_t)l * SITES_PER_LAYER;
        share_add(&share, layer_text(m, l, "history"), SAFE_FP32, {SITES_PER_LAYER, AMAX_WINDOW}, m->sites.history + first * AMAX_WINDOW);
        share_add(&share, layer_text(m, l, "slots"), SAFE_FP32, {SITES_PER_LAYER, 4}, m->sites.slots + first * 4);
    }
    return share;
}

// The states of a checkpoint of this model, from any number of ranks, of which `replicas` were replicas of each other. Returns how many blocks of states had to be rounded again
static int64_t load_states(Model* m, CheckpointReader* reader, int64_t replicas) {
    Stream s = m->stream;
    int64_t rounded = 0;
    bool make_weights = by_block(&m->config);
    weights_finish(&m->reduction, s);  // none of another state is on its way
    auto check = [](const std::string& wrong) { if (!wrong.empty()) { die("--resume: the checkpoint cannot be used: %s", wrong.c_str()); } };
    auto read = [&](void* d, const std::string& name, size_t n) {
        std::vector<char> bytes;
        check(reader_bytes(&bytes, reader, name, -1, SAFE_FP32));
        if (bytes.size() != n * sizeof(float)) { check(name + " has another size"); }
        copy_to_device(d, bytes.data(), bytes.size(), s);
        stream_sync(s);
    };
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        each_state(p, [&](const char* kind, DType dtype, void* data, float* slot, int8_t* exponents) {
            StateBytes x;
            if (data == own_weight(p) && is_fp8(dtype) && reader->tensors.count(std::string(p->name) + "." + kind) == 0) {  // it was scaled by block
                make_weights = true;
                return;
            }
            check(reader_state(&x, reader, p, kind, dtype, (int64_t)p->own_first, (int64_t)p->own_count, slot != NULL, exponents != NULL));
            copy_to_device(data, x.codes.data(), x.codes.size(), s);
            if (slot != NULL) { copy_to_device(slot, x.slot, sizeof(x.slot), s); }
            if (exponents != NULL) { copy_to_device(exponents, x.exponents.data(), x.exponents.size(), s); }
            stream_sync(s);
            rounded += x.rounded;
        });
        std::string mu = std::string(p->name) + ".mu";
        // of another number of replicas it begins anew: it is the headroom that so many need
        if (keeps_mu(m) && replicas == m->topology->data.size && reader->tensors.count(mu) > 0) { read(m->reduction.mu + i, mu, 1); }
    }
    for (int l = 0; m->sites.count > 0 && l < stage_layers(&m->config); l++) {
        size_t first = (size_t)l * SITES_PER_LAYER;
        if (reader->tensors.count(layer_text(m, l, "history")) == 0) { continue; }  // of a run that scaled by block: scales are made just in time at first
        read(m->sites.history + first * AMAX_WINDOW, layer_text(m, l, "history"), SITES_PER_LAYER * AMAX_WINDOW);
        read(m->sites.slots + first * 4, layer_text(m, l, "slots"), SITES_PER_LAYER * 4);
    }
    if (make_weights) { optimizer_cast_weights(&m->optimizer, &m->params, s); }
    weights_start(&m->reduction, s);
    return rounded;
}

static void add_int(json_object* o, const char* name, int64_t v) { json_object_object_add(o, name, json_object_new_int64(v)); }
static void add_double(json_object* o, const char* name, double v) { json_object_object_add(o, name, json_object_new_double(v)); }
static void add_string(json_object* o, const char* name, const char* v) { json_object_object_add(o, name, json_object_new_string(v)); }

static json_object* window_json(const OutlierWindow* w) {
    json_object *o = json_object_new_object(), *values = json_object_new_array();
    add_int(o, "next", w->next);
    for (int i = 0; i < w->count; i++) { json_object_array_add(values, json_object_new_double(w->values[i])); }
    json_object_object_add(o, "values", values);
    return o;
}

// What of a model's state is a number here or there
static json_object* counters_json(Model* m) {
    OptimizerState state;
    copy_to_host(&state, m->optimizer.state, sizeof(state), m->stream);
    json_object* o = json_object_new_object();
    add_int(o, "updates", m->optimizer.updates);
    add_int(o, "applied", state.record.applied);
    add_double(o, "beta1_power", state.beta1_power);
    add_double(o, "beta2_power", state.beta2_power);
    add_int(o, "micro_batches", m->micro_steps * m->topology->data.size);  // of all replicas: what random bits depend on
    add_int(o, "steps_recorded", m->steps_recorded);
    add_int(o, "replicas", m->topology->data.size);
    json_object_object_add(o, "losses", window_json(&state.losses));
    json_object_object_add(o, "norms", window_json(&state.norms));
    return o;
}

// A number or an object of an object, which must be there
static json_object* json_member(json_object* o, const char* name) {
    json_object* value = NULL;
    if (!json_object_object_get_ex(o, name, &value)) { die("--resume: the checkpoint's config.json lacks \"%s\"", name); }
    return value;
}
static int64_t json_int(json_object* o, const char* name) { return json_object_get_int64(json_member(o, name)); }

static void window_restore(OutlierWindow* w, json_object* o) {
    json_object* values = json_member(o, "values");
    w->count = (int)min_of(json_object_array_length(values), (size_t)OUTLIER_WINDOW);
    w->next = (int)(json_int(o, "next") % OUTLIER_WINDOW);
    for (int i = 0; i < w->count; i++) { w->values[i] = json_object_get_double(json_object_array_get_idx(values, (size_t)i)); }
}

static void counters_restore(Model* m, json_object* o) {
    OptimizerState state;
    copy_to_host(&state, m->optimizer.state, sizeof(state), m->stream);
    m->optimizer.updates = json_int(o, "updates");
    state.record.applied = json_int(o, "applied");
    state.beta1_power = json_object_get_double(json_member(o, "beta1_power"));
    state.beta2_power = json_object_get_double(json_member(o, "beta2_power"));
    window_restore(&state.losses, json_member(o, "losses"));
    window_restore(&state.norms, json_member(o, "norms"));
    m->micro_steps = ceil_div(json_int(o, "micro_batches"), (int64_t)m->topology->data.size);
    m->steps_recorded = (int)json_int(o, "steps_recorded");
    copy_to_device(m->optimizer.state, &state, sizeof(state), m->stream);
    stream_sync(m->stream);
}

// ---- the run ----

static const char* const CHECKPOINT_FORMAT = "train_gpt_fp8 checkpoint";
constexpr int CHECKPOINT_VERSION = 1;

constexpr int NOT_FINITE_SEARCHES = 3;    // of a run: each takes a forward pass of a step
constexpr int64_t NOT_FINITE_FAILS = 10;  // a run that ends on so many skipped steps has failed

struct Run {
    Args args;
    OptionTable table;
    World world;
    Topology topology;           // of a plan without the means to exchange
    bool on_gpu;                 // what runs, or is planned
    GptConfig config;
    WeightSource source;         // of the initial weights
    bool has_source, has_train, has_val;
    LoaderKind tokens;           // of the data, or without any what the vocabulary suggests
    DataLoader train, val;
    uint64_t fingerprint;        // of the training data
    std::vector<ChoiceSet> evals;
    Tokenizer tokenizer;
    bool has_tokenizer;
    std::vector<int> prompt;     // tokens
    Memory memory;
    size_t fullest[MEMORY_CATEGORIES], emptiest[MEMORY_CATEGORIES];  // bytes of the ranks that take most and least
    Model model;
    std::vector<HostBatch> batches;  // of the micro-batches in flight
    Log log;
    Console console;
    StepClock clock;
    int micro_batches;           // of each replica in a step
    int64_t steps, warmup;
    int64_t parameters;          // of the whole model
    int64_t skipped, not_finite;  // steps so far; those of them for a loss or gradient that was not finite
    int64_t not_finite_in_a_row, skipped_in_a_row;  // up to now
    int searches;                // for the tensor to blame
    std::string to_blame;        // what the last of them found; "": nothing
    int64_t first_step;          // those that a checkpoint has brought
    bool all_damaged;            // there are checkpoints, and none is whole
    json_object* resumed;        // its config.json; NULL: the run begins
    std::string resumed_from;    // its folder
    std::vector<Checksum> resumed_files;
    std::string resumed_choices;
    Checkpoints checkpoints;
    double began;                // wall_seconds of the process
    bool ends;                   // after the save that is under way
    bool failed;                 // the last save did
    const char* program;         // as it was called
    std::string command;         // what was typed
    double flops_per_token, peak_flops;
    const char* peak_name;
    int shapes, shapes_timed, shapes_not_first;  // of matmuls with a choice of algorithms; timed at this start; that do not take the library's first
    std::string cache;           // file of these choices; "": none
    const Gpu* gpu;              // that runs; NULL: a CPU, or not in the table
};

static bool is_file(const char* path) { return access(path, F_OK) == 0; }

// What is planned, on which device, and who holds what of it; who holds what of a run is known when the ranks are (join_topology)
static void resolve_topology(Run* r) {
    Args* a = &r->args;
    Options* o = &r->table.options;
    r->on_gpu = a->plan ? a->gpu != GPU_NONE : device_is_gpu;
    if (!a->plan) {
        const struct { const char* flag; const void* value; } for_plans[] = {{"--json", &a->json}, {"--kernels", &a->kernels}, {"--world", &a->world}, {"--gpu", &a->gpu}};
        for (auto& f : for_plans) {
            if (option_given(o, f.value)) { bad_input("%s says what --plan is to print; give --plan with it, or leave it out", f.flag); }
        }
        return;
    }
    if (device_is_gpu && !r->on_gpu) {
        bad_input("--gpu: none is the CPU, and what its matmuls need only the CPU build knows; allowed here: h100, h200, b200, a100, l40s");
    }
    if (a->kernels && a->gpu == GPU_NONE) { bad_input("--kernels: what kernels take is known of GPUs only; give --gpu with one of h100, h200, b200, a100, l40s"); }
    if (a->resume) { bad_input("--resume goes on with a run, and --plan runs nothing; leave one of them out"); }
    int64_t model = a->tp * a->pp;
    set_default(o, &a->world, max_of((int64_t)launched_processes(), model));
    if (a->world % model != 0) {
        bad_input("--world: %" PRId64 " rank%s no multiple of --tp %" PRId64 " × --pp %" PRId64 " = %" PRId64, a->world, a->world == 1 ? " is" : "s are", a->tp, a->pp, model);
    }
    Topology* t = &r->topology;
    t->layout = layout_of(0, (int)a->world, (int)a->tp, (int)a->pp);
    Transport transport = a->gpu != GPU_NONE ? OVER_NCCL : OVER_MPI;  // of the run
    each_group(t, [=](Group* g, int size) {
        g->size = size;
        g->transport = size == 1 ? ALONE : transport;
    });
}

// The command that starts this program on so many ranks
static std::string launch_of(const Run* r, int ranks) {
    LaunchFacts facts = {getenv("SLURM_JOB_ID") != NULL || getenv("SLURM_NTASKS") != NULL, geteuid() == 0, (int)sysconf(_SC_NPROCESSORS_ONLN)};
    return launch_text(ranks, r->program, &facts);
}

// Of a job of several tasks this process is alone: most often srun was left out
static void note_lone_task(const Run* r) {
    const char* tasks = getenv("SLURM_NTASKS");
    if (tasks == NULL || atoi(tasks) < 2 || launched_processes() != 0) { return; }
    fprintf(stderr, "train_gpt_fp8: this job has %d tasks (SLURM_NTASKS), and this is one process; to start them all: %s\n", atoi(tasks), launch_of(r, atoi(tasks)).c_str());
}

// While ranks find each other: a hang is told of like any later one. `ranks`: that the launcher started
static void watch_meeting(const Run* r, int ranks) {
    if (ranks == 0 || ranks == 1) { return; }
    watchdog_start(&watchdog, r->args.timeout, "", process.rank, max_of(ranks, 2), NULL);
    watchdog.doing = "the first exchange";
}

// Of a run, when it is known that all ranks have the same flags
static void join_topology(Run* r) {
    const Args* a = &r->args;
    int64_t model = a->tp * a->pp;
    if (r->world.size % model != 0) {
        std::string launch = launch_of(r, (int)round_up((int64_t)r->world.size, model));
        bad_input("--tp %" PRId64 " × --pp %" PRId64 " need a multiple of %" PRId64 " ranks, and there %s %d; start as many: %s%s", a->tp, a->pp, model,
            r->world.size == 1 ? "is" : "are", r->world.size, launch.c_str(), r->resumed != NULL ? ", or give other --tp and --pp than the checkpoint has" : "");
    }
    topology_split(&r->topology, (int)a->tp, (int)a->pp);
}

// How gradients are added up and travel, from the recipe and the explicit flags
static void resolve_gradients(Run* r) {
    Args* a = &r->args;
    Options* o = &r->table.options;
    GptConfig* c = &r->config;
    static const struct { GradFormat accum, wire; GradReduce algorithm; } by_recipe[] = {
        {GRAD_BF16, GRAD_E4M3, REDUCE_DIRECT}, {GRAD_E4M3, GRAD_E4M3, REDUCE_RING}, {GRAD_FP32, GRAD_FP32, REDUCE_RING}, {GRAD_FP32, GRAD_FP32, REDUCE_RING}};
    set_default(o, &a->grad_dtype, by_recipe[a->recipe].wire);
    c->wire = grad_formats[a->grad_dtype];
    DType accum = grad_formats[by_recipe[a->recipe].accum];
    set_default(o, &a->grad_accum_dtype, dtype_bytes(accum) < dtype_bytes(c->wire) ? a->grad_dtype : by_recipe[a->recipe].accum);
    c->accum = grad_formats[a->grad_accum_dtype];
    bool quantised = is_fp8(c->wire);
    set_default(o, &a->grad_reduce, quantised && a->recipe != RECIPE_FP8_LM ? REDUCE_DIRECT : by_recipe[a->recipe].algorithm);
    set_default(o, &a->grad_accum_rounding, c->accum == E4M3 ? NEAREST : STOCHASTIC);  // few additions: see resolve_global_batch
    const char* wire = dtype_names[c->wire];
    if (dtype_bytes(c->accum) < dtype_bytes(c->wire)) {
        bad_input("--grad-accum-dtype %s is narrower than --grad-dtype %s, so the wire would carry bits that are not there; make the first as wide as the second",
            dtype_names[c->accum], wire);
    }
    if (option_given(o, &a->grad_scaling) && !quantised) {
        bad_input("--grad-scaling is the headroom of sums in FP8, and --grad-dtype %s needs none; leave one of them out", wire);
    }
    if (option_given(o, &a->grad_scaling) && a->grad_reduce == REDUCE_DIRECT) {
        bad_input("--grad-scaling is the headroom of a ring's sums in FP8; --grad-reduce direct adds in FP32 and needs none; give --grad-reduce ring with it");
    }
    if (option_given(o, &a->grad_accum_rounding) && c->accum == FP32) {
        bad_input("--grad-accum-rounding: gradients are added up in fp32 and not rounded; give --grad-accum-dtype bf16 or e4m3 with it");
    }
    if (a->log_tensors && (!quantised || r->topology.data.size == 1)) {
        bad_input("--log-tensors: no gradient is sent in FP8 here (%s, %d replica%s), so there is nothing to log", wire, r->topology.data.size, r->topology.data.size == 1 ? "" : "s");
    }
    const Gpu* planned = a->plan ? gpu_of(a->gpu) : NULL;
    if (planned != NULL && planned->capability < 90 && r->topology.data.size > 1 && quantised && a->grad_reduce == REDUCE_RING) {
        bad_input("--grad-reduce ring with --grad-dtype %s: NCCL adds FP8 on GPUs of capability 9.0 and up, and --gpu %s has %d.%d; take --grad-reduce direct", wire,
            planned->name, planned->capability / 10, planned->capability % 10);
    }
#ifdef NCCL_TRANSPORT
    bool ring_of_codes = r->topology.data.transport == OVER_NCCL && quantised && a->grad_reduce == REDUCE_RING;
    if (ring_of_codes && !nccl_adds_fp8()) {
        bad_input("--grad-reduce ring with --grad-dtype %s: NCCL adds FP8 from version 2.24.3 on, and this one is older; take --grad-reduce direct", wire);
    }
    if (ring_of_codes && device_capability() < 90) {
        bad_input("--grad-reduce ring with --grad-dtype %s: NCCL adds FP8 on GPUs of capability 9.0 and up, and this one has %d.%d; take --grad-reduce direct", wire,
            device_capability() / 10, device_capability() % 10);
    }
#endif
    c->accum_rounding = a->grad_accum_rounding;
    c->embeddings_as_matrices = a->recipe == RECIPE_FP8;
    set_default(o, &a->zero_split, a->recipe == RECIPE_FP8_LM ? SPLIT_TENSOR : SPLIT_FLAT);
    if (option_given(o, &a->zero_split) && a->zero == 0) {
        bad_input("--zero-split says how --zero 1 and 2 divide tensors, and --zero 0 divides none; leave one of them out");
    }
    c->reduction = ReductionConfig{a->grad_scaling, a->grad_reduce, ZeroConfig{(int)a->zero, a->zero_split}};
}

// What the optimizer keeps, from the recipe and the explicit flags
static void resolve_optimizer(Run* r) {
    Args* a = &r->args;
    Options* o = &r->table.options;
    GptConfig* c = &r->config;
    if (a->recipe == RECIPE_FP8_LM) {
        set_default(o, &a->master_dtype, STATE_FP16);
        set_default(o, &a->m_dtype, STATE_E4M3);
        set_default(o, &a->v_dtype, STATE_FP16);
    } else if (a->recipe == RECIPE_FP8) {
        set_default(o, &a->master_dtype, STATE_FP16);
        set_default(o, &a->m_dtype, STATE_E4M3);
        set_default(o, &a->v_dtype, STATE_UE5M3);
        set_default(o, &a->opt_block, BLOCK_128);
        set_default(o, &a->master_rounding, STOCHASTIC);
        set_default(o, &a->moment_rounding, STOCHASTIC);
    }
    c->master = (DType)a->master_dtype;
    c->m = (DType)a->m_dtype;
    c->v = (DType)a->v_dtype;
    if (a->recipe == RECIPE_FP32 && c->master != FP32) {
        bad_input("--master-dtype %s: in recipe fp32 the weights are the masters; allowed: fp32", dtype_names[c->master]);
    }
    static_assert(STATE_BLOCK == 128, "BLOCK_128");
    if (option_given(o, &a->opt_block) && a->opt_block == BLOCK_128 && !has_scale(c->master) && !has_scale(c->m) && !has_scale(c->v)) {
        bad_input("--opt-block %d: master, m and v are in fp32 or bf16 and have no scales; give one of them fp16, e4m3 or e5m2", STATE_BLOCK);
    }
    if (option_given(o, &a->master_rounding) && c->master == FP32) { bad_input("--master-rounding: the masters are in fp32 and not rounded; give --master-dtype with it"); }
    if (option_given(o, &a->moment_rounding) && c->m == FP32 && c->v == FP32) {
        bad_input("--moment-rounding: the moments are in fp32 and not rounded; give --m-dtype or --v-dtype with it");
    }
    c->optimizer = OptimizerConfig{a->opt_block == BLOCK_128, a->master_rounding, a->moment_rounding, (uint64_t)a->seed};
}

// Where --fp8-scaling block can be had
static void check_blocks(const Run* r) {
    const Args* a = &r->args;
    if (a->tp > 1) {
        bad_input("--fp8-scaling block with --tp %" PRId64 ": ranks that share a layer send each other tensors with one scale, not one a block; take --fp8-scaling current", a->tp);
    }
    const Gpu* planned = a->plan ? gpu_of(a->gpu) : NULL;
    int capability = planned != NULL ? planned->capability : 90;
#ifdef USE_CUDA
    if (!a->plan) { capability = device_capability(); }
#endif
    if (r->on_gpu && capability != 90) {
        bad_input("--fp8-scaling block: cuBLASLt multiplies blocks of 128 on GPUs of capability 9.0 (H100, H200), and %s has %d.%d; take --fp8-scaling current",
            planned != NULL ? planned->name : "this one", capability / 10, capability % 10);
    }
#if defined(USE_CUDA) && CUBLAS_VERSION < 120900
    if (!a->plan) { bad_input("--fp8-scaling block: cuBLASLt multiplies blocks of 128 from CUDA 12.9 on, and this binary was built with an older one; take --fp8-scaling current"); }
#endif
    if (r->on_gpu && a->seq_len % 4 != 0) {
        bad_input("--fp8-scaling block: --seq-len %" PRId64 " is no multiple of 4 tokens, which the GPU's products of blocks need", a->seq_len);
    }
}

// Shape and numerics from --init, the explicit flags and the data
static void resolve_model(Run* r) {
    Args* a = &r->args;
    Options* o = &r->table.options;
    GptConfig* c = &r->config;
    bool shaped = option_given(o, &a->layers) || option_given(o, &a->heads) || option_given(o, &a->width);
    const char* init = a->init != NULL ? a->init : shaped ? NULL : "d12";
    const Preset* preset = init != NULL ? find_preset(init) : NULL;
    if (preset != NULL) {
        set_default(o, &a->layers, preset->layers);
        set_default(o, &a->heads, preset->heads);
        set_default(o, &a->width, preset->width);
        set_default(o, &a->position, preset->position);
    } else if (init != NULL) {
        if (!is_file(init)) {
            bad_input("--init: %s is neither a preset (d12, gpt2:d6 to gpt2:d84, gpt3:c384 to gpt3:c12288, gpt3:125m, gpt3:7b, gpt3:13b, gpt3:175b) nor "
                "a file or folder", quoted(init).text);
        }
        r->source = is_checkpoint(init) ? checkpoint_source("--init", init, a->plan ? NULL : &r->topology.world)
                  : is_folder(init) ? hf_source("--init", init) : llmc_source("--init", init);
        r->has_source = true;
        const ModelShape* shape = &r->source.shape;
        struct { const char* flag; int64_t* value; int64_t in_file; } fixed[] = {
            {"--layers", &a->layers, shape->layers}, {"--heads", &a->heads, shape->heads}, {"--width", &a->width, shape->width},
            {"--vocab", &a->vocab, shape->vocab}};
        for (auto& f : fixed) {
            if (option_given(o, f.value) && *f.value != f.in_file) {
                bad_input("%s: %" PRId64 " was asked for, and '%s' has %" PRId64 "; leave the flag out", f.flag, *f.value, init, f.in_file);
            }
            *f.value = f.in_file;
        }
        Position position = shape->rope ? POSITION_ROPE : POSITION_LEARNED;
        if (option_given(o, &a->position) && a->position != position) {
            bad_input("--position: '%s' has %s positions, not %s", init, shape->rope ? "rotary" : "learned", shape->rope ? "learned" : "rope");
        }
        if (option_given(o, &a->tied) && a->tied != shape->tied) {
            bad_input("--tie-embeddings: '%s' has a %s, not %s", init, shape->tied ? "tied head" : "head of its own", shape->tied ? "no" : "yes");
        }
        a->position = position;
        a->tied = shape->tied;
        if (!shape->rope && a->seq_len > shape->positions) {
            bad_input("--seq-len: %" PRId64 " is longer than the %d positions of '%s'", a->seq_len, shape->positions, init);
        }
    }
    if (a->layers == 0 || a->heads == 0 || a->width == 0) {
        bad_input("--layers, --heads and --width are needed together, or --init with a preset such as d12");
    }
    if (a->width % a->heads != 0) { bad_input("--width: %" PRId64 " is not divisible by --heads %" PRId64, a->width, a->heads); }
    int64_t head_size = a->width / a->heads;
    if (a->position == POSITION_ROPE && head_size % 2 != 0) {
        bad_input("--width: %" PRId64 " over --heads %" PRId64 " gives heads of %" PRId64 "; rotary positions need an even size", a->width, a->heads, head_size);
    }
    bool fp8 = a->recipe == RECIPE_FP8 || a->recipe == RECIPE_FP8_LM;
    if (a->fp8_scaling == SCALING_BLOCK) { set_default(o, &a->fp8_bwd, FORMAT_E4M3); }  // a block needs no more range, and gains a bit
    if (fp8 && a->fp8_fwd == FORMAT_E5M2 && a->fp8_bwd == FORMAT_E5M2) {
        bad_input("--fp8-fwd e5m2 with --fp8-bwd e5m2: the weight gradient would be E5M2 × E5M2, which no FP8 unit multiplies; make one of them e4m3");
    }
    if (!fp8) {
        const struct { const char* flag; const void* value; } needs_fp8[] = {
            {"--fp8-scaling", &a->fp8_scaling}, {"--fp8-fwd", &a->fp8_fwd}, {"--fp8-bwd", &a->fp8_bwd}, {"--bf16-layers", &a->bf16_layers},
            {"--fp8-min-size", &a->fp8_min_size}};
        for (auto& f : needs_fp8) {
            if (option_given(o, f.value)) { bad_input("%s belongs to the recipes fp8 and fp8-lm, not to --recipe %s", f.flag, a->recipe == RECIPE_BF16 ? "bf16" : "fp32"); }
        }
    }
    if (fp8 && a->fp8_scaling == SCALING_BLOCK) { check_blocks(r); }
    if (a->bf16_layers.first + a->bf16_layers.last > a->layers) {
        bad_input("--bf16-layers: first:%d,last:%d are more than the %" PRId64 " layers", a->bf16_layers.first, a->bf16_layers.last, a->layers);
    }
    const struct { const char* flag; const void* value; } for_gpus[] = {{"--matmul-choice", &a->matmul_choice}, {"--matmul-cache", &a->matmul_cache}};
    for (auto& f : for_gpus) {
        if (!r->on_gpu && option_given(o, f.value)) { bad_input("%s is for GPU builds: on a CPU oneDNN has one algorithm a shape, and nothing is chosen", f.flag); }
    }
    if (a->matmul_cache != NULL && a->matmul_choice == ALGORITHM_LIBRARY) {
        bad_input("--matmul-cache keeps what --matmul-choice timed finds, and library times nothing; leave one of them out");
    }
    struct stat cache;
    if (a->matmul_cache != NULL && stat(a->matmul_cache, &cache) == 0 && !S_ISREG(cache.st_mode)) {
        bad_input("--matmul-cache: '%s' is %s", a->matmul_cache, S_ISDIR(cache.st_mode) ? "a folder" : "no regular file");
    }
    if (!r->on_gpu && a->staged) { bad_input("--staged is for GPU builds: on a CPU there is nothing to stage"); }
    if (a->heads % a->tp != 0) { bad_input("--tp: %" PRId64 " ranks cannot share the %" PRId64 " attention heads alike; allowed: divisors of them", a->tp, a->heads); }
    if (a->layers % a->pp != 0) { bad_input("--pp: %" PRId64 " stages cannot share the %" PRId64 " layers alike; allowed: divisors of them", a->pp, a->layers); }
    if (a->seq_len % a->tp != 0) { bad_input("--tp: %" PRId64 " ranks cannot share the %" PRId64 " tokens of --seq-len alike; allowed: divisors of them", a->tp, a->seq_len); }
    if (r->on_gpu && a->width % (16 * a->tp) != 0) {
        if (a->tp == 1) { bad_input("--width: %" PRId64 " is not a multiple of 16, which the GPU's matrix units need", a->width); }
        bad_input("--tp: %" PRId64 " ranks have %" PRId64 " of the %" PRId64 " channels of --width each, no multiple of 16, which the GPU's matrix units need", a->tp,
            a->width / a->tp, a->width);
    }
    if (r->on_gpu && fp8 && a->micro_batch * a->seq_len % 16 != 0) {
        bad_input("--micro-batch %" PRId64 " × --seq-len %" PRId64 " is no multiple of 16 tokens, which the GPU's FP8 units need", a->micro_batch, a->seq_len);
    }
    if (a->micro_batch * a->seq_len > INT32_MAX / 4) {
        bad_input("--micro-batch %" PRId64 " × --seq-len %" PRId64 " are more tokens than one pass can hold (%d)", a->micro_batch, a->seq_len, INT32_MAX / 4);
    }
    c->layers = (int)a->layers;
    c->heads = (int)a->heads;
    c->width = (int)a->width;
    c->rope = a->position == POSITION_ROPE;
    c->tied = a->tied;
    c->T = (int)a->seq_len;
    c->B = (int)a->micro_batch;
    c->positions = r->has_source ? max_of(r->source.shape.positions, c->T) : c->T;
    c->recompute = (int)a->recompute;
    c->act = a->recipe == RECIPE_FP32 ? FP32 : BF16;
    c->fp8 = fp8;
    c->bf16_layers = a->bf16_layers;
    c->fp8_min_size = a->fp8_min_size;
    c->scaling = a->fp8_scaling;
    c->fp8_fwd = a->fp8_fwd == FORMAT_E4M3 ? E4M3 : E5M2;
    c->fp8_bwd = a->fp8_bwd == FORMAT_E4M3 ? E4M3 : E5M2;
    c->dy_wire = a->recipe == RECIPE_FP8 ? c->fp8_bwd : c->act;  // fp8-lm: as MS-AMP
    c->dx_fp8 = a->recipe == RECIPE_FP8;
    c->seed = (uint64_t)a->seed;
    c->layout = r->topology.layout;
    resolve_gradients(r);
    resolve_optimizer(r);
    if (3 + 12 * (int64_t)c->layers + 2 > MAX_PARAMS) { bad_input("--layers: at most %d", (MAX_PARAMS - 5) / 12); }
}

static void resolve_vocabulary(Run* r, int64_t vocab) {
    r->config.vocab = (int)vocab;
    r->config.padded_vocab = round_up((int)vocab, 128 * r->topology.layout.tp);
}

static DataLoaderConfig loader_config(const Run* r, const char* flag, const char* spec, LoaderPart part) {
    DataLoaderConfig c = {};
    c.flag = flag;
    c.spec = spec;
    c.vocab = r->args.vocab;
    c.seq_len = r->config.T;
    c.seed = r->config.seed;
    c.shuffle = part != LOADER_VAL;
    c.val_split = r->args.val_split;
    c.part = part;
    c.rank = r->topology.data.rank;
    c.ranks = r->topology.data.size;
    c.micro_batch = r->config.B;
    return c;
}

static void open_data(Run* r) {
    Args* a = &r->args;
    r->has_train = a->train_data != NULL;
    if (!r->has_train && a->steps != 0) { bad_input("--train-data is missing: token shards or a text file to train on"); }
    bool split = a->val_data == NULL && a->val_split > 0.0;
    if (!r->has_train && a->val_split > 0.0) { bad_input("--val-split: there is no --train-data to hold some of it back; give --val-data"); }
    if (a->val_data != NULL && a->val_split > 0.0) { bad_input("--val-split: %g was given together with --val-data; give one of them", a->val_split); }
    if (r->has_train) {
        DataLoaderConfig train = loader_config(r, "--train-data", a->train_data, split ? LOADER_TRAIN : LOADER_ALL);
        loader_open(&r->train, &train);
        r->fingerprint = loader_fingerprint(&r->train);
    }
    r->has_val = a->val_data != NULL || split;  // its files are checked also where nothing will read them
    if (r->has_val) {
        DataLoaderConfig val = split ? loader_config(r, "--train-data", a->train_data, LOADER_VAL) : loader_config(r, "--val-data", a->val_data, LOADER_ALL);
        val.shuffle = false;
        loader_open(&r->val, &val);
        if (r->has_train && (r->val.vocab != r->train.vocab || r->val.kind != r->train.kind)) {
            bad_input("--val-data: '%s' holds %s tokens of a vocabulary of %" PRId64 ", and --train-data %s of %" PRId64, a->val_data, loader_kind_name(&r->val),
                r->val.vocab, loader_kind_name(&r->train), r->train.vocab);
        }
    }
    if (!r->has_train && !r->has_val && a->vocab == 0) { bad_input("--vocab is missing: neither --init nor data says how large the vocabulary is"); }
    resolve_vocabulary(r, r->has_train ? r->train.vocab : r->has_val ? r->val.vocab : a->vocab);
    int vocab = r->config.vocab;
    r->tokens = r->has_train ? r->train.kind : r->has_val ? r->val.kind : vocab == 256 ? LOADER_TEXT : vocab <= 65536 ? LOADER_UINT16 : LOADER_UINT32;
}

// The multiple-choice files of --eval-data
static void open_evals(Run* r) {
    const char* list = r->args.eval;
    for (const char *at = list, *end; at != NULL; at = *end == ',' ? end + 1 : NULL) {
        end = at + strcspn(at, ",");
        std::string path(at, end);
        if (path.empty()) { bad_input("--eval-data: '%s' has an empty entry; allowed: a file, or several with commas between them", list); }
        r->evals.emplace_back();
        choices_open(&r->evals.back(), "--eval-data", path.c_str(), r->config.vocab, r->config.T);
    }
}

static void resolve_tokenizer(Run* r) {
    const char* path = r->args.tokenizer;
    r->has_tokenizer = path != NULL;
    if (!r->has_tokenizer) { return; }
    if (r->tokens == LOADER_TEXT) { bad_input("--tokenizer: a model of text files reads and writes bytes and needs none; leave it out"); }
    r->tokenizer = tokenizer_open("--tokenizer", path, r->config.vocab);
}

// Where samples begin: at a line's end in text, at the end of a text (in GPT-2's vocabulary <|endoftext|>), else at token 0
static int first_token(const Run* r) {
    int token = r->tokens == LOADER_TEXT ? '\n' : r->has_tokenizer ? r->tokenizer.end_of_text : r->config.vocab == 50257 ? 50256 : 0;
    return min_of(token, r->config.vocab - 1);
}

// What --prompt says in tokens, and that what says how to generate has something to say it of
static void resolve_generation(Run* r) {
    const Args* a = &r->args;
    const Options* o = &r->table.options;
    bool text = r->tokens == LOADER_TEXT;
    const struct { const char* flag; const void* value; bool of_samples; } for_generation[] = {{"--prompt", &a->prompt, false}, {"--samples", &a->samples, false},
        {"--temperature", &a->temperature, true}, {"--top-k", &a->top_k, true}, {"--top-p", &a->top_p, true}};
    for (auto& f : for_generation) {
        if (option_given(o, f.value) && a->generate == 0 && !(f.of_samples && a->sample_every > 0)) {
            bad_input("%s says how tokens are generated, and none are; give --generate N%s with it", f.flag, f.of_samples ? " or --sample-every N" : "");
        }
    }
    if (a->prompt == NULL) {
        r->prompt.push_back(first_token(r));
        return;
    }
    for (const char* at = a->prompt; *at != '\0';) {
        if (!text && isspace((unsigned char)*at)) { at++; continue; }
        char* end = (char*)at + 1;
        int64_t token = (unsigned char)*at;
        if (!text) {
            errno = 0;
            token = *at >= '0' && *at <= '9' ? strtoll(at, &end, 10) : -1;
            if (token < 0 || errno != 0 || (*end != '\0' && !isspace((unsigned char)*end))) {
                bad_input("--prompt: %s is no list of tokens by number, such as '464 3290 318'; text is understood by models of bytes only, since no file here tells how "
                          "a tokenizer joins characters (scripts/tokenize.py --ids prints a text's tokens)", quoted(a->prompt).text);
            }
        }
        if (token >= r->config.vocab) {
            bad_input("--prompt: the token %" PRId64 " is not allowed in a vocabulary of %d: 0 to %d", token, r->config.vocab, r->config.vocab - 1);
        }
        r->prompt.push_back((int)token);
        at = end;
    }
    if (r->prompt.empty()) { bad_input("--prompt: %s has no token; give one at least, or leave it out", quoted(a->prompt).text); }
}

static void close_data(Run* r) {
    if (r->has_train) { loader_close(&r->train); }
    if (r->has_val) { loader_close(&r->val); }
}

// What goes out at the end, and whether it can. What is on the disk rank 0 looks at, who will write
static void resolve_export(Run* r) {
    Args* a = &r->args;
    Options* o = &r->table.options;
    bool exports = a->export_hf != NULL || a->export_llmc != NULL;
    if (option_given(o, &a->export_dtype) && !exports) { bad_input("--export-dtype is that of --export-hf and --export-llmc; give one of them with it"); }
    if (a->hf_tokenizer != NULL && a->export_hf == NULL) { bad_input("--hf-tokenizer goes along with --export-hf; give both"); }
    set_default(o, &a->export_dtype, a->recipe == RECIPE_FP32 ? EXPORT_FP32 : EXPORT_BF16);
    auto same = [&](const char* other) { return other != NULL && hf_folder_name(other) == hf_folder_name(a->export_hf); };
    if (a->export_hf != NULL && same(a->export_llmc)) { bad_input("--export-hf and --export-llmc are both '%s'; give two names", a->export_hf); }
    if (a->export_hf != NULL && same(a->output_dir)) { bad_input("--export-hf: '%s' is --output-dir; an export has a folder of its own", a->export_hf); }
    ModelShape shape = shape_of(&r->config);
    if (r->topology.world.rank != 0) { return; }
    if (a->export_llmc != NULL) { llmc_require_writable("--export-llmc", a->export_llmc, &shape, export_formats[a->export_dtype]); }
    if (a->export_hf != NULL) { hf_require_writable("--export-hf", a->export_hf); }
    if (a->hf_tokenizer != NULL) { hf_require_tokenizer("--hf-tokenizer", a->hf_tokenizer); }
}

// The micro-batches of a step
static void resolve_global_batch(Run* r) {
    Args* a = &r->args;
    int replicas = r->topology.data.size;
    int64_t pass = a->micro_batch * a->seq_len * replicas;
    set_default(&r->table.options, &a->global_batch, pass * a->pp);
    if (a->global_batch % pass != 0) {
        bad_input("--global-batch: %" PRId64 " tokens are no multiple of micro-batch %" PRId64 " × seq-len %" PRId64 " × %d %s%s = %" PRId64, a->global_batch,
            a->micro_batch, a->seq_len, replicas, r->topology.world.size == replicas ? "rank" : "replica", replicas == 1 ? "" : "s", pass);
    }
    if (a->global_batch / pass > INT32_MAX) { bad_input("--global-batch: %" PRId64 " tokens are more than %d micro-batches a replica", a->global_batch, INT32_MAX); }
    r->micro_batches = (int)(a->global_batch / pass);
    // BF16 gradients: of few additions none is lost to rounding to nearest, which the matmul does by itself; of many small ones stochastic rounding keeps the sum
    bool few = r->micro_batches <= FEW_MICRO_BATCHES && r->config.accum == BF16;
    if (few && !option_given(&r->table.options, &a->grad_accum_rounding)) { a->grad_accum_rounding = r->config.accum_rounding = NEAREST; }
    if (r->micro_batches < a->pp) {
        bad_input("--global-batch: %" PRId64 " tokens are %d micro-batch%s of each replica, and the %" PRId64 " stages of --pp need as many at least; allowed: multiples of %" PRId64
            " from %" PRId64 " on", a->global_batch, r->micro_batches, r->micro_batches == 1 ? "" : "es", a->pp, pass, pass * a->pp);
    }
    r->config.in_flight = schedule_in_flight((int)a->pp, r->topology.layout.stage, r->micro_batches);
}

static void resolve_steps(Run* r) {
    const Args* a = &r->args;
    r->steps = a->steps >= 0 ? a->steps : loader_tokens(&r->train) / a->global_batch;
    if (a->steps < 0 && r->steps == 0) {
        bad_input("--global-batch: %" PRId64 " tokens are more than the %" PRId64 " of an epoch; give --steps N, or smaller batches", a->global_batch,
            loader_tokens(&r->train));
    }
    r->warmup = a->warmup >= 0 ? a->warmup : min_of((int64_t)1000, r->steps / 10);
    if (r->warmup > r->steps && r->steps > 0) { bad_input("--warmup: %" PRId64 " is more than the %" PRId64 " steps", r->warmup, r->steps); }
}

// The operations of a token's forward and backward pass, as MFU counts them
static double flops_of_token(const GptConfig* c) {
    double C = c->width;
    return 6.0 * (12.0 * c->layers * C * C + (double)c->vocab * C) + 12.0 * c->layers * C * c->T;
}

// The dense peak of the device's matrix units for this recipe, in FLOP/s; 0: not known
static void resolve_peak(Run* r) {
    char name[128];
    device_name(name, sizeof(name));
    const Gpu* g = device_is_gpu ? gpu_by_device(name) : NULL;
    if (g != NULL && r->config.act != FP32) {
        r->peak_flops = r->config.fp8 ? g->fp8 : g->bf16;
        r->peak_name = r->config.fp8 ? "dense FP8" : "dense BF16";
    }
    r->gpu = g;
    r->flops_per_token = flops_of_token(&r->config);
}

// What each rank has, one after the other
static std::string gather_text(Group* group, const std::string& mine) {
    std::vector<uint64_t> sizes((size_t)group->size);
    uint64_t size = mine.size(), most = 0;
    host_all_gather(group, sizes.data(), &size, sizeof(size));
    for (uint64_t n : sizes) { most = max_of(most, n); }
    std::string padded = mine, all(most * sizes.size(), ' '), text;
    padded.resize(most, ' ');
    host_all_gather(group, &all[0], padded.data(), most);
    for (size_t i = 0; i < sizes.size(); i++) { text += all.substr(i * most, sizes[i]); }
    return text;
}

// Which of cuBLASLt's algorithms the planned matmuls take: those that rank 0 finds in its cache file; else each rank times its own shapes, and of those
// that several have the first rank's choice counts for all, so that all compute alike. Before the run's memory is taken: timing needs some.
static void choose_matmuls(Run* r) {
    const Args* a = &r->args;
    if (!device_is_gpu || a->matmul_choice == ALGORITHM_LIBRARY) { return; }
    Group* world = &r->topology.world;
    Matmul* mm = &r->model.matmul;
    if (a->matmul_cache == NULL) { r->cache = choices_path(*mm->device); }
    else if (strcmp(a->matmul_cache, "none") != 0) { r->cache = a->matmul_cache; }
    bool kept = !r->cache.empty();
    std::string text = gather_text(world, r->resumed_choices + (kept && world->rank == 0 ? choices_read(r->cache.c_str()) : ""));  // of the same shape the first counts
    int damaged = matmul_choices_read(mm, text.c_str());
    if (damaged > 0 && world->rank == 0) {
        fprintf(stderr, "train_gpt_fp8: %d line%s of %s cannot be read, and what they chose is timed again\n", damaged, damaged == 1 ? "" : "s", r->cache.c_str());
    }
    r->shapes_timed = matmul_choose(mm, 3.0, r->model.stream);
    matmul_choices_write(mm, &text);
    text = gather_text(world, text);
    matmul_choices_read(mm, text.c_str());
    matmul_choices_count(mm, &r->shapes, &r->shapes_not_first);
    if (kept && r->world.local_rank == 0 && !choices_save(r->cache.c_str(), *mm->choices) && world->rank == 0) {
        fprintf(stderr, "train_gpt_fp8: %s cannot be written: %s; the next start times again\n", r->cache.c_str(), strerror(errno));
    }
}

// The memory of the ranks that take most and least
static void compare_memory(Run* r) {
    Group* world = &r->topology.world;
    size_t bytes = sizeof(r->memory.bytes);
    size_t(*all)[MEMORY_CATEGORIES] = (size_t(*)[MEMORY_CATEGORIES])host_alloc(bytes * (size_t)world->size);
    host_all_gather(world, all, r->memory.bytes, bytes);
    auto total = [=](int i) { return std::accumulate(all[i], all[i] + MEMORY_CATEGORIES, (size_t)0); };
    int most = 0, least = 0;
    for (int i = 1; i < world->size; i++) {
        most = total(i) > total(most) ? i : most;
        least = total(i) < total(least) ? i : least;
    }
    memcpy(r->fullest, all[most], bytes);
    memcpy(r->emptiest, all[least], bytes);
    free(all);
}

static std::string flag_text(const Option* o) {
    char value[320];
    option_value_text(value, sizeof(value), o);
    const char* whole = o->type == OPTION_STRING ? *(const char* const*)o->value : value;
    return whole != NULL ? whole : "none";
}

// name=value lines of everything that must be the same on all ranks
static void settings_text(const Run* r, char* text, size_t size) {
    size_t n = 0;
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* o = &r->table.options.items[i];
        if (o->type == OPTION_GROUP) { continue; }
        n += (size_t)snprintf(text + n, n < size ? size - n : 0, "%s=%s\n", o->name, flag_text(o).c_str());
        if (n >= size) { bad_input("the flags are longer than %zu bytes together; a glob pattern names many files in few", size); }
    }
}

// What the settings came to on this rank, a line each: the same flags may find other files on another node
static void resolved_text(const Run* r, char* text, size_t size) {
    const GptConfig* c = &r->config;
    snprintf(text, size, "device=%s\nmodel=%d layers, %d heads, width %d, vocabulary %d, %d positions\ntrain-files=%d\ntrain-windows=%" PRId64
        "\nval-windows=%" PRId64 "\ntrain-tokens=%016" PRIx64 "\nsteps=%" PRId64 "\n", device_kind, c->layers, c->heads, c->width, c->vocab, c->positions, r->has_train ? r->train.file_count : 0,
        r->has_train ? loader_windows(&r->train) : 0, r->has_val ? loader_windows(&r->val) : 0, r->fingerprint, r->steps);
    for (const ChoiceSet& e : r->evals) {
        size_t n = strlen(text);
        snprintf(text + n, size - n, "eval=%s, %zu examples, %016" PRIx64 "\n", e.name.c_str(), e.examples.size(), e.fingerprint);
    }
}

// ---- what people see ----

// Has the option no meaning beside the others?
static bool is_unused(const Run* r, const Option* o) {
    const GptConfig* c = &r->config;
    const Args* a = &r->args;
    bool sent = r->topology.data.size > 1, ring = is_fp8(c->wire) && c->reduction.algorithm == REDUCE_RING;
    if (o->value == &a->grad_dtype || o->value == &a->grad_reduce || o->value == &a->zero) { return !sent; }
    if (o->value == &a->zero_split) { return !sent || a->zero == 0; }
    if (o->value == &a->matmul_choice) { return !r->on_gpu; }
    if (o->value == &a->matmul_cache) { return !r->on_gpu || a->matmul_choice == ALGORITHM_LIBRARY; }
    if (o->value == &a->export_dtype) { return a->export_hf == NULL && a->export_llmc == NULL; }
    return (o->value == &a->grad_scaling && !(sent && ring)) || (o->value == &a->grad_accum_rounding && c->accum == FP32);
}

static bool is_for_plans(const Run* r, const Option* o) {
    const Args* a = &r->args;
    const void* const values[] = {&a->plan, &a->json, &a->kernels, &a->world, &a->gpu};
    return std::find(std::begin(values), std::end(values), o->value) != std::end(values) || (o->type == OPTION_GROUP && strcmp(o->name, "Planning") == 0);
}

static void print_settings(const Run* r) {
    static Table t;
    t.count = 0;
    const GptConfig* c = &r->config;
    char device[128], transport[128];
    device_name(device, sizeof(device));
    const RankLayout* y = &r->topology.layout;
    group_describe(&r->topology.world, transport, sizeof(transport));
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* o = &r->table.options.items[i];
        if (is_for_plans(r, o)) { continue; }
        if (o->type == OPTION_GROUP) { table_heading(&t, o->name); continue; }
        char value[320];
        option_value_text(value, sizeof(value), o);
        if (o->value == &r->args.vocab) { snprintf(value, sizeof(value), "%d, padded to %d", c->vocab, c->padded_vocab); }
        if (o->value == &r->args.steps) { snprintf(value, sizeof(value), "%" PRId64, r->steps); }
        if (o->value == &r->args.warmup) { snprintf(value, sizeof(value), "%" PRId64, r->warmup); }
        if (is_unused(r, o)) { snprintf(value, sizeof(value), "none needed"); }
        table_add(&t, o->name, "%s", value);
    }
    table_heading(&t, "This run");
    table_add(&t, "device", "%s (%s)", device, device_kind);
    if (r->peak_flops > 0.0) { table_add(&t, "peak for mfu", "%.0f TFLOP/s, %s", 1e-12 * r->peak_flops, r->peak_name); }
    if (r->shapes > 0) {
        table_add(&t, "matmul algorithms", "of %d shapes, %d not the library's first; %d timed now; %s", r->shapes, r->shapes_not_first, r->shapes_timed,
            r->cache.empty() ? "not kept" : r->cache.c_str());
    }
    table_add(&t, "ranks", "%d, %s", r->topology.world.size, transport);
    if (y->tp * y->pp > 1) { table_add(&t, "topology", "dp %d × pp %d × tp %d", y->dp, y->pp, y->tp); }
#ifdef _OPENMP
    table_add(&t, "threads a rank", "%d", omp_get_max_threads());
#endif
    table_add(&t, "parameters", "%s", text_count((double)r->parameters).s);
    if (!r->has_train) { table_add(&t, "data", "none to train on"); }
    else { table_add(&t, "data", "%s tokens an epoch (%s), %.2f epochs", text_count((double)loader_tokens(&r->train)).s, loader_kind_name(&r->train),
              (double)r->steps * (double)r->args.global_batch / (double)loader_tokens(&r->train)); }
    table_add(&t, y->tp * y->pp > 1 ? "micro-batches a replica" : "micro-batches a rank", "%d", r->micro_batches);
    log_table(stdout, "settings", t.rows, t.count);
    MemoryRow rows[MEMORY_CATEGORIES];
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { rows[i] = MemoryRow{memory_names[i], (int64_t)r->fullest[i], (int64_t)r->emptiest[i]}; }
    bool alike = memcmp(r->fullest, r->emptiest, sizeof(r->fullest)) == 0;
    log_memory_table(stdout, alike ? "memory of a rank, as allocated" : "memory of the fullest rank, as allocated, and of the emptiest", rows, MEMORY_CATEGORIES);
}

static json_object* memory_json(const size_t* bytes) {
    json_object* mem = json_object_new_object();
    for (int i = 0; i < MEMORY_CATEGORIES; i++) { add_int(mem, memory_names[i], (int64_t)bytes[i]); }
    return mem;
}

static void log_settings(Run* r) {
    json_object* config = json_object_new_object();
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* o = &r->table.options.items[i];
        if (o->type == OPTION_GROUP || is_for_plans(r, o)) { continue; }
        char value[320];
        option_value_text(value, sizeof(value), o);
        if (is_unused(r, o)) { json_object_object_add(config, o->name, NULL); }
        else if (o->type == OPTION_INT) { add_int(config, o->name, *(const int64_t*)o->value); }
        else if (o->type == OPTION_DOUBLE) { add_double(config, o->name, *(const double*)o->value); }
        else if (o->type == OPTION_FLAG) { json_object_object_add(config, o->name, json_object_new_boolean(*(const bool*)o->value)); }
        else if (o->type == OPTION_STRING && *(const char* const*)o->value != NULL) { add_string(config, o->name, *(const char* const*)o->value); }
        else { add_string(config, o->name, value); }
    }
    add_int(config, "vocab", r->config.vocab);
    add_int(config, "steps", r->steps);
    add_int(config, "warmup", r->warmup);
    add_int(config, "ranks", r->topology.world.size);
    add_int(config, "dp", r->topology.layout.dp);
    add_int(config, "parameters", r->parameters);
    add_string(config, "device", device_kind);
    add_double(config, "peak_flops", r->peak_flops > 0.0 ? r->peak_flops : NAN);
    json_object_object_add(config, "mem_min", memory_json(r->emptiest));
    json_object* line = json_object_new_object();
    json_object_object_add(line, "config", config);
    log_line(&r->log, line);
}

// What FP8 did to the gradients of one tensor
struct TensorRow { char name[sizeof(Param::name)]; double elements; TensorStatistics of; };  // elements: of the whole tensor

// Of all stages' tensors whose gradients travel in FP8; all of a pipeline together
static std::vector<TensorRow> gather_statistics(const Model* m) {
    Group* pipe = &m->topology->pipe;
    std::vector<TensorRow> mine, rows, all;
    for (int i = 0; i < m->params.count; i++) {
        const Param* p = &m->params.items[i];
        if (!is_fp8(p->wire) || !p->counted) { continue; }
        TensorRow row = {{}, (double)whole_count(p), m->statistics[i]};
        memcpy(row.name, p->name, sizeof(row.name));
        mine.push_back(row);
    }
    std::vector<uint64_t> counts((size_t)pipe->size);
    uint64_t count = mine.size(), most = 0;
    uint64_t before = pipe->bytes_sent[HOST_ALL_GATHER];
    host_all_gather(pipe, counts.data(), &count, sizeof(count));
    for (uint64_t n : counts) { most = max_of(most, n); }
    mine.resize(most);
    all.resize(most * counts.size());
    host_all_gather(pipe, all.data(), mine.data(), most * sizeof(TensorRow));
    pipe->bytes_sent[HOST_ALL_GATHER] = before;  // the log is no part of the step that is under way
    for (size_t stage = 0; stage < counts.size(); stage++) { rows.insert(rows.end(), &all[stage * most], &all[stage * most] + counts[stage]); }
    return rows;
}

static json_object* fp8_statistics(const std::vector<TensorRow>& rows) {
    double elements = 0.0, underflow = 0.0, saturated = 0.0;
    float least = 1.0f, most = 0.0f;
    for (const TensorRow& r : rows) {
        elements += r.elements;
        underflow += r.elements * (double)r.of.underflow;
        saturated += r.elements * (double)r.of.saturated;
        least = min_of(least, r.of.mu);
        most = max_of(most, r.of.mu);
    }
    json_object* o = json_object_new_object();
    add_double(o, "saturated", (double)(float)(saturated / elements));
    add_double(o, "underflow", (double)(float)(underflow / elements));
    add_double(o, "mu_min", (double)least);
    add_double(o, "mu_max", (double)most);
    return o;
}

static json_object* tensor_statistics(const std::vector<TensorRow>& rows) {
    json_object* all = json_object_new_object();
    for (const TensorRow& r : rows) {
        json_object* o = json_object_new_object();
        add_double(o, "saturated", (double)r.of.saturated);
        add_double(o, "underflow", (double)r.of.underflow);
        add_double(o, "mu", (double)r.of.mu);
        json_object_object_add(all, r.name, o);
    }
    return all;
}

static void show_step(Run* r, int64_t step, const StepRecord* record, double lr, double seconds, const uint64_t* sent) {
    bool not_finite = record->skipped == SKIP_NON_FINITE_LOSS || record->skipped == SKIP_NON_FINITE_NORM;
    r->skipped += record->skipped != NOT_SKIPPED;
    r->not_finite += not_finite;
    r->not_finite_in_a_row = not_finite ? r->not_finite_in_a_row + 1 : 0;
    r->skipped_in_a_row = record->skipped != NOT_SKIPPED ? r->skipped_in_a_row + 1 : 0;
    const Model* m = &r->model;
    if (r->topology.layout.replica != 0 || r->topology.layout.tp_rank != 0) { return; }
    std::vector<TensorRow> rows;
    if (sends_fp8(&m->reduction)) { rows = gather_statistics(m); }
    if (r->topology.world.rank != 0) { return; }
    double tokens_per_second = (double)r->args.global_batch / seconds;
    double mfu = r->peak_flops > 0.0 ? tokens_per_second * r->flops_per_token / (r->peak_flops * r->topology.world.size) : NAN;
    step_clock_add(&r->clock, 1e3 * seconds);
    StepLine line = {step + 1, r->steps, record->loss, record->grad_norm, lr, 1e3 * seconds, tokens_per_second, mfu,
        step_clock_eta(&r->clock, r->steps - step - 1), skip_names[record->skipped]};
    console_step(&r->console, &line);
    json_object* o = json_object_new_object();
    add_int(o, "step", step + 1);
    add_double(o, "loss", record->loss);
    add_double(o, "grad_norm", record->grad_norm);
    add_double(o, "lr", lr);
    add_int(o, "tokens", (step + 1) * r->args.global_batch);
    add_double(o, "ms", 1e3 * seconds);
    add_double(o, "tok_s", tokens_per_second);
    add_double(o, "mfu", mfu);
    json_object_object_add(o, "mem", memory_json(r->fullest));
    json_object* comm = json_object_new_object();
    for (int i = 0; i < COMM_OPERATIONS; i++) {
        if (sent[i] > 0) { add_int(comm, comm_names[i], (int64_t)sent[i]); }
    }
    json_object_object_add(o, "comm", comm);
    add_double(o, "comm_wait_ms", 1e3 * reduction_waited(&r->model.reduction, step - r->first_step));
    json_object_object_add(o, "fp8", rows.empty() ? NULL : fp8_statistics(rows));
    if (r->args.log_tensors) { json_object_object_add(o, "tensors", tensor_statistics(rows)); }
    add_double(o, "loss_z", record->loss_z);
    add_double(o, "norm_z", record->norm_z);
    if (record->skipped != NOT_SKIPPED) { add_string(o, "skipped", skip_names[record->skipped]); }
    else { json_object_object_add(o, "skipped", NULL); }
    log_line(&r->log, o);
}

// What to do about it
static std::string not_finite_advice(const Run* r, NotFiniteKind kind) {
    int64_t good = r->checkpoints.last;
    std::string back = good < 0 ? "there is no checkpoint to go back to" : "--resume goes on from step " + std::to_string(good);
    const char* formats = r->config.fp8 ? ", --bf16-layers leaves layers in BF16" : "";
    switch (kind) {
        case IN_WEIGHTS: return "no later step mends a weight: end this run; " + back + (r->has_source ? "; is the model of --init whole?" : "; then a lower --lr or a longer --warmup");
        case IN_ACTIVATIONS: return std::string("the forward pass overflows: a lower --lr or a longer --warmup keeps the model whole, --skip-loss-z 5 leaves out the steps that lead there") + formats + "; " + back;
        case IN_GRADIENTS: return std::string("the loss is finite, and its gradient overflows: a lower --lr or a longer --warmup, --skip-grad-z 5") + (is_fp8(r->config.wire) ? ", --grad-dtype bf16" : "") + formats + "; " + back;
        default: return "neither weights, nor the activations of its batch, nor gradients show it now: one such step does no harm; if they come back, a lower --lr; " + back;
    }
}

// After a step with a loss or gradient that was not finite: names the first tensor that is to blame. All ranks. `begin`: of the step's batch
static void name_not_finite(Run* r, int64_t step, const LoaderPosition* begin) {
    NotFinite found = find_not_finite(&r->model, &r->train, begin, &r->batches[0], r->micro_batches);
    r->searches++;
    r->to_blame = found.kind == IN_NOTHING ? "" : std::string(found.name) + ", at step " + std::to_string(step + 1);
    if (r->topology.world.rank != 0) { return; }
    console_print(&r->console, "step %" PRId64 "/%" PRId64 " | %s%s; %s", step + 1, r->steps, found.kind == IN_NOTHING ? "not finite" : "the first tensor that is not finite is ", found.name,
        not_finite_advice(r, (NotFiniteKind)found.kind).c_str());
    json_object* o = json_object_new_object();
    add_int(o, "step", step + 1);
    add_string(o, "not_finite", found.name);
    log_line(&r->log, o);
}

static void validate(Run* r, int64_t step) {
    double loss = evaluate(&r->model, &r->val, &r->batches[0], r->args.val_batches);
    if (r->topology.world.rank != 0) { return; }
    console_print(&r->console, "step %" PRId64 "/%" PRId64 " | val loss %.4f | perplexity %.4g", step, r->steps, loss, exp(loss));
    json_object* o = json_object_new_object();
    add_int(o, "step", step);
    add_double(o, "val_loss", loss);
    add_double(o, "perplexity", exp(loss));
    log_line(&r->log, o);
}

static void score_evals(Run* r, int64_t step) {
    for (const ChoiceSet& e : r->evals) {
        ChoiceCounts right = evaluate_choices(&r->model, &e, &r->batches[0]);
        if (r->topology.world.rank != 0) { continue; }
        double examples = (double)e.examples.size(), acc = (double)right.by_sum / examples, acc_norm = (double)right.by_mean / examples;
        console_print(&r->console, "step %" PRId64 "/%" PRId64 " | eval %s | acc %.4f | acc_norm %.4f | %zu examples", step, r->steps, e.name.c_str(), acc, acc_norm,
            e.examples.size());
        json_object* o = json_object_new_object();
        add_int(o, "step", step);
        add_string(o, "eval", e.name.c_str());
        add_double(o, "acc", acc);
        add_double(o, "acc_norm", acc_norm);
        add_int(o, "examples", (int64_t)e.examples.size());
        log_line(&r->log, o);
    }
}

// Of contexts that had to be cut: once
static void note_cut_contexts(const Run* r) {
    for (const ChoiceSet& e : r->evals) {
        if (e.cut == 0) { continue; }
        printf("note: of the %zu examples of %s %" PRId64 " are longer than --seq-len %d and lose the beginning of their context\n", e.examples.size(), e.path.c_str(),
            e.cut, r->config.T);
    }
}

// Tokens as people read them: bytes, or by --tokenizer, or as numbers
static std::string tokens_text(const Run* r, const int* tokens, int count) {
    std::string text;
    if (r->has_tokenizer) { return tokenizer_decode(&r->tokenizer, tokens, count); }
    for (int i = 0; i < count; i++) {
        if (r->tokens != LOADER_TEXT) { text += (i > 0 ? " " : "") + std::to_string(tokens[i]); }
        else { text += tokens[i] < 256 ? (char)tokens[i] : '?'; }
    }
    return text;
}

// `given` tokens and what the model makes of them, up to `length`
static std::vector<int> generate_tokens(Run* r, const std::vector<int>& given, int64_t length, uint64_t seed) {
    const Args* a = &r->args;
    Generation g = {Sampling{a->temperature, a->top_k, a->top_p}, seed, true};
    std::vector<int> tokens = given;
    tokens.resize(given.size() + (size_t)length);
    generate(&r->model, tokens.data(), (int)given.size(), (int)tokens.size(), &g);
    return tokens;
}

// Of --sample-every
static void show_sample(Run* r, int64_t step) {
    if (r->topology.layout.replica != 0) { return; }
    int n = (int)r->args.sample_len;
    std::vector<int> tokens = generate_tokens(r, r->prompt, n, r->config.seed + (uint64_t)step);
    if (r->topology.world.rank != 0) { return; }
    console_print(&r->console, "step %" PRId64 "/%" PRId64 " | sample of %d tokens:", step, r->steps, n);
    printf("%s\n", printable_text(tokens_text(r, tokens.data() + r->prompt.size(), n)).c_str());
    fflush(stdout);
}

// Of --generate
static void show_generated(Run* r) {
    const Args* a = &r->args;
    if (r->topology.layout.replica != 0) { return; }
    int n = (int)a->generate, given = (int)r->prompt.size();
    for (int64_t i = 0; i < a->samples; i++) {
        double start = wall_seconds();
        std::vector<int> tokens = generate_tokens(r, r->prompt, n, mix64(r->config.seed ^ 0x67656e6572617465ull) + (uint64_t)i);
        double seconds = wall_seconds() - start;
        if (r->topology.world.rank != 0) { continue; }
        console_print(&r->console, "sample %" PRId64 "/%" PRId64 " | %d tokens after a prompt of %d | %s tok/s", i + 1, a->samples, n, given, text_count(n / seconds).s);
        std::string text = tokens_text(r, tokens.data(), given + n);
        printf("%s\n", printable_text(text).c_str());
        fflush(stdout);
        json_object *o = json_object_new_object(), *list = json_object_new_array();
        for (int k = given; k < given + n; k++) { json_object_array_add(list, json_object_new_int(tokens[(size_t)k])); }
        add_int(o, "sample", i + 1);
        add_int(o, "prompt_tokens", given);
        json_object_object_add(o, "tokens", list);
        add_double(o, "tok_s", n / seconds);
        json_object_object_add(o, "text", json_object_new_string_len(text.data(), (int)text.size()));
        log_line(&r->log, o);
    }
}

// One line a linear layer that FP8 is expected to slow down on this GPU; none where the GPU is not known
static void note_slow_fp8(const Run* r, FILE* file, const Gpu* g) {
    const GptConfig* c = &r->config;
    if (g == NULL || !c->fp8) { return; }
    int rows = c->B * c->T, C = c->width, tp = c->layout.tp;
    const struct { const char* name; int in, out, in_ranks, out_ranks; bool cast_apart; } linears[LINEARS] = {
        {"qkv", C, 3 * C, 1, tp, false}, {"attproj", C, C, tp, 1, true}, {"fc", C, 4 * C, 1, tp, false}, {"fcproj", 4 * C, C, tp, 1, false}};
    for (auto& l : linears) {
        bool used = false;
        for (int number = 0; number < c->layers; number++) { used |= matrix_in_fp8(c, number, l.out, l.in); }
        int in = l.in / l.in_ranks, out = l.out / l.out_ranks;
        double gain = used ? fp8_gain(g, rows, in, out, l.cast_apart) : 1.0;
        if (gain >= 1.0) { continue; }
        int64_t size = (int64_t)sqrt((double)l.in * l.out) + 1;  // the least that leaves it out
        fprintf(file, "note: on %s FP8 is expected to be slower than BF16 (%.2fx) in the linear layers %s, %d -> %d at %d tokens%s; --fp8-min-size %" PRId64
                " leaves them in BF16\n", g->device, gain, l.name, in, out, rows, tp > 1 ? " on a rank" : "", size);
    }
}

// ---- planning: the allocation and the matmuls of a step, dry, for every rank of a topology ----

// Frees what a dry run has taken of the host
static void model_forget(Model* m) {
    reduction_forget(&m->reduction);
    free(m->kept);
}

// r->model becomes that of one rank, of which nothing but its sizes exists. `matmuls` are those of the planned device
static void dry_run(Run* r, Matmul* matmuls, int stage, int replica, int64_t micro_batch, Memory* memory) {
    GptConfig c = r->config;
    c.B = (int)micro_batch;
    c.layout.stage = stage;
    c.layout.replica = replica;
    c.in_flight = schedule_in_flight(c.layout.pp, stage, r->micro_batches);
    r->topology.data.rank = replica;
    *memory = Memory{};
    model_describe(&r->model, &c, &r->topology);
    r->model.matmul = *matmuls;
    r->model.matmul.planned = 0;
    model_allocate(&r->model, memory);
}

// The parameters of the whole model
static int64_t count_parameters(Run* r) {
    GptConfig whole = r->config;
    Topology alone = {};
    each_group(&alone, [](Group* g, int) { g->size = 1; });
    whole.layout = RankLayout{};
    whole.in_flight = 1;
    model_describe(&r->model, &whole, &alone);
    int64_t n = params_total(&r->model.params);
    model_forget(&r->model);
    return n;
}

// What a rank of tp sends the others for one micro-batch, by operation
static void tensor_traffic(uint64_t* bytes, const Model* m) {
    const GptConfig* c = &m->config;
    uint64_t act = (uint64_t)dtype_bytes(c->act), tp = (uint64_t)c->layout.tp, rows = (uint64_t)rows_of(m), own = rows / tp, sent = own * (uint64_t)c->width * (tp - 1);
    uint64_t amax = 2 * sizeof(float) * (tp - 1) / tp;  // of a scale made just in time
    for (int l = 0; l < stage_layers(c); l++) {
        const Layer* y = &m->layers[l];
        for (const Param* w : {y->qkvw, y->fcw}) {  // X comes from all ranks, dX goes to all
            bool fp8 = in_fp8(w), dx_fp8 = fp8 && c->dx_fp8;
            uint64_t x = (uint64_t)dtype_bytes(x_type(c, w));
            bytes[TP_X] += x * sent;
            bytes[TP_X_AGAIN] += x * sent;
            bytes[TP_DX] += (dx_fp8 ? 1 : act) * sent;
            bytes[TP_SCALES] += dx_fp8 ? own * (row_stride(c->width) - (uint64_t)c->width) * (tp - 1) : 0;
            bytes[TP_SCALES] += fp8 && c->scaling == SCALING_CURRENT ? 2 * amax : 0;
        }
        for (const Param* w : {y->projw, y->fcprojw}) {  // dY comes from all, Y goes to all
            bool fp8 = in_fp8(w);
            uint64_t dy = fp8 ? (uint64_t)dtype_bytes(c->dy_wire) : act;
            bytes[TP_Y] += act * sent;
            bytes[TP_DY] += dy * sent;
            bytes[TP_SCALES] += fp8 && c->scaling == SCALING_CURRENT ? (dy == 1 ? 2 : 1) * amax : 0;  // not of dY gathered before it is made FP8
        }
    }
    if (is_first_stage(c)) { bytes[TP_OTHER] += 2 * act * sent; }  // embedding: rows forward, their gradients backward
    if (is_last_stage(c)) { bytes[TP_OTHER] += 2 * act * sent + 3 * sizeof(float) * rows * (tp - 1); }  // head; maxima, sums and targets of the loss
}

static void rank_traffic(const Model* m, int micro_batches, PlanTraffic* t) {
    const GptConfig* c = &m->config;
    uint64_t K = (uint64_t)micro_batches, tensor[COMM_OPERATIONS] = {};
    *t = PlanTraffic{};
    reduction_traffic(t->operations, &m->reduction, micro_batches);
    tensor_traffic(tensor, m);
    for (int i = 0; i < COMM_OPERATIONS; i++) { t->operations[i] += K * tensor[i]; }
    uint64_t neighbours = !is_first_stage(c) + !is_last_stage(c);
    t->operations[PIPELINE] = K * neighbours * (uint64_t)own_rows_of(c, c->B) * (uint64_t)c->width * (uint64_t)dtype_bytes(c->act);
    if (c->tied && neighbours == 1) { t->operations[PIPELINE] += param_elements(m->wte) * (uint64_t)dtype_bytes(m->wte->accum); }  // between first and last stage
    plan_sort_traffic(t);
}

// f(Work, forward, backward) for every kernel of a micro-batch on a GPU; `forward`, `backward`: how often in these passes
template <class F> static void each_work(const Model* m, const Gpu* g, F f) {
    const GptConfig* c = &m->config;
    each_matmul(m, [&](MatmulCall call, int64_t forward, int64_t backward, const char* name) {
        each_matmul_work(g, &call, name, [&](Work w) { f(w, (double)forward, (double)backward); });
    });
    double act = dtype_bytes(c->act), rows = rows_of(m), own = rows / c->layout.tp * c->width, inner = rows * c->width / c->layout.tp;
    auto bytes = [&](const char* name, double n, double forward, double backward) { f(Work{name, false, 0.0, n}, forward, backward); };
    for (int l = 0; l < stage_layers(c); l++) {
        const Layer* y = &m->layers[l];
        bool blocks = by_block(c);
        // X is written by channels, and by tokens where those are kept
        auto x = [=](const Param* w, bool kept) { return (double)dtype_bytes(x_type(c, w)) * (blocks && kept && in_fp8(w) ? 2.0 : 1.0); };
        double copies = turned_ld(m) > 0 || blocks ? 2.0 : 1.0;  // dY is written transposed too
        auto dy = [=](const Param* w) { return in_fp8(w) ? copies * dtype_bytes(c->fp8_bwd) : 0.0; };  // written beside the sums for the bias
        for (const Param* w : {y->qkvw, y->fcw}) {
            double before = blocks && in_fp8(w) ? 2.0 * act : 0.0;  // written before its blocks are known, and read
            bytes("LayerNorm, residual added", (3.0 * act + before + x(w, c->recompute < 2)) * own, 1.0, 0.0);
            bytes("LayerNorm again", (act + x(w, false)) * own, 0.0, c->recompute >= 2 ? 1.0 : 0.0);
            bytes("LayerNorm backward", 4.0 * act * own, 0.0, 1.0);
        }
        bytes("GELU", (act + x(y->fcprojw, c->recompute < 1)) * 4.0 * inner, 1.0, 0.0);
        bytes("GELU again", (act + x(y->fcprojw, false)) * 4.0 * inner, 0.0, c->recompute >= 1 ? 1.0 : 0.0);
        bytes("GELU backward", (2.0 * act + (in_fp8(y->fcw) ? dy(y->fcw) : act)) * 4.0 * inner, 0.0, 1.0);
        for (const Param* w : {y->projw, y->fcprojw}) { bytes("dY cast, its columns added", (act + dy(w)) * own, 0.0, 1.0); }
        bytes("dY cast, its columns added", (act + dy(y->qkvw)) * 3.0 * inner, 0.0, 1.0);
        if (in_fp8(y->projw)) { bytes("attention's output cast", (act + x(y->projw, !m->attention.flash)) * inner, 1.0, m->attention.flash ? 1.0 : 0.0); }
    }
    double layers = stage_layers(c), scores = (double)m->attention.heads * rows * c->T / 2.0;
    if (c->rope) { bytes("rotation", 4.0 * act * inner, layers, m->attention.flash ? 0.0 : layers); }
    if (m->attention.flash) {  // backward: scores and dP twice, dV, dK, dQ
        double product = 2.0 * scores * m->attention.head_size;
        f(Work{"attention", false, 2.0 * product, 4.0 * act * inner}, layers, 0.0);
        f(Work{"attention backward", false, 7.0 * product, 12.0 * act * inner}, 0.0, layers);
    } else {
        bytes("softmax", scores * (4.0 + act), layers, 0.0);
        bytes("softmax backward", scores * (8.0 + 2.0 * act), 0.0, layers);
        bytes("attention's gradient stored", (4.0 + act) * 3.0 * inner, 0.0, layers);
    }
    for (int i = 0; i < m->params.count; i++) {  // weight gradients that the matmul does not add up itself
        const Param* p = &m->params.items[i];
        if (p->format_class == MATRIX && !matmul_adds(m, p)) { bytes("weight gradient added", (act + 2.0 * dtype_bytes(p->accum)) * (double)param_elements(p), 0.0, 1.0); }
    }
    if (is_first_stage(c)) { bytes("embedding", 2.0 * act * own, 1.0, 1.0); }
    if (is_last_stage(c)) {
        bytes("loss", 3.0 * act * rows * c->padded_vocab / c->layout.tp, 1.0, 0.0);
        bytes("LayerNorm, residual added", 4.0 * act * own, 1.0, 0.0);
        bytes("LayerNorm backward", 3.0 * act * own, 0.0, 1.0);
    }
}

static double optimizer_seconds(const Model* m, const Gpu* g) {
    Traffic adamw = optimizer_traffic(&m->optimizer, &m->params);
    return bytes_seconds(g, 2.0 * adamw.updated + adamw.read + adamw.written);
}

static StageTimes stage_times(const Model* m, const Gpu* g, const PlanTraffic* t, int micro_batches) {
    const RankLayout* y = &m->config.layout;
    StageTimes s = {};
    each_work(m, g, [&](Work w, double forward, double backward) {
        s.forward += forward * work_seconds(g, &w);
        s.backward += backward * work_seconds(g, &w);
    });
    uint64_t tensor[COMM_OPERATIONS] = {};
    tensor_traffic(tensor, m);
    s.forward += sent_seconds(g, (double)(tensor[TP_X] + tensor[TP_Y] + tensor[TP_OTHER] / 2), y->tp, 1, false);
    s.backward += sent_seconds(g, (double)(tensor[TP_X_AGAIN] + tensor[TP_DY] + tensor[TP_DX] + tensor[TP_OTHER] / 2), y->tp, 1, false);
    int apart = y->tp * y->pp;  // replicas are the furthest apart
    double exchanged = (double)(t->operations[ALL_TO_ALL] + t->operations[REGROUP]);
    s.reduction = sent_seconds(g, t->gradients - exchanged, y->dp, apart, false) + sent_seconds(g, exchanged, y->dp, apart, true);
    s.reductions = reduces_each(&m->reduction) ? micro_batches : 1;
    s.weights = sent_seconds(g, t->weights, y->dp, apart, false);
    s.optimizer = optimizer_seconds(m, g);
    return s;
}

// The largest micro-batch with which every rank fits; fullest: the replica that takes most, by stage
static int64_t largest_micro_batch(Run* r, Matmul* matmuls, const std::vector<int>& fullest, double limit) {
    int64_t T = r->config.T, unit = 1, most = min_of(INT32_MAX / 4 / T, MAX_MICRO_BATCH);
    while ((r->on_gpu && r->config.fp8 && unit * T % 16 != 0)) { unit++; }
    auto fits = [&](int64_t units) {
        bool all = units * unit <= most;
        for (size_t s = 0; all && s < fullest.size(); s++) {
            Memory memory;
            dry_run(r, matmuls, (int)s, fullest[s], units * unit, &memory);
            all = (double)memory_total(&memory) <= limit;
            model_forget(&r->model);
        }
        return all;
    };
    int64_t low = 0, high = 1;
    while (fits(high)) { low = high; high *= 2; }
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        (fits(middle) ? low : high) = middle;
    }
    return low * unit;
}

static void plan_side(Run* r, Matmul* matmuls, const Plan* p, PlanSide* side) {
    std::vector<StageTimes> times;
    std::vector<int> fullest;  // replica, by stage
    uint64_t most = 0, least = UINT64_MAX;
    for (int stage = 0; stage < p->pp; stage++) {
        size_t most_of_stage = 0;
        fullest.push_back(0);
        for (int replica = 0; replica < p->dp; replica++) {  // the ranks of tp take as much as each other
            Memory memory;
            dry_run(r, matmuls, stage, replica, p->micro_batch, &memory);
            size_t total = memory_total(&memory);
            if (total > most_of_stage) { most_of_stage = total; fullest[(size_t)stage] = replica; }
            auto keep = [&](uint64_t* kept) {
                for (int i = 0; i < MEMORY_CATEGORIES; i++) { kept[i] = memory.bytes[i]; }
            };
            if (total > most) { most = total; keep(side->memory); }
            if (total < least) { least = total; keep(side->memory_min); }
            PlanTraffic traffic;
            rank_traffic(&r->model, r->micro_batches, &traffic);
            plan_keep_most(&side->traffic, &traffic);
            if (replica == 0 && p->gpu != NULL) { times.push_back(stage_times(&r->model, p->gpu, &traffic, r->micro_batches)); }
            if (replica == 0 && stage == 0 && p->kernels) {
                each_work(&r->model, p->gpu, [&](Work w, double forward, double backward) { work_add(&side->work, p->gpu, &w, forward + backward); });
                Traffic adamw = optimizer_traffic(&r->model.optimizer, &r->model.params);
                Work optimizer = {"optimizer, of each of a step's", false, 0.0, (2.0 * adamw.updated + adamw.read + adamw.written) / r->micro_batches};
                work_add(&side->work, p->gpu, &optimizer, 1.0);
            }
            uint64_t tensor[COMM_OPERATIONS] = {};
            tensor_traffic(tensor, &r->model);
            side->table7 = max_of(side->table7, (double)(tensor[TP_X] + tensor[TP_X_AGAIN] + tensor[TP_DX]));
            model_forget(&r->model);
        }
    }
    side->times.step = NAN;
    if (p->gpu != NULL && r->config.act != FP32) { side->times = plan_times(times, r->micro_batches); }
    side->largest_micro_batch = largest_micro_batch(r, matmuls, fullest, p->memory_limit);
}

// The settings become those of the baseline: of what is about precision and memory only BF16 with nothing computed twice
static void set_baseline(Run* r) {
    Args fresh;
    bool here = false;
    for (int i = 0; i < r->table.options.count; i++) {
        Option* o = &r->table.items[i];
        if (o->type == OPTION_GROUP) { here = o->name == precision_group; continue; }
        if (!here) { continue; }
        o->given = false;
        size_t bytes = o->type == OPTION_CHOICE ? sizeof(int) : o->type == OPTION_FLAG ? sizeof(bool) : o->type == OPTION_CUSTOM ? sizeof(Bf16Layers) : sizeof(int64_t);
        memcpy(o->value, (const char*)&fresh + ((const char*)o->value - (const char*)&r->args), bytes);
    }
    r->args.recipe = RECIPE_BF16;
    r->args.recompute = 0;
}

static void resolve_planned(Run* r) {
    resolve_model(r);
    if (r->has_source) { weight_source_close(&r->source); }
    resolve_vocabulary(r, r->args.vocab > 0 ? r->args.vocab : 50257);
    if (r->args.train_data != NULL) {
        open_data(r);
        close_data(r);
    }
    resolve_global_batch(r);
}

static void make_plan(Run* r) {
    if (process.rank != 0) { return; }
    const Args* a = &r->args;
    Plan p = {};
    p.gpu = gpu_of(a->gpu);
    p.world = (int)a->world;
    p.dp = r->topology.layout.dp;
    p.kernels = a->kernels;
    p.pp = r->topology.layout.pp;
    p.tp = r->topology.layout.tp;
    resolve_planned(r);
    char model[64], recipe[64];
    snprintf(model, sizeof(model), "%d layers × %d", r->config.layers, r->config.width);
    option_value_text(recipe, sizeof(recipe), option_of(&r->table.options, &a->recipe));
    p.model = a->init != NULL ? a->init : model;
    p.asked.recipe = recipe;
    p.baseline.recipe = "bf16";
    p.micro_batch = a->micro_batch;
    p.seq_len = a->seq_len;
    p.micro_batches = r->micro_batches;
    p.flops = flops_of_token(&r->config) * (double)a->global_batch;
    p.memory_limit = p.gpu != NULL ? p.gpu->memory - GPU_RESERVED : (double)device_memory_free(p.world);
    Matmul matmuls;
    if (p.gpu != NULL) {
        matmul_imagine(&matmuls, p.gpu->capability);
    } else {
#ifdef _OPENMP
        cpu_set_t cores;
        r->world.cores = max_of(allowed_cores(&cores) / p.world, 1);  // a node's, as its ranks will share them
        omp_set_num_threads(threads_per_rank(&r->world));
#endif
        matmul_create(&matmuls);
    }
    p.parameters = count_parameters(r);
    p.vocab = r->config.vocab;
    plan_side(r, &matmuls, &p, &p.asked);
    GptConfig asked = r->config;
    set_baseline(r);
    resolve_planned(r);
    plan_side(r, &matmuls, &p, &p.baseline);
    matmul_destroy(&matmuls);
    if (a->json) {
        plan_print_json(stdout, &p);
    } else {
        plan_print(stdout, &p);
        r->config = asked;
        note_slow_fp8(r, stdout, p.gpu);
    }
    if (fflush(stdout) != 0) { die("--plan: cannot write: %s", strerror(errno)); }
}

// ---- a run that does not fit: flags that would ----

static bool* given_of(Run* r, const void* value) { return &r->table.items[option_of(&r->table.options, value) - r->table.options.items].given; }

// The settings of the run for dry runs of other ones, of the same model and data
static void imagine_run(Run* p, const Run* r) {
    option_table(&p->table, &p->args);
    for (int i = 0; i < r->table.options.count; i++) { p->table.items[i].given = r->table.items[i].given; }
    Args* a = &p->args;
    for (const void* known : {(const void*)&a->layers, (const void*)&a->heads, (const void*)&a->width, (const void*)&a->position, (const void*)&a->global_batch}) { *given_of(p, known) = true; }
    p->on_gpu = r->on_gpu;
}

// Bytes of the fullest rank; where one has more than `limit`, that one's
static size_t dry_bytes(Run* p, const Run* r, Matmul* matmuls, size_t limit) {
    const Args* a = &p->args;
    Topology* t = &p->topology;
    int dp = r->topology.layout.dp;
    *t = Topology{};
    t->layout = layout_of(0, dp * (int)(a->tp * a->pp), (int)a->tp, (int)a->pp);
    each_group(t, [=](Group* g, int size) {
        g->size = size;
        g->transport = size == 1 ? ALONE : r->topology.world.transport != ALONE ? r->topology.world.transport : device_is_gpu ? OVER_NCCL : OVER_MPI;
    });
    resolve_model(p);
    resolve_vocabulary(p, r->config.vocab);
    p->config.positions = max_of(r->config.positions, p->config.T);
    resolve_global_batch(p);
    size_t most = 0;
    for (int stage = 0; stage < a->pp; stage++) {
        for (int replica = 0; replica < dp && most <= limit; replica++) {
            Memory memory;
            dry_run(p, matmuls, stage, replica, a->micro_batch, &memory);
            most = max_of(most, memory_total(&memory));
            model_forget(&p->model);
        }
    }
    return most;
}

struct Candidate {        // flags that may fit
    int64_t tp, pp;
    bool narrow;          // FP8 where the recipe has none, else gradients added up in it
    int64_t zero, micro_batch, recompute;
};

// Does the recipe leave room for narrower formats, and has the user not said which?
static bool may_narrow(const Run* r) {
    const Options* o = &r->table.options;
    const Args* a = &r->args;
    if (r->config.fp8) { return is_fp8(r->config.wire) && !is_fp8(r->config.accum) && !option_given(o, &a->grad_accum_rounding); }
    bool formats = false, here = false;
    for (int i = 0; i < o->count; i++) {
        const Option* x = &o->items[i];
        if (x->type == OPTION_GROUP) { here = x->name == precision_group; continue; }
        formats |= here && x->given && x->value != &a->recipe && x->value != &a->recompute;
    }
    return !formats;
}

static size_t candidate_bytes(Run* p, const Run* r, Matmul* matmuls, const Candidate* c, size_t limit) {
    Args* a = &p->args;
    bool *accum_given = given_of(p, &a->grad_accum_dtype), given = *accum_given;
    *a = r->args;
    a->init = NULL;
    a->plan = true;
    a->gpu = device_is_gpu ? GPU_H100 : GPU_NONE;
    a->tp = c->tp;
    a->pp = c->pp;
    a->zero = c->zero;
    a->micro_batch = c->micro_batch;
    a->recompute = c->recompute;
    if (c->narrow && !r->config.fp8) { a->recipe = RECIPE_FP8; }
    if (c->narrow && r->config.fp8) {
        a->grad_accum_dtype = GRAD_E4M3;
        *accum_given = true;
    }
    size_t bytes = dry_bytes(p, r, matmuls, limit);
    *accum_given = given;
    return bytes;
}

static std::string candidate_text(const Run* r, const Candidate* c, size_t bytes) {
    const Args* a = &r->args;
    std::string text = "what fits:";
    auto flag = [&](const char* name, int64_t value) { text += formatted(" --%s %" PRId64, name, value); };
    if (c->recompute != a->recompute) { flag("recompute", c->recompute); }
    if (c->micro_batch != a->micro_batch) {
        flag("micro-batch", c->micro_batch);
        if (!option_given(&r->table.options, &a->global_batch)) { flag("global-batch", a->global_batch); }  // which would shrink with it
    }
    if (c->zero != a->zero) { flag("zero", c->zero); }
    if (c->narrow) { text += r->config.fp8 ? " --grad-accum-dtype e4m3" : " --recipe fp8"; }
    if (c->tp != a->tp) { flag("tp", c->tp); }
    if (c->pp != a->pp) { flag("pp", c->pp); }
    int ranks = (int)(c->tp * c->pp) * r->topology.layout.dp;
    text += formatted(" (%.2f GiB", (double)bytes / (1 << 30));
    if (ranks != r->topology.world.size) { text += formatted(" on each of %d ranks with as much memory as this one has: %s", ranks, launch_of(r, ranks).c_str()); }
    return text + ")";
}

// The flags that fit into `limit` bytes a rank and change least, as text. In this order: --recompute 2, a smaller micro-batch of the same global batch, --zero,
// narrower formats, and more ranks to a replica.
static std::string flags_that_fit(const Run* r, size_t limit) {
    const Args* a = &r->args;
    const int64_t most_ranks = 64, dp = r->topology.layout.dp, sequences = a->global_batch / a->seq_len / dp;
    static Run p;
    imagine_run(&p, r);
    Matmul matmuls;
    if (device_is_gpu) { matmul_imagine(&matmuls, r->model.matmul.capability); }
    else { matmul_create(&matmuls); }
    Candidate c = {a->tp, a->pp, false, a->zero, a->micro_batch, a->recompute};
    auto divides = [&](int64_t n) { return a->micro_batch % n == 0 && sequences / n >= c.pp && (!r->on_gpu || !(r->config.fp8 || c.narrow) || n * a->seq_len % 16 == 0); };
    auto fits = [&](size_t* bytes) { return (*bytes = candidate_bytes(&p, r, &matmuls, &c, limit)) <= limit; };
    auto with_these_ranks = [&]() -> std::string {
        size_t bytes;
        for (int narrow = 0; narrow <= may_narrow(r); narrow++) {
            c.narrow = narrow;
            int64_t least = 1;
            while (least < a->micro_batch && !divides(least)) { least++; }
            if (!divides(least)) { continue; }
            for (int64_t zero = a->zero; zero <= (dp > 1 ? 2 : a->zero); zero++) {
                c.zero = zero;
                c.micro_batch = least;
                c.recompute = 2;
                if (!fits(&bytes)) { continue; }
                for (int64_t n = a->micro_batch; n >= least; n--) {
                    if (!divides(n)) { continue; }
                    c.micro_batch = n;
                    for (int64_t recompute : {a->recompute, (int64_t)2}) {
                        c.recompute = recompute;
                        if (fits(&bytes)) { return candidate_text(r, &c, bytes); }
                    }
                }
            }
        }
        return "";
    };
    std::string found;
    for (int64_t more = 1; more <= most_ranks && found.empty(); more *= 2) {
        for (int64_t tp = more; tp >= 1 && found.empty(); tp /= 2) {
            c.tp = a->tp * tp;
            c.pp = a->pp * (more / tp);
            bool near = c.tp <= max_of(a->tp, (int64_t)GPUS_A_NODE);  // what the ranks of a layer send each other is too much for a network
            bool shares = (c.tp == 1 || !by_block(&r->config)) && a->heads % c.tp == 0 && a->seq_len % c.tp == 0 && a->layers % c.pp == 0 && (!r->on_gpu || a->width % (16 * c.tp) == 0);
            if (near && shares) { found = with_these_ranks(); }
        }
    }
    matmul_destroy(&matmuls);
    if (!found.empty()) { return found; }
    return formatted("no --recompute, --micro-batch, --zero or %" PRId64 " times the ranks would do: a smaller model (--init, --layers, --width) or --seq-len needs less, and --plan tells how much", most_ranks);
}

// All ranks have the memory that they will take, or none begins
static void require_memory(Run* r) {
    Group* world = &r->topology.world;
    size_t mine[] = {memory_total(&r->memory), device_memory_free(r->world.ranks_per_device)};
    std::vector<size_t> all(2 * (size_t)world->size);
    host_all_gather(world, all.data(), mine, sizeof(mine));
    bool fits = true;
    size_t least = SIZE_MAX;
    for (size_t i = 0; i < all.size(); i += 2) {
        fits = fits && all[i] <= all[i + 1];
        least = min_of(least, all[i + 1]);
    }
    if (fits) { return; }
    std::string advice = gather_text(world, world->rank == 0 ? flags_that_fit(r, least) : "");  // rank 0 alone looks for it
    memory_refuse(r->fullest, least, r->world.ranks_per_device, advice.c_str());
}

// ---- saving, going on, ending ----

// What of the settings a checkpoint belongs to: a model of other ones is another model, or was fed other data
static const char* const fixed_flags[] = {"layers", "heads", "width", "position", "tie-embeddings", "seq-len", "seed", "recipe", "bf16-layers", "fp8-min-size",
    "master-dtype", "m-dtype", "v-dtype", "opt-block"};
// Those that change nothing of what is computed from here on; and --steps and --warmup, of which counts what they come to
static const char* const free_flags[] = {"train-data", "val-data", "eval-data", "init", "vocab", "tokenizer", "generate", "prompt", "samples", "temperature", "top-k", "top-p", "export-hf",
    "export-llmc", "export-dtype", "hf-tokenizer", "output-dir", "steps", "warmup", "val-every", "val-batches", "sample-every", "sample-len", "log-tensors", "profile", "checkpoint-every", "keep",
    "resume", "checkpoint-memory", "max-minutes", "max-skipped", "timeout", "matmul-cache", "plan", "json", "kernels", "world", "gpu"};

template <size_t N> static bool is_among(const char* const (&names)[N], const char* name) {
    return std::find_if(std::begin(names), std::end(names), [=](const char* n) { return strcmp(n, name) == 0; }) != std::end(names);
}

// name: text, of what a checkpoint and the run that goes on from it must agree in
static json_object* fixed_json(const Run* r) {
    json_object* o = json_object_new_object();
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* option = &r->table.options.items[i];
        if (option->type != OPTION_GROUP && is_among(fixed_flags, option->name)) { add_string(o, option->name, flag_text(option).c_str()); }
    }
    add_string(o, "vocabulary", std::to_string(r->config.vocab).c_str());
    add_string(o, "positions", std::to_string(r->config.positions).c_str());
    add_string(o, "tokens", r->has_train ? loader_kind_name(&r->train) : "none");
    return o;
}

// Likewise of what has to be the same for the run to go on bit for bit
static json_object* others_json(const Run* r) {
    json_object* o = json_object_new_object();
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* option = &r->table.options.items[i];
        bool known = option->type == OPTION_GROUP || is_among(fixed_flags, option->name) || is_among(free_flags, option->name);
        if (!known) { add_string(o, option->name, is_unused(r, option) ? "none needed" : flag_text(option).c_str()); }
    }
    char device[128];
    device_name(device, sizeof(device));
    add_string(o, "steps of the learning rate", r->args.schedule == SCHEDULE_CONSTANT ? "any" : std::to_string(r->steps).c_str());
    add_string(o, "steps of warm-up", std::to_string(r->warmup).c_str());
    add_string(o, "ranks", std::to_string(r->topology.world.size).c_str());
    add_string(o, "device", device);
    add_string(o, "matmul library", r->model.matmul.device->c_str());
#ifdef _OPENMP
    if (!device_is_gpu) { add_string(o, "threads", std::to_string(omp_get_max_threads()).c_str()); }
#endif
    return o;
}

// "width 64 -> 128, …" of the texts that differ: there -> here; "": none
static std::string differences(json_object* there, json_object* here) {
    std::string text;
    json_object_object_foreach(here, name, value) {
        json_object* old = NULL;
        json_object_object_get_ex(there, name, &old);
        const char *before = old != NULL ? json_object_get_string(old) : "not there", *now = json_object_get_string(value);
        if (strcmp(before, now) != 0) { text += (text.empty() ? "" : ", ") + std::string(name) + " " + before + " -> " + now; }
    }
    return text;
}

static std::string json_pages(json_object* o) {
    std::string text = json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE);
    json_object_put(o);
    return text + "\n";
}

// config.json of a checkpoint after so many steps
static std::string checkpoint_config(Run* r, int64_t step) {
    json_object *o = json_object_new_object(), *given = json_object_new_object(), *run = json_object_new_object();
    add_string(o, "format", CHECKPOINT_FORMAT);
    add_int(o, "version", CHECKPOINT_VERSION);
    add_int(o, "step", step);
    json_object_object_add(o, "fixed", fixed_json(r));
    json_object_object_add(o, "others", others_json(r));
    for (int i = 0; i < r->table.options.count; i++) {
        const Option* option = &r->table.options.items[i];
        if (option->type != OPTION_GROUP && option->given) { add_string(given, option->name, flag_text(option).c_str()); }
    }
    json_object_object_add(o, "given", given);
    json_object_object_add(o, "counters", counters_json(&r->model));
    add_int(run, "skipped", r->skipped);
    add_int(run, "not_finite", r->not_finite);
    add_int(run, "not_finite_in_a_row", r->not_finite_in_a_row);
    add_int(run, "log_bytes", log_size(&r->log));
    json_object_object_add(o, "run", run);
    return json_pages(o);
}

static std::string fingerprint_text(const Run* r) {
    char text[20];
    snprintf(text, sizeof(text), "%016" PRIx64, r->fingerprint);
    return text;
}

static std::string checkpoint_loader(const Run* r) {
    LoaderPosition at = loader_position(&r->train);
    json_object *o = json_object_new_object(), *sources = json_object_new_array();
    add_int(o, "samples", at.samples);
    add_string(o, "fingerprint", fingerprint_text(r).c_str());
    for (int i = 0; i < at.sources; i++) {
        json_object* source = json_object_new_object();
        add_int(source, "taken", at.taken[i]);
        add_int(source, "windows", at.windows[i]);
        json_object_array_add(sources, source);
    }
    json_object_object_add(o, "sources", sources);
    return json_pages(o);
}

// The part of the save that was under way has ended on all ranks: begins the next, or says what came of it
static void save_advance(Run* r) {
    if (!r->checkpoints.concludes) { checkpoint_conclude(&r->checkpoints); return; }
    SaveOutcome o = checkpoint_outcome(&r->checkpoints);
    r->failed = !o.good;
    if (r->topology.world.rank != 0) { return; }
    std::string folder = r->checkpoints.folder + "/" + checkpoint_name(o.step);
    if (!o.good) {
        console_end_line(&r->console);
        int64_t last = r->checkpoints.last;
        fprintf(stderr, "train_gpt_fp8: the checkpoint of step %" PRId64 " could not be saved: %s; %s%s\n", o.step, o.wrong, r->ends ? "" : "training goes on, and ",
            last >= 0 ? (checkpoint_name(last) + " is the newest good one").c_str() : "there is none yet");
    } else {
        console_print(&r->console, "step %" PRId64 "/%" PRId64 " | saved %s: %s in %s, %s/s; training waited %s", o.step, r->steps, folder.c_str(), text_bytes((double)o.bytes).s,
            text_ms(1e3 * o.seconds).s, text_bytes((double)o.bytes / o.seconds).s, text_ms(1e3 * o.waited).s);
        if (o.wrong[0] != '\0') { fprintf(stderr, "train_gpt_fp8: %s is whole, but what follows it is not done: %s\n", folder.c_str(), o.wrong); }
    }
    json_object *line = json_object_new_object(), *saved = json_object_new_object();
    add_int(line, "step", o.step);
    json_object_object_add(saved, "good", json_object_new_boolean(o.good));
    add_int(saved, "bytes", (int64_t)o.bytes);
    add_double(saved, "ms", 1e3 * o.seconds);
    add_double(saved, "waited_ms", 1e3 * o.waited);
    json_object_object_add(line, "checkpoint", saved);
    log_line(&r->log, line);
}

// What ranks tell each other between two steps
struct StepNote {
    int wish;            // EndWish
    int saving;          // SaveState
    uint64_t written, bytes;
};
enum EndWish { GO_ON, END_FOR_SIGNAL, END_FOR_TIME };

static volatile sig_atomic_t ending_signal, interrupted;
static void on_ending_signal(int signal) {
    if (signal == SIGINT && interrupted != 0) {
        static const char word[] = "\ntrain_gpt_fp8: stopped at once, nothing was saved\n";
        (void)!write(STDERR_FILENO, word, sizeof(word) - 1);
        _exit(130);
    }
    if (signal == SIGINT) { interrupted = 1; }
    ending_signal = signal;
}
static void catch_signals(void) {
    struct sigaction action = {};
    action.sa_handler = on_ending_signal;
    action.sa_flags = SA_RESTART;
    for (int signal : {SIGTERM, SIGUSR1, SIGINT}) { sigaction(signal, &action, NULL); }
}

// Between two steps: how far is the save that is under way, and does a rank wish to end?
static EndWish step_note(Run* r, int64_t step) {
    Checkpoints* c = &r->checkpoints;
    bool late = r->args.max_minutes > 0.0 && wall_seconds() - r->began > 60.0 * r->args.max_minutes;
    StepNote mine = {ending_signal != 0 ? END_FOR_SIGNAL : late ? END_FOR_TIME : GO_ON, c->writer.state, c->writer.written, c->writer.file.bytes};
    std::vector<StepNote> all((size_t)c->world.size);
    host_all_gather(&c->world, all.data(), &mine, sizeof(mine));
    int wish = GO_ON;
    bool written = c->step >= 0;
    uint64_t done = 0, bytes = 0;
    for (const StepNote& n : all) {
        wish = wish == GO_ON ? n.wish : wish;
        written &= n.saving != SAVE_WRITING;
        done += n.written;
        bytes += n.bytes;
    }
    if (done != c->seen) { watchdog_progress(&watchdog, step, "a checkpoint"); }
    c->seen = done;
    if (written) { save_advance(r); }
    else if (c->step >= 0 && c->world.rank == 0 && wall_seconds() - c->told > 10.0) {
        c->told = wall_seconds();
        console_print(&r->console, "step %" PRId64 "/%" PRId64 " | saving step %" PRId64 ": %.0f %%, %s/s", step, r->steps, c->step, 100.0 * (double)min_of(done, bytes) / (double)max_of(bytes, (uint64_t)1),
            text_bytes((double)done / (wall_seconds() - c->started)).s);
    }
    return (EndWish)wish;
}

// Until no save is under way
static void save_wait(Run* r) {
    Checkpoints* c = &r->checkpoints;
    double start = wall_seconds();
    while (c->step >= 0) {
        c->waited += wall_seconds() - start;
        start = wall_seconds();
        int64_t step = c->step;
        step_note(r, step);
        if (c->writer.state == SAVE_WRITING) { usleep(2000); }
    }
}

// Begins to save the state after `step` steps; waits for the save before it
static void save_begin(Run* r, int64_t step) {
    save_wait(r);
    std::vector<TextFile> texts;
    if (r->topology.world.rank == 0) {
        std::string choices;
        matmul_choices_write(&r->model.matmul, &choices);
        if (device_is_gpu) { texts.push_back({choices, "matmul_choices.txt"}); }
        texts.push_back({checkpoint_loader(r), "loader.json"});
        texts.push_back({checkpoint_config(r, step), "config.json"});
    }
    checkpoint_begin(&r->checkpoints, step, checkpoint_share(&r->model), texts, r->model.stream);
}

// How to go on with this run
static std::string resume_command(const Run* r) {
    int ranks = r->topology.world.size;
    return (ranks > 1 ? "mpirun -np " + std::to_string(ranks) + " " : "") + r->command + (r->args.resume ? "" : " --resume");
}

// A flag that was not given, as the checkpoint has it
static void take_flag(Option* o, const char* value) {
    if (o->given) { return; }
    std::string flag = std::string("--") + o->name + ", as the checkpoint has it";
    char* text = strdup(value);  // stays with its option
    if (text == NULL) { die("out of host memory: a flag"); }
    set_option(o, flag.c_str(), o->type != OPTION_FLAG ? text : strcmp(text, "on") == 0 ? "1" : "0");
    o->given = true;
}

// --resume: finds the newest checkpoint that is whole, and takes from it the flags that are not given. All ranks
static void find_checkpoint(Run* r) {
    Group* world = &r->topology.world;
    const char* folder = r->args.output_dir;
    std::string list;
    if (world->rank == 0) {
        std::vector<std::string> names;
        int error = names_in_folder(&names, folder);
        if (error != 0 && error != ENOENT && error != ENOTDIR) { die("--resume: '%s' cannot be searched for checkpoints: %s", folder, strerror(error)); }  // which is no reason to start anew
        for (int64_t step : checkpoints_in(folder)) { list += checkpoint_name(step) + "\n"; }
    }
    broadcast_text(world, &list);
    for (size_t at = 0; at < list.size(); at = list.find('\n', at) + 1) {
        std::string name = list.substr(at, list.find('\n', at) - at), path = std::string(folder) + "/" + name, text;
        std::string wrong = checkpoint_verify(&r->resumed_files, path, world);
        if (wrong.empty() && world->rank == 0) { wrong = read_text(&text, path + "/config.json"); }
        broadcast_text(world, &wrong);
        broadcast_text(world, &text);
        json_object* o = wrong.empty() ? json_tokener_parse(text.c_str()) : NULL;
        json_object *format = NULL, *version = NULL;
        if (wrong.empty() && (o == NULL || !json_object_object_get_ex(o, "format", &format) || !json_object_object_get_ex(o, "version", &version)
            || strcmp(json_object_get_string(format), CHECKPOINT_FORMAT) != 0)) { wrong = "config.json is no checkpoint's"; }
        if (wrong.empty() && json_object_get_int64(version) != CHECKPOINT_VERSION) {
            bad_input("--resume: %s has version %" PRId64 ", and this program reads version %d", path.c_str(), json_object_get_int64(version), CHECKPOINT_VERSION);
        }
        if (!wrong.empty()) {
            json_object_put(o);
            if (world->rank == 0) { fprintf(stderr, "train_gpt_fp8: --resume: %s is passed over: %s\n", path.c_str(), wrong.c_str()); }
            continue;
        }
        r->resumed = o;
        r->resumed_from = path;
        r->first_step = json_int(o, "step");
        break;
    }
    r->all_damaged = r->resumed == NULL && !list.empty();
    if (r->resumed == NULL) {
        if (world->rank == 0) { fprintf(stderr, "train_gpt_fp8: --resume: %s holds no %scheckpoint, so the run starts from the beginning\n", folder, list.empty() ? "" : "whole "); }
        return;
    }
    const struct { const char *flag, *name; } shape[] = {{"layers", "layers"}, {"heads", "heads"}, {"width", "width"}, {"position", "position"}, {"tie-embeddings", "tie-embeddings"}, {"vocab", "vocabulary"}};
    json_object *given = json_member(r->resumed, "given"), *init = NULL;
    json_object_object_get_ex(given, "init", &init);
    bool says_shape = r->args.init != NULL && (init == NULL || strcmp(json_object_get_string(init), r->args.init) != 0);  // of another model, perhaps: it is compared
    json_object_object_foreach(given, name, value) {
        Option* o = find_option(&r->table.options, name, strlen(name));
        bool skipped = o == NULL || strcmp(name, "output-dir") == 0 || strcmp(name, "resume") == 0 || strcmp(name, "init") == 0;
        for (auto& part : shape) { skipped |= says_shape && strcmp(name, part.flag) == 0; }
        skipped |= (strcmp(name, "val-split") == 0 && r->args.val_data != NULL) || (strcmp(name, "val-data") == 0 && r->args.val_split > 0.0);  // the other was asked for
        if (!skipped) { take_flag(o, json_object_get_string(value)); }
    }
    for (auto& part : shape) {  // of the model, wherever it came from
        Option* o = find_option(&r->table.options, part.flag, strlen(part.flag));
        if (!says_shape) { take_flag(o, json_object_get_string(json_member(json_member(r->resumed, "fixed"), part.name))); }
    }
    // the batch stays what it was, where so many ranks can make it, even if it came from their number
    int64_t batch = atoll(json_object_get_string(json_member(json_member(r->resumed, "others"), "global-batch"))), model = r->args.tp * r->args.pp;
    int64_t pass = r->args.micro_batch * r->args.seq_len * (world->size / model);
    if (world->size % model == 0 && batch % pass == 0 && batch / pass >= r->args.pp) {
        take_flag(find_option(&r->table.options, "global-batch", strlen("global-batch")), std::to_string(batch).c_str());
    }
#ifdef _OPENMP
    json_object* threads = NULL;
    const char* asked = getenv("OMP_NUM_THREADS");
    if (json_object_object_get_ex(json_member(r->resumed, "others"), "threads", &threads) && (asked == NULL || asked[0] == '\0')) {
        int n = atoi(json_object_get_string(threads));
        if (n >= 1 && n <= r->world.cores) { omp_set_num_threads(n); }
    }
#endif
    if (device_is_gpu && world->rank == 0) {
        std::string wrong = read_text(&r->resumed_choices, r->resumed_from + "/matmul_choices.txt");
        if (!wrong.empty()) { fprintf(stderr, "train_gpt_fp8: --resume: the matmuls' algorithms are chosen anew: %s\n", wrong.c_str()); }
    }
}

// Refuses a checkpoint of another model or other data. Moves the data to where it stood
static void check_checkpoint(Run* r) {
    if (r->resumed == NULL) { return; }
    json_object* fixed = fixed_json(r);
    std::string text = differences(json_member(r->resumed, "fixed"), fixed);
    json_object_put(fixed);
    if (!text.empty()) {
        bad_input("--resume: %s is of another run (there -> here): %s; give the flags that it was started with, or another --output-dir", r->resumed_from.c_str(), text.c_str());
    }
    std::string loader;
    Group* world = &r->topology.world;
    std::string wrong = world->rank == 0 ? read_text(&loader, r->resumed_from + "/loader.json") : "";
    broadcast_text(world, &wrong);
    broadcast_text(world, &loader);
    json_object* o = wrong.empty() ? json_tokener_parse(loader.c_str()) : NULL;
    if (o == NULL) { bad_input("--resume: %s/loader.json cannot be read%s%s", r->resumed_from.c_str(), wrong.empty() ? "" : ": ", wrong.c_str()); }
    json_object* sources = json_member(o, "sources");
    LoaderPosition at = {};
    at.samples = json_int(o, "samples");
    at.sources = (int)min_of(json_object_array_length(sources), (size_t)LOADER_MAX_SOURCES);
    for (int i = 0; i < at.sources; i++) {
        json_object* source = json_object_array_get_idx(sources, (size_t)i);
        at.taken[i] = json_int(source, "taken");
        at.windows[i] = json_int(source, "windows");
    }
    if (r->has_train) {
        loader_seek(&r->train, &at);
        const char* before = json_object_get_string(json_member(o, "fingerprint"));
        if (fingerprint_text(r) != before) {
            bad_input("--train-data: '%s' is as long as the data of %s, and holds other tokens (fingerprint %s -> %s); give the same data, or another --output-dir",
                r->args.train_data, r->resumed_from.c_str(), before, fingerprint_text(r).c_str());
        }
    }
    json_object_put(o);
}

// The states of the checkpoint, and what is said of it
static void load_checkpoint(Run* r) {
    double start = wall_seconds();
    CheckpointReader reader;
    std::string wrong = reader_open(&reader, r->resumed_from, r->resumed_files);
    if (!wrong.empty()) { die("--resume: %s: %s", r->resumed_from.c_str(), wrong.c_str()); }
    json_object *counters = json_member(r->resumed, "counters"), *settings = json_member(r->resumed, "others");
    int64_t rounded = load_states(&r->model, &reader, json_int(counters, "replicas"));
    counters_restore(&r->model, counters);
    for (const char* format : {"fp8-fwd", "fp8-bwd"}) {  // scales for another format are of no use: they are made just in time until there are others
        const Option* o = find_option(&r->table.options, format, strlen(format));
        if (flag_text(o) != json_object_get_string(json_member(settings, format))) { r->model.steps_recorded = 0; }
    }
    const char* scaling = json_object_get_string(json_member(settings, "fp8-scaling"));
    if (scaling != NULL && strcmp(scaling, "block") == 0 && !by_block(&r->config)) { r->model.steps_recorded = 0; }  // it keeps no amaxes
    json_object* run = json_member(r->resumed, "run");
    r->skipped = json_int(run, "skipped");
    r->not_finite = json_int(run, "not_finite");
    r->not_finite_in_a_row = json_int(run, "not_finite_in_a_row");
    r->checkpoints.last = r->first_step;
    double total = (double)rounded;
    host_all_reduce_sum(&r->topology.world, &total, 1);
    if (r->topology.world.rank != 0) { return; }
    json_object* others = others_json(r);
    std::string text = differences(json_member(r->resumed, "others"), others);
    json_object_put(others);
    printf("goes on from %s, step %" PRId64 ", read in %s; %s%s\n", r->resumed_from.c_str(), r->first_step, text_ms(1e3 * (wall_seconds() - start)).s,
        text.empty() ? "bit for bit as if it had never stopped" : "not bit for bit, as this has changed: ", text.c_str());
    if (total > 0.0) {
        printf("%.0f blocks of %d elements of the optimizer's states are cut otherwise by these ranks, and were rounded again\n", total, STATE_BLOCK);
    }
}

// ---- main ----

// Before printing what needs neither MPI nor a device: of several ranks all must be about to, else those that are not would wait for ever
static void print_together(Run* r, const char* task, int* argc, char*** argv) {
    int launched = launched_processes();
    if (launched == 0 || launched == 1) { return; }
    r->world = world_init(argc, argv);
    require_same_task(&r->world, task);
    world_finalize(&r->world);
}

static void setup(Run* r, int argc, char** argv) {
    r->began = wall_seconds();
    r->program = argv[0];
    for (int i = 0; i < argc; i++) { r->command += (i > 0 ? " " : "") + shell_word(argv[i]); }
    option_table(&r->table, &r->args);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) { print_together(r, "--help", &argc, &argv); }
    }
    parse_options(&r->table.options, argc, argv);
    resolve_topology(r);
    if (r->args.plan) {
        print_together(r, "--plan", &argc, &argv);
        make_plan(r);
        exit(0);
    }
    note_lone_task(r);
    int launched = launched_processes();
    watch_meeting(r, launched);
    r->world = world_init(&argc, &argv);
    watchdog.progress++;
    require_same_task(&r->world, NULL);
    watchdog.progress++;
    world_select_device(&r->world);
    watchdog.progress++;
#ifdef _OPENMP
    omp_set_num_threads(threads_per_rank(&r->world));
#endif
    r->topology.world = group_world(&r->world, r->args.staged);
    watchdog.progress++;
    Group* world = &r->topology.world;
    static char text[1 << 20];
    settings_text(r, text, sizeof(text));
    require_same_everywhere(world, "flags", text);
    watchdog_stop(&watchdog);
    if (r->args.resume) { find_checkpoint(r); }
    watch_meeting(r, launched);
    join_topology(r);
    watchdog_stop(&watchdog);
    resolve_model(r);
    open_data(r);
    if (r->resumed != NULL && !r->has_source) { r->config.positions = atoi(json_object_get_string(json_member(json_member(r->resumed, "fixed"), "positions"))); }
    check_checkpoint(r);
    open_evals(r);
    resolve_tokenizer(r);
    resolve_generation(r);
    resolve_global_batch(r);
    resolve_steps(r);
    if (r->first_step > r->steps) { bad_input("--steps: %" PRId64 " are fewer than the %" PRId64 " that %s has behind it", r->steps, r->first_step, r->resumed_from.c_str()); }
    resolve_export(r);
    resolved_text(r, text, sizeof(text));
    require_same_everywhere(world, "data and model", text);
    settings_text(r, text, sizeof(text));  // again, with what the recipe has set: a flag that was given may be another's default
    require_same_everywhere(world, "flags", text);
    r->parameters = count_parameters(r);
    model_plan(&r->model, &r->config, &r->topology, &r->memory);
    compare_memory(r);
    require_memory(r);
    barrier(world);  // every rank has found its input good: from here on things are written
    r->log = no_log();
    if (world->rank == 0) {
        make_directory("--output-dir", r->args.output_dir);
        unlink(heartbeats_path(r->args.output_dir).c_str());  // of a run that was killed
        std::vector<int64_t> older = checkpoints_in(r->args.output_dir);
        if (!r->args.resume && !older.empty()) {
            bad_input("--output-dir: '%s' holds checkpoints of an earlier run, the newest of step %" PRId64 "; give --resume to go on from it, or another folder", r->args.output_dir, older[0]);
        }
        std::string log = std::string(r->args.output_dir) + "/log.jsonl";
        if (r->all_damaged && rename(log.c_str(), (log + ".old").c_str()) == 0) { fprintf(stderr, "train_gpt_fp8: --resume: what was logged is in %s.old\n", log.c_str()); }
        r->log = log_open("--output-dir", r->args.output_dir, r->resumed != NULL);
        if (r->resumed != NULL) { log_cut(&r->log, json_int(json_member(r->resumed, "run"), "log_bytes")); }
    }
    barrier(world);
    double memory_limit = r->args.checkpoint_memory * (double)(1 << 30);
    bool limited = option_given(&r->table.options, &r->args.checkpoint_memory);
    checkpoints_open(&r->checkpoints, r->args.output_dir, r->args.keep, (size_t)memory_limit, world);
    r->checkpoints.writer.gets_on = [] { watchdog.progress++; };
    choose_matmuls(r);
    model_commit(&r->model, &r->memory);
    if (r->resumed != NULL) { load_checkpoint(r); }
    else { model_set_weights(&r->model, r->has_source ? &r->source : NULL); }
    if (!limited) { r->checkpoints.most_memory = host_memory_free(r->world.local_size) / 2; }  // now that the model has its own
    if (r->has_source) { weight_source_close(&r->source); }
    resolve_peak(r);
    for (int i = 0; i < host_batches(&r->config); i++) { r->batches.push_back(host_batch_create(rows_of(&r->model))); }
    if (world->rank == 0) {
        print_settings(r);
        note_slow_fp8(r, stdout, r->gpu);
        note_cut_contexts(r);
        log_settings(r);
    }
    r->console = console_open(stdout, 100);
    std::string (*trouble)(void) = NULL;
#ifdef NCCL_TRANSPORT
    if (world->transport == OVER_NCCL) { trouble = nccl_trouble; }
#endif
    watchdog_start(&watchdog, r->args.timeout, r->args.output_dir, world->rank, world->size, trouble);
    catch_signals();
}

// To end a message with
static std::string blame_of(const Run* r) { return r->to_blame.empty() ? "" : "; the first tensor that was not finite: " + r->to_blame; }

// Too many steps in a row were skipped
[[noreturn]] static void give_up(Run* r, int64_t step) {
    save_wait(r);
    int64_t good = r->checkpoints.last;
    die("the last %" PRId64 " steps, up to step %" PRId64 ", were skipped (--max-skipped); %s; a lower --lr, a longer --warmup or --clip may keep the model whole%s", r->skipped_in_a_row, step + 1,
        good < 0 ? "there is no checkpoint to go back to" : ("--resume goes on from step " + std::to_string(good)).c_str(), blame_of(r).c_str());
}

static void train(Run* r) {
    const Args* a = &r->args;
    Model* m = &r->model;
    StepSettings settings = {};
    settings.rules = DecisionRules{a->beta1, a->beta2, (float)a->clip, (float)a->skip_loss_z, (float)a->skip_grad_z};
    settings.weight_decay = (float)a->weight_decay;
    float weight = token_weight(a->global_batch);
    double profile_start = 0.0;
    struct { bool waiting, after; int64_t step; double lr, start; uint64_t sent[COMM_OPERATIONS]; LoaderPosition batch; } last = {};
    bool after = false;  // a step: nothing has come between it and the next
    auto show_last = [&]() {
        if (!last.waiting) { return; }
        StepRecord record = read_record(m);
        double seconds = device_is_gpu ? step_seconds(m, last.after) : wall_seconds() - last.start;
        show_step(r, last.step, &record, last.lr, seconds, last.sent);
        last.waiting = false;
        if (r->not_finite_in_a_row == 1 && r->searches < NOT_FINITE_SEARCHES) {
            name_not_finite(r, last.step, &last.batch);
            after = false;
        }
        if (a->max_skipped > 0 && r->skipped_in_a_row >= a->max_skipped) { give_up(r, last.step); }
    };
    int64_t first = r->first_step;
    for (int64_t step = first;; step++) {
        watchdog_progress(&watchdog, step, "the end of a step");
        EndWish wish = step_note(r, step);
        bool end = step == r->steps, resumes = r->resumed != NULL && step == first, done = resumes && !end;  // done: before the checkpoint was written
        bool validates = !done && r->has_val && a->val_batches > 0 && a->val_every > 0 && (step % a->val_every == 0 || end);
        bool scores = !done && !r->evals.empty() && (end || (a->val_every > 0 && step % a->val_every == 0));
        bool samples = !done && a->sample_every > 0 && ((step > 0 && step % a->sample_every == 0) || end);
        bool due = a->checkpoint_every > 0 && step > 0 && (step % a->checkpoint_every == 0 || end), saves = !resumes && (wish != GO_ON || due);
        if (validates || scores || samples || saves || end) {
            show_last();
            after = false;
        }
        if (wish == GO_ON && !end && r->skipped_in_a_row > 0) { saves = false; }  // may be the way down, and must not push out what was before it
        if (validates) { validate(r, step); }
        if (scores) { score_evals(r, step); }
        if (samples) { show_sample(r, step); }
        r->ends = end || wish != GO_ON;
        if (saves) { save_begin(r, step); }
        if (wish != GO_ON && !end) {
            save_wait(r);
            if (r->topology.world.rank == 0) {
                const char* why = wish == END_FOR_TIME ? "--max-minutes are over" : "a signal asks for the end";
                console_print(&r->console, "step %" PRId64 "/%" PRId64 " | %s: the run ends here%s. To go on: %s", step, r->steps, why, r->failed ? ", and this step is not saved" : "", resume_command(r).c_str());
            }
            break;
        }
        if (end && a->generate > 0) { show_generated(r); }
        if (end) { break; }
        double start = wall_seconds(), lr = learning_rate(a->schedule, a->lr, a->min_lr_frac, r->warmup, step, r->steps);
        if (a->overfit_batch) { loader_rewind(&r->train); }
        LoaderPosition batch = loader_position(&r->train);
        topology_forget_sent(&r->topology);
        run_micro_batches(m, r->batches.data(), r->micro_batches, weight, [=](HostBatch* b, int) {
            watchdog_progress(&watchdog, step, "a micro-batch");
            loader_next(&r->train, b->tokens, b->targets);
        });
        settings.rates = AdamRates{(float)lr, (float)a->beta1, (float)a->beta2, (float)a->eps, 0.0f};
        if (device_is_gpu) { show_last(); }  // the device is busy with this step meanwhile
        finish_step(m, &settings, a->global_batch);
        last.waiting = true;
        last.after = after;
        after = true;
        last.step = step;
        last.batch = batch;
        last.lr = lr;
        last.start = start;
        topology_sent(last.sent, &r->topology);
        if (!device_is_gpu) { show_last(); }
        if (step == first && a->profile) {  // the first step warms up
            profiler.on = m->matmul.timing = true;
            stream_sync(m->stream);
            profile_start = wall_seconds();
        }
    }
    save_wait(r);
    if (r->skipped > 0 && r->topology.world.rank == 0) {
        console_print(&r->console, "%" PRId64 " of %" PRId64 " steps were skipped, %" PRId64 " of them for a loss or gradient that was not finite", r->skipped,
                      r->steps, r->not_finite);
    }
    if (r->not_finite_in_a_row >= min_of(r->steps, NOT_FINITE_FAILS) && r->steps > 0) {
        die("the last %" PRId64 " steps had no finite loss or gradient: the model no longer trains; a lower --lr, a longer --warmup or --clip may keep it whole%s",
            r->not_finite_in_a_row, blame_of(r).c_str());
    }
    int64_t timed = m->step - 1;
    if (a->profile && r->topology.world.rank == 0 && timed > 0) {
        const RankLayout* y = &r->topology.layout;
        if (y->tp * y->pp > 1) { printf("profile of the first rank: of %d that share its layers, stage 1 of %d\n", y->tp, y->pp); }
        profile_report(stdout, wall_seconds() - profile_start, (int)timed);
        matmul_time_alone(&m->matmul, m->stream);
        matmul_report(&m->matmul, stdout, (int)timed);
        profile_bytes_alone(stdout, "adamw", optimizer_traffic(&m->optimizer, &m->params), m->stream);
    }
}

// The trained model for other programs
static void export_model(Run* r) {
    const Args* a = &r->args;
    if (a->export_hf == NULL && a->export_llmc == NULL) { return; }
    Model* m = &r->model;
    ModelShape shape = shape_of(&m->config);
    shape.bos = shape.eos = shape.vocab == 50257 ? 50256 : -1;  // GPT-2's <|endoftext|>
    if (r->has_source) {
        shape.bos = r->source.shape.bos;
        shape.eos = r->source.shape.eos;
    }
    DType dtype = export_formats[a->export_dtype];
    bool writes = r->topology.world.rank == 0;
    stream_sync(m->stream);
    WholeBuffers buffers = whole_buffers(m);
    auto give = [&](const WholeTensor& t) {
        gather_whole(m, &buffers, &t);
        return (const float*)buffers.whole.data();
    };
    auto written = [&](const char* path) {
        if (writes) { console_print(&r->console, "the model is in %s, in %s", path, dtype_names[dtype]); }
    };
    if (a->export_hf != NULL) {
        std::string tokenizer = a->hf_tokenizer != NULL ? a->hf_tokenizer : r->has_source && is_folder(r->source.path) ? r->source.path : "";
        hf_write(a->export_hf, &shape, dtype, tokenizer, writes, give);
        written(a->export_hf);
    }
    if (a->export_llmc != NULL) {
        llmc_write(a->export_llmc, &shape, dtype, writes, give);
        written(a->export_llmc);
    }
    barrier(&r->topology.world);  // nobody ends before all is written
}

static void teardown(Run* r) {
    console_end_line(&r->console);
    watchdog_stop(&watchdog);
    checkpoints_close(&r->checkpoints);
    json_object_put(r->resumed);
    model_free(&r->model, &r->memory);
    for (HostBatch& b : r->batches) { host_batch_free(&b); }
    close_data(r);
    log_close(&r->log);
    topology_free(&r->topology);
    world_finalize(&r->world);
}

#ifdef TESTING
#define main trainer_main  // tests include this file and bring a main() of their own
#endif
int main(int argc, char** argv) {
    signal(SIGPIPE, SIG_IGN);  // a reader that has gone (| head) ends the output, not the training
    signal(SIGXFSZ, SIG_IGN);  // a file that may not grow fails to be written, which is told
    static Run run;
    setup(&run, argc, argv);
    train(&run);
    export_model(&run);
    teardown(&run);
    return run.failed;
}
#undef main
