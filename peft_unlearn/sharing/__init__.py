"""Sharing: the card, publishing and fetching, and checking what was shared. Importing the room loads nothing heavy."""
