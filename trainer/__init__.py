"""Obeys a plan: data to tokens, tokens to steps, steps to a model. All torch is here."""
