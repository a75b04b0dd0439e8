"""CLIP: two encoders whose features of a picture and of its caption are alike.

Modules have the names of OpenAI's release, so that its weights load as they are.

Legend: n pictures or texts, C features, N ids of a text, T positions, W channels, h w positions of a map.

Source: Radford et al. 2021, and OpenAI's release of its models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_transformer.layers import QuickGELU, normal_parameter

if TYPE_CHECKING:
    from mindalle.clip import ClipConfig

RESNET_STRIDE = 32  # pixels of the picture per position of the ResNet's last feature map
RESNET_EXPANSION = 32  # channels of that map per vision_width; the ResNet's one attention is over it
BOTTLENECK_EXPANSION = 4  # channels that leave a bottleneck per channel inside
INITIAL_TEMPERATURE = 0.07


class Clip(nn.Module):
    """A picture encoder and a text encoder with features in common.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.text_width
        activation = QuickGELU if config.quick_gelu else nn.GELU
        self.visual = (
            VisionTransformer(config, activation) if config.resnet_stages is None else ResNet(config)
        )
        # drawn in one order and kept in another, as open_clip's: a seed gives the same weights, and an
        # optimiser's state finds its parameters
        token_embedding = nn.Embedding(config.vocab_size, width)
        self.transformer = Transformer(width, config.text_layers, config.text_heads, activation)
        self.token_embedding = token_embedding
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / INITIAL_TEMPERATURE)))
        self._initialise_text(width, config.text_layers)

    def _initialise_text(self, width: int, num_layers: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        stds = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": (2 * width * num_layers) ** -0.5,  # 2 branches of a block are summed up
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": (2 * width * num_layers) ** -0.5,
        }
        for block in self.transformer.resblocks:
            for name, std in stds.items():
                nn.init.normal_(block.get_parameter(name), std=std)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, image: Tensor) -> Tensor:
        """Pixels (n, 3, H, W), as `ClipConfig.preprocess` makes them -> features (n, C) of any length."""
        features: Tensor = self.visual(image)
        return features

    def encode_text(self, text: Tensor) -> Tensor:
        """Ids (n, N), the end's the largest -> features (n, C) of any length."""
        x = self.token_embedding(text) + self.positional_embedding  # (n, N, W)
        length = x.shape[1]
        causal = torch.full((length, length), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        x = self.ln_final(self.transformer(x, causal))
        end = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]  # (n, W)
        features: Tensor = end @ self.text_projection
        return features


class LayerNorm(nn.LayerNorm):
    """Gives the dtype it is given: autocast's float32 would make the whole residual stream float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> the same shape and dtype."""
        return super().forward(x).to(x.dtype)


class Block(nn.Module):
    """Attention and an MLP, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, num_heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=activation(), c_proj=nn.Linear(4 * width, width)
            )
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, T, W), and what is added to attention's logits (T, T) -> (n, T, W)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        mixed: Tensor = x + self.mlp(self.ln_2(x))
        return mixed


class Transformer(nn.Module):
    """Blocks, one after another."""

    def __init__(self, width: int, num_layers: int, num_heads: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, num_heads, activation) for _ in range(num_layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(n, T, W), and what is added to attention's logits (T, T) -> (n, T, W)."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """A transformer over the patches of a picture and a class token, whose output is the picture's.

    Source: Dosovitskiy et al. 2021, with a LayerNorm before the transformer too.
    """

    def __init__(self, config: ClipConfig, activation: type[nn.Module]) -> None:
        super().__init__()
        width, patch_size = config.vision_width, config.vision_patch_size
        num_patches = (config.image_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = normal_parameter(width, std=width**-0.5)
        self.positional_embedding = normal_parameter(num_patches + 1, width, std=width**-0.5)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width, config.vision_layers, width // config.vision_head_width, activation
        )
        self.ln_post = LayerNorm(width)
        self.proj = normal_parameter(width, config.embed_dim, std=width**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) -> features (n, C)."""
        patches = rearrange(self.conv1(image), "n w height width -> n (height width) w")
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)  # (n, 1, W)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding.to(patches.dtype)  # (n, T, W)
        x = self.transformer(self.ln_pre(x))
        features: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return features


class ResNet(nn.Module):
    """A ResNet with a stem of three convolutions (He et al. 2019) and attention as its last pool."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        assert config.resnet_stages is not None
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        first, second, third, fourth = config.resnet_stages
        self.layer1 = make_stage(width, width, first, stride=1)
        self.layer2 = make_stage(width * 4, width * 2, second, stride=2)
        self.layer3 = make_stage(width * 8, width * 4, third, stride=2)
        self.layer4 = make_stage(width * 16, width * 8, fourth, stride=2)
        features, side = width * RESNET_EXPANSION, config.image_size // RESNET_STRIDE
        self.attnpool = AttentionPool(
            features, side**2, features // config.vision_head_width, config.embed_dim
        )
        for block in self.modules():
            if isinstance(block, Bottleneck):
                nn.init.zeros_(block.bn3.weight)  # a block is the identity at first

    def forward(self, image: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) -> features (n, C)."""
        x = F.relu(self.bn1(self.conv1(image)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = self.avgpool(x)  # (n, vision_width, H / 4, W / 4)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        features: Tensor = self.attnpool(x)
        return features


def make_stage(in_channels: int, channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    """Bottlenecks of one size, of which the first one has the stride."""
    first = Bottleneck(in_channels, channels, stride=stride)
    others = [Bottleneck(channels * BOTTLENECK_EXPANSION, channels) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *others)


class Bottleneck(nn.Module):
    """Three convolutions added to their input; a stride is an average pool, against aliasing (Zhang 2019)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * BOTTLENECK_EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            layers = [("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(out_channels))]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, 4 channels, h / stride, w / stride)."""
        inner = F.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = F.relu(self.bn2(self.conv2(inner)), inplace=True)
        inner = self.bn3(self.conv3(self.avgpool(inner)))
        return F.relu(inner + self.downsample(x), inplace=True)


class AttentionPool(nn.Module):
    """Attention of the mean of a feature map to the map and to itself."""

    def __init__(self, width: int, num_positions: int, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = normal_parameter(num_positions + 1, width, std=width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Feature map (n, W, h, w) -> features (n, C)."""
        x = rearrange(x, "n c h w -> n (h w) c")
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (n, T, W)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            rearrange(part, "n t (nh hd) -> n nh t hd", nh=self.num_heads)
            for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        pooled = rearrange(F.scaled_dot_product_attention(q, k, v), "n nh 1 hd -> n (nh hd)")
        features: Tensor = self.c_proj(pooled)
        return features
