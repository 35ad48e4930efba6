// Tests of core/model_io.h: the golden llm.c files tensor by tensor against offsets counted here, and files that are no models.
#include "check.h"
#include <unistd.h>
#include "../core/model_io.h"

static const char* const V3 = "test/golden/llmc_v3.bin";
static const char* const V5 = "test/golden/llmc_v5.bin";

// ---- a file as bytes, and where its tensors are ----

static std::vector<char> bytes_of(const char* path) {
    FILE* f = fopen(path, "rb");
    if (f == NULL) { fail_msg("%s: %s (tests run from the root of the repository)", path, strerror(errno)); }
    std::vector<char> all;
    char buffer[4096];
    size_t n;
    while ((n = fread(buffer, 1, sizeof(buffer), f)) > 0) { all.insert(all.end(), buffer, buffer + n); }
    fclose(f);
    return all;
}

static int header_of(const std::vector<char>& file, int i) {
    int32_t x;
    memcpy(&x, file.data() + 4 * i, 4);
    return x;
}

struct Place { const char* name; int layer; int64_t rows, cols, first; };  // first: its first element's number in the file

// llm.c's order, all layers of one tensor together
static std::vector<Place> places(const std::vector<char>& file) {
    int64_t maxT = header_of(file, 2), L = header_of(file, 4), C = header_of(file, 6), Vp = header_of(file, 7), at = 0;
    struct Tensor { const char* name; bool layers; int64_t rows, cols; };
    const Tensor order[] = {{"wte", false, Vp, C},       {"wpe", false, maxT, C},  {"ln1w", true, 1, C},     {"ln1b", true, 1, C},
                            {"qkvw", true, 3 * C, C},    {"qkvb", true, 1, 3 * C}, {"attprojw", true, C, C}, {"attprojb", true, 1, C},
                            {"ln2w", true, 1, C},        {"ln2b", true, 1, C},     {"fcw", true, 4 * C, C},  {"fcb", true, 1, 4 * C},
                            {"fcprojw", true, C, 4 * C}, {"fcprojb", true, 1, C},  {"lnfw", false, 1, C},    {"lnfb", false, 1, C}};
    std::vector<Place> list;
    for (const Tensor& t : order) {
        for (int l = 0; l < (t.layers ? L : 1); l++) {
            list.push_back(Place{t.name, t.layers ? l : -1, t.rows, t.cols, at});
            at += t.rows * t.cols;
        }
    }
    assert_int_equal(1024 + at * (header_of(file, 1) == 3 ? 4 : 2), file.size());
    return list;
}

static double value_at(const std::vector<char>& file, int64_t element) {
    if (header_of(file, 1) == 3) {
        float x;
        memcpy(&x, file.data() + 1024 + 4 * element, 4);
        return (double)x;
    }
    uint16_t half;
    memcpy(&half, file.data() + 1024 + 2 * element, 2);
    return (half & 0x8000 ? -1.0 : 1.0)
           * ldexp((half & 0x7f80) != 0 ? 128.0 + (half & 0x7f) : 2.0 * (half & 0x7f), ((half >> 7) & 0xff) - 127 - 7);
}

static Param param_of(const Place& t, int valid_rows) {
    Param p = {};
    if (t.layer >= 0) {
        snprintf(p.name, sizeof(p.name), "h%d.%s", t.layer, t.name);
    } else {
        snprintf(p.name, sizeof(p.name), "%s", t.name);
    }
    p.layer = t.layer;
    p.rows = t.rows;
    p.cols = t.cols;
    p.valid_rows = valid_rows > 0 ? valid_rows : t.rows;
    return p;
}

// ---- good files ----

static void check_file(const char* path, int version, int element_bytes) {
    std::vector<char> file = bytes_of(path);
    assert_int_equal(header_of(file, 1), version);
    LlmcModel m = llmc_open("--init", path);
    assert_int_equal(m.element_bytes, element_bytes);
    assert_int_equal(m.positions, header_of(file, 2));
    assert_int_equal(m.vocab, header_of(file, 3));
    assert_int_equal(m.layers, header_of(file, 4));
    assert_int_equal(m.heads, header_of(file, 5));
    assert_int_equal(m.width, header_of(file, 6));
    assert_int_equal(m.padded_vocab, header_of(file, 7));
    assert_true(m.vocab < m.padded_vocab && m.layers == 2);  // so that padding and layers can be told apart
    for (const Place& t : places(file)) {
        bool wte = strcmp(t.name, "wte") == 0;
        Param p = param_of(t, wte ? m.vocab : 0);
        std::vector<float> got(param_elements(&p), NAN);
        llmc_read(got.data(), &m, &p);
        for (int64_t i = 0; i < t.rows * t.cols; i++) {
            double want = wte && i >= m.vocab * t.cols ? 0.0 : value_at(file, t.first + i);
            if ((double)got[(size_t)i] != want) {
                fail_msg("%s: %s[%d] is %.9g, not %.9g", path, p.name, (int)i, (double)got[(size_t)i], want);
            }
        }
    }
    llmc_close(&m);
    assert_int_equal(m.fd, -1);
}

static void every_tensor_of_version_3_is_read(void**) { check_file(V3, 3, 4); }
static void every_tensor_of_version_5_is_widened(void**) { check_file(V5, 5, 2); }

// The two files are the same model: BF16 is what FP32 rounds to.
static void both_versions_hold_the_same_model(void**) {
    LlmcModel a = llmc_open("--init", V3), b = llmc_open("--init", V5);
    for (const Place& t : places(bytes_of(V3))) {
        Param p = param_of(t, strcmp(t.name, "wte") == 0 ? a.vocab : 0);
        std::vector<float> x(param_elements(&p)), y(x.size());
        llmc_read(x.data(), &a, &p);
        llmc_read(y.data(), &b, &p);
        for (size_t i = 0; i < x.size(); i++) { assert_true(round_to<bf16>(x[i]) == y[i]); }
    }
    llmc_close(&a);
    llmc_close(&b);
}

// A rank of a layer reads its share: rows, of one tensor or of three one below the other, or columns; of the vocabulary perhaps padding alone
static void ranks_of_a_layer_read_their_shares(void**) {
    std::vector<char> file = bytes_of(V3);
    LlmcModel m = llmc_open("--init", V3);
    for (const Place& t : places(file)) {
        bool wte = strcmp(t.name, "wte") == 0, qkv = strncmp(t.name, "qkv", 3) == 0;
        for (TpAxis axis : {TP_ROWS, TP_COLS}) {
            for (int ranks : {2, 4}) {
                int segments = qkv && axis == TP_ROWS ? 3 : 1;
                int64_t rows = wte ? 128 * ranks : t.rows, cols = t.cols;  // the vocabulary with padding of our own
                bool bias = rows == 1, by_cols = axis == TP_COLS || bias;
                if ((by_cols ? cols : rows) % (ranks * segments) != 0) { continue; }
                for (int rank = 0; rank < ranks; rank++) {
                    Param p = param_of(t, 0);
                    p.rows = by_cols ? rows : rows / ranks;
                    p.cols = by_cols ? cols / ranks : cols;
                    p.tp_axis = axis;
                    p.tp_rank = rank;
                    p.tp_ranks = ranks;
                    p.segments = segments;
                    p.valid_rows = wte && axis == TP_ROWS ? max_of(min_of(m.vocab - p.rows * rank, p.rows), (int64_t)0) : wte ? m.vocab : p.rows;
                    std::vector<float> got(param_elements(&p), NAN);
                    llmc_read(got.data(), &m, &p);
                    int64_t width = by_cols && !(bias && axis == TP_ROWS) ? cols / ranks : bias ? cols / segments / ranks : 0;
                    for (int64_t i = 0; i < (int64_t)got.size(); i++) {
                        int64_t row = i / p.cols, col = i % p.cols;
                        if (bias && axis == TP_ROWS) { col = col / width * (cols / segments) + rank * width + col % width; }
                        else if (by_cols) { col += rank * width; }
                        else { int64_t part = rows / segments / ranks; row = row / part * (rows / segments) + rank * part + row % part; }
                        double want = wte && row >= m.vocab ? 0.0 : value_at(file, t.first + row * cols + col);
                        if ((double)got[(size_t)i] != want) { fail_msg("%s, rank %d of %d: element %d is %.9g, not %.9g", t.name, rank, ranks, (int)i, (double)got[(size_t)i], want); }
                    }
                }
            }
        }
    }
    llmc_close(&m);
}

// Our padding may be longer or shorter than the file's: the rows of the vocabulary are the same, the rest is zero. Fewer positions are
// the first ones.
static void another_padding_and_fewer_positions(void**) {
    std::vector<char> file = bytes_of(V3);
    LlmcModel m = llmc_open("--init", V3);
    std::vector<Place> list = places(file);
    for (int64_t rows : {(int64_t)m.vocab, (int64_t)m.padded_vocab + 128}) {
        Place wte = list[0];
        wte.rows = rows;
        Param p = param_of(wte, m.vocab);
        std::vector<float> got(param_elements(&p), NAN);
        llmc_read(got.data(), &m, &p);
        for (int64_t i = 0; i < rows * m.width; i++) {
            assert_true((double)got[(size_t)i] == (i < m.vocab * m.width ? value_at(file, i) : 0.0));
        }
    }
    Place wpe = list[1];
    wpe.rows = 5;
    Param p = param_of(wpe, 0);
    std::vector<float> got(param_elements(&p), NAN);
    llmc_read(got.data(), &m, &p);
    for (int64_t i = 0; i < 5 * m.width; i++) { assert_true((double)got[(size_t)i] == value_at(file, wpe.first + i)); }
    Param unknown = {};
    snprintf(unknown.name, sizeof(unknown.name), "lmhead");
    unknown.rows = unknown.valid_rows = unknown.cols = 1;
    float x;
    expect_end(1, "lmhead", NULL, [&] { llmc_read(&x, &m, &unknown); });
    llmc_close(&m);
}

// ---- bad files ----

static char folder[1024];

static int make_folder(void**) {
    snprintf(folder, sizeof(folder), "%s/model_io_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir);
    return mkdtemp(folder) == NULL ? -1 : 0;
}

static int remove_folder(void**) { return rmdir(folder); }

// A file of these bytes is refused with exit code 2 and one line that names the flag, the file, and `word`.
static void expect_refusal(const std::vector<char>& bytes, const char* word) {
    char path[1100];
    snprintf(path, sizeof(path), "%s/model.bin", folder);
    FILE* f = fopen(path, "wb");
    assert_non_null(f);
    if (!bytes.empty()) { assert_int_equal(fwrite(bytes.data(), 1, bytes.size(), f), bytes.size()); }
    assert_int_equal(fclose(f), 0);
    End end = end_of([&] { llmc_open("--init", path); });
    remove(path);
    if (end.code != 2 || end.lines != 1 || strncmp(end.text, "train_gpt_fp8: --init: ", 23) != 0 || strstr(end.text, path) == NULL
        || strstr(end.text, word) == NULL) {
        fail_msg("ended with code %d and said '%s', which should be one line with '%s'", end.code, end.text, word);
    }
}

static std::vector<char> changed(const std::vector<char>& file, int at, int32_t value) {
    std::vector<char> copy = file;
    memcpy(copy.data() + 4 * at, &value, 4);
    return copy;
}

static std::vector<char> first_bytes(const std::vector<char>& file, size_t n) {
    return std::vector<char>(file.begin(), file.begin() + (long)n);
}

static void missing_files_and_folders_are_refused(void**) {
    expect_end(2, "--init: cannot open 'test/golden/nothing.bin'", "No such file", [] { llmc_open("--init", "test/golden/nothing.bin"); });
    expect_end(2, "-e: 'test/golden' is not a file", NULL, [] { llmc_open("-e", "test/golden"); });
    expect_end(2, "--init: cannot open ''", NULL, [] { llmc_open("--init", ""); });
}

static void files_that_are_no_models_are_refused(void**) {
    std::vector<char> file = bytes_of(V3);
    expect_refusal({}, "0 bytes");
    expect_refusal(first_bytes(file, 4), "4 bytes");
    expect_refusal(first_bytes(file, 1023), "1023 bytes");
    expect_refusal(changed(file, 0, 20240520), "20240520");
    expect_refusal(changed(file, 0, 0), "starts with 0");
    for (int version : {-1, 0, 1, 2, 4, 6, 7}) {
        char word[32];
        snprintf(word, sizeof(word), "version %d", version);
        expect_refusal(changed(file, 1, version), word);
    }
}

static void files_of_the_wrong_length_are_refused(void**) {
    for (const char* path : {V3, V5}) {
        std::vector<char> file = bytes_of(path), longer = file;
        char size[32];
        snprintf(size, sizeof(size), "%zu bytes", file.size());
        longer.push_back(0);
        expect_refusal(first_bytes(file, file.size() - 1), "cut short");
        expect_refusal(first_bytes(file, file.size() - 1), size);
        expect_refusal(first_bytes(file, 1024), "cut short");
        expect_refusal(longer, "too long");
        // a shape that is possible but not this file's
        expect_refusal(changed(file, 4, header_of(file, 4) + 1), "cut short");
        expect_refusal(changed(file, 2, header_of(file, 2) - 1), "too long");
    }
    expect_refusal(changed(bytes_of(V3), 1, 5), "too long");
    expect_refusal(changed(bytes_of(V5), 1, 3), "cut short");
}

static void impossible_shapes_are_refused(void**) {
    std::vector<char> file = bytes_of(V3);
    for (int at = 2; at <= 7; at++) {
        for (int32_t value : {0, -1, INT32_MIN, INT32_MAX}) { expect_refusal(changed(file, at, value), "names a shape that no GPT has"); }
    }
    expect_refusal(changed(file, 5, 3), "names a shape that no GPT has");                       // width 16 in 3 heads
    expect_refusal(changed(file, 5, 32), "names a shape that no GPT has");                      // more heads than columns
    expect_refusal(changed(file, 7, header_of(file, 3) - 1), "names a shape that no GPT has");  // padded to less than the vocabulary
    // all at their limits: the sizes are counted in 64 bits
    std::vector<char> huge = changed(changed(changed(changed(file, 2, 1 << 24), 3, 1 << 24), 4, 10000), 6, 1 << 20);
    expect_refusal(changed(huge, 7, 1 << 24), "cut short");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_tensor_of_version_3_is_read),
        cmocka_unit_test(every_tensor_of_version_5_is_widened),
        cmocka_unit_test(both_versions_hold_the_same_model),
        cmocka_unit_test(another_padding_and_fewer_positions),
        cmocka_unit_test(ranks_of_a_layer_read_their_shares),
        cmocka_unit_test(missing_files_and_folders_are_refused),
        cmocka_unit_test_setup_teardown(files_that_are_no_models_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(files_of_the_wrong_length_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(impossible_shapes_are_refused, make_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);  // no device is needed
}
