"""The engines of examples/engines on CPU processes, where accelerate and DeepSpeed do not expect them.

`accelerate launch --config_file examples/engines/ENGINE.yaml -m tests.training.on_cpu SCRIPT ARGUMENTS`, in `environment(ENGINE)`.
"""

import os
import runpy
import sys

CPU = "ACCELERATE_USE_CPU"


def environment(engine):
    """What the launcher's environment must say, beside what it says already."""
    return {"DS_ACCELERATOR": "cpu", **({} if engine.startswith("zero") else {CPU: "true"})}


def allow():
    """Lets accelerate use what its launcher asked for on the CPU; it thinks FSDP and ZeRO are for GPUs alone."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import_deepspeed()
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)
    make = AcceleratorState.__init__

    def make_with_fsdp(self, *args, fsdp_plugin=None, **options):
        make(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = make_with_fsdp


def import_deepspeed():
    """DeepSpeed, without its operator that it would compile for a minute first: gloo can do the same."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


if __name__ == "__main__":
    allow()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
