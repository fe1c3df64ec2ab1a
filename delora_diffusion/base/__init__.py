"""A base model, read whole or in parts: its weights, its noise schedule, its latents."""
