"""The options of commands that read captioned pictures: what their fields are called."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindalle.data.captions import Fields


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Add --caption-field and --image-field."""
    add = parser.add_argument
    add("--caption-field", metavar="NAME", help="of captions, in tables and JSON; default: known names")
    add("--image-field", metavar="NAME", help="of picture files, in tables and JSON; default: known names")


def fields_of(args: argparse.Namespace) -> Fields:
    """What the two options say."""
    from mindalle.data.captions import Fields

    return Fields(image=args.image_field, caption=args.caption_field)
