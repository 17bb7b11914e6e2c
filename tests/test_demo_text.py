"""The demo: text that is the same everywhere and keeps its own facts, and a model that loads."""

import hashlib
import re
import subprocess
import sys
from itertools import islice

import pytest

from llmprune.demo import MODEL_DIR
from llmprune.demo.text import SPLITS, documents, text
from llmprune.demo.words import TOWNS, number

GOLDEN = {
    "train": "c82211692cf786a8ea20158ad6f94bebda07ef70d391604312121b2a125a4029",
    "calibration": "4a93de3c511bf2900120a82b654f5724e192bb9a441beec039edf34e5708e172",
    "test": "990eb45ade187f1741833284f8efe2b65d5de5eebfa0ee5fb6dc6c7e58fcb4a1",
}
NUMBERS = {number(n): n for n in range(100)}
NUMBER = "|".join(sorted(NUMBERS, key=len, reverse=True))


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return [story for split in SPLITS for story in islice(documents(split, seed=5), 300)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_text_never_changes(split: str) -> None:
    start = text(split, 10_000)
    assert len(start) == 10_000
    assert hashlib.sha256(start.encode()).hexdigest() == GOLDEN[split]


def test_a_longer_text_starts_like_a_shorter_one() -> None:
    assert text("test", 9_000, seed=3).startswith(text("test", 5_000, seed=3))


def test_no_story_is_in_two_splits_or_under_two_seeds() -> None:
    seen = [
        story
        for split in SPLITS
        for seed in range(3)
        for story in islice(documents(split, seed), 200)
    ]
    assert len(set(seen)) == len(seen)


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'valid'; known: train, calibration, test"):
        documents("valid")
    with pytest.raises(ValueError, match="-1"):
        text("test", 10, seed=-1)


# Gifts as a reader sees them: the receiver under one letter, the thing under that letter twice.
GIFT = re.compile(
    r"where (?P<a>\w+) was, and gave (?:her|him) (?P<aa>the \w+ \w+)"
    r"|found (?P<b>\w+) at the \w+ and handed (?:her|him) (?P<bb>the \w+ \w+)"
    r"|because (?P<c>\w+) was there, and let (?:her|him) have (?P<cc>the \w+ \w+)"
    r"|gave (?P<dd>the \w+ \w+) to (?P<d>\w+), who"
    r"|At the \w+, \w+ handed (?P<e>\w+) (?P<ee>the \w+ \w+)"
)
HIDDEN = re.compile(
    r"(?:hid|put) (the \w+ \w+) ((?:under|behind|inside|beneath) the \w+ at the \w+)"
)
TAKEN = re.compile(r"(?:took|he found) (the \w+ \w+)\.")


def test_things_are_in_the_end_where_they_were_left(stories: list[str]) -> None:
    """Read each story sentence by sentence, knowing nothing of how it was made."""
    given = hidden = 0
    for story in stories:
        last: dict[str, str] = {}
        for sentence in re.findall(r"[^.]+\.", story):
            if found := GIFT.search(sentence):
                thing, receiver = sorted((v for v in found.groupdict().values() if v), key=len)[
                    ::-1
                ]
                last[thing] = receiver
            elif found := HIDDEN.search(sentence):
                last[found[1]] = found[2]
            elif found := TAKEN.search(sentence):
                last.pop(found[1])
            elif found := re.search(r"In the end (the \w+ \w+) was with (\w+)\.", sentence):
                if found[1] in last:
                    assert last[found[1]] == found[2], story
                    given += 1
            elif found := re.search(r"In the end (the \w+ \w+) lay (.+)\.", sentence):
                assert last[found[1]] == found[2], story
                hidden += 1
    assert given > 100
    assert hidden > 100


def test_sums_come_out(stories: list[str]) -> None:
    checked = 0
    for story in stories:
        for old, n, total in re.findall(
            rf"had ({NUMBER}) \w+, got ({NUMBER}) more, and so had ({NUMBER})", story
        ):
            assert NUMBERS[old] + NUMBERS[n] == NUMBERS[total], story
            checked += 1
        for n, price, cost in re.findall(
            rf"sold \w+ ({NUMBER}) [\w ]+ at ({NUMBER}) crowns each, ({NUMBER}) in all", story
        ):
            assert NUMBERS[n] * NUMBERS[price] == NUMBERS[cost], story
            checked += 1
    assert checked > 100


def test_pronouns_agree(stories: list[str]) -> None:
    for story in stories:
        women = set(re.findall(r"named (\w+), and her house", story))
        men = set(re.findall(r"named (\w+), and his house", story))
        for name in women:
            assert not re.search(rf"\b{name} counted his|wondered where {name} was; he", story)
        for name in men:
            assert not re.search(rf"\b{name} counted her|wondered where {name} was; she", story)
        assert not re.search(r"\b(with|to|from|of) (she|he)\b", story)


def test_a_town_keeps_its_facts(stories: list[str]) -> None:
    rivers: dict[str, set[str]] = {}
    for story in stories:
        for river, town in re.findall(r"The river (\w+) runs through (\w+)", story):
            rivers.setdefault(town, set()).add(river)
    assert len(rivers) > len(TOWNS) // 2
    assert all(len(names) == 1 for names in rivers.values())


def test_importing_the_demo_is_light() -> None:
    code = (
        "import sys, llmprune.demo, llmprune.demo.text;"
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_the_model_is_small_and_complete() -> None:
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in MODEL_DIR.iterdir()} == names
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 5_000_000


def test_the_model_loads_and_knows_its_world() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.bfloat16
    story = text("test", 5_000)
    assert tokenizer.decode(tokenizer(story)["input_ids"]) == story
    ids = torch.tensor([tokenizer(story)["input_ids"][:256]])
    with torch.inference_mode():
        loss = model.float()(input_ids=ids, labels=ids).loss
    assert loss < 1.5  # 7.2 for a model that knows nothing
