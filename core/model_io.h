// model_io.h: llm.c's models, read and written.
//
// A model.bin, version 3 (FP32) and 5 (BF16), little-endian: 256 int32 of header ([0]=20240326, [1]=version, [2]=positions, [3]=vocabulary,
// [4]=layers, [5]=heads, [6]=width, [7]=padded vocabulary), then 16 tensors, each with all its layers together, row-major (out, in). It is a GPT-2:
// learned positions, tied head. Rows of wte beyond the vocabulary are padding and are not read.
#pragma once
#include "weights.h"

constexpr int LLMC_HEADER = 256;  // int32
constexpr int32_t LLMC_MAGIC = 20240326;

struct LlmcModel {
    const char* path;
    int fd;
    int element_bytes;  // 4: FP32, 2: BF16
    int positions, vocab, layers, heads, width, padded_vocab;
};

// One of the 16 tensors in the order of the file; `per_layer` tensors are (layers, elements)
struct LlmcTensor {
    const char* name;
    bool per_layer;
    int64_t elements;
};

constexpr int LLMC_TENSORS = 16;

static inline void llmc_tensors(LlmcTensor* out, const LlmcModel* m) {
    int64_t C = m->width;
    const LlmcTensor tensors[LLMC_TENSORS] = {
        {"wte", false, m->padded_vocab * C}, {"wpe", false, m->positions * C}, {"ln1w", true, C}, {"ln1b", true, C},
        {"qkvw", true, 3 * C * C}, {"qkvb", true, 3 * C}, {"attprojw", true, C * C}, {"attprojb", true, C}, {"ln2w", true, C}, {"ln2b", true, C},
        {"fcw", true, 4 * C * C}, {"fcb", true, 4 * C}, {"fcprojw", true, 4 * C * C}, {"fcprojb", true, C}, {"lnfw", false, C}, {"lnfb", false, C}};
    memcpy(out, tensors, sizeof(tensors));
}

// Opens and checks a model file: magic, version, shape, and that its size is that of the shape.
static inline LlmcModel llmc_open(const char* flag, const char* path) {
    LlmcModel m = {};
    m.path = path;
    m.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is not waited for: it is refused
    if (m.fd < 0) { bad_input("%s: cannot open '%s': %s", flag, path, strerror(errno)); }
    struct stat status;
    if (fstat(m.fd, &status) != 0) { bad_input("%s: cannot read '%s': %s", flag, path, strerror(errno)); }
    if (!S_ISREG(status.st_mode)) { bad_input("%s: '%s' is not a file", flag, path); }
    int32_t h[LLMC_HEADER];
    ssize_t got = pread(m.fd, h, sizeof(h), 0);
    if (got < 0) { bad_input("%s: cannot read '%s': %s", flag, path, strerror(errno)); }
    if (got != (ssize_t)sizeof(h)) {
        bad_input("%s: '%s' is no llm.c model: it has %zd bytes, and the header alone takes %zu", flag, path, got, sizeof(h));
    }
    if (h[0] != LLMC_MAGIC) { bad_input("%s: '%s' is no llm.c model: it starts with %d, not %d", flag, path, h[0], LLMC_MAGIC); }
    if (h[1] != 3 && h[1] != 5) { bad_input("%s: '%s' is an llm.c model of version %d; versions 3 (FP32) and 5 (BF16) can be read", flag, path, h[1]); }
    m.element_bytes = h[1] == 3 ? 4 : 2;
    m.positions = h[2];
    m.vocab = h[3];
    m.layers = h[4];
    m.heads = h[5];
    m.width = h[6];
    m.padded_vocab = h[7];
    const int limit = 1 << 24;  // above every real shape, and small enough that no product below overflows
    if (m.positions < 1 || m.positions > limit || m.vocab < 1 || m.vocab > limit || m.layers < 1 || m.layers > 10000 || m.heads < 1
        || m.width < 1 || m.width > 1 << 20 || m.width % m.heads != 0 || m.padded_vocab < m.vocab || m.padded_vocab > limit) {
        bad_input("%s: '%s' names a shape that no GPT has: %d positions, vocabulary %d (padded %d), %d layers, %d heads, width %d", flag, path,
            m.positions, m.vocab, m.padded_vocab, m.layers, m.heads, m.width);
    }
    LlmcTensor tensors[LLMC_TENSORS];
    llmc_tensors(tensors, &m);
    int64_t elements = 0;
    for (const LlmcTensor& t : tensors) { elements += t.elements * (t.per_layer ? m.layers : 1); }
    int64_t expected = (int64_t)sizeof(h) + elements * m.element_bytes;
    if (status.st_size != expected) {
        bad_input("%s: '%s' is %s: its header's shape takes %" PRId64 " bytes, the file has %" PRId64, flag, path,
            status.st_size < expected ? "cut short" : "too long", expected, (int64_t)status.st_size);
    }
    return m;
}

// values (rows, cols) of this rank's share of one parameter as float32: rows beyond the file's are zero.
static inline void llmc_read(float* values, const LlmcModel* m, const Param* p) {
    const char* name = name_in_layer(p->name);
    LlmcTensor tensors[LLMC_TENSORS];
    llmc_tensors(tensors, m);
    int64_t first = 0;
    const LlmcTensor* found = NULL;
    for (const LlmcTensor& t : tensors) {
        if (strcmp(t.name, name) == 0) { found = &t; break; }
        first += t.elements * (t.per_layer ? m->layers : 1);
    }
    if (found == NULL) { die("llm.c models have no tensor '%s'", p->name); }
    if (found->per_layer) { first += found->elements * p->layer; }
    int64_t n = (int64_t)param_elements(p), wanted = p->valid_rows * p->cols;
    ElementMap whole = whole_elements(p);
    int64_t last = wanted > 0 ? min_of((int64_t)whole((uint64_t)wanted - 1) + 1, found->elements) : 0;  // of the tensor in the file, what is before that is read
    size_t bytes = (size_t)last * (size_t)m->element_bytes, done = 0;
    char* raw = (char*)host_alloc(bytes);
    off_t offset = (off_t)(LLMC_HEADER * 4 + first * m->element_bytes);
    while (done < bytes) {
        ssize_t got = pread(m->fd, raw + done, bytes - done, offset + (off_t)done);
        if (got < 0 && errno == EINTR) { continue; }
        if (got <= 0) { die("reading '%s' failed at byte %zu: %s", m->path, (size_t)offset + done, got < 0 ? strerror(errno) : "the file ended"); }
        done += (size_t)got;
    }
    for (int64_t i = 0; i < n; i++) {
        bf16 half = {};
        int64_t at = (int64_t)whole((uint64_t)i);
        if (i >= wanted || at >= last) { values[i] = 0.0f; }
        else if (m->element_bytes == 4) { memcpy(&values[i], raw + 4 * at, 4); }
        else { memcpy(&half, raw + 2 * at, 2); values[i] = to_float(half); }
    }
    free(raw);
}

static inline void llmc_close(LlmcModel* m) {
    close(m->fd);
    m->fd = -1;
}

// ---- as a source of weights ----

static inline WeightSource llmc_source(const char* flag, const char* path) {
    LlmcModel* m = new LlmcModel(llmc_open(flag, path));
    WeightSource s = {};
    s.shape = ModelShape{m->layers, m->heads, m->width, m->vocab, m->positions, false, true, -1, -1};
    s.path = path;
    s.file = m;
    s.read = [](float* values, const void* file, const Param* p) { llmc_read(values, (const LlmcModel*)file, p); };
    s.close = [](void* file) {
        llmc_close((LlmcModel*)file);
        delete (LlmcModel*)file;
    };
    return s;
}

// ---- writing ----

// Refuses what llm.c's format has no place for, and to write over a file that is no llm.c model; before anything is allocated
static inline void llmc_require_writable(const char* flag, const char* path, const ModelShape* s, DType dtype) {
    if (s->rope) { bad_input("%s: llm.c's models have learned positions, and this one rotary ones; take --export-hf", flag); }
    if (!s->tied) { bad_input("%s: in llm.c's models the head is the token embedding, and this one has a head of its own; take --export-hf", flag); }
    if (dtype == FP16) { bad_input("%s: llm.c's models are in fp32 or bf16, not in --export-dtype fp16", flag); }
    std::string folder = folder_of(path);
    if (access(folder.c_str(), W_OK) != 0) { bad_input("%s: cannot write to the folder '%s': %s", flag, folder.c_str(), strerror(errno)); }
    if (access(path, F_OK) == 0) {
        struct stat status;
        int32_t magic = 0;
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        bool ours = fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && pread(fd, &magic, sizeof(magic), 0) == (ssize_t)sizeof(magic);
        if (fd >= 0) { close(fd); }
        if (!ours || magic != LLMC_MAGIC) { bad_input("%s: '%s' is there and is no llm.c model; give another name, or remove it", flag, path); }
    }
}

// Version 3 (FP32) or 5 (BF16). All ranks call this: `give` takes all of them; `writes`: this one has the file
static inline void llmc_write(const char* path, const ModelShape* s, DType dtype, bool writes, const GiveTensor& give) {
    LlmcModel m = {};
    m.positions = s->positions;
    m.width = s->width;
    m.padded_vocab = round_up(s->vocab, 128);  // as llm.c has it, whatever this run's is
    LlmcTensor tensors[LLMC_TENSORS];
    llmc_tensors(tensors, &m);
    std::string name = name_beside(path, "unfinished");
    OutFile f;
    std::vector<char> codes;
    if (writes) {
        int32_t h[LLMC_HEADER] = {LLMC_MAGIC, dtype == FP32 ? 3 : 5, s->positions, s->vocab, s->layers, s->heads, s->width, m.padded_vocab};
        f = out_create(name);
        out_write(&f, h, sizeof(h));
    }
    for (const LlmcTensor& wanted : tensors) {  // all layers of one tensor together
        each_whole_tensor(s, [&](const WholeTensor& t) {
            if (strcmp(name_in_layer(t.name), wanted.name) != 0) { return; }
            const float* values = give(t);
            if (!writes) { return; }
            codes.assign((size_t)wanted.elements * (size_t)dtype_bytes(dtype), 0);  // the vocabulary's padding is zero
            codes_from_values(codes.data(), dtype, values, t.rows * t.cols, [](int64_t i) { return i; });
            out_write(&f, codes.data(), codes.size());
        });
    }
    if (!writes) { return; }
    out_close(&f);
    out_rename(name, path);
    out_unfinished.clear();
    out_sync_folder(folder_of(path));
}
