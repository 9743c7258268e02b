"""Text to token ids, exactly as at export: the tokenizer is a page of the bundle and `tokenizers` is loaded lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeml.errors import BundleError, DataError, MissingExtra

__all__ = ["TextBatch", "TextPreprocessor", "check_text"]

#: A text longer than this many characters is refused rather than silently cut: nobody classifies a book by its first words.
CHARACTER_LIMIT = 200_000


@dataclass(frozen=True)
class TextBatch:
    """Padded token ids. `ids`, `types` (B, T) int64; `mask` (B, T) float32, 1 for real tokens; `truncated` rows were cut.

    `bias` (B, S, E) float32, where a router was asked already: it takes the place of what the task's own router would say.
    """

    ids: NDArray[np.int64]
    types: NDArray[np.int64]
    mask: NDArray[np.float32]
    truncated: tuple[bool, ...]
    bias: NDArray[np.float32] | None = None

    def rows(self, rows: NDArray[np.intp], tokens: int | None = None) -> TextBatch:
        """Some of the rows, cut after so many tokens."""
        cut = (rows, slice(tokens))
        bias = None if self.bias is None else self.bias[rows]
        return TextBatch(self.ids[cut], self.types[cut], self.mask[cut], tuple(self.truncated[row] for row in rows), bias)


class TextPreprocessor:
    """A Hugging Face `tokenizer.json` with a fixed maximum length; pairs are encoded jointly. Safe for several threads.

    `vocabulary` is how many token ids there are.
    """

    def __init__(self, tokenizer_json: bytes, max_tokens: int) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingExtra("reading text", "text") from error
        try:
            self._tokenizer: Any = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception on a bad document
            raise BundleError(f"the tokenizer page is not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.vocabulary = int(self._tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> TextBatch:
        """Tokenize and pad to the longest row. Raises `DataError` naming the row for an empty, over-long or non-text row."""
        seconds: Sequence[str | None] = pairs if pairs is not None else [None] * len(texts)
        inputs: list[Any] = []
        for number, (first, second) in enumerate(zip(texts, seconds, strict=True)):
            for part in (first,) if second is None else (first, second):
                check_text(part, f"input {number}")
            inputs.append(first if second is None else (first, second))
        encodings = self._tokenizer.encode_batch(inputs)
        for number, encoding in enumerate(encodings):
            if not encoding.ids:
                raise DataError(f"input {number}: the tokenizer finds nothing to read in it")
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        shape = (len(encodings), longest)
        ids, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.float32)
        for number, encoding in enumerate(encodings):
            length = len(encoding.ids)
            ids[number, :length], types[number, :length] = encoding.ids, encoding.type_ids
            mask[number, :length] = 1
        return TextBatch(ids, types, mask, tuple(bool(encoding.overflowing) for encoding in encodings))


def check_text(text: str, where: str) -> None:
    """Raise `DataError`, which begins with `where`, for what is no text, empty, over-long or not valid Unicode."""
    if not isinstance(text, str):
        raise DataError(f"{where}: expected text, got {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{where}: the text is empty")
    if len(text) > CHARACTER_LIMIT:
        raise DataError(f"{where}: {len(text)} characters, more than the limit of {CHARACTER_LIMIT}; split the text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text is not valid Unicode (character {error.start}); give it as UTF-8") from None
