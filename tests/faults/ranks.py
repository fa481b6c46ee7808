"""One of two ranks trains, and meets with an accident at a step.

Usage, under torchrun: ranks.py FOLDER RESULT [SIGNAL STEP], where rank 1 sends itself the signal.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from killed import Events, structure_of, trainer_of
from transformers import TrainerCallback

from hfslim.training.checkpoint_folders import last_whole


class Accident(TrainerCallback):
    def __init__(self, kind: str, step: int) -> None:
        self.signal, self.step = getattr(signal, kind), step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), self.signal)


def main(folder: Path, result: Path, *accident: str) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(folder, Events(folder, None), enable_jit_checkpoint=True)
    if accident:
        trainer.add_callback(Accident(accident[0], int(accident[1])))
    trainer.train(resume_from_checkpoint=last_whole(folder)[0] is not None)
    saved = {"structure": structure_of(trainer).digest(), "weights": trainer.model.state_dict()}
    torch.save(saved, result.with_suffix(f".{trainer.args.process_index}"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
