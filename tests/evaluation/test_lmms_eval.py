"""lmms-eval on the trained model, as its command runs it: answers are those of `generate`, and scores tell spatial tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("lmms_eval")

import datasets
import torch
from lmms_eval.api.instance import Instance

from spatial_tokens.adapters.huggingface import attach, load_adapter, save_adapter
from spatial_tokens.adapters.huggingface.ready import TRAINED, TRAINED_ADAPTER, tiny_llava, trained_llava
from spatial_tokens.demo.questions import sample
from spatial_tokens.demo.scene_text import draw_scene
from spatial_tokens.demo.scenes import STANDARD
from spatial_tokens.errors import SpatialTokensError
from spatial_tokens.evaluation import lmms_eval_models
from spatial_tokens.evaluation.lmms_eval import SpatialTokens, SpatialTokensOnStrings

TASKS = Path(__file__).parent / "tasks"
SCENES = 120
WITH, WITHOUT = f"pretrained={TRAINED / 'base'},adapter={TRAINED_ADAPTER}", f"pretrained={TRAINED / 'base'}"
FEATURES = datasets.Features(
    question_id=datasets.Value("string"), question=datasets.Value("string"), answer=datasets.Value("string"), image=datasets.Image()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where lmms-eval runs: with questions of left, right, above and below, which POPE's yes and no answer."""
    made, random = tmp_path_factory.mktemp("lmms"), Random(7)
    rows = []
    for number in range(SCENES):
        scene, questions = sample(random, STANDARD)
        (side,) = (each for each in questions if each.kind == "side")
        rows.append({"question_id": str(number), "question": side.text, "answer": side.answer, "image": draw_scene(scene)})
    (made / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(made / "data" / "test.parquet")
    return made


def lmms_eval(folder, model_args, *options, tasks="shapes_pope"):
    """Runs the command; what it printed."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "spatial_tokens", "--model_args", model_args, "--tasks", tasks]
    where = ["--include_path", str(TASKS), "--batch_size", "16", "--device", "cpu", "--output_path", "out", "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run([*command, *where, *options], cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(folder):
    """Both runs: what was answered, and the scores."""
    found = {}
    for name, arguments in (("with", WITH), ("without", WITHOUT)):
        before = set((folder / "out").rglob("*.json*"))
        printed = lmms_eval(folder, arguments)
        assert "|shapes_pope|" in printed, printed
        logged = set((folder / "out").rglob("*.json*")) - before
        (rows,) = (path for path in logged if path.suffix == ".jsonl")
        (result,) = (path for path in logged if path.name.endswith("_results.json"))
        answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, rows.read_text("utf-8").splitlines())}
        found[name] = answers, json.loads(result.read_text("utf-8"))["results"]["shapes_pope"]["pope_accuracy,none"]
    return found


@pytest.mark.parametrize("name", ["with", "without"])
def test_answers_are_those_of_generate(folder, runs, name):
    model, processor = trained_llava()
    if name == "with":
        model, processor = load_adapter(model, TRAINED_ADAPTER, processor)
        model.float()
    answers, score = runs[name]
    right = []
    for number, row in enumerate(
        datasets.Dataset.from_parquet(str(folder / "data" / "test.parquet"), cache_dir=str(folder / "cache"))
    ):
        inputs = processor(images=row["image"], text=f"<image> {row['question']}", return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[number] == processor.decode(made, skip_special_tokens=True), row["question"]
        right.append(answers[number] == row["answer"])
    assert score == pytest.approx(sum(right) / SCENES)


def test_the_score_tells_spatial_tokens(runs):
    assert runs["with"][1] > runs["without"][1] + 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<image> {}", "likelihoods"), ("{}", "task 'text' has no images, and spatial tokens are made of images")],
)
def test_likelihoods_and_tasks_without_images(text, expected):
    """On requests as the harness makes them for `--force_simple`."""
    model = SpatialTokensOnStrings(str(TRAINED / "base"), str(TRAINED_ADAPTER), device="cpu", dtype="float32")
    scene, questions = sample(Random(3), STANDARD)
    model.task_dict = {"text": {"test": [{"image": draw_scene(scene)}]}}
    to_images = (lambda doc: [doc["image"]]) if "<image>" in text else None
    question = questions[0]

    def request(continuation):
        arguments = (question.text, continuation, to_images, 0, "text", "test")
        return Instance("loglikelihood", arguments, 0, {"task": "text", "doc_id": 0, "repeats": 1})

    if expected != "likelihoods":
        with pytest.raises(SpatialTokensError, match=expected):
            model.loglikelihood([request(" yes")])
        return
    (yes, is_yes), (no, is_no) = model.loglikelihood([request(" yes"), request(lambda doc: " no")])
    assert is_yes != is_no
    assert (yes < no) == is_yes
    model_, processor = load_adapter(trained_llava()[0], TRAINED_ADAPTER, trained_llava()[1])
    inputs = processor(images=model.task_dict["text"]["test"][0]["image"], text=f"<image> {question.text}", return_tensors="pt")
    logits = model_.float()(**inputs).logits[0, -1]
    said = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert [-each for each in (yes, no)] == pytest.approx(logits.log_softmax(-1)[said].tolist(), abs=1e-4)


def test_options_of_a_task():
    model = SpatialTokens(str(TRAINED / "base"), device="cpu", dtype="float32")
    asked = {"temperature": 0, "top_p": 0.9, "until": ["."], "image_aspect_ratio": "pad", "num_beams": 2}
    expected = {"max_new_tokens": 1024, "pad_token_id": 0, "num_beams": 2, "do_sample": False}
    assert model._generation_options(asked) == expected
    assert model._generation_options({"temperature": 0.5, "max_new_tokens": 3})["do_sample"] is True
    assert model._generation_options({"temperature": 0.5, "do_sample": False})["do_sample"] is False


@pytest.fixture
def other(tmp_path):
    """An adapter of another base."""
    torch.manual_seed(0)
    save_adapter(attach(*tiny_llava(), spatial_hidden_size=8)[0], tmp_path / "other")
    return tmp_path / "other"


def test_bad_input_is_one_line(folder, other):
    """As the command prints it, after the harness's own traceback."""
    printed = lmms_eval(folder, f"{WITHOUT},adapter={other}")
    assert "Error during evaluation: the config does not fit the model: it has grid_size (24, 24), not (12, 12)" in printed
    printed = lmms_eval(folder, f"pretrained={folder / 'nothing'}")
    assert "Error during evaluation: cannot load the model" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": "auto"}, "batch_size must be a positive integer, got 'auto'"), ({"adapter": "nowhere"}, "nowhere")],
)
def test_bad_options(options, message):
    with pytest.raises(SpatialTokensError, match=message):
        SpatialTokens(str(TRAINED / "base"), device="cpu", **options)


def test_what_is_not_supported():
    model = SpatialTokens(str(TRAINED / "base"), device="cpu")
    with pytest.raises(SpatialTokensError, match="add --force_simple"):
        model.loglikelihood([])
    with pytest.raises(SpatialTokensError, match="answers in one round"):
        model.generate_until_multi_round([])
    with pytest.raises(SpatialTokensError, match="a task has videos"):
        model._images([{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}])
    assert lmms_eval_models().model_id == "spatial_tokens"
