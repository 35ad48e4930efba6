// choices.h: multiple-choice examples: a context, completions of it, and which of them is right. A model is scored by which one it finds most probable.
//
// The file is llm.c's (dev/data/hellaswag.py writes one): 256 int32 of header ([0]=20240522, [1]=version, [2]=examples, [3]=bytes of the longest), then of
// each example a row of words: a mark (all bits set), the example's bytes from the mark on, its number, the label (which completion is right), the number of
// completions, the length of the context, its tokens, then of each completion the length and the tokens. Words are uint16 in version 1; in version 2, for
// vocabularies beyond 65535 tokens, they are uint32. Files are small (HellaSwag: 3.6 MB): they are read whole, and checked whole, when they are opened.
//
// A completion is scored in a sequence of T tokens: the context, then the completion; what counts are the losses of the completion's tokens. What is longer
// than T+1 tokens (the last is only a target) loses tokens at the left of the context, of all completions of the example as many.
#pragma once
#include "common.h"
#include <fcntl.h>
#include <string>
#include <sys/stat.h>
#include <vector>

constexpr int CHOICES_HEADER = 256;  // int32
constexpr int32_t CHOICES_MAGIC = 20240522;

struct ChoiceExample {
    int label;
    int64_t context;                   // its first token that is used
    int context_tokens;                // that are used, at least one
    int64_t first_completion, completions;
};

struct ChoiceCompletion {
    int64_t example;
    int64_t first;                     // its first token
    int tokens;
};

struct ChoiceSet {
    const char* flag;                  // for messages, as path; both outlive the set
    std::string path, name;            // the name is the file's, without folder and .bin
    std::vector<int32_t> words;        // of the whole file, where the tokens are
    std::vector<ChoiceExample> examples;
    std::vector<ChoiceCompletion> completions;  // of all examples, in order
    int64_t cut;                       // examples whose context was too long
    uint64_t fingerprint;              // of the contents
};

struct ChoiceCounts { int64_t by_sum, by_mean; };  // examples where the right completion has the greatest probability; the greatest a token

// ---- reading ----

static inline std::vector<char> choices_read_file(const char* flag, const char* path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is not waited for: it is refused
    if (fd < 0) { bad_input("%s: cannot open '%s': %s", flag, path, strerror(errno)); }
    struct stat status;
    if (fstat(fd, &status) != 0) { bad_input("%s: cannot read '%s': %s", flag, path, strerror(errno)); }
    if (!S_ISREG(status.st_mode)) { bad_input("%s: '%s' is not a file", flag, path); }
    if (status.st_size > (int64_t)1 << 33) { bad_input("%s: '%s' has %" PRId64 " bytes; at most 8 GiB are read", flag, path, (int64_t)status.st_size); }
    std::vector<char> bytes((size_t)status.st_size);
    for (size_t done = 0; done < bytes.size();) {
        ssize_t got = read(fd, bytes.data() + done, bytes.size() - done);
        if (got < 0 && errno == EINTR) { continue; }
        if (got <= 0) { bad_input("%s: reading '%s' failed at byte %zu: %s", flag, path, done, got < 0 ? strerror(errno) : "the file ended"); }
        done += (size_t)got;
    }
    close(fd);
    return bytes;
}

// Widens the words behind the header
template <class Word> static inline void choices_widen(std::vector<int32_t>* words, const std::vector<char>& bytes) {
    size_t header = CHOICES_HEADER * sizeof(int32_t), n = (bytes.size() - header) / sizeof(Word);
    words->resize(n);
    for (size_t i = 0; i < n; i++) {
        Word w;
        memcpy(&w, bytes.data() + header + i * sizeof(Word), sizeof(Word));
        (*words)[i] = (int32_t)w;
    }
}

// Opens, checks and reads a file for a model of this vocabulary and sequences of T tokens
static inline void choices_open(ChoiceSet* set, const char* flag, const char* path, int64_t vocab, int T) {
    *set = ChoiceSet{};
    set->flag = flag;
    set->path = path;
    set->name = set->path.substr(set->path.find_last_of('/') + 1);
    if (set->name.size() > 4 && set->name.compare(set->name.size() - 4, 4, ".bin") == 0) { set->name.resize(set->name.size() - 4); }
    std::vector<char> bytes = choices_read_file(flag, path);
    int32_t h[CHOICES_HEADER];
    if (bytes.size() < sizeof(h)) {
        bad_input("%s: '%s' is no multiple-choice file: it has %zu bytes, and the header alone takes %zu", flag, path, bytes.size(), sizeof(h));
    }
    memcpy(h, bytes.data(), sizeof(h));
    if (h[0] != CHOICES_MAGIC) { bad_input("%s: '%s' is no multiple-choice file: it starts with %d, not %d", flag, path, h[0], CHOICES_MAGIC); }
    if (h[1] != 1 && h[1] != 2) { bad_input("%s: '%s' has version %d; versions 1 (uint16 words) and 2 (uint32 words) can be read", flag, path, h[1]); }
    if (h[2] < 1) { bad_input("%s: '%s' has %d examples; at least one is needed", flag, path, h[2]); }
    int word = h[1] == 1 ? 2 : 4;
    if ((bytes.size() - sizeof(h)) % (size_t)word != 0) { bad_input("%s: '%s' is cut short: its last word has one byte or more too few", flag, path); }
    if (word == 2) { choices_widen<uint16_t>(&set->words, bytes); } else { choices_widen<uint32_t>(&set->words, bytes); }
    for (char c : bytes) { set->fingerprint = mix64(set->fingerprint ^ (uint8_t)c); }
    const int32_t* w = set->words.data();
    int64_t n = (int64_t)set->words.size(), at = 0, longest = 0;
    int32_t mark = word == 2 ? 65535 : -1;
    for (int64_t i = 0; i < h[2]; i++) {
        auto next = [&](const char* what) {
            if (at == n) { bad_input("%s: '%s' is cut short: it ends in example %" PRId64 " of %d, where %s should be", flag, path, i, h[2], what); }
            return (int64_t)(uint32_t)w[at++];
        };
        // A list of tokens: its length, then as many; returns where they start
        auto list = [&](int64_t* length, const char* what) {
            *length = next(what);
            if (*length > n - at) {
                bad_input("%s: '%s' is cut short: %s of example %" PRId64 " has %" PRId64 " tokens, and %" PRId64 " words are left", flag, path, what, i, *length, n - at);
            }
            int64_t first = at;
            for (int64_t k = 0; k < *length; k++, at++) {
                if ((int64_t)(uint32_t)w[at] >= vocab) {
                    bad_input("%s: '%s': in %s of example %" PRId64 " is the token %u; allowed in a vocabulary of %" PRId64 ": 0 to %" PRId64, flag, path, what, i,
                        (uint32_t)w[at], vocab, vocab - 1);
                }
            }
            return first;
        };
        int64_t start = at;
        if (next("its mark") != (int64_t)(uint32_t)mark) { bad_input("%s: '%s' is damaged: example %" PRId64 " does not begin with its mark", flag, path, i); }
        int64_t size = next("its size"), number = next("its number"), label = next("its label"), completions = next("its number of completions");
        if (number != (word == 2 ? i & 65535 : i)) { bad_input("%s: '%s' is damaged: example %" PRId64 " has the number %" PRId64, flag, path, i, number); }
        if (completions < 2) { bad_input("%s: '%s': example %" PRId64 " has %" PRId64 " completions; at least 2 are a choice", flag, path, i, completions); }
        if (label >= completions) {
            bad_input("%s: '%s': the label of example %" PRId64 " is %" PRId64 "; allowed for its %" PRId64 " completions: 0 to %" PRId64, flag, path, i, label, completions,
                completions - 1);
        }
        ChoiceExample e = {};
        int64_t context, most = 0;
        e.label = (int)label;
        e.context = list(&context, "the context");
        e.first_completion = (int64_t)set->completions.size();
        e.completions = completions;
        if (context == 0) {
            bad_input("%s: '%s': the context of example %" PRId64 " is empty, and nothing would come before its completions; begin it with the end-of-text token", flag, path, i);
        }
        for (int64_t k = 0; k < completions; k++) {
            int64_t length, first = list(&length, "a completion");
            if (length == 0) { bad_input("%s: '%s': completion %" PRId64 " of example %" PRId64 " is empty", flag, path, k, i); }
            if (length > T) {
                bad_input("%s: '%s': completion %" PRId64 " of example %" PRId64 " has %" PRId64 " tokens, and --seq-len %d has room for as many; a longer --seq-len can score it",
                    flag, path, k, i, length, T);
            }
            set->completions.push_back(ChoiceCompletion{i, first, (int)length});
            most = max_of(most, length);
        }
        if (size != (at - start) * word) {
            bad_input("%s: '%s' is damaged: example %" PRId64 " should have %" PRId64 " bytes and has %" PRId64, flag, path, i, size, (at - start) * word);
        }
        int64_t room = (int64_t)T + 1 - most, used = min_of(context, room);
        set->cut += used < context;
        e.context += context - used;
        e.context_tokens = (int)used;
        set->examples.push_back(e);
        longest = max_of(longest, size);
    }
    if (at != n) { bad_input("%s: '%s' is too long: %" PRId64 " words follow its %d examples", flag, path, n - at, h[2]); }
    if (h[3] != longest) { bad_input("%s: '%s' is damaged: its longest example has %" PRId64 " bytes, and its header says %d", flag, path, longest, h[3]); }
}

// ---- scoring ----

// Which of `ranks` replicas scores the completions from first to last-1; an example's stay together
static inline void choices_share(int64_t* first, int64_t* last, const ChoiceSet* set, int rank, int ranks) {
    int64_t n = (int64_t)set->examples.size(), all = (int64_t)set->completions.size();
    auto start = [=](int64_t r) {
        int64_t example = n * r / ranks;
        return example < n ? set->examples[(size_t)example].first_completion : all;
    };
    *first = start(rank);
    *last = start(rank + 1);
}

// The most that any of them has
static inline int64_t choices_most(const ChoiceSet* set, int ranks) {
    int64_t most = 0;
    for (int r = 0; r < ranks; r++) {
        int64_t first, last;
        choices_share(&first, &last, set, r, ranks);
        most = max_of(most, last - first);
    }
    return most;
}

// Inputs and targets (T) of one completion; what counts are the losses of positions *from to *to-1
static inline void choices_sequence(int32_t* tokens, int32_t* targets, int* from, int* to, const ChoiceSet* set, int64_t completion, int T) {
    const ChoiceCompletion* c = &set->completions[(size_t)completion];
    const ChoiceExample* e = &set->examples[(size_t)c->example];
    const int32_t *context = set->words.data() + e->context, *own = set->words.data() + c->first;
    auto token = [=](int i) { return i < e->context_tokens ? context[i] : own[i - e->context_tokens]; };
    int n = e->context_tokens + c->tokens;
    for (int t = 0; t < T; t++) {
        tokens[t] = t + 1 < n ? token(t) : 0;
        targets[t] = t + 1 < n ? token(t + 1) : 0;
    }
    *from = e->context_tokens - 1;
    *to = n - 1;
}

// Of the examples whose completions are first to last-1, from the sum of each completion's losses (sums[0] is the first's); of equal ones the first wins
static inline ChoiceCounts choices_count(const ChoiceSet* set, const double* sums, int64_t first, int64_t last) {
    ChoiceCounts counts = {0, 0};
    for (int64_t at = first; at < last;) {
        const ChoiceExample* e = &set->examples[(size_t)set->completions[(size_t)at].example];
        double best_sum = INFINITY, best_mean = INFINITY;
        int64_t by_sum = -1, by_mean = -1;  // none, where no loss is finite
        for (int64_t k = 0; k < e->completions; k++) {
            double sum = sums[at - first + k], mean = sum / set->completions[(size_t)(at + k)].tokens;
            if (sum < best_sum) { best_sum = sum; by_sum = k; }
            if (mean < best_mean) { best_mean = mean; by_mean = k; }
        }
        counts.by_sum += by_sum == e->label;
        counts.by_mean += by_mean == e->label;
        at += e->completions;
    }
    return counts;
}
