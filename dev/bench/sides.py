"""The two sides of a comparison of whole training steps, each a process of its own that runs only in its turn: our
`train_gpt train` on a file of random tokens, and PyTorch (torch_worker.py)."""
import array
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def flops_per_token(model, length):
    """6 for each weight of a matrix product; causal attention counts half the square. gpt2:d12 at 1024: 798 MFLOP."""
    weights = 12 * model["layers"] * model["channels"] ** 2 + model["vocab"] * model["channels"]
    return 6 * weights + 6 * model["layers"] * model["channels"] * length


def padded(model, length):
    """The model as ours stores it: with a vocabulary of a multiple of 64."""
    return dict(model, context=length, vocab=-(-model["vocab"] // 64) * 64)


def write_random_tokens(path, vocab, count):
    header = array.array("i", [20240520, 1, count] + [0] * 253)
    numbers = random.Random(1)
    tokens = array.array("H", (numbers.randrange(vocab - 1) for _ in range(count)))
    path.write_bytes(header.tobytes() + tokens.tobytes())


class Ours:
    """`train_gpt train`, one chunk a step unless `flags` say otherwise; running from its start, then between `turn`'s
    start and end."""

    def __init__(self, binary, directory, model, sequences, length, flags=()):
        self.metrics, self.log = directory / "run" / "metrics.jsonl", directory / "log.txt"
        data = directory / "tokens.bin"
        write_random_tokens(data, model["vocab"], max(8, sequences) * length + 1)
        sizes = [f"--{name}={value}" for name, value in {**model, "context": length}.items()]
        command = [str(binary), "train", "--model=custom", *sizes, f"--data={data}", "--packing=contiguous"]
        command += ["--tokenizer=" + ("bytes" if model["vocab"] == 257 else "gpt2")]
        command += [f"--batch-tokens={sequences * length}", f"--chunk-tokens={sequences * length}"]
        command += ["--steps=1000000", "--lr=1e-4", "--clip=1", f"--run-dir={directory / 'run'}", *flags]
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def steps(self):
        """Seconds of every step so far."""
        if not self.metrics.exists():
            return []
        complete = self.metrics.read_text().rpartition("\n")[0]
        rows = [json.loads(line) for line in complete.splitlines()]
        return [row["ms"] / 1000 for row in rows if "ms" in row]

    def wait_for_steps(self, count):
        while len(self.steps()) < count:
            if self.process.poll() is not None:
                command = " ".join(self.process.args)
                raise RuntimeError(f"{command}\nended with {self.process.returncode}:\n{self.log.read_text()}")
            time.sleep(0.002)

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)

    def turn(self, count):
        """Seconds of `count` whole steps."""
        before = len(self.steps())
        self.process.send_signal(signal.SIGCONT)
        self.wait_for_steps(before + 1 + count)  # the first one was interrupted
        self.stop()
        return self.steps()[before + 1 : before + 1 + count]

    def close(self):
        self.process.kill()
        self.process.wait()


class Torch:
    """Raises RuntimeError with PyTorch's last line where it cannot."""

    def __init__(self, python, case):
        command = [python, str(Path(__file__).with_name("torch_worker.py")), json.dumps(case)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.about = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError((self.errors.read().strip().splitlines() or ["no message"])[-1])
        return json.loads(line)

    def turn(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.kill()
        self.process.wait()
