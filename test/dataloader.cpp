// Tests of dataloader.h. Tokens of the test data say where they stand (file * 100000 + offset), so that what comes back can be traced. The
// oracles restate the rules by brute force or in integers; the golden orders come from a second implementation, in Python.
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>
extern "C" {
#include <cmocka.h>
}

// What a signal, a network file system or a broken disk may do to a read: interrupt it, return less than was asked for, fail.
static enum { READS_WORK, READS_FLAKY, READS_FAIL } reads = READS_WORK;
static ssize_t trying_pread(int fd, void* out, size_t bytes, off_t offset) {
    static int calls = 0;
    bool interrupted = reads == READS_FLAKY && ++calls % 3 == 0;
    if (interrupted || reads == READS_FAIL) {
        errno = interrupted ? EINTR : EIO;
        return -1;
    }
    return pread(fd, out, reads == READS_FLAKY && bytes > 1 ? 1 + bytes / 3 : bytes, offset);
}

// Counts what the loader has allocated and not freed; memory runs out after `memory_left` allocations.
static int allocations = 0, memory_left = INT32_MAX;
static bool counted(void) { return memory_left-- > 0 && ++allocations > 0; }
static void* counted_malloc(size_t bytes) { return counted() ? malloc(bytes) : NULL; }
static void* counted_realloc(void* p, size_t bytes) { return p != NULL || counted() ? realloc(p, bytes) : NULL; }
static char* counted_strdup(const char* text) { return counted() ? strdup(text) : NULL; }
static char* counted_strndup(const char* text, size_t n) { return counted() ? strndup(text, n) : NULL; }
static void counted_free(void* p) { allocations -= p != NULL; free(p); }
static int counted_glob(const char* pattern, int flags, int (*error)(const char*, int), glob_t* matches) {
    return counted() ? glob(pattern, flags, error, matches) : GLOB_NOSPACE;
}
static void counted_globfree(glob_t* matches) { allocations--; globfree(matches); }

#define pread trying_pread
#define malloc counted_malloc
#define realloc counted_realloc
#define strdup counted_strdup
#define strndup counted_strndup
#define free counted_free
#define glob counted_glob
#define globfree counted_globfree
#include "../dataloader.h"
#undef pread
#undef malloc
#undef realloc
#undef strdup
#undef strndup
#undef free
#undef glob
#undef globfree

typedef std::vector<uint32_t> Tokens;
typedef std::vector<int32_t> Window;  // T inputs, then T targets

// ---- files ----

static char folder[4096];  // made by mkdtemp; the tests run in it, so that their file names are short

static int remove_entry(const char* path, const struct stat*, int, struct FTW*) { return remove(path); }

static int enter_folder(void**) {
    const char* base = getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir;
    snprintf(folder, sizeof(folder), "%s/dataloader_XXXXXX", base);
    return mkdtemp(folder) == NULL || chmod(folder, 0755) != 0 || chdir(folder) != 0;
}

static int remove_folder(void**) { return chdir("..") != 0 || nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS) != 0; }

static void write_bytes(const char* path, const void* bytes, size_t count) {
    FILE* file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static void write_text(const char* path, const char* text) { write_bytes(path, text, strlen(text)); }

static void write_header(uint32_t* header, int bytes_per_token, uint32_t count) {
    memset(header, 0, 1024);
    header[0] = bytes_per_token == 2 ? 20240520 : 20240801;
    header[1] = bytes_per_token == 2 ? 1 : 7;
    header[2] = count;
}

// bytes_per_token 1: text; else a shard.
static void write_shard(const char* path, const Tokens& tokens, int bytes_per_token) {
    std::vector<uint8_t> bytes(bytes_per_token == 1 ? 0 : 1024);
    if (bytes_per_token > 1) { write_header((uint32_t*)bytes.data(), bytes_per_token, (uint32_t)tokens.size()); }
    for (uint32_t token : tokens) { bytes.insert(bytes.end(), (uint8_t*)&token, (uint8_t*)&token + bytes_per_token); }
    write_bytes(path, bytes.data(), bytes.size());
}

// A shard with a loss mask: bit 31 is on those that do not count.
static void write_masked(const char* path, const Tokens& tokens) {
    std::vector<uint32_t> words(256);
    write_header(words.data(), 4, (uint32_t)tokens.size());
    words[1] = 8;
    words.insert(words.end(), tokens.begin(), tokens.end());
    write_bytes(path, words.data(), words.size() * 4);
}

// A shard of n tokens start, start+1, ...
static void write_run(const char* path, int64_t n, uint32_t start, int bytes_per_token) {
    Tokens tokens;
    for (int64_t i = 0; i < n; i++) { tokens.push_back(start + (uint32_t)i); }
    write_shard(path, tokens, bytes_per_token);
}

// A shard of `count` zeros that takes no room on the disk, with some tokens set.
static void write_sparse(const char* path, int64_t count, int bytes_per_token, uint32_t header_count,
                         const std::map<int64_t, uint32_t>& set) {
    uint32_t header[256];
    write_header(header, bytes_per_token, header_count);
    int offset = bytes_per_token == 1 ? 0 : 1024;
    write_bytes(path, header, (size_t)offset);
    assert_int_equal(truncate(path, offset + count * bytes_per_token), 0);
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    for (auto& [at, token] : set) {
        assert_int_equal(pwrite(fd, &token, (size_t)bytes_per_token, offset + at * bytes_per_token), bytes_per_token);
    }
    assert_int_equal(close(fd), 0);
}

// ---- loaders ----

static DataLoaderConfig config_of(const char* spec, int seq_len) {
    DataLoaderConfig config = {};
    config.flag = "--train-data";
    config.spec = spec;
    config.vocab = 10000000;
    config.seq_len = seq_len;
    config.seed = 1337;
    config.shuffle = true;
    config.part = LOADER_ALL;
    config.ranks = 1;
    config.micro_batch = 1;
    return config;
}

static std::vector<Window> next_windows(DataLoader* loader) {
    int B = loader->config.micro_batch, T = loader->config.seq_len;
    std::vector<int32_t> inputs((size_t)(B * T), -1), targets((size_t)(B * T), -1);
    loader_next(loader, inputs.data(), targets.data());
    std::vector<Window> windows;
    for (int b = 0; b < B; b++) {
        windows.push_back(Window(inputs.begin() + b * T, inputs.begin() + (b + 1) * T));
        windows.back().insert(windows.back().end(), targets.begin() + b * T, targets.begin() + (b + 1) * T);
    }
    return windows;
}

// The next n samples of a loader of one rank and one sequence.
static std::vector<Window> take(DataLoader* loader, int64_t n) {
    std::vector<Window> windows;
    for (int64_t i = 0; i < n; i++) { windows.push_back(next_windows(loader)[0]); }
    return windows;
}

static std::vector<Window> samples_of(const DataLoaderConfig& config, int64_t n) {
    DataLoader loader;
    loader_open(&loader, &config);
    std::vector<Window> windows = take(&loader, n);
    loader_close(&loader);
    return windows;
}

// The windows of some files by the definition: while T+1 tokens are left, take them and step by T.
static std::vector<Window> windows_of(const std::vector<Tokens>& files, int T) {
    std::vector<Window> windows;
    for (const Tokens& file : files) {
        for (size_t at = 0; at + (size_t)T + 1 <= file.size(); at += (size_t)T) {
            Window window(file.begin() + (long)at, file.begin() + (long)at + T);
            window.insert(window.end(), file.begin() + (long)at + 1, file.begin() + (long)at + T + 1);
            windows.push_back(window);
        }
    }
    return windows;
}

// ---- what must be refused ----

// Runs `act` in a child; its exit status. What it wrote to stderr is left in `captured`.
static std::string captured;
template <class Act> static int status_of(Act act) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(30);  // a child that reads for ever must not outlive the test
        dup2(ends[1], 2);
        act();
        _exit(0);
    }
    close(ends[1]);
    captured.clear();
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) { captured.append(buffer, (size_t)n); }
    close(ends[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// One line with all these words.
static void assert_says(const std::vector<const char*>& words) {
    assert_int_equal(captured.find("train_gpt_fp8: "), 0);
    assert_int_equal(captured.find('\n'), captured.size() - 1);
    for (const char* word : words) {
        if (captured.find(word) == std::string::npos) { fail_msg("'%s' is missing in: %s", word, captured.c_str()); }
    }
}

static void assert_refused(const DataLoaderConfig& config, std::vector<const char*> words) {
    int status = status_of([&] { DataLoader loader; loader_open(&loader, &config); });
    if (status != 2) { fail_msg("'%s' ended with status %d instead of 2: %s", config.spec, status, captured.c_str()); }
    words.push_back("--train-data: ");
    assert_says(words);
}

// ---- windows and order ----

static void windows_start_every_T_tokens_and_targets_follow_inputs(void**) {
    for (int bytes : {1, 2, 4}) {
        for (int T : {1, 2, 3, 5, 16}) {
            for (int n = T + 1; n <= 3 * T + 2; n++) {
                Tokens tokens;
                for (int i = 0; i < n; i++) { tokens.push_back(bytes == 1 ? 'A' + (uint32_t)i : 1000u * (uint32_t)bytes + (uint32_t)i); }
                write_shard("window.data", tokens, bytes);
                DataLoaderConfig config = config_of("window.data", T);
                config.shuffle = false;
                DataLoader loader;
                loader_open(&loader, &config);
                std::vector<Window> expected = windows_of({tokens}, T);
                assert_int_equal(loader_windows(&loader), expected.size());
                assert_int_equal(loader_tokens(&loader), expected.size() * (size_t)T);
                assert_string_equal(loader_kind_name(&loader), bytes == 1 ? "text" : bytes == 2 ? "uint16 shards" : "uint32 shards");
                assert_true(take(&loader, loader_windows(&loader)) == expected);
                assert_true(next_windows(&loader)[0] == expected[0]);  // the next epoch
                loader_close(&loader);
            }
        }
    }
}

// The first tokens of the files of a spec, in order.
static std::vector<int32_t> files_of(const char* spec) {
    DataLoaderConfig config = config_of(spec, 1);
    config.shuffle = false;
    DataLoader loader;
    loader_open(&loader, &config);
    std::vector<int32_t> firsts;
    for (const Window& window : take(&loader, loader_windows(&loader))) { firsts.push_back(window[0]); }
    assert_int_equal((int)firsts.size(), loader.file_count);  // of two tokens each
    loader_close(&loader);
    return firsts;
}

static void specs_expand_in_a_fixed_order(void**) {
    assert_int_equal(mkdir("glob", 0755), 0);
    const char* names[] = {"glob/B.bin", "glob/a10.bin", "glob/a2.bin", "glob/b.bin", "glob/c,d.txt", "glob/7:e.bin", "glob/[f].bin"};
    for (uint32_t i = 0; i < 7; i++) { write_run(names[i], 2, 10 * i, 4); }
    typedef std::vector<int32_t> List;
    assert_true(files_of("glob/[a-zB]*.bin") == List({0, 10, 20, 30}));
    assert_true(files_of("glob/b.bin,glob/a*.bin,glob/B.bin") == List({30, 10, 20, 0}));
    assert_true(files_of("glob/b.bin,glob/b.bin") == List({30, 30}));
    assert_true(files_of("*/a?.bin") == List({20}));
    assert_true(files_of("glob/7:e.bin") == List({50}));  // a colon, but no number before it
    assert_true(files_of("glob/[f].bin") == List({60}));  // the file of that very name
    assert_true(files_of("2:glob/b.bin") == List({30}));  // a blend of one source
}

static void each_epoch_visits_every_window_once(void**) {
    std::vector<int64_t> sizes = {255, 256, 257, 1000, 1023, 1024, 1025, 4096, 4097, 70000};
    for (int64_t W = 1; W <= 70; W++) { sizes.push_back(W); }
    for (int64_t W : sizes) {
        for (uint64_t key : {0ull, 1ull, 0xfedcba9876543210ull}) {
            std::vector<bool> seen((size_t)W, false);
            for (int64_t i = 0; i < W; i++) {
                int64_t j = loader_permute(i, W, key);
                assert_in_range(j, 0, W - 1);
                assert_false(seen[(size_t)j]);
                seen[(size_t)j] = true;
            }
        }
    }
    // Through a loader, over files of 1, 7 and 23 windows, and tails that make no window.
    std::vector<Tokens> files(3);
    const int lengths[] = {4, 24, 70};
    for (uint32_t f = 0; f < 3; f++) {
        for (int i = 0; i < lengths[f]; i++) { files[f].push_back(f * 100000 + (uint32_t)i); }
        write_shard(std::string("epoch" + std::to_string(f) + ".bin").c_str(), files[f], 4);
    }
    std::vector<Window> all = windows_of(files, 3);
    assert_int_equal(all.size(), 1 + 7 + 23);
    DataLoaderConfig config = config_of("epoch*.bin", 3);
    DataLoader loader;
    loader_open(&loader, &config);
    std::set<std::vector<Window>> orders;
    for (int epoch = 0; epoch < 5; epoch++) {
        assert_true(loader_epochs(&loader) == epoch);
        std::vector<Window> order = take(&loader, (int64_t)all.size());
        orders.insert(order);
        std::sort(order.begin(), order.end());
        assert_true(order == all);  // the tokens ascend, so the windows are listed in sorted order
    }
    assert_int_equal(orders.size(), 5);                              // no two epochs alike
    assert_int_equal(orders.count(all), 0);                          // none in the order of the files
    loader_close(&loader);
    config.seed = 1338;
    assert_int_equal(orders.count(samples_of(config, 31)), 0);       // another seed, another order
    config.seed = 1337;
    assert_int_equal(orders.count(samples_of(config, 31)), 1);       // the same seed, the same order
}

static void the_permutation_is_fair(void**) {
    // Every permutation of 2..5 windows is about as likely as every other: within 6 standard deviations.
    const int trials = 60000;
    for (int W = 2; W <= 5; W++) {
        std::map<std::vector<int64_t>, int> counts;
        for (int epoch = 0; epoch < trials; epoch++) {
            std::vector<int64_t> order;
            for (int i = 0; i < W; i++) { order.push_back(loader_permute(i, W, mix64((uint64_t)epoch))); }
            counts[order]++;
        }
        int permutations = 1;
        for (int i = 2; i <= W; i++) { permutations *= i; }
        assert_int_equal(counts.size(), permutations);
        double mean = (double)trials / permutations;
        for (auto& [order, count] : counts) { assert_true(fabs(count - mean) < 6 * sqrt(mean)); }
    }
    // In a larger one, no image and no step from one image to the next is preferred (chi-square of 300 and 299 cells).
    const int W = 300;
    std::vector<int> images(W, 0), steps(W, 0);
    for (int epoch = 0; epoch < trials; epoch++) {
        int64_t a = loader_permute(17, W, mix64((uint64_t)epoch)), b = loader_permute(18, W, mix64((uint64_t)epoch));
        images[(size_t)a]++;
        steps[(size_t)((b - a + W) % W)]++;
    }
    double chi_images = 0, chi_steps = 0;
    for (int i = 0; i < W; i++) { chi_images += (images[(size_t)i] - 200.0) * (images[(size_t)i] - 200.0) / 200.0; }
    assert_int_equal(steps[0], 0);
    double mean = trials / 299.0;
    for (int i = 1; i < W; i++) { chi_steps += (steps[(size_t)i] - mean) * (steps[(size_t)i] - mean) / mean; }
    assert_true(chi_images < 299 + 6 * sqrt(2 * 299.0));
    assert_true(chi_steps < 298 + 6 * sqrt(2 * 298.0));
}

static void the_order_is_the_one_that_checkpoints_count_on(void**) {
    write_run("golden.bin", 11, 0, 4);
    write_run("golden2.bin", 11, 100, 4);
    typedef std::vector<int32_t> List;
    List epochs;
    for (const Window& window : samples_of(config_of("golden.bin", 1), 20)) { epochs.push_back(window[0]); }
    assert_true(epochs == List({6, 2, 8, 5, 4, 7, 1, 0, 3, 9, 8, 9, 1, 7, 3, 6, 0, 4, 2, 5}));
    List blend[2];
    std::string turns;
    for (const Window& window : samples_of(config_of("0.7:golden.bin,0.3:golden2.bin", 1), 20)) {
        turns += window[0] < 100 ? '0' : '1';
        blend[window[0] >= 100].push_back(window[0] % 100);
    }
    assert_string_equal(turns.c_str(), "01000100100100100010");
    assert_true(blend[0] == List({6, 2, 8, 5, 4, 7, 1, 0, 3, 9, 8, 9, 1, 7}));
    assert_true(blend[1] == List({5, 0, 4, 9, 3, 6}));
    uint64_t key = mix64(mix64(mix64(42) + 1) + 7);
    assert_int_equal(loader_permute(0, 1000000000000, key), 30631716157);
    assert_int_equal(loader_permute(1, 1000000000000, key), 639937205104);
    assert_int_equal(loader_permute(999999999999, 1000000000000, key), 879191392600);
}

// ---- ranks, blends, resuming ----

static void ranks_share_the_samples_of_one_rank(void**) {
    for (uint32_t f = 0; f < 3; f++) { write_run(std::string("rank" + std::to_string(f) + ".bin").c_str(), 60 + 31 * f, f * 100000, 4); }
    for (const char* spec : {"rank*.bin", "0.5:rank0.bin,0.2:rank1.bin,0.3:rank2.bin"}) {
        const int samples = 8 * 3 * 12;  // several epochs
        std::vector<Window> expected = samples_of(config_of(spec, 4), samples);
        for (int ranks = 1; ranks <= 8; ranks++) {
            for (int B = 1; B <= 3; B++) {
                std::vector<DataLoader> loaders((size_t)ranks);
                for (int rank = 0; rank < ranks; rank++) {
                    DataLoaderConfig config = config_of(spec, 4);
                    config.rank = rank;
                    config.ranks = ranks;
                    config.micro_batch = B;
                    loader_open(&loaders[(size_t)rank], &config);
                }
                std::vector<Window> together;
                while ((int)together.size() + ranks * B <= samples) {
                    for (DataLoader& loader : loaders) {
                        for (const Window& window : next_windows(&loader)) { together.push_back(window); }
                        assert_int_equal(loader.samples % (ranks * B), 0);
                    }
                }
                assert_true(std::equal(together.begin(), together.end(), expected.begin()));
                for (DataLoader& loader : loaders) { loader_close(&loader); }
            }
        }
    }
}

static void blends_give_each_source_its_share_to_within_one_sample(void**) {
    uint32_t random = 1;
    auto below = [&](uint32_t n) { random = random * 1664525 + 1013904223; return (random >> 8) % n; };
    for (uint32_t f = 0; f < LOADER_MAX_SOURCES; f++) {
        write_run(std::string("share" + std::to_string(f) + ".bin").c_str(), 3 + f % 5, f * 100000, 4);
    }
    // Weights with which taking the source that lags most would drift beyond one sample, equal and lopsided ones, then random ones.
    std::vector<std::vector<int>> cases = {{7, 3}, {1, 1}, {1, 1, 1, 1, 1, 1, 1}, {1, 999}, {999, 1, 1}, {5, 3, 2}};
    for (int i = 0; i < 300; i++) {
        std::vector<int> weights(i % 20 == 0 ? LOADER_MAX_SOURCES : 2 + below(9));
        for (int& weight : weights) { weight = 1 + (int)(below(3) == 0 ? below(200) : below(8)); }
        cases.push_back(weights);
    }
    for (const std::vector<int>& weights : cases) {
        std::string spec;
        int64_t sum = 0;
        for (size_t s = 0; s < weights.size(); s++) {
            spec += (s > 0 ? "," : "") + std::to_string(weights[s]) + ":share" + std::to_string(s) + ".bin";
            sum += weights[s];
        }
        DataLoaderConfig config = config_of(spec.c_str(), 1);
        DataLoader loader;
        loader_open(&loader, &config);
        std::vector<std::vector<int32_t>> seen(weights.size());
        for (int64_t g = 1; g <= 1000; g++) {
            Window window = next_windows(&loader)[0];
            seen[(size_t)window[0] / 100000].push_back(window[0] % 100000);
            for (size_t s = 0; s < weights.size(); s++) {
                int64_t taken = (int64_t)seen[s].size();
                assert_int_equal(loader.sources[s].taken, taken);
                assert_true(llabs(weights[s] * g - taken * sum) < sum);  // |share * g - taken| < 1
            }
        }
        // Each source has epochs of its own.
        for (size_t s = 0; s < seen.size(); s++) {
            size_t W = 2 + s % 5;
            for (size_t epoch = 0; (epoch + 1) * W <= seen[s].size(); epoch++) {
                std::set<int32_t> visited(seen[s].begin() + (long)(epoch * W), seen[s].begin() + (long)((epoch + 1) * W));
                assert_int_equal(visited.size(), W);
            }
        }
        loader_close(&loader);
    }
}

static void sources_of_a_blend_have_orders_of_their_own(void**) {
    write_run("own.bin", 51, 0, 4);
    std::vector<Window> turns = samples_of(config_of("1:own.bin,1:own.bin", 1), 100), order[2];
    for (size_t i = 0; i < turns.size(); i++) { order[i % 2].push_back(turns[i]); }
    assert_true(order[0] != order[1]);
    std::sort(order[0].begin(), order[0].end());
    std::sort(order[1].begin(), order[1].end());
    assert_true(order[0] == order[1]);
}

static void a_resumed_run_continues_as_if_it_had_not_stopped(void**) {
    write_run("resume0.bin", 30, 0, 4);
    write_run("resume1.bin", 41, 100000, 4);
    for (const char* spec : {"resume*.bin", "3:resume0.bin,1:resume1.bin"}) {
        const int64_t samples = 120;
        std::vector<Window> expected = samples_of(config_of(spec, 2), samples);
        DataLoaderConfig config = config_of(spec, 2);
        DataLoader loader;
        loader_open(&loader, &config);
        for (int64_t stop = 0; stop <= samples; stop++) {
            LoaderPosition position = loader_position(&loader);
            assert_int_equal(position.samples, stop);
            for (int ranks : {1, 3}) {  // by another process, perhaps with another number of ranks
                config.ranks = ranks;
                config.rank = ranks - 1;
                DataLoader resumed;
                loader_open(&resumed, &config);
                for (int warm = 0; warm < 3; warm++) { next_windows(&resumed); }  // wherever it stood before
                loader_seek(&resumed, &position);
                for (int64_t at = stop + ranks - 1; at < samples; at += ranks) {
                    assert_true(next_windows(&resumed)[0] == expected[(size_t)at]);
                }
                loader_close(&resumed);
            }
            next_windows(&loader);
        }
        loader_close(&loader);
    }
}

static void a_position_of_other_data_is_refused(void**) {
    write_run("seek0.bin", 31, 0, 4);
    write_run("seek1.bin", 41, 0, 4);
    DataLoader loader;
    DataLoaderConfig config = config_of("3:seek0.bin,1:seek1.bin", 2);
    loader_open(&loader, &config);
    take(&loader, 40);
    LoaderPosition position = loader_position(&loader);
    loader_close(&loader);
    struct { const char* spec; int seq_len; std::vector<const char*> words; } cases[] = {
        {"seek*.bin", 2, {"'seek*.bin' has 1 sources", "had 2"}},
        {"3:seek0.bin,1:seek1.bin", 3, {"source 1", "has 10 windows", "checkpoint 15"}},
        {"3:seek0.bin,1:seek0.bin", 2, {"source 2", "has 15 windows", "checkpoint 20"}},
        {"2:seek0.bin,1:seek1.bin", 2, {"source 1", "weight 0.666667", "30 of 40 samples"}},
    };
    for (auto& bad : cases) {
        DataLoaderConfig other = config_of(bad.spec, bad.seq_len);
        assert_int_equal(status_of([&] { DataLoader l; loader_open(&l, &other); loader_seek(&l, &position); }), 2);
        assert_says(bad.words);
    }
    position.taken[0]++;
    assert_int_equal(status_of([&] { DataLoader l; loader_open(&l, &config); loader_seek(&l, &position); }), 2);
    assert_says({"40 samples", "41"});
    position.taken[0]--;
    assert_int_equal(status_of([&] { DataLoader l; loader_open(&l, &config); loader_seek(&l, &position); }), 0);
}

// A file whose length, beginning, middle or end does not count
static void other_data_of_the_same_size_has_another_fingerprint(void**) {
    Tokens tokens;
    for (uint32_t i = 0; i < 9000; i++) { tokens.push_back(i % 251); }
    auto print = [&](const char* spec) {
        DataLoader loader;
        DataLoaderConfig config = config_of(spec, 2);
        loader_open(&loader, &config);
        uint64_t print = loader_fingerprint(&loader);
        loader_close(&loader);
        return print;
    };
    write_shard("print.txt", tokens, 1);
    uint64_t first = print("print.txt");
    assert_true(print("print.txt") == first);
    for (size_t at : {(size_t)0, (size_t)4500, (size_t)8999}) {
        tokens[at] ^= 1;
        write_shard("other.txt", tokens, 1);
        assert_true(print("other.txt") != first);
        tokens[at] ^= 1;
    }
    tokens.push_back(0);
    write_shard("other.txt", tokens, 1);
    assert_true(print("other.txt") != first);
    assert_true(print("print.txt,other.txt") != print("other.txt,print.txt"));
    write_shard("short.txt", {1, 2, 3, 4}, 1);
    assert_true(print("short.txt") != 0);
}

static void rewind_gives_the_same_windows_again(void**) {
    write_run("rewind0.bin", 30, 0, 4);
    write_run("rewind1.bin", 41, 100000, 4);
    for (bool shuffle : {false, true}) {
        DataLoaderConfig config = config_of("3:rewind0.bin,1:rewind1.bin", 2);
        config.shuffle = shuffle;
        DataLoader loader;
        loader_open(&loader, &config);
        std::vector<Window> first = take(&loader, 77);
        loader_rewind(&loader);
        assert_true(loader_epochs(&loader) == 0.0);
        assert_true(take(&loader, 77) == first);
        loader_close(&loader);
    }
}

// ---- the validation split ----

static void the_split_is_disjoint_complete_and_at_the_end_of_each_file(void**) {
    const int lengths[] = {4, 7, 100, 302};  // 1, 2, 33 and 100 windows
    for (uint32_t f = 0; f < 4; f++) { write_run(std::string("split" + std::to_string(f) + ".bin").c_str(), lengths[f], f * 100000, 4); }
    const int64_t all[] = {1, 2, 33, 100};
    for (double split : {0.001, 0.1, 0.25, 0.5, 0.99}) {
        std::set<int32_t> targets[2];
        std::map<int32_t, int32_t> last_trained, first_validated;  // of each file
        int64_t expected[2] = {0, 0};
        for (int64_t W : all) {
            int64_t val = std::max<int64_t>(1, (int64_t)floor(split * (double)W));
            expected[0] += W - val;
            expected[1] += val;
        }
        for (int part = 0; part < 2; part++) {
            DataLoaderConfig config = config_of("split*.bin", 3);
            config.val_split = split;
            config.part = part == 0 ? LOADER_TRAIN : LOADER_VAL;
            DataLoader loader;
            loader_open(&loader, &config);
            assert_int_equal(loader_windows(&loader), expected[part]);
            for (const Window& window : take(&loader, expected[part])) {
                int32_t file = window[3] / 100000;
                for (int i = 3; i < 6; i++) { assert_true(targets[part].insert(window[(size_t)i]).second); }
                if (part == 0) { last_trained[file] = std::max(last_trained[file], window[5]); }
                if (part == 1) { first_validated[file] = std::min(first_validated.emplace(file, window[3]).first->second, window[3]); }
            }
            loader_close(&loader);
        }
        assert_int_equal(targets[0].size() + targets[1].size(), 136 * 3);  // together all windows, without a gap
        for (int32_t target : targets[0]) { assert_int_equal(targets[1].count(target), 0); }
        assert_int_equal(first_validated.size(), 4);  // every file validates
        for (auto& [file, target] : last_trained) { assert_int_equal(first_validated[file], target + 1); }
    }
    // Without a split, training sees everything; LOADER_ALL ignores it.
    DataLoader loader;
    DataLoaderConfig config = config_of("split*.bin", 3);
    config.part = LOADER_TRAIN;
    loader_open(&loader, &config);
    assert_int_equal(loader_windows(&loader), 136);
    loader_close(&loader);
    config.part = LOADER_ALL;
    config.val_split = 0.5;
    loader_open(&loader, &config);
    assert_int_equal(loader_windows(&loader), 136);
    loader_close(&loader);
}

// ---- large files, many files, bad reads ----

static void shards_beyond_2_and_4_GiB_are_read_right(void**) {
    struct { int64_t count; int bytes; } cases[] = {
        {((int64_t)1 << 30) + 20000, 2}, // beyond 2 GiB; the count fits
        {((int64_t)1 << 31) + 5, 2},     // beyond 4 GiB; the count does not fit int32
        {((int64_t)1 << 32) + 3, 2},     // the count does not fit uint32: the header says 3
        {((int64_t)1 << 31) + 9, 4},     // beyond 8 GiB
        {((int64_t)1 << 32) + 12345, 1}  // text
    };
    for (auto& c : cases) {
        const int T = 4096;
        int64_t last = (c.count - 1) / T * T;                                               // the last target
        int64_t wrap = (((int64_t)1 << 31) - (c.bytes == 1 ? 0 : 1024)) / c.bytes / T * T;  // the window with the byte 2^31
        std::map<int64_t, uint32_t> set = {{0, 11}, {1, 12}, {last - T, 13}, {last - 1, 14}, {last, 15}, {wrap + 1, 16}, {wrap + T, 17}};
        if (c.count - 1 > last) { set[c.count - 1] = 18; }
        write_sparse("large.data", c.count, c.bytes, (uint32_t)c.count, set);
        DataLoaderConfig config = config_of("large.data", T);
        config.vocab = c.bytes == 4 ? 50257 : 65536;
        config.shuffle = false;
        DataLoader loader;
        loader_open(&loader, &config);
        int64_t W = (c.count - 1) / T;
        assert_int_equal(loader_windows(&loader), W);
        Window first = next_windows(&loader)[0];
        assert_true(first[0] == 11 && first[1] == 12 && first[2] == 0 && first[T] == 12);
        LoaderPosition position = loader_position(&loader);
        position.samples = position.taken[0] = wrap / T;
        loader_seek(&loader, &position);
        Window middle = next_windows(&loader)[0];
        assert_true(middle[0] == 0 && middle[1] == 16 && middle[T] == 16 && middle[2 * T - 1] == 17);
        position.samples = position.taken[0] = W - 1;
        loader_seek(&loader, &position);
        Window end = next_windows(&loader)[0];
        assert_true(end[0] == 13 && end[T - 1] == 14 && end[2 * T - 2] == 14 && end[2 * T - 1] == 15);
        assert_true(next_windows(&loader)[0] == first);
        loader_close(&loader);
        if (c.bytes > 1) {  // a count that is wrong in its low bits is no overflow
            write_sparse("large.bin", c.count, c.bytes, (uint32_t)c.count + 1, {});
            config.spec = "large.bin";
            assert_refused(config, {"large.bin", "truncated or damaged"});
        }
        unlink("large.data");
    }
    unlink("large.bin");
}

static int open_descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) { count += fcntl(fd, F_GETFD) != -1; }
    return count;
}

static void many_files_need_few_descriptors_and_close_frees_all(void**) {
    assert_int_equal(mkdir("many", 0755), 0);
    std::vector<Window> expected;
    for (uint32_t f = 0; f < 300; f++) {
        char path[64];
        snprintf(path, sizeof(path), "many/%03u.bin", f);
        write_run(path, 3, f * 100, 4);
        expected.push_back({(int32_t)f * 100, (int32_t)f * 100 + 1});
        expected.push_back({(int32_t)f * 100 + 1, (int32_t)f * 100 + 2});
    }
    int before = open_descriptors();
    allocations = 0;
    DataLoaderConfig config = config_of("many/*.bin", 1);
    DataLoader loader;
    loader_open(&loader, &config);
    std::vector<Window> epoch;
    for (int i = 0; i < 600; i++) {
        epoch.push_back(next_windows(&loader)[0]);
        if (i % 100 == 0) { assert_in_range(open_descriptors(), before + 1, before + LOADER_MAX_OPEN); }
    }
    std::sort(epoch.begin(), epoch.end());
    assert_true(epoch == expected);
    for (int f = 0; f < loader.file_count; f++) {
        if (loader.files[f].fd >= 0) { assert_int_equal(fcntl(loader.files[f].fd, F_GETFD), FD_CLOEXEC); }
    }
    assert_true(allocations > 300);
    loader_close(&loader);
    assert_int_equal(allocations, 0);
    assert_int_equal(open_descriptors(), before);
}

static void short_and_interrupted_reads_are_continued(void**) {
    write_run("flaky0.bin", 500, 0, 4);
    write_run("flaky1.bin", 700, 100000, 4);
    std::vector<Window> expected = samples_of(config_of("flaky*.bin", 64), 40);
    reads = READS_FLAKY;
    std::vector<Window> got = samples_of(config_of("flaky*.bin", 64), 40);
    reads = READS_WORK;
    assert_true(got == expected);
}

static void a_file_that_fails_shrinks_or_goes_during_the_run_ends_it(void**) {
    write_run("shrinks.bin", 101, 0, 4);
    DataLoaderConfig config = config_of("shrinks.bin", 50);
    config.shuffle = false;
    int status = status_of([&] {
        DataLoader loader;
        loader_open(&loader, &config);
        take(&loader, 1);
        reads = READS_FAIL;
        take(&loader, 1);
    });
    assert_int_equal(status, 1);
    assert_says({"reading shrinks.bin at byte 1224 failed: Input/output error"});
    status = status_of([&] {
        DataLoader loader;
        loader_open(&loader, &config);
        if (truncate("shrinks.bin", 1024 + 40 * 4) != 0) { _exit(77); }
        take(&loader, 2);
    });
    assert_int_equal(status, 1);
    assert_says({"shrinks.bin", "ends at byte", "cut while in use"});
    for (uint32_t f = 0; f < LOADER_MAX_OPEN + 1; f++) { write_run(std::string("goes" + std::to_string(f) + ".bin").c_str(), 3, 0, 4); }
    config = config_of("goes*.bin", 2);
    config.shuffle = false;
    status = status_of([&] {
        DataLoader loader;
        loader_open(&loader, &config);
        for (uint32_t f = 0; f < LOADER_MAX_OPEN + 1; f++) { unlink(std::string("goes" + std::to_string(f) + ".bin").c_str()); }
        take(&loader, LOADER_MAX_OPEN + 1);
    });
    assert_int_equal(status, 1);
    assert_says({"goes", "cannot be opened any more: No such file"});
}

static void running_out_of_memory_ends_the_run(void**) {
    write_run("memory.bin", 10, 0, 4);
    DataLoaderConfig config = config_of("memory*.bin", 1);
    int needed = 0;  // one by one: the entry, the list of matches, the list of files, the path, two buffers
    for (; needed < 100; needed++) {
        int status = status_of([&] { memory_left = needed; DataLoader loader; loader_open(&loader, &config); });
        if (status == 0) { break; }
        assert_int_equal(status, 1);
        assert_says({"out of host memory"});
    }
    assert_int_equal(needed, 6);
}

// ---- vocabulary ----

static void the_vocabulary_is_derived_or_given(void**) {
    write_shard("vocab.bin", {0, 50256, 3}, 2);
    write_text("vocab.txt", "abc\xff");
    struct { const char* spec; int64_t given, found; } cases[] = {
        {"vocab.bin", 0, 50257}, {"vocab.bin", 100000, 100000}, {"vocab.txt", 0, 256}, {"vocab.txt", 300, 300}};
    for (auto& c : cases) {
        DataLoaderConfig config = config_of(c.spec, 1);
        config.vocab = c.given;
        DataLoader loader;
        loader_open(&loader, &config);
        assert_int_equal(loader.vocab, c.found);
        loader_close(&loader);
    }
    write_run("vocab32.bin", 10, 0, 4);
    DataLoaderConfig config = config_of("vocab32.bin", 1);
    config.vocab = 0;
    assert_refused(config, {"vocab32.bin", "uint32", "--vocab N is required"});
}

static void tokens_outside_the_vocabulary_are_refused(void**) {
    DataLoaderConfig config = config_of("good.bin,outside.bin", 1);
    write_shard("good.bin", {1, 2, 3}, 2);
    write_shard("outside.bin", {0, 50256, 50257}, 2);
    config.vocab = 0;
    assert_refused(config, {"outside.bin", "offset 2 is 50257", "vocabulary of 50257", "0 to 50256", "--vocab"});
    config.vocab = 50258;
    DataLoader loader;
    loader_open(&loader, &config);
    loader_close(&loader);
    write_text("outside.txt", "abcz");
    config.spec = "outside.txt";
    config.vocab = 'z';
    assert_refused(config, {"outside.txt", "offset 3 is 122"});
    config.vocab = 'z' + 1;
    loader_open(&loader, &config);
    loader_close(&loader);
    for (uint32_t token : {2147483647u, 2147483648u, 4294967295u}) {  // as int32 the latter two would be negative
        write_shard("outside.bin", {0, 1, token}, 4);
        config.spec = "outside.bin";
        config.vocab = 2147483647;
        assert_refused(config, {"outside.bin", ("offset 2 is " + std::to_string(token)).c_str()});
    }
}

static void tokens_beyond_the_scan_are_checked_when_they_are_read(void**) {
    // The budget covers the first file and the second up to its token `reach`.
    const int64_t reach = 12345, first = LOADER_SCAN_TOKENS - reach;
    write_sparse("scan0.bin", first, 2, (uint32_t)first, {});
    DataLoaderConfig config = config_of("scan0.bin,scan1.bin", 100);
    config.vocab = 60000;
    config.shuffle = false;
    write_sparse("scan1.bin", 20000, 2, 20000, {{reach - 1, 65000}});
    assert_refused(config, {"scan1.bin", "offset 12344 is 65000"});
    write_sparse("scan1.bin", 20000, 2, 20000, {{reach, 60000}});
    int status = status_of([&] {
        DataLoader loader;
        loader_open(&loader, &config);
        LoaderPosition position = loader_position(&loader);
        position.samples = position.taken[0] = (first - 1) / 100 + reach / 100 - 1;
        loader_seek(&loader, &position);
        take(&loader, 1);
        fprintf(stderr, "opened;");
        take(&loader, 1);
    });
    assert_int_equal(status, 2);
    assert_int_equal(captured.find("opened;"), 0);
    captured.erase(0, strlen("opened;"));
    assert_says({"scan1.bin", "offset 12345 is 60000"});
    unlink("scan0.bin");
}

// ---- loss mask ----

// The same windows in the same order as without a mask, but for targets; in inputs nothing shows. Shards with and without a mask mix.
static void a_mask_takes_targets_out_and_changes_nothing_else(void**) {
    const uint32_t bit = 1u << 31;
    for (int T : {1, 3, 16}) {
        Tokens plain[2], masked[2];
        for (int f = 0; f < 2; f++) {
            for (uint32_t i = 0; i < 200; i++) {
                uint32_t token = (uint32_t)f * 100000 + i;
                plain[f].push_back(token);
                bool counts = i % 7 < 3 || i == 199;
                masked[f].push_back(counts ? token : token | bit);
            }
        }
        masked[0][0] = bit;  // token 0, which as an input is 0
        for (int f = 0; f < 2; f++) { write_shard(f == 0 ? "p0.bin" : "p1.bin", plain[f], 4); }
        write_masked("m0.bin", masked[0]);
        write_masked("m1.bin", masked[1]);
        write_masked("all0.bin", plain[0]);  // version 8 in which everything counts
        for (const char* spec : {"m0.bin,m1.bin", "m0.bin,p1.bin", "p0.bin,m1.bin", "0.3:m0.bin,0.7:p1.bin", "all0.bin,p1.bin"}) {
            std::string without = spec;
            for (const char* name : {"m0", "m1", "all0"}) {
                size_t at = without.find(name);
                if (at != std::string::npos) { without.replace(at, strlen(name), name[strlen(name) - 1] == '0' ? "p0" : "p1"); }
            }
            int64_t n = 2 * (399 / T);
            std::vector<Window> want = samples_of(config_of(without.c_str(), T), n), found = samples_of(config_of(spec, T), n);
            bool in_mask[2] = {strstr(spec, "m0") != NULL, strstr(spec, "m1") != NULL};
            int64_t taken_out = 0;
            for (int64_t w = 0; w < n; w++) {
                for (int i = T; i < 2 * T; i++) {
                    int32_t* token = &want[(size_t)w][(size_t)i];
                    int f = *token / 100000;
                    if (in_mask[f] && (masked[f][(size_t)(*token % 100000)] & bit) != 0) { *token = -1; taken_out++; }
                }
            }
            if (found != want) { fail_msg("%s, windows of %d", spec, T); }
            assert_int_equal(taken_out > 0, in_mask[0] || in_mask[1]);
        }
    }
    DataLoader loader;
    DataLoaderConfig config = config_of("m0.bin", 4);
    loader_open(&loader, &config);
    assert_string_equal(loader_kind_name(&loader), "uint32 shards with a loss mask");
    assert_int_equal(loader_tokens(&loader), 196);  // data is counted in tokens, whether they count in the loss or not
    loader_close(&loader);
    config = config_of("p0.bin", 4);
    loader_open(&loader, &config);
    assert_string_equal(loader_kind_name(&loader), "uint32 shards");
    loader_close(&loader);
}

// The vocabulary is that of the tokens without their bits, which only version 8 may have.
static void masked_tokens_outside_the_vocabulary_are_refused(void**) {
    const uint32_t bit = 1u << 31;
    write_masked("outside.bin", {1 | bit, 2, 300 | bit, 3, 4});
    DataLoaderConfig config = config_of("outside.bin", 2);
    config.vocab = 300;
    assert_refused(config, {"outside.bin", "offset 2 is 300;", "0 to 299"});
    config.vocab = 301;
    std::vector<Window> windows = samples_of(config, 2);
    assert_true(std::count(windows.begin(), windows.end(), Window({1, 2, 2, -1})) == 1);
    assert_true(std::count(windows.begin(), windows.end(), Window({300, 3, 3, 4})) == 1);
    config.vocab = INT32_MAX;  // the largest that there is
    write_masked("outside.bin", {~0u, 2, 3});
    assert_refused(config, {"offset 0 is 2147483647;"});
    write_masked("outside.bin", {~1u, ~1u, ~1u});
    assert_true(samples_of(config, 1)[0] == Window({INT32_MAX - 1, INT32_MAX - 1, -1, -1}));
    config.vocab = 0;
    assert_refused(config, {"outside.bin", "uint32", "--vocab N is required"});
    write_shard("outside.bin", {1, 2 | bit, 3}, 4);
    config.vocab = 300;
    assert_refused(config, {"offset 1 is 2147483650;"});
}

// ---- bad input ----

static void wrong_files_are_refused(void**) {
    uint32_t header[258] = {0};
    write_run("ok.bin", 100, 0, 2);
    write_run("ok32.bin", 100, 0, 4);
    write_text("ok.txt", "all work and no play makes jack a dull boy");
    write_text("empty.bin", "");
    write_text("empty.txt", "");
    write_shard("none.bin", {}, 2);
    write_text("a.bin", "a");
    write_text("text.bin", "no magic here");
    assert_int_equal(mkdir("folder", 0755), 0);
    assert_int_equal(mkfifo("pipe.bin", 0644), 0);
    assert_int_equal(symlink("nowhere", "dangling.bin"), 0);
    struct { const char* path; uint32_t magic, version, count; size_t bytes; } shards[] = {
        {"short.bin", 20240520, 1, 3, 1028},   {"odd.bin", 20240520, 1, 2, 1029},     {"long.bin", 20240520, 1, 2, 1030},
        {"short32.bin", 20240801, 7, 2, 1028}, {"head.bin", 20240520, 1, 2, 1023},    {"magic.bin", 20240520, 1, 2, 4},
        {"version.bin", 20240520, 2, 2, 1028}, {"llama.bin", 20240801, 1, 1, 1028},   {"eval.bin", 20240522, 1, 2, 1028},
        {"masked16.bin", 20240520, 8, 2, 1028}, {"nine.bin", 20240801, 9, 1, 1028},   {"short8.bin", 20240801, 8, 2, 1028},
        {"model.bin", 20240326, 3, 2, 1028},   {"tokens.bin", 20240328, 2, 2, 1028},  {"eval", 20240522, 1, 2, 1028},
    };
    for (auto& shard : shards) {
        header[0] = shard.magic;
        header[1] = shard.version;
        header[2] = shard.count;
        write_bytes(shard.path, header, shard.bytes);
    }
    struct { const char* spec; std::vector<const char*> words; } cases[] = {
        {"missing.bin", {"missing.bin", "No such file", "allowed"}},
        {"ok.bin,missing.bin", {"missing.bin", "No such file"}},
        {"missing*.bin", {"'missing*.bin' matches no file", "allowed"}},
        {"nofolder/*.bin", {"'nofolder/*.bin' matches no file: there is no folder 'nofolder', but this folder is there"}},
        {"dangling*.bin", {"dangling.bin cannot be read: No such file"}},
        {"folder", {"folder is a folder", "allowed"}},
        {"pipe.bin", {"pipe.bin is a pipe", "allowed"}},
        {"empty.bin", {"empty.bin is empty"}},
        {"empty.txt", {"empty.txt is empty"}},
        {"none.bin", {"none.bin is empty", "0 tokens"}},
        {"a.bin", {"a.bin has the magic number 0"}},
        {"text.bin", {"text.bin has the magic number 1830842222", "20240520", "20240801"}},
        {"short.bin", {"short.bin is truncated", "1028 bytes", "3 tokens", "1030"}},
        {"odd.bin", {"odd.bin is truncated or damaged", "1029 bytes", "1028"}},
        {"long.bin", {"long.bin is truncated or damaged", "1030 bytes", "2 tokens", "1028"}},
        {"short32.bin", {"short32.bin is truncated", "1028 bytes", "1032"}},
        {"head.bin", {"head.bin is truncated", "1023 bytes", "1024"}},
        {"magic.bin", {"magic.bin is truncated", "4 bytes"}},
        {"version.bin", {"version.bin has version 2", "magic 20240520: 1"}},
        {"llama.bin", {"llama.bin has version 1", "magic 20240801: 7, and 8 with a loss mask"}},
        {"nine.bin", {"nine.bin has version 9", "magic 20240801: 7, and 8 with a loss mask"}},
        {"masked16.bin", {"masked16.bin has version 8", "magic 20240520: 1"}},
        {"short8.bin", {"short8.bin is truncated", "1028 bytes", "1032"}},
        {"eval.bin", {"eval.bin is a multiple-choice file", "20240522"}},
        {"eval", {"eval is a multiple-choice file"}},
        {"model.bin", {"model.bin is a model file", "20240326"}},
        {"tokens.bin", {"tokens.bin is a tokenizer file", "20240328"}},
        {"ok.bin,ok.txt", {"ok.bin is uint16 tokens", "ok.txt is text", "one kind"}},
        {"ok.txt,ok.bin", {"ok.txt is text", "ok.bin is uint16 tokens"}},
        {"1:ok.bin,2:ok32.bin", {"ok.bin is uint16 tokens", "ok32.bin is uint32 tokens"}},
    };
    for (auto& bad : cases) { assert_refused(config_of(bad.spec, 1), bad.words); }
    chmod("ok.txt", 0);
    DataLoaderConfig config = config_of("ok.txt", 1);
    int status = status_of([&] {
        if (geteuid() == 0 && seteuid(65534) != 0) { _exit(77); }  // root may read everything
        DataLoader loader;
        loader_open(&loader, &config);
    });
    assert_int_equal(status, 2);
    assert_says({"ok.txt cannot be read: Permission denied"});
}

static void wrong_specs_and_values_are_refused(void**) {
    write_run("spec.bin", 101, 0, 2);
    write_run("spec2.bin", 101, 0, 2);
    struct { const char* spec; std::vector<const char*> words; } specs[] = {
        {"", {"''", "empty entry"}},
        {"spec.bin,", {"'spec.bin,'", "empty entry"}},
        {",spec.bin", {"empty entry"}},
        {"spec.bin,,spec2.bin", {"empty entry"}},
        {"1:", {"'1:'", "empty entry"}},
        {"0:spec.bin", {"'0:spec.bin' is 0", "above 0"}},
        {"-0.5:spec.bin,1.5:spec2.bin", {"'-0.5:spec.bin' is -0.5", "above 0"}},
        {"nan:spec.bin", {"is nan", "above 0"}},
        {"0.1:spec.bin,inf:spec2.bin", {"'inf:spec2.bin' is inf", "1e9"}},
        {"1e400:spec.bin", {"is inf"}},
        {"1e10:spec.bin", {"is 1e+10", "1e9"}},
        {"0.7:spec.bin,spec2.bin", {"'0.7:spec.bin,spec2.bin'", "all or none"}},
        {"spec.bin,0.3:spec2.bin", {"all or none"}},
        {"heavy:spec.bin", {"heavy:spec.bin cannot be read"}},
    };
    for (auto& bad : specs) { assert_refused(config_of(bad.spec, 1), bad.words); }
    std::string many = "1:spec.bin";
    for (int i = 1; i < LOADER_MAX_SOURCES; i++) { many += ",1:spec.bin"; }
    assert_int_equal(samples_of(config_of(many.c_str(), 1), 1).size(), 1);
    many += ",1:spec.bin";
    assert_refused(config_of(many.c_str(), 1), {"more weighted entries", "64"});

    assert_refused(config_of("spec.bin", 101), {"spec.bin has 101 tokens", "--seq-len 101 needs at least 102"});
    assert_int_equal(samples_of(config_of("spec.bin", 100), 1).size(), 1);  // fits exactly
    DataLoaderConfig config = config_of("spec*.bin", 10);  // 20 windows
    config.ranks = 3;
    config.micro_batch = 7;
    assert_refused(config, {"'spec*.bin' has 20 windows", "3 replicas x --micro-batch 7 = 21", "--seq-len"});
    config.ranks = 5;
    config.micro_batch = 4;
    assert_int_equal(samples_of(config, 1).size(), 1);
    config.part = LOADER_TRAIN;
    config.val_split = 0.1;
    assert_refused(config, {"training part", "has 18 windows", "= 20"});
    config = config_of("1:spec.bin,1:spec2.bin", 100);
    config.part = LOADER_TRAIN;
    config.val_split = 0.1;
    assert_refused(config, {"training part of '1:spec.bin' has no window of 101 tokens", "split 0.1"});
    config.part = LOADER_VAL;
    config.val_split = 0.0;
    assert_refused(config, {"validation part of '1:spec.bin'", "split 0"});
    for (double split : {-0.1, 1.0, 2.0, (double)NAN}) {
        config.val_split = split;
        assert_refused(config, {"validation split", "0 <= split < 1"});
    }
    config = config_of("spec.bin", 1);
    for (int64_t vocab : {(int64_t)-1, (int64_t)2147483648}) {
        config.vocab = vocab;
        assert_int_equal(status_of([&] { DataLoader loader; loader_open(&loader, &config); }), 2);
        assert_says({"--vocab: ", std::to_string(vocab).c_str(), "allowed"});
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(windows_start_every_T_tokens_and_targets_follow_inputs),
        cmocka_unit_test(specs_expand_in_a_fixed_order),
        cmocka_unit_test(each_epoch_visits_every_window_once),
        cmocka_unit_test(the_permutation_is_fair),
        cmocka_unit_test(the_order_is_the_one_that_checkpoints_count_on),
        cmocka_unit_test(ranks_share_the_samples_of_one_rank),
        cmocka_unit_test(blends_give_each_source_its_share_to_within_one_sample),
        cmocka_unit_test(sources_of_a_blend_have_orders_of_their_own),
        cmocka_unit_test(a_resumed_run_continues_as_if_it_had_not_stopped),
        cmocka_unit_test(a_position_of_other_data_is_refused),
        cmocka_unit_test(other_data_of_the_same_size_has_another_fingerprint),
        cmocka_unit_test(rewind_gives_the_same_windows_again),
        cmocka_unit_test(the_split_is_disjoint_complete_and_at_the_end_of_each_file),
        cmocka_unit_test(shards_beyond_2_and_4_GiB_are_read_right),
        cmocka_unit_test(many_files_need_few_descriptors_and_close_frees_all),
        cmocka_unit_test(short_and_interrupted_reads_are_continued),
        cmocka_unit_test(a_file_that_fails_shrinks_or_goes_during_the_run_ends_it),
        cmocka_unit_test(running_out_of_memory_ends_the_run),
        cmocka_unit_test(the_vocabulary_is_derived_or_given),
        cmocka_unit_test(tokens_outside_the_vocabulary_are_refused),
        cmocka_unit_test(tokens_beyond_the_scan_are_checked_when_they_are_read),
        cmocka_unit_test(a_mask_takes_targets_out_and_changes_nothing_else),
        cmocka_unit_test(masked_tokens_outside_the_vocabulary_are_refused),
        cmocka_unit_test(wrong_files_are_refused),
        cmocka_unit_test(wrong_specs_and_values_are_refused),
    };
    return cmocka_run_group_tests(tests, enter_folder, remove_folder);
}
