"""Tasks: what is asked, and what the answers are worth (paper, section 4.1). A task is one class, named in `TASKS`."""

from slrmerge.evaluate.tasks.base import Answered, Helpers, Metric, Plot, Scored, Task
from slrmerge.evaluate.tasks.creative import Creative
from slrmerge.evaluate.tasks.open_qa import OpenQA
from slrmerge.evaluate.tasks.reasoning import Reasoning

TASKS: dict[str, type[Task]] = {"open-qa": OpenQA, "creative": Creative, "reasoning": Reasoning}
"""The tasks by the names that the command line gives them."""

__all__ = ["TASKS", "Answered", "Helpers", "Metric", "Plot", "Scored", "Task"]
