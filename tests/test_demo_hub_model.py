"""`spatial-tokens demo --model`: the same prompt without and with spatial tokens."""

import json

import pytest

from spatial_tokens.cli import main

pytest.importorskip("transformers")


def run(capsys, *arguments, code=0):
    assert main(["demo", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_figures(capsys):
    report = json.loads(run(capsys, "--model", "tiny", "--prompt", "What?", "--json").out)
    without, having = report["runs"]
    assert (without["image_tokens"], having["image_tokens"]) == (576, 576)
    assert (without["spatial_tokens"], having["spatial_tokens"]) == (0, 6)
    assert having["sequence"] == without["sequence"] + 6 == 576 + len(" What?") + 6
    assert report["positions"] == list(range(6))
    assert 0 < report["logits_change"] < 10
    assert all(each["tokens_per_second"] > 0 for each in report["runs"])


def test_table(capsys):
    printed = run(capsys, "--model", "tiny", "--preset", "llava-sp-pooling").out
    assert "at positions 0, 1, 2, 3, 4, 5" in printed
    assert "without" in printed
    assert "with" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "tiny", "--preset", "nothing"), "unknown preset"),
        (("no-such-picture.png", "--model", "tiny"), "cannot read the picture"),
        (
            ("--model", "tiny", "--prompt", "<image> What?"),
            "the prompt must not contain the special token '<image>', got '<image> What?'",
        ),
        (("--model", "tiny", "--prompt", "a<|spatial|>"), "the prompt must not contain the special token '<|spatial|>'"),
        (("--model", "tiny", "--seed", 2**64), "seed must be an integer"),
        (("--model", "./no-such-folder"), "cannot load the model"),
    ],
)
def test_mistakes(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = run(capsys, *arguments, code=2)
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
