"""Training of the embedded models: batches and configs."""
