"""examples/train.py, but the second process dies at the third step."""

import os
import sys

from spatial_tokens.training import trainer
from tests.test_examples import example

step = trainer.SpatialTokensTrainer.training_step


def dying_step(self, *arguments, **options):
    if self.args.process_index == 1 and self.state.global_step == 2:
        os._exit(7)
    return step(self, *arguments, **options)


if __name__ == "__main__":
    trainer.SpatialTokensTrainer.training_step = dying_step
    example("train").main(sys.argv[1:])
