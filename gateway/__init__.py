"""The gateway: an OpenAI-compatible chat API that keeps every token as the engine sampled it."""
