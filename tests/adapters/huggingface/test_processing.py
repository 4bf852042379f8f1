"""Processors that insert slots: texts and chat templates, batches, tiles; and what is left of them on disk."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach, detach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.attach import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures, qwen

SLOTS = "<|spatial|>" * 6
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
)


@pytest.fixture(scope="module")
def attached():
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    return model, processor, plain


def words(processor, ids):
    """The text behind ids, without the tokenizer's spaces, and runs of image tokens as one."""
    text = "".join(processor.tokenizer.convert_ids_to_tokens(ids)).replace("<pad>", "")
    while "<image><image>" in text:
        text = text.replace("<image><image>", "<image>")
    return text


def test_one_image(attached):
    _, processor, plain = attached
    (image,) = pictures(1)
    made = processor(images=image, text="a <image> b", return_tensors="pt")
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"
    before = plain(images=image, text="a <image> b", return_tensors="pt")
    assert torch.equal(made["pixel_values"], before["pixel_values"])
    assert made["input_ids"].shape[1] == before["input_ids"].shape[1] + 6


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch(attached, side):
    model, processor, plain = attached
    texts = ["<image> a <image> b", "only words", "<image> c"]
    made = processor(images=pictures(3), text=texts, return_tensors="pt", padding=True, padding_side=side)
    expected = [f"{SLOTS}<image> a {SLOTS}<image> b", "only words", f"{SLOTS}<image> c"]
    assert [words(processor, row) for row in made["input_ids"]] == expected
    slots = made["input_ids"] == attachment_of(model).token_id
    assert slots.sum(1).tolist() == [12, 0, 6]
    assert (made["attention_mask"][slots] == 1).all()
    edge = 0 if side == "left" else -1
    assert made["attention_mask"][1, edge] == 0
    before = plain(images=pictures(3), text=texts, return_tensors="pt", padding=True, padding_side=side)
    kept = made["attention_mask"].bool() & ~slots
    assert torch.equal(made["input_ids"][kept], before["input_ids"][before["attention_mask"].bool()])


def test_lists_without_tensors(attached):
    _, processor, _ = attached
    made = processor(images=pictures(1), text=["a <image> b"])
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"


def test_images_as_one_tensor(attached):
    _, processor, _ = attached
    made = processor(images=torch.zeros(2, 3, 336, 336), text="<image> a <image>", return_tensors="pt")
    assert words(processor, made["input_ids"][0]) == f"{SLOTS}<image> a {SLOTS}<image>"


def test_text_alone_and_images_alone(attached):
    _, processor, plain = attached
    assert processor(text="a b")["input_ids"] == plain(text="a b")["input_ids"]
    assert processor(text=["a b"], images=None)["input_ids"] == plain(text=["a b"])["input_ids"]


def test_slots_are_inserted_once(attached):
    _, processor, _ = attached
    image = pictures(1)[0]
    once = processor(images=image, text="a <image> b")["input_ids"]
    assert processor(images=image, text=f"a {SLOTS}<image> b")["input_ids"] == once


@pytest.mark.parametrize("text", ["<|spatial|><image> b", f"{SLOTS} <image> b", f"<image> b {SLOTS}", f"{SLOTS}{SLOTS}<image> b"])
def test_other_slots_are_refused(attached, text):
    _, processor, _ = attached
    with pytest.raises(SpatialTokensError, match=r"text 0 has <\|spatial\|>, but not 6 times before an image"):
        processor(images=pictures(1), text=text)


@pytest.mark.parametrize(
    ("texts", "images", "message"),
    [
        (["<image> a"], 2, r"the texts have <image> \[1\] times, for 2 images in all"),
        (["<image> a", "<image> b"], 1, r"the texts have <image> \[1, 1\] times, for 1 images in all"),
        (["<image> a"], 0, r"the texts have <image> \[1\] times, for 0 images in all"),
        (["<image> a", "b"], [0, 1], "text 0 has <image> 1 times for 0 images"),
    ],
)
def test_counts_that_do_not_go_together(attached, texts, images, message):
    _, processor, _ = attached
    given = [pictures(n) for n in images] if isinstance(images, list) else pictures(images) or None
    with pytest.raises(SpatialTokensError, match=message):
        processor(images=given, text=texts, return_tensors="pt")


def test_images_without_a_place(attached):
    _, processor, _ = attached
    with pytest.raises(ValueError, match="<image>"):  # ours, or that of a transformers that counts itself
        processor(images=pictures(1), text=["a"], return_tensors="pt")


def test_what_is_no_text(attached):
    _, processor, _ = attached
    with pytest.raises(SpatialTokensError, match="text must be a string or a list of strings"):
        processor(images=pictures(1), text=[["a", "<image>"]])


def test_chat_template(attached):
    _, processor, _ = attached
    processor = copy.deepcopy(processor)
    processor.chat_template = TEMPLATE
    content = [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "What?"}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert words(processor, made["input_ids"][0]).strip() == f"user: {SLOTS}<image>What?"


def test_qwen():
    """Slots stand before the token that opens the image; they are text to the model's positions; videos are left alone."""
    base, plain = qwen()
    model, processor = attach(base, plain, resize="pool", **FIELDS)
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    made = processor(images=pictures(1, (48, 32)), text=[f"What {place} is"], return_tensors="pt")
    ids = made["input_ids"][0].tolist()
    slot, config = attachment_of(model).token_id, model.config
    first = ids.index(slot)
    assert ids[first : first + 8] == [slot] * 6 + [config.vision_start_token_id, config.image_token_id]
    if "mm_token_type_ids" in made:
        assert made["mm_token_type_ids"][0].tolist() == [int(each == config.image_token_id) for each in ids]
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    clip = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with_video = processor(videos=[clip], text=[f"What {video} is"], return_tensors="pt")
    assert torch.equal(with_video["input_ids"], plain(videos=[clip], text=[f"What {video} is"], return_tensors="pt")["input_ids"])


def test_image_mode():
    base, plain = llava()
    model, processor = attach(base, plain, mode="image", **FIELDS)
    made = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert (made["input_ids"] == model.config.image_token_id).sum() == 582
    assert attachment_of(model).token_id == model.config.image_token_id
    assert model.generate(**made, max_new_tokens=2).shape[1] == made["input_ids"].shape[1] + 2


def test_the_original_is_untouched():
    base, plain = llava()
    before = len(plain.tokenizer)
    _, processor = attach(base, plain, **FIELDS)
    assert len(plain.tokenizer) == before
    assert type(plain).__name__ == type(processor).__name__ == "LlavaProcessor"
    assert isinstance(processor, transformers.LlavaProcessor)
    assert words(plain, plain(images=pictures(1), text="<image>")["input_ids"][0]) == "<image>"
    detach(base, processor)
    assert type(processor) is transformers.LlavaProcessor
    assert words(processor, processor(images=pictures(1), text="<image>")["input_ids"][0]) == "<image>"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_insert_slots_too(attached, copied):
    _, processor, _ = attached
    made = copied(processor)(images=pictures(1), text="a <image> b")
    assert words(processor, made["input_ids"][0]) == f"a {SLOTS}<image> b"


def test_saved_and_loaded(tmp_path):
    base, plain = llava()
    model, processor = attach(base, plain, **FIELDS)
    inputs = processor(images=pictures(1), text="a <image> b", return_tensors="pt")
    expected = model(**inputs).logits
    save_adapter(model, tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "processor")
    detach(model)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "processor")
    assert type(loaded) is transformers.LlavaProcessor
    model, again = load_adapter(base, tmp_path / "adapter", loaded)
    made = again(images=pictures(1), text="a <image> b", return_tensors="pt")
    assert torch.equal(made["input_ids"], inputs["input_ids"])
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("processor", ["a string", 3])
def test_what_is_no_processor(processor):
    base, _ = llava()
    with pytest.raises(SpatialTokensError, match="a processor with a tokenizer is expected"):
        attach(base, processor, **FIELDS)
    assert not hasattr(base, "spatial_tokens")
