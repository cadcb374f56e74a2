"""Stored samples: buffers, and what replay methods share."""
