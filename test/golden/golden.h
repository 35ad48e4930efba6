// golden.h: reads the golden files of this folder, which gpt.py writes (it also describes each file and the format).
//
// A file is a list of named tensors, little-endian: "GOLD", int32 version 1, int32 count; per tensor a name of 32 bytes padded with NUL,
// int32 dtype, int32 ndim, int32 dims[4] (unused ones are 1), the data in row-major order. Three dtypes are stored: float32, int32, and
// int8 in units of 1/64 for parameters on that grid, which become floats on reading; so a tensor in memory has either floats or ints.
// golden_open reads every tensor, golden_close frees them. A file that is not as described, or an absent name, ends the test (die).
//
//     Golden g = golden_open("test/golden/case_a.bin");
//     const GoldenTensor* wte = golden_find(g, "wte");  // wte->floats, (V, C) = (wte->dims[0], wte->dims[1])
//     golden_close(&g);
#pragma once
#include "../../core/common.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "golden files are little-endian and are read without swapping bytes");

struct GoldenTensor {
    char name[32];
    int ndim;
    int dims[4];    // unused ones are 1
    size_t count;   // product of dims
    float* floats;  // the data, or NULL when it is integers
    int32_t* ints;  // the data, or NULL when it is floats
};

struct Golden {
    const char* path;  // the caller's string
    int count;
    GoldenTensor* tensors;
};

enum GoldenDtype { GOLDEN_F32 = 0, GOLDEN_I32 = 1, GOLDEN_I8 = 2 };

static inline void golden_read(FILE* file, const char* path, void* out, size_t bytes) {
    if (fread(out, 1, bytes, file) != bytes) { die("%s: %s", path, ferror(file) ? strerror(errno) : "the file is cut short"); }
}

static inline void golden_read_tensor(FILE* file, const char* path, GoldenTensor* t) {
    int32_t head[6];  // dtype, ndim, dims[4]
    golden_read(file, path, t->name, sizeof(t->name));
    golden_read(file, path, head, sizeof(head));
    if (memchr(t->name, '\0', sizeof(t->name)) == NULL) { die("%s: a tensor's name has no end", path); }
    t->ndim = head[1];
    if (t->ndim < 1 || t->ndim > 4) { die("%s: %s has %d dimensions; 1 to 4 are allowed", path, t->name, t->ndim); }
    t->count = 1;
    for (int i = 0; i < 4; i++) {
        t->dims[i] = head[2 + i];
        if (t->dims[i] < 1 || t->dims[i] > 4096 || (i >= t->ndim && t->dims[i] != 1)) {
            die("%s: %s has dims[%d] = %d; 1 to 4096 is allowed, and 1 beyond its %d dimensions", path, t->name, i, t->dims[i], t->ndim);
        }
        t->count *= (size_t)t->dims[i];
    }
    t->floats = NULL;
    t->ints = NULL;
    if (head[0] == GOLDEN_F32) {
        t->floats = (float*)host_alloc(t->count * sizeof(float));
        golden_read(file, path, t->floats, t->count * sizeof(float));
    } else if (head[0] == GOLDEN_I32) {
        t->ints = (int32_t*)host_alloc(t->count * sizeof(int32_t));
        golden_read(file, path, t->ints, t->count * sizeof(int32_t));
    } else if (head[0] == GOLDEN_I8) {
        int8_t* codes = (int8_t*)host_alloc(t->count);
        golden_read(file, path, codes, t->count);
        t->floats = (float*)host_alloc(t->count * sizeof(float));
        for (size_t i = 0; i < t->count; i++) { t->floats[i] = codes[i] / 64.0f; }
        free(codes);
    } else {
        die("%s: %s has dtype %d; 0 (float32), 1 (int32) and 2 (int8 / 64) are known", path, t->name, head[0]);
    }
}

// Reads the whole file. `path` must live as long as the Golden.
static inline Golden golden_open(const char* path) {
    FILE* file = fopen(path, "rb");
    if (file == NULL) { die("%s: %s", path, strerror(errno)); }
    char magic[4];
    int32_t head[2];  // version, count
    golden_read(file, path, magic, sizeof(magic));
    golden_read(file, path, head, sizeof(head));
    if (memcmp(magic, "GOLD", 4) != 0 || head[0] != 1) { die("%s: not a golden file of version 1", path); }
    if (head[1] < 1 || head[1] > 4096) { die("%s: %d tensors; 1 to 4096 are allowed", path, head[1]); }
    Golden g = {path, head[1], (GoldenTensor*)host_alloc((size_t)head[1] * sizeof(GoldenTensor))};
    for (int i = 0; i < g.count; i++) { golden_read_tensor(file, path, &g.tensors[i]); }
    if (fgetc(file) != EOF) { die("%s: bytes follow the last tensor", path); }
    if (ferror(file) || fclose(file) != 0) { die("%s: %s", path, strerror(errno)); }
    return g;
}

// The tensor of that name; dies when there is none. It lives until golden_close.
static inline const GoldenTensor* golden_find(const Golden& g, const char* name) {
    for (int i = 0; i < g.count; i++) {
        if (strcmp(g.tensors[i].name, name) == 0) { return &g.tensors[i]; }
    }
    die("%s has no tensor named %s", g.path, name);
}

static inline void golden_close(Golden* g) {
    for (int i = 0; i < g->count; i++) {
        free(g->tensors[i].floats);
        free(g->tensors[i].ints);
    }
    free(g->tensors);
    *g = Golden{};
}
