"""Photos and prompts, as training takes them: examples, cached latents, encoded text."""
