#!/usr/bin/env python
"""`mindalle encode` as a script: python tools/encode.py --help."""

from mindalle.cli.encode import main

if __name__ == "__main__":
    raise SystemExit(main())
