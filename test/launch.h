// launch.h: runs this test program again, as ranks under mpirun or as one plain process, and keeps what it printed. For tests of what
// ranks do together.
//
// A test program that uses it has two faces: main() with no argument runs the cmocka tests; with arguments it is one of the ranks that a
// test has started, checks with CHECK, and ends with exit code 0 if all held.
#pragma once
#include "../core/collectives.cuh"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
extern "C" {
#include <cmocka.h>
}

struct Launched {
    int code;        // exit code; 128 + the signal's number if it was killed
    bool timed_out;
    double seconds;
    char out[16384];   // stdout and stderr
    int lines;         // of ours within it: those that begin with "train_gpt_fp8: "
    char line[2048];   // the first of them, without that
};

// for the ranks
#define CHECK(condition, ...) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: rank %d: %s: ", __FILE__, __LINE__, process.rank, #condition); \
            fprintf(stderr, " " __VA_ARGS__); \
            fprintf(stderr, "\n"); \
            fflush(stderr); \
            _exit(99); \
        } \
    } while (0)

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#ifdef USE_MPI
static bool on_path(const char* program) {
    char dirs[8192], file[8192 + 64];
    snprintf(dirs, sizeof(dirs), "%s", getenv("PATH") != NULL ? getenv("PATH") : "");
    char* rest = NULL;
    for (char* dir = strtok_r(dirs, ":", &rest); dir != NULL; dir = strtok_r(NULL, ":", &rest)) {
        snprintf(file, sizeof(file), "%s/%s", dir, program);
        if (access(file, X_OK) == 0) { return true; }
    }
    return false;
}
#endif

// Can `ranks` processes of this build be started here?
static bool can_launch(int ranks) {
#ifdef USE_CUDA
    if (device_count() == 0) { return false; }
#endif
#ifdef USE_MPI
    return ranks == 1 || on_path("mpirun");
#else
    return ranks == 1;
#endif
}

// Starts `ranks` processes of this program with the arguments mode and argument; environment: NULL or one NAME=value for them. 1 rank is
// started plainly, as a user does. Ends them after `limit` seconds.
static Launched launch_ranks(int ranks, const char* mode, const char* argument, const char* environment, int limit) {
    Launched l = {};
    char self[4096], count[16];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    assert_true(n > 0);
    self[n] = '\0';
    snprintf(count, sizeof(count), "%d", ranks);
    const char* argv[16];
    int argc = 0;
    if (ranks > 1) {
        argv[argc++] = "mpirun";
        argv[argc++] = "-np";
        argv[argc++] = count;
#ifdef OPEN_MPI
        argv[argc++] = "--oversubscribe";
        argv[argc++] = "--bind-to";
        argv[argc++] = "none";
        if (geteuid() == 0) { argv[argc++] = "--allow-run-as-root"; }
#endif
    }
    argv[argc++] = self;
    argv[argc++] = mode;
    argv[argc++] = argument;
    argv[argc] = NULL;
    FILE* captured = tmpfile();
    assert_non_null(captured);
    double start = seconds_now();
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(fileno(captured), STDOUT_FILENO);
        dup2(fileno(captured), STDERR_FILENO);
        setenv("OMP_NUM_THREADS", "1", 1);
        if (environment != NULL) { putenv((char*)environment); }
        execvp(argv[0], (char* const*)argv);
        _exit(127);
    }
    int status = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
        double waited = seconds_now() - start;
        if (waited > limit) {
            l.timed_out = true;
            kill(child, waited > limit + 10 ? SIGKILL : SIGTERM);  // mpirun ends its ranks on SIGTERM
            usleep(500 * 1000);
        }
        usleep(2000);
    }
    l.seconds = seconds_now() - start;
    l.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    rewind(captured);
    l.out[fread(l.out, 1, sizeof(l.out) - 1, captured)] = '\0';
    fclose(captured);
    static const char prefix[] = "train_gpt_fp8: ";
    for (const char* p = l.out; *p != '\0'; p += strcspn(p, "\n"), p += *p == '\n') {
        if (strncmp(p, prefix, strlen(prefix)) != 0) { continue; }
        p += strlen(prefix);
        if (l.lines++ == 0) { snprintf(l.line, sizeof(l.line), "%.*s", (int)strcspn(p, "\n"), p); }
    }
    return l;
}

// The ranks must end with this exit code within the limit.
static Launched expect_ranks(int ranks, const char* mode, const char* argument, const char* environment, int limit, int code) {
    Launched l = launch_ranks(ranks, mode, argument, environment, limit);
    if (l.timed_out || l.code != code) {
        print_error("%d ranks, %s %s: exit code %d after %.1f s%s, not %d; they said:\n%s\n", ranks, mode, argument, l.code, l.seconds,
            l.timed_out ? " (too long)" : "", code, l.out);
        fail();
    }
    return l;
}

[[maybe_unused]] static void expect_line(const Launched* l, const char* line) {
    if (l->lines != 1) { print_error("%d lines, not one:\n%s\n", l->lines, l->out); }
    assert_int_equal(l->lines, 1);
    assert_string_equal(l->line, line);
}
