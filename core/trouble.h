// trouble.h: what to do about the commonest failures, in one place: of the processor, the GPU, NCCL, the launcher, and files.
//
// The functions make texts out of plain values, and ask neither a GPU nor a launcher: so what a user with another machine reads can be tested on any. Whoever meets
// the failure hands the values over, and ends the process with the text (bad_input, die). Elsewhere are the texts that need more than values: of memory
// (the trainer tries plans), of data (dataloader.h), and of what is not finite (the trainer looks for it).
#pragma once
#include "common.h"
#include <string>
#include <system_error>
#include <thread>

__attribute__((format(printf, 1, 2))) static inline std::string formatted(const char* fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    return text;
}

// ---- the processor ----

// A binary runs on the machine that it was built on, and ends by a signal on one whose processor lacks what the compiler made use of. So this is asked before
// anything else runs, by code that any x86-64 can run.
#if defined(__x86_64__) && !defined(__CUDACC__)
__attribute__((target("arch=x86-64"))) static inline const char* cpu_lacks(void) {  // NULL: nothing
    __builtin_cpu_init();
#define NEEDED(name) if (!__builtin_cpu_supports(name)) { return name; }
#ifdef __SSE4_2__
    NEEDED("sse4.2")
#endif
#ifdef __AVX__
    NEEDED("avx")
#endif
#ifdef __AVX2__
    NEEDED("avx2")
#endif
#ifdef __FMA__
    NEEDED("fma")
#endif
#ifdef __FMA4__
    NEEDED("fma4")
#endif
#ifdef __BMI2__
    NEEDED("bmi2")
#endif
#ifdef __AVX512F__
    NEEDED("avx512f")
#endif
#ifdef __AVX512BW__
    NEEDED("avx512bw")
#endif
#ifdef __AVX512DQ__
    NEEDED("avx512dq")
#endif
#ifdef __AVX512VL__
    NEEDED("avx512vl")
#endif
#ifdef __AVX512VBMI__
    NEEDED("avx512vbmi")
#endif
#ifdef __AVX512BF16__
    NEEDED("avx512bf16")
#endif
#undef NEEDED
    return NULL;
}

__attribute__((target("arch=x86-64"), constructor(101))) static void require_cpu(void) {
    const char* feature = cpu_lacks();
    if (feature == NULL) { return; }
    const char* const parts[] = {"train_gpt_fp8: this binary was built for a processor with ", feature,
        ", which this one lacks; build it here (make clean, then make), or for both machines (make MARCH=x86-64-v3)\n"};
    for (const char* part : parts) { (void)!write(STDERR_FILENO, part, __builtin_strlen(part)); }
    _exit(2);
}
#endif

// ---- the GPU ----

enum GpuTrouble { GPU_ABSENT, GPU_DRIVER_OLD, GPU_NO_CODE, GPU_TOO_OLD };
constexpr int LEAST_CAPABILITY = 80;  // BF16 units

struct GpuFacts {
    const char* visible;   // CUDA_VISIBLE_DEVICES; NULL: it is not set
    int driver, runtime;   // CUDA versions as the runtime gives them, 12020 is 12.2; driver 0: there is none
    int capability;        // 90 is 9.0
    const char* built;     // __CUDA_ARCH_LIST__: "800,900"
};

static inline std::string cuda_version_text(int version) { return formatted("%d.%d", version / 1000, version / 10 % 100); }
static inline std::string capability_text(int capability) { return formatted("%d.%d", capability / 10, capability % 10); }

// As the Makefile's GPU_ARCH takes it: what only Hopper has needs the suffix
static inline std::string gpu_arch_text(int capability) { return formatted("%d%s", capability, capability == 90 ? "a" : ""); }

static inline std::string gpu_trouble_text(GpuTrouble trouble, const GpuFacts* f) {
    static const char* const for_cpu = "make DEVICE=cpu builds for the CPU";
    std::string capability = capability_text(f->capability);
    switch (trouble) {
        case GPU_ABSENT:
            if (f->driver == 0) {
                return formatted("no GPU can be used: this machine has no NVIDIA driver; where nvidia-smi lists GPUs it has one (a container is given it by docker run --gpus all); %s", for_cpu);
            }
            if (f->visible != NULL) { return formatted("no GPU is visible to this process: CUDA_VISIBLE_DEVICES is '%s'; unset it, or name GPUs that nvidia-smi -L lists; %s", f->visible, for_cpu); }
            return formatted("no GPU is visible to this process, though there is a driver: does nvidia-smi -L list one, and was the job given one (srun --gpus-per-task=1, docker run --gpus all)? %s", for_cpu);
        case GPU_DRIVER_OLD:
            return formatted("the NVIDIA driver is for CUDA %s and older, and this binary was built by CUDA %s: install a newer driver, or build with a toolkit of the driver's: "
                "make clean, then make DEVICE=cuda CUDA_HOME=DIR", cuda_version_text(f->driver).c_str(), cuda_version_text(f->runtime).c_str());
        case GPU_NO_CODE: {
            std::string built;
            for (const char* at = f->built; *at != '\0'; at += *at == ',') {
                built += (built.empty() ? "" : ", ") + capability_text(atoi(at) / 10);
                at += strcspn(at, ",");
            }
            return formatted("this GPU has capability %s, and the binary was built for %s: make DEVICE=cuda GPU_ARCH=%s", capability.c_str(), built.c_str(), gpu_arch_text(f->capability).c_str());
        }
        default:
            return formatted("this GPU has capability %s, and %s is the least that is supported (earlier ones have no BF16 units): use another GPU; %s", capability.c_str(),
                capability_text(LEAST_CAPABILITY).c_str(), for_cpu);
    }
}

// ---- NCCL ----

// What a ncclResult_t most often means, by its number; 0: a call that was not taken up for a long time
static inline const char* nccl_advice(int result) {
    switch (result) {
        case 0: return "was every rank started, and can the machines reach each other? A firewall must let NCCL's ports through, and NCCL_SOCKET_IFNAME names the network to take (ip addr lists them)";
        case 1: return "a CUDA call within NCCL failed: is the GPU's memory full (nvidia-smi), or the driver older than NCCL's CUDA?";
        case 2: return "a socket or shared memory failed: NCCL_SOCKET_IFNAME names the network to take (ip addr lists them), a firewall must let NCCL's ports through, and /dev/shm needs room "
                       "(df -h /dev/shm; docker run --shm-size=8g)";
        case 3: return "do all machines have the same version of NCCL and of the driver?";
        case 5: return "do several ranks share a GPU (give --staged, or start fewer), or have the machines different versions of NCCL?";
        case 6: return "another rank has ended or cannot be reached: look for its message first; if there is none, is it a firewall, or the wrong network (NCCL_SOCKET_IFNAME)?";
        default: return "";
    }
}
static inline std::string nccl_trouble_text(int result, const char* what, const char* last) {
    const char* advice = nccl_advice(result);
    return std::string(what) + (last[0] != '\0' ? formatted(" (%.300s)", last) : "") + (advice[0] != '\0' ? "; hint: " : "") + advice + "; NCCL_DEBUG=INFO tells more";
}

// Ranks that hang at the start have most often never reached each other
static const char* const never_met_advice = ". Not all ranks have met: was each of them started, and can the machines reach each other? NCCL_SOCKET_IFNAME, and --mca btl_tcp_if_include of Open MPI's mpirun, name the network to "
    "take; a firewall must let them through; NCCL_DEBUG=INFO tells more";

// ---- the launcher ----

struct LaunchFacts {
    bool slurm;   // within a job of it
    bool root;
    int cores;    // Open MPI starts no more ranks than a machine has, unless told
};

// The command that starts `ranks` of `program`
static inline std::string launch_text(int ranks, const char* program, const LaunchFacts* f) {
    if (f->slurm) { return formatted("srun -n %d %s …", ranks, program); }
    return formatted("mpirun -np %d%s%s %s …", ranks, f->root ? " --allow-run-as-root" : "", ranks > f->cores ? " --oversubscribe" : "", program);
}

// ---- files ----

// What to do about errno's number, to follow its text; "": nothing that the text does not say
static inline const char* file_advice(int error) {
    switch (error) {
        case ENOSPC: return " (df -h shows what is full: make room, or give a folder on another disk)";
        case EDQUOT: return " (your quota is used up: make room, or give a folder on another disk)";
        case EFBIG: return " (ulimit -f limits the size of a file: raise it)";
        case EMFILE: return " (ulimit -n limits how many files a process has open: raise it)";
        case ENFILE: return " (all processes together have too many files open)";
        case EROFS: return " (give a folder that can be written)";
        case ENOMEM: return " (the machine's memory is full)";
        default: return "";
    }
}

static inline std::string error_of(int error) { return std::string(strerror(error)) + file_advice(error); }

// ---- threads ----

template <class F> static inline std::thread thread_started(F f) {
    try {
        return std::thread(f);
    } catch (const std::system_error& e) {
        die("no thread can be started: %s; ulimit -u and a container's limit of processes, or ulimit -v, may be too low: raise them", e.what());
    }
}
