"""Adapters of our own, as PEFT methods. Nothing here is imported before it is needed; see `registration`."""
