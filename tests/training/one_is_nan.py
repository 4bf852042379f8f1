"""examples/train.py, but at the second step the loss of the second process is NaN; each process prints what stopped it."""

import math
import sys

import torch

from spatial_tokens import SpatialTokensError
from spatial_tokens.training import trainer
from tests.test_examples import example

step = trainer.SpatialTokensTrainer.training_step


def step_with_nan(self, *arguments, **options):
    wrong = self.args.process_index == 1 and self.state.global_step == 1
    return step(self, *arguments, **options) * (math.nan if wrong else 1)


if __name__ == "__main__":
    trainer.SpatialTokensTrainer.training_step = step_with_nan
    try:
        example("train").main(sys.argv[1:])
    except SpatialTokensError as error:
        torch.distributed.barrier()  # or the launcher ends the one that is later
        sys.stdout.write(f"stopped: {error}\n")
        sys.exit(1)
