#!/usr/bin/env bash
# detect.sh: finds what the build stands on (device, compilers, MPI, NCCL, CUDA, oneDNN, json-c, xxhash) and writes it to BUILD/config.mk.
#
#   detect.sh         writes BUILD/config.mk where anything that decides it has changed, and prints its name (the Makefile includes it)
#   detect.sh nvcc    prints the nvcc that would be used; fails when there is none
#
# The wishes come as environment variables: DEVICE CXX NVCC CUDA_HOME NCCL_HOME MPICC NO_MPI NO_NCCL GPU_ARCH MARCH EXTRA_CXXFLAGS
# EXTRA_LDFLAGS BUILD. Nothing is believed because of its name: a library counts when a small program that calls it compiles and links.
# Those trials take a second or two, so config.mk carries a checksum of the wishes and of the tools and headers found (place, date, size)
# and is written anew only when that changes.
set -euo pipefail
export LC_ALL=C

device=${DEVICE:-auto}
cxx=${CXX:-g++}
mpicc=${MPICC:-mpicc}
march=${MARCH:-native}
read -ra extra_cxx <<< "${EXTRA_CXXFLAGS:-}"
read -ra extra_ld <<< "${EXTRA_LDFLAGS:-}"
read -ra cxx_words <<< "$cxx"
scratch=

fail() {
    printf 'detect.sh: %s\n' "$*" >&2
    exit 1
}

# find_nvcc: what the user named, else CUDA_HOME's, else the one on PATH, else the toolkit's usual place.
find_nvcc() {
    if [ -n "${NVCC:-}" ]; then
        command -v "$NVCC"
    elif [ -n "${CUDA_HOME:-}" ]; then
        command -v "$CUDA_HOME/bin/nvcc"
    else
        command -v nvcc || command -v /usr/local/cuda/bin/nvcc
    fi
}

# gpu_visible: leaves its finding in $gpu. The driver's own tool is believed where it is there; device files speak only where it is not.
gpu_visible() {
    local listed
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [[ -z $CUDA_VISIBLE_DEVICES || $CUDA_VISIBLE_DEVICES == -1 ]]; then
        gpu="CUDA_VISIBLE_DEVICES hides every GPU"
        return 1
    fi
    if command -v nvidia-smi > /dev/null; then
        listed=$(timeout 20 nvidia-smi -L 2> /dev/null | grep '^GPU ' || true)
        if [ -z "$listed" ]; then
            gpu="nvidia-smi shows no GPU"
            return 1
        fi
        gpu=$(sed -n '1s/ (UUID.*//p; 1!d' <<< "$listed")
        gpu=${gpu:-${listed%%$'\n'*}}
    elif [ -e /dev/nvidia0 ]; then
        gpu="/dev/nvidia0 is there"
    else
        gpu="no nvidia-smi and no /dev/nvidia0"
        return 1
    fi
}

# trial SOURCE [FLAG…]: does this program compile and link? The compiler's words stay in $scratch/log.
trial() {
    printf '%s\n' "$1" > "$scratch/trial.cpp"
    shift
    "${cxx_words[@]}" -std=c++17 -w "${extra_cxx[@]}" "$scratch/trial.cpp" -o "$scratch/trial" "$@" "${extra_ld[@]}" > "$scratch/log" 2>&1
}

first_error() { grep -m1 -E 'error|cannot find|undefined|not found' "$scratch/log" || head -n1 "$scratch/log"; }

# first_dir NAME DIR…: the first folder that holds a file NAME.
first_dir() {
    local name=$1 dir
    shift
    for dir in "$@"; do
        if [ -e "$dir/$name" ]; then
            printf '%s\n' "$dir"
            return 0
        fi
    done
    return 1
}

# rpath DIR: the flag that lets the binary find a library outside the system's folders again.
rpath() {
    case $1 in
        /usr/lib | /usr/lib64 | /usr/lib/*-linux-gnu | /lib*) ;;
        *) printf -- '-Wl,-rpath,%s' "$1" ;;
    esac
}

# cuda_root NVCC: the toolkit's folder; the name the user knows it by where headers lie under it, else with links resolved.
cuda_root() {
    local root=${CUDA_HOME:-}
    if [ -z "$root" ]; then
        root=$(dirname "$(dirname "$1")")
        if ! cuda_include "$root" > /dev/null; then
            root=$(dirname "$(dirname "$(readlink -f "$1")")")
        fi
    fi
    printf '%s\n' "$root"
}

cuda_target() {
    case $(uname -m) in
        aarch64) echo sbsa-linux ;;
        *) echo "$(uname -m)-linux" ;;
    esac
}

cuda_include() { first_dir cuda_runtime.h "$1/include" "$1/targets/$(cuda_target)/include"; }

# gpu_archs: the architectures of the GPUs here, as GPU_ARCH names them; nothing where there is no GPU or the driver is too old to tell.
# 9.0 is 90a: what only Hopper has (wgmma) needs the suffix.
gpu_archs() {
    timeout 20 nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null \
        | sed -nE 's/^ *([0-9]+)\.([0-9]) *$/\1\2/p' | sort -nu | sed 's/^90$/90a/' | paste -sd ' ' || true
}

# nccl_wheel: the folder of NCCL's Python wheel, where python3 has one.
nccl_wheel() {
    python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])' 2> /dev/null || true
}

nccl_roots() { printf '%s\n' ${NCCL_HOME:+"$NCCL_HOME"} "$cuda" /usr "$wheel"; }

# -------- the device --------
case $device in
    auto)
        if ! nvcc=$(find_nvcc); then
            device=cpu why="auto: no nvcc"
        elif gpu_visible; then
            device=cuda why="auto: nvcc is there, and $gpu"
        else
            device=cpu why="auto: nvcc is there, but $gpu"
        fi
        ;;
    cpu) why="asked for" ;;
    cuda) why="asked for" ;;
    *) fail "DEVICE=$device is not a device: allowed are cuda, cpu and auto" ;;
esac
case ${1:-} in
    nvcc) find_nvcc; exit ;;
    '') ;;
    *) fail "unknown argument $1: allowed is nvcc, or nothing" ;;
esac
build=${BUILD:-build/$device}
config=$build/config.mk
cuda='' wheel='' nvcc='' gpu_arch='' cuda_headers=''
if [ "$device" = cuda ]; then
    looked_at=${NVCC:-${CUDA_HOME:-PATH or /usr/local/cuda}}
    nvcc=$(find_nvcc) \
        || fail "DEVICE=cuda needs nvcc and there is none at $looked_at: install the CUDA toolkit, or name it by NVCC or CUDA_HOME"
    cuda=$(cuda_root "$nvcc")
    wheel=$(nccl_wheel)
    gpu_arch=${GPU_ARCH:-$(gpu_archs)}
    gpu_arch=${gpu_arch:-90a}
    gpu_arch=$(tr ',' ' ' <<< "$gpu_arch" | sed -E 's/\b(sm|compute)_//g')
elif nvcc=$(find_nvcc); then
    cuda_headers=$(cuda_include "$(cuda_root "$nvcc")" | grep -vx /usr/include || true)
    nvcc=''
fi
command -v "${cxx_words[0]}" > /dev/null \
    || fail "no C++ compiler: ${cxx_words[0]} is not there; install g++ (scripts/setup.sh does), or name yours by CXX"

# -------- is what we knew still so? --------
key=$({
    printf '%s\n' "$device" "$why" "$cxx" "${EXTRA_CXXFLAGS:-}" "${EXTRA_LDFLAGS:-}" "$mpicc" "${NO_MPI:-}" "${NO_NCCL:-}" "$march"
    printf '%s\n' "$gpu_arch" "$cuda" "$cuda_headers" "${NCCL_HOME:-}" "$wheel"
    {
        printf '%s\n' "$0" "$nvcc" ${cuda_headers:+"$cuda_headers/cuda_fp8.h"} \
            /usr/include/oneapi/dnnl/dnnl_version.h /usr/include/json-c/json_c_version.h /usr/include/xxhash.h
        command -v "${cxx_words[0]}" || true
        command -v "$mpicc" || true
        command -v pkg-config || true
        "${cxx_words[@]}" -print-file-name=libjson-c.a || true
        if [ "$device" = cuda ]; then
            nccl_roots | sed 's|$|/include/nccl.h|'
        fi
    } | while read -r file; do
        if [ -n "$file" ]; then
            stat -Lc '%n %Y %s' "$file" 2> /dev/null || printf '%s absent\n' "$file"
        fi
    done
} | cksum)
if [ -e "$config" ] && [ "$(sed -n 's/^# key //p' "$config")" = "$key" ]; then
    printf '%s\n' "$config"
    exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# -------- json-c --------
json_cflags='' json_dynamic=-ljson-c
if command -v pkg-config > /dev/null && pkg-config --exists json-c 2> /dev/null; then
    json_cflags=$(pkg-config --cflags json-c)
    json_dynamic=$(pkg-config --libs json-c)
fi
json_static=$("${cxx_words[@]}" -print-file-name=libjson-c.a)
json_program='#include <json-c/json.h>
int main() { return json_object_put(json_object_new_object()); }'
read -ra cflags <<< "$json_cflags"
read -ra libs <<< "$json_dynamic"
if [ "$json_static" != libjson-c.a ] && trial "$json_program" "${cflags[@]}" "$json_static"; then
    json="static" json_libs=$json_static
elif trial "$json_program" "${cflags[@]}" "${libs[@]}"; then
    json="shared" json_libs=$json_dynamic
else
    fail "json-c does not compile and link with ${cxx_words[0]} ($(first_error)): install libjson-c-dev (scripts/setup.sh does)"
fi

# -------- xxhash: its header alone --------
trial '#define XXH_INLINE_ALL
#include <xxhash.h>
int main() { return (int)XXH3_128bits("", 0).low64 == 0; }' \
    || fail "xxhash does not compile with ${cxx_words[0]} ($(first_error)): install libxxhash-dev (scripts/setup.sh does)"

# -------- MPI --------
# Open MPI answers --showme, MPICH and its kin -compile_info and -link_info. Of the answer we take paths, macros and libraries.
mpi_cflags='' mpi_libs='' mpi="no: $mpicc is not there, so the binary runs as one process"
if [ -n "${NO_MPI:-}" ] && [ "${NO_MPI:-}" != 0 ]; then
    mpi="no: NO_MPI=$NO_MPI, so the binary runs as one process"
elif command -v "$mpicc" > /dev/null; then
    if compile=$("$mpicc" --showme:compile 2> /dev/null) && link=$("$mpicc" --showme:link 2> /dev/null); then
        mpi_kind="Open MPI"
    elif compile=$("$mpicc" -compile_info 2> /dev/null) && link=$("$mpicc" -link_info 2> /dev/null); then
        mpi_kind="MPICH"
    else
        compile='' link='' mpi_kind=''
    fi
    for word in $compile; do
        case $word in
            -I* | -D* | -pthread) mpi_cflags+=" $word" ;;
        esac
    done
    for word in $link; do
        case $word in
            -L* | -l* | -Wl,* | -pthread | /*.so* | /*.a) mpi_libs+=" $word" ;;
        esac
    done
    mpi_cflags="-DUSE_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX$mpi_cflags" # the C interface only: the old C++ one is a further library
    read -ra cflags <<< "$mpi_cflags"
    read -ra libs <<< "$mpi_libs"
    if [ -z "$mpi_kind" ]; then
        mpi="no: $mpicc answers neither --showme:compile nor -compile_info, so the binary runs as one process"
        mpi_cflags='' mpi_libs=''
    elif trial '#include <mpi.h>
int main(int argc, char** argv) { MPI_Init(&argc, &argv); return MPI_Finalize(); }' "${cflags[@]}" "${libs[@]}"; then
        mpi="yes: $mpi_kind by $mpicc"
    else
        mpi="no: $mpicc is there but its flags do not compile and link ($(first_error)), so the binary runs as one process"
        mpi_cflags='' mpi_libs=''
    fi
fi

# -------- the device's own libraries --------
cpu_flags='' test_cflags='' device_cflags='' device_libs='' onednn='' nccl='' gencode='' nccl_note=''
if [ "$device" = cpu ]; then
    empty='int main() { return 0; }'
    trial "$empty" "-march=$march" || fail "MARCH=$march is not understood by ${cxx_words[0]} ($(first_error))"
    cpu_flags="-march=$march"
    if trial "$empty" "-march=$march" -mprefer-vector-width=512 -Werror; then
        cpu_flags+=" -mprefer-vector-width=512" # x86 only
    fi
    trial "$empty" -fopenmp || fail "${cxx_words[0]} has no OpenMP ($(first_error)): install libgomp or libomp"
    # dnnl.hpp takes seconds to compile: that it is there is enough, the C header and the library are really tried.
    trial '#include <oneapi/dnnl/dnnl.h>
#if !__has_include(<oneapi/dnnl/dnnl.hpp>) || DNNL_VERSION_MAJOR < 2
#error oneapi/dnnl/dnnl.hpp of oneDNN 2 or 3 not found
#endif
#include <stdio.h>
int main() { const dnnl_version_t* v = dnnl_version(); return printf("%d.%d.%d\n", v->major, v->minor, v->patch) < 0; }' -ldnnl \
        || fail "oneDNN 2 or 3 does not compile and link with ${cxx_words[0]} ($(first_error)): install libdnnl-dev (scripts/setup.sh does)"
    onednn=$("$scratch/trial") || fail "oneDNN is there but a program linked to it does not start: check libdnnl and its libraries"
    device_libs=-ldnnl
    # NVIDIA's own FP8 conversions, for the tests to compare ours with. Searched last, so that nothing else of the toolkit gets in the way.
    if [ -n "$cuda_headers" ] && trial '#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
int main() { return __nv_cvt_float_to_fp8(1.0f, __NV_SATFINITE, __NV_E4M3) != 0x38; }' -idirafter "$cuda_headers"; then
        test_cflags="-idirafter $cuda_headers"
    fi
else
    known=$("$nvcc" --list-gpu-code 2> /dev/null || true)
    last=
    for arch in $gpu_arch; do
        [[ $arch =~ ^[0-9]+[af]?$ ]] || fail "GPU_ARCH=$arch is not a list of compute capabilities such as 80, 89, 90a"
        if [ -n "$known" ] && ! grep -qx "sm_${arch%[af]}" <<< "$known"; then
            known=${known//sm_/}
            fail "$nvcc does not know sm_$arch: GPU_ARCH may hold ${known//$'\n'/ }; or name a newer toolkit by CUDA_HOME"
        fi
        gencode+=" -gencode arch=compute_$arch,code=sm_$arch"
        last=$arch
    done
    [ -n "$last" ] || fail "GPU_ARCH is empty: it is a list of compute capabilities such as 80, 89, 90a"
    gencode+=" -gencode arch=compute_${last%[af]},code=compute_${last%[af]}" # for GPUs that came later; a suffix would bind it to this one
    include=$(cuda_include "$cuda") || include=/usr/include
    if libdir=$(first_dir libcublasLt.so "$cuda/lib64" "$cuda/targets/$(cuda_target)/lib" "$cuda/lib"); then
        cuda_libs="-L$libdir $(rpath "$libdir")"
    else
        libdir='' cuda_libs=''
    fi
    [ "$include" = /usr/include ] || device_cflags="-I$include"
    cuda_libs+=" -lcublasLt"
    cuda_program='#include <cuda_runtime.h>
#include <cublasLt.h>
#include <nvtx3/nvToolsExt.h>
int main() { int n; cublasLtHandle_t lt; return cudaGetDeviceCount(&n) + cublasLtCreate(&lt); }'
    system_libs="-ldl -lrt -lpthread"
    read -ra cflags <<< "$device_cflags"
    for cudart in -lcudart_static -lcudart; do
        device_libs="$cuda_libs $cudart $system_libs"
        read -ra libs <<< "$device_libs"
        if trial "$cuda_program" "${cflags[@]}" "${libs[@]}"; then
            break
        fi
        [ $cudart = -lcudart_static ] \
            || fail "the CUDA toolkit at $cuda lacks one of cuda_runtime, cuBLASLt, nvtx3 ($(first_error));" \
                "complete it, or name another by CUDA_HOME"
    done

    nccl="no: found neither in NCCL_HOME, $cuda, /usr nor a Python wheel"
    if [ -n "${NO_NCCL:-}" ] && [ "${NO_NCCL:-}" != 0 ]; then
        nccl="no: NO_NCCL=$NO_NCCL"
    else
        while read -r root; do
            if [ -z "$root" ] || [ ! -e "$root/include/nccl.h" ]; then
                continue
            fi
            for library in "$root"/lib{64,/"$(uname -m)"-linux-gnu,}/libnccl.so{,.2}; do
                if [ ! -e "$library" ]; then
                    continue
                fi
                nccl_cflags="-I$root/include"
                if [ "$root" = /usr ] || [ "$nccl_cflags" = "$device_cflags" ]; then
                    nccl_cflags=''
                fi
                nccl_libs="$library $(rpath "$(dirname "$library")")"
                read -ra cflags <<< "$nccl_cflags $device_cflags"
                read -ra libs <<< "$nccl_libs $device_libs"
                if trial '#include <nccl.h>
int main() { int version; ncclUniqueId id; return ncclGetVersion(&version) + ncclGetUniqueId(&id); }' "${cflags[@]}" "${libs[@]}"; then
                    nccl="yes: $library"
                    device_cflags="-DUSE_NCCL $nccl_cflags $device_cflags"
                    device_libs="$nccl_libs $device_libs"
                    break 2
                fi
            done
            nccl_note+="; $root has nccl.h but no libnccl that links"
        done < <(nccl_roots)
        nccl+=$nccl_note
    fi
fi

# -------- what was found --------
mkdir -p "$build"
new=$(mktemp "$build/config.mk.XXXXXX")
{
    printf '# Written by scripts/detect.sh; do not edit: it is written anew when the tools or the wishes change.\n# key %s\n' "$key"
    for pair in "DEVICE=$device" "WHY=$why" "BUILD=$build" "CPU_FLAGS=$cpu_flags" "TEST_CFLAGS=$test_cflags" "ONEDNN=$onednn" \
        "NVCC=$nvcc" "CUDA_HOME=$cuda" "GPU_ARCH=$gpu_arch" "GENCODE=${gencode# }" "NCCL=$nccl" \
        "DEVICE_CFLAGS=$device_cflags" "DEVICE_LIBS=$device_libs" "MPI=$mpi" "MPI_CFLAGS=$mpi_cflags" "MPI_LIBS=${mpi_libs# }" \
        "JSON=$json" "JSON_CFLAGS=$json_cflags" "JSON_LIBS=$json_libs"; do
        value=${pair#*=}
        value=${value//\$/\$\$}
        printf 'override %s := %s\n' "${pair%%=*}" "${value//\#/\\#}"
    done
} > "$new"
chmod 644 "$new"
mv "$new" "$config"
printf '%s\n' "$config"
