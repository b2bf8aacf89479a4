"""Seeded preference pairs that a tiny model learns at once: chosen answers in a to m, rejected in n to z."""

import json
import random


def _word(generator, letters, length):
    return "".join(generator.choice(letters) for _ in range(length))


def text_rows(count, seed=0, words=4):
    """Rows with prompt, chosen and rejected as strings."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        prompt = " ".join(_word(generator, "abcdefghijklmnopqrstuvwxyz", generator.randint(2, 7)) for _ in range(words))
        size = generator.randint(1, 2 * words)
        rows.append({
            "prompt": f"{i}: {prompt}?",
            "chosen": " " + " ".join(_word(generator, "abcdefghijklm", 4) for _ in range(size)),
            "rejected": " " + " ".join(_word(generator, "nopqrstuvwxyz", 4)
                                       for _ in range(generator.randint(1, 2 * words))),
        })
    return rows


def message_rows(count, seed=0, words=4):
    """The same rows as conversations, the prompt inside both lists."""
    rows = []
    for row in text_rows(count, seed, words):
        question = {"role": "user", "content": row["prompt"]}
        rows.append({
            name: [question, {"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")
        })
    return rows


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path):
    """The lines of a metrics file; a line that is still being written is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
