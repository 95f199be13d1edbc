"""Files of texts, words or questions go in; tokenized rows, labels, metrics and readable predictions come out."""
