// collectives.cuh: what processes do together: one interface, two backends.
//
// NCCL carries device memory where every rank has a GPU to itself. MPI carries everything else: the CPU build's arrays directly, a GPU's
// arrays staged through pinned host memory (so that two ranks may share a GPU), and what lives on the host in any build. A program that
// was not started by an MPI launcher, or was built without MPI, is one process: then nothing here sends anything, and MPI, whose start
// costs 0.3 s, is not touched.
//
// What is here is small, losses, counts and amaxes, but for the broadcast, or happens once; what carries gradients is in transfers.cuh. Over MPI sums are
// taken in the order of the ranks, ((r0 + r1) + r2) + …, whatever the version of MPI: everyone gathers everyone's values and adds them. NCCL sums in an
// order of its own; in both every rank ends with the same bytes.
//
//     World world = world_init(&argc, &argv);
//     world_select_device(&world);
//     Group group = group_world(&world, false);
//     all_reduce_sum(&group, losses, n, stream);
//     group_free(&group);
//     world_finalize(&world);
//
// Every rank of a group makes the same calls in the same order with the same sizes. `group_split` cuts a group into several.
#pragma once
#include "device.cuh"
#include <limits.h>
#include <sched.h>
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1   // not the C++ bindings that MPI has dropped: they would need a library of their own
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#if defined(USE_CUDA) && defined(USE_MPI) && defined(USE_NCCL)
#include "nccl.cuh"
#define NCCL_TRANSPORT 1
#endif

struct World {
    int rank, size;              // over all nodes
    int local_rank, local_size;  // among the processes of this node
    int cores;                   // of this node for this process: those it may run on, shared with the ranks that may run on the same ones
    int ranks_per_device;        // that share a GPU, or this node's memory on a CPU; the most of any node; known after world_select_device
#ifdef USE_MPI
    bool uses_mpi;
    MPI_Comm local;              // the processes of this node
#endif
};

enum Transport { ALONE, OVER_MPI, OVER_MPI_STAGED, OVER_NCCL };

// What bytes are counted under: the operation, but exchanges of scales, the gradients of vectors, and weights by themselves; what the ranks of a layer
// (tensor parallel) exchange by purpose: X into a column-parallel linear layer, again for its weight gradient, the sum of a row-parallel one's Y, dY into
// its backward, the sum of dX, scales, and what else (embedding, head, loss, gradients of norms); and what the stages of a pipeline send each other
enum CommOperation {
    ALL_REDUCE_SUM, ALL_REDUCE_MAX, SCALES, VECTORS, REDUCE_SCATTER, ALL_TO_ALL, REGROUP, ALL_GATHER, WEIGHTS_GATHER, BROADCAST, HOST_BROADCAST,
    HOST_ALL_REDUCE_SUM, HOST_ALL_GATHER, TP_X, TP_X_AGAIN, TP_Y, TP_DY, TP_DX, TP_SCALES, TP_OTHER, PIPELINE, COMM_OPERATIONS,
    NOT_COUNTED = COMM_OPERATIONS
};

static const char* const comm_names[COMM_OPERATIONS] = {
    "all_reduce_sum", "all_reduce_max", "scales", "vectors", "reduce_scatter", "all_to_all", "regroup", "all_gather", "weights", "broadcast",
    "host_broadcast", "host_all_reduce_sum", "host_all_gather", "tp_x", "tp_x_again", "tp_y", "tp_dy", "tp_dx", "tp_scales", "tp_other", "pipeline"
};

constexpr size_t COMM_BROADCAST_BYTES = 16 * 1024 * 1024;   // a broadcast is cut into these: MPI counts with int
constexpr size_t COMM_STAGING_BYTES = 16 * 1024 * 1024;     // pinned, of a group that is staged
constexpr size_t COMM_GATHER_BYTES = 4096;                  // of each rank, that are gathered and added at a time

// Processes that exchange data.
struct Group {
    int rank, size;
    Transport transport;
    int ranks_per_device;
    bool shared;                           // what it stands on is another group's, which frees it
    uint64_t bytes_sent[COMM_OPERATIONS];  // payload that this rank has sent
#ifdef USE_MPI
    MPI_Comm comm;
    void* gathered;             // (size, COMM_GATHER_BYTES) host
    void* staging;              // COMM_STAGING_BYTES, pinned, of a group that is staged
#endif
#ifdef NCCL_TRANSPORT
    ncclComm_t nccl;
#endif
};

// How many processes the launcher says it started: 0: there was no launcher; -1: there was, it does not say.
static inline int launched_processes(void) {
    const char* sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (const char* name : sizes) {
        const char* value = getenv(name);
        if (value != NULL && atoi(value) > 0) { return atoi(value); }
    }
    return getenv("PMIX_RANK") != NULL || getenv("PMI_RANK") != NULL ? -1 : 0;
}

static inline int allowed_cores(cpu_set_t* set) {
    CPU_ZERO(set);
    int n = sched_getaffinity(0, sizeof(*set), set) == 0 ? CPU_COUNT(set) : (int)sysconf(_SC_NPROCESSORS_ONLN);  // fails beyond 1024 cores
    return max_of(n, 1);
}

#ifdef USE_MPI

static inline void mpi_check(int code, const char* call, const char* file, int line) {
    if (code == MPI_SUCCESS) { return; }
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0, kind = MPI_ERR_OTHER;
    MPI_Error_string(code, text, &length);
    MPI_Error_class(code, &kind);
    const char* hint = kind == MPI_ERR_TRUNCATE ? "the ranks disagree about a size: were all started with the same binary and flags?"
        : kind == MPI_ERR_NO_MEM ? "the node is out of memory, or /dev/shm is full"
        : "another rank has probably ended: look for its message first";
    die("%s:%d: %s: %s; hint: %s", file, line, call, text, hint);
}
#define MPI_CHECK(call) mpi_check((call), #call, __FILE__, __LINE__)

// e.g. "Open MPI 4.1.4" of "Open MPI v4.1.4, package: …"
static inline void mpi_describe(char* out, size_t size) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_CHECK(MPI_Get_library_version(text, &length));
    size_t n = 0;
    for (const char* p = text; *p != '\0' && *p != ',' && *p != '\n' && n + 1 < size; p++) {
        bool blank = *p == ' ' || *p == '\t';
        if (blank && (n == 0 || out[n - 1] == ' ')) { continue; }
        if (*p == 'v' && n > 0 && out[n - 1] == ' ' && p[1] >= '0' && p[1] <= '9') { continue; }
        out[n++] = blank ? ' ' : *p;
    }
    out[n] = '\0';
}

static inline void mpi_abort(int code) { MPI_Abort(MPI_COMM_WORLD, code); }

static inline void world_start_mpi(World* w, int* argc, char*** argv, int launched) {
    // A rank that waits gives its core to whoever can use it. Open MPI does so by itself only when it sees more ranks than cores; it sees
    // no threads and no other programs, and then an exchange was seen to take 10 times as long. On idle cores it costs nothing that can
    // be measured.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    int level = 0;
    MPI_CHECK(MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level));
    MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &w->size));
    MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &w->rank));
    if (launched > 0 && launched != w->size) {
        char name[128];
        mpi_describe(name, sizeof(name));
        bad_input("the launcher started %d processes, but MPI sees %d: the launcher belongs to another MPI than this binary (%s); use the "
            "mpirun of that one, or srun --mpi=pmix", launched, w->size, name);
    }
    process.rank = w->rank;
    process.abort = mpi_abort;
    if (level < MPI_THREAD_FUNNELED) { die("this MPI does not allow threads (MPI_THREAD_FUNNELED): level %d", level); }
    MPI_CHECK(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, w->rank, MPI_INFO_NULL, &w->local));
    MPI_CHECK(MPI_Comm_set_errhandler(w->local, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_size(w->local, &w->local_size));
    MPI_CHECK(MPI_Comm_rank(w->local, &w->local_rank));
    w->uses_mpi = true;
}

// How many processes of this node hold the same `bytes` bytes as this one; 1 to local_size
static inline int local_count_same(const World* w, const void* mine, size_t bytes) {
    if (!w->uses_mpi) { return 1; }
    char* all = (char*)host_alloc(bytes * (size_t)w->local_size);
    MPI_CHECK(MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, w->local));
    int same = 0;
    for (int r = 0; r < w->local_size; r++) { same += memcmp(all + (size_t)r * bytes, mine, bytes) == 0; }
    free(all);
    return same;
}

// all (size, bytes): what each rank of the world gave as `mine`
static inline void world_gather(const World* w, void* all, const void* mine, size_t bytes) {
    if (!w->uses_mpi) { memcpy(all, mine, bytes); return; }
    MPI_CHECK(MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD));
}

#else
static inline int local_count_same(const World*, const void*, size_t) { return 1; }
static inline void world_gather(const World*, void* all, const void* mine, size_t bytes) { memcpy(all, mine, bytes); }
#endif

// Starts MPI where a launcher asked for it.
static inline World world_init(int* argc, char*** argv) {
    World w = {};
    w.size = w.local_size = w.ranks_per_device = 1;
    int launched = launched_processes();
#ifdef USE_MPI
    if (launched != 0) { world_start_mpi(&w, argc, argv, launched); }
#else
    (void)argc, (void)argv;
    if (launched > 1 || launched < 0) {  // each would train alone, into the same folder
        bad_input("a launcher started %s, but this binary was built without MPI and can only be one; start it without the launcher, or install an MPI with its mpicc "
            "(scripts/setup.sh does) and build again: make clean, then make", launched > 1 ? formatted("%d processes", launched).c_str() : "this process, maybe with others");
    }
#endif
    cpu_set_t set;
    int cores = allowed_cores(&set);
    w.cores = max_of(cores / local_count_same(&w, &set, sizeof(set)), 1);
    return w;
}

static inline void world_finalize(World* w) {
#ifdef USE_MPI
    if (w->uses_mpi) {
        MPI_CHECK(MPI_Comm_free(&w->local));
        process.abort = NULL;
        MPI_CHECK(MPI_Finalize());
    }
#endif
    *w = World{};
}

// Takes the GPU whose number is the rank within the node (a launcher may also show each rank a GPU of its own), and sees who shares it.
static inline void world_select_device(World* w) {
#ifdef USE_CUDA
    device_require_any();
    int device = w->local_rank % device_count();
    device_select(device);
    device_require_code();
    char id[32] = "";
    CUDA_CHECK(cudaDeviceGetPCIBusId(id, (int)sizeof(id), device));
    w->ranks_per_device = local_count_same(w, id, sizeof(id));
#else
    w->ranks_per_device = w->local_size;
#endif
#ifdef USE_MPI
    if (w->uses_mpi) { MPI_CHECK(MPI_Allreduce(MPI_IN_PLACE, &w->ranks_per_device, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD)); }
#endif
}

#ifdef USE_MPI
// The ranks of `comm`, which is the group's from here on
static inline Group group_over(MPI_Comm comm, Transport transport, int ranks_per_device) {
    Group g = {};
    g.comm = comm;
    g.transport = transport;
    g.ranks_per_device = ranks_per_device;
    MPI_CHECK(MPI_Comm_set_errhandler(g.comm, MPI_ERRORS_RETURN));
    MPI_CHECK(MPI_Comm_size(g.comm, &g.size));
    MPI_CHECK(MPI_Comm_rank(g.comm, &g.rank));
    if (g.size == 1) {
        g.transport = ALONE;
        MPI_CHECK(MPI_Comm_free(&g.comm));
        return g;
    }
    g.gathered = host_alloc((size_t)g.size * COMM_GATHER_BYTES);
    if (g.transport == OVER_MPI_STAGED) { g.staging = pinned_alloc(COMM_STAGING_BYTES); }
#ifdef NCCL_TRANSPORT
    if (g.transport == OVER_NCCL) {
        ncclUniqueId id = {};
        if (g.rank == 0) { id = nccl_unique_id(); }
        MPI_CHECK(MPI_Bcast(&id, (int)sizeof(id), MPI_BYTE, 0, g.comm));
        g.nccl = nccl_connect(id, g.size, g.rank);
    }
#endif
    return g;
}
#endif

// All ranks. On GPUs `allow_staged` says whether ranks may exchange through host memory where NCCL cannot serve them; otherwise that is
// refused.
static inline Group group_world(const World* w, bool allow_staged) {
    (void)allow_staged;
#ifdef USE_MPI
    if (w->size > 1) {
        Transport transport = OVER_MPI;
#ifdef USE_CUDA
        transport = OVER_MPI_STAGED;
#ifdef NCCL_TRANSPORT
        if (w->ranks_per_device == 1) { transport = OVER_NCCL; }
        const char* reason = "NCCL needs a GPU for each";
#else
        const char* reason = "this binary was built without NCCL";
#endif
        if (transport == OVER_MPI_STAGED && !allow_staged) {
            bad_input("%d rank%s a GPU, but %s; start fewer ranks, or let them exchange through host memory with --staged", w->ranks_per_device,
                w->ranks_per_device == 1 ? "" : "s", reason);
        }
#endif
        MPI_Comm comm;
        MPI_CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &comm));
        return group_over(comm, transport, w->ranks_per_device);
    }
#endif
    Group g = {};
    g.rank = w->rank;
    g.size = w->size;
    g.ranks_per_device = w->ranks_per_device;
    g.transport = ALONE;
    return g;
}

// The same ranks once more, counted apart, over what `whole` has; to be freed before it.
static inline Group group_share(const Group* whole) {
    Group g = *whole;
    g.shared = true;
    memset(g.bytes_sent, 0, sizeof(g.bytes_sent));
    return g;
}

// The ranks of `whole` that give the same color (0 or more) as this one, in the order of their keys. All of `whole` call it.
static inline Group group_split(const Group* whole, int color, int key) {
#ifdef USE_MPI
    if (whole->transport != ALONE) {
        MPI_Comm comm;
        MPI_CHECK(MPI_Comm_split(whole->comm, color, key, &comm));
        return group_over(comm, whole->transport, whole->ranks_per_device);
    }
#endif
    (void)color, (void)key;
    return group_share(whole);
}

static inline void group_free(Group* g) {
#ifdef USE_MPI
    if (g->transport != ALONE && !g->shared) {
#ifdef NCCL_TRANSPORT
        if (g->transport == OVER_NCCL) { nccl_disconnect(g->nccl); }
#endif
        if (g->staging != NULL) { pinned_free(g->staging); }
        MPI_CHECK(MPI_Comm_free(&g->comm));
        free(g->gathered);
    }
#endif
    *g = Group{};
}

// What carries the payload, for people: "NCCL 2.28.9", "MPI (Open MPI 4.1.4)", …; 128 bytes hold it
static inline void group_describe(const Group* g, char* out, size_t size) {
    snprintf(out, size, "one process");
#ifdef USE_MPI
    if (g->transport == ALONE) { return; }
    char library[64];
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) { nccl_describe(out, size); return; }
#endif
    mpi_describe(library, sizeof(library));
    if (g->transport == OVER_MPI) { snprintf(out, size, "MPI (%s)", library); return; }
    const char* plural = g->ranks_per_device == 1 ? "" : "s";
    snprintf(out, size, "MPI (%s) staged through host memory, %d rank%s a GPU", library, g->ranks_per_device, plural);
#else
    (void)g;
#endif
}

// ---- sums and maxima over MPI ----

#ifdef USE_MPI

static inline MPI_Datatype mpi_type_of(const float*) { return MPI_FLOAT; }
static inline MPI_Datatype mpi_type_of(const double*) { return MPI_DOUBLE; }

// x = Σ over the ranks, in their order; host memory
template <class T> static void gather_and_add(Group* g, T* x, size_t n, CommOperation counter) {
    constexpr size_t MOST = COMM_GATHER_BYTES / sizeof(T);
    MPI_Datatype type = mpi_type_of(x);
    T* all = (T*)g->gathered;
    for (size_t i = 0; i < n; i += MOST) {
        size_t m = min_of(MOST, n - i);
        MPI_CHECK(MPI_Allgather(x + i, (int)m, type, all, (int)m, type, g->comm));
        for (size_t k = 0; k < m; k++) {
            T total = all[k];
            for (int r = 1; r < g->size; r++) { total += all[(size_t)r * m + k]; }
            x[i + k] = total;
        }
        g->bytes_sent[counter] += (uint64_t)(m * sizeof(T)) * ((uint64_t)g->size - 1);
    }
}

// what a ring sends, per rank: neither NCCL nor MPI says what it does
static inline uint64_t ring_bytes(const Group* g, size_t bytes) { return 2 * bytes * ((uint64_t)g->size - 1) / (uint64_t)g->size; }

// f(host memory, elements) for device memory, piece by piece where it must be copied
template <class T, class F> static void on_host(Group* g, T* data, size_t n, Stream stream, F f) {
    if (g->transport == OVER_MPI) { f(data, n); return; }
    constexpr size_t MOST = COMM_STAGING_BYTES / sizeof(T);
    for (size_t i = 0; i < n; i += MOST) {
        size_t m = min_of(MOST, n - i);
        copy_to_host(g->staging, data + i, m * sizeof(T), stream);
        f((T*)g->staging, m);
        copy_to_device(data + i, g->staging, m * sizeof(T), stream);
        stream_sync(stream);  // before the staging is written again
    }
}

#endif

// ---- the interface ----

// data = Σ over the ranks, in place, in device memory; floats or doubles. The same bytes on every rank; over MPI added in the order of the ranks.
template <class T> static inline void all_reduce_sum(Group* g, T* data, size_t n, Stream stream) {
    if (g->transport == ALONE) { return; }
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        nccl_all_reduce_sum(g->nccl, data, n, stream);
        g->bytes_sent[ALL_REDUCE_SUM] += ring_bytes(g, n * sizeof(T));
        return;
    }
#endif
#ifdef USE_MPI
    on_host(g, data, n, stream, [=](T* x, size_t m) { gather_and_add(g, x, m, ALL_REDUCE_SUM); });
#else
    (void)data, (void)n, (void)stream;
#endif
}

// data = max over the ranks of values that are not negative, in place, in device memory; compared by their bits: NaN wins over inf, inf
// over the rest.
static inline void all_reduce_max(Group* g, float* data, size_t n, Stream stream) {
    if (g->transport == ALONE) { return; }
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        nccl_all_reduce_bits(g->nccl, (uint32_t*)data, n, ncclMax, stream);
        g->bytes_sent[ALL_REDUCE_MAX] += ring_bytes(g, n * sizeof(float));
        return;
    }
#endif
#ifdef USE_MPI
    on_host(g, data, n, stream, [=](float* x, size_t m) {
        MPI_CHECK(MPI_Allreduce(MPI_IN_PLACE, x, (int)m, MPI_UINT32_T, MPI_MAX, g->comm));
        g->bytes_sent[ALL_REDUCE_MAX] += ring_bytes(g, m * sizeof(float));
    });
#else
    (void)data, (void)n, (void)stream;
#endif
}

// Everyone gets root's bytes of device memory. Counted as one copy to each other rank, sent by root.
static inline void broadcast(Group* g, void* data, size_t bytes, int root, Stream stream) {
    if (g->transport == ALONE) { return; }
    if (g->rank == root) { g->bytes_sent[BROADCAST] += (uint64_t)bytes * ((uint64_t)g->size - 1); }
#ifdef NCCL_TRANSPORT
    if (g->transport == OVER_NCCL) {
        nccl_broadcast(g->nccl, data, bytes, root, stream);
        return;
    }
#endif
#ifdef USE_MPI
    static_assert(COMM_BROADCAST_BYTES <= COMM_STAGING_BYTES, "a piece of a broadcast is staged whole");
    bool staged = g->transport == OVER_MPI_STAGED;
    for (size_t i = 0; i < bytes; i += COMM_BROADCAST_BYTES) {
        size_t m = min_of(COMM_BROADCAST_BYTES, bytes - i);
        char* piece = staged ? (char*)g->staging : (char*)data + i;
        if (staged && g->rank == root) { copy_to_host(piece, (char*)data + i, m, stream); }
        MPI_CHECK(MPI_Bcast(piece, (int)m, MPI_BYTE, root, g->comm));
        if (staged && g->rank != root) { copy_to_device((char*)data + i, piece, m, stream); stream_sync(stream); }
    }
#else
    (void)data, (void)stream;
#endif
}

// out = (size, bytes): what each rank gave as `mine`, in the order of the ranks; host memory
static inline void host_all_gather(Group* g, void* out, const void* mine, size_t bytes) {
    if (g->transport == ALONE) {
        memcpy(out, mine, bytes);
        return;
    }
#ifdef USE_MPI
    if (bytes > INT_MAX) { die("host_all_gather: %zu bytes a rank; %d are the most", bytes, INT_MAX); }
    MPI_CHECK(MPI_Allgather(mine, (int)bytes, MPI_BYTE, out, (int)bytes, MPI_BYTE, g->comm));
    g->bytes_sent[HOST_ALL_GATHER] += (uint64_t)bytes * ((uint64_t)g->size - 1);
#endif
}

// Everyone gets root's bytes of host memory. Counted as one copy to each other rank, sent by root.
static inline void host_broadcast(Group* g, void* data, size_t bytes, int root) {
    if (g->transport == ALONE) { return; }
    if (g->rank == root) { g->bytes_sent[HOST_BROADCAST] += (uint64_t)bytes * ((uint64_t)g->size - 1); }
#ifdef USE_MPI
    for (size_t i = 0; i < bytes; i += COMM_BROADCAST_BYTES) {
        MPI_CHECK(MPI_Bcast((char*)data + i, (int)min_of(COMM_BROADCAST_BYTES, bytes - i), MPI_BYTE, root, g->comm));
    }
#else
    (void)data;
#endif
}

// x = Σ over the ranks, in place, in the order of the ranks; host memory. For losses and norms: a few values.
static inline void host_all_reduce_sum(Group* g, double* x, int n) {
    if (g->transport == ALONE) { return; }
#ifdef USE_MPI
    gather_and_add(g, x, (size_t)n, HOST_ALL_REDUCE_SUM);
#else
    (void)x, (void)n;
#endif
}

// Returns when every rank has called it. Work on streams is not waited for.
static inline void barrier(Group* g) {
    if (g->transport == ALONE) { return; }
#ifdef USE_MPI
    MPI_CHECK(MPI_Barrier(g->comm));
#endif
}
