// nccl.cuh: the calls of NCCL, and nothing but calls: every algorithm is above the interface of collectives.cuh, where it is tested
// through MPI.
//
// Communicators are non-blocking: each call may answer "in progress" and is then polled under our own clock, since NCCL itself waits for
// ever. Whoever gives up ends all ranks (die), so no rank is left waiting in a kernel for one that has gone.
#pragma once
#include "device.cuh"
#include <mutex>
#include <nccl.h>
#include <sched.h>
#include <string>
#include <time.h>
#include <vector>
#if NCCL_VERSION_CODE < 21400
#error "NCCL 2.14 or later is needed: earlier ones have no non-blocking communicators"
#endif

constexpr int NCCL_PATIENCE = 600;  // seconds for one call to be taken up: connecting 512 ranks takes well under a minute

static_assert(ncclUnhandledCudaError == 1 && ncclSystemError == 2 && ncclInternalError == 3 && ncclInvalidUsage == 5 && ncclRemoteError == 6, "nccl_advice knows them by number");

static inline void nccl_check(ncclResult_t result, ncclComm_t comm, const char* call, const char* file, int line) {
    if (result == ncclSuccess || result == ncclInProgress) { return; }
    die("%s:%d: %s", file, line, nccl_trouble_text(result, (std::string(call) + ": " + ncclGetErrorString(result)).c_str(), ncclGetLastError(comm)).c_str());
}

// Calls, and waits until NCCL has taken the call up (not until the work on the stream is done).
#define NCCL_CALL(comm, call) \
    do { \
        nccl_check((call), (comm), #call, __FILE__, __LINE__); \
        nccl_settle((comm), #call, __FILE__, __LINE__); \
    } while (0)

static inline void nccl_settle(ncclComm_t comm, const char* call, const char* file, int line) {
    time_t start = time(NULL);
    for (int polls = 0;; polls++) {
        ncclResult_t state = ncclSuccess;
        nccl_check(ncclCommGetAsyncError(comm, &state), comm, "ncclCommGetAsyncError", file, line);
        nccl_check(state, comm, call, file, line);
        if (state == ncclSuccess) { return; }
        if (time(NULL) - start > NCCL_PATIENCE) {
            die("%s:%d: %s", file, line, nccl_trouble_text(0, formatted("%s: nothing for %d seconds", call, NCCL_PATIENCE).c_str(), "").c_str());
        }
        if (polls < 1000) { sched_yield(); } else { usleep(50); }  // most calls are taken up in microseconds, connecting takes seconds
    }
}

// Rank 0 makes the id; every rank of the group then connects with it.
static inline ncclUniqueId nccl_unique_id(void) {
    ncclUniqueId id;
    nccl_check(ncclGetUniqueId(&id), NULL, "ncclGetUniqueId", __FILE__, __LINE__);
    return id;
}

inline std::mutex nccl_lock;                    // a watching thread looks at these
inline std::vector<ncclComm_t> nccl_connected;

static inline ncclComm_t nccl_connect(ncclUniqueId id, int size, int rank) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclComm_t comm = NULL;
    nccl_check(ncclCommInitRankConfig(&comm, size, id, rank, &config), comm, "ncclCommInitRankConfig", __FILE__, __LINE__);
    nccl_settle(comm, "ncclCommInitRankConfig", __FILE__, __LINE__);
    std::lock_guard<std::mutex> held(nccl_lock);
    nccl_connected.push_back(comm);
    return comm;
}

// What has gone wrong in the background since; "": nothing. The training thread, which may wait for a GPU that waits for another rank, would not hear of it
static inline std::string nccl_trouble(void) {
    std::lock_guard<std::mutex> held(nccl_lock);
    for (ncclComm_t comm : nccl_connected) {
        ncclResult_t state = ncclSuccess;
        ncclResult_t asked = ncclCommGetAsyncError(comm, &state);
        if (asked != ncclSuccess) { state = asked; }
        if (state != ncclSuccess && state != ncclInProgress) { return nccl_trouble_text(state, (std::string("NCCL: ") + ncclGetErrorString(state)).c_str(), ncclGetLastError(comm)); }
    }
    return "";
}

static inline void nccl_disconnect(ncclComm_t comm) {
    {
        std::lock_guard<std::mutex> held(nccl_lock);
        for (size_t i = 0; i < nccl_connected.size(); i++) {
            if (nccl_connected[i] == comm) { nccl_connected.erase(nccl_connected.begin() + (long)i); break; }
        }
    }
    NCCL_CALL(comm, ncclCommFinalize(comm));
    nccl_check(ncclCommDestroy(comm), NULL, "ncclCommDestroy", __FILE__, __LINE__);
}

static inline ncclDataType_t nccl_type_of(const float*) { return ncclFloat; }
static inline ncclDataType_t nccl_type_of(const double*) { return ncclDouble; }

template <class T> static inline void nccl_all_reduce_sum(ncclComm_t comm, T* data, size_t n, Stream stream) {
    NCCL_CALL(comm, ncclAllReduce(data, data, n, nccl_type_of(data), ncclSum, comm, stream));
}

// Of non-negative floats by their bits, so that NaN and inf are the greatest: op is ncclMin or ncclMax.
static inline void nccl_all_reduce_bits(ncclComm_t comm, uint32_t* bits, size_t n, ncclRedOp_t op, Stream stream) {
    NCCL_CALL(comm, ncclAllReduce(bits, bits, n, ncclUint32, op, comm, stream));
}

constexpr int NCCL_FIRST_FP8 = 22403;  // 2.24.3

// Can the library at compile time and the one at run time add FP8? On GPUs of capability 9.0 and up, that is.
static inline bool nccl_adds_fp8(void) {
    int version = 0;
    nccl_check(ncclGetVersion(&version), NULL, "ncclGetVersion", __FILE__, __LINE__);
    return NCCL_VERSION_CODE >= NCCL_FIRST_FP8 && version >= NCCL_FIRST_FP8;
}

static inline ncclDataType_t nccl_type(DType t) {
#if NCCL_VERSION_CODE >= 22403
    if (t == E4M3) { return ncclFloat8e4m3; }
    if (t == E5M2) { return ncclFloat8e5m2; }
#endif
    if (t == BF16) { return ncclBfloat16; }
    if (t != FP32) { die("NCCL %d has no sums in %s", NCCL_VERSION_CODE, dtype_names[t]); }
    return ncclFloat;
}

// Part `rank` of data (size, part) becomes the sum over the ranks; in place. Never ncclAvg: it would round 1/size to FP8.
static inline void nccl_reduce_scatter(ncclComm_t comm, void* data, size_t part, DType type, int rank, Stream stream) {
    char* mine = (char*)data + (size_t)rank * part * (size_t)dtype_bytes(type);
    NCCL_CALL(comm, ncclReduceScatter(data, mine, part, nccl_type(type), ncclSum, comm, stream));
}

static inline void nccl_all_gather(ncclComm_t comm, void* data, size_t part_bytes, int rank, Stream stream) {
    NCCL_CALL(comm, ncclAllGather((char*)data + (size_t)rank * part_bytes, data, part_bytes, ncclUint8, comm, stream));
}

// Parts of unequal sizes; part r is bytes [begin(r), begin(r + 1)) of an array. Each goes from, or to, the rank that it belongs to.
template <class Begin> static inline void nccl_all_gather_parts(ncclComm_t comm, void* data, Begin begin, int size, Stream stream) {
    nccl_check(ncclGroupStart(), comm, "ncclGroupStart", __FILE__, __LINE__);
    for (int r = 0; r < size; r++) {
        char* part = (char*)data + begin(r);
        if (begin(r + 1) == begin(r)) { continue; }
        nccl_check(ncclBroadcast(part, part, begin(r + 1) - begin(r), ncclUint8, r, comm, stream), comm, "ncclBroadcast", __FILE__, __LINE__);
    }
    NCCL_CALL(comm, ncclGroupEnd());
}
template <class Begin> static inline void nccl_reduce_parts(ncclComm_t comm, void* data, Begin begin, DType type, int size, Stream stream) {
    nccl_check(ncclGroupStart(), comm, "ncclGroupStart", __FILE__, __LINE__);
    for (int r = 0; r < size; r++) {
        char* part = (char*)data + begin(r);
        size_t n = (begin(r + 1) - begin(r)) / (size_t)dtype_bytes(type);
        if (n == 0) { continue; }
        nccl_check(ncclReduce(part, part, n, nccl_type(type), ncclSum, r, comm, stream), comm, "ncclReduce", __FILE__, __LINE__);
    }
    NCCL_CALL(comm, ncclGroupEnd());
}
// received: at received_at(r) what rank r has for us, received_bytes(r); sent: at sent_at(r) what we have for rank r, sent_bytes(r)
template <class SentAt, class SentBytes, class ReceivedAt, class ReceivedBytes>
static inline void nccl_exchange(ncclComm_t comm, void* received, const void* sent, SentAt sent_at, SentBytes sent_bytes, ReceivedAt received_at,
                                 ReceivedBytes received_bytes, int size, Stream stream) {
    nccl_check(ncclGroupStart(), comm, "ncclGroupStart", __FILE__, __LINE__);
    for (int r = 0; r < size; r++) {
        if (sent_bytes(r) > 0) {
            nccl_check(ncclSend((const char*)sent + sent_at(r), sent_bytes(r), ncclUint8, r, comm, stream), comm, "ncclSend", __FILE__, __LINE__);
        }
        if (received_bytes(r) > 0) {
            nccl_check(ncclRecv((char*)received + received_at(r), received_bytes(r), ncclUint8, r, comm, stream), comm, "ncclRecv", __FILE__, __LINE__);
        }
    }
    NCCL_CALL(comm, ncclGroupEnd());
}

static inline void nccl_broadcast(ncclComm_t comm, void* data, size_t bytes, int root, Stream stream) {
    NCCL_CALL(comm, ncclBroadcast(data, data, bytes, ncclUint8, root, comm, stream));
}

// e.g. "NCCL 2.28.9": of the library at run time
static inline void nccl_describe(char* out, size_t size) {
    int v = 0;
    nccl_check(ncclGetVersion(&v), NULL, "ncclGetVersion", __FILE__, __LINE__);
    snprintf(out, size, "NCCL %d.%d.%d", v / 10000, v / 100 % 100, v % 100);
}
