"""Text -> ids: the BPE tokenizer of a model, native, from the originals' files, or trained on captions."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from checkpoint_io import CheckpointError, atomic_path
from mindalle.bpe_dropout import BPEDropout

logger = logging.getLogger(__name__)
PAD, UNKNOWN, WORD_END = "[PAD]", "[UNK]", "</w>"
MAX_SHOWN = 200  # characters of a prompt in a message
BPE16K_FILES = {
    "bpe-16k-vocab.json": "ae486ecb13750452e200d51b8bbf0dda",
    "bpe-16k-merges.txt": "ae6f82de0f53b1e55c2c2d91f7ea419e",
}
"""The tokenizer of minDALL-E and of rq-vae-transformer's text models: file -> md5."""


class TextTokenizer:
    """Encodes texts as a model expects them: ids padded and truncated on the right to one length.

    Args:
        tokenizer: a Hugging Face tokenizer whose vocabulary has [PAD] = 0 and [UNK]; its own padding and
            truncation are switched off.
        length: N, ids per text, >= 1.
        vocab_size: ids the model knows; larger ones are read as [UNK]. None = all of the tokenizer's.

    Raises:
        ValueError: if `length` is out of range.
        CheckpointError: if the tokenizer has other special tokens, or the model does not know [UNK].
    """

    def __init__(self, tokenizer: Tokenizer, *, length: int, vocab_size: int | None = None) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        pad_id, unknown_id = tokenizer.token_to_id(PAD), tokenizer.token_to_id(UNKNOWN)
        if pad_id != 0 or unknown_id is None:
            raise CheckpointError(
                f"a text tokenizer needs {PAD} = 0 and {UNKNOWN}, got {pad_id} and {unknown_id}: "
                "is this the tokenizer of the model?"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.length = length
        self.unknown_id = unknown_id
        self.vocab_size = tokenizer.get_vocab_size() if vocab_size is None else vocab_size
        if self.unknown_id >= self.vocab_size:
            raise CheckpointError(
                f"the model knows {self.vocab_size} words, too few for {UNKNOWN} = {self.unknown_id}: "
                "is this the tokenizer of the model?"
            )
        if self.vocab_size < tokenizer.get_vocab_size():
            logger.warning(
                "the text tokenizer has %d words, the model %d: the others are read as %s",
                tokenizer.get_vocab_size(),
                self.vocab_size,
                UNKNOWN,
            )

    @classmethod
    def from_file(cls, path: str | Path, *, length: int, vocab_size: int | None = None) -> TextTokenizer:
        """Read a tokenizer: a native `text_tokenizer.json`, or a directory with the originals' BPE-16k files.

        Args:
            path: file or directory.
            length: N, ids per text.
            vocab_size: ids the model knows.

        Returns:
            The tokenizer.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file is damaged or no tokenizer.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no text tokenizer at {path}")
        try:
            tokenizer = _read_bpe16k(path) if path.is_dir() else Tokenizer.from_file(str(path))
        except FileNotFoundError:
            raise
        except (
            BaseException
        ) as error:  # the library raises bare Exceptions, and panics that are not even those
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise CheckpointError(f"{path} is not a readable text tokenizer: {error}") from error
        return cls(tokenizer, length=length, vocab_size=vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, length: int) -> TextTokenizer:
        """Train a BPE tokenizer, lower case, of the originals' kind; the same texts give the same one.

        Args:
            texts: to count pairs in.
            vocab_size: of the tokenizer, special tokens included, >= 4; it gets fewer from few texts. If
                there are too many characters for it, the rarest are read as [UNK].
            length: N, ids per text.

        Returns:
            The tokenizer.

        Raises:
            ValueError: if `vocab_size` is out of range.
        """
        if vocab_size < 4:
            raise ValueError(
                f"vocab_size must be at least 4 ({PAD}, {UNKNOWN} and a character), got {vocab_size}"
            )
        tokenizer = _char_bpe(BPE(unk_token=UNKNOWN, end_of_word_suffix=WORD_END))
        texts = list(texts)
        alphabet, finals = _alphabet(tokenizer, texts, limit=(vocab_size - 2) // 2)
        # what is not listed here the trainer numbers in an order that changes from run to run
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, UNKNOWN, *(character + WORD_END for character in finals)],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        trained = json.loads(tokenizer.to_str())["model"]
        merges = [(left, right) for left, right in trained["merges"]]
        model = BPE(trained["vocab"], merges, unk_token=UNKNOWN, end_of_word_suffix=WORD_END)
        return cls(_char_bpe(model), length=length)

    def save(self, path: str | Path) -> None:
        """Write the native file, atomically."""
        with atomic_path(path) as temporary:
            self.tokenizer.save(str(temporary))

    def encode(
        self,
        texts: Sequence[str],
        *,
        warns_of_loss: bool = True,
        dropout: float = 0.0,
        rng: random.Random | None = None,
    ) -> Tensor:
        """Encode texts; a warning names the words that are unknown, or cut from a text that is too long.

        Args:
            texts: B strings; "" is the null condition.
            warns_of_loss: False = silently, for captions in training.
            dropout: BPE dropout: the chance in [0, 1] that a merge is left out, at each step; 1 = characters.
            rng: decides which; needed with `dropout`.

        Returns:
            int64 (B, N), padded with 0.

        Raises:
            ValueError: if `texts` is one string, or empty; if `dropout` is out of range, has no `rng`, or the
                tokenizer is none that merges.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r}")
        if not 0 <= dropout <= 1 or (dropout and rng is None):
            raise ValueError(f"dropout must be in [0, 1], and with it an rng be given, got {dropout}, {rng}")
        ids = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, (text, encoding) in enumerate(
            zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True)
        ):
            chosen = self._bpe_dropout.encode(encoding, dropout, rng) if dropout and rng else encoding.ids
            kept = [i if i < self.vocab_size else self.unknown_id for i in chosen[: self.length]]
            ids[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            if warns_of_loss:
                self._warn_of_loss(text, encoding)
        return ids

    def _warn_of_loss(self, text: str, encoding: Encoding) -> None:
        """Name the words of a prompt that the model does not read."""
        if len(encoding.ids) > self.length:
            logger.warning(
                "the prompt has %d tokens, the model reads %d; these words are lost: %s",
                len(encoding.ids),
                self.length,
                _shortened(text[_word_start(encoding, self.length) :]),
            )
        unknown = self._unknown_words(text, encoding)
        if text.strip() and all(map(self._is_unknown, encoding.ids[: self.length])):
            logger.warning(
                "the model knows no word of the prompt and draws as if without it: %s", _shortened(text)
            )
        elif unknown:
            logger.warning("the model does not know these words: %s", _shortened(", ".join(unknown)))

    def _unknown_words(self, text: str, encoding: Encoding) -> list[str]:
        """The words of a text, as far as it is read, of which a part is no word of the model."""
        spans: dict[tuple[int, int], None] = {}
        for position, one in enumerate(encoding.ids[: self.length]):
            if self._is_unknown(one):
                word = encoding.token_to_word(position)
                span = None if word is None else encoding.word_to_chars(word)
                spans[span or encoding.offsets[position]] = None
        return [text[start:end] for start, end in spans]

    def count_losses(self, texts: Sequence[str]) -> tuple[int, int]:
        """How many texts have words that the model does not know, and how many are cut.

        Args:
            texts: at least one.

        Returns:
            Both numbers.
        """
        encodings = self.tokenizer.encode_batch(list(texts))
        num_unknown = sum(any(map(self._is_unknown, one.ids[: self.length])) for one in encodings)
        return num_unknown, sum(len(one.ids) > self.length for one in encodings)

    def _is_unknown(self, text_id: int) -> bool:
        return text_id == self.unknown_id or text_id >= self.vocab_size

    def count_ids(self, texts: Sequence[str]) -> list[int]:
        """How many ids each text has before it is padded or cut."""
        return [len(encoding.ids) for encoding in self.tokenizer.encode_batch(list(texts))]

    @cached_property
    def _bpe_dropout(self) -> BPEDropout:
        return BPEDropout(self.tokenizer)


def _shortened(text: str) -> str:
    """At most a few lines."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ... ({len(text):,} characters)"


def _word_start(encoding: Encoding, position: int) -> int:
    """Where in the text the word begins that a token is part of."""
    word = encoding.token_to_word(position)
    span = None if word is None else encoding.word_to_chars(word)
    start: int = encoding.offsets[position][0] if span is None else span[0]
    return start


def _alphabet(tokenizer: Tokenizer, texts: Sequence[str], *, limit: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, at most `limit`, and those of them that end a word, both sorted."""
    counts: Counter[str] = Counter()
    finals: set[str] = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            counts.update(word)
            finals.add(word[-1])
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:limit]
    return sorted(frequent), sorted(finals.intersection(frequent))


def _char_bpe(model: BPE) -> Tokenizer:
    """The originals' tokenizer around a BPE model: BERT's clean-up and word split, lower case."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = NormalizerSequence([BertNormalizer(lowercase=False), Lowercase()])
    tokenizer.pre_tokenizer = BertPreTokenizer()
    # a word of its own in a text, as in Hugging Face's CharBPETokenizer
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def _read_bpe16k(folder: Path) -> Tokenizer:
    vocab, merges = (folder / name for name in BPE16K_FILES)
    for path in (vocab, merges):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}: expected {' and '.join(BPE16K_FILES)}")
        if hashlib.md5(path.read_bytes()).hexdigest() != BPE16K_FILES[path.name]:
            logger.warning(
                "%s is not the released BPE-16k file: prompts may be read otherwise than in training", path
            )
    model = BPE.from_file(str(vocab), str(merges), unk_token=UNKNOWN, end_of_word_suffix=WORD_END)
    return _char_bpe(model)
