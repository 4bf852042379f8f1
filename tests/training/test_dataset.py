"""Samples as tensors, on the tiny LLaVA's processor: 576 image tokens and six slots an image, letters as words."""

import copy
import json
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.errors import MissingExtraError
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
    Image.new("1", (100_000, 1)).save(tmp_path / "line.png")
    Image.effect_noise((40, 30), 50).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])

    def make(samples, **options):
        (tmp_path / "data.json").write_text(json.dumps(samples))
        if options.get("on_bad_sample") == "skip":
            options.setdefault("bad_samples_file", tmp_path / "out" / "bad.jsonl")
        return ConversationDataset(tmp_path / "data.json", tmp_path, options.pop("processor", processor), **options)

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


def test_a_token_that_is_half_in_an_answer_is_learned(make, processor):
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["NT: A"])
    assert learned(make(GOOD, processor=processor)[0], processor) == "NT:Adog.</s>There.</s>"


@pytest.mark.parametrize(("spare", "message"), [(0, "its images do not fit in max_length"), (1, "no answer is left within")])
def test_the_last_token_of_an_image_is_the_last_that_fits(make, spare, message):
    """Placeholders count too."""
    end = make(GOOD)[2]["input_ids"].tolist()
    last = len(end) - 1 - end[::-1].index(end[end.index(99)])
    with pytest.raises(SpatialTokensError, match=message):
        make(GOOD, max_length=last + spare)[2]


def test_bad_samples_of_two_files_in_one(make, tmp_path):
    file = tmp_path / "both.jsonl"
    file.write_text(json.dumps({"data": "another.json", "index": 2, "id": "x", "why": "something"}) + "\n")
    data = make([*GOOD, sample("bad", "none.png", "<image>", "a")], on_bad_sample="skip", bad_samples_file=file)
    assert list(data.bad_samples) == [3]


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


CHAT = """{% for turn in messages %}{{ 'U:' if turn.role == 'user' else 'A:' }}{% for part in turn.content -%}
{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{{ '</s>' if turn.role == 'assistant' }}{% endfor -%}
{{ 'A:' if add_generation_prompt }}"""
TURNS = ("<image>No<image>Yes", "No", "Yes<image>", "Yes", "No", "NoYes")  # answers that say what the prompt says
EXPECTED = {  # each piece of the text, and whether it is to be learned
    "plain": [("<image><image>", False), ("No\n", True), ("<image>", False), ("Yes\n", True), ("NoYes\n", True)],
    "vicuna": [
        (f"{SYSTEM} USER: <image>\n<image>\nNoYes ASSISTANT:", False), (" No</s>", True),
        ("USER: <image>\nYes ASSISTANT:", False), (" Yes</s>", True),
        ("USER: No ASSISTANT:", False), (" NoYes</s>", True),
    ],
    "chat": [
        ("U:<image>No<image>YesA:", False), ("No</s>", True), ("U:Yes<image>A:", False), ("Yes</s>", True),
        ("U:NoA:", False), ("NoYes</s>", True),
    ],
}  # fmt: skip


@pytest.mark.parametrize("template", EXPECTED)
def test_every_answer_and_nothing_else_is_learned(make, processor, monkeypatch, template):
    monkeypatch.setattr(processor, "chat_template", CHAT)
    item = make([sample("x", ["1.png", "2.png", "1.png"], *TURNS)], template=template, max_length=4096)[0]
    tokens, labels = [], []
    for text, is_learned in EXPECTED[template]:
        for word in re.findall("<image>|</s>|.", text, re.DOTALL):
            written = ["<|spatial|>"] * 6 + ["<image>"] * 576 if word == "<image>" else [word]
            tokens += written
            labels += [is_learned] * len(written)
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    assert item["input_ids"].tolist() == ids
    assert item["labels"].tolist() == [each if is_learned else -100 for each, is_learned in zip(ids, labels, strict=True)]
    assert item["pixel_values"].shape[0] == 3


def red(pixel_values):
    """The red of a picture of one color, out of what CLIP makes of it."""
    return [round(255 * (each[0].mean().item() * 0.26862954 + 0.48145466)) for each in pixel_values]


def test_a_batch_keeps_the_order_of_the_samples_and_of_their_images(make):
    data = make([GOOD[1], GOOD[2], sample("back", ["2.png", "1.png"], "<image><image>", "x"), GOOD[0]])
    batch = Collator(0)([data[i] for i in (3, 1, 0, 2)])
    assert red(batch["pixel_values"]) == [100, 100, 200, 200, 100]


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
    (sample("shape", "line.png", "<image>", "x"), "the image line.png does not open"),
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
    assert sum(1 for _ in loader) == len(data) == 7
    assert {error.sample_id for error in data.bad_samples.values()} == {bad["id"] for bad, _ in BAD}


def test_equal_ids_are_told_apart(make):
    bad = {**BAD[0][0], "id": "same"}
    data = make([bad, GOOD[0], {**BAD[2][0], "id": "same"}, bad], on_bad_sample="skip")
    assert data[1] is not None
    assert sorted(data.bad_samples) == [0, 2, 3]


def test_text_that_no_processor_takes_is_a_bad_sample(make):
    with pytest.raises(BadSampleError, match="sample 'odd'"):
        make([sample("odd", None, "\ud83d", "x")])[0]
    with pytest.raises(BadSampleError, match="sample 'odd'"):
        make([sample("odd", "1.png", "<image>\ud83d", "x")])[0]


@pytest.mark.parametrize("token", ["</s>", "<pad>", "<s>", "<unk>", "<|spatial|>"])
def test_a_special_token_in_the_words_is_a_bad_sample(make, token):
    for number, turns in enumerate([(f"<image>a{token}b", "x"), ("<image>", f"{token}x"), (f"{token[:2]}<image>{token[2:]}", "x")]):
        said = re.escape(
            f"1 bad samples (on_bad_sample='skip' leaves them out): sample 'odd': turn {number % 2} holds the special "
        )
        with pytest.raises(SpatialTokensError, match=f"{said}token '{re.escape(token)}'"):
            make([GOOD[0], sample("odd", "1.png", *turns)])
    data = make([sample("odd", None, token, "x"), GOOD[1]], on_bad_sample="skip")
    assert len(data) == 1
    assert data.bad_samples[0].sample_id == "odd"


def test_paths_that_leave_the_image_folder_are_refused(make, tmp_path, processor):
    folder, outside = tmp_path / "images", tmp_path / "images-2"
    for each in (folder / "sub", outside / "sub"):
        each.mkdir(parents=True)
    for path in (folder / "1.png", folder / "sub" / "1.png", outside / "1.png", outside / "sub" / "1.png"):
        Image.new("RGB", (8, 6), (100 if folder in path.parents else 200, 0, 0)).save(path)
    (folder / "link").symlink_to(outside / "sub", target_is_directory=True)

    def seen(path, **options):
        (tmp_path / "one.json").write_text(json.dumps([sample("x", path, "<image>", "y")]))
        return red(ConversationDataset(tmp_path / "one.json", folder, processor, **options)[0]["pixel_values"])

    for path in ("1.png", "sub/1.png", "./sub/../1.png", "../images/1.png", str(folder / "1.png"), "link/../1.png"):
        assert seen(path) == [100]
    assert seen("link/1.png") == [200]  # whoever made the folder made the link
    for path in ("../images-2/1.png", str(outside / "1.png"), "sub/../../images-2/1.png", f"..//{folder.name}/../images-2/./1.png"):
        with pytest.raises(
            SpatialTokensError, match=f"sample 'x': the image {path} is outside .*images; allow_images_outside=True"
        ):
            seen(path)
        assert seen(path, allow_images_outside=True) == [200]
    with pytest.raises(SpatialTokensError, match="is outside"):  # nor whether it is there
        seen("../gone.png")


def test_pictures_are_trained_upright(make, tmp_path):
    upright = Image.effect_noise((30, 40), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what it stored must be turned clockwise
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned, right = (make([sample("x", name, "<image>", "y")])[0]["pixel_values"] for name in ("turned.png", "upright.png"))
    assert torch.equal(turned, right)


def test_without_pillow_the_extra_is_named_and_no_sample_blamed(make, monkeypatch):
    data = make(GOOD)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'spatial-tokens\[train\]'"):
        data[0]


def test_16_bits_are_not_cut_off(make, processor, tmp_path):
    ramp = torch.arange(256, dtype=torch.int32).mul(257).repeat(256, 1)
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "16.png")
    Image.fromarray((ramp // 257).numpy().astype("uint8")).save(tmp_path / "8.png")
    pixels = [make([sample("x", name, "<image>", "y")])[0]["pixel_values"] for name in ("16.png", "8.png")]
    assert torch.equal(*pixels)


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


def test_options_are_checked(make, processor):
    with pytest.raises(SpatialTokensError, match="on_bad_sample must be"):
        make(GOOD, on_bad_sample="ignore")
    with pytest.raises(SpatialTokensError, match="template must be"):
        make(GOOD, template="llama")
    with pytest.raises(SpatialTokensError, match="needs a bad_samples_file"):
        make(GOOD, on_bad_sample="skip", bad_samples_file=None)
    for length in (0, -5, 20.0, "20", True):
        with pytest.raises(SpatialTokensError, match=f"max_length must be a positive integer, got {length!r}"):
            make(GOOD, max_length=length)
    with pytest.raises(SpatialTokensError, match="image_folder must be a path, got None"):
        ConversationDataset("data.json", None, processor)
    with pytest.raises(SpatialTokensError, match="a processor with a fast tokenizer is expected, got"):
        ConversationDataset("data.json", ".", processor.tokenizer)


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
