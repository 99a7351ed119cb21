"""One model behind OpenAI's HTTP interface."""
