"""What setup.py needs to know of the machine, the compile graph it writes, and what else is made of this repository."""
