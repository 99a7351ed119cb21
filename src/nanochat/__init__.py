"""The model: data, tokenizer, training, evaluation, chat. Knows no orchestrator and no compute provider."""
