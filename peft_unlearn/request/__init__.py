"""From a question to a finished forget adapter: what the base knows, rows made of it, settings, judging."""
