#!/usr/bin/env python
"""`mindalle convert` as a script: python tools/convert_checkpoint.py --help."""

from mindalle.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
