"""A trained model in the form that `transformers`, vLLM and the hub know: converted, compared, pushed."""
