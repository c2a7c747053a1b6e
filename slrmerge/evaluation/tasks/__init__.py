"""Evaluation tasks (paper, section 4.1). A task is one class, listed in `TASKS`."""

from typing import Any

from slrmerge.evaluation.tasks.base import Task
from slrmerge.evaluation.tasks.creative import Creative
from slrmerge.evaluation.tasks.open_qa import OpenQA
from slrmerge.evaluation.tasks.reasoning import Reasoning

TASKS: dict[str, type[Task[Any]]] = {task.name: task for task in (OpenQA, Creative, Reasoning)}
"""The tasks by name."""
