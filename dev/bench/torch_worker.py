"""The PyTorch side of dev/bench/cpu_vs_torch: whole training steps of dev/reference/gpt.py, timed on demand.

The only argument is the case as JSON. Prints one JSON object when warm; then, for each line `N` on standard input, runs
N steps and prints their seconds as a list. Ends with its input.
"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))
import torch  # noqa: E402
from gpt import GPT, HAS_FUSED_ATTENTION, Config, parameter_groups, token_losses  # noqa: E402


def make_step(case):
    config, sequences = Config(**case["model"]), case["sequences"]
    lengths = [config.context] * sequences
    tokens, targets = torch.randint(config.vocab, (2, sequences * config.context))
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    fused = {"fused": True} if HAS_FUSED_ATTENTION else {"foreach": True}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), **fused)

    def loss_of_batch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["precision"] == "bf16"):
            logits = model(tokens, lengths)
        return token_losses(logits.float(), targets).sum() / len(tokens)

    loss_function = torch.compile(loss_of_batch) if case["compile"] else loss_of_batch

    def step():
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert loss.item() < float("inf")
        return time.perf_counter() - start

    return step


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


def main():
    case = json.loads(sys.argv[1])
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(cpus)
    step = make_step(case)
    threads = fastest_thread_count(step, case["threads"] or sorted({cpus, max(1, cpus // 2)}, reverse=True))
    torch.set_num_threads(threads)
    step()
    name = f"PyTorch {torch.__version__.split('+')[0]} {'compile' if case['compile'] else 'eager'}"
    print(json.dumps({"name": name, "threads": threads}), flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == "__main__":
    main()
