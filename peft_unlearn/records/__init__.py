"""Signed records of what an adapter is for, of what, and what was measured; and the audit of one."""
