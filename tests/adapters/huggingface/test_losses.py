"""Losses of attached models, against sums that are written out: a placeholder is no target, and is not counted as one."""

import pytest
import torch
from packaging.version import Version
from torch.nn import functional

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers.trainer_pt_utils import LabelSmoother

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import MaskPlaceholders, attach, trainer_callback
from spatial_tokens.adapters.huggingface.api import attachment_of
from tests.adapters.huggingface.models import FIELDS, llava, pictures

ROWS = [("<image> ab", 1), ("abc de", 0), ("<image> abcdef <image>", 2), ("a", 0)]


@pytest.fixture(scope="module")
def ready():
    base, plain = llava()
    return *attach(base, plain, **FIELDS), plain


def usual(processor):
    """The collator that everybody writes: padding and image tokens are no targets."""

    def collate(rows):
        texts, counts = zip(*rows, strict=True)
        images = [pictures(count) for count in counts] if any(counts) else None
        made = dict(processor(text=list(texts), images=images, return_tensors="pt", padding=True))
        unlearned = (made["attention_mask"] == 0) | (made["input_ids"] == processor.image_token_id)
        return {**made, "labels": made["input_ids"].masked_fill(unlearned, -100)}

    return collate


def targets(batch, reserved):
    """Where a word is to be predicted: which rows and places, and which words."""
    labels = batch["labels"].masked_fill(batch["labels"] == reserved, -100)
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return rows, places, labels[rows, places + 1]


def summed(model, batch):
    """The cross-entropy of all words in a batch, and their number as Trainer counts it: before 5.24 each row's first is in it."""
    reserved = attachment_of(model).token_id
    rows, places, words = targets(batch, reserved)
    logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits[rows, places]
    firsts = 0 if Version(transformers.__version__) >= Version("5.24") else batch["labels"][:, 0]
    count = len(words) + int(((firsts != -100) & (firsts != reserved)).sum() if torch.is_tensor(firsts) else 0)
    return (logits.logsumexp(-1) - logits.gather(1, words[:, None])[:, 0]).sum(), count


def gradients(model):
    return [each.grad.clone() for each in model.spatial_tokens.parameters()]


def trainer(tmp_path, model, collator, **options):
    model.requires_grad_(False)
    model.spatial_tokens.requires_grad_(True)
    arguments = {
        "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0, "logging_steps": 1,
        "report_to": [], "remove_unused_columns": False, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "max_grad_norm": 1e9, **options,
    }  # fmt: skip
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=ROWS, eval_dataset=ROWS, data_collator=collator
    )


class InOrder(transformers.TrainerCallback):
    """Keeps the gradients of a step."""

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        self.found = gradients(model)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_trainer_divides_by_the_words(ready, tmp_path, wrapped, steps):
    """Of one batch with any collator; of several, of which the model sees one at a time, with MaskPlaceholders alone."""
    model, processor, _ = ready
    collator = MaskPlaceholders(usual(processor), model) if wrapped else usual(processor)
    kept, seen = InOrder(), []
    made = trainer(tmp_path, model, lambda rows: seen.append(rows) or collator(rows), gradient_accumulation_steps=steps)
    made.add_callback(kept)
    if steps > 1 and not wrapped:
        with pytest.raises(SpatialTokensError, match=r"wrap the collator: MaskPlaceholders\(collator, model\)"):
            made.train()
        return
    made.train()
    model.zero_grad()
    found = [summed(model, usual(processor)(rows)) for rows in seen[:steps]]
    expected = sum(loss for loss, _ in found) / sum(count for _, count in found)
    expected.backward()
    logged = next(entry["loss"] for entry in made.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(expected), rel=1e-4)
    for mine, theirs in zip(kept.found, gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_labels_in_image_mode_are_the_collators():
    """Placeholders are the model's image tokens there; whether those are learned is for the collator to say."""
    model, processor = attach(*llava(), mode="image", **FIELDS)
    batch = processor(text=["<image> ab"], images=pictures(1), return_tensors="pt")
    batch["labels"] = batch["input_ids"].clone()
    made = MaskPlaceholders(lambda given: dict(given), model)(batch)
    assert torch.equal(made["labels"], batch["input_ids"])


def test_evaluation(ready, tmp_path):
    """The mean of the batches' means, as Trainer takes it."""
    model, processor, _ = ready
    found = trainer(tmp_path, model, usual(processor), per_device_eval_batch_size=2).evaluate()["eval_loss"]
    with torch.no_grad():
        means = [loss / count for loss, count in (summed(model, usual(processor)(ROWS[i : i + 2])) for i in (0, 2))]
    assert found == pytest.approx(float(sum(means) / 2), rel=1e-4)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:2], ROWS])
def test_label_smoothing(ready, rows):
    """The mean over the words of the base's vocabulary, and of no other."""
    model, processor, _ = ready
    batch = MaskPlaceholders(usual(processor), model)(rows)
    outputs = model(**{name: each for name, each in batch.items() if name != "labels"})
    found = LabelSmoother(0.1)(outputs, batch["labels"], shift_labels=True)
    positions, places, words = targets(batch, attachment_of(model).token_id)
    logits = outputs.logits[positions, places]
    assert logits.shape[1] == model.config.text_config.vocab_size == 100
    surprise = logits.logsumexp(-1, keepdim=True) - logits
    expected = (0.9 * surprise.gather(1, words[:, None])[:, 0] + 0.1 * surprise.mean(1)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found < 6  # the logarithm of 100 words is 4.6


def test_a_loss_over_the_vocabulary_is_the_plain_models(ready):
    """Distillation and DPO compare with a model without spatial tokens: of text alone they must find no difference at all."""
    model, _, plain = ready
    text = plain(text="ab cd", return_tensors="pt")
    student, (teacher, _) = model(**text).logits, llava()
    expected = teacher(**text).logits
    assert torch.equal(student, expected)
    assert functional.kl_div(student.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True) == 0


def test_labels_of_the_reserved_token_in_a_row_of_the_base(tmp_path):
    """The base has a row for the reserved token, as most released models do: that is no word of the loss either."""
    base, plain = llava()
    base.resize_token_embeddings(128, mean_resizing=False)
    model, processor = attach(base, plain, **FIELDS)
    made = trainer(tmp_path, model, usual(processor), per_device_train_batch_size=4)
    made.train()
    with torch.no_grad():
        expected, count = summed(model, usual(processor)(ROWS))
    logged = next(entry["loss"] for entry in made.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(expected / count), rel=1e-4)


def test_trls_collator(ready):
    """It learns image tokens too; placeholders it cannot know."""
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    model, processor, _ = ready
    collator = trl.DataCollatorForVisionLanguageModeling(processor=processor)
    batch = collator([{"images": pictures(count), "text": text} for text, count in ROWS[:2]])
    assert (batch["labels"] == attachment_of(model).token_id).sum() == 6
    expected, count = summed(model, batch)
    counted = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=counted).loss, expected / count, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(**batch).loss, expected / count, rtol=1e-5, atol=0)


def test_trl_divides_outside_the_model(ready):
    """It asks the model for log-probabilities and divides them by a count of its own."""
    model, processor, _ = ready
    batch = usual(processor)(ROWS[:2])
    with pytest.raises(SpatialTokensError, match=r"TRL counts them; wrap the collator: MaskPlaceholders\(collator, model\)"):
        model(**batch, fused_lm_head=True)


def test_trainer_callback_wraps_the_collator(ready, tmp_path):
    """Then accumulated batches are right too."""
    model, processor, _ = ready
    seen = []
    made = trainer(tmp_path, model, lambda rows: seen.append(rows) or usual(processor)(rows), gradient_accumulation_steps=2)
    made.add_callback(trainer_callback())
    made.train()
    with torch.no_grad():
        found = [summed(model, usual(processor)(rows)) for rows in seen[:2]]
    expected = sum(loss for loss, _ in found) / sum(count for _, count in found)
    logged = next(entry["loss"] for entry in made.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(expected), rel=1e-4)
