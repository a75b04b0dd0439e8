#!/usr/bin/env python
"""`mindalle export` as a script: python tools/export.py --help."""

from mindalle.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
