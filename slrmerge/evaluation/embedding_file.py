"""Embeddings on disk: an evaluation embeds each text once, also over several runs."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from slrmerge.errors import OutputError, Problem, ServerError
from slrmerge.evaluation.embeddings import Embedder
from slrmerge.io.files import open_no_link, write_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.strict_json import parse_json
from slrmerge.io.text import to_json

TEXTS_AT_ONCE = 1024
"""Texts to embed before their embeddings are written: a killed run computes at most these again."""

_DIGEST_BYTES = 16
_MAX_HEADER_BYTES = 1 << 16
_MAX_WIDTH = 1 << 20


class KeptEmbeddings(Embedder):
    """An Embedder that keeps embeddings in the evaluation's folder, in one file for each model.

    A file has a line of JSON with the model and the width, and a record for each text: its digest, whether the model
    truncates it, the vector, which is NaN where the model refuses the text. An incomplete last record, which a kill
    leaves, is dropped; a file with another first line is written anew. Vectors stay on disk until they are asked for.
    Raises OutputError, also where the model gives vectors of another width than before.
    """

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        self._embedder = embedder
        digest = xxhash.xxh3_64_hexdigest(embedder.identity.encode("utf-8", "replace"))
        self.path = folder / f"embeddings-{digest}.bin"
        self._header_bytes, self._record = 0, _record(1)
        self._places: dict[bytes, int] = {}
        with translate_os_errors(self.path):
            if self.path.is_file():
                self._open()

    @property
    def model_id(self) -> str:
        """See `Embedder`."""
        return self._embedder.model_id

    @property
    def identity(self) -> str:
        """See `Embedder`."""
        return self._embedder.identity

    def check(self) -> None:
        """See `Embedder`."""
        self._embedder.check()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `Embedder`; computes only embeddings that the file does not have."""
        return self._field("vector", texts)

    def truncated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """See `Embedder`."""
        return self._field("truncated", texts)

    def _field(self, name: str, texts: Sequence[str]) -> NDArray[Any]:
        """A field of the records of these texts, after computing those that are missing."""
        digests = [xxhash.xxh3_128_digest(text.encode("utf-8", "replace")) for text in texts]
        wanted = zip(digests, texts, strict=True)
        missing = iter({digest: text for digest, text in wanted if digest not in self._places}.items())
        while part := dict(islice(missing, TEXTS_AT_ONCE)):
            self._compute(part)
        with translate_os_errors(self.path):
            records = self._mapped() if self._places else np.zeros(0, self._record)
            return records[name][[self._places[digest] for digest in digests]]

    def _compute(self, texts: dict[bytes, str]) -> None:
        """Embed texts, by digest, and append their records to the file."""
        vectors = self._embed(list(texts.values()))
        (width,) = vectors.shape[1:]
        if not self._places:
            self._start(width)
        elif width != (known := self._record["vector"].shape[0]):
            what = f"contains embeddings of width {known}, and the model now gives {width}"
            raise OutputError(Problem("embeddings-changed", str(self.path), what, "delete the file, or name the model"))
        records = np.zeros(len(texts), self._record)
        records["digest"] = np.frombuffer(b"".join(texts), f"V{_DIGEST_BYTES}")
        records["truncated"], records["vector"] = self._embedder.truncated(list(texts.values())), vectors
        with translate_os_errors(self.path), open(self.path, "ab", opener=open_no_link) as file:
            file.write(records.tobytes())
        self._places |= {digest: len(self._places) + place for place, digest in enumerate(texts)}

    def _embed(self, texts: Sequence[str]) -> NDArray[np.floating]:
        """Embeddings; NaN also where the model refuses all of these texts, and has not refused all others before."""
        try:
            return self._embedder.embed(texts)
        except ServerError as error:
            if not self._places or [problem.code for problem in error.problems] != ["request-rejected"]:
                raise
            return np.full((len(texts), *self._record["vector"].shape), np.nan)

    def _start(self, width: int) -> None:
        """Begin an empty file of vectors of this width."""
        header = self._header(width)
        with translate_os_errors(self.path):
            write_file(self.path, header, durable=False)
        self._header_bytes, self._record = len(header), _record(width)

    def _open(self) -> None:
        """Read which texts the file has."""
        with open(self.path, "rb") as file:
            header = file.readline(_MAX_HEADER_BYTES)
        width = self._width(header)
        if width is None:
            return
        self._header_bytes, self._record = len(header), _record(width)
        count = (self.path.stat().st_size - len(header)) // self._record.itemsize
        with open(self.path, "r+b", opener=open_no_link) as file:
            file.truncate(len(header) + count * self._record.itemsize)
        self._places = {digest: place for place, digest in enumerate(self._digests())} if count else {}

    def _digests(self) -> Iterator[bytes]:
        digests = np.ascontiguousarray(self._mapped()["digest"]).tobytes()
        return (digests[start : start + _DIGEST_BYTES] for start in range(0, len(digests), _DIGEST_BYTES))

    def _mapped(self) -> NDArray[np.void]:
        return np.memmap(self.path, self._record, mode="r", offset=self._header_bytes)

    def _width(self, header: bytes) -> int | None:
        """The width of the vectors; None where a file does not begin as one of this model does."""
        try:
            width = parse_json(header)["width"]
        except (ValueError, LookupError, TypeError):
            return None
        is_valid = type(width) is int and 0 < width < _MAX_WIDTH
        return width if is_valid and header == self._header(width) else None

    def _header(self, width: int) -> bytes:
        return to_json({"embeddings": self.identity, "width": width}).encode("utf-8", "replace") + b"\n"


def _record(width: int) -> np.dtype[Any]:
    return np.dtype([("digest", f"V{_DIGEST_BYTES}"), ("truncated", "?"), ("vector", "<f4", (width,))])
