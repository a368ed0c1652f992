#!/usr/bin/env python3
"""Shows that the tests of the CUDA kernels find what they must: makes mutants of a kernel file, each with one barrier
deleted or one bound check undone, and runs the cases of kernel_cases on the host in every order. Takes minutes a file.

    mutate_kernels.py FILE...    e.g. llmc/kernels/copy.cuh; prints survivors and ends with 1 if there are any

CXX names the compiler."""
import argparse
import os
import re
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CXX = shlex.split(os.environ.get("CXX", "g++")) + ["-std=c++20", "-w"]
COMMON = "-march=x86-64-v3 -fopenmp -ffp-contract=fast -fno-math-errno -O1".split()
HOST = [*COMMON, "-DPRECISION_FP64"]
CUDA_ON_HOST = [*COMMON, *("-fsanitize=address,undefined -fno-sanitize-recover=all -DUSE_CUDA "
                           "-Idev/tests/cuda_on_host").split()]
ORDERS = ["ascending", "descending", "random:1", "random:2", "random:3"]
# The cases of dev/tests/kernel_cases/ that run a file, where its name is not theirs.
OPS = {"copy": "copy_reduce", "reduce": "copy_reduce", "cuda": "copy_reduce", "attention_fp32": "attention",
       "attention_mma": "attention"}


def without_comments(text):
    """The text with as many blanks in place of comments and strings, so that places stay what they are."""
    return re.sub(r'//[^\n]*|"(?:\\.|[^"\\\n])*"', lambda m: " " * len(m[0]), text)


def closing(text, begin):
    """The place of the bracket that closes the one at `begin`."""
    pairs, depth = {"(": ")", "{": "}", "[": "]"}, 0
    for i in range(begin, len(text)):
        depth += (text[i] in pairs) - (text[i] in pairs.values())
        if depth == 0:
            return i
    raise ValueError(f"no bracket closes that at {begin}")


def device_code(text):
    """Ranges of the bodies of __global__ and __device__ functions."""
    end = 0
    for match in re.finditer(r"__(global|device)__", text):
        body = text.find("{", match.end())
        declaration = text.find(";", match.end())
        if match.start() >= end and 0 <= body and not 0 <= declaration < body:
            end = closing(text, body)
            yield body, end


def operand_range(text, begin, end):
    """The comparison around the operator at text[begin:end], up to what binds less."""
    stops = re.compile(r"&&|\|\||[,;?{}]|(?<![=<>!])=(?!=)|\breturn\b|:")
    depth, left = 0, begin
    while left > 0:
        c = text[left - 1]
        depth += (c in ")]") - (c in "([")
        if depth < 0 or (depth == 0 and (stops.match(text[left - 1]) or text[left - 2:left] in ("&&", "||")
                                         or text[:left].endswith("return"))):
            break
        left -= 1
    depth, right = 0, end
    while right < len(text):
        c = text[right]
        depth += (c in "([") - (c in ")]")
        if depth < 0 or (depth == 0 and (stops.match(text[right]) or text[right:right + 2] in ("&&", "||"))):
            break
        right += 1
    return left, right


def mutants(source):
    """(line, what is done, text of the mutant)"""
    code = without_comments(source)
    code = code.replace("::", "@@")  # no colon that ends an expression
    for begin, end in device_code(code):
        changes = [(m.start(), m.end(), ";", "deleted")
                   for m in re.compile(r"(__sync(threads|warp)\(\)|cp_async_wait<[^;]*>\(\));").finditer(code, begin, end)]
        for match in re.compile(r" (<|<=|>|>=) ").finditer(code, begin, end):
            line = code[code.rfind("\n", 0, match.start()) + 1:match.start()]
            if re.search(r"static_assert|if constexpr|\bconstexpr\b|^\s*#", line):
                continue  # decided when compiled
            loop = code.rfind("for (", begin, match.start())
            if loop >= 0 and closing(code, loop + 4) > match.start() and \
                    code.count(";", loop, match.start()) == 1 and match[1] == "<":
                left, right = operand_range(code, match.start(1), match.end(1))
                if re.search("[a-z]", code[match.end():right]):  # others end where the compiler knows
                    text = source[left:match.start(1)] + "<=" + source[match.end(1):right]
                    changes.append((left, right, text, "runs one step more"))
            else:
                left, right = operand_range(code, match.start(1), match.end(1))
                value = "true" if match[1][0] == "<" else "false"
                changes.append((left, right, f" {value} ", f"is {value}"))
        for left, right, text, what in changes:
            line = source.count("\n", 0, left) + 1
            yield line, f"{source[left:right].strip()} {what}", source[:left] + text + source[right:]


def build(program, op, *flags):
    done = subprocess.run([*CXX, f"-DONE_OP={op}", *flags, "-I.", "dev/tests/kernel_cases.cpp", "-o",
                           program, *(["-lboost_context"] if "-DUSE_CUDA" in flags else [])],
                          cwd=ROOT, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def verdict(directory, file, text, op, reference):
    """How the cases find the mutant; None if they do not."""
    mutant = Path(directory) / file
    mutant.parent.mkdir(parents=True)
    mutant.write_text(text)
    program, outputs = Path(directory) / "kernel_cases", Path(directory) / "outputs"
    for precision in ("BF16", "FP32"):
        if error := build(program, op, f"-I{directory}", *CUDA_ON_HOST, f"-DPRECISION_{precision}"):
            raise RuntimeError(f"the mutant of {file} does not compile: {error}")
        for order in ORDERS:
            try:
                done = subprocess.run([program, outputs], env=os.environ | {"CUDA_ON_HOST_ORDER": order}, timeout=600,
                                      capture_output=True, text=True, errors="replace")
            except subprocess.TimeoutExpired:
                return f"{precision} {order}: does not end"
            if done.returncode:
                lines = [line for line in done.stderr.splitlines()
                         if re.search("cuda_on_host|ERROR|runtime error|kernel_cases:", line)]
                return f"{precision} {order}: " + (lines[0][:100] if lines else f"ends with {done.returncode}")
            done = subprocess.run([program, "compare", reference, outputs], capture_output=True, text=True)
            if done.returncode:
                wrong = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
                return f"{precision} {order}: " + " ".join(wrong[0].split())[:100]
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--op", help="the cases to run, where they do not follow from the name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    survivors = total = 0
    for path in options.files:
        file = path.resolve().relative_to(ROOT)
        op = options.op or OPS.get(file.stem, file.stem)
        source = (ROOT / file).read_text()
        with tempfile.TemporaryDirectory() as scratch:
            reference = Path(scratch) / "reference"
            if error := build(Path(scratch) / "host", op, *HOST):
                raise SystemExit(error)
            subprocess.run([Path(scratch) / "host", reference], check=True)
            if found := verdict(f"{scratch}/original", file, source, op, reference):
                raise SystemExit(f"{file} as it is fails: {found}")

            def judge(mutant):
                line, what, text = mutant
                with tempfile.TemporaryDirectory(dir=scratch) as directory:
                    found = verdict(directory, file, text, op, reference)
                print(f"{'found   ' if found else 'SURVIVES'}  {file}:{line}: {what}  [{found}]", flush=True)
                return found is None

            with ThreadPoolExecutor(options.jobs) as pool:
                results = list(pool.map(judge, mutants(source)))
        survivors += sum(results)
        total += len(results)
    print(f"{total - survivors} of {total} mutants found, {survivors} survive")
    return survivors > 0


if __name__ == "__main__":
    raise SystemExit(main())
