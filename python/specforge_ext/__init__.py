"""Trains speculative-decoding drafts from streamed hidden states, with native kernels."""

__version__ = "0.1.0"
