// checkpoint_reader.cuh: checks a checkpoint (checkpoint.cuh), and reads it on any number of ranks.
//
// All ranks' files are hashed first, by all ranks together. Then their headers are joined into one index. An element that a rank wants is looked for by its
// number within the whole tensor, so that any other way to share the model finds it; whatever is next to it in both is copied with it. Exponents come along
// by blocks of 128 elements. Where a rank's blocks are not those of the checkpoint, as with columns that are no multiple of 128, their values are rounded again.
#pragma once
#include "checkpoint.cuh"
#include "weights.h"
#include <map>

// Everyone gets the first rank's text
static inline void broadcast_text(Group* g, std::string* text) {
    uint64_t n = text->size();
    host_broadcast(g, &n, sizeof(n), 0);
    text->resize(n);
    if (n > 0) { host_broadcast(g, &(*text)[0], n, 0); }
}

// All ranks: do the files of the checkpoint have the checksums that are written there? Each rank looks at some of them. What is wrong, or "", and the files
static inline std::string checkpoint_verify(std::vector<Checksum>* sums, const std::string& folder, Group* world) {
    std::string text, wrong;
    sums->clear();
    if (world->rank == 0) {
        wrong = read_text(&text, folder + "/" + CHECKSUMS);
        if (wrong.empty() && !checksums_parse(sums, text)) { wrong = std::string(CHECKSUMS) + " is damaged"; }
        if (!wrong.empty()) { text.clear(); }
    }
    broadcast_text(world, &wrong);
    if (!wrong.empty()) { return wrong; }
    broadcast_text(world, &text);
    sums->clear();
    checksums_parse(sums, text);
    char mine[300] = "";
    for (size_t i = (size_t)world->rank; i < sums->size() && mine[0] == '\0'; i += (size_t)world->size) {
        const Checksum* c = &(*sums)[i];
        Digest d;
        int failed = digest_of_file(&d, folder + "/" + c->file);
        if (failed != 0 && failed != ENOENT && failed != EISDIR) {  // not damage, but a disk or a network that fails: another time it may be whole
            die("%s/%s cannot be read: %s", folder.c_str(), c->file.c_str(), strerror(failed));
        }
        if (failed != 0) { snprintf(mine, sizeof(mine), "%s: %s", c->file.c_str(), strerror(failed)); }
        else if (c->digest != d.hex) { snprintf(mine, sizeof(mine), "%s is damaged: its checksum is %s, and was %s", c->file.c_str(), d.hex, c->digest.c_str()); }
    }
    std::vector<char> all((size_t)world->size * sizeof(mine));
    host_all_gather(world, all.data(), mine, sizeof(mine));
    for (int r = 0; r < world->size; r++) {
        if (all[(size_t)r * sizeof(mine)] != '\0') { return &all[(size_t)r * sizeof(mine)]; }
    }
    return "";
}

struct CheckpointReader {
    std::vector<SafeTensors> files;  // of the ranks that wrote it; closed, but for the one that is read
    struct Source { int file; Place place; };
    std::map<std::string, std::vector<Source>> sources;              // by the name of a parameter
    std::map<std::string, std::vector<std::pair<int, size_t>>> tensors;  // by the name of a tensor: file and number in it
};

// Reads the headers of the ranks' files. What is wrong, or ""
static inline std::string reader_open(CheckpointReader* r, const std::string& folder, const std::vector<Checksum>& sums) {
    for (const Checksum& c : sums) {
        if (c.file.compare(0, 5, "rank_") != 0) { continue; }
        SafeTensors f;
        std::string wrong = safetensors_open(&f, folder + "/" + c.file);
        if (!wrong.empty()) { return c.file + ": " + wrong; }
        close(f.fd);
        f.fd = -1;
        int number = (int)r->files.size();
        for (auto& m : f.metadata) {
            CheckpointReader::Source s = {number, {}};
            if (!place_parse(&s.place, m.second.c_str())) { return c.file + ": where '" + m.first + "' lies cannot be read"; }
            r->sources[m.first].push_back(s);
        }
        for (size_t i = 0; i < f.tensors.size(); i++) { r->tensors[f.tensors[i].name].push_back({number, i}); }
        r->files.push_back(f);
    }
    return r->files.empty() ? "it has no rank's file" : "";
}

// All bytes of a tensor in one of the files; file < 0: in the first that has it
static inline std::string reader_bytes(std::vector<char>* bytes, CheckpointReader* r, const std::string& name, int file, SafeType type) {
    auto found = r->tensors.find(name);
    if (found == r->tensors.end()) { return "there is no " + name; }
    for (auto& at : found->second) {
        if (file >= 0 && at.first != file) { continue; }
        SafeTensors* f = &r->files[(size_t)at.first];
        const SafeTensor* t = &f->tensors[at.second];
        if (strcmp(safe_types[t->type].name, safe_types[type].name) != 0) { return name + " is " + safe_types[t->type].name + ", and would have to be " + safe_types[type].name; }
        bytes->resize((size_t)(t->end - t->begin));
        f->fd = open(f->path.c_str(), O_RDONLY | O_CLOEXEC);
        std::string wrong = f->fd < 0 ? strerror(errno) : safetensors_read(bytes->data(), f, t, 0, safe_elements(t));
        if (f->fd >= 0) { close(f->fd); }
        f->fd = -1;
        return wrong.empty() ? "" : f->path + ": " + wrong;
    }
    return "there is no " + name + " where it should be";
}

// The element of a share that has the number w in the whole tensor; -1: none
static inline int64_t element_of(ElementMap map, uint64_t w) {
    if (map.run == 0) { return (int64_t)w; }
    if (w < map.first || (w - map.first) % map.stride >= map.run) { return -1; }
    return (int64_t)((w - map.first) / map.stride * map.run + (w - map.first) % map.stride);
}

// f(to, source, from, n): the elements [first, first + count) of a share, from number `to` of them on n neighbours, are those of a source from number `from` of
// what it holds on. Source -1: nobody has them.
template <class F>
static inline void each_found(const std::vector<CheckpointReader::Source>& sources, ElementMap map, int64_t first, int64_t count, F f) {
    size_t last = 0;
    for (int64_t at = 0; at < count;) {
        uint64_t i = (uint64_t)(first + at), w = map(i);
        int64_t n = map.run == 0 ? count - at : min_of((int64_t)(map.run - i % map.run), count - at), from = 0;
        int found = -1;
        for (size_t k = 0; k < sources.size() && found < 0; k++) {
            size_t number = (last + k) % sources.size();
            const Place* p = &sources[number].place;
            int64_t e = element_of(p->map, w);
            if (e < p->first || e >= p->first + p->count) { continue; }
            found = (int)number;
            last = number;
            from = e - p->first;
            n = min_of(n, p->first + p->count - e);
            if (p->map.run > 0) { n = min_of(n, (int64_t)(p->map.run - (uint64_t)e % p->map.run)); }
        }
        for (size_t k = 0; found < 0 && k < sources.size(); k++) {  // up to where somebody may have some again
            const Place* p = &sources[k].place;
            uint64_t begins = p->map((uint64_t)p->first), run = w < p->map.first || p->map.run == 0 ? p->map.first : p->map.first + ((w - p->map.first) / p->map.stride + 1) * p->map.stride;
            if (begins > w) { n = min_of(n, (int64_t)(begins - w)); }
            if (run > w) { n = min_of(n, (int64_t)(run - w)); }
        }
        f(at, found, from, n);
        at += n;
    }
}

// What a state's codes are of, apart from a tensor's name
struct StateBytes {
    std::vector<char> codes;
    std::vector<int8_t> exponents;   // by block of this share's elements; empty: there are none
    float slot[4];
    bool has_slot;
    int64_t rounded;                 // blocks whose elements had different exponents, and were rounded again
};

// The elements [first, first + count) of this rank's share of p, of which those from `valid` on are padding, in the state `kind` of the checkpoint. `blocks`: with
// exponents. What is wrong, or ""
static inline std::string reader_state(StateBytes* out, CheckpointReader* r, const Param* p, const char* kind, DType dtype, int64_t first, int64_t count, bool slot, bool blocks) {
    std::string name = std::string(p->name) + "." + kind;
    auto found = r->sources.find(p->name);
    if (found == r->sources.end()) { return std::string("there is no ") + p->name; }
    const std::vector<CheckpointReader::Source>& sources = found->second;
    size_t each = (size_t)dtype_bytes(dtype);
    out->codes.assign((size_t)count * each, 0);
    out->has_slot = slot;
    out->rounded = 0;
    constexpr int8_t ANY = 127;
    std::vector<int8_t> exponents(blocks ? (size_t)count : 0, ANY);  // by element
    std::vector<std::vector<char>> codes(sources.size()), scales(sources.size());
    std::string wrong;
    int64_t valid = p->valid_rows * p->cols;
    each_found(sources, whole_elements(p), first, count, [&](int64_t to, int source, int64_t from, int64_t n) {
        if (!wrong.empty()) { return; }
        if (source < 0) {
            if (first + to < valid) { wrong = "element " + std::to_string(whole_elements(p)((uint64_t)(first + to))) + " of " + name + " is in no file"; }
            return;
        }
        size_t k = (size_t)source;
        if (codes[k].empty()) {
            wrong = reader_bytes(&codes[k], r, name, sources[k].file, safe_type(dtype));
            if (wrong.empty() && blocks) { wrong = reader_bytes(&scales[k], r, name + ".exponents", sources[k].file, SAFE_I8); }
            size_t held = (size_t)sources[k].place.count;
            if (wrong.empty() && (codes[k].size() != held * each || (blocks && scales[k].size() != ceil_div(held, (size_t)STATE_BLOCK)))) { wrong = name + " has another size than its place says"; }
            if (!wrong.empty()) { return; }
        }
        memcpy(&out->codes[(size_t)to * each], &codes[k][(size_t)from * each], (size_t)n * each);
        for (int64_t i = 0; blocks && i < n; i++) { exponents[(size_t)(to + i)] = (int8_t)scales[k][(size_t)((from + i) / STATE_BLOCK)]; }
    });
    if (!wrong.empty()) { return wrong; }
    if (slot) {
        std::vector<char> bytes;
        wrong = reader_bytes(&bytes, r, name + ".slot", -1, SAFE_FP32);
        if (wrong.empty() && bytes.size() != sizeof(out->slot)) { wrong = name + ".slot has another size"; }
        if (!wrong.empty()) { return wrong; }
        memcpy(out->slot, bytes.data(), sizeof(out->slot));
    }
    out->exponents.assign(blocks ? (size_t)ceil_div(count, (int64_t)STATE_BLOCK) : 0, 0);
    for (size_t b = 0; b < out->exponents.size(); b++) {
        size_t begin = b * STATE_BLOCK, end = min_of(begin + STATE_BLOCK, (size_t)count);
        int8_t low = ANY, high = -128;
        for (size_t i = begin; i < end; i++) {
            low = min_of(low, exponents[i]);
            high = exponents[i] == ANY ? high : max_of(high, exponents[i]);
        }
        out->exponents[b] = high == -128 ? (int8_t)0 : low;
        if (high == -128 || low == high) { continue; }
        // a block of other elements than the checkpoint's: all values get the smallest of the exponents, which has room for each, and some are rounded again
        out->rounded++;
        char* data = &out->codes[begin * each];
        for (size_t i = 0; i < end - begin; i++) {
            if (exponents[begin + i] == ANY || exponents[begin + i] == low) { continue; }
            Vec<1> value = load_as(dtype, data, Range<1>{i}, 1, exp2_int(-exponents[begin + i]));
            store_as(dtype, data, Range<1>{i}, 1, value, exp2_int(low), RoundNearest{});
        }
    }
    return "";
}

// ---- the weights of a checkpoint, for another run to begin with ----

static inline bool is_checkpoint(const std::string& path) { return is_folder(path) && access((path + "/" + CHECKSUMS).c_str(), F_OK) == 0; }

// values (rows, cols) = this rank's share of the masters
static inline void checkpoint_values(float* values, const void* file, const Param* p) {
    CheckpointReader* r = (CheckpointReader*)file;
    std::string kind = r->tensors.count(std::string(p->name) + ".master") > 0 ? "master" : "weight", name = std::string(p->name) + "." + kind;
    auto found = r->tensors.find(name);
    if (found == r->tensors.end()) { die("--init: the checkpoint has no %s", name.c_str()); }
    SafeType type = r->files[(size_t)found->second[0].first].tensors[found->second[0].second].type;
    if (type > SAFE_E5M2) { die("--init: %s of the checkpoint is %s", name.c_str(), safe_types[type].name); }
    DType dtype = (DType)type;
    StateBytes x;
    int64_t n = (int64_t)param_elements(p);
    std::string wrong = reader_state(&x, r, p, kind.c_str(), dtype, 0, n, r->tensors.count(name + ".slot") > 0, r->tensors.count(name + ".exponents") > 0);
    if (!wrong.empty()) { die("--init: the checkpoint cannot be used: %s", wrong.c_str()); }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float factor = x.has_slot ? x.slot[0] : x.exponents.empty() ? 1.0f : exp2_int(-x.exponents[(size_t)(i / STATE_BLOCK)]);
        values[i] = load_as(dtype, x.codes.data(), Range<1>{(size_t)i}, 1, factor).v[0];
    }
}

// A checkpoint of any recipe as a model to begin with. `world`: who looks at its checksums together; NULL: nobody, as only its shape is wanted
static inline WeightSource checkpoint_source(const char* flag, const char* path, Group* world) {
    std::vector<Checksum> sums;
    std::string text, wrong = read_text(&text, std::string(path) + "/config.json");
    if (wrong.empty() && world != NULL) { wrong = checkpoint_verify(&sums, path, world); }
    if (!wrong.empty()) { bad_input("%s: '%s' is no whole checkpoint: %s", flag, path, wrong.c_str()); }
    json_object *o = json_tokener_parse(text.c_str()), *fixed = NULL;
    if (o == NULL || !json_object_object_get_ex(o, "fixed", &fixed)) { bad_input("%s: '%s' is no checkpoint: its config.json says nothing of a model", flag, path); }
    auto of = [=](const char* name) {
        json_object* value = NULL;
        if (!json_object_object_get_ex(fixed, name, &value)) { bad_input("%s: '%s' is no checkpoint: its config.json lacks '%s'", flag, path, name); }
        return std::string(json_object_get_string(value));
    };
    auto number = [=](const char* name) { return atoi(of(name).c_str()); };
    WeightSource s = {};
    s.shape = ModelShape{number("layers"), number("heads"), number("width"), number("vocabulary"), number("positions"), of("position") == "rope", of("tie-embeddings") == "yes", -1, -1};
    json_object_put(o);
    CheckpointReader* reader = new CheckpointReader;
    wrong = world != NULL ? reader_open(reader, path, sums) : "";
    if (!wrong.empty()) { bad_input("%s: '%s': %s", flag, path, wrong.c_str()); }
    s.path = path;
    s.file = reader;
    s.read = checkpoint_values;
    s.close = [](void* file) { delete (CheckpointReader*)file; };
    return s;
}
