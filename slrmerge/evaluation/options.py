"""How to evaluate."""

from dataclasses import dataclass

from slrmerge.io.options import Options, options_in

_questions, _answers, _scores, _output, _resources = map(
    options_in, ("Questions", "Answers", "Scores", "Output", "Resources")
)


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """Options of an evaluation. An option of None takes the task's default, which is the paper's.

    `judge` and `embeddings` are models: a folder, a repository on the Hub, or MODEL@URL.
    """

    subset: str | None = _questions(None, "Configuration of a Hub dataset.")
    split: str = _questions("test", "Split of a Hub dataset.")
    questions: int | None = _questions(
        None, "Number of questions to ask, chosen at random by --seed.", minimum=1, default_help="all"
    )
    missed: bool = _questions(
        True, "Ask only what the first model misses with greedy decoding (reasoning).", flag="--missed/--no-missed"
    )
    samples: int | None = _answers(
        None, "Samples per question.", minimum=1, default_help="as in the paper: 128, 32, 64"
    )
    max_tokens: int | None = _answers(
        None, "Maximum length of an answer in tokens.", minimum=1, default_help="as in the paper: 64, 4096, 4096"
    )
    temperature: float = _answers(1.0, "Sampling temperature; 0 is greedy decoding.", minimum=0)
    min_p: float = _answers(
        0.1,
        "Minimum probability of a token, relative to the most probable one; 0 for servers without min_p.",
        minimum=0,
        maximum=1,
    )
    seed: int = _answers(0, "Random seed.", minimum=0)
    verbalized: int | None = _answers(None, "Request K answers at once (verbalized sampling).", minimum=2, metavar="K")
    judge: str | None = _scores(
        None,
        "Model that matches answers (open-qa) or grades texts (creative): a folder, a repository, or MODEL@URL.",
        metavar="MODEL",
    )
    embeddings: str | None = _scores(
        None, "Model for diversity (creative): a sentence-transformers model, or MODEL@URL.", metavar="MODEL"
    )
    extract: str = _scores(
        "number",
        "How to read answers (reasoning): number, lm-evaluation-harness's strict-match or flexible-extract, or "
        "math-verify, for answers other than numbers.",
        choices=("number", "strict-match", "flexible-extract", "math-verify"),
        metavar="HOW",
    )
    export: str | None = _output(
        None,
        "Also write the results in another form: noveltybench, inspect (inspect-ai's log), every-eval-ever.",
        choices=("noveltybench", "inspect", "every-eval-ever"),
        metavar="FORM",
    )
    concurrency: int = _resources(16, "Maximum concurrent requests per server.", minimum=1, maximum=1000)
    timeout_s: float = _resources(600.0, "Seconds that a server has to answer.", above=0, flag="--timeout")
    batch: int | str = _resources(
        "auto",
        "Batch size of models in this process, or auto: as many answers as memory holds.",
        minimum=1,
        or_auto=True,
    )
    dtype: str | None = _resources(
        None,
        "Dtype of models in this process.",
        choices=("float32", "bfloat16", "float16"),
        default_help="float32; from 1e9 parameters the stored dtype, where it is faster",
    )
    device: str = _resources("cpu", "Torch device of models in this process, such as cuda:0; CUDA is not tested yet.")
