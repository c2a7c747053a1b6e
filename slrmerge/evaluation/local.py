"""A model in this process, run by transformers in batches."""

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, BinaryIO

import torch
import xxhash

from slrmerge.checkpoint.files import open_within
from slrmerge.checkpoint.location import Place, Repository
from slrmerge.checkpoint.pair import open_checkpoint
from slrmerge.checkpoint.side_files import MANIFEST_NAME, fetch_side_files
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.evaluation.models import AnswerSink, SampleRequest
from slrmerge.evaluation.samples import Answer, Settings
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.io.progress import Progress
from slrmerge.io.text import printable
from slrmerge.searching.prompts import load_tokenizer, render


class LocalModel:
    """A ChatModel from a folder or a repository on the Hub, in float32 on a CPU, otherwise in its stored dtype.

    A sample depends only on its prompt and its seed, not on the rest of its batch, except for rounding and where the
    longest prompt of the batch leaves less than `max_tokens`. Raises CheckpointError and HubError, and
    UnsupportedModelError for a GGUF file.
    """

    def __init__(self, at: Place, *, device: str, batch: int, progress: Progress) -> None:
        self._at, self._checkpoint = at, open_checkpoint(at)
        if self._checkpoint.computed:
            what = "is an adapter, which an evaluation does not load"
            remedy = "write the whole model first: merge with alpha: 0, and evaluate the result"
            raise UnsupportedModelError(Problem("adapter", str(self._checkpoint), what, remedy))
        if self._checkpoint.format == "gguf":
            what, remedy = "is a GGUF file, which is not run here", "serve it with llama-server, and name the URL"
            raise UnsupportedModelError(Problem("gguf", str(self._checkpoint), what, remedy))
        self._device, self._batch, self._progress = torch.device(device), batch, progress
        self._loaded: tuple[Any, Any] | None = None
        self._prompt = lru_cache(batch)(self._rendered)  # a prompt's samples follow each other

    @cached_property
    def model_id(self) -> str:
        """The commit on the Hub; or the folder's name and a digest that identifies weights, tokenizer and config."""
        checkpoint = self._checkpoint
        if isinstance(self._at, Repository):
            return checkpoint.reference
        manifest = checkpoint.folder / MANIFEST_NAME
        digest = xxhash.xxh3_64()
        if manifest.exists():
            with open_within(checkpoint.folder, MANIFEST_NAME) as file:
                _update(digest, file)
        else:
            changed_ns = [file.fetch().stat().st_mtime_ns for file in checkpoint.weight_files.values()]
            digest.update(repr((checkpoint.fingerprint(), changed_ns)).encode())
        for name, side_file in checkpoint.side_files.items():
            digest.update(os.fsencode(name))
            with open(side_file.fetch(), "rb") as file:
                _update(digest, file)
        return f"{printable(checkpoint.folder.name)} {digest.hexdigest()}"

    def close(self) -> None:
        """See `ChatModel`."""
        self._loaded = None

    def check(self) -> None:
        """See `ChatModel`; downloads the small files and requires a chat template."""
        fetch_side_files(self._checkpoint.side_files)
        load_tokenizer(self._checkpoint.folder)

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """See `ChatModel`; refuses prompts that are too long. Raises UnsupportedModelError for one it cannot load."""
        for start in range(0, len(requests), self._batch):
            batch = [request for request in requests[start : start + self._batch] if not self._refuses(request, sink)]
            for request, answer in zip(batch, self._answer(batch, settings) if batch else [], strict=True):
                sink.keep(request, answer)

    def _refuses(self, request: SampleRequest, sink: AnswerSink) -> bool:
        """Whether a prompt is too long, which `sink` is then told."""
        _, length = self._prompt(request.prompt)
        model, _ = self._ready()
        if length < _most_tokens(model):
            return False
        what = f"a prompt has {length:,} tokens, more than the model reads"
        sink.refuse(request, UnsupportedModelError(Problem("prompt-too-long", str(self._checkpoint), what)))
        return True

    def _rendered(self, prompt: str) -> tuple[str, int]:
        """A prompt as the model reads it, and its length in tokens."""
        _, tokenizer = self._ready()
        text = render(tokenizer, prompt)
        return text, len(tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def _answer(self, requests: Sequence[SampleRequest], settings: Settings) -> list[Answer]:
        model, tokenizer = self._ready()
        texts = [self._prompt(request.prompt)[0] for request in requests]
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self._device)
        length = inputs["input_ids"].shape[1]
        room = _most_tokens(model) - length
        generated = model.generate(
            **inputs,
            max_new_tokens=min(settings.max_tokens, room),
            do_sample=False,  # sampling is the noise that _sampling adds to the scores
            logits_processor=_sampling(settings, [request.seed for request in requests]),
        )
        ends = set(model.generation_config.eos_token_id)
        return [_answer_of(tokenizer, row, ends) for row in generated[:, length:].tolist()]

    def _ready(self) -> tuple[Any, Any]:
        """The model and its tokenizer, loaded at the first use."""
        self._loaded = self._loaded or self._load()
        return self._loaded

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        fetch_side_files(self._checkpoint.side_files)
        self._checkpoint = self._checkpoint.download(self._progress)
        folder = self._checkpoint.folder
        tokenizer = load_tokenizer(folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
        dtype = torch.float32 if self._device.type == "cpu" else "auto"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
            )
        except Exception as error:  # a model's files may raise anything while they are loaded
            what = f"transformers cannot load it ({type(error).__name__}: {first_line(error)})"
            raise UnsupportedModelError(Problem("model-not-loadable", str(self._checkpoint), what)) from error
        model.to(self._device)
        known = model.generation_config.eos_token_id
        ends = sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None})
        if not ends:
            raise UnsupportedModelError(Problem("no-eos-token", str(self._checkpoint), "has no end-of-sequence token"))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
        # The model's own generation config may contain sampling settings; only the options count here.
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers' own
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        return model.eval(), tokenizer


def _most_tokens(model: Any) -> int:
    """The tokens that a model reads, those of its answer included."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def _update(digest: xxhash.xxh3_64, file: BinaryIO) -> None:
    """Add a file's content to a digest, in chunks."""
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)


def _sampling(settings: Settings, seeds: Sequence[int]) -> list[Any]:
    """Logits processors that turn greedy decoding into sampling; none for temperature 0."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper

    if not settings.temperature:
        return []
    min_p = [MinPLogitsWarper(settings.min_p)] if settings.min_p else []
    return [TemperatureLogitsWarper(settings.temperature), *min_p, _Gumbel(seeds)]


class _Gumbel:
    """Adds Gumbel noise to the logits, from one generator per row: their maximum is then a sample of the distribution.

    The noise is generated on the CPU, so that it is the same for every device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 (transformers' interface)
        width = scores.shape[1]
        noise = torch.stack([torch.empty(width).exponential_(generator=generator) for generator in self._generators])
        return scores - noise.log().to(scores)


def _answer_of(tokenizer: Any, ids: list[int], ends: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text, "length" if end is None else "stop")
