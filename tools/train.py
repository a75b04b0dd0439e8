#!/usr/bin/env python
"""Train a model: python tools/train.py fit --config configs/toy/vqgan.yaml."""

from mindalle.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
