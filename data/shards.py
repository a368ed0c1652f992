"""What the scripts of this folder share: fetching a file, an encoder, and llm.c's token files, written from documents.

A token file has a header of 256 int32 (magic, version, number of tokens) and then the ids: uint16 here, since both
encoders have fewer than 65536. End-of-text precedes each document. See llmc/data/token_file.h, which reads them.
"""

import argparse
import array
import glob
import itertools
import json
import os
import sys
import urllib.request

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts in an int32


class ShardWriter:
    """Writes PREFIX000.bin, PREFIX001.bin ...; a shard ends before the document that would exceed it."""

    def __init__(self, prefix, shard_tokens):
        self.prefix, self.shard_tokens = prefix, min(shard_tokens, MAX_SHARD_TOKENS)
        self.paths, self.file, self.in_shard, self.tokens = [], None, 0, 0
        for path in glob.glob(glob.escape(prefix) + "[0-9][0-9][0-9]*.bin"):
            os.remove(path)  # of an earlier run, which may have had more of them

    def append(self, document):
        if self.file and self.in_shard + len(document) > self.shard_tokens:
            self.finish()
        if not self.file:
            self.paths.append(f"{self.prefix}{len(self.paths):03d}.bin")
            self.file = open(self.paths[-1], "wb")
            self.file.write(bytes(4 * HEADER_INTS))
            self.in_shard = 0
        self.file.write(little_endian(array.array("H", document)))
        self.in_shard += len(document)
        self.tokens += len(document)

    def finish(self):
        if not self.file:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)  # the header comes last: an interrupted shard has none
        self.file.write(little_endian(array.array("i", [MAGIC, VERSION, self.in_shard])))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None


def little_endian(numbers):
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


class ByteEncoder:
    """The vocabulary built into train_gpt: 256 bytes and end-of-text."""

    end_of_text = 256

    def encode(self, texts):
        return [list(text.encode()) for text in texts]

    def write_vocabulary(self, directory):
        pass


class Gpt2Encoder:
    """GPT-2's byte pairs, by tiktoken, which fetches the vocabulary when it is used for the first time."""

    end_of_text = 50256

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            sys.exit("The GPT-2 encoder needs tiktoken: pip install tiktoken; or use --encoder bytes.")
        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken raises whatever its download raises
            sys.exit(f"tiktoken cannot get GPT-2's vocabulary ({error}); try with a network, or use --encoder bytes.")

    def encode(self, texts):
        return self.encoding.encode_ordinary_batch(texts)

    def write_vocabulary(self, directory):
        tokens = [self.encoding.decode_single_token_bytes(i) for i in range(self.end_of_text)]
        write_vocabulary(tokens, directory)


def write_vocabulary(tokens, directory):
    """Writes Hugging Face's vocab.json and merges.txt from the tokens in the order of their ids; end-of-text is added.

    `train_gpt generate` and `tokenize` read the two (--tokenizer-dir).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token):
        return "".join(spelling[byte] for byte in token)

    def merge_of(token):
        """The two tokens that the earlier merges leave of this one."""
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(tokens)) for a, b in itertools.pairwise(parts)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[first] < ranks[token], f"no earlier merges lead to the token {token}"
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        return parts

    with open(os.path.join(directory, "vocab.json"), "w", encoding="utf-8") as file:
        json.dump({spell(token): i for i, token in enumerate(tokens)} | {"<|endoftext|>": len(tokens)}, file)
    with open(os.path.join(directory, "merges.txt"), "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n")
        for token in tokens:
            if len(token) > 1:
                file.write(" ".join(map(spell, merge_of(token))) + "\n")


def download(url, path):
    """Fetches url to path unless it is there; an interrupted download leaves nothing under that name."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    print(f"fetching {url}", flush=True)
    try:
        with urllib.request.urlopen(url) as source, open(path + ".partial", "wb") as file:
            while block := source.read(1 << 20):
                file.write(block)
    except OSError as error:
        sys.exit(f"Cannot fetch {url}: {error}. Fetch it by other means and name it with --input FILE.")
    os.replace(path + ".partial", path)


def write_shards(documents, encoder, directory, shard_tokens, holdout_every):
    """Encodes the texts in order; every holdout_every-th document goes to val_*.bin, the others to train_*.bin."""
    os.makedirs(directory, exist_ok=True)
    train = ShardWriter(os.path.join(directory, "train_"), shard_tokens)
    held_out = ShardWriter(os.path.join(directory, "val_"), shard_tokens)
    documents = (text for text in documents if text)
    count = 0
    while texts := list(itertools.islice(documents, 1024)):
        for ids in encoder.encode(texts):
            count += 1
            writer = held_out if holdout_every and count % holdout_every == 0 else train
            writer.append([encoder.end_of_text, *ids])
        print(f"\r{count} documents, {train.tokens + held_out.tokens} tokens", end="", flush=True)
    print()
    if not count:
        sys.exit("The input holds no text.")
    for writer in (train, held_out):
        writer.finish()
        for path in writer.paths:
            print(path)
    encoder.write_vocabulary(directory)


def main(name, description, urls, documents):
    """The command line of a script: documents(path) yields the texts of one file of the data set."""
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--input", metavar="FILE", action="append", help="read this file and fetch nothing; repeatable")
    add("--output", metavar="DIR", default=os.path.join(here, name), help=f"default: data/{name}")
    add("--encoder", choices=("gpt2", "bytes"), default="gpt2")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens a file")
    add("--holdout-every", type=int, default=20, metavar="N", help="each N-th document is for validation, 0 = none")
    add("--files", type=int, default=len(urls), metavar="N", help=f"fetch only the first N of {len(urls)} files")
    options = parser.parse_args()
    encoder = Gpt2Encoder() if options.encoder == "gpt2" else ByteEncoder()

    def texts():
        for path in options.input or []:
            if not os.path.isfile(path):
                sys.exit(f"There is no file {path}; correct --input.")
            yield from documents(path)
        for url in [] if options.input else urls[: options.files]:
            path = os.path.join(here, "downloads", name, url.rsplit("/", 1)[1])
            download(url, path)
            yield from documents(path)

    write_shards(texts(), encoder, options.output, options.shard_tokens, options.holdout_every)
