"""Training BERT's masked language model: text to token files (tokens.py), to examples (data.py), and the loop
(loop.py), which can be killed, resumed (saving.py) and spread over processes (ranks.py).
"""
