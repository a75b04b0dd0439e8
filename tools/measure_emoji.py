#!/usr/bin/env python
"""Measure a model on held-out emoji: python tools/measure_emoji.py reconstruct data/emoji."""

from mindalle.cli.measure_emoji import main

if __name__ == "__main__":
    raise SystemExit(main())
