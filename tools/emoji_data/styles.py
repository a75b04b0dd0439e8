"""The styles of drawing that the data set has, where each comes from and under which licence."""

from __future__ import annotations

from dataclasses import dataclass

FLAG_FONT_LICENCE = "OFL-1.1"


@dataclass(frozen=True, kw_only=True)
class Style:
    """One designer's way to draw emoji."""

    words: str  # what captions call it
    package: str  # of npm
    licence: str  # SPDX; neither share-alike nor non-commercial
    credit: str  # whom the licence wants named
    family: str = ""  # styles drawn after one master share it; "" = alone


STYLES = {  # in this order: of equal pictures the first is kept
    "noto": Style(
        words="noto style",
        package="@iconify-json/noto",
        licence="Apache-2.0",
        credit="Noto Emoji, (c) Google Inc.",
    ),
    "blob": Style(
        words="blob style",
        package="@iconify-json/noto-v1",
        licence="Apache-2.0",
        credit="Noto Emoji v1 (blobs), (c) Google Inc.",
    ),
    "twemoji": Style(
        words="twemoji style",
        package="@iconify-json/twemoji",
        licence="CC-BY-4.0",
        credit="Twemoji, (c) Twitter, Inc and other contributors.",
    ),
    "flat": Style(
        words="flat style",
        package="@iconify-json/fluent-emoji-flat",
        licence="MIT",
        credit="Fluent Emoji (flat), (c) Microsoft Corporation.",
        family="fluent",
    ),
    "firefox": Style(
        words="firefox style",
        package="@iconify-json/fxemoji",
        licence="Apache-2.0",
        credit="FxEmojis, (c) Mozilla.",
    ),
    "emojione": Style(
        words="emojione style",
        package="@iconify-json/emojione",
        licence="CC-BY-4.0",
        credit="EmojiOne 2.3 / EmojiTwo, github.com/EmojiTwo/emojitwo.",
    ),
    "streamline": Style(
        words="streamline style",
        package="@iconify-json/streamline-emojis",
        licence="CC-BY-4.0",
        credit="Streamline Emojis, streamlinehq.com.",
    ),
    "3d": Style(
        words="3d style",
        package="@lobehub/fluent-emoji-3d",
        licence="MIT",
        credit="Fluent Emoji (3D), (c) Microsoft Corporation.",
        family="fluent",
    ),
    "roundflag": Style(
        words="round",
        package="@iconify-json/circle-flags",
        licence="MIT",
        credit="circle-flags, (c) HatScripts.",
    ),
}


def family_of(style: str) -> str:
    """The family of a style; a style alone is its own."""
    return STYLES[style].family or style
