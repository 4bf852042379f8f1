"""examples/train.py, end to end on a tiny model: two stages, killed and resumed, on two processes, with bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from spatial_tokens import SpatialTokensError
from spatial_tokens.adapters.huggingface import detach, load_adapter
from spatial_tokens.adapters.huggingface.ready import tiny_llava
from spatial_tokens.training.checkpoints import MANIFEST, checkpoints_in
from spatial_tokens.training.dataset import ConversationDataset
from spatial_tokens.training.trainer import SpatialTokensTrainer
from tests.test_examples import example
from tests.training import on_cpu
from tests.training.script import CONFIGS, ENVIRONMENT, ROOT, SCRIPT, TWO, arguments, losses, run, small, state


@pytest.fixture(scope="module")
def stages(folder):
    """Both stages, run once; each one's Trainer."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        train = example("train")
        return [
            train.main(arguments(CONFIGS / f"{name}.yaml", disable_tqdm="true")) for name in ("alignment", "instruction_tuning")
        ]
    finally:
        os.chdir(before)


def test_the_loss_falls_in_both_stages(stages, folder):
    for name in ("alignment", "instruction_tuning"):
        found = losses(folder / "tiny-run" / name)
        assert len(found) == 12
        assert max(found[-3:]) < min(found[:2]) - 0.15, found
        assert sum("eval_loss" in entry for entry in state(folder / "tiny-run" / name)["log_history"]) == 1


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_only_the_projector_and_the_lora_learned(stages):
    torch.manual_seed(0)
    for trainer in stages:
        trained = {name for name, each in trainer.model.named_parameters() if each.requires_grad}
        kinds = {next((k for k in ("spatial_tokens", "multi_modal_projector", "lora_") if k in name), name) for name in trained}
        assert kinds == {"spatial_tokens", "multi_modal_projector"} | ({"lora_"} if trainer.stage.lora else set())
    language = stages[1].model.base_model.model.model.language_model
    adapted = [name for name, each in language.named_modules() if hasattr(each, "lora_A")]
    assert len(adapted) == 2 * 7  # q, k, v, o, gate, up, down of two layers
    assert not any("vision_tower" in name and "lora_" in name for name, _ in stages[1].model.named_parameters())


def test_learning_rates_are_the_stages(stages):
    groups = {group["name"]: group["initial_lr"] for group in stages[1].optimizer.param_groups}
    assert groups == {"projector": 0.002, "lora": 0.01}
    assert all(group["lr"] == pytest.approx(0, abs=1e-12) for group in stages[1].optimizer.param_groups)


def test_what_was_learned_is_all_that_is_written(stages, folder):
    output = folder / "tiny-run" / "instruction_tuning"
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [
        "checkpoint-12", "checkpoint-8", "lora", "spatial_tokens",
    ]  # fmt: skip
    tensors = {path.relative_to(output / "checkpoint-12").as_posix() for path in (output / "checkpoint-12").rglob("*.safetensors")}
    assert tensors == {"spatial_tokens/adapter_model.safetensors", "lora/adapter_model.safetensors"}


def test_it_loads_into_a_fresh_base_and_generates(stages, folder):
    from peft import PeftModel

    output = folder / "tiny-run" / "instruction_tuning"
    trained = stages[1].model.eval()
    torch.manual_seed(0)
    base, processor = tiny_llava()
    own = {name: each.clone() for name, each in base_of(base).state_dict().items()}
    for name, each in base.named_parameters():  # the frozen weights, which a real base has on disk
        found = dict(base_of(trained).named_parameters())
        key = name if name in found else name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        if "multi_modal_projector" not in name:
            each.data.copy_(found[key][: each.shape[0]])
            own[name] = each.detach().clone()
    model, processor = load_adapter(base.eval(), output / "spatial_tokens", processor)
    model = PeftModel.from_pretrained(model, output / "lora").eval()
    from spatial_tokens.visualize import sample_picture

    inputs = processor(images=sample_picture(), text="USER: <image>\nWhere? ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, trained(**inputs).logits, rtol=1e-5, atol=1e-5)
        answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(answers, trained.generate(**inputs, max_new_tokens=4, do_sample=False))
        used = model(**inputs).logits
        base_of(model).spatial_tokens.spatial_head.fc.weight.zero_()
        assert not torch.allclose(model(**inputs).logits, used)
    bare = detach(model.unload())
    assert {name: each.shape for name, each in bare.state_dict().items()} == {name: each.shape for name, each in own.items()}
    assert all(torch.equal(each, own[name]) for name, each in bare.state_dict().items())


@pytest.fixture(scope="module")
def uninterrupted(folder):
    run(folder, SCRIPT, *small("whole"))
    return losses(folder / "whole")


def test_killed_and_resumed_is_the_same_run(folder, uninterrupted):
    command = [sys.executable, str(SCRIPT), *small("killed")]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not (folder / "killed" / "checkpoint-4" / MANIFEST).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not (folder / "killed" / "trainer_state.json").exists()
    done = run(folder, SCRIPT, *small("killed"))
    assert "resumed from killed/checkpoint-4" in done.stdout
    assert losses(folder / "killed") == uninterrupted


def test_a_damaged_checkpoint_is_passed_over(there, capsys):
    train = example("train")
    train.main(small("damaged", max_steps=4))
    optimizer = there / "damaged" / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        train.main(small("damaged"))
    assert "resumed from damaged/checkpoint-2" in capsys.readouterr().out
    assert len(losses(there / "damaged")) == 6


def test_a_full_disk_leaves_the_last_whole_checkpoint(there, monkeypatch):
    train, save = example("train"), torch.save

    def full(thing, path, *rest, **options):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return save(thing, path, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        SpatialTokensError, match=r"cannot write the checkpoint full/checkpoint-4: No space left.*full/checkpoint-2"
    ):
        train.main(small("full", save_total_limit=1))
    monkeypatch.setattr(torch, "save", save)
    assert [path.name for path in checkpoints_in("full")] == ["checkpoint-2", "checkpoint-4"]
    assert (there / "full" / "checkpoint-2" / MANIFEST).exists()
    assert not (there / "full" / "checkpoint-4" / MANIFEST).exists()
    with pytest.warns(UserWarning, match="skipped a checkpoint.*not written to its end"):
        train.main(small("full", save_total_limit=1))
    assert len(losses(there / "full")) == 6
    assert [path.name for path in checkpoints_in("full")] == ["checkpoint-6"]


def needs_transformers(*version):
    """Before, Trainer sharded later epochs otherwise (5.17) and could not resume on several CPU processes (5.23)."""
    found = tuple(map(int, version_of("transformers").split(".")[:2]))
    return pytest.mark.skipif(found < version, reason=f"needs transformers {version}")


@needs_transformers(5, 17)
def test_two_processes_are_as_one(folder, uninterrupted):
    done = run(folder, *TWO, SCRIPT, *small("two", per_device_train_batch_size=1))
    assert done.stdout.count("6 steps, loss") == 1  # the first process tells
    assert (folder / "two" / "checkpoint-6" / "rng_state_1.pth").exists()
    assert losses(folder / "two") == pytest.approx(uninterrupted, rel=1e-4)


@needs_transformers(5, 23)
def test_a_process_that_dies_ends_the_run_and_leaves_whole_checkpoints(folder, uninterrupted):
    options = small("dies", per_device_train_batch_size=1)
    dying = ROOT / "tests" / "training" / "dying.py"
    done = run(folder, *TWO, dying, *options, ok=False)
    assert "exitcode" in done.stderr.lower()
    assert [path.name for path in checkpoints_in(folder / "dies")] == ["checkpoint-2"]
    done = run(folder, *TWO, SCRIPT, *options)
    assert "resumed from dies/checkpoint-2" in done.stdout
    assert losses(folder / "dies") == pytest.approx(uninterrupted, rel=1e-4)


@needs_transformers(5, 23)
def test_text_alone_on_one_process_does_not_mix_up_the_gradients_of_zero2(there, stages):
    """DeepSpeed joins gradients in the order in which they come; it must be the same with images and without."""
    pytest.importorskip("deepspeed")
    options = {"stage": "instruction_tuning", "start_from": "tiny-run/alignment", "data": "tiny-data/instructions.json",
               "max_steps": 2, "save_strategy": "no", "eval_data": "null",
               "recipe": "{global_batch_size: 8, projector_learning_rate: 0.01, lora: {rank: 4, dropout: 0.0}}"}  # fmt: skip
    example("train").main(small("zero-none", per_device_train_batch_size=4, **options))
    config = ROOT / "examples" / "engines" / "zero2.yaml"
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, "--num_processes=2",
              "--mixed_precision=no", "--main_process_port=0", "-m", "tests.training.on_cpu")  # fmt: skip
    words = small("zero-two", per_device_train_batch_size=1, use_cpu=False, **options)
    run(there, *launch, SCRIPT, *words, environment=on_cpu.environment("zero2"))
    one, two = (
        [entry["grad_norm"] for entry in state(there / name)["log_history"] if "grad_norm" in entry]
        for name in ("zero-none", "zero-two")
    )
    assert two == pytest.approx(one, rel=1e-3)


def test_the_best_checkpoint_is_loaded_and_kept(there, monkeypatch):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": "true", "save_total_limit": 1}
    train = example("train")
    measured = iter([3.0, 1.0, 2.0, 2.0])
    evaluate = SpatialTokensTrainer.evaluation_loop

    def as_measured(self, *arguments, **named):
        output = evaluate(self, *arguments, **named)
        output.metrics["eval_loss"] = next(measured)
        return output

    monkeypatch.setattr(SpatialTokensTrainer, "evaluation_loop", as_measured)
    trainer = train.main(small("best", **options))
    assert [path.name for path in checkpoints_in("best")] == ["checkpoint-4"]
    best, written = (
        load_file(there / "best" / name / "spatial_tokens" / "adapter_model.safetensors") for name in ("checkpoint-4", ".")
    )
    assert all(torch.equal(each, written[name]) for name, each in best.items())
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@needs_transformers(5, 23)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_other_engines_are_as_one_process_and_resume(folder, uninterrupted, engine):
    if engine == "zero2":
        pytest.importorskip("deepspeed")
    config = ROOT / "examples" / "engines" / f"{engine}.yaml"
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, "--num_processes=2",
              "--mixed_precision=no", "--main_process_port=0", "-m", "tests.training.on_cpu")  # fmt: skip
    options = small(engine, per_device_train_batch_size=1, use_cpu=engine != "zero2")
    run(folder, *launch, SCRIPT, *options, environment=on_cpu.environment(engine))
    assert losses(folder / engine) == pytest.approx(uninterrupted, rel=1e-4)
    (folder / engine / "checkpoint-6" / MANIFEST).unlink()
    done = run(folder, *launch, SCRIPT, *options, environment=on_cpu.environment(engine))
    assert f"resumed from {engine}/checkpoint-4" in done.stdout
    assert losses(folder / engine) == pytest.approx(uninterrupted, rel=1e-4)


def test_bad_samples_are_counted_at_the_end(there, capsys):
    samples = json.loads((there / "tiny-data" / "alignment.json").read_text())
    samples[1]["image"] = "gone.png"
    samples[2]["conversations"][0]["value"] = "<image><image>"
    (there / "tiny-data" / "images" / "broken.png").write_bytes(b"broken")
    samples[3]["image"] = "broken.png"
    shutil.copy(there / "tiny-data" / "images" / "4.png", there / "tiny-data" / "outside.png")
    samples[4]["image"] = "../outside.png"
    (there / "bad.json").write_text(json.dumps(samples))
    train = example("train")
    with pytest.raises(SpatialTokensError, match=r"3 bad samples.*'1'.*gone.png.*'2'.*2 placeholders.*'4'.*is outside"):
        train.main(small("bad", data="bad.json"))
    skip = {"on_bad_sample": "skip", "allow_images_outside": "true"}
    train.main(small("bad", data="bad.json", max_steps=8, save_strategy="no", **skip))
    shown = capsys.readouterr()
    assert "3 bad samples of bad.json were left out; bad/bad_samples.jsonl says which and why" in shown.err
    assert "8 steps, loss" in shown.out


def test_a_given_up_run_does_not_outlive_the_new_one(there):
    train = example("train")
    train.main(small("given", max_steps=6, save_total_limit=1))
    damaged = there / "given" / "checkpoint-6" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes() + b"x")
    with pytest.warns(UserWarning, match="skipped"):
        trainer = train.main(small("given", max_steps=4, save_total_limit=1))
    assert trainer.state.global_step == 4
    assert [path.name for path in checkpoints_in("given")] == ["checkpoint-4"]


def test_a_bad_sample_in_a_worker_is_one_line(there, folder):
    samples = json.loads((folder / "tiny-data" / "alignment.json").read_text())
    (folder / "tiny-data" / "images" / "damaged.png").write_bytes(b"damaged")
    samples[5]["image"] = "damaged.png"
    (folder / "worker.json").write_text(json.dumps(samples))
    done = run(folder, SCRIPT, *small("worker", data="worker.json", dataloader_num_workers=2), ok=False)
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: error: sample '5': the image damaged.png does not open")


@pytest.mark.parametrize(("stored", "flags"), [(torch.float16, {"bf16": "true"}), (torch.bfloat16, {}), (torch.float16, {})])
def test_a_base_in_half_precision(there, stored, flags):
    model, processor = tiny_llava()
    model.to(stored).save_pretrained("half")
    processor.save_pretrained("half")
    trainer = example("train").main(small("half-out", model="half", max_steps=2, save_strategy="no", eval_data="null", **flags))
    kinds = {each.dtype for each in trainer.model.parameters() if each.requires_grad}
    assert kinds == {torch.float32}
    assert all(loss > 0 for loss in losses(there / "half-out"))


WITH_DROPOUT = {
    "stage": "instruction_tuning", "start_from": "tiny-run/alignment", "data": "tiny-data/instructions.json", "eval_data": "null",
    "recipe": "{global_batch_size: 4, projector_learning_rate: 0.01, lora: {rank: 4, dropout: 0.5, learning_rate: 0.05}}",
}  # fmt: skip


def test_a_resumed_run_draws_the_same_random_numbers(there, stages, capsys):
    """Dropout's, and the order of the samples: the fifth step begins a second pass over them."""
    train, options = example("train"), {**WITH_DROPOUT, "max_steps": 5, "save_total_limit": "null"}
    train.main(small("drawn", **options))
    uninterrupted = losses(there / "drawn")
    for step in (4, 5):
        shutil.rmtree(there / "drawn" / f"checkpoint-{step}")
    train.main(small("drawn", **options))
    assert "resumed from drawn/checkpoint-2" in capsys.readouterr().out
    assert losses(there / "drawn") == uninterrupted
    assert len(set(uninterrupted)) == 5


def test_a_finished_run_is_not_trained_on(there, capsys):
    """Its last step is in the middle of an epoch, from where Trainer would take one more."""
    train = example("train")
    train.main(small("finished", max_steps=3, eval_data="null"))
    before = state(there / "finished")
    written = load_file(there / "finished" / "spatial_tokens" / "adapter_model.safetensors")
    (there / "finished" / "spatial_tokens" / "adapter_model.safetensors").unlink()  # as if killed before it was written
    capsys.readouterr()
    trainer = train.main(small("finished", max_steps=3, eval_data="null"))
    assert "finished already: finished/checkpoint-3" in capsys.readouterr().out
    assert trainer.state.global_step == 3
    assert [path.name for path in checkpoints_in("finished")] == ["checkpoint-2", "checkpoint-3"]
    assert state(there / "finished") == before
    again = load_file(there / "finished" / "spatial_tokens" / "adapter_model.safetensors")
    assert all(torch.equal(each, again[name]) for name, each in written.items())
    assert train.main(small("finished", max_steps=4, eval_data="null")).state.global_step == 4


def test_evaluation_does_not_disturb_training(there, stages):
    options = {"stage": "instruction_tuning", "start_from": "tiny-run/alignment", "data": "tiny-data/instructions.json",
               "recipe": "{global_batch_size: 4, projector_learning_rate: 0.01, lora: {rank: 4, dropout: 0.5}}"}  # fmt: skip
    train = example("train")
    train.main(small("quiet", max_steps=4, save_strategy="no", **options))
    train.main(small("disturbed", max_steps=4, save_strategy="no", eval_strategy="steps", eval_steps=1, **options))
    assert losses(there / "disturbed") == losses(there / "quiet")


def test_lengths_group_the_samples(there, stages):
    trainer = stages[1]
    assert isinstance(trainer, SpatialTokensTrainer)
    assert isinstance(trainer.train_dataset, ConversationDataset)
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    assert sorted(order) == list(range(16))
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    lengths = [trainer.train_dataset.lengths[i] for i in order]
    batches = [lengths[i : i + 8] for i in range(0, 16, 8)]
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
