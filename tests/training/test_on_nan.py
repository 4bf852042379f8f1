"""Training that meets NaN: it stops and keeps the last good checkpoint, or goes on and says so; NaN is never written."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import attach
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.training import ALIGNMENT
from spatial_tokens.training.checkpoints import checkpoints_in
from spatial_tokens.training.prepare import prepare_model, save_trained
from spatial_tokens.training.trainer import SpatialTokensTrainer
from tests.test_examples import example
from tests.training.script import ROOT, TWO, losses, run, small

TOO_FAST = "{global_batch_size: 4, projector_learning_rate: 1.0e+30}"


def quick(output, **changes):
    """Two passes a step, and a checkpoint after each step."""
    return small(output, **{"max_steps": 4, "save_steps": 1, "eval_data": "null", **changes})


def all_finite(folder):
    files = list(folder.rglob("*.safetensors"))
    return files and all(each.isfinite().all() for file in files for each in load_file(file).values())


def test_a_learning_rate_that_is_too_high_stops_the_run(there):
    with pytest.raises(SpatialTokensError, match=r"step 2: the norms of .* are not finite: .* checkpoint is fast/checkpoint-1 "):
        example("train").main(quick("fast", recipe=TOO_FAST))
    assert [path.name for path in checkpoints_in("fast")] == ["checkpoint-1"]
    assert all_finite(there / "fast")
    assert not (there / "fast" / "spatial_tokens").exists()


def loss_is_nan(trainer):
    """The second pass of the second step says NaN; its gradients are fine."""
    step, passes = trainer.training_step, iter(range(100))
    trainer.training_step = lambda *args, **options: step(*args, **options) * (math.nan if next(passes) == 3 else 1)


def gradient_is_infinite(trainer):
    """From the second step on."""
    weight = trainer.model.spatial_tokens.spatial_head.fc.weight
    weight.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step else 1))


def evaluation_is_nan(trainer):
    """Of one batch after the second step."""
    predict, batches = trainer.prediction_step, iter(range(100))

    def with_nan(*args, **options):
        loss, *rest = predict(*args, **options)
        return loss * (math.nan if trainer.state.global_step == 2 and next(batches) == 0 else 1), *rest

    trainer.prediction_step = with_nan


@pytest.fixture
def faulty(monkeypatch):
    """Puts a fault into the Trainer that the script makes."""
    make = SpatialTokensTrainer.__init__

    def put(fault):
        def faulty_init(self, **options):
            make(self, **options)
            fault(self)

        monkeypatch.setattr(SpatialTokensTrainer, "__init__", faulty_init)

    return put


@pytest.mark.parametrize(
    ("fault", "said", "changes"),
    [
        (loss_is_nan, "step 2: the loss is nan; training stopped", {}),
        (gradient_is_infinite, "step 2: the gradient norm is (inf|nan); training stopped", {"logging_steps": 100}),
        (evaluation_is_nan, "step 2: eval_loss is nan", {"eval_data": "tiny-data/alignment.json", "eval_strategy": "steps"}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_is_not_finite_stops_the_run(there, faulty, fault, said, changes):
    faulty(fault)
    output = there / fault.__name__
    with pytest.raises(
        SpatialTokensError, match=rf"{said}.*checkpoint is {output.name}/checkpoint-1 \(on_nan='continue' trains on"
    ):
        example("train").main(quick(output.name, **changes))
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-1"]
    assert all_finite(output)


def test_a_run_that_continues_logs_nan_at_its_step_alone(there, faulty):
    faulty(loss_is_nan)
    example("train").main(quick("goes-on", on_nan="continue"))
    assert [math.isfinite(loss) for loss in losses(there / "goes-on")] == [True, False, True, True]
    assert all_finite(there / "goes-on")


def test_a_run_that_continues_writes_no_weights_that_are_not_finite(there):
    with (
        pytest.warns(UserWarning, match="lost/checkpoint-2 is not written: the norms of trained weights"),
        pytest.raises(SpatialTokensError, match="the norms of trained weights are not finite"),
    ):
        example("train").main(quick("lost", on_nan="continue", recipe=TOO_FAST, max_steps=3))
    assert [path.name for path in checkpoints_in("lost")] == ["checkpoint-1"]
    assert all_finite(there / "lost")
    assert not (there / "lost" / "spatial_tokens").exists()


def test_processes_stop_together(folder):
    """The loss is NaN in the second process alone, and its gradients are fine."""
    script = ROOT / "tests" / "training" / "one_is_nan.py"
    done = run(folder, *TWO, script, *quick("together", per_device_train_batch_size=1), ok=False)
    assert done.stdout.count("stopped: step 2: the loss is nan") == 2
    assert [path.name for path in checkpoints_in(folder / "together")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("scale", "skipped", "loss", "stops"),
    [(65536.0, True, 1.0, False), (65536.0, False, 1.0, True), (65536.0, True, math.nan, True), (1e-5, True, 1.0, True)],
)
def test_float16_gradients_that_overflow_are_scaled_down(tmp_path, scale, skipped, loss, stops):
    """Not a reason to stop, unless the loss is not finite, or no scale was small enough."""
    trainer = object.__new__(SpatialTokensTrainer)
    trainer.args, trainer.hp_search_backend = SimpleNamespace(output_dir=tmp_path), None
    trainer.state = SimpleNamespace(global_step=7)
    scaler = torch.amp.GradScaler("cpu", scale)
    trainer.accelerator = SimpleNamespace(
        mixed_precision="fp16", optimizer_step_was_skipped=skipped, scaler=scaler, gather=lambda each: each
    )
    expected = pytest.raises(SpatialTokensError, match=r"step 7: the .* no checkpoint was written before")
    with expected if stops else nullcontext():
        trainer._require_finite(torch.tensor(loss), torch.tensor(math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    model = prepare_model(attach(*tiny_llava(), spatial_hidden_size=8)[0], ALIGNMENT)
    save_trained(model, tmp_path)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias[3] = value
    with pytest.raises(
        SpatialTokensError, match=r"not finite: module.model.multi_modal_projector.linear_1.bias \((nan|inf)\); lower"
    ):
        save_trained(model, tmp_path)
    assert all_finite(tmp_path)
