"""The command line: ``torchft`` and ``torchft_lighthouse``."""
