"""The model: a decoder-only Transformer with exchangeable positional schemes and attention mechanisms; an LSTM beside it."""
