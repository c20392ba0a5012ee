"""Trains a draft from a method object and a source of steps: FSDP2, checkpoints, metrics."""
