"""What `accelerate launch` starts: three steps of the tiny LLaVA under the engine of its config."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from tests.training.workers import OfLlava, optimizer_of, share, three_steps, zero_steps


def main(folder):
    accelerator = Accelerator()
    rows = share(accelerator.process_index, accelerator.num_processes)
    engine = accelerator.distributed_type.value
    if engine == "DEEPSPEED":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = len(rows)
    case = OfLlava()
    model, optimizer = accelerator.prepare(case.model, optimizer_of(case.model))
    found = zero_steps(case, model, rows) if engine == "DEEPSPEED" else three_steps(case, model, rows, optimizer)
    case.save(folder / "adapter")
    torch.save({**found, "engine": engine}, folder / f"found.{accelerator.process_index}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
