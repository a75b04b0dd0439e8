"""Linear layers in 8 bits: for decoding on a CPU, which waits for weights, not for arithmetic.

Weights have one scale per output channel, activations one per row: what a row becomes does not depend on the
rows beside it, so an image does not depend on its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stage2_transformer.rq_transformer import DepthClassifier

WEIGHT_LEVELS = 127
"""Of a signed byte; -128 is left out, so that the range is symmetric."""

KEPT = ("body_input.linear", "head_input.linear", "code_embedding", "canvas_embedding")
"""Linear layers that stay as they are: small, and read through their weights."""

ROWS_AT_ONCE = 256
"""Of a weight in float32 while it is rounded: large tensors that come and go leave holes in memory."""


def activation_levels() -> int:
    """Steps on either side of zero that an activation is rounded to.

    Without the VNNI instructions products are added in pairs in 16 bits, where those of full bytes overflow.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def has_int8() -> bool:
    """Whether this CPU and this torch have the kernel: FBGEMM's, on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class Int8Linear(nn.Module):
    """`nn.Linear` with int8 weights, prepacked, and activations rounded row by row; float32 in and out.

    Args:
        weight: int8 (C', C), in [-127, 127]; copied into the kernel's own layout.
        scale: (C',) float32, > 0; the layer's weights are `scale[:, None] * weight`.
        bias: (C',) float32 or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.levels = activation_levels()
        self._packed = _prepack(weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C'); a row with a number that is not finite becomes one of such numbers."""
        # not aminmax or the infinity norm, which are 5 to 30 times slower along the last dimension
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30)
        # every row is brought to [-1, 1], and so all rows share the kernel's one scale: 1 / levels
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.levels, self.levels + 1, self._packed
        )
        return product.mul_(scale) if self.bias is None else torch.addcmul(self.bias, product, scale)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("an int8 model cannot be saved: save the model it was made from, in fp32 or bf16")


class Int8DepthClassifier(nn.Module):
    """`DepthClassifier` with a layer of int8 weights per depth.

    Args:
        layers: D of them, without bias.
        bias: (D, V) float32.
    """

    def __init__(self, layers: Sequence[Int8Linear], bias: nn.Parameter) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bias = bias

    def forward(self, x: Tensor, depth: int) -> Tensor:
        """(..., C), all of one depth -> (..., V)."""
        return self.layers[depth](x).add_(self.bias[depth])  # type: ignore[no-any-return]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round the weights of each output channel to int8.

    Args:
        weight: (C', C), any float dtype.

    Returns:
        int8 (C', C) in [-127, 127] and float32 (C',): scale * int8 is within scale / 2 of the weight.
    """
    weight = weight.detach()
    # of a channel of zeros any scale will do
    scale = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float().clamp_min_(1e-30) / WEIGHT_LEVELS
    steps = torch.empty(weight.shape, dtype=torch.int8)
    for part, part_scale, part_steps in zip(
        *(torch.split(tensor, ROWS_AT_ONCE) for tensor in (weight, scale, steps)), strict=True
    ):
        part_steps.copy_((part.float() / part_scale[:, None]).round_())
    return steps, scale


def quantize_(model: nn.Module) -> nn.Module:
    """Replace the linear layers of all blocks, and the output layers.

    Args:
        model: a GPT or an RQTransformer, float32, on the CPU; changed in place.

    Returns:
        The same model, which can be decoded from but no longer be trained or saved. Embeddings, norms,
        attention and the cache stay in float32.
    """
    loader = Int8Loader(model)
    for name in loader.names:
        loader.take(name, model.get_parameter(name), 0, 1)
    return model


class Int8Loader:
    """Quantises weights as they arrive from a checkpoint, so that the float32 model is never whole in memory.

    Args:
        model: its parameters may be on the meta device; no longer trainable from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.names = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, DepthClassifier)) and name not in KEPT
        ]
        self._parts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def take(self, name: str, tensor: Tensor, index: int, num_parts: int) -> bool:
        """Quantise a parameter, or a part of it; with the last part its layer is replaced.

        Args:
            name: of the parameter.
            tensor: rows of the weight, any float dtype.
            index: which part it is.
            num_parts: that make the parameter, along dimension 0.

        Returns:
            Whether the parameter is one of those that are quantised; if not, nothing is done.
        """
        if name not in self.names:
            return False
        owner = name.removesuffix(".weight")
        layer: Any = self.model.get_submodule(owner)  # its bias is on the meta device if it comes later
        if isinstance(layer, DepthClassifier):
            by_depth = [Int8Linear(*quantize_rows(weight.T), None) for weight in tensor]  # (C, V) -> (V, C)
            self.model.set_submodule(owner, Int8DepthClassifier(by_depth, layer.bias))
            return True
        parts = self._parts.setdefault(name, {})
        parts[index] = quantize_rows(tensor)
        if len(parts) == num_parts:
            weights, scales = zip(*(parts[i] for i in range(num_parts)), strict=True)
            self.model.set_submodule(owner, Int8Linear(torch.cat(weights), torch.cat(scales), layer.bias))
            del self._parts[name]
        return True


def _prepack(weight: Tensor, scale: Tensor) -> Any:
    """The weights in the layout of the kernel."""
    with warnings.catch_warnings():  # the only way to hand weights to it is a type that is deprecated
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        quantized = torch._make_per_channel_quantized_tensor(
            weight, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0
        )
    return torch.ops.quantized.linear_prepack(quantized, None)
