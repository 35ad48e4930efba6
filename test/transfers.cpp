// transfers.cpp: each transfer on 1 to 8 ranks against what every rank knows of the others, byte for byte: directly, staged through host memory, many
// in a row; that starting one and asking for it never waits; and what is refused.
#include "../core/transfers.cuh"
#include "launch.h"
#include <algorithm>
#include <vector>

// ---- what the ranks check ----

typedef std::vector<unsigned char> Bytes;

// Every rank can say what any rank has
static uint64_t hash_of(uint64_t a, uint64_t b, uint64_t c) { return mix64(mix64(mix64(a) ^ b) ^ c); }
static Bytes bytes_of(int rank, size_t n, uint32_t salt) {
    Bytes b(n);
    for (size_t i = 0; i < n; i++) { b[i] = (unsigned char)(hash_of(i / 8, (uint64_t)rank, salt) >> i % 8 * 8); }
    return b;
}

// Device memory between two guards
struct Memory {
    static constexpr size_t GUARD = 256;
    char* base;
    size_t bytes;
    explicit Memory(const Bytes& content) : base((char*)device_alloc(content.size() + 2 * GUARD)), bytes(content.size()) {
        Bytes all(bytes + 2 * GUARD, 0xa5);
        std::copy(content.begin(), content.end(), all.begin() + GUARD);
        copy_to_device(base, all.data(), all.size(), NULL);
        stream_sync(NULL);
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { device_free(base); }
    char* data(void) const { return base + GUARD; }
    Bytes content(void) const {
        Bytes all(bytes + 2 * GUARD);
        copy_to_host(all.data(), base, all.size(), NULL);
        for (size_t i = 0; i < GUARD; i++) { CHECK(all[i] == 0xa5 && all[GUARD + bytes + i] == 0xa5, "written beyond an array of %zu bytes", bytes); }
        return Bytes(all.begin() + GUARD, all.end() - GUARD);
    }
};

static void finish(Transfer* t) {
    while (!transfer_done(t)) { sched_yield(); }
    CHECK(transfer_done(t));
    stream_sync(NULL);
}

// The operation adds this many bytes to its counter and nothing to the others.
struct Counted {
    Group* g;
    uint64_t want[COMM_OPERATIONS];
    Counted(Group* group, CommOperation operation, uint64_t bytes) : g(group) {
        memcpy(want, g->bytes_sent, sizeof(want));
        want[operation] += bytes;
    }
    ~Counted() {
        for (int i = 0; i < COMM_OPERATIONS; i++) {
            CHECK(g->bytes_sent[i] == want[i], "%s: %" PRIu64 ", not %" PRIu64, comm_names[i], g->bytes_sent[i], want[i]);
        }
    }
};

// Transfers in two halves, so that a test can do something in between: start(), then check()
struct Gather {
    Transfer* t;
    size_t part;
    uint32_t salt;
    CommOperation counter;
    Memory memory;
    static Bytes before(const Group* g, size_t part, uint32_t salt) {  // own part, and nothing of the others
        Bytes all(part * (size_t)g->size, 0xee), mine = bytes_of(g->rank, part, salt);
        std::copy(mine.begin(), mine.end(), all.begin() + (long)(part * (size_t)g->rank));
        return all;
    }
    Gather(Transfer* transfer, size_t part_bytes, uint32_t s, CommOperation c)
        : t(transfer), part(part_bytes), salt(s), counter(c), memory(before(t->group, part, salt)) {}
    void start(void) {
        Counted counted(t->group, counter, part * (uint64_t)(t->group->size - 1));
        start_all_gather(t, memory.data(), equal_parts(part), counter, NULL);
    }
    void check(void) {
        Bytes got = memory.content();
        for (int r = 0; r < t->group->size; r++) {
            Bytes want = bytes_of(r, part, salt);
            CHECK(std::equal(want.begin(), want.end(), got.begin() + (long)(part * (size_t)r)), "part %d of %zu bytes", r, part);
        }
    }
};

struct Exchange {
    Transfer* t;
    size_t part;
    uint32_t salt;
    Bytes given;
    Memory sent, received;
    static Bytes before(const Group* g, size_t part, uint32_t salt) {
        Bytes all;
        for (int p = 0; p < g->size; p++) {
            Bytes b = bytes_of(g->rank * 100 + p, part, salt);
            all.insert(all.end(), b.begin(), b.end());
        }
        return all;
    }
    Exchange(Transfer* transfer, size_t part_bytes, uint32_t s)
        : t(transfer), part(part_bytes), salt(s), given(before(t->group, part, salt)), sent(given), received(Bytes(given.size(), 0xee)) {}
    void start(void) {
        Counted counted(t->group, ALL_TO_ALL, part * (uint64_t)(t->group->size - 1));
        start_all_to_all(t, received.data(), sent.data(), part, ALL_TO_ALL, NULL);
    }
    void check(void) {
        CHECK(sent.content() == given, "what was sent has changed");
        Bytes got = received.content();
        for (int r = 0; r < t->group->size; r++) {
            Bytes want = bytes_of(r * 100 + t->group->rank, part, salt);
            if (t->group->transport == ALONE) { want.assign(part, 0xee); }  // nobody is there to send: the array stays as it is
            CHECK(std::equal(want.begin(), want.end(), got.begin() + (long)(part * (size_t)r)), "part from rank %d of %zu bytes", r, part);
        }
    }
};

// FP8: any code. BF16, FP32: signs and 17 powers of two, so that the order of adding shows. NCCL may go round in another order: small integers.
template <class D> static D element(uint64_t hash, bool any_order) {
    D d;
    if (any_order) { from_float(d, (float)(hash % 2)); }
    else if (sizeof(D) == 1) { memcpy((void*)&d, &hash, 1); }
    else {
        float f = (1.0f + (float)(hash & 0xffffff) * 0x1p-24f) * exp2_int((int)((hash >> 33) % 17) - 8);
        from_float(d, (hash >> 32) & 1 ? -f : f);
    }
    return d;
}

template <class D> struct Ring {
    Transfer* t;
    size_t part;  // elements
    uint32_t salt;
    Memory memory, received;
    static D value(const Group* g, int rank, size_t i, uint32_t salt) {
        return element<D>(hash_of(i, (uint64_t)rank, salt), g->transport == OVER_NCCL);
    }
    static Bytes before(const Group* g, size_t part, uint32_t salt) {
        Bytes all(part * (size_t)g->size * sizeof(D));
        for (size_t i = 0; i < part * (size_t)g->size; i++) {
            D d = value(g, g->rank, i, salt);
            memcpy(all.data() + i * sizeof(D), &d, sizeof(D));
        }
        return all;
    }
    Ring(Transfer* transfer, size_t elements, uint32_t s)
        : t(transfer), part(elements), salt(s), memory(before(t->group, part, salt)), received(Bytes(part * sizeof(D), 0xee)) {}
    void start(void) {
        Counted counted(t->group, REDUCE_SCATTER, part * sizeof(D) * (uint64_t)(t->group->size - 1));
        start_ring_sum(t, memory.data(), received.data(), equal_parts(part * (size_t)dtype_bytes(DTypeOf<D>::value)), DTypeOf<D>::value, REDUCE_SCATTER, NULL);
    }
    // Part p begins at rank p+1 and goes round to rank p, which adds last
    void check(void) {
        const Group* g = t->group;
        const int R = g->size, p = g->rank;
        Bytes got = memory.content();
        received.content();
        bool order_shows = false;
        for (size_t k = 0; k < part; k++) {
            size_t i = part * (size_t)p + k;
            D sum = value(g, (p + 1) % R, i, salt), have;
            for (int h = 2; h <= R; h++) { sum = hop_sum(sum, value(g, (p + h) % R, i, salt)); }
            if (k < 1000) {
                D other = value(g, p, i, salt);  // as if it began at rank p
                for (int h = 1; h < R; h++) { other = hop_sum(other, value(g, (p + h) % R, i, salt)); }
                order_shows = order_shows || memcmp(&sum, &other, sizeof(D)) != 0;
            }
            memcpy(&have, got.data() + i * sizeof(D), sizeof(D));
            CHECK(memcmp(&have, &sum, sizeof(D)) == 0, "%s, %zu elements, %zu: %g, not %g", dtype_names[DTypeOf<D>::value], part, k,
                (double)to_float(have), (double)to_float(sum));
        }
        CHECK(R < 3 || part < 1000 || g->transport == OVER_NCCL || order_shows);
    }
};

// ---- parts that are not equal ----

// Where the parts of an array of `lines` · 64 bytes begin, in units of `unit` bytes
enum Cutting { EQUAL, EMPTY_FIRST, EMPTY_LAST, ALL_FIRST, ALL_LAST, ALL_IN_THE_MIDDLE, EVERY_OTHER, AT_RANDOM, AT_RANDOM_AND_SHORT, CUTTINGS };
static std::vector<size_t> cuts_of(Cutting cutting, int ranks, size_t lines, size_t unit, uint32_t salt) {
    std::vector<size_t> cuts((size_t)ranks + 1);
    size_t R = (size_t)ranks;
    for (size_t r = 1; r < R; r++) {
        switch (cutting) {
            case EQUAL: cuts[r] = lines / R * r; break;
            case EMPTY_FIRST: cuts[r] = R == 1 ? 0 : lines / (R - 1) * (r - 1); break;
            case EMPTY_LAST: cuts[r] = R == 1 ? 0 : r == R - 1 ? lines : lines / (R - 1) * r; break;
            case ALL_FIRST: cuts[r] = lines; break;
            case ALL_LAST: cuts[r] = 0; break;
            case ALL_IN_THE_MIDDLE: cuts[r] = r <= R / 2 ? 0 : lines; break;
            case EVERY_OTHER: cuts[r] = lines * (r / 2 * 2) / R; break;
            default: cuts[r] = hash_of(r, salt, 77) % (lines + 1);
        }
    }
    cuts[R] = cutting == AT_RANDOM_AND_SHORT ? lines * 2 / 3 : lines;  // the array may be longer than its parts
    for (size_t r = 1; r < R; r++) { cuts[r] = std::min(cuts[r], cuts[R]); }
    std::sort(cuts.begin(), cuts.end());
    for (size_t& c : cuts) { c = c * 64 / unit; }
    return cuts;
}

struct GatherParts {
    Transfer* t;
    std::vector<size_t> cuts;
    size_t unit;
    uint32_t salt;
    Memory memory;
    static Bytes before(const Group* g, const std::vector<size_t>& cuts, size_t unit, uint32_t salt) {
        Bytes all(cuts.back() * unit, 0xee), mine = bytes_of(g->rank, (cuts[(size_t)g->rank + 1] - cuts[(size_t)g->rank]) * unit, salt);
        std::copy(mine.begin(), mine.end(), all.begin() + (long)(cuts[(size_t)g->rank] * unit));
        return all;
    }
    GatherParts(Transfer* transfer, const std::vector<size_t>& c, size_t u, uint32_t s)
        : t(transfer), cuts(c), unit(u), salt(s), memory(before(t->group, cuts, unit, salt)) {}
    void start(void) {
        size_t r = (size_t)t->group->rank;
        Counted counted(t->group, WEIGHTS_GATHER, (cuts[r + 1] - cuts[r]) * unit * (uint64_t)(t->group->size - 1));
        start_all_gather(t, memory.data(), cut_parts(cuts.data(), unit), WEIGHTS_GATHER, NULL);
    }
    void check(void) {
        Bytes got = memory.content();
        for (size_t r = 0; r + 1 < cuts.size(); r++) {
            Bytes want = bytes_of((int)r, (cuts[r + 1] - cuts[r]) * unit, salt);
            CHECK(std::equal(want.begin(), want.end(), got.begin() + (long)(cuts[r] * unit)), "part %zu of %zu bytes", r, want.size());
        }
    }
};

template <class D> struct RingParts {
    Transfer* t;
    std::vector<size_t> cuts;  // elements
    uint32_t salt;
    Memory memory, received;
    static Bytes before(const Group* g, const std::vector<size_t>& cuts, uint32_t salt) {
        Bytes all(cuts.back() * sizeof(D));
        for (size_t i = 0; i < cuts.back(); i++) {
            D d = Ring<D>::value(g, g->rank, i, salt);
            memcpy(all.data() + i * sizeof(D), &d, sizeof(D));
        }
        return all;
    }
    static size_t longest(const std::vector<size_t>& cuts) {
        size_t most = 0;
        for (size_t r = 0; r + 1 < cuts.size(); r++) { most = std::max(most, cuts[r + 1] - cuts[r]); }
        return most;
    }
    RingParts(Transfer* transfer, const std::vector<size_t>& c, uint32_t s)
        : t(transfer), cuts(c), salt(s), memory(before(t->group, cuts, salt)), received(Bytes(longest(cuts) * sizeof(D), 0xee)) {}
    void start(void) {
        size_t r = (size_t)t->group->rank, others = cuts.back() - (cuts[r + 1] - cuts[r]);  // each part but the own one goes through here once
        Counted counted(t->group, REDUCE_SCATTER, t->group->size > 1 ? others * sizeof(D) : 0);
        start_ring_sum(t, memory.data(), received.data(), cut_parts(cuts.data(), sizeof(D)), DTypeOf<D>::value, REDUCE_SCATTER, NULL);
    }
    void check(void) {
        const Group* g = t->group;
        Bytes got = memory.content();
        received.content();
        for (size_t i = cuts[(size_t)g->rank]; i < cuts[(size_t)g->rank + 1]; i++) {
            D sum = Ring<D>::value(g, (g->rank + 1) % g->size, i, salt), have;
            for (int h = 2; h <= g->size; h++) { sum = hop_sum(sum, Ring<D>::value(g, (g->rank + h) % g->size, i, salt)); }
            memcpy(&have, got.data() + i * sizeof(D), sizeof(D));
            CHECK(memcmp(&have, &sum, sizeof(D)) == 0, "%s, element %zu: %g, not %g", dtype_names[DTypeOf<D>::value], i, (double)to_float(have),
                (double)to_float(sum));
        }
    }
};

// An array of which rank r has the r-th chunk, byte by byte, until it has its part
struct Regroup {
    Transfer* t;
    size_t chunk;
    std::vector<size_t> cuts;
    size_t unit;
    uint32_t salt;
    Bytes given;
    Memory sent, received;
    static unsigned char byte(size_t i, uint32_t salt) { return (unsigned char)(hash_of(i / 8, 5, salt) >> i % 8 * 8); }
    static Bytes before(const Group* g, size_t chunk, uint32_t salt) {
        Bytes b(chunk);
        for (size_t i = 0; i < chunk; i++) { b[i] = byte((size_t)g->rank * chunk + i, salt); }
        return b;
    }
    size_t begin(int r) const { return cuts[(size_t)r] * unit; }
    Regroup(Transfer* transfer, size_t chunk_bytes, const std::vector<size_t>& c, size_t u, uint32_t s)
        : t(transfer), chunk(chunk_bytes), cuts(c), unit(u), salt(s), given(before(t->group, chunk, salt)), sent(given),
          received(Bytes(begin(t->group->rank + 1) - begin(t->group->rank), 0xee)) {}
    void start(void) {
        const Group* g = t->group;
        uint64_t bytes = 0;
        for (size_t i = (size_t)g->rank * chunk; i < (size_t)(g->rank + 1) * chunk; i += 64) {  // what of our chunk is not ours
            bytes += i < begin(g->size) && (i < begin(g->rank) || i >= begin(g->rank + 1)) ? 64 : 0;
        }
        Counted counted(t->group, REGROUP, g->size > 1 ? bytes : 0);
        start_regroup(t, received.data(), sent.data(), chunk, cut_parts(cuts.data(), unit), REGROUP, NULL);
    }
    void check(void) {
        CHECK(sent.content() == given, "what was sent has changed");
        Bytes got = received.content();
        for (size_t i = 0; i < got.size(); i++) {
            unsigned char want = t->group->transport == ALONE ? 0xee : byte(begin(t->group->rank) + i, salt);
            CHECK(got[i] == want, "byte %zu of a part of %zu, chunks of %zu: %x, not %x", i, got.size(), chunk, got[i], want);
        }
    }
};

struct Bits {
    Transfer* t;
    size_t n;
    bool least;
    uint32_t salt;
    CommOperation counter;
    Memory memory;
    static uint32_t value(int rank, size_t i, uint32_t salt) {
        const uint32_t list[] = {0, 1, float_to_bits(FLT_MIN), float_to_bits(1.0f), float_to_bits(FLT_MAX), 0x7f800000u, 0x7fc00000u, 0x7fffffffu};
        uint64_t h = hash_of(i, (uint64_t)rank, salt);
        return i % 3 == 0 ? (uint32_t)(h >> 33) : i % 3 == 1 ? list[h % 8] : rank == (int)(i % 8) ? list[h % 8] : float_to_bits(FLT_MAX);
    }
    static Bytes before(const Group* g, size_t n, uint32_t salt) {
        Bytes all(n * 4);
        for (size_t i = 0; i < n; i++) {
            uint32_t u = value(g->rank, i, salt);
            memcpy(all.data() + 4 * i, &u, 4);
        }
        return all;
    }
    Bits(Transfer* transfer, size_t count, bool minimum, uint32_t s, CommOperation c)
        : t(transfer), n(count), least(minimum), salt(s), counter(c), memory(before(t->group, n, salt)) {}
    void start(void) {
        Counted counted(t->group, counter, 2 * n * 4 * (uint64_t)(t->group->size - 1) / (uint64_t)t->group->size);
        (least ? start_all_reduce_min : start_all_reduce_max)(t, memory.data(), n, counter, NULL);
    }
    void check(void) {
        Bytes got = memory.content();
        for (size_t i = 0; i < n; i++) {
            uint32_t want = value(0, i, salt), have;
            for (int r = 1; r < t->group->size; r++) {
                uint32_t other = value(r, i, salt);
                want = least ? std::min(want, other) : std::max(want, other);
            }
            memcpy(&have, got.data() + 4 * i, 4);
            CHECK(have == want, "%s %zu of %zu: 0x%x, not 0x%x", least ? "min" : "max", i, n, have, want);
        }
    }
};

template <class What, class... A> static void run(A... a) {
    What what(a...);
    what.start();
    finish(what.t);
    what.check();
}

// part_bytes: a multiple of 64
static void run_kind(Transfer* t, uint32_t kind, size_t part_bytes, uint32_t salt) {
    switch (kind % 8) {
        case 0: run<Gather>(t, part_bytes, salt, salt % 2 == 0 ? ALL_GATHER : SCALES); break;
        case 1: run<Exchange>(t, part_bytes, salt); break;
        case 2: run<Ring<float>>(t, part_bytes / 4, salt); break;
        case 3: run<Ring<bf16>>(t, part_bytes / 2, salt); break;
        case 4: if (t->group->transport != OVER_NCCL) { run<Ring<e4m3>>(t, part_bytes, salt); } break;  // which NCCL has for some GPUs only
        case 5: if (t->group->transport != OVER_NCCL) { run<Ring<e5m2>>(t, part_bytes, salt); } break;
        case 6: run<Bits>(t, part_bytes / 4, true, salt, salt % 2 == 0 ? SCALES : ALL_REDUCE_MAX); break;
        default: run<Bits>(t, part_bytes / 4 + 1, false, salt, salt % 2 == 0 ? SCALES : ALL_REDUCE_MAX); break;
    }
}

// the longest, of several messages or of one that is not copied on its way; where many ranks share few cores a shorter one
static size_t largest_part(int ranks) { return ranks > 4 ? 80 * 1024 : 300 * 1024; }

// lines: the array's length is that times 64 bytes a rank
static void run_parts(Transfer* t, Cutting cutting, size_t lines, uint32_t salt) {
    const int R = t->group->size;
    auto cuts = [=](size_t unit) { return cuts_of(cutting, R, lines * (size_t)R, unit, salt); };
    run<GatherParts>(t, cuts(1), (size_t)1, salt);
    run<RingParts<float>>(t, cuts(4), salt);
    run<Regroup>(t, 64 * lines, cuts(4), (size_t)4, salt);
    if (t->group->transport == OVER_NCCL) { return; }
    run<GatherParts>(t, cuts(2), (size_t)2, salt);
    run<RingParts<bf16>>(t, cuts(2), salt);
    run<RingParts<e4m3>>(t, cuts(1), salt);
    run<RingParts<e5m2>>(t, cuts(1), salt);
    run<Regroup>(t, 64 * lines, cuts(1), (size_t)1, salt);
}

static void check_parts(Transfer* t) {
    for (int c = 0; c < CUTTINGS; c++) {
        for (size_t lines : {0, 1, 5}) { run_parts(t, (Cutting)c, lines, (uint32_t)c); }
    }
    for (Cutting c : {EQUAL, ALL_IN_THE_MIDDLE, AT_RANDOM}) { run_parts(t, c, largest_part(t->group->size) / 64, 9); }
    uint32_t trials = getenv("SOAK") != NULL ? 1000 : 8;
    for (uint32_t i = 0; i < trials; i++) {
        usleep((unsigned)(hash_of(i, (uint64_t)t->group->rank, 3) % 500));
        run_parts(t, i % 2 == 0 ? AT_RANDOM : AT_RANDOM_AND_SHORT, hash_of(i, 0, 4) % 90, 1000 + i);
    }
}

static void check_kinds(Transfer* t) {
    CHECK(transfer_done(t));  // nothing was started yet
    for (uint32_t kind = 0; kind < 8; kind++) {
        const size_t parts[] = {0, 64, 128, 4096, 64 * 601, largest_part(t->group->size)};
        for (size_t part : parts) { run_kind(t, kind, part, kind); }
    }
    for (size_t n : {1, 5, 1000}) {  // scales are counted one by one
        run<Bits>(t, n, true, (uint32_t)n, SCALES);
        run<Bits>(t, n, false, (uint32_t)n, SCALES);
    }
    // one after the other with no barrier, each rank at its own pace
    for (uint32_t i = 0; i < 40; i++) {
        uint64_t h = hash_of(i, 0, 1);
        usleep((unsigned)(hash_of(i, (uint64_t)t->group->rank, 2) % 1500));
        run_kind(t, (uint32_t)(h % 8), (h >> 8) % 40 * 64 * ((h >> 16) % 4 == 0 ? 20 : 1), 100 + i);
    }
}

// One rank does not start before all others have seen that their transfer is not done: who waited in between would wait for ever.
template <class What> static void check_late(What&& what, int late) {
#ifdef USE_MPI
    Group* g = what.t->group;
    const int TAG = 9;
    if (g->rank == late) {
        for (int i = 1; i < g->size; i++) { MPI_CHECK(MPI_Recv(NULL, 0, MPI_BYTE, MPI_ANY_SOURCE, TAG, MPI_COMM_WORLD, MPI_STATUS_IGNORE)); }
        what.start();
    } else {
        what.start();
        for (int i = 0; i < 200; i++) { CHECK(!transfer_done(what.t), "rank %d has not begun", late); }
        MPI_CHECK(MPI_Send(NULL, 0, MPI_BYTE, late, TAG, MPI_COMM_WORLD));
    }
    finish(what.t);
    what.check();
#else
    (void)what, (void)late;
#endif
}

static void check_lateness(Transfer* t) {
    Group* g = t->group;
    if (g->transport != OVER_MPI) { return; }
    for (int late : {0, g->size - 1}) {
        for (size_t part : {(size_t)64, (size_t)64 * 1024}) {
            uint32_t salt = (uint32_t)(late * 10 + 500);
            check_late(Gather(t, part, salt, ALL_GATHER), late);
            check_late(Exchange(t, part, salt), late);
            check_late(Ring<float>(t, part / 4, salt), late);
            check_late(Ring<e4m3>(t, part, salt), late);
            check_late(Bits(t, part / 4, true, salt, SCALES), late);
            size_t lines = part / 64 * (size_t)g->size;
            auto cuts = [=](size_t unit) { return cuts_of(EQUAL, g->size, lines, unit, salt); };
            check_late(GatherParts(t, cuts(1), 1, salt), late);
            check_late(RingParts<bf16>(t, cuts(2), salt), late);
            if (late == 0 && g->size == 2) { check_late(Regroup(t, part, {0, 0, part / 2}, 4, salt), late); }  // the other needs its chunk
        }
    }
}

// Parts of so many bytes as their unit allows, and no more
static void check_units(Group* g) {
    for (size_t unit = 1; unit <= 64; unit *= 2) {
        CHECK(transfer_unit(unit) == unit && transfer_unit(3 * unit) == unit && transfer_unit(128 * unit) == 64, "%zu", unit);
        Transfer t;
        transfer_create(&t, g, 15 * unit * (size_t)g->size, unit);
        for (size_t n : {0, 1, 3, 15}) {
            uint32_t salt = (uint32_t)(unit + n);
            run<Gather>(&t, n * unit, salt, ALL_GATHER);
            run<Exchange>(&t, n * unit, salt);
            run<Ring<e4m3>>(&t, n * unit, salt);
            if (unit >= 4) { run<Ring<float>>(&t, n * unit / 4, salt); }
            std::vector<size_t> cuts((size_t)g->size + 1, n * (size_t)g->size);  // all is the first rank's
            cuts[0] = 0;
            run<GatherParts>(&t, cuts, unit, salt);
        }
        transfer_free(&t);
    }
}

// An array goes round, forward and backward; passed on and received at once, or at the ends of a chain one of both only
struct PassedOn {
    Transfer* t;
    size_t bytes;
    int from, to;
    uint32_t salt;
    Bytes given;
    Memory sent, received;
    PassedOn(Transfer* transfer, size_t n, int f, int d, uint32_t s)
        : t(transfer), bytes(n), from(f), to(d), salt(s), given(bytes_of(t->group->rank, n, s)), sent(given), received(Bytes(n, 0xee)) {}
    void start(void) {
        Counted counted(t->group, PIPELINE, to >= 0 ? bytes : 0);
        start_passing_on(t, from >= 0 ? received.data() : NULL, from, to >= 0 ? sent.data() : NULL, to, bytes, PIPELINE, NULL);
    }
    void check(void) {
        CHECK(sent.content() == given, "what was sent has changed");
        CHECK(received.content() == (from >= 0 ? bytes_of(from, bytes, salt) : Bytes(bytes, 0xee)), "%zu bytes from %d", bytes, from);
    }
};

static void check_passing_on(Transfer* t) {
    const int R = t->group->size, me = t->group->rank;
    run<PassedOn>(t, (size_t)64, -1, -1, 0u);
    if (R == 1) { return; }
    for (size_t n : {(size_t)0, (size_t)64, (size_t)4096, largest_part(R)}) {
        for (int by : {1, R - 1}) { run<PassedOn>(t, n, (me + R - by) % R, (me + by) % R, 7u); }
        run<PassedOn>(t, n, me - 1, me + 1 < R ? me + 1 : -1, 8u);
        run<PassedOn>(t, n, me + 1 < R ? me + 1 : -1, me - 1, 9u);
        if (me < 2) { run<PassedOn>(t, n, 1 - me, 1 - me, 10u); }
    }
}

// one process alone: whatever the length, nothing is done, and at once
static void check_alone(Transfer* t) {
    if (t->group->transport != ALONE) { return; }
    for (size_t n : {0, 1, 63, 1000}) {
        run<Gather>(t, n, 1u, ALL_GATHER);
        run<Exchange>(t, n, 1u);
        run<Ring<bf16>>(t, n, 1u);
        run<Bits>(t, n, true, 1u, SCALES);
    }
    for (int i = 0; i < COMM_OPERATIONS; i++) { CHECK(t->group->bytes_sent[i] == 0); }
}

static int run_rank(const char* mode, const char* argument, int argc, char** argv) {
    World world = world_init(&argc, &argv);
    const int R = atoi(argument);
    CHECK(world.size == R, "%d ranks", world.size);
    world_select_device(&world);
    Group group = group_world(&world, true);
    const Transport transport = group.transport;
    if (strcmp(mode, "exchange") == 0) {
        Transfer t;
        transfer_create(&t, &group, 0);  // nothing is staged
        if (transport != OVER_MPI_STAGED) {
            check_kinds(&t);
            check_parts(&t);
            check_passing_on(&t);
        }
        check_lateness(&t);
        check_alone(&t);
        transfer_free(&t);
        CHECK(t.group == NULL);
        if (transport == OVER_MPI || transport == OVER_MPI_STAGED) {  // as ranks do that share a GPU
            group.transport = OVER_MPI_STAGED;
            transfer_create(&t, &group, largest_part(R) * (size_t)R);  // to the byte
            check_kinds(&t);
            check_parts(&t);
            check_passing_on(&t);
            transfer_free(&t);
            if (R < 5) { check_units(&group); }
            group.transport = transport;
            if (transport == OVER_MPI) { check_units(&group); }
        }
        group_free(&group);
        world_finalize(&world);
        return 0;
    }
    bool staged = strncmp(mode, "staged ", 7) == 0;
    if (staged || transport != OVER_MPI) { group.transport = OVER_MPI_STAGED; }
    Transfer t;
    transfer_create(&t, &group, strstr(mode, "long") != NULL ? 128 * (size_t)R - 64 : 4096);
    if (strstr(mode, "gather") != NULL) { run<Gather>(&t, (size_t)63, 1u, ALL_GATHER); }
    if (strstr(mode, "exchange") != NULL) { run<Exchange>(&t, (size_t)96, 1u); }
    if (strstr(mode, "unit") != NULL || strstr(mode, "many") != NULL) {
        transfer_free(&t);
        transfer_create(&t, &group, 4096, 2);
        Memory little(Bytes(64));
        if (strstr(mode, "many") != NULL) { start_all_gather(&t, little.data(), equal_parts(((size_t)INT_MAX + 1) * 2), ALL_GATHER, NULL); }
        run<Exchange>(&t, (size_t)7, 1u);
    }
    if (strstr(mode, "no power") != NULL) { transfer_create(&t, &group, 4096, 48); }
    if (strstr(mode, "ring") != NULL) { run<Ring<bf16>>(&t, (size_t)33, 1u); }
    if (strstr(mode, "cut") != NULL) { run<GatherParts>(&t, std::vector<size_t>{0, 63, 128}, (size_t)1, 1u); }
    if (strstr(mode, "regroup") != NULL) { run<Regroup>(&t, (size_t)128, std::vector<size_t>{0, 0, 256}, (size_t)1, 1u); }
    else if (strstr(mode, "long") != NULL) { run<Gather>(&t, (size_t)128, 1u, ALL_GATHER); }
    barrier(&group);  // it may be another rank that refuses
    CHECK(false, "was not refused");
    return 0;
}

// ---- the tests ----

static void ranks_agree(int ranks) {
    if (!can_launch(ranks)) { skip(); }
    char argument[8];
    snprintf(argument, sizeof(argument), "%d", ranks);
    expect_ranks(ranks, "exchange", argument, NULL, 60, 0);
}
static void one_process_keeps_its_own(void**) { ranks_agree(1); }
static void two_ranks_agree(void**) { ranks_agree(2); }
static void three_ranks_agree(void**) { ranks_agree(3); }
static void four_ranks_agree(void**) { ranks_agree(4); }
static void five_ranks_agree(void**) { ranks_agree(5); }
static void six_ranks_agree(void**) { ranks_agree(6); }
static void seven_ranks_agree(void**) { ranks_agree(7); }
static void eight_ranks_agree(void**) { ranks_agree(8); }

static void refused(const char* mode, const char* line) {
    if (!can_launch(2)) { skip(); }
    Launched l = expect_ranks(2, mode, "2", NULL, 30, 1);
    expect_line(&l, line);
}

static void parts_that_are_no_multiple_of_64_bytes_are_refused(void**) {
    refused("gather", "a part of 63 bytes cannot be sent in one piece");
    refused("exchange, uneven", "a part of 96 bytes cannot be sent in one piece");
    refused("ring", "a part of 66 bytes cannot be sent in one piece");
    refused("cut", "a part of 63 bytes cannot be sent in one piece");
    refused("unit of 2", "a part of 7 bytes cannot be sent in one piece");
    refused("no power of two", "transfers do not count in units of 48 bytes");
}

// MPI counts with an int
static void parts_of_too_many_units_are_refused(void**) {
    if (!device_is_gpu) { refused("many", "a part of 4294967296 bytes cannot be sent in one piece"); }
}

static void arrays_longer_than_their_staging_are_refused(void**) {
    refused("staged long", "an array of 256 bytes is staged through 192");
    refused("staged long regroup", "rank 1: an array of 256 bytes is staged through 192");
}

int main(int argc, char** argv) {
    if (argc == 3) { return run_rank(argv[1], argv[2], argc, argv); }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_process_keeps_its_own), cmocka_unit_test(two_ranks_agree), cmocka_unit_test(three_ranks_agree),
        cmocka_unit_test(four_ranks_agree), cmocka_unit_test(five_ranks_agree), cmocka_unit_test(six_ranks_agree), cmocka_unit_test(seven_ranks_agree),
        cmocka_unit_test(eight_ranks_agree),
        cmocka_unit_test(parts_that_are_no_multiple_of_64_bytes_are_refused), cmocka_unit_test(arrays_longer_than_their_staging_are_refused),
        cmocka_unit_test(parts_of_too_many_units_are_refused),
    };
    return cmocka_run_group_tests_name("transfers", tests, NULL, NULL);
}
