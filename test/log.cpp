// Tests of core/log.h: log.jsonl stays valid JSON in whole lines, whatever is logged and whatever the disk does; what the console says, and
// how it rewrites its line, on files, terminals and pseudo-terminals.
#include "../core/log.h"
#include <dirent.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <termios.h>
extern "C" {
#include <cmocka.h>
}

// ---- helpers ----

static char folder[64];  // of this run of the tests

static const char* in_folder(const char* name) {
    static char paths[8][512];
    static int next = 0;
    char* path = paths[next++ % 8];
    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    return path;
}

static void remove_tree(const char* path) {
    DIR* dir = opendir(path);
    if (dir == NULL) {
        unlink(path);
        return;
    }
    for (struct dirent* entry = readdir(dir); entry != NULL; entry = readdir(dir)) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) { continue; }
        char child[1024];
        snprintf(child, sizeof(child), "%s/%s", path, entry->d_name);
        struct stat status;
        if (lstat(child, &status) == 0 && S_ISDIR(status.st_mode)) {
            remove_tree(child);
        } else {
            unlink(child);
        }
    }
    closedir(dir);
    rmdir(path);
}

static int make_folder(void**) {
    snprintf(folder, sizeof(folder), "log_test_XXXXXX");
    return mkdtemp(folder) == NULL;
}

static int remove_folder(void**) {
    remove_tree(folder);
    return 0;
}

static int files_in(const char* path) {
    DIR* dir = opendir(path);
    assert_non_null(dir);
    int count = -2;
    while (readdir(dir) != NULL) { count++; }
    closedir(dir);
    return count;
}

static void write_file(const char* path, const char* text, size_t bytes) {
    FILE* file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

// The text of a file, in a buffer of its own until the next call.
static const char* text_of(FILE* file) {
    static char text[65536];
    rewind(file);
    size_t got = fread(text, 1, sizeof(text) - 1, file);
    text[got] = '\0';
    fclose(file);
    return text;
}

static const char* text_at(const char* path) {
    FILE* file = fopen(path, "rb");
    assert_non_null(file);
    return text_of(file);
}

struct Ending {
    int status;
    char err[4096];
};

template <class Body>
static Ending run_child(Body body) {
    Ending ending;
    int ends[2];  // a pipe, to which a child's limit on file sizes does not apply
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        body();
        _exit(99);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    ending.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    close(ends[1]);
    ssize_t got = read(ends[0], ending.err, sizeof(ending.err) - 1);
    assert_true(got >= 0);
    ending.err[got] = '\0';
    close(ends[0]);
    return ending;
}

static void expect_refusal(Ending ending, const char* message) {
    char line[1024];
    snprintf(line, sizeof(line), "train_gpt_fp8: %s\n", message);
    assert_string_equal(ending.err, line);
    assert_int_equal(ending.status, 2);
}

// What is logged of an object: the line without its newline.
static const char* logged(json_object* object) {
    Log log = log_open("--output-dir", folder, false);
    log_line(&log, object);
    log_close(&log);
    char* text = (char*)text_at(in_folder("log.jsonl"));
    size_t length = strlen(text);
    assert_true(length > 0 && text[length - 1] == '\n');
    text[length - 1] = '\0';
    assert_null(strchr(text, '\n'));
    return text;
}

static json_object* numbered(double value) {
    json_object* object = json_object_new_object();
    json_object_object_add(object, "x", json_object_new_double(value));
    return object;
}

static uint64_t random_bits(void) {  // splitmix64
    static uint64_t state = 7;
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// ---- the output folder ----

static void folders_are_made_with_their_parents(void**) {
    const char* names[] = {"a", "a", "b/c/d", "e/", "f//g///", "b/c/../h", "./i"};
    for (const char* name : names) {
        make_directory("--output-dir", in_folder(name));
        assert_int_equal(files_in(in_folder(name)), 0);  // the trial file is gone
    }
    struct stat status;
    assert_int_equal(stat(in_folder("b/h"), &status), 0);
    make_directory("--output-dir", ".");
    char here[256], absolute[512];
    assert_non_null(getcwd(here, sizeof(here)));
    snprintf(absolute, sizeof(absolute), "%s/%s/absolute", here, folder);
    make_directory("--output-dir", absolute);
    assert_int_equal(files_in(in_folder("absolute")), 0);
    write_file(in_folder("a/log.jsonl"), "kept\n", 5);
    make_directory("--output-dir", in_folder("a"));
    assert_string_equal(text_at(in_folder("a/log.jsonl")), "kept\n");
}

static void folders_that_cannot_be_are_refused(void**) {
    char message[512];
    write_file(in_folder("file"), "x", 1);
    snprintf(message, sizeof(message), "--output-dir: '%s' is a file, not a folder", in_folder("file"));
    expect_refusal(run_child([] { make_directory("--output-dir", in_folder("file")); }), message);
    expect_refusal(run_child([] { make_directory("--output-dir", in_folder("file/below")); }), message);
    assert_string_equal(text_at(in_folder("file")), "x");
    expect_refusal(run_child([] { make_directory("--export-hf", ""); }), "--export-hf: the folder's name is empty");
    expect_refusal(run_child([] { make_directory("--output-dir", "/proc/run"); }),
                   "--output-dir: cannot make the folder '/proc/run': No such file or directory");
    expect_refusal(run_child([] { make_directory("--output-dir", "/proc"); }),  // there, but nothing can be made in it, not even by root
                   "--output-dir: cannot write to the folder '/proc': No such file or directory");
    make_directory("--output-dir", in_folder("taken/log.jsonl"));
    snprintf(message, sizeof(message), "--output-dir: cannot open '%s': Is a directory", in_folder("taken/log.jsonl"));
    expect_refusal(run_child([] { log_open("--output-dir", in_folder("taken"), false); }), message);
    expect_refusal(run_child([] { log_open("--output-dir", in_folder("taken"), true); }), message);
    if (geteuid() == 0) { return; }  // root may write anywhere
    make_directory("--output-dir", in_folder("locked"));
    assert_int_equal(chmod(in_folder("locked"), 0500), 0);
    snprintf(message, sizeof(message), "--output-dir: cannot write to the folder '%s': Permission denied", in_folder("locked"));
    expect_refusal(run_child([] { make_directory("--output-dir", in_folder("locked")); }), message);
    snprintf(message, sizeof(message), "--output-dir: cannot make the folder '%s': Permission denied", in_folder("locked/below"));
    expect_refusal(run_child([] { make_directory("--output-dir", in_folder("locked/below")); }), message);
}

// ---- log.jsonl ----

static void non_finite_numbers_are_null_at_any_depth(void**) {
    json_object *line = json_object_new_object(), *fp8 = json_object_new_object(), *inner = json_object_new_object();
    json_object* list = json_object_new_array();
    json_object_object_add(inner, "deep", json_object_new_double(-INFINITY));
    json_object_array_add(list, json_object_new_double(NAN));
    json_object_array_add(list, json_object_new_double(0.5));
    json_object_array_add(list, inner);
    json_object_array_add(list, NULL);
    json_object_object_add(fp8, "mu_min", json_object_new_double(-NAN));
    json_object_object_add(fp8, "list", list);
    json_object_object_add(line, "step", json_object_new_int64(INT64_MAX));
    json_object_object_add(line, "loss", json_object_new_double(INFINITY));
    json_object_object_add(line, "named", json_object_new_double_s(NAN, "NaN"));  // comes with a serialiser of its own
    json_object_object_add(line, "fp8", fp8);
    json_object_object_add(line, "skipped", NULL);
    json_object_object_add(line, "why", json_object_new_string("a \"NaN\"\n in a/b\t\\ \x01"));
    assert_string_equal(logged(line), "{\"step\":9223372036854775807,\"loss\":null,\"named\":null,\"fp8\":{\"mu_min\":null,"
                                      "\"list\":[null,0.5,{\"deep\":null},null]},\"skipped\":null,"
                                      "\"why\":\"a \\\"NaN\\\"\\n in a/b\\t\\\\ \\u0001\"}");
}

static void numbers_are_short_and_exact(void**) {
    struct { double value; const char* text; } cases[] = {
        {0.0, "0"}, {-0.0, "-0"}, {5.4321, "5.4321"}, {5.4321f, "5.4321"}, {0.1f, "0.1"}, {0.1, "0.1"}, {3e-4, "0.0003"}, {3e-4f, "0.0003"},
        {1.0 / 3, "0.3333333333333333"}, {1.0f / 3, "0.33333334"}, {0.1 + 0.2, "0.30000000000000004"}, {16777217.0, "16777217"},
        {1073741952.0, "1073741952"}, {1e8, "100000000"}, {9007199254740991.0, "9007199254740991"}, {-12345678901.0, "-12345678901"},
        {0.5, "0.5"},
        {FLT_MAX, "3.4028235e+38"}, {DBL_MAX, "1.7976931348623157e+308"}, {-DBL_MAX, "-1.7976931348623157e+308"}, {1e22, "1e+22"},
        {1.401298464324817e-45, "1.4013e-45"}, {5e-324, "4.94066e-324"}, {1e-7, "1e-07"}};
    for (auto& c : cases) {
        char line[128];
        snprintf(line, sizeof(line), "{\"x\":%s}", c.text);
        assert_string_equal(logged(numbered(c.value)), line);
    }
}

static void random_numbers_read_back(void**) {
    Log log = log_open("--output-dir", folder, false);
    static double values[1200];
    for (int i = 0; i < 1200; i++) {
        uint64_t bits = random_bits();
        uint32_t half = (uint32_t)bits;
        float single;
        memcpy(&single, &half, sizeof(single));
        memcpy(&values[i], &bits, sizeof(bits));
        if (i % 3 == 1) { values[i] = (double)single; }
        if (i % 3 == 2) { values[i] = (double)(int64_t)(bits >> 11) * (i % 2 ? 1 : -1); }
        log_line(&log, numbered(values[i]));
    }
    log_close(&log);
    FILE* file = fopen(in_folder("log.jsonl"), "r");
    assert_non_null(file);
    char line[256];
    for (int i = 0; i < 1200; i++) {
        assert_non_null(fgets(line, sizeof(line), file));
        const char* text = strchr(line, ':') + 1;
        if (!isfinite(values[i])) {
            assert_string_equal(text, "null}\n");
        } else if (i % 3 == 1) {
            assert_true(strtof(text, NULL) == (float)values[i]);
            size_t digits = strspn(text, "-0123456789.");
            assert_true(values[i] == rint(values[i]) || digits <= 9 + strlen("-0.000"));
        } else {
            assert_true(strtod(text, NULL) == values[i]);
        }
    }
    assert_null(fgets(line, sizeof(line), file));
    fclose(file);
}

static void strings_become_utf8(void**) {
    struct { const char *text, *shown; } cases[] = {
        {"µ × € 𝄞", "µ × € 𝄞"}, {"", ""}, {"\xe9t\xe9", "?t?"}, {"\xc3", "?"}, {"a\xe2\x82", "a??"}, {"\xc0\xaf", "??"}, {"\xc1\xbf", "??"},
        {"\xe0\x9f\xbf", "???"}, {"\xe0\xa0\x80", "\xe0\xa0\x80"}, {"\xed\xa0\x80", "???"}, {"\xed\x9f\xbf", "\xed\x9f\xbf"},
        {"\xf0\x8f\xbf\xbf", "????"}, {"\xf0\x90\x80\x80", "\xf0\x90\x80\x80"}, {"\xf4\x8f\xbf\xbf", "\xf4\x8f\xbf\xbf"},
        {"\xf4\x90\x80\x80", "????"}, {"\xf5\x80\x80\x80", "????"}, {"\x80", "?"}, {"\xc3\xc3\xa9", "?é"}};
    for (auto& c : cases) {
        json_object *line = json_object_new_object(), *list = json_object_new_array();
        json_object_array_add(list, json_object_new_string(c.text));
        json_object_object_add(line, "s", list);
        char expected[64];
        snprintf(expected, sizeof(expected), "{\"s\":[\"%s\"]}", c.shown);
        assert_string_equal(logged(line), expected);
    }
}

static void objects_are_freed_and_dropped_without_a_log(void**) {
    Log logs[] = {no_log(), log_open("--output-dir", folder, false)};
    for (Log& log : logs) {
        json_object* line = json_object_get(numbered(1.5));  // a reference of our own: it must be the last
        log_line(&log, line);
        assert_int_equal(json_object_put(line), 1);
        log_close(&log);
        log_close(&log);  // twice is harmless
        assert_int_equal(log.fd, -1);
    }
}

static void appending_continues_after_the_last_whole_line(void**) {
    static char whole[5000], torn[20000];
    memset(whole, 'w', sizeof(whole));
    whole[4095] = '\n';  // ends the first block that is looked at from behind
    memset(torn, 't', sizeof(torn));
    struct { size_t whole, torn; } cases[] = {{0, 0}, {0, 5}, {4096, 0}, {4096, 1}, {4096, 4095}, {4096, 4096}, {4096, 4097}, {4096, 20000},
                                              {0, 20000}};
    for (auto& c : cases) {
        FILE* file = fopen(in_folder("log.jsonl"), "wb");
        assert_non_null(file);
        assert_int_equal(fwrite(whole, 1, c.whole, file), c.whole);
        assert_int_equal(fwrite(torn, 1, c.torn, file), c.torn);
        fclose(file);
        Log log = log_open("--output-dir", folder, true);
        log_line(&log, numbered(1));
        log_line(&log, numbered(2));
        log_close(&log);
        const char* text = text_at(in_folder("log.jsonl"));
        assert_memory_equal(text, whole, c.whole);
        assert_string_equal(text + c.whole, "{\"x\":1}\n{\"x\":2}\n");
    }
    unlink(in_folder("log.jsonl"));
    Log log = log_open("--output-dir", folder, true);  // nothing to go on from
    log_line(&log, numbered(3));
    assert_string_equal(text_at(in_folder("log.jsonl")), "{\"x\":3}\n");  // there before the log is closed
    log_close(&log);
    log = log_open("--output-dir", folder, false);  // and from empty
    assert_string_equal(text_at(in_folder("log.jsonl")), "");
    log_close(&log);
}

static void a_full_disk_is_said_once(void**) {
    make_directory("--output-dir", in_folder("full"));
    assert_int_equal(symlink("/dev/full", in_folder("full/log.jsonl")), 0);
    for (int append = 0; append < 2; append++) {
        Ending ending = run_child([=] {
            Log log = log_open("--output-dir", in_folder("full"), append);
            for (int i = 0; i < 3; i++) { log_line(&log, numbered(i)); }
            log_close(&log);
            _exit(0);
        });
        char line[512];
        snprintf(line, sizeof(line), "train_gpt_fp8: cannot write to %s/full/log.jsonl: No space left on device (df -h shows what is full: make room, or give a "
                                     "folder on another disk); the run goes on, and lines are missing from this log\n", folder);
        assert_string_equal(ending.err, line);
        assert_int_equal(ending.status, 0);
    }
}

static void a_disk_that_fills_up_leaves_whole_lines(void**) {
    Ending ending = run_child([] {
        signal(SIGXFSZ, SIG_IGN);
        struct rlimit old, limit;
        getrlimit(RLIMIT_FSIZE, &old);
        limit = old;
        limit.rlim_cur = 20;  // two lines of 8 bytes and half of the third
        Log log = log_open("--output-dir", folder, false);
        setrlimit(RLIMIT_FSIZE, &limit);
        for (int i = 1; i <= 4; i++) { log_line(&log, numbered(i)); }
        setrlimit(RLIMIT_FSIZE, &old);  // room again: so do lines
        log_line(&log, numbered(5));
        log_close(&log);
        _exit(0);
    });
    assert_int_equal(ending.status, 0);
    assert_non_null(strstr(ending.err, "cannot write to "));
    assert_ptr_equal(strchr(ending.err, '\n'), ending.err + strlen(ending.err) - 1);
    assert_string_equal(text_at(in_folder("log.jsonl")), "{\"x\":1}\n{\"x\":2}\n{\"x\":5}\n");
}

// ---- numbers for people ----

struct TextCase {
    double value;
    const char* text;
};

template <class Format, size_t N>
static void expect_texts(Format format, const TextCase (&cases)[N]) {
    for (const TextCase& c : cases) {
        Text got = format(c.value);
        if (strcmp(got.s, c.text) != 0) { print_error("%.17g: ", c.value); }
        assert_string_equal(got.s, c.text);
    }
}

static void counts_change_units_where_rounding_does(void**) {
    const TextCase cases[] = {{0, "0"}, {0.5, "0.50"}, {1, "1.00"}, {9.99, "9.99"}, {9.994, "9.99"}, {9.996, "10.0"}, {44.6, "44.6"},
        {99.94, "99.9"}, {99.96, "100"}, {999, "999"}, {999.4, "999"}, {999.6, "1.00k"}, {999.95, "1.00k"}, {1000, "1.00k"},
        {1234, "1.23k"}, {12345, "12.3k"}, {999499, "999k"}, {999501, "1.00M"}, {1.23e6, "1.23M"}, {1.5e9, "1.50G"}, {2e12, "2.00T"},
        {3e15, "3.00P"},
        {999e15, "999P"}, {12345e15, "12345P"}, {1e300, "1.00e+285P"}, {-12345, "-12.3k"}, {NAN, "nan"}, {-NAN, "nan"}, {INFINITY, "inf"},
        {-INFINITY, "-inf"}};
    expect_texts(text_count, cases);
}

static void bytes_are_binary(void**) {
    const double KiB = 1024, MiB = KiB * 1024, GiB = MiB * 1024, TiB = GiB * 1024;
    const TextCase cases[] = {{0, "0 B"}, {1, "1 B"}, {512, "512 B"}, {1023, "1023 B"}, {1024, "1.00 KiB"}, {1536, "1.50 KiB"},
        {999 * KiB, "999 KiB"}, {1023 * KiB, "1023 KiB"}, {1023.6 * KiB, "1.00 MiB"}, {MiB, "1.00 MiB"}, {117.7 * MiB, "118 MiB"},
        {79.6 * GiB, "79.6 GiB"}, {1.5 * TiB, "1.50 TiB"}, {2048 * TiB, "2.00 PiB"}, {-2048, "-2.00 KiB"}};
    expect_texts(text_bytes, cases);
}

static void times_are_ms_then_seconds(void**) {
    const TextCase cases[] = {{0.41, "0.41 ms"}, {0, "0.00 ms"}, {41.2, "41.2 ms"}, {999.4, "999 ms"}, {999.95, "1.00 s"}, {1000, "1.00 s"},
        {1234, "1.23 s"}, {59999, "60.0 s"}, {123456, "123 s"}, {4567890, "4568 s"}, {NAN, "nan"}};
    expect_texts(text_ms, cases);
}

static void etas_are_clock_times(void**) {
    const double hour = 3600, day = 24 * hour;
    const TextCase cases[] = {{0, "0:00:00"}, {0.4, "0:00:00"}, {0.6, "0:00:01"}, {59.4, "0:00:59"}, {59.6, "0:01:00"}, {724, "0:12:04"},
        {3599.6, "1:00:00"}, {36 * hour, "36:00:00"}, {2 * day - 1, "47:59:59"}, {2 * day, "48:00:00"}, {2 * day + 1, "2d 0:00:01"},
        {3 * day - 1, "2d 23:59:59"}, {40 * day + 3 * hour + 65, "40d 3:01:05"}, {-1, "?"}, {NAN, "?"}, {INFINITY, "?"}, {1e300, "?"},
        {9e13, "1041666666d 16:00:00"}};
    expect_texts(text_eta, cases);
}

static void small_numbers_have_exponents(void**) {
    const TextCase rates[] = {{3e-4, "3.0e-4"}, {6e-4, "6.0e-4"}, {3.14e-4, "3.1e-4"}, {9.96e-5, "1.0e-4"}, {1e-10, "1.0e-10"},
        {1, "1.0e0"}, {0.05, "5.0e-2"}, {1.5e100, "1.5e100"}, {0, "0"}, {-2e-5, "-2.0e-5"}, {NAN, "nan"}, {5e-324, "4.9e-324"}};
    expect_texts(text_exponent, rates);
    const TextCase losses[] = {{5.4321, "5.4321"}, {5.43214, "5.4321"}, {10.99999, "11.0000"}, {0, "0.0000"}, {0.001, "0.0010"},
        {9e-4, "9.0e-4"}, {9.6e-4, "0.0010"}, {99999, "99999.0000"}, {1e5, "1.0e5"}, {-3.25, "-3.2500"}, {NAN, "nan"}, {-NAN, "nan"},
        {INFINITY, "inf"}};
    expect_texts([](double x) { return text_decimals(x, 4); }, losses);
    const TextCase norms[] = {{0.91, "0.91"}, {12.345, "12.35"}, {0.1, "0.10"}, {0.0949, "9.5e-2"}, {1.2e-5, "1.2e-5"}, {0, "0.00"},
        {3.4e8, "3.4e8"}};
    expect_texts([](double x) { return text_decimals(x, 2); }, norms);
}

// ---- tables ----

static void tables_align(void**) {
    FILE* file = tmpfile();
    const LogRow rows[] = {{"Optimizer and its friends", NULL}, {"lr", "0.0003"}, {"µ-start", "0.5"}, {"train-data", "a\nb*.bin"},
                           {"init", ""}};
    log_table(file, "configuration", rows, 5);
    assert_string_equal(text_of(file), "configuration\n"
                                       " Optimizer and its friends\n"
                                       "  lr          0.0003\n"
                                       "  µ-start     0.5\n"
                                       "  train-data  a?b*.bin\n"
                                       "  init        \n");
}

static void memory_tables_add_up(void**) {
    FILE* file = tmpfile();
    MemoryRow rows[] = {{"weights", 1 << 30, 1 << 30}, {"gradients", 3ll << 30, 3ll << 30}, {"workspace", 0, 0}};
    log_memory_table(file, "memory of rank 0", rows, 3);
    assert_string_equal(text_of(file), "memory of rank 0\n"
                                       "  weights     1.00 GiB   25.0%\n"
                                       "  gradients   3.00 GiB   75.0%\n"
                                       "  workspace        0 B    0.0%\n"
                                       "  total       4.00 GiB  100.0%\n");
    file = tmpfile();
    log_memory_table(file, "nothing", rows, 0);
    assert_string_equal(text_of(file), "nothing\n  total        0 B    0.0%\n");
    file = tmpfile();
    rows[1].least = 1 << 20;
    log_memory_table(file, "ranks differ", rows, 3);
    assert_string_equal(text_of(file), "ranks differ\n"
                                       "  weights     1.00 GiB   25.0%   1.00 GiB\n"
                                       "  gradients   3.00 GiB   75.0%   1.00 MiB\n"
                                       "  workspace        0 B    0.0%        0 B\n"
                                       "  total       4.00 GiB  100.0%   1.00 GiB\n");
}

// ---- the step line ----

static const StepLine plain_step = {12, 1000, 5.4321, 0.91, 3e-4, 41.2, 12345, 0.381, 724, NULL};
#define PLAIN_TEXT "step 12/1000 | loss 5.4321 | norm 0.91 | lr 3.0e-4 | 41.2 ms | 12.3k tok/s | 38.1% mfu | eta 0:12:04"

static void step_lines_read_as_designed(void**) {
    char text[512];
    step_line_text(text, sizeof(text), &plain_step);
    assert_string_equal(text, PLAIN_TEXT);
    StepLine line = plain_step;
    line.mfu = NAN;
    step_line_text(text, sizeof(text), &line);
    assert_string_equal(text, "step 12/1000 | loss 5.4321 | norm 0.91 | lr 3.0e-4 | 41.2 ms | 12.3k tok/s | eta 0:12:04");
    line = {1, 20000, NAN, INFINITY, 0, 1234, 44.6, 0, NAN, "norm is inf"};
    step_line_text(text, sizeof(text), &line);
    assert_string_equal(text, "step 1/20000 | loss nan | norm inf | lr 0 | 1.23 s | 44.6 tok/s | 0.0% mfu | eta ? | skipped (norm is inf)");
    char why[400];
    memset(why, 'w', sizeof(why));
    why[399] = '\0';
    line = {INT64_MIN, INT64_MIN, -DBL_MAX, -DBL_MAX, -DBL_MIN, -DBL_MAX, -DBL_MAX, -1e15, 9e13, why};  // the widest of everything
    step_line_text(text, sizeof(text), &line);
    assert_non_null(strstr(text, "ww)"));  // it fits: the line is not cut
    char small[8];
    volatile size_t size = sizeof(small);
    step_line_text(small, size, &plain_step);
    assert_string_equal(small, "step 12");
}

static void etas_ignore_the_first_step(void**) {
    StepClock clock = {};
    assert_true(isnan(step_clock_eta(&clock, 10)));
    step_clock_add(&clock, 60000);
    assert_true(isnan(step_clock_eta(&clock, 10)));
    assert_true(step_clock_eta(&clock, 0) == 0);
    step_clock_add(&clock, 100);
    assert_true(step_clock_eta(&clock, 10) == 1.0);
    step_clock_add(&clock, 300);
    assert_true(step_clock_eta(&clock, 10) == 2.0);
    assert_true(step_clock_eta(&clock, -1) == 0);
}

// ---- the console ----

// What a terminal of one growing page shows: knows \r, \n and "clear to the end of the line", as many columns as it has; a wrap fails.
static const char* screen(const char* bytes, int columns) {
    static char shown[65536];
    size_t n = 0, column = 0, length = 0;
    char line[1024];
    for (; *bytes != '\0'; bytes++) {
        if (*bytes == '\r') {
            column = 0;
        } else if (*bytes == '\n') {
            n += snprintf(shown + n, sizeof(shown) - n, "%.*s\n", (int)length, line);
            column = length = 0;
        } else if (strncmp(bytes, "\033[K", 3) == 0) {
            length = column;
            bytes += 2;
        } else {
            assert_true(*bytes != '\033');
            assert_true(columns == 0 || (int)column < columns - 1);
            line[column++] = *bytes;
            length = max_of(length, column);
        }
    }
    snprintf(shown + n, sizeof(shown) - n, "%.*s", (int)length, line);
    return shown;
}

static StepLine nth_step(int64_t step, int64_t steps) {
    StepLine line = plain_step;
    line.step = step;
    line.steps = steps;
    return line;
}

static void files_get_every_step(void**) {
    FILE* file = tmpfile();
    Console console = console_open(file, 10);
    assert_false(console.live);
    console_step(&console, &plain_step);
    console_print(&console, "validation loss %.2f", 5.25);
    console_step(&console, &plain_step);
    console_end_line(&console);
    assert_string_equal(text_of(file), PLAIN_TEXT "\nvalidation loss 5.25\n" PLAIN_TEXT "\n");
}

static void live_lines_are_rewritten(void**) {
    FILE* file = tmpfile();
    Console console = console_open(file, 3);
    console.live = true;
    for (int64_t step = 1; step <= 7; step++) {
        StepLine line = nth_step(step, 7);
        line.loss = step == 1 ? 12345 : 1;  // the first is the longest
        line.eta_seconds = step == 1 ? 1e8 : 1;
        if (step == 4) { line.skipped = "loss is nan"; }
        console_step(&console, &line);
        if (step == 5) {
            console_print(&console, "validation");
            console_print(&console, "sample");
        }
    }
    console_end_line(&console);
    const char* bytes = text_of(file);
    int returns = 0;
    for (const char* p = bytes; *p != '\0'; p++) { returns += *p == '\r'; }
    assert_int_equal(returns, 7);
    const char* cut = "| loss 1.0000 | norm 0.91 | lr 3.0e-4 | 41.2 ms | 12.3k tok/s | 38.1% mfu | ";
    char expected[2048];
    snprintf(expected, sizeof(expected), "step 3/7 %seta 0:00:01\nstep 4/7 %seta 0:00:01 | skipped (loss is nan)\nstep 5/7 %.70s\n"
             "validation\nsample\nstep 6/7 %seta 0:00:01\nstep 7/7 %seta 0:00:01\n", cut, cut, cut, cut, cut);  // 79: a file has no width
    assert_string_equal(screen(bytes, 0), expected);
}

// A pseudo-terminal with so many columns; returns what came out of it.
template <class Body>
static const char* on_terminal(int columns, Body body) {
    static char bytes[65536];
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0) { skip(); }  // as in a chroot without /dev/pts
    assert_int_equal(grantpt(master), 0);
    assert_int_equal(unlockpt(master), 0);
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    assert_true(slave >= 0);
    struct termios raw;
    assert_int_equal(tcgetattr(slave, &raw), 0);
    raw.c_oflag &= ~(tcflag_t)OPOST;  // else \n becomes \r\n
    assert_int_equal(tcsetattr(slave, TCSANOW, &raw), 0);
    struct winsize size = {};
    size.ws_row = 24;
    size.ws_col = (unsigned short)columns;
    assert_int_equal(ioctl(slave, TIOCSWINSZ, &size), 0);
    FILE* file = fdopen(slave, "w");
    assert_non_null(file);
    body(file, master);
    fputc('\0', file);
    assert_int_equal(fflush(file), 0);
    size_t got = 0;
    do {
        ssize_t n = read(master, bytes + got, sizeof(bytes) - got);
        assert_true(n > 0);
        got += (size_t)n;
    } while (bytes[got - 1] != '\0');
    fclose(file);
    close(master);
    return bytes;
}

static void terminals_are_live_and_lines_fit(void**) {
    setenv("TERM", "xterm", 1);
    const int widths[] = {20, 40, 100, 101, 200};  // the whole line has 100
    for (int columns : widths) {
        const char* bytes = on_terminal(columns, [](FILE* file, int) {
            Console console = console_open(file, 0);
            assert_true(console.live);
            for (int64_t step = 10; step <= 14; step++) {
                StepLine line = nth_step(step, 1000);
                console_step(&console, &line);
            }
        });
        char expected[512];
        snprintf(expected, sizeof(expected), "%s", PLAIN_TEXT);
        memcpy(expected, "step 14", 7);
        if (columns - 1 < (int)strlen(expected)) { expected[columns - 1] = '\0'; }
        assert_string_equal(screen(bytes, columns), expected);
    }
    const char* bytes = on_terminal(200, [](FILE* file, int master) {  // the window becomes narrower
        Console console = console_open(file, 0);
        StepLine line = nth_step(1, 1000);
        console_step(&console, &line);
        struct winsize size = {};
        size.ws_col = 9;
        assert_int_equal(ioctl(master, TIOCSWINSZ, &size), 0);
        console_step(&console, &line);
    });
    assert_string_equal(screen(bytes, 0), "step 1/1");
}

static void other_terminals_get_plain_lines(void**) {
    auto one_step = [](FILE* file, int) {
        Console console = console_open(file, 0);
        assert_false(console.live);
        console_step(&console, &plain_step);
    };
    setenv("TERM", "xterm", 1);
    assert_string_equal(on_terminal(0, one_step), PLAIN_TEXT "\n");  // mpirun's
    setenv("TERM", "dumb", 1);
    assert_string_equal(on_terminal(200, one_step), PLAIN_TEXT "\n");
    unsetenv("TERM");
    assert_string_equal(on_terminal(200, one_step), PLAIN_TEXT "\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(folders_are_made_with_their_parents),
        cmocka_unit_test(folders_that_cannot_be_are_refused),
        cmocka_unit_test(non_finite_numbers_are_null_at_any_depth),
        cmocka_unit_test(numbers_are_short_and_exact),
        cmocka_unit_test(random_numbers_read_back),
        cmocka_unit_test(strings_become_utf8),
        cmocka_unit_test(objects_are_freed_and_dropped_without_a_log),
        cmocka_unit_test(appending_continues_after_the_last_whole_line),
        cmocka_unit_test(a_full_disk_is_said_once),
        cmocka_unit_test(a_disk_that_fills_up_leaves_whole_lines),
        cmocka_unit_test(counts_change_units_where_rounding_does),
        cmocka_unit_test(bytes_are_binary),
        cmocka_unit_test(times_are_ms_then_seconds),
        cmocka_unit_test(etas_are_clock_times),
        cmocka_unit_test(small_numbers_have_exponents),
        cmocka_unit_test(tables_align),
        cmocka_unit_test(memory_tables_add_up),
        cmocka_unit_test(step_lines_read_as_designed),
        cmocka_unit_test(etas_ignore_the_first_step),
        cmocka_unit_test(files_get_every_step),
        cmocka_unit_test(live_lines_are_rewritten),
        cmocka_unit_test(terminals_are_live_and_lines_fit),
        cmocka_unit_test(other_terminals_get_plain_lines),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
