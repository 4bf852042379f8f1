"""What each of several processes does: three training steps under each engine, and what it saw of them.

`test_scale_out` starts them, and compares with the same steps of one process.
"""

import tempfile
from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from spatial_tokens import SPProjector, SPProjectorConfig
from spatial_tokens.training.tensor_parallel import parallelize_projector
from tests.processes import free_port, join
from tests.training.on_cpu import import_deepspeed

ROWS = range(4)

# What is trained

SMALL = {"vision_hidden_size": 8, "text_hidden_size": 12, "grid_size": 8, "kernel_sizes": (4, 8), "spatial_hidden_size": 8}
UNEVEN = {"vision_hidden_size": 5, "text_hidden_size": 5, "grid_size": 5, "kernel_sizes": (1, 3, 5), "spatial_hidden_size": 7}
CONFIGS = {
    "cropping": SPProjectorConfig(**SMALL, detail_kernel_size=4),
    "pooling": SPProjectorConfig(
        **SMALL, variant="pooling", detail_kernel_size=None, detail_stride=None, spatial_head="linear", spatial_head_bias=False
    ),
    "uneven": SPProjectorConfig(**UNEVEN, detail_kernel_size=3),
    "factorized": SPProjectorConfig(**SMALL, detail_kernel_size=4, rank=4, frequencies=2),
}


class OfProjector:
    """A projector that learns to give random tokens."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.config = CONFIGS[name]
        self.model = self.projector = SPProjector.from_config(self.config)
        self.patches = torch.randn(len(ROWS), self.config.num_patches, self.config.vision_hidden_size)
        self.targets = torch.randn(len(ROWS), self.config.num_tokens, self.config.text_hidden_size)

    def loss(self, model, rows):
        return (model(self.patches[rows]) - self.targets[rows]).square().mean()

    def save(self, folder):
        self.model.save_pretrained(folder)


class OfLlava:
    """A LLaVA whose vision encoder is frozen: two rows with an image, two of text alone, with as many targets each."""

    def __init__(self):
        from tests.adapters.huggingface.models import llava

        self.attach_to(*llava())

    def attach_to(self, base, plain):
        from spatial_tokens.adapters.huggingface import attach
        from tests.adapters.huggingface.models import FIELDS, pictures

        torch.manual_seed(1)
        self.model, processor = attach(base, plain, **FIELDS)
        self.projector = self.model.spatial_tokens
        self.model.train()
        for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector):
            part.requires_grad_(False)
        first, second = pictures(2)
        self.batch = dict(
            processor(
                text=["<image> ab", "<image> cd", "xabc", "yabd"], images=[[first], [second], [], []],
                return_tensors="pt", padding=True, padding_side="right",
            )
        )  # fmt: skip
        ids = self.batch["input_ids"]
        self.batch["labels"] = ids.masked_fill((ids > 98) | (self.batch["attention_mask"] == 0), -100)
        assert ((self.batch["labels"][:, 1:] != -100).sum(1) == 3).all()

    def loss(self, model, rows):
        batch = {name: each[rows] for name, each in self.batch.items() if name != "pixel_values"}
        with_image = [row for row in rows if row < 2]
        if with_image:
            batch["pixel_values"] = self.batch["pixel_values"][with_image]
        return model(**batch).loss

    def save(self, folder):
        from spatial_tokens.adapters.huggingface import save_adapter

        save_adapter(self.model, folder)


CASES = {**{name: partial(OfProjector, name) for name in CONFIGS}, "llava": OfLlava}

# Three steps


def optimizer_of(model):
    """AdamW, with an `eps` that is large beside the rounding errors of a gradient that should be zero."""
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2, eps=1e-2)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def mean(loss):
    """Over all processes."""
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def three_steps(case, model, rows, optimizer=None):
    """The losses, and the gradients of the first step."""
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    losses, gradients = [], None
    for _ in range(3):
        optimizer.zero_grad()
        loss = case.loss(model, rows)
        loss.backward()
        losses.append(mean(loss))
        if gradients is None:
            gradients = {name: whole(each.grad) for name, each in case.model.named_parameters() if each.grad is not None}
        optimizer.step()
    return {"losses": losses, "gradients": gradients}


def zero_steps(case, engine, rows):
    """The same with DeepSpeed's engine, which has a backward pass and a step of its own."""
    from deepspeed.utils import safe_get_full_grad

    losses, gradients = [], None
    for _ in range(3):
        loss = case.loss(engine, rows)
        engine.backward(loss)
        losses.append(mean(loss))
        if gradients is None:
            gradients = {name: safe_get_full_grad(each) for name, each in case.model.named_parameters() if each.requires_grad}
        engine.step()
    return {"losses": losses, "gradients": gradients}


def share(rank, world):
    """The rows of one process."""
    return list(ROWS[rank * len(ROWS) // world : (rank + 1) * len(ROWS) // world])


# The engines


def alone(case):
    return three_steps(case, case.model, list(ROWS))


def ddp(case, rank, world):
    return three_steps(case, DistributedDataParallel(case.model), share(rank, world))


def fsdp2(case, rank, world):
    mesh = init_device_mesh("cpu", (world,))
    layers = case.model.model.language_model.layers if isinstance(case, OfLlava) else []
    for part in (*layers, case.projector, case.model):
        if not hasattr(part, "unshard"):
            fully_shard(part, mesh=mesh)
    return three_steps(case, case.model, share(rank, world))


def zero2(case, rank, world):
    settings = {
        "train_micro_batch_size_per_gpu": len(ROWS) // world, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = import_deepspeed().initialize(model=case.model, optimizer=optimizer_of(case.model), config=settings)
    return zero_steps(case, engine, share(rank, world))


def tensor_parallel(shard, case, rank, world):
    kernels = sum(each.numel() for each in case.projector.extractor.parameters())
    parallelize_projector(case.projector, init_device_mesh("cpu", (world,)), shard)
    held = sum(each.to_local().untyped_storage().nbytes() // 4 for each in case.projector.extractor.parameters())
    with CommDebugMode() as collectives, torch.no_grad():
        case.loss(case.model, list(ROWS))
    steps = three_steps(case, case.model, list(ROWS))
    return {**steps, "share": held / kernels, "collectives": collectives.get_total_counts()}


def both(shard, case, rank, world):
    """Tensor parallelism over one dimension of a mesh, FSDP2 over the other."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_projector(case.projector, mesh["tp"], shard)
    fully_shard(case.model, mesh=mesh["dp"])
    return three_steps(case, case.model, share(mesh["dp"].get_local_rank(), world // 2))


def state_dicts(case, rank, world):
    """A clipped gradient; weights through a sharded checkpoint of torch's, and from the first process, into other projectors."""

    def gradient_norm():
        case.model.zero_grad()
        case.loss(case.model, list(ROWS)).backward()
        return whole(torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)).item()

    def another(shard):
        torch.manual_seed(1)
        return parallelize_projector(SPProjector.from_config(case.config), mesh, shard)

    mesh = init_device_mesh("cpu", (world,))
    expected, norms = {name: each.clone() for name, each in case.model.state_dict().items()}, [gradient_norm()]
    parallelize_projector(case.model, mesh)
    norms.append(gradient_norm())

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    checkpoint.save({"model": get_model_state_dict(case.model)}, checkpoint_id=folder[0])
    from_shards, from_whole = another("input"), another("output")
    tensors = get_model_state_dict(from_shards)
    checkpoint.load({"model": tensors}, checkpoint_id=folder[0])
    set_model_state_dict(from_shards, tensors)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(from_whole, dict(expected) if rank == 0 else {}, options=options)

    found = [{name: whole(each) for name, each in made.state_dict().items()} for made in (case.model, from_shards, from_whole)]
    return {"norms": norms, "same": [all(torch.equal(each, expected[name]) for name, each in made.items()) for made in found]}


FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not in torch 2.6
BY_OUTPUT, BY_INPUT = (partial(tensor_parallel, shard) for shard in ("output", "input"))
STATE_DICTS = "state dicts, cropping"
CHECKS = {
    f"{name}, {case}": (engine, case)
    for name, engine, cases in [
        ("ddp", ddp, ("cropping", "llava")),
        ("fsdp2", fsdp2, ("cropping", "factorized", "llava")),
        ("tensor parallel by output", BY_OUTPUT, CASES),
        ("tensor parallel by input", BY_INPUT, CASES),
        ("fsdp2 and tensor parallel by output", partial(both, "output"), ("cropping",)),
        ("fsdp2 and tensor parallel by input", partial(both, "input"), ("cropping",)),
        ("state dicts", state_dicts, ("cropping",)),
        ("zero2", zero2, ("cropping", "llava") if find_spec("deepspeed") else ()),
    ]
    for case in cases
    if FSDP_ON_CPU or "fsdp2" not in name
}


def run(rank, world, port, folder):
    join(rank, world, port)
    from tests.training.zero3 import CHECKS_OF_TWO

    for name, (engine, case_name) in {**CHECKS, **(CHECKS_OF_TWO if world == 2 else {})}.items():
        try:
            case = CASES[case_name]()
            found = engine(case, rank, world)
            case.save(folder / name)
        except Exception as error:
            raise RuntimeError(f"{name}, process {rank} of {world}") from error
        torch.save(found, folder / f"{name}.{rank}")
    dist.barrier()  # and no destroy_process_group(), in which torch 2.6 hangs now and then


def start(world, folder):
    """Runs all checks in so many processes; each writes what it found into the folder. The first error is raised here."""
    context = mp.start_processes(run, (world, free_port(), folder), nprocs=world, join=False, start_method="spawn")
    for _ in range(30):
        if context.join(timeout=10):
            return
    for process in context.processes:
        process.kill()
    raise TimeoutError(f"{world} processes did not end in five minutes")
