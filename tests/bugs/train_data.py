"""Bugs that tests/test_train_data.py must see; tests/mutations.py plants them."""
BUGS = [
    ("a worker outlives its training", "support/data.py", "        os._exit(1)\n", ""),
]
