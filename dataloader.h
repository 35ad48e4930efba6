// dataloader.h: token shards and text files, shuffled, blended, sharded over replicas (the ranks of this file), resumable.
//
// SPEC names the data: a glob `data/*.bin`, a list `a.bin,b.bin`, or a blend `0.7:a*.bin,0.3:b*.bin`. Each weighted entry is one source;
// without weights all files together are one source. A file is a shard of llm.c (a header of 256 int32: [0]=20240520 [1]=1 [2]=tokens, then
// uint16 tokens; or [0]=20240801 [1]=7 [2]=tokens, then uint32 tokens) or, without a magic number, text: one token a byte. Version 8 of the
// latter, which llm.c does not know, has a loss mask: bit 31 of a token is set where it does not count in the loss as a target, which is then
// -1 here; as an input it is a token like any other. One run reads one kind of file; shards with and without a mask are one kind.
//
// A window is T+1 tokens: the inputs are the first T, the targets the last T. Windows start every T tokens, so a file of n tokens has
// floor((n-1)/T) of them and no token is a target twice. The windows of a source are numbered 0..W-1; in each epoch they are visited in a
// pseudo-random permutation of these numbers, a function of (seed, source, epoch) that is computed for any one position without a table.
// Samples are counted over the whole run: a call with R ranks and B sequences takes R*B samples, rank r those from r*B on. So R ranks see
// together what one rank sees in R calls, and where a run stands is one number and, for a blend, how many samples each source has given:
// enough to resume at any number of ranks. In a blend, each source has at every moment given its share to within one sample.
//
// Files are read with pread when their turn comes (host memory: one window); at most LOADER_MAX_OPEN of them stay open. What can be seen
// without reading all of a file is refused at loader_open; tokens outside the vocabulary are looked for in the first LOADER_SCAN_TOKENS
// tokens there, and in every window when it is read. The order outlives a run (checkpoints count on it): do not change it lightly.
#pragma once
#include <fcntl.h>     // open
#include <glob.h>      // glob: expansion of data/*.bin
#include <sys/stat.h>  // stat: file sizes
#include "core/files.h"    // what there is like a file that is missing
#include "core/trouble.h"  // error_of

static const int LOADER_HEADER_BYTES = 1024;                  // 256 int32
static const int LOADER_MAX_SOURCES = 64;                     // weighted entries of a blend
static const int LOADER_MAX_OPEN = 64;                        // file descriptors of one loader
static const int LOADER_CHUNK = 64 * 1024;                    // tokens a read while scanning
static const int64_t LOADER_SCAN_TOKENS = 128 * 1024 * 1024;  // tokens checked at open, over all files (about 0.2 s)
static const uint32_t LOADER_MASK_BIT = 1u << 31;             // of a token that does not count in the loss
static const int32_t LOADER_NOT_COUNTED = -1;                 // such a token as a target
// How to come by data, to end a message with
static const char* const LOADER_ADVICE = "allowed: a file, a glob, a list a.bin,b.bin, or a blend 0.7:a*.bin,0.3:b*.bin, of text files or token shards; scripts/tokenize.py makes shards, make demo a text "
    "to try (demo/text.txt)";
static_assert(sizeof(off_t) == 8, "shards may be larger than 2 GiB");

// The kind of a file; the value is the bytes a token takes.
enum LoaderKind { LOADER_TEXT = 1, LOADER_UINT16 = 2, LOADER_UINT32 = 4 };

// Which windows of each file: with a split F the last F of them (rounded down, at least one) validate, the others train. The cut is between
// two windows, and their targets are disjoint: no token is a target in both parts.
enum LoaderPart { LOADER_ALL, LOADER_TRAIN, LOADER_VAL };

struct DataLoaderConfig {
    const char* flag;  // the option that gave spec, for messages: "--train-data". Both strings must outlive the loader
    const char* spec;  // glob, list, blend
    int64_t vocab;     // tokens must be below; 0: 50257 for uint16 shards, 256 for text, refused for uint32 shards
    int seq_len;       // T >= 1
    uint64_t seed;     // of the order
    bool shuffle;      // false: windows in the order of the files (validation)
    double val_split;  // F in [0, 1)
    LoaderPart part;   // LOADER_ALL ignores the split
    int rank, ranks;   // of the replicas
    int micro_batch;   // B >= 1: sequences of one rank in one call
};

struct DataFile {
    char* path;
    int fd;                // -1: not open at the moment
    bool masked;           // its tokens say whether they count in the loss
    int64_t tokens;        // 0 until the header has been checked
    int64_t skip;          // windows of the file before the part that this loader reads
    int64_t windows;       // windows of that part
    int64_t first_window;  // number of its first window within the source
};

struct DataSource {
    const char* entry;      // its place in the SPEC, for messages
    double weight;          // share of the samples; the weights of all sources add up to 1
    int first_file, files;  // its files are files[first_file] and the next ones
    int64_t windows;        // W: samples in an epoch of this source
    int64_t taken;          // samples given so far over all ranks: epoch taken / W, position taken % W
};

struct DataLoader {
    DataLoaderConfig config;
    LoaderKind kind;
    bool masked;          // one file at least is
    int64_t vocab;        // given or derived
    DataFile* files;      // (file_count) in the order of the SPEC, a glob's matches sorted by bytes
    int file_count;
    DataSource sources[LOADER_MAX_SOURCES];
    int source_count;
    int64_t windows;      // of all sources
    int64_t samples;      // given so far over all ranks
    int open_files[LOADER_MAX_OPEN];  // indices of the open files, -1 where free
    int next_open;        // the entry of open_files that is reused next, in turn
    void* raw;            // (max(T+1, LOADER_CHUNK)) tokens as they are in the file
    int32_t* tokens;      // (max(T+1, LOADER_CHUNK)) the same, widened, their mask bits still on them
};

// Where a run stands: everything that a checkpoint must keep. It does not depend on the number of ranks or the micro-batch.
struct LoaderPosition {
    int64_t samples;                      // over all ranks since the start of the run
    int sources;
    int64_t taken[LOADER_MAX_SOURCES];    // (sources) samples given by each
    int64_t windows[LOADER_MAX_SOURCES];  // (sources) samples in an epoch of each: how loader_seek knows that the data is still the same
};

// ---- order ----

// Image of index under a pseudo-random permutation of 0..n-1 chosen by key: a Feistel network over 2*half bits, walked until it falls below
// n (each cycle of the network's permutation loses its elements from n on: still a permutation). The domain is below 4n, so less than four
// steps on average; it has at least 256 elements, since networks of very few bits make poor permutations.
static inline int64_t loader_permute(int64_t index, int64_t n, uint64_t key) {
    int half = 4;
    while (((int64_t)1 << (2 * half)) < n) { half++; }
    uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t x = (uint64_t)index;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t next = left ^ (mix64(key ^ (round << 32 | right)) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// The source of the next sample. Taking the one that lags most drifts beyond one sample with five sources or more, so this is Tijdeman's
// algorithm (The chairman assignment problem, 1980): of the sources that lag by at least d = 1/(2S-2), the one that would be the first to
// lag by more than 1-d. It keeps |weight*samples - taken| <= 1-d for all sources at all times. The slack keeps rounding from leaving none
// to choose.
static inline int loader_next_source(const DataLoader* loader) {
    if (loader->source_count == 1) { return 0; }
    double d = 1.0 / (2 * loader->source_count - 2), slack = 1e-4, earliest = INFINITY;
    int chosen = 0;
    for (int s = 0; s < loader->source_count; s++) {
        const DataSource* source = &loader->sources[s];
        double lag = source->weight * (double)(loader->samples + 1) - (double)source->taken;
        double deadline = ((double)source->taken + 1.0 - d) / source->weight;  // in samples
        if (lag >= d - slack && deadline < earliest) {
            earliest = deadline;
            chosen = s;
        }
    }
    return chosen;
}

// The file and the window in it for a source's sample number `taken`, counted from the start of the run.
static inline int loader_locate(int64_t* window, const DataLoader* loader, int source_index, int64_t taken) {
    const DataSource* source = &loader->sources[source_index];
    int64_t epoch = taken / source->windows, index = taken % source->windows;
    if (loader->config.shuffle) {
        uint64_t key = mix64(mix64(mix64(loader->config.seed) + (uint64_t)source_index) + (uint64_t)epoch);
        index = loader_permute(index, source->windows, key);
    }
    int low = source->first_file, high = low + source->files;  // the last file whose first window is not beyond index
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (loader->files[middle].first_window <= index) { low = middle; } else { high = middle; }
    }
    const DataFile* file = &loader->files[low];
    *window = file->skip + index - file->first_window;
    return low;
}

// ---- files ----

// Descriptor of a file, opened if it is not; the one that has been open longest makes room.
static inline int loader_descriptor(DataLoader* loader, int index) {
    DataFile* file = &loader->files[index];
    if (file->fd >= 0) { return file->fd; }
    int* slot = &loader->open_files[loader->next_open];
    loader->next_open = (loader->next_open + 1) % LOADER_MAX_OPEN;
    if (*slot >= 0) {
        close(loader->files[*slot].fd);
        loader->files[*slot].fd = -1;
        *slot = -1;
    }
    do { file->fd = open(file->path, O_RDONLY | O_CLOEXEC); } while (file->fd < 0 && errno == EINTR);
    if (file->fd < 0 && file->tokens == 0) { bad_input("%s: %s cannot be read: %s", loader->config.flag, file->path, error_of(errno).c_str()); }
    if (file->fd < 0) { die("%s: %s cannot be opened any more: %s", loader->config.flag, file->path, error_of(errno).c_str()); }
    *slot = index;
    return file->fd;
}

static inline void loader_pread(void* out, DataLoader* loader, int index, size_t bytes, int64_t offset) {
    int fd = loader_descriptor(loader, index);
    const char* path = loader->files[index].path;
    char* to = (char*)out;
    while (bytes > 0) {
        ssize_t got = pread(fd, to, bytes, offset);
        if (got < 0 && errno == EINTR) { continue; }
        if (got < 0) { die("%s: reading %s at byte %" PRId64 " failed: %s", loader->config.flag, path, offset, strerror(errno)); }
        if (got == 0) { die("%s: %s ends at byte %" PRId64 ": it was cut while in use", loader->config.flag, path, offset); }
        to += got;
        bytes -= (size_t)got;
        offset += got;
    }
}

// Widens n tokens and returns the largest, of their `bits`.
template <class Token> static inline uint32_t loader_widen(int32_t* out, const void* raw, int64_t n, uint32_t bits) {
    const Token* in = (const Token*)raw;
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        out[i] = (int32_t)in[i];
        largest = max_of(largest, (uint32_t)in[i] & bits);
    }
    return largest;
}

// Reads tokens first..first+n-1 of a file into loader->tokens; refuses those outside the vocabulary.
static inline void loader_read_tokens(DataLoader* loader, int index, int64_t first, int64_t n) {
    int64_t header = loader->kind == LOADER_TEXT ? 0 : LOADER_HEADER_BYTES;
    loader_pread(loader->raw, loader, index, (size_t)(n * loader->kind), header + first * loader->kind);
    uint32_t largest, bits = loader->files[index].masked ? ~LOADER_MASK_BIT : ~0u;
    switch (loader->kind) {
        case LOADER_TEXT: largest = loader_widen<uint8_t>(loader->tokens, loader->raw, n, bits); break;
        case LOADER_UINT16: largest = loader_widen<uint16_t>(loader->tokens, loader->raw, n, bits); break;
        default: largest = loader_widen<uint32_t>(loader->tokens, loader->raw, n, bits); break;
    }
    if (largest < loader->vocab) { return; }
    int64_t i = 0;
    while (((uint32_t)loader->tokens[i] & bits) < loader->vocab) { i++; }
    bad_input("%s: %s: the token at offset %" PRId64 " is %u; allowed in a vocabulary of %" PRId64 ": 0 to %" PRId64 " (--vocab N sets it)",
              loader->config.flag, loader->files[index].path, first + i, (uint32_t)loader->tokens[i] & bits, loader->vocab, loader->vocab - 1);
}

// ---- opening ----

// Finds out what a file is and how many tokens it has; refuses what cannot be trained on. The first file decides the kind of all.
static inline void loader_check_file(DataLoader* loader, int index) {
    const char* flag = loader->config.flag;
    DataFile* file = &loader->files[index];
    const char* path = file->path;
    struct stat info;
    if (stat(path, &info) != 0) { bad_input("%s: %s cannot be read: %s", flag, path, strerror(errno)); }
    if (!S_ISREG(info.st_mode)) {
        bad_input("%s: %s is %s; allowed: regular files", flag, path, S_ISDIR(info.st_mode) ? "a folder" : "a pipe or device");
    }
    int64_t bytes = info.st_size;
    if (bytes == 0) { bad_input("%s: %s is empty (allowed: token shards and text files)", flag, path); }

    int32_t header[LOADER_HEADER_BYTES / 4] = {0};
    loader_pread(header, loader, index, (size_t)min_of(bytes, (int64_t)LOADER_HEADER_BYTES), 0);
    int32_t magic = bytes >= 4 ? header[0] : 0;
    const char* other = magic == 20240522 ? "multiple-choice" : magic == 20240326 ? "model" : magic == 20240328 ? "tokenizer" : NULL;
    if (other != NULL) {
        bad_input("%s: %s is a %s file (magic %d); allowed: token shards and text files%s", flag, path, other, magic, magic == 20240522 ? "; --eval-data takes it" : "");
    }

    LoaderKind kind = magic == 20240520 ? LOADER_UINT16 : magic == 20240801 ? LOADER_UINT32 : LOADER_TEXT;
    size_t length = strlen(path);
    if (kind == LOADER_TEXT) {
        if (length >= 4 && strcmp(path + length - 4, ".bin") == 0) {
            bad_input("%s: %s has the magic number %d; allowed in a .bin file: 20240520 (uint16 tokens), 20240801 (uint32 tokens), as scripts/tokenize.py writes them", flag,
                      path, magic);
        }
        file->tokens = bytes;
    } else {
        file->masked = kind == LOADER_UINT32 && header[1] == 8;
        loader->masked |= file->masked;
        if (bytes < LOADER_HEADER_BYTES) {
            bad_input("%s: %s is truncated: %" PRId64 " bytes, a shard's header alone has %d", flag, path, bytes, LOADER_HEADER_BYTES);
        }
        if (header[1] != (kind == LOADER_UINT16 ? 1 : 7) && !file->masked) {
            bad_input("%s: %s has version %d; allowed with magic %d: %s", flag, path, header[1], magic,
                      kind == LOADER_UINT16 ? "1" : "7, and 8 with a loss mask");
        }
        // The file's size is the truth. The header's count has 32 bits and wraps around in larger shards, where the low bits must agree.
        int64_t count = (bytes - LOADER_HEADER_BYTES) / kind;
        if ((bytes - LOADER_HEADER_BYTES) % kind != 0 || (uint32_t)count != (uint32_t)header[2]) {
            int64_t expected = LOADER_HEADER_BYTES + (int64_t)(uint32_t)header[2] * kind;
            bad_input("%s: %s is truncated or damaged: it has %" PRId64 " bytes; allowed by its header's %u tokens: %" PRId64, flag, path,
                      bytes, (uint32_t)header[2], expected);
        }
        if (count == 0) { bad_input("%s: %s is empty: a shard of 0 tokens", flag, path); }
        file->tokens = count;
    }
    if (index == 0) { loader->kind = kind; }
    if (kind != loader->kind) {
        const char* names[] = {"", "text", "uint16 tokens", "", "uint32 tokens"};
        bad_input("%s: %s is %s but %s is %s; allowed: one kind of file", flag, loader->files[0].path, names[loader->kind], path,
                  names[kind]);
    }
    if (file->tokens - 1 < loader->config.seq_len) {
        bad_input("%s: %s has %" PRId64 " tokens, less than one window; --seq-len %d needs at least %" PRId64 "; allowed: more data, or --seq-len %" PRId64
                  " at most", flag, path, file->tokens, loader->config.seq_len, (int64_t)loader->config.seq_len + 1, file->tokens - 1);
    }
}

static inline void loader_add_file(DataLoader* loader, const char* path) {
    loader->files = (DataFile*)realloc(loader->files, (size_t)(loader->file_count + 1) * sizeof(DataFile));
    char* copy = strdup(path);
    if (loader->files == NULL || copy == NULL) { die("out of host memory while listing data files"); }
    loader->files[loader->file_count++] = {copy, -1, false, 0, 0, 0, 0};
}

static inline int loader_compare_paths(const void* a, const void* b) { return strcmp(*(const char* const*)a, *(const char* const*)b); }

// Adds the files of one entry: the file of that very name if there is one, else what the pattern matches, sorted by bytes in any locale.
static inline void loader_add_matches(DataLoader* loader, const char* pattern) {
    const char* flag = loader->config.flag;
    struct stat info;
    if (stat(pattern, &info) == 0) { return loader_add_file(loader, pattern); }
    if (strpbrk(pattern, "*?[") == NULL) {
        int error = errno;
        bad_input("%s: %s cannot be read: %s; %s; %s", flag, pattern, strerror(error), nearest_text(pattern).c_str(), LOADER_ADVICE);
    }
    glob_t matches;
    int result = glob(pattern, GLOB_ERR | GLOB_NOSORT, NULL, &matches);
    if (result == GLOB_NOSPACE) { die("out of host memory while listing data files"); }
    if (result != 0) { bad_input("%s: '%s' matches no file: %s; %s", flag, pattern, nearest_text(pattern).c_str(), LOADER_ADVICE); }
    qsort(matches.gl_pathv, matches.gl_pathc, sizeof(char*), loader_compare_paths);
    for (size_t i = 0; i < matches.gl_pathc; i++) { loader_add_file(loader, matches.gl_pathv[i]); }
    globfree(&matches);
}

// Fills files and sources from the SPEC.
static inline void loader_parse_spec(DataLoader* loader) {
    const char* flag = loader->config.flag;
    const char* spec = loader->config.spec;
    bool weighted = false;
    double total = 0.0;
    for (const char *entry = spec, *end; entry != NULL; entry = *end == ',' ? end + 1 : NULL) {
        end = entry + strcspn(entry, ",");
        char* text = strndup(entry, (size_t)(end - entry));
        if (text == NULL) { die("out of host memory while listing data files"); }
        char* after;
        double weight = strtod(text, &after);
        bool has_weight = after != text && *after == ':';
        const char* pattern = has_weight ? after + 1 : text;
        if (*pattern == '\0') { bad_input("%s: '%s' has an empty entry; allowed: a file or glob in each", flag, spec); }
        if (entry == spec) { weighted = has_weight; }
        if (has_weight != weighted) { bad_input("%s: some entries of '%s' have no weight; allowed: weights in all or none", flag, spec); }
        if (has_weight && !(weight > 0.0 && weight <= 1e9)) {
            bad_input("%s: the weight in '%s' is %g; allowed: above 0, up to 1e9", flag, text, weight);
        }
        if (weighted || entry == spec) {
            if (loader->source_count == LOADER_MAX_SOURCES) {
                bad_input("%s: '%s' has more weighted entries than are allowed: %d", flag, spec, LOADER_MAX_SOURCES);
            }
            loader->sources[loader->source_count++] = {entry, weighted ? weight : 1.0, loader->file_count, 0, 0, 0};
            total += loader->sources[loader->source_count - 1].weight;
        }
        loader_add_matches(loader, pattern);
        DataSource* source = &loader->sources[loader->source_count - 1];
        source->files = loader->file_count - source->first_file;
        free(text);
    }
    for (int s = 0; s < loader->source_count; s++) { loader->sources[s].weight /= total; }
}

// Numbers the windows of the loader's part of each file.
static inline void loader_count_windows(DataLoader* loader) {
    const DataLoaderConfig* config = &loader->config;
    const char* part = config->part == LOADER_TRAIN ? "the training part of " : config->part == LOADER_VAL ? "the validation part of " : "";
    for (int s = 0; s < loader->source_count; s++) {
        DataSource* source = &loader->sources[s];
        for (int f = source->first_file; f < source->first_file + source->files; f++) {
            DataFile* file = &loader->files[f];
            int64_t all = (file->tokens - 1) / config->seq_len;
            int64_t val = config->val_split > 0.0 ? max_of((int64_t)1, (int64_t)(config->val_split * (double)all)) : 0;
            file->skip = config->part == LOADER_VAL ? all - val : 0;
            file->windows = config->part == LOADER_VAL ? val : config->part == LOADER_TRAIN ? all - val : all;
            file->first_window = source->windows;
            source->windows += file->windows;
        }
        loader->windows += source->windows;
        if (source->windows == 0) {
            bad_input("%s: %s'%.*s' has no window of %d tokens (validation split %g); allowed: more data or a smaller --seq-len",
                      config->flag, part, (int)strcspn(source->entry, loader->source_count > 1 ? "," : ""), source->entry,
                      config->seq_len + 1, config->val_split);
        }
    }
    int64_t global = (int64_t)config->ranks * config->micro_batch;
    if (loader->windows < global) {
        bad_input("%s: %s'%s' has %" PRId64 " windows of %d tokens, too few for one micro-batch: %d replicas x --micro-batch %d = %" PRId64
                  "; allowed: more data, a smaller --seq-len or --micro-batch", config->flag, part, config->spec, loader->windows,
                  config->seq_len + 1, config->ranks, config->micro_batch, global);
    }
}

// Opens the data of a SPEC at sample 0. Wrong files and values end the process (bad_input).
static inline void loader_open(DataLoader* loader, const DataLoaderConfig* config) {
    memset(loader, 0, sizeof(*loader));
    loader->config = *config;
    for (int i = 0; i < LOADER_MAX_OPEN; i++) { loader->open_files[i] = -1; }
    if (!(config->val_split >= 0.0 && config->val_split < 1.0)) {
        bad_input("%s: a validation split of %g is not allowed: 0 <= split < 1", config->flag, config->val_split);
    }
    if (config->vocab < 0 || config->vocab > INT32_MAX) {
        bad_input("--vocab: %" PRId64 " is not allowed: 1 to %d, or 0 to take it from the data", config->vocab, INT32_MAX);
    }
    loader_parse_spec(loader);
    for (int f = 0; f < loader->file_count; f++) { loader_check_file(loader, f); }
    loader->vocab = config->vocab > 0 ? config->vocab : loader->kind == LOADER_UINT16 ? 50257 : 256;
    if (config->vocab == 0 && loader->kind == LOADER_UINT32) {
        bad_input("%s: %s has uint32 tokens, which do not tell the vocabulary; --vocab N is required", config->flag, loader->files[0].path);
    }
    loader_count_windows(loader);

    int64_t capacity = max_of((int64_t)config->seq_len + 1, (int64_t)LOADER_CHUNK);
    loader->raw = host_alloc((size_t)(capacity * loader->kind));
    loader->tokens = (int32_t*)host_alloc((size_t)capacity * sizeof(int32_t));
    int64_t budget = loader->vocab >= (int64_t)1 << (8 * loader->kind) ? 0 : LOADER_SCAN_TOKENS;  // no token of this kind can be outside
    for (int f = 0; f < loader->file_count; f++) {
        int64_t scan = min_of(loader->files[f].tokens, budget);
        for (int64_t at = 0; at < scan; at += LOADER_CHUNK) { loader_read_tokens(loader, f, at, min_of(scan - at, (int64_t)LOADER_CHUNK)); }
        budget -= scan;
    }
}

static inline void loader_close(DataLoader* loader) {
    for (int f = 0; f < loader->file_count; f++) {
        if (loader->files[f].fd >= 0) { close(loader->files[f].fd); }
        free(loader->files[f].path);
    }
    free(loader->files);
    free(loader->raw);
    free(loader->tokens);
    memset(loader, 0, sizeof(*loader));
}

// ---- use ----

// This rank's share of the next micro-batch of all ranks: inputs (B, T), targets (B, T), the token that follows each input, or
// LOADER_NOT_COUNTED.
static inline void loader_next(DataLoader* loader, int32_t* inputs, int32_t* targets) {
    const DataLoaderConfig* config = &loader->config;
    int64_t T = config->seq_len, B = config->micro_batch;
    for (int64_t i = 0; i < config->ranks * B; i++) {
        int s = loader_next_source(loader);
        int64_t taken = loader->sources[s].taken++;
        loader->samples++;
        if (i / B != config->rank) { continue; }
        int64_t window;
        int f = loader_locate(&window, loader, s, taken);
        loader_read_tokens(loader, f, window * T, T + 1);
        const int32_t* all = loader->tokens;  // negative where the mask bit is set, which no token of a vocabulary has
        int32_t *in = inputs + i % B * T, *out = targets + i % B * T;
        for (int64_t t = 0; t < T; t++) {
            in[t] = all[t] & INT32_MAX;
            out[t] = all[t + 1] < 0 ? LOADER_NOT_COUNTED : all[t + 1];
        }
    }
}

// Back to sample 0: the next calls give the same windows again (validation).
static inline void loader_rewind(DataLoader* loader) {
    loader->samples = 0;
    for (int s = 0; s < loader->source_count; s++) { loader->sources[s].taken = 0; }
}

static inline LoaderPosition loader_position(const DataLoader* loader) {
    LoaderPosition position = {};
    position.samples = loader->samples;
    position.sources = loader->source_count;
    for (int s = 0; s < loader->source_count; s++) {
        position.taken[s] = loader->sources[s].taken;
        position.windows[s] = loader->sources[s].windows;
    }
    return position;
}

// Continues where another run with the same data, weights, window length and seed stood, at any number of ranks. Refuses a position that
// this data cannot have: another number of sources or windows, or shares that these weights do not give.
static inline void loader_seek(DataLoader* loader, const LoaderPosition* position) {
    const char* flag = loader->config.flag;
    if (position->sources != loader->source_count) {
        bad_input("%s: '%s' has %d sources, the checkpoint's data had %d; allowed: the same data", flag, loader->config.spec,
                  loader->source_count, position->sources);
    }
    int64_t sum = 0;
    for (int s = 0; s < position->sources; s++) {
        DataSource* source = &loader->sources[s];
        if (position->windows[s] != source->windows) {
            bad_input("%s: source %d of '%s' has %" PRId64 " windows, in the checkpoint %" PRId64 "; allowed: the same data and --seq-len",
                      flag, s + 1, loader->config.spec, source->windows, position->windows[s]);
        }
        if (position->taken[s] < 0 || fabs(source->weight * (double)position->samples - (double)position->taken[s]) > 1.0) {
            bad_input("%s: source %d of '%s' has weight %g, it gave %" PRId64 " of %" PRId64 " samples; allowed: the same weights",
                      flag, s + 1, loader->config.spec, source->weight, position->taken[s], position->samples);
        }
        source->taken = position->taken[s];
        sum += position->taken[s];
    }
    if (sum != position->samples) {
        bad_input("%s: the checkpoint counts %" PRId64 " samples but %" PRId64 " over its data sources", flag, position->samples, sum);
    }
    loader->samples = position->samples;
}

// Tells other data of the same size: of every file its length and some of its tokens, at its beginning, middle and end
static inline uint64_t loader_fingerprint(DataLoader* loader) {
    uint64_t print = 0;
    for (int f = 0; f < loader->file_count; f++) {
        int64_t tokens = loader->files[f].tokens, n = min_of(tokens, (int64_t)1024);
        print = mix64(print ^ (uint64_t)tokens);
        for (int64_t first : {(int64_t)0, (tokens - n) / 2, tokens - n}) {
            loader_read_tokens(loader, f, first, n);
            for (int64_t i = 0; i < n; i++) { print = mix64(print ^ (uint32_t)loader->tokens[i]); }
        }
    }
    return print;
}

static inline int64_t loader_windows(const DataLoader* loader) { return loader->windows; }
static inline int64_t loader_tokens(const DataLoader* loader) { return loader->windows * loader->config.seq_len; }  // targets in an epoch, those too that do not count
static inline double loader_epochs(const DataLoader* loader) { return (double)loader->samples / (double)loader->windows; }  // passes so far

static inline const char* loader_kind_name(const DataLoader* loader) {
    return loader->kind == LOADER_TEXT ? "text" : loader->kind == LOADER_UINT16 ? "uint16 shards" : loader->masked ? "uint32 shards with a loss mask" : "uint32 shards";
}
