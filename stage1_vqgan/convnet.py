"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, appendix; after Ho et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint_io import check_bounds

NORM_GROUPS = 32
MAX_LEVELS = 12
"""More than halve the sides of the largest picture to nothing."""


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Shape of the encoder and of the decoder, its mirror image."""

    image_size: int = 256  # side of the training images in pixels; fixes which levels have attention; <= 4096
    channels: int = 128  # width of the first level; a multiple of 32, <= 4096
    channel_multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # width of each level; each but the last halves the sides
    num_res_blocks: int = 2  # per level of the encoder (the decoder has one more), in [1, 64]
    attention_resolutions: tuple[int, ...] = (16,)  # levels of this side (at image_size) get self-attention
    latent_channels: int = 256  # channels of the encoder's output, <= 65536
    dropout: float = 0.0  # in the residual blocks while training, in [0, 1)
    has_middle_attention: bool = True  # self-attention between the blocks of the lowest resolution
    has_resampling_conv: bool = True  # sides are halved and doubled by convolutions, not by means and copies
    has_tanh_output: bool = False  # pixels go through tanh

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        check_bounds(
            self,
            image_size=1 << 12,
            channels=1 << 12,
            channel_multipliers=1 << 6,
            num_res_blocks=1 << 6,
            latent_channels=1 << 16,
        )
        if len(self.channel_multipliers) > MAX_LEVELS:
            raise ValueError(
                f"channel_multipliers must be at most {MAX_LEVELS}, got {len(self.channel_multipliers)}"
            )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be positive, got {self.channel_multipliers}")
        if self.channels < 1 or self.channels % NORM_GROUPS:
            raise ValueError(
                f"channels must be a multiple of {NORM_GROUPS} (group norm), got {self.channels}"
            )
        if self.image_size < 1 or self.image_size % self.downsampling:
            raise ValueError(f"image_size must be a multiple of {self.downsampling}, got {self.image_size}")
        if self.num_res_blocks < 1 or self.latent_channels < 1:
            raise ValueError(
                f"num_res_blocks and latent_channels must be at least 1, "
                f"got {self.num_res_blocks} and {self.latent_channels}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def latent_size(self) -> int:
        """Side of the latent grid at the training resolution."""
        return self.image_size // self.downsampling

    def has_attention(self, level: int) -> bool:
        """Whether the residual blocks of a level are followed by self-attention."""
        return self.image_size // 2**level in self.attention_resolutions


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)  # eps of the originals, not PyTorch's 1e-5


def _swish(x: Tensor) -> Tensor:
    """The activation x * sigmoid(x) of what nobody else reads: without gradients in its place."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv, plus the input (by a 1x1 conv if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        h = self.conv1(_swish(self.norm1(x)))
        h = self.conv2(self.dropout(_swish(self.norm2(h))))
        return self.shortcut(x) + h  # type: ignore[no-any-return]


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions of the grid, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        qkv = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(*qkv.unbind())
        attended = rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj(attended)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve the sides: a 3x3 convolution of stride 2, zero-padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double the sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


def _halve(config: ConvNetConfig, channels: int) -> nn.Module:
    return Downsample(channels) if config.has_resampling_conv else nn.AvgPool2d(2)


def _double(config: ConvNetConfig, channels: int) -> nn.Module:
    return Upsample(channels) if config.has_resampling_conv else nn.Upsample(scale_factor=2.0, mode="nearest")


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next one (None at the last)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        has_attention: bool,
        dropout: float,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels) for _ in range(num_blocks * has_attention)
        )
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)  # type: ignore[no-any-return]


class Middle(nn.Module):
    """Residual block, attention if there is any, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float, *, has_attention: bool) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, dropout)
        self.attention = AttentionBlock(channels) if has_attention else nn.Identity()
        self.block2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block2(self.attention(self.block1(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Images to latents."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in (1, *config.channel_multipliers)]
        last = len(config.channel_multipliers) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[level],
                widths[level + 1],
                num_blocks=config.num_res_blocks,
                has_attention=config.has_attention(level),
                dropout=config.dropout,
                resample=_halve(config, widths[level + 1]) if level != last else None,
            )
            for level in range(last + 1)
        )
        self.middle = Middle(widths[-1], config.dropout, has_attention=config.has_middle_attention)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)."""
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(_swish(self.norm_out(self.middle(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to images. `levels[0]` is the highest resolution and runs last, as in the originals' keys."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(widths[-1], config.dropout, has_attention=config.has_middle_attention)
        self.levels = nn.ModuleList(
            Level(
                widths[min(level + 1, len(widths) - 1)],
                widths[level],
                num_blocks=config.num_res_blocks + 1,
                has_attention=config.has_attention(level),
                dropout=config.dropout,
                resample=_double(config, widths[level]) if level != 0 else None,
            )
            for level in range(len(widths))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        self.has_tanh_output = config.has_tanh_output

    @property
    def last_layer(self) -> Tensor:
        """The weight on which the adaptive weight of an adversarial loss is measured."""
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, H, W), not clamped."""
        x = self.middle(self.conv_in(latents))
        for level in reversed(self.levels):
            x = level(x)
        images: Tensor = self.conv_out(_swish(self.norm_out(x)))
        return images.tanh() if self.has_tanh_output else images
