"""The local engine: requests become sequences, one thread runs their models, events go back."""
