"""Our binary against gpt.py, tensor by tensor. A case is a directory with case.json (model, sequences, optimizer and
layout) and weights.safetensors; `./test_gpt dump DIR` and `reference` below turn it into tensors of the same names:

    loss, head.losses                         mean over the targets; one for each token
    embed, pre.0.qkv, attention.0.out, ...    the borders, sequence after sequence, whatever the chunks were
    d.embed, d.pre.0.qkv, ...                 gradients at the borders
    grad.NAME, weight.NAME                    of each parameter; weights after case["steps"] AdamW steps on one batch

and `./test_gpt losses DIR` and `train` below into the loss of each step on one of case["batches"] after the other.
PyTorch computes where the program does: on the GPU, if that was built for one and there is one.

`python3 dev/reference/compare.py DIR` prints every tensor's error for a case that is there.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from gpt import GPT, Config, adamw, clip_gradients, parameter_groups, token_losses
from tensor_file import read_tensors, write_tensors

ROOT = Path(__file__).resolve().parents[2]
torch.set_float32_matmul_precision("highest")  # on GPUs, products in fp32 are not to be rounded to TF32
# largest relative error, norm-wise, that fp32 may have, by the device of torch_device
CPU_BOUNDS = {"loss": 1e-6, "border": 1e-5, "border gradient": 1e-5, "gradient": 1e-5, "key bias": 1e-5, "weight": 1e-4}
GPU_BOUNDS = {"loss": 1e-5, "border": 1e-5, "border gradient": 3e-5, "gradient": 3e-5, "key bias": 3e-5, "weight": 1e-4}
BOUNDS = {"cpu": CPU_BOUNDS, "cuda": GPU_BOUNDS}


def kind_of(name):
    if name == "loss":
        return "loss"
    if name.endswith(".key_bias"):
        return "key bias"
    return {"grad": "gradient", "weight": "weight", "d": "border gradient"}.get(name.split(".")[0], "border")


def initial_mean(name):
    return 1.0 if ".ln_" in name and name.endswith("weight") or name == "ln_f.weight" else 0.0


def initial_weights(config, seed):
    """GPT-2's initial values: normal matrices of sigma 0.02, those that add to the residual stream of less."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, parameter in GPT(config).named_parameters():
        sigma = 0.02 if parameter.dim() == 2 else 0.0
        if name.endswith("c_proj.weight"):
            sigma /= math.sqrt(2 * config.layers)
        weights[name] = (initial_mean(name) + sigma * random.standard_normal(tuple(parameter.shape))).astype(np.float32)
    return weights


def perturbed_weights(config, seed):
    """GPT-2's initial values with normal noise of sigma 0.1 on every element: zeros would hide missing terms."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, parameter in GPT(config).named_parameters():
        weights[name] = (initial_mean(name) + 0.1 * random.standard_normal(tuple(parameter.shape))).astype(np.float32)
    return weights


def load_model(case, weights, dtype, device):
    model = GPT(Config(**case["model"])).to(device, dtype)
    model.load_state_dict({name: torch.tensor(array, dtype=dtype) for name, array in weights.items()})
    return model


def loss_of(model, sequences, autocast=False, borders=None):
    """The mean over the targets, and the losses of all tokens."""
    parameter = next(model.parameters())
    flatten = lambda key: torch.tensor([t for s in sequences for t in s[key]], device=parameter.device)
    tokens, targets = flatten("tokens"), flatten("targets")
    with torch.autocast(parameter.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(tokens, [len(sequence["tokens"]) for sequence in sequences], borders)
    losses = token_losses(logits.to(parameter.dtype), targets)
    return losses.sum() / (targets != -1).sum(), losses


def gradients(case, weights, dtype=torch.float64, autocast=False, device="cpu"):
    """Loss, borders and every gradient of one step."""
    model, borders = load_model(case, weights, dtype, device), {}
    loss, losses = loss_of(model, case["sequences"], autocast, borders)
    loss.backward()
    tensors = {"loss": loss, "head.losses": losses}
    tensors.update(borders)
    tensors.update({f"d.{name}": border.grad for name, border in borders.items()})
    tensors.update({f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()})
    return {name: tensor.detach().double().cpu().numpy() for name, tensor in tensors.items()}


def learning_rate(case, step):
    """`step` counts from 1. Linear warm-up, then "constant", or half a "cosine" down to a tenth at the last step."""
    if step <= case["warmup"]:
        return case["lr"] * step / case["warmup"]
    if case["lr_schedule"] == "constant":
        return case["lr"]
    progress = (step - case["warmup"]) / (case["steps"] - case["warmup"])
    return case["lr"] * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def train(case, weights, batches, dtype=torch.float64, autocast=False, device="cpu"):
    """case["steps"] steps of torch.optim.AdamW with clipping, on one batch after the other and again from the first:
    the weights after them, and the loss of each."""
    model, losses = load_model(case, weights, dtype, device), []
    groups = parameter_groups(model, case["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=case["lr"], betas=(case["beta1"], case["beta2"]), eps=case["eps"])
    for step in range(1, case["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(case, step)
        optimizer.zero_grad()
        loss, _ = loss_of(model, batches[(step - 1) % len(batches)], autocast)
        loss.backward()
        clip_gradients(list(model.parameters()), case["clip"])
        optimizer.step()
        losses.append(loss.item())
    return {f"weight.{name}": p.detach().double().cpu().numpy() for name, p in model.named_parameters()}, losses


def optimized_weights(case, weights, steps):
    """Weights after AdamW in closed form, fed the gradients of each step: `steps` is a list of {name: array}."""
    result = {}
    for name, start in weights.items():
        w = torch.tensor(start, dtype=torch.float64)
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        decay = case["weight_decay"] if w.dim() == 2 else 0.0
        for step, grads in enumerate(steps, 1):
            g = torch.tensor(grads[name], dtype=torch.float64)
            adamw(w, g, m, v, step, case["lr"], case["beta1"], case["beta2"], case["eps"], decay)
        result[f"weight.{name}"] = w.numpy()
    return result


def reference(case, weights, dtype=torch.float64, device="cpu"):
    trained, _ = train(case, weights, [case["sequences"]], dtype, device=device)
    return {**gradients(case, weights, dtype, device=device), **trained}


def write_case(directory, case, weights):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "case.json").write_text(json.dumps(case))
    write_tensors(directory / "weights.safetensors", weights)


def program(precision):
    """test_gpt of this precision; HELIXTRAIN_TEST_GPT_FP32 and so on name another one, built for another device."""
    built = "test_gpt" if precision == "fp32" else f"build/cpu-{precision}/test_gpt"
    return ROOT / os.environ.get(f"HELIXTRAIN_TEST_GPT_{precision.upper()}", built)


def built_for(binary):
    """cpu, cuda or cuda-on-host: programs lie in build/DEVICE-PRECISION."""
    return binary.resolve().parent.name.rpartition("-")[0]


def torch_device(binary):
    """Where PyTorch computes what this program is compared with."""
    return "cuda" if built_for(binary) == "cuda" and torch.cuda.is_available() else "cpu"


def run_ours(directory, mode="dump", binary=None):
    """`HELIXTRAIN_ISA` in the environment chooses the kernels."""
    binary = binary or program("fp32")
    assert os.access(binary, os.X_OK), f"{binary} is missing: build it with `make {os.path.relpath(binary, ROOT)}`"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # cases are tiny: threads that spin only fight
    done = subprocess.run([str(binary), mode, str(directory)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{binary} {mode} {directory} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return read_tensors(Path(directory) / "ours.safetensors")


def relative_error(ours, wanted):
    """Norm of the difference over the norm of what is wanted; infinite where a value is not finite or shapes differ."""
    if ours.shape != wanted.shape or not (np.isfinite(ours).all() and np.isfinite(wanted).all()):
        return float("inf")
    difference, norm = np.linalg.norm(ours.astype(np.float64) - wanted), np.linalg.norm(wanted)
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm > 0 else float("inf")


def without_key_bias(array):  # [3C] -> [2C]
    return np.delete(array, np.s_[len(array) // 3 : 2 * len(array) // 3])


def compare(ours, wanted):
    """Relative error of each tensor, by name. The gradient of the keys' bias is zero in exact arithmetic (it moves all
    scores of a query alike) and AdamW blows up its rounding: it has to be small, and its weights are left out."""
    assert ours.keys() == wanted.keys(), f"only one side has {sorted(ours.keys() ^ wanted.keys())}"
    errors = {}
    for name, target in wanted.items():
        values = ours[name]
        if name.startswith("weight.") and name.endswith("c_attn.bias"):
            values, target = without_key_bias(values), without_key_bias(target)
        errors[name] = relative_error(values, target)
        if name.startswith("grad.") and name.endswith("c_attn.bias"):
            keys = values[len(values) // 3 : 2 * len(values) // 3]
            errors[f"{name}.key_bias"] = float(np.linalg.norm(keys) / np.linalg.norm(values))
    return errors


def worst(errors):
    """{kind: (name, error)} of the largest error of each kind."""
    found = {}
    for name, error in errors.items():
        if not error <= found.get(kind_of(name), ("", -1.0))[1]:
            found[kind_of(name)] = (name, error)
    return found


def main():
    directory = Path(sys.argv[1])
    case, weights = json.loads((directory / "case.json").read_text()), read_tensors(directory / "weights.safetensors")
    device = torch_device(program("fp32"))
    exact, torch32 = (reference(case, weights, dtype, device) for dtype in (torch.float64, torch.float32))
    errors, torch_errors = compare(run_ours(directory), exact), compare(torch32, exact)
    print(f"{'relative error against fp64':40} {'ours':>8} {'torch':>8} {'bound':>8}")
    for name, error in errors.items():
        print(f"{name:40} {error:8.1e} {torch_errors[name]:8.1e} {BOUNDS[device][kind_of(name)]:8.0e}")


if __name__ == "__main__":
    main()
