"""Training on several processes: pipelines with exits on any stage, sharded parameters, and what they cost."""
