"""Tasks: text, image and audio classification."""

from hfslim.tasks.audio import AudioClassification
from hfslim.tasks.base import Examples, Task
from hfslim.tasks.data import DataConfig
from hfslim.tasks.image import ImageClassification
from hfslim.tasks.labels import Labels
from hfslim.tasks.metrics import METRICS, compute_metrics
from hfslim.tasks.models import build_model, load_model, make_config
from hfslim.tasks.text import TextClassification

TASKS: dict[str, Task] = {
    task.name: task for task in (TextClassification(), ImageClassification(), AudioClassification())
}

__all__ = [
    "METRICS",
    "TASKS",
    "DataConfig",
    "Examples",
    "Labels",
    "Task",
    "build_model",
    "compute_metrics",
    "load_model",
    "make_config",
]
