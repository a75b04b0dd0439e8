"""Autoregressive image-token generation: a prompt to pictures, from any released checkpoint or your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindalle.pipeline import Generation, Pipeline
    from mindalle.preview import Preview
    from mindalle.rerank import ClipReranker
    from mindalle.text import TextTokenizer
    from stage2_transformer.sampling import SamplingParams

_HOMES = {
    "ClipReranker": "mindalle.rerank",
    "Generation": "mindalle.pipeline",
    "Pipeline": "mindalle.pipeline",
    "Preview": "mindalle.preview",
    "SamplingParams": "stage2_transformer.sampling",
    "TextTokenizer": "mindalle.text",
}
__all__ = ["ClipReranker", "Generation", "Pipeline", "Preview", "SamplingParams", "TextTokenizer"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import mindalle` alone is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mindalle' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
