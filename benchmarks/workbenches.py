"""A recipe's data and a trained model, ready for what a benchmark does to them."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging as transformers_logging

from hfslim.pipeline.recipe import load_recipe
from hfslim.pipeline.task_examples import TaskExamples, uses_cpu
from hfslim.tasks import TASKS


def opened(
    recipe: str, model: str, overrides: Sequence[str]
) -> tuple[TaskExamples, PreTrainedModel]:
    """Read a recipe's data for a model, and the model, in eval mode; log no more than errors."""
    logging.getLogger("hfslim").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    read = load_recipe(recipe, overrides)
    arguments = TrainingArguments(
        use_cpu=uses_cpu(),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=not TASKS[read.task].lazy,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
    )
    bench = TaskExamples.prepare(
        read.task, read.data, read.metric, read.seed, arguments, model=model
    )
    return bench, bench.load_model(model).to(arguments.device).eval()
