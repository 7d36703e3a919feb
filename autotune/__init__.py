"""Decides the batch: facts in, plan out. Nothing here imports torch or the trainer."""
