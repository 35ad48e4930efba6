// Tests of core/params.h: the table's layout, and initial values: their distribution, and that they depend on seed, tensor and element
// alone.
#include "check.h"
#include "../core/params.h"

static ParamTable table;

static void empty_table(void) { table.count = 0; table.elements = 0; }

static void offsets_are_aligned_and_apart(void**) {
    empty_table();
    const int64_t shapes[][2] = {{1, 1}, {1, 63}, {1, 64}, {1, 65}, {37, 1}, {3, 1000}, {50304, 768}};
    for (int i = 0; i < 7; i++) {
        char name[16];
        snprintf(name, sizeof(name), "p%d", i);
        Param* p = param_add(&table, name, i, shapes[i][0], shapes[i][1], i % 2 == 0 ? MATRIX : VECTOR, BF16);
        assert_int_equal(param_elements(p), shapes[i][0] * shapes[i][1]);
        assert_int_equal(p->valid_rows, shapes[i][0]);
        assert_int_equal(p->layer, i);
        assert_int_equal(p->dtype, BF16);
        assert_int_equal(p->format_class, i % 2 == 0 ? MATRIX : VECTOR);
        assert_int_equal(p->decay, shapes[i][0] > 1);  // vectors do not decay
        assert_null(p->weight);
        assert_null(p->slot);
    }
    assert_int_equal(table.count, 7);
    size_t end = 0;
    for (int i = 0; i < 7; i++) {
        const Param* p = &table.items[i];
        assert_int_equal(p->offset % PARAM_ALIGNMENT, 0);
        assert_true(p->offset >= end && p->offset < end + PARAM_ALIGNMENT);
        end = p->offset + param_elements(p);
    }
    assert_true(table.elements >= end && table.elements < end + PARAM_ALIGNMENT && table.elements % PARAM_ALIGNMENT == 0);
}

static void parameters_are_found_by_their_whole_name(void**) {
    empty_table();
    param_add(&table, "wte", -1, 10, 4, EMBEDDING, BF16);
    param_add(&table, "h1.qkvw", 1, 12, 4, MATRIX, E4M3);
    param_add(&table, "h11.qkvb", 11, 1, 12, VECTOR, BF16);
    param_add(&table, "h11.qkvw", 11, 12, 4, MATRIX, E4M3);
    param_add(&table, "h11.qkvw2", 11, 12, 4, MATRIX, E4M3);
    assert_ptr_equal(param_find(&table, "wte"), &table.items[0]);
    assert_ptr_equal(param_find(&table, "h11.qkvw"), &table.items[3]);
    assert_ptr_equal(param_find(&table, "h1.qkvw"), &table.items[1]);
    assert_null(param_find(&table, "h1.qkv"));
    assert_null(param_find(&table, "wte2"));
    assert_null(param_find(&table, ""));
}

static void padding_rows_are_not_counted(void**) {
    empty_table();
    param_add(&table, "wte", -1, 128, 8, EMBEDDING, BF16)->valid_rows = 100;
    param_add(&table, "b", 0, 1, 24, VECTOR, BF16);
    assert_int_equal(params_total(&table), 100 * 8 + 24);
}

static void more_parameters_than_the_table_holds_are_refused(void**) {
    empty_table();
    for (int i = 0; i < MAX_PARAMS; i++) { param_add(&table, "p", 0, 1, 1, VECTOR, FP32); }
    expect_end(1, "4096", NULL, [] { param_add(&table, "p", 0, 1, 1, VECTOR, FP32); });
}

// ---- initial values ----

static Param matrix(int64_t rows, int64_t cols, float std) {
    empty_table();
    Param p = *param_add(&table, "w", 0, rows, cols, MATRIX, FP32);
    p.init_std = std;
    return p;
}

// Mean, variance, skewness and kurtosis of n draws lie within 4.5 standard deviations of those of N(0, std²), and neither neighbours nor
// their squares are correlated.
static void initial_values_are_normal(void**) {
    for (uint64_t seed : {0ull, 1ull, 1337ull, ~0ull}) {
        for (float std : {1.0f, 0.02f}) {
            Param p = matrix(500, 400, std);
            size_t n = param_elements(&p);
            std::vector<float> x(n);
            param_initialise(x.data(), &p, seed);
            double m[5] = {}, neighbours = 0, squares = 0, rows = 0, largest = 0;
            for (size_t i = 0; i < n; i++) {
                double z = (double)x[i] / (double)std;
                for (int k = 1; k < 5; k++) { m[k] += pow(z, k) / (double)n; }
                if (i > 0) {
                    double before = (double)x[i - 1] / (double)std;
                    neighbours += z * before / (double)n;
                    squares += (z * z - 1.0) * (before * before - 1.0) / (double)n;
                }
                if (i >= 400) { rows += z * (double)x[i - 400] / (double)std / (double)n; }
                largest = fmax(largest, fabs(z));
            }
            double unit = 4.5 / sqrt((double)n);
            expect_near(m[1], 0.0, unit, "mean");
            expect_near(m[2], 1.0, unit * sqrt(2.0), "variance");
            expect_near(m[3], 0.0, unit * sqrt(15.0), "third moment");
            expect_near(m[4], 3.0, unit * sqrt(96.0), "fourth moment");
            expect_near(neighbours, 0.0, unit, "correlation of neighbours");
            expect_near(squares, 0.0, unit * 2.0, "correlation of neighbours' squares");
            expect_near(rows, 0.0, unit, "correlation of rows");
            assert_true(largest > 4.0 && largest < 6.7);  // the generator's 32 bits end at 6.66
        }
    }
}

// The share of draws below x is the normal distribution's, at several x
static void initial_values_have_the_normal_distribution(void**) {
    Param p = matrix(500, 400, 1.0f);
    size_t n = param_elements(&p);
    std::vector<float> x(n);
    param_initialise(x.data(), &p, 42);
    for (double at : {-3.0, -1.5, -0.5, 0.0, 0.2, 1.0, 2.0, 3.5}) {
        double share = 0.5 * erfc(-at / sqrt(2.0)), below = 0;
        for (float v : x) { below += (double)v < at; }
        expect_near(below / (double)n, share, 4.5 * sqrt(share * (1.0 - share) / (double)n), "share below %g", at);
    }
}

static void initial_values_do_not_depend_on_threads(void**) {
    Param p = matrix(129, 33, 0.02f);
    std::vector<float> first(param_elements(&p)), x(first.size());
    with_threads(1, [&] { param_initialise(first.data(), &p, 99); });
    for (int threads : {2, 3}) {
        with_threads(threads, [&] { param_initialise(x.data(), &p, 99); });
        assert_memory_equal(first.data(), x.data(), x.size() * sizeof(float));
    }
}

// Another seed or name gives other numbers, wherever in the table it stands; another shape of as many elements the same ones: only the element's number
// counts.
static void initial_values_depend_on_seed_and_name(void**) {
    Param p = matrix(40, 30, 0.02f), wide = matrix(20, 60, 0.02f);
    std::vector<float> x(1200), seed(1200), place(1200), shape(1200);
    param_initialise(x.data(), &p, 99);
    param_initialise(seed.data(), &p, 100);
    Param other = p;
    snprintf(other.name, sizeof(other.name), "x");
    param_initialise(place.data(), &other, 99);
    param_initialise(shape.data(), &wide, 99);
    assert_memory_equal(x.data(), shape.data(), 1200 * sizeof(float));
    int same = 0;
    for (size_t i = 0; i < 1200; i++) { same += (x[i] == seed[i]) + (x[i] == place[i]); }
    assert_int_equal(same, 0);
}

static void padding_rows_are_zero_and_vectors_constant(void**) {
    Param p = matrix(128, 24, 0.02f);
    p.valid_rows = 101;
    std::vector<float> x(param_elements(&p), NAN), all(x.size());
    param_initialise(x.data(), &p, 7);
    for (size_t i = 0; i < x.size(); i++) { assert_true(i < 101 * 24 ? x[i] != 0.0f : float_to_bits(x[i]) == 0); }
    p.valid_rows = 128;  // padding does not change the others
    param_initialise(all.data(), &p, 7);
    assert_memory_equal(x.data(), all.data(), 101 * 24 * sizeof(float));
    for (float value : {1.0f, 0.0f, -3.5f}) {
        Param v = matrix(1, 77, 0.0f);
        v.init_value = value;
        std::vector<float> y(77, NAN);
        param_initialise(y.data(), &v, 7);
        for (float e : y) { assert_true(e == value); }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(offsets_are_aligned_and_apart),
        cmocka_unit_test(parameters_are_found_by_their_whole_name),
        cmocka_unit_test(padding_rows_are_not_counted),
        cmocka_unit_test(more_parameters_than_the_table_holds_are_refused),
        cmocka_unit_test(initial_values_are_normal),
        cmocka_unit_test(initial_values_have_the_normal_distribution),
        cmocka_unit_test(initial_values_do_not_depend_on_threads),
        cmocka_unit_test(initial_values_depend_on_seed_and_name),
        cmocka_unit_test(padding_rows_are_zero_and_vectors_constant),
    };
    return RUN_TESTS(tests);
}
