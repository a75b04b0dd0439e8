"""BPE dropout: the library's distribution, from a generator of our own."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mindalle.text import TextTokenizer

TEXTS = ["lot lot log", "Logs, a lot", "[UNK] lot[UNK] ☃ lo☃g", "t", ""]


@pytest.fixture
def trained() -> TextTokenizer:
    """Merges: l+o, lo+t</w>."""
    return TextTokenizer.train(["lot lot log"], vocab_size=10, length=12)


@pytest.fixture(scope="module")
def bpe16k(fixtures_dir: Path) -> TextTokenizer:
    return TextTokenizer.from_file(fixtures_dir / "mindalle-tiny" / "tokenizer", length=64)


def tokens(tokenizer: TextTokenizer, text: str, dropout: float, seed: int = 0) -> list[str]:
    ids = tokenizer.encode([text], dropout=dropout, rng=random.Random(seed))[0]
    return [tokenizer.tokenizer.id_to_token(int(i)) for i in ids if i]


class TestEnds:
    def test_none_is_the_library(self, bpe16k: TextTokenizer) -> None:
        """Our own merging without dropout, not a shortcut to the library's."""
        rng = random.Random(0)
        prompts = [
            "A painting of a monkey with sunglasses",
            "東京 don't [UNK]x ☃ğ extraordinarily",
            "x" * 300,
        ]
        for text in [*TEXTS, *prompts]:
            encoding = bpe16k.tokenizer.encode(text)
            assert bpe16k._bpe_dropout.encode(encoding, 0.0, rng) == encoding.ids

    def test_all_gives_characters(self, trained: TextTokenizer) -> None:
        assert tokens(trained, "lot log", 1.0) == ["l", "o", "t</w>", "l", "o", "g</w>"]
        assert tokens(trained, "[UNK] lo☃t", 1.0) == ["[UNK]", "l", "o", "[UNK]", "t</w>"]

    def test_switched_off(self, trained: TextTokenizer) -> None:
        assert torch.equal(trained.encode(TEXTS, dropout=0.0), trained.encode(TEXTS))


class TestDistribution:
    def test_by_hand(self, trained: TextTokenizer) -> None:
        """Of "lot": l+o is made with chance 1 - p, and then lo+t with 1 - p."""
        counts = Counter(tuple(tokens(trained, "lot", 0.25, seed)) for seed in range(2000))
        shares = {("l", "o", "t</w>"): 0.25, ("lo", "t</w>"): 0.75 * 0.25, ("lot</w>",): 0.75 * 0.75}
        assert set(counts) == set(shares)
        for pieces, share in shares.items():
            assert counts[pieces] / 2000 == pytest.approx(share, abs=0.04)  # 4 standard deviations

    @pytest.mark.parametrize(("word", "dropout"), [("painting", 0.3), ("monkey", 0.1), ("apple", 0.6)])
    def test_same_as_the_library(self, bpe16k: TextTokenizer, word: str, dropout: float) -> None:
        """It gives a merge that was left out another chance more often than the paper does.

        By the paper alone half of the draws of "painting" would be others.
        """
        settings = json.loads(bpe16k.tokenizer.to_str())
        settings["model"]["dropout"] = dropout
        library, rng = Tokenizer.from_str(json.dumps(settings)), random.Random(0)
        encoding, num_draws = bpe16k.tokenizer.encode(word), 4000
        theirs = Counter(tuple(library.encode(word).ids) for _ in range(num_draws))
        ours = Counter(tuple(bpe16k._bpe_dropout.encode(encoding, dropout, rng)) for _ in range(num_draws))
        distance = sum(abs(theirs[pieces] - ours[pieces]) for pieces in theirs | ours) / (2 * num_draws)
        assert distance < 0.06  # of two samples of one distribution: up to 0.03
        assert len(ours) > 5


class TestSeed:
    def test_the_same_ids_again(self, bpe16k: TextTokenizer) -> None:
        texts = ["a painting of a monkey with sunglasses"] * 4
        first, again = (bpe16k.encode(texts, dropout=0.3, rng=random.Random(5)) for _ in range(2))
        other = bpe16k.encode(texts, dropout=0.3, rng=random.Random(6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert len({tuple(row) for row in first.tolist()}) == 4  # each text draws anew
        pieces = [bpe16k.tokenizer.id_to_token(i) for i in first[0].tolist() if i]
        assert "".join(pieces).split("</w>")[:-1] == texts[0].split()

    def test_cut_to_the_length(self, trained: TextTokenizer) -> None:
        short = TextTokenizer(trained.tokenizer, length=4)
        ids = short.encode(["lot lot"], dropout=1.0, rng=random.Random(0), warns_of_loss=False)
        assert [short.tokenizer.id_to_token(i) for i in ids[0].tolist()] == ["l", "o", "t</w>", "l"]


class TestErrors:
    @pytest.mark.parametrize(("dropout", "rng"), [(1.5, random.Random(0)), (-0.1, None), (0.1, None)])
    def test_settings(self, trained: TextTokenizer, dropout: float, rng: random.Random | None) -> None:
        with pytest.raises(
            ValueError, match=r"dropout must be in \[0, 1\], and with it an rng be given, got"
        ):
            trained.encode(["lot"], dropout=dropout, rng=rng)

    def test_no_merges(self) -> None:
        words = TextTokenizer(Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")), length=2)
        with pytest.raises(ValueError, match=r"needs a tokenizer of plain BPE merges .* got WordLevel: set"):
            words.encode(["a"], dropout=0.1, rng=random.Random(0))
