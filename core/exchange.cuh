// exchange.cuh: exchanges of activations: between the ranks that share a layer, and between the stages of a pipeline.
//
// Ranks that share a layer (tensor parallel) keep the rows of what is not cut among them, each its own (sequence parallel): of (rows, C) rank r has rows
// [r·own, (r + 1)·own). Before a matmul everyone gets all rows (`rows_gather`). After one that leaves everyone with a part of each sum, everyone gets
// the sums of the rows that are its own (`rows_sum`): all ranks' contributions to them are sent there, and added in FP32 in the order of the ranks,
// rounded once. What is sent is the activations' type, or E4M3: then each row has a power-of-two scale of its own, which travels at the end of its codes,
//
//     | C codes | nothing | descale, 4 bytes |     a multiple of 64 bytes: rows stay aligned whatever C is
//
// so that one exchange does it. A row that is not finite has a descale of NaN, is NaN wherever it arrives, and the step is skipped by all.
//
// Stages pass micro-batches on, the outputs forward and the gradients backward (`stage_exchange`); what is sent when, and why nobody waits for ever, is
// in schedule.h.
//
//     RowExchange x = {};
//     rows_allocate(&x, &topology.tensor, rows, C, BF16, true, &memory);  // dry, then for real
//     rows_create(&x, 4);
//     rows_gather(&x, all, own, E4M3, own_rows, C, TP_X, stream);
//     rows_sum(&x, out, whole, BF16, false, own_rows, C, TP_Y, stream);
//     rows_free(&x);
//
// An exchange is done when the call returns: on the stream where NCCL carries it, else altogether. While MPI carries it `meanwhile` is called over and
// over, so that what else is under way goes on: a ring of gradients needs its ranks for every hop, and another rank may come here only after it. It must
// not begin an exchange of the same kind. One stream for all calls of an exchange: its memory is written again by the next one.
#pragma once
#include "memory.h"
#include "profile.h"
#include "transfers.cuh"

// Goes on with what is under way until the transfer is done
static inline void exchange_wait(Transfer* t, void (*meanwhile)(void*), void* context) {
    while (!transfer_done(t)) {
        if (meanwhile != NULL) { meanwhile(context); }
        sched_yield();
    }
}

// ---- between the ranks of a layer ----

constexpr size_t ROW_BYTES = 64;            // a row of codes with its descale is a multiple of this
constexpr size_t AMAXES_BYTES = 64 * 1024;  // as many can be staged, however few the rows are

static inline size_t row_stride(int C) { return round_up((size_t)C + sizeof(float), ROW_BYTES); }

struct RowExchange {
    Group* group;
    int rows, C;               // of all ranks
    size_t received_bytes;     // room there
    char* received;            // (size, own rows, C) of the activations' type, or (size, own rows, row_stride) codes
    char* codes;               // (rows, row_stride), where sums are sent in FP8
    Transfer transfer;
    void (*meanwhile)(void*);  // called with `context` while it waits; NULL: nothing
    void* context;
};

// For (rows, C) at most, of all ranks. `fp8_sums`: some are sent in FP8
static inline void rows_allocate(RowExchange* x, Group* group, int rows, int C, DType act, bool fp8_sums, Memory* memory) {
    x->group = group;
    x->rows = rows;
    x->C = C;
    x->received = x->codes = NULL;
    x->received_bytes = 0;
    if (group->size == 1) { return; }
    size_t raw = (size_t)rows * (size_t)C * (size_t)dtype_bytes(act), coded = fp8_sums ? (size_t)rows * row_stride(C) : 0;
    x->received_bytes = max_of(raw, coded);
    x->received = memory_take<char>(memory, COMMUNICATION, x->received_bytes);
    if (fp8_sums) { x->codes = memory_take<char>(memory, COMMUNICATION, coded); }
}

// `unit`: every part that will travel is a multiple of so many bytes (transfers.cuh)
static inline void rows_create(RowExchange* x, size_t unit) { transfer_create(&x->transfer, x->group, max_of(x->received_bytes, AMAXES_BYTES), unit); }

static inline void rows_free(RowExchange* x) {
    transfer_free(&x->transfer);
    *x = RowExchange{};
}

// all (rows, C) of `type` = everyone's own rows. `own`: this rank's, which may be in `all` where they belong
static inline void rows_gather(RowExchange* x, void* all, const void* own, DType type, int own_rows, int C, CommOperation counter, Stream stream) {
    ProfileScope scope("tensor-parallel exchange");
    size_t elements = (size_t)own_rows * (size_t)C, part = elements * (size_t)dtype_bytes(type);
    void* mine = advance(all, type, (size_t)x->group->rank * elements);
    if (mine != own) { device_copy(mine, own, part, stream); }
    start_all_gather(&x->transfer, all, equal_parts(part), counter, stream);
    exchange_wait(&x->transfer, x->meanwhile, x->context);
}

template <class T> struct QuantiseRows {  // codes (rows, stride) = E4M3(x·scale), each row's descale at its end
    char* codes;
    const T* x;
    size_t stride;
    int C;
    template <class Team> DEVICE void operator()(Team team, int row) const {
        const T* xr = x + (size_t)row * C;
        char* to = codes + (size_t)row * stride;
        uint32_t top = team.amax(C, [=](auto c) { return load(xr, c); });
        float scale = scale_from_amax(bits_to_float(top), largest_of(E4M3), 0, 1.0f);
        e4m3* y = (e4m3*)to;
        team.each(C, [=](auto c) { store(y, c, load(xr, c) * scale); });
        if (team.leads()) { *(float*)(to + stride - sizeof(float)) = top < 0x7f800000u ? 1.0f / scale : not_a_number(); }
    }
};

// What everyone has sent for our rows: element c of a row from rank r
template <class T> struct SentRows {
    const T* parts;  // (ranks, own rows, C)
    size_t part;     // elements
    struct Row {
        const T* x;
        size_t part;
        template <int N> DEVICE Vec<N> operator()(int r, Range<N> c) const { return load(x + (size_t)r * part, c); }
    };
    DEVICE Row row(int i, int C) const { return Row{parts + (size_t)i * C, part}; }
};
struct SentCodes {
    const char* parts;    // (ranks, own rows, stride)
    size_t part, stride;  // bytes
    struct Row {
        const char* codes;
        const char* descale;
        size_t part;
        template <int N> DEVICE Vec<N> operator()(int r, Range<N> c) const {
            return load((const e4m3*)(codes + (size_t)r * part), c) * *(const float*)(descale + (size_t)r * part);
        }
    };
    DEVICE Row row(int i, int) const {
        const char* codes = parts + (size_t)i * stride;
        return Row{codes, codes + stride - sizeof(float), part};
    }
};

// (x(0, c) + x(1, c)) + …; without a loop: compilers vectorise the one over c then
template <int RANKS, class Row, int N> DEVICE Vec<N> sum_over_ranks(Row x, Range<N> c) {
    if constexpr (RANKS == 1) { return x(0, c); }
    else { return sum_over_ranks<RANKS - 1>(x, c) + x(RANKS - 1, c); }
}

template <class T, class Sent, int RANKS> struct SumRows {  // out (own rows, C) = the sum over the ranks in FP32, in their order, rounded once
    T* out;
    Sent sent;
    int ranks, C;  // RANKS 0: so many ranks
    template <class Team> DEVICE void operator()(Team team, int row) const {
        typename Sent::Row x = sent.row(row, C);
        T* o = out + (size_t)row * C;
        int count = ranks;
        team.each(C, [=](auto c) {
            if constexpr (RANKS > 0) { store(o, c, sum_over_ranks<RANKS>(x, c)); }
            else {
                auto total = x(0, c);
                for (int r = 1; r < count; r++) { total = total + x(r, c); }
                store(o, c, total);
            }
        });
    }
};

template <class T, class Sent> static inline void sum_rows(T* out, Sent sent, int ranks, int own_rows, int C, Stream stream) {
    switch (ranks) {
        case 2: run_rows(SumRows<T, Sent, 2>{out, sent, ranks, C}, own_rows, stream); break;
        case 4: run_rows(SumRows<T, Sent, 4>{out, sent, ranks, C}, own_rows, stream); break;
        case 8: run_rows(SumRows<T, Sent, 8>{out, sent, ranks, C}, own_rows, stream); break;
        default: run_rows(SumRows<T, Sent, 0>{out, sent, ranks, C}, own_rows, stream);
    }
}

// out (own_rows, C) = Σ over the ranks of these rows of their `whole` (rows, C); both of `act`. `out` may be where `whole` begins.
static inline void rows_sum(RowExchange* x, void* out, void* whole, DType act, bool fp8, int own_rows, int C, CommOperation counter, Stream stream) {
    ProfileScope scope("tensor-parallel exchange");
    Group* g = x->group;
    size_t own = (size_t)own_rows, row = (size_t)C * (size_t)dtype_bytes(act), stride = row_stride(C);
    if (g->size == 1) {
        if (out != whole) { device_copy(out, whole, own * row, stream); }
        return;
    }
    size_t bytes = (size_t)g->size * own * (fp8 ? stride : row);
    if (bytes > x->received_bytes || (fp8 && x->codes == NULL)) {
        die("a sum of (%d, %d) rows in %s does not fit into what was planned for (%d, %d)", own_rows * g->size, C, fp8 ? "e4m3" : dtype_names[act],
            x->rows, x->C);
    }
    with_type(act, [&](auto tag) {
        typedef typename decltype(tag)::type T;
        if (!fp8) {
            start_all_to_all(&x->transfer, x->received, whole, own * row, counter, stream);
            exchange_wait(&x->transfer, x->meanwhile, x->context);
            sum_rows((T*)out, SentRows<T>{(const T*)x->received, own * (size_t)C}, g->size, own_rows, C, stream);
            return;
        }
        run_rows(QuantiseRows<T>{x->codes, (const T*)whole, stride, C}, own_rows * g->size, stream);
        start_all_to_all(&x->transfer, x->received, x->codes, own * stride, NOT_COUNTED, stream);
        count_sent(g, counter, own * (size_t)C * (uint64_t)(g->size - 1));
        count_sent(g, TP_SCALES, own * (stride - (size_t)C) * (uint64_t)(g->size - 1));
        exchange_wait(&x->transfer, x->meanwhile, x->context);
        sum_rows((T*)out, SentCodes{x->received, own * stride, stride}, g->size, own_rows, C, stream);
    });
}

// amax (n), as float bits = the greatest over the ranks
static inline void rows_max(RowExchange* x, uint32_t* amax, size_t n, Stream stream) {
    ProfileScope scope("tensor-parallel exchange");
    start_all_reduce_max(&x->transfer, amax, n, TP_SCALES, stream);
    exchange_wait(&x->transfer, x->meanwhile, x->context);
}

// ---- between stages ----

struct StageExchange {
    Transfer transfer;         // of a group whose ranks are the stages
    void (*meanwhile)(void*);  // called with `context` while it waits; NULL: nothing
    void* context;
};

// `bytes`: what one stage sends another at a time, at most, and always a multiple of `unit`
static inline void stages_create(StageExchange* x, Group* group, size_t bytes, size_t unit) {
    transfer_create(&x->transfer, group, bytes, unit);
#ifdef NCCL_TRANSPORT
    // NCCL connects two ranks when they first send, and both must then ask for the same: of schedule.h's exchanges one sends and receives where its peer does
    // first the one and later the other. So all are connected here, at once.
    if (group->transport == OVER_NCCL) {
        char* byte = (char*)device_alloc(3);
        Stream stream = stream_create();
        int stage = group->rank;
        auto beside = [=](int r) { return r == stage - 1 || r == stage + 1 ? (size_t)1 : (size_t)0; };
        auto received_at = [=](int r) { return (size_t)(r < stage ? 1 : 2); };
        nccl_exchange(group->nccl, byte, byte, [](int) { return (size_t)0; }, beside, received_at, beside, group->size, stream);
        stream_sync(stream);
        stream_destroy(stream);
        device_free(byte);
    }
#endif
}

static inline void stages_free(StageExchange* x) {
    transfer_free(&x->transfer);
    *x = StageExchange{};
}

// received = what stage `from` sends us, sent goes to stage `to`; -1: nobody. Ends when both are done, and neither waits for the other.
static inline void stage_exchange(StageExchange* x, void* received, int from, const void* sent, int to, size_t bytes, Stream stream) {
    ProfileScope scope("pipeline exchange");
    start_passing_on(&x->transfer, received, from, (void*)sent, to, bytes, PIPELINE, stream);
    exchange_wait(&x->transfer, x->meanwhile, x->context);
}
