#!/usr/bin/env python
"""Make the report of a model: python tools/report.py DATA --model emoji --judge CLIP --out docs/report."""

from mindalle.cli.report import main

if __name__ == "__main__":
    raise SystemExit(main())
