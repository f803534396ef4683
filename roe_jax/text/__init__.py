"""Text processing: tokenizer, chat format, and the answer in a chat model's output."""
