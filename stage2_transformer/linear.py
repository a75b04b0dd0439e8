"""The linear layer of blocks and output layers: PyTorch's, read faster where a CPU decodes in float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`; without gradients, float32 on an x86 CPU goes through oneDNN instead of MKL.

    Decoding waits for weights. oneDNN reads large ones 1.6 times as fast for one row and 2 to 3 times for 2
    to 16, and from two rows on a row has the same bits whatever the others are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        if self._is_plain(x) and has_onednn():
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return product
        return super().forward(x)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether this is float32 on a CPU that nobody differentiates, casts or compiles."""
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


@cache
def has_onednn() -> bool:
    """Whether this torch has the kernel, and this CPU is one of those where it was measured."""
    is_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_available and torch.backends.cpu.get_cpu_capability().startswith("AVX")
