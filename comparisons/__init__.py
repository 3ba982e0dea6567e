"""One question, many answerers, measured. Knows no HTTP and no provider: answerers come in, events come out."""
