"""Images cut into the tasks of a stream."""
