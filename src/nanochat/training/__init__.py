"""Training: one Trainer; the stages differ in data, loss and schedule."""
