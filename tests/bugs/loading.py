"""Bugs that tests/test_loading.py must see; tests/mutations.py plants them."""
BUGS = [
    ("all of a checkpoint is read before any is let go", "support/checkpoint.py",
     'return {name: fill(expected[name], read(), f"{source}: {name}")\n'
     "            for name, (_, read) in tensors.items()}",
     "whole = {name: read() for name, (_, read) in tensors.items()}\n"
     '    return {name: fill(expected[name], tensor, f"{source}: {name}")\n'
     "            for name, tensor in whole.items()}"),
]
