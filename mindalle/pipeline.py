"""From a prompt to pictures: encode, prefill, generate, decode, rerank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mindalle.checkpoint import SamplingDefaults, load_checkpoint
from mindalle.device import choose_device
from mindalle.hub import resolve_model
from mindalle.image import fit, to_pil, to_tensor
from mindalle.memory import candidates_at_once, decode_in_parts
from mindalle.preview import Preview
from mindalle.rerank import ClipReranker
from mindalle.text import TextTokenizer
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage2_transformer import GPT, RQTransformer, SamplingParams, generate, image_seeds, iterate_codes
from stage2_transformer.compiled import compile_steps
from stage2_transformer.precision import check_precision, precision_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Pictures of one prompt, best first where there was a CLIP to judge, in drawing order otherwise."""

    images: list[Image.Image]
    scores: list[float] | None  # cosine similarity of picture and prompt in [-1, 1]; None = not reranked
    codes: Tensor  # int64 (len(images), *code_shape)
    indices: list[int]  # which candidate each picture is: the i that, with the seed, it depends on


class Pipeline:
    """The parts of a text-, class- or unconditional image generator, each usable alone.

    Args:
        image_tokenizer: stage 1.
        model: stage 2; None = the checkpoint holds a tokenizer only.
        text_tokenizer: of a model with text condition.
        reranker: judges candidates; None = pictures are not ranked.
        sampling: used where a call says nothing.
    """

    def __init__(
        self,
        image_tokenizer: QuantizedAutoencoder,
        model: GPT | RQTransformer | None = None,
        text_tokenizer: TextTokenizer | None = None,
        reranker: ClipReranker | None = None,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        self.image_tokenizer = image_tokenizer
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.reranker = reranker
        self.sampling = sampling or SamplingDefaults()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "emoji",
        *,
        device: str | torch.device = "auto",
        precision: str = "fp32",
        clip: str | Path | None = None,
        text_tokenizer: str | Path | None = None,
        use_ema: bool = False,
        compile: bool = False,
    ) -> Pipeline:
        """Load a pipeline.

        Args:
            name: a bundled model ("emoji"), a local checkpoint of any known layout, a release
                ("minDALL-E/1.3B", "rq-vae/cc3m", ...), or a Hugging Face hub id.
            device: where the models compute, see `mindalle.device.choose_device`; "auto" is CUDA, else
                Apple's mps (never tried), else the CPU.
            precision: "fp32", "bf16", "fp16", "int8" (CPU only, and not exact) or "auto", which chooses by
                device and size; of the sequence model. With bf16 and int8 pictures are decoded in bf16 where
                that is quick, which moves pixels by about a third of one of 255 levels.
            clip: the CLIP to rerank with, see `ClipReranker.from_pretrained`; None = the checkpoint's own,
                if any.
            text_tokenizer: file, directory or model that has it, where it is not with the checkpoint, see
                `mindalle.hub.resolve_text_tokenizer`.
            use_ema: take the averaged weights of the sequence model, or of a tokenizer that is alone.
            compile: decode through torch.compile, see `stage2_transformer.compiled`; for GPUs.

        Returns:
            The pipeline, in evaluation mode.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: if the checkpoint is damaged, or an argument unknown or not for this device.
        """
        device = choose_device(device)
        check_precision(precision, device)  # before anything is downloaded
        path = resolve_model(name)
        checkpoint = load_checkpoint(
            path, text_tokenizer=text_tokenizer, use_ema=use_ema, precision=precision, device=device
        )
        if checkpoint.model is not None and precision == "auto":
            chosen = precision_of(checkpoint.model)
            if chosen != "fp32":  # which needs no word: it is exact
                logger.info("precision %s, chosen by device and size; fp32 is exact, and slower", chosen)
        if clip is None and (path / "clip.safetensors").is_file():
            clip = path
        model = checkpoint.model.to(device) if checkpoint.model is not None else None
        if model is not None and compile:
            compile_steps(model)
        return cls(
            checkpoint.image_tokenizer.to(device),
            model,
            checkpoint.text_tokenizer,
            ClipReranker.from_pretrained(clip, device=device) if clip is not None else None,
            checkpoint.sampling,
        )

    def __call__(
        self,
        prompt: str | int | None = None,
        *,
        num_images: int = 1,
        num_candidates: int | None = None,
        params: SamplingParams | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        known: Tensor | None = None,
        on_step: Callable[[Preview], None] | None = None,
    ) -> Generation:
        """Draw pictures and keep the best.

        Args:
            prompt: text, a class label, or None, as the model wants it.
            num_images: pictures to return, >= 1.
            num_candidates: pictures to draw and choose from, >= num_images; None = the checkpoint's default.
                Without a reranker no more than `num_images` are drawn.
            params: how to sample; None = the checkpoint's defaults.
            seed: candidate i depends on the model, the prompt, `params`, this seed and i alone.
            batch_size: candidates drawn at once, >= 1; changes memory and speed, not the pictures. None = up
                to 16, fewer of a large model, see `mindalle.memory`.
            known: (1, n) codes that every picture begins with, see `known_codes`.
            on_step: called with a preview after each code of each batch.

        Returns:
            The pictures.

        Raises:
            ValueError: if the model has no such condition, or a number is out of range.
        """
        if num_images < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(
                f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}"
            )
        model, params = self._require_model(), params or self.sampling.params
        wanted = self.count_candidates(prompt, num_images, num_candidates)
        if num_candidates is not None and wanted < num_candidates:
            logger.warning("nothing to rank with: %d candidates are drawn, not %d", wanted, num_candidates)
        cond = self.encode_condition(prompt)  # once: it warns of words that are lost
        batches, size = [], batch_size or candidates_at_once(model, wanted, params)
        for first in range(0, wanted, size):
            last: Preview | None = None
            seeds = image_seeds(seed, min(size, wanted - first), first)
            for last in self._stream(cond, seeds, params, known):
                if on_step is not None:
                    on_step(last)
            assert last is not None
            batches.append(last.codes)
        return self.choose(torch.cat(batches), prompt, num_images)

    def count_candidates(
        self, prompt: str | int | None, num_images: int, num_candidates: int | None = None
    ) -> int:
        """How many pictures a call draws: without something to rank with no more than it returns.

        Raises:
            ValueError: if there are fewer candidates than images.
        """
        wanted = num_candidates if num_candidates is not None else num_images * self.sampling.num_candidates
        if wanted < num_images:
            raise ValueError(f"num_candidates must be at least num_images = {num_images}, got {wanted}")
        return wanted if self.reranker is not None and isinstance(prompt, str) else num_images

    def choose(self, codes: Tensor, prompt: str | int | None, num_images: int) -> Generation:
        """Decode candidates and keep the best; without a reranker or a prompt the first.

        Args:
            codes: int64 (B, *code_shape) of candidates 0 to B - 1.
            prompt: they were drawn for.
            num_images: to keep, at most B.

        Returns:
            The pictures.
        """
        if self.reranker is None or not isinstance(prompt, str):
            codes = codes[:num_images]
            images = self.decode(codes)
            return Generation(images=images, scores=None, codes=codes, indices=list(range(len(codes))))
        images = self.decode(codes)
        scores = self.reranker.score(images, prompt)
        order = scores.argsort(descending=True, stable=True)[:num_images].tolist()
        return Generation(
            images=[images[i] for i in order],
            scores=[float(scores[i]) for i in order],
            codes=codes[order],
            indices=order,
        )

    def stream(
        self,
        prompt: str | int | None = None,
        *,
        num_images: int = 1,
        params: SamplingParams | None = None,
        seed: int = 0,
        known: Tensor | None = None,
    ) -> Iterator[Preview]:
        """Draw pictures in one batch, without ranking, showing them while they grow.

        Args:
            prompt: text, a class label, or None.
            num_images: pictures in the batch.
            params: how to sample; None = the checkpoint's defaults.
            seed: candidate i depends on the model, the prompt, `params`, this seed and i alone.
            known: (1, n) codes that every picture begins with.

        Yields:
            A preview after each code; its images are decoded only if asked for.
        """
        seeds = image_seeds(seed, num_images)
        yield from self._stream(self.encode_condition(prompt), seeds, params, known)

    def draw_codes(
        self,
        prompts: Sequence[str | int | None],
        *,
        num_candidates: int = 1,
        params: SamplingParams | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Draw candidates of several prompts in one batch, undecoded and unranked.

        Args:
            prompts: P >= 1 texts, class labels, or Nones.
            num_candidates: of each prompt, >= 1.
            params: how to sample; None = the checkpoint's defaults.
            seed: candidate i of a prompt is that of a call with this prompt and seed.

        Returns:
            int64 (P, num_candidates, *code_shape).

        Raises:
            ValueError: if the model has no such condition.
        """
        model, seeds = self._require_model(), image_seeds(seed, num_candidates) * len(prompts)
        codes = generate(model, self.encode_conditions(prompts), params or self.sampling.params, seeds=seeds)
        return codes.view(len(prompts), num_candidates, *model.code_shape)  # (P * n, ...) -> (P, n, ...)

    def _stream(
        self, cond: Tensor | None, seeds: list[int], params: SamplingParams | None, known: Tensor | None
    ) -> Iterator[Preview]:
        model = self._require_model()
        for num_done, codes in iterate_codes(
            model, cond, params or self.sampling.params, seeds=seeds, known=known
        ):
            yield Preview(
                num_done=num_done,
                num_codes=codes.shape[1],
                # a copy: the loop goes on writing to its own. (B, T) -> (B, *code_shape)
                codes=codes.clone().view(len(seeds), *model.code_shape),
                image_tokenizer=self.image_tokenizer,
            )

    def encode_condition(self, prompt: str | int | None) -> Tensor | None:
        """One prompt as the model wants it, see `encode_conditions`."""
        return self.encode_conditions([prompt])

    def encode_conditions(
        self, prompts: Sequence[str | int | None], *, warns_of_loss: bool = True
    ) -> Tensor | None:
        """Prompts as the model wants them: text ids (P, N), labels (P,), or None.

        Args:
            prompts: P >= 1 texts, class labels, or Nones.
            warns_of_loss: name the words of texts that are too long for the model.

        Returns:
            On the model's device.

        Raises:
            ValueError: if the model has another kind of condition, no text tokenizer, or no such class.
        """
        for prompt in prompts:
            self._check_condition(prompt)
        model = self._require_model()
        device = next(model.parameters()).device
        if model.config.condition.kind == "none":
            return None
        if model.config.condition.kind == "class":
            return torch.tensor(prompts, device=device)
        assert self.text_tokenizer is not None
        return self.text_tokenizer.encode(list(map(str, prompts)), warns_of_loss=warns_of_loss).to(device)

    def _check_condition(self, prompt: str | int | None) -> None:
        """Refuse what the model does not draw from."""
        condition = self._require_model().config.condition
        wanted = {"text": str, "class": int, "none": type(None)}[condition.kind]
        if not isinstance(prompt, wanted):
            raise ValueError(
                {
                    "text": f"this model draws from text, got {prompt!r}: pass a prompt (--prompt TEXT)",
                    "class": f"this model draws classes 0 to {condition.vocab_size - 1}, got {prompt!r}: "
                    "pass a class label (--class-label N)",
                    "none": f"this model is unconditional, got {prompt!r}: pass no prompt and no class label",
                }[condition.kind]
            )
        if isinstance(prompt, str) and self.text_tokenizer is None:
            raise ValueError(
                "this checkpoint has no text tokenizer (rq-vae-transformer's releases ship none): pass "
                "text_tokenizer, on the command line --text-tokenizer: minDALL-E/1.3B, whose tokenizer is "
                "theirs too, or the directory of bpe-16k-vocab.json and bpe-16k-merges.txt"
            )
        if isinstance(prompt, int) and not 0 <= prompt < condition.vocab_size:
            raise ValueError(f"class label must be in [0, {condition.vocab_size}), got {prompt}")

    def known_codes(self, image: Image.Image, keep_rows: int) -> Tensor:
        """The codes of the top of an image, for its completion.

        Args:
            image: resized and cropped to the model's resolution.
            keep_rows: rows of codes to keep, of which the picture has `code_shape[0]`.

        Returns:
            (1, n) codes in raster order.

        Raises:
            ValueError: if `keep_rows` is out of range.
        """
        if len(self.image_tokenizer.code_shape) == 1:
            raise ValueError(
                "keep_rows needs codes in rows, and this model draws a pyramid of codes, coarse to fine: "
                "complete pictures with a model of one grid"
            )
        rows, size = self.image_tokenizer.code_shape[0], self.image_tokenizer.convnet.image_size
        if not 1 <= keep_rows < rows:
            raise ValueError(f"keep_rows must be between 1 and {rows - 1} rows of codes, got {keep_rows}")
        device = next(self.image_tokenizer.parameters()).device
        pixels = to_tensor(fit(image, (size, size))).unsqueeze(0).to(device)
        with torch.inference_mode():
            return self.image_tokenizer.encode(pixels)[:, :keep_rows].flatten(1)  # (1, rows, ...) -> (1, n)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes (B, *code_shape) to PIL images."""
        with torch.inference_mode():
            return to_pil(decode_in_parts(self.image_tokenizer, codes))

    def _require_model(self) -> GPT | RQTransformer:
        if self.model is None:
            raise ValueError(
                "this checkpoint holds an image tokenizer only: it reconstructs, but cannot generate"
            )
        return self.model
