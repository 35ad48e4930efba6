// log.h: what a run shows: DIR/log.jsonl for programs and the console for people.
//
// log.jsonl holds one JSON object a line, each written by one write(2), so that a reader never sees half a line of a living run. When the
// disk is full the run goes on: it is said once on stderr, and the file keeps whole lines. The caller builds the objects with json-c;
// here they are made valid JSON (json-c itself prints NaN, which is not) and short. Numbers:
//   NaN, infinity   null
//   whole numbers   all digits
//   floats          the shortest decimal that reads back as the same float (at most 9 digits); most of what is logged was computed in FP32,
//                   and 0.1 is then worth more to a reader than 0.10000000149011612
//   other doubles   the shortest decimal that reads back as the same double (at most 17 digits)
//
// The console gets tables and a line a step. On a terminal the step line is live: it is rewritten in place, cut to the terminal's width,
// and every keep_every steps a line stays. In a file or a pipe every step has its line. Under mpirun, ranks write to a pseudo-terminal
// without a size, even if the output ends in a file: that is no terminal to us.
//
//   make_directory("--output-dir", args.output_dir);
//   Log log = rank == 0 ? log_open("--output-dir", args.output_dir, args.resume) : no_log();
//   Console console = console_open(stdout, 100);
//   StepClock clock = {};
//   ... each step:
//       step_clock_add(&clock, ms);
//       StepLine line = {step, steps, loss, norm, lr, ms, tok_s, mfu, step_clock_eta(&clock, steps - step), NULL};
//       console_step(&console, &line);
//       json_object* object = json_object_new_object();
//       json_object_object_add(object, "loss", json_object_new_double(loss));
//       log_line(&log, object);
#pragma once
#include "common.h"   // bad_input, die
#include "trouble.h"  // error_of
#include <fcntl.h>
#include <float.h>
#include <json-c/json.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>

// ---- the output folder ----

// mkdir -p, and a trial that files can be made in it, before anything there is touched. flag is the option that named it, for messages.
static inline void make_directory(const char* flag, const char* path) {
    size_t length = strlen(path);
    if (length == 0) { bad_input("%s: the folder's name is empty", flag); }
    char* work = (char*)host_alloc(length + 64);
    for (size_t end = 1; end <= length; end++) {
        if (path[end] != '/' && path[end] != '\0') { continue; }
        memcpy(work, path, end);
        work[end] = '\0';
        if (mkdir(work, 0777) == 0) { continue; }
        int error = errno;  // EEXIST mostly, but a read-only parent may answer otherwise for a folder that is there
        struct stat status;
        if (stat(work, &status) == 0) {
            if (!S_ISDIR(status.st_mode)) { bad_input("%s: '%s' is a file, not a folder", flag, work); }
        } else {
            bad_input("%s: cannot make the folder '%s': %s", flag, work, error_of(error).c_str());
        }
    }
    snprintf(work, length + 64, "%s/.write_test_%ld", path, (long)getpid());
    int fd = open(work, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (fd < 0) { bad_input("%s: cannot write to the folder '%s': %s", flag, path, error_of(errno).c_str()); }
    int error = write(fd, "\n", 1) == 1 ? 0 : errno;
    if (close(fd) != 0 && error == 0) { error = errno; }
    unlink(work);
    if (error != 0) { bad_input("%s: cannot write to the folder '%s': %s", flag, path, error_of(error).c_str()); }
    free(work);
}

// ---- log.jsonl ----

struct Log {
    int fd;       // -1: lines are dropped (ranks other than 0)
    bool failed;  // a write has failed and been reported
    char* path;
};

static inline Log no_log(void) { return Log{-1, false, NULL}; }

// A run that was killed may leave half a line: new lines must not be glued to it.
static inline int drop_torn_line(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) { return errno; }
    if (!S_ISREG(status.st_mode)) { return 0; }
    off_t end = status.st_size;
    char block[4096];
    while (end > 0) {
        size_t bytes = (size_t)min_of<off_t>(end, sizeof(block));
        ssize_t got = pread(fd, block, bytes, end - (off_t)bytes);
        if (got != (ssize_t)bytes) { return got < 0 ? errno : EIO; }
        while (bytes > 0 && block[bytes - 1] != '\n') {
            bytes--;
            end--;
        }
        if (bytes > 0) { break; }
    }
    if (end == status.st_size) { return 0; }
    return ftruncate(fd, end) == 0 ? 0 : errno;
}

// Opens DIR/log.jsonl: from empty, or after its last whole line. Whoever has it open has the folder to himself
static inline Log log_open(const char* flag, const char* directory, bool append) {
    Log log = no_log();
    size_t size = strlen(directory) + sizeof("/log.jsonl");
    log.path = (char*)host_alloc(size);
    snprintf(log.path, size, "%s/log.jsonl", directory);
    log.fd = open(log.path, O_CREAT | O_RDWR | O_APPEND | O_CLOEXEC, 0666);
    if (log.fd >= 0 && flock(log.fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {  // not on every file system
        die("%s: another run is writing to '%s'; wait for its end, or give this one another folder", flag, directory);
    }
    int error = log.fd < 0 ? errno : append ? drop_torn_line(log.fd) : ftruncate(log.fd, 0) != 0 && errno != EINVAL ? errno : 0;
    if (error != 0) { bad_input("%s: cannot open '%s': %s", flag, log.path, error_of(error).c_str()); }
    return log;
}

// Bytes so far
static inline int64_t log_size(const Log* log) {
    struct stat status;
    return log->fd >= 0 && fstat(log->fd, &status) == 0 ? (int64_t)status.st_size : 0;
}

// Takes away what was logged after the first `bytes`: of steps that are done again
static inline void log_cut(Log* log, int64_t bytes) {
    if (log->fd < 0 || log_size(log) <= bytes) { return; }
    int error = ftruncate(log->fd, (off_t)bytes) != 0 ? errno : drop_torn_line(log->fd);
    if (error != 0) { bad_input("--output-dir: '%s' cannot be cut to %" PRId64 " bytes, where the checkpoint was written: %s", log->path, bytes, strerror(error)); }
}

static inline void log_close(Log* log) {
    if (log->fd >= 0) { close(log->fd); }  // every line has been written by then
    free(log->path);
    *log = no_log();
}

static inline int json_number(json_object* number, printbuf* out, int, int) {
    double value = json_object_get_double(number);
    char text[40] = "null";
    if (value == rint(value) && fabs(value) < 9007199254740992.0) {
        snprintf(text, sizeof(text), "%.0f", value);
    } else if (isfinite(value)) {
        bool is_float = fabs(value) <= FLT_MAX && (double)(float)value == value;
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(text, sizeof(text), "%.*g", digits, value);
            if (is_float ? strtof(text, NULL) == (float)value : strtod(text, NULL) == value) { break; }
        }
    }
    return printbuf_memappend(out, text, (int)strlen(text));
}

// Bytes of the UTF-8 character at p; 0: it is none. The zero at a string's end is no continuation byte, so nothing is read beyond it.
static inline int utf8_bytes(const unsigned char* p) {
    if (p[0] < 0x80) { return 1; }
    int bytes = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4) { return 0; }
    for (int i = 1; i < bytes; i++) {
        if ((p[i] & 0xc0) != 0x80) { return 0; }
    }
    bool wrong = (p[0] == 0xe0 && p[1] < 0xa0) || (p[0] == 0xed && p[1] > 0x9f)   // overlong; a surrogate
              || (p[0] == 0xf0 && p[1] < 0x90) || (p[0] == 0xf4 && p[1] > 0x8f);  // overlong; beyond Unicode
    return wrong ? 0 : bytes;
}

// Strings from outside (paths, prompts) may be no UTF-8, which JSON must be: wrong bytes become '?'.
static inline void make_utf8(json_object* string) {
    size_t length = (size_t)json_object_get_string_len(string);
    const char* text = json_object_get_string(string);
    char* fixed = NULL;
    for (size_t i = 0; i < length;) {
        int bytes = utf8_bytes((const unsigned char*)text + i);
        if (bytes == 0) {
            if (fixed == NULL) { fixed = (char*)memcpy(host_alloc(length), text, length); }
            fixed[i] = '?';
        }
        i += (size_t)max_of(bytes, 1);
    }
    if (fixed == NULL) { return; }
    if (json_object_set_string_len(string, fixed, (int)length) == 0) { die("out of host memory"); }
    free(fixed);
}

// Makes every number and string below this node print as valid JSON.
static inline void make_valid_json(json_object* node) {
    switch (json_object_get_type(node)) {
        case json_type_double: json_object_set_serializer(node, json_number, NULL, NULL); break;
        case json_type_string: make_utf8(node); break;
        case json_type_array:
            for (size_t i = 0; i < json_object_array_length(node); i++) { make_valid_json(json_object_array_get_idx(node, i)); }
            break;
        case json_type_object: {
            json_object_iterator at = json_object_iter_begin(node), end = json_object_iter_end(node);
            for (; !json_object_iter_equal(&at, &end); json_object_iter_next(&at)) { make_valid_json(json_object_iter_peek_value(&at)); }
            break;
        }
        default: break;
    }
}

// Writes one line and frees the object (json_object_put). A failure does not stop the run.
static inline void log_line(Log* log, json_object* line) {
    if (log->fd < 0) {
        json_object_put(line);
        return;
    }
    make_valid_json(line);
    size_t length = 0;
    const char* text = json_object_to_json_string_length(line, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &length);
    if (text == NULL) { die("out of host memory"); }
    off_t before = lseek(log->fd, 0, SEEK_END);
    struct iovec parts[2] = {{(void*)text, length}, {(void*)"\n", 1}};
    ssize_t written;
    do {
        errno = 0;
        written = writev(log->fd, parts, 2);
    } while (written < 0 && errno == EINTR);
    if (written != (ssize_t)length + 1) {
        int error = errno != 0 ? errno : ENOSPC;  // part of the line fitted: the disk, the quota or the file's limit is full
        bool whole = written <= 0 || before < 0 || ftruncate(log->fd, before) == 0;
        if (!log->failed) {
            fprintf(stderr, "train_gpt_fp8: cannot write to %s: %s; the run goes on, and lines are missing from this log%s\n", log->path,
                    error_of(error).c_str(), whole ? "" : ", one is cut short");
        }
        log->failed = true;
    }
    json_object_put(line);
}

// ---- numbers for people ----

struct Text {
    char s[32];
};

static inline Text text_not_finite(double value) {
    Text t;
    snprintf(t.s, sizeof(t.s), "%s", isnan(value) ? "nan" : value < 0 ? "-inf" : "inf");
    return t;
}

// Three digits and a unit, moving on to the next unit where rounding reaches it: 999.4 -> 999, 999.95 -> 1.00k (base 1000).
static inline Text text_three_digits(double value, double base, const char* const* units, int count) {
    if (!isfinite(value)) { return text_not_finite(value); }
    Text t;
    double left = fabs(value);
    char digits[24];
    for (int unit = 0; unit < count; unit++, left /= base) {
        if (left >= 1e6) { continue; }
        for (int decimals = 2; decimals >= 0; decimals--) {
            snprintf(digits, sizeof(digits), "%.*f", decimals, left);
            double limit = decimals == 2 ? 10.0 : decimals == 1 ? 100.0 : base;
            if (strtod(digits, NULL) >= limit && !(unit == count - 1 && decimals == 0)) { continue; }
            snprintf(t.s, sizeof(t.s), "%s%s%s", value < 0 ? "-" : "", digits, units[unit]);
            return t;
        }
    }
    snprintf(t.s, sizeof(t.s), "%.2e%s", value / pow(base, count - 1), units[count - 1]);
    return t;
}

// 0, 44.6, 999, 12.3k, 1.23M
static inline Text text_count(double value) {
    static const char* const units[] = {"", "k", "M", "G", "T", "P"};
    if (value == 0) { return Text{"0"}; }
    return text_three_digits(value, 1000.0, units, 6);
}

// 512 B, 1.00 KiB, 79.6 GiB
static inline Text text_bytes(double bytes) {
    static const char* const units[] = {" B", " KiB", " MiB", " GiB", " TiB", " PiB"};
    if (bytes > -1000 && bytes < 1000) {  // no fractions of a byte
        Text t;
        snprintf(t.s, sizeof(t.s), "%.0f B", bytes);
        return t;
    }
    return text_three_digits(bytes, 1024.0, units, 6);
}

// 0.41 ms, 41.2 ms, 1.23 s, 123 s
static inline Text text_ms(double ms) {
    static const char* const units[] = {" ms", " s"};
    return text_three_digits(ms, 1000.0, units, 2);
}

// 0:12:04, 47:59:59, 2d 0:00:01 beyond 48 hours; ? when unknown (NaN, infinite, negative)
static inline Text text_eta(double seconds) {
    Text t;
    if (!(seconds >= 0 && seconds < 1e14)) { return Text{"?"}; }
    int64_t whole = llround(seconds);
    int64_t days = whole > 48 * 3600 ? whole / 86400 : 0, hours = whole / 3600 - days * 24;
    char day[24] = "";
    if (days > 0) { snprintf(day, sizeof(day), "%" PRId64 "d ", days); }
    snprintf(t.s, sizeof(t.s), "%.20s%d:%02d:%02d", day, (int)hours, (int)(whole / 60 % 60), (int)(whole % 60));
    return t;
}

// 3.0e-4: one decimal, no padded exponent; 0
static inline Text text_exponent(double value) {
    if (!isfinite(value)) { return text_not_finite(value); }
    if (value == 0) { return Text{"0"}; }
    Text t;
    char number[24];
    snprintf(number, sizeof(number), "%.1e", value);
    char* e = strchr(number, 'e');
    *e = '\0';
    snprintf(t.s, sizeof(t.s), "%.10s" "e%d", number, atoi(e + 1));
    return t;
}

// decimals digits after the point (1, 2 or 4) where that says enough, else 1.2e-5 or 3.4e8; whole zeros stay zeros
static inline Text text_decimals(double value, int decimals) {
    if (!isfinite(value)) { return text_not_finite(value); }
    double size = fabs(value);
    if (size >= 1e5 || (size != 0 && size < 9.5 * pow(10.0, -decimals))) { return text_exponent(value); }
    Text t;
    snprintf(t.s, sizeof(t.s), "%.*f", decimals, value);
    return t;
}

// ---- tables ----

struct LogRow {
    const char* name;
    const char* value;  // NULL: a heading
};

struct MemoryRow {
    const char* name;
    int64_t bytes;  // of the fullest rank
    int64_t least;  // of the emptiest
};

static inline int columns_of(const char* text) {
    int columns = 0;
    for (; *text != '\0'; text++) { columns += ((unsigned char)*text & 0xc0) != 0x80; }  // a UTF-8 character counts by its first byte
    return columns;
}

// name, padded to width columns, value; control characters of the value become '?', so that a row stays a row.
static inline void log_row(FILE* file, const char* name, int width, const char* value) {
    fprintf(file, "  %s%*s  ", name, width - columns_of(name), "");
    for (; *value != '\0'; value++) { fputc((unsigned char)*value < 0x20 || *value == 0x7f ? '?' : *value, file); }
    fputc('\n', file);
}

constexpr int TABLE_ROWS = 128;

// Rows whose values are formatted here; a row without a value is a heading
struct Table {
    LogRow rows[TABLE_ROWS];
    char values[TABLE_ROWS][320];
    int count;
};
__attribute__((format(printf, 3, 4))) static inline void table_add(Table* t, const char* name, const char* fmt, ...) {
    if (t->count == TABLE_ROWS) { die("more than %d rows", TABLE_ROWS); }
    va_list args;
    va_start(args, fmt);
    vsnprintf(t->values[t->count], sizeof(t->values[0]), fmt, args);
    va_end(args);
    t->rows[t->count] = LogRow{name, t->values[t->count]};
    t->count++;
}
static inline void table_heading(Table* t, const char* name) {
    if (t->count == TABLE_ROWS) { die("more than %d rows", TABLE_ROWS); }
    t->rows[t->count++] = LogRow{name, NULL};
}

// Two aligned columns under a title.
static inline void log_table(FILE* file, const char* title, const LogRow* rows, int count) {
    int width = 0;
    for (int i = 0; i < count; i++) {
        if (rows[i].value != NULL) { width = max_of(width, columns_of(rows[i].name)); }
    }
    fprintf(file, "%s\n", title);
    for (int i = 0; i < count; i++) {
        if (rows[i].value == NULL) {
            fprintf(file, " %s\n", rows[i].name);
        } else {
            log_row(file, rows[i].name, width, rows[i].value);
        }
    }
    fflush(file);
}

// Name, size and share of each category, and their total; and the sizes of the emptiest rank, where ranks differ.
static inline void log_memory_table(FILE* file, const char* title, const MemoryRow* rows, int count) {
    int width = columns_of("total");
    double total = 0, total_least = 0;
    bool differ = false;
    for (int i = 0; i < count; i++) {
        width = max_of(width, columns_of(rows[i].name));
        total += (double)rows[i].bytes;
        total_least += (double)rows[i].least;
        differ |= rows[i].least != rows[i].bytes;
    }
    fprintf(file, "%s\n", title);
    for (int i = 0; i <= count; i++) {
        double bytes = i < count ? (double)rows[i].bytes : total, least = i < count ? (double)rows[i].least : total_least;
        char value[80];
        int n = snprintf(value, sizeof(value), "%9s  %5.1f%%", text_bytes(bytes).s, total > 0 ? 100.0 * bytes / total : 0.0);
        if (differ) { snprintf(value + n, sizeof(value) - (size_t)n, "  %9s", text_bytes(least).s); }
        log_row(file, i < count ? rows[i].name : "total", width, value);
    }
    fflush(file);
}

// ---- the step line ----

struct StepLine {
    int64_t step, steps;
    double loss, grad_norm, lr;
    double ms;                 // of this step
    double tokens_per_second;
    double mfu;                // fraction of the device's dense peak; NaN: unknown, left out
    double eta_seconds;        // NaN: unknown
    const char* skipped;       // why the optimizer did not step, or NULL
};

static inline void step_line_text(char* text, size_t size, const StepLine* l) {
    char mfu[48] = "", skipped[128] = "";
    if (!isnan(l->mfu)) { snprintf(mfu, sizeof(mfu), " | %.1f%% mfu", 100.0 * l->mfu); }
    if (l->skipped != NULL) { snprintf(skipped, sizeof(skipped), " | skipped (%.100s)", l->skipped); }
    snprintf(text, size, "step %" PRId64 "/%" PRId64 " | loss %s | norm %s | lr %s | %s | %s tok/s%s | eta %s%s", l->step, l->steps,
             text_decimals(l->loss, 4).s, text_decimals(l->grad_norm, 2).s, text_exponent(l->lr).s, text_ms(l->ms).s,
             text_count(l->tokens_per_second).s, mfu, text_eta(l->eta_seconds).s, skipped);
}

// The mean step time without the first step, which pays for warming up (heuristics, allocation, page faults, cold caches).
struct StepClock {
    int64_t steps;
    double ms;  // of all steps but the first
};

static inline void step_clock_add(StepClock* clock, double ms) {
    if (clock->steps > 0) { clock->ms += ms; }
    clock->steps++;
}

// Seconds for the steps left; NaN until a second step has been seen, unless none is left.
static inline double step_clock_eta(const StepClock* clock, int64_t steps_left) {
    if (steps_left <= 0) { return 0.0; }
    return clock->steps > 1 ? clock->ms / (double)(clock->steps - 1) * (double)steps_left / 1000.0 : NAN;
}

// ---- the console ----

struct Console {
    FILE* file;
    bool live;           // a terminal: the step line is rewritten in place
    int64_t keep_every;  // when live: steps between lines that stay; 0: only the last one and skipped ones stay
    bool pending;        // the cursor stands at the end of a live line
};

// Columns of the terminal behind a file; 0: none, or one that does not know its size.
static inline int terminal_columns(FILE* file) {
    struct winsize terminal = {};
    int fd = fileno(file);
    return fd >= 0 && isatty(fd) && ioctl(fd, TIOCGWINSZ, &terminal) == 0 ? terminal.ws_col : 0;
}

static inline Console console_open(FILE* file, int64_t keep_every) {
    const char* kind = getenv("TERM");
    bool live = terminal_columns(file) > 0 && kind != NULL && strcmp(kind, "dumb") != 0;
    return Console{file, live, keep_every, false};
}

// Ends a live line, so that something else can be written to the file: a table, a sample, the end of the run.
static inline void console_end_line(Console* console) {
    if (!console->pending) { return; }
    fputc('\n', console->file);
    fflush(console->file);
    console->pending = process.live_line = false;
}

// A line of another kind (without its newline), which stays.
__attribute__((format(printf, 2, 3))) static inline void console_print(Console* console, const char* fmt, ...) {
    console_end_line(console);
    va_list args;
    va_start(args, fmt);
    vfprintf(console->file, fmt, args);
    va_end(args);
    fputc('\n', console->file);
    fflush(console->file);
}

static inline void console_step(Console* console, const StepLine* line) {
    char text[512];
    step_line_text(text, sizeof(text), line);
    bool keep = !console->live || line->step >= line->steps || line->skipped != NULL ||
                (console->keep_every > 0 && line->step % console->keep_every == 0);
    if (!keep) {  // cut, lest it wrap and \r return to its second half; the last column stays free, or \033[K would erase what is in it
        int columns = terminal_columns(console->file), left = (columns > 0 ? columns : 80) - 1;
        size_t end = 0;
        for (; text[end] != '\0'; end++) {
            if (((unsigned char)text[end] & 0xc0) != 0x80 && left-- == 0) { break; }
        }
        text[end] = '\0';
    }
    fprintf(console->file, "%s%s%s%s", console->live ? "\r" : "", text, console->live ? "\033[K" : "", keep ? "\n" : "");
    fflush(console->file);
    console->pending = process.live_line = !keep;
}
