"""What each of two processes does with the trained model: a Trainer logs usage, and what goes wrong in one ends both.

`test_usage` starts them, and compares with one process.
"""

from random import Random

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spatial_tokens.adapters.huggingface import load_adapter
from spatial_tokens.adapters.huggingface.ready import TRAINED_ADAPTER, trained_llava
from spatial_tokens.demo.questions import sample
from spatial_tokens.demo.scene_text import draw_scene
from spatial_tokens.demo.scenes import STANDARD
from spatial_tokens.diagnostics import log_usage, usage
from tests.processes import free_port, join

CASES = {"whole batches": (8, 2, 8), "the first batches": (8, 2, 2), "one picture each": (2, 1, 8), "copies": (7, 2, 8)}


def prepared(count):
    """The trained model, and a question about each of so many scenes, as samples with labels."""
    model, processor = trained_llava()
    model, processor = load_adapter(model, TRAINED_ADAPTER, processor)
    model.float().set_attn_implementation("eager")
    random = Random(3)
    drawn = [sample(random, STANDARD) for _ in range(count)]
    asked = [next(each for each in questions if each.kind == "quadrant") for _, questions in drawn]
    batch = processor(
        images=[draw_scene(scene) for scene, _ in drawn], text=[f"<image> {each.text} {each.answer}" for each in asked],
        return_tensors="pt", padding=True, padding_side="left",
    )  # fmt: skip
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    return model, [{name: each[i] for name, each in {**batch, "labels": labels}.items()} for i in range(count)]


def trainer_of(model, rows, batch_size, folder):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    return Trainer(model, arguments, eval_dataset=rows)


def logged(model, rows, batch_size, limit, folder, **batches):
    """What a Trainer logs of usage, and the report of all its batches."""
    trainer = trainer_of(model, rows, batch_size, folder)
    log_usage(trainer, limit=limit, **batches)
    trainer.evaluate()
    (entry,) = (each for each in trainer.state.log_history if "usage_gain" in each)
    return entry, usage(model, trainer.get_eval_dataloader(), gather=True).to_dict()


def together(rows):
    """Samples as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def failure(model, rows, rank):
    """What each process says where the second one's batch has no labels."""
    batch = together(rows)
    try:
        usage(model, [batch if rank == 0 else {**batch, "labels": None}], gather=True)
    except ValueError as error:
        return str(error)


def run(rank, world, port, folder):
    join(rank, world, port)
    model, rows = prepared(8)
    found = {name: logged(model, rows[:count], *options, folder) for name, (count, *options) in CASES.items()}
    found["batches of every process"], _ = logged(model, rows, 2, 8, folder, batches=[together(rows[:4])])
    found["failure"] = failure(model, rows, rank)
    torch.save(found, folder / f"found.{rank}")
    dist.barrier()  # and no destroy_process_group(), in which torch 2.6 hangs now and then


def start(world, folder):
    """Runs so many processes; each writes what it found into the folder. The first error is raised here."""
    mp.start_processes(run, (world, free_port(), folder), nprocs=world, start_method="spawn")
