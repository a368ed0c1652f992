"""The PyTorch side of dev/bench/cpu_vs_torch and gpu_vs_torch: whole training steps of dev/reference/gpt.py's modules,
timed on demand.

The only argument is the case as JSON: `model`, `sequences`, `precision`, and where they are not as below

    device          "cpu"; or "cuda"
    parameters      "fp32", under autocast if the precision is bf16; or "bf16": parameters, gradients and moments, too
    compile         "": no torch.compile; "model": of all up to the loss; "blocks": of each block and the head by itself
    head_chunk      0: logits of all tokens; else their head, loss and gradients are computed so many rows at a time
    checkpoint      false; or true: blocks are recomputed in the backward pass, all but the attention
    threads         [] of the CPU: the faster of all and half of them; else those to try

Prints one JSON object when warm; then, for each line `N` on standard input, runs N steps and prints their seconds as a
list. Ends with its input.
"""
import json
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpt import GPT, HAS_FUSED_ATTENTION, Config, packed_attention, parameter_groups, token_losses  # noqa: E402

DEFAULTS = dict(device="cpu", parameters="fp32", compile="", head_chunk=0, checkpoint=False, threads=[])


class ChunkedHead(torch.autograd.Function):
    """Sum of the losses of x [N, C] by the weight [V, C], `chunk` rows at a time, with the gradients at once, so that
    logits exist of one chunk only."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk, loss_of_rows):
        dx, d_weight, total = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32), 0.0
        operand = weight.detach().to(x.dtype).requires_grad_()
        for begin in range(0, len(x), chunk):
            rows = x[begin : begin + chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of_rows(rows, operand, targets[begin : begin + chunk])
            dx[begin : begin + chunk], part = torch.autograd.grad(loss, (rows, operand))
            d_weight += part
            total = total + loss.detach()
        ctx.save_for_backward(dx, d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, scale):
        dx, d_weight = ctx.saved_tensors
        return dx.mul_(scale), d_weight.mul_(scale), None, None, None


def keep_attention(ctx, op, *args, **kwargs):
    from torch.utils.checkpoint import CheckpointPolicy

    keep = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def make_step(case):
    config, sequences, device = Config(**case["model"]), case["sequences"], torch.device(case["device"])
    lengths = [config.context] * sequences
    tokens, targets = torch.randint(config.vocab, (2, sequences * config.context), device=device)
    positions = torch.arange(config.context, device=device).repeat(sequences)
    with device if device.type == "cuda" else nullcontext():
        model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if case["parameters"] == "bf16":
        model = model.bfloat16()
    fused = {"fused": True} if HAS_FUSED_ATTENTION else {"foreach": True}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), **fused)
    compiled = lambda part, function: torch.compile(function) if case["compile"] == part else function
    autocast = case["precision"] == "bf16" and case["parameters"] == "fp32"

    def run_block(block, x):
        return block.post_attention(x, packed_attention(block.pre_attention(x), lengths, config.heads))

    def loss_of_rows(x, weight, targets):
        return token_losses(F.linear(x, weight).float(), targets).sum()

    run_block, loss_of_rows = compiled("blocks", run_block), compiled("blocks", loss_of_rows)

    def checkpointed(block, x):
        from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

        return checkpoint(run_block, block, x, use_reentrant=False,
                          context_fn=partial(create_selective_checkpoint_contexts, keep_attention))

    def loss_of_batch():
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            x = model.wte(tokens) + model.wpe(positions)
            for block in model.h:
                x = checkpointed(block, x) if case["checkpoint"] else run_block(block, x)
            x, weight = model.ln_f(x), model.wte.weight if config.tied else model.lm_head.weight
            if case["head_chunk"]:
                x = x.to(torch.bfloat16) if case["precision"] == "bf16" else x
                loss = ChunkedHead.apply(x, weight, targets, case["head_chunk"], loss_of_rows)
            else:
                loss = loss_of_rows(x, weight, targets)
        return loss / len(tokens)

    loss_of_batch = compiled("model", loss_of_batch)

    def step():
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.item() < float("inf")
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def fastest_attention(case):
    """{backend: [seconds forward, backward] of one layer} of fused attentions on a GPU; the slower ones are turned
    off."""
    model, times = case["model"], {}
    switches = {"cudnn": torch.backends.cuda.enable_cudnn_sdp, "flash": torch.backends.cuda.enable_flash_sdp}
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    shape = (case["sequences"], model["heads"], model["context"], model["channels"] // model["heads"])
    q, k, v, d_out = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))

    def seconds(run):
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 5

    for name in switches:
        for other, switch in switches.items():
            switch(other == name)
        try:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            forward = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
            backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))
            times[name] = [forward, backward]
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
    best = min(times, key=lambda name: sum(times[name]))
    for name, switch in switches.items():
        switch(name == best)
    return times


def fastest_thread_count(step, candidates):
    """The first one where a step takes half a minute: long steps gain from every core."""

    def seconds(threads):
        torch.set_num_threads(threads)
        step()  # may compile, and fills caches
        return step()

    first, *others = candidates
    times = {first: seconds(first)}
    if times[first] < 30:
        times.update({threads: seconds(threads) for threads in others})
    return min(times, key=times.get)


def refuse_what_memory_cannot_hold(case):
    """Without fused attention every layer keeps scores and softmax, [S, NH, T, T], for the backward pass."""
    model = case["model"]
    bytes_needed = 2 * 4 * model["layers"] * model["heads"] * case["sequences"] * model["context"] ** 2
    bytes_free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not HAS_FUSED_ATTENTION and bytes_needed > bytes_free:
        sys.exit(f"attention scores of {bytes_needed >> 30} GiB do not fit into {bytes_free >> 30} GiB of free memory")


def main():
    case = {**DEFAULTS, **json.loads(sys.argv[1])}
    name = f"PyTorch {torch.__version__.split('+')[0]} {'compile' if case['compile'] else 'eager'}"
    if case["parameters"] == "bf16":
        name += ", bf16 parameters"
    about = {"name": name}
    if case["device"] == "cuda":
        about["attention_seconds"] = fastest_attention(case)
        step = make_step(case)
        step()
    else:
        refuse_what_memory_cannot_hold(case)
        cpus = len(os.sched_getaffinity(0))
        torch.set_num_threads(cpus)
        step = make_step(case)
        about["threads"] = fastest_thread_count(step, case["threads"] or sorted({cpus, max(1, cpus // 2)}, reverse=True))
        torch.set_num_threads(about["threads"])
    step()
    if case["device"] == "cuda":
        about["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == "__main__":
    main()
