"""Tasks: text, image and audio classification."""

from hfslim.tasks.base import Examples, Task
from hfslim.tasks.data import DataConfig
from hfslim.tasks.labels import Labels
from hfslim.tasks.metrics import METRICS, compute_metrics
from hfslim.tasks.models import build_model, load_model, make_config, padded_config
from hfslim.tasks.registry import TASKS, find_task

__all__ = [
    "METRICS",
    "TASKS",
    "DataConfig",
    "Examples",
    "Labels",
    "Task",
    "build_model",
    "compute_metrics",
    "find_task",
    "load_model",
    "make_config",
    "padded_config",
]
