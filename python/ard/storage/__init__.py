"""Files that are whole or absent: shards, checkpoints, images."""
