// Tests of core/hf.h: what is written, against a layout that is counted out here; what is read of it, whole and by shares; folders that transformers have
// written; configurations and files that are refused; and that nothing but an earlier export is replaced. Losses: train_gpt_fp8.cpp; ranks: hf.bats.
#include "check.h"
#include <dirent.h>
#include <string>
#include <sys/resource.h>
#include <unistd.h>
#include "../core/hf.h"
#include "../core/model_io.h"

// ---- a folder for each test ----

static char folder[1024];

static std::string in_folder(const std::string& name) { return std::string(folder) + "/" + name; }

static int make_folder(void**) {
    snprintf(folder, sizeof(folder), "%s/hf_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir);
    return mkdtemp(folder) == NULL ? -1 : 0;
}

static std::vector<std::string> listed(const std::string& path) {
    std::vector<std::string> names;
    if (names_in_folder(&names, path) != 0) { fail_msg("%s cannot be read", path.c_str()); }
    return names;
}

static void remove_all(const std::string& path) {
    if (is_folder(path)) {
        for (const std::string& name : listed(path)) { remove_all(path + "/" + name); }
    }
    remove(path.c_str());
}

static int remove_folder(void**) {
    remove_all(folder);
    return 0;
}

static std::string text_of(const std::string& path) {
    FILE* f = fopen(path.c_str(), "rb");
    if (f == NULL) { fail_msg("%s: %s (tests run from the root of the repository)", path.c_str(), strerror(errno)); }
    std::string all;
    char some[4096];
    size_t n;
    while ((n = fread(some, 1, sizeof(some), f)) > 0) { all.append(some, n); }
    fclose(f);
    return all;
}

static void write_text(const std::string& path, const std::string& text) {
    FILE* f = fopen(path.c_str(), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text.data(), 1, text.size(), f), text.size());
    assert_int_equal(fclose(f), 0);
}

static void copy_folder(const std::string& from, const std::string& to) {
    assert_int_equal(mkdir(to.c_str(), 0777), 0);
    for (const std::string& name : listed(from)) { write_text(to + "/" + name, text_of(from + "/" + name)); }
}

// ---- a model ----

static const ModelShape GPT2 = {2, 3, 12, 19, 7, false, true, 3, 4};
static const ModelShape NEOX = {2, 3, 12, 19, 7, true, false, -1, -1};

// Element i of one of its tensors: exact in BF16 and FP16
static float value(const char* name, int64_t i) {
    uint64_t h = mix64((uint64_t)i);
    for (const char* c = name; *c != '\0'; c++) { h = mix64(h ^ (uint64_t)(unsigned char)*c); }
    return (float)((int)(h % 255) - 127) / 64.0f;
}

static GiveTensor values_of_model(void) {
    static std::vector<float> values;
    return [](const WholeTensor& t) {
        values.resize((size_t)(t.rows * t.cols));
        for (size_t i = 0; i < values.size(); i++) { values[i] = value(t.name, (int64_t)i); }
        return (const float*)values.data();
    };
}

static void write_model(const std::string& path, const ModelShape* s, DType dtype, uint64_t shard_bytes = HF_SHARD_BYTES, const std::string& tokenizer = "") {
    hf_write(path.c_str(), s, dtype, tokenizer, true, values_of_model(), shard_bytes);
}

static std::vector<WholeTensor> tensors_of(const ModelShape* s) {
    std::vector<WholeTensor> all;
    each_whole_tensor(s, [&](const WholeTensor& t) { all.push_back(t); });
    return all;
}

// This rank's share of a tensor, as the model would have it
static Param param_of(const WholeTensor* t, int tp, int rank, TpAxis axis) {
    bool qkv = strncmp(name_in_layer(t->name), "qkv", 3) == 0, by_cols = axis == TP_COLS || t->rows == 1;
    int64_t rows = strcmp(t->name, "wte") == 0 || strcmp(t->name, "lmhead") == 0 ? 32 * tp : t->rows;  // the vocabulary is padded
    Param p = {};
    memcpy(p.name, t->name, sizeof(p.name));
    p.layer = t->layer;
    p.tp_axis = axis;
    p.tp_rank = rank;
    p.tp_ranks = tp;
    p.segments = qkv && axis == TP_ROWS ? 3 : 1;
    p.rows = axis == TP_WHOLE || by_cols ? rows : rows / tp;
    p.cols = axis != TP_WHOLE && by_cols ? t->cols / tp : t->cols;
    p.valid_rows = rows == t->rows ? p.rows : max_of(min_of(t->rows - p.rows * (axis == TP_ROWS ? rank : 0), p.rows), (int64_t)0);
    return p;
}

static void expect_values(const WeightSource* source, const WholeTensor* t, int tp, int rank, TpAxis axis) {
    Param p = param_of(t, tp, rank, axis);
    std::vector<float> got(param_elements(&p), NAN);
    source->read(got.data(), source->file, &p);
    for (int64_t i = 0; i < (int64_t)got.size(); i++) {
        int64_t row = i / p.cols, col = i % p.cols;  // in the whole tensor
        if (axis == TP_COLS) { col += rank * p.cols; }
        if (axis == TP_ROWS) {
            int64_t *at = t->rows == 1 ? &col : &row, mine = (t->rows == 1 ? p.cols : p.rows) / p.segments;
            *at = *at / mine * mine * tp + rank * mine + *at % mine;
        }
        float want = row < t->rows ? value(t->name, row * t->cols + col) : 0.0f;
        if (got[(size_t)i] != want) { fail_msg("%s, rank %d of %d: element %d is %g, not %g", t->name, rank, tp, (int)i, (double)got[(size_t)i], (double)want); }
    }
}

// ---- what is written ----

// The numbers of a tensor in a file, in F32
static std::vector<float> stored(const std::string& path, const char* name, const std::vector<int64_t>& shape) {
    SafeTensors file;
    assert_string_equal(safetensors_open(&file, path).c_str(), "");
    const SafeTensor* t = safetensors_find(&file, name);
    if (t == NULL) { fail_msg("no tensor '%s'", name); }
    assert_true(t->shape == shape);
    std::vector<float> x((size_t)safe_elements(t));
    assert_string_equal(safetensors_read_floats(x.data(), &file, t, 0, safe_elements(t)).c_str(), "");
    safetensors_close(&file);
    return x;
}

// By loops over rows, heads and parts, as the two architectures define their tensors
static void layouts_are_those_of_the_architectures(void**) {
    const int C = 12, H = 3, hs = 4;
    write_model(in_folder("gpt2"), &GPT2, FP32);
    write_model(in_folder("neox"), &NEOX, FP32);
    std::string gpt2 = in_folder("gpt2/model.safetensors"), neox = in_folder("neox/model.safetensors");
    std::vector<float> x = stored(gpt2, "transformer.h.1.attn.c_attn.weight", {C, 3 * C});
    for (int in = 0; in < C; in++) {
        for (int out = 0; out < 3 * C; out++) { assert_true(x[(size_t)(in * 3 * C + out)] == value("h1.qkvw", out * C + in)); }
    }
    x = stored(gpt2, "transformer.h.0.mlp.c_proj.weight", {4 * C, C});
    for (int in = 0; in < 4 * C; in++) {
        for (int out = 0; out < C; out++) { assert_true(x[(size_t)(in * C + out)] == value("h0.fcprojw", out * 4 * C + in)); }
    }
    x = stored(gpt2, "transformer.h.1.attn.c_attn.bias", {3 * C});
    for (int i = 0; i < 3 * C; i++) { assert_true(x[(size_t)i] == value("h1.qkvb", i)); }
    x = stored(gpt2, "transformer.wte.weight", {19, C});  // without padding
    for (int i = 0; i < 19 * C; i++) { assert_true(x[(size_t)i] == value("wte", i)); }
    x = stored(neox, "gpt_neox.layers.1.attention.query_key_value.weight", {3 * C, C});
    std::vector<float> b = stored(neox, "gpt_neox.layers.1.attention.query_key_value.bias", {3 * C});
    for (int h = 0, row = 0; h < H; h++) {
        for (int part = 0; part < 3; part++) {  // query, key, value
            for (int d = 0; d < hs; d++, row++) {
                int ours = part * C + h * hs + d;
                assert_true(b[(size_t)row] == value("h1.qkvb", ours));
                for (int in = 0; in < C; in++) { assert_true(x[(size_t)(row * C + in)] == value("h1.qkvw", ours * C + in)); }
            }
        }
    }
    x = stored(neox, "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", {4 * C, C});
    for (int i = 0; i < 4 * C * C; i++) { assert_true(x[(size_t)i] == value("h0.fcw", i)); }
    stored(neox, "embed_out.weight", {19, C});
    SafeTensors file;
    assert_string_equal(safetensors_open(&file, gpt2).c_str(), "");
    assert_int_equal(file.tensors.size(), 2 + 2 * 12 + 2);  // the tied head is not there
    safetensors_close(&file);
}

static void what_was_written_is_read(void**) {
    for (const ModelShape* s : {&GPT2, &NEOX}) {
        for (bool tied : {false, true}) {
            for (DType dtype : {FP32, BF16, FP16}) {
                ModelShape shape = *s;
                shape.tied = tied;
                std::string path = in_folder("model");
                write_model(path, &shape, dtype);
                WeightSource source = hf_source("--init", path.c_str());
                assert_memory_equal(&source.shape, &shape, sizeof(shape));
                for (const WholeTensor& t : tensors_of(&shape)) {
                    expect_values(&source, &t, 1, 0, TP_WHOLE);
                    for (TpAxis axis : {TP_ROWS, TP_COLS}) {
                        for (int rank = 0; rank < 3; rank++) {
                            if (axis == TP_COLS && t.rows == 1) { continue; }
                            if (axis == TP_ROWS && strcmp(t.name, "wpe") == 0) { continue; }  // 7 rows
                            expect_values(&source, &t, 3, rank, axis);
                        }
                    }
                }
                weight_source_close(&source);
            }
        }
    }
}

static void large_models_are_written_to_several_files(void**) {
    std::string whole = in_folder("whole"), parts = in_folder("parts");
    for (const ModelShape* s : {&GPT2, &NEOX}) {
        write_model(whole, s, BF16);
        write_model(parts, s, BF16, 1500);  // the MLPs' matrices take 1152 bytes
        assert_int_equal(access((whole + "/model.safetensors.index.json").c_str(), F_OK), -1);
        assert_int_equal(access((parts + "/model.safetensors").c_str(), F_OK), -1);
        WeightSource source = hf_source("--init", parts.c_str());
        for (const WholeTensor& t : tensors_of(s)) { expect_values(&source, &t, 1, 0, TP_WHOLE); }
        weight_source_close(&source);
        json_object* index = hf_json("test", parts + "/model.safetensors.index.json");
        int files = 0;
        int64_t total = 0;
        for (const std::string& name : listed(parts)) {
            if (!hf_is_model_file(name)) { continue; }
            SafeTensors file;
            assert_string_equal(safetensors_open(&file, parts + "/" + name).c_str(), "");
            assert_true(file.bytes <= 1500);
            files++;
            total += (int64_t)file.bytes;
            char expected[64];
            for (const SafeTensor& t : file.tensors) {
                assert_string_equal(json_object_get_string(hf_value(hf_value(index, "weight_map"), t.name.c_str())), name.c_str());
            }
            snprintf(expected, sizeof(expected), "model-%05d-of-", files);
            assert_memory_equal(name.c_str(), expected, strlen(expected));
            safetensors_close(&file);
        }
        assert_true(files > 4);
        SafeTensors one;
        assert_string_equal(safetensors_open(&one, whole + "/model.safetensors").c_str(), "");
        assert_int_equal(total, one.bytes);
        assert_int_equal(json_object_get_int64(hf_value(hf_value(index, "metadata"), "total_size")), total);
        assert_int_equal(json_object_object_length(hf_value(index, "weight_map")), one.tensors.size());
        safetensors_close(&one);
        json_object_put(index);
    }
}

static void llmc_models_are_written_as_they_are_read(void**) {
    for (DType dtype : {FP32, BF16}) {
        std::string path = in_folder("model.bin");
        llmc_write(path.c_str(), &GPT2, dtype, true, values_of_model());
        WeightSource source = llmc_source("--init", path.c_str());
        for (const WholeTensor& t : tensors_of(&GPT2)) { expect_values(&source, &t, 1, 0, TP_WHOLE); }
        weight_source_close(&source);
    }
    // and a model that llm.c's own layout was counted out for (model_io.cpp) comes out as it went in, but for the padding
    for (const char* golden : {"test/golden/llmc_v3.bin", "test/golden/llmc_v5.bin"}) {
        WeightSource source = llmc_source("--init", golden);
        std::vector<float> values;
        llmc_write(in_folder("copy.bin").c_str(), &source.shape, strstr(golden, "v3") != NULL ? FP32 : BF16, true, [&](const WholeTensor& t) {
            Param p = param_of(&t, 1, 0, TP_WHOLE);
            p.rows = p.valid_rows = t.rows;
            values.resize(param_elements(&p));
            source.read(values.data(), source.file, &p);
            return (const float*)values.data();
        });
        std::string a = text_of(golden), b = text_of(in_folder("copy.bin"));
        int each = strstr(golden, "v3") != NULL ? 4 : 2;
        const LlmcModel* m = (const LlmcModel*)source.file;
        size_t padding = 1024 + (size_t)(m->vocab * m->width * each), end = 1024 + (size_t)(m->padded_vocab * m->width * each);
        assert_int_equal(a.size(), b.size());
        assert_true(a.substr(0, padding) == b.substr(0, padding) && a.substr(end) == b.substr(end));
        assert_true(b.substr(padding, end - padding) == std::string(end - padding, '\0'));
        weight_source_close(&source);
    }
}

static void fp16_has_no_room_for_large_weights(void**) {
    std::vector<float> big(1000, 70000.0f);
    auto give = [&](const WholeTensor& t) {
        big.resize((size_t)(t.rows * t.cols), 70000.0f);
        return (const float*)big.data();
    };
    expect_end(1, "70000", "fp16", [&] { hf_write(in_folder("x").c_str(), &GPT2, FP16, "", true, give); });
}

// ---- what transformers have written ----

static void transformers_folders_are_read_and_come_out_with_the_same_bits(void**) {
    for (const char* path : {"test/golden/hf_gpt2", "test/golden/hf_gpt_neox"}) {
        WeightSource source = hf_source("--init", path);
        assert_true(source.shape.layers == 2 && source.shape.heads == 2 && source.shape.width == 16 && source.shape.vocab == 40 && source.shape.positions == 12);
        assert_true(source.shape.rope == (strstr(path, "neox") != NULL) && source.shape.tied == !source.shape.rope);
        std::vector<float> values;
        auto give = [&](const WholeTensor& t) {
            Param p = param_of(&t, 1, 0, TP_WHOLE);
            p.rows = p.valid_rows = t.rows;
            values.resize(param_elements(&p));
            source.read(values.data(), source.file, &p);
            return (const float*)values.data();
        };
        hf_write(in_folder("out").c_str(), &source.shape, BF16, path, true, give);
        SafeTensors out;
        assert_string_equal(safetensors_open(&out, in_folder("out/model.safetensors")).c_str(), "");
        size_t tensors = 0;
        for (const SafeTensors& in : ((const HfModel*)source.file)->files) {
            for (const SafeTensor& t : in.tensors) {
                const SafeTensor* same = safetensors_find(&out, t.name);
                assert_non_null(same);
                assert_true(same->type == t.type && same->shape == t.shape);
                std::string a(t.end - t.begin, 'a'), b(t.end - t.begin, 'b');
                assert_string_equal(safetensors_read(&a[0], &in, &t, 0, safe_elements(&t)).c_str(), "");
                assert_string_equal(safetensors_read(&b[0], &out, same, 0, safe_elements(&t)).c_str(), "");
                assert_true(a == b);
                tensors++;
            }
        }
        assert_int_equal(tensors, out.tensors.size());
        safetensors_close(&out);
        weight_source_close(&source);
    }
}

// The same without a prefix, with tensors that are no weights, and in the keys of older configurations
static void other_spellings_are_read(void**) {
    for (const ModelShape* s : {&GPT2, &NEOX}) {
        std::string path = in_folder("bare");
        mkdir(path.c_str(), 0777);
        SafeTensors file;
        std::string data;
        for (const char* extra : {"h.0.attn.bias", "h.0.attn.masked_bias", "layers.1.attention.rotary_emb.inv_freq", "layers.0.attention.bias"}) {
            safetensors_add(&file, extra, SAFE_BOOL, {1, 2});
            data += "12";
        }
        if (s->tied) {
            safetensors_add(&file, "lm_head.weight", SAFE_FP32, {1});
            data += "1234";
        }
        for (const WholeTensor& t : tensors_of(s)) {
            HfTensor h = hf_tensor(&t, s->rope, "");
            safetensors_add(&file, h.name, SAFE_FP32, h.shape);
            std::vector<float> x((size_t)(t.rows * t.cols));
            HfPlaces places = hf_places(h.layout, t.rows, t.cols, s);
            for (size_t i = 0; i < x.size(); i++) { x[(size_t)places((int64_t)i)] = value(t.name, (int64_t)i); }
            data.append((const char*)x.data(), x.size() * sizeof(float));
        }
        write_text(path + "/model.safetensors", safetensors_header(&file) + data);
        write_text(path + "/config.json", s->rope ? "{\"model_type\":\"gpt_neox\",\"vocab_size\":19,\"num_hidden_layers\":2,\"num_attention_heads\":3,\"hidden_size\":12,"
            "\"intermediate_size\":48,\"max_position_embeddings\":7,\"hidden_act\":\"gelu_fast\",\"use_parallel_residual\":false,\"rotary_pct\":1,\"rotary_emb_base\":10000,"
            "\"rope_scaling\":null,\"eos_token_id\":[1,2]}"
            : "{\"model_type\":\"gpt2\",\"vocab_size\":19,\"n_layer\":2,\"n_head\":3,\"n_embd\":12,\"n_positions\":7,\"n_inner\":null,\"bos_token_id\":3,\"eos_token_id\":4}");
        WeightSource source = hf_source("--init", path.c_str());
        assert_memory_equal(&source.shape, s, sizeof(*s));
        for (const WholeTensor& t : tensors_of(s)) { expect_values(&source, &t, 1, 0, TP_WHOLE); }
        weight_source_close(&source);
        remove_all(path);
    }
}

// ---- what is refused ----

static std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    if (at == std::string::npos) { fail_msg("there is no '%s' in %s", from.c_str(), text.c_str()); }
    return text.replace(at, from.size(), to);
}

static void expect_refused(const std::string& path, const char* word1, const char* word2) {
    expect_end(2, word1, word2, [&] { hf_source("--init", path.c_str()); });
}

static void configurations_that_compute_something_else_are_refused(void**) {
    const struct { bool rope; const char *from, *to, *word1, *word2; } bad[] = {
        {false, "\"gpt2\"", "\"llama\"", "model_type llama", "gpt2 and gpt_neox"},
        {false, "\"gpt2\"", "4", "model_type none", NULL},
        {false, "\"n_layer\": 2", "\"n_layer\": 0", "n_layer 0", "from 1 to 10000"},
        {false, "\"n_layer\": 2", "\"n_layer\": \"2\"", "n_layer \"2\"", "whole number"},
        {false, "\"n_layer\": 2", "\"n_layers\": 2", "has no n_layer", NULL},
        {false, "\"n_layer\": 2", "\"n_layer\": 3", "has no tensor 'transformer.h.2.ln_1.weight'", NULL},
        {false, "\"n_layer\": 2", "\"n_layer\": 1", "has a tensor 'transformer.h.1.", "which the model of its config.json has not"},
        {false, "\"n_head\": 3", "\"n_head\": 5", "n_embd 12", "5 heads"},
        {false, "\"n_embd\": 12", "\"n_embd\": 1e9", "n_embd", "whole number"},
        {false, "\"vocab_size\": 19", "\"vocab_size\": 20", "'transformer.wte.weight'", "is (19, 12), and config.json makes it (20, 12)"},
        {false, "\"n_positions\": 7", "\"n_positions\": 8", "wpe", "(8, 12)"},
        {false, "\"n_inner\": 48", "\"n_inner\": 47", "n_inner 47", "48"},
        {false, "\"gelu_new\"", "\"gelu\"", "activation_function gelu", "error function"},
        {false, "\"gelu_new\"", "\"relu\"", "activation_function relu", "tanh"},
        {false, "1e-05", "1e-06", "layer_norm_epsilon 1e-06", "1e-05"},
        {false, "\"scale_attn_weights\": true", "\"scale_attn_weights\": false", "scale_attn_weights false", NULL},
        {false, "\"scale_attn_by_inverse_layer_idx\": false", "\"scale_attn_by_inverse_layer_idx\": true", "scale_attn_by_inverse_layer_idx true", NULL},
        {false, "\"scale_attn_weights\": true", "\"add_cross_attention\": true", "add_cross_attention true", NULL},
        {false, "\"scale_attn_weights\": true", "\"quantization_config\": {}", "quantization_config", NULL},
        {false, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "has no tensor 'lm_head.weight'", NULL},
        {false, "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": 1", "tie_word_embeddings 1", "true or false"},
        {true, "\"use_parallel_residual\": false", "\"use_parallel_residual\": true", "use_parallel_residual true", "one after the other"},
        {true, "\"use_parallel_residual\": false,", "", "use_parallel_residual true", NULL},  // as transformers would have it
        {true, "\"attention_bias\": true", "\"attention_bias\": false", "attention_bias false", NULL},
        {true, "\"gelu_new\"", "\"gelu\"", "hidden_act gelu", "error function"},
        {true, "\"hidden_act\": \"gelu_new\",", "", "hidden_act gelu", NULL},
        {true, "\"partial_rotary_factor\": 1.0", "\"partial_rotary_factor\": 0.25", "rotary_pct 0.25", "always 1"},
        {true, "\"rope_theta\": 10000.0", "\"rope_theta\": 500000.0", "rotary_emb_base 500000", "always 10000"},
        {true, "\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", "rope_type \"yarn\"", NULL},
        {true, "\"rope_type\": \"default\"", "\"type\": \"linear\"", "rope_type \"linear\"", NULL},
        {true, "\"intermediate_size\": 48", "\"intermediate_size\": 12", "intermediate_size 12", "48"},
        {true, "\"layer_norm_eps\": 1e-05", "\"layer_norm_eps\": null, \"layer_norm_eps\": 0.001", "layer_norm_eps 0.001", NULL},
        {true, "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "", NULL},  // good: see below
        {true, "\"vocab_size\": 19", "\"vocab_size\": 16777217", "vocab_size 16777217", NULL},
        {true, "{", "[", "no JSON object", "config.json"},
        {true, "}", "", "no JSON object", "config.json"},
    };
    std::string path = in_folder("model");
    for (auto& b : bad) {
        write_model(path, b.rope ? &NEOX : &GPT2, BF16);
        std::string config = replaced(text_of(path + "/config.json"), b.from, b.to);
        write_text(path + "/config.json", config);
        if (b.word1[0] == '\0') {  // a head in the file, of a model that ties it: transformers ignore it too
            WeightSource source = hf_source("--init", path.c_str());
            assert_true(source.shape.tied);
            weight_source_close(&source);
            continue;
        }
        expect_refused(path, b.word1, b.word2);
    }
    // keys of their own where rope_parameters are not there; nothing at all is transformers' 0.25
    write_model(path, &NEOX, BF16);
    std::string config = text_of(path + "/config.json");
    size_t from = config.find("\"rope_parameters\""), to = config.find("},", from) + 2;
    config.erase(from, to - from);
    write_text(path + "/config.json", config);
    WeightSource source = hf_source("--init", path.c_str());
    weight_source_close(&source);
    write_text(path + "/config.json", replaced(config, "\"rotary_pct\": 1.0", "\"rotary_pct\": 0.5"));
    expect_refused(path, "rotary_pct 0.5", NULL);
    write_text(path + "/config.json", replaced(config, "\"rotary_pct\": 1.0,", ""));
    expect_refused(path, "rotary_pct 0.25 (by default)", NULL);
    write_text(path + "/config.json", replaced(config, "\"rotary_emb_base\": 10000", "\"rotary_emb_base\": 10001"));
    expect_refused(path, "rotary_emb_base 10001", NULL);
}

static void folders_without_a_whole_model_are_refused(void**) {
    std::string path = in_folder("model");
    mkdir(path.c_str(), 0777);
    expect_refused(path, "it has no config.json", NULL);
    write_model(path, &GPT2, BF16);
    unlink((path + "/model.safetensors").c_str());
    expect_refused(path, "neither model.safetensors nor", NULL);
    write_text(path + "/pytorch_model.bin", "x");
    expect_refused(path, "pytorch_model.bin cannot be read", NULL);
    write_text(path + "/model.safetensors", "x");
    expect_refused(path, "model.safetensors", "1 bytes");
    unlink((path + "/model.safetensors").c_str());
    for (const char* index : {"{\"weight_map\": {\"a\": \"../model.safetensors\"}}", "{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "{\"weight_map\": {\"a\": 3}}", "{\"weight_map\": {\"a\": \"\"}}"}) {
        write_text(path + "/model.safetensors.index.json", index);
        expect_refused(path, "names no file of its folder for 'a'", NULL);
    }
    write_text(path + "/model.safetensors.index.json", "{\"weight_map\": []}");
    expect_refused(path, "has no weight_map", NULL);
    write_text(path + "/model.safetensors.index.json", "[]");
    expect_refused(path, "no JSON object", NULL);
    write_text(path + "/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"nothing.safetensors\"}}");
    expect_refused(path, "nothing.safetensors", "No such file");
    // a tensor twice, and of the wrong type
    remove_all(path);
    write_model(path, &GPT2, BF16);
    write_text(path + "/b.safetensors", text_of(path + "/model.safetensors"));
    rename((path + "/model.safetensors").c_str(), (path + "/a.safetensors").c_str());
    write_text(path + "/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"a.safetensors\", \"b\": \"b.safetensors\"}}");
    expect_refused(path, "two files", "transformer.");
    remove_all(path);
    write_model(path, &GPT2, FP32);
    write_text(path + "/model.safetensors", replaced(text_of(path + "/model.safetensors"), "\"F32\"", "\"I32\""));
    expect_refused(path, "'transformer.wte.weight'", "is in I32; F32, BF16 and F16 can be read");
}

// ---- where it is written ----

static void only_earlier_exports_are_replaced(void**) {
    std::string path = in_folder("out");
    auto refused = [&](const char* word) { expect_end(2, "--export-hf", word, [&] { hf_require_writable("--export-hf", path.c_str()); }); };
    hf_require_writable("--export-hf", path.c_str());
    write_text(path, "text");
    refused("is no folder");
    unlink(path.c_str());
    assert_int_equal(symlink("/tmp", path.c_str()), 0);
    refused("is no folder");
    unlink(path.c_str());
    mkdir(path.c_str(), 0777);
    hf_require_writable("--export-hf", path.c_str());  // empty
    write_model(path, &NEOX, BF16, 1500);
    hf_require_writable("--export-hf", (path + "//").c_str());
    write_model(path + "/", &GPT2, BF16);
    assert_true(listed(path) == std::vector<std::string>({"config.json", "generation_config.json", "model.safetensors"}));
    assert_true(listed(folder) == std::vector<std::string>({"out"}));  // nothing is left beside it
    write_text(path + "/notes.txt", "mine");
    refused("'notes.txt', which no export writes");
    // also where they come while it trains: nothing is lost
    expect_end(1, "notes.txt", "the export is in", [&] { write_model(path, &NEOX, BF16); });
    assert_string_equal(text_of(path + "/notes.txt").c_str(), "mine");
    remove_all(path);
    copy_folder("test/golden/hf_gpt_neox", path);
    refused("'model.safetensors' was written by another program");
    unlink((path + "/model.safetensors").c_str());
    refused("holds no exported model");
    path = in_folder("nowhere/out");
    refused("there is no folder");
    for (const char* name : {".", "..", "/"}) {
        path = name;
        refused("name a folder of its own");
    }
}

// A disk that is full: a limit on the size of files stands for it
static void what_fails_leaves_what_was_there(void**) {
    std::string path = in_folder("out"), bin = in_folder("model.bin");
    write_model(path, &GPT2, BF16);
    llmc_write(bin.c_str(), &GPT2, BF16, true, values_of_model());
    std::string before = text_of(path + "/model.safetensors"), bin_before = text_of(bin);
    auto limited = [](rlim_t bytes) {
        signal(SIGXFSZ, SIG_IGN);
        struct rlimit limit = {bytes, bytes};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    };
    for (rlim_t bytes : {(rlim_t)0, (rlim_t)100, (rlim_t)4000}) {
        expect_end(1, "cannot write", (in_folder("out") + ".unfinished").c_str(), [&] { limited(bytes); write_model(path, &NEOX, FP32); });
        expect_end(1, "cannot write", (bin + ".unfinished").c_str(), [&] { limited(bytes); llmc_write(bin.c_str(), &GPT2, FP32, true, values_of_model()); });
        assert_true(listed(folder) == std::vector<std::string>({"model.bin", "out"}));
        assert_true(text_of(path + "/model.safetensors") == before && text_of(bin) == bin_before);
    }
}

static void a_tokenizer_goes_along(void**) {
    std::string path = in_folder("out"), tokenizer = in_folder("tokenizer");
    mkdir(tokenizer.c_str(), 0777);
    expect_end(2, "--hf-tokenizer", "none of tokenizer.json", [&] { hf_require_tokenizer("--hf-tokenizer", tokenizer.c_str()); });
    expect_end(2, "--hf-tokenizer", "no folder", [&] { hf_require_tokenizer("--hf-tokenizer", (tokenizer + "x").c_str()); });
    std::string large(200000, 'x');
    write_text(tokenizer + "/vocab.json", large);
    write_text(tokenizer + "/merges.txt", "a b\n");
    write_text(tokenizer + "/README.md", "not this");
    hf_require_tokenizer("--hf-tokenizer", tokenizer.c_str());
    write_model(path, &NEOX, BF16, HF_SHARD_BYTES, tokenizer);
    assert_true(listed(path) == std::vector<std::string>({"config.json", "merges.txt", "model.safetensors", "vocab.json"}));
    assert_true(text_of(path + "/vocab.json") == large);
    write_model(path, &NEOX, BF16, HF_SHARD_BYTES, path);  // its own
    assert_true(text_of(path + "/vocab.json") == large);
}

static void llmc_has_no_place_for_some_models(void**) {
    std::string path = in_folder("model.bin");
    auto refused = [&](const ModelShape* s, DType dtype, const char* word) { expect_end(2, "--export-llmc", word, [&] { llmc_require_writable("--export-llmc", path.c_str(), s, dtype); }); };
    ModelShape untied = GPT2;
    untied.tied = false;
    refused(&NEOX, BF16, "learned positions");
    refused(&untied, BF16, "token embedding");
    refused(&GPT2, FP16, "fp16");
    llmc_require_writable("--export-llmc", path.c_str(), &GPT2, BF16);
    write_text(path, "text");
    refused(&GPT2, BF16, "is no llm.c model");
    unlink(path.c_str());
    mkdir(path.c_str(), 0777);
    refused(&GPT2, BF16, "is no llm.c model");
    path = in_folder("nowhere/model.bin");
    refused(&GPT2, BF16, "cannot write to the folder");
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(layouts_are_those_of_the_architectures),
        IN_FOLDER(what_was_written_is_read),
        IN_FOLDER(large_models_are_written_to_several_files),
        IN_FOLDER(llmc_models_are_written_as_they_are_read),
        IN_FOLDER(fp16_has_no_room_for_large_weights),
        IN_FOLDER(transformers_folders_are_read_and_come_out_with_the_same_bits),
        IN_FOLDER(other_spellings_are_read),
        IN_FOLDER(configurations_that_compute_something_else_are_refused),
        IN_FOLDER(folders_without_a_whole_model_are_refused),
        IN_FOLDER(only_earlier_exports_are_replaced),
        IN_FOLDER(what_fails_leaves_what_was_there),
        IN_FOLDER(a_tokenizer_goes_along),
        IN_FOLDER(llmc_has_no_place_for_some_models),
    };
    return RUN_TESTS(tests);
}
