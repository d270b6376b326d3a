"""Training BERT's masked language model: text files to examples (data.py), and the loop (loop.py)."""
