"""Blocks that drafts share: rotary positions, norms, split attention, decoder layers."""
