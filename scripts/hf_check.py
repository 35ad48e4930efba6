#!/usr/bin/env python3
"""Do Hugging Face's transformers compute what the trainer does? Imports and exports of small random models, compared on the CPU.

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors
    make DEVICE=cpu binary
    venv/bin/python scripts/hf_check.py [build/cpu/train_gpt_fp8]    # some minutes; needs no GPU and no network
    venv/bin/python scripts/hf_check.py --golden test/golden         # writes hf_gpt2, hf_gpt_neox and hf_losses.txt there

transformers makes random GPT-2s and GPT-NeoXs and saves them. Of each the trainer's validation loss on a fixed text must be that of
transformers to 1e-3 (--init), its export must have the same bits in every tensor and give the same logits in from_pretrained
(--export-hf), and after some steps of training the exported model must have the loss that the trainer had at the end. A line a check;
exit status 1 if one fails.

`make test` needs no Python: it reads the golden folders, small models in BF16 as transformers save them (the GPT-2 in several files), and
expects the losses that transformers have in float64 on 2 x 10 tokens, number i of which is (7 i^2 + 13 i + floor(i / 5)) mod 40.
"""
import json
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging

T, WINDOWS, VOCAB = 32, 8, 300
TEXT = bytes(32 + (i * i * 7 + i * 13 + i // 5) % 90 for i in range(WINDOWS * T + 1))
failed = 0


def check(name, good, detail):
    global failed
    failed += not good
    print(f"{'ok    ' if good else 'not ok'}  {name}: {detail}", flush=True)


def gpt2(tied, heads, vocab=VOCAB, positions=T + 8, width=48):
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=2, n_head=heads, tie_word_embeddings=tied,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))


def neox(tied, heads, vocab=VOCAB, positions=T + 8, width=48):
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, max_position_embeddings=positions, hidden_size=width, num_hidden_layers=2,
                                            num_attention_heads=heads, intermediate_size=4 * width, hidden_act="gelu_new", rotary_pct=1.0,
                                            use_parallel_residual=False, tie_word_embeddings=tied, hidden_dropout=0.0, attention_dropout=0.0))


def randomise(model, seed):
    """Far from the initial values, where biases are zero and norms one, so that what is swapped shows."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "ln_" in name or "norm" in name
            p.copy_((1.0 if norm and name.endswith("weight") else 0.0) + 0.25 * torch.randn(p.shape))


def loss_and_logits(model):
    tokens = torch.tensor(list(TEXT))
    inputs = tokens[:-1].view(WINDOWS, T)
    with torch.no_grad():
        logits = model(inputs).logits.float()
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[1:]).item(), logits


def train(folder, name, *flags, ranks=1):
    """Runs the trainer; the folder of its log."""
    log = os.path.join(folder, "log_" + name)
    launch = ["mpirun", "-np", str(ranks), "--oversubscribe"] + (["--allow-run-as-root"] if os.geteuid() == 0 else []) if ranks > 1 else []
    run = subprocess.run(launch + [TRAIN, "--seq-len", str(T), "--micro-batch", "2", "--val-data", os.path.join(folder, "text.txt"),
                                   "--val-batches", str(WINDOWS), "--output-dir", log, *flags], capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"the trainer ended with {run.returncode}: {run.stderr}")
    lines = [json.loads(line) for line in open(os.path.join(log, "log.jsonl"))]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def bits_differ(a, b):
    """Names of tensors that only one of two model files has, or whose bits differ."""
    a, b = load_file(os.path.join(a, "model.safetensors")), load_file(os.path.join(b, "model.safetensors"))
    return sorted(k for k in set(a) | set(b) if k not in a or k not in b or a[k].dtype != b[k].dtype or not torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)))


def golden(folder):
    rows, length, vocab = 2, 10, 40
    tokens = torch.tensor([(i * i * 7 + i * 13 + i // 5) % vocab for i in range(rows * length + 1)])
    losses = []
    for name, make, shard in (("gpt2", gpt2, "6KB"), ("gpt_neox", neox, "1GB")):
        model = make(name == "gpt2", 2, vocab, length + 2, 16)
        randomise(model, 5)
        model = model.to(torch.bfloat16)
        model.save_pretrained(os.path.join(folder, "hf_" + name), max_shard_size=shard)
        with torch.no_grad():
            logits = model.to(torch.float64).eval()(tokens[:-1].view(rows, length)).logits.double()
        losses.append(f"{name} {torch.nn.functional.cross_entropy(logits.view(-1, vocab), tokens[1:]).item():.9f}\n")
    open(os.path.join(folder, "hf_losses.txt"), "w").write("".join(losses))
    return 0


def main():
    if sys.argv[1:2] == ["--golden"]:
        return golden(sys.argv[2])
    models = [("gpt2 tied", gpt2(True, 3)), ("gpt2 untied", gpt2(False, 4)), ("gpt_neox untied", neox(False, 3)), ("gpt_neox tied", neox(True, 4))]
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text.txt")
        open(text, "wb").write(TEXT)
        for number, (name, model) in enumerate(models):
            tag = name.replace(" ", "_")
            theirs, ours = os.path.join(folder, tag), os.path.join(folder, tag + "_out")
            randomise(model, number)
            model.eval()
            model.save_pretrained(theirs)
            loss, logits = loss_and_logits(model)
            (got,) = train(folder, tag, "--init", theirs, "--recipe", "fp32", "--steps", "0", "--export-hf", ours)
            check(f"{name}, import", abs(got - loss) < 1e-3, f"loss {got:.6f}, transformers' {loss:.6f}")
            different = bits_differ(theirs, ours)
            check(f"{name}, export", not different, "all tensors have the same bits" if not different else f"tensors differ: {different}")
            back, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
            missing = {k: list(v) for k, v in info.items() if v}
            off = (loss_and_logits(back.eval())[1] - logits).abs().max().item()
            check(f"{name}, from_pretrained", off < 1e-3 and not missing, f"logits off by at most {off:.2g}" + (f"; {missing}" if missing else ""))
            config, saved = AutoConfig.from_pretrained(ours).to_dict(), AutoConfig.from_pretrained(theirs).to_dict()
            keys = [k for k in saved if k in config and saved[k] != config[k] and k not in ("n_inner", "dtype", "_name_or_path", "transformers_version")]
            keys = [k for k in keys if "dropout" not in k and "pdrop" not in k]
            check(f"{name}, config", not keys, "says the same" if not keys else str({k: (saved[k], config[k]) for k in keys}))
            # after training, in other formats, and over ranks
            tp = "2" if model.config.num_attention_heads % 2 == 0 else "1"
            for recipe, ranks, allowed, flags in (("fp32", 1, 1e-3, []), ("fp32", 4, 1e-3, ["--tp", tp, "--pp", "2"]),
                                                  ("bf16", 1, 2e-2, ["--export-dtype", "fp32"]), ("fp8", 1, 5e-2, [])):
                out = os.path.join(folder, f"{tag}_{recipe}{ranks}")
                losses = train(folder, f"{tag}_{recipe}{ranks}", "--init", theirs, "--recipe", recipe, "--train-data", text, "--steps", "5", "--lr", "1e-2", "--warmup", "1",
                               "--global-batch", str(8 * T), "--val-every", "5", "--export-hf", out, *flags, ranks=ranks)
                trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
                want = loss_and_logits(trained)[0]
                check(f"{name}, trained in {recipe} on {ranks} rank{'s' if ranks > 1 else ''}", abs(losses[-1] - want) < allowed * max(1.0, want) and losses[-1] < losses[0],
                      f"loss {losses[-1]:.6f} (before {losses[0]:.4f}), of the export {want:.6f}")
    print(f"{failed} checks failed" if failed else "all checks passed")
    return failed > 0


TRAIN = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "build/cpu/train_gpt_fp8")
if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    sys.exit(main())
