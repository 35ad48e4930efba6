// Tests of core/tokenizer.h: files made here are read as they were written, and what is broken is refused; what reaches a terminal is harmless.
#include "check.h"
#include "../core/tokenizer.h"
#include <unistd.h>

static std::string path;

static int make_file(void**) {
    char name[1024];
    snprintf(name, sizeof(name), "%s/tokenizer_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir);
    int fd = mkstemp(name);
    if (fd < 0) { return -1; }
    path = name;
    return close(fd);
}
static int remove_file(void**) { return unlink(path.c_str()); }

static std::string file_of(std::vector<int32_t> header, const std::vector<std::string>& tokens) {
    header.resize(256, 0);
    std::string all((const char*)header.data(), 1024);
    for (const std::string& t : tokens) { all += (char)t.size() + t; }
    return all;
}

static void write_file(const std::string& bytes) {
    FILE* f = fopen(path.c_str(), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes.data(), 1, bytes.size(), f), bytes.size());
    assert_int_equal(fclose(f), 0);
}

static const std::vector<std::string> some = {"a", " the", std::string("\0x", 2), "\xc3", "\xa9", "", std::string(255, 'z'), "<|endoftext|>"};
static const int N = 8;

static void tokens_are_read_as_they_were_written(void**) {
    write_file(file_of({20240328, 2, N, 7}, some));
    Tokenizer t = tokenizer_open("--tokenizer", path.c_str(), N);
    assert_int_equal(t.vocab, N);
    assert_int_equal(t.end_of_text, 7);
    for (size_t i = 0; i < N; i++) { assert_true(t.tokens[i] == some[i]); }
    int tokens[] = {0, 1, 3, 4, 5, 2, 0};
    assert_true(tokenizer_decode(&t, tokens, 7) == std::string("a the\xc3\xa9\0xa", 10));
    assert_true(tokenizer_decode(&t, tokens, 0).empty());
    std::vector<std::string> gpt2((size_t)50257, "b");  // version 1 is GPT-2's
    write_file(file_of({20240328, 1, 50257}, gpt2));
    assert_int_equal(tokenizer_open("--tokenizer", path.c_str(), 50257).end_of_text, 50256);
}

static void refused(const std::string& bytes, const char* word, int64_t vocab = N) {
    write_file(bytes);
    expect_end(2, "--tokenizer: ", word, [=] { tokenizer_open("--tokenizer", path.c_str(), vocab); });
}

static void broken_files_are_refused(void**) {
    std::string good = file_of({20240328, 2, N, 7}, some);
    expect_end(2, "--tokenizer: cannot open 'nothing.bin'", "No such file", [] { tokenizer_open("--tokenizer", "nothing.bin", N); });
    expect_end(2, "--tokenizer: 'test' is not a file", NULL, [] { tokenizer_open("--tokenizer", "test", N); });
    refused("", "0 bytes");
    refused(good.substr(0, 1023), "1023 bytes");
    refused(file_of({20240520, 2, N, 7}, some), "starts with 20240520, not 20240328");
    for (int version : {0, 3, -1}) { refused(file_of({20240328, version, N, 7}, some), "has version"); }
    refused(good, "has 8 tokens, and the model's vocabulary is 9", 9);
    refused(good, "has 8 tokens, and the model's vocabulary is 7", 7);
    refused(file_of({20240328, 2, N, N}, some), "end-of-text token is 8");
    refused(file_of({20240328, 2, N, -1}, some), "end-of-text token is -1");
    refused(file_of({20240328, 1, N}, some), "end-of-text token is 50256");
    for (size_t size = 1024; size < good.size(); size++) { refused(good.substr(0, size), "is cut short"); }
    refused(good + "x", "is too long: its 8 tokens end at byte");
    refused(good + std::string(100000, 'x'), "is too long");
}

static void what_reaches_a_terminal_is_harmless(void**) {
    const struct { const char *bytes, *text; } cases[] = {
        {"", ""}, {"a b\n\tc", "a b\n\tc"}, {"caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80", "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"}, {"\x1b[2J\r\x07\x7f", "?[2J???"},
        {"\xc3", "?"}, {"\xa9x", "?x"}, {"\xe2\x82", "??"}, {"\xc2\x9b" "1m", "?1m"}, {"\xc2\xa0", "\xc2\xa0"}, {"\xed\xa0\x80", "???"}, {"\xff\xc0\x80", "???"}};
    for (const auto& c : cases) { assert_string_equal(printable_text(c.bytes).c_str(), c.text); }
    assert_true(printable_text(std::string("a\0b", 3)) == "a?b");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokens_are_read_as_they_were_written),
        cmocka_unit_test(broken_files_are_refused),
        cmocka_unit_test(what_reaches_a_terminal_is_harmless),
    };
    return cmocka_run_group_tests(tests, make_file, remove_file);  // no device is needed
}
