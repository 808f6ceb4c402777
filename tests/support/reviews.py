"""Short texts of good and bad words, which a tiny model tells apart after a few steps."""

import json

GOOD = ["good", "fine", "great", "nice", "happy", "lovely", "bright", "warm"]
BAD = ["bad", "poor", "awful", "sad", "gray", "cold", "dull", "broken"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, "the", "a", "film", "day", "is", "so", "very"]


def write(path, rows):
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def reviews(labels=(0, 1), count=24):
    """Rows which a tiny model learns in a few steps: "bad", "good", "bad bad", "good good", ..."""
    sentences = [" ".join([("bad", "good")[i % 2]] * (1 + i // 2 % 3)) for i in range(count)]
    return [{"sentence": sentences[i], "label": labels[i % 2], "idx": i} for i in range(count)]
