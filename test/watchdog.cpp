// Tests of core/watchdog.h: whom it ends a run for, and whom it leaves alone.
#include "check.h"
#include <string>
#include <sys/wait.h>
#include "../core/watchdog.h"

static std::string folder;

// The other rank: writes its page whenever its watchdog would, and gets on when it is to
struct Other {
    Watchdog watchdog;
    Heartbeat line;
};
static void other_begin(Other* o) {
    o->watchdog.rank = 1;
    o->watchdog.path = heartbeats_path(folder);
    o->line = Heartbeat{};
    o->line.pid = 4242;
    snprintf(o->line.host, sizeof(o->line.host), "elsewhere");
    snprintf(o->line.doing, sizeof(o->line.doing), "a checkpoint");
}
static void other_beats(Other* o, double seconds, bool gets_on) {
    for (double end = wall_seconds() + seconds; wall_seconds() < end; usleep(50000)) {
        o->line.beats++;
        o->line.progress += gets_on;
        heartbeat_write(&o->watchdog, &o->line, O_CREAT);
    }
}

// A rank 0 of two that does not get on for so long, in a process of its own; its stderr is in the file err
static pid_t wait_as_first(double timeout, double seconds) {
    unlink(heartbeats_path(folder).c_str());
    pid_t child = fork();
    if (child != 0) { return child; }
    if (freopen((folder + "/err").c_str(), "w", stderr) == NULL) { _exit(3); }
    static Watchdog w;
    watchdog_start(&w, timeout, folder, 0, 2, NULL);
    usleep((useconds_t)(1e6 * seconds));
    watchdog_stop(&w);
    _exit(0);
}
static int code_of(pid_t child) {
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
static std::string said(void) {
    char text[1000] = "";
    FILE* f = fopen((folder + "/err").c_str(), "r");
    if (f != NULL) { text[fread(text, 1, sizeof(text) - 1, f)] = '\0'; fclose(f); }
    return text;
}

// While the rank that is waited for gets on, as in a save that takes long, nobody ends
static void who_waits_for_one_that_gets_on_waits(void**) {
    Other other;
    other_begin(&other);
    pid_t child = wait_as_first(1.0, 3.0);
    other_beats(&other, 3.2, true);
    assert_int_equal(code_of(child), 0);
}

static void one_that_gives_no_sign_of_life_is_named(void**) {
    Other other;
    other_begin(&other);
    pid_t child = wait_as_first(1.0, 20.0);
    other_beats(&other, 0.5, true);
    assert_int_equal(code_of(child), 1);
    assert_non_null(strstr(said().c_str(), "rank 1 (process 4242 on elsewhere) has given no sign of life"));
}

static void one_that_lives_and_hangs_is_named(void**) {
    Other other;
    other_begin(&other);
    other.line.progress = -1;  // behind
    pid_t child = wait_as_first(1.0, 20.0);
    other_beats(&other, 3.0, false);
    assert_int_equal(code_of(child), 1);
    assert_non_null(strstr(said().c_str(), "no progress for 1 s (--timeout): rank 1 is the furthest behind: a checkpoint of step 1, process 4242 on elsewhere"));
}

// A rank of which nothing was ever read, as where machines do not share the folder, is not taken for dead, nor for the one that is behind
static void one_that_is_not_seen_is_not_named(void**) {
    pid_t child = wait_as_first(1.0, 20.0);
    assert_int_equal(code_of(child), 1);
    assert_non_null(strstr(said().c_str(), "no progress for 1 s (--timeout): rank 0 is the furthest behind"));
}

int main(void) {
    char name[] = "/tmp/watchdog.XXXXXX";
    if (mkdtemp(name) == NULL) { return 1; }
    folder = name;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(who_waits_for_one_that_gets_on_waits),
        cmocka_unit_test(one_that_gives_no_sign_of_life_is_named),
        cmocka_unit_test(one_that_lives_and_hangs_is_named),
        cmocka_unit_test(one_that_is_not_seen_is_not_named),
    };
    int failed = cmocka_run_group_tests_name("watchdog", tests, NULL, NULL);
    return system(("rm -rf '" + folder + "'").c_str()) != 0 ? 1 : failed;
}
