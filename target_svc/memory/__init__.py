"""What memory the target may use: today the full context's budget, next the drafter's landlord."""
