"""What only a GPU can tell, in the minutes for which there is one: ``python -m benchmarks.gpu``.

For a bare machine with a CUDA device: a checkout, and a Python that has PyTorch, Triton and
pytest; no network, no virtual environment, nothing installed. :mod:`plan` has the steps in order
of worth, each a process of its own with a time of its own, and what one finds is on the disk
before the next begins.
"""
