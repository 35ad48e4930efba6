// Tests of core/matmul_choice.h, and of how matmul.cuh uses it: lines of text that a choice survives, damage that is seen, tables of several devices and
// ranks, the file. The timing itself, and the library's algorithms, are tested where a GPU is: this build's library has one algorithm a shape.
#include "check.h"
#include "../core/matmul.cuh"
#include <fcntl.h>
#include <set>

static const char* const device = "NVIDIA_H100_80GB_HBM3/130101";

static MatmulShape shape_of(int m, int n, int k) {
    MatmulShape s;
    memset(&s, 0, sizeof(s));
    s.m = m; s.n = n; s.k = k; s.batch = 1;
    s.a_ld = s.b_ld = k; s.d_ld = n;
    s.a_dtype = E4M3; s.b_dtype = E4M3; s.d_dtype = BF16; s.bias_dtype = FP32;
    s.b_transposed = true;
    return s;
}

static MatmulAlgorithm algorithm_of(int number) {
    MatmulAlgorithm a;
    for (int i = 0; i < 64; i++) { a.bytes[i] = (uint8_t)(number * 37 + i * 5); }
    return a;
}

static void add(MatmulChoices* table, const std::string& on, const MatmulShape* s, int number) {
    MatmulAlgorithm a = algorithm_of(number);
    table->emplace(choice_key(on, s), choice_hex(&a));
}

static void algorithms_survive_as_text(void**) {
    for (int number = 0; number < 300; number++) {
        MatmulAlgorithm a = algorithm_of(number), b = {};
        std::string text = choice_hex(&a);
        assert_int_equal(text.size(), 128);
        assert_true(choice_unhex(&b, text));
        assert_memory_equal(&a, &b, sizeof(a));
    }
    MatmulAlgorithm a;
    for (const char* wrong : {"", "00", "zz"}) { assert_false(choice_unhex(&a, wrong)); }
    assert_false(choice_unhex(&a, std::string(127, '0')));
    assert_false(choice_unhex(&a, std::string(127, '0') + "A"));
    assert_false(choice_unhex(&a, std::string(127, '0') + "/"));
    assert_false(choice_unhex(&a, std::string(129, '0')));
}

// Fails where a field is left out of the text: one shape would take another's algorithm
static void each_field_makes_another_shape(void**) {
    std::set<std::string> seen;
    MatmulShape s = shape_of(4096, 2304, 768);
    auto expect_new = [&](const MatmulShape& x) {
        if (!seen.insert(choice_shape(&x)).second) { fail_msg("%s is two shapes", choice_shape(&x).c_str()); }
    };
    expect_new(s);
    for (int i = 0; i < 21; i++) {
        MatmulShape x = s;
        int* sizes[] = {&x.m, &x.n, &x.k, &x.batch};
        int64_t* strides[] = {&x.a_ld, &x.b_ld, &x.d_ld, &x.a_stride, &x.b_stride, &x.d_stride};
        bool* flags[] = {&x.a_transposed, &x.b_transposed, &x.bias, &x.accumulate, &x.fast_accumulate, &x.unaligned};
        uint8_t* types[] = {&x.a_dtype, &x.b_dtype, &x.d_dtype};
        if (i < 4) { *sizes[i] += 16; }
        else if (i < 10) { *strides[i - 4] += 16; }
        else if (i < 16) { *flags[i - 10] = !*flags[i - 10]; }
        else if (i < 19) { *types[i - 16] = E5M2; }
        else { *(i == 19 ? &x.a_scaling : &x.b_scaling) = SCALE_VEC128; }
        expect_new(x);
    }
    s.bias = true;
    s.bias_dtype = BF16;
    expect_new(s);
    MatmulShape blocks = s;
    blocks.a_scaling = SCALE_VEC128;
    blocks.b_scaling = SCALE_BLK128;
    expect_new(blocks);
    assert_string_equal(choice_shape(&blocks).c_str(), "4096,2304,768,1;768,768,2304;0,0,0;e4m3v,e4m3bT,bf16,bf16");
    assert_string_equal(choice_shape(&s).c_str(), "4096,2304,768,1;768,768,2304;0,0,0;e4m3,e4m3T,bf16,bf16");
    s.a_ld = s.b_ld = s.d_ld = s.a_stride = s.b_stride = s.d_stride = INT64_MIN;  // the longest
    s.m = s.n = s.k = s.batch = INT_MIN;
    s.a_transposed = s.accumulate = s.fast_accumulate = s.unaligned = true;
    assert_string_equal(choice_shape(&s).c_str() + choice_shape(&s).size() - 15, ",fast,unaligned");
    assert_int_equal(choice_shape(&s).find(' '), std::string::npos);
}

static void devices_have_names_without_blanks(void**) {
    assert_string_equal(choice_device("NVIDIA H100 80GB HBM3", 130101).c_str(), device);
    assert_string_equal(choice_device("A/B\n\t..", 1).c_str(), "A_B__../1");
    assert_true(choice_device("NVIDIA H200", 130101) != choice_device("NVIDIA H200", 130102));
}

static void tables_survive_as_text(void**) {
    MatmulChoices table, again;
    for (int i = 0; i < 20; i++) {
        MatmulShape s = shape_of(16 * i + 16, 48, 64);
        add(&table, i % 2 == 0 ? device : "NVIDIA_H200/130101", &s, i);
    }
    std::string text = choices_text(table);
    assert_int_equal(choices_parse(&again, text), 0);
    assert_true(table == again);
    assert_int_equal(choices_parse(&again, "# a remark\n\n" + text + "\n"), 0);
    assert_true(table == again);
    // in another order, without the last line's end, twice: the same table, and so the same text
    again.clear();
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size(); at = text.find('\n', at) + 1) { lines.push_back(text.substr(at, text.find('\n', at) - at)); }
    std::string back;
    for (size_t i = lines.size(); i-- > 0;) { back += lines[i] + (i > 0 ? "\n" : ""); }
    assert_int_equal(choices_parse(&again, back + "\n" + text), 0);
    assert_string_equal(choices_text(again).c_str(), text.c_str());
}

// Fails where what was read later replaces what was read first: then ranks and runs would not agree
static void the_first_line_counts(void**) {
    MatmulShape s = shape_of(16, 16, 16), other = shape_of(32, 16, 16);
    MatmulChoices first, second, both;
    add(&first, device, &s, 1);
    add(&second, device, &s, 2);
    add(&second, device, &other, 3);
    add(&second, "NVIDIA_H200/130101", &s, 4);
    assert_int_equal(choices_parse(&both, choices_text(first) + choices_text(second)), 0);
    assert_int_equal(both.size(), 3);
    assert_true(both[choice_key(device, &s)] == first[choice_key(device, &s)]);
}

// Every byte of a line that is changed, left out or cut off makes it say nothing, and only it
static void damage_is_seen(void**) {
    MatmulShape s = shape_of(16, 32, 48), t = shape_of(64, 32, 48);
    MatmulChoices table;
    add(&table, device, &s, 1);
    std::string line = choices_text(table);
    line.pop_back();
    MatmulChoices whole;
    add(&whole, device, &t, 2);
    std::string good = choices_text(whole);
    for (size_t i = 0; i < line.size(); i++) {
        for (int kind = 0; kind < 4; kind++) {
            std::string bad = line;
            if (kind == 0) { bad[i] = (char)(bad[i] ^ 1); }
            else if (kind == 1) { bad.erase(i, 1); }
            else if (kind == 2) { bad.insert(i, 1, ' '); }
            else { bad.resize(i); }
            if (bad.empty() || bad[0] == '#' || bad.find('\n') != std::string::npos) { continue; }
            MatmulChoices read;
            if (choices_parse(&read, bad + "\n" + good) != 1) { fail_msg("not seen: %s", bad.c_str()); }
            assert_true(read == whole);
        }
    }
    MatmulChoices read;
    assert_int_equal(choices_parse(&read, std::string("\0\0\0\n \n  \nabc\n", 13)), 4);
    assert_int_equal(choices_parse(&read, std::string(100000, 'x')), 1);
    assert_true(read.empty());
}

static void the_fastest_is_taken_unless_it_gains_nothing(void**) {
    const struct { std::vector<double> seconds; int want; } cases[] = {
        {{1.0}, 0}, {{1.0, 0.99}, 0}, {{1.0, 0.985, 0.981}, 0}, {{1.0, 0.97}, 1}, {{1.0, 0.97, 0.5, 0.5}, 2}, {{1.0, 2.0}, 0},
        {{INFINITY, 3.0, 2.0}, 2}, {{1.0, INFINITY}, 0}, {{INFINITY, INFINITY}, 0}};
    for (auto& x : cases) { assert_int_equal(choose_fastest(x.seconds.data(), (int)x.seconds.size()), x.want); }
}

// ---- files ----

static std::string folder;

static std::string text_of(const std::string& path) {
    FILE* f = fopen(path.c_str(), "r");
    if (f == NULL) { return "none"; }
    char text[1 << 16];
    size_t n = fread(text, 1, sizeof(text), f);
    fclose(f);
    return std::string(text, n);
}
static void write_to(const std::string& path, const std::string& text) {
    FILE* f = fopen(path.c_str(), "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text.data(), 1, text.size(), f), text.size());
    fclose(f);
}

static void files_are_found_by_gpu_and_version(void**) {
    setenv("XDG_CACHE_HOME", "/var/cache/me", 1);
    setenv("HOME", "/home/me", 1);
    assert_string_equal(choices_path(device).c_str(), "/var/cache/me/train_gpt_fp8/matmul-NVIDIA_H100_80GB_HBM3-130101.txt");
    setenv("XDG_CACHE_HOME", "relative", 1);  // the specification has such a value ignored
    assert_string_equal(choices_path(device).c_str(), "/home/me/.cache/train_gpt_fp8/matmul-NVIDIA_H100_80GB_HBM3-130101.txt");
    unsetenv("XDG_CACHE_HOME");
    assert_string_equal(choices_path("a/1").c_str(), "/home/me/.cache/train_gpt_fp8/matmul-a-1.txt");
    unsetenv("HOME");
    assert_string_equal(choices_path(device).c_str(), "");
    setenv("HOME", "", 1);
    assert_string_equal(choices_path(device).c_str(), "");
}

static void files_gain_lines_and_keep_their_own(void**) {
    std::string path = folder + "/new/cache/choices.txt";
    MatmulShape s = shape_of(16, 16, 16), t = shape_of(32, 16, 16);
    MatmulChoices first, second, read, want;
    add(&first, device, &s, 1);
    assert_string_equal(choices_read(path.c_str()).c_str(), "");
    assert_true(choices_save(path.c_str(), first));
    assert_int_equal(choices_parse(&read, choices_read(path.c_str())), 0);
    assert_true(read == first);
    struct stat status;
    assert_int_equal(stat(path.c_str(), &status), 0);
    mode_t mask = umask(0);
    umask(mask);
    assert_int_equal(status.st_mode & 0777, 0666 & ~mask);
    add(&second, device, &s, 2);
    add(&second, "NVIDIA_H200/130101", &t, 3);
    assert_true(choices_save(path.c_str(), second));
    want = first;
    want.insert(second.begin(), second.end());
    read.clear();
    assert_int_equal(choices_parse(&read, choices_read(path.c_str())), 0);
    assert_true(read == want && read[choice_key(device, &s)] == first[choice_key(device, &s)]);
    // nothing new: the file is left alone
    std::string before = text_of(path);
    ino_t number = 0;
    assert_int_equal(stat(path.c_str(), &status), 0);
    number = status.st_ino;
    assert_true(choices_save(path.c_str(), second));
    assert_int_equal(stat(path.c_str(), &status), 0);
    assert_true(status.st_ino == number && text_of(path) == before);
    // a file that was cut short keeps its whole lines, and what is damaged goes
    write_to(path, before.substr(0, before.size() - 20));
    assert_true(choices_save(path.c_str(), first));
    read.clear();
    assert_int_equal(choices_parse(&read, choices_read(path.c_str())), 0);
    assert_int_equal(read.size(), 1);
    write_to(path, "");
    assert_true(choices_save(path.c_str(), want));
    assert_true(text_of(path) == before);
    assert_int_equal(system(("[ \"$(ls '" + folder + "/new/cache')\" = choices.txt ]").c_str()), 0);  // nothing is left beside it
}

static void files_that_cannot_be_written_are_told(void**) {
    MatmulShape s = shape_of(16, 16, 16);
    MatmulChoices table;
    add(&table, device, &s, 1);
    write_to(folder + "/file", "not a folder\n");
    assert_false(choices_save((folder + "/file/below").c_str(), table));
    assert_int_equal(errno, ENOTDIR);
    assert_false(choices_save("/proc/below/choices.txt", table));
    assert_int_equal(mkdir((folder + "/folder").c_str(), 0777), 0);
    assert_false(choices_save((folder + "/folder").c_str(), table));
    assert_int_equal(errno, EISDIR);
    assert_string_equal(choices_read((folder + "/folder").c_str()).c_str(), "");
    assert_string_equal(choices_read("/dev/zero").c_str(), "");  // would not end
    write_to(folder + "/large", std::string(CHOICES_BYTES + 100000, '#'));
    assert_true(choices_read((folder + "/large").c_str()).size() < CHOICES_BYTES + 8192);
    assert_true(text_of(folder + "/file") == "not a folder\n");
}

static int make_folder(void**) {
    char name[] = "/tmp/matmul_choice.XXXXXX";
    if (mkdtemp(name) == NULL) { return -1; }
    folder = name;
    return 0;
}
static int remove_folder(void**) { return system(("rm -rf '" + folder + "'").c_str()); }

// ---- matmul.cuh ----

// A library with one algorithm a shape: nothing is timed, nothing written, and what is read is kept for whom it concerns without harm
static void where_there_is_no_choice_nothing_happens(void**) {
    if (device_is_gpu) { skip(); }
    Matmul mm;
    matmul_create(&mm);
    MatmulShape s = shape_of(16, 32, 48);
    MatmulCall c = matmul_shape_call(&s, NULL, NULL, NULL, NULL, NULL);
    matmul_plan(&mm, &c);
    assert_int_equal(matmul_choose(&mm, 1.0, NULL), 0);
    std::string text = "unset";
    matmul_choices_write(&mm, &text);
    assert_string_equal(text.c_str(), "");
    MatmulChoices table;
    add(&table, *mm.device, &s, 1);
    assert_int_equal(matmul_choices_read(&mm, (choices_text(table) + "damaged\n").c_str()), 1);
    s.m = 32;
    c = matmul_shape_call(&s, NULL, NULL, NULL, NULL, NULL);
    matmul_plan(&mm, &c);
    int shapes, others;
    matmul_choices_count(&mm, &shapes, &others);
    assert_int_equal(shapes + others, 0);
    matmul_destroy(&mm);
}

// The call that is timed is the one that was planned, and fits the memory that is set aside for it
static void a_shapes_call_is_of_that_shape(void**) {
    if (device_is_gpu) { skip(); }  // not all of these are for a GPU
    Matmul mm;
    matmul_create(&mm);
    for (int i = 0; i < 64; i++) {
        MatmulCall c = {};
        bool a_t = i & 1, b_t = i & 2, sum = i & 4, fp8 = i & 8, bias = i & 16, gaps = i & 32;
        float some[16 * 64] = {}, descale = 1.0f;
        c.m = 16; c.n = 32; c.k = 48; c.batch = gaps ? 2 : 1;
        c.d_dtype = sum ? FP32 : BF16;
        c.d_ld = c.n + (gaps ? 16 : 0);
        c.a = Operand{some, fp8 ? E5M2 : BF16, fp8 ? &descale : NULL, (a_t ? c.m : c.k) + (gaps ? 16 : 0), 0, a_t};
        c.b = Operand{some, fp8 ? E4M3 : BF16, fp8 ? &descale : NULL, (b_t ? c.k : c.n) + (gaps ? 16 : 0), 0, b_t};
        if (gaps) {
            c.a.batch_stride = c.a.ld * 64;
            c.b.batch_stride = c.b.ld * 64;
            c.d_batch_stride = c.d_ld * 64;
        }
        c.d = some;
        c.bias = bias ? some : NULL;
        c.bias_dtype = BF16;
        c.accumulate = sum;
        c.fast_accumulate = !sum;
        MatmulEntry* e = matmul_entry(&mm, &c, true);
        MatmulCall again = matmul_shape_call(&e->shape, some, some, some, some, &descale);
        assert_ptr_equal(matmul_entry(&mm, &again, true), e);
        assert_ptr_equal(again.a.descale, c.a.descale);
        assert_ptr_equal(again.b.descale, c.b.descale);
        int64_t a_rows = a_t ? c.k : c.m, a_cols = a_t ? c.m : c.k;
        assert_int_equal(a_bytes_of(&e->shape), ((c.batch - 1) * c.a.batch_stride + (a_rows - 1) * c.a.ld + a_cols) * dtype_bytes(c.a.dtype));
        int64_t b_rows = b_t ? c.n : c.k, b_cols = b_t ? c.k : c.n;
        assert_int_equal(b_bytes_of(&e->shape), ((c.batch - 1) * c.b.batch_stride + (b_rows - 1) * c.b.ld + b_cols) * dtype_bytes(c.b.dtype));
        assert_int_equal(d_bytes_of(&e->shape), ((c.batch - 1) * c.d_batch_stride + (c.m - 1) * c.d_ld + c.n) * dtype_bytes(c.d_dtype));
    }
    matmul_destroy(&mm);
}

// Operands that are timed are finite numbers of [-1, 1] in each format
static void operands_are_random_numbers(void**) {
    constexpr size_t N = 10000;
    auto check = [&](auto value, DType t) {
        typedef decltype(value) T;
        std::vector<T> x(N);
        fill_operand(x.data(), N * sizeof(T), t, 3, NULL);
        double sum = 0.0, squares = 0.0;
        for (const T& v : x) {
            double f = (double)to_float(v);
            assert_true(f >= -1.0 && f <= 1.0);
            sum += f;
            squares += f * f;
        }
        assert_true(fabs(sum / N) < 0.03 && fabs(squares / N - 1.0 / 3.0) < 0.03);
    };
    if (device_is_gpu) { skip(); }
    check(e4m3{}, E4M3);
    check(e5m2{}, E5M2);
    check(bf16{}, BF16);
    check(float{}, FP32);
}

// ---- on a GPU ----

// The three products of a linear layer in FP8, and some others
static std::vector<MatmulShape> training_shapes(int rows, int in, int out) {
    MatmulShape y = shape_of(rows, out, in), dx = shape_of(rows, in, out), dw = shape_of(out, in, rows), head = shape_of(rows, out, in);
    y.fast_accumulate = y.bias = true;
    y.bias_dtype = BF16;
    dx.a_dtype = dw.a_dtype = E5M2;
    dx.b_transposed = dw.b_transposed = false;
    dx.b_ld = in;
    dw.a_transposed = true;
    dw.a_ld = out;
    dw.b_ld = in;
    dw.d_dtype = FP32;
    head.a_dtype = head.b_dtype = BF16;
    MatmulShape sum = dw, plain = dw;
    sum.accumulate = true;
    plain.a_dtype = plain.b_dtype = BF16;
    return {y, dx, dw, sum, head, plain};
}

static void plan_shapes(Matmul* mm, const std::vector<MatmulShape>& shapes) {
    for (const MatmulShape& s : shapes) {
        MatmulCall c = matmul_shape_call(&s, NULL, NULL, NULL, "bias", NULL);
        matmul_plan(mm, &c);
    }
}
static std::string names(const Matmul* mm) {
    std::string text;
    for (const MatmulEntry* e : *mm->order) { text += std::string(kernel_name(e->kernel)) + "\n"; }
    return text;
}

// What was timed once is what every later run takes, whether it hears of it before or after it plans, and is not timed again
static void choices_are_made_once(void**) {
    if (!device_is_gpu) { skip(); }
    std::vector<MatmulShape> shapes = training_shapes(4096, 768, 3072);
    Matmul first, second, third;
    std::string text, again;
    int count, others;
    matmul_create(&first);
    plan_shapes(&first, shapes);
    double start = wall_seconds();
    int timed = matmul_choose(&first, 10.0, NULL);
    matmul_choices_count(&first, &count, &others);
    print_message("%d shapes timed in %.2f s, %d not the library's first, on %s\n%s", timed, wall_seconds() - start, others, first.device->c_str(),
                  names(&first).c_str());
    assert_int_equal(count, shapes.size());
    assert_int_equal(matmul_choose(&first, 10.0, NULL), 0);
    matmul_choices_write(&first, &text);
    matmul_create(&second);
    assert_int_equal(matmul_choices_read(&second, text.c_str()), 0);
    plan_shapes(&second, shapes);
    assert_string_equal(names(&second).c_str(), names(&first).c_str());
    assert_int_equal(matmul_choose(&second, 10.0, NULL), 0);
    matmul_create(&third);
    plan_shapes(&third, shapes);
    assert_int_equal(matmul_choices_read(&third, text.c_str()), 0);
    assert_string_equal(names(&third).c_str(), names(&first).c_str());
    matmul_choices_write(&third, &again);
    assert_string_equal(again.c_str(), text.c_str());
    for (Matmul* mm : {&first, &second, &third}) { matmul_destroy(mm); }
}

// Without time for any the library's first are chosen, and stay
static void out_of_time_the_librarys_first_is_taken(void**) {
    if (!device_is_gpu) { skip(); }
    Matmul plain, chosen;
    matmul_create(&plain);
    matmul_create(&chosen);
    plan_shapes(&plain, training_shapes(512, 256, 1024));
    plan_shapes(&chosen, training_shapes(512, 256, 1024));
    assert_int_equal(matmul_choose(&chosen, -1.0, NULL), 0);
    assert_string_equal(names(&chosen).c_str(), names(&plain).c_str());
    assert_int_equal(chosen.choices->size(), plain.order->size());
    assert_int_equal(matmul_choose(&chosen, 10.0, NULL), 0);
    matmul_destroy(&plain);
    matmul_destroy(&chosen);
}

// What comes out is the same product whichever algorithm makes it
static void all_algorithms_give_the_product(void**) {
    if (!device_is_gpu) { skip(); }
    Matmul mm;
    matmul_create(&mm);
    std::vector<MatmulShape> shapes = training_shapes(1024, 512, 1536);
    plan_shapes(&mm, shapes);
    void* workspace = device_alloc(mm.planned);
    matmul_set_workspace(&mm, workspace, mm.planned);
    float* descale = (float*)device_alloc(16);
    float one[4] = {1.0f};
    copy_to_device(descale, one, sizeof(one), NULL);
    for (MatmulEntry* e : *mm.order) {
        const MatmulShape* s = &e->shape;
        size_t bytes = d_bytes_of(s), elements = (size_t)s->m * (size_t)s->n;
        void *a = device_alloc(a_bytes_of(s)), *b = device_alloc(b_bytes_of(s)), *d = device_alloc(bytes), *bias = device_alloc((size_t)s->n * 2);
        fill_operand(a, a_bytes_of(s), (DType)s->a_dtype, 0, NULL);
        fill_operand(b, b_bytes_of(s), (DType)s->b_dtype, 1, NULL);
        fill_operand(bias, (size_t)s->n * 2, BF16, 2, NULL);
        MatmulCall c = matmul_shape_call(s, d, a, b, bias, descale);
        std::vector<float> want(elements);
        for (int i = 0; i < kernel_algorithms(e->kernel); i++) {
            MatmulAlgorithm algorithm = kernel_algorithm(e->kernel, i);
            assert_true(kernel_take(&mm, e, &algorithm));
            device_zero(d, bytes, NULL);
            matmul(&mm, &c, NULL);
            std::vector<char> raw(bytes);
            copy_to_host(raw.data(), d, bytes, NULL);
            double off = 0.0, size = 0.0;
            for (size_t k = 0; k < elements; k++) {
                float v = s->d_dtype == FP32 ? ((const float*)raw.data())[k] : to_float(((const bf16*)raw.data())[k]);
                if (i == 0) { want[k] = v; }
                off += ((double)v - want[k]) * ((double)v - want[k]);
                size += (double)want[k] * want[k];
            }
            if (!(size > 0.0) || !(sqrt(off / size) < 0.004)) { fail_msg("%s: algorithm %d is off by %g", choice_shape(s).c_str(), i, sqrt(off / size)); }
        }
        for (void* p : {a, b, d, bias}) { device_free(p); }
    }
    device_free(descale);
    device_free(workspace);
    matmul_destroy(&mm);
}

// The library's products of operands scaled by block are those of the same operands decoded, forward, of dX and of dW; blocks at the ends are short
static void products_of_blocks_are_those_of_decoded_operands(void**) {
    if (!device_is_gpu) { skip(); }
    Matmul mm;
    matmul_create(&mm);
    if (mm.capability != 90) { matmul_destroy(&mm); skip(); }
    std::vector<MatmulShape> shapes = training_shapes(656, 400, 1008);
    shapes.resize(4);
    for (MatmulShape& s : shapes) {
        s.a_dtype = E4M3;
        s.a_scaling = SCALE_VEC128;
        s.b_scaling = s.a_transposed ? SCALE_VEC128 : SCALE_BLK128;
    }
    shapes.push_back(shapes[1]);
    shapes.back().a_dtype = E5M2;
    plan_shapes(&mm, shapes);
    matmul_choose(&mm, 10.0, NULL);
    for (const MatmulShape& s : shapes) {
        size_t a_bytes = a_bytes_of(&s), b_bytes = b_bytes_of(&s), d_bytes = d_bytes_of(&s);
        size_t scales[] = {operand_scales((OperandScale)s.a_scaling, s.m, s.k), operand_scales((OperandScale)s.b_scaling, s.n, s.k)};
        void *a = device_alloc(a_bytes), *b = device_alloc(b_bytes), *d[] = {device_alloc(d_bytes), device_alloc(d_bytes)};
        void* wide[] = {device_alloc(2 * a_bytes), device_alloc(2 * b_bytes)};  // decoded
        void* bias = device_alloc((size_t)s.n * 2);
        fill_operand(a, a_bytes, (DType)s.a_dtype, 0, NULL);
        fill_operand(b, b_bytes, (DType)s.b_dtype, 1, NULL);
        fill_operand(bias, (size_t)s.n * 2, BF16, 2, NULL);
        float* descales[2];
        for (int i = 0; i < 2; i++) {
            std::vector<float> values(scales[i]);
            for (size_t k = 0; k < values.size(); k++) { values[k] = exp2_int((int)(mix64(k + 1000 * (size_t)i) % 9) - 4); }
            descales[i] = (float*)device_alloc(values.size() * sizeof(float));
            copy_to_device(descales[i], values.data(), values.size() * sizeof(float), NULL);
            stream_sync(NULL);
        }
        MatmulCall c = matmul_shape_call(&s, d[0], a, b, bias, NULL), bare = c;
        c.a.descale = descales[0];
        c.b.descale = descales[1];
        convert_operand((bf16*)wide[0], c.a.ld, &c.a, s.a_transposed ? s.k : s.m, s.a_transposed ? s.m : s.k, 1, !s.a_transposed, NULL);
        convert_operand((bf16*)wide[1], c.b.ld, &c.b, s.b_transposed ? s.n : s.k, s.b_transposed ? s.k : s.n, 1, s.b_transposed, NULL);
        bare.d = d[1];
        bare.a = Operand{wide[0], BF16, NULL, c.a.ld, 0, c.a.transposed};
        bare.b = Operand{wide[1], BF16, NULL, c.b.ld, 0, c.b.transposed};
        matmul_plan(&mm, &bare);
        void* workspace = device_alloc(mm.planned);
        matmul_set_workspace(&mm, workspace, mm.planned);
        std::vector<char> got[2];
        for (int i = 0; i < 2; i++) {
            device_zero(d[i], d_bytes, NULL);
            matmul(&mm, i == 0 ? &c : &bare, NULL);
            got[i].resize(d_bytes);
            copy_to_host(got[i].data(), d[i], d_bytes, NULL);
        }
        double off = 0.0, size = 0.0;
        for (size_t k = 0; k < (size_t)s.m * (size_t)s.n; k++) {
            auto value = [&](int i) { return s.d_dtype == FP32 ? (double)((const float*)got[i].data())[k] : (double)to_float(((const bf16*)got[i].data())[k]); };
            off += (value(0) - value(1)) * (value(0) - value(1));
            size += value(1) * value(1);
        }
        if (!(size > 0.0) || !(sqrt(off / size) < 0.004)) { fail_msg("%s is off by %g", choice_shape(&s).c_str(), sqrt(off / size)); }
        for (void* p : {a, b, d[0], d[1], wide[0], wide[1], bias, (void*)descales[0], (void*)descales[1], workspace}) { device_free(p); }
    }
    matmul_destroy(&mm);
}

// A line whose checksum is right, of an algorithm that the library does not know
static void an_algorithm_that_is_refused_is_forgotten(void**) {
    if (!device_is_gpu) { skip(); }
    Matmul mm;
    matmul_create(&mm);
    std::vector<MatmulShape> shapes = training_shapes(512, 256, 1024);
    MatmulChoices table;
    MatmulAlgorithm none = {};
    for (const MatmulShape& s : shapes) { table.emplace(choice_key(*mm.device, &s), choice_hex(&none)); }
    plan_shapes(&mm, shapes);
    std::string before = names(&mm);
    assert_int_equal(matmul_choices_read(&mm, choices_text(table).c_str()), 0);
    assert_string_equal(names(&mm).c_str(), before.c_str());
    assert_true(mm.choices->empty());
    assert_true(matmul_choose(&mm, 10.0, NULL) > 0);
    matmul_destroy(&mm);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(algorithms_survive_as_text), cmocka_unit_test(each_field_makes_another_shape), cmocka_unit_test(devices_have_names_without_blanks),
        cmocka_unit_test(tables_survive_as_text), cmocka_unit_test(the_first_line_counts), cmocka_unit_test(damage_is_seen),
        cmocka_unit_test(the_fastest_is_taken_unless_it_gains_nothing), cmocka_unit_test(files_are_found_by_gpu_and_version),
        cmocka_unit_test(files_gain_lines_and_keep_their_own), cmocka_unit_test(files_that_cannot_be_written_are_told),
        cmocka_unit_test(where_there_is_no_choice_nothing_happens), cmocka_unit_test(a_shapes_call_is_of_that_shape),
        cmocka_unit_test(operands_are_random_numbers), cmocka_unit_test(choices_are_made_once), cmocka_unit_test(out_of_time_the_librarys_first_is_taken),
        cmocka_unit_test(all_algorithms_give_the_product), cmocka_unit_test(products_of_blocks_are_those_of_decoded_operands),
        cmocka_unit_test(an_algorithm_that_is_refused_is_forgotten)};
    return cmocka_run_group_tests_name("matmul_choice", tests, make_folder, remove_folder);
}
