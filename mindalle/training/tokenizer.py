"""Training an image tokenizer: VQGAN, RQ-VAE or a pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mindalle.image import psnr
from mindalle.run import load_image_tokenizer
from mindalle.training.base import OptimizerConfig, Training
from mindalle.training.watch import TokenizerWatch
from stage1_vqgan import RQVAE, VQGAN, PyramidVAE, PyramidVAEConfig, RQVAEConfig, VQGANConfig
from stage1_vqgan.autoencoder import QuantizedAutoencoder
from stage1_vqgan.losses import TokenizerLoss, TokenizerLossConfig
from stage1_vqgan.perceptual import SMALLEST_SIDES
from stage1_vqgan.quantize import CodebookAverages, CodebookTrainingConfig, PyramidQuantizer
from stage1_vqgan.quantize.usage import code_counts, perplexity


class TokenizerTraining(Training):
    """Fits an image tokenizer to images, with an adversary if the loss has one.

    Batches are mappings with `images` (B, 3, H, W) in [-1, 1]. One optimiser trains tokenizer and
    discriminator in one backward pass, see `TokenizerLoss`.

    Args:
        model: the tokenizer.
        optimizer: of tokenizer and discriminator; None = the originals' betas (0.5, 0.9).
        loss: terms and weights; None = L1 + LPIPS + PatchGAN.
        codebook: how codebooks learn; None = by gradient, from the quantizer's codebook loss.
        is_pretrained: whether the codebooks are good already, and are not to start from the first batch.
        decoder_only: train nothing but the decoder, so that pictures keep their codes: sequence models and
            code caches made for the pretrained tokenizer go on to fit.

    Raises:
        ValueError: if the pictures are too small for the discriminator or the perceptual network, or there
            are no codes to keep.
    """

    model: QuantizedAutoencoder

    def __init__(
        self,
        model: QuantizedAutoencoder,
        optimizer: OptimizerConfig | None,
        loss: TokenizerLossConfig | None,
        codebook: CodebookTrainingConfig | None,
        *,
        is_pretrained: bool = False,
        decoder_only: bool = False,
    ) -> None:
        super().__init__(optimizer or OptimizerConfig(betas=(0.5, 0.9)))
        self.model = model
        if decoder_only:
            if not is_pretrained:
                raise ValueError(
                    "decoder_only keeps the codes of a pretrained tokenizer: name it as pretrained"
                )
            for part in (model.encoder, model.quant_conv, model.quantizer):
                part.requires_grad_(False)
            codebook = None
        self.is_pretrained = is_pretrained
        self.loss = TokenizerLoss(loss or TokenizerLossConfig())
        _check_size(model, self.loss)
        self.averages = CodebookAverages(model.quantizer, codebook) if codebook is not None else None
        self.watch = TokenizerWatch(self.loss.config, codebook, is_codebook_trained=not decoder_only)
        # of the running batch: what the codebooks are to follow
        self._assigned: tuple[Tensor, Tensor] | None = None
        self._code_counts: Tensor  # (D, V): how often each code was chosen in the running validation

    def trained_modules(self) -> list[nn.Module]:
        """The tokenizer and the discriminator."""
        return [self.model, self.loss]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch; returns the loss.

        Raises:
            ValueError: if the images are of another size than the config's.
        """
        images, size = batch["images"], self.model.convnet.image_size
        if tuple(images.shape[2:]) != (size, size):
            raise ValueError(
                f"images must be (B, 3, {size}, {size}) for this tokenizer, got {tuple(images.shape)}: "
                f"set the data's transform.image_size to {size}, or the model's convnet.image_size"
            )
        latents: Tensor = self.model.encode_latents(images)
        if self.averages is not None and not self.is_pretrained:
            self.averages.start(latents)
        if self.averages is not None and isinstance(self.model.quantizer, PyramidQuantizer):
            self.model.quantizer.swap_share = self.averages.config.swap_share_at(self.global_step)
        quantized = self.model.quantizer(latents)
        reconstructions = self.model.decode_latents(quantized.latents)
        terms = self.loss(
            images,
            reconstructions,
            quantized,
            step=self.global_step,
            last_layer=self.model.decoder.last_layer,
        )
        if self.averages is not None:
            self._assigned = (latents.detach(), quantized.codes)
        if self.global_rank == 0:
            assignments = self.model.quantizer.assignments(latents.detach(), quantized.codes)
            self.watch.observe(terms.parts, assignments)
        self._log_terms("train", images, reconstructions, terms.total, terms.parts)
        total: Tensor = terms.total
        return total

    def on_after_backward(self) -> None:
        """Move the codebooks, once per batch: after all depths have chosen and the loss was found sound."""
        if self.averages is None or self._assigned is None:
            return
        self.averages.update(*self._assigned)
        self._assigned = None
        self.log("train/codes_alive", self.averages.usage())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the optimiser's hands off an adversary that has not begun: moments would count its zeros."""
        if not self.loss.is_adversarial(self.global_step):
            self.loss.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each player's gradient by itself: an adversary's would shrink the tokenizer's steps."""
        if not gradient_clip_val:
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for module in self.trained_modules():
            if player := [p for p in module.parameters() if p.grad is not None]:
                clip(player, gradient_clip_val)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss on held-out images, without the adversary, and count codes."""
        images = batch["images"]
        reconstructions, quantized = self.model(images)
        terms = self.loss(images, reconstructions, quantized, step=self.global_step)
        self._log_terms("val", images, reconstructions, terms.total, terms.parts)
        self._code_counts += code_counts(self.model.by_depth(quantized.codes), self.model.codebook_size)

    def on_validation_epoch_start(self) -> None:
        """Count codes anew."""
        shape = (len(self.model.codebook_sizes), self.model.codebook_size)
        self._code_counts = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log, per depth, the share of the codebook in use and its perplexity over the held-out images."""
        counts = self.trainer.strategy.reduce(self._code_counts, reduce_op="sum")
        perplexities = perplexity(counts)  # (D,)
        for depth, size in enumerate(self.model.codebook_sizes):
            self.log(f"val/usage_depth{depth}", (counts[depth] > 0).sum() / size)
            self.log(f"val/perplexity_depth{depth}", perplexities[depth].float())

    def _log_terms(
        self, stage: str, images: Tensor, reconstructions: Tensor, total: Tensor, parts: dict[str, Tensor]
    ) -> None:
        named = {f"{stage}/{name}": part for name, part in parts.items()}
        size = len(images)
        self.log_dict(named | {f"{stage}/loss": total.detach()}, batch_size=size, sync_dist=stage == "val")
        quality = psnr(images, reconstructions.detach().float()).mean()
        self.log(f"{stage}/psnr", quality, batch_size=size, prog_bar=True, sync_dist=stage == "val")


class VQGANTraining(TokenizerTraining):
    """Fits a VQGAN.

    Args:
        config: of the model; None = that of `pretrained`.
        optimizer: see `TokenizerTraining`.
        loss: see `TokenizerTraining`.
        codebook: see `TokenizerTraining`.
        pretrained: tokenizer to start from: training run, bundled name, path or release.
        decoder_only: see `TokenizerTraining`.

    Raises:
        ValueError: if there is neither config nor pretrained tokenizer, or the two differ.
    """

    kind = "vqgan"

    def __init__(
        self,
        config: VQGANConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: TokenizerLossConfig | None = None,
        codebook: CodebookTrainingConfig | None = None,
        pretrained: str | None = None,
        decoder_only: bool = False,
    ) -> None:
        model = _build(VQGAN, config, pretrained)
        super().__init__(
            model, optimizer, loss, codebook, is_pretrained=pretrained is not None, decoder_only=decoder_only
        )


class RQVAETraining(TokenizerTraining):
    """Fits an RQ-VAE; its codebooks learn by moving averages.

    Args:
        config: of the model; None = that of `pretrained`.
        optimizer: see `TokenizerTraining`.
        loss: see `TokenizerTraining`.
        codebook: of the moving averages.
        pretrained: tokenizer to start from: training run, bundled name, path or release.
        decoder_only: see `TokenizerTraining`.

    Raises:
        ValueError: if there is neither config nor pretrained tokenizer, or the two differ.
    """

    kind = "rqvae"

    def __init__(
        self,
        config: RQVAEConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: TokenizerLossConfig | None = None,
        codebook: CodebookTrainingConfig | None = None,
        pretrained: str | None = None,
        decoder_only: bool = False,
    ) -> None:
        codebook = codebook or CodebookTrainingConfig()
        model = _build(RQVAE, config, pretrained)
        super().__init__(
            model, optimizer, loss, codebook, is_pretrained=pretrained is not None, decoder_only=decoder_only
        )


class PyramidVAETraining(TokenizerTraining):
    """Fits a tokenizer with a pyramid of codes; its codebooks learn by moving averages.

    Args:
        config: of the model; None = that of `pretrained`.
        optimizer: see `TokenizerTraining`.
        loss: see `TokenizerTraining`.
        codebook: of the moving averages.
        pretrained: tokenizer with a pyramid to start from: training run, bundled name, path or release.
        decoder_only: see `TokenizerTraining`.
        start_from: tokenizer of any quantizer, of the same convnet and width, whose encoder and decoder are
            taken; the codebooks start anew.
    """

    kind = "pyramid"

    def __init__(
        self,
        config: PyramidVAEConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        loss: TokenizerLossConfig | None = None,
        codebook: CodebookTrainingConfig | None = None,
        pretrained: str | None = None,
        decoder_only: bool = False,
        start_from: str | None = None,
    ) -> None:
        if pretrained is not None and start_from is not None:
            raise ValueError("pretrained and start_from contradict each other: name one of them")
        model = _build(PyramidVAE, config, pretrained)
        if start_from is not None:
            model.start_from(load_image_tokenizer(start_from))
        codebook = codebook or CodebookTrainingConfig()
        super().__init__(
            model, optimizer, loss, codebook, is_pretrained=pretrained is not None, decoder_only=decoder_only
        )


def _check_size(model: QuantizedAutoencoder, loss: TokenizerLoss) -> None:
    size, adversary = model.convnet.image_size, loss.discriminator
    if adversary is not None and size < adversary.min_size:
        raise ValueError(
            f"the discriminator needs pictures of at least {adversary.min_size} pixels, got {size}: "
            "lower loss.discriminator.num_layers, or set loss.adversarial_weight to 0"
        )
    name = loss.config.perceptual
    if size < SMALLEST_SIDES[name]:
        raise ValueError(
            f"loss.perceptual {name} needs pictures of at least {SMALLEST_SIDES[name]} pixels, got {size}: "
            "set it to none"
        )


def _build(cls: Any, config: Any, pretrained: str | None) -> Any:
    """A new model, or a pretrained one of the same kind and config."""
    if pretrained is None:
        if config is None:
            raise ValueError("model.config is missing: describe the model, or name a pretrained one")
        return cls(config)
    model: Any = load_image_tokenizer(pretrained).train()
    if type(model) is not cls:
        raise ValueError(f"{pretrained} has a {type(model).__name__}, expected a {cls.__name__}")
    if config is not None and config != model.config:
        raise ValueError(
            f"{pretrained} has another config than model.config: leave out model.config.\n"
            f"got {config}\nexpected {model.config}"
        )
    return model
