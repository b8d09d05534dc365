"""What is forgotten and what is kept: rows, their text, their tokens."""
