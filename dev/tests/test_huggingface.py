"""Checkpoints are Hugging Face GPT-2 models as they stand, and any GPT-2 that transformers saves is a start for ours.

Runs in an environment with transformers, build/venv (scripts/setup.sh --test makes it).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev" / "reference"))
import compare  # noqa: E402
from gpt import GPT, Config  # noqa: E402

CONTEXT, VOCAB = 48, 257


def write_tokens(path, tokens):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


@pytest.fixture
def window(tmp_path):
    """A token file of exactly one window, so that it is known what the first step sees."""
    tokens = np.random.default_rng(5).integers(VOCAB, size=CONTEXT + 1)
    write_tokens(tmp_path / "tokens.bin", tokens)
    return torch.tensor(tokens)


def train_gpt(*arguments):
    done = subprocess.run([ROOT / "train_gpt", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"train_gpt {arguments} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def train_on_window(tmp_path, *arguments):
    """Metrics of a run, one object a step."""
    data = tmp_path / "tokens.bin"
    train_gpt("train", "--data", data, "--val-data", data, "--packing", "contiguous", "--batch-tokens", CONTEXT,
              "--threads", 2, "--run-dir", tmp_path / "run", *arguments)  # fmt: skip
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def loss_of(model, window):
    with torch.no_grad():
        logits = model(window[None, :-1]).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, window[1:]).item()


def reference_logits(model, tokens):
    """gpt.py with the weights of a Hugging Face model, whose four linear layers of a block are transposed."""
    c = model.config
    config = Config(c.n_layer, c.n_embd, c.n_head, c.n_positions, c.vocab_size, c.tie_word_embeddings)
    ours = GPT(config).double()
    stored = {name.replace("transformer.", ""): tensor.double() for name, tensor in model.state_dict().items()}
    transposed = lambda name: ".c_" in name and name.endswith("weight")
    ours.load_state_dict({n: stored[n].T if transposed(n) else stored[n] for n, _ in ours.named_parameters()})
    with torch.no_grad():
        return ours(tokens, [len(tokens)]).numpy()


@pytest.mark.parametrize("head", [[], ["--untied"]], ids=["tied", "untied"])
def test_checkpoint_loads_with_from_pretrained(head, window, tmp_path, capsys):
    sizes = ["--model=custom", "--layers=2", "--channels=36", "--heads=3", f"--context={CONTEXT}"]
    train_on_window(tmp_path, *sizes, *head, "--steps", 20, "--lr", 0.01, "--lr-schedule", "constant")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    model, loading = GPT2LMHeadModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.tie_word_embeddings == (not head)

    with torch.no_grad():
        theirs = model.eval()(window[None, :-1]).logits[0].numpy()
    case = {"checkpoint": str(checkpoint), "tokens": window[:-1].tolist(), "threads": 2}
    (tmp_path / "case.json").write_text(json.dumps(case))
    ours = compare.run_ours(tmp_path, "logits")["logits"]
    reference = reference_logits(model, window[:-1])
    from_ours, from_reference = np.abs(ours - theirs).max(), np.abs(reference - theirs).max()
    data = tmp_path / "tokens.bin"
    evaluated = train_gpt("eval", "--checkpoint", checkpoint, "--data", data, "--packing", "contiguous")
    loss = float(evaluated.split("\nloss ")[1].split()[0])
    with capsys.disabled():
        print(f"\nlogits of up to {np.abs(theirs).max():.1f}; difference to transformers: ours {from_ours:.1e}, "
              f"gpt.py {from_reference:.1e} (bound 1e-4)\n"
              f"`eval` {loss:.6f} nats, transformers {loss_of(model, window):.6f} (bound 1e-5)")  # fmt: skip
    assert from_ours <= 1e-4 and from_reference <= 1e-4
    assert abs(loss - loss_of(model, window)) <= 1e-5


@pytest.mark.parametrize("form", ["GPT2LMHeadModel", "GPT2Model", "untied", "float16", "sharded", "old"])
def test_init_from_a_model_that_transformers_saved(form, window, tmp_path, capsys):
    """With and without the prefix `transformer.`, tied and untied, in fp32 and fp16, in one file and in several, and
    with the causal masks that old files hold."""
    torch.manual_seed(7)
    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=40, n_layer=3, n_head=5, bos_token_id=256,
                        eos_token_id=256, tie_word_embeddings=form != "untied")  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if form == "float16":
        model = model.half().float()
    saved = {"GPT2Model": model.transformer, "float16": model.half()}.get(form, model)
    saved.save_pretrained(tmp_path / "gpt2", max_shard_size="100KB" if form == "sharded" else "5GB")
    if form == "old":
        weights = tmp_path / "gpt2" / "model.safetensors"
        masks = {f"transformer.h.{l}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for l in range(3)}
        save_file({**load_file(weights), **masks}, weights, metadata={"format": "pt"})
    wanted = loss_of(model.float(), window)

    first, *_ = rows = train_on_window(tmp_path, "--init-from", tmp_path / "gpt2", "--steps", 1)
    losses = first["val_loss"], next(row["loss"] for row in rows if "loss" in row)
    with capsys.disabled():
        print(f"\n{form}: transformers {wanted:.6f}, val_loss {losses[0]:.6f}, loss of step 1 {losses[1]:.6f} "
              "(bound 1e-6)")  # fmt: skip
    for loss in losses:
        assert abs(loss - wanted) <= 1e-6 * wanted
