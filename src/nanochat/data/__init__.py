"""Text and conversations: sources, shards, packing, tasks and mixtures."""
