// Tests of core/memory.h: what is planned is what is handed out, to the byte, and what does not fit or does not match ends the run with
// words.
#include "check.h"
#include "../core/memory.h"

// As the trainer does before it takes anything
static void require(const Memory* m, int processes, const char* advice) {
    if (memory_total(m) > device_memory_free(processes)) { memory_refuse(m->bytes, device_memory_free(processes), processes, advice); }
}

struct Request { MemoryCategory category; size_t count, bytes; };

static std::vector<Request> random_requests(int n) {
    std::vector<Request> list;
    for (int i = 0; i < n; i++) {
        list.push_back(Request{(MemoryCategory)(random_u32() % MEMORY_CATEGORIES), random_u32() % 1000, 1u << (random_u32() % 4)});
    }
    return list;
}

static size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Each address is aligned, within its category's block, and no two overlap: each is filled with its own byte and read again.
static void the_second_run_hands_out_what_the_first_planned(void**) {
    std::vector<Request> list = random_requests(200);
    list.push_back(Request{WEIGHTS, 0, 4});
    list.push_back(Request{WEIGHTS, 1, 1});
    Memory m = {};
    size_t want[MEMORY_CATEGORIES] = {}, total = 0;
    for (const Request& r : list) {
        assert_null(memory_take(&m, r.category, r.count, r.bytes));
        want[r.category] += rounded(r.count * r.bytes);
        total += rounded(r.count * r.bytes);
    }
    for (int c = 0; c < MEMORY_CATEGORIES; c++) {
        assert_int_equal(m.bytes[c], want[c]);
        assert_int_equal(m.used[c], 0);
        assert_null(m.block[c]);
    }
    assert_int_equal(memory_total(&m), total);
    require(&m, 1, "ask for less");
    require(&m, 2, "ask for less");
    memory_commit(&m);
    std::vector<unsigned char*> at;
    for (size_t i = 0; i < list.size(); i++) {
        unsigned char* p = (unsigned char*)memory_take(&m, list[i].category, list[i].count, list[i].bytes);
        assert_true((size_t)p % MEMORY_ALIGNMENT == 0);
        assert_true((char*)p >= m.block[list[i].category]);
        assert_true((char*)p + list[i].count * list[i].bytes <= m.block[list[i].category] + m.bytes[list[i].category]);
        at.push_back(p);
#ifndef USE_CUDA
        memset(p, (int)(i % 251), list[i].count * list[i].bytes);
#endif
    }
#ifndef USE_CUDA
    for (size_t i = 0; i < list.size(); i++) {
        for (size_t k = 0; k < list[i].count * list[i].bytes; k++) { assert_int_equal(at[i][k], i % 251); }
    }
#endif
    memory_check(&m);
    memory_release(&m);
    assert_int_equal(memory_total(&m), 0);
    assert_false(m.committed);
}

static void types_know_their_size(void**) {
    Memory m = {};
    memory_take<double>(&m, OPTIMIZER, 33);
    memory_take<uint8_t>(&m, OPTIMIZER, 257);
    assert_int_equal(m.bytes[OPTIMIZER], 512 + 512);
    memory_commit(&m);
    double* d = memory_take<double>(&m, OPTIMIZER, 33);
    uint8_t* b = memory_take<uint8_t>(&m, OPTIMIZER, 257);
    assert_ptr_equal((char*)d + 512, b);
    memory_check(&m);
    memory_release(&m);
}

static void an_empty_plan_takes_nothing(void**) {
    Memory m = {};
    require(&m, 1, "ask for less");
    memory_commit(&m);
    for (int c = 0; c < MEMORY_CATEGORIES; c++) { assert_null(m.block[c]); }
    memory_check(&m);
    memory_release(&m);
}

// ---- refusals ----

// 2^50 bytes are more than any machine has; the words say how much for what, and what helps.
static void more_than_is_free_is_refused_before_anything_is_taken(void**) {
    if (device_is_gpu) { skip(); }  // the refusal runs in a child, which has no GPU
    Memory m = {};
    memory_take(&m, ACTIVATIONS, (size_t)1 << 50, 1);
    memory_take(&m, WEIGHTS, (size_t)3 << 29, 1);
    End end = end_of([&] { require(&m, 1, "ask for less"); });
    assert_int_equal(end.code, 2);
    assert_int_equal(end.lines, 1);
    for (const char* word :
         {"1048577.50 GiB", "weights 1.50", "activations 1048576.00", "communication 0.00", "are free on", "ask for less"}) {
        if (strstr(end.text, word) == NULL) { fail_msg("no '%s' in: %s", word, end.text); }
    }
    expect_end(2, "each of 3 processes", NULL, [&] { require(&m, 3, "ask for less"); });
}

// What one process may take alone is too much for two on the same device.
static void processes_on_a_device_share_what_is_free(void**) {
    if (device_is_gpu) { skip(); }
    Memory m = {};
    memory_take(&m, WEIGHTS, device_memory_free() / 4 * 3, 1);
    expect_end(99, NULL, NULL, [&] {
        require(&m, 1, "ask for less");
        fprintf(stderr, "train_gpt_fp8: it fits\n");
    });
    expect_end(2, "each of 2 processes", NULL, [&] { require(&m, 2, "ask for less"); });
}

static void a_second_run_that_asks_for_more_ends(void**) {
    if (device_is_gpu) { skip(); }
    Memory m = {};
    memory_take(&m, GRADIENTS, 256, 1);
    memory_take(&m, WEIGHTS, 4096, 1);
    memory_commit(&m);
    memory_take(&m, GRADIENTS, 200, 1);  // the same block of 256
    expect_end(1, "gradients", "256 of the 256 planned", [&] { memory_take(&m, GRADIENTS, 1, 1); });
    expect_end(1, "workspace", NULL, [&] { memory_take(&m, WORKSPACE, 1, 1); });
    memory_release(&m);
}

static void a_second_run_that_asks_for_less_is_found(void**) {
    if (device_is_gpu) { skip(); }
    Memory m = {};
    memory_take(&m, GRADIENTS, 300, 1);
    memory_take(&m, WEIGHTS, 10, 1);
    memory_commit(&m);
    memory_take(&m, WEIGHTS, 10, 1);
    memory_take(&m, GRADIENTS, 256, 1);
    expect_end(1, "gradients", "512 bytes planned, 256 handed out", [&] { memory_check(&m); });
    memory_release(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(more_than_is_free_is_refused_before_anything_is_taken),
        cmocka_unit_test(processes_on_a_device_share_what_is_free),
        cmocka_unit_test(a_second_run_that_asks_for_more_ends),
        cmocka_unit_test(a_second_run_that_asks_for_less_is_found),
        cmocka_unit_test(the_second_run_hands_out_what_the_first_planned),
        cmocka_unit_test(types_know_their_size),
        cmocka_unit_test(an_empty_plan_takes_nothing),
    };
    return RUN_TESTS(tests);
}
