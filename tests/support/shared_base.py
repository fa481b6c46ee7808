"""Prints by how many bytes memory grew, at its peak, when a teacher was made.

Usage: shared_base.py FOLDER; the folder gets a base of 60 MB and an adapter.
"""

import gc
import json
import resource
import sys
from pathlib import Path

import torch
from models import tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from hfslim.distillation.teacher.teacher import load_teacher
from hfslim.pruning.surgery.reversible_slices import return_memory


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(folder: Path) -> None:
    base = folder / "base"
    # Weights of another dtype than the file's are no view of the file.
    tiny("bert", vocab_size=480_000).to(torch.bfloat16).save_pretrained(base)

    def adapted() -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))

    adapted().save_pretrained(folder / "adapter")
    student = adapted()
    size = sum(p.numel() * 4 for p in student.get_base_model().parameters())
    grown = []
    for owner in (student, student.get_base_model()):
        # What was freed before must not hide what is taken now.
        gc.collect()
        return_memory()
        ballast = torch.ones(max(0, peak() - current()) // 4)
        before = peak()
        teacher = load_teacher(folder / "adapter", owner, allow_untrained=True)
        grown.append(peak() - before)
        del teacher, ballast
    print(json.dumps({"base": size, "shared": grown[0], "own": grown[1]}))


def current() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
