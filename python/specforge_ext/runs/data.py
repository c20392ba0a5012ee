"""The data set of a run: prompts from the recipe's sources, with the target's own continuations.

It is written once, by the producer, into `output_dir/data`, and read by every rank. A fingerprint of
everything that shaped it decides whether what lies there may be used again.
"""

from __future__ import annotations

FILE = "dataset.safetensors"
