"""What a question, an answer and a model are: the nouns that every other package speaks in."""
