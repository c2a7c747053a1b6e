"""examples/paper on the example pair: in this process and through servers; a second run computes nothing."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from slrmerge.errors import DataError, OutputError
from slrmerge.evaluation.local import LocalModel
from slrmerge.evaluation.server import ServerModel
from slrmerge.searching.run import Search
from tests.conftest import TINY
from tests.documentation import ROOT
from tests.evaluation.openai_server import MODELS, OpenAIServer

sys.path.insert(0, str(ROOT / "examples" / "paper"))
import run as paper  # a script

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("paper"), pytest.mark.timeout(900)]

SERVER = """
import json, random, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send({"object": "list", "data": [{"id": sys.argv[1], "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, draw = body["messages"][0]["content"], random.Random(body["seed"])
        assert body["model"] == sys.argv[1]
        text = f"{draw.randrange(10)}"
        if "JSON" in prompt:
            text = json.dumps({"answers": [{"text": str(draw.randrange(10)), "probability": 0.25} for _ in range(4)]})
        message = {"role": "assistant", "content": text}
        self.send({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def send(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
"""A model server that answers with a digit, and to a request for several answers with four."""

EVERY = ["early", "late", "post", "slr", "soup"]


def command(folder: Path, out: Path, *more: object, writing: Sequence[str] = ("joke", "poem", "story")) -> list[str]:
    """The command's arguments for two questions of every task, with four samples."""
    (folder / "sums.json").write_text(json.dumps([{"question": f"{n} plus 90?", "answer": n + 90} for n in range(3)]))
    data = ["--open-qa", TINY / "questions.json", "--reasoning", folder / "sums.json"]
    for kind in writing:
        (folder / f"{kind}.txt").write_text(f"Tell me a {kind}.\nTell me another {kind}.\n")
        data += [f"--{kind}", folder / f"{kind}.txt"]
    sizes = ["--quick", "--questions", 2, "--samples", 4, "--max-tokens", 6]
    return [str(word) for word in (TINY / "recipe.yaml", "--out", out, *data, *sizes, *more)]


def run(arguments: Sequence[str]) -> str:
    done = CliRunner().invoke(paper.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def state(out: Path) -> dict[str, bytes]:
    """The content of what takes time to compute."""
    patterns = ("search/*", "models/*/*", "*/*.jsonl", "*/embeddings-*")
    files = [path for pattern in patterns for path in sorted(out.glob(pattern)) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def tables_of(report: str) -> dict[int, list[str]]:
    """The methods in each table of a report."""
    found = re.findall(r"^## Table (\d).*?$(.*?)(?=^## )", report, re.MULTILINE | re.DOTALL)
    return {int(number): re.findall(r"^\| ([A-Z][\w-]+) \| .*\d\.\d", text, re.MULTILINE) for number, text in found}


def forbid(monkeypatch: pytest.MonkeyPatch, *methods: tuple[type, str]) -> None:
    """Make these methods fail."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("computes again")

    for kind, name in methods:
        monkeypatch.setattr(kind, name, fail)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in this process: the prompt for several answers is longer than the example pair reads."""
    folder = tmp_path_factory.mktemp("paper")
    run(command(folder, folder / "out", "--serve", ""))
    return folder


def test_a_pair_goes_through_the_paper_in_one_command(done: Path) -> None:
    report = (done / "out" / "report.md").read_text()
    three = ["Post-trained", "Proxy-Soup", "SLR"]
    four = ["Post-trained", "SLR-Early", "SLR-Late", "SLR"]
    assert tables_of(report) == {1: [], 2: [], 3: three, 4: three, 5: three, 6: [], 7: four}
    assert "layers 2–8" in report
    for figure in re.findall(r"\]\((.*?\.png)\)", report):
        assert (done / "out" / figure).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def beside(done: Path) -> Path:
    """A folder in which a copy of the finished run finds the pair: its recipes name it relative to themselves."""
    return Path(tempfile.mkdtemp(dir=done.parent))


@pytest.mark.usefixtures("sketched")
def test_a_second_run_computes_nothing(done: Path, beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = beside / "out"
    shutil.copytree(done / "out", out)
    monkeypatch.setattr(paper.slr, "merge", None)
    before, report = state(out), (out / "report.md").read_bytes()
    assert {name.split("/")[0] for name in before} >= {"search", "models", "open-qa", "joke", "story-hot", "reasoning"}
    forbid(monkeypatch, (Search, "run"), (LocalModel, "_answer"))
    run(command(beside, out, "--serve", ""))
    assert state(out) == before
    assert (out / "report.md").read_bytes() == report


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    """The server of the judge and of the embeddings."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with OpenAIServer("m") as made:
        yield made


@pytest.mark.usefixtures("sketched")
def test_models_are_served_one_after_the_other_and_only_where_samples_are_missing(
    done: Path, beside: Path, helper: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, script = beside / "out", beside / "server.py"
    for name in ("search", "models"):
        shutil.copytree(done / "out" / name, out / name)
    script.write_text(SERVER)
    grades = json.dumps(dict.fromkeys(("request", "language", "craft", "invention", "effect"), 5))
    helper.say = lambda prompt, seed, body: grades
    helpers = [f"--{name}=m@{helper.url}" for name in ("judge", "embeddings")]
    serve = f"{sys.executable} {script} {{name}} {{port}}"
    arguments = command(beside, out, *helpers, "--serve", serve, writing=["joke"])
    run(arguments)
    assert sorted(log.stem for log in out.glob("*.log")) == EVERY
    three = ["Post-trained", "Proxy-Soup", "SLR"]
    report = (out / "report.md").read_text()
    assert tables_of(report) == dict.fromkeys(range(1, 7), three) | {
        7: ["Post-trained", "SLR-Early", "SLR-Late", "SLR"]
    }
    assert "Not measured: poem, story." in report
    assert "joke: quality | joke: diversity" in report
    before = state(out)
    forbid(monkeypatch, (ServerModel, "_complete"), (ServerModel, "embed"))
    shutil.move(script, beside / "moved.py")
    run(arguments)
    assert state(out) == before


def test_a_server_that_wants_an_api_key_is_ready(helper: OpenAIServer, tmp_path: Path) -> None:
    helper.misbehave(503, path=MODELS)
    helper.misbehave(401, path=MODELS, times=None)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        paper.wait_for(f"{helper.url}/models", server, tmp_path)
        server.communicate()
    assert len(helper.requests) == 2


ENDED = """
import sys; sys.path.insert(0, sys.argv[1])
import os, signal
from pathlib import Path
import run, slrmerge
script = Path(sys.argv[2])
settings = run.Run(script.parent, {}, {}, {}, True, f"{sys.executable} {script} {{name}} {{port}}", slrmerge.Progress())
port = run.free_port()
with run.serving(settings, "post", name="m", port=port):
    print(port, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_server_ends_with_a_run_that_is_terminated(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    words = [sys.executable, "-c", ENDED, ROOT / "examples" / "paper", tmp_path / "server.py"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(ended.stdout))).close()


def test_another_pair_in_the_folder_of_a_run_is_an_error(done: Path, beside: Path) -> None:
    out = beside / "out"
    shutil.copytree(done / "out" / "search", out / "search")
    shutil.copytree(TINY, beside / "other")
    arguments = command(beside, out, "--serve", "")
    found = CliRunner().invoke(paper.main, [str(beside / "other" / "recipe.yaml"), *arguments[1:]])
    assert found.exit_code == OutputError.exit_code
    assert not (out / "models").exists()


def test_wrong_data_is_an_error_before_the_search(tmp_path: Path) -> None:
    arguments = command(tmp_path, tmp_path / "out", "--serve", "")
    (tmp_path / "sums.json").write_text('[{"question": "How many?", "answer": "many"}]')
    found = CliRunner().invoke(paper.main, arguments)
    assert (found.exit_code, (tmp_path / "out").exists()) == (DataError.exit_code, False)
