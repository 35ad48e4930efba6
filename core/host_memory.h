// host_memory.h: how much memory the host can still give this process: what the system has, less where a limit is nearer.
//
// The limits are those of the process (ulimit -v) and of its control groups, of which containers and batch systems make use: a process that outgrows one of these is
// killed without a word, so the limit has to be known before. Groups lie in folders within each other, and the tightest counts. Of what a group uses the
// caches of files are given up first, so they count as free.
#pragma once
#include "common.h"
#include <string>
#include <sys/resource.h>

// The number behind `name` in a file of such lines; `otherwise` where there is none. "": the file is one number, or "max"
static inline size_t number_in_file(const std::string& path, const char* name, size_t otherwise) {
    FILE* f = fopen(path.c_str(), "r");
    if (f == NULL) { return otherwise; }
    char line[256];
    size_t length = strlen(name), number = otherwise;
    while (fgets(line, sizeof(line), f) != NULL) {
        unsigned long long n;
        if (strncmp(line, name, length) == 0 && sscanf(line + length, "%llu", &n) == 1) { number = (size_t)n; break; }
    }
    fclose(f);
    return number;
}

// What the control groups leave this process; SIZE_MAX: none limits it. `root`: where their folders lie; `self`: the file that names this process's
static inline size_t group_memory_free(const std::string& root, const std::string& self) {
    FILE* f = fopen(self.c_str(), "r");
    if (f == NULL) { return SIZE_MAX; }
    size_t least = SIZE_MAX;
    char line[1024];
    while (fgets(line, sizeof(line), f) != NULL) {  // "4:memory:/path" of the first version, "0::/path" of the second
        line[strcspn(line, "\n")] = '\0';
        char* kinds = strchr(line, ':');
        char* path = kinds == NULL ? NULL : strchr(kinds + 1, ':');
        if (path == NULL) { continue; }
        std::string kind(kinds + 1, path), folder = path + 1;
        bool second = kind.empty();
        if (!second && kind != "memory") { continue; }
        std::string base = root + (second ? "" : "/memory");
        for (bool top = false; !top;) {
            top = folder.empty() || folder == "/";
            std::string at = base + (top ? "" : folder);
            size_t limit = number_in_file(at + (second ? "/memory.max" : "/memory.limit_in_bytes"), "", SIZE_MAX);
            size_t used = number_in_file(at + (second ? "/memory.current" : "/memory.usage_in_bytes"), "", 0);
            size_t caches = number_in_file(at + "/memory.stat", second ? "inactive_file " : "total_inactive_file ", 0)
                + number_in_file(at + "/memory.stat", second ? "active_file " : "total_active_file ", 0);
            used -= min_of(used, caches);
            if (limit != SIZE_MAX) { least = min_of(least, limit - min_of(limit, used)); }
            size_t slash = folder.rfind('/');
            folder.resize(slash == std::string::npos ? 0 : slash);
        }
    }
    fclose(f);
    return least;
}

constexpr size_t ADDRESSES_RESERVED = (size_t)128 << 20;  // of those that ulimit -v allows: for the stacks of threads, and what the C library sets aside for each

// What is left to each of `processes` without swapping: of free pages and the caches that the system would drop, within the limits of groups, a share; of the
// limit of a process, which is its own, all
static inline size_t host_memory_free(int processes = 1) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), kib = number_in_file("/proc/meminfo", "MemAvailable:", 0);
    size_t bytes = kib > 0 ? kib * 1024 : (size_t)sysconf(_SC_AVPHYS_PAGES) * page;
    bytes = min_of(bytes, group_memory_free("/sys/fs/cgroup", "/proc/self/cgroup")) / (size_t)max_of(processes, 1);
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
        size_t most = (size_t)limit.rlim_cur, taken = ADDRESSES_RESERVED + page * number_in_file("/proc/self/statm", "", 0);
        bytes = min_of(bytes, most - min_of(most, taken));
    }
    return bytes;
}
