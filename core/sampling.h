// sampling.h: which token comes next, given a model's logits: a draw from softmax(logits / temperature), of all tokens or of the likeliest only.
//
// top_k keeps the k greatest logits; top_p, of those, the fewest whose probabilities (at this temperature, among those that top_k keeps) add up to p or more, at
// least one. Of equal logits the lower token comes first. Temperature 0 takes the greatest. A logit that is NaN or -inf is never drawn; if one is +inf, only such are.
// Where nothing is left, token 0 comes out: a model that far gone says nothing anyway.
#pragma once
#include "common.h"
#include <algorithm>
#include <vector>

struct Sampling {
    double temperature = 1.0;  // 0: the greatest logit
    int64_t top_k = 0;         // 0: all
    double top_p = 1.0;        // 1: all
};

// coin in [0, 1)
static inline int sample_token(const float* logits, int vocab, const Sampling* s, double coin) {
    int top = -1;
    for (int i = 0; i < vocab; i++) {
        if (!isnan(logits[i]) && logits[i] > -INFINITY && (top < 0 || logits[i] > logits[top])) { top = i; }
    }
    if (top < 0) { return 0; }
    if (s->temperature == 0.0) { return top; }
    float greatest = logits[top];
    bool infinite = greatest == INFINITY;
    auto weight = [=](int i) {  // relative to the greatest's
        if (isnan(logits[i])) { return 0.0; }
        if (infinite) { return logits[i] == INFINITY ? 1.0 : 0.0; }
        return exp((double)(logits[i] - greatest) / s->temperature);
    };
    bool some = (s->top_k > 0 && s->top_k < vocab) || s->top_p < 1.0;
    int last = -1;  // of those that are kept, in their order
    auto before = [=](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    if (some) {
        std::vector<int> order;
        for (int i = 0; i < vocab; i++) {
            if (weight(i) > 0.0) { order.push_back(i); }
        }
        size_t k = s->top_k > 0 ? min_of((size_t)s->top_k, order.size()) : order.size();
        std::partial_sort(order.begin(), order.begin() + (long)k, order.end(), before);
        double total = 0.0, sum = 0.0;
        for (size_t i = 0; i < k; i++) { total += weight(order[i]); }
        size_t kept = 0;
        do { sum += weight(order[kept++]); } while (kept < k && sum < s->top_p * total);
        last = order[kept - 1];
    }
    auto is_kept = [=](int i) { return last < 0 || !before(last, i); };
    double total = 0.0, sum = 0.0;
    int chosen = top;
    for (int i = 0; i < vocab; i++) {
        if (is_kept(i)) { total += weight(i); }
    }
    for (int i = 0; i < vocab; i++) {
        double w = is_kept(i) ? weight(i) : 0.0;
        if (!(w > 0.0)) { continue; }
        sum += w / total;
        chosen = i;
        if (coin < sum) { break; }
    }
    return chosen;  // the last one where rounding keeps the sum below the coin
}
