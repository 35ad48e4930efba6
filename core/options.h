// options.h: a program's flags as one table. What parses the command line is what prints --help and the resolved configuration.
//
// The caller writes a table of Option rows (by the makers below: option_flag, option_int, …), each pointing at the variable that it sets,
// and calls parse_options. This file knows no flag but --help. Two spellings are understood:
//   --lr 3e-4   --lr=3e-4   --resume   --no-resume     GNU long options; a flag takes no value and is turned off by --no-NAME
//   -l 3e-4     -sl 5       -y 1                       llm.c's: a name of one or two letters, never a cluster; the value is the next
//                                                      argument, and flags too take one, 0 or 1, so that llm.c command lines work
// The last of several wins. All else is refused through bad_input in one line that names the flag, the value and what is allowed: unknown
// flags (with the nearest known one), missing values, text for a number, values out of range, stray arguments (most often a pattern that
// the shell has expanded), and llm.c's flags that we do not carry (a second table says what to do instead).
// Defaults are what the variables hold before the call. Each row remembers whether it was given, so that recipes can come after the
// command line and yet before it in rank:  set_default(&options, &args.lr, 3e-4)  assigns only where the user has said nothing.
//
//   Option items[] = {
//       option_group("Optimizer"),
//       option_double("lr", "l", &args.lr, OPTION_ABOVE_0, DBL_MAX, "F", "peak learning rate"),
//       option_choice("grad-dtype", NULL, &args.grad_dtype, "fp32|bf16|e4m3=fp8|e5m2", "D", "gradients on the wire"),
//       option_flag("resume", "y", &args.resume, "go on from the newest checkpoint"),
//   };
//   RefusedFlag refused[] = {{"f", "matmul precision follows the recipe (--recipe)"}};
//   Options options = {items, sizeof(items) / sizeof(items[0]), refused, 1, "usage: mpirun -n RANKS ./train_gpt_fp8 [flags]"};
//   parse_options(&options, argc, argv);
#pragma once
#include "common.h"  // bad_input, die
#include <ctype.h>
#include <string>
#include <float.h>
#include <sys/ioctl.h>

enum OptionType { OPTION_GROUP, OPTION_FLAG, OPTION_INT, OPTION_DOUBLE, OPTION_STRING, OPTION_CHOICE, OPTION_CUSTOM };

struct Option {
    OptionType type;
    const char* name;                  // long name without dashes; of a group: its heading in --help
    const char* llmc;                  // llm.c's name without the dash, or NULL
    void* value;                       // bool, int64_t, double, const char*, int (choice) or what parse wants
    const char* value_name;            // "N" in --help
    const char* help;
    int64_t int_min, int_max;          // int: both ends allowed; string: int_min is the least length
    double min, max;                   // double: both ends allowed; see OPTION_ABOVE_0 and OPTION_BELOW_1 for open ends
    const char* choices;               // "fp32||e4m3=fp8": names by index; an empty one is an index not on offer; after = an alias
    const char* (*parse)(void* value, const char* text);        // custom: sets the value, or returns what is wrong and what is allowed
    void (*print)(char* text, size_t size, const void* value);  // custom: the inverse, for --help and the resolved configuration
    const char* default_text;          // shown instead of the variable's value ("by recipe"); NULL: the value
    bool given;                        // on the command line
};

struct RefusedFlag {
    const char* llmc;    // a flag of llm.c that is not carried, without the dash
    const char* instead; // what to do instead
};

struct Options {
    Option* items;
    int count;
    const RefusedFlag* refused;
    int refused_count;
    const char* usage;  // head of --help
};

#define OPTION_ABOVE_0 DBL_MIN                    // as a minimum: greater than 0
#define OPTION_BELOW_1 (1.0 - DBL_EPSILON / 2.0)  // as a maximum: less than 1, the double next to it

// ---- rows ----

static inline Option option_row(OptionType type, const char* name, const char* llmc, void* value, const char* value_name, const char* help,
                                const char* default_text) {
    Option row = {};
    row.type = type;
    row.name = name;
    row.llmc = llmc;
    row.value = value;
    row.value_name = value_name;
    row.help = help;
    row.default_text = default_text;
    return row;
}

// The rows from here to the next group stand under this heading in --help.
static inline Option option_group(const char* heading) { return option_row(OPTION_GROUP, heading, NULL, NULL, NULL, NULL, NULL); }

static inline Option option_flag(const char* name, const char* llmc, bool* value, const char* help, const char* default_text = NULL) {
    return option_row(OPTION_FLAG, name, llmc, value, NULL, help, default_text);
}

static inline Option option_int(const char* name, const char* llmc, int64_t* value, int64_t min, int64_t max, const char* value_name,
                                const char* help, const char* default_text = NULL) {
    Option row = option_row(OPTION_INT, name, llmc, value, value_name, help, default_text);
    row.int_min = min;
    row.int_max = max;
    return row;
}

// -DBL_MAX and DBL_MAX mean no bound; the value is finite in any case.
static inline Option option_double(const char* name, const char* llmc, double* value, double min, double max, const char* value_name,
                                   const char* help, const char* default_text = NULL) {
    Option row = option_row(OPTION_DOUBLE, name, llmc, value, value_name, help, default_text);
    row.min = min;
    row.max = max;
    return row;
}

// The string is the argument itself (it lives as long as argv) and at least min_length bytes long; NULL as a default is "none".
static inline Option option_string(const char* name, const char* llmc, const char** value, int64_t min_length, const char* value_name,
                                   const char* help, const char* default_text = NULL) {
    Option row = option_row(OPTION_STRING, name, llmc, (void*)value, value_name, help, default_text);
    row.int_min = min_length;
    return row;
}

// value is an int or an enum as wide; its values are the indices of the names in choices.
template <class Enum>
static inline Option option_choice(const char* name, const char* llmc, Enum* value, const char* choices, const char* value_name,
                                   const char* help, const char* default_text = NULL) {
    static_assert(sizeof(Enum) == sizeof(int), "a choice is stored in an int");
    Option row = option_row(OPTION_CHOICE, name, llmc, (void*)value, value_name, help, default_text);
    row.choices = choices;
    return row;
}

static inline Option option_custom(const char* name, const char* llmc, void* value, const char* (*parse)(void* value, const char* text),
                                   void (*print)(char* text, size_t size, const void* value), const char* value_name, const char* help,
                                   const char* default_text = NULL) {
    Option row = option_row(OPTION_CUSTOM, name, llmc, value, value_name, help, default_text);
    row.parse = parse;
    row.print = print;
    return row;
}

static inline const char* parse_yes_no(void* value, const char* text) {
    if (strcmp(text, "yes") != 0 && strcmp(text, "no") != 0) { return "allowed: yes, no"; }
    *(bool*)value = strcmp(text, "yes") == 0;
    return NULL;
}
static inline void print_yes_no(char* text, size_t size, const void* value) { snprintf(text, size, "%s", *(const bool*)value ? "yes" : "no"); }
static inline Option option_yes_no(const char* name, const char* llmc, bool* value, const char* help, const char* default_text = NULL) {
    return option_custom(name, llmc, value, parse_yes_no, print_yes_no, "yes|no", help, default_text);
}

// ---- text ----

struct OptionText {
    char text[320];
};

// 'text' fit for one line of a message: control characters become ?, a long one is cut.
static inline OptionText quoted(const char* text) {
    OptionText q;
    const size_t most = 200;
    size_t length = strlen(text), n = 0;
    bool cut = length > most;
    if (cut) {
        length = most;
        while (length > 0 && ((unsigned char)text[length] & 0xc0) == 0x80) { length--; }  // not inside a UTF-8 character
    }
    q.text[n++] = '\'';
    for (size_t i = 0; i < length; i++) { q.text[n++] = iscntrl((unsigned char)text[i]) ? '?' : text[i]; }
    snprintf(q.text + n, sizeof(q.text) - n, "'%s", cut ? "…" : "");
    return q;
}

// A word of a command as a shell reads it
static inline std::string shell_word(const char* text) {
    static const char* const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,+@%";
    if (text[0] != '\0' && strspn(text, plain) == strlen(text)) { return text; }
    std::string word = "'";
    for (const char* c = text; *c != '\0'; c++) { word += *c == '\'' ? std::string("'\\''") : std::string(1, *c); }
    return word + "'";
}

// The shortest text that reads back as the same double; 1e-8 rather than 1e-08.
static inline void double_text(char* text, size_t size, double value) {
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, size, "%.*g", digits, value);
        if (strtod(text, NULL) == value) { break; }
    }
    char* exponent = strpbrk(text, "e");
    if (exponent == NULL) { return; }
    char* from = exponent + 1 + (exponent[1] == '-' || exponent[1] == '+');
    char* to = exponent + 1 + (exponent[1] == '-');
    while (*from == '0' && from[1] != '\0') { from++; }
    memmove(to, from, strlen(from) + 1);
}

// Walks "a|b=alias||c". Calls are made with *at = choices first; gives name and alias (empty: none); false at the end.
static inline bool next_choice(const char** at, const char** name, int* name_length, const char** alias, int* alias_length) {
    if (*at == NULL) { return false; }
    int length = (int)strcspn(*at, "|");
    *name = *at;
    *name_length = (int)min_of<size_t>(strcspn(*at, "=|"), length);
    *alias = *at + min_of(*name_length + 1, length);
    *alias_length = (int)(*at + length - *alias);
    *at = (*at)[length] == '|' ? *at + length + 1 : NULL;
    return true;
}

// The index of a name or alias; -1: not on offer.
static inline int choice_index(const char* choices, const char* text) {
    const char *at = choices, *name, *alias;
    int name_length, alias_length, index = 0, length = (int)strlen(text);
    for (; next_choice(&at, &name, &name_length, &alias, &alias_length); index++) {
        if (length == 0) { continue; }
        if ((length == name_length && memcmp(name, text, length) == 0) || (length == alias_length && memcmp(alias, text, length) == 0)) {
            return index;
        }
    }
    return -1;
}

// What a row allows, for messages: "1 or more", "0 to 3", "above 0, below 1", "fp32, e4m3 (= fp8)".
static inline OptionText allowed_text(const Option* o) {
    OptionText t = {};
    if (o->type == OPTION_FLAG) {
        snprintf(t.text, sizeof(t.text), "0 or 1");
    } else if (o->type == OPTION_INT) {
        if (o->int_min != INT64_MIN && o->int_max != INT64_MAX) {
            snprintf(t.text, sizeof(t.text), "%" PRId64 " to %" PRId64, o->int_min, o->int_max);
        } else if (o->int_min != INT64_MIN) {
            snprintf(t.text, sizeof(t.text), "%" PRId64 " or more", o->int_min);
        } else if (o->int_max != INT64_MAX) {
            snprintf(t.text, sizeof(t.text), "%" PRId64 " or less", o->int_max);
        } else {
            snprintf(t.text, sizeof(t.text), "any whole number of 64 bits");
        }
    } else if (o->type == OPTION_DOUBLE) {
        char min[40], max[40];
        double_text(min, sizeof(min), o->min);
        double_text(max, sizeof(max), o->max);
        bool low = o->min != -DBL_MAX, high = o->max != DBL_MAX, above_0 = o->min == OPTION_ABOVE_0, below_1 = o->max == OPTION_BELOW_1;
        if (low && high && !above_0 && !below_1) {
            snprintf(t.text, sizeof(t.text), "%s to %s", min, max);
        } else if (!low && !high) {
            snprintf(t.text, sizeof(t.text), "any finite number");
        } else {
            snprintf(t.text, sizeof(t.text), "%s%s%s%s%s", above_0 ? "above 0" : low ? min : "", low && !above_0 ? " or more" : "",
                     low && high ? ", " : "", below_1 ? "below 1" : high ? max : "", high && !below_1 ? " or less" : "");
        }
    } else if (o->type == OPTION_STRING) {
        if (o->int_min > 1) { snprintf(t.text, sizeof(t.text), "at least %" PRId64 " bytes", o->int_min); }
    } else if (o->type == OPTION_CHOICE) {
        const char *at = o->choices, *name, *alias;
        int name_length, alias_length;
        size_t n = 0;
        while (next_choice(&at, &name, &name_length, &alias, &alias_length) && n < sizeof(t.text)) {
            if (name_length == 0) { continue; }
            n += snprintf(t.text + n, sizeof(t.text) - n, "%s%.*s", n > 0 ? ", " : "", name_length, name);
            if (alias_length > 0 && n < sizeof(t.text)) { n += snprintf(t.text + n, sizeof(t.text) - n, " (= %.*s)", alias_length, alias); }
        }
    }
    return t;
}

// A row's present value as a user would type it ("none" for a string that is not set): for the resolved configuration and --help.
static inline void option_value_text(char* text, size_t size, const Option* o) {
    if (size > 0) { text[0] = '\0'; }
    if (o->type == OPTION_FLAG) {
        snprintf(text, size, "%s", *(const bool*)o->value ? "on" : "off");
    } else if (o->type == OPTION_INT) {
        snprintf(text, size, "%" PRId64, *(const int64_t*)o->value);
    } else if (o->type == OPTION_DOUBLE) {
        char number[40];
        double_text(number, sizeof(number), *(const double*)o->value);
        snprintf(text, size, "%s", number);
    } else if (o->type == OPTION_STRING) {
        const char* string = *(const char* const*)o->value;
        snprintf(text, size, "%s", string != NULL ? string : "none");
    } else if (o->type == OPTION_CHOICE) {
        int chosen = 0, index = 0, name_length, alias_length;
        memcpy(&chosen, o->value, sizeof(int));  // the variable may be an enum
        const char *at = o->choices, *name, *alias;
        for (; next_choice(&at, &name, &name_length, &alias, &alias_length); index++) {
            if (index == chosen) { snprintf(text, size, "%.*s", name_length, name); }
        }
    } else if (o->type == OPTION_CUSTOM) {
        o->print(text, size, o->value);
    }
}

// ---- the table ----

static inline bool same_name(const char* known, const char* name, size_t length) {
    return known != NULL && strlen(known) == length && memcmp(known, name, length) == 0;
}

// The row of a long name (without dashes); NULL: none.
static inline Option* find_option(const Options* options, const char* name, size_t length) {
    for (int i = 0; i < options->count; i++) {
        Option* o = &options->items[i];
        if (o->type != OPTION_GROUP && same_name(o->name, name, length)) { return o; }
    }
    return NULL;
}

// The row of an llm.c name (without the dash); NULL: none.
static inline Option* find_llmc_option(const Options* options, const char* name, size_t length) {
    for (int i = 0; i < options->count; i++) {
        if (same_name(options->items[i].llmc, name, length)) { return &options->items[i]; }
    }
    return NULL;
}

// --no-NAME of a flag; NULL: not that.
static inline Option* find_negated_flag(const Options* options, const char* name, size_t length) {
    if (length <= 3 || memcmp(name, "no-", 3) != 0) { return NULL; }
    Option* o = find_option(options, name + 3, length - 3);
    return o != NULL && o->type == OPTION_FLAG ? o : NULL;
}

static inline const RefusedFlag* find_refused(const Options* options, const char* name) {
    for (int i = 0; i < options->refused_count; i++) {
        if (strcmp(options->refused[i].llmc, name) == 0) { return &options->refused[i]; }
    }
    return NULL;
}

// A table that contradicts itself is a bug of the program, found at its first start.
static inline void check_option_table(const Options* options) {
    for (int i = 0; i < options->count; i++) {
        const Option* o = &options->items[i];
        if (o->type == OPTION_GROUP) { continue; }
        if (o->name == NULL || o->name[0] == '\0' || o->value == NULL || o->help == NULL) { die("option table: row %d lacks a field", i); }
        if (o->type != OPTION_FLAG && o->value_name == NULL) { die("option table: --%s has no name for its value", o->name); }
        if (o->type == OPTION_CUSTOM && (o->parse == NULL || o->print == NULL)) { die("option table: --%s lacks parse or print", o->name); }
        if (strcmp(o->name, "help") == 0) { die("option table: --help is built in"); }
        if (find_option(options, o->name, strlen(o->name)) != o) { die("option table: --%s stands there twice", o->name); }
        if (o->llmc == NULL) { continue; }
        if (strlen(o->llmc) < 1 || strlen(o->llmc) > 2) { die("option table: -%s: one or two letters are allowed", o->llmc); }
        if (find_llmc_option(options, o->llmc, strlen(o->llmc)) != o) { die("option table: -%s stands there twice", o->llmc); }
        if (find_refused(options, o->llmc) != NULL) { die("option table: -%s is both carried and refused", o->llmc); }
    }
}

static inline const Option* option_of(const Options* options, const void* value) {
    for (int i = 0; i < options->count; i++) {
        if (options->items[i].type != OPTION_GROUP && options->items[i].value == value) { return &options->items[i]; }
    }
    die("option table: no row sets this variable");
}

// Whether the option that sets this variable was on the command line.
static inline bool option_given(const Options* options, const void* value) { return option_of(options, value)->given; }

// Assigns unless the user has: how recipes and presets fill in what is left open.
template <class T, class V>
static inline void set_default(const Options* options, T* value, V by_recipe) {
    if (!option_given(options, value)) { *value = by_recipe; }
}

// ---- help ----

static inline int display_width(const char* text, size_t bytes) {
    int width = 0;
    for (size_t i = 0; i < bytes; i++) { width += ((unsigned char)text[i] & 0xc0) != 0x80; }  // a UTF-8 character counts by its first byte
    return width;
}

// Writes text broken at spaces between columns indent and width, the cursor standing at column indent.
static inline void write_wrapped(FILE* file, const char* text, int indent, int width) {
    int column = indent;
    while (*text != '\0') {
        size_t word = strcspn(text, " ");
        int columns = display_width(text, word);
        if (column > indent && column + 1 + columns > width) {
            fprintf(file, "\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            fputc(' ', file);
            column++;
        }
        fwrite(text, 1, word, file);
        column += columns;
        text += word;
        text += strspn(text, " ");
    }
    fputc('\n', file);
}

// "  -b, --micro-batch N"
static inline void option_head(char* text, size_t size, const Option* o) {
    char llmc[8] = "";
    if (o->llmc != NULL) { snprintf(llmc, sizeof(llmc), "-%.2s,", o->llmc); }
    snprintf(text, size, "  %4s --%s%s%s", llmc, o->name, o->value_name != NULL ? " " : "", o->value_name != NULL ? o->value_name : "");
}

// The whole table, grouped and aligned, with defaults, choices and ranges, in lines of at most width columns (a longer word excepted).
static inline void print_options_help(FILE* file, const Options* options, int width) {
    const int widest = 32;  // longer heads have a line of their own
    int left = 0;
    char head[256];
    for (int i = 0; i < options->count; i++) {
        if (options->items[i].type == OPTION_GROUP) { continue; }
        option_head(head, sizeof(head), &options->items[i]);
        int columns = display_width(head, strlen(head)) + 2;
        if (columns <= widest) { left = max_of(left, columns); }
    }
    left = max_of(left, 16);
    fprintf(file, "%s\n", options->usage);
    for (int i = 0; i < options->count; i++) {
        const Option* o = &options->items[i];
        if (o->type == OPTION_GROUP) {
            fprintf(file, "\n%s\n", o->name);
            continue;
        }
        option_head(head, sizeof(head), o);
        int columns = display_width(head, strlen(head));
        if (columns + 2 > left) {
            fprintf(file, "%s\n%*s", head, left, "");
        } else {
            fprintf(file, "%s%*s", head, left - columns, "");
        }
        bool range = (o->type == OPTION_INT && o->int_min != INT64_MIN && o->int_max != INT64_MAX) ||
                     (o->type == OPTION_DOUBLE && o->min != -DBL_MAX && o->max != DBL_MAX);
        char value[512], text[2048];
        option_value_text(value, sizeof(value), o);
        snprintf(text, sizeof(text), "%s (%s%s%sdefault: %s)", o->help, o->type == OPTION_CHOICE ? "one of " : "",
                 range || o->type == OPTION_CHOICE ? allowed_text(o).text : "", range || o->type == OPTION_CHOICE ? "; " : "",
                 o->default_text != NULL ? o->default_text : value);
        write_wrapped(file, text, left, width);
    }
    fprintf(file, "\n  %4s %-*s", "", left - 7, "--help");
    write_wrapped(file, "this text", left, width);
    fputc('\n', file);
    write_wrapped(file, "A value follows as the next argument or after '=' (--NAME VALUE, --NAME=VALUE); the last of several wins. Options "
                        "without a value are turned off by --no-NAME. One-dash names are llm.c's; there every option takes a value as the "
                        "next argument, 0 or 1 where the long one takes none.", 0, width);
    if (options->refused_count > 0) {
        char text[1024];
        size_t n = snprintf(text, sizeof(text), "Of llm.c's flags these are not carried:");
        for (int i = 0; i < options->refused_count && n < sizeof(text); i++) {
            n += snprintf(text + n, sizeof(text) - n, " -%s%s", options->refused[i].llmc, i + 1 < options->refused_count ? "," : ".");
        }
        write_wrapped(file, text, 0, width);
    }
}

// ---- parsing ----

// Letters changed, added, left out or swapped with their neighbour between a and b; '-' equals '_', and case is not looked at.
static inline int edit_distance(const char* a, size_t a_length, const char* b, size_t b_length) {
    enum { MOST = 48 };
    if (a_length > MOST || b_length > MOST) { return INT32_MAX; }
    auto letter = [](char c) { return c == '_' ? '-' : (char)tolower((unsigned char)c); };
    int rows[3][MOST + 1];  // this row of the table, the one before, the one before that
    for (size_t j = 0; j <= b_length; j++) { rows[0][j] = (int)j; }
    for (size_t i = 1; i <= a_length; i++) {
        memcpy(rows[2], rows[1], sizeof(rows[0]));
        memcpy(rows[1], rows[0], sizeof(rows[0]));
        rows[0][0] = (int)i;
        for (size_t j = 1; j <= b_length; j++) {
            char p = letter(a[i - 1]), q = letter(b[j - 1]);
            int best = min_of(rows[1][j - 1] + (p != q), min_of(rows[1][j], rows[0][j - 1]) + 1);
            if (i > 1 && j > 1 && p == letter(b[j - 2]) && letter(a[i - 2]) == q) { best = min_of(best, rows[2][j - 2] + 1); }
            rows[0][j] = best;
        }
    }
    return rows[0][b_length];
}

// The long option that a mistyped name most likely means: few letters away, or one begins with the other. NULL: nothing near.
static inline const char* nearest_option(const Options* options, const char* name, size_t length) {
    const char* best = NULL;
    int limit = length <= 2 ? 0 : length <= 4 ? 1 : length <= 7 ? 2 : 3, best_distance = INT32_MAX;
    for (int i = 0; i <= options->count; i++) {
        const char* known = i < options->count ? options->items[i].name : "help";
        if (i < options->count && options->items[i].type == OPTION_GROUP) { continue; }
        size_t known_length = strlen(known), common = min_of(length, known_length);
        int distance = edit_distance(name, length, known, known_length);
        if (distance > limit) {
            bool extends = length > known_length && known_length >= 3 && (name[known_length] == '-' || name[known_length] == '_');
            bool begins = common >= 3 && (length <= known_length || extends) && edit_distance(name, common, known, common) == 0;
            distance = begins ? limit + 1 : INT32_MAX;  // ranks after any slip of the finger
        }
        if (distance < best_distance) {
            best = known;
            best_distance = distance;
        }
    }
    return best;
}

[[noreturn]] static inline void refuse_unknown_flag(const Options* options, const char* arg) {
    bool is_long = arg[1] == '-';
    const char* name = arg + (is_long ? 2 : 1);
    size_t length = strcspn(name, "=");
    const RefusedFlag* refused = is_long ? NULL : find_refused(options, name);
    if (refused != NULL) { bad_input("-%s of llm.c is not carried: %s", name, refused->instead); }
    OptionText shown = quoted(arg);
    if (is_long && find_llmc_option(options, name, length) != NULL) {
        bad_input("unknown flag %s; did you mean -%.*s?", shown.text, (int)length, name);
    }
    for (size_t letters = 2; letters >= 1 && !is_long; letters--) {  // -b8 and -b=8
        if (strlen(name) <= letters || find_llmc_option(options, name, letters) == NULL) { continue; }
        if (!isdigit((unsigned char)name[letters]) && name[letters] != '=') { continue; }
        OptionText value = quoted(name + letters + (name[letters] == '='));
        bad_input("unknown flag %s; did you mean -%.*s with the value %s?", shown.text, (int)letters, name, value.text);
    }
    const char* near = nearest_option(options, name, length);
    if (near != NULL) { bad_input("unknown flag %s; did you mean --%s?", shown.text, near); }
    bad_input("unknown flag %s; --help lists all", shown.text);
}

// Whether an argument is a flag of this table, so that it cannot be meant as a value (--name=value can carry any).
static inline bool is_known_flag(const Options* options, const char* arg) {
    if (arg[0] != '-') { return false; }
    if (arg[1] != '-') { return find_llmc_option(options, arg + 1, strlen(arg + 1)) != NULL || find_refused(options, arg + 1) != NULL; }
    size_t length = strcspn(arg + 2, "=");
    return find_option(options, arg + 2, length) != NULL || find_negated_flag(options, arg + 2, length) != NULL;
}

// Sets a row's variable from text; flag is what the user typed, for messages.
static inline void set_option(Option* o, const char* flag, const char* text) {
    OptionText shown = quoted(text), allowed = allowed_text(o);
    if (o->type == OPTION_FLAG) {
        if (strcmp(text, "0") != 0 && strcmp(text, "1") != 0) { bad_input("%s: %s is not 0 or 1", flag, shown.text); }
        *(bool*)o->value = text[0] == '1';
    } else if (o->type == OPTION_INT) {
        size_t sign = text[0] == '-' || text[0] == '+', digits = strspn(text + sign, "0123456789");
        if (digits == 0 || text[sign + digits] != '\0') {
            bad_input("%s: %s is not a whole number; allowed: %s", flag, shown.text, allowed.text);
        }
        errno = 0;
        int64_t value = strtoll(text, NULL, 10);
        if (errno == ERANGE || value < o->int_min || value > o->int_max) {
            bad_input("%s: %s is out of range; allowed: %s", flag, shown.text, allowed.text);
        }
        *(int64_t*)o->value = value;
    } else if (o->type == OPTION_DOUBLE) {
        char* end = NULL;
        errno = 0;
        double value = strtod(text, &end);
        bool decimal = strspn(text, "+-.0123456789eE") == strlen(text);  // strtod also takes spaces, hex, inf and nan
        if (!decimal || end == text || *end != '\0') { bad_input("%s: %s is not a number; allowed: %s", flag, shown.text, allowed.text); }
        if (errno == ERANGE || !(value >= o->min && value <= o->max)) {  // ERANGE: infinite, or rounded to a denormal or 0
            bad_input("%s: %s is out of range; allowed: %s", flag, shown.text, allowed.text);
        }
        *(double*)o->value = value;
    } else if (o->type == OPTION_STRING) {
        if ((int64_t)strlen(text) < o->int_min) {
            if (text[0] == '\0') { bad_input("%s: the value is empty; a %s is needed", flag, o->value_name); }
            bad_input("%s: %s is too short; allowed: %s", flag, shown.text, allowed.text);
        }
        *(const char**)o->value = text;
    } else if (o->type == OPTION_CHOICE) {
        int index = choice_index(o->choices, text);
        if (index < 0) { bad_input("%s: %s is not known; allowed: %s", flag, shown.text, allowed.text); }
        memcpy(o->value, &index, sizeof(int));
    } else {
        const char* error = o->parse(o->value, text);
        if (error != NULL) { bad_input("%s: %s: %s", flag, shown.text, error); }
    }
}

// Sets the variables from the command line and marks the rows given. --help, wherever it stands, prints the table as the program defines it
// (hence before anything is set) and ends the program, as does -h alone, whatever -h may mean with a value. Bad input does not return.
static inline void parse_options(Options* options, int argc, char** argv) {
    check_option_table(options);
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") != 0 && !(argc == 2 && strcmp(argv[i], "-h") == 0)) { continue; }
        if (process.rank == 0) {
            struct winsize terminal = {};
            bool known = isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &terminal) == 0 && terminal.ws_col > 0;
            print_options_help(stdout, options, known ? min_of(max_of((int)terminal.ws_col, 60), 120) : 100);
            if (fflush(stdout) != 0) { die("--help: cannot write: %s", strerror(errno)); }
        }
        exit(0);
    }
    const Option* last = NULL;
    for (int i = 1; i < argc; i++) {
        const char* arg = argv[i];
        if (arg[0] != '-' || arg[1] == '\0') {
            bool listed = last != NULL && (last->type == OPTION_STRING || last->type == OPTION_CUSTOM);
            OptionText shown = quoted(arg);
            if (listed) { bad_input("stray argument %s after --%s; quote a pattern, or the shell expands it", shown.text, last->name); }
            bad_input("stray argument %s; values follow their flag, and --help lists the flags", shown.text);
        }
        bool is_long = arg[1] == '-';
        const char* name = arg + (is_long ? 2 : 1);
        const char* equals = is_long ? strchr(name, '=') : NULL;
        size_t length = equals != NULL ? (size_t)(equals - name) : strlen(name);
        Option* o = is_long ? find_option(options, name, length) : find_llmc_option(options, name, length);
        Option* negated = is_long && o == NULL ? find_negated_flag(options, name, length) : NULL;
        if (o == NULL && negated == NULL) { refuse_unknown_flag(options, arg); }
        if (negated != NULL) { o = negated; }
        char flag[128];  // as typed, with its long name where that is another
        if (is_long) {
            snprintf(flag, sizeof(flag), "--%s%.100s", negated != NULL ? "no-" : "", o->name);
        } else {
            snprintf(flag, sizeof(flag), "-%.2s (--%.100s)", o->llmc, o->name);
        }
        if (o->type == OPTION_FLAG && is_long) {
            if (equals != NULL) {
                bad_input("%s takes no value, but was given %s; allowed: --%s, --no-%s", flag, quoted(equals + 1).text, o->name, o->name);
            }
            *(bool*)o->value = negated == NULL;
        } else {
            const char* text = equals != NULL ? equals + 1 : i + 1 < argc ? argv[i + 1] : NULL;
            if (text == NULL || (equals == NULL && is_known_flag(options, text))) {
                OptionText allowed = allowed_text(o);
                bad_input("%s needs a value%s%s%s%s", flag, o->value_name != NULL ? " " : "", o->value_name != NULL ? o->value_name : "",
                          allowed.text[0] != '\0' ? "; allowed: " : "", allowed.text);
            }
            if (equals == NULL) { i++; }
            set_option(o, flag, text);
        }
        o->given = true;
        last = o;
    }
}
