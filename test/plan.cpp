// Tests of core/plan.h: the table of GPUs, rooflines against numbers worked out by hand, a GPU's matmuls planned without it, and a plan as JSON and as a
// table. What the command says of whole models is in plan.bats.
#include "check.h"
#include "../core/plan.h"
#include <string>

static const Gpu* h100 = gpu_of(GPU_H100);

static void gpus_are_found_by_flag_and_by_the_drivers_name(void**) {
    std::string choices;
    for (const Gpu& g : gpus) { choices += std::string(g.name) + "|"; }
    assert_string_equal((choices + "none").c_str(), GPU_CHOICES);
    assert_string_equal(gpu_of(GPU_B200)->name, "b200");
    assert_null(gpu_of(GPU_NONE));
    const struct { const char *device, *name; } known[] = {{"NVIDIA H100 80GB HBM3", "h100"}, {"NVIDIA H200", "h200"}, {"NVIDIA B200", "b200"},
        {"NVIDIA A100-SXM4-80GB", "a100"}, {"NVIDIA L40S", "l40s"}};
    for (auto& k : known) { assert_string_equal(gpu_by_device(k.device)->name, k.name); }
    assert_null(gpu_by_device("NVIDIA GeForce RTX 4090"));
    assert_null(gpu_by_device("CPU"));
}

// A linear layer's forward product, the form that no FP8 unit needs copied
static MatmulCall forward_call(int m, int n, int k, DType type) {
    MatmulCall c = {};
    c.d_dtype = BF16;
    c.d_ld = n;
    c.a = Operand{NULL, type, NULL, k, 0, false};
    c.b = Operand{NULL, type, NULL, k, 0, true};
    c.m = m;
    c.n = n;
    c.k = k;
    c.batch = 1;
    return c;
}

static void matmuls_take_their_operations_or_their_bytes(void**) {
    double n = 8192.0, flops = 2.0 * n * n * n;
    MatmulCall c = forward_call(8192, 8192, 8192, E4M3);
    expect_near(matmul_seconds(h100, &c), flops / 1979e12, 1e-9, "FP8 on H100");
    expect_near(matmul_seconds(gpu_of(GPU_B200), &c), flops / 4500e12, 1e-9, "FP8 on B200");
    // without FP8 units both operands are read in 1 byte an element and written in 2, and multiplied in BF16
    expect_near(matmul_seconds(gpu_of(GPU_A100), &c), flops / 312e12 + 2.0 * 3.0 * n * n / 2.039e12, 1e-9, "FP8 on A100");
    MatmulCall bf16_call = forward_call(8192, 8192, 8192, BF16);
    expect_near(matmul_seconds(h100, &bf16_call), flops / 989e12, 1e-9, "BF16 on H100");
    MatmulCall one = forward_call(1, 8192, 8192, BF16);
    expect_near(matmul_seconds(h100, &one), (2.0 * n * n + 2.0 * n + 2.0 * n) / 3.35e12, 1e-12, "one row");
    one.batch = 3;
    one.a.batch_stride = 8192;
    one.b.batch_stride = 8192 * 8192;
    one.d_batch_stride = 8192;
    expect_near(matmul_seconds(h100, &one), 3.0 * (2.0 * n * n + 2.0 * n + 2.0 * n) / 3.35e12, 1e-12, "a batch of 3");
    // a sum is read and written; on Hopper both operands of a weight gradient are transposed first
    MatmulCall dw = forward_call(8192, 8192, 16, E4M3);
    dw.a = Operand{NULL, E5M2, NULL, 8192, 0, true};
    dw.b = Operand{NULL, E4M3, NULL, 8192, 0, false};
    dw.d_dtype = FP32;
    double operands = 2.0 * 16.0 * n;
    expect_near(matmul_seconds(h100, &dw), (3.0 * operands + 4.0 * n * n) / 3.35e12, 1e-12, "weight gradient");
    dw.accumulate = true;
    expect_near(matmul_seconds(h100, &dw), (3.0 * operands + 8.0 * n * n) / 3.35e12, 1e-12, "weight gradient, added up");
    expect_near(matmul_seconds(gpu_of(GPU_B200), &dw), (operands + 8.0 * n * n) / 8e12, 1e-12, "weight gradient, added up on B200");
}

// A linear layer of 768 -> 3072 at 4096 tokens on H100, by hand
static void fp8_gains_what_its_copies_leave(void**) {
    double M = 4096.0, K = 768.0, N = 3072.0, flops = 2.0 * M * K * N, bandwidth = 3.35e12, kernel = 2e-6;
    double bf16 = 3.0 * (flops / (0.7 * 989e12) + kernel);
    auto product = [&](double bytes) { return max_of(flops / (0.65 * 1979e12), bytes / bandwidth) + kernel; };
    double fp8 = product(M * K + N * K + 2.0 * M * N) + product(M * N + N * K + 2.0 * M * K) + product(M * N + M * K + 8.0 * N * K);
    fp8 += 3.0 * kernel + (2.0 * N * K + 2.0 * M * N + 2.0 * M * K) / bandwidth;  // copies
    expect_near(fp8_gain(h100, 4096, 768, 3072, false), bf16 / (fp8 + (M * N - M * K) / bandwidth), 1e-9, "made as codes");
    expect_near(fp8_gain(h100, 4096, 768, 3072, true), bf16 / (fp8 + (M * N + 3.0 * M * K) / bandwidth + kernel), 1e-9, "cast apart");
    // small layers lose, large ones gain, more the larger they are, and nowhere more than the units' ratio
    assert_true(fp8_gain(h100, 4096, 768, 768, true) < 1.0 && fp8_gain(h100, 16, 768, 768, false) < 1.0);
    double last = 0.0;
    for (int C = 256; C <= 16384; C *= 2) {
        double gain = fp8_gain(h100, 8192, C, 4 * C, false);
        assert_true(gain > last && gain < 2.0);
        last = gain;
    }
    assert_true(last > 1.6);
    assert_true(fp8_gain(gpu_of(GPU_B200), 8192, 4096, 4096, false) > 1.2);  // which copies nothing
    assert_true(fp8_gain(gpu_of(GPU_A100), 8192, 16384, 16384, false) < 1.0);  // which has no FP8 units
}

static void groups_within_a_node_use_its_links(void**) {
    expect_near(sent_seconds(h100, 9e9, 2, 1, false), 9e9 / 450e9, 1e-12, "2 ranks");
    expect_near(sent_seconds(h100, 9e9, 2, 4, true), 9e9 / 450e9, 1e-12, "a node");
    expect_near(sent_seconds(h100, 9e9, 2, 8, false), 9e9 / 50e9, 1e-12, "a rank a node");
    expect_near(sent_seconds(h100, 9e9, 8, 4, false), 9e9 / 100e9, 1e-12, "two ranks a node share their networks in a ring");
    expect_near(sent_seconds(h100, 9e9, 32, 1, false), 9e9 / 400e9, 1e-12, "eight do");
    expect_near(sent_seconds(gpu_of(GPU_L40S), 9e9, 32, 1, false), 9e9 / 32e9, 1e-12, "but are not faster than their links");
    expect_near(sent_seconds(h100, 31e9, 32, 1, true), 24e9 / 50e9, 1e-12, "in an exchange each sends what is for other nodes");
    expect_near(bytes_seconds(h100, 3.35e12), 1.0, 1e-12, "memory");
}

// Fails where an imagined GPU is planned by what this build's device would need
static void an_imagined_gpu_plans_what_matmul_gpu_plan_says(void**) {
    for (int capability : {80, 89, 90, 100, 120}) {
        Matmul mm;
        matmul_imagine(&mm, capability);
        size_t most = 0;
        for (DType type : {BF16, E4M3}) {
            for (bool transposed : {false, true}) {
                MatmulCall c = forward_call(64, 48, 32, type);
                c.b.transposed = transposed;
                c.b.ld = transposed ? 32 : 48;
                size_t want = matmul_gpu_workspace(&c, capability);
                assert_true(want >= matmul_gpu_library_bytes(capability));
                assert_int_equal(matmul_plan(&mm, &c), want);
                most = max_of(most, want);
            }
        }
        assert_int_equal(mm.planned, most);
        MatmulCall odd = forward_call(64, 40, 20, E4M3), wrong = forward_call(64, 48, 32, FP16);
        expect_end(1, "matmul", "fp32, bf16, e4m3 or e5m2", [&] { matmul_plan(&mm, &wrong); });
        if (capability >= 89) { expect_end(1, "matmul", "multiples of 16", [&] { matmul_plan(&mm, &odd); }); }
        MatmulCall c = forward_call(64, 48, 32, BF16);
        expect_end(1, "not there", NULL, [&] { matmul(&mm, &c, NULL); });
        matmul_destroy(&mm);
    }
}

static void a_step_is_the_pipeline_and_what_nothing_hides(void**) {
    // two stages, the second twice as slow: (K - 1)·(f + b) of the slow one, and once through both
    PlanTimes t = plan_times({{1.0, 2.0, 1.5, 0.5, 0.25, 1}, {2.0, 4.0, 7.0, 5.0, 0.125, 1}}, 10);
    expect_near(t.passes, 9.0 * 6.0 + 3.0 + 6.0, 1e-9, "passes");
    expect_near(t.bubble, 3.0 / 63.0, 1e-9, "bubble");
    expect_near(t.exposed, 3.0 + 3.0, 1e-9, "exposed");
    expect_near(t.optimizer, 0.25, 1e-9, "optimizer");
    expect_near(t.step, 63.0 + 6.0 + 0.25, 1e-9, "step");
    expect_near(t.forward, 2.0, 1e-9, "forward of the slowest");
    expect_near(t.backward, 4.0, 1e-9, "backward of the slowest");
    t = plan_times({{1.0, 2.0, 1.5, 0.5, 0.25, 1}}, 1);
    expect_near(t.step, 3.25, 1e-9, "one stage, all hidden");
    expect_near(t.bubble, 0.0, 1e-9, "one stage waits for nobody");
    t = plan_times({{1.0, 2.0, 25.0, 0.5, 0.25, 10}}, 10);
    expect_near(t.exposed, 5.0, 1e-9, "each of ten reductions beside a backward pass");
}

static Plan some_plan(void) {
    Plan p = {};
    p.gpu = h100;
    p.model = "test";
    p.world = 16;
    p.dp = 2;
    p.tp = 4;
    p.pp = 2;
    p.parameters = 1234567890123;
    p.micro_batch = 3;
    p.seq_len = 2048;
    p.micro_batches = 7;
    p.flops = 1e18;
    p.memory_limit = 8e10;
    PlanSide* sides[] = {&p.asked, &p.baseline};
    for (int s = 0; s < 2; s++) {
        PlanSide* x = sides[s];
        x->recipe = s == 0 ? "fp8" : "bf16";
        for (int i = 0; i < MEMORY_CATEGORIES; i++) {
            x->memory[i] = (uint64_t)(1000 * (s + 1) + i) << 20;
            x->memory_min[i] = (uint64_t)(500 * (s + 1) + i) << 20;
        }
        uint64_t* sent = x->traffic.operations;
        sent[REDUCE_SCATTER] = 100 * (uint64_t)(s + 1);
        sent[WEIGHTS_GATHER] = 50;
        const CommOperation tensor_parallel[] = {TP_X, TP_X_AGAIN, TP_Y, TP_DY, TP_DX, TP_OTHER};
        for (int i = 0; i < 6; i++) { sent[tensor_parallel[i]] = 10 * ((uint64_t)i + 1); }
        sent[PIPELINE] = 5;
        plan_sort_traffic(&x->traffic);
        x->table7 = 77.0;
        x->times = PlanTimes{1.0, 2.0, 30.0, 0.25, 0.5, 0.125, s == 0 ? 30.625 : NAN};
        x->largest_micro_batch = s == 0 ? 9 : 0;
    }
    return p;
}

template <class F> static std::string printed(F f) {
    FILE* file = tmpfile();
    assert_non_null(file);
    f(file);
    std::string text((size_t)ftell(file), '\0');
    rewind(file);
    assert_int_equal(fread(&text[0], 1, text.size(), file), text.size());
    fclose(file);
    return text;
}

static void json_holds_every_figure(void**) {
    Plan p = some_plan();
    std::string text = printed([&](FILE* f) { plan_print_json(f, &p); });
    assert_true(text.find('\n') == text.size() - 1);
    json_object* o = json_tokener_parse(text.c_str());
    assert_non_null(o);
    auto number = [&](std::initializer_list<const char*> path) {
        json_object* at = o;
        for (const char* key : path) { assert_true(json_object_object_get_ex(at, key, &at)); }
        return json_object_get_int64(at);
    };
    assert_int_equal(number({"parameters"}), 1234567890123);
    assert_int_equal(number({"world"}), 16);
    assert_int_equal(number({"dp"}), 2);
    assert_int_equal(number({"tp"}), 4);
    assert_int_equal(number({"pp"}), 2);
    assert_int_equal(number({"memory", "weights"}), 1000 << 20);
    assert_int_equal(number({"memory", "communication"}), 1005 << 20);
    assert_int_equal(number({"memory", "total"}), (int64_t)(6 * 1000 + 15) << 20);
    assert_int_equal(number({"baseline", "memory_min", "total"}), (int64_t)(6 * 1000 + 15) << 20);
    assert_int_equal(number({"traffic", "gradients"}), 100);
    assert_int_equal(number({"traffic", "weights"}), 50);
    assert_int_equal(number({"traffic", "tensor_parallel"}), 210);
    assert_int_equal(number({"baseline", "traffic", "pipeline"}), 5);
    assert_int_equal(number({"table7"}), 77);
    assert_int_equal(number({"largest_micro_batch"}), 9);
    assert_true(text.find("\"step_seconds\":30.625") != std::string::npos);
    assert_true(text.find("\"step_seconds\":null") != std::string::npos);  // of the baseline here
    json_object_put(o);
}

// Fails on a row that lacks, a column that is not there, or a share of nothing
static void the_table_has_a_row_for_every_figure(void**) {
    Plan p = some_plan();
    p.baseline.times.step = 61.25;
    std::string text = printed([&](FILE* f) { plan_print(f, &p); });
    for (const char* word : {"16 × H100", "dp 2, pp 2, tp 4", "7 micro-batches of 3 × 2048 tokens", "weights", "gradients", "optimizer", "activations", "workspace",
             "communication", "total of the emptiest rank", "none fits", "reduce_scatter", "gather dY", "pipeline", "at best", "25.0 %", "-50.0 %", "+100.0 %"}) {
        if (text.find(word) == std::string::npos) { fail_msg("no '%s' in\n%s", word, text.c_str()); }
    }
    assert_true(text.find("nan") == std::string::npos && text.find("inf") == std::string::npos);
    p.gpu = NULL;
    text = printed([&](FILE* f) { plan_print(f, &p); });
    assert_true(text.find("this CPU") != std::string::npos && text.find("at best") == std::string::npos);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpus_are_found_by_flag_and_by_the_drivers_name),
        cmocka_unit_test(matmuls_take_their_operations_or_their_bytes),
        cmocka_unit_test(fp8_gains_what_its_copies_leave), cmocka_unit_test(groups_within_a_node_use_its_links),
        cmocka_unit_test(an_imagined_gpu_plans_what_matmul_gpu_plan_says),
        cmocka_unit_test(a_step_is_the_pipeline_and_what_nothing_hides),
        cmocka_unit_test(json_holds_every_figure),
        cmocka_unit_test(the_table_has_a_row_for_every_figure),
    };
    return RUN_TESTS(tests);
}
