"""What leaves the project: the report card, pictures."""
