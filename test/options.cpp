// Tests of core/options.h: what each kind of option takes and refuses, word for word; llm.c's command lines; --help against the table.
#include "../core/options.h"
#include <setjmp.h>
#include <stdarg.h>
#include <sys/wait.h>
extern "C" {
#include <cmocka.h>
}

// ---- a table like the trainer's ----

enum GradDtype { GRAD_FP32, GRAD_BF16, GRAD_FP16, GRAD_E4M3, GRAD_E5M2 };

struct Bf16Layers {
    int first, last;
};

struct Args {
    const char *train_data, *val_data, *output_dir, *init, *eval_data, *generate;
    int64_t micro_batch, seq_len, global_batch, steps, warmup, recompute, zero, seed;
    int64_t val_every, sample_every, sample_len, checkpoint_every, keep;
    double lr, min_lr_frac, weight_decay, clip, beta1, skip_loss_z;
    bool resume, overfit_batch, tie_embeddings;
    GradDtype grad_dtype;
    int schedule;
    Bf16Layers bf16_layers;
};

static Args args;

static const char* parse_bf16_layers(void* value, const char* text) {
    Bf16Layers layers = {0, 0};
    int end = 0;
    int got = sscanf(text, "first:%d,last:%d%n", &layers.first, &layers.last, &end);
    if (got != 2 || text[end] != '\0') { return "allowed: first:N,last:M"; }
    *(Bf16Layers*)value = layers;
    return NULL;
}

static void print_bf16_layers(char* text, size_t size, const void* value) {
    const Bf16Layers* layers = (const Bf16Layers*)value;
    snprintf(text, size, "first:%d,last:%d", layers->first, layers->last);
}

static Option rows[] = {
    option_group("Data"),
    option_string("train-data", "i", &args.train_data, 1, "SPEC", "token shards: a pattern, a list or a blend"),
    option_string("val-data", "j", &args.val_data, 1, "SPEC", "the same for validation"),
    option_string("eval-data", "h", &args.eval_data, 1, "FILE", "multiple-choice questions"),
    option_string("output-dir", "o", &args.output_dir, 1, "DIR", "log and checkpoints"),
    option_group("Model"),
    option_string("init", "e", &args.init, 1, "WHAT", "preset, checkpoint or folder"),
    option_flag("tie-embeddings", NULL, &args.tie_embeddings, "the head's matrix is the embedding's"),
    option_group("Workload"),
    option_int("micro-batch", "b", &args.micro_batch, 1, INT64_MAX, "N", "sequences a micro-batch"),
    option_int("seq-len", "t", &args.seq_len, 1, 65536, "N", "tokens a sequence"),
    option_int("global-batch", "d", &args.global_batch, 1, INT64_MAX, "N", "tokens a step", "micro-batch × seq-len × DP"),
    option_int("steps", "x", &args.steps, 1, INT64_MAX, "N", "optimizer steps"),
    option_int("seed", NULL, &args.seed, INT64_MIN, INT64_MAX, "N", "random numbers"),
    option_int("recompute", "r", &args.recompute, 0, 2, "N", "recompute nothing, GELU, GELU and LayerNorm"),
    option_int("zero", "z", &args.zero, 0, 2, "N", "ZeRO stage"),
    option_flag("overfit-batch", "a", &args.overfit_batch, "train on the first batch only"),
    option_group("Optimizer"),
    option_double("lr", "l", &args.lr, OPTION_ABOVE_0, DBL_MAX, "F", "peak learning rate"),
    option_int("warmup", "u", &args.warmup, 0, INT64_MAX, "N", "steps of warm-up"),
    option_double("min-lr-frac", "q", &args.min_lr_frac, 0.0, 1.0, "F", "last learning rate as a fraction of the peak"),
    option_choice("lr-schedule", "k", &args.schedule, "cosine|linear|constant|wsd", "S", "shape of the decay"),
    option_double("weight-decay", "c", &args.weight_decay, 0.0, DBL_MAX, "F", "decoupled weight decay"),
    option_double("clip", NULL, &args.clip, -DBL_MAX, DBL_MAX, "F", "largest gradient norm"),
    option_double("beta1", NULL, &args.beta1, 0.0, OPTION_BELOW_1, "F", "decay of the first moment"),
    option_double("skip-loss-z", "sl", &args.skip_loss_z, 0.0, DBL_MAX, "F", "skip steps whose loss is this many deviations out"),
    option_group("FP8"),
    option_choice("grad-dtype", NULL, &args.grad_dtype, "fp32|bf16||e4m3=fp8|e5m2", "fp32|bf16|e4m3|e5m2", "gradients on the wire",
                  "by recipe"),
    option_custom("bf16-layers", NULL, &args.bf16_layers, parse_bf16_layers, print_bf16_layers, "SPEC", "layers that stay in BF16"),
    option_group("Evaluation and checkpoints"),
    option_int("val-every", "v", &args.val_every, 0, INT64_MAX, "N", "steps between validations; 0: never"),
    option_int("sample-every", "s", &args.sample_every, 0, INT64_MAX, "N", "steps between samples; 0: never"),
    option_int("sample-len", "g", &args.sample_len, 1, INT64_MAX, "N", "tokens a sample"),
    option_int("checkpoint-every", "n", &args.checkpoint_every, 0, INT64_MAX, "N", "steps between checkpoints; 0: never"),
    option_int("keep", "nk", &args.keep, INT64_MIN, 100, "N", "newest checkpoints that stay"),
    option_flag("resume", "y", &args.resume, "go on from the newest checkpoint"),
    option_string("generate", NULL, &args.generate, 0, "TEXT", "continue this text"),
};
static const RefusedFlag refused_flags[] = {{"f", "matmul precision follows --recipe"}, {"ge", "GELU is always fused"}};
static Options options = {rows, sizeof(rows) / sizeof(rows[0]), refused_flags, 2, "usage: ./train_gpt_fp8 [flags]"};

static void defaults(void) {
    args = Args{};
    args.output_dir = "run";
    args.micro_batch = 4;
    args.seq_len = 1024;
    args.steps = 1000;
    args.zero = 1;
    args.lr = 3e-4;
    args.beta1 = 0.9;
    args.clip = 1.0;
    args.grad_dtype = GRAD_E4M3;
    args.tie_embeddings = true;
    args.generate = "";
    for (Option& row : rows) { row.given = false; }
}

// ---- helpers ----

static bool may_exit;  // --help ends the process with 0: in the tests' own that is a failure

static void fail_if_early(void) {
    if (!may_exit) { _exit(1); }
}

static char words[4096];

static void parse_words(char** argv, int argc) {
    defaults();
    parse_options(&options, argc, argv);
}

// Parses a line split at spaces.
static void parse(const char* line) {
    char* argv[128];
    int argc = 0;
    snprintf(words, sizeof(words), "train_gpt_fp8 %s", line);
    for (char* word = strtok(words, " "); word != NULL; word = strtok(NULL, " ")) { argv[argc++] = word; }
    argv[argc] = NULL;
    parse_words(argv, argc);
}

struct Ending {
    int status;  // exit code; -1: a signal
    char out[16384], err[4096];
};

static void read_all(FILE* file, char* text, size_t size) {
    rewind(file);
    size_t got = fread(text, 1, size - 1, file);
    text[got] = '\0';
    fclose(file);
}

// Runs body in a child and says how it ended and what it printed.
template <class Body>
static Ending run_child(Body body) {
    static Ending ending;
    FILE *out = tmpfile(), *err = tmpfile();
    assert_non_null(out);
    assert_non_null(err);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        may_exit = true;
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        body();
        fflush(stdout);
        _exit(99);  // came back: nothing was refused
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    ending.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    read_all(out, ending.out, sizeof(ending.out));
    read_all(err, ending.err, sizeof(ending.err));
    return ending;
}

static void expect_refusal(Ending ending, const char* message) {
    char line[1024];
    snprintf(line, sizeof(line), "train_gpt_fp8: %s\n", message);
    assert_string_equal(ending.err, line);
    assert_string_equal(ending.out, "");
    assert_int_equal(ending.status, 2);
}

static void refuses(const char* line, const char* message) {
    expect_refusal(run_child([=] { parse(line); }), message);
}

static void refuses_words(const char* first, const char* second, const char* message) {
    expect_refusal(run_child([=] {
        char* argv[] = {(char*)"train_gpt_fp8", (char*)first, (char*)second, NULL};
        parse_words(argv, second != NULL ? 3 : 2);
    }), message);
}

static const char* value_of(const char* name) {
    static char text[512];
    const Option* o = find_option(&options, name, strlen(name));
    assert_non_null(o);
    option_value_text(text, sizeof(text), o);
    return text;
}

// ---- tests ----

static void nothing_given_leaves_defaults(void**) {
    parse("");
    assert_int_equal(args.micro_batch, 4);
    assert_string_equal(args.output_dir, "run");
    assert_null(args.train_data);
    for (const Option& row : rows) { assert_false(row.given); }
}

static void long_options_take_both_spellings(void**) {
    parse("--lr 6e-4 --steps=20000 --train-data=a=b --resume --no-tie-embeddings --overfit-batch --no-overfit-batch --lr-schedule linear");
    assert_true(args.lr == 6e-4);
    assert_int_equal(args.steps, 20000);
    assert_string_equal(args.train_data, "a=b");  // only the first = parts
    assert_true(args.resume);
    assert_false(args.tie_embeddings);
    assert_false(args.overfit_batch);
    assert_int_equal(args.schedule, 1);
}

static void the_last_of_several_wins(void**) {
    parse("--lr 1 -l 2 --lr=3 --resume -y 0 -x 7 --steps 8");
    assert_true(args.lr == 3);
    assert_false(args.resume);
    assert_int_equal(args.steps, 8);
    refuses("--lr x --lr 1", "--lr: 'x' is not a number; allowed: above 0");  // but each must be right
}

static void an_llmc_command_line_means_the_same(void**) {
    char line[] = " -i a -j b -o out -v 250 -s 20000 -g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 "
                  "-nk 5 -y 1 -a 0 -sl 5.5 -k cosine -x 30 -e d12";
    parse(line);
    assert_string_equal(args.train_data, "a");
    assert_string_equal(args.val_data, "b");
    assert_string_equal(args.output_dir, "out");
    assert_int_equal(args.val_every, 250);
    assert_int_equal(args.sample_every, 20000);
    assert_int_equal(args.sample_len, 144);
    assert_string_equal(args.eval_data, "1");
    assert_int_equal(args.micro_batch, 64);
    assert_int_equal(args.seq_len, 1024);
    assert_int_equal(args.global_batch, 524288);
    assert_int_equal(args.recompute, 0);
    assert_int_equal(args.zero, 1);
    assert_true(args.weight_decay == 0.1);
    assert_true(args.lr == 0.0006);
    assert_true(args.min_lr_frac == 0.0);
    assert_int_equal(args.warmup, 700);
    assert_int_equal(args.checkpoint_every, 5000);
    assert_int_equal(args.keep, 5);
    assert_true(args.resume);
    assert_false(args.overfit_batch);
    assert_true(args.skip_loss_z == 5.5);
    assert_int_equal(args.schedule, 0);
    assert_int_equal(args.steps, 30);
    assert_string_equal(args.init, "d12");
    for (const Option& row : rows) {  // given are those and no others, the 0 of -a included
        bool in_line = false;
        char flag[8];
        if (row.type != OPTION_GROUP && row.llmc != NULL) {
            snprintf(flag, sizeof(flag), " -%s ", row.llmc);
            in_line = strstr(line, flag) != NULL;
        }
        assert_int_equal(row.given, in_line);
    }
}

static void given_options_outrank_recipes(void**) {
    parse("-l 0.0003 --grad-dtype bf16");  // the default's value, but given
    assert_true(option_given(&options, &args.lr));
    assert_true(option_given(&options, &args.grad_dtype));
    assert_false(option_given(&options, &args.weight_decay));
    set_default(&options, &args.lr, 1e-3);
    set_default(&options, &args.grad_dtype, GRAD_E5M2);
    set_default(&options, &args.weight_decay, 0.1);
    set_default(&options, &args.steps, 5);
    set_default(&options, &args.output_dir, "elsewhere");
    assert_true(args.lr == 3e-4);
    assert_int_equal(args.grad_dtype, GRAD_BF16);
    assert_true(args.weight_decay == 0.1);
    assert_int_equal(args.steps, 5);
    assert_string_equal(args.output_dir, "elsewhere");
    parse("--no-resume");
    set_default(&options, &args.resume, true);
    assert_false(args.resume);
    Ending ending = run_child([] {
        int stranger = 0;
        option_given(&options, &stranger);
    });
    assert_int_equal(ending.status, 1);
    assert_string_equal(ending.err, "train_gpt_fp8: option table: no row sets this variable\n");
}

static void whole_numbers_are_checked(void**) {
    parse("--seed -9223372036854775808 --keep +7 --steps 9223372036854775807 --zero 02");
    assert_true(args.seed == INT64_MIN);
    assert_int_equal(args.keep, 7);
    assert_true(args.steps == INT64_MAX);
    assert_int_equal(args.zero, 2);
    parse("--keep -5 --seq-len 65536 --recompute 2 --zero 0");
    assert_int_equal(args.keep, -5);
    refuses("--steps abc", "--steps: 'abc' is not a whole number; allowed: 1 or more");
    refuses("--steps 10k", "--steps: '10k' is not a whole number; allowed: 1 or more");
    refuses("--steps 1e6", "--steps: '1e6' is not a whole number; allowed: 1 or more");
    refuses("--steps 5.0", "--steps: '5.0' is not a whole number; allowed: 1 or more");
    refuses("--steps 0x10", "--steps: '0x10' is not a whole number; allowed: 1 or more");
    refuses("--steps=", "--steps: '' is not a whole number; allowed: 1 or more");
    refuses("--steps --5", "--steps: '--5' is not a whole number; allowed: 1 or more");
    refuses_words("--steps", " 5", "--steps: ' 5' is not a whole number; allowed: 1 or more");
    refuses_words("--steps", "5 ", "--steps: '5 ' is not a whole number; allowed: 1 or more");
    refuses_words("--steps", "5\n", "--steps: '5?' is not a whole number; allowed: 1 or more");
    refuses("--steps -", "--steps: '-' is not a whole number; allowed: 1 or more");
    refuses("--steps 0", "--steps: '0' is out of range; allowed: 1 or more");
    refuses("-z 3", "-z (--zero): '3' is out of range; allowed: 0 to 2");
    refuses("--zero=-1", "--zero: '-1' is out of range; allowed: 0 to 2");
    refuses("--keep 101", "--keep: '101' is out of range; allowed: 100 or less");
    refuses("--steps 9223372036854775808", "--steps: '9223372036854775808' is out of range; allowed: 1 or more");
    refuses("--seed -9223372036854775809", "--seed: '-9223372036854775809' is out of range; allowed: any whole number of 64 bits");
    refuses("--seed x", "--seed: 'x' is not a whole number; allowed: any whole number of 64 bits");
}

static void numbers_are_checked(void**) {
    parse("--lr .5 --clip -1e-300 --beta1 0.99999999999999988 --min-lr-frac 1.0");
    assert_true(args.lr == 0.5);
    assert_true(args.clip == -1e-300);
    assert_true(args.beta1 == 0.99999999999999988 && args.beta1 < 1.0);
    parse("--lr 2.2250738585072014e-308 --clip 1.7976931348623157e308 --beta1 0 --min-lr-frac 0");
    assert_true(args.lr == DBL_MIN);
    assert_true(args.clip == DBL_MAX);
    refuses("--lr abc", "--lr: 'abc' is not a number; allowed: above 0");
    refuses("-l abc", "-l (--lr): 'abc' is not a number; allowed: above 0");
    refuses("--lr 3e-4x", "--lr: '3e-4x' is not a number; allowed: above 0");
    refuses("--lr 3e", "--lr: '3e' is not a number; allowed: above 0");
    refuses("--lr 1e5e", "--lr: '1e5e' is not a number; allowed: above 0");
    refuses("--lr 0,1", "--lr: '0,1' is not a number; allowed: above 0");
    refuses("--lr=", "--lr: '' is not a number; allowed: above 0");
    refuses_words("--lr", " 1", "--lr: ' 1' is not a number; allowed: above 0");
    refuses("--clip nan", "--clip: 'nan' is not a number; allowed: any finite number");
    refuses("--clip inf", "--clip: 'inf' is not a number; allowed: any finite number");
    refuses("--clip 0x1p3", "--clip: '0x1p3' is not a number; allowed: any finite number");
    refuses("--clip 1e309", "--clip: '1e309' is out of range; allowed: any finite number");
    refuses("--clip -1e309", "--clip: '-1e309' is out of range; allowed: any finite number");
    refuses("--clip 1e-400", "--clip: '1e-400' is out of range; allowed: any finite number");  // would silently be 0
    refuses("--lr 0", "--lr: '0' is out of range; allowed: above 0");
    refuses("--lr -3e-4", "--lr: '-3e-4' is out of range; allowed: above 0");
    refuses("--weight-decay -0.1", "--weight-decay: '-0.1' is out of range; allowed: 0 or more");
    refuses("-q 1.5", "-q (--min-lr-frac): '1.5' is out of range; allowed: 0 to 1");
    refuses("--beta1 1", "--beta1: '1' is out of range; allowed: 0 or more, below 1");
    refuses("--beta1 0.99999999999999999", "--beta1: '0.99999999999999999' is out of range; allowed: 0 or more, below 1");  // rounds to 1
}

static void flags_take_a_value_only_in_llmc_spelling(void**) {
    parse("-y 1 -a 0");
    assert_true(args.resume);
    assert_false(args.overfit_batch);
    parse("--resume --steps 5");
    assert_true(args.resume);
    assert_int_equal(args.steps, 5);
    refuses("-y 2", "-y (--resume): '2' is not 0 or 1");
    refuses("-y yes", "-y (--resume): 'yes' is not 0 or 1");
    refuses("-y", "-y (--resume) needs a value; allowed: 0 or 1");
    refuses("-y -l 3", "-y (--resume) needs a value; allowed: 0 or 1");
    refuses("--resume 1", "stray argument '1'; values follow their flag, and --help lists the flags");
    refuses("--resume=1", "--resume takes no value, but was given '1'; allowed: --resume, --no-resume");
    refuses("--no-resume=", "--no-resume takes no value, but was given ''; allowed: --resume, --no-resume");
    refuses("--no-lr", "unknown flag '--no-lr'; --help lists all");
}

static void strings_are_taken_as_they_are(void**) {
    char prompt[] = "Once upon -b";
    char* argv[] = {(char*)"train_gpt_fp8", (char*)"--generate", prompt, (char*)"-i", (char*)"-5", (char*)"--val-data=-b", NULL};
    parse_words(argv, 6);
    assert_ptr_equal(args.generate, prompt);
    assert_string_equal(args.train_data, "-5");
    assert_string_equal(args.val_data, "-b");  // after = anything goes
    parse("--generate=");
    assert_string_equal(args.generate, "");
    assert_true(option_given(&options, &args.generate));
    refuses("--output-dir=", "--output-dir: the value is empty; a DIR is needed");
    refuses_words("-o", "", "-o (--output-dir): the value is empty; a DIR is needed");
    refuses_words("-o", NULL, "-o (--output-dir) needs a value DIR");
}

static void choices_are_checked(void**) {
    parse("--grad-dtype fp32");
    assert_int_equal(args.grad_dtype, GRAD_FP32);
    parse("--grad-dtype fp8 -k wsd");
    assert_int_equal(args.grad_dtype, GRAD_E4M3);  // the hole at fp16 counts
    assert_int_equal(args.schedule, 3);
    assert_string_equal(value_of("grad-dtype"), "e4m3");
    parse("--grad-dtype e5m2");
    assert_int_equal(args.grad_dtype, GRAD_E5M2);
    const char* allowed = "allowed: fp32, bf16, e4m3 (= fp8), e5m2";
    const char* wrong[] = {"fp16", "E4M3", "e4m", "e4m33", "e4m3=fp8", "fp32|bf16", "=", "|", ""};
    for (const char* name : wrong) {
        char line[64], message[128];
        snprintf(line, sizeof(line), "--grad-dtype=%s", name);
        snprintf(message, sizeof(message), "--grad-dtype: '%s' is not known; %s", name, allowed);
        refuses(line, message);
    }
    refuses("--grad-dtype", "--grad-dtype needs a value fp32|bf16|e4m3|e5m2; allowed: fp32, bf16, e4m3 (= fp8), e5m2");
}

static void custom_parsers_speak(void**) {
    parse("--bf16-layers first:2,last:1");
    assert_int_equal(args.bf16_layers.first, 2);
    assert_int_equal(args.bf16_layers.last, 1);
    assert_string_equal(value_of("bf16-layers"), "first:2,last:1");
    refuses("--bf16-layers first:2", "--bf16-layers: 'first:2': allowed: first:N,last:M");
}

static void missing_values_are_seen(void**) {
    refuses("--lr", "--lr needs a value F; allowed: above 0");
    refuses("--steps 5 -z", "-z (--zero) needs a value N; allowed: 0 to 2");
    refuses("--output-dir --steps 5", "--output-dir needs a value DIR");
    refuses("--output-dir --steps=5", "--output-dir needs a value DIR");
    refuses("--output-dir --no-resume", "--output-dir needs a value DIR");
    refuses("-o -b 5", "-o (--output-dir) needs a value DIR");
    refuses("-o -ge 0", "-o (--output-dir) needs a value DIR");
    refuses("--keep -nk", "--keep needs a value N; allowed: 100 or less");
}

static void unknown_flags_name_the_nearest(void**) {
    refuses("--lrr 3", "unknown flag '--lrr'; did you mean --lr?");
    refuses("--step 3", "unknown flag '--step'; did you mean --steps?");
    refuses("--setps=3", "unknown flag '--setps=3'; did you mean --steps?");
    refuses("--micro_batch 3", "unknown flag '--micro_batch'; did you mean --micro-batch?");
    refuses("--Micro-Batch-Size 3", "unknown flag '--Micro-Batch-Size'; did you mean --micro-batch?");
    refuses("--weight_deacy 3", "unknown flag '--weight_deacy'; did you mean --weight-decay?");
    refuses("--overfit", "unknown flag '--overfit'; did you mean --overfit-batch?");
    refuses("--halp", "unknown flag '--halp'; did you mean --help?");
    refuses("--b 3", "unknown flag '--b'; did you mean -b?");
    refuses("--sl=3", "unknown flag '--sl=3'; did you mean -sl?");
    refuses("-lr 3", "unknown flag '-lr'; did you mean --lr?");
    refuses("-steps 3", "unknown flag '-steps'; did you mean --steps?");
    refuses("-b8", "unknown flag '-b8'; did you mean -b with the value '8'?");
    refuses("-sl=5", "unknown flag '-sl=5'; did you mean -sl with the value '5'?");
    refuses("--learning-rate 3", "unknown flag '--learning-rate'; --help lists all");
    refuses("--Data 3", "unknown flag '--Data'; --help lists all");  // a heading is no flag
    refuses("-p 3", "unknown flag '-p'; --help lists all");
    refuses("-5", "unknown flag '-5'; --help lists all");
    refuses("--", "unknown flag '--'; --help lists all");
    refuses("--=5", "unknown flag '--=5'; --help lists all");
    char longest[400], message[400];  // is cut in the message, between characters, and is near to nothing
    memset(longest, 'x', sizeof(longest));
    memcpy(longest, "--", 2);
    memcpy(longest + 199, "µµµ", 7);
    snprintf(message, sizeof(message), "unknown flag '%.199s'…; --help lists all", longest);
    refuses_words(longest, NULL, message);
}

static void dropped_flags_of_llmc_name_ours(void**) {
    refuses("-b 4 -f 1", "-f of llm.c is not carried: matmul precision follows --recipe");
    refuses("-ge 2", "-ge of llm.c is not carried: GELU is always fused");
    refuses("--ge 2", "unknown flag '--ge'; --help lists all");
}

static void stray_arguments_are_refused(void**) {
    refuses("data.bin", "stray argument 'data.bin'; values follow their flag, and --help lists the flags");
    refuses("-", "stray argument '-'; values follow their flag, and --help lists the flags");
    refuses_words("", NULL, "stray argument ''; values follow their flag, and --help lists the flags");
    refuses("--lr 3 4", "stray argument '4'; values follow their flag, and --help lists the flags");
    refuses("-i a.bin b.bin", "stray argument 'b.bin' after --train-data; quote a pattern, or the shell expands it");
    refuses_words("a\nb\x7f", NULL, "stray argument 'a?b?'; values follow their flag, and --help lists the flags");
}

static void values_print_as_typed(void**) {
    defaults();
    assert_string_equal(value_of("lr"), "0.0003");
    assert_string_equal(value_of("train-data"), "none");
    assert_string_equal(value_of("tie-embeddings"), "on");
    assert_string_equal(value_of("resume"), "off");
    args.seed = INT64_MIN;
    assert_string_equal(value_of("seed"), "-9223372036854775808");
    struct { double value; const char* text; } cases[] = {{1e-8, "1e-8"}, {0.1 + 0.2, "0.30000000000000004"}, {1e22, "1e22"},
        {-1.5e-10, "-1.5e-10"}, {700, "700"}, {20000, "20000"}, {1e100, "1e100"}, {0, "0"}, {1.0 / 3, "0.3333333333333333"},
        {DBL_MIN, "2.2250738585072014e-308"}};
    for (auto& c : cases) {
        args.clip = c.value;
        assert_string_equal(value_of("clip"), c.text);
    }
    char small[4];
    volatile size_t size = sizeof(small);  // unseen by the compiler, which else warns that the text is cut
    option_value_text(small, size, find_option(&options, "lr", 2));
    assert_string_equal(small, "0.0");
}

// Every line of a text is at most width columns wide.
static void expect_width(const char* text, int width) {
    for (const char* line = text; *line != '\0';) {
        size_t length = strcspn(line, "\n");
        assert_true(display_width(line, length) <= width);
        assert_true(length == 0 || line[length - 1] != ' ');
        line += length + (line[length] == '\n');
    }
}

static void help_shows_the_whole_table(void**) {
    Ending ending = run_child([] { parse("--lr 9 --nonsense --help"); });  // wins over all else, and shows the program's defaults
    assert_int_equal(ending.status, 0);
    assert_string_equal(ending.err, "");
    expect_width(ending.out, 100);
    assert_ptr_equal(strstr(ending.out, options.usage), ending.out);
    const char* at = ending.out;
    for (const Option& row : rows) {  // all of them, in order
        char head[128];
        const char *space = row.value_name != NULL ? " " : "", *value = row.value_name != NULL ? row.value_name : "";
        if (row.type == OPTION_GROUP) {
            snprintf(head, sizeof(head), "\n\n%s\n", row.name);
        } else if (row.llmc != NULL) {
            snprintf(head, sizeof(head), " -%s, --%s%s%s", row.llmc, row.name, space, value);
        } else {
            snprintf(head, sizeof(head), "\n       --%s%s%s", row.name, space, value);
        }
        at = strstr(at, head);
        if (at == NULL) { print_error("missing or out of order: %s\n", head); }
        assert_non_null(at);
        at++;
    }
    const char* lines[] = {
        "   -b, --micro-batch N       sequences a micro-batch (default: 4)\n",
        "   -l, --lr F                peak learning rate (default: 0.0003)\n",
        "  -nk, --keep N              newest checkpoints that stay (default: 0)\n",
        "   -z, --zero N              ZeRO stage (0 to 2; default: 1)\n",
        "       --beta1 F             decay of the first moment (0 or more, below 1; default: 0.9)\n",
        "   -k, --lr-schedule S       shape of the decay (one of cosine, linear, constant, wsd; default:\n"
        "                             cosine)\n",
        "   -d, --global-batch N      tokens a step (default: micro-batch × seq-len × DP)\n",
        "       --tie-embeddings      the head's matrix is the embedding's (default: on)\n",
        "       --bf16-layers SPEC    layers that stay in BF16 (default: first:0,last:0)\n",
        "       --grad-dtype fp32|bf16|e4m3|e5m2\n"
        "                             gradients on the wire (one of fp32, bf16, e4m3 (= fp8), e5m2; default:\n"
        "                             by recipe)\n",
        "       --help                this text\n",
        "\nOf llm.c's flags these are not carried: -f, -ge.\n",
    };
    for (const char* line : lines) {
        if (strstr(ending.out, line) == NULL) { print_error("not in --help: %s\n%s", line, ending.out); }
        assert_non_null(strstr(ending.out, line));
    }
}

static void a_lone_h_asks_for_help(void**) {
    Ending ending = run_child([] { parse("-h"); });
    assert_int_equal(ending.status, 0);
    assert_non_null(strstr(ending.out, "--micro-batch"));
    refuses("-b 3 -h", "-h (--eval-data) needs a value FILE");
    ending = run_child([] {  // one voice is enough
        process.rank = 1;
        parse("--help");
    });
    assert_int_equal(ending.status, 0);
    assert_string_equal(ending.out, "");
}

static void help_that_cannot_be_written_fails(void**) {
    Ending ending = run_child([] {
        if (freopen("/dev/full", "w", stdout) == NULL) { _exit(98); }
        parse("--help");
    });
    assert_int_equal(ending.status, 1);
    assert_string_equal(ending.err, "train_gpt_fp8: --help: cannot write: No space left on device\n");
}

static void narrow_help_wraps(void**) {
    static char text[16384];
    defaults();
    for (int width = 60; width <= 120; width += 7) {
        FILE* file = tmpfile();
        assert_non_null(file);
        print_options_help(file, &options, width);
        read_all(file, text, sizeof(text));
        expect_width(text, width);
    }
}

static void wrong_tables_are_found(void**) {
    static bool flag;
    static int64_t number;
    static const RefusedFlag refused[] = {{"f", "no"}};
    struct { Option a, b; const char* message; } cases[] = {
        {option_flag("x", NULL, &flag, ""), option_int("x", NULL, &number, 0, 1, "N", ""), "--x stands there twice"},
        {option_flag("x", "a", &flag, ""), option_flag("y", "a", &flag, ""), "-a stands there twice"},
        {option_flag("x", "abc", &flag, ""), option_flag("y", NULL, &flag, ""), "-abc: one or two letters are allowed"},
        {option_flag("x", "f", &flag, ""), option_flag("y", NULL, &flag, ""), "-f is both carried and refused"},
        {option_flag("help", NULL, &flag, ""), option_flag("y", NULL, &flag, ""), "--help is built in"},
        {option_flag("x", NULL, NULL, ""), option_flag("y", NULL, &flag, ""), "row 0 lacks a field"},
        {option_int("x", NULL, &number, 0, 1, NULL, ""), option_flag("y", NULL, &flag, ""), "--x has no name for its value"},
        {option_custom("x", NULL, &number, parse_bf16_layers, NULL, "", ""), option_flag("y", NULL, &flag, ""), "--x lacks parse or print"},
    };
    for (auto& c : cases) {
        Ending ending = run_child([&] {
            Option items[] = {c.a, c.b};
            Options table = {items, 2, refused, 1, ""};
            char* argv[] = {(char*)"train_gpt_fp8", NULL};
            parse_options(&table, 1, argv);
        });
        char line[128];
        snprintf(line, sizeof(line), "train_gpt_fp8: option table: %s\n", c.message);
        assert_string_equal(ending.err, line);
        assert_int_equal(ending.status, 1);
    }
}

static void edit_distance_counts_slips(void**) {
    struct { const char *a, *b; int distance; } cases[] = {{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3},
        {"ab", "ba", 1}, {"steps", "setps", 1}, {"ca", "abc", 3}, {"A_b", "a-B", 0}, {"flaw", "lawn", 2}};
    for (auto& c : cases) { assert_int_equal(edit_distance(c.a, strlen(c.a), c.b, strlen(c.b)), c.distance); }
    char wide[60];
    memset(wide, 'a', sizeof(wide));
    assert_int_equal(edit_distance(wide, 48, wide, 48), 0);
    assert_int_equal(edit_distance(wide, 49, wide, 49), INT32_MAX);  // too long to be a slip, and for the table
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nothing_given_leaves_defaults),
        cmocka_unit_test(long_options_take_both_spellings),
        cmocka_unit_test(the_last_of_several_wins),
        cmocka_unit_test(an_llmc_command_line_means_the_same),
        cmocka_unit_test(given_options_outrank_recipes),
        cmocka_unit_test(whole_numbers_are_checked),
        cmocka_unit_test(numbers_are_checked),
        cmocka_unit_test(flags_take_a_value_only_in_llmc_spelling),
        cmocka_unit_test(strings_are_taken_as_they_are),
        cmocka_unit_test(choices_are_checked),
        cmocka_unit_test(custom_parsers_speak),
        cmocka_unit_test(missing_values_are_seen),
        cmocka_unit_test(unknown_flags_name_the_nearest),
        cmocka_unit_test(dropped_flags_of_llmc_name_ours),
        cmocka_unit_test(stray_arguments_are_refused),
        cmocka_unit_test(values_print_as_typed),
        cmocka_unit_test(help_shows_the_whole_table),
        cmocka_unit_test(a_lone_h_asks_for_help),
        cmocka_unit_test(help_that_cannot_be_written_fails),
        cmocka_unit_test(narrow_help_wraps),
        cmocka_unit_test(wrong_tables_are_found),
        cmocka_unit_test(edit_distance_counts_slips),
    };
    atexit(fail_if_early);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    may_exit = true;
    return failed;
}
