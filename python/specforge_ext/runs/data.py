"""The data set of a run: prompts from the recipe's sources, with the target's own continuations.

It is written once, by the producer, into `output_dir/data`, and read by every rank. A fingerprint of
everything that shaped it decides whether what lies there may be used again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specforge_ext.config import Config
from specforge_ext.engines import Engine
from specforge_ext.records import Prompt

FILE = "dataset.safetensors"
