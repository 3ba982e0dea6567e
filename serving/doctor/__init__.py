"""`nearfar doctor`: what this machine is, and what can be served on it."""
