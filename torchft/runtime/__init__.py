"""What the whole process shares: its one event loop, deadlines, retries, addresses, log prefixes.

Nothing here knows what a quorum is, and nothing here imports torch.
"""
