// matmul_choice.h: which of the library's algorithms multiplies a shape, as lines of text that outlive the process: in a cache file, in
// checkpoints, and between ranks, which must all compute alike.
//
// A line is  CHECKSUM DEVICE SHAPE ALGORITHM : DEVICE names the GPU and the library's version, as an algorithm means something to that
// version on that GPU only; SHAPE holds every field of a MatmulShape; ALGORITHM is the library's own description, opaque, in hexadecimal.
// Lines of several devices may share a file. Where two lines speak of the same shape on the same device the one that was read first counts.
// A line whose checksum is wrong is left out: its shape is timed again.
//
// What calls the library is matmul_cublaslt.cuh's; all here is the same in both builds. Included by matmul.cuh.
#pragma once
#include <ctype.h>
#include <limits.h>
#include <map>
#include <string>
#include <sys/stat.h>
#include <vector>

struct MatmulAlgorithm { uint8_t bytes[64]; };

// ALGORITHM by "DEVICE SHAPE": in an order that does not depend on how the table came to be
typedef std::map<std::string, std::string> MatmulChoices;

// ---- one line ----

// Of a name and a version, without blanks: "NVIDIA_H100_80GB_HBM3/130101"
static inline std::string choice_device(const char* name, uint64_t version) {
    std::string text;
    for (const char* p = name; *p != '\0'; p++) { text += isalnum((unsigned char)*p) || strchr("-.()", *p) != NULL ? *p : '_'; }
    return text + "/" + std::to_string(version);
}

static inline std::string choice_shape(const MatmulShape* s) {
    char text[256];
    static const char* const scaling[] = {"", "v", "b"};  // by OperandScale
    snprintf(text, sizeof(text), "%d,%d,%d,%d;%" PRId64 ",%" PRId64 ",%" PRId64 ";%" PRId64 ",%" PRId64 ",%" PRId64 ";%s%s%s,%s%s%s,%s%s,%s%s%s",
             s->m, s->n, s->k, s->batch, s->a_ld, s->b_ld, s->d_ld, s->a_stride, s->b_stride, s->d_stride, dtype_names[s->a_dtype], scaling[s->a_scaling],
             s->a_transposed ? "T" : "", dtype_names[s->b_dtype], scaling[s->b_scaling], s->b_transposed ? "T" : "", dtype_names[s->d_dtype], s->accumulate ? "+" : "",
             s->bias ? dtype_names[s->bias_dtype] : "-", s->fast_accumulate ? ",fast" : "", s->unaligned ? ",unaligned" : "");
    return text;
}

static inline std::string choice_key(const std::string& device, const MatmulShape* s) { return device + " " + choice_shape(s); }

static inline std::string choice_hex(const MatmulAlgorithm* a) {
    std::string text;
    for (uint8_t b : a->bytes) {
        text += "0123456789abcdef"[b / 16];
        text += "0123456789abcdef"[b % 16];
    }
    return text;
}

static inline bool choice_unhex(MatmulAlgorithm* a, const std::string& text) {
    if (text.size() != 2 * sizeof(a->bytes) || text.find_first_not_of("0123456789abcdef") != std::string::npos) { return false; }
    auto digit = [&](size_t i) { return text[i] <= '9' ? text[i] - '0' : text[i] - 'a' + 10; };
    for (size_t i = 0; i < sizeof(a->bytes); i++) { a->bytes[i] = (uint8_t)(16 * digit(2 * i) + digit(2 * i + 1)); }
    return true;
}

static inline std::string choice_checksum(const std::string& text) {
    uint64_t h = 0x6d61746d756c0001ull;  // another first number when the form of lines changes
    for (char c : text) { h = mix64(h ^ (unsigned char)c); }
    char hex[24];
    snprintf(hex, sizeof(hex), "%016" PRIx64, h);
    return hex;
}

static inline std::string choice_line(const std::string& key, const std::string& algorithm) {
    std::string text = key + " " + algorithm;
    return choice_checksum(text) + " " + text;
}

// Whether `line` is one that choice_line has written
static inline bool choice_parse(const std::string& line, std::string* key, std::string* algorithm) {
    size_t first = line.find(' '), last = line.rfind(' ');
    if (first != 16 || last <= first) { return false; }
    std::string text = line.substr(first + 1);
    MatmulAlgorithm unused;
    *key = line.substr(first + 1, last - first - 1);
    *algorithm = line.substr(last + 1);
    return choice_checksum(text) == line.substr(0, first) && choice_unhex(&unused, *algorithm);
}

// ---- a table ----

// Adds the lines of `text`; what the table has already stays. Returns how many lines say nothing; those empty or after a # are not meant to.
static inline int choices_parse(MatmulChoices* table, const std::string& text) {
    int damaged = 0;
    for (size_t at = 0; at < text.size();) {
        size_t end = min_of(text.find('\n', at), text.size());
        std::string line = text.substr(at, end - at), key, algorithm;
        at = end + 1;
        if (line.empty() || line[0] == '#') { continue; }
        if (choice_parse(line, &key, &algorithm)) { table->emplace(key, algorithm); } else { damaged++; }
    }
    return damaged;
}

static inline std::string choices_text(const MatmulChoices& table) {
    std::string text;
    for (auto& x : table) { text += choice_line(x.first, x.second) + "\n"; }
    return text;
}

// The algorithm to take, from the seconds of each: the fastest; the library's first where that is at most 2 % slower, as such differences do
// not repeat. Infinite: it failed
static inline int choose_fastest(const double* seconds, int count) {
    int best = 0;
    for (int i = 1; i < count; i++) { best = seconds[i] < seconds[best] ? i : best; }
    return seconds[0] <= 1.02 * seconds[best] ? 0 : best;
}

// ---- a file ----

// Where choices are kept unless the user says: "" where there is no home
static inline std::string choices_path(const std::string& device) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    std::string folder = cache != NULL && cache[0] == '/' ? cache : home != NULL && home[0] == '/' ? std::string(home) + "/.cache" : "";
    if (folder.empty()) { return ""; }
    std::string name = device;
    for (char& c : name) { c = c == '/' ? '-' : c; }
    return folder + "/train_gpt_fp8/matmul-" + name + ".txt";
}

constexpr size_t CHOICES_BYTES = (size_t)16 << 20;  // of a file, at most

// The text of a regular file; "" where there is none, or where it cannot be read
static inline std::string choices_read(const char* path) {
    std::string text;
    struct stat status;
    if (stat(path, &status) != 0 || !S_ISREG(status.st_mode)) { return text; }
    FILE* f = fopen(path, "r");
    if (f == NULL) { return text; }
    char part[4096];
    for (size_t n; text.size() < CHOICES_BYTES && (n = fread(part, 1, sizeof(part), f)) > 0;) { text.append(part, n); }
    fclose(f);
    return text;
}

// Adds the table to the file, whose own lines count before the table's. Written beside it and renamed: who reads meanwhile sees the one or
// the other. False: errno says why not
static inline bool choices_save(const char* path, const MatmulChoices& table) {
    MatmulChoices all;
    std::string before = choices_read(path);
    int damaged = choices_parse(&all, before);
    size_t known = all.size();
    all.insert(table.begin(), table.end());
    if (all.size() == known && damaged == 0 && !before.empty()) { return true; }
    for (const char* p = strchr(path + 1, '/'); path[0] != '\0' && p != NULL; p = strchr(p + 1, '/')) {
        if (mkdir(std::string(path, p).c_str(), 0777) != 0 && errno != EEXIST) { return false; }
    }
    std::string beside = std::string(path) + ".XXXXXX";
    std::string text = "# checksum, GPU and version of cuBLASLt, shape of a matrix product, algorithm\n" + choices_text(all);
    int file = mkstemp(&beside[0]);
    if (file < 0) { return false; }
    mode_t mask = umask(0);
    umask(mask);
    bool written = fchmod(file, 0666 & ~mask) == 0 && write(file, text.data(), text.size()) == (ssize_t)text.size();
    written = close(file) == 0 && written && rename(beside.c_str(), path) == 0;
    if (!written) {
        int why = errno;
        unlink(beside.c_str());
        errno = why;
    }
    return written;
}
