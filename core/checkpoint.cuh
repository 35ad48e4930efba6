// checkpoint.cuh: what a run leaves behind to go on from: what it is made of, and how it is written while training goes on. checkpoint_reader.cuh checks and
// reads it.
//
// A checkpoint is a folder DIR/step_00001000, named after the steps that are behind it:
//     rank_00000.safetensors …   what each rank alone holds of weights, optimizer states and scales, written by all ranks at once
//     config.json, loader.json, matmul_choices.txt   what else a run needs; they are the trainer's, here they are texts
//     checksums.xxh128           XXH3's 128 bits of each of these files, as `xxh128sum -c` reads them
// It is written into step_00001000.tmp; every file is synced to the disk before the folder gets its name, and DIR/latest names it last. So a folder without
// a suffix was complete once, and what has become of it since the checksums tell. Whoever resumes takes the newest that verifies.
//
// A rank's file holds, of a tensor NAME, its elements [first, first + count) of the share that it has of the whole tensor (core/params.h). Where these lie
// the file's metadata says under NAME. The bytes are those on the device: codes as they are, with their scales beside them:
//     NAME.weight, .master, .m, .v                   codes. (rows, cols) where the rank has all of them, else (count); UE5M3 as U8. No weight that is scaled by block: it follows
//                                                    from its master
//     NAME.master.slot, …                            (4) {descale, scale, descale before, 0} of a tensor that has one scale
//     NAME.master.exponents, …                       codes are values · 2^exponent: one for each 128 elements
// Ranks that hold the same values have one of them write.
//
// Saving: what a rank writes is copied to host memory at once, and a thread hashes and writes it while training goes on. Only one save is under way at a
// time: the next one waits for it. Where there is no room for a copy, training waits and the device is read piece by piece. At every step the ranks
// tell each other how far they are; when all are done the first rank gives the folder its name. What fails is reported, and training goes on.
// A state with a value that is not finite is not saved.
#pragma once
#include "collectives.cuh"
#include "params.h"
#include "safetensors.h"
#include <atomic>
#include <thread>
#define XXH_INLINE_ALL
#include <xxhash.h>

constexpr size_t CHECKPOINT_CHUNK = (size_t)8 << 20;  // bytes hashed and written at a time
static const char* const CHECKSUMS = "checksums.xxh128";

// ---- files and folders ----

static inline std::string checkpoint_name(int64_t step) {
    char text[40];
    snprintf(text, sizeof(text), "step_%08" PRId64, step);
    return text;
}
static inline std::string rank_file(int rank) {
    char text[40];
    snprintf(text, sizeof(text), "rank_%05d.safetensors", rank);
    return text;
}
// The step that a folder's name tells; -1: it is no checkpoint's
static inline int64_t checkpoint_step(const char* name) {
    if (strncmp(name, "step_", 5) != 0 || strspn(name + 5, "0123456789") != strlen(name + 5) || strlen(name) > 20) { return -1; }
    int64_t step = strtoll(name + 5, NULL, 10);
    return checkpoint_name(step) == name ? step : -1;
}

static inline std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    names_in_folder(&names, folder);  // of a folder that is not there: none
    return names;
}

// Steps of the checkpoints in a folder, the newest first
static inline std::vector<int64_t> checkpoints_in(const std::string& folder) {
    std::vector<int64_t> steps;
    for (const std::string& name : names_in(folder)) {
        int64_t step = checkpoint_step(name.c_str());
        if (step >= 0) { steps.push_back(step); }
    }
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

// What a save or a removal that was killed has left
static inline void remove_unfinished(const std::string& folder) {
    for (const std::string& name : names_in(folder)) {
        size_t dot = name.rfind('.');
        if (dot == std::string::npos || checkpoint_step(name.substr(0, dot).c_str()) < 0) { continue; }
        if (name.substr(dot) == ".tmp" || name.substr(dot) == ".old") { remove_folder(folder + "/" + name); }
    }
}

static inline std::string error_text(int error, const std::string& path) { return error == 0 ? "" : path + ": " + error_of(error); }

// A file of these bytes, on the disk when this returns; or why not
static inline std::string write_text(const std::string& path, const std::string& text) {
    int fd = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0666);
    if (fd < 0) { return path + ": " + strerror(errno); }
    int error = write_fully(fd, text.data(), text.size());
    if (error == 0 && fsync(fd) != 0) { error = errno; }
    if (close(fd) != 0 && error == 0) { error = errno; }
    return error_text(error, path);
}

static inline std::string read_text(std::string* text, const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat status;
    std::string wrong = fd < 0 || fstat(fd, &status) != 0 ? strerror(errno) : !S_ISREG(status.st_mode) ? "it is not a file" : "";
    if (wrong.empty() && status.st_size > (off_t)1 << 28) { wrong = "it is too large"; }
    if (wrong.empty()) {
        text->assign((size_t)status.st_size, '\0');
        wrong = read_fully(fd, &(*text)[0], text->size(), 0);
    }
    if (fd >= 0) { close(fd); }
    return wrong.empty() ? "" : path + ": " + wrong;
}

// ---- checksums ----

struct Digest { char hex[33]; };

static inline Digest digest_of(XXH128_hash_t h) {
    Digest d;
    snprintf(d.hex, sizeof(d.hex), "%016" PRIx64 "%016" PRIx64, (uint64_t)h.high64, (uint64_t)h.low64);
    return d;
}
static inline Digest digest_of(const std::string& text) { return digest_of(XXH3_128bits(text.data(), text.size())); }

static inline int digest_of_file(Digest* digest, const std::string& path) {
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK), error = 0;
    if (fd < 0) { return errno; }
    XXH3_state_t* hash = XXH3_createState();
    char* buffer = (char*)host_alloc(CHECKPOINT_CHUNK);
    XXH3_128bits_reset(hash);
    for (;;) {
        ssize_t got = read(fd, buffer, CHECKPOINT_CHUNK);
        if (got < 0 && errno == EINTR) { continue; }
        if (got < 0) { error = errno; }
        if (got <= 0) { break; }
        XXH3_128bits_update(hash, buffer, (size_t)got);
    }
    *digest = digest_of(XXH3_128bits_digest(hash));
    XXH3_freeState(hash);
    free(buffer);
    close(fd);
    return error;
}

struct Checksum { std::string digest, file; };
struct TextFile { std::string text, file; };

static inline std::string checksums_text(const std::vector<Checksum>& sums) {
    std::string text;
    for (const Checksum& c : sums) { text += c.digest + "  " + c.file + "\n"; }
    return text;
}
// false: it is no such text, or lacks a line: the ranks' files come first, in their order, and config.json last
static inline bool checksums_parse(std::vector<Checksum>* sums, const std::string& text) {
    size_t at = 0;
    while (at < text.size()) {
        size_t end = text.find('\n', at);
        if (end == std::string::npos || end - at < 35 || text.compare(at + 32, 2, "  ") != 0) { return false; }
        Checksum c = {text.substr(at, 32), text.substr(at + 34, end - at - 34)};
        if (c.digest.find_first_not_of("0123456789abcdef") != std::string::npos || c.file.find('/') != std::string::npos || c.file[0] == '.') { return false; }
        for (const Checksum& other : *sums) {
            if (other.file == c.file) { return false; }
        }
        sums->push_back(c);
        at = end + 1;
    }
    for (size_t i = 0; i < sums->size() && (*sums)[i].file.compare(0, 5, "rank_") == 0; i++) {
        if ((*sums)[i].file != rank_file((int)i)) { return false; }
    }
    return !sums->empty() && sums->front().file == rank_file(0) && sums->back().file == "config.json";
}

// ---- what a rank writes ----

struct CheckpointItem {
    std::string name;
    SafeType type;
    std::vector<int64_t> shape;
    const void* data;  // on the device
};

struct CheckpointShare {
    std::vector<CheckpointItem> items;
    std::vector<std::pair<std::string, std::string>> places;  // NAME, and where its elements are within the whole tensor
};

static inline void share_add(CheckpointShare* s, const std::string& name, SafeType type, const std::vector<int64_t>& shape, const void* data) {
    s->items.push_back(CheckpointItem{name, type, shape, data});
}

// One state of a parameter: what this rank keeps of it
static inline void share_add_state(CheckpointShare* s, const Param* p, const char* kind, DType dtype, const void* data, const float* slot, const int8_t* exponents) {
    std::string name = std::string(p->name) + "." + kind;
    int64_t n = (int64_t)p->own_count;
    bool all = p->own_count == param_elements(p);
    share_add(s, name, safe_type(dtype), all && p->rows > 1 ? std::vector<int64_t>{p->rows, p->cols} : std::vector<int64_t>{n}, data);
    if (slot != NULL) { share_add(s, name + ".slot", SAFE_FP32, {4}, slot); }
    if (exponents != NULL) { share_add(s, name + ".exponents", SAFE_I8, {ceil_div(n, (int64_t)STATE_BLOCK)}, exponents); }
}

// Where a rank's elements lie, in the metadata of its file
struct Place {
    int64_t first, count;  // of its share
    ElementMap map;        // of the share within the whole tensor
};
static inline std::string place_text(Place p) {
    char text[160];
    snprintf(text, sizeof(text), "first %" PRId64 " count %" PRId64 " run %" PRIu64 " stride %" PRIu64 " offset %" PRIu64, p.first, p.count, p.map.run, p.map.stride, p.map.first);
    return text;
}
static inline bool place_parse(Place* p, const char* text) {
    char rest;
    bool good = sscanf(text, "first %" SCNd64 " count %" SCNd64 " run %" SCNu64 " stride %" SCNu64 " offset %" SCNu64 "%c", &p->first, &p->count, &p->map.run, &p->map.stride, &p->map.first, &rest) == 5;
    const int64_t most = (int64_t)1 << 56;
    return good && p->first >= 0 && p->count >= 0 && p->first < most && p->count < most && p->map.run < (uint64_t)most && p->map.stride < (uint64_t)most && p->map.first < (uint64_t)most
        && (p->map.run == 0 || p->map.stride >= p->map.run);
}

// Is there a value in it that is not finite? The number of the first one, else -1
static inline int64_t first_not_finite(SafeType type, const void* data, size_t bytes) {
    size_t n = bytes / (size_t)safe_types[type].bytes, bad = n;
    auto look = [&](auto tag, auto wrong) {
        typedef decltype(tag) U;
        const U* x = (const U*)data;
        for (size_t at = 0; at < n; at += 4096) {  // blocks that are vectorised
            size_t end = min_of(n, at + 4096);
            bool any = false;
            for (size_t i = at; i < end; i++) { any |= wrong(x[i]); }
            if (!any) { continue; }
            for (bad = at; !wrong(x[bad]);) { bad++; }
            return;
        }
    };
    switch (type) {
        case SAFE_FP32: look(uint32_t{}, [](uint32_t u) { return (u & 0x7f800000u) == 0x7f800000u; }); break;
        case SAFE_BF16: look(uint16_t{}, [](uint16_t u) { return (u & 0x7f80u) == 0x7f80u; }); break;
        case SAFE_FP16: look(uint16_t{}, [](uint16_t u) { return (u & 0x7c00u) == 0x7c00u; }); break;
        case SAFE_E4M3: look(uint8_t{}, [](uint8_t u) { return (u & 0x7fu) == 0x7fu; }); break;
        case SAFE_E5M2: look(uint8_t{}, [](uint8_t u) { return (u & 0x7cu) == 0x7cu; }); break;
        case SAFE_UE5M3: look(uint8_t{}, [](uint8_t u) { return u == 0xffu; }); break;
        default: break;
    }
    return bad < n ? (int64_t)bad : -1;
}

// ---- saving ----

enum SaveState { SAVE_IDLE, SAVE_WRITING, SAVE_DONE, SAVE_FAILED };

// The thread that writes a rank's file
struct CheckpointWriter {
    std::string path;                  // of the file, in the folder that has no name yet
    SafeTensors file;
    std::vector<CheckpointItem> items;
    char* copy;                        // of all items' bytes, one after the other; NULL: they are read from the device
    size_t capacity;                   // of `copy`'s memory, which is kept
    char* chunk;                       // where there is no copy
    Stream stream;
    void (*gets_on)(void) = NULL;      // called for each piece that training waits for
    std::thread thread;
    std::atomic<int> state{SAVE_IDLE};
    std::atomic<uint64_t> written{0};  // bytes so far
    uint64_t bytes;                    // of the file
    Digest digest;
    double seconds;
    std::string wrong;                 // why it failed
};

// Makes the file; the digest of what it wrote, or what went wrong
static inline void checkpoint_write(CheckpointWriter* w) {
    double start = wall_seconds();
    std::string header = safetensors_header(&w->file), wrong;
    w->bytes = header.size() + w->file.bytes;
    XXH3_state_t* hash = XXH3_createState();
    XXH3_128bits_reset(hash);
    int fd = open(w->path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
    if (fd < 0) { wrong = w->path + ": " + error_of(errno); }
    auto put = [&](const void* bytes, size_t n) {
        XXH3_128bits_update(hash, bytes, n);
        int error = write_fully(fd, bytes, n);
        if (error != 0) { wrong = error_of(error); }
        w->written += n;
    };
    if (wrong.empty()) { put(header.data(), header.size()); }
    size_t at = 0;
    for (size_t i = 0; wrong.empty() && i < w->items.size(); i++) {
        const CheckpointItem* item = &w->items[i];
        size_t bytes = (size_t)(w->file.tensors[i].end - w->file.tensors[i].begin);
        for (size_t done = 0; wrong.empty() && done < bytes; done += CHECKPOINT_CHUNK) {
            size_t n = min_of(CHECKPOINT_CHUNK, bytes - done);
            const char* from = w->copy + at + done;
            if (w->copy == NULL) { copy_to_host(w->chunk, (const char*)item->data + done, n, w->stream); from = w->chunk; }
            if (w->copy == NULL && w->gets_on != NULL) { w->gets_on(); }
            int64_t bad = first_not_finite(item->type, from, n);
            if (bad >= 0) { wrong = "element " + std::to_string((int64_t)(done / (size_t)safe_types[item->type].bytes) + bad) + " of " + item->name + " is not finite, and such a state is not saved"; }
            else { put(from, n); }
        }
        at += bytes;
    }
    if (wrong.empty() && fsync(fd) != 0) { wrong = error_of(errno); }
    if (fd >= 0 && close(fd) != 0 && wrong.empty()) { wrong = error_of(errno); }
    w->digest = digest_of(XXH3_128bits_digest(hash));
    XXH3_freeState(hash);
    w->wrong = wrong;
    w->seconds = wall_seconds() - start;
    w->state = wrong.empty() ? SAVE_DONE : SAVE_FAILED;
}

// What came of a save
struct SaveOutcome {
    bool good;
    int64_t step;
    uint64_t bytes;          // of all files
    double seconds, waited;  // of the writing, by the slowest rank, and of what the first adds; what training waited for
    char wrong[600];         // why not; or what went wrong after it had its name
};

struct Checkpoints {           // of a run
    std::string folder;        // DIR
    int64_t keep;              // so many of the newest; 0: all
    size_t most_memory;        // of a rank for a copy
    Group world;               // whose exchanges are counted apart
    CheckpointWriter writer;
    int64_t step;              // of the save that is under way; -1: none is
    std::vector<TextFile> texts;  // on the first rank: the files beside the ranks'
    bool concludes;            // all ranks have written, and the first gives it its name
    SaveOutcome outcome;       // on the first rank, of the save that is under way
    int64_t last;              // step of the newest good one; -1: none
    double started, told;      // when it began; when people were told of it
    uint64_t seen;             // bytes that all ranks had written at the last look
    double waited;             // seconds that training waited for it
};

static inline void checkpoints_open(Checkpoints* c, const std::string& folder, int64_t keep, size_t most_memory, const Group* world) {
    c->folder = folder;
    c->keep = keep;
    c->most_memory = most_memory;
    c->world = group_share(world);
    c->step = c->last = -1;
    c->concludes = false;
    c->writer.copy = c->writer.chunk = NULL;
    c->writer.capacity = 0;
    if (world->rank == 0) { remove_unfinished(folder); }
}

static inline void writer_release(CheckpointWriter* w) {
    if (w->copy != NULL) { pinned_free(w->copy); }
    free(w->chunk);
    w->copy = w->chunk = NULL;
    w->capacity = 0;
}

static inline std::string unfinished_folder(const Checkpoints* c) { return c->folder + "/" + checkpoint_name(c->step) + ".tmp"; }

// Begins to save the state that is on the device now. All ranks call it, when no save is under way. `texts`: on the first rank, the files beside the ranks'.
// Returns at once, or when this rank's file is written where a copy of it has no room.
static inline void checkpoint_begin(Checkpoints* c, int64_t step, const CheckpointShare& share, const std::vector<TextFile>& texts, Stream s) {
    CheckpointWriter* w = &c->writer;
    c->started = c->told = wall_seconds();
    c->seen = 0;
    c->step = step;
    c->texts = texts;
    std::string folder = unfinished_folder(c);
    char refused[320] = "";
    if (c->world.rank == 0) {
        remove_folder(folder);
        if (mkdir(folder.c_str(), 0777) != 0) { snprintf(refused, sizeof(refused), "%.120s: %s", folder.c_str(), error_of(errno).c_str()); }
    }
    host_broadcast(&c->world, refused, sizeof(refused), 0);
    w->path = folder + "/" + rank_file(c->world.rank);
    w->file = SafeTensors{};
    w->file.metadata = share.places;
    w->items = share.items;
    w->stream = s;
    w->written = 0;
    w->bytes = 0;
    w->seconds = 0.0;
    w->digest = Digest{};
    for (const CheckpointItem& i : share.items) { safetensors_add(&w->file, i.name, i.type, i.shape); }
    if (refused[0] != '\0') {
        w->wrong = refused;
        w->state = SAVE_FAILED;
        return;
    }
    size_t bytes = (size_t)w->file.bytes;
    w->state = SAVE_WRITING;
    if (w->capacity < bytes) {
        if (w->copy != NULL) { pinned_free(w->copy); }
        bool room = bytes <= c->most_memory && bytes < host_memory_free(c->world.ranks_per_device);
        w->copy = room ? (char*)pinned_alloc_or_null(bytes) : NULL;
        w->capacity = w->copy != NULL ? bytes : 0;
    }
    if (w->copy != NULL) {
        size_t at = 0;
        for (size_t i = 0; i < w->items.size(); i++) {
            size_t n = (size_t)(w->file.tensors[i].end - w->file.tensors[i].begin);
            copy_to_pinned(w->copy + at, w->items[i].data, n, s);
            at += n;
        }
        stream_sync(s);
        w->thread = thread_started([=] { checkpoint_write(w); });
    } else {
        if (w->chunk == NULL) { w->chunk = (char*)host_alloc(CHECKPOINT_CHUNK); }
        checkpoint_write(w);
    }
    c->waited = wall_seconds() - c->started;
}

// On the first rank, when all files of the ranks are there: the others, and the name. What went wrong, or ""; `named`: the checkpoint is there all the same
static inline std::string checkpoint_commit(bool* named, Checkpoints* c, const std::vector<Checksum>& ranks) {
    std::string folder = unfinished_folder(c), name = checkpoint_name(c->step), target = c->folder + "/" + name, wrong;
    std::vector<Checksum> sums = ranks;
    for (const TextFile& t : c->texts) {
        wrong = write_text(folder + "/" + t.file, t.text);
        if (!wrong.empty()) { return wrong; }
        sums.push_back(Checksum{digest_of(t.text).hex, t.file});
    }
    wrong = write_text(folder + "/" + CHECKSUMS, checksums_text(sums));
    if (wrong.empty()) { wrong = error_text(sync_folder(folder), folder); }
    if (!wrong.empty()) { return wrong; }
    std::string old = target + ".old";
    if (rename(target.c_str(), old.c_str()) != 0 && errno != ENOENT) { return target + ": " + strerror(errno); }
    if (rename(folder.c_str(), target.c_str()) != 0) {
        wrong = target + ": " + strerror(errno);
        (void)!rename(old.c_str(), target.c_str());  // what was there stays
        return wrong;
    }
    *named = true;
    wrong = error_text(sync_folder(c->folder), c->folder);
    if (!wrong.empty()) { return wrong; }
    wrong = write_text(c->folder + "/latest.tmp", name + "\n");
    if (wrong.empty() && rename((c->folder + "/latest.tmp").c_str(), (c->folder + "/latest").c_str()) != 0) { wrong = c->folder + "/latest: " + strerror(errno); }
    if (wrong.empty()) { wrong = error_text(sync_folder(c->folder), c->folder); }
    if (!wrong.empty()) { return wrong; }
    remove_folder(old);
    std::vector<int64_t> steps = checkpoints_in(c->folder);
    int64_t kept = 0;
    for (int64_t step : steps) {
        if (step > c->step) { continue; }  // of a run that was further, and has gone back: not ours to judge
        if (c->keep > 0 && kept++ >= c->keep) {
            std::string path = c->folder + "/" + checkpoint_name(step);
            if (rename(path.c_str(), (path + ".old").c_str()) == 0) { remove_folder(path + ".old"); }
        }
    }
    return "";
}

// What each rank tells the others of its part of a save
struct SaveStatus {
    int state;
    uint64_t bytes;
    double seconds;
    Digest digest;
    char wrong[400];
};

// Waits for this rank's thread
static inline void writer_join(CheckpointWriter* w) {
    if (w->thread.joinable()) { w->thread.join(); }
}

// When all ranks have written, or failed: all call it. The first rank's thread gives the checkpoint its name, or removes what there is of it
static inline void checkpoint_conclude(Checkpoints* c) {
    CheckpointWriter* w = &c->writer;
    writer_join(w);
    SaveStatus mine = {w->state, w->bytes, w->seconds, w->digest, ""};
    snprintf(mine.wrong, sizeof(mine.wrong), "%s", w->wrong.c_str());
    std::vector<SaveStatus> all((size_t)c->world.size);
    host_all_gather(&c->world, all.data(), &mine, sizeof(mine));
    c->concludes = true;
    if (c->world.rank != 0) { return; }
    std::vector<Checksum> sums;
    std::string wrong;
    c->outcome = SaveOutcome{};
    c->outcome.step = c->step;
    for (int r = 0; r < c->world.size; r++) {
        const SaveStatus* s = &all[(size_t)r];
        sums.push_back(Checksum{s->digest.hex, rank_file(r)});
        c->outcome.bytes += s->bytes;
        c->outcome.seconds = max_of(c->outcome.seconds, s->seconds);
        if (s->state != SAVE_DONE && wrong.empty()) { wrong = (c->world.size > 1 ? "rank " + std::to_string(r) + ": " : "") + s->wrong; }
    }
    w->state = SAVE_WRITING;
    w->thread = thread_started([=] {
        double start = wall_seconds();
        bool named = false;
        std::string failed = wrong.empty() ? checkpoint_commit(&named, c, sums) : wrong;
        if (!named) { remove_folder(unfinished_folder(c)); }
        c->outcome.good = named;
        c->outcome.seconds += wall_seconds() - start;
        snprintf(c->outcome.wrong, sizeof(c->outcome.wrong), "%s", failed.c_str());
        w->state = SAVE_DONE;
    });
}

// When that is done too: all call it, and know what came of it
static inline SaveOutcome checkpoint_outcome(Checkpoints* c) {
    CheckpointWriter* w = &c->writer;
    writer_join(w);
    c->outcome.waited = c->waited;
    SaveOutcome outcome = c->outcome;
    host_broadcast(&c->world, &outcome, sizeof(outcome), 0);
    if (outcome.good) { c->last = outcome.step; }
    c->step = -1;
    c->concludes = false;
    c->texts.clear();
    w->items.clear();
    w->state = SAVE_IDLE;
    return outcome;
}

static inline void checkpoints_close(Checkpoints* c) {
    writer_release(&c->writer);
    group_free(&c->world);
}
