"""Why a folder or repository without safetensors files under the usual names is not a model, and what to do."""

import re
from pathlib import Path

from slrmerge.checkpoint.location import is_broken_link
from slrmerge.checkpoint.side_files import INDEX_NAME, SINGLE_NAME
from slrmerge.errors import Problem

_OTHER_FORMATS = {
    r"(.*/)?(model_index\.json|diffusion_pytorch_model.*)": (
        "is a pipeline of diffusers, or a part of one",
        "only models of transformers are supported: of a pipeline, name a folder such as text_encoder",
    ),
    r"consolidated.*\.safetensors": (
        "has its weights in Mistral's own format only (consolidated*.safetensors)",
        "name a folder or repository that has the same model in transformers' format, as model*.safetensors",
    ),
    r"model\.(?!safetensors).+\.safetensors": (
        "has only a variant of the weights (model.VARIANT.safetensors)",
        "load it with from_pretrained(FOLDER, variant=VARIANT), and save it with save_pretrained",
    ),
}
"""Other formats by a pattern of their file names: what it is, and what to do."""

_NAME_A_FOLDER = (
    "name a folder with config.json and safetensors files, a .gguf file, or a repository as organisation/name"
)


def no_folder(path: Path) -> Problem:
    """Why a path is not a checkpoint folder."""
    if is_broken_link(path):
        remedy = "mount the disk that it leads to, or name the folder itself"
        return Problem("broken-link", str(path), "is a broken link", remedy)
    what = "is a file, not a checkpoint folder" if path.exists() else "no such folder"
    return Problem("no-checkpoint", str(path), what, _NAME_A_FOLDER)


def no_model(names: set[str], where: str) -> Problem:
    """Why files of these names are not a safetensors model, and what to do."""
    suffixes = {Path(name).suffix for name in names}
    is_sharded = any(name.startswith("model-") for name in names)
    for pattern, (what, remedy) in _OTHER_FORMATS.items():
        if not is_sharded and any(re.fullmatch(pattern, name, re.DOTALL) for name in names):
            return Problem("no-index", where, what, remedy)
    if ".safetensors" in suffixes:
        what = f"has safetensors files, but neither {SINGLE_NAME} nor {INDEX_NAME}"
        return Problem("no-index", where, what, "name the folder that save_pretrained wrote, or restore its index")
    if suffixes & {".bin", ".pt", ".pth"}:
        source = where.partition("@")[0]
        copy = Path(source).name + "-safetensors"
        remedy = (
            f"convert it: python -c \"import transformers as t; s, o = '{source}', '{copy}'; "
            'getattr(t, t.AutoConfig.from_pretrained(s).architectures[0]).from_pretrained(s).save_pretrained(o)"; '
            "then copy its tokenizer there"
        )
        return Problem("pickles-only", where, "has only pickles, no safetensors files", remedy)
    if ".gguf" in suffixes:
        what = "has only GGUF files, which are not read from the Hub"
        remedy = f"download one and name it: hf download {where.partition('@')[0]} FILE.gguf --local-dir ."
        return Problem("gguf-only", where, what, remedy)
    return Problem("no-checkpoint", where, "has no safetensors files", _NAME_A_FOLDER)
