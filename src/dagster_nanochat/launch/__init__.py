"""Launchers: how a job gets a machine, and how the machine is given back."""
