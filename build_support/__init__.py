"""What setup.py needs to find out about the machine, and the compile graph it writes."""
