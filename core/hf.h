// hf.h: Hugging Face's folders, read and written: GPT-2 (learned positions) and GPT-NeoX (rotary positions).
//
// A folder has config.json, what the model is; and the weights in model.safetensors, or in several files that model.safetensors.index.json names. Both
// architectures are ours under other names, where the configuration says what ours does: everything in it that would make them compute something else is
// refused, with what differs. Weights lie there as
//     GPT-2      x·W: W is (in, out), ours transposed
//     GPT-NeoX   queries, keys and values head by head (heads, 3, hs, C); ours are (3, heads, hs, C)
// and all else as here. Of an export one tensor at a time is in memory. It is made beside the folder that it shall be, and takes its name when it is whole
// and on the disk; only an earlier export is replaced.
#pragma once
#include "safetensors.h"
#include "weights.h"
#include <map>

constexpr double HF_EPSILON = 1e-5;       // of the LayerNorms, as here
constexpr double HF_ROPE_BASE = 10000.0;  // likewise
constexpr uint64_t HF_SHARD_BYTES = 5000000000;     // of the tensors of one file
constexpr int64_t HF_MOST_JSON = 64 << 20;
static const char* const HF_WRITER = "train_gpt_fp8";  // in the metadata of exports
static const char* const hf_tokenizer_files[] = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"};

// ---- names and layouts ----

enum HfLayout { HF_SAME, HF_TRANSPOSED, HF_BY_HEAD };
struct HfName { const char* name; HfLayout layout; };  // #: the layer

// {GPT-2, GPT-NeoX} by our name
static const struct { const char* ours; HfName theirs[2]; } hf_names[] = {
    {"wte", {{"wte.weight", HF_SAME}, {"embed_in.weight", HF_SAME}}},
    {"wpe", {{"wpe.weight", HF_SAME}, {NULL, HF_SAME}}},
    {"ln1w", {{"h.#.ln_1.weight", HF_SAME}, {"layers.#.input_layernorm.weight", HF_SAME}}},
    {"ln1b", {{"h.#.ln_1.bias", HF_SAME}, {"layers.#.input_layernorm.bias", HF_SAME}}},
    {"qkvw", {{"h.#.attn.c_attn.weight", HF_TRANSPOSED}, {"layers.#.attention.query_key_value.weight", HF_BY_HEAD}}},
    {"qkvb", {{"h.#.attn.c_attn.bias", HF_SAME}, {"layers.#.attention.query_key_value.bias", HF_BY_HEAD}}},
    {"attprojw", {{"h.#.attn.c_proj.weight", HF_TRANSPOSED}, {"layers.#.attention.dense.weight", HF_SAME}}},
    {"attprojb", {{"h.#.attn.c_proj.bias", HF_SAME}, {"layers.#.attention.dense.bias", HF_SAME}}},
    {"ln2w", {{"h.#.ln_2.weight", HF_SAME}, {"layers.#.post_attention_layernorm.weight", HF_SAME}}},
    {"ln2b", {{"h.#.ln_2.bias", HF_SAME}, {"layers.#.post_attention_layernorm.bias", HF_SAME}}},
    {"fcw", {{"h.#.mlp.c_fc.weight", HF_TRANSPOSED}, {"layers.#.mlp.dense_h_to_4h.weight", HF_SAME}}},
    {"fcb", {{"h.#.mlp.c_fc.bias", HF_SAME}, {"layers.#.mlp.dense_h_to_4h.bias", HF_SAME}}},
    {"fcprojw", {{"h.#.mlp.c_proj.weight", HF_TRANSPOSED}, {"layers.#.mlp.dense_4h_to_h.weight", HF_SAME}}},
    {"fcprojb", {{"h.#.mlp.c_proj.bias", HF_SAME}, {"layers.#.mlp.dense_4h_to_h.bias", HF_SAME}}},
    {"lnfw", {{"ln_f.weight", HF_SAME}, {"final_layer_norm.weight", HF_SAME}}},
    {"lnfb", {{"ln_f.bias", HF_SAME}, {"final_layer_norm.bias", HF_SAME}}},
    {"lmhead", {{"lm_head.weight", HF_SAME}, {"embed_out.weight", HF_SAME}}}};

static const char* const hf_prefixes[2] = {"transformer.", "gpt_neox."};

struct HfTensor {
    std::string name;
    HfLayout layout;
    std::vector<int64_t> shape;
};

// What one of our tensors is there. `prefix`: of all but the head
static inline HfTensor hf_tensor(const WholeTensor* t, bool rope, const std::string& prefix) {
    for (auto& n : hf_names) {
        const HfName* theirs = &n.theirs[rope];
        if (theirs->name == NULL || strcmp(n.ours, name_in_layer(t->name)) != 0) { continue; }
        HfTensor h = {theirs->name, theirs->layout, {}};
        size_t layer = h.name.find('#');
        if (layer != std::string::npos) { h.name.replace(layer, 1, std::to_string(t->layer)); }
        if (strcmp(n.ours, "lmhead") != 0) { h.name = prefix + h.name; }
        if (t->rows == 1) { h.shape = {t->cols}; }
        else if (h.layout == HF_TRANSPOSED) { h.shape = {t->cols, t->rows}; }
        else { h.shape = {t->rows, t->cols}; }
        return h;
    }
    die("Hugging Face's models have no tensor '%s'", t->name);
}

// The place there of element i of one of our whole tensors
struct HfPlaces {
    HfLayout layout;
    int64_t rows, cols;      // of ours; BY_HEAD: of a bias (3C, 1)
    int64_t width, head;     // channels, of all heads and of one
    int64_t operator()(int64_t i) const {
        int64_t row = i / cols, col = i % cols;
        if (layout == HF_TRANSPOSED) { return col * rows + row; }
        if (layout == HF_SAME) { return i; }
        int64_t part = row / width, channel = row % width;
        return ((channel / head * 3 + part) * head + channel % head) * cols + col;
    }
};

static inline HfPlaces hf_places(HfLayout layout, int64_t rows, int64_t cols, const ModelShape* s) {
    bool bias = rows == 1 && layout == HF_BY_HEAD;
    return HfPlaces{layout, bias ? cols : rows, bias ? 1 : cols, s->width, s->width / s->heads};
}

// ---- config.json ----

struct HfConfig {
    const char* flag;
    std::string path;
    json_object* json;
};

// NULL: it is not there, or null
static inline json_object* hf_value(json_object* in, const char* key) {
    json_object* value = NULL;
    return json_object_object_get_ex(in, key, &value) ? value : NULL;
}
static inline std::string json_text(json_object* o) { return json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE); }

[[noreturn]] static inline void hf_differs(const HfConfig* c, const char* key, const std::string& has, const std::string& why) {
    bad_input("%s: '%s' has %s %.200s; %s", c->flag, c->path.c_str(), key, has.c_str(), why.c_str());
}

static inline int hf_int(const HfConfig* c, const char* key, int least, int most) {
    json_object* v = hf_value(c->json, key);
    if (v == NULL) { bad_input("%s: '%s' has no %s", c->flag, c->path.c_str(), key); }
    int64_t n = json_object_is_type(v, json_type_int) ? json_object_get_int64(v) : INT64_MIN;
    if (n < least || n > most) { hf_differs(c, key, json_text(v), "a whole number from " + std::to_string(least) + " to " + std::to_string(most) + " is allowed"); }
    return (int)n;
}

// As transformers would have it where the file does not say
static inline bool hf_bool(const HfConfig* c, const char* key, bool absent) {
    json_object* v = hf_value(c->json, key);
    if (v == NULL) { return absent; }
    if (!json_object_is_type(v, json_type_boolean)) { hf_differs(c, key, json_text(v), "true or false is allowed"); }
    return json_object_get_boolean(v);
}
static inline void hf_require_bool(const HfConfig* c, const char* key, bool absent, bool wanted, const char* why) {
    if (hf_bool(c, key, absent) != wanted) { hf_differs(c, key, wanted ? "false" : "true", why); }
}

// A number that must be one value; `v` NULL: `absent`
static inline void hf_require_number(const HfConfig* c, const char* key, json_object* v, double absent, double wanted, const char* what) {
    bool number = json_object_is_type(v, json_type_double) || json_object_is_type(v, json_type_int);
    double has = v == NULL ? absent : number ? json_object_get_double(v) : NAN;
    char text[96];
    if (fabs(has - wanted) <= 1e-9 * fabs(wanted)) { return; }
    snprintf(text, sizeof(text), "%s here, always %g", what, wanted);
    char absence[64];
    snprintf(absence, sizeof(absence), "%g (by default)", absent);
    hf_differs(c, key, v != NULL ? json_text(v) : absence, text);
}

static inline void hf_require_activation(const HfConfig* c, const char* key, const char* absent) {
    json_object* v = hf_value(c->json, key);
    std::string has = v == NULL ? absent : json_object_is_type(v, json_type_string) ? json_object_get_string(v) : json_text(v);
    for (const char* ours : {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}) {
        if (has == ours) { return; }
    }
    hf_differs(c, key, has, has == "gelu" ? "that is GELU by the error function, and here it is the form by tanh: gelu_new, gelu_pytorch_tanh or gelu_fast"
                                          : "the activation here is GELU in the form by tanh: gelu_new, gelu_pytorch_tanh or gelu_fast");
}

static inline ModelShape hf_gpt2_shape(const HfConfig* c) {
    ModelShape s = {};
    s.layers = hf_int(c, "n_layer", 1, 10000);
    s.heads = hf_int(c, "n_head", 1, 1 << 16);
    s.width = hf_int(c, "n_embd", 1, 1 << 20);
    s.vocab = hf_int(c, "vocab_size", 1, 1 << 24);
    s.positions = hf_int(c, "n_positions", 1, 1 << 24);
    s.tied = hf_bool(c, "tie_word_embeddings", true);
    if (hf_value(c->json, "n_inner") != NULL && hf_int(c, "n_inner", 1, INT32_MAX) != 4 * s.width) {
        hf_differs(c, "n_inner", json_text(hf_value(c->json, "n_inner")), "the MLP here is 4 times as wide as the model: " + std::to_string(4 * s.width));
    }
    hf_require_activation(c, "activation_function", "gelu_new");
    hf_require_number(c, "layer_norm_epsilon", hf_value(c->json, "layer_norm_epsilon"), 1e-5, HF_EPSILON, "LayerNorm's epsilon is");
    hf_require_bool(c, "scale_attn_weights", true, true, "scores are always divided by the root of the head's size here");
    hf_require_bool(c, "scale_attn_by_inverse_layer_idx", false, false, "scores are scaled alike in all layers here");
    hf_require_bool(c, "add_cross_attention", false, false, "there is no cross-attention here");
    return s;
}

static inline ModelShape hf_neox_shape(const HfConfig* c) {
    ModelShape s = {};
    s.rope = true;
    s.layers = hf_int(c, "num_hidden_layers", 1, 10000);
    s.heads = hf_int(c, "num_attention_heads", 1, 1 << 16);
    s.width = hf_int(c, "hidden_size", 1, 1 << 20);
    s.vocab = hf_int(c, "vocab_size", 1, 1 << 24);
    s.positions = hf_int(c, "max_position_embeddings", 1, 1 << 24);
    s.tied = hf_bool(c, "tie_word_embeddings", false);
    if (hf_int(c, "intermediate_size", 1, INT32_MAX) != 4 * s.width) {
        hf_differs(c, "intermediate_size", json_text(hf_value(c->json, "intermediate_size")), "the MLP here is 4 times as wide as the model: " + std::to_string(4 * s.width));
    }
    hf_require_activation(c, "hidden_act", "gelu");
    hf_require_number(c, "layer_norm_eps", hf_value(c->json, "layer_norm_eps"), 1e-5, HF_EPSILON, "LayerNorm's epsilon is");
    hf_require_bool(c, "use_parallel_residual", true, false, "attention and MLP come one after the other here");
    hf_require_bool(c, "attention_bias", true, true, "linear layers have biases here");
    // rotary positions: in keys of their own, or all in rope_parameters
    json_object *rope = hf_value(c->json, "rope_parameters"), *old = hf_value(c->json, "rope_scaling");
    if (rope == NULL) { rope = old; }
    auto find = [&](const char* inside, const char* key, const char* other) {
        json_object* v = json_object_is_type(rope, json_type_object) ? hf_value(rope, inside) : NULL;
        if (v == NULL) { v = hf_value(c->json, key); }
        return v != NULL ? v : hf_value(c->json, other);
    };
    json_object *type = find("rope_type", "rope_type", "type"), *older = rope != NULL && json_object_is_type(rope, json_type_object) ? hf_value(rope, "type") : NULL;
    for (json_object* t : {type, older}) {
        if (t != NULL && json_text(t) != "\"default\"") { hf_differs(c, "rope_type", json_text(t), "rotary positions are not scaled here: default"); }
    }
    hf_require_number(c, "rotary_pct", find("partial_rotary_factor", "partial_rotary_factor", "rotary_pct"), 0.25, 1.0, "the share of a head that is rotated is");
    hf_require_number(c, "rotary_emb_base", find("rope_theta", "rope_theta", "rotary_emb_base"), 10000.0, HF_ROPE_BASE, "the base of rotary positions is");
    return s;
}

// All of a JSON file; NULL: it is not there. Refused where it is no JSON object
static inline json_object* hf_json(const char* flag, const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT) { return NULL; }
    if (fd < 0) { bad_input("%s: cannot open '%s': %s", flag, path.c_str(), strerror(errno)); }
    struct stat status;
    if (fstat(fd, &status) != 0) { bad_input("%s: cannot read '%s': %s", flag, path.c_str(), strerror(errno)); }
    if (!S_ISREG(status.st_mode) || status.st_size > HF_MOST_JSON) {
        bad_input("%s: '%s' is %s", flag, path.c_str(), S_ISREG(status.st_mode) ? "too large for what it should be" : "not a file");
    }
    std::string text((size_t)status.st_size, '\0');
    std::string wrong = read_fully(fd, &text[0], text.size(), 0);
    if (!wrong.empty()) { bad_input("%s: cannot read '%s': %s", flag, path.c_str(), wrong.c_str()); }
    close(fd);
    json_tokener* parser = json_tokener_new();
    if (parser == NULL) { die("out of host memory: a JSON parser"); }
    json_object* json = json_tokener_parse_ex(parser, text.c_str(), (int)text.size());
    bool good = json_tokener_get_error(parser) == json_tokener_success && json_object_is_type(json, json_type_object);
    json_tokener_free(parser);
    if (!good) { bad_input("%s: '%s' is no JSON object", flag, path.c_str()); }
    return json;
}

static inline ModelShape hf_shape(const char* flag, const std::string& folder) {
    HfConfig c = {flag, folder + "/config.json", NULL};
    c.json = hf_json(flag, c.path);
    if (c.json == NULL) { bad_input("%s: '%s' is a folder, and no model of Hugging Face: it has no config.json", flag, folder.c_str()); }
    json_object* v = hf_value(c.json, "model_type");
    std::string type = json_object_is_type(v, json_type_string) ? json_object_get_string(v) : "none";
    if (type != "gpt2" && type != "gpt_neox") { hf_differs(&c, "model_type", type, "gpt2 and gpt_neox can be read"); }
    if (hf_value(c.json, "quantization_config") != NULL) { hf_differs(&c, "quantization_config", "{…}", "weights in F32, BF16 or F16 can be read"); }
    ModelShape s = type == "gpt2" ? hf_gpt2_shape(&c) : hf_neox_shape(&c);
    if (s.width % s.heads != 0) { hf_differs(&c, type == "gpt2" ? "n_embd" : "hidden_size", std::to_string(s.width), "the " + std::to_string(s.heads) + " heads cannot share it alike"); }
    auto token = [&](const char* key) {
        json_object* t = hf_value(c.json, key);
        return json_object_is_type(t, json_type_int) && json_object_get_int64(t) >= 0 && json_object_get_int64(t) < s.vocab ? json_object_get_int(t) : -1;
    };
    s.bos = token("bos_token_id");
    s.eos = token("eos_token_id");
    json_object_put(c.json);
    return s;
}

// ---- reading ----

struct HfModel {
    ModelShape shape;
    std::vector<SafeTensors> files;
    struct Place { const SafeTensors* file; const SafeTensor* tensor; HfLayout layout; };
    std::map<std::string, Place> places;  // by our names
};

// The names of a model's files
static inline std::vector<std::string> hf_files(const char* flag, const std::string& folder) {
    if (access((folder + "/model.safetensors").c_str(), F_OK) == 0) { return {"model.safetensors"}; }
    std::string path = folder + "/model.safetensors.index.json";
    json_object* index = hf_json(flag, path);
    if (index == NULL) {
        bad_input("%s: '%s' has neither model.safetensors nor model.safetensors.index.json%s", flag, folder.c_str(),
            access((folder + "/pytorch_model.bin").c_str(), F_OK) == 0 ? "; its pytorch_model.bin cannot be read: save it as safetensors" : "");
    }
    std::map<std::string, bool> names;
    json_object* map = hf_value(index, "weight_map");
    if (!json_object_is_type(map, json_type_object)) { bad_input("%s: '%s' has no weight_map", flag, path.c_str()); }
    json_object_object_foreach(map, tensor, file) {
        const char* name = json_object_is_type(file, json_type_string) ? json_object_get_string(file) : "";
        if (name[0] == '\0' || strchr(name, '/') != NULL) { bad_input("%s: '%s' names no file of its folder for '%s'", flag, path.c_str(), tensor); }
        names[name] = true;
    }
    json_object_put(index);
    std::vector<std::string> list;
    for (auto& n : names) { list.push_back(n.first); }
    if (list.size() > 4096) { bad_input("%s: '%s' names %zu files", flag, path.c_str(), list.size()); }
    return list;
}

static inline bool ends_with(const std::string& text, const char* end) {
    size_t n = strlen(end);
    return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

// Tensors of files that are no weights: masks and angles that the program computes, and a head that is the token embedding
static inline bool hf_is_ignored(const std::string& name, const ModelShape* s) {
    for (const char* end : {".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"}) {
        if (ends_with(name, end)) { return true; }
    }
    return s->tied && (name == "lm_head.weight" || name == "embed_out.weight");
}

static inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) { text += (i > 0 ? ", " : "") + std::to_string(shape[i]); }
    return text + ")";
}

// Opens a folder and checks that all of the model is there as its configuration says. Values are read later
static inline HfModel* hf_open(const char* flag, const std::string& folder) {
    HfModel* m = new HfModel;
    m->shape = hf_shape(flag, folder);
    std::vector<std::string> names = hf_files(flag, folder);
    m->files.resize(names.size());  // places point into it
    std::map<std::string, HfModel::Place> there;
    for (size_t i = 0; i < names.size(); i++) {
        std::string path = folder + "/" + names[i], wrong = safetensors_open(&m->files[i], path);
        if (!wrong.empty()) { bad_input("%s: cannot read '%s': %s", flag, path.c_str(), wrong.c_str()); }
        for (const SafeTensor& t : m->files[i].tensors) {
            if (!there.insert({t.name, {&m->files[i], &t, HF_SAME}}).second) { bad_input("%s: two files of '%s' have the tensor '%s'", flag, folder.c_str(), t.name.c_str()); }
        }
    }
    WholeTensor wte = {"wte", -1, 1, 1};
    std::string prefix = hf_prefixes[m->shape.rope];
    if (there.count(hf_tensor(&wte, m->shape.rope, prefix).name) == 0) { prefix = ""; }
    each_whole_tensor(&m->shape, [&](const WholeTensor& t) {
        HfTensor wanted = hf_tensor(&t, m->shape.rope, prefix);
        auto found = there.find(wanted.name);
        if (found == there.end()) { bad_input("%s: '%s' has no tensor '%s'", flag, folder.c_str(), wanted.name.c_str()); }
        HfModel::Place place = found->second;
        if (place.tensor->shape != wanted.shape) {
            bad_input("%s: '%s' of '%s' is %s, and config.json makes it %s", flag, wanted.name.c_str(), folder.c_str(), shape_text(place.tensor->shape).c_str(),
                shape_text(wanted.shape).c_str());
        }
        if (place.tensor->type > SAFE_FP16) {
            bad_input("%s: '%s' of '%s' is in %s; F32, BF16 and F16 can be read", flag, wanted.name.c_str(), folder.c_str(), safe_types[place.tensor->type].name);
        }
        place.layout = wanted.layout;
        m->places[t.name] = place;
        there.erase(found);
    });
    for (auto& t : there) {
        if (!hf_is_ignored(t.first, &m->shape)) {
            bad_input("%s: '%s' has a tensor '%s', which the model of its config.json has not", flag, folder.c_str(), t.first.c_str());
        }
    }
    return m;
}

// values (rows, cols) of this rank's share of one parameter as float32; of the file what is between the first and the last that is wanted
static inline void hf_read(float* values, const HfModel* m, const Param* p) {
    auto found = m->places.find(p->name);
    if (found == m->places.end()) { die("'%s' has no tensor '%s'", m->files[0].path.c_str(), p->name); }
    const HfModel::Place* from = &found->second;
    int64_t n = (int64_t)param_elements(p), wanted = p->valid_rows * p->cols, cols = p->cols * (p->tp_axis == TP_COLS ? p->tp_ranks : 1);
    int64_t rows = p->rows == 1 ? 1 : p->rows * (p->tp_axis == TP_ROWS ? p->tp_ranks : 1);
    if (p->rows == 1 && p->tp_axis == TP_ROWS) { cols *= p->tp_ranks; }  // a bias
    ElementMap whole = whole_elements(p);
    HfPlaces places = hf_places(from->layout, rows, cols, &m->shape);
    int64_t first = INT64_MAX, last = -1;
#pragma omp parallel for schedule(static) reduction(min : first) reduction(max : last)
    for (int64_t i = 0; i < wanted; i++) {
        int64_t at = places((int64_t)whole((uint64_t)i));
        first = min_of(first, at);
        last = max_of(last, at);
    }
    for (int64_t i = max_of(wanted, (int64_t)0); i < n; i++) { values[i] = 0.0f; }
    if (last < 0) { return; }
    bool in_order = from->layout == HF_SAME && last - first + 1 == wanted;  // as they lie there
    float* raw = in_order ? values : (float*)host_alloc((size_t)(last - first + 1) * sizeof(float));
    std::string wrong = safetensors_read_floats(raw, from->file, from->tensor, first, last - first + 1);
    if (!wrong.empty()) { die("reading '%s' failed: %s", from->file->path.c_str(), wrong.c_str()); }
    if (in_order) { return; }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < wanted; i++) { values[i] = raw[places((int64_t)whole((uint64_t)i)) - first]; }
    free(raw);
}

static inline void hf_close(HfModel* m) {
    for (SafeTensors& f : m->files) { safetensors_close(&f); }
    delete m;
}

static inline WeightSource hf_source(const char* flag, const char* path) {
    HfModel* m = hf_open(flag, path);
    WeightSource s = {};
    s.shape = m->shape;
    s.path = path;
    s.file = m;
    s.read = [](float* values, const void* file, const Param* p) { hf_read(values, (const HfModel*)file, p); };
    s.close = [](void* file) { hf_close((HfModel*)file); };
    return s;
}

// ---- writing ----

static inline bool hf_is_model_file(const std::string& name) { return name.compare(0, 5, "model") == 0 && ends_with(name, ".safetensors"); }

// Why a folder is not one that an export has made; "": it is, or is empty
static inline std::string hf_foreign(const char* flag, const std::string& path) {
    bool ours = false;
    std::vector<std::string> names;
    int error = names_in_folder(&names, path);
    if (error != 0) { bad_input("%s: cannot read the folder '%s': %s", flag, path.c_str(), strerror(error)); }
    for (const std::string& name : names) {
        bool known = name == "config.json" || name == "generation_config.json" || name == "model.safetensors.index.json" || hf_is_model_file(name);
        for (const char* t : hf_tokenizer_files) { known = known || name == t; }
        if (!known) { return "it holds '" + name + "', which no export writes"; }
        if (!hf_is_model_file(name)) { continue; }
        SafeTensors file;
        std::string wrong = safetensors_open(&file, path + "/" + name);
        const char* writer = wrong.empty() ? safetensors_text(&file, "writer") : NULL;
        if (writer == NULL || strcmp(writer, HF_WRITER) != 0) {
            safetensors_close(&file);
            return "its '" + name + "' was written by another program";
        }
        safetensors_close(&file);
        ours = true;
    }
    return ours || names.empty() ? "" : "it holds no exported model";
}

// "dir/" is "dir"
static inline std::string hf_folder_name(const char* path) {
    std::string name = path;
    while (name.size() > 1 && name.back() == '/') { name.pop_back(); }
    return name;
}

// Refuses to write where an export cannot be, or over what is none; before anything is allocated
static inline void hf_require_writable(const char* flag, const char* path) {
    std::string name = hf_folder_name(path), parent = folder_of(name), last = name.substr(name.find_last_of('/') == std::string::npos ? 0 : name.find_last_of('/') + 1);
    if (last.empty() || last == "." || last == "..") { bad_input("%s: '%s' cannot be replaced by an export; name a folder of its own", flag, path); }
    struct stat status;
    if (lstat(name.c_str(), &status) == 0) {
        if (!S_ISDIR(status.st_mode)) { bad_input("%s: '%s' is there and is no folder", flag, path); }
        std::string foreign = hf_foreign(flag, name);
        if (!foreign.empty()) { bad_input("%s: '%s' is no earlier export, and is not replaced: %s", flag, path, foreign.c_str()); }
    }
    if (!is_folder(parent)) { bad_input("%s: there is no folder '%s' to put '%s' into", flag, parent.c_str(), last.c_str()); }
    if (access(parent.c_str(), W_OK) != 0) { bad_input("%s: cannot write to the folder '%s': %s", flag, parent.c_str(), strerror(errno)); }
}

// Refuses a folder without a tokenizer
static inline void hf_require_tokenizer(const char* flag, const char* path) {
    if (!is_folder(path)) { bad_input("%s: there is no folder '%s'", flag, path); }
    for (const char* t : hf_tokenizer_files) {
        if (access((std::string(path) + "/" + t).c_str(), R_OK) == 0) { return; }
    }
    bad_input("%s: '%s' has none of tokenizer.json, tokenizer_config.json, vocab.json, merges.txt and special_tokens_map.json", flag, path);
}

static inline void hf_write_text(const std::string& path, const std::string& text) {
    OutFile f = out_create(path);
    out_write(&f, text.data(), text.size());
    out_close(&f);
}

static inline void hf_write_json(const std::string& path, json_object* json) {
    hf_write_text(path, std::string(json_object_to_json_string_ext(json, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_SPACED | JSON_C_TO_STRING_NOSLASHESCAPE)) + "\n");
    json_object_put(json);
}

static inline json_object* json_token(int token) { return token >= 0 ? json_object_new_int(token) : NULL; }
static inline json_object* json_decimal(double x, const char* text) { return json_object_new_double_s(x, text); }

// Everything that decides what the model computes, whether or not it is the default; dropout, of which there is none here
static inline json_object* hf_config_json(const ModelShape* s, DType dtype) {
    json_object *o = json_object_new_object(), *architectures = json_object_new_array();
    auto text = [&](const char* key, const char* v) { json_object_object_add(o, key, json_object_new_string(v)); };
    auto number = [&](const char* key, int v) { json_object_object_add(o, key, json_object_new_int(v)); };
    auto decimal = [&](const char* key, double v, const char* t) { json_object_object_add(o, key, json_decimal(v, t)); };
    auto truth = [&](const char* key, bool v) { json_object_object_add(o, key, json_object_new_boolean(v)); };
    json_object_array_add(architectures, json_object_new_string(s->rope ? "GPTNeoXForCausalLM" : "GPT2LMHeadModel"));
    json_object_object_add(o, "architectures", architectures);
    text("model_type", s->rope ? "gpt_neox" : "gpt2");
    number("vocab_size", s->vocab);
    if (s->rope) {
        number("num_hidden_layers", s->layers);
        number("num_attention_heads", s->heads);
        number("hidden_size", s->width);
        number("intermediate_size", 4 * s->width);
        number("max_position_embeddings", s->positions);
        text("hidden_act", "gelu_new");
        decimal("layer_norm_eps", HF_EPSILON, "1e-05");
        truth("use_parallel_residual", false);
        truth("attention_bias", true);
        decimal("rotary_pct", 1.0, "1.0");
        number("rotary_emb_base", (int)HF_ROPE_BASE);
        json_object* rope = json_object_new_object();  // the same, where newer versions look for it
        json_object_object_add(rope, "rope_type", json_object_new_string("default"));
        json_object_object_add(rope, "rope_theta", json_decimal(HF_ROPE_BASE, "10000.0"));
        json_object_object_add(rope, "partial_rotary_factor", json_decimal(1.0, "1.0"));
        json_object_object_add(o, "rope_parameters", rope);
        decimal("attention_dropout", 0.0, "0.0");
        decimal("hidden_dropout", 0.0, "0.0");
    } else {
        number("n_layer", s->layers);
        number("n_head", s->heads);
        number("n_embd", s->width);
        number("n_inner", 4 * s->width);
        number("n_positions", s->positions);
        text("activation_function", "gelu_new");
        decimal("layer_norm_epsilon", HF_EPSILON, "1e-05");
        truth("scale_attn_weights", true);
        truth("scale_attn_by_inverse_layer_idx", false);
        for (const char* dropout : {"attn_pdrop", "embd_pdrop", "resid_pdrop"}) { decimal(dropout, 0.0, "0.0"); }
    }
    truth("tie_word_embeddings", s->tied);
    json_object_object_add(o, "bos_token_id", json_token(s->bos));
    json_object_object_add(o, "eos_token_id", json_token(s->eos));
    text("torch_dtype", dtype == FP32 ? "float32" : dtype == BF16 ? "bfloat16" : "float16");
    return o;
}

static inline void hf_copy(const std::string& from, const std::string& to) {
    int fd = open(from.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) { out_failed("open", from, errno); }
    OutFile f = out_create(to);
    char some[1 << 16];
    for (ssize_t n; (n = read(fd, some, sizeof(some))) != 0;) {
        if (n < 0 && errno == EINTR) { continue; }
        if (n < 0) { out_failed("read", from, errno); }
        out_write(&f, some, (size_t)n);
    }
    close(fd);
    out_close(&f);
}

// The files' headers: as many tensors in each as fit, in their order; one that does not fit alone has a file of its own
static inline std::vector<SafeTensors> hf_shards(const ModelShape* s, DType dtype, uint64_t shard_bytes) {
    std::vector<SafeTensors> shards;
    each_whole_tensor(s, [&](const WholeTensor& t) {
        uint64_t bytes = (uint64_t)(t.rows * t.cols) * (uint64_t)dtype_bytes(dtype);
        if (shards.empty() || (shards.back().bytes > 0 && shards.back().bytes + bytes > shard_bytes)) {
            shards.push_back(SafeTensors{});
            shards.back().metadata = {{"format", "pt"}, {"writer", HF_WRITER}};
        }
        HfTensor h = hf_tensor(&t, s->rope, hf_prefixes[s->rope]);
        safetensors_add(&shards.back(), h.name, safe_type(dtype), h.shape);
    });
    for (size_t i = 0; i < shards.size(); i++) {
        char name[64] = "model.safetensors";
        if (shards.size() > 1) { snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", i + 1, shards.size()); }
        shards[i].path = name;
    }
    return shards;
}

// The weights into files of `folder`. All ranks call this: `give` takes all of them; `writes`: this one has the files
static inline void hf_write_weights(const std::string& folder, const ModelShape* s, DType dtype, bool writes, const GiveTensor& give, uint64_t shard_bytes) {
    std::vector<SafeTensors> shards = hf_shards(s, dtype, shard_bytes);
    size_t shard = 0, in_shard = 0;
    OutFile f;
    each_whole_tensor(s, [&](const WholeTensor& t) {
        const float* values = give(t);
        if (!writes) { return; }
        if (in_shard == 0) {
            std::string header = safetensors_header(&shards[shard]);
            f = out_create(folder + "/" + shards[shard].path);
            out_write(&f, header.data(), header.size());
        }
        HfTensor h = hf_tensor(&t, s->rope, "");
        int64_t n = t.rows * t.cols;
        require_in_range(dtype, values, (size_t)n, t.name, folder.c_str());
        size_t bytes = (size_t)n * (size_t)dtype_bytes(dtype);
        void* codes = host_alloc(bytes);
        codes_from_values(codes, dtype, values, n, hf_places(h.layout, t.rows, t.cols, s));
        out_write(&f, codes, bytes);
        free(codes);
        if (++in_shard == shards[shard].tensors.size()) {
            out_close(&f);
            shard++;
            in_shard = 0;
        }
    });
    if (!writes || shards.size() == 1) { return; }
    json_object *index = json_object_new_object(), *metadata = json_object_new_object(), *map = json_object_new_object();
    uint64_t total = 0;
    for (const SafeTensors& file : shards) {
        total += file.bytes;
        for (const SafeTensor& t : file.tensors) { json_object_object_add(map, t.name.c_str(), json_object_new_string(file.path.c_str())); }
    }
    json_object_object_add(metadata, "total_size", json_object_new_int64((int64_t)total));
    json_object_object_add(index, "metadata", metadata);
    json_object_object_add(index, "weight_map", map);
    hf_write_json(folder + "/model.safetensors.index.json", index);
}

// A whole folder becomes `to`, and what had that name goes
static inline void hf_replace(const std::string& from, const std::string& to) {
    std::string old = name_beside(to, "replaced");
    bool replaces = is_folder(to);
    std::string foreign = replaces ? hf_foreign("--export-hf", to) : "";
    if (!foreign.empty()) { die("'%s' is no longer an earlier export, and is not replaced: %s; the export is in '%s'", to.c_str(), foreign.c_str(), from.c_str()); }
    if (replaces) { out_rename(to, old); }
    if (rename(from.c_str(), to.c_str()) != 0) {
        int error = errno;
        if (replaces && rename(old.c_str(), to.c_str()) != 0) { die("cannot rename '%s' to '%s': %s; the export is there", from.c_str(), to.c_str(), strerror(errno)); }
        out_failed("rename what was written to", to, error);
    }
    out_unfinished.clear();
    out_sync_folder(folder_of(to));
    if (!replaces) { return; }
    int error = remove_folder(old);
    if (error != 0) { fprintf(stderr, "train_gpt_fp8: cannot remove the export before, '%s': %s\n", old.c_str(), strerror(error)); }
}

// tokenizer: the folder whose tokenizer goes along; "": none
static inline void hf_write(const char* path, const ModelShape* s, DType dtype, const std::string& tokenizer, bool writes, const GiveTensor& give,
                            uint64_t shard_bytes = HF_SHARD_BYTES) {
    std::string name = hf_folder_name(path), folder = name_beside(name, "unfinished");
    if (writes) {
        if (mkdir(folder.c_str(), 0777) != 0) { out_failed("make", folder, errno); }
        out_unfinished.push_back(folder);
    }
    hf_write_weights(folder, s, dtype, writes, give, shard_bytes);
    if (!writes) { return; }
    hf_write_json(folder + "/config.json", hf_config_json(s, dtype));
    if (s->bos >= 0 || s->eos >= 0) {
        json_object* generation = json_object_new_object();
        if (s->bos >= 0) { json_object_object_add(generation, "bos_token_id", json_token(s->bos)); }
        if (s->eos >= 0) { json_object_object_add(generation, "eos_token_id", json_token(s->eos)); }
        hf_write_json(folder + "/generation_config.json", generation);
    }
    for (const char* t : hf_tokenizer_files) {
        std::string from = tokenizer + "/" + t;
        if (!tokenizer.empty() && access(from.c_str(), F_OK) == 0) { hf_copy(from, folder + "/" + t); }
    }
    out_sync_folder(folder);
    hf_replace(folder, name);
}
