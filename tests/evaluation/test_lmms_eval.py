"""lmms-eval on the trained model, as its command runs it: answers are those of `generate`, and scores tell spatial tokens."""

import json
import os
import subprocess
import sys
from itertools import pairwise
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
from spatial_tokens.evaluation.lmms_eval import SpatialTokens, SpatialTokensOnStrings, _placed

TASKS = Path(__file__).parent / "tasks"
SCENES = 120
SHARED = 31  # of which one of two processes has one question less
WITH, WITHOUT = f"pretrained={TRAINED / 'base'},adapter={TRAINED_ADAPTER}", f"pretrained={TRAINED / 'base'}"
FEATURES = datasets.Features(
    question_id=datasets.Value("string"), question=datasets.Value("string"), answer=datasets.Value("string"), image=datasets.Image()
)
SEVERAL = datasets.Features(
    question=datasets.Value("string"), answer=datasets.Value("string"), images=datasets.Sequence(datasets.Image())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where lmms-eval runs: with questions of left, right, above and below, answered by yes and no; of one scene, or two."""
    made, random = tmp_path_factory.mktemp("lmms"), Random(7)
    rows, several = [], []
    for number in range(SCENES):
        scene, questions = sample(random, STANDARD)
        (side,) = (each for each in questions if each.kind == "side")
        rows.append({"question_id": str(number), "question": side.text, "answer": side.answer, "image": draw_scene(scene)})
    for first, second in pairwise(rows[: SHARED + 1]):
        kind = len(several) % 3  # one image; two, before the text; two, where the text says
        before = ("", "", f"<image> {first['question']} {first['answer']} <image> ")[kind]
        images = [second["image"]] if kind == 0 else [first["image"], second["image"]]
        several.append({"question": before + second["question"], "answer": second["answer"], "images": images})
    (made / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(made / "data" / "test.parquet")
    datasets.Dataset.from_list(several, features=SEVERAL).to_parquet(made / "data" / "several.parquet")
    return made


def lmms_eval(folder, model_args, *options, tasks="shapes_pope", launcher=()):
    """Runs the command: what it ends with, and prints."""
    command = [sys.executable, "-m", *launcher, "lmms_eval", "--model", "spatial_tokens", "--model_args", model_args]
    where = ["--tasks", tasks, "--include_path", str(TASKS), "--batch_size", "16", "--output_path", "out", "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1",
           "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    return subprocess.run([*command, *where, *options], cwd=folder, env=env, capture_output=True, text=True, check=False)


def ran(folder, *arguments, **options):
    """A run of the command: by task, what was answered, and all scores."""
    before = set((folder / "out").rglob("*.json*"))
    done = lmms_eval(folder, *arguments, **options)
    assert "|shapes_pope" in done.stdout, done.stdout + done.stderr
    logged = set((folder / "out").rglob("*.json*")) - before
    (result,) = (path for path in logged if path.name.endswith("_results.json"))
    found = {}
    for task, scores in json.loads(result.read_text("utf-8"))["results"].items():
        (rows,) = (path for path in logged if path.name.endswith(f"_samples_{task}.jsonl"))
        lines = list(map(json.loads, rows.read_text("utf-8").splitlines()))
        found[task] = (
            {row["doc_id"]: row["filtered_resps"] for row in lines},
            {name: each for name, each in scores.items() if "stderr" not in name},
        )
        assert len(found[task][0]) == len(lines)
    return found


@pytest.fixture(scope="module")
def runs(folder):
    """Both runs: what was answered, and the score."""
    found = {name: ran(folder, arguments, "--device", "cpu") for name, arguments in (("with", WITH), ("without", WITHOUT))}
    return {name: (each["shapes_pope"][0], each["shapes_pope"][1]["pope_accuracy,none"]) for name, each in found.items()}


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


@pytest.fixture(scope="module")
def shared(folder):
    """Fewer questions, of one image and of several, by the number of processes."""
    given = (WITH, "--limit", str(SHARED))
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
                "--dynamo_backend=no", "--main_process_port=0", "-m")  # fmt: skip
    tasks = "shapes_pope,shapes_several"
    return {1: ran(folder, *given, "--device", "cpu", tasks=tasks), 2: ran(folder, *given, tasks=tasks, launcher=launcher)}


def test_two_processes_are_as_one(shared):
    for task, (answers, scores) in shared[1].items():
        assert len(answers) == SHARED
        again, same = shared[2][task]
        assert again == answers, task
        assert numbers(same) == pytest.approx(numbers(scores)), task


def numbers(scores):
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def test_several_images(folder, shared):
    model, processor = trained_llava()
    model, processor = load_adapter(model, TRAINED_ADAPTER, processor)
    model.float()
    answers, scores = shared[1]["shapes_several"]
    right = []
    for number, row in enumerate(
        datasets.Dataset.from_parquet(str(folder / "data" / "several.parquet"), cache_dir=str(folder / "cache"))
    ):
        before = ("<image> ", "<image> <image> ", "")[number % 3]
        inputs = processor(images=row["images"], text=before + row["question"], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[number] == processor.decode(made, skip_special_tokens=True), row["question"]
        right.append(answers[number] == row["answer"])
    assert scores["right,none"] == pytest.approx(sum(right) / SHARED)


def test_requests_with_many_images_are_fewer_at_once(monkeypatch, tmp_path):
    model = SpatialTokens(str(TRAINED / "base"), device="cpu", batch_size=4)
    picture = draw_scene(sample(Random(3), STANDARD)[0])
    picture.save(tmp_path / "scene.png")
    counts = [1, 0, 3, 1, 3, 1, 1, 1, 2, 2]
    model.task_dict = {"task": {"test": counts}}
    asked = []

    def inputs(messages, images):
        assert all(each.size == picture.size and each.mode == "RGB" for row in images for each in row)
        asked.append(list(map(len, images)))
        return [messages, images]

    def to_messages(count):
        files = [{"type": "image", "url": str(tmp_path / "scene.png")}] * (count - 1) + [{"type": "image", "url": picture}] * bool(
            count
        )
        return [{"role": "user", "content": [*files, {"type": "text", "text": str(count)}]}]

    monkeypatch.setattr(model, "_inputs", inputs)
    monkeypatch.setattr(model, "_answers", lambda given, _: [(each[0]["content"][-1]["text"], 1) for each in given[0]])
    requests = [("", to_messages, {}, number, "task", "test") for number in range(len(counts))]
    assert model._generate(requests, {}) == [(str(count), 1) for count in counts]
    assert asked == [[0], [1, 1, 1, 1], [1], [2, 2], [3], [3]]


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


def test_bad_input_is_the_last_line(folder, other):
    for model_args, options, message in [
        (f"{WITHOUT},adapter={other}", (), "the config does not fit the model: it has grid_size (24, 24), not (12, 12)"),
        (WITHOUT, ("--tasks", "shapes_words"), "task 'shapes_words' has no images, and spatial tokens are made of"),
    ]:
        done = lmms_eval(folder, model_args, "--device", "cpu", *options)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"lmms-eval: spatial_tokens: {message}"), done.stderr
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adapter=there", "model_args must name the model: pretrained=BASE"),
        ("llava-1.5-7b-hf", "model_args must be NAME=VALUE,NAME=VALUE, got 'llava-1.5-7b-hf'"),
        ("pretrained=./nothing", "cannot load the model './nothing'"),
        (f"{WITHOUT},adaptor=there", "no model_args adaptor; there are pretrained, adapter, "),
        (f"{WITHOUT},batch_size=0", "batch_size must be a positive integer, got 0"),
    ],
)
def test_bad_arguments_of_the_command(given, message):
    with pytest.raises(SystemExit, match=f"^lmms-eval: spatial_tokens: {message}"):
        SpatialTokens.create_from_arg_string(given, {"device": "cpu"})


def test_a_task_is_refused_for_what_it_is_not_for_one_process_share():
    model = SpatialTokens(str(TRAINED / "base"), device="cpu")
    picture = draw_scene(sample(Random(3), STANDARD)[0])
    model.task_dict = {"mixed": {"test": [[], [picture]]}, "words": {"test": [[], []]}}

    def to_messages(images):
        return [{"role": "user", "content": [*({"type": "image", "url": each} for each in images), {"type": "text", "text": "?"}]}]

    model._require_images([("", to_messages, {}, 0, "mixed", "test")])
    with pytest.raises(SpatialTokensError, match="task 'words' has no images"):
        model._require_images([("", to_messages, {}, 0, "words", "test")])


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


@pytest.mark.parametrize(("text", "expected"), [("<image> and <image> ?", " and  ?"), ("what is it ?", "what is it ?")])
def test_an_images_word_is_left_out_where_it_is_not_there_for_each(text, expected):
    message = {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": text}]}
    (placed,) = _placed([message])
    assert placed["content"] == [{"type": "image", "url": "a.png"}, {"type": "text", "text": expected}]
