// partition.cpp: owners against the least load that any assignment has, and the plan of every rank against what the text promises: each element kept by
// exactly one rank, in stretches that begin and end where pieces of the norm do, and places that depend on nothing but the table.
#include "check.h"
#include "../core/partition.h"
#include <algorithm>
#include <set>
#include <time.h>

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- owners ----

typedef std::vector<size_t> Sizes;

static std::vector<int> owners_of(const Sizes& sizes, int ranks) {
    std::vector<int> owners(sizes.size() + 1, -7);
    assign_owners(owners.data(), sizes.data(), (int)sizes.size(), ranks);
    assert_int_equal(owners.back(), -7);
    owners.pop_back();
    for (int o : owners) { assert_in_range(o, 0, ranks - 1); }
    return owners;
}

static size_t fullest(const Sizes& sizes, const std::vector<int>& owners, int ranks) {
    Sizes loads((size_t)ranks);
    for (size_t i = 0; i < sizes.size(); i++) { loads[(size_t)owners[i]] += sizes[i]; }
    return *std::max_element(loads.begin(), loads.end());
}

// The algorithm as the paper says it, of tensors as large the first first, of ranks as full the first: the longest goes to whoever has least
static std::vector<int> owners_slowly(const Sizes& sizes, int ranks) {
    std::vector<int> owners(sizes.size(), -1);
    std::set<std::pair<size_t, int>> loads;
    for (int r = 0; r < ranks; r++) { loads.insert({0, r}); }
    for (size_t k = 0; k < sizes.size(); k++) {
        size_t most = sizes.size();
        for (size_t i = 0; i < sizes.size(); i++) {
            if (owners[i] < 0 && (most == sizes.size() || sizes[i] > sizes[most])) { most = i; }
        }
        std::pair<size_t, int> least = *loads.begin();
        loads.erase(loads.begin());
        owners[most] = least.second;
        loads.insert({least.first + sizes[most], least.second});
    }
    return owners;
}

// The least possible load of the fullest rank, by trying everything that could be better
static void try_all(const Sizes& sizes, size_t i, Sizes& loads, size_t* best) {
    if (i == sizes.size()) { *best = std::min(*best, *std::max_element(loads.begin(), loads.end())); return; }
    for (size_t r = 0; r < loads.size(); r++) {
        if (loads[r] + sizes[i] >= *best) { continue; }
        loads[r] += sizes[i];
        try_all(sizes, i + 1, loads, best);
        loads[r] -= sizes[i];
        if (loads[r] == 0) { break; }  // the other empty ranks are as good
    }
}
static size_t least_possible(Sizes sizes, int ranks) {
    std::sort(sizes.rbegin(), sizes.rend());
    size_t total = 1;
    for (size_t s : sizes) { total += s; }
    Sizes loads((size_t)ranks);
    try_all(sizes, 0, loads, &total);
    return total;
}

static void check_owners(const Sizes& sizes, int ranks) {
    std::vector<int> owners = owners_of(sizes, ranks);
    assert_true(owners == owners_slowly(sizes, ranks));
    assert_true(owners == owners_of(sizes, ranks));
    if (sizes.empty()) { return; }
    size_t m = (size_t)ranks, have = fullest(sizes, owners, ranks), total = 0, most = *std::max_element(sizes.begin(), sizes.end());
    for (size_t s : sizes) { total += s; }
    assert_true(have <= (total + (m - 1) * most) / m);  // whoever is fullest had no more than the mean of the others before its last
    if (sizes.size() > 12 || ranks > 5) { return; }
    size_t least = least_possible(sizes, ranks);
    assert_true(have >= least);
    if (3 * m * have > (4 * m - 1) * least) { fail_msg("%zu tensors, %d ranks: %zu, where %zu is possible", sizes.size(), ranks, have, least); }
}

static void the_fullest_rank_has_no_more_than_graham_allows(void**) {
    int trials = getenv("SOAK") != NULL ? 3000 : 150;
    for (int ranks = 1; ranks <= 5; ranks++) {
        for (int trial = 0; trial < trials; trial++) {
            size_t n = random_u32() % 13, kinds = 1 + random_u32() % 4, unit = trial % 3 == 0 ? 1 : 1u << random_u32() % 20;
            Sizes sizes;
            for (size_t i = 0; i < n; i++) { sizes.push_back(unit * (trial % 2 == 0 ? 1 + random_u32() % 100 : 1 + random_u32() % kinds)); }
            check_owners(sizes, ranks);
        }
        // the worst case there is: 2m-1, 2m-1, …, m+1, m+1, m, m, m
        Sizes worst(3, (size_t)ranks);
        for (int k = ranks + 1; k < 2 * ranks; k++) { worst.insert(worst.end(), 2, (size_t)k); }
        check_owners(worst, ranks);
        size_t have = fullest(worst, owners_of(worst, ranks), ranks);
        assert_int_equal(have, ranks > 1 ? 4 * ranks - 1 : 3);
    }
}

static void owners_of_odd_lists(void**) {
    check_owners({}, 1);
    check_owners({}, 5);
    for (int ranks : {1, 2, 3, 7, 64, 512}) {
        check_owners({5}, ranks);
        check_owners({3, 3, 3}, ranks);
        check_owners(Sizes(100, 12), ranks);
        check_owners({1, 2, 3, 4, 5, 6, 7}, ranks);
        check_owners({(size_t)1 << 40, (size_t)3 << 40, 7}, ranks);
    }
    // more ranks than tensors: none has two, and the largest is rank 0's
    std::vector<int> few = owners_of({10, 30, 20}, 8);
    assert_true(few == (std::vector<int>{2, 0, 1}));
    // one that outweighs all others has a rank to itself
    std::vector<int> heavy = owners_of({1, 1, 1000, 1, 1}, 2);
    assert_true(heavy == (std::vector<int>{1, 1, 0, 1, 1}));
    assert_true(owners_of(Sizes(5, 9), 2) == (std::vector<int>{0, 1, 0, 1, 0}));
    for (int trial = 0; trial < 200; trial++) {
        Sizes sizes;
        for (size_t n = random_u32() % 60; n > 0; n--) { sizes.push_back(1 + random_u32() % (trial % 2 == 0 ? 3 : 1000000)); }
        check_owners(sizes, 1 + (int)(random_u32() % 20));
    }
}

// ---- tables ----

static ParamTable table;

static void empty_table(void) { table.count = 0; table.elements = 0; }

static Param* add(const char* name, int layer, int64_t rows, int64_t cols, FormatClass c, DType dtype, DType accum, DType wire) {
    Param* p = param_add(&table, name, layer, rows, cols, c, dtype);
    p->accum = accum;
    p->wire = wire;
    return p;
}

// A GPT with everything that its recipe makes of it; `head`: by itself
static void gpt_table(int layers, int64_t C, int64_t vocab, bool head) {
    empty_table();
    add("wte", -1, vocab, C, EMBEDDING, BF16, FP32, FP32);
    add("wpe", -1, 2 * C, C, EMBEDDING, BF16, BF16, E4M3);
    for (int l = 0; l < layers; l++) {
        DType weight = l == 0 ? BF16 : E4M3;
        const struct { int64_t rows, cols; FormatClass c; } all[] = {
            {1, C, VECTOR}, {1, C, VECTOR}, {3 * C, C, MATRIX}, {1, 3 * C, VECTOR}, {C, C, MATRIX}, {1, C, VECTOR},
            {1, C, VECTOR}, {1, C, VECTOR}, {4 * C, C, MATRIX}, {1, 4 * C, VECTOR}, {C, 4 * C, MATRIX}, {1, C, VECTOR}};
        for (auto& a : all) { add("h", l, a.rows, a.cols, a.c, a.c == MATRIX ? weight : BF16, a.c == MATRIX ? BF16 : FP32, a.c == MATRIX ? E4M3 : FP32); }
    }
    add("lnfw", layers, 1, C, VECTOR, BF16, FP32, FP32);
    if (head) { add("lmhead", layers, vocab, C, EMBEDDING, BF16, FP32, FP32); }
}

// Lengths at and beside multiples of everything, several formats in a layer, tensors of one element, in any order of layers
static void random_table(void) {
    empty_table();
    const int64_t lengths[] = {1, 127, 128, 129, 4095, 4096, 4097, 8192, 12345, 40000};
    const DType formats[] = {FP32, BF16, E4M3, E5M2};
    int n = (int)(random_u32() % 40);
    for (int i = 0; i < n; i++) {
        int layer = (int)(random_u32() % 5) - 1;
        FormatClass c = random_u32() % 4 == 0 ? VECTOR : layer < 0 || layer == 3 ? EMBEDDING : MATRIX;  // a layer has matrices, or it has embeddings
        int64_t length = random_u32() % 3 == 0 ? 1 + random_u32() % 30000 : lengths[random_u32() % 10];
        uint32_t few = c == VECTOR ? 1 : 2;
        Param* p = add("r", layer, 1, length, c, formats[random_u32() % few + 1], formats[random_u32() % few], formats[2 + random_u32() % few]);
        p->partial = c == VECTOR && random_u32() % 2 == 0;
    }
}

// ---- partitions ----

static size_t padded(const Param* p) { return ((size_t)(p->rows * p->cols) + 127) / 128 * 128; }

// Elements before tensor i among those that travel with it
static size_t before(int i) {
    const Param* p = &table.items[i];
    size_t at = 0;
    for (int k = 0; k < i; k++) {
        const Param* q = &table.items[k];
        bool vectors = p->format_class == VECTOR, with = vectors == (q->format_class == VECTOR) && (vectors || q->layer == p->layer);
        if (with && q->dtype == p->dtype && q->accum == p->accum && q->wire == p->wire && q->partial == p->partial) { at += padded(q); }
    }
    return at;
}

struct Interval { size_t from, to; };
// They lie apart; `whole`: and cover [0, end)
static void check_apart(std::vector<Interval> v, size_t end, bool whole, const char* what) {
    std::sort(v.begin(), v.end(), [](Interval a, Interval b) { return a.from < b.from; });
    size_t at = 0;
    for (Interval x : v) {
        if (x.from < at || (whole && x.from != at)) { fail_msg("%s: from %zu to %zu, after %zu", what, x.from, x.to, at); }
        at = x.to;
    }
    if (at > end || (whole && at != end)) { fail_msg("%s: ends at %zu, not %zu", what, at, end); }
}

static void check_bucket(const Partition* p, const Bucket* b, std::vector<int>* seen) {
    int ranks = p->ranks;
    bool cut = p->zero.level > 0;
    assert_true(b->count > 0 && b->elements % (128 * (size_t)ranks) == 0);
    assert_true(b->cuts[0] == 0 && b->cuts[ranks] <= b->elements);
    for (int r = 0; r < ranks; r++) {
        assert_true(b->cuts[r] <= b->cuts[r + 1]);
        assert_int_equal(b->cuts[r] % (b->whole || !cut ? 128 : 4096), 0);
        if (!b->whole) { assert_int_equal(b->cuts[r + 1] - b->cuts[r], b->elements / (size_t)ranks); }
    }
    assert_true(!b->whole || (cut && p->zero.split == SPLIT_TENSOR));
    std::vector<Interval> places;
    size_t sum = 0;
    for (int k = 0; k < b->count; k++) {
        const BucketTensor* t = &p->tensors[b->first + k];
        const Param* q = &table.items[t->param];
        (*seen)[(size_t)t->param]++;
        assert_true(q->dtype == b->dtype && q->accum == b->accum && q->wire == b->wire && q->partial == b->partial);
        assert_int_equal(b->layer, q->format_class == VECTOR ? ALL_LAYERS : q->layer);
        assert_true(b->whole == (cut && p->zero.split == SPLIT_TENSOR && q->format_class == MATRIX));
        assert_true((q->owner >= 0) == b->whole && q->owner < ranks);
        assert_int_equal(t->first % 128, 0);
        places.push_back({t->first, t->first + param_elements(q)});
        if (b->whole) { assert_true(t->first >= b->cuts[q->owner] && t->first + param_elements(q) <= b->cuts[q->owner + 1]); }
        else { assert_int_equal(t->first, before(t->param)); }
        if (k > 0 && b->whole) {  // by owner, and then in the table's order
            const BucketTensor* last = t - 1;
            int owner = table.items[last->param].owner;
            assert_true(owner < q->owner || (owner == q->owner && last->param < t->param));
        }
        sum += padded(q);
    }
    check_apart(places, b->elements, false, "tensors of a bucket");
    assert_true(b->elements < sum + (cut ? 4096 : 128) * (size_t)ranks);  // no more padding than needed
}

// Builds the plan of every rank
static void check_partition(int ranks, ZeroConfig zero) {
    size_t n = (size_t)table.count;
    std::vector<std::vector<Interval>> kept(n);
    Partition first = {};
    size_t first_elements = 0;
    std::vector<size_t> offsets(n);
    bool divided = ranks > 1 && zero.level > 0;
    Sizes sizes, loads((size_t)ranks);
    for (size_t i = 0; i < n; i++) {
        if (table.items[i].format_class == MATRIX) { sizes.push_back(param_elements(&table.items[i])); }
    }
    std::vector<int> owners = owners_slowly(sizes, ranks);
    for (int rank = 0; rank < ranks; rank++) {
        Partition p;
        partition_build(&p, &table, rank, ranks, zero);
        assert_true(p.rank == rank && p.ranks == ranks && p.zero.level == (divided ? zero.level : 0));
        std::vector<int> seen(n);
        size_t total = 0, matrix = 0;
        for (int k = 0; k < p.bucket_count; k++) {
            const Bucket* b = &p.buckets[k];
            check_bucket(&p, b, &seen);
            total += b->elements;
            assert_true(part_begin(&p, b) == b->cuts[rank] && part_elements(&p, b) == b->cuts[rank + 1] - b->cuts[rank]);
            size_t most = 0;
            for (int r = 0; r < ranks; r++) { most = std::max(most, b->cuts[r + 1] - b->cuts[r]); }
            assert_int_equal(largest_part(&p, b), most);
            for (int i = 0; i < k; i++) {
                const Bucket* o = &p.buckets[i];
                bool formats = o->dtype == b->dtype && o->accum == b->accum && o->wire == b->wire;
                assert_false(formats && o->layer == b->layer && o->partial == b->partial);
            }
        }
        assert_int_equal(table.elements, total);
        std::vector<Interval> places;
        for (size_t i = 0; i < n; i++) {
            const Param* q = &table.items[i];
            size_t elements = param_elements(q), at = q->own_first, end = at + q->own_count, shift = (size_t)q->piece_shift;
            assert_int_equal(seen[i], 1);
            assert_int_equal(shift, before((int)i) % 4096);
            assert_true(end <= elements && at % 128 == 0);
            bool whole = divided && zero.split == SPLIT_TENSOR && q->format_class == MATRIX;
            assert_int_equal(q->owner, whole ? owners[matrix] : -1);
            matrix += q->format_class == MATRIX;
            if (whole) { assert_true(q->own_count == (q->owner == rank ? elements : 0)); }
            if (!divided) { assert_true(at == 0 && end == elements); }
            if (q->own_count == 0) { assert_int_equal(at, 0); }
            assert_true(at == 0 || (shift + at) % 4096 == 0);
            assert_true(q->own_count == 0 || end == elements || (shift + end) % 4096 == 0);
            if (q->own_count > 0) { kept[i].push_back({at, end}); }
            places.push_back({q->offset, q->offset + elements});
            assert_int_equal(q->offset % 128, 0);
            if (rank == 0) { offsets[i] = q->offset; }
            assert_int_equal(q->offset, offsets[i]);
        }
        check_apart(places, table.elements, false, "offsets");
        if (rank == 0) { first = p; first_elements = total; continue; }
        assert_true(p.bucket_count == first.bucket_count && total == first_elements);  // every rank has the same plan
        for (int k = 0; k < p.bucket_count; k++) {
            assert_memory_equal(p.buckets[k].cuts, first.buckets[k].cuts, ((size_t)ranks + 1) * sizeof(size_t));
            assert_true(p.buckets[k].first == first.buckets[k].first && p.buckets[k].count == first.buckets[k].count);
        }
        for (size_t i = 0; i < n; i++) { assert_true(p.tensors[i].param == first.tensors[i].param && p.tensors[i].first == first.tensors[i].first); }
        partition_free(&p);
        assert_null(p.buckets);
    }
    partition_free(&first);
    for (size_t i = 0; i < n; i++) {
        if (divided) { check_apart(kept[i], param_elements(&table.items[i]), true, "stretches of a tensor"); }
        else { assert_int_equal(kept[i].size(), ranks); }
    }
}

static void check_partitions(std::initializer_list<int> all_ranks) {
    for (int ranks : all_ranks) {
        for (int level : {0, 1, 2}) {
            for (ZeroSplit split : {SPLIT_TENSOR, SPLIT_FLAT}) { check_partition(ranks, ZeroConfig{level, split}); }
        }
    }
}

static void every_element_has_one_rank(void**) {
    int trials = getenv("SOAK") != NULL ? 400 : 25;
    for (int i = 0; i < trials; i++) {
        random_table();
        check_partitions({1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64});
    }
    empty_table();
    check_partitions({1, 2, 9});
    for (int64_t C : {64, 48, 6}) {
        for (int layers : {1, 3}) {
            gpt_table(layers, C, 256, C == 48);
            check_partitions({1, 2, 3, 4, 5, 8, 9, 16, 64});
        }
    }
}

// Elements of all optimizer states that the fullest rank keeps, over their mean
static double imbalance(int ranks, ZeroSplit split) {
    double most = 0.0, total = 0.0;
    for (int rank = 0; rank < ranks; rank++) {
        Partition p;
        double mine = 0.0;
        partition_build(&p, &table, rank, ranks, ZeroConfig{1, split});
        for (int i = 0; i < table.count; i++) { mine += (double)table.items[i].own_count; }
        most = std::max(most, mine);
        total += mine;
        partition_free(&p);
    }
    return most / (total / ranks);
}

static void of_gpt_3_175b_every_rank_keeps_its_share(void**) {
    gpt_table(96, 12288, 50304, false);
    Sizes sizes;
    for (int i = 0; i < table.count; i++) {
        if (table.items[i].format_class == MATRIX) { sizes.push_back(param_elements(&table.items[i])); }
    }
    assert_int_equal(sizes.size(), 384);
    for (int ranks : {1, 2, 3, 7, 8, 32, 48, 96, 100, 128, 383, 384, 385, 1024}) { check_owners(sizes, ranks); }
    // 96 · 12 C²: 32 ranks have 36 C² each; of 128 ranks 64 have two of 4 C² and 32 have 4 + 3 + 3, where 9 each would be possible
    size_t C2 = (size_t)12288 * 12288;
    assert_int_equal(fullest(sizes, owners_of(sizes, 32), 32), 36 * C2);
    assert_int_equal(fullest(sizes, owners_of(sizes, 128), 128), 10 * C2);
    check_partition(8, ZeroConfig{1, SPLIT_TENSOR});
    check_partition(8, ZeroConfig{2, SPLIT_FLAT});
    double start = seconds_now();
    double tensor = imbalance(128, SPLIT_TENSOR);
    double half = seconds_now();
    double flat = imbalance(128, SPLIT_FLAT);
    print_message("128 ranks: whole tensors: %.4f of the mean at most, %.3f s for the plans of all; flat: %.6f, %.3f s\n", tensor, half - start, flat,
        seconds_now() - half);
    expect_near(tensor, 10.0 / 9.0, 0.01, "whole tensors");
    expect_near(flat, 1.0, 0.001, "flat");
}

static void weights_lie_bucket_by_bucket(void**) {
    gpt_table(2, 64, 256, true);
    for (ZeroSplit split : {SPLIT_TENSOR, SPLIT_FLAT}) {
        Partition p;
        partition_build(&p, &table, 1, 3, ZeroConfig{1, split});
        Memory memory = {};
        partition_allocate_weights(&p, &memory);
        memory_commit(&memory);
        partition_allocate_weights(&p, &memory);
        memory_check(&memory);
        std::vector<Interval> bytes;
        for (int k = 0; k < p.bucket_count; k++) {
            const Bucket* b = &p.buckets[k];
            size_t at = (size_t)(b->weights - memory.block[WEIGHTS]);
            bytes.push_back({at, at + b->elements * (size_t)dtype_bytes(b->dtype)});
            for (int i = 0; i < b->count; i++) {
                const BucketTensor* t = &p.tensors[b->first + i];
                assert_ptr_equal(table.items[t->param].weight, b->weights + t->first * (size_t)dtype_bytes(b->dtype));
            }
        }
        check_apart(bytes, memory.bytes[WEIGHTS], false, "weights");
        memory_release(&memory);
        partition_free(&p);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_fullest_rank_has_no_more_than_graham_allows),
        cmocka_unit_test(owners_of_odd_lists),
        cmocka_unit_test(every_element_has_one_rank),
        cmocka_unit_test(of_gpt_3_175b_every_rank_keeps_its_share),
        cmocka_unit_test(weights_lie_bucket_by_bucket),
    };
    return RUN_TESTS(tests);
}
