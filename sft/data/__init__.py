"""From the rows of a source to token ids with loss masks."""
