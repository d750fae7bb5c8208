"""What the scripts at the root share, in three rooms: data, training, evaluation."""
