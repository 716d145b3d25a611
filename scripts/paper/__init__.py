"""What `paper_claim.py` is made of."""
