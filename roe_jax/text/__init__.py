"""Text in and out: tokenizer, chat format, and the answer within a chat model's output."""
