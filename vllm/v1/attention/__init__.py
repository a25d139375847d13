"""Per-step attention metadata."""
