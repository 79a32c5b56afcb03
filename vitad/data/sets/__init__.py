"""One module a data set: how its folder is read, and what is published of it."""
