"""FineWeb (Penedo et al. 2024), the sample of 10 billion GPT-2 tokens: 15 Parquet files of 2 GB.

A document is a web page. --input takes Parquet files, which need the Python package pyarrow, and JSONL with a `text`
field.
"""

import json
import sys

import shards

SOURCE = "https://huggingface.co/datasets/HuggingFaceFW/fineweb/resolve/main/sample/10BT/"
URLS = [f"{SOURCE}{i:03d}_00000.parquet" for i in range(15)]


def documents(path):
    if path.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            sys.exit("Reading Parquet needs the Python package pyarrow: pip install pyarrow.")
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from (text.as_py() for text in batch.column(0))
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{path}, line {number}: expected a JSON object with the field \"text\" ({error!r}).")


if __name__ == "__main__":
    shards.main("fineweb", __doc__, URLS, documents)
