"""BPE dropout (Provilkov et al. 2020): words put together in other ways than the usual one, by a seed."""

from __future__ import annotations

import json
import random
from heapq import heappop, heappush
from itertools import groupby

from tokenizers import Encoding, Tokenizer


class BPEDropout:
    """Merges words anew, leaving merges out at random.

    The tokenizers library does so too, from a generator that cannot be seeded; a resumed training must read
    the same ids again. What is drawn has the library's distribution, and so that of the originals' recipes.

    Args:
        tokenizer: of plain BPE merges.

    Raises:
        ValueError: if it is of another kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        kind = model.get("type")
        if kind != "BPE" or model["continuing_subword_prefix"] or model["byte_fallback"]:
            raise ValueError(
                "BPE dropout needs a tokenizer of plain BPE merges (no prefix of continuing pieces, no byte "
                f"fallback), got {kind}: set dropout to 0"
            )
        self.suffix: str = model["end_of_word_suffix"] or ""
        self.vocab: dict[str, int] = model["vocab"]
        self.tokens = {i: token for token, i in self.vocab.items()}
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

    def encode(self, encoding: Encoding, dropout: float, rng: random.Random) -> list[int]:
        """Put the words of a text together anew.

        Args:
            encoding: of the text by the tokenizer.
            dropout: chance that a merge is left out when its turn comes, in [0, 1]; 1 = characters.
            rng: decides which.

        Returns:
            The ids.
        """
        ids: list[int] = []
        tokens = zip(encoding.ids, encoding.word_ids, strict=True)
        for _, word in groupby(tokens, key=lambda token: token[1]):
            symbols = [symbol for i, _ in word for symbol in self._characters(i)]
            ids += [self.vocab[symbol] for symbol in self._merge(symbols, dropout, rng)]
        return ids

    def _characters(self, token_id: int) -> list[str]:
        """A token's characters, the suffix at the last; what is not made of known ones, as [UNK], whole."""
        token = self.tokens[token_id]
        body = token.removesuffix(self.suffix)
        characters = [*body[:-1], body[-1:] + token[len(body) :]]
        return characters if all(character in self.vocab for character in characters) else [token]

    def _merge(self, symbols: list[str], dropout: float, rng: random.Random) -> list[str]:
        """Make the merges of lowest rank first; one that is made gives those left out another chance.

        A pair that another merge broke up stays in the queue and does so too, as in the library.
        """
        end = len(symbols)
        symbols = [*symbols, ""]  # what is merged into the symbol before it becomes "" too

        def merge_at(place: int) -> tuple[int, int, int, str] | None:
            """Rank and place, for the order; where its right half is, and what it becomes."""
            right = next(i for i in range(place + 1, end + 1) if symbols[i] or i == end)
            rank = self.ranks.get((symbols[place], symbols[right]))
            return None if rank is None else (rank, place, right, symbols[place] + symbols[right])

        queue = sorted(filter(None, map(merge_at, range(end))))
        left_out: list[tuple[int, int, int, str]] = []
        while queue:
            merge = heappop(queue)
            if rng.random() < dropout:
                left_out.append(merge)
                continue
            for other in left_out:
                heappush(queue, other)
            left_out.clear()
            _, place, right, merged = merge
            if merge_at(place) != merge:
                continue
            symbols[place], symbols[right] = merged, ""
            before = next((i for i in reversed(range(place)) if symbols[i]), end)
            for new in filter(None, (merge_at(i) for i in (before, place) if i < end)):
                heappush(queue, new)
        return list(filter(None, symbols))
