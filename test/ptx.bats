# What nvcc makes of the GPU's hot kernels, where nvcc is: nothing is spilled to memory, and the instructions meant are there.
load common

setup_file() {
    local nvcc
    nvcc=$(scripts/detect.sh nvcc 2> /dev/null) || return 0
    export PTX=$BATS_FILE_TMPDIR
    local json
    json=$(make -s DEVICE=cpu config | sed -n 's/^COMPILE = .* \(-I[^ ]*json-c\) .*/\1/p')
    for build in bench_kernels:90a bench_attention:90a bench_attention:80; do
        local name=${build%:*} arch=${build#*:}
        mkdir -p "$PTX/$arch"
        # shellcheck disable=SC2086 # one flag or none
        "$nvcc" -x cu -std=c++17 -O3 -I. $json -DUSE_CUDA -fmad=false --expt-relaxed-constexpr -gencode "arch=compute_$arch,code=sm_$arch" \
            --keep --keep-dir "$PTX/$arch" -Xptxas -v -c "scripts/$name.cu" -o "$PTX/$arch/$name.o" > "$PTX/$arch/$name.log" 2>&1 &
    done
    wait
    # a line a kernel: name, architecture, bytes spilled
    cat "$PTX"/*/bench_*.log | awk '/Compiling entry function/ { split($0, part, "\x27"); name = part[2] " " part[4] } /spill stores/ { print name, $5 + $9 }' > "$PTX/spills"
}

setup() {
    [ -n "${PTX:-}" ] || skip "no nvcc"
    if grep -q 'is not defined for option\|Unsupported gpu' "$PTX/90a/bench_kernels.log"; then skip "this nvcc does not know sm_90a"; fi
}

# spills PATTERN: of the kernels of that name, of which there must be some
spills() {
    grep -E "$1" "$PTX/spills" > "$PTX/found" || { cat "$PTX"/*/bench_*.log; return 1; }
    awk '$3 > 0 { print; bad = 1 } END { exit bad }' "$PTX/found"
}

@test "attention's kernels spill nothing, and wgmma is not serialised" {
    spills 'flash_(forward|backward_keys|backward_queries)_hopper'
    ! grep -E 'C75[0-9]+|serialized' "$PTX/90a/bench_attention.log"
}

@test "attention's kernels for other GPUs spill nothing either, built for 8.0 and for 9.0a, and multiply by mma.sync" {
    local arch kernel size ptx
    for arch in 80 90a; do
        for kernel in forward backward_keys backward_queries; do
            for size in 32 64 96 128; do spills "flash_${kernel}_mmaILi${size}E.* sm_$arch "; done
        done
    done
    ptx=$(ls "$PTX"/80/bench_attention*.ptx)
    grep -qF 'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32' "$ptx"
    grep -qF 'ldmatrix.sync.aligned.m8n8.x4.shared.b16' "$ptx"
    grep -qF 'ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16' "$ptx"
    grep -q 'cp.async.cg.shared.global .*, 16,' "$ptx"
}

@test "casts, GELU and LayerNorm spill nothing at the widths of 125M to 13B" {
    spills 'produce_tile_kernelI4bf164e[45]m'
    spills 'layernorm_forward_kernelILi[124]E4bf16'
    spills 'layernorm_backward_kernelILi[124]ELi[124]E4bf16'
}

@test "attention multiplies by wgmma and loads by cp.async" {
    local ptx
    ptx=$(ls "$PTX"/90a/bench_attention*.ptx)
    [ "$(grep -c 'wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16' "$ptx")" -ge 24 ]
    [ "$(grep -c 'wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16' "$ptx")" -ge 24 ]
    grep -q 'cp.async.cg.shared.global .*, 16,' "$ptx"
}

@test "casts read 16 bytes at once and convert by the hardware's instructions" {
    local ptx
    ptx=$(ls "$PTX"/90a/bench_kernels*.ptx)
    awk '/\.entry .*produce_tile_kernelI4bf164e4m312TensorSource/ { inside = 1 } inside { print } inside && /^}/ { exit }' "$ptx" > "$PTX/cast"
    [ "$(grep -cE 'ld(\.global)?(\.nc)?\.v4\.(u32|b32)' "$PTX/cast")" -ge 4 ]
    grep -q 'cvt.rn.satfinite.e4m3x2.f32' "$PTX/cast"
    grep -q 'max.NaN.bf16x2' "$PTX/cast"
}
