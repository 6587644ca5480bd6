"""Cache policies: which experts stay in the fast tier. One policy a file; bounds and replay beside them."""
