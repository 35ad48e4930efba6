// Tests of core/sampling.h: every choice of top-k, top-p and temperature against a direct one, as exact intervals of the coin.
#include "check.h"
#include "../core/sampling.h"
#include <numeric>

// The probabilities that sample_token should draw by, found the long way: sort all, cut, divide
static std::vector<double> direct(const std::vector<float>& logits, Sampling s) {
    std::vector<int> order;
    for (size_t i = 0; i < logits.size(); i++) {
        if (!isnan(logits[i]) && logits[i] != -INFINITY) { order.push_back((int)i); }
    }
    std::vector<double> p(logits.size(), 0.0);
    if (order.empty()) { p[0] = 1.0; return p; }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[(size_t)a] > logits[(size_t)b]; });
    double top = logits[(size_t)order[0]];
    if (s.temperature == 0.0) { p[(size_t)order[0]] = 1.0; return p; }
    if (s.top_k > 0 && (size_t)s.top_k < order.size()) { order.resize((size_t)s.top_k); }
    double total = 0.0, sum = 0.0;
    for (int i : order) {
        double z = logits[(size_t)i];
        p[(size_t)i] = isinf(top) ? (z == top ? 1.0 : 0.0) : exp((z - top) / s.temperature);
        total += p[(size_t)i];
    }
    size_t kept = 0;
    while (kept < order.size() && (kept == 0 || sum < s.top_p * total)) { sum += p[(size_t)order[kept++]]; }
    for (size_t i = kept; i < order.size(); i++) { p[(size_t)order[i]] = 0.0; }
    total = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& x : p) { x /= total; }
    return p;
}

// In the middle of each token's interval, and near its ends, the coin gives that token
static void check(const std::vector<float>& logits, Sampling s) {
    std::vector<double> p = direct(logits, s);
    double sum = 0.0;
    for (size_t i = 0; i < p.size(); i++) {
        if (p[i] > 1e-9) {
            for (double part : {1e-3, 0.5, 1 - 1e-3}) {
                int got = sample_token(logits.data(), (int)logits.size(), &s, sum + part * p[i]);
                if (got != (int)i) { fail_msg("k %d, p %g, temperature %g: %d, not %d", (int)s.top_k, s.top_p, s.temperature, got, (int)i); }
            }
        }
        sum += p[i];
    }
}

static void all_settings_draw_as_the_direct_way(void**) {
    uint64_t x = 3;
    for (int n : {1, 2, 5, 30, 300}) {
        for (int round = 0; round < 6; round++) {
            std::vector<float> logits((size_t)n);
            for (float& z : logits) {
                x = mix64(x);
                z = round < 3 ? (float)(x % 1000) / 100.0f - 5.0f : (float)(x % 4);  // the latter: many ties
            }
            for (double temperature : {0.0, 0.1, 0.8, 1.0, 3.0}) {
                for (int64_t k : {0, 1, 2, 7, 299, 300, 1000}) {
                    for (double p : {1e-9, 0.1, 0.5, 0.9, 0.999, 1.0}) { check(logits, Sampling{temperature, k, p}); }
                }
            }
        }
    }
}

static void of_equals_the_first_is_kept(void**) {
    std::vector<float> logits = {1, 3, 3, 2, 3};
    for (double coin : {0.0, 0.49, 0.5, 0.99}) {
        Sampling two = {1.0, 2, 1.0}, one = {1.0, 1, 1.0}, third = {1.0, 0, 0.2}, greedy = {0.0, 0, 1.0};
        assert_int_equal(sample_token(logits.data(), 5, &two, coin), coin < 0.5 ? 1 : 2);
        assert_int_equal(sample_token(logits.data(), 5, &one, coin), 1);
        assert_int_equal(sample_token(logits.data(), 5, &third, coin), 1);
        assert_int_equal(sample_token(logits.data(), 5, &greedy, coin), 1);
    }
}

static void what_is_not_finite_is_never_drawn(void**) {
    const float inf = INFINITY, nan = NAN;
    const std::vector<std::vector<float>> cases = {{nan, 1, -inf, 2}, {1, inf, 3, inf}, {nan, nan}, {-inf, -inf}, {nan, -inf, 0.5f}, {inf, nan, inf, -inf}, {nan, inf}, {-3e38f, 3e38f}};
    for (const auto& logits : cases) {
        for (double temperature : {0.0, 1e-3, 1.0, 100.0}) {
            for (int64_t k : {0, 1, 2, 9}) {
                for (double p : {0.3, 0.7, 1.0}) { check(logits, Sampling{temperature, k, p}); }
            }
        }
    }
    std::vector<float> logits = {2, 1};
    Sampling all = {};
    assert_int_equal(sample_token(logits.data(), 2, &all, 1.0 - 1e-17), 1);  // the last one, whatever the sum is rounded to
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_settings_draw_as_the_direct_way),
        cmocka_unit_test(of_equals_the_first_is_kept),
        cmocka_unit_test(what_is_not_finite_is_never_drawn),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);  // no device is needed
}
