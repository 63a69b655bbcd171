"""Damaged and hostile input, kills, leaks."""
