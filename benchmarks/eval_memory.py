"""The peak memory of `slrmerge eval creative` on generated answers: importing, measuring, reporting.

The answers are words at random, from a file of generations that all models share. With `--judge`, a loopback server
grades every one of them.

    python benchmarks/eval_memory.py --questions 2000 --samples 64 --models 5 --characters 4000
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from eval import serving

WORDS = 5000

GRADES = json.dumps({"request": 5, "language": 5, "craft": 5, "invention": 5, "effect": 5})


def write_answers(folder: Path, questions: int, samples: int, characters: int) -> tuple[Path, Path]:
    """The questions, one per line, and their generations."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(WORDS)]
    data, generations = folder / "questions.txt", folder / "answers.jsonl"
    with data.open("w") as questions_file, generations.open("w") as file:
        for number in range(questions):
            prompt = f"Write text number {number}."
            texts = [" ".join(chance.choices(words, k=characters // 6))[:characters] for _ in range(samples)]
            questions_file.write(f"{prompt}\n")
            file.write(json.dumps({"prompt": prompt, "generations": texts}) + "\n")
    return data, generations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--characters", type=int, default=4000, help="of an answer (default 4000)")
    parser.add_argument("--judge", action="store_true", help="grade all answers by a server that answers at once")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(GRADES) as url:
        data, generations = write_answers(Path(folder), chosen.questions, chosen.samples, chosen.characters)
        models = [word for number in range(chosen.models) for word in ("--model", f"m{number}={generations}")]
        command = [sys.executable, "-m", "slrmerge", "eval", "creative", "--data", str(data), *models]
        command += ["--samples", str(chosen.samples), "--out", f"{folder}/eval", "--quiet"]
        command += ["--judge", f"m@{url}"] if chosen.judge else []
        start = time.perf_counter()
        subprocess.run(command, check=True)
        elapsed_s = time.perf_counter() - start
        written = (Path(folder) / "eval" / "samples.jsonl").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child
    print(f"{chosen}\nsamples.jsonl {written / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {elapsed_s:.0f} s")


if __name__ == "__main__":
    main()
