"""Bugs that tests/test_train.py must see; tests/mutations.py plants them."""
BUGS = [
    ("a gradient of the wrong sign", "train_adapter.py", "(scale * loss.sum()).backward()",
     "(-scale * loss.sum()).backward()"),
    ("a gradient that is cleared too early", "train_adapter.py", "    optimizer.step()\n",
     "    optimizer.zero_grad()\n    optimizer.step()\n"),
    ("a held-out document is trained on", "support/training_text.py",
     "return Windows(self.documents, args", "return Windows(self.documents + self.held, args"),
]
