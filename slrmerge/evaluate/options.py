"""How to evaluate."""

from dataclasses import dataclass

VERBALIZED_TOKENS = 1024
"""Room for several answers as JSON, at least (paper, appendix A.1)."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked and how; what is None follows from the task, as in the paper.

    `data` is a file or a dataset on the Hub, of which `subset` and `split` are taken. `questions` is how many of its
    questions are asked, drawn by `seed`. `verbalized` asks for so many answers in one call. `judge` and `embeddings`
    are written as models are: a folder, a repository, or MODEL@URL. `batch` is for models in this process,
    `concurrency` and `timeout_s` are for servers.
    """

    task: str
    data: str
    subset: str | None = None
    split: str = "test"
    questions: int | None = None
    samples: int | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    min_p: float = 0.1
    seed: int = 0
    verbalized: int | None = None
    judge: str | None = None
    embeddings: str | None = None
    concurrency: int = 16
    timeout_s: float = 600.0
    batch: int = 32
    device: str = "cpu"
