"""What is typed: the options and the help of each command; what it does lies elsewhere."""
