// transfers.cuh: exchanges between ranks that are started and go on by themselves while the device computes.
//
// They carry gradients and weights: a ring that adds (reduce-scatter), an exchange of parts (all-to-all) and their collection (all-gather), which work on an
// array of one part a rank, of equal parts or of others, each a multiple of 64 bytes or of another unit; the step from equal parts to others (regroup); the
// minimum or maximum of a few scales; and an array passed on from rank to rank. All in device memory.
//
//   NCCL          the calls go onto the stream, whose order is all that is needed: a transfer counts as done at once
//   MPI           non-blocking MPI; `transfer_done` asks MPI how far it is, and so makes it go on: to be called between kernels
//   MPI, staged   through pinned host memory, copied there and back; returns when it is done
//
// MPI sums nothing itself in FP8, so the ring is ours: in hop h rank r sends part r-1-h on to its right neighbour, and adds its own codes to part r-2-h
// that comes from the left, as NCCL does (gradient.cuh, hop_sum). Part p so starts at rank p+1 and ends, complete, at rank p.
//
//     Transfer t;
//     transfer_create(&t, &group, largest_bytes);
//     start_all_gather(&t, data, part_bytes, ALL_GATHER, stream);
//     while (!transfer_done(&t)) { … }
//     transfer_free(&t);
//
// One transfer is under way at a time. Every rank starts the same ones in the same order. `counter`: under what the bytes sent are counted.
#pragma once
#include "collectives.cuh"
#include "gradient.cuh"

constexpr size_t PART_BYTES = 64;  // a part is a multiple of this, where nothing else is said: MPI counts in it, with an int

// The largest unit in which parts of so many bytes can be counted
static inline size_t transfer_unit(size_t bytes) { return bytes % PART_BYTES == 0 ? PART_BYTES : bytes & (~bytes + 1); }

// An array of one part a rank: rank r's begins at byte begin(r) and ends at begin(r + 1)
struct Parts {
    size_t equal;        // bytes of each; 0: not equal, but
    const size_t* cuts;  // (ranks + 1) of
    size_t unit;         // bytes
    size_t begin(int r) const { return cuts == NULL ? (size_t)r * equal : cuts[r] * unit; }
    size_t bytes(int r) const { return begin(r + 1) - begin(r); }
};
static inline Parts equal_parts(size_t bytes) { return Parts{bytes, NULL, 0}; }
static inline Parts cut_parts(const size_t* cuts, size_t unit) { return Parts{0, cuts, unit}; }

struct Transfer {
    Group* group;
#ifdef USE_MPI
    MPI_Comm comm;             // of its own: what is under way keeps its order whatever else the ranks exchange meanwhile
    MPI_Datatype line;         // `unit` bytes
    size_t unit;
    MPI_Request requests[2];   // of what is under way
    int hop;                   // of the ring, from 0; -1: no ring
    char *ring, *received;     // (all parts), (the largest part): host memory
    Parts parts;
    DType type;
    int *counts, *places;      // (2, size) in lines, of parts that are not equal: sent, then received
    char* staging;             // (2, largest) pinned, where the group is staged
    size_t largest;
#endif
};

// `largest`: bytes of the longest array that will travel; `unit`: a power of two, 64 at most, of which every part is a multiple
static inline void transfer_create(Transfer* t, Group* group, size_t largest, size_t unit = PART_BYTES) {
    *t = Transfer{};
    t->group = group;
#ifdef USE_MPI
    if (group->transport == ALONE) { return; }
    if (unit == 0 || unit > PART_BYTES || transfer_unit(unit) != unit) { die("transfers do not count in units of %zu bytes", unit); }
    MPI_CHECK(MPI_Comm_dup(group->comm, &t->comm));
    MPI_CHECK(MPI_Comm_set_errhandler(t->comm, MPI_ERRORS_RETURN));
    t->counts = (int*)host_alloc(2 * (size_t)group->size * sizeof(int));
    t->places = (int*)host_alloc(2 * (size_t)group->size * sizeof(int));
    MPI_CHECK(MPI_Type_contiguous((int)unit, MPI_BYTE, &t->line));
    MPI_CHECK(MPI_Type_commit(&t->line));
    t->unit = unit;
    t->requests[0] = t->requests[1] = MPI_REQUEST_NULL;
    t->hop = -1;
    t->largest = largest;
    if (group->transport == OVER_MPI_STAGED) { t->staging = (char*)pinned_alloc(2 * largest); }
#else
    (void)largest, (void)unit;
#endif
}

static inline void transfer_free(Transfer* t) {
#ifdef USE_MPI
    if (t->group != NULL && t->group->transport != ALONE) {
        MPI_CHECK(MPI_Type_free(&t->line));
        MPI_CHECK(MPI_Comm_free(&t->comm));
        free(t->counts);
        free(t->places);
        if (t->staging != NULL) { pinned_free(t->staging); }
    }
#endif
    *t = Transfer{};
}

#ifdef USE_MPI

enum { TAG_RING = 3, TAG_PASSED_ON = 4 };

static inline int transfer_lines(const Transfer* t, size_t bytes) {
    if (bytes % t->unit != 0 || bytes / t->unit > INT_MAX) { die("a part of %zu bytes cannot be sent in one piece", bytes); }
    return (int)(bytes / t->unit);
}

// The part that this rank sends in hop h; in it, it receives the one that it sends in hop h + 1
static inline int ring_part(const Group* g, int hop) { return (2 * g->size + g->rank - 1 - hop) % g->size; }

static inline void ring_start_hop(Transfer* t) {
    Group* g = t->group;
    int left = (g->rank + g->size - 1) % g->size, right = (g->rank + 1) % g->size, sent = ring_part(g, t->hop), received = ring_part(g, t->hop + 1);
    MPI_CHECK(MPI_Irecv(t->received, transfer_lines(t, t->parts.bytes(received)), t->line, left, TAG_RING, t->comm, &t->requests[0]));
    MPI_CHECK(MPI_Isend(t->ring + t->parts.begin(sent), transfer_lines(t, t->parts.bytes(sent)), t->line, right, TAG_RING, t->comm, &t->requests[1]));
}

static inline bool requests_done(Transfer* t) {
    int done = 0;
    MPI_CHECK(MPI_Testall(2, t->requests, &done, MPI_STATUSES_IGNORE));
    return done != 0;
}

// Is what was started last done? Makes it go on.
static inline bool mpi_transfer_done(Transfer* t) {
    while (requests_done(t)) {
        if (t->hop < 0) { return true; }
        int part = ring_part(t->group, t->hop + 1);
        hop_add(t->type, t->ring + t->parts.begin(part), t->received, t->parts.bytes(part) / (size_t)dtype_bytes(t->type));
        t->hop = t->hop + 2 < t->group->size ? t->hop + 1 : -1;
        if (t->hop >= 0) { ring_start_hop(t); }
    }
    return false;
}

// Runs `start(sent, received)` on host memory: on the arrays themselves, or on copies of them. `sent` is device memory of `bytes` bytes; `received` is
// another array, NULL: the result is in `sent`. Of a copy, `result` bytes from `at` on come back.
template <class Start>
static inline void over_mpi(Transfer* t, void* sent, size_t bytes, void* received, size_t at, size_t result, Stream stream, Start start) {
    if (t->group->transport == OVER_MPI) { start((char*)sent, (char*)received); return; }
    if (max_of(bytes, result) > t->largest) { die("an array of %zu bytes is staged through %zu", max_of(bytes, result), t->largest); }
    char *second = t->staging + t->largest, *from = received != NULL ? second : t->staging, *to = (char*)(received != NULL ? received : sent);
    if (bytes > 0) { copy_to_host(t->staging, sent, bytes, stream); }
    start(t->staging, second);
    while (!mpi_transfer_done(t)) {}
    if (result > 0) { copy_to_device(to + at, from + at, result, stream); }
    stream_sync(stream);  // before the staging is written again
}

#endif

static inline bool transfer_done(Transfer* t) {
#ifdef USE_MPI
    if (t->group->transport == OVER_MPI) { return mpi_transfer_done(t); }
#endif
    (void)t;
    return true;
}

static inline void count_sent(Group* g, CommOperation counter, uint64_t bytes) {
    if (counter != NOT_COUNTED) { g->bytes_sent[counter] += bytes; }
}

enum BitsOperation { BITS_MIN, BITS_MAX };

static inline void start_all_reduce_bits(Transfer* t, uint32_t* bits, size_t n, BitsOperation op, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE) { return; }
    count_sent(g, counter, 2 * n * sizeof(uint32_t) * ((uint64_t)g->size - 1) / (uint64_t)g->size);  // as a ring sends
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) { nccl_all_reduce_bits(g->nccl, bits, n, op == BITS_MIN ? ncclMin : ncclMax, stream); return; }
#endif
#ifdef USE_MPI
    over_mpi(t, bits, n * sizeof(uint32_t), NULL, 0, n * sizeof(uint32_t), stream, [=](char* data, char*) {
        MPI_CHECK(MPI_Iallreduce(MPI_IN_PLACE, data, (int)n, MPI_UINT32_T, op == BITS_MIN ? MPI_MIN : MPI_MAX, t->comm, &t->requests[0]));
    });
#else
    (void)bits, (void)op, (void)stream;
#endif
}

// data (n) = the least, or the greatest, over the ranks, of floats that are not negative, compared by their bits: NaN is above inf, inf above the rest.
static inline void start_all_reduce_min(Transfer* t, void* data, size_t n, CommOperation counter, Stream stream) {
    start_all_reduce_bits(t, (uint32_t*)data, n, BITS_MIN, counter, stream);
}
static inline void start_all_reduce_max(Transfer* t, void* data, size_t n, CommOperation counter, Stream stream) {
    start_all_reduce_bits(t, (uint32_t*)data, n, BITS_MAX, counter, stream);
}

// data (parts): part r is given by rank r, everyone gets all
static inline void start_all_gather(Transfer* t, void* data, Parts parts, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE) { return; }
    count_sent(g, counter, parts.bytes(g->rank) * ((uint64_t)g->size - 1));
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        if (parts.cuts == NULL) { nccl_all_gather(g->nccl, data, parts.equal, g->rank, stream); }
        else { nccl_all_gather_parts(g->nccl, data, [=](int r) { return parts.begin(r); }, g->size, stream); }
        return;
    }
#endif
#ifdef USE_MPI
    size_t bytes = parts.begin(g->size);
    over_mpi(t, data, bytes, NULL, 0, bytes, stream, [=](char* all, char*) {
        if (parts.cuts == NULL) {
            MPI_CHECK(MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all, transfer_lines(t, parts.equal), t->line, t->comm, &t->requests[0]));
            return;
        }
        for (int r = 0; r < g->size; r++) {
            t->counts[r] = transfer_lines(t, parts.bytes(r));
            t->places[r] = transfer_lines(t, parts.begin(r));
        }
        MPI_CHECK(MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all, t->counts, t->places, t->line, t->comm, &t->requests[0]));
    });
#else
    (void)data, (void)stream;
#endif
}

// received (size, part): part r is what rank r has for us; sent (size, part): part p is what we have for rank p
static inline void start_all_to_all(Transfer* t, void* received, void* sent, size_t part_bytes, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE) { return; }
    count_sent(g, counter, part_bytes * ((uint64_t)g->size - 1));
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        auto at = [=](int r) { return (size_t)r * part_bytes; };
        auto bytes = [=](int) { return part_bytes; };
        nccl_exchange(g->nccl, received, sent, at, bytes, at, bytes, g->size, stream);
        return;
    }
#endif
#ifdef USE_MPI
    size_t bytes = part_bytes * (size_t)g->size;
    over_mpi(t, sent, bytes, received, 0, bytes, stream, [=](char* from, char* to) {
        int lines = transfer_lines(t, part_bytes);
        MPI_CHECK(MPI_Ialltoall(from, lines, t->line, to, lines, t->line, t->comm, &t->requests[0]));
    });
#else
    (void)received, (void)sent, (void)stream;
#endif
}

// received: this rank's part of an array of which each rank has one of equal chunks, `sent` this rank's. `parts` are the array's, of `chunk` bytes · size at
// most.
static inline void start_regroup(Transfer* t, void* received, void* sent, size_t chunk, Parts parts, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE) { return; }
    // where rank `from`'s chunk and rank `to`'s part meet
    auto begin = [=](int from, int to) { return max_of((size_t)from * chunk, parts.begin(to)); };
    auto bytes = [=](int from, int to) {
        size_t end = min_of((size_t)(from + 1) * chunk, parts.begin(to + 1));
        return end > begin(from, to) ? end - begin(from, to) : (size_t)0;
    };
    int me = g->rank;
    [[maybe_unused]] auto sent_at = [=](int r) { return bytes(me, r) > 0 ? begin(me, r) - (size_t)me * chunk : 0; };
    [[maybe_unused]] auto received_at = [=](int r) { return bytes(r, me) > 0 ? begin(r, me) - parts.begin(me) : 0; };
    for (int r = 0; r < g->size; r++) { count_sent(g, counter, r != me ? bytes(me, r) : 0); }
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        nccl_exchange(g->nccl, received, sent, sent_at, [=](int r) { return bytes(me, r); }, received_at, [=](int r) { return bytes(r, me); }, g->size, stream);
        return;
    }
#endif
#ifdef USE_MPI
    over_mpi(t, sent, chunk, received, 0, parts.bytes(me), stream, [=](char* from, char* to) {
        int *out = t->counts, *in = t->counts + g->size, *out_at = t->places, *in_at = t->places + g->size;
        for (int r = 0; r < g->size; r++) {
            out[r] = transfer_lines(t, bytes(me, r));
            out_at[r] = transfer_lines(t, sent_at(r));
            in[r] = transfer_lines(t, bytes(r, me));
            in_at[r] = transfer_lines(t, received_at(r));
        }
        MPI_CHECK(MPI_Ialltoallv(from, out, out_at, t->line, to, in, in_at, t->line, t->comm, &t->requests[0]));
    });
#else
    (void)received, (void)sent, (void)stream, (void)sent_at, (void)received_at;
#endif
}

// this rank's part of data (parts, of `type`) = the sum of that part over the ranks, rounded to `type` at every hop; the other parts are spoiled.
// `received`: as long as the largest part
static inline void start_ring_sum(Transfer* t, void* data, void* received, Parts parts, DType type, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE) { return; }
    count_sent(g, counter, parts.begin(g->size) - parts.bytes(g->rank));
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        if (parts.cuts == NULL) { nccl_reduce_scatter(g->nccl, data, parts.equal / (size_t)dtype_bytes(type), type, g->rank, stream); }
        else { nccl_reduce_parts(g->nccl, data, [=](int r) { return parts.begin(r); }, type, g->size, stream); }
        return;
    }
#endif
#ifdef USE_MPI
    char* next = t->group->transport == OVER_MPI ? (char*)received : t->staging + t->largest;
    over_mpi(t, data, parts.begin(g->size), NULL, parts.begin(g->rank), parts.bytes(g->rank), stream, [=](char* ring, char*) {
        t->ring = ring;
        t->received = next;
        t->parts = parts;
        t->type = type;
        t->hop = 0;
        ring_start_hop(t);
    });
#else
    (void)data, (void)received, (void)stream, (void)type;
#endif
}

// received: what rank `from` sends us (-1: nobody); sent: what rank `to` gets (-1: nobody). Done when both are; neither waits for the other.
static inline void start_passing_on(Transfer* t, void* received, int from, void* sent, int to, size_t bytes, CommOperation counter, Stream stream) {
    Group* g = t->group;
    if (g->transport == ALONE || (from < 0 && to < 0)) { return; }
    if (to >= 0) { count_sent(g, counter, bytes); }
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        auto at = [](int) { return (size_t)0; };
        nccl_exchange(g->nccl, received, sent, at, [=](int r) { return r == to ? bytes : 0; }, at, [=](int r) { return r == from ? bytes : 0; }, g->size,
            stream);
        return;
    }
#endif
#ifdef USE_MPI
    over_mpi(t, sent, to >= 0 ? bytes : 0, received, 0, from >= 0 ? bytes : 0, stream, [=](char* out, char* in) {
        int lines = transfer_lines(t, bytes);
        if (from >= 0) { MPI_CHECK(MPI_Irecv(in, lines, t->line, from, TAG_PASSED_ON, t->comm, &t->requests[0])); }
        if (to >= 0) { MPI_CHECK(MPI_Isend(out, lines, t->line, to, TAG_PASSED_ON, t->comm, &t->requests[1])); }
    });
#else
    (void)received, (void)sent, (void)stream;
#endif
}
