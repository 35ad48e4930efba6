// weights.h: a model in another program's files: where weights come from, and what writing them takes.
//
// A WeightSource is an opened model: its shape, checked and read before anything is allocated, and a function that gives any rank's share of any parameter.
// model_io.h has those of llm.c, hf.h those of Hugging Face. Their writers get whole tensors, one after the other, and put them into an OutFile: it is made
// under a name of its own, and what goes wrong with it is said with its path and ends the run.
#pragma once
#include "files.h"
#include "params.h"
#include "trouble.h"  // error_of
#include <functional>

// What a model of another program is
struct ModelShape {
    int layers, heads, width, vocab;
    int positions;      // rows of the table of positions; with rotary ones the longest sequence that the model is meant for
    bool rope, tied;
    int bos, eos;       // the tokens around a text; -1: not known
};

struct WeightSource {
    ModelShape shape;
    std::string path;
    void* file;         // what `read` and `close` know
    void (*read)(float* values, const void* file, const Param* p);  // this rank's share of a parameter as float32 (rows, cols): padding is zero
    void (*close)(void* file);
};

static inline void weight_source_close(WeightSource* s) {
    s->close(s->file);
    s->file = NULL;
}

// A layer's tensor without the layer: "qkvw" of "h0.qkvw"
static inline const char* name_in_layer(const char* name) {
    const char* dot = strchr(name, '.');
    return dot != NULL ? dot + 1 : name;
}

// A whole tensor as it is written: (rows, cols) without the vocabulary's padding
struct WholeTensor {
    char name[32];   // as in Param
    int layer;       // as in Param
    int64_t rows, cols;
};

// f(tensor) for all tensors of a model, in the order of the forward pass. As build_params makes them
template <class F> static inline void each_whole_tensor(const ModelShape* s, F f) {
    int64_t C = s->width;
    auto give = [&](const char* name, int layer, int64_t rows, int64_t cols) {
        WholeTensor t = {{}, layer, rows, cols};
        bool inside = layer >= 0 && layer < s->layers;
        if (inside) { snprintf(t.name, sizeof(t.name), "h%d.%s", layer, name); } else { snprintf(t.name, sizeof(t.name), "%s", name); }
        f(t);
    };
    give("wte", -1, s->vocab, C);
    if (!s->rope) { give("wpe", -1, s->positions, C); }
    for (int l = 0; l < s->layers; l++) {
        give("ln1w", l, 1, C);
        give("ln1b", l, 1, C);
        give("qkvw", l, 3 * C, C);
        give("qkvb", l, 1, 3 * C);
        give("attprojw", l, C, C);
        give("attprojb", l, 1, C);
        give("ln2w", l, 1, C);
        give("ln2b", l, 1, C);
        give("fcw", l, 4 * C, C);
        give("fcb", l, 1, 4 * C);
        give("fcprojw", l, C, 4 * C);
        give("fcprojb", l, 1, C);
    }
    give("lnfw", s->layers, 1, C);
    give("lnfb", s->layers, 1, C);
    if (!s->tied) { give("lmhead", s->layers, s->vocab, C); }
}

// ---- values in the formats of files ----

// codes[place(i)] = values[i], rounded to nearest, of n; t: FP32, BF16 or FP16
template <class Place> static inline void codes_from_values(void* codes, DType t, const float* values, int64_t n, Place place) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        int64_t at = place(i);
        if (t == FP32) { ((float*)codes)[at] = values[i]; }
        else if (t == BF16) { from_float(((bf16*)codes)[at], values[i]); }
        else { from_float(((fp16*)codes)[at], values[i]); }
    }
}

// FP16 ends at 65504: dies where a weight does not fit. `what` is written to `path`
static inline void require_in_range(DType t, const float* values, size_t n, const char* what, const char* path) {
    for (size_t i = 0; t == FP16 && i < n; i++) {
        if (fabsf(values[i]) < 65520.0f || !isfinite(values[i])) { continue; }
        die("'%s' cannot be written in fp16: a weight of %s is %g, and the format ends at 65504; take --export-dtype bf16", path, what, (double)values[i]);
    }
}

// ---- writing files ----

struct OutFile {
    std::string path;
    int fd = -1;
};

inline std::vector<std::string> out_unfinished;  // what goes when an export fails: files, and behind them their folders

[[noreturn]] static inline void out_failed(const char* what, const std::string& path, int error) {
    for (const std::string& p : out_unfinished) { remove(p.c_str()); }
    die("cannot %s '%s': %s; what was exported there before is as it was", what, path.c_str(), error_of(error).c_str());
}

// A new file; what had its name is gone
static inline OutFile out_create(const std::string& path) {
    OutFile f;
    f.path = path;
    f.fd = open(path.c_str(), O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0666);
    if (f.fd < 0) { out_failed("make", path, errno); }
    out_unfinished.insert(out_unfinished.begin(), path);
    return f;
}

static inline void out_write(OutFile* f, const void* data, size_t bytes) {
    int error = write_fully(f->fd, data, bytes);
    if (error != 0) { out_failed("write", f->path, error); }
}

// The file is on the disk
static inline void out_close(OutFile* f) {
    if (fsync(f->fd) != 0) { out_failed("write", f->path, errno); }
    if (close(f->fd) != 0) { out_failed("write", f->path, errno); }
    f->fd = -1;
}

static inline void out_sync_folder(const std::string& path) {
    int error = sync_folder(path);
    if (error != 0) { out_failed("write", path, error); }
}

static inline void out_rename(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) { out_failed("rename what was written to", to, errno); }
}

// A name beside `path` that nothing has: "path.unfinished-123", of what shall be `path`
static inline std::string name_beside(const std::string& path, const char* what) {
    std::string name = path + "." + what + "-" + std::to_string((long)getpid());
    struct stat status;
    while (lstat(name.c_str(), &status) == 0) { name += "-"; }
    return name;
}

// Gives the values (rows, cols) of one whole tensor, in host memory; they hold until the next one is asked for
typedef std::function<const float*(const WholeTensor&)> GiveTensor;
