"""scripts/tasks/prompts.py: which prompts, and what follows them."""

from pathlib import Path

import pytest
import torch
from tasks.prompts import Prompts, continued, prompts_of_rows, read_prompts
from tasks.tiny_tasks import model, tokenizer

TOKENIZER = tokenizer(ends=False)


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_rows_that_are_long_enough_are_spread_over_the_set() -> None:
    long = [f"alice sees {name} and the new film " * 4 for name in ("bob", "carol", "dave", "paris", "oslo", "rome")]
    texts = ["", "alice", *[text for row in long for text in (row, "bob left york")]]
    prompts = prompts_of_rows(texts, TOKENIZER, 1024)
    assert prompts == Prompts([ids(long[i])[:16] for i in range(5)], 24)
    few = prompts_of_rows(texts, TOKENIZER, 20)
    assert few.new_tokens == 10 and [len(prompt) for prompt in few.ids] == [10] * 5


def test_short_rows_are_taken_as_they_are() -> None:
    assert prompts_of_rows(["", "alice sees", "bob"], TOKENIZER, 1024).ids == [ids("alice sees"), ids("bob")]


def test_a_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("alice sees\n\nthe new film is\n", encoding="utf-8")
    assert read_prompts(file, TOKENIZER, 40) == Prompts([ids("alice sees"), ids("the new film is")], 24)
    with pytest.raises(ValueError, match="'the new film is' has 4 tokens, and 24 follow, but the model takes 27"):
        read_prompts(file, TOKENIZER, 27)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts.txt is empty: give a text file with a prompt a line"):
        read_prompts(file, TOKENIZER, 40)
    for bad in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read: .*Give a text file with a prompt a line"):
            read_prompts(bad, TOKENIZER, 40)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_each_token_is_the_most_likely_one_that_ends_no_text(kind: str) -> None:
    decoder, prompts = model(kind).eval(), Prompts([ids("alice sees"), ids("the new film is")], 6)
    for prompt, text in zip(prompts.ids, continued(decoder, TOKENIZER, prompts), strict=True):
        tokens = [*prompt]
        for _ in range(6):
            scores = decoder(torch.tensor([tokens])).logits[0, -1]
            scores[3] = -torch.inf  # the end of a text
            tokens.append(int(scores.argmax()))
        assert text == TOKENIZER.decode(tokens[len(prompt) :], skip_special_tokens=True)
