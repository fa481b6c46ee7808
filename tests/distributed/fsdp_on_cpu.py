"""Ask for FSDP where there is no GPU, in the arguments and in the launch configuration."""

import os
import sys

from models import tiny
from transformers import TrainingArguments

from hfslim import SlimTrainer

if __name__ == "__main__":
    for fsdp in (True, False):
        os.environ["ACCELERATE_USE_FSDP"] = str(not fsdp).lower()
        settings = TrainingArguments(sys.argv[1], use_cpu=True, fsdp=fsdp, report_to=[])
        try:
            SlimTrainer(tiny("bert"), settings)
        except ValueError as error:
            print(error)
