"""A whole visit to a GPU in one command; README.md beside this file says what it does and what it leaves.

``__main__`` is the command line, ``program`` has the steps in order, ``steps`` runs them against a deadline,
``archive`` packs their results and unpacks them in a checkout, ``warm`` compiles ahead, ``tune`` compares alternatives
for the open choices, ``kernels`` shows where a call spends its time.
"""
