#!/usr/bin/env python
"""`mindalle generate` as a script: python tools/generate.py --help."""

from mindalle.cli.generate import main

if __name__ == "__main__":
    raise SystemExit(main())
