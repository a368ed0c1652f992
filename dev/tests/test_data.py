"""The scripts of data/, on local files: what they write is read here by the format's own rules, and `tokenize` makes
the same shards of the same documents. tiktoken is replaced by a stand-in, and used itself where it is installed.
"""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
sys.path.insert(0, str(DATA))
import shards  # noqa: E402

SHAKESPEARE = "First Citizen:\nHear me.\n\nAll:\nSpeak, speak.\n\n\nFirst Citizen:\nResolved?\n"
SPEECHES = ["First Citizen:\nHear me.\n", "All:\nSpeak, speak.\n", "First Citizen:\nResolved?\n"]
STORIES = "One day.\nThe end.\n<|endoftext|>\n\nTwo cats.\n<|endoftext|>\nLast é.\n"
PAGES = [{"text": "A page.\n", "id": "x"}, {"text": "Another – page."}]

# A stand-in for tiktoken: of its 50256 tokens the first 256 are the bytes, the next is "he", and the others join two or
# three bytes that are not ASCII.
STAND_IN = """
from itertools import islice, product

HIGH = range(128, 256)
TOKENS = [bytes([byte]) for byte in range(256)] + [b"he"] + [bytes(pair) for pair in product(HIGH, repeat=2)]
TOKENS += [bytes(triple) for triple in islice(product(HIGH, repeat=3), 50256 - len(TOKENS))]


class Encoding:
    def encode_ordinary_batch(self, texts):
        merged = [text.encode().split(b"he") for text in texts]
        return [[id for part in parts for id in [256, *part]][1:] for parts in merged]

    def decode_single_token_bytes(self, id):
        return TOKENS[id]


def get_encoding(name):
    assert name == "gpt2"
    return Encoding()
"""


def run(script, *arguments, path=None):
    environment = dict(os.environ, PYTHONPATH=str(path) if path else "", http_proxy="", https_proxy="")
    command = [sys.executable, str(DATA / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def read_shard(path):
    contents = Path(path).read_bytes()
    magic, version, count = struct.unpack("<3i", contents[:12])
    assert (magic, version) == (20240520, 1)
    assert contents[12:1024] == bytes(1012)
    assert len(contents) == 1024 + 2 * count
    return list(struct.unpack(f"<{count}H", contents[1024:]))


def documents(directory, part="train", end_of_text=256):
    """The documents' ids, of all shards; each shard begins with end-of-text."""
    found = []
    for path in sorted(Path(directory).glob(f"{part}_*.bin")):
        ids = read_shard(path)
        assert ids[0] == end_of_text
        for id in ids:
            found.append([]) if id == end_of_text else found[-1].append(id)
    return found


def texts(directory, part="train"):
    return [bytes(ids).decode() for ids in documents(directory, part)]


@pytest.fixture
def fixtures(tmp_path):
    """A local file for each script, and the documents in it."""
    (tmp_path / "play.txt").write_text(SHAKESPEARE, encoding="utf-8")
    (tmp_path / "stories.txt").write_text(STORIES, encoding="utf-8")
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, PAGES)), encoding="utf-8")
    return {
        "tinyshakespeare.py": (tmp_path / "play.txt", SPEECHES),
        "tinystories.py": (tmp_path / "stories.txt", ["One day.\nThe end.", "Two cats.", "Last é."]),
        "fineweb.py": (tmp_path / "pages.jsonl", [page["text"] for page in PAGES]),
    }


def documented_commands():
    """The scripts that data/README.md tells people to run, with their options."""
    lines = re.findall(r"^python3 data/(\w+\.py)(.*)$", (DATA / "README.md").read_text(), re.MULTILINE)
    return [(script, options.split("#")[0].split()) for script, options in lines]


def test_readme_names_every_script():
    assert {script for script, _ in documented_commands()} == {"tinyshakespeare.py", "tinystories.py", "fineweb.py"}


@pytest.mark.parametrize("script, options", documented_commands())
def test_documented_command(script, options, fixtures, tmp_path):
    """As documented, but on a local file and with the built-in vocabulary."""
    source, expected = fixtures[script]
    if "--input" in options:
        options = [source if before == "--input" else option for before, option in zip([None, *options], options)]
    result = run(script, *options, "--input", source, "--encoder", "bytes", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert texts(tmp_path / "out")[: len(expected)] == expected


def test_documents_are_held_out_and_never_cut(fixtures, tmp_path):
    source, expected = fixtures["tinyshakespeare.py"]
    out = tmp_path / "out"
    arguments = ["--input", source, "--encoder", "bytes", "--output", out]
    assert run("tinyshakespeare.py", *arguments, "--holdout-every", 2, "--shard-tokens", 26).returncode == 0
    assert texts(out, "train") == [expected[0], expected[2]]
    assert texts(out, "val") == [expected[1]]
    assert [len(read_shard(path)) for path in sorted(out.glob("train_*.bin"))] == [25, 26]
    # A later run with larger shards leaves none of the earlier ones.
    assert run("tinyshakespeare.py", *arguments, "--holdout-every", 0).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["train_000.bin"]


def test_shards_equal_those_of_the_tokenize_command(fixtures, tmp_path):
    source, expected = fixtures["fineweb.py"]
    arguments = ["--input", source, "--encoder", "bytes", "--holdout-every", 2]
    result = run("fineweb.py", *arguments, "--output", tmp_path / "python")
    assert result.returncode == 0, result.stderr
    command = [ROOT / "train_gpt", "tokenize", source, "--output", tmp_path / "ours", "--holdout-every", "2"]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("train_000.bin", "val_000.bin"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_gpt2_shards_and_vocabulary_files(fixtures, tmp_path):
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "tiktoken.py").write_text(STAND_IN)
    source, expected = fixtures["tinystories.py"]
    result = run("tinystories.py", "--input", source, "--output", tmp_path / "out", path=tmp_path / "stand-in")
    assert result.returncode == 0, result.stderr
    assert documents(tmp_path / "out", end_of_text=50256)[0] == [*b"One day.\nT", 256, *b" end."]
    vocab = json.loads((tmp_path / "out" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(50257))
    assert (vocab["A"], vocab["Ġ"], vocab["he"], vocab["<|endoftext|>"]) == (65, 32, 256, 50256)
    # What the script wrote, our own encoder reads: the same shard from the same text.
    (tmp_path / "story.txt").write_text(expected[0])
    command = [ROOT / "train_gpt", "tokenize", tmp_path / "story.txt", "--output", tmp_path / "ours"]
    command += ["--tokenizer", "gpt2", "--tokenizer-dir", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    assert documents(tmp_path / "ours", end_of_text=50256) == documents(tmp_path / "out", end_of_text=50256)[:1]


def test_merges_are_recovered_from_the_tokens(tmp_path):
    merges = [("h", "e"), ("l", "l"), ("Ġ", "he"), ("he", "ll"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ã", "©")]
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b" he", b"hell", b"  ", b"    ", "é".encode()]
    shards.write_vocabulary(tokens, tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]


def test_failures_are_sentences(fixtures, tmp_path):
    source, _ = fixtures["tinyshakespeare.py"]
    out = ["--output", tmp_path / "out"]
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "tiktoken.py").write_text("raise ImportError")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    cases = [
        (run("tinyshakespeare.py", "--input", source, *out, path=tmp_path / "stand-in"), "pip install tiktoken"),
        (run("tinyshakespeare.py", "--input", tmp_path / "none.txt", "--encoder", "bytes", *out), "no file"),
        (run("tinyshakespeare.py", "--input", tmp_path / "empty.txt", "--encoder", "bytes", *out), "no text"),
        (run("fineweb.py", "--input", tmp_path / "bad.jsonl", "--encoder", "bytes", *out), "bad.jsonl, line 2"),
    ]
    for result, sentence in cases:
        assert result.returncode == 1 and sentence in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_download_keeps_nothing_half_fetched(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("text")
    target = tmp_path / "downloads" / "name.txt"
    shards.download(source.as_uri(), str(target))
    assert target.read_text() == "text"
    source.write_text("newer")
    shards.download(source.as_uri(), str(target))  # is there already
    assert target.read_text() == "text"
    with pytest.raises(SystemExit, match="--input FILE"):
        shards.download((tmp_path / "none.txt").as_uri(), str(tmp_path / "downloads" / "none.txt"))
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["name.txt"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), tmp_path / "pages.parquet")
    arguments = ["--input", tmp_path / "pages.parquet", "--encoder", "bytes"]
    result = run("fineweb.py", *arguments, "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert texts(tmp_path / "out") == ["one", "two"]


def test_tiktoken_itself(fixtures, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:
        pytest.skip(f"no vocabulary without a network: {error}")
    source, expected = fixtures["tinystories.py"]
    result = run("tinystories.py", "--input", source, "--output", tmp_path / "out", path=os.pathsep.join(sys.path))
    assert result.returncode == 0, result.stderr
    assert documents(tmp_path / "out", end_of_text=50256) == [encoding.encode_ordinary(text) for text in expected]


def test_unicode_table_is_what_the_script_prints():
    table = (ROOT / "llmc" / "data" / "unicode.h").read_text()
    printed = run("unicode_table.py").stdout
    version = re.compile(r"Unicode \S+,")
    if version.search(table).group() != version.search(printed).group():
        pytest.skip("this Python knows another version of Unicode")
    assert table == printed
