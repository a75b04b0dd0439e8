#!/usr/bin/env python
"""`mindalle reconstruct` as a script: python tools/reconstruct.py --help."""

from mindalle.cli.reconstruct import main

if __name__ == "__main__":
    raise SystemExit(main())
