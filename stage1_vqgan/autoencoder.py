"""What VQGAN and RQ-VAE share: encoder, 1x1 convolution, quantizer, 1x1 convolution, decoder."""

from __future__ import annotations

from torch import Tensor, nn

from stage1_vqgan.convnet import ConvNetConfig, Decoder, Encoder
from stage1_vqgan.interface import check_codes, check_images
from stage1_vqgan.quantize.interface import Quantizer, QuantizerOutput


class QuantizedAutoencoder(nn.Module):
    """An `ImageTokenizer` made of a convolutional encoder and decoder around a quantizer.

    Args:
        convnet: shape of encoder and decoder.
        quantizer: turns latents into codes.
        latent_width: channels of a latent on its way to the quantizer.
    """

    def __init__(self, convnet: ConvNetConfig, quantizer: Quantizer, latent_width: int) -> None:
        super().__init__()
        self.convnet = convnet
        self.encoder = Encoder(convnet)
        self.quant_conv = nn.Conv2d(convnet.latent_channels, latent_width, 1)
        self.quantizer = quantizer
        self.post_quant_conv = nn.Conv2d(latent_width, convnet.latent_channels, 1)
        self.decoder = Decoder(convnet)

    @property
    def codebook_size(self) -> int:
        """V, of the largest codebook."""
        return self.quantizer.codebook_size

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """V of each depth; one number for codes without depth."""
        return (self.codebook_size,)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one image's codes at the training resolution."""
        raise NotImplementedError

    def code_shape_at(self, image_size: int) -> tuple[int, ...]:
        """The shape of the codes of a square image of another size.

        Raises:
            ValueError: if there are none of that size.
        """
        if image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of {self.downsampling} for this image tokenizer, "
                f"got {image_size}"
            )
        side = image_size // self.downsampling
        return (side, side, *self.code_shape[2:])

    @property
    def downsampling(self) -> int:
        """Pixels per code along each side."""
        return self.convnet.downsampling

    def codebook(self) -> Tensor:
        """All codebooks (D, V, C), padded with zero rows to the largest V: what an RQ-Transformer reads."""
        return self.quantizer.all_codebooks()

    def by_depth(self, codes: Tensor) -> list[Tensor]:
        """Codes (B, *code_shape) -> those of each depth, or scale of a pyramid, (B, T of that depth)."""
        depth = len(self.codebook_sizes)
        return list(codes.reshape(len(codes), -1, depth).unbind(dim=-1))  # (B, T D) -> D times (B, T)

    def coarse_to_fine(self, codes: Tensor) -> list[Tensor]:
        """The codes of 1, 2, ... D depths, or scales of a pyramid, which decode to ever finer pictures.

        Args:
            codes: (B, *code_shape).

        Returns:
            (B, h, w, 1) to (B, h, w, D), or (B, 1) to (B, T) of a pyramid; the codes alone where there is one
            depth.
        """
        if codes.ndim == 3:
            return [codes]
        return [codes[..., :depth] for depth in range(1, codes.shape[-1] + 1)]

    def encode_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents before quantisation (B, C, h, w)."""
        check_images(images, self.downsampling)
        return self.quant_conv(self.encoder(images))  # type: ignore[no-any-return]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, C, h, w) -> images (B, 3, H, W), not clamped, of the latents' type."""
        inner = latents.to(self.post_quant_conv.weight.dtype)  # see `decode_in_`
        return self.decoder(self.post_quant_conv(inner)).to(latents.dtype)  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> Tensor:
        """Compress images to codes.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W are any multiples of `downsampling`.

        Returns:
            int64 (B, h, w) or (B, h, w, D), in [0, V), with h = H / downsampling; coarse to fine along D.
            (B, T) of a pyramid.

        Raises:
            ValueError: if the shape or dtype is not that of images.
        """
        latents = self.encode_latents(images)
        _check_finite(latents, "latents")
        return self.quantizer.encode(latents)

    def decode(self, codes: Tensor) -> Tensor:
        """Draw the images that codes stand for.

        Args:
            codes: int64 (B, h, w), or (B, h, w, D') of which D' < D give a coarser picture; in [0, V); any
                grid.

        Returns:
            (B, 3, h * downsampling, w * downsampling), about [-1, 1] and not clamped.

        Raises:
            ValueError: if the codes have another shape or are out of range.
        """
        check_codes(codes, self.codebook_size, ndim=1 + len(self.code_shape))
        images = self.decode_latents(self.quantizer.decode(codes))
        _check_finite(images, "pixels")
        return images

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct images with gradients, for training.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            reconstructions (B, 3, H, W) and the quantizer's output.
        """
        quantized: QuantizerOutput = self.quantizer(self.encode_latents(images))
        return self.decode_latents(quantized.latents), quantized


def _check_finite(values: Tensor, what: str) -> None:
    """Refuse what would be black pictures, or codes that mean nothing."""
    if not values.isfinite().all():
        raise FloatingPointError(
            f"the image tokenizer gives {what} that are NaN or infinite: its weights are damaged, "
            f"its training diverged, or {values.dtype} is too narrow for it (try fp32)"
        )
