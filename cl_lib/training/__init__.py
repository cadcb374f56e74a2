"""A method, a stream and S networks: the learner and what it needs."""
