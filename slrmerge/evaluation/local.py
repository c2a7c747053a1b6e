"""A model in this process, run by transformers in batches."""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import open_within
from slrmerge.checkpoint.header import TORCH_DTYPES
from slrmerge.checkpoint.location import Place, Repository
from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.checkpoint.side_files import MANIFEST_NAME, fetch_side_files
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.evaluation.models import AnswerSink, ChatModel, SampleRequest
from slrmerge.evaluation.samples import Answer, Settings
from slrmerge.io.memory import available_memory_bytes
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.io.progress import Progress
from slrmerge.io.text import printable
from slrmerge.searching.chat_template import render
from slrmerge.searching.device import default_dtype, dtype_name
from slrmerge.searching.tokenizer import decode, encode, load_tokenizer, tokenizing

LARGEST_BATCH, LARGEST_CPU_BATCH = 256, 32
"""Rows of a batch where its size is not given. A killed evaluation repeats the batch that it was at."""

_LOGIT_COPIES = 8
"""Of the logits in float32, while a token is drawn of them: scaled, cut by min-p, with noise."""


class LocalModel(ChatModel):
    """A ChatModel from a folder or a repository on the Hub.

    `batch` is the most requests to answer at once, None for as many as memory holds; fewer where the device then lacks
    memory. `dtype` is None for that of `default_dtype`. A sample depends only on its prompt and its seed, not on the
    rest of its batch, except for rounding and where the longest prompt of the batch leaves less than `max_tokens`.
    Raises CheckpointError and HubError, and UnsupportedModelError for a GGUF file.
    """

    def __init__(
        self, at: Place, *, device: str, progress: Progress, batch: int | None = None, dtype: str | None = None
    ) -> None:
        self._at, self._checkpoint = at, open_checkpoint(at)
        if self._checkpoint.computed:
            what = "is an adapter, which an evaluation does not load"
            remedy = "write the whole model first: merge with alpha: 0, and evaluate the result"
            raise UnsupportedModelError(Problem("adapter", str(self._checkpoint), what, remedy))
        if self._checkpoint.format == "gguf":
            what, remedy = "is a GGUF file, which is not run in process", "serve it with llama-server, and name the URL"
            raise UnsupportedModelError(Problem("gguf", str(self._checkpoint), what, remedy))
        self._device, self._dtype, self._progress = torch.device(device), dtype, progress
        self._fits_memory = batch is None
        self._largest = batch or (LARGEST_CPU_BATCH if self._device.type == "cpu" else LARGEST_BATCH)
        self._loaded: _Loaded | None = None
        self._prompt = lru_cache(self._largest)(self._rendered)  # a prompt's samples follow each other

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

    @cached_property
    def dtype(self) -> str:
        """See `ChatModel`."""
        if self._dtype:
            return self._dtype
        return dtype_name(default_dtype(self._checkpoint.parameters, self._device, _stored_dtype(self._checkpoint)))

    def load(self) -> None:
        """See `ChatModel`; downloads it first."""
        self._ready()

    def close(self) -> None:
        """See `ChatModel`."""
        self._loaded = None

    def check(self) -> None:
        """See `ChatModel`; downloads the small files and requires a chat template."""
        fetch_side_files(self._checkpoint.side_files)
        load_tokenizer(self._checkpoint.folder)

    def answer(self, requests: Sequence[SampleRequest], settings: Settings, sink: AnswerSink) -> None:
        """See `ChatModel`; refuses prompts that are too long.

        Raises UnsupportedModelError for a model that cannot be loaded, and where memory is lacking for one answer.
        """
        done = 0
        while done < len(requests):
            batch = self._fitting(requests[done : done + self._largest], settings)
            refusals = {request: refusal for request in batch if (refusal := self._refusal(request))}
            accepted = [request for request in batch if request not in refusals]
            try:
                answers = self._answer(accepted, settings) if accepted else []
            except torch.cuda.OutOfMemoryError as error:
                if len(accepted) == 1:
                    raise self._out_of_memory(f"an answer of {settings.max_tokens:,} tokens") from error
                self._largest = len(accepted) // 2
                self._progress.message(f"{self._device} lacks memory for {len(accepted)} answers; halving the batch")
                continue
            for request, refusal in refusals.items():
                sink.refuse(request, refusal)
            for request, answer in zip(accepted, answers, strict=True):
                sink.keep(request, answer)
            done += len(batch)

    def _fitting(self, requests: Sequence[SampleRequest], settings: Settings) -> Sequence[SampleRequest]:
        """The first of the requests, as many as memory holds; all where the size of batches was given."""
        if not self._fits_memory:
            return requests
        model, _, free_bytes = self._ready()
        longest = max(self._prompt(request.prompt)[1] for request in requests)
        tokens = min(longest + settings.max_tokens, _most_tokens(model))
        needed = row_bytes(model.config.get_text_config(), tokens, model.dtype.itemsize)
        return requests[: max(1, free_bytes // 2 // needed)]  # the other half is for the activations

    def _refusal(self, request: SampleRequest) -> UnsupportedModelError | None:
        """The error of a prompt that is too long."""
        _, length = self._prompt(request.prompt)
        if length < _most_tokens(self._ready().model):
            return None
        what = f"a prompt has {length:,} tokens, more than the model reads"
        return UnsupportedModelError(Problem("prompt-too-long", str(self._checkpoint), what))

    def _out_of_memory(self, needed: str) -> UnsupportedModelError:
        what, remedy = f"{self._device} lacks memory for {needed}", "choose another device or dtype, or a server"
        return UnsupportedModelError(Problem("out-of-memory", str(self._checkpoint), what, remedy))

    def _rendered(self, prompt: str) -> tuple[str, int]:
        """A prompt as the model reads it, and its length in tokens."""
        tokenizer = self._ready().tokenizer
        text = render(tokenizer, prompt)
        return text, len(encode(tokenizer, text))

    @torch.inference_mode()
    def _answer(self, requests: Sequence[SampleRequest], settings: Settings) -> list[Answer]:
        model, tokenizer, _ = self._ready()
        texts = [self._prompt(request.prompt)[0] for request in requests]
        with tokenizing(tokenizer):
            inputs = tokenizer(
                texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt", verbose=False
            )
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

    def _ready(self) -> "_Loaded":
        """The model, loaded at the first use."""
        self._loaded = self._loaded or self._load()
        return self._loaded

    def _load(self) -> "_Loaded":
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        fetch_side_files(self._checkpoint.side_files)
        self._checkpoint = self._checkpoint.download(self._progress)
        self._progress.status(f"loading {self._checkpoint}")
        folder = self._checkpoint.folder
        tokenizer = load_tokenizer(folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, self.dtype),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
            )
        except Exception as error:  # a model's files may raise anything while they are loaded
            what = f"transformers cannot load it ({type(error).__name__}: {first_line(error)})"
            raise UnsupportedModelError(Problem("model-not-loadable", str(self._checkpoint), what)) from error
        try:
            model.to(self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise self._out_of_memory(f"the model in {self.dtype}") from error
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
        on_gpu = self._device.type == "cuda"
        free_bytes = torch.cuda.mem_get_info(self._device)[0] if on_gpu else available_memory_bytes()
        return _Loaded(model.eval(), tokenizer, free_bytes)


class _Loaded(NamedTuple):
    """transformers' model and tokenizer, and the memory that was free after loading them."""

    model: Any
    tokenizer: Any
    free_bytes: int


def row_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Memory of a row of a batch: keys and values of its tokens, and its logits."""
    heads = getattr(config, "num_attention_heads", None) or 1
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    keys_and_values: int = 2 * config.num_hidden_layers * width * tokens * itemsize
    logits: int = _LOGIT_COPIES * 4 * config.vocab_size
    return keys_and_values + logits


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype of most parameters; bfloat16 for a checkpoint without any."""
    counts: Counter[str] = Counter()
    for info in checkpoint.values():
        if info.dtype in TORCH_DTYPES:
            counts[TORCH_DTYPES[info.dtype]] += prod(info.shape)
    stored: torch.dtype = getattr(torch, next(iter(counts.most_common(1)), ("bfloat16", 0))[0])
    return stored


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
    text = decode(tokenizer, ids[:end], skip_special_tokens=True)
    return Answer(text, "length" if end is None else "stop")
