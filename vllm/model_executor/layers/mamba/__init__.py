"""State-space and linear-attention layers."""
