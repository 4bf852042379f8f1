"""Samples as tensors, on the tiny LLaVA's processor: 576 image tokens and six slots an image, letters as words."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.training.conversations import SYSTEM, BadSampleError
from spatial_tokens.training.dataset import Collator, ConversationDataset


@pytest.fixture(scope="module")
def processor():
    return attach(*tiny_llava(), spatial_hidden_size=8)[1]


def sample(name, image, *turns):
    images = {} if image is None else {"image": image}
    return {"id": name, **images, "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


GOOD = [
    sample("one", "1.png", "<image>\nWhat?", "A dog.", "Where?", "There."),
    sample("text", None, "Say hi", "hi"),
    sample("two", ["1.png", "2.png"], "<image> or <image>", "Both"),
]


@pytest.fixture
def make(tmp_path, processor):
    for i in (1, 2):
        Image.new("RGB", (40, 30), (i * 100, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.effect_noise((40, 30), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    def make(samples, **options):
        (tmp_path / "data.json").write_text(json.dumps(samples))
        if options.get("on_bad_sample") == "skip":
            options.setdefault("bad_samples_file", tmp_path / "out" / "bad.jsonl")
        return ConversationDataset(tmp_path / "data.json", tmp_path, processor, **options)

    return make


def learned(item, processor):
    return processor.tokenizer.decode(item["labels"][item["labels"] != -100]).replace(" ", "").replace("<unk>", "_")


def test_loss_is_on_the_answers_alone(make, processor):
    item = make(GOOD)[0]
    tokens = processor.tokenizer.convert_ids_to_tokens(item["input_ids"].tolist())
    assert tokens.count("<image>") == 576
    assert tokens.count("<|spatial|>") == 6
    start = tokens.index("<|spatial|>")
    assert tokens[start : start + 582] == ["<|spatial|>"] * 6 + ["<image>"] * 576
    assert "".join(tokens[:start]) == f"{SYSTEM} USER: "
    assert learned(item, processor) == "Adog.</s>There.</s>"
    shown = item["labels"] != -100
    assert torch.equal(item["labels"][shown], item["input_ids"][shown])
    assert not shown[: start + 582].any()
    assert item["pixel_values"].shape == (1, 3, 336, 336)


def test_text_alone_has_no_image(make, processor):
    item = make(GOOD)[1]
    assert "pixel_values" not in item
    assert learned(item, processor) == "hi</s>"


def test_two_images(make, processor):
    item = make(GOOD)[2]
    assert (item["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|spatial|>")).sum() == 12
    assert item["pixel_values"].shape == (2, 3, 336, 336)
    assert learned(item, processor) == "Both</s>"


def test_plain(make, processor):
    item = make(GOOD, template="plain")[0]
    tokens = processor.tokenizer.convert_ids_to_tokens(item["input_ids"].tolist())
    assert len(tokens) == 582 + len("A dog.\nThere.\n")
    assert learned(item, processor).startswith("Adog.")
    assert (item["labels"] != -100).sum() == len("A dog.\nThere.\n")


def test_a_batch_of_images_and_text(make, processor):
    data = make(GOOD)
    items = [data[i] for i in range(3)]
    batch = Collator(processor.tokenizer.pad_token_id)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    assert batch["pixel_values"].shape[0] == 3
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
    assert "pixel_values" not in Collator(0)([items[1], items[1]])


def test_lengths_need_no_image(make):
    data = make(GOOD)
    assert data.lengths == [576 + 1 + 2 + 1 + 1, 2 + 1, 2 * 576 + 1 + 1]


def test_a_long_sample_is_cut_behind(make, processor):
    whole = make(GOOD)[0]
    length = int((whole["labels"] != -100).nonzero()[0]) + 3
    cut = make(GOOD, max_length=length)[0]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:length])
    with pytest.raises(SpatialTokensError, match="no answer is left"):
        make(GOOD, max_length=length - 3)[0]


BAD = [
    (sample("no file", "3.png", "<image>", "x"), "the image 3.png is not in"),
    (sample("more", "1.png", "<image><image>", "x"), "2 placeholders <image> for 1 images"),
    (sample("garbage", "broken.png", "<image>", "x"), "the image broken.png does not open"),
    (sample("truncated", "cut.png", "<image>", "x"), "the image cut.png does not open"),
    (sample("long", None, "q" * 3000, "x"), "no answer is left within max_length=2048 tokens"),
    (sample("many", ["1.png"] * 4, "<image>" * 4, "x"), "its images do not fit in max_length=2048 tokens"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_sample_stops_the_run_and_is_named(make, bad, said):
    with pytest.raises(SpatialTokensError, match=f"sample '{bad['id']}': .*{said}"):
        make([*GOOD, bad])[3]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_sample_is_left_out_and_counted(make, bad, said):
    data = make([GOOD[0], bad, GOOD[1]], on_bad_sample="skip")
    assert all(torch.equal(data[i]["input_ids"], make(GOOD)[0 if i == 0 else 1]["input_ids"]) for i in range(len(data)))
    ((index, error),) = data.bad_samples.items()
    assert (index, error.sample_id) == (1, bad["id"])
    assert said in error.why


def test_workers_tell_what_they_left_out(make):
    data = make([GOOD[0], *(bad for bad, _ in BAD), GOOD[1]], on_bad_sample="skip")
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2, collate_fn=Collator(0))
    assert sum(1 for _ in loader) == len(data) == 6
    assert {error.sample_id for error in data.bad_samples.values()} == {bad["id"] for bad, _ in BAD}


def test_equal_ids_are_told_apart(make):
    bad = {**BAD[0][0], "id": "same"}
    data = make([bad, GOOD[0], {**BAD[2][0], "id": "same"}, bad], on_bad_sample="skip")
    assert data[1] is not None
    assert sorted(data.bad_samples) == [0, 2, 3]


@pytest.mark.parametrize("text", ["<|spatial|> hi", "\ud83d"])
def test_text_that_no_processor_takes_is_a_bad_sample(make, text):
    with pytest.raises(BadSampleError, match="sample 'odd'"):
        make([sample("odd", None, text, "x")])[0]
    with pytest.raises(BadSampleError, match="sample 'odd'"):
        make([sample("odd", "1.png", f"<image>{text}", "x")])[0]


def test_16_bits_are_not_cut_off(make, processor, tmp_path):
    ramp = torch.arange(256, dtype=torch.int32).mul(257).repeat(256, 1)
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "16.png")
    Image.fromarray((ramp // 257).numpy().astype("uint8")).save(tmp_path / "8.png")
    pixels = [make([sample("x", name, "<image>", "y")])[0]["pixel_values"] for name in ("16.png", "8.png")]
    torch.testing.assert_close(pixels[0], pixels[1], atol=0.03, rtol=0)


def test_all_bad(make):
    with pytest.raises(SpatialTokensError, match="no good sample: sample 'no file'"):
        make([BAD[0][0]], on_bad_sample="skip")
    with pytest.raises(SpatialTokensError, match="no sample is good"):
        make([BAD[2][0], BAD[3][0]], on_bad_sample="skip")[0]


def test_many_bad_ones_are_not_all_listed(make):
    many = [sample(f"s{i}", "gone.png", "<image>", "x") for i in range(30)]
    with pytest.raises(SpatialTokensError, match=r"has 30 bad samples.*'s9'.*and 20 more") as caught:
        make(many)
    assert "'s10'" not in str(caught.value)


def test_options_are_checked(make):
    with pytest.raises(SpatialTokensError, match="on_bad_sample must be"):
        make(GOOD, on_bad_sample="ignore")
    with pytest.raises(SpatialTokensError, match="template must be"):
        make(GOOD, template="llama")
    with pytest.raises(SpatialTokensError, match="needs a bad_samples_file"):
        make(GOOD, on_bad_sample="skip", bad_samples_file=None)


def test_a_processor_with_words_of_its_own_is_refused(make, processor):
    data = make(GOOD)

    class Chatty:
        tokenizer, image_token = processor.tokenizer, processor.image_token

        def __call__(self, *, text, **options):
            return processor(text=[f"Look. {text[0]}"], **options)

    data.processor = Chatty()
    with pytest.raises(SpatialTokensError, match="Chatty changes the words around images"):
        data[0]


def test_bad_sample_is_an_error_of_ours():
    assert issubclass(BadSampleError, SpatialTokensError)
