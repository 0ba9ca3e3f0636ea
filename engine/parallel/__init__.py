"""One model on several ranks: what they exchange inside a step, and which part of the model each has."""
