"""What the commands print for people, as tables and lines."""
