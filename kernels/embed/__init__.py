"""The step's first launch: each row's input token, and its row of the embedding."""
