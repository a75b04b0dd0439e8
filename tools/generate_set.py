#!/usr/bin/env python
"""`mindalle generate-set` as a script: python tools/generate_set.py --help."""

from mindalle.cli.generate_set import main

if __name__ == "__main__":
    raise SystemExit(main())
