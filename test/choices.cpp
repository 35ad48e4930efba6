// Tests of core/choices.h: what is read against what was written, sequences and counts against direct ones, and files that are broken.
#include "check.h"
#include "../core/choices.h"
#include <string>
#include <unistd.h>

// ---- files made here ----

struct Example { int64_t label; std::vector<int64_t> context; std::vector<std::vector<int64_t>> completions; };

static const std::vector<Example> three = {{1, {5, 6, 7}, {{1, 2}, {3}}}, {0, {8}, {{4, 4, 4}, {5}, {6, 7}}}, {3, {9, 1, 2, 3, 4, 5}, {{1}, {2}, {3}, {4, 5}}}};

// The words of an example, for words of `bytes` bytes
static std::vector<int64_t> words_of(const Example& e, int64_t number, int bytes) {
    std::vector<int64_t> w = {bytes == 2 ? 0xffff : 0xffffffff, 0, number, e.label, (int64_t)e.completions.size(), (int64_t)e.context.size()};
    w.insert(w.end(), e.context.begin(), e.context.end());
    for (const auto& c : e.completions) {
        w.push_back((int64_t)c.size());
        w.insert(w.end(), c.begin(), c.end());
    }
    w[1] = (int64_t)w.size() * bytes;
    return w;
}

static std::vector<int64_t> stream_of(const std::vector<Example>& list, int bytes) {
    std::vector<int64_t> stream;
    for (size_t i = 0; i < list.size(); i++) {
        std::vector<int64_t> w = words_of(list[i], (int64_t)i, bytes);
        stream.insert(stream.end(), w.begin(), w.end());
    }
    return stream;
}

static int32_t longest_of(const std::vector<Example>& list, int bytes) {
    int64_t longest = 0;
    for (size_t i = 0; i < list.size(); i++) { longest = max_of(longest, words_of(list[i], (int64_t)i, bytes)[1]); }
    return (int32_t)longest;
}

static std::string path;

static void write_file(std::vector<int32_t> header, const std::vector<int64_t>& words, int bytes, size_t cut = 0) {
    header.resize(256, 0);
    std::vector<char> out((const char*)header.data(), (const char*)(header.data() + 256));
    for (int64_t w : words) {
        for (int b = 0; b < bytes; b++) { out.push_back((char)(w >> (8 * b))); }
    }
    FILE* f = fopen(path.c_str(), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(out.data(), 1, out.size() - cut, f), out.size() - cut);
    assert_int_equal(fclose(f), 0);
}

static void write_good(const std::vector<Example>& list, int bytes) {
    write_file({20240522, bytes == 2 ? 1 : 2, (int32_t)list.size(), longest_of(list, bytes)}, stream_of(list, bytes), bytes);
}

static int make_file(void**) {
    char name[1024];
    snprintf(name, sizeof(name), "%s/choices_XXXXXX", getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir);
    int fd = mkstemp(name);
    if (fd < 0) { return -1; }
    path = name;
    return close(fd);
}
static int remove_file(void**) { return unlink(path.c_str()); }

// ---- good files ----

static void both_forms_are_read_as_they_were_written(void**) {
    uint64_t fingerprint[2];
    for (int bytes : {2, 4}) {
        write_good(three, bytes);
        ChoiceSet set;
        choices_open(&set, "--eval-data", path.c_str(), 10, 8);
        assert_int_equal(set.examples.size(), 3);
        assert_int_equal(set.completions.size(), 9);
        assert_int_equal(set.cut, 0);
        fingerprint[bytes / 4] = set.fingerprint;
        int64_t at = 0;
        for (size_t i = 0; i < three.size(); i++) {
            const ChoiceExample& e = set.examples[i];
            assert_int_equal(e.label, three[i].label);
            assert_int_equal(e.first_completion, at);
            assert_int_equal(e.completions, three[i].completions.size());
            for (const auto& completion : three[i].completions) {
                std::vector<int64_t> all = three[i].context;
                all.insert(all.end(), completion.begin(), completion.end());
                int32_t tokens[8], targets[8];
                int from, to;
                choices_sequence(tokens, targets, &from, &to, &set, at++, 8);
                assert_int_equal(from, three[i].context.size() - 1);
                assert_int_equal(to - from, completion.size());
                for (size_t t = 0; t < 8; t++) {
                    assert_int_equal(tokens[t], t + 1 < all.size() ? all[t] : 0);
                    assert_int_equal(targets[t], t + 1 < all.size() ? all[t + 1] : 0);
                }
                for (int t = from; t < to; t++) { assert_int_equal(targets[t], completion[(size_t)(t - from)]); }
            }
        }
    }
    assert_true(fingerprint[0] != fingerprint[1]);
}

static void names_are_the_files(void**) {
    write_good(three, 2);
    std::string full = path, bin = path + ".bin";
    assert_int_equal(rename(full.c_str(), bin.c_str()), 0);
    ChoiceSet set;
    choices_open(&set, "--eval-data", bin.c_str(), 10, 8);
    assert_string_equal(set.name.c_str(), full.substr(full.find_last_of('/') + 1).c_str());
    assert_int_equal(rename(bin.c_str(), full.c_str()), 0);
}

static void long_contexts_lose_their_beginning(void**) {
    for (int T = 3; T <= 9; T++) {
        write_good(three, 2);
        ChoiceSet set;
        choices_open(&set, "--eval-data", path.c_str(), 10, T);
        int64_t at = 0, cut = 0;
        for (const Example& e : three) {
            size_t most = 0;
            for (const auto& c : e.completions) { most = max_of(most, c.size()); }
            size_t used = min_of(e.context.size(), (size_t)T + 1 - most);
            cut += used < e.context.size();
            for (const auto& c : e.completions) {
                std::vector<int64_t> all(e.context.end() - (long)used, e.context.end());
                all.insert(all.end(), c.begin(), c.end());
                std::vector<int32_t> tokens((size_t)T), targets((size_t)T);
                int from, to;
                choices_sequence(tokens.data(), targets.data(), &from, &to, &set, at++, T);
                assert_int_equal(from, used - 1);
                assert_int_equal(to, all.size() - 1);
                for (size_t t = 0; t + 1 < all.size(); t++) {
                    assert_int_equal(tokens[t], all[t]);
                    assert_int_equal(targets[t], all[t + 1]);
                }
            }
        }
        assert_int_equal(set.cut, cut);
    }
}

static void replicas_divide_whole_examples(void**) {
    std::vector<Example> list;
    uint64_t x = 1;
    for (int i = 0; i < 17; i++) {
        Example e = {0, {1}, {}};
        x = mix64(x);
        for (uint64_t k = 0; k < 2 + x % 4; k++) { e.completions.push_back({2}); }
        list.push_back(e);
    }
    write_good(list, 2);
    ChoiceSet set;
    choices_open(&set, "--eval-data", path.c_str(), 10, 8);
    for (int ranks : {1, 2, 3, 5, 17, 20}) {
        int64_t at = 0, most = 0, examples = 0;
        for (int r = 0; r < ranks; r++) {
            int64_t first, last;
            choices_share(&first, &last, &set, r, ranks);
            assert_int_equal(first, at);
            if (first < last) {
                assert_int_equal(first, set.examples[(size_t)set.completions[(size_t)first].example].first_completion);
                examples += set.completions[(size_t)last - 1].example - set.completions[(size_t)first].example + 1;
            }
            most = max_of(most, last - first);
            at = last;
        }
        assert_int_equal(at, set.completions.size());
        assert_int_equal(examples, 17);
        assert_int_equal(choices_most(&set, ranks), most);
    }
}

static void the_least_loss_wins_and_the_first_of_equals(void**) {
    // one example each: labels 1, 0, 3; lengths 2 1 / 3 1 2 / 1 1 1 2
    write_good(three, 2);
    ChoiceSet set;
    choices_open(&set, "--eval-data", path.c_str(), 10, 8);
    auto count = [&](std::vector<double> sums, int64_t by_sum, int64_t by_mean) {
        ChoiceCounts c = choices_count(&set, sums.data(), 0, (int64_t)sums.size());
        assert_int_equal(c.by_sum, by_sum);
        assert_int_equal(c.by_mean, by_mean);
    };
    count({2, 1, /**/ 3, 4, 5, /**/ 9, 9, 9, 8}, 3, 2);      // by mean the first is a tie, which its label, 1, loses
    count({2, 0.5, /**/ 3, 2, 5, /**/ 9, 9, 9, 20}, 1, 2);  // by sum the second has label 0 wrong, by mean right
    count({1, 1, /**/ 2, 2, 2, /**/ 4, 4, 4, 4}, 1, 2);      // ties of sums: only the second's label is the first
    count({NAN, 1, /**/ NAN, NAN, NAN, /**/ INFINITY, INFINITY, INFINITY, 3}, 2, 2);  // what is not finite is never chosen
    double last[] = {4, 4, 4, 1};
    ChoiceCounts c = choices_count(&set, last, 5, 9);
    assert_int_equal(c.by_sum, 1);
    assert_int_equal(c.by_mean, 1);
}

// ---- broken files ----

static void refused(const char* word, int64_t vocab = 10, int T = 8) {
    expect_end(2, "--eval-data: ", word, [=] { ChoiceSet set; choices_open(&set, "--eval-data", path.c_str(), vocab, T); });
}

static void what_is_no_such_file_is_refused(void**) {
    expect_end(2, "--eval-data: cannot open 'nothing.bin'", "No such file", [] { ChoiceSet set; choices_open(&set, "--eval-data", "nothing.bin", 10, 8); });
    expect_end(2, "--eval-data: '/dev/null' is not a file", NULL, [] { ChoiceSet set; choices_open(&set, "--eval-data", "/dev/null", 10, 8); });
    std::vector<int64_t> good = stream_of(three, 2);
    write_file({20240522, 1, 3, longest_of(three, 2)}, {}, 2, 1);
    refused("1023 bytes");
    write_file({20240520, 1, 3, longest_of(three, 2)}, good, 2);
    refused("starts with 20240520, not 20240522");
    write_file({20240522, 3, 3, longest_of(three, 2)}, good, 2);
    refused("version 3");
    write_file({20240522, 1, 0, 0}, {}, 2);
    refused("0 examples");
    write_file({20240522, 1, -1, 0}, good, 2);
    refused("-1 examples");
}

static void files_that_end_early_or_late_are_refused(void**) {
    for (int bytes : {2, 4}) {
        std::vector<int64_t> good = stream_of(three, bytes);
        std::vector<int32_t> header = {20240522, bytes / 2, 3, longest_of(three, bytes)};
        write_file(header, good, bytes);
        ChoiceSet set;
        choices_open(&set, "--eval-data", path.c_str(), 10, 8);
        for (size_t cut = 1; cut <= good.size() * (size_t)bytes; cut++) {
            write_file(header, good, bytes, cut);
            refused("is cut short");
        }
        std::vector<int64_t> longer = good;
        longer.push_back(1);
        write_file(header, longer, bytes);
        refused("is too long: 1 words");
        header[2] = 4;
        write_file(header, good, bytes);
        refused("cut short: it ends in example 3 of 4");
        header[2] = 2;
        write_file(header, good, bytes);
        refused("is too long");
        header[2] = 3;
        header[3]++;
        write_file(header, good, bytes);
        refused("its header says");
    }
}

static void wrong_words_are_refused(void**) {
    std::vector<int32_t> header = {20240522, 1, 3, longest_of(three, 2)};
    std::vector<int64_t> good = stream_of(three, 2);
    const struct { size_t at; int64_t value; const char* word; } wrong[] = {
        {0, 65534, "example 0 does not begin with its mark"}, {1, 22, "example 0 should have 22 bytes and has 28"}, {2, 1, "example 0 has the number 1"},
        {3, 2, "the label of example 0 is 2; allowed for its 2 completions: 0 to 1"}, {4, 1, "1 completions"}, {4, 0, "0 completions"}, {6, 10, "the token 10"},
        {5, 0, "is empty"}, {9, 0, "is empty"}, {5, 65535, "cut short"}, {9, 60000, "cut short"}, {10, 65535, "the token 65535"}};
    for (const auto& w : wrong) {
        std::vector<int64_t> words = good;
        words[w.at] = w.value;
        write_file(header, words, 2);
        refused(w.word);
    }
    write_good(three, 2);
    refused("is the token 9; allowed in a vocabulary of 9: 0 to 8", 9);
    refused("completion 0 of example 1 has 3 tokens", 10, 2);
    write_good({{0, {0x7fffffff}, {{1}, {2}}}}, 4);
    refused("the token 2147483647", 1 << 24);
    write_good({{0, {0xffffffff}, {{1}, {2}}}}, 4);
    refused("the token 4294967295", 1 << 24);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_forms_are_read_as_they_were_written),
        cmocka_unit_test(names_are_the_files),
        cmocka_unit_test(long_contexts_lose_their_beginning),
        cmocka_unit_test(replicas_divide_whole_examples),
        cmocka_unit_test(the_least_loss_wins_and_the_first_of_equals),
        cmocka_unit_test(what_is_no_such_file_is_refused),
        cmocka_unit_test(files_that_end_early_or_late_are_refused),
        cmocka_unit_test(wrong_words_are_refused),
    };
    return cmocka_run_group_tests(tests, make_file, remove_file);  // no device is needed
}
