"""RunPod serverless: endpoints whose workers are real processes, a queue of jobs, an address to ask."""
