"""Evaluation: bits per byte and its baselines, multiple choice, held-out skills, samples."""
