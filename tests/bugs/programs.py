"""Bugs that tests/test_programs.py must see; tests/mutations.py plants them."""
BUGS = [
    ("PyTorch's warning of a missing NumPy is shown", "support/__init__.py",
     'warnings.filterwarnings("ignore", "Failed to initialize NumPy")\n', ""),
]
