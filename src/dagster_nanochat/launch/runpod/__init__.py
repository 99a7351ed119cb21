"""RunPod: rented machines through its REST API, version 2."""
