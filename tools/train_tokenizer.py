#!/usr/bin/env python
"""`mindalle train-tokenizer` as a script: python tools/train_tokenizer.py --help."""

from mindalle.cli.train_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())
