"""What each process holds after a step of AdamW, under each engine.

python benchmarks/scale_out.py      takes three minutes on two cores, and 6 GiB

All widths are a quarter of the paper's, so every figure is a sixteenth.
"""

import gc
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spatial_tokens import SPProjector, SPProjectorConfig
from spatial_tokens.bench.comparison import Row
from spatial_tokens.bench.machine import PeakMemory, describe
from spatial_tokens.bench.report import Report
from spatial_tokens.training.tensor_parallel import parallelize_projector

CONFIG = SPProjectorConfig.from_preset("llava-sp-cropping", vision_hidden_size=256, spatial_hidden_size=128, text_hidden_size=1024)
BATCH = 4
RESULTS = Path(__file__).parent / "results" / "cpu" / "scale_out.json"


def num_bytes(tensors):
    """What they take in this process, each storage counted once."""
    local = [each.to_local() if hasattr(each, "to_local") else each for each in tensors if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in local}.values())


def one_step(model, projector, share):
    """A step of torch's AdamW; the bytes of parameters, gradients and the optimizer's state."""
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    loss_of(model, share).backward()
    gradients = num_bytes(each.grad for each in projector.parameters())
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    return num_bytes(projector.parameters()), gradients, num_bytes(state)


def loss_of(model, share):
    patches = torch.randn(BATCH, CONFIG.num_patches, CONFIG.vision_hidden_size, generator=torch.Generator().manual_seed(0))
    return model(patches[share]).square().mean()


def none(projector, world, share):
    return one_step(projector, projector, share)


def ddp(projector, world, share):
    return one_step(DistributedDataParallel(projector), projector, share)


def fsdp2(projector, world, share):
    fully_shard(projector, mesh=init_device_mesh("cpu", (world,)))
    return one_step(projector, projector, share)


def zero2(projector, world, share):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first; gloo can do the same
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 2**20},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=projector, optimizer=optimizer, config=settings)
    engine.backward(loss_of(engine, share))
    held = engine.optimizer
    gradients = num_bytes(each for parts in held.averaged_gradients.values() for each in parts)
    engine.step()
    state = [tensor for values in held.optimizer.state.values() for tensor in values.values()]
    return num_bytes(projector.parameters()), gradients, num_bytes([*state, *held.single_partition_of_fp32_groups])


def by_output(projector, world, share):
    return one_step(parallelize_projector(projector, init_device_mesh("cpu", (world,)), "output"), projector, slice(None))


def by_input(projector, world, share):
    return one_step(parallelize_projector(projector, init_device_mesh("cpu", (world,)), "input"), projector, slice(None))


ENGINES = {
    "none": none,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "ZeRO-2": zero2,
    "tensor parallel, output": by_output,
    "tensor parallel, input": by_input,
}


def run(rank, world, port, name, folder):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    gc.collect()
    with PeakMemory(torch.device("cpu")) as peak:
        share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        held = ENGINES[name](SPProjector.from_config(CONFIG), world, share)
    values = dict(zip(("parameters_mib", "gradients_mib", "optimizer_mib"), (each / 2**20 for each in held), strict=True))
    torch.save({**values, "peak_mib": (peak.num_bytes or float("nan")) / 2**20}, f"{folder}/{rank}")
    dist.destroy_process_group()


def rows(name, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (world, port, name, folder), nprocs=world)
        for rank in range(world):
            yield Row("scale_out", "memory", name, {"processes": world, "rank": rank}, torch.load(f"{folder}/{rank}"))


def main():
    found = [row for name in ENGINES for world in ((1,) if name == "none" else (2, 4)) for row in rows(name, world)]
    for row in found:
        print(row.implementation, dict(row.setting), {name: round(value) for name, value in row.values.items()})
    Report("python benchmarks/scale_out.py", {**describe(torch.device("cpu")), "parameters": CONFIG.num_parameters}, found).write(
        RESULTS
    )


if __name__ == "__main__":
    main()
