"""What the drafts share that fuse several of the target's layers (EAGLE-3, arXiv 2503.01840, and
what is built on it). Not a method.
"""
