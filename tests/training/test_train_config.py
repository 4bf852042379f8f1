"""What examples/train.py is told: config files, the command line, the environment; bad ones are refused in one line."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from spatial_tokens import SpatialTokensError
from tests.test_examples import example
from tests.training.script import CONFIGS, ROOT, SCRIPT, small


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_step": 1}, "unknown key 'max_step'; did you mean 'max_steps'"),
        ({"stage": "both"}, "stage must be one of alignment, instruction_tuning"),
        ({"recipe": "{batch: 3}"}, "recipe: .*batch"),
        ({"recipe": "{lora: {r: 3}}"}, "recipe: .*'r'"),
        ({"recipe": "{lora: {rank: 0}}"}, "recipe: rank must be a positive integer"),
        ({"recipe": "{global_batch_size: 8.0}"}, "recipe: global_batch_size must be a positive integer"),
        ({"recipe": "[1]"}, "recipe must be a mapping"),
        ({"projector": "[1]"}, "projector must be a mapping"),
        ({"max_length": "abc"}, "max_length must be an integer, greater than 0, got 'abc'"),
        ({"max_steps": "abc"}, "max_steps"),
        ({"seed": "abc"}, "seed must be an integer"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an integer, greater than 0, got 0"),
        ({"learning_rate": 1}, "learning_rate follows from the stage; change projector_learning_rate under recipe:"),
        ({"lerning_rate": 1}, "unknown key 'lerning_rate'; learning_rate follows from the stage; change projector_learning_rate"),
        ({"eval_strategy": "steps", "eval_data": "null"}, "eval_strategy and eval_on_start need eval_data"),
        ({"eval_on_start": "true", "eval_data": "null"}, "eval_strategy and eval_on_start need eval_data"),
        ({"adam_beta1": 1}, "adam_beta1 must be a finite number from 0.0 to below 1.0, got 1"),
        ({"dataloader_persistent_workers": "true", "dataloader_num_workers": 1}, "cannot be resumed exactly"),
        ({"save_only_model": "true"}, "save_only_model"),
        ({"data": "{a"}, "--data is not valid YAML"),
        ({"per_device_train_batch_size": 3}, "global_batch_size 4 is no multiple of the 3 samples"),
        ({"model": "tiny-data"}, "cannot load the model"),
        ({"data": "nothing.json"}, "cannot read nothing.json"),
        ({"start_from": "nothing"}, "cannot read nothing/spatial_tokens/adapter_config.json"),
        ({"on_bad_sample": "hide"}, "on_bad_sample must be"),
        ({"on_nan": "hide"}, "on_nan must be 'stop' or 'continue', got 'hide'"),
        ({"seed": 2**32}, "seed must be an integer from 0 to 2\\*\\*32 - 1, got 4294967296"),
        ({"data_seed": -1}, "data_seed must be an integer or null from 0"),
        ({"seed": "true"}, "seed must be an integer"),
        ({"max_steps": -5}, "max_steps must be an integer, greater than 0, or -1"),
        ({"max_steps": 10**400}, "max_steps must be an integer, .*got 1000"),
        ({"save_steps": ".nan"}, "save_steps must be a finite number, greater than 0, got nan"),
        ({"eval_steps": 0}, "eval_steps must be a finite number or null, greater than 0, got 0"),
        ({"num_train_epochs": ".inf"}, "num_train_epochs must be a finite number"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a finite number, at least 0, got -1"),
        ({"max_length": "true"}, "max_length must be an integer, .*got True"),
        ({"use_cpu": 1}, "use_cpu must be true or false, got 1"),
        ({"output_dir": 3}, "output_dir must be a text or null, got 3"),
        ({"output_dir": "null"}, "lacks output_dir"),
        ({"output_dir": "tiny-data/alignment.json"}, "cannot make the directory tiny-data/alignment.json"),
        ({"fp16": "true"}, "fp16 needs a GPU"),
        ({"fp16": "true", "bf16": "true"}, "alignment.yaml: .*fp16"),
        ({"report_to": "nothing-known"}, "alignment.yaml: nothing-known is not supported"),
        ({"dataloader_prefetch_factor": 2}, "alignment.yaml: .*prefetch_factor"),
        ({"log_level": "loud"}, "alignment.yaml: unknown value 'loud'"),
        ({"optim_args": "abc"}, "alignment.yaml: not enough values to unpack"),
        ({"resume_from_checkpoint": "there"}, "leave resume_from_checkpoint out"),
        ({"recipe": "{num_epochs: 0}"}, "recipe: num_epochs must be greater than 0"),
        ({"recipe": "{projector_learning_rate: .inf}"}, "recipe: projector_learning_rate must be a number that is finite"),
        ({"recipe": "{1: 2}"}, "recipe: keywords must be strings"),
        ({"projector": "{kernels: 2}"}, "projector: unknown field 'kernels'"),
        ({"projector": "{1: 2}"}, "projector: unknown field 1"),
        ({"recipe": "{num_epochs: 1, num_epochs: 2}"}, "--recipe is not valid YAML: the key 'num_epochs' is there twice"),
        ({"recipe": "[" * 2000}, "--recipe is not valid YAML: maximum recursion depth"),
        ({"data": "2026-99-99"}, "--data is not valid YAML: month must be"),
    ],
)
def test_a_config_that_cannot_be_run(there, changes, said):
    with pytest.raises(SpatialTokensError, match=said):
        example("train").main(small("never", **changes))


def as_command(monkeypatch, *words):
    """What the script exits with."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return ended.value.code


def test_the_command_says_so_in_one_line(there, monkeypatch):
    assert re.fullmatch("train.py: error: .*unknown key 'max_step'.*", as_command(monkeypatch, *small("never", max_step=1)))
    assert as_command(monkeypatch, "--seed", "1").startswith("train.py: error: give a config")


def test_without_a_config_it_draws_pictures_for_a_tiny_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    (config,) = example("train").tiny_run()
    assert Path(config).samefile(SCRIPT.parent / "configs" / "tiny" / "alignment.yaml")
    assert (tmp_path / "tiny-data" / "alignment.json").is_file()
    assert capsys.readouterr().out.startswith("no config was given: ")


def test_help_is_a_text_and_no_error(monkeypatch, capsys):
    assert not as_command(monkeypatch, "--help")
    assert re.match(r"usage: train.py \[CONFIG.yaml\] \[--name value ...\]\n(.*\n)+ +on_bad_sample", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "must hold names and values, got None"),
     ("[[model]]", "must hold names and values"),
     ("1: tiny", "must hold names and values, got {1: 'tiny'}"),
     ("stage: alignment\nmodel: tiny\nmodel: tiny", "the key 'model' is there twice"),
     ("model: tiny", "lacks stage, data, images, output_dir"),
     ("model: \0", "is not valid YAML")],
)  # fmt: skip
def test_a_config_file_that_cannot_be_read(there, text, said):
    Path("some.yaml").write_text(text)
    with pytest.raises(SpatialTokensError, match=re.escape(said)):
        example("train").read_config(["some.yaml"])


@pytest.mark.parametrize("path", ["nothing.yaml", "tiny-data", "tiny-data/images/0.png"])
def test_a_config_that_is_no_text_file(there, path):
    with pytest.raises(SpatialTokensError, match=f"cannot read {path}"):
        example("train").read_config([path])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed"], "--name value pairs, got --seed"),
        (["seed", "1"], "--name value pairs"),
        (["--seed", "1"] * 2, "--seed is given twice"),
    ],
)
def test_words_that_are_no_pairs(words, said):
    with pytest.raises(SpatialTokensError, match=said):
        example("train").read_config([str(CONFIGS / "alignment.yaml"), *words])


@pytest.mark.parametrize("told", ["0", "-1", "two", ""])
def test_a_number_of_processes_that_is_none(monkeypatch, told):
    monkeypatch.setenv("WORLD_SIZE", told)
    with pytest.raises(SpatialTokensError, match=f"WORLD_SIZE must be a positive integer.*got '{told}'"):
        example("train").read_config(small("never"))


def test_yaml_reads_numbers():
    train = example("train")
    assert train.parsed("{a: 2e-5, b: 1e3, c: -1.5E+2, d: 3, e: no, f: 1e, g: e5}", "here") == {
        "a": 2e-5, "b": 1000.0, "c": -150.0, "d": 3, "e": False, "f": "1e", "g": "e5",
    }  # fmt: skip


def test_the_papers_configs_are_the_recipe(monkeypatch):
    train = example("train")
    monkeypatch.setattr(train, "num_processes", lambda: 8)
    for name, per_device in (("alignment", 32), ("instruction_tuning", 16)):
        path = ROOT / "examples" / "configs" / "llava-1.5-7b" / f"{name}.yaml"
        run, stage, training = train.read_config([str(path), "--bf16", "false"])
        assert stage is train.STAGES[name] or stage == train.STAGES[name]
        assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == stage.global_batch_size
        assert training.per_device_train_batch_size == per_device
        assert training.num_train_epochs == 1
        assert run.recipe == {}
