"""What `accelerate launch` starts: three steps of the tiny LLaVA under the engine of its config."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.training.workers import ROWS, OfLlava, optimizer_of, share, three_steps, zero_steps


def main(folder):
    case = OfLlava()  # before, as transformers initializes a model in parts with other random numbers
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    rows, engine = share(rank, world), accelerator.distributed_type.value
    if engine == "DEEPSPEED":
        plugin = accelerator.state.deepspeed_plugin
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = len(rows)
        if plugin.zero_stage == 3:
            rows = list(ROWS)[rank::world]  # an image for each
    model, optimizer = accelerator.prepare(case.model, optimizer_of(case.model))
    found = zero_steps(case, model, rows) if engine == "DEEPSPEED" else three_steps(case, model, rows, optimizer)
    case.save(folder / "adapter")
    torch.save({**found, "engine": engine}, folder / f"found.{accelerator.process_index}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
