"""examples/train.py as the tests run it: in this process or its own, with few steps of a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train.py"
CONFIGS = ROOT / "examples" / "configs" / "tiny"
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "src")))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "TOKENIZERS_PARALLELISM": "false"}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = {
    "per_device_train_batch_size": 2,
    "recipe": "{global_batch_size: 4, projector_learning_rate: 0.01}",
    "disable_tqdm": "true",
    "max_steps": 6,
    "save_steps": 2,
}


def arguments(config, **changes):
    return [str(config), *(word for name, value in changes.items() for word in (f"--{name}", str(value)))]


def small(output, **changes):
    return arguments(CONFIGS / "alignment.yaml", **{"output_dir": output, **SMALL, **changes})


def run(there, *words, ok=True, environment=None):
    command, environment = [sys.executable, *map(str, words)], {**ENVIRONMENT, **(environment or {})}
    done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def state(output):
    return json.loads((output / "trainer_state.json").read_text())


def losses(output):
    return [entry["loss"] for entry in state(output)["log_history"] if "loss" in entry]
