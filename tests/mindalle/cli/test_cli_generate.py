"""`generate.py`: every option does what it says, and what it writes can be found, read and drawn again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest_cli import Command, brightness, pixels, texts
from PIL import Image

from mindalle.image import contact_sheet, open_image
from mindalle.pipeline import Generation, Pipeline
