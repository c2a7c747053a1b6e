"""How to evaluate."""

from dataclasses import dataclass

from slrmerge.io.options import Options, option


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """Options of an evaluation. An option of None takes the task's default, which is the paper's.

    `judge` and `embeddings` are models: a folder, a repository on the Hub, or MODEL@URL.
    """

    subset: str | None = option(None, "Configuration of a Hub dataset.", group="Questions")
    split: str = option("test", "Split of a Hub dataset.", group="Questions")
    questions: int | None = option(
        None,
        "Number of questions to ask, chosen at random by --seed.",
        minimum=1,
        default_help="all",
        group="Questions",
    )
    missed: bool = option(
        True,
        "Ask only what the first model misses with greedy decoding (reasoning).",
        flag="--missed/--no-missed",
        group="Questions",
    )
    samples: int | None = option(
        None, "Samples per question.", minimum=1, default_help="as in the paper: 128, 32, 64", group="Answers"
    )
    max_tokens: int | None = option(
        None,
        "Maximum length of an answer in tokens.",
        minimum=1,
        default_help="as in the paper: 64, 4096, 4096",
        group="Answers",
    )
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy decoding.", minimum=0, group="Answers")
    min_p: float = option(
        0.1,
        "Minimum probability of a token, relative to the most probable one; 0 for servers without min_p.",
        minimum=0,
        maximum=1,
        group="Answers",
    )
    seed: int = option(0, "Random seed.", minimum=0, group="Answers")
    verbalized: int | None = option(
        None, "Request K answers at once (verbalized sampling).", minimum=2, metavar="K", group="Answers"
    )
    judge: str | None = option(
        None,
        "Model that matches answers (open-qa) or grades texts (creative): a folder, a repository, or MODEL@URL.",
        metavar="MODEL",
        group="Scores",
    )
    embeddings: str | None = option(
        None,
        "Model for diversity (creative): a sentence-transformers model, or MODEL@URL.",
        metavar="MODEL",
        group="Scores",
    )
    extract: str = option(
        "number",
        "How to read answers (reasoning): number, lm-evaluation-harness's strict-match or flexible-extract, or "
        "math-verify, for answers other than numbers.",
        choices=("number", "strict-match", "flexible-extract", "math-verify"),
        metavar="HOW",
        group="Scores",
    )
    export: str | None = option(
        None,
        "Also write the results in another form: noveltybench, inspect (inspect-ai's log), every-eval-ever.",
        choices=("noveltybench", "inspect", "every-eval-ever"),
        metavar="FORM",
        group="Output",
    )
    concurrency: int = option(16, "Maximum concurrent requests per server.", minimum=1, maximum=1000, group="Resources")
    timeout_s: float = option(
        600.0, "Seconds that a server has to answer.", above=0, flag="--timeout", group="Resources"
    )
    batch: int | str = option(
        "auto",
        "Batch size of models in this process, or auto: as many answers as memory holds.",
        minimum=1,
        or_auto=True,
        group="Resources",
    )
    dtype: str | None = option(
        None,
        "Dtype of models in this process.",
        choices=("float32", "bfloat16", "float16"),
        default_help="float32; from 1e9 parameters the stored dtype, where it is faster",
        group="Resources",
    )
    device: str = option(
        "cpu",
        "Torch device of models in this process, such as cuda:0; CUDA is not tested yet.",
        group="Resources",
    )
