"""Writes each process's distillation losses with the live and with the cached teacher.

Usage, under torchrun: cached_teacher.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_paired_teacher
from test_teacher_cache import losses


def main(folder: Path) -> None:
    runs = {
        name: losses(folder / name, cache)
        for name, cache in (
            ("live", None),
            ("filled", folder / "cache"),
            ("read", folder / "cache"),
        )
    }
    (folder / f"losses.{torch.distributed.get_rank()}.json").write_text(json.dumps(runs))
    test_paired_teacher.main(folder / "paired")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
