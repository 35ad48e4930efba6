#!/usr/bin/env bats
# build.bats: does the build find what is there, and nothing that is not? And do the scripts around it count, check and refuse rightly?
#
# Each test works in a copy of the build files with a two-line trainer. PATH is a folder of links to the system's tools without mpicc, nvcc,
# nvidia-smi, python3 and apt-get; each test adds what its machine shall have. The CUDA toolkit is a fake: headers of a line each, libraries
# with those functions, and an nvcc that hands the source to g++. So the tests say the same on every machine.

setup_file() {
    export FAKE=$BATS_FILE_TMPDIR
    mkdir -p "$FAKE/system" "$FAKE/cuda/bin" "$FAKE/cuda/include/nvtx3" "$FAKE/cuda/lib64" "$FAKE/nccl/include" "$FAKE/nccl/lib"
    ln -s /usr/bin/* "$FAKE/system/"
    local tool
    for tool in make g++ bash bats; do
        tool=$(type -ap "$tool" | grep -v libexec | head -n1) # bats puts its own inner parts on PATH
        ln -sf "$(readlink -f "$tool")" "$FAKE/system/$(basename "$tool")"
    done
    rm -f "$FAKE"/system/{mpicc,nvcc,nvidia-smi,python3,apt-get,sudo} # a test installs nothing

    cd "$FAKE/cuda" || return
    printf 'extern "C" int cudaGetDeviceCount(int*);\n' > include/cuda_runtime.h
    printf 'typedef void* cublasLtHandle_t; extern "C" int cublasLtCreate(cublasLtHandle_t*);\n' > include/cublasLt.h
    : > include/cuda_bf16.h
    : > include/cuda_fp16.h
    printf '%s\n' 'enum { __NV_SATFINITE, __NV_E4M3 };' 'inline int __nv_cvt_float_to_fp8(float, int, int) { return 0x38; }' \
        > include/cuda_fp8.h
    : > include/only_here.h
    : > include/nvtx3/nvToolsExt.h
    library lib64/libcudart.so 'int cudaGetDeviceCount(int* n) { return *n = 0; }'
    library lib64/libcublasLt.so 'int cublasLtCreate(void** h) { return h == 0; }'
    cat > bin/nvcc <<'EOF'
#!/usr/bin/env bash
if [ "$1" = --list-gpu-code ]; then
    printf 'sm_%s\n' 75 80 89 90 100
    exit 0
fi
words=()
while [ $# -gt 0 ]; do
    case $1 in
        -x) words+=(-x c++); shift ;;
        -ccbin | -gencode) shift ;;
        -fmad=false | --expt-relaxed-constexpr | -lineinfo) ;;
        -Xcompiler=*) words+=("${1#-Xcompiler=}") ;;
        *) words+=("$1") ;;
    esac
    shift
done
exec g++ "${words[@]}"
EOF
    chmod +x bin/nvcc
    nccl_home "$FAKE/nccl"
    cat > "$FAKE/smi_gpu" <<'EOF'
#!/usr/bin/env bash
case $* in
    -L) echo "GPU 0: NVIDIA H100 (UUID: GPU-1)" ;;
    "--query-gpu=compute_cap --format=csv,noheader") tr ',' '\n' <<< "${CAPS:-9.0}" ;;
    *) exit 2 ;;
esac
EOF
    printf '#!/usr/bin/env bash\necho "No devices were found"\nexit 6\n' > "$FAKE/smi_none"
    chmod +x "$FAKE"/smi_*
}

library() { printf '%s\n' "$2" | gcc -shared -fPIC -x c - -o "$1"; }

# nccl_home DIR: makes DIR a complete NCCL
nccl_home() {
    mkdir -p "$1/include" "$1/lib"
    printf '%s\n' 'struct ncclUniqueId { int x; };' 'extern "C" { int ncclGetVersion(int*); int ncclGetUniqueId(ncclUniqueId*); }' \
        > "$1/include/nccl.h"
    library "$1/lib/libnccl.so" 'int ncclGetVersion(int* v) { return *v = 0; } int ncclGetUniqueId(int* id) { return *id = 0; }'
}

setup() {
    local root
    root=$(dirname "$BATS_TEST_DIRNAME")
    mkdir -p "$BATS_TEST_TMPDIR/project/test" "$BATS_TEST_TMPDIR/bin"
    cd "$BATS_TEST_TMPDIR/project" || return
    cp -r "$root/Makefile" "$root/scripts" .
    printf '#include <stdio.h>\n#include "part.h"\n' > train_gpt_fp8.cu
    printf 'int main() {\n#ifdef USE_CUDA\n    puts("cuda");\n#else\n    puts("cpu");\n#endif\n    return 0;\n}\n' > part.h
    bin=$BATS_TEST_TMPDIR/bin
}

# on PROGRAM…: runs it on our machine, with nothing of the real one's environment; NAME=value words may come first
on() { env -i PATH="$bin:$FAKE/system" HOME="$BATS_TEST_TMPDIR" LC_ALL=C "$@"; }

has() { ln -sf "$FAKE/$1" "$bin/$2"; }

# says NAME TEXT: the line `NAME = …TEXT…` is in the output of make config
says() {
    if ! grep -F "$1 = " <<< "$output" | grep -qF -- "$2"; then
        printf 'wanted %s = …%s…, got:\n%s\n' "$1" "$2" "$output"
        return 1
    fi
}

@test "auto takes the CPU where nvcc is there but no GPU is visible, and says so" {
    has cuda/bin/nvcc nvcc
    has smi_none nvidia-smi
    run on make config
    [ "$status" = 0 ]
    says DEVICE cpu
    says WHY "nvcc is there, but nvidia-smi shows no GPU"
    run on make -n
    [[ ${lines[0]} == "DEVICE=cpu (auto: nvcc is there, but nvidia-smi shows no GPU)"* ]]
}

@test "auto takes CUDA where nvcc and a GPU are there, and names the GPU" {
    has smi_gpu nvidia-smi
    run on CUDA_HOME="$FAKE/cuda" make config
    [ "$status" = 0 ]
    says DEVICE cuda
    says WHY "GPU 0: NVIDIA H100"
    says CUDA_HOME "$FAKE/cuda"
    run on NVCC="$FAKE/cuda/bin/nvcc" make config
    says DEVICE cuda
    says CUDA_HOME "$FAKE/cuda"
}

@test "auto takes the CPU where a GPU but no nvcc is there, or where the GPU is hidden" {
    has smi_gpu nvidia-smi
    run on make config NVCC="$bin/nvcc"
    says DEVICE cpu
    says WHY "no nvcc"
    has cuda/bin/nvcc nvcc
    run on CUDA_VISIBLE_DEVICES= make config
    says DEVICE cpu
    says WHY "CUDA_VISIBLE_DEVICES"
}

@test "DEVICE=cuda builds without a GPU, and is refused without nvcc or with half a toolkit" {
    has smi_none nvidia-smi
    run on make DEVICE=cuda CUDA_HOME="$FAKE/cuda"
    [ "$status" = 0 ]
    [ "$(./train_gpt_fp8)" = cuda ]
    run on make config DEVICE=cuda NVCC="$bin/nvcc"
    [ "$status" != 0 ]
    [[ $output == *"needs nvcc"*"$bin/nvcc"* ]]
    cp -r "$FAKE/cuda" half
    library half/lib64/libcublasLt.so 'int other(void) { return 0; }' # absent, that of the system might be found
    run on make config DEVICE=cuda CUDA_HOME="$PWD/half"
    [ "$status" != 0 ]
    [[ $output == *"$PWD/half"*"cuBLASLt"* ]]
}

@test "a DEVICE that is none is refused, with what is allowed" {
    run on make DEVICE=gpu
    [ "$status" != 0 ]
    [[ $output == *"DEVICE=gpu"*"cuda, cpu and auto"* ]]
    [ ! -e build ]
}

@test "./train_gpt_fp8 is always that of the device last made" {
    has smi_none nvidia-smi
    on make DEVICE=cpu
    [ "$(./train_gpt_fp8)" = cpu ]
    on make DEVICE=cuda CUDA_HOME="$FAKE/cuda"
    [ "$(./train_gpt_fp8)" = cuda ]
    run on make DEVICE=cpu
    [ "$(./train_gpt_fp8)" = cpu ]
    [[ $output != *"-c train_gpt_fp8.cu"* ]]
    on make DEVICE=cuda CUDA_HOME="$FAKE/cuda" binary
    [ "$(./train_gpt_fp8)" = cpu ]
}

@test "without mpicc, or with NO_MPI=1, the binary is one process, and it is said" {
    run on make config DEVICE=cpu
    says MPI "no: mpicc is not there, so the binary runs as one process"
    [[ $output != *-DUSE_MPI* ]]
    printf '#!/bin/sh\nexit 0\n' > "$bin/mpicc"
    chmod +x "$bin/mpicc"
    run on make config DEVICE=cpu NO_MPI=1
    says MPI "no: NO_MPI=1"
    run on make -n DEVICE=cpu NO_MPI=1
    [[ ${lines[0]} == *"runs as one process"* ]]
}

@test "MPI is found through Open MPI's and MPICH's wrappers, and believed only when it links" {
    mkdir -p mpi/include mpi/lib
    printf 'extern "C" { int MPI_Init(int*, char***); int MPI_Finalize(void); }\n' > mpi/include/mpi.h
    library mpi/lib/libfakempi.so 'int MPI_Init(int* c, char*** v) { return c == v; } int MPI_Finalize(void) { return 0; }'
    cat > "$bin/mpicc" <<EOF
#!/bin/sh
case \$1 in
    --showme:compile) echo -I$PWD/mpi/include -pthread ;;
    --showme:link) echo -L$PWD/mpi/lib -lfakempi ;;
esac
EOF
    chmod +x "$bin/mpicc"
    run on make config DEVICE=cpu
    says MPI "yes: Open MPI"
    says COMPILE "-DUSE_MPI"
    says COMPILE "-I$PWD/mpi/include"
    says LIBS "-lfakempi"
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda"
    says COMPILE "-Xcompiler=-pthread"

    cat > "$bin/mpicc" <<EOF
#!/bin/sh
case \$1 in
    -compile_info) echo gcc -O2 -I$PWD/mpi/include -c ;;
    -link_info) echo gcc -L$PWD/mpi/lib -lfakempi ;;
    *) exit 1 ;;
esac
EOF
    run on make config DEVICE=cpu
    says MPI "yes: MPICH"
    says LIBS "-lfakempi"

    rm mpi/lib/libfakempi.so
    touch -d '+1 minute' "$bin/mpicc"
    run on make config DEVICE=cpu
    says MPI "no: mpicc is there but its flags do not compile and link"
    [[ $output != *-DUSE_MPI* ]]
}

@test "NCCL: NCCL_HOME comes first, then the CUDA root, then a Python wheel; NO_NCCL=1 leaves it out" {
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" NCCL_HOME="$FAKE/nccl"
    says NCCL "yes: $FAKE/nccl/lib/libnccl.so"
    says COMPILE "-DUSE_NCCL -I$FAKE/nccl/include"
    says LIBS "-Wl,-rpath,$FAKE/nccl/lib"
    cp -r "$FAKE/cuda" toolkit
    nccl_home "$PWD/toolkit"
    run on make config DEVICE=cuda CUDA_HOME="$PWD/toolkit" NCCL_HOME="$FAKE/nccl"
    says NCCL "yes: $FAKE/nccl/lib/libnccl.so"
    run on make config DEVICE=cuda CUDA_HOME="$PWD/toolkit"
    says NCCL "yes: $PWD/toolkit/lib/libnccl.so"
    run on make config DEVICE=cuda CUDA_HOME="$PWD/toolkit" NO_NCCL=1
    says NCCL "no: NO_NCCL=1"
    [[ $output != *-DUSE_NCCL* ]]

    [ ! -e /usr/include/nccl.h ] || skip "NCCL is in /usr here, which comes before a wheel"
    nccl_home "$PWD/wheel"
    mv wheel/lib/libnccl.so wheel/lib/libnccl.so.2
    printf '#!/bin/sh\necho %s/wheel\n' "$PWD" > "$bin/python3"
    chmod +x "$bin/python3"
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda"
    says NCCL "yes: $PWD/wheel/lib/libnccl.so.2"
}

@test "NCCL: a folder with nccl.h but no library, or one that is not NCCL, is not taken" {
    nccl_home "$PWD/nccl"
    rm nccl/lib/libnccl.so
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" NCCL_HOME="$PWD/nccl"
    [ "$status" = 0 ]
    says NCCL "$PWD/nccl has nccl.h but no libnccl that links"
    [[ $output != *"-I$PWD/nccl"* ]]
    library nccl/lib/libnccl.so 'int other(void) { return 0; }'
    touch -d '+1 minute' nccl/include/nccl.h
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" NCCL_HOME="$PWD/nccl"
    says NCCL "$PWD/nccl has nccl.h but no libnccl that links"
    [[ $output != *"-I$PWD/nccl"* ]]
}

@test "GPU_ARCH: code for each, PTX of the last that later GPUs take; what nvcc does not know is refused" {
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda"
    says COMPILE "-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90"
    for list in "80 90a" "80,90a" "sm_80 sm_90a"; do
        run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" GPU_ARCH="$list"
        says COMPILE "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90"
    done
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" GPU_ARCH="100f 80"
    says COMPILE "-gencode arch=compute_100f,code=sm_100f -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80"
    [[ $output != *code=compute_100* ]]
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" GPU_ARCH=hopper
    [ "$status" != 0 ]
    [[ $output == *"GPU_ARCH=hopper"* ]]
    run on make config DEVICE=cuda CUDA_HOME="$FAKE/cuda" GPU_ARCH="80 200"
    [ "$status" != 0 ]
    [[ $output == *"does not know sm_200"*"75 80 89 90 100"* ]]
}

@test "GPU_ARCH is that of the GPUs that are there, unless given; 90a where the driver does not tell" {
    has smi_gpu nvidia-smi
    run on CUDA_HOME="$FAKE/cuda" make config
    says GPU_ARCH 90a
    run on CUDA_HOME="$FAKE/cuda" CAPS=10.0,8.9,8.9,9.0 make config
    says GPU_ARCH "89 90a 100"
    says COMPILE "-gencode arch=compute_100,code=sm_100 -gencode arch=compute_100,code=compute_100"
    run on CUDA_HOME="$FAKE/cuda" CAPS=8.0 make -n # what was found on other GPUs is not kept
    [[ ${lines[0]} == *"sm 80;"* ]]
    run on CUDA_HOME="$FAKE/cuda" CAPS=8.0 make config GPU_ARCH="75 90"
    says GPU_ARCH "75 90"
    run on CUDA_HOME="$FAKE/cuda" CAPS='Field "compute_cap" is not a valid field to query.' make config
    [ "$status" = 0 ]
    says GPU_ARCH 90a
    has smi_none nvidia-smi
    run on CUDA_HOME="$FAKE/cuda" make config DEVICE=cuda
    [ "$status" = 0 ]
    says GPU_ARCH 90a
}

@test "the tests of the CPU build see NVIDIA's headers where the toolkit is; the trainer does not" {
    printf '#if __has_include(<only_here.h>)\n#error compared with\n#endif\n' > test/compare.cpp
    run on make DEVICE=cpu NVCC="$bin/nvcc" -n tests
    [ "$status" = 0 ]
    [[ $output != *-idirafter* ]]
    run on make DEVICE=cpu CUDA_HOME="$FAKE/cuda" tests
    [ "$status" != 0 ]
    [[ $output == *"compared with"* ]]
    echo '#include <only_here.h>' >> part.h
    run on make DEVICE=cpu CUDA_HOME="$FAKE/cuda"
    [ "$status" != 0 ]
    [[ $output == *"only_here.h: No such file"* ]]
    if ! on g++ -x c++ -E -include cuda_fp8.h /dev/null > found 2>&1; then # the system's headers come first, where it has them
        cp -r "$FAKE/cuda" other
        echo '#error not for this compiler' > other/include/cuda_fp8.h
        run on make DEVICE=cpu CUDA_HOME="$PWD/other" -n tests
        [ "$status" = 0 ]
        [[ $output != *-idirafter* ]]
    fi
}

@test "missing oneDNN, json-c or xxhash: the package and setup.sh are named" {
    mkdir -p broken/oneapi/dnnl broken/json-c
    echo '#error no such thing' > broken/oneapi/dnnl/dnnl.h
    run on make DEVICE=cpu EXTRA_CXXFLAGS="-I$PWD/broken"
    [ "$status" != 0 ]
    [[ $output == *"oneDNN"*"libdnnl-dev"*"scripts/setup.sh"* ]]
    echo '#error no such thing' > broken/json-c/json.h
    run on make DEVICE=cpu EXTRA_CXXFLAGS="-I$PWD/broken"
    [ "$status" != 0 ]
    [[ $output == *"json-c"*"libjson-c-dev"*"scripts/setup.sh"* ]]
    rm broken/json-c/json.h
    echo '#error no such thing' > broken/xxhash.h
    run on make DEVICE=cpu EXTRA_CXXFLAGS="-I$PWD/broken"
    [ "$status" != 0 ]
    [[ $output == *"xxhash"*"libxxhash-dev"*"scripts/setup.sh"* ]]
}

@test "findings are kept while nothing changes, and a new mpicc is noticed" {
    on make config DEVICE=cpu
    touch -d 2020-01-01 build/cpu/config.mk
    on make config DEVICE=cpu
    [ "$(stat -c %Y build/cpu/config.mk)" = "$(date -d 2020-01-01 +%s)" ]
    printf '#!/bin/sh\nexit 1\n' > "$bin/mpicc"
    chmod +x "$bin/mpicc"
    run on make config DEVICE=cpu
    says MPI "answers neither"
    [ "$(stat -c %Y build/cpu/config.mk)" != "$(date -d 2020-01-01 +%s)" ]
}

@test "only what changed is rebuilt: nothing, a header, the flags" {
    run on make DEVICE=cpu
    [[ $output == *"-c train_gpt_fp8.cu"* ]]
    run on make DEVICE=cpu
    [ "$status" = 0 ]
    [[ $output != *g++* ]]
    touch -d '+1 minute' part.h
    run on make DEVICE=cpu
    [[ $output == *"-c train_gpt_fp8.cu"* ]]
    touch part.h
    on make DEVICE=cpu
    run on make DEVICE=cpu EXTRA_CXXFLAGS=-DMORE
    [[ $output == *"-DMORE"*"-c train_gpt_fp8.cu"* ]]
    run on make DEVICE=cpu EXTRA_CXXFLAGS=-DMORE
    [[ $output != *g++* ]]
    run on make DEVICE=cpu SANITIZE=address,undefined
    [[ $output == *"-fsanitize=address -fsanitize=undefined"* ]]
    run on make clean all DEVICE=cpu
    [ "$status" = 0 ]
    [ "$(./train_gpt_fp8)" = cpu ]
}

@test "a source that no longer compiles leaves no old program behind" {
    on make DEVICE=cpu
    echo 'int broken' >> part.h
    touch -d '+1 minute' part.h
    run on make DEVICE=cpu
    [ "$status" != 0 ]
    [ ! -e build/cpu/train_gpt_fp8 ]
}

@test "the runner counts passes, failures, skips, crashes and what does not build, and ends with the sum" {
    cat > head.h <<'EOF'
#include <unistd.h>
extern "C" {
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
}
[[maybe_unused]] static void yes(void**) {}
[[maybe_unused]] static void no(void**) { assert_true(0); }
[[maybe_unused]] static void not_here(void**) { skip(); }
[[maybe_unused]] static void leaves(void**) { _exit(0); }
EOF
    tests() {
        printf '#include "head.h"\nint main() {\n    const CMUnitTest tests[] = {%s};\n' "$1"
        printf '    return cmocka_run_group_tests(tests, NULL, NULL);\n}\n'
    }
    tests 'cmocka_unit_test(yes), cmocka_unit_test(not_here)' > test/good.cpp
    run on NVCC="$bin/nvcc" DEVICE=cpu make test
    [ "$status" = 0 ]
    [ "${lines[-1]}" = "1 passed, 0 failed, 2 skipped" ] # the second skip is the CUDA build

    tests 'cmocka_unit_test(yes), cmocka_unit_test(no)' > test/bad.cpp
    tests 'cmocka_unit_test(yes), cmocka_unit_test(leaves), cmocka_unit_test(yes)' > test/early.cpp
    printf 'int main() { __builtin_trap(); }\n' > test/crash.cpp
    printf 'int main() { return x; }\n' > test/typo.cpp
    printf 'int main() { return 0; }\n' > test/empty.cpp
    printf '@test "yes" { true; }\n@test "later" { skip "not now"; }\n@test "no" { echo the reason; false; }\n' > test/end.bats
    run on NVCC="$bin/nvcc" DEVICE=cpu make test
    echo "$output"
    [ "$status" != 0 ]
    [[ $output == *"not ok   crash "*"crashed: signal"* ]]
    [[ $output == *"not ok   early "*"after 1 of 3 tests"* ]]
    [[ $output == *"not ok   typo "*"does not build"* ]]
    [[ $output == *"not ok   empty "*"ran no test"* ]]
    [[ $output == *"the reason"* ]]
    # passed: good 1, bad 1, early 1, end 1. failed: bad, end; crash, early, typo, empty. skipped: good, end, the CUDA build
    grep -qx "4 passed, 6 failed, 3 skipped" <<< "$output"

    run on NVCC="$bin/nvcc" DEVICE=cpu make test ONLY=good
    [ "$status" = 0 ]
    [ "${lines[-1]}" = "1 passed, 0 failed, 1 skipped" ]
    run on make test ONLY=nosuch DEVICE=cpu
    [ "$status" != 0 ]
    rm test/*
    run on NVCC="$bin/nvcc" DEVICE=cpu make test
    [ "$status" != 0 ]
    [[ $output == *"no test ran"* ]]
}

@test "the runner compiles the CUDA build where nvcc is, and a break there is a failure" {
    printf '@test "yes" { true; }\n' > test/end.bats
    run on CUDA_HOME="$FAKE/cuda" make test DEVICE=cpu
    [ "$status" = 0 ]
    [ "${lines[-1]}" = "2 passed, 0 failed" ]
    printf '#ifdef USE_CUDA\n#error broken there\n#endif\n' >> part.h
    run on CUDA_HOME="$FAKE/cuda" make test DEVICE=cpu
    [ "$status" != 0 ]
    [[ $output == *"broken there"* ]]
    grep -qx "1 passed, 1 failed" <<< "$output"
}

@test "on a machine with a GPU the runner tests the CPU build, and leaves ./train_gpt_fp8 as it was" {
    has smi_gpu nvidia-smi
    on CUDA_HOME="$FAKE/cuda" make
    [ "$(./train_gpt_fp8)" = cuda ]
    # shellcheck disable=SC2016 # $TRAIN is the inner test's
    printf '@test "cpu" { [ "$("$TRAIN")" = cpu ]; }\n' > test/end.bats
    printf '#include <stdio.h>\n#ifdef USE_CUDA\n#error not for GPUs\n#endif\nint main() { puts("1..1\\nok 1 - cpu"); }\n' > test/unit.cpp
    local device
    for device in DEVICE= DEVICE=auto; do
        run on CUDA_HOME="$FAKE/cuda" make test "$device"
        [ "$status" = 0 ]
        [[ $output == *"DEVICE: cpu"*"WHY: "*"CPU build"* ]]
        grep -q '^ok *cuda-build' <<< "$output"
        [ "${lines[-1]}" = "3 passed, 0 failed" ]
        [ "$(./train_gpt_fp8)" = cuda ]
    done
}

@test "setup.sh --check names what is missing; setup.sh installs just that, once" {
    has smi_none nvidia-smi
    cp -rP "$FAKE/system" tools
    rm -f tools/gnuplot tools/mpirun
    ln -sf "$(command -v true)" tools/mpicc
    # shellcheck disable=SC2317 # it is run by run
    ours() { env -i PATH="$bin:$PWD/tools" HOME="$BATS_TEST_TMPDIR" LC_ALL=C "$@"; }
    run ours scripts/setup.sh --check
    [ "$status" = 1 ]
    [[ $output == *"openmpi-bin"*"gnuplot-nox"* ]]
    [[ $output != *libopenmpi-dev* ]]
    run ours NO_MPI=1 scripts/setup.sh --check
    [[ $output != *openmpi* ]]

    # an apt-get that installs a link, and root
    printf '#!/bin/sh\necho 0\n' > "$bin/id"
    cat > "$bin/apt-get" <<EOF
#!/usr/bin/env bash
case \$* in *--simulate*) exit 0 ;; esac
echo "\$@" >> $PWD/apt.log
for word; do
    case \$word in
        openmpi-bin) ln -s /bin/true $bin/mpirun ;;
        gnuplot-nox) ln -s /bin/true $bin/gnuplot ;;
    esac
done
EOF
    chmod +x "$bin/id" "$bin/apt-get"
    run ours scripts/setup.sh
    [ "$status" = 0 ]
    [[ $output == *"openmpi-bin"*"starts them"* ]]
    [[ $output == *"setup: done" ]]
    grep -q "install .*openmpi-bin gnuplot-nox" apt.log
    run grep -E "update|g\+\+" apt.log
    [ "$status" = 1 ]
    run ours scripts/setup.sh
    [ "$status" = 0 ]
    [[ $output == *"everything is there"* ]]
    [ "$(wc -l < apt.log)" = 1 ]
    run ours scripts/setup.sh --check
    [ "$status" = 0 ]
    [ -z "$output" ]
}

@test "setup.sh goes on without MPI and the plot, but not without what is needed, and names it" {
    cp -rP "$FAKE/system" tools
    rm -f tools/{gnuplot,mpirun}
    ours() { env -i PATH="$PWD/tools" HOME="$BATS_TEST_TMPDIR" LC_ALL=C "$@"; }
    run ours scripts/setup.sh
    [ "$status" = 0 ]
    [[ $output == *"going on without gnuplot-nox"* ]]
    rm -f tools/bats
    run ours scripts/setup.sh
    [ "$status" = 1 ]
    [[ $output == *"bats is missing and could not be installed"* ]]
    run ours scripts/setup.sh --demo
    [ "$status" = 0 ]
    [[ $output != *bats* ]]
}

@test "the demo trains in both recipes with the same command and sets the two side by side" {
    # A trainer that writes its arguments and a log whose figures we know: loss 4, then 2 for bf16 and 2.05 for fp8; memory 3 and 2 MiB
    cat > train_gpt_fp8.cu <<'EOF'
#include <stdio.h>
#include <string.h>
#include <string>
#include <sys/stat.h>
int main(int argc, char** argv) {
    std::string dir, recipe, rest;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--output-dir") == 0) { dir = argv[i + 1]; }
        else if (strcmp(argv[i], "--recipe") == 0) { recipe = argv[i + 1]; }
        else { rest += std::string(" ") + argv[i] + " " + argv[i + 1]; }
    }
    bool fp8 = recipe == "fp8";
    mkdir(dir.c_str(), 0777);
    FILE* log = fopen((dir + "/log.jsonl").c_str(), "w");
    fprintf(log, "{\"config\": {\"steps\": 40, \"loss\": 9}}\n");
    for (int step = 1; step <= 40; step++) {
        double loss = step <= 30 ? 4 : fp8 ? 2.05 : 2;
        fprintf(log, "{ \"step\": %d, \"loss\": %g, \"tok_s\": %d, \"mfu\": null, \"mem\": { \"weights\": %d, \"gradients\": 1048576 } }\n",
                step, loss, step <= 20 ? 1 : 500, (fp8 ? 1 : 2) * 1048576);
        printf("step %d/40 | loss %.4f | norm 1.00\n", step, loss);
    }
    fprintf(log, "{\"step\": 40, \"val_loss\": 2.5}\n");
    printf("args:%s\n", rest.c_str());
    return fclose(log);
}
EOF
    mkdir demo
    echo text > demo/text.txt
    printf '#!/bin/sh\necho "plot $*"\n' > scripts/plot.sh
    chmod +x scripts/plot.sh
    ln -s "$(command -v true)" "$bin/gnuplot"
    run on DEVICE=cpu NO_MPI=1 STEPS=40 make demo
    echo "$output"
    [ "$status" = 0 ]
    [[ $output == *"without MPI: one process"* ]]
    [ "$(grep -c '^args:.*--steps 40' <<< "$output")" = 2 ]
    [ "$(grep '^args:' <<< "$output" | sort -u | wc -l)" = 1 ]
    grep -q '^bf16 step 40/40 | loss 2.0000' <<< "$output"
    grep -q '^fp8  step 40/40 | loss 2.0500 .* | bf16 loss 2.0000$' <<< "$output"
    run grep -c 'step 39/40' <<< "$output"
    [ "$output" = 0 ]
    run on DEVICE=cpu NO_MPI=1 STEPS=40 make demo
    grep -qE 'final loss.* 2\.0000 +2\.0500 +\+2\.50 %' <<< "$output"
    grep -qE 'validation loss +2\.5000 +2\.5000 +\+0\.00 %' <<< "$output"
    grep -qE 'weights +2\.0 +1\.0 +-50\.00 %' <<< "$output"
    grep -qE 'activations +- +- +-' <<< "$output"
    grep -qE 'in all +3\.0 +2\.0 +-33\.33 %' <<< "$output"
    grep -qE 'tokens a second +500 +500 ' <<< "$output"
    grep -q 'plot demo/loss.png bf16=demo/bf16 fp8=demo/fp8' <<< "$output"
}

@test "text.sh takes your text, refuses what is none, and leaves a text that is there alone" {
    printf 'Of arms and the man I sing.\n' > poem.txt
    run on DATA=poem.txt scripts/text.sh out/text.txt
    [ "$status" = 0 ]
    cmp poem.txt out/text.txt
    run on scripts/text.sh out/text.txt
    [ "$status" = 0 ]
    [[ $output == *"28 bytes"* ]]
    cmp poem.txt out/text.txt
    run on DATA=none.txt scripts/text.sh out/text.txt
    [ "$status" = 1 ]
    [[ $output == *"DATA=none.txt"* ]]
    head -c 3000 /dev/urandom > noise.bin
    run on DATA=noise.bin scripts/text.sh out/text.txt
    [ "$status" = 1 ]
    [[ $output == *"noise.bin is not text"* ]]
    cmp poem.txt out/text.txt
    { head -c 1000 /dev/zero | tr '\0' a; printf '\377'; } > nearly.txt
    run on DATA=nearly.txt scripts/text.sh out/text.txt
    [ "$status" = 0 ]
    [ "$(stat -c %s out/text.txt)" = 1000 ]
    [ "$(ls out)" = text.txt ]
}
