"""What tests share: tiny models, checkpoints, tokenizers, rows and runs, and stand-ins for what lies outside."""
