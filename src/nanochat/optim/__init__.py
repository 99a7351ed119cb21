"""Optimizers: Muon for matrices, AdamW for tables, and their schedules."""
