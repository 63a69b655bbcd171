"""Who vouches for a manifest, whom this machine trusts, and which releases it has outgrown."""
