"""Systems that the papers compare with, and a strong reference that trains nothing."""
