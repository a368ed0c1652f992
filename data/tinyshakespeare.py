"""TinyShakespeare (Karpathy, char-rnn): 1.1 MB of plays; a document is what one person says at a time."""

import shards

URLS = ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"]


def documents(path):
    with open(path, encoding="utf-8") as file:
        yield from (speech.strip("\n") + "\n" for speech in file.read().split("\n\n") if speech.strip())


if __name__ == "__main__":
    shards.main("tinyshakespeare", __doc__, URLS, documents)
