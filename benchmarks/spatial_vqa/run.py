"""Do spatial tokens help? The whole comparison in one command, which can be stopped and started again.

python benchmarks/spatial_vqa/run.py --trial     two designs for some tens of steps, which rank nothing: does it run here, how fast?
python benchmarks/spatial_vqa/run.py --quick     four of the main designs; 18 minutes on 2 cores
python benchmarks/spatial_vqa/run.py --full      every design, and the main ones on fewer scenes; hours
python benchmarks/spatial_vqa/run.py --factorized     dense or factorized kernels; days, with what `--full` has made

`--language-model smollm2` gives any of them a pretrained language model, and a folder of its own.

What is done lies in the work folder (the encoder, the language model, a file for each run) and is not done twice; a run that was
stopped resumes from a checkpoint, which it writes once a minute. `results.json` there holds all runs so far, whenever the command
ends. docs/evidence.md is made of committed ones by benchmarks/figures.py.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import datetime
from itertools import groupby
from pathlib import Path
from queue import Empty
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # in place of this folder

import torch

from spatial_tokens import SpatialTokensError
from spatial_tokens.bench.machine import describe
from spatial_tokens.errors import reason
from spatial_tokens.storage.files import make_directory, write_text
from spatial_tokens.storage.text import read_text

try:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from benchmarks.spatial_vqa import dense_or_factorized, tables, tasks
    from benchmarks.spatial_vqa.optimization import Pretraining
    from benchmarks.spatial_vqa.plans import PLANS, Compression, Job, Plan, with_smollm2
    from benchmarks.spatial_vqa.results import Results
    from benchmarks.spatial_vqa.smollm2 import SmolLM2
    from benchmarks.spatial_vqa.splits import SPLITS, digest, examples
    from spatial_tokens.demo.scenes import VERSION
except ImportError as error:
    sys.exit(f"run.py: error: {reason(error)}; in a clone: pip install -e '.[timm,train,bench]' 'torch>=2.9'")

Task = tuple[Callable[..., None], tuple[Any, ...]]
RUNNERS: dict[type, Callable[..., None]] = {Job: tasks.run_job, Compression: tasks.run_compression}


def main(arguments: list[str]) -> None:
    """Runs a plan, or resumes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group(required=True)
    for name, plan in PLANS.items():
        size.add_argument(f"--{name}", dest="plan", action="store_const", const=plan, help=f"{len(plan.jobs)} runs")
    parser.add_argument("--work", type=Path, default=Path("spatial-vqa-work"), help="the work folder [spatial-vqa-work]")
    parser.add_argument("--language-model", choices=("own", "smollm2"), default="own", help="trained here, or SmolLM2-135M [own]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models are trained [cpu]")
    parser.add_argument("--workers", type=int, help="processes, of one thread each [one a core; one with a GPU]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run later than that")
    options = parser.parse_args(arguments)
    plan, device, workers = options.plan, options.device, options.workers
    if workers is None:
        workers = os.cpu_count() if device == "cpu" else 1
    if workers < 1:
        raise SpatialTokensError(f"--workers must be at least 1, got {workers}")
    if not options.minutes >= 0:
        raise SpatialTokensError(f"--minutes must not be negative, got {options.minutes}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SpatialTokensError("--device cuda: torch finds no CUDA device; leave --device out to run on the CPU")
    if options.language_model == "smollm2":
        SmolLM2().find()
        plan = with_smollm2(plan)
    work = make_directory(options.work / (plan.folder or plan.name))
    results = make_directory(options.work / plan.name) / "results.json"
    fresh, began = not any(work.iterdir()), time.monotonic()
    claim_folder(work, plan)
    try:
        run_plan(plan, work, workers, began + 60 * options.minutes, device)
    finally:
        found = None
        if runs_in(work).keys() & {job.name for job in plan.jobs}:
            found = collect(plan, work, device)
            if fresh:
                found |= {"minutes": (time.monotonic() - began) / 60, "workers": workers}  # that all of it took
            write_text(results, json.dumps(found, separators=(",", ":")))
    if found is None:
        print(f"0 of {len(plan.jobs)} runs are done")
        return
    summary = dense_or_factorized.summary if plan.folder else tables.summary
    Console().print(Markdown(summary(Results(found))))
    print(tables.caution(Results(found)))
    done = len(found["runs"]) + len(found.get("compressions", ()))
    print(f"{done} of {len(plan.jobs)} runs are in {results}")


def claim_folder(work: Path, plan: Plan) -> None:
    """Makes the folder this plan's: another may go on in it that differs in its runs alone.

    Raises:
        SpatialTokensError: If it holds what came of other scenes, of another encoder or language model, or of other rates.
    """
    path = work / "made_from.json"
    made_from = {"version": VERSION, "scenes": plan.scenes, "vision": asdict(plan.vision), "language": asdict(plan.language)}
    stages = [asdict(each) for each in plan.stages]
    for each in stages:
        del each["kernel_learning_rate"]  # a job's
    text = json.dumps({**made_from, "stages": stages})
    if path.exists() and read_text(path) != text:
        raise SpatialTokensError(f"{work} holds what another plan has left; give another --work, or delete it")
    write_text(path, text)


def run_plan(plan: Plan, work: Path, workers: int, until: float, device: str = "cpu") -> None:
    """Does what is not done yet, in the plan's order.

    Raises:
        SpatialTokensError: If a run that is done is damaged, before others begin; or if a process was killed.
    """
    make_directory(work / "runs")
    for path in runs_in(work).values():
        read(path)
    # glibc then keeps memory for the next step, which is a sixth of a step's time.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**30))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    pool = ProcessPoolExecutor(workers, context, initializer=tasks.begin, initargs=(queue,))
    with Progress(*columns) as progress, pool:
        todo = [job for job in plan.jobs if not is_done(job, plan, work)]
        overall = progress.add_task("runs", total=len(plan.jobs), completed=len(plan.jobs) - len(todo))
        steps: list[list[Task]] = [[(each, (plan, work, device)) for each in (tasks.make_language_model, tasks.make_features)]]
        for kind, jobs in groupby(todo, type):  # a model is there before it is compressed
            steps.append([(RUNNERS[kind], (job, plan, work, device)) for job in jobs])
        for step in steps:
            try:
                run_tasks(pool, workers, step, queue, progress, until)
            except BrokenProcessPool as error:
                raise SpatialTokensError(
                    "a process was killed, as happens where memory runs out; the same command resumes: give fewer --workers"
                ) from error
            progress.update(overall, completed=sum(is_done(job, plan, work) for job in plan.jobs))


def run_tasks(pool: ProcessPoolExecutor, workers: int, todo: list[Task], queue: Any, progress: Progress, until: float) -> None:
    """Runs tasks, as many at once as there are workers, and shows how far they are: in bars, or in lines where no terminal is."""
    left, running, bars = iter(todo), set[Future[None]](), dict[str, Any]()
    while True:
        while len(running) < workers and time.monotonic() < until and (task := next(left, None)) is not None:
            running.add(pool.submit(task[0], *task[1]))
        if not running:
            return
        done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for name, steps, total in reports(queue):
            if not progress.console.is_terminal and (name not in bars or steps == total):
                print(f"{datetime.now():%H:%M} {name}: {steps} of {total}", flush=True)
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=steps, visible=steps < total)
        for each in done:
            each.result()
            progress.advance(progress.task_ids[0], todo[0][0] in RUNNERS.values())


def reports(queue: Any) -> Iterable[tuple[str, int, int]]:
    """What the tasks have reported since."""
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return


def is_done(job: Job | Compression, plan: Plan, work: Path) -> bool:
    """Whether what a job writes is there."""
    return job.name in runs_in(work) and (job not in plan.kept or tasks.model_file(work, job).exists())


def runs_in(work: Path) -> dict[str, Path]:
    """The runs that are done, by name."""
    return {path.stem: path for path in sorted((work / "runs").glob("*.json"))}


def read(path: Path) -> Any:
    """What a task has written.

    Raises:
        SpatialTokensError: If it is damaged: tasks write whole files only.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SpatialTokensError(f"{path} is damaged ({reason(error)}); delete it, and the same command makes it again") from error


def collect(plan: Plan, work: Path, device: str = "cpu") -> dict[str, Any]:
    """All results so far; attention maps, which are large, of the first seed alone.

    Of a plan that works in another's folder what its page uses: the other's results tell the rest.
    """
    trains_language_model = isinstance(plan.language, Pretraining)
    names = (tasks.ENCODER, tasks.LANGUAGE_MODEL) if trains_language_model else (tasks.ENCODER,)
    pretrained = {Path(name).stem: read((work / name).with_suffix(".json")) for name in names}
    found = runs_in(work)
    done = [(job, read(found[job.name])) for job in plan.jobs if job.name in found]
    runs = [run for job, run in done if isinstance(job, Job)]
    values = {
        "benchmark": {"version": VERSION, "digests": {split: digest(examples(split, 20)) for split in SPLITS}},
        "machine": describe(torch.device(device)),
        "plan": {"name": plan.name, "vision": asdict(plan.vision), "language": asdict(plan.language), "held_out": plan.held_out},
        "pretrained": pretrained,
        "planned": len(plan.jobs),
    }  # fmt: skip
    if plan.folder is not None:
        compressions = [run for job, run in done if isinstance(job, Compression)]
        return {**values, "runs": [without_details(run) for run in runs], "compressions": compressions}
    pretrained["from_patches"] = tasks.read_patches(work)
    if trains_language_model:
        pretrained["from_words"] = tasks.read_words(work)
    for run in runs:
        if run["seed"] > 0:
            for each in run.get("attention", {}).values():
                each.pop("map", None)
    return {**values, "runs": runs}


def without_details(run: dict[str, Any]) -> dict[str, Any]:
    """A run without attention, other pictures' tokens, and validation but at the end."""
    kept = {name: value for name, value in run.items() if name not in ("attention", "strangers", "steps", "losses")}
    return {**kept, "seconds": round(run["seconds"]), "curve": [{"validation": run["curve"][-1]["validation"]}]}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SpatialTokensError as error:
        sys.exit(f"run.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("run.py: stopped; the same command resumes")
