// Tests of core/checkpoint.cuh and core/checkpoint_reader.cuh: names, checksums, where elements lie, values that are not finite, how a save ends, and what becomes of damaged files.
#include "check.h"
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include "../core/checkpoint_reader.cuh"

static bool soak(void) { return getenv("SOAK") != NULL; }

static std::string scratch;  // a folder of this program

static std::string fresh_folder(const char* name) {
    std::string path = scratch + "/" + name;
    for (const std::string& inner : names_in(path)) { remove_folder(path + "/" + inner); unlink((path + "/" + inner).c_str()); }
    rmdir(path.c_str());
    if (mkdir(path.c_str(), 0777) != 0) { fail_msg("%s: %s", path.c_str(), strerror(errno)); }
    return path;
}

static void write_bytes(const std::string& path, const std::string& bytes) {
    std::string wrong = write_text(path, bytes);
    if (!wrong.empty()) { fail_msg("%s", wrong.c_str()); }
}
static std::string bytes_of(const std::string& path) {
    std::string text, wrong = read_text(&text, path);
    if (!wrong.empty()) { fail_msg("%s", wrong.c_str()); }
    return text;
}

// ---- names ----

static void only_whole_names_are_checkpoints(void**) {
    assert_string_equal(checkpoint_name(7).c_str(), "step_00000007");
    assert_string_equal(checkpoint_name(123456789012).c_str(), "step_123456789012");
    assert_int_equal(checkpoint_step("step_00000007"), 7);
    assert_int_equal(checkpoint_step("step_00000000"), 0);
    assert_int_equal(checkpoint_step("step_123456789012"), 123456789012);
    for (const char* name : {"step_7", "step_0000007", "step_00000007.tmp", "step_00000007.old", "step_", "step_0000000x", "step_000000007", "steps_00000007", "", "latest",
                             "step_99999999999999999999999999", "step_-0000001", "step_ 0000001"}) {
        if (checkpoint_step(name) != -1) { fail_msg("'%s' is taken for a checkpoint", name); }
    }
    std::string folder = fresh_folder("names");
    for (const char* name : {"step_00000002", "step_00000010", "step_00000009.tmp", "step_00000001.old", "other.tmp"}) { assert_int_equal(mkdir((folder + "/" + name).c_str(), 0777), 0); }
    std::vector<int64_t> steps = checkpoints_in(folder);
    assert_int_equal(steps.size(), 2);
    assert_int_equal(steps[0], 10);
    write_bytes(folder + "/step_00000009.tmp/rank_00000.safetensors", "half");
    remove_unfinished(folder);
    std::vector<std::string> left = names_in(folder);
    assert_true(left == (std::vector<std::string>{"other.tmp", "step_00000002", "step_00000010"}));
    assert_true(checkpoints_in("/nowhere/at/all").empty());
}

static void checksums_are_those_of_xxh128sum(void**) {
    // of the empty text and of 3 bytes: XXH3's published vectors for 128 bits, seed 0
    assert_string_equal(digest_of(std::string()).hex, "99aa06d3014798d86001c324468d497f");
    std::string long_text(3 * CHECKPOINT_CHUNK + 17, 'x');
    for (size_t i = 0; i < long_text.size(); i++) { long_text[i] = (char)mix64(i); }
    std::string path = fresh_folder("sums") + "/file";
    write_bytes(path, long_text);
    Digest d;
    assert_int_equal(digest_of_file(&d, path), 0);
    assert_string_equal(d.hex, digest_of(long_text).hex);  // by pieces as at once
    assert_int_equal(digest_of_file(&d, path + "x"), ENOENT);
    std::vector<Checksum> sums = {{digest_of(std::string("a")).hex, "rank_00000.safetensors"}, {digest_of(std::string("b")).hex, "config.json"}}, back;
    std::string text = checksums_text(sums);
    assert_true(checksums_parse(&back, text));
    assert_int_equal(back.size(), 2);
    assert_string_equal(back[1].file.c_str(), "config.json");
    assert_string_equal(back[1].digest.c_str(), sums[1].digest.c_str());
    std::string config = text.substr(text.find("rank_00000.safetensors") + 23);
    for (std::string bad : {std::string(), text.substr(0, text.size() - config.size()), config, text.substr(0, 32) + "  rank_00001.safetensors\n" + config, text.substr(0, text.size() - 1), text + text, "x" + text, text.substr(1), std::string("\n"), "0" + text.substr(1, 31) + "  ../etc\n",
                            text.substr(0, 32) + "  .hidden\n", text.substr(0, 32) + " one\n", text.substr(0, 32) + "  \n"}) {
        std::vector<Checksum> none;
        if (checksums_parse(&none, bad)) { fail_msg("taken for checksums: %s", bad.c_str()); }
    }
}

// ---- where elements lie ----

static void places_survive_as_text(void**) {
    Place p = {128, 4096, ElementMap{64, 256, 192}}, q;
    assert_true(place_parse(&q, place_text(p).c_str()));
    assert_memory_equal(&p, &q, sizeof(p));
    for (const char* bad : {"", "first 1", "first 1 count 2 run 3 stride 4 offset 5 more", "first -1 count 2 run 0 stride 0 offset 0", "first 1 count -2 run 0 stride 0 offset 0",
                            "first 1 count 2 run 4 stride 3 offset 0", "first 99999999999999999999 count 2 run 0 stride 0 offset 0"}) {
        if (place_parse(&q, bad)) { fail_msg("taken for a place: '%s'", bad); }
    }
}

// A random way to share a tensor of `rows` rows: by rows, of segments, or by columns
static std::vector<ElementMap> random_shares(int64_t rows, int64_t cols, std::vector<int64_t>* counts) {
    int ranks = 1 << random_u32() % 3, how = (int)(random_u32() % 3);
    std::vector<ElementMap> maps;
    for (int r = 0; r < ranks; r++) {
        Param p = {};
        p.tp_rank = r;
        p.tp_ranks = ranks;
        p.segments = how == 0 ? 3 : 1;
        p.tp_axis = ranks == 1 ? TP_WHOLE : how == 2 ? TP_COLS : TP_ROWS;
        p.rows = how == 2 ? rows : rows / ranks;
        p.cols = how == 2 ? cols / ranks : cols;
        maps.push_back(whole_elements(&p));
        counts->push_back(p.rows * p.cols);
    }
    return maps;
}

// An inverse or a run's end that is wrong by one; a source that is left out
static void every_element_is_found_where_it_is(void**) {
    for (int trial = 0; trial < (soak() ? 4000 : 300); trial++) {
        int64_t rows = 12 * (1 + random_u32() % 3), cols = 4 * (1 + random_u32() % 7), all = rows * cols;
        std::vector<int64_t> counts, wanted_counts;
        std::vector<ElementMap> maps = random_shares(rows, cols, &counts), wanted = random_shares(rows, cols, &wanted_counts);
        std::vector<CheckpointReader::Source> sources;
        std::vector<std::vector<int64_t>> held;  // the whole tensor's numbers, by source
        for (size_t r = 0; r < maps.size(); r++) {
            for (int64_t at = 0; at < counts[r];) {  // each share cut into stretches
                int64_t n = min_of(1 + (int64_t)(random_u32() % 50), counts[r] - at);
                if (random_u32() % 4 == 0) { n = counts[r] - at; }
                sources.push_back({(int)sources.size(), Place{at, n, maps[r]}});
                held.push_back({});
                for (int64_t i = 0; i < n; i++) { held.back().push_back((int64_t)maps[r]((uint64_t)(at + i))); }
                at += n;
            }
        }
        int lost = random_u32() % 3 == 0 ? (int)(random_u32() % sources.size()) : -1;
        std::vector<bool> is_there((size_t)all, true);
        if (lost >= 0) {
            for (int64_t w : held[(size_t)lost]) { is_there[(size_t)w] = false; }
            sources.erase(sources.begin() + lost);
            held.erase(held.begin() + lost);
        }
        for (size_t r = 0; r < wanted.size(); r++) {
            int64_t first = random_u32() % 2 == 0 ? 0 : (int64_t)(random_u32() % (uint32_t)wanted_counts[r]), count = wanted_counts[r] - first, next = 0;
            each_found(sources, wanted[r], first, count, [&](int64_t to, int source, int64_t from, int64_t n) {
                assert_int_equal(to, next);
                assert_true(n > 0 && to + n <= count);
                for (int64_t i = 0; i < n; i++) {
                    int64_t w = (int64_t)wanted[r]((uint64_t)(first + to + i));
                    if (source < 0) {
                        if (is_there[(size_t)w]) { fail_msg("element %d is not found", (int)w); }
                        continue;
                    }
                    assert_true(from + i < (int64_t)held[(size_t)source].size());
                    assert_int_equal(held[(size_t)source][(size_t)(from + i)], w);
                }
                next = to + n;
            });
            assert_int_equal(next, count);
        }
    }
}

// ---- values that are not finite ----

static void what_is_not_finite_is_found(void**) {
    const struct { SafeType type; DType dtype; } types[] = {{SAFE_FP32, FP32}, {SAFE_BF16, BF16}, {SAFE_FP16, FP16}, {SAFE_E4M3, E4M3}, {SAFE_E5M2, E5M2}, {SAFE_UE5M3, UE5M3}};
    for (auto& t : types) {
        int bytes = dtype_bytes(t.dtype);
        uint32_t codes = bytes == 1 ? 256 : 65536;
        for (uint32_t code = 0; code < codes; code++) {
            uint32_t bits = bytes == 4 ? code << 16 | (code & 1) : code;
            float value = load_as(t.dtype, &bits, Range<1>{0}, 1, 1.0f).v[0];
            bool found = first_not_finite(t.type, &bits, (size_t)bytes) == 0;
            if (found == (bool)isfinite(value)) { fail_msg("%s: code %x is %g", dtype_names[t.dtype], bits, (double)value); }
        }
        std::vector<char> many(9000 * (size_t)bytes, 0);
        assert_int_equal(first_not_finite(t.type, many.data(), many.size()), -1);
        memset(&many[8999 * (size_t)bytes], t.type == SAFE_E5M2 ? 0x7c : t.type == SAFE_UE5M3 ? 0xff : 0x7f, (size_t)bytes);
        if (t.type == SAFE_FP32 || t.type == SAFE_BF16) { memset(&many[8999 * (size_t)bytes], 0xff, (size_t)bytes); }
        assert_int_equal(first_not_finite(t.type, many.data(), many.size()), 8999);
        assert_int_equal(first_not_finite(t.type, many.data(), many.size() - (size_t)bytes), -1);
    }
    assert_int_equal(first_not_finite(SAFE_I8, "\x7f\xff", 2), -1);
}

// ---- saving ----

// One rank's state of one matrix in FP16 with exponents, one vector in FP32
struct State {
    Param matrix, vector;
    std::vector<uint16_t> codes;
    std::vector<int8_t> exponents;
    std::vector<float> values;
    State() : codes(24 * 32), exponents(6), values(40) {
        matrix = vector = Param{};
        snprintf(matrix.name, sizeof(matrix.name), "h0.qkvw");
        snprintf(vector.name, sizeof(vector.name), "h0.qkvb");
        matrix.rows = matrix.valid_rows = 24;
        matrix.cols = 32;
        vector.rows = vector.valid_rows = 1;
        vector.cols = 40;
        for (Param* p : {&matrix, &vector}) { p->own_count = param_elements(p); p->tp_ranks = p->segments = 1; }
        for (size_t i = 0; i < codes.size(); i++) { codes[i] = (uint16_t)(0x3000 + i); }
        for (size_t i = 0; i < exponents.size(); i++) { exponents[i] = (int8_t)(3 + i); }
        for (size_t i = 0; i < values.size(); i++) { values[i] = (float)i * 0.25f; }
    }
    CheckpointShare share() const {
        CheckpointShare s;
        for (const Param* p : {&matrix, &vector}) { s.places.push_back({p->name, place_text(Place{0, (int64_t)p->own_count, whole_elements(p)})}); }
        share_add_state(&s, &matrix, "master", FP16, codes.data(), NULL, exponents.data());
        share_add_state(&s, &vector, "master", FP32, values.data(), NULL, NULL);
        return s;
    }
};

static Group alone(void) {
    Group g = {};
    g.size = 1;
    g.transport = ALONE;
    g.ranks_per_device = 1;
    return g;
}

static SaveOutcome save(Checkpoints* c, int64_t step, const State& state) {
    checkpoint_begin(c, step, state.share(), {{"{\"samples\": 3}\n", "loader.json"}, {"{}\n", "config.json"}}, NULL);
    checkpoint_conclude(c);
    return checkpoint_outcome(c);
}

static void a_save_is_whole_or_not_there(void**) {
    Group world = alone();
    State state;
    for (size_t memory : {(size_t)1 << 20, (size_t)0}) {
        std::string folder = fresh_folder("save");
        Checkpoints c;
        checkpoints_open(&c, folder, 2, memory, &world);
        for (int64_t step : {5, 10, 15, 20}) {
            SaveOutcome o = save(&c, step, state);
            if (!o.good) { fail_msg("%s", o.wrong); }
            assert_int_equal(o.step, step);
            assert_int_equal(c.last, step);
            assert_string_equal(bytes_of(folder + "/latest").c_str(), (checkpoint_name(step) + "\n").c_str());
        }
        assert_true(checkpoints_in(folder) == (std::vector<int64_t>{20, 15}));  // keep 2
        std::vector<Checksum> sums;
        assert_string_equal(checkpoint_verify(&sums, folder + "/step_00000020", &world).c_str(), "");
        assert_int_equal(sums.size(), 3);
        // a value that is not finite: nothing of it stays, and the older ones do
        uint16_t was = state.codes[100];
        state.codes[100] = 0x7c00;
        SaveOutcome o = save(&c, 25, state);
        assert_false(o.good);
        assert_non_null(strstr(o.wrong, "element 100 of h0.qkvw.master is not finite"));
        state.codes[100] = was;
        assert_true(checkpoints_in(folder) == (std::vector<int64_t>{20, 15}));
        assert_int_equal(c.last, 20);
        // no folder to write to
        assert_int_equal(rename(folder.c_str(), (folder + ".away").c_str()), 0);
        o = save(&c, 25, state);
        assert_false(o.good);
        assert_non_null(strstr(o.wrong, "No such file"));
        assert_int_equal(rename((folder + ".away").c_str(), folder.c_str()), 0);
        // the same step again replaces what is there; nothing unfinished is left
        state.values[3] = 9.0f;
        assert_true(save(&c, 20, state).good);
        CheckpointReader reader;
        assert_string_equal(checkpoint_verify(&sums, folder + "/step_00000020", &world).c_str(), "");
        assert_string_equal(reader_open(&reader, folder + "/step_00000020", sums).c_str(), "");
        StateBytes x;
        assert_string_equal(reader_state(&x, &reader, &state.vector, "master", FP32, 0, 40, false, false).c_str(), "");
        assert_memory_equal(x.codes.data(), state.values.data(), 160);
        state.values[3] = 0.75f;
        for (const std::string& name : names_in(folder)) { assert_true(name.find(".tmp") == std::string::npos && name.find(".old") == std::string::npos); }
        checkpoints_close(&c);
    }
}

// ---- reading ----

static double value_of(const StateBytes& x, size_t i) {
    float v = load_as(FP16, x.codes.data(), Range<1>{i}, 1, 1.0f).v[0];
    return ldexp((double)v, -x.exponents[i / STATE_BLOCK]);
}

// Exponents that go with the wrong elements; a block that is rounded again by the wrong exponent
static void blocks_are_the_same_or_rounded_again(void**) {
    Group world = alone();
    State state;
    std::string folder = fresh_folder("blocks");
    Checkpoints c;
    checkpoints_open(&c, folder, 0, (size_t)1 << 20, &world);
    assert_true(save(&c, 1, state).good);
    checkpoints_close(&c);
    std::vector<Checksum> sums;
    CheckpointReader reader;
    assert_string_equal(checkpoint_verify(&sums, folder + "/step_00000001", &world).c_str(), "");
    assert_string_equal(reader_open(&reader, folder + "/step_00000001", sums).c_str(), "");
    StateBytes all, x;
    assert_string_equal(reader_state(&all, &reader, &state.matrix, "master", FP16, 0, 768, false, true).c_str(), "");
    assert_memory_equal(all.codes.data(), state.codes.data(), 2 * 768);
    assert_memory_equal(all.exponents.data(), state.exponents.data(), 6);
    assert_int_equal(all.rounded, 0);
    assert_string_equal(reader_state(&x, &reader, &state.matrix, "master", FP16, 256, 300, false, true).c_str(), "");  // whole blocks of it, and a part
    assert_memory_equal(x.codes.data(), state.codes.data() + 256, 600);
    assert_memory_equal(x.exponents.data(), state.exponents.data() + 2, 3);
    assert_string_equal(reader_state(&x, &reader, &state.matrix, "master", FP16, 64, 256, false, true).c_str(), "");  // across blocks
    assert_int_equal(x.rounded, 2);
    for (size_t i = 0; i < 256; i++) {
        double want = value_of(all, 64 + i);
        if (fabs(value_of(x, i) - want) > ldexp(fabs(want), -11)) { fail_msg("element %zu: %g, not %g", i, value_of(x, i), want); }
    }
    Param half = state.matrix;  // 16 of the 32 columns: runs of 16 elements from every row
    half.tp_axis = TP_COLS;
    half.tp_ranks = 2;
    half.tp_rank = 1;
    half.cols = 16;
    assert_string_equal(reader_state(&x, &reader, &half, "master", FP16, 0, 384, false, true).c_str(), "");
    for (size_t i = 0; i < 384; i++) {
        double want = value_of(all, i / 16 * 32 + 16 + i % 16);
        if (fabs(value_of(x, i) - want) > ldexp(fabs(want), -11)) { fail_msg("element %zu: %g, not %g", i, value_of(x, i), want); }
    }
    // what nobody has is zero where it is padding, and else an error
    Param longer = state.matrix;
    longer.rows = 30;
    assert_string_equal(reader_state(&x, &reader, &longer, "master", FP16, 0, 960, false, true).c_str(), "");
    assert_int_equal(x.exponents[7], 0);
    for (size_t i = 768; i < 960; i++) { assert_int_equal(((uint16_t*)x.codes.data())[i], 0); }
    longer.valid_rows = 25;
    assert_non_null(strstr(reader_state(&x, &reader, &longer, "master", FP16, 0, 960, false, true).c_str(), "element 768 of h0.qkvw.master is in no file"));
    assert_non_null(strstr(reader_state(&x, &reader, &state.matrix, "master", BF16, 0, 768, false, true).c_str(), "is F16, and would have to be BF16"));
    assert_non_null(strstr(reader_state(&x, &reader, &state.matrix, "m", FP16, 0, 768, false, true).c_str(), "there is no h0.qkvw.m"));
    assert_non_null(strstr(reader_state(&x, &reader, &state.matrix, "master", FP16, 0, 768, true, true).c_str(), "h0.qkvw.master.slot"));
}

// Every kind of damage to every file: never taken for whole, unless nothing has changed. Without the checksums the reader must still end in an error, not crash
static void damage_never_goes_unseen(void**) {
    Group world = alone();
    State state;
    std::string folder = fresh_folder("damage");
    Checkpoints c;
    checkpoints_open(&c, folder, 0, (size_t)1 << 20, &world);
    assert_true(save(&c, 1, state).good);
    checkpoints_close(&c);
    std::string path = folder + "/step_00000001";
    std::vector<std::string> files;
    for (const std::string& name : names_in(path)) {
        if (name[0] != '.') { files.push_back(name); }
    }
    assert_int_equal(files.size(), 4);
    for (int trial = 0; trial < (soak() ? 2000 : 200); trial++) {
        std::string file = path + "/" + files[(size_t)trial % files.size()], whole = bytes_of(file), bad = whole;
        size_t at = random_u32() % whole.size(), other = random_u32() % whole.size();
        switch (random_u32() % 5) {
            case 0: bad[at] = (char)(bad[at] ^ (1 << random_u32() % 8)); break;
            case 1: bad.resize(at); break;
            case 2: std::swap(bad[at], bad[other]); break;
            case 3: bad.insert(at, 1, (char)random_u32()); break;
            default: for (size_t i = at; i < min_of(at + 16, bad.size()); i++) { bad[i] = 0; } break;
        }
        if (random_u32() % 20 == 0) { unlink(file.c_str()); } else { write_bytes(file, bad); }
        bool changed = access(file.c_str(), F_OK) != 0 || bad != whole;
        std::vector<Checksum> sums;
        std::string wrong = checkpoint_verify(&sums, path, &world);
        if (changed == wrong.empty()) { fail_msg("trial %d, %s: %s", trial, file.c_str(), changed ? "damage was not seen" : wrong.c_str()); }
        CheckpointReader reader;
        std::vector<Checksum> names = {{"", "rank_00000.safetensors"}};
        if (reader_open(&reader, path, names).empty()) {
            StateBytes x;
            reader_state(&x, &reader, &state.matrix, "master", FP16, 0, 768, false, true);
            reader_state(&x, &reader, &state.vector, "master", FP32, 0, 40, false, false);
        }
        write_bytes(file, whole);
        sums.clear();
        assert_string_equal(checkpoint_verify(&sums, path, &world).c_str(), "");
    }
    std::string a = bytes_of(path + "/config.json"), b = bytes_of(path + "/loader.json");
    write_bytes(path + "/config.json", b);
    write_bytes(path + "/loader.json", a);
    std::vector<Checksum> sums;
    assert_non_null(strstr(checkpoint_verify(&sums, path, &world).c_str(), "is damaged"));
}

int main(void) {
#ifdef USE_CUDA
    if (device_count() == 0) { printf("1..0 # SKIP no GPU\n"); return 0; }
#endif
    char folder[] = "/tmp/checkpoint.XXXXXX";
    if (mkdtemp(folder) == NULL) { return 1; }
    scratch = folder;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_whole_names_are_checkpoints),
        cmocka_unit_test(checksums_are_those_of_xxh128sum),
        cmocka_unit_test(places_survive_as_text),
        cmocka_unit_test(every_element_is_found_where_it_is),
        cmocka_unit_test(what_is_not_finite_is_found),
        cmocka_unit_test(a_save_is_whole_or_not_there),
        cmocka_unit_test(blocks_are_the_same_or_rounded_again),
        cmocka_unit_test(damage_never_goes_unseen),
    };
    int failed = cmocka_run_group_tests_name("checkpoint", tests, NULL, NULL);
    std::string command = "rm -rf '" + scratch + "'";
    return system(command.c_str()) != 0 ? 1 : failed;
}
