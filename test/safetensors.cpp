// Tests of core/safetensors.h: the bytes of a small file against a file written here by hand, what is read of it, and files that are none: chosen ones, and
// thousands of damaged ones, each of which must be refused or be read without a contradiction.
#include "check.h"
#include <string>
#include <unistd.h>
#include "../core/safetensors.h"

// ---- files ----

static char folder[1024];
static std::string path_here;

static int make_folder(void**) {
    snprintf(folder, sizeof(folder), "%s/safetensors_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir);
    if (mkdtemp(folder) == NULL) { return -1; }
    path_here = std::string(folder) + "/file.safetensors";
    return 0;
}

static int remove_folder(void**) {
    unlink(path_here.c_str());
    return rmdir(folder);
}

static void write_file(const std::string& bytes) {
    FILE* f = fopen(path_here.c_str(), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes.data(), 1, bytes.size(), f), bytes.size());
    assert_int_equal(fclose(f), 0);
}

static std::string little_endian(uint64_t x, int bytes) {
    std::string s;
    for (int i = 0; i < bytes; i++) { s += (char)(x >> (8 * i) & 0xff); }
    return s;
}

// A file of this header, as it is, and these bytes of tensors
static std::string file_of(const std::string& header, const std::string& data) { return little_endian(header.size(), 8) + header + data; }

// What safetensors_open says of such a file
static std::string said_of(const std::string& bytes) {
    write_file(bytes);
    SafeTensors file;
    std::string wrong = safetensors_open(&file, path_here);
    safetensors_close(&file);
    return wrong;
}

static void expect_refused(const std::string& bytes, const char* word) {
    std::string wrong = said_of(bytes);
    if (wrong.empty() || wrong.find(word) == std::string::npos) { fail_msg("said '%s', which should hold '%s'", wrong.c_str(), word); }
}

// ---- a good file ----

// By hand: three tensors of 16, 6 and 0 bytes behind a header of a multiple of 8
static std::string good_header() {
    std::string h = "{\"__metadata__\":{\"format\":\"pt\"},\"a.weight\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},"
                    "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]},\"c\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[22,22]}}";
    while (h.size() % 8 != 0) { h += ' '; }
    return h;
}
static std::string good_data() {
    return little_endian(0x3f800000, 4) + little_endian(0xc0000000, 4) + little_endian(0, 4) + little_endian(0x3eaaaaab, 4)  // 1, -2, 0, 1/3
           + little_endian(0x3fc0, 2) + little_endian(0x4049, 2) + little_endian(0xff80, 2);                                    // 1.5, 3.140625, -inf
}

static void the_header_is_written_byte_by_byte(void**) {
    SafeTensors file;
    file.metadata = {{"format", "pt"}};
    assert_int_equal(safetensors_add(&file, "a.weight", SAFE_FP32, {2, 2}), 0);
    assert_int_equal(safetensors_add(&file, "b", SAFE_BF16, {3}), 16);
    assert_int_equal(safetensors_add(&file, "c", SAFE_FP16, {0, 7}), 22);
    assert_int_equal(file.bytes, 22);
    assert_true(safetensors_header(&file) == file_of(good_header(), ""));
    assert_int_equal(safetensors_header(&file).size() % SAFETENSORS_ALIGNMENT, 0);
}

static void what_was_written_is_read(void**) {
    write_file(file_of(good_header(), good_data()));
    SafeTensors file;
    assert_string_equal(safetensors_open(&file, path_here).c_str(), "");
    assert_int_equal(file.tensors.size(), 3);
    assert_string_equal(safetensors_text(&file, "format"), "pt");
    assert_null(safetensors_text(&file, "writer"));
    assert_null(safetensors_find(&file, "d"));
    const SafeTensor *a = safetensors_find(&file, "a.weight"), *b = safetensors_find(&file, "b"), *c = safetensors_find(&file, "c");
    assert_true(a->shape == std::vector<int64_t>({2, 2}) && a->type == SAFE_FP32);
    assert_true(c->shape == std::vector<int64_t>({0, 7}) && safe_elements(c) == 0);
    float x[4] = {NAN, NAN, NAN, NAN};
    assert_string_equal(safetensors_read_floats(x, &file, a, 0, 4).c_str(), "");
    assert_true(x[0] == 1.0f && x[1] == -2.0f && x[2] == 0.0f && x[3] == 1.0f / 3.0f);
    assert_string_equal(safetensors_read_floats(x, &file, b, 1, 2).c_str(), "");
    assert_true(x[0] == 3.140625f && x[1] == -INFINITY);
    uint16_t raw[3];
    assert_string_equal(safetensors_read(raw, &file, b, 0, 3).c_str(), "");
    assert_int_equal(raw[0], 0x3fc0);
    assert_string_equal(safetensors_read_floats(x, &file, c, 0, 0).c_str(), "");
    expect_end(1, "b", "asked for", [&] { safetensors_read(raw, &file, b, 2, 2); });
    safetensors_close(&file);
    assert_int_equal(file.fd, -1);
}

// Halves of every kind, subnormal ones too, and more than one stretch of them
static void halves_are_widened_exactly(void**) {
    SafeTensors file;
    const int64_t n = (1 << 20) + 65536;
    safetensors_add(&file, "h", SAFE_FP16, {n});
    std::string bytes = safetensors_header(&file);
    for (int64_t i = 0; i < n; i++) { bytes += little_endian((uint64_t)i & 0xffff, 2); }
    write_file(bytes);
    assert_string_equal(safetensors_open(&file, path_here).c_str(), "");
    std::vector<float> x((size_t)n);
    assert_string_equal(safetensors_read_floats(x.data(), &file, &file.tensors[0], 0, n).c_str(), "");
    for (int64_t i = 0; i < n; i++) {
        int code = (int)(i & 0xffff), e = code >> 10 & 31, m = code & 1023;
        double want = e == 31 ? (m != 0 ? NAN : INFINITY) : ldexp(e == 0 ? m : 1024 + m, (e == 0 ? 1 : e) - 25);
        if (code >> 15) { want = -want; }
        assert_true((double)x[(size_t)i] == want || (x[(size_t)i] != x[(size_t)i] && want != want));
    }
    safetensors_close(&file);
}

static void names_and_metadata_may_hold_any_text(void**) {
    SafeTensors file;
    file.metadata = {{"quote \" : {", "back\\slash\nüñ"}};
    safetensors_add(&file, "a:\"b\"/{c}", SAFE_U8, {1});
    std::string bytes = safetensors_header(&file) + "x";
    write_file(bytes);
    SafeTensors back;
    assert_string_equal(safetensors_open(&back, path_here).c_str(), "");
    assert_string_equal(back.tensors[0].name.c_str(), "a:\"b\"/{c}");
    assert_string_equal(safetensors_text(&back, "quote \" : {"), "back\\slash\nüñ");
    safetensors_close(&back);
}

static void other_types_are_found_and_not_read_as_floats(void**) {
    write_file(file_of("{\"x\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}", std::string(8, '\1')));
    SafeTensors file;
    float x;
    assert_string_equal(safetensors_open(&file, path_here).c_str(), "");
    assert_true(safetensors_read_floats(&x, &file, &file.tensors[0], 0, 1).find("I64") != std::string::npos);
    safetensors_close(&file);
}

// ---- bad files ----

// A header of one entry, for 4 bytes of data
static std::string entry(const std::string& text) { return file_of("{\"x\":" + text + "}", "abcd"); }

static void files_that_are_none_are_refused(void**) {
    SafeTensors file;
    assert_true(safetensors_open(&file, std::string(folder) + "/nothing").find("No such file") != std::string::npos);
    assert_true(safetensors_open(&file, folder).find("not a file") != std::string::npos);
    expect_refused("", "0 bytes");
    expect_refused("1234567", "7 bytes");
    expect_refused(little_endian(1, 8), "its header takes 1 bytes");
    expect_refused(little_endian(100000001, 8) + "{}", "its header takes 100000001");
    for (uint64_t huge : {(uint64_t)1 << 32, (uint64_t)1 << 63, UINT64_MAX, UINT64_MAX - 7}) { expect_refused(little_endian(huge, 8) + "{}", "its header takes"); }
    for (const char* text : {"", " ", "[]", "3", "null", "\"x\"", "{", "{}}", "{} x", "{}{}", "{\"x\"}", "{\"x\":}", "/**/{}", "nan", "\xff"}) {
        expect_refused(file_of(text, ""), "no JSON object");
    }
    expect_refused(file_of("{'x':{}}", ""), "");  // in whichever words
    expect_refused(file_of("{\"x\":{},}", ""), "");
    std::string deep = "{\"x\":";
    for (int i = 0; i < 10000; i++) { deep += "[{\"y\":"; }
    expect_refused(file_of(deep, ""), "no JSON object");
    expect_refused(file_of(std::string("{}\0", 3), ""), "no JSON object");
    assert_string_equal(said_of(file_of("{}", "")).c_str(), "");
    assert_string_equal(said_of(file_of("{}     ", "")).c_str(), "");
    expect_refused(file_of("{}", "x"), "its tensors take 0 bytes, and it has 1");
}

static void entries_that_contradict_are_refused(void**) {
    assert_string_equal(said_of(entry("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}")).c_str(), "");
    assert_string_equal(said_of(entry("{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}")).c_str(), "");  // one number
    for (const char* lacks : {"{}", "[]", "null", "4", "{\"dtype\":\"F32\",\"shape\":[1]}", "{\"dtype\":4,\"shape\":[1],\"data_offsets\":[0,4]}",
                              "{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}", "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}",
                              "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}", "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{}}",
                              "{\"dtype\":null,\"shape\":[1],\"data_offsets\":[0,4]}"}) {
        expect_refused(entry(lacks), "lacks a dtype, shape or data_offsets");
    }
    expect_refused(entry("{\"dtype\":\"F31\",\"shape\":[1],\"data_offsets\":[0,4]}"), "'F31', which is not known");
    expect_refused(entry("{\"dtype\":\"f32\",\"shape\":[1],\"data_offsets\":[0,4]}"), "not known");
    for (const char* shape : {"[-1]", "[1.0]", "[\"1\"]", "[null]", "[[1]]", "[4294967296,4294967296]", "[9223372036854775807]", "[18446744073709551615]",
                              "[99999999999999999999999]", "[2147483648,2147483648,4]", "[-1,-1]", "[1e0]"}) {
        expect_refused(entry(std::string("{\"dtype\":\"F32\",\"shape\":") + shape + ",\"data_offsets\":[0,4]}"), "a shape that no tensor has");
    }
    for (const char* offsets : {"[0,5]", "[0,3]", "[4,0]", "[-4,0]", "[0,-4]", "[0.0,4]", "[0,\"4\"]", "[18446744073709551612,0]", "[null,4]"}) {
        expect_refused(entry(std::string("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":") + offsets + "}"), "takes 4 bytes, and its data_offsets");
    }
    expect_refused(entry("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}"), "does not begin where");
    expect_refused(entry("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[9223372036854775803,9223372036854775807]}"), "does not begin where");
    expect_refused(entry("{\"dtype\":\"F32\",\"shape\":[0,9223372036854775807,9223372036854775807],\"data_offsets\":[0,4]}"), "takes 0 bytes");
}

static void tensors_lie_one_behind_the_other(void**) {
    auto two = [](const char* a, const char* b, const char* second = "y") {
        return file_of(std::string("{\"x\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":") + a + "},\"" + second + "\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + b + "}}", "12345678");
    };
    assert_string_equal(said_of(two("[0,4]", "[4,8]")).c_str(), "");
    assert_string_equal(said_of(two("[4,8]", "[0,4]")).c_str(), "");
    expect_refused(two("[0,4]", "[0,4]"), "'y' does not begin where");    // the same place
    expect_refused(two("[0,4]", "[2,6]"), "'y' does not begin where");    // they overlap
    expect_refused(two("[0,4]", "[5,9]"), "'y' does not begin where");    // a hole
    expect_refused(two("[1,5]", "[5,9]"), "'x' does not begin where");
    expect_refused(two("[0,4]", "[4,8]") + "9", "its tensors take 8 bytes, and it has 9");
    std::string cut = two("[0,4]", "[4,8]");
    cut.pop_back();
    expect_refused(cut, "its tensors take 8 bytes, and it has 7");
    expect_refused(two("[0,4]", "[4,8]", "x"), "one name");
    expect_refused(two("[0,4]", "[4,8]", "\\u0078"), "one name");
    expect_refused(two("[0,4]", "[0,4]", "x"), "one name");
    expect_refused(file_of("{\"__metadata__\":[]}", ""), "__metadata__ is no JSON object");
    expect_refused(file_of("{\"__metadata__\":{\"a\":1}}", ""), "__metadata__ holds something else");
    assert_string_equal(said_of(file_of("{\"__metadata__\":{}}", "")).c_str(), "");
}

// ---- damage ----

// Opens what may be damaged; if it opens, everything in it can be read, and lies within the file
static bool survives(const std::string& bytes) {
    write_file(bytes);
    SafeTensors file;
    std::string wrong = safetensors_open(&file, path_here);
    if (!wrong.empty()) {
        assert_int_equal(file.fd, -1);
        return false;
    }
    uint64_t at = 0;
    for (const SafeTensor& t : file.tensors) {
        assert_int_equal(t.begin, at);
        assert_int_equal(t.end - t.begin, (uint64_t)safe_elements(&t) * (uint64_t)safe_types[t.type].bytes);
        at = t.end;
        std::string raw(t.end - t.begin, '\0');
        assert_string_equal(safetensors_read(&raw[0], &file, &t, 0, safe_elements(&t)).c_str(), "");
        assert_true(raw == bytes.substr(file.data + t.begin, raw.size()));
    }
    assert_int_equal(file.data + at, bytes.size());
    safetensors_close(&file);
    return true;
}

static void damaged_files_are_refused_or_read_without_contradiction(void**) {
    std::string good = file_of(good_header(), good_data());
    int refused = 0, read = 0, times = getenv("SOAK") != NULL ? 200000 : 2000;
    random_state = 5;
    for (int i = 0; i < times; i++) {
        std::string bad = good;
        int changes = 1 + (int)(random_u32() % 3);
        size_t header = good.size() - good_data().size();
        for (int k = 0; k < changes; k++) {
            size_t at = random_u32() % (random_u32() % 4 == 0 ? bad.size() : header);
            switch (random_u32() % 5) {
                case 0: bad[at] ^= (char)(1 << random_u32() % 8); break;
                case 1: bad[at] = (char)random_u32(); break;
                case 2: bad[at] = "0123456789{}[]\",: -"[random_u32() % 19]; break;
                case 3: bad.erase(at, 1 + random_u32() % 4); break;
                default: bad.insert(at, 1, "0123456789{}[]\",: -"[random_u32() % 19]); break;
            }
            if (bad.empty()) { bad = good; }
            header = min_of(header, bad.size());
        }
        if (random_u32() % 8 == 0) { bad.resize(random_u32() % (bad.size() + 1)); }
        (survives(bad) ? read : refused)++;
    }
    for (size_t n = 0; n < good.size(); n++) { assert_false(survives(good.substr(0, n))); }
    assert_true(survives(good));
    assert_true(refused > times / 2 && read > times / 100);  // both happen
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_header_is_written_byte_by_byte),
        cmocka_unit_test_setup_teardown(what_was_written_is_read, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(halves_are_widened_exactly, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(names_and_metadata_may_hold_any_text, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(other_types_are_found_and_not_read_as_floats, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(files_that_are_none_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(entries_that_contradict_are_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(tensors_lie_one_behind_the_other, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(damaged_files_are_refused_or_read_without_contradiction, make_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);  // no device is needed
}
