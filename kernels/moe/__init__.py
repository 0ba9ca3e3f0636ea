"""Mixture-of-experts layers: which experts each token takes, and the products of tokens grouped by expert."""
