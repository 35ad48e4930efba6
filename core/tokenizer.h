// tokenizer.h: what tokens mean as text, to print samples: llm.c's tokenizer file.
//
// gpt2_tokenizer.bin and its like, little-endian: 256 int32 of header ([0]=20240328, [1]=version, [2]=tokens, and in version 2 [3]=the end-of-text token, which in
// version 1 is GPT-2's, 50256), then of each token a byte with its length and as many bytes. A token may be part of a UTF-8 character. There are no merges in it: it
// turns tokens into text, not text into tokens (scripts/tokenize.py does that, and writes such files).
#pragma once
#include "log.h"  // utf8_bytes
#include <string>
#include <vector>

constexpr int TOKENIZER_HEADER = 256;  // int32
constexpr int32_t TOKENIZER_MAGIC = 20240328;

struct Tokenizer {
    int vocab, end_of_text;
    std::vector<std::string> tokens;  // (vocab) bytes; empty: prints nothing
};

// For a model of this vocabulary
static inline Tokenizer tokenizer_open(const char* flag, const char* path, int64_t vocab) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is not waited for: it is refused
    if (fd < 0) { bad_input("%s: cannot open '%s': %s", flag, path, strerror(errno)); }
    struct stat status;
    if (fstat(fd, &status) != 0) { bad_input("%s: cannot read '%s': %s", flag, path, strerror(errno)); }
    if (!S_ISREG(status.st_mode)) { bad_input("%s: '%s' is not a file", flag, path); }
    int32_t h[TOKENIZER_HEADER] = {};
    size_t size = (size_t)status.st_size, most = sizeof(h) + (size_t)vocab * 256;
    if (size < sizeof(h)) { bad_input("%s: '%s' is no tokenizer file: it has %zu bytes, and the header alone takes %zu", flag, path, size, sizeof(h)); }
    std::string all(min_of(size, most + 1), '\0');
    for (size_t done = 0; done < all.size();) {
        ssize_t got = read(fd, &all[done], all.size() - done);
        if (got < 0 && errno == EINTR) { continue; }
        if (got <= 0) { bad_input("%s: reading '%s' failed at byte %zu: %s", flag, path, done, got < 0 ? strerror(errno) : "the file ended"); }
        done += (size_t)got;
    }
    close(fd);
    memcpy(h, all.data(), sizeof(h));
    if (h[0] != TOKENIZER_MAGIC) { bad_input("%s: '%s' is no tokenizer file: it starts with %d, not %d", flag, path, h[0], TOKENIZER_MAGIC); }
    if (h[1] != 1 && h[1] != 2) { bad_input("%s: '%s' has version %d; versions 1 and 2 can be read", flag, path, h[1]); }
    if (h[2] != vocab) { bad_input("%s: '%s' has %d tokens, and the model's vocabulary is %" PRId64 "; they must be of one tokenizer", flag, path, h[2], vocab); }
    Tokenizer t = {h[2], h[1] == 1 ? 50256 : h[3], {}};
    if (t.end_of_text < 0 || t.end_of_text >= t.vocab) {
        bad_input("%s: '%s': its end-of-text token is %d; allowed for its %d tokens: 0 to %d", flag, path, t.end_of_text, t.vocab, t.vocab - 1);
    }
    size_t at = sizeof(h);
    for (int i = 0; i < t.vocab; i++) {
        size_t length = at < all.size() ? (uint8_t)all[at] : 0;
        if (at + 1 + length > all.size()) { bad_input("%s: '%s' is cut short: it ends in token %d of %d", flag, path, i, t.vocab); }
        t.tokens.push_back(all.substr(at + 1, length));
        at += 1 + length;
    }
    if (at != size) { bad_input("%s: '%s' is too long: its %d tokens end at byte %zu, the file has %zu", flag, path, t.vocab, at, size); }
    return t;
}

static inline std::string tokenizer_decode(const Tokenizer* t, const int* tokens, int count) {
    std::string text;
    for (int i = 0; i < count; i++) { text += t->tokens[(size_t)tokens[i]]; }
    return text;
}

// Bytes from a model as a terminal may be given them: lines and valid UTF-8 stay; all else, which may be half a character or a command to the terminal, becomes ?
static inline std::string printable_text(const std::string& bytes) {
    std::string text;
    for (size_t i = 0; i < bytes.size();) {
        const unsigned char* p = (const unsigned char*)bytes.c_str() + i;
        int n = utf8_bytes(p);
        bool control = (p[0] < 0x20 && p[0] != '\n' && p[0] != '\t') || p[0] == 0x7f || (p[0] == 0xc2 && p[1] < 0xa0);  // the last: U+0080 to U+009F
        if (n == 0 || control) { text += '?'; } else { text.append(bytes, i, (size_t)n); }
        i += (size_t)max_of(n, 1);
    }
    return text;
}
