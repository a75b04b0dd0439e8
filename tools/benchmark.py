#!/usr/bin/env python
"""`mindalle benchmark` as a script: python tools/benchmark.py --help."""

from mindalle.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
