#!/usr/bin/env python3
"""Golden values for the trainer, from an independent GPT in PyTorch (float64, gradients by autograd).

    python3 -m venv venv && venv/bin/pip install torch numpy
    venv/bin/python test/golden/gpt.py [folder]    # writes the files of this folder (or of another one) in a few seconds

The committed .bin files are its output: `make test` reads them (golden.h) and needs no Python. The script is seeded; run again with the
same PyTorch it writes the same bytes. Before it writes a case it checks itself: loss and gradients against a second GPT made of PyTorch's
own layer_norm, scaled_dot_product_attention, gelu and cross_entropy with RoPE as a product of complex numbers, and each gradient against a
central difference along a random direction. It also prints how far plain float32 is from float64: the room that a tolerance of 1e-4 leaves.

Cases, case_*.bin (config = L C NH V maxT T B rope tied; logits are (B,T,V), loss is the mean over B*T tokens):
    a  learned positions, tied head, 2 layers; maxT > T, so the last rows of wpe get gradient zero
    b  RoPE, separate head, 2 layers of 3 heads
    c  RoPE, tied head, one head of 24, a vocabulary just above 128 (padded to 256)
    d  learned positions, separate head, T = 1: attention is the identity, so q and k get gradient zero; embeddings so small (0.005) that
       LayerNorm's eps shows
Each holds config, tokens, targets, every parameter, grad.<parameter>, logits, loss. Names are llm.c's, a layer's with "h0.", "h1." ...
in front. Only the V real rows of wte and lmhead are there: padded ones must not change anything. The parameters of a, b and c are
multiples of 1/64 below 2 (one byte each in the file, and exact in BF16 too); those of d use every bit of float32, so that rounded weights
show. Without RoPE the gradient of k's bias is zero in exact arithmetic (softmax does not see it): compare by a tensor's norm.

llmc_v3.bin, llmc_v5.bin: llm.c checkpoints in FP32 and BF16 (the same weights, rounded). The padded rows of wte are +-40: a reader that
does not mask them gets another loss. llmc.bin: tokens, targets, loss_v3, loss_v5, each loss from the weights as stored in its file.

adamw.bin: torch.optim.AdamW in float64: hyper (lr, beta1, beta2, eps, weight decay), p, grads (5,37), and after each of the 5 steps
p_after, m_after, v_after (5,37). Element 0 has zero gradients (only decay moves it), elements 1 and 2 gradients near eps.

A golden file, little-endian: "GOLD", int32 version 1, int32 count; per tensor: name (32 bytes, padded with NUL), int32 dtype (0 = float32,
1 = int32, 2 = int8 in units of 1/64), int32 ndim, int32 dims[4] (unused ones are 1), the data in row-major order.
"""
import math
import os
import struct
import sys

import numpy as np
import torch
import torch.nn.functional as F

CASES = {
    "a": dict(L=2, C=16, NH=2, V=37, maxT=12, T=9, B=2, rope=0, tied=1),
    "b": dict(L=2, C=24, NH=3, V=41, maxT=7, T=7, B=3, rope=1, tied=0),
    "c": dict(L=1, C=24, NH=1, V=130, maxT=5, T=5, B=1, rope=1, tied=1),
    "d": dict(L=1, C=8, NH=2, V=19, maxT=3, T=1, B=2, rope=0, tied=0),
}
LLMC = dict(L=2, C=16, NH=2, V=100, maxT=12, T=10, B=2, rope=0, tied=1)
LAYER = ["ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb"]


def parameter_shapes(c):
    C, shapes = c["C"], {"wte": (c["V"], c["C"])}
    if not c["rope"]:
        shapes["wpe"] = (c["maxT"], C)
    layer = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    for l in range(c["L"]):
        for name, shape in zip(LAYER, layer):
            shapes[f"h{l}.{name}"] = shape
    shapes["lnfw"], shapes["lnfb"] = (C,), (C,)
    if not c["tied"]:
        shapes["lmhead"] = (c["V"], C)
    return shapes


def random_parameters(c, rng, grid, embedding_scale=1.0):
    """Larger than any initialisation, so that every gradient is far above rounding. float32, or multiples of 1/64 where `grid`."""
    p = {}
    for name, shape in parameter_shapes(c).items():
        x = rng.standard_normal(shape)
        kind = name.split(".")[-1]
        if kind in ("ln1w", "ln2w", "lnfw"):
            x = 1.0 + 0.3 * (2.0 * rng.random_sample(shape) - 1.0)
        elif len(shape) == 1:
            x = 0.2 * x
        else:
            x = (0.5 if kind in ("wte", "lmhead") else 0.3) * x
        if kind in ("wte", "wpe"):
            x = embedding_scale * x
        p[name] = (np.clip(np.rint(x * 64), -127, 127) / 64 if grid else x).astype(np.float32)
    return p


def random_tokens(c, rng):
    """tokens, targets (B,T): tokens repeat within a row and between rows; the first and the last of the vocabulary occur."""
    tokens = rng.randint(0, c["V"], (c["B"], c["T"]))
    targets = rng.randint(0, c["V"], (c["B"], c["T"]))
    tokens[0, 0] = tokens[0, c["T"] // 3] = 0
    tokens[1:, : c["T"] // 2] = rng.randint(0, c["V"])
    tokens[-1, -1], targets[-1, -1], targets[0, 0] = c["V"] - 1, c["V"] - 1, 0
    return tokens.astype(np.int32), targets.astype(np.int32)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The model, from its definition

def layer_norm(x, gain, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * gain + bias


def rotate(x):
    """RoPE on one head, x (B,T,hs): the pair (j, j + hs/2) turns by t * 10000^(-2j/hs), as in GPT-NeoX."""
    T, hs = x.shape[1:]
    j = torch.arange(hs // 2, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** (-2.0 * j / hs)
    cos, sin = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
    a, b = x[..., : hs // 2], x[..., hs // 2:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x ** 3)))


def gpt(c, p, tokens, targets):
    """logits (B,T,V) and the mean loss."""
    C, NH, T = c["C"], c["NH"], c["T"]
    hs = C // NH
    x = p["wte"][tokens]
    if not c["rope"]:
        x = x + p["wpe"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for l in range(c["L"]):
        w = {name: p[f"h{l}.{name}"] for name in LAYER}
        qkv = layer_norm(x, w["ln1w"], w["ln1b"]) @ w["qkvw"].T + w["qkvb"]
        heads = []
        for i in range(NH):
            q, k, v = (qkv[..., part * C + i * hs: part * C + (i + 1) * hs] for part in range(3))
            if c["rope"]:
                q, k = rotate(q), rotate(k)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(hs)).masked_fill(future, -math.inf)
            heads.append(torch.softmax(scores, dim=-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w["attprojw"].T + w["attprojb"]
        h = layer_norm(x, w["ln2w"], w["ln2b"])
        x = x + gelu(h @ w["fcw"].T + w["fcb"]) @ w["fcprojw"].T + w["fcprojb"]
    logits = layer_norm(x, p["lnfw"], p["lnfb"]) @ p["wte" if c["tied"] else "lmhead"].T
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return logits, (torch.logsumexp(logits, dim=-1) - picked).mean()


def run(model, c, p, tokens, targets, dtype=torch.float64):
    """logits, loss and {name: gradient} of the model at the float32 parameters p, computed in dtype; float64 arrays."""
    leaves = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in p.items()}
    logits, loss = model(c, leaves, torch.tensor(tokens, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))
    loss.backward()
    array = lambda t: t.detach().to(torch.float64).numpy()
    return array(logits), array(loss), {name: array(t.grad) for name, t in leaves.items()}


# ---------------------------------------------------------------------------------------------------------------------------------------
# Checks of the model

def library_gpt(c, p, tokens, targets):
    """The same GPT from PyTorch's own functions, all heads at once."""
    B, T, C, NH = c["B"], c["T"], c["C"], c["NH"]
    hs = C // NH
    x = F.embedding(tokens, p["wte"])
    if not c["rope"]:
        x = x + F.embedding(torch.arange(T), p["wpe"])
    turn = torch.polar(torch.ones(T, hs // 2, dtype=torch.float64),
                       torch.outer(torch.arange(T).double(), 10000.0 ** (-torch.arange(0, hs, 2).double() / hs)))
    for l in range(c["L"]):
        w = {name: p[f"h{l}.{name}"] for name in LAYER}
        qkv = F.linear(F.layer_norm(x, (C,), w["ln1w"], w["ln1b"], 1e-5), w["qkvw"], w["qkvb"])
        q, k, v = qkv.view(B, T, 3, NH, hs).permute(2, 0, 3, 1, 4)
        if c["rope"]:
            q, k = (torch.complex(*y.contiguous().chunk(2, dim=-1)) * turn for y in (q, k))
            q, k = (torch.cat([y.real, y.imag], dim=-1) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + F.linear(y, w["attprojw"], w["attprojb"])
        h = F.layer_norm(x, (C,), w["ln2w"], w["ln2b"], 1e-5)
        x = x + F.linear(F.gelu(F.linear(h, w["fcw"], w["fcb"]), approximate="tanh"), w["fcprojw"], w["fcprojb"])
    logits = F.linear(F.layer_norm(x, (C,), p["lnfw"], p["lnfb"], 1e-5), p["wte"] if c["tied"] else p["lmhead"])
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def check(label, c, p, tokens, targets, rng):
    """Golden logits, loss and gradients; stops unless both implementations and finite differences agree. Prints float32's own error."""
    logits, loss, grads = run(gpt, c, p, tokens, targets)
    logits2, loss2, grads2 = run(library_gpt, c, p, tokens, targets)
    assert distance(logits, logits2) < 1e-12 and distance(loss, loss2) < 1e-12, label
    difference_error = 0.0
    for name, g in grads.items():
        assert distance(g, grads2[name]) < 1e-11, (label, name)
        assert np.abs(g).max() > 1e-3, (label, name, "gradient too small to test anything")
        direction, step = rng.standard_normal(g.shape), 1e-5 * p[name].std()
        sides = [gpt(c, {n: torch.tensor(x.astype(np.float64) + (sign * step * direction if n == name else 0.0)) for n, x in p.items()},
                     torch.tensor(tokens).long(), torch.tensor(targets).long())[1].item() for sign in (1.0, -1.0)]
        slope = (g * direction).sum()
        error = abs((sides[0] - sides[1]) / (2 * step) - slope) / (np.linalg.norm(g) + abs(slope))
        difference_error = max(difference_error, error)
        assert error < 1e-6, (label, name, error)
        g[np.abs(g) < 1e-13 * np.abs(g).max()] = 0.0  # zero in exact arithmetic: no rounding noise in the files
    logits32, loss32, grads32 = run(gpt, c, p, tokens, targets, torch.float32)
    worst = max(grads, key=lambda name: distance(grads32[name], grads[name]))
    print(f"{label}: loss {loss:.6f}, finite differences within {difference_error:.0e}; float32 is off by {abs(loss32 - loss):.0e} (loss), "
          f"{np.abs(logits32 - logits).max():.0e} (a logit), {distance(grads32[worst], grads[worst]):.0e} (gradient of {worst}, relative)")
    return logits, loss, grads


# ---------------------------------------------------------------------------------------------------------------------------------------
# Files

F32, I32, I8 = 0, 1, 2


def write_golden(path, tensors):
    """tensors: list of (name, dtype, array)."""
    out = [struct.pack("<4sii", b"GOLD", 1, len(tensors))]
    for name, dtype, x in tensors:
        x = np.asarray(x)
        dims = list(x.shape) if x.ndim > 0 else [1]
        assert len(name) < 32 and len(dims) <= 4
        out.append(struct.pack("<32sii4i", name.encode(), dtype, len(dims), *(dims + [1] * (4 - len(dims)))))
        if dtype == I8:
            assert np.array_equal(np.rint(x * 64), x * 64) and np.abs(x).max() * 64 <= 127, name
            x = x * 64
        out.append(np.ascontiguousarray(x, dtype={F32: "<f4", I32: "<i4", I8: "i1"}[dtype]).tobytes())
    with open(path, "wb") as f:
        f.write(b"".join(out))


def write_case(folder, label, c, rng):
    grid = label != "d"
    p = random_parameters(c, rng, grid, embedding_scale=1.0 if grid else 0.01)
    tokens, targets = random_tokens(c, rng)
    logits, loss, grads = check(f"case {label}", c, p, tokens, targets, rng)
    tensors = [("config", I32, np.array([c[k] for k in ("L", "C", "NH", "V", "maxT", "T", "B", "rope", "tied")]))]
    tensors += [("tokens", I32, tokens), ("targets", I32, targets)]
    tensors += [(name, I8 if grid else F32, x) for name, x in p.items()]
    tensors += [("grad." + name, F32, g) for name, g in grads.items()]
    tensors += [("logits", F32, logits), ("loss", F32, loss)]
    write_golden(os.path.join(folder, f"case_{label}.bin"), tensors)


def write_llmc(folder, c, rng):
    p = random_parameters(c, rng, grid=False)
    tokens, targets = random_tokens(c, rng)
    padded = (c["V"] + 127) // 128 * 128
    garbage = (40.0 * np.sign(rng.standard_normal((padded - c["V"], c["C"])))).astype(np.float32)
    as_bf16 = lambda x: torch.tensor(x).to(torch.bfloat16)
    losses = {}
    for version in (3, 5):
        stored = {name: x if version == 3 else as_bf16(x).to(torch.float32).numpy() for name, x in p.items()}
        losses[version] = check(f"llmc_v{version}", c, stored, tokens, targets, rng)[1]
        header = np.zeros(256, dtype="<i4")
        header[:8] = [20240326, version, c["maxT"], c["V"], c["L"], c["NH"], c["C"], padded]
        weights = [np.concatenate([p["wte"], garbage]), p["wpe"]]
        weights += [np.stack([p[f"h{l}.{name}"] for l in range(c["L"])]) for name in LAYER]  # all layers of one tensor together
        weights += [p["lnfw"], p["lnfb"]]
        with open(os.path.join(folder, f"llmc_v{version}.bin"), "wb") as f:
            f.write(header.tobytes())
            for x in weights:
                f.write(x.astype("<f4").tobytes() if version == 3 else as_bf16(x).view(torch.int16).numpy().astype("<i2").tobytes())
    assert abs(losses[3] - losses[5]) > 1e-3, "the two losses are too close to tell rounded weights from unrounded ones"
    write_golden(os.path.join(folder, "llmc.bin"), [("tokens", I32, tokens), ("targets", I32, targets),
                                                    ("loss_v3", F32, losses[3]), ("loss_v5", F32, losses[5])])


def write_adamw(folder, rng):
    n, steps, lr, betas, eps, decay = 37, 5, 1e-3, (0.9, 0.95), 1e-8, 0.1
    p = rng.standard_normal(n).astype(np.float32)
    size = 10.0 ** rng.uniform(-4, 1, n)
    size[:3] = 0.0, 1e-8, 1e-7
    grads = (size * rng.standard_normal((steps, n))).astype(np.float32)
    x = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([x], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    m, v, expected = np.zeros(n), np.zeros(n), p.astype(np.float64)
    after = {"p_after": [], "m_after": [], "v_after": []}
    for t in range(steps):
        x.grad = torch.tensor(grads[t], dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[x]
        for key, value in zip(after, (x, state["exp_avg"], state["exp_avg_sq"])):
            after[key].append(value.detach().numpy().copy())
        g = grads[t].astype(np.float64)  # the equations once more, to be sure which AdamW this is
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        rate = (m / (1 - betas[0] ** (t + 1))) / (np.sqrt(v / (1 - betas[1] ** (t + 1))) + eps)
        expected = expected - lr * (rate + decay * expected)
        assert np.abs(after["p_after"][t] - expected).max() < 1e-14
    tensors = [("hyper", F32, np.array([lr, betas[0], betas[1], eps, decay])), ("p", F32, p), ("grads", F32, grads)]
    write_golden(os.path.join(folder, "adamw.bin"), tensors + [(name, F32, np.array(rows)) for name, rows in after.items()])


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
    torch.set_num_threads(1)  # one order of summation
    for seed, (label, c) in enumerate(CASES.items(), start=1):
        write_case(folder, label, c, np.random.RandomState(seed))  # RandomState: a stream that NumPy promises never to change
    write_llmc(folder, LLMC, np.random.RandomState(100))
    write_adamw(folder, np.random.RandomState(200))


if __name__ == "__main__":
    main()
