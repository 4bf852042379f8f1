"""`usage` on models of which it is known what they do with their spatial tokens."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers")

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.api import attachment_of
from spatial_tokens.diagnostics import another_pictures, log_usage, plot_usage, usage
from spatial_tokens.diagnostics.exchange import Others, picture_names
from tests.adapters.huggingface.models import llava, pictures, qwen
from tests.diagnostics import usage_workers
from tests.tolerances import assert_close

COUNT = 4


def attached(make=llava, **options):
    model, processor = make()
    return attach(model, processor, spatial_hidden_size=16, **options)


def batch(processor, count=COUNT, seed=0, size=(336, 336), image="<image>"):
    made = dict(processor(images=pictures(count, size, seed), text=[f"{image} What is this ?"] * count, return_tensors="pt"))
    labels = torch.full_like(made["input_ids"], -100)
    labels[:, -3:] = made["input_ids"][:, -3:]
    return {**made, "labels": labels}


class Told(nn.Module):
    """In the head's place: logits that are told by the spatial tokens (`uses`), and by the patches."""

    def __init__(self, model, uses):
        super().__init__()
        self.uses, self.embeddings = uses, None
        model.model.language_model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, arguments, options):
        self.embeddings = options["inputs_embeds"]

    def forward(self, hidden):
        at = slice(0, 6) if self.uses else slice(6, 500)
        seen = self.embeddings[:, at].float().mean((1, 2), keepdim=True)
        return torch.sin(1e4 * seen * torch.arange(99.0)).expand(-1, hidden.shape[1], -1)


def loss_of(model, given, change=None):
    """Each sample's, by a loop."""
    inputs = {name: each for name, each in given.items() if name != "labels"}
    with torch.no_grad():
        if change is None:
            logits = model(**inputs).logits
        else:
            handle = change[0].register_forward_hook(lambda module, arguments, output: change[1](output))
            logits = model(**inputs).logits
            handle.remove()
    return torch.stack(
        [
            functional.cross_entropy(row[:-1], labels[1:], ignore_index=-100)
            for row, labels in zip(logits, given["labels"], strict=True)
        ]
    ).double()


def test_losses_are_those_of_exchanged_tokens_computed_by_hand():
    model, processor = attached()
    batches = [batch(processor, seed=seed) for seed in range(2)]
    spatial, patches = model.spatial_tokens, model.model.multi_modal_projector
    with torch.no_grad():
        kept = []
        handle = spatial.register_forward_hook(lambda module, arguments, output: kept.append(output))
        own = torch.cat([loss_of(model, each) for each in batches])
        handle.remove()
    mean = torch.cat(kept).mean(0)
    changes = {
        "another": (spatial, lambda tokens: tokens.roll(1, 0)),
        "mean": (spatial, lambda tokens: mean.expand_as(tokens)),
        "patches": (patches, lambda tokens: tokens.roll(1, 0)),
    }
    report = usage(model, batches)
    assert report.loss.value == pytest.approx(own.mean().item(), abs=1e-6)
    for name, change in changes.items():
        expected = torch.cat([loss_of(model, each, change) for each in batches]) - own
        assert getattr(report, name).loss.value == pytest.approx(expected.mean().item(), abs=1e-6)
    assert (report.samples, report.pictures) == (2 * COUNT, 2 * COUNT)
    assert report.places == pytest.approx(6 / 582)
    assert json.loads(report.to_json())["verdict"] == report.verdict


@pytest.mark.parametrize("uses", [True, False])
def test_a_model_that_reads_its_spatial_tokens_and_one_that_does_not(uses):
    model, processor = attached()
    batches = [batch(processor, seed=seed) for seed in range(2)]
    assert (batches[0]["input_ids"][0] == attachment_of(model).token_id).nonzero().flatten().tolist() == list(range(6))
    told = Told(model, uses)
    model.lm_head = told
    with torch.no_grad():
        for each in batches:  # what the tokens tell are the labels
            each["labels"][:, -3:] = (
                model(**{name: value for name, value in each.items() if name != "labels"}).logits[:, :1].argmax(-1)
            )
    report = usage(model, batches)
    assert report.right.value == 1
    if uses:
        assert report.another.loss.low > 0
        assert report.mean.loss.low > 0
        assert report.another.right.value > 0.5
        assert report.verdict.startswith("The spatial tokens are used")
    else:
        assert report.another.loss.value == report.mean.loss.value == 0
        assert report.patches.loss.low > 0
        assert report.share == 0
        assert report.verdict.startswith("No use of the spatial tokens is seen")


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, processor = attached()
    model.train()
    model.model.vision_tower.eval()
    usage(model, [batch(processor)])  # transformers keeps hooks of its own from the first call
    before, hooks, modes = torch.get_rng_state(), hooks_of(model), [module.training for module in model.modules()]
    usage(model, [batch(processor)])
    assert torch.equal(torch.get_rng_state(), before)
    assert hooks_of(model) == hooks
    assert [module.training for module in model.modules()] == modes


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_attention_is_that_of_the_model():
    model, processor = attached()
    assert usage(model, [batch(processor)]).attention is None
    model.set_attn_implementation("eager")
    given = batch(processor)
    report = usage(model, [given])
    inputs = {name: each for name, each in given.items() if name != "labels"}
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    ids = given["input_ids"]
    start, end = (ids[0] == attachment_of(model).token_id).nonzero()[[0, -1], 0].tolist()
    after = end + 576 + 1
    assert len(report.attention) == len(weights)
    for layer, weight in zip(report.attention, weights, strict=True):
        text = weight.mean(1)[:, after:]
        assert_close(torch.tensor(layer.spatial.value), text[..., start : end + 1].sum(-1).mean())
        assert_close(torch.tensor(layer.patches.value), text[..., end + 1 : after].sum(-1).mean())
    assert 0 < report.attention_share < 1
    assert "attention to the picture" in str(report)


def test_a_qwen_whose_patches_cannot_be_exchanged():
    model, processor = attached(qwen, resize="pool")
    given = batch(processor, size=(112, 112), image="<|vision_start|><|image_pad|><|vision_end|>")
    report = usage(model, [given])
    assert report.patches is None
    assert report.share is None
    assert "usage_share" not in report.metrics()
    assert report.samples == COUNT


def test_one_picture_a_batch_is_given_that_of_another_batch():
    model, processor = attached()
    whole = batch(processor, 3)
    singles = [{name: each[i : i + 1] for name, each in whole.items()} for i in range(3)]
    one, other = usage(model, singles), usage(model, [whole])
    assert one.another.loss.value == pytest.approx(other.another.loss.value, abs=1e-6)
    assert one.patches.loss.value == pytest.approx(other.patches.loss.value, abs=1e-6)


def test_questions_about_one_picture_are_one_draw_of_the_intervals():
    model, processor = attached()
    whole = batch(processor, 2)
    twice = {name: each.repeat_interleave(2, 0) for name, each in whole.items()}
    one, other = usage(model, [whole]), usage(model, [twice])
    assert (other.samples, other.pictures) == (4, 2)
    for name in ("value", "low", "high"):
        assert getattr(one.another.loss, name) == pytest.approx(getattr(other.another.loss, name), abs=1e-6)
    single = usage(model, [{name: each[:1] for name, each in whole.items()}])
    assert single.another.loss.low is None
    assert single.verdict.startswith("No verdict")


@pytest.mark.parametrize("make", [llava, qwen])
def test_a_picture_is_known_again_in_batches_of_other_sizes(make):
    model, processor = attached(make, **({"resize": "pool"} if make is qwen else {}))
    image, size = ("<image>", (336, 336)) if make is llava else ("<|vision_start|><|image_pad|><|vision_end|>", (112, 112))
    shown = pictures(COUNT, size)

    def of(chosen):
        given = dict(processor(images=[shown[i] for i in chosen], text=[f"{image} What ?"] * len(chosen), return_tensors="pt"))
        return {**given, "labels": given["input_ids"].masked_fill(given["input_ids"] == 0, -100)}

    report = usage(model, [of(range(COUNT)), of([0]), of([1, 2, 3])])
    assert (report.samples, report.pictures) == (2 * COUNT, COUNT)
    apart, together = usage(model, [of([0, 1]), of([1])]), usage(model, [of([0, 1, 1])])  # not its own, of the batch before
    assert apart.another.loss.value == pytest.approx(together.another.loss.value, abs=1e-6)
    assert (apart.pictures, together.pictures) == (2, 2)


def test_names_of_padded_pictures_do_not_depend_on_the_batch():
    small, wide = torch.randn(3, 4, 4), torch.randn(3, 4, 8)
    both = torch.stack([functional.pad(small, (0, 4)), wide])
    names = picture_names({"pixel_values": both, "image_sizes": torch.tensor([[4, 4], [4, 8]])}, 2)
    assert names[:1] == picture_names({"pixel_values": small[None], "image_sizes": torch.tensor([[4, 4]])}, 1)
    assert names[0] != names[1]
    assert picture_names({"pixel_values": both}, 5) is None  # tiles
    assert picture_names({}, 1) is None


def test_others():
    a, b, c = torch.randn(3, 2, 4)
    assert torch.equal(Others()(torch.stack([a, b, c])), torch.stack([c, a, b]))
    assert torch.equal(Others()(torch.stack([a, a, b])), torch.stack([b, b, a]))
    assert torch.equal(Others()(torch.stack([a, a])), torch.stack([a, a]))
    others = Others()
    others.keep(c[None])
    assert torch.equal(others(a[None]), c[None])
    assert torch.equal(others(a[None]), c[None])
    assert torch.equal(others(b[None]), a[None])
    assert torch.equal(Others()(torch.stack([a, a + 1e-6, b]), ["a", "a", "b"])[:2], torch.stack([b, b]))
    part = nn.Identity()
    with another_pictures(part):
        assert torch.equal(part(torch.stack([a, b])), torch.stack([b, a]))
    assert torch.equal(part(torch.stack([a, b])), torch.stack([a, b]))


def test_bad_input_is_said():
    bare, _ = llava()
    model, processor = attached()
    good = batch(processor, 2)
    text = dict(processor(text=["What?"], return_tensors="pt"))
    for which, batches, message in [
        (bare, [good], "the model has no spatial tokens"),
        (model, [], "there are no batches"),
        (model, iter([good]), "read twice, which a list_iterator cannot be"),
        (model, good, "must be a list of batches"),
        (model, [{name: each for name, each in good.items() if name != "labels"}], "batch 0, counted from 0, has no labels"),
        (model, [good, {**text, "labels": text["input_ids"]}], "batch 1, counted from 0, has no images"),
        (model, [{**good, "labels": torch.full_like(good["labels"], -100)}], "no sample has both a picture and labels"),
        (model, [{**good, "labels": good["labels"][:, 1:]}], "pad them alike"),
    ]:
        with pytest.raises(SpatialTokensError, match=message):
            usage(which, batches)
    with pytest.raises(SpatialTokensError, match="no usage was logged"):
        plot_usage([{"loss": 1.0, "step": 1}])


def test_a_trainer_logs_usage_at_each_evaluation(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, processor = attached()
    model.set_attn_implementation("eager")
    given = batch(processor, 4)
    rows = [{name: each[i] for name, each in given.items()} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2,
        report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    log_usage(trainer, limit=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "usage_gain" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    first = {name: each[:2] for name, each in given.items()}
    assert logged[-1]["usage_gain"] == pytest.approx(usage(model, [first]).another.loss.value, abs=1e-6)
    assert logged[-1]["usage_places"] == pytest.approx(6 / 582)
    assert len(plot_usage(trainer.state.log_history).axes) == 2
    with pytest.raises(SpatialTokensError, match="no eval_dataset"):
        log_usage(Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True), train_dataset=rows))
    with pytest.raises(SpatialTokensError, match="read twice"):
        log_usage(trainer, iter([given]))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    usage_workers.start(2, folder)
    return [torch.load(folder / f"found.{rank}") for rank in range(2)]


@pytest.mark.parametrize("name", usage_workers.CASES)
def test_two_processes_log_what_one_does(two_processes, name, tmp_path):
    count, batch_size, limit = usage_workers.CASES[name]
    model, rows = usage_workers.prepared(count)
    expected, report = usage_workers.logged(model, rows, batch_size, limit, tmp_path)
    first, second = (each[name] for each in two_processes)
    assert first == second
    found, found_report = first
    if name == "copies":  # of the last batch's sample, the picture before it is a copy: another one than in one process
        assert (found_report["samples"], found_report["pictures"]) == (7, 7)
        expected, found = ({each: told[each] for each in ("usage_gain_over_mean", "usage_places")} for told in (expected, found))
    assert found == pytest.approx(expected, rel=1e-5)
    for each in ("loss", "right"):
        assert found_report[each]["value"] == pytest.approx(report[each]["value"], rel=1e-5)


def test_batches_of_every_process_are_measured_in_each(two_processes, tmp_path):
    model, rows = usage_workers.prepared(8)
    batches = [usage_workers.together(rows[:4])]
    expected, _ = usage_workers.logged(model, rows, 2, 8, tmp_path, batches=batches)
    for each in two_processes:
        assert each["batches of every process"] == pytest.approx(expected, rel=1e-5)


def test_what_is_wrong_in_one_process_ends_all(two_processes):
    first, second = (each["failure"] for each in two_processes)
    assert second.startswith("batch 0, counted from 0, has no labels")
    assert first == f"process 1: {second}"
