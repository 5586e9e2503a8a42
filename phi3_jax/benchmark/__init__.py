"""What a run's steps take, measured with random weights and tokens."""
