"""The four papers: their printed numbers, what their texts claim, and their tables run again.

`printed` numbers as data; `claims` of the texts; `tables` that can be run; `nearest` runs that fill them; `cells`
reported beside reproduced; `estimates` of the time that runs take; `layout` of cells as text.
"""
