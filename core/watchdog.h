// watchdog.h: ends a run that hangs, and says which rank it hangs on.
//
// A thread of each rank watches the training thread, which says whenever it gets on (watchdog_progress). With several ranks it also lets the others know that
// its process lives: it counts in its page of the file DIR/.heartbeats. While its own rank does not get on, as it waits for another, it looks whose count stands
// still. It ends the rank, and so the launcher all ranks, when
//     no rank that it sees has got on for `timeout` seconds: it names the one that is furthest behind;
//     or what carries the exchanges has met an error in the background (`trouble`);
//     or the own rank does not get on, and another gives no sign of life, for DEAD_AFTER seconds (`timeout` if that is less): that process was stopped, or its
//     machine is gone. Of processes that die the launcher itself tells.
// Over NFS a machine sees what another has written when both have closed and opened the file anew, and pages are written as wholes: so each has its own. Of a
// rank whose page is empty nothing is known: its machine may have a disk of its own under that name.
#pragma once
#include "common.h"
#include "trouble.h"  // what hangs at the start
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <fcntl.h>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

constexpr double WATCHDOG_BEAT = 1.0;    // seconds between looks
constexpr double DEAD_AFTER = 20.0;
constexpr off_t HEARTBEAT_PAGE = 4096;   // bytes

struct Heartbeat {       // a rank's page of the file begins with it
    int64_t beats;       // of its watchdog; < 0: it has ended
    int64_t progress;    // of its training thread
    int64_t step, pid;   // pid 0: nothing is known of this rank
    char host[64];
    char doing[32];
};

struct Watchdog {
    double timeout;      // seconds; 0: there is no watchdog
    int rank, ranks;
    std::string path;    // of the file; "": there is none
    std::atomic<int64_t> progress, step;
    std::atomic<const char*> doing;  // what the training thread does, a constant text
    Heartbeat mine;      // as it is before the first look
    std::string (*trouble)(void);  // an error in the background, "" none; NULL: nobody to ask
    bool ends;           // under `lock`
    std::mutex lock;
    std::condition_variable bell;  // rings at the end
    std::thread thread;
};

static inline std::string heartbeats_path(const std::string& folder) { return folder + "/.heartbeats"; }

// Without a file nobody is named, but the time still counts
static inline void heartbeat_write(const Watchdog* w, const Heartbeat* mine, int flags) {
    int fd = w->path.empty() ? -1 : open(w->path.c_str(), O_RDWR | O_CLOEXEC | flags, 0666);
    if (fd < 0) { return; }
    Heartbeat page = *mine;  // g++ 12 takes mine for its first member
    (void)!pwrite(fd, &page, sizeof(page), (off_t)w->rank * HEARTBEAT_PAGE);
    close(fd);
}

// false: there is nothing to read
static inline bool heartbeats_read(const Watchdog* w, std::vector<Heartbeat>* all) {
    int fd = w->path.empty() ? -1 : open(w->path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) { return false; }
    for (size_t r = 0; r < all->size(); r++) {
        if (pread(fd, &(*all)[r], sizeof(Heartbeat), (off_t)r * HEARTBEAT_PAGE) != (ssize_t)sizeof(Heartbeat)) { (*all)[r] = Heartbeat{}; }
    }
    close(fd);
    return true;
}

// The training thread has got on. `doing`: what it does next
static inline void watchdog_progress(Watchdog* w, int64_t step, const char* doing) {
    w->step = step;
    w->doing = doing;
    w->progress++;
}

[[noreturn]] static inline void watchdog_end(const Watchdog* w, const std::string& why) {
    // Not by the launcher's call, which the training thread may be in the middle of: a rank that ends badly ends all
    fprintf(stderr, "%strain_gpt_fp8: rank %d: %s\n", process.live_line ? "\n" : "", w->rank, why.c_str());
    fflush(stderr);
    _exit(1);
}

static inline void watchdog_run(Watchdog* w) {
    std::vector<Heartbeat> all((size_t)w->ranks), before;
    std::vector<double> lived((size_t)w->ranks, wall_seconds());
    Heartbeat mine = w->mine;
    double since = wall_seconds(), dead_after = DEAD_AFTER < w->timeout ? DEAD_AFTER : w->timeout;
    int64_t seen = w->progress;
    std::chrono::duration<double> pause(w->timeout < 4.0 * WATCHDOG_BEAT ? w->timeout / 4.0 : WATCHDOG_BEAT);
    std::unique_lock<std::mutex> held(w->lock);
    while (!w->bell.wait_for(held, pause, [=] { return w->ends; })) {
        double now = wall_seconds();
        mine.beats++;
        mine.progress = w->progress;
        mine.step = w->step;
        snprintf(mine.doing, sizeof(mine.doing), "%s", w->doing.load());
        heartbeat_write(w, &mine, 0);
        std::string trouble = w->trouble != NULL ? w->trouble() : "";
        if (!trouble.empty()) { watchdog_end(w, trouble); }
        if (mine.progress != seen) {
            seen = mine.progress;
            since = now;
            before.clear();
            continue;
        }
        double waited = now - since;
        if (waited < 0.25 * dead_after) { continue; }
        if (heartbeats_read(w, &all)) {
            size_t silent = (size_t)w->rank;  // the one that has given no sign of life for longest
            for (size_t r = 0; r < all.size(); r++) {
                if (before.empty() || all[r].beats != before[r].beats || all[r].beats < 0 || all[r].pid == 0) { lived[r] = now; }
                if (!before.empty() && all[r].pid != 0 && all[r].progress > before[r].progress) { since = now; }  // it is being waited for, and gets on
                silent = lived[r] < lived[silent] && (int)r != w->rank ? r : silent;
            }
            double still = now - lived[silent];
            if (still > 0.75 * dead_after || (waited >= w->timeout && still > 2.0 * pause.count())) {
                watchdog_end(w, "rank " + std::to_string(silent) + " (process " + std::to_string(all[silent].pid) + " on " + all[silent].host + ") has given no sign of life for "
                    + std::to_string((int)(still + 0.5)) + " s, in step " + std::to_string(all[silent].step + 1) + ": it was stopped, or its machine is gone. All ranks end; --resume goes on from the last checkpoint");
            }
            before = all;
        }
        waited = now - since;
        if (waited < w->timeout) { continue; }
        size_t slowest = (size_t)w->rank;
        for (size_t r = 0; !before.empty() && r < all.size(); r++) { slowest = all[r].beats >= 0 && all[r].pid != 0 && all[r].progress < all[slowest].progress ? r : slowest; }
        std::string why = "no progress for " + std::to_string((int)(waited + 0.5)) + " s (--timeout): ";
        if (w->ranks > 1 && w->path.empty()) { watchdog_end(w, why + "this rank waits in " + mine.doing + never_met_advice); }  // nothing is known of the others yet
        const Heartbeat* h = before.empty() ? &mine : &all[slowest];
        watchdog_end(w, why + "rank " + std::to_string(slowest) + " is the furthest behind: " + h->doing + " of step " + std::to_string(h->step + 1) + ", process " + std::to_string(h->pid)
            + " on " + h->host + ". All ranks end; --resume goes on from the last checkpoint");
    }
}

// `folder`: where all ranks can write, "": there is none yet; all of them call it
static inline void watchdog_start(Watchdog* w, double timeout, const std::string& folder, int rank, int ranks, std::string (*trouble)(void)) {
    w->timeout = timeout;
    w->trouble = trouble;
    w->rank = rank;
    w->ranks = ranks;
    w->path.clear();
    w->progress = 0;
    w->step = 0;
    w->doing = "start";
    w->ends = false;
    if (timeout <= 0.0) { return; }
    w->mine = Heartbeat{};
    w->mine.pid = (int64_t)getpid();
    gethostname(w->mine.host, sizeof(w->mine.host) - 1);
    snprintf(w->mine.doing, sizeof(w->mine.doing), "%s", w->doing.load());
    if (ranks > 1 && !folder.empty()) {
        w->path = heartbeats_path(folder);
        heartbeat_write(w, &w->mine, O_CREAT);
    }
    w->thread = thread_started([=] { watchdog_run(w); });
}

static inline void watchdog_stop(Watchdog* w) {
    if (w->timeout <= 0.0) { return; }
    {
        std::lock_guard<std::mutex> held(w->lock);
        w->ends = true;
    }
    w->bell.notify_all();
    w->thread.join();
    w->mine.beats = -1;
    heartbeat_write(w, &w->mine, 0);  // who still waits sees that we have ended
    if (w->rank == 0 && !w->path.empty()) { unlink(w->path.c_str()); }
}
