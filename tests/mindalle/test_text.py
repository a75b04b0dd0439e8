"""Text to ids: the originals' BPE files against golden ids and Hugging Face's own class; training; damage."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import CharBPETokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from checkpoint_io import CheckpointError
from mindalle.text import BPE16K_FILES, TextTokenizer

GOLDEN = {
    "A painting of a monkey with sunglasses in the frame": [
        *(1022, 2690, 1974, 1022, 6632, 2017, 6014, 1977, 1961, 3782)
    ],
    "Eiffel tower on a desert.": [10087, 4019, 1964, 1022, 5056, 1950],
    "☃ 東京 don't": [1, 1372, 1707, 2573, 1607, 1003],
    "a painting by RENÉ MAGRITTE": [1022, 2690, 2046, 2340, 1040, 3098, 2484, 2184],
}
CAPTIONS = ["a red apple", "a green apple", "A red car", "a green car on a road", "two red cars, don't"]


@pytest.fixture(autouse=True)
def _log_everything(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


@pytest.fixture(scope="module")
def bpe16k_dir(fixtures_dir: Path) -> Path:
    return fixtures_dir / "mindalle-tiny" / "tokenizer"


@pytest.fixture(scope="module")
def bpe16k(bpe16k_dir: Path) -> TextTokenizer:
    return TextTokenizer.from_file(bpe16k_dir, length=64)


@pytest.fixture
def trained() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=80, length=8)


def word_tokenizer(words: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


class TestReleasedFiles:
    @pytest.mark.parametrize(("text", "ids"), GOLDEN.items())
    def test_golden_ids(self, bpe16k: TextTokenizer, text: str, ids: list[int]) -> None:
        encoded = bpe16k.encode([text])
        assert encoded.tolist() == [ids + [0] * (64 - len(ids))]
        assert encoded.dtype == torch.int64

    def test_ids_of_the_original_code(
        self, bpe16k: TextTokenizer, fixtures_dir: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The fixture's prompts: one is empty, one has 500 characters, one is in three scripts."""
        expected = torch.load(fixtures_dir / "mindalle-tiny" / "expected.pt", weights_only=True)
        assert torch.equal(bpe16k.encode(expected["prompts"]), expected["token_ids"])
        unknown, cut = (record.getMessage() for record in caplog.records)
        assert unknown == "the model does not know these words: 品, 質"
        assert "the prompt has 400 tokens, the model reads 64" in cut

    @pytest.mark.parametrize(
        "text",
        [
            *("", " \t\n", "e\u0301 é", "İstanbul ẞ ﬁne", "😀 👩\u200d👩\u200d👧", "\x00nul \u2028 line"),
            *("[UNK] and [PAD]", "a_b-c ¿qué? don't", "x" * 300, "東京タワーと富士山"),
        ],
    )
    def test_same_as_the_class_the_originals_used(
        self, bpe16k: TextTokenizer, bpe16k_dir: Path, text: str
    ) -> None:
        """A written "[UNK]" once differed: the originals' class takes it for the special token."""
        vocab, merges = (str(bpe16k_dir / name) for name in BPE16K_FILES)
        original = CharBPETokenizer(vocab, merges, unk_token="[UNK]", suffix="</w>", lowercase=True)
        ids = original.encode(text).ids
        assert bpe16k.tokenizer.encode(text).ids == ids
        assert bpe16k.encode([text], warns_of_loss=False)[0, : len(ids)].tolist() == ids[:64]

    def test_round_trip_through_the_native_file(
        self, bpe16k: TextTokenizer, tmp_path: Path, fixtures_dir: Path
    ) -> None:
        bpe16k.save(tmp_path / "text_tokenizer.json")
        loaded = TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=64)
        texts = [*GOLDEN, "[UNK] [PAD]", ""]
        assert torch.equal(loaded.encode(texts), bpe16k.encode(texts))
        assert loaded.vocab_size == bpe16k.vocab_size == 16384

    def test_other_files_of_the_same_names_are_used_with_a_warning(
        self, bpe16k_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shutil.copytree(bpe16k_dir, tmp_path / "changed")
        merges = (tmp_path / "changed" / "bpe-16k-merges.txt").read_text(encoding="utf-8").splitlines()
        (tmp_path / "changed" / "bpe-16k-merges.txt").write_text("\n".join(merges[:-1]), encoding="utf-8")
        TextTokenizer.from_file(tmp_path / "changed", length=4)
        (warning,) = (record.message for record in caplog.records)
        assert "changed/bpe-16k-merges.txt is not the released BPE-16k file: prompts may be read" in warning

    @pytest.mark.parametrize("name", BPE16K_FILES)
    def test_missing_file(self, bpe16k_dir: Path, tmp_path: Path, name: str) -> None:
        shutil.copytree(bpe16k_dir, tmp_path / "half")
        (tmp_path / "half" / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"half has no {name}: expected bpe-16k-vocab.json and"):
            TextTokenizer.from_file(tmp_path / "half", length=4)

    @pytest.mark.parametrize("name", BPE16K_FILES)
    def test_damaged_file(self, bpe16k_dir: Path, tmp_path: Path, name: str) -> None:
        shutil.copytree(bpe16k_dir, tmp_path / "cut")
        content = (tmp_path / "cut" / name).read_bytes()
        (tmp_path / "cut" / name).write_bytes(content[: len(content) // 2 - 3])
        with pytest.raises(CheckpointError, match="cut is not a readable text tokenizer"):
            TextTokenizer.from_file(tmp_path / "cut", length=4)


class TestEncode:
    def test_pads_on_the_right(self, trained: TextTokenizer) -> None:
        ids = trained.encode(["a red car", "", "a"])
        assert ids.shape == (3, 8)
        assert (ids != 0).sum(dim=1).tolist() == [3, 0, 1]
        assert bool((ids[0, :3] != 0).all())

    def test_a_text_of_just_the_length_is_not_cut(
        self, trained: TextTokenizer, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert bool((trained.encode(["a a a a a a a a"]) != 0).all())
        assert not caplog.records

    @pytest.mark.parametrize(
        ("text", "lost"),
        [
            ("a painting of a monkey", "a monkey"),
            ("a painting of extraordinarily sunny days", "extraordinarily sunny days"),
            ("RENÉ é the 東京 tower", "東京 tower"),
            ("東京東京東京", "東京"),
            ("İstanbul tower", "İstanbul tower"),
        ],
    )
    def test_the_warning_names_the_lost_words(
        self, bpe16k_dir: Path, caplog: pytest.LogCaptureFixture, text: str, lost: str
    ) -> None:
        """Words, not tokens: it used to begin inside the word that is cut, as in "arily sunny days".

        In lower case "İ" becomes two characters, so that places in the two texts differ.
        """
        cut = {"extraordinarily": 4, "RENÉ": 4, "東京東": 4, "İ": 2}
        length = next((length for word, length in cut.items() if word in text), 3)
        tokenizer = TextTokenizer.from_file(bpe16k_dir, length=length)
        num_tokens = len(tokenizer.tokenizer.encode(text).ids)
        ids = tokenizer.encode([text])
        assert ids.shape == (1, length)
        assert [record.getMessage() for record in caplog.records] == [
            f"the prompt has {num_tokens} tokens, the model reads {length}; these words are lost: {lost}"
        ]

    def test_no_warning_in_training(self, trained: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
        """Each epoch used to log every long caption again."""
        quiet = trained.encode(["a red car " * 9], warns_of_loss=False)
        assert not caplog.records
        assert torch.equal(trained.encode(["a red car " * 9]), quiet)
        assert len(caplog.records) == 1

    def test_rows_do_not_depend_on_each_other(self, trained: TextTokenizer) -> None:
        together = trained.encode(CAPTIONS)
        assert torch.equal(together, torch.cat([trained.encode([caption]) for caption in CAPTIONS]))

    def test_counts_before_the_cut(self, trained: TextTokenizer) -> None:
        assert trained.count_ids(["a red car", "", "a " * 20]) == [3, 0, 20]

    def test_a_smaller_vocabulary_of_the_model(
        self, bpe16k_dir: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tokenizer = TextTokenizer.from_file(bpe16k_dir, length=6, vocab_size=3000)
        assert [record.getMessage() for record in caplog.records] == [
            "the text tokenizer has 16384 words, the model 3000: the others are read as [UNK]"
        ]
        assert tokenizer.encode(["a red apple"]).tolist() == [[1022, 2165, 1, 0, 0, 0]]  # apple is 4137
        assert tokenizer.vocab_size == 3000

    def test_a_larger_vocabulary_of_the_model_is_no_matter(
        self, trained: TextTokenizer, caplog: pytest.LogCaptureFixture
    ) -> None:
        same = TextTokenizer(trained.tokenizer, length=8, vocab_size=16384)
        assert torch.equal(same.encode(CAPTIONS), trained.encode(CAPTIONS))
        assert not caplog.records

    @pytest.mark.parametrize("texts", ["a red apple", [], ()])
    def test_texts_must_be_a_list(self, trained: TextTokenizer, texts: object) -> None:
        with pytest.raises(ValueError, match="texts must be a non-empty list of strings, got"):
            trained.encode(texts)  # type: ignore[arg-type]

    def test_padding_and_truncation_in_the_file_are_not_used(self, caplog: pytest.LogCaptureFixture) -> None:
        """Its padding would count as tokens, and its truncation would lose words without a warning."""
        tokenizer = word_tokenizer({"[PAD]": 0, "[UNK]": 1, "red": 2, "car": 3})
        tokenizer.enable_padding(length=9, pad_id=1)
        tokenizer.enable_truncation(2)
        ids = TextTokenizer(tokenizer, length=3).encode(["red", "red car car red"])
        assert ids.tolist() == [[2, 0, 0], [2, 3, 3]]
        assert [record.getMessage().split(": ")[1] for record in caplog.records] == ["red"]


class TestUnknownWords:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("빨간 사과", "the model knows no word of the prompt and draws as if without it: 빨간 사과"),
            ("🍎", "the model knows no word of the prompt and draws as if without it: 🍎"),
            ("a 빨간 red 🍎", "the model does not know these words: 빨간, 🍎"),
        ],
    )
    def test_are_named(
        self, trained: TextTokenizer, caplog: pytest.LogCaptureFixture, text: str, message: str
    ) -> None:
        """A prompt in another script drew pictures of nothing, without a word."""
        trained.encode([text])
        assert [record.getMessage() for record in caplog.records] == [message]
        caplog.clear()
        trained.encode([text, ""], warns_of_loss=False)
        trained.encode(["", " "])
        assert not caplog.records

    def test_messages_are_short(self, trained: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
        trained.encode(["빨" * 100_000])
        trained.encode(["a " * 100_000])
        assert all(len(record.getMessage()) < 400 for record in caplog.records)

    def test_are_counted(self, trained: TextTokenizer) -> None:
        assert trained.count_losses(["a", "a 빨", "a " * 99]) == (1, 1)


class TestTrain:
    def test_same_kind_as_the_originals(self, trained: TextTokenizer) -> None:
        assert trained.tokenizer.token_to_id("[PAD]") == 0
        assert trained.tokenizer.token_to_id("[UNK]") == 1
        assert trained.tokenizer.encode("A RED car").tokens == ["a</w>", "red</w>", "car</w>"]
        assert trained.tokenizer.encode("don't").tokens[-1] == "t</w>"
        assert trained.encode(["☃"])[0, 0] == 1
        assert trained.vocab_size <= 80

    def test_vocabulary_by_hand(self) -> None:
        """All characters, those that end words, then the pairs in order of their counts: 3 and 2."""
        tokenizer = TextTokenizer.train(["lot lot log"], vocab_size=10, length=4)
        words = ["[PAD]", "[UNK]", "g</w>", "t</w>", "g", "l", "o", "t", "lo", "lot</w>"]
        assert tokenizer.tokenizer.get_vocab() == {word: i for i, word in enumerate(words)}
        assert tokenizer.encode(["LOT log"]).tolist() == [[9, 8, 2, 0]]

    def test_same_texts_same_tokenizer(self, trained: TextTokenizer) -> None:
        """Ids used to follow a random order: a model and a tokenizer trained twice did not fit each other."""
        for _ in range(3):
            again = TextTokenizer.train(iter(reversed(CAPTIONS)), vocab_size=80, length=8)
            assert again.tokenizer.to_str() == trained.tokenizer.to_str()

    def test_round_trip(self, trained: TextTokenizer, tmp_path: Path) -> None:
        trained.save(tmp_path / "text_tokenizer.json")
        loaded = TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=8)
        texts = [*CAPTIONS, "[PAD] [UNK] ☃", "Ünknown"]
        assert torch.equal(loaded.encode(texts), trained.encode(texts))
        assert [path.name for path in tmp_path.iterdir()] == ["text_tokenizer.json"]

    def test_a_prompt_cannot_spell_padding(self, trained: TextTokenizer) -> None:
        assert 0 not in trained.encode(["[PAD]"])[0, :3].tolist()

    @pytest.mark.parametrize("vocab_size", [4, 5, 20, 60])
    def test_more_characters_than_room(self, vocab_size: int) -> None:
        """500 kanji used to give a vocabulary of 1007 where 60 were asked for, more than the model's."""
        texts = [f"{chr(0x4E00 + i)} word" for i in range(500)]
        tokenizer = TextTokenizer.train(texts, vocab_size=vocab_size, length=4)
        assert tokenizer.vocab_size <= vocab_size
        ids = tokenizer.encode(["word", chr(0x4E00 + 499)])
        assert ids[1].tolist() == [1, 0, 0, 0]  # the rarest, by count and code point, went first
        assert (1 not in ids[0].tolist()) == (vocab_size >= 20)

    def test_nothing_to_train_on(self) -> None:
        tokenizer = TextTokenizer.train([], vocab_size=80, length=3)
        assert (tokenizer.vocab_size, tokenizer.encode(["a"]).tolist()) == (2, [[1, 0, 0]])

    def test_vocabulary_too_small(self) -> None:
        with pytest.raises(ValueError, match=r"vocab_size must be at least 4 \(.*\), got 3"):
            TextTokenizer.train(CAPTIONS, vocab_size=3, length=8)


class TestErrors:
    def test_length(self, trained: TextTokenizer) -> None:
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            TextTokenizer(trained.tokenizer, length=0)

    @pytest.mark.parametrize(
        ("words", "got"),
        [
            ({"[UNK]": 0, "[PAD]": 1}, "got 1 and 0"),
            ({"[PAD]": 0, "<unk>": 1}, "got 0 and None"),
            ({"a": 0}, "got None and None"),
        ],
    )
    def test_other_special_tokens(self, words: dict[str, int], got: str) -> None:
        with pytest.raises(CheckpointError, match=rf"needs \[PAD\] = 0 and \[UNK\], {got}: is this the"):
            TextTokenizer(word_tokenizer(words), length=4)

    @pytest.mark.parametrize("vocab_size", [0, 1])
    def test_a_model_without_room_for_unknown_words(self, trained: TextTokenizer, vocab_size: int) -> None:
        with pytest.raises(CheckpointError, match=rf"knows {vocab_size} words, too few for \[UNK\] = 1"):
            TextTokenizer(trained.tokenizer, length=4, vocab_size=vocab_size)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no text tokenizer at .*none.json"):
            TextTokenizer.from_file(tmp_path / "none.json", length=4)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe\x00", b'"text"'])
    def test_damaged_native_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "text_tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"text_tokenizer.json is not a readable"):
            TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=4)

    def test_truncated_native_file(self, trained: TextTokenizer, tmp_path: Path) -> None:
        trained.save(tmp_path / "text_tokenizer.json")
        content = (tmp_path / "text_tokenizer.json").read_text()
        assert json.loads(content)["model"]["type"] == "BPE"
        (tmp_path / "text_tokenizer.json").write_text(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match="is not a readable text tokenizer"):
            TextTokenizer.from_file(tmp_path / "text_tokenizer.json", length=4)

    def test_saving_is_atomic(
        self, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that fills up leaves the file that was there."""
        path = tmp_path / "text_tokenizer.json"
        trained.save(path)
        before = path.read_bytes()

        class Full:
            def save(self, name: str) -> None:
                Path(name).write_text("{")
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(trained, "tokenizer", Full())
        with pytest.raises(OSError, match="No space left"):
            trained.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
