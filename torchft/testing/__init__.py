"""Public helpers for testing code that uses torchft, and torchft itself."""
