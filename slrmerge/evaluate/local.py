"""A model in this process: transformers' own, asked in batches."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash

from slrmerge.chat import load_tokenizer, render
from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.evaluate.models import Ask
from slrmerge.evaluate.samples import Answer, Settings
from slrmerge.hub import open_checkpoint
from slrmerge.plan import MANIFEST_NAME, fetch_side_files, side_files
from slrmerge.progress import Progress
from slrmerge.repository import Source


class LocalModel:
    """A Model from a folder or a repository on the Hub, in float32 on a CPU, elsewhere in the dtype it is stored in.

    A sample depends on its prompt and its seed alone, not on what stands beside it in a batch, but for rounding and
    where the longest prompt of a batch leaves less room than is asked for. Raises CheckpointError and HubError for what
    is no sound checkpoint.
    """

    def __init__(self, at: Source, *, device: str, batch: int, progress: Progress) -> None:
        self._checkpoint = open_checkpoint(at)
        self._device, self._batch, self._progress = torch.device(device), batch, progress
        self._loaded: tuple[Any, Any] | None = None

    @cached_property
    def asked_of(self) -> str:
        """The commit on the Hub; or the folder and a digest of what tells its weights, tokenizer and config apart."""
        checkpoint = self._checkpoint
        if checkpoint.snapshot:
            return str(checkpoint.snapshot.pinned)
        manifest = checkpoint.folder / MANIFEST_NAME
        if manifest.exists():
            state = manifest.read_bytes()
        else:
            shards = checkpoint.shards.items()
            state = repr(
                [(name, s.header_digest, s.identity.file_bytes, s.identity.mtime_ns) for name, s in shards]
            ).encode()
        digest = xxhash.xxh3_64(state)
        for name, file in side_files(checkpoint):
            digest.update(name.encode())
            digest.update(Path(str(file)).read_bytes())
        return f"{checkpoint.folder.name} {digest.hexdigest()}"

    def close(self) -> None:
        """See `Model`: frees the weights."""
        self._loaded = None

    def check(self) -> None:
        """See `Model`: there must be a chat template. Fetches what is small."""
        fetch_side_files(self._checkpoint)
        load_tokenizer(self._checkpoint.folder)

    def answer(self, asks: Sequence[Ask], settings: Settings, keep: Callable[[Ask, Answer], None]) -> None:
        """See `Model`. Raises UnsupportedModelError where transformers cannot load it or a prompt is too long."""
        for start in range(0, len(asks), self._batch):
            batch = asks[start : start + self._batch]
            for ask, answer in zip(batch, self._answer(batch, settings), strict=True):
                keep(ask, answer)

    @torch.inference_mode()
    def _answer(self, asks: Sequence[Ask], settings: Settings) -> list[Answer]:
        model, tokenizer = self._loaded = self._loaded or self._load()
        texts = [render(tokenizer, ask.prompt) for ask in asks]
        inputs = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(self._device)
        length = inputs["input_ids"].shape[1]
        room = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30) - length
        if room < 1:
            raise UnsupportedModelError(Problem(str(self._checkpoint), f"cannot read a prompt of {length:,} tokens"))
        made = model.generate(
            **inputs,
            max_new_tokens=min(settings.max_tokens, room),
            do_sample=False,  # the noise in the scores is the sampling
            logits_processor=_sampling(settings, [ask.seed for ask in asks]),
        )
        ends = set(model.generation_config.eos_token_id)
        return [_answer_of(tokenizer, row, ends) for row in made[:, length:].tolist()]

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        self._checkpoint = _fetched(self._checkpoint, self._progress)
        folder = self._checkpoint.folder
        tokenizer = load_tokenizer(folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]
        dtype = torch.float32 if self._device.type == "cpu" else "auto"
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            what = f"cannot be loaded by transformers ({type(error).__name__}: {first_line(error)})"
            raise UnsupportedModelError(Problem(str(self._checkpoint), what)) from error
        model.to(self._device)
        known = model.generation_config.eos_token_id
        ends = sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None})
        if not ends:
            raise UnsupportedModelError(Problem(str(self._checkpoint), "has no token that ends an answer"))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
        # Its own may hold settings of sampling that everybody would have to know of; here only the options count.
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        return model.eval(), tokenizer


def _fetched(checkpoint: Checkpoint, progress: Progress) -> Checkpoint:
    """The checkpoint with all its files on this disk."""
    fetch_side_files(checkpoint)
    if checkpoint.is_remote:
        from slrmerge.hub.snapshots import fetch_shards

        (checkpoint,) = fetch_shards([(checkpoint, checkpoint.shards)], progress)
    return checkpoint


def _sampling(settings: Settings, seeds: Sequence[int]) -> list[Any]:
    """What turns the most probable token of a row into one that is drawn; nothing where decoding is greedy."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper

    if not settings.temperature:
        return []
    min_p = [MinPLogitsWarper(settings.min_p)] if settings.min_p else []
    return [TemperatureLogitsWarper(settings.temperature), *min_p, _Gumbel(seeds)]


class _Gumbel:
    """Adds Gumbel noise to the logits, a stream of its own for every row: their maximum is then a fair draw.

    It is drawn on the CPU, so that a seed means the same everywhere.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 (transformers')
        width = scores.shape[1]
        waits = torch.stack([torch.empty(width).exponential_(generator=stream) for stream in self._streams])
        return scores - waits.log().to(scores)


def _answer_of(tokenizer: Any, ids: list[int], ends: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text, "length" if end is None else "stop")
