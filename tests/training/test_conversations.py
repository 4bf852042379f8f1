"""Parsing and rendering, against what LLaVA's format says."""

import json
import pickle
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_tokens import SpatialTokensError
from spatial_tokens.training.conversations import (
    SYSTEM,
    BadSampleError,
    Sample,
    check_words,
    parse,
    read_records,
    render,
    special_tokens,
)


def turn(who, text):
    return {"from": who, "value": text}


GOOD = {"id": "a1", "image": "x/1.jpg", "conversations": [turn("human", "<image>\nWhat?"), turn("gpt", "A dog.")]}


def test_a_good_sample():
    assert parse(GOOD, 7) == Sample("a1", ("<image>\nWhat?", "A dog."), ("x/1.jpg",))
    text = {"conversations": [turn("human", "Hello"), turn("gpt", "Hi"), turn("human", "More"), turn("gpt", "No")]}
    assert parse(text, 7) == Sample("7", ("Hello", "Hi", "More", "No"))
    two = {"id": 3, "image": ["a.png", "b.png"], "conversations": [turn("user", "<image><image>"), turn("assistant", "Both")]}
    assert parse(two, 0) == Sample("3", ("<image><image>", "Both"), ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conversations": None}, "conversations must be a list"),
        ({"conversations": []}, "conversations must be a list"),
        ({"conversations": [turn("gpt", "x"), turn("human", "<image>")]}, "turn 0 is from 'gpt', expected the user"),
        ({"conversations": [turn("human", "<image>"), turn("human", "x")]}, "turn 1 is from 'human', expected the assistant"),
        ({"conversations": [turn("human", "<image>")]}, "no answer to learn"),
        ({"conversations": [turn("human", "<image>"), turn("gpt", 5)]}, "turn 1 must be"),
        ({"conversations": ["hello", "hi"]}, "turn 0 must be"),
        ({"conversations": [turn("human", "<image> <image>"), turn("gpt", "x")]}, "2 placeholders <image> for 1 images"),
        ({"conversations": [turn("human", "none"), turn("gpt", "x")]}, "0 placeholders <image> for 1 images"),
        ({"conversations": [turn("human", "?"), turn("gpt", "<image>")]}, "an answer holds <image>"),
        ({"image": 5}, "image must be a path"),
        ({"image": [""]}, "image must be a path"),
    ],
)
def test_a_bad_sample_is_named(change, said):
    with pytest.raises(BadSampleError, match=rf"sample 'a1': .*{said}"):
        parse({**GOOD, **change}, 0)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_anything_else_is_a_bad_sample(record):
    with pytest.raises(BadSampleError, match="sample "):
        parse(record, 4)


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(BadSampleError("a1", "broken")))
    assert (error.sample_id, error.why, str(error)) == ("a1", "broken", "sample 'a1': broken")


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, GOOD]))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\r\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == [GOOD, GOOD]
    (tmp_path / "u.jsonl").write_text("\ufeff" + json.dumps({"id": "a\u2028b\x85"}, ensure_ascii=False), encoding="utf-8")
    assert read_records(tmp_path / "u.jsonl") == [{"id": "a\u2028b\x85"}]
    for name, text, said in [("b.json", "[{]", "not valid JSON"), ("c.json", "{}", "a list of samples"), ("d.json", "[]", "a list"),
                             ("e.jsonl", "{}\n{", "not valid JSON")]:  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(SpatialTokensError, match=said):
            read_records(tmp_path / name)
    with pytest.raises(SpatialTokensError, match="cannot read"):
        read_records(tmp_path / "nothing.json")


class Processor:
    image_token = "<img>"

    class tokenizer:  # noqa: N801
        eos_token = "</s>"

    def __init__(self, template=None):
        self.template = template

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt=False):
        return self.template(messages, add_generation_prompt)


def told(sample, template, processor):
    rendered = render(sample, template, processor)
    return rendered.text, [rendered.text[start:end] for start, end in rendered.answers]


TWO = Sample("1", ("<image>\nWhat?", "A dog.", "Where?", "There."), ("1.jpg",))


def test_plain_is_the_image_and_the_caption():
    assert told(parse(GOOD, 0), "plain", Processor()) == ("<img>A dog.\n", ["A dog.\n"])


def test_vicuna_is_llavas():
    text = f"{SYSTEM} USER: <img>\nWhat? ASSISTANT: A dog.</s>USER: Where? ASSISTANT: There.</s>"
    assert told(TWO, "vicuna", Processor()) == (text, [" A dog.</s>", " There.</s>"])


def test_vicuna_brings_the_image_to_the_front():
    sample = Sample("1", ("What is\n<image>", "x"), ("1.jpg",))
    assert told(sample, "vicuna", Processor())[0].endswith("USER: <img>\nWhat is ASSISTANT: x</s>")


def test_vicuna_needs_an_end():
    class Endless(Processor):
        class tokenizer:  # noqa: N801
            eos_token = None

    with pytest.raises(SpatialTokensError, match="ends answers with the tokenizer's eos_token, and it has none"):
        render(TWO, "vicuna", Endless())


def added(content, special):
    return SimpleNamespace(content=content, special=special)


def test_special_tokens_of_any_tokenizer():
    class tokenizer:  # noqa: N801
        all_special_tokens = ("</s>", "", "[end]")
        added_tokens_decoder = {7: added("<|im_end|>", True), 8: added("<tool>", False), 9: added("</s", True)}  # noqa: RUF012

    special = special_tokens(SimpleNamespace(tokenizer=tokenizer, image_token="<img>", video_token="<video>", audio_token=None))
    for token in ("</s>", "[end]", "<|im_end|>", "</s", "<img>", "<video>"):
        for turns in ((f"a {token} b", "x"), ("a", f"{token}x")):
            with pytest.raises(BadSampleError, match=re.escape(f"holds the special token {token!r}; remove or rewrite it")):
                check_words(Sample("1", turns), special)
    for words in ("<image>", "a < b > c [en d] <tool>", "", "\n", "</ s>", "<|IM_END|>"):
        check_words(Sample("1", (words, words)), special)


def test_a_tokenizer_without_special_tokens():
    plain = SimpleNamespace(tokenizer=SimpleNamespace(all_special_tokens=[]))
    check_words(Sample("1", ("", "</s>")), special_tokens(plain))


def chat(messages, add_generation_prompt):
    out = ""
    for message in messages:
        words = "".join("<img>" if part["type"] == "image" else part["text"] for part in message["content"])
        out += f"[{message['role'][0]}]{words}[e]"
    return out + ("[a]" if add_generation_prompt else "")


def test_chat_is_the_models_own():
    assert told(TWO, "chat", Processor(chat)) == (
        "[u]<img>What?[e][a]A dog.[e][u]Where?[e][a]There.[e]",
        ["A dog.[e]", "There.[e]"],
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [(lambda messages, prompt: f"{len(messages)} messages", "no longer what it was"), (lambda messages, prompt: 1 / 0, "division")],
)
def test_a_chat_template_that_cannot(template, said):
    with pytest.raises(BadSampleError, match=f"sample '1': the chat template cannot render it: .*{said}"):
        render(TWO, "chat", Processor(template))
