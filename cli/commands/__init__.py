"""What each command does, from what was typed to its result; those with many rooms of their own lie beside this."""
