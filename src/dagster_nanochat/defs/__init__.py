"""The graph: one folder a stage."""
