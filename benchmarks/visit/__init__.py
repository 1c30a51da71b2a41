"""A whole visit to a GPU in one command; README.md beside this file says what it does and what it leaves.

``__main__`` is the command line, ``program`` the steps in their order, ``steps`` runs them against a deadline,
``archive`` packs what they leave and unpacks it at home, ``warm`` compiles ahead, ``tune`` compares what could be
decided otherwise, ``kernels`` says where a call spends its time.
"""
