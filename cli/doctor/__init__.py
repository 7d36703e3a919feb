"""What this machine is and what is wrong with it: facts are gathered, findings follow from them alone."""
