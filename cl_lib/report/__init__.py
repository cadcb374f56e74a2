"""What a reader sees: figures, claims, notebooks."""
