"""train_gpt's arithmetic against PyTorch, live: loss, every tensor at the borders of the five functions, every
gradient, weights after ten AdamW steps, for models and batches of awkward sizes, each in every recompute mode, chunked
and whole.

Both sides are measured against gpt.py in float64, so that one sees whose error it is; ours is also compared with
PyTorch's fp32 directly. A program for GPUs is compared with PyTorch on the same GPU.
"""
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev" / "reference"))
import compare as harness  # noqa: E402
from gpt import Config  # noqa: E402
from tensor_file import write_tensors  # noqa: E402

torch.set_num_threads(1)  # the models are tiny


def case(layers, channels, heads, vocab, tied, lengths, chunk_tokens, ignored=0.0, weight_decay=0.0, clip=0.0):
    """`chunk_tokens` lists the chunk sizes to try: sequences that are longer become slices. `ignored` is the share of
    targets set to -1."""
    random = np.random.default_rng([layers, channels, vocab, sum(lengths)])
    sequences = []
    for length in lengths:
        targets = random.integers(vocab, size=length)
        targets[random.random(length) < ignored] = -1
        sequences.append({"tokens": random.integers(vocab, size=length).tolist(), "targets": targets.tolist()})
    model = dict(layers=layers, channels=channels, heads=heads, context=max(lengths) + 3, vocab=vocab, tied=tied)
    rates = dict(steps=10, lr=1e-3, lr_schedule="constant", warmup=0)
    optimizer = dict(eps=1e-8, beta1=0.9, beta2=0.95, weight_decay=weight_decay, clip=clip, **rates)
    return dict(model=model, sequences=sequences, threads=2, **optimizer), chunk_tokens


CASES = {
    "one sequence, slices": case(1, 24, 3, 61, True, [17], [17, 5]),
    "one head of 33, one-token segments": case(1, 33, 1, 50, False, [13, 1, 7, 1, 1], [23, 8]),
    "mostly one-token segments": case(1, 32, 2, 40, True, [1, 1, 1, 6, 1, 1], [11, 3]),
    "odd channels, seven heads": case(3, 21, 7, 97, True, [9, 5, 3, 9], [26, 9, 4], weight_decay=0.1),
    "packed documents, ignored targets": case(3, 40, 5, 130, True, [31, 1, 2, 64, 9], [107, 33], ignored=0.3, clip=1.0),
    "last slice of one token": case(3, 48, 3, 64, False, [95], [95, 47], weight_decay=0.1, clip=0.5),
    "heads of 64": case(1, 192, 3, 257, True, [130, 129, 1], [260, 64], clip=1.0),
    "head of 128": case(3, 128, 1, 101, False, [70, 33], [103, 50], ignored=0.1),
    "equal windows": case(3, 64, 4, 256, False, [32] * 4, [128, 32, 10], weight_decay=0.1, clip=1.0),
    "long and short": case(3, 96, 6, 256, True, [257, 3, 78, 1, 150], [257, 100], ignored=0.2, weight_decay=0.1),
}
RECOMPUTE = ["none", "without-attention", "full"]
CHUNKS = [{"mlp_chunk": 0, "head_chunk": 0}, {"mlp_chunk": 7, "head_chunk": 5}]


def show(capsys, text):
    with capsys.disabled():
        print(text, file=sys.stderr, flush=True)  # the standard output of parallel workers is lost


@pytest.mark.parametrize("name", CASES)
def test_against_pytorch(name, tmp_path, capsys):
    base, chunk_sizes = CASES[name]
    head_size = base["model"]["channels"] // base["model"]["heads"]
    binary = harness.program("fp32")
    if harness.built_for(binary) != "cpu" and head_size % 8:
        pytest.skip("heads on a GPU have a multiple of 8 channels")
    device = harness.torch_device(binary)
    weights = harness.perturbed_weights(Config(**base["model"]), seed=1)
    exact, torch32 = (harness.reference(base, weights, dtype, device) for dtype in (torch.float64, torch.float32))
    against_exact, against_torch = {}, {}
    for recompute, chunks, chunk_tokens in product(RECOMPUTE, CHUNKS, chunk_sizes):
        layout = dict(base, recompute=recompute, chunk_tokens=chunk_tokens, **chunks)
        harness.write_case(tmp_path, layout, weights)
        ours = harness.run_ours(tmp_path)
        for errors, wanted in (against_exact, exact), (against_torch, torch32):
            for tensor, error in harness.compare(ours, wanted).items():
                errors[tensor] = max(errors.get(tensor, 0.0), error)

    ours, theirs, between = map(harness.worst, (against_exact, harness.compare(torch32, exact), against_torch))
    layouts = f"{6 * len(chunk_sizes)} layouts, PyTorch on {device}"
    show(capsys, f"\n{name}: largest relative error of {len(exact)} tensors in {layouts}")
    for kind, bound in harness.BOUNDS[device].items():
        tensor, error = ours[kind]
        show(
            capsys,
            f"  {kind:15} bound {bound:.0e}: ours to fp64 {error:.1e}, PyTorch to fp64 {theirs[kind][1]:.1e}, "
            f"ours to PyTorch {between[kind][1]:.1e}  ({tensor})",
        )
    for kind, bound in harness.BOUNDS[device].items():
        assert ours[kind][1] <= bound, f"{kind} of {ours[kind][0]} against float64"
        assert between[kind][1] <= bound, f"{kind} of {between[kind][0]} against PyTorch's fp32"


@pytest.mark.parametrize("name", CASES)
def test_fp64_against_pytorch(name, tmp_path, capsys):
    """In double precision both sides agree to its rounding, which leaves no room for a term that is merely small."""
    base, chunk_sizes = CASES[name]
    weights = harness.perturbed_weights(Config(**base["model"]), seed=1)
    layout = dict(base, recompute="full", chunk_tokens=chunk_sizes[-1], mlp_chunk=7, head_chunk=5)
    harness.write_case(tmp_path, layout, weights)
    ours = harness.run_ours(tmp_path, binary=harness.program("fp64"))
    errors = harness.compare(ours, harness.reference(base, weights))
    worst = max(errors, key=errors.get)
    show(capsys, f"\nfp64, {name}: largest relative error {errors[worst]:.1e} (bound 1e-12, {worst})")
    assert errors[worst] <= 1e-12


HOST_CASES = ["one sequence, slices", "packed documents, ignored targets", "last slice of one token", "head of 128"]


@pytest.mark.parametrize("name", HOST_CASES)
def test_cuda_program_on_the_host(name, tmp_path, capsys):
    """The program for GPUs, its GPU played by the host (cuda_on_host): what kernels, device memory and the traffic
    between the two make of a step. Slow, so that few layouts are tried."""
    base, chunk_sizes = CASES[name]
    base = dict(base, steps=2)
    weights = harness.perturbed_weights(Config(**base["model"]), seed=1)
    exact, errors = harness.reference(base, weights), {}
    for recompute, chunks, chunk_tokens in zip(RECOMPUTE, CHUNKS * 2, chunk_sizes * 2):
        layout = dict(base, recompute=recompute, chunk_tokens=chunk_tokens, **chunks)
        harness.write_case(tmp_path, layout, weights)
        ours = harness.run_ours(tmp_path, binary=ROOT / "build" / "cuda-on-host-fp32" / "test_gpt")
        for tensor, error in harness.compare(ours, exact).items():
            errors[tensor] = max(errors.get(tensor, 0.0), error)
    worst = harness.worst(errors)
    for kind, bound in harness.BOUNDS["cpu"].items():
        show(capsys, f"\nCUDA on the host, {name}: {kind} {worst[kind][1]:.1e} (bound {bound:.0e}, {worst[kind][0]})")
        assert worst[kind][1] <= bound


def test_adamw_fed_identical_gradients(tmp_path, capsys):
    """Gradients over nine decades, some of them zero, so that eps and the bias corrections show."""
    base = dict(CASES["odd channels, seven heads"][0], eps=1e-6, weight_decay=0.1)
    weights = harness.perturbed_weights(Config(**base["model"]), seed=2)
    random = np.random.default_rng(3)
    steps = []
    for _ in range(base["steps"]):
        draw = lambda shape: random.standard_normal(shape) * 10.0 ** random.uniform(-9, 0, shape)
        sparse = lambda shape: (draw(shape) * (random.random(shape) > 0.1)).astype(np.float32)
        steps.append({n: sparse(w.shape) for n, w in weights.items()})
    harness.write_case(tmp_path, dict(base, recompute="none", chunk_tokens=64, mlp_chunk=0, head_chunk=0), weights)
    write_tensors(
        tmp_path / "gradients.safetensors", {f"{t}.{n}": g for t, step in enumerate(steps, 1) for n, g in step.items()}
    )
    wanted, ours = harness.optimized_weights(base, weights, steps), harness.run_ours(tmp_path, "adamw")
    errors = {name: harness.relative_error(ours[name], array) for name, array in wanted.items()}
    show(capsys, f"\nAdamW, identical gradients: largest relative error {max(errors.values()):.1e} (bound 1e-06)")
    assert max(errors.values()) <= 1e-6


BF16_CASES = ["packed documents, ignored targets", "heads of 64", "equal windows", "long and short"]


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16_against_autocast(name, tmp_path, capsys):
    """Our bf16 build may be at most 1.3 times as far from exact gradients as PyTorch's autocast. Rounding is chance, so
    it is the norm of the error of all gradients together, root mean square over four draws of the weights."""
    base, chunk_sizes = CASES[name]
    layout = dict(base, steps=0, recompute="none", chunk_tokens=chunk_sizes[-1], mlp_chunk=0, head_chunk=0)
    device = harness.torch_device(harness.program("bf16"))
    ours, autocast, losses = [], [], []
    for seed in range(4):
        weights = harness.perturbed_weights(Config(**base["model"]), seed)
        exact = harness.gradients(base, weights, device=device)
        whole = lambda tensors: np.concatenate([tensors[n].ravel() for n in exact if n.startswith("grad.")])
        harness.write_case(tmp_path, layout, weights)
        dumped = harness.run_ours(tmp_path, binary=harness.program("bf16"))
        ours.append(harness.relative_error(whole(dumped), whole(exact)))
        with_autocast = harness.gradients(base, weights, torch.float32, autocast=True, device=device)
        autocast.append(harness.relative_error(whole(with_autocast), whole(exact)))
        losses.append([harness.relative_error(dumped["loss"], wanted["loss"]) for wanted in (exact, with_autocast)])
    error, allowed = np.linalg.norm(ours) / 2, np.linalg.norm(autocast) / 2
    ratio, (to_exact, to_autocast) = error / allowed, np.max(losses, axis=0)
    show(capsys, f"\nbf16, {name}, PyTorch on {device}: gradient error {error:.2e}, autocast {allowed:.2e}, "
                 f"ratio {ratio:.2f} (bound 1.3); loss to fp64 {to_exact:.1e}, to autocast {to_autocast:.1e} (bound 1e-3)")
    assert ratio <= 1.3
    assert to_exact <= 1e-3 and to_autocast <= 1e-3


# By the device that the program is built for: layers, channels, heads and context of the model, windows a step, steps,
# draws of weights and data. `tiny` of presets.h on a GPU; less where that would take minutes.
CURVES = {
    "cuda": (4, 192, 4, 256, 8, 200, 3),
    "cpu": (2, 64, 4, 64, 4, 200, 3),
    "cuda-on-host": (1, 32, 4, 16, 2, 50, 1),
}


def text_with_rules(length, letters=32):
    """After each two letters come four others: something to learn. Long runs of one letter, of which real text has some,
    do not occur: dev/bench/RESULTS.md says what they do to attention in bf16."""
    generator = np.random.default_rng(7)
    successors = generator.integers(letters, size=(letters, letters, 4))
    text = [0, 1]
    for choice in generator.integers(4, size=length - 2):
        text.append(int(successors[text[-2], text[-1], choice]))
    return text


def test_loss_curve(tmp_path, capsys):
    """Our bf16 build, PyTorch's autocast and PyTorch's fp32 train from the same weights on the same windows of a text.
    Roundings move the losses: ours may be 1.5 times as far from autocast's as those are from fp32's, step by step in the
    mean over all draws. (Were both rounded independently and alike, it would be 1.4.)"""
    binary = harness.program("bf16")
    device = harness.torch_device(binary)
    layers, channels, heads, context, windows, steps, draws = CURVES[harness.built_for(binary)]
    base, _ = case(layers, channels, heads, 257, True, [context], [], weight_decay=0.1, clip=1.0)
    base["model"]["context"] = context
    base.update(steps=steps, lr=6e-4, lr_schedule="cosine", warmup=steps // 10)
    base.update(recompute="none", chunk_tokens=windows * context // 2, mlp_chunk=0, head_chunk=0)
    text = text_with_rules(100_000)
    ours, autocast, fp32 = [], [], []  # [draw][step]
    for draw in range(draws):
        starts = np.random.default_rng(draw).integers(len(text) - context, size=(steps, windows))
        window = lambda t: {"tokens": text[t : t + context], "targets": text[t + 1 : t + 1 + context]}
        batches = [[window(t) for t in step] for step in starts]
        weights = harness.initial_weights(Config(**base["model"]), draw)
        harness.write_case(tmp_path, dict(base, batches=batches), weights)
        ours.append(harness.run_ours(tmp_path, "losses", binary)["losses"])
        for losses, rounded in (autocast, True), (fp32, False):
            losses.append(harness.train(base, weights, batches, torch.float32, rounded, device)[1])
    ours, autocast, fp32 = map(np.array, (ours, autocast, fp32))
    gap, allowed = np.abs(ours - autocast).mean(), np.abs(autocast - fp32).mean()
    show(capsys, f"\nloss curve, {steps} steps, {draws} draws, PyTorch on {device}: {fp32[:, 0].mean():.3f} to "
                 f"{fp32[:, -1].mean():.3f}; ours to autocast {gap:.1e}, autocast to fp32 {allowed:.1e}, "
                 f"ratio {gap / allowed:.2f} (bound 1.5)")
    assert gap <= 1.5 * allowed
