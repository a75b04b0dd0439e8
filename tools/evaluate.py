#!/usr/bin/env python
"""Measure a tokenizer, pictures or a model: python tools/evaluate.py reconstruct emoji my-pictures."""

from mindalle.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
