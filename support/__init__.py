"""Nothing of the algorithm: files, text, the command line, kernels, graphs.

This file runs before all else of ours, and so before PyTorch is first imported, which warns if
there is no NumPy. Nothing here needs it.
"""
import warnings

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
