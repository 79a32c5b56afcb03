"""Scripts that time parts of the library; a package so that a test can use the plain recipe in `synthesis.py`."""
