"""TinyStories (Eldan and Li 2023), the GPT-4 part: 2.7 million short stories, 2.2 GB; a document is a story."""

import shards

SOURCE = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
URLS = [SOURCE + "TinyStoriesV2-GPT4-valid.txt", SOURCE + "TinyStoriesV2-GPT4-train.txt"]


def documents(path):
    """Stories are separated by lines that read <|endoftext|>."""
    story = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip() == "<|endoftext|>":
                yield "".join(story).strip()
                story = []
            else:
                story.append(line)
    yield "".join(story).strip()


if __name__ == "__main__":
    shards.main("tinystories", __doc__, URLS, documents)
