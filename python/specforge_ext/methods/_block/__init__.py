"""What the block drafts (DFlash, arXiv 2602.06036, and what is built on it) share. Not a method."""
