"""What the scripts at the root share, in three packages: data, training, evaluation."""
