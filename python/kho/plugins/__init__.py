"""kho inside other tools: the command `%kho` of drgn, and plugins of volatility3."""
