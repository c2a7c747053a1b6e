"""The README's evaluation: the effect of restoring layers of the example pair, measured by samples."""

from pathlib import Path

from slrmerge.evaluation.run import evaluate
from slrmerge.merging.executor import merge
from tests.conftest import TINY


def test_the_hybrid_is_more_diverse_and_slightly_less_precise(tmp_path: Path) -> None:
    merge(TINY / "recipe.yaml", tmp_path / "hybrid")
    models = {"post": TINY / "posttrained", "slr": tmp_path / "hybrid"}
    result = evaluate("open-qa", TINY / "questions.json", models, tmp_path / "eval", samples=16, max_tokens=4)
    precision, entropy, coverage = (result.cell("slr", metric.name) for metric in result.metrics[:3])
    assert entropy.change_low > 0.3
    assert coverage.change_low > 0.2
    assert -0.25 < precision.change_low < precision.change_high <= 0
