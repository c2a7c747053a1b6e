"""Evaluation: the paper's tasks (section 4) run on any models.

Models generate samples (`models`, `server`, `local`), every sample is kept (`samples`), a task scores them (`tasks`),
and `result`, `output` and `page` present the scores. `run.evaluate` does all of it.
"""
