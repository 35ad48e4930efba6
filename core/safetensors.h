// safetensors.h: reads and writes files of tensors in the safetensors format, as its own library does.
//
// A file is 8 bytes, the length N of the header, little-endian; N bytes of JSON, {"__metadata__": {text: text}, "NAME": {"dtype": "F16", "shape": [2, 3],
// "data_offsets": [from, to]}, …}, padded by spaces; then the tensors' bytes, row-major, where the offsets say: one behind the other, without a hole.
//
// To write: add all tensors, which fixes their places; write safetensors_header(), then their bytes. To read: safetensors_open() believes nothing: lengths,
// JSON, types, shapes and offsets must agree with each other and with the file. What is wrong is returned as a sentence, since a reader may have another
// file to turn to.
#pragma once
#include "files.h"
#include "float8.cuh"
#include <json-c/json.h>

constexpr uint64_t SAFETENSORS_MOST_HEADER = 100000000;  // as its own library allows
constexpr size_t SAFETENSORS_ALIGNMENT = 8;              // of the tensors' first byte in the file

// Types beyond DType, which has no integers
enum SafeType { SAFE_FP32, SAFE_BF16, SAFE_FP16, SAFE_E4M3, SAFE_E5M2, SAFE_UE5M3, SAFE_U8, SAFE_I8, SAFE_I32, SAFE_I64, SAFE_FP64,
                SAFE_BOOL, SAFE_I16, SAFE_U16, SAFE_U32, SAFE_U64, SAFE_TYPES };
static const struct { const char* name; int bytes; } safe_types[SAFE_TYPES] = {
    {"F32", 4}, {"BF16", 2}, {"F16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1}, {"U8", 1}, {"I8", 1}, {"I32", 4}, {"I64", 8}, {"F64", 8},
    {"BOOL", 1}, {"I16", 2}, {"U16", 2}, {"U32", 4}, {"U64", 8}};
static inline SafeType safe_type(DType t) { return (SafeType)t; }  // UE5M3 has no name there: its codes are U8
static_assert((int)SAFE_UE5M3 == (int)UE5M3 && (int)SAFE_FP32 == (int)FP32, "SafeType begins like DType");

struct SafeTensor {
    std::string name;
    SafeType type;
    std::vector<int64_t> shape;
    uint64_t begin, end;  // bytes behind the header
};

struct SafeTensors {
    std::string path;
    int fd = -1;           // -1: not open
    uint64_t data = 0;     // offset of the tensors' first byte in the file
    uint64_t bytes = 0;    // of all tensors
    std::vector<SafeTensor> tensors;                             // by their places
    std::vector<std::pair<std::string, std::string>> metadata;
};

static inline int64_t safe_elements(const SafeTensor* t) {
    int64_t n = 1;
    for (int64_t d : t->shape) { n *= d; }
    return n;
}

// ---- writing ----

// Returns the place of the tensor's first byte behind the header
static inline uint64_t safetensors_add(SafeTensors* file, const std::string& name, SafeType type, const std::vector<int64_t>& shape) {
    SafeTensor t = {name, type, shape, file->bytes, 0};
    t.end = t.begin + (uint64_t)safe_elements(&t) * (uint64_t)safe_types[type].bytes;
    file->bytes = t.end;
    file->tensors.push_back(t);
    return t.begin;
}

// The bytes of the file before the tensors
static inline std::string safetensors_header(const SafeTensors* file) {
    json_object* header = json_object_new_object();
    if (!file->metadata.empty()) {
        json_object* metadata = json_object_new_object();
        for (auto& m : file->metadata) { json_object_object_add(metadata, m.first.c_str(), json_object_new_string(m.second.c_str())); }
        json_object_object_add(header, "__metadata__", metadata);
    }
    for (const SafeTensor& t : file->tensors) {
        json_object *one = json_object_new_object(), *shape = json_object_new_array(), *offsets = json_object_new_array();
        json_object_object_add(one, "dtype", json_object_new_string(safe_types[t.type].name));
        for (int64_t d : t.shape) { json_object_array_add(shape, json_object_new_int64(d)); }
        json_object_object_add(one, "shape", shape);
        json_object_array_add(offsets, json_object_new_int64((int64_t)t.begin));
        json_object_array_add(offsets, json_object_new_int64((int64_t)t.end));
        json_object_object_add(one, "data_offsets", offsets);
        json_object_object_add(header, t.name.c_str(), one);
    }
    std::string text = json_object_to_json_string_ext(header, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
    json_object_put(header);
    text.resize(round_up(text.size(), SAFETENSORS_ALIGNMENT), ' ');
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; i++) { bytes[(size_t)i] = (char)((uint64_t)text.size() >> (8 * i) & 0xff); }
    return bytes + text;
}

// ---- reading ----

static inline void safetensors_close(SafeTensors* file) {
    if (file->fd >= 0) { close(file->fd); }
    *file = SafeTensors{};
}

// A whole number of 0 and more; -1: it is none
static inline int64_t json_count(json_object* o) {
    return json_object_is_type(o, json_type_int) && json_object_get_int64(o) >= 0 && json_object_get_uint64(o) <= INT64_MAX ? json_object_get_int64(o) : -1;
}

// One entry of the header, or what is wrong with it
static inline std::string safetensors_entry(SafeTensor* t, const char* name, json_object* entry) {
    json_object *dtype = NULL, *shape = NULL, *offsets = NULL;
    t->name = name;
    if (!json_object_is_type(entry, json_type_object) || !json_object_object_get_ex(entry, "dtype", &dtype) || !json_object_object_get_ex(entry, "shape", &shape)
        || !json_object_object_get_ex(entry, "data_offsets", &offsets) || !json_object_is_type(dtype, json_type_string) || !json_object_is_type(shape, json_type_array)
        || !json_object_is_type(offsets, json_type_array) || json_object_array_length(offsets) != 2) {
        return "tensor '" + t->name + "' lacks a dtype, shape or data_offsets";
    }
    int type = 0;
    while (type < SAFE_TYPES && strcmp(safe_types[type].name, json_object_get_string(dtype)) != 0) { type++; }
    if (type == SAFE_TYPES) { return "tensor '" + t->name + "' is of the type '" + json_object_get_string(dtype) + "', which is not known here"; }
    t->type = type == SAFE_UE5M3 ? SAFE_U8 : (SafeType)type;
    const int64_t most = (int64_t)1 << 56;  // bytes of a tensor, so that no sum overflows
    int64_t bytes = safe_types[type].bytes;
    for (size_t i = 0; i < json_object_array_length(shape); i++) {
        int64_t d = json_count(json_object_array_get_idx(shape, i));
        if (d < 0 || (d > 0 && bytes > most / d)) { return "tensor '" + t->name + "' has a shape that no tensor has"; }
        bytes *= d;
        t->shape.push_back(d);
    }
    int64_t begin = json_count(json_object_array_get_idx(offsets, 0)), end = json_count(json_object_array_get_idx(offsets, 1));
    if (begin < 0 || end < begin || end - begin != bytes) {
        return "tensor '" + t->name + "' takes " + std::to_string(bytes) + " bytes, and its data_offsets give it others";
    }
    t->begin = (uint64_t)begin;
    t->end = (uint64_t)end;
    return "";
}

// The names in an object's text, of which a parser keeps one where several are alike: colons outside of texts and of what is nested
static inline size_t names_written_in(const std::string& text) {
    size_t names = 0;
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); i++) {
        char c = text[i];
        if (quoted && c == '\\') { i++; continue; }
        if (c == '"') { quoted = !quoted; }
        if (quoted) { continue; }
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        names += c == ':' && depth == 1;
    }
    return names;
}

// From the JSON of a header to the tensors, by their places, which must fill `room` bytes; or what is wrong with it
static inline std::string safetensors_entries(SafeTensors* file, const std::string& text, uint64_t room) {
    json_tokener* parser = json_tokener_new_ex(8);
    if (parser == NULL) { die("out of host memory: a JSON parser"); }
    json_tokener_set_flags(parser, JSON_TOKENER_STRICT | JSON_TOKENER_ALLOW_TRAILING_CHARS);  // what follows is looked at below
    json_object* header = json_tokener_parse_ex(parser, text.c_str(), (int)text.size());
    size_t used = json_tokener_get_parse_end(parser);
    bool good = header != NULL && json_tokener_get_error(parser) == json_tokener_success && json_object_is_type(header, json_type_object)
             && text.find_first_not_of(' ', used) == std::string::npos;
    json_tokener_free(parser);
    std::string wrong = !good ? "its header is no JSON object" : names_written_in(text) != (size_t)json_object_object_length(header) ? "two of its tensors have one name" : "";
    if (wrong.empty()) {
        json_object_object_foreach(header, name, entry) {
            if (strcmp(name, "__metadata__") == 0) {
                if (!json_object_is_type(entry, json_type_object)) { wrong = "its __metadata__ is no JSON object"; break; }
                json_object_object_foreach(entry, key, value) {
                    if (!json_object_is_type(value, json_type_string)) { wrong = "its __metadata__ holds something else than text"; break; }
                    file->metadata.push_back({key, json_object_get_string(value)});
                }
                if (!wrong.empty()) { break; }
                continue;
            }
            SafeTensor t = {};
            wrong = safetensors_entry(&t, name, entry);
            if (!wrong.empty()) { break; }
            file->tensors.push_back(t);
        }
    }
    json_object_put(header);
    if (!wrong.empty()) { return wrong; }
    std::sort(file->tensors.begin(), file->tensors.end(), [](const SafeTensor& a, const SafeTensor& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
    uint64_t at = 0;
    for (const SafeTensor& t : file->tensors) {
        if (t.begin != at) { return "tensor '" + t.name + "' does not begin where the one before it ends"; }
        at = t.end;
    }
    if (at != room) { return "its tensors take " + std::to_string(at) + " bytes, and it has " + std::to_string(room) + " for them"; }
    return "";
}

// Opens a file and reads its header. Returns what is wrong with the file; "": nothing, and it is open.
static inline std::string safetensors_open(SafeTensors* file, const std::string& path) {
    *file = SafeTensors{};
    auto refuse = [=](const std::string& why) {
        safetensors_close(file);
        return why;
    };
    file->fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is not waited for: it is refused
    if (file->fd < 0) { return refuse(strerror(errno)); }
    struct stat status;
    if (fstat(file->fd, &status) != 0) { return refuse(strerror(errno)); }
    if (!S_ISREG(status.st_mode)) { return refuse("it is not a file"); }
    unsigned char length[8];
    if (status.st_size < 8) { return refuse("it has " + std::to_string(status.st_size) + " bytes, and the length of the header alone takes 8"); }
    std::string wrong = read_fully(file->fd, length, 8, 0);
    if (!wrong.empty()) { return refuse(wrong); }
    uint64_t header = 0, size = (uint64_t)status.st_size;
    for (int i = 7; i >= 0; i--) { header = header << 8 | length[i]; }
    if (header > SAFETENSORS_MOST_HEADER || header > size - 8) {
        return refuse("its header takes " + std::to_string(header) + " bytes, it says, and the file has " + std::to_string(size));
    }
    std::string text(header, '\0');
    wrong = read_fully(file->fd, &text[0], header, 8);
    if (!wrong.empty()) { return refuse(wrong); }
    wrong = safetensors_entries(file, text, size - 8 - header);
    if (!wrong.empty()) { return refuse(wrong); }
    file->path = path;
    file->data = 8 + header;
    file->bytes = size - 8 - header;
    return "";
}

static inline const SafeTensor* safetensors_find(const SafeTensors* file, const std::string& name) {
    for (const SafeTensor& t : file->tensors) {
        if (t.name == name) { return &t; }
    }
    return NULL;
}

static inline const char* safetensors_text(const SafeTensors* file, const char* key) {  // of the metadata; NULL: not there
    for (auto& m : file->metadata) {
        if (m.first == key) { return m.second.c_str(); }
    }
    return NULL;
}

// `n` elements of a tensor from number `first` on, as they are in the file; or why not
static inline std::string safetensors_read(void* out, const SafeTensors* file, const SafeTensor* t, int64_t first, int64_t n) {
    uint64_t each = (uint64_t)safe_types[t->type].bytes;
    if (first < 0 || n < 0 || first + n > safe_elements(t)) { die("%s: elements %" PRId64 " to %" PRId64 " of '%s' asked for", file->path.c_str(), first, first + n, t->name.c_str()); }
    return read_fully(file->fd, out, (size_t)n * each, file->data + t->begin + (uint64_t)first * each);
}

// The same as floats, of a tensor in F32, BF16 or F16
static inline std::string safetensors_read_floats(float* out, const SafeTensors* file, const SafeTensor* t, int64_t first, int64_t n) {
    if (t->type == SAFE_FP32) { return safetensors_read(out, file, t, first, n); }
    if (t->type != SAFE_BF16 && t->type != SAFE_FP16) { return "tensor '" + t->name + "' holds " + safe_types[t->type].name + ", not F32, BF16 or F16"; }
    const int64_t some = 1 << 20;
    std::vector<uint16_t> codes((size_t)min_of(n, some));
    for (int64_t at = 0; at < n; at += some) {
        int64_t count = min_of(n - at, some);
        std::string wrong = safetensors_read(codes.data(), file, t, first + at, count);
        if (!wrong.empty()) { return wrong; }
        for (int64_t i = 0; i < count; i++) {
            out[at + i] = t->type == SAFE_BF16 ? to_float(bf16{codes[(size_t)i]}) : to_float(fp16{codes[(size_t)i]});
        }
    }
    return "";
}
