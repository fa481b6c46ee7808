"""Writes each process's distillation losses with the live and with the cached teacher.

Usage, under torchrun: cached_teacher.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import paired_teachers
from augmented_caches import trained as augmented
from cached_features import FEATURES, trained
from cached_losses import losses


def main(folder: Path) -> None:
    # Two steps an epoch, of two batches on each process: step 3 is in the middle of the second.
    runs = {}
    for name, cache in (("live", None), ("filled", folder / "cache"), ("read", folder / "cache")):
        runs[name] = losses(folder / name, cache, save_steps=3)
        checkpoint = folder / name / "checkpoint-3"
        assert 1 < json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] < 2
        runs[f"{name}, resumed"] = losses(
            folder / name, cache, save_steps=3, resume=str(checkpoint)
        )
    (folder / f"losses.{torch.distributed.get_rank()}.json").write_text(json.dumps(runs))
    paired_teachers.main(folder / "paired")
    kept = {"feature_losses": FEATURES}
    inside = {"live": trained(folder / "inside", None, **kept)}
    for name in ("filled", "read"):
        cache = folder / "inside" / "cache"
        inside[name] = trained(folder / "inside", cache, teacher_cache_features=True, **kept)
    rank = torch.distributed.get_rank()
    (folder / "inside" / f"losses.{rank}.json").write_text(
        json.dumps({name: [entry["loss"] for entry in log] for name, log in inside.items()})
    )
    changed = {
        "live": augmented(folder / "augmented", None, live_epochs=2),
        "filled": augmented(
            folder / "augmented", folder / "augmented" / "cache", teacher_cache_epochs=2
        ),
    }
    assert {entry["teacher_cache_hits"] for entry in changed["filled"]} == {1.0}
    (folder / "augmented" / f"losses.{rank}.json").write_text(
        json.dumps({name: [e["loss_distillation"] for e in log] for name, log in changed.items()})
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
