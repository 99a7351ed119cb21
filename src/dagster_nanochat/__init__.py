"""The orchestration: assets, checks, jobs, launchers and the commands that need them."""
