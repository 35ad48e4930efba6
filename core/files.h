// files.h: files and folders: what checkpoints, exports and their readers need beyond the C library. Where something fails, errno's number is returned, 0
// else, since some callers go on.
#pragma once
#include "common.h"
#include "options.h"  // edit_distance
#include <algorithm>
#include <dirent.h>
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <vector>

static inline bool is_folder(const std::string& path) {
    struct stat status;
    return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

static inline std::string folder_of(const std::string& path) {
    size_t slash = path.find_last_of('/');
    return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

// What is in a folder, sorted; without . and ..
static inline int names_in_folder(std::vector<std::string>* names, const std::string& folder) {
    names->clear();
    DIR* d = opendir(folder.c_str());
    if (d == NULL) { return errno; }
    errno = 0;
    for (struct dirent* e; (e = readdir(d)) != NULL; errno = 0) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) { names->push_back(e->d_name); }
    }
    int error = errno;
    closedir(d);
    std::sort(names->begin(), names->end());
    return error;
}

// Of a path or pattern that nothing has: how far it leads, and what there is like it
static inline std::string nearest_text(const std::string& path) {
    const char* const wild = "*?[";
    std::string folder = folder_of(path), name = path.substr(path.find_last_of('/') + 1), missing;
    while (!is_folder(folder)) {
        missing = folder;
        folder = folder_of(folder);
    }
    std::string here = folder == "." ? "this folder" : "'" + folder + "'";
    if (!missing.empty()) {
        struct stat s;
        if (missing.find_first_of(wild) != std::string::npos) { return "no folder that matches '" + missing + "' in " + here + " has it"; }
        return (stat(missing.c_str(), &s) == 0 ? "no folder, but a file, is '" : "there is no folder '") + missing + "', but " + here + " is there";
    }
    std::vector<std::string> names;
    int error = names_in_folder(&names, folder), best = INT32_MAX;
    if (error != 0) { return here + " cannot be read: " + strerror(error); }
    names.erase(std::remove_if(names.begin(), names.end(), [](const std::string& n) { return n[0] == '.'; }), names.end());
    if (names.empty()) { return here + " is empty"; }
    name.erase(std::remove_if(name.begin(), name.end(), [=](char c) { return strchr(wild, c) != NULL; }), name.end());
    const std::string* nearest = NULL;  // all may be too far
    for (const std::string& n : names) {
        int distance = edit_distance(name.data(), name.size(), n.data(), n.size());
        if (distance < best) {
            best = distance;
            nearest = &n;
        }
    }
    std::string all = std::to_string(names.size()) + (names.size() == 1 ? " name" : " names");
    return nearest == NULL ? here + " has " + all + " unlike it" : "of the " + all + " in " + here + " the nearest is '" + *nearest + "'";
}

// A folder of files, and no folders in it. What cannot be removed stays
static inline int remove_folder(const std::string& folder) {
    std::vector<std::string> names;
    names_in_folder(&names, folder);
    for (const std::string& name : names) { unlink((folder + "/" + name).c_str()); }
    return rmdir(folder.c_str()) == 0 ? 0 : errno;
}

static inline int write_fully(int fd, const void* bytes, size_t n) {
    while (n > 0) {
        ssize_t done = write(fd, bytes, min_of(n, (size_t)1 << 30));
        if (done < 0 && errno == EINTR) { continue; }
        if (done <= 0) { return done < 0 ? errno : ENOSPC; }
        bytes = (const char*)bytes + done;
        n -= (size_t)done;
    }
    return 0;
}

// What was made and renamed in a folder is on the disk
static inline int sync_folder(const std::string& folder) {
    int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) { return errno; }
    int error = fsync(fd) != 0 && errno != EINVAL ? errno : 0;  // EINVAL: a file system without
    close(fd);
    return error;
}

// `bytes` at `offset`; what is wrong, or ""
static inline std::string read_fully(int fd, void* out, size_t bytes, uint64_t offset) {
    size_t done = 0;
    while (done < bytes) {
        ssize_t got = pread(fd, (char*)out + done, min_of(bytes - done, (size_t)1 << 30), (off_t)(offset + done));
        if (got < 0 && errno == EINTR) { continue; }
        if (got < 0) { return strerror(errno); }
        if (got == 0) { return "it ends at byte " + std::to_string(offset + done); }
        done += (size_t)got;
    }
    return "";
}
