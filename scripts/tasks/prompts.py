"""Prompts of a few tokens, and how a language model goes on from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 5, 16, 24


class Prompts(NamedTuple):
    """The tokens of each prompt, and how many are to follow."""

    ids: list[list[int]]
    new_tokens: int


def prompts_of_rows(texts: Sequence[str], tokenizer: Any, positions: int) -> Prompts:
    """
    The first 16 tokens of five rows that are spread over a set, of those that have so many, or else of any.

    Args:
        texts: of the set, not all of them empty.
        tokenizer: of the model.
        positions: tokens that the model takes; if they are few, so are the tokens of a prompt, and those that follow.
    """
    new_tokens = min(NEW_TOKENS, positions // 2)
    most = min(PROMPT_TOKENS, positions - new_tokens)
    rows = [ids for ids in tokenizer([*texts], verbose=False)["input_ids"] if ids]
    long = [ids for ids in rows if len(ids) >= most] or rows
    count = min(PROMPTS, len(long))
    return Prompts([long[i * len(long) // count][:most] for i in range(count)], new_tokens)


def read_prompts(path: Path, tokenizer: Any, positions: int) -> Prompts:
    """
    The lines of a text file, but the empty ones.

    Args:
        path: of the file.
        tokenizer: of the model.
        positions: tokens that the model takes.

    Raises:
        ValueError: the file cannot be read or has no text, or a prompt and what follows are more than the model takes.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts {path} cannot be read: {error}. Give a text file with a prompt a line."
        ) from error
    if not lines:
        raise ValueError(f"--prompts {path} is empty: give a text file with a prompt a line.")
    prompts = Prompts(tokenizer(lines, verbose=False)["input_ids"], NEW_TOKENS)
    for line, ids in zip(lines, prompts.ids, strict=True):
        if len(ids) + NEW_TOKENS > positions:
            raise ValueError(
                f"--prompts {path}: {line[:40]!r} has {len(ids)} tokens, and {NEW_TOKENS} follow, but the model takes "
                f"{positions}: shorten it."
            )
    return prompts


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompts: Prompts) -> list[str]:
    """
    How a causal language model goes on from each prompt: greedily, by as many tokens, ends of texts left out.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        prompts: from [`prompts_of_rows`] or [`read_prompts`].
    """
    counts = {"min_new_tokens": prompts.new_tokens, "max_new_tokens": prompts.new_tokens}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    texts = []
    for ids in prompts.ids:
        given = torch.tensor([ids], device=model.device)
        tokens = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            **counts,
        )
        texts.append(tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True))
    return texts
