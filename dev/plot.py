#!/usr/bin/env python3
"""Draws the loss curves of one or more runs: dev/plot.py runs/demo [RUN ...] [--output loss.png]

A RUN is a run directory or a metrics.jsonl. Training loss is a line, validation loss are points of the same colour.

Or how fast schedules are planned to be: dev/plot.py --plans context|ranks|chunks PLAN.json [PLAN.json ...] [--output plans.png]

A PLAN.json is what `train_gpt plan --cluster NAME --json` prints. Each schedule is a curve over sequence length, ranks or chunks,
in the fastest of its forms that fits; where none fits the curve has a gap.
"""
import argparse
import json
import math
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_metrics(run):
    """Returns {key: ([steps], [values])} of the values that are known and finite."""
    path = os.path.join(run, "metrics.jsonl") if os.path.isdir(run) else run
    curves = {}
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                print(f"{path}:{number} is not JSON, left out (a step being written?)", file=sys.stderr)
                continue
            for key, value in record.items():
                if key != "step" and value is not None and math.isfinite(value):
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return curves


def smooth(values, weight):
    """Exponential moving average without the bias towards its start."""
    mean, total, smoothed = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append(mean / total)
    return smoothed


def draw(runs, output, smoothing):
    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    for index, run in enumerate(runs):
        colour, name = f"C{index}", os.path.normpath(run)
        curves = read_metrics(run)
        if "loss" in curves:
            steps, values = curves["loss"]
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth(values, smoothing), color=colour, label=f"{name}: training")
        if "val_loss" in curves:
            axes.plot(*curves["val_loss"], "o--", color=colour, markersize=5, linewidth=1, label=f"{name}: validation")
        if "loss" not in curves and "val_loss" not in curves:
            sys.exit(f"{run} has no loss to draw")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output)


def read_plans(paths, over):
    """Returns {schedule: {value of `over`: tokens a second}} of the fastest form that fits, and a title."""
    curves, titles = {}, set()
    for path in paths:
        with open(path) as file:
            try:
                comparison = json.load(file)
                plans, value = comparison["plans"], comparison[over]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                sys.exit(f"plot.py: {path} is no comparison of plans ({error!r}); `train_gpt plan --cluster NAME --json` prints one")
        fixed = {"cluster": "", "layers": " layers", "channels": " channels", "ranks": " ranks", "chunks": " chunks", "context": " tokens"}
        titles.add(", ".join(f"{comparison[key]}{unit}" for key, unit in fixed.items() if key != over and key in comparison))
        for plan in plans:
            name = plan["schedule"].split(",")[0] + (", as published" if "as published" in plan["schedule"] else "")
            curve = curves.setdefault(name, {})
            curve.setdefault(value, math.nan)
            if plan["fits"] and not plan["tokens_per_second"] <= curve[value]:
                curve[value] = plan["tokens_per_second"]
    if len(titles) > 1:
        sys.exit("plot.py: the plans differ in more than their " + over + ": " + "; ".join(sorted(titles)))
    return curves, titles.pop()


def draw_plans(paths, over, output):
    curves, title = read_plans(paths, over)
    figure, axes = plt.subplots(figsize=(9, 5), dpi=120)
    fastest = {name: max((v for v in curve.values() if not math.isnan(v)), default=0) for name, curve in curves.items()}
    for name in sorted(curves, key=fastest.get, reverse=True):
        values = sorted(curves[name])
        width = 2.5 if name == "helix" else 1.2
        axes.plot(values, [curves[name][value] for value in values], "o-", linewidth=width, markersize=4, label=name)
    axes.set_xlabel({"context": "tokens of a sequence", "ranks": "pipeline ranks", "chunks": "chunks of a step"}[over])
    axes.set_ylabel("tokens a second, planned")
    axes.set_xticks(sorted({value for curve in curves.values() for value in curve}))
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--plans", choices=["context", "ranks", "chunks"], help="the files are plans, drawn over this")
    parser.add_argument("--output", help="PNG to write (default: loss.png or plans.png)")
    parser.add_argument("--smoothing", type=float, default=0.9, help="of the training loss, 0 to 1 (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.smoothing < 1:
        parser.error(f"--smoothing is {args.smoothing}, it must be at least 0 and below 1; use 0.9")
    args.output = args.output or ("plans.png" if args.plans else "loss.png")
    try:
        if args.plans:
            draw_plans(args.runs, args.plans, args.output)
        else:
            draw(args.runs, args.output, args.smoothing)
    except OSError as error:
        sys.exit(f"plot.py: {error}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
